"""Chat templates, and how they are read from TOML.

Templates are data (templates.toml): what comes before and after the content of each role, and how tools are shown. A
model's own Jinja is a program from the network and is never executed. A template that says nothing about tools does not
know them; a conversation with tools is then left out, because rendering it would be a guess.
"""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minisft.data.conversation import Conversation, Turn
from minisft.errors import UserError
from minisft.files import read_small

TOOLS = ("call", "result", "tools_user")  # these belong together,
BUILTIN = ("builtin_system", "builtin_call", "builtin_stop")  # and so do these
CALL = ("{name}", "{arguments}")
PLACEHOLDERS = {"context": ("{content}", "{context}"), "call": CALL, "builtin_call": CALL}


@dataclass(frozen=True)
class Template:
    """How conversations look to the model; templates.toml explains the fields."""

    name: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str, str]
    begin: str = ""
    document_end: str = ""
    trim: bool = False
    system_prefix: str = ""
    default_system: str | None = None
    default_system_context: str | None = None
    context: str = "{content}\n{context}"
    result: tuple[str, str] = ("", "")
    call: str = ""
    tools_system: str = ""
    tools_user: tuple[str, str] = ("", "")
    builtin_system: tuple[str, str] = ("", "")
    builtin_call: str = ""
    builtin_stop: str = ""

    def turns(self, conversation: Conversation) -> tuple[Turn, ...]:
        """The turns as rendered: with the default system turn if they have none of their own."""
        turns, default = conversation.turns, self.default_system
        if turns[0].context and self.default_system_context is not None:
            default = self.default_system_context
        return turns if turns[0].role == "system" or default is None else (Turn("system", default), *turns)

    def content(self, turn: Turn) -> str:
        """A turn's text, joined with its context."""
        text = turn.content
        if turn.context:
            text = re.sub(r"\{(content|context)\}", lambda field: getattr(turn, field[1]), self.context)
        text = text.strip() if self.trim else text
        return self.system_prefix + text if turn.role == "system" else text


def load_templates(path: str | Path | None = None) -> dict[str, Template]:
    """The shipped templates, and those of the TOML file `path`. Raises UserError for a mistake in that file."""
    shipped = Path(__file__).with_name("templates.toml")
    templates = _parse(shipped.read_text(encoding="utf-8"), shipped.name)
    if path:
        try:
            templates |= _parse(read_small(path), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: data.templates cannot be read: {error}") from None
    return templates


def _parse(text: str, file: str) -> dict[str, Template]:
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # bad TOML, a number of 5,000 digits, nested too deep
        raise UserError(f"{file}: not TOML: {error}") from None
    known = {field.name: str(field.type) for field in fields(Template) if field.name != "name"}
    templates = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{file}: {name}: expected a table [{name}] with the fields {', '.join(known)}")
        where = f"{file}: [{name}]"
        if unknown := [key for key in table if key not in known]:
            raise UserError(f"{where} {unknown[0]}: unknown; the fields are {', '.join(known)}")
        values = {key: _value(f"{where} {key}", key, value, known[key]) for key, value in table.items()}
        needed = ["system", "user", "assistant", *(TOOLS if values.keys() & {*TOOLS, *BUILTIN, "tools_system"} else ()),
                  *(BUILTIN if values.keys() & set(BUILTIN) else ())]
        if missing := [key for key in needed if key not in values]:
            raise UserError(f"{where}: {', '.join(missing)} missing")
        if not values["assistant"][1]:
            raise UserError(f"{where} assistant: nothing ends the answer, so the model would never stop; "
                            "give the stop token as the second item")
        if values.keys() & {"tools_system", "builtin_system"} and "default_system" not in values:
            raise UserError(f"{where}: default_system missing: the system turn, which describes the tools, must be "
                            "there")
        templates[name] = Template(name=name, **values)
    return templates


def _value(where: str, key: str, value: Any, kind: str) -> Any:
    if kind.startswith("tuple"):
        sizes = (2, 3) if key == "assistant" else (2,)
        if not (isinstance(value, list) and len(value) in sizes and all(isinstance(v, str) for v in value)):
            form = "[before, stop token] or [before, stop token, after]" if key == "assistant" else "[before, after]"
            raise UserError(f"{where}: expected {form}, all strings; found {value!r}")
        return (*value, "") if key == "assistant" and len(value) == 2 else tuple(value)
    if not isinstance(value, bool if key == "trim" else str):
        raise UserError(f"{where}: expected {'true or false' if key == 'trim' else 'a string'}; found {value!r}")
    holders = PLACEHOLDERS.get(key, ())
    if not all(holder in str(value) for holder in holders):
        raise UserError(f"{where}: must contain {' and '.join(holders)}; found {value!r}")
    return value
