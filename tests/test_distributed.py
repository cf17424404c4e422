"""Real launches by DeepSpeed's own launcher: processes, ZeRO stages, hosts, and what ends a job."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
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
    run,
)
from test_train import final_state
from torture import same_tree
from transformers import AutoConfig, AutoModelForCausalLM

import elm

pytestmark = pytest.mark.slow


def launch(folder, *arguments, script=ROOT / "elm.py", processes=2, code=0):
    """What `script` says when started by the launcher; with all its processes it ends in time, with
    any error if code is None."""
    words = [*deepspeed_launcher(processes), script, *arguments]
    with open(folder / "log", "w") as log:
        job = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log,
                               start_new_session=True)
        try:
            ended = job.wait(200)
        finally:  # also the processes that hang, if they do
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    said = (folder / "log").read_text()
    assert ended and code is None or ended == code, said[-3000:]
    return said


def changed(folder, code):
    """elm.py with lines of code before it runs."""
    path = folder / "changed.py"
    paths = [str(ROOT), str(ROOT / "tests")]
    path.write_text(f"import os, sys\nsys.path[:0] = {paths}\nimport elm, torch\n"
                    f"RANK = os.environ['RANK']\n{code}\nelm.run()\n")
    return path


def losses(folder):
    return [m.get("loss", m.get("val_loss")) for m in read_jsonl(folder / "metrics.jsonl")]


def test_processes_and_stages_agree_and_resume_each_other(tmp_path):
    """Losses of 20 steps, adapters, Adam's moments and the report; 4 of the 16 resumes."""
    n, *worst = torture.stages(tmp_path, everything=False)
    print(n, worst)
    assert n == 8 and max(worst) < 1e-5


def test_no_process_holds_more_of_the_llm_than_its_share(settings, tmp_path, monkeypatch):
    """ZeRO 3 on two processes, from the first byte: the parameters right after loading and at the
    start of training and of `eval`, and the memory that loading takes. Nothing is compiled."""
    config = AutoConfig.from_pretrained(make_llm(tmp_path / "llm"))
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 2048, 8
    config.layer_types = config.layer_types[:1] * 8
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")
    size = (tmp_path / "llm" / "model.safetensors").stat().st_size
    script = changed(tmp_path, f"""
import deepspeed, threading, time
from conftest import anonymous_memory
def held(llm, most=0):
    live = sum((p.numel() + p.ds_tensor.numel()) * p.element_size() for p in llm.parameters())
    with open({str(tmp_path / "held")!r} + RANK, "a") as f:
        f.write(f"{{live / {size}}} {{most / {size}}}\\n")
def load_and_measure(*arguments, **options):
    peaks, loaded, before = [0], threading.Event(), anonymous_memory()
    def watch():
        while not loaded.wait(0.002):
            peaks.append(anonymous_memory() - before)
    threading.Thread(target=watch).start()
    try:
        llm = load(*arguments, **options)
    finally:
        loaded.set()
    held(llm, max(peaks))
    return llm
def start(function):
    def measured(model, *arguments):
        held(model.llm)
        return function(model, *arguments)
    return measured
load, elm.load_llm = elm.load_llm, load_and_measure
elm.validation_losses, elm.report = start(elm.validation_losses), start(elm.report)
""")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")  # what is freed is not held
    more = [NO_TABLES, *settings, f"model.llm={tmp_path / 'llm'}", "eval.samples=0",
            f"data.dir={make_data(tmp_path / 'few', num_rows=8)}", "train.max_steps=1",
            "train.batch_size=4", "deepspeed.zero_stage=3",
            "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
    launch(tmp_path, *more, script=script)
    adapter = tmp_path / "out" / "adapter_best.safetensors"
    launch(tmp_path, "eval", *more, f"adapter={adapter}", f"output.dir={tmp_path / 'eval'}",
           script=script)
    for rank in (0, 1):
        numbers = np.loadtxt(tmp_path / f"held{rank}")
        print(numbers)
        assert len(numbers) == 6  # two loads, two validations, two reports
        assert (numbers[:, 0] < 0.6).all() and (numbers[:, 1] < 0.75).all()
    assert not list((tmp_path / "extensions").glob("*"))


@pytest.mark.parametrize("how", ["hosts", "torchrun"])
def test_other_launches_are_as_good(settings, tmp_path, how):
    """A launcher on each host of a hostfile, as the README has it, here both on this machine; or
    torchrun."""
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    deepspeed, _, port = deepspeed_launcher(1)
    starts = [[deepspeed, "--hostfile", tmp_path / "hosts", "--no_ssh", "--node_rank", rank,
               "--master_addr", "127.0.0.1", port] for rank in (0, 1)]
    if how == "torchrun":
        starts = [[sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                   f"--master-port={free_port()}"]]
    words = [ROOT / "elm.py", NO_TABLES, *settings, "train.batch_size=8"]
    nodes = [subprocess.Popen(list(map(str, [*start, *words])), stdout=subprocess.DEVNULL)
             for start in starts]
    assert not any(node.wait(200) for node in nodes)
    _, alone = go(settings, f"output.dir={tmp_path / 'alone'}")
    assert losses(tmp_path / "out") == pytest.approx(losses(alone), rel=1e-5)


def test_bad_input_under_the_launcher_is_told_once(settings, tmp_path):
    said = launch(tmp_path, NO_TABLES, *settings, "model.llm=/nowhere/llm", code=2)
    assert said.count("model.llm: cannot load /nowhere/llm") == 1 and "Traceback" not in said


def test_ctrl_c_under_the_launcher_saves_and_resumes(settings, tmp_path):
    """As a terminal does it: SIGINT to the whole process group, with two processes."""
    metrics = tmp_path / "out" / "metrics.jsonl"
    settings = [*settings, "train.max_steps=400", "train.eval_steps=400", "train.save_steps=400"]
    command = [*deepspeed_launcher(2), ROOT / "elm.py", NO_TABLES, *settings]
    job = subprocess.Popen(list(map(str, command)), start_new_session=True)
    torture.until(job, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 8)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(60) != 0
    (checkpoint,) = metrics.parent.glob("checkpoint_step_*.pt")
    step = elm.load_checkpoint(checkpoint)["state"].step
    assert 8 <= step < 400
    go(settings, "train.resume=auto", f"train.max_steps={step + 2}")
    assert [m["step"] for m in read_jsonl(metrics) if "loss" in m] == list(range(1, step + 3))


def test_a_bad_step_of_one_process_stops_both_before_the_update(settings, tmp_path):
    """The gradient of step 3 is NaN on process 1 alone."""
    script = changed(tmp_path, f"""
soft_gradient, models = elm.soft_gradient, []
def spoiled(model, *arguments):
    sums, gradient = soft_gradient(model, *arguments)
    models.append(model)
    if len(models) == 3 and RANK == "1":
        gradient[0, 0, 0] = torch.nan
    return sums, gradient
def checked(*arguments):
    torch.save(dict(models[-1].adapter.state_dict()), {str(tmp_path / "left")!r} + RANK)
    check(*arguments)
check, elm.check_finite, elm.soft_gradient = elm.check_finite, checked, spoiled
""")
    said = launch(tmp_path, NO_TABLES, *settings, "train.batch_size=8", script=script, code=2)
    assert said.count("elm: step 3: the loss or its gradient is not finite, and nothing was") == 1
    assert "train_synthesis.jsonl:" in said and "Traceback" not in said
    saved = dict(final_state(tmp_path / "out", "step_2")["adapter"])
    assert not list((tmp_path / "out").glob("*step_3*"))
    assert all(same_tree(torch.load(tmp_path / f"left{rank}"), saved) for rank in (0, 1))


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise ArithmeticError('only here')"])
def test_one_process_that_dies_ends_the_job(settings, tmp_path, end):
    """Soon, its own error before any other's, and no process is left."""
    script = changed(tmp_path, f"def broken(*_): {end}\nif RANK == '1': elm.soft_gradient = broken")
    words = [NO_TABLES, *settings, "train.batch_size=8"]
    begin = time.time()
    said = launch(tmp_path, *words, script=script, code=None)
    if "raise" in end:
        first = said.index("Traceback")
        assert said.index("only here", first) < said.find("[rank0]: Traceback") % 1e9

    def left():
        return [p for p in psutil.process_iter(["cmdline"])
                if str(script) in (p.info["cmdline"] or [])]

    while left() and time.time() - begin < 120:
        time.sleep(0.1)
    assert not left()


def test_busy_ports(settings, monkeypatch):
    """One process needs none; of several the message names the option."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        ends = [run(NO_TABLES, *settings, "train.max_steps=0", RANK="0", LOCAL_RANK="0",
                    WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(busy.getsockname()[1]))
                for n in "12"]
    assert [e.returncode for e in ends] == [0, 2], ends
    assert "--master_port" in ends[1].stderr and "Traceback" not in ends[1].stderr
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(elm.UserError, match="srun started several tasks without RANK"):
        elm.start_runtime(elm.load_config())


def wait_for_the_first(rank, folder):
    """Process 0 works on for longer than the training group's patience."""
    dist = torch.distributed
    dist.init_process_group("gloo", f"file://{folder}/meet", world_size=2, rank=rank,
                            timeout=timedelta(seconds=2))
    untimed = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    rt = elm.Runtime(rank, 2, torch.device("cpu"), untimed)
    assert rt.on_first(lambda: time.sleep(5) or "done") == "done"
    assert rt.sum(torch.ones(1)).item() == 2
    try:
        rt.on_first(lambda: elm.Adapter.load(folder / "no.safetensors"))
    except elm.UserError as e:
        (folder / f"told{rank}").write_text(str(e))


def test_all_wait_for_what_process_0_does_alone(tmp_path):
    torch.multiprocessing.spawn(wait_for_the_first, (tmp_path,), 2)
    for rank in (0, 1):
        assert "No such file" in (tmp_path / f"told{rank}").read_text()


def test_traffic_and_offload_of_zero_3(settings, tmp_path):
    """The head is gathered once per micro-batch, not per chunk of logits, of which the processes
    have unequally many; limits on live parameters hold; parameters kept on the CPU train, too."""
    script = changed(tmp_path, f"""
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
gather, counts = PartitionedParameterCoordinator.fetch_sub_module, [0, 0, 0]
elm.CHUNK_LOGITS = dict(cpu=3000, cuda=3000)
llms, load = [], elm.load_llm
def kept(*arguments, **options):
    llms.append(load(*arguments, **options))
    return llms[-1]
elm.load_llm = kept
def fetch(self, module, *rest, **options):
    live = sum(p.numel() for llm in llms for p in llm.parameters())
    counts[2] = max(counts[2], live if "Layer" in type(module).__name__ else 0)
    counts[0] += any(p.ds_status.name == "NOT_AVAILABLE" for p in module.parameters(recurse=False)
                     if type(module).__name__ == "Linear" and p.ds_shape[0] == 264)
    return gather(self, module, *rest, **options)
PartitionedParameterCoordinator.fetch_sub_module = fetch
head = elm.ELM.lm_head
def lm_head(self, hidden):
    counts[1] += 1
    with open({str(tmp_path / "counts")!r} + RANK, "w") as f:
        f.write(" ".join(map(str, counts)))
    return head(self, hidden)
elm.ELM.lm_head = lm_head
""")
    config = tmp_path / "run.toml"
    config.write_text(
        "[deepspeed]\nzero_stage = 3\n[deepspeed.zero_optimization]\n"
        "stage3_param_persistence_threshold = 0\nstage3_max_live_parameters = 1000\n"
        "stage3_max_reuse_distance = 1000\noffload_param = {device = 'cpu'}\n")
    settings = [*settings, "eval.samples=0", "loss.drift_weight=0.1"]
    launch(tmp_path, config, *settings, "train.batch_size=8", script=script)
    gathered, chunks, live = map(int, (tmp_path / "counts0").read_text().split())
    print(gathered, chunks, live)
    assert chunks > 60 and gathered < chunks / 3
    assert live < 0.6 * 24_000  # of which the embeddings, tied to the head, have 8,448
    _, alone = go(settings, f"output.dir={tmp_path / 'alone'}")
    assert losses(tmp_path / "out") == pytest.approx(losses(alone), rel=1e-5)
    a, b = (torch.cat([v.flatten() for v in final_state(f)["adapter"].values()])
            for f in (alone, tmp_path / "out"))
    assert (a - b).norm() / a.norm() < 1e-4
