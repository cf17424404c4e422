"""What only a GPU runs: attention by varlen_attn in bf16, memory, waits. Skipped without one."""

import numpy as np
import pytest
import torch
from conftest import (
    NO_TABLES,
    build_elm,
    go,
    limit_memory,
    make_data,
    make_llm,
    open_train,
)
from naive import elm_step, naive_step, token_rows
from transformers import AutoTokenizer

import elm

CUDA = elm.Runtime(0, 1, torch.device("cuda"))
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def parts(tmp_path, kind="qwen3", bf16=True, **shape):
    folder = make_llm(tmp_path / "llm", kind, **shape)
    prompt = elm.Prompt(AutoTokenizer.from_pretrained(folder))
    split = open_train(make_data(tmp_path / "data"), prompt, 2)
    return build_elm(folder, split, "cuda", bf16), split, folder


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text"])
@pytest.mark.parametrize("recomputed", [0, 2])
def test_packed_rows_agree_with_the_naive_reference(tmp_path, kind, head_dim, recomputed):
    """In fp32 by segments to 1e-4, in bf16 by varlen_attn to what bf16 can hold; Gemma's layers
    have sliding windows."""
    rows = np.arange(12)
    naive, split, folder = parts(tmp_path, kind, False, head_dim=head_dim)
    loss, gradient = naive_step(naive.llm, naive.adapter, [token_rows(split, rows)])
    for bf16, tolerance in ((False, 1e-4), (True, 5e-2)):
        model = build_elm(folder, split, "cuda", bf16)
        elm.check_llm(model)
        elm.recompute_layers(model.llm, recomputed)
        for budget in (100_000, 150):
            found, at_adapter, _ = elm_step(model, split, rows, budget, CUDA)
            assert abs(found - loss) / loss < tolerance
            assert (at_adapter - gradient).norm() / gradient.norm() < tolerance


def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch):
    """In the gradient of the soft tokens nothing waits; `train` waits where it says so."""
    model, split, _ = parts(tmp_path)
    elm_step(model, split, np.arange(12), 1000, CUDA)
    step = elm.prepare_step(split, 1000, CUDA, (0, 12, np.arange(12)))
    terms = elm.loss_terms(elm.LossConfig(), model, None)
    soft = model(torch.cat([batch["embeddings"] for _, batch in step.micros]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        elm.soft_gradient(model, soft, step.micros, terms, step.counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_trial_pass_needs_what_a_step_needs(tmp_path):
    model, split, _ = parts(tmp_path)
    terms = elm.loss_terms(elm.LossConfig(), model, None)
    assert elm.fits_memory(model, 512, 256, terms, CUDA)
    hog = torch.empty(int(torch.cuda.mem_get_info()[0] * 0.999), dtype=torch.uint8, device="cuda")
    assert not elm.fits_memory(model, 2**20, 2**20, terms, CUDA)
    del hog


@pytest.mark.parametrize("limit, setting, plan", [
    (8192, "auto", (8192, 0)), (4100, "auto", (4096, 0)), (2048, True, (2048, 2)),
    (1000, "auto", None)])  # fmt: skip
def test_the_plan_is_the_first_that_fits(tmp_path, monkeypatch, limit, setting, plan):
    model, _, _ = parts(tmp_path)
    overrides = ["data.max_seq_length=256", f"model.grad_checkpoint={elm.to_toml(setting)}"]
    cfg, terms = elm.load_config(None, overrides), elm.loss_terms(elm.LossConfig(), model, None)
    limit_memory(monkeypatch, limit)
    if not plan:
        with pytest.raises(torch.OutOfMemoryError):
            elm.plan_memory(cfg, model, terms, CUDA)
        return
    budget = elm.plan_memory(cfg, model, terms, CUDA)
    assert (budget, sum("forward" in vars(m) for m in model.llm.modules())) == plan


def test_train_end_to_end(settings):
    result, folder = go(settings, "model.bf16=true", "train.max_steps=4")
    assert result["step"] == 4 and (folder / "report.png").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus(settings, tmp_path):
    from test_distributed import launch, losses

    _, one = go(settings, f"output.dir={tmp_path / 'one'}")
    for stage in (0, 3):
        launch(tmp_path, NO_TABLES, *settings, "train.batch_size=8",
               f"deepspeed.zero_stage={stage}", f"output.dir={tmp_path / str(stage)}")
        assert losses(tmp_path / str(stage)) == pytest.approx(losses(one), rel=1e-4)
