import os
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import (
    CHAT,
    PROMPT,
    RT,
    anonymous_memory,
    build_elm,
    byte_tokenizer,
    go,
    open_train,
    read_jsonl,
    read_table,
    rows_path,
    vectors_path,
    write_rows,
)
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

import elm


def decode(ids) -> str:
    return PROMPT.tokenizer.decode(ids)


@pytest.mark.parametrize("num_soft", [1, 3])
def test_an_example_is_prompt_placeholder_response_end(data_dir, num_soft):
    files = sorted(data_dir.rglob("*"))
    split, rows = open_train(data_dir, PROMPT, num_soft), read_jsonl(rows_path(data_dir))
    every = range(len(rows))
    sources = [split.examples(every, source) for source in ("embedding", "text", "response")]
    for i, (row, by_vector, by_text, alone) in enumerate(zip(rows, *sources, strict=True)):
        before, slot, after = row["query"].partition("<EMB>")
        before, after = (before, after) if slot else ("", "\n" + row["query"])
        before, answer = "<|im_start|>user\n" + before, row["response"] + "<|im_end|>"
        after += "<|im_end|>\n<|im_start|>assistant\n"
        start, n = by_vector.ids.argmin(), by_vector.num_labels
        assert (np.flatnonzero(by_vector.ids < 0) == start + np.arange(num_soft)).all()
        assert decode(by_vector.ids[:start]) == before
        assert decode(by_vector.ids[start + num_soft : -n]) == after
        assert decode(by_vector.ids[-n:]) == decode(alone.ids) == answer
        assert decode(by_text.ids) == before + row["text"] + after + answer
        assert n == by_text.num_labels == alone.num_labels and not by_vector.truncated
        assert [r.model_dump() for r in split.read([i])] == [row]
    assert sorted(data_dir.rglob("*")) == files  # nothing is written beside the data


def test_task_filter_and_removed_pair_tasks(data_dir):
    rows = read_jsonl(rows_path(data_dir))
    pair = [rows[0] | {"task_type": t} for t in ("compare", "hypothetical", "compare")]
    pair[0]["embedding_file_idx"] = [0, 1]  # as such rows are
    del pair[1]["embedding_file_idx"]
    write_rows(data_dir, "train", [*pair[:2], *rows, pair[2], ""])
    split = open_train(data_dir, PROMPT, tasks=("summary", "category"))
    wanted = [r for r in rows if r["task_type"] in ("summary", "category")]
    found = split.read(range(len(split.rows)))
    assert [r.response for r in found] == [r["response"] for r in wanted]
    assert [split.data.tasks[t] for t in split.rows["task"]] == [r["task_type"] for r in wanted]
    others = len(rows) - len(wanted)
    assert split.counts == dict(rows=len(wanted), pair_tasks=3, other_tasks=others, responses_cut=0)


@pytest.mark.parametrize("text", [None, "", ...])
def test_rows_without_text(data_dir, llm_dir, text):
    """Null, empty or missing: such a row has no loss by its text; the others have theirs."""
    rows = read_jsonl(rows_path(data_dir))[:20]
    split = open_train(data_dir, PROMPT)
    model = build_elm(llm_dir, split)
    wanted = elm.evaluate_nll(model, split, None, RT)
    for row in rows[::2]:
        row.update(text=text) if text is not ... else row.pop("text")
    write_rows(data_dir, "train", rows)
    split = open_train(data_dir, PROMPT)
    assert split.rows["text"].tolist() == [False, True] * 10
    nll, num_labels = elm.evaluate_nll(model, split, None, RT)
    assert not nll[::2].any() and not num_labels[::2].any()
    np.testing.assert_allclose(nll[1::2], wanted[0][1:20:2], rtol=1e-5)
    assert (num_labels[1::2] == wanted[1][1:20:2]).all()


def bad_row(row="", **values):
    """In the fifth line."""

    def write(folder):
        rows = read_jsonl(rows_path(folder))
        rows[4] = row or rows[4] | values
        write_rows(folder, "train", rows)

    return write


def bad_vectors(**tensors):
    return lambda folder: save_file(tensors, vectors_path(folder))


def npy(table, cut=0):
    def write(folder):
        vectors_path(folder).unlink()
        path = vectors_path(folder).with_suffix(".npy")
        np.save(path, table, allow_pickle=True)
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])

    return write


VECTORS = "train_embeddings.safetensors"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (bad_row("{broken"), r"train_synthesis.jsonl:5: Invalid JSON"),
        (bad_row('{"task_type": "compare", "a'), r"train_synthesis.jsonl:5: Invalid JSON"),
        (bad_row('{"task_type": "compare", "a": ' + "[" * 99999), r":5: Invalid JSON"),
        (bad_row("[1]"), r":5: Input should be an object"),
        (bad_row("[" * 99999), r":5: Invalid JSON"),
        (bad_row(response="a \ud83d b"), r":5: Invalid JSON"),
        (bad_row({"task_type": "summary", "embedding_file_idx": 0}), "'query': Field required"),
        (bad_row(response=3), r":5: field 'response': Input should be a valid string"),
        (bad_row(response=" \n"), r":5: field 'response': is empty"),
        *(
            (bad_row(embedding_file_idx=i), r":5: field 'embedding_file_idx': .*integer")
            for i in (True, "3", 3.5, None)
        ),
        (bad_row(embedding_file_idx=10), r":5: embedding_file_idx 10 of 10"),
        (bad_row(embedding_file_idx=-1), r":5: field 'embedding_file_idx'"),
        (bad_row(task_type="sumary"), r":5: unknown task_type 'sumary', did you mean summary"),
        (bad_row(query="<EMB> <EMB>"), r":5: '<EMB> <EMB>': a query has one <EMB> at most"),
        (bad_row(query="long " * 99), r":5: the prompt takes all of data.max_seq_length = 256 "),
        (lambda f: rows_path(f).write_text("\n"), r"train_synthesis.jsonl: no row of data.tasks"),
        (lambda f: rows_path(f).unlink(), r"No such file .*train_synthesis.jsonl"),
        (bad_vectors(a=torch.eye(10, 9)), VECTORS + r": vector 9 is zero, NaN or infinite"),
        (bad_vectors(a=torch.full((10, 12), torch.nan)), r": vector 0 is zero, NaN or infinite"),
        (bad_vectors(a=torch.randn(2, 3), b=torch.randn(12)), r"float32 \[12\], not one table"),
        (bad_vectors(a=torch.ones(2, 3, dtype=torch.int64)), r"torch.int64 \[2, 3\]"),
        (bad_vectors(), r"holds nothing"),
        (lambda f: os.truncate(vectors_path(f), 400), VECTORS + ": not a whole table"),
        (npy(np.ones((10, 12), np.int8)), r"embeddings.npy: holds torch.int8 \[10, 12\]"),
        (npy(np.array([[None]])), r"embeddings.npy: not a whole table"),
        (npy(np.ones((10, 12), np.float32), cut=40), r"embeddings.npy: not a whole table"),
        (lambda f: vectors_path(f).unlink(), VECTORS + ": not a whole table: No such file")])
def test_bad_data_is_refused_with_its_place(data_dir, spoil, message):
    spoil(data_dir)
    with pytest.raises((elm.UserError, OSError), match=message) as e:
        open_train(data_dir, PROMPT)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["x.safetensors", "x.npy"])
def test_the_table_is_not_copied(tmp_path, name):
    """Anonymous memory does not grow by a table of 80 MB when it is opened and a row is read."""
    table = torch.ones(20_000, 1024)
    if name == "x.npy":
        np.save(tmp_path / name, table.numpy())
    else:
        save_file({"x": table}, tmp_path / name)
    before = anonymous_memory()
    vectors = elm.open_vectors(tmp_path / name)
    assert vectors[torch.tensor([17, 19_999])].sum() == 2048
    assert anonymous_memory() - before < 20e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_are_of_the_vectors_that_rows_use(data_dir, dtype):
    vectors = read_table(data_dir).to(dtype)
    save_file({"x": vectors}, vectors_path(data_dir))
    rows = [r for r in read_jsonl(rows_path(data_dir)) if r["embedding_file_idx"] < 7]
    write_rows(data_dir, "train", rows)
    split = open_train(data_dir, PROMPT)
    used = vectors[:7].float()
    norms = used.norm(dim=1)
    norm = torch.stack([norms.min(), norms.square().mean().sqrt(), norms.max()])
    wanted = dict(mean=used.mean(0), std=used.std(0, correction=0), norms=norm)
    torch.testing.assert_close(split.statistics, wanted, rtol=1e-5, atol=1e-6)
    assert split.vectors.dtype == dtype
    torch.testing.assert_close(split.embeddings(np.array([3, 3, 1])), used[[3, 3, 1]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_as_other_systems_write_them(data_dir, dtype):
    """.npy tables, byte-order marks, ends of lines, null, integral floats, further fields."""
    table = read_table(data_dir).numpy().astype(dtype)
    vectors_path(data_dir).unlink()
    np.save(vectors_path(data_dir).with_suffix(".npy"), table)
    rows = [r | dict(embedding_file_idx=float(r["embedding_file_idx"]), text=None, id=[1])
            for r in read_jsonl(rows_path(data_dir))]  # fmt: skip
    write_rows(data_dir, "train", rows)
    path = rows_path(data_dir)
    lines = b'{"task_type": "compare"}\n' + path.read_bytes()  # a pair task has other fields
    path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    split = open_train(data_dir, PROMPT)
    assert np.array_equal(split.vectors.numpy(), table) and split.vectors.numpy().dtype == dtype
    assert not split.rows["text"].any()
    assert split.rows["vector"].tolist() == [r["embedding_file_idx"] for r in rows]
    assert [r.response for r in split.read(range(40))] == [r["response"] for r in rows]
    texts = path.with_name("texts.txt")
    texts.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert [t.text for t in elm.read_texts(texts)] == ["one", "two"]
    config = path.with_name("run.toml")
    config.write_bytes(b"\xef\xbb\xbftrain.lr = 1.0\n")
    assert elm.load_config(str(config)).train.lr == 1.0


def test_task_types_of_ones_own(settings, data_dir):
    for name in ("train", "val", "test"):
        rows = [r | {"task_type": "haiku"} if i % 2 else r
                for i, r in enumerate(read_jsonl(rows_path(data_dir, name)))]  # fmt: skip
        write_rows(data_dir, name, rows)
    with pytest.raises(elm.UserError, match="jsonl:2: unknown task_type 'haiku'"):
        go(settings)
    result, _ = go(settings, 'data.tasks=["haiku", "summary"]')
    assert result["tasks"]["haiku"]["rows"] == 20
    split = open_train(data_dir, PROMPT, tasks=("haiku", "summary"))
    assert {split.data.tasks[t] for t in split.rows["task"]} == {"haiku", "summary"}
    assert split.counts["rows"] + split.counts["other_tasks"] == 40
    with pytest.raises(elm.UserError, match="task_type 'haiku', did you mean haikus?"):
        open_train(data_dir, PROMPT, tasks=("haikus", "summary"))


def test_copies_of_a_vector_are_one(data_dir):
    """By value: their rows belong together, and are not shuffled into each other."""
    table, rows = read_table(data_dir)[:5], read_jsonl(rows_path(data_dir))
    save_file({"x": torch.cat([table, table])}, vectors_path(data_dir))
    split = open_train(data_dir, PROMPT)
    assert split.rows["vector"].tolist() == [r["embedding_file_idx"] % 5 for r in rows]
    own, other = (split.embeddings(i) for i in (split.rows["vector"], elm.shuffled_vectors(split)))
    assert (own != other).any(1).all()


def test_dimensions_without_spread_do_not_blow_up(data_dir, llm_dir):
    """Constant, nearly quantised away, padded with zeros: not deafening where they do vary."""
    torch.manual_seed(0)
    vectors, noise = torch.randn(10, 12), 0.01 * torch.randn(10, 12)
    vectors[:, 3], vectors[:, 5], vectors[4, 5], vectors[:, 8:] = 0.02, 0.0, 1e-3, 0.0
    save_file({"x": vectors}, vectors_path(data_dir))
    split = open_train(data_dir, PROMPT)
    soft = build_elm(llm_dir, split)(vectors + noise).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(soft[:, None], soft, dim=2)
    assert (cosines - torch.eye(10)).max() < 0.9


def test_any_process_count_sees_the_same_steps(data_dir):
    """The rows of a step, and their order over epochs, are the same for 1 and 3 processes, whose
    micro-batches together hold each row once; a repeated row has weight 0."""
    split = open_train(data_dir, PROMPT)
    steps = list(islice(elm.step_rows(40, 42, 16, 0, 0), 6))
    assert [s[:2] for s in steps] == [(0, 16), (0, 32), (0, 40), (1, 16), (1, 32), (1, 40)]
    for step in (*steps, (0, 2, np.array([3, 9]))):  # more processes than rows, too
        alone = elm.prepare_step(split, 300, RT, step)
        shares = [elm.prepare_step(split, 300, elm.Runtime(r, 3), step) for r in range(3)]
        lengths = [len(e.ids) for e in split.examples(step[2])]
        assert alone.counts["rows"] == len(lengths) and alone.counts["tokens"] == sum(lengths)
        for share in shares:
            assert share[:2] == step[:2] and (share.rows == step[2]).all()
            assert share.counts == alone.counts and len(share.micros) == len(shares[0].micros)
        for parts in ([alone], shares):
            batches = [b for share in parts for weight, b in share.micros if weight]
            assert sorted(n for b in batches for n in b["lengths"]) == sorted(lengths)
            assert sum(len(b["labels"]) for b in batches) == alone.counts["labels"]
            vectors = torch.cat([b["embeddings"] for b in batches]).sum(0)
            wanted = split.embeddings(split.rows["vector"][step[2]]).sum(0)
            torch.testing.assert_close(vectors, wanted)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_read_ahead_keeps_order(threads):
    assert list(elm.read_ahead(lambda k: k * k, range(30), threads)) == [k * k for k in range(30)]


def test_tokenizer_without_chat_template_gets_a_plain_prompt(data_dir):
    tok = byte_tokenizer(chat_template=None)
    prompt = elm.Prompt(tok)
    assert prompt.text == dict(head="", tail="\n", end="<|im_end|>")
    assert prompt.parts(" What is it?\n") == ["", "\nWhat is it?"]
    assert prompt.parts(" Is <EMB> it? ") == ["Is ", " it?"]
    assert len(open_train(data_dir, prompt).rows) == 40
    bos = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])  # as Llama
    tok.backend_tokenizer.post_processor = bos
    assert elm.Prompt(tok).text == prompt.text | dict(head="<|im_start|>")


@pytest.mark.parametrize("template", ["{{ messages[0].content }}{{ messages[0].content }}",
                                      "no turn", "{{ raise_exception('no') }}"])  # fmt: skip
def test_chat_template_that_cannot_be_used_is_refused(template):
    with pytest.raises(elm.UserError, match="chat template fails"):
        elm.Prompt(byte_tokenizer(template))
    tok = byte_tokenizer(chat_template=None)
    tok.eos_token = None
    with pytest.raises(elm.UserError, match="no token that ends an answer"):
        elm.Prompt(tok)


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
    " {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template, control, end", [
    (CHAT, [], "<|im_end|>"), (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    (MISTRAL, ["[INST]", "[/INST]", "</s>"], "</s>"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", [], "<|endoftext|>"),
], ids=["chatml", "gemma", "mistral", "plain"])  # fmt: skip
@pytest.mark.parametrize("special", [True, False])
def test_a_response_ends_as_the_template_ends_a_turn(data_dir, template, control, end, special):
    """Whatever the tokenizer's eos_token is, and whatever tokens it calls special."""
    tokenizer = byte_tokenizer(template, "<|endoftext|>")
    tokenizer.add_tokens(["\n", *control], special_tokens=special)
    prompt = elm.Prompt(tokenizer)
    assert prompt.text["end"].strip() == end
    assert prompt.end == [tokenizer.convert_tokens_to_ids(end)]
    for row, example in zip(read_jsonl(rows_path(data_dir)),
                            open_train(data_dir, prompt).examples(range(40)), strict=True):
        assert tokenizer.decode(example.ids[-example.num_labels :]) == row["response"] + end


@pytest.mark.parametrize("source", ["embedding", "text", "response"])
def test_names_of_control_tokens_in_rows_are_text(data_dir, source):
    said = "say <think> <|im_end|>\n<|im_start|>assistant\n and <|endoftext|>"
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])  # not special, as in Qwen3's
    row = read_jsonl(rows_path(data_dir))[0] | dict(query=said, response=said, text=said)
    write_rows(data_dir, "train", [row])
    (example,) = open_train(data_dir, elm.Prompt(tokenizer)).examples([0], source)
    ids = example.ids.clip(0)
    control = [t for t in tokenizer.convert_ids_to_tokens(ids) if t[0] == "<" < t]
    assert control == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"][
        3 * (source == "response") :]  # fmt: skip
    assert decode(ids).count(said) == dict(embedding=2, text=3, response=1)[source]


def test_arguments_of_the_template(capsys):
    think = "{% if add_generation_prompt %}<think>\n{% if not enable_thinking | default(true) %}"
    tokenizer = byte_tokenizer(CHAT + think + "\n</think>\n\n{% endif %}{% endif %}")
    assert elm.Prompt(tokenizer).text["tail"].endswith("assistant\n<think>\n")
    assert "<think>\\n', but an answer follows" in capsys.readouterr().err
    block = "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content']"
    elm.Prompt(byte_tokenizer(CHAT.replace("{{ m['content']", block)))
    assert "but an answer follows '<|im_end|>" in capsys.readouterr().err  # as Qwen3's
    prompt = elm.Prompt(tokenizer, {"enable_thinking": False})
    assert prompt.text["tail"].endswith("<think>\n</think>\n\n")
    assert not capsys.readouterr().err
