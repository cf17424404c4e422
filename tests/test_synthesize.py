"""synthesize: from texts alone to a trained adapter, on the embedded default; servers that fail."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import make
import pytest
import torch
from conftest import ROOT, command, read_jsonl, refused, rows_path, run, vectors_path
from test_commands import TINY

import elm

MODELS = [f"model={TINY / 'llm'}", f"embedder={TINY / 'embedder'}", "bf16=false"]
MODELS += [f"queries={TINY / 'queries.toml'}", "max_new_tokens=64", "split=[0.7, 0.15, 0.15]"]
TEXTS = read_jsonl(TINY / "synthesis" / "train_synthesis.jsonl")
TEXTS = list(dict.fromkeys(row["text"] for row in TEXTS))


def write_texts(path, texts):
    lines = [t if isinstance(t, dict) else {"text": t} for t in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def contents(out):
    return {p.name: p.read_bytes() for p in out.rglob("*_*.*")}  # train.toml names the folder


def synthesize(source, out, *more):
    assert command("synthesize", source, out, *MODELS, *more)[0] == 0
    assert not list(out.parent.glob(f".{out.name}.*"))
    return contents(out)


def all_rows(out):
    return [row for split in elm.SPLITS for row in read_jsonl(rows_path(out, split))]


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl", TEXTS[:40])


@pytest.mark.slow
def test_from_texts_to_a_report(tmp_path):
    source, out = write_texts(tmp_path / "t.jsonl", TEXTS[:300]), tmp_path / "mine"
    done = run("synthesize", source, out, *MODELS)
    assert done.returncode == 0 and (out / "train.toml").read_text() in done.stdout
    more = "model.hidden_dim=64 train.max_steps=100 train.lr=3e-3 train.warmup_steps=5"
    more += " eval.samples=8 eval.max_new_tokens=48"
    more = [*more.split(), f"eval.bertscore_model={TINY / 'scorer'}"]
    done = run(out / "train.toml", *more, f"output.dir={tmp_path / 'run'}")
    told = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert told["gap_closed"] > 0.6 and "reconstruct" in told["tasks"]
    adapter = f"adapter={tmp_path / 'run' / 'adapter_best.safetensors'}"
    assert "gap_closed: " in run("eval", out / "train.toml", *more, adapter).stdout


def test_rows_vectors_and_queries(texts, tmp_path):
    synthesize(texts, out := tmp_path / "new" / "mine", "reconstruct=0.5")
    model, rows = elm.load_embedder(str(TINY / "embedder")), all_rows(out)
    for split in elm.SPLITS:
        table, its = elm.open_vectors(vectors_path(out, split)), read_jsonl(rows_path(out, split))
        vectors = elm.encode(model, [row["text"] for row in its], "cpu")
        assert torch.allclose(table[[r["embedding_file_idx"] for r in its]], vectors, atol=1e-5)
    assert {row["text"] for row in rows} == {*TEXTS[:40]}
    tasks, queries = Counter(row["task_type"] for row in rows), make.QUERIES
    assert 10 <= tasks.pop("reconstruct") <= 30 and sum(tasks.values()) == 6 * 40
    assert elm.read_toml(str(TINY / "queries.toml"), {}) == queries  # which the tiny LLM knows
    assert elm.QUERIES.keys() == queries.keys() | {elm.RECONSTRUCT}
    asked = [row for row in rows if row["task_type"] != "reconstruct"]
    assert all(row["query"] in queries[row["task_type"]] for row in asked)
    begin = next(row for row in rows if row not in asked)
    assert begin["text"].startswith(begin["response"]) and begin["response"].count(".") == 2


@pytest.mark.slow
def test_killed_and_started_again_and_shuffled_ends_with_the_same_bytes(tmp_path):
    source, out = write_texts(tmp_path / "t.jsonl", TEXTS[:100]), tmp_path / "mine"
    whole = synthesize(source, tmp_path / "whole", "temperature=0.7")
    write_texts(source, [*TEXTS[99::-1], TEXTS[3].lower(), f"{TEXTS[4]} "])  # and copies
    kills, command = 0, [sys.executable, ROOT / "elm.py", "synthesize", source, out, *MODELS]

    def answers():
        return sum(p.read_bytes().count(b"\n") for p in tmp_path.glob(".mine.work/answers.jsonl"))

    while not out.exists():
        before, child = answers(), subprocess.Popen([*command, "temperature=0.7"], env=os.environ)
        while child.poll() is None:
            if answers() >= before + 15:
                child.kill()
                child.wait()
                with open(*tmp_path.glob(".mine.work/answers.jsonl"), "a") as f:
                    f.write('\n[["torn')
                kills += 1
            time.sleep(0.005)
        assert out.exists() or answers() > before, "no progress"
    assert kills >= 2 and contents(out) == whole and not list(tmp_path.glob(".mine.*"))


def test_splits_are_stable_and_follow_groups(tmp_path):
    few = elm.split_texts(write_texts(tmp_path / "a.jsonl", TEXTS[:200]), (0.8, 0.1, 0.1))
    more = elm.split_texts(write_texts(tmp_path / "b.jsonl", TEXTS[::-1]), (0.8, 0.1, 0.1))
    assert few == {text: more[text] for text in few} and list(few) == sorted(TEXTS[:200])
    assert 600 < Counter(more.values())["train"] < 680 and 50 < Counter(more.values())["val"] < 110
    grouped = [dict(text=t, group=i // 8) for i, t in enumerate(TEXTS)]
    grouped[0] |= dict(split="test")
    split = elm.split_texts(write_texts(tmp_path / "c.jsonl", grouped), (0.5, 0.25, 0.25))
    assert split[TEXTS[0]] == "test"  # and so is its group
    assert all(len({split[t] for t in TEXTS[i : i + 8]}) == 1 for i in range(0, 800, 8))
    same = write_texts(tmp_path / "d.jsonl", ["A  b", "a B", *"cdefghij"])
    assert list(elm.split_texts(same, (0.5, 0.5, 0))) == ["A  b", *"cdefghij"]
    same = [dict(text="b A", split="test"), "B  a", "C", dict(text="c", group=0), *"de"]
    same += [dict(text=t, group=0, split="test") for t in "fg"] + [*"hijkl"]
    split = elm.split_texts(write_texts(tmp_path / "e.jsonl", same), (0.5, 0.5, 0))
    assert split["B  a"] == split["c"] == "test"


@pytest.mark.parametrize("answer, finished, why", [
    ("It is about frogs.", True, ""), ("It is about", False, "not finished"), (" ", True, "empty"),
    ("a b c d " * 5, True, "repetitive"), (f"{TEXTS[0].upper()} And more.", True, "copied"),
    ("Here is a summary.", True, "preamble"), ("Surely it is so.", True, ""),
    ("<think>\nWell.\n</think>\nIt is about frogs.", True, "preamble")])  # fmt: skip
def test_filters(answer, finished, why):
    row = dict(task_type="summary", text=TEXTS[0])
    assert elm.fault(row, answer, finished) == why
    said = elm.fault(row | dict(task_type="style_casual"), answer, finished)
    assert said == ("" if why == "copied" else why)


def test_rejected_answers_are_left_out_and_counted(texts, tmp_path):
    _, said = command("synthesize", texts, tmp_path / "mine", *MODELS, "max_new_tokens=12",
                      "reconstruct=1")  # fmt: skip
    assert "not finished  test  train  val\n" in said
    counts = re.findall(r"^\w+ +(\d+) +(\d+) +(\d+) +(\d+)$", said, re.MULTILINE)
    lost, *others = (sum(map(int, column)) for column in zip(*counts, strict=True))
    assert 20 < lost == 7 * 40 - sum(others) == 7 * 40 - len(all_rows(tmp_path / "mine"))


class Handler(BaseHTTPRequestHandler):
    """Answers by the tiny LLM, but at first each message in the way of one of `ways`."""

    def start(ways=(), status=200):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {}))
        tokenizer = make.AutoTokenizer.from_pretrained(TINY / "llm")
        llm = elm.load_llm(str(TINY / "llm"), torch.device("cpu"), False)
        server.ways, server.status, server.asked, server.keys = ways, status, Counter(), set()
        server.models, server.one = (llm, elm.Prompt(tokenizer)), threading.Lock()
        server.too_long = "no such text"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server, f"endpoint=http://127.0.0.1:{server.server_port}/v1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server, (llm, prompt) = self.server, self.server.models
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        server.asked[content] += 1
        server.keys.add(self.headers["Authorization"])
        way = next(iter(server.ways[server.asked[content] - 1 :]), "")
        way = "400" if server.too_long in content else way
        status, reply = int(way) if way.isdecimal() else server.status, b"<garbage\xff"
        if not way and status == 200:
            ids = torch.tensor(prompt.head + prompt.ids([content])[0] + prompt.tail)
            with server.one, torch.no_grad():
                embeds = [llm.get_input_embeddings()(ids)]
                ((text, end),) = elm.generate_batch(llm, prompt, embeds, body["max_tokens"])
            reason = "stop" if end else "length"
            choice = dict(message=dict(content=text), finish_reason=reason)
            reply = json.dumps(dict(choices=[choice])).encode()
        if way != "nothing":
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply) + 9 * (way == "half")))
            self.end_headers()
            self.wfile.write(reply)


@pytest.mark.slow
def test_a_server_that_fails_at_first_gives_the_answers_of_the_llm(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(elm, "WAITS", (0.01,) * 6)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server, endpoint = Handler.start(("429", "garbage", "half", "nothing", "503"))
    there = synthesize(texts, tmp_path / "there", endpoint, "concurrency=8")
    assert set(server.asked.values()) == {6} and server.keys == {"Bearer sk-secret"}
    assert there == synthesize(texts, tmp_path / "here")
    assert not any(b"secret" in p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file())


@pytest.mark.slow
def test_servers_that_are_refused_lose_nothing(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(elm, "WAITS", (0.01,) * 2)
    start = ["synthesize", texts, tmp_path / "mine", *MODELS, "concurrency=2"]
    refused("endpoint: .*refused", *start, "endpoint=http://127.0.0.1:9/v1")
    server, endpoint = Handler.start(status=404)
    refused("endpoint: .*404.*garbage", *start, endpoint)
    assert set(server.asked.values()) == {1}
    for way in ("429", "garbage", "half", "nothing"):
        server, endpoint = Handler.start((way,) * 9)
        refused("endpoint: ", *start, endpoint)
        assert max(server.asked.values()) == 3
    server, endpoint = Handler.start()
    server.too_long = sorted(TEXTS[:40], key=len)[-2]
    refused(f"endpoint: .* about '{server.too_long[:50]}': .*400.*", *start, endpoint)
    again, endpoint = Handler.start()
    synthesize(texts, tmp_path / "mine", endpoint)  # it goes on
    assert any(server.too_long not in content for content in server.asked)
    assert all(server.too_long in content for content in server.asked if content in again.asked)


@pytest.mark.slow
def test_a_full_disk_loses_nothing_and_other_texts_keep_the_answers(small_disk, tmp_path):
    source, out = write_texts(tmp_path / "texts.jsonl", TEXTS[:25]), small_disk / "mine"
    (small_disk / "ballast").write_bytes(bytes(295_000))
    server, endpoint = Handler.start()
    words = ["synthesize", source, out, *MODELS, endpoint, "concurrency=1"]
    refused("/answers.jsonl: cannot be written .*: .* No space left", *words)
    (small_disk / "ballast").unlink()
    asked = server.asked.copy()
    write_texts(source, TEXTS[4:28])
    there = synthesize(*words[1:3], *words[-2:])
    again = server.asked - asked
    assert 20 < len(asked) < 120 and len([*asked & again]) <= 4  # those on their way
    assert there == synthesize(source, tmp_path / "whole")


def test_near_duplicates_between_any_two_splits_are_counted(tmp_path):
    lines = [dict(text=t, split=elm.SPLITS[i % 3]) for i, t in enumerate(TEXTS[:9])]
    lines += [dict(text=f"{TEXTS[1]} Indeed.", split="test"), dict(text=TEXTS[0][:-1], split="val")]
    source = write_texts(tmp_path / "texts.jsonl", lines)
    _, said = command("synthesize", source, tmp_path / "mine", *MODELS, "tasks=1")
    assert "2 texts of val and test have a cosine above .95 with one of another split" in said


def test_bad_input(texts, tmp_path):
    new, odd = tmp_path / "new", [dict(text="a", split="dev"), *"bcdefg"]
    none, gap, few, odd = (write_texts(tmp_path / f"{i}.jsonl", lines) for i, lines in enumerate(
        ([], ["a", " "], ["a", "b"], odd)))  # fmt: skip
    (tmp_path / "q.toml").write_text('summary = "Sum it up."')
    (tmp_path / "taken").mkdir()
    cases = [
        (none, "new", "0.jsonl: is empty"), (gap, "new", "1.jsonl:2: not a text"),
        (few, "new", "2.jsonl: .* train and val need two"), (odd, "new", "'dev': 1.* train and"),
        (tmp_path / "no.txt", "new", "no.txt: No such file"),
        (texts, "taken", "model=nonsense/x", "taken: exists already"),
        (texts, "new", "tasks=some", "tasks = 'some': must be a valid integer"),
        (texts, "new", "split=[1, 0, 0]", "split.1 = 0: must be greater than 0"),
        (texts, "new", "endpoint=localhost", "endpoint = 'localhost': .*must match pattern"),
        (texts, "new", f"queries={tmp_path / 'q.toml'}", "queries.summary = "),
        (texts, "new", f"embedder={tmp_path / 'none'}", "embedder: cannot load"),
        (texts, "new", f"model={tmp_path / 'none'}", "model: cannot load"),
        (texts, "new", "max_new_tokens=1", "answers about .* too few; others: not fini"),
        (tmp_path / "q.toml", "new", "q.toml:1: not a text")]  # fmt: skip
    for source, out, *more, message in cases:
        refused(message, "synthesize", source, tmp_path / out, *MODELS, *more)
    assert not new.exists()


def test_own_tasks_and_all_tasks(tmp_path):
    (tmp_path / "q.toml").write_text('rhyme = ["Rhyme on <EMB>."]\nkeywords = []\n')
    more = [f"queries={tmp_path / 'q.toml'}", "tasks=all"]
    o = elm.load_config(None, more, elm.SynthesizeOptions)
    rows = elm.draw_rows(o.model_copy(update=dict(reconstruct=1)), 0, "One. Two. Three.")
    tasks = {"reconstruct", "rhyme", *elm.TASKS} - {"keywords"}
    assert {row["task_type"] for row in rows} == tasks
    few = elm.draw_rows(o.model_copy(update=dict(tasks=3, reconstruct=0)), 0, "One. Two. Three.")
    assert len(few) == 3 and all(row in rows for row in few)
    line = json.dumps(rows[0] | dict(task_type="reconstruct", response="One.")).encode()
    assert elm.parse_row(line, elm.TASKS, 1).task_type == "reconstruct"
    line = line.replace(b"reconstruct", b"compare")  # one's own, or of older data sets
    assert elm.parse_row(line, ("compare",), 1) and not elm.parse_row(line, elm.TASKS, 1)
