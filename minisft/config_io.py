"""Reading and writing a configuration: a TOML recipe, overridden key by key on the command line.

    minisft train my.toml --optim.lr 1e-5 --data.train a.jsonl,b.jsonl

    given    ("my.toml: optim.lr", "optim.lr", 0.001): where it stands, the key, the value as TOML has it, unchecked
    typed    converted and checked by the declaration of the key (config.py)

`load` reports every problem at once, each with its place: a run that waits in a queue should not fail three times for
three typing errors. A recipe is data: nothing in it is ever executed. `to_toml` leaves out the defaults that `load`
filled in from other keys, so overriding `data.template` of a saved configuration reaches the sources that inherited it.
"""

import difflib
import json
import operator
import os
import re
import tomllib
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import Field, fields, replace
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from minisft.config import TABLE, Config, Source, problems
from minisft.errors import PATH, UserError, printable
from minisft.files import file_and_split

SECTIONS: dict[str, type[Any]] = {section.name: type(section.default) for section in fields(Config)}
KEYS: dict[str, Field[Any]] = {f"{section}.{spec.name}": spec for section, cls in SECTIONS.items()
                               for spec in fields(cls)}
BOUNDS = {"low": (">=", operator.ge), "above": (">", operator.gt),
          "high": ("<=", operator.le), "below": ("<", operator.lt)}
# What other trainers call a setting -> what means it here.
ELSEWHERE = {name: ours for ours, names in tomllib.loads(Path(__file__).with_name("names_elsewhere.toml").read_text(
    encoding="utf-8"))["here"].items() for name in names.split()}
LARGEST = 2**24  # bytes of a recipe
Given = tuple[str, str, Any]


def load(argv: list[str], *, planning: bool = False) -> Config:
    """The configuration of `[RECIPE] [--section.key value ...]`, checked and with dependent defaults filled in.

    UserError lists all problems, one a line. -h or --help prints the help and exits. With `planning`, the base model
    may be missing, and adapters may stand beside random weights: only shapes count.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text())
        raise SystemExit(0)
    recipe, options = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else (default_recipe(argv), argv)
    label = "command line" if recipe is None else recipe if Path(recipe).is_file() else f"shipped recipe {recipe}"
    wrong: list[str] = []
    in_recipe = [] if recipe is None else _in_recipe(recipe, label, wrong)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origin, bad = {}, set()
    for where, name, value in (in_recipe or []) + _on_command_line(options, wrong):
        section, _, leaf = name.partition(".")
        origin[name] = where
        if found := _typed(where, value, KEYS[name], wrong):
            [values[section][leaf]] = found
        else:
            bad.add(name)
    config = _with_inherited(Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()}),
                             run_name="run" if recipe is None else Path(recipe).stem)
    for names, message in problems(config) if in_recipe is not None else ():
        if not bad & set(names) and not (planning and "model.init" in names):
            where = next((origin[name] for name in names if name in origin), f"{label}: {names[0]}")
            wrong.append(f"{where}: {'' if where.endswith(names[0]) else f'{names[0]}: '}{message}")
    if wrong:
        raise UserError("\n  ".join([f"the configuration has {len(wrong)} problem{'s' * (len(wrong) > 1)}:", *wrong]))
    return config


def default_recipe(options: list[str]) -> str | None:
    """The recipe if none is named: the demo, or none at all (plain defaults) for a model or data of one's own."""
    return None if any(option.startswith(("--model.", "--data.")) for option in options) else "demo"


def to_toml(config: Config) -> str:
    """The configuration as a recipe, without the defaults that came from other keys (except names, the run folder and
    model.init): `load` of the file gives an equal Config."""
    model, data = config.model, config.data
    sources: dict[str, Any] = {
        key: tuple(replace(source, format=source.format * (source.format != data.format),
                           fields=source.fields * (source.fields != data.fields),
                           template=source.template * (source.template != data.template))
                   for source in getattr(data, key)) for key in ("train", "replay", "eval", "general")}
    written = replace(config, model=replace(model, tokenizer=model.tokenizer * (model.tokenizer != model.path)),
                      data=replace(data, **sources, cache=data.cache * (data.cache != _default_cache())))
    lines = ["# The effective configuration. Relative paths start at the folder where the run was started."]
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}]  # {cls.__doc__}"]
        for spec in fields(cls):
            first, *rest = _toml(getattr(getattr(written, section), spec.name), spec.type).split("\n")
            lines += [f"{spec.name} = {first}  # {spec.metadata['doc']} [{_accepted(spec)}]", *rest]
    return "\n".join(lines) + "\n"


def help_text() -> str:
    """Usage, the shipped recipes, and every key with default, doc and what it accepts."""
    lines = [
        "usage: minisft train [RECIPE] [--section.key value | --section.key=value ...]",
        "       torchrun --nproc-per-node N -m minisft train ...    (train.py in a clone does the same)\n",
        "RECIPE is a TOML file or the name of a shipped recipe. Without one, the demo runs; with --model.* or --data.*",
        "and no recipe, every other key has the default below.",
        f"Shipped recipes: {', '.join(shipped_recipes())}",
        "Relative paths, in a recipe too, start at the current directory.",
        "In a recipe, sources are paths or tables {" + ", ".join(spec.name for spec in fields(Source)) + "}.",
        'On the command line, write lists as in TOML or with commas: a.jsonl,b.jsonl or 0.9,0.95 ("" for no source).']
    for section, cls in SECTIONS.items():
        lines += ["", f"{section}: {cls.__doc__}"]
        for spec in fields(cls):
            default = _toml(spec.default, spec.type).strip('[]"').replace('", "', ",")
            lines.append(f"{f'  --{section}.{spec.name} = {default}':<42}  {spec.metadata['doc']} [{_accepted(spec)}]")
    return "\n".join(lines)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {file.stem: file for file in sorted(Path(__file__).with_name("recipes").glob("*.toml"))}


def _in_recipe(recipe: str, label: str, wrong: list[str]) -> list[Given] | None:
    """The keys of a recipe; None if it cannot be read. Problems are added to `wrong`."""
    shipped = shipped_recipes()
    file = Path(recipe) if Path(recipe).is_file() else shipped.get(recipe)
    if not file:
        wrong.append(f"command line: {printable(repr(recipe), PATH)} is neither a file nor a shipped recipe; give a "
                     f"TOML file or a shipped recipe: {', '.join(shipped)}")
        return None
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        table = tomllib.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad TOML, not UTF-8, nested too deep
        is_yaml = recipe.endswith((".yaml", ".yml"))
        wrong.append(f"{label}: not a TOML file: {error}"
                     + "; YAML is not read, and `minisft recipes` lists recipes to begin with" * is_yaml)
        return None
    given: list[Given] = []
    for section, content in table.items():
        place, is_known = f"{label}: {printable(section)}", section in SECTIONS
        if not isinstance(content, dict):
            wrong.append(f"{place}: expected a section [{section}], got {printable(repr(content))}" if is_known
                         else f"{place}: unknown key outside a section{_meant(section)}")
            continue
        if not is_known:
            wrong.append(f"{place}: unknown section{nearest(section, SECTIONS)}; sections are {', '.join(SECTIONS)}")
        for leaf, value in content.items():
            if (name := f"{section}.{leaf}") in KEYS:
                given.append((f"{place}.{printable(leaf)}", name, value))
            elif is_known or leaf in ELSEWHERE:
                wrong.append(f"{place}.{printable(leaf)}: unknown key{_meant(name)}; --help lists them all")
    return given


def _on_command_line(options: list[str], wrong: list[str]) -> list[Given]:
    """The keys on the command line. Problems are added to `wrong`."""
    given: dict[str, Given] = {}
    left = list(options)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            wrong.append(f"command line: unexpected {printable(repr(argument))}; give one recipe, before the options")
            continue
        option, has_value, text = ("--run.profile=true" if argument == "--profile" else argument).partition("=")
        where, name = f"command line: {printable(option)}", option.removeprefix("--")
        # Also after an unknown option: its value is not a second problem.
        if not has_value and left and not left[0].startswith("--"):
            has_value, text = "=", left.pop(0)
        if not option.startswith("--") or name not in KEYS:
            wrong.append(f"{where}: unknown option{_meant(name, '--')}; --help lists them all")
        elif not has_value:
            wrong.append(f"{where}: the value is missing; expected {_accepted(KEYS[name])}")
        elif name in given:
            wrong.append(f"{where}: given twice")
        else:
            given[name] = where, name, _from_text(text, KEYS[name].type)
    return list(given.values())


def _from_text(text: str, kind: Any) -> Any:
    """What TOML would hold for this text. Text that does not convert stays text, for `_typed` to reject."""
    if get_origin(kind) is tuple:
        if text.startswith(("[", "{")):
            with suppress(ValueError, RecursionError):
                return tomllib.loads(f"value = {text}")["value"]
        part_kind = float if kind == tuple[float, float] else str
        return [_from_text(part.strip(), part_kind) for part in text.split(",")] if text else []
    kind = (get_args(kind) or (kind,))[0]
    if kind is bool:
        return {"true": True, "false": False}.get(text, text)
    with suppress(ValueError):
        return kind(text)
    return text


def _meant(name: str, prefix: str = "") -> str:
    """' (here: X)' for what another trainer calls X, ' (did you mean X?)' for what is nearly X, or nothing."""
    ours = ELSEWHERE.get(name.rpartition(".")[2].replace("-", "_").lower())
    if not ours:
        return nearest(name, KEYS, prefix)
    return f" (here: {prefix * (ours.partition(' ')[0].strip(',') in KEYS)}{ours})"


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """' (did you mean X?)', or nothing. The part after the dot counts as much as the whole: lr -> optim.lr."""
    name = name[:80]  # comparing takes time in proportion to it

    def likeness(other: str) -> float:
        pairs = (name, other), (name.rpartition(".")[2], other.rpartition(".")[2])
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    best = max(names, key=likeness)
    return f" (did you mean {prefix}{best}?)" if likeness(best) > 1.2 else ""


def _typed(where: str, value: Any, spec: Field[Any], wrong: list[str]) -> list[Any]:
    """[`value` as the type of its key], or nothing: then the problems are added to `wrong`."""
    kinds, is_tuple = get_args(spec.type) or (spec.type,), get_origin(spec.type) is tuple
    any_length, choices = Ellipsis in kinds, spec.metadata["choices"]
    value = str(value).lower() if choices and isinstance(value, bool) else value
    value = spec.metadata["aliases"].get(str(value), value)
    if NoneType in kinds and value == "none":
        return [None]
    parts = value if is_tuple and isinstance(value, list) else [value]
    if spec.type == TABLE:
        if isinstance(value, dict) and all(text and _fits(text, str, spec) for pair in value.items() for text in pair):
            return [tuple(value.items())]
        parts = [""]  # fits nothing
    if kinds[0] is Source:
        sources = [_source(f"{where}[{i}]", part, wrong) for i, part in enumerate(parts)]
        return [tuple(sources)] if all(sources) else []
    if (len(parts) == (len(kinds) if is_tuple else 1) or any_length) and all(
            _fits(part, kinds[0], spec) and not (any_length and part == "") for part in parts):
        return [tuple(map(kinds[0], parts)) if is_tuple else kinds[0](value)]
    near = nearest(value, choices) if choices and isinstance(value, str) else ""
    wrong.append(f"{where}: expected {_accepted(spec)}, got {printable(repr(value))}{near}")
    return []


def _fits(value: Any, kind: type, spec: Field[Any]) -> bool:
    """True if one string, number or boolean is of its kind and within the choices or bounds of its key."""
    if kind is str:
        # No path or name needs a control character; no UTF-8 file could record a file name with lone surrogates.
        clean = isinstance(value, str) and not any(unicodedata.category(char) in ("Cc", "Cs") for char in value)
        return clean and (not spec.metadata["choices"] or value in (*spec.metadata["choices"], spec.default))
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if not isinstance(value, (int, float) if kind is float else int) or not abs(value) < 2**63:  # nan, inf, no int64
        return False
    return all(BOUNDS[name][1](value, bound) for name, bound in spec.metadata["bounds"].items())


def _source(where: str, item: Any, wrong: list[str]) -> Source | None:
    """One source, from a path or a table. Problems are added to `wrong`."""
    table = {"path": item} if isinstance(item, str) else item
    if not isinstance(table, dict):
        wrong.append(f"{where}: expected a path or a table, got {printable(repr(item))}")
        return None
    specs = {spec.name: spec for spec in fields(Source)}
    wrong += [f"{where}.{printable(name)}: unknown key{nearest(name, specs)}; a source has {', '.join(specs)}"
              for name in table if name not in specs]
    values = {name: found[0] for name, value in table.items() if name in specs
              and (found := _typed(f"{where}.{name}", value, specs[name], wrong))}
    if "path" not in table:
        wrong.append(f"{where}: path is missing")
    return Source(**values) if "path" in values and len(values) == len(table) else None


def _accepted(spec: Field[Any]) -> str:
    """What a key accepts, in words: 'int >= 1 or none'."""
    kinds = get_args(spec.type) or (spec.type,)
    if spec.type == TABLE:
        return '{field = "column", ...}'
    if Ellipsis in kinds:
        return "paths" if kinds[0] is Source else "names"
    kind = f"{len(kinds)} floats" if get_origin(spec.type) is tuple else kinds[0].__name__
    bounds = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in spec.metadata["bounds"].items())
    kind = "true|false" if kind == "bool" else "|".join(spec.metadata["choices"]) or f"{kind} {bounds}".rstrip()
    return kind + " or none" * (NoneType in kinds)


def _toml(value: Any, kind: Any = None) -> str:
    """A value as TOML. Sources stand one a line, with the keys that differ from the default."""
    if kind == TABLE:
        return "{" + ", ".join(f"{name if re.fullmatch('[A-Za-z0-9_-]+', name) else _toml(name)} = {_toml(column)}"
                               for name, column in value) + "}"
    if isinstance(value, Source):
        items = [(spec, getattr(value, spec.name)) for spec in fields(Source)]
        return "{" + ", ".join(f"{spec.name} = {_toml(own, spec.type)}" for spec, own in items
                               if own != spec.default) + "}"
    if isinstance(value, tuple):
        lines = "\n".join(f"    {_toml(part)}," for part in value if isinstance(part, Source))
        return f"[\n{lines}\n]" if lines else f"[{', '.join(map(_toml, value))}]"
    # JSON's strings, numbers and booleans are TOML's; shortest-form floats read back exactly.
    return '"none"' if value is None else json.dumps(value, ensure_ascii=False)


def _with_inherited(config: Config, *, run_name: str) -> Config:
    """With the defaults that depend on other keys. Sources get names, unique in a report: a.jsonl, a.json -> a, a-2."""
    model, data = config.model, config.data
    sources: dict[str, Any] = {}
    for together in (("train", "replay"), ("eval", "general")):
        taken = {source.name for key in together for source in getattr(data, key)}
        for key in together:
            sources[key] = ()
            for source in getattr(data, key):
                path, split = file_and_split(source.path)
                stems = [part.lstrip("./").split(".")[0] for part in reversed(Path(path).parts)]
                # part-*.jsonl -> part, d/*.csv -> d
                bare = (re.sub(r"[*?]+[-_]?|[-_][*?]+", "", stem) for stem in stems)
                stem = next(filter(None, bare), "data") + f"-{split}" * bool(split)
                name = source.name or next(n for i in count(1) if (n := stem + f"-{i}" * (i > 1)) not in taken)
                taken.add(name)
                sources[key] += (replace(source, name=name, format=source.format or data.format,
                                         fields=source.fields or data.fields,
                                         template=source.template or data.template),)
    return replace(config, run=replace(config.run, dir=config.run.dir or f"runs/{run_name}"),
                   data=replace(data, **sources, cache=data.cache or _default_cache()),
                   model=replace(model, init=model.init or ("pretrained" if model.path else ""),
                                 tokenizer=model.tokenizer or model.path))


def _default_cache() -> str:
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minisft")
