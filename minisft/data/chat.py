"""From a conversation to token ids, and which of them are trained.

A conversation is rendered to pieces, each of which carries its mask from the start. The text is never tokenised as a
whole and then searched for its answers, which is how masks drift in other programs:

    control  <|begin_of_text|> <|start_header_id|>
    text     user
    control  <|end_header_id|>
    text     \\n\\nHi there
    control  <|eot_id|> <|start_header_id|>
    text     assistant
    control  <|end_header_id|>
    text     \\n\\n
    text     Hello!                                <- trained: generation starts here, so a piece begins here
    control  <|eot_id|>                            <- trained: without it the model never learns to stop

Tool calls are answers and are trained on; tool definitions and tool results are not.

`encode` takes many conversations and tokenises each distinct piece once: half of them are the template's own, such as
`user`.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from minisft.data.conversation import ANSWERS, Conversation, Skipped, Turn
from minisft.data.templates import BUILTIN, TOOLS, Template
from minisft.data.tokenizer import Tokenizer
from minisft.errors import SHORT, UserError

VERSION = 7  # raise it when reading, rendering or near duplicates change, or old stores would be opened
Array = np.ndarray


class Piece(NamedTuple):
    """A run of text or one control token, with its mask."""

    text: str
    control: bool
    trained: float  # its weight in the loss; 0: not trained
    answer: bool = False  # the model's own text: tokenised by itself, as it is generated, trained or not
    of_template: tuple[str, ...] = ()  # parts of the text that are the template's: for reports


@dataclass(frozen=True)
class EncodedDocuments:
    """T tokens of several documents, one after another."""

    ids: Array  # (T,) uint32
    weights: Array  # (T,) float64: of each token in the loss; 0 where it is not trained
    controls: Array  # (T,) int64: the control token that the template put there, or -1
    offsets: Array  # (documents + 1,) int64: where each document begins and the last one ends
    words: Array  # (documents,) int64: words of the contents, separated by white space
    content_tokens: Array  # (documents,) int64: tokens of the contents, without the template's own

    @property
    def loss_mask(self) -> Array:
        """(T,) bool: True where the token is trained."""
        return self.weights > 0

    @property
    def num_loss_tokens(self) -> Array:
        """(documents,) int64: trained tokens of each document."""
        return np.diff(_offsets(self.loss_mask)[self.offsets])

    def only(self, wanted: Array) -> "EncodedDocuments":
        """The documents where `wanted`, (documents,) booleans, is true."""
        lengths = np.diff(self.offsets)
        tokens = np.repeat(wanted, lengths)
        return EncodedDocuments(self.ids[tokens], self.weights[tokens], self.controls[tokens],
                                _offsets(lengths[wanted]), self.words[wanted], self.content_tokens[wanted])


class Renderer:
    """A template applied with a tokenizer. Raises UserError if the tokenizer lacks the template's control tokens."""

    def __init__(self, template: Template, tokenizer: Tokenizer, *, train_on: str = "assistant"):
        self.tokenizer, self.template, self.train_on = tokenizer, template, train_on
        # Every turn asks for the same markers. Bounded, because they may come with many weights.
        self.split = lru_cache(1 << 12)(self._split)
        self._cost = cache(lambda text: len(tokenizer.encode(text)))
        names = sorted(tokenizer.control, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        for field in ("begin", "system", "user", "assistant", "document_end", *TOOLS, "tools_system"):
            if unknown := self._unknown(field):
                raise UserError(f"template {template.name}: {field} has {unknown[0]}, which is not a special token of "
                                f"{tokenizer.file}; choose a template that fits the tokenizer, or add the token")
        for field in ("system_prefix", "default_system", "default_system_context", "context"):
            if found := self._control.search(self.fill(getattr(template, field) or "")):
                raise UserError(f"template {template.name}: {field} has {found[0]}, but it is content, in which a "
                                "special token stays text; put it into system or user")
        if any(map(self._unknown, BUILTIN)):  # Llama-3.0 has no <|python_tag|>
            self.template = replace(template, builtin_call="", builtin_stop="")
        if not self._control.search(stop := self.fill(template.assistant[1])):
            raise UserError(f"template {template.name}: assistant ends with {stop!r}, which contains no special token "
                            f"of {tokenizer.file}, so the model would never stop; put the stop token there")

    def fingerprint(self) -> list[Any]:
        """Everything that token ids and masks depend on, except the conversation."""
        template = {name: self.fill(v) if isinstance(v, str) else v for name, v in asdict(self.template).items()}
        template |= {name: list(map(self.fill, v)) for name, v in template.items() if isinstance(v, tuple)}
        return [VERSION, self.tokenizer.sha256, self.train_on, template]

    def renderable(self, found: Conversation | Skipped) -> Conversation | Skipped:
        """`found` itself, or `Skipped` if it has tools that the template does not know."""
        if isinstance(found, Skipped):
            return found
        name, builtin = self.template.name, found.builtin_tools
        calls = [turn for turn in found.turns if turn.role == "call"]
        names: list[Any] = [*found.tools, *builtin, *(call.tool for call in calls)]
        if names and not self.template.call:
            reason = f"tools, which template {name} does not know"
        elif builtin and not self.template.builtin_call:
            reason = f"built-in tools, which template {name} does not know"
        elif wrong := [call.tool for call in calls if call.tool in builtin and _keyword_arguments(call) is None]:
            reason, names = "an argument of a built-in tool is not text", wrong
        else:
            return found
        return Skipped(reason, SHORT.repr(names)[:200], found.source, found.line)

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The rendered conversation, which must be `renderable`. Neighbouring texts are one piece, except answers and
        where the mask changes."""
        assert self.renderable(conversation) is conversation, "the template does not know this conversation's tools"
        return _merged(self._rendered(conversation))

    def encode(self, documents: list[list[Piece]]) -> EncodedDocuments:
        """Token ids and masks of `documents`, with P pieces together, of which U are distinct. The first token of a
        document is not trained: nothing could predict it."""
        number: dict[Piece, int] = {}
        codes = np.array([number.setdefault(piece, len(number)) for pieces in documents for piece in pieces], np.int64)
        distinct, known = list(number), self.tokenizer.control
        texts = iter(self.tokenizer.encode_batch([piece.text for piece in distinct if not piece.control]))
        table = [[known[piece.text]] if piece.control else next(texts) for piece in distinct]
        table_lengths = np.fromiter(map(len, table), np.int64, len(table))  # (U,)
        table_ids = np.fromiter(chain.from_iterable(table), np.uint32, table_lengths.sum())
        table_starts = _offsets(table_lengths)[:-1]

        lengths = table_lengths[codes]  # (P,)
        starts, piece_of_token = _offsets(lengths), np.repeat(codes, lengths)  # (P + 1,), (T,)
        tokens = table_ids[np.arange(starts[-1]) + np.repeat(table_starts[codes] - starts[:-1], lengths)]
        first_pieces = _offsets(np.array([len(pieces) for pieces in documents], np.int64))  # (documents + 1,)
        offsets = starts[first_pieces]
        weights = np.array([piece.trained for piece in distinct], dtype=np.float64)[piece_of_token]
        weights[offsets[:-1][np.diff(offsets) > 0]] = 0
        table_controls = np.array([known[piece.text] if piece.control else -1 for piece in distinct], dtype=np.int64)
        contents = np.array([self._contents(piece, len(ids)) for piece, ids in zip(distinct, table, strict=True)],
                            dtype=np.int64).reshape(-1, 2)
        sums = (np.diff(_offsets(count[codes])[first_pieces]) for count in contents.T)
        return EncodedDocuments(tokens, weights, table_controls[piece_of_token], offsets, *sums)

    def prompt(self, turns: tuple[Turn, ...]) -> list[int]:
        """Token ids of `turns`, up to where the assistant's answer begins."""
        rendered = self._rendered(Conversation(turns, source="", line=0))
        # With the mask of training: texts are merged where it is the same, and merged texts have other tokens.
        answer = self.split(self.template.assistant[0], self.train_on == "all")
        prompt = self.encode([_merged(chain(rendered, answer))])
        text = prompt.ids[prompt.controls < 0]
        assert not np.isin(text, list(self.tokenizer.control.values())).any(), "text became a control token"
        return prompt.ids.tolist()

    def stop_ids(self) -> set[int]:
        """The tokens at which generation ends: the stop tokens of an answer and of a built-in tool call, and the end
        of a plain text."""
        markers = (self.template.assistant[1], self.template.builtin_stop, self.template.document_end)
        return {self.tokenizer.control[piece.text] for marker in markers for piece in self.split(marker, False)
                if piece.control}

    def fill(self, marker: str) -> str:
        """A marker of the template with the tokenizer's own tokens for {bos} and {eos}."""
        return re.sub(r"\{(bos|eos)\}", lambda role: getattr(self.tokenizer, role[1]), marker)

    def _split(self, marker: str, trained: float) -> tuple[Piece, ...]:
        """A marker of the template as pieces: `<|eot_id|>\\n` -> control `<|eot_id|>`, text `\\n`."""
        parts = enumerate(self._control.split(self.fill(marker)))  # text, control, text, ...
        return tuple(Piece(part, i % 2 == 1, trained, of_template=(part,)) for i, part in parts if part)

    def _unknown(self, field: str) -> list[str]:
        """Names in a field of the template that look like control tokens but are not the tokenizer's."""
        names = re.findall(r"<\|[^|<>]+\|>", self.fill("".join(getattr(self.template, field))))
        return [name for name in names if name not in self.tokenizer.control]

    def _contents(self, piece: Piece, tokens: int) -> tuple[int, int]:
        """Words and tokens of a piece that has `tokens`, without what the template itself puts there."""
        words, rest = 0, piece.text
        for part in piece.of_template:
            content, _, rest = rest.partition(part)
            words += len(content.split())
            tokens -= self._cost(part)
        return words + len(rest.split()), max(tokens, 0)

    def _rendered(self, conversation: Conversation) -> Iterator[Piece]:
        template, split, builtin = self.template, self.split, conversation.builtin_tools
        yield from split(template.begin, False)
        if conversation.turns[0].role == "text":
            trained = conversation.turns[0].trained * conversation.weight
            yield from (Piece(conversation.turns[0].content, False, trained), *split(template.document_end, trained))
            return
        turns = template.turns(conversation)
        has_default = len(turns) > len(conversation.turns)  # the template's own system turn comes first
        last = max((i for i, turn in enumerate(turns) if turn.role in ANSWERS), default=-1)
        first_user = next((i for i, turn in enumerate(turns) if turn.role == "user"), -1)
        for i, turn in enumerate(turns):
            call, is_answer = turn.role == "call", turn.role in ANSWERS
            before, after, *rest = getattr(template, "assistant" if call else turn.role)
            trained = turn.trained * conversation.weight
            around = trained if self.train_on == "all" else 0
            inside = trained if is_answer and (self.train_on != "last_assistant" or i == last) else around
            yield from split(before, around)
            if turn.role == "system" and (conversation.tools or builtin):
                yield from split(template.tools_system, around)
                if builtin:
                    yield from split(template.builtin_system[0], around)
                    names = [name for name in builtin if name != "code_interpreter"]  # `tools_system` says that
                    yield Piece(", ".join(names), False, around)
                    yield from split(template.builtin_system[1], around)
            if i == first_user and conversation.tools:
                yield from split(template.tools_user[0], around)
                for tool in conversation.tools:
                    yield Piece(json.dumps(tool, ensure_ascii=False, indent=4), False, around)
                    yield from split(template.tools_user[1], around)
            if call:
                yield from self._call(turn, turn.tool in builtin, inside)
            elif text := template.content(turn):
                own = (text if has_default else template.system_prefix) if turn.role == "system" else ""
                yield Piece(text, False, inside, is_answer, (own,) if own else ())
            yield from split(template.builtin_stop if call and builtin else after, inside)
            yield from split("".join(rest), around)

    def _call(self, call: Turn, builtin: bool, trained: float) -> Iterator[Piece]:
        """The template's own control tokens become tokens; name and arguments stay text."""
        arguments = _keyword_arguments(call) if builtin else call.content
        assert arguments is not None, "not a renderable conversation"
        values = {"name": call.tool, "arguments": arguments}
        for piece in self.split(self.template.builtin_call if builtin else self.template.call, trained):
            text = re.sub(r"\{(name|arguments)\}", lambda field: values[field[1]], piece.text)
            yield piece if piece.control else Piece(text, False, trained, answer=True)


def _keyword_arguments(call: Turn) -> str | None:
    """The arguments of a call as a built-in tool takes them: `query="weather", unit="C"`. None unless all are text."""
    arguments = json.loads(call.content)
    is_text = all(isinstance(value, str) for value in arguments.values())
    return ", ".join(f'{name}="{value}"' for name, value in arguments.items()) if is_text else None


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (last and last.trained == piece.trained
                and not (last.control or last.answer or piece.control or piece.answer)):
            merged[-1] = last._replace(text=last.text + piece.text, of_template=last.of_template + piece.of_template)
        else:
            merged.append(piece)
    return merged


def _offsets(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
