"""People's models, data and machines as they are: what was once wrong without a word."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    CHAT,
    RT,
    build_elm,
    byte_tokenizer,
    make_llm,
    open_train,
    read_jsonl,
    rows_path,
    run,
    vectors_path,
    write_rows,
)
from safetensors.torch import save_file
from test_data import PROMPT, decode

import elm

IM_END = byte_tokenizer().convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("template", [
    CHAT,
    CHAT.replace("<|im_end|>\n", "\n<|im_end|><|endoftext|>"),  # a line break within the turn
    "{{ '<|endoftext|>' }}" + CHAT,  # begins with the token that tokenizer calls its end
])  # fmt: skip
def test_the_end_of_a_turn_is_the_templates(template, data_dir):
    tok = byte_tokenizer(template)
    tok.eos_token = "<|endoftext|>"
    prompt = elm.Prompt.from_tokenizer(tok)
    assert prompt.end[-1] == IM_END and prompt.text["end"].strip() == "<|im_end|>"
    for example in open_train(data_dir, prompt).examples(range(5)):
        assert example.ids[-1] == IM_END


def test_answers_stop_at_any_end_of_the_generation_config(llm_dir, data_dir):
    model = build_elm(llm_dir, open_train(data_dir, PROMPT))
    vector = elm.open_vectors(vectors_path(data_dir))[0]
    (whole,) = model.generate(vector, "What?", max_new_tokens=9)
    model.llm.generation_config.eos_token_id = [0, PROMPT.ids([whole])[0][0]]
    assert model.generate(vector, "What?", max_new_tokens=9) == [whole[0]]


def test_names_of_control_tokens_in_rows_are_text(data_dir):
    row = read_jsonl(rows_path(data_dir))[0] | dict(
        query="Say <|im_end|>.", response="a <|im_start|> b", text="<|endoftext|>")  # fmt: skip
    write_rows(data_dir, "train", [row, *read_jsonl(rows_path(data_dir))])
    split = open_train(data_dir, PROMPT)
    for source in ("embedding", "text"):
        (example,) = split.examples([0], source)
        control = [i for i in example.ids if i >= 256]
        assert control == [*PROMPT.head[:1], *[i for i in PROMPT.tail if i >= 256], IM_END]
        assert decode(example.ids).count("<|im_start|>") == 3  # two of them the template's


def test_dimensions_without_spread(data_dir):
    """Constant, zero-padded and quantised ones do not drown the others, and are counted."""
    vectors = elm.open_vectors(vectors_path(data_dir)).clone()
    vectors[:, 0], vectors[:, 1], vectors[:, 2] = 0.5, 0.0, 1.0
    vectors[3, 2] += 1e-4
    save_file({"x": vectors}, vectors_path(data_dir))
    split = open_train(data_dir, PROMPT)
    assert split.counts["dimensions without spread"] == 3
    adapter = elm.Adapter(12, 8, 12)
    adapter.load_state_dict({k: split.statistics[k] for k in ("mean", "std")}, strict=False)
    other = vectors[:2].clone()
    other[:, :3] += 0.01
    soft, moved = (adapter(v)[:, 0] for v in (vectors[:2], other))
    assert (torch.nn.functional.cosine_similarity(soft, moved) > 0.99).all()
    assert torch.nn.functional.cosine_similarity(moved[:1], moved[1:]) < 0.9


@pytest.fixture
def own_llm(llm_dir, tmp_path):
    return shutil.copytree(llm_dir, tmp_path / "own_llm")


def test_an_adapter_keeps_its_prompt(settings, own_llm, tmp_path, capsys):
    """A template that is edited, or prints a date, changes nothing of a run that goes on."""
    settings = [*settings, f"model.llm={own_llm}"]
    whole = elm.train(elm.load_config(None, [*settings, f"output.dir={tmp_path / 'whole'}"]))
    elm.train(elm.load_config(None, [*settings, "train.max_steps=3"]))
    template = own_llm / "chat_template.jinja"
    template.write_text("It is Monday. " + template.read_text())
    capsys.readouterr()
    more = ["train.resume=" + str(tmp_path / "whole/checkpoint_step_2.pt"),
            f"output.dir={tmp_path / 'again'}"]  # fmt: skip
    assert elm.train(elm.load_config(None, [*settings, *more])) == whole
    assert "its chat template differs from training" in capsys.readouterr().err
    for name in ("adapter_step_6.safetensors", "predictions.jsonl"):
        one, two = (tmp_path / folder / name for folder in ("whole", "again"))
        assert one.read_bytes() == two.read_bytes()
    model = elm.ELM.load(tmp_path / "whole" / "adapter_best.safetensors")
    assert model.prompt.text["head"] == "<|im_start|>user\n"


def test_template_arguments_and_an_open_thought(capsys):
    tok = byte_tokenizer(CHAT + "{{ '' if enable_thinking is false else '<think>\n' }}")
    assert elm.Prompt.from_tokenizer(tok).text["tail"].endswith("<think>\n")
    assert "ends within <think>" in capsys.readouterr().err
    quiet = elm.Prompt.from_tokenizer(tok, {"enable_thinking": False})
    assert quiet.text["tail"] == PROMPT.text["tail"] and not capsys.readouterr().err
    cfg = elm.load_config(None, ["model.template.enable_thinking=false"])
    assert cfg.model.template == {"enable_thinking": False}


def test_vectors_of_another_norm_are_refused_in_python_too(llm_dir, data_dir):
    model = build_elm(llm_dir, open_train(data_dir, PROMPT))
    vectors = elm.open_vectors(vectors_path(data_dir)).numpy()
    assert len(model.generate(vectors, "What?", max_new_tokens=2)) == 10
    for call in (model.generate, model.prompt_embeds):
        with pytest.raises(elm.UserError, match="the vectors' norm was 3.* and is 3"):
            call(11 * vectors, "What?")
    with pytest.raises(elm.UserError, match="the vectors' norm"):
        model.loss(11 * vectors[:1], "What?", ["x"])


def test_copies_of_a_vector_count_as_one(data_dir):
    """One stored per row in place of one per text."""
    rows = read_jsonl(rows_path(data_dir))
    vectors = elm.open_vectors(vectors_path(data_dir))
    save_file({"x": vectors[[r["embedding_file_idx"] for r in rows]]}, vectors_path(data_dir))
    write_rows(data_dir, "train", [r | {"embedding_file_idx": i} for i, r in enumerate(rows)])
    split = open_train(data_dir, PROMPT)
    assert len(set(split.rows["vector"].tolist())) == len({r["embedding_file_idx"] for r in rows})
    other = split.embeddings(elm.shuffled_vectors(split))
    assert (other != split.embeddings(split.rows["vector"])).any(1).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_as_other_systems_write_them(data_dir, dtype):
    """.npy tables, byte-order marks, null, integral floats, further fields."""
    table = elm.open_vectors(vectors_path(data_dir)).numpy().astype(dtype)
    vectors_path(data_dir).unlink()
    np.save(vectors_path(data_dir).with_suffix(".npy"), table)
    rows = [r | dict(embedding_file_idx=float(r["embedding_file_idx"]), text=None, id=[1])
            for r in read_jsonl(rows_path(data_dir))]  # fmt: skip
    write_rows(data_dir, "train", rows)
    path = rows_path(data_dir)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    split = open_train(data_dir, PROMPT)
    assert np.array_equal(split.vectors.numpy(), table) and not split.rows["text"].any()
    assert split.read([0])[0].response == rows[0]["response"]
    texts = path.with_name("texts.txt")
    texts.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert [*elm.read_texts(texts)] == ["one", "two"]
    config = path.with_name("run.toml")
    config.write_bytes(b"\xef\xbb\xbftrain.lr = 1.0\n")
    assert elm.load_config(str(config)).train.lr == 1.0


def test_task_types_of_ones_own(settings, data_dir):
    for name in ("train", "val", "test"):
        rows = [r | {"task_type": "haiku"} if i % 2 else r
                for i, r in enumerate(read_jsonl(rows_path(data_dir, name)))]  # fmt: skip
        write_rows(data_dir, name, rows)
    with pytest.raises(elm.UserError, match="jsonl:2: unknown task_type 'haiku'"):
        elm.train(elm.load_config(None, settings))
    result = elm.train(elm.load_config(None, [*settings, 'data.tasks=["haiku", "summary"]']))
    assert result["tasks"]["haiku"]["rows"] == 20


@pytest.mark.slow
def test_wandb_without_a_login_goes_offline(settings, tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "run.toml").touch()
    done = run(tmp_path / "run.toml", *settings, "wandb.enabled=true", "train.max_steps=1",
               WANDB_MODE="online", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no login" in done.stdout and list((tmp_path / "out" / "wandb").glob("offline-run*"))


@pytest.mark.parametrize("error, code", [
    (None, 0), (SystemExit(143), 143), (elm.UserError("x"), 2), (RuntimeError("x"), 1),
])  # fmt: skip
def test_a_wandb_run_ends_with_the_exit_code(tmp_path, error, code):
    class Run:
        def finish(self, exit_code):
            self.ended = exit_code

    cfg = elm.load_config(None, [f"output.dir={tmp_path}"])
    log = elm.Log(cfg, elm.TrainState(), 1, RT)
    log.run = Run()
    try:
        with log:
            if error:
                raise error
    except BaseException as e:
        assert e is error
    assert log.run.ended == code


def test_a_terminal_that_is_not_utf8(settings, data_dir, tmp_path):
    rows = [r | {"query": "Was heißt „α“?"} for r in read_jsonl(rows_path(data_dir, "test"))]
    write_rows(data_dir, "test", rows)
    (tmp_path / "run.toml").touch()
    done = run(tmp_path / "run.toml", *settings, "train.max_steps=1", PYTHONIOENCODING="ascii",
               PYTHONUTF8="0", LC_ALL="C")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_home_and_variables_in_paths(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "there")
    elm.train(elm.load_config(None, [*settings, "output.dir=~/$PLACE/run", "train.max_steps=0"]))
    assert (tmp_path / "there" / "run" / "eval.json").exists()
    assert not os.path.exists("~")


def test_a_warm_up_longer_than_the_run_is_told(settings, capsys):
    elm.train(elm.load_config(None, [*settings, "train.warmup_steps=9", "train.max_steps=1"]))
    assert "train.warmup_steps = 9: no shorter than the run of 1 steps" in capsys.readouterr().err


def test_a_signal_ends_a_validation(llm_dir, data_dir):
    split = open_train(data_dir, PROMPT)
    model = build_elm(llm_dir, split)
    cfg = elm.load_config()
    assert len(elm.validation_losses(model, split, cfg, RT, [], True, False)) == 3
    assert elm.validation_losses(model, split, cfg, RT, [15], True, False) == {}


def test_stop_strings(llm_dir, data_dir):
    model = build_elm(llm_dir, open_train(data_dir, PROMPT))
    vector = elm.open_vectors(vectors_path(data_dir))[0]
    (whole,) = model.generate(vector, "What?", max_new_tokens=9)
    (cut,) = model.generate(vector, "What?", max_new_tokens=9, stop_strings=[whole[2]])
    assert cut == whole[: whole.index(whole[2]) + 1]


def test_patience_ends_a_run_as_finished(settings, tmp_path, capsys):
    more = ["train.patience=2", "train.eval_steps=1", "train.max_steps=60", "train.lr=1.0",
            "train.warmup_steps=0"]  # fmt: skip
    result = elm.train(elm.load_config(None, [*settings, *more]))
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    steps = [m["step"] for m in metrics if "val_loss" in m]
    assert result["step"] == steps[-1] == result["adapter_step"] + 2 < 60
    again = elm.train(elm.load_config(None, [*settings, *more, "train.resume=auto"]))
    assert again == result and "nothing to do" in capsys.readouterr().out


def test_both_llms_of_one_shape_are_told_apart(tmp_path):
    one, two = make_llm(tmp_path / "one"), make_llm(tmp_path / "two")
    llm = elm.load_llm(str(two), RT.device, False)
    assert elm.fingerprint(elm.load_llm(str(one), RT.device, True)) == elm.fingerprint(llm)
    next(iter(llm.parameters())).data += 0.01
    assert elm.fingerprint(elm.load_llm(str(one), RT.device, False)) != elm.fingerprint(llm)
