"""The small functions, on whatever Hypothesis finds."""

from itertools import islice
from unittest import mock

import numpy as np
import pytest
from conftest import (
    PROMPT,
    byte_tokenizer,
    make_data,
    open_train,
    read_jsonl,
    rows_path,
    write_rows,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

import elm

few = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=80).map(np.array)


@few
@given(lengths, st.integers(1, 8), st.integers(1, 4000))
def test_make_micro_batches(lengths, bins, budget):
    """Every example once, none of several over the budget, as many for each process, and no more
    micro-batches than a lower bound times what first fit may waste."""
    micros = elm.make_micro_batches(lengths, bins, budget)
    assert sorted(i for m in micros for i in m) == list(range(len(lengths)))
    assert len(micros) % bins == 0
    assert all(len(m) == 1 or lengths[m].sum() <= budget for m in micros if m)
    needed = max(np.ceil(lengths.sum() / budget), (lengths * 2 > budget).sum(), 1)
    assert len(micros) <= bins * np.ceil(2 * needed / bins)


@few
@given(st.integers(1, 500), st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 4))
def test_step_rows(num_rows, seed, size, epochs):
    """Each epoch has every row once, whatever the size; from any step on the rest is the same."""
    per_epoch = -(-num_rows // size)
    steps = list(islice(elm.step_rows(num_rows, seed, size, 0, 0), epochs * per_epoch))
    for epoch in range(epochs):
        mine = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert {e for e, *_ in mine} == {epoch}
        assert sorted(np.concatenate([rows for *_, rows in mine])) == list(range(num_rows))
    for done in range(1, len(steps)):
        epoch, position, _ = steps[done - 1]
        again = next(elm.step_rows(num_rows, seed, size, epoch, position))
        assert again[:2] == steps[done][:2] and (again[2] == steps[done][2]).all()


def normalizing_tokenizer(normalizer):
    tok = byte_tokenizer()
    tok.backend_tokenizer.normalizer = normalizer
    return tok


PROMPTS = [elm.Prompt(t) for t in (
    byte_tokenizer(), byte_tokenizer(None),
    normalizing_tokenizer(normalizers.NFC()), normalizing_tokenizer(normalizers.NFKC()),
    normalizing_tokenizer(normalizers.Prepend("_")))]  # fmt: skip
# NFC makes three characters of one of these Hebrew letters, NFKC eighteen of the Arabic ligature.
alphabets = st.sampled_from(["ab ", "aé ", "\u0958", "\ufb2c", "\ufdfa"])
pairs = alphabets.flatmap(lambda letters: st.tuples(*[st.text(letters, max_size=25)] * 2))


@pytest.fixture(scope="module")
def made_data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("prompt", PROMPTS, ids=["chat", "plain", "NFC", "NFKC", "prefix"])
@few
@given(st.lists(pairs, min_size=1, max_size=3), st.booleans(), st.integers(1, 3),
       st.sampled_from([1, 0, -1, -2, -3, -20]))  # fmt: skip
def test_what_is_cut_and_what_is_refused(prompt, made_data, made, slot, num_soft, beyond):
    """open_split tokenises few rows, yet misses none that tokenising everything finds."""
    row = read_jsonl(rows_path(made_data))[0]
    rows = [row | dict(query=q + "<EMB>" * slot, response=r + "b") for q, r in made]
    write_rows(made_data, "train", rows)
    named = [(f"{rows_path(made_data)}:{i}", elm.Row(**r)) for i, r in enumerate(rows, 1)]
    whole = elm.tokenize(prompt, named, num_soft, 10**6)
    limit = max(1, len(whole[0].ids) + beyond)
    too_long = [i for i, e in enumerate(whole, 1) if len(e.ids) - e.num_labels >= limit]
    if too_long:
        with pytest.raises(elm.UserError, match=f"jsonl:{too_long[0]}: the prompt takes all"):
            open_train(made_data, prompt, num_soft, limit)
        return
    split = open_train(made_data, prompt, num_soft, limit)
    assert split.counts["responses_cut"] == sum(len(e.ids) > limit for e in whole)
    for source in ("embedding", "text"):
        found = split.examples(range(len(rows)), source)
        full = elm.tokenize(prompt, named, num_soft, 10**6, source)
        for cut, uncut, long in zip(found, whole, full, strict=True):
            prompt_length = len(uncut.ids) - uncut.num_labels
            answer = uncut.ids[prompt_length:limit]
            assert (cut.ids[len(cut.ids) - len(answer) :] == answer).all()
            assert cut.num_labels == len(answer) and len(cut.ids) <= limit
            assert cut.truncated == (max(len(uncut.ids), len(long.ids)) > limit)
            if source == "embedding":
                assert (cut.ids == uncut.ids[:limit]).all()


@few
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda v: len(set(v)) > 1))
def test_shuffled_vectors(vectors):
    """A permutation of the vectors that moves each one."""
    rows = np.zeros(len(vectors), elm.ROW)
    rows["vector"] = vectors
    split = elm.Split(None, rows, None, {}, {}, PROMPT, 1, elm.DataConfig())
    other = elm.shuffled_vectors(split)
    assert (other != rows["vector"]).all()
    mapped = dict(zip(vectors, other.tolist(), strict=True))
    assert sorted(mapped.values()) == sorted(set(vectors))
    assert all(mapped[v] == o for v, o in zip(vectors, other, strict=True))


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@few
@given(anything, anything, st.floats(1e-30, 1e30), st.booleans(), st.lists(
    st.sampled_from(elm.TASKS), min_size=1, max_size=5))  # fmt: skip
@example("\U0001f600 \x7f", "\x7f\u2028\U0001f600", 1e-4, True, ["summary"])
def test_config_written_and_read_again(llm, project, lr, flag, tasks):
    deepspeed = dict(zero_stage=3, zero_optimization={"x": {llm: [lr, flag, {}]}})
    tables = dict(model=dict(llm=llm, standardize=flag, template={project: lr}),
                  train=dict(lr=lr), data=dict(tasks=tasks), wandb=dict(project=project),
                  deepspeed=deepspeed)  # fmt: skip
    cfg = elm.build(elm.Config, tables)
    with mock.patch("shutil.which", return_value=None):  # git, for the commit, takes its time
        assert elm.build(elm.Config, elm.tomllib.loads(elm.config_text(cfg))) == cfg
