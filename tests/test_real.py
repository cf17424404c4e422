"""The real data set, data/real: what its README says about it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, read_jsonl, rows_path, vectors_path

import elm

REAL = ROOT / "data" / "real"
NUM_TEXTS = {"train": 2000, "val": 100, "test": 200}


runs = load_script("data/real/runs.py")


def test_its_splits_share_no_package_and_every_row_keeps_its_own():
    packages = {}
    for split, num_texts in NUM_TEXTS.items():
        rows = read_jsonl(rows_path(REAL, split))
        table = elm.open_vectors(vectors_path(REAL, split))
        assert table.shape == (num_texts, 384)
        assert str(table.dtype) == "torch.float16"
        norms = table.float().norm(dim=1)
        assert (norms - 1).abs().max() < 1e-3
        package_of_vector = {}
        for row in rows:
            known = package_of_vector.setdefault(row["embedding_file_idx"], row["package"])
            assert row["package"] == known and row["section"]
        packages[split] = set(package_of_vector.values())
        assert len(packages[split]) == len(package_of_vector) > 0.95 * num_texts
    assert not packages["train"] & packages["val"]
    assert not packages["train"] & packages["test"]
    assert not packages["val"] & packages["test"]


@pytest.mark.parametrize("name", runs.RUNS)
def test_the_settings_of_its_runs_are_valid(name):
    _, settings = runs.RUNS[name]
    elm.load_config(str(REAL / "train.toml"), settings)


@pytest.mark.parametrize("name", sorted(path.name for path in (REAL / "runs").glob("*")))
def test_a_kept_run_is_that_of_its_name(name):
    llm, settings = runs.RUNS[name]
    folder = REAL / "runs" / name
    assert sorted(path.name for path in folder.iterdir()) == sorted(runs.KEPT)
    kept = elm.load_config(str(folder / "config.toml"))
    expected = elm.load_config(str(REAL / "train.toml"), settings)
    for section in ("data", "train", "loss"):
        # embedder: the place of MiniLM, which some runs name by eval.embedder
        theirs = getattr(kept, section).model_dump(exclude={"resume", "embedder"})
        assert theirs == getattr(expected, section).model_dump(exclude={"resume", "embedder"})
    assert kept.model.tokens == expected.model.tokens
    assert Path(kept.model.llm).name == Path(llm).name
    result = json.loads((folder / "eval.json").read_text())
    assert result["step"] == expected.train.max_steps
    assert result["split"] == "test"


def test_the_table_of_its_readme_is_of_the_kept_runs():
    assert runs.table() in (REAL / "README.md").read_text()


def test_marked_answers_are_rows_of_it_unless_a_rule_drops_them():
    rows = set()
    for split in NUM_TEXTS:
        for row in read_jsonl(rows_path(REAL, split)):
            rows.add((row["package"], row["query"], row["response"]))
    marked = read_jsonl(REAL / "marks.jsonl")
    assert len(marked) == 150
    for answer in marked:
        is_kept = answer["dropped_by"] is None
        assert ((answer["package"], answer["query"], answer["response"]) in rows) == is_kept


def test_its_rules_keep_every_row_of_it():
    choose = load_script("data/real/choose.py")
    for split in NUM_TEXTS:
        for fields in read_jsonl(rows_path(REAL, split)):
            assert choose.dropped_by(elm.Row(**fields)) is None


def test_its_rules_drop_what_is_marked_so():
    """By the texts of other rows about the same packages, where there are any."""
    choose = load_script("data/real/choose.py")
    text_of = {}
    for split in NUM_TEXTS:
        for fields in read_jsonl(rows_path(REAL, split)):
            text_of[fields["package"]] = fields["text"]
    num_dropped = 0
    for answer in read_jsonl(REAL / "marks.jsonl"):
        if answer["package"] not in text_of:
            continue
        row = elm.Row(
            task_type=answer["task_type"], embedding_file_idx=0, query=answer["query"],
            response=answer["response"], text=text_of[answer["package"]])
        assert choose.dropped_by(row) == answer["dropped_by"]
        num_dropped += answer["dropped_by"] is not None
    assert num_dropped > 5


# The released adapters

MODELS = REAL / "models"
TEXTS_ASKED_ABOUT = (
    "A tool that draws maps of the night sky and shows the positions of planets and stars.",
    "Python bindings for a library that reads and writes audio files in many formats.",
    "A small web server for static files, with support for TLS and virtual hosts.")


@pytest.mark.parametrize("file", runs.RELEASED)
def test_a_released_adapter_is_that_of_its_run(file):
    """In bf16, with the figures of the run's report and the hub's names of its models."""
    adapter, metadata = elm.Adapter.load(REAL / file)
    name = runs.RELEASED[file]
    llm, _ = runs.RUNS[name]
    report = json.loads((REAL / "runs" / name / "eval.json").read_text())
    assert metadata["run"] == name
    assert metadata["figures"] == {key: report[key] for key in runs.FIGURES}
    assert metadata["llm"]["name"] == llm
    assert metadata["embedder"]["model"] == runs.EMBEDDER
    assert adapter.settings["tokens"] == 4 and adapter.settings["hidden_dim"] == 1024
    for parameter in adapter.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())
    num_parameters = sum(parameter.numel() for parameter in adapter.parameters())
    assert (REAL / file).stat().st_size < 2 * num_parameters + 400_000


ANSWERS_OF_SMOLLM2 = [
    "The sky is a representation of the Earth's surface, with the Earth's horizon at the top of "
    "the sky.",
    "This Python library provides a Python module that reads and writes audio files in the PAL "
    "format. It supports various audio formats",
    "A simple HTTP server that can serve static files."]


@pytest.mark.skipif(not (MODELS / "SmolLM2-135M-Instruct").exists(),
                    reason="no real model: python data/real/models.py fetches SmolLM2 and MiniLM")
def test_the_released_smollm2_answers_about_texts(capsys):
    """To the letter, in fp32."""
    text = "text=" + json.dumps(TEXTS_ASKED_ABOUT)
    code = elm.main([
        "generate", f"adapter={REAL / 'smollm2-135m.safetensors'}", text, "bf16=false",
        f"llm={MODELS / 'SmolLM2-135M-Instruct'}", f"embedder={MODELS / 'all-MiniLM-L6-v2'}",
        "max_new_tokens=24", "query=Say which field it is from, in a few words."])
    assert code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert [line["answer"] for line in lines] == ANSWERS_OF_SMOLLM2
