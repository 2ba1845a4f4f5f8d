"""The fields of a record, a turn or a tool call: which are read, which change the meaning, which nothing reads.

Any program may add fields of its own. Most are labels for people, but some turn a record into something else: an
answer marked as bad, a picture that the question is about. So no field is dropped silently:

    read                 by the format (parse.py)
    changes the meaning  known here but not read: the record is left out, and counted under the field's name
    unknown              counted by name, and listed by `minisft prepare`, by `minisft show` and when a run starts

Fields that `data.ignore` names count as absent, whichever of the three they are. Tools are written in several ways:

    ShareGPT  tools: '[{"name": ...}]'     {"from": "function_call", "value": '{"name": "f", "arguments": {...}}'}
    OpenAI    tools: [{"type": ...}]       {"role": "assistant", "tool_calls": [{"function": {"name": "f", ...}}]}
              functions: [{"name": ...}]   {"role": "assistant", "function_call": {"name": "f", "arguments": "{...}"}}

The JSON inside of strings is data, not text: it is parsed and written again, in one way for every source.
"""

import difflib
import json
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from minisft.data.conversation import Skip
from minisft.errors import SHORT, UserError
from minisft.formats.records import WITH_NAN, from_json

SYSTEMS = ("system", "system_prompt", "system_message")
GRADED = frozenset(("weight", "loss_weight"))  # weights in the loss: 0, or a number in RANGE
WEIGHTS = GRADED | {"loss", "loss_mask", "train", "training", "trainable"}  # the others are 0 or 1
RANGE = (1e-12, 1e12)  # so that products and sums of weights neither overflow nor vanish, in fp32 too
# Fields that are read, or that a format defines as labels for people: of a record, a turn, a task, an OASST message.
RECORD = WEIGHTS | set(SYSTEMS)
TOOLS = RECORD | {"tools", "functions", "builtin_tools"}
READ = {
    "alpaca": RECORD | {"instruction", "input", "context", "output", "instances", "history"},
    "dolly": RECORD | {"instruction", "input", "context", "response", "history", "category"},
    "sharegpt": TOOLS | {"conversations"},
    "oasst": WEIGHTS | {"message_tree_id", "tree_state", "prompt", "origin"},
    "messages": TOOLS | {"messages"},
    "prompt_completion": TOOLS | {"prompt", "completion", "response", "history"},
    "text": WEIGHTS | {"text"},
}
TURN = WEIGHTS | {"role", "content", "from", "value"}
OF_ROLE = {"assistant": TURN | {"tool_calls", "function_call"}, "result": TURN | {"tool_call_id", "name"}}
PART = frozenset(("type", "text", "value"))  # of a content that is a list
TASK = frozenset(("input", "context", "output"))
MESSAGE = frozenset((
    *("text", "role", "replies", "rank", "deleted", "message_id", "parent_id", "user_id", "message_tree_id"),
    *("tree_state", "created_date", "lang", "emojis", "labels", "review_count", "review_result", "synthetic"),
    *("model_name", "detoxify", "events"),
))
# Known to change what a record means. If they are not read, the record is left out.
CHANGES = frozenset((
    *SYSTEMS, *WEIGHTS, "mask", "masked", "train_detail", "training_detail", "history", "arguments",
    *("chosen", "rejected", "rejected_response", "rejected_messages", "preferred_output", "non_preferred_output"),
    *("image", "images", "image_url", "video", "videos", "audio", "audios", "input_audio"),
    *("reasoning", "reasoning_content", "reasoning_details", "thinking", "thought", "thoughts", "chain_of_thought"),
    *("tools", "functions", "builtin_tools", "tool_calls", "function_call"),
))
EMPTY = ("", "null", "[]", "{}")
MAX_NAMES = 200  # names that are counted apart; more would be keys of data, not names of fields
OTHERS = "(other names)"
MAX_DEPTH = 63  # deeper nesting could overflow Python's stack when it is written, which is recursive
CALL = frozenset(("id", "type", "index", "function"))
FUNCTION = frozenset(("name", "arguments", "parameters", "id", "type", "index"))


class Fields:
    """The fields of one file that nothing reads, counted in `unread`: name -> records."""

    def __init__(self, ignored: Iterable[str] = (), unread: dict[str, int] | None = None):
        self.ignored, self.unread = frozenset(ignored), {} if unread is None else unread
        self.notes: set[str] = set()  # changes made to this record, in addition to those of its turns
        self._names: set[str] = set()  # unread fields of this record

    def look(self, item: dict[str, Any], known: frozenset[str], where: str = "") -> None:
        """Note the fields of `item` that are not `known`, named after `where` they are. Raises Skip for a field that
        changes the meaning."""
        for name in self.ignored:
            item.pop(name, None)
        if item.keys() <= known:  # most often
            return
        for name, value in item.items():
            if name in known or is_empty(value):
                continue
            if name == "label" and (good := flag(value)) is not None:  # of preferences: is it a good answer?
                if not good:
                    raise Skip("label says that the answer is bad", value)
            elif name in CHANGES:
                raise Skip(f"{where}{name} changes the meaning and is not read (--data.ignore {name} takes the record "
                           "without it)", value)
            else:
                self._names.add(where + shown(name))

    def end_record(self) -> None:
        """Count what was noted; a name counts once a record."""
        for name in sorted(self._names):
            name = name if name in self.unread or len(self.unread) < MAX_NAMES else OTHERS
            self.unread[name] = self.unread.get(name, 0) + 1
        self._names.clear()
        self.notes.clear()


class Columns:
    """The columns of a source under the names of a format's fields, as data.fields maps them: (field, column) pairs."""

    def __init__(self, mapping: Iterable[tuple[str, str]] = ()):
        self.mapping = tuple(mapping)
        self.absent = dict(self.mapping)  # those whose column no record had so far
        self._seen: dict[str, None] = {}  # columns of the records so far

    def mapped(self, record: dict[str, Any]) -> dict[str, Any]:
        """`record` under the names of fields. A column has the name that is mapped, or one that differs only in its
        Unicode form and in blanks around it. Columns that a mapped field displaces keep a name that nothing reads."""
        if not self.mapping:
            return record
        if len(self._seen) < MAX_NAMES:
            self._seen.update(dict.fromkeys(record))
        names = {_plain(name): name for name in record}
        found = {field: name for field, column in self.mapping
                 if (name := column if column in record else names.get(_plain(column))) is not None}
        self.absent = {field: column for field, column in self.absent.items() if field not in found}
        rest = {f"{name} (displaced)" if name in found else name: value
                for name, value in record.items() if name not in found.values()}
        return {field: record[name] for field, name in found.items()} | rest

    def check_fields(self, format: str, field: str) -> None:
        """Raise UserError if a column is mapped to a field that `format`, which has `field`, does not read."""
        if wrong := [field for field, _ in self.mapping if field not in READ[format]]:
            raise UserError(f"data.fields: format {format} reads no field {shown(wrong[0])} (remedy: map a column to "
                            f"one of {', '.join(sorted(READ[format] - WEIGHTS))}; if the columns are those of other "
                            f'sources, put fields = {{{field} = "{field}"}} in the table of this one)')

    def check_columns(self, where: str) -> None:
        """Raise UserError if a mapped column is in none of the records so far; it names the nearest columns first."""
        for field, column in self.absent.items() if self._seen else ():
            near = sorted(self._seen, key=lambda name: -difflib.SequenceMatcher(
                None, _plain(name).casefold()[:80], _plain(column).casefold()[:80]).ratio())
            raise UserError(f"{where}: data.fields says that {shown(field)} is the column {SHORT.repr(column)}, which "
                            f"no record so far has; the columns are {', '.join(map(SHORT.repr, near[:20]))} (remedy: "
                            "name one of these, or give this source fields of its own)")


def _plain(name: str) -> str:
    """A column's name to be compared: composed, and without the blanks around it."""
    return unicodedata.normalize("NFC", name).strip()


def shown(name: str) -> str:
    """A field's name, safe to print: short, and without control characters that steer a terminal."""
    return name if name.isidentifier() and len(name) <= 60 else SHORT.repr(name)


def is_empty(value: Any) -> bool:
    """True for None, and for the other ways in which programs write that there is nothing."""
    return value is None or value in ([], {}) or (isinstance(value, str) and value.strip() in EMPTY)


def parsed(value: Any, reason: str = "wrong fields") -> Any:
    """`value`, parsed if it is JSON text; None if it is empty. Raises Skip, with `reason`, for other text."""
    if is_empty(value):
        return None
    try:
        return from_json(value, WITH_NAN) if isinstance(value, str) else value
    except UnicodeEncodeError:
        raise Skip("half of a surrogate pair in JSON text", value) from None
    except (ValueError, RecursionError):
        raise Skip(reason, value) from None


def listed(value: Any, kind: type, reason: str = "wrong fields") -> list[Any]:
    """A list of `kind`, which may be JSON text; [] if it is empty. Raises Skip, with `reason`, for anything else."""
    if not (items := parsed(value, reason)):
        return []
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise Skip(reason, items)
    return items


def number(value: Any) -> Any:
    """`value`, or the number that it is the text of: cells of CSV are text."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def flag(value: Any) -> bool | None:
    """True or False for 1 or 0, true or false, also as text; None for anything else."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), number(value))
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def loss_weight(item: dict[str, Any]) -> float:
    """The weight of a record or a turn in the loss; 1 if it has none. Raises Skip for one that is out of range, and if
    two contradict each other."""
    if item.keys().isdisjoint(WEIGHTS):  # most often
        return 1.0
    given = {name: value for name, value in item.items() if name in WEIGHTS and value not in (None, "", " ", "null")}
    weights: dict[str, float] = {}
    for name, value in given.items():
        weight = number(value) if (on := flag(value)) is None and name in GRADED else on
        if not (isinstance(weight, int | float) and (weight == 0 or RANGE[0] <= weight <= RANGE[1])):
            allowed = f"0 or a number from {RANGE[0]:g} to {RANGE[1]:g}" if name in GRADED else "0 or 1"
            raise Skip(f"{name} is not {allowed} (--data.ignore {name} takes the record without it)", {name: value})
        weights[name] = float(weight)
    graded = {weights[name] for name in GRADED & weights.keys()}
    if len(graded) > 1 or len({weight > 0 for weight in weights.values()}) > 1:
        names = " and ".join(sorted(given))
        raise Skip(f"{names} contradict each other (remedy: --data.ignore with one of them)", given)
    return next(iter(graded), min(weights.values(), default=1.0))


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
    """(name of the function, its arguments as JSON text). `value`: one call, alone or in a list, or JSON text of it. No
    arguments are written {}. Llama-3.1's own form calls them parameters."""
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
    """`value`, and its JSON text as Python and transformers write it. With `fields`, entries that are null are left
    out, and noted there: `datasets` pads with nulls what other records have. Raises Skip for what the file itself must
    not contain, but JSON inside a string may."""
    try:
        bare = _bare(value)
        text = json.dumps(bare if fields else value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")  # half of a surrogate pair: no tokenizer could encode it
    except (ValueError, TypeError, RecursionError):  # a date in a table's column is no JSON, either
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
