"""The sweep: real Optuna storages, several workers, kills."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, read_jsonl, run

import elm


def quoted(override: str) -> str:
    """A bare word of an override as TOML."""
    key, value = elm.read_override(override)
    return f'"{key}" = {json.dumps(value)}'


@pytest.fixture
def sweep_file(settings, tmp_path):
    """A sweep over runs of six steps, each in a quarter of a second."""
    path, base = tmp_path / "sweep.toml", settings[:-1]
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    path.write_text(
        f'[study]\nname = "small"\ntrials = 4\nrepeat_best = 2\n\n[base]\nconfig = "{empty}"\n'
        + "\n".join(map(quoted, base))
        + "\n\n[space]\ntrain.lr = {low = 1e-4, high = 1e-1, log = true}\n"
        "model.hidden_dim = [8, 16]\ntrain.batch_size = {low = 8, high = 16}\n"
        f'"loss.drift_weight" = {{low = 0.0, high = 0.1}}\n\n[output]\ndir = "{tmp_path / "out"}"\n'
    )
    return path


def study_of(folder: Path):
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
    )
    return optuna.load_study(study_name="small", storage=storage)


def states(trials) -> list[str]:
    return [t.state.name for t in trials]


@pytest.mark.slow
def test_what_a_sweep_leaves_and_going_on(sweep_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert elm.main(["sweep", str(sweep_file)]) == 0
    rows = read_jsonl(out / "trials.jsonl")
    assert [list(r) for r in rows] == [
        ["number", "state", "value", "params", "seconds", "reason", "seeds"]] * 4  # fmt: skip
    assert [r["number"] for r in rows] == [0, 1, 2, 3]
    assert all(r["state"] == "complete" and 0 < r["value"] < 1 and r["seconds"] > 0 for r in rows)
    seeds = [r["seeds"] for r in rows if r["seeds"]]
    assert len(seeds) == 2 and all(len(s) == 3 for s in seeds)
    top = sorted(rows, key=lambda r: -r["value"])[:2]
    assert all(r["seeds"] and r["seeds"][0] == r["value"] for r in top)
    best = max((r for r in rows if r["seeds"]), key=lambda r: sum(r["seeds"]))
    assert f"best {best['value']:.4f} of trial {best['number']}" in capsys.readouterr().out
    from matplotlib.image import imread

    assert imread(out / "sweep.png").shape[0] > 900
    for trial in study_of(out).trials:  # pruning has measured numbers to go by
        assert sorted(trial.intermediate_values) == [1, 2]
        assert all(0 <= v < 1 for v in trial.intermediate_values.values())
    # best.toml runs as it is, and gives the value of the trial again.
    result = elm.train(elm.load_config(str(out / "best.toml")))
    assert result["bertscore_composite"] == best["value"] and result["split"] == "val"
    assert not list((out / "trial_0").glob("checkpoint*"))
    before = (out / "trials.jsonl").read_bytes()
    assert elm.main(["sweep", str(sweep_file)]) == 0  # nothing is left to do
    assert (out / "trials.jsonl").read_bytes() == before
    assert elm.main(["sweep", str(sweep_file), "study.trials=6"]) == 0
    more = read_jsonl(out / "trials.jsonl")
    assert len(more) == 6
    assert [{**r, "seeds": 0} for r in more[:4]] == [{**r, "seeds": 0} for r in rows]


@pytest.mark.slow
def test_trials_differ_and_a_seed_repeats_them(sweep_file, tmp_path):
    params = []
    for name in ("a", "b"):
        more = [f"output.dir={tmp_path / name}", "study.repeat_best=0"]
        assert elm.main(["sweep", str(sweep_file), *more]) == 0
        params.append(
            [(r["params"], r["value"]) for r in read_jsonl(tmp_path / name / "trials.jsonl")]
        )
    assert params[0] == params[1]
    assert len({str(p) for p, _ in params[0]}) == 4
    for p, _ in params[0]:
        assert 1e-4 <= p["train.lr"] <= 0.1 and p["model.hidden_dim"] in (8, 16)
        assert type(p["train.batch_size"]) is int and 0 <= p["loss.drift_weight"] <= 0.1


def test_overrides_win_over_any_spelling_and_floats_stay_floats(sweep_file):
    """Keys of the file may be quoted; numbers without a point are floats where the key is one."""
    more = [
        'base."train.lr"=0.5',
        "base.train.lr=0.25",
        "space.model.residual_scale={low=0, high=2}",
    ]
    sweep = elm.load_sweep(str(sweep_file), more)
    assert sweep.config({}).train.lr == 0.25 and sweep.study.trials == 4
    picked = []

    class Trial:
        def __getattr__(self, kind):
            return lambda key, *rest, **_: picked.append((kind, key)) or 1

    elm.suggest(Trial(), sweep.space)
    assert ("suggest_float", "model.residual_scale") in picked
    assert ("suggest_int", "train.batch_size") in picked
    assert ("suggest_categorical", "model.hidden_dim") in picked


def test_a_lock_that_a_killed_worker_left_goes_stale(sweep_file, tmp_path, monkeypatch):
    """On a relative path too, where Optuna's own link would dangle and hang for ever."""
    from optuna.storages.journal import JournalFileSymlinkLock

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(JournalFileSymlinkLock.__init__, "__defaults__", (1,))  # seconds of grace
    (tmp_path / "rel").mkdir()
    (tmp_path / "rel" / "study.log").touch()
    (tmp_path / "rel" / "study.log.lock").symlink_to(tmp_path / "rel" / "study.log")
    start = time.time()
    elm.open_study(elm.load_sweep(str(sweep_file), ["output.dir=rel"]))
    assert 0.5 < time.time() - start < 20


def test_trials_that_nobody_makes_any_more_are_marked(sweep_file, tmp_path):
    """Of a worker killed before it could sign; and, by a database's heartbeat, of another host."""
    out, url = tmp_path / "out", f"sqlite:///{tmp_path / 'study.db'}"
    out.mkdir()
    sweep = elm.load_sweep(str(sweep_file), [f"study.storage={url}"])
    study = elm.open_study(sweep)
    unsigned, remote, live = (study.ask() for _ in range(3))
    remote.set_user_attr("worker", [["elsewhere", "pid:[1]"], 7, "1"])
    live.set_user_attr("worker", [elm.this_machine(), os.getpid(), elm.process_start(os.getpid())])
    for t in (remote, live):
        study._storage.record_heartbeat(t._trial_id)
    with sqlite3.connect(tmp_path / "study.db") as db:
        db.execute("UPDATE trials SET datetime_start = '2020-01-01' WHERE number = 0")
        db.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01' WHERE trial_id = ?",
                   (remote._trial_id,))  # fmt: skip
        db.commit()
    made, running = elm.count_trials(study)
    assert [t.number for t in made] == [2] and running
    assert states(study.trials) == ["FAIL", "FAIL", "RUNNING"]


def test_a_sweep_whose_every_trial_fails_says_so(sweep_file, capsys):
    more = ['space={"train.lr" = [1e38]}', "study.trials=2"]
    assert elm.main(["sweep", str(sweep_file), *more]) == 2
    said = capsys.readouterr()
    assert "no trial was completed" in said.err and "trial 1 failed: step" in said.out + said.err


@pytest.mark.slow
def test_repeats_that_fail_are_made_again(sweep_file, tmp_path, monkeypatch):
    train = elm.train

    def failing(cfg, *rest):
        if cfg.train.seed == 44:
            raise RuntimeError("no memory")
        return train(cfg, *rest)

    monkeypatch.setattr(elm, "train", failing)
    more = [str(sweep_file), "study.trials=2", "study.repeat_best=1"]
    for seeds in (2, 3):
        assert elm.main(["sweep", *more]) == 0
        rows = read_jsonl(tmp_path / "out" / "trials.jsonl")
        assert [len(r["seeds"]) for r in rows if r["seeds"]] == [seeds]
        monkeypatch.setattr(elm, "train", train)


@pytest.mark.parametrize("at", [1, 5])
def test_a_signal_while_a_trial_is_scored_is_not_lost(sweep_file, monkeypatch, at):
    score, calls = elm.score_now, []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*arguments)

    monkeypatch.setattr(elm, "score_now", signalled)
    assert elm.main(["sweep", str(sweep_file)]) == 143
    assert len(calls) == at


@pytest.mark.slow
def test_wandb_has_the_objective_of_each_trial(sweep_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    more = ["wandb.enabled=true", "study.trials=2", "study.repeat_best=0"]
    assert elm.main(["sweep", str(sweep_file), *more]) == 0
    runs = sorted(tmp_path.glob("out/trial_*/wandb/offline-run-*/*.wandb"))
    assert len(runs) == 2
    for run_file in runs:
        logged = run_file.read_bytes()
        assert b"bertscore_composite" in logged and b"val_bertscore" in logged


@pytest.mark.slow
def test_heavy_things_are_loaded_once(sweep_file, monkeypatch):
    calls = []
    for name in ("load_llm", "fit_probe", "open_split"):
        original = getattr(elm, name)
        monkeypatch.setattr(
            elm,
            name,
            lambda *a, original=original, name=name: (calls.append(name), original(*a))[1],
        )
    elm.load_scorer.cache_clear()
    assert elm.main(["sweep", str(sweep_file)]) == 0  # eight trainings
    assert sorted(calls) == ["fit_probe", "load_llm", "open_split", "open_split"]
    assert elm.load_scorer.cache_info().misses == 1


@pytest.mark.slow
def test_a_trial_in_a_shared_llm_is_that_of_a_fresh_one(sweep_file, tmp_path):
    """Whatever the trials before it did to the LLM they share."""
    more = ['space={"model.grad_checkpoint" = [true, false], "train.lr" = {low=1e-3, high=1e-2}}']
    assert elm.main(["sweep", str(sweep_file), *more, "study.repeat_best=0"]) == 0
    sweep = elm.load_sweep(str(sweep_file), more)
    for row in read_jsonl(tmp_path / "out" / "trials.jsonl"):
        name = f"again_{row['number']}"
        params = row["params"] | {"train.eval_steps": 2}  # a quarter
        cfg = elm.trial_config(sweep, params, name)
        assert elm.train(cfg)["bertscore_composite"] == row["value"]


@pytest.mark.slow
def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(sweep_file, tmp_path):
    more = ['space={"train.lr" = [1e-3, 1e38]}', "study.trials=8"]
    assert elm.main(["sweep", str(sweep_file), *more]) == 0
    rows = read_jsonl(tmp_path / "out" / "trials.jsonl")
    failed = [r for r in rows if r["state"] == "fail"]
    assert len(rows) == 8 and failed and any(r["state"] == "complete" for r in rows)
    for r in failed:
        assert r["params"]["train.lr"] == 1e38 and "not finite" in r["reason"]
    assert elm.load_config(str(tmp_path / "out" / "best.toml")).train.lr == 1e-3


@pytest.mark.slow
def test_poor_trials_are_pruned_by_what_was_measured(sweep_file, tmp_path, monkeypatch):
    """With scores that fall with the rate: who is below the median of those before ends early."""
    rates, train = [], elm.train

    def noted(cfg, *rest):
        rates.append(cfg.train.lr)
        return train(cfg, *rest)

    monkeypatch.setattr(elm, "train", noted)
    monkeypatch.setattr(elm, "score_now", lambda *_: 1 - rates[-1])
    more = ['space={"train.lr" = {low=0.001, high=0.9}}', "study.trials=14", "study.repeat_best=0"]
    assert elm.main(["sweep", str(sweep_file), *more]) == 0
    trials = study_of(tmp_path / "out").trials
    assert set(states(trials)) == {"COMPLETE", "PRUNED"} and set(states(trials[:4])) == {"COMPLETE"}
    for t in trials[4:]:
        before = [o.value for o in trials[: t.number] if o.state.name == "COMPLETE"]
        poor = t.intermediate_values[1] < statistics.median(before)
        assert (t.state.name == "PRUNED") == poor
        assert sorted(t.intermediate_values)[: 1 + (not poor)] == ([1] if poor else [1, 2])


CASES = [
    (["space.train.lrr={low=1.0, high=2.0}"], "space.train.lrr: unknown key, did you mean"),
    (["space.train.lr={low=2.0, high=1.0}"], "space.train.lr = .*must rise from low to high"),
    (["space.train.lr={low=0.0, high=1.0, log=true}"], "space.train.lr = .*above 0 if log"),
    (["space.train.lr={low=1.0}"], "space.train.lr.high: is missing"),
    (["space.train.batch_size=['a', 4]"], "space.train.batch_size = 'a': must be int"),
    (["space.train.batch_size={low=0.5, high=4.0}"], "space.train.batch_size = 0.5: must be int"),
    (["space.train.batch_size=4"], "must be choices in a list, or {low, high}"),
    (["space.data.tasks=[['summary']]"], "space.data.tasks = .*must be choices"),
    (["study.trials=0"], "study.trials = 0: must be int"),
    (["study.objective=loss"], "study.objective = 'loss': must be 'bertscore_composite'"),
    (["studdy.trials=3"], "studdy: is not a table of a sweep, did you mean study"),
    (["base=3"], "base: is not a table"),
    (["space=[1]"], "space: is not a table"),
    (["base.config=3"], "base.config = 3: must be a train TOML"),
    (["space.train.lr.x=[1, 2]"], "space.train.lr.x: train.lr is not a table|space.train.lr.x: lr"),
    (["space.eval.samples=[1, 2]"], "space.eval.samples: is not for a space"),
    (["space.train.resume=['auto']"], "space.train.resume: is not for a space"),
    (["base.data.dir=/nowhere"], "/nowhere/embeddings/train_embeddings.safetensors: there is no"),
    (["base.config=nowhere.toml"], "nowhere.toml: No such file"),
    (["base.train.lr=fast"], "train.lr = 'fast': must be float"),
    (["base.trian.lr=1.0"], "trian: is not a table .*did you mean train"),
    (["base.eval.samples=0"], "eval.samples = 0: the objective needs answers"),
    (["study.storage=postgresql://u:secret@127.0.0.1:1/x"], "cannot open 127.0.0.1:1/x"),
    (["study.storage=/nowhere/study.log"], "study.storage: cannot open /nowhere/study.log"),
]  # fmt: skip


def test_bad_input_of_sweep(sweep_file, tmp_path, capsys):
    for more, message in CASES:
        assert elm.main(["sweep", str(sweep_file), *more]) == 2, message
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("elm: ")]
        assert lines and re.search(message, lines[0]), (message, said)
        assert "Traceback" not in said and "secret" not in said
    assert not list(tmp_path.glob("out/trial*"))
    assert elm.main(["sweep", str(sweep_file), "study.trials=1", "study.repeat_best=0"]) == 0
    capsys.readouterr()
    for more, key in (("space.model.hidden_dim=[8]", "space.model.hidden_dim"),
                      ("base.train.weight_decay=0.5", "base.train.weight_decay")):  # fmt: skip
        assert elm.main(["sweep", str(sweep_file), more]) == 2
        assert f"small is there already with another {key};" in capsys.readouterr().err
    assert elm.main(["sweep", "nowhere.toml"]) == 2
    (tmp_path / "out" / "study.log").unlink()
    assert elm.main(["sweep", str(sweep_file)]) == 2
    assert "holds trials of another study" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Workers


@pytest.fixture
def postgres(tmp_path_factory):
    """The URL of a server of its own."""
    pytest.importorskip("psycopg")
    binaries = [Path(p) for p in map(shutil.which, ("initdb", "pg_ctl")) if p]
    binaries += [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    binaries = [b.resolve().parent for b in binaries if (b.resolve().parent / "postgres").exists()]
    if not binaries:
        pytest.skip("no PostgreSQL on this machine: apt install postgresql")
    folder, as_user = tmp_path_factory.mktemp("pg"), {}
    if os.getuid() == 0:  # it refuses to run as root
        as_user = dict(user="nobody")
        shutil.chown(folder, "nobody")
        for parent in (folder, *folder.parents):
            if parent.owner() == "root" or parent == folder:
                parent.chmod(parent.stat().st_mode | 0o711)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]

    def tool(name, *arguments):
        subprocess.run([binaries[0] / name, "-D", folder / "db", *arguments], check=True, cwd="/",
                       stdout=subprocess.DEVNULL, **as_user)  # fmt: skip

    tool("initdb", "-A", "trust", "-U", "elm")
    tool("pg_ctl", "-w", "-l", folder / "log", "-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
    yield f"postgresql+psycopg://elm@127.0.0.1:{port}/postgres"
    tool("pg_ctl", "-m", "immediate", "stop")


def worker(sweep_file, *more):
    return subprocess.Popen(
        [sys.executable, ROOT / "elm.py", "sweep", sweep_file, *more], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "postgres"])
def test_two_workers_and_a_kill(sweep_file, tmp_path, request, kind):
    """One is killed within a trial. The other goes on; started again, a worker finds the trial dead
    and the sweep ends with as many as were asked for, all of them finished."""
    (tmp_path / "out").mkdir()
    url = request.getfixturevalue("postgres") if kind == "postgres" else ""
    more = [f"study.storage={url}"] * bool(url) + ["study.trials=5", "base.train.max_steps=40"]
    storage = url or optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "out" / "study.log"))
    )
    one, two = worker(sweep_file, *more), worker(sweep_file, *more)

    def trials():
        try:
            return optuna.load_study(study_name="small", storage=storage).trials
        except Exception:  # not there yet
            return []

    def running(pid):
        return [t for t in trials() if t.state.name == "RUNNING"
                and t.user_attrs.get("worker", [0, 0])[1] == pid]  # fmt: skip

    wait_for(lambda: running(one.pid) and sum(s == "COMPLETE" for s in states(trials())) >= 1)
    one.kill()
    one.wait()
    killed = [t.number for t in running(one.pid)]
    three = worker(sweep_file, *more, "study.trials=7")  # so that some are left for it
    for each in (two, three):
        said = each.communicate(timeout=200)[0]
        assert each.returncode == 0, said[-3000:]
    ended = trials()
    finished = [t for t in ended if t.state.name in ("COMPLETE", "PRUNED")]
    assert "RUNNING" not in states(ended) and len(finished) == 7
    assert all(ended[n].state.name == "FAIL" for n in killed) and len(killed) <= 1
    assert three.pid in {t.user_attrs["worker"][1] for t in finished}
    rows = read_jsonl(tmp_path / "out" / "trials.jsonl")
    assert all(rows[n]["reason"] == "killed" for n in killed)
    assert sum(bool(r["seeds"]) for r in rows) >= 2 and (tmp_path / "out" / "best.toml").exists()


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(sweep_file, tmp_path):
    more = ["base.train.max_steps=2000", "study.trials=2"]
    process = worker(sweep_file, *more)
    log = tmp_path / "out" / "trial_0" / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on" in said
    assert "Traceback" not in said
    assert states(study_of(tmp_path / "out").trials) == ["FAIL"]


@pytest.mark.slow
def test_the_shipped_sweep(tmp_path):
    """A short trial of it, and the best again."""
    more = [f"output.dir={tmp_path / 'out'}", "study.trials=1", "study.repeat_best=0"]
    done = run("sweep", ROOT / "sweep.toml", *more, "base.train.max_steps=4", "base.eval.samples=8")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "again"
    again = run(tmp_path / "out" / "best.toml", f"output.dir={folder}")
    assert again.returncode == 0, again.stderr[-3000:]
    best = max(r["value"] for r in read_jsonl(tmp_path / "out" / "trials.jsonl"))
    assert json.loads((folder / "eval.json").read_text())["bertscore_composite"] == best


def test_a_journal_whose_last_line_was_cut_off_is_named(sweep_file, tmp_path, capsys):
    """As by a full disk; Optuna itself would fail at it for ever."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.log").write_text('{"op_code": 0, "wor')
    assert elm.main(["sweep", str(sweep_file)]) == 2
    assert "study.log: its last line was cut off; delete that line" in capsys.readouterr().err
