"""`minisft chat`: what is printed is what `Assistant.answer` says to the conversation so far."""

import io
import json
import shutil
import sys
from itertools import chain
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minisft.__main__ import main
from minisft.cli import chat_command
from minisft.data.conversation import Turn
from minisft.data.tokenizer import Tokenizer
from minisft.generate.assistant import Assistant, Sampling

OPTIONS = {"--template": "llama3", "--precision": "fp32", "--max-new-tokens": "12"}


@pytest.fixture(scope="module")
def assistant(base):
    return Assistant.load(base, template="llama3")


@pytest.fixture
def said(base, monkeypatch, capsys):
    """A function (input, options) -> exit code, standard output and error."""
    def run(text="", *options):
        stream = io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        others = [part for name, value in OPTIONS.items() if name not in options for part in (name, value)]
        code = main(["chat", str(base), *others, *options])
        out.seek(0)
        return code, out.read(), capsys.readouterr().err

    return run


def answer(assistant, *turns, **options):
    roles = "user", "assistant"
    turns = turns if isinstance(turns[0], Turn) else [Turn(roles[i % 2], text) for i, text in enumerate(turns)]
    return assistant.answer([tuple(turns)], max_new_tokens=12, **options)[0]


def test_one_answer(assistant, said):
    first = answer(assistant, "Selam, nasıl gidiyor?")
    code, out, err = said("", "--prompt", "Selam, nasıl gidiyor?")
    assert (code, out) == (0, first + "\n")
    assert "cut after 12 tokens; --max-new-tokens allows more" in err
    assert said("Selam, nasıl gidiyor?\n", "--prompt", "-")[1] == first + "\n"


def test_options_reach_the_model(assistant, said):
    sampling = Sampling(temperature=1.5, top_k=100, top_p=0.9, repetition_penalty=1.2, seed=7)
    options = ["--temperature", "1.5", "--top-k", "100", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "7"]
    expected = answer(assistant, Turn("system", "Be brief."), Turn("user", "hi"), sampling=sampling)
    assert said("", "--prompt", "hi", "--system", "Be brief.", *options)[1] == expected + "\n"


def test_a_conversation_continues_until_it_is_reset(assistant, said):
    first = answer(assistant, "hello")
    second = answer(assistant, "hello", first, "and now?")
    assert said("hello\n\nand now?\n")[1] == f"{first}\n{second}\n"
    assert said("hello\n/reset\nhello\n/quit\nnot read\n")[1] == f"{first}\n{first}\n"
    with_system = answer(assistant, Turn("system", "Sing."), Turn("user", "hello"))
    assert with_system != first
    assert said("hello\n/system Sing.\nhello\n/system\nhello\n")[1] == f"{first}\n{with_system}\n{first}\n"
    assert said(" /quit\n")[1] == answer(assistant, "/quit") + "\n"  # a leading space: not a command


def test_help_and_unknown_commands(said):
    assert said("/help\n")[1] == chat_command.HELP + "\n"
    code, out, err = said("/halp me\n")
    assert (code, out) == (0, "")
    assert "error: /halp: no such command; /help lists them" in err


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(assistant, said, monkeypatch):
    whole = list(assistant.tokens((Turn("user", "hello"),), max_new_tokens=4))
    heard = []

    def tokens(self, turns, **options):
        heard.append([turn.content for turn in turns])
        yield from whole
        raise KeyboardInterrupt

    monkeypatch.setattr(Assistant, "tokens", tokens)
    part = "".join(list(assistant.renderer.tokenizer.decode_stream(whole)))
    code, out, _err = said("hello\nagain\n")
    assert code == 0
    assert out.count("(stopped)") == 2
    assert heard[0] == ["hello"]
    assert heard[1][0] == "hello"
    assert part.startswith(heard[1][1])
    assert heard[1][2] == "again"
    with pytest.raises(SystemExit) as exit:
        said("", "--prompt", "hello")
    assert exit.value.code == 130


def test_a_conversation_past_the_context(assistant, said):
    long = "a" * 1500
    code, out, err = said("", "--prompt", long)
    assert (code, out) == (2, "")
    assert "tokens leaves nothing to generate: the model's context has 1,024; shorten the conversation" in err
    code, out, err = said(f"{long}\n/reset\nhello\n")
    assert code == 0
    assert out.strip()
    assert "shorten the conversation; /reset begins anew" in err
    around = len(assistant.renderer.prompt((Turn("user", "a"),))) - 1
    code, out, err = said("", "--prompt", "a" * (1024 - 5 - around))
    assert code == 0
    assert "(cut: the model's context of 1,024 tokens is full; /reset begins anew)" in err


@pytest.mark.parametrize(("options", "message"), [
    (["--prompt", " "], "--prompt: it is empty; give a question, or leave --prompt out to talk"),
    (["--propmt", "x"], "unknown argument --propmt; `minisft chat --help` lists the options"),
    (["What is 2 + 2?"], "unknown argument What is 2 + 2?; give a question with --prompt; `minisft chat --help`"),
    (["--template", "llama4"], "--template: no template is called 'llama4'; choose with --template: llama3,"),
    (["--template", ""], "does not say which chat template the model uses; choose with --template: llama3, llama3.1, "
     "chatml, alpaca, text; or write your own and name its file in --templates"),
    (["--top-p", "0"], "top_p: 0.0 was given; it must be above 0"),
    (["--templates", "none.toml"], "none.toml: data.templates cannot be read"),
    (["--prompt", "\udcff"], "the text is not UTF-8"),
])
def test_bad_input_is_one_line(said, options, message):
    code, out, err = said("", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("rows", "largest"), [(319, 0), (318, 318), (309, 318), (300, 318)])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(base, tmp_path, capsys, rows, largest):
    """Of those that a text or the template can have: 319 is a control token that this one does not use."""
    assert Tokenizer(base).largest_of_text == 308
    folder = shutil.copytree(base, tmp_path / "small")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    save_file({name: t[:rows] if len(t) == 320 else t for name, t in tensors.items()}, folder / "model.safetensors")
    assert main(["chat", str(folder), *chain(*OPTIONS.items()), "--prompt", "A"]) == 2 * bool(largest)
    if largest:
        assert capsys.readouterr().err == (
            f"error: {folder}/tokenizer.json: token id {largest} is past the model's vocabulary of {rows}; it belongs "
            "to another model, or --template does\n")


def test_a_missing_folder_is_named(capsys):
    assert main(["chat", "nowhere", "--prompt", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere")


def test_characters_of_several_tokens_appear_whole(base):
    tokenizer = Tokenizer(base)
    text = "şu ağaç 🌳👩‍🚀 çok güzel"
    ids = tokenizer.encode(text)
    assert len(tokenizer.encode("ş")) == 2
    assert len(tokenizer.encode("🌳")) == 4
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert {"ş", "ğ", "🌳"} <= set(pieces)  # each as soon as it is there
    cut = tokenizer.encode("ok 🌳")[:-1]
    assert "".join(tokenizer.decode_stream(cut)) == tokenizer.decode(cut) == "ok \ufffd"


@given(ids=st.lists(st.integers(0, 319), max_size=30))
@settings(max_examples=200)
def test_the_pieces_of_any_tokens_are_their_text(ids, base):
    tokenizer = Tokenizer(base)
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


def test_a_long_answer_is_decoded_in_linear_work(base, monkeypatch):
    tokenizer, decoded = Tokenizer(base), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    ids = tokenizer.encode("çok güzel bir gün " * 100)
    assert "".join(tokenizer.decode_stream(ids)) == decode(ids)
    assert sum(decoded) < 10 * len(ids)


def test_an_answer_cannot_steer_the_terminal():
    assert chat_command.harmless("\x1b[2J\ta\n\x07ş🌳") == "⟨U+001B⟩[2J\ta\n⟨U+0007⟩ş🌳"


def test_lines_are_remembered_under_the_state_folder(tmp_path, monkeypatch, capsys):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    readline.clear_history()
    with chat_command.history():
        readline.add_history("önce bu")
    file = tmp_path / "minisft" / "history"
    assert "nce bu" in file.read_text(encoding="utf-8", errors="replace")
    assert file.stat().st_mode & 0o777 == 0o600
    readline.clear_history()
    with chat_command.history():
        assert readline.get_history_item(readline.get_current_history_length()) == "önce bu"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # not allowed by the specification, so ignored
    monkeypatch.setattr(chat_command.Path, "home", lambda: tmp_path / "home")
    with chat_command.history():
        pass
    assert (tmp_path / "home/.local/state/minisft/history").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with chat_command.history():
        pass
    assert "cannot save the history" in capsys.readouterr().err


def test_auto_is_bf16_if_the_machine_multiplies_in_it(base, monkeypatch):
    import torch

    from minisft.cpu import kernels

    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(kernels, "CPU_MATMULS_IN_BF16", fast)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        options = SimpleNamespace(model=base, template="llama3", templates="", temperature=0.0, top_k=0, top_p=1.0,
                                  repetition_penalty=1.0, seed=0, precision="auto", system="", max_new_tokens=1)
        assert chat_command.Chat(options).assistant.model.model.norm.weight.dtype == dtype
