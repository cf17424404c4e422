"""How a run starts and resumes on a large data set: seconds to the end of a step, and its memory.

    python tests/scale.py [--rows 1000000] [--vectors 500000]
    python tests/scale.py --warm-start

Writes random fp16 vectors of width 2560 and short rows into a temporary folder, starts elm on the
embedded default's LLM, resumes it in the middle of the epoch, does the same on 1,000 rows, and
prints for each the seconds from the start of the process to the end of its first step, and the peak
of its anonymous memory (RssAnon), which the memory-mapped files are not part of. About 4 GB of
disk. Or, the same of an adapter of Qwen3-4B's size (2560 to 4096 to 2560, an LLM of one layer),
without and with the warm start on 32,768 vectors.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, make_llm, rows_path, vectors_path
from prepare import write_table

import elm

WIDTH = 2560
CHUNK = 8192  # vectors in memory at a time


def write_data(folder: Path, num_rows: int, num_vectors: int) -> None:
    """A data set whose training split has these sizes."""
    for split, rows, vectors in (("train", num_rows, num_vectors), ("val", 64, 64)):
        write_table(vectors_path(folder, split), random_vectors(vectors))
        path = rows_path(folder, split)
        path.parent.mkdir(exist_ok=True)
        with open(path, "w") as f:
            for row in random_rows(rows, vectors):
                f.write(elm.jsonl([row]))


def random_vectors(num_vectors: int) -> Iterator[torch.Tensor]:
    for start in range(0, num_vectors, CHUNK):
        yield torch.randn(min(CHUNK, num_vectors - start), WIDTH).half()


def random_rows(num_rows: int, num_vectors: int) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    words = np.array((ROOT / "README.md").read_text().split())
    for i in range(num_rows):
        yield {
            "task_type": "summary",
            "embedding_file_idx": i % num_vectors,
            "query": "Summarize the text.",
            "response": " ".join(rng.choice(words, 12)),
            "text": " ".join(rng.choice(words, 16))}


def run_to_step(data: Path, out: Path, step: int, *settings: str) -> tuple[float, float]:
    """(seconds to the end of `step`, the first after a start or resume; peak GiB of anonymous
    memory)."""
    command = [
        sys.executable, ROOT / "elm.py", ROOT / "train.toml", f"data.dir={data}",
        f"output.dir={out}", f"train.max_steps={step}", "train.logging_steps=1",
        "train.resume=auto", "train.warm_start=false", "eval.samples=0", "eval.split=val",
        "data.max_seq_length=512", *settings]
    log_path = out.with_suffix(".log")
    start_time = time.time()
    peak_kib = 0
    seconds = None
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=log, stderr=log, cwd=ROOT)
        while process.poll() is None:
            peak_kib = max(peak_kib, anonymous_kib(process.pid))
            if seconds is None and num_logged_steps(out / "metrics.jsonl") == step:
                seconds = time.time() - start_time
            time.sleep(0.02)
    assert process.returncode == 0, log_path.read_text()[-2000:]
    return seconds, peak_kib / 2**20


def anonymous_kib(pid: int) -> int:
    """0 of a process that has just ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    if "RssAnon:" not in status:
        return 0
    return int(status.split("RssAnon:")[1].split()[0])


def num_logged_steps(metrics: Path) -> int:
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def measure_warm_start(folder: Path) -> None:
    data = folder / "wide"
    write_data(data, 32_768, 32_768)
    llm = make_llm(folder / "llm", hidden_size=WIDTH, num_hidden_layers=1)
    for warm_start in ("false", "true"):
        seconds, gib = run_to_step(
            data, folder / f"run {warm_start}", 1, f"model.llm={llm}", "model.hidden_dim=4096",
            f"train.warm_start={warm_start}")
        print(f"warm start {warm_start}: {seconds:.1f} s to the end of step 1, {gib:.2f} GiB "
              "anonymous", flush=True)


def measure_start_and_resume(folder: Path, num_rows: int, num_vectors: int) -> None:
    write_data(folder / "large", num_rows, num_vectors)
    write_data(folder / "small", 1000, 1000)
    for name in ("large", "small"):
        for step, how in ((1, "started"), (2, "resumed")):
            seconds, gib = run_to_step(folder / name, folder / f"{name} run", step)
            print(f"{name}, {how}: {seconds:.1f} s to the end of step {step}, {gib:.2f} GiB "
                  "anonymous", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--vectors", type=int, default=500_000)
    parser.add_argument("--warm-start", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.warm_start:
            measure_warm_start(Path(folder))
        else:
            measure_start_and_resume(Path(folder), args.rows, args.vectors)


if __name__ == "__main__":
    main()
