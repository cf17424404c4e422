import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_data, make_llm, read_jsonl, rows_path, run
from naive import naive_step, token_rows
from safetensors import safe_open
from safetensors.torch import load_file
from torture import without_clock
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import elm

RT = elm.Runtime()


def go(settings, *more) -> tuple[dict, Path]:
    cfg = elm.load_config(None, [*settings, *more])
    return elm.train(cfg), Path(cfg.output.dir)


def final_state(folder: Path) -> dict:
    saved = torch.load(folder / "checkpoint_final.pt", weights_only=True)
    return {f"{kind}.{k}": v for kind in ("adapter", "optimizer") for k, v in saved[kind].items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(folder: Path) -> dict:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())}


def test_what_a_run_leaves(settings, tmp_path):
    result, folder = go(settings, f"output.log_file={tmp_path / 'log.txt'}")
    names = [
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "eval.json",
        "predictions.jsonl",
        "report.png",
    ]
    names += ["adapter_best.safetensors", "checkpoint_final.pt"]
    names += [f"adapter_step_{n}.safetensors" for n in (2, 4, 6)]
    names += [f"checkpoint_step_{n}.pt" for n in (2, 4, 6)]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    metrics = read_jsonl(folder / "metrics.jsonl")
    steps = [m for m in metrics if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) == {
        "step", "epoch", "loss", "lm_loss", "drift_loss", "lr", "grad_norm", "tokens_per_second",
        "memory_gib", "similarity",
    }  # fmt: skip
    assert [m["epoch"] for m in steps] == [0, 0, 0, 1, 1, 1]
    assert [m["lr"] for m in steps] == [
        elm.lr_at(n, 6, elm.load_config(None, settings).train) for n in range(6)
    ]
    evals = [m for m in metrics if "val_loss" in m]
    assert [m["step"] for m in evals] == [0, 3, 6]
    assert set(evals[0]) == {"step", "val_loss", "val_loss_shuffled"}
    assert json.loads((folder / "eval.json").read_text()) == result
    assert result["split"] == "test" and result["rows"] == 40 and len(result["tasks"]) == 13
    shuffled, ours, text = (result[k] for k in ("loss_shuffled", "loss", "loss_text"))
    if text < shuffled:
        assert result["carried"] == pytest.approx((shuffled - ours) / (shuffled - text))
    else:  # a random LLM that the text does not help
        assert "carried" not in result
    best = min(evals, key=lambda m: m["val_loss"])
    assert result["adapter_step"] == best["step"]
    predictions = read_jsonl(folder / "predictions.jsonl")
    assert len(predictions) == 6
    assert list(predictions[0]) == [
        "embedding_file_idx",
        "task_type",
        "query",
        "response",
        "prediction",
        "prediction_shuffled",
    ]
    again = elm.load_config(str(folder / "config.toml"))
    assert again == elm.load_config(None, [*settings, f"output.log_file={tmp_path / 'log.txt'}"])
    assert "# torch " in (folder / "config.toml").read_text()
    assert "val_loss" in (tmp_path / "log.txt").read_text()


def test_adapter_file_of_a_run_speaks(settings):
    _, folder = go(settings)
    model = elm.ELM.load(folder / "adapter_best.safetensors")
    data = elm.open_vectors(elm.split_paths(elm.load_config(None, settings).data, "test")[0])
    predictions = read_jsonl(folder / "predictions.jsonl")
    vectors = torch.stack([data[p["embedding_file_idx"]] for p in predictions])
    spoken = model.generate(vectors, [p["query"] for p in predictions], max_new_tokens=5)
    assert spoken == [p["prediction"] for p in predictions]
    with safe_open(folder / "adapter_best.safetensors", "pt") as f:
        about = json.loads(f.metadata()["elm"])
    assert about["adapter"]["d_emb"] == 12 and about["identity"]["llm"] and about["step"] >= 0


def parts_of(settings, *more):
    """The pieces that `train` puts together, for a closer look."""
    cfg = elm.load_config(None, [*settings, *more])
    rt = elm.start_runtime(cfg)
    prompt = elm.Prompt.of(elm.load_pretrained(elm.AutoTokenizer, cfg.model.llm, "model.llm"))
    data = elm.open_data(cfg, ("train", "val", "test"), prompt, cfg.model.tokens, rt)
    llm = elm.load_llm(cfg.model.llm, rt.device, cfg.model.bf16)
    model, _ = elm.build_model(cfg, llm, data["train"], prompt, rt)
    return cfg, data["train"], model


def update(engine, split, rows) -> float:
    """One step, of several micro-batches where there are many rows, as the loop takes it."""
    *_, labels, micros = elm.plan_step(split, 700, RT, (0, len(rows), rows))
    assert len(micros) > 3 or len(rows) < 20
    soft = engine(torch.cat([batch["embeddings"] for _, batch in micros]))
    (nll, _), gradient = elm.soft_gradient(engine.module, soft, micros)
    engine.backward((soft * gradient).sum() / labels)
    elm.take_step(engine, 1e-2, 0.05)
    return nll.item() / labels


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_step_of_the_engine_is_the_naive_step(settings, stage):
    """Several micro-batches: loss, clipped AdamW update, the LLM's bytes; at each ZeRO stage."""
    import deepspeed

    cfg, split, model = parts_of(
        settings, f"deepspeed.zero_stage={stage}", "train.max_grad_norm=0.05"
    )
    rows = np.arange(40)
    llm = elm.load_llm(cfg.model.llm, RT.device, bf16=False)
    adapter = elm.Adapter(**model.adapter.settings)
    adapter.load_state_dict(model.adapter.state_dict())
    adam = torch.optim.AdamW(
        adapter.parameters(), lr=cfg.train.lr, weight_decay=cfg.train.weight_decay
    )
    before = {k: v.clone() for k, v in model.llm.state_dict().items()}
    engine = elm.start_engine(cfg, model)
    engine.train()
    for _ in range(2):
        loss, _ = naive_step(llm, adapter, [token_rows(split, rows, 1)])
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.05)
        adam.step()
        total = update(engine, split, rows)
        assert total == pytest.approx(loss, rel=1e-5)
    weights, moments = elm.gather_state(engine)
    assert moments["step"] == 2
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(weights[name], p.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            moments[f"{name}.exp_avg"], adam.state[p]["exp_avg"], rtol=1e-4, atol=1e-7
        )
    frozen = list(model.llm.parameters())
    with deepspeed.zero.GatheredParameters(frozen, enabled=stage == 3):
        assert all(torch.equal(v, before[k]) for k, v in model.llm.state_dict().items())
    assert all(p.grad is None for p in frozen)
    optimized = {id(p) for g in engine.adam.param_groups for p in g["params"]}
    assert not optimized & {id(p) for p in model.llm.parameters()}
    # Another engine that starts from the gathered state takes the same third step.
    other = parts_of(settings, f"deepspeed.zero_stage={stage}", "train.max_grad_norm=0.05")[2]
    other.adapter.load_state_dict(weights)
    twin = elm.start_engine(cfg, other)
    elm.restore_moments(twin, moments)
    assert same(moments, elm.gather_state(twin)[1])
    for each in (engine, twin):
        each.train()
        update(each, split, rows[:9])
    third, fourth = elm.gather_state(engine), elm.gather_state(twin)
    assert same(third[0], fourth[0]) and same(third[1], fourth[1])
    assert not same(third[0], weights)
    # Where found_inf is 1, the update leaves weights, moments and their step as they are.
    engine.adam.found_inf = torch.tensor(1.0)
    update(engine, split, rows[9:18])
    fifth = elm.gather_state(engine)
    assert same(fifth[0], third[0]) and same(fifth[1], third[1])
    engine.adam.found_inf = torch.tensor(0.0)
    update(engine, split, rows[9:18])
    assert not same(elm.gather_state(engine)[0], third[0])


def test_stopped_and_resumed_equals_never_stopped(settings, tmp_path):
    """With dropout, over an epoch boundary, with metrics and files written after the checkpoint,
    as a killed run leaves them; six steps are two epochs."""
    more = ["model.dropout=0.3", "train.logging_steps=4"]
    _, whole = go(settings, *more)
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in (
        "metrics.jsonl",
        "config.toml",
        "adapter_best.safetensors",
        "checkpoint_step_2.pt",
    ):
        shutil.copy(whole / name, killed)
    (killed / ".checkpoint_step_4.pt.tmp").write_bytes(b"half")
    with open(killed / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "val_l')
    go(settings, *more, f"output.dir={killed}", "train.resume=auto")
    assert same(final_state(killed), final_state(whole))
    assert without_clock(killed) == without_clock(whole)
    for name in (
        "adapter_best.safetensors",
        "adapter_step_6.safetensors",
        "eval.json",
        "predictions.jsonl",
    ):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_resume_of_a_finished_run_is_a_no_op(settings, capsys):
    result, folder = go(settings)
    before = snapshot(folder)
    again, _ = go(settings, "train.resume=auto")
    assert again == result and snapshot(folder) == before
    assert "nothing to do" in capsys.readouterr().out


def test_finished_run_killed_before_its_report(settings):
    result, folder = go(settings)
    wanted = (folder / "eval.json").read_bytes()
    (folder / "eval.json").unlink()
    again, _ = go(settings, "train.resume=auto")
    assert again == result and (folder / "eval.json").read_bytes() == wanted


def test_report_of_fewer_steps_is_not_taken_for_that_of_the_longer_run(settings):
    _, folder = go(settings)
    old = (folder / "eval.json").read_bytes()
    wanted, _ = go(settings, "train.resume=auto", "train.max_steps=8")
    (folder / "eval.json").write_bytes(old)  # as if killed before the report of step 8
    again, _ = go(settings, "train.resume=auto", "train.max_steps=8")
    assert again == wanted and again["step"] == 8


def test_resume_of_more_steps_than_are_wanted_goes_to_the_report(settings):
    _, folder = go(settings)
    for name in ("eval.json", "checkpoint_final.pt"):
        (folder / name).unlink()
    result, _ = go(settings, "train.resume=auto", "train.max_steps=3")
    assert result["step"] == 6
    assert json.loads((folder / "eval.json").read_text()) == result


def test_resume_by_path_into_another_folder(settings, tmp_path):
    """From an earlier step: allowed into a new folder, with the best adapter of that time, and
    refused where the folder holds a run of its own."""
    _, one = go(settings)
    start = f"train.resume={one / 'checkpoint_step_4.pt'}"
    result, two = go(settings, start, f"output.dir={tmp_path / 'two'}", "train.lr=1e-9")
    best = [m for m in read_jsonl(one / "metrics.jsonl") if "val_loss" in m and m["step"] <= 4]
    wanted = min(best, key=lambda m: m["val_loss"])["step"]
    assert result["adapter_step"] in (wanted, 6) and (two / "adapter_best.safetensors").exists()
    before = snapshot(two)
    with pytest.raises(elm.UserError, match="holds a run already"):
        go(settings, start, f"output.dir={two}")
    assert snapshot(two) == before


def test_newest_is_the_one_of_most_steps(settings, capsys):
    _, folder = go(settings)
    os.utime(folder / "checkpoint_step_2.pt")
    (folder / "checkpoint_final.pt").write_bytes(b"")
    (folder / "eval.json").unlink()
    go(settings, "train.resume=auto")
    out = capsys.readouterr().out
    assert "resumed after step 6" in out and "passed over" in out


def test_auto_resume_without_a_checkpoint_starts_afresh(settings):
    result, folder = go(settings, "train.resume=auto")
    assert result["step"] == 6 and (folder / "checkpoint_final.pt").exists()


def test_a_longer_run_goes_on_from_the_final_checkpoint(settings):
    go(settings)
    result, folder = go(settings, "train.resume=auto", "train.max_steps=8")
    assert result["step"] == 8
    assert [m["step"] for m in read_jsonl(folder / "metrics.jsonl") if "loss" in m] == list(
        range(1, 9)
    )


def test_broken_newest_checkpoint_is_passed_over(settings, capsys):
    _, folder = go(settings)
    wanted = final_state(folder)
    for name in ("checkpoint_final.pt", "checkpoint_step_6.pt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])
    (folder / "eval.json").unlink()
    go(settings, "train.resume=auto")
    out = capsys.readouterr().out
    assert out.count("passed over") == 2 and "resumed after step 4" in out
    assert same(final_state(folder), wanted)


@pytest.mark.parametrize(
    "more",
    [
        ("train.batch_size=8", "train.grad_accum=2"),
        ("data.num_workers=0",),
        ("data.num_workers=3",),
        ("model.grad_checkpoint=true",),
        ("train.logging_steps=3",),
    ],
)
def test_what_must_not_matter(settings, tmp_path, more):
    _, one = go(settings)
    _, two = go(settings, *more, f"output.dir={tmp_path / 'two'}")
    assert same(final_state(one), final_state(two))


def test_standardize_takes_the_training_vectors(settings):
    with_it, without = (
        parts_of(settings, f"model.standardize={x}")[2].adapter for x in ("true", "false")
    )
    table = elm.open_vectors(elm.split_paths(elm.load_config(None, settings).data, "train")[0])
    torch.testing.assert_close(with_it.mean, table.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(with_it.std, table.std(0, correction=0), rtol=1e-5, atol=1e-6)
    assert (without.mean == 0).all() and (without.std == 1).all()


@pytest.mark.parametrize("more", ["train.seed=43", "model.dropout=0.3", "train.lr=2e-2"])
def test_what_must_matter(settings, tmp_path, more):
    _, one = go(settings)
    _, two = go(settings, more, f"output.dir={tmp_path / 'two'}")
    assert not same(final_state(one), final_state(two))


def test_dropout_differs_from_step_to_step(settings, monkeypatch):
    """CPU generators keep 32 bits of a seed: a step or rank above those would repeat the mask."""
    seeds = []
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    go(settings, "model.dropout=0.3")
    used = seeds[-6:]
    assert len(set(used)) == 6 and max(used) < 2**32


def test_epochs_where_no_max_steps(settings):
    kept = [s for s in settings if not s.startswith("train.max_steps")]
    result, folder = go(kept, "train.epochs=2", "train.batch_size=15", "train.save_steps=100")
    assert result["step"] == 2 * 3  # 40 rows: 15, 15 and 10
    metrics = [m for m in read_jsonl(folder / "metrics.jsonl") if "loss" in m]
    assert [m["epoch"] for m in metrics] == [0, 0, 0, 1, 1, 1]


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(elm.UserError, match="model.bf16: not on Tesla T4, set model.bf16=false"):
        elm.start_runtime(elm.load_config())


def test_bf16_llm_and_fp32_adapter(settings):
    _, folder = go(settings, "model.bf16=true")
    assert {v.dtype for v in final_state(folder).values()} == {torch.float32}
    assert {v.dtype for v in load_file(folder / "adapter_best.safetensors").values()} == {
        torch.float32
    }
    assert elm.ELM.load(folder / "adapter_best.safetensors").llm.dtype == torch.bfloat16


def test_without_text_there_is_no_ceiling(settings, data_dir):
    for split in ("train", "val", "test"):
        rows = [
            {k: v for k, v in r.items() if k != "text"}
            for r in read_jsonl(rows_path(data_dir, split))
        ]
        rows_path(data_dir, split).write_text("".join(json.dumps(r) + "\n" for r in rows))
    result, _ = go(settings)
    assert "carried" not in result and "loss_text" not in result and "loss_shuffled" in result


def test_validation_where_there_is_no_test_split(settings, data_dir):
    for path in elm.split_paths(elm.load_config(None, settings).data, "test"):
        path.unlink()
    result, folder = go(settings)
    assert result["split"] == "val"
    best = min(m["val_loss"] for m in read_jsonl(folder / "metrics.jsonl") if "val_loss" in m)
    assert result["loss"] == pytest.approx(best, rel=1e-9)


def test_unequal_width_of_splits(settings, data_dir, tmp_path):
    other = make_data(tmp_path / "other", width=13)
    name = "embeddings/val_embeddings.safetensors"
    shutil.copy(other / name, data_dir / name)
    with pytest.raises(elm.UserError, match="data.dir: .*differ in width.*13"):
        go(settings)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_is_not_finite_stops_before_the_update(settings, tmp_path, stage):
    """Whether the host looks after each step or after ten: the same step and rows, no update."""
    more = ["train.lr=1e30", "train.warmup_steps=0", "train.max_steps=40", "train.eval_steps=40"]
    more += ["train.save_steps=1", f"deepspeed.zero_stage={stage}"]
    told = []
    for often in (["train.save_steps=1"], ["train.save_steps=40", "train.logging_steps=10"]):
        with pytest.raises(
            elm.UserError, match=r"step \d: the loss or its gradient is not finite.*jsonl:\d+,\d+"
        ) as e:
            go(settings, *more, *often, f"output.dir={tmp_path / often[0]}")
        told.append(str(e.value))
    assert told[0] == told[1]
    step = int(told[0].split("step ")[1].split(":")[0])
    folder = tmp_path / "train.save_steps=1"
    saved = torch.load(folder / f"checkpoint_step_{step - 1}.pt", weights_only=True)
    assert saved["state"]["step"] == step - 1 >= 1
    assert not list((tmp_path / "train.save_steps=40").glob("checkpoint*"))


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("part", [0, 1])
def test_one_bad_step_stops_all_further_updates(settings, monkeypatch, stage, part):
    """Loss (0) or gradient (1) of step 3 alone is NaN; the host looks after step 8, and names 3."""
    soft_gradient, calls = elm.soft_gradient, []

    def spoiled(*arguments):
        result = [x.clone() for x in soft_gradient(*arguments)]
        calls.append(1)
        if len(calls) == 3:
            result[part].view(-1)[0] = torch.nan
        return result

    monkeypatch.setattr(elm, "soft_gradient", spoiled)
    more = ["train.max_steps=12", "train.logging_steps=8", f"deepspeed.zero_stage={stage}"]
    engines, start = [], elm.start_engine
    monkeypatch.setattr(elm, "start_engine", lambda *a: engines.append(start(*a)) or engines[-1])
    with pytest.raises(elm.UserError, match="step 3: the loss or its gradient is not finite"):
        go(settings, *more, "train.eval_steps=12", "train.save_steps=12")
    assert len(calls) == 8
    weights, moments = elm.gather_state(engines[0])
    assert all(w.isfinite().all() for w in weights.values()) and moments["step"] == 2


def small_memory(monkeypatch, limit: int, from_pass: int = 0):
    """The LLM's layers run out of memory, as torch says it, at more than `limit` tokens."""
    passes, forward = [], Qwen3MLP.forward

    def limited(self, x):
        passes.append(x.shape[1])
        if torch.is_grad_enabled() and x.shape[1] > limit and len(passes) > from_pass:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, x)

    monkeypatch.setattr(Qwen3MLP, "forward", limited)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_out_of_memory_halves_the_micro_batches_once(
    settings, tmp_path, monkeypatch, capsys, stage
):
    """In the middle of a step, after other micro-batches of it: the same adapter in the end."""
    settings = [*settings, f"deepspeed.zero_stage={stage}"]
    whole = go(settings, f"output.dir={tmp_path / 'whole'}")[1]
    assert "out of memory" not in capsys.readouterr().out
    sizes = elm.MICRO_TOKENS["cpu"]
    small_memory(monkeypatch, sizes // 2, from_pass=40)
    halved = go(settings)[1]
    assert capsys.readouterr().out.count(f"micro-batches have {sizes // 2} tokens") == 1
    a, b = final_state(whole), final_state(halved)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)
    lines = [[m.get("loss", m.get("val_loss")) for m in without_clock(f)] for f in (whole, halved)]
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


def test_out_of_memory_again_names_the_lines_to_change(settings, tmp_path, monkeypatch, capsys):
    small_memory(monkeypatch, 100)
    config = tmp_path / "run.toml"
    config.write_text("")
    assert elm.main([str(config), *settings]) == 2
    error = capsys.readouterr().err
    for line in ("model.grad_checkpoint = true", "data.max_seq_length = ", "zero_stage = 3"):
        assert line in error
    assert "Traceback" not in error and not list((tmp_path / "out").glob("checkpoint*"))


def test_sigterm_saves_and_leaves_at_the_step_boundary(settings, tmp_path):
    def stop():
        path = tmp_path / "out" / "metrics.jsonl"
        end = time.time() + 60
        while time.time() < end and not (path.exists() and path.read_bytes().count(b"\n") >= 4):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(SystemExit) as e:
        go(settings, "train.max_steps=500", "train.eval_steps=500", "train.save_steps=500")
    thread.join()
    assert e.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    (checkpoint,) = (tmp_path / "out").glob("checkpoint_step_*.pt")
    saved = torch.load(checkpoint, weights_only=True)["state"]
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert saved["step"] == metrics[-1]["step"] == int(checkpoint.stem.split("_")[-1])


def test_wandb_offline_one_run_that_goes_on(settings, tmp_path, capsys):
    pytest.importorskip("wandb")
    more = ["wandb.enabled=true", "wandb.run_name=a", "train.max_steps=2"]
    _, folder = go(settings, *more)
    (first,) = (folder / "wandb").glob("offline-run-*")
    saved = torch.load(folder / "checkpoint_final.pt", weights_only=True)["state"]
    assert saved["wandb_id"] and first.name.split("-")[3] == saved["wandb_id"]
    go(settings, *more, "train.max_steps=4", "train.resume=auto")
    runs = list((folder / "wandb").glob("offline-run-*"))
    assert {r.name.split("-")[3] for r in runs} == {saved["wandb_id"]}
    logged = b"".join(r.read_bytes() for run in runs for r in run.glob("*.wandb"))
    for word in (b"val_loss_shuffled", b"adapter_best", b"hidden_dim", b"grad_norm"):
        assert word in logged
    assert "W&B failed" not in capsys.readouterr().out


def test_wandb_failure_does_not_stop_a_run(settings, capsys):
    pytest.importorskip("wandb")
    result, _ = go(settings, "wandb.enabled=true", "wandb.project=a/b")  # a name that W&B refuses
    assert result["step"] == 6 and "W&B failed, training goes on" in capsys.readouterr().out


@pytest.fixture
def bad_cases(tmp_path, data_dir, llm_dir, settings):
    """{case: (overrides, words of the one line)}; each run must leave the data as it was."""
    out = tmp_path / "out"
    no_vectors = make_data(tmp_path / "no_vectors")
    elm.split_paths(elm.DataConfig(dir=str(no_vectors)), "train")[0].unlink()
    broken = make_data(tmp_path / "broken")
    path = rows_path(broken)
    path.write_text(path.read_text().replace('"query"', '"quarry"', 1))
    wide = make_llm(tmp_path / "wide", "llama")
    return {
        "no data": (
            ["data.dir=/nowhere"],
            "/nowhere/embeddings/train_embeddings.safetensors: there is no such file",
        ),
        "no vectors": ([f"data.dir={no_vectors}"], f"elm: {no_vectors}"),
        "missing field": (
            [f"data.dir={broken}"],
            "train_synthesis.jsonl:1: field 'query' is missing",
        ),
        "no task": (
            ['data.tasks=["summary"]', f"data.dir={make_data(tmp_path / 'few', 3)}"],
            "no row of",
        ),
        "no llm": (["model.llm=/nowhere/llm"], "model.llm: no folder /nowhere/llm"),
        "empty llm": ([f"model.llm={tmp_path}"], "model.llm: cannot load"),
        "prompt": (["data.max_seq_length=20"], "train_synthesis.jsonl:1: the prompt takes all of"),
        "reach": (["data.max_seq_length=4096"], "data.max_seq_length = 4096"),
        "key": (["train.lrr=1"], "train.lrr: unknown key, did you mean train.lr?"),
        "type": (["train.lr=fast"], "train.lr = 'fast'"),
        "held": ([], f"output.dir: {out} holds a run already"),
        "resume dims": (
            ["train.resume=auto", "model.hidden_dim=16"],
            "model.hidden_dim was 24 in training and is 16 here",
        ),
        "resume llm": (
            ["train.resume=auto", "train.max_steps=8", f"model.llm={wide}"],
            "train.resume: the hash of the LLM's weights was",
        ),
        "resume none": (["train.resume=/nowhere/checkpoint_step_2.pt"], "there is no such file"),
        "resume other": ([f"train.resume={path}"], "no whole checkpoint"),
    }


def test_bad_input_is_one_line_and_exit_code_2(settings, bad_cases, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text("")
    assert elm.main([str(config), *settings]) == 0
    before = snapshot(tmp_path / "out")
    for case, (overrides, words) in bad_cases.items():
        capsys.readouterr()
        if case not in ("held", "resume dims", "resume llm"):
            overrides = [*overrides, f"output.dir={tmp_path / case.replace(' ', '_')}"]
        assert elm.main([str(config), *settings, *overrides]) == 2, case
        lines = capsys.readouterr().err.splitlines()
        lines = [x for x in lines if x and not x.startswith(("Loading weights", "\r"))]
        assert len(lines) == 1 and lines[0].startswith("elm: ") and words in lines[0], (case, lines)
        assert snapshot(tmp_path / "out") == before, case


@pytest.mark.slow
def test_command_line_of_its_own_process(settings, tmp_path, capsys):
    assert elm.main([]) == 2 and "deepspeed elm.py train.toml" in capsys.readouterr().out
    assert elm.main(["--help"]) == 0
    done = run("missing.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "elm: missing.toml: No such file or directory\n"
    config = tmp_path / "run.toml"
    config.write_text("")
    done = run(config, *settings)
    assert done.returncode == 0, done.stderr
    assert "shuffled   vectors      text" in done.stdout
    assert done.stdout.count("prediction  ") == 5
