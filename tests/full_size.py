"""Train and evaluate at the exact shape of Qwen3-4B-Instruct-2507, with random weights, on a CPU.

    python tests/full_size.py

4,022,468,096 frozen parameters in bf16, vectors of width 2560, an adapter of 20,980,736; 4 rows,
two steps, a report on two answers of four tokens. Prints seconds, peak memory and the sizes of
what is left. Needs 8 GB of disk in TMPDIR and 11 GB of memory. Not part of the suite. On a CPU
without AVX-512 torch would loop over bf16 matrices; there their products are made in fp32.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.nn.functional as F
from conftest import byte_tokenizer, make_data
from transformers import AutoModelForCausalLM, Qwen3Config

import elm

SHAPE = dict(
    hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, head_dim=128,
    num_key_value_heads=8, intermediate_size=9728, vocab_size=151_936,
    max_position_embeddings=262_144, tie_word_embeddings=True)


def make_llm(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = Qwen3Config(**SHAPE, eos_token_id=tokenizer.eos_token_id)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{sum(p.numel() for p in llm.parameters()):,} parameters", flush=True)


def multiply_frozen_in_fp32() -> None:
    linear = F.linear

    def linear_in_fp32(x, matrix, bias=None):
        if matrix.requires_grad:  # of the adapter
            return linear(x, matrix, bias)
        return linear(x.float(), matrix.float()).bfloat16()

    F.linear = linear_in_fp32


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if os.fork() == 0:  # its memory does not count
            make_llm(folder / "llm")
            os._exit(0)
        assert os.wait()[1] == 0
        make_data(folder / "data", 4, 4, 2560)
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            multiply_frozen_in_fp32()
        begin = time.time()
        elm.train(elm.load_config(None, [
            f"model.llm={folder / 'llm'}",
            "model.grad_checkpoint=true",  # an fp32 copy of one layer's weights at a time
            f"data.dir={folder / 'data'}",
            "train.max_steps=2",
            "train.batch_size=2",
            "train.grad_accum=1",
            "train.logging_steps=1",
            "eval.samples=2",
            "eval.max_new_tokens=4",
            f"eval.bertscore_model={ROOT / 'data/tiny/scorer'}",
            f"output.dir={folder / 'run'}",
        ]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\n{time.time() - begin:.0f} s, at most {peak:.1f} GiB of memory")
        for path in sorted((folder / "run").iterdir()):
            print(f"{path.stat().st_size / 1e6:10.1f} MB  {path.name}")


if __name__ == "__main__":
    main()
