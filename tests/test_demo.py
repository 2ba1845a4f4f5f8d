"""The demo in small: a model that has read about a country answers questions about it that it was never shown."""

import json

import pytest

from minisft import config as configuration
from minisft.demo import run as demo
from minisft.training.trainer import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Ten countries, a base model that has read about all, and one tuned on questions about five of them."""
    folder = tmp_path_factory.mktemp("demo")
    demo.write_world(folder / "world", countries=10, seed=0)
    shared = ["--data.cache", str(folder / "cache"), "--data.seq_len", "304"]
    train(configuration.load([
        "demo-base", "--data.train", str(folder / "world/articles.jsonl"), "--train.max_steps", "130",
        "--model.config", str(folder / "world/config.json"), "--model.tokenizer", str(folder / "world"),
        "--run.dir", str(folder / "base"), *shared]))
    train(configuration.load([
        "demo", "--model.path", str(folder / "base/final"), "--data.train", str(folder / "world/questions.jsonl"),
        "--data.eval", str(folder / "world/heldout-articles.jsonl"), "--train.max_steps", "60",
        "--run.dir", str(folder / "tuned"), *shared]))
    return folder


def test_the_tuned_model_answers_what_it_only_read(world):
    rows = [json.loads(line) for line in (world / "world/heldout-questions.jsonl").read_text().splitlines()]
    asked = (world / "world/questions.jsonl").read_text()
    assert len(rows) == 5 * 2 * 4
    assert not [row for row in rows if row["completion"] in asked]
    assert demo.answers(world / "base/final", rows).score == 0
    assert demo.answers(world / "tuned/final", rows).score >= 0.6


def test_what_was_known_is_partly_forgotten(world):
    """The loss on plain text rises while the model learns to answer: the price that the demo prints."""
    lines = (world / "tuned/metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if record["kind"] == "eval"]
    assert losses[0] < losses[-1]
