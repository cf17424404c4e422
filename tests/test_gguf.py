"""An LLM of llama.cpp's format, a GGUF file."""

import json
import os
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import (
    CHAT,
    CPU,
    NO_TABLES,
    ROOT,
    command,
    make_data,
    make_llm,
    make_settings,
    refused,
    vectors_path,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import elm


def for_llama_cpp(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of a head's query or key in the order that llama.cpp's rotation has: not halves, but
    pairs of neighbours."""
    halves = matrix.reshape(num_heads, 2, -1, matrix.shape[1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def write_gguf(folder: Path, path: Path, kind: str = "F32") -> Path:
    """A Llama of transformers, whose tokens are bytes, as a GGUF file with matrices of a kind. The
    tokenizer gets one merge, as the format asks for some: of QQ, which no text of these tests
    has."""
    llm = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = llm.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)

    id_of_token = tokenizer.get_vocab()
    tokens = sorted(id_of_token, key=id_of_token.get)
    tokens.append("QQ")
    types = [gguf.TokenType.NORMAL] * len(tokens)
    for token_id in tokenizer.added_tokens_decoder:
        types[token_id] = gguf.TokenType.CONTROL
    while len(tokens) < config.vocab_size:
        tokens.append(f"<unused{len(tokens)}>")
        types.append(gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["Q Q"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in llm.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name:
            array = for_llama_cpp(array, config.num_attention_heads)
        if "k_proj" in name:
            array = for_llama_cpp(array, config.num_key_value_heads)
        name_in_file = names.get_name(name, (".weight",))
        if array.ndim == 2 and kind != "F32":
            matrix_type = gguf.GGMLQuantizationType[kind]
            packed = gguf.quants.quantize(array, matrix_type)
            writer.add_tensor(name_in_file, packed, raw_dtype=matrix_type)
        else:
            writer.add_tensor(name_in_file, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("llama") / "llm", "llama")


@pytest.fixture(scope="module")
def file(llm):
    return write_gguf(llm, llm.parent / "llama.gguf")


def test_a_file_is_the_llm_of_its_folder(llm, file, tmp_path):
    """The same report to the byte; the adapter belongs to both, wherever it was trained."""
    data = make_data(tmp_path / "data")
    outs = []
    for name, place in (("of file", file), ("of folder", llm)):
        outs.append(tmp_path / name)
        settings = make_settings(place, data, outs[-1])
        code, said = command("train", NO_TABLES, *settings, "train.max_steps=2")
        assert code == 0, said
    reports = [json.loads((out / "eval.json").read_text()) for out in outs]
    assert reports[0] == reports[1]
    metadata = elm.Adapter.load(outs[0])[1]
    assert metadata["llm"]["name"] == str(file)

    words = ["generate", f"embeddings={vectors_path(data, 'test')}", 'query=["What?", "Why?"]',
             "max_new_tokens=8"]
    answers = []
    for i, (adapter, more) in enumerate([
            (outs[0], []), (outs[1], []), (outs[0], [f"llm={llm}"]), (outs[1], [f"llm={file}"])]):
        out = tmp_path / f"{i}.jsonl"
        code, said = command(*words, f"adapter={adapter}", f"out={out}", *more)
        assert code == 0, said
        answers.append(out.read_text())
    assert len(set(answers)) == 1
    *settings, _ = make_settings(file, data, tmp_path)  # without output.dir
    code, said = command("eval", NO_TABLES, *settings, f"adapter={outs[1]}",
                         f"report_dir={tmp_path / 'report'}")
    assert code == 0, said


def test_weights_are_in_the_dtype_that_is_asked_for(file):
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        loaded = elm.load_llm(str(file), CPU, bf16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_it_answers_about_texts(file):
    """As data/prepare.py synthesize has it do."""
    engine = elm.LLMEngine(str(file), False, {}, 8)
    (answer,) = engine.answer([elm.Question("Say it.", "alpha beta")], 0, 0.0)
    assert answer.text


def test_what_lies_beside_the_file_is_not_read(llm, file, tmp_path):
    """As the tokenizer.json of another LLM, which transformers prefers to the file's."""
    beside = tmp_path / "beside"
    shutil.copytree(ROOT / "data/tiny/llm", beside)
    copy = beside / "llm.gguf"
    shutil.copy(file, copy)
    alone = elm.load_tokenizer(str(file))
    found = elm.load_tokenizer(str(copy))
    assert found.get_vocab() == alone.get_vocab()
    assert found.chat_template == alone.chat_template
    wanted = elm.weights_hash(elm.load_llm(str(file), CPU, False))
    assert elm.weights_hash(elm.load_llm(str(copy), CPU, False)) == wanted


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_one_adapter_reads_the_folder_and_its_files(tmp_path, caplog, kind):
    """Also in 4 bits; it is trained on a file, or read by one."""
    # wide enough for the formats, whose blocks have 32 weights, and bitsandbytes', of 64
    folder = make_llm(tmp_path / "llm", "llama", hidden_size=64, intermediate_size=128)
    file = write_gguf(folder, tmp_path / f"{kind}.gguf", kind)
    data = make_data(tmp_path / "data")
    losses = {}
    for trained_in, others in ((folder, (file, folder)), (file, (folder, file))):
        out = tmp_path / f"out {trained_in.name}"
        settings = make_settings(trained_in, data, out)
        code, said = command("train", NO_TABLES, *settings, "train.max_steps=2")
        assert code == 0 and "twin" not in said, said
        for other in others:
            caplog.clear()
            model = elm.ELM.load(out, llm=str(other))
            is_twin = other != trained_in
            assert (f"{other} (float32) is a twin of it" in caplog.text) == is_twin
            with torch.no_grad():
                vectors = elm.open_vectors(vectors_path(data, "test")).float()
                loss = model.loss(vectors, "What?", "alpha beta gamma")
            losses[trained_in.name, other.name] = loss.item()
        caplog.clear()
        elm.ELM.load(out, llm=str(folder), quantization="nf4")
        assert f"{folder} (nf4) is a twin of it" in caplog.text
    for trained_in in (folder, file):
        of_folder = losses[trained_in.name, folder.name]
        of_file = losses[trained_in.name, file.name]
        assert of_folder != of_file
        assert of_file == pytest.approx(of_folder, rel=0.05)


def test_what_cannot_be_loaded_is_refused(llm, file, tmp_path, monkeypatch):
    settings = make_settings(file, make_data(tmp_path / "data"), tmp_path / "out")
    train = ["train", NO_TABLES, *settings]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:3000])
    refused(f"^elm: model.llm: cannot load {broken}: ", *train, f"model.llm={broken}")
    refused("^elm: model.llm: there is no file gone.gguf here", *train, "model.llm=gone.gguf")
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    refused(f"^elm: model.llm: {folder} is a folder, not a file", *train, f"model.llm={folder}")
    refused("^elm: model.llm: deepspeed.zero_stage = 3 cannot share out a GGUF file; give a folder "
            "of transformers", *train, "deepspeed.zero_stage=3")
    refused("^elm: eval.embedder: .*gguf is a file; give the folder of a model", *train,
            f"eval.embedder={file}")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("^elm: gguf is not installed: pip install gguf", *train)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")
