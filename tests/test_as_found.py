"""People's models, data and machines as they are: what was once wrong without a word."""

import numpy as np
import pytest
from conftest import (
    NO_TABLES,
    RT,
    build_elm,
    go,
    make_llm,
    open_train,
    read_jsonl,
    read_table,
    rows_path,
    run,
    vectors_path,
    write_rows,
)
from test_data import PROMPT

import elm


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_as_other_systems_write_them(data_dir, dtype):
    """.npy tables, byte-order marks, ends of lines, null, integral floats, further fields."""
    table = read_table(data_dir).numpy().astype(dtype)
    vectors_path(data_dir).unlink()
    np.save(vectors_path(data_dir).with_suffix(".npy"), table)
    rows = [r | dict(embedding_file_idx=float(r["embedding_file_idx"]), text=None, id=[1])
            for r in read_jsonl(rows_path(data_dir))]  # fmt: skip
    write_rows(data_dir, "train", rows)
    path = rows_path(data_dir)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    split = open_train(data_dir, PROMPT)
    assert np.array_equal(split.vectors.numpy(), table) and split.vectors.numpy().dtype == dtype
    assert not split.rows["text"].any()
    assert split.rows["vector"].tolist() == [r["embedding_file_idx"] for r in rows]
    assert [r.response for r in split.read(range(40))] == [r["response"] for r in rows]
    texts = path.with_name("texts.txt")
    texts.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert [*elm.read_texts(texts)] == ["one", "two"]
    config = path.with_name("run.toml")
    config.write_bytes(b"\xef\xbb\xbftrain.lr = 1.0\n")
    assert elm.load_config(str(config)).train.lr == 1.0


def test_task_types_of_ones_own(settings, data_dir):
    for name in ("train", "val", "test"):
        rows = [r | {"task_type": "haiku"} if i % 2 else r
                for i, r in enumerate(read_jsonl(rows_path(data_dir, name)))]  # fmt: skip
        write_rows(data_dir, name, rows)
    with pytest.raises(elm.UserError, match="jsonl:2: unknown task_type 'haiku'"):
        go(settings)
    result, _ = go(settings, 'data.tasks=["haiku", "summary"]')
    assert result["tasks"]["haiku"]["rows"] == 20
    split = open_train(data_dir, PROMPT, tasks=("haiku", "summary"))
    assert {split.tasks[t] for t in split.rows["task"]} == {"haiku", "summary"}
    assert split.counts["rows"] + split.counts["other_tasks"] == 40
    with pytest.raises(elm.UserError, match="task_type 'haiku', did you mean haikus?"):
        open_train(data_dir, PROMPT, tasks=("haikus", "summary"))


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
    class Run:
        def finish(self, exit_code):
            self.ended = exit_code

    cfg = elm.load_config(None, [f"output.dir={tmp_path}"])
    log = elm.Log(cfg, elm.TrainState(), 1, RT)
    log.run = Run()
    try:
        with log:
            if error:
                raise error
    except BaseException as e:
        assert e is error
    assert log.run.ended == code


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
    cfg = elm.load_config()
    assert len(elm.validation_losses(model, split, cfg, RT, [], True, False)) == 3
    assert elm.validation_losses(model, split, cfg, RT, [15], True, False) == {}


def test_patience_ends_a_run_as_finished(settings, capsys):
    more = ["train.patience=2", "train.eval_steps=1", "train.max_steps=60", "train.lr=1.0",
            "train.warmup_steps=0"]  # fmt: skip
    result, folder = go(settings, *more)
    steps = [m["step"] for m in read_jsonl(folder / "metrics.jsonl") if "val_loss" in m]
    assert result["step"] == steps[-1] == result["adapter_step"] + 2 < 60
    again, _ = go(settings, *more, "train.resume=auto")
    assert again == result and "nothing to do" in capsys.readouterr().out


def test_both_llms_of_one_shape_are_told_apart(tmp_path):
    one, two = make_llm(tmp_path / "one"), make_llm(tmp_path / "two")
    llm = elm.load_llm(str(two), RT.device, False)
    assert elm.fingerprint(elm.load_llm(str(one), RT.device, True)) == elm.fingerprint(llm)
    next(iter(llm.parameters())).data += 0.01
    assert elm.fingerprint(elm.load_llm(str(one), RT.device, False)) != elm.fingerprint(llm)
