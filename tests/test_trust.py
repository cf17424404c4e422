"""Kills, damaged files, strangers' files, and numbers that cannot lie. The long forms are in
torture.py."""

import json
import os
import shutil
import signal
import weakref

import deepspeed
import prepare
import pytest
import torch
import torture
from conftest import (
    NO_TABLES,
    go,
    make_llm,
    read_jsonl,
    read_table,
    refused,
    rows_path,
    vectors_path,
    write_rows,
)
from safetensors.torch import save_file
from test_train import final_state, forget_the_end
from torture import same_tree
from transformers import AutoModelForCausalLM

import elm

NUM_DAMAGED = 280 if os.environ.get("CI") else 56

# ------------------------------------------------------------------ kills and full disks


def test_runs_killed_at_random_end_as_one_never_killed(settings, tmp_path, processes):
    settings = [NO_TABLES, *settings[:-1], "model.dropout=0.2", "loss.drift_weight=0.1",
                "train.max_steps=60", "train.save_steps=5", "train.logging_steps=2"]  # fmt: skip
    done = torture.kills(settings, tmp_path, count=4, seed=0)
    print(done)
    assert done.counts.total() >= 3


def refused_at_a_full_disk(name, settings):
    message = f"{name}.*cannot be written .what was there is unharmed.: .* No space left on device"
    refused(message, NO_TABLES, *settings)


def test_a_full_disk_at_a_checkpoint(settings, small_disk, tmp_path):
    """The checkpoints before stay whole; with room again the run ends as one that never met it."""
    out = small_disk / "out"
    settings = [*settings, "train.max_steps=8", "train.save_steps=1"]
    refused_at_a_full_disk(f"{out}/checkpoint_", [*settings, f"output.dir={out}"])
    assert not list(out.glob(".*.tmp"))
    steps = [elm.load_checkpoint(p).state.step for p in out.glob("checkpoint_step_*.pt")]
    assert steps
    assert max(steps) < 8
    shutil.copytree(out, tmp_path / "moved")
    go(settings, f"output.dir={tmp_path / 'moved'}", "train.resume=auto")
    go(settings, f"output.dir={tmp_path / 'whole'}")
    assert same_tree(final_state(tmp_path / "moved"), final_state(tmp_path / "whole"))


@pytest.mark.slow
def test_a_full_disk_at_a_line_of_metrics(settings, small_disk):
    out = small_disk / "out"
    (small_disk / "ballast").write_bytes(bytes(270_000))
    refused_at_a_full_disk(f"{out}/metrics.jsonl", [
        *settings, f"output.dir={out}", "train.max_steps=3000", "train.save_steps=3000",
        "train.eval_steps=3000"])  # fmt: skip
    assert not list(out.glob(".*.tmp"))


def test_two_runs_at_once_in_one_folder(settings, tmp_path, run):
    """As a scheduler that starts a job again too early: the second leaves, and harms nothing."""
    words = [NO_TABLES, *settings, "train.max_steps=4000", "train.eval_steps=4000"]
    metrics = tmp_path / "out" / "metrics.jsonl"
    first = torture.start(words, tmp_path / "out")
    torture.until(first, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 9)
    second = run(*words, "train.resume=auto")
    assert second.returncode == 2
    assert "out/.lock: another process holds it" in second.stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    steps = [m["step"] for m in read_jsonl(metrics) if "loss" in m]
    assert steps == list(range(1, steps[-1] + 1))


# ------------------------------------------------------------------ damaged files


def test_damaged_files(tmp_path):
    """Of rows, vectors, TOML, checkpoints and more, each refused or read as what it says."""
    counts = torture.damage(tmp_path, NUM_DAMAGED, seed=0)
    print(counts)
    assert sum(n for (_, end), n in counts.items() if end in ("read", "refused")) == NUM_DAMAGED


@pytest.mark.parametrize("value", ["x", 1, [1]])
def test_an_adapter_that_says_nonsense_about_its_training(llm_dir, trained, tmp_path, value):
    """Each key of its metadata in turn."""
    _, folder, _ = trained
    adapter, metadata = elm.Adapter.load(folder)
    for key in ("adapter", "llm", "prompt", "trained_for"):
        path = tmp_path / f"{key}.safetensors"
        header = metadata | {key: value}
        save_file(adapter.state_dict(), path, {"elm": json.dumps(header)})
        with pytest.raises(elm.UserError, match=f"^{path}: "):
            elm.ELM.load(path)


@pytest.mark.parametrize("line", [
    "5", "{}", '{"step": "1"}', '{"step": 1, "loss": "x"}', '{"step": 1, "val_loss": null}',
    '{"step": 1, "loss": [2]}', "[" * 9999])  # fmt: skip
def test_a_line_of_metrics_that_is_none(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2}}\n{line}\n')
    with pytest.raises(elm.UserError, match=f"^{path}:2: a damaged line"):
        elm.read_metrics(path)


# ------------------------------------------------------------------ strangers' files, secrets


class Evil:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_checkpoint_runs_nothing(settings, tmp_path, capsys):
    """Not even one with the right checksums."""
    _, folder = go(settings)
    owned = tmp_path / "owned"
    saved = torch.load(folder / "checkpoint_step_4.pt", weights_only=True)
    saved["state"]["step"] = Evil(owned)
    zipped = folder / "checkpoint_step_9.pt"
    plain = tmp_path / "old_format.pt"
    torch.save(saved, zipped)
    torch.save(saved, plain, _use_new_zipfile_serialization=False)
    forget_the_end(folder)
    for path, reason in ((zipped, "Weights only load failed"), (plain, "not a zip file")):
        message = f"elm: train.resume: {path}: no whole checkpoint: .*{reason}"
        new = f"output.dir={tmp_path / 'new'}"
        refused(message, NO_TABLES, *settings, f"train.resume={path}", new)
    go(settings, "train.resume=auto")
    assert "checkpoint_step_9.pt: no whole checkpoint" in capsys.readouterr().out
    assert not owned.exists()
    torch.load(zipped, weights_only=False)
    assert owned.exists()  # it would have


def test_a_malicious_llm_runs_nothing(settings, tmp_path):
    """Neither by pickled weights nor by code of its own."""
    owned = tmp_path / "owned"
    pickled = make_llm(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"x": Evil(owned)}, pickled / "pytorch_model.bin")
    remote = make_llm(tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "own.py").write_text(f"open({str(owned)!r}, 'w')")
    for llm in (pickled, remote):
        refused(f"elm: model.llm: cannot load {llm}", NO_TABLES, *settings, f"model.llm={llm}")
        assert not owned.exists()


def test_rows_are_text_and_never_paths(settings, data_dir, tmp_path):
    """What stands in rows and tables makes no file, whatever it looks like."""
    rows = read_jsonl(rows_path(data_dir))
    for i, row in enumerate(rows):
        row["query"] = "../../escaped"
        row["response"] = f"/tmp/{i} ../x"
        row["text"] = f"~/.ssh/id_rsa{i}"
    write_rows(data_dir, "train", rows)
    table = {"../../escaped": read_table(data_dir)}
    save_file(table, vectors_path(data_dir), {"x": "../../escaped"})
    before = set(tmp_path.rglob("*"))
    go(settings)
    prepare.filter_tasks(prepare.FilterOptions(), data_dir, tmp_path / "filtered")
    made = set(tmp_path.rglob("*")) - before
    assert made
    for path in made:
        assert {tmp_path / "out", tmp_path / "filtered"} & {path, *path.parents}


def test_the_hub_offline(settings, tmp_path, run):
    """A model and an adapter of the hub's cache, without a network; another revision of the same
    weights is taken, one of other weights refused."""
    offline = dict(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    cache = tmp_path / "hub" / "hub" / "models--some--llm"
    for name, kind in (("a" * 40, "qwen3"), ("b" * 40, "qwen3"), ("c" * 40, "llama")):
        make_llm(cache / "snapshots" / name, kind)
    (cache / "refs").mkdir()

    def train_at(revision, *more):
        (cache / "refs" / "main").write_text(revision * 40)
        words = [NO_TABLES, *settings, "model.llm=some/llm", "eval.samples=0", *more]
        return run(*words, **offline)

    new = train_at("a")
    assert new.returncode == 0, new.stderr[-3000:]
    resumed = train_at("b", "train.resume=auto", "train.max_steps=8")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    adapter = cache.with_name("models--some--adapter")
    (adapter / "refs").mkdir(parents=True)
    (adapter / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tmp_path / "out", adapter / "snapshots" / ("a" * 40))
    vectors = f"embeddings={vectors_path(tmp_path / 'data', 'test')}"
    done = run("generate", "adapter=some/adapter", vectors, "query=What?", "rows=[1]", **offline)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["row"] == 1
    other = train_at("c", "train.resume=auto", "train.max_steps=9")
    assert other.returncode == 2
    assert "hash of the LLM's weights was" in other.stderr


def test_secrets_of_the_environment_are_written_nowhere(settings, tmp_path, run):
    pytest.importorskip("wandb")
    key = "0123456789abcdef" * 2 + "deadbeef"
    other = "another-secret-of-mine"
    secrets = dict(WANDB_API_KEY=key, HF_TOKEN=f"hf_{other}", SOME_PASSWORD=other)
    more = ["wandb.enabled=true", f"output.log_file={tmp_path / 'log.txt'}"]
    done = run(NO_TABLES, *settings, *more, WANDB_MODE="offline", **secrets)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 20
    for secret in (key, other):
        assert secret not in done.stdout + done.stderr
        for path in written:
            assert secret.encode() not in path.read_bytes(), path


# ------------------------------------------------------------------ numbers that cannot lie


class ComparingTrainer(elm.Trainer):
    """Compares the LLM, before the report, with what its folder holds."""

    def report(self):
        llm = self.elm.llm
        shared_out = [p for p in llm.parameters() if hasattr(p, "ds_id")]
        gathered = deepspeed.zero.GatheredParameters(
            shared_out, modifier_rank=0, enabled=bool(shared_out))
        with gathered:
            fresh = AutoModelForCausalLM.from_pretrained(llm.name_or_path, dtype=torch.float32)
            self.is_same = same_tree(dict(llm.state_dict()), dict(fresh.state_dict()))
        self.has_gradients = any(p.grad is not None for p in llm.parameters())
        self.reference = weakref.ref(llm)
        del llm, shared_out, gathered
        return super().report()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_llm_is_the_same_after_training(settings, stage):
    """Whole, to the byte; and it is freed for what scores the answers."""
    more = ["train.lr=1", f"deepspeed.zero_stage={stage}"]
    trainer = ComparingTrainer(elm.load_config(None, [*settings, *more]))
    trainer.run()
    assert trainer.is_same
    assert not trainer.has_gradients
    assert trainer.reference() is None
