"""Tools in records: which there are, what is called, what comes back, as different programs write them.

    ShareGPT  tools: '[{"name": ...}]'     {"from": "function_call", "value": '{"name": "f", "arguments": {...}}'}
    OpenAI    tools: [{"type": ...}]       {"role": "assistant", "tool_calls": [{"function": {"name": "f", ...}}]}
              functions: [{"name": ...}]   {"role": "assistant", "function_call": {"name": "f", "arguments": "{...}"}}

JSON is often found inside a string here. It is data and not text: it is read and written anew, the same way for every
source, so that the model sees one form. What is not JSON is never guessed at.
"""

import json
from typing import Any

from minisft.data.records import Skip

MAX_DEPTH = 64


def definitions(record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """What the record says of the tools that may be called. An empty list is none."""
    found: list[dict[str, Any]] = []
    for field in ("tools", "functions"):
        tools = _parsed(value := record.get(field), "bad tools") if record.get(field) else []
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise Skip("bad tools", value)
        found += tools
    if found:
        _text(found, "bad tools")
    return tuple(found)


def builtin(record: dict[str, Any]) -> tuple[str, ...]:
    """Names of the tools that the model knows by itself, as brave_search, wolfram_alpha, code_interpreter."""
    names = record.get("builtin_tools") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Skip("bad tools", names)
    return tuple(names)


def call(value: Any) -> tuple[str, str]:
    """(name of the function, its arguments as JSON text). `value`: one call, alone or in a list, or JSON text of it."""
    found = _parsed(value, "bad tool call")
    if isinstance(found, list):
        if len(found) > 1:
            raise Skip("several tool calls in one turn", value)
        found = found[0] if found else None
    found = found.get("function", found) if isinstance(found, dict) else {}
    name = found.get("name") if isinstance(found, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise Skip("bad tool call", value)
    arguments = _parsed(found.get("arguments"), "bad tool call")
    if not isinstance(arguments, dict):
        raise Skip("bad tool call", value)
    _text(name, "bad tool call")
    return name, _text(arguments, "bad tool call")


def result(content: Any) -> Any:
    """What a tool answered, as JSON text: a text becomes a JSON string. None, which is no result, stays None."""
    return None if content is None else _text(content, "bad tool result")


def _parsed(value: Any, reason: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise Skip(reason, value) from None


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
