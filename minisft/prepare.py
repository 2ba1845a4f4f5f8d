"""From a configuration to the data of its run: what `minisft prepare` reports and what training trains on.

Everything here happens before a process group exists, so that no collective times out while a file is tokenised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minisft.config import Config, DataConfig, LoraConfig, Source, heldout_name
from minisft.data import mixing
from minisft.data.chat import Renderer, choose_template
from minisft.data.dataset import Dataset
from minisft.data.packing import Plan
from minisft.data.store import Store, open_store
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.files import regular_file
from minisft.lora import targets
from minisft.model.flops import training_flops
from minisft.model.llama_config import PRESETS, LlamaConfig, read_config

MOST = 2**31  # documents in an epoch


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    config: Config
    network: LlamaConfig | None  # None: there is no config.json to read
    tokenizer: Tokenizer
    renderer: Renderer  # of data.template: how the trained model is talked to
    train: Dataset  # data.train, then data.replay
    weights: tuple[float, ...]  # of each source in it: passes over its tokens in an epoch
    plan: Plan
    evals: dict[str, Dataset]  # data.eval, data.general, held-out parts of data.train

    def origins(self, step: int) -> list[str]:
        """File and line of every document of `step` (from 0), on all ranks."""
        documents = np.concatenate(self.plan.documents(step))
        return ["{}:{}".format(*self.train.origin(int(i))) for i in documents]

    def flops(self, step: int) -> int:
        """FLOPs that `step` (from 0) needs on all ranks together, nothing computed again (model/flops.py)."""
        assert self.network
        documents = np.concatenate(self.plan.documents(step))
        return training_flops(self.network, self.plan.lengths[documents], self.plan.targets[documents],
                              ranks=targets.ranks(self.config.lora, self.network))

    def shares(self, step: int) -> dict[str, dict[str, int]]:
        """{"sources": trained tokens of `step` (from 0) by their source, on all ranks}; nothing where there is one."""
        if len(self.weights) == 1:
            return {}
        counts = self.train.per_source(self.train.targets, np.concatenate(self.plan.documents(step)))
        return {"sources": {report.name: int(n) for report, n in zip(self.train.reports, counts, strict=True)}}


def adapters_of(config: Config) -> LoraConfig | None:
    """The settings of the adapters that are trained; None: the whole model is."""
    return config.lora if config.lora.rank else None


def inputs(config: Config, arguments: Sequence[str] = ()) -> list[str]:
    """What is read to prepare `config`, files and folders; with the recipe, where `arguments` begin with one."""
    data, model = config.data, config.model
    sources = [source.path for source in (*data.train, *data.replay, *data.eval, *data.general)]
    return [*sources, model.tokenizer, model.path, model.config, data.templates, data.cache, *arguments[:1]]


def prepare(config: Config, *, quiet: bool = False, verify: bool = False) -> Prepared:
    """Read, render, tokenise (or find again) and pack the data of `config`. Raises UserError for bad input.

    With `verify` every stored document is held against its hash first, and what is damaged made again.
    """
    data = config.data
    for path in map(Path, inputs(config)):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is a device, a pipe or a socket; name a regular file")
    tokenizer = Tokenizer(config.model.tokenizer)
    _look_for_files(data)
    templates = load_templates(data.templates or None)
    sources = (*data.train, *data.replay)
    renderers = {name: Renderer(choose_template(name, templates, tokenizer), tokenizer, train_on=data.train_on)
                 for name in {data.template, *(source.template for source in (*sources, *data.eval, *data.general))}}

    def store(source: Source) -> Store:
        return open_store(source.path, name=source.name, format=source.format, renderer=renderers[source.template],
                          cache=Path(data.cache), skip_bad=data.skip_bad, max_bad=data.max_bad, oasst=data.oasst,
                          ignore=data.ignore, quiet=quiet, verify=verify)

    fitting: dict[str, Any] = {"seq_len": data.seq_len, "overlong": data.overlong, "dedup": data.dedup}
    stores = [store(source) for source in sources]
    held_out = [mixing.held_out(s.loose, data.eval_fraction if i < len(data.train) else 0)
                for i, s in enumerate(stores)]
    train = Dataset(stores, held_out=held_out, **fitting)
    evals = {source.name: Dataset([store(source)], of="to evaluate on", **fitting)
             for source in (*data.eval, *data.general)}
    if data.eval_fraction:
        evals |= _held_out(config, stores, held_out, fitting)
    weights = _weights(config, train)
    plan = Plan(train.lengths, train.targets, seq_len=data.seq_len, packs_per_step=config.batch.packs,
                epochs=config.train.epochs, max_steps=config.train.max_steps, seed=config.train.seed,
                shuffle=data.shuffle, weights=weights[train.store_of])
    for name, dataset in evals.items():
        dataset.reports[0].name = name
        dataset.reports[0].also_trained = int(np.isin(dataset.loose(), train.loose()).sum())
    network = _network(config)
    prepared = Prepared(config, network, tokenizer, renderers[data.template], train, tuple(weights.tolist()), plan,
                        evals)
    if network:
        check_vocabulary(prepared, network)
        if adapters := adapters_of(config):
            targets.check(adapters, network)
    return prepared


def _look_for_files(data: DataConfig) -> None:
    """Raises UserError for one that is not there, before the first is read."""
    for key in ("train", "replay", "eval", "general"):
        for source in getattr(data, key):
            regular_file(source.path, key=f"data.{key}: ")


def check_vocabulary(prepared: Prepared, network: LlamaConfig) -> None:
    """Raises UserError where a token id is past the vocabulary of the model."""
    for dataset in (prepared.train, *prepared.evals.values()):
        for report in dataset.reports:
            if report.largest_id >= network.vocab_size:
                raise UserError(f"{report.path}: token id {report.largest_id} is past the model's vocabulary of "
                                f"{network.vocab_size}; {prepared.tokenizer.file} belongs to another model")


def _held_out(config: Config, stores: list[Store], held_out: list[np.ndarray],
              fitting: dict[str, Any]) -> dict[str, Dataset]:
    """The held-out part of each source in data.train, for those that have one."""
    parts = {heldout_name(source): Dataset([stores[i]], held_out=[held_out[i]], only_held_out=True, **fitting)
             for i, source in enumerate(config.data.train)}
    if not any(map(len, parts.values())):
        raise UserError(f"data.eval_fraction: {config.data.eval_fraction:g} of {sum(map(len, held_out)):,} documents "
                        "holds out none that fits; raise it")
    return {name: part for name, part in parts.items() if len(part)}


def _weights(config: Config, train: Dataset) -> np.ndarray:
    """(sources,) passes over each source in an epoch. Raises UserError where data.train or data.replay has nothing."""
    given = np.array([source.weight for source in (*config.data.train, *config.data.replay)])
    replayed = np.arange(len(given)) >= len(config.data.train)
    tokens = train.per_source(train.lengths)
    for name, part in (("data.train", ~replayed), ("data.replay", replayed)):
        if part.any() and not tokens[part].sum():
            raise UserError(f"{name}: no conversation is left to train on:{train.reasons(part)}")
    weights = mixing.replay_weights(tokens, given, replayed, config.data.replay_ratio)
    if (documents := float(train.per_source(np.ones_like(train.lengths)) @ weights)) > MOST:
        raise UserError(f"data.train: an epoch has {documents:,.0f} documents by the weights of its sources, more than "
                        f"{MOST:,}; lower the largest weight")
    return weights


def _network(config: Config) -> LlamaConfig | None:
    is_random = config.model.init == "random"
    if is_random and config.model.config in PRESETS:
        return PRESETS[config.model.config]
    path = Path(config.model.config if is_random else config.model.path)
    file = path / "config.json" if path.is_dir() else path
    return read_config(file) if file.is_file() else None
