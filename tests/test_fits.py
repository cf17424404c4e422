"""The two losses, and what is fitted in closed form, the drift's probe and the warm start, against
plain PyTorch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    PROMPT,
    build_elm,
    go,
    make_data,
    open_train,
    read_jsonl,
    rows_path,
    write_rows,
)
from naive import naive_cosine, naive_loss, naive_ridge, token_rows
from test_train import final_state, same_tree

import elm


@pytest.fixture
def parts(llm_dir, data_dir):
    """(ELM, its train split): vectors of width 12, an LLM of 32, 3 soft tokens."""
    split = open_train(data_dir, PROMPT, 3)
    return build_elm(llm_dir, split), split


# ------------------------------------------------------------------ the losses


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("weight", [0.7, 0.0, None])  # None: without a probe
def test_losses_and_gradient_are_the_naive_ones(parts, weight):
    """Cross-entropy over the number of labels, drift over that of rows; no drift at the target and
    beyond it."""
    model, split = parts
    row_ids = np.arange(40)
    examples = token_rows(split, row_ids)
    parameters = list(model.adapter.parameters())
    probe = elm.Probe(torch.randn(32, 12), torch.randn(32), torch.randn(12))
    cfg = elm.LossConfig(drift_weight=weight or 0.0, drift_target=-0.4)

    num_labels = sum(n for _, n, _ in examples)
    nll = naive_loss(model.llm, model.adapter, examples)
    cosine = naive_cosine(model.llm, model.adapter, examples, probe)
    assert 5 < (cosine < -0.4).sum() < 35
    drift = F.relu(-0.4 - cosine).sum()
    wanted = nll / num_labels + cfg.drift_weight * drift / 40
    wanted_gradient = flat(torch.autograd.grad(wanted, parameters))

    step = elm.prepare_step(split, 700, elm.RowsOfStep(0, 40, row_ids))
    assert len(step.batches) > 3 and step.num_labels == num_labels
    soft_tokens = model(torch.cat([batch.embeddings for batch in step.batches]))
    given_probe = None if weight is None else probe
    sums, at_soft_tokens = elm.soft_gradient(model, soft_tokens, step, cfg, given_probe)
    assert sums.nll.item() == pytest.approx(nll.item(), rel=1e-5)
    assert sums.drift.item() == (0 if weight is None else pytest.approx(drift.item(), rel=1e-5))
    gradient = flat(torch.autograd.grad(soft_tokens, parameters, at_soft_tokens))
    assert (gradient - wanted_gradient).norm() < 1e-5 * wanted_gradient.norm()


def states_alone(model, split) -> torch.Tensor:
    """[N, D]: the LLM's mean last hidden state over each response, read without a prompt."""
    states = []
    for ids, num_labels, _ in token_rows(split, range(len(split))):
        with torch.no_grad():
            out = model.llm.base_model(input_ids=ids[None, -num_labels:])
        states.append(out.last_hidden_state[0].mean(0))
    return torch.stack(states)


@pytest.mark.parametrize("standardize", [True, False])
def test_the_probe_is_a_ridge_regression_on_responses(llm_dir, data_dir, capsys, standardize):
    split = open_train(data_dir, PROMPT)
    model = build_elm(llm_dir, split, standardize=standardize)
    probe = elm.fit_probe(model, split)
    vector_ids = split.index["vector_id"]
    x = states_alone(model, split).double()
    embeddings = split.embeddings(vector_ids)
    y = ((embeddings - model.adapter.mean) / model.adapter.std).double()
    numbers = np.searchsorted(np.unique(vector_ids), vector_ids)
    heldout = torch.from_numpy(numbers % 10 == 9)
    fit, _ = naive_ridge(x, y, heldout)
    assert torch.allclose(probe.hidden_mean.double(), fit.x_mean, atol=1e-5)
    assert torch.allclose(probe.embedding_mean.double(), fit.y_mean, atol=1e-5)
    assert (probe.matrix - fit.weights).norm() < 1e-4 * fit.weights.norm()

    projected = (x - fit.x_mean) @ fit.weights
    cosine = F.cosine_similarity(projected, y - fit.y_mean)[heldout].mean()
    num_fitted = int((~heldout).sum())
    num_heldout = int(heldout.sum())
    said = capsys.readouterr().out
    assert f"probe of {num_fitted} rows; cosine {cosine:.3f} on {num_heldout} held" in said


@pytest.mark.parametrize("vector_ids", [[0, 10, 20, 30], [0, 1], [0] * 39 + [7]])
def test_a_probe_of_few_or_odd_vectors(parts, vector_ids):
    model, split = parts
    index = split.index.copy()[: len(vector_ids)]
    index["vector_id"] = vector_ids
    index["source_id"] = vector_ids
    wide = replace(split, index=index, vectors=split.vectors.repeat(4, 1))
    for tensor in elm.fit_probe(model, wide):
        assert torch.isfinite(tensor).all()


def test_drift_is_logged_and_its_probe_kept(settings, tmp_path, capsys):
    """loss = lm_loss + weight * drift_loss. A resumed run has the same probe, and the same
    bytes."""
    drifting = ["loss.drift_weight=0.5", "loss.drift_target=0.9", "train.logging_steps=4"]
    drifting += ["eval.samples=0", "train.eval_steps=6"]
    _, whole = go(settings, *drifting)
    logs = [m for m in read_jsonl(whole / "metrics.jsonl") if "loss" in m]
    assert [m["step"] for m in logs] == [4, 6]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 0.5 * entry["drift_loss"])
        assert 0 < entry["drift_loss"] <= 1.9
    assert capsys.readouterr().out.count("drift probe of") == 1

    start = f"train.resume={whole / 'checkpoint_step_2.pt'}"  # between two log lines
    _, resumed = go(settings, *drifting, start, f"output.dir={tmp_path / 'resumed'}")
    assert "drift probe of" not in capsys.readouterr().out  # it is in the checkpoint
    later = [m for m in read_jsonl(resumed / "metrics.jsonl") if "loss" in m]
    assert [m["drift_loss"] for m in later] == [m["drift_loss"] for m in logs]
    name = "adapter_step_6.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    probes = [elm.load_checkpoint(f / "checkpoint_final.pt").probe for f in (whole, resumed)]
    assert same_tree(*probes)


def test_without_a_weight_there_is_neither_drift_nor_probe(trained):
    _, folder, _ = trained
    for entry in read_jsonl(folder / "metrics.jsonl"):
        if "loss" in entry:
            assert "drift_loss" not in entry and entry["loss"] == entry["lm_loss"]
    assert elm.load_checkpoint(folder / "checkpoint_final.pt").probe is None


# ------------------------------------------------------------------ the warm start


def text_of_vector(rows: list[dict]) -> str:
    """The first text of a vector's rows; without one, all their responses."""
    texts = [row["text"] for row in rows if row.get("text")]
    return texts[0] if texts else "".join(row["response"] + "\n" for row in rows)


def naive_targets(split, model, num_parts):
    """[n, K, D] fp64, a loop over vectors, parts and words."""
    rows = read_jsonl(split.path)
    words_of_parts = []
    for vector_id in sorted({row["embedding_file_idx"] for row in rows}):
        own = [row for row in rows if row["embedding_file_idx"] == vector_id]
        ids = model.prompt.tokenizer(text_of_vector(own), add_special_tokens=False)["input_ids"]
        words_of_parts += [set(part.tolist()) for part in np.array_split(ids, num_parts)]

    embed = model.llm.get_input_embeddings().weight.double()
    targets = []
    for words in words_of_parts:
        target = torch.zeros(embed.shape[1], dtype=torch.float64)
        total = 0.0
        for word in words:
            frequency = sum(word in other for other in words_of_parts)
            weight = math.log(len(words_of_parts) / frequency)
            target += weight * embed[word]
            total += weight
        targets.append(target / total)
    y = torch.stack(targets).unflatten(0, (-1, num_parts))
    y = y - y.mean(0)
    return y / y.square().mean().sqrt()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("width", [12, 32])  # the LLM's is 32
def test_the_warm_start_is_the_naive_one(llm_dir, data_dir, monkeypatch, tokens, width):
    """In several chunks."""
    monkeypatch.setattr(elm, "ROWS_OF_CHUNK", 16)
    monkeypatch.setattr(elm, "LISTS_OF_CHUNK", 10)
    make_data(data_dir, 120, 40, width)
    rows = read_jsonl(rows_path(data_dir))
    for row in rows[::2]:  # some vectors without a text: their responses
        del row["text"]
    write_rows(data_dir, "train", rows)
    split = open_train(data_dir, PROMPT, tokens)
    model = build_elm(llm_dir, split)
    adapter = model.adapter
    before = {key: value.clone() for key, value in adapter.state_dict().items()}
    elm.warm_start(model, split)

    vector_ids = sorted({row["embedding_file_idx"] for row in rows})
    x = (split.vectors[vector_ids].double() - adapter.mean) / adapter.std
    y = naive_targets(split, model, tokens)
    heldout = torch.arange(len(x)) % 10 == 9
    residual = x
    if width == 12:
        fit, _ = naive_ridge(x, y.mean(1), heldout)
        assert torch.allclose(adapter.residual.weight.T.double(), fit.weights, atol=1e-5)
        residual = x @ fit.weights
    hidden = F.gelu(x @ before["fc1.weight"].double().T + before["fc1.bias"])
    remainder = y - residual[:, None]
    fit, _ = naive_ridge(hidden, remainder.flatten(1), heldout)
    bias = fit.y_mean - fit.x_mean @ fit.weights
    assert torch.allclose(adapter.fc2.weight.T.double(), fit.weights, atol=1e-4)
    assert torch.allclose(adapter.fc2.bias.double(), bias, atol=1e-4)

    after = adapter.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed - {"residual.weight"} == {"fc2.weight", "fc2.bias"}


@pytest.mark.parametrize("noise, best, n", [(0, 0.01, 200), (100, 10, 200), (0, 0.1, 3)])
def test_the_ridge_is_chosen_on_rows_held_out(noise, best, n):
    torch.manual_seed(0)
    x = torch.randn(n, 30)
    y = x @ torch.randn(30, 4) + noise * torch.randn(n, 4) + 5.0
    heldout = torch.arange(n) % 10 == 9  # of three rows none
    wanted, value = naive_ridge(x.double(), y.double(), heldout)
    assert value == best
    chunks = [elm.FitChunk(*parts) for parts in zip(
        x.split(37), y.split(37), heldout.split(37), strict=True)]
    found = elm.ridge(lambda: iter(chunks))
    for name in elm.RidgeFit._fields:
        assert torch.allclose(getattr(found, name).double(), getattr(wanted, name), atol=1e-4)


@pytest.mark.slow
def test_a_resume_goes_on_from_zero_steps_and_never_fits_again(settings, tmp_path, capsys):
    settings = [*settings, "eval.samples=0"]
    _, whole = go(settings, f"output.dir={tmp_path / 'whole'}")
    result, zero = go(settings, "train.max_steps=0")
    assert result["step"] == result["adapter_step"] == 0 and (zero / "report.png").exists()
    assert (zero / "adapter_step_0.safetensors").exists()
    assert go(settings, "train.max_steps=0", "train.resume=auto")[0] == result  # nothing to do
    _, cold = go(settings, "train.warm_start=false", f"output.dir={tmp_path / 'cold'}")
    assert not same_tree(final_state(whole), final_state(cold))
    assert capsys.readouterr().out.count("warm start on") == 2

    start = f"train.resume={zero / 'checkpoint_final.pt'}"
    _, after = go(settings, start, f"output.dir={tmp_path / 'after'}")
    go(settings, "train.resume=auto")  # in its own folder
    assert "warm start on" not in capsys.readouterr().out
    for folder in (after, zero):
        assert same_tree(final_state(whole), final_state(folder))
    assert [m["step"] for m in read_jsonl(zero / "metrics.jsonl") if "val_loss" in m] == [0, 3, 6]


def fit_as_one_of_two(rank, llm_dir, data_dir, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", meeting, world_size=2, rank=rank)
    split = open_train(data_dir, PROMPT)
    model = build_elm(llm_dir, split)
    if rank > 0:  # what process 0 has fitted counts
        split = replace(split, vectors=split.vectors + 0.1)
    elm.warm_start(model, split)
    torch.save(model.adapter.state_dict(), folder / f"{rank}.pt")
    torch.distributed.barrier()
    elm.exit_process(0)  # gloo's threads now and then abort when the interpreter ends


def test_all_processes_have_the_fit_of_the_first(processes, llm_dir, data_dir, tmp_path):
    split = open_train(data_dir, PROMPT)
    model = build_elm(llm_dir, split)
    elm.warm_start(model, split)
    torch.multiprocessing.spawn(fit_as_one_of_two, (llm_dir, data_dir, tmp_path), 2)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert same_tree(state, dict(model.adapter.state_dict()))
