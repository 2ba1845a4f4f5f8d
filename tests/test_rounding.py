"""Stochastic rounding against bits in NumPy and integers in Python, and its mean against the number itself."""

import numpy as np
import torch

from minisft.counter_rng import key_of, random_bits
from minisft.lean import rounding


def rounded(values, bits):
    found = rounding.rounded(values, bits.clone())
    assert torch.equal(found.bfloat16().float().nan_to_num(7.0), found.nan_to_num(7.0)), "bf16 holds it"
    return found.bfloat16()


def test_it_is_bit_arithmetic():
    """Add the low 16 bits and cut them off, in NumPy, over all exponents and both signs."""
    rng = np.random.default_rng(0)
    raw, drawn = rng.integers(0, 2**32, (2, 200_000), dtype=np.uint32)
    values = raw.view(np.float32)
    kept = ~np.isnan(values)
    expected = ((raw + (drawn & 0xFFFF)) & 0xFFFF0000).view(np.float32)[kept]
    found = rounded(torch.from_numpy(values), torch.from_numpy(drawn.view(np.int32)))
    np.testing.assert_array_equal(found.float().numpy()[kept], expected)
    assert np.isinf(expected).any()  # past the largest number
    assert found[torch.from_numpy(~kept)].isnan().all()


def test_what_bf16_holds_is_never_changed():
    """All 65,536 numbers, with the smallest, the largest and a random addend; NaN stays NaN."""
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for bits in (torch.zeros(2**16, dtype=torch.int32), torch.full((2**16,), -1, dtype=torch.int32),
                 random_bits((1, 2), 0, 2**16)):
        found = rounded(every.float(), bits)
        assert torch.equal(found.isnan(), every.isnan())
        kept = ~every.isnan()
        assert torch.equal(found[kept].view(torch.int16), every[kept].view(torch.int16))


def test_the_mean_is_the_number():
    """x at 0.001 to 0.999 of the way between two neighbours: either of them, and x on average."""
    count = 200_000
    for low, step in ((1.0, 2**-7), (-3.0, 2**-6), (2.0**-20, 2**-27), (1e-39, 2**-133)):  # the last: subnormal
        low = float(torch.tensor(low, dtype=torch.bfloat16))
        high = low + step
        for share in (0.001, 0.1, 0.5, 0.999):
            value = np.float32(low + share * (high - low))
            found = rounded(torch.full((count,), value), random_bits(key_of(0, 1, f"{low} {share}"), 0, count)).double()
            assert set(found.tolist()) <= {low, high}
            exact = (float(value) - low) / (high - low)
            sigma = (exact * (1 - exact) / count) ** 0.5
            assert abs(float((found.mean() - low) / (high - low)) - exact) < 5 * sigma + 2**-16


def test_small_updates_are_not_lost():
    """200 updates of 2e-5 on weights near 1, where bf16 numbers are 2^-8 or 2^-7 apart."""
    weights = torch.rand(50_000, generator=torch.Generator().manual_seed(0)).add_(0.5).bfloat16()
    nearest, stochastic = weights.clone(), weights.clone()
    for step in range(200):
        nearest -= 2e-5
        bits = random_bits(key_of(0, step, "w"), 0, len(weights))
        stochastic = rounding.rounded(stochastic.float() - 2e-5, bits).bfloat16()
    assert torch.equal(nearest, weights)
    moved = (weights.double() - stochastic.double()).mean()
    # The variance of a step is at most update * distance.
    assert abs(float(moved) - 200 * 2e-5) < 5 * (200 * 2e-5 * 2**-7 / len(weights)) ** 0.5


def naive_hash(element, first, second):
    """lowbias32 with a key, on Python's integers."""
    x = (element + first) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D + second
    x %= 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_the_bits_are_a_hash_of_the_element():
    key = key_of(3, 17, "model.norm.weight")
    for start in (0, 1000, 2**31 - 50, 2**32 - 50, 3 * 2**32 + 7):
        found = random_bits(key, start, 100).numpy().view(np.uint32)
        assert found.tolist() == [naive_hash(start + i, *key) for i in range(100)]


def test_the_bits_are_even_and_unrelated():
    """Each of the 32 is 1 half of the time, also given the neighbour's, the next step's or another parameter's."""
    count = 200_000
    keys = [key_of(0, 0, "a"), key_of(0, 1, "a"), key_of(0, 0, "b"), key_of(1, 0, "a")]
    assert len(set(keys)) == 4
    drawn = [np.unpackbits(random_bits(key, 0, count).numpy().view(np.uint8)).reshape(count, 32) for key in keys]
    bound = 5.5 / (2 * count**0.5)
    for bits in drawn:
        assert np.abs(bits.mean(0) - 0.5).max() < bound
        unrelated = [other for other in drawn if other is not bits]
        for other in (np.roll(bits, 1, 0), np.roll(bits, 1, 1), np.roll(bits, 16, 1), *unrelated):
            assert np.abs((bits ^ other).mean(0) - 0.5).max() < bound
