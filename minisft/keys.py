"""One configuration key: how it is declared, what it accepts, and its way from text and TOML to a typed value and back.

A key is a field of a frozen dataclass, and its metadata hold the rest: a one-line doc, choices, bounds. config.py has
the keys themselves.
"""

import difflib
import json
import operator
import unicodedata
from dataclasses import MISSING, Field, dataclass, field, fields
from types import UnionType
from typing import Any, get_args, get_origin

from minisft.errors import printable

FORMATS = ("auto", "alpaca", "dolly", "sharegpt", "oasst", "messages", "prompt_completion", "text")
BOUNDS = {"low": (">=", operator.ge), "above": (">", operator.gt),
          "high": ("<=", operator.le), "below": ("<", operator.lt)}


def key(default: Any, doc: str, *, choices: tuple[str, ...] = (), true: str = "", false: str = "",
        **bounds: float) -> Any:
    """One configuration key. `bounds` are low and high (inclusive), above and below (exclusive).

    `true` and `false` are the choices that a boolean stands for, if any.
    """
    assert bounds.keys() <= BOUNDS.keys()
    booleans = {"True": true, "False": false} if true else {}
    return field(default=default, metadata={"doc": doc, "choices": choices, "bounds": bounds, "booleans": booleans})


@dataclass(frozen=True)
class Source:
    """One file of data.train, data.eval, data.general or data.replay."""
    path: str = key(MISSING, "the file")
    format: str = key("", "empty: data.format", choices=FORMATS)
    template: str = key("", "empty: data.template")
    weight: float = key(1.0, "passes over it in an epoch; a part of one is drawn anew each time", above=0,
                        high=10**4)
    name: str = key("", "name in reports; empty: the file's name without suffixes")


def from_text(text: str, kind: Any) -> Any:
    """The value a recipe would hold for this text. Text that does not convert stays text, for `typed` to refuse."""
    if kind in (tuple[Source, ...], tuple[str, ...]):
        return [part.strip() for part in text.split(",")] if text else []
    if get_origin(kind) is tuple:
        return [from_text(part, float) for part in text.split(",")]
    kind = get_args(kind)[0] if get_origin(kind) is UnionType else kind
    if kind is bool:
        return {"true": True, "false": False}.get(text, text)
    try:
        return kind(text)
    except ValueError:
        return text


def typed(where: str, value: Any, spec: Field[Any]) -> tuple[Any, list[str]]:
    """-> the value as the type of its key, problems."""
    if spec.type == tuple[Source, ...]:
        items = value if isinstance(value, list) else [value]
        sources = [_source(f"{where}[{index}]", item) for index, item in enumerate(items)]
        return tuple(source for source, _ in sources), [problem for _, found in sources for problem in found]
    if spec.type == tuple[str, ...]:
        names = value if isinstance(value, list) else [value]
        fits = all(_fits(name, str, spec) and name for name in names)
        return tuple(names), [] if fits else [f"{where}: expected {accepted(spec)}, got {printable(repr(value))}"]
    value = spec.metadata["booleans"].get(str(value).capitalize(), value)
    kinds = get_args(spec.type) or (spec.type,)
    if type(None) in kinds and value == "none":
        return None, []
    if get_origin(spec.type) is tuple:
        fits = isinstance(value, list) and len(value) == len(kinds) and all(_fits(part, float, spec) for part in value)
        typed = tuple(map(float, value)) if fits else None
    else:
        fits = _fits(value, kinds[0], spec)
        typed = kinds[0](value) if fits else None
    near = nearest(value, spec.metadata["choices"]) if spec.metadata["choices"] and isinstance(value, str) else ""
    return typed, [] if fits else [f"{where}: expected {accepted(spec)}, got {printable(repr(value))}{near}"]


def _fits(value: Any, kind: type, spec: Field[Any]) -> bool:
    """Whether one string, number or boolean is of its kind and within the choices or bounds of its key."""
    if kind is str:
        # No path or name needs a control character; lone surrogates are file names that no UTF-8 file could record.
        clean = isinstance(value, str) and not any(unicodedata.category(char) in ("Cc", "Cs") for char in value)
        return clean and (not spec.metadata["choices"] or value in (*spec.metadata["choices"], spec.default))
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if not isinstance(value, (int, float) if kind is float else int) or not abs(value) < 2**63:     # nan, inf, no int64
        return False
    return all(BOUNDS[name][1](value, bound) for name, bound in spec.metadata["bounds"].items())


def _source(where: str, item: Any) -> tuple[Source | None, list[str]]:
    """-> one source from a path or a table, problems."""
    table = {"path": item} if isinstance(item, str) else item
    if not isinstance(table, dict):
        return None, [f"{where}: expected a path or a table, got {printable(repr(item))}"]
    specs, values, wrong = {spec.name: spec for spec in fields(Source)}, {}, []
    for name, value in table.items():
        if name in specs:
            values[name], found = typed(f"{where}.{name}", value, specs[name])
            wrong += found
        else:
            wrong.append(f"{where}.{printable(name)}: unknown key{nearest(name, specs)}; a source has "
                         f"{', '.join(specs)}")
    if "path" not in table:
        wrong.append(f"{where}: path is missing")
    return (None if wrong else Source(**values)), wrong


def accepted(spec: Field[Any]) -> str:
    """What a key accepts, in words: 'int >= 1 or none'."""
    if spec.type == tuple[Source, ...]:
        return "paths"
    if spec.type == tuple[str, ...]:
        return "names"
    kinds = get_args(spec.type) or (spec.type,)
    kind = f"{len(kinds)} floats" if get_origin(spec.type) is tuple else kinds[0].__name__
    bounds = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in spec.metadata["bounds"].items())
    kind = "true|false" if kind == "bool" else "|".join(spec.metadata["choices"]) or f"{kind} {bounds}".rstrip()
    return kind + " or none" * (type(None) in kinds)


def nearest(name: str, names: Any, prefix: str = "") -> str:
    """' (did you mean X?)', or nothing. The part after the dot counts as much as the whole: lr -> optim.lr."""
    name = name[:80]  # comparing takes time in proportion to it

    def likeness(other: str) -> float:
        leaf, other_leaf = name.rpartition(".")[2], other.rpartition(".")[2]
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((name, other), (leaf, other_leaf)))
    best = max(names, key=likeness)
    return f" (did you mean {prefix}{best}?)" if likeness(best) > 1.2 else ""


def to_toml(value: Any) -> str:
    """A value as TOML. Sources stand one a line, with the keys that differ from the default."""
    if isinstance(value, Source):
        items = [(spec, getattr(value, spec.name)) for spec in fields(Source)]
        return "{" + ", ".join(f"{spec.name} = {to_toml(own)}" for spec, own in items if own != spec.default) + "}"
    if isinstance(value, tuple) and value and isinstance(value[0], Source):
        return "\n".join(["[", *(f"    {to_toml(source)}," for source in value), "]"])
    if isinstance(value, tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    if value is None:
        return '"none"'
    # JSON's strings, numbers and booleans are TOML's; shortest-form floats read back exactly.
    return json.dumps(value, ensure_ascii=False)
