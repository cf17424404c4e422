"""The closed-form warm start, against dense loops in double precision."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import RT, go, make_data, read_jsonl, rows_path, write_rows
from naive import naive_ridge
from test_train import final_state, parts_of, same_tree

import elm


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
