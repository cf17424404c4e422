"""The embedded default: what it is made from, what its models can do, and its run."""

import json

import make
import pytest
from conftest import ROOT, deepspeed_launcher, read_jsonl, run

import elm

TINY = ROOT / "data" / "tiny"


def rows(split):
    return read_jsonl(TINY / "synthesis" / f"{split}_synthesis.jsonl")


@pytest.fixture(scope="module")
def world():
    return {split: made for split, *made in make.dataset()}


def test_rows_repeat_bit_for_bit(world):
    for split, (_, _, made) in world.items():
        wanted = (TINY / "synthesis" / f"{split}_synthesis.jsonl").read_text()
        assert "".join(json.dumps(r) + "\n" for r in made) == wanted


def test_tokenizer_and_modules_of_the_embedder_repeat_bit_for_bit(tmp_path):
    make.save_tokenizer(tmp_path)
    make.save_modules(tmp_path)
    wanted = ["llm/tokenizer.json", "embedder/modules.json", "embedder/1_Pooling/config.json"]
    for name in wanted:
        assert (tmp_path / name.split("/", 1)[1]).read_bytes() == (TINY / name).read_bytes()


def test_splits_share_no_record(world):
    """Held-out records are the multiples of 17, which no training of any model has drawn."""
    records = [r for made in world.values() for r in made[0]]
    assert len(set(records)) == len(records)
    assert all(r % 17 for r in world["train"][0])
    assert not any(r % 17 for split in ("val", "test") for r in world[split][0])


def test_size():
    files = [p for p in TINY.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 12e6


def test_llm_answers_every_attribute_from_the_text():
    cells = make.attribute_accuracy(num_records=20)
    assert len(cells) == 51 and min(cells.values()) >= 0.95, min(cells.items(), key=lambda c: c[1])


@pytest.mark.slow
def test_the_readme_run_shows_that_the_vector_is_read(tmp_path):
    done = run(ROOT / "train.toml", f"output.dir={tmp_path}", launcher=deepspeed_launcher(1))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "eval.json").read_text())
    assert 0.955 < result["gap_closed"] < 0.99
    assert result["loss_text"] < 0.1 < result["loss"] < 0.6 and result["loss_shuffled"] > 2
    assert all(task["gap_closed"] > 0.6 for task in result["tasks"].values())
    intervals = result["intervals"]
    assert intervals["bertscore_composite"][0] > intervals["bertscore_composite_shuffled"][1]
    assert intervals["consistency"][0] > intervals["consistency_shuffled"][1]
    assert result["mrr"] > 5 * result["mrr_shuffled"] and result["empty_rate"] == 0
    val = [m["val_loss"] for m in read_jsonl(tmp_path / "metrics.jsonl") if "val_loss" in m]
    assert len(val) >= 4 and val[0] > 4 * val[-1]
    assert done.stdout.count("reference  ") == done.stdout.count("prediction  ") == 5


@pytest.mark.slow
@pytest.mark.parametrize("more, least", [
    (["train.max_steps=0"], 0.38), (["train.max_steps=100"], 0.88),
    (["train.lr=1e-4", "train.warmup_steps=100"], 0.65)])  # fmt: skip
def test_the_warm_start_is_worth_most_of_the_steps(tmp_path, more, least):
    more = [*more, "eval.samples=0", "train.eval_steps=300", f"output.dir={tmp_path}"]
    result = elm.train(elm.load_config(str(ROOT / "train.toml"), more))
    assert result["gap_closed"] > least
