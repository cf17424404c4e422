"""Memory of a run at the shape of Qwen3-4B on cards of 12 to 141 GB, by a simulated GPU.

    python tests/plan_4b.py              all cards: some minutes on a CPU, and 3 GB of memory
    python tests/plan_4b.py 24 141       these
    python tests/plan_4b.py --nf4 8 12   these, the LLM in 4 bits
    python tests/plan_4b.py --plans      the peaks that first_gpu.py expects on an H200
    python tests/plan_4b.py --layers     what the backward pass of a layer keeps of a token

Nothing is computed and no weights are needed: tensors have shapes alone, see simulated_cuda.py,
which also says what it does not see. A line for each card: the plan that plan_memory chooses for
rows of up to 2,048 tokens, and the peak in GiB, weights included, of each part of a run, from the
loading of the LLM to the report. The warm start is of 32,768 vectors, 4 soft tokens each, and
150,000 distinct words. For the H200, whose rates the simulation has, also the least time of a step.
The layers in 4 bits are stand-ins for bitsandbytes' of as many bytes, see Nf4Linear; token
embeddings, and the embedder, are in bf16.

Not part of the suite.
"""

import argparse
import gc
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from first_gpu import (
    EXPECTED_PEAKS,
    NUM_SOFT_TOKENS,
    build_elm,
    make_batch,
    make_step,
    take_step,
    trial_peak,
)
from full_size import SHAPE
from simulated_cuda import GIB, SimulatedCuda
from torch import nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import elm

# What CUDA's context leaves of a card, in GiB, by its name in GB.
CARDS = {8: 7.5, 12: 11.4, 16: 15.1, 24: 23.0, 40: 38.8, 80: 78.5, 141: 139.0}
H200 = 141
WIDTH = 2560
LONGEST_ROW = 2048  # tokens, the default of data.max_seq_length
USUAL_ROW = 200
NUM_WARM_START_VECTORS = 32768
NUM_WORDS = 150_000
WORDS_OF_TEXT = 220
NEW_TOKENS = 256  # of an answer, the default of eval.max_new_tokens
PROMPTS = (100, 2000)  # their lengths, in tokens
EMBEDDED_TEXTS = 32  # at once, the default of sentence-transformers
EMBEDDED_TOKENS = 512
NUM_LAYERS_ALONE = 4


def load_on_card(model_class: type[nn.Module], in_nf4: bool = False) -> nn.Module:
    """In bf16, the layers in 4 bits if asked for, with no weights."""
    with torch.device("meta"):
        model = model_class(Qwen3Config(**SHAPE)).to(torch.bfloat16)
        if in_nf4:
            pack_layers(model.base_model.layers)
    if hasattr(model, "lm_head"):
        model.tie_weights()
    return model.eval().requires_grad_(False).to("cuda")


def pack_layers(layers: nn.Module) -> None:
    for module in list(layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Nf4Linear(child.in_features, child.out_features))


class Nf4Linear(nn.Module):
    """The bytes of bitsandbytes' Linear4bit with double quantisation: 4.127 bits a weight."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        num_weights = in_features * out_features
        num_blocks = num_weights // 64  # with a scale of 8 bits each
        packed = torch.empty(num_weights // 2, dtype=torch.uint8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scales", torch.empty(num_blocks, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(num_blocks // 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Nf4Product.apply(x, self.out_features)


class Nf4Product(torch.autograd.Function):
    """Unpacks the whole matrix for each product, in both passes, and keeps neither it nor x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.shape = (out_features, x.shape[-1])
        return nn.functional.linear(x, x.new_zeros(ctx.shape))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ gradient.new_zeros(ctx.shape), None


def load_elm(in_nf4: bool = False) -> elm.ELM:
    return build_elm(load_on_card(Qwen3ForCausalLM, in_nf4), hidden_dim=4096)


def warm_start(model: elm.ELM) -> None:
    """On texts whose words have Zipf's frequencies, about as natural ones."""
    rng = np.random.default_rng(0)
    words = []
    for _ in range(NUM_WARM_START_VECTORS * NUM_SOFT_TOKENS):
        ids = rng.zipf(1.15, WORDS_OF_TEXT // NUM_SOFT_TOKENS) % NUM_WORDS
        words.append(np.unique(ids))
    split = SimpleNamespace(
        index={"source_id": np.arange(NUM_WARM_START_VECTORS)},
        embeddings=lambda vector_ids: torch.ones(len(vector_ids), WIDTH))
    with mock.patch.object(elm, "read_words", lambda *_: words):
        elm.warm_start(model, split)


def make_rows(num_rows: int, num_tokens: int) -> elm.Batch:
    """Rows of which all tokens but the soft ones have labels."""
    return make_batch(num_rows, num_tokens, num_tokens - NUM_SOFT_TOKENS, WIDTH)


def run_steps(model: elm.ELM, gpu: SimulatedCuda, micro_batch_tokens: int) -> float:
    """Two steps of two micro-batches. Returns the least seconds of a token of the second, in which
    the optimizer has its state."""
    step = make_step([make_rows(micro_batch_tokens // USUAL_ROW, USUAL_ROW) for _ in range(2)])
    optimizer = torch.optim.AdamW(model.adapter.parameters(), fused=True)
    for _ in range(2):
        gpu.costs.clear()
        take_step(model, step, optimizer)
    return sum(gpu.costs.seconds.values()) / step.num_tokens


@torch.no_grad()
def evaluate(model: elm.ELM) -> None:
    num_rows = elm.rows_at_once(model, LONGEST_ROW)
    model.nll(make_rows(num_rows, LONGEST_ROW)).tolist()


@torch.no_grad()
def generate(model: elm.ELM) -> None:
    """The first and the last token of as many answers as are given at once."""
    for length in PROMPTS:
        num_answers = elm.answers_at_once(model.llm, length, NEW_TOKENS)
        generate_first_token(model.llm, num_answers, length)
        generate_last_token(model.llm, num_answers, length + NEW_TOKENS)


def generate_first_token(llm: nn.Module, num_answers: int, num_tokens: int) -> None:
    """As transformers' `generate`, whose loop would not end: it looks at values."""
    prompts = torch.zeros(num_answers, num_tokens, WIDTH, dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(num_answers, num_tokens, dtype=torch.int64, device="cuda")
    llm(inputs_embeds=prompts, attention_mask=mask, use_cache=True, logits_to_keep=1)


def generate_last_token(llm: nn.Module, num_answers: int, num_tokens: int) -> None:
    """Of answers that have num_tokens with their prompts."""
    config = llm.config
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        shape = (num_answers, config.num_key_value_heads, num_tokens - 1, config.head_dim)
        states = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        cache.update(states, states.clone(), layer)
    ids = torch.zeros(num_answers, 1, dtype=torch.int64, device="cuda")
    mask = torch.ones(num_answers, num_tokens, dtype=torch.int64, device="cuda")
    llm(ids, attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def embed() -> None:
    """With Qwen3-Embedding-4B, which has the LLM's shape without its head."""
    embedder = load_on_card(Qwen3Model)
    ids = torch.zeros(EMBEDDED_TEXTS, EMBEDDED_TOKENS, dtype=torch.int64, device="cuda")
    embedder(ids, attention_mask=torch.ones_like(ids), use_cache=False)


def count_recomputed(llm: nn.Module) -> int:
    return sum("forward" in vars(layer) for layer in llm.base_model.layers)


class Card:
    """A run on one card."""

    def __init__(self, gib: float, in_nf4: bool):
        self.gib = gib
        self.in_nf4 = in_nf4
        self.peaks: dict[str, float] = {}  # GiB, of each part
        self.plan = ""

    def measure(self, gpu: SimulatedCuda, part: str) -> None:
        """Since the last call."""
        self.peaks[part] = gpu.peak / GIB
        gc.collect()
        gpu.reset_peak()

    def run(self) -> float:
        """Returns the least seconds of a token in training. Raises: OutOfMemoryError where a part
        does not fit."""
        with SimulatedCuda(values=False, limit=int(self.gib * GIB)) as gpu:
            model = load_elm(self.in_nf4)
            gc.collect()
            gpu.reset_peak()  # the simulated card takes tied weights twice on the way
            self.measure(gpu, "weights")
            warm_start(model)
            self.measure(gpu, "warm start")
            budget = elm.plan_memory(model, LONGEST_ROW, "auto", elm.LossConfig(), None)
            self.plan = f"{budget} tokens, {count_recomputed(model.llm)} layers recomputed"
            gc.collect()
            gpu.reset_peak()
            seconds_of_token = run_steps(model, gpu, budget)
            self.measure(gpu, "steps")
            evaluate(model)
            self.measure(gpu, "losses")
            generate(model)
            self.measure(gpu, "answers")
            del model
            gc.collect()
            gpu.reset_peak()
            try:
                embed()
                self.measure(gpu, "embedder")
            except torch.OutOfMemoryError:  # eval.embedder = "off" does without
                self.peaks["embedder"] = math.nan
        return seconds_of_token


def print_plans() -> None:
    """Peaks of the trial passes of plans, and of the warm start, on a card that holds them all."""
    with SimulatedCuda(values=False, limit=int(CARDS[H200] * GIB)) as gpu:
        model = load_elm()
        elm.keep_less(model.llm)
        for num_tokens, share in EXPECTED_PEAKS:
            elm.recompute_layers(model.llm, share)
            peak = trial_peak(model, num_tokens, LONGEST_ROW)
            print(f"{num_tokens} tokens, {share:.0%} recomputed: {peak:.2f} GiB", flush=True)
        gpu.reset_peak()
        warm_start(model)
        print(f"warm start: {gpu.peak / GIB:.2f} GiB")


def print_layers() -> None:
    """Of four layers, with their own forward passes and with lean ones."""
    num_tokens = 4096
    for is_lean in (False, True):
        with SimulatedCuda(values=False) as gpu:
            shape = SHAPE | {"num_hidden_layers": NUM_LAYERS_ALONE}
            with mock.patch.dict(SHAPE, shape):
                model = load_elm()
            if is_lean:
                elm.keep_less(model.llm)
            batch = make_rows(num_tokens // USUAL_ROW, USUAL_ROW).to(model.device)
            soft_tokens = model(batch.embeddings).detach().requires_grad_()
            before = gpu.alive
            gpu.reset_peak()
            gpu.costs.clear()
            hidden = model.forward_hidden(batch, soft_tokens)
            gc.collect()
            kept = gpu.alive - before
            hidden.backward(torch.zeros_like(hidden))
            per_token = len(batch.input_ids) * NUM_LAYERS_ALONE
            milliseconds = 1e3 * sum(gpu.costs.seconds.values())
            name = "lean" if is_lean else "own"
            print(f"{name}: {kept / per_token:,.0f} bytes a token and layer, at the peak "
                  f"{(gpu.peak - before) / per_token:,.0f}; {milliseconds:.1f} ms at least")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", type=int, choices=CARDS, help="in GB")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--layers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.plans:
        print_plans()
        return
    if options.layers:
        print_layers()
        return
    print("| card | plan | weights | warm start | steps | losses | answers | embedder |")
    print("|---|---|---|---|---|---|---|---|")
    cards = options.cards
    if not cards:
        cards = [name for name in CARDS if options.nf4 or name != 8]  # which takes 4 bits alone
    for name in cards:
        card = Card(CARDS[name], options.nf4)
        seconds_of_token = card.run()
        peaks = []
        for peak in card.peaks.values():
            peaks.append("too large" if math.isnan(peak) else f"{peak:.1f}")
        print(f"| {name} GB | {card.plan} | {' | '.join(peaks)} |", flush=True)
        if name == H200 and not options.nf4:
            tokens_per_second = 1 / seconds_of_token
            hours = 1e6 * USUAL_ROW / tokens_per_second / 3600
            print(f"\nH200: at most {tokens_per_second:,.0f} tokens a second; a million rows of "
                  f"{USUAL_ROW} tokens in {hours:.1f} hours or more")


if __name__ == "__main__":
    main()
