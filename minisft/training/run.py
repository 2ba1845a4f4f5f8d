"""What a run consists of, opened one after the other: base, ranks, model, optimiser, weights.

    configuration, data -> Base -> Run, its parameters empty -> filled from the base, a checkpoint, or at random

Whatever can be refused is refused before anything is allocated. The loop that works on it is in trainer.py.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minisft.config import Config
from minisft.data import packing
from minisft.errors import NumericsError, UserError
from minisft.evaluation import samples
from minisft.model import lora, weights
from minisft.model.llama import Llama
from minisft.model.llama_config import LlamaConfig, read_config
from minisft.model.meta import MetaFolder
from minisft.model.precision import DTYPES
from minisft.planning.memory import Sizes
from minisft.prepare import Prepared, adapters_of, check_vocabulary
from minisft.training import parallel, provenance
from minisft.training.checkpoint import SavedState, check_room, checkpoints
from minisft.training.optimizer import Optimizer
from minisft.training.parallel import World
from minisft.versions import SHARDS_BYTES


@dataclass(frozen=True)
class Base:
    """What a run begins with."""

    network: LlamaConfig
    checkpoint: weights.WeightSource | None  # None: random weights
    record: provenance.Record


@dataclass(frozen=True)
class Run:
    """What a run consists of, once all of it is open."""

    config: Config
    prepared: Prepared
    world: World
    base: Base
    model: Llama
    optimizer: Optimizer
    history: list[dict[str, Any]] = field(default_factory=list)  # settings changed on the way (resume.history)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """See `identity`."""
        return identity(self.config, self.prepared, self.base.network, self.base.checkpoint)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every key of the configuration, as JSON has it, except those that only say where files are or which
        checkpoint a start takes."""
        flat = {f"{section}.{key}": value for section, keys in asdict(self.config).items()
                for key, value in keys.items()}
        return {key: value for key, value in json.loads(json.dumps(flat)).items()
                if key not in ("run.dir", "data.cache", "checkpoint.resume", "checkpoint.allow_change")}


def check_ranks(config: Config) -> None:
    """Raise UserError where the ranks that torchrun has started cannot share a step as the configuration wants it."""
    parallel.check_split(config.batch.packs, shard=config.parallel.shard, replicate=config.parallel.replicate)
    if config.optim.in_backward:
        parallel.check_one_micro_batch(config.batch.packs, config.batch.micro_packs)
    if config.lora.rank and config.lora.base == "nf4" and parallel.launched_rank()[1] > 1 and not SHARDS_BYTES:
        raise UserError(f"lora.base = nf4 on several ranks: torch {torch.__version__} cannot shard bytes; use torch "
                        "2.13 or newer, one process, or lora.base = bf16")


def open_base(config: Config, prepared: Prepared) -> Base:
    """The network's shape and its weights on disk, checked against each other and the data."""
    checkpoint: weights.WeightSource | None = None
    if config.model.init == "random":
        network = prepared.network or read_config(config.model.config)
    elif config.model.format == "meta":
        checkpoint = MetaFolder(config.model.path)
        network = checkpoint.config
    else:
        checkpoint = weights.SafetensorsFolder(config.model.path)
        network = checkpoint.config
    if not (checkpoint or torch.cuda.is_available()):
        with torch.device("meta"):
            weights.check_memory(Llama(network).to(DTYPES[config.optim.parameters]))
    if checkpoint:
        if adapters := adapters_of(config):
            adapters.check(network)
        with torch.device("meta"):
            weights.check(Llama(network), checkpoint)
    check_vocabulary(prepared, network)
    if config.eval.samples:
        samples.questions(prepared.evals, config.eval.samples)  # whether there are any is known before training
    return Base(network, checkpoint, provenance.start_record(config.model.path if checkpoint else ""))


def open_run(config: Config, prepared: Prepared, world: World, base: Base) -> Run:
    """The model, allocated and not yet filled, and its optimiser. Raises OSError where the disk has no room."""
    parts, optim = config.parallel, config.optim
    model = parallel.build_model(
        base.network, world, precision=config.train.precision, recompute=parts.activation_checkpointing,
        parameters=DTYPES[optim.parameters], compiled=is_compiled(config, world), reshard=parts.reshard,
        prefetch=parts.prefetch, offload=parts.offload, adapters=adapters_of(config))
    if world.leads:
        check_room(Path(config.run.dir), room_needed(config, model, prepared.plan.total_steps), "the run needs")
    optimizer = Optimizer(
        model, world.mesh, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps,
        moments=DTYPES[optim.moments], in_backward=optim.in_backward, offload=parts.offload == "optimizer",
        seed=config.train.seed, compiled=is_compiled(config, world) and parts.offload != "parameters")
    return Run(config, prepared, world, base, model, optimizer)


def fill(run: Run, saved: SavedState | None) -> None:
    """Give the model the weights of the checkpoint to resume from, of the base model, or random ones. Raises
    NumericsError if any of them is not finite."""
    seed, adapters, checkpoint = run.config.train.seed, adapters_of(run.config), run.base.checkpoint
    if adapters and checkpoint:  # also where there is something to go on from: the frozen weights are not in it
        lora.load(run.model, checkpoint, seed=seed)
        if run.world.leads:
            print(lora.described(run.model, adapters), flush=True)
    if saved:
        saved.restore(run.optimizer, run.world)
    elif not checkpoint:
        weights.initialize(run.model, std=run.base.network.initializer_range, seed=seed)
    elif not adapters:
        weights.load(run.model, checkpoint)
    origin = str(saved.folder) if saved else run.config.model.path or "the random model"
    check_finite({**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}, run.world,
                 f"in {origin}", "it cannot be trained: get its files again, or start from another")


def check_finite(tensors: Mapping[str, Tensor], world: World, when: str, remedy: str) -> None:
    """Raise NumericsError on all ranks if any of these weights is not finite on one of them."""
    rows = {name: weights.local_rows(tensor.detach())[0] for name, tensor in tensors.items()}
    bad = [name for name, part in rows.items() if part.is_floating_point() and part.numel()
           and not torch.linalg.vector_norm(part, float("inf")).isfinite()]  # the largest, without a copy
    found = [bad] * world.ranks
    dist.all_gather_object(found, bad)
    if names := sorted({name for each in found for name in each}):
        raise NumericsError(f"weights {when} are NaN or infinite: {', '.join(names[:10])}"
                            f"{f' and {len(names) - 10} more' * (len(names) > 10)}; {remedy}")


def identity(config: Config, prepared: Prepared, model_config: LlamaConfig,
             base: weights.WeightSource | None) -> dict[str, Any]:
    """What must be the same when a run goes on, or its batches, or what it trains, would be others."""
    frozen = {}
    if config.lora.rank and base:  # as JSON has it, where a tuple is a list
        frozen = {f"lora.{name}": value for name, value in asdict(config.lora).items()}
        frozen |= {"lora.targets": list(config.lora.targets), "base": weights.fingerprint(base)}
    return {**frozen,
            "data": [store.key for store in prepared.train.stores], "weights": list(prepared.weights),
            "packing": packing.VERSION,
            "data.replay": [source.path for source in config.data.replay],
            "data.replay_ratio": config.data.replay_ratio, "data.eval_fraction": config.data.eval_fraction,
            "data.seq_len": config.data.seq_len, "data.overlong": config.data.overlong,
            "data.dedup": config.data.dedup, "data.shuffle": config.data.shuffle, "data.train_on": config.data.train_on,
            "template": prepared.renderer.template.name, "tokenizer": prepared.tokenizer.sha256,
            "batch.packs": config.batch.packs, "train.seed": config.train.seed,
            "train.precision": config.train.precision, "optim.parameters": config.optim.parameters,
            "optim.moments": config.optim.moments, "model": model_config.to_dict(dtype="float32")}


def room_needed(config: Config, model: Llama, steps: int) -> int:
    """Bytes on the disk without which a run of `steps` steps cannot end well: models and checkpoints, less those that
    are there. The last step is saved, too; an old checkpoint goes only when the new one is complete, so there is one
    more than are kept."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)  # of all ranks
    final, weight, moment = (DTYPES[precision].itemsize for precision in (
        config.train.precision, config.optim.parameters, config.optim.moments))
    folder, keep = Path(config.run.dir), config.checkpoint.keep
    saves = -(-steps // (config.checkpoint.every or steps))
    exports = steps // (config.checkpoint.export_every or steps + 1)
    models = config.run.export + max(exports - len([*folder.glob("exports/step-*[0-9]")]), 0)
    states = max((min(keep + 1, saves) if keep else saves) - len(checkpoints(folder / "checkpoints")), 0)
    # What a save or an export that was killed has left makes room for its like.
    unfinished = sum(file.stat().st_size for file in folder.glob("**/*.tmp/*"))
    return models * Sizes.of(model.config).total * final + states * trained * (weight + 2 * moment) - unfinished


def is_compiled(config: Config, world: World) -> bool:
    """Whether the layers are compiled, and packs padded to one shape for that."""
    return parallel.is_on(config.parallel.compile, auto=world.device.type == "cuda")
