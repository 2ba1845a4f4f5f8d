"""A conversation: its turns and who says them, or the reason why a record is none that can be trained on.

The rules, the same for every format: an optional system turn (dropped where blank), then user and assistant by turns,
starting with the user; before it answers, the assistant may call tools, each call with its result. A first assistant
turn that answers nothing is dropped, and what follows the last answer is cut off; both are noted. Every other breach
skips the whole record.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minisft.data.records import Skip

ANSWERS = ("assistant", "call")  # what the model says
ANSWERED_BY = {"user": ANSWERS, "assistant": ("user",), "call": ("result",), "result": ANSWERS}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one of them says."""

    role: str  # "system" | "user" | "assistant" | "call" | "result" | "text" (a document, alone in its conversation)
    content: str  # of a call: its arguments, of a result: the result, both as JSON
    context: str = ""  # Alpaca's `input`, Dolly's `context`: the template says how it joins; text beside a call
    trained: bool = True  # False: not trained on. Of turns that are no answers it counts with train_on = all alone
    tool: str = ""  # the name of the function that a call calls


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and the record that they come from."""

    turns: tuple[Turn, ...]
    source: str  # the path as the user gave it
    line: int  # of the record's first byte, from 1; an OASST tree or a seed task gives several on one line
    tools: tuple[dict[str, Any], ...] = ()  # definitions of the functions that may be called, as the record has them
    builtin_tools: tuple[str, ...] = ()  # names of those that the model knows without a definition
    notes: tuple[str, ...] = ()  # what was left out of the record, fixed phrases to be counted


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that is not trained on; counted by `reason`, a fixed phrase. `detail` is the value at fault, short."""

    reason: str
    detail: str
    source: str
    line: int


def checked(turns: list[Turn]) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns that stay, and notes of what was cut."""
    turns, notes = [turn for turn in turns if turn.role != "system" or not _blank(turn.content)], []
    if not turns:
        raise Skip("no turns", turns)
    if turns[0].role != "text":
        roles = [turn.role for turn in turns]
        answers = [i for i, role in enumerate(roles) if role in ANSWERS]
        if not answers:
            raise Skip("no assistant turn", roles)
        end = answers[-1] + 1
        if turns[end:]:
            notes.append("end without an answer cut")
        del turns[end:], roles[end:]
        first = int(roles[0] == "system")
        if roles[first : first + 2] == ["assistant", "user"]:  # FastChat, too, drops what answers nothing
            notes.append("leading assistant turn dropped")
            del turns[first], roles[first]
        _refuse_order(roles, roles[first:])
        if "call" in roles and any(turn.role == "call" and turn.context for turn in turns):
            notes.append("text beside a tool call dropped")  # as Llama-3.1's own template does
    for turn in turns:
        if isinstance(turn.content, str) and turn.content.strip():  # most often
            continue
        answer = turn.role in ANSWERS
        if _blank(turn.content):
            raise Skip("no answer" if answer else "blank turn", turn.content)
        if not isinstance(turn.content, str):
            raise Skip("answer is not text" if answer else "content is not text", turn.content)
    return tuple(turns), tuple(notes)


def _refuse_order(roles: list[str], talk: list[str]) -> None:
    """`talk`: the roles without a first system turn."""
    if "system" in talk:
        raise Skip("system turn in the middle", roles)
    if not talk or talk[0] in ANSWERS:
        raise Skip("starts with the assistant", roles)
    if talk[0] == "result":
        raise Skip("tool result without its call", roles)
    for role, following in pairwise(talk):
        if following in ANSWERED_BY[role]:
            continue
        if following == "result":
            raise Skip("tool result without its call", roles)
        if role == "result":
            raise Skip("tool result without an answer", roles)
        same = role != "call" or following == "call"
        raise Skip("neighbouring turns of one role" if same else "tool call without its result", roles)


def _blank(content: Any) -> bool:
    return content is None or (isinstance(content, str) and not content.strip())
