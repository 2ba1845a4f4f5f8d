"""Does a model do what it is told? Instructions that a program can check, asked and checked.

A question file has IFEval's layout (google/IFEval, input_data.jsonl), with "language" where letters are cased as in
Turkish:

    {"key": 1, "prompt": "...", "language": "tr", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

Strict asks whether the answer follows. Loose forgives a frame: the answer also counts without its first line, its last
line or both ("Sure, here it is:"), and each of these without asterisks. A prompt is followed if all its instructions
are.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from minisft.data.conversation import Turn
from minisft.errors import PATH, UserError, printable
from minisft.evaluation.answers import Answering, in_batches
from minisft.evaluation.instruction_checks import CHECKS, parameters
from minisft.evaluation.language import check_language
from minisft.evaluation.prompts import json_lines, question_file
from minisft.evaluation.rates import percent, rate


@dataclass(frozen=True)
class Instructed:
    """A prompt and the instructions in it."""

    key: int | str
    prompt: str
    language: str
    instructions: tuple[tuple[str, dict[str, Any]], ...]  # name, parameters


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file."""

    file: str
    prompts: list[Instructed]
    skipped: dict[str, int]  # how often each unknown instruction was left out


def figures(assistant: Answering, asked: Prompts, *, max_new_tokens: int = 512, batch: int = 8) -> dict[str, Any]:
    """Ask every prompt and check the answers. See `check`."""
    answers = in_batches(assistant, [(Turn("user", one.prompt),) for one in asked.prompts],
                         max_new_tokens=max_new_tokens, batch=batch, doing="instructions")
    return {"file": asked.file, "max_new_tokens": max_new_tokens, "skipped": asked.skipped,
            **check(asked.prompts, answers)}


def load(name: str | Path, *, skip_unknown: bool = False, limit: int | None = None) -> Prompts:
    """The prompts of a file or of the shipped "instructions", or the first `limit` of them.

    Raises UserError for instructions that are not known (they count with `skip_unknown`) and parameters that are wrong.
    """
    prompts, skipped = [], Counter[str]()
    for line, record in islice(json_lines(file := question_file(name)), limit):
        where = f"{file}:{line}"
        names, given = record.get("instruction_id_list"), record.get("kwargs")
        if not (isinstance(record.get("prompt"), str) and isinstance(record.get("key"), int | str)):
            raise UserError(f"{where}: needs a key, and a prompt that is text")
        if not (isinstance(names, list) and names and isinstance(given, list) and len(names) == len(given)
                and all(isinstance(name, str) for name in names) and all(isinstance(kw, dict) for kw in given)):
            raise UserError(f"{where}: needs instruction_id_list, a list of names, and kwargs, an object for each name")
        unknown = [name for name in names if name not in CHECKS]
        if unknown and not skip_unknown:
            raise UserError(f"{where}: there is no check for the instruction {printable(repr(unknown[0]))}; leave such "
                            f"ones out with --skip-unknown, or choose from {', '.join(sorted(CHECKS))}")
        skipped.update(unknown)
        known = tuple((name, parameters(name, kwargs, where))
                      for name, kwargs in zip(names, given, strict=True) if name in CHECKS)
        language = check_language(str(record.get("language") or "en"), where)  # "TR" would compare as English
        if known:
            prompts.append(Instructed(record["key"], record["prompt"], language, known))
    if not prompts:
        raise UserError(f"{file}: no prompts with instructions that can be checked")
    return Prompts(str(name), prompts, dict(skipped))


def follows(answer: str, asked: Instructed) -> list[bool]:
    """Whether `answer` follows each instruction, strictly. An empty answer follows none."""
    return [bool(answer.strip()) and CHECKS[name](answer, asked.language, **kwargs)
            for name, kwargs in asked.instructions]


def loosely(answer: str, asked: Instructed) -> list[bool]:
    """The same for the answer or any of it without a frame."""
    lines = answer.split("\n")
    variants = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    verdicts = [follows(text, asked) for text in variants + [text.replace("*", "") for text in variants]]
    return [any(column) for column in zip(*verdicts, strict=True)]


def check(prompts: list[Instructed], answers: Iterable[str]) -> dict[str, Any]:
    """Rates of prompts and of instructions followed, strictly and loosely, also by instruction and language; and each
    answer with its verdicts, in the order of its instructions."""
    said: list[dict[str, Any]] = [
        {"key": asked.key, "answer": answer, "strict": follows(answer, asked), "loose": loosely(answer, asked)}
        for asked, answer in zip(prompts, answers, strict=True)]
    by_name, by_language = defaultdict(list), defaultdict(list)
    for asked, strict in zip(prompts, (each["strict"] for each in said), strict=True):
        by_language[asked.language].append(all(strict))
        for (name, _), followed in zip(asked.instructions, strict, strict=True):
            by_name[name].append(followed)
    rates: dict[str, Any] = {}
    for kind in ("strict", "loose"):
        rows = [each[kind] for each in said]
        flat = [followed for row in rows for followed in row]
        rates[kind] = {"prompts": rate(sum(map(all, rows)), len(rows)), "instructions": rate(sum(flat), len(flat))}
    rates["by_instruction"] = {name: rate(sum(found), len(found)) for name, found in sorted(by_name.items())}
    rates["by_language"] = {name: rate(sum(found), len(found)) for name, found in sorted(by_language.items())}
    return rates | {"answers": said}


def describe(found: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"instructions followed ({found['file']}), with 95% intervals"]
    lines += [f"  {unit}, {kind:6} {percent(found[kind][unit])}"
              for unit in ("prompts", "instructions") for kind in ("strict", "loose")]
    lines += [f"  prompts in {code}, strict: {percent(figure)}" for code, figure in found["by_language"].items()
              if len(found["by_language"]) > 1]
    lines += [f"    {name:45} {percent(figure)}" for name, figure in found["by_instruction"].items()]
    lines += [f"  not checked: {name} ({count} times)" for name, count in found["skipped"].items()]
    return "\n".join(printable(line, PATH) for line in lines)
