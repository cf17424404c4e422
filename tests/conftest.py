"""Small real things for the tests: random LLMs of several architectures, a byte tokenizer, data."""

import importlib.util
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order; a core for each process
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in (".", "tests", "data", "data/tiny")]

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import elm

CPU = torch.device("cpu")
NO_TABLES = os.devnull  # a TOML file of defaults
ARCHITECTURES = {
    "qwen3": dict(head_dim=8, tie_word_embeddings=True),
    "llama": {},
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=512),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "gemma3_text": dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "cohere": dict(logit_scale=0.25),
    "granite": dict(logits_scaling=4.0, embedding_multiplier=2.0),
}
QUICK_ARCHITECTURES = ("qwen3", "gemma2", "gpt2")  # the others are tested with -m ""
EVERY_ARCHITECTURE = [
    kind if kind in QUICK_ARCHITECTURES else pytest.param(kind, marks=pytest.mark.slow)
    for kind in ARCHITECTURES
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT, eos: str = "<|im_end|>"):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token=eos, pad_token="<|endoftext|>",
        chat_template=chat_template)  # fmt: skip


PROMPT = elm.Prompt(byte_tokenizer())


def make_llm(folder: Path, kind="qwen3", chat_template: str | None = CHAT, **shape: int) -> Path:
    """A random LLM of 2 layers and width 32, with its tokenizer."""
    tok = byte_tokenizer(chat_template)
    common = dict(
        vocab_size=len(tok) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    if kind == "gpt2":
        common = {k: v for k, v in common.items() if k.endswith("_id") or k == "vocab_size"}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**common | ARCHITECTURES.get(kind, {}) | shape)
    llm = AutoModelForCausalLM.from_config(config)
    for p in llm.parameters():  # away from the flat start, so that differences show
        p.data += 0.1 * torch.randn_like(p)
    llm.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def make_data(folder: Path, num_rows=40, num_vectors=10, width=12, scale=1.0) -> Path:
    """Random rows of all tasks with ragged responses, and random vectors."""
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    for sub in ("embeddings", "synthesis"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", "val", "test")):
        vectors = torch.randn(num_vectors, width, generator=torch.Generator().manual_seed(seed))
        save_file({"embeddings": scale * vectors}, vectors_path(folder, split))
        rows = [dict(task_type=elm.TASKS[i % 13], embedding_file_idx=rng.randrange(num_vectors),
                     query=rng.choice(["What?", "Say it.", "Is <EMB> so, and how?"]),
                     response=" ".join(rng.choices(words, k=rng.randint(1, 12))),
                     text=" ".join(rng.choices(words, k=rng.randint(4, 9))))
                for i in range(num_rows)]
        write_rows(folder, split, rows)
    return folder


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module: its folder is on no path."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vectors_path(folder: Path, split: str = "train") -> Path:
    return elm.vectors_path(str(folder), split)


def rows_path(folder: Path, split: str = "train") -> Path:
    return elm.rows_path(str(folder), split)


def read_table(folder: Path, split: str = "train") -> torch.Tensor:
    return elm.open_vectors(vectors_path(folder, split)).clone()


def write_rows(folder: Path, split: str, rows: list) -> None:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    rows_path(folder, split).write_text(text)


def open_train(folder: Path, prompt, num_soft=1, limit=256, tasks=elm.TASKS) -> elm.Split:
    return elm.open_split(str(folder), "train", tasks, elm.Encoder(prompt, num_soft, limit))


def build_elm(llm: Path, split: elm.Split, device="cpu", bf16=False, **settings) -> elm.ELM:
    """A fresh adapter, the same each time, on an LLM."""
    model = elm.load_llm(str(llm), torch.device(device), bf16)
    torch.manual_seed(1)
    settings |= dict(hidden_dim=24, tokens=split.encoder.num_soft_tokens)
    adapter = elm.fresh_adapter(model, split.statistics, **settings)
    return elm.ELM(model, adapter.to(device), split.encoder.prompt).eval()


def limit_memory(monkeypatch, most: int) -> None:
    """An attention that has memory for training on rows of `most` packed tokens."""

    def limited(module, query, *rest, **options):
        if torch.is_grad_enabled() and query.shape[2] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return elm.packed_attention(module, query, *rest, **options)

    elm.register_packed_attention()  # it will not do so again
    monkeypatch.setitem(AttentionInterface._global_mapping, elm.PACKED, limited)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def go(settings: list, *more: str) -> tuple[dict, Path]:
    """The report and the folder of a run."""
    cfg = elm.load_config(None, [*settings, *more])
    return elm.train(cfg), Path(cfg.output.dir)


def command(*words) -> tuple[int, str]:
    """The exit code of a command of elm, and what it said."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = elm.main(list(map(str, words)))
    assert "Traceback" not in said.getvalue()
    return code, said.getvalue()


def refused(message: str, *words) -> str:
    """With exit code 2 and one line that has the message; all that it said."""
    code, said = command(*words)
    lines = [line for line in said.splitlines() if re.match("elm: (?!warning)", line)]
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0]), (words, message, said)
    return said


def anonymous_memory() -> int:
    """Bytes of this process that are not of a mapped file."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def deepspeed_launcher(processes: int) -> tuple[str, ...]:
    script = str(Path(sys.executable).parent / "deepspeed")
    return script, f"--num_gpus={processes}", f"--master_port={free_port()}"


def start_elm(*arguments, launcher: tuple[str, ...] = (), **environment: str):
    """`elm.py` as a user starts it, in a process of its own, to its end."""
    start = launcher or (sys.executable,)
    return subprocess.run(
        [*start, str(ROOT / "elm.py"), *map(str, arguments)], capture_output=True, text=True,
        timeout=300, env={**os.environ, **environment})  # fmt: skip


# ------------------------------------------------------------------ what pytest does here


@pytest.fixture
def processes():
    """For tests that start processes: whoever asks for it is slow."""


@pytest.fixture(autouse=True)
def no_unnamed_processes(request, monkeypatch):
    """Refuses Python processes of tests that do not ask for `processes`; ruff's is quick."""
    if "processes" in request.fixturenames:
        return
    popen = subprocess.Popen.__init__

    def guarded(self, args, *rest, **options):
        words = [str(word) for word in args] if isinstance(args, list | tuple) else [str(args)]
        starts_python = re.match(r"python|deepspeed|torchrun", Path(words[0]).name)
        assert not starts_python or "ruff" in words, "ask for the fixture `processes` or `run`"
        popen(self, args, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", guarded)


@pytest.fixture
def run(processes):
    """See start_elm."""
    return start_elm


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "processes" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a skipped test fails, unless it needs a GPU or a real model that is not there."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2]
        if not re.search(r"GPU|real model", reason):
            report.outcome = "failed"
            report.longrepr = f"skipped in CI: {reason}"
    return report


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def data_dir(tmp_path):
    return make_data(tmp_path / "data")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder])


@pytest.fixture
def start_server():
    """Start a TinyServer with these failures; all stop when the test ends."""
    from tiny_server import TinyServer  # which imports this file

    servers = []

    def start(*failures: str, **behaviour) -> TinyServer:
        servers.append(TinyServer(failures, **behaviour))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def settings(llm_dir, data_dir, tmp_path):
    return make_settings(llm_dir, data_dir, tmp_path / "out")


def make_settings(llm: Path, data: Path, out: Path) -> list[str]:
    """Overrides of a run of six steps, two and a half epochs, in less than a second."""
    return [
        f"model.llm={llm}", "model.hidden_dim=24", "model.bf16=false", f"data.dir={data}",
        "data.max_seq_length=256", "data.num_workers=1", "train.batch_size=16",
        "train.grad_accum=1", "train.max_steps=6", "train.lr=1e-2", "train.warmup_steps=2",
        "train.eval_steps=3", "train.save_steps=2", "train.logging_steps=1", "eval.samples=6",
        "eval.max_new_tokens=5", f"eval.bertscore_model={ROOT / 'data/tiny/scorer'}",
        f"output.dir={out}"]  # fmt: skip


@pytest.fixture(autouse=True)
def own_linear():
    """DeepSpeed replaces it at ZeRO 3, for good, by one that differs in the last bits."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(autouse=True)
def no_warning_was_given_before():
    elm.warn_once.cache_clear()


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that equal means equal."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(llm_dir, tmp_path_factory):
    """(report, folder, settings) of a run of six steps. For tests that only read it."""
    folder = tmp_path_factory.mktemp("trained")
    settings = make_settings(llm_dir, make_data(folder / "data"), folder / "out")
    report, out = go(settings)
    return report, out, settings
