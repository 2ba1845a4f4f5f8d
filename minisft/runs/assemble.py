"""The parts of a run, opened one after the other: base, ranks, model, optimizer, weights.

    configuration, data -> Base -> Run with empty parameters -> filled from the base, a checkpoint, or at random

Whatever can be refused is refused before anything is allocated.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minisft import context, fp8
from minisft.config import Config
from minisft.data import packing
from minisft.errors import NumericsError, UserError
from minisft.evals.heldout import heldout_questions
from minisft.export import provenance
from minisft.lean.adamw import LeanAdamW
from minisft.lora import adapters, targets
from minisft.model import weights
from minisft.model.flops import Sizes
from minisft.model.llama import DTYPES, Llama
from minisft.model.llama_config import LlamaConfig, read_config
from minisft.prepare import Prepared, adapters_of, check_vocabulary
from minisft.pretrained import MetaFolder
from minisft.training import parallel
from minisft.training.checkpoint import SavedState, check_room, saved_checkpoints
from minisft.training.optimizer import AdamW
from minisft.training.parallel import World
from minisft.versions import SHARDS_BYTES

HELD_OUT = "held-out "  # before the name of a set in a fingerprint


@dataclass(frozen=True)
class Base:
    """The model that a run begins with."""

    network: LlamaConfig
    source: weights.WeightSource | None  # None: random weights
    record: provenance.Record


@dataclass(frozen=True)
class Run:
    """An open run."""

    config: Config
    prepared: Prepared
    world: World
    base: Base
    model: Llama
    optimizer: AdamW
    history: list[dict[str, Any]] = field(default_factory=list)  # settings changed on the way (resume.py)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What must stay the same when a run resumes, or it would have other batches or train something else."""
        config, prepared, base = self.config, self.prepared, self.base.source
        frozen = {}
        if config.lora.rank and base:  # as JSON, where a tuple is a list
            frozen = {f"lora.{name}": value for name, value in asdict(config.lora).items()}
            frozen |= {"lora.targets": list(config.lora.targets)}
        scale = {"train.fp8_scale": config.train.fp8_scale} if config.train.precision == "fp8" else {}
        # Forgetting is measured against the loss at step 0, on the same documents.
        limit = {"eval.max_tokens": config.eval.max_tokens} if config.eval.max_tokens else {}
        # Losses of other files cannot be compared; `resume` lets a set come or go.
        held_out = {f"{HELD_OUT}{name}": [store.key for store in dataset.stores]
                    for name, dataset in prepared.evals.items()}
        keys = ("data.replay_ratio", "data.eval_fraction", "data.seq_len", "data.overlong", "data.dedup",
                "data.shuffle", "data.train_on", "batch.packs", "train.seed", "train.precision", "optim.parameters",
                "optim.moments")
        return {**frozen, **scale, **limit, **held_out, **{key: attrgetter(key)(config) for key in keys},
                "base": weights.fingerprint(base) if base else "random",
                "data": [store.key for store in prepared.train.stores], "weights": list(prepared.weights),
                "packing": packing.VERSION, "data.replay": [source.path for source in config.data.replay],
                "template": prepared.renderer.template.name, "tokenizer": prepared.tokenizer.sha256,
                "model": self.base.network.to_dict(dtype="float32")}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every key of the configuration as JSON, except those that only say where files are or which checkpoint to
        resume from."""
        flat = {f"{section}.{key}": value for section, keys in asdict(self.config).items()
                for key, value in keys.items()}
        return {key: value for key, value in json.loads(json.dumps(flat)).items()
                if key not in ("run.dir", "data.cache", "checkpoint.resume", "checkpoint.allow_change")}


def check_ranks(config: Config) -> None:
    """Raise UserError if the ranks that torchrun has started cannot share a step as the configuration wants it."""
    ranks, packs, micro_packs = parallel.launched_rank()[1], config.batch.packs, config.batch.micro_packs
    replicate = parallel.replicas(ranks, config.parallel)
    sharded, shared = config.parallel.shard, config.parallel.context
    streams = ranks // shared  # at a time
    if ranks % shared:
        raise UserError(f"parallel.context = {shared} does not divide the number of ranks, {ranks}: start a multiple "
                        f"of {shared} processes, or set it to a divisor of {ranks}")
    if packs < streams:
        raise UserError(f"batch.packs = {packs} cannot be split over {ranks} ranks: some would never have work; raise "
                        f"batch.packs to at least {streams}, start fewer processes, or let ranks share packs "
                        "(parallel.context)")
    if (sharded and sharded * replicate != ranks) or ranks % replicate:
        raise UserError(f"parallel.shard = {sharded} times parallel.replicate = {replicate} is not the number of "
                        f"ranks, {ranks}: it must be their product, or if one of them is 0, a multiple of the other")
    if config.optim.in_backward and packs > micro_packs * streams:
        raise UserError(f"optim.in_backward: batch.packs = {packs} is more than batch.micro_packs = {micro_packs} on "
                        f"{ranks} rank{'s' * (ranks > 1)}, but parameters that are updated in the backward pass cannot "
                        f"wait for another; lower batch.packs to {micro_packs * streams}, raise batch.micro_packs to "
                        f"{-(-packs // streams)}, or start more processes")
    if config.lora.rank and config.lora.base == "nf4" and ranks > 1 and not SHARDS_BYTES:
        raise UserError(f"lora.base = nf4 on several ranks: torch {torch.__version__} cannot shard bytes; use torch "
                        "2.13 or newer, one process, or lora.base = bf16")


def make_deterministic() -> None:
    """Make every operation of a GPU give the same bits each time, or raise naming the one that cannot.

    Otherwise the flash kernel's backward pass adds up in whatever order its blocks finish (Dao 2023), the compiler
    chooses among kernels by timing them, and collectives choose how to add. Call it before CUDA is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    from torch._inductor import config  # imported late: it takes a second

    config.deterministic = True


def open_base(config: Config, prepared: Prepared) -> Base:
    """The network's shape and its weights on disk, checked against each other and the data."""
    folder = MetaFolder if config.model.format == "meta" else weights.SafetensorsFolder
    source = None if config.model.init == "random" else folder(config.model.path)
    network = source.config if source else prepared.network or read_config(config.model.config)
    if lora := adapters_of(config):
        targets.check(lora, network)
    with torch.device("meta"):
        model = Llama(network).to(DTYPES[config.optim.parameters])
    if source:
        weights.check(model, source)
    elif not torch.cuda.is_available():
        weights.check_memory(model)
    context.check(config.parallel.context, network)
    check_vocabulary((prepared.train, *prepared.evals.values()), network, prepared.tokenizer)
    if config.eval.samples:
        heldout_questions(prepared.evals, config.eval.samples)  # raises if there are none
    return Base(network, source, provenance.start_record(config.model.path if source else ""))


def open_run(config: Config, prepared: Prepared, world: World, base: Base) -> Run:
    """The model, allocated but not filled yet, and its optimizer. Raises OSError if the disk has no room."""
    model = parallel.build_model(base.network, world, config, adapt=partial(adapt, config=config))
    if world.is_main:
        check_room(Path(config.run.dir), room_needed(config, model, prepared.plan.total_steps), "the run needs")
    return Run(config, prepared, world, base, model, open_optimizer(model, config, world))


def adapt(model: Llama, config: Config) -> None:
    """Give `model`, on the meta device, what the configuration wants: adapters, FP8 products, shared streams."""
    if lora := adapters_of(config):
        adapters.adapt(model, lora, trained=DTYPES[config.optim.parameters])
    if config.train.precision == "fp8":
        fp8.use(model, config.train.fp8_scale)
    if config.parallel.context > 1:
        context.share(model, config.parallel.context, timedelta(seconds=config.parallel.timeout) + parallel.PATIENCE)


def open_optimizer(model: Llama, config: Config, world: World) -> AdamW:
    """AdamW in the memory that the configuration leaves it."""
    optim, offload = config.optim, config.parallel.offload
    if not (optim.in_backward or offload == "optimizer" or "bf16" in (optim.moments, optim.parameters)):
        return AdamW(model, optim, world.mesh)
    compiled = parallel.is_compiled(config.parallel, world.device) and offload != "parameters"
    return LeanAdamW(model, optim, world.mesh, offload=offload == "optimizer", seed=config.train.seed,
                     compiled=compiled)


def fill(run: Run, saved: SavedState | None) -> None:
    """Fill the model with the weights of the checkpoint to resume from, of the base model, or random ones. Raises
    NumericsError if any weight is not finite."""
    seed, lora, source = run.config.train.seed, adapters_of(run.config), run.base.source
    if lora and source:  # on resume too: a checkpoint does not hold the frozen weights
        adapters.load(run.model, source, seed=seed)
        if run.world.is_main:
            print(adapters.described(run.model, lora), flush=True)
    if saved:
        saved.restore(run.optimizer, run.world)
    elif not source:
        weights.initialize(run.model, std=run.base.network.initializer_range, seed=seed)
    elif not lora:
        weights.load(run.model, source)
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


def room_needed(config: Config, model: Llama, steps: int) -> int:
    """Bytes of disk that a run of `steps` steps needs: models and checkpoints, less those that exist. The last step is
    saved, too; an old checkpoint goes only when the new one is complete, so there is one more than are kept."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)  # of all ranks
    final, weight, moment = (DTYPES[precision].itemsize for precision in (
        config.train.precision, config.optim.parameters, config.optim.moments))
    folder, keep = Path(config.run.dir), config.checkpoint.keep
    saves = -(-steps // (config.checkpoint.every or steps))
    exports = steps // (config.checkpoint.export_every or steps + 1)
    bests = steps // config.eval.every if config.checkpoint.keep_best else 0
    bests = min(bests, keep + 2) if keep else bests  # of each checkpoint, of the run now, and the one being written
    models = config.run.export + sum(max(count - len([*folder.glob(f"{kind}/step-*[0-9]")]), 0)
                                     for kind, count in (("exports", exports), ("best", bests)))
    states = max((min(keep + 1, saves) if keep else saves) - len(saved_checkpoints(folder / "checkpoints")), 0)
    # The remains of a save or an export that was killed make room for the next one.
    unfinished = sum(file.stat().st_size for file in folder.glob("**/*.tmp/*"))
    return models * Sizes.of(model.config).total * final + states * trained * (weight + 2 * moment) - unfinished
