"""Rendering: the token ids that other programs compute, masks that cover answers and stop tokens, text that stays text.

Oracles: transformers' `apply_chat_template` on Jinja written here; TRL's ids and masks in oracles/trl_curve.json; and,
for the text, f-strings.
"""

import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.tiny_llama import tiny_tokenizer, write_tiny_llama
from small_data import documents_of, plain_documents
from transformers import PreTrainedTokenizerFast

from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation, Skipped, Turn
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.formats.jinja import choose_template, recognize, written
from minisft.formats.parse import ROLES, read

ORACLES = Path(__file__).parent / "oracles"
TEMPLATES = load_templates()
TRAIN_ON = ("assistant", "last_assistant", "all")

LLAMA3 = ("{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role + "
          "'<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' "
           "}}{% endif %}"
           "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

STOP = {"chatml": "<|im_end|>", **dict.fromkeys(("llama3", "llama3.1", "alpaca", "text"), "<|eot_id|>")}
BOS = "<|begin_of_text|>"
BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

QUESTION = (Turn("user", "Hi"), Turn("assistant", "Hello!"))
TWICE = (Turn("system", "Be kind."), *QUESTION, Turn("user", "And?"), Turn("assistant", "So."))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def chatml_folder(tmp_path_factory):
    """The tiny tokenizer with ChatML's two tokens, and nothing that its post-processor would add."""
    folder, backend = tmp_path_factory.mktemp("chatml"), tiny_tokenizer()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    content = json.loads(backend.to_str())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"},
                                                              "chat_template": SMOLLM2}))
    return folder


@pytest.fixture(params=["llama3", "llama3.1", "chatml", "alpaca", "text"])
def renderer(request, folder, chatml_folder):
    name = request.param
    return Renderer(TEMPLATES[name], Tokenizer(chatml_folder if name == "chatml" else folder))


def conversation(*turns):
    return Conversation(turns, "a.jsonl", 1)


def rendered(renderer, *turns):
    return documents_of(renderer, [conversation(*turns)])[0]


def jinja_of(renderer):
    return written(renderer.template, renderer.fill)


def trained_runs(renderer, ids, trained):
    """The text of each unbroken run of trained tokens."""
    runs = groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [renderer.tokenizer.decode([token for token, _ in run]) for is_trained, run in runs if is_trained]


def theirs(tokenizer_file, jinja, turns, **options):
    """Token ids as transformers renders and encodes them, all at once."""
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), bos_token="<|begin_of_text|>")
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text = hugging_face.apply_chat_template(messages, chat_template=jinja, tokenize=False, **options)
    return hugging_face.encode(text, add_special_tokens=False)


def conversations(name="conversations.jsonl"):
    return list(read(ORACLES / name))


# Llama-3

def test_ids_and_masks_are_those_of_trl(tokenizer):
    renderer = Renderer(TEMPLATES["llama3"], tokenizer)
    documents = json.loads((ORACLES / "trl_curve.json").read_text(encoding="utf-8"))["documents"]
    ours = documents_of(renderer, conversations())
    assert [{"ids": ids, "trained": list(map(int, trained))} for ids, trained in ours] == documents


def test_the_released_template_gives_the_same_ids(tokenizer):
    renderer = Renderer(TEMPLATES["llama3"], tokenizer)
    for c in conversations():
        assert rendered(renderer, *c.turns)[0] == theirs(tokenizer.file, LLAMA3, c.turns)
        given = c.turns[:-1]
        assert renderer.prompt(given) == theirs(tokenizer.file, LLAMA3, given, add_generation_prompt=True)


def test_llama31_opens_every_conversation_with_dates(tokenizer):
    renderer = Renderer(TEMPLATES["llama3.1"], tokenizer)
    system = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + DATES
    for turns, text in ((QUESTION, ""), ((Turn("system", " Be kind. "), *QUESTION), "Be kind.")):
        ids, trained = rendered(renderer, *turns)
        assert tokenizer.decode(ids) == (
            f"{system}{text}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>")
        assert trained_runs(renderer, ids, trained) == ["Hello!<|eot_id|>"]


# Other templates

def test_chatml(chatml_folder):
    renderer = Renderer(TEMPLATES["chatml"], Tokenizer(chatml_folder))
    ids, trained = rendered(renderer, *TWICE)
    assert renderer.tokenizer.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
        "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n")
    assert trained_runs(renderer, ids, trained) == ["Hello!<|im_end|>", "So.<|im_end|>"]


def test_alpaca(tokenizer):
    renderer = Renderer(TEMPLATES["alpaca"], tokenizer)
    ids, trained = rendered(renderer, Turn("user", "Add.", context="1, {content}"), Turn("assistant", "3"),
                            Turn("user", "Twice"), Turn("assistant", "6"))
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|>Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n"
        "1, {content}\n\n### Response:\n3<|eot_id|>\n\n### Instruction:\nTwice\n\n### Response:\n6<|eot_id|>")
    assert trained_runs(renderer, ids, trained) == ["3<|eot_id|>", "6<|eot_id|>"]
    ids, _ = rendered(renderer, *QUESTION)
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|>Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nHi\n\n### Response:\nHello!<|eot_id|>")


def test_questions_and_answers_as_they_stand(tokenizer):
    renderer = Renderer(TEMPLATES["text"], tokenizer)
    ids, trained = rendered(renderer, Turn("user", "2+2="), Turn("assistant", "4"))
    assert tokenizer.decode(ids) == "<|begin_of_text|>2+2=4<|eot_id|>"
    assert trained_runs(renderer, ids, trained) == ["4<|eot_id|>"]


def test_a_plain_document_is_trained_whole_but_for_its_first_token(renderer):
    ids, trained = rendered(renderer, Turn("text", " The sea.\n"))
    name = renderer.template.name
    first = "" if name == "chatml" else "<|begin_of_text|>"
    end = "<|end_of_text|>" if name.startswith("llama3") else STOP[name]
    assert renderer.tokenizer.decode(ids) == f"{first} The sea.\n{end}"
    assert trained == [False] + [True] * (len(ids) - 1)


# Which tokens are trained

@pytest.mark.parametrize(("train_on", "runs"), [
    ("assistant", ["Hello!<|eot_id|>", "So.<|eot_id|>"]),
    ("last_assistant", ["So.<|eot_id|>"]),
])
def test_train_on(tokenizer, train_on, runs):
    renderer = Renderer(TEMPLATES["llama3"], tokenizer, train_on=train_on)
    assert trained_runs(renderer, *rendered(renderer, *TWICE)) == runs


def test_train_on_all_leaves_out_the_first_token_only(renderer):
    everything = Renderer(renderer.template, renderer.tokenizer, train_on="all")
    ids, trained = rendered(everything, *TWICE)
    assert trained == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize(("train_on", "runs"), [
    ("assistant", ["So.<|eot_id|>"]),
    ("last_assistant", ["So.<|eot_id|>"]),
    ("all", ["<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>"
             "\n\nHi<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
             "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>"]),
])
def test_an_answer_that_is_marked_untrained_never_is(tokenizer, train_on, runs):
    renderer = Renderer(TEMPLATES["llama3"], tokenizer, train_on=train_on)
    turns = [replace(turn, trained=turn.content != "Hello!") for turn in TWICE]
    assert trained_runs(renderer, *rendered(renderer, *turns)) == runs
    last = [replace(turn, trained=turn.content != "So.") for turn in TWICE]
    if train_on == "last_assistant":
        assert trained_runs(renderer, *rendered(renderer, *last)) == []


# Laws of every template

def naive(name, turns):
    """The text of a conversation, and how many of its tokens are control tokens."""
    turns = [(turn.role, turn.content) for turn in turns]
    if name.startswith("llama3"):
        turns = [(role, content.strip()) for role, content in turns]
        if name == "llama3.1":
            system, turns = (turns[0][1], turns[1:]) if turns[0][0] == "system" else ("", turns)
            turns = [("system", DATES + system), *turns]
        text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in turns)
        return BOS + text, 1 + 3 * len(turns)
    if name == "chatml":
        return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns), 2 * len(turns)
    if name == "alpaca" and turns[0][0] != "system":
        turns = [("system", BELOW), *turns]
    question = "\n\n### Instruction:\n{}\n\n### Response:\n" if name == "alpaca" else "{}"
    forms = {"system": "{}", "user": question, "assistant": "{}<|eot_id|>"}
    text = "".join(forms[role].replace("{}", content) for role, content in turns)
    return BOS + text, 1 + sum(role == "assistant" for role, _ in turns)


STRANGE = ("<|eot_id|>", BOS, "<|im_end|>", "<|im_start|>", "<|start_header_id|>system<|end_header_id|>", "{bos}",
           "{eos}", "<|end_of_text|>", "{content}", "{{ 1 }}", "\x00", "\u2028", "ğ🙂", "\n\n", " ", "a")
PARTS = st.sampled_from(STRANGE) | st.text(max_size=8)
CONTENTS = st.lists(PARTS, min_size=1, max_size=4).map("".join).filter(str.strip)


@given(st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3), st.none() | CONTENTS)
@settings(max_examples=40)
def test_text_stays_text_and_answers_are_tokenised_as_they_are_generated(renderers, exchanges, system):
    turns = [Turn("system", system)] if system else []
    for question, answer in exchanges:
        turns += [Turn("user", question), Turn("assistant", answer)]
    for (assistant, *others) in renderers:
        name, tokenizer = assistant.template.name, assistant.tokenizer
        ids, trained = rendered(assistant, *turns)
        text, control_tokens = naive(name, turns)
        assert tokenizer.decode(ids) == text
        assert sum(token in tokenizer.control.values() for token in ids) == control_tokens
        answers = [turn.content.strip() if name.startswith("llama3") else turn.content
                   for turn in turns if turn.role == "assistant"]
        assert trained_runs(assistant, ids, trained) == [answer + STOP[name] for answer in answers]
        for renderer in (assistant, *others):
            assert rendered(renderer, *turns)[0] == ids, "the mask has a say in the ids"
            for number, at in enumerate(i for i, turn in enumerate(turns) if turn.role == "assistant"):
                whole = [*renderer.prompt(tuple(turns[:at])), *tokenizer.encode(answers[number]),
                         tokenizer.control[STOP[name]]]
                assert ids[: len(whole)] == whole


TURKISH = "İstanbul'un ışığı IĞDIR’da ılık; şiir ŞİİR, s\u0327 g\u0306 i\u0307 â a\u0302 Ⅻ ﬁ"


def test_turkish_text_survives_from_the_file_to_the_tokens(tmp_path, tokenizer):
    """No letter changes its case, its accents or its composition."""
    file = tmp_path / "a.jsonl"
    for ascii_only in (True, False):
        record = {"prompt": TURKISH, "completion": TURKISH[::-1]}
        file.write_text(json.dumps(record, ensure_ascii=ascii_only), encoding="utf-8")
        [conversation] = read(file)
        renderer = Renderer(load_templates()["llama3"], tokenizer)
        [(ids, trained)] = documents_of(renderer, [conversation])
        text = tokenizer.decode([int(token) for token in ids])
        assert f"\n\n{TURKISH}<|eot_id|>" in text
        assert trained_runs(renderer, ids, trained) == [TURKISH[::-1] + "<|eot_id|>"]


@pytest.mark.parametrize("train_on", TRAIN_ON)
def test_no_token_spans_the_beginning_of_an_answer(tokenizer, train_on):
    """The tokenizer would make one token of `a` and `n`, and of two newlines."""
    a, n, lines = (tokenizer.encode(text) for text in ("a", "n", "\n\n"))
    assert len(lines) == len(tokenizer.encode("an")) == 1
    bos, stop = [tokenizer.control[BOS]], [tokenizer.control["<|eot_id|>"]]
    renderer = Renderer(TEMPLATES["text"], tokenizer, train_on=train_on)
    assert rendered(renderer, Turn("user", "a"), Turn("assistant", "n"))[0] == bos + a + n + stop
    two_lines = replace(TEMPLATES["text"], user=("", "\n"), assistant=("\n", "{eos}", ""))
    renderer = Renderer(two_lines, tokenizer, train_on=train_on)
    assert renderer.prompt((Turn("user", "a"),)) == bos + a + lines
    assert rendered(renderer, Turn("user", "a"), Turn("assistant", "n"))[0] == bos + a + lines + n + stop


@pytest.fixture(scope="module")
def renderers(folder, chatml_folder):
    """For each template, a renderer for each value of train_on."""
    tokenizers = {name: Tokenizer(chatml_folder if name == "chatml" else folder) for name in TEMPLATES}
    return [[Renderer(template, tokenizers[name], train_on=train_on) for train_on in TRAIN_ON]
            for name, template in TEMPLATES.items()]


@pytest.mark.parametrize("name", TEMPLATES)
def test_documents_encoded_together_are_those_encoded_piece_by_piece(renderers, name):
    for renderer in renderers[list(TEMPLATES).index(name)]:
        assert documents_of(renderer, conversations()) == plain_documents(renderer, conversations())
        assert documents_of(renderer, []) == []


def test_generation_stops_at_the_trained_stop_token_and_at_the_end_of_a_text(renderer):
    name, control = renderer.template.name, renderer.tokenizer.control
    ends = {STOP[name], "<|end_of_text|>"} if name.startswith("llama3") else {STOP[name]}
    ends |= {"<|eom_id|>"} if name == "llama3.1" else set()  # as Llama-3.1's own generation_config.json has it
    assert renderer.stop_ids() == {control[end] for end in ends}


# The Jinja that is written for other programs

def test_the_written_jinja_renders_the_same_ids(renderer):
    file, jinja, name = renderer.tokenizer.file, jinja_of(renderer), renderer.template.name
    for c in conversations():
        ids, given = rendered(renderer, *c.turns)[0], c.turns[:-1]
        prompt = theirs(file, jinja, given, add_generation_prompt=True)
        if name == "text":  # question and answer touch: encoded as one text they may share a token
            assert renderer.tokenizer.decode(theirs(file, jinja, c.turns)) == renderer.tokenizer.decode(ids)
        else:
            assert theirs(file, jinja, c.turns) == ids
        if name != "text" or len(given) < 3:
            assert renderer.prompt(given) == prompt


def messages_of(role, content):
    """A conversation in which `role` says `content`: first, or as the answer to a question or to a tool call."""
    asked, answered = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
    said = {"role": role, "content": content}
    return {"system": [said, asked, answered], "user": [said, answered], "assistant": [asked, said], "result": [
        asked, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, said, answered]}[
        ROLES.get(role, "user")]


CONTENT = {"text": " Be kind.\n", "parts": [{"type": "text", "text": " Be "}, {"type": "text", "text": "kind."}],
           "an image": [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": "x"}],
           "an object": {"a": [1, "ğ"]}, "a list": [1, "ğ"], "a number": 3}


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("role", [*(role for role, own in ROLES.items() if own != "call"), "moderator", "<|eot_id|>"])
def test_the_written_jinja_knows_what_training_knows(renderer, tmp_path, role, content):
    """Each role with each kind of content in each template: the ids that are trained, or an error; nothing dropped."""
    messages = messages_of(role, CONTENT[content])
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    [found] = map(renderer.renderable, read(tmp_path / "a.jsonl"))
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(renderer.tokenizer.file), bos_token=BOS)
    hugging_face.chat_template = jinja_of(renderer)
    if isinstance(found, Skipped):
        with pytest.raises(jinja2.TemplateError, match=r"does not know (the role|these tools)|content is not text"):
            hugging_face.apply_chat_template(messages)
        return
    ids = hugging_face.apply_chat_template(messages, return_dict=False)
    ours = documents_of(renderer, [found])[0][0]
    if renderer.template.name == "text":  # question and answer touch
        ids, ours = map(renderer.tokenizer.decode, (ids, ours))
    assert ids == ours


@pytest.mark.parametrize("content", ["", " \n", None, [], [{"type": "text", "text": " "}]])
def test_a_blank_system_turn_is_none_in_the_written_jinja_too(renderer, tmp_path, content):
    messages = messages_of("system", content)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    [found] = read(tmp_path / "a.jsonl")
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(renderer.tokenizer.file), bos_token=BOS)
    text = hugging_face.apply_chat_template(messages, chat_template=jinja_of(renderer), tokenize=False)
    assert text == renderer.tokenizer.decode(rendered(renderer, *found.turns)[0])


@pytest.mark.parametrize("given", [{"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
                                   {"builtin_tools": ["brave_search"]}])
def test_tools_that_the_written_jinja_would_leave_out_are_an_error(renderer, given):
    if renderer.template.name != "llama3.1":
        with pytest.raises(jinja2.TemplateError, match="does not know these tools"):
            theirs(renderer.tokenizer.file, jinja_of(renderer), QUESTION, **given)


def test_a_jinja_string_survives_every_character(chatml_folder):
    default = "It's \\n a \"test\";\r\n{{ 1 }} {% x %} {# y #}\tşğ 🙂"
    template = replace(TEMPLATES["chatml"], default_system=default)
    renderer = Renderer(template, Tokenizer(chatml_folder))
    assert theirs(renderer.tokenizer.file, jinja_of(renderer), QUESTION) == rendered(renderer, *QUESTION)[0]
    assert recognize(jinja_of(renderer)) == ("chatml", default)


def test_a_default_system_text_is_trimmed_in_both(tokenizer):
    renderer = Renderer(replace(TEMPLATES["llama3"], default_system=" Be kind. "), tokenizer)
    assert theirs(tokenizer.file, jinja_of(renderer), QUESTION) == rendered(renderer, *QUESTION)[0]
    assert recognize(jinja_of(renderer)) == ("llama3", "Be kind.")


# Which template a model uses

@pytest.mark.parametrize(("jinja", "found"), [
    (LLAMA3, ("llama3", None)),
    (LLAMA3.replace("\n", "\\n"), ("llama3", None)),
    ("{{- 'Cutting Knowledge Date: December 2023\n' }}" + LLAMA3, ("llama3.1", "")),
    ("{{ '<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>' }}" + LLAMA3, ("llama3", "Be kind.")),
    (SMOLLM2, ("chatml", SMOLLM2_SYSTEM)),
    (SMOLLM2.replace("a helpful AI", "everyone\\'s {best}"),
     ("chatml", SMOLLM2_SYSTEM.replace("a helpful AI", "everyone's {best}"))),
    ("{% if messages[0].role != 'system' %}<|im_start|>system\nIt's me.<|im_end|>\n{% endif %}{% for m in messages %}"
     "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
     ("chatml", "It's me.")),
    ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
     "{{ '<|im_start|>assistant\n' }}", ("chatml", None)),
    ("{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n<|im_start|>assistant\n' }}", ("chatml", None)),
])
def test_known_jinja_is_recognised(jinja, found):
    assert recognize(jinja) == found


@pytest.mark.parametrize("jinja", [
    None, "", 3, [{"name": "default", "template": LLAMA3}],
    "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
    SMOLLM2 + "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}" + SMOLLM2,
    r"{{ '<|im_start|>system\n\x<|im_end|>' }}" + SMOLLM2, r"{{ '<|im_start|>system\n\ud800<|im_end|>' }}" + SMOLLM2,
    "{{ bos_token }}\n" + SMOLLM2,  # the newline would be rendered
    "{% if true %}{{ bos_token }}{% endif %}" + SMOLLM2, "{{ bos_token }}" + SMOLLM2 + "{{ bos_token }}",
    LLAMA3.replace(" | trim", ""),
    LLAMA3.replace("assistant<|end_header_id|>", "bot<|end_header_id|>"),
    "{% set system_message = 'You are a pirate.' %}" + LLAMA3,
    SMOLLM2.replace("assistant\n", "assistant\n<think>\n"),
])
def test_other_jinja_is_not(jinja):
    assert recognize(jinja) is None


def test_every_written_jinja_is_recognised_or_unknown_but_never_mistaken(renderer):
    expected = {"llama3": ("llama3", None), "llama3.1": ("llama3.1", ""), "chatml": ("chatml", None)}
    assert recognize(jinja_of(renderer)) == expected.get(renderer.template.name)


@pytest.mark.parametrize("begin", ["{{ bos_token }}", "{{- bos_token -}}\n ", " {{bos_token}}"])
def test_chatml_that_begins_with_bos_is_taken_over(chatml_folder, tmp_path, begin):
    shutil.copyfile(chatml_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": BOS}, "eos_token": "<|im_end|>",
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": begin + SMOLLM2}]}))
    tokenizer = Tokenizer(tmp_path)
    renderer = Renderer(choose_template("", TEMPLATES, tokenizer), tokenizer)
    for c in conversations():
        ids = rendered(renderer, *c.turns)[0]
        assert ids == theirs(tokenizer.file, begin.strip(" ") + SMOLLM2, c.turns)
        assert ids == theirs(tokenizer.file, jinja_of(renderer), c.turns)
        assert tokenizer.decode(ids[:1]) == BOS


@pytest.mark.parametrize("text", ["\\x", "\\ud800", "\\u12", "\\N{nothing}"])
def test_a_default_system_text_that_is_none_is_refused(tmp_path, text):
    write_tiny_llama(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(SMOLLM2.replace("SmolLM", text))
    with pytest.raises(UserError, match=r"the model's own chat template is none of these.*choose with data\.tem"):
        choose_template("", TEMPLATES, Tokenizer(tmp_path))


@pytest.mark.parametrize("hostile", ["\n<|im_start|>system\n", "'<|im_start|>system\n", "system",
                                     "\"<|im_start|>system\\n\\", "set ", "{{ bos_token", "}<|im_start|>system\nx",
                                     " ", "\\"])
def test_a_hostile_jinja_takes_time_linear_in_its_length(hostile):
    def seconds(length):
        jinja = "<|im_start|>assistant\n set system" + hostile * (length // len(hostile))
        started = time.perf_counter()
        recognize(jinja)
        return time.perf_counter() - started
    assert seconds(100_000) < 40 * max(seconds(10_000), 1e-2)


def test_smollm2s_default_system_turn_is_taken_over(chatml_folder):
    renderer = Renderer(replace(TEMPLATES["chatml"], default_system=recognize(SMOLLM2)[1]), Tokenizer(chatml_folder))
    for c in conversations():
        assert rendered(renderer, *c.turns)[0] == theirs(renderer.tokenizer.file, SMOLLM2, c.turns)


# Templates of one's own

MINE = r"""
[mine]
begin = "{bos}"
system = ["S: ", "\n"]
user = ["U: ", "\n"]
assistant = ["A:\n", "<|eom_id|>", "\n"]
document_end = "{eos}"
context = "{context}: {content} {x}"
trim = true
"""


def test_a_template_of_ones_own(tmp_path, tokenizer):
    (tmp_path / "t.toml").write_text(MINE, encoding="utf-8")
    templates = load_templates(tmp_path / "t.toml")
    assert set(templates) == {*TEMPLATES, "mine"}
    renderer = Renderer(templates["mine"], tokenizer)
    ids, trained = rendered(renderer, Turn("user", " {context} ", context="c{content}"), Turn("assistant", "x "))
    assert tokenizer.decode(ids) == "<|begin_of_text|>U: c{content}:  {context}  {x}\nA:\nx<|eom_id|>\n"
    assert trained_runs(renderer, ids, trained) == ["x<|eom_id|>"]
    assert renderer.stop_ids() == {tokenizer.control["<|eom_id|>"], tokenizer.control["<|eot_id|>"]}
    for c in conversations():
        assert rendered(renderer, *c.turns)[0] == theirs(tokenizer.file, jinja_of(renderer), c.turns)


@pytest.mark.parametrize("field", ["system_prefix", "default_system", "default_system_context", "context"])
@pytest.mark.parametrize("token", ["<|eot_id|>", "{bos}"])
def test_a_special_token_in_what_a_template_puts_into_contents_is_refused(tokenizer, field, token):
    template = replace(load_templates()["llama3"], **{field: f"{{content}} {{context}} {token}"})
    with pytest.raises(UserError, match=rf"template llama3: {field} has <\|\w+\|>, but it is content, in which a"):
        Renderer(template, tokenizer)


@pytest.mark.parametrize(("toml", "message"), [
    ("[a", "t.toml: not TOML: "),
    ("a = 1", "t.toml: a: expected a table [a] with the fields "),
    ("[a]\nsytem = ['', '']", "t.toml: [a] sytem: unknown; the fields are system, user, assistant, begin, "),
    ("[a]\nname = 'x'", "t.toml: [a] name: unknown; the fields are "),
    ("[a]\nuser = 'x'", "t.toml: [a] user: expected [before, after], all strings; found 'x'"),
    ("[a]\nuser = ['x']", "t.toml: [a] user: expected [before, after], all strings; found ['x']"),
    ("[a]\nassistant = ['x', 'y', 'z', '']", "t.toml: [a] assistant: expected [before, stop token] or [before, stop "
     "token, after], all strings; found ['x', 'y', 'z', '']"),
    ("[a]\nuser = ['x', 1]", "t.toml: [a] user: expected [before, after], all strings; found ['x', 1]"),
    ("[a]\ntrim = 'yes'", "t.toml: [a] trim: expected true or false; found 'yes'"),
    ("[a]\nbegin = true", "t.toml: [a] begin: expected a string; found True"),
    ("[a]\nuser = ['', '']", "t.toml: [a]: system, assistant missing"),
    ("[a]\nsystem = ['', '']\nuser = ['', '']\nassistant = ['', '']",
     "t.toml: [a] assistant: nothing ends the answer, so the model would never stop; give the stop token as"),
    ("[a]\nsystem = ['', '']\nuser = ['', '']\nassistant = ['', '{eos}']\ncontext = '{context}'",
     "t.toml: [a] context: must contain {content} and {context}; found '{context}'"),
])
def test_mistakes_in_templates(tmp_path, monkeypatch, toml, message):
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(toml)
    with pytest.raises(UserError, match=re.escape(message)):
        load_templates("t.toml")


def test_a_template_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'no.toml'}: data.templates cannot be read: ")):
        load_templates(tmp_path / "no.toml")
    (tmp_path / "t.toml").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"data\.templates cannot be read: 'utf-8' codec"):
        load_templates(tmp_path / "t.toml")


def test_a_template_must_fit_the_tokenizer(tokenizer, chatml_folder, tmp_path):
    message = "template chatml: system has <|im_start|>, which is not a special token of "
    with pytest.raises(UserError, match=re.escape(message)):
        Renderer(TEMPLATES["chatml"], tokenizer)
    with pytest.raises(UserError, match=r"assistant ends with 'STOP', which contains no special token of "):
        Renderer(replace(TEMPLATES["llama3"], assistant=("", "STOP", "")), tokenizer)
    content = (chatml_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token is None; the template ends a text with"):
        Renderer(TEMPLATES["alpaca"], Tokenizer(tmp_path))
    assert Renderer(TEMPLATES["llama3"], Tokenizer(tmp_path)).stop_ids()  # needs no tokenizer_config.json


# The tokenizer's files

@pytest.mark.parametrize(("file", "content", "message"), [
    ("tokenizer.json", b"", "tokenizer.json: not a tokenizer.json ("),
    ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer.json ("),
    ("tokenizer.json", b"\xff\x00", "tokenizer.json: not a tokenizer.json ("),
    ("tokenizer.json", None,
     "tokenizer.json: No such file or directory; model.tokenizer, or else model.path, is a folder with a "),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "json: its vocabulary is empty; down"),
    ("tokenizer_config.json", b"{", "tokenizer_config.json: not readable JSON ("),
    ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: not readable JSON ("),
    ("tokenizer_config.json", b"[]", "tokenizer_config.json: expected a JSON object, found list"),
    ("tokenizer_config.json", b'{"eos_token": "nope"}', "tokenizer_config.json: eos_token is 'nope'; the template"),
])
def test_damaged_tokenizers(tmp_path, file, content, message):
    write_tiny_llama(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        Tokenizer(tmp_path).eos  # noqa: B018


def test_what_is_no_file_or_too_large_is_not_read(tmp_path, monkeypatch):
    write_tiny_llama(tmp_path)
    with pytest.raises(UserError, match=r"/dev/zero: a pipe or a device, not a regular file"):
        Tokenizer("/dev/zero")
    monkeypatch.setattr("minisft.data.tokenizer.LARGEST", 1000)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json; model\.tokenizer, or else model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(("file", "remedy"), [
    ("adapter_config.json", "holds an adapter: `minisft convert {} TARGET --merge` makes one model of it and its base"),
    ("model.gguf", "GGUF files are not read: download the safetensors and the tokenizer.json that they were made ")])
def test_what_a_folder_without_a_tokenizer_has_instead(tmp_path, file, remedy):
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=re.escape(remedy.format(tmp_path))):
        Tokenizer(tmp_path)
    with pytest.raises(UserError, match="GGUF files are not read" if file == "model.gguf" else "model.tokenizer, or"):
        Tokenizer(tmp_path / file)


def test_dropout_of_merges_is_off(tmp_path, tokenizer):
    """Or two caches of one file would differ, and so would whoever loads the exported tokenizer."""
    content = json.loads(tokenizer.content)
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found, text = Tokenizer(tmp_path), "Then the other one and the third " * 20
    assert found.encode(text) == found.encode_batch([text])[0] == tokenizer.encode(text)
    assert json.loads(found.content) == json.loads(tokenizer.content)
    assert found.sha256 != hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()


def test_a_pattern_that_gives_up_is_a_user_error(tmp_path, tokenizer):
    content = json.loads(tokenizer.content)
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+$"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = Tokenizer(tmp_path)
    for encode in (found.encode, lambda text: found.encode_batch(["x", text])):
        with pytest.raises(UserError, match=r"json: fails on a text of up to 41 characters \(.*retry-limit"):
            encode("a" * 40 + "!")


def test_the_jinja_beside_a_tokenizer(tmp_path, chatml_folder):
    write_tiny_llama(tmp_path)
    assert Tokenizer(tmp_path).chat_template is None
    assert Tokenizer(chatml_folder).chat_template == SMOLLM2
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    assert Tokenizer(tmp_path).chat_template == LLAMA3
    assert Tokenizer(tmp_path / "tokenizer.json").bos == BOS
    assert Tokenizer(chatml_folder).bos == ""


# Real data: MINISFT_DATA names a folder with llama3_tokenizer/ and sft/

@pytest.mark.skipif("MINISFT_DATA" not in os.environ, reason="MINISFT_DATA names no folder")
@pytest.mark.parametrize("file", ["sharegpt_500.json", "oasst_trees_100.jsonl"])
def test_every_real_conversation_as_transformers_renders_it(file):
    data = Path(os.environ["MINISFT_DATA"])
    tokenizer = Tokenizer(data / "llama3_tokenizer")
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.file), bos_token=BOS)
    renderer = Renderer(TEMPLATES["llama3"], tokenizer)
    real = [c for c in read(data / "sft" / file) if isinstance(c, Conversation)]
    different = []
    for c, (ids, trained) in zip(real, documents_of(renderer, real), strict=True):
        messages = [{"role": turn.role, "content": turn.content} for turn in c.turns]
        text = hugging_face.apply_chat_template(messages, chat_template=tokenizer.chat_template, tokenize=False)
        if ids != hugging_face.encode(text, add_special_tokens=False):
            different.append(c.line)
        answers = [turn.content.strip() + "<|eot_id|>" for turn in c.turns if turn.role == "assistant"]
        assert trained_runs(renderer, ids, trained) == answers
    print(f"{file}: {len(real)} conversations, {len(different)} differ")
    assert len(real) > 100
    assert different == []
