"""What the reports say: BERTScore, intervals, consistency, the embedder, eval's refusals."""

import functools
import json
import re
import shutil
import weakref
from pathlib import Path

import bert_score
import make
import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    CPU,
    NO_TABLES,
    PROMPT,
    ROOT,
    build_elm,
    byte_tokenizer,
    command,
    deepspeed_launcher,
    go,
    make_data,
    make_llm,
    read_jsonl,
    read_table,
    refused,
    rows_path,
    vectors_path,
    write_rows,
)
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

import elm

SCORER = str(ROOT / "data" / "tiny" / "scorer")
PAIRS = [
    ("A study of bridges in Cuba with dating.", "A study of arches in Cuba with surveys."),
    ("prices, Egypt, simulation", "Keywords: prices, Egypt, simulation, density, traffic."),
    ("prices, Egypt, simulation", "prices, Egypt, simulation"),
    ("It belongs to botany.", "How does aging change the noise of grains in Nepal?"),
]


def load_scorer(folder=SCORER, layers=None):
    cfg = elm.EvalConfig(bertscore_model=str(folder), bertscore_layers=layers)
    return elm.load_scorer(cfg, CPU)


def score_pairs(scorer, pairs):
    texts, references = zip(*pairs, strict=True)
    return np.stack(elm.bert_scores(scorer, list(texts), list(references)), axis=1)


@pytest.fixture(scope="module")
def scorer():
    return load_scorer()


def make_embedder(folder: Path, width: int, pooling: str = "lasttoken") -> Path:
    """A random Qwen3 of any width as a folder of sentence-transformers."""
    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
    torch.manual_seed(0)
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make.save_modules(folder, width)
    pooling_file = folder / "1_Pooling" / "config.json"
    pooling_file.write_text(pooling_file.read_text().replace("lasttoken", pooling))
    return folder


def embed_rows(data_dir: Path, embedder: Path, width: int, splits=elm.SPLITS, prompt="") -> None:
    """Give each row the embedder's vector of its text, cut to `width`, of about the norm of
    make_data's."""
    model = SentenceTransformer(str(embedder), device="cpu")
    for split in splits:
        rows = read_jsonl(rows_path(data_dir, split))
        for i, row in enumerate(rows):
            row["embedding_file_idx"] = i
        vectors = model.encode([prompt + row["text"] for row in rows], convert_to_tensor=True)
        vectors = 3.4 * torch.nn.functional.normalize(vectors[:, :width].float(), dim=1)
        write_rows(data_dir, split, rows)
        save_file({"x": vectors}, vectors_path(data_dir, split))
    del model
    elm.free_memory()


# -----------------------------------------------------------------------------
# BERTScore


def test_bertscore_is_that_of_the_library(scorer):
    """Pair by pair: in batches it counts the padding of the others as a similarity of 0, by which
    the last of these pairs is off by 0.001."""
    options = dict(model_type=SCORER, num_layers=3, batch_size=1, return_hash=True)
    expected, settings = bert_score.score(*zip(*PAIRS, strict=True), **options)
    scores = score_pairs(scorer, PAIRS)
    assert np.abs(scores[:, :3] - torch.stack(expected, 1).numpy()).max() < 2e-6
    assert np.allclose(scores[:, 3], scores[:, :3] @ [0.3, 0.3, 0.4])
    assert scores[2] == pytest.approx([1] * 4, abs=1e-6)
    assert scores[[0, 1, 3]].max() < 0.99
    assert scorer.hash == settings
    assert "_L3_" in settings
    assert "rescaled" not in settings  # never asked for, as it silently fails without its file


def test_pairs_score_alone_nothing_scores_zero_and_long_texts_are_cut(scorer):
    alone = [score_pairs(scorer, [pair])[0] for pair in PAIRS]
    assert np.array_equal(score_pairs(scorer, PAIRS), alone)
    long = "word " * 2000
    scores = score_pairs(scorer, [("", "a b"), ("   \n", "a b"), ("a b", ""), (long, long)])
    assert not scores[:3].any()
    assert scores[3] == pytest.approx([1] * 4, abs=1e-5)
    assert not score_pairs(scorer, [("", ""), ("", "x")]).any()


def test_a_tokenizer_without_a_length(tmp_path):
    """As DeBERTa's, at which bert-score ends in an OverflowError. Of 256 positions, the two that
    RoBERTa's kind does not use are left out."""
    unknown = shutil.copytree(SCORER, tmp_path / "unknown")
    known = shutil.copytree(SCORER, tmp_path / "known")
    config = json.loads((unknown / "tokenizer_config.json").read_text())
    (known / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 254}))
    config.pop("model_max_length", None)
    (unknown / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(unknown).model_max_length > 1e20
    pairs = [*PAIRS, ("word " * 2000, PAIRS[0][1])]
    expected = score_pairs(load_scorer(known), pairs)
    assert np.array_equal(score_pairs(load_scorer(unknown), pairs), expected)


def make_roberta(folder: Path, num_positions: int) -> Path:
    """A random one of byte-level tokens, whose tokenizer does not know its length."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens += [token for token in byte_tokenizer().get_vocab() if len(token) == 1]
    vocab = {token: i for i, token in enumerate(tokens)}
    RobertaTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=300, max_position_embeddings=num_positions, hidden_size=16,
        num_attention_heads=2, intermediate_size=16, num_hidden_layers=2)
    torch.manual_seed(0)
    RobertaModel(config).save_pretrained(folder)
    return folder


def test_byte_level_scorers_see_a_space_before_the_first_word(tmp_path):
    folder = make_roberta(tmp_path / "roberta", num_positions=66)
    scorer = load_scorer(folder)
    assert scorer._tokenizer.tokenize("ab") == ["Ġ", "a", "b"]
    assert scorer.num_layers == 2
    of_layer_1 = load_scorer(folder, layers=1)
    assert "_L1_" in of_layer_1.hash
    scores = score_pairs(of_layer_1, [("ab cd", "ab cd"), ("ab " * 90, "x")])
    assert scores[0] == pytest.approx([1] * 4, abs=1e-5)


def test_a_half_precision_scorer_is_read_in_full(tmp_path):
    """As deberta-xlarge-mnli's may be: identical texts score 1, not 0.9999."""
    folder = shutil.copytree(SCORER, tmp_path / "scorer")
    AutoModel.from_pretrained(SCORER).half().save_pretrained(folder)
    same = "A study of bridges in Cuba with dating shows the increase of cost."
    scores = score_pairs(load_scorer(folder), [(same, same)])
    assert scores[0] == pytest.approx([1] * 4, abs=1e-6)


def save_config(folder: Path, num_layers: int = 48, **fields: str) -> Path:
    """The config of a BERT of so many layers."""
    folder.mkdir(parents=True)
    config = {"model_type": "bert", "num_hidden_layers": num_layers, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def layers_of(name) -> int:
    return elm.scorer_layers(elm.EvalConfig(bertscore_model=str(name)))


def test_a_folder_of_a_known_scorer_has_the_layer_that_the_library_chose(tmp_path, capsys):
    """40 of the 48 layers of deberta-xlarge-mnli: by the folder's name, in the hub's cache, by a
    link's target, by what the config was saved from. Else the last one, with a warning."""
    assert bert_score.utils.model2layers["microsoft/deberta-xlarge-mnli"] == 40
    named = save_config(tmp_path / "deberta-xlarge-mnli")
    cache = tmp_path / "hub" / "models--microsoft--deberta-xlarge-mnli" / "snapshots" / "0f1e"
    save_config(cache)
    (tmp_path / "link").symlink_to(named)
    (tmp_path / "link_to_cache").symlink_to(cache)
    copy = save_config(tmp_path / "copy", _name_or_path="microsoft/deberta-xlarge-mnli")
    for folder in (named, f"{named}/", cache, tmp_path / "link", tmp_path / "link_to_cache", copy):
        assert layers_of(folder) == 40, folder
    base = save_config(tmp_path / "models--bert-base-uncased" / "snapshots" / "1", num_layers=12)
    assert layers_of(base) == 9
    assert capsys.readouterr().err == ""

    elm.warn_once.cache_clear()
    other = save_config(tmp_path / "mine")
    small = save_config(tmp_path / "small" / "roberta-large", num_layers=4)  # which has 24
    for folder, last in ((other, 48), (small, 4)):
        assert layers_of(folder) == last
        assert layers_of(folder) == last
        err = capsys.readouterr().err
        assert err.count(f"eval.bertscore_model = {folder}: bert-score knows no layer") == 1
        assert "set eval.bertscore_layers" in err


# -----------------------------------------------------------------------------
# Summaries


def losses_of(vector, **columns) -> pd.DataFrame:
    """As `measure` makes them, with tokens of 1, losses of 1 and no texts unless given."""
    columns = dict(task="summary", tokens=1, nll=1.0, nll_shuffled=1.0, nll_nearest=np.nan,
                   nll_text=np.nan) | columns
    return pd.DataFrame({"source": vector, **columns})


def test_noise_has_no_share_although_tasks_are_chosen():
    """An LLM that reads no text at all: to leave out the task types whose text it reads no better
    by chance must not make a share out of the others."""
    rng = np.random.default_rng(2)
    num_shares = 0
    for _ in range(40):
        losses = losses_of(
            rng.integers(0, 100, 400), task=rng.integers(0, 13, 400).astype(str),
            nll=rng.normal(5, 1, 400), nll_shuffled=rng.normal(5, 1, 400),
            nll_text=rng.normal(5, 1, 400))
        num_shares += "gap_closed" in elm.summarize(losses, num_resamples=200)
    assert num_shares <= 4  # one in 40 is expected; by the kept task types alone half of them


def test_measures_are_ratios_of_sums_and_vectors_are_drawn_whole():
    """Of more than a thousand vectors, which are resampled in parts: the draws are the same."""
    rng = np.random.default_rng(1)
    vector = rng.integers(0, 3000, 9000)
    tokens = rng.integers(1, 9, 9000)
    nll = rng.gamma(2.0, size=9000)
    losses = losses_of(vector, nll=nll, tokens=tokens)
    result = elm.summarize(losses, num_resamples=500)
    assert result["loss"] == pytest.approx(nll.sum() / tokens.sum())
    assert result["rows"] == 9000
    assert result["rows_text"] == 0
    counts = {"rows", "rows_text", "rows_nearest", "sources", "sources_text"}
    assert set(result) - counts - {"intervals"} == {"loss", "loss_shuffled", "gap"}
    used, which = np.unique(vector, return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(used), np.full(len(used), 1 / len(used)), 500)
    drawn = draws[:, which]  # how often each row is
    expected = np.percentile(drawn @ nll / (drawn @ tokens), (2.5, 97.5))
    assert result["intervals"]["loss"] == pytest.approx(expected)
    assert elm.summarize(losses, num_resamples=500) == result


def test_text_measures_are_of_the_rows_with_text():
    losses = losses_of(
        [0, 0, 1, 2], nll=[1.0, 9.0, 2.0, 0.5], nll_shuffled=[2.0, 9.0, 3.0, 2.5],
        nll_text=[0.5, np.nan, 0.3, 0.1], tokens=[1, 5, 2, 1])
    result = elm.summarize(losses)
    assert result["rows_text"] == 3
    assert result["loss_text"] == pytest.approx(0.9 / 4)
    assert result["gap"] == pytest.approx(4.0 / 9)
    assert result["gap_closed"] == pytest.approx((7.5 - 3.5) / (7.5 - 0.9))
    assert {"gap_closed", "loss_text"} <= set(result["intervals"])
    not_below_shuffled = losses.assign(nll_text=[1.9, np.nan, 3.3, 2.6])
    useless = elm.summarize(not_below_shuffled)
    assert "gap_closed" not in useless
    assert "gap_closed" not in useless["intervals"]
    assert useless["loss_text"] == pytest.approx(7.8 / 4)


def test_tasks_whose_text_is_not_read_are_no_part_of_the_gap_closed():
    """By hand: of `bad` the text is worse by .5 in sum, although one of its rows is better; of
    `summary` the vector closes 1 + 2 of 2 + 4. With `bad` it would be 7 of 5.5. A task of one row
    is never left out."""
    losses = losses_of(
        [0, 1, 0, 1], task=["summary", "summary", "bad", "bad"], nll=[2.0, 3.0, 1.0, 3.0],
        nll_shuffled=[3.0, 5.0, 3.0, 5.0], nll_text=[1.0, 1.0, 1.0, 7.5], tokens=[1, 1, 2, 2])
    assert elm.unread_tasks(losses) == ["bad"]
    result = elm.summarize(losses)
    assert result["gap_closed"] == pytest.approx(3 / 6)
    # Of the two vectors' shares, 1 of 2 and 2 of 4, every resample has .5.
    assert result["intervals"]["gap_closed"] == pytest.approx([0.5, 0.5])
    assert result["loss"] == pytest.approx(9 / 6)
    assert result["loss_text"] == pytest.approx(10.5 / 6)
    assert result["gap"] == pytest.approx(7 / 6)
    one_row = losses.assign(task=["summary", "summary", "summary", "bad"])
    assert elm.unread_tasks(one_row) == []
    assert elm.unread_tasks(losses.assign(nll_text=np.nan)) == []


def test_a_task_whose_text_is_not_read_does_not_hide_the_others():
    """A hundred rows of one type whose text is read, as many of another whose text is read badly:
    over all of them the text is worse than another row's vector."""
    losses = losses_of(
        [*range(100)] * 2, task=["summary"] * 100 + ["reconstruct"] * 100, nll=2.0,
        nll_shuffled=3.0, nll_text=[1.0] * 100 + [9.0] * 100)
    assert elm.unread_tasks(losses) == ["reconstruct"]
    assert elm.summarize(losses)["gap_closed"] == pytest.approx(1 / 2)


def test_a_report_without_texts_says_that_there_are_none(data_dir, tmp_path, capsys):
    result = write_report(tmp_path / "report", data_dir, losses_of([*range(30)]))
    assert "gap_closed" not in result
    assert "gap_closed: none: no row has a text, or one that fits" in one_line(
        capsys.readouterr().out)


def test_texts_are_read_although_no_task_has_many():
    """A text, a row and a task type each: no type alone can show that its text is read."""
    losses = losses_of([*range(13)], task=[*elm.TASKS], nll=2.0, nll_shuffled=3.0,
                       nll_text=[1.1, 0.9, *[1.0] * 11])  # fmt: skip
    assert elm.summarize(losses)["gap_closed"] == pytest.approx(0.5)


def test_a_task_of_few_rows_with_text_has_no_share():
    """Nine, ten, and ten of which one has no text."""
    losses = losses_of(
        [*range(29)], task=["nine"] * 9 + ["ten"] * 10 + ["one less"] * 10, nll=2.0,
        nll_shuffled=3.0, nll_text=[1.0] * 28 + [np.nan])
    tasks = elm.summarize_tasks(losses, None)
    assert {name: task["rows"] for name, task in tasks.items()} == {
        "nine": 9, "ten": 10, "one less": 10}
    shares = {name: task.get("gap_closed") for name, task in tasks.items()}
    assert shares == {"nine": None, "ten": 0.5, "one less": None}
    assert "gap_closed" in tasks["ten"]["intervals"]
    assert "gap_closed" not in tasks["nine"]["intervals"]


def one_line(text: str) -> str:
    """Without the console's line ends and alignment."""
    return " ".join(text.split())


def write_report(folder: Path, data_dir: Path, losses: pd.DataFrame) -> dict:
    """The report of these losses, without answers."""
    folder.mkdir()
    split = elm.open_split(str(data_dir), "test", elm.TASKS, elm.Encoder(PROMPT, 1, 256))
    measured = elm.Measured(losses, np.arange(0), [], [], {}, {})
    cfg = elm.load_config(None, ["eval.samples=0", f"data.dir={data_dir}"])
    header = {"split": "test", "step": 3, "adapter_step": 3}
    metrics = elm.read_metrics(folder / "metrics.jsonl")
    return elm.write_report(measured, split, cfg, CPU, folder, folder.name, metrics, header)


def write_validations(folder: Path) -> None:
    """Of losses whose share is .5 and then .75."""
    for step, loss in ((0, 2.0), (3, 1.5)):
        entry = {"step": step, "val_loss": loss, "val_loss_shuffled": 3.0, "val_loss_text": 1.0}
        elm.append_text(folder / "metrics.jsonl", elm.jsonl([entry]))


def test_a_report_of_few_vectors_or_without_some_tasks_says_so(data_dir, tmp_path, capsys):
    """What is left out is named, and the losses on validation, which are of all tasks, give no
    share beside it."""
    few = losses_of([*range(29)], nll=2.0, nll_shuffled=3.0, nll_text=1.0)
    result = write_report(tmp_path / "few", data_dir, few)
    out = one_line(capsys.readouterr().out)
    assert result["sources"] == 29
    assert result["tasks_left_out"] == []
    assert "gap_closed: 0.5000 on test, not reliable: of 29 vectors loss" in out
    with_more = losses_of([*range(60)], nll=2.0, nll_shuffled=3.0,
                          nll_text=[1.0] * 29 + [np.nan] * 31)  # fmt: skip
    result = write_report(tmp_path / "with more", data_dir, with_more)
    assert (result["sources"], result["sources_text"]) == (60, 29)
    assert "not reliable: of 29 vectors loss" in one_line(capsys.readouterr().out)

    bad = losses_of([0, 1], task="bad", nll=1.0, nll_shuffled=1.0, nll_text=2.0)
    enough = losses_of([*range(30)], nll=2.0, nll_shuffled=3.0, nll_text=1.0)
    result = write_report(
        tmp_path / "enough", data_dir, pd.concat([enough, bad], ignore_index=True))
    out, err = map(one_line, capsys.readouterr())
    assert result["tasks_left_out"] == ["bad"]
    assert json.loads((tmp_path / "enough" / "eval.json").read_text()) == result
    assert "gap_closed: 0.5000 on test loss" in out
    assert "left out of the gap: 1 of 2 task types, whose text" in out
    assert "another row's vector: bad gap_closed: " in out
    assert "not reliable" not in out + err

    write_validations(tmp_path)
    metrics = elm.read_metrics(tmp_path / "metrics.jsonl")
    with_val = "0.5000 on test; on val 0.5000 at step 0, 0.7500 at step 3"
    assert elm.describe_gap(result, metrics) == "0.5000 on test"
    assert elm.describe_gap(result | {"tasks_left_out": []}, metrics) == with_val


def test_scores_are_taken_by_name_and_row():
    """In any order of columns and rows. The second row was not answered."""
    losses = losses_of([0, 0, 1, 2, 3], tokens=[1, 2, 3, 4, 5], nll=[0.5, 1.0, 1.5, 2.0, 2.5])
    scores = pd.DataFrame(
        {"b": [0.1, 0.2, 0.6, 0.7], "a": [1.0, 0.0, 1.0, 1.0]}, index=[0, 2, 3, 4])
    result = elm.summarize(losses, scores)
    assert result["samples"] == 4
    assert result["a"] == pytest.approx(0.75)
    assert result["b"] == pytest.approx(0.4)
    assert {"a", "b"} <= set(result["intervals"])
    low, high = result["intervals"]["b"]
    assert 0.1 <= low < 0.4 < high <= 0.7
    assert elm.summarize(losses, scores[["a", "b"]].loc[[4, 0, 3, 2]]) == result
    without = elm.summarize(losses)
    assert set(result) - set(without) == {"samples", "samples_nearest", "a", "b"}
    for key in ("loss", "gap", "rows"):
        assert result[key] == without[key]


@pytest.mark.parametrize("text, expected", [
    ("", 0), ("a b", 0), ("a b c d a b c", 1 / 5), ("a b c " * 3, 1 - 3 / 7),
    ("It's so.  It's so.\nIt's so.", 1 - 2 / 4),
    ("你好吗", 0),
    ("很好很好很好很", 1 - 2 / 4),  # pairs 很好 好很 很好 好很 很好 好很
    ("使用 BERT 模型。使用 BERT 模型。使用 BERT 模型。", 1 - 4 / 10),
    ("すごいすごいすごい", 1 - 3 / 6),
    ("ดีมากดีมากดีมาก", 1 - 5 / 12),
    ("아주 좋아 아주 좋아 아주", 1 - 2 / 3),
    ("!" * 30, 0),  # one word
    ("!" * 31, 1 - 1 / 28),
    ("😀" * 64, 1 - 1 / 61),
    ("감사합니다" * 8, 1 - 5 / 37),
    ("Rechtsschutzversicherungsgesellschaften", 0)])
def test_repetition_is_the_share_of_trigrams_that_came_before(text, expected):
    """Of words or, in scripts without spaces and in endless words, of pairs of characters."""
    assert elm.repetition(text) == pytest.approx(expected)


# -----------------------------------------------------------------------------
# Reports


def evaluate(settings, *more):
    return elm.evaluate(elm.load_config(None, [*settings, *more], elm.EvalOptions))


def test_rows_whose_text_does_not_fit_have_no_text_loss(trained, data_dir, tmp_path, capsys):
    _, folder, settings = trained
    rows = read_jsonl(rows_path(data_dir, "test"))
    for row in rows[:3]:
        row["text"] += "!" * 300
    write_rows(data_dir, "test", rows)
    result = evaluate(settings, f"data.dir={data_dir}", "eval.samples=0", f"adapter={folder}",
                      f"report_dir={tmp_path / 'report'}")
    assert result["rows_text"] == len(rows) - 3
    assert " 3 texts exceed data.max_seq_length" in capsys.readouterr().err


def test_eval_repeats_the_report_of_training_to_the_byte(trained, tmp_path, capsys):
    """The same files from `eval`, beside the adapter, even while a run writes its metrics: a half
    line is passed over. That a random LLM makes nothing of texts, so that there is no gap to close,
    is said in words. A folder that holds a report is refused."""
    report, folder, settings = trained
    copy = shutil.copytree(folder, tmp_path / folder.name)
    with open(copy / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "lo')
    before = {path: path.read_bytes() for path in copy.iterdir()}
    settings = [setting for setting in settings if not setting.startswith("output.dir=")]
    words = ["eval", NO_TABLES, *settings, f"adapter={copy / 'adapter_best.safetensors'}"]
    code, said = command(*words)
    assert code == 0
    assert "gap_closed: none: this LLM" in one_line(said)
    best_step = report["adapter_step"]
    beside = copy / f"eval_test_step_{best_step}"
    written = json.loads((beside / "eval.json").read_text())
    assert f"model.llm={written.pop('llm')}" in settings
    assert written.pop("precision") == "float32"
    assert written | {"step": report["step"]} == report
    assert "gap_closed" not in written
    for name in ("predictions.jsonl", "report.png"):
        assert (beside / name).read_bytes() == (folder / name).read_bytes()
    refused(f"{beside}: holds a report or a run already", *words)
    assert {path: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_each_number_has_its_interval_and_is_what_it_says(trained, data_dir, tmp_path):
    """The embedder's vectors are wider than the stored ones: cut to their width, as a Matryoshka
    embedding is."""
    _, folder, settings = trained
    embedder = make_embedder(tmp_path / "embedder", width=16)
    embed_rows(data_dir, embedder, 12)
    new = tmp_path / "report"
    result = evaluate(settings, f"eval.embedder={embedder}", "eval.samples=20",
                      f"data.dir={data_dir}", f"adapter={folder}", f"report_dir={new}")
    scores = ["empty_rate", "repetition", "consistency", "mrr", "top1"]
    scores += ["bertscore_precision", "bertscore_recall", "bertscore_f1", "bertscore_composite"]
    keys = {"loss", "loss_shuffled", "loss_text", "gap", "loss_nearest", "gain_over_nearest"}
    keys |= {f"{name}{suffix}" for name in scores for suffix in ("", "_shuffled", "_nearest")}
    keys |= {"consistency_reference", "mrr_reference", "top1_reference"}
    assert keys <= set(result)
    assert keys <= set(result["intervals"])
    composite = (0.3 * result["bertscore_precision"] + 0.3 * result["bertscore_recall"]
                 + 0.4 * result["bertscore_f1"])
    assert result["bertscore_composite"] == pytest.approx(composite)
    for table in (result, *result["tasks"].values()):
        for key, (low, high) in table["intervals"].items():
            assert key in table
            assert low - 1e-9 <= high
    assert result["rows"] == 40
    assert result["samples"] == 20
    assert sum(task["samples"] for task in result["tasks"].values()) == 20

    by_hand = SentenceTransformer(str(embedder), device="cpu", truncate_dim=12)
    predictions = read_jsonl(new / "predictions.jsonl")
    assert len(predictions) == 20
    source = read_table(data_dir, "test")[[p["embedding_file_idx"] for p in predictions]]
    for key, suffix in (("prediction", ""), ("prediction_nearest", "_nearest"),
                        ("response", "_reference")):
        texts = [p[key] for p in predictions]
        is_filled = torch.tensor([bool(text.strip()) for text in texts])
        vectors = by_hand.encode([text or "x" for text in texts], convert_to_tensor=True).float()
        cosine = torch.nn.functional.cosine_similarity(vectors, source)
        cosine = cosine * is_filled  # of nothing it is 0
        assert result[f"consistency{suffix}"] == pytest.approx(float(cosine.mean()), abs=1e-5)

    from matplotlib.image import imread

    assert imread(new / "report.png").shape == (600, 1300, 4)


def rounded(report: object) -> object:
    """With its numbers as they are printed, to four digits after the point."""
    if isinstance(report, dict):
        return {key: rounded(value) for key, value in report.items()}
    if isinstance(report, list):
        return [rounded(value) for value in report]
    return round(report, 4) if isinstance(report, float) else report


def test_a_report_does_not_depend_on_the_size_of_batches(trained, tmp_path, monkeypatch):
    """Of rows, of answers and of logits."""
    _, folder, settings = trained
    words = ["eval", NO_TABLES, *settings[:-1], f"adapter={folder}"]
    assert settings[-1].startswith("output.dir=")
    reports = []
    for rows, answers, logits in ((16, 16, 2**24), (3, 5, 2000)):
        monkeypatch.setattr(elm, "EVAL_BATCH_ROWS", {"cpu": rows})
        monkeypatch.setattr(elm, "REPORT_BATCH", {"cpu": answers})
        monkeypatch.setattr(elm, "MAX_LOGITS_AT_ONCE", {"cpu": logits})
        code, said = command(*words, f"report_dir={tmp_path / str(rows)}")
        assert code == 0, said
        report = json.loads((tmp_path / str(rows) / "eval.json").read_text())
        report.pop("seconds", None)
        predictions = read_jsonl(tmp_path / str(rows) / "predictions.jsonl")
        reports.append((rounded(report), rounded(predictions)))
    assert reports[0] == reports[1]


def test_eval_by_two_processes_is_that_of_one(run, tmp_path):
    """Of answers of unequal length, three batches for two processes; at ZeRO 3, where they share
    the LLM out, one that ends earlier must not leave the other."""
    one = tmp_path / "one"
    words = [ROOT / "train.toml", "eval.samples=40", "eval.split=val",
             'data.tasks=["keywords", "summary", "category"]']
    assert command(*words, "train.max_steps=1", f"output.dir={one}")[0] == 0
    expected = numbers_of_report(one)
    assert {"loss_nearest", "gain_over_nearest", "bertscore_f1_nearest"} <= set(expected)
    answers = (one / "predictions.jsonl").read_bytes()
    assert len({len(p["prediction"].split()) for p in read_jsonl(one / "predictions.jsonl")}) > 2
    gathers = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    for stage, more in ((0, []), (3, [gathers])):
        two = tmp_path / f"stage_{stage}"
        done = run(
            "eval", *words, *more, f"deepspeed.zero_stage={stage}", f"report_dir={two}",
            f"adapter={one / 'adapter_best.safetensors'}", launcher=deepspeed_launcher(2))
        assert done.returncode == 0, done.stderr[-3000:]
        torch.testing.assert_close(numbers_of_report(two), expected, rtol=1e-5, atol=1e-9)
        assert (two / "predictions.jsonl").read_bytes() == answers


def numbers_of_report(folder: Path) -> dict:
    report = json.loads((folder / "eval.json").read_text())
    return {k: v for k, v in report.items() if k != "step" and not isinstance(v, str)}


def test_names_with_dollars_are_drawn_as_they_are(settings, data_dir, tmp_path, capsys):
    """Of the folder, of a task and of a split's file; also of characters that the font lacks, which
    are told once."""
    elm.warn_once.cache_clear()
    task = "pri$e_$x^{2 任务"
    for split in elm.SPLITS:
        rows = read_jsonl(rows_path(data_dir, split))
        write_rows(data_dir, split, [row | {"task_type": task} for row in rows])
    out = tmp_path / "cost_$5^{ to $6 测试"
    result, folder = go(settings, f"output.dir={out}", f"data.tasks={json.dumps([task])}")
    assert list(result["tasks"]) == [task]
    assert (folder / "report.png").stat().st_size > 1000
    err = capsys.readouterr().err
    assert "is left out" not in err
    assert err.count("font lacks some characters") == 1
    assert "Glyph" not in err


@pytest.mark.parametrize("has_nearest", [True, False])
def test_the_picture_has_bars_of_the_nearest_where_they_are_known(
        data_dir, tmp_path, monkeypatch, has_nearest):
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", keep)
    losses = losses_of([*range(30)], nll=1.0, nll_shuffled=2.0, nll_text=0.5)
    names = ["loss_shuffled", "loss", "loss_text"]
    widths = [2.0, 1.0, 0.5]
    if has_nearest:
        losses["nll_nearest"] = 1.5
        names.insert(1, "loss_nearest")
        widths.insert(1, 1.5)
    write_report(tmp_path / "report", data_dir, losses)
    (figure,) = figures
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    assert [bars[0].get_width() for bars in axes.containers] == pytest.approx(widths)


def test_a_picture_never_ends_a_run(settings, tmp_path, monkeypatch, capsys):
    """Not what matplotlib raises, nor a full disk; all else is there."""

    def fail(*arguments, **options):
        raise RuntimeError("no such font")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    for failure, reason in ((fail, "no such font"), (full, "No space left on device")):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", failure)
        result, folder = go(settings, f"output.dir={tmp_path / failure.__name__}")
        err = capsys.readouterr().err
        assert err.count("elm: warning: report.png is left out: ") == 3  # two validations, the end
        assert reason in err
        assert json.loads((folder / "eval.json").read_text()) == result
        assert (folder / "predictions.jsonl").exists()
        assert not (folder / "report.png").exists()


def test_an_error_of_our_own_in_a_picture_keeps_its_traceback(tmp_path):
    path = tmp_path / "report.png"
    with pytest.raises(KeyError, match="tasks"), elm.drawing(path):
        elm.plot_report(path, [], "a run", {"split": "test"})


def test_samples_show_the_text_and_are_clipped(settings, data_dir, tmp_path, capsys):
    rows = read_jsonl(rows_path(data_dir, "test"))
    long = "長" * 1000
    for row in rows:
        row["response"] = long
    rows[0].pop("text")
    write_rows(data_dir, "test", rows)
    go(settings, "train.max_steps=0", "eval.samples=40")
    predictions = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert "text" not in predictions[0]
    assert [p["text"] for p in predictions[1:]] == [row["text"] for row in rows[1:]]
    out = capsys.readouterr().out
    assert out.count("\n  text       ") == 4
    assert len(re.findall("\n  reference  (?:長{33}\n {13}){3}長{32}…\n", out)) == 5
    assert f"\n  text       {predictions[8]['text']}\n" in out


def test_answers_are_kept_where_the_scores_fail(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("bert_score.BERTScorer.score", None)
    with pytest.raises(TypeError):
        go(settings, "train.max_steps=0")
    assert len(read_jsonl(tmp_path / "out" / "predictions.jsonl")) == 6


# -----------------------------------------------------------------------------
# Retrieval: the nearest training text, and its answer


def brute_force(data_dir: Path, vector: torch.Tensor, task: str | None = None) -> dict | None:
    """Of the rows of train with text, and of the task, the first whose vector has the greatest
    cosine with `vector`; by a loop over the lines of the file."""
    table = read_table(data_dir)
    best = None
    greatest = -2.0
    for row in read_jsonl(rows_path(data_dir)):
        if not row.get("text") or task not in (None, row["task_type"]):
            continue
        cosine = torch.nn.functional.cosine_similarity(
            vector.double(), table[row["embedding_file_idx"]].double(), dim=0).item()
        if cosine > greatest:
            best = row
            greatest = cosine
    return best


def check_nearest(data_dir: Path, llm: Path, limit: int = 256) -> pd.DataFrame:
    """Compare `measure` with brute force on the test split: each row's loss by the nearest text is
    elm's own loss of the row where that text is written in place of its own. The losses."""
    encoder = elm.Encoder(elm.Prompt(elm.load_tokenizer(str(llm))), 1, limit)
    splits = {name: elm.open_split(str(data_dir), name, elm.TASKS, encoder)
              for name in ("train", "test")}
    model = build_elm(llm, splits["test"])
    cfg = elm.EvalConfig(samples=30, max_new_tokens=1)
    measured = elm.measure(model, splits["test"], splits["train"], cfg)

    rows = read_jsonl(rows_path(data_dir, "test"))
    table = read_table(data_dir, "test")
    vectors = [table[row["embedding_file_idx"]] for row in rows]
    texts = [brute_force(data_dir, vector)["text"] for vector in vectors]
    replaced = [row | {"text": text} for row, text in zip(rows, texts, strict=True)]
    copy = shutil.copytree(data_dir, data_dir.with_name("replaced"))
    write_rows(copy, "test", replaced)
    split = elm.open_split(str(copy), "test", elm.TASKS, encoder)
    expected = elm.losses_by_texts(model, split, elm.own_texts(split))
    assert expected.num_tokens.any()
    np.testing.assert_allclose(
        measured.losses["nll_nearest"],
        np.where(expected.num_tokens > 0, expected.nll, np.nan), rtol=1e-5)

    assert len(measured.sample_ids) == 30
    assert measured.nearest_texts == {i: texts[i] for i in measured.sample_ids}
    answers = {}
    for i in measured.sample_ids:
        nearest = brute_force(data_dir, vectors[i], rows[i]["task_type"])
        if nearest is not None:
            answers[i] = nearest["response"]
    assert measured.nearest_answers == answers
    return measured.losses


def test_the_nearest_texts_are_those_of_brute_force_in_the_tiny_world(tmp_path):
    data = tmp_path / "data"
    for folder in ("embeddings", "synthesis"):
        shutil.copytree(ROOT / "data" / "tiny" / folder, data / folder)
    write_rows(data, "train", read_jsonl(rows_path(data))[::3])
    write_rows(data, "test", read_jsonl(rows_path(data, "test"))[:60])
    losses = check_nearest(data, ROOT / "data" / "tiny" / "llm")
    by_nearest = losses["nll_nearest"].sum()
    assert 5 * losses["nll_text"].sum() < by_nearest < losses["nll_shuffled"].sum()


def test_only_training_rows_with_text_are_retrieved(data_dir, llm_dir, capsys):
    """Not rows whose text is null, empty or missing, nor unused vectors, though theirs are the
    test's own; of equal vectors the one whose row comes first, and of its rows the first. A task
    type that train lacks has no answer; a nearest text that does not fit gives no loss."""
    rows = read_jsonl(rows_path(data_dir))
    without = [rows.pop(), rows.pop(), rows.pop()]
    test_table = read_table(data_dir, "test")
    table = torch.cat([read_table(data_dir), test_table])  # 10 to 19 are the test's
    for i, (row, text) in enumerate(zip(without, (None, "", ...), strict=True)):
        row["embedding_file_idx"] = 10 + i
        row["text"] = text
        if text is ...:
            del row["text"]
    table[19] = table[18]  # both of the test's vector 8: the second comes first, by two rows
    first = rows[0] | {"embedding_file_idx": 19, "text": "the first"}
    second = rows[0] | {"embedding_file_idx": 18, "text": "the second", "response": "later"}
    long = rows[0] | {"embedding_file_idx": 17, "text": "too long " * 40}
    rows = [row for row in rows if row["task_type"] != elm.TASKS[3]]
    write_rows(data_dir, "train", [*without, first, first | {"text": "no"}, second, long, *rows])
    save_file({"x": table}, vectors_path(data_dir))
    test_rows = read_jsonl(rows_path(data_dir, "test"))
    for i, row in enumerate(test_rows):
        row["embedding_file_idx"] = i % 10
    write_rows(data_dir, "test", test_rows)

    losses = check_nearest(data_dir, llm_dir)
    assert ("4 nearest texts exceed data.max_seq_length: left out of loss_nearest and "
            "gain_over_nearest") in capsys.readouterr().err
    is_far = torch.arange(40) % 10 == 7
    assert losses["nll_nearest"].isna().tolist() == is_far.tolist()
    assert brute_force(data_dir, test_table[8])["text"] == "the first"


def test_eval_retrieves_from_the_training_split_of_its_own_data(trained, data_dir, tmp_path):
    """Not from that of the adapter's training. The predictions have the nearest text and, where
    train has the task type, its answer; the scores are over these."""
    _, folder, settings = trained
    tasks = elm.TASKS[:2]
    for split, chosen in (("train", tasks[:1]), ("test", tasks)):
        rows = read_jsonl(rows_path(data_dir, split))
        for i, row in enumerate(rows):
            row["task_type"] = chosen[i % len(chosen)]
            row["text"] += f" {split} {i}"
        write_rows(data_dir, split, rows)
    report = tmp_path / "report"
    result = evaluate(settings, f"data.dir={data_dir}", "eval.samples=40", f"adapter={folder}",
                      f"report_dir={report}")
    predictions = read_jsonl(report / "predictions.jsonl")
    table = read_table(data_dir, "test")
    nearest = []
    for p in predictions:
        vector = table[p["embedding_file_idx"]]
        assert p["text_nearest"] == brute_force(data_dir, vector)["text"]
        if p["task_type"] == tasks[0]:
            nearest.append((p["prediction_nearest"], p["response"]))
            assert p["prediction_nearest"] == brute_force(data_dir, vector, tasks[0])["response"]
        else:
            assert "prediction_nearest" not in p
    assert len(nearest) == 20
    precision, recall, f1, _ = score_pairs(load_scorer(), nearest).mean(0)
    assert result["bertscore_precision_nearest"] == pytest.approx(precision)
    assert result["bertscore_recall_nearest"] == pytest.approx(recall)
    assert result["bertscore_f1_nearest"] == pytest.approx(f1)
    assert result["tasks"][tasks[0]]["bertscore_f1_nearest"] == pytest.approx(f1)
    assert "bertscore_f1_nearest" not in result["tasks"][tasks[1]]
    assert result["rows_nearest"] == 40
    for table, number in ((result, 20), (result["tasks"][tasks[0]], 20),
                          (result["tasks"][tasks[1]], 0)):
        assert table["samples_nearest"] == number
    assert result["samples"] == 40


@pytest.mark.parametrize("missing", [
    "table", "rows", "both", "texts", "rows of the task", "train itself", "width"])
def test_where_no_training_text_is_known_the_nearest_are_left_out(
        trained, data_dir, tmp_path, capsys, missing):
    """Without a word, but for a table of another width, as of another embedder."""
    _, folder, settings = trained
    if missing == "width":
        save_file({"x": torch.randn(10, 8)}, vectors_path(data_dir))
    if missing in ("table", "both"):
        vectors_path(data_dir).unlink()
    if missing in ("rows", "both"):
        rows_path(data_dir).unlink()
    if missing == "texts":
        rows = read_jsonl(rows_path(data_dir))
        write_rows(data_dir, "train", [row | {"text": " "} for row in rows])
    more = []
    if missing == "rows of the task":
        rows = read_jsonl(rows_path(data_dir))
        write_rows(data_dir, "train", [row | {"task_type": "summary"} for row in rows])
        more = ['data.tasks=["keywords", "category", "describe"]']
    if missing == "train itself":
        more = ["eval.split=train"]
    capsys.readouterr()
    report = tmp_path / "report"
    result = evaluate(settings, f"data.dir={data_dir}", f"adapter={folder}", *more,
                      f"report_dir={report}", "eval.bertscore_layers=3")
    out, err = capsys.readouterr()
    assert {key: result[key] for key in result if "nearest" in key} == {
        "rows_nearest": 0, "samples_nearest": 0}
    for p in read_jsonl(report / "predictions.jsonl"):
        assert {"prediction_nearest", "text_nearest"}.isdisjoint(p)
    assert not re.search(r"\bnearest |retrieval", out)
    warnings = [line for line in err.splitlines() if "warning" in line]
    if missing == "width":
        assert warnings == [
            f"elm: warning: {vectors_path(data_dir)}: its vectors are of width 8, those of "
            f"{vectors_path(data_dir, 'test')} of 12: the report leaves out the nearest training "
            "texts"]
    else:
        assert warnings == []
    if missing != "train itself":
        assert "train: " not in out


@pytest.mark.parametrize("other", ["source", "norms"])
def test_any_training_split_of_the_width_is_retrieved_from(trained, data_dir, tmp_path, other):
    """Although a training on it would be refused: of one source, or of norms far from the test's,
    which do not change a cosine."""
    _, folder, settings = trained
    rows = read_jsonl(rows_path(data_dir))
    table = read_table(data_dir)
    if other == "source":
        write_rows(data_dir, "train", [row | {"embedding_file_idx": 0} for row in rows])
    if other == "norms":
        save_file({"x": 1000 * table}, vectors_path(data_dir))
    more = [f"data.dir={data_dir}", f"adapter={folder}"]
    result = evaluate(settings, *more, f"report_dir={tmp_path / 'report'}")
    assert result["rows_nearest"] == result["rows"]
    refusal = "the vectors' norm was" if other == "norms" else "all rows are about one source"
    with pytest.raises(elm.UserError, match=refusal):
        evaluate(settings, *more, "eval.split=train", f"report_dir={tmp_path / 'other'}")


def test_a_broken_line_of_train_ends_an_eval(trained, data_dir, tmp_path):
    """Also beyond the first text, before the LLM is loaded."""
    _, folder, settings = trained
    lines = rows_path(data_dir).read_text().splitlines()
    write_rows(data_dir, "train", [*lines, "{"])
    report = tmp_path / "report"
    with pytest.raises(elm.UserError, match=f"{rows_path(data_dir)}:{len(lines) + 1}: "):
        evaluate(settings, f"data.dir={data_dir}", f"adapter={folder}", f"report_dir={report}")
    assert not report.exists()


def test_measures_of_the_nearest_are_of_the_rows_that_have_it():
    losses = losses_of([0, 0, 1, 2], nll=[1.0, 9.0, 2.0, 0.5], tokens=[1, 5, 2, 1],
                       nll_nearest=[3.0, np.nan, 5.0, 0.25])  # fmt: skip
    result = elm.summarize(losses)
    assert result["rows_nearest"] == 3
    assert result["loss_nearest"] == pytest.approx(8.25 / 4)
    assert result["gain_over_nearest"] == pytest.approx((8.25 - 3.5) / 4)
    low, high = result["intervals"]["gain_over_nearest"]  # by source: 2 / 1, 3 / 2, -.25 / 1
    assert low == pytest.approx(-0.25)
    assert high == pytest.approx(2)


@pytest.mark.parametrize("nll_nearest, surely", [
    ([2.0, 2.5] * 20, None), ([2.0, 0.1] * 20, "surely "), ([1.0] * 40, ""),
    ([0.5] * 39 + [np.nan], ""), (np.nan, None), ([0.5] + [np.nan] * 39, None)])  # fmt: skip
def test_an_adapter_that_does_not_beat_retrieval_is_told_so(
        data_dir, tmp_path, capsys, nll_nearest, surely):
    """Over the rows that have both losses: the last one's of 100 has no part in it. Of a single row
    there is no interval, and nothing is said."""
    losses = losses_of([*range(40)], nll=[1.0] * 39 + [100.0], nll_nearest=nll_nearest)
    if np.isfinite(losses["nll_nearest"]).all():
        losses["nll"] = 1.0
    result = write_report(tmp_path / "report", data_dir, losses)
    out = one_line(capsys.readouterr().out)
    if surely is None:
        assert "beat retrieval" not in out
        assert ("loss_nearest" in result) == losses["nll_nearest"].notna().any()
        return
    nearest = result["loss_nearest"]
    low, high = result["intervals"]["gain_over_nearest"]
    assert low <= 0
    assert (
        f" the adapter does not {surely}beat retrieval: the loss by the text of the nearest "
        f"training vector is {nearest:.4f}, by the row's vector 1.0000 (95 % interval of the "
        f"difference: {low:.4f} to {high:.4f}) gap_closed: ") in out
    assert f" loss_nearest: {nearest:.4f} " in out


# -----------------------------------------------------------------------------
# Scorer and embedder: when they are loaded, what is checked before


@pytest.fixture
def loads(monkeypatch):
    """What is made by its library, in order: (kind of model, kinds that are in memory then)."""
    loads = []
    references = []

    def note(model_class, kind):
        make_one = model_class.__init__

        @functools.wraps(make_one)
        def noted(model, *arguments, **options):
            loads.append((kind, [k for k, model_of in references if model_of() is not None]))
            references.append((kind, weakref.ref(model)))
            make_one(model, *arguments, **options)

        monkeypatch.setattr(model_class, "__init__", noted)

    note(Qwen3ForCausalLM, "LLM")
    note(bert_score.BERTScorer, "scorer")
    note(SentenceTransformer, "embedder")
    return loads


@pytest.fixture
def encoded(monkeypatch):
    """(texts, dtype) of each call of an embedder."""
    encoded = []
    encode = SentenceTransformer.encode

    def noted(model, texts, **options):
        encoded.append((texts, next(model.parameters()).dtype))
        return encode(model, texts, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", noted)
    return encoded


def test_one_model_at_a_time(settings, data_dir, tmp_path, loads, encoded):
    """Before the LLM the embedder alone is loaded, compared with each split, and freed. The scorer
    and the embedder follow at the report, when the LLM is freed."""
    embedder = make_embedder(tmp_path / "embedder", width=12)
    embed_rows(data_dir, embedder, 12)
    encoded.clear()
    loads.clear()
    go(settings, "train.max_steps=1", "model.bf16=true", f"eval.embedder={embedder}")
    assert loads == [("embedder", []), ("LLM", []), ("scorer", []), ("embedder", [])]
    assert {dtype for _, dtype in encoded} == {torch.bfloat16}
    for split, (texts, _) in zip(elm.SPLITS, encoded, strict=False):
        rows = read_jsonl(rows_path(data_dir, split))
        places = [[row["text"] for row in rows].index(text) for text in texts]
        assert len(set(places)) == elm.EMBEDDER_CHECK_TEXTS
        assert places == sorted(places) != list(range(len(places)))  # from all over the split


def open_splits(data_dir: Path, *names: str) -> dict[str, elm.Split]:
    encoder = elm.Encoder(PROMPT, num_soft_tokens=1, max_tokens=256)
    return {name: elm.open_split(str(data_dir), name, elm.TASKS, encoder) for name in names}


def change_table(data_dir: Path, split: str, change, metadata=None) -> None:
    table = change(read_table(data_dir, split))
    save_file({"x": table.contiguous()}, vectors_path(data_dir, split), metadata)


def test_the_embedder_is_compared_with_the_vectors_of_each_split(data_dir, tmp_path, capsys):
    """Of a decoder with mean pooling, stored at 12 of its 40 dimensions. A common offset is warned
    of; a table in another order than its rows is refused, though the vectors of this embedder all
    have cosines above .5 with each other; so is one of another embedder."""
    by_mean = make_embedder(tmp_path / "mean", 40, "mean")
    by_last_token = make_embedder(tmp_path / "last", 40)
    embed_rows(data_dir, by_mean, 12)
    elm.compare_embedder(str(by_mean), False, CPU, open_splits(data_dir, *elm.SPLITS))
    out, err = capsys.readouterr()
    for split in elm.SPLITS:
        assert f"1.0000 with the stored vectors of 32 texts of {split}" in out
    assert "warning" not in err

    change_table(data_dir, "test", lambda table: table + 0.4 * torch.randn(12))
    elm.compare_embedder(str(by_mean), False, CPU, open_splits(data_dir, *elm.SPLITS))
    err = capsys.readouterr().err
    assert err.count("does not make the vectors of") == 1
    assert f"does not make the vectors of {rows_path(data_dir, 'test')}, or some stand" in err

    embed_rows(data_dir, by_mean, 12)

    def exchange_some(table):
        return torch.cat([table[:12].roll(1, dims=0), table[12:]])

    change_table(data_dir, "val", exchange_some)
    elm.compare_embedder(str(by_mean), False, CPU, open_splits(data_dir, *elm.SPLITS))
    err = capsys.readouterr().err
    assert f"{rows_path(data_dir, 'val')}, or some stand in other rows' places" in err
    assert err.count("warning") == 1

    normal = torch.nn.functional.normalize(read_table(data_dir, "train"), dim=1)
    assert (normal @ normal.T).mean() > 0.5
    change_table(data_dir, "train", lambda table: table.roll(1, dims=0))
    message = f"data.dir: {vectors_path(data_dir)} is in another order than the rows of "
    for embedder in (by_mean, by_last_token):
        with pytest.raises(elm.UserError, match=message) as e:
            elm.compare_embedder(str(embedder), False, CPU, open_splits(data_dir, *elm.SPLITS))
        assert f"or eval.embedder = {embedder} did not make it" in str(e.value)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_sorted_table_is_refused_before_the_llm_is_loaded(
        settings, trained, data_dir, tmp_path, loads, command):
    """As an export sorts one. The first rows are where they were."""
    embedder = make_embedder(tmp_path / "embedder", 12)
    embed_rows(data_dir, embedder, 12)
    order = torch.cat([torch.arange(4), 4 + torch.randperm(36)])
    split = {"train": "train", "eval": "test"}[command]
    change_table(data_dir, split, lambda table: table[order])
    loads.clear()
    with pytest.raises(elm.UserError, match=f"{split}_embeddings.* is in another order than"):
        if command == "train":
            go(settings, f"eval.embedder={embedder}")
        else:
            evaluate(settings, f"eval.embedder={embedder}", f"adapter={trained[1]}",
                     f"report_dir={tmp_path / 'report'}")
    assert loads == [("embedder", [])]


def test_one_text_alone_can_be_compared(data_dir, tmp_path, capsys):
    """With no other to be nearer to."""
    embedder = make_embedder(tmp_path / "embedder", 12)
    embed_rows(data_dir, embedder, 12)
    rows = read_jsonl(rows_path(data_dir))
    write_rows(data_dir, "train", [rows[0], *(row | {"text": None} for row in rows[1:])])
    elm.compare_embedder(str(embedder), False, CPU, open_splits(data_dir, "train"))
    assert "1.0000 with the stored vectors of 1 texts of train" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# What a table says of its embedder


def metadata_of(embedder: Path, **options) -> dict[str, str]:
    return {"embed": json.dumps({"model": str(embedder), **options})}


def test_texts_are_embedded_as_the_table_says(trained, data_dir, tmp_path, capsys, encoded):
    """By its instruction, the answers of the report, too; cut after its max_tokens."""
    _, adapter, settings = trained
    embedder = make_embedder(tmp_path / "embedder", 12)
    prompt = "Instruct: Find the answer\nQuery:"
    embed_rows(data_dir, embedder, 12, prompt=prompt)
    said = metadata_of(embedder, instruction="Find the answer", max_tokens=None, batch_size=32)
    for split in elm.SPLITS:
        change_table(data_dir, split, lambda table: table, said)
    elm.compare_embedder(str(embedder), False, CPU, open_splits(data_dir, *elm.SPLITS))
    out, err = capsys.readouterr()
    assert out.count("mean cosine 1.0000") == 3
    assert "warning" not in err

    report = evaluate(settings, f"data.dir={data_dir}", f"eval.embedder={embedder}",
                      f"adapter={adapter}", f"report_dir={tmp_path / 'report'}")
    by_hand = SentenceTransformer(str(embedder), device="cpu")
    predictions = read_jsonl(tmp_path / "report" / "predictions.jsonl")
    references = [prompt + p["response"] for p in predictions]
    vectors = by_hand.encode(references, convert_to_tensor=True)
    source = read_table(data_dir, "test")[[p["embedding_file_idx"] for p in predictions]]
    cosine = torch.nn.functional.cosine_similarity(vectors, source).mean()
    assert report["consistency_reference"] == pytest.approx(float(cosine), abs=1e-5)


def test_texts_are_cut_as_the_table_says(data_dir, tmp_path, capsys):
    """Each table's own limit."""
    embedder = make_embedder(tmp_path / "embedder", 12, "mean")
    embed_rows(data_dir, embedder, 12)
    rows = read_jsonl(rows_path(data_dir))
    model = elm.load_embedder(str(embedder), False, CPU, max_tokens=7)
    cut = 3.4 * elm.embed_texts(model, [row["text"] for row in rows])
    change_table(data_dir, "train", lambda table: cut, metadata_of(embedder, max_tokens=7))
    elm.compare_embedder(str(embedder), False, CPU, open_splits(data_dir, *elm.SPLITS))
    out, err = capsys.readouterr()
    assert out.count("mean cosine 1.0000") == 3
    assert "warning" not in err


def test_a_table_of_another_model_is_told(data_dir, tmp_path, capsys):
    """A folder of the hub's cache, of the same name, is the same model; other programs' metadata
    says nothing, nor does a .npy file."""
    embedder = make_embedder(tmp_path / "embedder", 12)
    embed_rows(data_dir, embedder, 12)
    change_table(data_dir, "train", lambda table: table, metadata_of("Qwen/Qwen3-Embedding-4B"))
    cached = "/cache/models--mine--embedder/snapshots/1f2e"
    change_table(data_dir, "val", lambda table: table, metadata_of(cached))
    change_table(data_dir, "test", lambda table: table, {"embed": "{", "model": "other"})
    elm.compare_embedder(str(embedder), False, CPU, open_splits(data_dir, *elm.SPLITS))
    err = capsys.readouterr().err
    assert err.count("says that") == 1
    message = f"{vectors_path(data_dir)} says that Qwen/Qwen3-Embedding-4B made its vectors"
    assert f"eval.embedder = {embedder}: {message}" in err
    np.save(tmp_path / "x.npy", np.ones((2, 2), np.float32))
    assert elm.table_origin(tmp_path / "x.npy") == elm.VectorOrigin()


def test_the_embedder_belongs_to_the_adapter(data_dir, settings, tmp_path):
    """Training takes it from its tables, and the report embeds answers by it. A table that does not
    say its own is taken to be of the adapter's. "off" does without."""
    embedder = make_embedder(tmp_path / "embedder", 12)
    prompt = "Instruct: Find the answer\nQuery:"
    embed_rows(data_dir, embedder, 12, prompt=prompt)
    told = metadata_of(embedder, instruction="Find the answer", max_tokens=None, batch_size=32)
    change_table(data_dir, "train", lambda table: table, told)
    report, folder = go(settings)
    assert report["consistency_reference"] > 0.5
    _, metadata = elm.Adapter.load(folder)
    origin = {"model": str(embedder), "instruction": "Find the answer"}
    assert metadata["embedder"] == origin
    loaded = elm.ELM.load(folder)
    assert loaded.origin == elm.VectorOrigin(**origin)
    loaded.save(tmp_path / "again.safetensors")
    assert elm.Adapter.load(tmp_path / "again.safetensors")[1]["embedder"] == origin

    again = evaluate(settings, f"adapter={folder}", f"report_dir={tmp_path / 'again'}")
    assert again["consistency"] == pytest.approx(report["consistency"], abs=1e-6)
    without = evaluate(settings, f"adapter={folder}", f"report_dir={tmp_path / 'without'}",
                       "eval.embedder=off")
    assert "consistency" not in without


def test_vectors_from_elsewhere_have_the_embedder_that_the_settings_name(
        data_dir, settings, tmp_path):
    embedder = make_embedder(tmp_path / "embedder", 12)
    embed_rows(data_dir, embedder, 12)
    report, folder = go(settings, f"data.embedder={embedder}")
    assert report["consistency_reference"] > 0.5
    assert elm.Adapter.load(folder)[1]["embedder"] == {"model": str(embedder)}


def test_vectors_of_another_embedder_are_refused_by_name(trained, data_dir, settings, tmp_path):
    """In training, of a split or of data.embedder, and in eval; not the same model in another
    folder."""
    keep = lambda table: table  # noqa: E731
    change_table(data_dir, "train", keep, metadata_of("/models/mpnet/"))
    change_table(data_dir, "val", keep, metadata_of("all/MiniLM"))
    val = vectors_path(data_dir, "val")
    message = f"{val}: its vectors are of all/MiniLM, those of {vectors_path(data_dir)} of "
    off = "eval.embedder=off"
    with pytest.raises(elm.UserError, match=message + "/models/mpnet/; take"):
        go(settings, off)
    change_table(data_dir, "val", keep, metadata_of("all/mpnet"))
    with pytest.raises(elm.UserError, match="of /models/mpnet/, those of data.embedder of e5; "):
        go(settings, off, "data.embedder=e5")
    _, folder = go(settings, off)
    assert elm.Adapter.load(folder)[1]["embedder"] == {"model": "/models/mpnet/"}

    change_table(data_dir, "test", keep, metadata_of("all/MiniLM"))
    with pytest.raises(elm.UserError, match="of all/MiniLM, those of the adapter of /models/mpnet"):
        evaluate(settings, off, f"adapter={folder}", f"report_dir={tmp_path / 'again'}")


def test_known_texts_of_another_embedder_are_left_out(trained, data_dir, tmp_path, capsys):
    _, adapter, settings = trained
    for split, name in (("train", "mpnet"), ("test", "MiniLM")):
        change_table(data_dir, split, lambda table: table, metadata_of(name))
    report = evaluate(settings, "eval.samples=0", f"data.dir={data_dir}", f"adapter={adapter}",
                      f"report_dir={tmp_path / 'again'}")
    assert "loss_nearest" not in report
    assert "train_embeddings.safetensors: its vectors are of mpnet, " in capsys.readouterr().err


def test_what_the_report_lacks_is_told_before_training(settings, data_dir, tmp_path, loads):
    """From the scorer's config alone: no model is loaded."""
    with pytest.raises(elm.UserError, match="eval.bertscore_model: cannot load"):
        go(settings, f"eval.bertscore_model={tmp_path / 'none'}")

    config_alone = tmp_path / "config_alone"
    config_alone.mkdir()
    shutil.copy(Path(SCORER, "config.json"), config_alone)
    message = f"eval.bertscore_layers = 4: {config_alone} has 3 layers"
    with pytest.raises(elm.UserError, match=message):
        go(settings, f"eval.bertscore_model={config_alone}", "eval.bertscore_layers=4")
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(elm.UserError, match="clip: bert-score cannot use a model of type clip: "):
        go(settings, f"eval.bertscore_model={tmp_path / 'clip'}")

    rows = read_jsonl(rows_path(data_dir, "val"))
    write_rows(data_dir, "val", [row | {"embedding_file_idx": 3} for row in rows])
    with pytest.raises(elm.UserError, match="val_synthesis.jsonl: all rows are about one source"):
        go(settings)
    assert loads == []
    assert not (tmp_path / "out").exists()


def test_without_samples_no_scorer_is_needed(settings, tmp_path, loads):
    result, _ = go(settings, f"eval.bertscore_model={tmp_path / 'none'}", "eval.samples=0",
                   "train.max_steps=0")
    assert "loss" in result
    assert "bertscore_f1" not in result
    assert loads == [("LLM", [])]


def test_answers_without_a_scorer(settings, loads):
    """eval.bertscore_model = "off": the other scores of answers stay."""
    with_scorer, _ = go(settings, "train.max_steps=0")
    result, out = go(settings, "train.max_steps=0", "eval.bertscore_model=off",
                     f"output.dir={elm.load_config(None, settings).output.dir}-off")
    assert not [key for key in result if key.startswith("bertscore")]
    for key in ("repetition", "empty_rate_shuffled", "loss", "loss_text", "samples"):
        assert result[key] == with_scorer[key]
    assert read_jsonl(out / "predictions.jsonl")
    assert (out / "report.png").exists()


def save_narrow_adapter(path: Path) -> None:
    settings = dict(d_emb=8, hidden_dim=4, d_llm=32)
    header = json.dumps({"adapter": settings})
    save_file(elm.Adapter(**settings).state_dict(), path, {"elm": header})


def test_bad_input_of_eval(trained, tmp_path):
    """By kind: the place of the report, the adapter, data of another kind, another LLM, an embedder
    of another width. Nothing is written."""
    _, folder, settings = trained
    settings = [setting for setting in settings if not setting.startswith("output.dir=")]
    narrow = tmp_path / "narrow.safetensors"
    save_narrow_adapter(narrow)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    other_llm = make_llm(tmp_path / "llm2", "llama")
    thin = make_embedder(tmp_path / "thin", width=8)
    far = make_data(tmp_path / "far", scale=3.0)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    new = tmp_path / "new"
    for message, *more in (
        ("output.dir: eval writes its report to report_dir=", f"output.dir={new}"),
        ("holds a report or a run already; choose report_dir", f"report_dir={folder}"),
        ("report_dir: .*/foreign.safetensors is a file, not a f", f"report_dir={foreign / 'x'}"),
        ("adapter: there is no file .*nowhere.sa", f"adapter={tmp_path / 'nowhere.safetensors'}"),
        ("adapter: is missing", "adapter=none"),
        ("not a whole elm adapter", f"adapter={foreign}"),
        (r"data.dir: test: \[10, 12\], but the adapter reads \[n, 8\]", f"adapter={narrow}"),
        (r"the vectors' norm was 3\.", f"data.dir={far}"),
        ("llm2: hash of the LLM's weights was .* in training", f"model.llm={other_llm}"),
        ("eval.embedder: .* makes vectors of width 8, not of 12", f"eval.embedder={thin}"),
    ):
        words = [*settings, f"adapter={folder}", f"report_dir={new}", *more]
        refused(message, "eval", NO_TABLES, *words)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not new.exists()


def test_eval_tells_of_another_template_once(trained, llm_dir, tmp_path, capsys):
    _, folder, settings = trained
    other = shutil.copytree(llm_dir, tmp_path / "llm")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant", "<|im_start|>bot"))
    evaluate(settings, f"model.llm={other}", f"adapter={folder}", "eval.samples=0",
             f"report_dir={tmp_path / 'report'}")
    err = capsys.readouterr().err
    assert err.count("its chat template differs from training") == 1


def test_eval_writes_the_log_file(trained, tmp_path):
    """As training does, also where it is called from Python."""
    _, folder, settings = trained
    log_file = tmp_path / "log.txt"
    more = [f"adapter={folder}", f"report_dir={tmp_path / 'report'}", "eval.samples=0",
            f"output.log_file={log_file}"]  # fmt: skip
    elm.evaluate(elm.load_config(None, [*settings, *more], elm.EvalOptions))
    assert "gap_closed: " in log_file.read_text()
