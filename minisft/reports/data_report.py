"""The report on a run's data: what was read and left out, how it is mixed and packed, and what training on it takes.

    Prepared -> figures (a dict of plain numbers: --json) -> lines of text, aligned, for 80 to 120 columns

Everything printed is among the figures. Counts of tokens are of the documents kept. Figures of an epoch are the first
one's: if part of a source is drawn, every epoch draws another part.
"""

import math
import shutil
import textwrap
from dataclasses import asdict
from typing import Any

import numpy as np

from minisft.data.checks import ODD
from minisft.data.dataset import Dataset
from minisft.errors import PATH, printable
from minisft.lora import targets
from minisft.model.flops import training_flops
from minisft.prepare import Prepared

CHECKS = ("one beginning-of-text token per document if the template has one",
          "every trained answer ends in a trained stop token", "no control token comes from content",
          "every document has a trained token", "every token id is in the vocabulary")
MAX_NAMES = 12  # fields listed by name
MANY = 0.05  # share of the documents or of the tokens that may be too long without a warning
BAR, EIGHTHS = 36, " ▏▎▍▌▋▊▉"

Figures = dict[str, Any]


def figures(prepared: Prepared) -> Figures:
    """Every figure of the report. Lists of sources are in the order of the configuration."""
    config, train, plan = prepared.config, prepared.train, prepared.plan
    general = {source.name for source in config.data.general}
    epoch = plan.epoch(0)
    lengths, loss_tokens = train.lengths[epoch.documents], train.num_loss_tokens[epoch.documents]
    mixed = _mixed(train, np.bincount(epoch.documents, minlength=len(train)))
    sources = [{**source, "weight": weight, "epoch": each} for source, weight, each in
               zip(_sources(train), prepared.weights, mixed, strict=True)]
    trained, replayed = sources[: len(config.data.train)], sources[len(config.data.train) :]
    step_starts = epoch.offsets[[plan.place(step).first for step in range(plan.steps_per_epoch)]]
    step_targets = np.add.reduceat(loss_tokens, step_starts)[: plan.total_steps]
    recompute = config.parallel.activation_checkpointing
    flops = prepared.network and training_flops(prepared.network, lengths, loss_tokens, recompute=recompute,
                                                ranks=targets.ranks(config.lora, prepared.network))
    return {
        "template": prepared.renderer.template.name, "seq_len": plan.seq_len, "overlong": config.data.overlong,
        "dedup": config.data.dedup, "eval_fraction": config.data.eval_fraction,
        "train": trained, "replay": replayed,
        **{kind: [source for name, dataset in prepared.evals.items() for source in _sources(dataset)
                  if (name in general) == (kind == "general")] for kind in ("eval", "general")},
        "documents": len(train), "tokens": int(train.lengths.sum()), "target_tokens": int(train.num_loss_tokens.sum()),
        "lengths": _length_buckets(train.lengths, train.too_long, plan.seq_len,
                                   cut=sum(report.truncated for report in train.reports)),
        "epoch_documents": len(epoch.documents), "epoch_tokens": int(lengths.sum()),
        "epoch_target_tokens": int(loss_tokens.sum()),
        "replay_ratio": config.data.replay_ratio if replayed else 0.0,
        "replay_share": sum(source["epoch"]["tokens"] for source in replayed) / int(lengths.sum()),
        "pack_fill": pack_fill(lengths, epoch.offsets, plan.seq_len),
        "packs": len(epoch), "packs_per_step": plan.packs_per_step, "packing_efficiency": plan.fill(),
        "steps_per_epoch": plan.steps_per_epoch, "total_steps": plan.total_steps,
        "warmup_steps": config.optim.warmup_steps,
        "target_tokens_per_step": {"mean": float(step_targets.mean()), "least": int(step_targets.min()),
                                   "most": int(step_targets.max())},
        "recompute": recompute, "flops_per_epoch": flops,
        "flops": flops and round(flops * plan.total_steps / plan.steps_per_epoch), "checks": list(CHECKS),
        "beware": [*unread_fields(prepared), *_odd_contents(prepared), *_left_out(prepared), *_warnings(prepared)]}


def unread_fields(prepared: Prepared) -> list[str]:
    """For each file with fields that nothing reads: their names, and how many records have them."""
    lines = []
    for report in [report for dataset in (prepared.train, *prepared.evals.values()) for report in dataset.reports]:
        if names := sorted(report.unread.items(), key=lambda item: (-item[1], item[0])):
            named = ", ".join(f"{name} ({count:,})" for name, count in names[:MAX_NAMES])
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            lines.append(f"{report.name} has fields that nothing reads: {named}{more}")
    return lines


def _odd_contents(prepared: Prepared) -> list[str]:
    """For each file with much that is seldom meant in a message: what, in how many records, where first."""
    reports = [report for dataset in (prepared.train, *prepared.evals.values()) for report in dataset.reports]
    return [f"{report.name} has {what} in {count:,} of {report.read:,} records (first: {report.examples[what]}): "
            f"{ODD[what][3]}" for report in reports for what, count in report.odd.items() if count * 100 >= report.read]


def _left_out(prepared: Prepared) -> list[str]:
    """For training and each evaluation: the documents that are too long, if they are many, and what would keep them."""
    lines = []
    for name, dataset in {"data.train": prepared.train, **prepared.evals}.items():
        long, reports = dataset.too_long, [report for report in dataset.reports if "over length" in report.skipped]
        tokens, kept = (sum(getattr(report, key) for report in dataset.reports) for key in ("tokens", "kept"))
        share = long.sum() / max(long.sum() + tokens, 1)  # not of the few that eval.max_tokens keeps
        if reports and max(share, len(long) / (len(long) + kept)) > MANY:
            most = int(np.quantile(long, 0.9, method="higher"))
            nearly = f", and {most:,} nine in ten of them" * bool(most * 2 < long.max())
            lines.append(f"{name}: {len(long):,} documents with {share:.0%} of the tokens are longer than data.seq_len "
                         f"= {prepared.plan.seq_len:,} and left out (first: {reports[0].examples['over length']}); "
                         f"{long.max():,} would keep them all{nearly}; data.overlong = split keeps plain text in parts")
    return lines


def _warnings(prepared: Prepared) -> list[str]:
    """Settings that are allowed, but seldom meant."""
    config, plan, network, found = prepared.config, prepared.plan, prepared.network, []
    if config.optim.warmup_steps >= plan.total_steps > 1:
        found.append(f"optim.warmup_steps = {config.optim.warmup_steps:,} is not less than the total number of steps: "
                     "the learning rate has no time to fall, or even to reach optim.lr; set it to a tenth of the steps")
    if (most := config.train.max_steps) and most > plan.total_steps:
        found.append(f"train.max_steps = {most:,} is not reached: the run ends after {plan.total_steps:,} steps, with "
                     f"train.epochs = {config.train.epochs}")
    elif most and most > plan.steps_per_epoch:
        times = -(-most // plan.steps_per_epoch) * math.ceil(max(prepared.weights))
        found.append(f"train.max_steps = {most:,} is more than one epoch of {plan.steps_per_epoch:,} steps: documents "
                     f"are trained on up to {times} times")
    longest = max(int(dataset.lengths.max(initial=0)) for dataset in (prepared.train, *prepared.evals.values()))
    if network and longest > network.max_position_embeddings:
        found.append(f"the longest document has {longest:,} tokens, but the model's max_position_embeddings is "
                     f"{network.max_position_embeddings:,}: it has not learned positions beyond; lower data.seq_len to "
                     "that")
    return found


def _sources(dataset: Dataset) -> list[Figures]:
    return [{**asdict(report), "target_share": report.target_tokens / max(report.tokens, 1),
             "tokens_per_word": report.content_tokens / report.words if report.words else None}
            for report in dataset.reports]


def _mixed(train: Dataset, seen: np.ndarray) -> list[Figures]:
    """Each source's part of an epoch in which document i comes `seen[i]` times."""
    counts = {"documents": seen, "different_documents": seen > 0, "tokens": seen * train.lengths,
              "target_tokens": seen * train.num_loss_tokens}
    totals = {name: train.per_source(each) for name, each in counts.items()}
    totals |= {f"{kind}_share": totals[f"{kind}{plural}"] / totals[f"{kind}{plural}"].sum()
               for kind, plural in (("token", "s"), ("target", "_tokens"))}
    return [{name: total[i].item() for name, total in totals.items()} for i in range(len(train.stores))]


def _length_buckets(lengths: np.ndarray, too_long: np.ndarray, seq_len: int, *, cut: int) -> list[Figures]:
    """Documents by their length, in buckets that end at the powers of two and at `seq_len`. The `cut` ones count among
    those that were too long."""
    last = max(seq_len, int(too_long.max(initial=0)))
    edges = sorted({seq_len, *(2**i for i in range((last - 1).bit_length() + 1))})
    counts = [np.bincount(np.searchsorted(edges, some), minlength=len(edges)) for some in (lengths, too_long)]
    counts[0][edges.index(seq_len)] -= cut
    return [{"from": low + 1, "to": high, "kept": int(kept), "too_long": int(long)}
            for low, high, kept, long in zip([0, *edges], edges, *counts, strict=False)]


def pack_fill(lengths: np.ndarray, offsets: np.ndarray, seq_len: int) -> list[int]:
    """Packs by how full they are, in twentieths: up to 5%, up to 10%, ... up to full. `lengths` follow the packs."""
    tokens = np.add.reduceat(lengths, offsets[:-1])  # (packs,)
    return np.bincount(-(-tokens * 20 // seq_len) - 1, minlength=20).tolist()


def describe(found: Figures, *, short: bool = False) -> str:
    """The report of `figures` for a person; `short` omits the mixture and the lengths."""
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, 80), 120)
    mixed = [*found["train"], *found["replay"]]
    lines = _table(_source_rows(found), columns)
    if not short:
        is_mixture = len(mixed) > 1 or mixed[0]["weight"] != 1
        lines += ["", *_table(_mixture_rows(mixed, found), columns)] if is_mixture else []
        lines += ["", *_length_lines(found)]
    step = found["target_tokens_per_step"]
    recompute = "without" if found["recompute"] == "none" else f"with {found['recompute']}"
    plan = [("packs", f"{found['packs']:,} of {found['seq_len']:,} tokens, {found['packing_efficiency']:.2%} full, "
                      f"template {found['template']}"),
            ("steps", f"{found['steps_per_epoch']:,} per epoch, {found['total_steps']:,} in total, of "
                      f"{found['packs_per_step']:,} packs; {step['mean']:,.0f} trained tokens each ({step['least']:,} "
                      f"to {step['most']:,})"), *(("warning", text) for text in found["beware"]),
            ("compute", "not estimated: there is no config.json" if found["flops"] is None else
             f"about {found['flops']:.3g} FLOPs in matrix products, {recompute} recomputation"),
            ("checks", f"passed: {', '.join(found['checks'])}")]
    lines.append("")
    for title, text in plan:
        lines += textwrap.wrap(text, columns, initial_indent=f"{title:<9}", subsequent_indent=" " * 9)
    return "\n".join(printable(line, PATH) for line in lines)


def _source_rows(found: Figures) -> list[list[str] | str]:
    """The table's rows, and notes between them."""
    rows: list[list[str] | str] = [["source", "read", "kept", "turns", "tokens", "trained", "share", "longest",
                                    "median", "tok/word"]]
    for kind, heading in {"train": "", "replay": "replayed:", "eval": "evaluated:", "general": "general text:"}.items():
        rows += [heading] if heading and found[kind] else []
        for source in found[kind]:
            rows.append([source["name"], *(_count(source[name]) for name in
                                           ("read", "kept", "turns", "tokens", "target_tokens")),
                         f"{source['target_share']:.1%}", _count(source["longest"]), _count(round(source["median"])),
                         f"{source['tokens_per_word']:.2f}" if source["words"] else "-"])
            rows += [f"    {note}" for note in _notes(source, found)]
    return rows


def _notes(source: Figures, found: Figures) -> list[str]:
    """Facts about a source that its counts do not show."""
    first, files = source["examples"], source["files"]
    notes = [f"files: {len(files):,} ({files[0]}{f' to {files[-1]}' * (len(files) > 1)})"] if files else []
    notes += [f"{'left out, ' * (reason != 'held out')}{reason}: {count:,} (first: {first[reason]})"
             for reason, count in source["skipped"].items()]
    notes += [f"changed, {note}: {count:,} (first: {first[note]})" for note, count in source["changed"].items()]
    for key, text, removed_by in (("duplicates", "exact duplicates", ("exact", "near")),
                                  ("near_duplicates", "near-exact duplicates", ("near",))):
        if source[key] and found["dedup"] not in removed_by:
            notes.append(f"{text}: {source[key]:,} (kept; data.dedup = {removed_by[0]} leaves them out)")
    if source["split"]:
        notes.append(f"texts split into parts: {source['split']:,} into {source['parts']:,} documents")
    counts = {"trained tokens with a weight other than 1 in the loss": "weighted_tokens",
              f"cut to {found['seq_len']:,} tokens": "truncated",
              "trained tokens lost to the length limit": "lost_target_tokens",
              "also in the training data, exactly or nearly": "also_trained"}
    return [*notes, *(f"{text}: {source[key]:,}" for text, key in counts.items() if source[key])]


def _mixture_rows(mixed: list[Figures], found: Figures) -> list[list[str] | str]:
    rows: list[list[str] | str] = [["in epoch 1", "weight", "documents", "tokens", "share", "trained", "share"]]
    for source in mixed:
        epoch, kept, weight = source["epoch"], source["kept"], f"{source['weight']:.4g}"
        rows.append([source["name"], weight, _count(epoch["documents"]), _count(epoch["tokens"]),
                     f"{epoch['token_share']:.1%}", _count(epoch["target_tokens"]), f"{epoch['target_share']:.1%}"])
        times, part = divmod(source["weight"], 1)
        drawn = epoch["documents"] - int(times) * kept
        if times == 0:
            rows.append(f"    weight {weight}: {drawn:,} of {kept:,} documents in epoch 1, drawn anew each epoch")
        elif source["weight"] != 1:
            often = {1: "once", 2: "twice"}.get(times, f"{int(times):,} times")
            more = f", and {drawn:,} again, drawn anew each epoch" if part else ""
            rows.append(f"    weight {weight}: all {kept:,} documents {often}{more}")
    if found["replay"]:
        rows.append(f"replay is {found['replay_share']:.2%} of the tokens (data.replay_ratio = "
                    f"{found['replay_ratio']:g})")
    return rows


def _length_lines(found: Figures) -> list[str]:
    """A bar for each bucket of lengths, and a line at seq_len."""
    buckets = found["lengths"]
    counts = [bucket["kept"] + bucket["too_long"] for bucket in buckets]
    first = next((i for i, count in enumerate(counts) if count), len(buckets) - 1)
    fate = "cut" if found["overlong"] == "truncate" else "left out"
    lines = ["documents by length in tokens"]
    for bucket, count in zip(buckets[first:], counts[first:], strict=True):
        eighths = -(-count * BAR * 8 // max(counts))
        bar = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        note = f"  {fate}" * (bucket["from"] > found["seq_len"])
        lines.append(f"{bucket['from']:>9,} - {bucket['to']:<9,}{count:>10,}  {bar}{note}".rstrip())
        if bucket["to"] == found["seq_len"]:
            lines.append(f"{'-' * 12} data.seq_len = {found['seq_len']:,} {'-' * BAR}"[: 33 + BAR])
    return lines


def _count(number: int) -> str:
    return f"{number:,}" if number < 10_000_000 else f"{number / 1e6:,.1f}M"


def _table(rows: list[list[str] | str], columns: int) -> list[str]:
    """Rows in aligned columns, the first to the left and cut if the line would be too long; notes as they are."""
    widths = [max(map(len, cells)) for cells in zip(*(row for row in rows if not isinstance(row, str)), strict=True)]
    gap = 2 if sum(widths) + 2 * len(widths) <= columns else 1
    widths[0] = min(widths[0], max(8, columns - sum(widths[1:]) - gap * len(widths[1:])))
    lines = []
    for row in rows:
        if not isinstance(row, str):
            name = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
            row = f"{name:<{widths[0]}}" + "".join(f"{cell:>{gap + width}}" for cell, width in
                                                   zip(row[1:], widths[1:], strict=True))
        lines.append(row)
    return lines
