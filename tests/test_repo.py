"""The repository itself: its style, what its documents name, what a command costs to ask."""

import ast
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command

import elm

README = (ROOT / "README.md").read_text("utf-8")
SOURCE = (ROOT / "elm.py").read_text("utf-8")
TREE = ast.parse(SOURCE)
PROGRAMS = [ROOT / "elm.py", *sorted((ROOT / "data").glob("*.py"))]
HEAVY = {
    "accelerate", "bert_score", "deepspeed", "huggingface_hub", "jinja2", "matplotlib", "optuna",
    "pandas", "scipy", "sentence_transformers", "sklearn", "tokenizers", "transformers",
    "wandb"}  # fmt: skip


# -----------------------------------------------------------------------------
# Style


def test_ruff():
    words = [sys.executable, "-m", "ruff", "check", "."]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def is_assignment_of_unrelated_values(node: ast.Assign) -> bool:
    """`a, b = x, y`, but not the swap `a, b = b, a`."""
    if not isinstance(node.value, ast.Tuple):
        return False
    values = sorted(ast.unparse(value) for value in node.value.elts)
    for target in node.targets:
        if isinstance(target, ast.Tuple):
            return sorted(ast.unparse(name) for name in target.elts) != values
    return False


@pytest.mark.parametrize("path", [ROOT / "elm.py", ROOT / "data/prepare.py"], ids=lambda p: p.name)
def test_code_is_not_dense(path):
    """What a reader has to decode, per 100 lines."""
    source = path.read_text("utf-8")
    hundreds = len(source.splitlines()) / 100
    comprehensions = 0
    tuples = 0
    walruses = []
    tests = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            comprehensions += 1
        elif isinstance(node, ast.Assign) and is_assignment_of_unrelated_values(node):
            tuples += 1
        elif isinstance(node, ast.NamedExpr):
            walruses.append(node)
        elif isinstance(node, ast.While | ast.If):
            tests.append(node.test)
    assert comprehensions / hundreds <= 3
    assert tuples / hundreds <= 0.5
    assert len(walruses) / hundreds <= 0.3
    assert all(walrus in tests for walrus in walruses)


def test_contents_are_the_section_titles():
    """The table at the end of the docstring, in order."""
    contents = elm.__doc__.partition("\nContents\n")[2]
    names = re.findall(r"^    (\S+(?: \S+)*)  +\S", contents, re.MULTILINE)
    titles = re.findall(r"^# -{77}\n# (.+)", SOURCE, re.MULTILINE)
    assert names == titles
    assert len(titles) > 10


# -----------------------------------------------------------------------------
# Security


def name_of_call(node: ast.Call) -> str:
    """The last part of the name of what is called."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return getattr(node.func, "id", "")


def constants(node: ast.Call) -> dict:
    """The keywords of a call that are constants."""
    return {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_nothing_runs_code_from_files_or_trusts_remote_code(path):
    source = path.read_text("utf-8")
    assert "trust_remote_code=True" not in source
    assert "weights_only=False" not in source
    assert "allow_pickle=True" not in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            assert [alias.name for alias in node.names] == ["UnpicklingError"]
        if isinstance(node, ast.Import):
            assert not {"pickle", "dill", "joblib"} & {alias.name for alias in node.names}
        if not isinstance(node, ast.Call):
            continue
        name = name_of_call(node)
        if name in ("from_pretrained", "SentenceTransformer"):
            assert constants(node)["trust_remote_code"] is False, ast.unparse(node)
        if ast.unparse(node.func) == "torch.load":
            assert constants(node)["weights_only"] is True, ast.unparse(node)
        if isinstance(node.func, ast.Name):
            assert name not in ("eval", "exec", "compile", "__import__"), ast.unparse(node)


def test_models_are_loaded_in_one_place_each():
    calls = [name_of_call(node) for node in ast.walk(TREE) if isinstance(node, ast.Call)]
    assert calls.count("from_pretrained") == 1
    assert calls.count("SentenceTransformer") == 1
    assert SOURCE.count("torch.load(") == 1


# -----------------------------------------------------------------------------
# Documents


def leaf_keys(config_class: type[elm.Table]) -> set[str]:
    """Dotted keys but those of tables."""
    keys = elm.dotted_keys(config_class)
    tables = {key.rpartition(".")[0] for key in keys}
    return set(keys) - tables


def test_toml_of_the_readme_is_a_config(tmp_path):
    (text,) = re.findall(r"^```toml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.toml").write_text(text)
    cfg = elm.load_config(str(tmp_path / "mine.toml"))
    assert cfg.data.dir == "data/large" and cfg.train.lr == 1e-3


def test_readme_names_every_key():
    told = set()
    for section, names in re.findall(r"^\| (\w+)\.([\w, ]+) \|", README, re.MULTILINE):
        told |= {f"{section}.{name}" for name in names.split(", ")}
    assert told == leaf_keys(elm.Config) - {"deepspeed.zero_optimization"}


METRICS = [
    "step", "epoch", "loss", "lm_loss", "drift_loss", "lr", "grad_norm", "similarity",
    "tokens_per_second", "memory_gib", "val_loss", "val_loss_shuffled", "val_loss_text",
    "loss_shuffled", "loss_text", "loss_nearest", "gain_over_nearest", "rows_nearest",
    "gap_closed", "bertscore_precision", "empty_rate", "repetition",
    "consistency", "mrr", "top1", "intervals", "samples",
    "samples_nearest"]  # fmt: skip


@pytest.mark.parametrize(
    "names", [METRICS, elm.GenerateOptions.model_fields, elm.StudyConfig.model_fields],
    ids=["metrics", "generate", "study"])  # fmt: skip
def test_readme_names_every_metric_and_option(names):
    missing = [name for name in names if not re.search(rf"\b{name}\b", README)]
    assert not missing


@pytest.mark.parametrize("name", [command.name for command in elm.COMMANDS])
def test_help_of_a_command_names_every_key(name):
    (config_class,) = [c.config_class for c in elm.COMMANDS if c.name == name]
    code, said = command(name, "--help")
    assert code == 0
    told = set()
    section = ""
    for line in said.splitlines():
        if re.fullmatch(r"\[\w+\]", line):
            section = line.strip("[]") + "."
        field = re.match(r"    (\w+)( = .+)? \(.+\)(  #|$)", line)
        if field:
            told.add(section + field[1])
    keys = leaf_keys(config_class)
    tables = set(elm.dotted_keys(config_class)) - keys
    assert told - tables == keys


# -----------------------------------------------------------------------------
# The cost of a question


def test_questions_import_no_heavy_packages(processes):
    """Also a mistyped key is told at once."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import elm
for words in (["--version"], ["--help"], ["train", "--help"], ["eval", "--help"],
              ["generate", "--help"], ["sweep", "--help"]):
    assert elm.main(words) == 0, words
assert elm.main(["train.toml", "train.learning_rat=1"]) == 2
found = {HEAVY} & set(sys.modules)
assert not found, found
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "elm: train.learning_rat: unknown key" in done.stderr


def cpu_seconds(*words: str) -> float:
    """The least CPU time of three runs of python."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode in (0, 2), done.stderr
    return min(times)


@pytest.mark.parametrize(
    "path", ["tests/full_size.py", "tests/scale.py", "tests/torture.py", "data/tiny/make.py"])
def test_help_of_a_script_starts_nothing(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert e.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {Path(path).name} [-h]")


def test_questions_cost_little_more_than_torch(processes):
    limit = 1.3 * cpu_seconds("-c", "import torch")
    assert cpu_seconds("elm.py", "train", "--help") < limit
    assert cpu_seconds("elm.py", "--version") < limit
    assert cpu_seconds("elm.py", "train.toml", "train.learning_rat=1") < limit
