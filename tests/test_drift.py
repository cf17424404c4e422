"""The drift loss and its probe, against plain PyTorch on padded batches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_jsonl
from naive import naive_batch, naive_loss, token_rows
from test_train import final_state, go, parts_of, same

import elm

RT = elm.Runtime()


def test_gradient_of_the_drift_in_double_precision():
    torch.manual_seed(0)
    probe = elm.Probe(torch.randn(5, 3, dtype=torch.double), torch.randn(5, dtype=torch.double))
    states = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    vectors = torch.randn(4, 3, dtype=torch.double)
    assert (probe.drift(states, vectors, 1.0) > 0).all()
    assert torch.autograd.gradcheck(lambda x: probe.drift(x, vectors, 1.0), (states,))


def test_no_drift_at_the_target_and_beyond():
    torch.manual_seed(0)
    probe = elm.Probe(torch.randn(5, 3), torch.randn(5))
    states = torch.randn(6, 5, requires_grad=True)
    seen = ((states - probe.center) @ probe.matrix).detach()
    for vectors, target, expected in (
        (seen, 1.0, 0.0), (7 * seen, 0.8, 0.0), (-seen, 0.8, 1.8), (-seen, -1.0, 0.0)
    ):  # fmt: skip
        drift = probe.drift(states, vectors, target)
        assert drift.shape == (6,) and torch.allclose(drift, torch.full((6,), expected), atol=1e-6)
    probe.drift(states, seen, 0.9).sum().backward()
    assert not states.grad.any()  # it asks for no more than the target


def mean_states(llm, adapter, examples) -> torch.Tensor:
    """[n, D]: the LLM's last hidden states, averaged over each response, from a padded batch."""
    batch, mask, labels = naive_batch(examples)
    embeds = llm.get_input_embeddings()(batch.clamp(min=0))
    if adapter is not None:
        soft = adapter(torch.stack([v for _, _, v in examples]).float())
        embeds = embeds.masked_scatter((batch == -1)[..., None], soft.to(embeds.dtype))
    states = llm.base_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    said = (labels != -100)[..., None]
    return (states * said).sum(1) / said.sum(1)


@pytest.mark.parametrize("tokens", [1, 3])
def test_loss_and_gradient_are_the_naive_ones(settings, tokens):
    """Width 12 against 32; each loss over its own number: response tokens, examples."""
    cfg, split, model = parts_of(settings, f"model.tokens={tokens}")
    rows, weight, target = np.arange(40), 0.7, 0.9
    probe = elm.Probe(torch.randn(32, 12), torch.randn(32), torch.randn(12))
    examples = token_rows(split, rows, tokens)
    labels = sum(response for _, response, _ in examples)
    llm, adapter = elm.load_llm(cfg.model.llm, RT.device, False), model.adapter
    nll = naive_loss(llm, adapter, examples)
    vectors = (split.vectors.float() - adapter.mean) / adapter.std
    sources = vectors[torch.tensor([int(split.rows[i]["vector"]) for i in rows])]
    seen = (mean_states(llm, adapter, examples) - probe.center) @ probe.matrix
    drift = F.relu(target - F.cosine_similarity(seen, sources - probe.mean)).sum()
    parameters = list(adapter.parameters())
    expected = torch.autograd.grad(nll / labels + weight * drift / len(rows), parameters)
    *_, count, micros = elm.plan_step(split, 700, RT, (0, 40, rows))
    assert len(micros) > 3 and count == labels
    soft = model(torch.cat([batch["embeddings"] for _, batch in micros]))
    scale = weight * labels / len(rows)
    totals, at_soft = elm.soft_gradient(model, soft, micros, probe, target, scale)
    assert totals.tolist() == pytest.approx([nll.item(), drift.item()], rel=1e-5)
    ours = torch.autograd.grad((soft * at_soft).sum() / labels, parameters)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


@pytest.mark.parametrize("standardize", ["true", "false"])
def test_the_probe_is_a_ridge_regression_on_responses_read_alone(settings, capsys, standardize):
    _, split, model = parts_of(settings, f"model.standardize={standardize}")
    probe = elm.fit_probe(model, split, RT)
    states, vectors = [], []
    for row in split.rows:
        end = row["start"][0] + row["length"][0]
        ids = torch.from_numpy(split.ids[end - row["response"] : end].astype("int64"))
        with torch.no_grad():
            states.append(model.llm.base_model(input_ids=ids[None]).last_hidden_state[0].mean(0))
        vectors.append((split.vectors[int(row["vector"])] - model.adapter.mean) / model.adapter.std)
    used = sorted(set(split.rows["vector"].tolist()))
    held = torch.tensor([used.index(v) % 10 == 9 for v in split.rows["vector"].tolist()])
    x, y = torch.stack(states).double(), torch.stack(vectors).double()
    fit = x[~held] - x[~held].mean(0)
    gram = fit.T @ fit
    mean = y[~held].mean(0)
    matrix = torch.linalg.inv(gram + 0.01 * gram.trace() / 32 * torch.eye(32)) @ fit.T
    matrix = matrix @ (y[~held] - mean)
    assert torch.allclose(probe.center.double(), x[~held].mean(0), atol=1e-5)
    assert torch.allclose(probe.mean.double(), mean, atol=1e-5)
    assert (probe.matrix - matrix).norm() < 1e-4 * matrix.norm()
    told = capsys.readouterr().out
    assert f"drift probe of {int((~held).sum())} rows; on {int(held.sum())} held-out ones" in told
    seen = (x - x[~held].mean(0)) @ matrix
    cosine = F.cosine_similarity(seen, y - mean)[held].mean()
    r2 = 1 - (y - mean - seen)[held].square().sum() / (y - mean)[held].square().sum()
    assert f"R² {r2:.3f}, cosine {cosine:.3f}" in told


def test_a_planted_map_is_found(settings, capsys):
    """Vectors that are a linear map of the states: the held-out fit must say so."""
    _, split, model = parts_of(settings)
    states = []
    for row in split.rows:
        end = row["start"][0] + row["length"][0]
        ids = torch.from_numpy(split.ids[end - row["response"] : end].astype("int64"))
        with torch.no_grad():
            states.append(model.llm.base_model(input_ids=ids[None]).last_hidden_state[0].mean(0))
    torch.manual_seed(0)
    rows = split.rows.copy()
    rows["vector"] = np.arange(len(rows))
    planted = (torch.stack(states) - torch.stack(states).mean(0)) @ torch.randn(32, 3)
    planted = F.pad(planted, (0, 9))
    model.adapter.mean.zero_(), model.adapter.std.fill_(1.0)
    elm.fit_probe(model, split._replace(rows=rows, vectors=planted), RT)
    assert float(capsys.readouterr().out.split("cosine ")[1]) > 0.9


@pytest.mark.parametrize("vectors", [[0, 10, 20, 30], [0, 1], [0] * 39 + [7]])
def test_a_probe_of_few_or_odd_vectors(settings, vectors):
    _, split, model = parts_of(settings)
    rows = split.rows.copy()[: len(vectors)]
    rows["vector"] = vectors
    wide = split._replace(rows=rows, vectors=split.vectors.repeat(4, 1))
    assert all(torch.isfinite(t).all() for t in elm.fit_probe(model, wide, RT))


def test_what_is_logged(settings):
    """loss = lm_loss + weight * drift_loss; without a weight there is no drift and no probe."""
    drifting = ["loss.drift_weight=0.5", "loss.drift_target=0.9", "train.logging_steps=2"]
    _, folder = go(settings, *drifting)
    steps = [m for m in read_jsonl(folder / "metrics.jsonl") if "loss" in m]
    assert len(steps) == 3
    for m in steps:
        assert m["loss"] == pytest.approx(m["lm_loss"] + 0.5 * m["drift_loss"])
        assert 0 < m["drift_loss"] <= 1.9
    _, other = go(settings, f"output.dir={folder.parent / 'other'}")
    steps = [m for m in read_jsonl(other / "metrics.jsonl") if "loss" in m]
    assert all(m["drift_loss"] == 0 and m["loss"] == m["lm_loss"] for m in steps)
    assert torch.load(other / "checkpoint_final.pt", weights_only=True)["probe"] is None


def test_resumed_with_the_same_probe_to_the_same_bytes(settings, tmp_path, monkeypatch):
    settings += ["loss.drift_weight=0.5", "train.logging_steps=4"]  # resume between two log lines
    _, whole = go(settings)
    start = whole / "checkpoint_step_2.pt"
    monkeypatch.setattr(elm, "fit_probe", None)  # it is in the checkpoint
    _, resumed = go(settings, f"train.resume={start}", f"output.dir={tmp_path / 'resumed'}")
    assert same(final_state(whole), final_state(resumed))
    logs = [[m["drift_loss"] for m in read_jsonl(f / "metrics.jsonl") if "drift_loss" in m]
            for f in (whole, resumed)]  # fmt: skip
    assert logs[0] == logs[1]
    probes = [torch.load(f / "checkpoint_final.pt", weights_only=True)["probe"]
              for f in (whole, resumed)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*probes, strict=True))


def test_a_drift_weight_matters(settings, tmp_path):
    _, one = go(settings)
    _, two = go(settings, "loss.drift_weight=0.5", f"output.dir={tmp_path / 'two'}")
    assert not same(final_state(one), final_state(two))
