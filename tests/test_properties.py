"""The small functions, on whatever Hypothesis finds."""

import dataclasses
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from test_data import decode

import elm

few = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
PROMPT = elm.Prompt.of(byte_tokenizer())
lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=80).map(np.array)


@few
@given(lengths, st.integers(1, 8), st.integers(1, 4000))
def test_cut(lengths, bins, budget):
    """Every example once, none of several over the budget, as many for each process, and no more
    micro-batches than a lower bound times what first fit may waste."""
    micros = elm.cut(lengths, bins, budget)
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


@few
@given(st.integers(1, 5000), st.integers(0, 5000), st.floats(1e-8, 10))
def test_schedule(total, warmup, peak):
    """Up to the peak in equal steps, down to 0 in equal steps, never above or below."""
    cfg = dataclasses.replace(elm.TrainConfig(), lr=peak, warmup_steps=warmup)
    rates = np.array([elm.lr_at(step, total, cfg) for step in range(total + 1)])
    assert (rates >= 0).all() and rates.max() <= peak * (1 + 1e-9)
    if warmup <= total:
        assert rates[-1] == pytest.approx(0, abs=1e-12 * peak) or warmup == total
    for part in (rates[:warmup], rates[warmup:]):
        if len(part) > 2:
            assert np.allclose(np.diff(part), np.diff(part)[0], atol=1e-9 * peak)


def split_of(rows, num_vectors, soft, reuse):
    """A split of made-up rows: (before, text, after, response, vector), token ids by number."""
    records, ids = np.zeros(len(rows), elm.ROW), []
    for i, (before, text, after, response, vector) in enumerate(rows):
        forms = [before + [0] * soft + after + response, before + text + after + response]
        records[i] = (i + 1, 0, vector, (len(ids), len(ids) + len(forms[0])),
                      [len(f) for f in forms], len(before), len(response), 0)  # fmt: skip
        ids += forms[0] + forms[1]
    vectors = torch.arange(num_vectors * 2.0).reshape(num_vectors, 2)
    prefixes = tuple(sorted({tuple(r[0]) for r in rows}))
    return elm.Split(None, records, np.array(ids, np.int32), vectors, {}, {}, soft, prefixes, reuse)


tokens = st.lists(st.integers(1, 9), max_size=6)
made_rows = st.lists(
    st.tuples(tokens, tokens.filter(len), tokens, tokens.filter(len), st.integers(0, 4)),
    min_size=1, max_size=12,
)  # fmt: skip


@few
@given(made_rows, st.integers(1, 3), st.booleans(), st.sampled_from([0, 1]), st.data())
def test_pack(rows, soft, reuse, form, data):
    """Put together from prefixes and packed rows, every example has its own tokens, in place, and
    its labels are its response."""
    split = split_of(rows, 5, soft, reuse)
    which = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    batch = elm.pack(split, which, form)
    kept = torch.tensor(sum(batch["prefixes"], ()) or (0,))
    keys = kept[batch["prefix_keys"]].index_copy(0, batch["own_keys"], batch["ids"])
    ends = batch["ends"][1].tolist()
    assert ends[-1] == len(keys) and batch["ends"][0, -1] == len(batch["ids"])
    for k, i in enumerate(which):
        before, text, after, response, vector = rows[i]
        whole = before + ([0] * soft if form == elm.BY_VECTOR else text) + after + response
        assert keys[ends[k] : ends[k + 1]].tolist() == whole
        mine = batch["owner"] == k
        assert batch["labels"][mine].tolist() == response
        assert (batch["ids"][batch["targets"][mine] + 1] == batch["labels"][mine]).all()
        first = batch["ends"][0, k] + (0 if reuse else len(before))
        if form == elm.BY_VECTOR:
            slots = batch["slots"][k * soft : (k + 1) * soft]
            assert slots.tolist() == list(range(first, first + soft))
            assert batch["embeddings"][k].tolist() == split.vectors[vector].tolist()


@few
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda v: len(set(v)) > 1))
def test_shuffled_vectors(vectors):
    """A permutation of the vectors that moves each one."""
    rows = np.zeros(len(vectors), elm.ROW)
    rows["vector"] = vectors
    other = elm.shuffled_vectors(elm.Split(None, rows, None, None, {}, {}, 1))
    assert (other != rows["vector"]).all()
    mapped = dict(zip(vectors, other.tolist(), strict=True))
    assert sorted(mapped.values()) == sorted(set(vectors))
    assert all(mapped[v] == o for v, o in zip(vectors, other, strict=True))


@few
@given(st.integers(1, 40), st.integers(1, 30), st.sampled_from([torch.float32, torch.float16,
                                                                torch.bfloat16]))  # fmt: skip
def test_table_written_by_rows_is_a_safetensors_file(num, width, dtype):
    table = torch.randn(num, width).to(dtype)
    raw = elm.table_head((num, width), dtype, about="x")
    raw += b"".join(elm.row_bytes(part) for part in table.split(7))
    assert torch.equal(load(raw)["embeddings"], table)


anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@few
@given(anything, anything, st.floats(1e-30, 1e30), st.booleans(), st.lists(
    st.sampled_from(elm.TASKS), min_size=1, max_size=5))  # fmt: skip
def test_config_written_and_read_again(llm, project, lr, flag, tasks):
    tables = dict(model=dict(llm=llm, standardize=flag), train=dict(lr=lr), data=dict(tasks=tasks),
                  wandb=dict(project=project),
                  deepspeed=dict(own={llm: [lr, flag, {}]}))  # fmt: skip
    cfg = elm.build_config(tables)
    with mock.patch("shutil.which", return_value=None):  # git, for the commit, takes its time
        assert elm.build_config(elm.tomllib.loads(elm.config_text(cfg))) == cfg


@few
@given(anything, st.booleans(), anything)
def test_prompt_parts_keep_the_query(before, slot, after):
    query = before + elm.SLOT * slot + after
    if query.count(elm.SLOT) > 1:
        with pytest.raises(elm.UserError, match="at most"):
            PROMPT.parts(query)
        return
    head, tail = PROMPT.parts(query)
    assert head.startswith(PROMPT.head) and tail.endswith(PROMPT.tail)
    said = head[len(PROMPT.head) :], tail[: -len(PROMPT.tail)]
    wanted = query.strip().split(elm.SLOT) if slot else ["", "\n" + query.strip()]
    assert list(said) == wanted
    assert decode(PROMPT.ids([head])[0]) == head or "\ufffd" in head


@few
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3),
       st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.floats(0, 1))  # fmt: skip
def test_slerp_stays_on_the_arc(a, b, t):
    a, b = torch.tensor(a).double(), torch.tensor(b).double()
    if min(a.norm(), b.norm()) < 1e-3 or torch.cosine_similarity(a, b, dim=0) < -0.99:
        return
    point = elm.slerp(a, b, t)
    torch.testing.assert_close(point.norm(), torch.lerp(a.norm(), b.norm(), t), rtol=1e-4, atol=0)

    def angle(x, y):
        return torch.cosine_similarity(x, y, dim=0).clamp(-1, 1).acos()

    assert angle(a, point) + angle(point, b) == pytest.approx(angle(a, b).item(), abs=2e-3)
    assert angle(a, point).item() == pytest.approx(t * angle(a, b).item(), abs=2e-3)
