"""Does a model follow instructions? It answers prompts with instructions that a program can check.

A prompt file has IFEval's layout (google/IFEval, input_data.jsonl), with "language" for prompts whose letters follow
Turkish case:

    {"key": 1, "prompt": "...", "language": "tr", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

Strict: the answer follows. Loose forgives a frame such as "Sure, here it is:": so does the answer without its first
line, its last line or both, each also without asterisks. A prompt is followed if all its instructions are.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from minisft.data.conversation import Turn
from minisft.errors import PATH, UserError, printable
from minisft.evals.answers import in_batches
from minisft.evals.instruction_checks import CHECKS, parameters
from minisft.evals.language import check_language
from minisft.evals.prompts import json_lines, prompt_file
from minisft.evals.rates import percent, rate
from minisft.generate.assistant import Assistant


@dataclass(frozen=True)
class InstructionPrompt:
    """A prompt and the instructions in it."""

    key: int | str
    prompt: str
    language: str
    instructions: tuple[tuple[str, dict[str, Any]], ...]  # name, parameters


@dataclass(frozen=True)
class InstructionFile:
    """The prompts of a file, and how often each unknown instruction was left out."""

    name: str
    prompts: list[InstructionPrompt]
    skipped: dict[str, int]


def load(name: str | Path, *, skip_unknown: bool = False, limit: int | None = None) -> InstructionFile:
    """The (first `limit`) prompts of a file or of the shipped "instructions".

    Raises UserError for wrong parameters, and for unknown instructions, unless `skip_unknown` leaves them out.
    """
    prompts, skipped = [], Counter[str]()
    for line, record in islice(json_lines(file := prompt_file(name)), limit):
        where = f"{file}:{line}"
        names, given = record.get("instruction_id_list"), record.get("kwargs")
        if not (isinstance(record.get("prompt"), str) and isinstance(record.get("key"), int | str)):
            raise UserError(f"{where}: needs a key, and a prompt that is text")
        if not (isinstance(names, list) and names and isinstance(given, list) and len(names) == len(given)
                and all(isinstance(name, str) for name in names) and all(isinstance(kw, dict) for kw in given)):
            raise UserError(f"{where}: needs instruction_id_list, a list of names, and kwargs, an object for each name")
        unknown = [name for name in names if name not in CHECKS]
        if unknown and not skip_unknown:
            raise UserError(f"{where}: no check for the instruction {printable(repr(unknown[0]))}; leave such "
                            f"instructions out with --skip-unknown, or choose from {', '.join(sorted(CHECKS))}")
        skipped.update(unknown)
        known = tuple((name, parameters(name, kwargs, where))
                      for name, kwargs in zip(names, given, strict=True) if name in CHECKS)
        language = check_language(str(record.get("language") or "en"), where)  # "TR" would follow English case
        if known:
            prompts.append(InstructionPrompt(record["key"], record["prompt"], language, known))
    if not prompts:
        raise UserError(f"{file}: no prompts with instructions that can be checked")
    return InstructionFile(str(name), prompts, dict(skipped))


def figures(assistant: Assistant, file: InstructionFile, *, max_new_tokens: int = 512, batch: int = 8
            ) -> dict[str, Any]:
    """Answer every prompt and check the answers. See `check`."""
    answers = in_batches(assistant, [(Turn("user", prompt.prompt),) for prompt in file.prompts],
                         max_new_tokens=max_new_tokens, batch=batch, name="instructions")
    return {"file": file.name, "max_new_tokens": max_new_tokens, "skipped": file.skipped,
            **check(file.prompts, answers)}


def strictly(answer: str, prompt: InstructionPrompt) -> list[bool]:
    """For each instruction: does `answer` follow it? An empty answer follows none."""
    return [bool(answer.strip()) and CHECKS[name](answer, prompt.language, **kwargs)
            for name, kwargs in prompt.instructions]


def loosely(answer: str, prompt: InstructionPrompt) -> list[bool]:
    """For each instruction: does `answer` follow it, or any part of it without a frame?"""
    lines = answer.split("\n")
    variants = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    verdicts = [strictly(text, prompt) for text in variants + [text.replace("*", "") for text in variants]]
    return [any(column) for column in zip(*verdicts, strict=True)]


def check(prompts: list[InstructionPrompt], answers: Iterable[str]) -> dict[str, Any]:
    """Rates of prompts and instructions followed, strictly and loosely; strictly also by instruction and by language;
    and every answer with its verdicts, in the order of the prompt's instructions."""
    checked: list[dict[str, Any]] = [
        {"key": prompt.key, "answer": answer, "strict": strictly(answer, prompt), "loose": loosely(answer, prompt)}
        for prompt, answer in zip(prompts, answers, strict=True)]
    found: dict[str, Any] = {}
    for kind in ("strict", "loose"):
        rows = [each[kind] for each in checked]
        found[kind] = {"prompts": rate(map(all, rows)), "instructions": rate(chain.from_iterable(rows))}
    by_name, by_language = defaultdict(list), defaultdict(list)
    for prompt, each in zip(prompts, checked, strict=True):
        by_language[prompt.language].append(all(each["strict"]))
        for (name, _), followed in zip(prompt.instructions, each["strict"], strict=True):
            by_name[name].append(followed)
    found["by_instruction"] = {name: rate(verdicts) for name, verdicts in sorted(by_name.items())}
    found["by_language"] = {name: rate(verdicts) for name, verdicts in sorted(by_language.items())}
    return found | {"answers": checked}


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
