"""Counter-based random bits: a hash of where they are used, not the next output of a generator.

A resumed run draws what the uninterrupted one would have drawn, without a state to save; a recomputed block draws the
same again, and so does any number of ranks. Stochastic rounding and the dropout of adapters use these bits.
"""

import hashlib

import torch
from torch import Tensor


def hashed(bits: Tensor, key: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Replace each int32 in `bits` by 32 random bits that depend only on it and the key: two int32, or tensors () of
    them if a compiled program should not depend on their values.

    Two rounds of xor-shift and multiply (Wellons 2018, "Prospecting for hash functions", lowbias32), with half of the
    key before each round.
    """
    bits += key[0]
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)  # >> copies the sign; the hash wants zeros
    bits.mul_(0x7FEB352D).add_(key[1])
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits.mul_(signed(0x846CA68B))
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def random_bits(key: tuple[int | Tensor, int | Tensor], start: int | Tensor, count: int,
                device: torch.device | str = "cpu") -> Tensor:
    """32 random bits (int32) for each of the elements `start`, ..., `start + count - 1` of a parameter."""
    start = start if isinstance(start, Tensor) else signed(start)
    return hashed(torch.arange(count, dtype=torch.int32, device=device).add_(start), key)


def key_of(seed: int, step: int, what: str) -> tuple[int, int]:
    """The key (two int32) of the bits that `what`, such as a parameter's name, draws in a step."""
    digest = hashlib.blake2b(f"{seed} {step} {what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def signed(number: int) -> int:
    """The int32 with the lowest 32 bits of `number`."""
    return (number + 2**31) % 2**32 - 2**31
