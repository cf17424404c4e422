"""data/prepare.py embed and filter: on the embedded default, and against sentence-transformers."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import prepare
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torture
from conftest import (
    ROOT,
    anonymous_memory,
    go,
    make_data,
    read_jsonl,
    read_table,
    rows_path,
    vectors_path,
    write_rows,
)
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import BoW, Pooling, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

import elm

TINY = ROOT / "data" / "tiny"
VECTORS = TINY / "embeddings" / "test_embeddings.safetensors"
EMBEDDER = TINY / "embedder"


def run_prepare(*words) -> tuple[int, str]:
    """The exit code of a command of prepare.py, run here, and what it printed."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = prepare.main([str(word) for word in words])
    assert "Traceback" not in printed.getvalue()
    return code, printed.getvalue()


def assert_refused(message: str, *words) -> None:
    """The command ends with exit code 2 and one line of error, in which `message` is found."""
    code, printed = run_prepare(*words)
    errors = re.findall("^elm: (?!warning).*", printed, re.MULTILINE)
    assert code == 2, (words, printed)
    assert len(errors) == 1, (words, printed)
    assert re.search(message, errors[0]), (words, message, printed)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_help_names_commands_and_settings():
    code, printed = run_prepare("--help")
    assert code == 0
    for command in prepare.COMMANDS:
        assert command.name in printed
        code, printed_of_command = run_prepare(command.name, "--help")
        assert code == 0
        for key in command.config_class.model_fields:
            assert re.search(rf"^    {key}\b", printed_of_command, re.MULTILINE)


# -----------------------------------------------------------------------------
# embed


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The 200 texts of the test split, in the order of their vectors."""
    text_of_vector = {}
    for row in read_jsonl(TINY / "synthesis" / "test_synthesis.jsonl"):
        text_of_vector[row["embedding_file_idx"]] = row["text"]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text(elm.jsonl({"text": text_of_vector[i]} for i in range(200)))
    return path


def test_embed_makes_the_shipped_vectors(texts, tmp_path):
    out = tmp_path / "out.safetensors"
    code, printed = run_prepare("embed", texts, out, f"model={EMBEDDER}", "bf16=false")
    assert code == 0
    assert "200 vectors of width 128; of a longer text the model reads the first 4096 t" in printed
    vectors = elm.open_vectors(out)
    shipped = elm.open_vectors(VECTORS).float()
    assert vectors.dtype == torch.float32
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6
    assert torch.nn.functional.cosine_similarity(vectors, shipped).min() >= 0.99999
    with safe_open(out, "pt") as f:
        assert json.loads(f.metadata()["embed"])["model"] == str(EMBEDDER)


def test_lines_of_plain_text_are_texts_too(texts, tmp_path):
    lines = [row["text"] for row in read_jsonl(texts)[:20]]
    (tmp_path / "texts.txt").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "texts.jsonl").write_text(elm.jsonl({"text": line} for line in lines))
    tables = []
    for suffix in ("txt", "jsonl"):
        out = tmp_path / f"{suffix}.safetensors"
        source = tmp_path / f"texts.{suffix}"
        assert run_prepare("embed", source, out, f"model={EMBEDDER}", "bf16=false")[0] == 0
        tables.append(out.read_bytes())
    assert tables[0] == tables[1]
    # No hidden folder is left.
    assert names_in(tmp_path) == [
        "jsonl.safetensors", "texts.jsonl", "texts.txt", "txt.safetensors"]


INSTRUCTION = "Given a question, find the answer"


@pytest.mark.parametrize(
    "kind, options",
    [("embedder", {}),
     ("embedder", {"bf16": True}),
     ("embedder", {"max_tokens": 12}),
     ("embedder", {"instruction": INSTRUCTION}),
     ("dense", {}),
     ("dense", {"bf16": True, "max_tokens": 12, "instruction": INSTRUCTION, "batch_size": 7})])
def test_embed_agrees_with_the_library_used_by_hand(texts, tmp_path, monkeypatch, kind, options):
    """Also by a mean-pooled encoder with a dense layer, whose vectors are not of unit norm."""
    monkeypatch.setattr(prepare, "TEXTS_PER_BLOCK", 16)
    model = EMBEDDER
    if kind == "dense":
        model = tmp_path / "model"
        torch.manual_seed(0)
        modules = [Transformer(str(TINY / "scorer")), Pooling(96, "mean"), Dense(96, 24)]
        SentenceTransformer(modules=modules, device="cpu").save(str(model))
    lines = []
    for i, row in enumerate(read_jsonl(texts)[:40]):
        words = row["text"].split()
        lines.append(" ".join(words[: 3 + 7 * (i % 5)]))  # of many lengths
    (tmp_path / "lines.txt").write_text("\n".join(lines))

    options = {"bf16": False, **options}
    out = tmp_path / "out.safetensors"
    prepare.embed(
        prepare.EmbedOptions(model=str(model), **options), tmp_path / "lines.txt", out)
    vectors = elm.open_vectors(out)

    by_hand = SentenceTransformer(
        str(model), device="cpu", model_kwargs={"dtype": torch.float32})
    by_hand.max_seq_length = options.get("max_tokens", by_hand.max_seq_length)
    prompt = f"Instruct: {INSTRUCTION}\nQuery:" if "instruction" in options else ""
    expected = by_hand.encode([prompt + line for line in lines], convert_to_tensor=True)
    assert vectors.shape == expected.shape
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6
    cosines = torch.nn.functional.cosine_similarity(vectors, expected)
    assert cosines.min() >= (0.999 if options["bf16"] else 0.99999)


def test_embed_killed_and_started_again_ends_with_the_same_bytes(
        texts, tmp_path, monkeypatch, processes):
    """Killed each time that ten blocks more are there, of 32; meanwhile no other process may write
    the same file."""
    monkeypatch.setattr(prepare, "TEXTS_PER_BLOCK", 64)
    many = tmp_path / "many.jsonl"
    many.write_text(texts.read_text() * 10)
    options = prepare.EmbedOptions(model=str(EMBEDDER), bf16=False)
    prepare.embed(options, many, tmp_path / "whole.safetensors")
    out = tmp_path / "out.safetensors"
    code = (
        "import sys, prepare\n"
        "prepare.TEXTS_PER_BLOCK = 64\n"
        "sys.exit(prepare.main(sys.argv[1:]))")

    def start():
        words = ["embed", str(many), str(out), f"model={EMBEDDER}", "bf16=false"]
        return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT / "data")

    def num_blocks() -> int:
        return len(list(tmp_path.glob(".out.safetensors.work/*.safetensors")))

    for before in (0, 10):
        child = start()
        torture.until(child, lambda before=before: num_blocks() > before)
        with pytest.raises(elm.UserError, match="another process holds it"):
            prepare.embed(options, many, out)
        torture.until(child, lambda before=before: num_blocks() >= before + 10)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert num_blocks() >= before + 10
    assert start().wait() == 0
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert names_in(tmp_path) == ["many.jsonl", "out.safetensors", "whole.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_is_written_without_being_held_in_memory(tmp_path, dtype):
    path = tmp_path / "table.safetensors"
    bytes_held = []

    def chunks():
        for i in range(100):
            bytes_held.append(anonymous_memory())
            yield torch.full((1000 + i % 2, 1001), i, dtype=dtype)

    prepare.write_table(path, chunks(), {"about": "x"})
    table = elm.open_vectors(path)
    assert table.dtype == dtype
    assert torch.equal(table[:, 0], table[:, 1000])
    assert torch.equal(table[:, 7].unique(), torch.arange(100).to(dtype))
    assert max(bytes_held) - bytes_held[0] < 60e6  # of 200e6 or 400e6


def test_others_may_read_a_table_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        prepare.write_table(tmp_path / "table.safetensors", [torch.ones(2, 3)])
    finally:
        os.umask(before)
    assert (tmp_path / "table.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("max_tokens", [None, 3])
def test_a_static_embedder_reads_whole_texts(texts, tmp_path, max_tokens):
    """As those of model2vec: it has no limit, and cannot be given one."""
    words = sorted({word for row in read_jsonl(texts) for word in row["text"].split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    static = StaticEmbedding(tokenizer, embedding_dim=24)
    table = static.embedding.weight.detach().clone()
    model = tmp_path / "static"
    SentenceTransformer(modules=[static], device="cpu").save(str(model))
    out = tmp_path / "out.safetensors"
    options = ["bf16=false"] if max_tokens is None else ["bf16=false", f"max_tokens={max_tokens}"]
    code, printed = run_prepare("embed", texts, out, f"model={model}", *options)
    assert code == 0
    assert "200 vectors of width 24; no text is cut" in printed
    assert (f"max_tokens = 3 has no effect: {model} has no limit" in printed) == bool(max_tokens)
    for row, vector in zip(read_jsonl(texts), elm.open_vectors(out), strict=True):
        expected = table[[words.index(word) for word in row["text"].split()]].mean(0)
        assert torch.nn.functional.cosine_similarity(vector, expected, dim=0) > 0.99999


def test_an_embedder_without_weights(texts, tmp_path):
    words = sorted({word for row in read_jsonl(texts) for word in row["text"].lower().split()})
    model = tmp_path / "bow"
    SentenceTransformer(modules=[BoW(words, {}, 1.0)], device="cpu").save(str(model))
    code, printed = run_prepare("embed", texts, tmp_path / "x.safetensors", f"model={model}")
    assert code == 0, printed
    assert f"200 vectors of width {len(words)}; no text is cut" in printed


def test_code_beside_an_embedder_is_not_run(texts, tmp_path):
    folder = shutil.copytree(EMBEDDER, tmp_path / "model")
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Pooling: pass"
    (folder / "evil.py").write_text(evil)
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(
        modules.replace("sentence_transformers.models.P", "evil.P"))
    out = tmp_path / "x.safetensors"
    assert_refused("model: cannot load", "embed", texts, out, f"model={folder}")
    assert "ran" not in names_in(tmp_path)


def test_embed_refuses_vectors_of_a_broken_model(texts, tmp_path):
    folder = shutil.copytree(EMBEDDER, tmp_path / "model")
    model = SentenceTransformer(str(folder), device="cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    model.save(str(folder))
    out = tmp_path / "out.safetensors"
    assert_refused("makes zero or infinite vectors", "embed", texts, out, f"model={folder}")
    assert not out.exists()


BAD_TEXTS = {
    "empty.txt": (b"", "is empty"),
    "gap.txt": (b"one\n\nthree\n", "gap.txt:2: a blank line; each line must hold a text"),
    "gap.jsonl": (b'{"text": "a"}\n\n', "gap.jsonl:2: a blank line; each line must hold a text"),
    "none.jsonl": (b'{"text": " "}\n', "none.jsonl:1: not a text, or an empty one: .* is empty"),
    "latin.txt": (b"caf\xe9\n", "latin.txt:1: not a text.*utf-8"),
    "deep.jsonl": (b"[" * 99999, "deep.jsonl:1: not a text.*recursion"),
    "field.jsonl": (b'{"text": "a"}\n{"txt": "a"}\n', "field.jsonl:2: not a text.*'text'"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_line_of_texts_is_named(tmp_path, name):
    content, message = BAD_TEXTS[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.safetensors"
    assert_refused(message, "embed", tmp_path / name, out, f"model={EMBEDDER}")
    assert names_in(tmp_path) == [name]


def test_bad_input_of_embed(texts, tmp_path):
    new = tmp_path / "new.safetensors"
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"precious")
    assert_refused("TEXTS: there is no file .*nowhere.txt$", "embed", tmp_path / "nowhere.txt", new)
    assert_refused("TEXTS: .* is a folder, not a file$", "embed", tmp_path, new)
    assert_refused("OUT: .*taken.safetensors is a file, not a folder", "embed", texts, taken / "x")
    assert_refused("taken.safetensors: exists already", "embed", texts, taken)
    assert_refused("the vectors are written as safetensors", "embed", texts, tmp_path / "x")
    assert_refused("modle: unknown key, did you mean model", "embed", texts, new, "modle=x")
    none = f"model={tmp_path / 'none'}"
    assert_refused("model: cannot load .*none", "embed", texts, new, none)
    without_pooling = f"model={TINY / 'scorer'}"
    assert_refused("model: cannot load .*without modules.json", "embed", texts, new,
                   without_pooling)
    assert names_in(tmp_path) == ["taken.safetensors"]
    assert taken.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["a.csv", "a.md", "a.text", "a", "a.json", "a.feather"])
def test_a_file_of_texts_is_known_by_its_suffix(tmp_path, name):
    """Others were read as JSONL."""
    (tmp_path / name).write_text("one\ntwo\n")
    message = (rf"/{name}: no file of texts; give a .txt file, one text a line, a .jsonl file, "
               '{"text": "…"} a line, or a .parquet file$')
    models = (f"model={TINY / 'llm'}", f"embedder={EMBEDDER}")
    assert_refused(message, "embed", tmp_path / name, tmp_path / "out.safetensors")
    assert_refused(message, "synthesize", tmp_path / name, tmp_path / "out", *models)
    assert names_in(tmp_path) == [name]


@pytest.mark.parametrize("command", ["embed", "synthesize", "filter"])
def test_operands_the_other_way_round(texts, data_dir, tmp_path, command):
    source = data_dir if command == "filter" else texts
    name = "DIR" if command == "filter" else "TEXTS"
    new = tmp_path / "new.safetensors"
    code, printed = run_prepare(command, new, source)
    assert code == 2
    assert printed == (f"elm: {name} OUT: {new} does not exist, but {source} does; if they are the "
                       f"other way round: {source} {new}\n")


def test_operands_are_required(texts):
    code, printed = run_prepare("embed", texts)
    assert code == 2
    assert "required: OUT" in printed


# -----------------------------------------------------------------------------
# Parquet: texts, and convert


def write_parquet(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_texts_of_a_parquet_file(tmp_path):
    """As the same texts of a .jsonl file: their splits and own fields, too, but columns of other
    types than integers and texts are left out."""
    rows = [{"text": f"Text {i}.", "group": f"g{i // 2}", "split": None, "year": 2000 + i}
            for i in range(6)]
    rows[0]["split"] = "val"
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["split"] = pa.array(columns["split"], pa.string())
    columns["group"] = pa.array(columns["group"]).dictionary_encode()
    columns["nothing"] = pa.nulls(6)
    for row in rows:
        row["nothing"] = None
    columns["body"] = columns.pop("text")
    columns["embedding"] = [[0.1, 0.2]] * 6
    path = write_parquet(tmp_path / "texts.parquet", columns, row_group_size=4)
    lines = tmp_path / "texts.jsonl"
    lines.write_text(elm.jsonl(rows))
    assert list(prepare.read_texts(path, "body")) == list(prepare.read_texts(lines))
    outs = []
    for source, more in ((path, ["text_column=body"]), (lines, [])):
        outs.append(tmp_path / f"{source.suffix[1:]}.safetensors")
        words = ["embed", source, outs[-1], f"model={EMBEDDER}", "bf16=false", *more]
        assert run_prepare(*words)[0] == 0
    assert torch.equal(elm.open_vectors(outs[0]), elm.open_vectors(outs[1]))


def test_a_damaged_parquet_file_of_texts_is_refused(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"text": [f"text-{i}" for i in range(20)]},
                         use_dictionary=False, compression="none")
    path.write_bytes(path.read_bytes().replace(b"text-7", b"text\xff7"))
    assert_refused("x.parquet: cannot be read: ", "embed", path, tmp_path / "out.safetensors",
                   f"model={ROOT / 'data/tiny/embedder'}")


def test_bad_texts_of_a_parquet_file(tmp_path):
    out = tmp_path / "new" / "out.safetensors"
    path = write_parquet(tmp_path / "x.parquet", {"body": ["a", "b", None], "n": [1.5, 2.5, 3.5]})
    assert_refused("text_column: .* has no column 'text'.*; its columns are body, n$",
                   "embed", path, out)
    assert_refused("did you mean body", "embed", path, out, "text_column=bodi")
    assert_refused("text_column: n of .* is of type double, not of texts", "embed", path, out,
                   "text_column=n")
    assert_refused("x.parquet: row 2: not a text, or an empty one", "embed", path, out,
                   "text_column=body")
    # Of pandas, where one of some whole numbers is missing.
    floats = write_parquet(tmp_path / "f.parquet", {"text": ["a", "b"], "group": [1.0, None]})
    assert_refused("its column group is of type double, not of integers", "embed", floats, out)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert_refused("text_column: .* has several columns 'text'", "embed",
                   tmp_path / "twice.parquet", out)
    empty = write_parquet(tmp_path / "empty.parquet", {"text": pa.array([], pa.string())})
    assert_refused("empty.parquet: is empty", "embed", empty, out)
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(path.read_bytes()[:-9])
    assert_refused("torn.parquet: not a whole Parquet file", "embed", torn, out)
    (tmp_path / "x.txt").write_text("a\n")
    assert_refused("text_column: .* only a .parquet file has", "embed", tmp_path / "x.txt", out,
                   "text_column=body")
    assert not out.parent.exists()


@pytest.mark.parametrize("suffix", ["parquet", "npy", "safetensors"])
def test_convert_brings_vectors_of_other_programs(tmp_path, suffix):
    """The table that a data set has, with the name of the embedder."""
    vectors = np.random.default_rng(0).normal(size=(2500, 6)).astype(np.float32)
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        write_parquet(path, {"v": list(vectors)}, row_group_size=900)
    elif suffix == "npy":
        np.save(path, vectors)
    else:
        save_file({"any": torch.from_numpy(vectors)}, path, {"embed": '{"model": "old"}'})
    out = tmp_path / "mine" / "embeddings" / "train_embeddings.safetensors"
    column = ["column=v"] if suffix == "parquet" else []
    options = [*column, "model=all/MiniLM", "instruction=Find it"]
    assert run_prepare("convert", path, out, *options)[0] == 0
    table = elm.open_vectors(out)
    assert table.dtype == torch.float32
    assert torch.equal(table, torch.from_numpy(vectors))
    assert elm.table_origin(out) == elm.VectorOrigin(model="all/MiniLM", instruction="Find it")

    half = tmp_path / "half.safetensors"
    _, printed = run_prepare("convert", path, half, *column, "fp16=true")
    assert torch.equal(elm.open_vectors(half), torch.from_numpy(vectors).half())
    name = "old" if suffix == "safetensors" else None
    assert elm.table_origin(half).model == name
    assert f"2500 vectors of width 6, of {name or 'no known model'}\n" in printed


def test_bad_input_of_convert(tmp_path):
    out = tmp_path / "out.safetensors"
    columns = {"embedding": [[1.0, 2.0], None, [1.0]], "t": [1, 2, 3]}
    path = write_parquet(tmp_path / "x.parquet", columns)
    assert_refused("x.parquet: row 1 has no vector", "convert", path, out)
    large = tmp_path / "large.npy"
    np.save(large, np.array([[1.0, 2.0], [1e5, 2.0]], np.float32))
    assert_refused("large.npy: row 1 is zero, NaN or infinite", "convert", large, out, "fp16=true")
    assert_refused("column: .*only a .parquet", "convert", large, out, "column=t")
    large.unlink()
    assert_refused("column: t of .* is of type int64", "convert", path, out, "column=t")
    assert_refused("instruction: .*give model=NAME", "convert", path, out, "instruction=x")
    assert_refused("written as safetensors", "convert", path, tmp_path / "out.npy")
    assert_refused("TABLE: there is no file", "convert", tmp_path / "none.parquet", out)
    assert names_in(tmp_path) == ["x.parquet"]


# -----------------------------------------------------------------------------
# filter


@pytest.mark.slow
def test_training_on_filtered_data_gives_the_losses_of_the_tasks(settings, tmp_path):
    data = make_data(tmp_path / "data", num_rows=60, num_vectors=30)
    out = tmp_path / "few"
    tasks = ["summary", "keywords", "style_casual"]
    assert run_prepare("filter", data, out, f"tasks={tasks}")[0] == 0

    of_tasks = [f"data.dir={data}", f"output.dir={tmp_path / 'run'}", f"data.tasks={tasks}"]
    filtered = [f"data.dir={out}", f"output.dir={tmp_path / 'filtered run'}"]
    numbers = []
    for more in (of_tasks, filtered):
        report, folder = go(settings, *more)
        entries = read_jsonl(folder / "metrics.jsonl")
        losses = [entry.get("loss", entry.get("val_loss")) for entry in entries]
        keys = ("loss", "loss_shuffled", "loss_text", "bertscore_f1")
        numbers.append(losses + [report[key] for key in keys])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)


def test_filter_keeps_rows_and_their_vectors(tmp_path):
    data = make_data(tmp_path / "data", num_rows=60, num_vectors=30)
    out = tmp_path / "new" / "few"
    tasks = ["summary", "keywords", "style_casual"]
    rows = read_jsonl(rows_path(data))
    of_a_pair = {"task_type": "compare", "embedding_file_idx": -1, "query": "?", "response": "?"}
    with_more_fields = rows[0] | {"task_type": "summary", "note": "and ü"}
    write_rows(data, "train", [*rows, of_a_pair, with_more_fields])
    code, printed = run_prepare("filter", data, out, f"tasks={tasks}")
    assert code == 0

    for split in elm.SPLITS:
        before = read_jsonl(rows_path(data, split))
        wanted = [row for row in before if row["task_type"] in tasks]
        kept = read_jsonl(rows_path(out, split))
        old = read_table(data, split)
        new = read_table(out, split)
        num_used = len({row["embedding_file_idx"] for row in wanted})
        assert len(new) == num_used < len(old)
        assert new.dtype == old.dtype
        for a, b in zip(wanted, kept, strict=True):
            old_vector = old[a.pop("embedding_file_idx")]
            new_vector = new[b.pop("embedding_file_idx")]
            assert torch.equal(old_vector, new_vector)
        assert wanted == kept
        told = f"{split}: {len(wanted)} of {len(before)} rows, {len(new)} of 30 vectors"
        assert told in printed
    assert names_in(out.parent) == ["few"]


def test_filter_carries_what_the_tables_say(tmp_path):
    """All their metadata, also names that mean something to write_table; a .npy file has none."""
    data = make_data(tmp_path / "data")
    said = {"embed": '{"model": "m", "instruction": "Find it"}', "path": "x", "format": "pt"}
    save_file({"x": read_table(data)}, vectors_path(data), said)
    table = read_table(data, "val").numpy()
    vectors_path(data, "val").unlink()
    np.save(vectors_path(data, "val").with_suffix(".npy"), table)
    assert run_prepare("filter", data, tmp_path / "few")[0] == 0
    assert elm.table_metadata(vectors_path(tmp_path / "few")) == said
    origin = elm.table_origin(vectors_path(tmp_path / "few"))
    assert (origin.model, origin.instruction, origin.max_tokens) == ("m", "Find it", None)
    assert elm.table_metadata(vectors_path(tmp_path / "few", "val")) == {}


def test_bad_input_of_filter(data_dir, tmp_path):
    out = tmp_path / "out"
    misspelled = 'tasks=["summary", "sumary"]'
    assert_refused("^elm: tasks: no row is of the task type 'sumary', did you mean summary.$",
                   "filter", data_dir, out, misspelled)
    assert_refused("did you mean summary", "filter", data_dir, out, 'tasks=["sumary"]')
    assert_refused("none: is no data set", "filter", tmp_path / "none", out)
    assert_refused("data: exists already", "filter", data_dir, data_dir)

    rows = [row for row in read_jsonl(rows_path(data_dir, "val")) if row["task_type"] != "summary"]
    write_rows(data_dir, "val", rows)
    only_summaries = 'tasks=["summary"]'
    assert_refused("val_synthesis.jsonl: no row of", "filter", data_dir, out, only_summaries)
    write_rows(data_dir, "val", [*rows, "{"])
    assert_refused(rf"val_synthesis.jsonl:{len(rows) + 1}: ", "filter", data_dir, out)
    np.save(vectors_path(data_dir, "test").with_suffix(".npy"), read_table(data_dir).numpy())
    assert_refused("test_embeddings.npy: two tables of one split", "filter", data_dir, out)
    assert names_in(tmp_path) == ["data"]


def test_a_table_where_a_file_system_has_no_modes(tmp_path, monkeypatch):
    """SMB, file systems on object stores: the table is written all the same."""

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    vectors = torch.randn(5, 3)
    prepare.write_table(tmp_path / "x.safetensors", vectors.split(2))
    assert torch.equal(elm.open_vectors(tmp_path / "x.safetensors"), vectors)
