"""Files of many layouts become one thing, a `Conversation`; what cannot be trained on becomes a counted `Skipped`.

    bytes --records--> JSON objects --format--> drafts of turns --rules--> Conversation | Skipped

Nothing is guessed and nothing is lost in silence. The format is known by the fields of the first record, where exactly
one may match, and holds for the whole file. A record that is not JSON stops the run (or is counted, with `skip_bad`);
an array without its end always stops it, because nobody knows what else is missing. Text is never normalised.

The rules of a conversation, the same for every format: an optional system turn (dropped where blank), then user and
assistant by turns, starting with the user. What follows the last assistant turn has no answer and is cut off; every
other breach skips the whole record. A file is held in memory one record at a time (`.txt`: one document a file).
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minisft.data.records import SHORT, SUFFIXES, BadRecord, document, records
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

TOOL = "tool"
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("function_call", "observation", "tool", "function", "tool_call", "tool_response"), TOOL),
}
MESSAGES_ROLES = {
    "user": "user",
    "assistant": "assistant",
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "ipython"), TOOL),
}
WEIGHTS = ("weight", "loss_weight", "train")  # of a turn: 0 or 1
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Turn:
    role: str  # "system" | "user" | "assistant" | "text" (a plain document, alone in its conversation)
    content: str
    context: str = ""  # Alpaca's `input`, Dolly's `context`: the template says how it joins the instruction
    trained: bool = True  # False: this answer must not be trained on; only meaningful on assistant turns


@dataclass(frozen=True, slots=True)
class Conversation:
    turns: tuple[Turn, ...]
    source: str  # the path as the user gave it
    line: int  # of the record's first byte, from 1; an OASST tree or a seed task gives several on one line


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that is not trained on; counted by `reason`, a fixed phrase. `detail` is the value at fault, short."""

    reason: str
    detail: str
    source: str
    line: int


class _Skip(Exception):  # noqa: N818  (not an error: it carries a record's reason to the one place that counts it)
    def __init__(self, reason: str, value: Any):
        super().__init__(reason)
        self.reason, self.detail = reason, SHORT.repr(value)[:200]


def read(path, *, format: str = "auto", skip_bad: bool = False, oasst: str = "all") -> Iterator[Conversation | Skipped]:
    """The conversations of a .json, .jsonl, .ndjson or .txt file (or .gz of these), in the file's order.

    `skip_bad` turns broken JSON and invalid UTF-8 into `Skipped`. `oasst` "all" takes every path from the root to a
    leaf, "best" the one path of the lowest ranks; trees of any `tree_state` are taken, deleted messages never.
    Raises UserError, while iterating, for what the user can mend.
    """
    source = str(path)
    if format not in ("auto", *FORMATS):
        raise UserError(f"data.format: unknown format {format!r} (choices: auto, {', '.join(FORMATS)})")
    if oasst not in ("all", "best"):
        raise UserError(f"oasst: unknown choice {oasst!r} (choices: all, best)")
    opener = gzip.open if source.lower().endswith(".gz") else open
    try:
        with opener(source, "rb") as file:
            if not (name := source.lower().removesuffix(".gz")).endswith(SUFFIXES):
                raise UserError(f"{source}: unknown kind of file (known: {', '.join(SUFFIXES)}, and .gz of each)")
            found = document(file, source, format) if name.endswith(".txt") else records(file, source, skip_bad)
            for line, record in found:
                if isinstance(record, BadRecord):
                    yield Skipped(record.reason, record.detail, source, line)
                    continue
                if format == "auto":
                    format = _detect(record, source, line)
                yield from _conversations(record, format, oasst, source, line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source}: damaged or cut-off gzip file: {error} (remedy: fetch the file again)") from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{source}: {error.strerror} (remedy: name a file that can be read)") from error


# ---- records -> drafts of turns --------------------------------------------------------------------------------------


def _has_fields(record: dict, format: str) -> bool:
    return any(all(field in record for field in group) for group in FIELDS[format])


def _detect(record: dict, source: str, line: int) -> str:
    matches = [format for format in FORMATS if _has_fields(record, format)]
    if len(matches) == 1:
        return matches[0]
    known = "; ".join(f"{name}: {' or '.join(' + '.join(group) for group in FIELDS[name])}" for name in FORMATS)
    raise UserError(
        f"{source}:{line}: {'more than one format matches' if matches else 'no format matches'} a record with the "
        f"fields {', '.join(list(record)[:20]) or '(none)'}: {', '.join(matches) or 'none'} of [{known}] "
        f"(remedy: name the format with --data.format)"
    )


def _conversations(record: dict, format: str, oasst: str, source: str, line: int) -> Iterator[Conversation | Skipped]:
    try:
        drafts = _drafts(record, format, oasst)
    except _Skip as skip:
        yield Skipped(skip.reason, skip.detail, source, line)
        return
    for draft in drafts:  # each on its own: one bad instance of a task does not take the others with it
        try:
            found = Conversation(_checked(draft), source, line)
        except _Skip as skip:
            found = Skipped(skip.reason, skip.detail, source, line)
        yield found


def _drafts(record: dict, format: str, oasst: str) -> list[list[Turn]]:
    """The record's conversations as it states them: `_checked` has yet to look at their contents and order."""
    if not _has_fields(record, format):
        raise _Skip("wrong fields", list(record))
    match format:
        case "alpaca":
            return _alpaca(record)
        case "dolly":
            user = Turn("user", record["instruction"], _context(record, "context"))
            return [[user, Turn("assistant", record["response"])]]
        case "sharegpt":
            turns = _turns(record["conversations"], "from", "value", SHAREGPT_ROLES)
            _refuse_tools(record)
            return [[Turn("system", record.get("system")), *turns]]
        case "oasst":
            return _oasst_paths(record["prompt"], best=oasst == "best")
        case "messages":
            turns = _turns(record["messages"], "role", "content", MESSAGES_ROLES)
            _refuse_tools(record)
            return [turns]
        case "prompt_completion":
            return [_prompt_completion(record)]
        case "text":
            return [[Turn("text", record["text"])]]


def _alpaca(record: dict) -> list[list[Turn]]:
    history = record.get("history") or []  # LLaMA-Factory's: [[instruction, output], ...]; its answers are trained
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _Skip("wrong fields", history)
    tasks = [record] if "output" in record else record["instances"]
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise _Skip("wrong fields", tasks)
    if not tasks:
        raise _Skip("no turns", tasks)
    before = [Turn("system", record.get("system"))]
    for question, answer in history:
        before += [Turn("user", question), Turn("assistant", answer)]
    instruction = record["instruction"]
    return [
        [*before, Turn("user", instruction, _context(task, "input")), Turn("assistant", task.get("output"))]
        for task in tasks
    ]


def _prompt_completion(record: dict) -> list[Turn]:
    """Two strings, or TRL's conversational form: two lists of messages, of which the completion's are trained."""
    prompt, completion = record["prompt"], record["completion" if "completion" in record else "response"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return [Turn("user", prompt), Turn("assistant", completion)]
    given = _turns(prompt, "role", "content", MESSAGES_ROLES)
    answer = _turns(completion, "role", "content", MESSAGES_ROLES)
    _refuse_tools(record)
    if not answer:
        raise _Skip("no answer", completion)
    given = [Turn(turn.role, turn.content, trained=turn.trained and turn.role != "assistant") for turn in given]
    return given + answer


def _turns(items: Any, role_key: str, content_key: str, roles: dict[str, str]) -> list[Turn]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _Skip("wrong fields", items)
    turns = []
    for item in items:
        role = _role(item.get(role_key), roles)
        if role == TOOL or item.get("tool_calls") or item.get("function_call"):
            raise _Skip("tool turn (not supported yet)", item)
        turns.append(Turn(role, _joined(item.get(content_key)), trained=_trained(item)))
    return turns


def _role(name: Any, roles: dict[str, str]) -> str:
    if not isinstance(name, str) or name not in roles:
        raise _Skip("unknown role", name)
    return roles[name]


def _joined(content: Any) -> Any:
    """A list of text parts as one string; anything else as it is, for `_checked` to judge."""
    if not isinstance(content, list) or not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return content
    texts = [part.get("text", part.get("value")) for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _trained(item: dict) -> bool:
    if item.keys().isdisjoint(WEIGHTS):  # most often
        return True
    given = {key: item[key] for key in WEIGHTS if item.get(key) is not None}
    known = all(isinstance(weight, (int, float)) and weight in (0, 1) for weight in given.values())
    if not known or len(set(given.values())) > 1:
        raise _Skip("bad weight", given)
    return all(given.values())


def _context(record: dict, field: str) -> str:
    context = record.get(field)
    if not isinstance(context, str | None):
        raise _Skip("context is not text", context)
    return context or ""


def _refuse_tools(record: dict) -> None:
    """An answer written in view of tool definitions would teach the model to imagine them."""
    for tools in (record.get("tools"), record.get("functions")):
        if tools and tools != "[]":
            raise _Skip("tools (not supported yet)", tools)


def _oasst_paths(root: Any, *, best: bool) -> list[list[Turn]]:
    """Root-to-leaf paths in the tree's order, each cut after its last answer; two that are then the same are one.

    A stack of (message, way back), not recursion: JSON may nest a tree deeper than Python calls.
    """
    paths, ends, stack = [], set(), [(node, None) for node in _live([root])]
    while stack:
        here = stack.pop()
        if replies := _live(here[0].get("replies") or []):
            chosen = [min(replies, key=_rank)] if best else reversed(replies)
            stack += [(reply, here) for reply in chosen]
            continue
        end = here
        while end and end[0].get("role") != "assistant":
            end = end[1]
        if id(end and end[0]) in ends:
            continue
        ends.add(id(end and end[0]))
        path, step = [], end or here  # without any answer the whole path goes on, and is skipped for that reason
        while step:
            node, step = step
            path.append(Turn(_role(node.get("role"), OASST_ROLES), node.get("text")))
        paths.append(path[::-1])
    if not paths:
        raise _Skip("no turns", root)
    return paths


def _live(replies: Any) -> list[dict]:
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise _Skip("wrong fields", replies)
    return [reply for reply in replies if not reply.get("deleted")]


def _rank(reply: dict) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")


# ---- the rules of a conversation -------------------------------------------------------------------------------------


def _checked(turns: list[Turn]) -> tuple[Turn, ...]:
    turns = [turn for turn in turns if turn.role != "system" or not _blank(turn.content)]
    if not turns:
        raise _Skip("no turns", turns)
    if turns[0].role != "text":
        roles = [turn.role for turn in turns]
        if "assistant" not in roles:
            raise _Skip("no assistant turn", roles)
        while roles[-1] != "assistant":
            del turns[-1], roles[-1]
        if "system" in roles[1:]:
            raise _Skip("system turn in the middle", roles)
        if roles[roles[0] == "system"] == "assistant":
            raise _Skip("starts with the assistant", roles)
        if any(role == following for role, following in pairwise(roles)):
            raise _Skip("neighbouring turns of one role", roles)
    for turn in turns:
        answer = turn.role == "assistant"
        if _blank(turn.content):
            raise _Skip("no answer" if answer else "blank turn", turn.content)
        if not isinstance(turn.content, str):
            raise _Skip("answer is not text" if answer else "content is not text", turn.content)
    return tuple(turns)


def _blank(content: Any) -> bool:
    return content is None or (isinstance(content, str) and not content.strip())
