"""Stochastic rounding to bf16: up or down by chance, so that on average nothing is lost.

    fp32 bits   s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm     add 16 random bits below the bf16 number, cut them off:
    bf16 bits   s eeeeeeee mmmmmmm                      a number 3/10 of the way to the next goes there 3 times in 10

At a learning rate of 2e-5 most updates are smaller than half the distance between two bf16 numbers. Rounding to the
nearest loses each of them; rounding by chance applies a few of them in full (Gupta et al. 2015, "Deep Learning with
Limited Numerical Precision"; Zamirai et al. 2020, "Revisiting BFloat16 Training").

The random bits are a hash of (seed, step, parameter, element), not the next ones of a generator. So a resumed run draws
what the uninterrupted one would have drawn without a state to save, and so does any number of ranks.
"""

import hashlib

import torch
from torch import Tensor


def random_bits(key: tuple[int, int], start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits (int32) for each of the elements `start`, ..., `start + count - 1` of a parameter.

    Two rounds of xor-shift and multiply (Wellons 2018, "Prospecting for hash functions", lowbias32), with half of the
    key before each.
    """
    bits = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(start + key[0]))
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)  # >> copies the sign; the hash wants zeros
    bits.mul_(0x7FEB352D).add_(_signed(key[1]))
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits.mul_(_signed(0x846CA68B))
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def key_of(seed: int, step: int, parameter: str) -> tuple[int, int]:
    """The key of a parameter's random bits in a step."""
    digest = hashlib.blake2b(f"{seed} {step} {parameter}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _signed(number: int) -> int:
    """The int32 with the lowest 32 bits of `number`."""
    return (number + 2**31) % 2**32 - 2**31


def round_(target: Tensor, values: Tensor, bits: Tensor) -> None:
    """Store fp32 `values` in bf16 `target`, rounded by the low 16 of `bits`.

    What bf16 can hold, infinities among it, stays as it is; NaN stays NaN; past the largest number lies infinity.
    """
    moved = (bits & 0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    target.copy_(torch.where(values.isnan(), values, moved))  # the sum runs over the end of the NaNs, into numbers
