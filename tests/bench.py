"""Speed and memory of elm beside the naive loop and HF Trainer: one process, the same rows.

    python tests/bench.py                            a CPU, one thread, Qwen3, 4B's proportions
    python tests/bench.py --vocab 151936 --rows 8    the memory of a real vocabulary
    python tests/bench.py --shape qwen3-4b           a GPU, Qwen3-4B with random weights

Every contestant takes one optimizer step over the same rows per round, in turn; the medians of the
rounds are compared. Time is that of the process's CPU, or of CUDA events. elm is its own loop:
prepare_step, soft_gradient, AdamW on the adapter. The naive loop is tests/naive.py (batches
padded to the longest, checkpointing on, all logits); HF Trainer has its defaults (no checkpointing)
and the LLM frozen; both take batches of --batch rows in the order of the data. Peak memory is what
a step needs beyond the loaded model, at most over the rounds. padding_efficiency is the share of
the padded batches' tokens that are not padding, loss_error the relative difference of elm's first
loss from the naive loop's, "of 4N" (on a GPU) the share of peak_tflops / (4 * parameters) tokens a
second.
Needs accelerate: pip install ".[bench]".
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from naive import elm_step, naive_batch, naive_step, token_rows
from torch.utils.benchmark import Timer
from torch.utils.data import SequentialSampler
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import elm

SHAPES = {
    # The 4B's ratios (query width 1.5 h, 4 heads to a key head, MLP 3.8 h, head 9.7 % of the matrix
    # weights) at h = 256 and 6 layers, in fp32.
    "cpu": dict(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=3,
        head_dim=32, intermediate_size=973, vocab_size=2528,
    ),
    "qwen3-4b": dict(
        hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=9728, vocab_size=151_936,
    ),
}  # fmt: skip


class MadeSplit:
    """Random rows as an opened split has them."""

    num_soft = 1

    def __init__(self, made, width, seed):
        self.made, self.rows = made, np.zeros(len(made), elm.ROW)
        self.rows["vector"] = np.arange(len(made))
        generator = torch.Generator().manual_seed(seed)
        self.vectors = torch.randn(len(made), width, generator=generator)

    def examples(self, rows):
        return [self.made[i] for i in rows]

    def embeddings(self, vector_ids):
        return self.vectors[torch.from_numpy(vector_ids.astype(np.int64))]


def make_split(num_rows: int, vocab: int, width: int, seed: int) -> MadeSplit:
    """Random rows: responses log-normal with median 80 and sigma 0.8, at most 512 tokens; prompts
    of 10 to 40 tokens, the vector after the first 3, as in Qwen's chat template."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, vocab, 3)
    made = []
    for _ in range(num_rows):
        rest = rng.integers(10, 41) - len(shared)
        response = int(min(512, max(1, rng.lognormal(np.log(80), 0.8))))
        own = rng.integers(0, vocab, rest + response)
        own[0] = -1  # the soft token's place
        made.append(elm.Example(np.r_[shared, own], response, False))
    return MadeSplit(made, width, seed)


class TrainerModel(torch.nn.Module):
    """What a user of HF Trainer writes: splice the vectors in, let the LLM make the loss."""

    def __init__(self, llm, adapter):
        super().__init__()
        self.llm, self.adapter = llm, adapter

    def forward(self, batch, mask, labels, vectors):
        embeds = self.llm.get_input_embeddings()(batch.clamp(min=0))
        soft = self.adapter(vectors).to(embeds.dtype)
        embeds = embeds.masked_scatter((batch == -1)[..., None], soft)
        out = self.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)
        return {"loss": out.loss}


class InOrder(Trainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    """Leaves the making of the Trainer out of its time."""

    def __init__(self, meter):
        self.meter = meter

    def on_train_begin(self, *_, **__):
        self.meter.begin()

    def on_train_end(self, *_, **__):
        self.meter.end()


class Meter:
    """Seconds (of the CPU, or of CUDA events) and peak bytes between begin and end."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.seconds, self.peak = [], []

    def begin(self):
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
            self.base = self.status("VmRSS")
            self.start = time.process_time()

    def end(self):
        if self.cuda:
            self.events[1].record()
            torch.cuda.synchronize()
            self.seconds.append(self.events[0].elapsed_time(self.events[1]) / 1000)
            self.peak.append(torch.cuda.max_memory_allocated() - self.base)
        else:
            self.seconds.append(time.process_time() - self.start)
            self.peak.append(self.status("VmHWM") - self.base)

    @staticmethod
    def status(key):
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def peak_tflops(device, dtype) -> float:
    """Measured rate of a large matrix product."""
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / Timer("a @ b", globals=dict(a=a, b=b)).timeit(20).mean / 1e12


def contestants(llm, first, split, rows, batch_size, budget, recomputed):
    """{name: step(meter)}, each with its own copy of an adapter and AdamW, over the same rows."""
    rt = elm.Runtime(0, 1, llm.device)
    ours, naive, trainers = (copy.deepcopy(first).to(llm.device) for _ in range(3))
    model = elm.ELM(llm, ours).train()
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-4, fused=True)
    examples = token_rows(split, rows)
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    adam = torch.optim.AdamW(naive.parameters(), lr=1e-4)

    def run_elm(meter):
        elm.recompute_layers(llm, recomputed)
        meter.begin()
        loss = elm_step(model, split, rows, budget, rt)[0]
        torch.nn.utils.clip_grad_norm_(model.adapter.parameters(), 1.0)
        optimizer.step()
        meter.end()
        for m in llm.modules():  # the others share it
            m.__dict__.pop("forward", None)
        return loss

    def run_naive(meter):
        # Checkpointing works in train mode only, which elm denies this LLM; Qwen3 has no dropout.
        torch.nn.Module.train(llm, True)
        meter.begin()
        loss = naive_step(llm, naive, batches)[0]
        torch.nn.utils.clip_grad_norm_(naive.parameters(), 1.0)
        adam.step()
        meter.end()
        llm.gradient_checkpointing_disable()
        torch.nn.Module.train(llm, False)
        return loss

    def collate(examples):
        batch, mask, labels = naive_batch(examples)
        vectors = torch.stack([v for _, _, v in examples]).float()
        return dict(batch=batch, mask=mask, labels=labels, vectors=vectors)

    def run_trainer(meter):
        os.environ.pop("LOCAL_RANK", None)  # with it, the Trainer would wrap the model in DDP
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=batch_size, max_steps=1, report_to="none",
                gradient_accumulation_steps=len(batches), remove_unused_columns=False,
                save_strategy="no", use_cpu=llm.device.type == "cpu", disable_tqdm=True,
                logging_strategy="no")  # fmt: skip
            data = dict(data_collator=collate, train_dataset=examples)
            trainer = InOrder(TrainerModel(llm, trainers), arguments, **data)
            trainer.add_callback(Clock(meter))
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    return {"elm": run_elm, "naive loop": run_naive, "HF Trainer": run_trainer}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("--shape", choices=SHAPES, default="cpu")
    p.add_argument("--layers", type=int, help="in place of the shape's")
    p.add_argument("--vocab", type=int, help="in place of the shape's")
    p.add_argument("--rows", type=int, default=32, help="of an optimizer step")
    p.add_argument("--batch", type=int, default=8, help="rows of a padded batch")
    p.add_argument("--budget", type=int, help="tokens of one of elm's micro-batches")
    p.add_argument("--checkpoint", action="store_const", const=True, default="auto",
                   help="elm recomputes every layer")  # fmt: skip
    p.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    p.add_argument("--seed", type=int, default=0, help="of the data")
    p.add_argument("--peak-tflops", type=float, help="of the GPU; measured if not given")
    p.add_argument("--json", type=Path, help="write the results there")
    a = p.parse_args()
    if min(a.rows, a.batch, a.rounds, a.layers or 1, a.vocab or 1000) < 1:
        p.error("rows, batch, rounds, layers and vocab must be at least 1")
    if a.shape == "qwen3-4b" and not torch.cuda.is_available():
        p.error("--shape qwen3-4b needs a GPU")
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()

    shape = SHAPES[a.shape]
    shape |= {"num_hidden_layers": a.layers or shape["num_hidden_layers"]}
    shape |= {"vocab_size": a.vocab or shape["vocab_size"]}
    width = shape["hidden_size"]
    bf16 = a.shape != "cpu"
    rt = elm.start_runtime(elm.load_config(None, [f"model.bf16={str(bf16).lower()}"]))
    torch.manual_seed(0)
    with torch.device(rt.device):
        config = Qwen3Config(**shape, tie_word_embeddings=True)
        llm = Qwen3ForCausalLM(config).to(torch.bfloat16 if bf16 else torch.float32).eval()
    llm.requires_grad_(False)
    split = make_split(a.rows, shape["vocab_size"], width, a.seed)
    like = dict(mean=torch.zeros(width), norms=torch.ones(3))
    first = elm.fresh_adapter(llm, like, False, hidden_dim=4096 * width // 2560)
    rows = np.arange(a.rows)
    lengths = np.array([len(example.ids) for example in split.made])
    batches = [lengths[i : i + a.batch] for i in range(0, a.rows, a.batch)]
    padded = sum(len(batch) * batch.max() for batch in batches)
    efficiency, tokens = lengths.sum() / padded, int(lengths.sum())
    budget = a.budget or elm.MICRO_TOKENS[rt.device.type]
    recomputed = shape["num_hidden_layers"] * (a.checkpoint is True)
    steps = contestants(llm, first, split, rows, a.batch, budget, recomputed)
    meters = {name: Meter(rt.device) for name in steps}
    losses = {}
    for k in range(a.rounds + 1):  # the first one warms up
        for name, step in steps.items():
            loss = step(meters[name])
            losses.setdefault(name, loss)
            told = f"round {k} of {a.rounds}: {name} {meters[name].seconds[-1]:.2f} s"
            print(told, file=sys.stderr)
    error = abs(losses["elm"] - losses["naive loop"]) / losses["naive loop"]

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    result = dict(
        command="python " + " ".join(["tests/bench.py", *sys.argv[1:]]),
        commit=subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        machine=torch.cuda.get_device_name() if bf16 and rt.device.type == "cuda" else cpu_name(),
        torch=torch.__version__, transformers=transformers.__version__, rows=a.rows,
        tokens=tokens, padding_efficiency=round(float(efficiency), 3), loss_error=error,
    )  # fmt: skip
    for key, value in result.items():
        print(f"{key:20}{value}")
    params = sum(p.numel() for p in llm.parameters())  # tied: the head's weights count once
    peak = 0.0
    if rt.device.type == "cuda":
        peak = a.peak_tflops or peak_tflops(rt.device, llm.dtype)
        print(f"{'peak_tflops':20}{peak:.0f}")
    median = {n: statistics.median(m.seconds[1:]) for n, m in meters.items()}
    memory = {n: max(m.peak[1:]) for n, m in meters.items()}
    print(f"\n{'':14}{'tokens/s':>10}{'over naive':>12}{'over Trainer':>14}{'peak MiB':>10}"
          f"{'of naive':>10}{'of Trainer':>12}{'of 4N':>8}")  # fmt: skip
    result["contestants"] = {}
    for n in steps:
        share = tokens / median[n] * 4 * params / (peak * 1e12) if peak else None
        line = dict(
            tokens_per_second=tokens / median[n], over_naive=median["naive loop"] / median[n],
            over_trainer=median["HF Trainer"] / median[n], peak_mib=memory[n] / 2**20,
            of_naive=memory[n] / memory["naive loop"], of_trainer=memory[n] / memory["HF Trainer"],
            of_bound=share, seconds=meters[n].seconds)  # fmt: skip
        result["contestants"][n] = line
        print(f"{n:14}{line['tokens_per_second']:10,.0f}{line['over_naive']:12.2f}"
              f"{line['over_trainer']:14.2f}{line['peak_mib']:10,.0f}{line['of_naive']:10.2f}"
              f"{line['of_trainer']:12.2f}{f'{share:8.0%}' if share else ''}")  # fmt: skip
    if a.json:
        result["peak_tflops"] = peak or None
        a.json.write_text(json.dumps(result, indent=1) + "\n")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
