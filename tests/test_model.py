import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ARCHITECTURES,
    CHAT,
    PROMPT,
    ROOT,
    RT,
    build_elm,
    command,
    go,
    limit_memory,
    make_data,
    make_llm,
    open_train,
    read_table,
    vectors_path,
)
from naive import elm_step, naive_loss, naive_step, token_rows
from safetensors.torch import save_file
from transformers import AttentionInterface, AutoTokenizer

import elm


@pytest.fixture(scope="module", params=ARCHITECTURES)
def parts(request, tmp_path_factory):
    """(ELM, train split) for each architecture, with 2 soft tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    make_llm(folder / "llm", request.param)
    prompt = elm.Prompt(AutoTokenizer.from_pretrained(folder / "llm"))
    split = open_train(make_data(folder / "data"), prompt, 2)
    model = build_elm(folder / "llm", split)
    model.llm.set_attn_implementation("eager")  # the reference: SDPA drops Gemma 2's softcap
    return model, split


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
    adapter = elm.Adapter(d_emb, 16, d_llm, tokens, residual_scale=0.5).eval()
    adapter.scale *= 0.03
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
    model, split = parts
    ids = torch.arange(model.llm.config.get_text_config().vocab_size)
    wanted = model.llm.get_input_embeddings()(ids).float().square().mean().sqrt()
    found = model(split.vectors).square().mean().sqrt()
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)


def test_loss_and_gradient_agree_with_the_naive_reference(parts, monkeypatch):
    """Every combination: one micro-batch or several, recomputed layers, whole logits or chunks."""
    naive, split = parts
    rows, vocab = np.arange(12), naive.llm.config.get_text_config().vocab_size
    loss, gradient = naive_step(naive.llm, naive.adapter, [token_rows(split, rows)])
    naive.llm.gradient_checkpointing_disable()
    naive.llm.eval()
    model, passes = build_elm(naive.llm.config._name_or_path, split), []
    elm.check_llm(model)
    for name, module in model.llm.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_: passes.append(1))
    for layers, budget, chunk in itertools.product((2, 0, 1), (100_000, 150), (2**24, 7 * vocab)):
        elm.recompute_layers(model.llm, layers)
        monkeypatch.setattr(elm, "CHUNK_LOGITS", {"cpu": chunk})
        passes.clear()
        found, at_adapter, micros = elm_step(model, split, rows, budget, RT)
        assert micros == 1 if budget == 100_000 else micros > 2
        assert abs(found - loss) / loss < 1e-5
        assert (at_adapter - gradient).norm() / gradient.norm() < 1e-5
        assert len(passes) == micros * (2 + layers)
    assert all(p.grad is None for p in model.llm.parameters())


def test_loss_of_vectors_in_memory_is_the_naive_loss(parts):
    """ELM.loss: numpy or torch, a query each or one for all, [E] for a single one."""
    model, split = parts
    rows = np.arange(5)
    texts, vectors = split.read(rows), split.embeddings(split.rows["vector"][rows])
    queries, responses = ([getattr(row, key) for row in texts] for key in ("query", "response"))
    parameters = list(model.adapter.parameters())
    naive = token_rows(split, rows)
    wanted = naive_loss(model.llm, model.adapter, naive) / sum(n for _, n, _ in naive)
    for given in (vectors, vectors.double().numpy()):
        loss = model.loss(given, queries, responses)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        at_loss, at_wanted = (torch.cat([g.flatten() for g in torch.autograd.grad(
            x, parameters, retain_graph=True)]) for x in (loss, wanted))  # fmt: skip
        assert (at_loss - at_wanted).norm() / at_wanted.norm() < 1e-5
    same = model.loss(vectors[:2], queries[0], responses[:2])
    assert torch.equal(same, model.loss(vectors[:2], [queries[0]] * 2, responses[:2]))
    single = model.loss(vectors[0], queries[0], responses[:1])
    assert torch.equal(single, model.loss(vectors[:1].numpy(), queries[0], responses[:1]))
    for wrong, message in (
        ((vectors, queries[:4], responses), "4 queries or responses for 5 vectors"),
        ((vectors[:, :7], queries, responses), r"\[5, 7\], but the adapter reads \[n, 12\]"),
        ((vectors * torch.nan, queries, responses), "row 0 is zero, NaN or infinite"),
        ((vectors, "<EMB> <EMB>", responses), "one <EMB> at most"),
        ((vectors, "long " * 999, responses), "pair 0: the prompt takes all"),
    ):
        with pytest.raises(elm.UserError, match=message):
            model.loss(*wrong)
    with pytest.raises(elm.UserError, match="^embeddings: vector 0 is zero"):
        elm.ELM.create(model.llm.config._name_or_path, vectors * 0)


def test_chunked_cross_entropy_is_cross_entropy():
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(17, 6, dtype=torch.float64), torch.randint(17, (11,))
    rows = []

    def head(h):
        rows.append(len(h))
        return torch.tanh(h @ weight.T) * 3.0

    def chunked(hidden):
        return elm.ChunkedCrossEntropy.apply(hidden, labels, head, 3)

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


def test_recomputation_is_as_configured(plain):
    """On a CPU, where no memory is planned; test_gpu.py has the plans for a GPU."""
    model, _ = plain
    for setting, layers in (("auto", 0), (True, 2), (False, 0)):
        cfg = elm.Config(model=elm.ModelConfig(grad_checkpoint=setting))
        assert elm.plan_memory(cfg, model, {}, RT) == 1024
        assert sum("forward" in vars(m) for m in model.llm.modules()) == layers


def test_a_dry_run_says_whether_memory_suffices(plain, monkeypatch):
    model, _ = plain
    for p in model.adapter.parameters():
        p.grad = torch.ones_like(p)
    limit_memory(monkeypatch, 512)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    probe = elm.Probe(torch.randn(32, 12), torch.zeros(32), torch.zeros(12))
    terms = elm.loss_terms(elm.LossConfig(drift_weight=0.5), model, probe)
    found = [elm.fits_memory(model, n, 128, terms, RT) for n in (128, 512, 1024, 512)]
    assert found == [True, True, False, True]
    assert all((p.grad == 1).all() for p in model.adapter.parameters())


def test_the_llm_never_drops_out(parts):
    naive, split = parts
    model = build_elm(naive.llm.config._name_or_path, split, dropout=0.5).train()
    assert model.adapter.training and not any(m.training for m in model.llm.modules())
    batch = elm.collate(split.examples([0]), split.embeddings(split.rows["vector"][[0]]))
    assert not torch.equal(model.nll(batch), model.nll(batch))  # the adapter does
    prompts = [torch.cat(model.prompt_embeds(split.vectors[:3], "What?")) for _ in range(2)]
    assert torch.equal(*prompts)  # but not in answers
    model.eval()
    assert torch.equal(model.nll(batch), model.nll(batch))


def test_generation_is_the_same_in_batches_and_from_prompt_embeds(parts):
    """For numpy and torch, [n, E] and [E]."""
    model, split = parts
    vectors, llm, tok = split.vectors[:3], model.llm, split.prompt.tokenizer
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
        out = llm.generate(inputs_embeds=embeds[None], max_new_tokens=12, do_sample=False,
                           attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                           pad_token_id=0, eos_token_id=tok.eos_token_id)  # fmt: skip
        assert tok.batch_decode(out, skip_special_tokens=True) == [answer]


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


def test_load_refuses_another_llm(tmp_path):
    llm, other = make_llm(tmp_path / "llm"), make_llm(tmp_path / "llama", "llama")
    whole = elm.ELM(elm.load_llm(str(llm), RT.device, bf16=True), elm.Adapter(12, 24, 32), PROMPT)
    origin = dict(name=str(llm), bf16=False, template={})
    whole.save(tmp_path / "a.safetensors", llm=origin)
    assert elm.ELM.load(tmp_path / "a.safetensors").llm.dtype == torch.float32
    assert elm.ELM.load(tmp_path / "a.safetensors", str(llm), bf16=True).llm.dtype == torch.bfloat16
    with pytest.raises(elm.UserError, match="llama: hash of the LLM's weights was"):
        elm.ELM.load(tmp_path / "a.safetensors", str(other))
    whole.save(tmp_path / "a.safetensors", llm="no table")
    with pytest.raises(elm.UserError, match="does not say which LLM"):
        elm.ELM.load(tmp_path / "a.safetensors")


@pytest.fixture
def plain(llm_dir, data_dir):
    """(ELM, its train split): vectors of very different norms."""
    torch.manual_seed(0)
    spread = read_table(data_dir) * (0.4 * torch.randn(10, 1)).exp()
    save_file({"x": spread}, vectors_path(data_dir))
    split = open_train(data_dir, PROMPT)
    return build_elm(llm_dir, split), split


def test_vectors_of_another_norm_are_refused(plain):
    """Alone and together; each that training had is taken."""
    model, split = plain
    calls = (model.prompt_embeds, partial(model.generate, max_new_tokens=1),
             lambda vectors, query: model.loss(vectors, query, ["x"] * (vectors.size // 12)))
    for call, kind in itertools.product(calls, ("float32", "float64", "float16")):
        every = split.vectors.numpy().astype(kind)
        for vectors in (every, *every):
            call(vectors, "What?")
        for factor in (11, 1 / 11):
            for vectors in (every, every[0]):
                with pytest.raises(elm.UserError, match="the vectors' norm was .* in training"):
                    call(vectors * factor, "What?")


def test_answers_stop_at_every_end_token(plain):
    """The template's, and any of generation_config.json's; or at a string."""
    model, split = plain
    llm, tok, vector = model.llm, split.prompt.tokenizer, split.vectors[0]
    other = [i for i in range(llm.config.vocab_size) if not tok.decode([i]).isalnum()]
    ask = partial(model.generate, vector, "What?", max_new_tokens=9, suppress_tokens=other,
                  no_repeat_ngram_size=1)  # so that nine letters differ
    llm.generation_config.eos_token_id = None
    (free,) = ask()
    ids = tok(free)["input_ids"]
    assert len(set(free)) == len(ids) == 9
    for own in (ids[4], [ids[4]], [other[0], ids[4]], [ids[6], ids[4]]):
        llm.generation_config.eos_token_id = own
        assert ask() == [free[:4]]
    llm.generation_config.eos_token_id = other[0]
    assert ask(stop_strings=[free[3:5]]) == ask(stop_strings=free[4]) == [free[:5]]
    model.prompt.end = [ids[4]]
    assert ask() == [free[:4]]


def test_the_prompt_is_part_of_the_adapter(settings, tmp_path, capsys):
    """Of a template that prints the time: the one of training is used wherever the adapter is."""
    template = "{{ strftime_now('%f') }}" + CHAT.replace("assistant\n", "assistant\n{{ manner }}: ")
    llm = make_llm(tmp_path / "llm", chat_template=template)

    own = [f"model.llm={llm}", "model.template.manner=briefly", "train.max_steps=4"]
    whole, out = go([*settings, *own])
    differs = "its chat template differs from training; the adapter's prompt is used"
    assert differs not in capsys.readouterr().err
    start = [f"train.resume={out / 'checkpoint_step_2.pt'}", f"output.dir={tmp_path / 'resumed'}"]
    resumed, _ = go([*settings, *own, *start])
    assert differs in capsys.readouterr().err
    path = out / "adapter_best.safetensors"
    assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()
    assert resumed == whole
    words = [f"adapter={path}", f"output.dir={tmp_path / 'again'}"]
    code, said = command("eval", out / "config.toml", *words)
    assert code == 0 and differs in said
    again = json.loads((tmp_path / "again" / "eval.json").read_bytes())
    assert again["loss"] == whole["loss"]
    model, (_, metadata) = elm.ELM.load(path), elm.Adapter.load(path)
    assert differs in capsys.readouterr().err
    assert model.prompt.text == metadata["prompt"]
    assert model.prompt.text["tail"].endswith("assistant\nbriefly: ")


@pytest.mark.parametrize("kind, shape", [
    ("bloom", {}), ("gpt_oss", dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1))])
def test_llms_that_cannot_be_packed_are_refused(tmp_path, kind, shape):
    """Bloom's own attention takes no packed rows, that of gpt-oss has sinks."""
    llm, vectors = make_llm(tmp_path, kind, **shape), torch.randn(4, 12)
    with pytest.raises(elm.UserError, match="ForCausalLM cannot be used"):
        elm.ELM.create(str(llm), vectors, bf16=kind == "gpt_oss")


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
        flipped = (x.flip(2) for x in (query, key, value))
        out, _ = own(module, *flipped, mask, **options)
        return out.flip(1), None

    monkeypatch.setitem(AttentionInterface._global_mapping, name, backwards)
    with pytest.raises(elm.UserError, match="its attention is more than causal"):
        elm.check_llm(model)


def test_learning_rate_is_a_function_of_the_step():
    cfg = elm.TrainConfig(lr=1.0, warmup_steps=4)
    rates = [elm.lr_at(step, 12, cfg) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == 0.5 and rates[11] == 0.125 and rates[12] == 0.0
    assert elm.lr_at(0, 5, elm.TrainConfig(lr=2.0, warmup_steps=0)) == 2.0
    assert elm.lr_at(99, 5, elm.TrainConfig(lr=2.0, warmup_steps=0)) == 0.0
    assert elm.lr_at(2, 3, cfg) == 0.75  # warm-up longer than the run


OWN_LOOP = """
import sys
hidden = "deepspeed optuna bert_score wandb sentence_transformers pandas matplotlib accelerate"
sys.modules.update(dict.fromkeys(hidden.split()))
import torch
import elm

torch.manual_seed(0)
vectors = torch.randn(8, 12).numpy()
queries, responses = ["What?", "Is <EMB> so?"] * 4, [f"it is {i * 37 % 8}" for i in range(8)]
model = elm.ELM.create("llm", vectors, bf16=False, hidden_dim=24, tokens=2)
before = [p.clone() for p in model.llm.parameters()]
optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-2)
losses = []
for _ in range(20):
    losses.append(model.loss(vectors, queries, responses))
    optimizer.zero_grad()
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < 0.95 * losses[0], losses
assert all(map(torch.equal, before, model.llm.parameters()))
assert all(p.grad is None for p in model.llm.parameters())
(answer,) = model.generate(vectors[0], "What?", max_new_tokens=3)
model.save("own.safetensors")
assert elm.ELM.load("own.safetensors").generate(vectors[0], "What?", max_new_tokens=3) == [answer]
try:
    elm.load_llm("llm", model.device, False, options=elm.DeepSpeedConfig(zero_stage=3))
except elm.UserError as e:
    print(e, elm.__file__)
"""


def test_elm_py_alone_trains_in_a_loop_of_ones_own(llm_dir, tmp_path):
    """A copied file, without the packages that only the commands need."""
    shutil.copy(ROOT / "elm.py", tmp_path)
    os.symlink(llm_dir, tmp_path / "llm")
    done = subprocess.run([sys.executable, "-c", OWN_LOOP], cwd=tmp_path, capture_output=True,
                          text=True)  # fmt: skip
    missing = "deepspeed is not installed: pip install deepspeed"
    assert done.stdout.strip() == f"{missing} {tmp_path / 'elm.py'}", done.stderr


def test_both_llms_of_one_shape_are_told_apart(tmp_path):
    one, two = make_llm(tmp_path / "one"), make_llm(tmp_path / "two")
    llm = elm.load_llm(str(two), RT.device, False)
    assert elm.fingerprint(elm.load_llm(str(one), RT.device, True)) == elm.fingerprint(llm)
    next(iter(llm.parameters())).data += 0.01
    assert elm.fingerprint(elm.load_llm(str(one), RT.device, False)) != elm.fingerprint(llm)
