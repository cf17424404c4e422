"""Processes, the log, files."""

import contextlib
import errno
import fcntl
import itertools
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import prepare
import pytest
import torch
from conftest import NO_TABLES, ROOT, free_port, go, refused, vectors_path

import elm

# -----------------------------------------------------------------------------
# Errors


def test_named_errors_become_one_line():
    with pytest.raises(elm.UserError) as e, elm.user_error("x.toml: damaged", KeyError, ValueError):
        raise ValueError("of two\nlines")
    assert str(e.value) == "x.toml: damaged: of two lines"
    assert isinstance(e.value.__cause__, ValueError)

    with pytest.raises(elm.UserError) as e, elm.user_error("x.toml", ValueError):
        raise ValueError  # without a word
    assert str(e.value) == "x.toml: ValueError()"

    with pytest.raises(elm.UserError) as e, elm.user_error("x.toml", ValueError):
        raise ValueError(999 * "word ")
    assert len(str(e.value)) < 400


@pytest.mark.parametrize(
    "error", [elm.UserError("a: b"), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_user_errors_and_lack_of_memory_stay_what_they_are(error):
    with pytest.raises(type(error)) as e, elm.user_error("message", Exception):
        raise error
    assert e.value is error


def test_errors_that_are_not_named_keep_their_tracebacks():
    with pytest.raises(KeyError) as e, elm.user_error("message", ValueError):
        raise KeyError("x")
    assert e.traceback[-1].name == "test_errors_that_are_not_named_keep_their_tracebacks"


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(elm.UserError, match="^no_such_package is not installed: pip install no_"):
        elm.import_optional("no_such_package")


# -----------------------------------------------------------------------------
# The log

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def lines_without_times(path) -> list[str]:
    return [re.sub("^" + TIME, "", line) for line in path.read_text("utf-8").splitlines()]


def test_warnings_go_to_stderr(capsys):
    elm.log.info("as it is")
    elm.log.warning("careful")
    out, err = capsys.readouterr()
    assert out == "as it is\n"
    assert err == "elm: warning: careful\n"


def test_the_log_file_is_appended_to_while_it_is_asked_for(tmp_path):
    path = tmp_path / "log.txt"
    with elm.log_to_file(str(path)):
        elm.log.info("one")
    elm.log.info("nowhere")
    with elm.log_to_file(str(path)):
        elm.log.warning("zwölf")
    first, second = path.read_text("utf-8").splitlines()
    assert re.fullmatch(TIME + "one", first)
    assert re.fullmatch(TIME + "zwölf", second)
    with elm.log_to_file(None):
        elm.log.info("nowhere")
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"]


def test_a_log_file_that_cannot_be_opened(tmp_path):
    message = f"^output.log_file: {tmp_path} cannot be written: Is a directory$"
    with pytest.raises(elm.UserError, match=message), elm.log_to_file(str(tmp_path)):
        pass


def test_the_folder_of_a_log_file_is_made(tmp_path):
    with elm.log_to_file(str(tmp_path / "runs" / "log.txt")):
        elm.log.info("one")
    assert (tmp_path / "runs" / "log.txt").read_text().endswith(" one\n")


def test_another_process_than_the_first_logs_nothing(tmp_path, monkeypatch, capsys):
    """Also before it has joined the others."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("RANK", "1")
    with elm.log_to_file(str(tmp_path / "log.txt")):
        elm.log.info("one")
        elm.log.warning("two")
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_console_and_log_file_of_a_run_have_the_same_lines(settings, tmp_path, capsys):
    """Zeros are shown: no answer drifts farther than a cosine of -1."""
    path = tmp_path / "log.txt"
    more = ["train.max_steps=1", "train.warmup_steps=0", "eval.samples=0",
            "loss.drift_weight=0.1", "loss.drift_target=-1.0"]  # fmt: skip
    go(settings, *more, f"output.log_file={path}")
    console = capsys.readouterr().out.splitlines()
    assert lines_without_times(path) == console
    (header,) = [line for line in console if line.startswith("   step ")]
    (line,) = [line for line in console if re.match(r" +1 {1,4}\d", line)]
    end = header.index("drift") + len("drift")
    assert line[:end].endswith("  0.0000")


def test_values_stand_below_their_titles():
    """Zeros and large values, too, within 80 characters."""
    values = {
        "step": 100000, "loss": 0.0, "drift_loss": 0, "val_loss": 12.34567, "gap_closed": -12.25,
        "lr": 1e-5, "tokens_per_second": 1234567.8, "memory_gib": 139.94, "left": "100:00:00"}
    assert elm.table_header(elm.TRAINING_COLUMNS) == (
        "   step     loss    drift      val     gap       lr  tokens/s    GiB      left")
    assert elm.table_line(elm.TRAINING_COLUMNS, values) == (
        " 100000   0.0000   0.0000  12.3457 -12.250 1.00e-05 1,234,568  139.9 100:00:00")
    assert elm.table_line(elm.TRAINING_COLUMNS, {"step": 0, "gap_closed": 0.0, "loss": None}) == (
        "      0" + 30 * " " + "0.000")


def test_a_labelled_text_is_clipped_to_lines():
    """Wide characters take two columns."""
    assert elm.labelled("answer", " a\n b ") == "  answer     a b"
    assert elm.labelled("answer", "") == "  answer"
    assert elm.labelled("answer", "x" * 100) == "  answer     " + "x" * 66 + "…"
    assert elm.labelled("answer", "長" * 100) == "  answer     " + "長" * 32 + "…"
    lines = elm.labelled("answer", "word " * 99, num_lines=3).splitlines()
    assert lines[0].startswith("  answer     word word") and lines[1].startswith(13 * " " + "word")
    assert len(lines) in (3, 4) and max(map(len, lines)) <= 80 and lines[-1].endswith("…")


@pytest.mark.parametrize("seconds, text", [(0, "00:00"), (75.9, "01:15"), (3661, "1:01:01")])
def test_times_of_the_console(seconds, text):
    assert elm.format_seconds(seconds) == text


def test_of_two_processes_the_first_alone_writes(run, settings, tmp_path):
    """To the console and to the log file, each line once."""
    path = tmp_path / "log.txt"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                f"--master-port={free_port()}")  # fmt: skip
    words = [NO_TABLES, *settings, "train.batch_size=24", "train.max_steps=2", "eval.samples=0"]
    done = run(*words, f"output.log_file={path}", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    console = [line for line in done.stdout.splitlines() if not line.startswith("[")]  # DeepSpeed's
    warning = "train.batch_size: a step of 48 rows takes more than all 40 rows of train; lower "\
              "train.batch_size or train.grad_accum"
    assert done.stderr.count(f"elm: warning: {warning}") == 1
    lines = lines_without_times(path)
    lines.remove(warning)
    assert lines == console
    for start in (r"2 process\(es\) on cpu", "   step ", r" +1 +\d", r" +2 {10,}\d", "files: "):
        assert sum(bool(re.match(start, line)) for line in console) == 1, start


# -----------------------------------------------------------------------------
# Processes


def test_one_process_alone(monkeypatch):
    """Each collective operation is an identity, without a copy."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    device = elm.start_distributed()
    assert device.type in ("cpu", "cuda")
    assert elm.start_distributed() == device  # a second time
    assert (elm.rank(), elm.world_size()) == (0, 1)
    x = torch.arange(3.0)
    assert elm.all_reduce_sum(x) is x
    assert elm.broadcast_from_rank0(x) is x
    assert torch.equal(x, torch.arange(3.0))
    assert elm.run_on_rank0(lambda: "done") == "done"
    with pytest.raises(elm.UserError, match="a: b"):
        elm.run_on_rank0(lambda: fail(elm.UserError("a: b")))
    with pytest.raises(KeyError):
        elm.run_on_rank0(lambda: fail(KeyError("x")))


def fail(error):
    raise error


def join_other(number: int, port: int) -> None:
    """Become one of two processes."""
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    elm.start_distributed()
    assert (elm.rank(), elm.world_size()) == (number, 2)


def write_after_a_while(path) -> str:
    time.sleep(3)
    path.write_text("written")
    return "done"


def check_collectives(number: int, folder) -> None:
    mine = torch.tensor([1.0, 10.0]) * (number + 1)
    assert elm.all_reduce_sum(mine) is mine
    assert mine.tolist() == [3.0, 30.0]

    mine = torch.arange(6.0).reshape(2, 3).T + 100 * number  # not contiguous
    of_rank0 = elm.broadcast_from_rank0(mine)
    assert torch.equal(of_rank0, torch.arange(6.0).reshape(2, 3).T)
    assert mine[0, 0] == 100 * number

    path = folder / "alone"
    assert elm.run_on_rank0(lambda: write_after_a_while(path)) == "done"
    assert path.read_text() == "written"
    assert elm.run_on_rank0(elm.rank) == 0

    with pytest.raises(elm.UserError, match="^a: b$"):
        elm.run_on_rank0(lambda: fail(elm.UserError("a: b")))
    assert elm.all_reduce_sum(torch.ones(1)).item() == 2  # they go on together


def check_patience(number: int) -> None:
    """Process 0 works on for longer than the other may wait."""
    if number == 0:
        with contextlib.suppress(RuntimeError):  # the other has left
            elm.run_on_rank0(lambda: time.sleep(6))
    else:
        with pytest.raises(RuntimeError, match="(?i)time.* out"):
            elm.run_on_rank0(lambda: None)


def be_one_of_two(number: int, ports: list[int], folder) -> None:
    join_other(number, ports[0])
    check_collectives(number, folder)
    torch.distributed.destroy_process_group()
    elm.LONGEST_WAIT = timedelta(seconds=3)
    join_other(number, ports[1])
    check_patience(number)
    (folder / f"ended_{number}").touch()
    elm.exit_process(0)  # gloo's threads now and then abort when the interpreter ends


def test_all_wait_for_what_process_0_does_alone(processes, tmp_path):
    """Values are the same on both, and errors that the user can correct are raised on both. How
    long they wait is LONGEST_WAIT: long enough for models to be loaded and run."""
    ports = [free_port(), free_port()]
    torch.multiprocessing.spawn(be_one_of_two, (ports, tmp_path), nprocs=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "ended_0", "ended_1"]
    assert timedelta(hours=12) <= elm.LONGEST_WAIT


def test_processes_that_cannot_connect_name_the_port(monkeypatch):
    """A port number that there is not, and one in use."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "99999999")
    message = "^cannot connect to the other processes by 127.0.0.1:99999999 .*: port must have"
    with pytest.raises(elm.UserError, match=message):
        elm.start_distributed()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(elm.UserError, match="cannot connect.* address already in use"):
            elm.start_distributed()


# What a launcher sets, what elm says of it
NO_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
               *elm.SIZES_OF_OTHER_LAUNCHERS)  # fmt: skip
OTHER_LAUNCHERS = {
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
               "^OMPI_COMM_WORLD_SIZE = 2: .* start them by torchrun or deepspeed"),
    "mpiexec": ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "^PMI_SIZE = 4: .* start them by torchrun"),
    "jsrun": ({"JSM_NAMESPACE_SIZE": "2"}, "^JSM_NAMESPACE_SIZE = 2: "),
    "MVAPICH2": ({"MV2_COMM_WORLD_SIZE": "2"}, "^MV2_COMM_WORLD_SIZE = 2: "),
    "srun": ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
             "^SLURM_STEP_NUM_TASKS = 2: .* .under srun one torchrun on each node."),
    "no number": ({"WORLD_SIZE": "two", "RANK": "0"}, "^WORLD_SIZE = 'two': no number"),
    "no number either": ({"RANK": ""}, "^RANK = '': no number"),
    "mpirun where WORLD_SIZE is of the image": (
        {"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "1"}, "^OMPI_COMM_WORLD_SIZE = 2: "),
    "rank alone": ({"RANK": "1"}, "^RANK = 1: not among WORLD_SIZE = 1 processes"),
    "size alone": ({"WORLD_SIZE": "2"}, "^RANK: not set, but WORLD_SIZE = 2; start the processes"),
    "no size": ({"WORLD_SIZE": "0", "RANK": "0"}, "^RANK = 0: not among WORLD_SIZE = 0"),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0"}, "^MASTER_ADDR: not set, but WORLD_SIZE = 2"),
    "no port": ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}, "^MASTER_PORT: not"),
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets variables where no launcher has set any, and no test has joined a process group."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name in NO_LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def set_variables(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("name", OTHER_LAUNCHERS)
def test_launchers_that_would_start_whole_runs_are_refused(environment, name):
    variables, message = OTHER_LAUNCHERS[name]
    environment(variables)
    with pytest.raises(elm.UserError, match=message):
        elm.start_distributed()


@pytest.mark.parametrize("variables", [
    {},
    {"OMPI_COMM_WORLD_SIZE": "1"},
    {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"},  # in salloc's shell
    {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's shell as a step
    {"PMI_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"},  # of one's own will
    {"SLURM_STEP_NUM_TASKS": "", "OMPI_COMM_WORLD_SIZE": ""},  # emptied, as the refusal says
])  # fmt: skip
def test_one_process_under_a_launcher(environment, monkeypatch, variables):
    environment(variables)
    monkeypatch.setattr(elm, "init_process_group", lambda *_, **__: fail(AssertionError("joined")))
    elm.start_distributed()
    assert (elm.rank(), elm.world_size()) == (0, 1)


def test_every_command_refuses_processes_of_another_launcher(environment, trained, tmp_path):
    """Each in one line, before it writes anything."""
    _, folder, settings = trained
    base = elm.parse_overrides(settings[:-1])
    sweep = {"base": base, "space": {"train.lr": [0.1, 0.2]},
             "output": {"dir": str(tmp_path / "sweep")}}  # fmt: skip
    sweep_file = tmp_path / "sweep.toml"
    lines = [f"{key} = {elm.toml_value(table)}\n" for key, table in sweep.items()]
    sweep_file.write_text("".join(lines))
    environment({"OMPI_COMM_WORLD_SIZE": "2"})
    vectors = vectors_path(folder.parent / "data")
    for words in (
        [NO_TABLES, *settings[:-1], f"output.dir={tmp_path / 'new'}"],
        ["eval", NO_TABLES, *settings[:-1], f"adapter={folder}", f"report_dir={tmp_path / 'new'}"],
        ["generate", f"adapter={folder}", f"embeddings={vectors}", "query=What?"],
        ["sweep", sweep_file],
    ):
        refused("OMPI_COMM_WORLD_SIZE = 2", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.toml"]


def test_work_of_one_process_is_not_advised_to_start_several(environment, tmp_path, capsys):
    """A worker of a sweep, and the preparation of data: under mpirun as under torchrun."""
    texts = tmp_path / "texts.txt"
    texts.write_text("one\n")
    sweep = elm.Sweep(elm.StudyConfig(), "out", None, {}, {})
    for variables, said in (
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE = 2: "),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE = 2: "),
    ):
        environment(variables)
        for words in (["embed", texts, tmp_path / "x.safetensors"],
                      ["synthesize", texts, tmp_path / "x"], ["filter", tmp_path, tmp_path / "x"]):
            assert prepare.main([str(word) for word in words]) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"elm: {said}") and "start one by python" in err
        with pytest.raises(elm.UserError, match=f"^{said}.*start one for each GPU by hand") as e:
            elm.run_sweep(sweep)
        assert "torchrun" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["texts.txt"]


def test_a_process_alone_needs_no_network(run, settings, llm_dir, tmp_path):
    """Without an interface, not even loopback."""
    isolated = ("unshare", "-rn", sys.executable)
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("cannot take the network away")
    done = run(NO_TABLES, *settings, "eval.samples=0", launcher=isolated)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "eval.json").exists()
    more = ["deepspeed.zero_stage=3", f"output.dir={tmp_path / 'zero3'}"]
    done = run(NO_TABLES, *settings, *more, launcher=isolated)
    assert done.returncode == 2
    assert "elm: deepspeed.zero_stage = 3: needs a network interface" in done.stderr


def test_deepspeed_says_nothing_below_a_warning(run, settings):
    """Nor that a machine without a GPU has none."""
    done = run(NO_TABLES, *settings, "eval.samples=0", "deepspeed.zero_stage=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ZeRO 3" in done.stdout
    assert not re.search(r"\[(INFO|WARNING)\] \[", done.stdout + done.stderr)


# -----------------------------------------------------------------------------
# Standard streams


@pytest.mark.parametrize("names", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_log_without_a_stream(monkeypatch, capsys, names):
    """What `>&-` leaves, where elm is a module."""
    for name in names:
        monkeypatch.setattr(sys, name, None)
    elm.log.info("one")
    elm.log.warning("two")
    assert list(elm.progress([1, 2], "numbers", mininterval=0)) == [1, 2]
    out, err = capsys.readouterr()
    assert out == ("" if "stdout" in names else "one\n")
    assert err.startswith("" if "stderr" in names else "elm: warning: two\n")


def test_closed_streams_take_no_files_number(processes, settings, tmp_path):
    """The next file would have number 1 or 2, and whatever writes there would write into it."""
    code = ("import sys\nsys.path.insert(0, sys.argv[1])\nimport elm\nelm.open_closed_streams()\n"
            "numbers = [s.fileno() for s in (sys.stdin, sys.stdout, sys.stderr)]\n"
            "open(sys.argv[2], 'w').write(str(numbers))")  # fmt: skip
    path = tmp_path / "numbers"
    words = shlex.join([sys.executable, "-c", code, str(ROOT), str(path)])
    subprocess.run(f"{words} <&- >&- 2>&-", shell=True, check=True)
    assert path.read_text() == "[0, 1, 2]"


def test_a_run_with_closed_streams(processes, settings, tmp_path):
    words = [sys.executable, ROOT / "elm.py", NO_TABLES, *settings, "eval.samples=0"]
    command = shlex.join(map(str, words))
    subprocess.run(f"{command} <&- >&- 2>&-", shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "eval.json").exists()


def test_without_docstrings(run, settings):
    """-OO: elm works; transformers does not, and the line says why. -O: all works."""
    done = run("--help", launcher=(sys.executable, "-OO"))
    assert done.returncode == 0
    assert "answers about vectors" in done.stdout
    assert "None" not in done.stdout
    done = run(NO_TABLES, *settings, launcher=(sys.executable, "-OO"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("elm: model.llm")]
    assert done.returncode == 0 or (len(lines) == 1 and "use -O)" in lines[0]), done.stderr[-3000:]
    done = run(NO_TABLES, *settings, "eval.samples=0", launcher=(sys.executable, "-O"))
    assert done.returncode == 0, done.stderr[-3000:]


# -----------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_prefetch_keeps_the_order_and_its_distance(num_threads):
    started = []

    def note(item):
        started.append(item)
        return item * item

    for i, result in enumerate(elm.prefetch(note, range(40), num_threads)):
        assert result == i * i
        time.sleep(0.001)
        assert max(started) <= i + 2 * num_threads
    assert sorted(started) == list(range(40))


def test_prefetch_works_while_the_first_result_is_used():
    ahead = threading.Event()

    def note(item):
        if item == 4:
            ahead.set()

    results = elm.prefetch(note, itertools.count(), 2)
    next(results)
    assert ahead.wait(10)
    results.close()


def test_prefetch_raises_an_error_where_its_item_is():
    results = elm.prefetch(lambda x: 1 / (3 - x), range(9), 2)
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_prefetch_that_is_closed_drops_what_is_queued():
    started = []
    may_end = threading.Event()

    def slow(item):
        started.append(item)
        if item:
            may_end.wait(10)

    results = elm.prefetch(slow, range(100), 1)
    next(results)
    threading.Timer(1.0, may_end.set).start()
    results.close()  # waits for what runs
    assert may_end.is_set()
    assert len(started) <= 2


def test_blocks():
    assert list(elm.in_blocks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(elm.in_blocks([], 2)) == []


# -----------------------------------------------------------------------------
# Files


def test_atomic_write_replaces_a_file_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with elm.atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyError), elm.atomic_write(path) as temporary:
        temporary.write_text("tw")
        raise KeyError("in the middle")
    assert path.read_text() == "one"
    with elm.atomic_write(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """A folder is in its place, or a file in the place of its folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "x"):
        with pytest.raises(elm.UserError, match=f"{path}: cannot be written .what was there is un"):
            elm.write_text(path, "text")
    with pytest.raises(elm.UserError, match="folder: cannot be written"):
        elm.append_text(tmp_path / "folder", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_text_is_written_as_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    elm.write_text(path, elm.jsonl([{"a": "ü"}]))
    elm.append_text(path, elm.jsonl([{"a": None}, {"b": [1]}]))
    assert path.read_bytes() == '{"a": "ü"}\n{"a": null}\n{"b": [1]}\n'.encode()


def test_what_exists_already_is_refused(tmp_path):
    elm.check_new(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b").touch()
    with pytest.raises(elm.UserError, match="b: exists already; choose another place"):
        elm.check_new(tmp_path / "a", tmp_path / "b")


def test_a_long_reason_without_spaces_is_clipped():
    """As a Chinese one."""
    with pytest.raises(elm.UserError) as e, elm.user_error("x", ValueError):
        raise ValueError("很" * 1000)
    assert str(e.value) == f"x: {'很' * 299}…"


def test_a_lock_is_held_once(tmp_path):
    path = tmp_path / ".lock"
    is_held = pytest.raises(elm.UserError, match=".lock: another process holds it")
    with elm.locked(path), is_held, elm.locked(path):
        pass
    with pytest.raises(KeyError), elm.locked(path):
        raise KeyError
    with elm.locked(path):  # an error, too, has given it back
        pass


def hold(path, is_held) -> None:
    with elm.locked(path):
        is_held.set()
        time.sleep(600)


def test_a_lock_of_another_process_ends_with_it(processes, tmp_path):
    path = tmp_path / ".lock"
    context = torch.multiprocessing.get_context("spawn")
    is_held = context.Event()
    other = context.Process(target=hold, args=(path, is_held))
    other.start()
    assert is_held.wait(120)
    with pytest.raises(elm.UserError, match="another process holds it"), elm.locked(path):
        pass
    threading.Timer(1, other.kill).start()
    with elm.locked(path, wait=True):
        other.join(10)
        assert not other.is_alive()


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


@pytest.mark.parametrize("number", NO_LOCKS)
@pytest.mark.parametrize("wait", [False, True])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number, wait):
    """NFS, FUSE, SMB: one warning for a folder, and the work goes on."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    elm.warn_once.cache_clear()
    (tmp_path / ".lock").touch()  # of a run before the folder was moved here
    for _ in range(2):
        with elm.locked(tmp_path / ".lock", wait):
            pass
    warning = f"elm: warning: {tmp_path}: its file system has no locks, so nothing prevents"
    assert capsys.readouterr().err.count(warning) == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_host_holds(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(elm.UserError, match=".lock: another process holds it"):
        elm.locked(tmp_path / ".lock").__enter__()


def test_a_disk_that_fails_at_a_lock_is_no_file_system_without_locks(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"):
        elm.locked(tmp_path / ".lock").__enter__()


@pytest.mark.parametrize("number, is_harmless", [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_without_sync(tmp_path, monkeypatch, number, is_harmless):
    """It cannot say when a file is on disk. One that says that the disk fails is heard."""

    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    path = tmp_path / "x"
    if is_harmless:
        elm.write_text(path, "one")
        assert path.read_text() == "one"
    else:
        with pytest.raises(elm.UserError, match="cannot be written .* Input/output error"):
            elm.write_text(path, "one")
        assert not list(tmp_path.iterdir())


def test_a_run_where_a_file_system_lacks_locks_modes_and_syncs(settings, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for owner, name in ((fcntl, "flock"), (os, "chmod"), (os, "fsync")):
        monkeypatch.setattr(owner, name, refuse)
    elm.warn_once.cache_clear()
    _, out = go(settings, "eval.samples=0")
    assert (out / "eval.json").exists()
    assert capsys.readouterr().err.count("has no locks") == 1


@pytest.mark.parametrize("given, expected", [
    ({}, "expandable_segments:True"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
])
def test_settings_of_a_gpu(monkeypatch, given, expected):
    """The allocator's, unless the user has set them by either name; and no attention by cuDNN."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    torch.backends.cuda.enable_cudnn_sdp(True)
    elm.find_device()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    assert os.environ.get("PYTORCH_ALLOC_CONF") == given.get("PYTORCH_ALLOC_CONF")


def test_a_launcher_may_show_each_process_its_own_gpu_alone(monkeypatch):
    """Process 3 of the host sees one device, number 0. DeepSpeed would look for number 3."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    device = elm.find_device()
    assert device == torch.device("cuda", 0)

    def import_nothing(name):
        assert name == "deepspeed"
        raise ImportError(os.environ["LOCAL_RANK"])

    monkeypatch.setattr(elm, "import_optional", import_nothing)
    with pytest.raises(ImportError, match="^0$"):
        elm.load_llm_zero3("none", device, True, "model.llm", elm.DeepSpeedConfig(zero_stage=3))
