"""Tools in records: which there are, what is called, what comes back, as different programs write them.

    ShareGPT  tools: '[{"name": ...}]'     {"from": "function_call", "value": '{"name": "f", "arguments": {...}}'}
    OpenAI    tools: [{"type": ...}]       {"role": "assistant", "tool_calls": [{"function": {"name": "f", ...}}]}
              functions: [{"name": ...}]   {"role": "assistant", "function_call": {"name": "f", "arguments": "{...}"}}

JSON is often found inside a string here. It is data and not text: it is read and written anew, the same way for every
source, so that the model sees one form. What is not JSON is never guessed at.
"""

import json
from typing import Any

from minisft.data.fields import Fields, parsed
from minisft.data.records import Skip

MAX_DEPTH = 64
CALL = frozenset(("id", "type", "index", "function"))
FUNCTION = frozenset(("name", "arguments", "parameters", "id", "type", "index"))


def definitions(record: dict[str, Any], fields: Fields) -> tuple[dict[str, Any], ...]:
    """What the record says of the tools that may be called. An empty list is none."""
    found: list[dict[str, Any]] = []
    for field in ("tools", "functions"):
        if (tools := parsed(record.get(field), "bad tools")) is None:
            continue
        if not isinstance(tools, list):
            raise Skip("bad tools", record[field])
        found += map(_definition, tools)
    if found:
        _text(found, "bad tools")
    return tuple(_bare(found, fields))


def _definition(tool: Any) -> dict[str, Any]:
    tool = parsed(tool, "bad tools") if isinstance(tool, str) else tool
    if not isinstance(tool, dict):
        raise Skip("bad tools", tool)
    tool = tool | {key: parsed(tool[key], "bad tools") for key in ("function", "parameters")
                   if isinstance(tool.get(key), str)}
    return tool | {"function": _definition(tool["function"])} if tool.get("function") else tool


def builtin(record: dict[str, Any]) -> tuple[str, ...]:
    """Names of the tools that the model knows by itself, as brave_search, wolfram_alpha, code_interpreter."""
    names = parsed(record.get("builtin_tools"), "bad tools") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Skip("bad tools", names)
    return tuple(names)


def call(value: Any, fields: Fields, where: str = "call.") -> tuple[str, str]:
    """(name of the function, its arguments as JSON text). `value`: one call, alone or in a list, or JSON text of it.

    Without arguments they are {}; those of Llama-3.1's own writing are called parameters.
    """
    found = parsed(value, "bad tool call")
    if isinstance(found, list):
        if len(found) > 1:
            raise Skip("several tool calls in one turn", value)
        found = parsed(found[0], "bad tool call")
    if isinstance(found, dict) and "function" in found:
        fields.look(found, CALL, where)
        found = parsed(found.get("function"), "bad tool call")
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise Skip("bad tool call", value)
    fields.look(found, FUNCTION, where)
    given = [arguments for key in ("arguments", "parameters")
             if (arguments := parsed(found.get(key), "bad tool call")) is not None]
    arguments = given[0] if given else {}
    if not isinstance(arguments, dict) or len(given) > 1 or not (given or found.keys() <= FUNCTION):
        raise Skip("bad tool call", value)
    _text(name, "bad tool call")
    _text(arguments, "bad tool call")
    return name, _text(_bare(arguments, fields), "bad tool call")


def result(content: Any) -> Any:
    """What a tool answered, as JSON text: a text becomes a JSON string. None, which is no result, stays None."""
    return None if content is None else _text(content, "bad tool result")


def _text(value: Any, reason: str) -> str:
    """JSON as Python and transformers write it. Inside a string JSON may hold what the file itself must not."""
    if _deep(value):
        raise Skip(reason, value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")  # half of a surrogate pair: no tokenizer could encode it
    except ValueError:
        raise Skip(reason, value) from None
    return text


def _deep(value: Any) -> bool:
    """Nested so deep that writing it, which is recursive, could end in an overflow of Python's stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if not level:
            return False
        level = [inner for item in level if isinstance(item, dict | list)
                 for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def _bare(value: Any, fields: Fields) -> Any:
    """`value` without fields that are null: datasets pads with them what other records have. Noted."""
    bare = _without_nulls(value)
    if bare != value:
        fields.notes.add("null fields of tools dropped")
    return bare


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value
