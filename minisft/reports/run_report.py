"""A run's figures as one page: what was trained on what, how the losses went, where the time went, what it says now.

    RUN/ config.toml  data.json  environment.json  metrics.jsonl  status.json  profile/table.txt  ->  RUN/report.html

Several runs are overlaid, a colour each. A run that goes on, crashed, was resumed or skipped steps has a page of what
there is: a section that has nothing to show is left out. Everything from the run is escaped.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from itertools import starmap

import numpy as np

from minisft.errors import PATH, printable
from minisft.reports import page as pages
from minisft.reports.drawing import STYLE as COLOURS
from minisft.reports.drawing import Curve, Panel, lines, running_mean, shares, window
from minisft.reports.run_data import data_figures
from minisft.reports.runs import Run

STYLE = COLOURS + """
h1 { font-size: 1.5rem; margin: 1rem 0 .2rem } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem }
h3 { font-size: .95rem; margin: 1.5rem 0 .3rem; overflow-wrap: anywhere }
figure { margin: .5rem 0 1.2rem } figure svg { width: 100%; height: auto }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 0 1.5rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere } th { font-weight: 500; color: var(--faint); white-space: nowrap }
thead th { color: var(--ink); white-space: normal }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em;
  background: var(--k) }
.failed { color: var(--c1) } .done { color: var(--c2) }
pre, td.text { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, monospace }
td.text { unicode-bidi: plaintext } .control { color: var(--faint) } .right::after { content: " ✓"; color: var(--c2) }
summary { cursor: pointer; color: var(--faint) }
"""
LAST = 10  # steps whose mean is the loss at the end


def page(runs: Sequence[Run]) -> str:
    """The whole page as HTML."""
    title = " · ".join(run.name for run in runs)
    sections = (_summary(runs), _losses(runs), _forgetting(runs), _optimisation(runs), _throughput(runs), _data(runs),
                _samples(runs), _environment(runs))
    return pages.render(f"minisft report: {title}", STYLE, f"<h1>{_safe(title)}</h1>\n" + "".join(sections))


# ---- the table at the top --------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run]) -> str:
    rows = {"state": [_state(run) for run in runs], "model": [_model(run) for run in runs],
            "data": [_safe(", ".join(run.sources())) for run in runs],
            "steps": [_steps(run) for run in runs],
            "tokens": [f"{run.total('tokens'):,.0f}, of which {run.total('target_tokens'):,.0f} trained"
                       for run in runs],
            "training loss": [_training_loss(run) for run in runs]}
    for name in dict.fromkeys(name for run in runs for name in run.evals):
        rows[f"loss on {name}"] = [_ends(run.evals[name]["loss"]) if name in run.evals else "" for run in runs]
    rows |= {"time in steps": [_duration(run.total("seconds")) for run in runs],
             "speed": [_speed(run) for run in runs], "memory": [_memory(run) for run in runs]}
    return _table(runs, rows)


def _state(run: Run) -> str:
    state, error = str(run.status.get("state", "unknown")), " ".join(str(run.status.get("error") or "").split())
    kind = {"failed": "failed", "dead": "failed", "done": "done"}.get(state, "")
    text = f'<span class="{kind}">{_safe(state)}</span>'
    if state in ("running", "dead"):
        text += f"; last written {datetime.fromtimestamp(run.written, UTC):%Y-%m-%d %H:%M} UTC"
    return text + (f": {_safe(error)}" if error else "")


def _model(run: Run) -> str:
    model, lora = run.config.get("model", {}), run.config.get("lora", {}).get("rank", 0)
    base = model.get("path") or f"{model.get('config', 'unknown')}, random weights"
    return _safe(f"{base}{f', LoRA of rank {lora}' if lora else ''}")


def _steps(run: Run) -> str:
    skipped = int(sum(record.get("skipped") is True for record in run.train))
    planned = run.data.get("total_steps")
    return (f"{run.last_step:,}" + (f" of {planned:,}" if planned else "")
            + (f', <span class="failed">{skipped:,} skipped</span>' if skipped else ""))


def _training_loss(run: Run) -> str:
    losses = run.column("loss")
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return "none yet"
    return f"{losses[0]:.4f} → {losses[-LAST:].mean():.4f} (mean of the last {min(LAST, len(losses))} steps)"


def _ends(values: np.ndarray) -> str:
    return f"{values[0]:.4f} → {values[-1]:.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def _speed(run: Run) -> str:
    seconds = run.total("seconds")
    mfu = run.column("mfu")
    return "" if not seconds else (f"{run.total('tokens') / seconds:,.0f} tokens/s, of which "
                                   f"{run.total('target_tokens') / seconds:,.0f} trained"
                                   + (f"; MFU {np.nanmedian(mfu):.1%}" if np.isfinite(mfu).any() else ""))


def _memory(run: Run) -> str:
    memory = run.column("memory_gib")
    return f"{np.nanmax(memory):.2f} GiB at most" if np.isfinite(memory).any() else ""


# ---- figures over the steps ------------------------------------------------------------------------------------------


def _smoothed(runs: Sequence[Run], name: str) -> list[Curve]:
    """For each run, the figure `name` of each step, and its running mean."""
    curves = []
    for i, run in enumerate(runs):
        values = run.column(name)
        raw, mean = ("each step", "running mean") if len(runs) == 1 else ("", run.name)
        curves += [Curve(raw, run.steps, values, i, "raw"),
                   Curve(mean, run.steps, running_mean(values, window(len(values))), i)]
    return curves


def _present(runs: Sequence[Run], name: str) -> bool:
    return any(np.isfinite(run.column(name)).any() for run in runs)


def loss_panels(runs: Sequence[Run]) -> list[Panel]:
    """The training loss, then the held-out losses."""
    panels = [Panel("training loss", _smoothed(runs, "loss"))] if _present(runs, "loss") else []
    return panels + eval_panels(runs, "loss", "loss on {}")


def eval_panels(runs: Sequence[Run], figure: str, title: str) -> list[Panel]:
    """A panel for each held-out source that has `figure`."""
    panels = []
    for name in dict.fromkeys(name for run in runs for name in run.evals):
        with_it = [(i, run.name, run.evals[name]) for i, run in enumerate(runs)
                   if name in run.evals and np.isfinite(run.evals[name][figure]).any()]
        curves = [Curve(label if len(runs) > 1 else "held-out", found["step"], found[figure], i, "points")
                  for i, label, found in with_it]
        panels += [Panel(title.format(name), curves)] if curves else []
    return panels


def _losses(runs: Sequence[Run]) -> str:
    panels = loss_panels(runs)
    mean = " or ".join(sorted({f"{window(len(run.train))}" for run in runs}, key=int))
    return _section("Loss", [
        (lines(panels), f"Nats a trained token; the strong line is a mean over {mean} steps. Look for a "
         "training loss that falls while a held-out one turns upward: from there on the run learns by heart.")
    ] if panels else [], empty="No step has been logged yet.")


def forgetting_panels(runs: Sequence[Run]) -> list[Panel]:
    """What each general text's loss rose by, and the bound."""
    bounds = {run.config.get("eval", {}).get("forgetting_bound") for run in runs}
    levels = {f"eval.forgetting_bound = {bound:g}": bound for bound in sorted(
        bound for bound in bounds if isinstance(bound, int | float) and bound)}
    return [replace(panel, levels=levels) for panel in eval_panels(runs, "forgetting", "rise of the loss on {}")]


def _forgetting(runs: Sequence[Run]) -> str:
    panels = forgetting_panels(runs)
    return _section("Forgetting", [
        (lines(panels), "Nats a token on general text, above what they were before the first step. Look for where the "
         "curve levels off, and whether it stays below the bound, if there is one.")] if panels else [])


def _optimisation(runs: Sequence[Run]) -> str:
    panels = [Panel("learning rate", [Curve(run.name if len(runs) > 1 else "", run.steps, run.column("lr"), i)
                                       for i, run in enumerate(runs)])] if _present(runs, "lr") else []
    if _present(runs, "grad_norm"):
        clips = {run.config.get("optim", {}).get("clip_norm") for run in runs} - {None, 0}
        skipped = [Curve("skipped step", run.steps[run.skipped], np.full(run.skipped.sum(), _floor(run)), i, "crosses")
                   for i, run in enumerate(runs) if run.skipped.any()]
        panels.append(Panel("gradient norm", [*_smoothed(runs, "grad_norm"), *skipped],
                            {f"optim.clip_norm = {clip:g}": clip for clip in sorted(clips)}, log=True))
    return _section("Learning rate and gradient", [
        (lines(panels), "The norm is that before clipping, on a logarithmic scale. Look for peaks long after warmup: "
         "a rate that is too high, or documents unlike the others (crosses are steps that were skipped, and "
         "metrics.jsonl names their documents).")] if panels else [])


def _floor(run: Run) -> float:
    """Where the mark of a skipped step stands, which has no norm of its own: the least of the others."""
    norms = run.column("grad_norm")
    return float(np.nanmin(norms)) if np.isfinite(norms).any() else 1.0


# ---- throughput ------------------------------------------------------------------------------------------------------


def _throughput(runs: Sequence[Run]) -> str:
    runs = [run for run in runs if run.total("seconds")]
    figures = []
    if runs:
        panels = [Panel("tokens per second", _smoothed(runs, "tokens_per_second")),
                  Panel("seconds per step", _smoothed(runs, "seconds"), log=True)]
        if _present(runs, "mfu"):
            panels.append(Panel("share of the GPUs' peak (MFU)", _smoothed(runs, "mfu"), percent=True))
        figures = [(lines(panels), "Look for steps that are slow at regular distances (checkpoints, which the next "
                    "step pays for) and for a pace that sinks."),
                   (shares({run.name: time_shares(run) for run in runs}),
                    "Where the time went. A step's own pace is the median step; what slower steps took beyond it is "
                    "waiting: warm-up, checkpoints, a disk or a neighbour.")]
        packed = {run.name: parts for run in runs if (parts := token_shares(run))}
        if packed:
            figures.append((shares(packed), "Where the room of the packs went. Context is read and not trained; the "
                            "empty part costs nothing but evenness, since nothing is padded unless layers are "
                            "compiled."))
    profiles = "".join(f"<details><summary>Profile of {_safe(run.name)}: time by kind of work</summary>"
                       f"<pre>{escape(run.profile)}</pre></details>\n" for run in runs if run.profile)
    return _section("Throughput and its losses", figures) + profiles


def time_shares(run: Run) -> dict[str, float]:
    """The logged time by what it was spent on."""
    seconds = run.column("seconds")
    seconds = seconds[np.isfinite(seconds)]
    pace = float(np.minimum(seconds, np.median(seconds)).sum())
    evaluation = sum(float(np.nansum(found["seconds"])) for found in run.evals.values())
    parts = {"steps at their pace": pace, "steps beyond it": float(seconds.sum()) - pace,
             "held-out losses": evaluation}
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def token_shares(run: Run) -> dict[str, float]:
    """The room of the packs by what lay in it; nothing where the number of steps in an epoch is not known."""
    per_epoch = run.data.get("steps_per_epoch")
    if not (per_epoch and run.train):
        return {}
    step = (run.steps.astype(int) - 1) % per_epoch  # in its epoch, over whose steps the packs are spread evenly
    first, last = (-(-(step + i) * run.data["packs"] // per_epoch) for i in (0, 1))
    room = float((last - first).sum()) * run.data["seq_len"]
    tokens, trained = run.total("tokens"), run.total("target_tokens")
    room = max(room, tokens, 1)  # a later epoch can have a pack more than the first
    return {"trained": trained / room, "context": (tokens - trained) / room, "empty": 1 - tokens / room}


# ---- data ------------------------------------------------------------------------------------------------------------


def _data(runs: Sequence[Run]) -> str:
    """The data of each run, once for those that share them."""
    parts, seen = [], []
    for run in runs:
        if run.data and run.data not in seen:
            seen.append(run.data)
            heading = f"<h3>{_safe(run.name)}</h3>\n" if len(runs) > 1 else ""
            parts.append(heading + data_figures(run))
    return f"<h2>Data</h2>\n{''.join(parts)}" if parts else ""


# ---- words -----------------------------------------------------------------------------------------------------------


def _samples(runs: Sequence[Run]) -> str:
    """Each question once, with what every run answered before its first step and after its last."""
    asked: dict[tuple[str, str], list[tuple[str, str, bool]]] = {}
    for run in runs:
        for record in run.samples:
            name, prompt, answer, reference = (str(record.get(key, "")) for key in
                                               ("name", "prompt", "answer", "reference"))
            said = asked.setdefault((name, prompt), [("expected", reference, False)])
            who = f"{run.name}, " if len(runs) > 1 else ""
            said.append((f"{who}step {record['step']:,}", answer, answer.strip() == reference.strip()))
    html = ""
    for (name, prompt), said in asked.items():
        rows = "".join(f'<tr><th>{_safe(who)}</th><td class="text{" right" * right}">{_text(text)}</td></tr>\n'
                       for who, text, right in said)
        html += (f'<div class="wide"><table><tr><th>{_safe(name)}</th><td class="text">{_text(prompt)}</td></tr>\n'
                 f"{rows}</table></div><br>\n")
    return (f"<h2>Answers before and after</h2>\n<p>Held-out questions, answered greedily. A tick marks an answer that "
            f"is word for word the expected one.</p>\n{html}" if html else "")


def _text(text: str) -> str:
    """Text of a model, its control tokens pale."""
    return re.sub(r"&lt;\|[^|&\n]*+\|&gt;", r'<span class="control">\g<0></span>', escape(text.strip()))


def _environment(runs: Sequence[Run]) -> str:
    rows: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for name, value in run.environment.items():
            value = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            value = (", ".join(f"{value.count(each)} × {each}" for each in dict.fromkeys(map(str, value)))
                     if isinstance(value, list) else value)
            if value not in (None, ""):
                rows.setdefault(name, [""] * len(runs))[i] = _safe(str(value))
    configurations = "".join(f"<details><summary>Configuration of {_safe(run.name)}</summary><pre>"
                             f"{escape(run.configuration)}</pre></details>\n" for run in runs if run.configuration)
    table = _table(runs, rows) if rows else ""
    return f"<h2>Environment</h2>\n{table}{configurations}" if table or configurations else ""


# ---- HTML ------------------------------------------------------------------------------------------------------------


def _table(runs: Sequence[Run], rows: dict[str, list[str]]) -> str:
    """A row for each figure, a column for each run; cells are HTML, names are not."""
    head = "".join(f'<th><span class="key" style="--k: var(--c{i % 6})">{_safe(run.name)}</span></th>'
                   for i, run in enumerate(runs)) if len(runs) > 1 else ""
    head = f"<thead><tr><th></th>{head}</tr></thead>" if head else ""
    body = "".join(f"<tr><th>{_safe(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
                   for name, cells in rows.items() if any(cells))
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>\n'


def _section(title: str, figures: list[tuple[str, str]], *, empty: str = "") -> str:
    content = "".join(starmap(pages.figure, figures)) or (f"<p>{empty}</p>\n" if empty else "")
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _safe(name: object) -> str:
    """A name, or another line that was written elsewhere, as HTML."""
    return escape(printable(name, PATH))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(math.floor(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {math.floor(seconds % 60)} s"
