"""Does a model follow instructions that a program can check: at least 100 words, no commas, all in JSON?

A prompt file has IFEval's layout (google/IFEval, input_data.jsonl), with "language" for prompts whose letters follow
Turkish case:

    {"key": 1, "prompt": "...", "language": "tr", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

Names, parameters and meaning are those of IFEval (Zhou et al. 2023, Instruction-Following Evaluation for Large Language
Models, table 1), so its public question file works as it is. A few names are added for Turkish and for openings.
docs/evaluation.md lists where verdicts differ from IFEval's own program: keywords are text and never regular
expressions, letters may be any character, sentences end by the rule below, and a language in doubt counts as followed.

Strict: the answer follows. Loose forgives a frame such as "Sure, here it is:": so does the answer without its first
line, its last line or both, each also without asterisks. A prompt is followed if all its instructions are.
"""

import inspect
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from operator import eq, ge, lt
from pathlib import Path
from typing import Any

from minisft.data.conversation import Turn
from minisft.errors import PATH, SHORT, UserError, printable
from minisft.evals.answers import in_batches
from minisft.evals.language import check_language, detect, lost_dots, lower, signs
from minisft.evals.questions import json_lines, prompt_file
from minisft.evals.rates import percent, rate
from minisft.generate.assistant import Assistant

RELATIONS: dict[str, Callable[[int, int], bool]] = {"less than": lt, "at least": ge, "exactly": eq}  # "exactly" is ours
# A full stop after one of these ends no sentence, whatever follows.
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "prof", "capt", "lt", "vs", "e.g", "i.e", "doç", "yrd", "örn", "bkz",
                 "m.ö", "m.s", "t.c", "av", "hz", "sn", "op", "uzm", "arş", "öğr", "gör", "ord"}
# After one of these, after initials, and in Turkish after ordinals it ends one only before a function word.
_OFTEN_LAST = {"en": {"etc", "inc", "ltd", "jr", "sr"}, "tr": {"vb", "vs", "vd", "yy", "ltd", "şti", "cad", "mah"}}
_INITIALS, _ORDINAL = re.compile(r"(?:\w\.)*\w"), re.compile(r"\d{1,2}|[IVXLC]+")
_NUMBERED = {"no", "p", "pp", "s", "sf", "md"}  # before a number: p. 12
_CLOSING, _STOPS, _OPENING = "\"'”’»)]*", ".!?…", "(\"'“‘*"
_WORD = re.compile(r"\w")
# Endings of a Turkish noun: number, possessor, case, -ki, -dir. A noun's last letter decides how a possessor begins.
_POSSESSOR = "[ıiuü](?:[mn](?:[ıiuü]z)?)?", "[mn](?:[ıiuü]z)?|s[ıiuü]"
_ENDINGS = tuple(rf"(?:(?:l[ae]r(?:{_POSSESSOR[0]})?|{own})?(?:[yn]?[ıiuü]n?|[yn]?[ae]|n?[dt][ae]n?|y?l[ae]|n?c[ae])?"
                 r"(?:ki(?:l[ae]r)?)?(?:[dt][ıiuü]r)?|['’]\w+)" for own in _POSSESSOR)
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}  # blanks may stand between the letters
_CONSTRAINED = {"en": ("My answer is yes.", "My answer is no.", "My answer is maybe."),
                "tr": ("Cevabım evet.", "Cevabım hayır.", "Cevabım belki.")}


def sentences(text: str, language: str = "en") -> int:
    """The number of parts that end with . ! ? or … before a blank, and of what remains after the last.

    A full stop ends no sentence after an abbreviation, after the number of an item ("2. Stir."), or before a small
    letter ("3. sınıf"). After initials, and in Turkish after ordinals in the middle of a sentence ("IV. Murat",
    "3. Selim"), it ends one only if a function word follows, as sentences begin with one: "Cevap C. Bu kesin."
    """
    count, has_word, is_first, before = 0, False, True, ""
    for run, after in pairwise(chain(re.finditer(r"\S+", text), [None])):
        assert run
        unclosed, previous, is_word = run[0].rstrip(_CLOSING), before * (not is_first), bool(_WORD.search(run[0]))
        before, rest = unclosed.rstrip(_STOPS), after[0] if after else ""
        has_word, is_first = has_word or is_word, is_first and not is_word
        if before != unclosed and not (rest and "!" not in run[0] and "?" not in run[0] and _continues(
                before.strip(_OPENING), rest, language, previous=previous)):
            count, has_word, is_first = count + has_word, False, True
        is_first = is_first or bool(after and "\n" in text[run.end() : after.start()])
    return count + has_word


def _continues(last: str, rest: str, language: str, *, previous: str) -> bool:
    """True if a full stop after the word `last` and before `rest` ends no sentence. `previous` is the word before, ""
    if `last` begins a line or a sentence."""
    small, often_last = lower(last, language), _OFTEN_LAST.get(language, set())
    if (rest[:1].islower() or (small in ABBREVIATIONS - often_last) or (small in _NUMBERED and rest[:1].isdecimal())
            or (last.isdecimal() and len(last) < 3 and not previous)):
        return True
    is_ordinal = language == "tr" and _ORDINAL.fullmatch(last) and not previous.endswith(tuple("=:<>≈+-–−*/×÷"))
    if is_ordinal or (last.isupper() and _INITIALS.fullmatch(last)) or small in often_last:
        return lower(rest.strip(_OPENING + _CLOSING + ",;:"), language) not in signs(language)[0]
    return False


def occurrences(keyword: str, answer: str, language: str) -> int:
    """How often `keyword` occurs, in any case: also inside words, as IFEval counts; but in Turkish as a word of its
    own, bare or with endings of a noun. "ısı" is in "ısının" and "ISI'yı", not in "ısırdı" or "kısırı"."""
    keyword, answer = lower(keyword, language), lower(answer, language)
    if language != "tr":
        return answer.count(keyword)
    begin = r"(?<!\w)" * keyword[:1].isalnum()
    end = (_ENDINGS[keyword[-1:] in tuple("aeıioöuüâîû")] + r"(?!\w)") * keyword[-1:].isalnum()
    return len(re.findall(begin + re.escape(keyword) + end, answer))


def _between(answer: str, divider: str) -> list[str]:
    """The texts between dividers; [] if one is empty, except that dividers may also begin and end the answer."""
    parts = [part.strip() for part in re.split(divider, answer)]
    return [part for part in parts if part] if all(parts[1:-1]) else []


def _has_first_word(answer: str, language: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in answer.split("\n\n") if part.strip()]  # blank lines stand between them
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = re.split(r"[.,?!'\"]", parts[nth_paragraph - 1].split()[0].lstrip("'\""))[0]
    return lower(first, language) == lower(first_word, language)


def _is_json(answer: str, _: str) -> bool:
    with suppress(ValueError, RecursionError):
        json.loads(re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", answer.strip()))  # alone or fenced with backquotes
        return True
    return False


def _cased(is_cased: Callable[[str], bool], code: str) -> Callable[[str, str], bool]:
    """A check for text in one language and one case."""
    # i with a combining dot is no Turkish letter; it is what İ becomes if a program does not know the language.
    return lambda answer, _: is_cased(answer) and code in detect(answer) and (
        code != "tr" or not ("i\u0307" in answer or lost_dots(answer)))


# (answer, language whose case rules apply, the instruction's parameters) -> followed?
CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda answer, language, *, keywords: all(
        occurrences(keyword, answer, language) for keyword in keywords),
    "keywords:frequency": lambda answer, language, *, keyword, frequency, relation: RELATIONS[relation](
        occurrences(keyword, answer, language), frequency),
    "keywords:forbidden_words": lambda answer, language, *, forbidden_words: not any(  # as whole words
        occurrences(word, answer, language) if language == "tr" else
        re.search(rf"(?<!\w){re.escape(lower(word, language))}(?!\w)", lower(answer, language))
        for word in forbidden_words),
    "keywords:letter_frequency": lambda answer, language, *, letter, let_frequency, let_relation: (
        RELATIONS[let_relation](lower(answer, language).count(lower(letter, language)), let_frequency)),
    "language:response_language": lambda answer, _, *, language: language in detect(answer),
    "length_constraints:number_sentences": lambda answer, language, *, num_sentences, relation: RELATIONS[
        relation](sentences(answer, language), num_sentences),
    "length_constraints:number_paragraphs": lambda answer, _, *, num_paragraphs: (
        len(_between(answer, r"\s?\*\*\*\s?")) == num_paragraphs),
    # Words are runs of letters, digits and underscores, as IFEval counts them: "don't" is two.
    "length_constraints:number_words": lambda answer, _, *, num_words, relation: RELATIONS[relation](
        len(re.findall(r"\w+", answer)), num_words),
    "length_constraints:nth_paragraph_first_word": _has_first_word,
    # [such] pieces; a [ without a ] in its line begins none, found as a match without its group.
    "detectable_content:number_placeholders": lambda answer, _, *, num_placeholders: (
        re.findall(r"\[[^\]\n]*(\]?)", answer).count("]") >= num_placeholders),
    "detectable_content:postscript": lambda answer, language, *, postscript_marker: bool(re.search(
        _POSTSCRIPTS.get(postscript_marker) or re.escape(lower(postscript_marker, language)), lower(answer, language))),
    # Lines that begin with - or *, but not with **.
    "detectable_format:number_bullet_lists": lambda answer, _, *, num_bullets: (
        len(re.findall(r"^[^\S\n]*(?:\*[^*]|-).*$", answer, re.MULTILINE)) == num_bullets),
    "detectable_format:constrained_response": lambda answer, language: any(
        option in answer for option in _CONSTRAINED["tr" if language == "tr" else "en"]),
    # Pieces of a line marked *so* or **so**; two stars with nothing between them are none.
    "detectable_format:number_highlighted_sections": lambda answer, _, *, num_highlights: (
        sum(bool(piece.strip("*").strip()) for piece in re.findall(r"\*[^\n*]*\*", answer)
            + re.findall(r"\*\*[^\n*]*\*\*", answer)) >= num_highlights),
    # Headings such as "Section 1".
    "detectable_format:multiple_sections": lambda answer, _, *, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", answer)) >= num_sections),
    "detectable_format:json_format": _is_json,
    # In <<such>> brackets, on one line.
    "detectable_format:title": lambda answer, _: any(
        line[line.find("<<") : line.rfind(">>") + 2].lstrip("<").rstrip(">").strip()
        for line in answer.split("\n") if "<<" in line),
    "combination:two_responses": lambda answer, _: (
        len(parts := _between(answer, r"\*{6}")) == 2 and parts[0] != parts[1]),
    "combination:repeat_prompt": lambda answer, language, *, prompt_to_repeat: (
        lower(answer.strip(), language).startswith(lower(prompt_to_repeat.strip(), language))),
    # Quotation marks around the whole answer do not count.
    "startend:start_checker": lambda answer, language, *, start_phrase: (
        lower(answer.strip().strip('"'), language).startswith(lower(start_phrase.strip(), language))),
    "startend:end_checker": lambda answer, language, *, end_phrase: (
        lower(answer.strip().strip('"'), language).endswith(lower(end_phrase.strip(), language))),
    "startend:quotation": lambda answer, _: len(text := answer.strip()) > 1 and text[0] == text[-1] == '"',
    # Hyphens and apostrophes belong to a word: "COVID-19" is one, and so is "I".
    "change_case:capital_word_frequency": lambda answer, _, *, capital_frequency, capital_relation: (
        RELATIONS[capital_relation](sum(map(str.isupper, re.findall(r"\w+(?:[-'’./]\w+)*", answer))),
                                    capital_frequency)),
    "change_case:english_capital": _cased(str.isupper, "en"),
    "change_case:english_lowercase": _cased(str.islower, "en"),
    "change_case:turkish_capital": _cased(str.isupper, "tr"),
    "change_case:turkish_lowercase": _cased(str.islower, "tr"),
    "punctuation:no_comma": lambda answer, _: "," not in answer,
}


def parameters(instruction: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parameters of `instruction` in `given`, without null ones. Raises UserError for any that is wrong."""
    given = {name: unicodedata.normalize("NFC", value) if isinstance(value, str) else value
             for name, value in given.items() if value is not None}
    takes = [name for name, parameter in inspect.signature(CHECKS[instruction]).parameters.items()
             if parameter.kind is parameter.KEYWORD_ONLY]
    if given.keys() != set(takes):
        raise UserError(f"{where}: {instruction} takes {', '.join(takes) or 'no parameters'}; "
                        f"found {printable(', '.join(given)) or 'none'}")
    for name in takes:
        value = given[name]
        if name in ("keywords", "forbidden_words"):
            wanted, fits = "a list of texts", isinstance(value, list) and value != [] and all(map(_is_text, value))
        elif name.startswith(("num_", "nth_")) or name.endswith("frequency"):
            given[name] = value = int(value) if isinstance(value, float) and value.is_integer() else value
            wanted, fits = "a whole number", type(value) is int
        elif name.endswith("relation"):
            wanted, fits = f"one of {', '.join(RELATIONS)}", isinstance(value, str) and value in RELATIONS
        else:
            wanted, fits = "text", _is_text(value)
        if not fits:
            raise UserError(f"{where}: {instruction}: {name} must be {wanted}, not {SHORT.repr(value)}")
        if name == "language":
            check_language(value, f"{where}: {instruction}")
    return given


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


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
        language = check_language(str(record.get("language") or "en"), where)  # "TR" would follow English case
        if known := tuple((name, parameters(name, kwargs, where))
                          for name, kwargs in zip(names, given, strict=True) if name in CHECKS):
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
    answer = unicodedata.normalize("NFC", answer)  # a letter and its mark in two characters would be two words
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
    found: dict[str, Any] = {kind: {
        "prompts": rate(all(each[kind]) for each in checked),
        "instructions": rate(chain.from_iterable(each[kind] for each in checked))} for kind in ("strict", "loose")}
    by_name, by_language = defaultdict(list), defaultdict(list)
    for prompt, each in zip(prompts, checked, strict=True):
        by_language[prompt.language].append(all(each["strict"]))
        for (name, _), followed in zip(prompt.instructions, each["strict"], strict=True):
            by_name[name].append(followed)
    for name, rows in (("by_instruction", by_name), ("by_language", by_language)):
        found[name] = {key: rate(verdicts) for key, verdicts in sorted(rows.items())}
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
