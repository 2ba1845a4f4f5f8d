"""Functions that read foreign text take linear time, even on text that is meant to hurt."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.config_io import nearest
from minisft.errors import printable
from minisft.evals import answers, questions
from minisft.evals.instructions import CHECKS, sentences
from minisft.evals.language import detect, signs
from minisft.reports import run_report
from minisft.reports.page import relative

UNITS = ("a", ".", "a.", ".a", "e.g. ", "Mr. ", " ", "\n", " \n", "[", "[]", "<<", "<<a", "*", "*a", "* \n", "**a",
         "- ", "{", "'", "<|", "<|a", "&lt;|", "çok ", "what a very ", "A ", "P. S", "***", "a-", "Section ", "1", "_1",
         "/", "/a", "\"/")
HEADS = ("", "[", "Great ", "çok", "what a", "A", "\"/")
GIVEN = {"keywords": ["aa"], "keyword": "aa", "frequency": 9, "relation": "at least", "forbidden_words": ["aaa", "..."],
         "letter": "a", "let_frequency": 9, "let_relation": "at least", "num_sentences": 9, "num_paragraphs": 2,
         "num_words": 9, "nth_paragraph": 1, "first_word": "a", "num_placeholders": 9, "postscript_marker": "P.P.S",
         "num_bullets": 9, "num_highlights": 9, "section_spliter": "Section", "num_sections": 9,
         "prompt_to_repeat": "aaa", "start_phrase": "aaa", "end_phrase": "aaa", "capital_frequency": 9,
         "capital_relation": "at least"}


def check(name):
    from inspect import signature

    function = CHECKS[name]
    given = {each: GIVEN[each] for each in list(signature(function).parameters)[2:]}
    return lambda text: function(text, "en", **given)


READERS = {
    **{name: check(name) for name in CHECKS if name != "language:response_language" and "_capital" not in name
       and "_lowercase" not in name},  # these detect the language
    "capital words": check("change_case:capital_word_frequency"),
    "sentences": sentences, "flatters": answers.flatters, "loops": answers.loops,
    "chosen": answers.chosen, "signals": lambda text: answers.signals([text]), "printable": printable,
    "answers of a page": run_report._text, "paths of a page": relative, "subject of a file": questions.subject_of,
    "the nearest key": lambda text: nearest(text, ("optim.lr", "data.train", "train.epochs")),
}


def seconds(reader, text):
    start = time.process_time()
    reader(text)
    return time.process_time() - start


@pytest.mark.parametrize("name", READERS)
def test_ten_times_the_text_takes_ten_times_as_long(name):
    reader = READERS[name]
    for unit in UNITS:
        for head in HEADS if len(unit) == 1 else HEADS[:1]:
            long, short = ((head + unit * size)[:size] for size in (100_000, 10_000))
            least = min(seconds(reader, short) for _ in range(2)) if (took := seconds(reader, long)) > 0.1 else 0
            assert took <= max(0.1, 30 * least), f"{head + unit!r}: {took:.2f} s, a tenth of it {least:.3f} s"


@pytest.mark.parametrize("unit", ["a", "a ", ".", "ş ", "ひカ", "1"])
def test_a_language_is_told_in_linear_time(unit):
    least, took = (min(seconds(detect, unit * size) for _ in range(2)) for size in (5_000, 50_000))
    assert took <= max(0.1, 30 * least)


def test_a_table_of_questions_is_read_in_linear_time(tmp_path):
    def read(text):
        (file := tmp_path / "x").write_text(text)
        with pytest.raises(questions.UserError):
            questions.read(file)

    for unit in (" ", "[ ", "{", '"', ",", "\n", "[\n"):
        least, took = (seconds(read, (unit * size)[:size]) for size in (10_000, 100_000))
        assert took <= max(0.2, 30 * least), unit


PIECES = [*" \n\t.!?…\"')]*aB-<>[", "\u2028", "\x1c", "e.g.", "Mr.", "J.", "\n\n", "3."]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@given(TEXTS, st.integers(0, 3))
def test_verdicts_are_those_of_the_plain_regular_expressions(text, number):
    """IFEval's own, which are quadratic: the oracle of those that are not."""
    title, placeholders, bullets = (CHECKS[f"detectable_{name}"] for name in (
        "format:title", "content:number_placeholders", "format:number_bullet_lists"))
    found = re.findall(r"<<[^\n]+>>", text)
    assert title(text, "en") == any(each.lstrip("<").rstrip(">").strip() for each in found)
    assert placeholders(text, "en", num_placeholders=number) == (len(re.findall(r"\[.*?\]", text)) >= number)
    assert bullets(text, "en", num_bullets=len(re.findall(r"^\s*(?:\*[^*]|-).*$", text, re.MULTILINE)))
    assert sentences(text) == plain_sentences(text)


def plain_sentences(text):
    count, start = 0, 0
    for stop in re.finditer(r"""(\S*?)(?:[.…]+|[.…]*[!?][.!?…]*)["'”’»)\]*]*(?=\s|$)""", text):
        last, rest = stop[1].strip("(\"'“‘*"), text[stop.end() :].lstrip()
        is_initial = re.fullmatch(r"(?:\w\.)*\w", last) and last.isupper()
        begins = re.match(r"\S*", rest)[0].strip("(\"'“‘*”’»)],;:").lower() in signs("en")[0]
        fresh = not re.search(r"\w", text[start : stop.start()].rpartition("\n")[2])
        inside = (rest[:1].islower() or last.lower() in ("mr", "e.g") or (is_initial and not begins)
                  or (last.lower() in ("p", "s", "no") and rest[:1].isdecimal()) or (
                      last.isdecimal() and len(last) < 3 and fresh))
        if "!" in stop[0] or "?" in stop[0] or not rest or not inside:
            count, start = count + bool(re.search(r"\w", text[start : stop.end()])), stop.end()
    return count + bool(re.search(r"\w", text[start:]))
