"""From a conversation to token ids, and which of them are trained.

A conversation is rendered to pieces, each of which carries its mask from the start. Text is never tokenised as a whole
and searched for its answers afterwards, which is how masks drift in other programs:

    control  <|begin_of_text|> <|start_header_id|>
    text     user
    control  <|end_header_id|>
    text     \\n\\nHi there
    control  <|eot_id|> <|start_header_id|>
    text     assistant
    control  <|end_header_id|>
    text     \\n\\n
    text     Hello!                                <- trained: the model starts here when it generates, so does a piece
    control  <|eot_id|>                            <- trained: without it the model never learns to stop

A call of a tool is an answer like any other and is trained; the definitions of tools and their results are not.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

from minisft.data.conversation import ANSWERS, Conversation, Skipped, Turn
from minisft.data.jinja import begins_with_bos, recognize, written
from minisft.data.templates import BUILTIN, TOOLS, Template
from minisft.data.tokenizer import Tokenizer
from minisft.errors import SHORT, UserError

VERSION = 6  # of reading and rendering: raise it when either changes, so that old tokens are not taken for new ones

TRAIN_ON = ("assistant", "last_assistant", "all")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text or one control token, with its mask."""

    text: str
    control: bool
    trained: bool
    answer: bool = False  # the model's own text: tokenised alone, as it is generated, trained or not


def _words(call: Turn) -> str | None:
    """The arguments of a call as a built-in tool takes them: `query="weather", unit="C"`. None unless all are text."""
    arguments = json.loads(call.content)
    if not all(isinstance(value, str) for value in arguments.values()):
        return None
    return ", ".join(f'{name}="{value}"' for name, value in arguments.items())


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    last = None  # the piece before, where it is text that may grow
    for piece in pieces:
        if piece.control or piece.answer:
            merged.append(piece)
            last = None
        elif last is not None and last.trained == piece.trained:
            merged[-1] = last = Piece(last.text + piece.text, False, piece.trained)
        else:
            merged.append(piece)
            last = piece
    return merged


def choose_template(name: str, known: dict[str, Template], tokenizer: Tokenizer, *,
                    option: str = "data.template") -> Template:
    """The template called `name`, or where that is empty the one that comes with the tokenizer.

    Raises UserError where there is none; `option` is what the user chooses with, and with an s names a file of more.
    """
    choices = f"choose with {option}: {', '.join(known)}; or write your own and name its file in {option}s"
    if name:
        if name not in known:
            raise UserError(f"{option}: no template is called {name!r}; {choices}")
        return known[name]
    jinja = tokenizer.chat_template
    found = recognize(jinja)
    begins = found is not None and found[0] == "chatml" and begins_with_bos(jinja or "")
    if found is None or (begins and not tokenizer.bos_token):
        if jinja is None:
            raise UserError(f"{tokenizer.file.parent}: does not say which chat template the model uses; {choices}")
        raise UserError(f"{tokenizer.file.parent}: the model's own chat template is none of these, and another teaches "
                        f"it other tokens than it knows; {choices}")
    template = replace(known[found[0]], default_system=found[1])
    return replace(template, begin=tokenizer.bos_token) if begins else template


class Renderer:
    """A template applied with a tokenizer.

    Raises UserError where the template's control tokens are not the tokenizer's.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, *, train_on: str = "assistant"):
        self.tokenizer, self.train_on = tokenizer, train_on
        self._marker = cache(lambda marker, trained: tuple(self._marked(marker, trained)))  # every turn asks again
        names = sorted(tokenizer.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        for field in ("begin", "system", "user", "assistant", "document_end", *TOOLS, "tools_system"):
            if unknown := self._unknown(getattr(template, field)):
                raise UserError(f"template {template.name}: {field} has {unknown[0]}, which is not a special token of "
                                f"{tokenizer.file}; choose a template that fits the tokenizer, or add the token")
        if any(self._unknown(getattr(template, field)) for field in BUILTIN):  # Llama-3.0 has no <|python_tag|>
            template = replace(template, builtin_call="", builtin_stop="")
        self.template = template
        if not self._control.search(stop := self._fill(template.stop())):
            raise UserError(f"template {template.name}: assistant ends with {stop!r}, in which there is no special "
                            f"token of {tokenizer.file}; the model would never stop")
        self._control_ids = frozenset(tokenizer.control.values())

    def fingerprint(self) -> list[Any]:
        """Everything that token ids and masks depend on, besides the conversation."""
        template = {name: self._fill(v) if isinstance(v, str) else v for name, v in asdict(self.template).items()}
        template |= {name: list(map(self._fill, v)) for name, v in template.items() if isinstance(v, tuple)}
        return [VERSION, self.tokenizer.sha256, self.train_on, template]

    def renderable(self, found: Conversation | Skipped) -> Conversation | Skipped:
        """`found` as it is, or `Skipped` where it has tools that the template does not know."""
        if isinstance(found, Skipped):
            return found
        name, builtin = self.template.name, found.builtin_tools
        calls = [turn for turn in found.turns if turn.role == "call"]
        names = [*found.tools, *builtin, *(call.tool for call in calls)]
        if names and not self.template.call:
            reason = f"tools, which template {name} does not know"
        elif builtin and not self.template.builtin_call:
            reason = f"built-in tools, which template {name} does not know"
        elif any(_words(call) is None for call in calls if call.tool in builtin):
            reason, names = "an argument of a built-in tool is not text", [c.tool for c in calls if _words(c) is None]
        else:
            return found
        return Skipped(reason, SHORT.repr(names)[:200], found.source, found.line)

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The rendered conversation; text between two control tokens is one piece, but for answers and their masks.

        Only for what is `renderable`.
        """
        assert self.renderable(conversation) is conversation, "the template does not know this conversation's tools"
        return _merged(self._rendered(conversation))

    def prompt(self, turns: tuple[Turn, ...]) -> list[int]:
        """Token ids of `turns`, up to where the assistant's answer begins."""
        rendered = self._rendered(Conversation(turns, source="", line=0))
        answer = self._marker(self.template.assistant[0], self.train_on == "all")
        return self.encode([_merged(chain(rendered, answer))])[0][0]

    def stop_ids(self) -> set[int]:
        """The tokens at which generation ends: the template's stop token and the end of a plain text."""
        markers = (self.template.stop(), self.template.builtin_stop, self.template.document_end)
        names = [name for marker in markers for name in self._control.findall(self._fill(marker))]
        return {self.tokenizer.control[name] for name in names}

    def encode(self, rendered: list[list[Piece]]) -> list[tuple[list[int], list[bool]]]:
        """Token ids and mask of rendered conversations, the plain way; encoding.py does the same for files, faster."""
        texts = [piece.text for pieces in rendered for piece in pieces if not piece.control]
        encoded = iter(self.tokenizer.encode_batch(texts))
        documents = []
        for pieces in rendered:
            ids: list[int] = []
            trained: list[bool] = []
            for piece in pieces:
                new = [self.tokenizer.control[piece.text]] if piece.control else next(encoded)
                assert piece.control or self._control_ids.isdisjoint(new), "text became a control token"
                ids += new
                trained += [piece.trained] * len(new)
            if trained:
                trained[0] = False  # nothing comes before it that could predict it
            documents.append((ids, trained))
        return documents

    def _rendered(self, conversation: Conversation) -> Iterator[Piece]:
        template, everything = self.template, self.train_on == "all"
        yield from self._marker(template.begin, False)
        if conversation.turns[0].role == "text":
            yield Piece(conversation.turns[0].content, False, True)
            yield from self._marker(template.document_end, True)
            return
        turns = template.turns(conversation)
        last = max((i for i, turn in enumerate(turns) if turn.role in ANSWERS), default=-1)
        first_user = next((i for i, turn in enumerate(turns) if turn.role == "user"), -1)
        for i, turn in enumerate(turns):
            call = turn.role == "call"
            before, after, *rest = getattr(template, "assistant" if call else turn.role)
            if call and conversation.builtin_tools:
                after = template.builtin_stop
            own = turn.role in ANSWERS
            answer = own and turn.trained and (self.train_on != "last_assistant" or i == last)
            context = everything and turn.trained
            yield from self._marker(before, context)
            if turn.role == "system":
                yield from self._environment(conversation, context)
            if i == first_user:
                yield from self._definitions(conversation, context)
            if call:
                yield from self._call(turn, conversation.builtin_tools, answer or context)
            elif text := template.content(turn):
                yield Piece(text, False, answer or context, answer=own)
            yield from self._marker(after, answer or context)
            yield from self._marker("".join(rest), context)

    def _environment(self, conversation: Conversation, trained: bool) -> Iterator[Piece]:
        """What the system turn says of tools."""
        if conversation.tools or conversation.builtin_tools:
            yield from self._marker(self.template.tools_system, trained)
        if conversation.builtin_tools:
            before, after = self.template.builtin_system
            names = [name for name in conversation.builtin_tools if name != "code_interpreter"]  # it is `ipython`
            yield from self._marker(before, trained)
            yield Piece(", ".join(names), False, trained)
            yield from self._marker(after, trained)

    def _definitions(self, conversation: Conversation, trained: bool) -> Iterator[Piece]:
        """The tools that may be called, before the first question."""
        before, after = self.template.tools_user
        if conversation.tools:
            yield from self._marker(before, trained)
        for tool in conversation.tools:
            yield Piece(json.dumps(tool, ensure_ascii=False, indent=4), False, trained)
            yield from self._marker(after, trained)

    def _call(self, call: Turn, builtin_tools: tuple[str, ...], trained: bool) -> Iterator[Piece]:
        """The format's own control tokens become tokens; what is filled in stays text."""
        builtin = call.tool in builtin_tools
        arguments = _words(call) if builtin else call.content
        assert arguments is not None  # or the conversation were not renderable
        values = {"name": call.tool, "arguments": arguments}
        for piece in self._marker(self.template.builtin_call if builtin else self.template.call, trained):
            text = re.sub(r"\{(name|arguments)\}", lambda field: values[field[1]], piece.text)
            yield piece if piece.control else Piece(text, False, trained, answer=True)

    def _marked(self, marker: str, trained: bool) -> Iterator[Piece]:
        """The template's own text: `<|eot_id|>\\n` -> control `<|eot_id|>`, text `\\n`."""
        marker, end = self._fill(marker), 0
        for match in self._control.finditer(marker):
            if match.start() > end:
                yield Piece(marker[end : match.start()], False, trained)
            yield Piece(match[0], True, trained)
            end = match.end()
        if end < len(marker):
            yield Piece(marker[end:], False, trained)

    def _unknown(self, marker: str | tuple[str, ...]) -> list[str]:
        """Names in the template's text that look like control tokens, and are none of the tokenizer's."""
        names = re.findall(r"<\|[^|<>]+\|>", self._fill("".join(marker)))
        return [name for name in names if name not in self.tokenizer.control]

    def _fill(self, marker: str) -> str:
        if "{bos}" in marker:
            marker = marker.replace("{bos}", self.tokenizer.bos)
        return marker.replace("{eos}", self.tokenizer.eos) if "{eos}" in marker else marker

    def jinja(self) -> str:
        """The same template as the Jinja text that transformers, vLLM and others execute."""
        return written(self.template, self._fill)
