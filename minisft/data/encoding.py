"""Many conversations at once become arrays.

A batch is worked on in two halves, so that Python and the tokenizer's threads can run at the same time: `render` is
Python alone and may run in another thread, one batch ahead; `encode` calls the tokenizer, which needs no Python while
it works, and puts the rest together with NumPy. Each distinct piece of a batch is tokenised once: half of the pieces
are the template's own, such as `user`.

    pieces    <|begin_of_text|>  <|start_header_id|>  user  <|end_header_id|>  \\n\\nHi  <|eot_id|>  ...
    codes     0                  1                    2     3                  4       5           which distinct piece
    ids       128000             128006               882   128007             271 ..  128009      looked up by code
"""

import re
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import chain

import numpy as np

from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation, Turn

Array = np.ndarray


@dataclass(frozen=True)
class Rendered:
    """Conversations rendered to P pieces, of which V are distinct."""

    conversations: list[Conversation]
    distinct: list[tuple[str, bool, bool]]  # text, whether it is a control token, whether it is an answer
    codes: Array  # (P,) int64: which of the distinct pieces each is
    trained: Array  # (P,) bool
    pieces: Array  # (documents,) int64: pieces of each


@dataclass(frozen=True)
class Documents:
    """T tokens of D documents, one after another."""

    ids: Array  # (T,) uint32
    trained: Array  # (T,) bool
    offsets: Array  # (D + 1,) int64: where each begins and the last ends
    controls: Array  # (C,) uint32: the control tokens that the template gave, in order
    places: Array  # (C,) int64: where they stand among the T
    words: Array  # (D,) int64: words of the contents, as white space separates them
    content_tokens: Array  # (D,) int64: their tokens

    def targets(self) -> Array:
        """(D,) int64: trained tokens of each document."""
        return _sums(self.trained, self.offsets)

    def only(self, wanted: Array) -> "Documents":
        """The documents where `wanted`, (D,) booleans, is true."""
        if wanted.all():
            return self
        lengths = np.diff(self.offsets)
        tokens = np.repeat(wanted, lengths)
        controls, before = tokens[self.places], _offsets(tokens)
        return Documents(self.ids[tokens], self.trained[tokens], _offsets(lengths[wanted]), self.controls[controls],
                         before[self.places[controls]], self.words[wanted], self.content_tokens[wanted])


def render(conversations: list[Conversation], renderer: Renderer) -> Rendered:
    """The pieces of `conversations`, numbered; text, mask and order are the renderer's."""
    number: dict[tuple[str, bool, bool], int] = {}
    codes, trained, counts = [], [], []
    for conversation in conversations:
        pieces = renderer.pieces(conversation)
        codes += [number.setdefault((piece.text, piece.control, piece.answer), len(number)) for piece in pieces]
        trained += [piece.trained for piece in pieces]
        counts.append(len(pieces))
    return Rendered(conversations, list(number), np.array(codes, dtype=np.int64), np.array(trained, dtype=bool),
                    np.array(counts, dtype=np.int64))


def encode(rendered: Rendered, renderer: Renderer) -> Documents:
    """The tokens and masks of a batch. The first token of a document is not trained: nothing could predict it."""
    tokenizer, distinct = renderer.tokenizer, rendered.distinct
    encoded = iter(tokenizer.encode_batch([text for text, control, _ in distinct if not control]))
    table = [[tokenizer.control[text]] if control else next(encoded) for text, control, _ in distinct]
    table_lengths = np.fromiter(map(len, table), np.int64, len(table))  # (V,)
    table_ids = np.fromiter(chain.from_iterable(table), np.uint32, table_lengths.sum())
    table_starts = np.cumsum(table_lengths) - table_lengths

    codes = rendered.codes
    lengths = table_lengths[codes]  # (P,)
    ends = np.cumsum(lengths)
    ids = table_ids[np.arange(lengths.sum()) + np.repeat(table_starts[codes] - ends + lengths, lengths)]
    piece_offsets = _offsets(rendered.pieces)  # (D + 1,): in pieces
    offsets = _offsets(lengths)[piece_offsets]
    trained = np.repeat(rendered.trained, lengths)
    trained[offsets[:-1][np.diff(offsets) > 0]] = False

    control = np.array([control for _, control, _ in distinct], dtype=bool)
    words, content_tokens = _contents(distinct, table_lengths, renderer)  # (V,), (V,)
    in_document = partial(_sums, offsets=piece_offsets)
    is_control = control[codes]  # (P,)
    return Documents(ids, trained, offsets, controls=table_ids[table_starts[codes[is_control]]],
                     places=(ends - lengths)[is_control], words=in_document(words[codes]),
                     content_tokens=in_document(content_tokens[codes]))


def _contents(distinct: list[tuple[str, bool, bool]], lengths: Array, renderer: Renderer) -> tuple[Array, Array]:
    """Words and tokens of each distinct piece, less what the template itself put there."""
    own, frames = _template_texts(renderer)
    costs = [len(renderer.tokenizer.encode(before)) + len(renderer.tokenizer.encode(after)) for before, after in frames]
    words, tokens = np.zeros(len(distinct), dtype=np.int64), np.zeros(len(distinct), dtype=np.int64)
    for i, (text, control, answer) in enumerate(distinct):
        if answer:
            words[i], tokens[i] = len(text.split()), lengths[i]
        elif not control and text not in own:
            (before, after), cost = next((frame, cost) for frame, cost in zip(frames, costs, strict=True)
                                         if text.startswith(frame[0]) and text.endswith(frame[1]))
            words[i] = len(text[len(before) : len(text) - len(after)].split())
            tokens[i] = max(lengths[i] - cost, 0)
    return words, tokens


def _template_texts(renderer: Renderer) -> tuple[set[str], list[tuple[str, str]]]:
    """The text pieces that are the template's own, such as `user`; and what it puts around contents, longest first."""
    mark, own, frames = "\N{REPLACEMENT CHARACTER}", set(), {("", "")}
    for context in ("", mark):
        talk = (Turn("user", mark, context), Turn("assistant", mark)) * 2
        for turns in (talk, (Turn("system", mark), *talk)):
            for piece in renderer.pieces(Conversation(turns, "", 0)):
                if mark in piece.text:
                    frames.add((piece.text.partition(mark)[0], piece.text.rpartition(mark)[2]))
                elif not piece.control:
                    own.add(piece.text)
    return own, sorted(frames, key=lambda frame: (-len("".join(frame)), frame))


_PLAIN = bytes(range(256)).lower()
_DROPPED = bytes(byte for byte in range(128) if not chr(byte).isalnum())


def loose_hash(conversation: Conversation) -> int:
    """Equal for conversations whose texts differ in case, spacing and punctuation alone; 64 bits.

    Who says what is left out, so that the same text is found again under another layout of roles. The four letters i
    of Turkish are one: casing in a file is often by the rules of English.
    """
    text = "".join([part for turn in conversation.turns for part in (turn.content, turn.context)])
    folded = text
    if not text.isascii():
        folded = re.sub(r"\W+", "", text.casefold().replace("ı", "i"))
    bare = folded.encode("utf-8").translate(_PLAIN, _DROPPED) or text.encode("utf-8")  # nothing left: as it stands
    return int.from_bytes(blake2b(bare, digest_size=8).digest(), "little")


def _offsets(counts: Array) -> Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _sums(values: Array, offsets: Array) -> Array:
    """Sums of `values` between neighbouring offsets."""
    return np.diff(_offsets(values)[offsets])
