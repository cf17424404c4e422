"""synthesize: from texts alone to a trained adapter, on the embedded default; servers that fail."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_jsonl, rows_path, run, vectors_path
from test_commands import TINY, refused

import elm

MODELS = [f"model={TINY / 'llm'}", f"embedder={TINY / 'embedder'}", "bf16=false"]
MODELS += [f"queries={TINY / 'queries.toml'}", "max_new_tokens=64", "split=[0.7, 0.15, 0.15]"]
ROWS = read_jsonl(TINY / "synthesis" / "train_synthesis.jsonl")
TEXTS = list(dict.fromkeys(row["text"] for row in ROWS))


def write_texts(path: Path, texts: list) -> Path:
    lines = [t if isinstance(t, dict) else {"text": t} for t in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def synthesize(source: Path, out: Path, *more: str) -> dict[str, bytes]:
    """The files of the data set by name, and nothing beside it."""
    assert elm.main(["synthesize", str(source), str(out), *MODELS, *more]) == 0
    assert not list(out.parent.glob(f".{out.name}.*"))
    return {p.name: p.read_bytes() for p in out.rglob("*.s*")}  # not train.toml, which names it


def all_rows(out: Path) -> list[dict]:
    return [row for split in elm.SPLITS for row in read_jsonl(rows_path(out, split))]


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl", TEXTS[:40])


def test_queries_are_those_of_the_tiny_llm_and_of_all_tasks():
    import make

    told = elm.read_toml(str(TINY / "queries.toml"), {})
    assert told == make.QUERIES and told.keys() == set(elm.TASKS)
    assert elm.QUERIES.keys() == {*elm.TASKS, *elm.MORE_TASKS}


@pytest.mark.slow
def test_from_texts_to_a_report(tmp_path):
    source, out = write_texts(tmp_path / "t.jsonl", TEXTS[:300]), tmp_path / "mine"
    done = run("synthesize", source, out, *MODELS)
    assert done.returncode == 0 and f"next: deepspeed elm.py {out}/train.toml" in done.stdout
    assert (out / "train.toml").read_text() in done.stdout
    more = ["model.hidden_dim=64", "train.max_steps=60", "train.lr=2e-3", "train.batch_size=16",
            "train.warmup_steps=5", "eval.samples=8", "eval.max_new_tokens=48",
            f"eval.bertscore_model={TINY / 'scorer'}", f"output.dir={tmp_path / 'run'}"]  # fmt: skip
    done = run(out / "train.toml", *more)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert told["gap_closed"] > 0.6 and "reconstruct" in told["tasks"]
    adapter = tmp_path / "run" / "adapter_best.safetensors"
    done = run("eval", out / "train.toml", *more[:-1], f"adapter={adapter}")
    assert done.returncode == 0 and "gap_closed: " in done.stdout


def test_rows_vectors_and_queries(texts, tmp_path):
    out = tmp_path / "mine"
    synthesize(texts, out, "reconstruct=0.5")
    rows, shipped = all_rows(out), {(r["text"], r["task_type"]): r for r in ROWS}
    model = elm.load_embedder(str(TINY / "embedder"))
    for split in elm.SPLITS:
        table = elm.open_vectors(vectors_path(out, split))
        for row in read_jsonl(rows_path(out, split)):
            vector = elm.embed_texts(model, [row["text"]], "cpu")[0]
            assert torch.allclose(table[row["embedding_file_idx"]], vector, atol=1e-5)
    assert {row["text"] for row in rows} == {*TEXTS[:40]}
    queries = elm.QUERIES | elm.read_toml(str(TINY / "queries.toml"), {})
    tasks = Counter(row["task_type"] for row in rows)
    assert 10 <= tasks.pop("reconstruct") <= 30 and sum(tasks.values()) == 6 * 40
    assert all(row["query"] in queries[row["task_type"]] for row in rows)
    both = [(r, shipped[k]) for r in rows if (k := (r["text"], r["task_type"])) in shipped]
    facts = [{w for w in b["response"].split() if w.strip(".,?") in b["text"]} for _, b in both]
    said = [len(f & {*a["response"].split()}) / len(f) for (a, _), f in zip(both, facts) if f]
    assert len(said) > 40 and sum(said) / len(said) > 0.7
    begin = next(r for r in rows if r["task_type"] == "reconstruct")
    assert begin["text"].startswith(begin["response"]) and begin["response"].count(".") == 2


def test_the_prompt_is_that_of_the_text_ceiling(tmp_path):
    options = elm.parse_options(elm.SynthesizeOptions, MODELS)
    llm = elm.load_llm(str(TINY / "llm"), torch.device("cpu"), False)
    tokenizer = elm.transformers.AutoTokenizer.from_pretrained(TINY / "llm")
    chats = [[dict(role="user", content=f"{t}\nGive five keywords.")] for t in TEXTS[:3]]
    ids = [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats]
    out = [llm.generate(torch.tensor([i]), max_new_tokens=64, do_sample=False)[0] for i in ids]
    own = [tokenizer.decode(o[len(i) :], skip_special_tokens=True) for o, i in zip(out, ids)]
    rows = [dict(task_type="keywords", query="Give five keywords.", text=t, response="")
            for t in TEXTS[:3]]  # fmt: skip
    prompt = elm.Prompt.from_tokenizer(tokenizer)
    assert elm.ask_llm(options, llm, prompt, rows, seed=0, temperature=0) == [
        (t, True) for t in own
    ]


@pytest.mark.slow
def test_killed_and_started_again_and_shuffled_ends_with_the_same_bytes(tmp_path):
    source, out = write_texts(tmp_path / "t.jsonl", TEXTS[:150]), tmp_path / "mine"
    whole = synthesize(source, tmp_path / "whole", "temperature=0.7")
    write_texts(source, [*TEXTS[149::-1], TEXTS[3].upper(), f" {TEXTS[4]}"])  # and copies

    def answers() -> int:
        return sum(p.read_bytes().count(b"\n") for p in tmp_path.glob(".mine.*/answers.jsonl"))

    kills, command = 0, [sys.executable, ROOT / "elm.py", "synthesize", source, out, *MODELS]
    while not out.exists():
        before = answers()
        child = subprocess.Popen([*command, "temperature=0.7"], stderr=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL, env=os.environ)  # fmt: skip
        while child.poll() is None:
            if answers() >= before + 15:
                child.send_signal(signal.SIGKILL)
                kills += 1
                child.wait()
                (work,) = tmp_path.glob(".mine.*/answers.jsonl")
                with open(work, "a") as f:
                    f.write('[["torn')
            time.sleep(0.005)
        assert child.returncode in (0, -signal.SIGKILL) and (out.exists() or answers() > before)
    assert kills >= 2 and not list(tmp_path.glob(".mine.*"))
    assert {p.name: p.read_bytes() for p in out.rglob("*.s*")} == whole


def test_splits_are_stable_and_follow_groups(tmp_path):
    few = elm.split_texts(write_texts(tmp_path / "a.jsonl", TEXTS[:200]), (0.8, 0.1, 0.1))
    more = elm.split_texts(write_texts(tmp_path / "b.jsonl", TEXTS[::-1]), (0.8, 0.1, 0.1))
    assert few == {text: more[text] for text in few} and list(few) == sorted(TEXTS[:200])
    sizes = Counter(more.values())
    assert 600 < sizes["train"] < 680 and 50 < sizes["val"] < 110 and 50 < sizes["test"] < 110
    grouped = [dict(text=t, group=i // 8) for i, t in enumerate(TEXTS)]
    grouped[0] |= dict(split="test")
    split = elm.split_texts(write_texts(tmp_path / "c.jsonl", grouped), (0.5, 0.25, 0.25))
    assert split[TEXTS[0]] == "test" and len({split[t] for t in TEXTS[1:8]}) == 1
    assert all(len({split[t] for t in TEXTS[i : i + 8]}) == 1 for i in range(8, 800, 8))
    few = write_texts(tmp_path / "d.jsonl", ["A  b", "a B", "c", "d", "e", "f", "g", "h", "i", "j"])
    assert list(elm.split_texts(few, (0.5, 0.5, 0))) == ["A  b", *"cdefghij"]


@pytest.mark.parametrize(
    "answer, finished, why",
    [("It is about frogs.", True, ""), ("It is about", False, "not finished"),
     (" \n", True, "empty"), ("a b c d " * 5, True, "repetitive"), (TEXTS[0], True, "copied"),
     (f"{TEXTS[0].upper()} And more.", True, "copied"), ("Here is a summary.", True, "preamble"),
     ("Sure! It is.", True, "preamble"), ("Surely it is so.", True, "")],
)  # fmt: skip
def test_filters(answer, finished, why):
    row = dict(task_type="summary", text=TEXTS[0])
    assert elm.fault(row, answer, finished) == why
    if why == "copied":
        assert elm.fault(row | dict(task_type="style_casual"), answer, finished) == ""


# -----------------------------------------------------------------------------
# A server


class Server(ThreadingHTTPServer):
    """Answers by the tiny LLM, but at first each message in the way of one of `faults`."""

    daemon_threads = True

    def __init__(self, faults: tuple[str, ...] = (), status: int = 200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.status, self.asked, self.keys = faults, status, Counter(), set()
        tokenizer = elm.transformers.AutoTokenizer.from_pretrained(TINY / "llm")
        self.prompt, self.lock = elm.Prompt.from_tokenizer(tokenizer), threading.Lock()
        self.llm = elm.load_llm(str(TINY / "llm"), torch.device("cpu"), False)
        self.endpoint = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, body: dict) -> tuple[str, bool]:
        ids = self.prompt.ids([body["messages"][0]["content"]])[0]
        ids = torch.tensor(self.prompt.head + ids + self.prompt.tail)
        with self.lock, torch.no_grad():
            embeds = [self.llm.get_input_embeddings()(ids)]
            return elm.generate_batch(self.llm, self.prompt, embeds, body["max_tokens"])[0]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        server.keys.add(self.headers["Authorization"])
        content = json.loads(body)["messages"][0]["content"]
        server.asked[content] += 1
        ways = server.faults[server.asked[content] - 1 :]
        status = int(ways[0]) if ways and ways[0].isdecimal() else server.status
        if ways and ways[0] == "nothing":
            return
        if status == 200 and not ways:
            text, finished = server.answer(json.loads(body))
            choice = dict(
                message=dict(content=text), finish_reason="stop" if finished else "length"
            )
            reply = json.dumps(dict(choices=[choice])).encode()
        else:
            reply = (
                b'{"error": "the model `x` does not exist"}' if status > 200 else b"<garbage\xff"
            )
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply) + 9 * (ways[:1] == ("half",))))
        self.end_headers()
        self.wfile.write(reply)


def test_a_server_that_fails_at_first_gives_the_answers_of_the_llm(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(elm, "WAITS", (0.01,) * 6)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = Server(("429", "garbage", "half", "nothing", "503"))
    there = synthesize(texts, tmp_path / "there", f"endpoint={server.endpoint}", "concurrency=8")
    assert set(server.asked.values()) == {6} and server.keys == {"Bearer sk-secret"}
    here = synthesize(texts, tmp_path / "here")
    assert there == here and not any(b"secret" in content for content in there.values())


def test_servers_that_are_refused(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(elm, "WAITS", (0.01,) * 2)
    start = ["synthesize", texts, tmp_path / "mine", *MODELS]
    refused(capsys, [*start, "endpoint=http://127.0.0.1:9/v1"], "endpoint: .* refused")
    refused(capsys, [*start, "endpoint=localhost"], "endpoint = 'localhost': .* match pattern")
    server = Server(status=404)
    refused(capsys, [*start, f"endpoint={server.endpoint}"], "404.* `x` does not exist")
    assert set(server.asked.values()) == {1}
    for way in ("429", "garbage", "half", "nothing"):
        server = Server((way,) * 9)
        refused(capsys, [*start, f"endpoint={server.endpoint}", "concurrency=2"], "endpoint: ")
        assert max(server.asked.values()) == 3
    synthesize(texts, tmp_path / "mine", f"endpoint={Server().endpoint}")  # it goes on


def test_rejected_answers_are_asked_for_once_more_and_left_out(texts, tmp_path, capsys):
    out, asked = tmp_path / "mine", "max_new_tokens=12"  # enough for the keywords of few
    synthesize(texts, out, asked, "seed=3", "reconstruct=1")
    printed, rows = capsys.readouterr().out, all_rows(out)
    lost = sum(map(int, __import__("re").findall(r"(\d+) not finished", printed)))
    assert lost > 20 and lost + len(rows) == 7 * 40
    assert {row["text"] for row in rows} == {*TEXTS[:40]}  # reconstruct needs no LLM


def test_bad_input(texts, tmp_path, capsys):
    taken, new, files = tmp_path / "taken", tmp_path / "new", {}
    taken.mkdir()
    (taken / "precious").write_text("")
    for name, lines in dict(none=[], gap=["a", " "], few=["a", "b"],
                            odd=[dict(text="a", split="dev"), *"bcdefg"]).items():  # fmt: skip
        files[name] = write_texts(tmp_path / f"{name}.jsonl", lines)
    (tmp_path / "q.toml").write_text('summary = "Sum it up."')
    cases = [
        ([files["none"], new], "none.jsonl: is empty"),
        ([files["gap"], new], "gap.jsonl:2: the text is empty"),
        ([files["few"], new], "few.jsonl: .* train and val need two"),
        ([files["odd"], new], "odd.jsonl: .*'dev': 1.* train and val"),
        ([tmp_path / "nowhere", new], "nowhere: No such file"),
        ([texts, taken, "model=nonsense/x"], "taken: exists already"),
        ([texts, tmp_path / "no" / "x"], "its folder does not exist"),
        ([texts], "synthesize: takes TEXTS OUT key=value"),
        ([texts, new, "tasks=some"], "tasks = 'some': must be a valid integer"),
        ([texts, new, "split=[1, 0, 0]"], "split.1 = 0: must be greater than 0"),
        ([texts, new, f"queries={tmp_path / 'q.toml'}"], "queries.summary = .*must be a"),
        ([texts, new, f"embedder={tmp_path / 'none'}"], "embedder: no folder"),
        ([texts, new, f"model={tmp_path / 'none'}"], "model: no folder"),
    ]  # fmt: skip
    for more, message in cases:
        given = [option for option in MODELS if not any(
            str(m).startswith(option.split("=")[0] + "=") for m in more)]  # fmt: skip
        refused(capsys, ["synthesize", *more, *given], message)
    assert [p.name for p in taken.iterdir()] == ["precious"] and not new.exists()


def test_own_tasks_and_all_tasks(texts, tmp_path):
    (tmp_path / "q.toml").write_text('rhyme = ["Rhyme on <EMB>."]\nkeywords = []\n')
    o = elm.parse_options(elm.SynthesizeOptions, [f"queries={tmp_path / 'q.toml'}", "tasks=all"])
    rows = elm.draw_rows(o, "a text. of. three.")
    assert {row["task_type"] for row in rows} - {"reconstruct"} == {*elm.TASKS, "rhyme"} - {
        "keywords"
    }
    few = elm.draw_rows(o.model_copy(update=dict(tasks=3, reconstruct=0)), "a text. of. three.")
    assert len(few) == 3 and all(row in rows for row in few)
    line = dict(rows[0], task_type="reconstruct", response="a text.")
    assert elm.parse_row(json.dumps(line).encode(), elm.TASKS, 1).task_type == "reconstruct"
