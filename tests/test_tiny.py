"""The embedded default: what it is made from, what its models can do, and its run."""

import json
import re

import make
import pytest
from conftest import ROOT, deepspeed_launcher, read_jsonl

import elm

TINY = ROOT / "data" / "tiny"


@pytest.fixture(scope="module")
def world():
    """(records, texts, rows) of each split."""
    return {split: made for split, *made in make.dataset()}


def test_rows_repeat_bit_for_bit(world):
    for split, (_, _, rows) in world.items():
        stored = (TINY / "synthesis" / f"{split}_synthesis.jsonl").read_text()
        assert "".join(json.dumps(row) + "\n" for row in rows) == stored


def test_tokenizer_and_modules_of_the_embedder_repeat_bit_for_bit(tmp_path):
    make.save_tokenizer(tmp_path)
    make.save_modules(tmp_path)
    for stored, made in (
        ("llm/tokenizer.json", "tokenizer.json"),
        ("embedder/modules.json", "modules.json"),
        ("embedder/1_Pooling/config.json", "1_Pooling/config.json"),
    ):
        assert (tmp_path / made).read_bytes() == (TINY / stored).read_bytes()


def test_splits_share_no_record(world):
    """Held-out records are the multiples of 17, which no training of any model has drawn."""
    records_of = {split: records for split, (records, _, _) in world.items()}
    all_records = [record for records in records_of.values() for record in records]
    assert len(set(all_records)) == len(all_records)
    assert all(record % 17 for record in records_of["train"])
    assert not any(record % 17 for record in records_of["val"] + records_of["test"])


def test_size():
    files = [p for p in TINY.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 12e6


def test_llm_answers_every_attribute_from_the_text():
    accuracies = make.attribute_accuracy(num_records=20)
    worst = min(accuracies, key=accuracies.get)
    assert len(accuracies) == 51
    assert accuracies[worst] >= 0.95, (worst, accuracies[worst])


def test_the_readme_run_shows_that_the_vector_is_read(run, tmp_path):
    done = run(ROOT / "train.toml", f"output.dir={tmp_path}", launcher=deepspeed_launcher(1))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "eval.json").read_text())
    assert 0.955 < result["gap_closed"] < 0.99
    assert result["loss_text"] < 0.1 < result["loss"] < 0.6
    assert result["loss_shuffled"] > 2
    assert all(task["gap_closed"] > 0.6 for task in result["tasks"].values())
    for score in ("bertscore_composite", "consistency"):
        least, _ = result["intervals"][score]
        _, greatest_shuffled = result["intervals"][f"{score}_shuffled"]
        assert least > greatest_shuffled
    assert result["mrr"] > 5 * result["mrr_shuffled"]
    assert result["empty_rate"] == 0
    metrics = read_jsonl(tmp_path / "metrics.jsonl")
    losses = [entry["val_loss"] for entry in metrics if "val_loss" in entry]
    assert len(losses) >= 4
    assert losses[0] > 4 * losses[-1]
    assert len(re.findall("^  text ", done.stdout, re.MULTILINE)) == 5
    for split in elm.SPLITS:  # by the embedder that the run names
        assert f"mean cosine 1.0000 with the stored vectors of 32 texts of {split}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("more, least", [
    (["train.max_steps=0"], 0.38),
    (["train.max_steps=100"], 0.88),
    (["train.lr=1e-4", "train.warmup_steps=100"], 0.65),
])
def test_the_warm_start_is_worth_most_of_the_steps(tmp_path, more, least):
    settings = [*more, "eval.samples=0", "train.eval_steps=300", f"output.dir={tmp_path}"]
    result = elm.train(elm.load_config(str(ROOT / "train.toml"), settings))
    assert result["gap_closed"] > least
