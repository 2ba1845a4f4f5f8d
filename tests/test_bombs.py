"""Small files that demand much time or memory: work is linear in the bytes, or a limit stops it with a message."""

import gzip
import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from oracles.tiny_llama import write_tiny_llama
from small_data import store_of

from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation, Skipped
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer, TokenizerError
from minisft.errors import UserError
from minisft.formats import parse
from minisft.formats import records as reader
from minisft.formats.jinja import choose_template, recognize
from minisft.formats.parse import read
from minisft.reports.run_report import _text


@pytest.fixture(autouse=True)
def no_hanging():
    """A minute at most: what hangs fails."""
    def too_long(*_):
        raise TimeoutError("a minute has passed")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def seconds(work, size):
    taken = []
    for _ in range(3):
        start = time.process_time()  # of this process alone, whatever else the machine does
        work(size)
        taken.append(time.process_time() - start)
    return min(taken)


def is_linear(work):
    """Ten times the characters take about ten times as long (squared: a hundred times)."""
    return seconds(work, 10**5) < 35 * max(seconds(work, 10**4), 2e-3)


HEADER = r"<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA3 = "{{ m | trim }}" + HEADER.format("assistant")
CHATML = "<|im_start|>assistant\\n"


def filled(text, size):
    return text * (size // len(text))


HOSTILE = {
    "a default text in a string": lambda n: LLAMA3 + "'" + HEADER.format("system") + "a" * n + "<|eot_id|>'",
    "a default text without its end": lambda n: LLAMA3 + "'" + HEADER.format("system") + "a" * n,
    "escapes": lambda n: LLAMA3 + "'" + HEADER.format("system") + filled("\\\\", n) + "<|eot_id|>",
    "many beginnings": lambda n: LLAMA3 + filled("\n" + HEADER.format("system"), n),
    "many strings": lambda n: LLAMA3 + filled("'" + HEADER.format("system"), n),
    "strings in strings": lambda n: LLAMA3 + filled(f"'{HEADER.format('system')} \"{HEADER.format('system')}", n),
    "a default text outside": lambda n: LLAMA3 + "\n" + HEADER.format("system") + "a" * n,
    "chatml": lambda n: CHATML + filled("\n<|im_start|>system\\n", n),
    "names of variables": lambda n: "set " + filled("system", n),
    "set": lambda n: filled("set system ", n),
    "blanks after set": lambda n: "set" + " " * n + "=",
    "pipes": lambda n: LLAMA3.replace("trim", "") + filled("|  ", n),
    "blanks before the token": lambda n: " " * n + "{{" + " " * n + "bos_token",
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_models_jinja_is_looked_at_in_linear_time(hostile):
    assert is_linear(lambda size: recognize(HOSTILE[hostile](size)))


def test_a_long_default_text_is_still_found():
    text = "ş 'a' \\ " * 10_000
    written = text.replace("\\", "\\\\").replace("'", "\\'")
    assert recognize(LLAMA3 + "'" + HEADER.format("system") + written + "<|eot_id|>'") == ("llama3", text)


@pytest.mark.parametrize("text", ["<|", "<|a", "|>", "<||", "<| |", "&lt;|"])
def test_the_page_of_a_run_marks_control_tokens_in_linear_time(text):
    assert is_linear(lambda size: _text(filled(text, size)))
    assert '<span class="control">&lt;|eot_id|&gt;</span>' in _text(text + "<|eot_id|>")


@pytest.mark.parametrize("record", [
    lambda n: {"text": "a", **{f"k{i}": 1 for i in range(n // 10)}},
    lambda n: {"messages": filled(" ", n)},
    lambda n: {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * (n // 70)},
    lambda n: {"messages": [{"role": "user", "content": "a"}], "tools": "[" * n},
    lambda n: {"text": "a", "images": filled('[{"', n)},
    lambda n: {"instruction": "a", "output": "b", "history": [["c", "d"]] * (n // 12)},
    lambda n: {"a" * n: 1, "b": [{}]},
], ids=range(7))
def test_records_are_read_in_linear_time(tmp_path, record):
    def work(size):
        file = tmp_path / f"{size}.jsonl"
        if not file.exists():
            file.write_text(json.dumps(record(size)))
        with suppress(UserError):
            list(read(file))

    assert is_linear(work)


# One record that gives many conversations

def oasst(depth, leaves):
    node = {"text": "q", "role": "prompter", "replies": [{"text": str(i), "role": "assistant"} for i in range(leaves)]}
    for _ in range(depth):
        node = {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant", "replies": [node]}]}
    return {"message_tree_id": "t", "prompt": node}


@pytest.mark.parametrize("record", [
    {"instruction": "a", "history": [["b", "c"]] * 4000, "instances": [{"output": "d"}] * 4000},
    {"instruction": "a" * 60_000, "instances": [{"output": "d"}] * 4000},
    oasst(220, 3000),
], ids=["history x instances", "a long instruction x instances", "depth x leaves"])
def test_a_record_cannot_repeat_itself_without_end(tmp_path, record):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(record))
    assert file.stat().st_size < 200_000
    characters, conversations, start = 0, 0, time.process_time()
    for found in read(file):
        if isinstance(found, Skipped):
            assert found.reason == "more conversations of one record than 4,194,304 characters hold"
            break
        conversations += 1
        characters += sum(len(turn.content) for turn in found.turns)
    else:
        raise AssertionError("never stopped")
    assert conversations > 20
    assert characters <= parse.MAX_CHARACTERS + 70_000
    assert time.process_time() - start < 10


def test_one_long_conversation_is_no_repetition(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "a" * (parse.MAX_CHARACTERS + 1), "completion": "b"}))
    assert [type(found) for found in read(file)] == [Conversation]


# Bytes

@pytest.mark.parametrize("content", [b" " * (60 << 20), b"\n" * (60 << 20), b'{"text": "a"}' + b"\n" * (60 << 20)],
                         ids=["blanks", "lines", "lines after a record"])
def test_a_packed_file_of_blanks_is_read_fast(tmp_path, content):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(content, 1))
    start = time.process_time()
    assert len(list(read(file))) == content.startswith(b"{")
    assert time.process_time() - start < 4


@pytest.mark.parametrize(("content", "name"), [
    (b'{"text": "' + b"a" * 70_000, "a.jsonl"), (b'[{"text": "' + b"a" * 70_000, "a.json"),
    (b'{"text": "a"}\n' + b" " * 70_000, "a.jsonl"), (b"[" + b" " * 70_000, "a.json"), (b"a" * 70_000, "a.txt"),
])
def test_what_is_no_record_for_its_size_is_refused(tmp_path, monkeypatch, content, name):
    monkeypatch.setattr(reader, "RECORD_BYTES", 1 << 16)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"a\.\w+:[12]: a record of more than 0 MiB is not a conv.*remedy: "):
        list(read(tmp_path / name))


@pytest.fixture
def model(tmp_path):
    return write_tiny_llama(tmp_path / "tiny")


def test_pipes_and_devices_are_no_files(tmp_path, model):
    renderer = Renderer(load_templates()["llama3"], Tokenizer(model))
    os.mkfifo(pipe := tmp_path / "pipe.jsonl")
    (zeros := tmp_path / "zeros.jsonl").symlink_to("/dev/zero")
    for file in (pipe, zeros):
        for work in (lambda file=file: list(read(file)), lambda file=file: load_templates(file),
                     lambda file=file: store_of(file, renderer, tmp_path / "cache")):
            with pytest.raises(UserError, match=rf"{file.name}: a pipe or a device, not a regular file \(remedy: "):
                work()
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
        with pytest.raises(UserError, match=rf"{name}: a pipe or a device, not a regular file"):
            choose_template("", load_templates(), Tokenizer(model))
        (model / name).unlink()


def test_a_sparse_file_is_refused_before_it_is_read(tmp_path, model):
    file = tmp_path / "a.jsonl"
    file.touch()
    os.truncate(file, 1 << 40)
    with pytest.raises(UserError, match="this is zero bytes, as an interrupted copy leaves behind"):
        store_of(file, Renderer(load_templates()["llama3"], Tokenizer(model)), tmp_path / "cache")


# What the tokenizer cannot take

class Panic(BaseException):
    """Like the library's, which is not an Exception."""


class GivesUp:
    """A backend that panics at the word BOMB."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, **options):
        if any("BOMB" in text for text in texts):
            raise Panic("retry-limit-in-match over")
        return self.backend.encode_batch_fast(texts, **options)


def test_a_text_that_the_tokenizer_cannot_take_is_left_out_and_counted(tmp_path, model):
    tokenizer = Tokenizer(model)
    tokenizer._backend = GivesUp(tokenizer._backend)
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": f"q{i}", "completion": "BOMB" if i in (3, 7) else f"a{i}"} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = store_of(file, Renderer(load_templates()["llama3"], tokenizer), tmp_path / "cache")
    assert (store.report.read, store.report.skipped) == (10, {"the tokenizer cannot take this text": 2})
    assert "a.jsonl:4: " in store.report.examples["the tokenizer cannot take this text"]
    assert np.array_equal(store.lines, [1, 2, 3, 5, 6, 7, 9, 10])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: fails on a text of up to 4 characters \(retry-limit"):
        tokenizer.encode("BOMB")


@pytest.mark.slow
def test_ten_million_blanks(tmp_path, model):
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "q", "completion": "a" + " " * 10**7 + "x"}, {"prompt": "q", "completion": "a"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = Renderer(load_templates()["llama3"], Tokenizer(model))
    store = store_of(file, renderer, tmp_path / "cache")
    assert (store.report.kept, store.report.skipped) == (1, {"the tokenizer cannot take this text": 1})


# Templates of models

def test_the_default_of_several_chat_templates_is_taken(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    jinja = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{{ m | trim }}"
    settings["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": jinja}]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert choose_template("", load_templates(), Tokenizer(model)).name == "llama3"
    settings["chat_template"] = [{"name": "tool_use", "template": jinja}, 3]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not say which chat template the model uses; choose with"):
        choose_template("", load_templates(), Tokenizer(model))
    settings["chat_template"] = "{{ messages }}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the model's own chat template is none of these, and another one would"):
        choose_template("", load_templates(), Tokenizer(model))


def test_chatml_that_begins_with_bos_begins_with_it_here(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": "<|begin_of_text|>"}, "chat_template": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    found = choose_template("", known := load_templates(), Tokenizer(model))
    assert found == replace(known["chatml"], begin="<|begin_of_text|>")
    settings["bos_token"] = None
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="the model's own chat template is none of these"):
        choose_template("", known, Tokenizer(model))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
                                  "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_a_models_folder_holds_regular_files_of_a_sensible_size(tmp_path, model, capsys, name, kind):
    """Each of them once hung, filled the memory, or ended in a traceback."""
    if kind == "huge" and name == "model.safetensors":
        pytest.skip("weights may be of any size; a header that is none is refused")
    from minisft.runs.lifecycle import main

    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    elif kind == "device":
        (model / name).symlink_to("/dev/zero")
    else:
        with open(model / name, "wb") as file:
            file.truncate(2**40)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    (tmp_path / "empty.toml").touch()
    settings = {"model.path": model, "data.train": tmp_path / "a.jsonl", "run.dir": tmp_path / "run",
                "data.cache": tmp_path / "cache"}
    if name not in ("tokenizer_config.json", "chat_template.jinja"):  # which are read to find the template
        settings["data.template"] = "llama3"
    assert main([str(tmp_path / "empty.toml"), *(str(text) for key, value in settings.items()
                                                 for text in (f"--{key}", value))]) == 2
    said = capsys.readouterr().err
    assert f"{model / name}: " in said
    assert "a pipe or a device" in said or "more than such a file may have" in said
