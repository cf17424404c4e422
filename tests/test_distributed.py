"""Real launches by DeepSpeed's own launcher, and real kills. Ratios are of fp32 numbers."""

import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, deepspeed_launcher, make_data, read_jsonl, run

pytestmark = pytest.mark.slow


def launch(settings, folder, *more, processes=1):
    config = folder.parent / "run.toml"
    config.write_text("")
    start = deepspeed_launcher(processes) if processes else ()
    done = run(config, *settings, f"output.dir={folder}", *more, launcher=start)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(folder):
    return [m.get("loss", m.get("val_loss")) for m in read_jsonl(folder / "metrics.jsonl")]


def flat(folder, kind="adapter"):
    saved = torch.load(folder / "checkpoint_final.pt", weights_only=True)[kind]
    return torch.cat([saved[k].flatten() for k in sorted(saved)])


@pytest.fixture
def larger(settings, tmp_path):
    """Steps of 80 rows: several micro-batches for each process."""
    make_data(tmp_path / "data", num_rows=90)
    return [*settings, "train.batch_size=80", "loss.drift_weight=0.1"]


def test_processes_stay_in_step_where_one_has_more_logits(larger, tmp_path):
    """ZeRO 3 gathers the head for every chunk of logits: as many on each process, or they hang."""
    script = tmp_path / "small_chunks.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import elm\n"
        "elm.CHUNK_LOGITS = dict(cpu=3000, cuda=3000); elm.run()"
    )
    one, two = tmp_path / "one", tmp_path / "two"
    launch(larger, one, processes=0)
    config = tmp_path / "run.toml"
    config.write_text("[deepspeed.zero_optimization]\nstage3_param_persistence_threshold = 0\n")
    more = ["train.batch_size=40", "deepspeed.zero_stage=3", f"output.dir={two}"]
    command = [*deepspeed_launcher(2), script, config, *larger, *more]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
        try:
            assert process.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:  # also the processes that hang, if they do
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert (flat(two) - flat(one)).norm() / flat(one).norm() < 1e-4


def test_bad_input_under_the_launcher_is_told_once(settings, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("")
    done = run(config, *settings, "model.llm=/nowhere/llm", launcher=deepspeed_launcher(2))
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("model.llm: no folder /nowhere/llm") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_ctrl_c_under_the_launcher_saves_and_resumes(settings, tmp_path):
    """As a terminal does it: SIGINT to the whole process group, with two processes."""
    settings = [*settings, "train.max_steps=400", "train.eval_steps=400", "train.save_steps=400"]
    config, folder = tmp_path / "run.toml", tmp_path / "out"
    config.write_text("")
    command = [*deepspeed_launcher(2), ROOT / "elm.py", config, *settings]
    process = subprocess.Popen(list(map(str, command)), start_new_session=True)
    end = time.time() + 120
    while time.time() < end and (
        not (folder / "metrics.jsonl").exists() or len(read_jsonl(folder / "metrics.jsonl")) < 9
    ):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    (checkpoint,) = folder.glob("checkpoint_step_*.pt")
    step = torch.load(checkpoint, weights_only=True)["state"]["step"]
    assert 8 <= step < 400
    launch(settings, folder, "train.resume=auto", f"train.max_steps={step + 2}", processes=0)
    steps = [m["step"] for m in read_jsonl(folder / "metrics.jsonl") if "loss" in m]
    assert steps == list(range(1, step + 3))


def test_first_run_compiles_nothing(settings, tmp_path, monkeypatch):
    """Two processes without a compiler: the folder where extensions are built stays empty."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    launch(settings, tmp_path / "out2", processes=2)
    assert not (tmp_path / "extensions").exists() or not list((tmp_path / "extensions").iterdir())
