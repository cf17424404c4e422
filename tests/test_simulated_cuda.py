"""A GPU's path on a simulated one: the CPU's numbers, one wait a step, and faults that show."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import first_gpu
import numpy as np
import plan_4b
import prepare
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NO_TABLES,
    ROOT,
    build_elm,
    command,
    go,
    make_data,
    make_llm,
    make_settings,
    open_train,
    read_jsonl,
    vectors_path,
)
from naive import elm_step
from simulated_cuda import SimulatedCuda, Wait, missing_interface
from torch.nn.attention import varlen
from transformers import AutoTokenizer, Qwen3ForCausalLM

import elm

pytestmark = pytest.mark.skipif(bool(missing_interface()), reason=missing_interface())

# -----------------------------------------------------------------------------
# A training run

NUM_STEPS = 3
MEASURED = {"memory_gib", "seconds", "tokens_per_second"}

# Functions of elm.py in which the host waits for the device, outside of a step.
MAY_WAIT = {
    # loading, and the check of the LLM
    "_apply", "build_elm", "check_attention", "check_llm", "check_long_row", "fresh_adapter",
    "generate_at_once", "gives_the_same", "hash_weights", "load_llm", "move",
    "near_equal_pairs", "nearest_vectors", "nll_alone", "sample_token_embeddings",
    # fits in closed form, and the trial pass
    "fit_probe", "fits_in_memory", "load_chunks", "response_hidden_of_rows", "ridge", "warm_start",
    "word_targets",
    # validation and files
    "evaluate_nll", "record_validation", "report", "write",
    # copies of batches that are not in pinned memory, as check_attention makes them
    "_map_tensors"}  # fmt: skip


class Run(NamedTuple):
    report: dict
    metrics: list[dict]
    adapter: dict[str, torch.Tensor]


class RunTwice(NamedTuple):
    """The same training on the CPU and on the simulated device."""

    on_cpu: Run
    on_device: Run
    gpu: SimulatedCuda
    bf16: bool


class Tolerance(NamedTuple):
    loss: float  # relative, of the report
    metric: float  # absolute, of metrics.jsonl
    adapter: float  # relative, of the norm of each tensor


IN_BF16 = Tolerance(loss=2e-4, metric=1e-3, adapter=1e-2)
IN_FP32 = Tolerance(loss=1e-6, metric=1e-5, adapter=1e-5)


def train(settings: list[str]) -> Run:
    report, folder = go(settings)
    adapter, _ = elm.Adapter.load(folder)
    return Run(report, read_jsonl(folder / "metrics.jsonl"), adapter.state_dict())


@pytest.fixture(
    scope="module",
    params=[("qwen3", True), ("gemma3_text", True), ("qwen3", False),
            pytest.param(("gemma3_text", False), marks=pytest.mark.slow)],
    ids=lambda param: f"{param[0]}-{'bf16' if param[1] else 'fp32'}")  # fmt: skip
def run_twice(request, tmp_path_factory) -> RunTwice:
    kind, bf16 = request.param
    folder = tmp_path_factory.mktemp(kind)
    llm = make_llm(folder / "llm", kind)
    data = make_data(folder / "data")
    more = [f"model.bf16={str(bf16).lower()}", "model.tokens=4", "loss.drift_weight=0.1",
            f"train.max_steps={NUM_STEPS}", "train.logging_steps=2", "eval.samples=0"]
    on_cpu = train([*make_settings(llm, data, folder / "cpu"), *more])
    with SimulatedCuda() as gpu:
        on_device = train([*make_settings(llm, data, folder / "device"), *more])
    return RunTwice(on_cpu, on_device, gpu, bf16)


def test_training_has_the_numbers_of_the_cpu(run_twice):
    """Found: losses within 3e-5, adapters within 4e-3 in bf16; 1e-8 and 2e-7 in fp32."""
    on_cpu = run_twice.on_cpu
    on_device = run_twice.on_device
    tolerance = IN_BF16 if run_twice.bf16 else IN_FP32
    for name in ("loss", "loss_shuffled", "loss_text", "loss_nearest"):
        assert on_device.report[name] == pytest.approx(on_cpu.report[name], rel=tolerance.loss)
    for found, expected in zip(on_device.metrics, on_cpu.metrics, strict=True):
        assert found.keys() == expected.keys()
        for name in found.keys() - MEASURED:
            assert abs(found[name] - expected[name]) < tolerance.metric, name
    for name, expected in on_cpu.adapter.items():
        difference = (on_device.adapter[name] - expected).norm()
        assert difference <= tolerance.adapter * expected.norm(), name


def test_bf16_goes_by_varlen_attn(run_twice):
    num_kernels = run_twice.gpu.costs.num_kernels
    assert (num_kernels["_varlen_attn"] > 0) == run_twice.bf16
    assert (num_kernels["_varlen_attn_backward"] > 0) == run_twice.bf16


def test_the_host_waits_once_a_step(run_twice):
    """And once more where a step is logged, for the similarity."""
    waits = run_twice.gpu.waits
    in_steps = Counter(wait.function for wait in waits if "train_step" in wait.functions)
    assert in_steps == {"train_step": NUM_STEPS, "mean_cosine": 2}
    assert waits_in_gradient(waits) == []
    elsewhere = {wait.function for wait in waits if "train_step" not in wait.functions}
    assert elsewhere <= MAY_WAIT


def test_no_backward_pass_of_a_step_fills_a_row_with_zeros(run_twice):
    """As that of x[0] does."""
    assert run_twice.gpu.costs.num_kernels["select_backward"] == 0


def test_memory_is_given_back(run_twice):
    assert run_twice.gpu.peak > 1e6
    assert run_twice.gpu.alive == 0


def waits_in_gradient(waits: list[Wait]) -> list[Wait]:
    return [wait for wait in waits if "soft_gradient" in wait.functions]


# -----------------------------------------------------------------------------
# The commands


def test_generate_gives_the_answers_of_the_cpu(trained, tmp_path):
    _, folder, _ = trained
    words = ["generate", f"adapter={folder}",
             f"embeddings={vectors_path(folder.parent / 'data', 'test')}",
             'query=["What?", "Is <EMB> so, and how?"]', "max_new_tokens=12"]
    assert command(*words, f"out={tmp_path / 'cpu.jsonl'}")[0] == 0
    with SimulatedCuda() as gpu:
        assert command(*words, f"out={tmp_path / 'device.jsonl'}")[0] == 0
    assert gpu.costs.num_kernels["mm"] > 0
    answers = read_jsonl(tmp_path / "cpu.jsonl")
    assert len({entry["answer"] for entry in answers}) > 1
    assert read_jsonl(tmp_path / "device.jsonl") == answers


def test_eval_gives_the_report_of_the_cpu(trained, tmp_path):
    report, folder, settings = trained
    words = ["eval", NO_TABLES, *settings, f"adapter={folder}",
             f"report_dir={tmp_path / 'report'}"]
    with SimulatedCuda():
        code, said = command(*[word for word in words if not word.startswith("output.dir")])
    assert code == 0, said
    found = json.loads((tmp_path / "report" / "eval.json").read_text())
    for name in ("loss", "loss_shuffled", "loss_text", "bertscore_f1"):
        assert found[name] == pytest.approx(report[name], rel=1e-5)
    answers = [entry["prediction"] for entry in read_jsonl(folder / "predictions.jsonl")]
    answers_found = read_jsonl(tmp_path / "report" / "predictions.jsonl")
    assert [entry["prediction"] for entry in answers_found] == answers


def test_an_engine_of_synthesize_answers_as_on_the_cpu(llm_dir):
    questions = [elm.Question("What is it?", "alpha beta"), elm.Question("Say it.", "gamma")]

    def answer() -> list[elm.Answer]:
        engine = elm.LLMEngine(str(llm_dir), False, {}, 12)
        return engine.answer(questions, seed=0, temperature=0.0)

    on_cpu = answer()
    with SimulatedCuda() as gpu:
        assert answer() == on_cpu
    assert gpu.costs.num_kernels["mm"] > 0


def test_embed_makes_the_vectors_of_the_cpu(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("A short text.\nAnother text, a little longer than the first.\nThe third.\n")
    options = prepare.EmbedOptions(model=str(ROOT / "data" / "tiny" / "embedder"), bf16=False)
    prepare.embed(options, texts, tmp_path / "cpu.safetensors")
    with SimulatedCuda() as gpu:
        prepare.embed(options, texts, tmp_path / "device.safetensors")
    assert gpu.costs.num_kernels["mm"] > 0
    on_cpu = elm.open_vectors(tmp_path / "cpu.safetensors")
    on_device = elm.open_vectors(tmp_path / "device.safetensors")
    assert torch.allclose(on_device, on_cpu, atol=1e-6)


# -----------------------------------------------------------------------------
# Faults


class Parts(NamedTuple):
    """An LLM of several query heads to a head of keys, rows, and a step on the CPU."""

    llm: Path
    split: elm.Split
    loss: float
    gradient: torch.Tensor


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    """Gemma 3 has layers with sliding windows, which are shorter than the rows, and here a scale of
    its own."""
    folder = tmp_path_factory.mktemp("parts")
    llm = make_llm(folder / "llm", "gemma3_text", query_pre_attn_scalar=16)
    prompt = elm.Prompt(AutoTokenizer.from_pretrained(llm))
    split = open_train(make_data(folder / "data"), prompt, 2)
    model = build_elm(llm, split, bf16=True)
    loss, gradient, _ = elm_step(model, split, np.arange(12), 200)
    return Parts(llm, split, loss, gradient)


def check_step(parts: Parts) -> None:
    """A step in several micro-batches has the loss and the gradient of the CPU, and does not
    wait."""
    with SimulatedCuda() as gpu:
        model = build_elm(parts.llm, parts.split, "cuda", bf16=True)
        loss, gradient, num_batches = elm_step(model, parts.split, np.arange(12), 200)
        difference = (gradient.cpu() - parts.gradient).norm() / parts.gradient.norm()
    assert num_batches > 1
    assert abs(loss - parts.loss) < 1e-3 * parts.loss, "another loss"
    assert difference < 1e-2, "another gradient"
    assert waits_in_gradient(gpu.waits) == [], "the host waits"


def check_open_split(parts: Parts) -> None:
    with SimulatedCuda():
        split = open_train(parts.split.path.parent.parent, parts.split.encoder.prompt, 2)
    assert (split.index == parts.split.index).all()


def check_probe(parts: Parts) -> None:
    expected = elm.fit_probe(build_elm(parts.llm, parts.split), parts.split)
    with SimulatedCuda():
        model = build_elm(parts.llm, parts.split, "cuda")
        probe = elm.fit_probe(model, parts.split)
        found = [tensor.cpu() for tensor in probe]
    for name, tensor, tensor_of_cpu in zip(probe._fields, found, expected, strict=True):
        assert torch.allclose(tensor, tensor_of_cpu, atol=1e-4), name


def leave_ids_on_the_host(monkeypatch) -> None:
    move = elm.Batch.to

    def move_all_but_ids(self, device):
        return dataclasses.replace(move(self, device), input_ids=self.input_ids)

    monkeypatch.setattr(elm.Batch, "to", move_all_but_ids)


def widen_bounds(monkeypatch) -> None:
    collate = elm.collate

    def collate_in_int64(*args, **options):
        batch = collate(*args, **options)
        return dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens.long().pin_memory())

    monkeypatch.setattr(elm, "collate", collate_in_int64)


def change_windows(monkeypatch, change: Callable[[tuple[int, int]], tuple[int, int]]) -> None:
    attend = varlen.varlen_attn

    def attend_otherwise(*args, window_size, **options):
        return attend(*args, window_size=change(window_size), **options)

    monkeypatch.setattr(varlen, "varlen_attn", attend_otherwise)


def see_later_tokens(monkeypatch) -> None:
    change_windows(monkeypatch, lambda window: (window[0], -1))


def see_one_token_more(monkeypatch) -> None:
    def widen(window: tuple[int, int]) -> tuple[int, int]:
        left, right = window
        return (left if left < 0 else left + 1, right)

    change_windows(monkeypatch, widen)


def look_at_each_loss(monkeypatch) -> None:
    sequence_nll = elm.ELM.sequence_nll

    def look(self, hidden, batch):
        nll = sequence_nll(self, hidden, batch)
        assert nll.sum().item() > 0
        return nll

    monkeypatch.setattr(elm.ELM, "sequence_nll", look)


def keep_groups_secret(monkeypatch) -> None:
    elm.varlen_names_gqa.cache_clear()
    monkeypatch.setattr(elm, "varlen_names_gqa", lambda: False)


def forget_to_copy(monkeypatch) -> None:
    def near_equal_pairs(vectors, vector_ids):
        chosen = vectors[torch.from_numpy(vector_ids)].to(elm.find_device())
        unit = F.normalize(chosen.float(), dim=1)
        first, second = (unit @ unit.T > elm.NEAR_EQUAL).numpy().nonzero()
        yield vector_ids[first], vector_ids[second]

    monkeypatch.setattr(elm, "near_equal_pairs", near_equal_pairs)


def leave_mask_on_the_host(monkeypatch) -> None:
    chunk = elm.FitChunk
    monkeypatch.setattr(elm, "FitChunk", lambda x, y, is_heldout: chunk(x, y, is_heldout.cpu()))


class Fault(NamedTuple):
    plant: Callable[[pytest.MonkeyPatch], None]
    check: Callable[[Parts], None]
    message: str  # of the error by which it is seen


FAULTS = [
    Fault(leave_ids_on_the_host, check_step, "on the same device"),
    Fault(widen_bounds, check_step, "must be contiguous int32"),
    Fault(see_later_tokens, check_step, "another loss"),
    Fault(see_one_token_more, check_step, "another gradient|another loss"),
    Fault(look_at_each_loss, check_step, "the host waits"),
    Fault(forget_to_copy, check_open_split, "to numpy"),
]
if elm.varlen_names_gqa():  # else torch finds the groups by itself
    FAULTS.append(Fault(keep_groups_secret, check_step, "same number of heads"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.plant.__name__)
def test_a_fault_is_seen(monkeypatch, parts, fault):
    fault.check(parts)
    fault.plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError), match=fault.message):
        fault.check(parts)


def test_a_mask_of_the_host_is_not_seen(monkeypatch, parts):
    """CUDA takes indices of the host, too: it copies them, and the host waits, as it does where a
    mask of the device is counted. The probe is the same."""
    check_probe(parts)
    leave_mask_on_the_host(monkeypatch)
    check_probe(parts)


# -----------------------------------------------------------------------------
# tests/test_gpu.py


def test_the_tests_of_a_gpu_pass_on_it(processes):
    """All but test_two_gpus: the simulation has one device, and no NCCL."""
    words = ["-m", "pytest", "-p", "on_simulated_cuda", "-p", "no:cacheprovider", "-m", "", "-q",
             "--deselect", "tests/test_gpu.py::test_two_gpus", "tests/test_gpu.py"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=3600,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")})  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed, 1 deselected", done.stdout), done.stdout[-3000:]


# -----------------------------------------------------------------------------
# The simulation itself


def attend(q, k, v, window: tuple[int, int]) -> list[torch.Tensor]:
    """varlen_attn of rows of 5, 30 and 1 tokens on the device: its output and its gradients."""
    with SimulatedCuda():
        bounds = torch.tensor([0, 5, 35, 36], dtype=torch.int32, device="cuda")
        inputs = [x.to("cuda").requires_grad_() for x in (q, k, v)]
        options = {"enable_gqa": True} if elm.varlen_names_gqa() else {}
        out = varlen.varlen_attn(
            *inputs, bounds, bounds, 30, 30, scale=0.3, window_size=window, **options)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        return [x.detach().cpu().float() for x in (out, *gradients)]


@pytest.mark.parametrize("sliding_window", [None, 1, 8])
def test_varlen_attn_is_the_attention_of_the_cpu(sliding_window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(36, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    found = attend(q, k, v, window)
    inputs = [x.float().requires_grad_() for x in (q, k, v)]
    out = elm.attention_by_example(
        *(x.transpose(0, 1)[None] for x in inputs), 0.3, [5, 30, 1], sliding_window, None)[0]
    expected = [out, *torch.autograd.grad(out.square().sum(), inputs)]
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() < 1e-2 * y.norm() + 1e-3  # 0: a query of one key does not matter


def test_the_memory_of_a_card():
    """What does not fit is refused, and is counted while something refers to it."""
    with SimulatedCuda(limit=2**20) as gpu:
        assert torch.cuda.get_device_properties(0).total_memory == 2**20
        kept = torch.empty(2**19, dtype=torch.uint8, device="cuda")
        view = kept[10:]
        assert gpu.alive == 2**19
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**19 + 1, dtype=torch.uint8, device="cuda")
        del kept
        assert gpu.alive == 2**19
        del view
        assert torch.cuda.mem_get_info() == (2**20, 2**20)
        torch.empty(1, device="cuda")
        assert gpu.alive == 0
        gpu.reset_peak()
        assert gpu.peak == 0


@pytest.mark.parametrize("values", [True, False])
def test_memory_that_a_backward_pass_lacks(values):
    """The layer keeps nothing of its forward pass, and all when it is recomputed, where an error
    would end the process."""

    def layer(x):
        return x.sin().sin().sin().sin()

    with SimulatedCuda(values, limit=4 * 4096) as gpu:
        x = torch.ones(1024, device="cuda", requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum()
        with pytest.raises(torch.OutOfMemoryError):
            y.backward()
        del x, y
        assert gpu.alive == 0  # the error holds nothing


def test_shapes_alone_cost_what_values_cost(parts):
    """The same operations, and as much memory but for the workspace of varlen_attn's backward pass,
    which is counted of shapes only."""
    on_values = step_costs(parts, values=True)
    on_shapes = step_costs(parts, values=False)
    assert on_shapes.costs.num_kernels == on_values.costs.num_kernels
    assert on_shapes.costs.flops == on_values.costs.flops
    assert on_shapes.costs.num_bytes == on_values.costs.num_bytes
    assert 1 <= on_shapes.peak / on_values.peak < 1.5


def step_costs(parts: Parts, values: bool) -> SimulatedCuda:
    """A device that has run a step in bf16."""
    with SimulatedCuda(values) as gpu:
        frozen = elm.load_llm(str(parts.llm), torch.device("cuda", 0), True)
        adapter = elm.fresh_adapter(frozen, parts.split.statistics, hidden_dim=24, tokens=2)
        model = elm.ELM(frozen, adapter.to("cuda"), parts.split.encoder.prompt)
        gpu.costs.clear()
        gpu.reset_peak()
        elm_step(model, parts.split, np.arange(12), 200)
    return gpu


def test_flops_and_bytes():
    """Of a product, and of attention in a row of 5, 30 and 1 tokens with a window of 8."""
    with SimulatedCuda(values=False) as gpu:
        a = torch.empty(10_000, 20_000, dtype=torch.bfloat16, device="cuda")
        product = a @ a.T
        assert product.shape == (10_000, 10_000)
        assert gpu.costs.flops[torch.bfloat16] == 2 * 10_000 * 20_000 * 10_000
        assert gpu.costs.num_bytes == 2 * (2 * a.numel() + product.numel())
        assert gpu.costs.seconds["mm"] == pytest.approx(4e12 / 790e12)
        gpu.costs.clear()
        row = torch.empty(36, 4, 16, dtype=torch.bfloat16, device="cuda")
        bounds = torch.tensor([0, 5, 35, 36], dtype=torch.int32).to("cuda")
        varlen.varlen_attn(row, row, row, bounds, bounds, 30, 30, window_size=(7, 0))
        num_pairs = 15 + (28 + 23 * 8) + 1
        assert gpu.costs.flops[torch.bfloat16] == 2 * 2 * num_pairs * 4 * 16


def test_integers_and_masks_keep_their_values_without_the_others():
    with SimulatedCuda(values=False):
        mask = torch.tensor([True, False, True]).to("cuda")
        x = torch.zeros(3, 5, device="cuda")
        assert x[~mask].shape == (1, 5)
        assert (~mask).sum().item() == 1
        failed = torch.zeros((), device="cuda")
        failed += 1
        assert failed.item() == 1
        failed += x.sum()
        assert failed.inner.device.type == "meta"


@pytest.mark.parametrize("gigabytes, rows, answers", [(12, 4, 4), (24, 17, 17), (141, 64, 148)])
def test_a_batch_is_as_large_as_the_card_allows(gigabytes, rows, answers):
    """At the shape of Qwen3-4B, of rows of 2,048 tokens and of prompts of 2,000."""
    with SimulatedCuda(values=False, limit=int(plan_4b.CARDS[gigabytes] * plan_4b.GIB)):
        llm = plan_4b.load_on_card(Qwen3ForCausalLM)
        model = SimpleNamespace(llm=llm, device=llm.device)
        assert elm.rows_at_once(model, 2048) == rows
        assert elm.answers_at_once(llm, 2000, 256) == answers


def test_the_warm_start_hardly_grows_with_the_vectors(monkeypatch):
    """A small LLM: four times as many vectors and words need no more memory on the card than a
    fifth."""
    monkeypatch.setattr(plan_4b, "SHAPE", plan_4b.SHAPE | {
        "hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 256})
    monkeypatch.setattr(plan_4b, "WIDTH", 256)
    monkeypatch.setattr(elm, "ROWS_OF_CHUNK", 512)
    monkeypatch.setattr(elm, "LISTS_OF_CHUNK", 512)
    peaks = []
    for factor in (1, 4):
        monkeypatch.setattr(plan_4b, "NUM_WARM_START_VECTORS", 1024 * factor)
        monkeypatch.setattr(plan_4b, "NUM_WORDS", 10_000 * factor)
        with SimulatedCuda(values=False) as gpu:
            model = plan_4b.load_elm()
            weights = gpu.alive
            gpu.reset_peak()
            plan_4b.warm_start(model)
            peaks.append(gpu.peak - weights)
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.slow
def test_a_run_at_the_shape_of_4b_fits_a_card_of_12_gb():
    """From the weights to the report; the warm start, at its largest, needs less than the steps."""
    card = plan_4b.Card(plan_4b.CARDS[12], in_nf4=False)
    card.run()
    print(card.plan, card.peaks)
    assert list(card.peaks) == [
        "weights", "warm start", "steps", "losses", "answers", "embedder"]
    assert max(card.peaks, key=card.peaks.get) == "steps"


def test_the_first_minutes_on_a_gpu_rehearsed(processes, tmp_path):
    words = [sys.executable, str(ROOT / "tests/first_gpu.py"), str(tmp_path), "--rehearse"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["versions", "attention", "plans", "answers", "losses"]
    assert "FAILED" not in json.dumps(results)
    assert results["attention"]["out"] < 4e-3
    assert len(results["plans"]) == len(first_gpu.EXPECTED_PEAKS)


def test_waits_of_the_host():
    def reasons(operation) -> list[str]:
        with SimulatedCuda() as gpu:
            x = torch.zeros(4, device="cuda")
            mask = torch.ones(4, device="cuda") > 0
            num_before = len(gpu.waits)
            operation(x, mask)
            return [wait.reason for wait in gpu.waits[num_before:]]

    pageable = torch.ones(4)
    assert reasons(lambda x, mask: x + 1) == []
    assert reasons(lambda x, mask: torch.full((), 2.0, device="cuda")) == []
    assert reasons(lambda x, mask: torch.tensor(2.0, device="cuda")) == ["copy to the device"]
    assert reasons(lambda x, mask: pageable.to("cuda", non_blocking=True)) == ["copy to the device"]
    assert reasons(lambda x, mask: pageable.pin_memory().to("cuda")) == ["copy to the device"]
    assert reasons(
        lambda x, mask: pageable.pin_memory().to("cuda", non_blocking=True)) == []
    assert reasons(lambda x, mask: x.copy_(pageable)) == ["copy to the device"]
    assert reasons(lambda x, mask: pageable.copy_(x)) == ["copy to the host"]
    assert reasons(lambda x, mask: x.cpu()) == ["copy to the host"]
    assert reasons(lambda x, mask: x.tolist()) == ["copy to the host"]
    assert reasons(lambda x, mask: bool(x[0])) == ["_local_scalar_dense"]
    assert reasons(lambda x, mask: x[mask]) == ["index by a mask"]
    assert reasons(lambda x, mask: x[torch.tensor([0, 1])]) == ["index of the host"]
    assert reasons(lambda x, mask: x.nonzero()) == ["nonzero"]


def test_a_wait_is_an_error_if_one_asks_for_it():
    with SimulatedCuda():
        x = torch.zeros(4, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing"):
            x.sum().item()
        torch.cuda.set_sync_debug_mode("default")
        assert x.sum().item() == 0


def test_tied_parameters_stay_tied(llm_dir):
    with SimulatedCuda():
        llm = elm.load_llm(str(llm_dir), torch.device("cuda", 0), True)
        assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
        assert llm.get_input_embeddings().weight.is_cuda


def test_nothing_is_left_behind():
    with SimulatedCuda():
        assert torch.cuda.is_available()
        elm.find_device()
    assert not torch.cuda.is_available()
    assert not torch.accelerator.is_available()
    assert elm.find_device() == torch.device("cpu")


def test_another_torch_is_named(monkeypatch):
    assert missing_interface() == ""
    monkeypatch.delattr(torch._C, "_set_only_lift_cpu_tensors")
    assert "torch._C._set_only_lift_cpu_tensors" in missing_interface()
