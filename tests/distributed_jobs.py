"""Jobs that tests start under a launcher: python tests/distributed_jobs.py NAME FOLDER WORD …

WORDS are a command line of elm.py. Each job runs it and measures something, which it leaves in
FOLDER, or breaks at a chosen place: by a subclass of elm.Trainer, by hooks of torch, or by a patch
of a library's function.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import deepspeed
import torch
from conftest import anonymous_memory
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from transformers import AutoModelForCausalLM

import elm


def leave(folder: str, name: str, content: dict) -> None:
    """For the test: this process's `content`."""
    Path(folder, f"{name}_{elm.rank()}.json").write_text(json.dumps(content))


def train_with(trainer_class: type[elm.Trainer], words: list[str]) -> int:
    """`TRAIN.TOML section.key=value …`. Returns the exit code."""
    toml, *settings = words
    try:
        trainer_class(elm.load_config(toml, settings)).run()
    except elm.UserError as e:
        return elm.print_error(str(e))
    return 0


# ------------------------------------------------------------------ trainings


def trainings(folder: str, name: str) -> int:
    """Several, one after the other. `name` is a JSON file in `folder`, a list of lists of
    settings."""
    for settings in json.loads(Path(folder, name).read_text()):
        elm.train(elm.load_config(None, settings))
    return 0


# ------------------------------------------------------------------ memory


class MemoryWatch:
    """In a thread: the most anonymous memory of this process above that at the start."""

    def __init__(self):
        self.before = anonymous_memory()
        self.most = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, anonymous_memory() - self.before)

    def end(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.most


def memory_shares(folder: str, *words: str) -> int:
    """Leaves bytes: `loading`, the most that loading takes; `loaded`, the LLM's parameters right
    after it; `passes`, what of them is held where each pass through the LLM begins."""
    from_pretrained = AutoModelForCausalLM.from_pretrained
    initialize = deepspeed.initialize
    found = {"passes": []}
    watches = []

    def watch_and_load(*arguments, **options):
        watches.append(MemoryWatch())
        return from_pretrained(*arguments, **options)

    def initialize_and_measure(model, **options):
        made = initialize(model=model, **options)
        llm = model["llm"]
        found["loading"] = watches.pop().end()
        found["loaded"] = held_bytes(llm)
        llm.base_model.register_forward_pre_hook(
            lambda *_: found["passes"].append(held_bytes(llm)))
        return made

    AutoModelForCausalLM.from_pretrained = watch_and_load
    deepspeed.initialize = initialize_and_measure
    code = elm.main(list(words))
    leave(folder, words[0], found)
    return code


def held_bytes(llm: torch.nn.Module) -> int:
    """Of the LLM's parameters on this process: gathered ones, and its share of each."""
    return sum((p.numel() + p.ds_tensor.numel()) * p.element_size() for p in llm.parameters())


# ------------------------------------------------------------------ traffic of ZeRO 3


def traffic(folder: str, *words: str) -> int:
    """Leaves numbers: `passes` of micro-batches, `chunks` of logits, `gathered`, how often the
    weights of the head, and of the embeddings tied to it, were not there and had to be gathered,
    `live`, the most parameters of the LLM that were there where a layer began."""
    elm.MAX_LOGITS_AT_ONCE = {"cpu": 3000, "cuda": 3000}
    counts = {"passes": 0, "chunks": 0, "gathered": 0, "live": 0}
    llms = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def count_and_fetch(coordinator, module, *rest, **options):
        (llm,) = llms
        if "Layer" in type(module).__name__:
            counts["live"] = max(counts["live"], sum(p.numel() for p in llm.parameters()))
        head = llm.get_output_embeddings().weight
        if any(p is head for p in module.parameters(recurse=False)):
            counts["gathered"] += head.ds_status.name == "NOT_AVAILABLE"
        return fetch(coordinator, module, *rest, **options)

    def count(name):
        counts[name] += 1

    class CountingTrainer(elm.Trainer):
        def load_llm(self):
            llm = super().load_llm()
            llms.append(llm)
            llm.base_model.layers[0].register_forward_pre_hook(lambda *_: count("passes"))
            llm.get_output_embeddings().register_forward_pre_hook(lambda *_: count("chunks"))
            return llm

    PartitionedParameterCoordinator.fetch_sub_module = count_and_fetch
    code = train_with(CountingTrainer, words)
    leave(folder, "traffic", counts)
    return code


def persistent_gathers(folder: str, kind: str, *words: str) -> int:
    """Leaves numbers: `parameters` small enough to stay gathered, and `gathers`, how often one of
    them was not there when its module began. `kind` is "mended", or "plain": as DeepSpeed alone
    does it."""
    counts = {"parameters": 0, "gathers": 0}
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def count_and_fetch(coordinator, module, *rest, **options):
        for parameter in module.parameters(recurse=False):
            if parameter.ds_persist and parameter.ds_status.name == "NOT_AVAILABLE":
                counts["gathers"] += 1
        return fetch(coordinator, module, *rest, **options)

    class CountingTrainer(elm.Trainer):
        def load_llm(self):
            llm = super().load_llm()
            for parameter in llm.parameters():
                counts["parameters"] += parameter.ds_persist
                if kind == "plain":
                    parameter.is_external_param = False
            return llm

    PartitionedParameterCoordinator.fetch_sub_module = count_and_fetch
    code = train_with(CountingTrainer, words)
    leave(folder, kind, counts)
    return code


# ------------------------------------------------------------------ what breaks on process 1 alone


def spoiled_gradient(folder: str, *words: str) -> int:
    """The gradient of step 3 is not finite on process 1. Leaves the adapter of each process."""

    class SpoilingTrainer(elm.Trainer):
        def train_step(self, step):
            adapter = self.elm.adapter
            if self.state.step == 2 and elm.rank() == 1:
                adapter.fc2.bias.register_hook(lambda gradient: gradient * torch.nan)
            try:
                return super().train_step(step)
            except elm.UserError:
                torch.save(dict(adapter.state_dict()), Path(folder, f"adapter_{elm.rank()}.pt"))
                raise

    return train_with(SpoilingTrainer, words)


def killed(_, *words: str) -> int:
    class KilledTrainer(elm.Trainer):
        def train_step(self, step):
            if elm.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().train_step(step)

    return train_with(KilledTrainer, words)


def failing(_, *words: str) -> int:
    class FailingTrainer(elm.Trainer):
        def train_step(self, step):
            if elm.rank() == 1:
                raise ArithmeticError("only here")
            return super().train_step(step)

    return train_with(FailingTrainer, words)


JOBS = (trainings, memory_shares, traffic, persistent_gathers, spoiled_gradient, killed, failing)


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    name, folder, *rest = words
    (job,) = (job for job in JOBS if job.__name__ == name)
    elm.exit_process(job(folder, *rest))


if __name__ == "__main__":
    main()
