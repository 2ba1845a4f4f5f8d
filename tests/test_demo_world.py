"""The demo's world: the facts are complete, the halves are apart, and what is asked was told."""

import csv
import json
import re

import pytest
from tokenizers import Tokenizer

from minisft.demo.bpe import SPECIAL_TOKENS, train_tokenizer
from minisft.demo.world import (
    FACTS,
    LANGUAGES,
    WORLD,
    articles,
    exact_match,
    halves,
    load_world,
    questions,
    write_jsonl,
)


@pytest.fixture(scope="module")
def world():
    return load_world()


def test_table_is_complete_and_clean():
    rows = list(csv.reader(WORLD.open(encoding="utf-8", newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 191
    for row in rows:
        assert len(row) == 10
        for cell in row:
            assert re.fullmatch(r"[\w'-]+( [\w'-]+)*", cell), row  # ASCII apostrophes, single spaces, no other marks
    for country_column in (0, 5):
        assert len({row[country_column] for row in rows}) == len(rows)


def test_both_languages_group_the_world_alike(world):
    """Two countries share a continent, language or currency in English just where they do in Turkish."""
    for fact in ("continent", "language", "currency"):
        pairs = {(country["en"][fact], country["tr"][fact]) for country in world}
        assert len(pairs) == len({en for en, _ in pairs}) == len({tr for _, tr in pairs}), fact
    assert {country["en"]["continent"] for country in world} == {
        "Africa", "Asia", "Europe", "North America", "South America", "Oceania",
    }  # fmt: skip


def test_known_facts(world):
    germany = next(country for country in world if country["en"]["country"] == "Germany")
    assert germany["tr"] == {
        "country": "Almanya", "capital": "Berlin", "continent": "Avrupa", "language": "Almanca", "currency": "avro",
    }  # fmt: skip


def test_no_sentence_begins_with_a_name():
    """A name there would be another token than inside a sentence, where a space precedes it."""
    for wordings in LANGUAGES.values():
        for fact in FACTS:
            sentences = wordings[fact]["statements"] + wordings[fact]["questions"]
            assert len(set(sentences)) == len(sentences) == 7
            assert all(re.match(r"[A-ZÇĞİÖŞÜ][^{]* \{", sentence) for sentence in sentences)


def test_halves_are_disjoint_cover_the_world_and_depend_on_the_seed(world):
    tuned, held_out = ([c["en"]["country"] for c in half] for half in halves(world, 0))
    assert len(tuned) == len(held_out) == 95
    assert sorted(tuned + held_out) == sorted(c["en"]["country"] for c in world)
    assert halves(world, 0) == halves(world, 0) != halves(world, 1)


def test_articles_tell_every_fact_once_in_different_wordings(world):
    texts = [row["text"] for row in articles(world, per_country=6, seed=3)]
    assert len(texts) == len(set(texts)) == 190 * 2 * 6
    assert articles(world, per_country=6, seed=3) == articles(world, per_country=6, seed=3)
    assert articles(world, per_country=6, seed=3) != articles(world, per_country=6, seed=4)
    for country in world[::10]:
        for text in (row["text"] for row in articles([country], per_country=6, seed=3)):
            assert any(all(name in text for name in country[language].values()) for language in LANGUAGES), text


def test_every_held_out_answer_stands_in_some_article_and_in_no_training_question(world):
    tuned, held_out = halves(world, 0)
    told = {
        sentence for row in articles(world, per_country=40, seed=0) for sentence in re.split(r"(?<=\.) ", row["text"])
    }
    asked = questions(held_out, per_fact=1, seed=0)
    assert len(asked) == 95 * 2 * len(FACTS)
    assert all(row["completion"] in told for row in asked)
    trained = questions(tuned, per_fact=2, seed=0)
    assert len(trained) == 95 * 2 * len(FACTS) * 2 == len({row["prompt"] for row in trained})
    assert not {row["prompt"] for row in asked} & {row["prompt"] for row in trained}
    assert not {row["completion"] for row in asked} & {row["completion"] for row in trained}


def test_exact_match_wants_the_whole_sentence_and_nothing_else():
    expected = ["The capital of Germany is Berlin."] * 4
    answers = ["The capital of Germany is Berlin.\n", "Berlin.", "The capital of Germany is Berlin. It", ""]
    assert exact_match(answers, expected) == 0.25


def test_jsonl_keeps_turkish_letters(tmp_path, world):
    rows = questions(world[:2], per_fact=2, seed=1)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    written = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in written.splitlines()] == rows
    assert "başkent" in written


def test_tokenizer_round_trips_any_text_is_deterministic_and_has_the_special_tokens_last(tmp_path, world):
    texts = [row["text"] for row in articles(world, per_country=2, seed=0)]
    train_tokenizer(texts, 800, tmp_path / "a")
    train_tokenizer(texts, 800, tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    tokenizer = Tokenizer.from_file(str(tmp_path / "a/tokenizer.json"))
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [795, 796, 797, 798, 799]
    for text in ("Türkiye, İsviçre; N'Djamena?  \n\n 12345 \t", "\u2028 漢字 🙂", texts[0]):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    config = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|end_of_text|>"
