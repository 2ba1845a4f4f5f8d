"""Instructions whose following a program can check: at least 100 words, no commas, all in JSON.

The names, their parameters and their meaning are those of IFEval (Zhou et al. 2023, Instruction-Following Evaluation
for Large Language Models, table 1), so that its public question file can be asked as it is; a few names are added for
Turkish and for openings. Each check is a function of the answer and the language its letters are cased in ("tr" knows
i/İ and ı/I), with the instruction's parameters as keywords. docs/evaluation.md lists where the verdicts differ from
IFEval's own program: keywords are text and never regular expressions, letters may be any character, sentences end by
the rule below, and a language in doubt counts as followed.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from itertools import chain, pairwise
from typing import Any, get_origin

from minisft.errors import SHORT, UserError, printable
from minisft.evaluation.language import check_language, detect, lower

RELATIONS: dict[str, Callable[[int, int], bool]] = {  # "exactly" is ours
    "less than": lambda found, wanted: found < wanted,
    "at least": lambda found, wanted: found >= wanted,
    "exactly": lambda found, wanted: found == wanted,
}
# A full stop after one of these, or after a single capital letter, ends no sentence although a capital may follow.
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "prof", "capt", "lt", "vs", "e.g", "i.e", "doç", "yrd", "örn", "bkz",
                 "m.ö", "m.s", "t.c"}
_CLOSING, _STOPS, _OPENING = "\"'”’»)]*", ".!?…", "(\"'“‘*"
_WORD = re.compile(r"\w")


def words(text: str) -> int:
    """Runs of letters, digits and underscores, as IFEval counts them: "don't" is two."""
    return len(re.findall(r"\w+", text))


def sentences(text: str) -> int:
    """Parts that end with . ! ? or … before a blank, and what remains after the last.

    A full stop ends no sentence after an abbreviation, a single capital ("J. Smith"), or where small letters go on
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
    """How often `keyword` occurs, inside words as well, in any case."""
    return lower(answer, language).count(lower(keyword, language))


def keywords_existence(answer: str, language: str, *, keywords: list[str]) -> bool:
    """All keywords occur."""
    return all(occurrences(keyword, answer, language) for keyword in keywords)


def keywords_frequency(answer: str, language: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs so often."""
    return RELATIONS[relation](occurrences(keyword, answer, language), frequency)


def forbidden_words(answer: str, language: str, *, forbidden_words: list[str]) -> bool:
    """None of the words stands there as a whole word."""
    text = lower(answer, language)
    return not any(re.search(rf"(?<!\w){re.escape(lower(word, language))}(?!\w)", text) for word in forbidden_words)


def letter_frequency(answer: str, language: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The letter, which may be any character, occurs so often."""
    return RELATIONS[let_relation](occurrences(letter, answer, language), let_frequency)


def response_language(answer: str, _: str, *, language: str) -> bool:
    """The answer is in the language, or may be."""
    return language in detect(answer)


def number_sentences(answer: str, _: str, *, num_sentences: int, relation: str) -> bool:
    """So many sentences."""
    return RELATIONS[relation](sentences(answer), num_sentences)


def number_paragraphs(answer: str, _: str, *, num_paragraphs: int) -> bool:
    """Paragraphs between the divider ***; only the first and the last may be empty, and do not count then."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def number_words(answer: str, _: str, *, num_words: int, relation: str) -> bool:
    """So many words."""
    return RELATIONS[relation](words(answer), num_words)


def nth_paragraph_first_word(answer: str, language: str, *, num_paragraphs: int, nth_paragraph: int,
                             first_word: str) -> bool:
    """Paragraphs between blank lines; the nth of them begins with the word."""
    parts = [part.strip() for part in answer.split("\n\n") if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = re.split(r"[.,?!'\"]", parts[nth_paragraph - 1].split()[0].lstrip("'\""))[0]
    return lower(first, language) == lower(first_word, language)


def number_placeholders(answer: str, _: str, *, num_placeholders: int) -> bool:
    """At least so many [such] pieces."""
    return re.findall(r"\[[^\]\n]*(\]?)", answer).count("]") >= num_placeholders  # without ], none begins in the line


def postscript(answer: str, language: str, *, postscript_marker: str) -> bool:
    """The marker anywhere, in any case; P.S. and P.P.S also with blanks between the letters."""
    spaced = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    marker = spaced.get(postscript_marker) or re.escape(lower(postscript_marker, language))
    return bool(re.search(marker, lower(answer, language)))


def number_bullet_lists(answer: str, _: str, *, num_bullets: int) -> bool:
    """Lines that begin with * (not **) or -."""
    return len(re.findall(r"^[^\S\n]*(?:\*[^*]|-).*$", answer, re.MULTILINE)) == num_bullets


def constrained_response(answer: str, language: str) -> bool:
    """One of the three answers that the instruction allows."""
    if language == "tr":
        return any(option in answer for option in ("Cevabım evet.", "Cevabım hayır.", "Cevabım belki."))
    return any(f"My answer is {option}." in answer for option in ("yes", "no", "maybe"))


def number_highlighted_sections(answer: str, _: str, *, num_highlights: int) -> bool:
    """*Such* pieces of a line and **such** ones; of the stars of **such** pairs none is counted as a piece."""
    single = re.findall(r"\*[^\n*]*\*", answer)
    double = re.findall(r"\*\*[^\n*]*\*\*", answer)
    return sum(bool(found.strip("*").strip()) for found in single + double) >= num_highlights


def multiple_sections(answer: str, _: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings such as "Section 1"."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", answer)) >= num_sections


def json_format(answer: str, _: str) -> bool:
    """JSON, alone or within a fence of backquotes."""
    bare = re.sub(r"\A```(?:json|Json|JSON)?|```\Z", "", answer.strip())
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def title(answer: str, _: str) -> bool:
    """A title in <<such>> brackets, in one line."""
    lines = [line[line.find("<<") : line.rfind(">>") + 2] for line in answer.split("\n") if "<<" in line]
    return any(line.lstrip("<").rstrip(">").strip() for line in lines)


def two_responses(answer: str, _: str) -> bool:
    """Two different texts with ****** between them; ****** may also stand before the first and after the last."""
    parts = [part.strip() for part in answer.split("******")]
    found = [part for part in parts if part]
    return all(parts[1:-1]) and len(found) == 2 and found[0] != found[1]


def repeat_prompt(answer: str, language: str, *, prompt_to_repeat: str) -> bool:
    """The prompt is said again first, in any case."""
    return lower(answer.strip(), language).startswith(lower(prompt_to_repeat.strip(), language))


def start_checker(answer: str, language: str, *, start_phrase: str) -> bool:
    """The phrase begins the answer, in any case; quotation marks around it all do not count."""
    return lower(answer.strip().strip('"'), language).startswith(lower(start_phrase.strip(), language))


def end_checker(answer: str, language: str, *, end_phrase: str) -> bool:
    """The phrase ends the answer, as above."""
    return lower(answer.strip().strip('"'), language).endswith(lower(end_phrase.strip(), language))


def capital_word_frequency(answer: str, _: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Words without a small letter; hyphens and apostrophes belong to a word: "COVID-19" is one, and so is "I"."""
    found = [word for word in re.findall(r"\w+(?:[-'’./]\w+)*", answer) if word.isupper()]
    return RELATIONS[capital_relation](len(found), capital_frequency)


def english_capital(answer: str, _: str) -> bool:
    """English without a small letter."""
    return answer.isupper() and "en" in detect(answer)


def english_lowercase(answer: str, _: str) -> bool:
    """English without a capital letter."""
    return answer.islower() and "en" in detect(answer)


def turkish_capital(answer: str, _: str) -> bool:
    """Turkish without a small letter."""
    return answer.isupper() and "tr" in detect(answer)


def turkish_lowercase(answer: str, _: str) -> bool:
    """As above; an i with a combining dot is what İ becomes where a program did not know that the text is Turkish."""
    return answer.islower() and "i\u0307" not in answer and "tr" in detect(answer)


def no_comma(answer: str, _: str) -> bool:
    """Not one comma."""
    return "," not in answer


def quotation(answer: str, _: str) -> bool:
    """All of it stands between double quotation marks."""
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:start_checker": start_checker,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "change_case:turkish_capital": turkish_capital,
    "change_case:turkish_lowercase": turkish_lowercase,
    "punctuation:no_comma": no_comma,
}


def parameters(instruction: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parameters of `instruction` among `given`, without those that are null; UserError for any that is wrong."""
    given = {name: value for name, value in given.items() if value is not None}
    takes = {name: get_origin(parameter.annotation) or parameter.annotation  # list[str] -> list
             for name, parameter in inspect.signature(CHECKS[instruction]).parameters.items()
             if parameter.kind is parameter.KEYWORD_ONLY}
    if given.keys() != takes.keys():
        raise UserError(f"{where}: {instruction} takes {', '.join(takes) or 'no parameters'}; "
                        f"found {printable(', '.join(given)) or 'none'}")
    for name, kind in takes.items():
        value = given[name]
        if kind is int and isinstance(value, float) and value.is_integer():
            given[name] = value = int(value)
        if type(value) is not kind or (kind is str and not value.strip()) or (
                kind is list and not (value and all(isinstance(item, str) and item.strip() for item in value))):
            wanted = {int: "a whole number", str: "text", list: "a list of texts"}[kind]
            raise UserError(f"{where}: {instruction}: {name} must be {wanted}, not {SHORT.repr(value)}")
        if name.endswith("relation") and value not in RELATIONS:
            raise UserError(f"{where}: {instruction}: {name} must be one of {', '.join(RELATIONS)}, not "
                            f"{SHORT.repr(value)}")
        if name == "language":
            check_language(value, f"{where}: {instruction}")
    return given
