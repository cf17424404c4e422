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
import math
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

    def __init__(self, made: list[elm.Example], width: int, seed: int):
        self.made = made
        self.index = np.zeros(len(made), elm.ROW_INDEX)
        self.index["vector_id"] = np.arange(len(made))
        generator = torch.Generator().manual_seed(seed)
        self.vectors = torch.randn(len(made), width, generator=generator)

    def examples(self, row_ids):
        return [self.made[i] for i in row_ids]

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
        own[0] = elm.SOFT_TOKEN
        made.append(elm.Example(np.r_[shared, own], response, False))
    return MadeSplit(made, width, seed)


def make_llm(shape: dict, device: torch.device, dtype: torch.dtype) -> Qwen3ForCausalLM:
    """A frozen Qwen3 with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(**shape, tie_word_embeddings=True)
    with torch.device(device):
        llm = Qwen3ForCausalLM(config)
    return llm.to(dtype).eval().requires_grad_(False)


# ------------------------------------------------------------------ time and memory


class Meter:
    """Seconds (of the CPU, or of CUDA events) and peak bytes between begin and end."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: list[float] = []
        self.peak: list[int] = []

    def begin(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
            self.base = read_status("VmRSS")
            self.start = time.process_time()

    def end(self) -> None:
        if self.cuda:
            self.events[1].record()
            torch.cuda.synchronize()
            self.seconds.append(self.events[0].elapsed_time(self.events[1]) / 1000)
            self.peak.append(torch.cuda.max_memory_allocated() - self.base)
        else:
            self.seconds.append(time.process_time() - self.start)
            self.peak.append(read_status("VmHWM") - self.base)


def read_status(key: str) -> int:
    """Bytes that Linux counts of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def measure_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of a large matrix product."""
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / Timer("a @ b", globals=dict(a=a, b=b)).timeit(20).mean / 1e12


# ------------------------------------------------------------------ contestants
#
# Each has its own copy of an adapter and AdamW. A step takes all rows of the split.


class ElmLoop:
    name = "elm"

    def __init__(self, llm, adapter, split, budget: int, share_recomputed: float):
        # Of another tokenizer, whose ids the LLM has, too: rows are made of ids.
        prompt = elm.Prompt(elm.load_tokenizer(str(ROOT / "data/tiny/llm")))
        self.model = elm.ELM(llm, copy.deepcopy(adapter), prompt).train()
        self.split = split
        self.budget = budget
        self.share_recomputed = share_recomputed
        parameters = self.model.adapter.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(self, meter: Meter) -> float:
        if self.model.device.type == "cuda":  # as plan_memory does
            elm.keep_less(self.model.llm)
        elm.recompute_layers(self.model.llm, self.share_recomputed)
        rows = np.arange(len(self.split.index))
        meter.begin()
        loss, _, _ = elm_step(self.model, self.split, rows, self.budget)
        torch.nn.utils.clip_grad_norm_(self.model.adapter.parameters(), 1.0)
        self.optimizer.step()
        meter.end()
        for module in self.model.llm.modules():  # the others share it
            vars(module).pop("forward", None)
        return loss


class NaiveLoop:
    name = "naive loop"

    def __init__(self, llm, adapter, split, batch_size: int):
        self.llm = llm
        self.adapter = copy.deepcopy(adapter)
        examples = token_rows(split, range(len(split.index)))
        starts = range(0, len(examples), batch_size)
        self.batches = [examples[start : start + batch_size] for start in starts]
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-4)

    def step(self, meter: Meter) -> float:
        self.llm.train()  # checkpointing works in no other mode; Qwen3 has no dropout
        meter.begin()
        loss, _ = naive_step(self.llm, self.adapter, self.batches)
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        self.optimizer.step()
        meter.end()
        self.llm.gradient_checkpointing_disable()
        self.llm.eval()
        return loss


class TrainerModel(torch.nn.Module):
    """What a user of HF Trainer writes: splice the vectors in, let the LLM make the loss."""

    def __init__(self, llm, adapter):
        super().__init__()
        self.llm = llm
        self.adapter = adapter

    def forward(self, batch, mask, labels, vectors):
        embeds = self.llm.get_input_embeddings()(batch.clamp(min=0))
        soft = self.adapter(vectors).to(embeds.dtype)
        embeds = embeds.masked_scatter((batch == -1)[..., None], soft)
        out = self.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)
        return {"loss": out.loss}


def collate_naively(examples) -> dict[str, torch.Tensor]:
    batch, mask, labels = naive_batch(examples)
    vectors = torch.stack([vector for _, _, vector in examples]).float()
    return dict(batch=batch, mask=mask, labels=labels, vectors=vectors)


class InOrder(Trainer):
    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    """Leaves the making of the Trainer out of its time."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_train_begin(self, *_, **__):
        self.meter.begin()

    def on_train_end(self, *_, **__):
        self.meter.end()


class HFTrainer:
    name = "HF Trainer"

    def __init__(self, llm, adapter, split, batch_size: int):
        self.model = TrainerModel(llm, copy.deepcopy(adapter))
        self.examples = token_rows(split, range(len(split.index)))
        self.batch_size = batch_size

    def step(self, meter: Meter) -> None:
        is_cpu = self.model.llm.device.type == "cpu"
        num_batches = math.ceil(len(self.examples) / self.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=self.batch_size, max_steps=1,
                gradient_accumulation_steps=num_batches, remove_unused_columns=False,
                save_strategy="no", logging_strategy="no", report_to="none", use_cpu=is_cpu,
                disable_tqdm=True)  # fmt: skip
            trainer = InOrder(
                self.model, arguments, data_collator=collate_naively, train_dataset=self.examples)
            trainer.add_callback(Clock(meter))
            trainer.remove_callback(PrinterCallback)
            trainer.train()


# ------------------------------------------------------------------ the comparison


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("--shape", choices=SHAPES, default="cpu")
    p.add_argument("--layers", type=int, help="in place of the shape's")
    p.add_argument("--vocab", type=int, help="in place of the shape's; 1500 at least")
    p.add_argument("--rows", type=int, default=32, help="of an optimizer step")
    p.add_argument("--batch", type=int, default=8, help="rows of a padded batch")
    p.add_argument("--budget", type=int, help="tokens of one of elm's micro-batches")
    p.add_argument("--checkpoint", action="store_true", help="elm recomputes every layer")
    p.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    p.add_argument("--seed", type=int, default=0, help="of the data")
    p.add_argument("--peak-tflops", type=float, help="of the GPU; measured if not given")
    p.add_argument("--json", type=Path, help="write the results there")
    a = p.parse_args()
    if min(a.rows, a.batch, a.rounds, a.layers or 1) < 1:
        p.error("rows, batch, rounds and layers must be at least 1")
    if a.vocab is not None and a.vocab < 1500:
        p.error("vocab must be at least 1500")
    if a.shape == "qwen3-4b" and not torch.cuda.is_available():
        p.error("--shape qwen3-4b needs a GPU")
    return a


def chosen_shape(a: argparse.Namespace) -> dict:
    shape = dict(SHAPES[a.shape])
    if a.layers:
        shape["num_hidden_layers"] = a.layers
    if a.vocab:
        shape["vocab_size"] = a.vocab
    return shape


def make_contestants(a: argparse.Namespace, llm, split: MadeSplit) -> list:
    width = llm.config.hidden_size
    statistics = dict(mean=torch.zeros(width), norms=torch.ones(3))
    adapter = elm.fresh_adapter(llm, statistics, False, hidden_dim=4096 * width // 2560)
    adapter = adapter.to(llm.device)
    budget = a.budget or elm.MICRO_BATCH_TOKENS[llm.device.type]
    share_recomputed = 1.0 if a.checkpoint else 0.0
    return [
        ElmLoop(llm, adapter, split, budget, share_recomputed),
        NaiveLoop(llm, adapter, split, a.batch),
        HFTrainer(llm, adapter, split, a.batch),
    ]


def run_rounds(contestants: list, meters: dict[str, Meter], num_rounds: int) -> dict:
    """The losses of the first round, by name."""
    first_losses = {}
    for number in range(num_rounds + 1):  # the first one warms up
        for contestant in contestants:
            name = contestant.name
            loss = contestant.step(meters[name])
            first_losses.setdefault(name, loss)
            seconds = meters[name].seconds[-1]
            print(f"round {number} of {num_rounds}: {name} {seconds:.2f} s", file=sys.stderr)
    return first_losses


def padding_efficiency(lengths: np.ndarray, batch_size: int) -> float:
    starts = range(0, len(lengths), batch_size)
    batches = [lengths[start : start + batch_size] for start in starts]
    num_padded = sum(len(batch) * batch.max() for batch in batches)
    return float(lengths.sum() / num_padded)


def describe_run(device: torch.device) -> dict:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    return dict(
        command="python " + " ".join(["tests/bench.py", *sys.argv[1:]]), commit=commit,
        machine=machine, torch=torch.__version__, transformers=transformers.__version__,
    )  # fmt: skip


def cpu_name() -> str:
    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def compare(meters: dict[str, Meter], num_tokens: int, bound: float | None) -> dict:
    """A dict for each contestant; `bound` is the tokens a second that are possible."""
    seconds = {name: statistics.median(meter.seconds[1:]) for name, meter in meters.items()}
    memory = {name: max(meter.peak[1:]) for name, meter in meters.items()}
    compared = {}
    for name, meter in meters.items():
        rate = num_tokens / seconds[name]
        compared[name] = dict(
            tokens_per_second=rate,
            over_naive=seconds["naive loop"] / seconds[name],
            over_trainer=seconds["HF Trainer"] / seconds[name],
            peak_mib=memory[name] / 2**20,
            of_naive=memory[name] / memory["naive loop"],
            of_trainer=memory[name] / memory["HF Trainer"],
            of_bound=rate / bound if bound else None,
            seconds=meter.seconds,
        )  # fmt: skip
    return compared


def print_table(compared: dict) -> None:
    print(f"\n{'':14}{'tokens/s':>10}{'over naive':>12}{'over Trainer':>14}{'peak MiB':>10}"
          f"{'of naive':>10}{'of Trainer':>12}{'of 4N':>8}")  # fmt: skip
    for name, line in compared.items():
        share = f"{line['of_bound']:8.0%}" if line["of_bound"] else ""
        print(f"{name:14}{line['tokens_per_second']:10,.0f}{line['over_naive']:12.2f}"
              f"{line['over_trainer']:14.2f}{line['peak_mib']:10,.0f}{line['of_naive']:10.2f}"
              f"{line['of_trainer']:12.2f}{share}")  # fmt: skip


def main() -> None:
    a = parse_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()

    device = elm.start_distributed()
    shape = chosen_shape(a)
    dtype = torch.float32 if a.shape == "cpu" else torch.bfloat16
    llm = make_llm(shape, device, dtype)
    split = make_split(a.rows, shape["vocab_size"], shape["hidden_size"], a.seed)
    contestants = make_contestants(a, llm, split)
    meters = {contestant.name: Meter(device) for contestant in contestants}
    losses = run_rounds(contestants, meters, a.rounds)

    lengths = np.array([len(example.ids) for example in split.made])
    num_tokens = int(lengths.sum())
    result = describe_run(device)
    result["rows"] = a.rows
    result["tokens"] = num_tokens
    result["padding_efficiency"] = round(padding_efficiency(lengths, a.batch), 3)
    result["loss_error"] = abs(losses["elm"] / losses["naive loop"] - 1)
    bound = None
    if device.type == "cuda":
        result["peak_tflops"] = a.peak_tflops or measure_tflops(device, llm.dtype)
        num_parameters = sum(p.numel() for p in llm.parameters())  # tied: the head counts once
        bound = result["peak_tflops"] * 1e12 / (4 * num_parameters)
    for key, value in result.items():
        print(f"{key:20}{value}")
    result["contestants"] = compare(meters, num_tokens, bound)
    print_table(result["contestants"])
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
