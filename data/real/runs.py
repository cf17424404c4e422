"""Train the runs of README.md, and print its table.

    python data/real/runs.py                  all that data/real/runs/ lacks
    python data/real/runs.py smollm2-100      those whose names begin so
    python data/real/runs.py table
    python data/real/runs.py release         the adapters of two runs, as MODEL_CARD.md has them
    python data/real/runs.py picture         report.png, of the first of these two

A run is data/real/train.toml with some settings in place of its own. It trains in runs/real/NAME,
where it goes on if it was stopped; of a finished one config.toml, metrics.jsonl and eval.json are
copied into data/real/runs/NAME. Models are those of data/real/models/, else of the hub.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import elm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KEPT = ("config.toml", "metrics.jsonl", "eval.json")

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
QWEN = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"

NUM_FEW_TEXTS = 500
FEW_TEXTS = ROOT / "runs" / "real" / f"{NUM_FEW_TEXTS}-texts"
FEW_TEXTS_SETTING = f"data.dir={FEW_TEXTS.relative_to(ROOT)}"

# One setting at a time from the recipe, which is train.toml.
RUNS = {
    "qwen-0": (QWEN, ["train.max_steps=0"]),
    "qwen-0-seed-43": (QWEN, ["train.max_steps=0", "train.seed=43"]),
    "qwen-100": (QWEN, []),
    "qwen-100-seed-43": (QWEN, ["train.seed=43"]),
    "qwen-100-no-start": (QWEN, ["train.warm_start=false"]),
    "qwen-400": (QWEN, ["train.max_steps=400"]),
    "qwen-400-seed-43": (QWEN, ["train.max_steps=400", "train.seed=43"]),
    "smollm2-0": (SMOLLM2, ["train.max_steps=0"]),
    "smollm2-100": (SMOLLM2, []),
    "smollm2-400": (SMOLLM2, ["train.max_steps=400"]),
    "smollm2-100-no-start": (SMOLLM2, ["train.warm_start=false"]),
    "smollm2-100-1-token": (SMOLLM2, ["model.tokens=1"]),
    "smollm2-100-8-tokens": (SMOLLM2, ["model.tokens=8"]),
    "smollm2-100-lr-3e-4": (SMOLLM2, ["train.lr=3e-4"]),
    "smollm2-100-lr-3e-3": (SMOLLM2, ["train.lr=3e-3"]),
    "smollm2-100-500-texts": (SMOLLM2, [FEW_TEXTS_SETTING]),
}


def find_model(hub_name: str) -> str:
    """The folder in data/real/models, if it is there."""
    folder = HERE / "models" / hub_name.rpartition("/")[2]
    return str(folder.relative_to(ROOT)) if folder.exists() else hub_name


def write_few_texts() -> None:
    """The data set with the rows of fewer training texts, drawn at random."""
    if FEW_TEXTS.exists():
        return
    new = FEW_TEXTS.with_suffix(".new")  # whole or not at all
    shutil.rmtree(new, ignore_errors=True)
    for folder in ("embeddings", "synthesis"):
        shutil.copytree(HERE / folder, new / folder)
    path = new / "synthesis" / "train_synthesis.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    vector_ids = [json.loads(line)["embedding_file_idx"] for line in lines]
    chosen = set(random.Random(42).sample(sorted(set(vector_ids)), NUM_FEW_TEXTS))
    kept = [line for line, vector_id in zip(lines, vector_ids, strict=True) if vector_id in chosen]
    path.write_text("".join(kept), "utf-8")
    new.rename(FEW_TEXTS)


def train(name: str) -> None:
    llm, settings = RUNS[name]
    if FEW_TEXTS_SETTING in settings:
        write_few_texts()
    embedder = find_model(EMBEDDER)
    folder = Path("runs", "real", name)
    words = [
        sys.executable, "elm.py", "data/real/train.toml", f"model.llm={find_model(llm)}",
        f"data.embedder={embedder}", f"eval.bertscore_model={embedder}", *settings,
        f"output.dir={folder}", "train.resume=auto"]
    done = subprocess.run(words, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    kept = HERE / "runs" / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(ROOT / folder / file, kept / file)


COLUMNS = {
    "loss_shuffled": "shuffled", "loss_nearest": "nearest text", "loss": "vector",
    "loss_text": "text", "gap_closed": "gap closed", "mrr": "MRR", "consistency": "consistency",
    "bertscore_f1": "BERTScore F1", "bertscore_f1_nearest": "of the nearest"}


def table() -> str:
    """The figures of the finished runs, as markdown."""
    lines = ["| run | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in RUNS:
        path = HERE / "runs" / name / "eval.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text("utf-8"))
        cells = [name]
        for key in COLUMNS:
            if key not in result:
                cells.append("")
                continue
            cell = f"{result[key]:.3f}"
            if key == "gap_closed":
                low, high = result["intervals"][key]
                cell += f" ± {(high - low) / 2:.3f}"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The files of MODEL_CARD.md, and the runs that left their adapters.
RELEASED = {
    "qwen2.5-coder-0.5b.safetensors": "qwen-400-seed-43",
    "smollm2-135m.safetensors": "smollm2-400"}
FIGURES = ("split", "adapter_step", "rows", "sources", "loss_shuffled", "loss_nearest", "loss",
           "loss_text", "gap_closed", "mrr", "bertscore_f1", "intervals")


def release(file: str, name: str) -> None:
    """Write a run's best adapter in bf16, with the hub's names of its models and the figures of the
    run's report, which is of the adapter in fp32."""
    llm, _ = RUNS[name]
    report = json.loads((HERE / "runs" / name / "eval.json").read_text("utf-8"))
    model = elm.ELM.load(ROOT / "runs" / "real" / name, llm=find_model(llm))
    model.llm.name_or_path = llm
    model.origin = model.origin.model_copy(update={"model": EMBEDDER})
    figures = {key: report[key] for key in FIGURES}
    model.save(HERE / file, dtype=torch.bfloat16, run=name, figures=figures)


def draw_report(name: str) -> None:
    """report.png as the run has left it."""
    folder = HERE / "runs" / name
    report = json.loads((folder / "eval.json").read_text("utf-8"))
    elm.plot_report(HERE / "report.png", elm.read_metrics(folder / "metrics.jsonl"), name, report)


def main() -> None:
    prefixes = tuple(sys.argv[1:]) or ("",)
    if prefixes == ("table",):
        print(table())
        return
    if prefixes == ("release",):
        for file, name in RELEASED.items():
            release(file, name)
        return
    if prefixes == ("picture",):
        draw_report(next(iter(RELEASED.values())))
        return
    names = [name for name in RUNS if name.startswith(prefixes)]
    if not names:
        sys.exit(f"no run's name begins with {' or '.join(prefixes)}; there are: {', '.join(RUNS)}")
    for name in names:
        if (HERE / "runs" / name / "eval.json").exists():
            continue
        train(name)


if __name__ == "__main__":
    main()
