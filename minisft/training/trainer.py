"""The training loop, top to bottom.

    configuration -> data and plan -> model, sharded -> for each step of the plan:
        forward and backward of each micro-batch, the loss divided by the trained tokens of the whole step
        clip by the global norm, step
    -> held-out losses -> a Hugging Face folder
"""

import faulthandler
import sys
import time
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisft import config as configuration
from minisft.config import Config
from minisft.data import packing
from minisft.data.loader import MicroBatch, Step, steps
from minisft.errors import EXIT_PREEMPTED, UserError
from minisft.evaluation import samples
from minisft.evaluation.forgetting import Forgetting
from minisft.evaluation.heldout import heldout_loss, loss_figures
from minisft.model.precision import DTYPES
from minisft.noise import key_of
from minisft.planning.hardware import peak_flops
from minisft.preparation import Prepared, adapters_of, prepare
from minisft.reports.data_report import describe, figures
from minisft.training import parallel, provenance, resume
from minisft.training.adapter import export_adapter
from minisft.training.checkpoint import SavedState, Saver, checkpoints, give_up
from minisft.training.environment import environment
from minisft.training.export import export
from minisft.training.failure import fail, guarded, listen, watch
from minisft.training.loss import batch_loss
from minisft.training.metrics import Monitor, memory_gib
from minisft.training.optimizer import learning_rate
from minisft.training.parallel import World
from minisft.training.preemption import Preemption
from minisft.training.profile import profiled
from minisft.training.run import Run, check_ranks, fill, is_compiled, open_base, open_run
from minisft.training.run_folder import RunFolder, read_log


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    return guarded(lambda: train(configuration.load(argv)))


def train(config: Config) -> int:
    """One run, from the data to `final/` in the run folder. Returns 0, or 75 where it was asked to stop and saved."""
    leads, parts = parallel.launched_rank()[0] == 0, config.parallel
    preemption = folder = world = None
    try:
        check_ranks(config)
        if config.train.deterministic:
            parallel.make_deterministic()
        prepared = prepare(config, quiet=not leads)
        base, preemption = open_base(config, prepared), Preemption()
        if leads:
            print(describe(found := figures(prepared), short=True), flush=True)
            folder = own_folder(config)
        world = parallel.start(shard=parts.shard, replicate=parts.replicate, timeout=parts.timeout)
        listen(world, folder)
        watch(parts.timeout)
        run = open_run(config, prepared, world, base)
        saved = resume.find(run.folder, world, run.fingerprint, wanted=config.checkpoint.resume,
                            again=folder is not None and folder.was_begun_with(config.to_toml()),
                            allow_change=config.checkpoint.allow_change, total_steps=prepared.plan.total_steps)
        fill(run, saved)
        if folder:
            begin(folder, config, saved, data=found)
        finished = run_steps(run, preemption, start=saved.step if saved else 0) == prepared.plan.total_steps
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


def own_folder(config: Config) -> RunFolder:
    """The run folder, which no other process may use from now on."""
    folder = RunFolder(Path(config.run.dir))
    folder.status("running")
    return folder


def begin(folder: RunFolder, config: Config, saved: SavedState | None, *, data: dict[str, Any]) -> None:
    """Note in the folder what was accepted: a start from `saved`. The run goes on from nothing else any more."""
    give_up(resume.given_up(saved, checkpoints(folder.path / "checkpoints")))
    folder.begin(config.to_toml(), data=data, environment=environment())
    folder.rewind_log(saved.step if saved else -1)  # step 0 is evaluated again


def end(run: Run, folder: RunFolder | None, *, finished: bool, asked: bool) -> int:
    """Export the model of a run that is `finished`, and note how it ended; returns the exit code."""
    if folder and (asked or not finished):  # it has saved, and may be killed while it exports
        folder.status("preempted", exit_code=EXIT_PREEMPTED)
    if not finished:
        dist.barrier()  # where one has left torchrun ends the others: not before the leading one has noted that
        return EXIT_PREEMPTED
    if run.config.run.export:
        export_as(run, run.folder / "final", adapter="adapter")
    if folder:
        folder.status("done", exit_code=0)
    return 0


def earlier_folder(config: Config) -> RunFolder | None:
    """The folder of a run that goes on no further, whose "preempted" would be started again and again; None where there
    is none, or it is finished or another's."""
    with suppress(UserError, OSError):
        return own_folder(config) if Path(config.run.dir, "status.json").exists() else None
    return None


def run_steps(run: Run, preemption: Preemption, *, start: int) -> int:
    """Steps `start`, `start` + 1, ... of the plan, with their evaluations and checkpoints; returns the steps done."""
    config, world, plan, optimizer = run.config, run.world, run.prepared.plan, run.optimizer
    saver = Saver(run.folder / "checkpoints", world, keep=config.checkpoint.keep)
    forgetting = open_forgetting(run)
    number = start
    with closing(open_monitor(run, start)) as monitor, closing(open_steps(run, start)) as planned:
        if start == 0:
            evaluate(run, monitor, forgetting, step=0)
        for step in profiled(planned, run.folder / "profile" if config.run.profile and world.leads else None):
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

            number, last = step.index + 1, step.index + 1 == plan.total_steps
            monitor.step(record_of(run, step, lr=lr, seconds=monitor.lap()), shared[0], grad_norm, shared[1])
            if monitor.stop and not last:
                break
            if is_due(number, config.eval.every) or last:
                evaluate(run, monitor, forgetting, step=number)
            if is_due(number, config.checkpoint.export_every) and not last:
                monitor.settle()  # or this step would not be in the log, which the model's record is made from
                export_as(run, run.folder / "exports" / f"step-{number:06}", adapter=f"step-{number:06}-adapter")
            saver.check()
            if is_due(number, config.checkpoint.every):
                save(run, saver, monitor, number)
        monitor.settle()
        if monitor.stop and saver.step != number:  # also after the last step: the export may outlive the patience
            save(run, saver, monitor, number)
        saver.finish()
    return number


def open_forgetting(run: Run) -> Forgetting:
    """Follows the general texts; a run that goes on measures against what its log says of the base model."""
    return Forgetting((source.name for source in run.config.data.general), bound=run.config.eval.forgetting_bound,
                      log=read_log(run.folder) if run.world.leads else ())


def open_monitor(run: Run, start: int) -> Monitor:
    """The log of a run whose next step is `start` (from 0)."""
    return Monitor(run.folder / "metrics.jsonl" if run.world.leads else None, start=start,
                   total=run.prepared.plan.total_steps, max_skipped=run.config.train.max_skipped,
                   documents=run.prepared.origins, in_backward=run.config.optim.in_backward)


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
    """Begin a checkpoint of the run after `number` steps."""
    monitor.settle()  # or this step would be in the checkpoint and not in the log
    saver.save(number, run.optimizer, {"adam_steps": run.optimizer.steps(), "fingerprint": run.fingerprint})


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


def export_as(run: Run, folder: Path, *, adapter: str) -> None:
    """The model as it is now, as a Hugging Face folder in the precision it computes in, with the record of the run; its
    adapters beside it."""
    config, model, prepared, world = run.config, run.model, run.prepared, run.world
    watch(config.parallel.timeout)
    if adapters := adapters_of(config):
        export_adapter(parallel.sharded(model), adapters, prepared.renderer, folder.with_name(adapter),
                       base=str(Path(config.model.path).absolute()), leads=world.leads)
    record = None
    if world.leads:
        found = figures(prepared)
        record = provenance.training_record(
            run.base.record, recipe=config.to_toml(), seed=config.train.seed, ranks=world.ranks,
            data={use: found[use] for use in ("train", "replay", "eval", "general")},
            log=read_log(run.folder), total_steps=prepared.plan.total_steps)
    export(model, model.config, prepared.renderer, folder, leads=world.leads,
           dtype=DTYPES[config.train.precision], record=record)


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done after `step`."""
    return every > 0 and step % every == 0


def forward(model: nn.Module, batch: MicroBatch, step: Step, config: Config, world: World) -> Tensor:
    """This micro-batch's part of the step's loss: its sum over the trained tokens of the whole step."""
    key = key_of(config.train.seed, step.index, "dropout") if config.lora.dropout else None
    return batch_loss(model, batch, device=world.device, denominator=step.target_tokens,
                      label_smoothing=config.optim.label_smoothing, z_loss=config.optim.z_loss, dropout_key=key,
                      compiled=is_compiled(config, world))


def evaluate(run: Run, monitor: Monitor, forgetting: Forgetting, *, step: int) -> None:
    """The held-out loss of each evaluated source and what of the general text is forgotten, into the log; before and
    after the run, answers as well."""
    config, prepared, world = run.config, run.prepared, run.world
    monitor.settle()
    for name, dataset in prepared.evals.items():
        watch(config.parallel.timeout)
        started = time.perf_counter()
        loss = heldout_loss(run.model, dataset, world, seq_len=config.data.seq_len,
                            micro_packs=config.batch.micro_packs, fixed=is_compiled(config, world))
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
        for answer in samples.answers(run.model, asked, prepared.tokenizer, stop_ids=prepared.renderer.stop_ids(),
                                      device=world.device):
            monitor.write({"kind": "sample", "step": step, **answer})
    monitor.lap()  # the next step's time begins here
