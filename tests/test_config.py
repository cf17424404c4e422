import pytest
from conftest import NO_TABLES, ROOT

import elm


def test_shipped_files_load():
    config = ROOT / "train.toml"
    sweep = elm.load_sweep(str(ROOT / "sweep.toml"), [f"base.config={config}"])
    assert sweep.study.trials == 12
    assert elm.load_config(str(config)) != elm.Config()


def test_a_file_without_tables_means_the_defaults():
    assert elm.load_config(NO_TABLES) == elm.load_config() == elm.Config()


@pytest.mark.parametrize(
    "override, message",
    [
        # unknown keys: the same name elsewhere, a similar one, a misspelled table's, none
        ("train.dir=x", "train.dir: unknown key, did you mean data.dir or output.dir?"),
        ("train.hidden_dim=8", "train.hidden_dim: unknown key, did you mean model.hidden_dim?"),
        ("hidden_dim=8", "hidden_dim: unknown key, did you mean model.hidden_dim?"),
        ("model.hiden_dim=8", "model.hiden_dim: unknown key, did you mean model.hidden_dim?"),
        ("model={hiden_dim=3}", "model.hiden_dim: unknown key, did you mean model.hidden_dim?"),
        ("modle.llm=x", "modle: unknown key, did you mean model?"),
        ("train.colour=red", "train.colour: unknown key"),
        # wrong types
        ("train.lr=fast", "train.lr = 'fast': Input should be a valid number"),
        ("train.batch_size=true", "train.batch_size = True: Input should be a valid integer"),
        ("model=3", "model = 3: must be a table, {name = value}"),
        ("model.template=x", "model.template = 'x': must be a table, {name = value}"),
        ("train.resume=true", "train.resume = True: must be a text in quotes"),
        ("eval.split=dev", "eval.split = 'dev': must be 'train', 'val' or 'test'"),
        # with the argument that was meant
        ("data.tasks=summary",
         """data.tasks = 'summary': must be a list, as 'data.tasks=["summary"]'"""),
        ("data.tasks=[summary, keywords]", """, as 'data.tasks=["summary", "keywords"]'"""),
        ("data.tasks=[1]", "data.tasks.0 = 1: must be a text in quotes"),
        ("data.tasks=2024-01-01", "data.tasks = datetime.date(2024, 1, 1): must be a list"),
        ("model.llm=3", """model.llm = 3: must be a text in quotes, as 'model.llm="3"'"""),
        ("train.warm_start=False",
         "train.warm_start = 'False': must be true or false, as train.warm_start=false"),
        ("wandb.enabled=yes", "must be true or false, as wandb.enabled=true"),
        ("train.lr=.1", "train.lr = '.1': Input should be a valid number, as train.lr=0.1"),
        ("train.max_steps=1e3", "1000.0: Input should be a valid integer, as train.max_steps=1000"),
        ("model.template.enable_thinking=False",
         "model.template: enable_thinking = 'False': TOML writes false"),
        ("model.grad_checkpoint=True", "true, false or 'auto', as model.grad_checkpoint=true"),
        # values out of range
        ("train.lr=0", "train.lr = 0: Input should be greater than 0"),
        ("train.lr=inf", "train.lr = inf: Input should be a finite number"),
        ("data.tasks=[]", "data.tasks = []: must have an entry"),
        ("model.grad_checkpoint=maybe", "grad_checkpoint = 'maybe': must be true, false or 'auto'"),
        ('output.dir="a\\u0000b"', "output.dir: a path cannot hold a NUL character"),
        # DeepSpeed's own keys
        ("deepspeed.train_batch_size=4", "deepspeed: train_batch_size is set by elm"),
        ("deepspeed={zero_stage=3, zero_optimization={stage=2}}", "stage is set by elm"),
        ("deepspeed.zero_optimization.x=3", "has no effect unless deepspeed.zero_stage = 3"),
        ("deepspeed.zero_stag=2", "deepspeed: zero_stag: unknown key, did you mean zero_stage?"),
        ('output.dir=""', "output.dir: a path cannot be empty; none restores the default"),
        # no overrides at all
        ("train.lr", "train.lr: a setting is one word, name=value; quote a value with spaces: "
         "'query=What is it about?'"),
        ("=3", "=3: a setting is one word, name=value; quote a value with spaces: "
         "'query=What is it about?'"),
        ("", "an empty argument; a setting is one word, name=value"),
        ("train.lr=" + "[" * 9999, "train.lr = '[[["),
    ],
)
def test_each_kind_of_mistake_is_named(override, message):
    with pytest.raises(elm.UserError) as e:
        elm.load_config(None, [override])
    (line,) = str(e.value).splitlines()
    assert message in line


def test_a_setting_below_one_that_is_no_table():
    with pytest.raises(elm.UserError, match="^train.lr.x: lr is not a table$"):
        elm.load_config(None, ["train.lr=1.0", "train.lr.x=2"])


def test_all_mistakes_are_told_each_with_where_it_stands(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[train]\nepochs = 0\n[data]\ntasks = ['summary']\n")
    with pytest.raises(elm.UserError) as e:
        elm.load_config(str(path), ["train.lr=fast", "data.tasks=nope", "data.dirr=x"])
    assert str(e.value).splitlines() == [
        """data.tasks = 'nope': must be a list, as 'data.tasks=["nope"]'""",
        "data.dirr: unknown key, did you mean data.dir?",
        f"{path}: train.epochs = 0: Input should be greater than 0",  # of the file
        "train.lr = 'fast': Input should be a valid number",
    ]


@pytest.mark.parametrize(
    "content", [b"x = \n", b"# a note\rx = 1.0\n", b"x = " + b"[" * 9999, b"x = \xff"],
    ids=["no value", "carriage return", "endless nesting", "no UTF-8"])  # fmt: skip
def test_bytes_that_are_no_toml(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(elm.UserError, match="bad.toml: not valid TOML"):
        elm.load_config(str(path))


def test_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAME", "run")
    (tmp_path / "run.toml").write_text('[output]\ndir = "~/$NAME"\n')
    cfg = elm.load_config("~/$NAME.toml", ["model.llm=$HOME/llm", "train.resume=$UNSET/x"])
    assert cfg.output.dir == f"{tmp_path}/run"
    assert cfg.model.llm == f"{tmp_path}/llm"
    assert cfg.train.resume == "$UNSET/x"

    overrides = ["adapter=~/a", "embeddings=$NAME", "query=Q"]
    options = elm.load_config(None, overrides, elm.GenerateOptions)
    assert options.adapter == f"{tmp_path}/a"
    assert options.embeddings == "run"


@pytest.mark.parametrize("key", ["train.lr", "model.llm", "train.resume", "output"])
def test_nothing_after_the_equals_sign_is_refused(key):
    """As train.lr=$LR gives where LR is not set: it would silently mean the default."""
    with pytest.raises(elm.UserError) as e:
        elm.load_config(None, [f"{key}= ", "x"])
    assert str(e.value).splitlines() == [
        f"{key}: no value after the =; none restores the default, \"''\" is an empty text",
        "x: a setting is one word, name=value; quote a value with spaces: "
        "'query=What is it about?'"]


def test_an_empty_text_is_given_in_quotes():
    overrides = ["adapter=a", "embeddings=b"]
    for query in ("query=''", 'query=""'):
        options = elm.load_config(None, [*overrides, query], elm.GenerateOptions)
        assert options.query == ("",)


def test_the_file_of_a_sweep_is_no_trainings():
    with pytest.raises(elm.UserError) as e:
        elm.load_config(str(ROOT / "sweep.toml"))
    path = ROOT / "sweep.toml"
    assert str(e.value) == f"{path}: is the file of a sweep: python elm.py sweep {path}"


def test_a_toml_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, message in (
        ("x/y.toml", f"there is no file x/y.toml here ({tmp_path}); paths are relative to it"),
        (f"{tmp_path}/y.toml", f"there is no file {tmp_path}/y.toml"),
        (".", ". is a folder, not a file"),
    ):
        with pytest.raises(elm.UserError) as e:
            elm.load_config(path)
        assert str(e.value) == message


def test_none_restores_the_default():
    overrides = ["eval.embedder=none", "train.max_steps=none", "train.lr=none", "output=none"]
    cfg = elm.load_config(str(ROOT / "train.toml"), overrides)
    assert cfg.eval.embedder is None
    assert cfg.train.max_steps is None
    assert cfg.train.lr == 1e-4
    assert cfg.output == elm.OutputConfig()
    assert cfg.train.batch_size == 32  # of the file


def test_the_last_of_equal_overrides_counts():
    assert elm.load_config(None, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_task_types_are_listed_once():
    assert elm.load_config(None, ['data.tasks=["own", "own"]']).data.tasks == ("own",)


def test_keys_by_their_dotted_names():
    keys = elm.dotted_keys(elm.Config)
    assert {"model", "model.llm", "data.tasks", "output.log_file"} <= set(keys)
    assert keys.index("train.lr") < keys.index("loss.drift_weight")
    assert len(set(keys)) == len(keys)
