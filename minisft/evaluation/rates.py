"""Rates with their interval, as the reports have them, and the sign test."""

from math import comb
from typing import Any

from minisft.evaluation.interval import wilson


def rate(hits: float, count: int) -> dict[str, Any]:
    """{"rate", "count", "interval"}; of nothing, the rate is null and the interval everything. A tie is half a hit."""
    return {"rate": hits / count if count else None, "count": count,
            "interval": list(wilson(hits, count)) if count else [0.0, 1.0]}


def percent(figure: dict[str, Any]) -> str:
    """A rate in one line: 43.3% (27.4% to 60.8%) of 30."""
    if figure["rate"] is None:
        return "none"
    low, high = figure["interval"]
    return f"{figure['rate']:.1%} ({low:.1%} to {high:.1%}) of {figure['count']}"


def sign_test(wins: int, losses: int) -> float:
    """The probability that as many fair coins fall as one-sidedly as this or more. Ties are left out before."""
    count = wins + losses
    tail = sum(comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**count)  # both sides
