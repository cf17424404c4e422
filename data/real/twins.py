"""What adapters tell an LLM and its quantised twins: losses of the test split of this folder.

    python data/real/twins.py LLM ADAPTER ...

A line for each kind of numbers and each adapter's file: the loss per response token by another
row's vector, by the row's own, and by its text, and the gap closed. No answers.

    python data/real/twins.py speed LLM ADAPTER

A line for each kind: the memory of the LLM's weights, the seconds of a training pass and of
answers. The kinds take turns; the median of the rounds, after a first one that does not count.

    python data/real/twins.py cosines LLM

The cosines of the token embeddings that an adapter's file keeps with those of copies in few bits,
and with other tokens'.
"""

import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import elm

HERE = Path(__file__).resolve().parent
KINDS = ("off", "nf4", "int8")
MAX_TOKENS = 1024  # data.max_seq_length of train.toml
NUM_ROWS = 8  # of a pass whose time is taken
NUM_ANSWERS = 4
NUM_ROUNDS = 4


def print_losses(llm: str, adapters: list[str]) -> None:
    loaded = {path: elm.Adapter.load(path)[0] for path in adapters}
    print("| adapter | LLM | shuffled | vector | text | gap closed |\n|---|---|---|---|---|---|")
    for kind in KINDS:
        model = elm.ELM.load(adapters[0], llm=llm, bf16=True, quantization=kind)
        encoder = elm.Encoder(model.prompt, model.adapter.tokens, MAX_TOKENS)
        split = elm.open_split(str(HERE), "test", elm.TASKS, encoder)
        nll_text = elm.nll_by_own_texts(model, split)
        nearest = np.full(len(split), np.nan)  # not measured
        for path, adapter in loaded.items():
            model.adapter.load_state_dict(adapter.state_dict())
            losses = elm.measure_losses(model, split, nearest, nll_text)
            result = elm.summarize(losses)
            low, high = result["intervals"]["gap_closed"]
            cells = [Path(path).stem, elm.name_precision(model.llm)]
            for key in ("loss_shuffled", "loss", "loss_text"):
                cells.append(f"{result[key]:.3f}")
            cells.append(f"{result['gap_closed']:.3f} ± {(high - low) / 2:.3f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def print_speeds(llm: str, adapter: str) -> None:
    models = {}
    for kind in KINDS:
        models[kind] = elm.ELM.load(adapter, llm=llm, bf16=True, quantization=kind)
    model = models["off"]
    encoder = elm.Encoder(model.prompt, model.adapter.tokens, MAX_TOKENS)
    split = elm.open_split(str(HERE), "test", elm.TASKS, encoder)
    vectors = split.embeddings(split.index["vector_id"][:NUM_ROWS])
    batch = elm.collate(split.examples(range(NUM_ROWS)), vectors)
    passes = {kind: [] for kind in KINDS}
    answers = {kind: [] for kind in KINDS}
    for _ in range(NUM_ROUNDS):
        for kind, model in models.items():
            start = time.perf_counter()
            model.nll(batch).sum().backward()
            passes[kind].append(time.perf_counter() - start)
            start = time.perf_counter()
            model.generate(vectors[:NUM_ANSWERS], "What is it?", max_new_tokens=16)
            answers[kind].append(time.perf_counter() - start)
    print("| LLM | weights, MiB | a pass, s | answers, s |\n|---|---|---|---|")
    for kind, model in models.items():
        mib = elm.bytes_of_weights(model.llm) / 2**20
        print(f"| {elm.name_precision(model.llm)} | {mib:.0f} | {median(passes[kind][1:]):.1f} | "
              f"{median(answers[kind][1:]):.1f} |")
    print(f"{NUM_ROWS} rows, {len(batch.input_ids)} tokens; {NUM_ANSWERS} answers of 16 tokens")


def copies_in_few_bits(embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of token embeddings, by the blocks of nf4 and GGUF, dequantised."""
    import bitsandbytes.functional as bnb
    import gguf

    copies = {"nf4": bnb.dequantize_4bit(*bnb.quantize_4bit(embeddings, quant_type="nf4"))}
    for name in ("Q4_0", "Q4_1", "Q8_0"):
        kind = gguf.GGMLQuantizationType[name]
        packed = gguf.quants.quantize(embeddings.numpy(), kind)
        copies[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    return copies


def print_cosines(llm: str) -> None:
    model = elm.load_llm(llm, torch.device("cpu"), bf16=False)
    own = elm.sample_token_embeddings(model, elm.Prompt(elm.load_tokenizer(llm))).float()
    copies = copies_in_few_bits(own)
    copies["other tokens"] = own.roll(1, 0)
    print("| copy | median | least |\n|---|---|---|")
    for name, copy in copies.items():
        cosines = torch.cosine_similarity(own, copy)
        print(f"| {name} | {cosines.median():.4f} | {cosines.min():.4f} |")


def main() -> None:
    match sys.argv[1:]:
        case ["cosines", llm]:
            print_cosines(llm)
        case ["speed", llm, adapter]:
            print_speeds(llm, adapter)
        case [llm, *adapters] if adapters:
            print_losses(llm, adapters)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
