"""Prepare data sets for elm.py.

    python data/prepare.py synthesize texts.jsonl data/mine       rows, vectors, splits, train.toml
    python data/prepare.py embed texts.jsonl out.safetensors      the vectors of texts alone
    python data/prepare.py convert x.parquet out.safetensors      vectors that you have already
    python data/prepare.py filter data/mine data/few 'tasks=["summary"]'      of some task types

Texts are the lines of a .txt file, or a .jsonl file of {"text": …}, or a column of a .parquet file,
each with a "group" and a "split" if you like. Killed, the same command goes on. --help after a
command explains its settings; data/README.md says how a data set looks, and what synthesize writes.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import itertools
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pydantic
import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import elm
from elm import RECONSTRUCT, SPLITS, PathStr, Seed, ServerURL, Table, TaskNames, UserError

if TYPE_CHECKING:
    from pyarrow import parquet
    from sentence_transformers import SentenceTransformer

# -----------------------------------------------------------------------------
# Texts
#
# A file of texts, and how they are divided into splits.


class SourceText(BaseModel, frozen=True, strict=True, extra="allow"):
    """A line of a file of texts. Fields of the user's own go into the rows about the text."""

    text: Annotated[str, Field(pattern=r"\S")]  # not empty
    group: Any = None  # such as an article: all its texts are in one split
    split: Any = None  # of the text and its group; none: drawn by a hash

    @property
    def has_group(self) -> bool:
        return self.group not in (None, "")

    @property
    def split_key(self) -> str:
        """Texts of equal keys are in one split: those of a group, or copies of one text."""
        return normalize(str(self.group) if self.has_group else self.text)


TEXT_COLUMN = "text"


def read_texts(path: Path, text_column: str = TEXT_COLUMN) -> Iterator[SourceText]:
    """Yield the text of each line of a .txt file, one text a line, or of a .jsonl file, or of each
    row of a Parquet file. No line may be blank, so that the vector of a text stands in the row of
    its line. Raises: OSError; UserError that names the line."""
    elm.check_file(path, "TEXTS")
    if elm.is_parquet(path):
        yield from read_parquet_texts(path, text_column)
        return
    is_plain = path.suffix.lower() == ".txt"
    if not is_plain and path.suffix.lower() != ".jsonl":
        raise UserError(f"{path}: no file of texts; give a .txt file, one text a line, a .jsonl "
                        'file, {"text": "…"} a line, or a .parquet file')
    if text_column != TEXT_COLUMN:
        raise UserError(f"text_column: {path} has no columns; only a .parquet file has")
    number = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                raise UserError(f"{path}:{number}: a blank line; each line must hold a text, as "
                                "the vector of a text stands in the row of its line")
            with elm.user_error(f"{path}:{number}: not a text, or an empty one", ValueError):
                if is_plain:
                    text = line.decode("utf-8-sig").rstrip("\r\n")
                    source = elm.validate_row({"text": text}, SourceText)
                else:
                    source = elm.validate_row(elm.parse_json(line), SourceText)
            yield source
    if number == 0:
        raise UserError(f"{path}: is empty")


def read_parquet_texts(path: Path, text_column: str) -> Iterator[SourceText]:
    """Yield the text of each row; its own fields are the other columns of integers and texts.
    Raises: UserError that names the row."""
    file = elm.open_parquet(path, "TEXTS")
    column_type = elm.find_column(file, text_column, "text_column", path)
    columns = []
    for field in file.schema_arrow:
        if elm.is_integer_or_text(field.type):
            columns.append(field.name)
        elif field.name in ("group", "split"):
            raise UserError(f"{path}: its column {field.name} is of type {field.type}, not of "
                            "integers or texts")
    if text_column not in columns:
        raise UserError(f"text_column: {text_column} of {path} is of type {column_type}, not of "
                        "texts")
    number = 0
    for rows in read_row_blocks(file, columns, path):
        for fields in rows:
            fields["text"] = fields.pop(text_column)
            with elm.user_error(f"{path}: row {number}: not a text, or an empty one", ValueError):
                source = elm.validate_row(fields, SourceText)
            number += 1
            yield source
    if number == 0:
        raise UserError(f"{path}: is empty")


def read_row_blocks(file: parquet.ParquetFile, columns: list[str],
                    path: Path) -> Iterator[list[dict[str, Any]]]:
    """Raises: UserError if the file is damaged."""
    batches = file.iter_batches(elm.ROWS_OF_BLOCK, columns=columns)
    while True:
        with elm.user_error(f"{path}: cannot be read", *elm.PARQUET_ERRORS):
            batch = next(batches, None)
            if batch is None:
                return
            rows = batch.to_pylist()
        yield rows


def normalize(text: str) -> str:
    """Equal for texts that differ in case and whitespace alone."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash_to_unit_interval(text: str) -> float:
    """A number in [0, 1)."""
    digits = elm.sha256_short(text)[:13]  # 52 bits, which a float holds
    return int(digits, 16) / 2**52


def drop_copies(sources: Iterable[SourceText]) -> list[SourceText]:
    """One of the texts that differ in case and whitespace alone: the first, before others one that
    has a group. Sorted by text, whatever the order of `sources`."""
    unique: dict[str, SourceText] = {}
    for source in sorted(sources, key=sort_key):
        unique.setdefault(normalize(source.text), source)
    return sorted(unique.values(), key=lambda source: source.text)


def sort_key(source: SourceText) -> tuple[bool, str, str, str, str]:
    own_fields = repr(sorted(source.model_extra.items()))
    return not source.has_group, source.text, source.split_key, str(source.split or ""), own_fields


def assign_splits(sources: Iterable[SourceText], unique: Iterable[SourceText],
                  shares: Sequence[float]) -> dict[str, str]:
    """{text: name of its split}, of the texts `unique`, which are drop_copies(sources). The split
    is the one given to the text, to a copy of it or to any of its group, else drawn by a hash of
    the group, or of the text without one, so that it stays when other texts come."""
    given: dict[str, str] = {}
    for source in sorted(sources, key=sort_key):
        if source.split:
            given[source.split_key] = str(source.split)

    splits = {}
    for source in unique:
        key = source.split_key
        drawn = pick_split(hash_to_unit_interval(key), shares)
        splits[source.text] = given.get(key, drawn)
    return splits


def pick_split(position: float, shares: Sequence[float]) -> str:
    """The split at a position in [0, 1) of a line that is cut in proportion to the shares."""
    bounds = list(itertools.accumulate(shares))
    return SPLITS[bisect.bisect_right(bounds, position * bounds[-1])]


FEW_TEXTS = 10  # of a split


def check_shares(splits: dict[str, str], path: Path) -> None:
    """Raises: UserError if a split is unknown, or has too few texts for the shuffled control."""
    sizes = Counter(splits.values())
    unknown = sorted(set(sizes) - set(SPLITS))
    if unknown:
        raise UserError(f"{path}: split = {unknown[0]!r}: it is train, val or test")
    if sizes["train"] < 2 or sizes["val"] < 2 or sizes["test"] == 1:
        raise UserError(f"{path}: {name_sizes(sizes)}; train and val need two, test two or none; "
                        "give more, or other shares, as split=[0.7, 0.15, 0.15]")
    if min(sizes.values()) < FEW_TEXTS:
        elm.log.warning(f"{path}: {name_sizes(sizes)}: some answers will be rejected, and figures "
                        f"of fewer than {FEW_TEXTS} texts say little; give more, or other shares, "
                        "as split=[0.7, 0.15, 0.15]")


def name_sizes(sizes: Mapping[str, int]) -> str:
    """As "2 texts in train, 1 in val"."""
    parts = []
    for split, size in sizes.items():
        noun = "" if parts else " texts"
        parts.append(f"{size}{noun} in {split}")
    return ", ".join(parts)


# -----------------------------------------------------------------------------
# Files


def check_places(source: Path, out: Path, key: str) -> None:
    """Raises: UserError if `out` exists or cannot be written; `key` names the source, which comes
    first."""
    if out.exists() and not source.exists():
        raise UserError(f"{key} OUT: {source} does not exist, but {out} does; if they are the "
                        f"other way round: {out} {source}")
    elm.check_new(out)
    elm.check_can_write(out.parent, "OUT")


@contextlib.contextmanager
def resumable_work_folder(out: Path) -> Iterator[Path]:
    """A locked, hidden folder beside `out`, for what a kill must not lose. It is deleted at the
    end, but not after an error. Raises: UserError if `out` exists."""
    folder = out.with_name(f".{out.name}.work")
    folder.mkdir(parents=True, exist_ok=True)
    with elm.locked(folder / ".lock"):
        elm.check_new(out)  # another process may have finished it since
        yield folder
        shutil.rmtree(folder)


def write_table(path: Path, chunks: Iterable[Tensor],
                metadata: dict[str, str] | None = None) -> None:
    """Write chunks of vectors [n, E] as the one tensor of a safetensors file. A scratch file beside
    it collects them, so that the table is never in memory. Raises: UserError."""
    chunks = iter(chunks)
    first_chunk = next(chunks)
    with elm.atomic_write(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as scratch:
        for chunk in itertools.chain([first_chunk], chunks):
            scratch.write(chunk.contiguous().view(torch.uint8).numpy())
        scratch.flush()
        data = torch.from_numpy(np.memmap(scratch, np.uint8, mode="c"))
        table = data.view(first_chunk.dtype).view(-1, first_chunk.shape[1])

        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask; safetensors makes files private
        save_file({"embeddings": table}, temporary, metadata)
        with elm.where_supported():
            temporary.chmod(mode)


def write_split(data_dir: Path, split_name: str, old_table: Path, vector_ids: np.ndarray,
                rows: list[elm.Json]) -> None:
    """Write the vectors of a table at the ascending indices `vector_ids`, with its metadata, and
    rows, whose embedding_file_idx becomes the index among these. Raises: UserError."""
    vectors = elm.open_vectors(old_table)
    parts = torch.from_numpy(vector_ids).split(8192)
    table_path = elm.vectors_path(str(data_dir), split_name)
    write_table(table_path, (vectors[part] for part in parts), elm.table_metadata(old_table))

    new_ids = np.searchsorted(vector_ids, [row["embedding_file_idx"] for row in rows])
    new_rows = []
    for row, new_id in zip(rows, new_ids.tolist(), strict=True):
        new_rows.append(row | {"embedding_file_idx": new_id})
    elm.write_text(elm.rows_path(str(data_dir), split_name), elm.jsonl(new_rows))


# -----------------------------------------------------------------------------
# Embed

TEXTS_PER_BLOCK = 1024  # what a kill loses at most


class EmbedOptions(Table):
    model: PathStr = "Qwen/Qwen3-Embedding-4B"  # hub name or folder of sentence-transformers
    text_column: str = TEXT_COLUMN  # of a .parquet file
    instruction: str | None = None  # what the texts are for, as Qwen3-Embedding takes it
    max_tokens: PositiveInt | None = None  # longer texts are cut; none: what the model reads
    batch_size: PositiveInt = 32  # texts
    bf16: bool = True  # of the model
    fp16: bool = False  # of the vectors, which are fp32 else


def embed(options: EmbedOptions, texts_path: Path, out: Path) -> None:
    """Write the vectors of a file of texts as a table. Raises: OSError; UserError."""
    check_places(texts_path, out, "TEXTS")
    check_is_safetensors(out)
    num_texts = sum(1 for _ in read_texts(texts_path, options.text_column))  # a bad line first
    model = elm.load_embedder(
        options.model, options.bf16, elm.find_device(), "model", options.max_tokens)
    texts = (source.text for source in read_texts(texts_path, options.text_column))
    with resumable_work_folder(out) as work:
        write_embeddings(model, texts, num_texts, options, work, out)
    width = elm.open_vectors(out).shape[1]
    limit = model.max_seq_length
    is_limited = limit is not None and limit < 10**9  # tokenizers give more where it is unknown
    if options.max_tokens is not None and not is_limited:
        elm.log.warning(f"max_tokens = {options.max_tokens} has no effect: {options.model} has no "
                        "limit of tokens")
    cut = "no text is cut"
    if is_limited:
        cut = f"of a longer text the model reads the first {limit} tokens"
    elm.log.info(f"{num_texts} vectors of width {width}; {cut}")


def write_embeddings(model: SentenceTransformer, texts: Iterable[str], num_texts: int,
                     options: EmbedOptions, work: Path, out: Path) -> None:
    """Write the vectors of texts as a table [num_texts, width] of unit vectors. Each block of texts
    is saved in the folder `work`, by a hash of all it depends on, and taken from there by a later
    call. Raises: UserError."""
    prompt = elm.instruction_prompt(options.instruction)
    model_hash = elm.weights_hash(model)
    paths = []
    counted_texts = elm.progress(texts, "vectors", total=num_texts, unit="text")
    for block in elm.in_blocks(counted_texts, TEXTS_PER_BLOCK):
        key = elm.sha256_short(repr((options, model_hash, block)))
        path = work / f"{key}.safetensors"
        paths.append(path)
        if path.exists():
            continue
        vectors = elm.embed_texts(model, block, batch_size=options.batch_size, prompt=prompt)
        has_unit_norm = vectors.norm(dim=1) > 0.5  # also False of a NaN
        if not has_unit_norm.all():
            raise UserError(f"{options.model}: makes zero or infinite vectors; bf16=false?")
        if options.fp16:
            vectors = vectors.half()
        write_table(path, [vectors])
    metadata = {"embed": options.model_dump_json()}  # see elm.VectorOrigin
    write_table(out, (elm.open_vectors(path) for path in paths), metadata)


# -----------------------------------------------------------------------------
# Convert


class ConvertOptions(Table):
    column: str = elm.VECTOR_COLUMN  # of a .parquet file: lists of floats
    model: PathStr | None = None  # the embedder that made the vectors; none: as the table says
    instruction: str | None = None  # with which it made them
    fp16: bool = False  # of the vectors, which are fp32 else


def convert(options: ConvertOptions, table_path: Path, out: Path) -> None:
    """Write a table of another format, or of another program, as one of elm's, in the same order.
    Raises: OSError; UserError, also at a vector that is zero, NaN or infinite, or becomes so in
    fp16."""
    check_places(table_path, out, "TABLE")
    check_is_safetensors(out)
    table = elm.open_table(table_path, "TABLE", options.column)
    num_vectors, width = table.shape
    origin = elm.table_origin(table_path)
    if options.model is not None:
        origin = elm.VectorOrigin(model=options.model, instruction=options.instruction)
    elif options.instruction is not None:
        raise UserError("instruction: is the embedder's; give model=NAME, too")
    metadata = {"embed": origin.model_dump_json()} if origin.model else None

    def read_vectors() -> Iterator[Tensor]:
        with elm.progress(None, "vectors", total=num_vectors, unit="vector") as bar:
            for block in elm.read_blocks(table, range(num_vectors)):
                vectors = block.vectors.half() if options.fp16 else block.vectors
                elm.check_block(block._replace(vectors=vectors.float()), table_path)
                yield vectors
                bar.update(len(block.row_ids))

    out.parent.mkdir(parents=True, exist_ok=True)
    write_table(out, read_vectors(), metadata)
    elm.log.info(f"{num_vectors} vectors of width {width}, of {origin.model or 'no known model'}")


def check_is_safetensors(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the vectors are written as safetensors; give it this suffix")


# -----------------------------------------------------------------------------
# Filter


class FilterOptions(Table):
    tasks: TaskNames = elm.TASKS  # task types to keep: tasks=["summary"]


def filter_tasks(options: FilterOptions, data_dir: Path, out: Path) -> None:
    """A data set of some task types, whole or not at all: their rows as they are, but for the
    index, and only the vectors that these need, in the same order. Raises: UserError."""
    check_places(data_dir, out, "DIR")
    split_names = list(filter(functools.partial(has_split, data_dir), SPLITS))
    if not split_names:
        rows_path = elm.rows_path(str(data_dir), "train")
        raise UserError(f"{data_dir}: is no data set: no {rows_path} with its vectors")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        new = Path(work, "data")
        found: set[str] = set()
        for name in split_names:
            found |= filter_split(data_dir, name, options.tasks, new)
        for task in options.tasks:
            if task not in (*elm.TASKS, *found):
                raise UserError(f"tasks: no row is of the task type {task!r}"
                                f"{elm.did_you_mean(task, elm.TASKS)}")
        os.replace(new, out)


def has_split(data_dir: Path, split_name: str) -> bool:
    table_path = elm.vectors_path(str(data_dir), split_name)
    rows_path = elm.rows_path(str(data_dir), split_name)
    return table_path.exists() and rows_path.exists()


def filter_split(data_dir: Path, split_name: str, tasks: Sequence[str], out: Path) -> set[str]:
    """Returns the task types found. Raises: UserError that names a bad row, or if no row is of
    `tasks`."""
    table_path = elm.vectors_path(str(data_dir), split_name)
    num_vectors = len(elm.open_vectors(table_path))
    path = elm.rows_path(str(data_dir), split_name)
    counts: Counter[str] = Counter()
    rows = []
    found = set()
    for line in elm.read_lines(path, tasks, num_vectors):
        if elm.count_row(counts, line.row, tasks):
            found.add(line.row.task_type)
            rows.append(line.row.model_dump(exclude_unset=True))
    elm.check_any_rows(counts, path, tasks)
    vector_ids = np.unique([row["embedding_file_idx"] for row in rows])
    write_split(out, split_name, table_path, vector_ids, rows)
    elm.log.info(f"{split_name}: {len(rows)} of {counts.total()} rows, {len(vector_ids)} of "
                 f"{num_vectors} vectors")
    return found


# -----------------------------------------------------------------------------
# Synthesize
#
# A data set from texts alone: queries about each, an LLM's answers, vectors, splits.

QUERIES_FILE = Path(__file__).resolve().parent / "queries.toml"
PREAMBLE = re.compile(r"<think>|(here('s|’s| is| are)|sure|certainly|of course)\b", re.IGNORECASE)
# How chats begin in other languages, as `normalize` writes them. Only what begins no good answer:
# not 这是 or C'est, "this is".
PREAMBLES = (
    "以下是", "以下为", "以下為", "好的,", "好的!", "好的。", "当然,", "当然!", "当然可以", "當然,",
    "當然!", "當然可以", "没问题", "沒問題",
    "はい、", "もちろん", "承知", "かしこまりました", "以下は", "以下に",
    "네,", "물론", "다음은", "아래는", "알겠습니다",
    "แน่นอน", "ต่อไปนี้", "ได้เลย", "ได้ครับ", "ได้ค่ะ",
    "hier ist ", "hier sind ", "gerne,", "gerne!", "gerne.", "natürlich,", "natürlich!",
    "selbstverständlich", "klar,", "klar!",
    "hier is ", "hier zijn ", "natuurlijk,", "natuurlijk!", "zeker,", "zeker!",
    "voici ", "bien sûr", "certainement,", "certainement!", "certainement !", "d'accord,",
    "d’accord,",
    "aquí está", "aquí tien", "¡claro", "claro,", "claro!", "claro.", "claro que", "por supuesto",
    "¡por supuesto", "desde luego,", "a continuación",
    "aqui está", "aqui estão", "com certeza", "certamente,", "certamente!",
    "ecco ", "certo,", "certo!", "certo.", "naturalmente,", "naturalmente!", "va bene,",
    "конечно,", "конечно!", "конечно.", "вот ", "разумеется", "хорошо,", "звичайно,",
    "oczywiście,", "oczywiście!", "jasne,", "jasne!",
    "işte ", "tabii ki", "tabii,", "elbette",
    "إليك", "بالطبع", "بالتأكيد", "فيما يلي", "حسنًا",
    "dưới đây là", "chắc chắn rồi", "tentu,", "tentu!", "tentu saja", "berikut adalah",
    "berikut ini")  # fmt: skip
REFUSED = "refused by the server"


def count_or_all(value: Any) -> Any:
    """`all` as a number that no number of tasks exceeds. Raises: ValueError at another text."""
    if isinstance(value, str) and value != "all":
        raise ValueError(f"{value}: the number of task types of each text, or all; queries=FILE "
                         "adds or drops some")
    return sys.maxsize if value == "all" else value


def check_three(shares: Any) -> Any:
    if not isinstance(shares, list | tuple) or len(shares) != 3:
        raise ValueError(f"{shares} are not the shares of train, val and test, as "
                         "'split=[0.8, 0.1, 0.1]'")
    return shares


def check_sum(shares: tuple[float, float, float]) -> tuple[float, float, float]:
    total = sum(shares)
    if abs(total - 1) > 0.005:
        parts = np.round(np.array(shares) / total, 3).tolist()
        raise ValueError(f"the shares of train, val and test are together {total:.4g}, not 1, as "
                         f"'split={parts}'")
    return shares


NumTasks = Annotated[PositiveInt, pydantic.BeforeValidator(count_or_all)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[
    tuple[PositiveFloat, PositiveFloat, NonNegativeFloat], Field(strict=False),
    pydantic.BeforeValidator(check_three), pydantic.AfterValidator(check_sum)]


class SynthesizeOptions(Table):
    model: PathStr = "Qwen/Qwen3-4B-Instruct-2507"  # that answers: the LLM to be trained for
    embedder: PathStr = "Qwen/Qwen3-Embedding-4B"  # hub name or folder of sentence-transformers
    endpoint: ServerURL | None = None  # an OpenAI-compatible server that answers instead of this
    #   process: http://localhost:8000/v1
    served_model: str | None = None  # the server's name of the model, where it has another
    concurrency: PositiveInt = 64  # requests to the server at a time
    text_column: str = TEXT_COLUMN  # of a .parquet file
    tasks: NumTasks = 6  # task types of each text, drawn at random; or all
    queries: PathStr | None = None  # a TOML file of lines task = ["a query", …] over those of
    #   data/queries.toml: replaces or adds task types, [] drops one
    reconstruct: Share = 0.0  # of the texts also get a row of this task type: their first two
    #   sentences, which need no LLM
    split: Shares = (0.9, 0.05, 0.05)  # of the texts for train, val and test
    max_new_tokens: PositiveInt = 256  # of an answer; a longer one is rejected
    temperature: NonNegativeFloat = 0.0  # of sampling; 0: greedy
    seed: Seed = 42  # of tasks, queries and sampling
    template: elm.TemplateArguments = {}  # of the chat template: { enable_thinking = false }
    bf16: bool = True  # of the LLM and the embedder
    quantization: elm.Quantization = "off"  # of the LLM, in this process and in the train.toml
    #   that is written: nf4, int8 or a table
    fp16: bool = False  # of the vectors, which are fp32 else


@dataclass
class DraftRow:
    """A row of a data set on its way: with a response, or with the reason why it has none."""

    task_type: str
    vector_id: int
    query: str
    source: SourceText
    response: str = ""
    rejected: str = ""

    @property
    def text(self) -> str:
        return self.source.text

    def to_dict(self) -> elm.Json:
        """The row as a data set has it: its own fields, then those of its text that it lacks."""
        row = {
            "task_type": self.task_type,
            "embedding_file_idx": self.vector_id,
            "query": self.query,
            "text": self.text,
            "response": self.response}
        for key, value in self.source.model_extra.items():
            row.setdefault(key, value)
        return row


def read_queries(path: str | None) -> dict[str, list[str]]:
    """The queries of each task type, under those of the user's file. Raises: OSError; UserError."""
    queries = elm.read_toml(str(QUERIES_FILE))
    if path is not None:
        given = elm.read_toml(path, "queries")
        for task, texts in given.items():
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f'{path}: {task} = {texts!r}: not a list of queries, ["…", …]')
            for text in texts:
                elm.Prompt.split_query(text)  # refuses two placeholders
        queries |= given
    for task in list(queries):
        if not queries[task]:
            del queries[task]
    return queries


def draw_rows(source: SourceText, vector_id: int, queries: dict[str, list[str]],
              options: SynthesizeOptions) -> list[DraftRow]:
    """The rows of a text, sorted by task. All but that of RECONSTRUCT lack a response."""
    text = source.text
    rng = random.Random(f"{options.seed} {text}")
    is_reconstructed = rng.random() < options.reconstruct
    tasks = sorted(set(queries) - {RECONSTRUCT})
    drawn = rng.sample(tasks, len(tasks))[: options.tasks]
    if is_reconstructed and RECONSTRUCT in queries:
        drawn.append(RECONSTRUCT)

    rows = []
    for task in sorted(drawn):
        # The same query, however many other tasks are drawn: its answer need not be asked again.
        query = random.Random(f"{options.seed} {task} {text}").choice(queries[task])
        response = first_two_sentences(text) if task == RECONSTRUCT else ""
        rows.append(DraftRow(task, vector_id, query, source, response))
    return rows


def first_two_sentences(text: str) -> str:
    sentences = re.split(r"(?<=[.!?])\s+|(?<=[。！？])", text.strip())
    return " ".join(sentences[:2])


# Answers


def make_engine(options: SynthesizeOptions) -> elm.LLMEngine | elm.ServerEngine:
    """Raises: UserError if the LLM cannot be loaded, or the server's client is not installed."""
    if options.endpoint is None:
        return elm.LLMEngine(
            options.model, options.bf16, options.template, options.max_new_tokens,
            options.quantization)
    server = elm.ChatServer(
        options.endpoint, options.served_model or options.model, options.template,
        options.max_new_tokens)
    return elm.ServerEngine(server, options.concurrency)


def answer_rows(engine: elm.LLMEngine | elm.ServerEngine, rows: list[DraftRow],
                log: elm.AnswerLog, options: SynthesizeOptions) -> None:
    """Set the responses that rows lack, or why an answer is rejected. A rejected answer is asked
    for once more, with another seed and a temperature above 0, but not one that the server refused.
    Raises: UserError."""
    refusals = []
    pending = [row for row in rows if not row.response]
    num_asked = len(pending)
    pending.sort(key=lambda row: len(row.text), reverse=True)  # texts of a batch are alike long
    for attempt in range(2):
        temperature = options.temperature or float(attempt)
        questions = {}
        for row in pending:
            key = answer_key(engine.name, row, attempt, options)
            questions[key] = elm.Question(row.query, row.text)
        ask_missing(engine, questions, log, temperature, f"answers, try {attempt + 1}")
        for row in pending:
            answer = log[answer_key(engine.name, row, attempt, options)]
            row.rejected = rejection_reason(row, answer)
            if not row.rejected:
                row.response = answer.text.strip()
            if answer.refusal:
                refusals.append(answer.refusal)
        pending = [row for row in pending if row.rejected and row.rejected != REFUSED]
    if refusals:
        elm.log.warning(f"endpoint: the server refused {len(refusals)} of {num_asked} rows, which "
                        f"are left out; the first: {refusals[0]}")


def answer_key(engine_name: str, row: DraftRow, attempt: int, options: SynthesizeOptions) -> str:
    """A hash of all that an answer depends on."""
    model = options.served_model or options.model
    settings = (engine_name, model, options.template, options.max_new_tokens,
                options.temperature, options.seed)
    return elm.sha256_short(repr((settings, attempt, row.query, row.text)))


def ask_missing(engine: elm.LLMEngine | elm.ServerEngine, questions: dict[str, elm.Question],
                log: elm.AnswerLog, temperature: float, label: str) -> None:
    """Append the answers that the log lacks, as they come. Raises: UserError."""
    missing = [key for key in questions if key not in log]

    def ask(keys: list[str]) -> list[elm.Answer]:
        seed = int(keys[0][:7], 16)
        answers = engine.answer([questions[key] for key in keys], seed, temperature)
        log.append(dict(zip(keys, answers, strict=True)))
        return answers

    has_told = False  # of a refusal
    blocks = elm.in_blocks(missing, engine.batch_size)
    with elm.progress(None, label, total=len(missing), unit="answer") as bar:
        for answers in elm.prefetch(ask, blocks, engine.num_threads):
            bar.update(len(answers))
            refusals = [answer.refusal for answer in answers if answer.refusal]
            if refusals and not has_told:
                elm.log.warning("endpoint: the server refuses a text; its rows are left out, the "
                                f"others go on: {refusals[0]}")
                has_told = True


def rejection_reason(row: DraftRow, answer: elm.Answer) -> str:
    """Why an answer is rejected, or ""."""
    text = answer.text.strip()
    if answer.refusal:
        return REFUSED
    if not answer.finished:
        return "not finished"
    if not text:
        return "empty"
    if is_copied(text, row.text) and not row.task_type.startswith("style"):
        return "copied"
    if elm.repetition(text) > 0.3:
        return "repetitive"
    if PREAMBLE.match(text) or normalize(text).startswith(PREAMBLES):
        return "preamble"
    return ""


def is_copied(answer: str, text: str) -> bool:
    """Whether an answer has over .8 of the text's words, and little else."""
    answer_words = set(elm.split_words(strip_marks(answer)))
    text_words = set(elm.split_words(strip_marks(text)))
    num_common = len(answer_words & text_words)
    return num_common > 0.8 * len(text_words) and num_common > 0.5 * len(answer_words)


def strip_marks(text: str) -> str:
    """The text in lower case, with a space for all that is no letter, vowel sign or number."""
    kept = []
    for character in text.casefold():
        is_kept = character == "_" or unicodedata.category(character)[0] in "LMN"
        kept.append(character if is_kept else " ")
    return "".join(kept)


def check_answers(rows: list[DraftRow], splits: dict[str, str]) -> None:
    """Raises: UserError unless two texts of each split have an accepted answer. Rows of RECONSTRUCT
    do not count beside others, as they say nothing about the LLM."""
    asked = [row for row in rows if row.task_type != RECONSTRUCT] or rows
    answered_texts = set()
    rejected_for = set()
    for row in asked:
        if row.rejected:
            rejected_for.add(row.rejected)
        else:
            answered_texts.add(row.text)
    sizes = dict.fromkeys(sorted(set(splits.values())), 0)
    for text in answered_texts:
        sizes[splits[text]] += 1
    if min(sizes.values()) < 2:
        reasons = ", ".join(sorted(rejected_for))
        raise UserError(f"model: {name_sizes(sizes)} have accepted answers; each split needs two; "
                        f"rejected: {reasons or 'none'}; answers so far are kept: give the command "
                        "again with more texts, other shares, as split=[0.7, 0.15, 0.15], or more "
                        "max_new_tokens")


# The data set


def synthesize(options: SynthesizeOptions, texts_path: Path, out: Path) -> None:
    """A data set at `out`, whole or not at all: queries about the texts of a file, the LLM's
    answers, and vectors. Raises: OSError; UserError."""
    check_places(texts_path, out, "TEXTS")
    elm.check_model_name(options.embedder, "embedder")
    if options.endpoint is None:
        elm.check_model_name(options.model, "model")
        elm.check_quantization(options.model, "model", options.quantization)
    queries = read_queries(options.queries)
    sources = list(read_texts(texts_path, options.text_column))
    unique = drop_copies(sources)
    splits = assign_splits(sources, unique, options.split)
    check_shares(splits, texts_path)
    texts = []  # in the order of their vectors
    rows = []
    for vector_id, source in enumerate(unique):
        texts.append(source.text)
        rows += draw_rows(source, vector_id, queries, options)

    with resumable_work_folder(out) as work:
        # Before the answers: it takes minutes, not hours, and frees the memory for the LLM.
        table_path = work / "vectors.safetensors"
        embed_all(texts, options, work, table_path)
        answer_rows(make_engine(options), rows, elm.AnswerLog(work / "answers.jsonl"), options)
        elm.log.info(count_table(rows, splits))
        check_answers(rows, splits)
        rows = [row for row in rows if not row.rejected]

        new = work / "data"
        shutil.rmtree(new, ignore_errors=True)  # of a command that was killed
        write_splits(rows, texts, splits, table_path, new)
        toml = train_toml(rows, options, out)
        elm.write_text(new / "train.toml", toml)
        os.replace(new, out)
    print_samples(rows)
    elm.log.info(f"\n{out}/train.toml:\n{toml}")
    program = "deepspeed" if torch.cuda.device_count() > 1 else "python"
    elm.log.info(f"next: {program} elm.py {shlex.quote(f'{out}/train.toml')}")


def embed_all(texts: list[str], options: SynthesizeOptions, work: Path, out: Path) -> None:
    """Write the vectors of texts. The embedder is freed again. Raises: UserError."""
    embed_options = EmbedOptions(
        model=options.embedder, bf16=options.bf16, fp16=options.fp16)
    model = elm.load_embedder(options.embedder, options.bf16, elm.find_device(), "embedder")
    write_embeddings(model, texts, len(texts), embed_options, work, out)
    del model
    elm.free_memory()


def count_table(rows: list[DraftRow], splits: dict[str, str]) -> str:
    """How many rows there are of each task, by their split or by why they are rejected."""
    pd = elm.import_optional("pandas")
    tasks = pd.Series([row.task_type for row in rows], name="rows")
    outcomes = pd.Series([row.rejected or splits[row.text] for row in rows], name="")
    return pd.crosstab(tasks, outcomes).to_string()


def write_splits(rows: list[DraftRow], texts: list[str], splits: dict[str, str], table_path: Path,
                 out: Path) -> None:
    """Write each split with the vectors of all its texts, of a table [number of texts, E]. Raises:
    UserError."""
    split_names = np.array([splits[text] for text in texts])
    for name in np.unique(split_names).tolist():
        rows_of_split = [row.to_dict() for row in rows if splits[row.text] == name]
        write_split(out, name, table_path, np.flatnonzero(split_names == name), rows_of_split)


def train_toml(rows: list[DraftRow], options: SynthesizeOptions, out: Path) -> str:
    """Settings for training on the data set that is to be at `out`."""
    run_folder = Path("runs", out.name)
    if run_folder.resolve() == out.resolve():
        run_folder = out / "run"
    settings = {
        "model.llm": options.model,
        "model.bf16": options.bf16,
        "model.quantization": options.quantization,
        "model.tokens": 4,
        "model.template": options.template,
        "data.dir": str(out),
        "data.tasks": sorted({row.task_type for row in rows}),
        "train.lr": 1e-3,
        "eval.max_new_tokens": options.max_new_tokens,
        "eval.bertscore_model": elm.OFF,
        "output.dir": str(run_folder)}
    lines = []
    for key, value in settings.items():
        line = f"{key} = {elm.toml_value(value)}"
        if key == "eval.bertscore_model":
            line += "  # none: the default, of 3 GB; or a model's name, or a folder"
        lines.append(f"{line}\n")
    return "".join(lines)


def print_samples(rows: list[DraftRow]) -> None:
    """Print three rows."""
    stride = max(1, len(rows) // 3)
    for row in rows[::stride][:3]:
        elm.log.info(f"\n{row.task_type}: {row.query}\n{row.text}\n    {row.response}")


# -----------------------------------------------------------------------------
# Command line


def load_options(
    settings: list[str], options_class: type[elm.ConfigClass]
) -> elm.ConfigClass:
    """Raises: UserError, also if a launcher has started several processes: none of these commands
    shares its work out."""
    elm.check_launched_alone("start one by python")
    return elm.load_config(None, settings, options_class)


def run_synthesize(args: argparse.Namespace) -> None:
    options = load_options(args.settings, SynthesizeOptions)
    synthesize(options, Path(args.texts), Path(args.out))


def run_embed(args: argparse.Namespace) -> None:
    options = load_options(args.settings, EmbedOptions)
    embed(options, Path(args.texts), Path(args.out))


def run_convert(args: argparse.Namespace) -> None:
    options = load_options(args.settings, ConvertOptions)
    convert(options, Path(args.table), Path(args.out))


def run_filter(args: argparse.Namespace) -> None:
    options = load_options(args.settings, FilterOptions)
    filter_tasks(options, Path(args.data), Path(args.out))


AFTER_STOP = "the same command goes on from what is done"

COMMANDS = (
    elm.Command(
        name="synthesize", operands={"texts": "TEXTS", "out": "OUT"},
        config_class=SynthesizeOptions, run=run_synthesize,
        summary="a data set from texts: queries, an LLM's answers, vectors, splits",
        example="python data/prepare.py synthesize texts.jsonl data/mine",
        less_memory="max_new_tokens = 128, or a server (endpoint=URL)", after_stop=AFTER_STOP),
    elm.Command(
        name="embed", operands={"texts": "TEXTS", "out": "OUT"}, config_class=EmbedOptions,
        run=run_embed, summary="a table of the vectors of texts",
        example="python data/prepare.py embed texts.jsonl out.safetensors",
        less_memory="batch_size = 8, or max_tokens = 512", after_stop=AFTER_STOP),
    elm.Command(
        name="convert", operands={"table": "TABLE", "out": "OUT"}, config_class=ConvertOptions,
        run=run_convert, summary="a table of vectors from a Parquet, NumPy or safetensors file",
        example="python data/prepare.py convert x.parquet "
                "data/mine/embeddings/train_embeddings.safetensors model=NAME",
        less_memory="fp16=true"),
    elm.Command(
        name="filter", operands={"data": "DIR", "out": "OUT"}, config_class=FilterOptions,
        run=run_filter, summary="a data set of only some task types",
        example="python data/prepare.py filter data/tiny data/few 'tasks=[\"summary\"]'",
        less_memory="fewer tasks"))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; 2 after an error that the user can correct."""
    given = sys.argv[1:] if arguments is None else arguments
    return elm.run_command(elm.make_parser("prepare.py", __doc__, COMMANDS), given, COMMANDS)


if __name__ == "__main__":
    elm.run(main)
