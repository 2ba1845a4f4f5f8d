"""A run from its configuration to a Hugging Face folder, around the loop (training/loop.py).

    configuration -> data and plan -> model, sharded -> resume? -> for each step that the loop yields:
        log it; save, evaluate, export if it is time; stop if asked to
    -> held-out losses -> final/
"""

import faulthandler
import json
import os
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minisft.config import Config
from minisft.config_io import load, to_toml
from minisft.errors import EXIT_PREEMPTED, NumericsError, UserError
from minisft.export.hf_folder import try_export
from minisft.export.provenance import environment
from minisft.lora import adapters
from minisft.model.flops import peak_flops
from minisft.model.weights import check_folder
from minisft.prepare import prepare
from minisft.reports.data_report import describe, figures
from minisft.reports.logged_run import read_log
from minisft.runs import assemble, best, resume, summary
from minisft.runs.after import AfterStep, export_as, is_due, record_of_model
from minisft.runs.assemble import Run, check_finite, check_ranks, fill, open_base, open_run
from minisft.runs.failure import fail, guarded, listen, watch
from minisft.runs.metrics import Monitor, memory_gib
from minisft.runs.preemption import Preemption, Stopped
from minisft.runs.profile import profiled
from minisft.runs.run_dir import RunDir
from minisft.training import parallel
from minisft.training.checkpoint import SavedState, Saver, saved_checkpoints, set_aside
from minisft.training.loop import StepResult, planned_steps, training_steps
from minisft.training.loss import batch_loss
from minisft.versions import warn_if_untested


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    return guarded(lambda: train(load(argv)))


def train(config: Config) -> int:
    """One run, from the data to `final/` in the run folder. Returns 0, or 75 if it was asked to stop and has saved."""
    is_main, started = parallel.launched_rank()[0] == 0, time.monotonic()
    preemption = run_dir = world = None
    try:
        if is_main and Path(config.run.dir).exists():  # before the data is prepared, which may take long
            run_dir = RunDir(Path(config.run.dir), config)
            read_log(run_dir.path)  # a line that is no record ends the run here, not hours later
        warn_if_untested()
        check_ranks(config)
        if config.model.init != "random" and config.model.format == "hf":
            check_folder(Path(config.model.path))
        if config.train.deterministic:
            assemble.make_deterministic()
        prepared = prepare(config, quiet=not is_main)
        base, preemption = open_base(config, prepared), Preemption()
        data = figures(prepared) if is_main else {}
        if is_main:
            print(describe(data, short=True), flush=True)
            run_dir = run_dir or RunDir(Path(config.run.dir), config)
            run_dir.check_steps(prepared.plan.total_steps)
            run_dir.status("running")
        world = parallel.start(config.parallel)
        listen(world, run_dir)
        watch(config.parallel.timeout)
        run = open_run(config, prepared, world, base)
        saved = resume.find(run, same_start=run_dir is not None and run_dir.was_started_with(to_toml(config)))
        fill(run, saved)
        run.history.extend(resume.history(saved, run.settings, run.fingerprint))
        if run_dir:
            record_start(run, run_dir, saved, data=data)
        last = run_steps(run, preemption, saved)
        code = finish(run, run_dir, last=last, stop_requested=preemption.requested)
        if is_main and last is not None:
            print(summary.describe(run, start=saved.step if saved else 0, seconds=time.monotonic() - started),
                  flush=True)
        return code
    except Exception as error:
        fail(error, world, run_dir)
        raise
    finally:
        parallel.stop(failed=sys.exc_info()[0] is not None)
        faulthandler.cancel_dump_traceback_later()
        if preemption:
            preemption.close()
        if run_dir:
            run_dir.close()


def record_start(run: Run, run_dir: RunDir, saved: SavedState | None, *, data: dict[str, Any]) -> None:
    """Write to the run folder which checkpoint the run starts from. From now on it resumes from nothing else."""
    step = saved.step if saved else 0
    if not saved and (run.folder / "final").exists():
        raise UserError(f"{run.folder}: holds a finished run, but no complete checkpoint to train it longer from; "
                        "choose another folder with run.dir")
    check_changes(run, step)
    if run.config.run.export or run.config.checkpoint.keep_best:  # what cannot be exported fails now, not hours later
        try_export(run.base.network, run.prepared.renderer, run.folder / "final",
                   record=record_of_model(run, data, step=step, log=[]))
    set_aside(resume.abandoned(saved, saved_checkpoints(run_dir.path / "checkpoints")))
    best.set_aside_later(run_dir.path, step)
    run_dir.begin(to_toml(run.config), data=data, environment=environment())
    logged = run_dir.rewind_log(step if saved else -1)  # step 0 is evaluated again
    for change in run.history:
        if change["from_step"] == step + 1:
            was, now = (text if len(text) <= 80 else f"{text[:77]}..."
                        for text in map(json.dumps, (change["was"], change["is"])))
            print(f"{change['key']}: was {was}, is {now} from step {step + 1}", flush=True)
    if logged < step:
        print(f"{run_dir.path / 'metrics.jsonl'}: has {logged} of the {step} steps so far; the others are lost from "
              "the log, and the model's record will say so", flush=True)


def check_changes(run: Run, step: int) -> None:
    """Raise UserError if the run is complete after `step` and what it was trained with is changed now: it would be
    labelled with what no step has seen."""
    evals = [record for record in read_log(run.folder) if record["kind"] == "eval" and record["step"] <= step]
    stops = evals and evals[-1]["step"] == step and best.stop_reason(evals, run.config.eval)
    changed = [f"\n  {key}: was {was!r}, is {now!r}" for begins, key, was, now in map(dict.values, run.history)
               if begins == step + 1 and (key in run.fingerprint or key.startswith(("optim.", "lora.")))]
    if changed and (stops or step == run.prepared.plan.total_steps):
        raise UserError(f"{run.folder}: all {step} steps are taken, so nothing would be trained with what has changed; "
                        f"go back to it, make the run longer, or choose another folder with run.dir:{''.join(changed)}")


def finish(run: Run, run_dir: RunDir | None, *, last: int | None, stop_requested: bool) -> int:
    """Export the model of a run that is complete after step `last`, and record how it ended; returns the exit code."""
    if run_dir and (stop_requested or last is None):  # it has saved, and may be killed while it exports
        run_dir.status("preempted", exit_code=EXIT_PREEMPTED)
    if last is None:
        dist.barrier()  # torchrun ends all ranks as soon as one leaves: not before the main one has recorded that
        return EXIT_PREEMPTED
    if run.config.run.export:
        export_as(run, run.folder / "final", adapter="adapter", step=last)
    if run_dir:
        run_dir.status("done", exit_code=0)
    return 0


def run_steps(run: Run, preemption: Preemption, saved: SavedState | None = None) -> int | None:
    """Take the steps of the plan after `saved`, with their evaluations and checkpoints. Returns the last step if the
    run is complete: evaluated, and the plan's last or the one where eval.stop_on ends it; None if it was stopped."""
    config, world, total = run.config, run.world, run.prepared.plan.total_steps
    number = start = saved.step if saved else 0
    saver = Saver(run.folder / "checkpoints", world, keep=config.checkpoint.keep)
    monitor = Monitor(run.folder / "metrics.jsonl" if world.is_main else None, start=start, total=total,
                      max_skipped=config.train.max_skipped, documents=run.prepared.origins,
                      in_backward=config.optim.in_backward, before=saved.progress if saved else None)
    taken = training_steps(run.model, run.optimizer, run.prepared.train, run.prepared.plan, config, world, start=start)
    with closing(monitor), closing(taken):
        complete, after = False, AfterStep(run, monitor, preemption)
        with suppress(Stopped):
            after.step(start, done=after.done(start) if start else frozenset())
            watch(config.parallel.timeout)  # the timer of a hang starts
            if config.lora.dropout:
                adapters.set_step(run.model, config.train.seed, start)
            monitor.resume()
            steps = () if after.ended else taken
            for result in profiled(steps, run.folder / "profile" if config.run.profile and world.is_main else None):
                number = result.step
                monitor.step(record_of(run, result, seconds=monitor.lap()), result.loss, result.grad_norm)
                saver.check()
                if is_due(number, config.checkpoint.every) or number == total:  # before an export, which may fail
                    save(run, saver, monitor, number, is_last=number == total)
                after.step(number)
                if after.ended:
                    break
                watch(config.parallel.timeout)
                if config.lora.dropout:
                    adapters.set_step(run.model, config.train.seed, number)
                if number < total:
                    preemption.check(world.device)  # raises Stopped on all ranks, one step late
                monitor.resume()
            complete = number == total or bool(after.ended)
        if after.ended:
            check_trained(run, monitor, number)
        if number > start and saver.step != number:
            save(run, saver, monitor, number, is_last=complete)
        finish_save(run, saver)
        if complete:
            after.keep_best(resumable=False)
    if not complete and world.is_main:  # after the bar was closed
        without = ", without checkpoint.resume = never," * (config.checkpoint.resume == "never")
        print(f"saved step {number}; the same command{without} resumes from there" if number else
              "stopped before the first step; the same command starts again", flush=True)
    return number if complete else None


def save(run: Run, saver: Saver, monitor: Monitor, number: int, *, is_last: bool) -> None:
    """Begin a checkpoint of the run after `number` steps. Raises NumericsError rather than replace older checkpoints
    with a broken model."""
    monitor.settle()  # or this step would be in the checkpoint but not in the log
    check_finite(run.optimizer.rows, run.world, f"after step {number}", "lower optim.lr")
    if number == run.prepared.plan.total_steps:
        check_trained(run, monitor, number)
    monitor.sync()
    if is_last and not (run.config.run.export or run.config.checkpoint.every):
        return  # there is no export that could fail, and nobody asked for checkpoints
    finish_save(run, saver)
    saver.save(number, run.optimizer, {
        "adam_steps": run.optimizer.steps(), "fingerprint": run.fingerprint, "settings": run.settings,
        "history": run.history, **monitor.progress()})


def finish_save(run: Run, saver: Saver) -> None:
    """Wait, all ranks together, until the save under way is on disk. A slow disk does not end the run; one that
    answers no more does, because it holds up the main thread, too."""
    while saver.step and parallel.all_sum(torch.full((1,), float(not saver.finish(0.1)), device=run.world.device)):
        os.statvfs(saver.folder)
        watch(run.config.parallel.timeout)


def check_trained(run: Run, monitor: Monitor, steps: int) -> None:
    """Raise NumericsError if none of the run's `steps` was finite, or if its last one was not and neither is the loss
    now on the documents of its first one."""
    plan, advice = run.prepared.plan, "nothing is exported; check the base model, or lower optim.lr"
    if not monitor.finite_steps:
        raise NumericsError(f"none of the {steps} steps had a finite loss and gradient, so nothing was "
                            f"trained: {advice}")
    if not monitor.skipped_in_a_row:
        return
    config, world, loss = run.config, run.world, torch.zeros((), device=run.world.device)
    compiled = parallel.is_compiled(config.parallel, world.device)
    with torch.no_grad(), closing(planned_steps(run.prepared.train, plan, config, world)) as planned:
        step = next(planned)
        for batch in step.micro_batches:
            loss += batch_loss(run.model, batch, world.device, step.denominator, config.optim,
                               compiled=compiled)
    if not parallel.all_sum(loss).isfinite():
        raise NumericsError(f"the last {monitor.skipped_in_a_row} of {steps} steps had no finite loss or "
                            f"gradient, and neither has the model on the documents of the first step: {advice}")


def record_of(run: Run, result: StepResult, *, seconds: float) -> dict[str, Any]:
    """The log's record of a step; loss and gradient norm are still on the device."""
    record = {"kind": "train", "step": result.step, "epoch": result.epoch, "loss": None, "lr": result.lr,
              "grad_norm": None, "tokens": result.tokens, "target_tokens": result.target_tokens,
              **({} if result.target_weight is None else {"target_weight": result.target_weight}), "seconds": seconds,
              "tokens_per_second": result.tokens / seconds, "memory_gib": memory_gib(run.world.device)}
    if not run.world.is_main:
        return record
    if peak := peak_flops(run.world.device):
        flops = run.prepared.flops(result.step - 1, run.base.network)
        record["mfu"] = flops / seconds / (peak * run.world.ranks)
    if run.world.device.type == "cuda":
        record["memory_reserved_gib"] = torch.cuda.max_memory_reserved(run.world.device) / 2**30
    return record | run.prepared.shares(result.step - 1)
