"""Real launches by DeepSpeed's own launcher: processes, ZeRO stages, hosts, and what ends a job."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torture
from conftest import (
    NO_TABLES,
    ROOT,
    deepspeed_launcher,
    free_port,
    go,
    make_data,
    make_llm,
    read_jsonl,
)
from torture import same_tree
from transformers import AutoConfig, AutoModelForCausalLM

import elm

pytestmark = pytest.mark.usefixtures("processes")

JOBS = ROOT / "tests" / "distributed_jobs.py"


def launch(folder, *arguments, script=ROOT / "elm.py", processes=2, code=0):
    """What `script` says when the launcher starts it; with all its processes it ends in time, with
    any error if `code` is None."""
    words = [*deepspeed_launcher(processes), script, *arguments]
    with open(folder / "log", "w") as log:
        job = subprocess.Popen(
            list(map(str, words)), stdout=log, stderr=log, start_new_session=True)
        try:
            ended = job.wait(200)
        finally:  # also the processes that hang, if they do
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    said = (folder / "log").read_text()
    if code is None:
        assert ended != 0, said[-3000:]
    else:
        assert ended == code, said[-3000:]
    return said


def launch_job(name, folder, *words, **options):
    """See distributed_jobs.py."""
    return launch(folder, name, folder, *words, script=JOBS, **options)


def left_by_each(folder, name):
    """What the processes of a job left in its folder."""
    return [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]


def losses(folder):
    return [m.get("loss", m.get("val_loss")) for m in read_jsonl(folder / "metrics.jsonl")]


def final_adapter(folder):
    """All parameters and buffers of the last step's adapter, flat."""
    checkpoint = elm.load_checkpoint(folder / "checkpoint_final.pt")
    return torch.cat([tensor.flatten() for tensor in checkpoint.adapter.values()])


def test_processes_and_stages_agree_and_resume_each_other(tmp_path):
    """Losses of 20 steps, adapters, Adam's moments and the report; 4 of the 16 resumes."""
    num_runs, worst = torture.stages(tmp_path, everything=False)
    print(num_runs, worst)
    assert num_runs == 8
    assert max(worst.values()) < 1e-5


def make_larger_llm(folder):
    """Of 8 layers and width 1024, which weigh more than the libraries' own memory."""
    config = AutoConfig.from_pretrained(make_llm(folder))
    config.hidden_size = 1024
    config.intermediate_size = 2048
    config.num_hidden_layers = 8
    config.layer_types = config.layer_types[:1] * 8
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_no_process_holds_more_of_the_llm_than_its_share(settings, tmp_path, monkeypatch):
    """ZeRO 3 on two processes, from the first byte: the memory that loading takes, and the
    parameters right after it and between the passes of training and `eval`. Nothing is compiled."""
    llm = make_larger_llm(tmp_path / "llm")
    size = (llm / "model.safetensors").stat().st_size
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")  # what is freed is not held
    shared = [
        *settings, f"model.llm={llm}", f"data.dir={make_data(tmp_path / 'few', num_rows=8)}",
        "eval.samples=0", "train.max_steps=1", "train.batch_size=4", "deepspeed.zero_stage=3",
        "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]  # fmt: skip
    launch_job("memory_shares", tmp_path, "train", NO_TABLES, *shared)
    shared.remove(f"output.dir={tmp_path / 'out'}")
    adapter = f"adapter={tmp_path / 'out'}"
    launch_job("memory_shares", tmp_path, "eval", NO_TABLES, *shared, adapter)
    for name in ("train", "eval"):
        for found in left_by_each(tmp_path, name):
            most_in_passes = max(found["passes"])
            print(name, found["loading"] / size, found["loaded"] / size, most_in_passes / size)
            assert len(found["passes"]) > 3
            assert found["loading"] < 0.75 * size
            assert found["loaded"] < 0.6 * size
            assert most_in_passes < 0.6 * size
    assert not list((tmp_path / "extensions").glob("*"))


@pytest.mark.parametrize("how", ["hosts", "torchrun"])
def test_other_launches_are_as_good(settings, tmp_path, how):
    """A launcher on each host of a hostfile, as the README has it, here both on this machine; or
    torchrun."""
    if how == "hosts":
        (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
        script, _, port = deepspeed_launcher(1)
        hosts = [script, "--hostfile", tmp_path / "hosts", "--no_ssh"]
        starts = [
            [*hosts, "--node_rank", rank, "--master_addr", "127.0.0.1", port] for rank in (0, 1)]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        starts = [[*torchrun, f"--master-port={free_port()}"]]
    words = [ROOT / "elm.py", NO_TABLES, *settings, "train.batch_size=8"]
    nodes = [
        subprocess.Popen(list(map(str, [*start, *words])), stdout=subprocess.DEVNULL)
        for start in starts]
    assert [node.wait(200) for node in nodes] == [0] * len(nodes)
    _, alone = go(settings, f"output.dir={tmp_path / 'alone'}")
    assert losses(tmp_path / "out") == pytest.approx(losses(alone), rel=1e-5)


def test_bad_input_under_the_launcher_is_told_in_a_line(settings, tmp_path):
    """Each process may tell it."""
    said = launch(tmp_path, NO_TABLES, *settings, "model.llm=/nowhere/llm", code=2)
    assert said.count("elm: model.llm: cannot load /nowhere/llm") in (1, 2)
    assert "Traceback" not in said


def test_ctrl_c_under_the_launcher_saves_and_resumes(settings, tmp_path):
    """As a terminal does it: SIGINT to the whole process group, with two processes."""
    metrics = tmp_path / "out" / "metrics.jsonl"
    settings = [*settings, "train.max_steps=400", "train.eval_steps=400", "train.save_steps=400"]
    words = [*deepspeed_launcher(2), ROOT / "elm.py", NO_TABLES, *settings]
    job = subprocess.Popen(list(map(str, words)), start_new_session=True)
    torture.until(job, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 8)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(60) != 0
    (checkpoint,) = metrics.parent.glob("checkpoint_step_*.pt")
    step = elm.load_checkpoint(checkpoint).state.step
    assert 8 <= step < 400
    go(settings, "train.resume=auto", f"train.max_steps={step + 2}")
    logged = [m["step"] for m in read_jsonl(metrics) if "loss" in m]
    assert logged == list(range(1, step + 3))


def test_a_bad_step_of_one_process_stops_both_before_the_update(settings, tmp_path):
    """The gradient of step 3 is NaN on process 1 alone; its loss is finite."""
    words = [NO_TABLES, *settings, "train.batch_size=8"]
    said = launch_job("spoiled_gradient", tmp_path, *words, code=2)
    message = "elm: step 3: the loss or its gradient is not finite, and nothing was"
    assert said.count(message) in (1, 2)
    assert "train_synthesis.jsonl:" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("*step_3*"))
    saved = elm.load_checkpoint(tmp_path / "out" / "checkpoint_step_2.pt").adapter
    for rank in (0, 1):
        left = torch.load(tmp_path / f"adapter_{rank}.pt")
        assert same_tree(left, dict(saved))


@pytest.mark.parametrize("end", ["killed", "failing"])
def test_one_process_that_dies_ends_the_job(settings, tmp_path, end):
    """Soon, its own error before any other's, and no process is left."""
    begin = time.time()
    said = launch_job(end, tmp_path, NO_TABLES, *settings, "train.batch_size=8", code=None)
    if end == "failing":
        own_error = said.index("only here", said.index("Traceback"))
        errors_of_the_other = said.find("[rank0]: Traceback")
        assert errors_of_the_other == -1 or own_error < errors_of_the_other

    def processes_left():
        return [process for process in psutil.process_iter(["cmdline"])
                if str(tmp_path) in (process.info["cmdline"] or [])]

    while processes_left() and time.time() - begin < 120:
        time.sleep(0.1)
    assert not processes_left()


def test_busy_ports(settings, run):
    """One process needs none; of several the message names the option."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        launcher = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = [NO_TABLES, *settings, "train.max_steps=0"]
        alone = run(*words, **launcher, WORLD_SIZE="1")
        one_of_two = run(*words, **launcher, WORLD_SIZE="2")
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert one_of_two.returncode == 2
    assert "--master_port" in one_of_two.stderr
    assert "Traceback" not in one_of_two.stderr


def test_traffic_and_offload_of_zero_3(settings, tmp_path):
    """The head is gathered once per micro-batch, not per chunk of logits, of which the processes
    have unequally many; limits on live parameters hold; parameters kept on the CPU train, too."""
    config = tmp_path / "run.toml"
    config.write_text("""
[deepspeed]
zero_stage = 3
[deepspeed.zero_optimization]
stage3_param_persistence_threshold = 0
stage3_max_live_parameters = 1000
stage3_max_reuse_distance = 1000
offload_param = {device = 'cpu'}
""")
    settings = [*settings, "eval.samples=0", "loss.drift_weight=0.1"]
    launch_job("traffic", tmp_path, config, *settings, "train.batch_size=8")
    for counts in left_by_each(tmp_path, "traffic"):
        print(counts)
        assert counts["chunks"] > 60
        assert counts["passes"] < counts["chunks"] / 3
        assert 1 <= counts["gathered"] <= counts["passes"]
        assert counts["live"] < 0.6 * 24_000  # the embeddings, tied to the head, have 8,448
    _, alone = go(settings, f"output.dir={tmp_path / 'alone'}")
    assert losses(tmp_path / "out") == pytest.approx(losses(alone), rel=1e-5)
    expected = final_adapter(alone)
    assert (final_adapter(tmp_path / "out") - expected).norm() / expected.norm() < 1e-4


def test_parameters_that_are_to_persist_are_gathered_once(settings, tmp_path):
    """ZeRO 3 on two processes. DeepSpeed alone gathers them again in each pass."""
    counts = {}
    for kind in ("mended", "plain"):
        launch_job("persistent_gathers", tmp_path, kind, NO_TABLES, *settings, "eval.samples=0",
                   "train.batch_size=8", "deepspeed.zero_stage=3",
                   "deepspeed.zero_optimization.stage3_param_persistence_threshold=100",
                   f"output.dir={tmp_path / f'{kind}-run'}")
        counts[kind], _ = left_by_each(tmp_path, kind)
        print(kind, counts[kind])
    assert counts["mended"]["parameters"] > 5
    assert counts["mended"]["gathers"] <= counts["mended"]["parameters"]
    assert counts["plain"]["gathers"] > 5 * counts["mended"]["parameters"]
