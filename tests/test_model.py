import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, ROOT, byte_tokenizer, make_data, make_llm
from naive import naive_step, token_rows
from torch import nn
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

import elm

RT = elm.Runtime()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def parts(request, tmp_path_factory):
    """(LLM, prompt, train split) for each architecture, with 2 soft tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    make_llm(folder / "llm", request.param)
    make_data(folder / "data")
    prompt = elm.Prompt.of(AutoTokenizer.from_pretrained(folder / "llm"))
    data = elm.DataConfig(dir=str(folder / "data"), max_seq_length=256)
    llm = elm.load_llm(str(folder / "llm"), RT.device, bf16=False)
    llm.set_attn_implementation("eager")  # the reference: SDPA drops Gemma 2's softcap (5.17)
    return llm, prompt, elm.open_split(data, "train", prompt, 2, RT)


def adapter_for(llm, split, **settings):
    torch.manual_seed(1)
    d_llm, scale = elm.embedding_scale(llm)
    adapter = elm.Adapter(12, 24, d_llm, split.soft, scale=scale, **settings)
    adapter.load_state_dict(split.statistics, strict=False)
    return adapter


def losses(model, batch):
    return model.losses(batch, model(batch["embeddings"]) if "embeddings" in batch else None)


def test_adapter_has_the_size_of_the_contract():
    with torch.device("meta"):
        adapter = elm.Adapter(2560, 4096, 2560)
        other = elm.Adapter(1024, 4096, 2560, tokens=4)
    counts = {n: p.numel() for n, p in adapter.named_parameters()}
    assert sum(n for k, n in counts.items() if "norm" not in k) == 20_978_176
    assert counts["norm.weight"] <= 5120
    assert other.residual.weight.shape == (2560, 1024) and other.residual.bias is None
    assert other(torch.empty(7, 1024, device="meta")).shape == (7, 4, 2560)


@pytest.mark.parametrize(
    "d_emb, d_llm, tokens", [(12, 12, 1), (12, 20, 1), (12, 20, 3), (12, 12, 3)]
)
def test_adapter_is_its_formula(d_emb, d_llm, tokens):
    adapter = elm.Adapter(d_emb, 16, d_llm, tokens, residual_scale=0.5, scale=0.03).eval()
    adapter.mean += 1.0
    adapter.std *= 2.0
    adapter.norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(5, d_emb)
    z = (x - 1.0) / 2.0
    hidden = F.gelu(z @ adapter.fc1.weight.T + adapter.fc1.bias)
    out = (hidden @ adapter.fc2.weight.T + adapter.fc2.bias).view(5, tokens, d_llm)
    out = out + 0.5 * (z if d_emb == d_llm else z @ adapter.residual.weight.T)[:, None]
    rms = out.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(adapter(x), out / rms * adapter.norm.weight * 0.03)


def test_a_fresh_adapter_has_the_volume_of_the_token_embeddings(parts):
    llm, _, split = parts
    out = adapter_for(llm, split)(split.vectors)
    ids = torch.arange(llm.config.get_text_config().vocab_size)
    wanted = llm.get_input_embeddings()(ids).float().square().mean().sqrt()
    torch.testing.assert_close(out.square().mean().sqrt(), wanted, rtol=2e-2, atol=0)


def test_loss_and_gradient_agree_with_the_naive_reference(parts, monkeypatch):
    """Every combination: one micro-batch or several, what stands before the vector read with each
    row, once for the split or for each micro-batch, recomputed layers, whole logits or chunks."""
    llm, prompt, split = parts
    rows = np.arange(12)
    adapter = adapter_for(llm, split)
    loss, gradient = naive_step(llm, adapter, [token_rows(split, rows, split.soft)])
    llm.gradient_checkpointing_disable()
    llm.eval()
    vocab, combinations = llm.config.get_text_config().vocab_size, 0
    for layers in (0, 1, 2):
        model = elm.ELM(elm.load_llm(llm.config._name_or_path, RT.device, False), adapter, prompt)
        elm.recompute_layers(model.llm, layers)
        for budget, prefixes, reuse, chunk in itertools.product(
            (100_000, 150), (split.prefixes, None), (True, False), (2**24, 7 * vocab)
        ):
            monkeypatch.setattr(elm, "CHUNK_LOGITS", {"cpu": chunk})
            adapter.zero_grad()
            plan = split._replace(prefixes=prefixes, reuse=reuse)
            *_, labels, micros = elm.plan_step(plan, budget, RT, (0, 12, rows))
            assert len(micros) == 1 or budget == 150 and len(micros) > 2
            soft = model(torch.cat([batch["embeddings"] for _, batch in micros]))
            (total, _), at_soft = elm.soft_gradient(model, soft, micros)
            soft.backward(at_soft / labels)
            mine = torch.cat([p.grad.flatten() for p in adapter.parameters()])
            assert abs(total.item() / labels - loss) / loss < 1e-5
            assert (mine - gradient).norm() / gradient.norm() < 1e-5
            combinations += 1
        assert all(p.grad is None for p in model.llm.parameters())
    assert combinations == 48


def test_losses_do_not_depend_on_what_was_read_before(parts):
    """To the bit: a resumed run has read other rows, yet must go on with the same numbers."""
    llm, prompt, split = parts
    split = split._replace(prefixes=None)  # so that each micro-batch reads its own
    first, second = (elm.ELM(llm, adapter_for(llm, split), prompt).eval() for _ in range(2))
    for rows in ([4, 5, 6], [7], [8, 9], [1, 2]):
        losses(first, elm.pack(split, rows))
    for rows in ([0, 1, 2, 3], [4, 5, 6]):
        batch = elm.pack(split, rows)
        assert torch.equal(losses(first, batch), losses(second, batch))
        assert not first.kept  # they are of one micro-batch


def test_head_loss_is_cross_entropy_by_chunks():
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(17, 6, dtype=torch.float64), torch.randint(17, (11,))
    rows = []

    def head(h):
        rows.append(len(h))
        return torch.tanh(h @ weight.T) * 3.0

    def chunked(hidden):
        return elm.HeadLoss.apply(hidden, labels, head, 3)

    wanted = F.cross_entropy(head(hidden), labels, reduction="none")
    mix = torch.randn(11, dtype=torch.float64)
    (reference,) = torch.autograd.grad(wanted @ mix, hidden)
    rows.clear()
    found = chunked(hidden)
    assert rows == [4, 4, 3]  # and none of them again in the backward pass
    (gradient,) = torch.autograd.grad(found.double() @ mix, hidden)
    assert rows == [4, 4, 3]
    torch.testing.assert_close(found, wanted.float())
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked(hidden), wanted.float())


def test_memory_is_spent_before_recomputation(llm_dir):
    """2 layers, 10 * 32 + 4 * 48 numbers of 4 bytes a token and layer; 80 % of what is free."""
    llm = elm.load_llm(str(llm_dir), RT.device, bf16=False)
    token = 2 * (10 * 32 + 4 * 48) * 4 / 0.8
    assert elm.plan_memory(llm, "auto", 1e12) == (8192, 0)
    assert elm.plan_memory(llm, "auto", 3000.7 * token) == (3000, 0)
    assert elm.plan_memory(llm, "auto", 1500 * token) == (2048, 1)
    assert elm.plan_memory(llm, "auto", 100 * token) == (2048, 2)
    assert elm.plan_memory(llm, False, 100 * token) == (2048, 0)
    assert elm.plan_memory(llm, True, 1e12) == (8192, 2)
    assert elm.plan_memory(llm, "auto") == (1024, 0)
    assert elm.plan_memory(llm, True) == (1024, 2)


def test_examples_do_not_see_each_other(parts):
    """Packed with others, in another order, or alone: an example's loss is its own."""
    llm, prompt, split = parts
    model = elm.ELM(llm, adapter_for(llm, split), prompt).eval()
    for form in (elm.BY_VECTOR, elm.BY_TEXT):
        with torch.no_grad():
            together = losses(model, elm.pack(split, [0, 1, 2, 3], form))
            backwards = losses(model, elm.pack(split, [3, 2, 1, 0], form)).flip(0)
            alone = torch.cat([losses(model, elm.pack(split, [i], form)) for i in range(4)])
            others = losses(model, elm.pack(split, [9, 1, 8, 7], form))
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(backwards, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(others[1], alone[1], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(others[0], alone[0])


class SayToken(nn.Module):
    """In the adapter's place: the LLM's own embedding of one token."""

    def __init__(self, llm, token):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.embed, self.token = llm.get_input_embeddings(), token

    def forward(self, embeddings):
        return self.embed(torch.full((len(embeddings), 2), self.token))


def test_splicing_a_tokens_own_embedding_gives_the_logits_of_input_ids(parts):
    llm, prompt, split = parts
    model = elm.ELM(llm, SayToken(llm, 77), prompt).eval()
    rows = [0, 5, 6]
    with torch.no_grad():
        nll = losses(model, elm.pack(split, rows))
        for k, (ids, response, _) in enumerate(token_rows(split, rows, split.soft)):
            logits = llm(input_ids=ids.where(ids >= 0, 77)[None]).logits[0, -response - 1 : -1]
            flat = F.cross_entropy(logits.float(), ids[-response:], reduction="sum")
            torch.testing.assert_close(nll[k], flat, rtol=1e-5, atol=1e-5)


def test_recomputed_layers_change_nothing(parts):
    llm, prompt, split = parts
    split = split._replace(reuse=False)
    results, calls = [], []
    for setting in (False, True):
        folder = llm.config._name_or_path
        model = elm.ELM(elm.load_llm(folder, RT.device, False), adapter_for(llm, split), prompt)
        _, layers = elm.plan_memory(model.llm, setting)
        assert layers == 2 * setting
        elm.recompute_layers(model.llm, layers)
        passes = []
        for norm in (m for n, m in model.llm.named_modules() if n.endswith(("0.mlp", "0.mlp.act"))):
            norm.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        nll = losses(model.train(), elm.pack(split, [0, 1, 2]))
        nll.sum().backward()
        calls.append(len(passes))
        gradient = torch.cat([p.grad.flatten() for p in model.adapter.parameters()])
        results.append((nll.detach(), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert calls[1] == 2 * calls[0] > 0  # each layer ran twice


def test_ragged_batch_equals_one_flat_cross_entropy(parts):
    llm, prompt, split = parts
    model = elm.ELM(llm, adapter_for(llm, split), prompt).eval()
    split = split._replace(reuse=False)
    batch = elm.pack(split, list(range(8)))
    with torch.no_grad():
        soft = model(batch["embeddings"])
        nll = model.losses(batch, soft)
        logits = [llm(inputs_embeds=p[None]).logits[0] for p in examples(model, split, batch)]
    ends = np.cumsum(batch["lengths"])
    flat = torch.cat([x[batch["targets"][batch["owner"] == k] - (ends[k] - batch["lengths"][k])]
                      for k, x in enumerate(logits)])  # fmt: skip
    torch.testing.assert_close(
        nll.sum(), F.cross_entropy(flat.float(), batch["labels"], reduction="sum")
    )
    assert soft.shape == (8, 2, 32)


def examples(model, split, batch):
    """Each example's input embeddings, built one by one."""
    ids, slots = batch["ids"].split(batch["lengths"]), batch["slots"].view(-1, 2)
    start = 0
    for k, own in enumerate(ids):
        embeds = model.llm.get_input_embeddings()(own).clone()
        embeds[slots[k] - start] = model.adapter(batch["embeddings"][k])
        start += len(own)
        yield embeds


def test_the_llm_never_drops_out(parts):
    llm, prompt, split = parts
    model = elm.ELM(llm, adapter_for(llm, split, dropout=0.5), prompt).train()
    assert model.adapter.training and not any(m.training for m in llm.modules())
    first, second = (losses(model, elm.pack(split, [0])) for _ in range(2))
    assert not torch.equal(first, second)  # the adapter does
    model.eval()
    first, second = (losses(model, elm.pack(split, [0])) for _ in range(2))
    assert torch.equal(first, second)


def test_generation_is_the_same_in_batches_and_from_prompt_embeds(parts):
    llm, prompt, split = parts
    model = elm.ELM(llm, adapter_for(llm, split), prompt).eval()
    queries = [
        "What?",
        "A much longer query than the others, so that it is padded.",
        "<EMB>: say it",
    ]
    together = model.generate(split.vectors[:3], queries, max_new_tokens=12)
    one_by_one = [model.generate(split.vectors[i : i + 1], q, 12)[0] for i, q in enumerate(queries)]
    assert together == one_by_one
    if llm.config.model_type not in ("gpt2", "gemma"):  # at random these repeat one token
        assert len(set(together)) > 1
    for i, query in enumerate(queries):
        embeds = model.prompt_embeds(split.vectors[i], query)
        assert embeds.ndim == 2 and embeds.shape[1] == 32
        out = llm.generate(inputs_embeds=embeds[None], max_new_tokens=12, do_sample=False,
                           attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                           pad_token_id=0, eos_token_id=prompt.tokenizer.eos_token_id)  # fmt: skip
        assert prompt.tokenizer.batch_decode(out, skip_special_tokens=True)[0] == together[i]
    with pytest.raises(elm.UserError, match=r"\[n, 12\]"):
        model.generate(torch.randn(2, 13), "What?")


def test_prompt_embeds_are_what_training_reads(parts):
    llm, prompt, split = parts
    model = elm.ELM(llm, adapter_for(llm, split), prompt).eval()
    split = split._replace(reuse=False)
    for i in (0, 1, 2):
        row, batch = split.raw(i), elm.pack(split, [i])
        embeds = model.prompt_embeds(batch["embeddings"][0], row["query"])
        (whole,) = examples(model, split, batch)
        torch.testing.assert_close(embeds, whole[: len(embeds)])
        assert len(whole) == len(embeds) + split.rows["response"][i]


def test_adapter_file_rebuilds_it_and_is_fp32(tmp_path):
    adapter = elm.Adapter(12, 24, 32, tokens=2, dropout=0.1, residual_scale=0.3, scale=0.02).eval()
    adapter.save(tmp_path / "a.safetensors", note="x")
    again, metadata = elm.Adapter.load(tmp_path / "a.safetensors")
    assert again.settings == adapter.settings and metadata["note"] == "x"
    x = torch.randn(3, 12)
    assert torch.equal(again(x), adapter(x))
    assert {t.dtype for t in again.state_dict().values()} == {torch.float32}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("spoil", ["cut", "other", "missing"])
def test_bad_adapter_files(tmp_path, spoil):
    path = tmp_path / "a.safetensors"
    elm.Adapter(12, 24, 32).save(path)
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif spoil == "other":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, path)
    else:
        path.unlink()
    with pytest.raises((elm.UserError, FileNotFoundError), match="a.safetensors"):
        elm.Adapter.load(path)


def test_load_refuses_another_llm(tmp_path):
    llm, other = make_llm(tmp_path / "llm"), make_llm(tmp_path / "llama", "llama")
    identity = elm.llm_identity(elm.load_llm(str(llm), RT.device, bf16=True))
    origin = dict(name=str(llm), bf16=False)
    elm.Adapter(12, 24, 32).save(tmp_path / "a.safetensors", llm=origin, identity=identity)
    model = elm.ELM.load(tmp_path / "a.safetensors")
    assert model.llm.dtype == torch.float32
    assert len(model.generate(torch.randn(2, 12), "What?", max_new_tokens=3)) == 2
    assert elm.ELM.load(tmp_path / "a.safetensors", str(llm), bf16=True).llm.dtype == torch.bfloat16
    with pytest.raises(elm.UserError, match="llama: the hash of the LLM's weights was"):
        elm.ELM.load(tmp_path / "a.safetensors", str(other))
    with pytest.raises(elm.UserError, match="no folder"):
        elm.ELM.load(tmp_path / "a.safetensors", "/nowhere/llm")


def test_an_llm_that_cannot_be_packed_is_refused(tmp_path):
    """Mamba carries a state along the row, so a packed row would leak into the next."""
    tok = byte_tokenizer()
    config = MambaConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, state_size=4)
    llm = MambaForCausalLM(config).eval()
    for p in llm.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model = elm.ELM(llm, elm.Adapter(12, 8, 32), elm.Prompt.of(tok))
    with pytest.raises(elm.UserError, match="MambaForCausalLM .* cannot be packed"):
        elm.check_packing(model)


def test_packing_check_accepts(parts):
    llm, prompt, split = parts
    elm.check_packing(elm.ELM(llm, adapter_for(llm, split), prompt))


def test_vocabulary_and_tokenizer_stay(parts):
    llm, prompt, split = parts
    before = len(prompt.tokenizer), llm.get_input_embeddings().weight.shape
    losses(elm.ELM(llm, adapter_for(llm, split), prompt), elm.pack(split, [0]))
    assert (len(prompt.tokenizer), llm.get_input_embeddings().weight.shape) == before
    assert len(byte_tokenizer()) == before[0]


def test_learning_rate_is_a_function_of_the_step():
    cfg = elm.TrainConfig(lr=1.0, warmup_steps=4)
    rates = [elm.lr_at(step, 12, cfg) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == 0.5 and rates[11] == 0.125 and rates[12] == 0.0
    assert elm.lr_at(0, 5, elm.TrainConfig(lr=2.0, warmup_steps=0)) == 2.0
    assert elm.lr_at(99, 5, elm.TrainConfig(lr=2.0, warmup_steps=0)) == 0.0
    assert elm.lr_at(2, 3, cfg) == 0.75  # warm-up longer than the run


def test_mean_cosine_is_that_of_all_pairs():
    x = torch.randn(6, 5, dtype=torch.float64)
    u = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    wanted = u[~torch.eye(6, dtype=torch.bool)].mean()
    assert elm.mean_cosine(x) == pytest.approx(wanted.item())
    assert elm.mean_cosine(x[:1]) == pytest.approx(0.0)


@pytest.mark.slow
def test_import_needs_torch_transformers_and_safetensors_alone():
    """As a copied file: with the other packages hidden, elm still imports and builds an adapter."""
    hide = (
        "import sys; sys.modules.update(dict.fromkeys(['deepspeed','wandb','optuna','bert_score']))"
    )
    code = f"{hide}; import elm; elm.Adapter(4, 4, 4); elm.load_config()\n" + (
        "try: elm.train(elm.load_config())\nexcept elm.UserError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "deepspeed is not installed: pip install deepspeed", done.stderr


def test_the_fingerprint_keeps_no_weights(llm_dir, monkeypatch):
    """Under ZeRO 3 each is gathered for a moment: what is kept of it must be a copy."""
    llm, kept, cat = elm.load_llm(str(llm_dir), RT.device, bf16=True), [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: kept.extend(parts) or cat(parts))
    elm.fingerprint(llm)
    assert len(kept) == len(list(llm.parameters()))
    assert all(k.untyped_storage().nbytes() == 4 * k.numel() <= 4 * 31 for k in kept)
