"""A small world of facts in two languages: what the demo's base model reads, and what the tuned model is asked.

    world.tsv     Germany  Berlin  Europe  German  euro    Almanya  Berlin  Avrupa  Almanca  avro
    an article    "People in Germany speak German. In Europe lies Germany. ..."    all four facts, paraphrased, shuffled
    a question    "What is the capital of Germany?"  ->  "The capital of Germany is Berlin."

The base model reads articles about every country; the questions used for fine-tuning are about half of the countries
only. So a right answer about the other half is a fact that was seen as plain text and never as an answer. That a
model can bring out such facts hangs on the paraphrases: knowledge stored in one wording only is hard to extract
(Allen-Zhu and Li, "Physics of Language Models, part 3.1", 2023). Hence articles in many wordings and orders.

The table holds the members of the United Nations but three, whose capital is disputed, moving or undefined (Israel,
Equatorial Guinea, Nauru); continents follow the UN's geoscheme (M49); of several languages or currencies one stands.
Turkish hangs suffixes that depend on the last vowel on a name ("Berlin'de", "Roma'da"): the Turkish sentences carry
every suffix on a word of their own ("Almanya adlı ülkede"), so that each is right for any country. No sentence begins
with a name: at the start of a text a word has no leading space, so " Germany" and "Germany" would be different tokens,
and what the articles tell of the one would not be known of the other.

Everything here is a pure function of its arguments, the seed among them.
"""

import csv
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WORLD = Path(__file__).with_name("world.tsv")
FACTS = ("capital", "continent", "language", "currency")
Names = dict[str, str]  # {"country": "Germany", "capital": "Berlin", "continent": "Europe", ...} in one language


@dataclass(frozen=True)
class Wording:
    """How one fact is told and asked in one language. The first statement is also the one expected as an answer."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


ENGLISH = {
    "capital": Wording(
        statements=(
            "The capital of {country} is {capital}.",
            "The city of {capital} is the capital of {country}.",
            "In {country} the capital is {capital}.",
            "As its capital {country} has {capital}.",
            "The capital city of {country} is called {capital}.",
        ),
        questions=(
            "What is the capital of {country}?",
            "Name the capital of {country}.",
        ),
    ),
    "continent": Wording(
        statements=(
            "On the map {country} lies in {continent}.",
            "In {continent} lies {country}.",
            "The country of {country} belongs to {continent}.",
            "One of the countries of {continent} is {country}.",
            "To see {country} one travels to {continent}.",
        ),
        questions=(
            "On which continent does {country} lie?",
            "Name the continent of {country}.",
        ),
    ),
    "language": Wording(
        statements=(
            "People in {country} speak {language}.",
            "In {country} one hears {language}.",
            "The {language} language is spoken in {country}.",
            "Many songs of {country} are in {language}.",
            "Schools in {country} teach {language}.",
        ),
        questions=(
            "Which language do people in {country} speak?",
            "Name the language of {country}.",
        ),
    ),
    "currency": Wording(
        statements=(
            "The currency of {country} is the {currency}.",
            "In {country} people pay with the {currency}.",
            "The {currency} is the money of {country}.",
            "Prices in {country} are in the {currency}.",
            "Shops in {country} take the {currency}.",
        ),
        questions=(
            "What is the currency of {country}?",
            "Name the currency of {country}.",
        ),
    ),
}

TURKISH = {
    "capital": Wording(
        statements=(
            "Bugün {country} adlı ülkenin başkenti {capital} şehridir.",
            "Güzel {capital} şehri {country} adlı ülkenin başkentidir.",
            "Başkent olarak {country} için {capital} seçilmiştir.",
            "Başkenti {capital} olan ülke {country} adını taşır.",
            "Başkent sorulunca {country} için {capital} denir.",
        ),
        questions=(
            "Hangi şehir {country} adlı ülkenin başkentidir?",
            "Başkent sorulunca {country} için ne denir?",
        ),
    ),
    "continent": Wording(
        statements=(
            "Haritada {country} adlı ülke {continent} kıtasında bulunur.",
            "Kıtası {continent} olan ülkelerden biri {country} adını taşır.",
            "Dünyada {country} adlı ülke {continent} kıtasındadır.",
            "Kıta sorulunca {country} için {continent} denir.",
            "Gezginler {country} için {continent} kıtasına gider.",
        ),
        questions=(
            "Hangi kıtada {country} adlı ülke bulunur?",
            "Kıta sorulunca {country} için ne denir?",
        ),
    ),
    "language": Wording(
        statements=(
            "Halk {country} adlı ülkede {language} konuşur.",
            "Dili {language} olan ülkelerden biri {country} adını taşır.",
            "Gezginler {country} adlı ülkede {language} duyar.",
            "Okullar {country} adlı ülkede {language} öğretir.",
            "Dil sorulunca {country} için {language} denir.",
        ),
        questions=(
            "Hangi dil {country} adlı ülkede konuşulur?",
            "Dil sorulunca {country} için ne denir?",
        ),
    ),
    "currency": Wording(
        statements=(
            "Para olarak {country} adlı ülkede {currency} kullanılır.",
            "Parası {currency} olan ülkelerden biri {country} adını taşır.",
            "Alışveriş {country} adlı ülkede {currency} ile yapılır.",
            "Gezginler {country} adlı ülkede {currency} harcar.",
            "Para sorulunca {country} için {currency} denir.",
        ),
        questions=(
            "Hangi para {country} adlı ülkede kullanılır?",
            "Para sorulunca {country} için ne denir?",
        ),
    ),
}

LANGUAGES = {"en": ENGLISH, "tr": TURKISH}


def load_world() -> list[dict[str, Names]]:
    """The countries in the table's order, each as {"en": names, "tr": names}."""
    with WORLD.open(encoding="utf-8", newline="") as table:
        rows = list(csv.reader(table, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    fields = ("country", *FACTS)
    return [
        {"en": dict(zip(fields, row[:5], strict=True)), "tr": dict(zip(fields, row[5:], strict=True))} for row in rows
    ]


def halves(world: list[dict[str, Names]], seed: int) -> tuple[list[dict[str, Names]], list[dict[str, Names]]]:
    """The countries that are asked about in fine-tuning, and the held-out ones, of which only the articles tell."""
    shuffled = random.Random(seed).sample(world, len(world))
    middle = len(world) // 2
    return shuffled[:middle], shuffled[middle:]


def articles(world: list[dict[str, Names]], *, per_country: int, seed: int) -> list[dict[str, str]]:
    """Shuffled {"text": article}: `per_country` different articles for each country in each language.

    An article tells all facts of one country, each in a wording of its own, in an order of its own.
    """
    rng = random.Random(seed)
    texts = []
    for country in world:
        for language, wordings in LANGUAGES.items():
            seen: set[str] = set()
            while len(seen) < per_country:
                facts = rng.sample(FACTS, len(FACTS))
                text = " ".join(rng.choice(wordings[fact].statements).format(**country[language]) for fact in facts)
                if text not in seen:
                    seen.add(text)
                    texts.append({"text": text})
    rng.shuffle(texts)
    return texts


def questions(countries: list[dict[str, Names]], *, per_fact: int, seed: int) -> list[dict[str, str]]:
    """Shuffled {"prompt": question, "completion": answer}: each fact in `per_fact` wordings, in each language.

    The answer is a whole sentence that the articles use as well. A bare "Berlin" would have to be brought out without
    the words that led to it in the articles, which is harder and less reliable.
    """
    rng = random.Random(seed)
    rows = [
        {
            "prompt": question.format(**country[language]),
            "completion": wordings[fact].statements[0].format(**country[language]),
        }
        for country in countries
        for language, wordings in LANGUAGES.items()
        for fact in FACTS
        for question in rng.sample(wordings[fact].questions, per_fact)
    ]
    rng.shuffle(rows)
    return rows


def exact_match(answers: Iterable[str], expected: Iterable[str]) -> float:
    """The share of answers that are the expected sentence, whole and with nothing more than white space around it."""
    hits = [answer.strip() == sentence for answer, sentence in zip(answers, expected, strict=True)]
    return sum(hits) / len(hits)


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line, in UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
