"""Sampling is transformers': the same distributions, and draws that follow them."""

import math

import pytest
import torch

from minisft.errors import UserError
from minisft.generate.assistant import GREEDY, Sampling, choose, penalized, warped


def logits(rows=6, vocabulary=50):
    drawn = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    return drawn.mul(4).round() / 4  # so coarse that many are equal


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 80])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-9])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, penalty):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(50, (6, 20), generator=torch.Generator().manual_seed(1))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits())
    theirs = transformers.TemperatureLogitsWarper(temperature)(ids, theirs)
    theirs = transformers.TopKLogitsWarper(top_k)(ids, theirs) if top_k else theirs
    theirs = transformers.TopPLogitsWarper(top_p)(ids, theirs) if top_p < 1 else theirs
    present = torch.zeros(6, 50, dtype=torch.bool).scatter(1, ids, True)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    assert torch.equal(warped(penalized(logits(), present, penalty), sampling), theirs)


def test_draws_follow_the_distribution():
    sampling, even = Sampling(temperature=0.8, top_k=9), (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    row = logits()[2]
    tokens = choose(row.expand(20_000, -1), sampling, even)
    counts = torch.bincount(tokens, minlength=50) / 20_000
    kept = torch.where(row >= row.sort().values[-9], row / 0.8, -torch.inf)
    assert torch.allclose(counts, kept.softmax(dim=-1), atol=1e-4)


def test_the_ends_of_the_interval_draw_tokens_that_have_a_chance():
    row = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    almost_one = torch.tensor([math.nextafter(1, 0)], dtype=torch.float64)
    assert choose(row, Sampling(temperature=1), torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    assert choose(row, Sampling(temperature=1), almost_one).tolist() == [2]
    assert choose(row, GREEDY, almost_one).tolist() == [2]


def test_the_random_numbers_are_a_function_of_seed_and_prompt():
    def first(seed, prompt):
        draws = Sampling(seed=seed).draws(prompt)
        return [next(draws) for _ in range(5)]

    assert first(3, [1, 2]) == first(3, [1, 2])
    assert first(3, [1, 2]) != first(4, [1, 2])
    assert first(3, [1, 2]) != first(3, [2, 1])
    assert all(0 <= number < 1 for number in first(3, [1, 2]))


@pytest.mark.parametrize(("values", "message"), [
    ({"temperature": -1}, "temperature: -1 was given; it must be 0 (the most probable token), or a"),
    ({"temperature": 1e-300}, "temperature: 1e-300 was given; it must be 0 (the most probable token), or a"),
    ({"temperature": 1e300}, "temperature: 1e+300 was given"),
    ({"temperature": math.nan}, "temperature: nan was given"),
    ({"temperature": math.inf}, "temperature: inf was given"),
    ({"top_k": -1}, "top_k: -1 was given; it must be a whole number from 0 (all tokens)"),
    ({"top_p": 0.0}, "top_p: 0.0 was given; it must be above 0, and 1 at most"),
    ({"top_p": 1.5}, "top_p: 1.5 was given"),
    ({"top_p": math.nan}, "top_p: nan was given"),
    ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 was given; it must be a number from 0.001 to 1000; 1"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty: 1e-300 was given"),
    ({"repetition_penalty": math.inf}, "repetition_penalty: inf was given"),
    ({"seed": -1}, "seed: -1 was given; it must be a whole number from 0"),
    ({"top_k": 5}, "top_k and top_p have no effect at temperature 0, which draws nothing; raise temperature"),
])
def test_values_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UserError) as error:
        Sampling(**values)
    assert message in str(error.value)
