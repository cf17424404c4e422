"""Kills, damaged files, strangers' files, and numbers that cannot lie. The long forms are in
torture.py."""

import hashlib
import json
import os
import shutil
import signal

import deepspeed
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
    run,
    vectors_path,
    write_rows,
)
from safetensors.torch import save_file
from test_train import final_state, forget_the_end
from torture import same_tree
from transformers import AutoModelForCausalLM

import elm

# ------------------------------------------------------------------ kills and full disks


@pytest.mark.slow
def test_runs_killed_at_random_end_as_one_never_killed(settings, tmp_path):
    settings = [NO_TABLES, *settings[:-1], "model.dropout=0.2", "loss.drift_weight=0.1",
                "train.max_steps=60", "train.save_steps=5", "train.logging_steps=2"]
    runs, counts, _ = torture.kills(settings, tmp_path, count=4, seed=0)
    print(runs, counts)
    assert counts.total() >= 3


@pytest.mark.parametrize("grain", ["checkpoint", "line"])
def test_a_full_disk_leaves_what_was_there(settings, small_disk, tmp_path, grain):
    """Full at a checkpoint, or at a line of metrics.jsonl: one line, code 2, and the checkpoints
    before stay whole; with room again the run ends as one that never met it."""
    out, more = small_disk / "out", ["train.max_steps=8", "train.save_steps=1"]
    if grain == "line":
        more = ["train.max_steps=3000", "train.save_steps=2000", "train.eval_steps=3000"]
        (small_disk / "ballast").write_bytes(bytes(270_000))
    settings = [*settings, *more, f"output.dir={out}"]
    name = "metrics.jsonl" if grain == "line" else "checkpoint_.*"
    full = "cannot be written .what was there is unharmed.: .* No space left on device"
    refused(f"{out}/.*{name}.*{full}", NO_TABLES, *settings)
    assert not list(out.glob(".*.tmp"))
    if grain == "line":
        return
    steps = [elm.load_checkpoint(p)["state"].step for p in out.glob("checkpoint_step_*.pt")]
    assert steps and max(steps) < 8
    shutil.copytree(out, tmp_path / "moved")
    go(settings, f"output.dir={tmp_path / 'moved'}", "train.resume=auto")
    go(settings, f"output.dir={tmp_path / 'whole'}")
    assert same_tree(final_state(tmp_path / "moved"), final_state(tmp_path / "whole"))


@pytest.mark.slow
def test_two_runs_at_once_in_one_folder(settings, tmp_path):
    """As a scheduler that starts a job again too early: the second leaves, and harms nothing."""
    words = [NO_TABLES, *settings, "train.max_steps=4000", "train.eval_steps=4000"]
    metrics = tmp_path / "out" / "metrics.jsonl"
    first = torture.start(words, tmp_path / "out")
    torture.until(first, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 9)
    second = run(*words, "train.resume=auto")
    assert second.returncode == 2 and "elm: " in second.stderr
    assert "out/.lock: another process holds it" in second.stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
    steps = [m["step"] for m in read_jsonl(metrics) if "loss" in m]
    assert steps == list(range(1, steps[-1] + 1))


def test_damaged_files(tmp_path):
    """Of rows, vectors, TOML, checkpoints and more, other ones each time."""
    counts = torture.damage(tmp_path, 280, seed=0)
    print(counts)
    assert sum(n for (_, end), n in counts.items() if end in ("read", "refused")) == 280


# ------------------------------------------------------------------ strangers' files, secrets


class Evil:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_checkpoint_runs_nothing(settings, tmp_path, capsys):
    """Not even one with the right checksum."""
    _, folder = go(settings)
    owned = tmp_path / "owned"
    saved = torch.load(folder / "checkpoint_step_4.pt", weights_only=True)
    evil = dict(saved, state=saved["state"] | {"step": Evil(owned)}, more=Evil(owned))
    zipped, plain = folder / "checkpoint_step_9.pt", tmp_path / "old_format.pt"
    for path in (zipped, plain):
        torch.save(evil, path, _use_new_zipfile_serialization=path == zipped)
        path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())
    forget_the_end(folder)
    for path in (zipped, plain):
        message = f"elm: train.resume: {path}: no whole checkpoint: Weights only load failed"
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
    pickled, remote = make_llm(tmp_path / "pickled"), make_llm(tmp_path / "remote")
    (pickled / "model.safetensors").unlink()
    torch.save({"x": Evil(owned)}, pickled / "pytorch_model.bin")
    about = json.loads((remote / "config.json").read_text())
    about |= {"model_type": "own",
              "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (remote / "config.json").write_text(json.dumps(about))
    (remote / "own.py").write_text(f"open({str(owned)!r}, 'w')")
    for llm in (pickled, remote):
        refused(f"elm: model.llm: cannot load {llm}", NO_TABLES, *settings, f"model.llm={llm}")
        assert not owned.exists()


def test_rows_are_text_and_never_paths(settings, data_dir, tmp_path):
    """What stands in rows and tables makes no file, whatever it looks like."""
    rows = [row | dict(query="../../escaped", response=f"/tmp/{i} ../x", text="~/.ssh/id_rsa")
            for i, row in enumerate(read_jsonl(rows_path(data_dir)))]
    write_rows(data_dir, "train", rows)
    table = {"../../escaped": read_table(data_dir)}
    save_file(table, vectors_path(data_dir), {"x": "../../escaped"})
    before = set(tmp_path.rglob("*"))
    go(settings)
    elm.filter_tasks(elm.load_config(None, [f"data.dir={data_dir}"]), tmp_path / "filtered")
    mine = (tmp_path / "out", tmp_path / "filtered")
    made = set(tmp_path.rglob("*")) - before
    assert made and all(any(m in (p, *p.parents) for m in mine) for p in made)


@pytest.mark.slow
def test_the_hub_offline(settings, tmp_path):
    """A model and an adapter of the hub's cache, without a network; another revision of the same
    weights is taken, one of other weights refused."""
    offline = dict(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    cache = tmp_path / "hub" / "hub" / "models--some--llm"
    for name, kind in (("a" * 40, "qwen3"), ("b" * 40, "qwen3"), ("c" * 40, "llama")):
        make_llm(cache / "snapshots" / name, kind)
    (cache / "refs").mkdir()

    def trained(revision, *more):
        (cache / "refs" / "main").write_text(revision * 40)
        more = ["model.llm=some/llm", "eval.samples=0", *more]
        return run(NO_TABLES, *settings, *more, **offline)

    for done in (trained("a"), trained("b", "train.resume=auto", "train.max_steps=8")):
        assert done.returncode == 0, done.stderr[-3000:]
    adapter = cache.with_name("models--some--adapter")
    (adapter / "refs").mkdir(parents=True)
    (adapter / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tmp_path / "out", adapter / "snapshots" / ("a" * 40))
    vectors = f"embeddings={vectors_path(tmp_path / 'data', 'test')}"
    done = run("generate", "adapter=some/adapter", vectors, "query=What?", "rows=[1]", **offline)
    assert done.returncode == 0 and json.loads(done.stdout)["row"] == 1
    done = trained("c", "train.resume=auto", "train.max_steps=9")
    assert done.returncode == 2 and "hash of the LLM's weights was" in done.stderr


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(settings, tmp_path):
    pytest.importorskip("wandb")
    key, other = "0123456789abcdef" * 2 + "deadbeef", "another-secret-of-mine"
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


@pytest.fixture
def loaded(monkeypatch):
    """The LLMs that are loaded, each with a function that gathers what of it is shared out."""
    load, found = elm.load_llm, []

    def kept(*arguments, **options):
        llm = load(*arguments, **options)
        shared = [p for p in llm.parameters() if hasattr(p, "ds_id")]
        found.append((llm, lambda: deepspeed.zero.GatheredParameters(
            shared, modifier_rank=0, enabled=bool(shared))))
        return llm

    monkeypatch.setattr(elm, "load_llm", kept)
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_the_llm_is_the_same_after_training(settings, loaded, monkeypatch, stage):
    """Whole, to the byte; elm itself looks at a sample."""
    release, same = elm.release, []

    def compare(llm):  # it is freed for what scores the answers
        _, gathered = loaded[0]
        with gathered():
            fresh = AutoModelForCausalLM.from_pretrained(llm.name_or_path, dtype=torch.float32)
            same.append(same_tree(dict(llm.state_dict()), dict(fresh.state_dict())))
        same.append(all(p.grad is None for p in llm.parameters()))
        release(llm)
        same.append(not sum(p.numel() for p in llm.parameters()))

    monkeypatch.setattr(elm, "release", compare)
    go(settings, "train.lr=1", f"deepspeed.zero_stage={stage}")
    assert same == [True, True, True]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_whose_llm_has_changed_says_so(settings, tmp_path, monkeypatch, loaded, stage):
    """At the end, and writes no final checkpoint."""
    step = torch.optim.AdamW.step

    def spoiling(*arguments):
        llm, gathered = loaded[0]
        with gathered():
            llm.model.layers[1].mlp.up_proj.weight.data += 1e-2
        return step(*arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    with pytest.raises(RuntimeError, match="is frozen, yet its weights have changed"):
        go(settings, f"deepspeed.zero_stage={stage}")
    for name in ("checkpoint_final.pt", "eval.json"):
        assert not (tmp_path / "out" / name).exists()
