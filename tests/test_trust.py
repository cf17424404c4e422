"""Kills, processes and stages, damaged files, strangers' files, and numbers that cannot lie.
The long forms are in torture.py."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
import torture
from conftest import ROOT, deepspeed_launcher, make_data, make_llm, read_jsonl, rows_path, run
from safetensors.torch import load_file, save_file
from test_train import final_state, go, same, snapshot

import elm


def spoken(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, timeout=200, **options
    )


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("")
    return path


# ------------------------------------------------------------------ kills and full disks


@pytest.mark.slow
def test_runs_killed_at_random_end_as_one_never_killed(settings, config, tmp_path):
    settings = [config, *settings[:-1], "model.dropout=0.2", "loss.drift_weight=0.1",
                "train.max_steps=60", "train.save_steps=5", "train.logging_steps=2"]  # fmt: skip
    runs, counts, _ = torture.kills(settings, tmp_path, count=4, seed=0)
    print(runs, counts)
    assert counts.total() >= 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = spoken("mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield folder
    spoken("umount", folder)


@pytest.mark.parametrize("grain", ["checkpoint", "line"])
def test_a_full_disk_leaves_what_was_there(settings, config, small_disk, tmp_path, capsys, grain):
    """Full at a checkpoint, or at a line of metrics.jsonl: one line, code 2, and the checkpoints
    before stay whole; with room again the run ends as one that never met it."""
    out, more = small_disk / "out", ["train.max_steps=8", "train.save_steps=1"]
    if grain == "line":
        more = ["train.max_steps=3000", "train.save_steps=2000", "train.eval_steps=3000"]
        (small_disk / "ballast").write_bytes(bytes(270_000))
    settings = [*settings, *more, f"output.dir={out}"]
    assert elm.main([str(config), *settings]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("elm: ")]
    assert len(lines) == 1 and "No space left on device; what was there is unharmed" in lines[0]
    assert str(out) in lines[0] and not list(out.glob(".*.tmp"))
    if grain == "line":
        assert "metrics.jsonl" in lines[0]
        return
    steps = [elm.load_checkpoint(p)["state"].step for p in out.glob("checkpoint_step_*.pt")]
    assert steps and max(steps) < 8
    shutil.copytree(out, tmp_path / "moved")
    go(settings, f"output.dir={tmp_path / 'moved'}", "train.resume=auto")
    go(settings, f"output.dir={tmp_path / 'whole'}")
    assert same(final_state(tmp_path / "moved"), final_state(tmp_path / "whole"))


@pytest.mark.slow
def test_two_runs_at_once_in_one_folder(settings, config, tmp_path):
    """As a scheduler that starts a job again too early: the second leaves, and harms nothing."""
    words = [config, *settings, "train.max_steps=4000", "train.eval_steps=4000"]
    metrics = tmp_path / "out" / "metrics.jsonl"
    first = torture.start(words, tmp_path / "out")
    torture.until(first, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 9)
    second = run(*words, "train.resume=auto")
    assert second.returncode == 2 and "elm: " in second.stderr
    assert "out/.lock: another process is at it" in second.stderr
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 143
    steps = [m["step"] for m in read_jsonl(metrics) if "loss" in m]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_bit_in_the_newest_checkpoint(settings, place, capsys):
    """torch.load itself would not see it."""
    _, folder = go(settings)
    wanted = final_state(folder)
    for name in ("checkpoint_final.pt", "checkpoint_step_6.pt"):
        data = bytearray((folder / name).read_bytes())
        with open(folder / name, "rb") as f:  # within the numbers of some tensor
            weights = torch.load(f, weights_only=True)["adapter"]["fc1.weight"]
        at = data.index(weights.numpy().tobytes()) + int(place * weights.nbytes)
        data[at] ^= 4
        (folder / name).write_bytes(data)
        assert torch.load(folder / name, weights_only=True)["state"]["step"] == 6
    (folder / "eval.json").unlink()
    go(settings, "train.resume=auto")
    out = capsys.readouterr().out
    assert out.count("passed over") == 2 and "checksum" in out and "resumed after step 4" in out
    assert same(final_state(folder), wanted)


def test_a_flipped_bit_beside_the_numbers_of_a_checkpoint(settings):
    """One of the zip's directory makes a folder of a tensor: torch.load then gives what memory
    happens to hold, and the CRC of the tensor itself is right."""
    _, folder = go(settings)
    path = folder / "checkpoint_step_6.pt"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as parts:
        name = next(n for n in parts.namelist() if n.endswith("/data/3")).encode()
        at = data.index(name, parts.start_dir) - 46
    assert data[at : at + 4] == b"PK\x01\x02"
    data[at + 38] ^= 0x10  # of the external attributes: a folder
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(elm.UserError, match="checksum is another"):
        elm.load_checkpoint(path)


def resave(path, change):
    """A checkpoint with other contents and the right checksum."""
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        *(lambda s, k=k: s.pop(k) for k in ("adapter", "optimizer", "identity", "config", "rows")),
        lambda s: s["state"].update(step="4"),
        lambda s: s["state"].update(step=-3),
        lambda s: s["state"].update(best_adapter=None),
        lambda s: s["state"].pop("best_adapter"),
        lambda s: s["adapter"].pop("fc1.weight"),
        lambda s: s["optimizer"].update({"fc1.bias.exp_avg": torch.zeros(1)}),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit(settings, config, change, capsys):
    """By itself it is refused; by "auto" the one before it is taken."""
    _, folder = go(settings)
    wanted = final_state(folder)
    for name in ("checkpoint_final.pt", "eval.json"):
        (folder / name).unlink()
    path = folder / "checkpoint_step_6.pt"
    resave(path, change)
    assert elm.main([str(config), *settings, f"train.resume={path}"]) == 2
    assert f"train.resume: {path}: no whole checkpoint" in capsys.readouterr().err
    go(settings, "train.resume=auto")
    assert "resumed after step 4" in capsys.readouterr().out
    assert same(final_state(folder), wanted)


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(settings, config, capsys):
    _, folder = go(settings)
    for path in folder.glob("checkpoint_*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    for name in ("checkpoint_step_4 (copy).pt", "adapter_step_old.safetensors"):
        (folder / name).write_bytes(b"no number")
    before = snapshot(folder)
    assert elm.main([str(config), *settings, "train.resume=auto"]) == 2
    said = capsys.readouterr()
    assert said.out.count("passed over") == 4 and "no checkpoint in" in said.err
    assert snapshot(folder) == before


def test_a_resume_from_before_the_end_of_a_folder_is_refused(settings, config, tmp_path, capsys):
    """Or files of two runs would stand beside each other there."""
    _, folder = go(settings)
    before = snapshot(folder)
    words = [str(config), *settings, f"train.resume={folder / 'checkpoint_step_4.pt'}"]
    assert elm.main([*words, "train.lr=1"]) == 2
    assert f"output.dir: {folder} has gone on to step 6" in capsys.readouterr().err
    assert snapshot(folder) == before
    assert elm.main([*words, f"output.dir={tmp_path / 'other'}"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("report", ["[]", "null", "5", "{", "[" * 99999, "[[1, 2]]"])
def test_a_damaged_report_is_made_again(settings, report):
    _, folder = go(settings)
    whole = (folder / "eval.json").read_bytes()
    (folder / "eval.json").write_text(report)
    go(settings, "train.resume=auto")
    assert (folder / "eval.json").read_bytes() == whole


@pytest.mark.parametrize(
    "line", ["{}", '{"loss": 1}', '{"step": true}', '{"step": 1, "loss": [1]}', "[]", "[" * 99999]
)
def test_a_damaged_line_of_metrics_is_named(settings, config, line, capsys):
    _, folder = go(settings)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(line + "\n")
    before = snapshot(folder)
    assert elm.main([str(config), *settings, "train.resume=auto", "train.max_steps=8"]) == 2
    assert f"metrics.jsonl:{len(read_jsonl_lines(folder))}: damaged" in capsys.readouterr().err
    assert snapshot(folder).keys() == before.keys()


def read_jsonl_lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_processes_that_find_other_checkpoints(settings, config, tmp_path):
    """As where one host does not see the newest file yet: nobody goes on."""
    _, folder = go(settings)
    for name in ("checkpoint_final.pt", "eval.json"):
        (folder / name).unlink()
    script = tmp_path / "blind.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import elm\n"
        "load = elm.load_checkpoint\n"
        "def blind(path):\n"
        "    if os.environ['RANK'] == '1' and path.name == 'checkpoint_step_6.pt':\n"
        "        raise elm.UserError('it cannot be seen')\n"
        "    return load(path)\n"
        "elm.load_checkpoint = blind; elm.run()"
    )
    before = snapshot(folder)
    done = spoken(*deepspeed_launcher(2), script, config, *settings, "train.batch_size=8",
                  "train.resume=auto", "train.max_steps=9")  # fmt: skip
    assert done.returncode == 2
    assert "checkpoints of other steps" in done.stderr and "[6.0, 4.0]" in done.stderr
    assert snapshot(folder) == before


def test_a_flipped_bit_in_an_adapter(settings):
    _, folder = go(settings, "train.max_steps=1")
    path = folder / "adapter_best.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert load_file(path)  # safetensors itself does not see it
    with pytest.raises(elm.UserError, match="adapter_best.safetensors: .* checksum is another"):
        elm.Adapter.load(path)
    data[-100] ^= 1
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))  # other numbers from the same bytes
    with pytest.raises(elm.UserError, match="adapter_best.safetensors: .* checksum is another"):
        elm.Adapter.load(path)
    path.write_bytes(data)
    elm.Adapter.load(path)


def test_damaged_files(tmp_path):
    """Of rows, vectors, TOML, checkpoints and more, other ones each time."""
    counts = torture.damage(tmp_path, 280, seed=0)
    print(counts)
    assert sum(n for (_, end), n in counts.items() if end in ("read", "refused")) == 280


# ------------------------------------------------------------------ processes


@pytest.mark.slow
def test_all_processes_and_stages_agree_and_resume_each_other(tmp_path):
    """Losses of 20 steps, adapters, Adam's moments and the report; 8 of the 64 resumes."""
    n, *worst = torture.stages(torture.small_settings(tmp_path), tmp_path, everything=False)
    print(n, worst)
    assert n == 16 and max(worst) < 1e-5


@pytest.mark.slow
def test_answers_of_unequal_length_under_zero_3(tmp_path):
    """Two processes that share the LLM out; one that ends earlier must not leave the other."""
    settings = [
        ROOT / "train.toml",
        "train.max_steps=1",
        'data.tasks=["keywords", "summary", "category"]',
        "eval.samples=6",
        "train.save_steps=9",
        "eval.split=val",
        "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*settings, f"output.dir={one}").returncode == 0
    done = run(*settings, f"output.dir={two}", "deepspeed.zero_stage=3", "train.batch_size=16",
               launcher=deepspeed_launcher(2))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = [[p["prediction"] for p in read_jsonl(f / "predictions.jsonl")] for f in (one, two)]
    assert said[0] == said[1] and len({len(x.split()) for x in said[0]}) > 2


@pytest.mark.slow
def test_two_hosts_by_a_hostfile(settings, config, tmp_path):
    """As the README has it, a launcher on each, here both on this machine."""
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port = deepspeed_launcher(1)[-1].split("=")[1]
    nodes = []
    for rank in (0, 1):
        words = [deepspeed_launcher(1)[0], "--hostfile", tmp_path / "hosts", "--no_ssh",
                 "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port,
                 ROOT / "elm.py", config, *settings, "train.batch_size=8"]  # fmt: skip
        nodes.append(subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL))
    assert [node.wait(200) for node in nodes] == [0, 0]
    alone = tmp_path / "alone"
    go(settings, f"output.dir={alone}")
    losses = [[m.get("loss", m.get("val_loss")) for m in read_jsonl(f / "metrics.jsonl")]
              for f in (tmp_path / "out", alone)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "raises"])
def test_one_process_that_dies_ends_the_job(settings, config, tmp_path, how):
    """Within a minute, its own error before any other's, and no process is left."""
    script = tmp_path / "dies.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import elm\n"
        "def broken(*_): raise ArithmeticError('only process 1 has this')\n"
        f"if os.environ['RANK'] == '1' and {how == 'raises'}: elm.soft_gradient = broken\n"
        "elm.run()"
    )
    words = [*deepspeed_launcher(2), script, config, *settings, "train.max_steps=9999",
             "train.eval_steps=9999", "train.save_steps=9999"]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log)
    children = []
    if how == "killed":
        metrics = tmp_path / "out" / "metrics.jsonl"
        torture.until(job, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3)
        children = [p for p in psutil.Process(job.pid).children(recursive=True)
                    if "--local_rank=1" in p.cmdline()]  # fmt: skip
        children[0].send_signal(signal.SIGKILL)
    begin = time.time()
    if how == "raises":
        metrics = tmp_path / "log"
        torture.until(job, lambda: "only process 1 has this" in metrics.read_text())
        begin = time.time()
    assert job.wait(60) != 0
    said = (tmp_path / "log").read_text()
    if how == "raises":
        first = said.index("Traceback")
        assert said.index("only process 1 has this", first) < said.find("[rank0]: Traceback") % 1e9

    def left():
        return [p for p in psutil.process_iter(["cmdline"])
                if str(script) in (p.info["cmdline"] or [])]  # fmt: skip

    while left() and time.time() - begin < 70:
        time.sleep(0.1)
    assert not left()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes(settings, config, tmp_path):
    done = run(
        config,
        *settings,
        "train.batch_size=8",
        "train.lr=1e30",
        "train.warmup_steps=0",
        "train.max_steps=40",
        "train.save_steps=40",
        launcher=deepspeed_launcher(2),
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said[-3000:]
    assert said.count("elm: step ") == 1 and "is not finite, and nothing was updated" in said
    assert "train_synthesis.jsonl:" in said and "Traceback" not in said
    assert not list((tmp_path / "out").glob("checkpoint*"))


# ------------------------------------------------------------------ strangers' files, secrets


class Evil:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_checkpoint_runs_nothing(settings, config, tmp_path, capsys):
    """Not even one with the right checksum."""
    _, folder = go(settings)
    owned = tmp_path / "owned"
    saved = torch.load(folder / "checkpoint_step_4.pt", weights_only=True)
    evil = dict(saved, state=saved["state"] | {"step": Evil(owned)}, more=Evil(owned))
    zipped, plain = folder / "checkpoint_step_9.pt", tmp_path / "old_format.pt"
    for path in (zipped, plain):
        torch.save(evil, path, _use_new_zipfile_serialization=path == zipped)
        path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())
    for name in ("checkpoint_final.pt", "eval.json"):
        (folder / name).unlink()
    capsys.readouterr()
    for path in (zipped, plain):
        more = [f"train.resume={path}", f"output.dir={tmp_path / 'new'}"]
        assert elm.main([str(config), *settings, *more]) == 2
        said = capsys.readouterr().err
        assert f"elm: train.resume: {path}: no whole checkpoint: UnpicklingError" in said
    go(settings, "train.resume=auto")
    assert "checkpoint_step_9.pt: no whole checkpoint" in capsys.readouterr().out
    assert not owned.exists()
    torch.load(zipped, weights_only=False)
    assert owned.exists()  # it would have


def test_a_malicious_llm_runs_nothing(settings, config, tmp_path, capsys):
    """Neither by pickled weights nor by code of its own."""
    owned = tmp_path / "owned"
    pickled, remote = make_llm(tmp_path / "pickled"), make_llm(tmp_path / "remote")
    (pickled / "model.safetensors").unlink()
    torch.save({"x": Evil(owned)}, pickled / "pytorch_model.bin")
    about = json.loads((remote / "config.json").read_text())
    about |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (remote / "config.json").write_text(json.dumps(about))
    (remote / "own.py").write_text(f"open({str(owned)!r}, 'w')")
    for llm in (pickled, remote):
        assert elm.main([str(config), *settings, f"model.llm={llm}"]) == 2
        err = capsys.readouterr().err
        assert f"elm: model.llm: cannot load {llm}" in err and "Traceback" not in err
        assert not owned.exists()


def test_rows_are_text_and_never_paths(settings, data_dir, tmp_path):
    """What stands in rows and tables makes no file, whatever it looks like."""
    rows = read_jsonl(rows_path(data_dir))
    for i, row in enumerate(rows):
        row |= {"query": "../../escaped", "response": f"/tmp/{i} ../x", "text": "~/.ssh/id_rsa"}
    rows_path(data_dir).write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = elm.split_paths(elm.DataConfig(dir=str(data_dir)), "train")[0]
    save_file({"../../escaped": elm.open_vectors(path).clone()}, path, {"x": "../../escaped"})
    before = set(tmp_path.rglob("*"))
    go(settings)
    elm.filter_tasks(elm.DataConfig(dir=str(data_dir)), tmp_path / "filtered")
    mine = (tmp_path / "out", tmp_path / "filtered", data_dir / ".cache")
    made = set(tmp_path.rglob("*")) - before
    assert made and all(any(m in (p, *p.parents) for m in mine) for p in made)


@pytest.mark.slow
def test_the_hub_offline_and_another_revision(settings, config, tmp_path):
    """A model of the hub's cache, without a network; then another revision of the same weights is
    told, and of other weights refused."""
    cache = tmp_path / "hub" / "hub" / "models--some--llm"
    for name, kind in (("a" * 40, "qwen3"), ("b" * 40, "qwen3"), ("c" * 40, "llama")):
        make_llm(cache / "snapshots" / name, kind)
    (cache / "refs").mkdir()
    offline = dict(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")

    def trained(revision, *more):
        (cache / "refs" / "main").write_text(revision * 40)
        return run(config, *settings, "model.llm=some/llm", "eval.samples=0", *more, **offline)

    done = trained("a")
    assert done.returncode == 0, done.stderr[-3000:]
    done = trained("b", "train.resume=auto", "train.max_steps=8")
    assert done.returncode == 0, done.stderr[-3000:]
    told = f"the LLM's revision was {'a' * 40} in training and is {'b' * 40} here, with the same"
    assert told in done.stderr
    done = trained("c", "train.resume=auto", "train.max_steps=9")
    assert done.returncode == 2 and "the hash of the LLM's weights was" in done.stderr
    done = run(config, *settings, "model.llm=no/such", f"output.dir={tmp_path / 'n'}", **offline)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "model.llm: cannot load no/such" in lines[0]


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(settings, config, tmp_path):
    pytest.importorskip("wandb")
    key, other = "0123456789abcdef" * 2 + "deadbeef", "another-secret-of-mine"
    secrets = dict(WANDB_API_KEY=key, HF_TOKEN=f"hf_{other}", SOME_PASSWORD=other)
    done = run(config, *settings, "wandb.enabled=true", f"output.log_file={tmp_path / 'log.txt'}",
               WANDB_MODE="offline", **secrets)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) > 20
    for secret in (key, other):
        assert secret not in done.stdout + done.stderr
        for path in written:
            assert secret.encode() not in path.read_bytes(), path


# ------------------------------------------------------------------ numbers that cannot lie


def test_the_llm_is_the_same_after_training(settings):
    """Whole, to the byte; elm itself looks at a sample."""
    shared = {}
    cfg = elm.load_config(None, [*settings, "train.lr=1"])
    elm.train(cfg, shared=shared)
    (llm,) = (v for k, v in shared.items() if k[0] == "llm")
    fresh = elm.load_llm(cfg.model.llm, torch.device("cpu"), False).state_dict()
    assert same(llm.state_dict(), fresh)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_whose_llm_has_changed_says_so(settings, monkeypatch, stage):
    """At the end, and writes no final checkpoint."""
    import deepspeed

    take_step = elm.take_step

    def spoiling(engine, *rest):
        p = dict(engine.module.llm.named_parameters())["model.layers.1.mlp.up_proj.weight"]
        with deepspeed.zero.GatheredParameters(p, modifier_rank=0, enabled=stage == 3):
            p.data += 1e-2
        return take_step(engine, *rest)

    monkeypatch.setattr(elm, "take_step", spoiling)
    cfg, shared = elm.load_config(None, [*settings, f"deepspeed.zero_stage={stage}"]), {}
    with pytest.raises(RuntimeError, match="which is frozen, have changed"):
        elm.train(cfg, shared=shared)
    assert not shared  # no other trial of a sweep takes it
    folder = Path(cfg.output.dir)
    assert not (folder / "checkpoint_final.pt").exists() and not (folder / "eval.json").exists()


def scaled(data_dir, factor):
    for split in ("train", "val", "test"):
        path = elm.split_paths(elm.DataConfig(dir=str(data_dir)), split)[0]
        save_file({"x": elm.open_vectors(path) * factor}, path)


def test_vectors_of_another_norm_or_width(settings, config, data_dir, tmp_path, capsys):
    """At resume, at eval and by generate the field is named, and nothing is written."""
    _, folder = go(settings)
    before, ours = snapshot(folder), folder / "adapter_best.safetensors"
    narrow = make_data(tmp_path / "narrow", width=9)
    scaled(data_dir, 3.0)
    table = elm.split_paths(elm.DataConfig(dir=str(data_dir)), "test")[0]
    new = f"output.dir={tmp_path / 'new'}"
    resume, evaluate = [config, *settings, "train.resume=auto", "train.max_steps=9"], [
        "eval", config, f"adapter={ours}", *settings, new]  # fmt: skip
    generate = ["generate", f"adapter={ours}", f"embeddings={table}", "query=What?"]
    norm, width = "the vectors' norm was 3.", "the vectors' width was 12 in training and is 9 here"
    for words, wanted in (
        (resume, norm), (evaluate, norm), (generate, norm),
        ([*resume, f"data.dir={narrow}"], width), ([*evaluate, f"data.dir={narrow}"], width),
    ):  # fmt: skip
        capsys.readouterr()
        assert elm.main(list(map(str, words))) == 2
        said = capsys.readouterr().err
        assert wanted in said and said.count("elm: ") == 1, said
        assert snapshot(folder) == before and not (tmp_path / "new" / "eval.json").exists()


def test_a_resume_tells_what_is_set_otherwise(settings, capsys):
    go(settings)
    capsys.readouterr()
    go(settings, "train.resume=auto", "train.max_steps=8", "train.lr=1e-3")
    out = capsys.readouterr().out
    assert "train.lr = 0.001, was 0.01" in out and "train.max_steps = 8, was 6" in out
    assert "train.seed" not in out
    go(settings, "train.resume=auto", "train.max_steps=8", "train.seed=7")
    out = capsys.readouterr().out
    assert "nothing to do" in out and "train.seed = 7, was 42" in out


def test_a_nan_in_a_vector_is_not_spoken_about(settings, config, tmp_path, capsys):
    _, folder = go(settings, "train.max_steps=1")
    table = torch.randn(2000, 12)
    table[1900, 3] = torch.nan
    save_file({"x": table}, tmp_path / "x.safetensors")
    words = ["generate", f"adapter={folder / 'adapter_best.safetensors'}", "query=What?",
             f"embeddings={tmp_path / 'x.safetensors'}", "max_new_tokens=2"]  # fmt: skip
    assert elm.main([*words, "rows=[1, 1900]"]) == 2
    assert "x.safetensors: row 1900 is zero, NaN or infinite" in capsys.readouterr().err
    assert elm.main([*words, f"rows={[*range(1030), 1900]}", "batch_size=16"]) == 2
    assert "generate: vectors: one is zero, NaN or infinite" in capsys.readouterr().err
