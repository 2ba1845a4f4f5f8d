"""Question files: JSON lines in the layout of FastChat's MT-Bench, or of IFEval.

    {"question_id": 101, "category": "math", "turns": ["first question", "second question"], "reference": ["", ""]}
    {"key": 1000, "prompt": "question", "instruction_id_list": [...], "kwargs": [...]}

Shipped are mt-en and mt-tr, forty questions of two turns each in English and in Turkish, and `instructions`, whose
following can be checked (instructions.py). All were written for this package.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from minisft.data.records import BadRecord, records
from minisft.errors import SHORT, UserError

SHIPPED = ("mt-en", "mt-tr", "instructions", "flips")


@dataclass(frozen=True)
class Question:
    """What is asked, turn after turn."""

    id: int | str
    turns: tuple[str, ...]
    category: str = ""
    reference: tuple[str, ...] = ()


def json_lines(file: str | Path, *, end: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each record of a file, or of its first `end` bytes; UserError for what is not JSON."""
    if not Path(file).is_file():
        raise UserError(f"{file}: there is no such file")
    for line, record in records(io.BufferedReader(io.BytesIO(Path(file).read_bytes()[:end])), str(file), skip_bad=True):
        if isinstance(record, BadRecord):
            raise UserError(f"{file}:{line + record.lines_down}: {record.reason}: {record.detail}")
        yield line, record


def question_file(name: str | Path) -> Path:
    """The path of a shipped question file, or `name` itself."""
    folder = Path(str(files("minisft.evaluation"))) / "question_files"
    return folder / f"{name}.jsonl" if name in SHIPPED else Path(name)


def load_questions(name: str | Path) -> list[Question]:
    """The questions of a file or of a shipped name, in order. Raises UserError, with file and line."""
    found: dict[int | str, Question] = {}
    for line, record in json_lines(file := question_file(name)):
        question = _question(record, f"{file}:{line}")
        if question.id in found:
            raise UserError(f"{file}:{line}: question {SHORT.repr(question.id)} stands in this file already")
        found[question.id] = question
    if not found:
        raise UserError(f"{file}: no questions")
    return list(found.values())


def _question(record: dict[str, Any], where: str) -> Question:
    number = record.get("question_id", record.get("key"))
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise UserError(f"{where}: question_id (or key) must be a number or text, not {SHORT.repr(number)}")
    return Question(number, texts(record.get("turns", [record.get("prompt")]), f"{where}: turns (or prompt)"),
                    str(record.get("category", "")),
                    texts(record["reference"], f"{where}: reference") if record.get("reference") else ())


def texts(value: object, what: str) -> tuple[str, ...]:
    """`value` as a tuple of texts, of which there is at least one."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"{what}: must be text in a list, such as [\"a question\", \"a second\"], not "
                        f"{SHORT.repr(value)}")
    return tuple(value)
