"""`generate`, and the command line: its arguments, help and errors."""

import argparse
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import prepare
import pytest
import torch
from conftest import (
    CPU,
    NO_TABLES,
    PROMPT,
    ROOT,
    command,
    make_llm,
    refused,
    vectors_path,
)
from safetensors.torch import save_file

import elm

# -----------------------------------------------------------------------------
# generate


@pytest.fixture
def start(trained):
    """The words of a `generate` about the ten test vectors, without a query."""
    _, folder, settings = trained
    (data,) = [word.removeprefix("data.dir=") for word in settings if word.startswith("data.dir=")]
    vectors = vectors_path(data, "test")
    return ["generate", f"adapter={folder}", f"embeddings={vectors}", "max_new_tokens=9"]


def printed(capsys, *words) -> list[dict]:
    """The lines of JSON of a command that succeeds."""
    assert elm.main(list(words)) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_generate_prints_what_the_library_says(trained, start, capsys):
    lines = printed(capsys, *start, "query=Summarize the text.", "rows=[3, 0, 9]")
    _, folder, _ = trained
    model = elm.ELM.load(folder)
    table = elm.open_vectors(Path(start[2].removeprefix("embeddings=")))
    answers = model.generate(table[[3, 0, 9]], "Summarize the text.", max_new_tokens=9)
    assert [line["row"] for line in lines] == [3, 0, 9]
    assert [line["query"] for line in lines] == ["Summarize the text."] * 3
    assert [line["answer"] for line in lines] == answers

    query = "Is <EMB> about frogs?"
    lines = printed(capsys, *start, f"query={query}")
    assert [line["row"] for line in lines] == list(range(10))
    assert [line["answer"] for line in lines] == model.generate(table, query, max_new_tokens=9)


def test_temperature_samples_and_a_seed_repeats(start, capsys):
    start = [*start, "query=Why?", "rows=[1, 2]"]
    greedy = printed(capsys, *start)
    hot = printed(capsys, *start, "temperature=3.0", "seed=1")
    assert printed(capsys, *start, "seed=1") == greedy
    assert printed(capsys, *start, "temperature=3.0", "seed=1") == hot
    assert printed(capsys, *start, "temperature=3.0", "seed=2") != hot
    assert greedy != hot


def test_the_length_of_an_answer_is_limited(start, capsys):
    start = [*start, "query=Why?", "rows=[1]"]
    (long,) = printed(capsys, *start, "max_new_tokens=9")
    (short,) = printed(capsys, *start, "max_new_tokens=2")
    assert len(short["answer"]) < len(long["answer"])
    assert long["answer"].startswith(short["answer"])


def test_the_llms_own_generation_config_does_not_make_greedy_answers_random(tmp_path):
    """Qwen3's says do_sample; the report would differ from run to run."""
    folder = make_llm(tmp_path / "llm")
    odd = dict(
        do_sample=True, temperature=5.0, top_k=200, num_beams=3, no_repeat_ngram_size=1,
        min_new_tokens=12, repetition_penalty=9.0)  # fmt: skip
    said = []
    for config in ({}, odd):
        (folder / "generation_config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        llm = elm.load_llm(str(folder), CPU, bf16=False)
        model = elm.ELM(llm, elm.Adapter(4, 4, 32), PROMPT)
        for _ in range(2):
            said.append(model.generate(torch.ones(2, 4), "q", max_new_tokens=12))
    assert said[0] == said[1] == said[2] == said[3]

    model.adapter.train()
    model.generate(torch.ones(2, 4), "q", max_new_tokens=1)
    assert model.adapter.training  # as before
    assert model.llm.generation_config.num_beams == 3


def test_one_vector_is_a_table_of_one_row(trained, start, tmp_path, capsys):
    """As it is in Python."""
    _, folder, _ = trained
    vector = torch.randn(12)
    np.save(tmp_path / "one.npy", vector.numpy())
    save_file({"x": vector}, tmp_path / "one.safetensors")
    (answer,) = elm.ELM.load(folder).generate(vector, "Why?", max_new_tokens=9)
    for name in ("one.npy", "one.safetensors"):
        (line,) = printed(capsys, *start, f"embeddings={tmp_path / name}", "query=Why?")
        assert (line["row"], line["answer"]) == (0, answer)


TEXTS = ["We examine acids from Peru.", "Old towers, and why they fall.", "Frogs: a survey."]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """An untrained adapter for vectors of the tiny embedder, and the vectors of TEXTS."""
    folder = tmp_path_factory.mktemp("reader")
    embedder = str(ROOT / "data/tiny/embedder")
    model = elm.load_embedder(embedder, False, CPU)
    vectors = elm.embed_texts(model, TEXTS)
    llm = str(ROOT / "data/tiny/llm")
    adapter = elm.ELM.create(llm, vectors, bf16=False, hidden_dim=8, embedder=embedder)
    adapter.save(folder / "adapter.safetensors")
    save_file({"embeddings": vectors}, folder / "vectors.safetensors")
    return folder


def test_texts_are_answered_by_their_vectors(reader, tmp_path, monkeypatch, capsys):
    """By the model that made the adapter's vectors, or another place of it."""
    words = ["generate", f"adapter={reader / 'adapter.safetensors'}", "query=What?",
             "max_new_tokens=8"]
    wanted = printed(capsys, *words, f"embeddings={reader / 'vectors.safetensors'}")
    assert len(wanted) == 3
    text = "text=" + json.dumps(TEXTS)
    assert printed(capsys, *words, text) == wanted
    assert printed(capsys, *words, text, "rows=[1]") == wanted[1:2]
    assert printed(capsys, *words, f"text={TEXTS[0]}") == wanted[:1]
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedder").symlink_to(ROOT / "data/tiny/embedder")
    (tmp_path / "data").symlink_to(ROOT / "data")
    assert printed(capsys, *words, "text=texts.txt", "embedder=embedder") == wanted
    scored = printed(capsys, *words, "text=texts.txt", "score=true")
    for line, same in zip(scored, wanted, strict=True):
        assert line.pop("consistency") is not None and line.pop("consistency_others") is not None
        assert line == same


def test_bad_texts(reader, start, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", f"adapter={reader / 'adapter.safetensors'}", "query=What?"]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("one\n\nthree\n")
    (tmp_path / "notes.md").write_text("one")
    (tmp_path / "latin.txt").write_bytes("Caf\u00e9".encode("latin-1"))
    refused("^elm: generate: give either a table of vectors .embeddings=FILE., or texts", *words)
    refused("^elm: generate: give either a table of vectors .embeddings=FILE., or texts", *words,
            "text=x", "embeddings=y")
    refused("^elm: text: there is no file gone.txt here", *words, "text=gone.txt")
    refused("^elm: text: there is no file my notes.TXT here", *words, "text=my notes.TXT")
    refused("^elm: text: a path cannot hold a NUL character", *words, 'text="a\\u0000.txt"')
    for more in ('["blank.txt", "x"]', "notes.md", '["x", "notes.md"]', "gone.jsonl"):
        refused("^elm: text: .* is the name of a file; give one .txt file alone", *words,
                f"text={more}")
    refused("^elm: text: empty.txt is empty", *words, "text=empty.txt")
    refused("^elm: blank.txt: line 2 is blank; give a text", *words, "text=blank.txt")
    refused("^elm: text: latin.txt: no text of UTF-8", *words, "text=latin.txt")
    refused("^elm: text: text 1 is blank; give a text", *words, 'text=["a", " "]')
    refused(r"^elm: text: '\\udce9' is not of UTF-8", *words, "text=\udce9")
    refused("^elm: id: is a column of a .parquet file", *words, "text=x", "id=doc")
    refused("^elm: rows: no row 1; the table has rows 0 to 0", *words, "text=x", "rows=[1]",
            f"embedder={ROOT / 'data/tiny/embedder'}")
    without_table = [word for word in start if not word.startswith("embeddings=")]
    refused("^elm: text: the adapter does not say which model made its vectors; name it by "
            "embedder=NAME", *without_table, "query=Q", "text=x")


def test_another_file_as_adapter_is_called_what_it_is(trained, start, llm_dir, tmp_path):
    _, folder, settings = trained
    (data,) = [word.removeprefix("data.dir=") for word in settings if word.startswith("data.dir=")]
    state, metadata = elm.Adapter.load(folder)
    own = {name: tensor.contiguous() for name, tensor in state.state_dict().items()}
    save_file(own, tmp_path / "bare.safetensors", {"elm": "{}"})
    del metadata["llm"]["template"]
    save_file(own, tmp_path / "old.safetensors", {"elm": json.dumps(metadata)})
    checkpoint = folder / "checkpoint_final.pt"
    weights = llm_dir / "model.safetensors"
    table = vectors_path(data, "test")
    for path, message in (
        (checkpoint, f"elm: adapter: {checkpoint} is a checkpoint; give the "
                     "adapter_best.safetensors beside it"),
        (llm_dir, f"elm: adapter: {llm_dir} holds no adapter_best.safetensors; give the folder of "
                  "a run, or an adapter's file"),
        (weights, f"elm: {weights}: not a whole elm adapter, but the weights of another model ("),
        (table, f"elm: {table}: not a whole elm adapter, but a table of vectors (embeddings); a "
                "run leaves one as adapter_best.safetensors"),
        (tmp_path / "bare.safetensors", "bare.safetensors: not a whole elm adapter: 'adapter' is "
                                        "missing"),
        (tmp_path / "old.safetensors", "does not say which LLM it was trained for: 'template' is "
                                       "missing"),
        (folder / "adapter_step_2", f"elm: adapter: there is no file {folder}/adapter_step_2"),
    ):
        refused(re.escape(message), *start, f"adapter={path}", "query=Q")


def test_a_path_is_not_looked_for_on_the_hub(trained, start, tmp_path, monkeypatch):
    """Which would take half a minute of retries where there is no network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for key in ("adapter", "llm"):
        for name in ("data/tiny/llm", "./gpt2", "../x", "models/of/mine", "a b", "folder/"):
            said = refused("", *start, f"{key}={name}", "query=Q")
            assert "hub" not in said and "huggingface" not in said, said
    line = (f"elm: llm: cannot load data/tiny/llm: there is no folder data/tiny/llm here "
            f"({tmp_path}); paths are relative to it; llm=FOLDER names another place")
    refused(f"^{re.escape(line)}$", *start, "llm=data/tiny/llm", "query=Q")
    refused("^elm: llm: file is a file; give the folder of a model", *start, "llm=file", "query=Q")
    refused("^elm: llm: cannot load folder: no folder of a model, as it has no config.json",
            *start, "llm=folder", "query=Q")
    refused("hub", *start, "adapter=someone/adapter", "query=Q")


def test_names_that_can_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("gpt2", "Qwen/Qwen3-4B-Instruct-2507", "runs/mine", "someone/x_1.5"):
        assert elm.is_hub_name(name)
    for name in ("a/b/c", "./gpt2", "/root/x", "~/x", ".x", "x/", "a b", ""):
        assert not elm.is_hub_name(name)


def test_bad_input_of_generate(start, tmp_path):
    """All before the first answer."""
    narrow = tmp_path / "narrow.st"
    save_file({"x": torch.ones(3, 7)}, narrow)
    far = tmp_path / "far.st"
    save_file({"x": 9 * torch.randn(2000, 12)}, far)
    table = torch.randn(2000, 12)
    table[1900, 3] = torch.nan
    nan = tmp_path / "nan.st"
    save_file({"x": table}, nan)
    other_llm = make_llm(tmp_path / "other", "llama")
    for message, *more in (
        ("adaptor: unknown key, did you mean adapter", "adaptor=x"),
        ("num_beams: unknown key", "num_beams=3"),
        ("adapter: is missing", "adapter=none"),
        ("temperature = -1: Input should be", "temperature=-1"),
        ("file.toml: a setting is one word, name=value; quote a value with spaces", "file.toml"),
        (r"rows = 0: must be a list, as 'rows=\[0\]'", "rows=0"),
        (r"rows = '3:5': must be a list$", "rows=3:5"),
        (r"rows = '0, 7': must be a list, as 'rows=\[0, 7\]'", "rows=0, 7"),
        ("zero_stage = 1: must be 0 or 3$", "zero_stage=1"),
        ("query: no value after the =", "query="),
        (r"embeddings: there is no file nowhere.npy here \(.+\); paths are relative to it$",
         "embeddings=nowhere.npy"),
        ("rows: no row 10; the table has rows 0 to 9", "rows=[10]"),
        (r"rows = \[\]: must have an entry", "rows=[]"),
        ("a query has one <EMB> at most", "query=<EMB> or <EMB>?"),
        ("a prompt has .* tokens: the LLM reads 512", "query=" + 200 * "frog "),
        ("no .*nowhere here, nor can it be loaded from the hub", "adapter=nowhere"),
        ("embeddings: .* is a folder, not a file", f"embeddings={tmp_path}"),
        (r"narrow.st: \[3, 7\], but the adapter reads \[n, 12\]", f"embeddings={narrow}"),
        ("nan.st: row 1900 is zero, NaN or infinite", f"embeddings={nan}", "rows=none"),
        (r"far.st: the vectors' norm was \d", f"embeddings={far}"),
        ("hash of the LLM's weights was", f"llm={other_llm}"),
    ):
        said = refused(message, *start, "query=Q", "rows=[0]", *more)
        assert '"answer"' not in said


# -----------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "elm.py: error: the following arguments are required: COMMAND"),
        (["evla", "train.toml"], "elm.py: error: evla is not a command, did you mean eval?\n"),
        (["fly"], "error: fly is not a command; the commands are train, eval, generate, sweep\n"),
        (["eval"], "elm.py eval: error: the following arguments are required: TRAIN.TOML"),
        (["eval", "adapter=x"], "adapter=x is a setting; the file comes first"),
        (["train.lr=1", "train.toml"],
         "elm.py: error: train.lr=1 is a setting; the command or the file comes first\n"),
        (["train", ""], "elm.py train: error: argument TRAIN.TOML: a path cannot be empty\n"),
        ([NO_TABLES, "--foo"], "elm.py: error: unrecognized arguments: --foo\n"),
        ([NO_TABLES, "train.epochs=1", "--lr=1e-3"],
         "unrecognized arguments: --lr=1e-3; settings have no dashes: train.lr=1e-3\n"),
        (["--train.lr", NO_TABLES],
         "unrecognized arguments: --train.lr; settings have no dashes: train.lr=VALUE\n"),
        (["generate", "--max-new-tokens", "3"], "settings have no dashes: max_new_tokens=VALUE\n"),
        (["generate", "--rows=[0]"], "settings have no dashes: rows=[0]\n"),
    ],
)
def test_a_command_line_that_is_no_command_prints_the_usage(words, message):
    code, said = command(*words)
    assert code == 2
    assert said.startswith("usage: elm.py")
    assert message in said


def test_a_file_alone_means_train(tmp_path, monkeypatch):
    """Also with the option that some launchers put first, and by any name that exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe").write_text("train.lr = 'x'")
    (tmp_path / "recipe.toml").write_text("train.lr = 'x'")
    for words in (["recipe"], ["recipe.toml"], ["train", "recipe"], ["--local_rank=0", "recipe"]):
        refused("recipe.*: train.lr = 'x': Input should be a valid number", *words)
    refused(r"^elm: there is no file nowhere.toml here \(.*\); paths are relative to it$",
            "nowhere.toml")


def test_each_mistake_has_its_line():
    code, said = command(NO_TABLES, "train.lr=0", "train.epochs=x")
    assert code == 2
    assert said.splitlines() == [
        "elm: train.epochs = 'x': Input should be a valid integer",
        "elm: train.lr = 0: Input should be greater than 0"]


@pytest.mark.parametrize(
    "words, part",
    [
        (["--version"], f"elm {elm.__version__}\n"),
        (["help"], "    python elm.py generate adapter=PATH embeddings=FILE"),
        (["help", "generate"], "\n    bf16 = none (true or false, or none)  # of the LLM and the "),
        (["--help"], "    python elm.py generate adapter=PATH embeddings=FILE"),
        (["train.toml", "--help"], "\n[train]\n    batch_size = 16 (integer above 0)  # "),
        (["eval", "--help"], "\n    adapter (path)  # a file, a run's folder, or a name"),
        (["generate", "-h"], "\n    seed = 42 (integer from 0)  # of sampling\n"),
        (["sweep", "--help"], "\n[study]\n    name = "),
    ],
)
def test_help_and_version(words, part, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, said = command(*words)
    assert code == 0
    assert part in said


@pytest.mark.parametrize(
    "error, code, message",
    [
        (elm.UserError("a: b\nc: d"), 2, "elm: a: b\nelm: c: d\n"),
        (FileNotFoundError(2, "No such file", "x.toml"), 2, "elm: x.toml: No such file\n"),
        (torch.OutOfMemoryError("too much"), 2, "elm: too much\nelm: less memory is "),
        (SystemExit(143), 143, ""),
        (KeyboardInterrupt(), 130, "elm: stopped\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_ends_a_command_gives_its_exit_code(error, code, message, capsys):
    def fail(args):
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(command=elm.Command("fail", {}, elm.Config, "", "", fail, "less"))
    assert elm.run_command(parser, []) == code
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_stopped_command_says_how_it_goes_on(error, code, capsys):
    def fail(args):
        raise error

    stopped = elm.Command("fail", {}, elm.Config, "", "", fail, "less", after_stop="go on")
    parser = argparse.ArgumentParser()
    parser.set_defaults(command=stopped)
    assert elm.run_command(parser, []) == code
    assert capsys.readouterr().err == "elm: stopped; go on\n"


def test_commands_that_go_on_after_ctrl_c_say_so():
    told = {command.name: command.after_stop for command in (*elm.COMMANDS, *prepare.COMMANDS)}
    assert [name for name, text in told.items() if text.startswith("the same command goes on")] == [
        "sweep", "synthesize", "embed"]


def test_of_a_long_line_the_two_ends_are_shown(capsys):
    elm.print_error("train." + 5000 * "y" + ": unknown key")
    line = capsys.readouterr().err
    assert line.startswith("elm: train.yyy")
    assert line.endswith("yyy: unknown key\n")
    assert len(line) < 1020


@pytest.mark.parametrize("name", [command.name for command in elm.COMMANDS + prepare.COMMANDS])
def test_help_has_no_word_of_python(name):
    main = elm.main if name in [command.name for command in elm.COMMANDS] else prepare.main
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([name, "--help"]) == 0
    for line in printed.getvalue().splitlines():
        if not line.startswith("    ") or line.strip().startswith("#"):
            continue
        assert re.match(r"    \w+( = .+)? \(.+\)(  #|$)", line), line
        setting = line.partition("  #")[0]
        assert not re.search("None|True|False|Any|[a-z][A-Z]|Literal|Annotated|: ", setting)


def test_an_error_that_is_not_the_users_keeps_its_traceback():
    def fail(args):
        raise OSError("of no file")

    parser = argparse.ArgumentParser()
    parser.set_defaults(command=elm.Command("fail", {}, elm.Config, "", "", fail, "less"))
    with pytest.raises(OSError, match="of no file"):
        elm.run_command(parser, [])


def test_elm_py_in_a_process_of_its_own(run):
    """Exit codes, and errors on stderr alone."""
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"elm {elm.__version__}\n", "")
    done = run("nowhere.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"elm: there is no file nowhere.toml here ({Path.cwd()}); paths are "
                           "relative to it\n")
