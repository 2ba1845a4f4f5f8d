"""Files of many layouts become one thing, a `Conversation`; what cannot be trained on becomes a counted `Skipped`.

    bytes --records--> JSON objects --format--> drafts of turns --rules--> Conversation | Skipped

Nothing is guessed and nothing is lost in silence. The format is known by the fields of the first record, where exactly
one may match, and holds for the whole file. A record that is not JSON stops the run (or is counted, with `skip_bad`);
an array without its end always stops it, because nobody knows what else is missing. Text is never normalised.

What a format states is a draft, which `conversation.checked` has yet to look at. A file is held in memory one record at
a time (`.txt`: one document a file).
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisft.data.conversation import ANSWERS, Conversation, Skipped, Turn, checked
from minisft.data.records import SUFFIXES, BadRecord, Skip, document, records
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

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "tool", "function", "tool_response"), "result"),
}
MESSAGES_ROLES = {
    "user": "user",
    "assistant": "assistant",
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "ipython"), "result"),
}
WEIGHTS = ("weight", "loss_weight", "train")  # of a turn: 0 or 1
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
WITH_TOOLS = ("sharegpt", "messages", "prompt_completion")  # elsewhere a field "tools" means something else

def read(path: str | Path, *, format: str = "auto", skip_bad: bool = False,
         oasst: str = "all") -> Iterator[Conversation | Skipped]:
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


def _has_fields(record: dict[str, Any], format: str) -> bool:
    return any(all(field in record for field in group) for group in FIELDS[format])


def _detect(record: dict[str, Any], source: str, line: int) -> str:
    matches = [format for format in FORMATS if _has_fields(record, format)]
    if len(matches) == 1:
        return matches[0]
    known = "; ".join(f"{name}: {' or '.join(' + '.join(group) for group in FIELDS[name])}" for name in FORMATS)
    raise UserError(
        f"{source}:{line}: {'more than one format matches' if matches else 'no format matches'} a record with the "
        f"fields {', '.join(list(record)[:20]) or '(none)'}: {', '.join(matches) or 'none'} of [{known}] "
        f"(remedy: name the format with --data.format)"
    )


def _conversations(record: dict[str, Any], format: str, oasst: str, source: str,
                   line: int) -> Iterator[Conversation | Skipped]:
    try:
        drafts = _drafts(record, format, oasst)
        given = (definitions(record), builtin(record)) if format in WITH_TOOLS else ((), ())
    except Skip as skip:
        yield Skipped(skip.reason, skip.detail, source, line)
        return
    for draft in drafts:  # each on its own: one bad instance of a task does not take the others with it
        try:
            turns, notes = checked(draft)
        except Skip as skip:
            yield Skipped(skip.reason, skip.detail, source, line)
        else:
            yield Conversation(turns, source, line, *given, notes)


def _drafts(record: dict[str, Any], format: str, oasst: str) -> list[list[Turn]]:
    """The record's conversations as it states them: `checked` has yet to look at their contents and order."""
    if not _has_fields(record, format):
        raise Skip("wrong fields", list(record))
    match format:
        case "alpaca":
            return _alpaca(record)
        case "dolly":
            user = Turn("user", record["instruction"], _context(record, "context"))
            return [[user, Turn("assistant", record["response"])]]
        case "sharegpt":
            turns = _turns(record["conversations"], "from", "value", SHAREGPT_ROLES)
            return [[_system(record), *turns]]
        case "oasst":
            return _oasst_paths(record["prompt"], best=oasst == "best")
        case "messages":
            return [[_system(record), *_turns(record["messages"], "role", "content", MESSAGES_ROLES)]]
        case "prompt_completion":
            return [[_system(record), *_prompt_completion(record)]]
        case _:  # text
            return [[Turn("text", record["text"])]]


def _system(record: dict[str, Any]) -> Turn:
    """The system turn that stands beside the others; a blank one is none."""
    return Turn("system", record.get("system", ""))


def _alpaca(record: dict[str, Any]) -> list[list[Turn]]:
    history = record.get("history") or []  # LLaMA-Factory's: [[instruction, output], ...]; its answers are trained
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Skip("wrong fields", history)
    tasks = [record] if "output" in record else record["instances"]
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise Skip("wrong fields", tasks)
    if not tasks:
        raise Skip("no turns", tasks)
    before = [_system(record)]
    for question, answer in history:
        before += [Turn("user", question), Turn("assistant", answer)]
    instruction = record["instruction"]
    return [
        [*before, Turn("user", instruction, _context(task, "input")), Turn("assistant", task.get("output"))]
        for task in tasks
    ]


def _prompt_completion(record: dict[str, Any]) -> list[Turn]:
    """Two strings, or TRL's conversational form: two lists of messages, of which the completion's are trained."""
    prompt, completion = record["prompt"], record["completion" if "completion" in record else "response"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return [Turn("user", prompt), Turn("assistant", completion)]
    given = _turns(prompt, "role", "content", MESSAGES_ROLES)
    answer = _turns(completion, "role", "content", MESSAGES_ROLES)
    if not answer:
        raise Skip("no answer", completion)
    return [replace(turn, trained=turn.trained and turn.role not in ANSWERS) for turn in given] + answer


def _turns(items: Any, role_key: str, content_key: str, roles: dict[str, str]) -> list[Turn]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Skip("wrong fields", items)
    turns = []
    for item in items:
        role, content, beside, tool = _role(item.get(role_key), roles), item.get(content_key), "", ""
        if isinstance(content, list):
            content = _joined(content)
        if role == "assistant" and (said := item.get("tool_calls") or item.get("function_call")):
            if not isinstance(content, str | None):
                raise Skip("answer is not text", content)
            role, beside, content = "call", (content or "").strip(), said
        if role == "call":
            tool, content = call(content)
        elif role == "result":
            content = result(content)
        turns.append(Turn(role, content, beside, _trained(item), tool))
    return turns


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


def _trained(item: dict[str, Any]) -> bool:
    if item.keys().isdisjoint(WEIGHTS):  # most often
        return True
    given = {key: item[key] for key in WEIGHTS if item.get(key) is not None}
    known = all(isinstance(weight, (int, float)) and weight in (0, 1) for weight in given.values())
    if not known or len(set(given.values())) > 1:
        raise Skip("bad weight", given)
    return all(given.values())


def _context(record: dict[str, Any], field: str) -> str:
    context = record.get(field)
    if not isinstance(context, str | None):
        raise Skip("context is not text", context)
    return context or ""


@dataclass(frozen=True, slots=True)
class Way:
    """A message of a tree and the way back from it to the root."""

    message: Any  # a JSON object
    before: "Way | None"

    def back(self) -> Iterator["Way"]:
        """This one, the one before it, and so on to the root."""
        way: Way | None = self
        while way:
            yield way
            way = way.before


def _oasst_paths(root: Any, *, best: bool) -> list[list[Turn]]:
    """Root-to-leaf paths in the tree's order, each cut after its last answer; two that are then the same are one.

    A stack, not recursion: JSON may nest a tree deeper than Python calls.
    """
    paths: list[list[Turn]] = []
    ends: set[int | None] = set()
    stack = [Way(node, None) for node in _live([root])]
    while stack:
        here = stack.pop()
        if replies := _live(here.message.get("replies") or []):
            stack += [Way(reply, here) for reply in ([min(replies, key=_rank)] if best else reversed(replies))]
            continue
        end = next((way for way in here.back() if way.message.get("role") == "assistant"), None)
        last = id(end.message) if end else None
        if last not in ends:
            ends.add(last)
            # Without any answer the whole path goes on, and is skipped for that reason.
            path = [Turn(_role(way.message.get("role"), OASST_ROLES), way.message.get("text"))
                    for way in (end or here).back()]
            paths.append(path[::-1])
    if not paths:
        raise Skip("no turns", root)
    return paths


def _live(replies: Any) -> list[dict[str, Any]]:
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise Skip("wrong fields", replies)
    return [reply for reply in replies if not reply.get("deleted")]


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")
