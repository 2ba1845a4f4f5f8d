"""A conversation: its turns and who speaks them, or the reason why a record cannot be trained on.

The same rules hold for every format. An optional system turn (dropped if blank) comes first; then user and assistant
take turns, starting with the user; before it answers, the assistant may call tools, each call with its result. A
leading assistant turn that answers nothing is dropped, and turns after the last answer are cut; both are noted. Any
other breach skips the whole record.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minisft.errors import SHORT

ANSWERS = ("assistant", "call")  # what the model says
MOST_WEIGHTS = 254  # different ones in a conversation; with 0 and the template's own turn they fit in a byte
FOLLOWED_BY = {"": ("user",), "user": ANSWERS, "assistant": ("user",), "call": ("result",), "result": ANSWERS}


@dataclass(frozen=True, slots=True)
class Turn:
    """One contribution to a conversation."""

    role: str  # "system" | "user" | "assistant" | "call" | "result" | "text" (a document, alone in its conversation)
    content: str  # of a call: its arguments, of a result: the result, both as JSON
    context: str = ""  # Alpaca's `input`, Dolly's `context`: the template says how it joins; text beside a call
    trained: float = 1.0  # its weight in the loss; 0: not trained on. Of other turns than answers: for train_on = all
    tool: str = ""  # the name of the function that a call calls


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and the record that they come from."""

    turns: tuple[Turn, ...]
    source: str  # the path as the user gave it
    line: int  # of the record's first byte, from 1; an OASST tree or a seed task gives several on one line
    tools: tuple[dict[str, Any], ...] = ()  # definitions of the functions that may be called, as the record has them
    builtin_tools: tuple[str, ...] = ()  # names of those that the model knows without a definition
    notes: tuple[str, ...] = ()  # changes made to the record: fixed phrases, to be counted
    weight: float = 1.0  # in the loss, times that of each turn
    number: int = 0  # among the conversations of its record


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that is not trained on; counted by `reason`, a fixed phrase. `detail` shows the value at fault."""

    reason: str
    detail: str
    source: str
    line: int


class Skip(Exception):  # noqa: N818  (not an error: it carries the reason to the one place that counts it)
    """Raised for a record that cannot be trained on; `value` is the cause."""

    def __init__(self, reason: str, value: Any):
        super().__init__(reason)
        self.reason, self.detail = reason, SHORT.repr(value)[:200]


def checked(turns: list[Turn]) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns to keep, and notes of what was cut. Raises Skip for turns that break a rule."""
    turns, notes = [turn for turn in turns if turn.role != "system" or not _blank(turn.content)], []
    if not turns:
        raise Skip("no turns", turns)
    if turns[0].role != "text":
        roles = [turn.role for turn in turns]
        end = max((i for i, role in enumerate(roles, 1) if role in ANSWERS), default=0)
        if not end:
            raise Skip("no assistant turn", roles)
        if turns[end:]:
            notes.append("end without an answer cut")
        del turns[end:], roles[end:]
        first = int(roles[0] == "system")
        if roles[first : first + 2] == ["assistant", "user"]:  # FastChat, too, drops an answer to nothing
            notes.append("leading assistant turn dropped")
            del turns[first], roles[first]
        if reason := _wrong_order(roles[first:]):
            raise Skip(reason, roles)
        if any(turn.role == "call" and turn.context for turn in turns):
            notes.append("text beside a tool call dropped")  # as Llama-3.1's own template does
    for turn in turns:
        if not isinstance(turn.content, str) or not turn.content.strip():
            reason = "no answer" if turn.role in ANSWERS else "blank turn"
            if not _blank(turn.content):
                reason = f"{'answer' if turn.role in ANSWERS else 'content'} is not text"
            raise Skip(reason, turn.content)
    if len(weights := {turn.trained for turn in turns}) > MOST_WEIGHTS:
        raise Skip(f"more than {MOST_WEIGHTS} different weights in a conversation (remedy: round them)", len(weights))
    return tuple(turns), tuple(notes)


def _wrong_order(roles: list[str]) -> str:
    """The rule that `roles`, without a leading system turn, break; empty if they break none."""
    if "system" in roles:
        return "system turn in the middle"
    for role, following in pairwise(["", *roles]):
        if following not in FOLLOWED_BY[role]:
            return ("tool result without its call" if following == "result" else
                    "tool result without an answer" if role == "result" else
                    "tool call without its result" if role == "call" != following else
                    "an answer and a tool call in two turns" if (role, following) == ("assistant", "call") else
                    "neighbouring turns of one role" if role else "starts with the assistant")
    return ""


def _blank(content: Any) -> bool:
    return content is None or (isinstance(content, str) and not content.strip())
