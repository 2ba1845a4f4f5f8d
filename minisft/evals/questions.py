"""Multiple-choice questions from files of three layouts.

    mmlu          CSV: question, choices, answer, with or without a header (Hendrycks et al. 2021)
    turkish_mmlu  JSON, an array or a record a line: question, choices [text, ...], answer (Yüksel et al. 2024)
    arc           JSON likewise: question, choices {text [...], label [...]}, answerKey; or a question {stem, choices
                  [{text, label}, ...]}, as AI2 publishes it (Clark et al. 2018)

An answer is the letter of a choice (A is the first) or its number from 0; in `arc` it is one of the record's labels. A
question's subject is named by its file: astronomy_test.csv and astronomy_dev.csv hold questions of one subject. The
first record that cannot be understood is an error: figures of a set that has lost questions cannot be compared.
"""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import SHORT, UserError
from minisft.evals.prompts import json_lines
from minisft.formats.records import BOM

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question with its choices, and where it comes from."""

    text: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    subject: str
    format: str
    language: str  # of the prompt's own words
    source: str
    line: int  # of the record's first byte, from 1

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.source}:{self.line}"


class BadQuestion(Exception):  # noqa: N818  (`read` makes an error of it)
    """Raised for a bad record; `read` adds file and line."""


def read(path: str | Path, *, format: str = "auto", language: str = "") -> list[ChoiceQuestion]:
    """The questions of a file. Raises UserError with file and line for the first that cannot be understood.

    `format` "auto" is known from the content; an empty `language` is the format's.
    """
    source = str(path)
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"{source}: not a regular file; name a file of questions")
    try:
        content = Path(path).read_bytes().removeprefix(BOM)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror} (remedy: name a file of questions that can be read)") from None
    is_json = format != "mmlu" and (format != "auto" or re.match(rb'\s*(\[\s*)?\{\s*["}]|\s*\[\s*\]', content))
    questions = []
    for line, record in json_lines(path) if is_json else _rows(content, source):
        if format == "auto":
            format = "mmlu" if not is_json else "arc" if "answerKey" in record else "turkish_mmlu"
        try:
            text, choices, answer = _parsed(format, record)
        except BadQuestion as bad:
            raise UserError(f"{source}:{line}: {bad} (read as {format}; --format chooses another)") from None
        questions.append(ChoiceQuestion(text, choices, answer, subject_of(path), format,
                                        language or ("tr" if format == "turkish_mmlu" else "en"), source, line))
    if not questions:
        raise UserError(f"{source}: no questions in it")
    return questions


def subject_of(path: str | Path) -> str:
    """high_school_physics_test.csv -> high school physics"""
    name = re.sub(r"[_-](dev|test|val|valid|validation|train)$", "", Path(path).stem, flags=re.IGNORECASE)
    return name.removeprefix("TurkishMMLU_").replace("_", " ").strip()


def _rows(content: bytes, source: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row of a CSV file, without a header. Cells may hold newlines."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{source}:{line}: invalid UTF-8 (byte 0x{content[error.start]:02x}); "
                        "save the file as UTF-8") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)  # not strict, an open quote swallows the file's rest
    line, columns = 1, 0
    try:
        for cells in rows:
            is_header = not columns and bool(cells) and cells[-1].strip().lower() == "answer"
            columns = columns or len(cells)
            if cells and len(cells) != columns:
                raise UserError(f"{source}:{line}: {len(cells)} columns, but the first row has {columns}")
            if cells and not is_header:
                yield line, cells
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}:{line}: not CSV: {error}") from None


def _parsed(format: str, record: Any) -> tuple[str, tuple[str, ...], int]:
    """Text, choices and index of the answer. Raises BadQuestion."""
    if format == "mmlu":
        if len(record) < 4:
            raise BadQuestion(f"{len(record)} columns; expected a question, at least two choices and the answer")
        text, *choices, answer = record
        index = _index(answer, len(choices))
    elif format == "arc":
        text, choices, labels = _arc(record)
        answer = record.get("answerKey")
        if answer not in labels or labels.count(answer) > 1:
            raise BadQuestion(f"answerKey is {SHORT.repr(answer)}; expected one of the labels "
                              f"{', '.join(map(str, labels))}")
        index = labels.index(answer)
    else:
        text, choices = record.get("question"), record.get("choices")
        if not isinstance(choices, list):
            raise BadQuestion(f"choices is {SHORT.repr(choices)}; expected a list of texts")
        index = _index(record.get("answer"), len(choices))
    if not 2 <= len(choices) <= len(LETTERS):
        raise BadQuestion(f"{len(choices)} choices; expected 2 to {len(LETTERS)}")
    for name, part in (("the question", text), *((f"choice {LETTERS[i]}", part) for i, part in enumerate(choices))):
        if not isinstance(part, str) or not part.strip():
            raise BadQuestion(f"{name} is {SHORT.repr(part)}; expected a text")
    return text, tuple(choices), index


def _index(answer: object, choices: int) -> int:
    """A -> 0, 0 -> 0, "0" -> 0"""
    index = answer
    if isinstance(answer, str):
        text = answer.strip()
        index = int(text) if re.fullmatch("[0-9]{1,2}", text) else LETTERS.find(text) if len(text) == 1 else -1
    if type(index) is int and 0 <= index < choices:
        return index
    raise BadQuestion(f"the answer is {SHORT.repr(answer)}; expected a letter up to "
                      f"{LETTERS[max(choices, 1) - 1 : choices]} or a number from 0 to {choices - 1}")


def _arc(record: dict[str, Any]) -> tuple[Any, list[Any], list[Any]]:
    """Text, choices and labels."""
    text: Any = record.get("question")
    choices = record.get("choices")
    if isinstance(text, dict):
        text, choices = text.get("stem"), text.get("choices")
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
    elif isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        texts, labels = [choice.get("text") for choice in choices], [choice.get("label") for choice in choices]
    else:
        raise BadQuestion(f"choices is {SHORT.repr(choices)}; expected texts and their labels")
    if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)):
        raise BadQuestion("choices: text and label must be lists of the same length")
    return text, texts, labels
