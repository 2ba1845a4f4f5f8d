"""Figures as SVG for a page, in the page's colours, light and dark.

Matplotlib knows only fixed colours. So we draw each colour as one of a few odd codes, then replace each code in the
finished SVG by a variable of colours.css, which the reader's browser sets:

    color="#0a0c00"  ->  stroke: #0a0c00  ->  stroke: var(--c0)  ->  blue, or a lighter blue on a dark page

Text stays text, in the page's own font. figures.mplstyle has all settings of Matplotlib; by the last one, long curves
are simplified to their envelope, so the page of a run with a million steps is hardly larger than that of one with ten
thousand. Nothing here knows about runs.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from minisft.errors import UserError, printable

try:
    from matplotlib import style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise UserError("figures need matplotlib, which is not installed; pip install -e '.[plot]'") from None

FAINT, COLOURS = "#0a0b01", 6  # then dashes, then dots
SERIES = [f"#0a0c{i:02x}" for i in range(COLOURS)]
VARIABLES = {"#0a0b00": "--ink", FAINT: "--faint", "#0a0b02": "--line"} | {c: f"--c{i}" for i, c in enumerate(SERIES)}
STYLE = Path(__file__).with_name("figures.mplstyle")
MAX_NAME = 40  # characters of a name
MARKS: dict[str, dict[str, Any]] = {
    "line": {}, "raw": {"linewidth": 0.7, "alpha": 0.4}, "points": {"marker": "o", "markersize": 3.5},
    "crosses": {"linestyle": "", "marker": "x", "markersize": 5}}


@dataclass(frozen=True)
class Curve:
    """y over x, both (n,). NaN is a gap. Curves with the same `label` share an entry in the legend."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    style: str = "line"  # a key of MARKS. raw: thin and pale; crosses: marks without a line


@dataclass(frozen=True)
class Panel:
    """Axes with curves, and horizontal lines {label: y} across them."""

    title: str
    curves: Sequence[Curve]
    levels: dict[str, float] | None = None
    log: bool = False
    percent: bool = False


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """(n,) mean of the finite values up to `window` // 2 places away on either side, so that it does not lag."""
    finite, reach = np.isfinite(values), window // 2
    sums, counts = (np.convolve(each, np.ones(2 * reach + 1))[reach : reach + len(values)]
                    for each in (np.where(finite, values, 0.0), finite))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def window(steps: int) -> int:
    """Steps that a running mean covers: a twentieth of the run, at most 101; odd, so that it is centred."""
    return min(steps // 20, 100) | 1


@style.context(STYLE)
def lines(panels: Sequence[Panel]) -> str:
    """Panels side by side, with one legend above all of them."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(9, 2.7 * rows + 0.3))
    for i, panel in enumerate(panels, 1):
        _draw(panel, figure.add_subplot(rows, columns, i))
    entries = {label: handle for ax in reversed(figure.axes)
               for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if len(entries) > 1:
        figure.legend(entries.values(), entries, loc="outside upper left", ncols=4)
    return _svg(figure)


def _draw(panel: Panel, ax: Axes) -> None:
    for curve in panel.curves:
        marks = {"linestyle": ("-", "--", ":")[curve.colour // COLOURS % 3], **MARKS[curve.style]}
        ax.plot(curve.x, curve.y, color=SERIES[curve.colour % COLOURS], label=_short(curve.label), **marks)
    for label, level in (panel.levels or {}).items():
        ax.axhline(level, color=FAINT, linestyle=(0, (4, 3)), linewidth=1, label=label)
    ax.set(title=_short(panel.title), xlabel="step")
    if panel.log and any(np.any(curve.y > 0) for curve in panel.curves):
        ax.set_yscale("log")
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))  # type: ignore[call-arg]  # of a logarithmic axis
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
    if panel.percent:
        ax.set_ylim(0, 1.04)
        ax.yaxis.set_major_formatter("{x:.0%}")
    ax.margins(x=0.025)


@style.context(STYLE)
def histogram(title: str, labels: Sequence[str], counts: dict[str, Sequence[int]], *, xlabel: str) -> str:
    """Vertical bars; each series in `counts` is stacked on the one before."""
    figure = Figure(figsize=(4.5, 2.8))
    ax, bottom = figure.add_subplot(), np.zeros(len(labels))
    for i, (name, values) in enumerate(counts.items()):
        ax.bar(range(len(labels)), values, bottom=bottom, width=0.9, color=SERIES[i], label=_short(name))
        bottom += values
    step = -(-len(labels) // 6)
    ax.set_xticks(range(0, len(labels), step), labels[::step], fontsize=8)
    ax.set(title=title, xlabel=xlabel)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.grid(axis="x", visible=False)
    if len(counts) > 1:
        ax.legend()
    return _svg(figure)


@style.context(STYLE)
def shares(rows: dict[str, dict[str, float]]) -> str:
    """One horizontal bar per row, divided into named shares."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    figure = Figure(figsize=(9, 0.6 + 0.3 * len(rows) + 0.2 * -(-len(names) // 4)))
    ax, left = figure.add_subplot(), np.zeros(len(rows))
    for i, name in enumerate(names):
        widths = np.array([parts.get(name, 0.0) for parts in rows.values()])
        ax.barh(range(len(rows)), widths, left=left, height=0.7, color=SERIES[i % COLOURS], label=_short(name),
                alpha=(1, 0.6, 0.35)[i // COLOURS % 3])
        left += widths
    ax.set(xlim=(0, 1), yticks=range(len(rows)), yticklabels=map(_short, rows))
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=4)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure without its prologue (it stands in a page), in the page's colours, with ids that no other has."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts draw the text, not these
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", out.getvalue().partition("<svg")[2], count=2)
    svg = re.sub(r' id="\w+_\d+"|<style.*?</style>|\s*\n\s*(?=<)', "", svg)  # ids of groups, which nothing refers to
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>f{crc32(svg.encode()):x}", svg)
    return "<svg" + re.sub("|".join(VARIABLES), lambda code: f"var({VARIABLES[code[0]]})", svg).rstrip()


def _short(name: str) -> str:
    """A name for a legend, which would leave out one that begins with an underscore."""
    name = printable(name, MAX_NAME)
    return f" {name}" if name.startswith("_") else name
