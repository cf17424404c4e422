"""generate, embed and filter: end to end on the embedded default, and against other programs."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torture
from conftest import (
    NO_TABLES,
    ROOT,
    anonymous_memory,
    byte_tokenizer,
    command,
    go,
    make_data,
    make_llm,
    read_jsonl,
    read_table,
    refused,
    rows_path,
    write_rows,
)
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import elm

TINY = ROOT / "data" / "tiny"
VECTORS = TINY / "embeddings" / "test_embeddings.safetensors"
EMBEDDER = TINY / "embedder"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps on the embedded default: enough to speak, not to make sense."""
    out = tmp_path_factory.mktemp("trained")
    settings = [
        f"model.llm={TINY / 'llm'}", f"data.dir={TINY}", "train.max_steps=3", f"output.dir={out}",
        f"eval.bertscore_model={TINY / 'scorer'}", "eval.samples=10", "eval.max_new_tokens=12",
        f"eval.embedder={EMBEDDER}"]  # fmt: skip
    assert elm.main([str(ROOT / "train.toml"), *settings]) == 0
    return settings, out / "adapter_best.safetensors"


# -----------------------------------------------------------------------------
# generate


def test_generate_lines_are_what_the_library_says(trained, tmp_path, capsys):
    _, adapter = trained
    start = ["generate", f"adapter={adapter}", f"embeddings={VECTORS}", "max_new_tokens=9"]
    assert elm.main([*start, "query=Summarize the text.", "rows=[3, 0, 199]"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, table = elm.ELM.load(adapter), elm.open_vectors(VECTORS).float()
    said = model.generate(table[[3, 0, 199]], "Summarize the text.", max_new_tokens=9)
    assert [t["row"] for t in told] == [3, 0, 199] and [t["answer"] for t in told] == said
    query = "Is <EMB> about frogs?"
    assert elm.main([*start, f"query={query}"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(t["row"], t["query"]) for t in told] == [(row, query) for row in range(200)]
    assert told[7]["answer"] == model.generate(table[7:8], query, max_new_tokens=9)[0]


def test_options_go_to_the_llm_and_a_seed_repeats(trained, capsys):
    _, adapter = trained
    start = ["generate", f"adapter={adapter}", f"embeddings={VECTORS}", "query=Why?", "rows=[1, 2]"]
    hot = ["do_sample=true", "temperature=3.0", "max_new_tokens=20"]

    def said(*more):
        assert elm.main([*start, *more]) == 0
        return capsys.readouterr().out

    assert said(*hot, "seed=1") == said(*hot, "seed=1") != said(*hot, "seed=2")
    assert said("max_new_tokens=2") != said("max_new_tokens=20")
    assert said("max_new_tokens=6", "num_beams=3")


def test_the_llms_own_generation_config_does_not_make_greedy_answers_random(tmp_path):
    """Qwen3's says do_sample; the report would differ from run to run."""
    folder = make_llm(tmp_path / "llm")
    said = []
    for more in (
        {},
        dict(do_sample=True, temperature=5.0, top_k=200, num_beams=3, no_repeat_ngram_size=1,
             min_new_tokens=12, repetition_penalty=9.0)):  # fmt: skip
        (folder / "generation_config.json").write_text(json.dumps(more))
        torch.manual_seed(0)
        llm = elm.load_llm(str(folder), torch.device("cpu"), False)
        prompt = elm.Prompt(byte_tokenizer())
        model = elm.ELM(llm, elm.Adapter(4, 4, 32), prompt)
        said.append([model.generate(torch.ones(2, 4), "q", max_new_tokens=12) for _ in range(2)])
    assert said[0][0] == said[0][1] == said[1][0] == said[1][1]
    model.adapter.train()
    model.generate(torch.ones(2, 4), "q", max_new_tokens=1)
    assert model.adapter.training and model.llm.generation_config.num_beams == 3  # as before


def test_bad_input_of_generate(trained, tmp_path):
    _, adapter = trained
    narrow, nan, far = (tmp_path / name for name in ("narrow.st", "nan.st", "far.st"))
    save_file({"x": torch.ones(3, 7)}, narrow)
    table = torch.randn(2000, 128)
    save_file({"x": 9 * table}, far)
    table[1900, 3] = torch.nan
    save_file({"x": table / 11}, nan)
    start = ["generate", f"adapter={adapter}", f"embeddings={VECTORS}"]
    for message, *more in (
        ("rows: no row 200 among 200", "rows=[200]"),
        ("rows = .*at least 1 item", "rows=[]"),
        ("adaptor: not an option here, did you mean adapter", "adaptor=x"),
        ("num_return_sequences: not an option here", "num_return_sequences=2"),
        ("generate: .temperature", "temperature=-1", "do_sample=true"),
        ("adapter: is missing", "adapter=none"),
        ("query: is missing", "query=none"),
        ("not a whole table", f"embeddings={tmp_path}"),
        (r"narrow.st: \[1, 7\], but the adapter reads \[n, 128\]", f"embeddings={narrow}"),
        ("nan.st: row 1900 is zero, NaN or infinite", f"embeddings={nan}", "rows=none"),
        ("generate: a prompt has .* tokens: the LLM reads 4096", "query=" + 3000 * "frog "),
        (r"far.st: the vectors' norm was 1\b", f"embeddings={far}"),
        ("hash of the LLM's weights was", f"llm={EMBEDDER}"),
        ("a query has one <EMB> at most", "query=<EMB> or <EMB>?"),
        ("generate: takes key=value …, .* given: file.toml", "file.toml")):  # fmt: skip
        refused(message, *start, "query=Q", "rows=[0]", *more)


# -----------------------------------------------------------------------------
# embed


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The 200 texts of the test split, in the order of their vectors."""
    rows = read_jsonl(TINY / "synthesis" / "test_synthesis.jsonl")
    told = {r["embedding_file_idx"]: r["text"] for r in rows}
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": told[i]}) + "\n" for i in range(200)))
    return path


def test_embed_makes_the_shipped_vectors(texts, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert elm.main(["embed", str(texts), str(out), f"model={EMBEDDER}", "bf16=false"]) == 0
    assert "200 vectors of width 128; texts are cut after 4096 tokens" in capsys.readouterr().out
    made, shipped = elm.open_vectors(out), elm.open_vectors(VECTORS).float()
    assert made.dtype == torch.float32 and (made.norm(dim=1) - 1).abs().max() < 1e-6
    assert torch.nn.functional.cosine_similarity(made, shipped).min() >= 0.99999
    with safe_open(out, "pt") as f:
        assert json.loads(f.metadata()["embed"])["model"] == str(EMBEDDER)
    plain, again = tmp_path / "texts.txt", tmp_path / "again.safetensors"
    plain.write_text("".join(t["text"] + "\n" for t in read_jsonl(texts)))
    assert elm.main(["embed", str(plain), str(again), f"model={EMBEDDER}", "bf16=false"]) == 0
    assert again.read_bytes() == out.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "again.safetensors", "out.safetensors", "texts.txt"]  # fmt: skip


TASK = "Given a question, find the answer"


@pytest.mark.parametrize(
    "kind, more",
    [("embedder", {}), ("embedder", dict(bf16=True)), ("embedder", dict(max_tokens=12)),
     ("embedder", dict(instruction=TASK)), ("dense", {}),
     ("dense", dict(bf16=True, max_tokens=12, instruction=TASK, batch_size=7))])  # fmt: skip
def test_embed_agrees_with_the_library_used_by_hand(texts, tmp_path, kind, more):
    """Also by a mean-pooled encoder with a dense layer, whose vectors are not of unit norm."""
    model = EMBEDDER
    if kind == "dense":
        model = tmp_path / "model"
        torch.manual_seed(0)
        modules = [Transformer(str(TINY / "scorer")), Pooling(96, "mean"), Dense(96, 24)]
        SentenceTransformer(modules=modules, device="cpu").save(str(model))
    lines = [t["text"] for t in read_jsonl(texts)[:40]]
    lines = [" ".join(t.split()[: 3 + 7 * (i % 5)]) for i, t in enumerate(lines)]  # ragged
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    options = elm.EmbedOptions(model=str(model), **dict(bf16=False) | more)
    elm.embed_file(options, tmp_path / "lines.txt", tmp_path / "out.safetensors", block=16)
    made = elm.open_vectors(tmp_path / "out.safetensors")
    by_hand = SentenceTransformer(str(model), device="cpu", model_kwargs=dict(dtype=torch.float32))
    by_hand.max_seq_length = more.get("max_tokens", by_hand.max_seq_length)
    prompt = f"Instruct: {TASK}\nQuery:" if "instruction" in more else ""
    expected = by_hand.encode([prompt + t for t in lines], convert_to_tensor=True)
    cosine = torch.nn.functional.cosine_similarity(made, expected)
    assert cosine.min() >= (0.999 if options.bf16 else 0.99999)
    assert (made.norm(dim=1) - 1).abs().max() < 1e-6 and made.shape == expected.shape


@pytest.mark.slow
def test_embed_killed_and_started_again_ends_with_the_same_bytes(texts, tmp_path):
    """Killed each time that ten blocks more are there, of 32; meanwhile no other process may write
    the same file."""
    many, whole, out = (tmp_path / n for n in ("many.jsonl", "1.safetensors", "2.safetensors"))
    many.write_text(texts.read_text() * 10)
    options = elm.EmbedOptions(model=str(EMBEDDER), bf16=False)
    elm.embed_file(options, many, whole, block=64)
    code = (
        "import sys, pathlib, elm\n"
        "options = elm.EmbedOptions(model=sys.argv[1], bf16=False)\n"
        "elm.embed_file(options, *map(pathlib.Path, sys.argv[2:]), block=64)"
    )

    def start():
        return subprocess.Popen([sys.executable, "-c", code, EMBEDDER, many, out], cwd=ROOT)

    def blocks() -> int:
        return len(list(tmp_path.glob(".2.safetensors.work/*.safetensors")))

    for before in (0, 10):
        child = start()
        torture.until(child, lambda before=before: blocks() > before)
        with pytest.raises(elm.UserError, match="another process holds it"):
            elm.embed_file(options, many, out, block=64)
        torture.until(child, lambda before=before: blocks() >= before + 10)
        child.kill()
        assert child.wait() == -signal.SIGKILL and blocks() >= before + 10
    assert start().wait() == 0 and out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".2.safetensors.*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_is_written_without_being_held_in_memory(tmp_path, dtype):
    path, held = tmp_path / "table.safetensors", []

    def chunks():
        for i in range(100):
            held.append(anonymous_memory())
            yield torch.full((1000 + i % 2, 1001), i, dtype=dtype)

    elm.write_table(path, chunks(), about="x")
    table = elm.open_vectors(path)
    assert table.dtype == dtype and torch.equal(table[:, 0], table[:, 1000])
    assert torch.equal(table[:, 7].unique(), torch.arange(100).to(dtype))
    assert max(held) - held[0] < 60e6  # bytes, of 200e6 or 400e6


def test_code_beside_an_embedder_is_not_run(texts, tmp_path):
    folder = shutil.copytree(EMBEDDER, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Pooling: pass")
    text = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(text.replace("sentence_transformers.models.P", "evil.P"))
    refused("model: cannot load", "embed", texts, tmp_path / "x.safetensors", f"model={folder}")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bad_input_of_embed(texts, tmp_path):
    files = {
        "empty.txt": b"", "gap.txt": b"one\n\nthree\n", "latin.txt": b"caf\xe9\n",
        "deep.jsonl": b"[" * 99999, "field.jsonl": b'{"text": "a"}\n{"txt": "a"}\n',
        "blank.jsonl": b'{"text": ""}\n', "taken.safetensors": b"precious",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    new = tmp_path / "new.safetensors"
    for message, *given in (
        ("empty.txt: is empty", tmp_path / "empty.txt", new),
        ("gap.txt:2: not a text, or an empty one", tmp_path / "gap.txt", new),
        ("latin.txt:1: not a text.*utf-8", tmp_path / "latin.txt", new),
        ("deep.jsonl:1: not a text.*recursion", tmp_path / "deep.jsonl", new),
        ("field.jsonl:2: not a text", tmp_path / "field.jsonl", new),
        ("blank.jsonl:1: not a text, or an empty one", tmp_path / "blank.jsonl", new),
        ("nowhere.txt: No such file", tmp_path / "nowhere.txt", new),
        ("taken.safetensors: exists already", texts, tmp_path / "taken.safetensors"),
        ("x: the vectors are written as safetensors", texts, tmp_path / "no" / "x"),
        ("embed: takes TEXTS OUT key=value", texts),
        ("modle: unknown key, did you mean model", texts, new, "modle=x"),
        ("model: cannot load .*none", texts, new, f"model={tmp_path / 'none'}"),
        ("model: cannot load .*scorer: without modules.json, .* add this file and 1_Pooling",
         texts, new, f"model={TINY / 'scorer'}")):  # fmt: skip
        refused(message, "embed", f"model={EMBEDDER}", *given)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


# -----------------------------------------------------------------------------
# filter


def test_training_on_filtered_data_gives_the_losses_of_the_tasks(settings, tmp_path):
    data, out = make_data(tmp_path / "data", num_rows=60, num_vectors=30), tmp_path / "few"
    tasks = ("summary", "keywords", "style_casual")
    pair = dict(task_type="compare", embedding_file_idx=-1, query="?", response="?")
    odd = read_jsonl(rows_path(data))[0] | dict(task_type="summary", note="and ü")
    write_rows(data, "train", [*read_jsonl(rows_path(data)), pair, odd])
    only = f"data.tasks={list(tasks)}"
    code, printed = command("filter", NO_TABLES, out, *settings, only)
    assert code == 0
    for split in ("train", "val", "test"):
        before, after = read_jsonl(rows_path(data, split)), read_jsonl(rows_path(out, split))
        wanted = [r for r in before if r["task_type"] in tasks]
        old, new = read_table(data, split), read_table(out, split)
        assert len(new) == len({r["embedding_file_idx"] for r in wanted}) < len(old)
        for a, b in zip(wanted, after, strict=True):
            assert torch.equal(old[a.pop("embedding_file_idx")], new[b.pop("embedding_file_idx")])
        assert wanted == after and new.dtype == old.dtype
        assert f"{split}: {len(wanted)} of {len(before)} rows, {len(new)} of 30 vectors" in printed
    runs = []
    for folder, more in ((data, [only]), (out, [])):
        told, run = go(settings, f"data.dir={folder}", f"output.dir={folder}_run", *more)
        losses = [m.get("loss", m.get("val_loss")) for m in read_jsonl(run / "metrics.jsonl")]
        scores = [told[k] for k in ("loss", "loss_shuffled", "loss_text", "bertscore_f1")]
        runs.append([*losses, *scores])
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_bad_input_of_filter(data_dir, tmp_path):
    out = tmp_path / "out"
    start = ["filter", NO_TABLES, out, f"data.dir={data_dir}"]
    refused("did you mean summary", *start, 'data.tasks=["sumary"]')
    refused("data.dir: no ", *start, f"data.dir={tmp_path / 'none'}")
    refused("filter: takes TRAIN.TOML OUT key=value", "filter", NO_TABLES)
    refused("data: exists already", *start[:2], data_dir, start[3])
    rows = [r for r in read_jsonl(rows_path(data_dir, "val")) if r["task_type"] != "summary"]
    write_rows(data_dir, "val", rows)
    refused("val_synthesis.jsonl: no row of data.tasks", *start, 'data.tasks=["summary"]')
    write_rows(data_dir, "val", [*rows, "{"])
    refused(f"val_synthesis.jsonl:{len(rows) + 1}: Invalid JSON", *start)
    assert not list(tmp_path.glob("out*"))
