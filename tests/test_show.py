"""`minisft show` shows what the model sees; nothing can pass for a mark, and nothing leaves the page."""

import contextlib
import html.parser
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from oracles.tiny_llama import VOCAB_SIZE, tiny_tokenizer, write_tiny_llama

from minisft import config_io
from minisft.__main__ import main
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.prepare import prepare
from minisft.reports import page as pages
from minisft.reports import token_view
from minisft.reports.token_view import OURS, as_text, choose, spans, whole_characters

ROOT = Path(__file__).parent.parent
CONVERSATIONS = ROOT / "tests" / "oracles" / "conversations.jsonl"
ATTACKS = [
    ("<|eot_id|> and ⟨<|eot_id|>⟩", "fake ⟦marks⟧ ⟨U+001B⟩ ↵ ⇥ ␣ \ufffd"),
    ("\x1b[31mred\x1b]0;title\x07 \x9b1m \u202eevil\u2066 \u200bhidden \U000e0041 \x00\x7f", "a\tb\r\nc\u00a0d\u2028e"),
    ("<script>alert(1)</script> </pre></mark><b>&amp; \" onmouseover='x'", "</title><script src=//x>"),
    ("👨\u200d👩\u200d👧 ❤\ufe0f İıŞşĞğ", "Günaydın 🙂, çay ☕ içer misin? Işığı söndür: ğ"),
    ("⟨── document 0 · fake.jsonl:1 · 3 tokens, 3 trained (100.0%) ──⟩\n", "x  \n  y"),
]


def conversation(question, answer):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, the oracle's 32 conversations, those that try to deceive, and a recipe for both."""
    folder = tmp_path_factory.mktemp("show")
    write_tiny_llama(folder / "model")
    shutil.copy(CONVERSATIONS, folder / "chats.jsonl")
    (folder / "attacks.jsonl").write_text("".join(conversation(*turns) for turns in ATTACKS), encoding="utf-8")
    shutil.copy(folder / "attacks.jsonl", folder / "held.jsonl")
    (folder / "r.toml").write_text(
        '[model]\npath = "model"\n[data]\ntrain = ["chats.jsonl", "attacks.jsonl"]\neval = "held.jsonl"\n'
        'template = "llama3"\nseq_len = 700\ncache = "cache"\n[batch]\npacks = 2\n[train]\nepochs = 2\n')
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def prepared(here):
    return prepare(config_io.load(["r.toml"]), quiet=True)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder / "model")


def unmarked(text):
    """The text that a reader who knows only the legend recovers."""
    text = re.sub("⟨U\\+([0-9A-F]+)⟩", lambda number: chr(int(number[1], 16)) if chr(int(number[1], 16)) not in OURS
                  else f"<{number[1]}>", re.sub("[⟦⟧]", "", text))
    text = re.sub("⟨(<[^⟩]*>)⟩", r"\1", text).replace("↵\n", "\n").replace("⇥\t", "\t").replace("␣", " ")
    assert not set(text) & set(OURS)
    return re.sub("<([0-9A-F]{4})>", lambda number: chr(int(number[1], 16)), text)


def shown(prepared, document, color=False):
    """The text of one document, without headings and legend."""
    [view] = choose(prepared, index=document)
    lines = as_text([view], color=color).split("\n")
    assert f"⟨── document {document} · " in lines[2]
    return "\n".join(lines[3:-2])


# What is shown

def test_without_its_marks_the_text_is_what_the_model_sees(prepared):
    backend = tokenizers.Tokenizer.from_file("model/tokenizer.json")
    for document in range(len(prepared.train)):
        ids, _ = prepared.train.document(document)
        assert unmarked(shown(prepared, document)) == backend.decode(ids.tolist(), skip_special_tokens=False)
    assert document == 32 + len(ATTACKS) - 1


def test_the_trained_spans_are_the_answers_and_their_ends(prepared):
    lines = [*Path("chats.jsonl").read_text().splitlines(), *Path("attacks.jsonl").read_text().split("\n")]
    for document in range(len(prepared.train)):
        answers = [turn["content"].strip() + "<|eot_id|>" for turn in json.loads(lines[document])["messages"]
                   if turn["role"] == "assistant"]
        assert [unmarked(span) for span in re.findall("⟦(.*?)⟧", shown(prepared, document), re.DOTALL)] == answers
        green = re.findall("\x1b\\[32m(.*?)\x1b\\[0m", shown(prepared, document, color=True))  # line by line
        assert unmarked("\n".join(green)) == "\n".join(answers)


def test_control_tokens_look_unlike_text_that_spells_them(prepared):
    text = shown(prepared, 32)
    assert text.count("⟨<|eot_id|>⟩") == 2, "one for each turn"
    assert "\n<|eot_id|> and ⟨U+27E8⟩<|eot_id|>⟨U+27E9⟩⟨<|eot_id|>⟩" in text
    assert "⟦fake ⟨U+27E6⟩marks⟨U+27E7⟩ ⟨U+27E8⟩U+001B⟨U+27E9⟩ ⟨U+21B5⟩ ⟨U+21E5⟩ ⟨U+2423⟩ \ufffd⟨<|eot_id|>⟩⟧" in text


def test_what_steers_a_terminal_is_shown_by_number(prepared):
    text = shown(prepared, 33)
    assert "⟨U+001B⟩[31mred⟨U+001B⟩]0;title⟨U+0007⟩ ⟨U+009B⟩1m ⟨U+202E⟩evil⟨U+2066⟩ ⟨U+200B⟩hidden ⟨U+E0041⟩" in text
    assert "⟦a⇥\tb⟨U+000D⟩↵\nc⟨U+00A0⟩d⟨U+2028⟩e⟨<|eot_id|>⟩⟧" in text
    for color, ids in ((False, False), (True, False), (False, True)):
        everything = as_text(choose(prepared, pack=0) + choose(prepared, source="attacks"), color=color, ids=ids)
        everything = re.sub("\x1b\\[[0-9]+m", "", everything) if color else everything
        left = {c for c in everything if unicodedata.category(c)[0] in "CZ"}
        assert left <= {"\n", "\t", " ", "\u200d"}


def test_emoji_of_several_characters_stay_whole(prepared):
    assert "\n👨\u200d👩\u200d👧 ❤\ufe0f İıŞşĞğ⟨<|eot_id|>⟩" in shown(prepared, 35)


def test_headings_cannot_be_faked(prepared):
    [view] = choose(prepared, source="attacks")
    text = as_text([view], color=False)
    assert len(re.findall("^⟨── document", text, re.MULTILINE)) == len(view.documents) == token_view.FEW
    assert "⟨── document" not in shown(prepared, 36)


def test_headings_count(prepared):
    for document in (0, 31, 33):
        ids, trained = prepared.train.document(document)
        source, line = prepared.train.origin(document)
        [view] = choose(prepared, index=document)
        share = f"{trained.sum() / len(ids):.1%}"
        assert f"⟨── document {document} · {source}:{line} · {len(ids)} tokens, {trained.sum()} trained ({share}) ──⟩" \
            in as_text([view], color=False)


def test_spaces_at_an_edge_can_be_seen(tokenizer):
    ids = np.array(tokenizer.encode("  a b "))
    mask = np.zeros(len(ids))
    assert "".join(span.text for span in spans(ids, mask, tokenizer)) == "␣␣a b␣"


def test_ids_has_a_line_for_every_token(prepared):
    ids, trained = prepared.train.document(1)
    [view] = choose(prepared, index=1)
    lines = as_text([view], color=False, ids=True).split("\n")[4:-2]
    position = 0
    for line in lines:
        at, *numbers, text = re.fullmatch(r" *(\d+)  +(\d+(?: \d+)*)  (.*)", line).groups()
        numbers = [int(number) for number in numbers[0].split()]
        assert (int(at), numbers) == (position, ids[position : position + len(numbers)].tolist())
        assert text.startswith("⟦") == bool(trained[position])
        position += len(numbers)
    assert position == len(ids)


# Characters of several tokens

@given(st.lists(st.integers(0, VOCAB_SIZE - 1)))
def test_runs_put_together_are_the_text(ids):
    backend = tiny_tokenizer()
    runs = list(whole_characters(ids, _Decoder(backend)))
    assert [token for run, _ in runs for token in run] == ids
    assert "".join(text for _, text in runs) == backend.decode(ids, skip_special_tokens=False)


@given(st.text())
@example("a\ufffdb\ufffd\ufffd🙂ş\ufffd")
def test_runs_of_a_text_end_where_characters_do_and_nowhere_else(text):
    backend = tiny_tokenizer()
    ids = backend.encode(text, add_special_tokens=False).ids
    decode = _Decoder(backend).decode
    ends = [end for end in range(1, len(ids) + 1) if decode(ids[:end]) + decode(ids[end:]) == text]
    runs = [len(run) for run, _ in whole_characters(ids, _Decoder(backend))]
    assert np.cumsum(runs).tolist() == ends


class _Decoder:
    def __init__(self, backend):
        self.backend = backend

    def decode(self, ids):
        return self.backend.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(("mask", "expected"), [((0, 0), "ş"), ((1, 1), "ş"), ((0, 1), "\ufffd\ufffd")])
def test_a_mask_that_cuts_a_character_shows(tokenizer, mask, expected):
    ids = tokenizer.encode("ş")
    assert len(ids) == 2
    assert "".join(span.text for span in spans(np.array(ids), np.array(mask), tokenizer)) == expected


# Which documents

def indices(views):
    return [document.index for view in views for document in view.documents]


def test_choices(prepared, monkeypatch):
    plan, lengths = prepared.plan, prepared.train.lengths
    first = plan.epoch(0).pack(0).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(token_view, "FEW", 1)
        assert indices(choose(prepared)) == first[:1] != first
    assert indices(choose(prepared, whole=True)) == indices(choose(prepared, pack=0)) == first
    assert indices(choose(prepared, index=0)) == [0]
    assert lengths[indices(choose(prepared, longest=True))] == [lengths.max()]
    assert indices(choose(prepared, source="attacks", longest=True)) == [32 + int(lengths[32:].argmax())]
    assert indices(choose(prepared, source="attacks", index=33)) == [33]
    assert indices(choose(prepared, source="attacks")) == [32, 33, 34]
    assert indices(choose(prepared, pack=1)) == plan.epoch(0).pack(1).tolist()
    last = plan.total_steps - 1
    assert last >= plan.steps_per_epoch, "of the second epoch"
    assert indices(choose(prepared, step=last + 1)) == np.concatenate(plan.documents(last)).tolist()
    assert indices(choose(prepared, step=1, pack=1)) == plan.documents(0)[1].tolist()


def test_a_held_out_source(prepared):
    [view] = choose(prepared, source="held", index=0)
    assert view.documents[0].origin == "held.jsonl:1"


def test_random_is_a_function_of_its_seed(prepared):
    drawn = {seed: indices(choose(prepared, random=seed)) for seed in range(20)}
    assert all(indices(choose(prepared, random=seed)) == found for seed, found in drawn.items())
    assert len({tuple(found) for found in drawn.values()}) > 10
    assert all(len(set(found)) == token_view.FEW for found in drawn.values())
    assert all(index >= 32 for seed in range(20) for index in indices(choose(prepared, random=seed, source="attacks")))


@pytest.mark.parametrize(("wish", "message"), [
    ({"index": 37}, "--index 37: the documents are 0 to 36"),
    ({"index": -1}, "--index -1: the documents are 0 to 36"),
    ({"index": 3, "source": "attacks"}, "--index 3: the documents of attacks are 32 to 36"),
    ({"index": 5, "source": "held"}, "--index 5: the documents of held are 0 to 4"),
    ({"source": "chat"}, "--source chat: no such source; the sources are chats, attacks, held"),
    ({"pack": -1}, "--pack -1: the packs of the first epoch are 0 to "),
    ({"pack": 2, "step": 1}, "--pack 2: the packs of step 1 are 0 to 1"),
    ({"step": 0}, "--step 0: the steps of the run are 1 to "),
    ({"step": 999}, "--step 999: the steps of the run are 1 to "),
    ({"pack": 0, "source": "chats"}, "--source chats: a pack holds documents of all sources; leave out"),
    ({"pack": 0, "longest": True}, "--longest and --pack or --step: each of them chooses documents; give only one"),
])
def test_choices_that_do_not_exist(prepared, wish, message):
    with pytest.raises(UserError) as refusal:
        choose(prepared, **wish)
    assert str(refusal.value).startswith(message)


def test_the_last_step_is_the_last(prepared):
    last = prepared.plan.total_steps
    assert choose(prepared, step=last)
    with pytest.raises(UserError, match=f"--step {last + 1}: the steps of the run are 1 to {last}$"):
        choose(prepared, step=last + 1)


# On the terminal

@pytest.mark.parametrize(("argv", "wish"), [
    ([], {}), (["--index", "3"], {"index": 3}), (["--longest"], {"longest": True}), (["--random"], {"random": 0}),
    (["--random", "5"], {"random": 5}), (["--pack", "1"], {"pack": 1}), (["--step", "2"], {"step": 2}),
    (["--source", "attacks", "--random"], {"source": "attacks", "random": 0}),
    (["--index", "3", "--ids", "--train.epochs", "1"], {"index": 3}),
])
def test_every_option_arrives(prepared, capsys, argv, wish):
    assert main(["show", "r.toml", *argv]) == 0
    assert capsys.readouterr().out == as_text(choose(prepared, **wish), color=False, ids="--ids" in argv) + "\n"


def command(*argv, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    return {"args": [sys.executable, "-m", "minisft", "show", "r.toml", *argv],
            "env": {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment}, "timeout": 120}


def on_a_terminal(**environment):
    outer, inner = pty.openpty()
    done = subprocess.run(**command("--index", "7", **environment), stdout=inner, stderr=subprocess.PIPE)
    os.close(inner)
    pieces = []
    with contextlib.suppress(OSError):  # nobody has the other end open any more
        while piece := os.read(outer, 100_000):
            pieces.append(piece)
    said = b"".join(pieces).decode().replace("\r\n", "\n")
    os.close(outer)
    assert done.returncode == 0, done.stderr
    return said


def test_colour_only_if_it_is_wanted(prepared):
    [view] = choose(prepared, index=7)
    plain, coloured = (as_text([view], color=color) + "\n" for color in (False, True))
    assert on_a_terminal(TERM="xterm", NO_COLOR="") == coloured != plain
    assert on_a_terminal(TERM="dumb") == on_a_terminal(TERM="xterm", NO_COLOR="1") == plain
    piped = subprocess.run(**command("--index", "7", TERM="xterm"), capture_output=True, text=True, encoding="utf-8")
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, plain, "")


@pytest.mark.parametrize("argv", [["show", "r.toml", "--step", "1"], ["prepare", "r.toml"]])
def test_a_reader_that_stops_early_is_no_error(here, argv):
    head = subprocess.Popen(["head", "-c", "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    head.stdin.write(b"x")
    head.stdin.flush()
    head.wait(60)
    done = subprocess.run([sys.executable, "-m", "minisft", *argv], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          stdout=head.stdin, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_ascii_terminal_gets_escapes(here):
    done = subprocess.run(**command("--index", "7", PYTHONUTF8="0", PYTHONIOENCODING="ascii"), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\\u27e6" in done.stdout


@pytest.mark.parametrize("argv", [["--index", "99"], ["--source", "x"], ["--html", "no/folder/x.html"],
                                  ["--html", "model"], ["--dump", "x"]])
def test_a_bad_option_is_one_clear_line(here, capsys, argv):
    assert main(["show", "r.toml", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert " ".join(argv[:1]) in err


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        main(["show", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in ("minisft show RECIPE [--section.key value ...]", "--longest", "--html FILE", "--data.train"):
        assert part in text


# The page

class Page(html.parser.HTMLParser):
    """Tags, attributes, headings, and for each document its text, the text inside <mark>, and its token ids."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.documents, self.headings = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag != "meta":
            self.open.append(tag)
        if tag == "pre":
            self.documents.append({"text": "", "marked": "", "ids": []})
        if tag == "h2":
            self.headings.append("")
        if tag == "span":
            self.documents[-1]["ids"] += map(int, dict(attrs)["data-id"].split())

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.documents[-1]["text"] += data
            self.documents[-1]["marked"] += data if "mark" in self.open else ""
        if "h2" in self.open:
            self.headings[-1] += data

    def values(self, name, tag=None):
        return [value for where, key, value in self.attributes if key == name and tag in (None, where)]


@pytest.fixture
def packed(prepared):
    """All packs of the first step, and their page."""
    views = choose(prepared, step=1)
    return views, Page(token_view.as_page(views))


def test_the_page_holds_every_document_with_its_mask_and_ids(prepared, packed):
    views, page = packed
    documents = [document for view in views for document in view.documents]
    assert len(page.documents) == len(documents) > len(views)
    assert page.headings == [document.heading for document in documents]
    for found, document in zip(page.documents, documents, strict=True):
        ids, trained = prepared.train.document(document.index)
        assert found["ids"] == ids.tolist()
        assert found["text"] == "".join(span.text for span in document.spans)
        assert found["marked"] == "".join(span.text for span in document.spans if span.trained)
        assert unmarked(found["marked"]) == prepared.tokenizer.decode(ids[trained == 1].tolist())


def test_the_page_runs_nothing_and_loads_nothing(prepared):
    views = choose(prepared, pack=0) + [view for i in range(32, 37) for view in choose(prepared, index=i)]
    text = token_view.as_page(views)
    page = Page(text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in re.sub('</?span[^>]*>', "", text)
    tags = set(re.findall(r"<(\w+)", text))
    assert tags == {"html", "head", "meta", "title", "style", "body", "section", "h1", "h2", "p", "pre", "mark", "span",
                    "figure", "figcaption", "svg", "rect", "a", "polygon"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "style", "srcset")]
    assert "default-src 'none'" in page.values("content", "meta")[0]
    assert not re.findall(r"url\(|@import|https?:", text)
    targets = page.values("id", "h2")
    assert len(set(targets)) == len(targets)
    assert page.values("href") == [f"#{target}" for target in targets], "each triangle leads to its document"


def test_names_of_files_are_escaped_too(here):
    name = """<img src=x onerror="alert(1)">&amp;'"""
    Path(f"{name}.jsonl").write_text(conversation("Hi", "Hello!"))
    prepared = prepare(config_io.load(["r.toml", "--data.train", f"{name}.jsonl"]), quiet=True)
    text = token_view.as_page(choose(prepared, source=name))
    page = Page(text)
    assert "<img" not in text
    assert page.headings[0].startswith(f"document 0 · {name}.jsonl:1 · ")
    assert text.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;amp;&#x27;") == 4, "title, h1, h2, triangle"


def test_the_page_names_no_folder_of_this_machine(here):
    (here / "my").mkdir()
    (here / "my" / "talks.jsonl").write_text(conversation("Hi", "Hello!"))
    prepared = prepare(config_io.load(["r.toml", "--data.train", str(here / "my" / "talks.jsonl")]), quiet=True)
    text = token_view.as_page(choose(prepared, source="talks"))
    assert Page(text).headings[0].startswith("document 0 · my/talks.jsonl:1 · ")
    assert str(here) not in text


def test_the_attention_is_to_scale(prepared):
    [view] = choose(prepared, pack=0)
    page = Page(token_view.as_page([view]))
    kinds, points = page.values("class", "polygon"), [
        [tuple(map(int, corner.split(","))) for corner in text.split()] for text in page.values("points", "polygon")]
    blocks = [corners for kind, corners in zip(kinds, points, strict=True) if kind == "block"]
    rows = [corners for kind, corners in zip(kinds, points, strict=True) if kind == "target"]
    masks = [prepared.train.document(document.index)[1] for document in view.documents]
    ends = np.cumsum([len(mask) for mask in masks]).tolist()
    assert blocks == [[(a, a), (a, b), (b, b)] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    predicting = [int(t) - 1 for t in np.flatnonzero(np.concatenate(masks))]
    assert [row for corners in rows for row in range(corners[0][1], corners[2][1])] == predicting
    assert all((c[0][0], c[1], c[2]) == (c[3][0], (c[0][1],) * 2, (c[3][1],) * 2) for c in rows), "up to the diagonal"
    assert all(any(a[0] == c[0][0] and c[2] <= b for a, _, b in blocks) for c in rows), "from its document's start"
    assert "0 0 700 700" in page.values("viewbox")
    assert page.values("width", "rect") == ["700", str(ends[-1]), str(len(predicting))]


def test_a_full_pack_of_8192_tokens_is_a_light_page(here):
    Path("many.jsonl").write_text(Path("chats.jsonl").read_text() * 10)
    options = ["r.toml", "--data.train", "many.jsonl", "--data.seq_len", "8192"]
    prepared = prepare(config_io.load(options), quiet=True)
    views = [choose(prepared, pack=i)[0] for i in range(len(prepared.plan.epoch(0)))]
    view = max(views, key=lambda view: len(view.trained))
    assert len(view.trained) > 8000
    assert len(token_view.as_page([view]).encode()) < 1_000_000


def test_the_page_is_written_whole_or_not_at_all(here, prepared, monkeypatch, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert main(["show", "r.toml", "--html", str(file)]) == 0
    whole = file.read_text(encoding="utf-8")
    assert len(Page(whole).documents) == len(prepared.plan.epoch(0).pack(0)), "a page shows the whole pack"
    assert str(file) in capsys.readouterr().out

    def full_disk(partial, target):
        raise OSError("no space left")

    monkeypatch.setattr(pages.os, "replace", full_disk)
    assert main(["show", "r.toml", "--index", "1", "--html", str(file)]) == 4
    assert file.read_text(encoding="utf-8") == whole
    assert list(tmp_path.iterdir()) == [file]
