"""The small functions, on whatever Hypothesis finds."""

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
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

EXAMPLES = 150 if os.environ.get("CI") else 40
few = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=80).map(np.array)


@few
@given(lengths, st.integers(1, 8), st.integers(1, 4000))
def test_pack_micro_batches(lengths, num_processes, budget):
    """Every example once, none of several over the budget, as many for each process, and no more
    micro-batches than a lower bound times what first fit may waste."""
    micro_batches = elm.pack_micro_batches(lengths, num_processes, budget)
    assert sorted(i for members in micro_batches for i in members) == list(range(len(lengths)))
    assert len(micro_batches) % num_processes == 0
    for members in micro_batches:
        assert len(members) <= 1 or lengths[members].sum() <= budget
    by_sum = np.ceil(lengths.sum() / budget)
    by_pairs = (lengths * 2 > budget).sum()  # no two of these fit together
    needed = max(by_sum, by_pairs, 1)
    assert len(micro_batches) <= num_processes * np.ceil(2 * needed / num_processes)


@few
@given(st.integers(1, 500), st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 4))
def test_step_rows(num_rows, seed, size, epochs):
    """Each epoch has every row once, whatever the size; from any step on the rest is the same."""
    per_epoch = -(-num_rows // size)
    steps = list(islice(elm.step_rows(num_rows, seed, size, 0, 0), epochs * per_epoch))
    for epoch in range(epochs):
        mine = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert {step.epoch for step in mine} == {epoch}
        assert sorted(np.concatenate([step.row_ids for step in mine])) == list(range(num_rows))
    for done, following in zip(steps, steps[1:], strict=False):
        again = next(elm.step_rows(num_rows, seed, size, done.epoch, done.position))
        assert (again.epoch, again.position) == (following.epoch, following.position)
        assert (again.row_ids == following.row_ids).all()


def normalizing_tokenizer(normalizer):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


TOKENIZERS = {
    "chat": byte_tokenizer(),
    "plain": byte_tokenizer(None),
    "NFC": normalizing_tokenizer(normalizers.NFC()),
    "NFKC": normalizing_tokenizer(normalizers.NFKC()),
    "prefix": normalizing_tokenizer(normalizers.Prepend("_")),
}
# NFC makes three characters of one of these Hebrew letters, NFKC eighteen of the Arabic ligature.
alphabets = st.sampled_from(["ab ", "aé ", "\u0958", "\ufb2c", "\ufdfa"])
pairs = alphabets.flatmap(lambda letters: st.tuples(*[st.text(letters, max_size=25)] * 2))


@pytest.fixture(scope="module")
def made_data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@few
@given(
    texts=st.lists(pairs, min_size=1, max_size=3), has_slot=st.booleans(),
    num_soft=st.integers(1, 3), beyond=st.sampled_from([1, 0, -1, -2, -3, -20]))  # fmt: skip
def test_what_is_cut_and_refused(tokenizer, made_data, texts, has_slot, num_soft, beyond):
    """open_split tokenises few rows, yet misses none that tokenising everything finds."""
    prompt = elm.Prompt(TOKENIZERS[tokenizer])
    row = read_jsonl(rows_path(made_data))[0]
    slot = "<EMB>" if has_slot else ""
    made = [row | dict(query=query + slot, response=response + "b") for query, response in texts]
    write_rows(made_data, "train", made)
    rows = [elm.Row(**fields) for fields in made]
    names = [f"{rows_path(made_data)}:{number}" for number in range(1, len(made) + 1)]

    unlimited = elm.Encoder(prompt, num_soft, max_tokens=10**6)
    whole = unlimited.encode(rows, names)
    limit = max(1, len(whole[0].ids) + beyond)
    too_long = []
    for number, encoded in enumerate(whole, start=1):
        if len(encoded.ids) - encoded.num_labels >= limit:
            too_long.append(number)
    if too_long:
        with pytest.raises(elm.UserError, match=f"jsonl:{too_long[0]}: the prompt takes all"):
            open_train(made_data, prompt, num_soft, limit)
        return

    split = open_train(made_data, prompt, num_soft, limit)
    num_cut = sum(len(encoded.ids) > limit for encoded in whole)
    assert split.counts["responses_cut"] == num_cut
    for layout in ("embedding", "text"):
        found = split.examples(range(len(made)), layout)
        uncut = unlimited.encode(rows, names, layout)
        for cut, by_vector, full in zip(found, whole, uncut, strict=True):
            prompt_length = len(by_vector.ids) - by_vector.num_labels
            answer = by_vector.ids[prompt_length:limit]
            assert (cut.ids[len(cut.ids) - len(answer) :] == answer).all()
            assert cut.num_labels == len(answer)
            assert len(cut.ids) <= limit
            assert cut.truncated == (max(len(by_vector.ids), len(full.ids)) > limit)
            if layout == "embedding":
                assert (cut.ids == by_vector.ids[:limit]).all()


@few
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda v: len(set(v)) > 1))
def test_shuffled_vectors(source_ids):
    """A permutation of the sources that moves each one."""
    index = np.zeros(len(source_ids), elm.ROW_INDEX)
    index["source_id"] = source_ids
    split = elm.Split(
        path=Path("rows.jsonl"), index=index, table_path=Path("table"), origin=elm.VectorOrigin(),
        vectors=torch.ones(31, 4), sources=np.unique(source_ids), statistics={},
        counts=Counter(), tasks=elm.TASKS, encoder=elm.Encoder(PROMPT, 1, 256))  # fmt: skip
    other = elm.shuffled_vectors(split)
    assert (other != index["source_id"]).all()
    mapped = dict(zip(source_ids, other.tolist(), strict=True))
    assert sorted(mapped.values()) == sorted(set(source_ids))
    assert [mapped[v] for v in source_ids] == other.tolist()


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@pytest.fixture(scope="module")
def without_git():
    """git, which config_text asks for the commit, takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda name: None)
        yield


@few
@given(
    llm=anything.filter(str.strip), project=anything, lr=st.floats(1e-30, 1e30), flag=st.booleans(),
    tasks=st.lists(st.sampled_from(elm.TASKS), min_size=1, max_size=5))  # fmt: skip
@example(
    llm="\U0001f600 \x7f", project="\x7f\u2028\U0001f600", lr=1e-4, flag=True, tasks=["summary"])
def test_config_written_and_read_again(without_git, llm, project, lr, flag, tasks):
    tables = {
        "model": {"llm": llm, "standardize": flag, "template": {project: lr}},
        "train": {"lr": lr},
        "data": {"tasks": tasks},
        "wandb": {"project": project},
        "deepspeed": {"zero_stage": 3, "zero_optimization": {"x": {llm: [lr, flag, {}]}}},
    }
    cfg = elm.parse_config(tables)
    assert elm.parse_config(elm.tomllib.loads(elm.config_text(cfg))) == cfg


@few
@given(st.lists(st.integers(), max_size=40), st.integers(1, 9))
def test_in_blocks(items, size):
    blocks = list(elm.in_blocks(iter(items), size))
    assert [item for block in blocks for item in block] == items
    assert all(len(block) == size for block in blocks[:-1])
    assert all(1 <= len(block) <= size for block in blocks)
