"""Files of multiple-choice questions: what each layout means, and where it is broken."""

import csv
import io
import json
import os
from pathlib import Path

import pytest

from minisft.errors import UserError
from minisft.evals.questions import ChoiceQuestion, read, subject_of

HERE = Path(__file__).parent / "oracles" / "questions"
MMLU, TURKISH, ARC = (HERE / name for name in ("night_sky_test.csv", "TurkishMMLU_Kitchen.json", "tools_train.jsonl"))


def written(folder, content, name="set_test.csv"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def test_mmlu_as_json_is_asked_in_english(tmp_path):
    """The hub's copy has the fields of TurkishMMLU; the language of the questions tells them apart."""
    rows = [{"question": f"How many of the {n} planets are there in this picture?", "subject": "night_sky",
             "choices": ["one", "two"], "answer": n % 2} for n in range(4)]
    found = read(written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "test.jsonl"))
    assert {(q.format, q.language, q.subject) for q in found} == {("mmlu", "en", "night sky")}
    assert [q.answer for q in found] == [0, 1, 0, 1]
    assert {(q.format, q.language) for q in read(TURKISH)} == {("turkish_mmlu", "tr")}


def test_mmlu():
    first, second, *rest = read(MMLU)
    assert first == ChoiceQuestion("How many moons does the planet Mars have?", ("None", "One", "Two", "Seven"), 2,
                                   "night sky", "mmlu", "en", str(MMLU), 1)
    assert second.text == "Which of these gives light of its own?\n(Think of what burns.)"
    assert second.choices == ("the Moon", "Venus", "a comet, far from the Sun", 'the "evening" sun')
    assert [(q.line, q.answer) for q in (second, *rest)] == [(2, 3), (4, 1), (5, 2)]


def test_mmlu_with_names_and_numbers_is_the_same(tmp_path):
    rows = list(csv.reader(MMLU.read_text().splitlines(keepends=True)))
    out = io.StringIO()
    csv.writer(out).writerows([["question", "choice0", "choice1", "choice2", "choice3", "answer"],
                               *([*row[:-1], "ABCD".index(row[-1])] for row in rows)])
    named = read(written(tmp_path, out.getvalue()))
    assert [(q.text, q.choices, q.answer) for q in named] == [(q.text, q.choices, q.answer) for q in read(MMLU)]
    assert [q.line for q in named] == [2, 3, 5, 6]


CAPITAL = {"question": "Capital of France?", "A": "Rome", "B": "Paris", "C": "Oslo", "answer": "B"}


@pytest.mark.parametrize("header", [
    "id,prompt,A,B,C,answer", ",question,A,B,C,answer", "question,subject,A,B,C,answer",
    "Subject,Question,A,B,C,why,Answer", "question,C,B,A,answer",
    "question,answer,A,B,C", "Question,Option A,option_b,Choice C,Answer",
    "question,choice2,choice0,choice1,answer", "question,A,B,C,answer,source"])
def test_a_header_says_which_column_is_what(tmp_path, header):
    """Read by place, the first column would be the question, and the key would move."""
    names = [name.lower().replace("prompt", "question") for name in header.split(",")]
    cells = [CAPITAL.get(name) or CAPITAL.get(name[-1:].translate(str.maketrans("abc012", "ABCABC")), "7")
             if "subject" not in name else "world_cities" for name in names]
    question, = read(written(tmp_path, f"{header}\n{','.join(cells)}\n"))
    assert (question.text, question.choices, question.answer) == ("Capital of France?", ("Rome", "Paris", "Oslo"), 1)
    assert question.subject == ("world cities" if "subject" in names else "set")


@pytest.mark.parametrize("header", [
    "id,text,A,B,answer", "question,first,second,answer", "question,A,C,answer", "question,choice1,choice2,answer",
    "question,prompt,A,B,answer", "question,A,A,B,answer", "question,A,B,answer,answer", "question,choices,answer"])
def test_a_header_that_leaves_a_doubt_is_refused(tmp_path, header):
    file = written(tmp_path, f"{header}\n{','.join('7' * len(header.split(',')))}\n")
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == (f"{file}:1: the header is '{header}'; name the columns question (or prompt), A, B, ... "
                                "(a choice each) and answer, in any order; others are not read")


def test_questions_without_a_word_are_not_turkish(tmp_path):
    """elementary_mathematics as JSON: no language shows in it, but Turkish would."""
    rows = [{"question": f"{n} * 7 = ?", "subject": "elementary_mathematics", "choices": ["12", "84"], "answer": 1}
            for n in range(4)]
    found = read(written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "test.jsonl"))
    assert {(q.format, q.language, q.subject) for q in found} == {("mmlu", "en", "elementary mathematics")}


def test_turkish_mmlu():
    first, second, third = read(TURKISH)
    assert first == ChoiceQuestion("Türk kahvesi geleneksel olarak hangi kapta pişirilir?",
                                   ("Cezve", "Güveç", "Sürahi", "Tepsi", "Kevgir"), 0, "Kitchen", "turkish_mmlu", "tr",
                                   str(TURKISH), 2)
    assert (second.text, second.answer, second.line) == (" Aşağıdakilerden hangisi bir sebze değildir? ", 2, 7)
    assert (third.answer, third.line) == (4, 12)
    assert {q.language for q in read(TURKISH, language="en")} == {"en"}


def test_a_record_may_name_its_subject(tmp_path):
    """As in turkishmmlu_sub.json, which holds all subjects and counts answers from 0."""
    record = {"question": "En küçük asal sayı kaçtır?", "choices": ["0", "1", "2", "3", "4"], "answer": 2,
              "metadata": {"grade": 9, "difficulty": "easy"}}
    records = [record | {"subject": "Mathematics"}, record | {"subject": " Turkish Language and Literature"}, record,
               record | {"subject": ""}, record | {"subject": None}]
    found = read(written(tmp_path, json.dumps(records), "turkishmmlu_sub.json"))
    assert [q.subject for q in found] == ["Mathematics", "Turkish Language and Literature", *["turkishmmlu sub"] * 3]
    assert {(q.answer, q.format, q.language) for q in found} == {(2, "turkish_mmlu", "tr")}


def test_arc_in_both_spellings():
    first, second, third = read(ARC)
    assert first == ChoiceQuestion("Which tool drives a nail into wood?", ("a spoon", "a hammer", "a sieve"), 1,
                                   "tools", "arc", "en", str(ARC), 1)
    assert (second.text, second.choices, second.answer, second.line) == ("What is a saw used for?",
                                                                         ("cutting", "gluing"), 0, 2)
    assert (third.answer, third.line) == (0, 4)


def test_the_content_tells_the_format_not_the_name(tmp_path):
    assert read(written(tmp_path, TURKISH.read_bytes(), "a.csv"))[0].format == "turkish_mmlu"
    assert read(written(tmp_path, b"\xef\xbb\xbf" + MMLU.read_bytes(), "a.json"))[0] == ChoiceQuestion(
        "How many moons does the planet Mars have?", ("None", "One", "Two", "Seven"), 2, "a", "mmlu", "en",
        str(tmp_path / "a.json"), 1)
    braces = written(tmp_path, '"{1, 2} is a set of","one","two",B\n[a] {b},c,d,A\n')
    assert [q.text for q in read(braces)] == ["{1, 2} is a set of", "[a] {b}"]


def test_lines_serve_as_well_as_an_array(tmp_path):
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in json.loads(TURKISH.read_text()))
    found = read(written(tmp_path, lines, "x.jsonl"))
    assert [(q.text, q.choices, q.answer) for q in found] == [(q.text, q.choices, q.answer) for q in read(TURKISH)]


@pytest.mark.skipif("MINISFT_DATA" not in os.environ, reason="MINISFT_DATA names no folder of data files")
def test_data_files_are_read_whole():
    folder = Path(os.environ["MINISFT_DATA"]) / "eval"
    for file in sorted(folder.glob("mmlu_dev/*.csv")) + sorted(folder.glob("turkish_mmlu_dev/*.json")):
        assert [len(q.choices) for q in read(file)] == [4 if file.suffix == ".csv" else 5] * 5, file


@pytest.mark.parametrize(("name", "subject"), [
    ("high_school_physics_dev.csv", "high school physics"), ("TurkishMMLU_Religion and Ethics.json",
                                                             "Religion and Ethics"),
    ("ARC-Easy-Test.jsonl", "ARC-Easy"), ("test.csv", "test"), ("latest.csv", "latest")])
def test_subjects(name, subject):
    assert subject_of(Path("some") / name) == subject


ARC_RECORD = {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
LIST_RECORD = {"question": "Q", "choices": ["x", "y"], "answer": "B"}
JSON_ERRORS = [
    (ARC_RECORD | {"answerKey": "C"}, "answerKey is 'C'; expected one of the labels A, B"),
    (ARC_RECORD | {"answerKey": ["A"]}, "answerKey is ['A']; expected one of the labels A, B"),
    (ARC_RECORD | {"choices": {"text": ["x", "y"], "label": ["B", "B"]}},
     "answerKey is 'B'; expected one of the labels B, B"),
    (ARC_RECORD | {"choices": {"text": ["x"], "label": ["A", "B"]}},
     "choices: text and label must be lists of the same length"),
    (ARC_RECORD | {"choices": "xy"}, "choices is 'xy'; expected texts and their labels"),
    (ARC_RECORD | {"question": None}, "the question is None; expected a text"),
    (LIST_RECORD | {"answer": "C"}, "the answer is 'C'; expected a letter up to B or a number from 0 to 1"),
    (LIST_RECORD | {"answer": 2}, "the answer is 2; expected a letter up to B or a number from 0 to 1"),
    (LIST_RECORD | {"answer": True}, "the answer is True; expected a letter up to B or a number from 0 to 1"),
    (LIST_RECORD | {"answer": ""}, "the answer is ''; expected a letter up to B or a number from 0 to 1"),
    (LIST_RECORD | {"answer": "AB"}, "the answer is 'AB'; expected a letter up to B or a number from 0 to 1"),
    ({"question": "Q", "choices": ["x", "y"]}, "the answer is None; expected a letter up to B or a number from 0 to 1"),
    (LIST_RECORD | {"choices": {}}, "choices is {}; expected a list of texts"),
    (LIST_RECORD | {"choices": ["x", " "]}, "choice B is ' '; expected a text"),
    (LIST_RECORD | {"choices": ["x", 7]}, "choice B is 7; expected a text"),
    (LIST_RECORD | {"choices": ["x"], "answer": "A"}, "1 choices; expected 2 to 26"),
    (LIST_RECORD | {"question": " \n"}, "the question is ' \\n'; expected a text"),
]


@pytest.mark.parametrize(("record", "reason"), JSON_ERRORS, ids=[reason[:50] for _, reason in JSON_ERRORS])
def test_a_bad_record_is_named_with_its_line(tmp_path, record, reason):
    known, good = ("arc", ARC_RECORD) if "answerKey" in record else ("turkish_mmlu", LIST_RECORD)
    file = written(tmp_path, f"{json.dumps(good)}\n\n{json.dumps(record)}\n", "a.jsonl")
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == f"{file}:3: {reason} (read as {known}; --format chooses another)"


@pytest.mark.parametrize(("content", "line", "reason"), [
    ("q,a,b,A\nq,a,b,c,A\n", 2, "5 columns, but the first row has 4"),
    ("q,a,b,A\n\nq,a,A\n", 3, "3 columns, but the first row has 4"),
    ("q,a,A\n", 1, "3 columns; expected a question, at least two choices and the answer"),
    ("0,q,a,b,B\n", 1, "the question is '0'; expected a text (read as mmlu; --format chooses another)"),
    ('q,"a\na",b,A\nq,a,b,E\n', 3, "the answer is 'E'; expected a letter up to B or a number from 0 to 1 (read as "
                                   "mmlu; --format chooses another)"),
    ('q,a,b,A\nq,"a,b,A\nq,a,b,A\n', 2, "not CSV: unexpected end of data"),
    ('q,a,b,A\n"q"x,a,b,A\n', 2, "not CSV: ',' expected after '\"'"),
    (b"q,a,b,A\nq,\xff,b,A\n", 2, "invalid UTF-8 (byte 0xff); save the file as UTF-8"),
    ('{"question": "Q", "choices"\n', 1, "bad JSON: Expecting ':' delimiter at column 28"),
    ("[{}, 7]", 1, "choices is None; expected a list of texts (read as turkish_mmlu; --format chooses another)"),
])
def test_a_bad_file_is_named_with_its_line(tmp_path, content, line, reason):
    file = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == f"{file}:{line}: {reason}"


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "question,a,b,answer\n", b"\xef\xbb\xbf"])
def test_a_file_without_questions_is_refused(tmp_path, content):
    file = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == f"{file}: no questions in it"


def test_a_named_format_is_used(tmp_path):
    with pytest.raises(UserError) as error:
        read(TURKISH, format="arc")
    assert str(error.value) == (f"{TURKISH}:2: choices is ['Cezve', 'Güveç', 'Sürahi', 'Tepsi', 'Kevgir']; expected "
                                "texts and their labels (read as arc; --format chooses another)")
    with pytest.raises(UserError, match=r"sky_test.csv:1: choices is \['None', .*; expected texts and their labels"):
        read(MMLU, format="arc")
    for file, format, language in ((TURKISH, "mmlu", "en"), (MMLU, "turkish_mmlu", "tr")):  # CSV and JSON alike
        assert [(q.text, q.choices, q.answer) for q in read(file, format=format)] == [
            (q.text, q.choices, q.answer) for q in read(file)]
        assert {(q.format, q.language) for q in read(file, format=format)} == {(format, language)}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match=f"{file}: not a regular file; name a file of questions"):
            read(file)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "none.csv")
    assert str(error.value) == (f"{tmp_path}/none.csv: No such file or directory (remedy: name a file of questions "
                                "that can be read)")
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)
