"""The sweep: real Optuna storages, several workers, kills."""

import gc
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bert_score
import matplotlib.image
import numpy as np
import optuna
import pytest
from conftest import (
    NO_TABLES,
    ROOT,
    command,
    read_jsonl,
    refused,
    rows_path,
    vectors_path,
    write_rows,
)
from torture import until
from transformers import AutoModelForCausalLM

import elm

SPACE = {
    "train": {"lr": dict(low=1e-4, high=1e-1, log=True), "batch_size": dict(low=8, high=16)},
    "model": {"hidden_dim": [8, 16], "grad_checkpoint": [True, False]},
    "loss.drift_weight": dict(low=0.0, high=0.1),
}


@pytest.fixture(autouse=True)
def frozen_imports():
    """Each trial ends with a collection of garbage, which need not look at what is imported: it
    takes 0.6 seconds with it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def sweep_file(settings, out, tmp_path):
    """A sweep over runs of six steps, each in a quarter of a second."""
    base = elm.parse_overrides(settings) | {"config": NO_TABLES}
    del base["output.dir"]
    tables = dict(
        study=dict(name="small", trials=4), space=SPACE, base=base, output=dict(dir=str(out)))
    path = tmp_path / "sweep.toml"
    lines = [f"{key} = {elm.toml_value(table)}\n" for key, table in tables.items()]
    path.write_text("".join(lines))
    return path


def load_sweep(sweep_file, *more) -> elm.SweepConfig:
    return elm.load_sweep(str(sweep_file), more)


def load_trials(out: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{out}/study.db?timeout=60"
    return optuna.load_study(study_name="small", storage=storage).trials


def states(trials) -> list[str]:
    return [trial.state.name for trial in trials]


# -----------------------------------------------------------------------------
# The sweep file


def test_overrides_win_over_any_spelling_and_floats_stay_floats(sweep_file):
    """Keys of the file may be quoted; numbers without a point are floats where the key is one."""
    sweep = load_sweep(sweep_file, 'base."train.lr"=0.5', "base.train.lr=0.25",
                       "space.model.residual_scale={low=0, high=2}")
    assert elm.trial_config(sweep, {}, "any").train.lr == 0.25
    assert sweep.study.trials == 4
    trial = optuna.create_study().ask()
    for key, spec in sweep.space.items():
        elm.suggest(trial, key, spec)
    kinds = {key: type(value) for key, value in trial.params.items()}
    assert kinds == {
        "train.lr": float, "model.hidden_dim": int, "model.grad_checkpoint": bool,
        "train.batch_size": int, "loss.drift_weight": float, "model.residual_scale": float}


def test_a_trial_reports_on_the_validation_split_in_a_folder_of_its_own(sweep_file, out):
    cfg = elm.trial_config(load_sweep(sweep_file), {"train.lr": 0.5}, "trial_7")
    assert cfg.eval.split == "val"
    assert cfg.output.dir == f"{out}/trial_7"
    assert cfg.wandb.run_name == "trial_7"
    assert cfg.train.lr == 0.5


def test_metrics_are_figures_of_reports(trained):
    """Each figure of a report is one, or that of a baseline or of the data."""
    (report, *_) = trained  # without an embedder, and of an LLM that reads no texts
    figures = {"gap_closed", "gain_over_nearest", *elm.ConsistencyScores._fields}
    for name, value in report.items():
        is_of_others = re.search("_(shuffled|nearest|text)$", name)
        if isinstance(value, float) and not is_of_others:
            figures.add(name)
    assert figures == set(elm.METRICS)
    assert set(elm.MINIMIZED_METRICS) < set(elm.METRICS)


def test_bad_input_of_sweep(sweep_file, out, monkeypatch):
    """By kind: settings of the space, the training beneath, the storage, another launcher. Nothing
    is trained, and no password is shown."""
    for message, *more in (
        ("space.train.lrr = .*unknown key, did you mean", "space.train.lrr={low=1.0, high=2.0}"),
        ("space.train.lr = .*low <= high", "space.train.lr={low=2.0, high=1.0}"),
        ("space.train.lr = .*lg", "space.train.lr={low=1.0, high=2.0, lg=true}"),
        ("space.train.lr = .*: must be choices in a list, or", "space.train.lr={low=1.0}"),
        ("^elm: train.max_steps: unknown key, did you mean base.train.max_steps.$",
         "train.max_steps=40"),
        ("^elm: train.seed: unknown key, did you mean base.train.seed.$", "train.seed=1"),
        ("^elm: lr: unknown key, did you mean base.train.lr.$", "lr=1.0"),
        ("^elm: trials: unknown key, did you mean study.trials.$", "trials=3"),
        (f"base.config: {sweep_file} is the file of a sweep; give a training's",
         f"base.config={sweep_file}"),
        (f"output.dir: {sweep_file} is a file, not a folder", f"output.dir={sweep_file}"),
        ("train.lr = 0.0: Input should be", "space.train.lr={low=0.0, high=1.0, log=true}"),
        ("train.batch_size = 'a': Input should be", "space.train.batch_size=['a', 4]"),
        ("must be choices in a list, or {low, high}", "space.train.batch_size=4"),
        ("space.data.tasks = .*must be choices", "space.data.tasks=[['summary']]"),
        ("space.train.seed = .*is set by the sweep itself", "space.train.seed={low=1, high=2}"),
        ("base = 3: must be a table", "base=3"),
        ("study.repeat_best: unknown key", "study.repeat_best=2"),
        ("bertscore_composite: needs eval.samples above 0; gap_closed needs none",
         "base.eval.samples=0"),
        ("bertscore_composite: needs a scorer, and eval.bertscore_model is off; gap_closed needs",
         "base.eval.bertscore_model=off"),
        ("study.metric: gap_close is none of loss, gap, .*, did you mean gap_closed.$",
         "study.metric=gap_close"),
        ("study.metric: loss_text is none of loss, gap, .*", "study.metric=loss_text"),
        ("study.metric = mrr: needs the model that made the vectors; .* base.eval.embedder",
         "study.metric=mrr"),
        ("^elm: base.config: there is no file nowhere.toml here", "base.config=nowhere.toml"),
        ("data.dir: there is no file .*train_embeddings.safetensors", "base.data.dir=/nowhere"),
        ("eval.bertscore_layers = 9", "base.eval.bertscore_layers=9"),
        ("open 127.0.0.1:1/x .study.storage=URL names another", "study.storage=postgresql+psycopg://u:secret@127.0.0.1:1/x"),
        ("cannot open .*h:1/x", "study.storage=postgresql://h:1/x?password=secret"),
        ("study.storage: cannot open h/x", "study.storage=mysql://u:sec/secret@h/x"),
        ("cannot open /nowhere/study.log", "study.storage=/nowhere/study.log"),
    ):
        assert "secret" not in refused(message, "sweep", sweep_file, *more)
    train_toml = ROOT / "train.toml"
    refused(f"^elm: {train_toml}: has no .space., so it is no file of a sweep", "sweep", train_toml)
    several = ["space.train.lrr=[1]", "space.model.dropout=[2.0]"]
    code, said = command("sweep", sweep_file, *several)
    assert code == 2
    assert "space.train.lrr" in said
    assert "space.model.dropout" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("a worker is one process", "sweep", sweep_file)
    assert not list(out.glob("trial*"))


def test_metrics_of_texts_need_texts(sweep_file, out, data_dir):
    for split, metric in (("val", "gap_closed"), ("train", "gain_over_nearest")):
        rows = read_jsonl(rows_path(data_dir, split))
        write_rows(data_dir, split, [row | {"text": None} for row in rows])
        refused(f"study.metric = {metric}: no row of {rows_path(data_dir, split)} has a text; take "
                "loss", "sweep", sweep_file, f"study.metric={metric}")
    assert not list(out.glob("trial*"))


def test_a_study_keeps_its_settings(sweep_file, out):
    """The same name with other settings, or another study in the same folder, is refused."""
    elm.open_study(load_sweep(sweep_file))
    elm.open_study(load_sweep(sweep_file, "study.trials=9", "wandb.project=other"))
    for more in ("space.model.hidden_dim=[8]", "base.train.weight_decay=0.5", "study.metric=loss"):
        key = more.partition("=")[0]
        refused(f"small exists with another {key};", "sweep", sweep_file, more)
    (out / "trial_0").mkdir()
    refused("holds trials of another study", "sweep", sweep_file, "study.name=other")


# -----------------------------------------------------------------------------
# Samplers


def suggest_all(sweep: elm.SweepConfig, study: optuna.Study) -> dict:
    """The parameters of a next trial, whose value falls with the rate."""
    trial = study.ask()
    for key, spec in sweep.space.items():
        elm.suggest(trial, key, spec)
    study.tell(trial, 1 - trial.params["train.lr"])
    return trial.params


@pytest.mark.filterwarnings("ignore:Heartbeat")  # of trials by hand
def test_a_seed_repeats_the_trials_of_a_worker(sweep_file, tmp_path):
    """Four trials, of which the first two are drawn at random."""
    runs = []
    for name in ("a", "b"):
        sweep = load_sweep(sweep_file, f"output.dir={tmp_path / name}")
        study = elm.open_study(sweep)
        runs.append([suggest_all(sweep, study) for _ in range(4)])
    assert runs[0] == runs[1]
    for params in runs[0]:
        assert 1e-4 <= params["train.lr"] <= 0.1
        assert type(params["train.batch_size"]) is int
        assert params["model.hidden_dim"] in (8, 16)
        assert 0 <= params["loss.drift_weight"] <= 0.1
    assert len({str(params) for params in runs[0]}) == 4


@pytest.mark.filterwarnings("ignore:Heartbeat")  # of trials by hand
def test_workers_get_different_samplers(sweep_file):
    sweep = load_sweep(sweep_file)
    studies = [elm.open_study(sweep) for _ in range(3)]
    rates = [suggest_all(sweep, study)["train.lr"] for study in studies]
    assert len(set(rates)) == 3


# -----------------------------------------------------------------------------
# One worker


def test_what_a_sweep_leaves(sweep_file, out, capsys, monkeypatch):
    """Two trials on one LLM and one scorer."""
    loaded = []
    load_llm = AutoModelForCausalLM.from_pretrained
    make_scorer = bert_score.BERTScorer.__init__

    def note_llm(*arguments, **options):
        loaded.append("LLM")
        return load_llm(*arguments, **options)

    def note_scorer(*arguments, **options):
        loaded.append("scorer")
        make_scorer(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", note_llm)
        patch.setattr(bert_score.BERTScorer, "__init__", note_scorer)
        assert elm.main(["sweep", str(sweep_file), "study.trials=2"]) == 0
    assert sorted(loaded) == ["LLM", "scorer"]

    rows = read_jsonl(out / "trials.jsonl")
    assert [row["number"] for row in rows] == [0, 1]
    for row in rows:
        assert list(row) == ["number", "state", "value", "params", "seconds", "reason"]
        assert row["state"] == "complete"
        assert row["reason"] is None
        assert 0 < row["value"] < 1
        assert row["seconds"] > 0
    values = [row["value"] for row in rows]
    best = values.index(max(values))
    said = capsys.readouterr().out
    metric = "bertscore_composite"
    assert f"small: 2 trials, to maximize {metric} on val\n" in said
    for i, told in enumerate((r"1 of 2 done, 1 left, about \d\d:\d\d", "2 of 2 done, 0 left")):
        assert re.search(f"trial {i}: {metric} {values[i]:.4f}; {told}\n", said)
    settings = " ".join(said.rpartition(" done, ")[2].split("\n", 1)[1].split())
    assert settings.startswith(f"best {metric} {values[best]:.4f}, trial {best}: train.lr=")
    assert f" train.batch_size={rows[best]['params']['train.batch_size']} " in settings
    assert max(len(line) for line in said.split("next", 1)[0].splitlines()) <= 80
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for trial in load_trials(out):  # pruning has measured numbers to go by
        assert sorted(trial.intermediate_values) == [1, 2]
        assert all(0 <= value < 1 for value in trial.intermediate_values.values())
    assert not list(out.glob("trial_*/*.pt"))

    title = f"# trial {best} of small: {metric} {values[best]!r} on the validation split\n"
    assert (out / "best.toml").read_text().startswith(title)


def test_best_toml_and_going_on(sweep_file, out, capsys):
    """best.toml is a training that reports on test; on the validation split it gives the value
    again. Started again, nothing is left to do."""
    best_toml = str(out / "best.toml")
    next_command = f"next, to train the best and report on test: python elm.py {best_toml}\n"
    more = ["study.metric=bertscore_f1", "study.trials=1"]
    assert elm.main(["sweep", str(sweep_file), *more]) == 0
    assert capsys.readouterr().out.endswith(next_command)
    before = (out / "trials.jsonl").read_bytes()
    (row,) = read_jsonl(out / "trials.jsonl")

    assert elm.main([best_toml]) == 0
    assert json.loads((out / "best" / "eval.json").read_bytes())["split"] == "test"
    on_val = ["eval.split=val", "train.resume=auto"]
    report = elm.train(elm.load_config(best_toml, on_val))
    assert report["bertscore_f1"] == pytest.approx(row["value"], rel=1e-12)

    capsys.readouterr()
    assert elm.main(["sweep", str(sweep_file), *more]) == 0
    assert (out / "trials.jsonl").read_bytes() == before
    said = capsys.readouterr().out
    assert "1 of 1 done, 0 left\n" in said
    assert said.endswith(next_command)


@pytest.fixture
def tiny_data(tmp_path):
    """The first rows of the embedded data, whose LLM reads texts."""
    tiny = ROOT / "data/tiny"
    folder = tmp_path / "tiny"
    shutil.copytree(tiny / "embeddings", folder / "embeddings")
    (folder / "synthesis").mkdir()
    for split, num_rows in (("train", 64), ("val", 32)):
        write_rows(folder, split, read_jsonl(rows_path(tiny, split))[:num_rows])
    vectors_path(folder, "test").unlink()
    return folder


METRICS_TRIED = ("loss", "gap", "gap_closed", "gain_over_nearest", "repetition", "mrr")


def test_the_value_of_a_trial_is_that_of_the_report(tiny_data, tmp_path, monkeypatch):
    """By one metric of each kind; none of these asks for the scorer. Minimised ones have their
    direction."""
    monkeypatch.chdir(ROOT)  # train.toml's paths are relative
    base = {
        "config": "train.toml", "data.dir": str(tiny_data), "train.max_steps": 4,
        "train.batch_size": 16, "train.warmup_steps": 0, "eval.samples": 8,
        "eval.max_new_tokens": 12}
    tables = {"space.train.lr": [4e-3], "study": {"trials": 1, "name": "small"}, "base": base}
    path = tmp_path / "sweep.toml"
    path.write_text("".join(f"{key} = {elm.toml_value(t)}\n" for key, t in tables.items()))
    values = {}
    for metric in METRICS_TRIED:
        folder = tmp_path / metric
        more = [f"study.metric={metric}", f"output.dir={folder}"]
        if metric in elm.LOSS_METRICS:
            more += ["base.eval.samples=0", "base.eval.bertscore_model=/nowhere"]
        elif metric == "repetition":
            more += ["base.eval.bertscore_model=/nowhere"]
        code, said = command("sweep", path, *more)
        assert code == 0, said
        (row,) = read_jsonl(folder / "trials.jsonl")
        values[metric] = row["value"]
        direction = "minimize" if metric in ("loss", "repetition") else "maximize"
        assert f"1 trials, to {direction} {metric} on val" in said
        assert "report on val: python elm.py" in said  # there is no test
        assert "BERTScore" not in said
        measured = read_jsonl(folder / "trial_0" / "metrics.jsonl")
        quarters = [entry["step"] for entry in measured if f"val_{metric}" in entry]
        assert [step for step in quarters if 0 < step < 4] == [1, 2, 3]
    report = elm.train(elm.load_config(str(folder / "best.toml"), ["eval.split=val"]))
    expected = {metric: report[metric] for metric in METRICS_TRIED}
    assert values == pytest.approx(expected, rel=1e-12)
    assert values["gap_closed"] > 0.1


def test_a_trial_without_the_metric_says_why(sweep_file, out):
    """A random LLM reads no text."""
    said = refused("no trial was completed", "sweep", sweep_file, "study.metric=gap_closed",
                   "study.trials=1")
    assert re.search("trial 0 failed: no gap_closed: .* no better than other rows' vectors; take "
                     "study.metric=loss; 1 of 1 done, 0 left; no gap_closed yet", said)


def make_study(values, direction: str = "maximize") -> optuna.Study:
    """Complete trials of a rate that makes the value, and of a width that does not."""
    study = optuna.create_study(direction=direction, study_name="small")
    space = {
        "train.lr": optuna.distributions.FloatDistribution(0, 1),
        "model.hidden_dim": optuna.distributions.CategoricalDistribution([8, 16])}
    for value, width in zip(values, itertools.cycle([8, 16])):
        params = {"train.lr": value, "model.hidden_dim": width}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=space, value=value))
    return study


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Optuna, of few trials
def test_importances_are_shown_where_there_are_any():
    for values in ([], [0.5], [0.5] * 12):
        assert elm.find_importances(make_study(values)) == {}
    importances = elm.find_importances(make_study(np.linspace(0, 1, 20).tolist()))
    assert list(importances) == ["train.lr", "model.hidden_dim"]
    assert importances["train.lr"] > 0.8
    assert sum(importances.values()) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_picture_fills_its_canvas(tmp_path):
    """Nothing but a margin is white on any side; the importances have a half of their own."""
    path = tmp_path / "sweep.png"
    widths = []
    for values in ([0.5, 0.5], np.linspace(0, 1, 20).tolist()):
        elm.plot_sweep(path, make_study(values, "minimize"), "loss")
        picture = matplotlib.image.imread(path)
        height, width = picture.shape[:2]
        drawn_y, drawn_x = np.nonzero((picture[:, :, :3] < 0.9).any(2))
        assert drawn_x.min() < 0.05 * width and drawn_x.max() > 0.95 * width
        assert drawn_y.min() < 0.05 * height and drawn_y.max() > 0.95 * height
        widths.append(width)
    assert widths[1] == 2 * widths[0]


def test_a_picture_never_ends_a_sweep(sweep_file, out, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert elm.main(["sweep", str(sweep_file), "study.trials=1"]) == 0
    assert re.search("warning: sweep.png is left out: .*No space left", capsys.readouterr().err)
    assert {"trials.jsonl", "best.toml"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
def test_more_trials_are_added_to_those_there_are(sweep_file, out):
    """Each gives its value again as a training, whatever the trials before it did to the LLM that
    they shared."""
    for trials in (2, 4):
        assert elm.main(["sweep", str(sweep_file), f"study.trials={trials}"]) == 0
        rows = read_jsonl(out / "trials.jsonl")
        assert len(rows) == trials
    sweep = load_sweep(sweep_file)
    for row in rows:
        settings = row["params"] | {"train.eval_steps": 2}
        report = elm.train(elm.trial_config(sweep, settings, f"again_{row['number']}"))
        assert report["bertscore_composite"] == pytest.approx(row["value"], rel=1e-12)


def enqueue_rates(sweep: elm.SweepConfig, rates: list[float]) -> None:
    """Let the next trials have these rates."""
    study = elm.open_study(sweep)
    for rate in rates:
        study.enqueue_trial({"train.lr": rate})


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(sweep_file, out):
    more = ['space={"train.lr" = [1e-3, 1e38]}', "study.trials=2"]
    enqueue_rates(load_sweep(sweep_file, *more), [1e38, 1e-3])
    code, said = command("sweep", sweep_file, *more)
    assert code == 0
    assert re.search(r"trial 0 failed: step \d: the loss or its gradient is not finite", said)
    failed, complete = read_jsonl(out / "trials.jsonl")
    assert failed["state"] == "fail"
    assert failed["value"] is None
    assert "not finite" in failed["reason"]
    assert complete["state"] == "complete"
    assert elm.load_config(str(out / "best.toml")).train.lr == 1e-3


def test_a_sweep_whose_every_trial_fails_says_so(sweep_file, out):
    """As soon as its settings are read: 6.5 rows are no batch."""
    more = ["space={train.batch_size={low=4, high=9, step=2.5}}", "study.trials=2"]
    said = refused("no trial was completed", "sweep", sweep_file, *more)
    assert said.count("failed: train.batch_size = ") == 2
    assert [row["state"] for row in read_jsonl(out / "trials.jsonl")] == ["fail"] * 2
    assert not (out / "best.toml").exists()


def test_after_the_timeout_no_trial_is_begun(sweep_file, out):
    more = ["study.timeout_hours=1e-5", "study.trials=1000"]  # 0.036 seconds
    assert elm.main(["sweep", str(sweep_file), *more]) == 0
    assert [row["state"] for row in read_jsonl(out / "trials.jsonl")] == ["complete"]


class ScoredByRate(elm.SweepWorker):
    """Its scores fall with the rate of the trial, or rise with it where less is better."""

    def run_trial(self, trial):
        self.trial = trial
        return super().run_trial(trial)

    def score_answers(self, model, split, cfg):
        rate = self.trial.params["train.lr"]
        return rate if self.metric in elm.MINIMIZED_METRICS else 1 - rate


@pytest.mark.parametrize("metric", ["bertscore_composite", "repetition"])
def test_poor_trials_are_pruned_by_what_was_measured(sweep_file, out, capsys, metric):
    """After four complete trials, who is worse than the median of those before ends early. The best
    is that of the least rate."""
    rates = [0.4, 0.2, 0.5, 0.3, 0.45, 0.1]
    sweep = load_sweep(
        sweep_file, 'space={"train.lr" = {low=0.001, high=0.9}}', f"study.trials={len(rates)}",
        f"study.metric={metric}")
    enqueue_rates(sweep, rates)
    ScoredByRate(sweep).run()
    trials = load_trials(out)
    assert [trial.params["train.lr"] for trial in trials] == rates
    assert states(trials[:4]) == ["COMPLETE"] * 4
    assert states(trials[4:]) == ["PRUNED", "COMPLETE"]
    for trial in trials[4:]:
        complete = [t.value for t in trials[: trial.number] if t.state.name == "COMPLETE"]
        is_poor = trial.intermediate_values[1] < statistics.median(complete)
        if metric == "repetition":
            is_poor = trial.intermediate_values[1] > statistics.median(complete)
        assert (trial.state.name == "PRUNED") == is_poor
        assert sorted(trial.intermediate_values) == ([1] if is_poor else [1, 2])
    rows = read_jsonl(out / "trials.jsonl")
    assert [row["state"] for row in rows[4:]] == ["pruned", "complete"]
    assert elm.load_config(str(out / "best.toml")).train.lr == 0.1
    said = capsys.readouterr().out
    assert re.search(rf"trial 4: {metric} 0\.\d+, pruned; 5 of 6 done, 1 left", said)
    assert f"best {metric} {rows[5]['value']:.4f}, trial 5: train.lr=0.1\n" in said


class Signalled(elm.SweepWorker):
    """Receives a signal while it scores for the n-th time."""

    def __init__(self, sweep, number, n):
        super().__init__(sweep)
        self.number = number
        self.scores_left = n

    def score_answers(self, model, split, cfg):
        self.scores_left -= 1
        if self.scores_left == 0:
            os.kill(os.getpid(), self.number)
        return super().score_answers(model, split, cfg)


@pytest.mark.parametrize("number, n, stopped", [
    (signal.SIGINT, 1, 0), pytest.param(signal.SIGTERM, 5, 1, marks=pytest.mark.slow)])
def test_a_signal_while_a_trial_is_scored_is_not_lost(
        sweep_file, out, monkeypatch, number, n, stopped):
    """The worker ends. Once the trial's heartbeat is stale, the next one begins it again. A trial
    is scored three times."""
    monkeypatch.setattr(elm, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(elm, "GRACE_SECONDS", 2)
    sweep = load_sweep(sweep_file, f"study.trials={stopped + 2}")
    worker = Signalled(sweep, number, n)
    with pytest.raises(SystemExit) as end:
        worker.run()
    assert end.value.code == 128 + number
    assert worker.scores_left == 0
    assert states(load_trials(out)) == ["COMPLETE"] * stopped + ["RUNNING"]

    time.sleep(elm.GRACE_SECONDS + 1)
    assert command("sweep", sweep_file, f"study.trials={stopped + 2}")[0] == 0
    trials = load_trials(out)
    assert states(trials) == ["COMPLETE"] * stopped + ["FAIL", "COMPLETE"]
    again = trials[stopped + 1]
    assert again.system_attrs["failed_trial"] == stopped
    assert again.params == trials[stopped].params
    reasons = [row["reason"] for row in read_jsonl(out / "trials.jsonl")]
    assert reasons[stopped:] == ["its worker died", None]


@pytest.mark.slow
def test_wandb_has_the_objective(sweep_file, out):
    assert command("sweep", sweep_file, "study.trials=1", "wandb.enabled=true")[0] == 0
    (run_file,) = out.glob("trial_0/wandb/offline-run-*/*.wandb")
    logged = run_file.read_bytes()
    assert b"bertscore_composite" in logged
    assert b"val_bertscore_composite" in logged


# -----------------------------------------------------------------------------
# Several workers

GRACE_SECONDS = 20  # a busy machine can hold a thread for 8


def work(arguments: list[str]) -> int:
    elm.HEARTBEAT_SECONDS = 1
    elm.GRACE_SECONDS = GRACE_SECONDS
    return elm.main(arguments)


@pytest.fixture
def start_worker(processes, sweep_file):
    """A function that starts a worker in a process of its own, whose heartbeat is fast."""
    workers = []

    def start(*more):
        words = [sys.executable, __file__, "sweep", sweep_file, "base.train.max_steps=40", *more]
        workers.append(subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()
        worker.wait()


def test_two_workers_that_start_together_and_a_kill(start_worker, out):
    """One is killed within a trial. The other ends the sweep; a worker that comes later begins the
    killed trial again, with the same parameters. A killed trial counts as one that ended."""

    def both_run() -> bool:
        time.sleep(0.2)
        if not (out / "trial_0").exists() or not (out / "trial_1").exists():
            return False  # there may be no study yet
        running = [trial for trial in load_trials(out) if trial.state.name == "RUNNING"]
        return len(running) == 2 and all(len(trial.params) == 5 for trial in running)

    one = start_worker("study.trials=4")
    two = start_worker("study.trials=4")
    until(one, both_run)
    one.kill()
    killed_at = time.monotonic()
    assert one.wait() == -signal.SIGKILL
    said = two.communicate(timeout=300)[0]
    assert two.returncode == 0, said[-3000:]
    ended = [state for state in states(load_trials(out)) if state != "RUNNING"]
    assert len(ended) in (4, 5)  # two workers may end with one trial more

    time.sleep(max(0, killed_at + GRACE_SECONDS + 2 - time.monotonic()))
    three = start_worker("study.trials=6")
    said = three.communicate(timeout=300)[0]
    assert three.returncode == 0, said[-3000:]
    trials = load_trials(out)
    assert set(states(trials)) <= {"COMPLETE", "PRUNED", "FAIL"}
    assert len(trials) == 6
    (killed,) = [trial for trial in trials if trial.state.name == "FAIL"]
    (again,) = [trial for trial in trials if "failed_trial" in trial.system_attrs]
    assert again.system_attrs["failed_trial"] == killed.number
    assert again.params == killed.params
    assert len({trial.params["train.lr"] for trial in trials}) == 5
    rows = read_jsonl(out / "trials.jsonl")
    assert rows[killed.number]["reason"] == "its worker died"
    assert (out / "best.toml").exists()


def test_the_shipped_sweep(run, tmp_path):
    """A short trial of it."""
    out = tmp_path / "out"
    done = run("sweep", ROOT / "sweep.toml", f"output.dir={out}", "study.trials=1",
               "base.train.max_steps=4", "base.eval.samples=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "best.toml").exists()


if __name__ == "__main__":  # a worker
    sys.exit(work(sys.argv[1:]))
