"""A run's figures as one page: its data, its losses, where the time went, what the model says now.

    LoggedRun, ...  ->  RUN/report.html

Several runs are overlaid, one colour each. The page of a run that is still going, crashed, was resumed or skipped steps
shows what there is: a section with nothing to show is left out. Everything from the run is escaped.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from itertools import starmap
from typing import Any

import numpy as np

from minisft.errors import PATH, printable
from minisft.reports.drawing import COLOURS, Curve, Panel, histogram, lines, running_mean, window
from minisft.reports.logged_run import LoggedRun, column
from minisft.reports.page import relative, render

LAST = 10  # steps whose mean is the final loss

Runs = Sequence[LoggedRun]


def page(runs: Runs) -> str:
    """The whole page as HTML."""
    title = " · ".join(run.name for run in runs)
    sections = (_summary, _differences, _losses, _forgetting, _optimisation, _throughput, _data, _samples,
                _environment)
    body = "".join(section(runs) for section in sections)
    return render(f"minisft report: {title}", "report", f"<h1>{_safe(title)}</h1>\n{body}")


def _summary(runs: Runs) -> str:
    facts = [_facts(run, _held_out(runs)) for run in runs]
    return _table(runs, {name: [each[name] for each in facts] for name in facts[0]})


def _facts(run: LoggedRun, held_out: list[str]) -> dict[str, str]:
    """The run in a few lines of HTML, by name; "" for what it does not tell."""
    state, error = str(run.status.get("state", "unknown")), " ".join(str(run.status.get("error") or "").split())
    kind = {"failed": "failed", "dead": "failed", "done": "done"}.get(state, "")
    written = f"; last written {datetime.fromtimestamp(run.written, UTC):%Y-%m-%d %H:%M} UTC"
    model, rank = run.config.get("model", {}), run.config.get("lora", {}).get("rank", 0)
    base = model.get("path") or f"{model.get('config', 'unknown')}, random weights"
    last, planned = int(run.steps[-1]) if run.train else 0, run.data.get("total_steps")
    skipped = f', <span class="failed">{run.skipped.sum():,} skipped</span>' if run.skipped.any() else ""
    seconds, tokens, trained = map(run.total, ("seconds", "tokens", "target_tokens"))
    losses, mfu, memory = (run.finite(name) for name in ("loss", "mfu", "memory_gib"))
    recent = run.column("loss")[-LAST:]
    after = f"{recent[np.isfinite(recent)].mean():.4f}" if np.isfinite(recent).any() else "not finite"
    optim, packs = run.config.get("optim", {}), run.config.get("batch", {}).get("packs")
    seq_len, evaluating = run.config.get("data", {}).get("seq_len"), _evaluating(run)
    evals = {name: column(run.evals.get(name, []), "loss") for name in held_out}
    return {
        "state": f'<span class="{kind}">{_safe(state)}</span>' + written * (state in ("running", "dead"))
        + (f": {_safe(error)}" if error else ""),
        "model": _safe(f"{base}, LoRA of rank {rank}" if rank else base),
        "data": _safe(", ".join(run.sources())),
        "steps": f"{last:,}" + (f" of {planned:,}" if planned else "") + skipped
        + (f', <span class="failed">{lost:,} lost from the log</span>' if (lost := last - len(run.train)) else "")
        + (f": {_safe(run.stopped)}" if run.stopped else ""),
        "batch": f"{packs:,} pack{'s'[packs == 1 :]} × {seq_len:,} tokens" if packs and seq_len else "",
        "learning rate": _safe(f"{optim['lr']:g}, {optim.get('schedule', '')}".rstrip(", ")) if "lr" in optim else "",
        "tokens": f"{tokens:,.0f}, {trained:,.0f} of them trained",
        "training loss": f"{losses[0]:.4f} → {after} (mean of the last {len(recent)} steps)" if losses.size else
        "none yet",
        **{f"loss on {name}": " → ".join(f"{loss:.4f}" for loss in (*values[:1], *values[1:][-1:]))
           for name, values in evals.items()},
        **{f"forgetting on {name}": _forgotten(run, name) for name in held_out},
        "wall time": f"{_duration(seconds + evaluating)}: {_duration(seconds)} in steps, {_duration(evaluating)} in "
        "held-out losses",
        "speed": f"{tokens / seconds:,.0f} tokens/s, {trained / seconds:,.0f} of them trained"
        + (f"; MFU {np.median(mfu):.1%}" if mfu.size else "") if seconds else "",
        "memory": f"at most {memory.max():.2f} GiB" if memory.size else ""}


def _forgotten(run: LoggedRun, name: str) -> str:
    """How far the loss on general text `name` has risen, and whether that is more than the bound."""
    rises = column(run.evals.get(name, []), "forgetting")
    if not np.isfinite(rises[-1:]).any():
        return "none at the last evaluation" if np.isfinite(rises).any() else ""
    bound = run.config.get("eval", {}).get("forgetting_bound") or math.inf
    beyond = f', <span class="failed">above the bound of {bound:g}</span>' if rises[-1] > bound else ""
    return f"{rises[-1]:+.4f} nats{beyond}"


def _evaluating(run: LoggedRun) -> float:
    """Seconds that the held-out losses took."""
    return sum(float(np.nansum(column(records, "seconds"))) for records in run.evals.values())


def _differences(runs: Runs) -> str:
    """The settings that are not the same in all runs, except the folder."""
    settings = [{f"{section}.{key}": value if isinstance(value, str) else
                 json.dumps(value, ensure_ascii=False, default=str)
                 for section, values in run.config.items() if isinstance(values, dict)
                 for key, value in values.items()} for run in runs]
    rows = {key: [_safe(each.get(key, "")) for each in settings]
            for key in dict.fromkeys(key for each in settings for key in each)
            if key != "run.dir" and len({each.get(key) for each in settings}) > 1}
    if len(runs) == 1 or not any(settings):
        return ""
    return _section("Settings that differ", _table(runs, rows) if rows else "<p>None: all runs have the same.</p>\n")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(math.floor(seconds / 60), 60)
    return (f"{seconds:.1f} s" if seconds < 60 else f"{hours} h {minutes} min" if hours else
            f"{minutes} min {math.floor(seconds % 60)} s")


def _step_panel(title: str, runs: Runs, name: str, *, smooth: bool = True, extra: Sequence[Curve] = (),
                **options: Any) -> list[Panel]:
    """Figure `name` of each step, pale, and its running mean (not without `smooth`); no panel if no run has it."""
    curves = [Curve(run.name, run.steps, y := run.column(name), i,
                    mean=running_mean(y, window(len(y))) if smooth else None)
              for i, run in enumerate(runs) if run.finite(name).size]
    return [Panel(title, [*extra, *curves], **options)] if curves else []


def _eval_panels(title: str, runs: Runs, name: str) -> list[Panel]:
    """A panel for each held-out source that has figure `name`."""
    panels = {source: [Curve(run.name, column(records, "step"), y, i, "points")
                       for i, run in enumerate(runs) if (records := run.evals.get(source))
                       and np.isfinite(y := column(records, name)).any()] for source in _held_out(runs)}
    return [Panel(title.format(source), curves) for source, curves in panels.items() if curves]


def loss_panels(runs: Runs) -> list[Panel]:
    """The training loss, then the held-out losses."""
    return [*_step_panel("training loss", runs, "loss"), *_eval_panels("loss on {}", runs, "loss")]


def forgetting_panels(runs: Runs) -> list[Panel]:
    """How much the loss on each general text has risen, and the bound."""
    bounds = {run.config.get("eval", {}).get("forgetting_bound") for run in runs} - {None, 0}
    levels = {f"eval.forgetting_bound = {bound:g}": bound for bound in sorted(bounds)}
    return [replace(panel, levels=levels) for panel in _eval_panels("rise of the loss on {}", runs, "forgetting")]


def _losses(runs: Runs) -> str:
    mean = " or ".join(map(str, sorted({window(len(run.train)) for run in runs})))
    figures = _drawn(loss_panels(runs), f"Nats per trained token. Here and below, pale lines are each step and strong "
                     f"ones a mean over {mean} steps. Look for a training loss that falls while a held-out loss rises: "
                     "from there on the run memorises.", _names(runs))
    return _section("Loss", figures or "<p>No step has been logged yet.</p>\n")


def _forgetting(runs: Runs) -> str:
    return _section("Forgetting", _drawn(
        forgetting_panels(runs), "Nats per token on general text, above the loss before the first step. Look for where "
        "the curve levels off, and whether it stays below the bound, if there is one.", _names(runs)))


def _optimisation(runs: Runs) -> str:
    clips = {run.config.get("optim", {}).get("clip_norm") for run in runs} - {None, 0}
    # A skipped step has no norm of its own: its mark stands at the smallest of the others.
    skipped = [Curve("skipped step", run.steps[run.skipped],
                     np.full(run.skipped.sum(), min(run.finite("grad_norm"), default=1.0)), i, "crosses")
               for i, run in enumerate(runs) if run.skipped.any()]
    panels = [*_step_panel("learning rate", runs, "lr", smooth=False),
              *_step_panel("gradient norm", runs, "grad_norm", extra=skipped, log=True,
                           levels={f"optim.clip_norm = {clip:g}": clip for clip in sorted(clips)})]
    return _section("Learning rate and gradient", _drawn(
        panels, "The norm before clipping, on a logarithmic scale. Look for peaks long after warmup: the learning rate "
        "is too high, or some documents are unlike the others (crosses are skipped steps; metrics.jsonl names their "
        "documents).", _names(runs)))


def _throughput(runs: Runs) -> str:
    timed = [run for run in runs if run.total("seconds")]
    panels = [*_step_panel("tokens per second", timed, "tokens_per_second"),
              *_step_panel("seconds per step", timed, "seconds", log=True),
              *_step_panel("share of the GPUs' peak (MFU)", timed, "mfu", percent=True)]
    return _section(
        "Throughput and its losses",
        _drawn(panels, "Look for slow steps at regular intervals (checkpoints, which the next step pays for) and for a "
               "speed that falls.", _names(runs))
        + _shared({run.name: time_shares(run) for run in timed}, "Where the time went. The pace is the median step; "
                  "what slower steps took beyond it is waiting: warm-up, checkpoints, a disk or a neighbour.")
        + _shared({run.name: parts for run in timed if (parts := token_shares(run))}, "Where the room in the packs "
                  "went. Context is read but not trained; empty room only makes the steps less even, since nothing is "
                  "padded unless layers are compiled.")
    ) + "".join(_details(f"Profile of {run.name}: time by kind of work", run.profile) for run in runs)


def time_shares(run: LoggedRun) -> dict[str, float]:
    """The logged time by what it was spent on."""
    seconds = run.finite("seconds")
    pace = float(np.minimum(seconds, np.median(seconds)).sum())
    parts = {"steps at their pace": pace, "steps beyond it": float(seconds.sum()) - pace,
             "held-out losses": _evaluating(run)}
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def token_shares(run: LoggedRun) -> dict[str, float]:
    """The room in the packs by what filled it; empty if the number of steps in an epoch is not known."""
    per_epoch = run.data.get("steps_per_epoch")
    if not (per_epoch and run.train):
        return {}
    step = (run.steps.astype(int) - 1) % per_epoch  # in its epoch, over whose steps the packs are spread evenly
    first, last = (-(-(step + i) * run.data["packs"] // per_epoch) for i in (0, 1))
    tokens, trained = run.total("tokens"), run.total("target_tokens")
    # A later epoch can have a pack more than the first.
    room = max(float((last - first).sum()) * run.data["seq_len"], tokens, 1)
    return {"trained": trained / room, "context": (tokens - trained) / room, "empty": 1 - tokens / room}


def _data(runs: Runs) -> str:
    """The data of each run, once for runs that share them."""
    parts = ""
    for i, run in enumerate(runs):
        if run.data and run.data not in [other.data for other in runs[:i]]:
            parts += f"<h3>{_safe(run.name)}</h3>\n" * (len(runs) > 1)
            parts += f'<div class="panels">{_by_length(run.data)}{_by_fill(run.data)}</div>\n'
            parts += _first_epoch(run.data) + _sources_over_steps(run)
    return _section("Data", parts)


def _by_length(data: dict[str, Any]) -> str:
    buckets = data["lengths"]
    full = [i for i, bucket in enumerate(buckets) if bucket["kept"] + bucket["too_long"]]
    if not full:
        return ""
    buckets = buckets[full[0] : full[-1] + 1]
    counts: dict[str, Sequence[int]] = {"kept": [bucket["kept"] for bucket in buckets]}
    if any(bucket["too_long"] for bucket in buckets):
        counts["cut" if data["overlong"] == "truncate" else "left out"] = [b["too_long"] for b in buckets]
    return _figure(histogram("documents by length", [f"≤{b['to']:,}" for b in buckets], counts, xlabel="tokens"),
                   f"Look for documents longer than data.seq_len = {data['seq_len']:,}.")


def _by_fill(data: dict[str, Any]) -> str:
    fill = data.get("pack_fill", [])
    first = next((i for i, packs in enumerate(fill) if packs), len(fill))
    labels = [f"≤{100 * (i + 1) // len(fill)}%" for i in range(first, len(fill))]
    return _figure(histogram("packs by fill", labels, {"packs": fill[first:]}, xlabel="share of the room"),
                   f"{data['packs']:,} packs in the first epoch, {data['packing_efficiency']:.1%} full. Look for a "
                   "tail on the left: documents that fit together badly.") if labels else ""


def _first_epoch(data: dict[str, Any]) -> str:
    """Each source's share, if there are several."""
    sources = [*data["train"], *data["replay"]]
    kinds = {"documents": "documents", "tokens": "tokens", "trained tokens": "target_tokens"}
    rows = {f"{what} {(total := data[f'epoch_{key}']):,}":
            {source["name"]: source["epoch"][key] / max(total, 1) for source in sources} for what, key in kinds.items()}
    return _shared(rows if len(sources) > 1 else {}, "Each source's share of the first epoch. Look for a share of the "
                   "trained tokens, which the loss weighs, that is not what you meant.")


def _sources_over_steps(run: LoggedRun) -> str:
    names = list(dict.fromkeys(name for record in run.train for name in record.get("sources", {})))
    counts = np.array([[record.get("sources", {}).get(name, 0) for name in names] for record in run.train], float)
    parts = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)  # (steps, sources)
    curves = [Curve(name, run.steps, running_mean(parts[:, i], window(len(parts))), i) for i, name in enumerate(names)]
    panels = [Panel("share of trained tokens, running mean", curves, percent=True)] if curves else []
    return _drawn(panels, "Look for sources that come and go: the mixture should stay the same from the first step to "
                  "the last.", names)


def _samples(runs: Runs) -> str:
    """Each question once, with every run's answers at each evaluation."""
    asked: dict[tuple[str, str], list[tuple[str, str, bool]]] = {}
    for run in runs:
        for record in run.samples:
            name, prompt, answer, reference = (str(record.get(key, "")) for key in
                                               ("name", "prompt", "answer", "reference"))
            who = f"{run.name}, " * (len(runs) > 1) + f"step {record['step']:,}"
            asked.setdefault((name, prompt), [("expected", reference, False)]).append(
                (who, answer, answer.strip() == reference.strip()))
    html = ""
    for (name, prompt), said in asked.items():
        rows = "".join(f'<tr><th>{_safe(who)}</th><td class="text{" right" * right}">{_text(text)}</td></tr>\n'
                       for who, text, right in ((name, prompt, False), *said))
        html += f'<div class="wide"><table>{rows}</table></div><br>\n'
    return _section("Answers", html and "<p>Held-out questions, answered greedily. A tick marks an "
                    f"answer that is exactly the expected one.</p>\n{html}")


def _text(text: str) -> str:
    """Text of a model, its control tokens pale."""
    return re.sub(r"&lt;\|[^|&\n]*+\|&gt;", r'<span class="control">\g<0></span>', escape(text.strip()))


def _environment(runs: Runs) -> str:
    rows: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for name, value in run.environment.items():
            if isinstance(value, dict):
                value = ", ".join(f"{k} {v}" for k, v in value.items())
            if isinstance(value, list):
                value = ", ".join(f"{count} × {each}" for each, count in Counter(map(str, value)).items())
            if value not in (None, ""):
                rows.setdefault(name, [""] * len(runs))[i] = _safe(value)
    table = (_table(runs, rows) if rows else "") + "".join(
        _details(f"Configuration of {run.name}", run.config_text) for run in runs)
    return _section("Environment", table)


def _held_out(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.evals))


def _names(runs: Runs) -> list[str]:
    return [run.name for run in runs] if len(runs) > 1 else []


def _key(i: int, name: str) -> str:
    """A name with the colour and the dashes that drawing.py gives to curve i."""
    return f'<span class="key" style="--k: {_stroke(i)}">{_safe(name)}</span>'


def _stroke(i: int) -> str:
    return f"{('solid', 'dashed', 'dotted')[i // COLOURS % 3]} var(--c{i % COLOURS})"


def _table(runs: Runs, rows: dict[str, list[str]]) -> str:
    """A row for each figure, a column for each run; cells are HTML, names are not."""
    keys = "".join(f"<th>{_key(i, name)}</th>" for i, name in enumerate(_names(runs)))
    head = f"<thead><tr><th></th>{keys}</tr></thead>" if keys else ""
    body = "".join(f"<tr><th>{_safe(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
                   for name, cells in rows.items() if any(cells))
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>\n'


def _details(title: str, text: str) -> str:
    text = escape(relative(text))
    return f"<details><summary>{_safe(title)}</summary><pre>{text}</pre></details>\n" if text else ""


def _drawn(panels: list[Panel], caption: str, names: list[str]) -> str:
    """Panels side by side, as many as there is room for; `names` are those of their curves, if they need a legend."""
    drawn = "".join(map(lines, panels))
    legend = "<p>" + " ".join(starmap(_key, enumerate(names))) + "</p>\n" if names else ""
    return _figure(f'{legend}<div class="panels">{drawn}</div>', caption) if drawn else ""


def _shared(rows: dict[str, dict[str, float]], caption: str) -> str:
    """For each row a bar divided into named shares, the same names in each, with its figures below."""
    html = ""
    for row, parts in rows.items():
        html += f"<h3>{_safe(row)}</h3>" if len(rows) > 1 else ""
        bar = "".join(f'<i style="--k: {_stroke(i)}; flex-grow: {share:.5f}"></i>'
                      for i, share in enumerate(parts.values()))
        keys = " ".join(_key(i, f"{name} {share:.1%}") for i, (name, share) in enumerate(parts.items()))
        html += f'<div class="bar">{bar}</div><p>{keys}</p>\n'
    return _figure(html, caption) if rows else ""


def _figure(html: str, caption: str) -> str:
    return f"<figure>{html}\n<figcaption>{escape(caption)}</figcaption></figure>\n"


def _section(title: str, html: str) -> str:
    return f"<h2>{title}</h2>\n{html}" if html else ""


def _safe(name: object) -> str:
    """A name, or another line from outside, as HTML."""
    return escape(relative(printable(name, PATH)))
