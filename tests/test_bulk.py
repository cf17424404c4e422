"""`generate` by the thousand: Parquet, several queries, a file that goes on, a server, scores."""

import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    anonymous_memory,
    command,
    make_llm,
    read_jsonl,
    refused,
)
from pyarrow import parquet
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from test_evaluation import make_embedder
from tiny_server import decode_part

import elm

TINY = ROOT / "data" / "tiny"
EMBEDDER = str(TINY / "embedder")
QUERIES = ["Summarize the text.", "Which category is it?"]
ASK_BOTH = f"query={json.dumps(QUERIES)}"
NUM_ROWS = 80
WIDTH = 128


@pytest.fixture(scope="module")
def vectors():
    """[80, 128] fp16"""
    return elm.open_vectors(TINY / "embeddings" / "test_embeddings.safetensors")[:NUM_ROWS].clone()


@pytest.fixture(scope="module")
def model(vectors):
    """A fresh adapter: its answers differ from vector to vector already."""
    torch.manual_seed(0)
    return elm.ELM.create(
        str(TINY / "llm"), vectors, bf16=False, hidden_dim=32, tokens=2, embedder=EMBEDDER)


@pytest.fixture(scope="module")
def files(model, vectors, tmp_path_factory):
    """A folder with the adapter and the vectors."""
    folder = tmp_path_factory.mktemp("bulk")
    model.save(folder / "adapter.safetensors")
    save_file({"x": vectors}, folder / "vectors.safetensors")
    return folder


@pytest.fixture
def start(files):
    """The words of a `generate` about the vectors, without a query."""
    return [
        "generate", f"adapter={files / 'adapter.safetensors'}",
        f"embeddings={files / 'vectors.safetensors'}", "max_new_tokens=8"]


@pytest.fixture
def give_up_at_once(monkeypatch):
    """The server's failures are not retried."""
    monkeypatch.setattr(elm, "SERVER_RETRIES", 0)


def printed(capsys, *words) -> list[dict]:
    """The lines of the standard output of a command that succeeds: all are JSON."""
    capsys.readouterr()
    code = elm.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def ask(out: Path, *words) -> list[dict]:
    """The lines of the file of a command that succeeds."""
    code, said = command(*words, f"out={out}")
    assert code == 0, said
    return read_jsonl(out)


def write_table(path: Path, vectors: torch.Tensor | list, kind="list", value_type=None,
                group_size=None, metadata=None, name="embedding", **columns) -> str:
    """A Parquet file of a column of vectors and of others; its word on the command line."""
    value_type = value_type or pa.float32()
    kinds = {
        "list": pa.list_(value_type), "large": pa.large_list(value_type),
        "fixed": pa.list_(value_type, WIDTH)}
    if isinstance(vectors, torch.Tensor):
        vectors = list(vectors.numpy().astype(value_type.to_pandas_dtype()))
    columns = {name: pa.array(vectors, kinds[kind]), **columns}
    table = pa.table(columns).replace_schema_metadata(metadata)
    parquet.write_table(table, path, row_group_size=group_size)
    return f"embeddings={path}"


# -----------------------------------------------------------------------------
# Several queries, and the file of answers


def test_all_queries_about_each_row(model, vectors, start, capsys):
    lines = printed(capsys, *start, ASK_BOTH, "rows=[5, 0, 70]")
    answers = {query: model.generate(vectors[[5, 0, 70]], query, max_new_tokens=8)
               for query in QUERIES}
    expected = []
    for i, row in enumerate([5, 0, 70]):
        for query in QUERIES:
            expected.append({"row": row, "query": query, "answer": answers[query][i]})
    assert lines == expected
    assert len({line["answer"] for line in lines}) > 3


def test_the_file_has_what_would_be_printed(start, tmp_path, capsys):
    """Its parents are made; the standard output has the log line alone."""
    words = [*start, ASK_BOTH, "rows=[3, 1, 2]"]
    lines = printed(capsys, *words)
    out = tmp_path / "new" / "folder" / "answers.jsonl"
    assert elm.main([*words, f"out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}: 6 answers\n"
    assert read_jsonl(out) == lines
    assert out.read_bytes().count(b"\n") == 6


@pytest.mark.parametrize("num_lines, torn", [(0, b'{"row"'), (1, b""), (19, b'{"row": 9, "q')])
@pytest.mark.parametrize("temperature", ["0.0", "2.0"])
def test_a_file_goes_on_at_the_first_missing_answer(
        start, tmp_path, num_lines, torn, temperature):
    """As if it had not stopped, also in the middle of a batch of 16, and if it samples."""
    out = tmp_path / "answers.jsonl"
    words = [*start, ASK_BOTH, "rows=[7, 6, 5, 4, 3, 2, 1, 0, 20, 21, 22]"]
    words += [f"temperature={temperature}", f"out={out}"]
    command(*words)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 22
    kept = b"".join(lines[:num_lines])
    out.write_bytes(kept + torn)
    code, said = command(*words)
    assert code == 0
    assert out.read_bytes() == whole
    has_said = f"{out}: has {num_lines} of 22 answers; going on\n" in said
    assert has_said == (num_lines > 0)


def test_kept_answers_are_not_asked_for_again(start, tmp_path, start_server):
    out = tmp_path / "answers.jsonl"
    server = start_server()
    words = [*start, ASK_BOTH, "rows=[0, 1, 2, 3]", server.endpoint, f"out={out}"]
    command(*words)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:5]))
    server.num_asked.clear()
    command(*words)
    assert server.num_asked.total() == 3
    assert out.read_text() == "".join(lines)


def test_of_a_finished_file_there_is_nothing_to_do(start, tmp_path):
    """No LLM is loaded: it may be gone. The file stays as it is."""
    out = tmp_path / "answers.jsonl"
    words = [*start, "query=Why?", "rows=[0, 1]", f"out={out}"]
    command(*words)
    before = out.stat().st_mtime_ns
    code, said = command(*words, f"llm={tmp_path / 'gone'}", "endpoint=http://127.0.0.1:9/v1")
    assert (code, said) == (0, f"{out}: has all 2 answers; nothing to do\n")
    assert out.stat().st_mtime_ns == before


def test_a_file_of_another_job_is_refused(model, vectors, files, start, tmp_path):
    """Before the LLM is loaded, and nothing is lost."""
    other = elm.ELM(model.llm, elm.Adapter(WIDTH, 8, model.llm.config.hidden_size), model.prompt)
    other.save(tmp_path / "other.safetensors")
    save_file({"x": vectors.flip(0)}, tmp_path / "flipped.safetensors")
    out = tmp_path / "answers.jsonl"
    words = [*start, "query=Why?", "rows=[0, 1]", f"out={out}"]
    command(*words)
    out.write_bytes(out.read_bytes()[:-9])
    before = out.read_bytes()
    for key, *more in (
        ("hash of the adapter", f"adapter={tmp_path / 'other.safetensors'}"),
        ("hash of the vectors", f"embeddings={tmp_path / 'flipped.safetensors'}"),
        ("rows", "rows=[1, 0]"),
        ("rows", "rows=[0, 1, 2]"),
        ("query", "query=Who?"),
        ("query", 'query=["Why?", "Who?"]'),
        ("max_new_tokens", "max_new_tokens=9"),
        ("temperature", "temperature=1.0"),
        ("seed", "seed=43"),
        ("bf16", "bf16=true"),
        ("score", "score=true"),
    ):
        refused(f"^elm: out: {out} has answers of another job: {key} was .* and is .* here; "
                "choose another file$", *words, *more, f"llm={tmp_path / 'gone'}")
        assert out.read_bytes() == before
    refused(r"job: query was \[\"Why\?\"\] and is \[\"Who\?\"\] here", *words, "query=Who?")


def test_a_file_of_no_job_is_refused(start, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text("mine\n")
    words = [*start, "query=Why?", "rows=[0]", f"out={out}"]
    refused(f"^elm: out: {out} exists, but no {out}.job says of which job; choose another file$",
            *words)
    assert out.read_text() == "mine\n"
    Path(f"{out}.job").write_text("[")
    refused(f"^elm: {out}.job: is broken", *words)
    refused(f"^elm: out: {tmp_path} is no regular file; name one", *words, f"out={tmp_path}")
    refused(f"^elm: out: {out} is a file, not a folder", *words, f"out={out}/x")


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines[:2] + lines[3:], "line 3 of .* is about row 1, and is not the next one"),
    (lambda lines: lines[1:2] + lines[:1] + lines[2:], "line 1 of .* is about row 0, and is not"),
    (lambda lines: [*lines, lines[-1]], "line 9 of .* is about row 3, and is not the next one"),
    (lambda lines: [*lines[:2], "mine\n", *lines[2:]], "line 3 of .* is no answer: "),
    (lambda lines: ["[]\n", *lines], "line 1 of .* is about row None, and is not the next one"),
    (lambda lines: ["7\n", *lines], "line 1 of .* is no answer: "),
])
def test_a_file_whose_lines_are_not_those_of_the_job_is_refused(start, tmp_path, change, message):
    """As when somebody takes out refused questions to have them asked again."""
    out = tmp_path / "answers.jsonl"
    words = [*start, ASK_BOTH, "rows=[0, 1, 2, 3]"]
    ask(out, *words)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(change(lines)))
    before = out.read_bytes()
    refused(f"^elm: out: {message}", *words, f"out={out}")
    assert out.read_bytes() == before


def test_a_full_disk_loses_no_answer(start, small_disk, tmp_path):
    words = [*start, ASK_BOTH]
    whole = ask(tmp_path / "whole", *words)
    out = small_disk / "answers.jsonl"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(285_000))
    refused(f"^elm: {out}: cannot be written .*No space left", *words, f"out={out}")
    assert out.read_text()
    ballast.unlink()
    assert ask(out, *words) == whole


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("has_file", [True, False])
def test_the_bar_is_not_mixed_with_answers(start, tmp_path, has_file):
    """On one terminal."""
    words = [*start, "query=Why?", "rows=[0, 1, 2]"]
    if has_file:
        words.append(f"out={tmp_path / 'answers.jsonl'}")
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        assert elm.main(words) == 0
    assert ("answers:" in terminal.getvalue()) == has_file
    assert ('"answer":' in terminal.getvalue()) != has_file


def test_a_query_that_is_no_text_is_refused(start):
    refused(r"^elm: query: 'Wh\\udcff\?' is not of UTF-8", *start, "query=Wh\udcff?", "rows=[0]")


def test_two_commands_do_not_write_one_file(start, tmp_path):
    out = tmp_path / "answers.jsonl"
    with elm.locked(tmp_path / ".answers.jsonl.lock"):
        refused("another process holds it", *start, "query=Why?", "rows=[0]", f"out={out}")
    assert not out.exists()


# -----------------------------------------------------------------------------
# Parquet


TYPES = [("list", pa.float32()), ("list", pa.float16()), ("large", pa.float64()),
         ("large", pa.float16()), ("fixed", pa.float32()), ("fixed", pa.float64())]


@pytest.mark.parametrize("kind, value_type", TYPES, ids=lambda value: str(value))
def test_every_type_of_lists_is_read(vectors, tmp_path, kind, value_type):
    """Rows in any order, several times, of groups that are smaller than the table; fp16 vectors
    are the same in all types."""
    path = tmp_path / "x.parquet"
    write_table(path, vectors, kind, value_type, group_size=7)
    table = elm.open_table(path, "embeddings", "embedding", None)
    assert len(table) == NUM_ROWS
    assert table.shape == (NUM_ROWS, WIDTH)
    for row_ids in ([0], list(range(NUM_ROWS)), [79, 3, 3, 40, 0], [6, 7, 13, 14, 78, 79], [12]):
        block = table.read(row_ids)
        assert block.row_ids == row_ids
        assert block.vectors.dtype == torch.float32
        assert torch.equal(block.vectors, vectors[row_ids].float())
        assert block.ids is None


def test_groups_larger_than_a_block_and_empty_groups(tmp_path):
    vectors = torch.randn(5000, WIDTH)
    path = tmp_path / "x.parquet"
    write_table(tmp_path / "whole.parquet", vectors, number=pa.array(range(5000)))
    whole = parquet.read_table(tmp_path / "whole.parquet")
    with parquet.ParquetWriter(path, whole.schema) as writer:
        for start, stop in ((0, 2500), (2500, 2500), (2500, 2503), (2503, 5000)):
            writer.write_table(whole.slice(start, stop - start))
    assert parquet.ParquetFile(path).metadata.num_row_groups >= 3
    table = elm.open_table(path, "embeddings", "embedding", "number")
    rng = np.random.default_rng(0)
    for row_ids in (range(5000), range(4999, -1, -1), rng.permutation(5000)[:3000].tolist()):
        row_ids = list(row_ids)
        blocks = list(elm.read_blocks(table, row_ids))
        assert len(blocks) == -(-len(row_ids) // 1024)
        assert torch.equal(torch.cat([block.vectors for block in blocks]), vectors[row_ids])
        assert sum((block.ids for block in blocks), []) == row_ids
        assert sum((block.row_ids for block in blocks), []) == row_ids


def test_answers_about_parquet_are_those_about_safetensors(vectors, start, tmp_path, capsys):
    words = [*start, ASK_BOTH, "rows=[50, 2, 70]"]
    expected = printed(capsys, *words)
    word = write_table(tmp_path / "x.parquet", vectors, "fixed", group_size=30, name="vec")
    assert printed(capsys, *words, word, "column=vec") == expected


IDS = {
    "integers": pa.array([7 * i - 100 for i in range(NUM_ROWS)]),
    "small integers": pa.array(range(NUM_ROWS), pa.uint8()),
    "texts": pa.array([f"né{i}" for i in range(NUM_ROWS)]),
    "large texts": pa.array([f"a{i}" for i in range(NUM_ROWS)], pa.large_string()),
    "coded texts": pa.array([f"a{i}" for i in range(NUM_ROWS)]).dictionary_encode(),
    "coded integers": pa.array(range(NUM_ROWS)).dictionary_encode(),
    "some without": pa.array([None if i == 70 else f"a{i}" for i in range(NUM_ROWS)])}


@pytest.mark.parametrize("kind", IDS)
def test_answers_carry_the_ids(vectors, start, tmp_path, capsys, kind):
    word = write_table(tmp_path / "x.parquet", vectors, group_size=30, key=IDS[kind])
    words = [*start, word, ASK_BOTH, "rows=[50, 2, 70]"]
    without = printed(capsys, *words)
    lines = printed(capsys, *words, "id=key")
    ids = IDS[kind].to_pylist()
    assert [line["id"] for line in lines] == [ids[row] for row in (50, 50, 2, 2, 70, 70)]
    assert [list(line) for line in lines] == 6 * [["row", "id", "query", "answer"]]
    for line in lines:
        del line["id"]
    assert lines == without


def test_other_ids_are_another_job(vectors, start, tmp_path):
    out = tmp_path / "answers.jsonl"
    path = tmp_path / "x.parquet"
    words = [*start, "query=Why?", "rows=[0, 1]", f"out={out}", "id=key"]
    words.append(write_table(path, vectors, key=IDS["integers"], other=IDS["texts"]))
    command(*words)
    refused('job: id was "key" and is null here', *words, "id=none")
    refused('job: id was "key" and is "other" here', *words, "id=other")
    write_table(path, vectors, key=IDS["texts"])
    refused("job: hash of the vectors was .* and is .* here; choose another file", *words)
    write_table(path, vectors, key=IDS["integers"], group_size=9)
    assert command(*words) == (0, f"{out}: has all 2 answers; nothing to do\n")


def test_repeated_ids_are_kept_and_told(vectors, start, tmp_path):
    ids = [-1, -2, *range(NUM_ROWS - 2)]
    words = [*start, "query=Why?", "id=key", f"out={tmp_path / 'a'}", "max_new_tokens=1"]
    path = tmp_path / "x.parquet"
    word = write_table(path, vectors, key=pa.array(ids))
    _, said = command(*words, word)
    assert "warning" not in said
    ids[50:53] = [ids[3], ids[4], ids[4]]
    word = write_table(path, vectors, key=pa.array(ids))
    _, said = command(*words, word, f"out={tmp_path / 'b'}")
    assert f"elm: warning: id: {path}: 80 rows have 77 different ids; all are answered\n" in said
    assert [line["id"] for line in read_jsonl(tmp_path / "b")] == ids


def test_bad_columns(vectors, files, start, tmp_path):
    """All before an LLM is loaded."""
    words = [*start, "query=Why?", "rows=[0]", f"llm={tmp_path / 'gone'}"]
    path = tmp_path / "x.parquet"
    whole = pa.array([[1] * WIDTH] * NUM_ROWS)
    numbers = pa.array(np.arange(NUM_ROWS) / 2)
    word = write_table(path, vectors, whole=whole, numbers=numbers, text=IDS["texts"])
    for message, *more in (
        (rf"^elm: column: {path} has no column 'embeding'; its columns "
         r"are embedding, whole, numbers, text, did you mean embedding\?$", "column=embeding"),
        (rf"^elm: id: {path} has no column 'txt'; its columns .*, did you mean text\?$", "id=txt"),
        (f"^elm: column: whole of {path} is of type list<.*int64>, not of lists of floats$",
         "column=whole"),
        (f"^elm: column: numbers of {path} is of type double, not of lists of floats$",
         "column=numbers"),
        (f"^elm: column: text of {path} is of type string, not", "column=text"),
        (f"^elm: id: numbers of {path} is of type double, not of integers or texts$",
         "id=numbers"),
        (f"^elm: id: embedding of {path} is of type list<.*>, not of integers", "id=embedding"),
        (f"^elm: id: {files / 'vectors.safetensors'} has no columns; only a .parquet file has$",
         f"embeddings={files / 'vectors.safetensors'}", "id=text"),
        ("^elm: rows: no row 80; the table has rows 0 to 79$", "rows=[0, 80]"),
    ):
        refused(message, *words, word, *more)


def test_bad_files(vectors, start, tmp_path):
    words = [*start, "query=Why?", "rows=none", f"llm={tmp_path / 'gone'}"]
    path = tmp_path / "x.parquet"
    word = write_table(path, [])
    refused(f"^elm: {path}: has no rows$", *words, word)
    write_table(path, vectors)
    path.write_bytes(path.read_bytes()[:-9])
    refused(f"^elm: {path}: not a whole Parquet file: ", *words, word)
    path.write_bytes(b"")
    refused(f"^elm: {path}: not a whole Parquet file: ", *words, word)
    refused("^elm: embeddings: there is no file nowhere.parquet here",
            *words, "embeddings=nowhere.parquet")
    write_table(path, vectors[:, :100])
    refused(rf"^elm: {path}: \[80, 100\], but the adapter reads \[n, 128\]", *words, word)
    write_table(path, 9 * vectors)
    refused(f"^elm: {path}: the vectors' norm was 1 in training and is 9 here", *words, word)
    write_table(path, vectors, metadata={"embed": '{"model": "someone/other"}'})
    refused(f"^elm: {path}: its vectors are of someone/other, those of the adapter of {EMBEDDER}; ",
            *words, word)
    # The same by another path, or another program's metadata.
    for stored in ('{"model": "x/embedder"}', "[7]", "true", "{"):
        write_table(path, vectors, metadata={"embed": stored})
        refused("gone", *words, word)


def test_a_damaged_file_is_refused(vectors, start, tmp_path):
    """Where a byte of an id is no UTF-8, and wherever else a byte is another."""
    path = tmp_path / "x.parquet"
    ids = [f"key-{i:03d}" for i in range(NUM_ROWS)]
    columns = {"embedding": list(vectors.float().numpy()), "key": ids}
    parquet.write_table(pa.table(columns), path, use_dictionary=False, compression="none")
    words = [*start, "query=Why?", "id=key", f"llm={tmp_path / 'gone'}", f"embeddings={path}"]
    refused("gone", *words)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"key-041", b"key-\xff41"))
    refused(f"^elm: {path}: cannot be read: ", *words)
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        said = refused("", *words)  # of the LLM that is not there, if nothing else is wrong
        num_refused += "gone" not in said
    assert num_refused


@pytest.mark.parametrize("kind", ["list", "large", "fixed"])
def test_bad_vectors_are_named_by_row_and_id(vectors, start, tmp_path, kind):
    words = [*start, "query=Why?", f"llm={tmp_path / 'gone'}"]
    path = tmp_path / "x.parquet"
    good = [row.float().tolist() for row in vectors]
    for bad, message in (
        (None, "has no vector; leave such rows out$"),
        ([None, *good[71][1:]], "has a vector with null in it; embed its text again$"),
        ([*good[71][:-1], None], "has a vector with null in it; embed its text again$"),
        (good[71][:-1], "has a vector of width 127, the first row one of 128$"),
        ([float("nan"), *good[71][1:]], "is zero, NaN or infinite; embed its text again$"),
        ([float("inf"), *good[71][1:]], "is zero, NaN or infinite; embed its text again$"),
        ([0.0] * WIDTH, "is zero, NaN or infinite; embed its text again$"),
    ):
        if kind == "fixed" and bad is not None and len(bad) < WIDTH:
            continue
        rows = [*good[:71], bad, *good[72:]]
        word = write_table(path, rows, kind, group_size=50, key=IDS["coded texts"])
        refused(rf"^elm: {path}: row 71 {message}", *words, word)
        refused(rf"^elm: {path}: row 71 \(id 'a71'\) {message}", *words, word, "id=key")
        refused(rf"^elm: {path}: row 71 \(id 'a71'\) {message}", *words, word, "id=key",
                "rows=[79, 71, 2]")
        refused("gone", *words, word, "rows=[79, 70, 2]")  # others are not read
    write_table(path, [None, *good[1:]], kind)
    refused(f"^elm: {path}: row 0 has no vector; leave such rows out$", *words, word)


@pytest.mark.slow
def test_memory_stays_flat_while_a_large_row_group_is_read(tmp_path):
    """Of 200,000 vectors of 256 numbers, 205 MB, in one group."""
    path = tmp_path / "x.parquet"
    schema = pa.schema({"embedding": pa.list_(pa.float32()), "key": pa.string()})
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200_000, 256, generator=generator)
    offsets = pa.array(np.arange(0, vectors.numel() + 1, 256, dtype=np.int32))
    lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.flatten().numpy()))
    keys = pa.array([f"key {i}" for i in range(len(vectors))])
    with parquet.ParquetWriter(path, schema) as writer:
        writer.write_table(pa.table([lists, keys], schema), row_group_size=len(vectors))
    assert parquet.ParquetFile(path).metadata.num_row_groups == 1
    last = vectors[-1].clone()
    del vectors, lists, offsets, keys
    pa.default_memory_pool().release_unused()

    before = anonymous_memory()
    before_in_pool = pa.total_allocated_bytes()
    table = elm.open_table(path, "embeddings", "embedding", "key")
    most = most_in_pool = 0
    for block in elm.read_blocks(table, range(len(table))):
        most = max(most, anonymous_memory())
        most_in_pool = max(most_in_pool, pa.total_allocated_bytes())
        last_block = block
    assert torch.equal(last_block.vectors[-1], last)
    assert last_block.ids[-1] == "key 199999"
    assert most - before < 60e6
    # Of memory that writing the file has left, which the process gets again, pyarrow alone knows.
    assert most_in_pool - before_in_pool < 60e6


# -----------------------------------------------------------------------------
# A server

HOW_TO_START = f"start `vllm serve {TINY / 'llm'} --enable-prompt-embeds`$"


def soft_tokens_in(body: dict) -> torch.Tensor:
    """[K, D] of a request."""
    return decode_part(body["messages"][0]["content"][0])


@pytest.mark.parametrize("concurrency", [1, 7])
def test_a_servers_answers_are_those_of_this_process(start, start_server, capsys, concurrency):
    """In the same order, though that of the requests is another. No LLM is loaded here."""
    words = [*start, ASK_BOTH, "rows=[70, 3, 4, 5, 6, 7, 8, 9, 10]"]
    here = printed(capsys, *words)
    server = start_server(seconds=0.1)
    there = printed(capsys, *words, server.endpoint, f"concurrency={concurrency}")
    assert there == here
    assert set(server.num_asked.values()) == {1}
    assert min(concurrency, 2) <= server.most_open <= concurrency


def test_a_server_is_asked_about_more_vectors_than_the_adapter_reads_at_once(
        start, start_server, capsys):
    words = [*start, "query=Why?", "max_new_tokens=1"]
    here = printed(capsys, *words)
    assert [line["row"] for line in here] == list(range(NUM_ROWS))
    assert printed(capsys, *words, start_server().endpoint) == here


def test_what_a_server_is_sent(model, vectors, start, start_server, capsys):
    """Soft tokens alone, not the whole batch that they are a view of, in the LLM's dtype."""
    server = start_server(served_model="alias")
    words = [*start, ASK_BOTH, "rows=[4, 2]", server.endpoint, "served_model=alias"]
    printed(capsys, *words, "concurrency=1")
    bodies = server.bodies
    assert [body["messages"][0]["content"][1]["text"] for body in bodies] == 2 * QUERIES
    for body in bodies:
        (message,) = body["messages"]
        assert message["role"] == "user"
        assert [part["type"] for part in message["content"]] == ["prompt_embeds", "text"]
        assert body["max_tokens"] == 8
        assert body["temperature"] == 0
        assert "seed" not in body
        assert body["model"] == "alias"
    with torch.no_grad():
        expected = model.adapter(vectors[[4, 4, 2, 2]].float())
    for body, soft_tokens in zip(bodies, expected, strict=True):
        assert torch.allclose(soft_tokens_in(body), soft_tokens, atol=1e-6)
        data = body["messages"][0]["content"][0]["data"]
        assert len(base64.b64decode(data)) < 4 * 2 * 128 + 2000
    printed(capsys, *words, "bf16=true", "max_new_tokens=1")
    assert soft_tokens_in(server.bodies[-1]).dtype == torch.bfloat16


def test_each_question_has_a_seed_of_its_own(start, start_server, tmp_path):
    """The same, where a command goes on."""
    out = tmp_path / "answers.jsonl"
    server = start_server()
    words = [*start, "query=Why?", "rows=[4, 2, 9]", "temperature=0.5", "concurrency=1",
             server.endpoint, f"out={out}"]
    command(*words)
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == 3
    assert {body["temperature"] for body in server.bodies} == {0.5}
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0])
    command(*words)
    assert [body["seed"] for body in server.bodies[3:]] == seeds[1:]
    command(*words, f"out={tmp_path / 'other'}", "seed=43")
    assert not set(seeds) & {body["seed"] for body in server.bodies[5:]}


def test_a_servers_key_is_sent(start, start_server, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = start_server()
    printed(capsys, *start, "query=Why?", "rows=[0]", server.endpoint)
    assert server.keys == {"Bearer sk-secret"}


def test_a_server_that_does_not_read_the_vectors_is_refused(start, start_server, tmp_path):
    """At its first answer, of which nothing is written."""
    query = "Summarize the text."
    tokenizer = elm.load_tokenizer(str(TINY / "llm"))
    turn = {"role": "user", "content": f"\n{query}"}
    rendered = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    expected = len(tokenizer(rendered)["input_ids"]) + 2
    other = "it leaves the vector out, or has another chat template than that of training"
    for message, behaviour in (
        (f"reads a prompt of {expected - 3} tokens, not of {expected}: {other}",
         {"reads_parts": False}),
        (f"reads a prompt of {expected + 1} tokens, not of {expected}: {other}",
         {"template_end": "\n"}),
        ("does not tell how many tokens a prompt has, so there is no knowing whether it reads the "
         "vectors", {"tells_usage": False}),
    ):
        server = start_server(**behaviour)
        url = server.endpoint.removeprefix("endpoint=")
        out = tmp_path / str(len(behaviour))
        refused(f"^elm: endpoint: {url} {message}; {HOW_TO_START}", *start, f"query={query}",
                "rows=[0, 1]", server.endpoint, f"out={out}")
        assert not out.exists()


def test_an_adapter_of_another_llm_is_refused_without_the_llm(start, tmp_path):
    """Its tokenizer tells."""
    other = make_llm(tmp_path / "other")
    (other / "model.safetensors").unlink()
    refused("hash of the tokenizer's ids was .* in training and is .* here", *start, "query=Why?",
            f"llm={other}", "endpoint=http://127.0.0.1:9/v1")


def test_settings_that_do_not_go_with_a_server(start):
    words = [*start, "rows=[0]", "query=Why?"]
    endpoint = "endpoint=http://127.0.0.1:9/v1"
    refused("^elm: endpoint: a query with <EMB> in it needs the LLM in this process; leave "
            "endpoint out, or the placeholder$",
            *words, endpoint, 'query=["Why?", "Is <EMB> long?"]')
    refused("^elm: zero_stage: is of the LLM in this process", *words, endpoint, "zero_stage=3")
    refused("^elm: served_model: is the name of a server's model", *words, "served_model=alias")
    refused("^elm: endpoint: localhost:8000 is no address", *words, "endpoint=localhost:8000")
    refused("^elm: concurrency = 0: ", *words, endpoint, "concurrency=0")


def test_a_busy_server_is_waited_for(start, start_server, capsys):
    """The standard output stays free of that."""
    words = [*start, "query=Why?", "rows=[0, 1, 2]"]
    here = printed(capsys, *words)
    server = start_server("429", "503", "429/0.05")
    assert printed(capsys, *words, server.endpoint) == here
    assert set(server.num_asked.values()) == {4}


def test_a_wait_is_not_said_among_the_answers(
        start, start_server, capsys, give_up_at_once):
    server = start_server("429/0.05")
    words = [*start, "query=Why?", "rows=[0]", server.endpoint]
    elm.main(words)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and json.loads(out)["row"] == 0
    assert "is busy and asks to wait 1 s\n" in err


def test_refused_questions_have_an_error(start, start_server, tmp_path):
    """The first, and one in the middle, of which both queries are refused; the others have their
    answers. It is said once, and the file counts as whole."""
    server = start_server()
    words = [*start, ASK_BOTH, "rows=[0, 1, 2, 3]", server.endpoint]
    whole = ask(tmp_path / "whole", *words, "concurrency=1")
    for row in (0, 2):
        server.refused_soft_tokens = soft_tokens_in(server.bodies[2 * row])
        out = tmp_path / str(row)
        code, said = command(*words, f"out={out}")
        assert code == 0
        warnings = [line for line in said.splitlines() if line.startswith("elm: warning")]
        (warning,) = [line for line in warnings if "refuses" in line]
        assert re.search("the server refuses a question, which gets an error in place of an "
                         "answer; the others go on: .*400.*maximum context length", warning)
        lines = read_jsonl(out)
        for line, answered in zip(lines, whole, strict=True):
            if line["row"] != row:
                assert line == answered
                continue
            assert list(line) == ["row", "query", "error"]
            assert line["query"] == answered["query"]
            assert "maximum context length exceeded" in line["error"]
        code, said = command(*words, f"out={out}")
        assert (code, said) == (0, f"{out}: has all 8 answers; nothing to do\n")


@pytest.mark.parametrize("rows", ["[0]", "[0, 1, 2]", "none"])
def test_a_server_that_refuses_all_ends_the_command(start, start_server, tmp_path, rows):
    """As vLLM does without --enable-prompt-embeds. Few are asked, and nothing is written."""
    server = start_server()
    server.refused_text = ""
    out = tmp_path / "answers.jsonl"
    refused("^elm: endpoint: http://.*/v1 refuses [0-9]+ questions in a row: .*maximum context.*; "
            f"if it does not take prompt_embeds, {HOW_TO_START}",
            *start, "query=Why?", f"rows={rows}", server.endpoint, f"out={out}", "concurrency=2")
    assert not out.exists()


@pytest.mark.parametrize("rows, num_rows, num_kept, num_refused", [
    ("none", NUM_ROWS, 2, 4),
    ("[0, 1, 2, 3, 4]", 5, 3, 2),  # near the end of a job: fewer than REFUSALS_TO_STOP
])
def test_a_server_that_begins_to_refuse_all_ends_the_command(
        start, start_server, tmp_path, monkeypatch, rows, num_rows, num_kept, num_refused):
    """As one that was started again without its flag. What it refused is asked again."""
    monkeypatch.setattr(elm, "REFUSALS_TO_STOP", 4)
    server = start_server()
    out = tmp_path / "answers.jsonl"
    words = [*start, "query=Why?", f"rows={rows}", server.endpoint, "concurrency=1"]
    whole = ask(out, *words)
    assert len(whole) == num_rows
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:num_kept]))
    server.refused_text = ""
    refused(f"refuses {num_refused} questions in a row", *words, f"out={out}")
    assert out.read_text() == "".join(lines[:num_kept])
    server.refused_text = None
    assert ask(out, *words) == whole


def test_a_job_whose_last_question_is_refused_ends(start, start_server, tmp_path):
    """Though the command that goes on asks only this one."""
    server = start_server()
    out = tmp_path / "answers.jsonl"
    words = [*start, "query=Why?", "rows=[0, 1, 2]", server.endpoint, "concurrency=1"]
    whole = ask(tmp_path / "whole", *words)
    server.refused_soft_tokens = soft_tokens_in(server.bodies[2])
    ask(out, *words)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]))
    assert [line.get("answer") for line in ask(out, *words)] == [
        whole[0]["answer"], whole[1]["answer"], None]
    assert out.read_text() == "".join(lines)


def test_a_server_that_dies_loses_no_answer(start, start_server, tmp_path, give_up_at_once):
    words = [*start, ASK_BOTH, f"rows={list(range(12))}"]
    whole = ask(tmp_path / "whole", *words)
    out = tmp_path / "answers.jsonl"
    server = start_server(dies_at=15)
    words += ["concurrency=4", f"out={out}"]
    refused("^elm: endpoint: http://.*/v1 about row [0-9]+: Connection error", *words,
            server.endpoint)
    kept = read_jsonl(out)
    assert 8 <= len(kept) <= 15
    assert kept == whole[: len(kept)]
    again = start_server()
    assert ask(out, *words, again.endpoint) == whole
    assert again.num_asked.total() == 24 - len(kept)


@pytest.mark.parametrize("failure, message", [
    ("404", "about row 0: .*404.*; is .*/llm the server's name of the model .served_model=NAME., "
            "and does the address end in /v1.$"),
    ("401", "about row 0: .*401"), ("500", "about row 0: .*500"),
    ("half", "about row 0: "), ("nothing", "about row 0: "), ("garbage", "about row 0: "),
    ("overloaded", "about row 0: no chat completion: .*no instance is free")])
def test_a_server_that_fails_is_told(start, start_server, give_up_at_once, failure, message):
    server = start_server(*[failure] * 9)
    refused(f"^elm: endpoint: http://.*/v1 {message}", *start, "query=Why?", "rows=[0, 1]",
            server.endpoint, "concurrency=1")


def test_a_server_that_has_another_model_is_told(start, start_server):
    server = start_server(served_model="mine")
    words = [*start, "query=Why?", "rows=[0]", server.endpoint]
    refused("is other the server's name of the model", *words, "served_model=other")
    assert command(*words, "served_model=mine")[0] == 0


def test_lost_connections_are_retried(start, start_server, capsys):
    words = [*start, "query=Why?", "rows=[0, 1]"]
    here = printed(capsys, *words)
    server = start_server("half", "nothing")
    assert printed(capsys, *words, server.endpoint) == here
    assert set(server.num_asked.values()) == {3}


def test_a_server_that_is_not_there_is_told(start, give_up_at_once):
    refused("^elm: endpoint: http://127.0.0.1:9/v1 about row 0: Connection error. Does a server",
            *start, "query=Why?", "rows=[0]", "endpoint=http://127.0.0.1:9/v1")


# -----------------------------------------------------------------------------
# Scores


def cosines(texts: list[str], vectors: torch.Tensor) -> np.ndarray:
    """[n, m] of n texts, embedded by sentence-transformers alone, with m vectors."""
    fp32 = {"dtype": torch.float32}
    embedder = SentenceTransformer(EMBEDDER, device="cpu", model_kwargs=fp32)
    embedded = embedder.encode(texts).astype(np.float64)
    own = vectors.numpy().astype(np.float64)
    lengths = np.linalg.norm(embedded, axis=1)[:, None] * np.linalg.norm(own, axis=1)
    return embedded @ own.T / lengths


def drawn_rows(row_ids: list[int]) -> list[int]:
    """The rows that answers are compared with, as the documentation of `score` says."""
    places = np.random.default_rng(0).choice(len(row_ids), 65, replace=False)
    return [row_ids[place] for place in sorted(places)]


def test_scores_are_cosines_with_the_own_and_with_others(vectors, start, capsys):
    """By hand; the answers are the same as without."""
    rows = list(range(NUM_ROWS - 1, 5, -1))
    words = [*start, "query=Summarize the text.", f"rows={rows}", "max_new_tokens=3"]
    lines = printed(capsys, *words, "score=true")
    assert [list(line) for line in lines] == len(rows) * [
        ["row", "query", "answer", "consistency", "consistency_others"]]
    expected = cosines([line["answer"] for line in lines], vectors)
    compared = drawn_rows(rows)
    for line, cosines_of_answer in zip(lines, expected, strict=True):
        assert line["consistency"] == pytest.approx(cosines_of_answer[line["row"]], abs=1e-4)
        others = [row for row in compared if row != line["row"]][:64]
        assert len(others) == 64
        mean = cosines_of_answer[others].mean()
        assert line["consistency_others"] == pytest.approx(mean, abs=1e-4)
        del line["consistency"], line["consistency_others"]
    assert lines == printed(capsys, *words)


def test_a_servers_answers_are_scored(start, start_server, capsys):
    words = [*start, ASK_BOTH, "rows=[9, 60, 30]", "score=true"]
    here = printed(capsys, *words)
    assert printed(capsys, *words, start_server().endpoint) == here


def test_a_score_does_not_depend_on_the_length_of_a_vector(vectors, start, tmp_path, capsys):
    lengths = torch.linspace(0.8, 1.25, NUM_ROWS)[:, None]
    word = write_table(tmp_path / "x.parquet", lengths * vectors, key=IDS["texts"])
    words = [*start, word, "query=Why?", "rows=[9, 60, 30]", "id=key"]
    lines = printed(capsys, *words, f"embedder={EMBEDDER}")
    expected = cosines([line["answer"] for line in lines], vectors)
    for line, row, others in zip(lines, (9, 60, 30), ([60, 30], [9, 30], [9, 60]), strict=True):
        own = expected[lines.index(line)]
        assert line["id"] == f"né{row}"
        assert line["consistency"] == pytest.approx(own[row], abs=1e-4)
        assert line["consistency_others"] == pytest.approx(own[others].mean(), abs=1e-4)


def test_one_vector_has_no_others(start, capsys):
    (line,) = printed(capsys, *start, "query=Why?", "rows=[5]", "score=true")
    assert list(line) == ["row", "query", "answer", "consistency"]


def test_empty_answers_and_refused_questions(model, vectors, files, start, start_server, capsys,
                                             tmp_path):
    """An answer of no words is about nothing; of a refused question there is no score."""
    embedder = elm.load_embedder(EMBEDDER, False, CPU)
    table = elm.open_table(files / "vectors.safetensors", "embeddings", elm.VECTOR_COLUMN)
    scorer = elm.AnswerScorer(embedder, elm.VectorOrigin(), table, range(NUM_ROWS))
    questions = list(elm.vector_questions(table, [4, 5, 6, 7], ["Why?"], 0))
    texts = ["", " \n", "They study polymers.", ""]
    answers = [elm.VectorAnswer(*pair) for pair in zip(questions, texts, strict=True)]
    answers[3] = elm.VectorAnswer(questions[3], "", "too long")
    empty, blank, full, refusal = scorer.score(answers)
    assert empty == blank == {"consistency": 0, "consistency_others": 0}
    assert full["consistency"] != 0 and full["consistency_others"] != 0
    assert refusal == {}
    assert scorer.score(answers[3:]) == [{}]

    server = start_server()
    words = [*start, "query=Why?", "rows=[0, 1, 2]", server.endpoint, "concurrency=1"]
    before = printed(capsys, *words, "score=true")
    server.refused_soft_tokens = soft_tokens_in(server.bodies[1])
    after = printed(capsys, *words, "score=true")
    assert list(after[1]) == ["row", "query", "error"]
    assert [after[0], after[2]] == [before[0], before[2]]


def test_scored_answers_before_an_error_are_kept(start, start_server, tmp_path, monkeypatch):
    """Though they are scored by 32."""
    monkeypatch.setattr(elm, "SERVER_RETRIES", 0)
    server = start_server()
    words = [*start, "query=Why?", "score=true", server.endpoint, "concurrency=1"]
    whole = ask(tmp_path / "whole", *words)
    server.dies_at = len(server.bodies) + 3
    out = tmp_path / "answers.jsonl"
    refused("endpoint: .*", *words, f"out={out}")
    assert read_jsonl(out) == whole[:3]


def test_an_embedder_of_another_model_is_told(start, tmp_path):
    """A narrower one is refused before the first answer."""
    words = [*start, "query=Why?", "rows=[0]"]
    shutil.copytree(EMBEDDER, tmp_path / "other")
    code, said = command(*words, f"embedder={tmp_path / 'other'}")
    assert code == 0
    assert "other: the vectors are of" in said and "mean nothing" in said
    refused("^elm: embedder: it makes vectors of width 32, not of 128", *words,
            f"embedder={make_embedder(tmp_path / 'narrow', 32)}")


def test_a_file_of_scored_answers_goes_on(start, tmp_path):
    """It is scored by the same others."""
    out = tmp_path / "answers.jsonl"
    words = [*start, "query=Why?", "score=true", f"out={out}", "max_new_tokens=3"]
    command(*words)
    whole = read_jsonl(out)
    assert len(whole) == NUM_ROWS
    assert "consistency_others" in whole[79]
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:40]))
    assert command(*words)[0] == 0
    for line, expected in zip(read_jsonl(out), whole, strict=True):
        for key in ("consistency", "consistency_others"):
            assert line.pop(key) == pytest.approx(expected.pop(key), abs=2e-4)
        assert line == expected
    refused("job: score was .*embedder. and is null here", *words, "score=false")


def test_the_embedder_of_the_scores(model, vectors, start, tmp_path, capsys):
    """The one that is named, else of the adapter, else of the table; all before the LLM."""
    words = [*start, "query=Why?", "rows=[3, 4]"]
    gone = f"llm={tmp_path / 'gone'}"
    nameless = elm.ELM(model.llm, model.adapter, model.prompt)
    nameless.save(tmp_path / "nameless.safetensors")
    adapter = f"adapter={tmp_path / 'nameless.safetensors'}"
    expected = printed(capsys, *words, "score=true")
    refused("^elm: score: neither the adapter nor the table says which model made the vectors; "
            "name it by embedder=NAME$", *words, "score=true", adapter, gone)
    assert printed(capsys, *words, adapter, f"embedder={EMBEDDER}") == expected
    origin = json.dumps({"model": EMBEDDER})
    word = write_table(tmp_path / "x.parquet", vectors, metadata={"embed": origin})
    assert printed(capsys, *words, adapter, word, "score=true") == expected

    refused("^elm: embedder: .*no folder /nowhere/x$", *words, "embedder=/nowhere/x", gone)
    refused("^elm: embedder: .*tiny/llm", *words, f"embedder={TINY / 'llm'}")


# -----------------------------------------------------------------------------
# Kills


@pytest.mark.parametrize("by_server", [False, True], ids=["here", "by a server"])
def test_killed_and_started_again_ends_with_the_same_bytes(
        vectors, start, start_server, tmp_path, processes, by_server):
    word = write_table(tmp_path / "x.parquet", vectors, group_size=30, key=IDS["texts"])
    words = [*start, word, "id=key", ASK_BOTH, f"rows={list(range(40))}"]
    if by_server:
        words += [start_server(seconds=0.02).endpoint, "concurrency=2"]
    else:
        words += ["temperature=0.8", "max_new_tokens=64"]
    ask(tmp_path / "whole", *words)
    whole = (tmp_path / "whole").read_bytes()
    out = tmp_path / "new" / "answers.jsonl"

    def num_answers() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    command_line = [sys.executable, ROOT / "elm.py", *words, f"out={out}"]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE) as child:
        while num_answers() < 20:
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        child.kill()
        assert child.stdout.read() == b""
    before = num_answers()
    assert 20 <= before < 80
    with open(out, "ab") as f:
        f.write(b'{"row": 1, "qu')
    code, said = command(*words, f"out={out}")
    assert code == 0
    assert f"{out}: has {before} of 80 answers; going on\n" in said
    assert out.read_bytes() == whole
