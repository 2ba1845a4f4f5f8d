"""The training loop, top to bottom.

    configuration -> data and plan -> model, sharded -> for each step of the plan:
        forward and backward of each micro-batch, the loss divided by the trained tokens of the whole step
        clip by the global norm, step
    -> held-out losses -> a Hugging Face folder
"""

import faulthandler
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minisft import config as configuration
from minisft.config import Config
from minisft.data import packing
from minisft.data.loader import MicroBatch, Step, steps
from minisft.errors import EXIT_PREEMPTED
from minisft.evaluation import samples
from minisft.evaluation.forgetting import Forgetting
from minisft.evaluation.heldout import heldout_loss, loss_figures
from minisft.model import lora, weights
from minisft.model.config import PRESETS, LlamaConfig, read_config
from minisft.model.llama import Llama
from minisft.model.meta import MetaFolder
from minisft.noise import key_of
from minisft.planning.hardware import peak_flops
from minisft.planning.memory import Sizes
from minisft.preparation import Prepared, adapters_of, check_vocabulary, prepare
from minisft.reports.data_report import describe, figures
from minisft.training import parallel, provenance, resume
from minisft.training.adapter import export_adapter
from minisft.training.checkpoint import Saver, check_room
from minisft.training.environment import environment
from minisft.training.export import export
from minisft.training.failure import fail, guarded, watch
from minisft.training.loss import batch_loss
from minisft.training.metrics import Monitor, memory_gib
from minisft.training.optimizer import Optimizer, learning_rate
from minisft.training.parallel import World
from minisft.training.preemption import Preemption
from minisft.training.profile import profiled
from minisft.training.run_folder import RunFolder, read_log

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    return guarded(lambda: train(configuration.load(argv)))


def train(config: Config) -> int:
    """One run, from the data to `final/` in the run folder. Returns 0, or 75 where it was asked to stop and saved."""
    leads = parallel.launched_rank()[0] == 0
    parallel.check_split(config.batch.packs, shard=config.parallel.shard, replicate=config.parallel.replicate)
    if config.optim.in_backward:
        parallel.check_one_micro_batch(config.batch.packs, config.batch.micro_packs)
    prepared = prepare(config, quiet=not leads)
    if config.eval.samples:
        samples.questions(prepared.evals, config.eval.samples)  # whether there are any is known before training
    model_config, pretrained = open_model(config, prepared)
    begun = provenance.beginnings("" if config.model.init == "random" else config.model.path)
    preemption = Preemption()
    folder = world = None
    try:
        if leads:
            found = figures(prepared)
            print(describe(found, short=True), flush=True)
            folder = RunFolder(Path(config.run.dir), fresh=config.checkpoint.resume == "never")
            folder.begin(config.to_toml(), data=found, environment=environment())
        world = parallel.start(shard=config.parallel.shard, replicate=config.parallel.replicate)
        watch(config.parallel.timeout)
        model = parallel.build_model(model_config, world, precision=config.train.precision,
                                     recompute=config.parallel.activation_checkpointing,
                                     parameters=DTYPES[config.optim.parameters], compiled=is_compiled(config, world),
                                     reshard=config.parallel.reshard, prefetch=config.parallel.prefetch,
                                     offload=config.parallel.offload, adapters=adapters_of(config))
        if folder:
            check_room(folder.path, room_needed(config, model))
        optimizer = open_optimizer(config, model, world)
        fingerprint = identity(config, prepared, model_config, pretrained)
        saved = resume.find(Path(config.run.dir), world, fingerprint, wanted=config.checkpoint.resume,
                            allow_change=config.checkpoint.allow_change)
        adapters = adapters_of(config)
        if adapters and pretrained:  # also where there is a checkpoint: the frozen weights are not in it
            lora.load(model, pretrained, seed=config.train.seed)
            if folder:
                print(lora.described(model, adapters), flush=True)
        if saved:
            saved.restore(optimizer, world)
        elif pretrained and not adapters:
            weights.load(model, pretrained)
        elif not pretrained:
            weights.initialize(model, std=model_config.initializer_range, seed=config.train.seed)
        start = saved.step if saved else 0
        if folder:
            folder.rewind_log(start if saved else -1)  # step 0 is evaluated again
        done = run_steps(config, prepared, model, optimizer, world, preemption, start=start, fingerprint=fingerprint,
                         begun=begun)
        finished = done == prepared.plan.total_steps
        if finished:
            export_as(Path(config.run.dir) / "final", config, prepared, model, world, begun, adapter="adapter")
        if folder:
            folder.status("done" if finished else "preempted", exit_code=0 if finished else EXIT_PREEMPTED)
        return 0 if finished else EXIT_PREEMPTED
    except Exception as error:
        fail(error, world, folder)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        parallel.stop()
        preemption.close()
        if folder:
            folder.close()


def identity(config: Config, prepared: Prepared, model_config: LlamaConfig,
             base: weights.Checkpoint | None) -> dict[str, Any]:
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


def open_model(config: Config, prepared: Prepared) -> tuple[LlamaConfig, weights.Checkpoint | None]:
    """The network's shape and its weights on disk (None: random), checked against each other and the data."""
    checkpoint: weights.Checkpoint | None = None
    if config.model.init == "random":
        model_config = PRESETS.get(config.model.config) or read_config(config.model.config)
    elif config.model.format == "meta":
        checkpoint = MetaFolder(config.model.path)
        model_config = checkpoint.config
    else:
        checkpoint, model_config = weights.SafetensorsFolder(config.model.path), read_config(config.model.path)
    if checkpoint:
        if adapters := adapters_of(config):
            adapters.check(model_config)
        with torch.device("meta"):
            weights.check(Llama(model_config), checkpoint)
    check_vocabulary(prepared, model_config)
    return model_config, checkpoint


def open_optimizer(config: Config, model: nn.Module, world: World) -> Optimizer:
    """The optimiser as the configuration wants it."""
    optim = config.optim
    return Optimizer(model, world.mesh, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps,
                     moments=DTYPES[optim.moments], in_backward=optim.in_backward,
                     offload=config.parallel.offload == "optimizer", seed=config.train.seed)


def room_needed(config: Config, model: Llama) -> int:
    """Bytes on the disk without which a run cannot end well: a checkpoint, where there are any, and the final model."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)  # of all ranks
    final, weight, moment = (DTYPES[precision].itemsize for precision in (
        config.train.precision, config.optim.parameters, config.optim.moments))
    return Sizes.of(model.config).total * final + trained * (weight + 2 * moment) * (config.checkpoint.every > 0)


def run_steps(config: Config, prepared: Prepared, model: Llama, optimizer: Optimizer, world: World,
              preemption: Preemption, *, start: int, fingerprint: dict[str, Any], begun: provenance.Record) -> int:
    """Steps `start`, `start` + 1, ... of the plan, with their evaluations and checkpoints; returns the steps done."""
    plan, optim, folder = prepared.plan, config.optim, Path(config.run.dir)
    saver = Saver(folder / "checkpoints", world, keep=config.checkpoint.keep)
    monitor = Monitor(folder / "metrics.jsonl" if world.leads else None, start=start, total=plan.total_steps,
                      max_skipped=config.train.max_skipped, documents=prepared.origins, in_backward=optim.in_backward)
    planned = steps(prepared.train, plan, start=start, rank=world.rank, ranks=world.ranks,
                    micro_packs=config.batch.micro_packs, fixed=is_compiled(config, world), device=world.device)
    forgetting = Forgetting((source.name for source in config.data.general), bound=config.eval.forgetting_bound,
                            log=read_log(folder) if world.leads else ())
    number = start
    try:
        if start == 0:
            evaluate(config, prepared, model, world, monitor, forgetting, step=0)
        started = time.perf_counter()
        for step in profiled(planned, folder / "profile" if config.run.profile and world.leads else None):
            watch(config.parallel.timeout)
            shared = torch.zeros(2, device=world.device)  # loss, wish to stop: summed over the ranks
            lr = learning_rate(step.index, total_steps=plan.total_steps, peak=optim.lr, schedule=optim.schedule,
                               warmup_steps=optim.warmup_steps, min_ratio=optim.min_lr_ratio,
                               decay_fraction=optim.decay_fraction)
            optimizer.begin(lr, step.index)
            for batch in step.micro_batches:
                loss = forward(model, batch, step, config, world)
                loss.backward()
                shared[0] += loss.detach()
            grad_norm = optimizer.clip(optim.clip_norm)
            optimizer.step()
            shared[1] += preemption.asked
            parallel.all_sum(shared)

            number = step.index + 1
            seconds, started = time.perf_counter() - started, time.perf_counter()
            monitor.step({"kind": "train", "step": number, "epoch": step.epoch, "loss": None, "lr": lr,
                          "grad_norm": None, "tokens": step.tokens, "target_tokens": step.target_tokens,
                          "seconds": seconds, "tokens_per_second": step.tokens / seconds,
                          "memory_gib": memory_gib(world.device),
                          **(leaders_figures(prepared, step.index, seconds, world) if world.leads else {})},
                         shared[0], grad_norm, shared[1])
            last = number == plan.total_steps
            if monitor.stop and not last:
                break
            if is_due(number, config.eval.every) or last:
                monitor.settle()
                evaluate(config, prepared, model, world, monitor, forgetting, step=number)
                started = time.perf_counter()
            if is_due(number, config.checkpoint.export_every) and not last:
                monitor.settle()  # or this step would not be in the log, which the model's record is made from
                export_as(folder / "exports" / f"step-{number:06}", config, prepared, model, world, begun,
                          adapter=f"step-{number:06}-adapter")
            if saver.error:
                raise saver.error
            if is_due(number, config.checkpoint.every):
                monitor.settle()  # or this step would be in the checkpoint and not in the log
                saver.save(number, optimizer, {"adam_steps": optimizer.steps(), "fingerprint": fingerprint})
        monitor.settle()
        if number < plan.total_steps and saver.step != number:
            saver.save(number, optimizer, {"adam_steps": optimizer.steps(), "fingerprint": fingerprint})
        saver.finish()
        return number
    finally:
        planned.close()  # its thread
        monitor.close()


def leaders_figures(prepared: Prepared, step: int, seconds: float, world: World) -> dict[str, Any]:
    """What only the rank that writes says of a step: its share of the GPUs' peak where that is known, its sources."""
    peak = peak_flops(world.device)
    found: dict[str, Any] = {}
    if peak and prepared.network:
        found["mfu"] = prepared.flops(step) / seconds / (peak * world.ranks)
    if world.device.type == "cuda":
        found["memory_reserved_gib"] = torch.cuda.max_memory_reserved(world.device) / 2**30
    return found | prepared.shares(step)


def is_compiled(config: Config, world: World) -> bool:
    """Whether the layers are compiled, and packs padded to one shape for that."""
    return parallel.is_on(config.parallel.compile, auto=world.device.type == "cuda")


def export_as(folder: Path, config: Config, prepared: Prepared, model: Llama, world: World,
              begun: provenance.Record, *, adapter: str) -> None:
    """The model as it is now, as a Hugging Face folder in the precision it computes in, with the record of the run; its
    adapters beside it."""
    watch(config.parallel.timeout)
    if adapters := adapters_of(config):
        export_adapter(parallel.sharded(model), adapters, prepared.renderer, folder.with_name(adapter),
                       base=str(Path(config.model.path).absolute()), leads=world.leads)
    record = None
    if world.leads:
        found = figures(prepared)
        record = provenance.training_record(
            begun, recipe=config.to_toml(), seed=config.train.seed, ranks=world.ranks,
            data={use: found[use] for use in ("train", "replay", "eval", "general")},
            log=read_log(Path(config.run.dir)), total_steps=prepared.plan.total_steps)
    export(model, model.config, prepared.renderer, folder, leads=world.leads,
           dtype=DTYPES[config.train.precision], record=record)


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done after `step`."""
    return every > 0 and step % every == 0


def forward(model: nn.Module, batch: MicroBatch, step: Step, config: Config, world: World) -> Tensor:
    """This micro-batch's part of the step's loss: its sum over the trained tokens of the whole step."""
    key = key_of(config.train.seed, step.index, "dropout") if config.lora.dropout else None
    return batch_loss(model, batch, device=world.device, denominator=step.target_tokens,
                      label_smoothing=config.optim.label_smoothing, z_loss=config.optim.z_loss, dropout_key=key)


def evaluate(config: Config, prepared: Prepared, model: nn.Module, world: World, monitor: Monitor,
             forgetting: Forgetting, *, step: int) -> None:
    """The held-out loss of each evaluated source and what of the general text is forgotten, into the log; before and
    after the run, answers as well."""
    for name, dataset in prepared.evals.items():
        watch(config.parallel.timeout)
        started = time.perf_counter()
        loss = heldout_loss(model, dataset, world, seq_len=config.data.seq_len, micro_packs=config.batch.micro_packs,
                            fixed=is_compiled(config, world))
        record = {"kind": "eval", "step": step, "name": name, **loss_figures(loss),
                  "target_tokens": int(dataset.targets.sum()), "seconds": time.perf_counter() - started}
        warning = forgetting.add(record)
        monitor.write(record)
        above = f" ({record['forgetting']:+.4f} to the base model's)" if record.get("forgetting") else ""
        monitor.say(f"step {step}: held-out loss on {name}: {loss:.4f}{above}")
        if warning:
            monitor.say(warning)
    if config.eval.samples and step in (0, prepared.plan.total_steps):
        watch(config.parallel.timeout)
        asked = samples.questions(prepared.evals, config.eval.samples)
        for answer in samples.answers(model, asked, prepared.tokenizer, stop_ids=prepared.renderer.stop_ids(),
                                      device=world.device):
            monitor.write({"kind": "sample", "step": step, **answer})
