"""What the reports say: BERTScore, intervals, semantic consistency, the commands' refusals."""

import json
import re
import shutil
from pathlib import Path

import bert_score
import make
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    NO_TABLES,
    PROMPT,
    ROOT,
    RT,
    byte_tokenizer,
    command,
    deepspeed_launcher,
    go,
    make_data,
    make_llm,
    open_train,
    read_jsonl,
    read_table,
    refused,
    rows_path,
    run,
    vectors_path,
    write_rows,
)  # fmt: skip
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)  # fmt: skip

import elm

SCORER = str(ROOT / "data" / "tiny" / "scorer")
PAIRS = [
    ("A study of bridges in Cuba with dating.", "A study of arches in Cuba with surveys."),
    ("prices, Egypt, simulation", "Keywords: prices, Egypt, simulation, density, traffic."),
    ("prices, Egypt, simulation", "prices, Egypt, simulation"),
    ("It belongs to botany.", "How does aging change the noise of grains in Nepal?"),
]


def bert_scores(pairs, **settings):
    cfg = elm.EvalConfig(**dict(bertscore_model=SCORER) | settings)
    return elm.bert_scores(cfg, [a for a, _ in pairs], [b for _, b in pairs], "cpu")


def test_bertscore_is_that_of_the_library():
    """Pair by pair: in batches it counts the padding of the others as a similarity of 0, by which
    the last of these pairs is off by 0.001."""
    options = dict(model_type=SCORER, num_layers=3, batch_size=1, return_hash=True)
    expected, settings = bert_score.score(*zip(*PAIRS, strict=True), **options)
    scores = bert_scores(PAIRS)
    assert np.abs(scores[:, :3] - torch.stack(expected, 1).numpy()).max() < 2e-6
    assert np.allclose(scores[:, 3], scores[:, :3] @ [0.3, 0.3, 0.4])
    assert scores[2] == pytest.approx([1] * 4, abs=1e-6) and scores[[0, 1, 3]].max() < 0.99
    assert elm.load_scorer(SCORER, None).hash == settings and "_L3_" in settings
    assert "rescaled" not in settings  # never asked for, as it silently fails without its file


def test_pairs_score_alone_nothing_scores_zero_and_long_texts_are_cut():
    assert np.array_equal(bert_scores(PAIRS), [bert_scores([pair])[0] for pair in PAIRS])
    long = "word " * 2000
    scores = bert_scores([("", "a b"), ("   \n", "a b"), ("a b", ""), (long, long)])
    assert not scores[:3].any() and scores[3] == pytest.approx([1] * 4, abs=1e-5)
    assert not bert_scores([("", ""), ("", "x")]).any()


def test_a_tokenizer_without_a_length(tmp_path):
    """As DeBERTa's, at which bert-score ends in an OverflowError. Of 256 positions, the two that
    RoBERTa's kind does not use are left out."""
    unknown, known = (shutil.copytree(SCORER, tmp_path / name) for name in ("a", "b"))
    config = json.loads((unknown / "tokenizer_config.json").read_text())
    (known / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 254}))
    config.pop("model_max_length", None)
    (unknown / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(unknown).model_max_length > 1e20
    pairs = [*PAIRS, ("word " * 2000, PAIRS[0][1])]
    expected = bert_scores(pairs, bertscore_model=str(known))
    assert np.array_equal(bert_scores(pairs, bertscore_model=str(unknown)), expected)


def make_roberta(folder: Path, num_positions: int) -> Path:
    """A random one of byte-level tokens, whose tokenizer does not know its length."""
    vocab = {k: i for i, k in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    vocab |= {k: i + 5 for k, i in byte_tokenizer().get_vocab().items() if len(k) == 1}
    RobertaTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2)
    config = RobertaConfig(vocab_size=300, max_position_embeddings=num_positions, **size)
    RobertaModel(config).save_pretrained(folder)
    return folder


def test_byte_level_scorers_see_a_space_before_the_first_word(tmp_path):
    folder = str(make_roberta(tmp_path / "roberta", num_positions=66))
    scorer = elm.load_scorer(folder, None)
    assert scorer._tokenizer.tokenize("ab") == ["Ġ", "a", "b"] and scorer.num_layers == 2
    pairs = [("ab cd", "ab cd"), ("ab " * 90, "x")]
    scores = bert_scores(pairs, bertscore_model=folder, bertscore_layers=1)
    assert scores[0] == pytest.approx([1] * 4, abs=1e-5)
    assert "_L1_" in elm.load_scorer(folder, 1).hash


def test_a_half_precision_scorer_is_read_in_full(tmp_path):
    """As deberta-xlarge-mnli's may be: identical texts score 1, not 0.9999."""
    folder = shutil.copytree(SCORER, tmp_path / "scorer")
    AutoModel.from_pretrained(SCORER).half().save_pretrained(folder)
    same = "A study of bridges in Cuba with dating shows the increase of cost."
    scores = bert_scores([(same, same)], bertscore_model=str(folder))
    assert scores[0] == pytest.approx([1] * 4, abs=1e-6)


def frame_of(vector, **columns) -> pd.DataFrame:
    """As `report` makes it, with tokens of 1, losses of 1 and no texts unless given."""
    columns = dict(task="summary", tokens=1, nll=1.0, nll_shuffled=1.0, nll_text=np.nan) | columns
    return pd.DataFrame({"vector": vector, **columns})


def test_measures_are_ratios_of_sums_and_vectors_are_drawn_whole():
    """Of more than a thousand vectors, which are resampled in parts: the draws are the same."""
    rng = np.random.default_rng(1)
    vector, tokens = rng.integers(0, 3000, 9000), rng.integers(1, 9, 9000)
    nll = rng.gamma(2.0, size=9000)
    frame = frame_of(vector, nll=nll, tokens=tokens)
    result = elm.summarize(frame, 500)
    assert result["loss"] == pytest.approx(nll.sum() / tokens.sum())
    assert result["rows"] == 9000 and result["rows_text"] == 0
    assert set(result) - {"rows", "rows_text", "intervals"} == {"loss", "loss_shuffled", "gap"}
    used, which = np.unique(vector, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(used), np.full(len(used), 1 / len(used)), 500)
    drawn = draws[:, which]  # how often each row is
    expected = np.percentile(drawn @ nll / (drawn @ tokens), (2.5, 97.5))
    assert result["intervals"]["loss"] == pytest.approx(expected)
    assert elm.summarize(frame, 500) == result


def test_text_measures_are_of_the_rows_with_text():
    text = [0.5, np.nan, 0.3, 0.1]
    frame = frame_of([0, 0, 1, 2], nll=[1.0, 9.0, 2.0, 0.5], nll_shuffled=[2.0, 9.0, 3.0, 2.5],
                     nll_text=text, tokens=[1, 5, 2, 1])  # fmt: skip
    result = elm.summarize(frame)
    assert result["rows_text"] == 3 and result["loss_text"] == pytest.approx(0.9 / 4)
    assert result["gap"] == pytest.approx(4.0 / 9)
    assert result["gap_closed"] == pytest.approx((7.5 - 3.5) / (7.5 - 0.9))
    assert {"gap_closed", "loss_text"} <= set(result["intervals"])
    useless = elm.summarize(frame.assign(nll_text=[1.9, np.nan, 3.3, 2.6]))  # not below shuffled
    assert "gap_closed" not in useless and "gap_closed" not in useless["intervals"]
    assert useless["loss_text"] == pytest.approx(7.8 / 4)


def test_consistency_is_the_cosine_and_the_rank_of_the_source():
    torch.manual_seed(0)
    table, spoken = torch.randn(50, 6), torch.randn(4, 6)
    table[7] = table[9]  # a copy of the source does not outrank it
    vector = np.array([3, 9, 9, 20])
    spoken[1] = table[9]
    def embed(texts):
        return torch.nn.functional.normalize(spoken[[int(t) for t in texts]], dim=1)

    scores = elm.consistency(["0", "1", " ", "3"], embed, torch.from_numpy(vector), table)
    for i in (0, 1, 3):
        cosines = torch.nn.functional.cosine_similarity(table, spoken[i : i + 1])
        others = torch.cat([cosines[: vector[i]], cosines[vector[i] + 1 :]])
        rank = 1 + int((others > cosines[vector[i]] + 1e-6).sum())
        expected = [float(cosines[vector[i]]), 1 / rank, float(rank == 1)]
        assert scores[i] == pytest.approx(expected)
    assert scores[1] == pytest.approx([1, 1, 1]) and not scores[2].any()


def test_rows_whose_text_does_not_fit_have_no_text_loss(settings, data_dir, capsys):
    rows = read_jsonl(rows_path(data_dir, "test"))
    write_rows(data_dir, "test", [r | dict(text=r["text"] + "!" * 300 * (i < 3))
                                  for i, r in enumerate(rows)])  # fmt: skip
    result, _ = go(settings, "train.max_steps=0", "eval.samples=0")
    assert result["rows_text"] == len(rows) - 3
    assert "3 texts exceed data.max_seq_length" in capsys.readouterr().err


def test_eval_repeats_the_report_of_training_to_the_byte(settings, data_dir, tmp_path, capsys):
    """The same files from `eval`, twice, even while a run writes its metrics: a half line is passed
    over. Every number is there with its interval; that a random LLM makes nothing of texts, so that
    there is no gap to close, is said in words. The embedder's vectors are wider than the stored
    ones: cut to their width, as a Matryoshka embedding is."""
    embedder = make_embedder(tmp_path / "embedder", width=16)
    settings += [f"eval.embedder={embedder}", "eval.samples=20"]
    result, folder = go(settings)
    assert "gap_closed" not in result and "gap_closed: none: no text" in capsys.readouterr().out
    for name in ("again", "twice"):
        with open(folder / "metrics.jsonl", "a") as f:
            f.write('{"step": 9, "lo')
        more = [f"output.dir={tmp_path / name}", f"adapter={folder / 'adapter_best.safetensors'}"]
        elm.evaluate(elm.load_config(None, [*settings, *more], elm.EvalOptions))
        told = json.loads((tmp_path / name / "eval.json").read_text())
        assert told | {"step": result["step"]} == result
        for file in ("predictions.jsonl", "report.png"):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()
    kinds = [f"bertscore_{k}" for k in ("precision", "recall", "f1", "composite")]
    kinds += ["empty_rate", "repetition", "consistency", "mrr", "top1"]
    keys = {"loss", "loss_shuffled", "loss_text", "gap", *kinds, *(f"{k}_shuffled" for k in kinds)}
    assert keys <= set(result) and keys <= set(result["intervals"])
    assert {"consistency_reference", "mrr_reference", "top1_reference"} <= set(result)
    p, r, f1, all_three = (result[k] for k in kinds[:4])
    assert all_three == pytest.approx(0.3 * p + 0.3 * r + 0.4 * f1)
    for table in (result, *result["tasks"].values()):
        for key, (low, high) in table["intervals"].items():
            assert low - 1e-9 <= high and key in table
    assert sum(t["samples"] for t in result["tasks"].values()) == result["samples"] == 20
    assert result["rows"] == 40
    by_hand = SentenceTransformer(str(embedder), device="cpu", truncate_dim=12)
    predictions = read_jsonl(folder / "predictions.jsonl")
    assert len(predictions) == 20
    source = read_table(data_dir, "test")[[p["embedding_file_idx"] for p in predictions]]
    for key, suffix in (("prediction", ""), ("response", "_reference")):
        made = by_hand.encode([p[key] or "x" for p in predictions], convert_to_tensor=True).float()
        cosine = torch.nn.functional.cosine_similarity(made, source)
        cosine *= torch.tensor([bool(p[key].strip()) for p in predictions])  # of nothing it is 0
        assert result[f"consistency{suffix}"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    from matplotlib.image import imread

    assert imread(folder / "report.png").shape == (600, 1300, 4)


def make_embedder(folder: Path, width: int, pooling: str = "lasttoken") -> Path:
    """A random Qwen3 of any width as a folder of sentence-transformers."""
    tok, config = byte_tokenizer(), folder / "1_Pooling" / "config.json"
    torch.manual_seed(0)
    Qwen3Model(Qwen3Config(
        vocab_size=len(tok), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )).save_pretrained(folder)  # fmt: skip
    tok.save_pretrained(folder)
    make.save_modules(folder, width)
    config.write_text(config.read_text().replace("lasttoken", pooling))
    return folder


def test_the_embedder_is_compared_with_the_stored_vectors(data_dir, tmp_path, capsys):
    """Those of a decoder with mean pooling, stored at 12 of its 40 dimensions; warned about where
    the pooling is another."""
    by_mean = make_embedder(tmp_path / "mean", 40, "mean")
    rows = [r | {"embedding_file_idx": i} for i, r in enumerate(read_jsonl(rows_path(data_dir)))]
    texts = [r["text"] for r in rows]
    vectors = SentenceTransformer(str(by_mean), device="cpu").encode(texts, convert_to_tensor=True)
    own = elm.encode(elm.load_embedder(str(by_mean)), texts, "cpu")
    assert torch.nn.functional.cosine_similarity(own, vectors).min() > 0.999
    write_rows(data_dir, "train", rows)
    save_file({"x": vectors[:, :12].contiguous()}, vectors_path(data_dir))
    split, told = open_train(data_dir, PROMPT), []
    for folder in (by_mean, make_embedder(tmp_path / "last", 40)):
        cfg = elm.EvalConfig(embedder=str(folder), bertscore_model=SCORER)
        elm.load_report_models(cfg, split, RT)
        out, err = capsys.readouterr()
        told.append(float(re.search(r"mean cosine ([\d.]+) with the stored .* 32 texts", out)[1]))
        assert ("does not make the vectors of" in err) == (told[-1] < 0.95)
    assert told[0] > 0.999 and told[1] < 0.95


@pytest.mark.slow
def test_eval_by_two_processes_is_that_of_one(tmp_path):
    """Of answers of unequal length, three batches for two processes; at ZeRO 3, where they share
    the LLM out, one that ends earlier must not leave the other."""
    words = [ROOT / "train.toml", "eval.samples=40", "eval.split=val",
             'data.tasks=["keywords", "summary", "category"]']
    one = tmp_path / "one"
    gathers = ["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
    assert command(*words, "train.max_steps=1", f"output.dir={one}")[0] == 0
    for stage, more in ((0, []), (3, gathers)):
        two = tmp_path / str(stage)
        done = run("eval", *words, *more, f"deepspeed.zero_stage={stage}", f"output.dir={two}",
                   f"adapter={one / 'adapter_best.safetensors'}", launcher=deepspeed_launcher(2))
        assert done.returncode == 0, done.stderr[-3000:]
        told, result = (
            {k: v for k, v in json.loads((folder / "eval.json").read_text()).items()
             if k != "step" and not isinstance(v, str)}
            for folder in (two, one))
        torch.testing.assert_close(told, result, rtol=1e-5, atol=1e-9)
        files = [folder / "predictions.jsonl" for folder in (one, two)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert len({len(p["prediction"].split()) for p in read_jsonl(files[0])}) > 2


def test_bad_input_of_eval(settings, tmp_path):
    _, folder = go(settings, "train.max_steps=1")
    narrow, foreign = tmp_path / "narrow.safetensors", tmp_path / "foreign.safetensors"
    about = json.dumps(dict(adapter=dict(d_emb=8, hidden_dim=4, d_llm=32)))
    save_file(elm.Adapter(8, 4, 32).state_dict(), narrow, {"elm": about})
    save_file({"x": torch.zeros(2)}, foreign)
    other, thin = make_llm(tmp_path / "llm2", "llama"), make_embedder(tmp_path / "thin", width=8)
    far = make_data(tmp_path / "far", scale=3.0)
    before, new = {p: p.read_bytes() for p in folder.iterdir()}, f"output.dir={tmp_path / 'new'}"
    for message, *more in (
        ("metrics.jsonl: exists already", f"output.dir={folder}"),
        ("foreign.safetensors/x: Not a directory", f"output.dir={foreign / 'x'}"),
        ("No such file", f"adapter={tmp_path / 'nowhere.safetensors'}"),
        ("adapter: is missing", "adapter=none"),
        ("not a whole elm adapter", f"adapter={foreign}"),
        (r"data.dir: test: \[10, 12\], but the adapter reads \[n, 8\]", f"adapter={narrow}"),
        (r"the vectors' norm was 3\.", f"data.dir={far}"),
        ("llm2: hash of the LLM's weights was .* in training", f"model.llm={other}"),
        ("eval.bertscore_model: cannot load", f"eval.bertscore_model={tmp_path / 'none'}"),
        ("cannot load .*scorer: Invalid num_layers", "eval.bertscore_layers=4"),
        ("eval.embedder: .* makes vectors of width 8, data.dir has 12", f"eval.embedder={thin}"),
    ):
        adapter = f"adapter={folder / 'adapter_best.safetensors'}"
        refused(message, "eval", NO_TABLES, *settings, new, adapter, *more)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_answers_are_kept_where_the_scores_fail(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("bert_score.BERTScorer.score", None)
    with pytest.raises(TypeError):
        go(settings, "train.max_steps=1")
    assert len(read_jsonl(tmp_path / "out" / "predictions.jsonl")) == 6


def test_what_the_report_lacks_is_told_before_training(settings, data_dir, tmp_path):
    bad = [*settings, f"eval.bertscore_model={tmp_path / 'none'}"]
    with pytest.raises(elm.UserError, match="eval.bertscore_model: cannot load"):
        go(bad)
    rows = read_jsonl(rows_path(data_dir, "val"))
    write_rows(data_dir, "val", [row | {"embedding_file_idx": 3} for row in rows])
    with pytest.raises(elm.UserError, match="val_synthesis.jsonl: all rows are about one vector"):
        go(settings)
    assert not (tmp_path / "out").exists()
    write_rows(data_dir, "val", rows)
    result, _ = go(bad, "eval.samples=0", "train.max_steps=1")
    assert "loss" in result and "bertscore_f1" not in result  # nothing to score, none needed
