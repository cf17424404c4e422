"""A frozen LLM in few bits, and the twins of an LLM that an adapter is taken for."""

import json
import os
import sys

import pytest
import torch
from conftest import (
    CPU,
    NO_TABLES,
    ROOT,
    byte_tokenizer,
    command,
    go,
    load_script,
    make_data,
    make_llm,
    make_settings,
    read_jsonl,
    refused,
    vectors_path,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import elm

# Wide enough for bitsandbytes, whose blocks have 64 weights.
SHAPE = dict(hidden_size=64, intermediate_size=128, head_dim=16)
KINDS = ("nf4", "int8")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("wide") / "llm", **SHAPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def trained_in_full(llm, data, tmp_path_factory):
    """The folder of a run in fp32."""
    return go(make_settings(llm, data, tmp_path_factory.mktemp("full") / "out"))[1]


@pytest.fixture(scope="module", params=KINDS)
def trained_in(request, llm, data, tmp_path_factory):
    """A kind, the settings and the folder of a run in it."""
    kind = request.param
    settings = make_settings(llm, data, tmp_path_factory.mktemp(kind) / "out")
    settings.append(f"model.quantization={kind}")
    return kind, settings, go(settings)[1]


def load_elm(llm, quantization="off", bf16=False) -> elm.ELM:
    """An ELM with a fresh adapter."""
    vectors = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    return elm.ELM.create(str(llm), vectors, bf16, hidden_dim=24, quantization=quantization)


def dequantized_forward(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer of bitsandbytes by its whole weights."""
    import bitsandbytes.functional as bnb

    weight = module.weight
    if hasattr(weight, "quant_state"):
        matrix = bnb.dequantize_4bit(weight.data, weight.quant_state)
    else:
        matrix = module.state.CB.float() * (module.state.SCB / 127)[:, None]
    return torch.nn.functional.linear(x, matrix.to(x.dtype), module.bias)


# Kinds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
def test_linear_layers_are_packed_and_embeddings_are_not(llm, kind, bf16):
    loaded = elm.load_llm(str(llm), CPU, bf16, quantization=kind)
    full = elm.load_llm(str(llm), CPU, bf16)
    packed = [name for name, p in loaded.named_parameters() if p.element_size() == 1]
    assert len(packed) == 2 * 7  # layers times projections
    assert all("_proj" in name for name in packed)
    assert torch.equal(loaded.get_input_embeddings().weight, full.get_input_embeddings().weight)
    assert elm.count_parameters(loaded) == elm.count_parameters(full)
    assert elm.bytes_of_weights(loaded) < elm.bytes_of_weights(full)
    assert elm.quantization_of(loaded) == kind == elm.name_precision(loaded)
    assert elm.quantization_of(full) == "off"
    assert elm.name_precision(full) == ("bfloat16" if bf16 else "float32")
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_table_is_transformers_own(llm):
    table = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "quant_method": "bitsandbytes"}
    loaded = elm.load_llm(str(llm), CPU, False, quantization=table)
    kind = type(loaded.model.layers[0].mlp.down_proj).__name__
    assert kind == "Linear4bit"
    found = elm.quantization_of(loaded)
    assert found["bnb_4bit_quant_type"] == "fp4" and elm.name_precision(loaded) == "bitsandbytes"
    again = elm.load_llm(str(llm), CPU, False, quantization=json.loads(json.dumps(found)))
    assert elm.weights_hash(again) == elm.weights_hash(loaded)


@pytest.mark.parametrize("table", [
    {"load_in_8bit": True, "llm_int8_skip_modules": ["down_proj", "lm_head"]},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
     "bnb_4bit_compute_dtype": "float32", "llm_int8_skip_modules": ["down_proj", "lm_head"]},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
     "bnb_4bit_compute_dtype": "bfloat16"},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}])
def test_an_adapter_keeps_the_table_of_its_llm(llm, tmp_path, table, caplog):
    """Not the short name of another one, by which it would be loaded with other weights."""
    model = load_elm(llm, table)
    model.save(tmp_path / "adapter.safetensors")
    again = elm.ELM.load(tmp_path / "adapter.safetensors")
    assert elm.quantization_of(again.llm) == elm.quantization_of(model.llm)
    assert again.trained_for == model.trained_for
    assert "twin" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_dequantised_weights(llm, kind, monkeypatch):
    """At the soft tokens, after passes without a gradient: on a CPU with AVX512-BF16 bitsandbytes
    repacks 4-bit weights there, for a kernel without a backward pass. int8 rounds its inputs, too,
    so its gradient is near that of the dequantised weights."""
    model = load_elm(llm, kind)
    row = elm.Row.model_construct(query="What?", response="alpha beta gamma")
    vectors = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    batch = elm.collate(
        elm.Encoder(model.prompt, 1, 256).encode([row] * 3, ["row"] * 3), vectors)
    soft_tokens = model(vectors).detach().requires_grad_()

    def loss_and_gradient():
        hidden = model.forward_hidden(batch, soft_tokens)
        loss = model.sequence_nll(hidden, batch).sum()
        return loss.item(), torch.autograd.grad(loss, soft_tokens)[0]

    with torch.no_grad():
        model.forward_hidden(batch, soft_tokens)
    loss, gradient = loss_and_gradient()
    num_replaced = 0
    for module in model.llm.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            num_replaced += 1
            forward = dequantized_forward.__get__(module)
            monkeypatch.setattr(module, "forward", forward)
    assert num_replaced == 14
    true_loss, true_gradient = loss_and_gradient()
    tolerance = 1e-5 if kind == "nf4" else 2e-2
    assert loss == pytest.approx(true_loss, rel=tolerance)
    cosine = torch.cosine_similarity(gradient.flatten(), true_gradient.flatten(), dim=0)
    assert cosine > 1 - tolerance
    assert gradient.norm() == pytest.approx(true_gradient.norm().item(), rel=5 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_a_pack_do_not_see_each_other(llm, kind):
    """Nor the outliers of another: LLM.int8() treats columns of a whole call alike."""
    model = load_elm(llm, kind)
    rows = [elm.Row.model_construct(query="What?", response=text, text="alpha " * n)
            for n, text in enumerate(("beta", "gamma delta " * 5, "x"), 1)]
    examples = elm.Encoder(model.prompt, 0, 256).encode(rows, ["row"] * 3, "text")
    with torch.no_grad():
        model.llm.get_input_embeddings().weight[ord("a")] *= 100  # an outlier of some rows
        together = model.nll(elm.collate(examples))
        alone = torch.cat([model.nll(elm.collate([example])) for example in examples])
    assert torch.allclose(together, alone, rtol=1e-4)


# Training


def test_training_in_few_bits(trained_in, data):
    """To its end, with a report; the same run stopped in the middle ends at the same bytes."""
    kind, settings, out = trained_in
    report = json.loads((out / "eval.json").read_text())
    losses = [entry["val_loss"] for entry in read_jsonl(out / "metrics.jsonl")
              if "val_loss" in entry]
    assert losses[-1] < losses[0] and report["loss"] > 0
    metadata = elm.Adapter.load(out)[1]
    assert metadata["llm"]["quantization"] == metadata["llm"]["precision"] == kind

    resumed = out.parent / "resumed"
    elsewhere = [*settings, f"output.dir={resumed}"]
    cfg = elm.load_config(None, elsewhere)
    trainer = elm.Trainer(cfg)
    trainer.fit_and_report = lambda: trainer.announce() or trainer.save()
    trainer.run()
    go(elsewhere, "train.resume=auto")
    for file in ("adapter_best.safetensors", "predictions.jsonl"):
        assert (resumed / file).read_bytes() == (out / file).read_bytes()


def test_the_llm_never_changes(llm, data, tmp_path, monkeypatch):
    """Not a byte of any weight, packed ones included, nor the logits of a probe."""
    for kind in KINDS:
        loaded = elm.load_llm(str(llm), CPU, False, quantization=kind)
        elm.choose_kernels(loaded)
        probe = torch.arange(40)[None]
        with torch.no_grad():
            logits = loaded(probe).logits
        before = [parameter.clone() for parameter in loaded.parameters()]
        monkeypatch.setattr(elm.Trainer, "load_llm", lambda self, loaded=loaded: loaded)
        settings = make_settings(llm, data, tmp_path / kind)
        go(settings, f"model.quantization={kind}")
        with torch.no_grad():
            assert torch.equal(loaded(probe).logits, logits)
        for parameter, bytes_before in zip(loaded.parameters(), before, strict=True):
            assert torch.equal(parameter, bytes_before)


def test_a_resume_needs_the_same_weights(trained_in):
    _, settings, out = trained_in
    refused("train.resume: hash of the LLM's weights was .* in training", "train", NO_TABLES,
            *settings, "model.quantization=none", "train.resume=auto", "train.max_steps=7")


def test_a_sweep_over_kinds(llm, data, tmp_path):
    """Two trials, each with the LLM in its own kind."""
    *settings, _ = make_settings(llm, data, tmp_path)  # without output.dir
    toml = tmp_path / "sweep.toml"
    toml.write_text('[space]\nmodel.quantization = ["nf4", "int8"]\n[study]\ntrials = 2\n')
    base = [f"base.config={NO_TABLES}", *(f"base.{setting}" for setting in settings)]
    code, said = command("sweep", toml, *base, f"output.dir={tmp_path / 'sweep'}")
    assert code == 0, said
    trials = list((tmp_path / "sweep").glob("trial_*/adapter_best.safetensors"))
    assert len(trials) == 2
    for trial in trials:
        kind = elm.read_toml(str(trial.parent / "config.toml"))["model"]["quantization"]
        assert elm.Adapter.load(trial)[1]["llm"]["quantization"] == kind


# Twins


def test_an_adapter_reads_a_twin(trained_in_full, llm, data, tmp_path):
    """With one line that names both. eval gives the twin's own figures."""
    *settings, _ = make_settings(llm, data, tmp_path)  # without output.dir
    losses = {"full": json.loads((trained_in_full / "eval.json").read_text())["loss"]}
    for kind in KINDS:
        report = tmp_path / kind
        code, said = command("eval", NO_TABLES, *settings, f"adapter={trained_in_full}",
                             f"report_dir={report}", f"model.quantization={kind}")
        assert code == 0, said
        assert said.count("is a twin of it") == 1
        assert (f"trained for {llm} (float32); {llm} ({kind}) is a twin of it, with the same "
                "tokenizer, sizes and token embeddings and other weights (a copy in other numbers, "
                "or one whose matrices alone were trained further); the adapter's figures are of "
                "the LLM of training") in said
        entries = json.loads((report / "eval.json").read_text())
        assert entries["llm"] == str(llm) and entries["precision"] == kind
        assert "on val" not in said  # the training's figures are of the other LLM
        losses[kind] = entries["loss"]
    assert len(set(losses.values())) == 3
    assert losses["nf4"] == pytest.approx(losses["full"], rel=0.05)


def test_answers_of_a_twin_are_another_job(trained_in_full, data, tmp_path):
    """A command that goes on with another LLM would mix the answers of two."""
    sibling = make_llm(tmp_path / "sibling", **SHAPE)
    shift_weights(sibling, 1e-3)
    out = tmp_path / "answers.jsonl"
    words = ["generate", f"adapter={trained_in_full}", f"embeddings={vectors_path(data, 'test')}",
             "query=What?", "max_new_tokens=4", f"out={out}"]
    assert command(*words)[0] == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]))
    refused(f"out: {out} has answers of another job: hash of the LLM's weights was", *words,
            f"llm={sibling}")
    assert out.read_bytes() == b"".join(lines[:3])
    assert command(*words)[0] == 0
    assert out.read_bytes() == whole


def test_an_adapter_of_few_bits_is_loaded_as_it_was_trained(trained_in, llm, data, tmp_path):
    """By generate and ELM.load; `off` gives the whole LLM, a twin."""
    kind, _, out = trained_in
    words = ["generate", f"adapter={out}", f"embeddings={vectors_path(data, 'test')}",
             "query=What?", "max_new_tokens=4"]
    code, said = command(*words)
    assert code == 0 and "twin" not in said, said
    code, said = command(*words, "quantization=off")
    assert code == 0 and f"({kind}); {llm} (float32) is a twin of it" in said, said
    assert elm.quantization_of(elm.ELM.load(out).llm) == kind
    assert elm.quantization_of(elm.ELM.load(out, quantization="off").llm) == "off"


def test_a_folder_that_is_quantised_already(trained_in, llm, data, tmp_path):
    """Loads as it is, trains, and is the LLM of an adapter that was trained in its kind."""
    kind, _, out = trained_in
    folder = tmp_path / "saved"
    elm.load_llm(str(llm), CPU, False, quantization=kind).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    settings = make_settings(folder, data, tmp_path / "out")
    report, _ = go(settings)
    assert report == json.loads((out / "eval.json").read_text())
    assert elm.quantization_of(elm.ELM.load(out, llm=str(folder)).llm) == kind
    refused(f"model.quantization: {folder} is quantised already, by bitsandbytes; leave "
            "model.quantization out", "train", NO_TABLES, *settings, "model.quantization=nf4",
            f"output.dir={tmp_path / 'new'}")


def write_fp8(folder) -> None:
    """The linear layers in blocks of 32 by 32, as DeepSeek and Qwen publish theirs, of 128."""
    weights = load_file(folder / "model.safetensors")
    for name, matrix in list(weights.items()):
        if not name.endswith("_proj.weight"):
            continue
        blocks = matrix.unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448  # the greatest of float8_e4m3fn
        packed = (blocks / scales).flatten(2, 3).flatten(0, 1)
        weights[name] = packed.to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))


def test_an_fp8_folder_is_a_twin(trained_in_full, llm, data, tmp_path, caplog):
    """On a CPU transformers dequantises it as it loads it."""
    folder = make_llm(tmp_path / "fp8", **SHAPE)
    write_fp8(folder)
    model = elm.ELM.load(trained_in_full, llm=str(folder))
    assert f"{folder} (float32) is a twin of it" in caplog.text
    assert "(a copy in other numbers, or one" in caplog.text
    full = AutoModelForCausalLM.from_pretrained(llm)
    weight = model.llm.model.layers[0].mlp.down_proj.weight
    assert torch.allclose(weight, full.model.layers[0].mlp.down_proj.weight, rtol=0.07, atol=1e-3)
    go(make_settings(folder, data, tmp_path / "out"), "train.max_steps=1")


def test_what_is_no_twin(trained_in_full, llm, tmp_path):
    """Strangers by their token embeddings, tokenizer and layers; a sibling that was trained further
    is a twin."""
    def load(folder) -> elm.ELM:
        return elm.ELM.load(trained_in_full, llm=str(folder))

    stranger = make_llm(tmp_path / "stranger", **SHAPE)
    weights = load_file(stranger / "model.safetensors")
    torch.manual_seed(7)
    weights["model.embed_tokens.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, stranger / "model.safetensors", {"format": "pt"})
    with pytest.raises(elm.UserError, match=r"it is no twin: its token embeddings differ from those"
                       r" of training \(cosine -?0\.\d+ in the median"):
        load(stranger)
    with pytest.raises(elm.UserError, match="no twin: its num_hidden_layers is 3, not 2; give it"):
        load(make_llm(tmp_path / "deeper", num_hidden_layers=3, **SHAPE))
    with pytest.raises(elm.UserError, match="no twin: its model_type is llama, not qwen3"):
        load(make_llm(tmp_path / "llama", "llama", **SHAPE))

    other_ids = make_llm(tmp_path / "other ids", **SHAPE)
    shift_weights(other_ids, 1e-3)
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    a_id, b_id = state["model"]["vocab"]["a"], state["model"]["vocab"]["b"]
    state["model"]["vocab"] |= {"a": b_id, "b": a_id}
    tokenizer.save_pretrained(other_ids)
    (other_ids / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(elm.UserError, match="no twin: its tokenizer gives other ids"):
        load(other_ids)

    with pytest.raises(elm.UserError, match="no twin: its num_attention_heads is 2, not 4"):
        load(make_llm(tmp_path / "fewer heads", num_attention_heads=2, **SHAPE))
    with pytest.raises(elm.UserError, match="no twin: its num_key_value_heads is 4, not 2"):
        load(make_llm(tmp_path / "more heads", num_key_value_heads=4, **SHAPE))

    sibling = make_llm(tmp_path / "sibling", **SHAPE)
    shift_weights(sibling, 1e-3)
    load(sibling)


def test_each_threshold_of_a_twin_counts(trained_in_full, llm, tmp_path):
    """One token of another direction, and all a little turned."""
    weights = load_file(llm / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    prompt = elm.Prompt(elm.load_tokenizer(str(llm)))
    torch.manual_seed(5)
    noise = torch.randn_like(embeddings) * embeddings.norm(dim=1, keepdim=True) / 8  # √64
    one = embeddings.clone()
    one[prompt.probe_ids()[0]] *= -1
    for name, changed, median, least in (
            ("one", one, "1.000", "-1.000"), ("all", embeddings + 0.3 * noise, "0.9[567]", "0.9")):
        folder = make_llm(tmp_path / name, **SHAPE)
        weights["model.embed_tokens.weight"] = changed.contiguous()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(elm.UserError,
                           match=rf"cosine {median}\d* in the median, {least}\d* at least"):
            elm.ELM.load(trained_in_full, llm=str(folder))


def shift_weights(folder, size: float, least_dim: int = 1) -> None:
    """As a little more training would, of tensors of at least so many dimensions."""
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(3)
    for name in weights:
        if weights[name].ndim >= least_dim:
            weights[name] += size * torch.randn_like(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("least_dim, line", [
    (1, "(one that was trained further, or a copy whose norms were scaled, as by AWQ)"),
    (2, "(a copy in other numbers, or one whose matrices alone were trained further)")])  # as LoRA
def test_the_line_says_what_a_twin_can_be(trained_in_full, tmp_path, caplog, least_dim, line):
    sibling = make_llm(tmp_path / "sibling", **SHAPE)
    shift_weights(sibling, 1e-2, least_dim)
    elm.ELM.load(trained_in_full, llm=str(sibling))
    assert line in caplog.text


def test_weights_in_packed_buffers_are_seen(llm):
    """As GPTQ and AWQ keep them: in the hash and in the bytes."""
    plain = elm.load_llm(str(llm), CPU, False)
    hashes = {elm.weights_hash(plain)}
    for value in (3, 4):
        packed = elm.load_llm(str(llm), CPU, False)
        buffer = torch.full((64, 16), value, dtype=torch.int32)
        packed.model.layers[1].mlp.register_buffer("qweight", buffer)
        hashes.add(elm.weights_hash(packed))
        assert elm.bytes_of_weights(packed) == elm.bytes_of_weights(plain) + 64 * 16 * 4
    assert len(hashes) == 3


def test_padding_of_the_vocabulary_does_not_count(trained_in_full, llm, tmp_path, caplog):
    """As some conversions pad it, and tie the output or not."""
    padded = tmp_path / "padded"
    loaded = AutoModelForCausalLM.from_pretrained(llm)
    loaded.resize_token_embeddings(loaded.config.vocab_size + 59)
    loaded.save_pretrained(padded)
    byte_tokenizer().save_pretrained(padded)
    elm.ELM.load(trained_in_full, llm=str(padded))
    assert "a copy in other numbers" in caplog.text


def test_an_adapter_of_an_early_version(trained_in_full, llm, tmp_path):
    """Its file has no token embeddings: it reads the LLM of training, and no other."""
    with safe_open(trained_in_full / "adapter_best.safetensors", framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        metadata = json.loads(f.metadata()["elm"])
    del tensors[elm.TOKEN_EMBEDDINGS]
    for key in ("quantization", "precision", "sizes", "norms_hash"):
        del metadata["llm"][key]
    early = tmp_path / "early.safetensors"
    save_file(tensors, early, {"elm": json.dumps(metadata)})
    elm.ELM.load(early)
    with pytest.raises(elm.UserError, match="no twin: the adapter is of an early version of elm"):
        elm.ELM.load(early, quantization="nf4")


def test_stored_in_half_the_bytes(trained_in_full, tmp_path):
    """save(dtype=bfloat16): the trained parameters are rounded to bf16, the rest stays fp32."""
    model = elm.ELM.load(trained_in_full)
    path = tmp_path / "small.safetensors"
    model.save(path, dtype=torch.bfloat16)
    again = elm.ELM.load(path).adapter
    for name, parameter in model.adapter.named_parameters():
        loaded = again.get_parameter(name)
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, parameter.bfloat16().float())
    for name, buffer in model.adapter.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)
    model.save(tmp_path / "whole.safetensors")
    num_trained = sum(p.numel() for p in model.adapter.parameters())
    saved = (tmp_path / "whole.safetensors").stat().st_size - path.stat().st_size
    assert 2 * num_trained - 200 < saved < 2 * num_trained + 200


# Bad input


class NoBackward(torch.nn.Module):
    """A kernel for serving: its output has no gradient, or one that leaves it out."""

    def __init__(self, linear, raises: bool):
        super().__init__()
        self.linear = linear
        self.raises = raises

    def forward(self, x):
        y = self.linear(x).detach()
        if self.raises and x.requires_grad:
            raise NotImplementedError("this kernel is for inference")
        return y


@pytest.mark.parametrize("raises, names", [
    (False, ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    (True, ("mlp.down_proj",)),
    (False, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),  # the gradient is not 0
    (False, ("self_attn.v_proj",))])
def test_a_kernel_without_a_backward_pass_is_refused(llm, data, tmp_path, monkeypatch, raises,
                                                     names):
    load_llm = elm.load_llm

    def load_without_backward(*arguments, **options):
        loaded = load_llm(*arguments, **options)
        layer = loaded.model.layers[1]
        for name in names:
            layer.set_submodule(name, NoBackward(layer.get_submodule(name), raises))
        return loaded

    monkeypatch.setattr(elm, "load_llm", load_without_backward)
    reason = f"model.layers.1.{names[0]} has no backward pass"
    if raises:
        reason = "this kernel is for inference"
    settings = make_settings(llm, data, tmp_path / "out")
    refused(rf"model.llm: {llm} \(nf4\): an adapter cannot be trained through these weights: "
            f"{reason}; through nf4 and int8 it can", "train", NO_TABLES, *settings,
            "model.quantization=nf4")
    assert not (tmp_path / "out").exists()


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


class WrongBackward(torch.nn.Module):
    def __init__(self, norm, factor: float):
        super().__init__()
        self.norm = norm
        self.factor = factor

    def forward(self, x):
        return ScaledGradient.apply(self.norm(x), self.factor)


@pytest.mark.parametrize("factor, reason", [
    (1, None), (-1, "is not that of the loss"), (10, "is not that of the loss"),
    (0, "has the norm 0.0"), (float("nan"), "has the norm nan")])
def test_a_wrong_gradient_is_refused(llm, factor, reason):
    model = load_elm(llm, "nf4")
    model.llm.model.norm = WrongBackward(model.llm.model.norm, factor)
    if reason is None:
        elm.check_gradient(model)
        return
    with pytest.raises(elm.UserError, match=f"the gradient at its input {reason}"):
        elm.check_gradient(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_output_layer_that_is_packed_and_tied_is_refused(tmp_path, bits):
    """By a table that skips no module: it has the embeddings' matrix, which is not packed."""
    folder = make_llm(tmp_path / "llm", tie_word_embeddings=True, **SHAPE)
    table = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": ["none"]}
    reason = f"quantization: the output layer of {folder} is that of its token embeddings"
    with pytest.raises(elm.UserError, match=reason):
        load_elm(folder, table)
    full = load_elm(folder)
    full.save(tmp_path / "adapter.safetensors")
    with pytest.raises(elm.UserError, match=reason):
        elm.ELM.load(tmp_path / "adapter.safetensors", quantization=table)
    load_elm(folder, table | {"llm_int8_skip_modules": ["lm_head"]})


def test_kinds_of_other_callers_are_checked(llm, trained_in_full, tmp_path):
    with pytest.raises(elm.UserError, match="quantization: 'int4' is none of off, nf4, int8"):
        load_elm(llm, "int4")
    with pytest.raises(elm.UserError, match="quantization: 4 is none of off, nf4, int8"):
        elm.ELM.load(trained_in_full, quantization=4)
    adapter, metadata = elm.Adapter.load(trained_in_full)
    metadata["llm"]["quantization"] = ["nf4"]
    with pytest.raises(elm.UserError, match=r"x: does not say which LLM it was trained for: "
                       r"\['nf4'\] is none of off"):
        elm.ELM.from_adapter(adapter, metadata, "x")


def test_bad_settings(llm, data, tmp_path, monkeypatch):
    settings = make_settings(llm, data, tmp_path / "out")
    train = ["train", NO_TABLES, *settings]
    refused("model.quantization.* 'int4' is none of off, nf4, int8, nor a table", *train,
            "model.quantization=int4")
    refused("model.quantization.* 4 is none of off, nf4, int8, nor a table", *train,
            "model.quantization=4")
    refused("model.quantization: no quantization_config of transformers", *train,
            'model.quantization={quant_method="none such"}')
    refused("model.quantization: no quantization_config of transformers", *train,
            "model.quantization={bits=4}")
    refused("model.quantization: BitsAndBytesConfig of transformers has no 'bnb_4bit_quant_typ', "
            "did you mean bnb_4bit_quant_type?", *train,
            'model.quantization={load_in_4bit=true, bnb_4bit_quant_typ="nf4"}')
    refused("model: unknown key, did you mean quantization?", "generate", "adapter=x",
            f"embeddings={vectors_path(data)}", "query=q", "model.quantization=nf4")
    refused("deepspeed.zero_stage = 3 cannot share out a quantised LLM", *train,
            "model.quantization=nf4", "deepspeed.zero_stage=3")
    refused("quantization: is of the LLM in this process", "generate", "adapter=x",
            f"embeddings={vectors_path(data)}", "query=q", "endpoint=http://localhost:1/v1",
            "quantization=nf4")
    for package in ("bitsandbytes", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            refused(rf"{package} is not installed: pip install {package} \(elm's extra 'quantize' "
                    "brings it", *train, "model.quantization=nf4")
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_it_answers_about_texts(llm):
    """As data/prepare.py synthesize has it do."""
    names = set()
    for kind in ("off", *KINDS):
        engine = elm.LLMEngine(str(llm), False, {}, 8, kind)
        (answer,) = engine.answer([elm.Question("Say it.", "alpha beta")], 0, 0.0)
        assert answer.text
        names.add(engine.name)
    assert len(names) == 3  # answers of one kind are not another's


def test_thresholds_lie_between_twins_and_strangers():
    """Token embeddings in 4 bits by the blocks of GGUF and nf4 are above them; those of other
    tokens of the tiny LLM are below."""
    loaded = elm.load_llm(str(ROOT / "data/tiny/llm"), CPU, False)
    prompt = elm.Prompt(elm.load_tokenizer(str(ROOT / "data/tiny/llm")))
    own = elm.sample_token_embeddings(loaded, prompt).float()
    copies = load_script("data/real/twins.py").copies_in_few_bits(own)
    for name, copy in copies.items():
        cosines = torch.cosine_similarity(own, copy)
        assert cosines.median() > elm.LEAST_MEDIAN_COSINE, name
        assert cosines.min() > elm.LEAST_COSINE, name
    # Tokens that its training never saw are nearly equal; the others have other directions.
    assert torch.cosine_similarity(own, own.roll(1, 0)).min() < elm.LEAST_COSINE / 2
