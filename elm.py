"""elm: teach a frozen language model to read text embeddings.

An adapter, a small MLP, maps a text embedding into the token-embedding space of a language model
that stays frozen. There it stands in for one token of the prompt, and the model answers about a
text that it sees only as a vector. The adapter is all that is trained.

    deepspeed elm.py train.toml                       train, on every GPU there is (or the CPU)
    deepspeed elm.py train.toml train.resume=auto     go on where a stopped run was last saved
    python elm.py train.toml train.lr=2e-4            in one process, with an override
    python elm.py eval train.toml adapter=PATH output.dir=NEW           a report on any adapter
    python elm.py generate adapter=PATH embeddings=FILE query="…"       answers about vectors
    python elm.py embed texts.jsonl out.safetensors   vectors of texts
    python elm.py filter train.toml OUT 'data.tasks=["summary"]'        a data set of some tasks
    python elm.py sweep sweep.toml                    Optuna; again or elsewhere, one more worker

As a module it needs torch, transformers and safetensors; the others are imported where used.
Shapes: n examples, N rows of a split, T packed tokens, R response tokens, E embedding width, D
width of the LLM's token embeddings, K soft tokens per embedding. A step is one update of the
optimizer, a micro-batch one forward and backward pass.
"""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import gc
import hashlib
import importlib
import io
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

class UserError(ValueError):
    """A mistake its reader can mend: each line says what, where and what to do. Exit code 2."""

# -----------------------------------------------------------------------------
# Config: one frozen dataclass per TOML table; None is not set

TASKS = ("keywords", "category", "questions", "summary", "describe", "explain_beginner",
         "explain_expert", "related_topics", "characteristics_pos", "characteristics_neg",
         "style_academic", "style_casual", "counterfactual")
REMOVED_TASKS = ("compare", "hypothetical")  # pair tasks of older data sets: skipped and counted
table = dataclass(frozen=True, kw_only=True)
@table
class ModelConfig:
    llm: str = "Qwen/Qwen3-4B-Instruct-2507"  # hub name or folder
    hidden_dim: Annotated[int, "[1, inf)"] = 4096  # width of the adapter
    tokens: Annotated[int, "[1, inf)"] = 1  # soft tokens per embedding
    dropout: Annotated[float, "[0, 1)"] = 0.0
    residual_scale: Annotated[float, "[0, inf)"] = 1.0
    standardize: bool = True  # the vectors, by the mean and deviation of the training split's
    bf16: bool = True  # the LLM; the adapter and its optimizer stay fp32
    grad_checkpoint: bool | Literal["auto"] = "auto"
@table
class DataConfig:
    dir: str = "data"
    tasks: tuple[str, ...] = TASKS
    max_seq_length: Annotated[int, "[1, inf)"] = 2048  # tokens of prompt and response
    num_workers: Annotated[int, "[0, inf)"] = 4  # threads that read ahead
@table
class TrainConfig:
    batch_size: Annotated[int, "[1, inf)"] = 16  # a step has this * grad_accum * processes rows
    grad_accum: Annotated[int, "[1, inf)"] = 2
    epochs: Annotated[int, "[1, inf)"] = 3
    max_steps: Annotated[int, "[1, inf)"] | None = None  # overrides epochs
    lr: Annotated[float, "(0, inf)"] = 1e-4
    warmup_steps: Annotated[int, "[0, inf)"] = 1000
    weight_decay: Annotated[float, "[0, inf)"] = 0.01
    max_grad_norm: Annotated[float, "(0, inf)"] = 1.0
    eval_steps: Annotated[int, "[1, inf)"] = 500
    save_steps: Annotated[int, "[1, inf)"] = 1000
    logging_steps: Annotated[int, "[1, inf)"] = 50
    seed: Annotated[int, "[0, 4294967295]"] = 42
    resume: str | None = None  # a checkpoint, or "auto": the newest in output.dir
@table
class LossConfig:
    drift_weight: Annotated[float, "[0, inf)"] = 0.0
    drift_target: Annotated[float, "[-1, 1]"] = 1.0
    distill_weight: Annotated[float, "[0, inf)"] = 0.0
@table
class EvalConfig:
    samples: Annotated[int, "[0, inf)"] = 100  # rows that are generated; losses use the whole split
    max_new_tokens: Annotated[int, "[1, inf)"] = 256
    embedder: str | None = None
    split: Literal["train", "val", "test"] | None = None  # of the report; None: test, else val
    bertscore_model: str = "microsoft/deberta-xlarge-mnli"
    bertscore_layers: Annotated[int, "[1, inf)"] | None = None
@table
class DeepSpeedConfig:
    zero_stage: Annotated[int, "[0, 3]"] = 0
    extra: dict = field(default_factory=dict)  # the table's other keys, as DeepSpeed wants them
@table
class WandbConfig:
    enabled: bool = False
    project: str = "elm-training"
    run_name: str | None = None
@table
class OutputConfig:
    dir: str = "data/checkpoints"
    log_file: str | None = None
@table
class Config:
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    eval: EvalConfig = EvalConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    wandb: WandbConfig = WandbConfig()
    output: OutputConfig = OutputConfig()

SECTIONS = {f.name: type(f.default) for f in dataclasses.fields(Config)}
OWNED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
         "gradient_clipping", "optimizer", "scheduler", "bf16", "fp16", "activation_checkpointing")
ZERO = ["zero_stage", "zero_optimization"]

def fits(value: Any, hint: Any) -> bool:  # an integer serves as a float, a bool does not
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        low, high = (float(x) for x in args[1][1:-1].split(","))
        open_ends = [low] * (args[1][0] == "(") + [high] * (args[1][-1] == ")")
        return fits(value, args[0]) and low <= value <= high and value not in open_ends
    if origin in (Union, UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint and "\0" not in str(value)  # which no path may have

def describe(annotation: str) -> str:  # as "float in (0, inf)", "bool or 'auto'"
    text = re.sub(r"Annotated\[(\w+), '(.*?)'\]", r"\1 in \2", annotation.replace(" | None", ""))
    text = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1, [ ] quoted from the shell", text)
    text = text.replace("bool", "true or false")
    return re.sub(r"Literal\[(.*?)\]", r"\1", text).replace(" | ", " or ")

def nearest(name: str, names: Any) -> str:
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else f"; known are {', '.join(names)}"

def check_table(kind: type, entries: dict, name: str = "") -> tuple[dict, list[str]]:
    """(values for the dataclass `kind`, mistakes, each of which begins with its dotted key). A key
    that it does not have goes into its `extra`, if it has that."""
    hints, values, errors = get_type_hints(kind, include_extras=True), {}, []
    known = [name + key for key in hints if key != "extra"]
    for key, value in entries.items():
        if name + key in known and not fits(value, hints[key]):
            wanted = describe(kind.__annotations__[key])
            errors.append(f"{name}{key} = {value!r}: must be {wanted}")
        elif name + key in known:
            values[key] = tuple(value) if isinstance(value, list) else value
        elif "extra" in hints:
            values.setdefault("extra", {})[key] = value
        else:
            errors.append(f"{name}{key}: unknown key{nearest(name + key, known)}")
    for f in dataclasses.fields(kind):
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in entries:
            errors.append(f"{name}{f.name}: is missing")
    return values, errors

def build_config(tables: dict, source: str = "config", overridden: tuple[str, ...] = ()) -> Config:
    """Nested dicts as a Config. Raises: UserError with one line for each mistake, all at once, that
    names `source` unless the key is in `overridden`."""
    errors, values = [], {}
    for name, entries in tables.items():
        if name not in SECTIONS or not isinstance(entries, dict):
            like = "" if name in SECTIONS else nearest(name, SECTIONS)
            errors.append(f"{name}: is not a table of section.key=value{like}")
            continue
        values[name], wrong = check_table(SECTIONS[name], entries, f"{name}.")
        errors += wrong
    for key, value in values.get("deepspeed", {}).get("extra", {}).items():
        if key in OWNED or key in ZERO and (type(value) is not dict or "stage" in value):
            errors.append(f"deepspeed.{key}: elm computes it, from [train], [model] and zero_stage")
        elif key not in ZERO and difflib.get_close_matches(key, ZERO, 1, 0.8):
            errors.append(f"deepspeed.{key}: unknown key{nearest(key, ZERO)}")
    tasks = values.get("data", {}).get("tasks", TASKS)
    errors += [f"data.tasks: unknown task {t!r}{nearest(t, TASKS)}" for t in tasks or [""]
               if t not in TASKS]
    if values.get("loss", {}).get("distill_weight"):
        errors.append("loss.distill_weight: not built yet, set it to 0.0")
    if errors:
        def place(key: str) -> str:
            return "override" if any(f"{o}.".startswith(f"{key}.") for o in overridden) else source
        raise UserError("\n".join(f"{place(re.split('[ :]', e)[0])}: {e}" for e in errors))
    return Config(**{name: SECTIONS[name](**v) for name, v in values.items()})

def read_override(text: str) -> tuple[str, Any]:
    """`name=value` as (name, value), the value as TOML has it; a bare word is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text}: an override has the form section.key=value")
    try:
        return name.strip(), tomllib.loads(f"x = {value}")["x"]
    except (ValueError, RecursionError):
        return name.strip(), value.strip()

def read_toml(path: str | None, over: dict[str, Any]) -> dict[str, dict]:
    """The tables of a TOML file (none: empty ones) under values by dotted name."""
    try:
        tables = tomllib.loads(Path(path).read_bytes().decode()) if path else {}
    except (ValueError, RecursionError) as e:  # of TOML, of UTF-8, of nesting
        raise UserError(f"{path}: not valid TOML: {e}") from None
    for name, value in over.items():
        *parents, key = name.split(".")
        place = tables
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"{name}: {parent} is not a table")
        place[key] = value
    return tables

def load_config(path: str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config of a TOML file (none: the defaults) under `section.key=value` overrides, whose
    values are TOML; a bare word is a string. Raises: UserError with one line for each mistake."""
    over = dict(map(read_override, overrides))
    return build_config(read_toml(path, over), path or "config", tuple(over))

def read_options(kind: type, arguments: list[str]) -> Any:
    """`key=value` arguments as the dataclass `kind`. Raises: UserError, all mistakes at once."""
    values, errors = check_table(kind, dict(map(read_override, arguments)))
    if errors:
        raise UserError("\n".join(errors))
    return kind(**values)

def to_tables(cfg: Config) -> dict[str, dict]:  # the inverse of build_config
    tables = dataclasses.asdict(cfg)
    tables["deepspeed"] |= tables["deepspeed"].pop("extra")
    return {n: {k: list(v) if isinstance(v, tuple) else v for k, v in t.items() if v is not None}
            for n, t in tables.items()}

def flat(tables: dict, name: str = "") -> dict[str, Any]:
    """Nested tables by dotted name; a range stays whole."""
    out = {}
    for key, value in tables.items():
        nested = isinstance(value, dict) and not {"low", "high"} & set(value)
        out |= flat(value, f"{name}{key}.") if nested else {name + key: value}
    return out

def to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_toml(k)} = {to_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

# -----------------------------------------------------------------------------
# Runtime: processes, device, messages, files

class Runtime(NamedTuple):  # this process among all of the run
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    log_file: str | None = None
    quiet: bool = False
    held: Any = None  # the lock of output.dir

    def say(self, message: str) -> None:
        """Print on process 0, above the progress bar, and append to the log file."""
        if self.rank == 0:
            if not self.quiet:
                tqdm.write(message)
                sys.stdout.flush()
            if self.log_file:
                with writing(self.log_file), open(self.log_file, "a", encoding="utf-8") as f:
                    f.write(f"{time.strftime('%F %T')} {message}\n")

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over all processes, in place; they wait for each other."""
        if self.world > 1:
            torch.distributed.all_reduce(x)
        return x

    def free_memory(self) -> float:
        """Bytes left on the GPU of the process that has fewest; infinite without GPUs."""
        free = torch.zeros(self.world, dtype=torch.float64)
        free[self.rank] = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else math.inf
        return self.sum(free).min().item()

def need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise UserError(f"{name} is not installed: pip install {name}") from None

def start_runtime(cfg: Config) -> Runtime:
    """Join the processes that the `deepspeed` launcher started, or be one process alone."""
    cuda = torch.cuda.is_available()
    if cuda and cfg.model.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"model.bf16: not on {torch.cuda.get_device_name()}, set model.bf16=false")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed, dist = need("deepspeed"), torch.distributed
    if not dist.is_initialized():
        # DeepSpeed would compile its shared-memory op for CPUs at first use: a minute, a C++
        # compiler, and a lock that hangs every later run if the build is killed. gloo is enough.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                **({} if "RANK" in os.environ else alone))
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    if not cuda and world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return Runtime(rank, world, device, cfg.output.log_file)

@contextmanager
def writing(path: str | Path):
    """Raises: UserError that names `path` where the disk is full or refuses."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(f"{path}: cannot be written: {why}; what was there is unharmed") from None

@contextmanager
def whole_file(path: Path, tag: str = ""):
    """A temporary path that becomes `path`, whole and on disk, or not at all. Raises: UserError."""
    temporary = path.with_name(f".{path.name}{tag}.tmp")
    with writing(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # of this user's umask; safetensors makes files private
            yield temporary
            with open(temporary, "rb+") as f:
                os.fchmod(f.fileno(), mode)
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

def lock(path: Path, wait: bool = False) -> Any:
    """`path`, opened to append and kept from other processes until it is closed, or this process
    ends. Raises: UserError if one has it, unless to `wait` is wanted."""
    file = open(path, "ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        if not wait:
            raise UserError(f"{path}: another process is at it") from None
        print(f"{path}: waits for another process")
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError:  # a file system that has no locks
        pass
    return file

def check_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")

def check_new(*paths: Path) -> None:
    """Raises: UserError if one exists or could not be made, before anything is computed."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already; choose another place")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: its folder is not there, or cannot be written to")

def write_text(path: Path, text: str, tag: str = "") -> None:
    with whole_file(path, tag) as temporary:
        temporary.write_text(text, encoding="utf-8")

def read_ahead(make: Any, keys: Any, threads: int):
    """make(key) for each key, in order, 2 * threads of them ahead of the one that is asked for."""
    keys = iter(keys)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting = deque(pool.submit(make, k) for k in islice(keys, 2 * threads + 1))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(make, k) for k in islice(keys, 1))

# -----------------------------------------------------------------------------
# Data: rows of text beside a table of vectors, both read through memory maps

MICRO_TOKENS = dict(cpu=1024, cuda=8192)  # of a micro-batch; with gradient see plan_memory
CHUNK_LOGITS = dict(cpu=2**24, cuda=2**25)  # numbers that exist at once
PREFIX_TOKENS = 4096  # of a split whose keys and values are kept for the run (0.6 GB at 4B)
SLOT = "<EMB>"  # where the vector goes in a query; without it, on a line of its own before it
BY_VECTOR, BY_TEXT = 0, 1  # the two forms of a row
ROW = np.dtype([  # of the token cache; start and length: where the two forms lie in ids
    ("line", "i8"), ("byte", "i8"), ("vector", "i8"), ("start", "i8", 2), ("length", "i4", 2),
    ("slot", "i4"), ("response", "i4"), ("task", "i2")])

def check_query(query: str) -> str:
    if query.count(SLOT) > 1:
        raise UserError(f"{query!r}: a query has one {SLOT} at most")
    return query

class Prompt(NamedTuple):  # the LLM's chat template around one user turn
    tokenizer: Any
    head: str
    tail: str

    @staticmethod
    def of(tokenizer: Any) -> Prompt:
        """Without a chat template a plain one: the user's turn, a line break. Raises: UserError."""
        if tokenizer.eos_token_id is None:
            raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token")
        if not tokenizer.chat_template:
            return Prompt(tokenizer, "", "\n")
        chat = [{"role": "user", "content": SLOT}]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            head, tail = text.split(SLOT)
        except Exception as e:  # jinja's, of a template that refuses, repeats or changes the turn
            raise UserError(f"{tokenizer.name_or_path}: its chat template fails: {e}") from None
        return Prompt(tokenizer, head, tail)

    def parts(self, query: str) -> list[str]:
        """[before, after] the place of the vector. Raises: UserError if there are several."""
        before, slot, after = check_query(query).strip().partition(SLOT)
        return [self.head + before * bool(slot), (after if slot else f"\n{before}") + self.tail]

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

def open_vectors(path: Path) -> Tensor:
    """The one table [N, E] (fp32, fp16, bf16) of a safetensors file, mapped. Raises: UserError."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as f:
            tensors = [f.get_tensor(k) for k in f.keys()]
    except SafetensorError as e:
        raise UserError(f"{path}: not a whole safetensors file: {e}") from None
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if [t.ndim * (t.numel() > 0) for t in tensors] != [2] or tensors[0].dtype not in floats:
        found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors[:3])
        raise UserError(f"{path}: holds {found or 'nothing'}, not one table "
                        "[N, E] in fp32, fp16 or bf16")
    return tensors[0]

def table_head(shape: tuple[int, int], dtype: torch.dtype, **about: str) -> bytes:
    """What stands before the rows of a table in its safetensors file, so that it can be written row
    by row. https://huggingface.co/docs/safetensors/#format"""
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    entry = dict(dtype=name, shape=shape, data_offsets=[0, math.prod(shape) * dtype.itemsize])
    head = json.dumps({"__metadata__": about, "embeddings": entry}).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head

def row_bytes(rows: Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()

def unusable(rows: Tensor) -> Tensor:
    """[n, E] -> [n] bool: which rows are zero, or have a NaN or infinite number."""
    return ~(rows.isfinite().all(1) & rows.any(1))

def vector_statistics(vectors: Tensor, used: Tensor, path: Path) -> dict[str, Tensor]:
    """Mean and deviation [E] fp32 of the rows that are `used`, [N] bool: what no row of the split
    speaks about does not count. Raises: UserError at any NaN, infinite or zero row."""
    total = torch.zeros(2, vectors.shape[1], dtype=torch.float64)
    for start in range(0, len(vectors), 8192):
        rows = vectors[start : start + 8192].double()
        if len(bad := unusable(rows).nonzero()):
            i = start + int(bad[0])
            raise UserError(f"{path}: vector {i} is zero, NaN or infinite; embed its text again")
        rows = rows[used[start : start + 8192]]
        total += torch.stack([rows.sum(0), rows.square().sum(0)])
    mean, square = total / max(1, int(used.sum()))
    return {"mean": mean.float(), "std": (square - mean.square()).clamp(min=0).sqrt().float()}

def parse_row(line: bytes, num_vectors: int) -> dict:
    """One line of a JSONL file as a checked row. Raises: ValueError that says what is wrong."""
    try:
        row = json.loads(line.decode().strip())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"broken JSON: {e}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    fields = dict(task_type=str, embedding_file_idx=int, query=str, response=str, text=str)
    for key, kind in fields.items():
        if key not in row and key != "text":
            raise ValueError(f"field {key!r} is missing")
        if type(row.get(key, kind())) is not kind:
            raise ValueError(f"field {key!r} is {row[key]!r}, not of type {kind.__name__}")
        if row["task_type"] in REMOVED_TASKS:
            return row  # whatever its other fields
        str(row.get(key)).encode()  # a lone surrogate is a ValueError here
    if row["task_type"] not in TASKS:
        task = row["task_type"]
        raise ValueError(f"unknown task_type {task!r}{nearest(task, TASKS)}")
    if not 0 <= row["embedding_file_idx"] < num_vectors:
        raise ValueError(f"embedding_file_idx {row['embedding_file_idx']} of {num_vectors} vectors")
    check_query(row["query"])
    if not row["response"].strip():
        raise ValueError("field 'response' is empty")
    return row

def read_rows(path: Path, tasks: tuple[str, ...], num_vectors: int, counts: dict):
    """(line, byte, row) of each row of `tasks`; counts the others. Raises: UserError at a line."""
    byte = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = parse_row(line, num_vectors) if line.strip() else None
            except ValueError as e:
                raise UserError(f"{path}:{number}: {e}") from None
            if row and row["task_type"] in tasks:
                yield number, byte, row
            elif row:
                counts["pair_tasks" if row["task_type"] in REMOVED_TASKS else "other_tasks"] += 1
            byte += len(line)

def build_cache(folder: Path, path: Path, num_vectors: int, prompt: Prompt, data: DataConfig,
                soft: int) -> dict[str, Any]:
    """Tokenise a JSONL file, by chunks, into folder/{rows,ids}.bin; returns counts and, if they are
    few, all that stands before a vector. By vector a row is [before, 0 * soft, after, response,
    end]; by text, that stands for the zeros."""
    counts = dict(rows=0, pair_tasks=0, other_tasks=0, responses_cut=0, texts_cut=0)
    rows, start, prefixes = read_rows(path, data.tasks, num_vectors, counts), 0, {}
    with open(folder / "rows.bin", "wb") as rows_file, open(folder / "ids.bin", "wb") as ids_file:
        while chunk := list(islice(rows, 1024)):
            texts = [(*prompt.parts(r["query"]), r.get("text", ""), r["response"])
                     for _, _, r in chunk]
            tokens, records, ids = iter(prompt.ids([s for four in texts for s in four])), [], []
            for line, byte, row in chunk:
                before, after, text, response = islice(tokens, 4)
                room = data.max_seq_length - len(before) - len(after) - soft
                if room < 1:
                    raise UserError(f"{path}:{line}: the prompt takes all of data.max_seq_length = "
                                    f"{data.max_seq_length} tokens, lacking {1 - room}; raise it")
                whole = response + [prompt.tokenizer.eos_token_id]
                response, text_room = whole[:room], room + soft - min(room, len(whole))
                counts["responses_cut"] += len(whole) > room
                counts["texts_cut"] += len(text) > text_room
                forms = [before + [0] * soft + after + response,
                         before + text[:text_room] + after + response if text else []]
                lengths = [len(f) for f in forms]
                if len(prefixes) <= PREFIX_TOKENS:
                    prefixes.setdefault(tuple(before))
                records.append((line, byte, row["embedding_file_idx"], (start, start + lengths[0]),
                                lengths, len(before), len(response), TASKS.index(row["task_type"])))
                ids += forms[0] + forms[1]
                start += sum(lengths)
            counts["rows"] += len(chunk)
            with writing(folder):
                rows_file.write(np.array(records, ROW).tobytes())
                ids_file.write(np.array(ids, np.int32).tobytes())
        with writing(folder):
            for file in (rows_file, ids_file):
                file.flush()
                os.fsync(file.fileno())
    if not counts["rows"]:
        raise UserError(f"{path}: no row of data.tasks = {list(data.tasks)}")
    few = max(len(prefixes), sum(map(len, prefixes))) <= PREFIX_TOKENS
    return dict(counts=counts, prefixes=sorted(prefixes) if few else None)

def cache_digest(cache: Path, meta: dict) -> str:  # by which a damaged one is known
    about = json.dumps([meta, (cache / "ids.bin").stat().st_size]).encode()
    digest = hashlib.sha256(np.memmap(cache / "rows.bin", np.uint8, "r"))
    digest.update(about)
    return digest.hexdigest()

class Split(NamedTuple):  # of a data set, opened
    path: Path  # of its rows
    rows: np.ndarray  # [N] of ROW, memory-mapped
    ids: np.ndarray  # token ids, int32, memory-mapped
    vectors: Tensor  # [number of vectors, E], memory-mapped
    statistics: dict[str, Tensor]  # mean and std [E] of the vectors
    counts: dict[str, int]
    soft: int  # K
    prefixes: tuple[tuple[int, ...], ...] | None = None  # all ids ahead of vectors; None: too many
    reuse: bool = True  # read the prefixes apart from the rows, and keep what was read

    def identity(self) -> dict[str, Any]:
        """Width and norm (the root of its mean square) of the vectors that rows are about."""
        square = self.statistics["mean"].square() + self.statistics["std"].square()
        return dict(d_emb=self.vectors.shape[1], norm=square.sum().sqrt().item())

    def raw(self, i: int) -> dict:
        """Row i as it stands in the file."""
        with open(self.path, "rb") as f:
            f.seek(int(self.rows["byte"][i]))
            return json.loads(f.readline())

def split_paths(data: DataConfig, split: str) -> list[Path]:  # of the vectors, of the rows
    return [Path(data.dir, "embeddings", f"{split}_embeddings.safetensors"),
            Path(data.dir, "synthesis", f"{split}_synthesis.jsonl")]

def open_split(data: DataConfig, split: str, prompt: Prompt, soft: int, rt: Runtime) -> Split:
    """Open a split; process 0 checks and tokenises it first, unless data.dir/.cache has that under
    a hash of all that it depends on. Raises: UserError."""
    paths, error, tok = split_paths(data, split), None, prompt.tokenizer
    vectors = open_vectors(paths[0])
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    words = tok.backend_tokenizer.to_str() if tok.is_fast else sorted(tok.get_vocab().items())
    made_from = (files, words, tok.eos_token_id, prompt[1:], soft, data.tasks, data.max_seq_length)
    key = hashlib.sha256(repr((5, ROW, made_from)).encode()).hexdigest()[:16]  # 5: of the format
    cache = Path(data.dir, ".cache", f"{split}-{key}")
    if rt.rank == 0 and cache.exists():
        try:
            meta = json.loads((cache / "meta.json").read_text())
            whole = meta.pop("sha256") == cache_digest(cache, meta)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            whole = False
        if not whole:
            rt.say(f"{cache}: damaged; it is made again")
            shutil.rmtree(cache)
    if rt.rank == 0 and not cache.exists():
        work = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
        work.mkdir(parents=True, exist_ok=True)
        try:
            meta = build_cache(work, paths[1], len(vectors), prompt, data, soft)
            used = np.zeros(len(vectors), bool)
            used[np.memmap(work / "rows.bin", ROW, "r")["vector"]] = True
            statistics = vector_statistics(vectors, torch.from_numpy(used), paths[0])
            meta |= {k: v.tolist() for k, v in statistics.items()}
            meta["sha256"] = cache_digest(work, meta)
            write_text(work / "meta.json", json.dumps(meta))
            os.replace(work, cache)
        except (UserError, OSError) as e:  # kept, so that all processes leave; or another run won
            error = None if cache.exists() else e
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if rt.sum(torch.tensor(float(error is not None), device=rt.device)).item():
        raise error or UserError(f"{paths[1]}: refused by process 0")
    meta = json.loads((cache / "meta.json").read_text())
    rows, ids = np.memmap(cache / "rows.bin", ROW, "r"), np.memmap(cache / "ids.bin", np.int32, "r")
    statistics = {k: torch.tensor(meta[k]) for k in ("mean", "std")}
    prefixes = meta["prefixes"] and tuple(map(tuple, meta["prefixes"]))
    return Split(paths[1], rows, ids, vectors, statistics, meta["counts"], soft, prefixes)

def filter_tasks(data: DataConfig, folder: Path) -> None:
    """A data set of data.tasks alone at `folder`, whole or not at all: their rows as they are, but
    for the index, and only the vectors that these need, in the same order. Raises: UserError."""
    check_new(folder)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    splits = [s for s in ("train", "val", "test") if all(p.exists() for p in split_paths(data, s))]
    if not splits:
        raise UserError(f"data.dir: no {split_paths(data, 'train')[1]} with its vectors")
    try:
        for split in splits:
            source, target = split_paths(data, split), split_paths(DataConfig(dir=str(work)), split)
            vectors, counts = open_vectors(source[0]), dict(rows=0, pair_tasks=0, other_tasks=0)
            used = np.zeros(len(vectors), bool)
            for *_, row in read_rows(source[1], data.tasks, len(vectors), dict(counts)):
                used[row["embedding_file_idx"]] = True
            place, kept = np.cumsum(used) - 1, torch.from_numpy(np.flatnonzero(used))
            if not len(kept):
                raise UserError(f"{source[1]}: no row of data.tasks = {list(data.tasks)}")
            for path in target:
                path.parent.mkdir(parents=True, exist_ok=True)
            with writing(folder), open(target[0], "wb") as f:
                f.write(table_head((len(kept), vectors.shape[1]), vectors.dtype))
                f.writelines(row_bytes(vectors[chunk]) for chunk in kept.split(8192))
            with writing(folder), open(target[1], "w", encoding="utf-8") as f:
                for *_, row in read_rows(source[1], data.tasks, len(vectors), counts):
                    row["embedding_file_idx"] = int(place[row["embedding_file_idx"]])
                    f.write(json.dumps(row) + "\n")
                    counts["rows"] += 1
            print(f"{split}: {counts['rows']} of {sum(counts.values())} rows, {len(kept)} of "
                  f"{len(vectors)} vectors")
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)

def shuffled_vectors(split: Split) -> np.ndarray:
    """[N] for each row a vector that is not its own, the same for rows of one vector."""
    used, where = np.unique(split.rows["vector"], return_inverse=True)
    order = np.random.default_rng(0).permutation(len(used))
    other = np.empty_like(used)
    other[order] = used[np.roll(order, 1)]
    return other[where]

def cut(lengths: np.ndarray, bins: int, budget: int) -> list[list[int]]:
    """Examples of `lengths` tokens, longest first into the emptiest, in the fewest micro-batches, a
    multiple of `bins`, of which none of several examples exceeds `budget`. Some may be []."""
    per_bin = max(1, math.ceil(int(lengths.sum()) / (bins * budget)))
    while True:
        load, micros = np.zeros(per_bin * bins, np.int64), [[] for _ in range(per_bin * bins)]
        for i in np.argsort(-lengths, kind="stable"):
            micros[load.argmin()].append(int(i))
            load[load.argmin()] += lengths[i]
        if all(len(m) < 2 or total <= budget for m, total in zip(micros, load, strict=True)):
            return [sorted(m) for m in micros]
        per_bin += 1

def pack(split: Split, rows: Any, form: int = BY_VECTOR, vectors: np.ndarray | None = None) -> dict:
    """One micro-batch without padding: n rows end to end, each without its prefix, the tokens ahead
    of its vector, if split.reuse: these are read apart, once. int64 where nothing else is said:
        ids, positions [T]; lengths, n ints; owner [R], the example of each response token;
        targets [R], the places in ids that predict them; labels [R], which they are
        by vector slots [n * K], the places of the soft tokens, and embeddings [n, E] fp32, of
        `vectors[row]` if given
        prefixes, to be read together, and whether to keep them; key_lengths, n ints: with prefix
        ends [2, n + 1] int32: of the examples among the tokens of the rows, and among the keys
        own_keys [T], which of the keys are the rows' own; prefix_keys, for each key which token
        in prefixes it is (any, for the rows' own)"""
    r = split.rows[rows]
    key_lengths, responses, skip = r["length"][:, form], r["response"], r["slot"] * split.reuse
    lengths, starts = key_lengths - skip, r["start"][:, form] + skip
    ends = np.cumsum([np.r_[0, lengths], np.r_[0, key_lengths]], axis=1)
    before = [tuple(split.ids[a - n : a].tolist()) for a, n in zip(starts, skip, strict=True)]
    prefixes = dict.fromkeys(before) if split.prefixes is None else split.prefixes
    prefixes = tuple(ids for ids in prefixes if ids) if split.reuse else ()
    begin = dict(zip(prefixes, np.cumsum([0, *map(len, prefixes)]).tolist(), strict=False))
    begin = np.array([begin[ids] if ids else 0 for ids in before])
    def spans(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
    batch = dict(ids=split.ids[spans(starts, starts + lengths)], positions=spans(skip, key_lengths),
                 owner=np.repeat(np.arange(len(r)), responses),
                 targets=spans(ends[0, 1:] - responses, ends[0, 1:]) - 1,
                 own_keys=spans(ends[1, 1:] - lengths, ends[1, 1:]),
                 prefix_keys=np.zeros(ends[1, -1]))
    batch["prefix_keys"][spans(ends[1, :-1], ends[1, :-1] + skip)] = spans(begin, begin + skip)
    if form == BY_VECTOR:
        slots = ends[0, :-1] + r["slot"] - skip
        batch["slots"] = (slots[:, None] + np.arange(split.soft)).ravel()
        batch["embeddings"] = r["vector"] if vectors is None else vectors[rows]
    batch = {k: torch.from_numpy(v.astype(np.int64)) for k, v in batch.items()}
    batch |= dict(labels=batch["ids"][batch["targets"] + 1], ends=torch.from_numpy(ends).int())
    if form == BY_VECTOR:
        batch["embeddings"] = split.vectors[batch["embeddings"]].float()
    if torch.cuda.is_available():  # so that the copy to the device does not wait
        batch = {k: v.pin_memory() for k, v in batch.items()}
    return batch | dict(lengths=lengths.tolist(), key_lengths=key_lengths.tolist(),
                        prefixes=prefixes, keep=split.prefixes is not None)

def step_rows(num_rows: int, seed: int, size: int, epoch: int, position: int):
    """Endless (epoch, position after it, rows) of the steps from `position` rows into `epoch` on,
    which depend on nothing but these numbers."""
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        for start in range(position, num_rows, size):
            yield epoch, min(start + size, num_rows), order[start : start + size]
        epoch, position = epoch + 1, 0

def plan_step(split: Split, budget: int, rt: Runtime, step: tuple[int, int, np.ndarray]):
    """A step of step_rows with its response tokens over all processes, and this one's micro-batches
    [(weight, batch)]. Without a row it repeats one with weight 0: ZeRO-3 wants all in step."""
    rows = step[2]
    micros = cut(split.rows["length"][rows, BY_VECTOR], rt.world, budget)[rt.rank :: rt.world]
    batches = [(float(bool(m)), pack(split, rows[m or [0]])) for m in micros]
    return *step, int(split.rows["response"][rows].sum()), batches

# -----------------------------------------------------------------------------
# Model: the adapter, and the frozen LLM with the vector spliced in

IDENTITY = dict(  # what an adapter belongs to
    d_emb="the vectors' width", norm="the vectors' norm", hidden_dim="model.hidden_dim",
    tokens="model.tokens", d_llm="the LLM's width", llm="the hash of the LLM's weights",
    revision="the LLM's revision")

class Adapter(nn.Module):
    """norm(W2 gelu(W1 x + b1) + b2 + residual), x the standardised embedding: [n, E] -> [n, K, D].
    The residual, times residual_scale, is x itself where E = D and else a linear map of it without
    bias. The norm is an RMSNorm times `scale`, the root mean square of the LLM's token embeddings,
    so that a fresh adapter speaks at their volume. mean, std and scale are saved, not trained."""

    def __init__(self, d_emb: int, hidden_dim: int, d_llm: int, tokens: int = 1,
                 dropout: float = 0.0, residual_scale: float = 1.0, scale: float = 1.0):
        super().__init__()
        self.settings = dict(d_emb=d_emb, hidden_dim=hidden_dim, d_llm=d_llm, tokens=tokens,
                             dropout=dropout, residual_scale=residual_scale)
        self.fc1 = nn.Linear(d_emb, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, tokens * d_llm)
        self.residual = nn.Identity() if d_emb == d_llm else nn.Linear(d_emb, d_llm, bias=False)
        self.norm = nn.RMSNorm(d_llm, eps=1e-6)
        self.register_buffer("mean", torch.zeros(d_emb))
        self.register_buffer("std", torch.ones(d_emb))
        self.register_buffer("scale", torch.tensor(scale))

    def standardize(self, embeddings: Tensor) -> Tensor:
        return (embeddings.float() - self.mean) / self.std.clamp(min=1e-6)

    def forward(self, embeddings: Tensor) -> Tensor:
        x = self.standardize(embeddings)
        hidden = F.dropout(F.gelu(self.fc1(x)), self.settings["dropout"], self.training)
        out = self.fc2(hidden).unflatten(-1, (self.settings["tokens"], -1))
        residual = self.settings["residual_scale"] * self.residual(x)[..., None, :]
        return self.norm(out + residual) * self.scale

    @staticmethod
    def digest(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        digest = hashlib.sha256(json.dumps(metadata).encode())
        for name, t in sorted(tensors.items()):
            digest.update(f"{name} {t.dtype} {t.shape}".encode() + row_bytes(t.flatten()))
        return digest.hexdigest()

    def save(self, path: str | Path, state: dict | None = None, **metadata: Any) -> None:
        """Write the adapter (or a `state` of it) as fp32 safetensors, with what rebuilds it and a
        checksum of all this. Raises: UserError if the disk is full."""
        tensors = {k: v.detach().float().cpu() for k, v in (state or self.state_dict()).items()}
        metadata = {"adapter": self.settings} | metadata
        metadata["sha256"] = self.digest(metadata, tensors)
        with whole_file(Path(path)) as temporary:  # of several entries it would keep no order
            save_file(tensors, temporary, {"elm": json.dumps(metadata)})

    @staticmethod
    def load(path: str | Path) -> tuple[Adapter, dict[str, Any]]:
        """The adapter of a file, in eval mode on the CPU, and its metadata. Raises: UserError."""
        check_file(path)
        try:
            with safe_open(path, framework="pt") as f:
                metadata = json.loads((f.metadata() or {}).get("elm", "{}"))
                state = {k: f.get_tensor(k) for k in f.keys()}
            if metadata.pop("sha256", None) != Adapter.digest(metadata, state):
                raise ValueError("its checksum is another")
            adapter = Adapter(**metadata["adapter"])
            adapter.load_state_dict(state)
        except Exception as e:  # damaged files lead anywhere
            raise UserError(f"{path}: not a whole elm adapter: {e}") from None
        return adapter.eval(), metadata

def check_identity(trained: dict[str, Any], now: dict[str, Any], place: Any) -> None:
    """Raises: UserError that names the first of `now` that was not so in training. The norm of the
    vectors may differ by half; another revision of the same weights is only told."""
    for key, value in now.items():
        if key not in trained:
            raise UserError(f"{place}: the adapter does not say what it was trained with")
        was = trained[key]
        same = was / 1.5 < value < was * 1.5 if key == "norm" else was == value
        told = "{}: {} was {} in training and is {} here".format(place, IDENTITY[key], *(
            f"{x:.4g}" if isinstance(x, float) else x for x in (was, value)))
        if not same and key != "revision":
            raise UserError(f"{told}; give it what it was trained with")
        if not same and was and value and os.environ.get("RANK", "0") == "0":
            tqdm.write(f"elm: {told}, with the same weights", sys.stderr)

def check_vectors(vectors: Tensor, adapter: Adapter, place: Any = "vectors") -> None:
    if vectors.ndim != 2 or vectors.shape[1] != adapter.settings["d_emb"]:
        raise UserError(f"{place}: {list(vectors.shape)}, but the adapter reads "
                        f"[n, {adapter.settings['d_emb']}]")

class Layout(NamedTuple):  # of a packed row, for packed_attention; the first five are of `pack`
    lengths: list[int]
    key_lengths: list[int]
    ends: Tensor
    own_keys: Tensor | None = None
    prefix_keys: Tensor | None = None
    kept: dict | None = None  # by layer, keys and values of the prefixes
    record: dict | None = None  # where to put them, if this row is the prefixes

def packed_attention(module, query, key, value, attention_mask, scaling=None, layout=None,
                     sliding_window=None, softcap=None, **_):
    """Causal attention within each example of a packed row: [1, heads, T, d] -> [1, T, heads, d].
    By torch.split: the backward pass of a slice would allocate zeros of the whole row."""
    if layout.record is not None:
        layout.record[module.layer_idx] = key, value
    if layout.kept is not None:
        kept = zip(layout.kept[module.layer_idx], (key, value), strict=True)
        key, value = (old.index_select(2, layout.prefix_keys).index_copy(2, layout.own_keys, x)
                      for old, x in kept)
    groups, d = query.shape[1] // key.shape[1], query.shape[-1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    if query.is_cuda and query.dtype.itemsize == 2 and d % 8 == 0 and d <= 256 and not softcap:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = max(layout.lengths), max(layout.key_lengths)
        return varlen_attn(q, k, v, *layout.ends, *longest, scale=scaling,
                           window_size=((sliding_window or 0) - 1, 0))[None], None
    outs = []
    for q, k, v in zip(query.split(layout.lengths, 2), key.split(layout.key_lengths, 2),
                       value.split(layout.key_lengths, 2), strict=True):
        t, before = k.shape[2], k.shape[2] - q.shape[2]
        window = sliding_window or t
        if t <= window and not softcap:  # as many queries as keys: is_causal counts from the first
            q = F.pad(q, (0, 0, before, 0)) if before else q
            out = F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=True)
            outs.append(out[:, :, before:])
            continue
        seen = torch.ones(t, t, dtype=torch.bool, device=q.device).tril().triu(1 - window)[before:]
        scores = q.float() @ k.float().mT * (d**-0.5 if scaling is None else scaling)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        outs.append(scores.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype) @ v)
    return torch.cat(outs, dim=2).transpose(1, 2), None

# transformers makes no mask for a name that it has no mask function for, so no O(T^2) one either.
AttentionInterface.register("elm_packed", packed_attention)

class HeadLoss(torch.autograd.Function):
    """Cross-entropy [R] fp32 of head(hidden) [R, V] at labels [R], hidden [R, D], in `chunks` parts
    with their gradient made at once, so that no more logits than a part's ever exist."""

    @staticmethod
    def forward(ctx, hidden, labels, head, chunks):
        losses, gradients, labels = [], [], labels[:, None].tensor_split(chunks)
        for h, y in zip(hidden.tensor_split(chunks), labels, strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                h = h.detach().requires_grad_(ctx.needs_input_grad[0])
                logits = head(h)
            p = logits.detach().float().log_softmax(-1)
            losses.append(-p.gather(1, y)[:, 0])
            if ctx.needs_input_grad[0]:
                p.exp_().scatter_add_(1, y, p.new_full(y.shape, -1.0))
                gradients += torch.autograd.grad(logits, h, p.to(logits.dtype))
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient):
        (of_hidden,) = ctx.saved_tensors
        return (gradient[:, None] * of_hidden).to(of_hidden.dtype), None, None, None

class Probe(NamedTuple):  # from what the LLM says to what it was told: the space that both share
    matrix: Tensor  # [D, E]
    center: Tensor  # [D], mean of the states
    mean: Tensor | float = 0.0  # [E], of the vectors

    def drift(self, states: Tensor, embeddings: Tensor, target: float) -> Tensor:
        """max(0, target - cosine) of states [n, D] seen by the probe and embeddings [n, E]: [n]."""
        seen = (states - self.center) @ self.matrix
        return F.relu(target - F.cosine_similarity(seen, embeddings - self.mean, dim=1))

@contextmanager
def swapped(owner: Any, name: str, value: Any):
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)

def packed(llm: Any) -> Any:
    return swapped(llm.config, "_attn_implementation", "elm_packed")

@contextmanager
def loading(name: str, place: str):
    """Raises: UserError naming `place`, the config key, for what goes wrong within."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{place}: no folder {name}, nor is that the name of a model on the hub")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # of transformers, jinja, safetensors, torch.load, ...
        raise UserError(f"{place}: cannot load {name}: {' '.join(str(e).split())[:300]}") from None

@contextmanager
def quietly():
    """Without transformers' table of the weights that a headless model leaves out."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

def load_pretrained(auto: Any, name: str, place: str, **options: Any) -> Any:
    with loading(name, place):
        return auto.from_pretrained(name, trust_remote_code=False, **options)

def load_llm(name: str, device: torch.device, bf16: bool, place: str = "model.llm") -> Any:
    dtype = torch.bfloat16 if bf16 else torch.float32
    llm = load_pretrained(AutoModelForCausalLM, name, place, dtype=dtype)
    return llm.to(device).eval().requires_grad_(False)

@torch.no_grad()
def fingerprint(llm: Any) -> str:
    """A hash over 16 to 31 numbers spread over every parameter, in bf16, so that it is the same for
    any dtype. Under ZeRO 3 every process must call it."""
    sample = []
    for p in llm.parameters():
        with need("deepspeed").zero.GatheredParameters(p) if hasattr(p, "ds_id") else nullcontext():
            sample.append(p.flatten()[:: max(1, p.numel() // 16)].bfloat16().float())  # no view
    return hashlib.sha256(torch.cat(sample).cpu().numpy().tobytes()).hexdigest()[:16]

def llm_identity(llm: Any) -> dict[str, Any]:
    snapshot = Path(cached_file(llm.name_or_path, "config.json", local_files_only=True)).parent
    revision = snapshot.name if snapshot.parent.name == "snapshots" else None
    return dict(llm=fingerprint(llm), revision=revision)

@torch.no_grad()
def embedding_scale(llm: Any) -> tuple[int, float]:
    """Width and root mean square of the token embeddings."""
    embed = llm.get_input_embeddings()
    ids = torch.linspace(0, embed.num_embeddings - 1, 4096, device=embed.weight.device).long()
    rows = embed(ids).float()
    return rows.shape[1], rows.square().mean().sqrt().item()

class ELM(nn.Module):
    """A frozen LLM and the adapter that lets it read vectors."""

    def __init__(self, llm: Any, adapter: Adapter, prompt: Prompt):
        super().__init__()
        self.llm, self.adapter, self.prompt = llm, adapter, prompt
        self.kept: dict = {}  # what `read` keeps
        self.in_step = False  # whether all processes must run the same modules as often
        llm.train = lambda mode=True: llm  # frozen: it stays in eval mode, without dropout

    @staticmethod
    def load(path: str | Path, llm: str | None = None, bf16: bool | None = None) -> ELM:
        """With the LLM that the file names, or the same one at `llm`. Raises: UserError if that is
        not the LLM it was trained for."""
        adapter, metadata = Adapter.load(path)
        if "llm" not in metadata:
            raise UserError(f"{path}: does not say which LLM it was trained for")
        wanted, device = metadata["llm"], "cuda" if torch.cuda.is_available() else "cpu"
        name, bf16 = llm or wanted["name"], wanted["bf16"] if bf16 is None else bf16
        prompt = Prompt.of(load_pretrained(AutoTokenizer, name, "llm"))
        model = load_llm(name, torch.device(device), bf16, "llm")
        check_identity(metadata.get("identity", {}), llm_identity(model), f"{path}: {name}")
        return ELM(model, adapter.to(device), prompt).eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """[n, E] -> soft tokens [n, K, D] fp32: what is trained, and all that DeepSpeed runs."""
        return self.adapter(embeddings.to(self.adapter.scale.device, non_blocking=True))

    def body(self, embeds: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """The LLM without its head: input embeddings [T, D] of a packed row -> [T, D]."""
        with packed(self.llm):  # with a cache, transformers would not see that the row is packed
            out = self.llm.base_model(inputs_embeds=embeds[None], position_ids=positions[None],
                                      layout=layout, use_cache=False)
        self.output = type(out)
        return out.last_hidden_state[0]

    def head(self, hidden: Tensor) -> Tensor:
        """[R, D] -> logits [R, V] as this LLM makes them, with its caps and scales: its own forward
        pass, in which a body that has been run stands in for the body."""
        body = self.llm.base_model
        body.forward = lambda *_, **__: self.output(last_hidden_state=hidden[None])
        try:
            return self.llm(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del body.forward

    @torch.no_grad()
    def read(self, prefixes: tuple[tuple[int, ...], ...], keep: bool) -> dict:
        """By layer, (keys, values) of prefixes, as token ids, packed. Nothing trained comes before
        them, so those of a split are kept; and always read together, so that not a bit depends on
        what was read earlier."""
        if prefixes in self.kept:
            return self.kept[prefixes]
        record, sizes, device = {}, [len(p) for p in prefixes], self.adapter.scale.device
        ids, places = torch.tensor(sum(prefixes, ())), [torch.arange(n) for n in sizes]
        ends = torch.tensor([0, *sizes]).cumsum(0).int().expand(2, -1)
        self.body(self.llm.get_input_embeddings()(ids.to(device)), torch.cat(places).to(device),
                  Layout(sizes, sizes, ends.to(device), record=record))
        self.kept |= {prefixes: record} if keep else {}
        return record

    def states(self, batch: dict, soft: Tensor | None = None) -> tuple[Tensor, dict]:
        """What `pack` makes, and soft tokens [n, K, D] unless it is by text -> the last hidden
        states [T, D] of the LLM, and what is left of the batch, on the device."""
        device = self.adapter.scale.device
        batch = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
                 for k, v in batch.items() if k != "embeddings"}
        layout = Layout(*(batch[k] for k in Layout._fields[:5]),
                        self.read(batch["prefixes"], batch["keep"]) if batch["prefixes"] else None)
        with torch.no_grad():
            embeds = self.llm.get_input_embeddings()(batch["ids"])
        if soft is not None:  # out of place: any id stands there, and its embedding is replaced
            embeds = embeds.index_copy(0, batch["slots"], soft.flatten(0, 1).to(embeds.dtype))
        return self.body(embeds, batch["positions"], layout), batch

    def nll(self, states: Tensor, batch: dict) -> Tensor:
        """What `states` makes -> each response's summed token cross-entropy [n] fp32."""
        hidden = states.index_select(0, batch["targets"])
        numbers = len(hidden) * self.llm.config.get_text_config().vocab_size
        chunks = torch.tensor(math.ceil(numbers / CHUNK_LOGITS[hidden.device.type]))
        if self.in_step:  # ZeRO 3 gathers the head for each chunk: as often on every process
            torch.distributed.all_reduce(chunks, torch.distributed.ReduceOp.MAX)
        losses = HeadLoss.apply(hidden, batch["labels"], self.head, int(chunks))
        return losses.new_zeros(len(batch["lengths"])).index_add(0, batch["owner"], losses)

    def losses(self, batch: dict, soft: Tensor | None = None) -> Tensor:
        return self.nll(*self.states(batch, soft))

    @torch.no_grad()
    def prompt_embeds(self, embedding: Tensor, query: str) -> Tensor:
        """[E] -> [T, D] in the LLM's dtype: the prompt with the vector in its place."""
        check_vectors(embedding[None], self.adapter)
        if unusable(embedding[None]).any():
            raise UserError("vectors: one is zero, NaN or infinite; embed its text again")
        embed, device = self.llm.get_input_embeddings(), self.adapter.scale.device
        before, after = (embed(torch.tensor(ids, dtype=torch.long, device=device))
                         for ids in self.prompt.ids(self.prompt.parts(query)))
        return torch.cat([before, self.adapter(embedding.to(device)).to(before.dtype), after])

    @torch.no_grad()
    def generate(self, embeddings: Tensor, query: str | list[str], max_new_tokens: int = 256,
                 batch_size: int = 16, **options: Any) -> list[str]:
        """[n, E] and one query, or n of them -> n answers; greedy, unless `options` of the LLM's
        own `generate` say otherwise. Raises: UserError if the vectors are of another width, or are
        not as many as the queries."""
        check_vectors(embeddings, self.adapter)
        queries = [query] * len(embeddings) if isinstance(query, str) else query
        if len(queries) != len(embeddings):
            raise UserError(f"{len(queries)} queries for {len(embeddings)} vectors")
        end, answers, training = self.prompt.tokenizer.eos_token_id, [], self.training
        options = dict(eos_token_id=end, pad_token_id=end, do_sample=False) | options
        # Greedy is greedy whatever the LLM's generation_config.json says; sampling is as that says.
        config = self.llm.generation_config if options["do_sample"] else GenerationConfig()
        self.eval()
        with swapped(self.llm, "generation_config", config):
            for i in range(0, len(embeddings), batch_size):
                some = zip(embeddings[i : i + batch_size], queries[i : i + batch_size], strict=True)
                prompts = [self.prompt_embeds(e, q) for e, q in some]
                mask = [torch.ones_like(p[:, 0], dtype=torch.long) for p in prompts]
                left = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
                out = self.llm.generate(inputs_embeds=left(prompts), attention_mask=left(mask),
                                        max_new_tokens=max_new_tokens, **options)
                answers += self.prompt.tokenizer.batch_decode(out, skip_special_tokens=True)
        self.train(training)
        return answers

def plan_memory(llm: Any, setting: bool | str, free: float = math.inf) -> tuple[int, int]:
    """(tokens of a training micro-batch, layers to recompute). On a GPU with `free` bytes left, as
    many tokens as fit without recomputation, 2048 to 8192, and "auto" recomputes for what does not
    fit. Autograd keeps about 10 D + 4 F numbers a token and layer, F the feed-forward width."""
    c = llm.config.get_text_config()
    layers = c.num_hidden_layers
    if math.isinf(free):  # not a GPU: there small micro-batches are as fast
        return MICRO_TOKENS["cpu"], layers * (setting is True)
    width = 10 * c.hidden_size + 4 * getattr(c, "intermediate_size", 4 * c.hidden_size)
    fit = 0.8 * free / (width * llm.dtype.itemsize)  # tokens times layers
    tokens = int(min(8192, max(2048, fit / layers)))
    if setting == "auto":
        setting = max(0.0, 1 - fit / layers / tokens)
    return tokens, math.ceil(layers * setting)

def recompute_layers(llm: Any, count: int) -> None:
    """Recompute the last `count` layers in the backward pass instead of keeping their activations.
    By hand: the layers' own switch needs train mode, in which they would drop out."""
    layers = [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:  # of an LLM that has been trained through before
        layer.__dict__.pop("forward", None)
    for layer in layers[len(layers) - count :]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                context_fn=lambda: (nullcontext(), packed(llm)))

# -----------------------------------------------------------------------------
# Embedding: vectors of texts

@table
class EmbedOptions:
    model: str = "Qwen/Qwen3-Embedding-4B"  # hub name or folder of an encoder or a decoder
    pooling: Literal["last", "mean", "cls"] | None = None  # None: last for decoders, else mean
    instruction: str | None = None  # what the texts are for, as Qwen3-Embedding takes it
    max_tokens: Annotated[int, "[1, inf)"] | None = None  # None: what the model takes
    bf16: bool = True

def reach(model: Any, tok: Any) -> int:
    """How many tokens a model reads. RoBERTa's kind begins to count after the padding token."""
    most = getattr(model.config, "max_position_embeddings", None) or 512
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            most = part.num_embeddings - part.padding_idx - 1
    return min(most, tok.model_max_length)

def check_embedder(name: str, place: str) -> Any:
    config = load_pretrained(AutoConfig, name, place)
    if config.is_encoder_decoder or config.model_type == "t5":
        raise UserError(f"{place}: {name} is neither an encoder nor a decoder")
    return config

class Embedder(NamedTuple):
    model: Any
    tokenizer: Any
    pooling: str
    limit: int  # tokens
    prefix: str

    @staticmethod
    def load(o: EmbedOptions, place: str, device: Any) -> Embedder:
        config = check_embedder(o.model, place)
        tok = load_pretrained(AutoTokenizer, o.model, place)
        dtype = torch.bfloat16 if o.bf16 else torch.float32
        with quietly():
            model = load_pretrained(AutoModel, o.model, place, dtype=dtype).to(device).eval()
        encoder = (config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
                   or getattr(config, "use_bidirectional_attention", False))
        limit = min(reach(model, tok), o.max_tokens or math.inf)
        if limit <= tok.num_special_tokens_to_add():
            raise UserError(f"max_tokens = {limit}: {o.model} needs that many beside the text")
        return Embedder(model, tok, o.pooling or ("mean" if encoder else "last"), limit,
                        f"Instruct: {o.instruction}\nQuery:" if o.instruction else "")

    @torch.no_grad()
    def embed(self, texts: list[str]) -> tuple[Tensor, int]:
        """n texts -> (unit vectors [n, width] fp32 on the CPU, how many texts were cut). As in
        https://huggingface.co/Qwen/Qwen3-Embedding-4B, by batches of similar lengths."""
        texts, device = [self.prefix + t for t in texts], self.model.device
        ids = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        long = [i for i, x in enumerate(ids) if len(x) > self.limit]
        for i in long:  # once more, so that the end token stays
            ids[i] = self.tokenizer(texts[i], truncation=True, max_length=self.limit)["input_ids"]
        order = deque(sorted(range(len(ids)), key=lambda i: -len(ids[i])))
        out = torch.empty(len(texts), self.model.config.hidden_size)
        while order:
            size = max(1, 4 * MICRO_TOKENS[device.type] // len(ids[order[0]]))
            rows = [order.popleft() for _ in range(min(size, len(order)))]
            batch = [torch.tensor(ids[i], device=device) for i in rows]
            lengths = torch.tensor([len(x) for x in batch], device=device)
            batch = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            mask = torch.arange(batch.shape[1], device=device) < lengths[:, None]
            states = self.model(batch, attention_mask=mask.long()).last_hidden_state.float()
            if self.pooling == "mean":
                pooled = (states * mask[..., None]).sum(1) / lengths[:, None]
            else:
                place = (lengths - 1) * (self.pooling == "last")
                pooled = states[torch.arange(len(rows), device=device), place]
            out[rows] = F.normalize(pooled, dim=1).cpu()
        return out, len(long)

def read_texts(path: Path):
    """The texts of a file of lines, or of a .jsonl of objects with `text`; the line of a text less
    one is its row in the table of vectors. Raises: UserError naming the line."""
    number = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode().rstrip("\r\n")
                if text.strip() and path.suffix == ".jsonl":
                    text = json.loads(text)["text"]
                text.encode()  # a lone surrogate is a ValueError
            except UnicodeError:
                raise UserError(f"{path}:{number}: not UTF-8") from None
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise UserError(f'{path}:{number}: not of the form {{"text": "…"}}') from None
            if not text.strip():
                raise UserError(f"{path}:{number}: the text is empty")
            yield text
    if not number:
        raise UserError(f"{path}: is empty")

def embed_file(o: EmbedOptions, texts: Path, out: Path, block: int = 1024) -> None:
    """Embed a file of texts into safetensors [N, width] fp32. The file grows by blocks under a name
    that says what it is made from, so that the same command goes on after a kill."""
    check_new(out)
    check_file(texts)
    num, stat = sum(1 for _ in read_texts(texts)), texts.stat()
    embedder = Embedder.load(o, "model", "cuda" if torch.cuda.is_available() else "cpu")
    width, files = embedder.model.config.hidden_size, sorted(Path(o.model).glob("*"))
    about = dataclasses.asdict(o) | dict(pooling=embedder.pooling)
    head = table_head((num, width), torch.float32, **{k: str(v) for k, v in about.items()})
    made_from = repr((str(texts.resolve()), stat.st_size, stat.st_mtime_ns, head, block,
                      [(p.name, p.stat().st_mtime_ns) for p in files]))
    key, cuts = hashlib.sha256(made_from.encode()).hexdigest()[:12], 0
    growing = out.with_name(f".{out.name}.{key}.tmp")
    with writing(out), lock(growing) as f:
        check_new(out)  # or has just ended
        done = max(0, f.tell() - len(head)) // (4 * width * block) * block
        f.truncate(len(head) + 4 * width * done if done else 0)
        f.write(b"" if done else head)
        bar = tqdm(total=num, initial=done, unit="text")
        rest = islice(read_texts(texts), done, None)
        while some := list(islice(rest, block)):
            vectors, cut_short = embedder.embed(some)
            if not vectors.isfinite().all():
                raise UserError(f"model: {o.model} makes vectors that are not finite; bf16=false?")
            f.write(row_bytes(vectors))
            f.flush()
            os.fsync(f.fileno())
            bar.update(len(some))
            cuts += cut_short
        os.replace(growing, out)
    bar.close()
    print(f"{out}: {num} vectors of width {width}, {embedder.pooling} pooling; {cuts} texts cut to "
          f"{embedder.limit} tokens" + f", of the last {num - done}" * bool(done))

# -----------------------------------------------------------------------------
# Optimization: the schedule, AdamW inside DeepSpeed, and its state as plain tensors

def lr_at(step: int, total: int, cfg: TrainConfig) -> float:
    """The rate of update `step`, from 0: linear warm-up to cfg.lr, then linear decay to 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    return cfg.lr * max(0, total - step) / max(1, total - cfg.warmup_steps)

def start_engine(cfg: Config, elm: ELM) -> Any:
    """The DeepSpeed engine around `elm`, with AdamW for the adapter alone, at rate 0 as yet. The
    loop cuts batches, so its batch size stays 1; its bf16 stays off, as it rounds the adapter."""
    # One group: with several, DeepSpeed 0.19.8 links the moments of the first one only (ZeRO 1, 2).
    optimizer = torch.optim.AdamW(elm.adapter.parameters(), lr=0.0, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=cfg.train.weight_decay, fused=True)
    stage = cfg.deepspeed.zero_stage
    zero = {**cfg.deepspeed.extra.get("zero_optimization", {}), "stage": stage}
    config = {"timers": {"throughput": {"enabled": False}},  # they wait for the device
              **cfg.deepspeed.extra, "train_micro_batch_size_per_gpu": 1, "zero_optimization": zero,
              "gradient_clipping": cfg.train.max_grad_norm * bool(stage),  # at 0 by take_step
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine = need("deepspeed").initialize(model=elm, optimizer=optimizer, config=config)[0]
    engine.adam = optimizer  # under ZeRO, of this process's share of the adapter
    return engine

def take_step(engine: Any, lr: float, max_norm: float) -> Any:
    """Update the adapter at rate `lr`; returns the norm of its gradient before clipping."""
    for group in engine.adam.param_groups:
        group["lr"] = lr
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return engine.get_global_grad_norm()
    norm = nn.utils.clip_grad_norm_(engine.module.adapter.parameters(), max_norm)
    engine.step()  # whose own clipping would wait for the device
    return norm

def gather_state(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(adapter, Adam's moments and step), whole, fp32, on the CPU. Every process must call it."""
    from deepspeed import utils as ds
    adam, adapter = engine.adam.state, engine.module.adapter
    sharded = engine.zero_optimization_stage() > 0
    step = max((int(s["step"]) for s in adam.values()), default=0)
    weights, moments = dict(adapter.named_buffers()), {"step": torch.tensor(float(step))}
    for name, p in adapter.named_parameters():
        weights[name] = ds.safe_get_full_fp32_param(p) if sharded else p
        for key in ("exp_avg", "exp_avg_sq") if step else ():
            moment = ds.safe_get_full_optimizer_state(p, key) if sharded else adam[p][key]
            moments[f"{name}.{key}"] = moment
    return tuple({k: v.detach().float().cpu().clone() for k, v in state.items()}
                 for state in (weights, moments))

def restore_moments(engine: Any, moments: dict[str, Tensor]) -> None:
    """Give a fresh engine the moments and step of gather_state; its weights must have been in the
    adapter when it started. AdamW makes its moments, and ZeRO their shares, at the first update:
    one without a gradient, at the fresh engine's rate of 0, goes before and changes no weight."""
    from deepspeed import utils as ds
    adam, adapter = engine.adam, engine.module.adapter
    rows = torch.zeros(1, adapter.settings["d_emb"], device=engine.device)
    engine.backward(engine(rows).sum() * 0.0)
    engine.step()
    for name, p in adapter.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            moment = moments[f"{name}.{key}"].to(engine.device)
            if engine.zero_optimization_stage() > 0:
                ds.safe_set_full_optimizer_state(p, moment, key)
            else:
                adam.state[p][key].copy_(moment)
    for state in adam.state.values():
        state["step"].copy_(moments["step"])

# -----------------------------------------------------------------------------
# Checkpoint: one portable file with the whole state, for any processes and any ZeRO stage

@dataclass
class TrainState:  # what the loop carries on, beside the adapter and its optimizer
    step: int = 0  # updates done
    epoch: int = 0
    position: int = 0  # rows of the epoch that are done
    best: float = math.inf  # lowest validation loss, of the adapter below
    best_step: int = 0
    best_adapter: dict[str, Tensor] | None = None
    nll_sum: float = 0.0  # since the last logging step, as the next three
    drift_sum: float = 0.0
    num_labels: int = 0
    num_rows: int = 0
    wandb_id: str | None = None

def load_checkpoint(path: Path) -> dict:
    """Runs no code from the file. Raises: UserError if it is not a whole checkpoint."""
    check_file(path)
    try:
        data = memoryview(path.read_bytes())  # torch.load itself looks at no checksum
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError("its checksum is another")
        saved = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        state = TrainState(**saved["state"])
        parts = saved["adapter"], state.best_adapter, saved["optimizer"]
        sizes, best, moments = ({k: v.shape for k, v in part.items() if k != "step"}
                                for part in parts)
        if (best != sizes or any(v != sizes[k.rpartition(".")[0]] for k, v in moments.items())
                or None in (saved["identity"], saved["config"], saved["rows"]) or state.step < 0):
            raise ValueError("its parts do not fit together")
        return saved | {"state": state}
    except Exception as e:  # torch.load has no error of its own for a file that is not whole
        why = (str(e) if type(e) is ValueError else repr(e)).splitlines()[0][:200]
        raise UserError(f"train.resume: {path}: no whole checkpoint: {why}") from None

def by_step(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    numbers = ((p.stem.rpartition("_")[2], p) for p in folder.glob(pattern))
    return sorted((int(n), p) for n, p in numbers if n.isdecimal())

def find_checkpoint(cfg: Config, rt: Runtime) -> dict | None:
    """The checkpoint that train.resume names; "auto": the whole one of the most steps, if any.
    Raises: UserError, also if the folder holds another run."""
    folder, resume, found = Path(cfg.output.dir), cfg.train.resume, []
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output.dir: {folder} is not a folder")
    steps = [p for _, p in by_step(folder, "checkpoint_step_*.pt")]
    if resume != "auto":
        other = resume is None or Path(resume).resolve().parent != folder.resolve()
        if other and (steps or (folder / "metrics.jsonl").exists()):
            raise UserError(f"output.dir: {folder} holds a run already; go on with it by "
                            "train.resume=auto, or choose another folder")
        if resume is None:
            return None
        saved = load_checkpoint(Path(resume))
        last = max([n for n, _ in by_step(folder, "adapter_step_*.safetensors")], default=0)
        if last > saved["state"].step:
            raise UserError(f"output.dir: {folder} has gone on to step {last}; go on from there by "
                            f"train.resume=auto, or from {resume} in another folder")
        return saved
    there = [p for p in (folder / "checkpoint_final.pt", *steps[::-1]) if p.exists()]
    for path in there:
        try:
            found.append(load_checkpoint(path))
        except UserError as e:
            rt.say(f"passed over: {e}")
        if found and path in steps:
            break
    newest = max(found, key=lambda saved: saved["state"].step, default=None)
    seen = torch.zeros(rt.world, device=rt.device)
    seen[rt.rank] = newest["state"].step if newest else -1
    if len(set(rt.sum(seen).tolist())) > 1:
        raise UserError(f"train.resume: the processes find checkpoints of other steps in {folder}: "
                        f"{seen.tolist()}; do all hosts see the same files?")
    if there and not found:
        raise UserError(f"train.resume: no checkpoint in {folder} is whole; choose another folder")
    if not found:
        rt.say(f"train.resume: {folder} holds no checkpoint; this is a new run")
    return newest

def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl but for one that a killed run did not end; none if it is not
    there. Raises: UserError that names a damaged one."""
    lines, entries = path.read_bytes().split(b"\n")[:-1] if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
            if {type(v) for v in entries[-1].values()} - {int, float} or "step" not in entries[-1]:
                raise ValueError
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{path}:{number}: damaged; delete this line") from None
    return entries

# -----------------------------------------------------------------------------
# Evaluation: losses by vector, by another's vector and by text; answers

@torch.no_grad()
def row_losses(elm: ELM, split: Split, rt: Runtime, form: int = BY_VECTOR,
               vectors: np.ndarray | None = None) -> Tensor:
    """[N] fp64: each row's summed token cross-entropy, the same for any number of processes."""
    lengths = split.rows["length"][:, form].astype(np.int64)
    rows = np.flatnonzero(lengths)
    filled = np.cumsum(lengths[rows]) // MICRO_TOKENS[rt.device.type]
    micros = np.split(rows, np.flatnonzero(np.diff(filled)) + 1)
    losses = torch.zeros(len(lengths), dtype=torch.float64, device=rt.device)
    for first in range(0, len(micros), rt.world):  # ZeRO-3 wants every process in every pass
        mine = micros[min(first + rt.rank, len(micros) - 1)]
        batch = pack(split, mine, form, vectors)
        nll = elm.losses(batch, elm(batch["embeddings"]) if form == BY_VECTOR else None)
        if first + rt.rank < len(micros):
            losses[torch.from_numpy(mine).to(rt.device)] = nll.double()
    return rt.sum(losses).cpu()

def control_losses(elm: ELM, split: Split, rt: Runtime, text: bool = False) -> dict:
    """row_losses by the rows' own vectors, by shuffled ones and, if wanted and there, by text."""
    losses = {"loss": row_losses(elm, split, rt),
              "loss_shuffled": row_losses(elm, split, rt, vectors=shuffled_vectors(split))}
    if text and split.rows["length"][:, BY_TEXT].any():
        losses["loss_text"] = row_losses(elm, split, rt, BY_TEXT)
    return losses

def sample_rows(split: Split, n: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(len(split.rows))[:n])

def answers(elm: ELM, split: Split, rows: np.ndarray, which: np.ndarray, limit: int, rt: Runtime):
    """Greedy answers of up to `limit` tokens to the queries of `rows` about the vectors `which`.
    The processes share them by whole batches: not a bit depends on how many they are."""
    rank, world = (0, 1) if elm.in_step else (rt.rank, rt.world)  # ZeRO-3: all make all of them
    size, made, parts = 16, {}, [None] * world
    for i in tqdm(range(rank * size, len(rows), world * size), "answers", leave=False,
                  disable=rt.rank > 0 or rt.quiet or None):
        vectors = split.vectors[torch.from_numpy(which[i : i + size])]
        queries = [split.raw(row)["query"] for row in rows[i : i + size]]
        made[i] = elm.generate(vectors, queries, limit, size)
    if world > 1:
        torch.distributed.all_gather_object(parts, made)
        made = {i: batch for part in parts for i, batch in part.items()}
    return [answer for i in sorted(made) for answer in made[i]]

@lru_cache(1)
def load_scorer(name: str, num_layers: int | None) -> Any:
    """bert-score's scorer, on the CPU, in fp32, with a tokenizer that works: with transformers 5,
    the library fails at one without a length, and at byte-level ones it takes the space from the
    first word. Raises: UserError."""
    place, bert_score = "eval.bertscore_model", need("bert_score")
    config = load_pretrained(AutoConfig, name, place)
    layers = num_layers or bert_score.utils.model2layers.get(name, config.num_hidden_layers)
    if layers > config.num_hidden_layers:
        raise UserError(f"eval.bertscore_layers = {layers}: {name} has {config.num_hidden_layers}")
    if "t5" in name and config.model_type != "t5":
        raise UserError(f"{place}: bert-score takes {name} for a T5 by its name; rename or link it")
    with quietly(), loading(name, place):
        scorer = bert_score.BERTScorer(name, num_layers=layers, device="cpu")
    tok, known = scorer._tokenizer, bert_score.utils
    if isinstance(tok, (known.GPT2Tokenizer, known.RobertaTokenizer)):
        tok = load_pretrained(AutoTokenizer, name, place, add_prefix_space=True)
    tok.model_max_length, scorer._tokenizer = reach(scorer._model, tok), tok
    scorer._model.float()
    return scorer

COMPOSITE = 0.3, 0.3, 0.4  # of BERTScore's precision, recall and F1

def bert_scores(cfg: EvalConfig, texts: list[str], references: list[str], device: Any):
    """(precision, recall and F1 [n, 3] of BERTScore, the library's hash of how they were made).
    Nothing scores 0. One pair at a time: in a batch, padding counts as a similarity of 0."""
    scorer = load_scorer(cfg.bertscore_model, cfg.bertscore_layers)
    scores, pairs = np.zeros((len(texts), 3)), zip(texts, references, strict=True)
    rows = [i for i, pair in enumerate(pairs) if all(text.strip() for text in pair)]
    scorer.device = scorer._model.to(device).device
    if rows:
        parts = scorer.score([texts[i] for i in rows], [references[i] for i in rows], batch_size=1)
        scores[rows] = torch.stack(parts, 1).double().numpy()
    scorer._model.cpu()
    return scores, scorer.hash

def consistency(embedder: Embedder, texts: list[str], rows: np.ndarray, split: Split):
    """For texts about `rows`: their cosine with the source vector, and by it the reciprocal rank of
    the source among all vectors of the split, and whether it is first. [n, 3]; nothing scores 0."""
    scores, some = np.zeros((len(texts), 3)), [i for i, t in enumerate(texts) if t.strip()]
    ours = embedder.embed([texts[i] for i in some])[0]
    source = torch.from_numpy(split.rows["vector"][rows[some]])
    cosine = (ours * F.normalize(split.vectors[source].float(), dim=1)).sum(1)
    rank = torch.ones(len(some))
    for chunk in split.vectors.split(8192):
        near = ours @ F.normalize(chunk.float(), dim=1).T
        rank += (near > cosine[:, None] + 1e-6).sum(1)  # beyond rounding: itself and its copies
    scores[some] = torch.stack([cosine, 1 / rank, (rank == 1).float()], 1).double().numpy()
    return scores

def repetition(text: str) -> float:
    """Share of the word trigrams of `text` that were there before."""
    words = text.split()
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(triples)) / len(triples) if triples else 0.0

def score_answers(cfg: Config, texts: dict[str, list[str]], rows: np.ndarray, split: Split,
                  device: Any) -> tuple[dict[str, Any], str]:
    """(by measure a number for each of `rows`, the hash of the scorer), of answers by their own
    vectors, by shuffled ones, and of the reference answers, in this order."""
    ours, shuffled, references = texts.values()
    scores, by_bert = {}, bert_scores(cfg.eval, ours + shuffled, references * 2, device)
    for name, some, bert in zip(texts, (ours, shuffled), np.split(by_bert[0], 2), strict=False):
        p, r, f1 = bert.T
        scores |= {f"bertscore_precision{name}": p, f"bertscore_recall{name}": r,
                   f"bertscore_f1{name}": f1, f"bertscore_composite{name}": bert @ COMPOSITE,
                   f"empty_rate{name}": [not t.strip() for t in some],
                   f"repetition{name}": [repetition(t) for t in some]}
    if cfg.eval.embedder:
        options = EmbedOptions(model=cfg.eval.embedder, bf16=cfg.model.bf16)
        embedder = Embedder.load(options, "eval.embedder", device)
        for name, some in texts.items():
            cosine, rank, first = consistency(embedder, some, rows, split).T
            scores |= {f"consistency{name}": cosine, f"mrr{name}": rank, f"top1{name}": first}
    return scores, by_bert[1]

def loss_measures(elm: ELM, split: Split, rt: Runtime) -> dict[str, np.ndarray]:
    """Measures: [2, N] each, whose value over any rows is the sum of the first divided by that of
    the second."""
    losses = {k: v.numpy() for k, v in control_losses(elm, split, rt, text=True).items()}
    responses, told = split.rows["response"], split.rows["length"][:, BY_TEXT] > 0
    measures = {k: np.stack([nll, responses]) for k, nll in losses.items()}
    if "loss_text" in losses:
        ours, shuffled, text = losses.values()
        measures["loss_text"] = np.stack([text, responses]) * told
        measures["carried"] = np.stack([shuffled - ours, shuffled - text]) * told
    return measures

def score_now(elm: ELM, split: Split, cfg: EvalConfig, rt: Runtime) -> float:
    """The bertscore_composite that `report` would find, without all else. One process."""
    rows = sample_rows(split, cfg.samples)
    texts = answers(elm, split, rows, split.rows["vector"][rows], cfg.max_new_tokens, rt)
    references = [split.raw(i)["response"] for i in rows]
    return float((bert_scores(cfg, texts, references, rt.device)[0] @ COMPOSITE).mean())

def summarize(split: Split, measures: dict, mask: np.ndarray, draws: int = 1000) -> dict[str, Any]:
    """The measures over the rows in `mask`, with bootstrap 95 % intervals, for which vectors are
    drawn, with all their rows. Carried information, (shuffled - ours) / (shuffled - text), is none
    where the LLM cannot read the texts, and has no interval where it may be none."""
    told = mask & (split.rows["length"][:, BY_TEXT] > 0)
    sums = {k: pair[:, mask].sum(1) for k, pair in measures.items()}
    values = {k: float(num / den) for k, (num, den) in sums.items() if den > 0}
    used, where = np.unique(split.rows["vector"][mask], return_inverse=True)
    totals = {k: np.stack([np.bincount(where, x[mask]) for x in measures[k]]) for k in values}
    groups, intervals = {}, {}  # by the vectors that a measure is of
    for k, pair in totals.items():
        groups.setdefault(pair.any(0).tobytes(), []).append(k)
    for of, names in groups.items():
        pairs = np.stack([totals[k][:, np.frombuffer(of, bool)] for k in names])
        n, rng = pairs.shape[2], np.random.default_rng(0)
        sizes = np.diff(np.r_[0 : draws : max(1, 10**6 // n), draws])  # of the draws at a time
        drawn = [pairs @ rng.multinomial(n, np.full(n, 1 / n), m).T for m in sizes]
        for k, (num, den) in zip(names, np.concatenate(drawn, axis=2), strict=True):
            if n > 1 and (den > 0).all():
                intervals[k] = np.percentile(num / den, (2.5, 97.5)).tolist()
    counts = {"rows": int(mask.sum()), "rows_text": int(told.sum())}
    counts |= {"samples": int(sums["empty_rate"][1])} if "empty_rate" in sums else {}
    return counts | values | {"intervals": {k: intervals[k] for k in values if k in intervals}}

def report(elm: ELM, split: Split, cfg: Config, rt: Runtime, metrics: list, about: dict) -> dict:
    """Measure the adapter on `split`; process 0 writes predictions.jsonl, eval.json and report.png,
    prints what they say and returns the dict of eval.json, the others {}."""
    measures, folder = loss_measures(elm, split, rt), Path(cfg.output.dir)
    task, rows = split.rows["task"], sample_rows(split, cfg.eval.samples)
    which = {"": split.rows["vector"][rows], "_shuffled": shuffled_vectors(split)[rows]}
    texts = {name: answers(elm, split, rows, vectors, cfg.eval.max_new_tokens, rt)
             for name, vectors in which.items()}
    if rt.rank > 0:
        return {}
    raw = [split.raw(i) for i in rows]
    keys = ("embedding_file_idx", "task_type", "query", "response")
    predictions = [{k: r[k] for k in keys} | dict(prediction=a, prediction_shuffled=b)
                   for r, a, b in zip(raw, texts[""], texts["_shuffled"], strict=True)]
    lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)
    write_text(folder / "predictions.jsonl", lines)  # before anything can go wrong with the scores
    if predictions:
        texts["_reference"] = [r["response"] for r in raw]
        scores, about["bertscore_hash"] = score_answers(cfg, texts, rows, split, rt.device)
        for name, values in scores.items():
            measures[name] = np.zeros((2, len(task)))
            measures[name][:, rows] = values, np.ones(len(rows))
    result = about | summarize(split, measures, task >= 0)
    result["tasks"] = {TASKS[t]: summarize(split, measures, task == t) for t in np.unique(task)}
    write_text(folder / "eval.json", json.dumps(result, indent=1) + "\n")
    with whole_file(folder / "report.png") as path:
        draw(path, result, metrics)
    show(result, predictions, rt)
    return result

def draw(path: Path, result: dict, metrics: list[dict]) -> None:
    """report.png: the losses over the steps, and those at the end for each task."""
    figure = need("matplotlib.figure").Figure((13, 6), dpi=100)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.05, right=0.98, wspace=0.33)
    for key, label, color in (("val_loss_shuffled", "validation, vectors shuffled", "tab:red"),
                              ("val_loss", "validation, vectors", "tab:blue"),
                              ("loss", "training", "0.6")):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        left.plot(*np.reshape(points, (-1, 2)).T, label=label, color=color)
    left.set(xlabel="step", ylabel="loss per response token", ylim=(0, None), title="training")
    tasks = result["tasks"]
    for shift, (key, label, color) in enumerate((("loss_shuffled", "vectors shuffled", "tab:red"),
                                                 ("loss", "vectors", "tab:blue"),
                                                 ("loss_text", "text", "tab:green"))):
        bars = [(i + 0.27 * (shift - 1), t[key], *t["intervals"].get(key, [t[key]] * 2))
                for i, t in enumerate(tasks.values()) if key in t]
        place, value, low, high = np.reshape(bars, (-1, 4)).T
        right.barh(place, value, 0.25, label=label, color=color, error_kw=dict(lw=0.8),
                   xerr=np.maximum(0, [value - low, high - value]))
    carried = f", carried {result['carried']:.2f}" if "carried" in result else ""
    right.set(xlabel="loss per response token, with 95 % intervals", yticks=range(len(tasks)),
              yticklabels=list(tasks), title=f"{result['split']}, {result['rows']} rows{carried}")
    right.invert_yaxis()
    left.legend()
    right.legend()
    figure.savefig(path, format="png")

def show(result: dict, predictions: list[dict], rt: Runtime) -> None:
    """The final table, and five answers beside their references."""
    columns = {"rows": "rows", "shuffled": "loss_shuffled", "vectors": "loss", "text": "loss_text",
               "carried": "carried", "answers": "samples",
               "BERT shuf": "bertscore_composite_shuffled", "BERTScore": "bertscore_composite",
               "cosine": "consistency", "of refs": "consistency_reference", "MRR": "mrr"}
    columns = {title: key for title, key in columns.items() if key in result}
    low, high = ({k: v[end] for k, v in result["intervals"].items()} for end in (0, 1))
    rows = {"all": result, "  95 %, from": low, "  to": high, **result["tasks"]}
    lines = ["\n{split}, {rows} rows, {rows_text} with text, adapter of step {adapter_step}"
             .format(**result), f"{'':21}" + "".join(f"{t:>10}" for t in columns)]
    for name, row in rows.items():
        cells = [row.get(key, "") for key in columns.values()]
        lines.append(f"  {name:<19}" + "".join(
            f"{x:>10.4f}" if isinstance(x, float) else f"{x:>10}" for x in cells))
    lines += ["\n  {task_type}: {query}\n    reference   {response}\n    prediction  {prediction}"
              .format(**p) for p in predictions[:: max(1, len(predictions) // 5)][:5]]
    rt.say("\n".join(lines))

def memory_gib() -> float:  # peak, of the GPU where there is one
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

def mean_cosine(x: Tensor) -> float:
    """Mean pairwise cosine of the rows of x [n, d]: near 1, the adapter has collapsed."""
    u = F.normalize(x, dim=1)
    return ((u.sum(0).square().sum() - len(u)) / max(1, len(u) * (len(u) - 1))).item()

# -----------------------------------------------------------------------------
# Training

@contextmanager
def noticed_signals():
    """A list that SIGTERM and Ctrl-C append to; the loop looks at it between steps."""
    seen, kinds = [], (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _: seen.append(number)) for kind in kinds]
    try:
        yield seen
    finally:
        list(map(signal.signal, kinds, before))

def config_text(cfg: Config) -> str:
    """The resolved config as TOML, under the package versions and the git commit as comments."""
    lines = [f"# {p} {version(p)}" for p in ("torch", "transformers", "deepspeed", "safetensors")]
    if shutil.which("git"):
        git = ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"]
        lines += ["# commit " + subprocess.run(git, capture_output=True, text=True).stdout.strip()]
    for name, entries in to_tables(cfg).items():
        lines += ["", f"[{name}]", *(f"{key} = {to_toml(value)}" for key, value in entries.items())]
    return "\n".join(lines) + "\n"

def attempt(rt: Runtime, call: Any) -> Any:  # W&B must never stop a training
    try:
        return call()
    except Exception as e:
        rt.say(f"W&B failed, training goes on: {e!r}")

def start_wandb(cfg: Config, state: TrainState, rt: Runtime) -> Any:
    """The W&B run, the same again after a resume; None where it is off or failed."""
    if not cfg.wandb.enabled or rt.rank > 0:
        return None
    run = attempt(rt, lambda: need("wandb").init(
        project=cfg.wandb.project, name=cfg.wandb.run_name, id=state.wandb_id, resume="allow",
        dir=cfg.output.dir, config=to_tables(cfg)))
    state.wandb_id = run.id if run else state.wandb_id
    return run

def final_split(cfg: Config) -> str:  # which one the report is on
    has_test = all(p.exists() for p in split_paths(cfg.data, "test"))
    return cfg.eval.split or ("test" if has_test else "val")

def open_data(cfg: Config, names: tuple[str, ...], prompt: Prompt, soft: int, rt: Runtime):
    """The splits by name, after a look at what the report will need. Raises: UserError."""
    need("matplotlib")
    if cfg.eval.samples:
        load_scorer(cfg.eval.bertscore_model, cfg.eval.bertscore_layers)
        if rt.rank > 0:  # process 0 will score
            load_scorer.cache_clear()
    data = {name: open_split(cfg.data, name, prompt, soft, rt) for name in dict.fromkeys(names)}
    widths = {name: split.vectors.shape[1] for name, split in data.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"data.dir: the vectors of the splits differ in width: {widths}")
    for name, split in data.items():
        # Under ZeRO 3 all processes must read the same, as often: all of a split's, once.
        reuse = cfg.deepspeed.zero_stage < 3 or split.prefixes is not None
        data[name] = split._replace(reuse=reuse)
        counts = ", ".join(f"{n} {what}" for what, n in split.counts.items() if n)
        rt.say(f"{name}: {len(split.vectors)} vectors of width {widths[name]}, {counts}")
        if (split.rows["vector"] == split.rows["vector"][0]).all():
            raise UserError(f"{split.path}: all rows are about one vector: none is left to compare "
                            "it with")
    if cfg.eval.samples and cfg.eval.embedder:
        embedder = check_embedder(cfg.eval.embedder, "eval.embedder")
        if embedder.hidden_size not in widths.values():
            raise UserError(f"eval.embedder: {cfg.eval.embedder} makes vectors of width "
                            f"{embedder.hidden_size}, those of the data have {widths}")
    return data

def build_model(cfg: Config, llm: Any, data: Split, prompt: Prompt, rt: Runtime):
    """A fresh adapter on the frozen LLM, and what it belongs to, by the keys of IDENTITY."""
    m = cfg.model
    reach = getattr(llm.config.get_text_config(), "max_position_embeddings", math.inf)
    if cfg.data.max_seq_length > reach:
        raise UserError(f"data.max_seq_length = {cfg.data.max_seq_length}: {m.llm} reads {reach}")
    d_llm, scale = embedding_scale(llm)
    torch.manual_seed(cfg.train.seed)
    adapter = Adapter(data.vectors.shape[1], m.hidden_dim, d_llm, m.tokens, m.dropout,
                      m.residual_scale, scale)
    identity = {k: v for k, v in adapter.settings.items() if k in IDENTITY}
    if m.standardize:
        adapter.load_state_dict(data.statistics, strict=False)
    trained, frozen = (sum(p.numel() for p in part.parameters()) for part in (adapter, llm))
    rt.say(f"{rt.world} process(es) on {rt.device.type}, ZeRO {cfg.deepspeed.zero_stage}, LLM in "
           f"{str(llm.dtype)[6:]}\n{trained:,} parameters trained, {frozen:,} frozen; token "
           f"embeddings of root mean square {scale:.4f}")
    return ELM(llm, adapter.to(rt.device), prompt), identity | data.identity() | llm_identity(llm)

@torch.no_grad()
def check_packing(elm: ELM) -> None:
    """Two packed prompts must have the losses that each has alone, by the LLM's own attention; an
    LLM that mixes tokens in another way would be trained on wrong ones. Raises: UserError."""
    ids = (np.arange(46) % elm.llm.get_input_embeddings().num_embeddings).astype(np.int32)
    rows = np.zeros(2, ROW)
    rows["start"], rows["length"], rows["slot"] = [[0], [20]], [[20], [26]], 3
    rows["response"] = [16, 22]
    losses = elm.losses(pack(Split(None, rows, ids, None, {}, {}, 1), [0, 1], BY_TEXT))
    for text, loss in zip(np.split(ids, [20]), losses, strict=True):
        text = torch.from_numpy(text).long().to(loss.device)
        logits = elm.llm(input_ids=text[None], use_cache=False).logits[0, 3:-1].float()
        alone = F.cross_entropy(logits, text[4:], reduction="sum")
        if not torch.isclose(loss, alone, rtol=1e-4 if elm.llm.dtype == torch.float32 else 2e-2):
            raise UserError(f"model.llm: {type(elm.llm).__name__} has more than causal attention "
                            f"between tokens, so that rows cannot be packed ({loss}, not {alone})")

def response_states(states: Tensor, batch: dict) -> Tensor:
    """The mean of the states [T, D] at each example's response tokens: [n, D] fp32."""
    said, owner = states.index_select(0, batch["targets"] + 1).float(), batch["owner"]
    sums = said.new_zeros(len(batch["lengths"]), said.shape[1]).index_add(0, owner, said)
    return sums / torch.bincount(owner, minlength=len(sums))[:, None]

@torch.no_grad()
def fit_probe(elm: ELM, split: Split, rt: Runtime, most: int = 8192) -> Probe:
    """Ridge regression from the mean state of the LLM that reads a response alone to the vector of
    its text, over up to `most` rows; those of every tenth vector are held out and tell how good it
    is. The same on every process."""
    rows = split.rows[np.random.default_rng(0).permutation(len(split.rows))[:most]]
    rows["start"] = (rows["start"] + rows["length"])[:, :1] - rows["response"][:, None]
    rows["length"], rows["slot"] = rows["response"][:, None], 0  # both forms: the response
    alone = split._replace(rows=rows, reuse=False)
    micros = cut(rows["response"].astype(np.int64), rt.world, MICRO_TOKENS[rt.device.type])
    heard = torch.zeros(len(rows), elm.adapter.settings["d_llm"], device=rt.device)
    for micro in filter(None, micros[rt.rank :: rt.world]):
        heard[micro] = response_states(*elm.states(pack(alone, micro, BY_TEXT)))
    heard = rt.sum(heard).double().cpu()
    which = torch.from_numpy(rows["vector"].copy())
    y = elm.adapter.standardize(split.vectors[which].to(rt.device)).double().cpu()
    held = torch.unique(which, return_inverse=True)[1] % 10 == 9
    center, mean = heard[~held].mean(0), y[~held].mean(0)
    x, y = heard - center, y - mean
    gram = x[~held].T @ x[~held]
    ridge = 0.01 * gram.diag().mean().clamp(min=1e-9) * torch.eye(len(gram), dtype=gram.dtype)
    matrix = torch.linalg.solve(gram + ridge, x[~held].T @ y[~held])
    if held.any():
        left = (y - x @ matrix)[held].square().sum() / y[held].square().sum()
        cosine = F.cosine_similarity(x @ matrix, y, dim=1)[held].mean()
        rt.say(f"drift probe of {int((~held).sum())} rows; on {int(held.sum())} held-out ones R² "
               f"{1 - left:.3f}, cosine {cosine:.3f}")
    parts = (rt.sum(t.float().to(rt.device) * (rt.rank == 0)) for t in (matrix, center, mean))
    return Probe(*parts)

def soft_gradient(elm: ELM, soft: Tensor, micros: list, probe: Probe | None = None,
                  target: float = 1.0, scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """([cross-entropy, drift] fp64, each summed over all of plan_step's micro-batches, the gradient
    of the first plus `scale` times the second at their soft tokens [n, K, D]): all that the adapter
    needs of the frozen LLM, and all that this makes."""
    totals, gradients = torch.zeros(2, dtype=torch.float64, device=soft.device), []
    parts = soft.detach().split([len(batch["lengths"]) for _, batch in micros])
    for (weight, batch), part in zip(micros, parts, strict=True):
        out = elm.states(batch, part.requires_grad_())
        nll, drift = elm.nll(*out).sum() * weight, soft.new_zeros(())
        if probe:
            vectors = elm.adapter.standardize(batch["embeddings"].to(soft.device))
            drift = probe.drift(response_states(*out), vectors, target).sum() * weight
        gradients += torch.autograd.grad(nll + scale * drift, part)
        totals += torch.stack([nll, drift]).detach()
    return totals, torch.cat(gradients)

def once(shared: dict, key: Any, make: Any) -> Any:
    if key not in shared:
        shared[key] = make()
    return shared[key]

def open_inputs(cfg: Config, rt: Runtime, shared: dict) -> tuple[Prompt, dict[str, Split], str]:
    """The prompt, the splits, and which of them the report is on."""
    llm, final = cfg.model.llm, final_split(cfg)
    prompt = once(shared, ("prompt", llm), lambda: Prompt.of(
        load_pretrained(AutoTokenizer, llm, "model.llm")))
    key = "data", cfg.data, cfg.eval, cfg.model.tokens, llm, cfg.deepspeed.zero_stage
    data = once(shared, key, lambda: open_data(
        cfg, ("train", "val", final), prompt, cfg.model.tokens, rt))
    return prompt, data, final

def train(cfg: Config, trial: Any = None, shared: dict | None = None) -> dict:
    """Train an adapter and report on it: returns the dict of eval.json. As a `trial` of Optuna it
    writes no checkpoints, tells Optuna the score at each evaluation, and returns that at the end
    alone; what does not change between trials stays in `shared`. Raises: UserError for what its
    user can mend; SystemExit(128 + signal) after a signal, with a checkpoint; TrialPruned."""
    rt, folder = start_runtime(cfg)._replace(quiet=bool(trial)), Path(cfg.output.dir)
    shared = {} if shared is None else shared
    saved = find_checkpoint(cfg, rt)
    state = saved["state"] if saved else TrainState()
    prompt, data, final = open_inputs(cfg, rt, shared)  # its errors come in seconds
    source, size = data["train"], cfg.train.batch_size * cfg.train.grad_accum * rt.world
    total = cfg.train.max_steps or cfg.train.epochs * math.ceil(len(source.rows) / size)
    # Trials can be compared on the way whatever their batch size: at each quarter.
    eval_steps = math.ceil(total / 4) if trial else cfg.train.eval_steps
    if trial:
        trial.set_user_attr("eval_steps", eval_steps)
    try:
        done = dict(json.loads((folder / "eval.json").read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):  # the report is made again
        done = {}
    same = saved and saved["config"]["model"] == to_tables(cfg)["model"]
    count, changed = {"rows of the training split": len(source.rows)}, ""
    if saved:
        was, now = flat(saved["config"] | saved["rows"]), flat(to_tables(cfg) | count)
        changed = "".join(f"\n  {k} = {now.get(k)}, was {was.get(k)}" for k in {**was, **now}
                          if was.get(k) != now.get(k) and k not in ("train.resume", "output.dir"))
    if same and done.get("step") == state.step >= total:
        rt.say(f"{folder} holds a finished run of {state.step} steps; nothing to do{changed}")
        return done
    # ZeRO 3 takes an LLM apart.
    llm = once({} if cfg.deepspeed.zero_stage == 3 else shared,
               ("llm", cfg.model.llm, cfg.model.bf16),
               lambda: load_llm(cfg.model.llm, rt.device, cfg.model.bf16))
    elm, identity = build_model(cfg, llm, source, prompt, rt)
    if saved:
        check_identity(saved["identity"], identity, "train.resume")
    check_packing(elm)
    if saved:
        elm.adapter.load_state_dict(saved["adapter"])
    probe = None
    if cfg.loss.drift_weight:
        fitted = saved and saved.get("probe")
        probe = Probe(*(t.to(rt.device) for t in fitted)) if fitted else once(
            shared, ("probe", cfg.data, cfg.model.llm, cfg.model.tokens,
                     cfg.model.bf16, cfg.model.standardize),
            lambda: fit_probe(elm, source, rt))
    elm.in_step = cfg.deepspeed.zero_stage == 3 and rt.world > 1
    budget, recomputed = plan_memory(elm.llm, cfg.model.grad_checkpoint, rt.free_memory())
    recompute_layers(elm.llm, recomputed)
    engine = start_engine(cfg, elm)
    if saved:
        restore_moments(engine, saved["optimizer"])
        rt.say(f"resumed after step {state.step}{changed}")
    rt.say(f"{total} steps of {size} rows, {cfg.train.warmup_steps} of warm-up; "
           f"micro-batches of {budget} tokens, {recomputed} layers recomputed")
    if rt.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        rt = rt._replace(held=lock(folder / ".lock"))
        kept = [json.dumps(m) + "\n" for m in read_metrics(folder / "metrics.jsonl")
                if saved and m["step"] <= state.step]  # what a killed run did after comes again
        write_text(folder / "metrics.jsonl", "".join(kept))
        write_text(folder / "config.toml", config_text(cfg))
    wandb = start_wandb(cfg, state, rt)
    def record(**entry: Any) -> None:
        if rt.rank == 0:
            with writing(folder / "metrics.jsonl"), open(folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps(entry) + "\n")
        if wandb:
            attempt(rt, lambda: wandb.log(entry, step=entry["step"]))
    def save_adapter(name: str, weights: dict[str, Tensor], step: int) -> None:
        if rt.rank == 0:
            origin = dict(name=cfg.model.llm, bf16=cfg.model.bf16)
            elm.adapter.save(folder / name, weights, llm=origin, identity=identity, step=step)
        if wandb:
            attempt(rt, lambda: wandb.log_artifact(str(folder / name), type="adapter"))
    def save(name: str) -> None:  # no generator: a step's rows and dropout depend on seed and step
        weights, moments = gather_state(engine)
        save_adapter(f"adapter_step_{state.step}.safetensors", weights, state.step)
        if rt.rank == 0:
            whole = dict(state=dataclasses.asdict(state), adapter=weights, optimizer=moments,
                         probe=probe and [t.cpu() for t in probe], identity=identity,
                         config=to_tables(cfg), rows=count)
            torch.save(whole, content := io.BytesIO())  # of a full disk it says nothing itself
            with whole_file(folder / f"checkpoint_{name}.pt") as path, open(path, "wb") as f:
                f.write(content.getbuffer())
                f.write(hashlib.sha256(content.getbuffer()).digest())
    def validate() -> None:
        engine.eval()
        responses = int(data["val"].rows["response"].sum())
        val, shuffled = (float(nll.sum()) / responses
                         for nll in control_losses(elm, data["val"], rt).values())
        score = {}
        if trial and 0 < state.step < total:
            score["val_bertscore"] = score_now(elm, data["val"], cfg.eval, rt)
        engine.train()
        record(step=state.step, val_loss=val, val_loss_shuffled=shuffled, **score)
        rt.say(f"step {state.step:6d}  val_loss {val:.4f}  vectors shuffled {shuffled:.4f}")
        if trial and state.step and signals:  # it came while nobody looked
            raise SystemExit(128 + max(signals))
        if score:
            trial.report(score["val_bertscore"], state.step // eval_steps)
            if trial.should_prune():
                raise need("optuna").TrialPruned
        if val < state.best or state.best_adapter is None:
            state.best, state.best_step = val, state.step
            state.best_adapter = gather_state(engine)[0]
            save_adapter("adapter_best.safetensors", state.best_adapter, state.step)

    bar = tqdm(total=total, initial=state.step, unit="step",
               disable=rt.rank > 0 or rt.quiet or None)
    if state.step == 0:
        validate()
    else:
        save_adapter("adapter_best.safetensors", state.best_adapter, state.best_step)
    engine.train()
    def planned() -> Any:  # the steps that are left, read ahead
        steps = step_rows(len(source.rows), cfg.train.seed, size, state.epoch, state.position)
        plan = partial(plan_step, source, budget, rt)
        return read_ahead(plan, islice(steps, max(0, total - state.step)), cfg.data.num_workers)
    def leave() -> None:
        rt.say(f"stopped after step {state.step}; train.resume=auto goes on from there")
        if wandb:
            attempt(rt, wandb.finish)
        raise SystemExit(128 + max(signals, default=signal.SIGTERM))
    plans, halved = planned(), False
    sums = torch.tensor([state.nll_sum, state.drift_sum, 0.0], dtype=torch.float64).to(rt.device)
    unseen, clock, num_tokens = [], time.perf_counter(), 0
    with noticed_signals() as signals:
        while state.step < total:
            epoch, position, rows, labels, micros = next(plans)
            lr = lr_at(state.step, total, cfg.train)
            mixed = np.random.SeedSequence([cfg.train.seed, state.step, rt.rank]).generate_state(1)
            torch.manual_seed(int(mixed[0]))  # of 32 bits: the CPU's generator ignores any above
            soft = engine(torch.cat([batch["embeddings"].to(rt.device, non_blocking=True)
                                     for _, batch in micros]))
            exhausted = False
            try:
                losses, gradient = soft_gradient(elm, soft, micros, probe, cfg.loss.drift_target,
                                                 cfg.loss.drift_weight * labels / len(rows))
            except torch.OutOfMemoryError:
                if halved or elm.in_step:  # the others wait inside
                    raise
                exhausted = True
            told = rt.sum(torch.tensor([float(bool(signals)), float(exhausted)]))  # between hosts,
            stop, exhausted = (told > 0).tolist()  # while the devices work on
            if exhausted:  # nothing of this step has reached the adapter: it begins again
                budget, halved = budget // 2, True
                rt.say(f"step {state.step + 1}: out of memory; from here on micro-batches have "
                       f"{budget} tokens")
                plans, soft = planned(), None
                torch.cuda.empty_cache()
                continue
            # DeepSpeed averages over processes; the mean wanted is the one over all labels.
            engine.backward((soft * gradient).sum() * (rt.world / labels))
            # No look from the host: AdamW makes no update while found_inf is 1, and so it is from
            # the first step on whose loss or gradient is not finite.
            losses = rt.sum(losses + 0.0 * gradient.sum())
            engine.adam.found_inf = (~losses.isfinite().all() | (sums[2] > 0)).float()
            sums += torch.cat([losses, engine.adam.found_inf.double()[None]])
            state.step, state.epoch, state.position = state.step + 1, epoch, position
            state.num_labels, state.num_rows = state.num_labels + labels, state.num_rows + len(rows)
            unseen.append(rows)
            num_tokens += int(source.rows["length"][rows, BY_VECTOR].sum())
            last = state.step == total
            log = state.step % cfg.train.logging_steps == 0 or last
            norm = take_step(engine, lr, cfg.train.max_grad_norm)
            bar.update()
            check = state.step % eval_steps == 0 or last
            keep = not trial and (state.step % cfg.train.save_steps == 0 or stop)
            if not (log or check or keep or stop):
                continue
            state.nll_sum, state.drift_sum, bad = sums.tolist()  # the one wait for the device
            if bad:
                lines = ",".join(str(n) for n in source.rows["line"][unseen[-int(bad)]][:64])
                raise UserError(f"step {state.step + 1 - int(bad)}: the loss or its gradient is "
                                "not finite, and nothing was updated; lower train.lr, or look at "
                                f"{source.path}:{lines}")
            unseen = []
            if log:
                lm_loss, drift = state.nll_sum / state.num_labels, state.drift_sum / state.num_rows
                loss = lm_loss + cfg.loss.drift_weight * drift
                rate = num_tokens / (time.perf_counter() - clock)
                record(step=state.step, epoch=epoch, loss=loss, lm_loss=lm_loss, drift_loss=drift,
                       lr=lr, grad_norm=float(norm), tokens_per_second=rate,
                       memory_gib=memory_gib(), similarity=mean_cosine(soft.detach().flatten(1)))
                line = f"loss {loss:.4f}  " + f"drift {drift:.4f}  " * bool(probe) + (
                    f"lr {lr:.2e}  {rate:,.0f} tokens/s  {memory_gib():.2f} GiB")
                bar.set_postfix_str(line)
                rt.say(f"step {state.step:6d}  {line}")
                state.nll_sum = state.drift_sum = 0.0
                state.num_labels = state.num_rows = 0
                sums[:2], clock, num_tokens = 0.0, time.perf_counter(), 0
            if check:
                validate()
                clock, num_tokens = time.perf_counter(), 0
            if keep:
                save(f"step_{state.step}")
            if stop:
                leave()
    bar.close()
    if fingerprint(elm.llm) != identity["llm"]:
        shared.clear()  # no other trial may use it
        raise RuntimeError(f"the weights of {cfg.model.llm}, which is frozen, have changed")
    if not trial:
        save("final")
        if rt.sum(torch.tensor(float(bool(signals)))).item():  # they came in the last step
            leave()
    elm.adapter = Adapter(**elm.adapter.settings).to(rt.device)  # the best one, outside of ZeRO
    elm.adapter.load_state_dict(state.best_adapter)
    engine.eval()
    if trial:
        result = {"bertscore_composite": score_now(elm, data["val"], cfg.eval, rt)}
        if wandb:
            attempt(rt, lambda: wandb.summary.update(result))
        return result
    metrics = read_metrics(folder / "metrics.jsonl")
    about = dict(split=final, step=state.step, adapter_step=state.best_step)
    result = report(elm, data[final], cfg, rt, metrics, about)
    if wandb:
        attempt(rt, lambda: (wandb.summary.update(result), wandb.finish()))
    return result

# -----------------------------------------------------------------------------
# Commands that use a trained adapter

def evaluate(cfg: Config, path: Path) -> dict:
    """The report of training's end on the adapter of a file: returns the dict of eval.json.
    Raises: UserError."""
    rt, folder, final = start_runtime(cfg), Path(cfg.output.dir), final_split(cfg)
    adapter, about = Adapter.load(path)
    prompt = Prompt.of(load_pretrained(AutoTokenizer, cfg.model.llm, "model.llm"))
    split = open_data(cfg, (final,), prompt, adapter.settings["tokens"], rt)[final]
    check_identity(about.get("identity", {}), split.identity(), f"data.dir: {final}")
    elm = ELM.load(path, cfg.model.llm, cfg.model.bf16)
    check_packing(elm)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("metrics.jsonl", "predictions.jsonl", "eval.json", "report.png")
    check_new(*(folder / name for name in names))
    if cfg.deepspeed.zero_stage == 3:  # to share the LLM out
        elm.in_step = rt.world > 1
        start_engine(cfg, elm)
        elm.adapter = adapter.to(rt.device)  # outside of ZeRO
    step, metrics = about.get("step"), read_metrics(path.parent / "metrics.jsonl")
    return report(elm, split, cfg, rt, metrics, dict(split=final, step=step, adapter_step=step))

@table
class GenerateOptions:
    adapter: str
    embeddings: str  # a safetensors file of one table
    query: str | None = None
    queries: str | None = None  # a file of them, one per line
    rows: tuple[int, ...] | None = None  # of the table; None: all
    mix: tuple[float, ...] | None = None  # [i, j, t]: between rows i and j, on the arc
    out: str | None = None  # a .jsonl file; None: to stdout
    llm: str | None = None  # the adapter's LLM at another place
    batch_size: Annotated[int, "[1, inf)"] = 16
    seed: Annotated[int, "[0, 4294967295]"] = 42
    extra: dict = field(default_factory=dict)  # options of the LLM's own `generate`

def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """[E], [E] -> [E], the part t of the way on the great circle, its length in proportion too.
    Shoemake, Animating rotation with quaternion curves, 1985."""
    u, v = F.normalize(a, dim=0), F.normalize(b, dim=0)
    angle = torch.atan2((u - v).norm(), (u + v).norm()) * 2
    if angle < 1e-4:
        return torch.lerp(a, b, t)
    if angle > math.pi - 1e-3:
        raise UserError("mix: the two vectors are opposite, so that there is no one way between")
    arc = (((1 - t) * angle).sin() * u + (t * angle).sin() * v) / angle.sin()
    return arc * torch.lerp(a.norm(), b.norm(), t)

def generate(o: GenerateOptions) -> None:
    """Answers about the vectors of a file as lines of JSON, as they come. Raises: UserError."""
    vectors, known = open_vectors(Path(o.embeddings)), vars(GenerationConfig())
    adapter, about = Adapter.load(o.adapter)
    check_vectors(vectors, adapter, o.embeddings)
    if o.mix is not None and (len(o.mix) != 3 or not 0 <= o.mix[2] <= 1 or o.rows is not None):
        raise UserError("mix: is [i, j, t], two rows and a number from 0 to 1, in place of rows")
    rows = range(len(vectors)) if o.rows is None else o.rows
    for row in o.mix[:2] if o.mix else rows or [None]:
        if row not in range(len(vectors)):
            raise UserError(f"{'mix' if o.mix else 'rows'}: no row {row} among {len(vectors)}")
    if (o.query is None) == (o.queries is None):
        raise UserError("query or queries: give one of them")
    for key in o.extra:
        if key not in known or key in ("num_return_sequences", "return_dict_in_generate"):
            raise UserError(f"{key}: not an option here{nearest(key, known)}")
    queries = [o.query] if o.queries is None else [*read_texts(Path(o.queries))]
    for query in queries:
        check_query(query)
    if o.out:
        check_new(Path(o.out))
    if o.mix:
        a, b = vectors[[int(i) for i in o.mix[:2]]].float()
        rows, vectors = [0], slerp(a, b, o.mix[2])[None]
    some = vectors[list(rows[:1024])].float()
    if len(bad := unusable(some).nonzero()):
        raise UserError(f"{o.embeddings}: row {rows[int(bad[0])]} is zero, NaN or infinite; embed "
                        "it again")
    norm = some.square().sum(1).mean().sqrt().item()
    check_identity(about.get("identity", {}), dict(norm=norm), o.embeddings)
    elm, out = ELM.load(o.adapter, o.llm), None
    torch.manual_seed(o.seed)
    pairs, total = ((row, q) for q in queries for row in rows), len(queries) * len(rows)
    bar = tqdm(total=total, unit="answer", disable=not o.out and sys.stdout.isatty())
    while some := list(islice(pairs, o.batch_size)):
        which = torch.tensor([row for row, _ in some])
        try:
            texts = elm.generate(vectors[which].float(), [q for _, q in some],
                                 batch_size=o.batch_size, **o.extra)
        except (ValueError, TypeError, ArithmeticError, LookupError) as e:  # at an option's value
            raise UserError(f"generate: {' '.join(str(e).split())[:300]}") from None
        out = out or (open(o.out, "x", encoding="utf-8") if o.out else sys.stdout)
        for (row, query), text in zip(some, texts, strict=True):
            entry = dict(row=o.mix or row, query=query, answer=text)
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        out.flush()
        bar.update(len(some))
    bar.close()

# -----------------------------------------------------------------------------
# Sweep: Optuna over the settings of training, by any number of workers

@table
class StudyConfig:
    name: str = "elm-summary-optimization"
    trials: Annotated[int, "[1, inf)"] = 50  # of all workers together
    timeout_hours: Annotated[float, "(0, inf)"] = 24.0  # after which this worker begins no other
    objective: Literal["bertscore_composite"] = "bertscore_composite"  # on the validation split
    storage: str | None = None  # a URL as Optuna takes it; None: a journal file in output.dir
    seed: Annotated[int, "[0, 4294967295]"] = 42
    repeat_best: Annotated[int, "[0, inf)"] = 3  # so many of the best are run with two more seeds
@table
class Range:
    low: float
    high: float
    log: bool = False

OF_SWEEP = ("train.eval_steps", "train.resume", "train.seed")  # not to be optimised

class Sweep(NamedTuple):
    source: str
    study: StudyConfig
    output: OutputConfig
    base: dict[str, Any]  # settings by dotted name
    space: dict[str, dict | list]

    def config(self, params: dict[str, Any]) -> Config:
        return build_config(read_toml(None, self.base | params), self.place)

    @property
    def place(self) -> str:
        return f"{self.source}: base or space"

def load_sweep(path: str, overrides: list[str]) -> Sweep:
    """A sweep file; both ends of each range and each choice are checked as settings of a training,
    before any is begun. Raises: UserError with one line for each mistake."""
    entries, errors = flat(read_toml(path, {})), []
    for name, value in map(read_override, overrides):
        name = name.replace('"', "")
        entries = {k: v for k, v in entries.items() if not f"{k}.".startswith(f"{name}.")}
        entries |= flat({name: value})
    kinds = dict(study=StudyConfig, wandb=WandbConfig, output=OutputConfig, base=None, space=None)
    parts: dict[str, dict] = {name: {} for name in kinds}
    for name, value in entries.items():
        part, dot, key = name.partition(".")
        if part in kinds and dot:
            parts[part][key] = value
        else:
            errors.append(f"{part}: is not a table of a sweep{nearest(part, kinds)}")
    for name, kind in kinds.items():
        if kind:
            parts[name], wrong = check_table(kind, parts[name], f"{name}.")
            errors += wrong
    base, space = parts["base"], parts["space"]
    config = base.pop("config", "train.toml")
    if not isinstance(config, str):
        errors.append(f"base.config = {config!r}: must be a train TOML")
    if errors:
        raise UserError("\n".join(f"{path}: {e}" for e in errors))
    base = flat(read_toml(config, {})) | base | {f"wandb.{k}": v for k, v in parts["wandb"].items()}
    sweep = Sweep(path, StudyConfig(**parts["study"]), OutputConfig(**parts["output"]), base, space)
    if not sweep.config({}).eval.samples:
        errors.append("eval.samples = 0: the objective needs answers")
    if not space:
        errors.append("space: is missing or empty")
    for key, spec in space.items():
        values, wrong = spec, []
        if isinstance(spec, dict):
            ends, wrong = check_table(Range, spec, f"space.{key}.")
            low, high = values = [ends.get("low", 0), ends.get("high", 1)]
            if not wrong and (low >= high or ends.get("log") and low <= 0):
                wrong.append(f"space.{key} = {spec}: must rise from low to high, above 0 if log")
        elif not isinstance(spec, list) or not spec or any(isinstance(v, list) for v in spec):
            wrong.append(f"space.{key} = {spec!r}: must be choices in a list, or {{low, high}}")
        elif key.startswith(("eval.", "output.", "wandb.")) or key in OF_SWEEP:
            wrong.append(f"space.{key}: is not for a space, as the sweep itself sets it")
        for value in values if not wrong else ():
            try:
                sweep.config({key: value})
            except UserError as e:
                lines = (line.removeprefix(f"{sweep.place}: ") for line in str(e).splitlines())
                wrong += [f"space.{line}" for line in lines]
        errors += wrong
    if errors:
        raise UserError("\n".join(f"{path}: {e}" for e in dict.fromkeys(errors)))
    return sweep

def this_machine() -> list[str]:  # and its space of process numbers, which containers have apart
    return [socket.gethostname(), os.readlink("/proc/self/ns/pid")]

def process_start(pid: int) -> str | None:
    """When a process of this machine began; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return fields[19] if fields[0] != "Z" else None

def open_study(sweep: Sweep) -> Any:
    """The Optuna study of a sweep, made or found. Raises: UserError if it cannot be opened, or is
    one over other settings."""
    optuna, url = need("optuna"), sweep.study.storage or f"{sweep.output.dir}/study.log"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sweep: a worker is one process; start one for each GPU by hand")
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    Path(sweep.output.dir).mkdir(parents=True, exist_ok=True)
    if "://" not in url and Path(url).exists() and not f"\n{Path(url).read_text()}".endswith("\n"):
        raise UserError(f"{url}: its last line was cut off; delete that line")
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are
    try:
        storage = (RDBStorage(url, heartbeat_interval=30, grace_period=120) if "://" in url else
                   # Absolute: Optuna's lock dangles on a relative path, and never goes stale.
                   JournalStorage(JournalFileBackend(str(Path(url).resolve()))))
        study = optuna.create_study(
            study_name=sweep.study.name, storage=storage, load_if_exists=True,
            direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=4))
    except Exception as e:  # of any database and its driver
        why = " ".join(str(e).split())[:200]
        raise UserError(f"study.storage: cannot open {url.split('@')[-1]}: {why}") from None
    ours = {f"space.{k}": v for k, v in sweep.space.items()}
    ours |= {f"base.{k}": v for k, v in sweep.base.items()
             if not k.startswith(("wandb.", "output."))}
    theirs = study.user_attrs.get("settings", ours)
    if differ := [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]:
        raise UserError(f"study.name: {sweep.study.name} is there already with another "
                        f"{', '.join(differ)}; choose another name, or go on with its settings")
    if not study.get_trials(deepcopy=False) and [*Path(sweep.output.dir).glob("trial_*")]:
        raise UserError(f"output.dir: {sweep.output.dir} holds trials of another study")
    study.set_user_attr("settings", ours)
    return study

def suggest(trial: Any, space: dict[str, dict | list]) -> dict[str, Any]:
    params = {}
    for key, spec in space.items():
        if isinstance(spec, list):
            params[key] = trial.suggest_categorical(key, spec)
        else:
            section, _, name = key.partition(".")
            whole = "int" in SECTIONS[section].__annotations__.get(name, "")
            pick = trial.suggest_int if whole else trial.suggest_float
            params[key] = pick(key, spec["low"], spec["high"], log=spec.get("log", False))
    return params

def trial_config(sweep: Sweep, params: dict[str, Any], name: str) -> Config:
    """That of a training: it reports on the validation split, which is what is optimised."""
    return sweep.config(params | {"eval.split": "val", "output.dir": f"{sweep.output.dir}/{name}",
                                  "wandb.run_name": name})

def run_trial(sweep: Sweep, trial: Any, params: dict, name: str, shared: dict) -> float:
    cfg = trial_config(sweep, params, name)
    try:
        return train(cfg, trial, shared)[sweep.study.objective]
    except SystemExit as stopped:  # of a signal
        raise KeyboardInterrupt(stopped.code) from None
    finally:
        gc.collect()  # an engine refers to itself
        torch.cuda.empty_cache()
        if cfg.wandb.enabled:
            attempt(Runtime(), lambda: need("wandb").finish())

def count_trials(study: Any) -> tuple[list, bool]:
    """(the trials made or being made, whether any is still being made). What killed workers were at
    is marked as failed: on this machine at once, elsewhere by a database's heartbeat; what failed
    without a reason does not count."""
    optuna = need("optuna")
    optuna.storages.fail_stale_trials(study)
    for t in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        host, pid, start = t.user_attrs.get("worker", (None, 0, None))
        never = host is None and (datetime.now() - t.datetime_start).total_seconds() > 60
        if never or host == this_machine() and process_start(pid) != start:
            study.tell(t.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
    made = [t for t in study.get_trials(deepcopy=False)
            if t.state.name != "FAIL" or "reason" in t.user_attrs]
    return made, any(t.state.name == "RUNNING" for t in made)

def run_sweep(sweep: Sweep) -> None:
    """One worker: trials, until all workers together have made study.trials; the last one to end
    runs the best again with other seeds. Killed, it is started again. Raises: UserError."""
    optuna, shared, failures = need("optuna"), {}, (UserError, RuntimeError)
    wanted = sweep.study.trials
    cfg = trial_config(sweep, {}, "best")
    open_inputs(cfg, start_runtime(cfg)._replace(quiet=True), shared)  # or there is no study
    study, deadline = open_study(sweep), time.time() + 3600 * sweep.study.timeout_hours
    def objective(trial: Any) -> float:
        # A sampler of its own for each trial: those of workers of one seed would suggest the same.
        seed, random = (sweep.study.seed + trial.number) % 2**32, min(10, 1 + wanted // 4)
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=random)
        me = [this_machine(), os.getpid(), process_start(os.getpid())]
        trial.set_user_attr("worker", me)
        if sum(t.number < trial.number for t in count_trials(study)[0]) >= wanted:
            raise UserError("another worker has begun the last trial")
        params = suggest(trial, sweep.space)
        try:
            return run_trial(sweep, trial, params, f"trial_{trial.number}", shared)
        except failures as e:
            why = str(e).splitlines()[0]
            trial.set_user_attr("reason", why)
            tqdm.write(f"trial {trial.number} failed: {why}")
            raise
    bar = tqdm(total=wanted, unit="trial")
    try:
        while True:
            made, running = count_trials(study)
            bar.n = sum(t.state.name != "RUNNING" for t in made)
            bar.set_postfix_str(write_results(sweep, study))
            if len(made) >= wanted or time.time() > deadline:
                break
            study.optimize(objective, n_trials=1, catch=failures)
        bar.close()
        if running:
            print("other workers are still at it; the last of them runs the best again")
        else:
            repeat_best(sweep, study, deadline, shared)
    except KeyboardInterrupt as stopped:
        bar.close()
        print("stopped; the same command goes on")
        raise SystemExit(*stopped.args or (128 + signal.SIGINT,)) from None
    draw_sweep(Path(sweep.output.dir, "sweep.png"), study)
    if not running and not any(t.state.name == "COMPLETE" for t in made):
        raise UserError(f"{sweep.source}: no trial was completed")
    print(write_results(sweep, study))

def best_trials(sweep: Sweep, study: Any) -> list[tuple[Any, dict[int, float]]]:
    """The study.repeat_best best trials by value, at least one if there is any, each with its value
    by seed."""
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    best, first = [], sweep.config({}).train.seed
    for t in sorted(done, key=lambda t: -t.value)[: max(1, sweep.study.repeat_best)]:
        again = {(first + k) % 2**32: study.user_attrs.get(f"trial {t.number}, {k}")
                 for k in (1, 2)}
        best.append((t, {first: t.value} | again))
    return best

def repeat_best(sweep: Sweep, study: Any, deadline: float, shared: dict) -> None:
    """The best trials with two more seeds each: one value is luck in part. One worker at a time."""
    held = lock(Path(sweep.output.dir, ".lock"), wait=True)
    for t, values in best_trials(sweep, study) if sweep.study.repeat_best else ():
        for k, (seed, value) in enumerate(values.items()):
            if value is None and time.time() < deadline:
                name = f"trial_{t.number}_seed_{seed}"
                shutil.rmtree(Path(sweep.output.dir, name), ignore_errors=True)  # of a killed one
                params, trial = t.params | {"train.seed": seed}, need("optuna").trial.FixedTrial({})
                try:
                    value = run_trial(sweep, trial, params, name, shared)
                    study.set_user_attr(f"trial {t.number}, {k}", value)
                except (UserError, RuntimeError) as e:  # begun again with the next worker
                    tqdm.write(f"{name} failed: {str(e).splitlines()[0]}")
    held.close()

def write_results(sweep: Sweep, study: Any) -> str:
    """trials.jsonl and best.toml as of now, and a line about the best trial: that of the best mean
    among those that were or will be repeated. Any worker may write them, at any time."""
    folder, tag = Path(sweep.output.dir), f".{os.getpid()}"
    best = best_trials(sweep, study)
    seeds = {t.number: [v for v in values.values() if v is not None] for t, values in best}
    rows = [dict(number=t.number, state=t.state.name.lower(), value=t.value, params=t.params,
                 seconds=t.duration and t.duration.total_seconds(),
                 reason=t.user_attrs.get("reason", "killed" if t.state.name == "FAIL" else None),
                 seeds=seeds.get(t.number)) for t in study.get_trials(deepcopy=False)]
    write_text(folder / "trials.jsonl", "".join(json.dumps(r) + "\n" for r in rows), tag)
    if not best:
        return "no trial is complete yet"
    t = max((t for t, _ in best), key=lambda t: np.mean(seeds[t.number]))
    params = t.params | {"train.eval_steps": t.user_attrs["eval_steps"]}
    cfg, values = trial_config(sweep, params, "best"), seeds[t.number]
    head = (f"# trial {t.number} of {study.study_name}: {sweep.study.objective} {t.value!r} on the "
            "validation split\n")
    write_text(folder / "best.toml", head + config_text(cfg), tag)
    line = f"best {t.value:.4f} of trial {t.number}"
    if len(values) > 1:
        line += f", {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} over {len(values)} seeds"
    return line

def draw_sweep(path: Path, study: Any) -> None:
    """sweep.png: history and importances above slices, each as Optuna draws it."""
    need("matplotlib").use("Agg")
    plt, plots = need("matplotlib.pyplot"), need("optuna.visualization.matplotlib")
    warnings.simplefilter("ignore", UserWarning)  # of a single value's limits
    def image(plot: Any) -> np.ndarray:
        figure, file = np.ravel(plot(study))[0].figure, io.BytesIO()
        figure.savefig(file, bbox_inches="tight")
        plt.close(figure)
        return plt.imread(io.BytesIO(file.getvalue()))
    def join(axis: int, *images: np.ndarray) -> np.ndarray:  # white where one is smaller
        most = max(i.shape[1 - axis] for i in images)
        gaps = [[(0, most - i.shape[a]) if a == 1 - axis else (0, 0) for a in range(3)]
                for i in images]
        return np.concatenate([np.pad(i, gap, constant_values=1)
                               for i, gap in zip(images, gaps, strict=True)], axis)
    num_done = sum(t.state.name == "COMPLETE" for t in study.get_trials(deepcopy=False))
    if num_done:
        above = [image(plots.plot_optimization_history)]
        if num_done > 3:  # before, there is nothing to tell
            above.append(image(plots.plot_param_importances))
        whole = join(0, join(1, *above), image(plots.plot_slice))
        with whole_file(path, f".{os.getpid()}") as temporary:
            plt.imsave(temporary, whole, format="png")

# -----------------------------------------------------------------------------
# Command line

def start_command(command: str, *rest: str) -> None:
    places = [a for a in rest if not re.match(r"[\w.\"]+\s*=", a)]
    options = [a for a in rest if a not in places]
    wanted = dict(eval=["TRAIN.TOML"], generate=[], embed=["TEXTS", "OUT"],
                  filter=["TRAIN.TOML", "OUT"], sweep=["SWEEP.TOML"])
    if len(places) != len(wanted.get(command, places)):
        raise UserError(f"{command}: takes {' '.join([*wanted[command], 'key=value …'])}, in "
                        f"quotes where it has spaces; given: {' '.join(places) or 'no path'}")
    if command == "eval":
        adapter = [read_override(o)[1] for o in options if o.startswith("adapter=")]
        if len(adapter) != 1:
            raise UserError("adapter: is missing, an adapter_*.safetensors")
        settings = [o for o in options if not o.startswith("adapter=")]
        evaluate(load_config(places[0], settings), Path(adapter[0]))
    elif command == "generate":
        generate(read_options(GenerateOptions, options))
    elif command == "embed":
        embed_file(read_options(EmbedOptions, options), *map(Path, places))
    elif command == "filter":
        filter_tasks(load_config(places[0], options).data, Path(places[1]))
    elif command == "sweep":
        run_sweep(load_sweep(places[0], options))
    elif Path(command).suffix == ".toml" or Path(command).exists():
        train(load_config(command, rest))
    else:
        raise UserError(f"{command}: no command{nearest(command, wanted)}; nor a TOML file to "
                        "train by: elm.py TRAIN.TOML")

def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 only if the job is done, 2 after an error its user can mend."""
    given = sys.argv[1:] if arguments is None else arguments
    given = [a for a in given if not re.fullmatch(r"--local_rank=\d+", a)]  # of the launcher
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        for name, kind in dict(generate=GenerateOptions, embed=EmbedOptions).items():
            print(f"{name}: {', '.join(k for k in kind.__annotations__ if k != 'extra')}")
        return 0 if given else 2
    try:
        start_command(*given)
        return 0
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        text = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
        if isinstance(e, torch.OutOfMemoryError):
            text += ("\nless is needed with model.grad_checkpoint = true, or data.max_seq_length = "
                     "512, or on several GPUs deepspeed.zero_stage = 3")
        if os.environ.get("RANK", "0") != "0":  # if process 0 says the same, this one ends here
            time.sleep(5)
        tqdm.write("\n".join(f"elm: {line[:1000]}" for line in text.splitlines()), sys.stderr)
        return 2
    except SystemExit as stopped:
        return stopped.code
    except KeyboardInterrupt:
        on = "; the same command goes on" if given[0] == "embed" else ""
        tqdm.write(f"elm: stopped{on}", sys.stderr)
        return 128 + signal.SIGINT

def run() -> None:
    code = main()
    print(end="", flush=True)
    os._exit(code)  # threads of torch and DeepSpeed abort now and then when the interpreter ends

if __name__ == "__main__":
    run()
