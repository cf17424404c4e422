"""The ELM: adapter, losses, answers, which LLMs it takes, and what it leaves alone."""

import inspect
import json
import math
import os
import shutil
import string
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import bert_score
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    CHAT,
    CPU,
    EVERY_ARCHITECTURE,
    NO_TABLES,
    PROMPT,
    ROOT,
    build_elm,
    command,
    go,
    limit_memory,
    make_data,
    make_llm,
    open_train,
    read_jsonl,
    read_table,
    refused,
    rows_path,
    vectors_path,
    write_rows,
)
from naive import elm_step, naive_loss, naive_step, token_rows
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoTokenizer

import elm


@pytest.fixture(scope="module", params=EVERY_ARCHITECTURE)
def parts(request, tmp_path_factory):
    """(ELM, train split) for each architecture, with 2 soft tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    make_llm(folder / "llm", request.param)
    prompt = elm.Prompt(AutoTokenizer.from_pretrained(folder / "llm"))
    split = open_train(make_data(folder / "data"), prompt, 2)
    model = build_elm(folder / "llm", split)
    model.llm.set_attn_implementation("eager")  # the reference: SDPA drops Gemma 2's softcap
    return model, split


@pytest.fixture
def plain(llm_dir, data_dir):
    """(ELM, its train split): vectors of very different norms."""
    torch.manual_seed(0)
    spread = read_table(data_dir) * (0.4 * torch.randn(10, 1)).exp()
    save_file({"x": spread}, vectors_path(data_dir))
    split = open_train(data_dir, PROMPT)
    return build_elm(llm_dir, split), split


# ------------------------------------------------------------------ the adapter


def test_adapter_has_the_size_of_the_contract():
    with torch.device("meta"):
        adapter = elm.Adapter(2560, 4096, 2560)
        other = elm.Adapter(1024, 4096, 2560, tokens=4)
    counts = {name: p.numel() for name, p in adapter.named_parameters()}
    assert counts.pop("norm.weight") <= 5120
    assert sum(counts.values()) == 20_978_176
    assert other.residual.weight.shape == (2560, 1024) and other.residual.bias is None
    assert other(torch.empty(7, 1024, device="meta")).shape == (7, 4, 2560)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("d_llm", [12, 20])
def test_adapter_is_its_formula(d_llm, tokens):
    adapter = elm.Adapter(12, 16, d_llm, tokens, residual_scale=0.5).eval()
    adapter.scale *= 0.03
    adapter.mean += 1.0
    adapter.std *= 2.0
    adapter.norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(5, 12)
    z = (x - 1.0) / 2.0
    hidden = F.gelu(z @ adapter.fc1.weight.T + adapter.fc1.bias)
    out = (hidden @ adapter.fc2.weight.T + adapter.fc2.bias).view(5, tokens, d_llm)
    residual = z if d_llm == 12 else z @ adapter.residual.weight.T
    out = out + 0.5 * residual[:, None]
    rms = out.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(adapter(x), out / rms * adapter.norm.weight * 0.03)


def test_a_fresh_adapter_has_the_volume_of_the_token_embeddings(parts):
    model, split = parts
    ids = torch.arange(model.llm.config.get_text_config().vocab_size)
    wanted = model.llm.get_input_embeddings()(ids).float().square().mean().sqrt()
    found = model(split.vectors).square().mean().sqrt()
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)


# ------------------------------------------------------------------ losses


def count_passes(llm) -> list:
    """A list that grows by 1 with each pass through an MLP of the LLM."""
    passes = []
    for name, module in llm.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def test_loss_and_gradient_agree_with_the_naive_reference(parts, monkeypatch):
    """Every combination: recomputed layers, one micro-batch or several, whole logits or chunks."""
    naive, split = parts
    row_ids = np.arange(12)
    loss, gradient = naive_step(naive.llm, naive.adapter, [token_rows(split, row_ids)])
    naive.llm.gradient_checkpointing_disable()
    naive.llm.eval()

    model = build_elm(naive.llm.name_or_path, split)
    elm.check_llm(model)
    passes = count_passes(model.llm)

    def check(num_recomputed, budget, max_logits):
        elm.recompute_layers(model.llm, num_recomputed / 2)  # of two layers
        monkeypatch.setattr(elm, "MAX_LOGITS_AT_ONCE", {"cpu": max_logits})
        passes.clear()
        found, at_adapter, num_micro_batches = elm_step(model, split, row_ids, budget)
        assert num_micro_batches == 1 if budget == 100_000 else num_micro_batches > 2
        assert abs(found - loss) / loss < 1e-5
        assert (at_adapter - gradient).norm() / gradient.norm() < 1e-5
        assert len(passes) == num_micro_batches * (2 + num_recomputed)

    vocab_size = model.llm.config.get_text_config().vocab_size
    for num_recomputed in (2, 0, 1):
        for budget in (100_000, 150):
            for max_logits in (2**24, 7 * vocab_size):
                check(num_recomputed, budget, max_logits)
    assert all(p.grad is None for p in model.llm.parameters())


@pytest.fixture(params=["qwen3", "gpt2", "gemma2"])
def in_bf16(request, tmp_path, data_dir):
    """(ELM whose LLM is in bf16, its train split): plain, with a table of positions, with windows
    and soft-caps."""
    make_llm(tmp_path / "llm", request.param)
    prompt = elm.Prompt(AutoTokenizer.from_pretrained(tmp_path / "llm"))
    split = open_train(data_dir, prompt, 2)
    model = build_elm(tmp_path / "llm", split, bf16=True)
    elm.check_llm(model)
    return model, split


def test_padding_on_a_cpu_in_bf16_changes_no_loss_or_gradient(in_bf16, monkeypatch):
    model, split = in_bf16

    def steps():
        for budget in (100_000, 150):
            loss, gradient, _ = elm_step(model, split, np.arange(11), budget)
            yield loss, gradient

    padded = list(steps())
    monkeypatch.setattr(elm, "ROWS_MULTIPLE", 1)
    for (loss, gradient), (loss_alone, gradient_alone) in zip(padded, steps(), strict=True):
        assert abs(loss - loss_alone) / loss_alone < 1e-4
        assert (gradient - gradient_alone).norm() / gradient_alone.norm() < 1e-2


class ProductsInBf16(TorchDispatchMode):
    """Notes the rows of each product of matrices in bf16, and the shapes of attention in it."""

    def __init__(self):
        super().__init__()
        self.rows = []
        self.attention = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16]
        if tensors and name in ("aten::mm", "aten::addmm"):
            self.rows.append(len(tensors[-2]))
        if tensors and ("attention" in name or name == "aten::bmm"):
            self.attention.append(tensors[0].shape)
        return function(*args, **(kwargs or {}))


def test_few_shapes_occur_on_a_cpu_in_bf16(in_bf16):
    """oneDNN keeps kernels for each: the process would grow with each micro-batch."""
    model, split = in_bf16
    rng = np.random.default_rng(0)
    lengths = set()
    with ProductsInBf16() as products:
        for _ in range(10):
            row_ids = rng.permutation(len(split))[: rng.integers(2, 12)]
            examples = split.examples(row_ids)
            lengths.add(sum(len(example.ids) for example in examples))
            elm_step(model, split, row_ids, 100_000)
    assert len(lengths) > 8
    assert {rows % 32 for rows in products.rows} == {0}
    assert products.attention == []


def random_prompts(model, lengths):
    generator = torch.Generator().manual_seed(0)
    embed = model.llm.get_input_embeddings()
    return [embed(torch.randint(40, 90, (length,), generator=generator)) for length in lengths]


def test_prompts_of_many_lengths_give_few_shapes_on_a_cpu_in_bf16(in_bf16):
    """Of the products of matrices, and of the attention to the prompt."""
    model, _ = in_bf16
    shapes = set()
    for length in (34, 47, 50, 63, 64):
        with ProductsInBf16() as products:
            elm.generate_batch(model.llm, model.prompt, random_prompts(model, [length, 33]), 1)
        assert products.rows
        shapes.add((tuple(products.rows), tuple(products.attention)))
    assert len(shapes) == 1


def test_padding_on_a_cpu_in_bf16_changes_no_answer(in_bf16, monkeypatch):
    """Nor does it take an answer's room, in a context of 512."""
    model, _ = in_bf16

    def answer(*lengths):
        prompts = random_prompts(model, lengths)
        return elm.generate_batch(model.llm, model.prompt, prompts, 12, min_new_tokens=7)

    padded = [answer(33, 5, 40), answer(1), answer(505)]
    monkeypatch.setattr(elm, "ROWS_MULTIPLE", 1)
    assert padded == [answer(33, 5, 40), answer(1), answer(505)]


def scale_logits(kind: str, logits: torch.Tensor) -> torch.Tensor:
    """As the tiny LLM of the architecture does, by its config."""
    if kind == "cohere":
        return 0.25 * logits
    if kind == "granite":
        return logits / 4
    return 30 * torch.tanh(logits / 30)


@pytest.mark.parametrize("kind", ["cohere", "granite", "gemma2"])
@torch.no_grad()
def test_the_head_scales_logits_as_the_llm_does(tmp_path, kind):
    llm = elm.load_llm(str(make_llm(tmp_path, kind)), CPU, bf16=False)
    model = elm.ELM(llm, elm.Adapter(12, 24, 32), PROMPT)
    hidden = 60 * torch.randn(7, 32)
    unscaled = hidden @ llm.get_output_embeddings().weight.T
    logits = model.lm_head(hidden)
    torch.testing.assert_close(logits, scale_logits(kind, unscaled))
    assert (logits - unscaled).abs().mean() > 0.1 * unscaled.abs().mean()

    ids = torch.arange(20)[None]
    last_hidden = llm.base_model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(model.lm_head(last_hidden), llm(input_ids=ids).logits[0])


def test_loss_of_vectors_in_memory_is_the_naive_loss(parts):
    """ELM.loss: numpy or torch, a query each or one for all, [E] for a single one."""
    model, split = parts
    row_ids = np.arange(5)
    rows = split.read(row_ids)
    vectors = split.embeddings(split.index["vector_id"][row_ids])
    queries = [row.query for row in rows]
    responses = [row.response for row in rows]
    parameters = list(model.adapter.parameters())
    examples = token_rows(split, row_ids)
    wanted = naive_loss(model.llm, model.adapter, examples) / sum(n for _, n, _ in examples)
    wanted_gradient = torch.autograd.grad(wanted, parameters)
    for given in (vectors, vectors.double().numpy()):
        loss = model.loss(given, queries, responses)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        gradient = torch.autograd.grad(loss, parameters)
        for found, naive in zip(gradient, wanted_gradient, strict=True):
            assert (found - naive).norm() <= 1e-5 * naive.norm() + 1e-7
    same = model.loss(vectors[:2], queries[0], responses[:2])
    assert torch.equal(same, model.loss(vectors[:2], [queries[0]] * 2, responses[:2]))
    single = model.loss(vectors[0], queries[0], responses[:1])
    assert torch.equal(single, model.loss(vectors[:1].numpy(), queries[0], responses[:1]))


def test_a_loss_that_cannot_be_is_refused(plain):
    model, split = plain
    vectors = split.vectors[:5]
    responses = ["yes"] * 5
    for message, *arguments in (
        ("4 queries or responses for 5 vectors", vectors, ["What?"] * 4, responses),
        (r"\[5, 7\], but the adapter reads \[n, 12\]", vectors[:, :7], "What?", responses),
        ("row 0 is zero, NaN or infinite", vectors * torch.nan, "What?", responses),
        ("one <EMB> at most", vectors, "<EMB> <EMB>", responses),
        ("pair 0: the prompt takes all", vectors, "long " * 999, responses),
    ):
        with pytest.raises(elm.UserError, match=message):
            model.loss(*arguments)
    with pytest.raises(elm.UserError, match="^embeddings: vector 0 is zero"):
        elm.ELM.create(model.llm.name_or_path, vectors * 0)


def test_chunked_cross_entropy_is_cross_entropy():
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, dtype=torch.float64)
    labels = torch.randint(17, (11,))
    rows_of_calls = []

    def head(h):
        rows_of_calls.append(len(h))
        return torch.tanh(h @ weight.T) * 3.0

    def chunked(hidden):
        return elm.ChunkedCrossEntropy.apply(hidden, labels, head, 3)

    wanted = F.cross_entropy(head(hidden), labels, reduction="none")
    mix = torch.randn(11, dtype=torch.float64)
    (reference,) = torch.autograd.grad(wanted @ mix, hidden)
    rows_of_calls.clear()
    found = chunked(hidden)
    assert rows_of_calls == [4, 4, 3]  # and none of them again in the backward pass
    (gradient,) = torch.autograd.grad(found.double() @ mix, hidden)
    assert rows_of_calls == [4, 4, 3]
    torch.testing.assert_close(found, wanted.float())
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked(hidden), wanted.float())


def allocated_bytes(function, path) -> list[int]:
    """What `function` allocates, and by negative numbers frees, in order. By torch's profiler,
    which writes it into `path`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_bytes())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return [event["args"]["Bytes"] for event in events]


@pytest.mark.parametrize("with_gradient", [True, False])
def test_only_a_chunk_of_the_logits_exists_at_once(tmp_path, data_dir, monkeypatch, with_gradient):
    """No tensor is larger than the limit, nor are all together than three of that size and two of
    the hidden states'."""
    split = open_train(data_dir, PROMPT)
    model = build_elm(make_llm(tmp_path / "llm", vocab_size=2000), split)
    batch = elm.collate(split.examples(range(10)))
    hidden = torch.randn(len(batch.input_ids), 32)
    num_logits = 2000 * len(batch.labels)

    def run():
        with torch.set_grad_enabled(with_gradient):
            losses = model.sequence_nll(hidden.clone().requires_grad_(with_gradient), batch)
        if with_gradient:
            losses.sum().backward()

    limit = 50 * 2000
    assert limit < num_logits / 5
    for max_logits in (2**24, limit):
        monkeypatch.setattr(elm, "MAX_LOGITS_AT_ONCE", {"cpu": max_logits})
        run()  # what is allocated once for all
        sizes = allocated_bytes(run, tmp_path / "trace.json")
        largest = max(sizes) / 4
        peak = max(np.cumsum(sizes)) / 4
        if max_logits == limit:
            assert largest <= limit and peak <= 3 * limit + 2 * hidden.numel()
        else:
            assert largest == num_logits and peak >= 2 * num_logits


def test_recomputation_is_as_configured(plain):
    """On a CPU, where no memory is planned; test_gpu.py has the plans for a GPU."""
    model, _ = plain
    for setting, num_layers in (("auto", 0), (True, 2), (False, 0)):
        assert elm.plan_memory(model, 256, setting, elm.LossConfig(), None) == 1024
        assert sum("forward" in vars(m) for m in model.llm.modules()) == num_layers


def bytes_kept(function) -> int:
    """Of all storages that autograd keeps for the backward pass of what `function` returns."""
    storages = {}
    tensors = []  # alive, so that no address is used twice

    def pack(tensor):
        tensors.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind, num_modules", [
    ("qwen3", 11),  # of two layers: four norms and an MLP each, and the last norm
    ("llama", 7),
    ("gemma3_text", 15),
    pytest.param("gemma2", 11, marks=pytest.mark.slow),
    pytest.param("granite", 7, marks=pytest.mark.slow),
    pytest.param("cohere", 2, marks=pytest.mark.slow),  # a LayerNorm of its own form
    ("gpt2", 0),
])
def test_layers_that_keep_less_give_the_same(tmp_path, data_dir, kind, num_modules, bf16):
    """The loss to the bit; gradients as far as the order of sums allows."""
    split = open_train(data_dir, PROMPT, 2)
    model = build_elm(make_llm(tmp_path / "llm", kind), split, bf16=bf16)
    batch = elm.collate(split.examples(range(12)))
    soft_tokens = torch.zeros(12, 2, 32, requires_grad=True)
    rows = np.arange(12)
    expected_loss, expected, _ = elm_step(model, split, rows, 1000)
    kept = bytes_kept(lambda: model.forward_hidden(batch, soft_tokens))
    assert elm.keep_less(model.llm) == num_modules
    loss, gradient, _ = elm_step(model, split, rows, 1000)
    assert loss == expected_loss
    error = ((gradient - expected).norm() / expected.norm()).item()
    assert error < (2e-3 if bf16 else 1e-6)
    kept_now = bytes_kept(lambda: model.forward_hidden(batch, soft_tokens))
    if num_modules > 2:  # in fp32 the input of a norm is no smaller
        assert kept_now < (0.9 if bf16 else 1.0) * kept


def test_norms_of_several_heads_keep_their_own_forward(tmp_path, data_dir):
    """Of Command R+: their weight has two dimensions."""
    split = open_train(data_dir, PROMPT, 2)
    model = build_elm(make_llm(tmp_path / "llm", "cohere", use_qk_norm=True), split)
    assert elm.keep_less(model.llm) == 2  # the MLPs


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("is_gemma", [False, True])
def test_the_gradient_of_a_lean_norm_is_that_of_its_formula_in_fp64(dtype, tolerance, is_gemma):
    torch.manual_seed(0)
    x = (3 * torch.randn(5, 64)).to(dtype).requires_grad_()
    weight = torch.randn(64).to(dtype)
    scale = 1.0 + weight.float() if is_gemma else weight
    upstream = torch.randn(5, 64).to(dtype)
    (found,) = torch.autograd.grad(elm.FrozenNorm.apply(x, scale, 1e-6), x, upstream)
    exact = x.detach().double().requires_grad_()
    normalised = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    (expected,) = torch.autograd.grad(scale.double() * normalised, exact, upstream.double())
    assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "relu"])
def test_the_gradient_of_a_gated_product_is_right(name):
    torch.manual_seed(0)
    activation = transformers.activations.ACT2FN[name]
    gate = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b: elm.GatedProduct.apply(a, b, activation), (gate, up))


def test_a_trial_pass_says_whether_memory_suffices(plain, monkeypatch):
    """It leaves gradients alone."""
    model, _ = plain
    for p in model.adapter.parameters():
        p.grad = torch.ones_like(p)
    limit_memory(monkeypatch, 512)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    probe = elm.Probe(torch.randn(32, 12), torch.zeros(32), torch.zeros(12))
    cfg = elm.LossConfig(drift_weight=0.5)
    found = [elm.fits_in_memory(model, n, 128, cfg, probe) for n in (128, 512, 1024, 512)]
    assert found == [True, True, False, True]
    assert all((p.grad == 1).all() for p in model.adapter.parameters())


def test_the_llm_never_drops_out(parts):
    naive, split = parts
    model = build_elm(naive.llm.name_or_path, split, dropout=0.5).train()
    assert model.adapter.training and not any(m.training for m in model.llm.modules())
    batch = elm.collate(split.examples([0]), split.embeddings(split.index["vector_id"][[0]]))
    assert not torch.equal(model.nll(batch), model.nll(batch))  # the adapter does
    prompts = [torch.cat(model.prompt_embeds(split.vectors[:3], "What?")) for _ in range(2)]
    assert torch.equal(*prompts)  # but not in answers
    model.eval()
    assert torch.equal(model.nll(batch), model.nll(batch))


def test_learning_rate_is_a_function_of_the_step():
    cfg = elm.TrainConfig(lr=1.0, warmup_steps=4)
    rates = [elm.lr_at(step, 12, cfg) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == 0.5 and rates[11] == 0.125 and rates[12] == 0.0
    assert elm.lr_at(0, 5, elm.TrainConfig(lr=2.0, warmup_steps=0)) == 2.0
    assert elm.lr_at(99, 5, elm.TrainConfig(lr=2.0, warmup_steps=0)) == 0.0
    assert elm.lr_at(2, 3, cfg) == 0.75  # warm-up longer than the run


def test_the_warm_up_is_a_tenth_of_a_short_run():
    cfg = elm.TrainConfig(lr=1.0)
    assert [elm.lr_at(step, 20, cfg) for step in range(4)] == [0.5, 1.0, 1.0, 17 / 18]
    assert elm.lr_at(0, 9, cfg) == 1.0
    assert elm.warmup_steps(10_000, cfg) == elm.warmup_steps(10**6, cfg) == 1000


# ------------------------------------------------------------------ answers


def test_generation_is_the_same_in_batches_and_from_prompt_embeds(parts):
    """For numpy and torch, [n, E] and [E]."""
    model, split = parts
    llm = model.llm
    tok = split.encoder.prompt.tokenizer
    vectors = split.vectors[:3]
    queries = ["What?", "A longer query than the others, so it is padded.", "<EMB>: say it"]
    together = model.generate(vectors, queries, max_new_tokens=12)
    assert model.generate(vectors.numpy(), queries, 12, batch_size=2) == together
    if llm.config.model_type not in ("gpt2", "gemma"):  # at random these repeat one token
        assert len(set(together)) > 1
    assert len(model.generate(vectors[0], 465 * "x", 99)) == 1  # of an LLM of 512 positions
    prompts = model.prompt_embeds(vectors.numpy(), queries)
    for vector, query, answer, embeds in zip(vectors, queries, together, prompts, strict=True):
        assert model.generate(vector, query, 12) == model.generate(vector.numpy(), [query], 12)
        assert model.generate(vector, query, 12) == [answer]
        torch.testing.assert_close(model.prompt_embeds(vector, query), embeds)
        assert embeds.ndim == 2 and embeds.shape[1] == 32
        out = llm.generate(
            inputs_embeds=embeds[None], max_new_tokens=12, do_sample=False,
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            pad_token_id=0, eos_token_id=tok.eos_token_id)  # fmt: skip
        assert tok.batch_decode(out, skip_special_tokens=True) == [answer]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2", "gemma"])
@torch.no_grad()
def test_a_cached_token_has_the_bytes_that_a_cache_holds(tmp_path, kind):
    llm = elm.load_llm(str(make_llm(tmp_path / "llm", kind)), CPU, bf16=True)
    cache = llm(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    num_bytes = 0
    for layer in cache.layers:
        num_bytes += layer.keys.nbytes + layer.values.nbytes
    assert num_bytes == 7 * elm.bytes_of_a_cached_token(llm)


@torch.no_grad()
def test_an_llm_without_attention_caches_no_tokens(tmp_path):
    llm = elm.load_llm(str(make_llm(tmp_path / "llm", "mamba")), CPU, bf16=False)
    for name in ("num_attention_heads", "num_key_value_heads"):
        delattr(llm.config, name)  # make_llm's, which Mamba does not have
    assert elm.bytes_of_a_cached_token(llm) == 0
    assert len(elm.generate_batch(llm, PROMPT, [torch.randn(5, 32)], 3)) == 1


def test_answers_are_given_as_many_at_once_as_memory_holds(plain, monkeypatch):
    model, split = plain
    queries = [f"What? {i * 'x'}" for i in range(7)]
    together = model.generate(split.vectors[:7], queries, 12)
    num_prompt_tokens = max(map(len, model.prompt_embeds(split.vectors[:7], queries)))
    bytes_of_an_answer = (num_prompt_tokens + 12) * elm.bytes_of_a_cached_token(model.llm)
    sizes = []
    own_generate = model.llm.generate

    def counted(**options):
        sizes.append(len(options["inputs_embeds"]))
        return own_generate(**options)

    monkeypatch.setattr(model.llm, "generate", counted)
    for num_fitting, expected in ((3.5, [3, 3, 1]), (0.1, [1] * 7), (100, [7])):
        beside = 2 * num_fitting * bytes_of_an_answer
        monkeypatch.setattr(elm, "memory_beside_weights", lambda llm, beside=beside: beside)
        # Only what is cached is to matter here.
        monkeypatch.setattr(elm, "tokens_at_once", lambda llm: math.inf)
        sizes.clear()
        assert model.generate(split.vectors[:7], queries, 12) == together
        assert sizes == expected


def test_prompts_are_read_as_many_at_once_as_memory_holds(plain, monkeypatch):
    model, _ = plain
    bytes_of_a_token = elm.bytes_of_a_token(model.llm)
    assert elm.answers_at_once(model.llm, 100, 50) == elm.GENERATION_BATCH["cpu"]
    monkeypatch.setattr(elm, "memory_beside_weights", lambda llm: 4 * 350 * bytes_of_a_token)
    assert elm.tokens_at_once(model.llm) == pytest.approx(350)
    assert elm.answers_at_once(model.llm, 100, 1) == 3
    assert elm.rows_at_once(model, 100) == 3
    assert elm.rows_at_once(model, 10) == elm.EVAL_BATCH_ROWS["cpu"]
    assert elm.rows_at_once(model, 1000) == 1


@torch.no_grad()
def test_little_memory_changes_no_loss(plain, monkeypatch):
    """Rows at once, and logits at once."""
    model, split = plain
    vector_ids = split.index["vector_id"]
    expected = elm.losses_by_vectors(model, split, vector_ids)
    monkeypatch.setattr(elm, "MAX_LOGITS_AT_ONCE", {"cpu": 9000})
    monkeypatch.setattr(elm, "tokens_at_once", lambda llm: math.inf)
    for num_rows, num_logits in ((1, 9000), (7, 9000), (16, 3000), (3, 3000)):
        monkeypatch.setattr(elm, "EVAL_BATCH_ROWS", {"cpu": num_rows})
        beside = 8 * elm.BYTES_OF_A_LOGIT * num_logits
        monkeypatch.setattr(elm, "memory_beside_weights", lambda llm, beside=beside: beside)
        assert elm.rows_at_once(model, 256) == num_rows
        assert elm.logits_at_once(model.llm) == num_logits
        found = elm.losses_by_vectors(model, split, vector_ids)
        np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-6)
        np.testing.assert_array_equal(found.num_tokens, expected.num_tokens)
    monkeypatch.setattr(elm, "memory_beside_weights", lambda llm: -1e9)
    assert elm.logits_at_once(model.llm) == 9000 / 4
    assert elm.answers_at_once(model.llm, 10, 10) == 1


@torch.no_grad()
def test_prompt_embeds_are_what_training_reads(parts):
    """Followed by the answer's embeddings, through the LLM as it is: the loss of the row."""
    model, split = parts
    for row, example in zip(split.read([0, 1, 2]), split.examples([0, 1, 2]), strict=True):
        vector = split.vectors[row.embedding_file_idx]
        answer = torch.from_numpy(example.ids[-example.num_labels :])
        prompt = model.prompt_embeds(vector, row.query)
        whole = torch.cat([prompt, model.llm.get_input_embeddings()(answer)])
        logits = model.llm(inputs_embeds=whole[None]).logits[0, len(prompt) - 1 : -1]
        loss = model.loss(vector, row.query, [row.response])
        torch.testing.assert_close(loss, F.cross_entropy(logits.float(), answer))


def test_answers_stop_at_every_end_token(plain, monkeypatch):
    """The template's, and any of generation_config.json's; or at a string."""
    model, split = plain
    llm = model.llm
    tok = split.encoder.prompt.tokenizer
    other = [i for i in range(llm.config.vocab_size) if not tok.decode([i]).isalnum()]
    ask = partial(model.generate, split.vectors[0], "What?", max_new_tokens=9,
                  suppress_tokens=other, no_repeat_ngram_size=1)  # so that nine letters differ
    llm.generation_config.eos_token_id = None
    (free,) = ask()
    ids = tok(free)["input_ids"]
    assert len(set(free)) == len(ids) == 9
    for own in (ids[4], [ids[4]], [other[0], ids[4]], [ids[6], ids[4]]):
        llm.generation_config.eos_token_id = own
        assert ask() == [free[:4]]
    llm.generation_config.eos_token_id = other[0]
    assert ask(stop_strings=[free[3:5]]) == ask(stop_strings=free[4]) == [free[:5]]
    monkeypatch.setattr(model.prompt, "end_ids", [ids[4]])
    assert ask() == [free[:4]]


def test_an_answer_has_room_or_is_refused(plain):
    model, split = plain
    with pytest.raises(elm.UserError, match=r"a prompt has \d+ tokens: the LLM reads 512"):
        model.generate(split.vectors[0], 600 * "x", max_new_tokens=1)


# ------------------------------------------------------------------ what an adapter belongs to


def test_load_refuses_another_llm(tmp_path):
    llm = make_llm(tmp_path / "llm")
    other = make_llm(tmp_path / "llama", "llama")
    path = tmp_path / "a.safetensors"
    whole = elm.ELM(elm.load_llm(str(llm), CPU, bf16=True), elm.Adapter(12, 24, 32), PROMPT)
    whole.save(path, llm=dict(name=str(llm), bf16=False, template={}))
    assert elm.ELM.load(path).llm.dtype == torch.float32
    assert elm.ELM.load(path, str(llm), bf16=True).llm.dtype == torch.bfloat16
    with pytest.raises(elm.UserError, match="llama: hash of the LLM's weights was"):
        elm.ELM.load(path, str(other))
    whole.save(path, llm="no table")
    with pytest.raises(elm.UserError, match="does not say which LLM"):
        elm.ELM.load(path)


def test_both_llms_of_one_shape_are_told_apart(tmp_path):
    """In any dtype."""
    one = make_llm(tmp_path / "one")
    two = make_llm(tmp_path / "two")
    llm = elm.load_llm(str(two), CPU, bf16=False)
    assert elm.weights_hash(elm.load_llm(str(one), CPU, bf16=True)) == elm.weights_hash(llm)
    next(iter(llm.parameters())).data += 0.01
    assert elm.weights_hash(elm.load_llm(str(one), CPU, bf16=False)) != elm.weights_hash(llm)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_vectors_of_another_norm_are_refused(plain, dtype):
    """Alone and together; each that training had is taken."""
    model, split = plain
    every = split.vectors.numpy().astype(dtype)

    def loss(vectors, query):
        return model.loss(vectors, query, ["x"] * (vectors.size // 12))

    for call in (model.prompt_embeds, partial(model.generate, max_new_tokens=1), loss):
        for vectors in (every, *every):
            call(vectors, "What?")
        for factor in (11, 1 / 11):
            for vectors in (every, every[0]):
                with pytest.raises(elm.UserError, match="the vectors' norm was .* in training"):
                    call(vectors * factor, "What?")


def test_the_prompt_is_part_of_the_adapter(settings, tmp_path, capsys):
    """Of a template that prints the time: the one of training is used wherever the adapter is."""
    template = "{{ strftime_now('%f') }}" + CHAT.replace("assistant\n", "assistant\n{{ manner }}: ")
    llm = make_llm(tmp_path / "llm", chat_template=template)
    settings = [*settings, f"model.llm={llm}", "model.template.manner=briefly",
                "train.max_steps=4", "train.eval_steps=4", "eval.samples=2"]  # fmt: skip
    whole, out = go(settings)
    differs = "its chat template differs from training; the adapter's prompt is used"
    assert differs not in capsys.readouterr().err
    resumed_folder = tmp_path / "resumed"
    start = f"train.resume={out / 'checkpoint_step_2.pt'}"
    resumed, _ = go(settings, start, f"output.dir={resumed_folder}")
    assert differs in capsys.readouterr().err
    path = out / "adapter_best.safetensors"
    assert path.read_bytes() == (resumed_folder / path.name).read_bytes()
    assert resumed == whole

    elm.warn_once.cache_clear()
    report_dir = tmp_path / "again"
    words = [f"adapter={path}", f"report_dir={report_dir}"]
    code, said = command("eval", out / "config.toml", *words)
    assert code == 0 and differs in said
    assert json.loads((report_dir / "eval.json").read_bytes())["loss"] == whole["loss"]
    elm.warn_once.cache_clear()
    model = elm.ELM.load(path)
    assert differs in capsys.readouterr().err
    _, metadata = elm.Adapter.load(path)
    assert model.prompt.template_parts == metadata["prompt"]
    assert model.prompt.template_parts["suffix"].endswith("assistant\nbriefly: ")


# ------------------------------------------------------------------ which LLMs it takes


@pytest.mark.parametrize("kind, shape", [
    ("bloom", {}),  # its own attention takes no packed rows
    ("gpt_oss", dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1)),  # sinks
    ("nemotron", {}),  # its layers do not pass the bounds of rows on: a TypeError
    ("mpt", {}),  # its attention needs a mask: an AttributeError
    ("doge", {}),  # its attention makes a mask
    ("llama4_text", {}),  # its whole is its backbone: logits, no hidden states
    # it needs the ids of all tokens: a RuntimeError
    ("gemma4_text", dict(vocab_size_per_layer_input=300, hidden_size_per_layer_input=8)),
])
def test_llms_that_cannot_be_packed_are_refused(tmp_path, kind, shape):
    """In one line, whatever their code raises."""
    llm = make_llm(tmp_path, kind, **shape)
    with pytest.raises(elm.UserError, match="ForCausalLM .* cannot be used, as rows") as e:
        elm.ELM.create(str(llm), torch.randn(4, 12), bf16=kind == "gpt_oss")
    assert len(str(e.value).splitlines()) == 1


def test_an_llm_that_views_the_output_of_its_attention_is_taken(tmp_path):
    """JetMoE, AFMoE: it has to be contiguous, as it is of transformers' own attention."""
    elm.ELM.create(str(make_llm(tmp_path, "jetmoe")), torch.randn(4, 12), bf16=False)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["elm_packed", "sdpa"])
def test_attention_that_sees_what_comes_later_is_refused(llm_dir, plain, monkeypatch, name, bf16):
    """Packed or alone, in an LLM so flat that its losses hardly change."""
    model = build_elm(llm_dir, plain[1], bf16=bf16)
    elm.check_llm(model)
    own = AttentionInterface._global_mapping[name]

    def backwards(module, query, key, value, mask, **options):
        if "lengths" in options:
            options["lengths"] = options["lengths"][::-1]
        flipped = [x.flip(2) for x in (query, key, value)]
        out, _ = own(module, *flipped, mask, **options)
        return out.flip(1), None

    monkeypatch.setitem(AttentionInterface._global_mapping, name, backwards)
    with pytest.raises(elm.UserError, match="its attention is more than causal"):
        elm.check_llm(model)


def test_an_llm_that_returns_tuples_is_taken(llm_dir, tmp_path, plain):
    """By "return_dict": false in its config.json."""
    model, split = plain
    folder = tmp_path / "tuples"
    shutil.copytree(llm_dir, folder)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    same = build_elm(folder, split)
    elm.check_llm(same, 256)
    words = split.vectors, "What?", ["yes"] * 10
    assert torch.equal(same.loss(*words), model.loss(*words))
    assert same.generate(*words[:2], max_new_tokens=3) == model.generate(*words[:2], 3)


def long_factors(scale: float) -> list[float]:
    return [scale * (i + 1) for i in range(4)]


LONGROPE = dict(
    rope_type="longrope", short_factor=long_factors(1.0), long_factor=long_factors(3.0),
    rope_theta=10_000.0, original_max_position_embeddings=64)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
               shared_expert_intermediate_size=16)  # fmt: skip
LONG_ROWS = {  # lengths of rows, and LLMs whose attention or positions depend on the length
    "mistral": ("mistral", dict(sliding_window=16)),
    "gemma3": ("gemma3_text", dict(layer_types=["sliding_attention", "full_attention"])),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "qwen2 without": ("qwen2", dict(use_sliding_window=False, sliding_window=16)),
    "qwen2_moe": ("qwen2_moe", dict(
        use_sliding_window=True, sliding_window=16, max_window_layers=1, **EXPERTS)),
    "qwen2_moe without": ("qwen2_moe", dict(
        use_sliding_window=False, sliding_window=16, max_window_layers=1, **EXPERTS)),
    "phimoe": ("phimoe", dict(sliding_window=16, num_local_experts=2)),
    "llama": ("llama", dict(sliding_window=16)),  # of the config that no mask is made of
    "phi3": ("phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=64)),
}  # fmt: skip


def examples_of(lengths) -> list[elm.Example]:
    generator = np.random.default_rng(0)
    return [elm.Example(generator.integers(256, size=n), n - 2, False) for n in lengths]


@torch.no_grad()
def losses_alone(llm, examples) -> list[float]:
    """By the LLM as it is."""
    losses = []
    for example in examples:
        ids = torch.from_numpy(example.ids)
        logits = llm(input_ids=ids[None]).logits[0, 1:-1]
        losses.append(F.cross_entropy(logits, ids[2:], reduction="sum").item())
    return losses


@pytest.mark.parametrize("kind", LONG_ROWS)
@torch.no_grad()
def test_packed_rows_are_single_ones_at_every_length(tmp_path, kind):
    """Beyond windows, also those that only a mask has; short rows beside long ones."""
    architecture, shape = LONG_ROWS[kind]
    llm = elm.load_llm(str(make_llm(tmp_path, architecture, **shape)), CPU, bf16=False)
    model = elm.ELM(llm, elm.Adapter(12, 24, 32), PROMPT)
    lengths = (20, 103, 30, 400)
    if kind == "phi3":
        lengths = (20, 64, 30, 63)
    elm.check_llm(model, max(lengths))
    examples = examples_of(lengths)
    packed = model.nll(elm.collate(examples)).tolist()
    np.testing.assert_allclose(packed, losses_alone(llm, examples), rtol=1e-5)


def test_rows_that_longrope_would_mix_are_refused(tmp_path, settings, data_dir):
    """A short row has another loss beside one that is longer than the original length."""
    architecture, shape = LONG_ROWS["phi3"]
    llm = make_llm(tmp_path / "llm", architecture, **shape)
    settings = [*settings, f"model.llm={llm}", "eval.samples=0"]
    with pytest.raises(elm.UserError) as e:
        go(settings, "data.max_seq_length=65")
    assert str(e.value) == (
        "data.max_seq_length = 65: the LLM reads 64: with longer rows its LongRoPE changes short "
        "ones, too; data.max_seq_length = 64")
    vectors = read_table(data_dir)
    model = elm.ELM.create(str(llm), vectors, bf16=False)
    vector = vectors[0]
    with pytest.raises(elm.UserError, match="pair 0: the prompt takes all of max_tokens = 64 "):
        model.loss(vector, 64 * "x", ["yes"])
    with pytest.raises(elm.UserError, match=r"a prompt has \d+ tokens: the LLM reads 64"):
        model.generate(vector, 64 * "x")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_window_that_packed_rows_lack_is_found(tmp_path, monkeypatch, bf16):
    """Where data.max_seq_length is beyond it, and only there."""
    llm = make_llm(tmp_path, "mistral", sliding_window=100)
    model = elm.ELM(elm.load_llm(str(llm), CPU, bf16), elm.Adapter(12, 24, 32), PROMPT)
    elm.check_llm(model, 400)

    def without_window(module, query, key, value, mask, **options):
        options["sliding_window"] = None
        return elm.packed_attention(module, query, key, value, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, elm.PACKED, without_window)
    elm.check_llm(model, 100)
    with pytest.raises(elm.UserError, match="packed rows have other losses than single ones"):
        elm.check_llm(model, 400)


# ------------------------------------------------------------------ its tokenizer and its files


def llm_with_tokenizer(llm_dir: Path, folder: Path, change) -> Path:
    """The LLM with its tokenizer.json changed."""
    shutil.copytree(llm_dir, folder)
    path = folder / "tokenizer.json"
    table = json.loads(path.read_bytes())
    change(table)
    path.write_text(json.dumps(table, indent=7, sort_keys=True))
    return folder


def swap_digits(table: dict) -> None:
    vocabulary = table["model"]["vocab"]
    vocabulary.update({"3": vocabulary["4"], "4": vocabulary["3"]})


def lowercase(table: dict) -> None:
    table["normalizer"] = {"type": "Lowercase"}


def compose(table: dict) -> None:
    table["normalizer"] = {"type": "NFC"}


def drop_spaces(table: dict) -> None:
    table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "WhitespaceSplit"}, table["pre_tokenizer"]]}  # fmt: skip


@pytest.mark.parametrize("change", [swap_digits, lowercase, compose, drop_spaces])
def test_an_adapter_belongs_to_a_tokenizer(trained, llm_dir, tmp_path, change):
    """At load, eval and resume."""
    _, folder, _ = trained
    other = llm_with_tokenizer(llm_dir, tmp_path / "other", change)
    message = "hash of the tokenizer's ids was .* in training and is"
    with pytest.raises(elm.UserError, match=f"other: {message}"):
        elm.ELM.load(folder, str(other))
    toml = folder / "config.toml"
    refused(f"other: {message}", "eval", toml, f"adapter={folder}", f"model.llm={other}",
            f"report_dir={tmp_path / 'report'}")  # fmt: skip
    refused(f"train.resume: {message}", toml, f"model.llm={other}", "train.max_steps=7",
            f"train.resume={folder / 'checkpoint_step_2.pt'}",
            f"output.dir={tmp_path / 'resumed'}")  # fmt: skip


def test_the_probe_of_tokenizers_has_every_printable_character():
    assert set(string.digits + string.ascii_letters + string.punctuation) <= set(elm.PROBE_TEXT)


def test_a_tokenizer_that_is_saved_again_is_the_same(trained, llm_dir, tmp_path, capsys):
    _, folder, _ = trained
    sorted_keys = llm_with_tokenizer(llm_dir, tmp_path / "sorted", lambda table: None)
    again = tmp_path / "again"
    shutil.copytree(llm_dir, again)
    for path in again.glob("*token*"):
        path.unlink()
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(again)
    for llm in (sorted_keys, again):
        elm.ELM.load(folder, str(llm))
    adapter, metadata = elm.Adapter.load(folder)
    assert "elm: " not in capsys.readouterr().err
    del metadata["trained_for"]["hash of the tokenizer's ids"]  # as elm stored it at first
    elm.ELM.from_adapter(adapter, metadata, "early")
    said = "elm: warning: early: "
    assert said in capsys.readouterr().err


def test_ids_that_the_llm_has_no_embedding_for_are_refused(tmp_path, data_dir, settings):
    """In the template or in text; tokens that neither has may be beyond the matrix."""
    llm = make_llm(tmp_path / "llm", vocab_size=259)  # of 256 bytes and 3 control tokens
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens(["<pad>", "<image>"], special_tokens=True)
    tokenizer.add_tokens(["rare"])
    tokenizer.save_pretrained(llm)
    model = elm.ELM.create(str(llm), read_table(data_dir), bf16=False)
    vector = read_table(data_dir)[0]
    model.loss(vector, "<image> What?", ["<pad>"])
    beyond = "llm: the tokenizer makes id 261, 'rare', of .*, but the LLM has 259 token embeddings"
    for call in (
        partial(model.loss, vector, "What?", ["this is rare"]),
        partial(model.loss, vector, "rare?", ["yes"]),
        partial(model.generate, vector, "rare?"),
    ):
        with pytest.raises(elm.UserError, match=beyond):
            call()
    model.save(tmp_path / "own.safetensors")
    rows = read_jsonl(rows_path(data_dir, "test"))
    write_rows(data_dir, "test", [*rows, rows[0] | dict(response="rare")])
    more = [f"model.llm={llm}", "eval.samples=0", "train.max_steps=1", "train.eval_steps=1"]
    refused(beyond, "eval", NO_TABLES, *more[:2], "model.bf16=false", f"data.dir={data_dir}",
            "data.max_seq_length=256", f"adapter={tmp_path / 'own.safetensors'}",
            f"report_dir={tmp_path / 'report'}")  # fmt: skip
    refused(beyond, NO_TABLES, *settings, *more)
    write_rows(data_dir, "test", [*rows, rows[0] | dict(text="rare")])
    refused(beyond, NO_TABLES, *settings, *more)
    assert not (tmp_path / "out").exists()  # before the first step

    tokenizer.chat_template = CHAT.replace("assistant", "assistant<image>")
    tokenizer.save_pretrained(llm)
    with pytest.raises(elm.UserError, match="makes id 260, '<image>', of .*259 token embeddings"):
        elm.ELM.create(str(llm), read_table(data_dir), bf16=False)


@pytest.mark.parametrize("with_weights", [True, False])
def test_an_adapter_of_peft_is_refused(llm_dir, tmp_path, settings, with_weights):
    """Beside the weights of an LLM it would be ignored."""
    folder = tmp_path / "lora"
    shutil.copytree(llm_dir, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not with_weights:
        (folder / "model.safetensors").unlink()
    message = "lora has an adapter_config.json, of LoRA .*; merge it into the model"
    refused(f"model.llm: {folder.parent}/{message}", NO_TABLES, *settings, f"model.llm={folder}")
    with pytest.raises(elm.UserError, match=message):
        elm.load_llm(str(folder), CPU, bf16=False)


# ------------------------------------------------------------------ what it leaves alone


def bytes_of(llm) -> dict[str, bytes]:
    """Of all parameters and buffers."""
    tensors = dict(llm.named_parameters()) | dict(llm.named_buffers())
    return {name: t.detach().flatten().view(torch.uint8).numpy().tobytes()
            for name, t in tensors.items()}  # fmt: skip


class KeepsLLM(elm.Trainer):
    """Keeps its LLM, and the bytes that it had."""

    def load_llm(self):
        self.llm = super().load_llm()
        self.bytes_before = bytes_of(self.llm)
        return self.llm


@pytest.mark.parametrize("bf16", ["false", "true"])
def test_training_never_changes_the_llm(settings, bf16):
    """Nor does the report: not a byte, and no gradient is kept at it."""
    more = [f"model.bf16={bf16}", "model.grad_checkpoint=true", "loss.drift_weight=0.5",
            "eval.samples=2", "train.eval_steps=6"]  # fmt: skip
    trainer = KeepsLLM(elm.load_config(None, [*settings, *more]))
    trainer.run()
    assert trainer.llm.dtype == (torch.bfloat16 if bf16 == "true" else torch.float32)
    assert bytes_of(trainer.llm) == trainer.bytes_before
    assert all(p.grad is None and not p.requires_grad for p in trainer.llm.parameters())


def test_an_elm_is_whole_after_its_report(trained, tmp_path):
    """It answers, and has a loss, as before; and the report is the one of training."""
    report, folder, settings = trained
    cfg = elm.load_config(None, settings)
    model = elm.ELM.load(folder)
    splits = elm.open_inputs(cfg, ("test", "train"), 1, None)
    split = splits["test"]

    def use():
        loss = model.loss(split.vectors, "What?", ["yes"] * len(split.vectors)).item()
        return loss, model.generate(split.vectors[:3], "What?", max_new_tokens=5)

    before = use()
    measured = elm.measure(model, split, splits["train"], cfg.eval)
    header = {key: report[key] for key in ("split", "step", "adapter_step")}
    metrics = elm.read_metrics(folder / "metrics.jsonl")
    again = elm.write_report(
        measured, split, cfg, CPU, tmp_path, folder.name, metrics, header)
    assert again == report
    assert use() == before and math.isfinite(before[0])


@pytest.mark.parametrize("name", ["train", "eval"])
def test_the_llm_is_freed_before_the_scorer_is_loaded(trained, tmp_path, monkeypatch, name):
    """With recomputed layers, too, which are reference cycles."""
    _, folder, settings = trained
    llms = []
    is_alive = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*names, **options):
        loaded = load(*names, **options)
        llms.append(weakref.ref(loaded[0]))
        return loaded

    class Scorer(bert_score.BERTScorer):
        def __init__(self, *arguments, **options):
            is_alive.append(any(llm() is not None for llm in llms))
            super().__init__(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(bert_score, "BERTScorer", Scorer)
    if name == "train":
        more = ["model.grad_checkpoint=true", "train.max_steps=1", f"output.dir={tmp_path / 'new'}"]
        trainer = elm.Trainer(elm.load_config(None, [*settings, *more]))
        trainer.run()
    else:
        more = [f"adapter={folder}", f"report_dir={tmp_path / 'new'}"]
        elm.evaluate(elm.load_config(None, [*settings, *more], elm.EvalOptions))
    assert len(llms) == 1 and is_alive == [False]


# ------------------------------------------------------------------ elm as a module


def own_loop():
    """What the test below runs in a process of its own, without the packages that only the commands
    need."""
    import sys

    hidden = "deepspeed optuna bert_score wandb sentence_transformers pandas matplotlib openai"
    sys.modules.update(dict.fromkeys(hidden.split()))
    import torch

    import elm

    torch.manual_seed(0)
    vectors = torch.randn(8, 12).numpy()
    queries = ["What?", "Is <EMB> so?"] * 4
    responses = [f"it is {i * 37 % 8}" for i in range(8)]
    model = elm.ELM.create("llm", vectors, bf16=False, hidden_dim=24, tokens=2)
    before = [p.clone() for p in model.llm.parameters()]
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.loss(vectors, queries, responses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses
    assert all(map(torch.equal, before, model.llm.parameters()))
    assert all(p.grad is None for p in model.llm.parameters())

    (answer,) = model.generate(vectors[0], "What?", max_new_tokens=3)
    model.save("own.safetensors")
    again = elm.ELM.load("own.safetensors")
    assert again.generate(vectors[0], "What?", max_new_tokens=3) == [answer]
    try:
        zero = elm.DeepSpeedConfig(zero_stage=3)
        elm.load_llm("llm", model.device, bf16=False, deepspeed=zero)
    except elm.UserError as e:
        print(e, elm.__file__)


def test_elm_py_alone_trains_in_a_loop_of_ones_own(processes, llm_dir, tmp_path):
    """A copied file."""
    shutil.copy(ROOT / "elm.py", tmp_path)
    os.symlink(llm_dir, tmp_path / "llm")
    script = tmp_path / "own_loop.py"
    script.write_text(inspect.getsource(own_loop) + "\n\nown_loop()\n")
    words = [sys.executable, str(script)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    missing = "deepspeed is not installed: pip install deepspeed"
    assert done.stdout.strip() == f"{missing} {tmp_path / 'elm.py'}", done.stderr
