"""Names that others chose reach a terminal, a page or a chart only as characters that can be seen."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import room_of_files

from minisft.__main__ import main
from minisft.errors import printable

EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"


@given(st.text(), st.integers(2, 200))
def test_what_is_printable_is_short_and_harmless(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    if text.isprintable() and len(text) <= limit:
        assert shown == text
    elif not shown.endswith("…"):
        assert shown == "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def test_what_is_printable_for_example():
    assert printable(EVIL) == SHOWN
    assert printable("a\nb\udcff") == r"a\nb\udcff"
    assert printable("ş" * 80) == "ş" * 80
    assert printable("ş" * 81) == "ş" * 79 + "…"
    assert printable(17) == "17"


@pytest.fixture(scope="module")
def room(tmp_path_factory, base):
    return room_of_files(base, tmp_path_factory.mktemp("room"))


def printed(capsys):
    told = capsys.readouterr()
    text = told.out + told.err
    assert all(char.isprintable() or char in "\n\r" for char in text), text
    return text


@pytest.mark.parametrize(("command", "content"), [
    ("compare --judge x", {"question_id": 1, "model_1": EVIL, "model_2": "b", "g1_winner": "tie", "g2_winner": "tie"}),
    ("compare --judge x", {"question_id": 1, "model": EVIL, "score": 7}),
    ("compare --judge x", {"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": EVIL, "g2_winner": "tie"}),
    ("compare x one.jsonl --questions questions.jsonl --out x",
     {"question_id": 1, "model_id": EVIL, "choices": [{"turns": ["x"]}]}),
    ("answer model --model-id m --questions questions.jsonl --out x",
     {"question_id": 1, "model_id": EVIL, "choices": [{"turns": ["x"]}]}),
    ("eval model --template llama3 --instructions x",
     {"key": 1, "prompt": "p", "instruction_id_list": [EVIL], "kwargs": [{}]}),
    ("eval model --template llama3 --instructions x --max-new-tokens 1 --skip-unknown",
     {"key": 1, "prompt": "p", "instruction_id_list": [EVIL, "punctuation:no_comma"], "kwargs": [{}, {}]}),
    ("eval model --template llama3 --instructions x",
     {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{EVIL: 1}]}),
    ("eval model --template llama3 --instructions x",
     {"key": 1, "prompt": "p", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": EVIL}]}),
    ("eval model --template llama3 --instructions x",
     {"key": 1, "prompt": "p", "language": EVIL, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}),
    ("eval model --choices x", {"question": EVIL, "choices": EVIL, "answer": "A"}),
])
def test_names_in_files(room, monkeypatch, capsys, command, content):
    monkeypatch.chdir(room)
    (room / "x").write_text(json.dumps(content) + "\n")
    main(command.split())
    text = printed(capsys)
    assert SHOWN in text or SHOWN.replace("\\", "\\\\") in text or "[2J" not in text, text


def test_names_of_files(room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    (room / f"{EVIL}.csv").write_text((room / "sky_test.csv").read_text())
    (room / f"{EVIL}.jsonl").write_text((room / "data.jsonl").read_text())
    assert main(["eval", "model", "--choices", f"{EVIL}.csv", "sky_test.csv", "--json", f"{EVIL}.json"]) == 0
    assert SHOWN in printed(capsys)
    assert main(["eval", "model", "--template", "llama3", "--data", f"{EVIL}.jsonl"]) == 0
    assert SHOWN in printed(capsys)
    for argv in (["prepare", EVIL], ["report", EVIL], ["convert", "model", EVIL], ["show", f"--{EVIL}"],
                 ["show", "recipe.toml", "--html", f"{EVIL}.html"], ["plan", "recipe.toml", "--gpu", EVIL],
                 ["report", "run", "--out", f"{EVIL}.html"], ["compare", EVIL], ["answer", "model", f"--{EVIL}"],
                 ["eval", "model", "--template", "llama3", "--data", f"{EVIL}.txt"]):
        with suppress(SystemExit):
            main(argv)
        printed(capsys)


def test_names_in_a_page(room, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(room)
    (room / f"{EVIL}<b>").mkdir()
    for file in ("metrics.jsonl", "status.json", "config.toml"):
        text = (room / "run" / file).read_text().replace("</", "")
        (room / f"{EVIL}<b>" / file).write_text(text)
    with open(room / f"{EVIL}<b>" / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"kind": "eval", "step": 1, "name": EVIL, "loss": 1.0}) + "\n")
        log.write(json.dumps({"kind": "sample", "step": 1, "name": EVIL, "prompt": "p", "answer": "a"}) + "\n")
    (room / f"{EVIL}<b>" / "environment.json").write_text(json.dumps({EVIL: {EVIL: EVIL}}))
    (room / f"{EVIL}<b>" / "status.json").write_text(json.dumps({"state": EVIL, "error": EVIL}))
    assert main(["report", f"{EVIL}<b>", "run", "--out", "page.html"]) == 0
    printed(capsys)
    page = (room / "page.html").read_text()
    assert all(char.isprintable() or char == "\n" for char in page)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
