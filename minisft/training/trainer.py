"""The training loop, top to bottom.

    configuration -> data and plan -> model, sharded -> for each step of the plan:
        forward and backward of each micro-batch, the loss divided by the trained tokens of the whole step
        clip by the global norm, step
    -> held-out losses -> a Hugging Face folder
"""

import faulthandler
import json
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisft import config as configuration
from minisft.config import Config
from minisft.counter_rng import key_of
from minisft.data import packing
from minisft.data.batches import MicroBatch, Step, steps
from minisft.errors import EXIT_PREEMPTED, NumericsError, UserError
from minisft.planning.hardware import peak_flops
from minisft.prepare import Prepared, prepare
from minisft.reports.data_report import describe, figures
from minisft.training import parallel, resume
from minisft.training.after import After, export_as, is_due, record_of_model
from minisft.training.checkpoint import SavedState, Saver, checkpoints, give_up
from minisft.training.environment import environment
from minisft.training.export import try_export
from minisft.training.failure import fail, guarded, listen, watch
from minisft.training.loss import batch_loss
from minisft.training.metrics import Monitor, memory_gib
from minisft.training.optimizer import learning_rate
from minisft.training.parallel import World
from minisft.training.preemption import Preemption
from minisft.training.profile import profiled
from minisft.training.run import Run, check_finite, check_ranks, fill, is_compiled, open_base, open_run
from minisft.training.run_folder import RunFolder, read_log
from minisft.versions import warn_if_untested


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    return guarded(lambda: train(configuration.load(argv)))


def train(config: Config) -> int:
    """One run, from the data to `final/` in the run folder. Returns 0, or 75 where it was asked to stop and saved."""
    leads, parts = parallel.launched_rank()[0] == 0, config.parallel
    preemption = folder = world = None
    try:
        warn_if_untested()
        check_ranks(config)
        if config.train.deterministic:
            parallel.make_deterministic()
        prepared = prepare(config, quiet=not leads)
        base, preemption = open_base(config, prepared), Preemption()
        if leads:
            print(describe(found := figures(prepared), short=True), flush=True)
            folder = RunFolder(Path(config.run.dir))
            folder.status("running")
            read_log(folder.path)  # a line that is none ends the run here and not after hours
        world = parallel.start(shard=parts.shard, replicate=parts.replicate, timeout=parts.timeout)
        listen(world, folder)
        watch(parts.timeout)
        run = open_run(config, prepared, world, base)
        saved = resume.find(run.folder, world, run.fingerprint, wanted=config.checkpoint.resume,
                            again=folder is not None and folder.was_begun_with(config.to_toml()),
                            allow_change=config.checkpoint.allow_change, total_steps=prepared.plan.total_steps)
        fill(run, saved)
        run.history.extend(resume.history(saved, run.settings, run.fingerprint))
        if folder:
            begin(run, folder, saved, data=found)
        finished = run_steps(run, preemption, saved)
        return end(run, folder, finished=finished, asked=preemption.asked)
    except Exception as error:
        folder = folder or (earlier_folder(config) if leads else None)
        fail(error, world, folder)
        raise
    finally:
        parallel.stop(failed=sys.exc_info()[0] is not None)
        faulthandler.cancel_dump_traceback_later()
        if preemption:
            preemption.close()
        if folder:
            folder.close()


def begin(run: Run, folder: RunFolder, saved: SavedState | None, *, data: dict[str, Any]) -> None:
    """Note in the folder what was accepted: a start from `saved`. The run resumes from nothing else any more."""
    step = saved.step if saved else 0
    if run.config.run.export:
        try_export(run.base.network, run.prepared.renderer, run.folder / "final",
                   record=record_of_model(run, data, step=step, log=[]))
    give_up(resume.given_up(saved, checkpoints(folder.path / "checkpoints")))
    folder.begin(run.config.to_toml(), data=data, environment=environment())
    logged = folder.rewind_log(step if saved else -1)  # step 0 is evaluated again
    for change in run.history:
        if change["from_step"] == step + 1:
            was, now = (text if len(text) <= 80 else f"{text[:77]}..."
                        for text in map(json.dumps, (change["was"], change["is"])))
            print(f"{change['key']}: was {was}, is {now} from step {step + 1}", flush=True)
    if logged < step:
        print(f"{folder.path / 'metrics.jsonl'}: has {logged} of the {step} steps before; the others are lost from it, "
              "and the model's record will say so", flush=True)


def end(run: Run, folder: RunFolder | None, *, finished: bool, asked: bool) -> int:
    """Export the model of a run that is `finished`, and note how it ended; returns the exit code."""
    if folder and (asked or not finished):  # it has saved, and may be killed while it exports
        folder.status("preempted", exit_code=EXIT_PREEMPTED)
    if not finished:
        dist.barrier()  # where one has left torchrun ends the others: not before the leading one has noted that
        return EXIT_PREEMPTED
    if run.config.run.export:
        export_as(run, run.folder / "final", adapter="adapter", step=run.prepared.plan.total_steps)
    if folder:
        folder.status("done", exit_code=0)
    return 0


def earlier_folder(config: Config) -> RunFolder | None:
    """The folder of a run that goes on no further, whose "preempted" would be started again and again; None where there
    is none, or it is finished or another's."""
    with suppress(UserError, OSError):
        return RunFolder(Path(config.run.dir)) if Path(config.run.dir, "status.json").exists() else None
    return None


def run_steps(run: Run, preemption: Preemption, saved: SavedState | None = None) -> bool:
    """The steps of the plan after those of `saved`, with their evaluations and checkpoints. Returns whether the run is
    complete: all steps trained, and evaluated."""
    config, world, plan, optimizer = run.config, run.world, run.prepared.plan, run.optimizer
    saver = Saver(run.folder / "checkpoints", world, keep=config.checkpoint.keep)
    number = start = saved.step if saved else 0
    with closing(open_monitor(run, saved)) as monitor, closing(open_steps(run, start)) as planned:
        after = After(run, monitor, preemption)
        complete = after.step(start, there=after.done(start) if start else frozenset())
        for step in profiled(planned, run.folder / "profile" if config.run.profile and world.leads else None):
            if monitor.stop or not complete:
                break
            watch(config.parallel.timeout)
            shared = torch.zeros(2, device=world.device)  # loss, wish to stop: summed over the ranks
            lr = rate(config, step.index, plan)
            optimizer.begin(lr, step.index)
            for batch in step.micro_batches:
                loss = forward(run.model, batch, step, config, world)
                loss.backward()  # adds to .grad, over micro-batches and ranks: sums, and no means
                shared[0] += loss.detach()
            grad_norm = optimizer.clip(config.optim.clip_norm)
            optimizer.step()
            shared[1] += preemption.asked
            parallel.all_sum(shared)

            number = step.index + 1
            monitor.step(record_of(run, step, lr=lr, seconds=monitor.lap()), shared[0], grad_norm, shared[1])
            saver.check()
            if is_due(number, config.checkpoint.every) or number == plan.total_steps:  # a failing export loses nothing
                save(run, saver, monitor, number)
            complete = after.step(number)
        if number > start and saver.step != number:
            save(run, saver, monitor, number)
        saver.finish()
        if not (complete := complete and number == plan.total_steps):
            monitor.say(f"saved step {number}; the same command resumes from there" if number else
                        "stopped before the first step; the same command starts again")
    return complete


def open_monitor(run: Run, saved: SavedState | None) -> Monitor:
    """The log of a run that begins, or is resumed from `saved`."""
    return Monitor(run.folder / "metrics.jsonl" if run.world.leads else None, start=saved.step if saved else 0,
                   total=run.prepared.plan.total_steps, max_skipped=run.config.train.max_skipped,
                   documents=run.prepared.origins, in_backward=run.config.optim.in_backward,
                   before=saved.progress if saved else None)


def open_steps(run: Run, start: int) -> Generator[Step, None, None]:
    """This rank's share of the steps from `start` on."""
    world, config = run.world, run.config
    return steps(run.prepared.train, run.prepared.plan, start=start, rank=world.rank, ranks=world.ranks,
                 micro_packs=config.batch.micro_packs, fixed=is_compiled(config, world), device=world.device)


def rate(config: Config, step: int, plan: packing.Plan) -> float:
    """The learning rate of `step` (from 0)."""
    optim = config.optim
    return learning_rate(step, total_steps=plan.total_steps, peak=optim.lr, schedule=optim.schedule,
                         warmup_steps=optim.warmup_steps, min_ratio=optim.min_lr_ratio,
                         decay_fraction=optim.decay_fraction)


def save(run: Run, saver: Saver, monitor: Monitor, number: int) -> None:
    """Begin a checkpoint of the run after `number` steps. Raises NumericsError rather than let a broken model take the
    place of older checkpoints."""
    monitor.settle()  # or this step would be in the checkpoint and not in the log
    check_finite(run.optimizer.rows, run.world, f"after step {number}", "lower optim.lr")
    if number == run.prepared.plan.total_steps:
        check_trained(run, monitor)
    monitor.sync()
    if number == run.prepared.plan.total_steps and not (run.config.run.export or run.config.checkpoint.every):
        return  # nothing is exported that could fail, and nobody asked for checkpoints
    saver.save(number, run.optimizer, {
        "adam_steps": run.optimizer.steps(), "fingerprint": run.fingerprint, "settings": run.settings,
        "history": run.history, **monitor.progress()})


def check_trained(run: Run, monitor: Monitor) -> None:
    """Raise NumericsError if no step of a run was finite, or if its last one was not and the loss on the documents of
    its first one is not finite now."""
    total, advice = run.prepared.plan.total_steps, "nothing is exported; check the base model, or lower optim.lr"
    if not monitor.finite_steps:
        raise NumericsError(f"none of the {total} steps had a finite loss and gradient, so nothing was trained: "
                            f"{advice}")
    if not monitor.skipped_in_a_row:
        return
    loss = torch.zeros((), device=run.world.device)
    with closing(open_steps(run, 0)) as planned, torch.no_grad():
        step = next(planned)
        for batch in step.micro_batches:
            loss += forward(run.model, batch, step, run.config, run.world)
    if not parallel.all_sum(loss).isfinite():
        raise NumericsError(f"the last {monitor.skipped_in_a_row} of {total} steps had no finite loss or gradient, and "
                            f"the model has none on the documents of the first step either: {advice}")


def record_of(run: Run, step: Step, *, lr: float, seconds: float) -> dict[str, Any]:
    """What the log says of a step; the loss and the norm of its gradient are still on the device."""
    record = {"kind": "train", "step": step.index + 1, "epoch": step.epoch, "loss": None, "lr": lr, "grad_norm": None,
              "tokens": step.tokens, "target_tokens": step.target_tokens, "seconds": seconds,
              "tokens_per_second": step.tokens / seconds, "memory_gib": memory_gib(run.world.device)}
    return record | leaders_figures(run.prepared, step.index, seconds, run.world) if run.world.leads else record


def leaders_figures(prepared: Prepared, step: int, seconds: float, world: World) -> dict[str, Any]:
    """What only the rank that writes says of a step: its share of the GPUs' peak where that is known, its sources."""
    peak = peak_flops(world.device)
    found: dict[str, Any] = {}
    if peak and prepared.network:
        found["mfu"] = prepared.flops(step) / seconds / (peak * world.ranks)
    if world.device.type == "cuda":
        found["memory_reserved_gib"] = torch.cuda.max_memory_reserved(world.device) / 2**30
    return found | prepared.shares(step)


def forward(model: nn.Module, batch: MicroBatch, step: Step, config: Config, world: World) -> Tensor:
    """This micro-batch's part of the step's loss: its sum over the trained tokens of the whole step."""
    key = key_of(config.train.seed, step.index, "dropout") if config.lora.dropout else None
    return batch_loss(model, batch, device=world.device, denominator=step.target_tokens,
                      label_smoothing=config.optim.label_smoothing, z_loss=config.optim.z_loss, dropout_key=key,
                      compiled=is_compiled(config, world))
