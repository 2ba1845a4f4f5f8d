"""The laws hold for every shipped template, and each kind of breach is found, named and placed.

The oracle is the breach itself: a lawful document in which one thing is changed, at a place that is known.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from oracles.tiny_llama import write_tiny_llama
from small_data import store_of

from minisft.data.chat import Piece, Renderer
from minisft.data.checks import validate
from minisft.data.conversation import Conversation, Turn
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError

CHAT = Conversation((Turn("system", "Be brief."), Turn("user", "Hi <|eot_id|>"), Turn("assistant", "Hello!"),
                     Turn("user", "And you?", context="x"), Turn("assistant", "Fine.\n")), "chats.jsonl", 3)
SHORT = Conversation((Turn("user", "Merhaba"), Turn("assistant", "Selam")), "chats.jsonl", 5)
UNTRAINED = Conversation((Turn("user", "1"), Turn("assistant", "2", trained=False), Turn("user", "3"),
                          Turn("assistant", "four"), Turn("user", "5"), Turn("assistant", "6", trained=False)),
                         "chats.jsonl", 7)
PLAIN = Conversation((Turn("text", "Just a text."),), "chats.jsonl", 9)
ALL = [CHAT, SHORT, UNTRAINED, PLAIN]
TRAIN_ON = ("assistant", "last_assistant", "all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny tokenizer, with ChatML's tokens and an end of text."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = 1 + max([token["id"] for token in tokenizer["added_tokens"]] + list(tokenizer["model"]["vocab"].values()))
    for i, name in enumerate(("<|im_start|>", "<|im_end|>")):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": size + i, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    return folder


def encoded(folder, template="llama3", train_on="assistant", conversations=ALL):
    """A renderer, its documents and the conversations that have something to train on."""
    template = load_templates()[template] if isinstance(template, str) else template
    renderer = Renderer(template, Tokenizer(folder), train_on=train_on)
    documents = renderer.encode([renderer.pieces(conversation) for conversation in conversations])
    learnable = documents.num_loss_tokens > 0
    kept = [conversation for conversation, keep in zip(conversations, learnable, strict=True) if keep]
    return renderer, documents.only(learnable), kept


def test_the_first_token_of_a_document_is_not_trained_even_if_it_is_the_only_one(folder):
    renderer = Renderer(load_templates()["text"], Tokenizer(folder))
    documents = renderer.encode([[Piece("a", False, True)], [Piece("a", False, True)] * 2])
    assert documents.offsets.tolist() == [0, 1, 3]
    assert documents.loss_mask.tolist() == [False, False, True]
    assert documents.num_loss_tokens.tolist() == [0, 1]


@pytest.mark.parametrize("train_on", TRAIN_ON)
@pytest.mark.parametrize("template", [*load_templates()])
def test_what_the_shipped_templates_make_is_lawful(folder, template, train_on):
    renderer, documents, kept = encoded(folder, template, train_on)
    assert len(kept) == (3 if train_on == "last_assistant" else 4)
    validate(documents, kept, renderer)


def test_templates_of_other_forms_are_lawful_too(folder):
    """A stop token with text behind it, with another control token, no beginning, no end of a plain text."""
    llama3, chatml = load_templates()["llama3"], load_templates()["chatml"]
    forms = [replace(chatml, assistant=("<|im_start|>assistant\n", "<|im_end|>\n", "")),
             replace(chatml, assistant=("<|im_start|>assistant\n", "\n<|im_end|>", "<|end_of_text|>\n")),
             replace(chatml, assistant=("<|im_start|>assistant\n", "<|im_end|>", "\n<|end_header_id|>")),
             replace(llama3, begin=""), replace(llama3, document_end=""), replace(llama3, document_end="\n"),
             replace(llama3, document_end="<|end_of_text|>\n"), replace(llama3, begin="<|begin_of_text|>\n"),
             replace(chatml, begin="<|im_start|>system\nBe kind.<|im_end|>\n")]
    for form in forms:
        for train_on in TRAIN_ON:
            renderer, documents, kept = encoded(folder, form, train_on)
            validate(documents, kept, renderer)


@pytest.mark.parametrize(("fields", "message"), [
    ({"begin": "<|begin_of_text|><|begin_of_text|>"},
     "chats.jsonl:3: a second beginning-of-text token: token 1 of the document is "),
    ({"begin": "{bos}", "user": ("<|begin_of_text|>", "<|eot_id|>")},
     "chats.jsonl:3: a second beginning-of-text token: token 12 of the document is "),
    ({"begin": "", "user": ("<|begin_of_text|>", "<|eot_id|>")},
     "chats.jsonl:3: a beginning-of-text token that is not the template's begin: token "),
])
def test_a_template_that_begins_twice_is_refused(folder, fields, message):
    renderer, documents, kept = encoded(folder, replace(load_templates()["llama3"], name="mine", **fields))
    with pytest.raises(UserError) as error:
        validate(documents, kept, renderer)
    found = str(error.value)
    assert re.sub(r"token \d+ of", "token 12 of", found).startswith(message.replace("token 1 of", "token 12 of"))
    assert found.endswith("'<|begin_of_text|>'; in template mine put it into begin, once, and nowhere else")


def refused(renderer, documents, kept):
    with pytest.raises(UserError) as error:
        validate(documents, kept, renderer)
    return str(error.value)


@pytest.mark.parametrize("train_on", TRAIN_ON)
@pytest.mark.parametrize("template", [*load_templates()])
def test_each_trained_stop_is_missed(folder, template, train_on):
    """Untrain the stop token of one answer, for each answer: the breach is found in that document."""
    renderer, documents, kept = encoded(folder, template, train_on)
    stops = renderer.stop_ids()
    answers = []  # places of the stop tokens that end an answer: found by the text before them
    for i, conversation in enumerate(kept):
        start, end = documents.offsets[i : i + 2]
        trained = [turn.content.strip() for turn in conversation.turns if turn.role in ("assistant", "text")
                   and turn.trained][-1 if train_on == "last_assistant" else 0 :]
        places = [p for p in range(start, end) if documents.ids[p] in stops and documents.loss_mask[p]
                  and renderer.tokenizer.decode(documents.ids[start:p].tolist()).strip().endswith(tuple(trained))]
        assert len(places) == len(trained)
        answers += [(conversation.line, int(place - start), int(place)) for place in places]
    assert len(answers) == (3 if train_on == "last_assistant" else 5)
    for line, inside, place in answers:
        changed = documents.loss_mask.copy()
        changed[place] = False
        found = refused(renderer, replace(documents, weights=changed), kept)
        assert re.match(rf"chats.jsonl:{line}: (a stop token after trained text is not trained: token {inside} of|"
                        r"a trained answer ends without a trained stop token: token )", found)
        assert "the model would never learn to stop" in found


def test_text_that_became_a_control_token_is_found(folder):
    renderer, documents, kept = encoded(folder)
    renderer.tokenizer._backend.encode_special_tokens = False
    documents = renderer.encode([renderer.pieces(conversation) for conversation in kept])
    stop = renderer.tokenizer.control["<|eot_id|>"]
    inside = documents.ids.tolist().index(stop, documents.ids.tolist().index(stop) + 1)
    assert refused(renderer, documents, kept) == (
        f"chats.jsonl:3: a control token that the template did not put there: token {inside} of the document is {stop} "
        "'<|eot_id|>'; text of a conversation must not become one; see special and normalized in the added tokens "
        f"of {folder / 'tokenizer.json'}")


@pytest.mark.parametrize("document", range(4))
@pytest.mark.parametrize(("fault", "law"), [
    ("bos", "the beginning-of-text token is missing"),
    ("text to control", "a control token that the template did not put there"),
    ("control to text", "not the control token that the template put there"),
    ("another control", "not the control token that the template put there"),
    ("unknown", "an id beyond the tokenizer's vocabulary"),
    ("untrained", "no trained token in the document"),
])
def test_a_planted_fault_is_found_where_it_is(folder, document, fault, law):
    renderer, documents, kept = encoded(folder)
    tokenizer, ids, trained = renderer.tokenizer, documents.ids.copy(), documents.loss_mask.copy()
    start, end = map(int, documents.offsets[document : document + 2])
    control_ids = sorted(tokenizer.control.values())
    place = start + int(np.flatnonzero(np.isin(ids[start:end], control_ids) != (fault == "text to control"))[-1])
    controls = documents.controls.copy()
    match fault:
        case "bos":
            place = start
            ids[start], controls[start] = tokenizer.encode("x")[0], -1
        case "text to control":
            ids[place] = tokenizer.control["<|eot_id|>"]
        case "control to text":
            ids[place] = tokenizer.encode("x")[0]
        case "another control":
            ids[place] = tokenizer.control["<|im_start|>"]
        case "unknown":
            ids[place] = tokenizer.vocab_size
        case "untrained":
            trained[start:end] = False
    found = refused(renderer, replace(documents, ids=ids, weights=trained, controls=controls), kept)
    where = start if fault == "untrained" else place
    assert found.startswith(f"chats.jsonl:{kept[document].line}: {law}: token {where - start} of the document is ")


def test_a_breach_stops_the_store_and_leaves_nothing(folder, tmp_path):
    file = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file.write_text("\n" + json.dumps({"messages": turns}))
    (tmp_path / "mine.toml").write_text(
        '[mine]\nbegin = "<|begin_of_text|>"\nsystem = ["<|begin_of_text|>", "\\n"]\nuser = ["\\n", "\\n"]\n'
        'assistant = ["", "<|eot_id|>"]\ndefault_system = "Be kind."\n')
    renderer = Renderer(load_templates(tmp_path / "mine.toml")["mine"], Tokenizer(folder))
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}:2: a second beginning-of-text token: token 1 of"):
        store_of(file, renderer, tmp_path / "cache")
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert left - {".digest"} == {".lock"}  # a digest is remembered where this machine took over two seconds
