"""Numbers as options take them; argparse turns a ValueError into its message, with the function's name."""

import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def positive(text: str) -> int:
    """A whole number from 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def natural(text: str) -> int:
    """A whole number from 0."""
    if (number := int(text)) < 0:
        raise ValueError
    return number


def count(text: str) -> int:
    """A number of tokens: 500, 50K, 1.5M, 2B."""
    number = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMB]?)", text.upper())
    if not number:
        raise ValueError
    return positive(str(round(float(number[1]) * UNITS[number[2]])))


def share(text: str) -> float:
    """A number above 0, up to 1."""
    if not 0 < (number := float(text)) <= 1:
        raise ValueError
    return number
