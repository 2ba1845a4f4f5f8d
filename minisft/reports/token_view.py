"""Documents as the model sees them: every token, and whether it is trained; on a terminal or as a page.

    ⟨── document 17 · chats.jsonl:18 · 26 tokens, 6 trained (23.1%) ──⟩
    ⟨<|begin_of_text|>⟩⟨<|start_header_id|>⟩user⟨<|end_header_id|>⟩↵
    ↵
    What does <|eot_id|> do?⟨<|eot_id|>⟩⟨<|start_header_id|>⟩assistant⟨<|end_header_id|>⟩↵
    ↵
    ⟦It ends a turn.⟨<|eot_id|>⟩⟧

On a terminal trained tokens are green; without colour they stand between ⟦ and ⟧. Nothing between ⟨ and ⟩ is content:
it is a control token, a heading, or the number of a character that cannot be seen, or that steers a terminal or the
direction of writing. Our own signs in a text are shown by number too. So no conversation can fake a mark, and the text
can be recovered from what is shown.

Tokens are not characters: ş may be two tokens and an emoji four. We decode the smallest runs of tokens that hold whole
characters. A mask that cuts through a character, which no renderer should make, shows as U+FFFD on both sides.

The page begins each pack with its attention, to scale: a row is a token, its columns are the tokens that it sees.

    a .  .  .  .
    a a  .  .  .      documents a and b: causal triangles along the diagonal, and nothing between them
    .  .  b  .  .
    .  .  b  b  .     a row that predicts a trained token has the colour of training
    .  .  b  b  b

Everything from the data is escaped.
"""

import os
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, count, groupby, zip_longest

import numpy as np

from minisft.data.dataset import Dataset
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.prepare import Prepared
from minisft.reports.page import relative, render

FEW = 3  # documents shown by default
TRAINED, CONTROL, HEADING = "32", "2", "1"  # green, dim, bold
OURS = "⟦⟧⟨⟩↵⇥␣"
LEGEND = "⟨⟩ control tokens and characters that cannot be seen, ↵ newline, ⇥ tab, ␣ space at an edge"
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")  # Unicode categories that cannot be seen, or move what can
BLANK = "\u034f\u115f\u1160\u2800\u3164\uffa0"  # of other categories, and as invisible
VISIBLE = " \u200c\u200d"  # of those: a space, and joiners without which emoji and some scripts fall apart


# From token ids to text in which nothing hides

@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind."""

    trained: bool
    control: bool
    tokens: list[tuple[list[int], str]]  # the smallest runs of whole characters: ids, and the text shown for them

    @property
    def text(self) -> str:
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
    hidden = c in OURS + BLANK or (unicodedata.category(c) in HIDDEN and c not in VISIBLE)
    return {"\n": "↵\n", "\t": "⇥\t"}.get(c, f"⟨U+{ord(c):04X}⟩" if hidden else c)


# Which documents

@dataclass(frozen=True)
class Document:
    """A document to show."""

    index: int  # in its data set
    origin: str  # file:line
    trained: np.ndarray  # (L,) mask
    spans: list[Span]

    @property
    def heading(self) -> str:
        return f"document {self.index} · {self.origin} · {_counts(self.trained)}"


@dataclass(frozen=True)
class View:
    """Documents that are shown together: those of a pack, or a choice."""

    title: str
    documents: list[Document]
    room: int = 0  # tokens of a full pack; 0 if it is not a pack

    @property
    def trained(self) -> np.ndarray:
        """(T,) the masks of all documents, one after another."""
        return np.concatenate([document.trained for document in self.documents])

    @property
    def heading(self) -> str:
        heading, number = f"{self.title} · {_counts(self.trained)}", len(self.documents)
        return heading if not self.room else (f"{heading} · {number:,} document{'s' * (number != 1)}, "
                                              f"{len(self.trained) / self.room:.1%} full")


def _counts(trained: np.ndarray) -> str:
    return f"{len(trained):,} tokens, {trained.sum():,} trained ({trained.mean():.1%})"


def choose(prepared: Prepared, *, source: str | None = None, index: int | None = None, longest: bool = False,
           random: int | None = None, pack: int | None = None, step: int | None = None,
           whole: bool = False) -> list[View]:
    """The documents asked for; by default the first few of the first pack, or all of it with `whole`.

    Documents and packs count from 0, steps from 1 as in metrics.jsonl. Raises UserError for what does not exist.
    """
    wishes = {"--index": index is not None, "--longest": longest, "--random": random is not None,
              "--pack or --step": pack is not None or step is not None}
    wished = [name for name, given in wishes.items() if given]
    if len(wished) > 1:
        raise UserError(f"{' and '.join(wished)}: each of them chooses documents; give only one")
    if wishes["--pack or --step"]:
        if source is not None:
            raise UserError(f"--source {source}: a pack holds documents of all sources; leave out --source")
        return _packs(prepared, pack, step)
    if source is None and not wished:
        [view] = _packs(prepared, 0, None)
        title = f"the first documents of {view.title} (--pack 0: all)"
        return [view if whole else View(title, view.documents[:FEW])]
    dataset, documents, of = _of_source(prepared, source)
    chosen, title = documents[:FEW], f"the first documents{of}"
    if index is not None:
        _within("--index", index, documents, f"documents{of}")
        chosen, title = np.array([index]), "one document"
    elif longest:
        chosen, title = documents[[np.argmax(dataset.lengths[documents])]], f"the longest document{of}"
    elif random is not None:
        chosen = np.random.default_rng(random).choice(documents, min(FEW, len(documents)), replace=False)
        title = f"documents{of} drawn with seed {random}"
    return [_view(prepared, dataset, chosen, title)]


def _packs(prepared: Prepared, pack: int | None, step: int | None) -> list[View]:
    """Pack `pack`, or all packs, of step `step`, or of the first epoch."""
    plan = prepared.plan
    of, number = "the first epoch", len(plan.epoch(0))
    contents: Callable[[int], np.ndarray] = plan.epoch(0).pack
    if step is not None:
        _within("--step", step, range(1, plan.total_steps + 1), "steps of the run")
        packs = plan.documents(step - 1)
        of, number, contents = f"step {step}", len(packs), lambda index: packs[index]
    if pack is not None:
        _within("--pack", pack, range(number), f"packs of {of}")
    return [_view(prepared, prepared.train, contents(i), f"pack {i} of {of}", room=plan.seq_len)
            for i in (range(number) if pack is None else [pack])]


def _of_source(prepared: Prepared, source: str | None) -> tuple[Dataset, np.ndarray, str]:
    """-> a data set, its documents from `source` (None: all training documents), words for messages."""
    dataset, names = prepared.train, [report.name for report in prepared.train.reports]
    if source is None:
        return dataset, np.arange(len(dataset)), ""
    if source not in (*names, *prepared.evals):
        raise UserError(f"--source {source}: no such source; the sources are "
                        f"{', '.join(dict.fromkeys([*names, *prepared.evals]))}")
    if source not in names:
        dataset = prepared.evals[source]
    documents = np.flatnonzero(dataset.store_of == (names.index(source) if source in names else 0))
    if not len(documents):
        raise UserError(f"--source {source}: none of its documents is left; minisft prepare says why")
    return dataset, documents, f" of {source}"


def _within(option: str, value: int, choices: range | np.ndarray, what: str) -> None:
    if value not in choices:
        raise UserError(f"{option} {value}: the {what} are {choices[0]} to {choices[-1]}")


def _view(prepared: Prepared, dataset: Dataset, chosen: np.ndarray, title: str, *, room: int = 0) -> View:
    documents = []
    for i in chosen.tolist():
        ids, weights = dataset.document(i)
        trained = weights > 0
        [origin] = visible(["{}:{}".format(*dataset.origin(i))])
        if weights.dtype == np.float64:
            origin += f" · loss weights {weights[trained].min():g} to {weights.max():g}"
        documents.append(Document(i, origin, trained, spans(ids, trained, prepared.tokenizer)))
    return View(visible([title])[0], documents, room)


# On the terminal

def print_views(views: list[View], *, ids: bool = False) -> None:
    """Print to standard output, in colour if it is a terminal that shows colours and NO_COLOR is not set."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    text = as_text(views, color=color, ids=ids)
    encoding = sys.stdout.encoding
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def as_text(views: list[View], *, color: bool, ids: bool = False) -> str:
    """The views as text: continuous, or with `ids` one line for each run of tokens that holds whole characters."""
    lines = []
    for view in views:
        lines += [_paint(f"⟨── {view.heading} ──⟩", HEADING, color), ""]
        for document in view.documents:
            lines += [_paint(f"⟨── {document.heading} ──⟩", HEADING, color),
                      _listed(document, color) if ids else _flowing(document, color), ""]
    return "\n".join([*lines, f"{_trained('trained tokens', color)}, {LEGEND}"])


def _flowing(document: Document, color: bool) -> str:
    return "".join(_trained("".join(span.text for span in run), color) if trained else
                   "".join(_paint(span.text, CONTROL, color and span.control) for span in run)
                   for trained, run in groupby(document.spans, key=lambda span: span.trained))


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
    """Each line separately: pagers forget a colour at the end of a line."""
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" for line in text.split("\n")) if color else text


# On a page

def as_page(views: list[View]) -> str:
    """The views as HTML."""
    numbers = count()
    sections = "".join(_section(view, numbers) for view in views)
    legend = f"<p><mark>trained tokens</mark>, {LEGEND}; token ids under the pointer</p>\n"
    return render(f"minisft show: {views[0].title}", "show", sections + legend)


def _section(view: View, numbers: Iterator[int]) -> str:
    """A view; its documents take the next `numbers` on the page, where one document may stand twice."""
    tokens, start, triangles, texts = len(view.trained), 0, "", ""
    size = max(tokens, view.room)
    for document, number in zip(view.documents, numbers, strict=False):
        heading = escape(relative(document.heading))
        triangles += f'<a href="#d{number}"><title>{heading}</title>{_triangle(document, start)}</a>'
        texts += f'<h2 id="d{number}">{heading}</h2>\n<pre>{"".join(map(_span, document.spans))}</pre>\n'
        start += len(document.trained)
    bars = "".join(f'<rect class="{kind}" width="{width}" height="1"/>' for kind, width in
                   (("room", size), ("block", tokens), ("target", int(view.trained.sum()))))
    return (f"<section><h1>{escape(view.heading)}</h1>\n"
            '<svg class="share" role="img" aria-label="share of trained tokens" preserveAspectRatio="none" '
            f'viewBox="0 0 {size} 1">{bars}</svg>\n'
            f'<figure><svg role="img" aria-label="attention of the pack" viewBox="0 0 {size} {size}">{triangles}</svg>'
            "\n<figcaption>Attention: a row is a token, its columns are the tokens that it sees. A triangle is a "
            "document and leads to its text; rows that predict a trained token have the colour of training."
            "</figcaption></figure>\n"
            f"{texts}</section>\n")


def _triangle(document: Document, start: int) -> str:
    """The causal attention of a document from column `start`; x are the columns and y the rows, downward."""
    stop = start + len(document.trained)
    # Token t is predicted in row t - 1. mask 0 0 1 1 0 1 -> edges at 2 4 5 6 -> rows [1, 3) and [4, 5)
    edges = np.flatnonzero(np.diff(document.trained.astype(np.int8), prepend=0, append=0)) - 1 + start
    rows = (f'<polygon class="target" points="{start},{top} {top},{top} {below},{below} {start},{below}"/>'
            for top, below in edges.reshape(-1, 2).tolist())
    return f'<polygon class="block" points="{start},{start} {start},{stop} {stop},{stop}"/>{"".join(rows)}'


def _span(span: Span) -> str:
    kind = ' class="control"' if span.control else ""
    tokens = "".join(f'<span{kind} data-id="{" ".join(map(str, ids))}">{escape(text)}</span>'
                     for ids, text in span.tokens)
    return f"<mark>{tokens}</mark>" if span.trained else tokens
