"""What a file is expected to hold, by example, and where it holds something else.

    {"packs": int, "pack_fill?": [int], "train": [{"name": str}]}      "?": may be missing; further fields do not matter

    misfit({"packs": 3, "train": [{"name": "a"}, {"name": 7}]}, ...)  ->  "train[1].name is 7, expected text"
"""

import reprlib
from typing import Any

KINDS = {int: "a whole number", float: "a number", str: "text"}
LARGEST = 2**53  # beyond it fp64 leaves out whole numbers, and no figure of a run is as large


def misfit(value: Any, shape: Any, where: str = "") -> str:
    """The first place where `value`, as JSON or TOML has it, is not of `shape`; empty where it is."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return _said(where, value, "an object")
        for name, inner in shape.items():
            key = name.removesuffix("?")
            if key in value:
                if wrong := misfit(value[key], inner, f"{where}.{key}".lstrip(".")):
                    return wrong
            elif key == name:
                return f"{key} is missing" + (f" in {where}" if where else "")
        return ""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _said(where, value, "a list")
        return next(filter(None, (misfit(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value))), "")
    return "" if _fits(value, shape) else _said(where, value, KINDS[shape])


def is_number(value: Any) -> bool:
    """Whether `value` is a number as large as a figure may be; NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _fits(value: Any, kind: type) -> bool:
    return isinstance(value, str) if kind is str else is_number(value) and isinstance(value, int | kind)


def _said(where: str, value: Any, expected: str) -> str:
    return f"{where} is {reprlib.repr(value)}, expected {expected}"
