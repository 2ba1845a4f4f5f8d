"""A small world of facts in two languages: what the demo's base model reads, and what the tuned model is asked.

    world.tsv     Germany  Berlin  Europe  German  euro    Almanya  Berlin  Avrupa  Almanca  avro
    an article    "People in Germany speak German. In Europe lies Germany. ..."    all four facts, paraphrased, shuffled
    a question    "What is the capital of Germany?"  ->  "The capital of Germany is Berlin."

The base model reads articles about every country; the questions used for fine-tuning are about half of them. So a
right answer about the other half is a fact that was seen as plain text and never as an answer. A model can recall such
facts only if it has read them in many wordings and orders, because knowledge stored in one wording is hard to extract
(Allen-Zhu and Li, "Physics of Language Models, part 3.1", 2023).

The table holds the members of the United Nations except three, whose capital is disputed, moving or undefined (Israel,
Equatorial Guinea, Nauru); continents follow the UN's geoscheme (M49); if a country has several languages or currencies,
the table has one. Turkish attaches suffixes to a name that depend on its last vowel ("Berlin'de", "Roma'da"): the
Turkish sentences put every suffix on a word of their own ("Almanya adlı ülkede"), so each is right for any country. No
sentence begins with a name: at the start of a text a word has no leading space, so " Germany" and "Germany" would be
different tokens, and what the articles tell about one would not be known of the other.

Everything here is a pure function of its arguments, including the seed.
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
    """How to tell and ask one fact in one language. The first statement is also the expected answer."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


ENGLISH = {
    "capital": Wording(
        ("The capital of {country} is {capital}.", "The city of {capital} is the capital of {country}.",
         "In {country} the capital is {capital}.", "As its capital {country} has {capital}.",
         "The capital city of {country} is called {capital}."),
        ("What is the capital of {country}?", "Name the capital of {country}.")),
    "continent": Wording(
        ("On the map {country} lies in {continent}.", "In {continent} lies {country}.",
         "The country of {country} belongs to {continent}.", "One of the countries of {continent} is {country}.",
         "To see {country} one travels to {continent}."),
        ("On which continent does {country} lie?", "Name the continent of {country}.")),
    "language": Wording(
        ("People in {country} speak {language}.", "In {country} one hears {language}.",
         "The {language} language is spoken in {country}.", "Many songs of {country} are in {language}.",
         "Schools in {country} teach {language}."),
        ("Which language do people in {country} speak?", "Name the language of {country}.")),
    "currency": Wording(
        ("The currency of {country} is the {currency}.", "In {country} people pay with the {currency}.",
         "The {currency} is the money of {country}.", "Prices in {country} are in the {currency}.",
         "Shops in {country} take the {currency}."),
        ("What is the currency of {country}?", "Name the currency of {country}.")),
}
TURKISH = {
    "capital": Wording(
        ("Bugün {country} adlı ülkenin başkenti {capital} şehridir.",
         "Güzel {capital} şehri {country} adlı ülkenin başkentidir.",
         "Başkent olarak {country} için {capital} seçilmiştir.", "Başkenti {capital} olan ülke {country} adını taşır.",
         "Başkent sorulunca {country} için {capital} denir."),
        ("Hangi şehir {country} adlı ülkenin başkentidir?", "Başkent sorulunca {country} için ne denir?")),
    "continent": Wording(
        ("Haritada {country} adlı ülke {continent} kıtasında bulunur.",
         "Kıtası {continent} olan ülkelerden biri {country} adını taşır.",
         "Dünyada {country} adlı ülke {continent} kıtasındadır.", "Kıta sorulunca {country} için {continent} denir.",
         "Gezginler {country} için {continent} kıtasına gider."),
        ("Hangi kıtada {country} adlı ülke bulunur?", "Kıta sorulunca {country} için ne denir?")),
    "language": Wording(
        ("Halk {country} adlı ülkede {language} konuşur.",
         "Dili {language} olan ülkelerden biri {country} adını taşır.",
         "Gezginler {country} adlı ülkede {language} duyar.", "Okullar {country} adlı ülkede {language} öğretir.",
         "Dil sorulunca {country} için {language} denir."),
        ("Hangi dil {country} adlı ülkede konuşulur?", "Dil sorulunca {country} için ne denir?")),
    "currency": Wording(
        ("Para olarak {country} adlı ülkede {currency} kullanılır.",
         "Parası {currency} olan ülkelerden biri {country} adını taşır.",
         "Alışveriş {country} adlı ülkede {currency} ile yapılır.",
         "Gezginler {country} adlı ülkede {currency} harcar.", "Para sorulunca {country} için {currency} denir."),
        ("Hangi para {country} adlı ülkede kullanılır?", "Para sorulunca {country} için ne denir?")),
}

LANGUAGES = {"en": ENGLISH, "tr": TURKISH}


def load_world() -> list[dict[str, Names]]:
    """The countries in the table's order, each as {"en": names, "tr": names}."""
    with WORLD.open(encoding="utf-8", newline="") as table:
        rows = list(csv.reader(table, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    names = ("country", *FACTS)
    return [{"en": dict(zip(names, row[:5], strict=True)), "tr": dict(zip(names, row[5:], strict=True))}
            for row in rows]


def halves(world: list[dict[str, Names]], seed: int) -> tuple[list[dict[str, Names]], list[dict[str, Names]]]:
    """The countries that fine-tuning asks about, and the held-out ones, which only the articles mention."""
    shuffled = random.Random(seed).sample(world, len(world))
    middle = len(world) // 2
    return shuffled[:middle], shuffled[middle:]


def articles(world: list[dict[str, Names]], *, per_country: int, seed: int) -> list[dict[str, str]]:
    """Shuffled {"text": article}: `per_country` different articles for each country in each language.

    An article tells all facts of one country in random wordings and order.
    """
    rng, texts = random.Random(seed), []
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

    The answer is a whole sentence that the articles use as well. A bare "Berlin" would have to be recalled without the
    words that lead to it in the articles, which is harder and less reliable.
    """
    rng = random.Random(seed)
    rows = [{"prompt": question.format(**country[language]),
             "completion": wordings[fact].statements[0].format(**country[language])}
            for country in countries for language, wordings in LANGUAGES.items() for fact in FACTS
            for question in rng.sample(wordings[fact].questions, per_fact)]
    rng.shuffle(rows)
    return rows


def exact_match(answers: Iterable[str], expected: Iterable[str]) -> float:
    """The share of answers that are exactly the expected sentence, except for white space around it."""
    hits = [answer.strip() == sentence for answer, sentence in zip(answers, expected, strict=True)]
    return sum(hits) / len(hits)


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object a line, in UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
