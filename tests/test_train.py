"""Training: what a run leaves, stopped and resumed, settings, what goes wrong, W&B."""

import contextlib
import io
import json
import os
import platform
import random
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    NO_TABLES,
    PROMPT,
    ROOT,
    command,
    go,
    make_data,
    make_llm,
    open_train,
    read_jsonl,
    read_table,
    refused,
    rows_path,
    vectors_path,
    write_rows,
)
from naive import naive_step, token_rows
from safetensors.torch import load_file, save_file
from torture import check_same, same_tree

import elm


def final_state(folder, name="final"):
    saved = elm.load_checkpoint(folder / f"checkpoint_{name}.pt")
    return {"adapter": saved.adapter, "optimizer": saved.optimizer}


def snapshot(folder):
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())}


def forget_the_end(folder, *more):
    for name in ("checkpoint_final.pt", "eval.json", *more):
        (folder / name).unlink()


def steps_of(folder, key="loss"):
    return [m["step"] for m in read_jsonl(folder / "metrics.jsonl") if key in m]


@pytest.fixture
def copied(trained, tmp_path):
    """(its report, its folder, settings that name the folder) of a finished run that may change."""
    report, folder, settings = trained
    copy = shutil.copytree(folder, tmp_path / "copy")
    return report, copy, [*settings, f"output.dir={copy}"]


@pytest.fixture
def brief(settings):
    """Settings of a run without samples, that validates before its first and after its last step
    alone."""
    return [*settings, "eval.samples=0", "train.eval_steps=6"]


# ------------------------------------------------------------------ a run


def test_what_a_run_leaves(trained):
    result, folder, settings = trained
    names = [".lock", "config.toml", "metrics.jsonl", "eval.json", "predictions.jsonl"]
    names += ["report.png", "adapter_best.safetensors", "checkpoint_final.pt"]
    for step in (2, 3, 4, 6):  # each second one is saved, and each third one validated
        names += [f"adapter_step_{step}.safetensors", f"checkpoint_step_{step}.pt"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)

    metrics = read_jsonl(folder / "metrics.jsonl")
    steps = [m for m in metrics if "loss" in m]
    evals = [m for m in metrics if "val_loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6]
    assert [m["epoch"] for m in steps] == [0, 0, 0, 1, 1, 1]
    assert set(steps[0]) == {"step", "epoch", "loss", "lm_loss", "lr", "grad_norm", "similarity",
                             "tokens_per_second", "memory_gib"}  # fmt: skip
    cfg = elm.load_config(None, settings)
    assert [m["lr"] for m in steps] == [elm.lr_at(n, 6, cfg.train) for n in range(6)]
    assert [m["step"] for m in evals] == [0, 3, 6]
    always = {"step", "val_loss", "val_loss_shuffled"}
    assert [set(m) for m in evals] == [always | {"val_loss_text"}, always, always]

    assert json.loads((folder / "eval.json").read_text()) == result
    assert result["split"] == "test" and result["rows"] == 40 and len(result["tasks"]) == 13
    assert result["adapter_step"] == min(evals, key=lambda m: m["val_loss"])["step"]
    predictions = read_jsonl(folder / "predictions.jsonl")
    assert len(predictions) == 6
    assert set(predictions[0]) == {"embedding_file_idx", "task_type", "query", "response",
                                   "prediction", "prediction_shuffled", "prediction_nearest",
                                   "text", "text_nearest"}  # fmt: skip
    assert elm.load_config(str(folder / "config.toml")) == cfg
    assert "# torch " in (folder / "config.toml").read_text()


def named_cells(header: str, line: str) -> dict[str, str]:
    """The values of a line of a table, by title. Each ends where its title ends."""
    titles = {title.end(): title.group() for title in re.finditer(r"\S+", header)}
    return {titles[cell.end()]: cell.group() for cell in re.finditer(r"\S+", line)}


def test_the_console_and_the_log_file(brief, tmp_path, capsys):
    """A header once, values below it; the file has the console's lines with their times. Where
    stderr is no terminal there are no bars."""
    path = tmp_path / "log.txt"
    go(brief, "train.max_steps=2", f"output.log_file={path}")
    said, errors = capsys.readouterr()
    lines = said.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("   step ")]
    header, *rows = lines[first : first + 5]
    of_gpu = {"GiB"} if torch.cuda.is_available() else set()
    assert set(header.split()) == {"step", "loss", "val", "gap", "lr", "tokens/s", "left"} | of_gpu
    before, one, two, after = [named_cells(header, row) for row in rows]
    assert [row["step"] for row in (before, one, two, after)] == ["0", "1", "2", "2"]
    for row in (one, two):
        assert set(row) == {"step", "loss", "lr", "tokens/s", "left"} | of_gpu
        assert re.fullmatch(r"\d\.\d{4}", row["loss"])
        assert re.fullmatch(r"\d\d:\d\d", row["left"])
    for row in (before, after):
        assert set(row) - {"gap"} == {"step", "val"}
    assert two["left"] == "00:00"
    for line in lines[first:]:
        assert len(line) <= 80 or str(tmp_path) in line
    assert "%|" not in errors

    in_file = path.read_text().splitlines()
    assert sum(line.endswith(rows[0]) for line in in_file) == 1
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in in_file[:5])


def test_the_gap_on_the_console(tmp_path, capsys):
    """Also where a run goes on: the loss by the texts is measured once, before the first step."""
    cfg = elm.load_config(None, [f"output.dir={tmp_path}"])
    losses = {"val_loss": 2.0, "val_loss_shuffled": 3.0, "val_loss_text": 1.0}
    later = {"val_loss": 1.5, "val_loss_shuffled": 3.0}
    for step, losses_of_step in ((0, losses), (3, later)):
        with elm.MetricLog(tmp_path, elm.WandbRun(cfg, None), step, 10, plots=False,
                           has_drift=False) as log:  # fmt: skip
            log.write_validation(step, losses_of_step, [])
    header, line, _, later_line = capsys.readouterr().out.splitlines()
    assert named_cells(header, line) == {"step": "0", "val": "2.0000", "gap": "0.500"}
    assert named_cells(header, later_line) == {"step": "3", "val": "1.5000", "gap": "0.750"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_on_the_terminal_alone(settings, tmp_path):
    path = tmp_path / "log.txt"
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        go(settings, f"output.log_file={path}")
    assert "steps: 100%|" in terminal.getvalue() and "\r" in terminal.getvalue()
    in_file = path.read_bytes()
    assert b"tokens/s" in in_file
    assert b"%|" not in in_file and b"\r" not in in_file


def test_two_answers_are_shown_at_each_validation(settings, data_dir, capsys):
    """Always to the same rows, each part in one line."""
    rows = read_jsonl(rows_path(data_dir, "val"))
    for row in rows:
        row["response"] += " and more" * 20
    write_rows(data_dir, "val", rows)
    go(settings)
    said = capsys.readouterr().out
    shown = re.findall(r"^  query      (.*)\n  answer.*\n  reference  (.*)$", said, re.MULTILINE)
    chosen = [rows[i] for i in sorted(np.random.default_rng(0).permutation(40)[:2])]
    assert [query for query, _ in shown] == [row["query"] for row in chosen] * 3
    for (_, reference), row in zip(shown, chosen * 3, strict=True):
        assert len(reference) <= 67 and reference.endswith("…")
        assert row["response"].startswith(reference[:-1])


class CheckedRandomness(elm.Trainer):
    def answer_samples(self):
        before = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
        samples = super().answer_samples()
        after = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
        assert before == after and len(samples) == min(2, self.cfg.eval.samples)
        return samples


def test_the_answers_of_validations_change_no_number(settings, tmp_path):
    found = []
    for num_samples in (0, 6):
        out = tmp_path / str(num_samples)
        more = ["model.dropout=0.1", f"eval.samples={num_samples}", f"output.dir={out}"]
        CheckedRandomness(elm.load_config(None, [*settings, *more])).run()
        entries = read_jsonl(out / "metrics.jsonl")
        for entry in entries:
            entry.pop("tokens_per_second", None)
            entry.pop("memory_gib", None)
        found.append((entries, (out / "adapter_step_6.safetensors").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_the_loop_is_the_naive_loop(brief, stage):
    """Steps of several micro-batches: losses, clipped updates by AdamW, moments."""
    more = ["train.batch_size=40", "train.max_grad_norm=0.02"]
    trainer = elm.Trainer(elm.load_config(None, [*brief, *more]))  # as before its loop
    trainer.prepare_models()
    adapter = trainer.elm.adapter
    split = trainer.splits["train"]
    row_ids = np.arange(40)
    rows = elm.RowsOfStep(0, 40, row_ids)
    assert len(elm.prepare_step(split, trainer.micro_batch_tokens, rows).batches) > 2

    adam = torch.optim.AdamW(adapter.parameters(), weight_decay=trainer.cfg.train.weight_decay)
    examples = token_rows(split, row_ids)
    losses = []
    for step in range(6):
        adam.param_groups[0]["lr"] = elm.lr_at(step, 6, trainer.cfg.train)
        loss, _ = naive_step(trainer.elm.llm, adapter, [examples])
        losses.append(loss)
        assert torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.02) > 0.02
        adam.step()

    _, folder = go(brief, *more, f"deepspeed.zero_stage={stage}")
    found = [m["loss"] for m in read_jsonl(folder / "metrics.jsonl") if "loss" in m]
    assert found == pytest.approx(losses, rel=1e-5)
    state = final_state(folder)
    for i, (name, p) in enumerate(adapter.named_parameters()):
        torch.testing.assert_close(state["adapter"][name], p.data, rtol=1e-4, atol=1e-5)
        for moment in ("exp_avg", "exp_avg_sq"):
            saved = state["optimizer"]["state"][i][moment]
            torch.testing.assert_close(saved, adam.state[p][moment], rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------ stopped and resumed


@pytest.mark.parametrize("step", [2, 3])
def test_stopped_and_resumed_equals_never_stopped(settings, tmp_path, step):
    """Killed in a step, or in the validation after it: with dropout, over an epoch boundary, with
    metrics and files written after the checkpoint. Six steps are two epochs."""
    more = ["model.dropout=0.3", "train.logging_steps=4"]
    _, whole = go(settings, *more)
    killed = tmp_path / "killed"
    killed.mkdir()
    names = ["metrics.jsonl", "adapter_best.safetensors"]
    for saved in (2, 3):
        if saved <= step:
            names += [f"adapter_step_{saved}.safetensors", f"checkpoint_step_{saved}.pt"]
    for name in names:
        shutil.copy(whole / name, killed)
    (killed / ".checkpoint_step_4.pt.tmp").write_bytes(b"half")
    with open(killed / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "val_l')
    go(settings, *more, f"output.dir={killed}", "train.resume=auto")
    check_same(whole, killed)


class Signalled(elm.Trainer):
    """Receives SIGTERM within a step, or within the validation after it."""

    signalled_step = 0
    in_validation = False

    def train_step(self, step):
        if self.state.step + 1 == self.signalled_step and not self.in_validation:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(step)

    def validation_losses(self):
        if self.state.step == self.signalled_step and self.in_validation:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().validation_losses()


@pytest.mark.parametrize("in_validation, step, last_step", [
    (False, 2, 2), (False, 3, 3), (False, 6, 6), (True, 0, 1), (True, 3, 4), (True, 6, 6)])
def test_a_signal_saves_and_leaves(trained, tmp_path, in_validation, step, last_step):
    """After the step that it comes in, though a validation is due at 3, and at 6, the last one. One
    within a validation waits for its end and the next step, if there is one; meanwhile the
    checkpoint before the validation is there. Resumed, the run is the same."""
    _, whole, settings = trained
    out = tmp_path / "out"
    settings = [*settings, f"output.dir={out}"]
    handler = signal.getsignal(signal.SIGTERM)
    trainer = Signalled(elm.load_config(None, settings))
    trainer.signalled_step = step
    trainer.in_validation = in_validation
    with pytest.raises(SystemExit) as e:
        trainer.run()
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) == handler

    saved = elm.load_checkpoint(out / f"checkpoint_step_{last_step}.pt")
    assert saved.state.step == last_step
    if in_validation and step == 3:
        before = elm.load_checkpoint(out / "checkpoint_step_3.pt")
        assert before.state.step == 3 and before.state.last_validated_step == 0
    validated = [s for s in (0, 3, 6) if s < step or in_validation and s == step]
    assert steps_of(out, "val_loss") == validated
    assert steps_of(out) == list(range(1, last_step + 1)) and not (out / "eval.json").exists()
    go(settings, "train.resume=auto")
    check_same(whole, out)


@pytest.mark.slow
def test_resumes_of_a_finished_run(copied, capsys):
    """Nothing to do; a report that is missing or damaged is made again, also where fewer steps are
    wanted; a longer run goes on from the final checkpoint."""
    result, folder, settings = copied
    before = snapshot(folder)
    report = folder / "eval.json"
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


@pytest.mark.parametrize("change", [
    "order", "removed", "another vector", "as long", "embedded again"])  # fmt: skip
def test_changed_rows_are_warned_of_at_a_resume(brief, data_dir, capsys, change):
    """Not where they are the same. A finished run says so, too, and its report stands; where the
    rows that it is about are others, it is made again."""
    _, folder = go(brief, "train.max_steps=3")
    resumed = [*brief, "train.resume=auto"]
    go(resumed, "train.max_steps=4")
    assert "have changed" not in capsys.readouterr().err
    changed = {}
    for split in ("train", "test"):
        rows = read_jsonl(rows_path(data_dir, split))
        if change == "order":
            rows = rows[::-1]
        elif change == "removed":
            del rows[17]
        elif change == "as long":
            rows[5]["response"] = rows[5]["response"][::-1]
        elif change == "another vector":
            rows[5]["embedding_file_idx"] = (rows[5]["embedding_file_idx"] + 1) % 10
        changed[split] = rows
    write_rows(data_dir, "train", changed["train"])
    if change == "embedded again":
        reverse_table(data_dir, "train")
    result, _ = go(resumed, "train.max_steps=4")
    out, err = capsys.readouterr()
    warning = f"train.resume: {rows_path(data_dir)}: its rows or their vectors have changed"
    assert err.count(warning) == 1 and "in another order, than it would without the stop" in err
    assert "nothing to do" in out
    go(resumed, "train.max_steps=5")
    out, err = capsys.readouterr()
    assert err.count(warning) == 1 and steps_of(folder) == [1, 2, 3, 4, 5]

    write_rows(data_dir, "test", changed["test"])
    if change == "embedded again":
        reverse_table(data_dir, "test")
    other, _ = go(resumed, "train.max_steps=5")
    out, err = capsys.readouterr()
    assert "nothing to do" not in out and "have changed" not in err
    assert other["loss"] != result["loss"] or change == "order"


def reverse_table(data_dir, split):
    table = read_table(data_dir, split).flip(0).contiguous()
    save_file({"embeddings": table}, vectors_path(data_dir, split))


def test_the_hash_of_rows_is_of_those_that_are_trained(data_dir):
    """Other orders of data.tasks, task types without rows, rows of other task types, line ends,
    vectors that no row uses, and the format of the table make no difference."""

    def hash_of(*tasks):
        return elm.rows_hash(open_train(data_dir, PROMPT, tasks=tasks))

    wanted = hash_of("summary", "keywords")
    assert hash_of("keywords", "mine", "summary") == wanted
    assert hash_of("keywords") != wanted != hash_of("summary", "keywords", "describe")

    path = rows_path(data_dir)
    other_row = json.dumps(read_jsonl(path)[0] | {"task_type": "describe"})
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + f"\n{other_row}\n".encode())
    assert hash_of("summary", "keywords") == wanted
    table = torch.cat([read_table(data_dir), torch.ones(1, 12)]).double()
    vectors_path(data_dir).unlink()
    np.save(vectors_path(data_dir).with_suffix(".npy"), table.numpy())
    assert hash_of("summary", "keywords") == wanted


def test_a_damaged_line_of_metrics_is_named(copied):
    _, folder, settings = copied
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"loss": 1}\n')
    before = snapshot(folder)
    more = ["train.resume=auto", "train.max_steps=9"]
    refused(r"metrics.jsonl:\d+: a damaged line", NO_TABLES, *settings, *more)
    assert snapshot(folder) == before


def test_resume_by_path(copied, tmp_path):
    """From an earlier step into another folder, with the best adapter of that time, as what follows
    is worse. In its own folder it would mix with what came later."""
    _, folder, settings = copied
    checkpoint = elm.load_checkpoint(folder / "checkpoint_step_4.pt")
    checkpoint.state.best_loss = 0.0
    elm.save_checkpoint(checkpoint, [tmp_path / "good.pt"])
    more = [f"train.resume={tmp_path / 'good.pt'}", f"output.dir={tmp_path / 'two'}"]
    more += ["eval.samples=0"]
    result, two = go(settings, *more)
    assert steps_of(two) == [5, 6] and result["adapter_step"] == 3
    best, metadata = elm.Adapter.load(two)
    assert metadata["step"] == 3
    saved, _ = elm.Adapter.load(folder / "adapter_step_3.safetensors")
    assert same_tree(dict(best.state_dict()), dict(saved.state_dict()))

    before = snapshot(folder)
    start = f"train.resume={folder / 'checkpoint_step_4.pt'}"
    refused(r"goes on to step \d; to branch off from step 4, choose another output.dir",
            NO_TABLES, *settings, start)
    changed = set(snapshot(folder).items()) ^ set(before.items())
    assert {name for name, _ in changed} <= {".lock"}
    last = f"train.resume={folder / 'checkpoint_final.pt'}"
    result, _ = go(settings, last, "train.max_steps=7", "eval.samples=0")
    assert result["step"] == 7 and steps_of(folder) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
def test_a_resume_by_other_batches_on_other_rows(settings, data_dir, tmp_path):
    """It does what is left of the epochs."""
    more = ["train.max_steps=none", "train.epochs=3", "eval.samples=0"]  # of 40 rows
    result, one = go(settings, *more)
    write_rows(data_dir, "val", read_jsonl(rows_path(data_dir, "val"))[1:])
    more += [f"train.resume={one / 'checkpoint_step_4.pt'}", f"output.dir={tmp_path / 'two'}"]
    again, two = go(settings, *more, "train.batch_size=8")
    assert result["step"] == 9 and again["step"] == 4 + 3 + 5
    assert steps_of(two) == list(range(5, 13)) and steps_of(two, "val_loss") == [6, 9, 12]


def flip_a_bit(path, weights):
    """Change a number among the bytes of `weights`."""
    data = bytearray(path.read_bytes())
    at = data.index(weights) + len(weights) // 2
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_checkpoint_is_skipped(copied, capsys, damage):
    """The newest is the one of most steps. Where none is whole, nothing is begun anew."""
    _, folder, settings = copied
    os.utime(folder / "checkpoint_step_2.pt")
    (folder / "checkpoint_step_8 (copy).pt").write_bytes(b"no number")
    newest = folder / "checkpoint_step_6.pt"
    assert elm.newest_checkpoint(folder) == newest
    weights = final_state(folder, "step_6")["adapter"]["fc1.weight"].numpy().tobytes()
    for path in (newest, folder / "checkpoint_final.pt"):
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            flip_a_bit(path, weights)
            torch.load(path, weights_only=True)  # sees nothing; the CRC does
    capsys.readouterr()
    assert elm.newest_checkpoint(folder) == folder / "checkpoint_step_4.pt"
    assert capsys.readouterr().out.count("skipped a damaged checkpoint") == 1

    for path in folder.glob("checkpoint_*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(folder)
    code, said = command(NO_TABLES, *settings, "train.resume=auto")
    assert code == 2 and "no checkpoint in" in said
    assert said.count("skipped a damaged checkpoint") == 5
    assert snapshot(folder) == before


def test_a_run_goes_on_before_a_damaged_checkpoint(trained, copied):
    _, whole, _ = trained
    _, folder, settings = copied
    forget_the_end(folder)
    (folder / "checkpoint_step_6.pt").write_bytes(b"")
    go(settings, "train.resume=auto")
    check_same(whole, folder)


# ------------------------------------------------------------------ settings


@pytest.mark.slow
def test_what_must_not_matter_and_what_must(brief, tmp_path):
    wanted = final_state(go(brief)[1])
    same = [["train.batch_size=8", "train.grad_accum=2"], ["data.num_workers=0"],
            ["data.num_workers=3"], ["model.grad_checkpoint=true"], ["train.logging_steps=3"],
            ["deepspeed.zero_stage=1"], ["deepspeed.zero_stage=2"]]  # fmt: skip
    other = [["train.seed=43"], ["model.dropout=0.3"], ["train.lr=2e-2"]]
    for i, more in enumerate(same + other):
        _, folder = go(brief, *more, f"output.dir={tmp_path / str(i)}")
        assert same_tree(final_state(folder), wanted) == (more in same), more


def test_dropout_differs_from_step_to_step(brief, monkeypatch):
    """CPU generators keep 32 bits of a seed: a step or rank above those would repeat the mask."""
    seeds = []
    manual_seed = torch.manual_seed

    def recorded(seed):
        seeds.append(seed)
        return manual_seed(seed)

    monkeypatch.setattr(torch, "manual_seed", recorded)
    go(brief, "model.dropout=0.3")
    assert len(set(seeds[-6:])) == 6 and max(seeds) < 2**32


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(elm.UserError, match="model.llm: Tesla T4 has no bf16"):
        elm.load_llm("llm", torch.device("cuda"), bf16=True)


WITH_BF16 = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}
WITH_AMX = {"architecture": "x86_64", "amx_bf16": True}
WITHOUT_BF16 = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}
ARM = {"architecture": "aarch64", "bf16": True}
SET_BF16 = "bf16 = false: this CPU multiplies in bf16, about twice as fast; set bf16 = true"
SET_FP32 = ("bf16 = true: this CPU has no instructions for bf16; fp32 is faster, in twice the "
            "memory: set bf16 = false")  # fmt: skip


@pytest.mark.parametrize(("capabilities", "bf16", "small_llm", "said"), [
    (WITH_BF16, "false", 100, SET_BF16), (WITH_AMX, "false", 100, SET_BF16),
    (WITHOUT_BF16, "true", 100, SET_FP32),
    (WITH_BF16, "true", 100, ""), (WITHOUT_BF16, "false", 100, ""), (ARM, "false", 100, ""),
    (ARM, "true", 100, ""), (WITH_BF16, "false", None, ""),
    (WITHOUT_BF16, "true", None, "")])  # fmt: skip
def test_the_dtype_in_which_a_cpu_is_faster_is_named(
    brief, monkeypatch, capsys, capabilities, bf16, small_llm, said
):
    """Of an LLM that is not small."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    if small_llm:
        monkeypatch.setattr(elm, "SMALL_LLM", small_llm)
    go(brief, f"model.bf16={bf16}", "train.max_steps=0", "eval.samples=0")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "bf16" in line]
    assert warnings == ([f"elm: warning: {said}"] if said else [])


def test_every_command_that_loads_an_llm_names_the_faster_dtype(trained, monkeypatch, capsys):
    """Once, however often it loads. eval and generate load as ELM.load does, data/prepare.py by
    LLMEngine."""
    _, folder, settings = trained
    llm = elm.load_config(None, settings).model.llm
    vectors = torch.randn(3, 12)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: WITH_BF16)
    monkeypatch.setattr(elm, "SMALL_LLM", 100)
    for load in (lambda: elm.ELM.load(folder), lambda: elm.ELM.create(llm, vectors, bf16=False),
                 lambda: elm.LLMEngine(llm, False, {}, 9)):
        elm.warn_once.cache_clear()
        capsys.readouterr()
        load()
        load()
        assert capsys.readouterr().err.count(f"elm: warning: {SET_BF16}\n") == 1


def test_torch_knows_what_this_cpu_has():
    """By the names that lscpu has, too."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("not a PC with Linux")
    flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    capabilities = torch.cpu.get_capabilities()
    assert capabilities["architecture"] == "x86_64"
    for name in ("avx512_bf16", "amx_bf16"):
        assert capabilities[name] == (name in flags)


def test_bf16_llm_and_fp32_adapter(brief):
    _, folder = go(brief, "model.bf16=true")
    state = final_state(folder)
    tensors = [*state["adapter"].values()]
    for moments in state["optimizer"]["state"].values():
        tensors += moments.values()
    stored = load_file(folder / "adapter_best.safetensors")
    assert stored.pop(elm.TOKEN_EMBEDDINGS).dtype == torch.float16  # of the LLM
    tensors += stored.values()
    assert {t.dtype for t in tensors} == {torch.float32}
    assert elm.ELM.load(folder / "adapter_best.safetensors").llm.dtype == torch.bfloat16


def test_without_text_there_is_no_ceiling(brief, data_dir):
    for split in ("train", "val", "test"):
        rows = [row | {"text": None} for row in read_jsonl(rows_path(data_dir, split))]
        write_rows(data_dir, split, rows)
    result, folder = go(brief, "train.max_steps=1")
    assert not {"gap_closed", "loss_text"} & set(result) and "loss_shuffled" in result
    assert steps_of(folder, "val_loss_text") == []


def test_the_report_is_on_validation_where_there_is_no_test_split(brief, data_dir):
    """And, as there, without dropout."""
    vectors_path(data_dir, "test").unlink()
    rows_path(data_dir, "test").unlink()
    result, folder = go(brief, "model.dropout=0.3")
    assert result["split"] == "val"
    best = min(m["val_loss"] for m in read_jsonl(folder / "metrics.jsonl") if "val_loss" in m)
    assert result["loss"] == pytest.approx(best, rel=1e-9)


def test_the_warm_up_of_a_run_is_a_tenth_of_it(brief, capsys):
    _, folder = go(brief, "train.warmup_steps=none", "train.max_steps=20", "train.lr=1.0",
                   "train.logging_steps=1")
    assert " rows, 2 of warm-up" in capsys.readouterr().out
    rates = [m["lr"] for m in read_jsonl(folder / "metrics.jsonl") if "lr" in m]
    assert rates[:3] == [0.5, 1.0, 1.0]


def test_patience_ends_a_run_as_finished(brief, capsys):
    more = ["train.patience=2", "train.eval_steps=1", "train.max_steps=60", "train.lr=1.0",
            "train.warmup_steps=0"]  # fmt: skip
    result, folder = go(brief, *more)
    steps = steps_of(folder, "val_loss")
    assert result["step"] == steps[-1] == result["adapter_step"] + 2 < 60
    again, _ = go(brief, *more, "train.resume=auto")
    assert again == result and "nothing to do" in capsys.readouterr().out


# ------------------------------------------------------------------ a negative control


def report_on_tiny(data_dir: Path, out: Path) -> dict:
    """On the test split, after 60 steps of the embedded default."""
    settings = [f"model.llm={ROOT / 'data/tiny/llm'}", f"data.dir={data_dir}", "eval.samples=0",
                "train.max_steps=60", "train.eval_steps=60", f"output.dir={out}"]  # fmt: skip
    return elm.train(elm.load_config(str(ROOT / "train.toml"), settings))


@pytest.mark.slow
def test_vectors_of_other_texts_teach_nothing(tmp_path):
    """Trained on vectors that are shuffled among the texts, an adapter does not help on held-out
    rows; trained on the right ones it does."""
    right = report_on_tiny(ROOT / "data/tiny", tmp_path / "right")
    assert right["gap_closed"] > 0.8

    data_dir = tmp_path / "data"
    for name in ("embeddings", "synthesis"):
        shutil.copytree(ROOT / "data/tiny" / name, data_dir / name)
    vectors = read_table(data_dir)
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    save_file({"embeddings": vectors[order]}, vectors_path(data_dir))
    wrong = report_on_tiny(data_dir, tmp_path / "wrong")
    low, high = wrong["intervals"]["gap_closed"]
    assert low < 0 < high and abs(wrong["gap_closed"]) < 0.05


# ------------------------------------------------------------------ what goes wrong


class Spoiled(elm.Trainer):
    """Its third step has a vector that is NaN, or a gradient that is, though its loss is not."""

    spoils_gradient = False

    def train_step(self, step):
        if self.state.step != 2:
            return super().train_step(step)
        if self.spoils_gradient:
            self.elm.adapter.fc1.bias.register_hook(lambda gradient: gradient * torch.nan)
            return super().train_step(step)
        embeddings = step.batches[0].embeddings.clone()
        embeddings[0, 0] = torch.nan
        first = replace(step.batches[0], embeddings=embeddings)
        return super().train_step(replace(step, batches=[first, *step.batches[1:]]))


@pytest.mark.parametrize("spoils_gradient, stage", [
    (False, 0), (True, 0), pytest.param(False, 3, marks=pytest.mark.slow)])
def test_a_loss_not_finite_stops_before_the_update(brief, tmp_path, spoils_gradient, stage):
    trainer = Spoiled(elm.load_config(None, [*brief, f"deepspeed.zero_stage={stage}"]))
    trainer.spoils_gradient = spoils_gradient
    with pytest.raises(elm.UserError, match=r"step 3: the loss .* not finite.*jsonl:\d+,\d+"):
        trainer.run()
    assert steps_of(tmp_path / "out") == [1, 2]
    saved = final_state(tmp_path / "out", "step_2")["adapter"]
    assert same_tree(dict(trainer.elm.adapter.state_dict()), saved)


def test_out_of_memory_in_the_loop_names_the_lines_to_change(settings, tmp_path, monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention

    def limited(*tensors, **options):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return attention(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", limited)
    code, said = command(NO_TABLES, *settings)
    assert code == 2 and not list((tmp_path / "out").glob("checkpoint*"))
    for line in ("model.grad_checkpoint = true", "data.max_seq_length = ", "zero_stage = 3"):
        assert line in said


def test_a_terminal_that_is_not_utf8(run, settings, data_dir):
    rows = [r | {"query": "Was heißt „α“?"} for r in read_jsonl(rows_path(data_dir, "test"))]
    write_rows(data_dir, "test", rows)
    ascii_only = dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    done = run(NO_TABLES, *settings, "train.max_steps=1", **ascii_only)
    assert done.returncode == 0, done.stderr


def llm_without_a_layer(folder: Path) -> Path:
    path = make_llm(folder, "llama") / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if "layers.1" not in k}
    save_file(weights, path, dict(format="pt"))
    return folder


def test_bad_data_are_refused_before_anything_is_written(settings, data_dir, tmp_path):
    """One of each kind, of those that no other file tests."""
    few = make_data(tmp_path / "few", 3)
    odd = make_data(tmp_path / "odd")
    half = make_data(tmp_path / "half")
    narrow = make_data(tmp_path / "narrow", width=9)
    far = make_data(tmp_path / "far", scale=3.0)
    shutil.copy(vectors_path(narrow, "val"), vectors_path(few, "val"))
    shutil.copy(vectors_path(far, "val"), vectors_path(odd, "val"))
    vectors_path(half, "test").unlink()
    for message, *overrides in (
        ("^elm: data.dir: there is no file /nowhere/embeddings/train_embeddings.safetensors$",
         "data.dir=/nowhere"),
        ("^elm: data.tasks: no row is of the task type 'sumary', did you mean summary.$",
         'data.tasks=["sumary", "keywords"]'),
        ("no row of", 'data.tasks=["summary"]', f"data.dir={few}"),
        ("data.dir: .*differ in width.*9", f"data.dir={few}"),
        (r"val_embeddings.safetensors: the vectors' norm was 3\.", f"data.dir={odd}"),
        ("data.dir: there is no file .*test_embeddings.safetensors", f"data.dir={half}"),
        ("synthesis.jsonl:1: the prompt takes all of", "data.max_seq_length=20"),
        ("data.max_seq_length = 4096", "data.max_seq_length=4096"),
    ):
        refused(message, NO_TABLES, *settings, *overrides)
        assert not (tmp_path / "out").exists(), message
    refused("^elm: there is no file missing.toml here ", "missing.toml")


def test_a_bad_output_folder_is_refused_before_the_data_are_read(settings, tmp_path):
    (tmp_path / "file").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for folder, message in (
        (tmp_path / "file", f"output.dir: {tmp_path}/file is a file, not a folder; choose another"),
        (tmp_path / "file" / "run", f"output.dir: {tmp_path}/file is a file, not a folder"),
        ("/proc/run", "output.dir: cannot write in /proc; choose another folder: No such file"),
    ):
        said = refused(message, NO_TABLES, *settings, f"output.dir={folder}")
        assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_step_that_takes_all_rows_is_told(settings, capsys):
    go(settings, "train.batch_size=1000000", "train.max_steps=1", "eval.samples=0",
       "train.warmup_steps=0")
    warning = ("elm: warning: train.batch_size: a step of 1000000 rows takes more than all 40 rows "
               "of train; lower train.batch_size or train.grad_accum")
    assert capsys.readouterr().err.splitlines()[-1] == warning


def test_rows_of_other_task_types_are_counted_in_words(settings, capsys):
    go(settings, "train.max_steps=0", "eval.samples=0", 'data.tasks=["summary", "keywords"]')
    said = capsys.readouterr().out
    counts = "7 rows, 33 rows of other task types are left out"
    assert f"train: 10 vectors of width 12, {counts}\n" in said


def test_elm_save_does_not_overwrite_the_adapter_of_a_run(copied, tmp_path):
    _, folder, _ = copied
    model = elm.ELM.load(folder)
    before = snapshot(folder)
    for name in ("adapter_best.safetensors", "adapter_step_2.safetensors"):
        message = f"^{folder / name}: is an adapter of a run; choose another name$"
        with pytest.raises(elm.UserError, match=message):
            model.save(folder / name)
    assert snapshot(folder) == before
    for path in (folder / "mine.safetensors", tmp_path / "adapter_best.safetensors"):
        model.save(path)
        model.save(path)  # as torch.save does


def test_what_train_takes(settings, tmp_path):
    """A config, the path of a TOML file as text or Path, or its tables, with dotted keys or not."""
    cfg = elm.load_config(None, [*settings, "train.max_steps=1"])
    toml = tmp_path / "mine.toml"
    toml.write_text(elm.config_text(cfg))
    flat = elm.flatten(cfg.to_dict())
    for given in (cfg, str(toml), toml, cfg.to_dict(), flat):
        assert elm.as_config(given) == cfg
    first = elm.train(toml)
    assert first["step"] == 1
    again = cfg.to_dict()
    again["train"]["resume"] = "auto"
    assert elm.train(again) == first
    with pytest.raises(elm.UserError, match="train.lr = 'x': Input should be a valid number"):
        elm.train({"train": {"lr": "x"}})
    with pytest.raises(elm.UserError, match="train: takes a Config, the path of a TOML file, or a "
                                            "dict of its tables, not a list"):
        elm.train([])


def test_settings_in_python_that_are_none():
    with pytest.raises(elm.UserError, match=r"takes a list of overrides, as \['train.lr=0.1'\]"):
        elm.load_config(None, "train.lr=0.1")
    with pytest.raises(elm.UserError, match="evaluate: takes EvalOptions, not a Config"):
        elm.evaluate(elm.Config())


def test_models_of_the_report_that_cannot_be_loaded(settings, tmp_path):
    """The line says how to do without."""
    for key in ("bertscore_model", "embedder"):
        line = (f"eval.{key}: cannot load /nowhere/x: there is no folder /nowhere/x; "
                f"eval.{key}=off does without")
        said = refused(line, NO_TABLES, *settings, f"eval.{key}=/nowhere/x")
        assert said.count("\n") == 1
        refused(f"eval.{key}: cannot load no/such .*eval.{key}=off does without", NO_TABLES,
                *settings, f"eval.{key}=no/such")
        assert not (tmp_path / "out").exists()


def test_llms_that_cannot_be_loaded_are_refused(settings, tmp_path):
    lacking = llm_without_a_layer(tmp_path / "lacking")
    for message, name in (
        ("model.llm: cannot load /nowhere/llm", "/nowhere/llm"),
        ("model.llm: cannot load no/such", "no/such"),
        ("model.llm: cannot load", tmp_path),
        ("lacking lacks the weights .*layers.1", lacking),
    ):
        refused(message, NO_TABLES, *settings, f"model.llm={name}")
        assert not (tmp_path / "out").exists(), message


def test_resumes_that_do_not_fit_are_refused(copied, tmp_path):
    """What was trained is left as it was."""
    _, folder, settings = copied
    llama = make_llm(tmp_path / "llama", "llama")
    far = make_data(tmp_path / "far", scale=3.0)
    narrow = make_data(tmp_path / "narrow", width=9)
    resume = ["train.resume=auto", "train.max_steps=8"]
    other = f"output.dir={tmp_path / 'new'}"
    before = snapshot(folder)
    for message, *overrides in (
        (f"output.dir: {folder} holds a run already",),
        (f"output.dir: {folder} holds a run already", f"train.resume={rows_path(far)}"),
        ("hidden_dim was 24 in training and is 16 here", *resume, "model.hidden_dim=16"),
        ("d_emb was 12 in training and is 9 here", *resume, f"data.dir={narrow}"),
        ("standardize was True in training and is False", *resume, "model.standardize=false"),
        ("train.resume: hash of the LLM's weights was", *resume, f"model.llm={llama}"),
        (r"the vectors' norm was 3\.", *resume, f"data.dir={far}"),
        ("no whole checkpoint: there is no file /nowhere/step_2.pt$", other,
         "train.resume=/nowhere/step_2.pt"),
        ("there is no file Auto here .*, did you mean auto.$", other, "train.resume=Auto"),
        (f"train.resume: {folder} is a folder; give a checkpoint_step_N.pt, or train.resume=auto "
         f"with output.dir={folder}$", other, f"train.resume={folder}"),
        ("train.resume: .*adapter_best.safetensors is an adapter; a run goes on from a checkpoint_",
         other, f"train.resume={folder / 'adapter_best.safetensors'}"),
        ("no whole checkpoint", other, f"train.resume={rows_path(far)}"),
    ):
        refused(message, NO_TABLES, *settings, *overrides)
        assert snapshot(folder) == before and not (tmp_path / "new").exists(), message


# ------------------------------------------------------------------ W&B


class StubRun:
    """A run of W&B that notes what it is told; `fails`: or that always fails."""

    id = "stub"

    def __init__(self, fails: bool = False):
        self.fails = fails
        self.entries = []
        self.artifacts = []
        self.summary = {}
        self.exit_codes = []

    def log(self, entry, step):
        if self.fails:
            raise OSError("no disk")
        self.entries.append({"step": step, **entry})

    def log_artifact(self, path, type):
        if self.fails:
            raise ValueError("no network")
        self.artifacts.append((Path(path).name, type))

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


@pytest.fixture
def stub_wandb(monkeypatch):
    """(a stub run that wandb.init returns, the options of each call)."""
    wandb = pytest.importorskip("wandb")
    stub = StubRun()
    calls = []

    def init(**options):
        calls.append(options)
        return stub

    monkeypatch.setattr(wandb, "init", init)
    return stub, calls


def test_wandb_gets_what_the_run_logs(brief, stub_wandb):
    stub, calls = stub_wandb
    more = ["wandb.enabled=true", "wandb.run_name=a", "train.max_steps=2"]
    result, folder = go(brief, *more)
    assert stub.entries == read_jsonl(folder / "metrics.jsonl")
    assert {("adapter_best.safetensors", "adapter"),
            ("adapter_step_2.safetensors", "adapter")} <= set(stub.artifacts)  # fmt: skip
    assert stub.summary == result and stub.exit_codes == [0]
    go(brief, *more, "train.max_steps=3", "train.resume=auto")
    assert [options["id"] for options in calls] == [None, "stub"]  # one run that goes on
    cfg = elm.load_config(None, [*brief, *more])
    assert calls[0]["config"] == cfg.to_dict()
    assert calls[0]["project"] == "elm-training" and calls[0]["name"] == "a"
    assert calls[0]["dir"] == str(folder) and calls[0]["mode"] == "offline"


def test_wandb_failures_do_not_stop_a_run(brief, stub_wandb, tmp_path, monkeypatch, capsys):
    stub, _ = stub_wandb
    stub.fails = True
    result, _ = go(brief, "wandb.enabled=true", "train.max_steps=1")
    said = capsys.readouterr().out
    assert result["step"] == 1 and stub.exit_codes == [0]
    assert "W&B failed, training goes on: OSError" in said and "ValueError('no network')" in said

    import wandb

    def refusing(**options):
        raise wandb.errors.UsageError("a name that W&B refuses")

    monkeypatch.setattr(wandb, "init", refusing)
    more = ["wandb.enabled=true", "train.max_steps=1", f"output.dir={tmp_path / 'two'}"]
    result, _ = go(brief, *more)
    said = capsys.readouterr().out
    assert result["step"] == 1 and said.count("W&B failed, training goes on: UsageError") == 1


def test_wandb_without_a_login_goes_offline(stub_wandb, monkeypatch, capsys):
    import wandb

    _, calls = stub_wandb
    monkeypatch.delenv("WANDB_MODE")
    cfg = elm.load_config(None, ["wandb.enabled=true"])
    for logged_in, mode in ((False, "offline"), (True, "online")):
        monkeypatch.setattr(wandb, "login", lambda logged_in=logged_in, **_: logged_in)
        assert elm.WandbRun(cfg, "stub").id == "stub"
        assert calls[-1]["mode"] == mode
        assert ("no login" in capsys.readouterr().out) == (not logged_in)


@pytest.mark.parametrize("error, code", [
    (None, 0), (SystemExit(143), 143), (elm.UserError("x"), 2), (RuntimeError("x"), 1)])
def test_a_wandb_run_ends_with_the_exit_code(stub_wandb, tmp_path, error, code):
    """Once."""
    stub, _ = stub_wandb
    cfg = elm.load_config(None, [f"output.dir={tmp_path}", "wandb.enabled=true"])
    wandb_run = elm.WandbRun(cfg, run_id=None)
    log = elm.MetricLog(tmp_path, wandb_run, first_step=0, total_steps=1, plots=False,
                        has_drift=False)  # fmt: skip
    expected = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with expected, log:
        if error:
            raise error
    log.wandb.finish(0)
    assert stub.exit_codes == [code]


@pytest.mark.slow
def test_wandb_offline(brief, capsys):
    """By W&B itself: two parts of one run."""
    pytest.importorskip("wandb")
    more = ["wandb.enabled=true", "wandb.run_name=a", "train.max_steps=2"]
    _, folder = go(brief, *more)
    (first,) = (folder / "wandb").glob("offline-run-*")
    wandb_id = elm.load_checkpoint(folder / "checkpoint_final.pt").state.wandb_id
    assert wandb_id and first.name.split("-")[3] == wandb_id
    go(brief, *more, "train.max_steps=3", "train.resume=auto")
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert {run.name.split("-")[3] for run in runs} == {wandb_id}
    logged = b""
    for run in runs:
        for path in run.glob("*.wandb"):
            logged += path.read_bytes()
    for word in (b"val_loss_shuffled", b"adapter_best", b"hidden_dim", b"grad_norm"):
        assert word in logged
    assert "W&B failed" not in capsys.readouterr().out
