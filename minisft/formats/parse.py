"""Files of many layouts become one thing, a `Conversation`; what cannot be trained on becomes a counted `Skipped`.

    bytes --records, tables--> JSON objects --format--> drafts of turns --rules--> Conversation | Skipped

Nothing is guessed and nothing is lost silently. The fields of the first record tell the format; exactly one may match,
and it holds for the whole file. A record that is not JSON stops the run (or is counted, with `skip_bad`). Text is never
normalised. What a format states is a draft, until `conversation.checked` has looked at it. Memory holds one record at a
time; a `.txt` file is one record.
"""

import json
import shlex
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from minisft.config import FORMATS
from minisft.data.conversation import ANSWERS, Conversation, Skip, Skipped, Turn, checked
from minisft.errors import UserError, printable
from minisft.files import data_files
from minisft.formats import fields as of
from minisft.formats.fields import WEIGHTS, Columns, Fields, is_empty, listed, loss_weight, parsed, shown
from minisft.formats.records import BadRecord
from minisft.formats.tables import is_text, rows

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

COLUMNS = {  # what such columns are often called
    "instruction": ("question", "query", "instruction", "soru", "talimat", "istem"),
    "input": ("input", "context", "giriş", "girdi", "bağlam"),
    "output": ("answer", "response", "output", "reply", "cevap", "yanıt", "çıktı"),
}

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "tool_response"), "result"),
}
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}

MAX_CHARACTERS = 1 << 22  # of the conversations of one record after the first: each repeats what came before it
TURN_CHARACTERS = 16  # what a turn costs in addition to its text


def read(path: str | Path, *, format: str = "auto", skip_bad: bool = False, oasst: str = "all",
         ignore: Iterable[str] = (), unread: dict[str, int] | None = None,
         columns: Iterable[tuple[str, str]] = ()) -> Iterator[Conversation | Skipped]:
    """The conversations of a file, or of the files in a folder or of a glob (files.py), in their order.

    `skip_bad` turns broken JSON and invalid UTF-8 into `Skipped`. `oasst` "all" takes every path from the root to a
    leaf, "best" the one path of the lowest ranks; trees of any `tree_state` are taken, deleted messages never.
    `ignore` names fields to treat as absent; `unread` is filled with the fields that nothing reads: name -> records.
    `columns` are pairs (field, column): what a field of the format is called here; a .txt file has no columns.
    Raises UserError at once for a file of another kind, and while iterating for its content.
    """
    if format not in FORMATS:
        raise UserError(f"data.format: unknown format {format!r} (choices: {', '.join(FORMATS)})")
    assert oasst in ("all", "best"), oasst
    mapping, files = Columns(columns), data_files(str(path))
    for file in files:
        with rows(file, skip_bad):
            if is_text(file) and format not in ("auto", "text"):
                raise UserError(f"{file}: a .txt file has no records of format {format!r} (remedy: --data.format text, "
                                'or format = "text" in the table of this source)')
    if format != "auto" and not all(map(is_text, files)):
        mapping.check_fields(format, FIELDS[format][0][0])

    def conversations() -> Iterator[Conversation | Skipped]:
        fields, of_all = Fields(ignore, unread), format
        for source in files:
            first = format == "auto"  # each file is looked at, but all must have one format
            with rows(source, skip_bad) as found:
                for line, record in found:
                    if isinstance(record, BadRecord):
                        if not skip_bad:
                            raise UserError(f"{source}:{line + record.lines_down}: {record.reason}: {record.detail} "
                                            "(remedy: fix the line or pass --data.skip_bad true)")
                        yield Skipped(record.reason, record.detail, source, line)
                        continue
                    for name in fields.ignored:  # before the format is known
                        record.pop(name, None)
                    record = record if is_text(source) else mapping.mapped(record)
                    if first:
                        before, of_all, first = of_all, _detect(record, source, line, mapping, files), False
                        if before not in ("auto", of_all):
                            raise UserError(f"{source}:{line}: is of format {of_all}, and the files before it in "
                                            f"{path} of {before} (remedy: name them as two sources)")
                        if not is_text(source):
                            mapping.check_fields(of_all, FIELDS[of_all][0][0])
                    try:
                        yield from _conversations(record, of_all, oasst, fields, source, line)
                    except Skip as skip:
                        yield Skipped(skip.reason, skip.detail, source, line)
                    fields.end_record()
        mapping.check_columns(str(path))

    return conversations()


def _has_fields(record: dict[str, Any], format: str) -> bool:
    return any(record.keys() >= set(group) for group in FIELDS[format])


def _detect(record: dict[str, Any], source: str, line: int, columns: Columns, files: list[str]) -> str:
    """The one format whose fields the record has. Raises UserError, with a remedy, if none or several match."""
    turn = [name for name in ("role", "from") if record.get(name) is not None]
    for fields in ({name: value for name, value in record.items() if value is not None}, record):  # null may be padding
        matches = [name for name in FIELDS if _has_fields(fields, name) and not (turn and name == "text")]
        if len(matches) == 1:
            return matches[0]
    columns.check_columns(f"{source}:{line}")
    lists = [name for name, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    talks = [name for name in lists if name.isprintable() and {"role", "from"} & record[name][0].keys()]
    if matches:
        remedy = f"name the format with --data.format {matches[0]}"
    elif lists and not talks and len(lists) == sum(isinstance(value, list) for value in record.values()):
        splits = ", ".join(f"{shown(name)} ({len(record[name])} records)" for name in lists)
        remedy = (f"the file is one object with lists of records, {splits}; name one of them in the path, as in "
                  f"--data.train {shlex.quote(f'{source}#{printable(lists[0])}')}")
    elif {"chosen", "preferred_output"} & record.keys():
        remedy = ("these are preferences, and minisft trains on answers only: write the question to a field prompt and "
                  "the preferred answer to a field completion")
    elif turn:
        remedy = ('this is one turn; write the turns of each conversation into one record, as in '
                  '{"messages": [{"role": "user", "content": "..."}, ...]}; of OASST, name the file of trees')
        if "text" in record:
            remedy += f"; if {turn[0]} is no speaker, --data.ignore {turn[0]}"
    else:
        texts = [name for name, value in record.items() if isinstance(value, str) and name.isprintable() and name]
        named = [(field, name) for field, names in COLUMNS.items() for name in texts if name.strip().lower() in names]
        named = [("instruction", named[0][1]), *named[1:]] if named else []  # the first may be called input
        told = len(named) > 1 and named[-1][0] == "output" and len(named) == len(dict(named))
        pairs = [("messages", talks[0])] if talks else [("text", texts[0])] if len(texts) == 1 else named if told else [
            ("instruction", "QUESTION"), ("output", "ANSWER")]
        table = ", ".join(f"{field} = {json.dumps(name, ensure_ascii=False)}" for field, name in pairs)
        remedy = f"say which column is which field, as in --data.fields {shlex.quote(f'{{{table}}}')}"
        if len(files) > 1:
            remedy += f"; or, if this is no data, name a glob that leaves it out, such as *{Path(files[0]).suffix}"
    known = "; ".join(f"{name}: {' or '.join(' + '.join(group) for group in FIELDS[name])}" for name in FIELDS)
    raise UserError(
        f"{source}:{line}: {'more than one' if matches else 'no'} format matches a record with the fields "
        f"{', '.join(map(shown, list(record)[:20])) or '(none)'}: {', '.join(matches) or 'none'} of [{known}] "
        f"(remedy: {remedy})")


def _conversations(record: dict[str, Any], format: str, oasst: str, fields: Fields, source: str,
                   line: int) -> Iterator[Conversation | Skipped]:
    """The conversations of a record. Raises Skip for one that has none."""
    if not _has_fields(record, format):
        raise Skip("wrong fields", list(record))
    fields.look(record, of.READ[format])
    if not (weight := loss_weight(record)):
        raise Skip("marked as not trained", {name: value for name, value in record.items() if name in WEIGHTS})
    drafts: Iterable[list[Turn]]  # as the record states them: `checked` has yet to look at their contents and order
    match format:
        case "alpaca" | "dolly":
            drafts = _tasks(record, "output" if format == "alpaca" else "response", fields)
        case "sharegpt" | "messages":
            field = FIELDS[format][0][0]
            drafts = [_opening(record) + _turns(record[field], fields, f"{field}[].")]
        case "oasst":
            drafts = _oasst_paths(record["prompt"], fields, best=oasst == "best")
        case "prompt_completion":
            drafts = [_opening(record) + _prompt_completion(record, fields)]
        case _:
            drafts = [[Turn("text", record["text"])]]
    tools = of.definitions(record, fields), tuple(listed(record.get("builtin_tools"), str, "bad tools"))
    characters = 0
    for i, draft in enumerate(drafts):
        for turn in draft if i else ():
            characters += TURN_CHARACTERS + len(turn.context)
            characters += len(turn.content) if isinstance(turn.content, str) else 0
        if characters > MAX_CHARACTERS:
            yield Skipped(f"more conversations of one record than {MAX_CHARACTERS:,} characters hold",
                          f"after {i}", source, line)
            return
        try:  # each on its own: one bad instance of a task does not take the others with it
            turns, notes = checked(draft)
            yield Conversation(turns, source, line, *tools, (*notes, *sorted(fields.notes)), weight, i)
        except Skip as skip:
            yield Skipped(skip.reason, skip.detail, source, line)


def _opening(record: dict[str, Any]) -> list[Turn]:
    """The record's own system text, perhaps blank, and LLaMA-Factory's history: [[instruction, output], ...]."""
    texts = [record[name] for name in of.SYSTEMS if name in record if not is_empty(record[name])]
    if any(text != texts[0] for text in texts):
        raise Skip("several system texts", texts)
    turns = [Turn("system", texts[0] if texts else "")]
    for pair in map(parsed, listed(record["history"], object)) if "history" in record else ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise Skip("wrong fields", record["history"])
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]  # these answers are trained
    return turns


def _tasks(record: dict[str, Any], answer: str, fields: Fields) -> list[list[Turn]]:
    """One instruction with its input and answer, or with several of these: Self-Instruct's `instances`."""
    tasks: list[Any] = [record]
    opening, drafts = _opening(record), []
    _refuse_both(record, "output", "instances")
    if answer not in record and not (tasks := listed(record["instances"], dict)):
        raise Skip("no turns", tasks)
    for task in tasks:
        if task is not record:
            fields.look(task, of.TASK, "instances[].")
        given = [task[name] for name in ("input", "context") if task.get(name) not in (None, "")]
        if not all(isinstance(context, str) for context in given):
            raise Skip("context is not text", given)
        _refuse_both(task, "input", "context")
        drafts.append([*opening, Turn("user", record["instruction"], *given), Turn("assistant", task.get(answer))])
    return drafts


def _prompt_completion(record: dict[str, Any], fields: Fields) -> list[Turn]:
    """Two strings, or TRL's conversational form: two lists of messages; only those of the completion are trained."""
    _refuse_both(record, "completion", "response")
    name = "completion" if "completion" in record else "response"
    prompt, completion = record["prompt"], record[name]
    with suppress(Skip):  # JSON text in a cell of CSV: read as messages only if both surely are
        found = [listed(x, dict) for x in (prompt, completion) if isinstance(x, str) and x.lstrip()[:1] == "["]
        if len(found) == 2 and all(messages and all("role" in item for item in messages) for messages in found):
            prompt, completion = found
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return [Turn("user", prompt), Turn("assistant", completion)]
    given = _turns(prompt, fields, "prompt[].")
    if not (answer := _turns(completion, fields, f"{name}[].")):
        raise Skip("no answer", completion)
    return [replace(turn, trained=turn.trained * (turn.role not in ANSWERS)) for turn in given] + answer


def _turns(items: Any, fields: Fields, where: str) -> list[Turn]:
    items, turns = parsed(items) or [], []
    for item in items if isinstance(items, list) else [items]:
        item = parsed(item) if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise Skip("wrong fields", items)
        role, content = _role(_either(item, "role", "from"), ROLES), _either(item, "content", "value")
        calls, beside, tool, trained = [], "", "", 1.0
        if len(item) > 2 or content is None:  # seldom: most turns have a role and a content
            fields.look(item, of.OF_ROLE.get(role, of.TURN), where)
            trained = loss_weight(item)
            if role == "assistant":
                calls = [found for name in ("tool_calls", "function_call")
                         if (found := parsed(item.get(name), "bad tool call"))]
            elif role != "call" and trained and not all(is_empty(item[name]) for name in WEIGHTS & item.keys()):
                fields.notes.add("a turn that is not an answer is marked as trained; only data.train_on = all trains "
                                 "on it")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            for part in content:
                fields.look(part, of.PART, f"{where}content[].")
            texts = [part.get("text", part.get("value")) for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
        if calls:
            if len(calls) > 1:
                raise Skip("several tool calls in one turn", calls)
            if not isinstance(content, str | None):
                raise Skip("answer is not text", content)
            role, beside, content = "call", (content or "").strip(), calls[0]
        if role == "call":
            tool, content = of.call(content, fields, f"{where}call.")
        elif role == "result" and content is not None:
            content = of.written(content, "bad tool result")[1]  # a text becomes a JSON string
        turns.append(Turn(role, content, beside, trained, tool))
    return turns


def _refuse_both(record: dict[str, Any], *names: str) -> None:
    given = {name: record[name] for name in names if record.get(name) not in (None, "", [])}
    if len(given) > 1:
        raise Skip(f"both {' and '.join(names)}", given)


def _either(item: dict[str, Any], one: str, other: str) -> Any:
    """The value that an item has under one of two names; the other may be null, as padding."""
    value = item.get(one)
    if value is None:
        return item.get(other)
    if item.get(other) is not None:
        raise Skip("wrong fields", item)
    return value


def _role(name: Any, roles: dict[str, str]) -> str:
    if not isinstance(name, str) or name not in roles:
        raise Skip("unknown role", name)
    return roles[name]


Branch = tuple[dict[str, Any], "Branch | None"]  # a message of a tree, and the branch to the one it replies to


def _oasst_paths(root: Any, fields: Fields, *, best: bool) -> Iterator[list[Turn]]:
    """Root-to-leaf paths in the tree's order, each cut after its last answer; two that are then the same are one. A
    stack, not recursion: JSON may nest a tree deeper than Python calls. The whole tree is looked at before the first
    path is made."""
    def live(replies: Any) -> list[dict[str, Any]]:
        return [reply for reply in listed(replies, dict) if not reply.get("deleted")]

    def rank(reply: dict[str, Any]) -> float:
        return number if isinstance(number := reply.get("rank"), int | float) else float("inf")

    ends: dict[int, Branch] = {}
    stack: list[Branch] = [(message, None) for message in live([root])]
    if not stack:
        raise Skip("no turns", root)
    while stack:
        message, _ = here = stack.pop()
        fields.look(message, of.MESSAGE, "replies[].")
        _role(message.get("role"), OASST_ROLES)
        if replies := live(message.get("replies")):
            stack += [(reply, here) for reply in ([min(replies, key=rank)] if best else reversed(replies))]
            continue
        end: Branch | None = here
        while end and end[0]["role"] != "assistant":
            end = end[1]
        ends.setdefault(id(end), end or here)  # a path without any answer stays whole, and is skipped for that reason
    for end in ends.values():
        path: list[Turn] = []
        while end:
            message, end = end
            path.append(Turn(OASST_ROLES[message["role"]], message.get("text", "")))
        yield path[::-1]
