"""Tools in records: which exist, which is called, what it returns, as different programs write them.

    ShareGPT  tools: '[{"name": ...}]'     {"from": "function_call", "value": '{"name": "f", "arguments": {...}}'}
    OpenAI    tools: [{"type": ...}]       {"role": "assistant", "tool_calls": [{"function": {"name": "f", ...}}]}
              functions: [{"name": ...}]   {"role": "assistant", "function_call": {"name": "f", "arguments": "{...}"}}

Here JSON often stands inside a string. It is data, not text: it is parsed and written again, in one way for every
source, so that the model sees one form. What is not JSON is never guessed at.
"""

import json
from typing import Any

from minisft.data.conversation import Skip
from minisft.formats.fields import Fields, listed, parsed

MAX_DEPTH = 63  # deeper nesting could overflow Python's stack when it is written, which is recursive
CALL = frozenset(("id", "type", "index", "function"))
FUNCTION = frozenset(("name", "arguments", "parameters", "id", "type", "index"))


def definitions(record: dict[str, Any], fields: Fields) -> tuple[dict[str, Any], ...]:
    """The definitions of the functions that may be called; empty if the record has none."""
    found = [_definition(tool) for name in ("tools", "functions") if name in record
             for tool in listed(record[name], object, "bad tools")]
    return tuple(written(found, "bad tools", fields)[0]) if found else ()


def _definition(tool: Any, depth: int = MAX_DEPTH) -> dict[str, Any]:
    tool = parsed(tool, "bad tools") if isinstance(tool, str) else tool
    if not isinstance(tool, dict) or not depth:
        raise Skip("bad tools", tool)
    tool = tool | {key: parsed(tool[key], "bad tools") for key in ("function", "parameters")
                   if isinstance(tool.get(key), str)}
    return tool | {"function": _definition(tool["function"], depth - 1)} if tool.get("function") else tool


def call(value: Any, fields: Fields, where: str = "call.") -> tuple[str, str]:
    """(name of the function, its arguments as JSON text). `value`: one call, alone or in a list, or JSON text of it.

    No arguments are written {}. Llama-3.1's own form calls them parameters.
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
    written(name, "bad tool call")
    return name, written(arguments, "bad tool call", fields)[1]


def written(value: Any, reason: str, fields: Fields | None = None) -> tuple[Any, str]:
    """`value`, and its JSON text as Python and transformers write it.

    With `fields`, entries that are null are left out, and noted there: `datasets` pads with nulls what other records
    have. Raises Skip for what the file itself must not contain, but JSON inside a string may.
    """
    try:
        bare = _bare(value)
        text = json.dumps(bare if fields else value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")  # half of a surrogate pair: no tokenizer could encode it
    except (ValueError, RecursionError):
        raise Skip(reason, value) from None
    if fields and bare != value:
        fields.notes.add("null fields of tools dropped")
    return bare, text


def _bare(value: Any, depth: int = MAX_DEPTH) -> Any:
    if not depth:
        raise RecursionError
    if isinstance(value, dict):
        return {key: _bare(inner, depth - 1) for key, inner in value.items() if inner is not None}
    return [_bare(inner, depth - 1) for inner in value] if isinstance(value, list) else value
