"""Which language a text is in, roughly, and letters in upper and lower case as Turkish has them.

Detection looks at the script first and, where several languages of languages.toml share one, counts words: a function
word of a language is a point for it, and so is a word with a letter that only this language has. The most points win;
none, or as many for two, is doubt. It is honest about longer text in the languages of that table and knows no others:
Danish looks like Swedish to it, and one word alone is mostly doubt.

Unicode's case mapping is right for every language here but Turkish, whose i keeps its dot in both cases:

    Turkish  i İ   ı I        "KIRMIZI ŞİŞE" <-> "kırmızı şişe"
    others   i I              "İ".lower() is even two characters, i and a combining dot
"""

import re
import tomllib
import unicodedata
from collections import Counter
from functools import cache
from importlib.resources import files

from minisft.errors import UserError, printable

_BETWEEN_WORDS = re.compile(r"[\s\d.,;:!?…\"'’‘“”«»()\[\]{}<>*_#/|`~+=।؟،؛—–-]+")


def lower(text: str, language: str) -> str:
    """`text` in lower case, where Turkish ("tr") has I -> ı and İ -> i."""
    return (text.replace("I", "ı").replace("İ", "i") if language == "tr" else text).lower()


def upper(text: str, language: str) -> str:
    """`text` in upper case, where Turkish ("tr") has i -> İ."""
    return (text.replace("i", "İ") if language == "tr" else text).upper()


@cache
def languages() -> dict[str, str]:
    """code -> script of each language that can be told."""
    return {code: script for script, codes in _table().items() for code in codes}


def check_language(code: str, where: str) -> str:
    """`code`, or UserError where it is not one of the table's."""
    if code not in languages():
        raise UserError(f"{where}: no language {printable(repr(code))} can be told here; choose from "
                        f"{', '.join(sorted(languages()))}")
    return code


def detect(text: str) -> set[str]:
    """The languages that `text` may be in, by code: one; several in doubt, all of its script; none without letters.

    detect("Bu bir deneme.") -> {"tr"}; detect("Ankara") -> {"en", "tr", "de", ...}; detect("42") -> set()
    """
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    if scripts["HIRAGANA"]:
        scripts["HIRAGANA"] += scripts.pop("CJK", 0) + scripts.pop("KATAKANA", 0)  # Japanese mixes three
    if not scripts:
        return set()
    known = _table().get(scripts.most_common(1)[0][0], {})
    points = {code: _points(text, code, *signs) for code, signs in known.items()}
    most = max(points.values(), default=0)
    best = {code for code, count in points.items() if count == most}
    return best if most and len(best) == 1 else set(known)


def _points(text: str, code: str, words: frozenset[str], letters: frozenset[str]) -> int:
    found = [word for word in _BETWEEN_WORDS.split(text) if word]
    # Turkish lower case would put an ı into THIS: letters count as they stand, words as the language writes them.
    return sum((lower(word, code) in words) + (not letters.isdisjoint(word + word.lower())) for word in found)


@cache
def _table() -> dict[str, dict[str, tuple[frozenset[str], frozenset[str]]]]:
    """script -> code -> function words, letters of its own."""
    text = files("minisft.evaluation").joinpath("languages.toml").read_text(encoding="utf-8")
    return {script: {code: (frozenset(signs.get("words", "").split()), frozenset(signs.get("letters", "")))
                     for code, signs in codes.items()} for script, codes in tomllib.loads(text).items()}


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
