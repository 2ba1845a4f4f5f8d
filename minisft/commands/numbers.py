"""Numbers as options take them; argparse prints what is raised, after the option's name."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from minisft.errors import printable

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
MOST = 10**15  # of anything; what is counted in memory or loops has a lower bound of its own
Number = TypeVar("Number", int, float)


def number(kind: Callable[[str], Number], low: float, high: float, what: str) -> Callable[[str], Number]:
    """Text -> a number from `low` to `high`; `what` describes it."""
    def read(text: str) -> Number:
        with suppress(ValueError):
            if low <= (found := kind(text)) <= high:  # not so for nan
                return found
        raise ArgumentTypeError(f"{printable(text)} was given; it must be {what}")

    return read


def _tokens(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,16}(?:\.[0-9]{1,16})?)([KMB]?)", text.upper())
    return round(float(found[1]) * UNITS[found[2]]) if found else -1


positive = number(int, 1, MOST, "a whole number from 1 to 10^15")
whole = number(int, -MOST, MOST, "a whole number")
natural = number(int, 0, MOST, "a whole number from 0 to 10^15")
count = number(_tokens, 1, MOST, "a number from 1, such as 500, 50K, 1.5M or 2B")
share = number(float, 1e-6, 1, "a number above 0, up to 1")
price = number(float, 0, 1e6, "a number of dollars from 0 to a million")
