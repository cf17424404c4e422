"""elm: teach a frozen language model to read text embeddings.

An adapter, a small MLP, maps a text embedding into the token-embedding space of a language model
(LLM) that stays frozen. There it stands in for one token of the prompt, and the LLM answers about a
text that it sees only as a vector. The adapter is all that is trained.

All that the adapter needs of the frozen LLM is the gradient of the loss at the soft tokens, the
adapter's outputs. So a step has three parts: the adapter turns the step's embeddings into soft
tokens; the LLM, one micro-batch after the other, gives the gradient at them (soft_gradient); one
backward pass takes it from there through the adapter.

    python elm.py train.toml train.lr=2e-4            train in one process (a GPU or the CPU), with
                                                      an override
    deepspeed elm.py train.toml                       train on several GPUs, a process for each
    python elm.py train.toml train.resume=auto        resume a stopped run from its last checkpoint
    python elm.py eval train.toml adapter=PATH        report on any adapter
    python elm.py generate adapter=PATH embeddings=FILE query="…"       answers about vectors, or
                                                      about texts by their vectors (text="…")
    python elm.py sweep sweep.toml                    search settings by Optuna; start it again,
                                                      here or on another host, to add a worker

--help after a command explains its settings. data/prepare.py makes data sets.

As a module it needs torch, transformers, safetensors, pydantic and filelock; all else is imported
where it is used. Shapes: n examples, N rows of a split, T packed tokens, R response tokens,
E embedding width, D width of the LLM's token embeddings, K soft tokens per embedding, V vocabulary.
A step is one update of the optimizer, a micro-batch one forward and backward pass of the LLM.

Contents

    Config                one pydantic model per TOML table, overrides, error messages
    Runtime               processes, the log, files
    Prompts and batches   chat template, token ids, packing without padding
    Data set              vectors, rows, splits, the rows of each step
    Adapter               the MLP and its file
    LLM                   loading, ZeRO 3, bf16 on a CPU, packed attention, recomputation
    ELM                   the LLM with soft tokens: losses, generation, load and save
    Losses                chunked cross-entropy, drift, the gradient at the soft tokens
    Closed-form fits      ridge regression: the drift loss's probe, the adapter's warm start
    Checkpoint            one file with the whole state of a run
    Training              metrics, the plan of memory, the Trainer
    Evaluation            losses by vector, shuffled vector and texts; scores; the report
    Answers               engines that answer queries about texts, and a log of their answers
    Sweep                 Optuna over the settings of a training
    Commands              eval and generate
    Command line          arguments, help, exit codes
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import dataclasses
import difflib
import email.utils
import errno
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
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
import textwrap
import threading
import time
import unicodedata
import warnings
import weakref
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

import numpy as np
import pydantic
import pydantic_core
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:  # imported where they are used: --help must not wait for them
    import optuna
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as parquet
    import wandb
    from bert_score import BERTScorer
    from matplotlib.axes import Axes
    from sentence_transformers import SentenceTransformer
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__version__ = "0.1.0"

S = TypeVar("S")
T = TypeVar("T")
Json = dict[str, Any]  # an object of JSON, a table of TOML
Vectors = Tensor | np.ndarray | Sequence[Any]  # [n, E] or [E], or a column of pandas: see as_tensor


class UserError(ValueError):
    """An error the user can correct: each line says what, where and what to do. Exit code 2."""


# -----------------------------------------------------------------------------
# Config
#
# One frozen pydantic model per TOML table. --help prints their fields: the comments beside them
# are the manual.

TASKS = (
    "keywords", "category", "questions",
    "summary", "describe", "explain_beginner", "explain_expert", "related_topics",
    "characteristics_pos", "characteristics_neg", "style_academic", "style_casual",
    "counterfactual")  # fmt: skip
RECONSTRUCT = "reconstruct"  # a further task type, trained only where data.tasks names it

# Keys of DeepSpeed's own config that elm sets from [train] and [model].
KEYS_SET_BY_ELM = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "bf16", "fp16",
    "activation_checkpointing")  # fmt: skip


def expand_path(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL character")
    if not path.strip():
        raise ValueError("a path cannot be empty; none restores the default")
    return os.path.expanduser(os.path.expandvars(path))


def absent(path: str | Path, kind: str = "file") -> str:
    """What to say of a path that is not there."""
    if Path(path).is_absolute():
        return f"there is no {kind} {path}"
    return f"there is no {kind} {path} here ({Path.cwd()}); paths are relative to it"


def check_file(path: str | Path, key: str = "") -> None:
    """Raises: UserError that names the config key, unless the path is a file."""
    prefix = f"{key}: " if key else ""
    if Path(path).is_dir():
        raise UserError(f"{prefix}{path} is a folder, not a file")
    if not Path(path).exists():
        raise UserError(prefix + absent(path))


def drop_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def check_template_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Raises: ValueError at Python's True and False as a text, which a template takes for true."""
    for name, value in arguments.items():
        if value in ("True", "False"):
            raise ValueError(f"{name} = {value!r}: TOML writes {value.lower()}")
    return arguments


QUANTIZATION_KINDS = ("off", "nf4", "int8")


def check_quantization_kind(value: object) -> object:
    if value not in QUANTIZATION_KINDS and not isinstance(value, dict):
        raise ValueError(f"{value!r} is none of {', '.join(QUANTIZATION_KINDS)}, nor a table of "
                         "transformers' quantization_config")
    return value


def as_list(value: object) -> object:
    """One text as a list of it."""
    return [value] if isinstance(value, str) else value


def check_url(url: str) -> str:
    if not re.fullmatch(r"https?://.*\w/?", url):
        raise ValueError(f"{url} is no address of a server; give one as http://localhost:8000/v1")
    return url


PathStr = Annotated[str, pydantic.AfterValidator(expand_path)]
ServerURL = Annotated[str, pydantic.AfterValidator(check_url)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
ZeroStage = Annotated[int, Field(ge=0, le=3)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
TemplateArguments = Annotated[
    dict[str, Any], pydantic.AfterValidator(check_template_arguments)]
Quantization = Annotated[Any, pydantic.AfterValidator(check_quantization_kind)]
TextList = Annotated[
    tuple[str, ...], Field(strict=False, min_length=1), pydantic.BeforeValidator(as_list)]
RowIds = Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
TaskNames = Annotated[
    tuple[str, ...], Field(strict=False, min_length=1), pydantic.AfterValidator(drop_repeats)]


class Table(BaseModel, frozen=True, strict=True, extra="forbid", allow_inf_nan=False):
    """A TOML table. Types are strict: lr = 1 is a float, lr = "1" is an error."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def restore_defaults(cls, values: object) -> object:
        """None, which `key=none` on the command line gives, means the default again."""
        if not isinstance(values, dict):
            return values
        kept = {}
        for key, value in values.items():
            is_default = value is None and key in cls.model_fields  # unknown keys are reported
            if not is_default:
                kept[key] = value
        return kept

    def to_dict(self) -> Json:
        """The tables as TOML can hold them: without None."""
        return self.model_dump(mode="json", exclude_none=True)


ConfigClass = TypeVar("ConfigClass", bound=Table)


class ModelConfig(Table):
    llm: PathStr = "Qwen/Qwen3-4B-Instruct-2507"  # the frozen LLM: hub name, folder or GGUF file
    hidden_dim: PositiveInt = 4096  # width of the adapter's hidden layer
    tokens: PositiveInt = 1  # soft tokens per embedding
    dropout: Probability = 0.0  # share of the adapter's hidden units that drop out in training
    residual_scale: NonNegativeFloat = 1.0  # factor of the adapter's residual; 0: none
    standardize: bool = True  # embeddings, by the training split's mean and deviation
    bf16: bool = True  # of the LLM; the adapter and its optimizer are always fp32
    quantization: Quantization = "off"  # of the LLM as it is loaded: "nf4" (4 bits a weight, double
    #   quantisation), "int8", or a table of transformers' quantization_config
    grad_checkpoint: Literal[True, False, "auto"] = "auto"  # recompute the LLM's layers in the
    #   backward pass to save memory: all, none, or as many as the GPU's memory makes necessary
    template: TemplateArguments = {}  # arguments of the chat template: { enable_thinking = false }


class DataConfig(Table):
    dir: PathStr = "data"  # a folder with embeddings/ and synthesis/, see data/README.md
    embedder: PathStr | None = None  # the model that made the vectors; none: as their tables say,
    #   if data/prepare.py wrote them
    tasks: TaskNames = TASKS  # task types to train and report on, or task types of your own
    max_seq_length: PositiveInt = 2048  # tokens of prompt and response; longer responses are cut
    num_workers: NonNegativeInt = 4  # threads that prepare the next steps


class TrainConfig(Table):
    batch_size: PositiveInt = 16  # a step takes batch_size * grad_accum rows on each process;
    grad_accum: PositiveInt = 2  #   into which micro-batches they are cut is decided by memory
    epochs: PositiveInt = 3  # passes over the training rows, unless max_steps is set
    max_steps: NonNegativeInt | None = None  # none: by epochs; 0: the closed-form adapter alone
    lr: PositiveFloat = 1e-4  # the peak, after warm-up; from there linear decay to 0
    warmup_steps: NonNegativeInt | None = None  # steps in which the rate rises linearly; none:
    #   1000, but at most a tenth of the run
    weight_decay: NonNegativeFloat = 0.01  # AdamW's decay of the adapter's weights
    max_grad_norm: PositiveFloat = 1.0  # gradients are clipped to this norm
    eval_steps: PositiveInt = 500  # steps from one validation to the next; each saves before it
    save_steps: PositiveInt = 1000  # steps from one checkpoint to the next
    logging_steps: PositiveInt = 50  # steps from one line of metrics.jsonl to the next
    warm_start: bool = True  # begin at the closed-form solution
    patience: PositiveInt | None = None  # validations without a lower loss before the run ends;
    #   none: no end before the last step
    seed: Seed = 42  # of the adapter's weights, the order of rows, dropout
    resume: PathStr | None = None  # a checkpoint; "auto": the newest of output.dir, if any;
    #   none: a new run


class LossConfig(Table):
    drift_weight: NonNegativeFloat = 0.0  # factor of the drift loss; 0: it is not computed
    drift_target: Cosine = 1.0  # no drift where response and embedding have this cosine, or more


class EvalConfig(Table):
    samples: NonNegativeInt = 100  # rows that are answered and scored; losses use the whole split
    max_new_tokens: PositiveInt = 256  # of an answer
    embedder: PathStr | None = None  # embeds the answers again, for consistency, MRR and top-1: hub
    #   name or folder of sentence-transformers; none: the model that made the vectors, if it is
    #   known; "off": no such scores
    split: Literal["train", "val", "test"] | None = None  # the split to report on; none: test if
    #   its files exist, else val
    bertscore_model: PathStr = "microsoft/deberta-xlarge-mnli"  # hub name or folder; "off": answers
    #   are scored without BERTScore
    bertscore_layers: PositiveInt | None = None  # layer of its hidden states; none: bert-score's
    #   choice for the model, the last one of a folder


class DeepSpeedConfig(Table, extra="allow"):
    zero_stage: ZeroStage = 0  # 3 shares the frozen LLM out among the
    #   processes; 1 and 2 act as 0, as it has neither gradients nor optimizer state
    zero_optimization: dict[str, Any] | None = None  # as in DeepSpeed's config, like all other
    #   keys of this table: for stage 3

    @pydantic.model_validator(mode="after")
    def check_keys(self) -> DeepSpeedConfig:
        """Refuse keys that elm sets, misspelled ones, and those that nothing would read."""
        for key in sorted(self.model_fields_set - {"zero_stage"}):
            if key in KEYS_SET_BY_ELM:
                raise ValueError(f"{key} is set by elm, from [train] and [model]")
            hint = did_you_mean(key, type(self).model_fields)
            if key in self.model_extra and hint:
                raise ValueError(f"{key}: unknown key{hint}")
            if self.zero_stage < 3:
                raise ValueError(f"{key} has no effect unless deepspeed.zero_stage = 3")
        if "stage" in (self.zero_optimization or {}):
            raise ValueError("zero_optimization.stage is set by elm, from zero_stage")
        return self


class WandbConfig(Table):
    enabled: bool = False  # log to Weights & Biases, too
    project: str = "elm-training"
    run_name: str | None = None  # none: W&B invents one
    mode: Literal["online", "offline", "disabled"] = "online"  # offline where there is no login


class OutputConfig(Table):
    dir: PathStr = "data/checkpoints"  # what a run leaves; a folder that holds a run is refused
    log_file: PathStr | None = None  # the console's lines, with their times; none: no file


class Config(Table):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    eval: EvalConfig = EvalConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    wandb: WandbConfig = WandbConfig()
    output: OutputConfig = OutputConfig()


def dotted_keys(config_class: type[Table], prefix: str = "") -> list[str]:
    """The keys of a config by their dotted names, and those of its tables."""
    keys = []
    for name, info in config_class.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.default, Table):
            keys += dotted_keys(type(info.default), f"{prefix}{name}.")
    return keys


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint at the names that have the same last part, else at the most similar one, or ""."""
    last_part = name.rpartition(".")[2]
    matches = [n for n in names if n.rpartition(".")[2] == last_part]
    if not matches:
        matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)
    if not matches:
        return ""
    return f", did you mean {' or '.join(matches)}?"


def format_error(error: Json, config_class: type[Table]) -> str:
    """One line for an error of pydantic, after the dotted key."""
    key = dotted_key(error)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        # A key of a table is no misspelled table.
        candidates = [k for k in dotted_keys(config_class) if k.count(".") >= key.count(".")]
        hint = did_you_mean(key, candidates)
        if not hint and isinstance(error["input"], dict):  # as model.bf16 of another command
            hint = did_you_mean(f"{key}.{next(iter(error['input']), '')}", candidates)
        return f"{key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{key}: is missing"
    if error["type"] == "value_error":  # of a validator of this file
        return f"{key}: {message}" if key else message
    value = error["input"]
    meant = correct_value(key, error)
    hint = ""
    if meant is not None and is_accepted(key, meant, config_class):
        hint = f", as {shlex.quote(f'{key}={toml_value(meant)}')}"
    return f"{key} = {value!r}: {describe_type(error) or message}{hint}"


def dotted_key(error: Json) -> str:
    return ".".join(str(part) for part in error["loc"])


# What a value must be by the type of pydantic's error, where pydantic says it in Python's words.
TOML_WORDS = {
    "bool_type": "must be true or false",
    "string_type": "must be a text in quotes",
    "tuple_type": "must be a list",
    "too_short": "must have an entry",
    "dict_type": "must be a table, {name = value}",
    "model_type": "must be a table, {name = value}"}


def describe_type(error: Json) -> str:
    """What a value must be in the words of TOML, or ""."""
    if error["type"] == "literal_error":
        choices = error["ctx"]["expected"]
        return "must be " + choices.replace("True", "true").replace("False", "false")
    return TOML_WORDS.get(error["type"], "")


BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def correct_value(key: str, error: Json) -> Any:
    """The value that was meant, or None."""
    value = error["input"]
    is_entry_of_list = key.rpartition(".")[2].isdecimal()
    if is_entry_of_list or isinstance(value, bool | dict):
        return None
    if error["type"] == "tuple_type":
        return correct_list(value)
    if error["type"] == "string_type" and isinstance(value, int | float):
        return str(value)
    if error["type"] in ("float_type", "int_type"):
        return read_number(value, is_whole=error["type"] == "int_type")
    if error["type"] == "bool_type" or "True" in error.get("ctx", {}).get("expected", ""):
        return BOOLEANS.get(str(value).lower())
    return None


def is_accepted(key: str, value: Any, config_class: type[Table]) -> bool:
    """Whether a value of the dotted key has no error of its own."""
    try:
        config_class.model_validate(apply_overrides({}, {key: value}))
    except pydantic.ValidationError as e:
        return not is_set_by([dotted_key(error) for error in e.errors()], key)
    return True


def correct_list(value: object) -> list[Any] | None:
    """The list that a number or a text without the quotes of its entries was meant to be. None: of
    numbers and words together, or of anything else."""
    if isinstance(value, int | float):
        return [value]
    if not isinstance(value, str):
        return None
    entries = [entry.strip(" '\"") for entry in value.strip("[]").split(",")]
    are_numbers = [entry.isdecimal() for entry in entries]
    if all(are_numbers):
        return [int(entry) for entry in entries]
    return None if any(are_numbers) else entries


def read_number(value: object, is_whole: bool) -> float | int | None:
    """The number that TOML writes in another way, such as .5 or, where it is to be whole, 1e3."""
    number = None
    if isinstance(value, str | float):
        with contextlib.suppress(ValueError):
            number = float(value)
    if number is None or not math.isfinite(number):
        return None
    if not is_whole:
        return number
    return int(number) if number.is_integer() else None


def parse_config(
    tables: Json, config_class: type[ConfigClass] = Config, file_name: str = "",
    overrides: Iterable[str] = (),
) -> ConfigClass:
    """Nested dicts as a config. Raises: UserError with one line per mistake, all at once, each
    after `file_name`, unless its key is among `overrides`."""
    try:
        return config_class.model_validate(tables)
    except pydantic.ValidationError as e:
        errors = e.errors()
    lines = []
    for error in errors:
        key = dotted_key(error)
        is_counted_again = error["type"] == "too_short" and error["input"]
        if is_counted_again and len(errors) > 1:  # without the entries that are wrong
            continue
        is_of_file = file_name and error["type"] != "missing" and not is_set_by(overrides, key)
        prefix = f"{file_name}: " if is_of_file else ""
        lines.append(prefix + format_error(error, config_class))
    raise UserError("\n".join(lines))


def is_set_by(overrides: Iterable[str], key: str) -> bool:
    """Whether an override sets the key, a table that holds it, or a part of it."""
    for name in overrides:
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
            return True
    return False


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` -> (section.key, value). The value is read as TOML, a bare word as a
    string; `none` is None, which stands for the default. Raises: UserError."""
    name, equals, value = text.partition("=")
    name = name.strip().replace('"', "")
    value = value.strip()
    if not text.strip():  # such as "$MORE" where MORE is not set
        raise UserError("an empty argument; a setting is one word, name=value")
    if not equals or not name:
        raise UserError(f"{text}: a setting is one word, name=value; quote a value with spaces: "
                        "'query=What is it about?'")
    if not value:  # such as train.lr=$LR where LR is not set
        raise UserError(f"{name}: no value after the =; none restores the default, \"''\" is an "
                        "empty text")
    if value == "none":
        return name, None
    try:
        return name, tomllib.loads(f"x = {value}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return name, value


def parse_overrides(texts: Iterable[str]) -> Json:
    """Values by dotted name; of equal names the last counts. Raises: UserError with one line per
    mistake."""
    values = {}
    errors = []
    for text in texts:
        try:
            name, value = parse_override(text)
            values[name] = value
        except UserError as e:
            errors.append(str(e))
    if errors:
        raise UserError("\n".join(errors))
    return values


def read_toml(path: str, key: str = "") -> Json:
    """`key` names it in messages. Raises: OSError; UserError if it is absent, or no TOML."""
    check_file(expand_path(path), key)
    data = Path(expand_path(path)).read_bytes()
    with user_error(f"{path}: not valid TOML", ValueError, RecursionError):
        return tomllib.loads(data.decode("utf-8-sig"))


def apply_overrides(tables: Json, overrides: Json) -> Json:
    """Set values by dotted name in nested tables, in place. Raises: UserError."""
    for name, value in overrides.items():
        *parents, key = name.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"{name}: {parent} is not a table")
        table[key] = value
    return tables


def load_config(
    path: str | None = None, overrides: Iterable[str] = (),
    config_class: type[ConfigClass] = Config,
) -> ConfigClass:
    """A TOML file (None: the defaults) under overrides of the form `section.key=value`.
    Raises: OSError; UserError with one line per mistake."""
    if isinstance(overrides, str):
        raise UserError(f"load_config: takes a list of overrides, as [{overrides!r}]")
    tables = read_toml(path) if path else {}
    if "space" in tables and "space" not in config_class.model_fields:
        raise UserError(f"{path}: is the file of a sweep: {own_program()} sweep {path}")
    values = parse_overrides(overrides)
    apply_overrides(tables, values)
    return parse_config(tables, config_class, path or "", values)


def flatten(tables: Json, prefix: str = "") -> Json:
    """Nested tables as values by dotted name. {low, high} tables, ranges of a sweep, stay whole."""
    values = {}
    for key, value in tables.items():
        is_range = isinstance(value, dict) and ("low" in value or "high" in value)
        if isinstance(value, dict) and not is_range:
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def toml_value(value: object) -> str:
    """A value as TOML writes it. JSON strings are TOML strings, but for one control character."""
    if isinstance(value, dict):
        pairs = [f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()]
        return "{" + ", ".join(pairs) + "}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def config_text(cfg: Config) -> str:
    """The resolved config as TOML, under package versions and the git commit as comments."""
    lines = []
    packages = ["torch", "transformers", "deepspeed", "safetensors"]
    if cfg.model.quantization != "off":
        packages.append("bitsandbytes")
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"# {package} {importlib.metadata.version(package)}")
    if shutil.which("git"):
        words = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        if commit:  # else the file is not in a git checkout
            lines.append(f"# commit {commit}")
    for section, values in cfg.to_dict().items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


# -----------------------------------------------------------------------------
# Runtime
#
# Processes, the log, files. In one process every collective operation is an identity.

# Process 0 may load and run models alone for long while the others wait for it.
LONGEST_WAIT = timedelta(days=1)

log = logging.getLogger("elm")


class ConsoleHandler(logging.Handler):
    """Writes messages above progress bars: warnings to stderr, all else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        message = record.getMessage()
        stream = sys.stdout
        if record.levelno >= logging.WARNING:
            message = f"elm: warning: {message}"
            stream = sys.stderr
        if stream is None:  # closed, as `>&-` does
            return
        tqdm.write(message, stream)
        stream.flush()


log.setLevel(logging.INFO)
log.propagate = False
log.handlers = [ConsoleHandler()]
log.filters = [lambda record: rank() == 0]  # process 0 speaks for all


@contextlib.contextmanager
def log_to_file(path: str | None) -> Iterator[None]:
    """Append messages to a file, too, each with its time. Raises: UserError."""
    if path is None or rank() > 0:
        yield
        return
    with user_error(f"output.log_file: {path} cannot be written", OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def shows_bars() -> bool:
    """Whether progress bars are drawn: on process 0's terminal, unless the log is quiet."""
    if rank() > 0 or not log.isEnabledFor(logging.INFO):
        return False
    return sys.stderr is not None and sys.stderr.isatty()


def progress(items: Iterable[T] | None, label: str, **options: Any) -> tqdm[T]:
    """tqdm over `items`, or by hand, on stderr, if bars are drawn."""
    from tqdm import tqdm

    options.setdefault("disable", not shows_bars())
    return tqdm(items, label, leave=False, **options)


@functools.cache
def warn_once(message: str) -> None:
    """A warning that a process gives once, however often it is found."""
    log.warning(message)


def clip(text: str, length: int = 300) -> str:
    """The beginning of a text, in one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


@contextlib.contextmanager
def user_error(message: str, *exception_types: type[Exception]) -> Iterator[None]:
    """Raise UserError, `message` and the reason in one line, in place of `exception_types`: what a
    library raises at the user's file or setting. Lack of memory stays what it is."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except exception_types as e:
        reason = str(e) or repr(e)
        if isinstance(e, KeyError):
            reason = f"{e} is missing"
        if isinstance(e, OSError) and e.filename is not None:  # the message names the file
            reason = e.strerror
        raise UserError(f"{message}: {clip(reason, 300)}") from e


def import_optional(package: str, extra: str | None = None) -> ModuleType:
    """A module. `extra` is the one of pyproject.toml that brings it. Raises: UserError that says
    what to install."""
    try:
        # Some libraries print as they are imported: the standard output is for answers.
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(package)
    except ModuleNotFoundError as e:
        brought_by = f" (elm's extra {extra!r} brings it)" if extra else ""
        raise UserError(f"{e.name} is not installed: pip install {e.name}{brought_by}") from None


# Processes

# Where launchers that set no RANK say how many processes they started: Open MPI; MPICH, Intel MPI
# and Cray PALS; MVAPICH2; jsrun; srun. Not SLURM_NTASKS, which is of the whole job: it is also set
# in the shell of salloc and in a batch script, where one process runs.
SIZES_OF_OTHER_LAUNCHERS = (
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE",
    "SLURM_STEP_NUM_TASKS")


def read_launcher_number(name: str, default: int) -> int:
    """A variable of the launcher's environment. Raises: UserError if it is not a number."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} = {text!r}: no number; torchrun and deepspeed set one") from None


def rank() -> int:
    """The number of this process; before start_distributed, what the launcher says. Raises:
    UserError if that is no number."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return read_launcher_number("RANK", 0)


def world_size() -> int:
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def find_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Shapes vary from step to step, which fragments the caching allocator's fixed segments. The
    # allocator reads its settings, under either name, at its first use.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # cuDNN's attention plans anew for each shape, and an answer has a new one with each token; with
    # masks it has been wrong (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Some launchers show each process its own GPU alone.
    local_rank = read_launcher_number("LOCAL_RANK", 0) % torch.cuda.device_count()
    return torch.device("cuda", local_rank)


def check_launcher() -> None:
    """Raises: UserError if the launcher's environment is not whole, or is of a launcher whose
    processes would each run alone and write to the same folder."""
    size = read_launcher_number("WORLD_SIZE", 1)
    number = read_launcher_number("RANK", 0)
    if not 0 <= number < size:
        raise UserError(f"RANK = {number}: not among WORLD_SIZE = {size} processes; start them by "
                        "torchrun or deepspeed")
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(f"{name}: not set, but WORLD_SIZE = {size}; start the processes by "
                                "torchrun or deepspeed")
    if "RANK" not in os.environ:
        check_launched_alone("start them by torchrun or deepspeed, which set RANK and WORLD_SIZE "
                             "(under srun one torchrun on each node)")


def check_launched_alone(advice: str) -> None:
    """Raises: UserError with the advice, if a launcher has started several of these processes."""
    for name in ("WORLD_SIZE", *SIZES_OF_OTHER_LAUNCHERS):
        if os.environ.get(name) == "":  # as `SLURM_STEP_NUM_TASKS= python elm.py` unsets it
            continue
        size = read_launcher_number(name, 1)
        if size > 1:
            raise UserError(f"{name} = {size}: each of these processes would do the whole job; "
                            f"{advice}, or unset {name} for one process alone")


def start_distributed() -> torch.device:
    """Join the processes that the launcher's environment describes, and return this process's
    device. A process alone joins none: it needs no network. Raises: UserError if the environment
    is not whole, or if the processes cannot connect."""
    if not torch.distributed.is_initialized():
        check_launcher()
    device = find_device()
    num_processes = read_launcher_number("WORLD_SIZE", 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    if num_processes > 1 and not torch.distributed.is_initialized():
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        message = f"cannot connect to the other processes by {where} (the launcher's --master_port)"
        with user_error(message, RuntimeError, ValueError):
            init_process_group(device)
    return device


def init_process_group(device: torch.device, **options: Any) -> None:
    """torch's. Objects and CPU tensors go by gloo, CUDA tensors by NCCL."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=LONGEST_WAIT, **options)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum x over all processes, in place. All processes take part."""
    if world_size() > 1:
        torch.distributed.all_reduce(x)
    return x


def least_of_all(number: int) -> int:
    """The least of the processes' numbers. All take part."""
    if world_size() == 1:
        return number
    least = torch.tensor(number)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)


def broadcast_from_rank0(x: Tensor) -> Tensor:
    """Return process 0's x. All processes take part."""
    if world_size() == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.broadcast(x, src=0)
    return x


def run_on_rank0(function: Callable[[], T]) -> T:
    """Return function() of process 0 on every process, or raise its UserError or OSError there. All
    processes take part."""
    result = None
    error = None
    if rank() == 0:
        try:
            result = function()
        except (UserError, OSError) as e:
            error = e
    if world_size() > 1:
        outcome = [result, error]
        torch.distributed.broadcast_object_list(outcome)
        result, error = outcome
    if error:
        raise error
    return result


def keep_on_rank0(function: Callable[[], T]) -> T | None:
    """As run_on_rank0, for what cannot be sent: other processes get None."""
    kept = []
    run_on_rank0(lambda: kept.append(function()))
    return kept[0] if kept else None


def prefetch(function: Callable[[S], T], items: Iterable[S], num_threads: int) -> Iterator[T]:
    """Yield function(item) for each item, in order, computed by threads that are up to 2 *
    num_threads items ahead; if num_threads is 0, by one thread, each when it is asked for."""
    items = iter(items)
    pool = ThreadPoolExecutor(max(1, num_threads))
    pending = deque()
    for item in itertools.islice(items, 2 * num_threads + 1):
        pending.append(pool.submit(function, item))
    try:
        while pending:
            yield pending.popleft().result()
            for item in itertools.islice(items, 1):
                pending.append(pool.submit(function, item))
    finally:
        # Cancel what is queued and wait for what runs, unless Ctrl-C ended the wait for a result.
        interrupted = sys.exc_info()[0] is KeyboardInterrupt
        pool.shutdown(wait=not interrupted, cancel_futures=True)


def in_blocks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items."""
    items = iter(items)
    while block := list(itertools.islice(items, size)):
        yield block


# Files


@contextlib.contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Raises: UserError that names the path, if it cannot be written."""
    message = f"{path}: cannot be written (what was there is unharmed)"
    with user_error(message, OSError, SafetensorError):
        yield


# What a file system says to a call that it lacks: to a lock, a mode, a sync. NFS and SMB lack some,
# file systems on object stores more.
NOT_SUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EINVAL,
                 errno.ENOLCK)


@contextlib.contextmanager
def where_supported() -> Iterator[None]:
    """For a call that the file system may lack: then it does nothing. Raises: OSError."""
    try:
        yield
    except OSError as e:
        if e.errno not in NOT_SUPPORTED:
            raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` once it is complete and on disk. Raises:
    UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with report_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as f, where_supported():
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def append_text(path: Path, text: str) -> None:
    with report_write_errors(path), open(path, "a", encoding="utf-8") as f:
        f.write(text)


def jsonl(entries: Iterable[Json]) -> str:
    """One line of JSON per entry."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file, which a dead process loses. Warns where the file system has no
    locks: then nothing is held. Raises: OSError; UserError if another process holds it, unless
    `wait`."""
    from filelock import FileLock, Timeout

    # Without locks, the library would take any lock file that was left for one that is held.
    file_lock = FileLock(path, fallback_to_soft=False)
    try:
        file_lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f"{path}: another process holds it") from None
    except OSError as e:
        if e.errno not in NOT_SUPPORTED:
            raise
        warn_once(f"{path.parent}: its file system has no locks, so nothing prevents a second "
                  "process from writing there at the same time")
    try:
        yield
    finally:
        file_lock.release()


def check_new(*paths: Path) -> None:
    """Raises: UserError if a path exists."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already; choose another place")


def check_can_write(folder: Path, key: str) -> None:
    """Raises: UserError that names the config key, unless files can be made in a folder, or in the
    place where it is to be. Leaves nothing behind."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{key}: {place} is a file, not a folder; choose another folder")
    with user_error(f"{key}: cannot write in {place}; choose another folder", OSError):
        tempfile.TemporaryDirectory(prefix=".elm", dir=place).cleanup()


def sha256_short(data: str | bytes) -> str:
    """16 hex digits."""
    if isinstance(data, str):
        data = data.encode(errors="surrogatepass")
    return hashlib.sha256(data).hexdigest()[:16]


# -----------------------------------------------------------------------------
# Prompts and batches
#
# From queries and responses to token ids, and from there to micro-batches without padding.

PLACEHOLDER = "<EMB>"  # where the vector goes in a query; without it, on a line of its own, first
ANSWER = "<ANSWER>"  # stands for the assistant's turn while a chat template is taken apart
SOFT_TOKEN = -1  # the id that marks a soft token in Example.ids

# A micro-batch holds at most this many tokens, or one example. On a GPU it is the first of the
# sizes that plan_memory tries; on a CPU small ones are as fast.
MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}


# All characters that str.strip, and so Jinja's trim, takes for white space.
WHITE_SPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())

# What an adapter stores of a template: the texts around the turns, and the characters that are
# stripped from the beginning and the end of a user's and of an assistant's turn.
TEXTS_OF_TEMPLATE = ("prefix", "suffix", "end")
STRIPPED_BY_TEMPLATE = ("user_lstrip", "user_rstrip", "assistant_lstrip", "assistant_rstrip")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, under arguments of the user's."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Json
    has_typed_contents: bool  # whether a turn's content is [{"type": "text", "text": ...}]

    def render_turn(self, query: str) -> str:
        """A user's turn, and the beginning of an assistant's."""
        turns = [self._turn("user", query)]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **self.arguments)

    def render_conversation(self, response: str) -> str:
        """A user's turn and an assistant's."""
        turns = [self._turn("user", PLACEHOLDER), self._turn("assistant", response)]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **self.arguments)

    def _turn(self, role: str, text: str) -> Json:
        content = [{"type": "text", "text": text}] if self.has_typed_contents else text
        return {"role": role, "content": content}


def open_template(tokenizer: PreTrainedTokenizerBase, arguments: Json) -> ChatTemplate:
    """With typed contents where the template does not show plain ones. Raises: UserError if the
    tokenizer has several templates, and neither a default nor the user's choice."""
    from jinja2 import TemplateError

    templates = tokenizer.chat_template
    has_names = isinstance(templates, dict) and "default" not in templates
    if has_names and "chat_template" not in arguments:
        raise UserError(f"{tokenizer.name_or_path}: its chat templates are {sorted(templates)}, "
                        "none of them the default; choose by model.template.chat_template")
    for has_typed_contents in (False, True):
        template = ChatTemplate(tokenizer, arguments, has_typed_contents)
        with contextlib.suppress(TemplateError, ValueError, TypeError):
            if PLACEHOLDER in template.render_turn(PLACEHOLDER):
                return template
    return ChatTemplate(tokenizer, arguments, has_typed_contents=False)


def render_prompt(tokenizer: PreTrainedTokenizerBase, arguments: Json) -> dict[str, str]:
    """What the chat template does to a user's turn and its answer: the texts TEXTS_OF_TEMPLATE and
    the characters STRIPPED_BY_TEMPLATE, by the template or by the tokenizer.

    `end` ends an assistant's turn, up to its first control token. Without a chat template: what the
    tokenizer puts before any text (a BOS token, say), a line break, the EOS token; nothing is
    stripped.
    Raises: UserError if the template fails, or does not contain each turn exactly once.
    """
    from jinja2 import TemplateError

    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        return prompt_without_template(tokenizer)
    template = open_template(tokenizer, arguments)
    with user_error(f"{name}: its chat template fails", TemplateError, ValueError, TypeError):
        prompt = template.render_turn(PLACEHOLDER)
        num_shown = prompt.count(PLACEHOLDER)
        if num_shown != 1:
            raise ValueError(f"it shows the text of a user's turn {num_shown} times")
        conversation = template.render_conversation(ANSWER)
        of_user = find_stripped(template.render_turn, PLACEHOLDER)
        of_assistant = find_stripped(template.render_conversation, ANSWER)
    prefix, suffix = prompt.split(PLACEHOLDER)
    if ANSWER not in conversation:
        raise UserError(f"{name}: its chat template does not show the assistant's turn as it is")

    # A reasoning model may begin its answers with a block that the generation prompt leaves open.
    before_answer = conversation.partition(PLACEHOLDER)[2].partition(ANSWER)[0]
    is_longer = len(before_answer.split()) > len(suffix.split())
    if is_longer or suffix.rstrip().endswith("<think>"):
        log.warning(f"{name}: a prompt ends with {suffix!r}, but an answer follows "
                    f"{before_answer!r}; model.template.enable_thinking = false?")
    after_answer = conversation.rpartition(ANSWER)[2]
    end = cut_at_control_token(after_answer, tokenizer)
    return {
        "prefix": prefix,
        "suffix": suffix,
        "end": end,
        "user_lstrip": stripped_after(prefix, tokenizer) or of_user.left,
        "user_rstrip": stripped_before(suffix, tokenizer) or of_user.right,
        "assistant_lstrip": stripped_after(suffix, tokenizer) or of_assistant.left,
        "assistant_rstrip": stripped_before(end, tokenizer) or of_assistant.right}


class Stripped(NamedTuple):
    left: str  # the characters that a template strips from the beginning of a turn
    right: str  # and from its end


def find_stripped(render: Callable[[str], str], text: str) -> Stripped:
    """By rendering a turn once for each character of WHITE_SPACE, which stands around `text`. By
    lengths, as some templates print the time."""
    before, _, after = render(text).partition(text)
    left = ""
    right = ""
    for character in WHITE_SPACE:
        shown = render(character + text + character)
        shown_before, _, shown_after = shown.partition(text)
        if len(shown_before) == len(before):
            left += character
        if len(shown_after) == len(after):
            right += character
    return Stripped(left, right)


def stripped_after(part: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The characters that the tokenizer strips from what follows a part of a template: all of
    WHITE_SPACE where the part ends, but for white space, with a token such as Phi's <|assistant|>,
    which swallows white space after it."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.rstrip and part.rstrip().endswith(token.content):
            return WHITE_SPACE
    return ""


def stripped_before(part: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """As stripped_after, from what a part follows."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.lstrip and part and part.lstrip().startswith(token.content):
            return WHITE_SPACE
    return ""


def prompt_without_template(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """As render_prompt."""
    with_special_tokens = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    num_before = with_special_tokens.index(plain[0])
    prefix = tokenizer.decode(with_special_tokens[:num_before])
    texts = {"prefix": prefix, "suffix": "\n", "end": tokenizer.eos_token}
    return texts | dict.fromkeys(STRIPPED_BY_TEMPLATE, "")


def cut_at_control_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A text up to and with its first control token; without one, the EOS token, if there is
    one."""
    ends = []
    for token in tokenizer.added_tokens_decoder.values():
        if token.content.strip() and token.content in text:
            ends.append(text.index(token.content) + len(token.content))
    return text[: min(ends)] if ends else tokenizer.eos_token


def check_template_parts(parts: object, path: str | Path) -> None:
    """Raises: UserError unless what a file stores as its prompt has the form of render_prompt.
    STRIPPED_BY_TEMPLATE may be missing: early versions of elm stripped nothing."""
    keys = set(parts) if isinstance(parts, dict) else set()
    early = set(TEXTS_OF_TEMPLATE)
    is_whole = keys in (early, early | set(STRIPPED_BY_TEMPLATE))
    if not is_whole or not all(isinstance(text, str) for text in parts.values()):
        raise UserError(f"{path}: its prompt cannot be used: {clip(repr(parts), 100)}")


# Text on which tokenizers differ: by their vocabularies, and by how they treat capitals, accents,
# digits, spaces, scripts and what they do not know.
PROBE_TEXT = """The quick brown FOX jumped over 13 lazy dogs; naïve café, Straße, Cafe\u0301, ﬁve.
  In 1984,  3.14159 of 1,000,000 (42%)...\t"Don't!" it's_x = f(y) + 0x1F;    // https://a.b/c?d=e

Antidisestablishmentarianism, floccinaucinihilipilification, Myocardial infarction, zygotes.
B E G H J K L N P Q R U W Y Z 6 7 # $ & * - < > @ [ \\ ] ^ ` { | } ~
Привет, мир! Ελληνικά. 这是一个句子。日本語のテキスト 한국어 ภาษาไทย العربية עברית हिन्दी Việt 🙂
"""


class Prompt:
    """Turns queries and responses into token ids, within the LLM's chat template.

    Only the template's own parts can hold control tokens. Text of rows is encoded as plain text,
    even where it spells a special token's name.
    """

    prefix_ids: list[int]  # before the query
    suffix_ids: list[int]  # between query and response
    end_ids: list[int]  # after the response

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Json | None = None,
                 stored_parts: dict[str, str] | None = None):
        """`template` are arguments of the chat template. `stored_parts` are those that an adapter
        was trained with; they win over what the template renders now. Raises: UserError."""
        self.tokenizer = tokenizer
        self.template = template or {}
        self.num_ids = 2**31  # that the LLM has embeddings for; see check_fits
        parts = render_prompt(tokenizer, self.template)
        if stored_parts:
            stored_parts = dict(stored_parts)
            for key in STRIPPED_BY_TEMPLATE:
                stored_parts.setdefault(key, "")  # of an early version of elm
            if stored_parts != parts:
                warn_once(f"{tokenizer.name_or_path}: its chat template differs from training; "
                          "the adapter's prompt is used")
            parts = stored_parts
        elif not tokenizer.chat_template:
            warn_once(f"{tokenizer.name_or_path}: has no chat template; a prompt is the query and "
                      "a line break, as a base model reads it. An instruct model needs its "
                      "template, as chat_template.jinja in its folder")
        self.template_parts = parts
        if not parts["end"]:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no token that ends an answer")

        self.prefix_ids = self._encode_part("prefix")
        self.suffix_ids = self._encode_part("suffix")
        self.end_ids = self._encode_part("end")
        # split_special_tokens, which `encode` sets, is a mode of the tokenizer that stays after the
        # call. Switch now: later calls come from several threads and must not change it.
        self.encode([""])

    def _encode_part(self, name: str) -> list[int]:
        return self.tokenizer(self.template_parts[name], add_special_tokens=False)["input_ids"]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of plain texts. Raises: UserError at an id that the LLM has no embedding
        for."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        ids_of_texts = encoded["input_ids"]
        for text, ids in zip(texts, ids_of_texts, strict=True):
            self._check_ids(ids, text)
        return ids_of_texts

    def _check_ids(self, ids: list[int], text: str) -> None:
        largest = max(ids, default=0)
        if largest >= self.num_ids:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"{self.tokenizer.name_or_path}: the tokenizer makes id {largest}, {token!r}, of "
                f"{text[:60]!r}, but the LLM has {self.num_ids} token embeddings; give the "
                "LLM its own tokenizer")

    def check_fits(self, llm: PreTrainedModel) -> None:
        """Raises: UserError, now or in `encode`, at an id that the LLM has no embedding for. Ids of
        tokens that no prompt or row has may be larger."""
        self.num_ids = llm.get_input_embeddings().num_embeddings
        self._check_ids(self.prefix_ids, self.template_parts["prefix"])
        self._check_ids(self.suffix_ids, self.template_parts["suffix"])
        self._check_ids(self.end_ids, self.template_parts["end"])

    def can_exceed_ids(self) -> bool:
        """Whether plain text can have an id that the LLM has no embedding for: one of another token
        than a control token."""
        added_tokens = self.tokenizer.added_tokens_decoder
        for token_id in self.tokenizer.get_vocab().values():
            is_control_token = token_id in added_tokens and added_tokens[token_id].special
            if token_id >= self.num_ids and not is_control_token:
                return True
        return False

    def ids_hash(self) -> str:
        """A hash of the ids of the template's parts and of PROBE_TEXT: of what the tokenizer does,
        in whatever form its files are."""
        (probe_ids,) = self.encode([PROBE_TEXT])
        return sha256_short(json.dumps([self.prefix_ids, self.suffix_ids, self.end_ids, probe_ids]))

    def probe_ids(self) -> Tensor:
        """The ids that PROBE_TEXT has, each once, ascending: ids that rows have."""
        return torch.tensor(self.encode([PROBE_TEXT])[0]).unique()

    def strip_response(self, response: str) -> str:
        """As the template does."""
        parts = self.template_parts
        return response.lstrip(parts["assistant_lstrip"]).rstrip(parts["assistant_rstrip"])

    def split_turn(self, query: str, text: str) -> tuple[str, str, str]:
        """The texts before, in and after the vector's place, where `text` stands, stripped as the
        template does with the user's turn that the three make up."""
        before, after = self.split_query(query)
        pieces = [before, text, after]
        for i in (0, 1, 2):
            pieces[i] = pieces[i].lstrip(self.template_parts["user_lstrip"])
            if pieces[i]:
                break
        for i in (2, 1, 0):
            pieces[i] = pieces[i].rstrip(self.template_parts["user_rstrip"])
            if pieces[i]:
                break
        return pieces[0], pieces[1], pieces[2]

    @staticmethod
    def split_query(query: str) -> tuple[str, str]:
        """The texts before and after the vector. Raises: UserError at several placeholders."""
        if query.count(PLACEHOLDER) > 1:
            raise UserError(f"{query!r}: a query has one {PLACEHOLDER} at most")
        query = query.strip()
        if PLACEHOLDER not in query:
            return "", f"\n{query}"
        before, _, after = query.partition(PLACEHOLDER)
        return before, after


class Example(NamedTuple):
    ids: np.ndarray  # [length] int64, SOFT_TOKEN where the soft tokens go
    num_labels: int  # the last num_labels ids are the response and its end
    truncated: bool  # whether the response, or the text, had to be cut


Layout = Literal["embedding", "text", "response"]


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples of at most max_tokens tokens. By layout:

    embedding   prefix, before, soft tokens,    after, suffix, response, end
    text        prefix, before, the row's text, after, suffix, response, end
    response                                                   response, end

    The end of the response, and that of the text, is cut; the response as if it were in the layout
    "embedding", so that its losses in all layouts are over the same tokens.
    """

    prompt: Prompt
    num_soft_tokens: int
    max_tokens: int
    limit_name: str = "data.max_seq_length"  # what max_tokens is called in messages

    def encode(self, rows: Sequence[Row], names: Sequence[str],
               layout: Layout = "embedding") -> list[Example]:
        """Examples of rows, whose `names` stand in messages. Raises: UserError if a prompt leaves
        no room for a response."""
        prompt = self.prompt
        befores = []
        texts = []
        afters = []
        responses = []
        for row in rows:
            if layout == "text":
                before, text, after = prompt.split_turn(row.query, row.text or "")
            else:  # the query has no white space at its ends
                before, after = prompt.split_query(row.query)
                text = ""
            befores.append(before)
            texts.append(text)
            afters.append(after)
            responses.append(prompt.strip_response(row.response))
        ids_of_rows = zip(
            names,
            prompt.encode(befores),
            prompt.encode(afters),
            prompt.encode(responses),
            prompt.encode(texts),
            strict=True)
        return [self._assemble(layout, *parts) for parts in ids_of_rows]

    def _assemble(self, layout: Layout, name: str, before: list[int], after: list[int],
                  response: list[int], text: list[int]) -> Example:
        before = self.prompt.prefix_ids + before
        after = after + self.prompt.suffix_ids
        response = response + self.prompt.end_ids
        room = self.max_tokens - len(before) - self.num_soft_tokens - len(after)
        if room < 1:
            raise UserError(f"{name}: the prompt takes all of {self.limit_name} = "
                            f"{self.max_tokens} tokens, {1 - room} more are needed")
        answer = response[:room]
        text_room = self.max_tokens - len(before) - len(after) - len(answer)
        if layout == "response":
            ids = answer
        elif layout == "text":
            ids = before + text[:text_room] + after + answer
        else:
            ids = before + [SOFT_TOKEN] * self.num_soft_tokens + after + answer
        is_response_cut = len(answer) < len(response)
        is_text_cut = layout == "text" and len(text) > text_room
        return Example(np.array(ids, np.int64), len(answer), is_response_cut or is_text_cut)


@dataclass(frozen=True)
class Batch:
    """n examples packed end to end into one row of T tokens, without padding."""

    input_ids: Tensor  # [T] int64, any id where soft tokens go
    position_ids: Tensor  # [T] int64, from 0 in each example
    cu_seqlens: Tensor  # [n + 1] int32, the bounds of the examples
    placeholder_positions: Tensor  # [n * K] int64, where the soft tokens go
    labels: Tensor  # [R] int64, all response tokens
    label_positions: Tensor  # [R] int64, where they stand; the position before predicts each
    lengths: list[int]  # tokens of each example
    num_labels: list[int]  # response tokens of each example
    embeddings: Tensor | None = None  # [n, E] fp32
    weight: float = 1.0  # 0 for a batch that only keeps a process in step with the others

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        changed = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = function(value)
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        return self._map_tensors(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """So that the copy to a GPU does not wait."""
        return self._map_tensors(lambda t: t if t.is_cuda else t.pin_memory())


def collate(examples: list[Example], embeddings: Tensor | None = None,
            weight: float = 1.0) -> Batch:
    """Concatenate n examples, with their embeddings [n, E]; in pinned memory where there is a GPU.
    In the layout "response" the first token of an example has nothing before it that predicts it:
    such a batch has hidden states, but no loss."""
    lengths = [len(example.ids) for example in examples]
    num_labels = [example.num_labels for example in examples]
    ids = np.concatenate([example.ids for example in examples])
    position_ids = np.concatenate([np.arange(length) for length in lengths])
    ends = np.cumsum(lengths)
    bounds = np.concatenate([[0], ends]).astype(np.int32)
    label_positions = np.concatenate(
        [np.arange(end - n, end) for end, n in zip(ends, num_labels, strict=True)])
    batch = Batch(
        input_ids=torch.from_numpy(ids.clip(min=0)),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(bounds),
        placeholder_positions=torch.from_numpy(np.flatnonzero(ids == SOFT_TOKEN)),
        labels=torch.from_numpy(ids[label_positions]),
        label_positions=torch.from_numpy(label_positions),
        lengths=lengths,
        num_labels=num_labels,
        embeddings=embeddings,
        weight=weight)
    return batch.pin_memory() if torch.cuda.is_available() else batch


def pack_micro_batches(
    lengths: Sequence[int], num_processes: int, budget: int
) -> list[list[int]]:
    """Distribute examples of `lengths` tokens over the fewest micro-batches, a multiple of
    num_processes, that hold at most `budget` tokens each, or one example. Some may be empty.

    Longest-processing-time bin packing: the longest example first, into the emptiest micro-batch.
    """
    lengths = np.asarray(lengths)
    longest_first = np.argsort(-lengths, kind="stable")
    fewest_per_process = max(1, math.ceil(lengths.sum() / (num_processes * budget)))
    for per_process in itertools.count(fewest_per_process):
        num_bins = per_process * num_processes
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        tokens = np.zeros(num_bins, np.int64)
        for i in longest_first:
            emptiest = tokens.argmin()
            bins[emptiest].append(int(i))
            tokens[emptiest] += lengths[i]
        fits = [len(b) == 1 or n <= budget for b, n in zip(bins, tokens, strict=True)]
        if all(fits):
            return [sorted(b) for b in bins]
    raise AssertionError("one example per bin always fits")


# -----------------------------------------------------------------------------
# Data set
#
# The table of vectors, the rows of text beside it, and which rows each step takes.

SPLITS = ("train", "val", "test")
PAIR_TASKS = ("compare", "hypothetical")  # of older data sets, with other fields: skipped
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Vectors are of one source if they are equal, or if rows of theirs have the same text, or if their
# cosine is above NEAR_EQUAL, as of a text that was embedded twice in different batches. Cosines are
# computed among this many vectors of a split, each with each, not among more.
NEAR_EQUAL = 0.999
MAX_COMPARED_VECTORS = 20_000


# The table of vectors


def open_vectors(path: Path, key: str = "", allow_one: bool = False) -> Tensor:
    """The one table [N, E] of floats in a safetensors or .npy file, memory-mapped; with `allow_one`
    also one vector [E], as a table of one row. Raises: UserError that names the config key."""
    check_file(path, key)
    message = f"{path}: not a whole table of a .safetensors or .npy file"
    with user_error(message, OSError, SafetensorError, ValueError, TypeError, EOFError):
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="c")  # torch warns of the read-only mode "r"
            tensors = [torch.from_numpy(array)]
        else:
            with safe_open(path, framework="pt") as f:
                tensors = [f.get_tensor(name) for name in f.keys()]  # noqa: SIM118
    if len(tensors) == 1:
        (table,) = tensors
        if allow_one and table.ndim == 1:
            table = table[None]
        if table.ndim == 2 and table.numel() and table.dtype in FLOAT_TYPES:
            return table
    found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors[:3])
    raise UserError(f"{path}: holds {found or 'nothing'}, not one table [N, E] of floats")


def table_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors or Parquet file; a .npy file has none. Raises: UserError."""
    if path.suffix == ".npy":
        return {}
    if is_parquet(path):
        schema = open_parquet(path).schema_arrow
        stored = schema.metadata or {}
        metadata = {}
        for key, value in stored.items():
            metadata[key.decode(errors="replace")] = value.decode(errors="replace")
        return metadata
    message = f"{path}: not a whole table"
    with user_error(message, OSError, SafetensorError), safe_open(path, framework="pt") as f:
        return f.metadata() or {}


def last_part(name: str) -> str:
    """deberta-base of microsoft/deberta-base, of /models/deberta-base/, and of a folder of the
    hub's cache: …/models--microsoft--deberta-base/snapshots/HASH."""
    cached = re.search(r"models--(?:[^/]*--)?([^/]+)", name)
    return cached[1] if cached else Path(name).name


class VectorOrigin(BaseModel, frozen=True):
    """How vectors were made. None: unknown, or the embedder's default."""

    model: str | None = None  # the embedder: hub name or folder
    instruction: str | None = None  # see instruction_prompt
    max_tokens: int | None = None  # after which texts were cut


def table_origin(path: Path) -> VectorOrigin:
    """As data/prepare.py wrote it into a table. Raises: UserError if the table cannot be opened."""
    try:
        return VectorOrigin.model_validate_json(table_metadata(path).get("embed", "{}"))
    except pydantic.ValidationError:  # another program's, which gave it another meaning
        return VectorOrigin()


def adapter_origin(metadata: Json, path: str | Path) -> VectorOrigin:
    """Of the vectors that an adapter was trained on, from its file's metadata. Raises:
    UserError."""
    with user_error(f"{path}: what it says of its embedder cannot be used", ValueError):
        return VectorOrigin.model_validate(metadata.get("embedder", {}))


def embedders_differ(a: VectorOrigin, b: VectorOrigin) -> bool:
    """Whether both are known, and the last parts of their names differ."""
    return bool(a.model and b.model) and last_part(a.model) != last_part(b.model)


def agree_on_origin(origins: dict[str, VectorOrigin]) -> VectorOrigin:
    """The first that names the embedder, of `origins` by what they belong to. Raises: UserError if
    two name different ones."""
    known = VectorOrigin()
    where_known = ""
    for where, origin in origins.items():
        if embedders_differ(known, origin):
            raise UserError(
                f"{where}: its vectors are of {origin.model}, those of {where_known} of "
                f"{known.model}; take vectors of one embedder. If these are two names of one, "
                "`python data/prepare.py convert TABLE NEW model=NAME` writes a table with another "
                "name")
        if origin.model and not known.model:
            known = origin
            where_known = where
    return known


# Parquet

ROWS_OF_BLOCK = 1024  # of a table that are read at a time
VECTOR_COLUMN = "embedding"
PARQUET_ERRORS = (OSError, ValueError, LookupError)  # that a damaged file raises where it is read


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def open_parquet(path: Path, key: str = "") -> parquet.ParquetFile:
    """A file, mapped: its row groups can be larger than the memory. Raises: UserError that names
    the config key."""
    check_file(path, key)
    library = import_optional("pyarrow.parquet")
    with user_error(f"{path}: not a whole Parquet file", OSError, ValueError):
        return library.ParquetFile(path, memory_map=True)


def find_column(file: parquet.ParquetFile, name: str, key: str, path: Path) -> pa.DataType:
    """The type of a column. Raises: UserError that names the config key, if there is none."""
    schema = file.schema_arrow
    if name not in schema.names:
        raise UserError(f"{key}: {path} has no column {name!r}; its columns are "
                        f"{clip(', '.join(schema.names))}{did_you_mean(name, schema.names)}")
    if schema.names.count(name) > 1:
        raise UserError(f"{key}: {path} has several columns {name!r}; name them differently")
    return schema.field(name).type


def is_integer_or_text(column_type: pa.DataType) -> bool:
    """Also of a column that has nothing but nulls."""
    types = import_optional("pyarrow").types
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return (types.is_integer(column_type) or types.is_string(column_type)
            or types.is_large_string(column_type) or types.is_string_view(column_type)
            or types.is_null(column_type))


Id = int | str | None  # of a row of a Parquet file


class VectorBlock(NamedTuple):
    """n rows of a table."""

    row_ids: list[int]
    vectors: Tensor  # [n, E] fp32
    ids: list[Id] | None  # of the user's own

    def name(self, i: int) -> str:
        """What messages call the vector at place i."""
        return name_row(self.row_ids[i], self.ids, i)


def name_row(row_id: int, ids: list[Id] | None, i: int) -> str:
    """What messages call a row, whose id, if the table has any, is ids[i]."""
    return f"row {row_id}" if ids is None else f"row {row_id} (id {ids[i]!r})"


class ParquetTable:
    """The vectors [N, E] of a column of lists of floats of a Parquet file and, if asked for, a
    column of ids, integers or texts. It is read from front to back: a row before the last one opens
    its row group again. Memory holds one batch, however large the row groups are."""

    def __init__(self, path: Path, key: str, column: str, id_column: str | None):
        """`key` names the file in messages. Raises: UserError if there is no such file or column,
        or if it has another type."""
        self._pyarrow = import_optional("pyarrow")
        self._compute = import_optional("pyarrow.compute")
        types = self._pyarrow.types
        self.path = path
        self._file = open_parquet(path, key)
        self._column = column
        self._id_column = id_column
        column_type = find_column(self._file, column, "column", path)
        is_list = (types.is_list(column_type) or types.is_large_list(column_type)
                   or types.is_fixed_size_list(column_type))
        if not is_list or not types.is_floating(column_type.value_type):
            raise UserError(f"column: {column} of {path} is of type {column_type}, not of lists of "
                            "floats")
        if id_column is not None:
            id_type = find_column(self._file, id_column, "id", path)
            if not is_integer_or_text(id_type):
                raise UserError(f"id: {id_column} of {path} is of type {id_type}, not of integers "
                                "or texts")
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._group_starts = np.cumsum([0, *sizes])  # [groups + 1], the last is N
        if not len(self):
            raise UserError(f"{path}: has no rows")
        self._group = -1  # that _batches are of
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._start = 0  # the row at which _batch begins
        self.width = self._find_width()

    def __len__(self) -> int:
        return int(self._group_starts[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.width

    def _find_width(self) -> int:
        """Of the first vector, up to which the file is read. Raises: UserError if there is
        none."""
        row_id = 0
        while row_id < len(self):
            with user_error(f"{self.path}: cannot be read", *PARQUET_ERRORS):
                self._seek(row_id)
                lists = self._batch[self._column]
                lengths = self._compute.list_value_length(lists).to_pylist()
            for length in lengths:
                if length:
                    return length
            row_id = self._start + len(self._batch)
        raise UserError(f"{self.path}: no row of {self._column} has a vector")

    def _seek(self, row_id: int) -> None:
        """Make _batch the one that has the row. Raises: UserError if the file ends before."""
        group = int(np.searchsorted(self._group_starts, row_id, side="right")) - 1
        if group != self._group or row_id < self._start:
            columns = [self._column]
            if self._id_column is not None:
                columns.append(self._id_column)
            self._group = group
            self._start = int(self._group_starts[group])
            self._batches = self._file.iter_batches(ROWS_OF_BLOCK, [group], columns)
            self._read_batch()
        while row_id >= self._start + len(self._batch):
            self._start += len(self._batch)
            self._read_batch()

    def _read_batch(self) -> None:
        self._batch = next(self._batches, None)
        if self._batch is None:
            raise UserError(f"{self.path}: has fewer rows than it says")

    def read(self, row_ids: Sequence[int]) -> VectorBlock:
        """Rows in any order; ascending ones are read once. Raises: UserError at a row without a
        vector, or with one of another width."""
        rows = np.asarray(row_ids, np.int64)
        vectors = torch.empty(len(rows), self.width)
        ids: list[Id] = [None] * len(rows)
        places = np.argsort(rows, kind="stable")  # in which the rows are read
        while len(places):
            with user_error(f"{self.path}: cannot be read", *PARQUET_ERRORS):
                self._seek(int(rows[places[0]]))
                end = self._start + len(self._batch)
                num_found = int(np.searchsorted(rows[places], end))
                found = places[:num_found]
                part = self._read_part(rows[found].tolist())
            vectors[torch.from_numpy(found)] = part.vectors
            if part.ids is not None:
                for place, own_id in zip(found.tolist(), part.ids, strict=True):
                    ids[place] = own_id
            places = places[num_found:]
        return VectorBlock(rows.tolist(), vectors, None if self._id_column is None else ids)

    def _read_part(self, row_ids: list[int]) -> VectorBlock:
        """Rows of _batch."""
        part = self._batch.take(self._pyarrow.array(np.array(row_ids) - self._start))
        ids = None
        if self._id_column is not None:
            ids = part[self._id_column].to_pylist()
        lists = part[self._column]
        for i, length in enumerate(self._compute.list_value_length(lists).to_pylist()):
            if length == self.width:
                continue
            where = f"{self.path}: {name_row(row_ids[i], ids, i)}"
            if length is None:
                raise UserError(f"{where} has no vector; leave such rows out")
            raise UserError(f"{where} has a vector of width {length}, the first row one of "
                            f"{self.width}")
        values = lists.flatten()
        if values.null_count:
            i = int(np.flatnonzero(values.is_null().to_numpy(False))[0]) // self.width
            raise UserError(f"{self.path}: {name_row(row_ids[i], ids, i)} has a vector with null "
                            "in it; embed its text again")
        with np.errstate(over="ignore"):  # infinite numbers are refused where vectors are checked
            array = values.to_numpy(zero_copy_only=False).astype(np.float32)
        return VectorBlock(row_ids, torch.from_numpy(array).view(-1, self.width), ids)


VectorTable = Tensor | ParquetTable  # [N, E] of any float


def open_table(path: Path, key: str, column: str, id_column: str | None = None) -> VectorTable:
    """A table of one of the three formats; `key` names it in messages. Raises: UserError, also at
    an id_column of a file that has no columns."""
    if is_parquet(path):
        return ParquetTable(path, key, column, id_column)
    if id_column is not None:
        raise UserError(f"id: {path} has no columns; only a .parquet file has")
    if column != VECTOR_COLUMN:
        raise UserError(f"column: {path} has no columns; only a .parquet file has")
    return open_vectors(path, key, allow_one=True)


def read_blocks(table: VectorTable, row_ids: Iterable[int]) -> Iterator[VectorBlock]:
    """Rows of a table in blocks. Raises: UserError, see ParquetTable.read."""
    for block in in_blocks(row_ids, ROWS_OF_BLOCK):
        if isinstance(table, ParquetTable):
            yield table.read(block)
        else:
            yield VectorBlock(block, table[block].float(), None)


class VectorScan(NamedTuple):
    """Of a table of N vectors of width E."""

    statistics: dict[str, Tensor]  # of those that are used, fp32: mean [E], std [E], and norms [3]:
    #   least, root mean square, greatest
    first_copy: np.ndarray  # [N] int64, the first vector of equal bytes
    is_valid: np.ndarray  # [N] bool: neither zero nor NaN nor infinite


def scan_vectors(vectors: Tensor, is_used: Tensor, where: Path | str) -> VectorScan:
    """Read a table [N, E] once. `is_used` is a mask [N] bool.

    A std below 1 % of the typical one is replaced by it: such a dimension carries no information,
    and standardising it would blow up rounding. Raises: UserError at a NaN, infinite or zero vector
    that is used.
    """
    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    total_square = torch.zeros_like(total)
    norms = []
    first_copy = []
    valid_chunks = []
    index_of_hash: dict[int, int] = {}
    for chunk, chunk_is_used in zip(vectors.split(2048), is_used.split(2048), strict=True):
        chunk64 = chunk.double()
        norm = chunk64.square().sum(1).sqrt()
        is_valid = norm.isfinite() & (norm > 0)
        refused = (chunk_is_used & ~is_valid).nonzero()
        if len(refused):
            i = len(first_copy) + int(refused[0])
            raise UserError(f"{where}: vector {i} is zero, NaN or infinite; embed its text again")
        valid_chunks.append(is_valid)
        for vector_bytes in chunk.contiguous().view(torch.uint8).numpy():
            index = len(first_copy)
            first_copy.append(index_of_hash.setdefault(hash(vector_bytes.tobytes()), index))
        used64 = chunk64[chunk_is_used]
        total += used64.sum(0)
        total_square += used64.square().sum(0)
        norms += norm[chunk_is_used].tolist()

    num_used = max(1, int(is_used.sum()))
    mean = total / num_used
    mean_square = total_square / num_used
    std = (mean_square - mean.square()).clamp(min=0).sqrt().float()
    typical_std = std.square().mean().sqrt()  # root mean square
    std[std < 0.01 * typical_std] = typical_std
    rms_norm = mean_square.sum().sqrt()
    statistics = {
        "mean": mean.float(),
        "std": std,
        "norms": torch.tensor([min(norms), rms_norm, max(norms)], dtype=torch.float32)}
    return VectorScan(statistics, np.array(first_copy), torch.cat(valid_chunks).numpy())


# Sources


def merge_groups(group: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Make one group of those of a[i] and b[i], for each i, in place: a union-find. group[j] is the
    first member of the group of j."""
    while True:
        differs = group[a] != group[b]
        if not differs.any():
            return
        a = a[differs]
        b = b[differs]
        first = np.minimum(group[a], group[b])
        second = np.maximum(group[a], group[b])
        np.minimum.at(group, second, first)
        # Members of a group that was joined to another one still name its former first member.
        while (group != group[group]).any():
            group[:] = group[group]


def near_equal_pairs(
    vectors: Tensor, vector_ids: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of the pairs of `vector_ids` whose vectors have a cosine above NEAR_EQUAL, each
    pair once, each vector with itself, too."""
    unit = F.normalize(vectors[torch.from_numpy(vector_ids)].to(find_device()).float(), dim=1)
    for start in range(0, len(vector_ids), 256):
        cosines = unit[start : start + 256] @ unit[start:].T
        first, second = (cosines > NEAR_EQUAL).cpu().numpy().nonzero()
        yield vector_ids[start + first], vector_ids[start + second]


def find_sources(vectors: Tensor, index: np.ndarray, scan: VectorScan) -> np.ndarray:
    """[number of vectors] int64: the first vector of each one's source, see NEAR_EQUAL. Among more
    than MAX_COMPARED_VECTORS vectors, cosines are those of the used ones alone, or of none."""
    sources = scan.first_copy.copy()
    rows = index[index["has_text"]]
    _, first, text_of_row = np.unique(rows["text_hash"], return_index=True, return_inverse=True)
    merge_groups(sources, rows["vector_id"], rows["vector_id"][first][text_of_row])

    compared = np.flatnonzero(scan.is_valid)
    if len(compared) > MAX_COMPARED_VECTORS:
        compared = np.unique(index["vector_id"]).astype(np.int64)
    if len(compared) <= MAX_COMPARED_VECTORS:
        for a, b in near_equal_pairs(vectors, compared):
            merge_groups(sources, a, b)
    return sources


# Rows


class Row(BaseModel, frozen=True, strict=True, extra="allow"):
    task_type: str
    embedding_file_idx: NonNegativeInt  # of the table of vectors
    query: str
    response: Annotated[str, Field(pattern=r"\S")]  # not empty
    text: str | None = None  # what was embedded

    @property
    def stripped_text(self) -> str:
        """Without white space at its ends; "" of a row that has no text."""
        return (self.text or "").strip()


RowClass = TypeVar("RowClass", bound=BaseModel)


def parse_json(line: bytes) -> Any:
    """Raises: ValueError, also where JSON is nested too deeply."""
    return pydantic_core.from_json(line.removeprefix(codecs.BOM_UTF8))


def validate_row(fields: object, row_class: type[RowClass]) -> RowClass:
    """Raises: ValueError that names the field."""
    try:
        return row_class.model_validate(fields)
    except pydantic.ValidationError as e:
        error = e.errors()[0]
    name = f"field {error['loc'][0]!r}: " if error["loc"] else ""
    is_empty = error["type"] == "string_pattern_mismatch"
    raise ValueError(name + ("is empty" if is_empty else error["msg"]))


def parse_row(line: bytes, tasks: Sequence[str], num_vectors: int) -> Row | None:
    """The checked row of a line of JSON; None for a row of PAIR_TASKS that is not among `tasks`.
    Raises: ValueError."""
    fields = parse_json(line)
    task = fields.get("task_type") if isinstance(fields, dict) else None
    if task in PAIR_TASKS and task not in tasks:
        return None
    row = validate_row(fields, Row)
    known = (*tasks, *TASKS, RECONSTRUCT)
    if row.task_type not in known:
        hint = did_you_mean(row.task_type, known)
        raise ValueError(f"unknown task_type {row.task_type!r}{hint}; a task type of your own must "
                         "be named in data.tasks")
    if row.embedding_file_idx >= num_vectors:
        raise ValueError(f"embedding_file_idx {row.embedding_file_idx}, but the split's table has "
                         f"vectors 0 to {num_vectors - 1}")
    Prompt.split_query(row.query)
    return row


class Line(NamedTuple):
    number: int  # from 1
    offset: int  # in bytes
    row: Row | None  # None: of a pair task


def read_lines(path: Path, tasks: Sequence[str], num_vectors: int) -> Iterator[Line]:
    """Yield each line that is not blank, its row checked. Raises: UserError that names the line."""
    offset = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                try:
                    row = parse_row(line, tasks, num_vectors)
                except ValueError as e:
                    raise UserError(f"{path}:{number}: {e}") from None
                yield Line(number, offset, row)
            offset += len(line)


def count_row(counts: Counter[str], row: Row | None, tasks: Sequence[str]) -> bool:
    """Count a row by its kind. Returns whether it is of `tasks`."""
    if row is None:
        kind = "pair_tasks"
    elif row.task_type in tasks:
        kind = "rows"
    else:
        kind = "other_tasks"
    counts[kind] += 1
    return kind == "rows"


def check_any_rows(counts: Counter[str], path: Path, tasks: Sequence[str]) -> None:
    """Raises: UserError if no row was of `tasks`."""
    if counts["rows"]:
        return
    hints = [did_you_mean(task, TASKS) for task in tasks if task not in TASKS]
    raise UserError(f"{path}: no row of the task types {list(tasks)}{''.join(hints)}")


# Splits

# What is kept in memory of a row; the rest is read from its line when it is needed.
ROW_INDEX = np.dtype([
    ("offset", "i8"), ("line", "i4"), ("vector_id", "i4"), ("source_id", "i4"), ("task_id", "i2"),
    ("has_text", "?"), ("text_hash", "i8")])  # the hash is of this process alone; 0: no text


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split of a data set, its table of vectors, and how rows become examples."""

    path: Path  # of the rows
    index: np.ndarray  # [N] of ROW_INDEX
    table_path: Path  # of the vectors
    origin: VectorOrigin
    vectors: Tensor  # [number of vectors, E], memory-mapped
    sources: np.ndarray  # [S] ascending, the first vector of each source, also of unused ones, but
    #   not those that are zero, NaN or infinite; index["source_id"] is among them
    statistics: dict[str, Tensor]  # see VectorScan
    counts: Counter[str]  # of rows, by kind
    tasks: tuple[str, ...]  # index["task_id"] counts these
    encoder: Encoder

    def __len__(self) -> int:
        return len(self.index)

    def read(self, row_ids: Iterable[int]) -> list[Row]:
        rows = []
        with open(self.path, "rb") as f:
            for i in row_ids:
                f.seek(int(self.index["offset"][i]))
                rows.append(parse_row(f.readline(), self.tasks, len(self.vectors)))
        return rows

    def examples(self, row_ids: Sequence[int], layout: Layout = "embedding",
                 texts: Sequence[str] | None = None) -> list[Example]:
        """Of rows [n], with `texts` [n] in the place of their own."""
        names = [f"{self.path}:{self.index['line'][i]}" for i in row_ids]
        rows = self.read(row_ids)
        if texts is not None:
            rows = [row.model_copy(update={"text": text})
                    for row, text in zip(rows, texts, strict=True)]
        return self.encoder.encode(rows, names, layout)

    def embeddings(self, vector_ids: np.ndarray) -> Tensor:
        """[n] indices into the table -> [n, E] fp32."""
        return self.vectors[torch.from_numpy(vector_ids.astype(np.int64))].float()


def vectors_path(data_dir: str, split_name: str) -> Path:
    """Raises: UserError if a split has two tables."""
    path = Path(data_dir, "embeddings", f"{split_name}_embeddings.safetensors")
    numpy_path = path.with_suffix(".npy")
    if not numpy_path.exists():
        return path
    if path.exists():
        raise UserError(f"{path} and {numpy_path}: two tables of one split; move the one that is "
                        "not meant to another folder")
    return numpy_path


def rows_path(data_dir: str, split_name: str) -> Path:
    return Path(data_dir, "synthesis", f"{split_name}_synthesis.jsonl")


def max_num_tokens(text: str) -> int:
    """An upper bound, without tokenising: a token has at least a byte of the text, which the
    tokenizers of some LLMs normalise first."""
    normalised = unicodedata.normalize("NFKD", text)
    return max(len(text.encode()), len(normalised.encode()))


def open_split(data_dir: str, name: str, tasks: tuple[str, ...], encoder: Encoder) -> Split:
    """Parse and check every row and every vector. Raises: UserError, OSError.

    Only rows that could exceed the encoder's limit are tokenised, to refuse prompts that do not fit
    and to count responses that will be cut.
    """
    table_path = vectors_path(data_dir, name)
    path = rows_path(data_dir, name)
    vectors = open_vectors(table_path, "data.dir")
    prompt = encoder.prompt
    template_tokens = len(prompt.prefix_ids + prompt.suffix_ids + prompt.end_ids)
    # 8: tokenizers of some LLMs put a space before each of the parts.
    surely_fits = encoder.max_tokens - encoder.num_soft_tokens - template_tokens - 8
    task_ids = {task: i for i, task in enumerate(tasks)}

    counts: Counter[str] = Counter()
    index_blocks = [np.empty(0, ROW_INDEX)]
    lines = progress(read_lines(path, tasks, len(vectors)), f"reading {name}", unit=" rows")
    for block in in_blocks(lines, 8192):
        entries = []
        long_rows = []
        names_of_long_rows = []
        for number, offset, row in block:
            if not count_row(counts, row, tasks):
                continue
            text = row.stripped_text
            text_hash = hash(text) if text else 0
            task_id = task_ids[row.task_type]
            source_id = row.embedding_file_idx  # until find_sources
            entries.append((offset, number, row.embedding_file_idx, source_id, task_id, bool(text),
                            text_hash))
            if max_num_tokens(row.query + row.response) > surely_fits:
                long_rows.append(row)
                names_of_long_rows.append(f"{path}:{number}")
        index_blocks.append(np.array(entries, ROW_INDEX))
        for example in encoder.encode(long_rows, names_of_long_rows):
            counts["responses_cut"] += example.truncated
    check_any_rows(counts, path, tasks)

    index = np.concatenate(index_blocks)
    is_used = np.zeros(len(vectors), bool)
    is_used[index["vector_id"]] = True
    scan = scan_vectors(vectors, torch.from_numpy(is_used), table_path)
    sources = find_sources(vectors, index, scan)
    index["source_id"] = sources[index["vector_id"]]
    return Split(
        path=path,
        index=index,
        table_path=table_path,
        origin=table_origin(table_path),
        vectors=vectors,
        sources=np.unique(sources[scan.is_valid]),
        statistics=scan.statistics,
        counts=counts,
        tasks=tasks,
        encoder=encoder)


def shuffled_vectors(split: Split) -> np.ndarray:
    """[N]: for each row a vector of another source, the same for all rows of a source; always the
    same ones. check_splits sees that a split has two sources."""
    source_ids, inverse = np.unique(split.index["source_id"], return_inverse=True)
    # The sources stand in a random circle; each is exchanged for the one before it.
    circle = np.random.default_rng(0).permutation(len(source_ids))
    before = np.empty_like(circle)
    before[circle] = np.roll(circle, 1)
    other_ids = source_ids[before]
    return other_ids[inverse]


def rows_hash(split: Split) -> str:
    """A hash of the rows' lines and of the first components of their vectors, in the order of the
    rows. Other lines of the file, and how the table is stored, make no difference."""
    digest = hashlib.sha256()
    with open(split.path, "rb") as f:
        for offset in split.index["offset"].tolist():
            f.seek(offset)
            digest.update(f.readline().rstrip() + b"\n")
    vector_ids = torch.from_numpy(split.index["vector_id"].astype(np.int64))
    components = split.vectors[vector_ids, :8].float()
    digest.update(components.numpy().tobytes())
    return digest.hexdigest()[:16]


# Steps


class RowsOfStep(NamedTuple):
    epoch: int
    position: int  # rows of the epoch that are done after the step
    row_ids: np.ndarray  # over all processes


def step_rows(
    num_rows: int, seed: int, rows_per_step: int, epoch: int, position: int
) -> Iterator[RowsOfStep]:
    """Yield without end the rows of the steps from row `position` of `epoch` on. It is a function
    of its arguments alone: this is what makes a resume exact."""
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        for start in range(position, num_rows, rows_per_step):
            end = min(start + rows_per_step, num_rows)
            yield RowsOfStep(epoch, end, order[start:end])
        epoch += 1
        position = 0


@dataclass(frozen=True)
class Step:
    """A step's batches on this process, and its size over all processes."""

    rows: RowsOfStep
    batches: list[Batch]
    num_labels: int  # response tokens, over all processes
    num_tokens: int  # over all processes

    def to(self, device: torch.device) -> Step:
        return dataclasses.replace(self, batches=[batch.to(device) for batch in self.batches])


def prepare_step(split: Split, micro_batch_tokens: int, rows: RowsOfStep) -> Step:
    """Tokenise and pack the rows of a step. Runs in reader threads.

    Every process tokenises the whole step and takes its share: that costs little beside the LLM,
    and none has to wait for the others.
    A process without rows repeats one at weight 0: ZeRO 3 needs equally many passes on each.
    """
    examples = split.examples(rows.row_ids)
    lengths = [len(example.ids) for example in examples]
    vector_ids = split.index["vector_id"][rows.row_ids]
    micro_batches = pack_micro_batches(lengths, world_size(), micro_batch_tokens)
    batches = []
    for members in micro_batches[rank() :: world_size()]:
        weight = 1.0
        if not members:
            members = [0]
            weight = 0.0
        embeddings = split.embeddings(vector_ids[members])
        batches.append(collate([examples[i] for i in members], embeddings, weight))
    num_labels = sum(example.num_labels for example in examples)
    return Step(rows, batches, num_labels, sum(lengths))


# -----------------------------------------------------------------------------
# Adapter


class Adapter(nn.Module):
    """norm(W2 gelu(W1 x + b1) + b2 + residual), x the standardised embedding: [n, E] -> [n, K, D].

    The residual, times residual_scale, is x itself where E = D, else a linear map of it without
    bias. The norm is an RMSNorm times `scale`, the root mean square of the LLM's token embeddings,
    so that a fresh adapter's output has their scale. Buffers are saved, not trained.

    All is fp32 whatever torch's default dtype is, and stays so: `half`, `bfloat16` and `to(dtype)`,
    of the adapter or of an ELM, leave it as it is.
    """

    def __init__(self, d_emb: int, hidden_dim: int, d_llm: int, tokens: int = 1,
                 dropout: float = 0.0, residual_scale: float = 1.0):
        super().__init__()
        self.settings = {
            "d_emb": d_emb, "hidden_dim": hidden_dim, "d_llm": d_llm, "tokens": tokens,
            "residual_scale": residual_scale}
        self.tokens = tokens
        self.residual_scale = residual_scale
        self.dropout = dropout
        fp32 = {"dtype": torch.float32}
        self.fc1 = nn.Linear(d_emb, hidden_dim, **fp32)
        self.fc2 = nn.Linear(hidden_dim, tokens * d_llm, **fp32)
        self.residual = nn.Identity()
        if d_emb != d_llm:
            self.residual = nn.Linear(d_emb, d_llm, bias=False, **fp32)
        self.norm = nn.RMSNorm(d_llm, eps=1e-6, **fp32)
        self.register_buffer("mean", torch.zeros(d_emb, **fp32))
        self.register_buffer("std", torch.ones(d_emb, **fp32))
        self.register_buffer("scale", torch.tensor(1.0, **fp32))
        self.register_buffer("norms", torch.full((3,), torch.nan, **fp32))  # see check_norm

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """What Module.to, half and the like call: its moves are made, its casts are not."""

        def move(tensor: Tensor) -> Tensor:
            changed = function(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(move, recurse)

    def standardize(self, embeddings: Tensor) -> Tensor:
        return (embeddings.float() - self.mean) / self.std.clamp(min=1e-6)

    def forward(self, embeddings: Tensor, drops_out: bool | None = None) -> Tensor:
        """drops_out: None: in train mode."""
        if drops_out is None:
            drops_out = self.training
        x = self.standardize(embeddings)
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, drops_out)
        out = self.fc2(hidden).unflatten(-1, (self.tokens, -1))
        residual = self.residual_scale * self.residual(x)[..., None, :]
        return self.norm(out + residual) * self.scale

    @staticmethod
    def load(path: str | Path) -> tuple[Adapter, Json]:
        """The adapter of a file, of the folder of a run, or of a repository on the hub, in eval
        mode on the CPU, and its metadata. Raises: UserError."""
        path = find_adapter(path)
        check_is_adapter(path)
        # RuntimeError is of load_state_dict, LookupError and TypeError of metadata that lack
        # settings or have others.
        exception_types = (OSError, SafetensorError, ValueError, LookupError, TypeError,
                           RuntimeError)
        with user_error(f"{path}: not a whole elm adapter", *exception_types):
            with safe_open(path, framework="pt") as f:
                metadata = json.loads((f.metadata() or {}).get("elm", "{}"))
                state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
            state.pop(TOKEN_EMBEDDINGS, None)  # of the LLM: see read_token_embeddings
            adapter = Adapter(**metadata["adapter"])
            adapter.load_state_dict(state)
        return adapter.eval(), metadata


def find_adapter(path: str | Path) -> Path:
    """The file of an adapter: itself, of a run's folder, or downloaded from the hub. Raises:
    UserError."""
    name = str(path)
    path = Path(path)
    if path.is_dir():
        best = path / "adapter_best.safetensors"
        if not best.exists():
            raise UserError(f"adapter: {path} holds no adapter_best.safetensors; give the folder "
                            "of a run, or an adapter's file")
        return best
    if path.suffix == ".safetensors" or path.exists() or not is_hub_name(name):
        check_file(path, "adapter")
        return path
    import huggingface_hub

    message = f"adapter: there is no {path} here, nor can it be loaded from the hub"
    with user_error(message, OSError, ValueError):
        return Path(huggingface_hub.hf_hub_download(name, "adapter_best.safetensors"))


def check_is_adapter(path: Path) -> None:
    """Raises: UserError that says what a file is, if it is a checkpoint, a table of vectors or the
    weights of another model."""
    with user_error(f"{path}: not a whole elm adapter", OSError, SafetensorError):
        with open(path, "rb") as f:
            is_zip = f.read(2) == b"PK"  # as torch.save writes
        if is_zip:
            raise UserError(f"adapter: {path} is a checkpoint; give the adapter_best.safetensors "
                            "beside it")
        with safe_open(path, framework="pt") as f:
            names = list(f.keys())
            is_of_elm = "elm" in (f.metadata() or {})
    if is_of_elm:
        return
    what = "a table of vectors" if len(names) == 1 else "the weights of another model"
    raise UserError(f"{path}: not a whole elm adapter, but {what} ({', '.join(names[:3])}); a run "
                    "leaves one as adapter_best.safetensors")


@torch.no_grad()
def fresh_adapter(llm: PreTrainedModel, statistics: dict[str, Tensor], standardize: bool = True,
                  **settings: Any) -> Adapter:
    """An untrained adapter for vectors of these statistics (see VectorScan); the LLM's token
    embeddings give its output's width and scale. `settings` are arguments of Adapter."""
    embed = llm.get_input_embeddings()
    device = embed.weight.device
    sample = torch.linspace(0, embed.num_embeddings - 1, 4096, device=device, dtype=torch.float32)
    token_embeddings = embed(sample.long()).float()
    adapter = Adapter(len(statistics["mean"]), d_llm=token_embeddings.shape[1], **settings)
    buffers = {"scale": token_embeddings.square().mean().sqrt(), "norms": statistics["norms"]}
    if standardize:
        buffers |= {"mean": statistics["mean"], "std": statistics["std"]}
    adapter.load_state_dict(buffers, strict=False)
    return adapter


class TrainedLLM(NamedTuple):
    """What an adapter's file says of the LLM that it was trained for."""

    name: str  # hub name, folder or GGUF file
    bf16: bool
    quantization: Quantization
    template: Json  # arguments of the chat template
    template_parts: dict[str, str]  # see render_prompt
    trained_for: Json  # see check_trained_for
    precision: str  # see name_precision
    sizes: Json  # see layer_sizes; none in files of an early version of elm
    norms_hash: str


def read_trained_llm(metadata: Json, path: str | Path) -> TrainedLLM:
    """Raises: UserError."""
    message = f"{path}: does not say which LLM it was trained for"
    with user_error(message, LookupError, TypeError, ValueError):
        llm = metadata["llm"]
        trained = TrainedLLM(
            name=llm["name"], bf16=llm["bf16"], quantization=llm.get("quantization", "off"),
            template=llm["template"], template_parts=metadata["prompt"],
            trained_for=dict(metadata["trained_for"]), precision=llm.get("precision", ""),
            sizes=dict(llm.get("sizes", {})), norms_hash=llm.get("norms_hash", ""))
        check_quantization_kind(trained.quantization)
    check_template_parts(trained.template_parts, path)
    return trained


WEIGHTS_HASH = "hash of the LLM's weights"
TOKENIZER_HASH = "hash of the tokenizer's ids"


def check_trained_for(trained_for: Json, found: Json, where: Path | str) -> None:
    """Raises: UserError that names the first property in `found` that differs from training."""
    if TOKENIZER_HASH in found and TOKENIZER_HASH not in trained_for:  # of an early version of elm
        log.warning(f"{where}: does not say the {TOKENIZER_HASH} in training; it is not checked")
        found = {key: value for key, value in found.items() if key != TOKENIZER_HASH}
    for key, value in found.items():
        if value != trained_for.get(key):
            advice = "give it what it was trained with"
            if key == TOKENIZER_HASH:
                advice = "give it the folder of training, or read it by that transformers version"
            raise UserError(f"{where}: {key} was {trained_for.get(key)} in training and is {value} "
                            f"here; {advice}")


MAX_NORM_RATIO = 1.5  # of a norm to those of training


def check_norm(trained_norms: Tensor, norm: float, where: Path | str) -> None:
    """Raises: UserError if a root mean square norm is far from the norms in training: least, root
    mean square, greatest. NaN, an unknown norm on either side, passes."""
    least, rms, greatest = trained_norms.tolist()
    if norm < least / MAX_NORM_RATIO or norm > greatest * MAX_NORM_RATIO:
        raise UserError(f"{where}: the vectors' norm was {rms:.4g} in training and is {norm:.4g} "
                        "here; give it what it was trained with")


def check_width(vectors: VectorTable, adapter: Adapter, where: Path | str) -> None:
    """Raises: UserError unless vectors are [n, E] of the adapter's E."""
    width = len(adapter.mean)
    if len(vectors.shape) != 2 or vectors.shape[1] != width:
        raise UserError(f"{where}: {list(vectors.shape)}, but the adapter reads [n, {width}]; give "
                        "vectors of the embedder of training")


def as_tensor(embeddings: Vectors, where: Path | str = "vectors") -> Tensor:
    """Vectors [n, E] or [E] as people hold them -> the same, fp32. A tensor, or a list of tensors,
    keeps its device and its graph. Raises: UserError if they are no numbers, or differ in width."""
    message = f"{where}: no vectors [n, E] of numbers"
    with user_error(message, TypeError, ValueError, RuntimeError):
        if isinstance(embeddings, Tensor):
            return fp32_tensor(embeddings)
        items = embeddings
        if not isinstance(embeddings, list | tuple):
            array = np.asarray(embeddings)
            if array.dtype != object:
                return fp32_array(array)
            items = array.tolist()  # of a column of pandas: arrays or lists
        if not items:
            raise ValueError("the list is empty")
        if any(isinstance(item, Tensor) for item in items):
            return fp32_tensor(torch.stack(list(items)))
        return fp32_array(np.asarray(items))


def fp32_tensor(tensor: Tensor) -> Tensor:
    """Contiguous, as kernels may sum in another order else. Raises: TypeError."""
    if tensor.is_complex() or tensor.layout != torch.strided:
        raise TypeError(f"{tensor.dtype}, {tensor.layout}")
    return tensor.float().contiguous()


def fp32_array(array: np.ndarray) -> Tensor:
    """Raises: TypeError; ValueError."""
    if array.dtype.kind not in "fiub":
        raise TypeError(f"values of type {array.dtype}")
    # Native, with positive strides and writable: as torch wants them.
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def check_vectors(embeddings: Vectors, adapter: Adapter, where: Path | str = "vectors") -> Tensor:
    """[n, E] or [E], see as_tensor -> [n, E] fp32. Raises: UserError at a vector that is zero, NaN
    or infinite, and if the norm of all is far from those of training."""
    vectors = torch.atleast_2d(as_tensor(embeddings, where))
    check_width(vectors, adapter, where)
    total_square = 0.0
    for block in read_blocks(vectors, range(len(vectors))):
        total_square += check_block(block, where)
    check_norm_of_all(total_square, len(vectors), adapter, where)
    return vectors


def check_block(block: VectorBlock, where: Path | str) -> float:
    """The sum of the squared norms of its vectors. Raises: UserError at one that is zero, NaN or
    infinite."""
    invalid = (~block.vectors.isfinite().all(1) | ~block.vectors.any(1)).nonzero()
    if len(invalid):
        name = block.name(int(invalid[0]))
        raise UserError(f"{where}: {name} is zero, NaN or infinite; embed its text again")
    return block.vectors.double().square().sum().item()


def check_norm_of_all(total_square: float, num_vectors: int, adapter: Adapter,
                      where: Path | str) -> None:
    """As check_norm, of vectors by the sum of their squared norms. No vectors pass."""
    if num_vectors:
        check_norm(adapter.norms, math.sqrt(total_square / num_vectors), where)


# -----------------------------------------------------------------------------
# LLM
#
# Any causal LM of transformers that takes embeddings and has attention of transformers' interface.

PACKED = "elm_packed"  # the name of packed_attention in transformers


# Loading


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of one on the hub: NAME or USER/NAME."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


# How to do without a model that cannot be loaded, by its config key.
WAYS_ON = {
    "eval.bertscore_model": "; eval.bertscore_model=off does without",
    "eval.embedder": "; eval.embedder=off does without",
    "llm": "; llm=FOLDER names another place"}


LLM_KEYS = ("model.llm", "llm", "model")  # config keys of an LLM, also in data/prepare.py


def is_gguf(name: str) -> bool:
    """Whether an LLM is a file of llama.cpp's format, which transformers dequantises as it loads
    it."""
    return Path(name).suffix.lower() == ".gguf"


def check_model_name(name: str, key: str) -> None:
    """Raises: UserError if `name` is neither a folder of a model nor possible on the hub: at once,
    where the libraries would ask the network for it."""
    folder = Path(name)
    way_on = WAYS_ON.get(key, "")
    if key in LLM_KEYS and is_gguf(name):
        check_file(name, key)
        for package in ("gguf", "accelerate"):  # which transformers needs for it
            import_optional(package, "gguf")
        return
    if folder.is_file():
        raise UserError(f"{key}: {name} is a file; give the folder of a model{way_on}")
    if not folder.is_dir():
        if not is_hub_name(str(name)):
            raise UserError(f"{key}: cannot load {name}: {absent(name, 'folder')}{way_on}")
        return
    files = ("config.json", "modules.json", "adapter_config.json")
    if not any((folder / file).exists() for file in files):
        raise UserError(f"{key}: cannot load {name}: no folder of a model, as it has no "
                        f"config.json{way_on}")


# transformers replaces functions of its own and of torch while it loads a model: two threads that
# load at a time would leave them replaced for good, and weights untied.
LOADING = threading.RLock()


@contextlib.contextmanager
def report_load_errors(name: str, key: str) -> Iterator[None]:
    """For what loads `name`, in one thread at a time. Raises: UserError that names the config key,
    if that fails."""
    check_model_name(name, key)
    from transformers import logging as transformers_logging

    if key.endswith("llm") and shows_bars():  # of several bars, the LLM's is shown
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # silence the load report
    message = f"{key}: cannot load {name}"
    if not Path(name).exists():
        message += f" (there is no such folder in {Path.cwd()}{WAYS_ON.get(key, '')})"
    if sys.flags.optimize == 2:
        message += " (python -OO drops the docstrings that transformers reads: use -O)"
    # At a broken folder libraries raise exceptions of any type, tokenizers even Exception itself.
    # Only their code runs in here.
    with LOADING, user_error(message, Exception):
        yield


def announce_download(name: str, key: str) -> None:
    """Say that a model's weights are not on this machine yet, and will be downloaded."""
    import huggingface_hub

    if Path(name).exists() or huggingface_hub.is_offline_mode():
        return
    with report_load_errors(name, key):
        files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        is_here = any(huggingface_hub.try_to_load_from_cache(name, file) for file in files)
    if not is_here:
        log.warning(f"{key}: {name} is not on this machine yet; it is downloaded from the hub"
                    f"{WAYS_ON.get(key, '')}")


def load_pretrained(auto_class: Any, name: str, key: str, **options: Any) -> Any:
    """auto_class.from_pretrained(name), of a hub name, a folder or a GGUF file. Raises:
    UserError."""
    if not is_gguf(name):
        refuse_unmerged(name, key)
    with report_load_errors(name, key), contextlib.ExitStack() as stack:
        place = name
        if is_gguf(name):
            # In a folder of its own: of a tokenizer.json that lies beside the file transformers
            # would take the tokenizer.
            place = stack.enter_context(tempfile.TemporaryDirectory())
            file = Path(name).name
            Path(place, file).symlink_to(Path(name).resolve())
            options["gguf_file"] = file
        return auto_class.from_pretrained(place, trust_remote_code=False, **options)


def load_tokenizer(name: str, key: str = "model.llm") -> PreTrainedTokenizerBase:
    """The tokenizer of an LLM, with its chat template. Raises: UserError."""
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, name, key)
    tokenizer.name_or_path = name  # of a GGUF file transformers takes the folder's
    if not tokenizer.chat_template and not is_gguf(name):
        tokenizer.chat_template = read_processor_template(name, key)
    return tokenizer


def find_model_file(name: str, key: str, file: str) -> Path | None:
    """A file of a folder or of a hub repository, if it has it. Raises: UserError."""
    from transformers.utils import cached_file

    with report_load_errors(name, key):
        found = cached_file(
            name, file, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False)
    return None if found is None else Path(found)


def read_processor_template(name: str, key: str) -> str | None:
    """The chat template of a processor, which AutoTokenizer does not read: exports by transformers
    before 4.52 hold it in a file of its own. Raises: UserError."""
    path = find_model_file(name, key, "chat_template.json")
    if path is None:
        return None
    with user_error(f"{key}: {path}: not a chat template", OSError, ValueError, LookupError,
                    TypeError):
        return json.loads(path.read_bytes())["chat_template"]


def refuse_unmerged(name: str, key: str) -> None:
    """Raises: UserError at a LoRA adapter. transformers ignores it beside a model's weights, or
    applies it if peft is installed."""
    if find_model_file(name, key, "adapter_config.json") is not None:
        raise UserError(f"{key}: {name} has an adapter_config.json, of LoRA or another method of "
                        "peft, which would not be used; merge it into the model "
                        "(merge_and_unload), save both model and tokenizer in a new folder, and "
                        "name that")


def load_llm(name: str, device: torch.device, bf16: bool, key: str = "model.llm",
             deepspeed: DeepSpeedConfig | None = None,
             quantization: Quantization = "off") -> PreTrainedModel:
    """The frozen LLM in eval mode. `key` names it in messages. Raises: UserError."""
    is_gpu = device.type == "cuda"
    if bf16 and is_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        gpu = torch.cuda.get_device_name()
        raise UserError(f"{key}: {gpu} has no bf16; load the LLM in fp32, by bf16 = false")
    will_be_quantized = check_quantization(name, key, quantization)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        if will_be_quantized:
            raise UserError(f"{key}: deepspeed.zero_stage = 3 cannot share out a quantised LLM; "
                            "zero_stage = 0 loads it whole on each GPU")
        llm = load_llm_zero3(name, device, bf16, key, deepspeed)
    elif will_be_quantized:
        options = {"device_map": {"": device}}
        if quantization != "off":
            options["quantization_config"] = make_quantization_config(quantization, bf16, key)
        llm = load_frozen(name, bf16, key, **options)
        check_output_layer(llm, name, key)
    else:
        llm = load_frozen(name, bf16, key).to(device)
    if device.type == "cpu":
        warn_of_slow_dtype(llm)
    return llm


def load_frozen(name: str, bf16: bool, key: str, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    announce_download(name, key)
    dtype = torch.bfloat16 if bf16 else torch.float32
    llm, info = load_pretrained(AutoModelForCausalLM, name, key, dtype=dtype,
                                output_loading_info=True, **options)
    llm.name_or_path = name  # of a GGUF file transformers takes the folder's
    if info["missing_keys"]:  # transformers initialises them randomly
        raise UserError(f"{key}: {name} lacks the weights {sorted(info['missing_keys'])[:3]}")
    # transformers' own modules fail if config.json says otherwise: they call each other by it.
    for config in (llm.config, llm.config.get_text_config()):
        config.return_dict = True
    return llm.eval().requires_grad_(False)


# Quantisation: fewer bits for the weights of the LLM's linear layers, by transformers and the
# libraries that it calls. An LLM that is dequantised as it is loaded, as a GGUF file is, counts as
# any other.


def quantization_key(key: str) -> str:
    """The config key beside that of an LLM."""
    return "model.quantization" if key == "model.llm" else "quantization"


def stored_quantization(name: str, key: str) -> Json | None:
    """The quantization_config in config.json of a folder or a hub repository. Raises: UserError."""
    from transformers import AutoConfig

    if is_gguf(name):
        return None
    config = load_pretrained(AutoConfig, name, key)
    return (getattr(config, "quantization_config", None)
            or getattr(config.get_text_config(), "quantization_config", None))


def check_quantization(name: str, key: str, quantization: Quantization) -> bool:
    """Whether an LLM will be quantised, by load_llm or where it lies. Raises: UserError if by both,
    or if a package is missing."""
    own_key = quantization_key(key)
    with user_error(own_key, ValueError):
        check_quantization_kind(quantization)
    stored = stored_quantization(name, key)
    if quantization != "off":
        if is_gguf(name):
            raise UserError(f"{own_key}: {name} is a GGUF file, which is dequantised as it is "
                            f"loaded; leave {own_key} out, or give a folder of transformers")
        if stored:
            method = stored.get("quant_method", "some method")
            raise UserError(f"{own_key}: {name} is quantised already, by {method}; leave {own_key} "
                            "out")
    elif not stored:
        return False
    import_optional("accelerate", "quantize")  # for transformers' loader
    if is_of_bitsandbytes(stored or quantization):
        # It warns of each type of input that a kernel casts, and of kernels that are slower.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import_optional("bitsandbytes", "quantize")
    return True


def is_of_bitsandbytes(quantization: Quantization) -> bool:
    if not isinstance(quantization, dict):
        return True
    names_bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    return bool(names_bits) or quantization.get("quant_method") == "bitsandbytes"


def make_quantization_config(quantization: Quantization, bf16: bool, key: str) -> Any:
    """transformers' config object. Raises: UserError at a table that it does not take."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    if quantization == "nf4":  # QLoRA (Dettmers et al., 2023)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32)
    if quantization == "int8":  # LLM.int8() (Dettmers et al., 2022)
        return BitsAndBytesConfig(load_in_8bit=True)
    own_key = quantization_key(key)
    with user_error(f"{own_key}: no quantization_config of transformers", Exception):
        config = AutoQuantizationConfig.from_dict(dict(quantization))
        known = quantization_table(config)
    for name in quantization:  # transformers ignores what it does not know
        if name not in known:
            raise UserError(f"{own_key}: {type(config).__name__} of transformers has no {name!r}"
                            f"{did_you_mean(name, known)}")
    return config


def check_output_layer(llm: PreTrainedModel, name: str, key: str) -> None:
    """Raises: UserError if it is packed, as of a table that skips no module, and has the matrix of
    the token embeddings, which is not."""
    head = llm.get_output_embeddings()
    if head is None or type(head) is nn.Linear:
        return
    if getattr(head, "weight", None) is llm.get_input_embeddings().weight:
        raise UserError(f'{quantization_key(key)}: the output layer of {name} is that of its token '
                        'embeddings, and cannot be packed; set llm_int8_skip_modules = ["lm_head"] '
                        "in the table")


def choose_kernels(llm: PreTrainedModel) -> None:
    """Of bitsandbytes those by which an LLM can be trained through, before its first pass."""
    for module in llm.modules():
        # Linear4bit, on a CPU with AVX512-BF16, repacks its weights at the first pass without a
        # gradient, for a kernel that has no backward pass: the gradient of later passes leaves the
        # layer out without an error (bitsandbytes 0.50.2, matmul_4bit).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # Linear8bitLt multiplies a column in fp16, of all tokens of a call, if any of them has an
        # outlier there: a row's loss would change with the rows that it is packed with, and with
        # its own later tokens.
        state = getattr(module, "state", None)
        if hasattr(state, "threshold"):
            state.threshold = 0.0


def is_quantized(llm: PreTrainedModel) -> bool:
    """Whether it was loaded so. Of a GGUF file transformers keeps a config of quantisation, too; a
    config that is no object but a dict was not loaded by."""
    config = getattr(llm.config, "quantization_config", None)
    return getattr(config, "quant_method", "gguf") != "gguf"


def quantization_table(config: Any) -> Json:
    """A quantization_config of transformers as JSON has it: enums and dtypes as texts."""
    return json.loads(json.dumps(config.to_dict()))


def quantization_of(llm: PreTrainedModel) -> Quantization:
    """The kind, or the table, that load_llm quantises an LLM's folder by as this one is."""
    if not is_quantized(llm):
        return "off"
    table = quantization_table(llm.config.quantization_config)
    kind = name_precision(llm)
    if kind not in QUANTIZATION_KINDS:
        return table
    # Other tables are called so, too: which modules they skip, say, makes other weights.
    own_config = make_quantization_config(kind, llm.dtype == torch.bfloat16, "model.llm")
    return kind if table == quantization_table(own_config) else table


def name_precision(llm: PreTrainedModel) -> str:
    """In which numbers its weights are: bfloat16, float32, nf4, int8 or another method's name."""
    if not is_quantized(llm):
        return str(llm.dtype).removeprefix("torch.")
    table = quantization_table(llm.config.quantization_config)
    if table.get("load_in_8bit"):
        return "int8"
    if table.get("bnb_4bit_quant_type") == "nf4" and table["bnb_4bit_use_double_quant"]:
        return "nf4"
    return str(table.get("quant_method", "quantised"))


class Zero3Flag:
    """The object that transformers asks in order to build a model in parts: accelerate's
    HfDeepSpeedConfig, without accelerate. transformers holds it by a weak reference."""

    def __init__(self, config: Json):
        self.config = config

    def is_zero3(self) -> bool:
        return True


def load_llm_zero3(name: str, device: torch.device, bf16: bool, key: str,
                   cfg: DeepSpeedConfig) -> PreTrainedModel:
    """The frozen LLM, its parameters shared out among the processes as they are created, so that
    none ever holds the whole LLM. All processes take part. Raises: UserError."""
    if is_gguf(name):
        raise UserError(f"{key}: deepspeed.zero_stage = 3 cannot share out a GGUF file; give a "
                        "folder of transformers")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        # DeepSpeed takes the GPU of this number. A launcher that shows each process one GPU alone
        # counts those of the host.
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = import_optional("deepspeed")
    # torch's, of calls that DeepSpeed makes
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed would compile its shared-memory op for CPUs at first use: a minute, a C++ compiler,
    # and a lock that hangs every later run if the build is killed. gloo is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():  # one process alone, by a store without a TCP port
        message = "deepspeed.zero_stage = 3: needs a network interface (loopback); 0 needs none"
        with user_error(message, RuntimeError):
            init_process_group(device, store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    config = {
        **cfg.model_extra,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {**(cfg.zero_optimization or {}), "stage": 3}}

    from transformers.integrations import deepspeed as integration

    flag = Zero3Flag(config)
    integration.set_hf_deepspeed_config(flag)
    try:
        llm = load_frozen(name, bf16, key)
    finally:
        integration.unset_hf_deepspeed_config()
    # DeepSpeed takes each forward pass of its top module for a new step, which fails where
    # processes generate answers of different lengths. So its top module is one that is never
    # called.
    top_module = nn.ModuleDict({"llm": llm})
    deepspeed.initialize(model=top_module, config=config)
    # DeepSpeed's own reference to it would keep the LLM to the end of the process. The engine stays
    # as long as the LLM: hooks on its layers refer to it.
    deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK.remove(top_module)
    for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        module.weight.is_external_param = True  # stays gathered over the chunks of the logits
    # Small parameters are to stay gathered, but DeepSpeed 0.19.8 (release_sub_module) releases them
    # all the same where, as here, it has no complete trace of a step.
    for parameter in llm.parameters():
        if parameter.ds_persist:
            parameter.is_external_param = True
    return llm


def is_partitioned(llm: PreTrainedModel) -> bool:
    """Whether ZeRO 3 shares the LLM out."""
    return hasattr(llm.get_input_embeddings().weight, "ds_id")


def packed_buffers(llm: nn.Module) -> list[Tensor]:
    """Weights that are no parameters: GPTQ, AWQ and others pack them in buffers of integers."""
    buffers = []
    for module in llm.modules():
        for name, buffer in module.named_buffers(recurse=False):
            is_kept = name not in module._non_persistent_buffers_set
            if is_kept and not buffer.is_floating_point():
                buffers.append(buffer)
    return buffers


def whole_shape(parameter: Tensor) -> torch.Size:
    """Its shape, also where ZeRO 3 shares it out."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_numel(parameter: Tensor) -> int:
    """The number of its elements, also where ZeRO 3 shares them out."""
    return getattr(parameter, "ds_numel", parameter.numel())


def count_parameters(model: nn.Module) -> int:
    """The number of values; bitsandbytes' 4-bit kinds pack two of them in an element."""
    count = 0
    for parameter in model.parameters():
        quant_state = getattr(parameter, "quant_state", None)
        count += whole_numel(parameter) if quant_state is None else quant_state.shape.numel()
    return count


# Counted once for each LLM: each micro-batch asks for it.
BYTES_OF_WEIGHTS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def bytes_of_weights(llm: PreTrainedModel) -> int:
    if llm not in BYTES_OF_WEIGHTS:
        num_bytes = 0
        for weight in [*llm.parameters(), *packed_buffers(llm)]:
            num_bytes += whole_numel(weight) * weight.element_size()
        BYTES_OF_WEIGHTS[llm] = num_bytes
    return BYTES_OF_WEIGHTS[llm]


def memory_beside_weights(llm: PreTrainedModel) -> float:
    """Bytes of the LLM's GPU that its weights leave: of the whole card, not of what is free at the
    moment, so that no report depends on other users of the card. Infinite on a CPU."""
    if llm.device.type != "cuda":
        return math.inf
    own_bytes = bytes_of_weights(llm)
    if is_partitioned(llm):
        own_bytes /= world_size()
    return torch.cuda.get_device_properties(llm.device).total_memory - own_bytes


def bytes_of_a_token(llm: PreTrainedModel) -> int:
    """That a pass without a gradient holds at once, its logits aside: the hidden states of one
    layer, the widest those of its MLP."""
    config = llm.config.get_text_config()
    mlp_width = getattr(config, "intermediate_size", None)
    if not isinstance(mlp_width, int):  # GPT-2 has none, some LLMs have one for each layer
        mlp_width = 4 * config.hidden_size
    return (4 * mlp_width + 8 * config.hidden_size) * llm.dtype.itemsize


def bytes_of_a_cached_token(llm: PreTrainedModel) -> int:
    """Keys and values of all layers; 0 without attention (Mamba). A bound for layers that keep
    fewer tokens (sliding windows) or fewer numbers (DeepSeek's latent attention)."""
    config = llm.config.get_text_config()
    num_query_heads = getattr(config, "num_attention_heads", None)
    if num_query_heads is None:
        return 0
    num_heads = getattr(config, "num_key_value_heads", None) or num_query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_query_heads
    return 2 * config.num_hidden_layers * num_heads * head_dim * llm.dtype.itemsize


def max_positions(llm: PreTrainedModel) -> int:
    """The LLM's maximum context length, in tokens; with LongRoPE longrope_length."""
    limit = getattr(llm.config.get_text_config(), "max_position_embeddings", None)
    return longrope_length(llm) or limit or 2**31


def longrope_length(llm: PreTrainedModel) -> int | None:
    """The number of positions that an LLM with LongRoPE (Phi-3, Phi-4) has without it. transformers
    switches the frequencies of all rows of a batch by its longest row: a row would read otherwise
    beside one that is longer than that."""
    parameters = getattr(llm.config.get_text_config(), "rope_parameters", None) or {}
    tables = [parameters, *parameters.values()]  # one for all layers, or one for each type of layer
    for table in tables:
        if isinstance(table, dict) and table.get("rope_type") == "longrope":
            return table["original_max_position_embeddings"]
    return None


def weights_hash(model: nn.Module) -> str:
    """A hash of all parameters and packed buffers, see hash_weights."""
    return hash_weights([*model.parameters(), *packed_buffers(model)])


def norms_hash(llm: PreTrainedModel) -> str:
    """A hash of the floating-point parameters of one dimension, norms and biases, which most
    methods of quantisation leave as they are."""
    chosen = []
    for parameter in llm.parameters():
        if len(whole_shape(parameter)) == 1 and parameter.is_floating_point():
            chosen.append(parameter)
    return hash_weights(chosen)


@torch.no_grad()
def hash_weights(weights: list[Tensor]) -> str:
    """A hash of 16 to 31 values of each tensor, in bf16, so that it is the same for any dtype; ""
    of none. Under ZeRO 3 all processes take part."""
    samples = []
    for weight in weights:
        gathered = contextlib.nullcontext()
        if hasattr(weight, "ds_id"):
            gathered = import_optional("deepspeed").zero.GatheredParameters(weight)
        with gathered:
            stride = max(1, weight.numel() // 16)
            samples.append(weight.flatten()[::stride].bfloat16().float())  # a copy, no view
    if not samples:  # an embedder may have no weights, as a bag of words
        return ""
    return sha256_short(torch.cat(samples).cpu().numpy().tobytes())


# bf16 on a CPU

# There oneDNN compiles kernels for each shape of matrices, up to a megabyte of code, and keeps the
# last 1,024: at most about 1 GB. So that few shapes occur, numbers of rows and lengths of prompts
# are rounded up to a multiple of this.
ROWS_MULTIPLE = 32

SMALL_LLM = 50_000_000  # parameters; smaller ones were not measured


def compiles_shapes(x: Tensor) -> bool:
    """Whether products of x are oneDNN's: half precision on a CPU."""
    return x.device.type == "cpu" and x.dtype.itemsize == 2


def count_padding(x: Tensor) -> int:
    """The number of rows that x [n, D] lacks to a shape that occurs often; 0 where any shape will
    do."""
    return -len(x) % ROWS_MULTIPLE if compiles_shapes(x) else 0


def pad_rows(x: Tensor, num_padded: int) -> Tensor:
    """[n, D] -> [n + num_padded, D], with zeros."""
    return F.pad(x, (0, 0, 0, num_padded))


def warn_of_slow_dtype(llm: PreTrainedModel) -> None:
    """Warn of an LLM on a CPU that would be faster in the other dtype. CPUs that are no x86, and
    small LLMs, were not measured."""
    capabilities = torch.cpu.get_capabilities()
    if count_parameters(llm) < SMALL_LLM or capabilities["architecture"] != "x86_64":
        return
    has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    if has_bf16 and llm.dtype == torch.float32:
        warn_once("bf16 = false: this CPU multiplies in bf16, about twice as fast; set bf16 = true")
    if llm.dtype == torch.bfloat16 and not has_bf16:
        warn_once("bf16 = true: this CPU has no instructions for bf16; fp32 is faster, in twice "
                  "the memory: set bf16 = false")


# Packed attention


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
    scaling: float | None = None, lengths: list[int] | None = None,
    cu_seqlens: Tensor | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example of a packed row, as transformers calls it: query
    [1, heads, T, d], key and value with as many heads or fewer -> [1, T, heads, d].

    `lengths` [n] and `cu_seqlens` [n + 1] come from ELM.forward_hidden; the model's own code passes
    them down. Raises: ValueError at attention sinks, as gpt-oss has them, and at masks that the
    layer makes itself, as Doge's do.
    """
    if s_aux is not None:
        raise ValueError("its attention has sinks")
    if attention_mask is not None:
        raise ValueError("its attention layers make masks of their own")
    if lengths is None:
        raise ValueError("it does not pass the lengths of examples down to its attention")
    if "sliding_window" in options:
        sliding_window = options["sliding_window"]
    else:
        sliding_window = window_of_mask(module)
    if can_use_varlen(query, softcap):
        out = varlen_attention(query, key, value, scaling, lengths, cu_seqlens, sliding_window)
        return out, None
    if compiles_shapes(query):  # in fp32: short examples take half the time, long ones a third more
        out = attention_by_example(query.float(), key.float(), value.float(), scaling, lengths,
                                   sliding_window, softcap)
        return out.to(query.dtype), None
    out = attention_by_example(query, key, value, scaling, lengths, sliding_window, softcap)
    return out, None


def attention_by_example(query: Tensor, key: Tensor, value: Tensor, scaling: float | None,
                         lengths: list[int], sliding_window: int | None,
                         softcap: float | None) -> Tensor:
    """Attention of one example of a packed row after the other; shapes as in packed_attention."""
    group_size = query.shape[1] // key.shape[1]
    if group_size > 1:
        key = key.repeat_interleave(group_size, dim=1)
        value = value.repeat_interleave(group_size, dim=1)
    # By torch.split: the backward pass of a slice would allocate zeros of the whole row.
    examples = zip(
        query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outs = [causal_attention(q, k, v, scaling, sliding_window, softcap) for q, k, v in examples]
    # Contiguous, as transformers' own are: some LLMs (JetMoE) take a view of it.
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)


def window_of_mask(module: nn.Module) -> int | None:
    """The sliding window of an attention layer that does not pass it on, as transformers has it in
    the mask alone (Qwen2-MoE, PhiMoE). Other LLMs may have one in their config that no mask is made
    of."""
    modeling = sys.modules[type(module).__module__]
    if not hasattr(modeling, "create_sliding_window_causal_mask"):
        return None
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types and layer_types[module.layer_idx] != "sliding_attention":
        return None
    return getattr(module.config, "sliding_window", None)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float | None,
                     sliding_window: int | None, softcap: float | None) -> Tensor:
    """Attention of one example: [1, heads, t, d] -> the same."""
    t, d = q.shape[2:]
    window = sliding_window or t
    if t <= window and not softcap:
        return F.scaled_dot_product_attention(q, k, v, scale=scaling, is_causal=True)
    positions = torch.arange(t, device=q.device)
    distance = positions[:, None] - positions  # of a query (row) from a key (column) before it
    visible = (distance >= 0) & (distance < window)
    scores = q.float() @ k.float().mT * (d**-0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, -math.inf).softmax(-1).to(v.dtype) @ v


def can_use_varlen(query: Tensor, softcap: float | None) -> bool:
    """Flash attention's limits: NVIDIA, half precision, head size a multiple of 8 up to 256, no
    soft-cap."""
    d = query.shape[-1]
    if not query.is_cuda or torch.version.hip:
        return False
    return query.dtype.itemsize == 2 and d % 8 == 0 and d <= 256 and not softcap


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None,
                     lengths: list[int], cu_seqlens: Tensor, sliding_window: int | None) -> Tensor:
    """All examples of a packed row by one kernel: [1, heads, T, d] -> [1, T, heads, d]."""
    from torch.nn.attention.varlen import varlen_attn

    # How many tokens before itself and after itself a query sees; -1: all of them.
    window = (sliding_window - 1 if sliding_window else -1, 0)
    options = {}
    if varlen_names_gqa():
        options["enable_gqa"] = query.shape[1] > key.shape[1]
    longest = max(lengths)
    # squeeze, not [0]: the backward pass of a select would fill zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling,
                      window_size=window, **options)
    return out[None]


@functools.cache
def varlen_names_gqa() -> bool:
    """torch 2.11 infers grouped queries from the shapes, later versions need `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@contextlib.contextmanager
def temporarily_set(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


LLM_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def llm_lock(llm: PreTrainedModel) -> threading.RLock:
    """What a thread holds while it runs the LLM or sets something of it for a while: several may
    use one ELM. It is kept beside the LLM, as a lock can be neither copied nor pickled.

    No thread may run a backward pass while it holds it: on a GPU autograd recomputes layers, and
    takes the lock for that, in a thread of its own.
    """
    return LLM_LOCKS.setdefault(llm, threading.RLock())


@contextlib.contextmanager
def packed_attention_enabled(llm: PreTrainedModel) -> Iterator[None]:
    """Within it the LLM's layers use packed_attention. transformers has no argument for that: each
    attention layer reads the name from the config, in every forward pass. No mask function is
    registered under the name, so transformers builds no O(T²) mask."""
    with llm_lock(llm), temporarily_set(llm.config, "_attn_implementation", PACKED):
        yield


@functools.cache
def register_packed_attention() -> None:
    """Once."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


# What a backward pass keeps
#
# Of an RMSNorm autograd keeps the input in fp32; of a gated MLP the gate, the activated gate and
# the other factor. The weights are frozen, so the input in its own dtype and the two factors are
# enough: two thirds of the memory of a layer of Qwen3-4B. The rest is computed again.


class FrozenNorm(torch.autograd.Function):
    """RMSNorm (Zhang and Sennrich 2019) of x [..., D] with a scale [D] that gets no gradient:
    x / sqrt(mean(x²) + eps) in fp32, then times the scale in the scale's dtype."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        inverse_rms = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, inverse_rms)
        normalised = x_fp32 * inverse_rms
        return (scale * normalised.to(scale.dtype)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, scale, inverse_rms = ctx.saved_tensors
        normalised = x.float() * inverse_rms
        at_normalised = (gradient.to(scale.dtype) * scale).float()
        along = (at_normalised * normalised).mean(-1, keepdim=True)
        return ((at_normalised - normalised * along) * inverse_rms).to(x.dtype), None, None


class GatedProduct(torch.autograd.Function):
    """activation(gate) * up, of tensors of one shape."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor,
                activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (at_gate,) = torch.autograd.grad(activated, leaf, gradient * up)
        return at_gate, gradient * activated.detach(), None


def run_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """As Llama and Qwen have it."""
    return FrozenNorm.apply(x, norm.weight, norm.variance_epsilon)


def run_norm_of_gemma(norm: nn.Module, x: Tensor) -> Tensor:
    return FrozenNorm.apply(x, 1.0 + norm.weight.float(), norm.eps)


def run_gated_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    product = GatedProduct.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn)
    return mlp.down_proj(product)


# What a module must have to be run by each.
LEAN_FORWARDS = {
    run_norm: ("weight", "variance_epsilon"),
    run_norm_of_gemma: ("weight", "eps"),
    run_gated_mlp: ("gate_proj", "up_proj", "down_proj", "act_fn")}


def keep_less(llm: PreTrainedModel) -> int:
    """Let norms and gated MLPs keep less for the backward pass: those for which a lean forward
    pass gives the numbers of their own to the bit. Returns how many there are."""
    num_replaced = 0
    for module in llm.modules():
        for lean_forward, attributes in LEAN_FORWARDS.items():
            if any(getattr(module, name, None) is None for name in attributes):
                continue
            if gives_the_same(lean_forward, module, llm):
                module.forward = functools.partial(lean_forward, module)
                num_replaced += 1
    return num_replaced


@torch.no_grad()
def gives_the_same(lean_forward: Callable[[nn.Module, Tensor], Tensor], module: nn.Module,
                   llm: PreTrainedModel) -> bool:
    """On random inputs, to the bit. Not where a forward pass takes more than its input, or where a
    norm has a weight for each head (Cohere)."""
    if len(inspect.signature(type(module).forward).parameters) != 2:  # self and x
        return False
    is_mlp = hasattr(module, "gate_proj")
    if not is_mlp and module.weight.ndim != 1:
        return False
    width = module.gate_proj.in_features if is_mlp else len(module.weight)
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    x = x.to(llm.device, llm.dtype)
    return torch.equal(lean_forward(module, x), type(module).forward(module, x))


def recompute_layers(llm: PreTrainedModel, share: float) -> int:
    """Recompute the last layers, a share of all, in the backward pass instead of keeping their
    activations. Returns their number.

    By replacing each layer's `forward`: transformers' own switch works in train mode alone, in
    which layers of some LLMs drop out. The backward pass runs where packed attention is no longer
    enabled, so the recomputation enables it again."""
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        vars(layer).pop("forward", None)  # of an earlier call
    num_recomputed = math.ceil(share * len(layers))
    for layer in layers[len(layers) - num_recomputed :]:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=functools.partial(make_recomputation_contexts, llm))
    return num_recomputed


def make_recomputation_contexts(
    llm: PreTrainedModel
) -> tuple[contextlib.AbstractContextManager, ...]:
    around_forward = contextlib.nullcontext()
    around_recomputation = packed_attention_enabled(llm)
    return around_forward, around_recomputation


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it the module runs `forward` in place of its own."""
    original = vars(module).get("forward")  # None: that of its class
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if original is not None:
            module.forward = original


class BackboneOutput(dict):
    """Hidden states as a backbone returns them; every other field is None."""

    def __init__(self, hidden: Tensor):
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, name: str) -> Tensor | None:
        return self.get(name)

    def __getitem__(self, key: str | int) -> Tensor:
        return super().__getitem__("last_hidden_state" if key == 0 else key)


# Generation


class Answer(NamedTuple):
    text: str
    finished: bool  # whether the LLM ended it, not the limit of tokens
    refusal: str = ""  # why a server gave no answer to this question


def end_tokens(llm: PreTrainedModel, prompt: Prompt) -> set[int]:
    """The ids that end an answer: the template's, and those of the LLM's generation_config."""
    ends = {prompt.end_ids[-1]}
    own_ends = llm.generation_config.eos_token_id  # None, one or several
    if isinstance(own_ends, list):
        ends |= set(own_ends)
    elif own_ends is not None:
        ends.add(own_ends)
    return ends


# Options of the LLM's own `generate` that sampling alone reads: see GenerationConfig.validate.
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p",
                    "epsilon_cutoff", "eta_cutoff")


def choose_sampling(options: Json) -> Json:
    """`options` with do_sample, and without those that are None or that greedy decoding does not
    read. Answers are sampled if do_sample says so or, without it, if an option of sampling is
    given; a temperature of 0 is greedy."""
    chosen = {name: value for name, value in options.items() if value is not None}
    has_sampling_option = any(name in chosen for name in SAMPLING_OPTIONS)
    chosen.setdefault("do_sample", has_sampling_option)
    if chosen.get("temperature") == 0:
        chosen["do_sample"] = False
    if not chosen["do_sample"]:
        for name in SAMPLING_OPTIONS:
            chosen.pop(name, None)
    if "temperature" in chosen:
        chosen["temperature"] = float(chosen["temperature"])  # transformers refuses an integer
    return chosen


# Answers that are generated at once, at most.
GENERATION_BATCH = {"cpu": 16, "cuda": 256}
# Tokens that the LLM reads at once where no gradient is needed, at most; a GPU's memory says it.
TOKENS_AT_ONCE = {"cpu": 32768, "cuda": math.inf}


def generate_batch(llm: PreTrainedModel, prompt: Prompt, prompt_embeds: list[Tensor],
                   max_new_tokens: int, synced_gpus: bool = False,
                   **options: Any) -> list[Answer]:
    """n prompts [T, D] of any lengths -> n answers, on a GPU as many at once as its memory holds;
    greedy, unless `options` of the LLM's own `generate` say otherwise, see choose_sampling. Raises:
    UserError if a prompt leaves no room for an answer, or if transformers refuses an option."""
    longest = max(map(len, prompt_embeds))
    size = answers_at_once(llm, longest, max_new_tokens)
    if synced_gpus:
        size = least_of_all(size)
    answers = []
    for part in in_blocks(prompt_embeds, size):
        answers += generate_at_once(llm, prompt, part, max_new_tokens, synced_gpus, **options)
    return answers


def answers_at_once(llm: PreTrainedModel, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """How many fit into the LLM's memory. Keys and values take half of what the weights leave, the
    pass over the prompts and the logits some of the other half."""
    most = GENERATION_BATCH[llm.device.type]
    num_tokens = num_prompt_tokens + max_new_tokens
    bytes_of_an_answer = max(1, num_tokens * bytes_of_a_cached_token(llm))
    by_cache = memory_beside_weights(llm) / 2 / bytes_of_an_answer
    by_prompts = tokens_at_once(llm) / num_prompt_tokens
    return max(1, int(min(most, by_cache, by_prompts)))


def tokens_at_once(llm: PreTrainedModel) -> float:
    """Tokens of a pass without a gradient: in a quarter of what the weights leave."""
    most = TOKENS_AT_ONCE[llm.device.type]
    return min(most, memory_beside_weights(llm) / 4 / bytes_of_a_token(llm))


def generate_at_once(llm: PreTrainedModel, prompt: Prompt, prompt_embeds: list[Tensor],
                     max_new_tokens: int, synced_gpus: bool, **options: Any) -> list[Answer]:
    """See generate_batch."""
    from transformers import GenerationConfig

    longest_prompt = max(prompt_embeds, key=len)
    longest = len(longest_prompt)
    limit = max_positions(llm)
    if longest >= limit:
        raise UserError(f"a prompt has {longest} tokens: the LLM reads {limit}")

    if "generation_config" in options:  # the defaults below would win over it
        raise UserError("generation_config: give its options one by one, as temperature=0.7")
    masks = [torch.ones_like(embeds[:, 0], dtype=torch.long) for embeds in prompt_embeds]
    pad_left = functools.partial(
        nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    max_new_tokens = min(max_new_tokens, limit - longest)
    # Padding takes no room of the answers.
    num_padded = min(count_padding(longest_prompt), limit - longest - max_new_tokens)
    inputs = {
        "inputs_embeds": F.pad(pad_left(prompt_embeds), (0, 0, num_padded, 0)),
        "attention_mask": F.pad(pad_left(masks), (num_padded, 0))}
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    refusals = (TypeError, ValueError) if options else ()
    with llm_lock(llm), user_error(f"generate: {clip(given, 200)}", *refusals):
        ends = end_tokens(llm, prompt)
        chosen = {
            "eos_token_id": sorted(ends),
            "pad_token_id": prompt.end_ids[-1],
            "tokenizer": prompt.tokenizer,  # for stop_strings
            "max_new_tokens": max_new_tokens,
            **choose_sampling(options),
            "return_dict_in_generate": False}
        # Ignore the LLM's generation_config unless we sample. transformers fills the gaps of a
        # config that it is given from the LLM's own: so that one is exchanged.
        config = llm.generation_config if chosen["do_sample"] else GenerationConfig()
        with temporarily_set(llm, "generation_config", config):
            out = llm.generate(**inputs, synced_gpus=synced_gpus, **chosen)
    return decode_answers(out.tolist(), ends, prompt.tokenizer)


def decode_answers(ids_of_answers: list[list[int]], ends: set[int],
                   tokenizer: PreTrainedTokenizerBase) -> list[Answer]:
    """Answers up to the first of the ids `ends`."""
    cut_ids = []
    finished = []
    for ids in ids_of_answers:
        end_positions = [i for i, token in enumerate(ids) if token in ends]
        finished.append(bool(end_positions))
        cut_ids.append(ids[: end_positions[0]] if end_positions else ids)
    texts = tokenizer.batch_decode(cut_ids, skip_special_tokens=True)
    return [Answer(text, done) for text, done in zip(texts, finished, strict=True)]


# -----------------------------------------------------------------------------
# ELM

class ELM(nn.Module):
    """A frozen LLM and the adapter that lets it read vectors. Several threads may use one; it can
    be copied and pickled.

    Attributes: llm, adapter, prompt; origin, of the vectors that the adapter reads; trained_for, a
    dict of what an adapter belongs to; lockstep, whether all processes must run equally many passes
    through the LLM, because ZeRO 3 shares it out."""

    def __init__(self, llm: PreTrainedModel, adapter: Adapter, prompt: Prompt,
                 origin: VectorOrigin | None = None):
        super().__init__()
        register_packed_attention()
        choose_kernels(llm)
        self.llm = llm
        self.adapter = adapter
        self.prompt = prompt
        self.origin = origin or VectorOrigin()
        prompt.check_fits(llm)
        self.trained_for = {
            WEIGHTS_HASH: weights_hash(llm),
            TOKENIZER_HASH: prompt.ids_hash(),
            **adapter.settings}
        # Of the LLM, for find_difference; here, because under ZeRO 3 all processes take part.
        self.norms_hash = norms_hash(llm)
        self.token_embeddings = sample_token_embeddings(llm, prompt)
        self.lockstep = is_partitioned(llm) and world_size() > 1

    # Making and keeping one

    @classmethod
    def load(cls, path: str | Path, llm: str | None = None, bf16: bool | None = None,
             deepspeed: DeepSpeedConfig | None = None,
             quantization: Quantization | None = None) -> ELM:
        """The adapter of a file, a run's folder or a hub repository, with the LLM it was trained
        for: where its file says, or at `llm`; or with a twin, see find_difference. bf16 and
        quantization are those of training where they are None; an LLM that is quantised where it
        lies is loaded as it is. Raises: UserError, also if that is another
        LLM."""
        adapter, metadata = Adapter.load(path)
        return cls.from_adapter(adapter, metadata, path, llm, bf16, deepspeed, quantization)

    @classmethod
    def from_adapter(cls, adapter: Adapter, metadata: Json, path: str | Path,
                     llm: str | None = None, bf16: bool | None = None,
                     deepspeed: DeepSpeedConfig | None = None,
                     quantization: Quantization | None = None) -> ELM:
        """As `load`, of what Adapter.load returns for `path`."""
        trained = read_trained_llm(metadata, path)
        name = llm or trained.name
        device = find_device()
        prompt = Prompt(load_tokenizer(name, "llm"), trained.template, trained.template_parts)
        if bf16 is None:
            bf16 = trained.bf16
        if quantization is None:
            quantization = trained.quantization
            if quantization != "off" and (is_gguf(name) or stored_quantization(name, "llm")):
                quantization = "off"
        frozen = load_llm(name, device, bf16, "llm", deepspeed, quantization)
        origin = adapter_origin(metadata, path)
        elm = cls(frozen, adapter.to(device), prompt, origin).eval()
        check_is_llm_of_training(trained, elm, path)
        return elm

    @classmethod
    def create(cls, llm: str, embeddings: Vectors, bf16: bool = True, hidden_dim: int = 4096,
               template: Json | None = None, embedder: str | None = None,
               quantization: Quantization = "off", **settings: Any) -> ELM:
        """A fresh adapter for vectors like `embeddings` [n, E], see as_tensor, which it
        standardises by their mean and deviation. `template` are arguments of the chat template,
        `embedder` is the name of the model that made the vectors, `quantization` as
        model.quantization, `settings` are further arguments of Adapter. Raises: UserError."""
        vectors = as_tensor(embeddings, "embeddings").detach().cpu()
        if vectors.ndim != 2 or not len(vectors):
            raise UserError(f"embeddings: {list(vectors.shape)}, not vectors [n, E]")
        is_used = torch.ones(len(vectors), dtype=torch.bool)
        statistics = scan_vectors(vectors, is_used, "embeddings").statistics
        device = find_device()
        prompt = Prompt(load_tokenizer(llm, "llm"), template)
        frozen = load_llm(llm, device, bf16, "llm", quantization=quantization)
        adapter = fresh_adapter(frozen, statistics, hidden_dim=hidden_dim, **settings)
        elm = cls(frozen, adapter.to(device), prompt, VectorOrigin(model=embedder))
        check_llm(elm, min(2048, max_positions(frozen)), "llm")
        check_gradient(elm, "llm")
        return elm

    def save(self, path: str | Path, weights: dict[str, Tensor] | None = None,
             dtype: torch.dtype = torch.float32, **metadata: Any) -> None:
        """Write the adapter, or other `weights` of it, as safetensors for `load`, which gives fp32.
        `dtype` is that of the trained parameters in the file; in bfloat16 it has half the size.
        Raises: UserError, also where the path is an adapter that a run has left."""
        check_is_of_no_run(Path(path))
        self.write(Path(path), weights, dtype, **metadata)

    def write(self, path: Path, weights: dict[str, Tensor] | None = None,
              dtype: torch.dtype = torch.float32, **metadata: Any) -> None:
        """As `save`, for a run itself."""
        import safetensors.torch

        weights = weights or self.adapter.state_dict()
        trained_names = {name for name, _ in self.adapter.named_parameters()}
        tensors = {TOKEN_EMBEDDINGS: self.token_embeddings}
        for name, tensor in weights.items():
            stored_dtype = dtype if name in trained_names else torch.float32
            tensors[name] = tensor.detach().to("cpu", stored_dtype)
        header = {
            "adapter": self.adapter.settings,
            "llm": {
                "name": self.llm.name_or_path,
                "bf16": self.llm.dtype == torch.bfloat16,
                "quantization": quantization_of(self.llm),
                "template": self.prompt.template,
                "precision": name_precision(self.llm),
                "sizes": layer_sizes(self.llm),
                "norms_hash": self.norms_hash},
            "prompt": self.prompt.template_parts,
            "embedder": self.origin.model_dump(exclude_none=True),
            "trained_for": self.trained_for,
            **metadata}
        # One entry: safetensors keeps no order of several.
        data = safetensors.torch.save(tensors, {"elm": json.dumps(header)})
        write_bytes(path, data)

    # Modes and devices

    def train(self, mode: bool = True) -> ELM:
        super().train(mode)
        self.llm.eval()  # frozen: it never drops out
        return self

    @property
    def device(self) -> torch.device:
        return self.adapter.scale.device

    # Losses

    def forward(self, embeddings: Tensor) -> Tensor:
        """[n, E] -> soft tokens [n, K, D] fp32."""
        return self.adapter(embeddings.to(self.device, non_blocking=True))

    def forward_hidden(self, batch: Batch, soft_tokens: Tensor | None = None) -> Tensor:
        """A batch on this device, and soft tokens [n, K, D] if it has places for them -> the LLM's
        last hidden states [T, D]."""
        with torch.no_grad():
            embeds = self.llm.get_input_embeddings()(batch.input_ids)
        if soft_tokens is not None:
            # Out of place, so that the gradient reaches the soft tokens.
            flat = soft_tokens.flatten(0, 1).to(embeds.dtype)
            embeds = embeds.index_copy(0, batch.placeholder_positions, flat)
        num_padded = count_padding(embeds)
        if num_padded == 0:
            return self._run_backbone(
                embeds, batch.position_ids, batch.lengths, batch.cu_seqlens)
        # The padding is an example of its own, which no other sees.
        padded = pad_rows(embeds, num_padded)
        position_ids = F.pad(batch.position_ids, (0, num_padded))
        cu_seqlens = F.pad(batch.cu_seqlens, (0, 1), value=len(padded))
        hidden = self._run_backbone(
            padded, position_ids, [*batch.lengths, num_padded], cu_seqlens)
        return hidden[:-num_padded]

    def _run_backbone(self, embeds: Tensor, position_ids: Tensor, lengths: list[int],
                      cu_seqlens: Tensor) -> Tensor:
        """A packed row of token embeddings [T, D] -> the LLM's last hidden states [T, D]."""
        with packed_attention_enabled(self.llm):
            out = self.llm.base_model(
                inputs_embeds=embeds[None], position_ids=position_ids[None],
                lengths=lengths, cu_seqlens=cu_seqlens,
                use_cache=False)  # a cache would disable transformers' detection of packed rows
        return out.last_hidden_state.squeeze(0)  # not [0]: its backward pass would fill zeros

    def lm_head(self, hidden: Tensor) -> Tensor:
        """[R, D] -> logits [R, V], with the caps and scales that this LLM has."""
        num_padded = count_padding(hidden)
        if num_padded == 0:
            return self._run_head(hidden)
        return self._run_head(pad_rows(hidden, num_padded))[:-num_padded]

    def _run_head(self, hidden: Tensor) -> Tensor:
        """[R, D] -> logits [R, V], by the LLM's own forward pass, in which `hidden` stands in for
        the backbone's output: some LLMs (Cohere, Granite, Gemma) scale or cap their logits there,
        each in its own way, and transformers has no method for the head alone."""

        def forward(*_: Any, **__: Any) -> BackboneOutput:
            return BackboneOutput(hidden[None])

        with llm_lock(self.llm), forward_replaced(self.llm.base_model, forward):
            out = self.llm(inputs_embeds=hidden[None], use_cache=False)
        return out.logits.squeeze(0)  # not [0]: its backward pass would fill zeros

    def sequence_nll(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states of forward_hidden -> the summed token cross-entropy of each response [n]
        fp32."""
        hidden = hidden.index_select(0, batch.label_positions - 1)
        vocab_size = self.llm.config.get_text_config().vocab_size
        num_chunks = math.ceil(len(hidden) * vocab_size / logits_at_once(self.llm))
        if self.lockstep:  # ZeRO 3 gathers the head for each chunk: equally often on every process
            most = torch.tensor(num_chunks)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            num_chunks = int(most)
        losses = ChunkedCrossEntropy.apply(hidden, batch.labels, self.lm_head, num_chunks)
        return torch.stack([x.sum() for x in losses.split(batch.num_labels)])

    def nll(self, batch: Batch) -> Tensor:
        """A batch of collate -> the summed token cross-entropy of each response [n] fp32; by its
        embeddings, if it has them."""
        batch = batch.to(self.device)
        soft_tokens = None if batch.embeddings is None else self(batch.embeddings)
        return self.sequence_nll(self.forward_hidden(batch, soft_tokens), batch)

    def loss(self, embeddings: Vectors, queries: str | list[str], responses: str | list[str],
             max_tokens: int = 2048) -> Tensor:
        """Mean cross-entropy over all response tokens: a scalar with its graph, from one packed
        pass. Vectors [n, E], see as_tensor; n queries or one; n responses or one. Raises:
        UserError."""
        vectors = check_vectors(embeddings, self.adapter)
        queries = repeat_per_vector(queries, len(vectors))
        responses = repeat_per_vector(responses, len(vectors))
        rows = [Row.model_construct(query=query, response=response)
                for query, response in zip(queries, responses, strict=True)]
        names = [f"pair {i}" for i in range(len(rows))]
        limit = min(max_tokens, max_positions(self.llm))
        encoder = Encoder(self.prompt, self.adapter.tokens, limit, "max_tokens")
        batch = collate(encoder.encode(rows, names), vectors)
        return self.nll(batch).sum() / len(batch.labels)

    # Answers

    def prompt_embeds(self, embeddings: Vectors, query: str | list[str]) -> Tensor | list[Tensor]:
        """[E] and a query -> [T, D] in the LLM's dtype, the prompt with the vector in its place;
        [n, E] and one query or n -> a list of n. Raises: UserError."""
        given = as_tensor(embeddings)
        vectors = check_vectors(given, self.adapter)
        prompts = self._prompt_embeds(vectors, repeat_per_vector(query, len(vectors)))
        return prompts[0] if given.ndim == 1 else prompts

    def generate(self, embeddings: Vectors, query: str | list[str], max_new_tokens: int = 256,
                 batch_size: int | None = None, **options: Any) -> list[str]:
        """[n, E] or [E], see as_tensor, and one query or n -> n answers, batch_size at once or as
        many as GENERATION_BATCH says; greedy, unless `options` of the LLM's own `generate` say
        otherwise, see choose_sampling. Raises: UserError."""
        vectors = check_vectors(embeddings, self.adapter)
        queries = repeat_per_vector(query, len(vectors))
        size = batch_size or GENERATION_BATCH[self.device.type]
        answers = []
        for start in range(0, len(vectors), size):
            part = slice(start, start + size)
            answers += self.answer_batch(vectors[part], queries[part], max_new_tokens, **options)
        return answers

    @torch.no_grad()
    def answer_batch(self, vectors: Tensor, queries: list[str], max_new_tokens: int,
                     **options: Any) -> list[str]:
        """n vectors [n, E] that are checked already, and n queries -> n answers."""
        prompts = self._prompt_embeds(vectors, queries)
        answers = generate_batch(self.llm, self.prompt, prompts, max_new_tokens,
                                 synced_gpus=self.lockstep, **options)
        return [answer.text for answer in answers]

    @torch.no_grad()
    def _prompt_embeds(self, vectors: Tensor, queries: list[str]) -> list[Tensor]:
        embed = self.llm.get_input_embeddings()
        soft_tokens = self.adapter(vectors.to(self.device), drops_out=False)

        def embed_ids(ids: list[int]) -> Tensor:
            return embed(torch.tensor(ids, dtype=torch.long, device=self.device))

        prompts = []
        for soft, query in zip(soft_tokens, queries, strict=True):
            before, after = self.prompt.encode(list(self.prompt.split_query(query)))
            embeds_before = embed_ids(self.prompt.prefix_ids + before)
            embeds_after = embed_ids(after + self.prompt.suffix_ids)
            soft = soft.to(embeds_before.dtype)
            prompts.append(torch.cat([embeds_before, soft, embeds_after]))
        return prompts


def check_is_of_no_run(path: Path) -> None:
    """Raises: UserError if the path is an adapter that a run has left."""
    is_named_so = path.name == "adapter_best.safetensors" or step_of_file(path) is not None
    if is_named_so and path.exists() and (path.parent / "metrics.jsonl").exists():
        raise UserError(f"{path}: is an adapter of a run; choose another name")


def repeat_per_vector(texts: str | list[str], n: int) -> list[str]:
    """n texts, of one or n. Raises: UserError."""
    if isinstance(texts, str):
        return [texts] * n
    are_texts = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
    if not are_texts:
        raise UserError(f"{clip(repr(texts), 60)}: not a text, nor a list of {n} texts")
    if len(texts) != n:
        raise UserError(f"{len(texts)} queries or responses for {n} vectors")
    return texts


# Twins: what an adapter was trained for are the weights of one LLM. It also reads those of a twin,
# the same LLM in other numbers, as 4 bits or a GGUF file, or one that was trained further: its
# token embeddings have nearly the same directions.

TOKEN_EMBEDDINGS = "token_embeddings"  # the name of sample_token_embeddings in an adapter's file
NUM_TOKENS_COMPARED = 64
LEAST_MEDIAN_COSINE = 0.98  # of a twin's token embeddings with those of training
LEAST_COSINE = 0.9  # of each


def layer_sizes(llm: PreTrainedModel) -> Json:
    """Kind and sizes of its layers, by the names of transformers' configs. Without the vocabulary,
    which may be padded."""
    config = llm.config.get_text_config()
    names = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size",
             "num_attention_heads", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name, None) for name in names}


@torch.no_grad()
def sample_token_embeddings(llm: PreTrainedModel, prompt: Prompt) -> Tensor:
    """Those of NUM_TOKENS_COMPARED tokens of PROBE_TEXT [n, D] fp16, on the CPU. One tokenizer
    always names the same tokens. Under ZeRO 3 all processes take part."""
    ids = prompt.probe_ids()
    chosen = ids[torch.linspace(0, len(ids) - 1, NUM_TOKENS_COMPARED).long()]
    embed = llm.get_input_embeddings()
    return embed(chosen.to(embed.weight.device)).to("cpu", torch.float16)


def read_token_embeddings(path: str | Path) -> Tensor | None:
    """Those of the LLM of training, from an adapter's file. None: of an early version of elm."""
    path = find_adapter(path)
    with user_error(f"{path}: not a whole elm adapter", OSError, SafetensorError), \
            safe_open(path, framework="pt") as f:
        if TOKEN_EMBEDDINGS not in f.keys():  # noqa: SIM118
            return None
        token_embeddings = f.get_tensor(TOKEN_EMBEDDINGS)
        if token_embeddings.ndim != 2 or not token_embeddings.any():
            raise UserError(f"{path}: not a whole elm adapter: its {TOKEN_EMBEDDINGS} are damaged")
        return token_embeddings


def find_difference(trained: TrainedLLM, token_embeddings: Tensor | None, elm: ELM) -> str | None:
    """In what an LLM of other weights differs from the LLM of training. None: in nothing that
    counts, so it is a twin."""
    if token_embeddings is None or not trained.sizes:
        return "the adapter is of an early version of elm, whose files do not tell a twin"
    if trained.trained_for.get(TOKENIZER_HASH) != elm.trained_for[TOKENIZER_HASH]:
        return "its tokenizer gives other ids"
    for name, size in layer_sizes(elm.llm).items():
        if trained.sizes.get(name) != size:
            return f"its {name} is {size}, not {trained.sizes.get(name)}"
    if token_embeddings.shape != elm.token_embeddings.shape:
        here = list(elm.token_embeddings.shape)
        return f"its token embeddings are {here}, not {list(token_embeddings.shape)}"
    is_used = token_embeddings.any(1)  # a padding token's may be 0
    cosines = F.cosine_similarity(
        token_embeddings[is_used].float(), elm.token_embeddings[is_used].float())
    # False of NaN, too
    is_near = cosines.median() >= LEAST_MEDIAN_COSINE and cosines.min() >= LEAST_COSINE
    if not is_near:
        return (f"its token embeddings differ from those of training (cosine "
                f"{cosines.median():.3f} in the median, {cosines.min():.3f} at least)")
    return None


def check_is_llm_of_training(trained: TrainedLLM, elm: ELM, path: str | Path) -> None:
    """Let the LLM of training pass, and a twin of it with a line that says so. Raises: UserError at
    another LLM."""
    name = elm.llm.name_or_path
    where = f"{path}: {name}"
    hash_in_training = trained.trained_for.get(WEIGHTS_HASH)
    own_hash = elm.trained_for[WEIGHTS_HASH]
    if own_hash == hash_in_training:
        check_trained_for(trained.trained_for, elm.trained_for, where)
        return
    difference = find_difference(trained, read_token_embeddings(path), elm)
    if difference is not None:
        raise UserError(f"{where}: {WEIGHTS_HASH} was {hash_in_training} in training and is "
                        f"{own_hash} here, and it is no twin: {difference}; give it what it was "
                        "trained with")
    others = {key: value for key, value in elm.trained_for.items() if key != WEIGHTS_HASH}
    check_trained_for(trained.trained_for, others, where)
    # Most methods of quantisation and padding leave the norms as they are; so do LoRA and the like.
    # AWQ scales them.
    kind = "a copy in other numbers, or one whose matrices alone were trained further"
    if elm.norms_hash != trained.norms_hash:
        kind = "one that was trained further, or a copy whose norms were scaled, as by AWQ"
    log.warning(f"{path}: trained for {trained.name} ({trained.precision}); {name} "
                f"({name_precision(elm.llm)}) is a twin of it, with the same tokenizer, sizes and "
                f"token embeddings and other weights ({kind}); the adapter's figures are of the "
                "LLM of training")


# The check of an LLM

LENGTHS_CHECKED = (20, 26)  # of the prompts of check_attention, in tokens
MAX_LENGTH_CHECKED = 8192  # of the row of check_long_row, on which the LLM may need O(T²) memory
# What configs call the numbers of tokens beyond which an LLM reads in another way.
LENGTHS_IN_CONFIG = ("sliding_window", "attention_window_size", "attention_chunk_size",
                     "window_size", "original_max_position_embeddings")


@torch.no_grad()
def check_llm(elm: ELM, max_tokens: int = 0, key: str = "model.llm") -> None:
    """Try the LLM on short prompts and, where it reads rows of max_tokens in another way, on a long
    one. `key` names it in messages. Raises: UserError if it cannot read max_tokens, cannot run on
    packed rows or embeddings, or lets tokens interact other than by causal attention within an
    example."""
    limit = max_positions(elm.llm)
    if max_tokens > limit:
        reason = ""
        if longrope_length(elm.llm):
            reason = (": with longer rows its LongRoPE changes short ones, too; "
                      f"data.max_seq_length = {limit}")
        raise UserError(f"data.max_seq_length = {max_tokens}: the LLM reads {limit}{reason}")
    name = f"{type(elm.llm).__name__} ({elm.llm.name_or_path}, {name_precision(elm.llm)})"
    message = f"{key}: {name} cannot be used, as rows are packed and prompts are embeddings"
    # ValueError is of our checks. The others are what an LLM's code raises that cannot take packed
    # rows or embeddings (MPT AttributeError, Gemma 4 RuntimeError).
    foreign = (TypeError, AttributeError, RuntimeError, NotImplementedError)
    try:
        if elm.llm.base_model is elm.llm:
            raise ValueError("it has no backbone that gives hidden states (Llama 4)")
        ids = elm.prompt.probe_ids()
        check_attention(elm, ids)
        exceeded = [n for n in lengths_of_change(elm.llm) if n < max_tokens]
        if exceeded:
            longest = max(MAX_LENGTH_CHECKED, max(exceeded) + 1024)
            check_long_row(elm, ids, min(max_tokens, longest))
        embed = elm.llm.get_input_embeddings()
        prompt = 1.5 * embed(ids[:20].to(elm.device))  # like soft tokens, it is not in the table
        generate_batch(elm.llm, elm.prompt, [prompt], max_new_tokens=1)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{message}: {e}") from e
    except foreign as e:
        if isinstance(e, torch.OutOfMemoryError) or is_raised_here(e):
            raise
        raise UserError(f"{message}: {clip(str(e) or repr(e), 300)}") from e


def lengths_of_change(llm: PreTrainedModel) -> list[int]:
    """The numbers of tokens, as its config names them, beyond which the LLM may read in another
    way: sliding windows, chunks, the length before its positions were extended."""
    tables = [llm.config.get_text_config().to_dict()]
    lengths = []
    while tables:
        table = tables.pop()
        for key, value in table.items():
            if isinstance(value, dict):
                tables.append(value)
            elif key in LENGTHS_IN_CONFIG and isinstance(value, int):
                lengths.append(value)
    return lengths


def is_raised_here(error: BaseException) -> bool:
    """Whether a line of this file raised the error itself: then it is a bug of this file."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename == is_raised_here.__code__.co_filename


def tolerance_between_kernels(llm: PreTrainedModel) -> float:
    """Relative to a loss, or to 1 nat a token. Two bf16 kernels differ by up to 2e-2; by more where
    layers round their inputs to 8 bits: by 0.19 nats a token in SmolLM2 in int8, whose losses of
    such prompts are about 4."""
    if llm.dtype.itemsize > 2:
        return 1e-4
    rounds_inputs = is_quantized(llm) and name_precision(llm) != "nf4"
    return 1e-1 if rounds_inputs else 2e-2


def check_attention(elm: ELM, ids: Tensor) -> None:
    """Compare the losses of two prompts of `ids`, packed and alone by the LLM's own attention, each
    with its last input token as it is and exchanged for another. Raises: ValueError."""
    between_kernels = tolerance_between_kernels(elm.llm)
    # One kernel on the same shapes differs by less, as kernels of MoE layers sum in varying order.
    within_kernel = 0.05 * between_kernels
    num_unlabelled = 4  # tokens at a prompt's beginning without a loss
    examples = []
    prompts = []
    prompts_exchanged = []
    start = 0
    for length in LENGTHS_CHECKED:
        prompt = ids[torch.arange(start, start + length) % len(ids)]
        exchanged = prompt.clone()
        exchanged[-1] = prompt[-2]
        prompts.append(prompt)
        prompts_exchanged.append(exchanged)
        examples.append(Example(prompt.numpy(), length - num_unlabelled, truncated=False))
        start += length

    batch = collate(examples)
    batch_exchanged = dataclasses.replace(batch, input_ids=torch.cat(prompts_exchanged))
    packed = elm.nll(batch).tolist()
    packed_exchanged = elm.nll(batch_exchanged).tolist()
    for i, prompt in enumerate(prompts):
        labels = prompt[num_unlabelled:]
        alone = nll_alone(elm, prompt, labels)
        alone_exchanged = nll_alone(elm, prompts_exchanged[i], labels)
        check_causal(packed[i], packed_exchanged[i], within_kernel)
        check_causal(alone, alone_exchanged, within_kernel)
        check_packed_equals_alone(packed[i], alone, between_kernels, len(labels))


def check_long_row(elm: ELM, ids: Tensor, length: int) -> None:
    """Compare the losses of a row of `length` of the `ids` and of a short one, packed and alone:
    sliding windows and positions that change with the length show in long rows only. Raises:
    ValueError."""
    generator = torch.Generator().manual_seed(0)
    long_row = ids[torch.randint(len(ids), (length,), generator=generator)]
    # It ends as it begins: an LLM that sees the beginning can predict the end.
    num_repeated = min(32, length // 2)
    long_row[-num_repeated:] = long_row[:num_repeated]
    rows = [ids[torch.arange(LENGTHS_CHECKED[0]) % len(ids)], long_row]
    num_labels = num_repeated // 2
    examples = [Example(row.numpy(), num_labels, truncated=False) for row in rows]
    packed = elm.nll(collate(examples)).tolist()
    for i, row in enumerate(rows):
        alone = nll_alone(elm, row, row[-num_labels:])
        tolerance = tolerance_between_kernels(elm.llm)
        check_packed_equals_alone(packed[i], alone, tolerance, num_labels)


GRADIENT_STEPS = (0.1, 0.03, 0.01)  # tried by check_gradient; relative to the embeddings' norm
MAX_SLOPE_RATIO = 4  # of the loss along a step to the gradient, either way


@contextlib.contextmanager
def modules_without_backward(llm: PreTrainedModel) -> Iterator[list[str]]:
    """The names of modules with weights that, in passes inside, take an input with a gradient and
    give an output without one. Only of those that are called with tensors by position and return
    one, as linear layers are."""
    name_of = {module: name for name, module in llm.named_modules()}
    names = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return
        has_gradient = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if has_gradient and not output.requires_grad:
            names.append(name_of[module])

    handles = []
    for module in llm.modules():
        if next(module.parameters(), None) is not None or packed_buffers(module):
            handles.append(module.register_forward_hook(note))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def check_gradient(elm: ELM, key: str = "model.llm") -> None:
    """Of a quantised LLM: whether the loss has a gradient at the input embeddings, which all
    training goes by. Kernels for serving may have no backward pass: autograd raises an error, or
    leaves their layers out. `key` names the LLM in messages. Raises: UserError if a layer is left
    out, if the gradient is zero or not finite, or if no small step against it lowers the loss by
    about as much as it says."""
    if not is_quantized(elm.llm):
        return
    ids = elm.prompt.probe_ids()[:LENGTHS_CHECKED[0]]
    num_soft = len(ids) // 4
    # As in a prompt, no label follows a soft token at once: the loss depends on them through the
    # layers alone, not by the residual stream.
    num_labels = len(ids) - 2 * num_soft
    input_ids = ids.numpy().copy()
    input_ids[:num_soft] = SOFT_TOKEN
    batch = collate([Example(input_ids, num_labels, truncated=False)]).to(elm.device)
    embed = elm.llm.get_input_embeddings()
    with torch.no_grad():
        soft_tokens = embed(ids[:num_soft].to(elm.device)).float()[None]

    def loss_at(soft_tokens: Tensor) -> Tensor:
        return elm.sequence_nll(elm.forward_hidden(batch, soft_tokens), batch).sum()

    soft_tokens.requires_grad_()
    name = f"{elm.llm.name_or_path} ({name_precision(elm.llm)})"
    message = f"{key}: {name}: an adapter cannot be trained through these weights: "
    advice = f"; through nf4 and int8 it can ({quantization_key(key)}), and through a GGUF file"
    try:
        with modules_without_backward(elm.llm) as without_backward:
            loss = loss_at(soft_tokens)
        if without_backward:
            raise UserError(f"{message}{without_backward[0]} has no backward pass{advice}")
        (gradient,) = torch.autograd.grad(loss, soft_tokens)
    except (RuntimeError, NotImplementedError) as e:
        if isinstance(e, torch.OutOfMemoryError) or is_raised_here(e):
            raise
        raise UserError(f"{message}{clip(str(e) or repr(e), 300)}{advice}") from e
    norm = gradient.norm().item()
    if not 0 < norm < math.inf:  # false of NaN, too
        raise UserError(f"{message}the gradient at its input has the norm {norm}{advice}")
    for size in GRADIENT_STEPS:
        length = size * soft_tokens.norm().item()
        with torch.no_grad():
            lowered = loss.item() - loss_at(soft_tokens - length / norm * gradient).item()
        slope_ratio = lowered / (length * norm)
        if 1 / MAX_SLOPE_RATIO < slope_ratio < MAX_SLOPE_RATIO:
            return
    raise UserError(f"{message}the gradient at its input is not that of the loss{advice}")


def nll_alone(elm: ELM, input_ids: Tensor, labels: Tensor) -> float:
    """The summed cross-entropy of labels [l], the last of the tokens [t], by the LLM as it is."""
    out = elm.llm(input_ids=input_ids[None].to(elm.device), use_cache=False,
                  logits_to_keep=len(labels) + 1)
    logits = out.logits[0, -len(labels) - 1 : -1].float().cpu()
    return F.cross_entropy(logits, labels, reduction="sum").item()


def check_causal(nll: float, nll_exchanged: float, tolerance: float) -> None:
    """No label comes after the last input token: a loss that changes with it comes from tokens that
    see later ones. Raises: ValueError."""
    if not math.isclose(nll, nll_exchanged, rel_tol=tolerance):
        raise ValueError(f"its attention is more than causal ({nll}, not {nll_exchanged})")


def check_packed_equals_alone(packed: float, alone: float, tolerance: float,
                              num_labels: int) -> None:
    """Raises: ValueError if examples of a packed row see each other, or attention differs from the
    LLM's own in another way."""
    if not math.isclose(packed, alone, rel_tol=tolerance, abs_tol=tolerance * num_labels):
        raise ValueError(f"packed rows have other losses than single ones ({packed}, not {alone})")


# -----------------------------------------------------------------------------
# Losses
#
# loss = (summed cross-entropy of all response tokens) / (number of these tokens)
#        + drift_weight * (summed drift of all rows) / (number of rows),
# each sum and number over all micro-batches and processes of the step: never a mean of means.

# Logits that exist at once in the cross-entropy, at most.
MAX_LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}
BYTES_OF_A_LOGIT = 10  # itself in bf16, its copy and its log-probability in fp32


def logits_at_once(llm: PreTrainedModel) -> float:
    """In an eighth of what the weights leave of a GPU's memory; a quarter of the most at least, as
    weights that are kept on the CPU leave more than they seem to."""
    most = MAX_LOGITS_AT_ONCE[llm.device.type]
    by_memory = memory_beside_weights(llm) / 8 / BYTES_OF_A_LOGIT
    return min(most, max(most / 4, by_memory))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy [R] fp32 of head(hidden) [R, V] at labels [R], hidden [R, D], in num_chunks
    parts. Each part's gradient is computed in the forward pass, so that only one part's logits ever
    exist."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor],
                num_chunks: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        losses = []
        gradients = []
        hidden_chunks = hidden.tensor_split(num_chunks)
        label_chunks = labels[:, None].tensor_split(num_chunks)
        for h, y in zip(hidden_chunks, label_chunks, strict=True):
            with torch.set_grad_enabled(needs_gradient):
                h = h.detach().requires_grad_(needs_gradient)
                logits = head(h)
            log_probs = logits.detach().float().log_softmax(-1)
            losses.append(-log_probs.gather(1, y)[:, 0])
            if needs_gradient:
                # d loss / d logits = probabilities - onehot(label); it overwrites log_probs
                at_logits = log_probs.exp_()
                at_logits.scatter_add_(1, y, at_logits.new_full(y.shape, -1.0))
                gradients += torch.autograd.grad(logits, h, at_logits.to(logits.dtype))
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # The loss of a row depends on its hidden state alone.
        (at_hidden,) = ctx.saved_tensors
        return (gradient[:, None] * at_hidden).to(at_hidden.dtype), None, None, None


class Probe(NamedTuple):
    """A linear map from the LLM's mean hidden state over a response to the standardised embedding:
    the space in which the drift loss compares the two. See fit_probe."""

    matrix: Tensor  # [D, E]
    hidden_mean: Tensor  # [D]
    embedding_mean: Tensor  # [E]

    def cosine(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """The cosine between projected hidden states [n, D] and standardised embeddings [n, E]:
        [n]."""
        projected = (hidden - self.hidden_mean) @ self.matrix
        return F.cosine_similarity(projected, embeddings - self.embedding_mean, dim=1)


def response_hidden(hidden: Tensor, batch: Batch) -> Tensor:
    """The mean of hidden states [T, D] over the response tokens of each example: [n, D] fp32."""
    states = hidden.index_select(0, batch.label_positions).float()
    return torch.stack([x.mean(0) for x in states.split(batch.num_labels)])


def drift_loss(probe: Probe, target: float, adapter: Adapter, hidden: Tensor,
               batch: Batch) -> Tensor:
    """max(0, target - cosine) of each response's projected hidden state and its embedding: [n]."""
    embeddings = adapter.standardize(batch.embeddings)
    return F.relu(target - probe.cosine(response_hidden(hidden, batch), embeddings))


class LossSums(NamedTuple):
    """Losses summed over examples, fp64 scalars."""

    nll: Tensor
    drift: Tensor


def soft_gradient(elm: ELM, soft_tokens: Tensor, step: Step, cfg: LossConfig,
                  probe: Probe | None) -> tuple[LossSums, Tensor]:
    """The loss sums over this process's examples, and the gradient of the step's loss at their soft
    tokens [n, K, D]: all that the adapter needs of the frozen LLM.

    Without a probe there is no drift. Nothing in here waits for the device.
    """
    nll_sum = soft_tokens.new_zeros((), dtype=torch.float64)
    drift_sum = torch.zeros_like(nll_sum)
    # The sums are of this process's examples, num_labels and num_rows of all processes'.
    num_rows = len(step.rows.row_ids)
    gradients = []
    parts = soft_tokens.detach().split([len(batch.lengths) for batch in step.batches])
    for batch, part in zip(step.batches, parts, strict=True):
        batch = batch.to(elm.device)
        hidden = elm.forward_hidden(batch, part.requires_grad_())
        nll = elm.sequence_nll(hidden, batch).sum() * batch.weight
        nll_sum += nll.detach()
        loss = nll / step.num_labels
        if probe is not None:
            drift = drift_loss(probe, cfg.drift_target, elm.adapter, hidden, batch)
            drift = drift.sum() * batch.weight
            drift_sum += drift.detach()
            loss = loss + cfg.drift_weight * drift / num_rows
        gradients += torch.autograd.grad(loss, part)
    return LossSums(nll_sum, drift_sum), torch.cat(gradients)


# -----------------------------------------------------------------------------
# Closed-form fits
#
# Ridge regressions, fitted once before the first step: the drift loss's probe, and the warm start
# of the adapter's last layer.

RIDGES = (0.1, 0.01, 1.0, 10.0)  # times the mean diagonal; of equally good ones the first is taken
MAX_PROBE_ROWS = 8192
MAX_WARM_START_VECTORS = 32768
ROWS_OF_CHUNK = 4096  # of a regression that are on the device at once
LISTS_OF_CHUNK = 4096  # of words


class RidgeFit(NamedTuple):
    weights: Tensor  # [p, q]
    x_mean: Tensor  # [p]
    y_mean: Tensor  # [q]


def heldout_mask(indices: np.ndarray) -> Tensor:
    """[n] bool: every tenth of the indices, or the last of fewer than ten."""
    mask = indices % 10 == 9
    if not mask.any():
        mask = indices == indices.max()
    return torch.from_numpy(mask)


class FitChunk(NamedTuple):
    """n rows of a regression, on the device."""

    x: Tensor  # [n, p] fp32
    y: Tensor  # [n, q] fp32
    is_heldout: Tensor  # [n] bool


def ridge(load_chunks: Callable[[], Iterable[FitChunk]]) -> RidgeFit:
    """Ridge regression (Hoerl and Kennard, 1970) of y on x over the rows that are not held out,
    with the ridge of the least squared error on those that are. Chunks are loaded twice, so that
    neither x nor y need fit on the device. Summed in fp32 over a chunk, added up and solved in
    fp64."""
    x_sums = []
    y_sums = []
    counts = []
    for x, y, is_heldout in load_chunks():
        x_sums.append(x[~is_heldout].sum(0, dtype=torch.float64))
        y_sums.append(y[~is_heldout].sum(0, dtype=torch.float64))
        counts.append((~is_heldout).sum())
    num_rows = torch.stack(counts).sum()
    x_mean = (torch.stack(x_sums).sum(0) / num_rows).float()
    y_mean = (torch.stack(y_sums).sum(0) / num_rows).float()

    gram = x_mean.new_zeros(len(x_mean), len(x_mean), dtype=torch.float64)
    cross = x_mean.new_zeros(len(x_mean), len(y_mean), dtype=torch.float64)
    heldout_parts = []
    for x, y, is_heldout in load_chunks():
        a = x[~is_heldout] - x_mean
        b = y[~is_heldout] - y_mean
        gram += a.T @ a
        cross += a.T @ b
        heldout_parts.append((x[is_heldout] - x_mean, y[is_heldout] - y_mean))
    x_heldout = torch.cat([x for x, _ in heldout_parts])
    y_heldout = torch.cat([y for _, y in heldout_parts])
    del heldout_parts

    mean_diagonal = gram.diagonal().mean().clamp(min=1e-9)
    identity = torch.ones_like(gram.diagonal()).diag()
    best = None
    least_error = math.inf
    for value in RIDGES:
        factor = torch.linalg.cholesky(gram + value * mean_diagonal * identity)
        weights = torch.cholesky_solve(cross, factor).float()
        error = (y_heldout - x_heldout @ weights).square().sum().item()
        if best is None or error < least_error:
            best = weights
            least_error = error
    return RidgeFit(best, x_mean, y_mean)


@torch.no_grad()
def fit_probe(elm: ELM, split: Split) -> Probe:
    """Ridge regression from the LLM's mean hidden state over a response, which it reads alone, to
    the standardised embedding. Rows of every tenth source are held out. All processes take part,
    and get the same."""
    row_ids = np.random.default_rng(0).permutation(len(split))[:MAX_PROBE_ROWS]
    hidden = response_hidden_of_rows(elm, split, row_ids)
    vector_ids = split.index["vector_id"][row_ids]
    embeddings = elm.adapter.standardize(split.embeddings(vector_ids).to(elm.device))
    _, source_numbers = np.unique(split.index["source_id"][row_ids], return_inverse=True)
    heldout = heldout_mask(source_numbers).to(elm.device)
    chunks = [FitChunk(*parts) for parts in zip(
        hidden.split(ROWS_OF_CHUNK), embeddings.split(ROWS_OF_CHUNK), heldout.split(ROWS_OF_CHUNK),
        strict=True)]
    fit = ridge(lambda: chunks)
    probe = Probe(
        matrix=broadcast_from_rank0(fit.weights),
        hidden_mean=broadcast_from_rank0(fit.x_mean),
        embedding_mean=broadcast_from_rank0(fit.y_mean))
    cosine = probe.cosine(hidden[heldout], embeddings[heldout]).mean()
    log.info(f"drift probe of {int((~heldout).sum())} rows; cosine {cosine:.3f} on "
             f"{int(heldout.sum())} held-out ones")
    return probe


def response_hidden_of_rows(elm: ELM, split: Split, row_ids: np.ndarray) -> Tensor:
    """[n, D] fp32 of responses that are read alone. All processes take part, each with its share of
    micro-batches; where that is empty, it repeats an example, as ZeRO 3 needs equally many
    passes."""
    examples = split.examples(row_ids, "response")
    lengths = [len(example.ids) for example in examples]
    budget = MICRO_BATCH_TOKENS[elm.device.type]
    micro_batches = pack_micro_batches(lengths, world_size(), budget)
    width = elm.adapter.settings["d_llm"]
    hidden = torch.zeros(len(row_ids), width, device=elm.device, dtype=torch.float32)
    for members in micro_batches[rank() :: world_size()]:
        batch = collate([examples[i] for i in members or [0]]).to(elm.device)
        means = response_hidden(elm.forward_hidden(batch), batch)
        if members:
            hidden[members] = means
    return all_reduce_sum(hidden)


@torch.no_grad()
def warm_start(elm: ELM, split: Split) -> None:
    """Fit the last layer of a fresh adapter in closed form: soft token j comes near the mean of the
    LLM's own embeddings of the words in part j of the text. Where widths differ, the residual map
    is fitted first. Of each source its first vector counts; every tenth is held out. All processes
    take part, and get the same."""
    adapter = elm.adapter
    source_ids = np.random.default_rng(0).permutation(np.unique(split.index["source_id"]))
    source_ids = np.sort(source_ids[:MAX_WARM_START_VECTORS])
    words_of_parts = read_words(split, source_ids, adapter.tokens)
    # They and the vectors stay on the host: on a small card they would outgrow the training.
    targets = word_targets(words_of_parts, elm.llm.get_input_embeddings(), elm.device)
    targets = targets.unflatten(0, (len(source_ids), adapter.tokens))  # [n, K, D]
    targets -= targets.mean(0)
    targets /= targets.square().mean().sqrt().clamp(min=1e-9)

    embeddings = split.embeddings(source_ids)
    heldout = heldout_mask(np.arange(len(source_ids)))
    fit_adapter(adapter, embeddings, targets, heldout)
    for parameter in adapter.parameters():
        parameter.copy_(broadcast_from_rank0(parameter))
    outputs = adapter(embeddings[heldout].to(elm.device), drops_out=False)
    cosine = F.cosine_similarity(outputs, targets[heldout].to(elm.device), dim=-1).mean()
    log.info(f"warm start on {int((~heldout).sum())} vectors; cosine {cosine:.3f} with the targets "
             f"of {int(heldout.sum())} held-out ones")


def read_words(split: Split, source_ids: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """The token ids, each once, of each of the num_parts equal parts of each source's text; where
    none of its rows has a text, of all its responses. [n * num_parts] arrays."""
    own_rows = np.isin(split.index["source_id"], source_ids)
    text_of: dict[int, str] = {}
    rows_with_text = np.flatnonzero(own_rows & split.index["has_text"])
    with_text, first = np.unique(split.index["source_id"][rows_with_text], return_index=True)
    for source_id, row in zip(with_text, split.read(rows_with_text[first]), strict=True):
        text_of[source_id] = row.text
    rows_without = np.flatnonzero(own_rows & ~np.isin(split.index["source_id"], with_text))
    for i, row in zip(rows_without, split.read(rows_without), strict=True):
        source_id = split.index["source_id"][i]
        text_of[source_id] = text_of.get(source_id, "") + f"{row.response}\n"

    texts = [text_of[source_id] for source_id in source_ids]
    words = []
    for block in in_blocks(texts, 1024):
        for ids in split.encoder.prompt.encode(block):
            parts = np.array_split(np.array(ids, np.int64), num_parts)
            words += [np.unique(part) for part in parts]
    return words


def word_targets(words: list[np.ndarray], embed: nn.Module, device: torch.device) -> Tensor:
    """The mean of the LLM's embeddings of each list of words (token ids, each once), weighted by
    inverse document frequency (Sparck Jones, 1972): [number of lists, D] fp32 on the CPU; 0 for an
    empty list. The LLM's embeddings are on `device`."""
    distinct_ids, num_lists_with = np.unique(np.concatenate(words), return_counts=True)
    frequencies = torch.from_numpy(num_lists_with).float() / len(words)
    weight_of_id = -torch.log(frequencies)  # by place in distinct_ids
    targets = []
    for lists in in_blocks(words, LISTS_OF_CHUNK):
        # [[7, 9], [7]] has three entries: word_of_entry is [0, 1, 0], counted among the distinct
        # words [7, 9] of this chunk, and list_of_entry is [0, 0, 1].
        lengths = [len(part) for part in lists]
        entries = np.concatenate(lists)
        ids, word_of_entry = np.unique(entries, return_inverse=True)
        word_of_entry = torch.from_numpy(word_of_entry).to(device)
        list_of_entry = torch.from_numpy(np.repeat(np.arange(len(lists)), lengths)).to(device)
        embedding_table = embed(torch.from_numpy(ids).to(device)).float()
        weights = weight_of_id[np.searchsorted(distinct_ids, entries)].to(device)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).to(device)
        sums = F.embedding_bag(
            word_of_entry, embedding_table, starts, mode="sum", per_sample_weights=weights)
        total_weights = weights.new_zeros(len(lists)).index_add(0, list_of_entry, weights)
        targets.append((sums / total_weights[:, None].clamp(min=1e-6)).cpu())
    return torch.cat(targets)


def fit_adapter(adapter: Adapter, embeddings: Tensor, targets: Tensor, heldout: Tensor) -> None:
    """Set the residual map, where there is one, and the last layer, so that the adapter's outputs
    before the norm come near `targets` [n, K, D]. All three are on the CPU; the adapter's device
    gets a chunk of them at a time."""
    device = adapter.scale.device
    scale = adapter.residual_scale

    def load_chunks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The standardised embeddings, their targets, and which are held out."""
        parts = zip(embeddings.split(ROWS_OF_CHUNK), targets.split(ROWS_OF_CHUNK),
                    heldout.split(ROWS_OF_CHUNK), strict=True)
        for part, targets_of_part, is_heldout in parts:
            x = adapter.standardize(part.to(device))
            yield x, targets_of_part.to(device), is_heldout.to(device)

    def load_for_residual() -> Iterator[FitChunk]:
        for x, targets_of_part, is_heldout in load_chunks():
            yield FitChunk(x, targets_of_part.mean(1), is_heldout)

    def load_for_last_layer() -> Iterator[FitChunk]:
        for x, targets_of_part, is_heldout in load_chunks():
            remainder = targets_of_part - scale * adapter.residual(x)[:, None]
            yield FitChunk(F.gelu(adapter.fc1(x)), remainder.flatten(1), is_heldout)

    if scale and isinstance(adapter.residual, nn.Linear):
        fit = ridge(load_for_residual)
        adapter.residual.weight.copy_(fit.weights.T / scale)
    fit = ridge(load_for_last_layer)
    adapter.fc2.weight.copy_(fit.weights.T)
    adapter.fc2.bias.copy_(fit.y_mean - fit.x_mean @ fit.weights)


# -----------------------------------------------------------------------------
# Checkpoint
#
# One portable file with the whole state of a run, for any number of processes.


@dataclass
class TrainState:
    """Everything a resume needs besides adapter and optimizer."""

    step: int = 0  # updates done
    epoch: int = 0
    position: int = 0  # rows of the epoch that are done
    last_validated_step: int = -1
    best_loss: float = math.inf  # the lowest validation loss, of best_adapter
    best_step: int = 0
    best_adapter: dict[str, Tensor] | None = None
    evals_since_best: int = 0
    # Since the last logged step: sums over rows, response tokens and losses.
    num_rows: int = 0
    num_labels: int = 0
    nll_sum: float = 0.0
    drift_sum: float = 0.0
    wandb_id: str | None = None

    def has_ended(self, total_steps: int, patience: int | None) -> bool:
        out_of_patience = patience is not None and self.evals_since_best >= patience
        return self.step >= total_steps or out_of_patience

    def record_validation(self, loss: float, adapter: Adapter) -> bool:
        """Take note of a validation. Returns whether its loss is the lowest so far."""
        self.last_validated_step = self.step
        self.evals_since_best += 1
        is_first = self.best_adapter is None or math.isnan(self.best_loss)
        is_best = is_first or loss < self.best_loss
        if is_best:
            self.best_loss = loss
            self.best_step = self.step
            self.best_adapter = {k: v.cpu().clone() for k, v in adapter.state_dict().items()}
            self.evals_since_best = 0
        return is_best

    def advance(self, step: Step, nll_sum: float, drift_sum: float) -> None:
        """Take note of an update."""
        self.step += 1
        self.epoch = step.rows.epoch
        self.position = step.rows.position
        self.num_rows += len(step.rows.row_ids)
        self.num_labels += step.num_labels
        self.nll_sum += nll_sum
        self.drift_sum += drift_sum

    def forget_sums(self) -> None:
        self.num_rows = 0
        self.num_labels = 0
        self.nll_sum = 0.0
        self.drift_sum = 0.0


@dataclass
class Checkpoint:
    state: TrainState
    adapter: dict[str, Tensor]
    optimizer: Json
    probe: dict[str, Tensor] | None  # of the drift loss
    trained_for: Json  # see ELM
    config: Json
    prompt: dict[str, str]  # see render_prompt
    rows_hashes: dict[str, str]  # by split, see rows_hash


def save_checkpoint(checkpoint: Checkpoint, paths: list[Path]) -> None:
    """Write a checkpoint, a file of torch.save, to each path. Raises: UserError if it cannot be
    written."""
    plain = vars(checkpoint) | {"state": vars(checkpoint.state)}  # builtin types and tensors alone
    content = io.BytesIO()
    torch.save(plain, content)
    for path in paths:
        write_bytes(path, content.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Runs no code from the file. Raises: UserError if it is not a whole checkpoint."""
    from pickle import UnpicklingError

    check_is_checkpoint(path)
    message = f"train.resume: {path}: no whole checkpoint"
    exception_types = (OSError, zipfile.BadZipFile, UnpicklingError, RuntimeError, ValueError,
                       LookupError, TypeError, AttributeError, EOFError, NotImplementedError)
    with user_error(message, *exception_types):  # only zipfile and torch.load run in here
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # by CRC-32, which torch.load does not verify
        saved = None
        if damaged is None:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    if damaged is not None:
        raise UserError(f"{message}: the checksum of {damaged} differs")
    if not has_fields_of(saved, Checkpoint) or not has_fields_of(saved["state"], TrainState):
        raise UserError(f"{message}: it lacks fields, or is of another version")
    return Checkpoint(**saved | {"state": TrainState(**saved["state"])})


def check_is_checkpoint(path: Path) -> None:
    """Raises: UserError that says what to give, if the path is absent, a folder or an adapter."""
    key = "train.resume"
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; give a checkpoint_step_N.pt, or "
                        f"train.resume=auto with output.dir={path}")
    if path.suffix == ".safetensors":
        raise UserError(f"{key}: {path} is an adapter; a run goes on from a checkpoint_step_N.pt")
    if not path.exists():
        raise UserError(f"{key}: no whole checkpoint: {absent(path)}"
                        f"{did_you_mean(str(path), ['auto'])}")


def has_fields_of(saved: object, dataclass_type: type) -> bool:
    """Whether a value is a dict of the dataclass's fields."""
    names = {item.name for item in dataclasses.fields(dataclass_type)}
    return isinstance(saved, dict) and set(saved) == names


def step_of_file(path: Path) -> int | None:
    """N of checkpoint_step_N.pt and adapter_step_N.safetensors, None of another name."""
    match = re.fullmatch(r"(?:checkpoint|adapter)_step_(\d+)\.(?:pt|safetensors)", path.name)
    return int(match[1]) if match else None


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the most steps; None if there are none. Raises: UserError if none of
    them is whole."""
    numbered = [p for p in folder.glob("checkpoint_step_*.pt") if step_of_file(p) is not None]
    numbered.sort(key=step_of_file, reverse=True)
    # The final checkpoint is that of the last step under a second name.
    paths = numbered + list(folder.glob("checkpoint_final.pt"))
    for path in paths:
        try:
            load_checkpoint(path)
        except UserError as e:
            log.info(f"skipped a damaged checkpoint: {e}")
        else:
            return path
    if paths:
        raise UserError(f"train.resume: no checkpoint in {folder} is whole; choose another folder")
    log.info(f"train.resume: {folder} holds no checkpoint; this is a new run")
    return None


def find_checkpoint(folder: Path, resume: str | None) -> Checkpoint | None:
    """The checkpoint that train.resume names; of "auto" the newest in `folder`: without one the run
    begins anew there. All processes take part. Raises: UserError, also if the folder holds a run
    that is not resumed."""
    if resume == "auto":
        path = run_on_rank0(lambda: newest_checkpoint(folder))
        return load_checkpoint(path) if path else None
    is_own = resume is not None and Path(resume).resolve().parent == folder.resolve()
    if not is_own:
        check_holds_no_run(folder)
    return load_checkpoint(Path(resume)) if resume else None


def check_holds_no_run(folder: Path) -> None:
    """Raises: UserError. What holds a run has the first line of metrics.jsonl, or, of a run that
    was resumed there from elsewhere, an adapter or checkpoint of a step."""
    is_logged = (folder / "metrics.jsonl").exists()
    if is_logged or any(step_of_file(path) is not None for path in folder.glob("*_step_*")):
        raise UserError(f"output.dir: {folder} holds a run already; resume it by "
                        "train.resume=auto, or choose another folder")


def check_no_later_files(folder: Path, step: int) -> None:
    """Raises: UserError if the folder holds adapters or checkpoints of later steps, which a branch
    of the run would mix with its own."""
    for path in folder.glob("*_step_*"):
        later_step = step_of_file(path)
        if later_step is not None and later_step > step:
            raise UserError(f"train.resume: {folder} goes on to step {later_step}; to branch off "
                            f"from step {step}, choose another output.dir")


def check_still_newest(folder: Path, step: int) -> None:
    """Raises: UserError if another process has meanwhile saved a later, whole checkpoint."""
    for path in folder.glob("checkpoint_step_*.pt"):
        later_step = step_of_file(path)
        if later_step is None or later_step <= step:
            continue
        try:
            load_checkpoint(path)
        except UserError:  # it was skipped before
            continue
        raise UserError(f"train.resume: another process has saved {path}; start again")


def read_metrics(path: Path) -> list[Json]:
    """The lines of metrics.jsonl, without one that a killed run did not end; none if there is no
    file. Raises: UserError that names a damaged line."""
    if not path.exists():
        return []
    entries = []
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(whole_lines, start=1):
        message = f"{path}:{number}: a damaged line; mend it, or choose another output.dir"
        with user_error(message, ValueError, RecursionError):
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError("without a step")
            if not all(isinstance(value, int | float) for value in entry.values()):
                raise ValueError("not all values are numbers")
            entries.append(entry)
    return entries


def keep_metrics(folder: Path, state: TrainState) -> None:
    """Drop what a run logged after `state`. A checkpoint is saved before the validation of its
    step: that one is dropped, too, unless the state has it. Without any line there is no file.
    Raises: UserError; OSError."""
    kept = []
    path = folder / "metrics.jsonl"
    for entry in read_metrics(path):
        last = state.last_validated_step if "val_loss" in entry else state.step
        if entry["step"] <= last:
            kept.append(entry)
    if kept:
        write_text(path, jsonl(kept))
    else:
        path.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Training


def lr_at(step: int, total_steps: int, cfg: TrainConfig) -> float:
    """The rate of update `step`, from 0: linear warm-up to cfg.lr, then linear decay to 0."""
    warmup = warmup_steps(total_steps, cfg)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * max(0, total_steps - step) / max(1, total_steps - warmup)


def warmup_steps(total_steps: int, cfg: TrainConfig) -> int:
    """The warm-up of a run: that of the settings, else 1000 steps, but at most a tenth of it."""
    if cfg.warmup_steps is not None:
        return cfg.warmup_steps
    return min(1000, total_steps // 10)


def mean_cosine(x: Tensor) -> float:
    """Mean pairwise cosine of the rows of x [n, d]: near 1, the adapter has collapsed."""
    n = len(x)
    unit = F.normalize(x, dim=1)
    return ((unit.sum(0).square().sum() - n) / max(1, n * (n - 1))).item()


def memory_gib() -> float:
    """The most memory so far: of the GPU, if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def exit_code(error: BaseException | None) -> int:
    """The exit code of a process that ends with this exception."""
    if error is None:
        return 0
    if isinstance(error, UserError):
        return 2
    if isinstance(error, SystemExit):
        return error.code
    return 1


class SignalWatch:
    """Within it SIGTERM and Ctrl-C do no more than enter `received`: the loop looks there once a
    step. In another thread than the main one, which alone may set handlers, it does nothing."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._handlers: dict[int, Callable | int | None] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


# Metrics


class WandbRun:
    """A run of Weights & Biases on process 0; nothing where wandb.enabled is false. Its failures
    are logged, and never end a training."""

    def __init__(self, cfg: Config, run_id: str | None):
        self.id = run_id
        self._run = None
        if cfg.wandb.enabled and rank() == 0:
            with self._failures_logged():
                self._run = self._start(cfg, run_id)
                self.id = self._run.id

    @staticmethod
    def _start(cfg: Config, run_id: str | None) -> wandb.Run:
        import wandb

        mode = os.environ.get("WANDB_MODE", cfg.wandb.mode)
        if mode == "online" and not wandb.login(prompt=False, verify=False):  # it would ask
            mode = "offline"
            log.info("W&B: no login, so the run is kept offline; `wandb sync` uploads it")
        return wandb.init(
            project=cfg.wandb.project, name=cfg.wandb.run_name, id=run_id, mode=mode,
            resume="allow", dir=cfg.output.dir, config=cfg.to_dict())

    @contextlib.contextmanager
    def _failures_logged(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # of W&B, its files and its network
            log.info(f"W&B failed, training goes on: {e!r}")

    def log(self, entry: dict[str, float], step: int) -> None:
        if self._run is not None:
            with self._failures_logged():
                self._run.log(entry, step=step)

    def log_adapter(self, path: Path) -> None:
        if self._run is not None:
            with self._failures_logged():
                self._run.log_artifact(str(path), type="adapter")

    def summarize(self, report: Json) -> None:
        if self._run is not None:
            with self._failures_logged():
                self._run.summary.update(report)

    def finish(self, code: int) -> None:
        """End the run with an exit code; once."""
        if self._run is not None:
            with self._failures_logged():
                self._run.finish(exit_code=code)
            self._run = None


CONSOLE_WIDTH = 80


class Column(NamedTuple):
    """Of a table on the console."""

    title: str
    width: int
    format: str  # of a value, as format() takes it


# The table of a training, 78 characters: the keys of metrics.jsonl that it shows, gap_closed and
# left.
TRAINING_COLUMNS = {
    "step": Column("step", 7, "d"),
    "loss": Column("loss", 8, ".4f"),
    "drift_loss": Column("drift", 8, ".4f"),
    "val_loss": Column("val", 8, ".4f"),
    "gap_closed": Column("gap", 7, ".3f"),
    "lr": Column("lr", 8, ".2e"),
    "tokens_per_second": Column("tokens/s", 9, ",.0f"),
    "memory_gib": Column("GiB", 6, ".1f"),
    "left": Column("left", 9, "")}


def table_header(columns: dict[str, Column]) -> str:
    return " ".join(column.title.rjust(column.width) for column in columns.values())


def table_line(columns: dict[str, Column], values: Json) -> str:
    """The values of some columns, below their titles."""
    cells = []
    for key, column in columns.items():
        text = ""
        if values.get(key) is not None:
            text = format(values[key], column.format)
        cells.append(text.rjust(column.width))
    return " ".join(cells).rstrip()


def labelled(label: str, text: str, num_lines: int = 1) -> str:
    """The beginning of a text, about num_lines lines of it, beside its label."""
    margin = f"  {label:11}"
    room = CONSOLE_WIDTH - len(margin)
    if any(unicodedata.east_asian_width(character) in "FW" for character in text):
        room //= 2  # these take two columns
    clipped = clip(text, num_lines * room)
    lines = textwrap.wrap(
        clipped, len(margin) + room, initial_indent=margin, subsequent_indent=" " * len(margin))
    return "\n".join(lines) or margin.rstrip()


class SampleAnswer(NamedTuple):
    query: str
    answer: str
    reference: str


class MetricLog:
    """Console, progress bar, metrics.jsonl, report.png and W&B, all written by process 0; all
    processes take part. As a context it ends the bar, and W&B's run with the exit code."""

    def __init__(self, folder: Path, wandb_run: WandbRun, first_step: int, total_steps: int,
                 plots: bool, has_drift: bool):
        """`plots`: whether report.png is drawn at each validation; `has_drift`: whether the drift
        loss is computed."""
        self.folder = folder
        self.wandb = wandb_run
        self.total_steps = total_steps
        self.plots = plots
        self._columns = dict(TRAINING_COLUMNS)
        if not has_drift:
            del self._columns["drift_loss"]
        if not torch.cuda.is_available():
            del self._columns["memory_gib"]
        self._has_header = False
        self._text_loss: float | None = None  # on validation, where it is measured: once
        for entry in read_metrics(folder / "metrics.jsonl"):
            self._text_loss = entry.get("val_loss_text", self._text_loss)
        self._bar = progress(None, "steps", total=total_steps, initial=first_step, unit="step")
        self._first_step = first_step
        self._start_time = time.perf_counter()
        self._last_time = self._start_time  # of the last line
        self._num_tokens = 0  # since the last line

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._bar.close()
        self.wandb.finish(exit_code(error))

    def step_done(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._bar.update()

    def write_training(self, step: int, entry: dict[str, float]) -> None:
        """Log a step, with the speed since the last line and the time that is left."""
        now = time.perf_counter()
        passed = now - self._start_time
        eta_seconds = passed / (step - self._first_step) * (self.total_steps - step)
        speed = self._num_tokens / (now - self._last_time)
        entry = entry | {"tokens_per_second": speed, "memory_gib": memory_gib()}
        self._write(step, entry)
        self._show({"step": step, **entry, "left": format_seconds(eta_seconds)})

    def write_validation(self, step: int, losses: dict[str, float],
                         samples: list[SampleAnswer]) -> None:
        """Log the losses on validation, and show the samples on the console."""
        self._write(step, losses)
        self._text_loss = losses.get("val_loss_text", self._text_loss)
        gap = None
        if self._text_loss is not None:
            gap = gap_closed(losses["val_loss"], losses["val_loss_shuffled"], self._text_loss)
        self._show({"step": step, **losses, "gap_closed": gap})
        for sample in samples:
            for label, text in sample._asdict().items():
                log.info(labelled(label, text))
        if step == self._first_step:
            self._start_time = self._last_time  # the time left is that of steps
        if step > 0 and self.plots:
            run_on_rank0(self._plot)

    def _show(self, values: Json) -> None:
        """A line of the table, the first below the header."""
        if not self._has_header:
            log.info(table_header(self._columns))
            self._has_header = True
        log.info(table_line(self._columns, values))

    def _plot(self) -> None:
        path = self.folder / "report.png"
        with drawing(path):
            metrics = read_metrics(self.folder / "metrics.jsonl")
            plot_report(path, metrics, self.folder.name)

    def _write(self, step: int, entry: dict[str, float]) -> None:
        line = jsonl([{"step": step, **entry}])
        run_on_rank0(lambda: append_text(self.folder / "metrics.jsonl", line))
        self.wandb.log(entry, step)
        self._last_time = time.perf_counter()
        self._num_tokens = 0


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


# The inputs of a run

MAX_COMPARED_WITH_TRAIN = 2000  # vectors of another split, a sample


def choose_report_split(split_name: str | None, data_dir: str) -> str:
    """eval.split; by default test, if it has files, else val."""
    if split_name is not None:
        return split_name
    paths = (vectors_path(data_dir, "test"), rows_path(data_dir, "test"))
    return "test" if any(path.exists() for path in paths) else "val"


# What is counted of a split, in the words of the log.
KINDS = {
    "rows": "rows",
    "other_tasks": "rows of other task types are left out",
    "pair_tasks": "rows of pair tasks are left out",
    "responses_cut": "responses are cut"}


def open_splits(cfg: DataConfig, names: Iterable[str], encoder: Encoder) -> dict[str, Split]:
    """The splits by name. Raises: UserError, OSError."""
    splits = {}
    for name in names:
        split = open_split(cfg.dir, name, cfg.tasks, encoder)
        counts = ", ".join(f"{n} {KINDS.get(kind, kind)}" for kind, n in split.counts.items() if n)
        num_vectors, width = split.vectors.shape
        num_used = len(np.unique(split.index["vector_id"]))
        num_sources = len(np.unique(split.index["source_id"]))
        if num_sources < num_used:
            counts += f"; {num_used} vectors are of {num_sources} sources"
        if num_used > MAX_COMPARED_VECTORS:
            counts += "; near-equal ones are not looked for among so many"
        log.info(f"{name}: {num_vectors} vectors of width {width}, {counts}")
        splits[name] = split
    return splits


def check_splits(splits: dict[str, Split], data_dir: str) -> None:
    """Compare the widths and norms of splits, the norms with those of train where it is one of
    them. Raises: UserError, also if a split has no second source to compare with."""
    widths = {name: split.vectors.shape[1] for name, split in splits.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"data.dir: the vectors of the splits differ in width: {widths}")
    for name, split in splits.items():
        if "train" in splits:
            rms_norm = split.statistics["norms"][1].item()
            check_norm(splits["train"].statistics["norms"], rms_norm, vectors_path(data_dir, name))
        source_ids = split.index["source_id"]
        if (source_ids == source_ids[0]).all():
            raise UserError(f"{split.path}: all rows are about one source (one vector, vectors of "
                            f"cosines above {NEAR_EQUAL}, or one text): none is left to compare it "
                            "with; add rows about other texts")


def name_origins(splits: dict[str, Split], given: str | None,
                 trained: VectorOrigin) -> dict[str, Split]:
    """The splits, each with the origin of its vectors: where its table does not name the embedder,
    that of the adapter, of data.embedder or of another split. `given` is data.embedder: the name of
    the model that can be loaded here. `trained` is the adapter's. Raises: UserError if two name
    different embedders."""
    origins = {"the adapter": trained, "data.embedder": VectorOrigin(model=given)}
    for split in splits.values():
        origins[str(split.table_path)] = split.origin
    known = agree_on_origin(origins)
    named = {}
    for name, split in splits.items():
        origin = split.origin if split.origin.model else known
        if given:
            origin = origin.model_copy(update={"model": given})
        named[name] = dataclasses.replace(split, origin=origin)
    return named


def open_known_texts(cfg: DataConfig, split: Split) -> Split | None:
    """The training split, of which retrieval takes texts for the rows of `split`. None where it has
    no row of data.tasks with a text, where one of its two files is missing, where it is `split`
    itself, and, with a warning, where its vectors are of another width or embedder. It is not
    compared with `split` in anything else. Raises: UserError, OSError at a broken line or vector,
    as of any split."""
    table_path = vectors_path(cfg.dir, "train")
    path = rows_path(cfg.dir, "train")
    if path == split.path or not table_path.exists() or not path.exists():
        return None
    num_vectors, width = open_vectors(table_path, "data.dir").shape
    if not has_texts(path, cfg.tasks, num_vectors):
        return None
    width_of_split = split.vectors.shape[1]
    if width != width_of_split:
        log.warning(f"{table_path}: its vectors are of width {width}, those of {split.table_path} "
                    f"of {width_of_split}: the report leaves out the nearest training texts")
        return None
    origin = table_origin(table_path)
    if embedders_differ(origin, split.origin):
        log.warning(f"{table_path}: its vectors are of {origin.model}, those of {split.table_path} "
                    f"of {split.origin.model}: the report leaves out the nearest training texts")
        return None
    return open_splits(cfg, ["train"], split.encoder)["train"]


def has_texts(path: Path, tasks: Sequence[str], num_vectors: int) -> bool:
    """Whether a row of `tasks` has a text. Reads to the first one that has. Raises: UserError."""
    for line in read_lines(path, tasks, num_vectors):
        row = line.row
        if row is not None and row.task_type in tasks and row.stripped_text:
            return True
    return False


class Nearest(NamedTuple):
    row_ids: np.ndarray  # [n] int64, the first row of the nearest vector
    cosines: np.ndarray  # [n] fp32


@torch.no_grad()
def nearest_vectors(queries: Tensor, vectors: Tensor, vector_ids: np.ndarray,
                    first_rows: np.ndarray, device: torch.device) -> Nearest:
    """The nearest of the vectors [N, E] at `vector_ids` [m] to each of `queries` [n, E], by cosine;
    of equally near ones the one with the least of `first_rows` [m], the first row of each. They are
    read block by block, in the order of `vector_ids`: ascending ids suit a memory-mapped table."""
    directions = F.normalize(queries.float().to(device), dim=1)
    nearest_rows = torch.zeros(len(queries), dtype=torch.int64, device=device)
    greatest = torch.full_like(directions[:, 0], -math.inf)
    ids_of_blocks = torch.from_numpy(vector_ids.astype(np.int64)).split(2048)
    rows_of_blocks = torch.from_numpy(first_rows.astype(np.int64)).split(2048)
    for ids, rows in zip(ids_of_blocks, rows_of_blocks, strict=True):
        by_row = rows.argsort()  # max() takes the first of equal ones
        block = vectors[ids][by_row].to(device).float()
        cosines, places = (directions @ block.T / block.norm(dim=1)).max(1)
        found_rows = rows[by_row].to(device)[places]
        is_earlier = (cosines == greatest) & (found_rows < nearest_rows)
        is_nearer = (cosines > greatest) | is_earlier
        nearest_rows = torch.where(is_nearer, found_rows, nearest_rows)
        greatest = torch.maximum(greatest, cosines)
    return Nearest(nearest_rows.cpu().numpy(), greatest.cpu().numpy())


def warn_of_trained_texts(splits: dict[str, Split], device: torch.device) -> None:
    """Warn of each other split that has vectors or texts of train, as rows split at random have. On
    process 0 alone."""
    train = splits["train"]
    train_ids, first_rows = np.unique(train.index["vector_id"], return_index=True)
    train_hashes = train.index["text_hash"][train.index["has_text"]]
    for name, split in splits.items():
        if name == "train":
            continue
        vector_ids = np.random.default_rng(0).permutation(np.unique(split.index["vector_id"]))
        vector_ids = np.sort(vector_ids[:MAX_COMPARED_WITH_TRAIN])
        queries = split.embeddings(vector_ids)
        nearest = nearest_vectors(queries, train.vectors, train_ids, first_rows, device)
        num_vectors = int((nearest.cosines > NEAR_EQUAL).sum())
        hashes = np.unique(split.index["text_hash"][split.index["has_text"]])
        num_texts = int(np.isin(hashes, train_hashes).sum())
        if num_vectors or num_texts:
            log.warning(
                f"{name}: {num_vectors} of {len(vector_ids)} compared vectors have one of train at "
                f"a cosine above {NEAR_EQUAL}, {num_texts} of {len(hashes)} texts are in train: "
                "its figures on these are about texts that the adapter is trained on; split by "
                "text, not by row, as data/prepare.py does, which also keeps the texts of a "
                "`group` together")


def check_data(cfg: Config, splits: dict[str, Split], device: torch.device) -> None:
    """Compare the vectors with those of other splits, and with their texts. All processes take
    part. Raises: UserError."""
    run_on_rank0(lambda: warn_of_trained_texts(splits, device))
    check_embedder(cfg.eval, cfg.model.bf16, device, splits)


def check_tasks(splits: dict[str, Split]) -> None:
    """Raises: UserError at a task type of the user's own that no row of the splits has: it may be
    misspelled."""
    tasks = next(iter(splits.values())).tasks
    for i, task in enumerate(tasks):
        is_found = any((split.index["task_id"] == i).any() for split in splits.values())
        if not is_found and task not in (*TASKS, RECONSTRUCT):
            raise UserError(f"data.tasks: no row is of the task type {task!r}"
                            f"{did_you_mean(task, TASKS)}")


def check_ids_of_rows(splits: dict[str, Split]) -> None:
    """Raises: UserError at a text of which the tokenizer makes an id that the LLM has no embedding
    for. All rows are read, but only where the tokenizer has such ids."""
    for split in splits.values():
        if not split.encoder.prompt.can_exceed_ids():
            continue
        for row_ids in in_blocks(range(len(split)), 1024):
            split.examples(row_ids, "text")  # encodes queries, responses and texts


def check_report_packages(cfg: EvalConfig) -> None:
    """Raises: UserError if the report will lack a package or the scorer's config. Loads no
    model."""
    import_optional("matplotlib")
    import_optional("pandas")
    if cfg.samples and cfg.bertscore_model != OFF:
        scorer_layers(cfg)


def check_embedder_name(cfg: EvalConfig, name: str | None) -> None:
    """As check_model_name, of the embedder that a report will use, if any; and its package."""
    if cfg.samples and name:
        check_model_name(name, "eval.embedder")
        import_optional("sentence_transformers")


def open_inputs(cfg: Config, names: tuple[str, ...], num_soft_tokens: int,
                stored_prompt: dict[str, str] | None,
                trained: VectorOrigin | None = None) -> dict[str, Split]:
    """All that can be opened and checked before a model is loaded: packages, tokenizer, the splits
    of these names. `trained` is the origin of an adapter's vectors. Raises: UserError, OSError."""
    check_model_name(cfg.model.llm, "model.llm")
    if cfg.eval.samples and cfg.eval.bertscore_model != OFF:
        check_model_name(cfg.eval.bertscore_model, "eval.bertscore_model")
    if cfg.eval.embedder is not None:  # at once, before the tables that may name another
        check_embedder_name(cfg.eval, choose_embedder(cfg.eval, VectorOrigin()))
    check_report_packages(cfg.eval)
    prompt = Prompt(load_tokenizer(cfg.model.llm), cfg.model.template, stored_prompt)
    encoder = Encoder(prompt, num_soft_tokens, cfg.data.max_seq_length)
    splits = open_splits(cfg.data, drop_repeats(names), encoder)
    splits = name_origins(splits, cfg.data.embedder, trained or VectorOrigin())
    check_splits(splits, cfg.data.dir)
    origin = next(iter(splits.values())).origin
    check_embedder_name(cfg.eval, choose_embedder(cfg.eval, origin))
    return splits


# The plan of memory


def plan_memory(elm: ELM, max_seq_length: int, grad_checkpoint: bool | str, loss_cfg: LossConfig,
                probe: Probe | None) -> int:
    """Choose how many layers to recompute, and return the most tokens of a micro-batch. On a GPU
    the layers keep less for the backward pass, too; partitioned ones were not tried.

    On a GPU the first of several plans that a trial pass shows to fit on every process; those
    without recomputation come first. Under ZeRO 3 on several processes, where a trial that fails
    cannot end, the last. All processes take part. Raises: OutOfMemoryError if no plan fits.
    """
    shares = {"auto": [0.0, 0.5, 1.0], True: [1.0], False: [0.0]}[grad_checkpoint]
    is_gpu = elm.device.type == "cuda"
    if is_gpu and not is_partitioned(elm.llm):
        keep_less(elm.llm)
    if is_gpu:
        budgets = [max(max_seq_length, size) for size in (MICRO_BATCH_TOKENS["cuda"], 4096, 2048)]
        plans = [(budget, share) for share in shares for budget in dict.fromkeys(budgets)]
    else:
        plans = [(MICRO_BATCH_TOKENS["cpu"], shares[0])]
    if elm.lockstep:
        plans = plans[-1:]

    can_try = is_gpu and not elm.lockstep
    for budget, share in plans:
        num_recomputed = recompute_layers(elm.llm, share)
        if not can_try or fits_in_memory(elm, budget, max_seq_length, loss_cfg, probe):
            log.info(f"micro-batches of {budget} tokens, {num_recomputed} layers recomputed")
            return budget
    raise torch.OutOfMemoryError(f"a row of {max_seq_length} tokens does not fit")


def fits_in_memory(elm: ELM, num_tokens: int, max_seq_length: int, loss_cfg: LossConfig,
                   probe: Probe | None) -> bool:
    """Whether a training pass over num_tokens in rows of up to max_seq_length, beside what the
    optimizer will allocate, fits on every process. All processes take part."""
    step = trial_step(num_tokens, max_seq_length, elm.adapter)

    def run_trial_pass() -> None:  # a function: its tensors are freed when it fails
        # 4: a parameter's gradient, AdamW's two moments, and what the update holds for a while.
        reserve = [torch.empty_like(p) for p in elm.adapter.parameters() for _ in range(4)]
        soft_gradient(elm, elm(step.batches[0].embeddings), step, loss_cfg, probe)
        del reserve  # not before: it stands for what the optimizer will hold

    failed = torch.zeros((), device=elm.device)
    try:
        run_trial_pass()
    except torch.OutOfMemoryError:
        failed += 1
    free_memory()  # also of the reference cycles that a failed pass leaves
    torch.cuda.reset_peak_memory_stats()  # memory_gib is of training
    return all_reduce_sum(failed).item() == 0


def trial_step(num_tokens: int, max_seq_length: int, adapter: Adapter) -> Step:
    """A step of one micro-batch, in which every token has a label where it can."""
    num_examples = math.ceil(num_tokens / max_seq_length)
    examples = []
    for ids in np.array_split(np.zeros(num_tokens, np.int64), num_examples):
        ids[: adapter.tokens] = SOFT_TOKEN
        examples.append(Example(ids, len(ids) - adapter.tokens, False))
    embeddings = torch.ones(num_examples, adapter.settings["d_emb"], dtype=torch.float32)
    batch = collate(examples, embeddings)
    rows = RowsOfStep(epoch=0, position=0, row_ids=np.arange(num_examples))
    return Step(rows, [batch], num_labels=num_tokens, num_tokens=num_tokens)


# The run

SAMPLES_AT_VALIDATION = 2
SAMPLE_TOKENS = 24  # of an answer, which fill a line


class Trainer:
    """A training run. __init__ opens and checks the data: what is wrong with them shows within
    seconds. run() loads the models, trains and reports; it writes nothing before the first step is
    possible. A sweep's TrialTrainer overrides methods.

    The order within the loop: update, log, save, leave after a signal, validate, end. All processes
    run all of it; process 0 alone writes.
    """

    plots = True  # whether report.png is drawn; a trial of a sweep draws none

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.folder = Path(cfg.output.dir)
        self.device = start_distributed()
        self.signals = SignalWatch()
        if cfg.wandb.enabled:
            import_optional("wandb")

        self.checkpoint = find_checkpoint(self.folder, cfg.train.resume)
        self.is_resumed = self.checkpoint is not None
        run_on_rank0(self.check_folder)
        self.state = self.checkpoint.state if self.is_resumed else TrainState()
        stored_prompt = self.checkpoint.prompt if self.is_resumed else None

        self.report_split = choose_report_split(cfg.eval.split, cfg.data.dir)
        names = ("train", "val", self.report_split)
        self.splits = open_inputs(cfg, names, cfg.model.tokens, stored_prompt)
        check_tasks(self.splits)
        self.rows_hashes = {name: rows_hash(split) for name, split in self.splits.items()}
        self.rows_per_step = cfg.train.batch_size * cfg.train.grad_accum * world_size()
        self.total_steps = self.count_steps()
        self.eval_steps = self.choose_eval_steps()

    # Setting up

    def check_folder(self) -> None:
        """Raises: UserError if the folder of a new run cannot be made."""
        if not (self.folder / "metrics.jsonl").exists():
            check_can_write(self.folder, "output.dir")

    def prepare_models(self) -> None:
        """Load the LLM, make or resume the adapter and its optimizer, fit what is fitted in closed
        form, plan the memory. Raises: UserError."""
        cfg = self.cfg
        self.check_data()
        self.elm = self.build_elm()
        self.optimizer = torch.optim.AdamW(
            self.elm.adapter.parameters(), betas=(0.9, 0.999), eps=1e-8,
            weight_decay=cfg.train.weight_decay, fused=True)
        self.probe: Probe | None = None  # of the drift loss
        if self.is_resumed:
            self.restore(self.checkpoint)
            self.checkpoint = None  # its tensors are copied
        elif cfg.train.warm_start:
            warm_start(self.elm, self.splits["train"])
        if cfg.loss.drift_weight == 0:
            self.probe = None
        elif self.probe is None:
            self.probe = fit_probe(self.elm, self.splits["train"])
        self.elm.train()
        self.micro_batch_tokens = plan_memory(
            self.elm, cfg.data.max_seq_length, cfg.model.grad_checkpoint, cfg.loss, self.probe)

    def count_steps(self) -> int:
        """The steps of the whole run. A resumed run may have another batch size or another number
        of processes than before: steps are counted from where it stands."""
        cfg = self.cfg.train
        if cfg.max_steps is not None:
            return cfg.max_steps
        num_rows = len(self.splits["train"])
        rest_of_epoch = max(0, num_rows - self.state.position)
        later_epochs = cfg.epochs - self.state.epoch - 1
        steps_of_epoch = math.ceil(num_rows / self.rows_per_step)
        steps_of_rest = math.ceil(rest_of_epoch / self.rows_per_step)
        return self.state.step + steps_of_rest + later_epochs * steps_of_epoch

    def choose_eval_steps(self) -> int:
        return self.cfg.train.eval_steps

    def find_finished_report(self) -> Json | None:
        """The report of a run that has nothing left to do, if it is whole."""
        path = self.folder / "eval.json"
        if not self.is_resumed:
            return None
        for table in ("model", "data", "eval"):  # else the report would be another one
            if self.checkpoint.config[table] != self.cfg.to_dict()[table]:
                return None
        split = self.report_split
        if self.checkpoint.rows_hashes.get(split) != self.rows_hashes[split]:
            return None
        if not self.has_ended() or not path.exists():
            return None
        try:
            report = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return None
        if not isinstance(report, dict) or report.get("split") != self.report_split:
            return None
        return report if report.get("step") == self.state.step else None

    def check_data(self) -> None:
        """Before the LLM takes the memory."""
        check_data(self.cfg, self.splits, self.device)

    def load_llm(self) -> PreTrainedModel:
        model = self.cfg.model
        return load_llm(model.llm, self.device, model.bf16, deepspeed=self.cfg.deepspeed,
                        quantization=model.quantization)

    def build_elm(self) -> ELM:
        """The frozen LLM with a fresh adapter."""
        model = self.cfg.model
        train_split = self.splits["train"]
        llm = self.load_llm()
        torch.manual_seed(self.cfg.train.seed)
        adapter = fresh_adapter(
            llm, train_split.statistics, model.standardize, hidden_dim=model.hidden_dim,
            tokens=model.tokens, dropout=model.dropout, residual_scale=model.residual_scale)
        elm = ELM(llm, adapter.to(self.device), train_split.encoder.prompt, train_split.origin)
        check_llm(elm, self.cfg.data.max_seq_length)
        check_gradient(elm)
        check_ids_of_rows(self.splits)

        num_trained = sum(p.numel() for p in adapter.parameters())
        num_frozen = count_parameters(llm)
        log.info(f"{world_size()} process(es) on {self.device.type}, ZeRO "
                 f"{self.cfg.deepspeed.zero_stage}, LLM in {name_precision(llm)}")
        log.info(f"{num_trained:,} parameters trained, {num_frozen:,} frozen; token embeddings of "
                 f"root mean square {adapter.scale:.4f}")
        return elm

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take adapter, optimizer and probe from a checkpoint. Raises: UserError if it belongs to
        another LLM, adapter or kind of vectors."""
        adapter = self.elm.adapter
        where = "train.resume"
        standardize = {"standardize": self.cfg.model.standardize}
        check_trained_for(checkpoint.trained_for, self.elm.trained_for, where)
        check_trained_for(checkpoint.config["model"], standardize, where)
        check_norm(checkpoint.adapter["norms"], adapter.norms[1].item(), where)
        adapter.load_state_dict(checkpoint.adapter)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.optimizer.param_groups[0]["weight_decay"] = self.cfg.train.weight_decay  # may change
        if checkpoint.probe:
            tensors = {name: t.to(self.device) for name, t in checkpoint.probe.items()}
            self.probe = Probe(**tensors)

    @contextlib.contextmanager
    def claimed_folder(self) -> Iterator[None]:
        """Hold the lock of output.dir, on process 0; drop what a run logged there after this state,
        and write config.toml. All processes take part. Raises: UserError, OSError."""

        def claim() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.folder / ".lock"))
            if self.cfg.train.resume == "auto":
                check_still_newest(self.folder, self.state.step)
            elif self.cfg.train.resume is None:
                check_holds_no_run(self.folder)
            else:
                check_no_later_files(self.folder, self.state.step)
            keep_metrics(self.folder, self.state)
            (self.folder / "eval.json").unlink(missing_ok=True)  # of an earlier end of the run
            write_text(self.folder / "config.toml", config_text(self.cfg))

        with contextlib.ExitStack() as stack:
            run_on_rank0(claim)
            yield

    def warn_of_changed_rows(self) -> None:
        """Warn if a split is not what it was at the checkpoint. The run goes on by its numbers: the
        row of the epoch that it has come to, the least validation loss."""
        consequences = {
            "train": "the rest of the run takes other rows, or in another order, than it would "
                     "without the stop",
            "val": "validation losses before and after are not of the same rows"}
        for name, consequence in consequences.items():
            if self.checkpoint.rows_hashes.get(name) != self.rows_hashes[name]:
                log.warning(f"train.resume: {self.splits[name].path}: its rows or their vectors "
                            f"have changed since the checkpoint: {consequence}")

    def announce(self) -> None:
        warmup = warmup_steps(self.total_steps, self.cfg.train)
        if self.is_resumed:
            log.info(f"resumed after step {self.state.step}")
        else:
            log.info(f"{self.total_steps} steps of {self.rows_per_step} rows, {warmup} of warm-up")
        num_rows = len(self.splits["train"])
        if self.rows_per_step > num_rows:
            warn_once(f"train.batch_size: a step of {self.rows_per_step} rows takes more than all "
                      f"{num_rows} rows of train; lower train.batch_size or train.grad_accum")

    # Training

    def run(self) -> Json:
        """Train and report: returns the dict of eval.json. Raises: UserError; SystemExit(128 +
        signal) after a signal, with a checkpoint."""
        if self.is_resumed:
            self.warn_of_changed_rows()
        finished_report = self.find_finished_report()
        if finished_report is not None:
            log.info(f"{self.folder} holds a finished run of {self.state.step} steps; nothing to "
                     "do")
            return finished_report if rank() == 0 else {}
        self.prepare_models()
        with self.claimed_folder():
            wandb_run = WandbRun(self.cfg, self.state.wandb_id)
            self.state.wandb_id = wandb_run.id
            self.metric_log = MetricLog(
                self.folder, wandb_run, self.state.step, self.total_steps, self.plots,
                has_drift=self.probe is not None)
            with self.metric_log:
                return self.fit_and_report()

    def fit_and_report(self) -> Json:
        self.announce()
        if self.is_resumed:  # the file may be of a step that the checkpoint does not know
            self.save_best_adapter()
        with self.signals:
            self.fit()
            self.save("checkpoint_final.pt")
            self.leave_if_signalled()  # a signal may have come after the last step
        report = self.report()
        self.metric_log.wandb.summarize(report)
        return report

    def fit(self) -> None:
        """The loop: from where the run stands to its last step, or until patience ends."""
        if self.validation_is_missing():
            self.validate()
        for step in self.remaining_steps():
            is_signalled = self.train_step(step)
            if self.is_due(self.cfg.train.save_steps) or self.validation_is_due():
                self.save()
            if is_signalled:
                self.leave_if_signalled()
            if self.validation_is_due():
                self.validate()
            if self.has_ended():
                break

    def validation_is_missing(self) -> bool:
        """Before the first step; or after a resume from the checkpoint before a validation."""
        if self.state.last_validated_step < 0:
            return True
        return self.validation_is_due() and self.state.last_validated_step < self.state.step

    def validation_is_due(self) -> bool:
        return self.is_due(self.eval_steps) or self.state.step == self.total_steps

    def is_due(self, every: int) -> bool:
        return self.state.step % every == 0

    def has_ended(self) -> bool:
        return self.state.has_ended(self.total_steps, self.cfg.train.patience)

    def remaining_steps(self) -> Iterator[Step]:
        state = self.state
        train_split = self.splits["train"]
        rows = step_rows(len(train_split), self.cfg.train.seed, self.rows_per_step, state.epoch,
                         state.position)
        num_steps = 0 if self.has_ended() else self.total_steps - state.step
        prepare = functools.partial(prepare_step, train_split, self.micro_batch_tokens)
        return prefetch(prepare, itertools.islice(rows, num_steps), self.cfg.data.num_workers)

    def train_step(self, step: Step) -> bool:
        """One update. Returns whether a process has received a signal. Raises: UserError, on all
        processes and before the update, if the loss or its gradient is not finite."""
        cfg = self.cfg.train
        adapter = self.elm.adapter
        self.seed_dropout()

        step = step.to(self.device)
        soft_tokens = self.elm(torch.cat([batch.embeddings for batch in step.batches]))
        sums, gradient = soft_gradient(self.elm, soft_tokens, step, self.cfg.loss, self.probe)
        self.optimizer.zero_grad()
        soft_tokens.backward(gradient)
        for parameter in adapter.parameters():
            all_reduce_sum(parameter.grad)
        norm = nn.utils.clip_grad_norm_(adapter.parameters(), cfg.max_grad_norm).double()

        # The step's one wait for the device (a logged step has another, for the similarity): all
        # that the host must know before it updates.
        num_signals = torch.full_like(norm, len(self.signals.received))
        # The norm is the same everywhere: its share, summed, is the norm again.
        numbers = torch.stack([sums.nll, sums.drift, norm / world_size(), num_signals])
        nll_sum, drift_sum, grad_norm, num_signals = all_reduce_sum(numbers).tolist()
        self.check_finite([nll_sum, drift_sum, grad_norm], step)

        lr = lr_at(self.state.step, self.total_steps, cfg)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.state.advance(step, nll_sum, drift_sum)
        self.metric_log.step_done(step.num_tokens)
        if self.is_due(cfg.logging_steps) or self.state.step == self.total_steps:
            self.log_training(lr, grad_norm, mean_cosine(soft_tokens.detach().flatten(1)))
        return num_signals > 0

    def seed_dropout(self) -> None:
        """Dropout is a function of seed, step and process: a checkpoint needs no generator
        state."""
        seed = np.random.SeedSequence([self.cfg.train.seed, self.state.step, rank()])
        torch.manual_seed(int(seed.generate_state(1)[0]))  # the CPU's generator keeps 32 bits

    def check_finite(self, numbers: list[float], step: Step) -> None:
        """Raises: UserError that names the step and its rows."""
        if all(math.isfinite(number) for number in numbers):
            return
        train_split = self.splits["train"]
        lines = ",".join(str(n) for n in train_split.index["line"][step.rows.row_ids][:64])
        raise UserError(
            f"step {self.state.step + 1}: the loss or its gradient is not finite, and nothing was "
            f"updated; lower train.lr, or look at {train_split.path}:{lines}")

    def log_training(self, lr: float, grad_norm: float, similarity: float) -> None:
        """Log the mean losses since the last call. Drift is left out where it is not computed."""
        state = self.state
        lm_loss = state.nll_sum / state.num_labels
        losses = {"loss": lm_loss, "lm_loss": lm_loss}
        if self.probe is not None:
            losses["drift_loss"] = state.drift_sum / state.num_rows
            losses["loss"] += self.cfg.loss.drift_weight * losses["drift_loss"]
        self.metric_log.write_training(state.step, {
            "epoch": state.epoch, **losses, "lr": lr, "grad_norm": grad_norm,
            "similarity": similarity})
        state.forget_sums()

    # Validation, checkpoints, the end

    def validate(self) -> None:
        losses = self.validation_losses()
        samples = self.answer_samples()
        self.metric_log.write_validation(self.state.step, losses, samples)
        if self.state.record_validation(losses["val_loss"], self.elm.adapter):
            self.save_best_adapter()

    def validation_losses(self) -> dict[str, float]:
        is_first = self.state.last_validated_step < 0
        return validation_losses(self.elm, self.splits["val"], with_text=is_first)

    def answer_samples(self) -> list[SampleAnswer]:
        """The beginnings of greedy answers to rows of val, always the same ones: they tell at a
        glance what the losses do not. No random number is drawn. All processes take part."""
        cfg = self.cfg.eval
        split = self.splits["val"]
        row_ids = pick_samples(split, min(SAMPLES_AT_VALIDATION, cfg.samples))
        answers = generate_answers(
            self.elm, split, row_ids, split.index["vector_id"][row_ids],
            min(SAMPLE_TOKENS, cfg.max_new_tokens))
        samples = []
        for row, answer in zip(split.read(row_ids), answers, strict=True):
            samples.append(SampleAnswer(row.query, answer, row.response))
        return samples

    def save(self, *more_names: str) -> None:
        """Write the adapter and checkpoint_step_N.pt, also under more_names. No random state is
        needed: rows and dropout follow from the number of the step."""
        step = self.state.step
        weights = self.elm.adapter.state_dict()
        self.save_adapter(f"adapter_step_{step}.safetensors", weights, step)
        checkpoint = Checkpoint(
            state=self.state,
            adapter=weights,
            optimizer=self.optimizer.state_dict(),
            probe=self.probe._asdict() if self.probe else None,
            trained_for=self.elm.trained_for,
            config=self.cfg.to_dict(),
            prompt=self.elm.prompt.template_parts,
            rows_hashes=self.rows_hashes)
        names = (f"checkpoint_step_{step}.pt", *more_names)
        paths = [self.folder / name for name in names]
        run_on_rank0(lambda: save_checkpoint(checkpoint, paths))

    def save_best_adapter(self) -> None:
        state = self.state
        self.save_adapter("adapter_best.safetensors", state.best_adapter, state.best_step)

    def save_adapter(self, name: str, weights: dict[str, Tensor], step: int) -> None:
        path = self.folder / name
        run_on_rank0(lambda: self.elm.write(path, weights, step=step))
        self.metric_log.wandb.log_adapter(path)

    def leave_if_signalled(self) -> None:
        """Save and exit on all processes, if one has received a signal. All processes take part."""
        received = self.signals.received
        if all_reduce_sum(torch.tensor(len(received))).item() == 0:
            return
        self.save()
        log.info(f"stopped after step {self.state.step}; train.resume=auto goes on from there")
        raise SystemExit(128 + max(received, default=signal.SIGTERM))

    def report(self) -> Json:
        """Report on the best adapter. Frees the models, whose memory the scorers need: the trainer
        cannot go on after it."""
        split = self.splits[self.report_split]
        header = {"split": self.report_split, "step": self.state.step,
                  "adapter_step": self.state.best_step}
        self.elm.eval().adapter.load_state_dict(self.state.best_adapter)
        measured = measure(self.elm, split, self.splits["train"], self.cfg.eval)
        del self.elm, self.optimizer
        free_memory()
        if rank() > 0:
            return {}
        metrics = read_metrics(self.folder / "metrics.jsonl")
        return write_report(measured, split, self.cfg, self.device, self.folder, self.folder.name,
                            metrics, header)


def train(settings: Config | str | Path | Json) -> Json:
    """Train an adapter and report on it: returns the dict of eval.json, of other processes than 0
    {}. `settings` are a Config, as load_config makes it, the path of a TOML file, or its tables:
    {"train": {"lr": 1e-3}}. Raises: UserError; SystemExit(128 + signal) after a signal, with a
    checkpoint."""
    cfg = as_config(settings)
    with log_to_file(cfg.output.log_file):
        return Trainer(cfg).run()


def as_config(settings: Config | str | Path | Json) -> Config:
    """Raises: UserError."""
    if isinstance(settings, Config):
        return settings
    if isinstance(settings, str | Path):
        return load_config(str(settings))
    if isinstance(settings, dict):
        return parse_config(apply_overrides({}, flatten(settings)))  # dotted keys are keys, too
    raise UserError(f"train: takes a Config, the path of a TOML file, or a dict of its tables, not "
                    f"a {type(settings).__name__}")


# -----------------------------------------------------------------------------
# Evaluation
#
# Losses by the right vector, by another row's (shuffled), by the nearest text of train and by the
# row's own text; answers by the first two, the nearest answer of train, and their scores. measure()
# needs the LLM, score() the answers alone, write_report() the scores.

# Rows whose losses are computed at once, at most.
EVAL_BATCH_ROWS = {"cpu": 16, "cuda": 64}
# Answers of a batch: fewer than memory may hold, so that several processes have some.
REPORT_BATCH = {"cpu": 16, "cuda": 64}
EMBEDDER_CHECK_TEXTS = 32  # texts of each split whose vectors are compared with the stored ones
OFF = "off"  # in the place of the name of an embedder or a scorer
QUERIES_AT_ONCE = 8192  # vectors whose nearest ones are found in one reading of the table of train


def free_memory() -> None:
    """Give the memory of models that nothing refers to any more back to the device."""
    gc.collect()  # recomputed layers and DeepSpeed's hooks are reference cycles
    torch.cuda.empty_cache()


# Losses


class RowLosses(NamedTuple):
    nll: np.ndarray  # [N] fp64, the summed cross-entropy of each response
    num_tokens: np.ndarray  # [N], of the response; 0: the row got no text, or one that does not fit


class EvalBatch(NamedTuple):
    """n rows as the LLM reads them."""

    row_ids: np.ndarray
    batch: Batch
    is_counted: np.ndarray  # [n] bool


class Texts(NamedTuple):
    """A text for each row of a split: its own, or that of another split's row."""

    split: Split  # of the rows that have the texts
    row_ids: np.ndarray  # [N] int64, of these; NO_ROW: the row gets none

    def read(self, row_ids: np.ndarray) -> list[str]:
        """The texts of rows that get one."""
        return [row.text for row in self.split.read(self.row_ids[row_ids])]


NO_ROW = -1


def own_texts(split: Split) -> Texts:
    return Texts(split, np.where(split.index["has_text"], np.arange(len(split)), NO_ROW))


def losses_by_vectors(elm: ELM, split: Split, vector_ids: np.ndarray) -> RowLosses:
    """Of all rows, each read by the vector of the split's at `vector_ids` [N]. All processes take
    part."""

    def load(row_ids: np.ndarray) -> EvalBatch:
        batch = collate(split.examples(row_ids), split.embeddings(vector_ids[row_ids]))
        return EvalBatch(row_ids, batch, np.full(len(row_ids), True))

    return evaluate_nll(elm, split, np.arange(len(split)), load)


def losses_by_texts(elm: ELM, split: Split, texts: Texts) -> RowLosses:
    """Of the rows that get a text, each read by it. All processes take part."""

    def load(row_ids: np.ndarray) -> EvalBatch:
        examples = split.examples(row_ids, "text", texts.read(row_ids))
        is_whole = np.array([not example.truncated for example in examples])
        return EvalBatch(row_ids, collate(examples), is_whole)

    return evaluate_nll(elm, split, np.flatnonzero(texts.row_ids != NO_ROW), load)


def rows_at_once(elm: ELM, max_tokens: int) -> int:
    """Rows of an evaluation, if each may have max_tokens. The same on all processes, which all take
    part."""
    most = EVAL_BATCH_ROWS[elm.device.type]
    return least_of_all(max(1, int(min(most, tokens_at_once(elm.llm) / max_tokens))))


@torch.no_grad()
def evaluate_nll(elm: ELM, split: Split, row_ids: np.ndarray,
                 load: Callable[[np.ndarray], EvalBatch]) -> RowLosses:
    """The losses of these rows of a split, of which `load` makes batches. All processes take part;
    the result is the same for any number of them."""
    size = rows_at_once(elm, split.encoder.max_tokens)
    blocks = [np.array(block) for block in in_blocks(row_ids, size)]

    def load_own(first: int) -> EvalBatch:
        """This process's batch of the blocks from `first` on. Beyond the end it repeats the last,
        uncounted, so that all processes run equally many."""
        number = first + rank()
        is_repeated = number >= len(blocks)
        loaded = load(blocks[-1] if is_repeated else blocks[number])
        return loaded._replace(is_counted=loaded.is_counted & (not is_repeated))

    nll = np.zeros(len(split))
    num_tokens = np.zeros(len(split))
    firsts = progress(range(0, len(blocks), world_size()), "losses")
    # Zeros of a repeated block do no harm: it is counted on another process.
    for ids, batch, is_counted in prefetch(load_own, firsts, num_threads=1):
        nll[ids] = np.array(elm.nll(batch).tolist()) * is_counted
        num_tokens[ids] = np.array(batch.num_labels) * is_counted
    both = all_reduce_sum(torch.tensor(np.stack([nll, num_tokens]), device=elm.device))
    nll, num_tokens = both.cpu().numpy()
    return RowLosses(nll, num_tokens)


def nll_by_texts(elm: ELM, split: Split, texts: Texts, kind: str, measures: str) -> np.ndarray:
    """[N], NaN for rows without a text or with one that does not fit. Warns of the latter, which
    are left out of these measures; `kind` names the texts."""
    by_text = losses_by_texts(elm, split, texts)
    has_loss = by_text.num_tokens > 0
    num_cut = int(((texts.row_ids != NO_ROW) & ~has_loss).sum())
    if num_cut:
        log.warning(f"{num_cut} {kind} exceed data.max_seq_length: left out of {measures}")
    return np.where(has_loss, by_text.nll, np.nan)


def nll_by_own_texts(elm: ELM, split: Split) -> np.ndarray:
    return nll_by_texts(elm, split, own_texts(split), "texts", "loss_text and gap_closed")


def validation_losses(elm: ELM, split: Split, with_text: bool) -> dict[str, float]:
    """Losses per response token by the right and by shuffled vectors and, if asked for, by the
    texts: the ceiling, which does not change during training. It is left out unless every row's
    text fits."""
    was_training = elm.training
    elm.eval()  # the adapter does not drop out
    losses = {}
    own = losses_by_vectors(elm, split, split.index["vector_id"])
    losses["val_loss"] = float(own.nll.sum() / own.num_tokens.sum())
    shuffled = losses_by_vectors(elm, split, shuffled_vectors(split))
    losses["val_loss_shuffled"] = float(shuffled.nll.sum() / shuffled.num_tokens.sum())
    if with_text and split.index["has_text"].all():
        text = losses_by_texts(elm, split, own_texts(split))
        if text.num_tokens.all():
            losses["val_loss_text"] = float(text.nll.sum() / text.num_tokens.sum())
    elm.train(was_training)
    return losses


# Retrieval: the nearest of the texts that training knew, the baseline that an adapter has to beat


def nearest_rows(split: Split, row_ids: np.ndarray, train: Split, train_ids: np.ndarray,
                 device: torch.device) -> np.ndarray:
    """For each of `row_ids` [n] of a split the row of train, among the ascending `train_ids` [m],
    whose vector is nearest to its own by cosine: [n] int64. Where several rows have that vector, or
    several vectors are equally near, it is the first of all these rows. NO_ROW where m is 0."""
    if not len(train_ids):
        return np.full(len(row_ids), NO_ROW)
    vector_ids, first_places = np.unique(train.index["vector_id"][train_ids], return_index=True)
    first_rows = train_ids[first_places]
    query_ids, query_of_row = np.unique(split.index["vector_id"][row_ids], return_inverse=True)
    rows_of_queries = []
    for start in range(0, len(query_ids), QUERIES_AT_ONCE):
        queries = split.embeddings(query_ids[start : start + QUERIES_AT_ONCE])
        nearest = nearest_vectors(queries, train.vectors, vector_ids, first_rows, device)
        rows_of_queries.append(nearest.row_ids)
    return np.concatenate(rows_of_queries)[query_of_row]


class KnownRows(NamedTuple):
    """The rows of train that are nearest to those of a split, NO_ROW where there is none."""

    with_text: np.ndarray  # [N]
    with_answer: np.ndarray  # [samples]: with a text, and of the sample's task type


def find_known_rows(split: Split, train: Split, sample_ids: np.ndarray,
                    device: torch.device) -> KnownRows:
    """Of two splits of one config, whose index["task_id"] counts the same task types. The vectors
    of each task type are read again: one reading for all would need a mask of candidates for each
    sample, and the first row by vector and task type."""
    has_text = train.index["has_text"]
    all_ids = np.arange(len(split))
    with_text = nearest_rows(split, all_ids, train, np.flatnonzero(has_text), device)
    with_answer = np.full(len(sample_ids), NO_ROW)
    task_of_sample = split.index["task_id"][sample_ids]
    for task_id in np.unique(task_of_sample):
        is_of_task = task_of_sample == task_id
        train_ids = np.flatnonzero(has_text & (train.index["task_id"] == task_id))
        with_answer[is_of_task] = nearest_rows(
            split, sample_ids[is_of_task], train, train_ids, device)
    return KnownRows(with_text, with_answer)


class Retrieved(NamedTuple):
    nll: np.ndarray  # [N] by the nearest text, NaN where there is none or it does not fit
    texts: dict[int, str]  # the nearest text, by sampled row
    answers: dict[int, str]  # the nearest answer to the same task type, by sampled row


def retrieve(elm: ELM, split: Split, train: Split | None, sample_ids: np.ndarray) -> Retrieved:
    """What the rows of train with text give. Nothing where train is not there, or is the split
    itself. All processes take part; process 0 searches."""
    if train is None or train is split:
        return Retrieved(np.full(len(split), np.nan), {}, {})
    known = run_on_rank0(lambda: find_known_rows(split, train, sample_ids, elm.device))
    nll = nll_by_texts(elm, split, Texts(train, known.with_text), "nearest texts",
                       "loss_nearest and gain_over_nearest")
    texts = {}
    for i, row in read_known(train, sample_ids, known.with_text[sample_ids]):
        texts[i] = row.text
    answers = {}
    for i, row in read_known(train, sample_ids, known.with_answer):
        answers[i] = row.response
    return Retrieved(nll, texts, answers)


def read_known(train: Split, row_ids: np.ndarray,
               train_ids: np.ndarray) -> Iterator[tuple[int, Row]]:
    """The row of train [n] that belongs to each of `row_ids` [n], but for NO_ROW."""
    is_known = train_ids != NO_ROW
    return zip(row_ids[is_known].tolist(), train.read(train_ids[is_known]), strict=True)


# What the LLM has to do for a report


@dataclass
class Measured:
    """The LLM's part of a report, and what retrieval gives in its place."""

    losses: pd.DataFrame  # see measure_losses
    sample_ids: np.ndarray  # [samples], the rows that were answered
    answers: list[str]
    shuffled_answers: list[str]  # about other rows' vectors
    nearest_texts: dict[int, str]  # of train, by sampled row
    nearest_answers: dict[int, str]  # of train, to the same task type, by sampled row


def measure(elm: ELM, split: Split, train: Split | None, cfg: EvalConfig) -> Measured:
    """The losses of all rows, and the answers about some, by an ELM in eval mode. All processes
    take part, and get the same. Raises: UserError."""
    vector_ids = split.index["vector_id"]
    other_ids = shuffled_vectors(split)
    sample_ids = pick_samples(split, cfg.samples)
    retrieved = retrieve(elm, split, train, sample_ids)
    losses = measure_losses(elm, split, retrieved.nll, nll_by_own_texts(elm, split))

    answers = generate_answers(elm, split, sample_ids, vector_ids[sample_ids], cfg.max_new_tokens)
    shuffled_answers = generate_answers(
        elm, split, sample_ids, other_ids[sample_ids], cfg.max_new_tokens)
    return Measured(
        losses, sample_ids, answers, shuffled_answers, retrieved.texts, retrieved.answers)


def measure_losses(elm: ELM, split: Split, nll_nearest: np.ndarray,
                   nll_text: np.ndarray) -> pd.DataFrame:
    """A row for each of the split's: source, task, tokens, nll, nll_shuffled, nll_nearest,
    nll_text, by an ELM in eval mode. The last two [N] are given, NaN where there is none: they do
    not depend on the adapter. All processes take part."""
    pd = import_optional("pandas")
    own = losses_by_vectors(elm, split, split.index["vector_id"])
    shuffled = losses_by_vectors(elm, split, shuffled_vectors(split))
    return pd.DataFrame({
        "source": split.index["source_id"],
        "task": pd.Categorical.from_codes(split.index["task_id"], split.tasks),
        "tokens": own.num_tokens,
        "nll": own.nll,
        "nll_shuffled": shuffled.nll,
        "nll_nearest": nll_nearest,
        "nll_text": nll_text})


def pick_samples(split: Split, n: int) -> np.ndarray:
    """Up to n rows of the split, always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(len(split))[:n])


def generate_answers(elm: ELM, split: Split, row_ids: np.ndarray, vector_ids: np.ndarray,
                     max_new_tokens: int) -> list[str]:
    """Greedy answers to the queries of rows [n] about vectors [n]. All processes take part, by
    whole batches: answers are the same for any number of processes."""
    first_batch = rank()
    stride = world_size()
    if elm.lockstep:  # ZeRO 3: every process generates every answer
        first_batch = 0
        stride = 1
    size = REPORT_BATCH[elm.device.type]
    answers_of_batch: dict[int, list[str]] = {}
    starts = range(first_batch * size, len(row_ids), stride * size)
    for start in progress(starts, "answers"):
        queries = [row.query for row in split.read(row_ids[start : start + size])]
        embeddings = split.embeddings(vector_ids[start : start + size])
        answers_of_batch[start] = elm.answer_batch(embeddings, queries, max_new_tokens)
    if stride > 1:
        gathered: list[dict[int, list[str]] | None] = [None] * stride
        torch.distributed.all_gather_object(gathered, answers_of_batch)
        for part in gathered:
            answers_of_batch |= part
    answers = []
    for start in sorted(answers_of_batch):
        answers += answers_of_batch[start]
    return answers


# The scorer and the embedder


def scorer_layers(cfg: EvalConfig) -> int:
    """The layer of the scorer's hidden states, from its config alone: the one set, else the one
    that bert-score chose for this model, else the last, with a warning. Raises: UserError if the
    config cannot be loaded, or has fewer layers."""
    from transformers import AutoConfig

    name = cfg.bertscore_model
    config = load_pretrained(AutoConfig, name, "eval.bertscore_model")
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is None:  # of text and images, say
        raise UserError(f"eval.bertscore_model = {name}: bert-score cannot use a model of type "
                        f"{config.model_type}: its config has no num_hidden_layers; give a model "
                        "of text")
    layers = cfg.bertscore_layers
    if layers is None:
        layers = known_scorer_layers(name, num_layers)
    if layers is None:
        warn_once(f"eval.bertscore_model = {name}: bert-score knows no layer for it, so its last, "
                  f"{num_layers}, is taken; set eval.bertscore_layers")
        layers = num_layers
    if layers > num_layers:
        raise UserError(f"eval.bertscore_layers = {layers}: {name} has {num_layers} layers")
    return layers


def known_scorer_layers(name: str, num_layers: int) -> int | None:
    """The layer that bert-score chose for a model of `num_layers`, a hub name or a folder, by the
    last part of its name: of the folder, of the link's target, or of what its config was saved
    from. None: bert-score knows no model of this name, or only one with more layers."""
    layers_of_model = import_optional("bert_score").utils.model2layers
    names = [name, os.path.realpath(name)]
    config = Path(name) / "config.json"
    if config.is_file():
        saved_from = parse_json(config.read_bytes()).get("_name_or_path")
        names.append(str(saved_from or ""))
    for candidate in names:
        model = last_part(candidate)
        layers = {n for known, n in layers_of_model.items() if last_part(known) == model}
        if len(layers) == 1 and max(layers) <= num_layers:
            return max(layers)
    return None


def load_scorer(cfg: EvalConfig, device: torch.device | str) -> BERTScorer:
    """bert-score's scorer in fp32. Raises: UserError.

    bert-score 0.3.13 leaves no other way than its private attributes to mend what it does under
    transformers 5: it fails at a tokenizer without a length, and drops the space before the first
    word at byte-level ones.
    """
    from transformers import AutoTokenizer

    key = "eval.bertscore_model"
    name = cfg.bertscore_model
    layers = scorer_layers(cfg)
    bert_score = import_optional("bert_score")
    announce_download(name, key)
    with report_load_errors(name, key):
        scorer = bert_score.BERTScorer(name, num_layers=layers, device=str(device))
    scorer._model.float()
    byte_level = (bert_score.utils.GPT2Tokenizer, bert_score.utils.RobertaTokenizer)
    if isinstance(scorer._tokenizer, byte_level):
        scorer._tokenizer = load_pretrained(AutoTokenizer, name, key, add_prefix_space=True)
    if scorer._tokenizer.model_max_length > 10**9:  # unknown
        positions = getattr(scorer._model.config, "max_position_embeddings", None) or 512
        scorer._tokenizer.model_max_length = positions - 2  # RoBERTa reserves two positions
    return scorer


def load_embedder(name: str, bf16: bool, device: torch.device | str, key: str = "eval.embedder",
                  max_tokens: int | None = None) -> SentenceTransformer:
    """A model of sentence-transformers: hub name or folder. `key` names it in messages. Texts are
    cut after max_tokens; None: what the model reads. Raises: UserError."""
    library = import_optional("sentence_transformers")
    folder = Path(name)
    if folder.is_dir() and not (folder / "modules.json").is_file():
        raise UserError(f"{key}: cannot load {name}: without modules.json, the library would take "
                        "mean pooling; add this file and 1_Pooling/config.json, as in "
                        "data/tiny/embedder")
    announce_download(name, key)
    dtype = torch.bfloat16 if bf16 else torch.float32
    with report_load_errors(name, key):
        model = library.SentenceTransformer(
            name, device=str(device), local_files_only=folder.is_dir(), trust_remote_code=False,
            model_kwargs={"dtype": dtype})
    limit_tokens(model, model.max_seq_length, max_tokens)
    return model


def limit_tokens(model: SentenceTransformer, own_limit: float | None,
                 max_tokens: int | None) -> None:
    """Let a model cut texts after max_tokens, or its own limit, if that is less. One without a
    limit (None or infinite), such as a static one, reads whole texts: it cannot be given one."""
    if own_limit is not None and own_limit != math.inf:
        model.max_seq_length = min(own_limit, max_tokens or own_limit)


def instruction_prompt(instruction: str | None) -> str | None:
    """What stands before a text, as Qwen3-Embedding takes it; None: the model's default."""
    return f"Instruct: {instruction}\nQuery:" if instruction else None


def embed_texts(model: SentenceTransformer, texts: list[str], **options: Any) -> Tensor:
    """n texts -> unit vectors [n, width] fp32 on the CPU. `options` are those of model.encode."""
    vectors = model.encode(texts, convert_to_tensor=True, show_progress_bar=False, **options)
    return F.normalize(vectors.float().cpu(), dim=1)


def embedding_function(model: SentenceTransformer, origin: VectorOrigin,
                       width: int) -> Callable[[list[str]], Tensor]:
    """That of n texts to unit vectors [n, width], as those of `origin` were made."""
    prompt = instruction_prompt(origin.instruction)
    return functools.partial(embed_texts, model, truncate_dim=width, prompt=prompt)


def check_embedder_width(model: SentenceTransformer, name: str, width: int) -> None:
    """Raises: UserError if a model's vectors are narrower than those that it is to be compared
    with. Wider ones are cut."""
    full_width = model.get_embedding_dimension() or width
    if full_width < width:
        raise UserError(f"{name} makes vectors of width {full_width}, not of {width} as the "
                        "table's; name the model that made these")


def compare_embedder(name: str, bf16: bool, device: torch.device,
                     splits: dict[str, Split]) -> None:
    """Embed some texts of each split, as its table says, and compare with their stored vectors. The
    model is freed again. Raises: UserError if its vectors are narrower, or far from the stored
    ones."""
    model = load_embedder(name, bf16, device)
    own_limit = model.max_seq_length
    for split_name, split in splits.items():
        origin = split.origin
        width = split.vectors.shape[1]
        check_embedder_width(model, f"eval.embedder: {name}", width)
        if origin.model and last_part(origin.model) != last_part(name):
            log.warning(f"eval.embedder = {name}: {split.table_path} says that {origin.model} made "
                        "its vectors")
        row_ids = np.flatnonzero(split.index["has_text"])
        row_ids = np.sort(np.random.default_rng(0).permutation(row_ids)[:EMBEDDER_CHECK_TEXTS])
        if not len(row_ids):
            continue
        limit_tokens(model, own_limit, origin.max_tokens)
        texts = [row.text for row in split.read(row_ids)]
        vectors = embed_texts(
            model, texts, truncate_dim=width, prompt=instruction_prompt(origin.instruction))
        check_stored_vectors(name, vectors, split_name, split, row_ids)
    del model
    free_memory()


def check_stored_vectors(name: str, vectors: Tensor, split_name: str, split: Split,
                         row_ids: np.ndarray) -> None:
    """Compare the vectors [n, E] that embedder `name` makes of the texts of rows with their stored
    ones: a warning where they differ. Raises: UserError where these are far, or where other rows'
    are nearer: vectors of some embedders have cosines of .8 with each other."""
    stored = split.embeddings(split.index["vector_id"][row_ids])
    cosines = F.normalize(vectors, dim=1) @ F.normalize(stored, dim=1).T
    own = cosines.diagonal()
    source_ids = split.index["source_id"][row_ids]
    is_own = torch.from_numpy(source_ids[:, None] == source_ids)
    nearest_other = cosines.masked_fill(is_own, -1.0).max(1).values
    share_nearest = (own > nearest_other).float().mean().item()
    cosine = own.mean().item()
    told = (f"mean cosine {cosine:.4f} with the stored vectors of {len(row_ids)} texts of "
            f"{split_name}, {share_nearest:.0%} of them nearest to their own")
    log.info(f"eval.embedder: {told}")
    if cosine < 0.5 or share_nearest < 0.25:
        raise UserError(
            f"data.dir: {split.table_path} is in another order than the rows of {split.path}, or "
            f"eval.embedder = {name} did not make it ({told}); mend the data, or set eval.embedder "
            "to the model that made it, or off")
    if cosine < 0.95 or share_nearest < 0.9:
        log.warning(f"eval.embedder = {name} does not make the vectors of {split.path}, or some "
                    "stand in other rows' places; its consistency and MRR mean little")


def choose_embedder(cfg: EvalConfig, origin: VectorOrigin) -> str | None:
    """The model that embeds answers again: the one set, else the one that made the vectors, if it
    is known, else none."""
    if cfg.embedder == OFF:
        return None
    return cfg.embedder or origin.model


def check_embedder(cfg: EvalConfig, bf16: bool, device: torch.device,
                   splits: dict[str, Split]) -> None:
    """Compare the embedder that the report will use, on process 0. All processes take part. Raises:
    UserError."""
    # Where one split's origin names a model, all do: see name_origins.
    origin = next(iter(splits.values())).origin
    name = choose_embedder(cfg, origin)
    if cfg.samples and name:
        run_on_rank0(lambda: compare_embedder(name, bf16, device, splits))


# Scores of answers


class BertScores(NamedTuple):
    """[n] each."""

    bertscore_precision: np.ndarray
    bertscore_recall: np.ndarray
    bertscore_f1: np.ndarray
    bertscore_composite: np.ndarray  # 0.3 precision + 0.3 recall + 0.4 F1


def bert_scores(scorer: BERTScorer, texts: list[str], references: list[str]) -> BertScores:
    """BERTScore (Zhang et al., 2020) of n texts. An empty text scores 0. One pair at a time: in a
    batch, bert-score counts padding as a similarity of 0."""
    precision = np.zeros(len(texts))
    recall = np.zeros(len(texts))
    f1 = np.zeros(len(texts))
    pairs = list(zip(texts, references, strict=True))
    for i, (text, reference) in enumerate(progress(pairs, "scores")):
        if text.strip() and reference.strip():
            scores = scorer.score([text], [reference], batch_size=1)
            precision[i], recall[i], f1[i] = (score.item() for score in scores)
    return BertScores(precision, recall, f1, 0.3 * precision + 0.3 * recall + 0.4 * f1)


class ConsistencyScores(NamedTuple):
    """[n] each."""

    consistency: np.ndarray  # cosine of the text's vector with the row's
    mrr: np.ndarray  # by it, the reciprocal rank of the row's source among all sources
    top1: np.ndarray  # whether that rank is 1


def consistency_scores(texts: list[str], embed: Callable[[list[str]], Tensor], split: Split,
                       row_ids: np.ndarray) -> ConsistencyScores:
    """Semantic consistency (Tennenholtz et al., 2024) of n texts, which `embed` maps to unit
    vectors, with the vectors of rows [n]. Among split.sources, the first vector of each stands for
    it; a near copy of the row's vector does not outrank it. An empty text scores 0."""
    result = ConsistencyScores(np.zeros(len(texts)), np.zeros(len(texts)), np.zeros(len(texts)))
    filled = [i for i, text in enumerate(texts) if text.strip()]
    if not filled:
        return result
    rows = split.index[row_ids[filled]]
    answers = embed([texts[i] for i in filled])
    own = F.normalize(split.embeddings(rows["vector_id"]), dim=1)
    own_source = torch.from_numpy(rows["source_id"].astype(np.int64))[:, None]
    cosine = (answers * own).sum(1)
    rank_of_source = torch.ones(len(filled), dtype=torch.float32)
    for ids in torch.from_numpy(split.sources).split(8192):
        others = F.normalize(split.vectors[ids].float(), dim=1)
        is_other = (ids != own_source) & (own @ others.T <= NEAR_EQUAL)
        rank_of_source += (is_other & (answers @ others.T > cosine[:, None])).sum(1)
    result.consistency[filled] = cosine
    result.mrr[filled] = 1 / rank_of_source
    result.top1[filled] = rank_of_source == 1
    return result


# Letters of scripts that put no spaces between words: Thai, Lao, Tibetan; Burmese; Khmer; kana and
# Han with their marks of repetition.
NO_SPACES = (
    "\u0e00-\u0fff\u1000-\u109f\uaa60-\uaa7f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af")  # fmt: skip
WORDS = re.compile(f"(?P<no_spaces>[{NO_SPACES}]+)|[^\\s{NO_SPACES}]+")
LONGEST_WORD = 30  # characters; what is longer is taken as without spaces, such as "!!!!…"


def split_words(text: str) -> list[str]:
    """The words of a text, as spaces divide them; in scripts without spaces, and in what is longer
    than a word, the pairs of adjacent characters instead. Single characters would not do: two Thai
    texts have nearly the same."""
    words = []
    for match in WORDS.finditer(text):
        run = match[0]
        has_no_words = match["no_spaces"] or len(run) > LONGEST_WORD
        if has_no_words and len(run) > 1:
            words += map("".join, itertools.pairwise(run))
        else:
            words.append(run)
    return words


def repetition(text: str) -> float:
    """The share of the trigrams of a text's words (split_words) that occurred in it before."""
    words = split_words(text)
    trigrams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


class FormScores(NamedTuple):
    """[n] each."""

    empty_rate: list[float]  # 1 of a text that is empty
    repetition: list[float]


def form_scores(texts: list[str]) -> FormScores:
    return FormScores([float(not text.strip()) for text in texts],
                      [repetition(text) for text in texts])


def score(measured: Measured, references: list[str], split: Split, cfg: EvalConfig, bf16: bool,
          device: torch.device) -> pd.DataFrame:
    """The scores of the answers, a row for each of measured.sample_ids: BertScores, unless they are
    off, and FormScores of the answers and, as NAME_shuffled, of those about shuffled vectors, as
    NAME_nearest, of the nearest ones of train, NaN where there is none; with an embedder
    ConsistencyScores of these and, as NAME_reference, of the references. The embedder runs in bf16,
    if asked for. Each model is freed after its use."""
    pd = import_optional("pandas")
    sample_ids = measured.sample_ids.tolist()
    reference_of = dict(zip(sample_ids, references, strict=True))
    answers = {  # by suffix, by row
        "": dict(zip(sample_ids, measured.answers, strict=True)),
        "_shuffled": dict(zip(sample_ids, measured.shuffled_answers, strict=True))}
    if measured.nearest_answers:
        answers["_nearest"] = measured.nearest_answers
    scores = pd.DataFrame(index=sample_ids)
    scorer = None if cfg.bertscore_model == OFF else load_scorer(cfg, device)
    for suffix, answer_of in answers.items():
        row_ids = list(answer_of)
        texts = list(answer_of.values())
        values_of = {}
        if scorer is not None:
            values_of |= bert_scores(scorer, texts, [reference_of[i] for i in row_ids])._asdict()
        values_of |= form_scores(texts)._asdict()
        scores = scores.join(pd.DataFrame(values_of, row_ids).add_suffix(suffix))
    del scorer
    free_memory()
    name = choose_embedder(cfg, split.origin)
    if name is None:
        return scores

    model = load_embedder(name, bf16, device, max_tokens=split.origin.max_tokens)
    embed = embedding_function(model, split.origin, split.vectors.shape[1])
    texts_of_suffix = answers | {"_reference": reference_of}
    for suffix, text_of in texts_of_suffix.items():
        row_ids = np.array(list(text_of))
        texts = list(text_of.values())
        values_of = consistency_scores(texts, embed, split, row_ids)._asdict()
        scores = scores.join(pd.DataFrame(values_of, row_ids).add_suffix(suffix))
    del model, embed
    free_memory()
    return scores


# The summary


class Ratio(NamedTuple):
    """A measure: one sum over rows divided by another."""

    name: str
    numerator: str  # columns of summands()
    denominator: str
    needs_text: bool = False  # is left out unless reads_texts()


RATIOS = (
    Ratio("loss", "nll", "tokens"),
    Ratio("loss_shuffled", "nll_shuffled", "tokens"),
    Ratio("gap", "gap", "tokens"),
    Ratio("loss_nearest", "nll_nearest", "tokens_nearest"),
    Ratio("gain_over_nearest", "gain_over_nearest", "tokens_nearest"),
    Ratio("loss_text", "nll_text", "tokens_text"),
    Ratio("gap_closed", "gap_with_text", "gap_text", needs_text=True))
FEWEST_SOURCES = 30  # gap_closed of fewer is called unreliable
FEWEST_ROWS = 10  # with text, of a task type; it has no gap_closed of fewer


def unread_tasks(losses: pd.DataFrame) -> list[str]:
    """The task types that gap_closed leaves out: the LLM reads their text no better than another
    row's vector. That is said of a type, by the sum over its rows, never of a single row: to choose
    rows by their own loss would bias the measure."""
    losses = losses[losses["nll_text"].notna()]
    gap = losses["nll_shuffled"] - losses["nll_text"]
    by_task = gap.groupby(losses["task"], observed=True)
    is_unread = (by_task.sum() <= 0) & (by_task.size() > 1)
    return is_unread.index[is_unread].tolist()


def summands(losses: pd.DataFrame, scores: pd.DataFrame | None) -> pd.DataFrame:
    """The summands of RATIOS and scores, by row; losses and scores that a row does not have are
    NaN, which a sum leaves out. Those of gap_closed are 0 in rows of unread_tasks or without text.
    num_NAME is 1 in rows that have the score NAME."""
    columns = losses.drop(columns="task")
    has_text = losses["nll_text"].notna()
    is_read = has_text & ~losses["task"].isin(unread_tasks(losses))
    gap = losses["nll_shuffled"] - losses["nll"]
    gap_text = losses["nll_shuffled"] - losses["nll_text"]
    columns = columns.assign(
        tokens_text=losses["tokens"] * has_text,
        tokens_nearest=losses["tokens"] * losses["nll_nearest"].notna(),
        gap=gap,
        gain_over_nearest=losses["nll_nearest"] - losses["nll"],
        gap_with_text=gap.where(is_read, 0.0),
        gap_text=gap_text.where(is_read, 0.0))
    if scores is not None:
        is_scored = scores.notna().astype(float)
        columns = columns.join(scores).join(is_scored.add_prefix("num_"))
    return columns


def resampled_sums(sums: np.ndarray, num_resamples: int) -> np.ndarray:
    """Bootstrap (Efron, 1979): sums [n, columns] of n sources, drawn with replacement -> the total
    of each resample [num_resamples, columns]."""
    n = len(sums)
    rng = np.random.default_rng(0)
    resamples_at_once = max(1, 10**6 // n)  # each is a row of n counts
    totals = []
    for start in range(0, num_resamples, resamples_at_once):
        size = min(resamples_at_once, num_resamples - start)
        counts = rng.multinomial(n, np.full(n, 1 / n), size)
        totals.append(counts @ sums)
    return np.concatenate(totals)


def reads_texts(losses: pd.DataFrame, num_resamples: int) -> bool:
    """Whether the LLM reads the texts of some task types better than other rows' vectors. By a
    bootstrap test at 2.5 %, of the sum over the task types whose own sum is positive: as they are
    chosen by their sums, it is compared with what the same choice makes of resamples that are
    centred at 0 (Hall & Wilson, 1991)."""
    gap = losses["nll_shuffled"] - losses["nll_text"]
    by_source = gap.groupby([losses["source"], losses["task"]], observed=True).sum()
    sums = by_source.unstack(fill_value=0.0).to_numpy()  # [sources, task types]
    totals = sums.sum(0)
    centred = resampled_sums(sums, num_resamples) - totals
    by_chance = centred.clip(min=0).sum(1)
    return bool(totals.clip(min=0).sum() > np.percentile(by_chance, 97.5))


def summarize(losses: pd.DataFrame, scores: pd.DataFrame | None = None,
              num_resamples: int = 1000) -> Json:
    """RATIOS and mean scores over rows (see Measured and score), with bootstrap 95 % intervals:
    sources are drawn with replacement, with all their rows. gap_closed is over the rows with text
    whose task is not among unread_tasks, and left out unless reads_texts(). gain_over_nearest, the
    loss by the nearest text less that by the vector, is over the rows that have both. `sources`
    counts the sources, `sources_text` those of the rows with text; `samples` the rows with scores,
    `samples_nearest` those with scores of a nearest answer."""
    has_text = losses["nll_text"].notna()
    result: Json = {
        "rows": len(losses),
        "rows_text": int(has_text.sum()),
        "rows_nearest": int(losses["nll_nearest"].notna().sum()),
        "sources": losses["source"].nunique(),
        "sources_text": losses["source"][has_text].nunique()}
    measures = list(RATIOS)
    if scores is not None:
        result["samples"] = int(losses.index.isin(scores.index).sum())
        has_nearest = scores.filter(regex="_nearest$").notna().any(axis=1)
        result["samples_nearest"] = int(has_nearest.sum())
        measures += [Ratio(name, name, f"num_{name}") for name in scores.columns]

    by_source = summands(losses, scores).groupby("source").sum()
    totals = by_source.sum()
    resamples = resampled_sums(by_source.to_numpy(), num_resamples)
    resampled = {name: resamples[:, i] for i, name in enumerate(by_source.columns)}

    intervals = {}
    for measure in measures:
        numerator = measure.numerator
        denominator = measure.denominator
        if totals[denominator] <= 0:
            continue
        if measure.needs_text and not reads_texts(losses, num_resamples):
            continue
        result[measure.name] = float(totals[numerator] / totals[denominator])
        if len(by_source) > 1 and (resampled[denominator] > 0).all():
            ratios = resampled[numerator] / resampled[denominator]
            intervals[measure.name] = np.percentile(ratios, (2.5, 97.5)).tolist()
    result["intervals"] = intervals
    return result


# The report


def write_report(measured: Measured, split: Split, cfg: Config, device: torch.device, folder: Path,
                 run_name: str, metrics: list[Json], header: Json) -> Json:
    """Score the answers, write predictions.jsonl, eval.json and report.png into `folder`, print the
    table, and return the dict of eval.json, which begins with `header`. `metrics` are those
    of the training. On process 0 alone."""
    rows = split.read(measured.sample_ids)
    predictions = list_predictions(rows, measured)
    # Before the scores, which may fail.
    write_text(folder / "predictions.jsonl", jsonl(predictions))
    scores = None
    if predictions:
        references = [row.response for row in rows]
        scores = score(measured, references, split, cfg.eval, cfg.model.bf16, device)
    result = header | summarize(measured.losses, scores)
    result["tasks_left_out"] = unread_tasks(measured.losses)
    result["tasks"] = summarize_tasks(measured.losses, scores)
    write_text(folder / "eval.json", json.dumps(result, indent=1) + "\n")

    picture = folder / "report.png"
    with drawing(picture):
        plot_report(picture, metrics, run_name, result)
    print_report(result, predictions, metrics)
    log.info(report_line("files", folder))
    adapter = folder / "adapter_best.safetensors"
    if predictions and adapter.exists():
        table = vectors_path(cfg.data.dir, result["split"])
        print_next_command(adapter, table, predictions[0])
    return result


def list_predictions(rows: list[Row], measured: Measured) -> list[Json]:
    """The lines of predictions.jsonl, of the rows that were answered."""
    predictions = []
    answers = zip(measured.sample_ids.tolist(), rows, measured.answers, measured.shuffled_answers,
                  strict=True)
    for row_id, row, answer, shuffled_answer in answers:
        prediction = {
            "task_type": row.task_type,
            "embedding_file_idx": row.embedding_file_idx,
            "query": row.query,
            "response": row.response,
            "prediction": answer,
            "prediction_shuffled": shuffled_answer}
        if row_id in measured.nearest_answers:
            prediction["prediction_nearest"] = measured.nearest_answers[row_id]
        if row.text:
            prediction["text"] = row.text
        if row_id in measured.nearest_texts:
            prediction["text_nearest"] = measured.nearest_texts[row_id]
        predictions.append(prediction)
    return predictions


def summarize_tasks(losses: pd.DataFrame, scores: pd.DataFrame | None) -> Json:
    """summarize() of the rows of each task type, without gap_closed where few rows have text."""
    summaries = {}
    for task, losses_of_task in losses.groupby("task", observed=True):
        scores_of_task = None
        if scores is not None:
            scores_of_task = scores[scores.index.isin(losses_of_task.index)]
        summary = summarize(losses_of_task, scores_of_task)
        if summary["rows_text"] < FEWEST_ROWS:
            summary.pop("gap_closed", None)
            summary["intervals"].pop("gap_closed", None)
        summaries[task] = summary
    return summaries


def gap_closed(loss: float, loss_shuffled: float, loss_text: float) -> float | None:
    """None where the LLM reads the text no better than another row's vector."""
    if loss_shuffled <= loss_text:
        return None
    return (loss_shuffled - loss) / (loss_shuffled - loss_text)


def describe_gap(result: Json, metrics: list[Json]) -> str:
    """The gap closed of a report, and on the validation split at its first and last validation,
    unless the report is on it, or leaves out tasks: the losses on validation are of all."""
    if "gap_closed" in result:
        text = f"{result['gap_closed']:.4f} on {result['split']}"
        if result["sources_text"] < FEWEST_SOURCES:
            text += f", not reliable: of {result['sources_text']} vectors"
    elif result["rows_text"] == 0:
        text = "none: no row has a text, or one that fits data.max_seq_length"
    else:
        text = "none: this LLM reads no task's text surely better than another row's vector"
    if result["tasks_left_out"] or result["split"] == "val":
        return text
    validations = [entry for entry in metrics if {"val_loss", "val_loss_shuffled"} <= entry.keys()]
    ceilings = [entry["val_loss_text"] for entry in validations if "val_loss_text" in entry]
    if not ceilings:
        return text
    shares = []
    for entry in validations:
        share = gap_closed(entry["val_loss"], entry["val_loss_shuffled"], ceilings[0])
        if share is not None:
            shares.append(f"{share:.4f} at step {entry['step']}")
    if len(shares) > 1:
        text += f"; on val {shares[0]}, {shares[-1]}"
    return text


def describe_nearest(result: Json) -> str:
    """That the adapter does not beat the nearest text of train; nothing where it surely does, or
    where the difference has no interval: there is no such text, or of too few sources."""
    if "gain_over_nearest" not in result["intervals"]:
        return ""
    gain = result["gain_over_nearest"]
    low, high = result["intervals"]["gain_over_nearest"]
    if low > 0:
        return ""
    surely = "surely " if gain > 0 else ""
    loss_nearest = result["loss_nearest"]
    return (f"the adapter does not {surely}beat retrieval: the loss by the text of the nearest "
            f"training vector is {loss_nearest:.4f}, by the row's vector {loss_nearest - gain:.4f} "
            f"(95 % interval of the difference: {low:.4f} to {high:.4f})")


LOSS_COLORS = {
    "loss": "0.6", "val_loss_shuffled": "tab:red", "val_loss": "tab:blue",
    "val_loss_text": "tab:green"}
TASK_LOSS_COLORS = {
    "loss_shuffled": "tab:red", "loss_nearest": "tab:orange", "loss": "tab:blue",
    "loss_text": "tab:green"}


@contextlib.contextmanager
def drawing(path: Path) -> Iterator[None]:
    """For what draws and saves the picture at `path`. A $ in a name is a $, and begins no
    formula. A picture never ends a run: what matplotlib raises, or a full disk, is a warning."""
    try:
        settings = {"text.parse_math": False, "text.usetex": False}
        with (import_optional("matplotlib").rc_context(settings),
              warnings.catch_warnings(record=True) as found):
            yield
    except Exception as e:
        if is_raised_here(e) and not isinstance(e, UserError):
            raise
        log.warning(f"{path.name} is left out: {clip(str(e) or repr(e))}")
        return
    for warning in found:
        if str(warning.message).startswith("Glyph"):  # one for each character
            warn_once("report.png: matplotlib's font lacks some characters of the names, which are "
                      "drawn as boxes; name another as font.family in a matplotlibrc")


def plot_report(path: Path, metrics: list[Json], name: str,
                result: Json | None = None) -> None:
    """report.png: the losses over the steps, if there were any, and, with the dict of eval.json,
    those of each task at the end."""
    figure_class = import_optional("matplotlib.figure").Figure
    num_panels = 2 if metrics and result else 1
    figure = figure_class((6.5 * num_panels, 6), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    if metrics:
        plot_curves(panels[0], metrics, name)
    if result:
        plot_tasks(panels[-1], result)
        figure.suptitle(f"gap closed: {describe_gap(result, metrics)}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def plot_curves(axes: Axes, metrics: list[Json], name: str) -> None:
    pd = import_optional("pandas")
    curves = pd.DataFrame(metrics, columns=["step", *LOSS_COLORS]).astype(float).set_index("step")
    curves["val_loss_text"] = curves["val_loss_text"].max()  # measured once
    for key, color in LOSS_COLORS.items():
        is_measured_often = key in ("val_loss_shuffled", "val_loss")
        curves[key].dropna().plot(ax=axes, color=color, marker="o" if is_measured_often else " ")
    axes.set(ylabel="loss per response token", ylim=(0, None), title=name)
    axes.legend()


def plot_tasks(axes: Axes, result: Json) -> None:
    pd = import_optional("pandas")
    keys = [key for key in TASK_LOSS_COLORS if key in result]
    names = []
    for task, summary in result["tasks"].items():
        is_small = summary["rows"] < FEWEST_ROWS
        names.append(f"{task} ({summary['rows']} rows)" if is_small else task)
    tasks = pd.DataFrame(list(result["tasks"].values()), names, keys)
    mrr = f", MRR {result['mrr']:.2f}" if "mrr" in result else ""
    tasks.plot.barh(
        ax=axes, color=[TASK_LOSS_COLORS[key] for key in keys], width=0.8,
        xlabel="loss per response token", title=f"{result['split']}, {result['rows']} rows{mrr}")
    axes.invert_yaxis()


# 61 characters, which leave 19 for the names of tasks.
REPORT_COLUMNS = {
    "rows": Column("rows", 6, "d"),
    "loss_shuffled": Column("shuffled", 8, ".3f"),
    "loss_nearest": Column("nearest", 7, ".3f"),
    "loss": Column("vector", 7, ".3f"),
    "loss_text": Column("text", 6, ".3f"),
    "gap_closed": Column("gap", 6, ".3f"),
    "bertscore_composite": Column("BERTScore", 9, ".3f"),
    "mrr": Column("MRR", 5, ".3f")}
FEWEST_SAMPLES = 20  # a mean of fewer answers says little
LINES_OF_A_SAMPLE = 4  # of its text, of its answer, at most
KEY_WIDTH = 21  # of the longest key, a colon and a space


def print_report(result: Json, predictions: list[Json],
                 metrics: list[Json]) -> None:
    """Five answers beside their texts and references, the table, and lines of `key: value`, all
    within the console's width."""
    lines = [""]
    stride = max(1, len(predictions) // 5)
    for p in predictions[::stride][:5]:
        lines.append(clip(f"{p['task_type']}: {p['query']}", CONSOLE_WIDTH))
        if "text" in p:
            lines.append(labelled("text", p["text"], LINES_OF_A_SAMPLE))
        lines.append(labelled("reference", p["response"], LINES_OF_A_SAMPLE))
        lines.append(labelled("answer", p["prediction"], LINES_OF_A_SAMPLE))

    nearest = ", the nearest training text" if "loss_nearest" in result else ""
    title = (f"losses per response token by another row's vector (shuffled){nearest}, the row's "
             "vector and its text")
    lines += ["", textwrap.fill(title, CONSOLE_WIDTH), *report_table(result), ""]

    left_out = result["tasks_left_out"]
    if left_out:
        sentence = (f"left out of the gap: {len(left_out)} of {len(result['tasks'])} task types, "
                    "whose text the LLM reads no better than another row's vector: "
                    f"{', '.join(left_out)}")
        lines.append(textwrap.fill(sentence, CONSOLE_WIDTH))
    told_of_nearest = describe_nearest(result)
    if told_of_nearest:
        lines.append(textwrap.fill(told_of_nearest, CONSOLE_WIDTH))

    gap = report_line("gap_closed", describe_gap(result, metrics))
    lines.append(textwrap.fill(gap, CONSOLE_WIDTH, subsequent_indent=" " * KEY_WIDTH))
    for key in REPORT_COLUMNS:
        if key in result and key not in ("rows", "gap_closed"):
            lines.append(report_line(key, f"{result[key]:.4f}"))
    if result["step"] is not None:  # else saved by ELM.save
        lines.append(report_line("steps", result["step"]))
        lines.append(report_line("adapter_step", result["adapter_step"]))
    log.info("\n".join(lines))


def report_line(key: str, value: object) -> str:
    return f"{key + ':':{KEY_WIDTH}}{value}"


def report_table(result: Json) -> list[str]:
    """The lines of all rows, of half the width of their intervals, and of each task, the best gap
    first."""
    columns = {key: column for key, column in REPORT_COLUMNS.items() if key in result}
    half_widths = {key: (high - low) / 2 for key, (low, high) in result["intervals"].items()}
    by_gap = sorted(result["tasks"].items(),
                    key=lambda item: item[1].get("gap_closed", -math.inf), reverse=True)
    table_rows = {"all": result, "± 95 %": half_widths}
    for task, values in by_gap:
        if values.get("samples", 0) < FEWEST_SAMPLES:
            values = values | {"bertscore_composite": None, "mrr": None}
        table_rows[task] = values
    width = max(len(name) for name in table_rows)
    lines = [" " * width + table_header(columns)]
    for name, values in table_rows.items():
        lines.append(name.ljust(width) + table_line(columns, values))
    return lines


def print_next_command(adapter: Path, table: Path, prediction: Json) -> None:
    row = prediction["embedding_file_idx"]  # any other may be a zero vector that no row uses
    words = [f"adapter={adapter}", f"embeddings={table}", f"rows=[{row}]",
             f"query={prediction['query']}"]
    log.info(report_line("next", f"{own_program()} generate {shlex.join(words)}"))


def own_program() -> str:
    """As the user calls it: installed, it is a command of its own."""
    return "elm" if Path(sys.argv[0]).name == "elm" else "python elm.py"


# -----------------------------------------------------------------------------
# Answers
#
# Engines that answer queries about texts, in this process or by a server, and the file that keeps
# what they answered.

SERVER_RETRIES = 5  # of a request, after waits that grow to eight seconds
LONGEST_RETRY_AFTER = 3600  # seconds that a server may let a request wait, all in all
# Statuses of a request that are about its text: it is too long, or a content filter stops it.
REFUSAL_STATUSES = (400, 413, 422, 451)


@dataclass(frozen=True)
class Question:
    query: str  # the text takes the place of the vector in it
    text: str


class LLMEngine:
    """Answers by an LLM in this process, from the prompts of the text ceiling."""

    num_threads = 1  # that may call `answer` at a time

    def __init__(self, model: str, bf16: bool, template: Json, max_new_tokens: int,
                 quantization: Quantization = "off"):
        """Loads the LLM. Raises: UserError."""
        self.max_new_tokens = max_new_tokens
        tokenizer = load_tokenizer(model, "model")
        self.llm = load_llm(model, find_device(), bf16, "model", quantization=quantization)
        choose_kernels(self.llm)
        self.prompt = Prompt(tokenizer, template)
        self.prompt.check_fits(self.llm)
        self.batch_size = GENERATION_BATCH[self.llm.device.type]  # questions of a call
        dtype = "bf16" if bf16 else "fp32"
        self.name = f"{weights_hash(self.llm)} {self.prompt.ids_hash()} {dtype}"

    @torch.no_grad()
    def answer(self, questions: list[Question], seed: int, temperature: float) -> list[Answer]:
        """Texts are cut at the LLM's limit. Raises: UserError if that leaves no room."""
        room = max_positions(self.llm) - self.max_new_tokens
        if room < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens} leaves no room for a prompt")
        rows = [Row.model_construct(query=q.query, text=q.text, response="") for q in questions]
        names = [f"model: {q.text[:50]!r}" for q in questions]
        limit_name = "the LLM's context less max_new_tokens"
        encoder = Encoder(self.prompt, 0, room, limit_name)
        embed = self.llm.get_input_embeddings()
        prompt_embeds = []
        for example in encoder.encode(rows, names, "text"):
            if example.truncated:
                warn_once(f"model: the LLM reads {room} tokens of a prompt beside an answer of "
                          f"{self.max_new_tokens}: longer texts are cut")
            # Without the labels: the response is empty, but the template ends it.
            ids = torch.from_numpy(example.ids[: -example.num_labels])
            prompt_embeds.append(embed(ids.to(self.llm.device)))
        options = {"temperature": temperature} if temperature else {}
        torch.manual_seed(seed)
        return generate_batch(self.llm, self.prompt, prompt_embeds, self.max_new_tokens, **options)


class Reply(NamedTuple):
    """Of a server to one question."""

    answer: Answer
    num_prompt_tokens: int | None  # as the server counts them, if it says so


class ChatServer:
    """An OpenAI-compatible server. The client retries what may pass, and takes its key from
    OPENAI_API_KEY. Several threads may use one."""

    def __init__(self, endpoint: str, model: str, template: Json, max_new_tokens: int):
        """`endpoint` is the address below which it has chat/completions, mostly ending in /v1;
        `model` its name for the LLM. Raises: UserError if the client is not installed."""
        self.endpoint = endpoint
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.extra_body = {}
        if template:  # as vLLM and SGLang take it
            self.extra_body["chat_template_kwargs"] = template
        self._openai = import_optional("openai")
        self._client = self._openai.OpenAI(
            base_url=endpoint, api_key=os.environ.get("OPENAI_API_KEY", "").strip() or "none",
            max_retries=SERVER_RETRIES, timeout=600)
        self._lock = threading.Lock()
        self._waits_until = 0.0  # time.monotonic() of the end of the last wait that was announced

    def ask(self, content: str | list[Json], about: str, seed: int, temperature: float) -> Reply:
        """The answer to a user's turn, a text or a list of parts; `about` names it in messages. It
        has a `refusal` where the server refuses this turn. Raises: UserError if it refuses all
        else, or cannot be reached."""
        where = f"endpoint: {self.endpoint} about {about}"
        with user_error(where, self._openai.OpenAIError, ValueError):
            try:
                reply = self._complete(content, seed, temperature)
            except self._openai.APIConnectionError as e:  # of the last try, or a timeout
                raise UserError(f"{where}: {clip(str(e))} Does a server run there?") from None
            except self._openai.NotFoundError as e:
                raise UserError(
                    f"{where}: {clip(str(e))}; is {self.model} the server's name of the model "
                    "(served_model=NAME), and does the address end in /v1?") from None
            except self._openai.AuthenticationError as e:
                raise UserError(f"{where}: {clip(str(e))}; its key is taken from "
                                "OPENAI_API_KEY") from None
            except self._openai.APIStatusError as e:
                if e.status_code not in REFUSAL_STATUSES:
                    raise
                return Reply(Answer("", finished=False, refusal=clip(str(e))), None)
        refusal = refusal_in(reply)
        if refusal:
            return Reply(Answer("", finished=False, refusal=refusal), None)
        try:
            choice = reply.choices[0]
            text = choice.message.content or ""
            text = text.encode(errors="replace").decode()  # half a character at a limit of tokens
            answer = Answer(text, choice.finish_reason == "stop")
            return Reply(answer, getattr(reply.usage, "prompt_tokens", None))
        except (AttributeError, TypeError, IndexError):  # a page of HTML has no choices
            raise UserError(f"{where}: no chat completion: {clip(str(reply))}") from None

    def _complete(self, content: str | list[Json], seed: int, temperature: float) -> Any:
        """The server's reply. Where it is busy, wait as long as its Retry-After says: the client
        obeys only one of a minute or two. Raises: OpenAIError."""
        message = {"role": "user", "content": content}
        sampling: Json = {"temperature": temperature}
        if temperature > 0:  # some servers fail at a seed that greedy decoding does not need
            sampling["seed"] = seed
        start = time.monotonic()
        while True:
            try:
                return self._client.chat.completions.create(
                    model=self.model, messages=[message], max_tokens=self.max_new_tokens,
                    extra_body=self.extra_body, **sampling)
            except self._openai.APIStatusError as e:
                seconds = retry_after_seconds(e.response.headers.get("retry-after"))
                passed = time.monotonic() - start
                is_busy = e.status_code in (429, 503) and seconds > 0
                if not is_busy or passed + seconds > LONGEST_RETRY_AFTER:
                    raise
                self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        """Sleep, and say so, once for all threads that are told to wait at that time."""
        now = time.monotonic()
        with self._lock:
            is_news = now >= self._waits_until
            self._waits_until = max(self._waits_until, now + seconds)
        if is_news:
            # Not to the standard output, where answers may go.
            log.warning(f"endpoint: {self.endpoint} is busy and asks to wait "
                        f"{math.ceil(seconds)} s")
        time.sleep(seconds)


class ServerEngine:
    """Answers about texts by a server."""

    batch_size = 1
    name = "server"

    def __init__(self, server: ChatServer, concurrency: int):
        self.server = server
        self.num_threads = concurrency

    def answer(self, questions: list[Question], seed: int, temperature: float) -> list[Answer]:
        """An answer has a `refusal` where the server refuses its text. Raises: UserError if it
        refuses all else, or cannot be reached."""
        answers = []
        for question in questions:
            before, after = Prompt.split_query(question.query)
            turn = before + question.text + after
            about = repr(question.text[:50])
            answers.append(self.server.ask(turn, about, seed, temperature).answer)
        return answers


def refusal_in(reply: Any) -> str:
    """Why a reply of status 200 has no answer, as some servers and routers tell it of a text that a
    filter stops, or ""."""
    error = getattr(reply, "error", None)
    if isinstance(error, dict) and error.get("code") in REFUSAL_STATUSES:
        return clip(f"{error['code']} - {error.get('message')}")
    choices = getattr(reply, "choices", None)
    if choices and getattr(choices[0], "finish_reason", None) == "content_filter":
        return "finish_reason content_filter"
    return ""


def retry_after_seconds(header: str | None) -> float:
    """From the value of a Retry-After header, a number of seconds or a date (RFC 9110); 0 without
    one."""
    if header is None:
        return 0.0
    with contextlib.suppress(ValueError):
        return float(header)
    with contextlib.suppress(ValueError):
        return email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    return 0.0


# Answers about the vectors of a table, by the thousand

REFUSALS_TO_STOP = 64  # in a row: then it is not the questions that are refused
SOFT_TOKENS_AT_ONCE = 64  # vectors that the adapter reads at once, for a server
NUM_OTHERS = 64  # vectors that an answer is compared with beside its own
ANSWERS_SCORED_AT_ONCE = 32


class VectorQuestion(NamedTuple):
    number: int  # of the job's questions, from 0
    row_id: int
    id: Id  # of the user's own, where the table has one
    vector: Tensor  # [E] fp32
    query: str


class VectorAnswer(NamedTuple):
    question: VectorQuestion
    text: str
    refusal: str = ""  # why a server gave none


def vector_questions(table: VectorTable, row_ids: Sequence[int], queries: Sequence[str],
                     first: int) -> Iterator[VectorQuestion]:
    """All queries about each of the rows, from question number `first` on. Raises: UserError."""
    first_row = first // len(queries)
    number = first_row * len(queries)
    for block in read_blocks(table, row_ids[first_row:]):
        ids = block.ids or [None] * len(block.row_ids)
        for row_id, own_id, vector in zip(block.row_ids, ids, block.vectors, strict=True):
            for query in queries:
                if number >= first:
                    yield VectorQuestion(number, row_id, own_id, vector, query)
                number += 1


def question_seed(seed: int, number: int) -> int:
    """Of sampling an answer: a command that goes on samples as if it had not stopped."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def answer_by_llm(elm: ELM, questions_from: Callable[[int], Iterator[VectorQuestion]], first: int,
                  max_new_tokens: int, temperature: float, seed: int) -> Iterator[VectorAnswer]:
    """In this process, in the order of the questions, from number `first` on. All processes take
    part. The answers of a batch depend on each other: a batch of which some are there already is
    asked whole again."""
    sampling = {"temperature": temperature} if temperature else {}
    batch_size = GENERATION_BATCH[elm.device.type]
    start_of_batch = first - first % batch_size
    for block in in_blocks(questions_from(start_of_batch), batch_size):
        torch.manual_seed(question_seed(seed, block[0].number))
        vectors = torch.stack([question.vector for question in block])
        queries = [question.query for question in block]
        texts = elm.answer_batch(vectors, queries, max_new_tokens, **sampling)
        for question, text in zip(block, texts, strict=True):
            if question.number >= first:
                yield VectorAnswer(question, text)


class VectorServer:
    """Answers about vectors by a server that has the LLM. The adapter runs here; its soft tokens go
    as a part of type prompt_embeds of a chat message, in place of which the server puts them into
    its chat template. vLLM joins the parts of a message by line breaks, as elm joins vector and
    query."""

    def __init__(self, server: ChatServer, adapter: Adapter, prompt: Prompt, dtype: torch.dtype,
                 concurrency: int):
        """`prompt` is the one of training; `dtype` that of the LLM, in which soft tokens go."""
        self.server = server
        self.adapter = adapter
        self.prompt = prompt
        self.dtype = dtype
        self.concurrency = concurrency

    def answer(self, questions: Iterable[VectorQuestion], temperature: float, seed: int,
               answered_before: VectorQuestion | None) -> Iterator[VectorAnswer]:
        """In the order of the questions, several at a time. An answer has a `refusal` where the
        server refuses the question. Refusals in a row are held back until an answer follows. If
        none does, the server is asked again what was `answered_before`, in a job that goes on.
        Raises: UserError if the server refuses REFUSALS_TO_STOP in a row, or all that it is asked,
        if it cannot be reached, or does not read the soft tokens."""

        def ask(sent: tuple[VectorQuestion, Tensor]) -> VectorAnswer:
            question, soft_tokens = sent
            return self._ask(question, soft_tokens, temperature, seed)

        refused: list[VectorAnswer] = []  # since the last answer
        has_answered = False
        for answer in prefetch(ask, self._with_soft_tokens(questions), self.concurrency):
            if not answer.refusal:
                has_answered = True
                yield from refused
                refused = []
                yield answer
                continue
            refused.append(answer)
            if len(refused) == REFUSALS_TO_STOP:
                self._stop(refused)
        if refused and not has_answered and answered_before is not None:
            (again,) = map(ask, self._with_soft_tokens([answered_before]))
            has_answered = not again.refusal
        if refused and not has_answered:
            self._stop(refused)
        yield from refused

    def _stop(self, refused: list[VectorAnswer]) -> NoReturn:
        """Raises: UserError."""
        raise UserError(
            f"endpoint: {self.server.endpoint} refuses {len(refused)} questions in a row: "
            f"{refused[0].refusal}; if it does not take prompt_embeds, {self._advice()}")

    @torch.no_grad()
    def _with_soft_tokens(
        self, questions: Iterable[VectorQuestion]
    ) -> Iterator[tuple[VectorQuestion, Tensor]]:
        """Each question with soft tokens [K, D]."""
        device = self.adapter.scale.device
        for block in in_blocks(questions, SOFT_TOKENS_AT_ONCE):
            vectors = torch.stack([question.vector for question in block])
            soft_tokens = self.adapter(vectors.to(device)).to(self.dtype).cpu()
            yield from zip(block, soft_tokens, strict=True)

    def _ask(self, question: VectorQuestion, soft_tokens: Tensor, temperature: float,
             seed: int) -> VectorAnswer:
        stored = io.BytesIO()
        torch.save(soft_tokens.clone(), stored)  # of a view it would write the whole block
        query = question.query.strip()
        content = [
            {"type": "prompt_embeds", "data": base64.b64encode(stored.getvalue()).decode()},
            {"type": "text", "text": query}]
        reply = self.server.ask(content, f"row {question.row_id}",
                                question_seed(seed, question.number), temperature)
        if not reply.answer.refusal:
            self._check_num_tokens(reply.num_prompt_tokens, query)
        return VectorAnswer(question, reply.answer.text, reply.answer.refusal)

    def _check_num_tokens(self, found: int | None, query: str) -> None:
        """Raises: UserError unless the server's prompt has as many tokens as that of training: one
        that does not know the part leaves it out."""
        before, after = self.prompt.encode(list(Prompt.split_query(query)))
        ids = self.prompt.prefix_ids + before + after + self.prompt.suffix_ids
        expected = len(ids) + self.adapter.tokens
        where = f"endpoint: {self.server.endpoint}"
        if found is None:
            raise UserError(f"{where} does not tell how many tokens a prompt has, so there is no "
                            f"knowing whether it reads the vectors; {self._advice()}")
        if found != expected:
            raise UserError(f"{where} reads a prompt of {found} tokens, not of {expected}: it "
                            "leaves the vector out, or has another chat template than that of "
                            f"training; {self._advice()}")

    def _advice(self) -> str:
        name = self.prompt.tokenizer.name_or_path
        return f"start `vllm serve {name} --enable-prompt-embeds`"


class AnswerScorer:
    """Cosines of answers, embedded again, with vectors: whether an answer is about its own."""

    def __init__(self, model: SentenceTransformer, origin: VectorOrigin, table: VectorTable,
                 row_ids: Sequence[int]):
        """`origin` is of the table's vectors. Others are drawn from `row_ids`. Raises: UserError if
        the model's vectors are narrower."""
        check_embedder_width(model, "embedder: it", table.shape[1])
        limit_tokens(model, model.max_seq_length, origin.max_tokens)
        self.embed = embedding_function(model, origin, table.shape[1])
        num_drawn = min(len(row_ids), NUM_OTHERS + 1)  # one may be the answer's own
        places = np.random.default_rng(0).choice(len(row_ids), num_drawn, replace=False)
        drawn = [row_ids[place] for place in np.sort(places).tolist()]
        (block,) = read_blocks(table, drawn)
        self.other_ids = np.array(drawn)
        self.others = F.normalize(block.vectors, dim=1)  # [NUM_OTHERS + 1, E]

    def score(self, answers: list[VectorAnswer]) -> list[Json]:
        """Of each answer: `consistency`, the cosine with its vector, and `consistency_others`, the
        mean cosine with NUM_OTHERS other vectors, if there are others. 0 of an empty answer;
        nothing of a refused question."""
        scores: list[Json] = [{} for _ in answers]
        places = [i for i, answer in enumerate(answers) if not answer.refusal]
        if not places:
            return scores
        texts = [answers[i].text for i in places]
        own = torch.stack([answers[i].question.vector for i in places])
        embedded = self.embed(texts)
        for j, text in enumerate(texts):
            if not text.strip():
                embedded[j] = 0
        own_cosines = (embedded * F.normalize(own, dim=1)).sum(1).tolist()
        other_cosines = (embedded @ self.others.T).numpy()
        for j, i in enumerate(places):
            scores[i]["consistency"] = round(own_cosines[j], 4)
            is_other = np.flatnonzero(self.other_ids != answers[i].question.row_id)[:NUM_OTHERS]
            if len(is_other):
                mean = other_cosines[j, is_other].mean()
                scores[i]["consistency_others"] = round(float(mean), 4)
        return scores


class AnswerFile:
    """The answers of a job as lines of JSON, in the order of its questions, and beside them, in
    PATH.job, what the job is. A command that was killed goes on after the last whole line.

    Attributes: num_answers; last_answered, the number of the last question that was not refused."""

    def __init__(self, path: Path, job: Json, row_ids: Sequence[int]):
        """All queries of the job are asked about each of the rows. Drops a torn last line. Raises:
        UserError if the file is of another job, or lacks a line."""
        self.path = path
        self.num_answers = 0
        self.last_answered: int | None = None
        self.job_path = path.with_name(f"{path.name}.job")
        if not path.exists():
            self._write_job(job)
            return
        self._check_job(self._read_job(), job)
        end = 0
        with open(path, "rb") as f:
            for line in f:
                if line.endswith(b"\n"):
                    self._count(line, row_ids, job["query"])
                    end += len(line)
        if end < path.stat().st_size:
            with report_write_errors(path):
                os.truncate(path, end)

    def _count(self, line: bytes, row_ids: Sequence[int], queries: Sequence[str]) -> None:
        """Raises: UserError if the line is not the answer to the next question."""
        where = f"out: line {self.num_answers + 1} of {self.path}"
        with user_error(f"{where} is no answer", ValueError, TypeError):
            entry = dict(json.loads(line))
        row_number, query_number = divmod(self.num_answers, len(queries))
        expected = None
        if row_number < len(row_ids):
            expected = (row_ids[row_number], queries[query_number])
        found = (entry.get("row"), entry.get("query"))
        if found != expected:
            raise UserError(f"{where} is about row {found[0]}, and is not the next one of the job: "
                            "lines were removed, added or moved; choose another file")
        if "answer" in entry:
            self.last_answered = self.num_answers
        self.num_answers += 1

    def append(self, entries: list[Json]) -> None:
        """Raises: UserError if the file cannot be written."""
        append_text(self.path, jsonl(entries))

    def add_to_job(self, key: str, value: str) -> None:
        """What is known when the LLM is loaded. Raises: UserError if the answers are of another
        value."""
        stored = self._read_job()
        if key in stored:
            self._check_job(stored, {key: value})
        else:
            self._write_job(stored | {key: value})

    def _read_job(self) -> Json:
        if not self.job_path.exists():
            raise UserError(f"out: {self.path} exists, but no {self.job_path} says of which job; "
                            "choose another file")
        with user_error(f"{self.job_path}: is broken", OSError, ValueError):
            return dict(json.loads(self.job_path.read_text("utf-8")))

    def _write_job(self, job: Json) -> None:
        write_text(self.job_path, json.dumps(job, indent=1) + "\n")

    def _check_job(self, stored: Json, job: Json) -> None:
        """Raises: UserError unless the answers, of the stored job, are of this one."""
        for key, value in job.items():
            if stored.get(key) != value:
                was = clip(json.dumps(stored.get(key), ensure_ascii=False), 100)
                now = clip(json.dumps(value, ensure_ascii=False), 100)
                raise UserError(f"out: {self.path} has answers of another job: {key} was {was} and "
                                f"is {now} here; choose another file")


class AnswerLog:
    """Answers by key, appended to a file as they come: a command that was killed asks only for the
    missing ones, and for those that the server refused, which are in memory alone."""

    def __init__(self, path: Path):
        self.path = path
        self._answers: dict[str, Answer] = {}
        lines = path.read_text("utf-8").split("\n") if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, LookupError, TypeError):  # torn by a kill, blank
                entry = json.loads(line)
                self._answers[entry["key"]] = Answer(entry["text"], entry["finished"])

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def append(self, answers: dict[str, Answer]) -> None:
        """Raises: UserError if the file cannot be written."""
        lines = ""
        for key, answer in answers.items():
            if not answer.refusal:
                entry = {"key": key, "text": answer.text, "finished": answer.finished}
                lines += "\n" + json.dumps(entry)  # first a line break: it ends a torn line
        append_text(self.path, lines)
        self._answers |= answers


# -----------------------------------------------------------------------------
# Sweep
#
# Optuna over the settings of a training, by any number of workers. It looks for the best of one
# figure that reports on the validation split would have.

# What it can look for: the figures of eval.json that the adapter and the rows' own vectors make.
# The others are those of baselines and of the data.
LOSS_METRICS = ("loss", "gap", "gap_closed", "gain_over_nearest")  # without answers
ANSWER_METRICS = (*BertScores._fields, *FormScores._fields, *ConsistencyScores._fields)
METRICS = LOSS_METRICS + ANSWER_METRICS
MINIMIZED_METRICS = ("loss", "empty_rate", "repetition")
# The split whose texts a metric is measured by. A report has none without them.
SPLIT_OF_TEXTS = {"gap_closed": "val", "gain_over_nearest": "train"}


class StudyConfig(Table):
    name: str = "elm-summary-optimization"  # of the study in the storage
    metric: str = "bertscore_composite"  # the figure that is optimised, on the validation split:
    #   bertscore_precision, _recall, _f1 or _composite of eval.samples answers, their consistency,
    #   mrr or top1 (by the embedder), empty_rate or repetition; or, without answers and scorer,
    #   gap_closed, loss, gap or gain_over_nearest. The least loss, empty_rate and repetition, and
    #   the greatest of all others
    trials: PositiveInt = 50  # that all workers together end, also failed and killed ones
    timeout_hours: PositiveFloat = 24.0  # after which this worker begins no other
    storage: str | None = None  # a database URL as Optuna takes it; none: SQLite in output.dir
    seed: Seed = 42  # of the sampler

    @pydantic.field_validator("metric")
    @classmethod
    def check_metric(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"{clip(metric)} is none of {', '.join(METRICS)}"
                             f"{did_you_mean(metric, METRICS)}")
        return metric


class SweepConfig(Table):
    study: StudyConfig = StudyConfig()
    base: dict[str, Any] = {}  # config, a training's TOML file (none: train.toml), and settings
    #   over it
    space: dict[str, Any] = {}  # by setting: { low = 1e-5, high = 1e-2, log = true } or choices
    #   [1, 2]
    wandb: WandbConfig = WandbConfig()
    output: OutputConfig = OutputConfig()


KEYS_SET_BY_SWEEP = (
    "eval.", "output.", "wandb.", "train.eval_steps", "train.resume", "train.seed")
sweep_log = logging.getLogger("elm.sweep")  # is heard while trials are quiet
sweep_log.setLevel(logging.INFO)

HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 120  # a trial without a heartbeat for so long was killed
ENDED_STATES = ("COMPLETE", "PRUNED", "FAIL")  # of Optuna's TrialState


def training_config(sweep: Sweep, settings: Json, name: str) -> Config:
    """The training with these settings, by dotted name. Raises: UserError."""
    fixed = {"output.dir": f"{sweep.output_dir}/{name}", "wandb.run_name": name}
    return parse_config(apply_overrides({}, sweep.base | settings | fixed))


def trial_config(sweep: Sweep, settings: Json, name: str) -> Config:
    """As training_config, on the validation split, without answers or scorer if the metric needs
    none: they are not asked for then."""
    settings = settings | {"eval.split": "val"}
    if sweep.study.metric in LOSS_METRICS:
        settings["eval.samples"] = 0
    if sweep.study.metric not in BertScores._fields:
        settings["eval.bertscore_model"] = OFF
    return training_config(sweep, settings, name)


@dataclass(frozen=True)
class Sweep:
    """A sweep file, resolved; settings by dotted name."""

    study: StudyConfig
    output_dir: str
    log_file: str | None
    base: Json  # all settings of the trainings that differ from the defaults
    space: Json  # a range or choices by setting


def load_sweep(path: str, overrides: Iterable[str]) -> Sweep:
    """A sweep file under overrides. Both ends of each range, and each choice, are checked as
    settings of a training. Raises: UserError with one line per mistake."""
    own_values = parse_overrides(overrides)
    values = flatten(read_toml(path)) | own_values
    check_sweep_keys(values, path, own_values)
    given = parse_config(apply_overrides({}, values), SweepConfig, path, own_values)
    base_settings = flatten(given.base)
    train_toml = base_settings.pop("config", None) or "train.toml"
    # Of equal settings those of the sweep's own tables count, then [base], then the training's
    # file.
    settings = flatten(read_toml(str(train_toml), "base.config")) | base_settings
    if any(key.startswith("space.") for key in settings):
        raise UserError(f"base.config: {train_toml} is the file of a sweep; give a training's")
    for section in ("wandb", "output"):
        own_table = getattr(given, section).model_dump(exclude_unset=True)
        for key, value in own_table.items():
            settings[f"{section}.{key}"] = value
    cfg = parse_config(apply_overrides({}, settings), Config, f"{path} over {train_toml}")
    sweep = Sweep(
        given.study, cfg.output.dir, cfg.output.log_file, settings, flatten(given.space))

    errors = []
    metric = sweep.study.metric
    if metric in ANSWER_METRICS and not cfg.eval.samples:
        errors.append(f"study.metric = {metric}: needs eval.samples above 0; gap_closed needs none")
    if metric in BertScores._fields and cfg.eval.bertscore_model == OFF:
        errors.append(f"study.metric = {metric}: needs a scorer, and eval.bertscore_model is off; "
                      "gap_closed needs none")
    if not sweep.space:
        errors.append("a sweep needs a [space]")
    for key, spec in sweep.space.items():
        try:
            check_space(sweep, key, spec)
        except (TypeError, ValueError) as e:  # a UserError, or what Optuna raises
            errors.append(f"space.{key} = {toml_value(spec)}: {e}")
    if errors:
        raise UserError("\n".join(f"{path}: {error}" for error in errors))
    return sweep


def check_sweep_keys(values: Json, path: str, overrides: Json) -> None:
    """Raises: UserError that names `base`, if settings of a training stand outside of it."""
    keys_of_base = [f"base.{key}" for key in dotted_keys(Config)]
    lines = []
    for key in values:
        section = key.partition(".")[0]
        is_own = section in SweepConfig.model_fields
        if is_own or (section not in Config.model_fields
                      and did_you_mean(key, dotted_keys(SweepConfig))):
            continue
        similar = [f"base.{key}"] if f"base.{key}" in keys_of_base else keys_of_base
        hint = did_you_mean(key, similar)
        if hint:
            prefix = "" if key in overrides else f"{path}: "
            lines.append(f"{prefix}{key}: unknown key{hint}")
    if lines and not any(key.startswith("space") for key in values):
        raise UserError(f"{path}: has no [space], so it is no file of a sweep; a training's is "
                        "named by base.config")
    if lines:
        raise UserError("\n".join(lines))


def check_space(sweep: Sweep, key: str, spec: object) -> None:
    """Raises: ValueError or TypeError if a setting cannot have the values of `spec`."""
    fixed_trial = import_optional("optuna").trial.FixedTrial
    if key.startswith(KEYS_SET_BY_SWEEP):
        raise ValueError("is set by the sweep itself")
    if isinstance(spec, dict) and "low" in spec and "high" in spec:
        values = [spec["low"], spec["high"]]
    elif isinstance(spec, list):
        values = spec
    else:
        values = []
    if not values or any(isinstance(value, list | dict) for value in values):
        raise ValueError("must be choices in a list, or {low, high}")
    for value in values:
        trial_config(sweep, {key: value}, "check")
        suggest(fixed_trial({key: value}), key, spec)


def suggest(trial: optuna.trial.BaseTrial, key: str, spec: Json | list[Any]) -> None:
    """Let the trial choose a value. Raises: what Optuna raises at a wrong spec."""
    if isinstance(spec, list):
        trial.suggest_categorical(key, spec)
        return
    default = flatten(Config().to_dict()).get(key)
    if any(isinstance(value, float) for value in (default, *spec.values())):
        trial.suggest_float(key, **spec)
    else:
        trial.suggest_int(key, **spec)


def open_study(sweep: Sweep) -> optuna.Study:
    """The Optuna study of a sweep, created or loaded, with a sampler of this worker's own. Raises:
    UserError if its storage cannot be opened, or if it was created with other settings."""
    optuna = import_optional("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are
    folder = Path(sweep.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", wait=True):  # two workers would both create the tables
        study = create_study(sweep)
        check_study(study, sweep)
        # Workers whose samplers have equal seeds would suggest equal values.
        worker = study.user_attrs.get("workers", 0)
        study.set_user_attr("workers", worker + 1)
    study.sampler = optuna.samplers.TPESampler(
        seed=(sweep.study.seed + worker) % 2**32,
        n_startup_trials=min(10, 1 + sweep.study.trials // 4))
    return study


def create_study(sweep: Sweep) -> optuna.Study:
    """The study of this name, which another worker may have created. Raises: UserError."""
    optuna = import_optional("optuna")
    from sqlalchemy.exc import SQLAlchemyError

    # timeout: seconds that SQLite waits for another worker
    url = sweep.study.storage or f"sqlite:///{sweep.output_dir}/study.db?timeout=60"
    address = url.split("@")[-1].split("?")[0]  # without a password
    # A trial whose worker was killed misses its heartbeats; another worker begins it again.
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3)
    exception_types = (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError,
                       RuntimeError)
    message = f"study.storage: cannot open {address} (study.storage=URL names another database)"
    direction = "minimize" if sweep.study.metric in MINIMIZED_METRICS else "maximize"
    with user_error(message, *exception_types):
        storage = optuna.storages.RDBStorage(
            url, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS,
            heartbeat_stale_trial_callback=retry)
        return optuna.create_study(
            study_name=sweep.study.name, storage=storage, load_if_exists=True,
            direction=direction, pruner=optuna.pruners.MedianPruner(n_startup_trials=4))


def check_study(study: optuna.Study, sweep: Sweep) -> None:
    """Store the settings with a new study. Raises: UserError if it has others, or if the folder
    holds trials of another study."""
    folder = Path(sweep.output_dir)
    settings = flatten({"space": sweep.space, "base": sweep.base})
    settings["study.metric"] = sweep.study.metric
    for key in list(settings):
        if key.startswith(("base.wandb.", "base.output.")):
            del settings[key]
    stored = study.user_attrs.get("settings", settings)
    changed = [key for key in settings | stored if settings.get(key) != stored.get(key)]
    if changed:
        raise UserError(f"study.name: {sweep.study.name} exists with another {', '.join(changed)}; "
                        "choose another name and output.dir")
    if not study.get_trials(deepcopy=False) and list(folder.glob("trial_*")):
        raise UserError(f"output.dir: {folder} holds trials of another study; choose another place")
    study.set_user_attr("settings", settings)


class TrialTrainer(Trainer):
    """A trial of a sweep: without checkpoints and report, on the worker's LLM and scorer. It
    reports the metric at its first three quarters to Optuna, for pruning, and returns that of its
    best adapter."""

    plots = False

    def __init__(self, cfg: Config, worker: SweepWorker, trial: optuna.Trial):
        self.worker = worker
        self.metric = worker.sweep.study.metric
        self.trial = trial
        super().__init__(cfg)

    def choose_eval_steps(self) -> int:
        """Quarters, so that trials of different batch sizes are pruned at equal progress."""
        return max(1, math.ceil(self.total_steps / 4))

    def check_data(self) -> None:
        """The worker has done so."""

    def answer_samples(self) -> list[SampleAnswer]:
        """None: a trial shows nothing."""
        return []

    def load_llm(self) -> PreTrainedModel:
        return self.worker.load_llm(self.cfg, self.device)

    def save(self, *more_names: str) -> None:
        pass

    def validate(self) -> None:
        super().validate()
        step = self.state.step
        if 0 < step < self.total_steps and self.trial.should_prune():
            self.leave_if_signalled()  # the worker would begin another trial
            self.metric_log.wandb.finish(0)
            raise import_optional("optuna").TrialPruned

    def validation_losses(self) -> dict[str, float]:
        losses = super().validation_losses()
        step = self.state.step
        if 0 < step < self.total_steps:
            value = self.measure_metric()
            if value is not None:
                losses.setdefault(f"val_{self.metric}", value)  # val_loss is there
                self.trial.report(value, step // self.eval_steps)
        return losses

    def measure_metric(self) -> float | None:
        """The metric as a report on the validation split has it. None where that has none."""
        split = self.splits["val"]
        if self.metric in ANSWER_METRICS:
            return self.worker.score_answers(self.elm, split, self.cfg)
        was_training = self.elm.training
        self.elm.eval()  # the adapter does not drop out
        losses = measure_losses(self.elm, split, self.nll_nearest, self.nll_text)
        self.elm.train(was_training)
        return summarize(losses).get(self.metric)

    # Losses by texts, which do not change in training: once, and where the metric needs them.

    @functools.cached_property
    def nll_nearest(self) -> np.ndarray:
        split = self.splits["val"]
        if self.metric != "gain_over_nearest":
            return np.full(len(split), np.nan)
        return retrieve(self.elm, split, self.splits["train"], pick_samples(split, 0)).nll

    @functools.cached_property
    def nll_text(self) -> np.ndarray:
        split = self.splits["val"]
        if self.metric != "gap_closed":
            return np.full(len(split), np.nan)
        return nll_by_own_texts(self.elm, split)

    def report(self) -> Json:
        """Raises: UserError if a report would lack the metric."""
        self.elm.eval().adapter.load_state_dict(self.state.best_adapter)
        value = self.measure_metric()
        if value is None:
            split = self.splits[SPLIT_OF_TEXTS[self.metric]]
            raise UserError(f"no {self.metric}: no text of {split.path} fits, or this LLM reads "
                            "them no better than other rows' vectors; take study.metric=loss")
        return {self.metric: value}


class SweepWorker:
    """A process that runs trials, until all workers together have run study.trials. The scorer or
    the embedder, and the LLM unless ZeRO 3 shares it out, are kept between trials."""

    def __init__(self, sweep: Sweep):
        """Opens and checks all that the trials need. Raises: UserError."""
        self.sweep = sweep
        self.metric = sweep.study.metric
        cfg = trial_config(sweep, {}, "check")
        self.device = start_distributed()
        check_can_write(Path(sweep.output_dir), "output.dir")
        splits = open_inputs(cfg, ("train", "val"), cfg.model.tokens, None)
        self.check_can_measure(cfg, splits)
        check_data(cfg, splits, self.device)
        self.study = open_study(sweep)
        self.scorer: BERTScorer | None = None
        if self.metric in BertScores._fields:
            self.scorer = load_scorer(cfg.eval, self.device)
        self.load_embedder = functools.lru_cache(maxsize=1)(load_embedder)
        self._llm: PreTrainedModel | None = None
        self._llm_key: tuple[str, bool, Quantization] | None = None

    def check_can_measure(self, cfg: Config, splits: dict[str, Split]) -> None:
        """Raises: UserError if the metric needs texts that no row has, or an embedder that nothing
        names."""
        split = splits[SPLIT_OF_TEXTS.get(self.metric, "val")]
        if self.metric in SPLIT_OF_TEXTS and not split.index["has_text"].any():
            raise UserError(f"study.metric = {self.metric}: no row of {split.path} has a text; "
                            "take loss")
        embedder = choose_embedder(cfg.eval, split.origin)
        if self.metric in ConsistencyScores._fields and embedder is None:
            raise UserError(f"study.metric = {self.metric}: needs the model that made the vectors; "
                            "name it by base.eval.embedder")

    def load_llm(self, cfg: Config, device: torch.device) -> PreTrainedModel:
        key = (cfg.model.llm, cfg.model.bf16, cfg.model.quantization)
        if self._llm is None or self._llm_key != key or cfg.deepspeed.zero_stage == 3:
            self._llm = None  # free the one before
            free_memory()
            self._llm = load_llm(cfg.model.llm, device, cfg.model.bf16, deepspeed=cfg.deepspeed,
                                 quantization=cfg.model.quantization)
            self._llm_key = key
        return self._llm

    def score_answers(self, elm: ELM, split: Split, cfg: Config) -> float:
        """The mean of the metric, one of ANSWER_METRICS, that a report would find, and nothing
        else."""
        row_ids = pick_samples(split, cfg.eval.samples)
        vector_ids = split.index["vector_id"][row_ids]
        answers = generate_answers(elm, split, row_ids, vector_ids, cfg.eval.max_new_tokens)
        if self.metric in BertScores._fields:
            references = [row.response for row in split.read(row_ids)]
            scores = bert_scores(self.scorer, answers, references)
        elif self.metric in ConsistencyScores._fields:
            name = choose_embedder(cfg.eval, split.origin)
            model = self.load_embedder(
                name, cfg.model.bf16, self.device, max_tokens=split.origin.max_tokens)
            embed = embedding_function(model, split.origin, split.vectors.shape[1])
            scores = consistency_scores(answers, embed, split, row_ids)
        else:
            scores = form_scores(answers)
        return float(np.mean(getattr(scores, self.metric)))

    def run_trial(self, trial: optuna.Trial) -> float:
        """The objective. Raises: UserError or RuntimeError, kept as the trial's `reason`;
        TrialPruned; SystemExit after a signal: the trial is begun again once its heartbeat is
        stale."""
        try:
            for key, spec in self.sweep.space.items():
                suggest(trial, key, spec)
            cfg = trial_config(self.sweep, trial.params, f"trial_{trial.number}")
            trainer = TrialTrainer(cfg, self, trial)
            trial.set_user_attr("eval_steps", trainer.eval_steps)
            return trainer.run()[self.metric]
        except (UserError, RuntimeError) as e:
            trial.set_user_attr("reason", (str(e) or repr(e)).splitlines()[0])
            raise

    def run(self) -> None:
        """Raises: UserError if no trial was completed; SystemExit after a signal."""
        optuna = import_optional("optuna")
        study = self.sweep.study
        direction = self.study.direction.name.lower()
        sweep_log.info(
            f"{study.name}: {study.trials} trials, to {direction} {self.metric} on val")
        states = tuple(optuna.trial.TrialState[name] for name in ENDED_STATES)
        limit = optuna.study.MaxTrialsCallback(study.trials, states=states)
        self.start_time = time.monotonic()
        self.num_ended_before = self.count_ended()
        if self.num_ended_before < study.trials:
            self.study.optimize(
                self.run_trial, timeout=3600 * study.timeout_hours,
                catch=(UserError, RuntimeError), callbacks=[limit, self.after_trial],
                gc_after_trial=True)
        else:
            self.write_results()
            sweep_log.info(self.describe_progress())
        best = self.best_trial()
        if best is None:
            raise UserError(f"{study.name}: no trial was completed")
        self.print_next_command(best)

    def after_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        torch.cuda.empty_cache()
        self.write_results()
        if trial.state.name == "FAIL":
            reason = trial.user_attrs.get("reason", f"its {self.metric} is not finite")
            told = f"trial {trial.number} failed: {reason}"
        else:
            pruned = ", pruned" if trial.state.name == "PRUNED" else ""
            told = f"trial {trial.number}: {self.metric} {trial.value:.4f}{pruned}"
        sweep_log.info(f"{told}; {self.describe_progress()}")

    def count_ended(self) -> int:
        trials = self.study.get_trials(deepcopy=False)
        return sum(trial.state.name in ENDED_STATES for trial in trials)

    def best_trial(self) -> optuna.trial.FrozenTrial | None:
        """The best complete one, the first of equal ones."""
        trials = self.study.get_trials(deepcopy=False)
        complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
        best_of = min if self.metric in MINIMIZED_METRICS else max
        return best_of(complete, key=lambda trial: trial.value, default=None)

    def write_results(self) -> None:
        """Write trials.jsonl, and sweep.png and best.toml if a trial is complete."""
        folder = Path(self.sweep.output_dir)
        with locked(folder / ".lock", wait=True):  # other workers write them, too
            trials = self.study.get_trials(deepcopy=False)
            write_text(folder / "trials.jsonl", jsonl(describe_trial(trial) for trial in trials))
            best = self.best_trial()
            if best is None:
                return
            picture = folder / "sweep.png"
            with drawing(picture):
                plot_sweep(picture, self.study, self.metric)
            settings = best.params | {"train.eval_steps": best.user_attrs["eval_steps"]}
            cfg = training_config(self.sweep, settings, "best")
            title = (f"# trial {best.number} of {self.study.study_name}: {self.metric} "
                     f"{best.value!r} on the validation split\n")
            write_text(folder / "best.toml", title + config_text(cfg))

    def describe_progress(self) -> str:
        """How many trials are done and left; in lines below, the best so far with its settings."""
        num_ended = self.count_ended()
        num_left = max(0, self.sweep.study.trials - num_ended)
        text = f"{num_ended} of {self.sweep.study.trials} done, {num_left} left"
        if num_left:
            text += f", about {format_seconds(self.seconds_left(num_ended, num_left))}"
        best = self.best_trial()
        if best is None:
            return f"{text}; no {self.metric} yet"
        words = [f"best {self.metric} {best.value:.4f}, trial {best.number}:"]
        words += [f"{key}={format_setting(value)}" for key, value in best.params.items()]
        told = textwrap.fill(
            " ".join(words), width=80, initial_indent="    ", subsequent_indent="      ",
            break_long_words=False, break_on_hyphens=False)
        return f"{text}\n{told}"

    def seconds_left(self, num_ended: int, num_left: int) -> float:
        """By the speed of all workers since this one began; not beyond its timeout."""
        passed = time.monotonic() - self.start_time
        seconds_per_trial = passed / max(1, num_ended - self.num_ended_before)
        until_timeout = 3600 * self.sweep.study.timeout_hours - passed
        return max(0, min(seconds_per_trial * num_left, until_timeout))

    def print_next_command(self, best: optuna.trial.FrozenTrial) -> None:
        cfg = training_config(self.sweep, best.params, "best")
        split = choose_report_split(cfg.eval.split, cfg.data.dir)
        path = shlex.quote(f"{self.sweep.output_dir}/best.toml")
        sweep_log.info(f"next, to train the best and report on {split}: {own_program()} {path}")


def format_setting(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else toml_value(value)


def describe_trial(trial: optuna.trial.FrozenTrial) -> Json:
    reason = trial.user_attrs.get("reason")
    if reason is None and trial.state.name == "FAIL":
        reason = "its worker died"
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value,
        "params": trial.params,
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "reason": reason}


def plot_sweep(path: Path, study: optuna.Study, metric: str) -> None:
    """sweep.png: the metric of all trials with the best so far and, beside it, the importances of
    the settings, where there are any."""
    figure_class = import_optional("matplotlib.figure").Figure
    importances = find_importances(study)
    figure = figure_class((13 if importances else 6.5, 6), layout="constrained")
    axes = figure.subplots(1, 2 if importances else 1, squeeze=False)[0]
    plot_trials(axes[0], study, metric)
    if importances:
        axes[1].barh(list(importances), list(importances.values()))
        axes[1].invert_yaxis()
        axes[1].set(title="importances of the settings (PED-ANOVA)", xlabel=f"share, for {metric}")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def plot_trials(axes: Axes, study: optuna.Study, metric: str) -> None:
    pd = import_optional("pandas")
    trials = study.get_trials(deepcopy=False)
    numbers = [trial.number for trial in trials]
    states = pd.Series([trial.state.name for trial in trials], numbers)
    values = pd.Series([trial.value for trial in trials], numbers, dtype=float)
    complete = values[states == "COMPLETE"]
    is_minimized = study.direction.name == "MINIMIZE"
    best = complete.cummin() if is_minimized else complete.cummax()
    pruned = values[states == "PRUNED"]
    axes.plot(best.index, best, drawstyle="steps-post", color="tab:blue", label="best so far")
    axes.plot(complete.index, complete, "o", color="tab:blue", label="complete")
    if len(pruned):
        axes.plot(pruned.index, pruned, "x", color="0.6", label="pruned, where it ended")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=study.study_name, xlabel="trial", ylabel=f"{metric}, validation")
    axes.legend()


def find_importances(study: optuna.Study) -> dict[str, float]:
    """The share of each setting by Optuna's default, PED-ANOVA, the greatest first. Empty where
    too few trials are complete or all have one value: what it normalises would be equal then."""
    get_importances = import_optional("optuna.importance").get_param_importances
    importances = get_importances(study, normalize=False)
    total = sum(importances.values())
    if total == 0:
        return {}
    return {key: value / total for key, value in importances.items()}


def run_sweep(sweep: Sweep) -> None:
    """One worker. Raises: UserError; SystemExit after a signal."""
    check_launched_alone("a worker is one process, so start one for each GPU by hand")
    level = log.level
    log.setLevel(logging.WARNING)  # of a trial its warnings alone
    try:
        with log_to_file(sweep.log_file):
            SweepWorker(sweep).run()
    finally:
        log.setLevel(level)


# -----------------------------------------------------------------------------
# Commands


class EvalOptions(Config):
    adapter: PathStr  # a file, a run's folder, or a name on the hub
    report_dir: PathStr | None = None  # a new folder for the report; none: eval_SPLIT_step_N
    #   beside the adapter


class GenerateOptions(Table):
    adapter: PathStr  # a file, a run's folder, or a name on the hub
    embeddings: PathStr | None = None  # a .safetensors or .npy file of one table, or a .parquet
    #   file
    text: TextList | None = None  # in place of embeddings: a text, or several, or a .txt file of a
    #   text a line; each is embedded, in bf16 where the LLM is, and answered about by its vector
    query: TextList  # about each vector, or several: 'query=["…", "…"]'; <EMB> in it is where the
    #   vector goes
    column: str = VECTOR_COLUMN  # of a .parquet file: the vectors
    id: str | None = None  # of a .parquet file: a column that each answer carries
    rows: RowIds | None = None  # of the table: 'rows=[0, 7]'; none: all
    out: PathStr | None = None  # a file that answers are appended to; killed, the same command goes
    #   on. none: the standard output
    score: bool = False  # embed each answer again: consistency, consistency_others
    embedder: PathStr | None = None  # of texts and scores; none: the one that made the adapter's
    #   vectors
    endpoint: ServerURL | None = None  # a server that has the LLM, in place of this process: one of
    #   vllm serve LLM --enable-prompt-embeds, as http://localhost:8000/v1
    served_model: str | None = None  # the server's name of the LLM, where it has another
    concurrency: PositiveInt = 64  # requests to the server at a time
    llm: PathStr | None = None  # another place of the adapter's LLM; none: the one of training
    bf16: bool | None = None  # of the LLM and the embedder; none: as in training
    quantization: Quantization | None = None  # of the LLM, as model.quantization; none: as in
    #   training, unless it is quantised where it lies
    max_new_tokens: PositiveInt = 256  # of an answer
    temperature: NonNegativeFloat = 0.0  # of sampling; 0: greedy
    seed: Seed = 42  # of sampling
    zero_stage: Literal[0, 3] = 0  # 3: the LLM is shared out among the launcher's processes


def evaluate(options: EvalOptions) -> Json:
    """The report of a training's end on any adapter: returns the dict of eval.json, of other
    processes than 0 {}. Raises: UserError."""
    if not isinstance(options, EvalOptions):
        raise UserError(f"evaluate: takes EvalOptions, not a {type(options).__name__}; "
                        "load_config(path, ['adapter=…'], EvalOptions) makes them of a TOML file")
    with log_to_file(options.output.log_file):
        return report_on_adapter(options)


def report_on_adapter(options: EvalOptions) -> Json:
    """As evaluate, without the log file."""
    device = start_distributed()
    split_name = choose_report_split(options.eval.split, options.data.dir)
    path = Path(options.adapter)
    adapter, metadata = Adapter.load(options.adapter)
    step = metadata.get("step")  # None: saved by ELM.save
    if options.report_dir is None and not path.exists():  # on the hub
        raise UserError("report_dir: an adapter of the hub has no folder here for the report; name "
                        "one")
    run_folder = (path if path.is_dir() else path.parent).resolve()
    if options.report_dir is not None:
        folder = Path(options.report_dir)
    else:
        name = path.stem if step is None else f"step_{step}"
        folder = run_folder / f"eval_{split_name}_{name}"
    run_on_rank0(lambda: check_can_write(folder, "report_dir"))
    if (folder / "metrics.jsonl").exists() or (folder / "eval.json").exists():
        raise UserError(f"{folder}: holds a report or a run already; choose report_dir=NEW")

    if "prompt" in metadata:
        check_template_parts(metadata["prompt"], path)
    splits = open_inputs(options, (split_name,), adapter.tokens, metadata.get("prompt"),
                         adapter_origin(metadata, path))
    split = splits[split_name]
    where = f"data.dir: {split_name}"
    check_width(split.vectors, adapter, where)
    check_norm(adapter.norms, split.statistics["norms"][1].item(), where)
    train_split = open_known_texts(options.data, split)
    check_embedder(options.eval, options.model.bf16, device, splits)
    elm = ELM.from_adapter(
        adapter, metadata, path, options.model.llm, options.model.bf16, options.deepspeed,
        options.model.quantization)
    split.encoder.prompt.check_fits(elm.llm)
    check_llm(elm, options.data.max_seq_length)
    if train_split is not None:
        splits["train"] = train_split
    check_ids_of_rows(splits)

    folder.mkdir(parents=True, exist_ok=True)
    header = {"split": split_name, "step": step, "adapter_step": step,
              "llm": elm.llm.name_or_path, "precision": name_precision(elm.llm)}
    is_twin = elm.trained_for[WEIGHTS_HASH] != metadata["trained_for"][WEIGHTS_HASH]
    measured = measure(elm, split, train_split, options.eval)
    del elm, adapter
    free_memory()
    if rank() > 0:
        return {}
    metrics = []
    if not is_twin:  # they are of the LLM of training
        metrics = read_metrics(run_folder / "metrics.jsonl")
    return write_report(measured, split, options, device, folder, run_folder.name, metrics, header)


def generate(options: GenerateOptions) -> None:
    """Answer queries about the vectors of a table, or of texts, as lines of JSON. Raises:
    UserError."""
    check_generate_options(options)
    adapter, metadata = Adapter.load(options.adapter)
    trained = read_trained_llm(metadata, options.adapter)
    bf16 = trained.bf16 if options.bf16 is None else options.bf16
    quantization = options.quantization
    if quantization is None:
        quantization = trained.quantization
    device = start_distributed()
    given = open_given_vectors(options, adapter, metadata, bf16, device)
    row_ids = choose_rows(options.rows, len(given.table))
    scoring_model = choose_scoring_model(options, given.origin)
    vectors_hash = scan_rows(given.table, row_ids, adapter, given.where)  # before the first answer

    job = {
        "hash of the adapter": sha256_short(find_adapter(options.adapter).read_bytes()),
        "query": list(options.query), "id": options.id, "bf16": bf16, "quantization": quantization,
        "max_new_tokens": options.max_new_tokens, "temperature": options.temperature,
        "seed": options.seed, "score": scoring_model,
        "rows": None if options.rows is None else list(options.rows),
        "hash of the vectors": vectors_hash}  # last: other ids or rows make another one
    num_questions = len(row_ids) * len(options.query)
    with opened_answers(options.out, job, row_ids) as file:
        num_done = run_on_rank0(lambda: file.num_answers if file else 0)
        if num_done >= num_questions:
            log.info(f"{options.out}: has all {num_questions} answers; nothing to do")
            return
        if num_done:
            log.info(f"{options.out}: has {num_done} of {num_questions} answers; going on")
        questions_from = functools.partial(vector_questions, given.table, row_ids, options.query)
        scorer = None
        if scoring_model:
            scorer = keep_on_rank0(lambda: AnswerScorer(
                load_embedder(scoring_model, bf16, device, "embedder"), given.origin, given.table,
                row_ids))
        if options.endpoint is None:
            zero = DeepSpeedConfig(zero_stage=options.zero_stage)
            elm = ELM.from_adapter(adapter, metadata, options.adapter, options.llm, bf16, zero,
                                   options.quantization)
            llm_hash = elm.trained_for[WEIGHTS_HASH]  # a twin's are other answers
            run_on_rank0(lambda: file.add_to_job(WEIGHTS_HASH, llm_hash) if file else None)
            answers = answer_by_llm(elm, questions_from, num_done, options.max_new_tokens,
                                    options.temperature, options.seed)
        else:
            server = make_vector_server(options, adapter, trained, bf16)
            answered_before = None
            if file is not None and file.last_answered is not None:
                answered_before = next(questions_from(file.last_answered))
            answers = server.answer(questions_from(num_done), options.temperature, options.seed,
                                    answered_before)
        writer = AnswerWriter(file, scorer, has_ids=options.id is not None)
        writer.write_all(answers, num_done, num_questions)
        if file is not None:
            log.info(f"{options.out}: {num_questions} answers{writer.describe_refused()}")


def check_generate_options(options: GenerateOptions) -> None:
    """Raises: UserError at settings that do not go together."""
    if (options.embeddings is None) == (options.text is None):
        raise UserError("generate: give either a table of vectors (embeddings=FILE), or texts "
                        "(text=…)")
    if options.text is not None and options.id is not None:
        raise UserError("id: is a column of a .parquet file (embeddings=FILE); texts have none")
    for query in options.query:
        check_is_utf8(query, "query")
        Prompt.split_query(query)
    if options.endpoint:
        check_endpoint_options(options)
    elif options.served_model:
        raise UserError("served_model: is the name of a server's model; give its endpoint, too")
    if options.out is not None:
        path = Path(options.out)
        if path.exists() and not path.is_file():
            raise UserError(f"out: {path} is no regular file; name one")
        check_can_write(path.parent, "out")


def check_endpoint_options(options: GenerateOptions) -> None:
    """Raises: UserError at settings that do not go with a server."""
    check_launched_alone("start one by python")
    if any(PLACEHOLDER in query for query in options.query):
        raise UserError(f"endpoint: a query with {PLACEHOLDER} in it needs the LLM in this "
                        "process; leave endpoint out, or the placeholder")
    for key in ("zero_stage", "quantization"):
        if getattr(options, key):
            raise UserError(f"{key}: is of the LLM in this process; leave it or endpoint out")


class GivenVectors(NamedTuple):
    """That a command is asked about."""

    table: VectorTable
    origin: VectorOrigin
    where: str  # what they are called in messages


def open_given_vectors(options: GenerateOptions, adapter: Adapter, metadata: Json, bf16: bool,
                       device: torch.device) -> GivenVectors:
    """Those of a table, or of texts, of the adapter's width. Raises: UserError."""
    if options.text is None:
        where = options.embeddings
        table = open_table(Path(where), "embeddings", options.column, options.id)
        check_width(table, adapter, where)
        return GivenVectors(table, origin_of_table(Path(where), metadata, options.adapter), where)
    origin = adapter_origin(metadata, options.adapter)
    texts = read_given_texts(options.text)
    table = embed_given_texts(texts, options.embedder, origin, adapter, bf16, device)
    return GivenVectors(table, origin, "text")


def choose_rows(given: Sequence[int] | None, num_rows: int) -> Sequence[int]:
    """All, unless some are given. Raises: UserError at one that the table does not have."""
    row_ids = range(num_rows) if given is None else given
    for row_id in row_ids:
        if not 0 <= row_id < num_rows:
            raise UserError(f"rows: no row {row_id}; the table has rows 0 to {num_rows - 1}")
    return row_ids


def check_is_utf8(text: str, key: str) -> None:
    """Raises: UserError at a text with bytes that are no characters, as a command line may have."""
    with user_error(f"{key}: {text!a} is not of UTF-8", UnicodeEncodeError):
        text.encode()


def is_txt(text: str) -> bool:
    """Whether a text that is given alone is the name of a .txt file."""
    return text.lower().endswith(".txt") and "\n" not in text


def is_file_name(text: str) -> bool:
    """Whether it names a file that is there, or is one word that ends as files of vectors or texts
    do."""
    suffixes = r"csv|json|jsonl|md|npy|parquet|safetensors"
    return os.path.isfile(text) or re.fullmatch(rf"\S+\.({suffixes})", text) is not None


def read_given_texts(given: Sequence[str]) -> list[str]:
    """The texts of `text=`: themselves, or, where a name that ends in .txt is given alone, the
    lines of that file. Raises: UserError at one that is empty, and at another file."""
    texts = list(given)
    where = "text"
    is_file = len(texts) == 1 and is_txt(texts[0])
    for text in texts:
        if not is_file and is_file_name(text):
            raise UserError(f"text: {clip(text, 100)} is the name of a file; give one .txt file "
                            "alone, with a text a line, or texts")
    if is_file:
        with user_error("text", ValueError):
            where = expand_path(texts[0])
        check_file(where, "text")
        with user_error(f"text: {where}: no text of UTF-8", UnicodeDecodeError):
            content = Path(where).read_text("utf-8-sig")
        if not content:
            raise UserError(f"text: {where} is empty")
        texts = content.removesuffix("\n").split("\n")
    for i, text in enumerate(texts):
        check_is_utf8(text, "text")
        if not text.strip():
            name = f"line {i + 1}" if is_file else f"text {i}"
            raise UserError(f"{where}: {name} is blank; give a text")
    return texts


def embed_given_texts(texts: list[str], embedder: str | None, origin: VectorOrigin,
                      adapter: Adapter, bf16: bool, device: torch.device) -> Tensor:
    """[n, E] fp32, by the model that made the adapter's vectors, whose origin is given, or by
    another place of it. Raises: UserError if it is not known, or makes narrower vectors."""
    name = embedder or origin.model
    if name is None:
        raise UserError("text: the adapter does not say which model made its vectors; name it by "
                        "embedder=NAME")
    model = load_embedder(name, bf16, device, "embedder", origin.max_tokens)
    width = len(adapter.mean)
    check_embedder_width(model, f"embedder: {name}", width)
    warn_of_other_embedder(name, origin, "the adapter cannot read those of another model")
    vectors = embed_texts(model, texts, truncate_dim=width,
                          prompt=instruction_prompt(origin.instruction))
    del model
    free_memory()
    return vectors


def warn_of_other_embedder(name: str, origin: VectorOrigin, consequence: str) -> None:
    if embedders_differ(VectorOrigin(model=name), origin):
        warn_once(f"embedder = {name}: the vectors are of {origin.model}; {consequence}")


def origin_of_table(path: Path, metadata: Json, adapter: str) -> VectorOrigin:
    """As the table says, else as the adapter does, which was trained on vectors of one embedder.
    Raises: UserError if they name different ones."""
    origin = table_origin(path)
    known = agree_on_origin({
        "the adapter": adapter_origin(metadata, adapter), str(path): origin})
    return origin if origin.model else known


def choose_scoring_model(options: GenerateOptions, origin: VectorOrigin) -> str | None:
    """The embedder of scores, None where none are asked for. Raises: UserError if it is not
    known."""
    is_asked_for = options.score or (options.embedder is not None and options.text is None)
    if not is_asked_for:
        return None
    name = options.embedder or origin.model
    if name is None:
        raise UserError("score: neither the adapter nor the table says which model made the "
                        "vectors; name it by embedder=NAME")
    check_model_name(name, "embedder")
    import_optional("sentence_transformers")
    warn_of_other_embedder(name, origin, "cosines of vectors of two models mean nothing")
    return name


def scan_rows(table: VectorTable, row_ids: Sequence[int], adapter: Adapter,
              where: Path | str) -> str:
    """Read and check the vectors of rows once: returns a hash of row numbers, ids and vectors. Says
    how many ids repeat. Raises: UserError at a vector that is missing, of another width, zero, NaN
    or infinite, and if the norm of all is far from those of training."""
    digest = hashlib.sha256()
    total_square = 0.0
    hashes_of_ids: list[np.ndarray] = []  # of their texts: Python's hashes of -1 and -2 are equal
    num_blocks = math.ceil(len(row_ids) / ROWS_OF_BLOCK)
    for block in progress(read_blocks(table, row_ids), "vectors", total=num_blocks):
        total_square += check_block(block, where)
        digest.update(json.dumps([block.row_ids, block.ids]).encode())
        digest.update(block.vectors.contiguous().numpy())
        if block.ids is not None:
            hashes_of_ids.append(np.array([hash(repr(own_id)) for own_id in block.ids]))
    check_norm_of_all(total_square, len(row_ids), adapter, where)
    if hashes_of_ids:
        num_ids = len(np.unique(np.concatenate(hashes_of_ids)))
        if num_ids < len(row_ids):
            log.warning(f"id: {where}: {len(row_ids)} rows have {num_ids} different ids; all are "
                        "answered")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def opened_answers(out: str | None, job: Json,
                   row_ids: Sequence[int]) -> Iterator[AnswerFile | None]:
    """The file of answers about these rows, locked; None where there is none, and on other
    processes than 0. All processes take part. Raises: UserError; OSError."""

    def claim() -> AnswerFile:
        path = Path(out)
        with report_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.with_name(f".{path.name}.lock")))
        return AnswerFile(path, job, row_ids)

    with contextlib.ExitStack() as stack:
        yield None if out is None else keep_on_rank0(claim)


def make_vector_server(options: GenerateOptions, adapter: Adapter, trained: TrainedLLM,
                       bf16: bool) -> VectorServer:
    """Of the LLM, the tokenizer alone is loaded. Raises: UserError."""
    name = options.llm or trained.name
    prompt = Prompt(load_tokenizer(name, "llm"), trained.template, trained.template_parts)
    found = {TOKENIZER_HASH: prompt.ids_hash(), **adapter.settings}
    check_trained_for(trained.trained_for, found, f"{options.adapter}: {name}")
    for query in options.query:
        for token in prompt.tokenizer.added_tokens_decoder.values():
            if token.content.strip() and token.content in query:
                raise UserError(f"endpoint: a server takes {token.content} in a query for a "
                                "control token; leave endpoint out, or the token")
    server = ChatServer(options.endpoint, options.served_model or name, trained.template,
                        options.max_new_tokens)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return VectorServer(server, adapter.to(find_device()), prompt, dtype, options.concurrency)


class AnswerWriter:
    """Scores answers and writes them, on process 0: to a file, else as lines of the standard
    output."""

    def __init__(self, file: AnswerFile | None, scorer: AnswerScorer | None, has_ids: bool):
        self.file = file
        self.scorer = scorer
        self.has_ids = has_ids
        self.num_refused = 0
        self.is_utf8 = str(sys.stdout.encoding).lower() == "utf-8"

    def write_all(self, answers: Iterator[VectorAnswer], num_done: int, total: int) -> None:
        """Take the answers, on all processes, and write them. A bar shows how many of `total` there
        are, unless answers appear on the same terminal; num_done are there already. Raises:
        UserError of `answers`, after those before it are written; or if writing fails."""
        is_mixed = self.file is None and sys.stdout.isatty()
        options = {"disable": True} if is_mixed else {}
        block_size = 1 if self.scorer is None else ANSWERS_SCORED_AT_ONCE
        with progress(None, "answers", total=total, initial=num_done, unit="answer",
                      **options) as bar:
            for block in blocks_to_the_last(answers, block_size):
                if rank() == 0:
                    self._write(block)
                    bar.update(len(block))

    def _write(self, answers: list[VectorAnswer]) -> None:
        scores: list[Json] = [{} for _ in answers]
        if self.scorer is not None:
            scores = self.scorer.score(answers)
        entries = []
        for answer, scores_of_answer in zip(answers, scores, strict=True):
            entries.append(describe_answer(answer, self.has_ids) | scores_of_answer)
            if answer.refusal:
                self._count_refusal(answer.refusal)
        if self.file is not None:
            self.file.append(entries)
            return
        for entry in entries:
            print(json.dumps(entry, ensure_ascii=not self.is_utf8), flush=True)

    def _count_refusal(self, refusal: str) -> None:
        if self.num_refused == 0:
            log.warning("endpoint: the server refuses a question, which gets an error in place of "
                        f"an answer; the others go on: {refusal}")
        self.num_refused += 1

    def describe_refused(self) -> str:
        if self.num_refused == 0:
            return ""
        return f"; {self.num_refused} of the questions asked now were refused"


def blocks_to_the_last(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """As in_blocks; but the items before an error are a block, too. Raises: what `items` raises."""
    block = []
    try:
        for item in items:
            block.append(item)
            if len(block) == size:
                yield block
                block = []
    except UserError:
        if block:
            yield block
        raise
    if block:
        yield block


def describe_answer(answer: VectorAnswer, has_ids: bool) -> Json:
    """A line of the output."""
    question = answer.question
    entry: Json = {"row": question.row_id}
    if has_ids:
        entry["id"] = question.id
    entry["query"] = question.query
    if answer.refusal:
        entry["error"] = answer.refusal
    else:
        entry["answer"] = answer.text
    return entry


# -----------------------------------------------------------------------------
# Command line


class Command(NamedTuple):
    name: str
    operands: dict[str, str]  # the paths that it takes: argument -> name in the usage
    config_class: type[Table]  # what `key=value` sets
    summary: str
    example: str
    run: Callable[[argparse.Namespace], None]
    less_memory: str  # settings that need less
    after_stop: str = ""  # what to do after Ctrl-C, where the command does not say it itself


def run_train(args: argparse.Namespace) -> None:
    train(load_config(args.toml, args.settings))


def run_eval(args: argparse.Namespace) -> None:
    if "output.dir" in parse_overrides(args.settings):
        raise UserError("output.dir: eval writes its report to report_dir=NEW")
    evaluate(load_config(args.toml, args.settings, EvalOptions))


def run_generate(args: argparse.Namespace) -> None:
    generate(load_config(None, args.settings, GenerateOptions))


def run_sweep_file(args: argparse.Namespace) -> None:
    run_sweep(load_sweep(args.toml, args.settings))


LESS_MEMORY = ("model.grad_checkpoint = true, or data.max_seq_length = 512, or on several GPUs "
               "deepspeed.zero_stage = 3")

COMMANDS = (
    Command(
        name="train", operands={"toml": "TRAIN.TOML"}, config_class=Config, run=run_train,
        summary="train an adapter and report on it",
        example="python elm.py train.toml train.lr=2e-4      (by several GPUs: deepspeed elm.py …)",
        less_memory=LESS_MEMORY),
    Command(
        name="eval", operands={"toml": "TRAIN.TOML"}, config_class=EvalOptions, run=run_eval,
        summary="report on any adapter",
        example="python elm.py eval train.toml adapter=data/checkpoints/tiny",
        less_memory=LESS_MEMORY),
    Command(
        name="generate", operands={}, config_class=GenerateOptions, run=run_generate,
        summary="answers about vectors, as lines of JSON",
        example="python elm.py generate adapter=data/checkpoints/tiny 'rows=[0]' "
                "embeddings=data/tiny/embeddings/test_embeddings.safetensors "
                "'query=What is it about?'",
        less_memory="max_new_tokens = 64, or on several GPUs zero_stage = 3, or a server "
                    "(endpoint=URL)",
        after_stop="with out=FILE the same command goes on"),
    Command(
        name="sweep", operands={"toml": "SWEEP.TOML"}, config_class=SweepConfig,
        run=run_sweep_file,
        summary="search settings by Optuna: the best study.metric on validation",
        example="python elm.py sweep sweep.toml study.trials=20 study.metric=gap_closed",
        less_memory="base.model.grad_checkpoint = true, or base.data.max_seq_length = 512",
        after_stop="the same command goes on, and begins the trial again that was stopped"))


def describe_tables(config_class: type[Table], name: str = "") -> str:
    """The fields of a config and of its tables, as they stand in a source file with their comments.
    A blank line ends them. (inspect.getsource parses the whole file for each class: too slow.)"""
    code = Path(inspect.getfile(config_class)).read_text("utf-8")
    start = code.index(f"\nclass {config_class.__name__}(")
    _, _, fields = code[start + 1 :].partition("\n\n")[0].partition("\n")
    fields = re.sub(r"    \w+: \w+Config = \w+Config\(\)\n?", "", fields)  # tables follow below
    text = f"\n[{name}]\n{fields}\n" if name else f"\n{fields}\n"
    if not fields:
        text = ""
    for field_name, info in config_class.model_fields.items():
        if isinstance(info.default, Table):
            text += describe_tables(type(info.default), field_name)
    return text


# Types and values of settings as --help writes them.
PLAIN_WORDS = {
    "PathStr": "path", "str": "text", "bool": "true or false",
    "int": "integer", "PositiveInt": "integer above 0", "NonNegativeInt": "integer from 0",
    "float": "number", "PositiveFloat": "number above 0", "NonNegativeFloat": "number from 0",
    "Probability": "number from 0 to below 1", "Cosine": "number from -1 to 1",
    "Share": "number from 0 to 1", "Shares": "three numbers", "NumTasks": "integer above 0",
    "Seed": "integer from 0", "ZeroStage": "0 to 3", "RowIds": "list of integers",
    "TextList": "text or list of texts", "Quantization": '"off", "nf4", "int8" or table',
    "elm.Quantization": '"off", "nf4", "int8" or table',
    "TaskNames": "list of texts", "ServerURL": "URL", "dict[str, Any]": "table",
    "TemplateArguments": "table", "elm.TemplateArguments": "table",
    "VECTOR_COLUMN": '"embedding"', "elm.VECTOR_COLUMN": '"embedding"', "TEXT_COLUMN": '"text"',
    "TASKS": "all 13", "elm.TASKS": "all 13", "None": "none", "True": "true", "False": "false"}


def plain_field(line: str) -> str:
    """A line of a config's class in words of TOML: `name: PositiveInt | None = None  # …` becomes
    `name = none (integer above 0, or none)  # …`. Lines of comments stay."""
    code, mark, comment = line.partition("  #")
    match = re.fullmatch(r"    (\w+): (.+?)(?: = (.+))?", code)
    if match is None:
        return line
    name, types, default = match.groups()
    words = []
    for part in types.split(" | "):
        choices = re.fullmatch(r"Literal\[(.+)\]", part)
        parts = choices[1].split(", ") if choices else [part]
        words += [PLAIN_WORDS.get(word, word) for word in parts]
    value = ""
    if default is not None:
        default = default.replace("(", "[").replace(")", "]")
        value = f" = {PLAIN_WORDS.get(default, default)}"
    return f"    {name}{value} ({', or '.join(words)}){mark}{comment}"


class ShowHelp(argparse.Action):
    """--help of a command: usage, an example, and its settings as they stand in the file."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        command = parser.get_default("command")
        print(f"{command.summary}\n")
        print(parser.format_usage())
        example = command.example.replace("python elm.py", own_program())
        print(f"for example: {example}")
        print("\nSettings, as name=value in the words of TOML; none restores a default:")
        for line in describe_tables(command.config_class).split("\n"):
            print(plain_field(line))
        parser.exit()


def make_parser(
    program: str, description: str, commands: Sequence[Command]
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"elm {__version__}")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # of launchers
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        add_command(subparsers, command)
    return parser


def add_command(subparsers: Any, command: Command) -> None:
    """A sub-command with its operands, settings, and --help."""
    subparser = subparsers.add_parser(command.name, help=command.summary, add_help=False)
    subparser.set_defaults(command=command)
    subparser.add_argument("-h", "--help", nargs=0, action=ShowHelp)
    for argument, name in command.operands.items():
        subparser.add_argument(argument, metavar=name, type=operand_path)
    subparser.add_argument("settings", metavar="section.key=value", nargs="*", default=[])


def operand_path(text: str) -> str:
    """A path, expanded. Raises: ArgumentTypeError where a setting stands in the place of a file."""
    if not text:
        raise argparse.ArgumentTypeError("a path cannot be empty")
    if "=" in text and not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is a setting; the file comes first")
    return expand_path(text)


def name_command(arguments: list[str]) -> list[str]:
    """`TRAIN.TOML …` -> `train TRAIN.TOML …`. Others stay as they are."""
    names = ["help", *(command.name for command in COMMANDS)]
    for i, argument in enumerate(arguments):
        if argument.startswith("-"):
            continue
        is_file = argument.endswith(".toml") or Path(argument).exists()
        if argument not in names and is_file:
            return [*arguments[:i], "train", *arguments[i:]]
        break
    return arguments


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str],
                    commands: Sequence[str]) -> argparse.Namespace:
    """Raises: SystemExit, after the usage and what is wrong with the arguments, or after --help.
    `commands` are names."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    words = [argument for argument in arguments if not argument.startswith("-")]
    if words and commands and words[0] not in commands:
        if "=" in words[0]:
            parser.error(f"{words[0]} is a setting; the command or the file comes first")
        hint = did_you_mean(words[0], commands)
        if not hint:
            hint = f"; the commands are {', '.join(commands)}"
        parser.error(f"{words[0]} is not a command{hint}")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{undashed(unknown[0], args)}")
    return args


def undashed(argument: str, args: argparse.Namespace) -> str:
    """A hint at the setting that --name=value stands for, or ""."""
    name, _, value = argument.lstrip("-").partition("=")
    name = name.replace("-", "_")
    last_part = name.rpartition(".")[2]
    for key in dotted_keys(args.command.config_class):
        if key == name or key.rpartition(".")[2] == last_part:
            return f"; settings have no dashes: {key}={value or 'VALUE'}"
    return ""


def run_command(parser: argparse.ArgumentParser, arguments: list[str],
                commands: Sequence[Command] = ()) -> int:
    """Parse, run, and turn what the user can correct into lines on stderr. Returns the exit code: 0
    only if the job is done."""
    after_stop = ""
    try:
        args = parse_arguments(parser, arguments, [command.name for command in commands])
        after_stop = args.command.after_stop
        args.command.run(args)
        return 0
    except UserError as e:
        return print_error(str(e))
    except torch.OutOfMemoryError as e:
        return print_error(f"{e}\nless memory is needed with {args.command.less_memory}")
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.filename is None:  # no file of the user's
            raise
        return print_error(f"{e.filename}: {e.strerror}")
    except SystemExit as e:
        code = exit_code(e)
        if code > 128 and after_stop:  # by a signal
            print(f"elm: stopped; {after_stop}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print(f"elm: stopped; {after_stop}" if after_stop else "elm: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def print_error(text: str) -> int:
    """Lines on stderr; of a long one its two ends. Returns the exit code."""
    for line in text.splitlines():
        if len(line) > 1000:
            line = f"{line[:500]} … {line[-500:]}"
        print(f"elm: {line}", file=sys.stderr)
    return 2


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; 2 after an error that the user can correct."""
    given = sys.argv[1:] if arguments is None else arguments
    program = "elm" if own_program() == "elm" else "elm.py"
    parser = make_parser(program, __doc__, COMMANDS)
    return run_command(parser, name_command(given), COMMANDS)


def exit_process(code: int) -> None:
    """End at once: threads of torch and DeepSpeed now and then abort when the interpreter ends."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def open_closed_streams() -> None:
    """Where a standard stream is closed, as by `>&-`, Python has None, and the next file that is
    opened would take the stream's number, with all that libraries write to it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, open to the end


def run(entry: Callable[[], int] = main) -> None:
    open_closed_streams()
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    exit_process(entry())


if __name__ == "__main__":
    run()
