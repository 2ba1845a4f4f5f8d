"""What a run is given: keys of a recipe and of the command line, each with the place it came from, still unchecked.

    my.toml: optim.lr                 "optim.lr"      0.001
    command line: --data.train        "data.train"    ["a.jsonl", "b.jsonl"]

Values are what a recipe would hold. A recipe is data: nothing in it is ever executed.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import Field
from importlib import resources
from pathlib import Path
from typing import Any

from minisft.keys import accepted, from_text, nearest

Keys = Mapping[str, Field[Any]]  # "section.key" -> how it is declared
Given = tuple[str, str, Any]  # where, key, value

SHORT = {"--profile": "--run.profile=true"}


def shipped_recipes() -> dict[str, Any]:
    """Name -> file of the recipes that come with the package."""
    found = resources.files("minisft").joinpath("recipes").iterdir()
    return {entry.name.removesuffix(".toml"): entry for entry in sorted(found, key=lambda entry: entry.name)
            if entry.name.endswith(".toml")}


def on_command_line(argv: list[str], keys: Keys) -> tuple[str, list[Given], list[str]]:
    """-> recipe, what is given, problems."""
    recipe, given, wrong, left = None, {}, [], list(argv)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            if recipe is None and len(left) == len(argv) - 1:
                recipe = argument
            else:
                wrong.append(f"command line: unexpected {argument!r}; one recipe may be named, before the options")
            continue
        option, has_value, text = SHORT.get(argument, argument).partition("=")
        where, name = f"command line: {option}", option.removeprefix("--")
        # Also after an unknown option: its value is no second problem.
        if not has_value and left and not left[0].startswith("--"):
            has_value, text = "=", left.pop(0)
        if not option.startswith("--") or name not in keys:
            wrong.append(f"{where}: unknown option{nearest(name, keys, '--')}; --help lists them all")
        elif not has_value:
            wrong.append(f"{where}: the value is missing; expected {accepted(keys[name])}")
        elif name in given:
            wrong.append(f"{where}: given twice")
        else:
            given[name] = (where, name, from_text(text, keys[name].type))
    return "demo" if recipe is None else recipe, list(given.values()), wrong


def in_recipe(recipe: str, keys: Keys) -> tuple[str, list[Given] | None, list[str]]:
    """-> label for messages, what is given or None where it could not be read at all, problems."""
    shipped = shipped_recipes()
    if Path(recipe).is_file():
        label, file = recipe, Path(recipe)
    elif recipe in shipped:
        label, file = f"shipped recipe {recipe}", shipped[recipe]
    else:
        remedy = f"give a TOML file or a shipped recipe: {', '.join(shipped)}"
        return recipe, None, [f"command line: {recipe!r} is neither a file nor a shipped recipe; {remedy}"]
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # bad TOML, or not UTF-8
        return label, None, [f"{label}: not a TOML file: {error}"]
    given, wrong = [], []
    sections = list(dict.fromkeys(name.partition(".")[0] for name in keys))
    for section, content in table.items():
        if section in sections and isinstance(content, dict):
            given += [(f"{label}: {section}.{leaf}", f"{section}.{leaf}", value) for leaf, value in content.items()]
        elif section in sections:
            wrong.append(f"{label}: {section}: expected a section [{section}], got {content!r}")
        elif isinstance(content, dict):
            near = nearest(section, sections)
            wrong.append(f"{label}: {section}: unknown section{near}; sections are {', '.join(sections)}")
        else:
            wrong.append(f"{label}: {section}: unknown key outside a section{nearest(section, keys)}")
    wrong += [f"{where}: unknown key{nearest(name, keys)}; --help lists them all"
              for where, name, _ in given if name not in keys]
    return label, [entry for entry in given if entry[1] in keys], wrong
