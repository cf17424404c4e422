import contextlib
import json
import os
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    NO_TABLES,
    PROMPT,
    RT,
    build_elm,
    command,
    go,
    limit_memory,
    make_data,
    make_llm,
    open_train,
    read_jsonl,
    refused,
    rows_path,
    run,
    vectors_path,
    write_rows,
)
from naive import naive_step, token_rows
from safetensors.torch import load_file, save_file
from torture import check_same, same_tree

import elm


def final_state(folder, name="final"):
    saved = elm.load_checkpoint(folder / f"checkpoint_{name}.pt")
    return {k: saved[k] for k in ("adapter", "optimizer")}


def snapshot(folder):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())}


def forget_the_end(folder, *more):
    for name in ("checkpoint_final.pt", "eval.json", *more):
        (folder / name).unlink()


def steps_of(folder, key="loss"):
    return [m["step"] for m in read_jsonl(folder / "metrics.jsonl") if key in m]


def parts_of(settings, *more):
    """What `train` makes before its loop."""
    cfg = elm.load_config(None, [*settings, *more])
    split = elm.open_inputs(cfg, ["train"], cfg.model.tokens, elm.start_runtime(cfg))["train"]
    llm = elm.load_llm(cfg.model.llm, RT.device, cfg.model.bf16)
    return cfg, split, elm.build_trainable(cfg, llm, split, None, RT)[0]


def test_what_a_run_leaves(settings, tmp_path):
    more = ["train.resume=auto", f"output.log_file={tmp_path / 'log.txt'}"]
    result, folder = go(settings, *more)
    names = [".lock", "config.toml", "metrics.jsonl", "eval.json", "predictions.jsonl"]
    names += ["report.png", "adapter_best.safetensors", "checkpoint_final.pt"]
    names += [f"adapter_step_{n}.safetensors" for n in (2, 4, 6)]
    names += [f"checkpoint_step_{n}.pt" for n in (2, 4, 6)]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    metrics = read_jsonl(folder / "metrics.jsonl")
    steps, evals = ([m for m in metrics if key in m] for key in ("loss", "val_loss"))
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6]
    assert [m["epoch"] for m in steps] == [0, 0, 0, 1, 1, 1]
    assert set(steps[0]) == {"step", "epoch", "loss", "lm_loss", "drift_loss", "lr", "grad_norm",
                             "tokens_per_second", "memory_gib", "similarity"}
    cfg = elm.load_config(None, [*settings, *more])
    assert [m["lr"] for m in steps] == [elm.lr_at(n, 6, cfg.train) for n in range(6)]
    assert [m["step"] for m in evals] == [0, 3, 6]
    assert [set(m) for m in evals] == [{"step", "val_loss", "val_loss_shuffled", *more}
                                       for more in (["val_loss_text"], [], [])]  # fmt: skip
    assert json.loads((folder / "eval.json").read_text()) == result
    assert result["split"] == "test" and result["rows"] == 40 and len(result["tasks"]) == 13
    assert result["adapter_step"] == min(evals, key=lambda m: m["val_loss"])["step"]
    predictions = read_jsonl(folder / "predictions.jsonl")
    assert len(predictions) == 6
    assert set(predictions[0]) == {"embedding_file_idx", "task_type", "query", "response",
                                   "prediction", "prediction_shuffled"}
    assert elm.load_config(str(folder / "config.toml")) == cfg
    assert "# torch " in (folder / "config.toml").read_text()
    assert "val_loss" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("stage", [0, 3])
def test_the_loop_is_the_naive_loop(settings, stage):
    """Steps of several micro-batches: losses, clipped updates by AdamW, moments."""
    more = ["train.batch_size=40", "train.max_grad_norm=0.02", f"deepspeed.zero_stage={stage}"]
    cfg, split, model = parts_of(settings, *more)
    llm, adapter = model.llm, model.adapter
    adam = torch.optim.AdamW(adapter.parameters(), weight_decay=cfg.train.weight_decay)
    batches = elm.prepare_step(split, elm.MICRO_TOKENS["cpu"], RT, (0, 40, np.arange(40))).micros
    assert len(batches) > 2
    losses = []
    for step in range(6):
        adam.param_groups[0]["lr"] = elm.lr_at(step, 6, cfg.train)
        losses.append(naive_step(llm, adapter, [token_rows(split, np.arange(40))])[0])
        assert torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.02) > 0.02
        adam.step()
    _, folder = go(settings, *more)
    found = [m["loss"] for m in read_jsonl(folder / "metrics.jsonl") if "loss" in m]
    assert found == pytest.approx(losses, rel=1e-5)
    state = final_state(folder)
    for i, (name, p) in enumerate(adapter.named_parameters()):
        torch.testing.assert_close(state["adapter"][name], p.data, rtol=1e-4, atol=1e-5)
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state["optimizer"]["state"][i][moment],
                                       adam.state[p][moment], rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------ stopped and resumed


def test_stopped_and_resumed_equals_never_stopped(settings, tmp_path):
    """With dropout, over an epoch boundary, with metrics and files written after the checkpoint,
    as a killed run leaves them; six steps are two epochs."""
    more = ["model.dropout=0.3", "train.logging_steps=4"]
    _, whole = go(settings, *more)
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("metrics.jsonl", "adapter_best.safetensors", "adapter_step_2.safetensors",
                 "checkpoint_step_2.pt"):
        shutil.copy(whole / name, killed)
    (killed / ".checkpoint_step_4.pt.tmp").write_bytes(b"half")
    with open(killed / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "val_l')
    go(settings, *more, f"output.dir={killed}", "train.resume=auto")
    check_same(whole, killed)


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_signal_in_a_step_saves_and_leaves(settings, tmp_path, monkeypatch, step):
    """Though a validation is due at 3, and at 6, the last one. Resumed, the run is the same."""
    _, whole = go(settings, "train.logging_steps=2", f"output.dir={tmp_path / 'whole'}")
    clip, handler, steps = torch.nn.utils.clip_grad_norm_, signal.getsignal(signal.SIGTERM), []

    def interrupted(*arguments):  # by the loop once a step
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(SystemExit) as e:
        go(settings, "train.logging_steps=2")
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) == handler
    out = tmp_path / "out"
    assert elm.load_checkpoint(out / f"checkpoint_step_{step}.pt")["state"].step == step
    assert steps_of(out, "val_loss") == [s for s in (0, 3) if s < step]
    assert not (out / "checkpoint_final.pt").exists() and not (out / "eval.json").exists()
    go(settings, "train.logging_steps=2", "train.resume=auto")
    check_same(whole, out)


@pytest.mark.slow
def test_resumes_of_a_finished_run(settings, capsys):
    """Nothing to do; a report that is missing or damaged is made again, also where fewer steps are
    wanted; a longer run goes on from the final checkpoint."""
    result, folder = go(settings)
    before, report = snapshot(folder), folder / "eval.json"
    wanted = report.read_bytes()
    assert go(settings, "train.resume=auto", "train.seed=7")[0] == result
    said = capsys.readouterr().out
    assert snapshot(folder) == before
    assert "nothing to do" in said
    for damaged in ("", "[]", "5", "[" * 99999, "[[1, 2]]"):
        report.write_text(damaged)
        assert go(settings, "train.resume=auto")[0] == result and report.read_bytes() == wanted
    forget_the_end(folder)
    fewer, _ = go(settings, "train.resume=auto", "train.max_steps=3")
    assert fewer["step"] == 6 and json.loads(report.read_text()) == fewer
    longer = ["train.resume=auto", "train.max_steps=8", "train.lr=1e-3"]
    result, _ = go(settings, *longer)
    assert result["step"] == 8 and steps_of(folder) == [1, 2, 3, 4, 5, 6, 7, 8]
    report.write_bytes(wanted)  # as if killed before the report of step 8
    assert go(settings, *longer)[0] == result
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"loss": 1}\n')
    before = snapshot(folder)
    refused(r"metrics.jsonl:\d+: damaged", NO_TABLES, *settings, *longer, "train.max_steps=9")
    assert snapshot(folder) == before


def test_resume_by_path_into_another_folder(settings, tmp_path):
    """From an earlier step, with the best adapter of that time."""
    _, one = go(settings)
    start = f"train.resume={one / 'checkpoint_step_4.pt'}"
    result, two = go(settings, start, f"output.dir={tmp_path / 'two'}", "train.lr=1e-9")
    best = [m for m in read_jsonl(one / "metrics.jsonl") if "val_loss" in m and m["step"] <= 4]
    wanted = min(best, key=lambda m: m["val_loss"])["step"]
    assert result["adapter_step"] in (wanted, 6) and (two / "adapter_best.safetensors").exists()
    back = [*settings, "train.max_steps=4", f"train.resume={one / 'checkpoint_step_2.pt'}"]
    result, _ = go(back)  # in its own folder: what came later is of another branch
    assert go(back, "train.resume=auto")[0] == result and result["step"] == 4
    assert {p.stem for p in one.glob("*.old")} >= {"checkpoint_step_6.pt", "checkpoint_final.pt"}


def test_a_resume_by_other_batches_on_other_rows(settings, data_dir, tmp_path):
    """It does what is left of the epochs, and finds its best adapter on the new rows alone."""
    more = ["train.max_steps=none", "train.epochs=3"]  # of 40 rows
    result, one = go(settings, *more)
    write_rows(data_dir, "val", read_jsonl(rows_path(data_dir, "val"))[1:])
    more += [f"train.resume={one / 'checkpoint_step_4.pt'}", f"output.dir={tmp_path / 'two'}"]
    again, two = go(settings, *more, "train.batch_size=8")
    assert result["step"] == 9 and again["step"] == 4 + 3 + 5
    found = {m["step"]: m["val_loss"] for m in read_jsonl(two / "metrics.jsonl") if "val_loss" in m}
    assert [*found] == [4, 6, 9, 12] and again["adapter_step"] == min(found, key=found.get)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(settings, capsys):
    """The newest is the one of most steps. Where none is whole, nothing is begun anew."""
    _, folder = go(settings)
    wanted = final_state(folder)
    weights = wanted["adapter"]["fc1.weight"].numpy().tobytes()
    forget_the_end(folder)
    os.utime(folder / "checkpoint_step_2.pt")
    (folder / "checkpoint_step_4 (copy).pt").write_bytes(b"no number")
    go(settings, "train.resume=auto")
    assert "resumed after step 6" in capsys.readouterr().out

    def flipped(data):  # within numbers, where torch.load itself would not see it
        at = data.index(weights) + len(weights) // 2
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    for damage in (lambda data: b"", lambda data: data[:-1], flipped):
        for name in ("checkpoint_final.pt", "checkpoint_step_6.pt"):
            (folder / name).write_bytes(damage((folder / name).read_bytes()))
        (folder / "eval.json").unlink()
        go(settings, "train.resume=auto")
        said = capsys.readouterr().out
        assert said.count("passed over") == 1 and "resumed after step 4" in said
        assert same_tree(final_state(folder), wanted)
    for path in folder.glob("checkpoint_*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(folder)
    code, said = command(NO_TABLES, *settings, "train.resume=auto")
    assert code == 2 and said.count("passed over") == 4 and "no checkpoint in" in said
    assert snapshot(folder) == before


# ------------------------------------------------------------------ settings


@pytest.mark.slow
def test_what_must_not_matter_and_what_must(settings, tmp_path):
    settings = [*settings, "eval.samples=0", "train.eval_steps=6"]
    wanted = final_state(go(settings)[1])
    same = [["train.batch_size=8", "train.grad_accum=2"], ["data.num_workers=0"],
            ["data.num_workers=3"], ["model.grad_checkpoint=true"], ["train.logging_steps=3"],
            ["deepspeed.zero_stage=1"], ["deepspeed.zero_stage=2"]]
    other = [["train.seed=43"], ["model.dropout=0.3"], ["train.lr=2e-2"]]
    for i, more in enumerate(same + other):
        _, folder = go(settings, *more, f"output.dir={tmp_path / str(i)}")
        assert same_tree(final_state(folder), wanted) == (more in same), more


def test_dropout_differs_from_step_to_step(settings, monkeypatch):
    """CPU generators keep 32 bits of a seed: a step or rank above those would repeat the mask."""
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    go(settings, "model.dropout=0.3")
    assert len(set(seeds[-6:])) == 6 and max(seeds) < 2**32


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(elm.UserError, match="model.bf16: not on Tesla T4, set model.bf16=false"):
        elm.load_llm("llm", torch.device("cuda"), bf16=True)


def test_bf16_llm_and_fp32_adapter(settings):
    _, folder = go(settings, "model.bf16=true")
    state = final_state(folder)
    moments = [m for p in state["optimizer"]["state"].values() for m in p.values()]
    exported = load_file(folder / "adapter_best.safetensors")
    assert {t.dtype for t in (*state["adapter"].values(), *moments, *exported.values())} == {
        torch.float32}
    assert elm.ELM.load(folder / "adapter_best.safetensors").llm.dtype == torch.bfloat16


def test_without_text_there_is_no_ceiling(settings, data_dir):
    for split in ("train", "val", "test"):
        rows = [row | {"text": None} for row in read_jsonl(rows_path(data_dir, split))]
        write_rows(data_dir, split, rows)
    result, _ = go(settings)
    assert not {"carried", "gap_closed", "loss_text"} & set(result) and "loss_shuffled" in result


def test_the_report_is_on_validation_where_there_is_no_test_split(settings, data_dir):
    """And, as there, without dropout."""
    vectors_path(data_dir, "test").unlink()
    rows_path(data_dir, "test").unlink()
    result, folder = go(settings, "model.dropout=0.3")
    assert result["split"] == "val"
    best = min(m["val_loss"] for m in read_jsonl(folder / "metrics.jsonl") if "val_loss" in m)
    assert result["loss"] == pytest.approx(best, rel=1e-9)


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("part, stage", [(0, 0), (1, 0), (0, 3)])
def test_a_loss_not_finite_stops_before_the_update(settings, tmp_path, monkeypatch, part, stage):
    """The loss (0) or the gradient (1) of step 3 alone is NaN."""
    soft_gradient, models = elm.soft_gradient, []

    def spoiled(model, *arguments):
        sums, gradient = soft_gradient(model, *arguments)
        models.append(model)
        if len(models) == 3:
            (sums[0], gradient[0, 0, 0])[part].fill_(torch.nan)
        return sums, gradient

    monkeypatch.setattr(elm, "soft_gradient", spoiled)
    with pytest.raises(elm.UserError, match=r"step 3: the loss .* not finite.*jsonl:\d+,\d+"):
        go(settings, "train.logging_steps=1", f"deepspeed.zero_stage={stage}")
    saved = final_state(tmp_path / "out", "step_2")["adapter"]
    assert steps_of(tmp_path / "out") == [1, 2]
    left = {k: v.cpu() for k, v in models[0].adapter.state_dict().items()}
    assert len(models) == 3 and same_tree(left, dict(saved))


def test_out_of_memory_in_the_loop_names_the_lines_to_change(settings, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 100)
    code, said = command(NO_TABLES, *settings)
    assert code == 2 and not list((tmp_path / "out").glob("checkpoint*"))
    for line in ("model.grad_checkpoint = true", "data.max_seq_length = ", "zero_stage = 3"):
        assert line in said


def test_wandb_offline_one_run_that_goes_on(settings, capsys):
    pytest.importorskip("wandb")
    more = ["wandb.enabled=true", "wandb.run_name=a", "train.max_steps=2"]
    _, folder = go(settings, *more)
    (first,) = (folder / "wandb").glob("offline-run-*")
    wandb_id = elm.load_checkpoint(folder / "checkpoint_final.pt")["state"].wandb_id
    assert wandb_id and first.name.split("-")[3] == wandb_id
    go(settings, *more, "train.max_steps=4", "train.resume=auto")
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert {r.name.split("-")[3] for r in runs} == {wandb_id}
    logged = b"".join(r.read_bytes() for run in runs for r in run.glob("*.wandb"))
    for word in (b"val_loss_shuffled", b"adapter_best", b"hidden_dim", b"grad_norm"):
        assert word in logged
    assert "W&B failed" not in capsys.readouterr().out


def test_wandb_failure_does_not_stop_a_run(settings, capsys):
    pytest.importorskip("wandb")
    result, _ = go(settings, "wandb.enabled=true", "wandb.project=a/b")  # a name that W&B refuses
    assert result["step"] == 6 and "W&B failed, training goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_wandb_without_a_login_goes_offline(settings, tmp_path):
    pytest.importorskip("wandb")
    done = run(NO_TABLES, *settings, "wandb.enabled=true", "train.max_steps=1",
               WANDB_MODE="online", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no login" in done.stdout and list((tmp_path / "out" / "wandb").glob("offline-run*"))


@pytest.mark.parametrize("error, code", [
    (None, 0), (SystemExit(143), 143), (elm.UserError("x"), 2), (RuntimeError("x"), 1),
])  # fmt: skip
def test_a_wandb_run_ends_with_the_exit_code(tmp_path, error, code):
    log = elm.Log(elm.load_config(None, [f"output.dir={tmp_path}"]), elm.TrainState(), 1, RT)
    log.run = mock.Mock()
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), log:
        if error:
            raise error
    log.run.finish.assert_called_once_with(exit_code=code)


@pytest.mark.slow
def test_a_terminal_that_is_not_utf8(settings, data_dir):
    rows = [r | {"query": "Was heißt „α“?"} for r in read_jsonl(rows_path(data_dir, "test"))]
    write_rows(data_dir, "test", rows)
    ascii = dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    done = run(NO_TABLES, *settings, "train.max_steps=1", **ascii)
    assert done.returncode == 0, done.stderr


def test_a_warm_up_longer_than_the_run_is_told(settings, capsys):
    go(settings, "train.warmup_steps=9", "train.max_steps=1")
    assert "train.warmup_steps = 9: no shorter than the run of 1 steps" in capsys.readouterr().err


def test_a_signal_ends_a_validation(llm_dir, data_dir):
    split = open_train(data_dir, PROMPT)
    model = build_elm(llm_dir, split)
    assert len(elm.validation_losses(model, split, RT, lambda: None, first=True)) == 3
    with pytest.raises(InterruptedError):
        elm.validation_losses(model, split, RT, mock.Mock(side_effect=InterruptedError), True)


def test_patience_ends_a_run_as_finished(settings, capsys):
    more = ["train.patience=2", "train.eval_steps=1", "train.max_steps=60", "train.lr=1.0",
            "train.warmup_steps=0"]  # fmt: skip
    result, folder = go(settings, *more)
    steps = [m["step"] for m in read_jsonl(folder / "metrics.jsonl") if "val_loss" in m]
    assert result["step"] == steps[-1] == result["adapter_step"] + 2 < 60
    again, _ = go(settings, *more, "train.resume=auto")
    assert again == result and "nothing to do" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_code_2(settings, tmp_path):
    """Of what no other file tests; nothing is written."""
    _, out = go(settings)
    before, own = snapshot(out), f"output.dir={out}"
    few, wide = make_data(tmp_path / "few", 3), make_llm(tmp_path / "wide", "llama")
    far, narrow = make_data(tmp_path / "far", scale=3.0), make_data(tmp_path / "narrow", width=9)
    resume = [own, "train.resume=auto", "train.max_steps=8"]
    shutil.copy(vectors_path(narrow, "val"), vectors_path(few, "val"))
    odd, half = make_data(tmp_path / "odd"), make_data(tmp_path / "half")
    shutil.copy(vectors_path(far, "val"), vectors_path(odd, "val"))
    vectors_path(half, "test").unlink()
    lacking = shutil.copytree(wide, tmp_path / "lacking") / "model.safetensors"
    weights = load_file(lacking)
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, lacking, dict(format="pt"))
    for message, *overrides in (
        ("train_embeddings.safetensors: not a whole table: No such file", "data.dir=/nowhere"),
        ("no row of", 'data.tasks=["summary"]', f"data.dir={few}"),
        ("data.dir: .*differ in width.*9", f"data.dir={few}"),
        ("model.llm: cannot load /nowhere/llm", "model.llm=/nowhere/llm"),
        ("model.llm: cannot load no/such", "model.llm=no/such"),
        ("model.llm: cannot load", f"model.llm={tmp_path}"),
        ("synthesis.jsonl:1: the prompt takes all of", "data.max_seq_length=20"),
        ("data.max_seq_length = 4096", "data.max_seq_length=4096"),
        (f"output.dir: {out} holds a run already", own),
        (f"output.dir: {out} holds a run already", own, f"train.resume={rows_path(few)}"),
        ("hidden_dim was 24 in training and is 16 here", *resume, "model.hidden_dim=16"),
        ("train.resume: hash of the LLM's weights was", *resume, f"model.llm={wide}"),
        (r"the vectors' norm was 3\.", *resume, f"data.dir={far}"),
        (r"val_embeddings.safetensors: the vectors' norm was 3\.", f"data.dir={odd}"),
        ("test_embeddings.safetensors: .*No such file", f"data.dir={half}"),
        ("lacking lacks the weights .*layers.1", f"model.llm={lacking.parent}"),
        ("standardize was True in training and is False", *resume, "model.standardize=false"),
        ("residual_scale was 1.0 in training and is 2.0", *resume, "model.residual_scale=2.0"),
        ("d_emb was 12 in training and is 9 here", *resume, f"data.dir={narrow}"),
        ("no whole checkpoint: .* No such file", "train.resume=/nowhere/checkpoint_step_2.pt"),
        ("no whole checkpoint", f"train.resume={rows_path(few)}"),
    ):
        refused(message, NO_TABLES, *settings, f"output.dir={tmp_path / 'new'}", *overrides)
        assert snapshot(out) == before and not (tmp_path / "new").exists(), message
    refused("^elm: missing.toml: No such file or directory$", "missing.toml")
