"""The last words of a run: what it made, how that compares with the base model, what was left out, what to do next.

    runs/my/final: the trained model
    steps    120 of 120
    time     05:31, training 04:58
    tokens   245,120, of which 61,440 trained; 822 tokens/s
    skipped  3 of 1,000 records; `minisft prepare runs/my/config.toml` says why

    held-out loss         before     after    change
    heldout-questions     3.1412    1.0211   -2.1201
    heldout-articles      0.4921    0.5312   +0.0391  forgetting, within the bound of 0.1

    minisft chat runs/my/final
    minisft report runs/my

All figures are of the run's own log, so a resumed run counts the steps of all its starts.
"""

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minisft.errors import PATH, printable
from minisft.export.provenance import training_record
from minisft.formats.jinja import recognize, written
from minisft.prepare import adapters_of
from minisft.reports.logged_run import read_log
from minisft.runs import best
from minisft.runs.assemble import Run

Record = dict[str, Any]


def describe(run: Run, *, start: int, seconds: float) -> str:
    """The closing block of a complete run, which this process took from step `start` on in `seconds`."""
    log, total = read_log(run.folder), run.prepared.plan.total_steps
    last = max((record["step"] for record in log), default=0)
    found = training_record({"base": None}, data={}, log=log, step=last)
    made = [f"{run.folder / 'final'}: the trained model"] if run.config.run.export else []
    if made and adapters_of(run.config):
        made = [f"{made[0]}, merged with its adapter", f"{run.folder / 'adapter'}: the adapter alone, for PEFT"]
    made += _best(run, log)
    training, wall = map(tqdm.format_interval, (found["seconds"], seconds))
    since, over = (f" since step {start:,}", " over all starts") if start else ("", "")
    speed = f"; {found['tokens'] / found['seconds']:,.0f} tokens/s" if found["seconds"] else ""
    early = f": {found['stopped']}" if "stopped" in found else ""
    lines = ["", *made, f"steps    {last:,} of {total:,}{early}", f"time     {wall}{since}, training {training}{over}",
             f"tokens   {found['tokens']:,}, of which {found['target_tokens']:,} trained{speed}",
             *(f"skipped  {what}" for what in _skipped(run, found)), *_losses(run, found["losses"]), "", *_next(run)]
    return "\n".join(printable(line, PATH) for line in lines)


def _best(run: Run, log: list[Record]) -> list[str]:
    """Where the model of the lowest held-out loss is, if the run keeps it."""
    name = run.config.checkpoint.keep_best
    if not (found := best.lowest([record for record in log if record["kind"] == "eval"], name)):
        return []
    folder = best.model_folder(run.folder, "best", found["step"])
    missing = f"step {found['step']} ({'its model was not kept' if found['step'] else 'the base model'})"
    return [f"{folder if folder.exists() else missing}: the lowest loss on {name}, {found['loss']:.4f}"]


def _skipped(run: Run, found: Record) -> list[str]:
    """Steps and records that the run left out, or its log."""
    reports = run.prepared.train.reports
    dropped = sum(count for report in reports for reason, count in report.skipped.items() if reason != "held out")
    steps, lost = found["skipped_steps"], found["steps"] - found.get("logged_steps", found["steps"])
    return [text for number, text in (
        (steps, f"{steps:,} of {found['steps']:,} steps: their loss or gradient was not finite"),
        (dropped, f"{dropped:,} of {sum(report.read for report in reports):,} records; `{_command()} prepare "
                  f"{shlex.quote(str(run.folder / 'config.toml'))}` says why"),
        (lost, f"{lost:,} of {found['steps']:,} steps: lost from the log, and in none of these figures")) if number]


def _losses(run: Run, losses: dict[str, Record]) -> list[str]:
    """A table of the held-out losses before and after."""
    width, bound = max(map(len, (*losses, "held-out loss"))), run.config.eval.forgetting_bound
    lines = ["", f"{'held-out loss':<{width}}{'before':>10}{'after':>10}{'change':>10}"]
    for name, found in losses.items():
        before, after = found["before"], found["after"]
        cells = [before, after, None if None in (before, after) else after - before]
        note = ""
        if "forgetting" in found:
            side = "over" if found["forgetting"] > bound else "within"
            note = "  forgetting" + (f", {side} the bound of {bound:g}" if bound else "")
        lines.append(f"{name:<{width}}" + "".join(
            "-".rjust(10) if cell is None else f"{cell:{sign}10.4f}"
            for cell, sign in zip(cells, ("", "", "+"), strict=True)) + note)
    return lines if losses else []


def _next(run: Run) -> list[str]:
    """Commands that work on the run as it is."""
    report = f"{_command()} report {shlex.quote(str(run.folder))}"
    lines = [report if find_spec("matplotlib") else f"{report}    (after pip install matplotlib)"]
    if run.config.run.export:
        renderer, own = run.prepared.renderer, run.config.data.templates
        chat, known = f"{_command()} chat {shlex.quote(str(run.folder / 'final'))}", recognize(
            written(renderer.template, renderer.fill))
        if own or not known or known[0] != renderer.template.name:  # final/ does not tell chat which template it is
            chat += f" --template {renderer.template.name}" + f" --templates {shlex.quote(own)}" * bool(own)
        lines.insert(0, chat)
    return lines


def _command() -> str:
    return "minisft" if shutil.which("minisft") else f"{Path(sys.executable)} -m minisft"
