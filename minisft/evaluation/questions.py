"""Multiple-choice questions from files of three layouts.

    mmlu          CSV: question, choices, answer, with or without a first line of names (Hendrycks et al. 2021)
    turkish_mmlu  JSON, an array or a record a line: question, choices [text, ...], answer (Yüksel et al. 2024)
    arc           JSON, the same: question, choices {text [...], label [...]}, answerKey; or a question
                  {stem, choices [{text, label}, ...]}, as AI2 publishes it (Clark et al. 2018)

An answer is a letter of the choice (A is the first) or its number from 0; in `arc` it is one of the record's labels.
A question belongs to the subject that its file is called after: astronomy_test.csv and astronomy_dev.csv hold
questions of one subject. Any record that is not understood stops the reading: a set that has lost questions gives
figures that cannot be compared.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.data.records import BOM, BadRecord, records
from minisft.errors import SHORT, UserError

FORMATS = ("mmlu", "turkish_mmlu", "arc")
LANGUAGES = ("en", "tr")  # those that a prompt can be written in
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its choices, and where it comes from."""

    text: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    subject: str
    format: str
    language: str
    source: str
    line: int  # of the record's first byte, from 1

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.source}:{self.line}"


class Wrong(Exception):  # noqa: N818  (not an error: what is raised is one)
    """What is wrong with a record; the reader adds file and line."""


def read(path: str | Path, *, format: str = "auto", language: str = "") -> list[Question]:
    """The questions of a file. Raises UserError, with file and line, for the first that is not understood.

    `format` "auto": known from the content. `language` is that of the prompt's own words; empty: the format's.
    """
    source = str(path)
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"{source}: is no regular file; name a file of questions")
    try:
        content = Path(path).read_bytes().removeprefix(BOM)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror} (remedy: name a file of questions that can be read)") from None
    is_json = format != "mmlu" and (format != "auto" or re.match(rb'\s*(\[\s*)?\{\s*["}]|\s*\[\s*\]', content))
    found = _json(content, source, format) if is_json else _csv(content, source)
    questions, subject = [], subject_of(path)
    for line, known, record in found:
        try:
            text, choices, answer = _understood(known, record)
        except Wrong as wrong:
            raise UserError(f"{source}:{line}: {wrong} (read as {known}; --format chooses another)") from None
        questions.append(Question(text, choices, answer, subject, known,
                                  language or ("tr" if known == "turkish_mmlu" else "en"), source, line))
    if not questions:
        raise UserError(f"{source}: no questions in it")
    return questions


def subject_of(path: str | Path) -> str:
    """high_school_physics_test.csv -> high school physics"""
    name = re.sub(r"[_-](dev|test|val|valid|validation|train)$", "", Path(path).stem, flags=re.IGNORECASE)
    return name.removeprefix("TurkishMMLU_").replace("_", " ").strip()


def _json(content: bytes, source: str, format: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line, format, record), the format as the first record has it."""
    for line, record in records(io.BufferedReader(io.BytesIO(content)), source, True):
        if isinstance(record, BadRecord):
            raise UserError(f"{source}:{line + record.lines_down}: {record.reason}: {record.detail}")
        if format == "auto":
            format = "arc" if "answerKey" in record else "turkish_mmlu"
        yield line, format, record


def _csv(content: bytes, source: str) -> Iterator[tuple[int, str, list[str]]]:
    """(line, format, cells) without a first row of names. Cells may hold newlines."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{source}:{line}: invalid UTF-8 (byte 0x{content[error.start]:02x}); "
                        "save the file as UTF-8") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)  # not strict: an open quote swallows the file's rest
    line, columns = 1, 0
    try:
        for cells in rows:
            if cells and columns == 0:
                columns = len(cells)
                if cells[-1].strip().lower() == "answer":
                    cells = []
            if cells and len(cells) != columns:
                raise UserError(f"{source}:{line}: {len(cells)} columns, where the first row has {columns}")
            if cells:
                yield line, "mmlu", cells
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}:{line}: not CSV: {error}") from None


def _understood(format: str, record: dict[str, Any] | list[str]) -> tuple[str, tuple[str, ...], int]:
    """Text, choices and the right one's index. Raises Wrong."""
    text: Any  # as the file has it, looked at below
    choices: Any
    if isinstance(record, list):
        if len(record) < 4:
            raise Wrong(f"{len(record)} columns; expected a question, at least two choices and the answer")
        text, *choices, answer = record
        index = _index(answer, len(choices))
    elif format == "arc":
        text, choices, labels, answer = _arc(record)
        if answer not in labels or labels.count(answer) > 1:
            raise Wrong(f"answerKey is {SHORT.repr(answer)}; expected one of the labels {', '.join(map(str, labels))}")
        index = labels.index(answer)
    else:
        text, choices = record.get("question"), record.get("choices")
        if not isinstance(choices, list):
            raise Wrong(f"choices is {SHORT.repr(choices)}; expected a list of texts")
        index = _index(record.get("answer"), len(choices))
    if not isinstance(text, str) or not text.strip():
        raise Wrong(f"the question is {SHORT.repr(text)}; expected a text")
    if not 2 <= len(choices) <= len(LETTERS):
        raise Wrong(f"{len(choices)} choices; expected 2 to {len(LETTERS)}")
    for letter, choice in zip(LETTERS, choices, strict=False):
        if not isinstance(choice, str) or not choice.strip():
            raise Wrong(f"choice {letter} is {SHORT.repr(choice)}; expected a text")
    return text, tuple(choices), index


def _index(answer: object, choices: int) -> int:
    """A -> 0, 0 -> 0"""
    index = answer
    if isinstance(answer, str):
        text = answer.strip()
        index = LETTERS.find(text) if len(text) == 1 and text in LETTERS else text
        index = int(text) if re.fullmatch("[0-9]{1,2}", text) else index
    if type(index) is int and 0 <= index < choices:
        return index
    raise Wrong(f"the answer is {SHORT.repr(answer)}; expected a letter up to {LETTERS[max(choices, 1) - 1 : choices]} "
                f"or a number from 0 to {choices - 1}")


def _arc(record: dict[str, Any]) -> tuple[Any, list[Any], list[Any], Any]:
    """Text, choices, labels and the answer's label."""
    text, choices = record.get("question"), record.get("choices")
    if isinstance(text, dict):
        choices = text.get("choices")
        text = text.get("stem")
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
    elif isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        texts, labels = [choice.get("text") for choice in choices], [choice.get("label") for choice in choices]
    else:
        raise Wrong(f"choices is {SHORT.repr(choices)}; expected texts and their labels")
    if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)):
        raise Wrong("choices: text and label must be lists of the same length")
    return text, texts, labels, record.get("answerKey")
