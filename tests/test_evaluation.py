"""What the reports say: BERTScore, intervals, semantic consistency, the commands' refusals."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    byte_tokenizer,
    deepspeed_launcher,
    make_llm,
    read_jsonl,
    rows_path,
    run,
    write_rows,
)
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

import elm

SCORER = str(ROOT / "data" / "tiny" / "scorer")
CFG = elm.EvalConfig(bertscore_model=SCORER)
PAIRS = [
    ("A study of bridges in Cuba with dating.", "A study of arches in Cuba with surveys."),
    ("prices, Egypt, simulation", "Keywords: prices, Egypt, simulation, density, traffic."),
    ("prices, Egypt, simulation", "prices, Egypt, simulation"),
    ("It belongs to botany.", "How does aging change the noise of grains in Nepal?"),
]


@pytest.mark.slow
def test_bertscore_is_that_of_the_librarys_command(tmp_path):
    """Pair by pair, to the six digits that it prints; with -b 1, because in batches the padding of
    the others counts as a similarity of 0, by which the last of these pairs is off by 0.001."""
    for name, column in zip(("cands", "refs"), zip(*PAIRS, strict=True), strict=True):
        (tmp_path / name).write_text("\n".join(column) + "\n")
    command = [Path(sys.executable).parent / "bert-score", "-m", SCORER, "-l", "3", "-s", "-b", "1"]
    command += ["-r", tmp_path / "refs", "-c", tmp_path / "cands"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [[float(x) for x in line.split("\t")] for line in told if line.count("\t") == 2]
    scores, made_by = elm.bert_scores(CFG, *map(list, zip(*PAIRS, strict=True)), "cpu")
    assert np.abs(scores - expected).max() < 2e-6
    assert scores[2] == pytest.approx([1, 1, 1], abs=1e-6) and scores[[0, 1, 3]].max() < 0.99
    printed = next(line.split()[0] for line in told if "P: " in line)
    assert printed.replace("_fast-tokenizer", "") == made_by and "_L3_" in made_by
    assert "rescaled" not in made_by  # never asked for, as it silently fails without its file


def test_bertscore_does_not_depend_on_the_other_pairs():
    all_at_once = elm.bert_scores(CFG, *map(list, zip(*PAIRS, strict=True)), "cpu")[0]
    alone = [elm.bert_scores(CFG, [a], [b], "cpu")[0][0] for a, b in PAIRS]
    assert np.array_equal(all_at_once, alone)


def test_nothing_scores_zero_and_long_texts_are_cut():
    texts = ["", "   \n", "a b", "word " * 2000]
    scores, _ = elm.bert_scores(CFG, texts, ["a b", "a b", "", "word " * 2000], "cpu")
    assert np.array_equal(scores[:3], np.zeros((3, 3)))
    assert scores[3] == pytest.approx([1, 1, 1], abs=1e-5)
    assert np.array_equal(elm.bert_scores(CFG, ["", ""], ["", "x"], "cpu")[0], np.zeros((2, 3)))


def test_a_tokenizer_without_a_length(tmp_path):
    """As DeBERTa's, at which bert-score ends in an OverflowError."""
    folder = shutil.copytree(SCORER, tmp_path / "scorer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(folder).model_max_length > 1e20
    cfg = elm.EvalConfig(bertscore_model=str(folder))
    texts = [a for a, _ in PAIRS] + ["word " * 2000]
    ours = elm.bert_scores(cfg, texts, texts[::-1], "cpu")[0]
    assert np.array_equal(ours, elm.bert_scores(CFG, texts, texts[::-1], "cpu")[0])


def make_roberta(folder: Path, num_places: int) -> Path:
    """A random one of byte-level tokens, whose tokenizer does not know its length."""
    folder.mkdir()
    vocab = {k: i for i, k in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    vocab |= {k: i + 5 for k, i in byte_tokenizer().get_vocab().items() if len(k) == 1}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2)
    config = RobertaConfig(vocab_size=300, max_position_embeddings=num_places, **size)
    RobertaModel(config).save_pretrained(folder)
    return folder


def test_byte_level_scorers_see_a_space_before_the_first_word(tmp_path):
    folder = make_roberta(tmp_path / "roberta", num_places=66)
    scorer = elm.load_scorer(str(folder), None)
    assert scorer._tokenizer.tokenize("ab") == ["Ġ", "a", "b"] and scorer.num_layers == 2
    cfg = elm.EvalConfig(bertscore_model=str(folder), bertscore_layers=1)
    scores, made_by = elm.bert_scores(cfg, ["ab cd", "ab " * 90], ["ab cd", "x"], "cpu")
    assert scores[0] == pytest.approx([1, 1, 1], abs=1e-5) and "_L1_" in made_by


def test_a_half_precision_scorer_is_read_in_full(tmp_path):
    """As deberta-xlarge-mnli's may be: identical texts score 1, not 0.9999."""
    folder = shutil.copytree(SCORER, tmp_path / "scorer")
    AutoModel.from_pretrained(SCORER).half().save_pretrained(folder)
    same = "A study of bridges in Cuba with dating shows the increase of cost."
    scores, _ = elm.bert_scores(elm.EvalConfig(bertscore_model=str(folder)), [same], [same], "cpu")
    assert scores[0] == pytest.approx([1, 1, 1], abs=1e-6)


def test_scorers_that_the_library_would_mistake_or_cannot_load(tmp_path):
    named = shutil.copytree(SCORER, tmp_path / "dataset5" / "scorer")
    with pytest.raises(elm.UserError, match="bert-score takes .* for a T5 by its name"):
        elm.load_scorer(str(named), None)
    bare = shutil.copytree(SCORER, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(elm.UserError, match="eval.bertscore_model: cannot load .*bare"):
        elm.load_scorer(str(bare), None)


def test_repetition():
    assert elm.repetition("") == elm.repetition("a b") == elm.repetition("a b c d e") == 0
    assert elm.repetition("a b c a b c") == pytest.approx(1 - 3 / 4)
    assert elm.repetition("no " * 12) == pytest.approx(1 - 1 / 10)


def split_of(vectors: np.ndarray):
    """As much of a Split as `summarize` reads."""
    rows = np.zeros(len(vectors), elm.ROW)
    rows["vector"], rows["length"] = vectors, 1
    return SimpleNamespace(rows=rows)


def test_measures_are_ratios_of_sums_and_vectors_are_drawn_whole():
    rng = np.random.default_rng(1)
    which = rng.integers(0, 30, 200)
    num, den = rng.gamma(2.0, size=200), rng.integers(1, 9, 200).astype(float)
    nothing, mask = np.zeros(200), rng.random(200) < 0.7
    split = split_of(which)
    measures = {"loss": np.stack([num, den]), "none": np.stack([num, nothing])}
    told = elm.summarize(split, measures, mask)
    assert told["loss"] == pytest.approx(num[mask].sum() / den[mask].sum())
    assert told["rows"] == mask.sum() and "none" not in told
    assert list(told["intervals"]) == ["loss"]
    low, high = told["intervals"]["loss"]
    used, draws, again = np.unique(which[mask]), [], np.random.default_rng(7)
    for _ in range(4000):  # the same by picking rows
        rows = np.concatenate(
            [np.flatnonzero(mask & (which == v)) for v in again.choice(used, len(used))]
        )
        draws.append(num[rows].sum() / den[rows].sum())
    expected = np.percentile(draws, (2.5, 97.5))
    assert np.abs(np.array([low, high]) - expected).max() < 0.15 * (expected[1] - expected[0])
    assert told == elm.summarize(split, {"loss": np.stack([num, den])}, mask)


def test_intervals_cover_the_truth_nineteen_times_in_twenty():
    """Rows of one vector are alike, so that drawing rows alone would cover far less often."""
    rng, hits, trials = np.random.default_rng(3), 0, 300
    for _ in range(trials):
        which = np.repeat(np.arange(60), 4)
        num = 2.0 + rng.normal(size=60)[which] + 0.2 * rng.normal(size=240)
        pair, everywhere = np.stack([num, np.ones(240)]), np.ones(240, bool)
        told = elm.summarize(split_of(which), {"x": pair}, everywhere, draws=200)
        hits += told["intervals"]["x"][0] <= 2.0 <= told["intervals"]["x"][1]
    assert 0.90 < hits / trials < 0.98


def test_consistency_is_the_cosine_and_the_rank_of_the_source():
    torch.manual_seed(0)
    table, spoken = torch.randn(50, 6), torch.randn(4, 6)
    table[7] = table[9]  # a copy of the source does not outrank it
    vector = np.array([3, 9, 9, 20])
    spoken[1] = table[9]
    split = SimpleNamespace(rows=np.zeros(4, elm.ROW), vectors=table)
    split.rows["vector"] = vector
    embedder = SimpleNamespace(
        embed=lambda texts: (torch.nn.functional.normalize(
            spoken[[int(t) for t in texts]], dim=1), 0))  # fmt: skip
    scores = elm.consistency(embedder, ["0", "1", " ", "3"], np.arange(4), split)
    for i in (0, 1, 3):
        cosines = torch.nn.functional.cosine_similarity(table, spoken[i : i + 1])
        others = torch.cat([cosines[: vector[i]], cosines[vector[i] + 1 :]])
        rank = 1 + int((others > cosines[vector[i]] + 1e-6).sum())
        assert scores[i] == pytest.approx([float(cosines[vector[i]]), 1 / rank, float(rank == 1)])
    assert scores[1] == pytest.approx([1, 1, 1]) and not scores[2].any()


def evaluate(settings, *more):
    cfg = elm.load_config(None, [*settings, *more])
    return cfg, Path(cfg.output.dir)


def test_eval_repeats_the_report_of_training_to_the_byte(settings, tmp_path, data_dir):
    """The same files from `eval`, twice; every number is there with its interval."""
    embedder = make_embedder(tmp_path / "embedder", width=12)
    settings += [f"eval.embedder={embedder}", "eval.samples=20"]
    cfg, folder = evaluate(settings)
    result = elm.train(cfg)
    for name in ("again", "twice"):
        other = elm.load_config(None, [*settings, f"output.dir={tmp_path / name}"])
        elm.evaluate(other, folder / "adapter_best.safetensors")
        told = json.loads((tmp_path / name / "eval.json").read_text())
        assert told | {"step": result["step"]} == result
        for file in ("predictions.jsonl", "report.png"):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()
    kinds = [f"bertscore_{k}" for k in ("precision", "recall", "f1", "composite")]
    kinds += ["empty_rate", "repetition", "consistency", "mrr", "top1"]
    keys = {"loss", "loss_shuffled", "loss_text", *kinds, *(f"{k}_shuffled" for k in kinds)}
    assert keys <= set(result) and keys <= set(result["intervals"])
    assert {"consistency_reference", "mrr_reference", "top1_reference"} <= set(result)
    p, r, f1, all_three = (result[k] for k in kinds[:4])
    assert all_three == pytest.approx(0.3 * p + 0.3 * r + 0.4 * f1)
    for table in (result, *result["tasks"].values()):
        for key, (low, high) in table["intervals"].items():
            assert low - 1e-9 <= high and key in table
    assert sum(t["samples"] for t in result["tasks"].values()) == result["samples"] == 20
    predictions = read_jsonl(folder / "predictions.jsonl")
    rows = elm.open_data(cfg, ("test",), elm.Prompt.of(byte_tokenizer()), 1, elm.Runtime())["test"]
    assert len(predictions) == result["samples"] == 20 and len(rows.rows) == 40
    from matplotlib.image import imread

    assert imread(folder / "report.png").shape == (600, 1300, 4)


def make_embedder(folder: Path, width: int) -> Path:
    """A random Qwen3 of any width whose tokenizer appends its end."""
    from transformers import Qwen3Config, Qwen3Model

    tok = byte_tokenizer()
    torch.manual_seed(0)
    Qwen3Model(
        Qwen3Config(
            vocab_size=len(tok), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        )
    ).save_pretrained(folder)  # fmt: skip
    tok.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_eval_by_two_processes_is_that_of_one(settings, tmp_path, stage):
    settings += ["eval.samples=40"]  # of ragged lengths, three batches for two processes
    cfg, folder = evaluate(settings)
    result = elm.train(cfg)
    config = tmp_path / "run.toml"
    config.write_text("")
    done = run("eval", config, *settings, f"output.dir={tmp_path / 'two'}",
               f"adapter={folder / 'adapter_best.safetensors'}", f"deepspeed.zero_stage={stage}",
               launcher=deepspeed_launcher(2))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "two" / "eval.json").read_text())
    files = [f / "predictions.jsonl" for f in (folder, tmp_path / "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert leaves(told | {"step": 0}) == pytest.approx(leaves(result | {"step": 0}), rel=1e-5)


def leaves(table, name="") -> dict:
    """The numbers of a nested dict."""
    if isinstance(table, dict | list):
        items = table.items() if isinstance(table, dict) else enumerate(table)
        return {k: x for key, v in items for k, x in leaves(v, f"{name}.{key}").items()}
    return {name: table} if isinstance(table, int | float) else {}


def test_bad_input_of_eval(settings, tmp_path, capsys):
    cfg, folder = evaluate(settings, "train.max_steps=1")
    elm.train(cfg)
    config, ours = tmp_path / "run.toml", folder / "adapter_best.safetensors"
    config.write_text("")
    (tmp_path / "file").write_text("")
    narrow = elm.Adapter(8, 4, 32)
    narrow.save(tmp_path / "narrow.safetensors", llm=dict(name="x", bf16=False),
                identity=dict(d_emb=8))  # fmt: skip
    other = make_llm(tmp_path / "llm2", "llama")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    wide = make_embedder(tmp_path / "embedder", width=16)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "predictions.jsonl").write_text("precious")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    out = f"output.dir={tmp_path / 'new'}"
    cases = [
        ([], "metrics.jsonl: exists already"),
        ([f"output.dir={tmp_path / 'own'}"], "predictions.jsonl: exists already"),
        ([out, f"adapter={tmp_path / 'nowhere'}"], "nowhere: there is no such file"),
        ([out, f"adapter={tmp_path}"], "there is no such file"),
        ([out, 'adapter="x"', "adapter=y"], "adapter: is missing"),
        ([out, f"adapter={tmp_path / 'foreign.safetensors'}"], "not a whole elm adapter"),
        ([out, f"adapter={tmp_path / 'narrow.safetensors'}"],
         "data.dir: test: the vectors' width was 8 in training and is 12 here"),
        ([out, f"model.llm={other}"], "llm2: the hash of the LLM's weights was .* in training"),
        ([out, f"eval.bertscore_model={tmp_path / 'none'}"], "eval.bertscore_model: no folder"),
        ([out, "eval.bertscore_layers=4"], "eval.bertscore_layers = 4: .* has 3"),
        ([out, f"eval.embedder={wide}"], "eval.embedder: .* makes vectors of width 16"),
        ([out, f"eval.embedder={tmp_path / 'none'}"], "eval.embedder: no folder"),
        ([f"output.dir={tmp_path / 'file' / 'x'}"], "file/x: Not a directory"),
        ([out, "eval.sampels=3"], "eval.sampels: unknown key, did you mean eval.samples"),
    ]  # fmt: skip
    for more, message in cases:
        given = [a for a in more if a.startswith("adapter=")] or [f"adapter={ours}"]
        rest = [a for a in more if not a.startswith("adapter=")]
        assert elm.main(["eval", str(config), *settings, *rest, *given]) == 2, message
        said = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in said if line.startswith("elm: ")]
        assert len(lines) == 1 and not [x for x in said if "Traceback" in x]
        assert re.search(message, lines[0]), (message, lines)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()
    assert [p.read_text() for p in (tmp_path / "own").iterdir()] == ["precious"]


def test_no_interval_where_there_is_none():
    """Of one vector; and of a ratio whose denominator may be 0 or less."""
    split, mask = split_of(np.array([0, 0, 1, 2])), np.array([True, True, False, False])
    one = np.stack([np.arange(4.0), np.ones(4)])
    told = elm.summarize(split, {"x": one}, mask)
    assert told["x"] == 0.5 and told["intervals"] == {}
    everywhere = np.ones(4, bool)
    few = np.stack([[1.0, 0, 0, 0], [1.0, 0, 0, 0]])  # one answer, about one of three vectors
    odd = np.stack([np.ones(4), [3.0, 0, -1, -1]])
    told = elm.summarize(split, {"x": one, "few": few, "odd": odd}, everywhere)
    assert set(told["intervals"]) == {"x"} and told["odd"] == 4 and told["few"] == 1


def test_answers_are_kept_where_the_scores_fail(settings, monkeypatch):
    monkeypatch.setattr(elm, "score_answers", None)
    cfg, folder = evaluate(settings, "train.max_steps=1")
    with pytest.raises(TypeError):
        elm.train(cfg)
    assert len(read_jsonl(folder / "predictions.jsonl")) == 6


def test_rows_of_one_vector_have_no_control(settings, data_dir):
    rows = [r | {"embedding_file_idx": 3} for r in read_jsonl(rows_path(data_dir, "val"))]
    write_rows(data_dir, "val", rows)
    with pytest.raises(elm.UserError, match="val_synthesis.jsonl: all rows are about one vector"):
        elm.train(evaluate(settings)[0])


def test_eval_beside_a_run_that_is_being_written(settings, tmp_path):
    """A half line of metrics is passed over."""
    cfg, folder = evaluate(settings, "train.max_steps=1")
    elm.train(cfg)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "lo')
    other = elm.load_config(None, [*settings, f"output.dir={tmp_path / 'again'}"])
    assert elm.evaluate(other, folder / "adapter_best.safetensors")["rows"] == 40


def test_a_missing_scorer_is_told_before_training(settings, capsys, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("")
    bad = [*settings, f"eval.bertscore_model={tmp_path / 'none'}"]
    assert elm.main([str(config), *bad]) == 2
    assert "eval.bertscore_model: no folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    result = elm.train(elm.load_config(None, [*bad, "eval.samples=0", "train.max_steps=1"]))
    assert "loss" in result and "bertscore_f1" not in result  # nothing to score, none needed
