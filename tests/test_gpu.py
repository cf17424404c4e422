"""What only a GPU runs: attention by varlen_attn, in bf16. Skipped without one."""

import numpy as np
import pytest
import torch
from conftest import make_data, make_llm
from naive import naive_step, token_rows
from transformers import AutoTokenizer

import elm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text"])
def test_packed_rows_on_a_gpu_agree_with_the_naive_reference(tmp_path, kind):
    """In fp32 by segments to 1e-4, in bf16 by varlen_attn to what bf16 can hold."""
    folder, device = make_llm(tmp_path / "llm", kind), torch.device("cuda")
    rt = elm.Runtime(0, 1, device)
    prompt = elm.Prompt.of(AutoTokenizer.from_pretrained(folder))
    data = elm.DataConfig(dir=str(make_data(tmp_path / "data")), max_seq_length=256)
    split, rows = elm.open_split(data, "train", prompt, 2, rt), np.arange(12)
    reference = elm.load_llm(str(folder), device, bf16=False)
    torch.manual_seed(1)
    d_llm, scale = elm.embedding_scale(reference)
    adapter = elm.Adapter(12, 24, d_llm, 2, scale=scale).to(device)
    loss, gradient = naive_step(reference, adapter, [token_rows(split, rows, 2)])
    for bf16, tolerance in ((False, 1e-4), (True, 5e-2)):
        model = elm.ELM(elm.load_llm(str(folder), device, bf16), adapter, prompt)
        elm.check_packing(model)
        for budget in (100_000, 150):
            adapter.zero_grad()
            *_, labels, micros = elm.plan_step(split, budget, rt, (0, 12, rows))
            soft = model(torch.cat([batch["embeddings"] for _, batch in micros]))
            (total, _), at_soft = elm.soft_gradient(model, soft, micros)
            soft.backward(at_soft / labels)
            mine = torch.cat([p.grad.flatten() for p in adapter.parameters()])
            assert abs(total.item() / labels - loss) / loss < tolerance
            assert (mine - gradient).norm() / gradient.norm() < tolerance
