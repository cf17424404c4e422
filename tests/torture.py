"""The long forms of tests/test_trust.py: kills at random moments, all processes and ZeRO stages,
damaged files.

    python tests/torture.py kills  [--count 50] [--seed 0]
    python tests/torture.py stages
    python tests/torture.py bytes  [--count 2000] [--seed 0]

Each says what it did and how often, and stops at the first thing that is wrong.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import (
    NO_TABLES,
    ROOT,
    command,
    deepspeed_launcher,
    make_data,
    make_llm,
    make_settings,
    open_train,
    read_jsonl,
    rows_path,
    vectors_path,
)
from safetensors.torch import load_file

import elm

sys.path.insert(0, str(ROOT / "data"))
import prepare


def same_tree(a: Any, b: Any) -> bool:
    """Whether nested containers are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    if dataclasses.is_dataclass(a):
        return same_tree(vars(a), vars(b))
    both_nan = a != a and b != b
    return a == b or both_nan


# ----------------------------------------------------------------------------- kills

CLOCKED = ("tokens_per_second", "memory_gib")
MOMENTS = ("start", "steps", "write", "log", "evaluation", "report")
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
# Of a process that a signal ended. Where Python does not run yet, or elm does not watch, a signal
# has an exit of its own.
EXIT_CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2, 1)}


def start(settings: list, folder: Path) -> subprocess.Popen:
    """A training into `folder`, which goes on where one was stopped. `settings` begin with a TOML
    file."""
    words = [sys.executable, ROOT / "elm.py", *settings, f"output.dir={folder}",
             "train.resume=auto"]  # fmt: skip
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(list(map(str, words)), stdout=log, stderr=log, cwd=ROOT)


def finish(settings: list, folder: Path) -> None:
    code = start(settings, folder).wait()
    assert code == 0, folder.with_suffix(".log").read_text()[-3000:]


def until(process: subprocess.Popen, seen: Callable[[], bool], seconds: float = 600) -> None:
    """Wait, looking every millisecond, until seen() or the process has ended."""
    end = time.time() + seconds
    while process.poll() is None and not seen():
        assert time.time() < end, "nothing happens any more"
        time.sleep(0.001)


def wait_for_moment(moment: str, process: subprocess.Popen, folder: Path, rng: random.Random,
                    eval_steps: int) -> None:
    metrics = folder / "metrics.jsonl"

    def is_logged_since(begin):
        return metrics.exists() and metrics.stat().st_mtime > begin

    def is_evaluating():  # the last line is of a step that is evaluated, val_loss is not there yet
        entries = elm.read_metrics(metrics)
        return bool(entries) and "loss" in entries[-1] and entries[-1]["step"] % eval_steps == 0

    def wait_up_to(seconds):
        end = time.time() + rng.uniform(0, seconds)
        until(process, lambda: time.time() > end)

    if moment == "start":
        wait_up_to(6)
        return
    begin = time.time()
    until(process, lambda: is_logged_since(begin))
    if moment == "report":
        until(process, (folder / "checkpoint_final.pt").exists)
        wait_up_to(2)
        return
    wait_up_to(3)
    now = time.time()
    if moment == "write":
        until(process, lambda: any(folder.glob(".*.tmp")))
    elif moment == "log":
        until(process, lambda: is_logged_since(now))
    elif moment == "evaluation":
        until(process, is_evaluating)
        wait_up_to(0.3)


def kill_repeatedly(settings: list, folder: Path, most: int, rng: random.Random,
                    eval_steps: int) -> Counter:
    """Start a run, kill it at a random moment, resume it, and so on `most` times, then let it end.
    Returns how often by (moment, signal)."""
    counts = Counter()
    for _ in range(most):
        process = start(settings, folder)
        moment = rng.choice(MOMENTS)
        number = rng.choice(SIGNALS)
        wait_for_moment(moment, process, folder, rng, eval_steps)
        process.send_signal(number)
        code = process.wait(60)
        assert code == 0 or code in EXIT_CODES[number], (code, folder)
        if code == 0:  # it has ended before
            return counts
        counts[moment, number.name] += 1
    finish(settings, folder)
    return counts


def logged(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock says."""
    entries = read_jsonl(folder / "metrics.jsonl")
    for entry in entries:
        for key in CLOCKED:
            entry.pop(key, None)
    return entries


def check_same(one: Path, two: Path) -> None:
    """Two runs left the same: adapters, answers and report to the byte, and all steps once."""
    assert logged(one) == logged(two), (one, two)
    names = [p.name for p in one.iterdir() if p.suffix in (".safetensors", ".jsonl", ".json")]
    names.remove("metrics.jsonl")
    assert len(names) > 3
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), (two, name)
    a = elm.load_checkpoint(one / "checkpoint_final.pt")
    b = elm.load_checkpoint(two / "checkpoint_final.pt")
    for part in ("adapter", "optimizer", "probe"):
        assert same_tree(getattr(a, part), getattr(b, part)), (two, part)


class Kills(NamedTuple):
    num_runs: int
    counts: Counter  # by (moment, signal)
    num_skipped: int  # damaged checkpoints, of which a resume took the one before


def kills(settings: list, folder: Path, count: int, seed: int, per_run: int = 10) -> Kills:
    """`count` times a run is started, and killed at a random moment: SIGKILL, now and then SIGTERM
    or SIGINT; each run ends as one never killed."""
    rng = random.Random(seed)
    eval_steps = elm.load_config(settings[0], settings[1:]).train.eval_steps
    whole = folder / "whole"
    finish(settings, whole)
    counts = Counter()
    num_runs = 0
    while counts.total() < count:
        run = folder / f"run_{num_runs}"
        num_runs += 1
        most = min(per_run, count - counts.total())
        counts += kill_repeatedly(settings, run, most, rng, eval_steps)
        check_same(whole, run)
    said = "".join(path.read_text() for path in folder.glob("run_*.log"))
    return Kills(num_runs, counts, said.count("skipped a damaged checkpoint"))


# The embedded default with all that a run carries on: dropout, the drift probe, sums between
# logging steps; most validations fall on a step that is saved, some on another.
DEFAULT = [str(ROOT / "train.toml"), "model.dropout=0.1", "loss.drift_weight=0.03",
           "train.save_steps=15", "train.eval_steps=50", "train.logging_steps=5",
           "eval.samples=8"]  # fmt: skip

# ----------------------------------------------------------------------------- stages


class Setup(NamedTuple):
    processes: int
    stage: int


SETUPS = [Setup(processes, stage) for processes in (1, 2) for stage in (0, 3)]


class StageRun(NamedTuple):
    setup: Setup
    source: Setup | None  # of the checkpoint of step 10 that it goes on from

    @property
    def name(self) -> str:
        name = f"{self.setup.processes}_{self.setup.stage}"
        if self.source:
            return f"{self.source.processes}_{self.source.stage}_to_{name}"
        return name

    def settings(self, folder: Path, size: int) -> list[str]:
        own = [f"train.batch_size={size // self.setup.processes}",
               f"deepspeed.zero_stage={self.setup.stage}", f"output.dir={folder / self.name}"]
        if self.source:
            checkpoint = folder / StageRun(self.source, None).name / "checkpoint_step_10.pt"
            own.append(f"train.resume={checkpoint}")
        return own


def launch_runs(runs: list[StageRun], shared: list[str], folder: Path, size: int) -> None:
    """Trainings one after the other, those of one process and those of two side by side."""
    started = []
    for processes in (1, 2):
        todo = [[*shared, *run.settings(folder, size)]
                for run in runs if run.setup.processes == processes]
        name = f"trainings_{processes}.json"
        (folder / name).write_text(json.dumps(todo))
        script = ROOT / "tests" / "distributed_jobs.py"
        words = [*deepspeed_launcher(processes), script, "trainings", folder, name]
        log = folder / f"trainings_{processes}.log"
        with open(log, "w") as f:
            started.append((subprocess.Popen(list(map(str, words)), stdout=f, stderr=f), log))
    for process, log in started:
        assert process.wait(900) == 0, log.read_text()[-5000:]


def losses_by_step(folder: Path) -> dict[tuple[int, str], float]:
    losses = {}
    for entry in read_jsonl(folder / "metrics.jsonl"):
        for key in ("loss", "drift_loss", "val_loss"):
            if key in entry:
                losses[entry["step"], key] = entry[key]
    losses[21, "report"] = json.loads((folder / "eval.json").read_text())["loss"]
    return losses


def final_numbers(folder: Path) -> dict[str, torch.Tensor]:
    """The last step's adapter, and the moments of its optimizer, each flat in fp64."""
    saved = elm.load_checkpoint(folder / "checkpoint_final.pt")
    moments = []
    for _, of_parameter in sorted(saved.optimizer["state"].items()):
        moments += [of_parameter["exp_avg"], of_parameter["exp_avg_sq"]]
    parts = {"adapters": saved.adapter.values(), "moments": moments}
    return {name: torch.cat([x.flatten() for x in part]).double() for name, part in parts.items()}


# A checkpoint is saved before the validation of its step, which the resumed run makes.
FIRST_OF_RESUMED = {"loss": 11, "drift_loss": 11, "val_loss": 10, "report": 21}


def stages(folder: Path, everything: bool = True, size: int = 80) -> tuple[int, dict[str, float]]:
    """20 steps of several micro-batches each, with drift, by one and two processes at ZeRO 0 and 3,
    and from the checkpoint of step 10 of each on at each (or, not everything, at one other).
    Returns the number of runs, and the largest relative deviations: of losses, of adapters, of
    Adam's moments."""
    llm = make_llm(folder / "llm")
    data = make_data(folder / "data", num_rows=90)
    shared = [*make_settings(llm, data, folder), "loss.drift_weight=0.1", "train.max_steps=20",
              "train.save_steps=10", "train.eval_steps=10", "eval.samples=0"]
    new_runs = [StageRun(setup, None) for setup in SETUPS]
    resumed_runs = []
    for turn in range(4) if everything else [3]:
        for i, source in enumerate(SETUPS):
            resumed_runs.append(StageRun(SETUPS[(i + turn) % 4], source))
    launch_runs(new_runs, shared, folder, size)
    launch_runs(resumed_runs, shared, folder, size)

    reference = folder / new_runs[0].name
    expected_losses = losses_by_step(reference)
    expected_numbers = final_numbers(reference)
    assert {step for step, _ in expected_losses} == set(range(22))
    worst = {"losses": 0.0, "adapters": 0.0, "moments": 0.0}
    for run in [*new_runs, *resumed_runs]:
        losses = losses_by_step(folder / run.name)
        expected = expected_losses
        if run.source:
            expected = {at: x for at, x in expected_losses.items()
                        if at[0] >= FIRST_OF_RESUMED[at[1]]}
        assert losses.keys() == expected.keys(), run.name
        for at, loss in losses.items():
            worst["losses"] = max(worst["losses"], abs(loss / expected[at] - 1))
        for name, numbers in final_numbers(folder / run.name).items():
            distance = (numbers - expected_numbers[name]).norm() / expected_numbers[name].norm()
            worst[name] = max(worst[name], distance.item())
    assert max(worst.values()) < 1e-5, worst
    return len(new_runs) + len(resumed_runs), worst


# ----------------------------------------------------------------------------- bytes

WORDS = [b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"NaN", b"-Infinity", b"1e999",
         b"9" * 5000, b"-1", b"0.5", b"null", b"true", b'"', b"'", b"{}", b"[]", b"[" * 9999,
         b'{"a":' * 9999, b"\n", b"\r", b"\n\n", b"\xe2\x80\xa8", b"../../../x", b"/x", b"~",
         b"a" * 9999, b"<EMB>", b"<|im_end|>", b"=", b"#", b"inf", b"1979-05-27"]  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three of: a bit flipped; bytes lost, zeroed, doubled or exchanged; an odd word put in
    or over what is there; the end lost, now and then all of it."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(data) + 1)
        other = rng.randrange(len(data) + 1)
        if rng.random() > 0.97:
            at = 0
        n = rng.choice([1, 1, 2, 8, 64, 1000])
        word = rng.choice(WORDS)
        part = data[at : at + n]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in part[:1])
        num_lost, put = rng.choice([
            (1, flipped), (1, flipped), (n, b""), (n, bytes(len(part))), (0, part),
            (n, data[other : other + n]), (0, word), (len(word), word), (len(data), b"")])
        data = data[:at] + put + data[at + num_lost :]
    return data


# Where the files of a run are that are damaged.


class World:
    """A small LLM, a data set of its own, a run of two steps that has lost its end, a TOML file, a
    file of texts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = make_data(folder / "data", num_rows=14, num_vectors=5)
        self.llm = make_llm(folder / "llm")
        self.run = folder / "run"
        self.out = folder / "out.safetensors"  # of a command; a folder, or a file
        self.toml = folder / "a.toml"
        self.texts = folder / "texts.jsonl"
        self.checkpoint = self.run / "checkpoint_step_2.pt"
        self.metrics = self.run / "metrics.jsonl"
        self.adapter = self.run / "adapter_best.safetensors"
        self.settings = [
            *make_settings(self.llm, self.data, self.out), "train.save_steps=1",
            "eval.samples=0", "train.max_steps=2"]  # fmt: skip
        code, said = command(NO_TABLES, *self.settings, f"output.dir={self.run}")
        assert code == 0, said
        for name in ("checkpoint_final.pt", "eval.json"):
            (self.run / name).unlink()
        self.toml.write_text((ROOT / "train.toml").read_text())
        texts = [{"text": row["text"]} for row in read_jsonl(rows_path(self.data))]
        self.texts.write_text(elm.jsonl(texts))
        self.saved = elm.load_checkpoint(self.checkpoint)
        self.prompt = elm.Prompt(elm.load_tokenizer(str(self.llm)))

    def files(self) -> dict[Path, tuple[int, int]]:
        """Size and time of all files but those of `out`."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and self.out not in (path, *path.parents):
                found[path] = (path.stat().st_size, path.stat().st_mtime_ns)
        return found

    def clear_out(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.unlink(missing_ok=True)


class Kind:
    """A kind of file that may be damaged: `path` in the world, `read`, which reads it, `check`,
    which asserts that what was read is what the damaged bytes say, and `command`, `words` of a
    command line that reads it, too."""

    path: Path
    words: list
    main = staticmethod(elm.main)  # of the command
    damages_head_alone = False  # now and then; the rest is long and plain

    def __init__(self, world: World):
        self.world = world

    def read(self) -> Any:
        raise NotImplementedError

    def check(self, value: Any, raw: bytes) -> None:
        raise NotImplementedError

    def prepare_command(self) -> None:
        """What the command needs."""

    def check_command(self, value: Any, code: int, said: str) -> None:
        """The command ends as the reader did: `value` is None where that refused the file."""
        assert (code == 0) == (value is not None), said


class Rows(Kind):
    def __init__(self, world):
        super().__init__(world)
        self.path = rows_path(world.data)
        self.words = [NO_TABLES, *world.settings]

    def read(self):
        return open_train(self.world.data, self.world.prompt)

    def check(self, split, raw):
        check_split(split, raw)


class Vectors(Kind):
    damages_head_alone = True

    def __init__(self, world):
        super().__init__(world)
        self.path = vectors_path(world.data)
        self.words = [NO_TABLES, *world.settings]

    def read(self):
        return open_train(self.world.data, self.world.prompt)

    def check(self, split, raw):
        check_split(split, rows_path(self.world.data).read_bytes())


def check_split(split: elm.Split, raw: bytes) -> None:
    """Every line of the file that is a row is there; the vectors are those of the table."""
    lines = []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            row = json.loads(line)
            if row["task_type"] not in elm.PAIR_TASKS:
                lines.append((number, row))
    (table,) = load_file(vectors_path(split.path.parents[1])).values()
    assert same_tree(split.vectors, table)
    found = split.read(range(len(split)))
    for (number, row), entry, found_row in zip(lines, split.index, found, strict=True):
        assert entry["line"] == number
        assert found_row.model_dump().items() >= row.items()
        assert split.tasks[entry["task_id"]] == row["task_type"]
        assert torch.equal(table[entry["vector_id"]], table[row["embedding_file_idx"]])


class Toml(Kind):
    """Its command ends at a checkpoint that is not there, before a model is loaded."""

    def __init__(self, world):
        super().__init__(world)
        self.path = world.toml
        self.overrides = [f"output.dir={world.out}", "train.resume=/nowhere/checkpoint.pt"]
        self.words = ["train", world.toml, *self.overrides]

    def read(self):
        return elm.load_config(str(self.path), self.overrides)

    def check(self, cfg, raw):
        tables = cfg.to_dict()
        for name, table in elm.tomllib.loads(raw.decode("utf-8-sig")).items():
            for key, value in table.items():
                if isinstance(value, str):
                    value = elm.expand_path(value)
                if (name, key) != ("output", "dir"):
                    assert tables[name][key] == value

    def check_command(self, value, code, said):
        assert code == 2
        assert ("/nowhere/checkpoint.pt" in said) == (value is not None), said


class Texts(Kind):
    main = staticmethod(prepare.main)

    def __init__(self, world):
        super().__init__(world)
        self.path = world.texts
        embedder = f"model={ROOT / 'data/tiny/embedder'}"
        self.words = ["embed", world.texts, world.out, embedder, "bf16=false"]

    def read(self):
        return list(prepare.read_texts(self.path))

    def check(self, sources, raw):
        lines = [json.loads(line) for line in raw.split(b"\n") if line]
        assert [source.text for source in sources] == [line["text"] for line in lines]


class Checkpoints(Kind):
    def __init__(self, world):
        super().__init__(world)
        self.path = world.checkpoint
        self.words = [NO_TABLES, *world.settings, "train.resume=auto"]

    def read(self):
        return elm.load_checkpoint(self.path)

    def check(self, checkpoint, raw):
        assert same_tree(checkpoint, self.world.saved)

    def prepare_command(self):
        shutil.copytree(self.world.run, self.world.out)

    def check_command(self, value, code, said):
        """The checkpoint before a damaged one is there."""
        assert code == 0, said
        assert ("skipped a damaged checkpoint" in said) == (value is None), said
        final = elm.load_checkpoint(self.world.out / "checkpoint_final.pt")
        assert same_tree(final.adapter, self.world.saved.adapter)


class Metrics(Kind):
    def __init__(self, world):
        super().__init__(world)
        self.path = world.metrics
        self.words = [NO_TABLES, *world.settings, "train.resume=auto"]

    def read(self):
        return elm.read_metrics(self.path)

    def check(self, entries, raw):
        assert entries == [json.loads(line) for line in raw.split(b"\n")[:-1]]

    def prepare_command(self):
        shutil.copytree(self.world.run, self.world.out)


class Adapters(Kind):
    """Without a checksum: some numbers may be others."""

    damages_head_alone = True

    def __init__(self, world):
        super().__init__(world)
        self.path = world.adapter
        self.words = [
            "generate", f"adapter={world.adapter}", f"embeddings={vectors_path(world.data)}",
            "query=What?", "max_new_tokens=2"]  # fmt: skip

    def read(self):
        return elm.Adapter.load(self.path)

    def check(self, found, raw):
        adapter, metadata = found
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert metadata == json.loads(header["__metadata__"]["elm"])
        state = {name: t.float().nan_to_num() for name, t in load_file(self.path).items()}
        state.pop(elm.TOKEN_EMBEDDINGS, None)  # of the LLM
        found_state = {name: t.nan_to_num() for name, t in adapter.state_dict().items()}
        assert same_tree(found_state, state)

    def check_command(self, value, code, said):
        """One that can be read may still be one of another LLM."""
        assert value is not None or code == 2, said


KINDS = {"rows": Rows, "vectors": Vectors, "toml": Toml, "texts": Texts, "checkpoint": Checkpoints,
         "metrics": Metrics, "adapter": Adapters}  # fmt: skip


def damaged(original: bytes, kind: Kind, rng: random.Random) -> bytes:
    if kind.damages_head_alone and rng.random() < 0.6:
        length = 8 + int.from_bytes(original[:8], "little")  # of a safetensors file's header
        return mutate(original[:length], rng) + original[length:]
    return mutate(original, rng)


def give_to_command(kind: Kind, value: Any) -> None:
    """It ends as the reader did, and says why in lines of a moderate length."""
    kind.prepare_command()
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = kind.main([str(word) for word in kind.words])
    said = output.getvalue()
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if re.match("elm: (?!warning)", line)]
    assert all(len(line) < 1100 for line in errors), said
    if errors:
        assert code == 2, said
    else:
        assert code == 0, said
    kind.check_command(value, code, said)


def try_damaged(kind: Kind, raw: bytes, with_command: bool) -> bool:
    """Whether the reader refused the file; what it read otherwise is what the bytes say."""
    value = None
    with contextlib.suppress(elm.UserError, OSError):
        value = kind.read()
    if value is not None:
        kind.check(value, raw)
    if with_command:
        give_to_command(kind, value)
    return value is None


@contextlib.contextmanager
def file_replaced(path: Path, raw: bytes, copy: Path) -> Iterator[None]:
    """Other bytes in a file for a while; after an error they are kept as `copy`. What hangs is
    ended, and said."""
    original = path.read_bytes()
    path.write_bytes(raw)
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    try:
        yield
    except BaseException:
        copy.write_bytes(raw)
        print(f"kept as {copy}", file=sys.stderr)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        path.write_bytes(original)


def damage(folder: Path, count: int, seed: int) -> Counter:
    """`count` damaged files of seven kinds in turn; each is refused, or read as what it says. Every
    20th of a kind is also given to a command, which refuses it too, in lines that say why. Returns
    how many were read and refused, by (kind, what)."""
    rng = random.Random(seed)
    world = World(folder)
    kinds = {name: kind_class(world) for name, kind_class in KINDS.items()}
    names = list(kinds)
    counts = Counter()
    for number in range(count):
        name = names[number % len(names)]
        kind = kinds[name]
        with_command = number // len(names) % 20 == 0
        raw = damaged(kind.path.read_bytes(), kind, rng)
        copy = Path(tempfile.gettempdir()) / f"damaged_{name}_{seed}_{number}"
        world.clear_out()
        with file_replaced(kind.path, raw, copy):
            before = world.files()
            is_refused = try_damaged(kind, raw, with_command)
            assert world.files() == before, "something was written elsewhere"
        counts[name, "refused" if is_refused else "read"] += 1
        if with_command:
            counts[name, "given to a command"] += 1
    return counts


# ----------------------------------------------------------------------------- what is printed


def print_counts(counts: Counter) -> None:
    for (one, two), n in sorted(counts.items()):
        print(f"  {one:10} {two:18} {n}")


def run_kills(folder: Path, count: int | None, seed: int) -> None:
    done = kills(DEFAULT, folder, count or 50, seed)
    print(f"{done.counts.total()} kills over {done.num_runs} runs, each the same as one never "
          f"killed; {done.num_skipped} damaged checkpoints skipped")
    print_counts(done.counts)


def run_stages(folder: Path, count: int | None, seed: int) -> None:
    num_runs, worst = stages(folder)
    deviations = ", ".join(f"{name} within {value:.1e}" for name, value in worst.items())
    print(f"{num_runs} runs of 1 and 2 processes at ZeRO 0 and 3: {deviations}")


def run_bytes(folder: Path, count: int | None, seed: int) -> None:
    counts = damage(folder, count or 2000, seed)
    print(f"{count or 2000} damaged files, each refused or read as what it says")
    print_counts(counts)


FORMS = {"kills": run_kills, "stages": run_stages, "bytes": run_bytes}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("form", choices=FORMS)
    p.add_argument("--count", type=int)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        FORMS[a.form](Path(folder), a.count, a.seed)
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
