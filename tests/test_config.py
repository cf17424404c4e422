import dataclasses

import pytest
from conftest import ROOT

import elm


def test_empty_file_means_the_defaults(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert elm.load_config(str(path)) == elm.load_config() == elm.Config()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_files_load(path):
    if path.name == "sweep.toml":
        assert elm.load_sweep(str(path), [f"base.config={ROOT / 'train.toml'}"]).study.trials == 12
    elif path.name != "pyproject.toml":
        elm.load_config(str(path))


def test_config_survives_its_own_toml(tmp_path):
    overrides = [
        "train.lr=3e-4",
        'data.tasks=["summary"]',
        "model.grad_checkpoint=true",
        "deepspeed.zero_optimization={contiguous_gradients=false}",
        "wandb.run_name=x y",
    ]
    cfg = elm.load_config(None, overrides)
    assert cfg.train.lr == 3e-4 and cfg.data.tasks == ("summary",)
    path = tmp_path / "again.toml"
    path.write_text(elm.config_text(cfg))
    assert elm.load_config(str(path)) == cfg


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.learning_rate=1", ["train.learning_rate", "unknown key"]),
        ("train.lrr=1", ["train.lrr", "did you mean train.lr?"]),
        ("modl.llm=x", ["modl", "did you mean model?"]),
        ("model.hiden_dim=8", ["did you mean model.hidden_dim?"]),
        ("data.taks=[]", ["did you mean data.tasks?"]),
        ("loss.drift=0.1", ["loss.drift"]),
        ("eval.sample=3", ["did you mean eval.samples?"]),
        ("wandb.enable=true", ["did you mean wandb.enabled?"]),
        ("output.directory=x", ["output.directory"]),
        ("train.lr=0", ["train.lr = 0", "float in (0, inf)"]),
        ("train.lr=fast", ["train.lr = 'fast'", "float in (0, inf)"]),
        ("train.lr=inf", ["train.lr = inf"]),
        ("train.batch_size=true", ["train.batch_size = True", "int in [1, inf)"]),
        ("train.batch_size=1.5", ["train.batch_size = 1.5"]),
        ("model.dropout=1.0", ["model.dropout = 1.0", "[0, 1)"]),
        ("model.grad_checkpoint=maybe", ["model.grad_checkpoint = 'maybe'", "or 'auto'"]),
        ("model.llm=3", ["model.llm = 3", "must be str"]),
        ("train.max_steps=0", ["train.max_steps = 0", "int in [1, inf)"]),
        ("eval.split=dev", ["eval.split = 'dev'", "'train', 'val', 'test'"]),
        ("data.tasks=[]", ["data.tasks: unknown task ''"]),
        ('data.tasks=["sumary"]', ["unknown task 'sumary'", "did you mean summary?"]),
        ("data.tasks=summary", ["data.tasks = 'summary'"]),
        ("deepspeed.zero_stage=4", ["deepspeed.zero_stage = 4", "[0, 3]"]),
        ("deepspeed.train_batch_size=4", ["deepspeed.train_batch_size", "elm computes it"]),
        ("deepspeed.zero_optimization.stage=2", ["deepspeed.zero_optimization", "zero_stage"]),
        ("deepspeed.zero_optimization=3", ["deepspeed.zero_optimization"]),
        ("loss.distill_weight=0.1", ["loss.distill_weight", "not built yet"]),
        ("model=3", ["model: is not a table of section.key=value"]),
        ('output.dir="a\\u0000b"', ["output.dir = 'a\\x00b'", "must be str"]),
        ("deepspeed.zero_stag=2", ["deepspeed.zero_stag", "did you mean zero_stage?"]),
        ("deepspeed.zero_optmization.x=3", ["did you mean zero_optimization?"]),
        ("train.lr=1" + "0" * 400, ["train.lr", "float in (0, inf)"]),
        ("train.lr", ["section.key=value"]),
        ("train.lr.x.y=1", ["train.lr"]),
    ],
)
def test_each_mistake_is_named(override, words):
    with pytest.raises(elm.UserError) as e:
        elm.load_config(None, [override])
    assert len(str(e.value).splitlines()) == 1
    for word in words:
        assert word in str(e.value)


def test_all_mistakes_of_a_file_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[train]\nlrr = 1\nepochs = 0\n[modell]\nx = 1\n[data]\ntasks = ['nope']\n")
    with pytest.raises(elm.UserError) as e:
        elm.load_config(str(path))
    lines = str(e.value).splitlines()
    assert len(lines) == 4 and all(line.startswith(f"{path}: ") for line in lines)


def test_a_mistake_is_blamed_on_where_it_stands(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[train]\nepochs = 0\n[data]\ntasks = ['summary']\n")
    with pytest.raises(elm.UserError) as e:
        elm.load_config(str(path), ["train.lr=fast", 'data.tasks=["nope", 1]', "data.dirr=x"])
    assert str(e.value).splitlines() == [
        f"{path}: train.epochs = 0: must be int in [1, inf)",
        "override: train.lr = 'fast': must be float in (0, inf)",
        "override: data.tasks = ['nope', 1]: must be list of str, [ ] quoted from the shell",
        "override: data.dirr: unknown key, did you mean data.dir?",
    ]


def test_unreadable_files(tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("[train]\nlr = \n")
    with pytest.raises(elm.UserError, match="not valid TOML.*line 2"):
        elm.load_config(str(path))
    with pytest.raises(FileNotFoundError):
        elm.load_config(str(tmp_path / "missing.toml"))


def test_every_key_of_the_contract():
    """Golden: a key that comes or goes is a change for users, and belongs into the README."""
    keys = {f"{name}.{f.name}" for name, section in elm.SECTIONS.items()
            for f in dataclasses.fields(section)}  # fmt: skip
    assert keys == set(
        """model.llm model.hidden_dim model.tokens model.dropout model.residual_scale
        model.standardize model.bf16 model.grad_checkpoint data.dir data.tasks data.max_seq_length
        data.num_workers train.batch_size train.grad_accum train.epochs train.max_steps train.lr
        train.warmup_steps train.weight_decay train.max_grad_norm train.eval_steps train.save_steps
        train.logging_steps train.seed train.resume loss.drift_weight loss.drift_target
        loss.distill_weight eval.samples eval.max_new_tokens eval.embedder eval.split
        eval.bertscore_model eval.bertscore_layers deepspeed.zero_stage deepspeed.extra
        wandb.enabled wandb.project wandb.run_name output.dir output.log_file""".split()
    )


@pytest.mark.parametrize(
    "text", [b"# a note\rtrain.lr = 1.0\n", b"train.lr = " + b"[" * 9999, b"train.lr = \xff"]
)
def test_bytes_that_are_no_toml(tmp_path, text):
    """A carriage return alone ends no comment; nesting without end is no crash."""
    path = tmp_path / "bad.toml"
    path.write_bytes(text)
    with pytest.raises(elm.UserError, match="bad.toml: not valid TOML"):
        elm.load_config(str(path))


def test_an_override_nested_without_end():
    with pytest.raises(elm.UserError, match="train.lr"):
        elm.load_config(None, ["train.lr=" + "[" * 9999])


def test_any_character_survives_config_toml():
    value = {"\U0001f600 \x7f": "\x7f\u2028\U0001f600"}
    assert elm.tomllib.loads(f"x = {elm.to_toml(value)}")["x"] == value
