"""synthesize: from texts alone to a trained adapter, on the embedded default; servers that fail."""

import contextlib
import email.utils
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import make
import prepare
import pytest
import torch
from conftest import CPU, ROOT, free_port, read_jsonl, refused, rows_path, vectors_path
from test_prepare import TINY, assert_refused, names_in, run_prepare

import elm

OPTIONS = [
    f"model={TINY / 'llm'}", f"embedder={TINY / 'embedder'}", "bf16=false",
    f"queries={TINY / 'queries.toml'}", "max_new_tokens=64", "split=[0.7, 0.15, 0.15]"]


def read_texts() -> list[str]:
    rows = read_jsonl(TINY / "synthesis" / "train_synthesis.jsonl")
    return list(dict.fromkeys(row["text"] for row in rows))


TEXTS = read_texts()


def write_texts(path: Path, texts: list) -> Path:
    """A file of texts, or of dicts with a text."""
    lines = [text if isinstance(text, dict) else {"text": text} for text in texts]
    path.write_text(elm.jsonl(lines))
    return path


def assign_splits(path: Path, texts: list, shares) -> dict[str, str]:
    sources = list(prepare.read_texts(write_texts(path, texts)))
    return prepare.assign_splits(sources, prepare.drop_copies(sources), shares)


def contents(out: Path) -> dict[str, bytes]:
    """The files of a data set, but for train.toml, which names the folder."""
    return {path.name: path.read_bytes() for path in out.rglob("*_*.*")}


def synthesize(source: Path, out: Path, *more: str) -> dict[str, bytes]:
    code, printed = run_prepare("synthesize", source, out, *OPTIONS, *more)
    assert code == 0, printed
    assert not list(out.parent.glob(f".{out.name}.*"))
    return contents(out)


def read_all_rows(out: Path) -> list[dict]:
    rows = []
    for split in elm.SPLITS:
        rows += read_jsonl(rows_path(out, split))
    return rows


FEW_TEXTS = TEXTS[:24]


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl", FEW_TEXTS)


# -----------------------------------------------------------------------------
# From texts to rows


def test_from_texts_to_a_report(tmp_path, run):
    """The data set trains an adapter that closes most of the gap; `eval` takes its train.toml."""
    source = write_texts(tmp_path / "texts.jsonl", TEXTS[:300])
    out = tmp_path / "mine"
    code, printed = run_prepare("synthesize", source, out, *OPTIONS, "reconstruct=0.3")
    assert code == 0
    assert (out / "train.toml").read_text() in printed
    program = "deepspeed" if torch.cuda.device_count() > 1 else "python"
    assert f"next: {program} elm.py {out}/train.toml" in printed

    settings = [
        "model.hidden_dim=64", "train.max_steps=100", "train.lr=3e-3", "train.warmup_steps=5",
        "eval.samples=8"]
    done = run(out / "train.toml", *settings, f"output.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert report["gap_closed"] > 0.6
    assert "reconstruct" in report["tasks"]
    adapter = tmp_path / "run" / "adapter_best.safetensors"
    done = run("eval", out / "train.toml", *settings, f"adapter={adapter}")
    assert "gap_closed: " in done.stdout


def test_rows_vectors_and_queries(texts, tmp_path):
    out = tmp_path / "new" / "mine"
    synthesize(texts, out, "reconstruct=0.5")
    embedder = elm.load_embedder(str(TINY / "embedder"), False, CPU)
    for split in elm.SPLITS:
        rows = read_jsonl(rows_path(out, split))
        table = elm.open_vectors(vectors_path(out, split))
        vectors = table[[row["embedding_file_idx"] for row in rows]]
        expected = elm.embed_texts(embedder, [row["text"] for row in rows])
        assert torch.allclose(vectors, expected, atol=1e-5)

    rows = read_all_rows(out)
    assert {row["text"] for row in rows} == set(FEW_TEXTS)
    counts = Counter(row["task_type"] for row in rows)
    num_reconstruct = counts.pop("reconstruct")
    assert 6 <= num_reconstruct <= 18
    assert counts.total() == 6 * len(FEW_TEXTS)
    for row in rows:
        if row["task_type"] == "reconstruct":
            assert row["text"].startswith(row["response"])
            assert row["response"].count(".") == 2
        else:
            assert row["query"] in make.QUERIES[row["task_type"]]


def test_queries_are_there_for_every_task():
    queries = prepare.read_queries(None)
    assert set(queries) == {*elm.TASKS, elm.RECONSTRUCT}
    for texts in queries.values():
        assert len(texts) >= 2
    # The tiny LLM knows these.
    assert elm.read_toml(str(TINY / "queries.toml")) == make.QUERIES
    assert set(make.QUERIES) == set(elm.TASKS)


def test_own_tasks_and_all_tasks(tmp_path):
    (tmp_path / "q.toml").write_text('rhyme = ["Rhyme on <EMB>."]\nkeywords = []\n')
    queries = prepare.read_queries(str(tmp_path / "q.toml"))
    source = prepare.SourceText(text="One. Two. Three.")
    options = elm.load_config(None, ["tasks=all", "reconstruct=1"], prepare.SynthesizeOptions)
    rows = prepare.draw_rows(source, 7, queries, options)
    tasks = [row.task_type for row in rows]
    assert tasks == sorted({"reconstruct", "rhyme", *elm.TASKS} - {"keywords"})
    responses = {row.task_type: row.response for row in rows}
    assert responses.pop("reconstruct") == "One. Two."
    assert set(responses.values()) == {""}

    few = elm.load_config(None, ["tasks=3", "reconstruct=0"], prepare.SynthesizeOptions)
    few_rows = prepare.draw_rows(source, 7, queries, few)
    assert len(few_rows) == 3
    for row in few_rows:
        assert row in rows


def test_rows_of_own_tasks_are_read(tmp_path):
    row = {"task_type": "reconstruct", "embedding_file_idx": 0, "query": "?", "response": "One."}
    line = json.dumps(row).encode()
    assert elm.parse_row(line, elm.TASKS, 1).task_type == "reconstruct"
    # A task of the user's own, or a pair task of older data sets.
    line = line.replace(b"reconstruct", b"compare")
    assert elm.parse_row(line, ("compare",), 1) is not None
    assert elm.parse_row(line, elm.TASKS, 1) is None


# -----------------------------------------------------------------------------
# Splits


def test_splits_are_stable(tmp_path):
    """Other texts, and another order, leave a text where it is."""
    shares = (0.8, 0.1, 0.1)
    few = assign_splits(tmp_path / "few.jsonl", TEXTS[:200], shares)
    more = assign_splits(tmp_path / "more.jsonl", TEXTS[::-1], shares)
    assert few == {text: more[text] for text in few}
    assert list(few) == sorted(TEXTS[:200])
    counts = Counter(more.values())
    assert 600 < counts["train"] < 680
    assert 50 < counts["val"] < 110


def test_splits_follow_groups(tmp_path):
    texts = [{"text": text, "group": i // 8} for i, text in enumerate(TEXTS)]
    texts[0]["split"] = "test"
    splits = assign_splits(tmp_path / "texts.jsonl", texts, (0.5, 0.25, 0.25))
    for i in range(0, len(TEXTS), 8):
        splits_of_group = {splits[text] for text in TEXTS[i : i + 8]}
        assert len(splits_of_group) == 1
    assert splits[TEXTS[0]] == "test"  # and so, by the loop, is its group
    assert set(splits.values()) == set(elm.SPLITS)


def test_texts_that_differ_in_case_and_spaces_alone_are_one(tmp_path):
    shares = (0.5, 0.5, 0)
    splits = assign_splits(tmp_path / "a.jsonl", ["A  b", "a B", *"cdefghij"], shares)
    assert list(splits) == ["A  b", *"cdefghij"]

    texts = [
        {"text": "b A", "split": "test"}, "B  a",
        "C", {"text": "c", "group": 0},
        {"text": "f", "group": 0, "split": "test"},
        *"dehijkl"]
    splits = assign_splits(tmp_path / "b.jsonl", texts, shares)
    assert splits["B  a"] == "test"  # as its copy
    assert splits["c"] == "test"  # as its group
    assert "C" not in splits


# -----------------------------------------------------------------------------
# Answers that are rejected


CHINESE = "我们研究智利的聚合物，这是一个化学主题。我们发现密度因降雨而上升。该工作依靠成像。"
JAPANESE = "本研究ではチリの高分子を調べ、降雨によって密度が上昇することを示した。撮影に基づく。"
THAI = "เราศึกษาพอลิเมอร์จากประเทศชิลีและพบว่าความหนาแน่นเพิ่มขึ้นเพราะฝน งานนี้อาศัยการถ่ายภาพ"
HINDI = "हम चिली के बहुलकों का अध्ययन करते हैं और पाते हैं कि वर्षा से घनत्व बढ़ता है"
ARABIC = "ندرس البوليمرات من تشيلي ونجد أن الكثافة ترتفع بسبب هطول الأمطار ويعتمد العمل على التصوير"


@pytest.mark.parametrize("text, answer, is_copied", [
    (CHINESE, CHINESE, True),
    (CHINESE, CHINESE.replace("智利", "古巴"), True),
    (CHINESE, "降雨使智利聚合物的密度上升，作者以成像证明了这一点。", False),
    (JAPANESE, f"{JAPANESE}以上。", True),
    (JAPANESE, "チリの高分子の密度は雨で高まる。", False),
    (THAI, THAI.replace(" ", ""), True),
    (THAI, "งานวิจัยนี้แสดงว่าฝนทำให้พอลิเมอร์ในชิลีหนาแน่นขึ้น โดยใช้ภาพถ่ายเป็นหลักฐานสำคัญ", False),
    ("本文用BERT模型分析GPU日志。", "本文用BERT模型分析GPU日志", True),
    ("本文用BERT模型分析GPU日志。", "BERT和GPU", False),
    (HINDI, HINDI, True),
    (HINDI, "वर्षा बहुलकों को सघन बनाती है, यही इस चिली के शोध का सार और निष्कर्ष है", False),
    (ARABIC, ARABIC, True),
    # English, by hand: 9 of 10 words; 8 of 10, which is not over .8; all, and as many others.
    ("a b c d e f g h i j", "A, b: c d e f g h-i!", True),
    ("a b c d e f g h i j", "a b c d e f g h", False),
    ("a b c", "a b c x y z", False)])
def test_copies_are_found_in_scripts_without_spaces(text, answer, is_copied):
    """And a summary, which has nearly all letters of a Thai text, is none."""
    assert prepare.is_copied(answer, text) is is_copied


@pytest.mark.parametrize("answer", [
    "以下是摘要：", "好的，这是摘要。", "当然可以！", "はい、要約します。", "もちろんです。",
    "네, 요약입니다.", "ต่อไปนี้คือบทสรุป", "Hier ist die Zusammenfassung:", "Gerne! Der Text",
    "Voici un résumé :", "Bien sûr ! Le texte", "Aquí está el resumen:", "¡Claro! El texto",
    "Claro, aquí tienes", "Aqui está o resumo:", "Ecco il riassunto:", "Конечно! Вот",
    "Вот краткое изложение:", "إليك الملخص", "Tentu! Berikut"])
def test_preambles_in_other_languages(answer):
    row = prepare.DraftRow("summary", 0, "?", prepare.SourceText(text="a text"))
    assert prepare.rejection_reason(row, elm.Answer(answer, True)) == "preamble"


@pytest.mark.parametrize("answer", [
    "这是一项关于聚合物的研究。", "当然之选是聚合物。", "好的材料很少。",
    "これは高分子の研究である。", "Natürliche Sprache", "Natürlich vorkommende Stoffe", "Gernegroß",
    "Clarós", "Certosa", "Хорошо известно", "Вотчина", "Tabii kaynaklar", "นี่คือการศึกษา",
    "C'est une étude."])
def test_good_answers_in_other_languages(answer):
    row = prepare.DraftRow("summary", 0, "?", prepare.SourceText(text="a text"))
    assert prepare.rejection_reason(row, elm.Answer(answer, True)) == ""


def test_preambles_are_written_as_texts_are_normalized():
    for preamble in prepare.PREAMBLES:
        assert prepare.normalize(preamble) == preamble.strip()
    assert len(set(prepare.PREAMBLES)) == len(prepare.PREAMBLES)


@pytest.mark.parametrize("text, finished, reason", [
    ("It is about frogs.", True, ""),
    ("It is about", False, "not finished"),
    (" ", True, "empty"),
    ("a b c d " * 5, True, "repetitive"),
    (f"{TEXTS[0].upper()} And more.", True, "copied"),
    ("Here is a summary.", True, "preamble"),
    ("Surely it is so.", True, ""),
    ("<think>\nWell.\n</think>\nIt is about frogs.", True, "preamble"),
    ("我们研究聚合物。" * 5, True, "repetitive")])
def test_reasons_of_rejection(text, finished, reason):
    answer = elm.Answer(text, finished)
    row = prepare.DraftRow("summary", 0, "Summarize it.", prepare.SourceText(text=TEXTS[0]))
    assert prepare.rejection_reason(row, answer) == reason
    row.task_type = "style_casual"  # may have the words of the text
    expected = "" if reason == "copied" else reason
    assert prepare.rejection_reason(row, answer) == expected


def test_rows_keep_the_own_fields_of_their_text(tmp_path):
    """But not those of rows that serve as texts; and vectors are half as large with fp16."""
    texts = []
    for i, text in enumerate(FEW_TEXTS):
        texts.append({"package": f"p{i}", "text": text, "response": "of an older row"})
    source = write_texts(tmp_path / "texts.jsonl", texts)
    plain = synthesize(source, tmp_path / "plain")
    rows = read_all_rows(tmp_path / "plain")
    for row in rows:
        assert row["package"] == f"p{FEW_TEXTS.index(row['text'])}"
        assert row["response"] != "of an older row"

    halves = synthesize(source, tmp_path / "halves", "fp16=true")
    for name, content in halves.items():
        if name.endswith(".jsonl"):
            assert content == plain[name]
            continue
        table = elm.open_vectors(tmp_path / "halves" / "embeddings" / name)
        assert table.dtype == torch.float16
        whole = elm.open_vectors(tmp_path / "plain" / "embeddings" / name)
        assert torch.equal(table, whole.half())


def test_rejected_answers_are_left_out_and_counted(texts, tmp_path):
    out = tmp_path / "mine"
    code, printed = run_prepare(
        "synthesize", texts, out, *OPTIONS, "max_new_tokens=12", "reconstruct=1")
    assert code == 0
    assert "not finished  test  train  val\n" in printed
    counts = re.findall(r"^\w+ +(\d+) +(\d+) +(\d+) +(\d+)$", printed, re.MULTILINE)
    num_rejected = sum(int(columns[0]) for columns in counts)
    num_written = sum(int(number) for columns in counts for number in columns[1:])
    assert num_rejected + num_written == 7 * len(FEW_TEXTS)
    assert num_written == len(read_all_rows(out))
    assert num_rejected > 20


# -----------------------------------------------------------------------------
# Kills


def test_killed_and_started_again_and_shuffled_ends_with_the_same_bytes(tmp_path, processes):
    source = write_texts(tmp_path / "texts.jsonl", TEXTS[:100])
    whole = synthesize(source, tmp_path / "whole", "temperature=0.7")
    copies = [TEXTS[3].lower(), f"{TEXTS[4]} "]
    write_texts(source, [*TEXTS[99::-1], *copies])
    out = tmp_path / "mine"
    log = tmp_path / ".mine.work" / "answers.jsonl"
    words = [sys.executable, ROOT / "data" / "prepare.py", "synthesize", source, out, *OPTIONS]

    def num_answers() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    num_kills = 0
    while not out.exists():
        before = num_answers()
        child = subprocess.Popen([*words, "temperature=0.7"], env=os.environ)
        while child.poll() is None:
            if num_answers() >= before + 200:
                child.kill()
                child.wait()
                with open(log, "a") as f:
                    f.write('\n{"key": "torn')
                num_kills += 1
            time.sleep(0.005)
        assert out.exists() or num_answers() > before, "no progress"
    assert num_kills >= 2
    assert contents(out) == whole
    assert names_in(tmp_path) == ["mine", "texts.jsonl", "whole"]


def test_answers_by_another_tokenizer_or_template_are_not_taken(llm_dir, tmp_path):
    """By an LLM of the same weights in the same place, where a command goes on."""
    folders = [llm_dir]
    for file, old, new in (
        ("tokenizer.json", '"Ġ": ', '"Ġ":'),  # other bytes alone
        ("tokenizer.json", '"normalizer": null', '"normalizer": {"type": "NFC"}'),
        ("chat_template.jinja", "assistant", "model"),
    ):
        folder = tmp_path / str(len(folders))
        shutil.copytree(llm_dir, folder)
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
        folders.append(folder)
    names = [elm.LLMEngine(str(folder), False, {}, max_new_tokens=8).name for folder in folders]
    assert names[0] == names[1]
    assert len(set(names)) == 3


# -----------------------------------------------------------------------------
# Servers


def test_a_servers_answers_are_those_of_the_llm(texts, tmp_path, start_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    server = start_server("429", "503")
    there = synthesize(texts, tmp_path / "there", server.endpoint, "concurrency=8", "tasks=2")
    assert set(server.num_asked.values()) == {3}
    assert server.keys == {"Bearer sk-secret"}
    assert there == synthesize(texts, tmp_path / "here", "tasks=2")
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            assert b"secret" not in path.read_bytes()


@pytest.mark.slow
def test_lost_connections_are_retried(texts, tmp_path, start_server):
    server = start_server("half", "nothing")
    there = synthesize(texts, tmp_path / "there", server.endpoint, "tasks=2")
    assert set(server.num_asked.values()) == {3}
    assert there == synthesize(texts, tmp_path / "here", "tasks=2")


@pytest.mark.parametrize("failure, num_requests", [
    ("429", 3), ("503", 3), ("404", 1), ("garbage", 1),
    pytest.param("half", 3, marks=pytest.mark.slow),
    pytest.param("nothing", 3, marks=pytest.mark.slow)])
def test_a_server_that_goes_on_failing_is_reported(
        texts, tmp_path, start_server, monkeypatch, failure, num_requests):
    monkeypatch.setattr(elm, "SERVER_RETRIES", 2)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = start_server(*[failure] * 9)
    words = ["synthesize", texts, tmp_path / "mine", *OPTIONS, server.endpoint, "concurrency=2"]
    assert_refused("endpoint: http((?!secret).)*$", *words)
    assert max(server.num_asked.values()) == num_requests
    assert names_in(tmp_path) == [".mine.work", "texts.jsonl"]


def test_a_server_that_is_not_there_is_reported(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(elm, "SERVER_RETRIES", 0)
    words = ["synthesize", texts, tmp_path / "mine", *OPTIONS]
    assert_refused("endpoint: http://127.0.0.1:9/v1 .*", *words, "endpoint=http://127.0.0.1:9/v1")


@pytest.mark.parametrize("failure", ["401", "403", "404", "500"])
def test_a_refused_request_loses_no_answer(texts, tmp_path, start_server, monkeypatch, failure):
    """What is not about the text, a wrong key or model, ends the command, which can go on."""
    monkeypatch.setattr(elm, "SERVER_RETRIES", 0)
    out = tmp_path / "mine"
    server = start_server(failure)
    refused_text = min(FEW_TEXTS, key=len)  # asked about last
    for text in FEW_TEXTS:
        if text != refused_text:
            server.answers_about.append(text)
    words = ["synthesize", texts, out, *OPTIONS, "tasks=2", server.endpoint, "concurrency=2"]
    assert_refused(f"endpoint: .* about '{refused_text[:50]}': .*{failure}", *words)

    again = start_server()
    synthesize(texts, out, "tasks=2", again.endpoint)
    answered = [message for message in server.num_asked if refused_text not in message]
    assert answered
    assert not set(answered) & set(again.num_asked)


def test_a_refused_text_is_left_out(texts, tmp_path, start_server):
    """And asked about once more by the same command after another text, which has the server's
    status 404, has ended it. The server's reason is told."""
    out = tmp_path / "mine"
    server = start_server("404")
    by_length = sorted(FEW_TEXTS, key=len, reverse=True)  # the order in which they are asked about
    server.answers_about = by_length[:20]
    server.refused_text = by_length[5]
    words = ["synthesize", texts, out, *OPTIONS, "tasks=2", "reconstruct=0", "concurrency=1"]
    code, printed = run_prepare(*words, server.endpoint)
    assert code == 2
    reason = "400 .*maximum context length exceeded"
    assert re.search(f"warning: endpoint: the server refuses a text; .*{reason}", printed)
    assert printed.count("refuses a text") == 1
    asked = [message for message in server.num_asked if server.refused_text in message]
    assert len(asked) == 2

    server.answers_about = FEW_TEXTS
    code, printed = run_prepare(*words, server.endpoint)
    assert {server.num_asked[message] for message in asked} == {2}
    assert code == 0
    assert re.search(f"warning: endpoint: the server refused 2 of 48 rows, .*{reason}", printed)
    assert "refused by the server  test  train  val\n" in printed
    rows = read_all_rows(out)
    assert len(rows) == 46
    assert {row["text"] for row in rows} == set(FEW_TEXTS) - {server.refused_text}


@pytest.mark.parametrize(("failure", "refusal"), [
    ("moderated", "400 - your input was flagged"), ("filtered", "finish_reason content_filter"),
    ("451", "Error code: 451")])
def test_a_text_is_refused_by_other_words_of_servers(start_server, failure, refusal):
    server = start_server(failure)
    engine = make_engine(server)
    refused, answer = [engine.answer([elm.Question("Summarize it.", TEXTS[0])], 0, 0.0)[0]
                       for _ in range(2)]
    assert refused.refusal.startswith(refusal) and not refused.finished and not refused.text
    assert not answer.refusal and answer.text


def test_an_error_of_a_router_is_about_no_text(start_server):
    engine = make_engine(start_server("overloaded"))
    with pytest.raises(elm.UserError, match="no chat completion: .*no instance is free"):
        engine.answer([elm.Question("Summarize it.", TEXTS[0])], 0, 0.0)


def test_refusals_are_not_written(tmp_path):
    """The same command asks again: the server may have been at fault, not the text."""
    log = elm.AnswerLog(tmp_path / "answers.jsonl")
    refusal = elm.Answer("", False, "too long")
    log.append({"a": elm.Answer("A.", True), "b": refusal})
    assert log["b"] == refusal
    read = elm.AnswerLog(tmp_path / "answers.jsonl")
    assert "b" not in read
    assert read["a"] == elm.Answer("A.", True)


def test_a_server_that_refuses_all_says_why(texts, tmp_path, start_server):
    server = start_server()
    server.refused_text = ""
    words = ["synthesize", texts, tmp_path / "mine", *OPTIONS, "tasks=2", server.endpoint]
    code, printed = run_prepare(*words)
    assert code == 2
    assert "the server refused 48 of" in printed
    assert "maximum context length exceeded" in printed
    assert "rejected: refused by the server" in printed
    run_prepare(*words)
    assert set(server.num_asked.values()) == {2}


class Clock:
    """A clock that only a sleep moves on."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        self.sleeps = []
        monkeypatch.setattr(elm.time, "sleep", self.sleep)
        monkeypatch.setattr(elm.time, "monotonic", lambda: self.now)

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds


def make_engine(server) -> elm.ServerEngine:
    endpoint = server.endpoint.removeprefix("endpoint=")
    return elm.ServerEngine(elm.ChatServer(endpoint, "tiny", {}, 64), 2)


QUESTION = elm.Question("Summarize the text.", TEXTS[0])


def test_a_server_gets_a_seed_only_where_it_samples(start_server):
    server = start_server()
    engine = make_engine(server)
    engine.answer([QUESTION], seed=7, temperature=0.0)
    engine.answer([QUESTION], seed=7, temperature=1.0)
    assert [body.get("seed") for body in server.bodies] == [None, 7]
    assert [body["temperature"] for body in server.bodies] == [0.0, 1.0]


def test_a_server_may_have_another_name_of_the_model(texts, tmp_path, start_server):
    """The adapter is to be trained for the model, not for the server's name."""
    server = start_server()
    synthesize(texts, tmp_path / "mine", server.endpoint, "tasks=2", "served_model=alias")
    assert {body["model"] for body in server.bodies} == {"alias"}
    toml = elm.read_toml(str(tmp_path / "mine" / "train.toml"))
    assert toml["model"]["llm"] == str(TINY / "llm")


def test_retry_after_is_obeyed(start_server, monkeypatch, capsys):
    """Longer than the client would, up to an hour in all, said in a line."""
    server = start_server("429/200", "503/300")
    engine = make_engine(server)
    clock = Clock(monkeypatch)
    (answer,) = engine.answer([QUESTION], seed=1, temperature=0.0)
    assert answer.finished and answer.text
    assert [seconds for seconds in clock.sleeps if seconds > 10] == [200, 300]
    err = capsys.readouterr().err
    assert "is busy and asks to wait 200 s\n" in err
    assert "is busy and asks to wait 300 s\n" in err


@pytest.mark.parametrize("retry_after", ["3601", "1801"])
def test_more_than_an_hour_is_not_waited(start_server, monkeypatch, retry_after):
    engine = make_engine(start_server(*[f"429/{retry_after}"] * 9))
    clock = Clock(monkeypatch)
    with pytest.raises(elm.UserError, match="endpoint: .* about .*429"):
        engine.answer([QUESTION], seed=1, temperature=0.0)
    assert sum(clock.sleeps) < 3600


def test_retry_after_is_a_number_or_a_date():
    assert elm.retry_after_seconds("2.5") == 2.5
    assert elm.retry_after_seconds(None) == elm.retry_after_seconds("soon") == 0
    soon = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 98 < elm.retry_after_seconds(soon) <= 100


@pytest.mark.slow
def test_a_full_disk_loses_nothing_and_other_texts_keep_the_answers(
        small_disk, tmp_path, start_server):
    source = write_texts(tmp_path / "texts.jsonl", TEXTS[:25])
    out = small_disk / "mine"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(252_000))  # there is room for the vectors and for some answers
    server = start_server()
    options = ["tasks=all", server.endpoint, "concurrency=1"]
    words = ["synthesize", source, out, *OPTIONS, *options]
    assert_refused("/answers.jsonl: cannot be written .*: .* No space left", *words)
    before = server.num_asked.copy()
    assert 20 < len(before) < 13 * 25

    ballast.unlink()
    write_texts(source, TEXTS[4:28])
    there = synthesize(source, out, *options)
    asked_again = [message for message in before if server.num_asked[message] > before[message]]
    assert len(asked_again) <= 4  # those on their way
    assert there == synthesize(source, tmp_path / "whole", "tasks=all")


@pytest.fixture(scope="module")
def transformers_server():
    """`transformers serve` of the tiny LLM, in fp32."""
    port = free_port()
    words = [Path(sys.executable).parent / "transformers", "serve", TINY / "llm",
             "--dtype", "float32", "--device", "cpu", "--port", port]
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}/v1"
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/models"):
            break
        time.sleep(0.5)
    yield f"endpoint={address}"
    process.kill()
    process.wait()


@pytest.mark.slow
def test_transformers_serve_answers_as_this_process(texts, tmp_path, transformers_server):
    there = synthesize(texts, tmp_path / "there", transformers_server, "tasks=2", "concurrency=4")
    assert there == synthesize(texts, tmp_path / "here", "tasks=2")


@pytest.mark.slow
def test_transformers_serve_leaves_soft_tokens_out(tmp_path, transformers_server):
    """It answers with status 200, and is found out by the number of tokens."""
    vectors = elm.open_vectors(TINY / "embeddings" / "test_embeddings.safetensors")
    adapter = tmp_path / "adapter.safetensors"
    elm.ELM.create(str(TINY / "llm"), vectors, bf16=False, hidden_dim=8).save(adapter)
    table = f"embeddings={TINY / 'embeddings' / 'test_embeddings.safetensors'}"
    refused("endpoint: .* reads a prompt of .* tokens, not of ", "generate", f"adapter={adapter}",
            table, "query=Why?", "rows=[0]", transformers_server)


# -----------------------------------------------------------------------------
# Bad input


def test_bad_texts(texts, tmp_path):
    cases = [
        ([], "is empty"),
        (["a", " "], ":2: not a text, or an empty one: .* is empty"),
        (["a", "b"], "train and val need two"),
        ([{"text": "a", "split": "dev"}, *"bcdefg"], "split = 'dev'")]
    for i, (lines, message) in enumerate(cases):
        source = write_texts(tmp_path / f"{i}.jsonl", lines)
        assert_refused(f"{i}.jsonl.*{message}", "synthesize", source, tmp_path / "new", *OPTIONS)
    none = tmp_path / "no.txt"
    message = "TEXTS: there is no file .*no.txt$"
    assert_refused(message, "synthesize", none, tmp_path / "new", *OPTIONS)
    assert not (tmp_path / "new").exists()


def test_bad_options(texts, tmp_path):
    (tmp_path / "taken").mkdir()
    one_query = tmp_path / "one.toml"
    one_query.write_text('summary = "Sum it up."')
    two_places = tmp_path / "two.toml"
    two_places.write_text('summary = ["<EMB> or <EMB>?"]')
    assert_refused("taken: exists already", "synthesize", texts, tmp_path / "taken",
                   "model=nonsense/x")
    cases = [
        ("tasks=some", "tasks: some: the number of task types of each text, or all; queries=FILE"),
        ("split=[1, 0, 0]", "split.1 = 0: .*greater than 0"),
        ("split=0.8", r"^elm: split: 0.8 are not the shares of train, val and test, as "
                      r"'split=\[0.8, 0.1, 0.1\]'$"),
        ("split=[0.8, 0.2]", "not the shares of train, val and test"),
        ("split=[8, 1, 1]", r"^elm: split: the shares of train, val and test are together 10, not "
                            r"1, as 'split=\[0.8, 0.1, 0.1\]'$"),
        ("split=['a', 0.1, 0.1]", "split.0 = 'a': .*valid number"),
        ("endpoint=localhost:8000", "^elm: endpoint: localhost:8000 is no address of a server; "
                                    "give one as http://localhost:8000/v1$"),
        ("queries=nowhere.toml", "^elm: queries: there is no file nowhere.toml here"),
        (f"queries={one_query}", "one.toml: summary = 'Sum it up.': not a list"),
        (f"queries={two_places}", "one <EMB> at most"),
        (f"embedder={tmp_path / 'none'}", "embedder: cannot load"),
        (f"model={tmp_path / 'none'}", "^elm: model: cannot load .*: there is no folder .*none$"),
        ("max_new_tokens=1", "model: .* accepted answers.* rejected: not finished")]
    for option, message in cases:
        assert_refused(message, "synthesize", texts, tmp_path / "new", *OPTIONS, option)
    assert not (tmp_path / "new").exists()
