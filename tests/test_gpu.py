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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def make_parts(tmp_path, kind="qwen3", bf16=True, **shape):
    """(ELM on the GPU, split, the LLM's folder)."""
    folder = make_llm(tmp_path / "llm", kind, **shape)
    prompt = elm.Prompt(AutoTokenizer.from_pretrained(folder))
    split = open_train(make_data(tmp_path / "data"), prompt, 2)
    return build_elm(folder, split, "cuda", bf16), split, folder


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text"])
def test_packed_rows_agree_with_the_naive_reference(tmp_path, kind, head_dim):
    """In fp32 by segments to 1e-4; in bf16 by varlen_attn with at most twice the error that the
    naive loop itself has in bf16. Gemma's layers have sliding windows."""
    rows = np.arange(12)
    exact, split, folder = make_parts(tmp_path, kind, False, head_dim=head_dim)
    examples = token_rows(split, rows)
    loss, gradient = naive_step(exact.llm, exact.adapter, [examples])
    rounded = build_elm(folder, split, "cuda", bf16=True)
    _, rounded_gradient = naive_step(rounded.llm, rounded.adapter, [examples])
    own_error = relative_error(rounded_gradient, gradient)
    assert 0 < own_error < 0.2
    for bf16, loss_tolerance, tolerance in ((False, 1e-4, 1e-4), (True, 1e-2, 2 * own_error)):
        for share in (0, 1):
            model = build_elm(folder, split, "cuda", bf16)
            elm.check_llm(model)
            elm.recompute_layers(model.llm, share)
            for budget in (100_000, 150):
                found, at_adapter, _ = elm_step(model, split, rows, budget)
                assert found == pytest.approx(loss, rel=loss_tolerance)
                assert relative_error(at_adapter, gradient) < tolerance


def test_a_step_waits_for_the_device_once(tmp_path):
    """In the gradient of the soft tokens nothing waits; the Trainer waits where it says so."""
    model, split, _ = make_parts(tmp_path)
    rows = np.arange(12)
    elm_step(model, split, rows, 1000)  # whatever is compiled or allocated at first use
    step = elm.prepare_step(split, 1000, elm.RowsOfStep(0, len(rows), rows))
    soft_tokens = model(torch.cat([batch.embeddings for batch in step.batches]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        elm.soft_gradient(model, soft_tokens, step, elm.LossConfig(), None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_trial_pass_needs_what_a_step_needs(tmp_path):
    model, _, _ = make_parts(tmp_path)
    assert elm.fits_in_memory(model, 512, 256, elm.LossConfig(), None)
    free_bytes, _ = torch.cuda.mem_get_info()
    hog = torch.empty(int(free_bytes * 0.999), dtype=torch.uint8, device="cuda")
    assert not elm.fits_in_memory(model, 2**20, 2**20, elm.LossConfig(), None)
    del hog


@pytest.mark.parametrize("limit, setting, plan", [
    (8192, "auto", (8192, 0)),
    (4100, "auto", (4096, 0)),
    (2048, True, (2048, 2)),
    (1000, "auto", None),
])
def test_the_plan_is_the_first_that_fits(tmp_path, monkeypatch, limit, setting, plan):
    """A plan: (tokens of a micro-batch, layers that are recomputed)."""
    model, _, _ = make_parts(tmp_path)
    limit_memory(monkeypatch, limit)
    if plan is None:
        with pytest.raises(torch.OutOfMemoryError):
            elm.plan_memory(model, 256, setting, elm.LossConfig(), None)
        return
    budget = elm.plan_memory(model, 256, setting, elm.LossConfig(), None)
    recomputed = [layer for layer in model.llm.base_model.layers if "forward" in vars(layer)]
    assert (budget, len(recomputed)) == plan


def test_train_end_to_end(settings):
    result, folder = go(settings, "model.bf16=true", "train.max_steps=4")
    assert result["step"] == 4
    assert (folder / "report.png").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus(processes, settings, tmp_path):
    from test_distributed import launch, losses

    _, one = go(settings, f"output.dir={tmp_path / 'one'}")
    for stage in (0, 3):
        two = tmp_path / f"stage_{stage}"
        launch(tmp_path, NO_TABLES, *settings, "train.batch_size=8",
               f"deepspeed.zero_stage={stage}", f"output.dir={two}")
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
