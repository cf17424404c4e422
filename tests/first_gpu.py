"""The first ten minutes on a GPU: what only a card can show, in the order of value.

    python tests/first_gpu.py OUT               one card of 48 GB or more, Qwen3-4B's exact shape
    python tests/first_gpu.py OUT --rehearse    a small LLM on the simulated GPU, a minute

Weights are random, nothing is downloaded. Each part is printed and kept in OUT/results.json as it
ends, beside what the simulation expects (tests/plan_4b.py), so that the first minutes say at once
what differs; a part that fails is noted, the others go on. No part starts without its least seconds
before LAST_SECOND, at which the processes of tests and of bench.py are stopped. OUT also gets the
logs of the tests, a profile, and bench.py's figures. Copy results.json to tests/gpu/DATE-CARD.json.

1 versions   2 varlen_attn against its definition   3 quick tests of test_gpu.py   4 memory and
speed of each plan, and the warm start's memory   5 answers, with cuDNN's attention and without,
padded and alone   6 losses by 16 and 64 rows   7 bench.py   8 all of test_gpu.py
"""

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from conftest import byte_tokenizer
from full_size import SHAPE
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import elm

LAST_SECOND = 560  # from the start of the process
MOST_DIFFERENCE = 0.05  # of a peak from the simulation's, relative
GIB = 2**30
CUDA = torch.device("cuda", 0)
SMALL_SHAPE = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, intermediate_size=96, vocab_size=512, tie_word_embeddings=True)
NUM_SOFT_TOKENS = 4
# Peaks of trial passes in GiB, weights included, by tokens and share of layers recomputed:
# `python tests/plan_4b.py --plans`.
EXPECTED_PEAKS = {
    (8192, 0.0): 32.26, (8192, 0.5): 21.96, (8192, 1.0): 11.65, (4096, 0.0): 21.17,
    (2048, 0.0): 15.36}
EXPECTED_WARM_START = 9.75


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor, lengths: list[int],
                            window: int | None) -> Tensor:
    """In fp64, one example after the other; shapes as in elm.packed_attention. Query i sees the
    keys i - window + 1 to i."""
    group_size = q.shape[1] // k.shape[1]
    examples = zip(
        q.double().split(lengths, 2),
        k.double().repeat_interleave(group_size, 1).split(lengths, 2),
        v.double().repeat_interleave(group_size, 1).split(lengths, 2), strict=True)
    outs = []
    for query, key, value in examples:
        t = query.shape[2]
        visible = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
        visible = visible.triu(1 - (window or t))
        scores = (query @ key.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
        outs.append(scores.softmax(-1) @ value)
    return torch.cat(outs, 2).transpose(1, 2)


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    return ((found.double() - expected).norm() / (expected.norm() + floor)).item()


def seconds_of(function: Callable[[], object], repetitions: int = 3) -> tuple[float, float]:
    """(seconds of a call, seconds in which the host launches it), after one that warms up."""
    function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repetitions):
        function()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    ended = time.perf_counter()
    return (ended - begin) / repetitions, (launched - begin) / repetitions


def trial_peak(model: elm.ELM, num_tokens: int, longest: int) -> float | None:
    """GiB of the trial pass of a plan for rows of up to `longest` tokens; None if it does not
    fit."""
    peaks = []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    reset = torch.cuda.reset_peak_memory_stats

    def note_and_reset() -> None:
        peaks.append(torch.cuda.max_memory_allocated() / GIB)
        reset()

    with mock.patch.object(torch.cuda, "reset_peak_memory_stats", note_and_reset):
        fits = elm.fits_in_memory(model, num_tokens, longest, elm.LossConfig(), None)
    return round(peaks[0], 2) if fits else None


def build_elm(llm: nn.Module, hidden_dim: int) -> elm.ELM:
    """With a fresh adapter, for vectors of the LLM's width."""
    width = llm.config.hidden_size
    statistics = {"mean": torch.zeros(width), "std": torch.ones(width), "norms": torch.ones(3)}
    adapter = elm.fresh_adapter(llm, statistics, hidden_dim=hidden_dim, tokens=NUM_SOFT_TOKENS)
    return elm.ELM(llm, adapter.to(CUDA), elm.Prompt(byte_tokenizer())).train()


def make_batch(num_rows: int, row_length: int, num_labels: int, width: int) -> elm.Batch:
    """Equal rows, about random vectors of this width."""
    ids = np.random.default_rng(0).integers(0, 500, row_length)
    ids[:NUM_SOFT_TOKENS] = elm.SOFT_TOKEN
    example = elm.Example(ids, num_labels, truncated=False)
    return elm.collate([example] * num_rows, torch.randn(num_rows, width))


def make_step(batches: list[elm.Batch]) -> elm.Step:
    num_rows = sum(len(batch.lengths) for batch in batches)
    rows = elm.RowsOfStep(epoch=0, position=0, row_ids=np.arange(num_rows))
    num_labels = sum(len(batch.labels) for batch in batches)
    num_tokens = sum(len(batch.input_ids) for batch in batches)
    return elm.Step(rows, batches, num_labels, num_tokens)


def take_step(model: elm.ELM, step: elm.Step, optimizer: torch.optim.Optimizer) -> None:
    """As Trainer.train_step does, but for its wait."""
    step = step.to(model.device)
    soft_tokens = model(torch.cat([batch.embeddings for batch in step.batches]))
    _, gradient = elm.soft_gradient(model, soft_tokens, step, elm.LossConfig(), None)
    optimizer.zero_grad()
    soft_tokens.backward(gradient)
    nn.utils.clip_grad_norm_(model.adapter.parameters(), 1.0)
    optimizer.step()


class FirstMinutes:
    def __init__(self, out: Path, is_rehearsal: bool):
        self.out = out
        self.is_rehearsal = is_rehearsal
        self.begin = time.monotonic()
        self.results: dict[str, object] = {}
        self.differences = 0  # peaks that are not what was expected
        self.model: elm.ELM | None = None
        self.shape = SMALL_SHAPE if is_rehearsal else SHAPE
        self.longest = 64 if is_rehearsal else 2048

    def run(self) -> None:
        self.do("versions", self.versions)
        self.do("attention", self.attention)
        if not self.is_rehearsal:
            quick = "waits or trial or plan or (naive_reference and qwen3 and 128)"
            self.do("quick tests", lambda: self.tests("-k", quick), least_seconds=60)
        self.model = self.build()
        self.do("plans", self.plans, least_seconds=60)
        if not self.is_rehearsal:
            self.do("warm start", self.warm_start, least_seconds=40)
        self.do("answers", self.answers, least_seconds=60)
        self.do("losses", self.losses, least_seconds=20)
        self.model = None
        gc.collect()
        torch.cuda.empty_cache()
        if not self.is_rehearsal:
            self.do("bench", self.bench, least_seconds=120)
            self.do("all tests", self.tests, least_seconds=120)
        failed = [name for name, found in self.results.items() if str(found).startswith("FAILED")]
        print(f"== {self.differences} peaks differ from the simulation; parts that failed: "
              f"{', '.join(failed) or 'none'}")

    def do(self, name: str, part: Callable[[], object], least_seconds: float = 0) -> None:
        """Run a part if it may still end in time, print what it found, and keep it."""
        if self.seconds_left() < least_seconds:
            print(f"== {name}: left out, {self.seconds_left():.0f} s are left", flush=True)
            return
        begin = time.monotonic()
        try:
            self.results[name] = part()
        except Exception as e:  # the other parts are worth their minutes
            traceback.print_exc()
            self.results[name] = f"FAILED: {e!r}"
        seconds = time.monotonic() - begin
        print(f"== {name}, {seconds:.0f} s: {json.dumps(self.results[name])}", flush=True)
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")

    def seconds_left(self) -> float:
        return LAST_SECOND - (time.monotonic() - self.begin)

    # Parts

    def versions(self) -> elm.Json:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        elm.find_device()  # sets what a run sets
        found = {
            "date": datetime.date.today().isoformat(), "commit": commit,
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
            "transformers": transformers.__version__, "cudnn": torch.backends.cudnn.version(),
            "uses cudnn's attention": torch.backends.cuda.cudnn_sdp_enabled()}
        if not self.is_rehearsal:
            torch.ones(1, device=CUDA)
            settings = torch.cuda.memory._snapshot()["allocator_settings"]
            found["expandable segments"] = settings.get("expandable_segments")
        return found

    def attention(self) -> elm.Json:
        """The worst relative errors of varlen_attn, forward and of each gradient. bf16 holds 4e-3.
        Raises: AssertionError at an error above .02."""
        lengths = [1, 5, 64, 129, 300, 2]
        heads = ((4, 1), (8, 8))
        windows = (None, 1, 5, 128, 4096)
        worst = dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(CUDA)
        for head_dim, (num_heads, num_kv), window in itertools.product(
                (8, 64, 128, 256), heads, windows):
            inputs = []
            for n in (num_heads, num_kv, num_kv):
                x = torch.randn(1, n, sum(lengths), head_dim).to(CUDA, torch.bfloat16)
                inputs.append(x.requires_grad_())
            out, _ = elm.packed_attention(
                None, *inputs, None, lengths=lengths, cu_seqlens=cu_seqlens, sliding_window=window)
            at_out = torch.randn(out.shape).to(CUDA, torch.bfloat16)
            found = (out, *torch.autograd.grad(out, inputs, at_out))
            exact = attention_by_definition(*inputs, lengths, window)
            expected = (exact, *torch.autograd.grad(exact, inputs, at_out.double()))
            floor = 1e-2 * at_out.double().norm().item()  # with a window of 1, dq is 0
            for name, a, b in zip(worst, found, expected, strict=True):
                error = relative_error(a, b.double(), floor)
                assert error < 2e-2, (name, head_dim, num_heads, num_kv, window, error)
                worst[name] = max(worst[name], round(error, 5))
        return worst

    def tests(self, *arguments: str) -> list[str]:
        """The last lines of pytest on test_gpu.py."""
        return self.start(
            f"pytest_{len(self.results)}.log", "-m", "pytest", "-q", "--tb=line", "-p",
            "no:cacheprovider", "tests/test_gpu.py", *arguments)

    def start(self, log_name: str, *arguments: str) -> list[str]:
        """Python in a process of its own, which may take all the time that is left. The last lines
        of what it says, which goes to a file."""
        log = self.out / log_name
        with open(log, "w") as f:
            subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=f,
                           stderr=subprocess.STDOUT, timeout=self.seconds_left())
        return log.read_text().strip().splitlines()[-30:]

    def build(self) -> elm.ELM:
        torch.manual_seed(0)
        device = "cpu" if self.is_rehearsal else "cuda"
        with torch.device(device):
            llm = Qwen3ForCausalLM._from_config(
                Qwen3Config(**self.shape), dtype=torch.bfloat16)
        llm = llm.to(CUDA).eval().requires_grad_(False)
        return build_elm(llm, hidden_dim=32 if self.is_rehearsal else 4096)

    def plans(self) -> elm.Json:
        """Of each plan what measure_plan finds. At the end a profile, and a warning at each wait in
        a step."""
        found = {}
        elm.keep_less(self.model.llm)
        for (num_tokens, share), expected in EXPECTED_PEAKS.items():
            if self.is_rehearsal:
                num_tokens //= 32
            measured = self.measure_plan(num_tokens, share, expected)
            found[f"{num_tokens} tokens, {share:.0%} recomputed"] = measured
            print(measured, flush=True)
        elm.recompute_layers(self.model.llm, 0)
        if not self.is_rehearsal:
            self.profile()
        return found

    def measure_plan(self, num_tokens: int, share: float, expected: float) -> elm.Json:
        """The trial pass's peak, that of a step, tokens a second, and the share of a step's time in
        which the host launches it."""
        elm.recompute_layers(self.model.llm, share)
        peak = trial_peak(self.model, num_tokens, self.longest)
        measured = self.compare(peak, expected)
        row_length = 20 if self.is_rehearsal else 200
        step = make_step([self.make_rows(num_tokens // row_length, row_length)])
        optimizer = self.make_optimizer()
        torch.cuda.reset_peak_memory_stats()
        seconds, seconds_of_launch = seconds_of(lambda: take_step(self.model, step, optimizer))
        optimizer.zero_grad()  # the next plan's trial pass is to find nothing
        measured["step GiB"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        measured["tokens a second"] = round(step.num_tokens / seconds)
        measured["share of launching"] = round(seconds_of_launch / seconds, 2)
        return measured

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.adapter.parameters(), fused=True)

    def compare(self, peak: float | None, expected: float) -> elm.Json:
        """A peak in GiB, None if it did not fit, with what the simulation expects of Qwen3-4B."""
        if self.is_rehearsal:
            return {"GiB": peak}
        verdict = "as expected"
        if peak is None or abs(peak - expected) > MOST_DIFFERENCE * expected:
            verdict = "DIFFERS"
            self.differences += 1
        return {"GiB": peak, "expected": expected, "verdict": verdict}

    def make_rows(self, num_rows: int, row_length: int) -> elm.Batch:
        """Of which four in five tokens have labels."""
        return make_batch(num_rows, row_length, row_length * 4 // 5, self.shape["hidden_size"])

    def profile(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        step = make_step([self.make_rows(40, 200)])
        optimizer = self.make_optimizer()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            take_step(self.model, step, optimizer)
            torch.cuda.synchronize()
        table = profiler.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)
        (self.out / "profile.txt").write_text(table)
        torch.cuda.set_sync_debug_mode("warn")
        take_step(self.model, step, optimizer)
        torch.cuda.set_sync_debug_mode("default")

    def warm_start(self) -> elm.Json:
        """Of 32,768 vectors, as plan_4b.py has it."""
        from plan_4b import warm_start

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        begin = time.monotonic()
        warm_start(self.model)
        peak = torch.cuda.max_memory_allocated() / GIB
        seconds = round(time.monotonic() - begin)
        return {**self.compare(peak, EXPECTED_WARM_START), "seconds": seconds}

    def answers(self) -> elm.Json:
        """Of 64 queries: seconds, the first time and again, with cuDNN's attention and without; and
        how far the next token's logits of prompts padded at the left are from each alone."""
        num_answers = 4 if self.is_rehearsal else 64
        num_tokens = 4 if self.is_rehearsal else 64
        torch.manual_seed(1)
        vectors = F.normalize(torch.randn(num_answers, self.shape["hidden_size"]))
        queries = ["Say it." + i % 5 * " please" for i in range(num_answers)]
        found = {}
        for uses_cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)
            seconds = []
            for _ in range(2):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                self.model.generate(vectors, queries, num_tokens, num_answers,
                                    min_new_tokens=num_tokens)
                torch.cuda.synchronize()
                seconds.append(round(time.perf_counter() - begin, 2))
            name = "with cudnn" if uses_cudnn else "without cudnn"
            found[name] = {
                "first": seconds[0], "again": seconds[1],
                "padded against alone": self.error_of_padding(vectors[:8], queries[:8])}
        return found

    @torch.no_grad()
    def error_of_padding(self, vectors: Tensor, queries: list[str]) -> float:
        llm = self.model.llm
        prompts = self.model.prompt_embeds(vectors, queries)
        masks = [torch.ones(len(prompt), dtype=torch.long, device=CUDA) for prompt in prompts]
        pad_left = nn.utils.rnn.pad_sequence
        padded = llm(
            inputs_embeds=pad_left(prompts, batch_first=True, padding_side="left"),
            attention_mask=pad_left(masks, batch_first=True, padding_side="left"),
            use_cache=False).logits[:, -1]
        alone = [llm(inputs_embeds=prompt[None], use_cache=False).logits[0, -1]
                 for prompt in prompts]
        return round(relative_error(padded, torch.stack(alone).double()), 4)

    @torch.no_grad()
    def losses(self) -> elm.Json:
        """Rows a second."""
        found = {}
        for num_rows in (16, 64):
            batch = self.make_rows(num_rows, 120)
            seconds, _ = seconds_of(lambda batch=batch: self.model.nll(batch).tolist())
            found[f"{num_rows} rows at once"] = round(num_rows / seconds)
        return found

    def bench(self) -> list[str]:
        return self.start("bench.log", "tests/bench.py", "--shape", "qwen3-4b", "--rounds", "2",
                          f"--json={self.out / 'bench.json'}")


@contextlib.contextmanager
def device(is_rehearsal: bool) -> Iterator[None]:
    if not is_rehearsal:
        yield
        return
    from simulated_cuda import SimulatedCuda

    with SimulatedCuda():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="on the simulated GPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with device(options.rehearse):
        if not torch.cuda.is_available():
            sys.exit("first_gpu.py: no GPU; --rehearse takes a simulated one")
        FirstMinutes(options.out, options.rehearse).run()


if __name__ == "__main__":
    main()
