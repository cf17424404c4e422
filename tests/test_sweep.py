"""The sweep: real Optuna storages, several workers, kills."""

import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torture
from conftest import NO_TABLES, ROOT, command, read_jsonl, refused, run

import elm


@pytest.fixture
def sweep_file(settings, tmp_path):
    """A sweep over runs of six steps, each in a quarter of a second."""
    space = {
        "train": {"lr": dict(low=1e-4, high=1e-1, log=True), "batch_size": dict(low=8, high=16)},
        "model": {"hidden_dim": [8, 16], "grad_checkpoint": [True, False]},
        "loss.drift_weight": dict(low=0.0, high=0.1),
    }
    tables = dict(
        study=dict(name="small", trials=4, repeat_best=2), space=space,
        base=dict(map(elm.read_override, settings[:-1])) | {"config": NO_TABLES},
        output=dict(dir=str(tmp_path / "out")))  # fmt: skip
    path = tmp_path / "sweep.toml"
    path.write_text("".join(f"{key} = {elm.to_toml(table)}\n" for key, table in tables.items()))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def load_trials(out: Path) -> list:
    """The trials of the study so far; none before it exists. To open it is to write to it."""
    time.sleep(0.2)
    try:
        return optuna.load_study(study_name="small", storage=f"sqlite:///{out}/study.db").trials
    except Exception:
        return []


def states(trials) -> list[str]:
    return [t.state.name for t in trials]


@pytest.mark.slow
def test_what_a_sweep_leaves_and_going_on(sweep_file, out, capsys, monkeypatch):
    load, loaded = elm.load_pretrained, []
    monkeypatch.setattr(elm, "load_pretrained", lambda kind, *rest, **options: (
        loaded.append(kind), load(kind, *rest, **options))[1])  # fmt: skip
    assert elm.main(["sweep", str(sweep_file)]) == 0
    assert loaded.count(elm.transformers.AutoModelForCausalLM) <= 1
    rows = read_jsonl(out / "trials.jsonl")
    assert [list(r) for r in rows] == [
        ["number", "state", "value", "params", "seconds", "reason"]] * 8  # fmt: skip
    assert [r["number"] for r in rows] == list(range(8))
    assert all(r["state"] == "complete" and 0 < r["value"] < 1 and r["seconds"] > 0 for r in rows)
    search, repeats = rows[:4], rows[4:]
    # The two best again, each with two other seeds; the best mean over seeds is the best.
    values = {}
    for row in sorted(search, key=lambda r: -r["value"])[:2]:
        params = [row["params"] | {"train.seed": seed} for seed in (43, 44)]
        again = [r["value"] for r in repeats if r["params"] in params]
        assert len(again) == 2
        values[row["number"]] = [row["value"], *again]
    best = max(values, key=lambda number: statistics.mean(values[number]))
    line = ", ".join(f"{value:.4f}" for value in values[best])
    assert f"the best is trial {best}: {line}" in capsys.readouterr().out
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for trial in load_trials(out)[:4]:  # pruning has measured numbers to go by
        assert sorted(trial.intermediate_values) == [1, 2]
        assert all(0 <= v < 1 for v in trial.intermediate_values.values())
    sweep = elm.load_sweep(str(sweep_file), [])
    for row in search:  # whatever the trials before it did to the LLM that they share
        cfg = sweep.config(row["params"] | {"train.eval_steps": 2}, f"again_{row['number']}")
        assert elm.train(cfg)["bertscore_composite"] == pytest.approx(row["value"], rel=1e-12)
    # best.toml runs as it is, and gives the value of the trial again.
    result = elm.train(elm.load_config(str(out / "best.toml")))
    assert result["bertscore_composite"] == pytest.approx(rows[best]["value"], rel=1e-12)
    assert result["split"] == "val"
    assert not list((out / "trial_0").glob("checkpoint*"))
    before = (out / "trials.jsonl").read_bytes()
    assert elm.main(["sweep", str(sweep_file)]) == 0  # nothing is left to do
    assert (out / "trials.jsonl").read_bytes() == before
    assert elm.main(["sweep", str(sweep_file), "study.trials=6"]) == 0
    more = read_jsonl(out / "trials.jsonl")
    assert more[:8] == rows and sum("train.seed" not in r["params"] for r in more) == 6


def test_the_winner_is_the_best_of_those_that_are_repeated(sweep_file, out):
    study = elm.open_study(sweep := elm.load_sweep(str(sweep_file), []))
    repeats = ((0, 43, 0.6), (0, 44, 0.6), (1, 43, 0.76), (1, 44, 0.77))
    repeats = [(value, dict(repeats=[n, {"train.seed": seed}])) for n, seed, value in repeats]
    for value, attrs in [(0.8, {}), (0.75, {}), *repeats, (0.79, {})]:
        attrs["eval_steps"] = 2
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs=attrs))
    assert elm.write_results(sweep, study).endswith("the best is trial 1: 0.7500, 0.7600, 0.7700")
    assert (out / "best.toml").read_text().startswith("# trial 1 of small: 0.75 on")


@pytest.mark.slow
def test_trials_differ_and_a_seed_repeats_them(sweep_file, tmp_path):
    params = []
    for name in ("a", "b"):
        more = [f"output.dir={tmp_path / name}", "study.repeat_best=0"]
        assert elm.main(["sweep", str(sweep_file), *more]) == 0
        rows = read_jsonl(tmp_path / name / "trials.jsonl")
        params.append([(r["params"], r["value"]) for r in rows])
    assert params[0] == params[1]
    assert len({str(p) for p, _ in params[0]}) == 4
    for p, _ in params[0]:
        assert 1e-4 <= p["train.lr"] <= 0.1 and p["model.hidden_dim"] in (8, 16)
        assert type(p["train.batch_size"]) is int and 0 <= p["loss.drift_weight"] <= 0.1


def test_overrides_win_over_any_spelling_and_floats_stay_floats(sweep_file):
    """Keys of the file may be quoted; numbers without a point are floats where the key is one."""
    more = ['base."train.lr"=0.5', "base.train.lr=0.25",
            "space.model.residual_scale={low=0, high=2}"]  # fmt: skip
    sweep = elm.load_sweep(str(sweep_file), more)
    assert sweep.config({}).train.lr == 0.25 and sweep.study.trials == 4
    trial = optuna.create_study().ask()
    for key, spec in sweep.space.items():
        elm.suggest(trial, key, spec)
    kinds = {key: type(value) for key, value in trial.params.items()}
    assert kinds == {"train.lr": float, "model.hidden_dim": int, "model.grad_checkpoint": bool,
                     "train.batch_size": int, "loss.drift_weight": float,
                     "model.residual_scale": float}  # fmt: skip


def test_a_sweep_whose_every_trial_fails_says_so(sweep_file, out):
    more = ['space={"train.lr" = [1e38]}', "study.trials=2"]
    refused("no trial was completed", "sweep", sweep_file, *more)
    assert [r["state"] for r in read_jsonl(out / "trials.jsonl")] == ["fail"] * 2


def test_after_the_timeout_no_trial_is_begun(sweep_file, out):
    more = ["study.timeout_hours=1e-4", "study.trials=1000"]  # 0.36 seconds
    assert elm.main(["sweep", str(sweep_file), *more]) == 0
    rows = read_jsonl(out / "trials.jsonl")
    assert 1 <= len(rows) < 10 and all(r["state"] == "complete" for r in rows)


@pytest.mark.parametrize("at, number", [(1, signal.SIGINT), (5, signal.SIGTERM)])
def test_a_signal_while_a_trial_is_scored_is_not_lost(sweep_file, out, monkeypatch, at, number):
    """The trial is begun again."""
    score, calls = elm.score_now, []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return score(*arguments)

    monkeypatch.setattr(elm, "score_now", signalled)
    monkeypatch.setattr(elm, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(elm, "GRACE_SECONDS", 2)
    words = ["sweep", sweep_file, "study.trials=3", "study.repeat_best=0"]
    assert command(*words)[0] == 128 + number and len(calls) == at
    stopped = load_trials(out)[-1]
    assert command(*words)[0] == 0
    trials = load_trials(out)
    assert states(trials).count("FAIL") == 1 and trials[stopped.number].state.name == "FAIL"
    again = [t for t in trials if t.system_attrs.get("failed_trial") == stopped.number]
    assert [t.params for t in again] == [stopped.params]


@pytest.mark.slow
def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(sweep_file, out):
    """W&B has the objective of each other trial."""
    more = ['space={"train.lr" = [1e-3, 1e38]}', "study.trials=8", "study.repeat_best=1"]
    assert command("sweep", sweep_file, *more, "wandb.enabled=true")[0] == 0
    rows = read_jsonl(out / "trials.jsonl")
    failed = [r for r in rows if r["state"] == "fail"]
    assert len(rows) == 10 and failed and any(r["state"] == "complete" for r in rows)
    for r in failed:
        assert r["params"]["train.lr"] == 1e38 and "not finite" in r["reason"]
    assert elm.load_config(str(out / "best.toml")).train.lr == 1e-3
    for r in rows:
        (run_file,) = out.glob(f"trial_{r['number']}/wandb/offline-run-*/*.wandb")
        logged = run_file.read_bytes()
        assert r in failed or b"bertscore_composite" in logged and b"val_bertscore" in logged


@pytest.mark.slow
def test_poor_trials_are_pruned_by_what_was_measured(sweep_file, out, monkeypatch):
    """With scores that fall with the rate: who is below the median of those before ends early."""
    rates, train = [], elm.train

    def noted(cfg, *rest):
        rates.append(cfg.train.lr)
        return train(cfg, *rest)

    monkeypatch.setattr(elm, "train", noted)
    monkeypatch.setattr(elm, "score_now", lambda *_: 1 - rates[-1])
    more = ['space={"train.lr" = {low=0.001, high=0.9}}', "study.trials=10", "study.repeat_best=0"]
    assert elm.main(["sweep", str(sweep_file), *more]) == 0
    trials = load_trials(out)
    assert set(states(trials)) == {"COMPLETE", "PRUNED"} and set(states(trials[:4])) == {"COMPLETE"}
    for t in trials[4:]:
        before = [o.value for o in trials[: t.number] if o.state.name == "COMPLETE"]
        poor = t.intermediate_values[1] < statistics.median(before)
        assert (t.state.name == "PRUNED") == poor
        assert sorted(t.intermediate_values)[: 1 + (not poor)] == ([1] if poor else [1, 2])


def test_bad_input_of_sweep(sweep_file, tmp_path, monkeypatch):
    for message, *more in (
        ("space.train.lrr = .*unknown key, did you mean", "space.train.lrr={low=1.0, high=2.0}"),
        ("space.train.lr = .*low <= high", "space.train.lr={low=2.0, high=1.0}"),
        ("train.lr = 0.0: must be", "space.train.lr={low=0.0, high=1.0, log=true}"),
        ("space.model.dropout = .*low > 0", "space.model.dropout={low=0.0, high=0.5, log=true}"),
        ("space.train.lr = .*missing .* 'high'", "space.train.lr={low=1.0}"),
        ("space.train.lr = .*lg", "space.train.lr={low=1.0, high=2.0, lg=true}"),
        ("train.batch_size = 'a': must be a valid integer", "space.train.batch_size=['a', 4]"),
        ("train.batch_size = 0.5: must be a", "space.train.batch_size={low=0.5, high=4.0}"),
        ("must be choices in a list, or {low, high}", "space.train.batch_size=4"),
        ("space.data.tasks = .*must be choices", "space.data.tasks=[['summary']]"),
        ("space.train.seed: is set by the sweep itself", "space.train.seed={low=1, high=2}"),
        ("base = 3: must be a table", "base=3"),
        ("train_embeddings.safetensors: .*No such file", "base.data.dir=/nowhere"),
        ("nowhere.toml: No such file", "base.config=nowhere.toml"),
        ("needs eval.samples above 0", "base.eval.samples=0"),
        ("open 127.0.0.1:1/x", "study.storage=postgresql+psycopg://u:secret@127.0.0.1:1/x"),
        ("cannot open .*h:1/x", "study.storage=postgresql://h:1/x?password=secret"),
        ("study.storage: cannot open h/x", "study.storage=mysql://u:sec/secret@h/x"),
        ("cannot open /nowhere/study.log", "study.storage=/nowhere/study.log")):  # fmt: skip
        assert "secret" not in refused(message, "sweep", sweep_file, *more)
    several = ["space.train.lrr=[1]", "space.model.dropout=[2.0]"]
    code, said = command("sweep", sweep_file, *several)
    assert code == 2 and "space.train.lrr" in said and "space.model.dropout" in said
    assert not list(tmp_path.glob("out/trial*"))
    space = "space={train.batch_size={low=4, high=9, step=2.5}}"
    said = refused("no trial was completed", "sweep", sweep_file, space, "study.trials=2",
                   f"output.dir={tmp_path / 'odd'}")
    assert said.count("failed: train.batch_size = ") == 2
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        refused("a worker is one process", "sweep", sweep_file)
    assert command("sweep", sweep_file, "study.trials=1", "study.repeat_best=0")[0] == 0
    for more in ("space.model.hidden_dim=[8]", "base.train.weight_decay=0.5"):
        refused(f"small exists with another {more.split('=')[0]};", "sweep", sweep_file, more)
    refused("holds trials of another study", "sweep", sweep_file, "study.name=other")


# -----------------------------------------------------------------------------
# Workers


WORKER = """import sys, elm
elm.HEARTBEAT_SECONDS, elm.GRACE_SECONDS = 1, 30  # a busy machine can hold a thread for 8
sys.exit(elm.main(sys.argv[1:]))"""


def worker(sweep_file, *more):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, "sweep", sweep_file, *more], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_two_workers_that_start_together_and_a_kill(sweep_file, out):
    """One is killed within a trial and started again. The trial is begun again with the same
    parameters, and the sweep ends with as many as were asked for, all of them finished."""
    more = ["study.trials=5", "study.repeat_best=1", "base.train.max_steps=40"]
    one, two = worker(sweep_file, *more), worker(sweep_file, *more)
    torture.until(one, lambda: states(load_trials(out)).count("RUNNING") == 2
                  and all(len(t.params) == 5 for t in load_trials(out)))  # fmt: skip
    one.kill()
    assert one.wait() == -signal.SIGKILL
    three = worker(sweep_file, *more)
    for each in (two, three):
        said = each.communicate(timeout=300)[0]
        assert each.returncode == 0, said[-3000:]
    trials = load_trials(out)
    assert set(states(trials)) <= {"COMPLETE", "PRUNED", "FAIL"}
    killed = [t for t in trials if t.state.name == "FAIL"]
    assert len(killed) == 1
    again = [t for t in trials if t.system_attrs.get("failed_trial") == killed[0].number]
    assert [t.params for t in again] == [killed[0].params]
    search = [t for t in trials if "repeats" not in t.user_attrs and t.state.name != "FAIL"]
    assert len(search) == 5
    rows = read_jsonl(out / "trials.jsonl")
    assert rows[killed[0].number]["reason"] == "killed"
    assert sum("train.seed" in r["params"] for r in rows) == 2 and (out / "best.toml").exists()


@pytest.mark.slow
def test_the_shipped_sweep(tmp_path):
    """A short trial of it."""
    more = [f"output.dir={tmp_path / 'out'}", "study.trials=1", "study.repeat_best=0"]
    done = run("sweep", ROOT / "sweep.toml", *more, "base.train.max_steps=4", "base.eval.samples=8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "best.toml").exists()
