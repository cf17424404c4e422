import json
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make_data, read_jsonl, rows_path, write_rows
from safetensors.torch import save_file

import elm

PROMPT = elm.Prompt.of(byte_tokenizer())
RT = elm.Runtime()


def open_train(folder, soft=1, limit=256, tasks=elm.TASKS):
    data = elm.DataConfig(dir=str(folder), max_seq_length=limit, tasks=tasks)
    return elm.open_split(data, "train", PROMPT, soft, RT)


def decode(ids) -> str:
    return PROMPT.tokenizer.decode(ids)


@pytest.mark.parametrize("soft", [1, 3])
def test_row_is_prompt_slot_response_end(data_dir, soft):
    split = open_train(data_dir, soft)
    for i, row in enumerate(read_jsonl(rows_path(data_dir))):
        r = split.rows[i]
        ids = split.ids[r["start"][0] :][: r["length"][0]]
        slot, response = r["slot"], r["response"]
        before = "" if "<EMB>" not in row["query"] else row["query"].split("<EMB>")[0]
        assert decode(ids[:slot]) == "<|im_start|>user\n" + before
        after = row["query"].split("<EMB>")[-1] if "<EMB>" in row["query"] else "\n" + row["query"]
        tail = after + "<|im_end|>\n<|im_start|>assistant\n"
        assert decode(ids[slot + soft : -response]) == tail
        assert decode(ids[-response:]) == row["response"] + "<|im_end|>"
        text_ids = split.ids[r["start"][1] :][: r["length"][1]]
        assert decode(text_ids) == "<|im_start|>user\n" + before + row["text"] + tail + (
            row["response"] + "<|im_end|>")  # fmt: skip
        assert split.raw(i) == row and r["line"] == i + 1


@pytest.mark.parametrize("reuse, few", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("form", [elm.BY_VECTOR, elm.BY_TEXT])
def test_pack_describes_the_same_tokens(data_dir, form, reuse, few):
    """Every example's ids and positions, put together again as packed_attention does with keys."""
    split = open_train(data_dir, soft=2)
    assert len(split.prefixes) == 2  # the chat's header, alone and before "Is <EMB> so, and how?"
    split = split._replace(reuse=reuse, prefixes=split.prefixes if few else None)
    rows = [3, 0, 7, 5]
    batch = elm.pack(split, rows, form)
    own, whole, ends = batch["lengths"], batch["key_lengths"], batch["ends"]
    assert sum(own) == len(batch["ids"]) == len(batch["positions"]) == len(batch["own_keys"])
    assert whole == split.rows["length"][rows, form].tolist() and len(batch["prefix_keys"]) == sum(
        whole
    )
    assert ends.tolist() == [[0, *np.cumsum(own)], [0, *np.cumsum(whole)]]
    assert (
        set(batch["prefixes"]) <= set(split.prefixes or batch["prefixes"])
        and bool(batch["prefixes"]) == reuse
    )
    kept = torch.tensor(sum(batch["prefixes"], ()) or (0,), dtype=torch.long)
    kept_places = torch.tensor([i for ids in batch["prefixes"] for i in range(len(ids))] or [0])
    ids = kept[batch["prefix_keys"]].index_copy(0, batch["own_keys"], batch["ids"])
    positions = kept_places[batch["prefix_keys"]].index_copy(
        0, batch["own_keys"], batch["positions"]
    )
    seen = 0
    for k, i in enumerate(rows):
        r, (start, end) = split.rows[i], ends[1, k : k + 2].tolist()
        mine = batch["owner"] == k
        assert ids[start:end].tolist() == split.ids[r["start"][form] :][: end - start].tolist()
        assert positions[start:end].tolist() == list(range(end - start))
        assert own[k] == whole[k] - (r["slot"] if reuse else 0)
        last, n = int(ends[0, k + 1]), int(r["response"])
        assert int(mine.sum()) == n
        assert batch["targets"][mine].tolist() == list(range(last - n - 1, last - 1))
        assert batch["labels"][mine].tolist() == batch["ids"][last - n : last].tolist()
        if form == elm.BY_VECTOR:
            slot = last - whole[k] + int(r["slot"])
            assert batch["slots"][2 * k : 2 * k + 2].tolist() == [slot, slot + 1]
            torch.testing.assert_close(batch["embeddings"][k], split.vectors[int(r["vector"])])
        seen += n
    assert len(batch["labels"]) == seen and ("slots" in batch) == (form == elm.BY_VECTOR)


def test_truncation_cuts_the_response_only_and_is_counted(data_dir):
    whole = open_train(data_dir)
    longest = int(whole.rows["length"][:, 0].max())
    cut = open_train(data_dir, limit=longest - 5)
    assert whole.counts["responses_cut"] == 0 < cut.counts["responses_cut"]
    prompts = [split.rows["length"][:, 0] - split.rows["response"] for split in (whole, cut)]
    assert (prompts[0] == prompts[1]).all()
    assert cut.rows["length"][:, 0].max() == longest - 5
    changed = int((whole.rows["length"][:, 0] != cut.rows["length"][:, 0]).sum())
    assert changed == cut.counts["responses_cut"]


def test_task_filter_and_removed_pair_tasks(data_dir):
    rows = read_jsonl(rows_path(data_dir))
    pair = [rows[0] | {"task_type": t} for t in ("compare", "hypothetical", "compare")]
    pair[0]["embedding_file_idx"] = [0, 1]  # as such rows are
    del pair[1]["embedding_file_idx"]
    write_rows(data_dir, "train", [*pair[:2], *rows, pair[2], ""])
    split = open_train(data_dir, tasks=("summary", "category"))
    wanted = [r for r in rows if r["task_type"] in ("summary", "category")]
    assert [split.raw(i)["response"] for i in range(len(split.rows))] == [
        r["response"] for r in wanted
    ]
    assert split.counts["pair_tasks"] == 3
    assert split.counts["other_tasks"] == len(rows) - len(wanted)


def bad_rows(change):
    def write(folder):
        rows = read_jsonl(rows_path(folder))
        rows[4] = change(dict(rows[4]))
        write_rows(folder, "train", rows)

    return write


def bad_vectors(**tensors):
    def write(folder):
        path = elm.split_paths(elm.DataConfig(dir=str(folder)), "train")[0]
        save_file(tensors, path)

    return write


def with_value(value):
    table = torch.randn(10, 12)
    table[6, 3] = value
    return table


ZERO = torch.randn(10, 12)
ZERO[2] = 0


@pytest.mark.parametrize(
    "spoil, message",
    [
        (bad_rows(lambda r: "{broken"), r"train_synthesis.jsonl:5: broken JSON"),
        (bad_rows(lambda r: "[1]"), r":5: not a JSON object"),
        (bad_rows(lambda r: "[" * 99999), r":5: broken JSON"),
        (bad_rows(lambda r: r | {"response": "a \ud83d b"}), r":5: .*surrogates not allowed"),
        (bad_rows(lambda r: {k: r[k] for k in r if k != "query"}), r":5: field 'query' is missing"),
        (bad_rows(lambda r: r | {"response": 3}), r":5: field 'response' is 3, not of type str"),
        (bad_rows(lambda r: r | {"text": None}), r":5: field 'text' is None"),
        (bad_rows(lambda r: r | {"embedding_file_idx": True}), r":5: field 'embedding_file_idx'"),
        (bad_rows(lambda r: r | {"embedding_file_idx": 10}), r":5: embedding_file_idx 10 of 10"),
        (bad_rows(lambda r: r | {"embedding_file_idx": -1}), r":5: embedding_file_idx -1"),
        (
            bad_rows(lambda r: r | {"task_type": "sumary"}),
            r":5: unknown task_type .*did you mean summary",
        ),
        (
            bad_rows(lambda r: r | {"query": "<EMB> <EMB>"}),
            r":5: '<EMB> <EMB>': a query has one <EMB> at most",
        ),
        (bad_rows(lambda r: r | {"query": "long " * 99}), r":5: the prompt takes all of data.max"),
        (lambda f: rows_path(f).write_text("\n"), r"train_synthesis.jsonl: no row of data.tasks"),
        (bad_vectors(a=with_value(torch.nan)), r"embeddings.safetensors: vector 6 is zero, NaN"),
        (bad_vectors(a=with_value(torch.inf)), r": vector 6 is"),
        (bad_vectors(a=ZERO), r": vector 2 is zero"),
        (bad_vectors(a=torch.randn(12)), r"torch.float32 \[12\], not one table"),
        (bad_vectors(a=torch.randn(2, 3), b=torch.randn(2, 3)), r"not one table"),
        (bad_vectors(a=torch.ones(2, 3, dtype=torch.int64)), r"torch.int64 \[2, 3\]"),
        (bad_vectors(), r"holds nothing"),
    ],
)
def test_bad_data_is_refused_with_its_place(data_dir, spoil, message):
    spoil(data_dir)
    with pytest.raises(elm.UserError, match=message) as e:
        open_train(data_dir)
    assert len(str(e.value).splitlines()) == 1
    assert not list((data_dir / ".cache").glob("*"))  # nothing half-made stays


def test_broken_and_missing_vectors(data_dir):
    path = elm.split_paths(elm.DataConfig(dir=str(data_dir)), "train")[0]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(elm.UserError, match="train_embeddings.safetensors"):
        open_train(data_dir)
    path.unlink()
    with pytest.raises(elm.UserError, match="train_embeddings.safetensors: there is no such"):
        open_train(data_dir)


def test_the_table_is_not_copied(tmp_path):
    """Anonymous memory does not grow by a table of 80 MB when it is opened and a row is read."""

    def anonymous():
        with open("/proc/self/status") as f:
            return next(int(x.split()[1]) for x in f if x.startswith("RssAnon")) * 1024

    save_file({"x": torch.ones(20_000, 1024)}, tmp_path / "x.safetensors")
    before = anonymous()
    table = elm.open_vectors(tmp_path / "x.safetensors")
    assert table[torch.tensor([17, 19_999])].sum() == 2048
    assert anonymous() - before < 20e6


def test_cache_knows_the_end_token(data_dir):
    first = open_train(data_dir)
    tok = byte_tokenizer()
    tok.eos_token = "<|endoftext|>"
    data = elm.DataConfig(dir=str(data_dir), max_seq_length=256)
    other = elm.open_split(data, "train", elm.Prompt.of(tok), 1, RT)
    assert first.ids[first.rows["length"][0, 0] - 1] == PROMPT.tokenizer.eos_token_id
    assert other.ids[other.rows["length"][0, 0] - 1] == tok.eos_token_id


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vectors_stay_in_the_map(data_dir, dtype):
    path = elm.split_paths(elm.DataConfig(dir=str(data_dir)), "train")[0]
    table = elm.open_vectors(path).to(dtype)
    save_file({"x": table.clone()}, path)
    split = open_train(data_dir)
    assert split.vectors.dtype == dtype
    assert elm.pack(split, [0])["embeddings"].dtype == torch.float32
    torch.testing.assert_close(
        split.statistics["mean"], table.float().mean(0), rtol=1e-5, atol=1e-6
    )
    std = table.float().std(0, correction=0)
    torch.testing.assert_close(split.statistics["std"], std, rtol=1e-5, atol=1e-6)


def test_cache_is_used_and_renewed(data_dir):
    first = open_train(data_dir)
    (cache,) = (data_dir / ".cache").iterdir()
    stamp = (cache / "ids.bin").stat().st_mtime_ns
    open_train(data_dir)
    assert (cache / "ids.bin").stat().st_mtime_ns == stamp
    rows = read_jsonl(rows_path(data_dir))
    write_rows(data_dir, "train", rows[:-1])
    assert len(open_train(data_dir).rows) == len(first.rows) - 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: (c / "meta.json").write_text("{"),
        lambda c: (c / "meta.json").write_text("[]"),
        lambda c: (c / "meta.json").write_text((c / "meta.json").read_text().replace("0.", "1.")),
        lambda c: (c / "meta.json").unlink(),
        lambda c: (c / "rows.bin").write_bytes(b""),
        lambda c: (c / "rows.bin").write_bytes((c / "rows.bin").read_bytes()[: -elm.ROW.itemsize]),
        lambda c: (c / "rows.bin").write_bytes(b"\x07" + (c / "rows.bin").read_bytes()[1:]),
        lambda c: (c / "ids.bin").write_bytes((c / "ids.bin").read_bytes()[:-4]),
    ],
)
def test_a_damaged_cache_is_made_again(data_dir, capsys, damage):
    first = open_train(data_dir)
    rows, ids = first.rows.copy(), first.ids.copy()
    (cache,) = (data_dir / ".cache").iterdir()
    damage(cache)
    again = open_train(data_dir)
    assert (again.rows == rows).all() and (again.ids == ids).all()
    assert f"{cache}: damaged" in capsys.readouterr().out


def test_shuffled_control_gives_every_row_another_vector(data_dir):
    split = open_train(data_dir)
    other = elm.shuffled_vectors(split)
    assert (other != split.rows["vector"]).all()
    assert sorted(set(other.tolist())) == sorted(set(split.rows["vector"].tolist()))


@pytest.mark.parametrize("seed", range(20))
def test_cut_keeps_every_example_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 300, rng.integers(1, 60))
    for bins in (1, 2, 3):
        micros = elm.cut(lengths, bins, 500)
        assert len(micros) % bins == 0
        assert sorted(i for m in micros for i in m) == list(range(len(lengths)))
        assert all(len(m) < 2 or lengths[m].sum() <= 500 for m in micros)


def test_any_process_count_sees_the_same_steps(data_dir):
    """The rows of a step, and their order over epochs, are the same for 1 and 3 processes, whose
    micro-batches together hold each row once; a repeated row has weight 0."""
    split = open_train(data_dir)
    steps = list(islice(elm.step_rows(40, 42, 16, 0, 0), 6))
    assert [s[:2] for s in steps] == [(0, 16), (0, 32), (0, 40), (1, 16), (1, 32), (1, 40)]
    for step in steps:
        alone = elm.plan_step(split, 300, RT, step)
        shares = [elm.plan_step(split, 300, elm.Runtime(r, 3), step) for r in range(3)]
        assert all((s[2] == step[2]).all() and s[3] == alone[3] for s in shares)
        assert len({len(s[4]) for s in shares}) == 1
        ids = [sum((b["ids"].sum() for w, b in s[4] if w), 0) for s in (alone, *shares)]
        assert ids[0] == sum(ids[1:])
    orders = [np.concatenate([s[2] for s in steps if s[0] == e]).tolist() for e in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(40)) and order != sorted(order)
    assert orders[0] != orders[1]
    resumed = islice(elm.step_rows(40, 42, 16, 0, 32), 3)
    for got, wanted in zip(resumed, steps[2:5], strict=True):
        assert got[:2] == wanted[:2] and (got[2] == wanted[2]).all()


def test_more_processes_than_rows(data_dir):
    split = open_train(data_dir)
    step = next(elm.step_rows(40, 0, 2, 0, 0))
    shares = [elm.plan_step(split, 2048, elm.Runtime(r, 4), step) for r in range(4)]
    assert [len(s[4]) for s in shares] == [1] * 4
    assert sum(w for s in shares for w, _ in s[4]) == 2


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_read_ahead_keeps_order(threads):
    assert list(elm.read_ahead(lambda k: k * k, range(30), threads)) == [k * k for k in range(30)]


def test_tokenizer_without_chat_template_gets_a_plain_prompt(tmp_path):
    prompt = elm.Prompt.of(byte_tokenizer(chat_template=None))
    assert prompt.parts("What is it?") == ["", "\nWhat is it?\n"]
    make_data(tmp_path)
    data = elm.DataConfig(dir=str(tmp_path), max_seq_length=256)
    assert len(elm.open_split(data, "train", prompt, 1, RT).rows) == 40


@pytest.mark.parametrize("template", ["{{ messages[0].content }}{{ messages[0].content }}",
                                      "no turn", "{{ raise_exception('no') }}"])  # fmt: skip
def test_chat_template_that_cannot_be_used_is_refused(template):
    with pytest.raises(elm.UserError, match="chat template fails"):
        elm.Prompt.of(byte_tokenizer(template))


def test_tokenizer_without_end_token_is_refused():
    tok = byte_tokenizer()
    tok.eos_token = None
    with pytest.raises(elm.UserError, match="eos_token"):
        elm.Prompt.of(tok)


def test_rows_without_text(data_dir):
    rows = [json.loads(x) for x in rows_path(data_dir).read_text().splitlines()]
    write_rows(data_dir, "train", [{k: v for k, v in r.items() if k != "text"} for r in rows])
    split = open_train(data_dir)
    assert (split.rows["length"][:, elm.BY_TEXT] == 0).all()
