"""ELM inside other people's programs: sampling, threads, dtypes, copies, and vectors as they hold
them."""

import copy
import logging
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_elm, go, open_train, read_jsonl, read_table
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation import configuration_utils

import elm


@pytest.fixture
def plain(llm_dir, data_dir):
    """(ELM, vectors [4, 12])."""
    prompt = elm.Prompt(AutoTokenizer.from_pretrained(llm_dir))
    split = open_train(data_dir, prompt)
    return build_elm(llm_dir, split), split.vectors[:4].clone()


# ------------------------------------------------------------------ sampling


def answer_plainly(model, vectors, **options) -> list[str]:
    """By transformers alone, each prompt of one length."""
    embeds = torch.stack(model.prompt_embeds(vectors, "What?"))
    ends = sorted(elm.end_tokens(model.llm, model.prompt))
    out = model.llm.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=12, eos_token_id=ends, pad_token_id=ends[0], **options)  # fmt: skip
    answers = elm.decode_answers(out.tolist(), set(ends), model.prompt.tokenizer)
    return [answer.text for answer in answers]


SAMPLING = {
    "temperature": 0.7, "top_p": 0.6, "top_k": 5, "min_p": 0.1, "top_h": 0.4, "typical_p": 0.5,
    "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLING)
def test_each_option_of_sampling_samples(plain, name):
    model, vectors = plain
    option = {name: SAMPLING[name]}
    torch.manual_seed(5)
    wanted = answer_plainly(model, vectors, do_sample=True, **option)
    torch.manual_seed(5)
    assert model.generate(vectors, "What?", 12, **option) == wanted
    assert wanted != model.generate(vectors, "What?", 12)


def test_these_are_all_options_of_sampling(monkeypatch, caplog):
    """Of those that transformers says to be read in sampling alone."""
    names = [name for name, value in vars(GenerationConfig()).items() if not name.startswith("_")]
    warns = []
    for name in names:
        for value in (0.123, 7):
            config = GenerationConfig()
            setattr(config, name, value)
            found = []
            record = lambda text, *_, found=found: found.append(text)  # noqa: E731
            for method in ("warning", "warning_once", "info"):
                monkeypatch.setattr(configuration_utils.logger, method, record)
            try:
                config.validate()
            except (ValueError, TypeError, AttributeError):
                continue
            if any("sample" in text for text in found):
                warns.append(name)
    assert set(warns) == set(elm.SAMPLING_OPTIONS)
    assert set(SAMPLING) == set(elm.SAMPLING_OPTIONS)


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": 0.0}, {"temperature": None}, {"min_p": None},
    {"temperature": 0, "top_p": 0.5}, {"do_sample": False, "temperature": 0.7},
    {"do_sample": False, "top_k": 5, "min_p": 0.1}, {"do_sample": True, "temperature": 0}, {},
])  # fmt: skip
def test_what_is_greedy(plain, options, caplog):
    """No temperature, or one of 0, or an explicit do_sample; without a word of transformers."""
    model, vectors = plain
    wanted = answer_plainly(model, vectors, do_sample=False)
    with caplog.at_level(logging.WARNING):
        assert model.generate(vectors, "What?", 12, **options) == wanted
    assert not caplog.records


def test_a_whole_temperature_samples(plain):
    model, vectors = plain
    torch.manual_seed(5)
    wanted = answer_plainly(model, vectors, do_sample=True, temperature=2.0)
    torch.manual_seed(5)
    assert model.generate(vectors, "What?", 12, temperature=2) == wanted


@pytest.mark.parametrize("options, message", [
    ({"min_P": 0.1}, r"^generate: min_P=0.1: .*'min_P'"),
    ({"temperature": -1}, r"^generate: temperature=-1: .*positive"),
    ({"temperature": "hot"}, r"^generate: temperature='hot': could not convert"),
    ({"top_k": 1.5}, r"^generate: top_k=1.5: "),
    ({"num_return_sequences": 2}, r"^generate: num_return_sequences=2: "),
    ({"attention_mask": None, "inputs_embeds": 1}, r"^generate: .*multiple values"),
    ({"generation_config": GenerationConfig(temperature=0.7)}, "^generation_config: give its"),
])  # fmt: skip
def test_options_that_transformers_refuses(plain, options, message):
    model, vectors = plain
    with pytest.raises(elm.UserError, match=message) as e:
        model.generate(vectors, "What?", 12, **options)
    assert "\n" not in str(e.value)


def test_answers_are_texts_whatever_the_llms_config_returns(plain):
    model, vectors = plain
    wanted = model.generate(vectors, "What?", 5, num_beams=2)
    model.llm.generation_config.return_dict_in_generate = True
    assert model.generate(vectors, "What?", 5, num_beams=2, output_scores=True) == wanted
    torch.manual_seed(0)
    assert len(model.generate(vectors, "What?", 5, temperature=1.0)) == 4


# ------------------------------------------------------------------ threads


@pytest.fixture
def often_switched():
    """Threads take turns much more often than they do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_threads_of_one_elm_get_what_one_thread_gets(plain, often_switched):
    """As a web handler's, half of them training: answers, losses with their gradients through
    recomputed layers, and prompts; and the LLM is afterwards what it was."""
    model, vectors = plain
    model.llm.generation_config = GenerationConfig(
        eos_token_id=list(range(0, 262, 3)), repetition_penalty=1.3)
    elm.recompute_layers(model.llm, 1.0)
    model.train()  # the adapter would drop out: in prompts it must not
    model.adapter.dropout = 0.5

    def generate(i):
        return model.generate(vectors[: 1 + i % 4], f"What {i}?", 6)

    def prompts(i):
        (embeds,) = model.prompt_embeds(vectors[i % 4 :][:1], "What?")
        return embeds.double().sum().item()

    def loss(i):
        given = vectors.clone().requires_grad_()
        soft = model.adapter(given, drops_out=False)
        examples = model_examples(model, i)
        batch = elm.collate(examples, given.detach())
        nll = model.sequence_nll(model.forward_hidden(batch, soft), batch).sum()
        (gradient,) = torch.autograd.grad(nll, given)
        return nll.item(), gradient.double().sum().item()

    calls = [(work, i) for i in range(12) for work in (generate, loss, prompts, loss)]
    wanted = [work(i) for work, i in calls]
    before = state_of(model)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(lambda call: call[0](call[1]), calls)) == wanted
    assert state_of(model) == before


def model_examples(model, i: int) -> list[elm.Example]:
    rows = [elm.Row.model_construct(query="What?", response="word " * (1 + i % 3))] * 4
    encoder = elm.Encoder(model.prompt, model.adapter.tokens, 200)
    return encoder.encode(rows, list("abcd"))


def state_of(model) -> tuple:
    """What is set for a while."""
    return (model.llm.generation_config.to_json_string(), id(model.llm.generation_config),
            model.llm.config._attn_implementation, model.adapter.training,
            vars(model.llm.base_model).get("forward"))  # fmt: skip


def test_threads_load_models_one_after_the_other(llm_dir):
    """transformers leaves its own functions replaced where two threads load at a time: from then on
    it finds tied weights missing."""
    loading = []
    most = 0

    class Slow:
        @staticmethod
        def from_pretrained(name, **options):
            nonlocal most
            loading.append(name)
            most = max(most, len(loading))
            time.sleep(0.05)
            loading.pop()

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(elm.load_pretrained, Slow, str(llm_dir), "llm")
    assert most == 1


def test_no_backward_pass_runs_under_the_lock(plain):
    """On a GPU a thread of autograd's own recomputes layers, and needs it: at the head's logits,
    whose gradient is computed within the loss, and at the LLM's hidden states."""
    model, vectors = plain
    elm.recompute_layers(model.llm, 1.0)
    is_free = []

    def try_lock() -> None:
        lock = elm.llm_lock(model.llm)
        is_free.append(lock.acquire(blocking=False))
        if is_free[-1]:
            lock.release()

    def look(_):
        thread = threading.Thread(target=try_lock)
        thread.start()
        thread.join()

    for module in (model.llm.get_output_embeddings(), model.llm.base_model.norm):
        module.register_forward_hook(lambda _, __, out: out.register_hook(look) and None)
    model.loss(vectors, "What?", "yes").backward()
    assert is_free == [True, True]


def test_a_training_in_a_thread(settings):
    """As in Streamlit: it leaves the handlers of the main thread alone."""
    mine = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with ThreadPoolExecutor(1) as pool:
            report, folder = pool.submit(go, settings, "eval.samples=0").result()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert report["step"] == 6
    entries = read_jsonl(folder / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [0, 3, 6]


def test_a_run_that_failed_before_its_first_line_leaves_a_folder_for_the_next(
    settings, monkeypatch
):
    """Alone, or with train.resume=auto. One that logged, or saved, is a run."""
    for more in ((), ("train.resume=auto",)):
        with monkeypatch.context() as patch:
            patch.setattr(elm.Trainer, "announce", fail)
            with pytest.raises(KeyError):
                go(settings, *more)
    report, folder = go(settings, "eval.samples=0")
    assert report["step"] == 6
    with pytest.raises(elm.UserError, match="holds a run already"):
        go(settings)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(elm.UserError, match="holds a run already"):
        go(settings)


def fail(*_):
    raise KeyError("before the first step")


# ------------------------------------------------------------------ dtypes and copies


@pytest.fixture
def bf16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_default_dtype_changes_nothing(settings, trained, bf16_by_default):
    """As vLLM's users have it: the adapter, its fits and all losses are fp32."""
    wanted, whole, _ = trained
    report, folder = go(settings, "loss.drift_weight=0.1", "train.max_steps=2", "eval.samples=0")
    torch.set_default_dtype(torch.float32)
    again, other = go(settings, f"output.dir={folder}2", "loss.drift_weight=0.1",
                      "train.max_steps=2", "eval.samples=0")  # fmt: skip
    for entry, right in zip(
        read_jsonl(folder / "metrics.jsonl"), read_jsonl(other / "metrics.jsonl"), strict=True
    ):
        for key in right.keys() - {"tokens_per_second", "memory_gib"}:
            assert entry[key] == right[key], key
    assert report == again
    model = elm.ELM.load(folder)
    torch.set_default_dtype(torch.bfloat16)
    assert elm.Adapter.load(folder)[0].state_dict().keys() == model.adapter.state_dict().keys()
    for name, tensor in elm.Adapter.load(folder)[0].state_dict().items():
        assert torch.equal(tensor, model.adapter.state_dict()[name]), name


def test_a_default_dtype_changes_no_elm_in_memory(llm_dir, data_dir, bf16_by_default):
    vectors = read_table(data_dir)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.set_default_dtype(dtype)
        torch.manual_seed(0)
        model = elm.ELM.create(str(llm_dir), vectors, bf16=False, hidden_dim=24)
        statistics = {key: model.adapter.state_dict()[key] for key in ("mean", "std", "norms")}
        weights = {key: torch.full_like(t, 0.01) if t.ndim > 1 else t
                   for key, t in model.adapter.state_dict().items()}  # fmt: skip
        model.adapter.load_state_dict(weights)
        loss = model.loss(vectors, "What?", ["yes"] * len(vectors)).item()
        found.append((loss, model.generate(vectors, "What?", 5), statistics))
        assert {t.dtype for t in model.adapter.state_dict().values()} == {torch.float32}
    assert found[0][:2] == found[1][:2]
    for key, tensor in found[0][2].items():
        assert torch.equal(tensor, found[1][2][key])


@pytest.mark.parametrize("cast, dtype, tolerance", [
    (lambda m: m.half(), torch.float16, 1e-3), (lambda m: m.bfloat16(), torch.bfloat16, 1e-2),
    (lambda m: m.to(torch.float16), torch.float16, 1e-3),
    (lambda m: m.double(), torch.float64, 1e-5),
    (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16, 1e-2)])  # fmt: skip
def test_a_cast_is_of_the_llm(plain, cast, dtype, tolerance):
    """The adapter stays as it is, to the bit, and trains."""
    model, vectors = plain
    wanted = model.loss(vectors, "What?", ["yes, it is"] * 4).item()
    weights = copy.deepcopy(model.adapter.state_dict())
    model = cast(model)
    assert model.llm.dtype == dtype
    for name, tensor in model.adapter.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name])
    loss = model.loss(vectors, "What?", ["yes, it is"] * 4)
    assert loss.item() == pytest.approx(wanted, rel=tolerance)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.adapter.parameters())
    assert len(model.generate(vectors, "What?", 5)) == 4


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("is_used", [False, True])
def test_a_copy_of_an_elm(plain, make, is_used):
    """By deepcopy or pickle: the same answers, losses and gradients, through recomputed layers,
    too; and it shares nothing with the first."""
    model, vectors = plain
    if is_used:
        elm.recompute_layers(model.llm, 1.0)
        model.loss(vectors, "What?", ["yes"] * 4).backward()
        model.generate(vectors, "What?", 5)
        model.adapter.zero_grad()
    other = make(model)
    found = []
    for each in (model, other):
        loss = each.loss(vectors, "What?", ["yes"] * 4)
        gradient = torch.autograd.grad(loss, list(each.adapter.parameters()))
        found.append((loss.item(), [g.double().sum().item() for g in gradient],
                      each.generate(vectors, "What?", 5)))  # fmt: skip
    assert found[0] == found[1]
    model.llm.get_input_embeddings().weight.data.zero_()
    assert other.generate(vectors, "What?", 5) == found[0][2]
    assert other.loss(vectors, "What?", ["yes"] * 4).item() == found[0][0]


# ------------------------------------------------------------------ vectors

HELD = {
    "numpy": lambda v: v.numpy(),
    "a slice backwards": lambda v: np.ascontiguousarray(v.numpy()[::-1, ::-1])[::-1, ::-1],
    "big-endian": lambda v: v.numpy().astype(">f4"),
    "big-endian fp64": lambda v: v.numpy().astype(">f8"),
    "fp64": lambda v: v.double(),
    "not contiguous": lambda v: v.T.contiguous().T,
    "fortran": lambda v: np.asfortranarray(v.numpy()),
    "requires grad": lambda v: v.clone().requires_grad_(),
    "a list of lists": lambda v: v.tolist(),
    "a tuple of tuples": lambda v: tuple(tuple(row) for row in v.tolist()),
    "a list of tensors": lambda v: list(v),
    "a list of arrays": lambda v: list(v.numpy()),
    "a list of tensors that require grad": lambda v: [row.clone().requires_grad_() for row in v],
    "a column of arrays": lambda v: pd.Series(list(v.numpy()), index=[7, 5, 3, 1]),
    "a column of lists": lambda v: pd.Series(v.tolist()),
    "a column's values": lambda v: pd.Series(list(v.numpy())).to_numpy(),
    "a data frame": lambda v: pd.DataFrame(v.numpy()),
    "objects": lambda v: v.numpy().astype(object),
}
ROUNDED = {
    "fp16": lambda v: v.half(), "fp16 of numpy": lambda v: v.numpy().astype(np.float16),
    "bf16": lambda v: v.bfloat16(), "a list in bf16": lambda v: list(v.bfloat16()),
    "integers": lambda v: (100 * v).int(), "bytes": lambda v: (100 * v).to(torch.int8).numpy(),
}  # fmt: skip


@pytest.mark.parametrize("name", [*HELD, *ROUNDED])
def test_vectors_as_people_hold_them(plain, llm_dir, name):
    """Each function takes them, with the values of numpy.ascontiguousarray(…, float32)."""
    model, vectors = plain
    given = (HELD | ROUNDED)[name](vectors)
    right = vectors
    if name in ROUNDED:
        right = given if isinstance(given, np.ndarray) else torch.stack(list(given)).float()
        right = torch.from_numpy(np.ascontiguousarray(right, np.float32))
        model.adapter.norms.fill_(torch.nan)  # integers are longer
    assert torch.equal(elm.as_tensor(given), right)
    queries = ["What?"] * 4
    wanted = model.prompt_embeds(right, queries)
    for embeds, same in zip(model.prompt_embeds(given, queries), wanted, strict=True):
        assert torch.equal(embeds, same)
    assert model.generate(given, queries, 4) == model.generate(right, queries, 4)
    loss = model.loss(given, queries, queries)
    assert loss.item() == model.loss(right, queries, queries).item()
    created = elm.ELM.create(str(llm_dir), given, bf16=False, hidden_dim=4)
    torch.testing.assert_close(created.adapter.mean, right.mean(0))


@pytest.mark.parametrize("name", [
    "numpy", "big-endian", "a slice backwards", "a list of lists", "objects"])
def test_a_single_vector(plain, name):
    """[E]; of a list or a column of one, [1, E]."""
    model, vectors = plain
    given = HELD[name](vectors)[0]
    assert torch.equal(elm.as_tensor(given), vectors[0])
    assert model.prompt_embeds(given, "What?").ndim == 2
    (embeds,) = model.prompt_embeds(pd.Series([vectors[0].numpy()]), "What?")
    assert torch.equal(embeds, model.prompt_embeds(vectors[0], "What?"))
    assert model.generate(given, "What?", 4) == model.generate(vectors[:1], "What?", 4)


def test_a_table_that_is_mapped_and_read_only(plain, tmp_path, recwarn):
    model, vectors = plain
    np.save(tmp_path / "x.npy", vectors.numpy())
    given = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert model.generate(given, "What?", 4) == model.generate(vectors, "What?", 4)
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_a_loss_has_the_gradient_of_its_vectors(plain):
    model, vectors = plain
    together = vectors.clone().requires_grad_()
    each = [row.clone().requires_grad_() for row in vectors]
    model.loss(together, "What?", ["yes"] * 4).backward()
    model.loss(each, "What?", ["yes"] * 4).backward()
    assert torch.equal(together.grad, torch.stack([row.grad for row in each]))
    assert together.grad.any(1).all()


NO_VECTORS = {
    "an empty list": [],
    "text": ["one", "two"],
    "numbers as text": [["1.0", "2.0"]],
    "ragged": [[1.0, 2.0], [1.0]],
    "ragged tensors": [torch.ones(3), torch.ones(2)],
    "tensors and lists": [torch.ones(12), [1.0] * 12],
    "none": None,
    "a list with none": [np.ones(12), None],
    "numbers with none": [[1.0, None]],
    "complex": np.ones((2, 12), complex),
    "complex tensor": torch.ones(2, 12, dtype=torch.complex64),
    "sparse": torch.ones(2, 12).to_sparse(),
    "dates": np.zeros((2, 12), "datetime64[s]"),
    "a dict": {"embedding": [1.0]},
    "a column with a gap": pd.Series([np.ones(12), np.nan]),
}


@pytest.mark.parametrize("name", NO_VECTORS)
def test_what_are_no_vectors(plain, llm_dir, name):
    model, _ = plain
    given = NO_VECTORS[name]
    for where, function in (
        ("vectors", lambda: model.generate(given, "What?")),
        ("vectors", lambda: model.prompt_embeds(given, "What?")),
        ("vectors", lambda: model.loss(given, "What?", "yes")),
        ("embeddings", lambda: elm.ELM.create(str(llm_dir), given)),
    ):
        with pytest.raises(elm.UserError, match=rf"^{where}: no vectors \[n, E\] of num") as e:
            function()
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("query", [None, 3, ["What?", None], b"What?"])
def test_what_are_no_queries(plain, query):
    model, _ = plain
    vectors = np.ones((2, 12), np.float32)
    with pytest.raises(elm.UserError, match="not a text, nor a list of 2 texts"):
        model.generate(vectors, query)
    with pytest.raises(elm.UserError, match="not a text, nor a list of 2 texts"):
        model.loss(vectors, "What?", query)


@pytest.mark.parametrize("shape", [(2, 3, 12), (12, 12, 1), ()])
def test_arrays_of_other_dimensions(plain, llm_dir, shape):
    model, _ = plain
    given = np.ones(shape, np.float32)
    for function in (lambda: model.generate(given, "What?"),
                     lambda: model.loss(given, "What?", "yes")):  # fmt: skip
        with pytest.raises(elm.UserError, match=r"^vectors: \[.*\], but the adapter reads \[n, 12"):
            function()
    with pytest.raises(elm.UserError, match=r"^embeddings: \[.*\], not vectors \[n, E\]"):
        elm.ELM.create(str(llm_dir), given)
