"""Rough detection of a text's language, Turkish lower case, and capitals that lost their dots.

Detection looks at the script first. If several languages of languages.toml share it, words decide: a function word of a
language is a point for it, and so is a word with a letter that only this language has. The most points win; no points
or a tie mean doubt. It knows no other languages: it takes Danish for Swedish, and a single word is mostly in doubt.

Unicode's case mapping is right for all of them except Turkish, whose i keeps its dot in both cases: i İ, ı I.
"""

import re
import tomllib
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

from minisft.errors import UserError, printable

_UNHARMONIC = re.compile(r"[eiöüî][^aeıioöuüâîû]*ı")  # no suffix and no root is like that, but these compounds are:
_SEAMS = re.compile(r"yıl|ışı[kğ]ı|ırma[kğ]")  # binyıl, günışığı, Yeşilırmak
_BETWEEN_WORDS = re.compile(r"[\s\d.,;:!?…\"'’‘“”«»()\[\]{}<>*_#/|`~+=।؟،؛—–-]+")


def lower(text: str, language: str) -> str:
    """`text` composed (NFC) and in lower case; in Turkish ("tr") I becomes ı and İ becomes i."""
    text = unicodedata.normalize("NFC", text)
    return (text.replace("I", "ı").replace("İ", "i") if language == "tr" else text).lower()


@cache
def languages() -> dict[str, dict[str, tuple[frozenset[str], frozenset[str]]]]:
    """script -> code -> function words, letters of its own."""
    table = tomllib.loads(Path(__file__).with_name("languages.toml").read_text(encoding="utf-8"))
    return {script: {code: (frozenset(signs.get("words", "").split()), frozenset(signs.get("letters", "")))
                     for code, signs in codes.items()} for script, codes in table.items()}


def signs(code: str) -> tuple[frozenset[str], frozenset[str]]:
    """Function words and own letters of the language `code`, which the table has."""
    return next(codes[code] for codes in languages().values() if code in codes)


def check_language(code: str, where: str) -> str:
    """`code`. Raises UserError if the table does not have it."""
    known = {code for codes in languages().values() for code in codes}
    if code not in known:
        raise UserError(f"{where}: cannot detect the language {printable(repr(code))}; choose from "
                        f"{', '.join(sorted(known))}")
    return code


def detect(text: str) -> set[str]:
    """Codes of the languages that `text` may be in. In doubt, all languages of its script; without letters, none.

    detect("Bu bir deneme.") -> {"tr"}; detect("Ankara") -> {"en", "tr", "de", ...}; detect("42") -> set()
    """
    text = unicodedata.normalize("NFC", text)
    scripts = Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    if scripts["HIRAGANA"]:
        scripts["HIRAGANA"] += scripts.pop("CJK", 0) + scripts.pop("KATAKANA", 0)  # Japanese mixes three
    if not scripts:
        return set()
    known = languages().get(scripts.most_common(1)[0][0], {})
    split = [word for word in _BETWEEN_WORDS.split(text) if word]
    # Turkish lower case would put an ı into THIS: letters count as they stand, words as the language writes them.
    points = {code: sum((lower(word, code) in words) + (not letters.isdisjoint(word + word.lower())) for word in split)
              for code, (words, letters) in known.items()}
    best = [code for code, count in points.items() if count == max(points.values())]
    return set(best) if len(best) == 1 and points[best[0]] else set(known)


def lost_dots(text: str) -> bool:
    """True if a word of `text`, which is Turkish, is surely written with I or ı for İ or i: IÇIN, BIR, DEĞIL.

    Sure are function words of the table that are known with i only, and an ı against vowel harmony in a word with ğ, ş
    or İ, which no other language here has. So "LINKEDIN" and "INTERNET" may be names, and "SINIR" is a word both ways.
    """
    words, letters = signs("tr")
    for word in set(_BETWEEN_WORDS.split(unicodedata.normalize("NFC", text))):
        small = lower(word, "tr")
        known = "ı" in small and small not in words and small.replace("ı", "i") in words
        if known or (not (letters - {"ı"}).isdisjoint(word + small) and _UNHARMONIC.search(_SEAMS.sub("", small))):
            return True
    return False
