import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import elm

SOURCE = (ROOT / "elm.py").read_text()
MAX_LINES = 2765  # of elm.py
README = (ROOT / "README.md").read_text()


def test_size_of_the_one_file():
    lines = SOURCE.splitlines()
    assert len(lines) <= MAX_LINES and max(map(len, lines)) <= 100
    assert f"at most {MAX_LINES:,}" in README


def test_size_of_the_readme():
    lines = README.splitlines()
    assert len(lines) <= 220
    assert all(len(line) <= 100 or line.startswith("|") for line in lines)
    shown = re.sub(r"<details>.*?</details>", "", README, flags=re.DOTALL)
    assert len(shown.splitlines()) <= 110


def test_sections_in_the_order_of_reading():
    titles = re.findall(r"^# -{77}\n# (\w+)", SOURCE, re.MULTILINE)
    assert titles == ["Config", "Runtime", "Data", "Model", "Losses", "Checkpoint", "Training",
                      "Evaluation", "Commands", "Synthesis", "Sweep", "Command"]  # fmt: skip


def test_only_the_loop_is_long():
    for node in ast.walk(ast.parse(SOURCE)):
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.FunctionDef) and inner.name != "train":
                most = 12 if isinstance(node, ast.FunctionDef) else 60
                assert inner.end_lineno - inner.lineno < most, inner.name


def test_nothing_runs_code_from_files_or_trusts_remote_code():
    assert "weights_only=False" not in SOURCE and "pickle" not in SOURCE
    assert SOURCE.count(".from_pretrained(") == SOURCE.count(".SentenceTransformer(") == 1
    assert SOURCE.count("trust_remote_code=False") == 2
    assert SOURCE.count("torch.load(") == SOURCE.count("weights_only=True")


def test_readme_names_every_key_metric_and_option():
    keys = """step epoch loss lm_loss drift_loss lr grad_norm tokens_per_second memory_gib
        similarity val_loss val_loss_shuffled val_loss_text loss_shuffled loss_text gap_closed
        bertscore_precision empty_rate repetition consistency mrr top1 intervals samples""".split()
    told = set()
    for section, names in re.findall(r"^\| (\w+)\.([\w, ]+) \|", README, re.MULTILINE):
        told |= {f"{section}.{name}" for name in names.split(", ")}
    options = elm.list_options(elm.Config).keys() - elm.Config.model_fields.keys()
    assert told == options - {"deepspeed.zero_optimization"}
    for kind in (elm.EmbedOptions, elm.GenerateOptions, elm.StudyConfig):
        keys += kind.model_fields
    for key in keys:
        assert key in README, key


def test_ruff():
    pytest.importorskip("ruff")
    words = [sys.executable, "-m", "ruff", "check", "."]
    done = subprocess.run(words, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
