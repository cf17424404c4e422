"""The terms of the loss, and what is fitted in closed form, the drift's probe and the warm start,
against plain PyTorch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import (
    PROMPT,
    RT,
    build_elm,
    go,
    make_data,
    open_train,
    read_jsonl,
    rows_path,
    write_rows,
)
from naive import naive_batch, naive_loss, naive_ridge, token_rows
from test_train import final_state, parts_of, same_tree

import elm


@pytest.fixture
def parts(llm_dir, data_dir):
    """(ELM, its train split): vectors of width 12, an LLM of 32, 3 soft tokens."""
    split = open_train(data_dir, PROMPT, 3)
    return build_elm(llm_dir, split), split


def size(hidden, batch):
    """A further term: the mean square of an example's sixth hidden state [n]."""
    return hidden[batch["cu_seqlens"][:-1].long() + 5].square().mean(1)


def test_terms_and_their_gradient_are_the_naive_ones(parts):
    """Each over its own number, labels or rows; no drift at the target and beyond. A further term
    is a function and an entry."""
    model, split = parts
    rows, probe = np.arange(40), elm.Probe(torch.randn(32, 12), torch.randn(32), torch.randn(12))
    llm, adapter, examples = model.llm, model.adapter, token_rows(split, rows)
    terms = elm.loss_terms(elm.LossConfig(drift_weight=0.7, drift_target=-0.4), model, probe)
    terms["size"] = elm.Term(size, 0.3, "rows")
    terms["unused"] = elm.Term(None, 0.0, "rows")

    batch, mask, marks = naive_batch(examples)
    vectors, said = torch.stack([v for *_, v in examples]), (marks != -100)[..., None]
    embeds = llm.get_input_embeddings()(batch.clamp(min=0))
    embeds = embeds.masked_scatter((batch == -1)[..., None], adapter(vectors))
    hidden = llm.base_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    means = (hidden * said).sum(1) / said.sum(1)
    standardised = (vectors - adapter.mean) / adapter.std - probe.embedding_mean
    cosines = F.cosine_similarity((means - probe.hidden_mean) @ probe.matrix, standardised)
    assert 5 < (cosines < -0.4).sum() < 35
    sums = [naive_loss(llm, adapter, examples), F.relu(-0.4 - cosines).sum(),
            hidden[:, 5].square().mean(1).sum()]  # fmt: skip
    labels = sum(n for _, n, _ in examples)
    loss = sums[0] / labels + 0.7 * sums[1] / 40 + 0.3 * sums[2] / 40
    wanted = torch.autograd.grad(loss, list(adapter.parameters()))

    step = elm.prepare_step(split, 700, RT, (0, 40, rows))
    assert len(step.micros) > 3 and step.counts["labels"] == labels
    soft = model(torch.cat([batch["embeddings"] for _, batch in step.micros]))
    found, gradient = elm.soft_gradient(model, soft, step.micros, terms, step.counts)
    assert [x.item() for x in found] == pytest.approx([*(x.item() for x in sums), 0], rel=1e-5)
    found = torch.autograd.grad(soft, list(adapter.parameters()), gradient / labels)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def states_alone(model, split) -> torch.Tensor:
    """[N, D]: the LLM's mean last hidden state over each response, read without a prompt."""
    states = []
    for ids, n, _ in token_rows(split, range(len(split.rows))):
        with torch.no_grad():
            out = model.llm.base_model(input_ids=ids[None, -n:])
        states.append(out.last_hidden_state[0].mean(0))
    return torch.stack(states)


@pytest.mark.parametrize("standardize", [True, False])
def test_the_probe_is_a_ridge_regression_on_responses(llm_dir, data_dir, capsys, standardize):
    split = open_train(data_dir, PROMPT)
    model = build_elm(llm_dir, split, standardize=standardize)
    probe = elm.fit_probe(model, split, RT)
    ids = split.rows["vector"]
    x = states_alone(model, split).double()
    y = ((split.embeddings(ids) - model.adapter.mean) / model.adapter.std).double()
    held = torch.from_numpy(np.searchsorted(np.unique(ids), ids) % 10 == 9)
    matrix, center, mean, _ = naive_ridge(x, y, held)
    assert torch.allclose(probe.hidden_mean.double(), center, atol=1e-5)
    assert torch.allclose(probe.embedding_mean.double(), mean, atol=1e-5)
    assert (probe.matrix - matrix).norm() < 1e-4 * matrix.norm()
    cosine = F.cosine_similarity((x - center) @ matrix, y - mean)[held].mean()
    printed = f"probe of {int((~held).sum())} rows; cosine {cosine:.3f} on {int(held.sum())} held"
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("vectors", [[0, 10, 20, 30], [0, 1], [0] * 39 + [7]])
def test_a_probe_of_few_or_odd_vectors(parts, vectors):
    model, split = parts
    rows = split.rows.copy()[: len(vectors)]
    rows["vector"] = vectors
    wide = replace(split, rows=rows, vectors=split.vectors.repeat(4, 1))
    assert all(torch.isfinite(t).all() for t in elm.fit_probe(model, wide, RT))


def test_what_is_logged_and_kept(settings, tmp_path, monkeypatch):
    """loss = lm_loss + weight * drift_loss; a resumed run has the same probe, and the same bytes;
    without a weight there is neither drift nor probe."""
    drifting = ["loss.drift_weight=0.5", "loss.drift_target=0.9", "train.logging_steps=4"]
    _, whole = go(settings, *drifting)
    logs = [m for m in read_jsonl(whole / "metrics.jsonl") if "loss" in m]
    assert [m["step"] for m in logs] == [4, 6]
    for m in logs:
        assert m["loss"] == pytest.approx(m["lm_loss"] + 0.5 * m["drift_loss"])
        assert 0 < m["drift_loss"] <= 1.9
    monkeypatch.setattr(elm, "fit_probe", None)  # it is in the checkpoint
    start = f"train.resume={whole / 'checkpoint_step_2.pt'}"  # between two log lines
    _, resumed = go(settings, *drifting, start, f"output.dir={tmp_path / 'resumed'}")
    adapters = [(f / "adapter_step_6.safetensors").read_bytes() for f in (whole, resumed)]
    assert adapters[0] == adapters[1]
    later = [m for m in read_jsonl(resumed / "metrics.jsonl") if "loss" in m]
    assert [m["drift_loss"] for m in later] == [m["drift_loss"] for m in logs]
    probes = [elm.load_checkpoint(f / "checkpoint_final.pt")["probe"] for f in (whole, resumed)]
    assert all(map(torch.equal, *probes))
    _, other = go(settings, f"output.dir={tmp_path / 'other'}")
    steps = [m for m in read_jsonl(other / "metrics.jsonl") if "loss" in m]
    assert all(m["drift_loss"] == 0 and m["loss"] == m["lm_loss"] for m in steps)
    assert elm.load_checkpoint(other / "checkpoint_final.pt")["probe"] is None
    assert (other / "adapter_step_6.safetensors").read_bytes() != adapters[0]


# ------------------------------------------------------------------ the warm start


def naive_targets(split, model, tokens):
    """[n, K, D] fp64, a loop over vectors, parts and words."""
    rows, parts, targets = read_jsonl(split.path), [], []
    embed = model.llm.get_input_embeddings().weight.double()
    for vector in sorted({r["embedding_file_idx"] for r in rows}):
        own = [r for r in rows if r["embedding_file_idx"] == vector]
        texts = [r["text"] for r in own if r.get("text")]
        text = texts[0] if texts else "".join(r["response"] + "\n" for r in own)
        ids = model.prompt.tokenizer(text, add_special_tokens=False)["input_ids"]
        parts += [set(p) for p in np.array_split(ids, tokens)]
    for part in parts:
        idf = {w: math.log(len(parts) / sum(w in p for p in parts)) for w in part}
        targets.append(sum(embed[int(w)] * v for w, v in idf.items()) / sum(idf.values()))
    y = torch.stack(targets).unflatten(0, (-1, tokens))
    y = y - y.mean(0)
    return y / y.square().mean().sqrt()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("width", [12, 32])  # the LLM's is 32
def test_the_naive_reference_agrees(settings, data_dir, tokens, width):
    make_data(data_dir, 120, 40, width)
    rows = read_jsonl(rows_path(data_dir))
    for row in rows[::2]:  # some vectors without a text: their responses
        del row["text"]
    write_rows(data_dir, "train", rows)
    _, split, model = parts_of(settings, f"model.tokens={tokens}", "train.warm_start=false")
    adapter = model.adapter
    x = split.vectors[sorted({r["embedding_file_idx"] for r in rows})].double()
    x, y = (x - adapter.mean) / adapter.std, naive_targets(split, model, tokens)
    held = torch.arange(len(x)) % 10 == 9
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    elm.warm_start(model, split, RT)
    if width == 12:
        residual, *_ = naive_ridge(x, y.mean(1), held)
        assert torch.allclose(adapter.residual.weight.T.double(), residual, atol=1e-5)
    left = y - (x @ residual if width == 12 else x)[:, None]
    hidden = F.gelu(x @ before["fc1.weight"].double().T + before["fc1.bias"])
    weights, center, mean, _ = naive_ridge(hidden, left.flatten(1), held)
    bias = mean - center @ weights
    for fitted, naive in ((adapter.fc2.weight.T, weights), (adapter.fc2.bias, bias)):
        assert torch.allclose(fitted.double(), naive, atol=1e-4)
    changed = {k for k, v in adapter.state_dict().items() if not torch.equal(v, before[k])}
    assert changed - {"residual.weight"} == {"fc2.weight", "fc2.bias"}


@pytest.mark.parametrize("noise, best, n", [(0, 0.01, 200), (100, 10, 200), (0, 0.1, 3)])
def test_the_ridge_is_chosen_on_rows_held_out(noise, best, n):
    torch.manual_seed(0)
    x, held = torch.randn(n, 30), torch.arange(n) % 10 == 9  # of three rows none
    y = x @ torch.randn(30, 4) + noise * torch.randn(n, 4) + 5.0
    weights, center, mean = elm.ridge(x, y, held)
    *wanted, value = naive_ridge(x.double(), y.double(), held)
    assert value == best
    for found, naive in zip((weights, center, mean), wanted, strict=True):
        assert torch.allclose(found.double(), naive, atol=1e-4)


@pytest.mark.slow
def test_a_resume_goes_on_from_zero_steps_and_never_fits_again(settings, tmp_path, monkeypatch):
    _, whole = go(settings, f"output.dir={tmp_path / 'whole'}")
    result, zero = go(settings, "train.max_steps=0")
    assert result["step"] == result["adapter_step"] == 0 and (zero / "report.png").exists()
    assert (zero / "adapter_step_0.safetensors").exists()
    assert go(settings, "train.max_steps=0", "train.resume=auto")[0] == result  # nothing to do
    _, cold = go(settings, "train.warm_start=false", f"output.dir={tmp_path / 'cold'}")
    assert not same_tree(final_state(whole), final_state(cold))
    monkeypatch.setattr(elm, "warm_start", None)
    _, after = go(settings, f"train.resume={zero / 'checkpoint_final.pt'}",
                  f"output.dir={tmp_path / 'after'}")  # fmt: skip
    go(settings, "train.resume=auto")  # in its own folder
    for folder in (after, zero):
        assert same_tree(final_state(whole), final_state(folder))
    assert [m["step"] for m in read_jsonl(zero / "metrics.jsonl") if "val_loss" in m] == [0, 3, 6]


def fit_as_one_of_two(rank, settings, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", world_size=2, rank=rank)
    _, split, model = parts_of(settings, "train.warm_start=false")
    if rank:  # what process 0 has fitted counts
        split = replace(split, vectors=split.vectors + 0.1)
    elm.warm_start(model, split, elm.Runtime(rank, 2))
    torch.save(model.adapter.state_dict(), folder / f"{rank}.pt")


@pytest.mark.slow
def test_all_processes_have_the_fit_of_the_first(settings, tmp_path):
    _, split, model = parts_of(settings, "train.warm_start=false")
    elm.warm_start(model, split, RT)
    mp.spawn(fit_as_one_of_two, (settings, tmp_path), 2)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert same_tree(state, model.adapter.state_dict())
