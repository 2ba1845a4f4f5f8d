"""What a run was trained on, in figures: its documents by length, its packs by fill, its sources over the steps."""

from collections.abc import Sequence
from itertools import starmap
from typing import Any

import numpy as np

from minisft.reports.drawing import Curve, Panel, histogram, lines, running_mean, shares, window
from minisft.reports.page import figure
from minisft.reports.runs import Run


def data_figures(run: Run) -> str:
    """All of them as HTML; `run.data` is there."""
    pair = "".join(starmap(figure, [*_by_length(run.data), *_by_fill(run.data)]))
    return f'<div class="pair">{pair}</div>\n{_first_epoch(run.data)}{_sources_over_steps(run)}'


def _by_length(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Empty where there are no documents."""
    buckets = data["lengths"]
    full = [i for i, bucket in enumerate(buckets) if bucket["kept"] + bucket["too_long"]]
    if not full:
        return []
    buckets = buckets[full[0] : full[-1] + 1]
    counts: dict[str, Sequence[int]] = {"kept": [bucket["kept"] for bucket in buckets]}
    if any(bucket["too_long"] for bucket in buckets):
        counts["cut" if data["overlong"] == "truncate" else "left out"] = [b["too_long"] for b in buckets]
    return [(histogram("documents by length", [f"≤{b['to']:,}" for b in buckets], counts, xlabel="tokens"),
             f"Look for documents beyond data.seq_len = {data['seq_len']:,}.")]


def _by_fill(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Empty for a run that does not tell."""
    fill = data.get("pack_fill", [])
    first = next((i for i, packs in enumerate(fill) if packs), len(fill))
    if first == len(fill):
        return []
    labels = [f"≤{100 * (i + 1) // len(fill)}%" for i in range(len(fill))]
    return [(histogram("packs by fill", labels[first:], {"packs": fill[first:]}, xlabel="tokens of the room"),
             f"{data['packs']:,} packs in the first epoch, {data['packing_efficiency']:.1%} full. Look for a tail to "
             "the left: documents that fit badly together.")]


def _first_epoch(data: dict[str, Any]) -> str:
    """Each source's share; nothing where there is one."""
    sources = [*data["train"], *data["replay"]]
    if len(sources) < 2:
        return ""
    whole = {"documents": ("documents", data["epoch_documents"]), "tokens": ("tokens", data["epoch_tokens"]),
             "trained tokens": ("target_tokens", data["epoch_target_tokens"])}
    rows = {f"{what} {total:,}": {source["name"]: source["epoch"][key] / max(total, 1) for source in sources}
            for what, (key, total) in whole.items()}
    return figure(shares(rows), "Each source's share of the first epoch. Look for one whose share of the trained "
                  "tokens, which are what the loss weighs, is not what you meant.")


def _sources_over_steps(run: Run) -> str:
    """Each source's share of the trained tokens of a step."""
    names = list(dict.fromkeys(name for record in run.train for name in record.get("sources", {})))
    if not names:
        return ""
    counts = np.array([[record.get("sources", {}).get(name, 0) for name in names] for record in run.train], float)
    parts = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (steps, sources)
    curves = [Curve(name, run.steps, running_mean(parts[:, i], window(len(parts))), i) for i, name in enumerate(names)]
    return figure(lines([Panel("share of trained tokens, running mean", curves, percent=True)]),
                  "Look for sources that come and go: the mixture should be the same from the first step to the "
                  "last.")
