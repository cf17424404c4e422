import pytest
from conftest import NO_TABLES, ROOT

import elm


def test_files_load():
    """The shipped ones; one without a table means the defaults."""
    config = ROOT / "train.toml"
    assert elm.load_sweep(str(ROOT / "sweep.toml"), [f"base.config={config}"]).study.trials == 12
    assert elm.load_config(str(config)) != elm.Config()
    assert elm.load_config(NO_TABLES) == elm.load_config() == elm.Config()


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.learning_rate=1", ["train.learning_rate", "did you mean train.lr?"]),
        ("num_train_epochs=1", ["num_train_epochs: unknown key, did you mean train.epochs?"]),
        ("train.dir=x", ["did you mean data.dir or output.dir?"]),
        ("model.hiden_dim=8", ["did you mean model.hidden_dim?"]),
        ("train.hidden_dim=8", ["did you mean model.hidden_dim?"]),
        ("eval.embeder=none", ["did you mean eval.embedder?"]),
        ("train.lr=0", ["train.lr = 0: must be greater than 0"]),
        ("train.lr=fast", ["train.lr = 'fast': must be a valid number"]),
        ("train.lr=inf", ["train.lr = inf: must be a finite number"]),
        ("train.batch_size=true", ["train.batch_size = True: must be a valid integer"]),
        ("train.seed=4294967296", ["train.seed = 4294967296: must be less than 4294967296"]),
        ("model.dropout=1.0", ["model.dropout = 1.0: must be less than 1"]),
        ("model.bf16=1", ["model.bf16 = 1: must be a valid boolean"]),
        ("model.grad_checkpoint=maybe", ["= 'maybe': must be true, false or 'auto'"]),
        ("data.tasks=[]", ["data.tasks = []: must have at least 1 item"]),
        ("data.tasks=summary", ["data.tasks = 'summary': must be a list, in quotes"]),
        ("deepspeed.train_batch_size=4", ["deepspeed.train_batch_size: is set by elm"]),
        ("deepspeed.zero_optimization.stage=2", ["deepspeed.zero_optimization: is set by elm"]),
        ("deepspeed.zero_optimization=3", ["deepspeed.zero_optimization = 3: must be a table"]),
        ("deepspeed.zero_optimization.x=3", ["has no effect unless deepspeed.zero_stage = 3"]),
        ("deepspeed.zero_stag=2", ["deepspeed.zero_stag: unknown", "did you mean zero_stage?"]),
        ("model=3", ["model = 3: must be a table"]),
        ("model={hiden_dim=3}", ["model.hiden_dim", "did you mean model.hidden_dim?"]),
        ('output.dir="a\\u0000b"', ["output.dir = 'a\\x00b': must match pattern"]),
        ("train.lr", ["section.key=value"]),
        ("train.lr.x.y=1", ["train.lr"]),
        ("train.lr=" + "[" * 9999, ["train.lr"])])
def test_each_mistake_is_named(override, words):
    with pytest.raises(elm.UserError) as e:
        elm.load_config(None, [override])
    assert len(str(e.value).splitlines()) == 1
    for word in words:
        assert word in str(e.value)


def test_all_mistakes_are_told_each_with_where_it_stands(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[train]\nepochs = 0\n[data]\ntasks = ['summary']\n")
    with pytest.raises(elm.UserError) as e:
        elm.load_config(str(path), ["train.lr=fast", "data.tasks=nope", "data.dirr=x"])
    assert str(e.value).splitlines() == [
        f"{path}: data.tasks = 'nope': must be a list, in quotes on the command line",
        f"{path}: data.dirr: unknown key, did you mean data.dir?",
        f"{path}: train.epochs = 0: must be greater than 0",
        f"{path}: train.lr = 'fast': must be a valid number",
    ]


def test_bytes_that_are_no_toml(tmp_path):
    """A carriage return alone ends no comment; nesting without end is no crash."""
    path = tmp_path / "bad.toml"
    for text in (b"x = \n", b"# a note\rx = 1.0\n", b"x = " + b"[" * 9999, b"x = \xff"):
        path.write_bytes(text)
        with pytest.raises(elm.UserError, match="bad.toml: not valid TOML"):
            elm.load_config(str(path))


def test_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAME", "run")
    (tmp_path / "run.toml").write_text('[output]\ndir = "~/$NAME"\n')
    cfg = elm.load_config("~/$NAME.toml", ["model.llm=$HOME/llm", "train.resume=$UNSET/x"])
    assert cfg.output.dir == f"{tmp_path}/run" and cfg.model.llm == f"{tmp_path}/llm"
    assert cfg.train.resume == "$UNSET/x"
    options = elm.load_config(None, ["adapter=~/a", "embeddings=$NAME", "query=Q"],
                              elm.GenerateOptions)  # fmt: skip
    assert options.adapter == f"{tmp_path}/a" and options.embeddings == "run"


def test_none_and_nothing_restore_the_default():
    overrides = ["eval.embedder=none", "train.max_steps=", "train.lr=none", "output=none"]
    cfg = elm.load_config(str(ROOT / "train.toml"), [*overrides, 'data.tasks=["own", "own"]'])
    assert cfg.data.tasks == ("own",)
    assert cfg.eval.embedder is None and cfg.train.max_steps is None and cfg.train.lr == 1e-4
    assert cfg.output == elm.OutputConfig() and cfg.train.batch_size == 32


def test_help_and_version(capsys):
    for command, words in {
        "train.toml": "train.lr: PositiveFloat = 1e-4",
        "eval": "adapter: PathStr",
        "generate": "seed: Seed = 42",
        "embed": "bf16: bool = True",
        "sweep": "study.trials: PositiveInt = 50  # of all",
        "--version": f"elm {elm.__version__}",
    }.items():
        assert elm.main([command, "--help"]) == 0
        assert words in capsys.readouterr().out
