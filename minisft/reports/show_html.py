"""The same documents as a page: one file, which needs no network and runs no script.

At the top of each pack stands its attention, to scale: a row is a token, and its columns are the tokens that it sees.

    a .  .  .  .
    a a  .  .  .      documents a and b: causal triangles along the diagonal, and nothing between them
    .  .  b  .  .
    .  .  b  b  .     a row that predicts a trained token has the colour of training
    .  .  b  b  b

Everything that comes from the data is escaped.
"""

from html import escape
from itertools import accumulate

import numpy as np

from minisft.reports.page import render
from minisft.reports.spans import LEGEND, Span
from minisft.reports.token_view import Document, View

STYLE = """
:root { --block: #b9c3d1; --trained: #2e9e5b; --mark: #cdeed9 }
@media (prefers-color-scheme: dark) { :root { --block: #4a5565; --trained: #3fba70; --mark: #17492c } }
h1 { font-size: 1.2rem } h2 { font-size: .9rem; position: sticky; top: 0; margin: 0; padding: .4rem 0;
  background: var(--page); border-bottom: 1px solid var(--line) }
h2:target { border-bottom-color: var(--trained); color: var(--trained) }
figure { margin: 1rem 0 } figure svg { width: 100%; max-width: 32rem; border: 1px solid var(--line) }
.share { display: block; width: 100%; height: .7rem }
.room { fill: var(--line) } .block { fill: var(--block) } .target { fill: var(--trained) }
a:hover .block { fill: var(--faint) }
pre { margin: .5rem 0 2rem; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
  font: .9rem/1.6 ui-monospace, monospace }
mark { background: var(--mark); color: inherit; border-radius: 2px } .control { color: var(--faint) }
[data-id]:hover { outline: 1px solid var(--trained) }
[data-id]:hover::after { content: "token " attr(data-id); position: fixed; left: 0; bottom: 0; padding: .3rem .8rem;
  background: var(--ink); color: var(--page) }
"""


def page(views: list[View]) -> str:
    """The page as HTML."""
    sections, number = [], 0
    for view in views:
        sections.append(_section(view, number))
        number += len(view.documents)
    legend = f"<p><mark>trained tokens</mark>, {LEGEND}; token ids under the pointer</p>\n"
    return render(f"minisft show: {views[0].title}", STYLE, "".join(sections) + legend)


def _section(view: View, number: int) -> str:
    """A view; `number` is that of its first document on the page, where one document may stand twice."""
    documents = "".join(f'<h2 id="d{i}">{escape(d.heading)}</h2>\n<pre>{"".join(map(_span, d.spans))}</pre>\n'
                        for i, d in enumerate(view.documents, number))
    return (f"<section><h1>{escape(view.heading)}</h1>\n{_share(view)}\n<figure>{_attention(view, number)}\n"
            "<figcaption>Attention: a row is a token, its columns the tokens it sees. A triangle is a document and "
            "leads to its text; rows that predict a trained token have the colour of training.</figcaption></figure>\n"
            f"{documents}</section>\n")


def _span(span: Span) -> str:
    kind = ' class="control"' if span.control else ""
    tokens = "".join(f'<span{kind} data-id="{" ".join(map(str, ids))}">{escape(text)}</span>'
                     for ids, text in span.tokens)
    return f"<mark>{tokens}</mark>" if span.trained else tokens


def _share(view: View) -> str:
    """A bar: trained tokens, other tokens, free room."""
    size = max(view.tokens, view.room)
    bars = (("room", size), ("block", view.tokens), ("target", view.target_tokens))
    rectangles = "".join(f'<rect class="{kind}" width="{width}" height="1"/>' for kind, width in bars)
    return (f'<svg class="share" role="img" aria-label="share of trained tokens" viewBox="0 0 {size} 1" '
            f'preserveAspectRatio="none">{rectangles}</svg>')


def _attention(view: View, number: int) -> str:
    size = max(view.tokens, view.room)
    starts = accumulate((len(document.trained) for document in view.documents), initial=0)
    blocks = "".join(_block(document, start, i) for i, (document, start)
                     in enumerate(zip(view.documents, starts, strict=False), number))
    return f'<svg role="img" aria-label="attention of the pack" viewBox="0 0 {size} {size}">{blocks}</svg>'


def _block(document: Document, start: int, number: int) -> str:
    """A document's causal triangle; x are the columns and y the rows, downward."""
    stop = start + len(document.trained)
    shapes = [f'<polygon class="block" points="{start},{start} {start},{stop} {stop},{stop}"/>']
    # Token t is predicted in row t - 1. mask 0 0 1 1 0 1 -> edges at 2 4 5 6 -> rows [1, 3) and [4, 5)
    edges = np.flatnonzero(np.diff(document.trained.astype(np.int8), prepend=0, append=0)) - 1 + start
    shapes += [f'<polygon class="target" points="{start},{top} {top},{top} {below},{below} {start},{below}"/>'
               for top, below in edges.reshape(-1, 2).tolist()]
    return f'<a href="#d{number}"><title>{escape(document.heading)}</title>{"".join(shapes)}</a>'
