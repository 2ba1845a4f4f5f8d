"""A foreign name cannot control a terminal, and fits on a line."""

import pytest

from minisft.errors import printable


@pytest.mark.parametrize(("name", "shown"), [
    ("model.norm.weight", "model.norm.weight"), ("İğne 🚂 it's \\n", "İğne 🚂 it's \\n"), ("\x1b[2J", "\\x1b[2J"),
    ("a\nb\r\x00\x7f", "a\\nb\\r\\x00\\x7f"), ("\ud800\u202e\u2028\u200b", "\\ud800\\u202e\\u2028\\u200b"),
    ("\U000e0001", "\\U000e0001"), (3, "3"), (None, "None"), ("", "")])
def test_what_is_not_printable_is_escaped(name, shown):
    assert printable(name) == shown


@pytest.mark.parametrize("name", ["x" * 79, "x" * 80, "x" * 81, "\x00" * 30, "x" * 10**7])
def test_the_length_is_bounded(name):
    shown = printable(name)
    assert shown == name or (len(shown) == 80 and shown.endswith("…"))
    assert len(printable(name, 10)) == 10
    shown.encode()
