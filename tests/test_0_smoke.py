"""Start here: what elm does, in one test."""

from pathlib import Path

from conftest import ROOT

import elm


def test_an_adapter_lets_the_llm_read_vectors(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the paths in train.toml are relative to it
    small = ['data.tasks=["summary"]', "train.max_steps=20", "train.warmup_steps=5"]
    overrides = [*small, "eval.samples=0", f"output.dir={tmp_path}"]
    report = elm.train(elm.load_config("train.toml", overrides))
    assert report["loss"] < 0.7 * report["loss_shuffled"]  # the right vectors help, others do not

    model = elm.ELM.load(tmp_path)
    vectors = elm.open_vectors(Path("data/tiny/embeddings/test_embeddings.safetensors"))
    answers = model.generate(vectors[:4], "Summarize the text.", max_new_tokens=20)
    assert len(set(answers)) == 4  # each vector has an answer of its own
