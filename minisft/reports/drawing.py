"""Figures as SVG for a page, in the page's colours, light and dark, with a value under the pointer.

Matplotlib knows only fixed colours. So we draw each colour as one of a few odd codes, then replace each code in the
finished SVG by a variable of colours.css, which the reader's browser sets:

    color="#0a0c00"  ->  stroke: #0a0c00  ->  stroke: var(--c0)  ->  blue, or a lighter blue on a dark page

A figure is as narrow as a phone, so that its labels are as large there as the text around it. Invisible strips over it
say what stands below the pointer (report.css shows one at a time), because the page runs no script. Text stays text, in
the page's own font. figures.mplstyle has all settings of Matplotlib; by the last one, long curves are simplified to
their envelope, so the page of a run with a million steps is hardly larger than that of one with ten thousand. Nothing
here knows about runs.
"""

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from minisft.errors import UserError, printable
from minisft.reports.page import relative

try:
    from matplotlib import style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError:
    raise UserError("figures need matplotlib, which is not installed; pip install -e '.[plot]'") from None

FAINT, COLOURS = "#0a0b01", 6  # then dashes, then dots
SERIES = [f"#0a0c{i:02x}" for i in range(COLOURS)]
VARIABLES = {"#0a0b00": "--ink", FAINT: "--faint", "#0a0b02": "--line"} | {c: f"--c{i}" for i, c in enumerate(SERIES)}
STYLE = Path(__file__).with_name("figures.mplstyle")
MAX_NAME = 40  # characters of a title
STRIPS = 120  # places of a figure that have a reading
MARKS: dict[str, dict[str, Any]] = {
    "line": {}, "points": {"marker": "o", "markersize": 3.5}, "crosses": {"linestyle": "", "marker": "x"}}


@dataclass(frozen=True)
class Curve:
    """y over x, both (n,), and perhaps their running mean, which is drawn over a paler y. NaN is a gap."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    style: str = "line"  # a key of MARKS. crosses: marks without a line, whose height means nothing
    mean: np.ndarray | None = None


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
def lines(panel: Panel) -> str:
    """A panel of curves over steps."""
    figure = Figure()
    ax = figure.add_subplot(title=printable(relative(panel.title), MAX_NAME), xlabel="step")
    steps, heights = (np.unique(np.concatenate([getattr(curve, axis)[np.isfinite(curve.y)] for curve in panel.curves]))
                      for axis in "xy")
    for curve in panel.curves:
        kind = "points" if len(steps) == 1 and curve.style == "line" else curve.style  # one point makes no line
        marks = {"linestyle": ("-", "--", ":")[curve.colour // COLOURS % 3], "color": SERIES[curve.colour % COLOURS],
                 **MARKS[kind]}
        ax.plot(curve.x, curve.y, **marks | ({} if curve.mean is None else {"linewidth": 0.7, "alpha": 0.4}))
        if curve.mean is not None:
            ax.plot(curve.x, curve.mean, **marks)
    for label, level in (panel.levels or {}).items():
        ax.axhline(level, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
        ax.annotate(label, (1, level), (0, 4), ("axes fraction", "data"), "offset points", color=FAINT, ha="right")
    ax.margins(x=0.025, y=0.12 if panel.levels else 0.05)  # above a level stands its name
    if panel.log and (heights > 0).any():
        ax.set_yscale("log")
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))  # type: ignore[call-arg]  # of a logarithmic axis
        ax.yaxis.set_minor_formatter("")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}" if panel.percent else f"{y:,.6g}"))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(steps) == 1:
        ax.set_xticks(steps)
    if panel.percent:
        ax.set_ylim(0, 1.04)
    elif len(heights) == 1:  # one point, or a constant
        ax.set_yticks(heights, [f"{heights[0]:.4g}"])
        ax.minorticks_off()
    places = steps[np.unique(np.linspace(0, len(steps) - 1, min(len(steps), STRIPS)).astype(int))]
    return _svg(figure, ax, places, [_reading(panel, step) for step in places])


def _reading(panel: Panel, step: float) -> str:
    """What the curves show at a step, as the content of an SVG <text>: of one curve its value, of several the means."""
    def shown(y: float) -> str:
        return f"{y:.1%}" if panel.percent else f"{y:,.0f}" if abs(y) >= 10_000 else f"{y:.4g}"

    text = f"step {step:,.0f}"
    for curve in panel.curves:
        for i in np.flatnonzero((curve.x == step) & np.isfinite(curve.y)):
            y, mean = curve.y[i], (curve.y if curve.mean is None else curve.mean)[i]
            said = (curve.label if curve.style == "crosses" else shown(mean) if len(panel.curves) > 1 else
                    f"{shown(y)} (mean {shown(mean)})" if mean != y else shown(y))
            text += f' <tspan style="fill: var(--c{curve.colour % COLOURS})">{escape(said)}</tspan>'
    return text


@style.context(STYLE)
def histogram(title: str, labels: Sequence[str], counts: dict[str, Sequence[int]], *, xlabel: str) -> str:
    """Vertical bars; each series in `counts` is stacked on the one before."""
    figure = Figure()
    ax, bottom = figure.add_subplot(title=title, xlabel=xlabel), np.zeros(len(labels))
    for i, (name, values) in enumerate(counts.items()):
        ax.bar(range(len(labels)), values, bottom=bottom, width=0.9, color=SERIES[i], label=name)
        bottom += values
    step = -(-len(labels) // 5)
    ax.set_xticks(range(0, len(labels), step), labels[::step])
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.grid(axis="x", visible=False)
    if len(counts) > 1:
        ax.legend()
    readings = [", ".join(f"{values[i]:,} {escape(name)}" for name, values in counts.items())
                for i in range(len(labels))]
    return _svg(figure, ax, range(len(labels)), map("{}: {}".format, labels, readings))


def _svg(figure: Figure, ax: Axes, places: Sequence[float], readings: Iterable[str]) -> str:
    """The figure without its prologue (it stands in a page), in the page's colours, with ids that no other has."""
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts draw the text, not these
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", out.getvalue().partition("<svg")[2], count=2)
    svg = re.sub(r' id="\w+_\d+"|<style.*?</style>|\s*\n\s*(?=<)', "", svg)  # ids of groups, which nothing refers to
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>f{crc32(svg.encode()):x}", svg)
    svg = "<svg" + re.sub("|".join(VARIABLES), lambda code: f"var({VARIABLES[code[0]]})", svg).rstrip()
    box, height = ax.get_window_extent(), figure.bbox.height
    x = np.array([ax.transData.transform((place, ax.get_ylim()[0]))[0] for place in places])  # points from the left
    edges = [box.x0, *((x[1:] + x[:-1]) / 2), box.x1]
    strips = "".join(
        f'<g class="at"><path d="M{left:.1f} {height - box.y1:.0f}H{right:.1f}V{height:.0f}H{left:.1f}"/>'
        f'<path d="M{at:.1f} {height - box.y1:.0f}v{box.height:.0f}"/>'
        f'<text x="4" y="{height - 4:.0f}">{reading}</text></g>'
        for left, right, at, reading in zip(edges, edges[1:], x, readings, strict=False))
    return f"{svg.removesuffix('</svg>')}{strips}</svg>"
