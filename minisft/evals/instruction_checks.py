"""Instructions that a program can check: at least 100 words, no commas, all in JSON.

Names, parameters and meaning are those of IFEval (Zhou et al. 2023, Instruction-Following Evaluation for Large Language
Models, table 1), so its public question file works as it is. A few names are added for Turkish and for openings. A
check is a function of the answer and of the language whose case rules apply ("tr" knows i/İ and ı/I), with the
instruction's parameters as keywords. docs/evaluation.md lists where verdicts differ from IFEval's own program: keywords
are text and never regular expressions, letters may be any character, sentences end by the rule below, and a language in
doubt counts as followed.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from itertools import chain, pairwise
from operator import eq, ge, lt
from typing import Any

from minisft.errors import SHORT, UserError, printable
from minisft.evals.language import check_language, detect, lower

RELATIONS: dict[str, Callable[[int, int], bool]] = {"less than": lt, "at least": ge, "exactly": eq}  # "exactly" is ours
# A full stop after one of these, or after a single capital letter, ends no sentence even if a capital follows.
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "prof", "capt", "lt", "vs", "e.g", "i.e", "doç", "yrd", "örn", "bkz",
                 "m.ö", "m.s", "t.c"}
_CLOSING, _STOPS, _OPENING = "\"'”’»)]*", ".!?…", "(\"'“‘*"
_WORD = re.compile(r"\w")
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}  # blanks may stand between the letters
_CONSTRAINED = {"en": ("My answer is yes.", "My answer is no.", "My answer is maybe."),
                "tr": ("Cevabım evet.", "Cevabım hayır.", "Cevabım belki.")}


def sentences(text: str) -> int:
    """The number of parts that end with . ! ? or … before a blank, and of what remains after the last.

    A full stop ends no sentence after an abbreviation, after a single capital ("J. Smith"), or before a small letter
    ("3. sınıf", "e.g. this").
    """
    count, start = 0, 0
    for run, after in pairwise(chain(re.finditer(r"\S+", text), [None])):
        assert run
        unclosed = run[0].rstrip(_CLOSING)
        before, rest = unclosed.rstrip(_STOPS), after[0] if after else ""
        last, plain = before.strip(_OPENING), "!" not in run[0] and "?" not in run[0]
        inside = rest[:1].islower() or lower(last, "en") in ABBREVIATIONS or (len(last) == 1 and last.isupper())
        if before != unclosed and not (plain and rest and inside):
            count, start = count + bool(_WORD.search(text, start, run.end())), run.end()
    return count + bool(_WORD.search(text, start))


def occurrences(keyword: str, answer: str, language: str) -> int:
    """How often `keyword` occurs, also inside words, in any case."""
    return lower(answer, language).count(lower(keyword, language))


def _lacks_words(answer: str, language: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a whole word."""
    text = lower(answer, language)
    return not any(re.search(rf"(?<!\w){re.escape(lower(word, language))}(?!\w)", text) for word in forbidden_words)


def _between(answer: str, divider: str) -> list[str]:
    """The texts between dividers. None if one is empty, except that dividers may also begin and end the answer."""
    parts = [part.strip() for part in re.split(divider, answer)]
    return [part for part in parts if part] if all(parts[1:-1]) else []


def _has_first_word(answer: str, language: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Blank lines stand between these paragraphs."""
    parts = [part.strip() for part in answer.split("\n\n") if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = re.split(r"[.,?!'\"]", parts[nth_paragraph - 1].split()[0].lstrip("'\""))[0]
    return lower(first, language) == lower(first_word, language)


def _has_highlights(answer: str, _: str, *, num_highlights: int) -> bool:
    """Pieces of a line marked *so* or **so**; two stars with nothing between them are none."""
    pieces = re.findall(r"\*[^\n*]*\*", answer) + re.findall(r"\*\*[^\n*]*\*\*", answer)
    return sum(bool(piece.strip("*").strip()) for piece in pieces) >= num_highlights


def _is_json(answer: str, _: str) -> bool:
    """JSON, alone or fenced with backquotes."""
    try:
        json.loads(re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", answer.strip()))
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(answer: str, _: str) -> bool:
    """A title in <<such>> brackets, on one line."""
    lines = [line[line.find("<<") : line.rfind(">>") + 2] for line in answer.split("\n") if "<<" in line]
    return any(line.lstrip("<").rstrip(">").strip() for line in lines)


def _cased(is_cased: Callable[[str], bool], code: str) -> Callable[[str, str], bool]:
    """A check for text in one language and one case."""
    # i with a combining dot is no Turkish letter; it is what İ becomes if a program does not know the language.
    return lambda answer, _: is_cased(answer) and code in detect(answer) and (code != "tr" or "i\u0307" not in answer)


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda answer, language, *, keywords: all(
        occurrences(keyword, answer, language) for keyword in keywords),
    "keywords:frequency": lambda answer, language, *, keyword, frequency, relation: RELATIONS[relation](
        occurrences(keyword, answer, language), frequency),
    "keywords:forbidden_words": _lacks_words,
    "keywords:letter_frequency": lambda answer, language, *, letter, let_frequency, let_relation: (
        RELATIONS[let_relation](occurrences(letter, answer, language), let_frequency)),
    "language:response_language": lambda answer, _, *, language: language in detect(answer),
    "length_constraints:number_sentences": lambda answer, _, *, num_sentences, relation: RELATIONS[relation](
        sentences(answer), num_sentences),
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
    "detectable_format:number_highlighted_sections": _has_highlights,
    # Headings such as "Section 1".
    "detectable_format:multiple_sections": lambda answer, _, *, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", answer)) >= num_sections),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _has_title,
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
    given = {name: value for name, value in given.items() if value is not None}
    takes = [name for name, parameter in inspect.signature(CHECKS[instruction]).parameters.items()
             if parameter.kind is parameter.KEYWORD_ONLY]
    if given.keys() != set(takes):
        raise UserError(f"{where}: {instruction} takes {', '.join(takes) or 'no parameters'}; "
                        f"found {printable(', '.join(given)) or 'none'}")
    for name in takes:
        value = given[name]
        if name in ("keywords", "forbidden_words"):
            wanted = "a list of texts"
            fits = isinstance(value, list) and value != [] and all(map(_is_text, value))
        elif name.startswith(("num_", "nth_")) or name.endswith("frequency"):
            given[name] = value = int(value) if isinstance(value, float) and value.is_integer() else value
            wanted, fits = "a whole number", type(value) is int
        else:
            wanted, fits = "text", _is_text(value)
        if not fits:
            raise UserError(f"{where}: {instruction}: {name} must be {wanted}, not {SHORT.repr(value)}")
        if name.endswith("relation") and value not in RELATIONS:
            raise UserError(f"{where}: {instruction}: {name} must be one of {', '.join(RELATIONS)}, not "
                            f"{SHORT.repr(value)}")
        if name == "language":
            check_language(value, f"{where}: {instruction}")
    return given


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
