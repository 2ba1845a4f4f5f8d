"""Files of questions: prompts that a model answers, and multiple choice.

Prompts are JSON lines in the layout of FastChat's MT-Bench (category and reference are for judges), or of IFEval:

    {"question_id": 101, "category": "math", "turns": ["first question", "second question"], "reference": ["", ""]}
    {"key": 1000, "prompt": "question", "instruction_id_list": [...], "kwargs": [...]}

The package ships mt-en and mt-tr, forty prompts of two turns in English and eighty in Turkish; `instructions`, which a
program can check (instructions.py); and `flips` (answers.py). All were written for it. Multiple choice:

    mmlu          CSV: question, choices, answer (Hendrycks et al. 2021), or columns that a header names, question (or
                  prompt), A, B, ... and answer, of which others are not read; or JSON as below
    turkish_mmlu  JSON, an array or a record a line: question, choices [text, ...], answer (Yüksel et al. 2024)
    arc           JSON likewise: question, choices {text [...], label [...]}, answerKey; or a question {stem, choices
                  [{text, label}, ...]}, as AI2 publishes it (Clark et al. 2018)

An answer is the letter of a choice (A is the first) or its number from 0; in `arc` it is one of the record's labels. A
question's subject is its record's `subject` or its file's: astronomy_test.csv and astronomy_dev.csv have the same. JSON
with lists of choices is TurkishMMLU's if its words are Turkish, and otherwise MMLU's. The first record that cannot be
understood is an error: figures of a set that has lost questions cannot be compared.
"""

import csv
import io
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisft.errors import SHORT, UserError
from minisft.evals.language import detect
from minisft.formats.records import BOM, BadRecord, records

SHIPPED = ("mt-en", "mt-tr", "instructions", "flips")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Prompt:
    """What the user says, turn after turn."""

    id: int | str
    turns: tuple[str, ...]


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
        return f"{self.source}:{self.line}"


def json_lines(file: str | Path, *, end: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each record in a file, or in its first `end` bytes. Raises UserError for bad JSON."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    for line, record in records(io.BufferedReader(io.BytesIO(Path(file).read_bytes()[:end])), str(file)):
        if isinstance(record, BadRecord):
            raise UserError(f"{file}:{line + record.lines_down}: {record.reason}: {record.detail}")
        yield line, record


def prompt_file(name: str | Path) -> Path:
    """The path of a shipped file, or `name` itself."""
    return Path(__file__).parent / "question_files" / f"{name}.jsonl" if name in SHIPPED else Path(name)


def load_prompts(name: str | Path) -> list[Prompt]:
    """The prompts of a file or a shipped name, in order. Raises UserError with file and line."""
    found: dict[int | str, Prompt] = {}
    for line, record in json_lines(file := prompt_file(name)):
        where, number = f"{file}:{line}", record.get("question_id", record.get("key"))
        if not isinstance(number, int | str) or isinstance(number, bool):
            raise UserError(f"{where}: question_id (or key) must be a number or text, not {SHORT.repr(number)}")
        if number in found:
            raise UserError(f"{where}: question {SHORT.repr(number)} is in this file already; give it another id")
        turns = texts(record.get("turns", [record.get("prompt")]), f"{where}: turns (or prompt)")
        found[number] = Prompt(number, turns)
    if not found:
        raise UserError(f"{file}: no questions")
    return list(found.values())


def texts(value: object, what: str) -> tuple[str, ...]:
    """`value`, a list of at least one text, as a tuple. Raises UserError for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"{what}: must be text in a list, such as [\"a question\", \"a second\"], not "
                        f"{SHORT.repr(value)}")
    return tuple(value)


def read(path: str | Path, *, format: str = "auto", language: str = "") -> list[ChoiceQuestion]:
    """The questions of a file of multiple choice. Raises UserError with file and line for the first bad one.

    `format` "auto" is known from the content; an empty `language` is the format's.
    """
    source = str(path)
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise UserError(f"{source}: not a regular file; name a file of questions")
    try:
        content = Path(path).read_bytes().removeprefix(BOM)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror} (remedy: name a file of questions that can be read)") from None
    is_auto = format == "auto"
    is_json = bool(re.match(rb'\s*(\[\s*)?\{\s*["}]|\s*\[\s*\]', content))
    questions = []
    for line, record in json_lines(path) if is_json else _rows(content, source):
        if format == "auto":
            format = "mmlu" if not is_json else "arc" if "answerKey" in record else "turkish_mmlu"
        try:
            text, choices, answer = _parsed(format, record)
        except UserError as bad:
            raise UserError(f"{source}:{line}: {bad} (read as {format}; --format chooses another)") from None
        subject = str(record.get("subject") or "").replace("_", " ").strip() or subject_of(path)
        questions.append(ChoiceQuestion(text, choices, answer, subject, format,
                                        language or ("tr" if format == "turkish_mmlu" else "en"), source, line))
    if not questions:
        raise UserError(f"{source}: no questions in it")
    if is_auto and format == "turkish_mmlu" and detect(" ".join(
            part for q in questions for part in (q.text, *q.choices))) != {"tr"}:  # MMLU as JSON has the same fields
        return [replace(q, format="mmlu", language=language or "en") for q in questions]
    return questions


def subject_of(path: str | Path) -> str:
    """high_school_physics_test.csv -> high school physics"""
    name = re.sub(r"[_-](dev|test|val|valid|validation|train)$", "", Path(path).stem, flags=re.IGNORECASE)
    return name.removeprefix("TurkishMMLU_").replace("_", " ").strip()


def _rows(content: bytes, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) of each row of a CSV file, without a header. Cells may hold newlines."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise UserError(f"{source}:{line}: invalid UTF-8 (byte 0x{content[error.start]:02x}); "
                        "save the file as UTF-8") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)  # not strict, an open quote swallows the file's rest
    line, names = 1, list[str]()
    try:
        for cells in rows:
            names, is_header = (names, False) if names or not cells else _names(cells, f"{source}:{line}")
            if cells and len(cells) != len(names):
                raise UserError(f"{source}:{line}: {len(cells)} columns, but the first row has {len(names)}")
            if cells and not is_header:
                record: dict[str, Any] = dict(zip(names, cells, strict=True))
                yield line, record | {"choices": [cell for name, cell in sorted(record.items()) if len(name) == 1]}
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}:{line}: not CSV: {error}") from None


def _names(first: list[str], where: str) -> tuple[list[str], bool]:
    """What each column is: "question", "A", "B", ..., "answer" or something else; and whether `first` is a header."""
    names = [re.sub(r"^(option|choice)[ _]?", "", cell.strip().lower()) for cell in first]
    names = ["question" if name == "prompt" else name.upper() if len(name) == 1 else name for name in names]
    if names[-1] != "answer" and not {"question", "answer"} <= {*names}:
        if len(first) < 4:
            raise UserError(f"{where}: {len(first)} columns; expected a question, at least two choices and the answer")
        return ["question", *map(chr, range(65, 63 + len(first))), "answer"], False
    choices = "".join(sorted(name for name in names if len(name) == 1))
    if (len(choices) < 2 or choices not in (LETTERS[: len(choices)], string.digits[: len(choices)])
            or (names.count("question"), names.count("answer")) != (1, 1)):
        raise UserError(f"{where}: the header is {SHORT.repr(','.join(first))}; name the columns question (or prompt), "
                        "A, B, ... (a choice each) and answer, in any order; others are not read")
    return names, True


def _parsed(format: str, record: Any) -> tuple[str, tuple[str, ...], int]:
    """Text, choices and index of the answer. Raises UserError, without file and line."""
    text, choices, answer = record.get("question"), record.get("choices"), record.get("answer")
    if format == "arc":
        text, choices, index = _arc(text, choices, record.get("answerKey"))
    elif not isinstance(choices, list):
        raise UserError(f"choices is {SHORT.repr(choices)}; expected a list of texts")
    else:
        index = answer
        if isinstance(answer, str):
            sign = answer.strip()
            index = int(sign) if re.fullmatch("[0-9]{1,2}", sign) else LETTERS.find(sign) if len(sign) == 1 else -1
        if type(index) is not int or not 0 <= index < len(choices):
            raise UserError(f"the answer is {SHORT.repr(answer)}; expected a letter up to "
                            f"{LETTERS[len(choices) - 1 : len(choices)]} or a number from 0 to {len(choices) - 1}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{len(choices)} choices; expected 2 to {len(LETTERS)}")
    for name, part in (("the question", text), *((f"choice {LETTERS[i]}", part) for i, part in enumerate(choices))):
        if not isinstance(part, str) or not part.strip() or (part is text and part.isdecimal()):  # a row's number
            raise UserError(f"{name} is {SHORT.repr(part)}; expected a text")
    return text, tuple(choices), index


def _arc(text: Any, choices: Any, answer: object) -> tuple[Any, list[Any], int]:
    if isinstance(text, dict):
        text, choices = text.get("stem"), text.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    if not isinstance(choices, dict):
        raise UserError(f"choices is {SHORT.repr(choices)}; expected texts and their labels")
    found, labels = choices.get("text"), choices.get("label")
    if not (isinstance(found, list) and isinstance(labels, list) and len(found) == len(labels)):
        raise UserError("choices: text and label must be lists of the same length")
    if labels.count(answer) != 1:
        raise UserError(f"answerKey is {SHORT.repr(answer)}; expected one of the labels {', '.join(map(str, labels))}")
    return text, found, labels.index(answer)
