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
)


@pytest.fixture(scope="module")
def world():
    return load_world()


def test_table_is_complete_and_clean():
    rows = list(csv.reader(WORLD.open(encoding="utf-8", newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 190
    for row in rows:
        assert len(row) == 12
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
        "country": "Almanya", "country_loc": "Almanya'da", "country_gen": "Almanya'nın", "capital": "Berlin",
        "continent": "Avrupa", "language": "Almanca", "currency": "avro",
    }  # fmt: skip


SOUNDS_FRONT = {"Nepal", "Senegal"}  # spoken with a thin l, so a suffix takes a front vowel after their last a
POSSESSIVES = ("Adaları", "Cumhuriyeti", "Devletleri", "Emirlikleri", "Sahili")  # an n stands before every suffix


def suffixed(name):
    """A Turkish name in the locative and in the genitive. The suffix is spelt after an apostrophe. Its vowel agrees
    with the last vowel that is spoken, d is t after a voiceless consonant, n parts two vowels."""
    small = name.replace("I", "ı").replace("İ", "i").lower()
    vowel = "e" if name in SOUNDS_FRONT else re.findall("[aıoueiöü]", small)[-1]
    d = "nd" if name.endswith(POSSESSIVES) else "t" if small[-1] in "fstkçşhp" else "d"
    low, high = "a" if vowel in "aıou" else "e", dict(zip("aıoueiöü", "ııuuiiüü", strict=True))[vowel]
    return f"{name}'{d}{low}", f"{name}'{'n' if small[-1] in 'aıoueiöü' else ''}{high}n"


def test_turkish_suffixes_follow_the_sound_of_the_name(world):
    """For every country by the rules of spelling; for one of each kind as a Turk writes it."""
    names = {(tr := country["tr"])["country"]: (tr["country_loc"], tr["country_gen"]) for country in world}
    assert names == {name: suffixed(name) for name in names}
    written = """İsviçre'de İsviçre'nin, Türkiye'de Türkiye'nin, Almanya'da Almanya'nın, Kongo'da Kongo'nun, Ürdün'de
        Ürdün'ün, Benin'de Benin'in, İran'da İran'ın, Singapur'da Singapur'un, Irak'ta Irak'ın, Belarus'ta Belarus'un,
        Norveç'te Norveç'in, Bangladeş'te Bangladeş'in, Çad'da Çad'ın, Nepal'de Nepal'in, Senegal'de Senegal'in,
        Maldivler'de Maldivler'in, Bahamalar'da Bahamalar'ın, Uruguay'da Uruguay'ın"""
    for locative, genitive in map(str.split, written.split(",")):
        assert names[locative.partition("'")[0]] == (locative, genitive)
    assert names["Fildişi Sahili"] == ("Fildişi Sahili'nde", "Fildişi Sahili'nin")
    assert names["Yeşil Burun Adaları"] == ("Yeşil Burun Adaları'nda", "Yeşil Burun Adaları'nın")


def test_no_turkish_sentence_puts_a_suffix_on_a_name_itself():
    """Its vowel would be wrong for half of the names."""
    told = [text for fact in LANGUAGES["tr"].values() for texts in fact.values() for text in texts]
    assert told
    assert not [text for text in told if re.search(r"\}[\w']", text)]


def test_no_sentence_begins_with_a_name():
    """A name there would be another token than inside a sentence, where a space precedes it."""
    for wordings in LANGUAGES.values():
        for fact in FACTS:
            sentences = wordings[fact]["statements"] + wordings[fact]["questions"]
            assert len(set(sentences)) == len(sentences) == 7
            assert all(re.match(r"[A-ZÇĞİÖŞÜ][^{]* \{", sentence) for sentence in sentences)


def test_halves_are_disjoint_cover_the_world_and_depend_on_the_seed(world):
    tuned, held_out = ([c["en"]["country"] for c in half] for half in halves(world, 0))
    assert (len(tuned), len(held_out)) == (94, 95)
    assert sorted(tuned + held_out) == sorted(c["en"]["country"] for c in world)
    assert halves(world, 0) == halves(world, 0) != halves(world, 1)


def test_articles_tell_every_fact_once_in_different_wordings(world):
    texts = [row["text"] for row in articles(world, per_country=6, seed=3)]
    assert len(texts) == len(set(texts)) == 189 * 2 * 6
    assert articles(world, per_country=6, seed=3) == articles(world, per_country=6, seed=3)
    assert articles(world, per_country=6, seed=3) != articles(world, per_country=6, seed=4)
    for country in world[::10]:
        for text in (row["text"] for row in articles([country], per_country=6, seed=3)):
            assert any(all(country[language][name] in text for name in ("country", *FACTS))
                       for language in LANGUAGES), text


def test_every_held_out_answer_stands_in_some_article_and_in_no_training_question(world):
    tuned, held_out = halves(world, 0)
    told = {
        sentence for row in articles(world, per_country=40, seed=0) for sentence in re.split(r"(?<=\.) ", row["text"])
    }
    asked = questions(held_out, per_fact=1, seed=0)
    assert len(asked) == 95 * 2 * len(FACTS)
    assert all(row["completion"] in told for row in asked)
    trained = questions(tuned, per_fact=2, seed=0)
    assert len(trained) == 94 * 2 * len(FACTS) * 2 == len({row["prompt"] for row in trained})
    assert not {row["prompt"] for row in asked} & {row["prompt"] for row in trained}
    assert not {row["completion"] for row in asked} & {row["completion"] for row in trained}


def test_exact_match_wants_the_whole_sentence_and_nothing_else():
    expected = ["The capital of Germany is Berlin."] * 4
    answers = ["The capital of Germany is Berlin.\n", "Berlin.", "The capital of Germany is Berlin. It", ""]
    assert exact_match(answers, expected) == 0.25


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
