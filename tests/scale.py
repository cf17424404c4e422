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
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from conftest import make_llm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import elm

WIDTH = 2560


def write(folder: Path, num_rows: int, num_vectors: int) -> None:
    rng = np.random.default_rng(0)
    words = np.array((ROOT / "README.md").read_text().split())
    for sub in ("embeddings", "synthesis"):
        (folder / sub).mkdir(parents=True)
    for split, rows, vectors in (("train", num_rows, num_vectors), ("val", 64, 64)):
        sizes = [min(8192, vectors - start) for start in range(0, vectors, 8192)]
        chunks = (torch.randn(n, WIDTH).half() for n in sizes)
        table, path = elm.split_paths(elm.DataConfig(dir=str(folder)), split)
        elm.write_table(table, chunks)
        with open(path, "w") as f:
            for i in range(rows):
                row = dict(task_type="summary", embedding_file_idx=i % vectors,
                           query="Summarize the text.", response=" ".join(rng.choice(words, 12)),
                           text=" ".join(rng.choice(words, 16)))  # fmt: skip
                f.write(json.dumps(row) + "\n")


def start(data: Path, out: Path, step: int, *settings: str) -> tuple[float, float]:
    """(seconds to the end of `step`, the first after a start or resume; peak GiB of anonymous
    memory)."""
    command = [sys.executable, ROOT / "elm.py", ROOT / "train.toml", f"data.dir={data}",
               f"output.dir={out}", f"train.max_steps={step}", "train.logging_steps=1",
               "train.resume=auto", "train.warm_start=false", "eval.samples=0", "eval.split=val",
               "data.max_seq_length=512", *settings]  # fmt: skip
    begin, peak, first = time.time(), 0, None
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT)
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "RssAnon" in status:
                peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
            metrics = out / "metrics.jsonl"
            logged = metrics.exists() and metrics.read_text().count('"loss"')
            if first is None and logged == step:
                first = time.time() - begin
            time.sleep(0.02)
    assert process.returncode == 0, out.with_suffix(".log").read_text()[-2000:]
    return first, peak / 2**20


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rows", type=int, default=1_000_000)
    p.add_argument("--vectors", type=int, default=500_000)
    p.add_argument("--warm-start", action="store_true")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if a.warm_start:
            write(folder / "wide", 32_768, 32_768)
            llm = make_llm(folder / "llm", hidden_size=2560, num_hidden_layers=1)
            for warm in ("false", "true"):
                settings = f"model.llm={llm}", "model.hidden_dim=4096", f"train.warm_start={warm}"
                seconds, gib = start(folder / "wide", folder / f"wide {warm}", 1, *settings)
                print(f"warm start {warm}: {seconds:.1f} s to the end of step 1, {gib:.2f} GiB "
                      "anonymous", flush=True)  # fmt: skip
            return
        write(folder / "large", a.rows, a.vectors)
        write(folder / "small", 1000, 1000)
        for data in ("large", "small"):
            for step, how in ((1, "started"), (2, "resumed")):
                seconds, gib = start(folder / data, folder / f"{data} run", step)
                print(f"{data}, {how}: {seconds:.1f} s to the end of step {step}, "
                      f"{gib:.2f} GiB anonymous", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
