"""Shares with their 95% interval, as reports print them, and the sign test."""

from collections.abc import Iterable
from itertools import accumulate
from math import sqrt
from typing import TypedDict

Z = 1.959964  # 95% of a normal distribution lies within this many standard deviations


class Rate(TypedDict):
    """A share of `count`. Of nothing, `rate` is None and the interval is everything."""

    rate: float | None
    count: int
    interval: list[float]


def wilson(hits: float, count: int) -> tuple[float, float]:
    """The 95% interval of the share that `hits` of `count` are a sample of (Wilson 1927).

    It stays within 0 and 1 and does not take 0 of 5 for certain: (0.0, 0.43).
    """
    share, spread = hits / count, Z**2 / count
    middle, half = share + spread / 2, Z * sqrt(share * (1 - share) / count + spread / count / 4)
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return low if hits else 0.0, high if hits < count else 1.0  # exact, where rounding would leave 1e-17


def rate(verdicts: Iterable[float]) -> Rate:
    """The share of hits among `verdicts`: 1 for a hit, 0 for none, 0.5 for a tie."""
    if not (found := list(verdicts)):
        return {"rate": None, "count": 0, "interval": [0.0, 1.0]}
    return {"rate": sum(found) / len(found), "count": len(found), "interval": list(wilson(sum(found), len(found)))}


def percent(figure: Rate) -> str:
    """A rate in one line: 43.3% (27.4% to 60.8%) of 30."""
    low, high = figure["interval"]
    return "none" if figure["rate"] is None else f"{figure['rate']:.1%} ({low:.1%} to {high:.1%}) of {figure['count']}"


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value: how often fair coins fall as one-sidedly as this, or more. Leave ties out first."""
    n = wins + losses  # below: n choose 0, n choose 1, ..., each from the one before
    ways = accumulate(range(min(wins, losses)), lambda ways, k: ways * (n - k) // (k + 1), initial=1)
    return min(1.0, 2 * sum(ways) / 2**n)
