"""A small world of facts in two languages: what the demo's base model reads, and what the tuned model is asked.

    world.tsv     Germany  Berlin  Europe  German  euro    Almanya  Almanya'da  Almanya'nın  Berlin  Avrupa  ...
    an article    "People in Germany speak German. In Europe lies Germany. ..."    all four facts, paraphrased, shuffled
    a question    "What is the capital of Germany?"  ->  "The capital of Germany is Berlin."

The base model reads articles about every country; the questions used for fine-tuning are about half of them. So a
right answer about the other half is a fact that was seen as plain text and never as an answer. A model can recall such
facts only if it has read them in many wordings and orders, because knowledge stored in one wording is hard to extract
(Allen-Zhu and Li, "Physics of Language Models, part 3.1", 2023).

The table holds the members of the United Nations except four. The capital of three is disputed, moving or undefined
(Israel, Equatorial Guinea, Nauru); naming one language of Cyprus would take sides. Continents follow the UN's geoscheme
(M49); if a country has several languages or currencies, the table has one. wordings.toml has the sentences.

Everything here is a pure function of its arguments, including the seed.
"""

import csv
import random
import tomllib
from collections.abc import Iterable
from pathlib import Path

WORLD = Path(__file__).with_name("world.tsv")
FACTS = ("capital", "continent", "language", "currency")
# language -> fact -> "statements" and "questions"
LANGUAGES = tomllib.loads(WORLD.with_name("wordings.toml").read_text(encoding="utf-8"))

Names = dict[str, str]  # {"country": "Germany", "capital": "Berlin", "continent": "Europe", ...} in one language
NAMES = {"en": ("country", *FACTS), "tr": ("country", "country_loc", "country_gen", *FACTS)}  # the table's columns


def load_world() -> list[dict[str, Names]]:
    """The countries in the table's order, each as {"en": names, "tr": names}."""
    with WORLD.open(encoding="utf-8", newline="") as table:
        _, *rows = csv.reader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [{"en": dict(zip(NAMES["en"], row[:5], strict=True)), "tr": dict(zip(NAMES["tr"], row[5:], strict=True))}
            for row in rows]


def halves(world: list[dict[str, Names]], seed: int) -> tuple[list[dict[str, Names]], list[dict[str, Names]]]:
    """The countries that fine-tuning asks about, and the held-out ones, which only the articles mention."""
    shuffled = random.Random(seed).sample(world, len(world))
    return shuffled[: len(world) // 2], shuffled[len(world) // 2 :]


def articles(world: list[dict[str, Names]], *, per_country: int, seed: int) -> list[dict[str, str]]:
    """Shuffled {"text": article}: `per_country` different articles for each country in each language.

    An article tells all facts of one country in random wordings and order.
    """
    rng, texts = random.Random(seed), []
    for country in world:
        for language, wordings in LANGUAGES.items():
            different: dict[str, None] = {}  # an ordered set
            while len(different) < per_country:
                different[" ".join(rng.choice(wordings[fact]["statements"]).format(**country[language])
                                   for fact in rng.sample(FACTS, len(FACTS)))] = None
            texts += [{"text": text} for text in different]
    rng.shuffle(texts)
    return texts


def questions(countries: list[dict[str, Names]], *, per_fact: int, seed: int) -> list[dict[str, str]]:
    """Shuffled {"prompt": question, "completion": answer}: each fact in `per_fact` wordings, in each language.

    The answer is a whole sentence that the articles use as well. A bare "Berlin" would have to be recalled without the
    words that lead to it in the articles, which is harder and less reliable.
    """
    rng = random.Random(seed)
    rows = [{"prompt": question.format(**country[language]),
             "completion": wordings[fact]["statements"][0].format(**country[language])}
            for country in countries for language, wordings in LANGUAGES.items() for fact in FACTS
            for question in rng.sample(wordings[fact]["questions"], per_fact)]
    rng.shuffle(rows)
    return rows


def exact_match(answers: Iterable[str], expected: Iterable[str]) -> float:
    """The share of answers that are exactly the expected sentence, except for white space around it."""
    hits = [answer.strip() == sentence for answer, sentence in zip(answers, expected, strict=True)]
    return sum(hits) / len(hits)
