"""From token ids to text in which nothing hides.

    Hi<|eot_id|> typed by a user, the control token, ESC     ->     Hi<|eot_id|>⟨<|eot_id|>⟩⟨U+001B⟩

Nothing between ⟨ and ⟩ is content: it is a control token, or the number of a character that cannot be seen, or that
steers a terminal or the direction of writing. Our own signs in a text are shown by number too, so nothing in the data
can pass for a mark, and the text can be recovered from what is shown.

Tokens are not characters: ş may be two tokens and an emoji four. We decode the smallest runs of tokens that hold whole
characters. A mask that cuts through a character, which no renderer should make, shows as U+FFFD on both sides.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, zip_longest

import numpy as np

from minisft.data.tokenizer import Tokenizer

OURS = "⟦⟧⟨⟩↵⇥␣"
LEGEND = "⟨⟩ control tokens and characters that cannot be seen, ↵ newline, ⇥ tab, ␣ space at an edge"
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")  # Unicode categories that cannot be seen, or move what can
VISIBLE = " \u200c\u200d"  # of those: a space, and joiners without which emoji and some scripts fall apart


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind."""

    trained: bool
    control: bool
    tokens: list[tuple[list[int], str]]  # the smallest runs of whole characters: ids, and the text shown for them

    @property
    def text(self) -> str:
        """The text shown for all tokens."""
        return "".join(shown for _, shown in self.tokens)


def spans(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> list[Span]:
    """Token ids (L,) and mask (L,) as spans of text and of control tokens."""
    control, found = frozenset(tokenizer.control.values()), []
    pairs = zip(ids.tolist(), trained.tolist(), strict=True)
    for (is_trained, is_control), same in groupby(pairs, key=lambda pair: (bool(pair[1]), pair[0] in control)):
        runs, texts = zip(*whole_characters([token for token, _ in same], tokenizer), strict=True)
        shown = [f"⟨{text}⟩" if is_control else text for text in visible(texts)]
        found.append(Span(is_trained, is_control, list(zip(runs, shown, strict=True))))
    return found


def whole_characters(ids: list[int], tokenizer: Tokenizer) -> Iterator[tuple[list[int], str]]:
    """The smallest runs of `ids` that hold whole characters, each with its text."""
    run: list[int] = []
    for token, after in zip_longest(ids, ids[1:]):
        run.append(token)
        text = tokenizer.decode(run)
        # U+FFFD is part of a character, or one in the data: then the next token does not change it.
        whole = not text.endswith("\ufffd") or after is None
        if whole or tokenizer.decode([*run, after]) == text + tokenizer.decode([after]):
            yield run, text
            run = []


def visible(parts: Sequence[str]) -> list[str]:
    """The parts of a text with everything hidden in it made visible; spaces only at the two ends of the whole."""
    text = "".join(parts)
    first, last = len(text) - len(text.lstrip(" ")), len(text.rstrip(" "))
    shown = [_character(c) if first <= i < last else "␣" for i, c in enumerate(text)]
    return ["".join(shown[end - len(part) : end])
            for part, end in zip(parts, accumulate(map(len, parts)), strict=True)]


def _character(c: str) -> str:
    hidden = c in OURS or (unicodedata.category(c) in HIDDEN and c not in VISIBLE)
    return {"\n": "↵\n", "\t": "⇥\t"}.get(c, f"⟨U+{ord(c):04X}⟩" if hidden else c)
