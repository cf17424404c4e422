"""The long forms of tests/test_trust.py: kills at random moments, all processes and ZeRO stages,
damaged files.

    python tests/torture.py kills  [--count 50] [--seed 0]
    python tests/torture.py stages
    python tests/torture.py bytes  [--count 2000] [--seed 0]

Each says what it did and how often, and stops at the first thing that is wrong.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, deepspeed_launcher, make_data, make_llm, read_jsonl
from safetensors.torch import load_file
from transformers import AutoTokenizer

import elm

# ----------------------------------------------------------------------------- kills

CLOCKED = ("tokens_per_second", "memory_gib")
MOMENTS = ("start", "steps", "write", "log", "evaluation", "report")


def start(settings, folder):
    log = open(folder.with_suffix(".log"), "a")
    words = [sys.executable, ROOT / "elm.py", *settings, f"output.dir={folder}",
               "train.resume=auto"]
    return subprocess.Popen(list(map(str, words)), stdout=log, stderr=log, cwd=ROOT)


def until(process, seen, seconds=120):
    """Waits, looking every millisecond, until seen() or the process has ended."""
    end = time.time() + seconds
    while process.poll() is None and not seen():
        assert time.time() < end, "nothing happens any more"
        time.sleep(0.001)


def wait_for_moment(moment, process, folder, rng, eval_steps):
    metrics, before = folder / "metrics.jsonl", time.time()

    def logged():
        return metrics.stat().st_size if metrics.exists() else 0

    def written():  # files on their way
        return any(p.name.endswith(".tmp") for p in folder.glob(".*"))

    def evaluates():  # the last line is of a step that is evaluated, and its val_loss is not there
        entry = ([{}] + elm.read_metrics(metrics))[-1]
        return "loss" in entry and entry["step"] % eval_steps == 0

    def still_for(seconds):
        end = time.time() + seconds
        until(process, lambda: time.time() > end)

    if moment == "start":
        still_for(rng.uniform(0, 6))
        return
    until(process, lambda: metrics.exists() and metrics.stat().st_mtime > before)
    if moment == "report":
        until(process, lambda: (folder / "checkpoint_final.pt").exists())
        still_for(rng.uniform(0, 2))
        return
    still_for(rng.uniform(0, 3))
    if moment == "write":
        until(process, written)
    elif moment == "log":
        size = logged()
        until(process, lambda: logged() != size)
    elif moment == "evaluation":
        until(process, evaluates)
        still_for(rng.uniform(0, 0.3))


def same_tree(a, b):
    """Whether nested containers are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b or a != a


def without_clock(folder):
    return [{k: v for k, v in m.items() if k not in CLOCKED}
            for m in read_jsonl(folder / "metrics.jsonl")]


def check_same(one, two):
    """Two runs left the same: adapters, answers and report to the byte, and all steps once."""
    assert without_clock(one) == without_clock(two), (one, two)
    names = [p.name for p in one.iterdir() if p.suffix in (".safetensors", ".jsonl", ".json")]
    assert len(names) > 4 and (one / "checkpoint_final.pt").exists()
    for name in names:
        if name != "metrics.jsonl":
            assert (one / name).read_bytes() == (two / name).read_bytes(), (two, name)
    a, b = (elm.load_checkpoint(f / "checkpoint_final.pt") for f in (one, two))
    for part in ("adapter", "optimizer", "probe"):
        assert same_tree(a[part], b[part]), (two, part)


def kills(settings, folder, count, seed, per_run=10):
    """`count` times a run is started, and killed at a random moment: SIGKILL, now and then SIGTERM
    or SIGINT; each run ends as one never killed. Returns {(moment, signal): how often}."""
    rng, counts, runs = random.Random(seed), collections.Counter(), 0
    cfg = elm.load_config(settings[0], settings[1:])
    whole = folder / "whole"
    assert start(settings, whole).wait() == 0, whole.with_suffix(".log").read_text()[-3000:]
    while counts.total() < count:
        run, left = folder / f"run_{runs}", min(per_run, count - counts.total())
        runs, code = runs + 1, None
        while code != 0:
            process = start(settings, run)
            if not left:
                code = process.wait()
                assert code == 0, run.with_suffix(".log").read_text()[-3000:]
                break
            moment = rng.choice(MOMENTS)
            number = rng.choice([signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT])
            wait_for_moment(moment, process, run, rng, cfg.train.eval_steps)
            process.send_signal(number)
            code = process.wait(60)
            # A signal's own exit where Python does not run yet, or elm does not watch.
            known = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2, 1)}
            assert code in (0, *known[number]), (code, run)
            if code:
                counts[moment, number.name] += 1
                left -= 1
        check_same(whole, run)
    said = "".join(p.read_text() for p in folder.glob("run_*.log"))
    return runs, counts, said.count("passed over")


# The embedded default with all that a run carries on: dropout, the drift probe, sums between
# logging steps; most validations fall on a step that is saved, some on another.
DEFAULT = [ROOT / "train.toml", "model.dropout=0.1", "loss.drift_weight=0.03",
           "train.save_steps=15", "train.eval_steps=50", "train.logging_steps=5", "eval.samples=8"]

# ----------------------------------------------------------------------------- stages

GRID = [(processes, stage) for processes in (1, 2) for stage in (0, 3)]


def launch(jobs, folder):
    """Trainings (processes, stage, output.dir, *more) one after the other, those of one process and
    those of two side by side."""
    logs = []
    for p in (1, 2):
        words = [[*more, f"deepspeed.zero_stage={stage}", f"output.dir={out}"]
                 for processes, stage, out, *more in jobs if processes == p]
        todo, log = folder / f"jobs_{p}.json", folder / f"jobs_{p}.log"
        todo.write_text(json.dumps(words))
        with open(log, "w") as f:
            words = [*deepspeed_launcher(p), Path(__file__), "jobs", todo]
            logs.append((subprocess.Popen(list(map(str, words)), stdout=f, stderr=f), log))
    for process, log in logs:
        assert process.wait(900) == 0, log.read_text()[-5000:]


def stages(settings, folder, everything=True, size=80):
    """20 steps by one and two processes at ZeRO 0 and 3, and from the checkpoint of step 10 of each
    on at each (or, not everything, at one other). Returns the number of runs, and the largest
    relative deviations: of a loss, of the adapter, of Adam's moments."""
    settings = [*settings, "train.max_steps=20", "train.save_steps=10", "train.eval_steps=10",
                "train.logging_steps=1", "eval.samples=0"]
    turns = range(4) if everything else [3]
    pairs = [(GRID[i], GRID[(i + turn) % 4]) for turn in turns for i in range(4)]

    def path(*names):
        return folder / "_".join(map(str, names))

    def job(p, stage, out, *more):
        return p, stage, out, *settings, f"train.batch_size={size // p}", *more

    launch([job(*g, path(*g)) for g in GRID], folder)
    launch([job(*g, path(*source, "to", *g),
                f"train.resume={path(*source) / 'checkpoint_step_10.pt'}")
            for source, g in pairs], folder)

    def losses(run):
        found = {(m["step"], k): m[k] for m in read_jsonl(run / "metrics.jsonl")
                 for k in ("loss", "drift_loss", "val_loss") if k in m}
        return found | {(21, "report"): json.loads((run / "eval.json").read_text())["loss"]}

    def numbers(run):
        saved = elm.load_checkpoint(run / "checkpoint_final.pt")
        moments = [p[key] for _, p in sorted(saved["optimizer"]["state"].items())
                   for key in ("exp_avg", "exp_avg_sq")]
        return [torch.cat([v.flatten() for v in part]).double()
                for part in (saved["adapter"].values(), moments)]

    runs = [path(*g) for g in GRID] + [path(*a, "to", *b) for a, b in pairs]
    whole, wanted, worst = losses(runs[0]), numbers(runs[0]), [0.0, 0.0, 0.0]
    assert {step for step, _ in whole} == set(range(22))
    for run in runs:
        # A checkpoint is saved before the validation of its step, which the resumed run makes.
        found, first = losses(run), {"loss": 11, "drift_loss": 11, "val_loss": 10, "report": 21}
        assert found.keys() == {(step, k) for step, k in whole
                                if "to" not in run.name or step >= first[k]}
        worst[0] = max(worst[0], *(abs(x - whole[k]) / whole[k] for k, x in found.items()))
        for i, (a, b) in enumerate(zip(numbers(run), wanted, strict=True), 1):
            worst[i] = max(worst[i], ((a - b).norm() / b.norm()).item())
    assert max(worst) < 1e-5, worst
    return len(runs), *worst


# ----------------------------------------------------------------------------- bytes

WORDS = [b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"NaN", b"-Infinity", b"1e999",
         b"9" * 5000, b"-1", b"0.5", b"null", b"true", b'"', b"'", b"{}", b"[]", b"[" * 9999,
         b'{"a":' * 9999, b"\n", b"\r", b"\n\n", b"\xe2\x80\xa8", b"../../../x", b"/x", b"~",
         b"a" * 9999, b"<EMB>", b"<|im_end|>", b"=", b"#", b"inf", b"1979-05-27"]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three of: bits flipped; bytes set, lost, doubled, exchanged, zeroed; an odd word put
    in or over what is there; the end lost; nothing left."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(data) + 1)
        n = min(len(data) - at, rng.choice([1, 1, 2, 8, 64, 1000]))
        kind = rng.randrange(10)
        if kind <= 1 and n:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and n:
            data[at] = rng.randrange(256)
        elif kind == 3:
            del data[at : at + n]
        elif kind == 4:
            data[at:at] = data[at : at + n]
        elif kind == 5:
            other = rng.randrange(len(data) + 1)
            data[at : at + n] = data[other : other + n]
        elif kind == 6:
            data[at : at + n] = bytes(n)
        elif kind == 7:
            data[at:at] = rng.choice(WORDS)
        elif kind == 8:
            word = rng.choice(WORDS)
            data[at : at + len(word)] = word
        else:
            del data[at if rng.random() < 0.9 else 0 :]
    return bytes(data)


@contextlib.contextmanager
def time_limit(seconds):
    def hang(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(*arguments):
    """Whether a command of elm went well, and what it said; else that is clear lines, code 2."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), time_limit(60):
        code = elm.main(list(map(str, arguments)))
    lines = [x for x in said.getvalue().splitlines() if re.match("elm: (?!warning)", x)]
    assert code in (0, 2) and bool(lines) == (code == 2), said.getvalue()
    assert "Traceback" not in said.getvalue() and all(len(x) < 1100 for x in lines), lines
    return code == 0, said.getvalue()


def read(reader):
    """What it returns; None if it refuses as `main` tells a user."""
    try:
        with time_limit(30):
            return reader()
    except (elm.UserError, OSError):
        return None


def tree(folder, without):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")
            if p.is_file() and without not in (p, *p.parents)}


def rows_are_right(split, path, prompt):
    """Every line of the file that is a row is there with its own tokens."""
    rows, examples = iter(split.rows), iter(split.examples(range(len(split.rows))))
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        row = json.loads(line) if line.strip() else {"task_type": "compare"}
        if row["task_type"] in elm.REMOVED_TASKS:
            continue
        r = next(rows)
        assert r["line"] == number and r["vector"] == row["embedding_file_idx"]
        assert elm.TASKS[r["task"]] == row["task_type"]
        ids = next(examples).ids.tolist()
        before, after, answer = prompt.ids([*prompt.parts(row["query"]), row["response"]])
        ids_of_row = prompt.head + before + [0] + after + prompt.tail + answer + prompt.end
        assert ids == ids_of_row[:256]
    assert next(rows, None) is None


def vectors_are_right(split, path):
    """The table is what its bytes say, read without the library."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    ((_, entry),) = header.items()
    a, b = entry["data_offsets"]
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    kind = kinds[entry["dtype"]]
    table = np.frombuffer(raw[8 + size + a : 8 + size + b], kind)
    if entry["dtype"] == "BF16":
        table = (table.astype(np.uint32) << 16).view(np.float32)
    table = table.reshape(entry["shape"]).astype(np.float64)
    assert np.array_equal(split.vectors.double().numpy(), table)
    used = table[sorted(set(split.rows["vector"].tolist()))]
    assert np.allclose(
        split.statistics["mean"], used.mean(0), rtol=1e-5, atol=1e-6 * abs(used).max()
    )


def damage(folder, count, seed):
    """`count` damaged files of seven kinds in turn; each is refused, or read as what it says. Every
    20th of a kind is also given to a command, which refuses it too, in lines that say why. Returns
    how many were read and refused."""
    rng, counts = random.Random(seed), collections.Counter()
    llm, data = make_llm(folder / "llm"), make_data(folder / "data", num_rows=14, num_vectors=5)
    run, out, toml, texts = (folder / n for n in ("run", "out", "mutated.toml", "texts.jsonl"))
    config = folder / "run.toml"
    config.write_text("")
    settings = [f"model.llm={llm}", "model.hidden_dim=8", "model.bf16=false",
                "data.max_seq_length=256", "train.batch_size=8", "train.grad_accum=1",
                "train.save_steps=1", "eval.samples=0", f"data.dir={data}"]
    assert command(config, *settings, f"output.dir={run}", "train.max_steps=2")[0]
    for name in ("checkpoint_final.pt", "eval.json"):
        (run / name).unlink()
    vectors, rows = elm.split_paths(elm.DataConfig(dir=str(data)), "train")
    toml.write_text((ROOT / "train.toml").read_text())
    texts.write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in read_jsonl(rows)))
    files = dict(rows=rows, vectors=vectors, toml=toml, texts=texts,
                 checkpoint=run / "checkpoint_step_2.pt", metrics=run / "metrics.jsonl",
                 adapter=run / "adapter_best.safetensors")
    originals = {kind: path.read_bytes() for kind, path in files.items()}
    prompt = elm.Prompt.from_tokenizer(AutoTokenizer.from_pretrained(llm))

    def open_train():
        cfg = elm.DataConfig(dir=str(data), max_seq_length=256)
        return elm.open_split(cfg, "train", prompt, 1, elm.Runtime())

    def checkpoint():
        saved = elm.load_checkpoint(files["checkpoint"])
        return saved | {"state": vars(saved["state"])}

    readers = dict(
        rows=open_train, vectors=open_train, checkpoint=checkpoint,
        toml=lambda: elm.load_config(str(toml)), texts=lambda: [*elm.read_texts(texts)],
        metrics=lambda: elm.read_metrics(files["metrics"]),
        adapter=lambda: elm.Adapter.load(files["adapter"]),
    )
    training = [config, *settings, f"output.dir={out}", "train.max_steps=2"]
    commands = dict(
        rows=training, vectors=training, toml=["filter", toml, out, f"data.dir={data}"],
        texts=["embed", texts, out, f"model={ROOT / 'data/tiny/embedder'}", "bf16=false"],
        checkpoint=[*training, "train.resume=auto"], metrics=[*training, "train.resume=auto"],
        adapter=["generate", f"adapter={files['adapter']}", f"embeddings={vectors}", "query=What?",
                 f"out={out}", "max_new_tokens=2"],
    )
    saved = readers["checkpoint"]()

    def check(kind, value):
        """What was read from a damaged file is what its bytes say, or what they said before."""
        raw = files[kind].read_bytes()
        if kind in ("rows", "vectors"):
            rows_are_right(value, rows, prompt)
            vectors_are_right(value, vectors)
        elif kind == "toml":
            tables = value.tables()
            for name, table in elm.tomllib.loads(raw.decode()).items():
                assert all(tables[name][k] == v for k, v in table.items())
        elif kind == "texts":
            assert value == [json.loads(x)["text"] for x in raw.removesuffix(b"\n").split(b"\n")]
        elif kind == "metrics":
            assert [json.loads(x) for x in raw.split(b"\n")[:-1]] == value
        elif kind == "checkpoint":
            assert same_tree(value, saved)
        else:  # without a checksum, some numbers may be others
            head = int.from_bytes(raw[:8], "little")
            assert value[1] == json.loads(json.loads(raw[8 : 8 + head])["__metadata__"]["elm"])
            state = {k: v.float() for k, v in load_file(files[kind]).items()}
            assert value[0].state_dict().keys() == state.keys()
            for key, tensor in value[0].state_dict().items():
                assert torch.allclose(tensor, state[key], 0, 0, equal_nan=True)

    for number in range(count):
        kind = list(files)[number % len(files)]
        original = originals[kind]
        head = 8 + int.from_bytes(original[:8], "little")  # of a safetensors file: it is small
        if kind not in ("vectors", "adapter") or rng.random() < 0.4:
            head = len(original)
        damaged = mutate(original[:head], rng) + original[head:]
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        files[kind].write_bytes(damaged)
        before = tree(folder, out)
        try:
            value = read(readers[kind])
            if value is not None:
                check(kind, value)
            if number // len(files) % 20 == 0:
                if "train.resume=auto" in commands[kind]:
                    shutil.copytree(run, out)
                well, said = command(*commands[kind])
                if kind == "checkpoint":  # the one before it is there
                    assert well and ("passed over" in said) == (value is None), said
                    again = elm.load_checkpoint(out / "checkpoint_final.pt")["adapter"]
                    assert same_tree(again, saved["adapter"])
                elif kind == "adapter":  # one that can be read may still be one of another LLM
                    assert value is not None or not well, said
                else:
                    assert well == (value is not None), said
                counts[kind, "given to a command"] += 1
            assert tree(folder, out) == before, "something was written elsewhere"
        except BaseException:
            kept = Path(tempfile.gettempdir()) / f"damaged_{kind}_{seed}_{number}"
            kept.write_bytes(damaged)
            print(f"case {number} of seed {seed}, {kind}, kept as {kept}", file=sys.stderr)
            raise
        finally:
            files[kind].write_bytes(original)
        counts[kind, "refused" if value is None else "read"] += 1
    return counts


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("form", choices=["kills", "stages", "bytes", "jobs"])
    p.add_argument("jobs", nargs="?", help=argparse.SUPPRESS)
    p.add_argument("--count", type=int)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--local_rank", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.form == "jobs":  # of `stages`, under the launcher
        for job in json.loads(Path(a.jobs).read_text()):
            elm.train(elm.load_config(None, job))
        print(end="", flush=True)
        os._exit(0)
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if a.form == "kills":
            runs, counts, over = kills(DEFAULT, folder, a.count or 50, a.seed)
            print(f"{counts.total()} kills over {runs} runs, each the same as one never killed; "
                  f"{over} damaged checkpoints passed over")
            for (moment, kind), n in sorted(counts.items()):
                print(f"  {moment:10} {kind:8} {n}")
        elif a.form == "stages":
            settings = small_settings(folder)
            n, loss, adapter, moments = stages(settings, folder)
            print(f"{n} runs of 1 and 2 processes at ZeRO 0 and 3: losses within {loss:.1e}, "
                  f"adapters {adapter:.1e}, moments {moments:.1e}")
        else:
            counts = damage(folder, a.count or 2000, a.seed)
            print(f"{a.count or 2000} damaged files, each refused or read as what it says")
            for (kind, end), n in sorted(counts.items()):
                print(f"  {kind:10} {end:18} {n}")
    print(f"{time.time() - begin:.0f} s")


def small_settings(folder):
    """Of runs of steps of 80 rows, several micro-batches each, with drift."""
    return [f"model.llm={make_llm(folder / 'llm')}", "model.hidden_dim=24", "model.bf16=false",
            f"data.dir={make_data(folder / 'data', num_rows=90)}", "data.max_seq_length=256",
            "data.num_workers=1", "train.grad_accum=1", "train.lr=1e-2", "train.warmup_steps=2",
            "loss.drift_weight=0.1",
            f"eval.bertscore_model={ROOT / 'data/tiny/scorer'}"]


if __name__ == "__main__":
    main()
