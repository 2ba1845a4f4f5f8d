"""Files of many layouts become one thing, a `Conversation`; what cannot be trained on becomes a counted `Skipped`.

    bytes --records--> JSON objects --format--> drafts of turns --rules--> Conversation | Skipped

Nothing is guessed and nothing is lost in silence. The format is known by the fields of the first record, where exactly
one may match, and holds for the whole file. A record that is not JSON stops the run (or is counted, with `skip_bad`);
an array without its end always stops it, because nobody knows what else is missing. Text is never normalised.

What a format states is a draft, which `conversation.checked` has yet to look at. A file is held in memory one record at
a time (`.txt`: one document a file).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisft.data import fields as of
from minisft.data.conversation import ANSWERS, Conversation, Skipped, Turn, checked
from minisft.data.fields import WEIGHTS, Fields, is_empty, is_trained, parsed, shown
from minisft.data.records import SUFFIXES, BadRecord, Skip, document, open_data, records
from minisft.data.tools import builtin, call, definitions, result
from minisft.errors import UserError

# The fields that tell a format; several groups are alternatives. A record may have more fields than these.
FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "alpaca": (("instruction", "output"), ("instruction", "instances")),  # the second: Self-Instruct's seed tasks
    "dolly": (("instruction", "response"),),
    "sharegpt": (("conversations",),),
    "oasst": (("message_tree_id", "prompt"),),
    "messages": (("messages",),),
    "prompt_completion": (("prompt", "completion"), ("prompt", "response")),
    "text": (("text",),),
}
FORMATS = tuple(FIELDS)

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response"), "result"),
}
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
WITH_TOOLS = ("sharegpt", "messages", "prompt_completion")  # elsewhere tools leave a record out

MAX_CHARACTERS = 1 << 22  # of the conversations of one record after the first: each repeats what came before it
TURN_CHARACTERS = 16  # what a turn costs besides its text


def read(path: str | Path, *, format: str = "auto", skip_bad: bool = False, oasst: str = "all",
         fields: Fields | None = None) -> Iterator[Conversation | Skipped]:
    """The conversations of a .json, .jsonl, .ndjson or .txt file (or .gz of these), in the file's order.

    `skip_bad` turns broken JSON and invalid UTF-8 into `Skipped`. `oasst` "all" takes every path from the root to a
    leaf, "best" the one path of the lowest ranks; trees of any `tree_state` are taken, deleted messages never.
    `fields` counts what nothing reads. Raises UserError, while iterating, for what the user can mend.
    """
    source, fields = str(path), fields or Fields()
    if format not in ("auto", *FORMATS):
        raise UserError(f"data.format: unknown format {format!r} (choices: auto, {', '.join(FORMATS)})")
    if oasst not in ("all", "best"):
        raise UserError(f"oasst: unknown choice {oasst!r} (choices: all, best)")
    name = source.lower().removesuffix(".gz")
    with open_data(source, json_expected=not skip_bad and not name.endswith(".txt")) as file:
        if not name.endswith(SUFFIXES):
            raise UserError(f"{source}: unknown kind of file (known: {', '.join(SUFFIXES)}, and .gz of each; "
                            "remedy: rename the file if it is JSON, or else convert it to JSON lines)")
        found = document(file, source, format) if name.endswith(".txt") else records(file, source, skip_bad)
        for line, record in found:
            if isinstance(record, BadRecord):
                yield Skipped(record.reason, record.detail, source, line)
                continue
            fields.drop_ignored(record)
            if format == "auto":
                format = _detect(record, source, line)
            yield from _conversations(record, format, oasst, fields, source, line)
            fields.end_record()


# ---- records -> drafts of turns --------------------------------------------------------------------------------------


def _has_fields(record: dict[str, Any], format: str) -> bool:
    return any(all(field in record for field in group) for group in FIELDS[format])


def _detect(record: dict[str, Any], source: str, line: int) -> str:
    filled = {name: value for name, value in record.items() if value is not None}  # the others may be padding
    matches = [[name for name in FORMATS if _has_fields(fields, name)] for fields in (filled, record)]
    for found in matches:
        if len(found) == 1:
            return found[0]
    known = "; ".join(f"{name}: {' or '.join(' + '.join(group) for group in FIELDS[name])}" for name in FORMATS)
    fields = ", ".join(map(shown, list(record)[:20])) or "(none)"
    raise UserError(
        f"{source}:{line}: {'more than one format matches' if matches[1] else 'no format matches'} a record with the "
        f"fields {fields}: {', '.join(matches[1]) or 'none'} of [{known}] (remedy: "
        + (f"name the format with --data.format {matches[1][0]}" if matches[1] else _remedy(record)) + ")"
    )


def _remedy(record: dict[str, Any]) -> str:
    """What helps where no format has the fields of the first record."""
    lists = [name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists and len(lists) == len([value for value in record.values() if isinstance(value, list | dict)]):
        splits = ", ".join(f"{shown(name)} ({len(record[name])} records)" for name in lists)
        return (f"the file is one object with lists of records, {splits}; write one to a file of its own: python "
                f"-c \"import json; print(json.dumps(json.load(open('FILE'))['{shown(lists[0])}']))\" > NEW.json")
    if {"chosen", "preferred_output"} & record.keys():
        return ("these are preferences, and minisft trains on answers only: write the question to a field prompt and "
                "the preferred answer to a field completion")
    texts = [shown(name) for name, value in record.items() if isinstance(value, str)]
    one, other = texts if len(texts) == 2 else ("QUESTION", "ANSWER")
    return ("rename the fields, as in sed -e 's/\"" + one + "\" *:/\"prompt\":/g' -e 's/\"" + other
            + "\" *:/\"completion\":/g' FILE > NEW.jsonl")


def _conversations(record: dict[str, Any], format: str, oasst: str, fields: Fields, source: str,
                   line: int) -> Iterator[Conversation | Skipped]:
    given: tuple[Any, Any] = ((), ())
    try:
        if not _has_fields(record, format):
            raise Skip("wrong fields", list(record))
        fields.look(record, of.READ[format])
        if not is_trained(record):
            raise Skip("marked as not trained", {name: value for name, value in record.items() if name in WEIGHTS})
        drafts = _drafts(record, format, oasst, fields)
        if format in WITH_TOOLS:
            given = (definitions(record, fields), builtin(record))
    except Skip as skip:
        yield Skipped(skip.reason, skip.detail, source, line)
        return
    characters = 0
    for i, draft in enumerate(drafts):  # each on its own: one bad instance of a task does not take the others with it
        characters += sum(map(_size, draft)) if i else 0
        if characters > MAX_CHARACTERS:
            yield Skipped(f"more conversations of one record than {MAX_CHARACTERS:,} characters hold",
                          f"after {i}", source, line)
            return
        try:
            turns, notes = checked(draft)
        except Skip as skip:
            yield Skipped(skip.reason, skip.detail, source, line)
        else:
            yield Conversation(turns, source, line, *given, (*notes, *sorted(fields.notes)))


def _size(turn: Turn) -> int:
    return TURN_CHARACTERS + len(turn.context) + (len(turn.content) if isinstance(turn.content, str) else 0)


def _drafts(record: dict[str, Any], format: str, oasst: str, fields: Fields) -> Iterable[list[Turn]]:
    """The record's conversations as it states them: `checked` has yet to look at their contents and order."""
    match format:
        case "alpaca":
            return _alpaca(record, fields)
        case "dolly":
            user = Turn("user", record["instruction"], _context(record))
            return [[_system(record), *_history(record), user, Turn("assistant", record["response"])]]
        case "sharegpt" | "messages":
            field = FIELDS[format][0][0]
            return [[_system(record), *_turns(record[field], fields, f"{field}[].")]]
        case "oasst":
            return _oasst_paths(record["prompt"], fields, best=oasst == "best")
        case "prompt_completion":
            return [[_system(record), *_history(record), *_prompt_completion(record, fields)]]
        case _:  # text
            return [[Turn("text", record["text"])]]


def _system(record: dict[str, Any]) -> Turn:
    """The system turn that stands beside the others; a blank one is none."""
    texts = [record[name] for name in of.SYSTEMS if name in record if not is_empty(record[name])]
    if any(text != texts[0] for text in texts):
        raise Skip("several system texts", texts)
    return Turn("system", texts[0] if texts else "")


def _history(record: dict[str, Any]) -> list[Turn]:
    """LLaMA-Factory's [[instruction, output], ...]; its answers are trained."""
    history, turns = parsed(record.get("history"), "wrong fields") or [], []
    for pair in history if isinstance(history, list) else [history]:
        pair = parsed(pair, "wrong fields")
        if not isinstance(pair, list) or len(pair) != 2:
            raise Skip("wrong fields", history)
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _alpaca(record: dict[str, Any], fields: Fields) -> Iterator[list[Turn]]:
    tasks = [record] if "output" in record else parsed(record["instances"], "wrong fields") or []
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise Skip("wrong fields", tasks)
    if not tasks:
        raise Skip("no turns", tasks)
    if "output" not in record:
        for task in tasks:
            fields.look(task, of.TASK, "instances[].")
    before, instruction = [_system(record), *_history(record)], record["instruction"]
    contexts = list(map(_context, tasks))
    return ([*before, Turn("user", instruction, context), Turn("assistant", task.get("output"))]
            for task, context in zip(tasks, contexts, strict=True))


def _prompt_completion(record: dict[str, Any], fields: Fields) -> list[Turn]:
    """Two strings, or TRL's conversational form: two lists of messages, of which the completion's are trained."""
    name = "completion" if "completion" in record else "response"
    prompt, completion = record["prompt"], record[name]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return [Turn("user", prompt), Turn("assistant", completion)]
    given = _turns(prompt, fields, "prompt[].")
    answer = _turns(completion, fields, f"{name}[].")
    if not answer:
        raise Skip("no answer", completion)
    return [replace(turn, trained=turn.trained and turn.role not in ANSWERS) for turn in given] + answer


def _turns(items: Any, fields: Fields, where: str) -> list[Turn]:
    items, turns = parsed(items, "wrong fields") or [], []
    for item in items if isinstance(items, list) else [items]:
        item = parsed(item, "wrong fields") if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise Skip("wrong fields", items)
        role, content = _role(_either(item, "role", "from"), ROLES), _either(item, "content", "value")
        said, beside, tool, trained = None, "", "", True
        if len(item) > 2 or content is None:  # seldom: most turns have a role and a content
            fields.look(item, of.OF_ROLE.get(role, of.TURN), where)
            said, trained = _called(item) if role == "assistant" else None, is_trained(item)
            if role not in ANSWERS and trained and not all(is_empty(item[name]) for name in WEIGHTS & item.keys()):
                fields.notes.add("a turn that is no answer is marked as trained; only data.train_on = all trains it")
        if isinstance(content, list):
            content = _joined(content)
        if said:
            if not isinstance(content, str | None):
                raise Skip("answer is not text", content)
            role, beside, content = "call", (content or "").strip(), said
        if role == "call":
            tool, content = call(content, fields, f"{where}call.")
        elif role == "result":
            content = result(content)
        turns.append(Turn(role, content, beside, trained, tool))
    return turns


def _either(item: dict[str, Any], one: str, other: str) -> Any:
    """What an item has under one of two names; the other may be null, as padding."""
    value = item.get(one)
    if value is None:
        return item.get(other)
    if item.get(other) is not None:
        raise Skip("wrong fields", item)
    return value


def _called(item: dict[str, Any]) -> Any:
    """The calls of an assistant's message; None where it has none."""
    said = [call for name in ("tool_calls", "function_call") if name in item
            if (call := parsed(item[name], "bad tool call"))]
    if len(said) > 1:
        raise Skip("several tool calls in one turn", said)
    return said[0] if said else None


def _role(name: Any, roles: dict[str, str]) -> str:
    if not isinstance(name, str) or name not in roles:
        raise Skip("unknown role", name)
    return roles[name]


def _joined(content: list[Any]) -> Any:
    """A list of text parts as one string; any other as it is, for `checked` to judge."""
    if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return content
    texts = [part.get("text", part.get("value")) for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _context(record: dict[str, Any]) -> str:
    given = [record[name] for name in ("input", "context") if record.get(name) not in (None, "")]
    if not all(isinstance(context, str) for context in given):
        raise Skip("context is not text", given)
    if len(given) > 1:
        raise Skip("both input and context", given)
    return given[0] if given else ""


@dataclass(frozen=True, slots=True)
class Way:
    """A message of a tree and the way back from it to the root."""

    message: dict[str, Any]
    before: "Way | None"

    def back(self) -> Iterator["Way"]:
        """This one, the one before it, and so on to the root."""
        way: Way | None = self
        while way:
            yield way
            way = way.before


def _oasst_paths(root: Any, fields: Fields, *, best: bool) -> Iterator[list[Turn]]:
    """Root-to-leaf paths in the tree's order, each cut after its last answer; two that are then the same are one.

    A stack, not recursion: JSON may nest a tree deeper than Python calls. The whole tree is looked at before the first
    path is made.
    """
    ends: dict[int, Way] = {}
    stack = [Way(node, None) for node in _live([root])]
    if not stack:
        raise Skip("no turns", root)
    while stack:
        here = stack.pop()
        fields.look(here.message, of.MESSAGE, "replies[].")
        _role(here.message.get("role"), OASST_ROLES)
        if replies := _live(here.message.get("replies") or []):
            stack += [Way(reply, here) for reply in ([min(replies, key=_rank)] if best else reversed(replies))]
            continue
        # Without any answer the whole path goes on, and is skipped for that reason.
        end = next((way for way in here.back() if way.message.get("role") == "assistant"), None)
        ends.setdefault(id(end and end.message), end or here)
    return ([Turn(OASST_ROLES[way.message["role"]], way.message.get("text", "")) for way in end.back()][::-1]
            for end in ends.values())


def _live(replies: Any) -> list[dict[str, Any]]:
    replies = parsed(replies, "wrong fields") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise Skip("wrong fields", replies)
    return [reply for reply in replies if not reply.get("deleted")]


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")
