"""Prompt files: JSON lines in the layout of FastChat's MT-Bench, or of IFEval.

    {"question_id": 101, "category": "math", "turns": ["first question", "second question"], "reference": ["", ""]}
    {"key": 1000, "prompt": "question", "instruction_id_list": [...], "kwargs": [...]}

The package ships mt-en and mt-tr, forty prompts of two turns each in English and in Turkish; `instructions`, which a
program can check (instructions.py); and `flips` (signals.py). All were written for it.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import SHORT, UserError
from minisft.formats.records import BadRecord, records

SHIPPED = ("mt-en", "mt-tr", "instructions", "flips")


@dataclass(frozen=True)
class Prompt:
    """What the user says, turn after turn."""

    id: int | str
    turns: tuple[str, ...]
    category: str = ""
    reference: tuple[str, ...] = ()


def json_lines(file: str | Path, *, end: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each record in a file, or in its first `end` bytes. Raises UserError for bad JSON."""
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file")
    for line, record in records(io.BufferedReader(io.BytesIO(Path(file).read_bytes()[:end])), str(file), skip_bad=True):
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
        found[number] = Prompt(
            number, texts(record.get("turns", [record.get("prompt")]), f"{where}: turns (or prompt)"),
            str(record.get("category", "")),
            texts(record["reference"], f"{where}: reference") if record.get("reference") else ())
    if not found:
        raise UserError(f"{file}: no questions")
    return list(found.values())


def texts(value: object, what: str) -> tuple[str, ...]:
    """`value`, a list of at least one text, as a tuple. Raises UserError for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"{what}: must be text in a list, such as [\"a question\", \"a second\"], not "
                        f"{SHORT.repr(value)}")
    return tuple(value)
