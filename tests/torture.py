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
import faulthandler
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


def until(process, seen, seconds=600):
    """Waits, looking every millisecond, until seen() or the process has ended."""
    end = time.time() + seconds
    while process.poll() is None and not seen():
        assert time.time() < end, "nothing happens any more"
        time.sleep(0.001)


def wait_for_moment(moment, process, folder, rng, eval_steps):
    metrics = folder / "metrics.jsonl"

    def logged(since):
        return metrics.exists() and metrics.stat().st_mtime > since

    def evaluates():  # the last line is of a step that is evaluated, and its val_loss is not there
        entry = ([{}] + elm.read_metrics(metrics))[-1]
        return "loss" in entry and entry["step"] % eval_steps == 0

    def still_for(seconds):
        end = time.time() + rng.uniform(0, seconds)
        until(process, lambda: time.time() > end)

    if moment == "start":
        still_for(6)
        return
    begin = time.time()
    until(process, lambda: logged(begin))
    if moment != "report":
        still_for(3)
    now = time.time()
    seen, seconds = {
        "steps": (lambda: True, 0),
        "write": (lambda: any(folder.glob(".*.tmp")), 0),
        "log": (lambda: logged(now), 0),
        "evaluation": (evaluates, 0.3),
        "report": ((folder / "checkpoint_final.pt").exists, 2),
    }[moment]
    until(process, seen)
    still_for(seconds)


def same_tree(a, b):
    """Whether nested containers are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b or a != a


def check_same(one, two):
    """Two runs left the same: adapters, answers and report to the byte, and all steps once."""
    logged = [[{k: v for k, v in m.items() if k not in CLOCKED}
               for m in read_jsonl(folder / "metrics.jsonl")] for folder in (one, two)]
    assert logged[0] == logged[1], (one, two)
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


def stages(folder, everything=True, size=80):
    """20 steps of several micro-batches each, with drift, by one and two processes at ZeRO 0 and 3,
    and from the checkpoint of step 10 of each on at each (or, not everything, at one other).
    Returns the number of runs, and the largest relative deviations: of a loss, of the adapter, of
    Adam's moments."""
    llm, data = make_llm(folder / "llm"), make_data(folder / "data", num_rows=90)
    settings = [*make_settings(llm, data, folder), "loss.drift_weight=0.1", "train.max_steps=20",
                "train.save_steps=10", "train.eval_steps=10", "eval.samples=0"]
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
    """One to three of: a bit flipped; bytes lost, zeroed, doubled or exchanged; an odd word put in
    or over what is there; the end lost, now and then all of it."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at, other = (rng.randrange(len(data) + 1) for _ in range(2))
        at *= rng.random() < 0.97
        n, word = rng.choice([1, 1, 2, 8, 64, 1000]), rng.choice(WORDS)
        part = data[at : at + n]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in part[:1])
        lost, put = rng.choice([
            (1, flipped), (1, flipped), (n, b""), (n, bytes(len(part))), (0, part),
            (n, data[other : other + n]), (0, word), (len(word), word), (len(data), b"")])
        data = data[:at] + put + data[at + lost :]
    return data


def tree(folder, without):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")
            if p.is_file() and without not in (p, *p.parents)}


def split_is_right(split, raw):
    """Every line of the file that is a row is there; the vectors are those of the table."""
    lines = [(n, json.loads(x)) for n, x in enumerate(raw.split(b"\n"), 1) if x.strip()]
    lines = [(n, row) for n, row in lines if row["task_type"] not in ("compare", "hypothetical")]
    read = split.read(range(len(split.rows)))
    for (number, row), r, found in zip(lines, split.rows, read, strict=True):
        assert r["line"] == number and r["vector"] == row["embedding_file_idx"]
        assert found.model_dump().items() >= row.items()
        assert elm.TASKS[r["task"]] == row["task_type"]
    (table,) = load_file(vectors_path(split.path.parents[1])).values()
    assert same_tree(split.vectors, table)


def damage(folder, count, seed):
    """`count` damaged files of seven kinds in turn; each is refused, or read as what it says. Every
    20th of a kind is also given to a command, which refuses it too, in lines that say why. Returns
    how many were read and refused."""
    rng, counts = random.Random(seed), collections.Counter()
    llm, data = make_llm(folder / "llm"), make_data(folder / "data", num_rows=14, num_vectors=5)
    run, out, toml, texts = (folder / n for n in ("run", "o.safetensors", "a.toml", "texts.jsonl"))
    settings = [*make_settings(llm, data, out), "train.save_steps=1", "eval.samples=0",
                "train.max_steps=2"]
    assert command(NO_TABLES, *settings, f"output.dir={run}")[0] == 0
    for name in ("checkpoint_final.pt", "eval.json"):
        (run / name).unlink()
    rows, vectors = rows_path(data), vectors_path(data)
    toml.write_text((ROOT / "train.toml").read_text())
    texts.write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in read_jsonl(rows)))
    checkpoint, metrics = run / "checkpoint_step_2.pt", run / "metrics.jsonl"
    adapter = run / "adapter_best.safetensors"
    prompt = elm.Prompt(AutoTokenizer.from_pretrained(llm))
    saved = torch.load(checkpoint, weights_only=True)

    # What was read from a damaged file is what its bytes say, or what they said before.

    def check_toml(cfg, raw):
        tables = cfg.tables()
        for name, table in elm.tomllib.loads(raw.decode("utf-8-sig")).items():
            assert tables[name].items() >= table.items()

    def check_texts(lines, raw):
        assert [s.text for s in lines] == [json.loads(x)["text"] for x in raw.split(b"\n") if x]

    def check_metrics(entries, raw):
        assert entries == [json.loads(x) for x in raw.split(b"\n")[:-1]]

    def check_checkpoint(found, _):
        assert same_tree(found | {"state": vars(found["state"])}, saved)

    def check_adapter(found, raw):  # without a checksum, some numbers may be others
        head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        assert found[1] == json.loads(head["__metadata__"]["elm"])
        state = {k: v.float().nan_to_num() for k, v in load_file(adapter).items()}
        assert same_tree({k: v.nan_to_num() for k, v in found[0].state_dict().items()}, state)

    def reader():
        return open_train(data, prompt)

    training = [NO_TABLES, *settings]
    resuming = [*training, "train.resume=auto"]
    embedding = ["embed", texts, out, f"model={ROOT / 'data/tiny/embedder'}", "bf16=false"]
    generating = ["generate", f"adapter={adapter}", f"embeddings={vectors}", "query=What?",
                  "max_new_tokens=2"]
    kinds = {  # the file, its reader, what checks it, a command
        "rows": (rows, reader, split_is_right, training),
        "vectors": (vectors, reader, split_is_right, training),
        "toml": (toml, lambda: elm.load_config(str(toml)), check_toml,
                 ["filter", toml, out, f"data.dir={data}"]),
        "texts": (texts, lambda: [*elm.read_texts(texts)], check_texts, embedding),
        "checkpoint": (checkpoint, lambda: elm.load_checkpoint(checkpoint), check_checkpoint,
                       resuming),
        "metrics": (metrics, lambda: elm.read_metrics(metrics), check_metrics, resuming),
        "adapter": (adapter, lambda: elm.Adapter.load(adapter), check_adapter, generating),
    }
    originals = {kind: path.read_bytes() for kind, (path, *_) in kinds.items()}
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        path, reader, check, words = kinds[kind]
        original = originals[kind]
        head = 8 + int.from_bytes(original[:8], "little")  # of a safetensors file: it is small
        if kind not in ("vectors", "adapter") or rng.random() < 0.4:
            head = len(original)
        damaged = mutate(original[:head], rng) + original[head:]
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        path.write_bytes(damaged)
        before = tree(folder, out)
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)  # where it hangs
        try:
            value = None
            with contextlib.suppress(elm.UserError, OSError):
                value = reader()
            if value is not None:
                check(value, damaged if kind != "vectors" else originals["rows"])
            if number // len(kinds) % 20 == 0:
                if words is resuming:
                    shutil.copytree(run, out)
                code, said = command(*words)
                lines = [x for x in said.splitlines() if re.match("elm: (?!warning)", x)]
                assert code == 2 * bool(lines) and all(len(x) < 1100 for x in lines), said
                if kind == "checkpoint":  # the one before it is there
                    assert code == 0 and ("passed over" in said) == (value is None), said
                    again = elm.load_checkpoint(out / "checkpoint_final.pt")["adapter"]
                    assert same_tree(again, saved["adapter"])
                elif kind == "adapter":  # one that can be read may still be one of another LLM
                    assert value is not None or code, said
                else:
                    assert (code == 0) == (value is not None), said
                counts[kind, "given to a command"] += 1
            assert tree(folder, out) == before, "something was written elsewhere"
        except BaseException:
            kept = Path(tempfile.gettempdir()) / f"damaged_{kind}_{seed}_{number}"
            kept.write_bytes(damaged)
            print(f"case {number} of seed {seed}, {kind}, kept as {kept}", file=sys.stderr)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            path.write_bytes(original)
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
            n, loss, adapter, moments = stages(folder)
            print(f"{n} runs of 1 and 2 processes at ZeRO 0 and 3: losses within {loss:.1e}, "
                  f"adapters {adapter:.1e}, moments {moments:.1e}")
        else:
            counts = damage(folder, a.count or 2000, a.seed)
            print(f"{a.count or 2000} damaged files, each refused or read as what it says")
            for (kind, end), n in sorted(counts.items()):
                print(f"  {kind:10} {end:18} {n}")
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
