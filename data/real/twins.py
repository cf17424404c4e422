"""What adapters tell an LLM and its quantised twins: losses of the test split of this folder.

    python data/real/twins.py LLM ADAPTER ...

A line for each kind of numbers and each adapter's file: the loss per response token by another
row's vector, by the row's own, and by its text, and the gap closed. No answers.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import elm

HERE = Path(__file__).resolve().parent
KINDS = ("off", "nf4", "int8")
MAX_TOKENS = 1024  # data.max_seq_length of train.toml


def main() -> None:
    llm, *adapters = sys.argv[1:]
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


if __name__ == "__main__":
    main()
