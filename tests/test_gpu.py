"""What only a GPU runs: attention by varlen_attn, in bf16. Skipped without one."""

import numpy as np
import pytest
import torch
from conftest import build_elm, elm_step, make_data, make_llm, open_train
from naive import naive_step, token_rows
from transformers import AutoTokenizer

import elm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3_text"])
def test_packed_rows_on_a_gpu_agree_with_the_naive_reference(tmp_path, kind):
    """In fp32 by segments to 1e-4, in bf16 by varlen_attn to what bf16 can hold."""
    folder, rt = make_llm(tmp_path / "llm", kind), elm.Runtime(0, 1, torch.device("cuda"))
    prompt = elm.Prompt.from_tokenizer(AutoTokenizer.from_pretrained(folder))
    split, rows = open_train(make_data(tmp_path / "data"), prompt, 2), np.arange(12)
    naive = build_elm(folder, split, "cuda")
    loss, gradient = naive_step(naive.llm, naive.adapter, [token_rows(split, rows, 2)])
    for bf16, tolerance in ((False, 1e-4), (True, 5e-2)):
        model = build_elm(folder, split, "cuda", bf16)
        elm.check_llm(model)
        for budget in (100_000, 150):
            found, at_adapter, _ = elm_step(model, split, rows, budget, rt)
            assert abs(found - loss) / loss < tolerance
            assert (at_adapter - gradient).norm() / gradient.norm() < tolerance
