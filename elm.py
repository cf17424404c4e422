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
    python elm.py synthesize texts.jsonl data/mine    rows, vectors and splits, ready for train
    python elm.py filter train.toml OUT 'data.tasks=["summary"]'        a data set of some tasks
    python elm.py sweep sweep.toml                    Optuna; again or elsewhere, one more worker

--help after a command or a TOML file lists its options.

As a module it needs torch, transformers, safetensors and pydantic; others are imported where used.
Shapes: n examples, N rows of a split, T packed tokens, R response tokens, E embedding width, D
width of the LLM's token embeddings, K soft tokens per embedding. A step is one update of the
optimizer, a micro-batch one forward and backward pass.
"""

from __future__ import annotations

import codecs
import copy
import difflib
import fcntl
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
import urllib.request
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from importlib.metadata import distributions
from itertools import count, islice, takewhile
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, NamedTuple

import huggingface_hub
import numpy as np
import pydantic
import torch
import torch.nn.functional as F
import transformers
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

__version__ = "0.1.0"
START = time.perf_counter()  # of the process, for the report
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

class UserError(ValueError):
    """An error the user can correct: each line says what, where and what to do. Exit code 2."""

# -----------------------------------------------------------------------------
# Config: one frozen pydantic model per TOML table; None means unset

PHRASINGS = dict(  # of task types: "phrasing|…; length of the answer", by default two sentences
    keywords="List its keywords|Name its key terms|Give its main terms; five at most",
    category="Name its category|Say which field it is from|Say what it is; in a few words",
    questions="Ask questions that it answers|Ask about it|List what it asks; five at most",
    summary="Summarize it|Give its main points|Say what matters in it",
    describe="Describe it|Say what it is about|Describe what it treats",
    explain_beginner="Explain it to a beginner|Explain it simply|Explain it to a child",
    explain_expert="Explain it to an expert|Give the technical account|Explain it technically",
    related_topics="Name related topics|List topics close to it|Suggest more to read; five at most",
    characteristics_pos="Name its strengths|Say what is good about it|Name its merits",
    characteristics_neg="Name its weaknesses|Say what is bad about it|Name its flaws",
    style_academic="Rewrite it in academic style|Say it formally|Put it as a scholar would",
    style_casual="Rewrite it in casual style|Say it casually|Put it as you would to a friend",
    counterfactual="Retell it as if about cooking|Make it about sailing|Make it about law",
    reconstruct="Repeat its beginning|Give its first two sentences; word for word")
QUERIES = {task: [f"{query}, {length or 'in two sentences'}." for query in queries.split("|")]
           for task, text in PHRASINGS.items() for queries, _, length in [text.partition("; ")]}
TASKS, RECONSTRUCT = tuple(QUERIES)[:-1], "reconstruct"  # this one where data.tasks names it
# Rows of two pair tasks of older data sets, which have other fields: skipped and counted.
PAIR_ROW = re.compile(rb'"task_type"\s*:\s*"(compare|hypothetical)"')
RESERVED_KEYS = (  # of DeepSpeed's config
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "bf16", "fp16", "activation_checkpointing")

def expand_path(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))

PathStr = Annotated[str, Field(pattern=r"^[^\x00]*$"), pydantic.AfterValidator(expand_path)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Unique = pydantic.AfterValidator(lambda x: tuple(dict.fromkeys(x)))

class Table(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """Strict: an integer is accepted for a float, no other type is converted."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def restore_defaults(cls, values: Any) -> Any:  # of keys that an override has set to none
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if v is not None or k not in cls.model_fields}

    def tables(self) -> dict[str, Any]:  # as TOML has them
        return self.model_dump(mode="json", exclude_none=True)

class ModelConfig(Table):
    llm: PathStr = "Qwen/Qwen3-4B-Instruct-2507"  # hub name or folder
    hidden_dim: PositiveInt = 4096  # width of the adapter
    tokens: PositiveInt = 1  # soft tokens per embedding
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    residual_scale: NonNegativeFloat = 1.0
    standardize: bool = True  # the embeddings, by mean and deviation of the training split
    bf16: bool = True  # the LLM; the adapter and its optimizer stay fp32
    grad_checkpoint: Literal[True, False, "auto"] = "auto"  # recompute all, no or some layers
    template: dict[str, Any] = {}  # keyword arguments of the chat template

class DataConfig(Table):
    dir: PathStr = "data"  # holds embeddings/ and synthesis/
    tasks: Annotated[tuple[str, ...], Field(strict=False, min_length=1), Unique] = TASKS  # or own
    max_seq_length: PositiveInt = 2048  # tokens of prompt and response
    num_workers: NonNegativeInt = 4  # threads that read ahead

class TrainConfig(Table):
    batch_size: PositiveInt = 16  # examples; a step has batch_size * grad_accum * processes
    grad_accum: PositiveInt = 2
    epochs: PositiveInt = 3
    max_steps: NonNegativeInt | None = None  # overrides epochs
    lr: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = 1000  # of linear warm-up, before a linear decay to 0
    weight_decay: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat = 1.0
    eval_steps: PositiveInt = 500  # between evaluations
    save_steps: PositiveInt = 1000
    logging_steps: PositiveInt = 50
    warm_start: bool = True  # begin at a closed-form solution
    patience: PositiveInt | None = None  # evaluations without a better validation loss
    seed: Seed = 42
    resume: PathStr | None = None  # a checkpoint, or "auto": the newest in output.dir

class LossConfig(Table):
    drift_weight: NonNegativeFloat = 0.0
    drift_target: Annotated[float, Field(ge=-1, le=1)] = 1.0

class EvalConfig(Table):
    samples: NonNegativeInt = 100  # rows that are generated; losses use the whole split
    max_new_tokens: PositiveInt = 256
    embedder: PathStr | None = None  # the model that made the embeddings
    split: Literal["train", "val", "test"] | None = None  # of the report; none: test, else val
    bertscore_model: PathStr = "microsoft/deberta-xlarge-mnli"
    bertscore_layers: PositiveInt | None = None

class DeepSpeedConfig(Table, extra="allow"):  # other keys: DeepSpeed's own, at stage 3
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0  # 0 to 3
    zero_optimization: dict[str, Any] | None = None

    @pydantic.model_validator(mode="after")
    def check_keys(self) -> DeepSpeedConfig:
        """Refuse keys that elm sets, misspelled ones, and those that nothing reads."""
        for key in sorted(self.model_fields_set - {"zero_stage"}):
            if key in RESERVED_KEYS or key == "zero_optimization" and "stage" in getattr(self, key):
                raise ValueError(f"{key}: is set by elm, from [train], [model] and zero_stage")
            if key in self.model_extra and (hint := did_you_mean(key, type(self).model_fields)):
                raise ValueError(f"{key}: unknown key{hint}")
            if self.zero_stage < 3:
                raise ValueError(f"{key}: has no effect unless deepspeed.zero_stage = 3")
        return self

class WandbConfig(Table):
    enabled: bool = False
    project: str = "elm-training"
    run_name: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"

class OutputConfig(Table):
    dir: PathStr = "data/checkpoints"
    log_file: PathStr | None = None

class Config(Table):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    eval: EvalConfig = EvalConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    wandb: WandbConfig = WandbConfig()
    output: OutputConfig = OutputConfig()

MESSAGES = {"model_type": "must be a table", "dict_type": "must be a table",
            "tuple_type": "must be a list, in quotes on the command line"}
COMMON_NAMES = {  # of other programs
    "train.lr": "learning_rate", "train.epochs": "num_epochs max_epochs num_train_epochs",
    "train.batch_size": "per_device_train_batch_size", "train.patience": "early_stopping_patience",
    "train.grad_accum": "gradient_accumulation_steps", "train.warmup_steps": "warmup",
    "data.max_seq_length": "max_length max_seq_len", "train.resume": "resume_from_checkpoint",
    "model.grad_checkpoint": "gradient_checkpointing", "model.llm": "model_name_or_path"}

def list_options(kind: type[Table], prefix: str = "") -> dict[str, str]:
    """The fields of a model and its tables: type, default and comment by dotted name."""
    options, source = {}, Path(__file__).read_text("utf-8")
    source = re.search(rf"^class {kind.__name__}\(.*?^$", source, re.MULTILINE | re.DOTALL)[0]
    for name, info in kind.model_fields.items():
        if line := re.search(rf"^    {name}: (.*)$", source, re.MULTILINE):
            options[prefix + name] = line[1]
        if isinstance(info.default, Table):
            options |= list_options(type(info.default), f"{prefix}{name}.")
    return options

def did_you_mean(name: str, names: Iterable[str]) -> str:
    last = name.rpartition(".")[2]
    matches = [n for n in names if last in (n.rpartition(".")[2], *COMMON_NAMES.get(n, "").split())]
    matches = matches or difflib.get_close_matches(name, names, 1, cutoff=0.75)
    return f", did you mean {' or '.join(matches)}?" if matches else ""

def build(kind: type[Table], tables: dict, prefix: str = "") -> Any:
    """Nested dicts as a model. Raises: UserError with one line for each error, all at once, after
    `prefix`."""
    try:
        return kind.model_validate(tables)
    except pydantic.ValidationError as e:
        errors, lines = e.errors(), []
    for error in errors:
        key, message = ".".join(map(str, error["loc"])), error["msg"].replace("True, F", "true, f")
        message = MESSAGES.get(error["type"]) or re.sub("^\\w+ should", "must", message)
        message = message.removeprefix("Value error, ")
        joined = f"{key}.{message}" if re.match("\\w+:", message) else f"{key}: {message}"
        known = [n for n in list_options(kind) if n.count(".") >= key.count(".")]
        line = {"missing": f"{key}: is missing",
                "extra_forbidden": f"{key}: unknown key{did_you_mean(key, known)}",
                "value_error": joined.lstrip(".: "),
                }.get(error["type"], f"{key} = {error['input']!r}: {message}")
        lines.append(f"{prefix}{line}")
    raise UserError("\n".join(lines))

def read_override(text: str) -> tuple[str, Any]:
    """`name=value` as (name, value), the value as TOML has it; a bare word is a string, `none` or
    nothing is None."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text}: an override has the form section.key=value")
    if value.strip() in ("", "none"):
        return name.strip(), None
    with suppress(ValueError, RecursionError):
        return name.strip(), tomllib.loads(f"x = {value}")["x"]
    return name.strip(), value.strip()

def read_toml(path: str | None, over: dict[str, Any]) -> dict[str, dict]:
    """The tables of a TOML file (none: empty ones) under values by dotted name."""
    data = Path(expand_path(path)).read_bytes() if path else b""
    with user_error(f"{path}: not valid TOML"):
        tables = tomllib.loads(data.decode("utf-8-sig"))
    for name, value in over.items():
        *parents, key = name.split(".")
        node = tables
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{name}: {parent} is not a table")
        node[key] = value
    return tables

def load_config(path: str | None = None, overrides: Iterable[str] = (),
                kind: type[Table] = Config) -> Any:
    """A TOML file (none: the defaults) under `section.key=value` overrides, see read_override.
    Raises: UserError with one line for each error."""
    tables = read_toml(path, dict(map(read_override, overrides)))
    return build(kind, tables, f"{path}: " if path else "")

def flat(tables: dict, name: str = "") -> dict[str, Any]:
    """Nested tables by dotted name; {low, high} tables are left nested."""
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

class Runtime(NamedTuple):  # this process among all processes of the run
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    untimed: Any = None  # a process group whose waits have no time limit
    log_file: str | None = None
    quiet: bool = False

    def log(self, message: str) -> None:
        """Print on process 0, above the progress bar, and append to the log file."""
        if self.rank == 0:
            if not self.quiet:
                tqdm.write(message)
                sys.stdout.flush()
            if self.log_file:
                append(Path(self.log_file), f"{time.strftime('%F %T')} {message}\n")

    def progress(self, items: Any, label: str, **options: Any) -> Any:
        """Iterate over `items` with a bar on process 0's terminal."""
        return tqdm(items, label, leave=False, disable=self.rank > 0 or self.quiet or None,
                    **options)

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over all processes, in place: a collective operation."""
        if self.world > 1:
            torch.distributed.all_reduce(x)
        return x

    def on_first(self, compute: Any) -> Any:
        """Return compute() of process 0 on every process, however long it takes, or raise its
        UserError on every process: a collective operation."""
        values = [None, None]
        if self.rank == 0:
            try:
                values[0] = compute()
            except UserError as e:
                values[1] = e
        if self.world > 1:
            torch.distributed.broadcast_object_list(values, group=self.untimed)
        if values[1]:
            raise values[1]
        return values[0]

def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"elm: warning: {message}", sys.stderr)

@contextmanager
def user_error(message: str, kinds: Any = Exception):
    """Raises: UserError, the message and the reason in one line, at an error of `kinds`, but a lack
    of memory: what libraries raise at a user's file or setting is of many kinds."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except kinds as e:
        raise UserError(f"{message}: {shorten(str(e) or repr(e), 300)}") from None

def import_optional(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        raise UserError(f"{e.name} is not installed: pip install {e.name}") from None

def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

def start_runtime(cfg: Config) -> Runtime:
    """Join the process group that the launcher's environment describes, or be one process alone.
    Raises: UserError if it cannot be formed."""
    # The sizes of tensors vary with every step, which fragments fixed segments.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device, dist, world = find_device(), torch.distributed, int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("srun started several tasks without RANK, each of which would be a run of "
                        "its own; start them by torchrun: srun --ntasks-per-node 1 torchrun …")
    if device.type == "cuda":  # a launcher can show each process its own GPU alone
        local_rank = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        torch.cuda.set_device(device := torch.device("cuda", local_rank))
    elif world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if not dist.is_initialized():
        alone = dict(store=dist.HashStore(), rank=0, world_size=1)  # needs no port
        with user_error("the processes cannot connect (is the launcher's --master_port in use?)"):
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                    **(alone if world == 1 else {}))
    untimed = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world > 1 else None
    return Runtime(dist.get_rank(), dist.get_world_size(), device, untimed, cfg.output.log_file)

def writing(path: Path) -> Any:
    message = f"{path}: cannot be written (what was there is unharmed)"
    return user_error(message, (OSError, SafetensorError))

@contextmanager
def atomic_write(path: Path):
    """A temporary path that replaces `path` when complete and on disk. Raises: UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # by the user's umask; safetensors makes files private
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

def append(path: Path, text: str) -> None:
    with writing(path), open(path, "a", encoding="utf-8") as f:
        f.write(text)

def lock(path: Path, wait: bool = False) -> Any:
    """Open `path` exclusively locked until the file is closed or the process ends. Raises:
    UserError if another process holds the lock, unless `wait`."""
    file = open(path, "ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        raise UserError(f"{path}: another process holds it") from None
    return file

def check_new(*paths: Path) -> None:
    """Raises: UserError if a path exists."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already; choose another place or delete it")

def short_hash(data: str | bytes) -> str:
    data = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    return hashlib.sha256(data).hexdigest()[:16]

def read_ahead(make: Any, keys: Any, threads: int):
    """Yield make(key) for each key, in order, computed in threads up to 2 * threads keys ahead."""
    pool, keys = ThreadPoolExecutor(max(1, threads)), iter(keys)
    pending = deque(pool.submit(make, k) for k in islice(keys, 2 * threads + 1))
    try:
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(make, k) for k in islice(keys, 1))
    finally:  # what has not begun is dropped, the rest awaited, but not after Ctrl-C
        wait = sys.exc_info()[0] is not KeyboardInterrupt
        pool.shutdown(wait=wait, cancel_futures=True)

# -----------------------------------------------------------------------------
# Data: rows of text beside a table of vectors

MICRO_TOKENS = dict(cpu=1024, cuda=8192)  # of a micro-batch; see plan_memory
EVAL_ROWS, EVAL_TOKENS = 16, 32768  # the most of a micro-batch in evaluation
ANSWERS_AT_ONCE = dict(cpu=16, cuda=64)
SPLITS = ("train", "val", "test")
PLACEHOLDER = "<EMB>"  # where the vector goes in a query; without it, on a line before the query
ROW = np.dtype([("byte", "i8"), ("line", "i4"), ("vector", "i4"), ("task", "i2"), ("text", "?")])

class Prompt:
    """The LLM's chat template around one user turn: token ids `head` and `tail`, and `end`, which
    ends an answer. Only these parts can hold control tokens; what rows say is split into text."""

    def __init__(self, tokenizer: Any, template: dict[str, Any] | None = None,
                 stored: dict[str, str] | None = None):
        """Render the chat template with keyword arguments `template`; parts that are stored with an
        adapter come before it. Without a chat template: what the tokenizer puts before a text,
        such as a BOS token, and a line break after the query. Raises: UserError if the template
        fails or does not contain the turn once."""
        ids, plain = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (True, False))
        name, head = tokenizer.name_or_path, tokenizer.decode(ids[: ids.index(plain[0])])
        text = dict(head=head, tail="\n", end=tokenizer.eos_token)
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": PLACEHOLDER}]
            with user_error(f"{name}: its chat template fails"):
                render = partial(tokenizer.apply_chat_template, tokenize=False, **(template or {}))
                head, tail = render(chat, add_generation_prompt=True).split(PLACEHOLDER)
                answered = render([*chat, {"role": "assistant", "content": "<ANSWER>"}])
            before = answered.partition(PLACEHOLDER)[2].partition("<ANSWER>")[0]
            if len(before.split()) > len(tail.split()) or tail.rstrip().endswith("<think>"):
                warn(f"{name}: a prompt ends with {tail!r}, but an answer follows {before!r}; "
                     "model.template.enable_thinking = false?")
            after = answered.rpartition("<ANSWER>")[2]  # up to and with its first control token
            control = [t.content for t in tokenizer.added_tokens_decoder.values()]
            ends = [after.index(t) + len(t) for t in control if t.strip() and t in after]
            text |= dict(head=head, tail=tail, end=after[: min(ends)] if ends else text["end"])
        if stored and stored != text:
            warn(f"{name}: its chat template differs from training; the adapter's prompt is used")
        text = stored or text
        if not text["end"]:
            raise UserError(f"{name}: the tokenizer has no token that ends an answer")
        self.tokenizer, self.text, self.template = tokenizer, text, template or {}
        self.head, self.tail, self.end = (
            tokenizer(text[part], add_special_tokens=False)["input_ids"]
            for part in ("head", "tail", "end"))
        # For what rows say: here names such as Qwen3's <think> are special, and so split, too.
        self.plain, added = copy.deepcopy(tokenizer), tokenizer.added_tokens_decoder.values()
        names = [t for t in added if re.fullmatch(r"<.+>|\[.+\]", t.content)]
        self.plain.add_tokens(names, special_tokens=True)
        self.ids([""])  # a fast tokenizer keeps this mode: threads that share it never switch it

    @staticmethod
    def parts(query: str) -> list[str]:
        """[text before, text after] the vector. Raises: UserError at several placeholders."""
        if query.count(PLACEHOLDER) > 1:
            raise UserError(f"{query!r}: a query has one {PLACEHOLDER} at most")
        before, placeholder, after = query.strip().partition(PLACEHOLDER)
        return [before, after] if placeholder else ["", f"\n{before}"]

    def ids(self, texts: list[str]) -> list[list[int]]:
        options = dict(add_special_tokens=False, split_special_tokens=True)
        return self.plain(texts, **options)["input_ids"] if texts else []

class Example(NamedTuple):
    ids: np.ndarray  # int64, -1 where soft tokens go
    num_labels: int  # response tokens, the end token included: the last of ids
    truncated: bool  # the response, or the text

def tokenize(prompt: Prompt, rows: list[tuple[str, Row]], num_soft: int, max_tokens: int,
             source: Literal["embedding", "text", "response"] = "embedding") -> list[Example]:
    """(name for messages, row) pairs as examples: by "embedding" [before, num_soft times -1,
    after, response, end]; by "text" the text in place of these; "response" alone. Raises: UserError
    if a prompt leaves no room for a response."""
    texts = [part for _, row in rows for part in (
        *prompt.parts(row.query), row.response, (row.text or "") * (source == "text"))]
    tokens, examples = iter(prompt.ids(texts)), []
    for name, _ in rows:
        before, after, response, text = islice(tokens, 4)
        before, after = prompt.head + before, after + prompt.tail
        room = max_tokens - len(before) - len(after) - num_soft
        if room < 1:
            raise UserError(f"{name}: the prompt takes all of data.max_seq_length = {max_tokens} "
                            f"tokens, {1 - room} more are needed")
        answer = (response + prompt.end)[:room]
        left = room + num_soft - len(answer)
        middle = text[:left] if source == "text" else [-1] * num_soft
        ids = answer if source == "response" else before + middle + after + answer
        truncated = len(response + prompt.end) > room or len(text) > left
        examples.append(Example(np.array(ids, np.int64), len(answer), truncated))
    return examples

def make_micro_batches(lengths: Any, num_processes: int, budget: int) -> list[list[int]]:
    """Distribute examples of `lengths` tokens by longest-processing-time bin packing over the
    fewest micro-batches, a multiple of num_processes, so that none of several examples exceeds
    `budget` tokens. Some may be empty."""
    lengths = np.asarray(lengths)
    fewest = max(1, math.ceil(int(lengths.sum()) / (num_processes * budget)))
    for num_bins in count(fewest * num_processes, num_processes):
        load, micros = np.zeros(num_bins, np.int64), [[] for _ in range(num_bins)]
        for i in np.argsort(-lengths, kind="stable"):
            micros[load.argmin()].append(int(i))
            load[load.argmin()] += lengths[i]
        if all(len(m) < 2 or total <= budget for m, total in zip(micros, load, strict=True)):
            return [sorted(m) for m in micros]

def collate(examples: list[Example], embeddings: Tensor | None = None) -> dict:
    """Pack n examples end to end, T tokens, without padding. int64 unless said otherwise:
        input_ids, position_ids [T]; cu_seqlens [n + 1] int32; placeholder_positions [n * K]
        labels [R]; logit_positions [R], which predict them
        lengths, num_labels: n ints each; embeddings [n, E] if given"""
    lengths, num_labels = [len(e.ids) for e in examples], [e.num_labels for e in examples]
    ids, ends = np.concatenate([e.ids for e in examples]), np.cumsum(lengths)
    answers = [np.arange(end - k, end) for end, k in zip(ends, num_labels, strict=True)]
    answers = np.concatenate(answers)  # positions in ids
    batch = dict(input_ids=ids.clip(0), position_ids=np.concatenate([*map(np.arange, lengths)]),
                 cu_seqlens=np.r_[0, ends].astype(np.int32), labels=ids[answers],
                 logit_positions=answers - 1, placeholder_positions=np.flatnonzero(ids < 0))
    batch = {k: torch.from_numpy(v) for k, v in batch.items()}
    batch |= {} if embeddings is None else dict(embeddings=embeddings)
    if torch.cuda.is_available():  # so that the copy to the device does not wait
        batch = {k: v if v.is_cuda else v.pin_memory() for k, v in batch.items()}
    return batch | dict(lengths=lengths, num_labels=num_labels)

def open_vectors(path: Path) -> Tensor:
    """The one table [N, E] of floats of a safetensors or .npy file, mapped. Raises: UserError."""
    with user_error(f"{path}: not a whole table"):
        if path.suffix == ".npy":
            tensors = [torch.from_numpy(np.load(path, mmap_mode="c"))]  # torch warns of read-only
        else:
            with safe_open(path, framework="pt") as f:
                tensors = [f.get_tensor(k) for k in f.keys()]
    floats = torch.float32, torch.float16, torch.bfloat16, torch.float64
    if [t.ndim * (t.numel() > 0) * (t.dtype in floats) for t in tensors] != [2]:
        found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors[:3])
        raise UserError(f"{path}: holds {found or 'nothing'}, not one table [N, E] of floats")
    return tensors[0]

def scan_vectors(vectors: Tensor, used: Tensor, path: Path) -> tuple[dict, np.ndarray]:
    """(mean, std [E] and norms [3] fp32 of the `used` vectors, [N] bool: least, root mean square,
    greatest; for each vector the index of its first copy [N]). A dimension without spread, below
    1 % of the typical deviation, gets that. Raises: UserError at a NaN, infinite or zero vector."""
    total, norms = torch.zeros(2, vectors.shape[1], dtype=torch.float64), []
    first, copies = {}, []
    for chunk, mask in zip(vectors.split(2048), used.split(2048), strict=True):
        square = chunk.double().square()
        norm = square.sum(1).sqrt()
        if len(invalid := (~norm.isfinite() | (norm == 0)).nonzero()):
            i = len(copies) + int(invalid[0])
            raise UserError(f"{path}: vector {i} is zero, NaN or infinite; embed its text again")
        for row in chunk.contiguous().view(torch.uint8).numpy():
            copies.append(first.setdefault(hash(row.tobytes()), len(copies)))
        total += torch.stack([chunk[mask].double().sum(0), square[mask].sum(0)])
        norms += norm[mask].tolist()
    mean, square = total / max(1, int(used.sum()))
    std = (square - mean.square()).clamp(min=0).sqrt().float()
    typical = std.square().mean().sqrt()
    std[std < 0.01 * typical] = typical
    norms = torch.tensor([min(norms), square.sum().sqrt(), max(norms)]).float()
    return {"mean": mean.float(), "std": std, "norms": norms}, np.array(copies)

class Row(BaseModel, frozen=True, strict=True, extra="allow"):
    task_type: str
    embedding_file_idx: Annotated[NonNegativeInt, pydantic.BeforeValidator(
        lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)]  # 3.0, as of pandas
    query: str
    response: Annotated[str, Field(pattern=r"\S")]  # not empty
    text: str | None = None  # what was embedded

def parse_line(kind: type[BaseModel], line: bytes) -> Any:
    """A model from a line of JSON. Raises: ValueError, which names the field."""
    try:
        return kind.model_validate_json(line.removeprefix(codecs.BOM_UTF8))
    except pydantic.ValidationError as e:
        error = e.errors()[0]
        name = f"field {error['loc'][0]!r}: " if error["loc"] else ""
        message = "is empty" if error["type"] == "string_pattern_mismatch" else error["msg"]
        raise ValueError(name + message) from None

def parse_row(line: bytes, tasks: tuple[str, ...], num_vectors: int) -> Row | None:
    """A checked row of one line of JSON; None for a pair task. Raises: ValueError."""
    if (pair := PAIR_ROW.search(line)) and pair[1].decode() not in tasks:
        parse_line(pydantic.RootModel[dict], line)  # broken JSON is refused here, too
        return None
    row = parse_line(Row, line)
    if row.task_type not in (known := (*tasks, *QUERIES)):
        raise ValueError(f"unknown task_type {row.task_type!r}{did_you_mean(row.task_type, known)}")
    if row.embedding_file_idx >= num_vectors:
        raise ValueError(f"embedding_file_idx {row.embedding_file_idx} of {num_vectors} vectors")
    Prompt.parts(row.query)
    return row

def read_rows(path: Path, tasks: tuple[str, ...], num_vectors: int, counts: Counter):
    """Yield (line, byte, row) for each row of `tasks`; count all rows. Raises: UserError that
    names the line."""
    byte = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = parse_row(line, tasks, num_vectors) if line.strip() else None
            except ValueError as e:
                raise UserError(f"{path}:{number}: {e}") from None
            if row and row.task_type in tasks:
                counts["rows"] += 1
                yield number, byte, row
            elif line.strip():
                counts["other_tasks" if row else "pair_tasks"] += 1
            byte += len(line)
    if not counts["rows"]:
        hint = "".join(did_you_mean(task, TASKS) for task in tasks if task not in TASKS)
        raise UserError(f"{path}: no row of data.tasks = {list(tasks)}{hint}")

@dataclass(frozen=True, eq=False)
class Split:  # of a data set, opened
    path: Path  # of its rows
    rows: np.ndarray  # [N] of ROW: where each row stands, its vector and task
    vectors: Tensor  # [number of vectors, E], memory-mapped
    statistics: dict[str, Tensor]  # mean and std [E], and norms, of the vectors that rows use
    counts: dict[str, int]
    prompt: Prompt
    num_soft: int
    data: DataConfig  # whose tasks `task` of ROW counts

    def read(self, indices: Any) -> list[Row]:
        with open(self.path, "rb") as f:
            return [parse_row(f.readline(), self.data.tasks, len(self.vectors)) for i in indices
                    if f.seek(int(self.rows["byte"][i])) >= 0]

    def examples(self, indices: Any, source: str = "embedding") -> list[Example]:
        rows = [(self.path, row) for row in self.read(indices)]  # whose prompts fit
        return tokenize(self.prompt, rows, self.num_soft, self.data.max_seq_length, source)

    def embeddings(self, vector_ids: np.ndarray) -> Tensor:
        """[n] indices into the table -> [n, E] fp32."""
        return self.vectors[torch.from_numpy(vector_ids.astype(np.int64))].float()

def max_bytes(text: str) -> int:  # of the text, or of what a tokenizer's NFC or NFKC makes of it
    return max(len(t.encode()) for t in (text, unicodedata.normalize("NFKD", text)))

def split_paths(data: DataConfig, split: str) -> list[Path]:  # of the vectors, of the rows
    table = Path(data.dir, "embeddings", f"{split}_embeddings.safetensors")
    table = table if table.exists() or not (npy := table.with_suffix(".npy")).exists() else npy
    return [table, Path(data.dir, "synthesis", f"{split}_synthesis.jsonl")]

def open_split(data: DataConfig, split: str, prompt: Prompt, num_soft: int, rt: Runtime) -> Split:
    """Parse and check every row and vector. Only prompts and responses that could exceed
    max_seq_length, a token being at least a byte, are tokenised. Raises: UserError."""
    vectors_path, path = split_paths(data, split)
    vectors, counts, chunks = open_vectors(vectors_path), Counter(), []
    room = data.max_seq_length - num_soft - len(prompt.head + prompt.tail + prompt.end) - 8
    rows = read_rows(path, data.tasks, len(vectors), counts)
    rows = iter(rt.progress(rows, f"reading {split}", unit=" rows"))
    while chunk := list(islice(rows, 8192)):
        chunks.append(np.array([(byte, line, row.embedding_file_idx,
                                 data.tasks.index(row.task_type), bool(row.text))
                                for line, byte, row in chunk], ROW))
        long = [(f"{path}:{line}", row) for line, _, row in chunk
                if max_bytes(row.query + row.response) > room]  # 8: a space before each part
        examples = tokenize(prompt, long, num_soft, data.max_seq_length)
        counts["responses_cut"] += sum(e.truncated for e in examples)
    table, used = np.concatenate(chunks), np.zeros(len(vectors), bool)
    used[table["vector"]] = True
    statistics, copies = scan_vectors(vectors, torch.from_numpy(used), vectors_path)
    table["vector"] = copies[table["vector"]]  # rows of equal vectors are rows of one
    return Split(path, table, vectors, statistics, dict(counts), prompt, num_soft, data)

def shuffled_vectors(split: Split) -> np.ndarray:
    """[N] for each row a vector that is not its own, the same for rows of one vector."""
    used, inverse = np.unique(split.rows["vector"], return_inverse=True)
    order = np.random.default_rng(0).permutation(len(used))
    other = np.empty_like(used)
    other[order] = used[np.roll(order, 1)]
    return other[inverse]

def step_rows(num_rows: int, seed: int, size: int, epoch: int, position: int):
    """Yield without end (epoch, position after the step, row indices) of the steps from `position`
    rows into `epoch` on, a function of these numbers alone."""
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        for start in range(position, num_rows, size):
            yield epoch, min(start + size, num_rows), order[start : start + size]
        epoch, position = epoch + 1, 0

class Step(NamedTuple):
    epoch: int
    position: int  # rows of the epoch that are done after the step
    rows: np.ndarray  # indices, over all processes
    counts: dict[str, int]  # of rows, labels and tokens, over all processes
    micros: list[tuple[float, dict]]  # this process's (weight, batch)

def prepare_step(split: Split, budget: int, rt: Runtime, step: tuple) -> Step:
    """Tokenise and pack a step of step_rows. A process without rows repeats one at weight 0:
    ZeRO 3 needs equally many passes on every process."""
    epoch, position, rows = step
    examples = split.examples(rows)
    lengths = [len(e.ids) for e in examples]
    micros = make_micro_batches(lengths, rt.world, budget)[rt.rank :: rt.world]
    counts = dict(rows=len(rows), labels=sum(e.num_labels for e in examples), tokens=sum(lengths))
    batches = [(float(bool(m)), collate([examples[i] for i in m or [0]],
                                        split.embeddings(split.rows["vector"][rows[m or [0]]])))
               for m in micros]
    return Step(epoch, position, rows, counts, batches)

# -----------------------------------------------------------------------------
# Model: the adapter, and the frozen LLM with the vector spliced in

class Adapter(nn.Module):
    """norm(W2 gelu(W1 x + b1) + b2 + residual), x the standardised embedding: [n, E] -> [n, K, D].
    The residual, times residual_scale, is x itself where E = D and else a linear map of it without
    bias. The norm is an RMSNorm times `scale`, the root mean square of the LLM's token embeddings,
    so that a fresh adapter's output has their scale. Buffers are saved, not trained."""

    def __init__(self, d_emb: int, hidden_dim: int, d_llm: int, tokens: int = 1,
                 dropout: float = 0.0, residual_scale: float = 1.0):
        super().__init__()
        self.settings = dict(d_emb=d_emb, hidden_dim=hidden_dim, d_llm=d_llm, tokens=tokens,
                             residual_scale=residual_scale)
        self.dropout = dropout
        self.fc1 = nn.Linear(d_emb, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, tokens * d_llm)
        self.residual = nn.Identity() if d_emb == d_llm else nn.Linear(d_emb, d_llm, bias=False)
        self.norm = nn.RMSNorm(d_llm, eps=1e-6)
        self.register_buffer("mean", torch.zeros(d_emb))
        self.register_buffer("std", torch.ones(d_emb))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("norms", torch.full((3,), torch.nan))  # see check_norm

    def standardize(self, embeddings: Tensor) -> Tensor:
        return (embeddings.float() - self.mean) / self.std.clamp(min=1e-6)

    def forward(self, embeddings: Tensor) -> Tensor:
        x = self.standardize(embeddings)
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        out = self.fc2(hidden).unflatten(-1, (self.settings["tokens"], -1))
        residual = self.settings["residual_scale"] * self.residual(x)[..., None, :]
        return self.norm(out + residual) * self.scale

    @staticmethod
    def load(path: str | Path) -> tuple[Adapter, dict[str, Any]]:
        """The adapter of a file, of the folder of a run, or of a repository on the hub, in eval
        mode on the CPU, and its metadata. Raises: UserError."""
        if Path(path).is_dir():  # of a run
            path = Path(path, "adapter_best.safetensors")
        elif Path(path).suffix != ".safetensors" and not Path(path).exists():  # on the hub
            with user_error(f"adapter: there is no {path} here, nor can it be loaded from the hub"):
                path = huggingface_hub.hf_hub_download(str(path), "adapter_best.safetensors")
        with user_error(f"{path}: not a whole elm adapter"):
            with safe_open(path, framework="pt") as f:
                metadata = json.loads((f.metadata() or {}).get("elm", "{}"))
                state = {k: f.get_tensor(k) for k in f.keys()}
            adapter = Adapter(**metadata["adapter"])
            adapter.load_state_dict(state)
        return adapter.eval(), metadata

def check_identity(trained: dict[str, Any], current: dict[str, Any], where: Any) -> None:
    """Raises: UserError that names the first property in `current` that differs from training."""
    for key, value in current.items():
        if value != trained.get(key):
            raise UserError(f"{where}: {key} was {trained.get(key)} in training and is {value} "
                            "here; give it what it was trained with")

def check_norm(trained: Tensor, norm: float, where: Any) -> None:
    """Raises: UserError if a root mean square norm is far from the `trained` norms: least, root
    mean square and greatest, or NaN if they are unknown."""
    low, mean, high = trained.tolist()
    if norm < low / 1.5 or norm > high * 1.5:  # of no vectors it is NaN
        name = "the vectors' norm"
        check_identity({name: f"{mean:.4g}"}, {name: f"{norm:.4g}"}, where)

def check_vectors(embeddings: Any, adapter: Adapter, where: Any = "vectors",
                  rows: Iterable[int] | None = None) -> Tensor:
    """[n, E] or [E], numpy or torch -> [n, E] fp32. Raises: UserError at another width, a row that
    is zero, NaN or infinite, or a norm far from those of training."""
    vectors, width = torch.atleast_2d(torch.as_tensor(embeddings)).float(), len(adapter.mean)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise UserError(f"{where}: {list(vectors.shape)}, but the adapter reads [n, {width}]")
    if len(invalid := (~vectors.isfinite().all(1) | ~vectors.any(1)).nonzero()):
        row = list(rows or range(len(vectors)))[int(invalid[0])]
        raise UserError(f"{where}: row {row} is zero, NaN or infinite; embed its text again")
    check_norm(adapter.norms, vectors.square().sum(1).mean().sqrt().item(), where)
    return vectors

def packed_attention(module, query, key, value, attention_mask, scaling=None, lengths=None,
                     cu_seqlens=None, sliding_window=None, softcap=None, s_aux=None, **_):
    """Causal attention within each example of a packed row, `lengths` tokens each:
    [1, heads, T, d] -> [1, T, heads, d]. By torch.split: the backward pass of a slice would
    allocate zeros of the whole row. Raises: ValueError at attention sinks, as of gpt-oss."""
    if s_aux is not None:
        raise ValueError("its attention has sinks")
    groups, d = query.shape[1] // key.shape[1], query.shape[-1]
    if (query.is_cuda and not torch.version.hip and query.dtype.itemsize == 2 and d % 8 == 0
            and d <= 256 and not softcap):
        from torch.nn.attention.varlen import varlen_attn
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11: implied
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max(lengths), max(lengths),
                           scale=scaling, window_size=((sliding_window or 0) - 1, 0),
                           **(dict(enable_gqa=groups > 1) if grouped else {}))[None], None
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    outs = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True):
        t = q.shape[2]
        window = sliding_window or t
        if t <= window and not softcap:
            outs.append(F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=True))
            continue
        visible = torch.ones(t, t, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        scores = q.float() @ k.float().mT * (d**-0.5 if scaling is None else scaling)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        outs.append(scores.masked_fill(~visible, -math.inf).softmax(-1).to(v.dtype) @ v)
    return torch.cat(outs, dim=2).transpose(1, 2), None

# transformers makes no mask for a name that it has no mask function for, so no O(T^2) one either.
transformers.AttentionInterface.register("elm_packed", packed_attention)

@contextmanager
def temporarily_set(owner: Any, name: str, value: Any):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)

def packing(llm: Any) -> Any:
    return temporarily_set(llm.config, "_attn_implementation", "elm_packed")

@contextmanager
def loading(name: str, key: str):
    """Announce a download. Raises: UserError that names the config key if loading `name` fails."""
    logging, bar = transformers.logging, key.endswith("llm")  # one bar: the LLM's
    (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
    logging.set_verbosity_error()  # no table of what a headless model leaves out
    with user_error(f"{key}: cannot load {name}"):
        here = Path(name).is_dir() or huggingface_hub.try_to_load_from_cache(name, "config.json")
        if not here and not huggingface_hub.is_offline_mode():
            warn(f"{key}: {name} is not on this machine yet; it is downloaded from the hub")
        yield

def load_pretrained(auto: Any, name: str, key: str, **options: Any) -> Any:
    with loading(name, key):
        return auto.from_pretrained(name, trust_remote_code=False, **options)

def load_llm(name: str, device: torch.device, bf16: bool, key: str = "model.llm",
             options: DeepSpeedConfig | None = None) -> Any:
    """The frozen LLM in eval mode. At ZeRO stage 3 its parameters are shared out among the
    processes as they are created, so that none ever holds the whole LLM. Raises: UserError."""
    dtype, cuda = torch.bfloat16 if bf16 else torch.float32, device.type == "cuda"
    if cuda and bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"model.bf16: not on {torch.cuda.get_device_name()}, set model.bf16=false")

    def load() -> Any:
        llm, info = load_pretrained(transformers.AutoModelForCausalLM, name, key, dtype=dtype,
                                    output_loading_info=True)
        if info["missing_keys"]:  # transformers would draw them at random
            raise UserError(f"{key}: {name} lacks the weights {sorted(info['missing_keys'])[:3]}")
        return llm.eval().requires_grad_(False)

    if not options or options.zero_stage < 3:
        return load().to(device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = import_optional("deepspeed")
    # DeepSpeed would compile its shared-memory op for CPUs at first use: a minute, a C++ compiler,
    # and a lock that hangs every later run if the build is killed. gloo is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    from transformers.integrations import deepspeed as integration
    zero = {**options.model_extra, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": bf16},
            "zero_optimization": {**(options.zero_optimization or {}), "stage": 3}}
    # What transformers reads of accelerate's HfDeepSpeedConfig, by a weak reference.
    shared = type("Zero3", (), dict(config=zero, is_zero3=lambda _: True))()
    integration.set_hf_deepspeed_config(shared)
    try:
        llm = load()
    finally:
        integration.unset_hf_deepspeed_config()
    # Not the LLM itself: DeepSpeed takes each forward pass of its top module for a new step, which
    # fails where processes generate answers of different lengths. This one's is never called.
    deepspeed.initialize(model=nn.ModuleDict({"llm": llm}), config=zero)
    for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        module.weight.is_external_param = True  # stays gathered over the chunks of the logits
    return llm

def release(llm: Any) -> None:
    """Free the LLM's memory for the models that score its answers."""
    for p in llm.parameters():
        for tensor in (p, getattr(p, "ds_tensor", p)):  # of ZeRO 3
            tensor.data = tensor.data.new_empty(0)
    torch.cuda.empty_cache()

@torch.no_grad()
def fingerprint(llm: Any) -> dict[str, str]:
    """A hash, under its name, over 16 to 31 numbers spread over every parameter, in bf16, so that
    it is the same for any dtype. A collective operation under ZeRO 3."""
    sample = []
    for p in llm.parameters():
        zero = import_optional("deepspeed").zero if hasattr(p, "ds_id") else None
        with zero.GatheredParameters(p) if zero else nullcontext():
            sample.append(p.flatten()[:: max(1, p.numel() // 16)].bfloat16().float())  # no view
    return {"hash of the LLM's weights": short_hash(torch.cat(sample).cpu().numpy().tobytes())}

@torch.no_grad()
def fresh_adapter(llm: Any, statistics: dict[str, Tensor], standardize: bool = True,
                  **settings: Any) -> Adapter:
    """An untrained adapter from vectors of these statistics to the LLM's token embeddings, which
    give its output's width and root mean square."""
    embed = llm.get_input_embeddings()
    ids = torch.linspace(0, embed.num_embeddings - 1, 4096, device=embed.weight.device).long()
    rows = embed(ids).float()
    adapter = Adapter(len(statistics["mean"]), d_llm=rows.shape[1], **settings)
    buffers = statistics if standardize else {"norms": statistics["norms"]}
    adapter.load_state_dict(buffers | {"scale": rows.square().mean().sqrt()}, strict=False)
    return adapter

class ELM(nn.Module):
    """A frozen LLM and the adapter that lets it read vectors."""

    def __init__(self, llm: Any, adapter: Adapter, prompt: Prompt | None = None):
        super().__init__()
        self.llm, self.adapter, self.prompt = llm, adapter, prompt
        self.identity = fingerprint(llm) | adapter.settings  # what `load` and resumes compare
        # Under ZeRO 3 all processes must run equally many passes through the LLM.
        partitioned = hasattr(llm.get_input_embeddings().weight, "ds_id")
        self.lockstep = partitioned and torch.distributed.get_world_size() > 1
        llm.train = lambda mode=True: llm  # frozen: it stays in eval mode, without dropout

    @staticmethod
    def load(path: str | Path, llm: str | None = None, bf16: bool | None = None,
             options: DeepSpeedConfig | None = None) -> ELM:
        """The adapter of a file with the LLM that it names, or the same one at `llm`.
        Raises: UserError if that is not the LLM it was trained for."""
        adapter, metadata = Adapter.load(path)
        with user_error(f"{path}: does not say which LLM it was trained for"):
            origin, stored, identity = (metadata[k] for k in ("llm", "prompt", "identity"))
            name, bf16 = llm or origin["name"], origin["bf16"] if bf16 is None else bf16
        tokenizer = load_pretrained(transformers.AutoTokenizer, name, "llm")
        model = load_llm(name, device := find_device(), bf16, "llm", options)
        elm = ELM(model, adapter.to(device)).eval()
        check_identity(identity, elm.identity, f"{path}: {name}")
        with user_error(f"{path}: its prompt cannot be used"):
            elm.prompt = Prompt(tokenizer, origin["template"], stored)
        return elm

    @staticmethod
    def create(llm: str, embeddings: Any, bf16: bool = True, hidden_dim: int = 4096,
               template: dict[str, Any] | None = None, **settings: Any) -> ELM:
        """A fresh adapter, with further `settings` of Adapter, for vectors like `embeddings`
        [n, E], numpy or torch, which it standardises by their mean and deviation; the chat
        template takes the keyword arguments `template`."""
        vectors = torch.as_tensor(embeddings).float()
        if vectors.ndim != 2 or not len(vectors):
            raise UserError(f"embeddings: {list(vectors.shape)}, not vectors [n, E]")
        used, device = torch.ones(len(vectors), dtype=torch.bool), find_device()
        statistics, _ = scan_vectors(vectors, used, "embeddings")
        tokenizer = load_pretrained(transformers.AutoTokenizer, llm, "llm")
        prompt, model = Prompt(tokenizer, template), load_llm(llm, device, bf16, "llm")
        adapter = fresh_adapter(model, statistics, hidden_dim=hidden_dim, **settings)
        check_llm(elm := ELM(model, adapter.to(device), prompt))
        return elm

    def save(self, path: str | Path, state: dict | None = None, **metadata: Any) -> None:
        """Write the adapter, or a `state` of it, as safetensors for `load`. Raises: UserError."""
        state = state or self.adapter.state_dict()
        tensors = {k: v.detach().float().cpu() for k, v in state.items()}
        origin = dict(name=self.llm.name_or_path, bf16=self.llm.dtype == torch.bfloat16,
                      template=self.prompt.template)
        about = dict(adapter=self.adapter.settings, llm=origin, prompt=self.prompt.text,
                     identity=self.identity) | metadata
        with atomic_write(Path(path)) as temporary:  # safetensors keeps no order of several entries
            save_file(tensors, temporary, {"elm": json.dumps(about)})

    @property
    def device(self) -> torch.device:
        return self.adapter.scale.device

    def forward(self, embeddings: Tensor) -> Tensor:
        """[n, E] -> soft tokens [n, K, D] fp32."""
        return self.adapter(embeddings.to(self.device, non_blocking=True))

    def lm_head(self, hidden: Tensor) -> Tensor:
        """[R, D] -> logits [R, V] as this LLM computes them, with its caps and scales: its own
        forward pass, in which `hidden` stands in for the output of the backbone."""
        backbone = self.llm.base_model
        backbone.forward = lambda *_, **__: self.output(last_hidden_state=hidden[None])
        try:
            return self.llm(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            del backbone.forward

    def forward_hidden(self, batch: dict, soft: Tensor | None = None) -> tuple[Tensor, dict]:
        """A batch of collate, and soft tokens [n, K, D] if it has placeholders -> the LLM's last
        hidden states [T, D], and the batch on the device."""
        batch = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v
                 for k, v in batch.items()}
        with torch.no_grad():
            embeds = self.llm.get_input_embeddings()(batch["input_ids"])
        if soft is not None:  # out of place: any id stands there, and its embedding is replaced
            soft = soft.flatten(0, 1).to(embeds.dtype)
            embeds = embeds.index_copy(0, batch["placeholder_positions"], soft)
        with packing(self.llm):  # with a cache, transformers would not see that the row is packed
            out = self.llm.base_model(
                inputs_embeds=embeds[None], position_ids=batch["position_ids"][None],
                lengths=batch["lengths"], cu_seqlens=batch["cu_seqlens"], use_cache=False)
        self.output = type(out)
        return out.last_hidden_state[0], batch

    def sequence_nll(self, hidden: Tensor, batch: dict) -> Tensor:
        """What forward_hidden returns -> each response's summed token cross-entropy [n] fp32."""
        hidden = hidden.index_select(0, batch["logit_positions"])
        num_logits = len(hidden) * self.llm.config.get_text_config().vocab_size
        chunks = torch.tensor(math.ceil(num_logits / CHUNK_LOGITS[hidden.device.type]))
        if self.lockstep:  # ZeRO 3 gathers the head for each chunk: as often on every process
            torch.distributed.all_reduce(chunks, torch.distributed.ReduceOp.MAX)
        losses = ChunkedCrossEntropy.apply(hidden, batch["labels"], self.lm_head, int(chunks))
        return torch.stack([x.sum() for x in losses.split(batch["num_labels"])])

    def nll(self, batch: dict) -> Tensor:
        """[n] fp32 of a batch of collate, by its embeddings if it has them."""
        soft = self(batch["embeddings"]) if "embeddings" in batch else None
        return self.sequence_nll(*self.forward_hidden(batch, soft))

    def loss(self, embeddings: Any, queries: str | list[str], responses: list[str],
             max_tokens: int = 2048) -> Tensor:
        """Mean cross-entropy over all response tokens of vectors [n, E], numpy or torch, one query
        or n, and n responses: a scalar with its graph, from one packed pass. Raises: UserError."""
        vectors = check_vectors(embeddings, self.adapter)
        pairs = zip(expand(queries, len(vectors)), expand(responses, len(vectors)), strict=True)
        rows = [(f"pair {i}", Row.model_construct(query=q, response=r))
                for i, (q, r) in enumerate(pairs)]
        examples = tokenize(self.prompt, rows, self.adapter.settings["tokens"], max_tokens)
        batch = collate(examples, vectors)
        return self.nll(batch).sum() / len(batch["labels"])

    @torch.no_grad()
    def prompt_embeds(self, embeddings: Any, query: str | list[str]) -> Tensor | list[Tensor]:
        """[E] and a query -> [T, D] in the LLM's dtype, the prompt with the vector in its place;
        [n, E] and one query or n -> a list of n. Raises: UserError."""
        vectors = check_vectors(embeddings, self.adapter)
        embed, prompts = self.llm.get_input_embeddings(), []
        with temporarily_set(self.adapter, "training", False):
            softs = self(vectors)
        for soft, text in zip(softs, expand(query, len(vectors)), strict=True):
            before, after = self.prompt.ids(self.prompt.parts(text))
            before, after = (embed(torch.tensor(ids, dtype=torch.long, device=self.device))
                             for ids in (self.prompt.head + before, after + self.prompt.tail))
            prompts.append(torch.cat([before, soft.to(before.dtype), after]))
        return prompts[0] if np.ndim(embeddings) == 1 else prompts

    @torch.no_grad()
    def generate(self, embeddings: Any, query: str | list[str], max_new_tokens: int = 256,
                 batch_size: int = 16, **options: Any) -> list[str]:
        """[n, E] or [E], numpy or torch, and one query or n -> n answers; greedy, unless `options`
        of the LLM's own `generate` say otherwise. Raises: UserError."""
        vectors, answers = check_vectors(embeddings, self.adapter), []
        queries = expand(query, len(vectors))
        for i in range(0, len(vectors), batch_size):
            part = slice(i, i + batch_size)
            prompts = self.prompt_embeds(vectors[part], queries[part])
            answers += [text for text, _ in generate_batch(
                self.llm, self.prompt, prompts, max_new_tokens, synced_gpus=self.lockstep,
                **options)]
        return answers

def generate_batch(llm: Any, prompt: Prompt, prompts: list[Tensor], max_new_tokens: int,
                   **options: Any) -> list[tuple[str, bool]]:
    """n prompts [T, D] of any lengths -> (answer, whether the LLM ended it) of each; greedy, unless
    `options` of the LLM's own `generate` say otherwise, as a temperature does. Raises: UserError if
    a prompt leaves no room for an answer."""
    if (longest := max(map(len, prompts))) >= max_positions(llm):
        raise UserError(f"a prompt has {longest} tokens: the LLM reads {max_positions(llm)}")
    end, eos = prompt.end[-1], llm.generation_config.eos_token_id  # none, one or several
    ends = {end, *(eos if isinstance(eos, list) else [eos])} - {None}
    options = dict(eos_token_id=sorted(ends), pad_token_id=end, tokenizer=prompt.tokenizer,
                   do_sample=not {"temperature", "top_p", "top_k"}.isdisjoint(options)) | options
    # Greedy is greedy whatever the LLM's generation_config.json says; sampling is as that says.
    config = llm.generation_config if options["do_sample"] else transformers.GenerationConfig()
    mask = [torch.ones_like(p[:, 0], dtype=torch.long) for p in prompts]
    left = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    max_new_tokens = min(max_new_tokens, max_positions(llm) - longest)
    with temporarily_set(llm, "generation_config", config):
        out = llm.generate(inputs_embeds=left(prompts), attention_mask=left(mask),
                           max_new_tokens=max_new_tokens, **options).tolist()
    answers = [[*takewhile(lambda t: t not in ends, ids)] for ids in out]
    texts = prompt.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text, len(a) < len(b)) for text, a, b in zip(texts, answers, out, strict=True)]

def expand(texts: str | list[str], n: int) -> list[str]:
    texts = [texts] * n if isinstance(texts, str) else texts
    if len(texts) != n:
        raise UserError(f"{len(texts)} queries or responses for {n} vectors")
    return texts

def max_positions(llm: Any) -> int:  # that it reads
    return getattr(llm.config.get_text_config(), "max_position_embeddings", None) or 2**31

@torch.no_grad()
def check_llm(elm: ELM, max_tokens: int = 0) -> None:
    """Compare the losses of two packed prompts with those that each has alone by the LLM's own
    attention, see that neither depends on the prompt's last token, and generate a token. Raises:
    UserError if the LLM lets tokens interact other than by causal attention, or fails, or cannot
    read max_tokens."""
    if max_tokens > (limit := max_positions(elm.llm)):
        raise UserError(f"data.max_seq_length = {max_tokens}: the LLM reads {limit}")
    embed, rounding = elm.llm.get_input_embeddings(), 2e-2 if elm.llm.dtype.itemsize == 2 else 1e-4
    ids = torch.arange(46) % embed.num_embeddings
    other = ids.index_copy(0, torch.tensor([19, 45]), ids[[18, 44]])  # the last token of each
    with user_error(f"model.llm: {type(elm.llm).__name__} cannot be used, as rows are packed and "
                    "prompts are embeddings"):
        batch = collate([Example(p, len(p) - 4, False) for p in np.split(ids.numpy(), [20])])
        losses = torch.stack([elm.nll(batch | dict(input_ids=x)) for x in (ids, other)]).T.tolist()
        for pair, part in zip(losses, (slice(20), slice(20, 46)), strict=True):
            logits = [elm.llm(input_ids=x[None, part].to(elm.device), use_cache=False).logits[0]
                      for x in (ids, other)]
            alone = [F.cross_entropy(x[3:-1].float().cpu(), ids[part][4:], reduction="sum").item()
                     for x in logits]
            for a, b, share in (*pair, 0.05), (*alone, 0.05), (pair[0], alone[0], 1.0):
                if not math.isclose(a, b, rel_tol=share * rounding):  # some MoE sum in any order
                    raise ValueError(f"its attention is more than causal ({a}, not {b})")
        prompt = 1.5 * embed(ids[:20].to(elm.device))  # as soft tokens, it is not in the table
        generate_batch(elm.llm, elm.prompt, [prompt], 1)

def recompute_layers(llm: Any, count: int) -> None:
    """Recompute the last `count` layers in the backward pass instead of keeping their activations.
    By hand: the layers' own switch needs train mode, in which they would drop out."""
    layers = [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:  # of an LLM that was trained through before
        layer.__dict__.pop("forward", None)
    for layer in layers[len(layers) - count :]:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), packing(llm)))

# -----------------------------------------------------------------------------
# Losses: terms that are summed over examples, and their gradient at the soft tokens

CHUNK_LOGITS = dict(cpu=2**24, cuda=2**25)  # logits that exist at once

class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy [R] fp32 of head(hidden) [R, V] at labels [R], hidden [R, D], in `chunks`
    parts, each with its gradient in the forward pass, so that only one part's logits ever exist."""

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
        (at_hidden,) = ctx.saved_tensors
        return (gradient[:, None] * at_hidden).to(at_hidden.dtype), None, None, None

class Probe(NamedTuple):  # ridge map from hidden states of a response to the standardised embedding
    matrix: Tensor  # [D, E]
    hidden_mean: Tensor  # [D]
    embedding_mean: Tensor  # [E]

    def distance(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """1 - cosine of projected hidden states [n, D] and embeddings [n, E]: [n]."""
        projected = (hidden - self.hidden_mean) @ self.matrix
        return 1 - F.cosine_similarity(projected, embeddings - self.embedding_mean, dim=1)

def response_hidden(hidden: Tensor, batch: dict) -> Tensor:
    """The mean of hidden states [T, D] over each example's response tokens: [n, D] fp32."""
    states = hidden.index_select(0, batch["logit_positions"] + 1).float()
    return torch.stack([x.mean(0) for x in states.split(batch["num_labels"])])

def drift(probe: Probe, adapter: Adapter, target: float, hidden: Tensor, batch: dict) -> Tensor:
    """max(0, target - cosine) of each response's projected hidden state and its embedding: [n]."""
    embeddings = adapter.standardize(batch["embeddings"])
    return F.relu(target - 1 + probe.distance(response_hidden(hidden, batch), embeddings))

RIDGES = (0.1, 0.01, 1.0, 10.0)  # times the mean diagonal, in the order of trial

def every_tenth(indices: np.ndarray) -> Tensor:  # or the last of fewer than ten
    tenth = indices % 10 == 9
    return torch.from_numpy(tenth if tenth.any() else indices == indices.max())

def ridge(x: Tensor, y: Tensor, heldout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression (Hoerl and Kennard, 1970) of y [n, q] on x [n, p] over the rows that are not
    `heldout`, [n] bool, with the ridge that has the least squared error on those that are: weights
    [p, q], mean of x, mean of y. Summed in fp32 over chunks, added up and solved in fp64."""
    center, mean = (t[~heldout].mean(0) for t in (x, y))
    gram, cross = (x.new_zeros(x.shape[1], t.shape[1], dtype=torch.float64) for t in (x, y))
    for a, b, out in zip(x.split(4096), y.split(4096), heldout.split(4096), strict=True):
        a, b = a[~out] - center, b[~out] - mean
        gram += a.T @ a
        cross += a.T @ b
    x, y = x[heldout] - center, y[heldout] - mean
    scale = gram.diagonal().mean().clamp(min=1e-9).expand(len(gram)).diag()
    fits = (torch.cholesky_solve(cross, torch.linalg.cholesky(gram + value * scale)).float()
            for value in RIDGES)
    return min(fits, key=lambda fit: (y - x @ fit).square().sum().item()), center, mean

@torch.no_grad()
def fit_probe(elm: ELM, split: Split, rt: Runtime, max_rows: int = 8192) -> Probe:
    """Ridge regression from the LLM's mean hidden state over a response that it reads alone to the
    embedding, on up to max_rows rows; those of every tenth vector are held out. The same on every
    process."""
    rows = np.random.default_rng(0).permutation(len(split.rows))[:max_rows]
    examples = split.examples(rows, "response")
    micros = make_micro_batches([len(e.ids) for e in examples], rt.world,
                                MICRO_TOKENS[rt.device.type])
    hidden = torch.zeros(len(rows), elm.adapter.settings["d_llm"], device=rt.device)
    for micro in micros[rt.rank :: rt.world]:  # as many on each process; some are empty
        batch = collate([examples[i] for i in micro or [0]])
        hidden[micro] = response_hidden(*elm.forward_hidden(batch))[: len(micro)]
    hidden, vector_ids = rt.sum(hidden), split.rows["vector"][rows]
    vectors = elm.adapter.standardize(split.embeddings(vector_ids).to(rt.device))
    heldout = every_tenth(np.unique(vector_ids, return_inverse=True)[1]).to(rt.device)
    probe = Probe(*(rt.sum(t * (rt.rank == 0)) for t in ridge(hidden, vectors, heldout)))
    cosine = 1 - probe.distance(hidden[heldout], vectors[heldout]).mean()
    rt.log(f"drift probe of {int((~heldout).sum())} rows; cosine {cosine:.3f} on "
           f"{int(heldout.sum())} held-out ones")
    return probe

class Term(NamedTuple):  # of the loss
    function: Any  # (hidden [T, D], batch) -> [n] fp32, one number per example
    weight: float
    per: str  # what the sum over a step's examples is divided by: "labels" or "rows"

def loss_terms(cfg: LossConfig, elm: ELM, probe: Probe | None) -> dict[str, Term]:
    """The terms of the loss by the name under which they are logged. At weight 0 a term is not
    computed."""
    return {"lm_loss": Term(elm.sequence_nll, 1.0, "labels"),
            "drift_loss": Term(partial(drift, probe, elm.adapter, cfg.drift_target),
                               cfg.drift_weight, "rows")}

def soft_gradient(elm: ELM, soft: Tensor, micros: list, terms: dict[str, Term],
                  counts: dict[str, int]) -> tuple[list[Tensor], Tensor]:
    """(each term summed over this process's examples, fp64; the gradient of the weighted sum of
    the terms, times counts["labels"], at the soft tokens [n, K, D]): all that the adapter needs of
    the frozen LLM."""
    sums, gradients = [soft.new_zeros((), dtype=torch.float64) for _ in terms], []
    parts = soft.detach().split([len(batch["lengths"]) for _, batch in micros])
    for (weight, batch), part in zip(micros, parts, strict=True):
        hidden, batch = elm.forward_hidden(batch, part.requires_grad_())
        total = 0.0
        for i, term in enumerate(terms.values()):
            if term.weight:
                value = term.function(hidden, batch).sum() * weight
                total = total + term.weight * counts["labels"] / counts[term.per] * value
                sums[i] += value.detach()
        gradients += torch.autograd.grad(total, part)
    return sums, torch.cat(gradients)

# -----------------------------------------------------------------------------
# Checkpoint: one portable file with the whole state, for any number of processes

@dataclass
class TrainState:  # what the loop carries on, beside the adapter and its optimizer
    step: int = 0  # updates done
    epoch: int = 0
    position: int = 0  # rows of the epoch that are done
    validated: int = -1  # step of the last validation
    val_rows: str = ""  # a hash of the rows that it was on
    best: float = math.inf  # lowest validation loss, of the adapter below
    best_step: int = 0
    since_best: int = 0  # validations
    best_adapter: dict[str, Tensor] | None = None
    sums: dict[str, float] = field(default_factory=dict)  # of terms and counts since the last log
    wandb_id: str | None = None

    def ended(self, total: int, patience: int | None) -> bool:
        return self.step >= total or bool(patience and self.since_best >= patience)

    def record_validation(self, loss: float, adapter: Adapter) -> bool:
        """Take note of a validation; returns whether its loss is the lowest so far."""
        self.validated, self.since_best = self.step, self.since_best + 1
        if lowest := loss < self.best or not self.best_adapter:
            self.best, self.best_step, self.since_best = loss, self.step, 0
            self.best_adapter = {k: v.cpu().clone() for k, v in adapter.state_dict().items()}
        return lowest

    def advance(self, step: Step, sums: dict[str, float]) -> None:
        self.step, self.epoch, self.position = self.step + 1, step.epoch, step.position
        for key, value in {**sums, "labels": step.counts["labels"], "rows": len(step.rows)}.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

def save_checkpoint(paths: list[Path], **parts: Any) -> None:
    """Write a checkpoint and its SHA-256 to each path. Raises: UserError if the disk is full."""
    torch.save(parts, content := io.BytesIO())  # of a full disk it raises nothing itself
    checksum = hashlib.sha256(content.getbuffer()).digest()
    for path in paths:
        with atomic_write(path) as temporary, open(temporary, "wb") as f:
            f.writelines([content.getbuffer(), checksum])

def load_checkpoint(path: Path) -> dict:
    """Runs no code from the file. Raises: UserError if it is not a whole checkpoint."""
    with user_error(f"train.resume: {path}: no whole checkpoint"):
        data = memoryview(path.read_bytes())  # torch.load itself verifies no checksum
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError("its checksum differs")
        saved = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        return saved | {"state": TrainState(**saved["state"])}

def newest_checkpoint(folder: Path, rt: Runtime) -> Path | None:
    """The whole checkpoint of the most steps, if any. Raises: UserError if none is whole."""
    steps = {int(p.stem[16:]): p for p in folder.glob("checkpoint_step_*.pt")
             if p.stem[16:].isdecimal()}
    paths = [steps[n] for n in sorted(steps, reverse=True)]
    paths += folder.glob("checkpoint_final.pt")  # the last one of a run under another name
    for path in paths:
        try:
            load_checkpoint(path)
            return path
        except UserError as e:
            rt.log(f"passed over: {e}")
    if paths:
        raise UserError(f"train.resume: no checkpoint in {folder} is whole; choose another folder")
    rt.log(f"train.resume: {folder} holds no checkpoint; this is a new run")

def find_checkpoint(cfg: Config, rt: Runtime) -> dict | None:
    """The checkpoint that train.resume names; "auto": the newest in output.dir, if any.
    Raises: UserError, also if the folder holds another run."""
    folder, resume = Path(cfg.output.dir), cfg.train.resume
    if resume == "auto":
        resume = rt.on_first(lambda: newest_checkpoint(folder, rt))
    elif (folder / "metrics.jsonl").exists() and not (
            resume and Path(resume).resolve().parent == folder.resolve()):
        raise UserError(f"output.dir: {folder} holds a run already; go on with it by "
                        "train.resume=auto, or choose another folder")
    return load_checkpoint(Path(resume)) if resume else None

def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, without one that a killed run did not end; none if there is no
    file. Raises: UserError that names a damaged line."""
    lines, entries = path.read_bytes().split(b"\n")[:-1] if path.exists() else [], []
    for number, line in enumerate(lines, 1):
        with user_error(f"{path}:{number}: damaged; delete this line"):
            entries.append(json.loads(line))
            entries[-1]["step"] + 0
    return entries

# -----------------------------------------------------------------------------
# Training

def lr_at(step: int, total: int, cfg: TrainConfig) -> float:
    """The rate of update `step`, from 0: linear warm-up to cfg.lr, then linear decay to 0."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    return cfg.lr * max(0, total - step) / max(1, total - cfg.warmup_steps)

@contextmanager
def received_signals():
    """A list to which SIGTERM and Ctrl-C append; the loop looks at it once a step."""
    received, kinds = [], (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _: received.append(number)) for kind in kinds]
    try:
        yield received
    finally:
        list(map(signal.signal, kinds, before))

def memory_gib() -> float:  # peak, of the GPU if there is one
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def mean_cosine(x: Tensor) -> float:
    """Mean pairwise cosine of the rows of x [n, d]: near 1, the adapter has collapsed."""
    u = F.normalize(x, dim=1)
    return ((u.sum(0).square().sum() - len(u)) / max(1, len(u) * (len(u) - 1))).item()

def config_text(cfg: Config) -> str:
    """The resolved config as TOML, under the package versions and the git commit as comments."""
    packages = "torch", "transformers", "deepspeed", "safetensors"
    lines = [f"# {p} {d.version}" for p in packages for d in list(distributions(name=p))[:1]]
    if shutil.which("git"):
        git = ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"]
        lines += ["# commit " + subprocess.run(git, capture_output=True, text=True).stdout.strip()]
    for name, entries in cfg.tables().items():
        lines += ["", f"[{name}]", *(f"{key} = {to_toml(value)}" for key, value in entries.items())]
    return "\n".join(lines) + "\n"

def start_wandb(cfg: Config, run_id: str | None, rt: Runtime) -> Any:
    wandb, mode = import_optional("wandb"), os.environ.get("WANDB_MODE", cfg.wandb.mode)
    if mode == "online" and not wandb.login(prompt=False, verify=False):  # it would ask
        mode = "offline"
        rt.log("W&B: no login, so the run is kept offline; `wandb sync` uploads it")
    return wandb.init(project=cfg.wandb.project, name=cfg.wandb.run_name, id=run_id, mode=mode,
                      resume="allow", dir=cfg.output.dir, config=cfg.tables())

class Log(AbstractContextManager):
    """Console, metrics.jsonl and, if enabled, W&B, all written by process 0. As a context it ends
    W&B's run with the exit code."""

    def __init__(self, cfg: Config, state: TrainState, total: int, rt: Runtime):
        self.path, self.rt = Path(cfg.output.dir, "metrics.jsonl"), rt
        self.bar = rt.progress(None, "steps", total=total, initial=state.step, unit="step")
        self.clock, self.tokens = time.perf_counter(), 0  # since the last line of training
        self.start_time, self.start_step = self.clock, state.step
        self.run = cfg.wandb.enabled and rt.rank == 0
        self.run = self.wandb(lambda _: start_wandb(cfg, state.wandb_id, rt))
        state.wandb_id = self.run.id if self.run else state.wandb_id

    def wandb(self, call: Any) -> Any:
        """call(W&B's run), if there is one; a failure is logged and never ends the training."""
        try:
            return call(self.run) if self.run else None
        except Exception as e:
            self.rt.log(f"W&B failed, training goes on: {e!r}")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.bar.close()
        codes = {"NoneType": 0, "TrialPruned": 0, "UserError": 2}
        code = codes.get(type(error).__name__, getattr(error, "code", 1))
        self.wandb(lambda run: run.finish(exit_code=code))

    def record(self, step: int, end: str = "", **entry: float) -> None:
        line = "  ".join(f"{k} {v:{'.4g' if v < 1e3 else ',.0f'}}" for k, v in entry.items() if v)
        self.rt.log(f"step {step:6d}  {line}{end}")
        if self.rt.rank == 0:
            append(self.path, json.dumps(dict(step=step) | entry) + "\n")
            if "val_loss" in entry and step and not self.rt.quiet:
                with atomic_write(self.path.with_name("report.png")) as path:
                    plot_report(path, read_metrics(self.path), self.path.parent.name)
        self.wandb(lambda run: run.log(entry, step=step))
        self.clock, self.tokens = time.perf_counter(), 0

    def training(self, state: TrainState, terms: dict[str, Term], **values: float) -> None:
        """Log each term's mean since the last call, per label or row, and their weighted sum."""
        means = {name: state.sums[name] / state.sums[term.per] for name, term in terms.items()}
        loss = sum(term.weight * means[name] for name, term in terms.items())
        elapsed = time.perf_counter() - self.start_time
        left = elapsed / (state.step - self.start_step) * (self.bar.total - state.step)
        end = f"  {tqdm.format_interval(elapsed)} passed, {tqdm.format_interval(left)} left"
        self.record(state.step, end, epoch=state.epoch, loss=loss, **means, **values,
                    tokens_per_second=self.tokens / (time.perf_counter() - self.clock),
                    memory_gib=memory_gib())
        state.sums = {}

def report_split(cfg: Config) -> str:
    has_test = any(p.exists() for p in split_paths(cfg.data, "test"))
    return cfg.eval.split or ("test" if has_test else "val")

def open_inputs(cfg: Config, names: Sequence[str], num_soft: int, rt: Runtime,
                stored: dict | None = None) -> dict[str, Split]:
    """The splits by name, after a check of what the report on the last one will need. The prompt is
    the stored one or that of the LLM's chat template. Raises: UserError."""
    import_optional("matplotlib")
    import_optional("pandas")
    tokenizer = load_pretrained(transformers.AutoTokenizer, cfg.model.llm, "model.llm")
    prompt = Prompt(tokenizer, cfg.model.template, stored)
    splits = {name: open_split(cfg.data, name, prompt, num_soft, rt) for name in names}
    widths = {name: split.vectors.shape[1] for name, split in splits.items()}
    norms = splits[names[0]].statistics["norms"]
    if len(set(widths.values())) > 1:
        raise UserError(f"data.dir: the vectors of the splits differ in width: {widths}")
    for name, split in splits.items():
        counts = ", ".join(f"{n} {what}" for what, n in split.counts.items() if n)
        rt.log(f"{name}: {len(split.vectors)} vectors of width {widths[name]}, {counts}")
        norm = split.statistics["norms"][1].item()
        check_norm(norms, norm, split_paths(cfg.data, name)[0])
        if (split.rows["vector"] == split.rows["vector"][0]).all():
            raise UserError(f"{split.path}: all rows are about one vector: none is left to compare "
                            "it with")
    if cfg.eval.samples:
        rt.on_first(lambda: load_report_models(cfg.eval, split, rt))
    return splits

def plan_memory(cfg: Config, elm: ELM, terms: dict[str, Term], rt: Runtime) -> int:
    """The token budget of a micro-batch. On a GPU the first of several plans that a trial pass
    shows to fit on every process: at first none of the layers recomputed, as model.grad_checkpoint
    permits. Under ZeRO 3 on several processes, where a trial that fails cannot end, the last.
    Raises: OutOfMemoryError if no plan fits."""
    longest, c = cfg.data.max_seq_length, elm.llm.config.get_text_config()
    shares = {True: [1.0], False: [0.0]}.get(cfg.model.grad_checkpoint, [0.0, 0.5, 1.0])
    budgets = [max(longest, n) for n in (MICRO_TOKENS["cuda"], 4096, 2048)]
    plans = [(budget, share) for share in shares for budget in budgets]
    if rt.device.type != "cuda":  # small micro-batches are as fast
        plans = [(MICRO_TOKENS["cpu"], shares[0])]
    for budget, share in plans[-1:] if elm.lockstep else plans:
        num_layers = math.ceil(share * c.num_hidden_layers)
        recompute_layers(elm.llm, num_layers)
        if rt.device.type != "cuda" or elm.lockstep or fits_memory(elm, budget, longest, terms, rt):
            rt.log(f"micro-batches of {budget} tokens, {num_layers} layers recomputed")
            return budget
    raise torch.OutOfMemoryError(f"a row of {longest} tokens does not fit")

def fits_memory(elm: ELM, num_tokens: int, longest: int, terms: dict[str, Term],
                rt: Runtime) -> bool:
    """Whether a training pass over num_tokens in rows of up to `longest`, beside what the optimizer
    will allocate, fits on every process."""
    num_soft, d_emb = (elm.adapter.settings[k] for k in ("tokens", "d_emb"))
    rows = np.array_split(np.zeros(num_tokens, np.int64), math.ceil(num_tokens / longest))
    examples = [Example(np.r_[[-1] * num_soft, ids[num_soft:]], len(ids) - num_soft, False)
                for ids in rows]
    batch = collate(examples, torch.ones(len(examples), d_emb))
    counts, failed = dict(labels=num_tokens, rows=len(examples)), torch.zeros((), device=rt.device)
    try:  # gradient, two moments and as much again for the update
        reserve = [torch.empty_like(p) for p in elm.adapter.parameters() for _ in range(4)]
        soft_gradient(elm, elm(batch["embeddings"]), [(1.0, batch)], terms, counts)
        del reserve
    except torch.OutOfMemoryError:
        failed += 1
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # memory_gib is of training
    return not rt.sum(failed).item()

def finished_report(saved: dict, cfg: Config, total: int) -> dict | None:
    """The report of a run that has nothing left to do."""
    path, state = Path(cfg.output.dir, "eval.json"), saved["state"]
    unchanged = saved["config"]["model"] == cfg.tables()["model"]
    if unchanged and state.ended(total, cfg.train.patience) and path.exists():
        with suppress(ValueError, TypeError, LookupError, RecursionError):  # else it is repeated
            report = json.loads(path.read_bytes())
            return report if report["step"] == state.step else None

def open_folder(cfg: Config, state: TrainState) -> Any:
    """Lock output.dir, write config.toml, and drop what a run logged after `state`; what one saved
    after it, where train.resume names an earlier checkpoint, becomes *.old. Returns the lock.
    Raises: UserError."""
    folder = Path(cfg.output.dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = lock(folder / ".lock")
    lines = [json.dumps(m) + "\n" for m in read_metrics(folder / "metrics.jsonl")
             if m["step"] <= (state.validated if "val_loss" in m else state.step)]
    write_text(folder / "metrics.jsonl", "".join(lines))
    write_text(folder / "config.toml", config_text(cfg))
    for path in folder.iterdir():
        match = re.fullmatch(r"(?:adapter|checkpoint)_(?:step_(\d+)|final)\.\w+", path.name)
        if (cfg.train.resume != "auto" and match and int(match[1] or sys.maxsize) > state.step
                and path.resolve() != Path(cfg.train.resume or "").resolve()):
            os.replace(path, f"{path}.old")
    return lock_file

def check_finite(numbers: list[float], step: int, split: Split, rows: np.ndarray) -> None:
    """Raises: UserError that names the step and its rows."""
    if not all(map(math.isfinite, numbers)):
        lines = ",".join(str(n) for n in split.rows["line"][rows][:64])
        raise UserError(f"step {step}: the loss or its gradient is not finite, and nothing was "
                        f"updated; lower train.lr, or look at {split.path}:{lines}")

def read_words(split: Split, vector_ids: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """For each vector the token ids, each once, of the num_parts equal parts of its text; if no row
    has a text, of all its responses."""
    texts, has_text, words = dict.fromkeys(vector_ids.tolist(), ""), set(), []
    for i in np.flatnonzero(np.isin(split.rows["vector"], vector_ids)):
        if (vector := int(split.rows["vector"][i])) not in has_text:
            (row,) = split.read([i])
            texts[vector] = row.text or f"{texts[vector]}{row.response}\n"
            has_text.update([vector] * bool(row.text))
    texts = list(texts.values())
    for start in range(0, len(texts), 1024):
        for ids in split.prompt.ids(texts[start : start + 1024]):
            words += [np.unique(p) for p in np.array_split(np.array(ids, np.int64), num_parts)]
    return words

@torch.no_grad()
def warm_start(elm: ELM, split: Split, rt: Runtime, max_vectors: int = 32768) -> None:
    """Fit the last layer of a fresh adapter in closed form so that soft token j is near the mean of
    the LLM's own embeddings of the words in part j of the text. Each word counts once, weighted by
    its inverse document frequency (Sparck Jones, 1972); targets are centred, at unit mean square.
    Of unequal widths the residual map is fitted first. Every process computes it, and takes what
    process 0 has fitted."""
    adapter, device, embed = elm.adapter, rt.device, elm.llm.get_input_embeddings()
    vector_ids = np.random.default_rng(0).permutation(np.unique(split.rows["vector"]))
    vector_ids = np.sort(vector_ids[:max_vectors])
    words = read_words(split, vector_ids, adapter.settings["tokens"])
    ids, index = np.unique(np.concatenate(words), return_inverse=True)
    ids, index = (torch.from_numpy(t).to(device) for t in (ids, index))
    idf = torch.log(len(words) / torch.bincount(index))[index]
    offsets = torch.tensor([0, *map(len, words[:-1])], device=device).cumsum(0)
    table = F.pad(embed(ids).float(), (0, 1), value=1.0)  # a column of ones, which sums the weights
    bags = F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=idf)
    y = bags[:, :-1] / bags[:, -1:].clamp(min=1e-6)
    y = y.unflatten(0, (len(vector_ids), -1))  # [n, K, D]
    y -= y.mean(0)
    y /= y.square().mean().sqrt().clamp(min=1e-9)
    x = adapter.standardize(embeddings := split.embeddings(vector_ids).to(device))
    heldout = every_tenth(np.arange(len(x))).to(device)
    scale, residual = adapter.settings["residual_scale"], adapter.residual
    if scale and isinstance(residual, nn.Linear):
        residual.weight.copy_(ridge(x, y.mean(1), heldout)[0].T / scale)
    remainder = (y - scale * residual(x)[:, None]).flatten(1)
    weights, center, mean = ridge(F.gelu(adapter.fc1(x)), remainder, heldout)
    adapter.fc2.weight.copy_(weights.T)
    adapter.fc2.bias.copy_(mean - center @ weights)
    for p in adapter.parameters():
        p.copy_(rt.sum(p * (rt.rank == 0)))
    cosine = F.cosine_similarity(adapter(embeddings), y, dim=-1)[heldout].mean()
    rt.log(f"warm start on {int((~heldout).sum())} vectors; cosine {cosine:.3f} with the targets "
           f"of {int(heldout.sum())} held-out ones")

def validation_losses(elm: ELM, split: Split, rt: Runtime, check: Any,
                      first: bool) -> dict[str, float]:
    """Losses per response token by the right and by shuffled vectors; at the `first` validation by
    the texts, too. For `check` see evaluate_nll."""
    kinds = {"val_loss": split.rows["vector"], "val_loss_shuffled": shuffled_vectors(split)}
    if first and split.rows["text"].all():  # the ceiling stays the same
        kinds["val_loss_text"] = None
    losses = {}
    elm.eval()
    for name, vectors in kinds.items():
        nll, num_labels = evaluate_nll(elm, split, vectors, rt, check)
        if num_labels.all():  # each text fits
            losses[name] = float(nll.sum() / num_labels.sum())
    elm.train()
    return losses

def build_trainable(cfg: Config, llm: Any, source: Split, saved: dict | None, rt: Runtime) -> tuple:
    """(ELM, AdamW, drift probe or None), fresh or as a checkpoint has them. Raises: UserError."""
    m, probe = cfg.model, None
    torch.manual_seed(cfg.train.seed)
    adapter = fresh_adapter(llm, source.statistics, m.standardize, hidden_dim=m.hidden_dim,
                            tokens=m.tokens, dropout=m.dropout, residual_scale=m.residual_scale)
    elm = ELM(llm, adapter.to(rt.device), source.prompt)
    check_llm(elm, cfg.data.max_seq_length)
    trained, frozen = (sum(getattr(p, "ds_numel", p.numel()) for p in part.parameters())
                       for part in (adapter, llm))
    rt.log(f"{rt.world} process(es) on {rt.device.type}, ZeRO {cfg.deepspeed.zero_stage}, LLM in "
           f"{str(llm.dtype)[6:]}\n{trained:,} parameters trained, {frozen:,} frozen; token "
           f"embeddings of root mean square {adapter.scale:.4f}")
    optimizer = torch.optim.AdamW(adapter.parameters(), betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=cfg.train.weight_decay, fused=True)
    if saved:
        check_identity(saved["identity"], elm.identity, "train.resume")
        check_identity(saved["config"]["model"], {"standardize": m.standardize}, "train.resume")
        check_norm(saved["adapter"]["norms"], adapter.norms[1].item(), "train.resume")
        adapter.load_state_dict(saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = cfg.train.weight_decay
        probe = saved["probe"] and Probe(*(t.to(rt.device) for t in saved["probe"]))
    elif cfg.train.warm_start:
        warm_start(elm, source, rt)
    if cfg.loss.drift_weight and not probe:
        probe = fit_probe(elm, source, rt)
    return elm.train(), optimizer, probe

sweep_llm = lru_cache(1)(load_llm)  # kept between trials

def train(cfg: Config, trial: Any = None) -> dict:
    """Train an adapter and report on it: returns the dict of eval.json. As a `trial` of Optuna,
    write no checkpoints, report the score at each quarter, and return the last one alone.
    Raises: UserError; SystemExit(128 + signal) after a signal, with a checkpoint; TrialPruned."""
    rt, c, folder = start_runtime(cfg)._replace(quiet=bool(trial)), cfg.train, Path(cfg.output.dir)
    saved, final = find_checkpoint(cfg, rt), report_split(cfg)
    state = saved["state"] if saved else TrainState()
    names = [name for name in ("train", "val") if name != final] + [final]
    data = open_inputs(cfg, names, cfg.model.tokens, rt, saved and saved["prompt"])
    source, size = data["train"], c.batch_size * c.grad_accum * rt.world
    epochs, left = c.epochs - state.epoch - 1, max(0, len(source.rows) - state.position)
    total = state.step + epochs * math.ceil(len(source.rows) / size) + math.ceil(left / size)
    total = total if c.max_steps is None else c.max_steps
    eval_steps = math.ceil(total / 4) if trial else c.eval_steps  # comparable at any batch size
    if trial:
        trial.set_user_attr("eval_steps", eval_steps)
    if saved and (finished := finished_report(saved, cfg, total)):
        rt.log(f"{folder} holds a finished run of {state.step} steps; nothing to do")
        return finished
    get_llm = sweep_llm if trial and cfg.deepspeed.zero_stage < 3 else load_llm
    llm = get_llm(cfg.model.llm, rt.device, cfg.model.bf16, options=cfg.deepspeed)
    elm, optimizer, probe = build_trainable(cfg, llm, source, saved, rt)
    terms = loss_terms(cfg.loss, elm, probe)
    budget = plan_memory(cfg, elm, terms, rt)
    locks: list = []  # of output.dir, held until the end
    rt.on_first(lambda: locks.append(open_folder(cfg, state)))
    val_rows = short_hash(data["val"].rows.tobytes())
    if val_rows != state.val_rows:  # a loss of other rows says nothing about these
        state.val_rows, state.best, state.validated = val_rows, math.inf, -1
    log = Log(cfg, state, total, rt)
    rt.log(f"resumed after step {state.step}" if saved else
           f"{total} steps of {size} rows, {c.warmup_steps} of warm-up")
    if 0 < total <= c.warmup_steps:
        warn(f"train.warmup_steps = {c.warmup_steps}: no shorter than the run of {total} steps")

    def save_adapter(name: str, weights: dict[str, Tensor], step: int) -> None:
        rt.on_first(lambda: elm.save(folder / name, weights, step=step))
        log.wandb(lambda run: run.log_artifact(str(folder / name), type="adapter"))

    def save(*names: str) -> None:  # no RNG state: rows and dropout follow from a step's number
        weights = elm.adapter.state_dict()
        save_adapter(f"adapter_step_{state.step}.safetensors", weights, state.step)
        rt.on_first(lambda: save_checkpoint(
            [folder / f"checkpoint_{name}.pt" for name in names], state=vars(state),
            adapter=weights, optimizer=optimizer.state_dict(), probe=probe and tuple(probe),
            identity=elm.identity, config=cfg.tables(), prompt=source.prompt.text))

    def validate() -> None:
        losses = validation_losses(elm, data["val"], rt, leave_if_signalled, state.validated < 0)
        if scored := trial is not None and 0 < state.step < total:
            losses["val_bertscore"] = score_now(elm, data["val"], cfg.eval, rt)
            trial.report(losses["val_bertscore"], state.step // eval_steps)
        log.record(state.step, **losses)
        if state.record_validation(losses["val_loss"], elm.adapter):
            save_adapter("adapter_best.safetensors", state.best_adapter, state.step)
        if scored and trial.should_prune():
            raise import_optional("optuna").TrialPruned

    def due(every: int) -> bool:
        return state.step % every == 0 or state.step == total

    def leave_if_signalled() -> None:  # on all processes, if one has received a signal
        if rt.sum(torch.tensor(float(len(signals)))).item():
            if not trial:
                save(f"step_{state.step}")
            rt.log(f"stopped after step {state.step}; train.resume=auto goes on from there")
            raise SystemExit(128 + max(signals, default=signal.SIGTERM))

    if saved:
        save_adapter("adapter_best.safetensors", state.best_adapter, state.best_step)
    steps = step_rows(len(source.rows), c.seed, size, state.epoch, state.position)
    steps = islice(steps, 0 if state.ended(total, c.patience) else total - state.step)
    steps = read_ahead(partial(prepare_step, source, budget, rt), steps, cfg.data.num_workers)
    with log:
        with received_signals() as signals:
            if state.validated < 0 or due(eval_steps) and state.validated < state.step:
                validate()  # step 0, other rows, or a validation that a signal prevented
            for step in steps:
                seed = np.random.SeedSequence([c.seed, state.step, rt.rank]).generate_state(1)
                torch.manual_seed(int(seed[0]))  # 32 bits: the CPU's generator ignores more
                soft = elm(torch.cat([batch["embeddings"] for _, batch in step.micros]))
                sums, gradient = soft_gradient(elm, soft, step.micros, terms, step.counts)
                optimizer.zero_grad()
                soft.backward(gradient / step.counts["labels"])  # of all processes
                for p in elm.adapter.parameters():
                    rt.sum(p.grad)
                norm = nn.utils.clip_grad_norm_(elm.adapter.parameters(), c.max_grad_norm).double()
                stop = torch.tensor(float(len(signals)), device=rt.device)
                numbers = torch.stack([*sums, norm / rt.world, stop.double()])
                *sums, norm, stop = rt.sum(numbers).tolist()  # the step's one wait for the device
                check_finite([*sums, norm], state.step + 1, source, step.rows)
                optimizer.param_groups[0]["lr"] = lr_at(state.step, total, c)
                optimizer.step()
                state.advance(step, dict(zip(terms, sums, strict=True)))
                log.tokens += step.counts["tokens"]
                log.bar.update()
                if due(c.logging_steps):
                    log.training(state, terms, lr=lr_at(state.step - 1, total, c), grad_norm=norm,
                                 similarity=mean_cosine(soft.detach().flatten(1)))
                if state.step % c.save_steps == 0 and not trial:
                    save(f"step_{state.step}")
                if stop:
                    leave_if_signalled()
                if due(eval_steps):
                    validate()
                if state.ended(total, c.patience):
                    break
            if not fingerprint(llm).items() <= elm.identity.items():
                raise RuntimeError(f"{cfg.model.llm} is frozen, yet its weights have changed")
            if not trial:
                save(f"step_{state.step}", "final")
            leave_if_signalled()  # since the last step
        elm.eval().adapter.load_state_dict(state.best_adapter)
        if trial:
            result = {"bertscore_composite": score_now(elm, data["val"], cfg.eval, rt)}
        else:
            about = dict(split=final, step=state.step, adapter_step=state.best_step)
            result = report(elm, data[final], cfg, rt, folder, about)
        log.wandb(lambda run: run.summary.update(result))
    return result

# -----------------------------------------------------------------------------
# Evaluation: losses by vector, by another's vector and by text; answers and their scores

@torch.no_grad()
def evaluate_nll(elm: ELM, split: Split, vectors: np.ndarray | None, rt: Runtime,
                 check: Any = lambda: None) -> tuple[np.ndarray, np.ndarray]:
    """Each row's summed token cross-entropy [N] fp64, and its number of response tokens [N], by
    `vectors` [N] or, if None, by its text; 0 for rows without text and those whose text does not
    fit. The same for any number of processes. Calls `check` before each micro-batch."""
    source = "text" if vectors is None else "embedding"
    rows = np.flatnonzero(split.rows["text"]) if vectors is None else np.arange(len(split.rows))
    size = max(1, min(EVAL_ROWS, EVAL_TOKENS // split.data.max_seq_length))
    micros = [rows[i : i + size] for i in range(0, len(rows), size)]
    result = np.zeros((2, len(split.rows)))

    def load(first: int) -> tuple[np.ndarray, dict, np.ndarray]:
        micro = micros[min(first + rt.rank, len(micros) - 1)]  # equally many on every process
        examples = split.examples(micro, source)
        embeddings = None if vectors is None else split.embeddings(vectors[micro])
        fits = np.array([vectors is not None or not e.truncated for e in examples])
        return micro, collate(examples, embeddings), fits & (first + rt.rank < len(micros))

    firsts = rt.progress(range(0, len(micros), rt.world), "losses")
    for micro, batch, counted in read_ahead(load, firsts, threads=1):
        check()
        result[:, micro] = np.array([elm.nll(batch).tolist(), batch["num_labels"]]) * counted
    return tuple(rt.sum(torch.from_numpy(result).to(rt.device)).cpu().numpy())

def sample_rows(split: Split, n: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(len(split.rows))[:n])

def generate_answers(elm: ELM, split: Split, rows: np.ndarray, vector_ids: np.ndarray,
                     max_new_tokens: int, rt: Runtime) -> list[str]:
    """Greedy answers to the queries of `rows` [n] about the vectors `vector_ids` [n]. The processes
    share them by whole batches, so that not a bit depends on how many processes run."""
    rank, world = (0, 1) if elm.lockstep else (rt.rank, rt.world)  # ZeRO 3: each makes all answers
    size, batches, gathered = ANSWERS_AT_ONCE[rt.device.type], {}, [None] * world
    for i in rt.progress(range(rank * size, len(rows), world * size), "answers"):
        queries = [row.query for row in split.read(rows[i : i + size])]
        embeddings = split.embeddings(vector_ids[i : i + size])
        batches[i] = elm.generate(embeddings, queries, max_new_tokens, size)
    if world > 1:
        torch.distributed.all_gather_object(gathered, batches)
        batches = {i: batch for part in gathered for i, batch in part.items()}
    return [answer for i in sorted(batches) for answer in batches[i]]

@lru_cache(1)
def load_scorer(name: str, num_layers: int | None) -> Any:
    """bert-score's scorer, on the CPU, in fp32, with a working tokenizer: under transformers 5 the
    library fails at a tokenizer without a length, and drops the space before the first word at
    byte-level ones. Raises: UserError."""
    key, bert_score = "eval.bertscore_model", import_optional("bert_score")
    config = load_pretrained(transformers.AutoConfig, name, key)
    layers = num_layers or bert_score.utils.model2layers.get(name, config.num_hidden_layers)
    with loading(name, key):
        scorer = bert_score.BERTScorer(name, num_layers=layers, device="cpu")
    scorer._model.float()
    byte_level = bert_score.utils.GPT2Tokenizer, bert_score.utils.RobertaTokenizer
    if isinstance(scorer._tokenizer, byte_level):
        scorer._tokenizer = load_pretrained(transformers.AutoTokenizer, name, key,
                                            add_prefix_space=True)
    if scorer._tokenizer.model_max_length > 10**9:  # unknown
        positions = getattr(config, "max_position_embeddings", None) or 512
        scorer._tokenizer.model_max_length = positions - 2  # RoBERTa's kind uses no more
    return scorer

@lru_cache(1)
def load_embedder(name: str, bf16: bool = False, key: str = "eval.embedder",
                  max_tokens: int | None = None) -> Any:
    """A SentenceTransformer on the CPU. Raises: UserError that names the config key `key`."""
    library, folder = import_optional("sentence_transformers"), Path(name)
    with loading(name, key):
        if folder.is_dir() and not (folder / "modules.json").is_file():
            raise UserError("without modules.json, the library would take mean pooling; add this "
                            "file and 1_Pooling/config.json, as in data/tiny/embedder")
        model = library.SentenceTransformer(
            name, device="cpu", local_files_only=folder.is_dir(), trust_remote_code=False,
            model_kwargs={"dtype": torch.bfloat16 if bf16 else torch.float32})
    if max_tokens:
        model.max_seq_length = min(model.max_seq_length or max_tokens, max_tokens)
    return model

def encode(model: Any, texts: list[str], device: Any, **options: Any) -> Tensor:
    """n texts -> unit vectors [n, width] fp32 on the CPU. `options` are those of the library."""
    vectors = model.encode(texts, convert_to_tensor=True, show_progress_bar=False, device=device,
                           **options)
    return F.normalize(vectors.float().cpu(), dim=1)

def load_report_models(cfg: EvalConfig, split: Split, rt: Runtime) -> None:
    """Load what scores the answers, on process 0 alone, and compare the embedder's vectors of a few
    source texts with the stored ones. Raises: UserError, also if its vectors are narrower."""
    load_scorer(cfg.bertscore_model, cfg.bertscore_layers)
    if not cfg.embedder:
        return
    model, width = load_embedder(cfg.embedder), split.vectors.shape[1]
    if (full := model.get_embedding_dimension() or width) < width:
        raise UserError(f"eval.embedder: {cfg.embedder} makes vectors of width {full}, data.dir "
                        f"has {width}")
    rows = np.flatnonzero(split.rows["text"])[:32]
    if len(rows):
        texts, stored = [row.text for row in split.read(rows)], split.rows["vector"][rows]
        vectors = encode(model, texts, "cpu", truncate_dim=width)
        cosine = F.cosine_similarity(vectors, split.embeddings(stored)).mean().item()
        rt.log(f"eval.embedder: mean cosine {cosine:.4f} with the stored vectors of {len(rows)} "
               "texts")
        if cosine < 0.95:
            warn(f"eval.embedder = {cfg.embedder} does not make the vectors of {split.path}; its "
                 "consistency and MRR mean little")

BERTSCORE_COLUMNS = [f"bertscore_{part}" for part in ("precision", "recall", "f1", "composite")]
CONSISTENCY_COLUMNS = ["consistency", "mrr", "top1"]

def bert_scores(cfg: EvalConfig, texts: list[str], references: list[str],
                device: Any) -> np.ndarray:
    """BERTSCORE_COLUMNS of n texts, [n, 4]; an empty text scores 0. One pair at a time: in a batch,
    padding counts as a similarity of 0."""
    scorer = load_scorer(cfg.bertscore_model, cfg.bertscore_layers)
    scores, pairs = np.zeros((len(texts), 4)), zip(texts, references, strict=True)
    rows = [i for i, pair in enumerate(pairs) if all(text.strip() for text in pair)]
    scorer.device = scorer._model.to(device).device
    for i in tqdm(rows, "scores", leave=False, disable=None):
        parts = scorer.score([texts[i]], [references[i]], batch_size=1)
        scores[i, :3] = torch.cat(parts).double().numpy()
    scorer._model.cpu()
    scores[:, 3] = (scores[:, :3] * (0.3, 0.3, 0.4)).sum(1)
    return scores

def consistency(texts: list[str], embed: Any, source: Tensor, vectors: Tensor) -> np.ndarray:
    """CONSISTENCY_COLUMNS [n, 3] of n texts, which `embed` maps to unit vectors: the cosine with
    vectors[source] of vectors [N, E], and by it the reciprocal rank of the source among all vectors
    and whether that rank is 1. An empty text scores 0."""
    scores, rows = np.zeros((len(texts), 3)), [i for i, t in enumerate(texts) if t.strip()]
    if rows:
        answers = embed([texts[i] for i in rows])
        cosine = (answers * F.normalize(vectors[source[rows]].float(), dim=1)).sum(1)
        rank = torch.ones(len(rows))
        for chunk in vectors.split(8192):
            others = answers @ F.normalize(chunk.float(), dim=1).T
            rank += (others > cosine[:, None] + 1e-6).sum(1)  # beyond rounding: itself, its copies
        scores[rows] = torch.stack([cosine, 1 / rank, (rank == 1).float()], dim=1)
    return scores

def repetition(text: str) -> float:
    """Share of the word trigrams of `text` that occurred in it before."""
    words = text.split()
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(triples)) / len(triples) if triples else 0.0

def score_answers(cfg: Config, answers: dict[str, list[str]], rows: np.ndarray, split: Split,
                  device: Any) -> Any:
    """A DataFrame with index `rows`: the column samples, of ones, and the scores of the answers
    about `rows` by their own vectors, under the suffix "", and by shuffled ones, "_shuffled", and
    the CONSISTENCY_COLUMNS of the reference answers, "_reference"."""
    scores = import_optional("pandas").DataFrame({"samples": 1.0}, rows)
    for suffix in ("", "_shuffled"):
        texts, columns = answers[suffix], [name + suffix for name in BERTSCORE_COLUMNS]
        scores[columns] = bert_scores(cfg.eval, texts, answers["_reference"], device)
        scores[f"empty_rate{suffix}"] = [float(not text.strip()) for text in texts]
        scores[f"repetition{suffix}"] = [repetition(text) for text in texts]
    if cfg.eval.embedder:
        model = load_embedder(cfg.eval.embedder)
        embed = partial(encode, model, device=device, truncate_dim=split.vectors.shape[1])
        source = torch.from_numpy(split.rows["vector"][rows].astype(np.int64))
        for suffix, texts in answers.items():
            columns = [name + suffix for name in CONSISTENCY_COLUMNS]
            scores[columns] = consistency(texts, embed, source, split.vectors)
        model.cpu()
    return scores

def score_now(elm: ELM, split: Split, cfg: EvalConfig, rt: Runtime) -> float:
    """The bertscore_composite that `report` would find, and nothing else. One process."""
    rows = sample_rows(split, cfg.samples)
    vector_ids = split.rows["vector"][rows]
    answers = generate_answers(elm, split, rows, vector_ids, cfg.max_new_tokens, rt)
    references = [row.response for row in split.read(rows)]
    return float(bert_scores(cfg, answers, references, rt.device)[:, 3].mean())

RATIOS = {"loss": ("nll", "tokens"), "loss_shuffled": ("nll_shuffled", "tokens"),
          "gap": ("gap", "tokens"), "loss_text": ("nll_text", "tokens_text"),
          "gap_closed": ("gap_with_text", "gap_text")}  # and each score per sample

def summarize(frame: Any, num_resamples: int = 1000) -> dict[str, Any]:
    """RATIOS of sums and mean scores over the rows of a DataFrame (see `report`), with bootstrap
    95 % intervals: vectors are drawn with replacement, with all their rows. gap_closed is left out
    unless the interval of its denominator lies above 0."""
    has_text, gap = frame["nll_text"].notna(), frame["nll_shuffled"] - frame["nll"]
    sums = frame.drop(columns="task", errors="ignore").assign(
        tokens_text=frame["tokens"] * has_text, gap=gap, gap_with_text=gap * has_text,
        gap_text=frame["nll_shuffled"] - frame["nll_text"]).groupby("vector").sum()
    n, rng, total = len(sums), np.random.default_rng(0), sums.sum()
    at_once = max(1, 10**6 // n)  # resamples, each a row of n counts
    sizes = np.diff(np.r_[0:num_resamples:at_once, num_resamples])
    draws = [rng.multinomial(n, np.full(n, 1 / n), size) @ sums.to_numpy() for size in sizes]
    drawn = dict(zip(sums, np.concatenate(draws).T, strict=True))
    result, intervals, scores = {"rows": len(frame), "rows_text": int(has_text.sum())}, {}, ()
    if "samples" in frame:
        result["samples"] = int(total["samples"])
        scores = frame.loc[:, "samples":].columns[1:]
    for name, (num, den) in (RATIOS | {score: (score, "samples") for score in scores}).items():
        if total[den] > 0 and (den != "gap_text" or np.percentile(drawn[den], 2.5) > 0):
            result[name] = float(total[num] / total[den])
            if n > 1 and (drawn[den] > 0).all():
                intervals[name] = np.percentile(drawn[num] / drawn[den], (2.5, 97.5)).tolist()
    return result | {"intervals": intervals}

def report(elm: ELM, split: Split, cfg: Config, rt: Runtime, run: Path, about: dict) -> dict:
    """Measure the adapter, trained in the folder `run`, on `split`, then free the LLM. Process 0
    writes predictions.jsonl, eval.json and report.png, prints the table and returns the dict of
    eval.json, which begins with `about`; the others {}. All is computed from one DataFrame of rows:
    vector, task, tokens, losses, and the scores of the sampled rows, NaN in the others."""
    shuffled, folder, pd = shuffled_vectors(split), Path(cfg.output.dir), import_optional("pandas")
    task = pd.Categorical.from_codes(split.rows["task"], split.data.tasks)
    frame = pd.DataFrame(dict(vector=split.rows["vector"], task=task))
    frame["nll"], frame["tokens"] = evaluate_nll(elm, split, split.rows["vector"], rt)
    frame["nll_shuffled"], _ = evaluate_nll(elm, split, shuffled, rt)
    frame["nll_text"], tokens_text = evaluate_nll(elm, split, None, rt)
    frame.loc[tokens_text == 0, "nll_text"] = math.nan
    if num_cut := int((split.rows["text"] & (tokens_text == 0)).sum()):
        warn(f"{num_cut} texts exceed data.max_seq_length: left out of loss_text and gap_closed")
    rows = sample_rows(split, cfg.eval.samples)
    answers = {suffix: generate_answers(elm, split, rows, ids, cfg.eval.max_new_tokens, rt)
               for suffix, ids in (("", split.rows["vector"][rows]), ("_shuffled", shuffled[rows]))}
    release(elm.llm)
    if rt.rank > 0:
        return {}
    keys = {"embedding_file_idx", "task_type", "query", "response"}
    predictions = [row.model_dump(include=keys) | dict(prediction=a, prediction_shuffled=b)
                   for row, a, b in zip(split.read(rows), *answers.values(), strict=True)]
    lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)
    write_text(folder / "predictions.jsonl", lines)  # before the scores, which may fail
    if predictions:
        answers["_reference"] = [p["response"] for p in predictions]
        frame = frame.join(score_answers(cfg, answers, rows, split, rt.device))
    result = about | summarize(frame)
    result["tasks"] = {task: summarize(group)
                       for task, group in frame.groupby("task", observed=True)}
    write_text(folder / "eval.json", json.dumps(result, indent=1) + "\n")
    with atomic_write(folder / "report.png") as path:
        plot_report(path, metrics := read_metrics(run / "metrics.jsonl"), run.name, result)
    print_report(result, predictions, metrics, cfg, rt)
    return result

def describe_gap(result: dict, metrics: list[dict]) -> str:
    """The gap closed of a report, and on the validation split at its first and last step."""
    closed = (f"{result['gap_closed']:.4f} on {result['split']}" if "gap_closed" in result else
              "none: no text that this LLM reads better than another row's vector")
    text = next((m["val_loss_text"] for m in metrics if "val_loss_text" in m), math.inf)
    steps = [f"{(shuffled - m['val_loss']) / (shuffled - text):.4f} at step {m['step']}"
             for m in metrics if (shuffled := m.get("val_loss_shuffled", -math.inf)) > text]
    return closed + (f"; on val {steps[0]}, {steps[-1]}" if len(steps) > 1 else "")

def plot_report(path: Path, metrics: list, name: str, result: dict | None = None) -> None:
    """report.png: the losses over the steps and, with a result, those of each task at the end."""
    pd, plt = import_optional("pandas"), import_optional("matplotlib.figure")
    figure = plt.Figure((13 if result else 6.5, 6), layout="constrained")
    left, *right = figure.subplots(1, 1 + bool(result), squeeze=False)[0]
    keys = ["loss", "val_loss_shuffled", "val_loss", "val_loss_text"]
    curves = pd.DataFrame(metrics, columns=["step", *keys]).astype(float).set_index("step")
    curves["val_loss_text"] = curves["val_loss_text"].max()  # measured once
    for key, color, marker in zip(keys, ("0.6", "tab:red", "tab:blue", "tab:green"), " oo ",
                                  strict=True):
        curves[key].dropna().plot(ax=left, color=color, marker=marker)
    left.set(ylabel="loss per response token", ylim=(0, None), title=name)
    left.legend()
    if result:
        keys = [key for key in ("loss_shuffled", "loss", "loss_text") if key in result]
        values = pd.DataFrame([*result["tasks"].values()], [*result["tasks"]], keys)
        mrr = f", MRR {result['mrr']:.2f}" if "mrr" in result else ""
        values.plot.barh(ax=right[0], color=["tab:red", "tab:blue", "tab:green"], width=0.8,
                         xlabel="loss per response token",
                         title=f"{result['split']}, {result['rows']} rows{mrr}")
        right[0].invert_yaxis()
        figure.suptitle(f"gap closed: {describe_gap(result, metrics)}")
    figure.savefig(path, format="png", dpi=100)

def print_report(result: dict, predictions: list, metrics: list, cfg: Config, rt: Runtime) -> None:
    """Five answers beside their references, the table, and lines of `key: value`."""
    lines = ["", *("{task_type}: {query}\n    reference   {response}\n    prediction  {prediction}"
                   .format(**p) for p in predictions[:: max(1, len(predictions) // 5)][:5])]
    columns = {"rows": "rows", "loss_shuffled": "shuffled", "loss": "vectors", "loss_text": "text",
               "gap_closed": "gap closed", "bertscore_composite": "BERTScore", "mrr": "MRR"}
    columns = {key: title for key, title in columns.items() if key in result}
    tasks = sorted(result["tasks"].items(), key=lambda item: -item[1].get("gap_closed", -math.inf))
    few = {"bertscore_composite": None, "mrr": None}  # a mean of fewer than 20 answers says little
    rows = {name: row | (few if row.get("samples", 0) < 20 else {}) for name, row in tasks}
    half = {key: (high - low) / 2 for key, (low, high) in result["intervals"].items()}
    rows = {"all": result, "± 95 %": half | {"rows": ""}} | rows
    table = import_optional("pandas").DataFrame([*rows.values()], [*rows], [*columns])
    lines += ["", "losses per response token by other rows' vectors, the right ones and the text",
              table.to_string(header=[*columns.values()], na_rep="", col_space=9,
                              float_format="{:.3f}".format)]
    lines += ["", f"gap_closed: {describe_gap(result, metrics)}"]
    lines += [f"{key}: {result[key]:.4f}" for key in columns if key not in ("rows", "gap_closed")]
    folder, final = cfg.output.dir, split_paths(cfg.data, result["split"])[0]
    lines += [f"steps: {result['step']}", f"adapter_step: {result['adapter_step']}",
              f"seconds: {time.perf_counter() - START:.0f}", f"files: {folder}"]
    if predictions and (best := Path(folder, "adapter_best.safetensors")).exists():
        words = f"adapter={best}", f"embeddings={final}", "rows=[0]"
        query = f"query={predictions[0]['query']}"
        lines.append("next: python elm.py generate " + shlex.join([*words, query]))
    rt.log("\n".join(lines))

# -----------------------------------------------------------------------------
# Commands that use a trained adapter

class EmbedOptions(Table):
    model: PathStr = "Qwen/Qwen3-Embedding-4B"  # hub name or folder, for sentence-transformers
    instruction: str | None = None  # what the texts are for, as Qwen3-Embedding takes it
    max_tokens: PositiveInt | None = None  # none: what the model takes
    batch_size: PositiveInt = 32
    bf16: bool = True

def write_table(path: Path, chunks: Iterable[Tensor], **metadata: str) -> None:
    """Write `chunks` of rows [n, E] as the one tensor of a safetensors file. A scratch file beside
    it collects them, so that no table is held in anonymous memory. Raises: UserError."""
    with atomic_write(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as scratch:
        for chunk in chunks:
            scratch.write(chunk.contiguous().view(torch.uint8).numpy())
        scratch.flush()
        table = torch.from_numpy(np.memmap(scratch, np.uint8)).view(chunk.dtype)
        save_file({"embeddings": table.view(-1, chunk.shape[1])}, temporary, metadata)

class Source(BaseModel, frozen=True, strict=True):  # a line of a file of texts
    text: Annotated[str, Field(pattern=r"\S")]
    group: Any = None  # such as an article: all its texts are in one split
    split: Any = None  # of the text and its group; none: drawn

def read_texts(path: Path):
    """Yield the Source of each line of a .txt file, one text a line, or of a .jsonl; the line less
    one is the text's row in the table of vectors. Raises: UserError naming the line."""
    number = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            with user_error(f"{path}:{number}: not a text, or an empty one", ValueError):
                if path.suffix.lower() == ".txt":
                    line = json.dumps({"text": line.decode("utf-8-sig").rstrip("\r\n")}).encode()
                source = parse_line(Source, line)
            yield source
    if not number:
        raise UserError(f"{path}: is empty")

@contextmanager
def hidden_folder(out: Path):
    """A locked folder beside `out`, which must be new, for what a kill must not lose; deleted at
    the end. Raises: UserError."""
    folder = out.with_name(f".{out.name}.work")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
        check_new(out)  # another process may have finished it since
        yield folder
        shutil.rmtree(folder)

def embed_texts(model: Any, o: EmbedOptions, texts: Iterable[str], num: int, folder: Path,
                out: Path, block: int = 1024) -> None:
    """Write the vectors of `num` texts as a table [num, width] fp32. Each block of texts is saved
    in `folder`, by a hash of what it depends on, and taken from there by a later call. Raises:
    UserError."""
    prompt = f"Instruct: {o.instruction}\nQuery:" if o.instruction else None
    key, paths, texts = (o, fingerprint(model)), [], iter(tqdm(texts, total=num, unit="text"))
    while batch := list(islice(texts, block)):
        paths.append(folder / f"{short_hash(repr((key, batch)))}.safetensors")
        if not paths[-1].exists():
            vectors = encode(model, batch, find_device(), batch_size=o.batch_size, prompt=prompt)
            if not (vectors.norm(dim=1) > 0.5).all():  # not of unit norm
                raise UserError(f"{o.model}: makes zero or infinite vectors; bf16=false?")
            write_table(paths[-1], [vectors])
    write_table(out, map(open_vectors, paths), embed=o.model_dump_json())

def embed_file(o: EmbedOptions, texts: Path, out: Path, block: int = 1024) -> None:
    """Embed a file of texts into a table. Killed, the same command goes on. Raises: UserError."""
    check_new(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the vectors are written as safetensors; give it this suffix")
    num, lines = sum(1 for _ in read_texts(texts)), (source.text for source in read_texts(texts))
    model = load_embedder(o.model, o.bf16, "model", o.max_tokens)
    with hidden_folder(out) as folder:
        embed_texts(model, o, lines, num, folder, out, block)
    print(f"{num} vectors of width {open_vectors(out).shape[1]}; texts are cut after "
          f"{model.max_seq_length} tokens")

def write_split(data: DataConfig, split: str, vectors: Tensor, used: np.ndarray,
                rows: list[dict]) -> None:
    """Write those of the vectors [N, E] at the sorted indices `used`, and rows, whose
    embedding_file_idx becomes the index among these. Raises: UserError."""
    table, path = split_paths(data, split)
    index = np.searchsorted(used, [row["embedding_file_idx"] for row in rows])
    write_table(table, (vectors[ids] for ids in torch.from_numpy(used).split(8192)))
    rows = (row | dict(embedding_file_idx=int(i)) for row, i in zip(rows, index, strict=True))
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

def filter_tasks(cfg: Config, folder: Path) -> None:
    """A data set of data.tasks alone at `folder`, whole or not at all: their rows as they are, but
    for the index, and only the vectors that these need, in the same order. Raises: UserError."""
    check_new(folder)
    data = cfg.data
    splits = [s for s in SPLITS if all(p.exists() for p in split_paths(data, s))]
    if not splits:
        raise UserError(f"data.dir: no {split_paths(data, 'train')[1]} with its vectors")
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        new = DataConfig(dir=f"{work}/data")
        for split in splits:
            path, rows_path = split_paths(data, split)
            vectors, counts = open_vectors(path), Counter()
            rows = read_rows(rows_path, data.tasks, len(vectors), counts)
            rows = [row.model_dump(exclude_unset=True) for *_, row in rows]
            used = np.unique([row["embedding_file_idx"] for row in rows])
            write_split(new, split, vectors, used, rows)
            print(f"{split}: {len(rows)} of {counts.total()} rows, {len(used)} of {len(vectors)} "
                  "vectors")
        os.replace(new.dir, folder)

class EvalOptions(Config):
    adapter: PathStr  # a file, a run's folder, or a name on the hub

def evaluate(cfg: EvalOptions, beside: bool = False) -> dict:
    """The report of training's end on the adapter of a file, in output.dir or in a folder beside
    the adapter: returns the dict of eval.json. Raises: UserError."""
    rt, final, path = start_runtime(cfg), report_split(cfg), Path(cfg.adapter)
    adapter, about = Adapter.load(path)
    step, run = about.get("step"), (path if path.is_dir() else path.parent).resolve()
    name = path.stem if step is None else f"step_{step}"  # of one's own loop
    folder = run / f"eval_{final}_{name}" if beside else Path(cfg.output.dir)
    cfg = cfg.model_copy(update=dict(output=OutputConfig(dir=str(folder))))
    rt.on_first(lambda: check_new(folder / "metrics.jsonl", folder / "eval.json"))
    split = open_inputs(cfg, [final], adapter.settings["tokens"], rt, about.get("prompt"))[final]
    check_vectors(split.vectors[:8192], adapter, f"data.dir: {final}")
    elm = ELM.load(path, cfg.model.llm, cfg.model.bf16, cfg.deepspeed)
    check_llm(elm, cfg.data.max_seq_length)
    folder.mkdir(parents=True, exist_ok=True)
    return report(elm, split, cfg, rt, run, dict(split=final, step=step, adapter_step=step))

class GenerateOptions(Table, extra="allow"):  # further keys: options of the LLM's own `generate`
    adapter: PathStr
    embeddings: PathStr  # a .safetensors or .npy file of one table
    query: str
    rows: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None  # none: all
    llm: PathStr | None = None  # the adapter's LLM at another place
    max_new_tokens: PositiveInt = 256
    seed: Seed = 42
    zero_stage: Literal[0, 3] = 0  # 3: the LLM is shared out among the launcher's processes

    @pydantic.model_validator(mode="before")
    @classmethod
    def check_keys(cls, values: dict) -> dict:
        """Refuse misspelled keys, and those by which an answer would not be one text."""
        known = cls.model_fields.keys() | vars(transformers.GenerationConfig()).keys()
        known -= {"num_return_sequences", "return_dict_in_generate"}
        for key in sorted(values.keys() - known):
            raise ValueError(f"{key}: not an option here{did_you_mean(key, sorted(known))}")
        return values

def generate(o: GenerateOptions) -> None:
    """Print answers about the vectors of a file as lines of JSON, as they come. Raises:
    UserError."""
    vectors, (adapter, _) = open_vectors(Path(o.embeddings)), Adapter.load(o.adapter)
    rows = range(len(vectors)) if o.rows is None else o.rows
    if wrong := {*(o.rows or ())}.difference(range(len(vectors))):
        raise UserError(f"rows: no row {min(wrong)} among {len(vectors)}")
    Prompt.parts(o.query)
    for first in range(0, len(rows), 1024):
        part = rows[first : first + 1024]
        check_vectors(vectors[list(part)], adapter, o.embeddings, part)
    rt, options = start_runtime(Config()), DeepSpeedConfig(zero_stage=o.zero_stage)
    elm, size = ELM.load(o.adapter, o.llm, options=options), ANSWERS_AT_ONCE[rt.device.type]
    torch.manual_seed(o.seed)
    firsts, escape = range(0, len(rows), size), str(sys.stdout.encoding).lower() != "utf-8"
    for first in tqdm(firsts, unit="batch", disable=rt.rank > 0 or sys.stdout.isatty()):
        batch = list(rows[first : first + size])
        with user_error("generate"):
            answers = elm.generate(vectors[batch], o.query, o.max_new_tokens, size, **o.model_extra)
        for row, answer in zip(batch, answers, strict=True):
            entry = dict(row=row, query=o.query, answer=answer)
            if rt.rank == 0:
                print(json.dumps(entry, ensure_ascii=escape), flush=True)

# -----------------------------------------------------------------------------
# Synthesis: rows, vectors and splits from texts

PREAMBLE = re.compile(r"<think>|(here('s|’s| is| are)|sure|certainly|of course)\b", re.IGNORECASE)
WAITS = (1, 2, 4, 8, 16)  # seconds before the next try of a request
Query = Annotated[str, pydantic.AfterValidator(lambda query: Prompt.parts(query) and query)]
Queries = Annotated[dict[str, list[Query]], pydantic.BeforeValidator(
    lambda path: {k: v for k, v in (QUERIES | read_toml(str(path), {})).items() if v})]
Count = Annotated[PositiveInt, pydantic.BeforeValidator(lambda x: 2**31 if x == "all" else x)]
Shares = Annotated[tuple[PositiveFloat, PositiveFloat, NonNegativeFloat], Field(strict=False)]

class SynthesizeOptions(Table):
    model: PathStr = "Qwen/Qwen3-4B-Instruct-2507"  # that answers: the LLM to be trained for
    embedder: PathStr = "Qwen/Qwen3-Embedding-4B"
    endpoint: Annotated[str, Field(pattern=r"^https?://.*\w/?$")] | None = None  # a server, to /v1
    concurrency: PositiveInt = 64  # requests at a time to the server
    tasks: Count = 6  # of each text, drawn by a hash; or all
    queries: Queries = QUERIES  # a TOML file, task = [queries]: replaces or adds, [] drops
    reconstruct: Annotated[float, Field(ge=0, le=1)] = 0.3  # share of texts with this task
    split: Shares = (0.9, 0.05, 0.05)  # shares of train, val and test
    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.0  # 0: greedy
    seed: Seed = 42
    template: dict[str, Any] = {}  # keyword arguments of the chat template
    bf16: bool = True

def draw(*parts: Any) -> float:
    """A number in [0, 1) by a hash of `parts`, whatever their case and spaces."""
    words = unicodedata.normalize("NFKC", " ".join(map(str, parts))).casefold().split()
    return int(short_hash(" ".join(words))[:13], 16) / 2**52

def split_texts(path: Path, shares: tuple[float, ...]) -> dict[str, str]:
    """{text: its split}, sorted, of a file; texts that differ in case and spaces alone are one. The
    split is the one given to the text or its group, or drawn by these. Raises: UserError."""
    sources = sorted((alone := s.group in (None, ""), s.text, draw(s.text if alone else s.group),
                      str(s.split or "")) for s in read_texts(path))
    given = {group: split for *_, group, split in sources if split}
    unique = {draw(text): (text, group) for _, text, group, _ in reversed(sources)}
    texts, bounds = {}, np.cumsum(shares)
    for text, group in sorted(unique.values()):  # the first of copies, in a group if one is
        share = np.searchsorted(bounds, group * bounds[-1], side="right")
        texts[text] = given.get(group) or SPLITS[share]
    sizes = Counter(texts.values())
    if min(sizes["train"], sizes["val"]) < 2 or sizes["test"] == 1 or {*sizes} - {*SPLITS}:
        raise UserError(f"{path}: {dict(sizes)} texts; train and val need two, test two or none; "
                        "give more, or other shares, as split=[0.7, 0.15, 0.15]")
    return texts

def draw_rows(o: SynthesizeOptions, index: int, text: str) -> list[dict]:
    """The rows of a text, without a fault yet, their responses empty, but for reconstruct's: the
    first two sentences."""
    tasks = o.queries.keys() - {RECONSTRUCT}
    tasks = sorted(tasks, key=partial(draw, o.seed, text))[: o.tasks]
    tasks += o.queries.keys() & {RECONSTRUCT} if draw(o.seed, text) < o.reconstruct else []
    begin = " ".join(re.split(r"(?<=[.!?])\s+|(?<=[。！？])", text.strip())[:2])
    queries = {t: o.queries[t][int(draw(o.seed, t, text) * len(o.queries[t]))] for t in tasks}
    return [dict(task_type=task, embedding_file_idx=index, query=queries[task], text=text,
                 response=begin * (task == RECONSTRUCT), fault="") for task in sorted(tasks)]

@torch.no_grad()
def ask_llm(o: SynthesizeOptions, llm: Any, prompt: Prompt, rows: list, seed: int,
            temperature: float) -> list[tuple[str, bool]]:
    """(answer, whether it is finished) of each row, from one batch of the prompts of the text
    ceiling: the text, cut at the LLM's limit, stands where the vector will. Raises: UserError if
    the limit leaves no room for an answer."""
    room = max_positions(llm) - o.max_new_tokens
    named = [(f"model: {row['text'][:50]!r}", Row.model_construct(**row)) for row in rows]
    with user_error(f"max_new_tokens = {o.max_new_tokens} leaves {room} tokens, lower it"):
        examples = tokenize(prompt, named, 0, room, "text")
    ids = [torch.from_numpy(e.ids[: -e.num_labels]).to(llm.device) for e in examples]
    torch.manual_seed(seed)
    options = dict(temperature=temperature) if temperature else {}
    embeds = [*map(llm.get_input_embeddings(), ids)]
    return generate_batch(llm, prompt, embeds, o.max_new_tokens, **options)

def ask_server(o: SynthesizeOptions, rows: list, seed: int,
               temperature: float) -> list[tuple[str, bool]]:
    """As ask_llm, of one row, by an OpenAI-compatible server. 429, 5xx, a broken connection and
    half an answer are followed by the next try after each of WAITS. Raises: UserError."""
    text, url = rows[0]["text"], f"{o.endpoint.rstrip('/')}/chat/completions"
    message = dict(role="user", content=text.join(Prompt.parts(rows[0]["query"])))
    body = dict(model=o.model, messages=[message], max_tokens=o.max_new_tokens, seed=seed,
                temperature=temperature)
    body |= {"chat_template_kwargs": o.template} if o.template else {}  # as vLLM and SGLang take it
    key = "".join(os.environ.get("OPENAI_API_KEY", "none").split())
    call = urllib.request.Request(url, json.dumps(body).encode(),
                                  {"Content-Type": "application/json"})
    call.add_unredirected_header("Authorization", f"Bearer {key}")
    for wait in [*WAITS, None]:
        try:
            with urllib.request.urlopen(call, timeout=600) as reply:
                (choice,) = json.load(reply)["choices"]
            answer = (choice["message"]["content"] or "").encode(errors="replace").decode()
            return [(answer, choice["finish_reason"] == "stop")]
        except Exception as e:  # a server can answer anything
            refused = isinstance(getattr(e, "reason", None), ConnectionRefusedError)
            code, why = getattr(e, "code", 500), f"{type(e).__name__}: {e}"  # repr has the key
            with suppress(Exception):  # what it says
                why += e.read(300).decode(errors="replace")
        if not wait or refused or code < 500 and code != 429:
            raise UserError(f"endpoint: {url} about {text[:50]!r}: {' '.join(why.split())}")
        time.sleep(wait)

def fault(row: dict, answer: str, finished: bool) -> str:
    """Why an answer is rejected, or ""."""
    source, words = (set(re.findall(r"\w+", t.casefold())) for t in (row["text"], answer))
    copied = len(source & words) > max(0.8 * len(source), 0.5 * len(words))
    copied &= not row["task_type"].startswith("style")
    faults = {"not finished": not finished, "empty": not answer.strip(), "copied": copied,
              "repetitive": repetition(answer) > 0.3, "preamble": PREAMBLE.match(answer.strip())}
    return next((name for name, found in faults.items() if found), "")

def fill_rows(o: SynthesizeOptions, rows: list[dict], path: Path) -> None:
    """Set the empty responses, or why an answer is rejected as `fault`. Rejected answers are asked
    for once more, with another seed and a temperature above 0. Answers are appended to the file
    `path` as they come, so that a later call asks for the missing ones only. Raises: UserError."""
    ask, size, threads, engine = partial(ask_server, o), 1, o.concurrency, "server"
    if not o.endpoint:
        tokenizer = load_pretrained(transformers.AutoTokenizer, o.model, "model")
        llm = load_llm(o.model, find_device(), o.bf16, "model")
        ask = partial(ask_llm, o, llm, Prompt(tokenizer, o.template))
        size, threads, engine = ANSWERS_AT_ONCE[llm.device.type], 1, (fingerprint(llm), o.bf16)
    options = engine, o.model, o.template, o.max_new_tokens, o.temperature, o.seed
    rows, answers = sorted(rows, key=lambda row: -len(row["text"])), {}
    for line in path.read_text("utf-8").split("\n") if path.exists() else []:
        with suppress(ValueError):  # torn by a kill
            answers |= json.loads(line)

    def ask_block(attempt: int, keys: list[str]) -> int:
        asked, seed = [requests[key] for key in keys], int(keys[0][:7], 16)
        replies = ask(asked, seed, o.temperature or float(attempt))
        append(path, f"\n{json.dumps(block := dict(zip(keys, replies, strict=True)))}")
        answers.update(block)
        return len(keys)

    for attempt in range(2):
        keyed = [(short_hash(repr((options, attempt, row["query"], row["text"]))), row)
                 for row in rows if not row["response"]]
        requests = {key: row for key, row in keyed if key not in answers}
        left = [*requests]
        blocks = [left[i : i + size] for i in range(0, len(left), size)]
        with tqdm(desc=f"answers, try {attempt + 1}", total=len(left), disable=not left) as bar:
            for number in read_ahead(partial(ask_block, attempt), blocks, threads):
                bar.update(number)
        for key, row in keyed:
            row["fault"] = fault(row, *answers[key])
            row["response"] = "" if row["fault"] else answers[key][0].strip()

def synthesize(o: SynthesizeOptions, source: Path, out: Path) -> None:
    """A data set at `out`, whole or not at all, of the texts of a file: queries about each, the
    LLM's answers, and vectors. Killed, the same command goes on. Raises: UserError."""
    check_new(out)
    texts = split_texts(source, o.split)
    rows = [row for i, text in enumerate(texts) for row in draw_rows(o, i, text)]
    pd = import_optional("pandas")
    embedder = load_embedder(o.embedder, o.bf16, "embedder")  # its errors come first
    with hidden_folder(out) as work:
        fill_rows(o, rows, work / "answers.jsonl")
        tasks = pd.Series([row["task_type"] for row in rows], name="rows")
        outcomes = pd.Series([row["fault"] or texts[row["text"]] for row in rows], name="")
        counts = pd.crosstab(tasks, outcomes).to_string()
        why = ", ".join(sorted({row["fault"] for row in rows} - {""}))
        rows = [row for row in rows if not row.pop("fault")]
        answered = {row["text"] for row in rows if not why or row["task_type"] != RECONSTRUCT}
        sizes = {split: sum(texts[t] == split for t in answered) for split in {*texts.values()}}
        if min(sizes.values()) < 2:
            raise UserError(f"model: answers about {sizes} texts are too few; others: {why or 0}")
        options, table = EmbedOptions(model=o.embedder, bf16=o.bf16), work / "vectors.safetensors"
        embed_texts(embedder, options, texts, len(texts), work, table)
        data = DataConfig(dir=str(new := work / "data"))
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
        for split in sizes:
            used = np.flatnonzero([texts[text] == split for text in texts])
            chosen = [row for row in rows if texts[row["text"]] == split]
            write_split(data, split, open_vectors(table), used, chosen)
        settings = {
            "model.llm": o.model, "model.bf16": o.bf16, "model.tokens": 4,
            "model.template": o.template, "data.dir": str(out),
            "data.tasks": sorted({row["task_type"] for row in rows}), "train.lr": 1e-3,
            "train.warmup_steps": min(100, len(rows) // 100), "eval.embedder": o.embedder,
            "output.dir": f"runs/{out.name}"}
        toml = "".join(f"{name} = {to_toml(value)}\n" for name, value in settings.items())
        write_text(new / "train.toml", toml)
        os.replace(new, out)
    paths = [split_paths(DataConfig(dir=str(out)), split)[0] for split in SPLITS]
    tables = [open_vectors(path) for path in paths if path.exists()]
    similar = sum(int((torch.cat([v @ t.T for t in tables[:i]], 1).amax(1) > 0.95).sum())
                  for i in range(1, len(tables))
                  for v in tqdm(tables[i].split(64), "near-duplicates", leave=False))
    print(f"{counts}\n{similar} texts of val and test have a cosine above .95 with one of another "
          "split")
    for row in rows[:: max(1, len(rows) // 3)][:3]:
        print("\n{task_type}: {query}\n{text}\n    {response}".format(**row))
    print(f"\n{out}/train.toml:\n{toml}\nnext: deepspeed elm.py {shlex.quote(f'{out}/train.toml')}")

# -----------------------------------------------------------------------------
# Sweep: Optuna over the settings of training, by any number of workers

class StudyConfig(Table):
    name: str = "elm-summary-optimization"
    trials: PositiveInt = 50  # of all workers together
    timeout_hours: PositiveFloat = 24.0  # after which this worker begins no other
    storage: str | None = None  # a database URL as Optuna takes it; none: SQLite in output.dir
    seed: Seed = 42
    repeat_best: NonNegativeInt = 3  # how many of the best run with two more seeds

Settings = Annotated[dict[str, Any], pydantic.AfterValidator(flat)]  # by dotted name

class Sweep(Table):
    study: StudyConfig = StudyConfig()
    base: Settings = {}  # config, a train TOML, and settings over it
    space: Settings = {}  # settings as {low, high, log} or lists of choices
    wandb: WandbConfig = WandbConfig()
    output: OutputConfig = OutputConfig()

    def config(self, settings: dict[str, Any], name: str = "best") -> Config:
        """The training of a trial; it reports on the validation split. Raises: UserError."""
        fixed = {"eval.split": "val", "wandb.run_name": name,
                 "output.dir": f"{self.output.dir}/{name}"}
        return build(Config, read_toml(None, self.base | settings | fixed))

SWEEP_RESERVED = ("eval.", "output.", "wandb.", "train.eval_steps", "train.resume", "train.seed")
HEARTBEAT_SECONDS, GRACE_SECONDS = 30, 120  # a trial without a heartbeat for so long was killed

def load_sweep(path: str, overrides: list[str]) -> Sweep:
    """A sweep file under overrides. Both ends of each range and each choice are checked as settings
    of a training. Raises: UserError with one line for each mistake."""
    settings = {key.replace('"', ""): value for key, value in map(read_override, overrides)}
    sweep = build(Sweep, read_toml(None, flat(read_toml(path, {})) | settings), f"{path}: ")
    own = flat(sweep.model_dump(include={"wandb", "output"}, exclude_unset=True))
    template = flat(read_toml(str(sweep.base.pop("config", "train.toml")), {}))
    base, errors = template | sweep.base | own, []
    cfg = build(Config, read_toml(None, base), f"{path}: ")
    sweep = sweep.model_copy(update=dict(base=base, output=cfg.output))
    if not cfg.eval.samples or not sweep.space:
        errors.append("a sweep needs eval.samples above 0 and a [space]")
    for key, spec in sweep.space.items():
        values = [spec.get("low"), spec.get("high")] if isinstance(spec, dict) else spec
        if key.startswith(SWEEP_RESERVED):
            errors.append(f"space.{key}: is set by the sweep itself")
        elif not isinstance(values, list) or not values or {list, dict} & {*map(type, values)}:
            errors.append(f"space.{key} = {spec!r}: must be choices in a list, or {{low, high}}")
        else:
            try:
                for value in values:
                    sweep.config({key: value})
                    suggest(import_optional("optuna").trial.FixedTrial({key: value}), key, spec)
            except (TypeError, ValueError) as e:  # a UserError, or one of Optuna
                errors.append(f"space.{key} = {spec}: {e}")
    if errors:
        raise UserError("\n".join(f"{path}: {e}" for e in errors))
    return sweep

def suggest(trial: Any, key: str, spec: dict | list) -> None:
    default = flat(Config().tables()).get(key)
    if isinstance(spec, list):
        trial.suggest_categorical(key, spec)
    elif float in map(type, (default, *spec.values())):
        trial.suggest_float(key, **spec)
    else:
        trial.suggest_int(key, **spec)

def open_study(sweep: Sweep) -> Any:
    """The Optuna study of a sweep, created or loaded. Raises: UserError if its storage cannot be
    opened, or if it was created with other settings."""
    optuna = import_optional("optuna")
    folder = Path(sweep.output.dir)
    url = sweep.study.storage or f"sqlite:///{folder}/study.db?timeout=60"  # seconds of a lock
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in flat({"space": sweep.space, "base": sweep.base}).items()
                if not k.startswith(("base.wandb.", "base.output."))}
    with lock(folder / ".lock", wait=True):  # two workers would both create the tables
        address = url.split("@")[-1].split("?")[0]  # without a password
        with user_error(f"study.storage: cannot open {address}"):
            retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
            storage = optuna.storages.RDBStorage(
                url, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=retry)
            study = optuna.create_study(
                study_name=sweep.study.name, storage=storage, load_if_exists=True,
                direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=4))
        stored = study.user_attrs.get("settings", settings)
        if changed := [k for k in settings | stored if settings.get(k) != stored.get(k)]:
            raise UserError(f"study.name: {sweep.study.name} exists with another "
                            f"{', '.join(changed)}; choose another name and output.dir")
        if not study.get_trials(deepcopy=False) and [*folder.glob("trial_*")]:
            raise UserError(f"output.dir: {folder} holds trials of another study")
        study.set_user_attr("settings", settings)
    return study

def best_trials(study: Any, num: int) -> list[Any]:
    """The `num` best complete trials by value, repeats aside."""
    trials = [t for t in study.get_trials(deepcopy=False)
              if t.state.name == "COMPLETE" and "repeats" not in t.user_attrs]
    return sorted(trials, key=lambda t: -t.value)[:num]

def next_trial(sweep: Sweep, study: Any, deadline: float) -> Any:
    """The lock under which this worker, and no other, takes its next trial; None at the end. After
    the search, repeats of the best trials with two more seeds are enqueued. It waits while other
    workers run the last trials."""
    while time.time() < deadline:
        taking = lock(Path(sweep.output.dir, ".lock"), wait=True)
        import_optional("optuna").storages.fail_stale_trials(study)
        trials = [t for t in study.get_trials(deepcopy=False)
                  if t.state.name != "FAIL" or "reason" in t.user_attrs]  # else it was killed
        states = {t.state.name for t in trials}
        searched = [t for t in trials if "repeats" not in t.user_attrs]
        if len(searched) < sweep.study.trials or "WAITING" in states:
            return taking
        if "RUNNING" not in states:
            seed = sweep.config({}).train.seed
            enqueued = [t.user_attrs.get("repeats") for t in trials]
            repeats = [(t.params, [t.number, {"train.seed": (seed + k) % 2**32}])
                       for t in best_trials(study, sweep.study.repeat_best) for k in (1, 2)]
            missing = [repeat for repeat in repeats if repeat[1] not in enqueued]
            for params, repeat in missing:
                study.enqueue_trial(params, user_attrs={"repeats": repeat})
            return taking if missing else None
        taking.close()
        time.sleep(1)

def run_trial(sweep: Sweep, taking: Any, trial: Any) -> float:
    """The objective. Raises: UserError or RuntimeError, the reason of its failure; TrialPruned;
    SystemExit after a signal: the trial is run again once its heartbeat is stale."""
    taking.close()  # of SQLite, two workers could take one waiting trial
    optuna = import_optional("optuna")
    # A sampler for each trial: workers with equal samplers would suggest equal parameters.
    trial.study.sampler = optuna.samplers.TPESampler(
        seed=(sweep.study.seed + trial.number) % 2**32,
        n_startup_trials=min(10, 1 + sweep.study.trials // 4))
    _, settings = trial.user_attrs.get("repeats", (None, {}))
    reporter = optuna.trial.FixedTrial({}) if settings else trial  # no repeat is pruned
    try:
        for key, spec in sweep.space.items():
            suggest(trial, key, spec)
        cfg = sweep.config(trial.params | settings, f"trial_{trial.number}")
        return train(cfg, reporter)["bertscore_composite"]
    except (UserError, RuntimeError) as e:
        reason = (str(e) or repr(e)).splitlines()[0]
        trial.set_user_attr("reason", reason)
        print(f"trial {trial.number} failed: {reason}")
        raise

def write_results(sweep: Sweep, study: Any) -> str:
    """Write trials.jsonl, sweep.png and best.toml of the trials so far. The best trial has the best
    mean over seeds among those that are repeated. Returns a line about it."""
    trials, folder = study.get_trials(deepcopy=False), Path(sweep.output.dir)
    rows, values = [], {}
    for t in trials:
        number, settings = t.user_attrs.get("repeats", (t.number, {}))
        reason = t.user_attrs.get("reason", "killed" if t.state.name == "FAIL" else None)
        seconds = None if t.duration is None else t.duration.total_seconds()
        rows.append(dict(number=t.number, state=t.state.name.lower(), value=t.value,
                         params=t.params | settings, seconds=seconds, reason=reason))
        if t.state.name == "COMPLETE":
            values.setdefault(number, []).append(t.value)
    write_text(folder / "trials.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    with atomic_write(folder / "sweep.png") as path:
        plot = import_optional("optuna.visualization.matplotlib").plot_optimization_history
        axes = plot(study, target_name="BERTScore composite, validation")
        axes.figure.savefig(path, format="png", dpi=150, bbox_inches="tight")
        import_optional("matplotlib.pyplot").close(axes.figure)
    if not values:
        return f"{len(trials)} trials, none is complete yet"
    complete = best_trials(study, len(trials))
    repeated = [t for t in complete if len(values[t.number]) > 1]
    best = max(repeated or complete[:1], key=lambda t: np.mean(values[t.number]))
    cfg = sweep.config(best.params | {"train.eval_steps": best.user_attrs["eval_steps"]})
    head = f"# trial {best.number} of {study.study_name}: {best.value!r} on the validation split\n"
    write_text(folder / "best.toml", head + config_text(cfg))
    by_seed = ", ".join(f"{value:.4f}" for value in values[best.number])
    return f"{len(trials)} trials, the best is trial {best.number}: {by_seed}"

def run_sweep(sweep: Sweep) -> None:
    """One worker: it runs trials until all workers together have run study.trials and the repeats
    of the best. Killed, it is started again. Raises: UserError; SystemExit after a signal."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sweep: a worker is one process; start one for each GPU by hand")
    import_optional("matplotlib").use("Agg")
    cfg = sweep.config({})
    rt = start_runtime(cfg)._replace(quiet=True)
    open_inputs(cfg, SPLITS[:2], cfg.model.tokens, rt)  # its errors come first
    study, deadline = open_study(sweep), time.time() + 3600 * sweep.study.timeout_hours
    file = Path(sweep.output.dir, ".lock")
    while taking := next_trial(sweep, study, deadline):
        study.optimize(partial(run_trial, sweep, taking), n_trials=1, gc_after_trial=True,
                       catch=(UserError, RuntimeError))
        torch.cuda.empty_cache()
        with lock(file, wait=True):
            print(write_results(sweep, study), flush=True)
    with lock(file, wait=True):
        print(write_results(sweep, study))
    if not best_trials(study, 1):
        raise UserError(f"{sweep.study.name}: no trial was completed")

# -----------------------------------------------------------------------------
# Command line

COMMANDS = {  # by name: what `key=value` sets, the operands, and the function of both
    "train": (Config, ["TRAIN.TOML"], train),
    "eval": (EvalOptions, ["TRAIN.TOML"], evaluate),
    "generate": (GenerateOptions, [], generate),
    "embed": (EmbedOptions, ["TEXTS", "OUT"], embed_file),
    "synthesize": (SynthesizeOptions, ["TEXTS", "OUT"], synthesize),
    "filter": (Config, ["TRAIN.TOML", "OUT"], filter_tasks),
    "sweep": (Sweep, ["SWEEP.TOML"], run_sweep)}

def start_command(*arguments: str) -> None:
    options = [a for a in arguments if re.match(r"[\w.\"]+\s*=", a)]
    command, *paths = [expand_path(a) for a in arguments if a not in options] or [""]
    if command not in COMMANDS and (Path(command).suffix == ".toml" or Path(command).exists()):
        command, paths = "train", [command, *paths]
    if command not in COMMANDS:
        raise UserError(f"{command}: no command{did_you_mean(command, COMMANDS)}; nor a TOML file "
                        "to train by: elm.py TRAIN.TOML")
    kind, operands, function = COMMANDS[command]
    if len(paths) != len(operands):
        raise UserError(f"{command}: takes {' '.join([*operands, 'key=value …'])}, in quotes "
                        f"where it has spaces; given: {' '.join(paths) or 'no path'}")
    if command == "sweep":
        return run_sweep(load_sweep(*paths, options))
    if command == "eval" and not any(re.match(r"output(\.dir)?\s*=", o) for o in options):
        function = partial(evaluate, beside=True)
    toml = paths.pop(0) if "TRAIN.TOML" in operands else None
    function(load_config(toml, options, kind), *map(Path, paths))

def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 only if the job is done, 2 after an error its user can mend."""
    given = sys.argv[1:] if arguments is None else arguments
    given = [a for a in given if not re.fullmatch(r"--local_rank=\d+", a)]  # of the launcher
    if "--version" in given:
        print(f"elm {__version__}")
        return 0
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if given else 2
    if {"-h", "--help"} & set(given):
        kind, *_ = COMMANDS.get(given[0], COMMANDS["train"])
        options = list_options(kind).items()
        print(*(f"{name}: {x}" for name, x in options if "Config()" not in x), sep="\n")
        return 0
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
        tqdm.write("elm: stopped", sys.stderr)
        return 128 + signal.SIGINT

def run() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    code = main()
    print(end="", flush=True)
    os._exit(code)  # threads of torch and DeepSpeed abort now and then when the interpreter ends

if __name__ == "__main__":
    run()
