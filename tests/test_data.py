"""Rows and vectors, prompts, and the rows of each step."""

import json
import os
import shutil
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import (
    CHAT,
    PROMPT,
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
from transformers import AddedToken

import elm


def decode(ids) -> str:
    return PROMPT.tokenizer.decode(ids)


# -----------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize("num_soft", [1, 3])
def test_an_example_is_prompt_placeholder_response_end(data_dir, num_soft):
    split = open_train(data_dir, PROMPT, num_soft)
    rows = read_jsonl(rows_path(data_dir))
    every = range(len(rows))
    by_vector = split.examples(every, "embedding")
    by_text = split.examples(every, "text")
    alone = split.examples(every, "response")
    for i, row in enumerate(rows):
        before, slot, after = row["query"].partition("<EMB>")
        if not slot:
            before = ""
            after = "\n" + row["query"]
        before = "<|im_start|>user\n" + before
        after += "<|im_end|>\n<|im_start|>assistant\n"
        answer = row["response"] + "<|im_end|>"

        ids = by_vector[i].ids
        n = by_vector[i].num_labels
        start = int(ids.argmin())
        places = np.flatnonzero(ids == elm.SOFT_TOKEN)
        assert places.tolist() == list(range(start, start + num_soft))
        assert decode(ids[:start]) == before
        assert decode(ids[start + num_soft : -n]) == after
        assert decode(ids[-n:]) == answer
        assert decode(alone[i].ids) == answer
        assert decode(by_text[i].ids) == before + row["text"] + after + answer
        assert n == by_text[i].num_labels == alone[i].num_labels
        assert not by_vector[i].truncated
        assert split.read([i])[0].model_dump() == row


def test_nothing_is_written_beside_the_data(data_dir):
    files = sorted(data_dir.rglob("*"))
    open_train(data_dir, PROMPT).examples([0, 7])
    assert sorted(data_dir.rglob("*")) == files


@pytest.mark.parametrize("layout", ["embedding", "text", "response"])
def test_names_of_special_tokens_in_rows_are_text(data_dir, layout):
    said = "say <think> <|im_end|>\n<|im_start|>assistant\n and <|endoftext|>"
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    row = read_jsonl(rows_path(data_dir))[0] | dict(query=said, response=said, text=said)
    write_rows(data_dir, "train", [row])
    (example,) = open_train(data_dir, elm.Prompt(tokenizer)).examples([0], layout)
    ids = example.ids.clip(0)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    control = [token for token in tokens if token.startswith("<") and len(token) > 1]
    if layout == "response":
        assert control == ["<|im_end|>"]
    else:
        assert control == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert decode(ids).count(said) == {"embedding": 2, "text": 3, "response": 1}[layout]


# -----------------------------------------------------------------------------
# Chat templates


def test_tokenizer_without_chat_template_gets_a_plain_prompt(data_dir):
    tokenizer = byte_tokenizer(chat_template=None)
    prompt = elm.Prompt(tokenizer)
    nothing_stripped = dict.fromkeys(elm.STRIPPED_BY_TEMPLATE, "")
    texts = {"prefix": "", "suffix": "\n", "end": "<|im_end|>"}
    assert prompt.template_parts == texts | nothing_stripped
    assert prompt.split_query(" What is it?\n") == ("", "\nWhat is it?")
    assert prompt.split_query(" Is <EMB> it? ") == ("Is ", " it?")
    assert len(open_train(data_dir, prompt)) == 40

    with_bos = TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])
    tokenizer.backend_tokenizer.post_processor = with_bos  # as Llama's
    with_start = prompt.template_parts | {"prefix": "<|im_start|>"}
    assert elm.Prompt(tokenizer).template_parts == with_start


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content }}{{ messages[0].content }}", "no turn",
     "{{ raise_exception('no') }}"])  # fmt: skip
def test_chat_template_that_cannot_be_used_is_refused(template):
    with pytest.raises(elm.UserError, match="chat template fails"):
        elm.Prompt(byte_tokenizer(template))


def test_tokenizer_that_cannot_end_an_answer_is_refused():
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.eos_token = None
    with pytest.raises(elm.UserError, match="no token that ends an answer"):
        elm.Prompt(tokenizer)


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
    " {{ m.content }}</s>{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "template, control, end",
    [
        pytest.param(CHAT, [], "<|im_end|>", id="chatml"),
        pytest.param(GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", id="gemma"),
        pytest.param(MISTRAL, ["[INST]", "[/INST]", "</s>"], "</s>", id="mistral"),
        pytest.param(PLAIN, [], "<|endoftext|>", id="plain"),
    ],
)
def test_a_response_ends_as_the_template_ends_a_turn(data_dir, template, control, end, special):
    """Whatever the tokenizer's eos_token is, and whatever tokens it calls special."""
    tokenizer = byte_tokenizer(template, "<|endoftext|>")
    tokenizer.add_tokens(["\n", *control], special_tokens=special)
    prompt = elm.Prompt(tokenizer)
    assert prompt.template_parts["end"].strip() == end
    assert prompt.end_ids == [tokenizer.convert_tokens_to_ids(end)]
    rows = read_jsonl(rows_path(data_dir))
    examples = open_train(data_dir, prompt).examples(range(40))
    for row, example in zip(rows, examples, strict=True):
        assert tokenizer.decode(example.ids[-example.num_labels :]) == row["response"] + end


THINK = (
    "{% if add_generation_prompt %}<think>\n{% if not enable_thinking | default(true) %}"
    "\n</think>\n\n{% endif %}{% endif %}"
)


def test_an_open_block_of_thoughts_is_warned_of(capsys):
    prompt = elm.Prompt(byte_tokenizer(CHAT + THINK))
    assert prompt.template_parts["suffix"].endswith("assistant\n<think>\n")
    assert "<think>\\n', but an answer follows" in capsys.readouterr().err

    content = "{{ m['content']"
    block = "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + content
    elm.Prompt(byte_tokenizer(CHAT.replace(content, block)))  # as Qwen3's
    assert "but an answer follows '<|im_end|>" in capsys.readouterr().err


def test_arguments_of_the_template(capsys):
    prompt = elm.Prompt(byte_tokenizer(CHAT + THINK), {"enable_thinking": False})
    assert prompt.template_parts["suffix"].endswith("<think>\n</think>\n\n")
    assert not capsys.readouterr().err


TRIMS = (
    "{% for m in messages %}{% set content = '<|im_start|>' + m['role'] + '\n\n' + m['content'] | "
    "trim + '<|im_end|>' %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)  # as Llama 3's
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' + m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TYPED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{{ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # shows nothing of a plain string
TYPED_ALONE = TYPED.replace(
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}", "{{ m.content[0].text }}")  # fails at one
ROLE_OF_GEMMA = "{{ 'model' if m.role == 'assistant' else m.role }}"
TEMPLATES = {
    "chatml": CHAT, "llama 3": TRIMS, "qwen3": QWEN3, "typed": TYPED, "typed alone": TYPED_ALONE,
    "gemma": GEMMA.replace("{{ m.role }}", ROLE_OF_GEMMA)}  # fmt: skip


def conversation(kind: str, *texts: str) -> list[dict]:
    """A user's turn and an assistant's, as templates of this kind take them."""
    contents = list(texts)
    if kind.startswith("typed"):
        contents = [[{"type": "text", "text": text}] for text in texts]
    return [{"role": role, "content": content}
            for role, content in zip(("user", "assistant"), contents, strict=True)]


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("query", ["<EMB> What?", "\tSay <EMB>\n", "What is it?", "<EMB>"])
def test_a_row_is_the_conversation_as_its_tokenizer_renders_it(data_dir, kind, query):
    """With white space at the ends of its text and its response."""
    text = "\u3000\n a text\n \n"
    response = "\n\n \t A study.\n "
    arguments = {"enable_thinking": False} if kind == "qwen3" else {}
    tokenizer = byte_tokenizer(TEMPLATES[kind])
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    turn = query.strip().replace("<EMB>", text) if "<EMB>" in query else f"{text}\n{query}"
    wanted = tokenizer.apply_chat_template(
        conversation(kind, turn, response), return_dict=False, **arguments)

    row = read_jsonl(rows_path(data_dir))[0] | dict(query=query, text=text, response=response)
    write_rows(data_dir, "train", [row])
    split = open_train(data_dir, elm.Prompt(tokenizer, arguments))
    (by_text,), (by_vector,), (alone,) = (
        split.examples([0], layout) for layout in ("text", "embedding", "response"))
    length = len(by_text.ids)
    assert by_text.ids.tolist() == wanted[:length]
    assert not tokenizer.decode(wanted[length:]).strip()  # what follows an end
    for example in (by_text, by_vector, alone):
        assert example.ids[-example.num_labels :].tolist() == alone.ids.tolist()


PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("lstrip, rstrip", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("query", ["<EMB> What?", "Say <EMB>", "What is it?"])
def test_white_space_that_control_tokens_swallow(data_dir, lstrip, rstrip, query):
    """As Phi's do, by their tokenizer: a row has the ids of the conversation."""
    tokenizer = byte_tokenizer(PHI)
    for content in ("<|user|>", "<|assistant|>", "<|end|>"):
        token = AddedToken(content, lstrip=lstrip, rstrip=rstrip, normalized=False)
        tokenizer.add_tokens([token], special_tokens=True)
    text = "\u3000\n a text\n \n"
    response = "\n\n \t A study.\n "
    turn = query.replace("<EMB>", text) if "<EMB>" in query else f"{text}\n{query}"
    wanted = tokenizer.apply_chat_template(
        conversation("phi", turn, response), return_dict=False)

    row = read_jsonl(rows_path(data_dir))[0] | dict(query=query, text=text, response=response)
    write_rows(data_dir, "train", [row])
    split = open_train(data_dir, elm.Prompt(tokenizer))
    (by_text,), (by_vector,) = (split.examples([0], layout) for layout in ("text", "embedding"))
    assert by_text.ids.tolist() == wanted[: len(by_text.ids)]
    num_labels = by_vector.num_labels
    assert by_vector.ids[-num_labels:].tolist() == by_text.ids[-num_labels:].tolist()


def test_what_a_template_strips():
    characters = [chr(code) for code in range(sys.maxunicode)]
    all_of_it = "".join(character for character in characters if character.isspace())
    for template, user, assistant in (
        (CHAT, ("", ""), ("", "")),
        (TRIMS, (all_of_it, all_of_it), (all_of_it, all_of_it)),
        ("{{ strftime_now('%f') }}" + TRIMS, (all_of_it, all_of_it), (all_of_it, all_of_it)),
        (QWEN3, ("", ""), ("\n", "")),
        (None, ("", ""), ("", "")),
    ):
        parts = elm.Prompt(byte_tokenizer(template)).template_parts
        assert (parts["user_lstrip"], parts["user_rstrip"]) == user
        assert (parts["assistant_lstrip"], parts["assistant_rstrip"]) == assistant


def test_an_adapter_that_was_trained_on_what_a_template_strips(data_dir, capsys):
    """By elm before it looked: its rows stay what they were."""
    parts = elm.Prompt(byte_tokenizer(TRIMS)).template_parts
    early = {key: parts[key] for key in ("prefix", "suffix", "end")}
    elm.check_template_parts(early, "adapter")
    prompt = elm.Prompt(byte_tokenizer(TRIMS), stored_parts=early)
    assert "chat template differs from training" in capsys.readouterr().err
    row = read_jsonl(rows_path(data_dir))[0] | dict(response=" A study.\n")
    write_rows(data_dir, "train", [row])
    (example,) = open_train(data_dir, prompt).examples([0], "response")
    assert decode(example.ids) == " A study.\n<|im_end|>"
    with pytest.raises(elm.UserError, match="^adapter: its prompt cannot be used"):
        elm.check_template_parts(early | {"user_lstrip": ""}, "adapter")


def test_templates_of_which_none_is_the_default():
    templates = {"tool_use": "no", "rag": CHAT}
    tokenizer = byte_tokenizer(templates)
    with pytest.raises(elm.UserError, match=r"\['rag', 'tool_use'\], none of them the default"):
        elm.Prompt(tokenizer)
    wanted = elm.Prompt(byte_tokenizer()).template_parts
    assert elm.Prompt(tokenizer, {"chat_template": "rag"}).template_parts == wanted
    assert elm.Prompt(byte_tokenizer(templates | {"default": CHAT})).template_parts == wanted


def test_the_template_of_an_older_export_is_read(llm_dir, tmp_path, capsys):
    """A file of its own, that AutoTokenizer passes over; without any template elm says so."""
    folder = tmp_path / "llm"
    shutil.copytree(llm_dir, folder)
    (folder / "chat_template.jinja").unlink()
    no_template = "llm: has no chat template; a prompt is the query and a line break"
    plain = elm.Prompt(elm.load_tokenizer(str(folder)))
    elm.Prompt(elm.load_tokenizer(str(folder)))  # as each trial of a sweep does
    assert plain.template_parts["suffix"] == "\n"
    assert capsys.readouterr().err.count(no_template) == 1

    path = folder / "chat_template.json"
    path.write_text(json.dumps({"chat_template": CHAT}))
    prompt = elm.Prompt(elm.load_tokenizer(str(folder)))
    assert prompt.template_parts == PROMPT.template_parts
    assert not capsys.readouterr().err
    elm.Prompt(byte_tokenizer(None), stored_parts=plain.template_parts)
    assert not capsys.readouterr().err
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(elm.UserError, match="chat_template.json: not a chat template: "):
            elm.load_tokenizer(str(folder))


# -----------------------------------------------------------------------------
# Splits


def test_rows_of_other_tasks_and_of_pair_tasks_are_skipped(data_dir):
    rows = read_jsonl(rows_path(data_dir))
    compare = rows[0] | {"task_type": "compare", "embedding_file_idx": [0, 1]}
    hypothetical = rows[0] | {"task_type": "hypothetical"}
    del hypothetical["embedding_file_idx"]
    write_rows(data_dir, "train", [compare, hypothetical, *rows, compare, ""])
    split = open_train(data_dir, PROMPT, tasks=("summary", "category"))
    wanted = [r for r in rows if r["task_type"] in ("summary", "category")]
    found = split.read(range(len(split)))
    assert [r.response for r in found] == [r["response"] for r in wanted]
    assert [split.tasks[i] for i in split.index["task_id"]] == [r["task_type"] for r in wanted]
    assert split.counts == Counter(
        rows=len(wanted), pair_tasks=3, other_tasks=len(rows) - len(wanted))


@pytest.mark.parametrize("text", [None, "", ...])
def test_rows_without_text(data_dir, llm_dir, text):
    """Null, empty or missing: such a row has no loss by its text; the others have theirs."""
    rows = read_jsonl(rows_path(data_dir))[:20]
    split = open_train(data_dir, PROMPT)
    model = build_elm(llm_dir, split)
    wanted = elm.losses_by_texts(model, split, elm.own_texts(split))
    for row in rows[::2]:
        row["text"] = text
        if text is ...:
            del row["text"]
    write_rows(data_dir, "train", rows)
    split = open_train(data_dir, PROMPT)
    assert split.index["has_text"].tolist() == [False, True] * 10

    found = elm.losses_by_texts(model, split, elm.own_texts(split))
    assert not found.nll[::2].any()
    assert not found.num_tokens[::2].any()
    np.testing.assert_allclose(found.nll[1::2], wanted.nll[1:20:2], rtol=1e-5)
    assert (found.num_tokens[1::2] == wanted.num_tokens[1:20:2]).all()


def test_task_types_of_ones_own(settings, data_dir):
    for name in ("train", "val", "test"):
        rows = read_jsonl(rows_path(data_dir, name))
        for row in rows[1::2]:
            row["task_type"] = "haiku"
        write_rows(data_dir, name, rows)
    with pytest.raises(elm.UserError, match="jsonl:2: unknown task_type 'haiku'; a task type of "
                                            "your own must be named in data.tasks$"):
        open_train(data_dir, PROMPT)
    with pytest.raises(elm.UserError, match="task_type 'haiku', did you mean haikus?"):
        open_train(data_dir, PROMPT, tasks=("haikus", "summary"))

    split = open_train(data_dir, PROMPT, tasks=("haiku", "summary"))
    assert {split.tasks[i] for i in split.index["task_id"]} == {"haiku", "summary"}
    assert split.counts["rows"] + split.counts["other_tasks"] == 40
    more = ["train.max_steps=0", "eval.samples=0"]
    report, _ = go(settings, 'data.tasks=["haiku", "summary"]', *more)
    assert report["tasks"]["haiku"]["rows"] == 20


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_tables(data_dir, dtype):
    table = read_table(data_dir).numpy().astype(dtype)
    vectors_path(data_dir).unlink()
    np.save(vectors_path(data_dir).with_suffix(".npy"), table)
    found = open_train(data_dir, PROMPT).vectors.numpy()
    assert found.dtype == dtype
    assert np.array_equal(found, table)


def test_two_tables_of_one_split_are_refused(settings, data_dir):
    """Which of them is meant, nobody knows."""
    for split in ("train", "test"):
        path = vectors_path(data_dir, split)
        np.save(path.with_suffix(".npy"), read_table(data_dir, split).numpy())
        message = f"{path} and {path.with_suffix('.npy')}: two tables of one split; move the one"
        with pytest.raises(elm.UserError, match=message):
            go(settings)
        path.with_suffix(".npy").unlink()


@pytest.mark.parametrize("line, tasks", [
    ('{"task_type": "compare", "note": {"task_type": "summary"}, "embedding_file_idx": [0]}', None),
    ('{"task_type": "summary", "task_type": "compare", "query": 3}', None),
    ('{"note": [{"task_type": "compare"}], "task_type": "summary"', "summary"),
    ('{"task_type": "compare", "task_type": "summary"', "summary"),
])
def test_the_type_of_a_row_is_that_of_its_own_field(data_dir, line, tasks):
    """Not of a field within another; of two equal fields the last counts, as in every JSON
    parser."""
    rest = ', "embedding_file_idx": 3, "query": "What?", "response": "This.", "text": "A."}'
    rows = read_jsonl(rows_path(data_dir))
    write_rows(data_dir, "train", [line + rest if tasks else line, *rows])
    split = open_train(data_dir, PROMPT)
    is_row = tasks is not None
    assert split.counts["rows"] == 40 + is_row
    assert split.counts["pair_tasks"] == 1 - is_row
    assert split.read([0])[0].response == ("This." if is_row else rows[0]["response"])


@pytest.mark.parametrize("task", [["compare"], {"compare": 1}, None, 3, True])
def test_a_task_type_of_another_kind_is_refused(data_dir, task):
    rows = read_jsonl(rows_path(data_dir))
    write_rows(data_dir, "train", [rows[0] | {"task_type": task}])
    with pytest.raises(elm.UserError, match="jsonl:1: field 'task_type': .*valid string"):
        open_train(data_dir, PROMPT)


def test_files_as_other_systems_write_them(data_dir):
    """Byte-order marks, ends of lines, null, further fields."""
    rows = read_jsonl(rows_path(data_dir))
    write_rows(data_dir, "train", [row | dict(text=None, id=[1]) for row in rows])
    path = rows_path(data_dir)
    lines = b'{"task_type": "compare"}\n' + path.read_bytes()  # a pair task has other fields
    path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    split = open_train(data_dir, PROMPT)
    assert not split.index["has_text"].any()
    assert split.index["vector_id"].tolist() == [row["embedding_file_idx"] for row in rows]
    assert [row.response for row in split.read(range(40))] == [row["response"] for row in rows]

    config = path.with_name("run.toml")
    config.write_bytes(b"\xef\xbb\xbftrain.lr = 1.0\n")
    assert elm.load_config(str(config)).train.lr == 1.0


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
        # lines that are no rows
        (bad_row("{broken"), r"train_synthesis.jsonl:5: key must be a string"),
        (bad_row('{"task_type": "compare", "a'), r":5: control character"),
        (bad_row('{"task_type": "compare", "a": ' + "[" * 99999), r":5: recursion limit"),
        (bad_row("[1]"), r":5: Input should be .* dict"),
        (bad_row(response="a \ud83d b"), r":5: unexpected end of hex escape"),
        # fields
        (bad_row({"task_type": "summary", "embedding_file_idx": 0}), "'query': Field required"),
        (bad_row(response=3), r":5: field 'response': Input should be a valid string"),
        (bad_row(response=" \n"), r":5: field 'response': is empty"),
        *(
            (bad_row(embedding_file_idx=i), r":5: field 'embedding_file_idx': .*integer")
            for i in (True, "3", 3.0, 3.5, None)
        ),
        (bad_row(embedding_file_idx=10), r":5: embedding_file_idx 10, but .* vectors 0 to 9"),
        (bad_row(embedding_file_idx=-1), r":5: field 'embedding_file_idx'"),
        (bad_row(task_type="sumary"), r":5: unknown task_type 'sumary', did you mean summary"),
        (bad_row(query="<EMB> <EMB>"), r":5: '<EMB> <EMB>': a query has one <EMB> at most"),
        (bad_row(query="long " * 99), r":5: the prompt takes all of data.max_seq_length = 256 "),
        # files
        (lambda f: rows_path(f).write_text("\n"), "jsonl: no row of the task types"),
        (lambda f: rows_path(f).unlink(), r"No such file .*train_synthesis.jsonl"),
        (lambda f: vectors_path(f).unlink(), "data.dir: there is no file .*" + VECTORS),
        (lambda f: os.truncate(vectors_path(f), 400), VECTORS + ": not a whole table"),
        (npy(np.ones((10, 12), np.float32), cut=40), r"embeddings.npy: not a whole table"),
        (npy(np.array([[None]])), r"embeddings.npy: not a whole table"),
        # tables
        (npy(np.ones((10, 12), np.int8)), r"embeddings.npy: holds torch.int8 \[10, 12\]"),
        (bad_vectors(a=torch.randn(2, 3), b=torch.randn(12)), r"float32 \[12\], not one table"),
        (bad_vectors(), r"holds nothing"),
        (bad_vectors(a=torch.eye(10, 9)), VECTORS + r": vector 9 is zero, NaN or infinite"),
        (bad_vectors(a=torch.full((10, 12), torch.nan)), r": vector 0 is zero, NaN or infinite"),
    ],
)
def test_bad_data_is_refused_with_its_place(data_dir, spoil, message):
    spoil(data_dir)
    with pytest.raises((elm.UserError, OSError), match=message) as e:
        open_train(data_dir, PROMPT)
    assert len(str(e.value).splitlines()) == 1


# -----------------------------------------------------------------------------
# The table of vectors


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
    rows = [row for row in read_jsonl(rows_path(data_dir)) if row["embedding_file_idx"] < 7]
    write_rows(data_dir, "train", rows)
    split = open_train(data_dir, PROMPT)
    used = vectors[:7].float()
    norms = used.norm(dim=1)
    wanted = {
        "mean": used.mean(0),
        "std": used.std(0, correction=0),
        "norms": torch.stack([norms.min(), norms.square().mean().sqrt(), norms.max()])}
    torch.testing.assert_close(split.statistics, wanted, rtol=1e-5, atol=1e-6)
    assert split.vectors.dtype == dtype
    torch.testing.assert_close(split.embeddings(np.array([3, 3, 1])), used[[3, 3, 1]])


def test_copies_of_a_vector_are_of_one_source(data_dir):
    """By value: their rows belong together, and are not shuffled into each other."""
    table = read_table(data_dir)[:5]
    rows = read_jsonl(rows_path(data_dir))
    save_file({"x": torch.cat([table, table])}, vectors_path(data_dir))
    split = open_train(data_dir, PROMPT)
    assert split.index["source_id"].tolist() == [row["embedding_file_idx"] % 5 for row in rows]
    own = split.embeddings(split.index["vector_id"])
    other = split.embeddings(elm.shuffled_vectors(split))
    assert (own != other).any(1).all()


def test_dimensions_without_spread_do_not_blow_up(data_dir, llm_dir):
    """Constant, nearly quantised away, padded with zeros: not deafening where they do vary."""
    torch.manual_seed(0)
    vectors = torch.randn(10, 12)
    noise = 0.01 * torch.randn(10, 12)
    vectors[:, 3] = 0.02
    vectors[:, 5] = 0.0
    vectors[4, 5] = 1e-3
    vectors[:, 8:] = 0.0
    save_file({"x": vectors}, vectors_path(data_dir))
    split = open_train(data_dir, PROMPT)
    soft = build_elm(llm_dir, split)(vectors + noise).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(soft[:, None], soft, dim=2)
    assert (cosines - torch.eye(10)).max() < 0.9


# -----------------------------------------------------------------------------
# Steps


def become_process(monkeypatch, rank: int, size: int) -> None:
    """What torch says of this process from here on."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)


def test_the_rows_of_steps_over_epochs():
    steps = list(islice(elm.step_rows(40, 42, 16, 0, 0), 6))
    ends = [(step.epoch, step.position) for step in steps]
    assert ends == [(0, 16), (0, 32), (0, 40), (1, 16), (1, 32), (1, 40)]


@pytest.mark.parametrize("num_rows", [16, 2])
def test_any_process_count_sees_the_same_step(data_dir, monkeypatch, num_rows):
    """The micro-batches of three processes together hold each row once, as those of one do; there
    may be more processes than rows; a repeated row has weight 0."""
    split = open_train(data_dir, PROMPT)
    rows = next(elm.step_rows(40, 42, num_rows, 0, 0))
    become_process(monkeypatch, 0, 1)
    alone = elm.prepare_step(split, 300, rows)
    shares = []
    for rank in range(3):
        become_process(monkeypatch, rank, 3)
        shares.append(elm.prepare_step(split, 300, rows))

    lengths = [len(example.ids) for example in split.examples(rows.row_ids)]
    assert alone.num_tokens == sum(lengths)
    for share in shares:
        assert share.rows is rows
        assert share.num_labels == alone.num_labels
        assert share.num_tokens == alone.num_tokens
        assert len(share.batches) == len(shares[0].batches)
    for steps in ([alone], shares):
        batches = [batch for step in steps for batch in step.batches if batch.weight]
        assert {batch.weight for batch in batches} == {1.0}
        assert sorted(n for batch in batches for n in batch.lengths) == sorted(lengths)
        assert sum(len(batch.labels) for batch in batches) == alone.num_labels
        vectors = torch.cat([batch.embeddings for batch in batches]).sum(0)
        wanted = split.embeddings(split.index["vector_id"][rows.row_ids]).sum(0)
        torch.testing.assert_close(vectors, wanted)
