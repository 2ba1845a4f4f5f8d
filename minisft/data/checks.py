"""The laws of a tokenised document, checked on the tokens themselves before they are stored.

The renderer sets masks and control tokens with care, but a template of the user's own can still begin twice, and a
fault in the renderer would be trained on without a word. So each document is looked at once more, from its ids and
mask alone and from what the template says, not from how the renderer went about it:

    one beginning        the beginning-of-text token stands first, where the template begins with it, and nowhere else
    trained stop         an answer that is trained ends in a stop token that is trained
    nothing smuggled     the control tokens are those of the template: none came from a conversation's text
    something to learn   at least one token is trained
    known ids            every id is one of the tokenizer's

A breach ends the run, because it is of the template or of the program and would be found in many documents.
"""

import re
from typing import NoReturn

import numpy as np

from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation
from minisft.data.encoding import Documents
from minisft.errors import UserError

Array = np.ndarray


class Laws:
    """What a template and its tokenizer promise of every document."""

    def __init__(self, renderer: Renderer):
        self.renderer, self.tokenizer = renderer, renderer.tokenizer
        template = renderer.template
        begin = self._split(template.begin)
        roles = {part for role in (template.system, template.user, template.assistant)
                 for part in self._split("".join(role))}
        # The tokenizer knows its beginning-of-text token, or else it is what the template begins with and never repeats
        bos = self.tokenizer.bos or (begin[0] if begin and begin[0] in self.tokenizer.control
                                     and begin[0] not in roles else "")
        self.bos = self.tokenizer.control.get(bos, -1)
        self.begins = bool(begin) and begin[0] == bos
        self.stops = np.array(sorted(renderer.stop_ids()), dtype=np.uint32)
        self.is_control = np.zeros(self.tokenizer.vocab_size, dtype=bool)
        self.is_control[list(self.tokenizer.control.values())] = True
        # What may follow the stop token within the run: \n in chatml, whose third item is trained by train_on = "all"
        after = template.assistant[1:] if renderer.train_on == "all" else template.assistant[1:2]
        self.tails = [tail for marker in ("".join(after), template.document_end) if (tail := self._after_stop(marker))]
        self.plain_stops = any(part in self.tokenizer.control for part in self._split(template.document_end))

    def check(self, documents: Documents, conversations: list[Conversation]) -> None:
        """Raise UserError for the first breach. Every conversation must have its document, in the same order."""
        unknown = documents.ids >= self.tokenizer.vocab_size
        if unknown.any():
            self._breach(documents, conversations, int(np.argmax(unknown)), "an id beyond the tokenizer's vocabulary",
                         f"the vocabulary has {self.tokenizer.vocab_size} ids; tokenizer.json is damaged, fetch it "
                         "again")
        self._nothing_smuggled(documents, conversations)
        self._one_beginning(documents, conversations)
        self._trained_stop(documents, conversations)
        untrained = documents.targets() == 0
        if untrained.any():
            self._breach(documents, conversations, int(documents.offsets[np.argmax(untrained)]),
                         "no trained token in the document", "this is a fault of minisft, please report it")

    def _nothing_smuggled(self, documents: Documents, conversations: list[Conversation]) -> None:
        expected = np.zeros(len(documents.ids), dtype=bool)
        expected[documents.places] = True
        wrong = self.is_control[documents.ids] != expected
        wrong[documents.places] |= documents.ids[documents.places] != documents.controls
        if wrong.any():
            place = int(np.argmax(wrong))
            if expected[place]:
                self._breach(documents, conversations, place, "not the control token that the template put there",
                             "this is a fault of minisft, please report it")
            self._breach(documents, conversations, place, "a control token that the template did not put there",
                         "text of a conversation must not become one; see special and normalized among the added "
                         f"tokens of {self.tokenizer.file}")

    def _one_beginning(self, documents: Documents, conversations: list[Conversation]) -> None:
        is_first = np.zeros(len(documents.ids) + 1, dtype=bool)  # one more: an empty document begins at the end
        is_first[documents.offsets[:-1]] = True
        is_first = is_first[:-1]
        is_bos = documents.ids == self.bos
        if self.begins and (missing := is_first & ~is_bos).any():
            self._breach(documents, conversations, int(np.argmax(missing)), "the beginning-of-text token is missing",
                         f"begin of template {self.renderer.template.name} must come first, once")
        if self.bos not in self.stops:  # one token for both: it also stands at the ends
            again = is_bos & ~is_first if self.begins else is_bos
            if again.any():
                self._breach(documents, conversations, int(np.argmax(again)), "a second beginning-of-text token"
                             if self.begins else "a beginning-of-text token that is not the template's begin",
                             f"in template {self.renderer.template.name} put it into begin, once, and nowhere else")

    def _trained_stop(self, documents: Documents, conversations: list[Conversation]) -> None:
        """Each run of trained tokens that ends an answer ends in a stop token, and none is left just outside a run."""
        ids, trained = documents.ids, documents.trained
        plain = np.array([c.turns[0].role == "text" for c in conversations], dtype=bool)
        document = np.repeat(np.arange(len(conversations)), np.diff(documents.offsets))
        is_last = np.ones(len(ids), dtype=bool)
        is_last[:-1] = document[1:] != document[:-1]
        is_stop = np.isin(ids, self.stops)
        ends = np.flatnonzero(trained & (is_last | ~np.append(trained[1:], False)))
        inner = ends[~is_last[ends]]
        left_out = inner[is_stop[inner + 1] & ~is_stop[inner]] + 1
        remedy = (f"the model would never learn to stop; in template {self.renderer.template.name} the second item of "
                  "assistant is the stop token, and its third is not trained")
        if len(left_out):
            self._breach(documents, conversations, int(left_out[0]), "a stop token after trained text is not trained",
                         remedy)
        if self.renderer.train_on == "all":
            ends = ends[is_last[ends]]  # what ends inside a document ends before an answer that is left out
        if not self.plain_stops:
            ends = ends[~plain[document[ends]]]
        good = is_stop[ends]
        for tail in self.tails:
            stops = np.maximum(ends - len(tail), documents.offsets[document[ends]])
            follows = is_stop[stops] & trained[stops]
            for i, token in enumerate(tail, 1):
                follows &= (ids[np.minimum(stops + i, ends)] == token) & trained[np.minimum(stops + i, ends)]
            good |= follows & (ends - stops == len(tail))
        if not good.all():
            self._breach(documents, conversations, int(ends[np.argmin(good)]), "a trained answer ends without a "
                         "trained stop token", remedy)

    def _breach(self, documents: Documents, conversations: list[Conversation], place: int, law: str,
                remedy: str) -> NoReturn:
        document = int(np.searchsorted(documents.offsets, place, side="right")) - 1
        where, token = conversations[document], int(documents.ids[place]) if place < len(documents.ids) else None
        text = "" if token is None or token >= self.tokenizer.vocab_size else f" {self.tokenizer.decode([token])!r}"
        raise UserError(f"{where.source}:{where.line}: {law}: token {place - documents.offsets[document]} of the "
                        f"document is {token}{text}; {remedy}")

    def _split(self, marker: str) -> list[str]:
        """Control tokens and the text between them."""
        marker = marker.replace("{bos}", self.tokenizer.bos)
        marker = marker.replace("{eos}", self.tokenizer.eos) if "{eos}" in marker else marker
        names = "|".join(map(re.escape, sorted(self.tokenizer.control, key=len, reverse=True)))
        return [part for part in re.split(f"({names or '(?!)'})", marker) if part]

    def _after_stop(self, marker: str) -> list[int]:
        *_, last = self._split(marker) or [""]
        return [] if last in self.tokenizer.control else self.tokenizer.encode(last)
