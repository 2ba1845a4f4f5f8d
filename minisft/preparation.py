"""From a configuration to the data of its run: what `minisft prepare` reports and what training trains on.

Everything here happens before a process group exists, so that no collective times out while a file is tokenised.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minisft.config import Config, Source
from minisft.data.chat import Renderer
from minisft.data.dataset import Dataset
from minisft.data.jinja import recognize
from minisft.data.packing import Plan
from minisft.data.store import open_store
from minisft.data.templates import Template, load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    tokenizer: Tokenizer
    renderer: Renderer  # of data.template: how the trained model is talked to
    train: Dataset
    plan: Plan
    evals: dict[str, Dataset]

    def origins(self, step: int) -> list[str]:
        """File and line of every document of `step` (from 0), on all ranks."""
        documents = np.concatenate(self.plan.documents(step))
        return ["{}:{}".format(*self.train.origin(int(i))) for i in documents]


def prepare(config: Config, *, quiet: bool = False) -> Prepared:
    """Read, render, tokenise (or find again) and pack the data of `config`. Raises UserError for bad input."""
    tokenizer = Tokenizer(config.model.tokenizer)
    templates = load_templates(config.data.templates or None)
    sources = (*config.data.train, *config.data.eval)
    renderers = {name: Renderer(_template(name, templates, tokenizer), tokenizer, train_on=config.data.train_on)
                 for name in {config.data.template, *(source.template for source in sources)}}

    def dataset(wanted: tuple[Source, ...]) -> Dataset:
        stores = [open_store(s.path, name=s.name, format=s.format, renderer=renderers[s.template],
                             cache=Path(config.data.cache), skip_bad=config.data.skip_bad, max_bad=config.data.max_bad,
                             oasst=config.data.oasst, quiet=quiet) for s in wanted]
        return Dataset(stores, seq_len=config.data.seq_len, overlong=config.data.overlong, dedup=config.data.dedup)

    train = dataset(config.data.train)
    plan = Plan(train.lengths, train.targets, seq_len=config.data.seq_len, packs_per_step=config.batch.packs,
                epochs=config.train.epochs, max_steps=config.train.max_steps, seed=config.train.seed,
                shuffle=config.data.shuffle, weights=np.array([s.weight for s in config.data.train])[train.store_of])
    evals = {source.name: dataset((source,)) for source in config.data.eval}
    return Prepared(tokenizer, renderers[config.data.template], train, plan, evals)


def _template(name: str, templates: dict[str, Template], tokenizer: Tokenizer) -> Template:
    choices = (f"choose with data.template: {', '.join(templates)}; or write your own and name its file in "
               "data.templates")
    if name:
        if name not in templates:
            raise UserError(f"data.template: no template is called {name!r}; {choices}")
        return templates[name]
    known = recognize(tokenizer.chat_template)
    if known is None:
        raise UserError(f"{tokenizer.file.parent}: does not say which chat template the model uses; {choices}")
    name, default_system = known
    return replace(templates[name], default_system=default_system)


def describe(prepared: Prepared) -> str:
    """The report for a person: what was read, kept and left out, and what a run will consist of."""
    lines = [f"{'source':<24}{'read':>9}{'kept':>9}{'turns':>9}{'tokens':>13}{'trained':>13}{'share':>8}"]
    for dataset in (prepared.train, *prepared.evals.values()):
        for report in dataset.reports:
            share = report.target_tokens / max(report.tokens, 1)
            lines.append(f"{report.name:<24}{report.read:>9,}{report.kept:>9,}{report.turns:>9,}{report.tokens:>13,}"
                         f"{report.target_tokens:>13,}{share:>8.1%}")
            lines += [f"    left out, {reason}: {count:,} (first: {report.examples[reason]})"
                      for reason, count in report.skipped.items()]
            if report.duplicates and "duplicate" not in report.skipped:
                lines.append(f"    exact duplicates: {report.duplicates:,} (kept; data.dedup leaves them out)")
            if report.truncated:
                lines.append(f"    cut to {prepared.plan.seq_len:,} tokens: {report.truncated:,}")
            if report.lost_target_tokens:
                lines.append(f"    trained tokens lost to the length limit: {report.lost_target_tokens:,}")
    plan = prepared.plan
    name, packs = prepared.renderer.template.name, len(plan.epoch(0))
    lines.append(f"template {name}; {packs:,} packs of {plan.seq_len:,} "
                 f"tokens, {plan.fill():.2%} full; {plan.steps_per_epoch:,} steps an epoch, "
                 f"{plan.total_steps:,} in all")
    return "\n".join(lines)
