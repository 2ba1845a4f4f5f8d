"""The fields of a record, a turn or a tool call: which are read, which change the meaning, which nothing reads.

Any program may add a field of its own. Most are labels for people, some turn a record into something else: an answer
that is marked as bad, a picture that the question is about. So no field passes in silence:

    read                 by the format (formats.py, tools.py)
    changes the meaning  known here and not read: the record is left out, and counted under the field's name
    unknown              counted by name, and listed by `minisft prepare`, by `minisft show` and when a run starts

`data.ignore` names fields to be taken as absent, whichever of the three they are.
"""

import json
from collections.abc import Iterable
from typing import Any

from minisft.data.records import SHORT, Skip

SYSTEMS = ("system", "system_prompt", "system_message")
WEIGHTS = frozenset(("weight", "loss_weight", "loss", "loss_mask", "train", "training", "trainable"))  # 0 or 1
# Fields that are read, or that a format's own definition has for people: of a record, a turn, a task, an OASST message.
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
TASK = frozenset(("input", "context", "output"))
MESSAGE = frozenset((
    *("text", "role", "replies", "rank", "deleted", "message_id", "parent_id", "user_id", "message_tree_id"),
    *("tree_state", "created_date", "lang", "emojis", "labels", "review_count", "review_result", "synthetic"),
    *("model_name", "detoxify", "events"),
))
# Known to change what a record means. Where they are not read, the record is left out.
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


class Fields:
    """The fields of one file that nothing reads: `unread` has name -> records."""

    def __init__(self, ignored: Iterable[str] = ()):
        self.ignored = frozenset(ignored)
        self.unread: dict[str, int] = {}
        self.notes: set[str] = set()  # what was done to the record, beside its turns' own
        self._names: set[str] = set()  # of the record that is read

    def look(self, item: dict[str, Any], known: frozenset[str], where: str = "") -> None:
        """Note the fields of `item` that are not `known`; `where` they are is part of their names.

        Raises Skip for a field that changes the meaning.
        """
        if self.ignored:
            self.drop_ignored(item)
        if item.keys() <= known:  # most often
            return
        for name, value in item.items():
            if name in known or is_empty(value):
                continue
            if name == "label" and (good := flag(value)) is not None:  # of preferences: it is a good answer
                if not good:
                    raise Skip("label says that the answer is bad", value)
            elif name in CHANGES:
                raise Skip(f"{where}{name} changes the meaning and is not read (--data.ignore {name} takes the record "
                           "without it)", value)
            else:
                self._names.add(where + shown(name))

    def drop_ignored(self, item: dict[str, Any]) -> None:
        """Make the ignored fields of `item` absent."""
        for name in self.ignored:
            item.pop(name, None)

    def end_record(self) -> None:
        """Count what was noted; a name counts once a record."""
        for name in sorted(self._names):
            name = name if name in self.unread or len(self.unread) < MAX_NAMES else OTHERS
            self.unread[name] = self.unread.get(name, 0) + 1
        self._names.clear()
        self.notes.clear()


def shown(name: str) -> str:
    """A field's name as it may be printed: short, and without what steers a terminal."""
    return name if name.isidentifier() and len(name) <= 60 else SHORT.repr(name)


def is_empty(value: Any) -> bool:
    """None, or one of the ways in which a program writes that there is nothing."""
    return value is None or value in ([], {}) or (isinstance(value, str) and value.strip() in EMPTY)


def parsed(value: Any, reason: str) -> Any:
    """`value`, or what it says where it is JSON text; None for what is empty. Raises Skip for any other text."""
    if is_empty(value):
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Skip(reason, value) from None


def flag(value: Any) -> bool | None:
    """Whether `value` is 1 or 0, true or false, also as text; None for anything else."""
    if isinstance(value, str):
        value = {"1": 1, "true": 1, "0": 0, "false": 0}.get(value.strip().lower())
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def is_trained(item: dict[str, Any]) -> bool:
    """What the weights of a record or a turn say; True where there are none."""
    if item.keys().isdisjoint(WEIGHTS):  # most often
        return True
    given = {name: value for name, value in item.items() if name in WEIGHTS and value not in (None, "", " ", "null")}
    flags = set(map(flag, given.values()))
    if None in flags or len(flags) > 1:
        raise Skip("bad weight", given)
    return flags != {False}
