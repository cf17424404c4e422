"""What counts as one source: equal vectors, near-equal ones, vectors of one text. Within a split,
and between train and the others."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CPU,
    NO_TABLES,
    PROMPT,
    build_elm,
    command,
    go,
    make_data,
    open_train,
    read_jsonl,
    read_table,
    rows_path,
    vectors_path,
    write_rows,
)
from naive import naive_ridge
from safetensors.torch import save_file
from test_evaluation import evaluate, make_embedder
from test_fits import states_alone

import elm

NUM_SOURCES = 12
NUM_COPIES = 4
SCALE = 3.4  # the norm of make_data's vectors


def write_copies(folder: Path, noise: float, with_text: bool, embedder: str | None = None) -> Path:
    """Each text of a test split with four rows, each row with a vector of its own, copies of one
    that differ by `noise`; the rows of a text are far apart."""
    make_data(folder)
    rows = read_jsonl(rows_path(folder, "test"))
    texts = [f"{row['text']} {i}" for i, row in enumerate(rows[:NUM_SOURCES])]
    torch.manual_seed(3)
    vectors = torch.randn(NUM_SOURCES, 12)
    if embedder:
        model = elm.load_embedder(embedder, False, CPU)
        vectors = elm.embed_texts(model, texts)
    unit = F.normalize(vectors, dim=1).repeat(NUM_COPIES, 1)
    copies = unit + noise * torch.randn(unit.shape) / unit.shape[1] ** 0.5
    save_file({"x": SCALE * copies}, vectors_path(folder, "test"))
    new_rows = []
    for i in range(len(copies)):
        text = texts[i % NUM_SOURCES] if with_text else None
        new_rows.append(rows[i % len(rows)] | {"embedding_file_idx": i, "text": text})
    write_rows(folder, "test", new_rows)
    return folder


@pytest.mark.parametrize("with_text", [True, False], ids=["text", "no text"])
def test_copies_that_differ_a_little_count_as_equal_ones(trained, tmp_path, with_text):
    """Intervals and ranks are those of the data set whose copies are equal to the byte."""
    _, adapter, settings = trained
    embedder = make_embedder(tmp_path / "embedder", width=12, pooling="mean")
    reports = []
    for name, noise in (("equal", 0.0), ("near", 3e-4)):
        data = write_copies(tmp_path / name, noise, with_text, str(embedder))
        reports.append(evaluate(
            settings, f"data.dir={data}", f"adapter={adapter}", f"eval.embedder={embedder}",
            "eval.samples=24", f"report_dir={tmp_path / name / 'report'}"))
    equal, near = reports
    widths = [high - low for low, high in (r["intervals"]["loss"] for r in reports)]
    assert widths[1] == pytest.approx(widths[0], rel=0.02)
    shuffled = [report["loss_shuffled"] for report in reports]
    assert shuffled[1] == pytest.approx(shuffled[0], rel=1e-2)
    for name in ("mrr", "mrr_shuffled", "mrr_reference", "top1_reference"):
        assert near[name] == equal[name], name


# -----------------------------------------------------------------------------
# Sources


def write_table_of_kinds(folder: Path) -> list[dict]:
    """Twelve vectors: 0 and 1 equal; 2, 3 and 4 a chain of near ones, of which the ends are not
    near; 5 and 6 of one text but for spaces; 7 and 8 of blank texts; 9 unused and equal to 7; 10
    unused and near 8; 11 unused, of no other."""
    torch.manual_seed(0)
    table = F.normalize(torch.randn(12, 40), dim=1)
    table[1] = table[0]
    step = 0.04 * F.normalize(torch.randn(40), dim=0)
    step -= step @ table[2] * table[2]
    table[3] = table[2] + step
    table[4] = table[2] + 2 * step
    table[9] = table[7]
    table[10] = 2 * table[8] + 0.003
    save_file({"x": table}, vectors_path(folder))
    texts = ["a", "b", "c", "d", "e", "same text", "\n same text ", " ", " "]
    rows = read_jsonl(rows_path(folder))[: len(texts)]
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        row |= {"embedding_file_idx": i, "text": text}
    write_rows(folder, "train", rows)
    return rows


def naive_sources(table: torch.Tensor, pairs: list) -> list[int]:
    """The first vector of each one's source; pairs have one text; all cosines are computed."""
    cosines = F.cosine_similarity(table[:, None].double(), table[None].double(), dim=2)
    is_linked = cosines > 0.999
    for a, b in pairs:
        is_linked[a, b] = is_linked[b, a] = True
    for k in range(len(table)):  # transitive closure (Warshall, 1962)
        is_linked |= is_linked[:, k, None] & is_linked[k]
    return [int(row.nonzero()[0]) for row in is_linked]


def test_sources_are_those_of_brute_force(data_dir):
    write_table_of_kinds(data_dir)
    split = open_train(data_dir, PROMPT)
    expected = naive_sources(split.vectors, [(5, 6)])
    assert expected == [0, 0, 2, 2, 2, 5, 5, 7, 8, 7, 8, 11]
    assert split.index["source_id"].tolist() == expected[:9]
    assert split.sources.tolist() == sorted(set(expected))
    assert split.index["vector_id"].tolist() == list(range(9))  # rows keep their own
    assert split.index["has_text"].tolist() == [True] * 7 + [False] * 2


@pytest.mark.parametrize("limit, near", [(12, True), (11, True), (9, True), (8, False)])
def test_of_many_vectors_only_equal_ones_and_texts_count(data_dir, monkeypatch, limit, near):
    """Up to the limit all are compared; beyond it the nine that rows use, if those are not too
    many."""
    assert elm.MAX_COMPARED_VECTORS == 20_000
    write_table_of_kinds(data_dir)
    monkeypatch.setattr(elm, "MAX_COMPARED_VECTORS", limit)
    split = open_train(data_dir, PROMPT)
    chain = [2, 2, 2] if near else [2, 3, 4]
    assert split.index["source_id"].tolist() == [0, 0, *chain, 5, 5, 7, 8]
    assert (10 in split.sources) == (limit < 12)


def test_many_copies_in_any_order(data_dir, monkeypatch):
    """3,000 vectors of 40 sources, and texts that join some of those."""
    rng = np.random.default_rng(0)
    centres = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    source_of = rng.integers(0, 40, 3000)
    noise = 1e-3 * torch.randn(3000, 16, generator=torch.Generator().manual_seed(1))
    save_file({"x": centres[source_of] + noise}, vectors_path(data_dir))
    row = read_jsonl(rows_path(data_dir))[0]
    text_of = [f"text {source // 2}" for source in source_of]  # of two sources each
    rows = [row | {"embedding_file_idx": i, "text": text_of[i]} for i in range(3000)]
    write_rows(data_dir, "train", rows)
    split = open_train(data_dir, PROMPT)
    _, first, inverse = np.unique(source_of // 2, return_index=True, return_inverse=True)
    assert split.index["source_id"].tolist() == first[inverse].tolist()


def test_groups_that_merge_in_a_long_chain():
    group = np.arange(5000)
    order = np.random.default_rng(0).permutation(5000)
    elm.merge_groups(group, order[:-1], order[1:])
    assert not group.any()


def test_rows_of_one_text_alone_are_refused(settings, data_dir):
    rows = [row | {"text": "the same"} for row in read_jsonl(rows_path(data_dir, "val"))]
    write_rows(data_dir, "val", rows)
    with pytest.raises(elm.UserError, match="val_synthesis.jsonl: all rows are about one source"):
        go(settings)


def test_every_row_gets_another_source_when_shuffled(data_dir):
    write_table_of_kinds(data_dir)
    split = open_train(data_dir, PROMPT)
    own = split.index["source_id"]
    other = naive_sources(split.vectors, [(5, 6)])
    other = np.array(other)[elm.shuffled_vectors(split)]
    assert (other != own).all()
    assert len(set(zip(own.tolist(), other.tolist(), strict=True))) == len(set(own.tolist()))


def test_every_tenth_source_is_held_out(llm_dir, tmp_path):
    """Of a probe; the rows of a source are all fitted or all held out."""
    folder = write_copies(tmp_path / "data", 3e-4, with_text=False)
    for path in (vectors_path, rows_path):
        shutil.copy(path(folder, "test"), path(folder, "train"))
    split = open_train(folder, PROMPT)
    model = build_elm(llm_dir, split)
    probe = elm.fit_probe(model, split)
    x = states_alone(model, split).double()
    embeddings = split.embeddings(split.index["vector_id"])
    y = ((embeddings - model.adapter.mean) / model.adapter.std).double()
    heldout = torch.arange(len(x)) % NUM_SOURCES == 9
    fit, _ = naive_ridge(x, y, heldout)
    assert torch.allclose(probe.hidden_mean.double(), fit.x_mean, atol=1e-5)
    assert (probe.matrix - fit.weights).norm() < 1e-4 * fit.weights.norm()


def test_the_warm_start_is_that_of_one_vector_a_source(llm_dir, tmp_path):
    folder = write_copies(tmp_path / "data", 0.0, with_text=True)
    for path in (vectors_path, rows_path):
        shutil.copy(path(folder, "test"), path(folder, "train"))
    adapters = []
    for num_vectors in (NUM_SOURCES * NUM_COPIES, NUM_SOURCES):
        write_rows(folder, "train", read_jsonl(rows_path(folder))[:num_vectors])
        split = open_train(folder, PROMPT)
        model = build_elm(llm_dir, split)
        elm.warm_start(model, split)
        adapters.append(model.adapter.state_dict())
    for name, value in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], value, rtol=1e-3, atol=1e-4)


# -----------------------------------------------------------------------------
# Ranks


def test_each_other_source_outranks_once_and_the_own_one_never(data_dir, monkeypatch):
    """By brute force. The text is spoken with the row's own vector, not its source's first; beyond
    the limit of compared vectors, too, no near copy of it outranks it."""
    rows = write_table_of_kinds(data_dir)
    torch.manual_seed(1)
    spoken = F.normalize(read_table(data_dir)[:9] + 0.2 * torch.randn(9, 40), dim=1)
    spoken[4] = F.normalize(read_table(data_dir)[3] + 0.1 * read_table(data_dir)[0], dim=0)
    spoken[8] = F.normalize(read_table(data_dir)[10], dim=0)  # the unused near copy
    texts = [str(i) for i in range(len(rows))]
    texts[6] = " "

    def embed(texts):
        return spoken[[int(text) for text in texts]]

    def scores_of(split):
        return np.stack(elm.consistency_scores(texts, embed, split, np.arange(9)), axis=1)

    split = open_train(data_dir, PROMPT)
    table = F.normalize(split.vectors, dim=1)
    sources = np.array(naive_sources(split.vectors, [(5, 6)]))
    found = scores_of(split)
    for i in range(9):
        if not texts[i].strip():
            assert not found[i].any()
            continue
        own = float(spoken[i] @ table[i])
        rivals = sorted(set(sources.tolist()) - {int(sources[i])})
        rank = 1 + sum(float(spoken[i] @ table[source]) > own for source in rivals)
        assert found[i] == pytest.approx([own, 1 / rank, float(rank == 1)], abs=1e-6)
    assert found[8][2] == 1
    monkeypatch.setattr(elm, "MAX_COMPARED_VECTORS", 0)
    assert scores_of(open_train(data_dir, PROMPT))[8] == pytest.approx(found[8])


def test_vectors_that_no_row_uses_may_be_anything(trained, tmp_path):
    """The report is that without them, to the digit. The command for more answers that it names is
    about a vector of a row."""
    _, adapter, settings = trained
    embedder = make_embedder(tmp_path / "embedder", width=12)
    data = make_data(tmp_path / "data")
    unused = torch.tensor([0.0, torch.nan, torch.inf])[:, None].expand(3, 12)
    reports = []
    for num_unused in (0, 3):
        for split in elm.SPLITS:
            table = torch.cat([unused[:num_unused], read_table(data, split)])
            save_file({"x": table}, vectors_path(data, split))
            rows = read_jsonl(rows_path(data, split))
            for row in rows:
                row["embedding_file_idx"] += num_unused
                row["text"] = None  # the embedder did not make these vectors
            write_rows(data, split, rows)
        reports.append(evaluate(
            settings, f"data.dir={data}", f"adapter={adapter}", f"eval.embedder={embedder}",
            f"report_dir={tmp_path / str(num_unused)}"))
    assert reports[0] == reports[1]
    assert not np.isnan(reports[1]["mrr"])
    said = command(NO_TABLES, *settings, f"data.dir={data}", f"output.dir={tmp_path / 'run'}",
                   "train.max_steps=0")[1]  # fmt: skip
    words = shlex.split(re.split(r"next: +python elm.py", said)[1])
    code, answers = command(*words)
    assert code == 0
    assert '"row": ' in answers


# -----------------------------------------------------------------------------
# Between splits


def test_the_nearest_vector_is_that_of_brute_force():
    """Over several blocks, among some of the vectors; scales do not matter."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20_000, 6, generator=generator) * torch.rand(20_000, 1)
    queries = torch.randn(50, 6, generator=generator).half()
    vector_ids = np.flatnonzero(np.random.default_rng(0).random(20_000) < 0.8)
    first_rows = np.random.default_rng(1).permutation(100_000)[: len(vector_ids)]
    found = elm.nearest_vectors(queries, vectors, vector_ids, first_rows, CPU)
    table = F.normalize(vectors[vector_ids].double(), dim=1)
    cosines = F.normalize(queries.double(), dim=1) @ table.T
    assert found.row_ids.tolist() == first_rows[cosines.argmax(1)].tolist()
    np.testing.assert_allclose(found.cosines, cosines.max(1).values, atol=1e-6)


def test_of_equally_near_vectors_the_one_of_the_first_row_is_taken():
    """Also where the table is read in several blocks, whose order is not that of the rows. By
    vectors of which a cosine is exactly 0 or 1."""
    rng = np.random.default_rng(0)
    axis_of_vector = rng.integers(0, 8, 5000)
    vectors = 2 * torch.eye(8)[axis_of_vector]
    vector_ids = np.flatnonzero(rng.random(5000) < 0.9)
    first_rows = rng.permutation(100_000)[: len(vector_ids)]
    nearest = elm.nearest_vectors(torch.eye(8), vectors, vector_ids, first_rows, CPU)
    for axis in range(8):
        assert nearest.row_ids[axis] == first_rows[axis_of_vector[vector_ids] == axis].min()
    assert nearest.cosines.tolist() == [1.0] * 8


def told_of_trained_texts(said: str) -> list[tuple]:
    """(split, vectors, of, texts, of) of each warning."""
    pattern = (r"(\w+): (\d+) of (\d+) compared vectors have one of train at a cosine above 0.999, "
               r"(\d+) of (\d+) texts are in train")
    return re.findall(pattern, said)


def test_rows_split_at_random_are_warned_of(settings, data_dir, capsys):
    """test has three of train's vectors, one of which no training row uses, and val one of its
    texts."""
    more = ["train.max_steps=0", "eval.samples=0"]
    go(settings, *more)
    assert not told_of_trained_texts(capsys.readouterr().err)

    rows = read_jsonl(rows_path(data_dir))
    for i, row in enumerate(rows):
        row["embedding_file_idx"] = i % 9
    write_rows(data_dir, "train", rows)
    table = read_table(data_dir, "test")
    table[4:6] = 2 * read_table(data_dir)[:2] + 1e-4
    table[6] = read_table(data_dir)[9]
    save_file({"x": table}, vectors_path(data_dir, "test"))
    test_rows = read_jsonl(rows_path(data_dir, "test"))
    for i, row in enumerate(test_rows):
        row["embedding_file_idx"] = i % 8
    write_rows(data_dir, "test", test_rows)
    val_rows = read_jsonl(rows_path(data_dir, "val"))
    val_rows[5]["text"] = f" {rows[0]['text']}\n"
    write_rows(data_dir, "val", val_rows)
    go(settings, *more, "output.dir=" + str(data_dir / "out"))
    num_used = len({row["embedding_file_idx"] for row in val_rows})
    said = capsys.readouterr().err
    assert told_of_trained_texts(said) == [
        ("val", "0", str(num_used), "1", "40"), ("test", "2", "8", "0", "40")]
    assert "`group`" in said


def test_of_many_vectors_some_are_compared(settings, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(elm, "MAX_COMPARED_WITH_TRAIN", 4)
    for path in (vectors_path, rows_path):
        shutil.copy(path(data_dir), path(data_dir, "test"))
    go(settings, "train.max_steps=0", "eval.samples=0")
    num_texts = str(len({row["text"] for row in read_jsonl(rows_path(data_dir))}))
    told = told_of_trained_texts(capsys.readouterr().err)
    assert told == [("test", "4", "4", num_texts, num_texts)]


def test_a_sweep_says_it_once(settings, data_dir, tmp_path, capsys):
    for path in (vectors_path, rows_path):
        shutil.copy(path(data_dir), path(data_dir, "val"))
    base = elm.parse_overrides(settings) | {"config": "/dev/null", "train.max_steps": 1}
    del base["output.dir"]
    tables = {"study.trials": 2, "space.train.lr": [1e-3, 1e-2], "base": base,
              "output.dir": str(tmp_path / "sweep")}
    path = tmp_path / "sweep.toml"
    path.write_text("".join(f"{key} = {elm.toml_value(v)}\n" for key, v in tables.items()))
    assert elm.main(["sweep", str(path), "base.train.batch_size=100"]) == 0
    err = capsys.readouterr().err
    assert len(told_of_trained_texts(err)) == 1
    assert err.count("a step of 100 rows takes more than all 40") == 1
    assert len(read_jsonl(tmp_path / "sweep" / "trials.jsonl")) == 2
