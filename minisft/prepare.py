"""From a configuration to the data of its run: what `minisft prepare` reports and what training trains on.

Everything here happens before a process group exists, so that no collective times out while a file is tokenised.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minisft.config import Config, DataConfig, LoraConfig, Source, heldout_name
from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation, Skipped
from minisft.data.dataset import Dataset
from minisft.data.packing import Plan
from minisft.data.store import Store, open_store
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.files import data_files, named_files
from minisft.formats.jinja import choose_template
from minisft.formats.parse import read
from minisft.lora import targets
from minisft.model.flops import training_flops
from minisft.model.llama_config import PRESETS, LlamaConfig, read_config

MOST = 2**31  # documents in an epoch
Array = np.ndarray


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    config: Config
    network: LlamaConfig | None  # None if there is no config.json to read
    tokenizer: Tokenizer
    renderer: Renderer  # of data.template: how the trained model is prompted
    train: Dataset  # data.train, then data.replay
    weights: tuple[float, ...]  # of each source in it: passes over its tokens in an epoch
    plan: Plan
    evals: dict[str, Dataset]  # data.eval, data.general, held-out parts of data.train

    def origins(self, step: int) -> list[str]:
        """File and line of every document of `step` (from 0), on all ranks."""
        return ["{}:{}".format(*self.train.origin(int(i))) for i in np.concatenate(self.plan.documents(step))]

    def flops(self, step: int, network: LlamaConfig) -> int:
        """FLOPs of `step` (from 0) on all ranks together, without recomputation (model/flops.py)."""
        documents = np.concatenate(self.plan.documents(step))
        return training_flops(network, self.plan.lengths[documents], self.plan.num_loss_tokens[documents],
                              ranks=targets.ranks(self.config.lora, network))

    def shares(self, step: int) -> dict[str, dict[str, int]]:
        """{"sources": trained tokens of `step` (from 0) in each source, on all ranks}; empty if there is one source."""
        if len(self.weights) == 1:
            return {}
        counts = self.train.per_source(self.train.num_loss_tokens, np.concatenate(self.plan.documents(step)))
        return {"sources": {report.name: int(n) for report, n in zip(self.train.reports, counts, strict=True)}}


def adapters_of(config: Config) -> LoraConfig | None:
    """The settings of the adapters that are trained; None for full fine-tuning."""
    return config.lora if config.lora.rank else None


def inputs(config: Config, arguments: Sequence[str] = ()) -> list[str]:
    """The files and folders that are read to prepare `config`, with the recipe if `arguments` begin with one."""
    data, model = config.data, config.model
    sources = (*data.train, *data.replay, *data.eval, *data.general)
    return [*(file for source in sources for file in named_files(source.path)),
            model.tokenizer, model.path, model.config, data.templates, data.cache, *arguments[:1]]


def read_source(source: Source, data: DataConfig, unread: dict[str, int]) -> Iterator[Conversation | Skipped]:
    """The conversations of a source, for `open_store`; `unread` counts the records that have a field nothing reads."""
    return read(source.path, format=source.format, skip_bad=data.skip_bad, oasst=data.oasst, ignore=data.ignore,
                unread=unread, columns=source.fields)


def prepare(config: Config, *, quiet: bool = False, verify: bool = False) -> Prepared:
    """Read, render, tokenise (or find again) and pack the data of `config`. Raises UserError for bad input. `verify`
    first checks every stored document against its hash, and makes damaged stores again."""
    data = config.data
    for path in map(Path, inputs(config)):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is a device, a pipe or a socket; name a regular file")
    model = config.model
    own = "--model.tokenizer" if model.tokenizer != model.path else "--model.path"
    tokenizer = Tokenizer(model.tokenizer, option=own)
    for key in ("train", "replay", "eval", "general"):  # all files must be there before the first one is read
        for source in getattr(data, key):
            data_files(source.path, key=f"data.{key}: ")
    templates = load_templates(data.templates or None)
    sources = (*data.train, *data.replay)
    renderers = {name: Renderer(choose_template(name, templates, tokenizer), tokenizer, train_on=data.train_on)
                 for name in {data.template, *(source.template for source in (*sources, *data.eval, *data.general))}}

    def store(source: Source) -> Store:
        return open_store(source, data, renderers[source.template], read_source, quiet=quiet, verify=verify)

    stores = [store(source) for source in sources]
    held = held_out(stores, data.eval_fraction, len(data.train))
    train = Dataset(stores, data, held_out=held)
    evals = {source.name: Dataset([store(source)], data, purpose="to evaluate on")
             for source in (*data.eval, *data.general)}
    if data.eval_fraction:
        parts = {heldout_name(source): Dataset([stores[i]], data, held_out=[held[i]], only_held_out=True)
                 for i, source in enumerate(data.train)}
        if not any(map(len, parts.values())):
            raise UserError(f"data.eval_fraction: {data.eval_fraction:g} of {sum(map(len, held)):,} documents holds "
                            "out none that fits; raise it")
        evals |= {name: part for name, part in parts.items() if len(part)}
    for name, dataset in evals.items():
        dataset.reports[0].name = name
        dataset.reports[0].also_trained = int(np.isin(dataset.near_duplicate_hashes(),
                                                      train.near_duplicate_hashes()).sum())
        if config.eval.max_tokens:
            dataset.keep(config.eval.max_tokens, config.train.seed)
    weights = _weights(config, train)
    plan = Plan(train.lengths, train.num_loss_tokens, seq_len=data.seq_len, packs_per_step=config.batch.packs,
                epochs=config.train.epochs, max_steps=config.train.max_steps, seed=config.train.seed,
                shuffle=data.shuffle, passes=weights[train.store_of], loss_weights=train.loss_weights)
    network = PRESETS.get(config.model.config) if config.model.init == "random" else None
    file = Path(config.model.config if config.model.init == "random" else config.model.path)
    file = file / "config.json" if file.is_dir() else file
    network = network or (read_config(file) if file.is_file() else None)
    prepared = Prepared(config, network, tokenizer, renderers[data.template], train, tuple(weights.tolist()), plan,
                        evals)
    if network:
        check_vocabulary((train, *evals.values()), network, tokenizer)
        if adapters := adapters_of(config):
            targets.check(adapters, network)
    return prepared


def check_vocabulary(datasets: Iterable[Dataset], network: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError if a token id is beyond the model's vocabulary."""
    for report in (report for dataset in datasets for report in dataset.reports):
        if report.largest_id >= network.vocab_size:
            raise UserError(f"{report.path}: token id {report.largest_id} is past the model's vocabulary of "
                            f"{network.vocab_size}; {tokenizer.file} belongs to another model")


def held_out(stores: Sequence[Store], fraction: float, count: int) -> list[Array]:
    """For each store (documents,) booleans: what is set aside, to evaluate on if it is one of the first `count`. A
    record's first text decides, so another order or another seed never moves a record to the other side. With it go its
    near duplicates in any store, and the rest of their records. A larger fraction holds out the same and more."""
    ends = np.cumsum([len(store) for store in stores])
    hashes = np.concatenate([store.near_duplicate_hashes for store in stores])
    records = np.concatenate([store.records + end - len(store) for store, end in zip(stores, ends, strict=True)])
    begins = np.diff(records, prepend=0) != 0
    held = hashes[begins][np.cumsum(begins) - 1] < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    held[ends[count - 1] :] = False
    while (more := np.isin(records, records[np.isin(hashes, hashes[held])])).sum() > held.sum():
        held = more
    return np.split(held, ends[:-1])


def replay_weights(tokens: Array, weights: Array, replayed: Array, ratio: float) -> Array:
    """Weights (n,) with which the `replayed` (n,) sources make up `ratio` of an epoch's tokens. `tokens` (n,) are those
    of one pass over each source. The others keep their weights, and the replayed ones keep theirs relative to each
    other. Replay is general text mixed in so that the model keeps what it knew (Robins 1995, "Catastrophic forgetting,
    rehearsal and pseudorehearsal")."""
    if not replayed.any():
        return weights
    seen = tokens * weights
    wanted = seen[~replayed].sum() * ratio / (1 - ratio)
    return np.where(replayed, weights * (wanted / seen[replayed].sum()), weights)


def _weights(config: Config, train: Dataset) -> Array:
    """(sources,) passes over each source in an epoch. Raises UserError if data.train or data.replay is empty."""
    given = np.array([source.weight for source in (*config.data.train, *config.data.replay)])
    replayed, tokens = np.arange(len(given)) >= len(config.data.train), train.per_source(train.lengths)
    for name, part in (("data.train", ~replayed), ("data.replay", replayed)):
        if part.any() and not tokens[part].sum():
            raise UserError(f"{name}: no conversation is left to train on:{train.reasons(part)}")
    weights = replay_weights(tokens, given, replayed, config.data.replay_ratio)
    if (documents := float(train.per_source(np.ones_like(train.lengths)) @ weights)) > MOST:
        raise UserError(f"data.train: an epoch has {documents:,.0f} documents by the weights of its sources, more than "
                        f"{MOST:,}; lower the largest weight")
    return weights
