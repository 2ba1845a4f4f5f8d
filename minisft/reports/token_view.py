"""Documents as the model sees them: every token, and which of them are trained.

    ⟨── document 17 · chats.jsonl:18 · 26 tokens, 6 trained (23.1%) ──⟩
    ⟨<|begin_of_text|>⟩⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩↵
    ↵
    What does <|eot_id|> do?⟨<|eot_id|>⟩⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩↵
    ↵
    ⟦It ends a turn.⟨<|eot_id|>⟩⟧

On a terminal trained tokens are green; without colour they stand between ⟦ and ⟧. What stands in ⟨ ⟩ is never content
(spans.py), so no conversation can fake a control token, a heading or the end of an answer.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from minisft.data.dataset import Dataset
from minisft.errors import UserError
from minisft.prepare import Prepared
from minisft.reports.spans import LEGEND, Span, spans, visible

FEW = 3  # documents shown where nobody said which
TRAINED, CONTROL, HEADING = "32", "2", "1"  # green, dim, bold


@dataclass(frozen=True)
class Document:
    """A document as it is shown."""

    index: int  # in its data set
    origin: str  # file:line
    trained: np.ndarray  # (L,) mask
    spans: list[Span]

    @property
    def heading(self) -> str:
        """Which document, where it comes from, its tokens."""
        return f"document {self.index} · {self.origin} · {counts(len(self.trained), int(self.trained.sum()))}"


@dataclass(frozen=True)
class View:
    """Documents that are shown together: those of a pack, or a choice."""

    title: str
    documents: list[Document]
    room: int = 0  # tokens of a full pack; 0 where it is none

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(len(document.trained) for document in self.documents)

    @property
    def target_tokens(self) -> int:
        """Trained tokens of all documents."""
        return sum(int(document.trained.sum()) for document in self.documents)

    @property
    def heading(self) -> str:
        """What is shown, its tokens, and how full the pack is."""
        heading = f"{self.title} · {counts(self.tokens, self.target_tokens)}"
        if not self.room:
            return heading
        count = len(self.documents)
        return f"{heading} · {count:,} document{'s' * (count != 1)}, {self.tokens / self.room:.1%} full"


def counts(tokens: int, trained: int) -> str:
    """Tokens and trained tokens in words."""
    return f"{tokens:,} tokens, {trained:,} trained ({trained / max(tokens, 1):.1%})"


# Which documents

def choose(prepared: Prepared, *, source: str | None = None, index: int | None = None, longest: bool = False,
           random: int | None = None, pack: int | None = None, step: int | None = None,
           whole: bool = False) -> list[View]:
    """The documents asked for; without a wish the first few of the first pack, or all of it where `whole`.

    Documents and packs count from 0, steps from 1 as in metrics.jsonl. Raises UserError for what there is not.
    """
    wishes = {"--index": index is not None, "--longest": longest, "--random": random is not None,
              "--pack or --step": pack is not None or step is not None}
    wished = [name for name in wishes if wishes[name]]
    if len(wished) > 1:
        raise UserError(f"{' and '.join(wished)}: each of them chooses documents; give one")
    if source is not None and wishes["--pack or --step"]:
        raise UserError(f"--source {source}: a pack holds documents of all sources; leave out --source")
    if wishes["--pack or --step"]:
        return _packs(prepared, pack, step)
    if source is None and not wished:
        [view] = _packs(prepared, 0, None)
        title = f"the first documents of {view.title} (--pack 0: all)"
        return [view if whole else View(title, view.documents[:FEW])]
    dataset, documents, of = _of_source(prepared, source)
    if index is not None:
        _within("--index", index, documents, f"documents{of}")
        return [_view(prepared, dataset, [index], "one document")]
    if longest:
        found = documents[np.argmax(dataset.lengths[documents])]
        return [_view(prepared, dataset, [found], f"the longest document{of}")]
    if random is None:
        return [_view(prepared, dataset, documents[:FEW], f"the first documents{of}")]
    if random < 0:
        raise UserError(f"--random {random}: the seed is a whole number from 0")
    drawn = np.random.default_rng(random).choice(documents, min(FEW, len(documents)), replace=False)
    return [_view(prepared, dataset, drawn, f"documents{of} drawn with seed {random}")]


def _packs(prepared: Prepared, pack: int | None, step: int | None) -> list[View]:
    """Pack `pack`, or all packs, of step `step`, or of the first epoch."""
    plan = prepared.plan
    if step is None:
        epoch = plan.epoch(0)
        of, count = "the first epoch", len(epoch)
        contents: Callable[[int], np.ndarray] = epoch.pack
    else:
        _within("--step", step, range(1, plan.total_steps + 1), "steps of the run")
        packs = plan.documents(step - 1)
        of, count, contents = f"step {step}", len(packs), packs.__getitem__
    if pack is not None:
        _within("--pack", pack, range(count), f"packs of {of}")
    return [_view(prepared, prepared.train, contents(i), f"pack {i} of {of}", room=plan.seq_len)
            for i in (range(count) if pack is None else [pack])]


def _of_source(prepared: Prepared, source: str | None) -> tuple[Dataset, np.ndarray, str]:
    """-> a data set, its documents of `source` (without one: all training documents), words for messages."""
    dataset, names = prepared.train, [report.name for report in prepared.train.reports]
    if source is None:
        return dataset, np.arange(len(dataset)), ""
    if source in names:
        documents = np.flatnonzero(dataset.store_of == names.index(source))
    elif source in prepared.evals:
        dataset = prepared.evals[source]
        documents = np.arange(len(dataset))
    else:
        there = ", ".join(dict.fromkeys([*names, *prepared.evals]))
        raise UserError(f"--source {source}: there is no such source; the sources are {there}")
    if not len(documents):
        raise UserError(f"--source {source}: none of its documents is left; minisft prepare says why")
    return dataset, documents, f" of {source}"


def _within(option: str, value: int, choices: range | np.ndarray, what: str) -> None:
    if value not in choices:
        raise UserError(f"{option} {value}: the {what} are {choices[0]} to {choices[-1]}")


def _view(prepared: Prepared, dataset: Dataset, chosen: np.ndarray | list[int], title: str, *, room: int = 0) -> View:
    documents = []
    for i in map(int, chosen):
        ids, trained = dataset.document(i)
        [origin] = visible(["{}:{}".format(*dataset.origin(i))])
        documents.append(Document(i, origin, trained, spans(ids, trained, prepared.tokenizer)))
    return View(visible([title])[0], documents, room)


# On the terminal

def print_views(views: list[View], *, ids: bool = False) -> None:
    """Print to standard output, in colour where that is a terminal and nothing speaks against it."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    text = as_text(views, color=color, ids=ids)
    encoding = sys.stdout.encoding
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def as_text(views: list[View], *, color: bool, ids: bool = False) -> str:
    """The views as text: continuous, or with `ids` one line for each run of tokens that holds whole characters."""
    def heading(text: str) -> str:
        return _paint(f"⟨── {text} ──⟩", HEADING, color)

    lines = []
    for view in views:
        lines += [heading(view.heading), ""]
        for document in view.documents:
            lines += [heading(document.heading), _listed(document, color) if ids else _flowing(document, color), ""]
    trained = _trained("trained tokens", color)
    return "\n".join([*lines, f"{trained}, {LEGEND}"])


def _flowing(document: Document, color: bool) -> str:
    parts = []
    for trained, run in groupby(document.spans, key=lambda span: span.trained):
        if trained:
            parts.append(_trained("".join(span.text for span in run), color))
        else:
            parts += [_paint(span.text, CONTROL, color and span.control) for span in run]
    return "".join(parts)


def _listed(document: Document, color: bool) -> str:
    lines, position = ["position       ids  text"], 0
    for span in document.spans:
        for ids, text in span.tokens:
            text = text.translate({ord("\n"): "", ord("\t"): "", ord(" "): "␣"})  # the signs before \n and \t stay
            shown = _trained(text, color) if span.trained else _paint(text, CONTROL, color and span.control)
            lines.append(f"{position:>8}  {' '.join(map(str, ids)):>8}  {shown}")
            position += len(ids)
    return "\n".join(lines)


def _trained(text: str, color: bool) -> str:
    return _paint(text, TRAINED, True) if color else f"⟦{text}⟧"


def _paint(text: str, code: str, color: bool) -> str:
    """Each line by itself: pagers forget a colour at the end of a line."""
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n")) if color else text
