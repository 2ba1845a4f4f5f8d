"""What happens after a step when it is due: held-out losses, answers, Hugging Face folders, an early end.

An evaluation stops at once when some rank is asked to stop. The log tells a resumed run what is left to do.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from minisft import config_io
from minisft.errors import NumericsError
from minisft.evals.heldout import heldout_loss, heldout_questions, loss_figures, measure_forgetting, sample_answers
from minisft.export import provenance
from minisft.export.hf_folder import export, export_adapter
from minisft.files import delete
from minisft.model.llama import DTYPES
from minisft.prepare import adapters_of
from minisft.reports.data_report import figures
from minisft.reports.logged_run import read_log
from minisft.runs import best, resume
from minisft.runs.assemble import Run
from minisft.runs.failure import watch
from minisft.runs.metrics import Monitor, progress
from minisft.runs.preemption import Preemption
from minisft.training import parallel

Done = frozenset[tuple[str, str]]  # ("eval", name), ("sample", ""), ("stop", ""), ("exports", ""), ("best", "")


class AfterStep:
    """Does what is due after a step; `ended` is why the run ends there, before the last step of its plan."""

    def __init__(self, run: Run, monitor: Monitor, preemption: Preemption):
        self.run, self.monitor, self.preemption = run, monitor, preemption
        self.ended = ""
        # A resumed run measures against the base model's losses in its log, and knows which step was the best.
        log = read_log(run.folder) if run.world.is_main else []
        self.evals = resume.from_main([record for record in log if record["kind"] == "eval"], run.world)

    def done(self, number: int) -> Done:
        """What an earlier start did after `number` steps, as the main rank sees it."""
        report: set[tuple[str, str]] = set()
        if self.run.world.is_main:
            report = {(record["kind"], record["name"] if record["kind"] == "eval" else "")
                      for record in read_log(self.run.folder)
                      if record["step"] == number and (record["kind"] != "eval" or record["loss"] is not None)}
            report |= {(kind, "") for kind in ("exports", "best")
                       if best.model_folder(self.run.folder, kind, number).exists()}
        return resume.from_main(frozenset(report), self.run.world)

    def step(self, number: int, *, done: Done = frozenset()) -> None:
        """Do what is due after `number` steps, except for what is `done`. Raises Stopped if some rank is asked to stop
        during an evaluation, which is then left to the next start."""
        config, total = self.run.config, self.run.prepared.plan.total_steps
        if (at_end := number in (0, total)) or is_due(number, config.eval.every):
            self._evaluate(number, done)
            if config.eval.samples and ("sample", "") not in done:
                self._answer(number)
            self._choose(number, done)
        if is_due(number, config.checkpoint.export_every) and not (at_end or ("exports", "") in done):
            self._export("exports", number)

    def _choose(self, number: int, done: Done) -> None:
        """Export the model if it is the best so far, and end the run if more steps do not help. Raises NumericsError
        rather than end it with a held-out loss that is not finite."""
        run, config = self.run, self.run.config
        lowest = best.lowest(self.evals, config.checkpoint.keep_best)
        if lowest and lowest["step"] == number > 0:
            if ("best", "") not in done:
                self._export("best", number)
            self.keep_best(resumable=True)
        if 0 < number < run.prepared.plan.total_steps and (reason := best.stop_reason(self.evals, config.eval)):
            losses = {record["name"]: record["loss"] for record in self.evals if record["step"] == number}
            for name, loss in losses.items():
                _check_finite(number, name, loss)
            self.monitor.say(f"step {number}: the run ends here: {reason}")
            if ("stop", "") not in done:
                self.monitor.write({"kind": "stop", "step": number, "reason": reason})
            self.ended = reason

    def keep_best(self, *, resumable: bool) -> None:
        """Delete the models in best/ that are not the best, nor at a checkpoint that the run is `resumable` from."""
        if self.run.world.is_main and (name := self.run.config.checkpoint.keep_best):
            best.delete_worse(self.run.folder, self.evals, name, resumable=resumable)

    def _export(self, kind: str, number: int) -> None:
        self.monitor.settle()  # or this step would not be in the log, which the model's record is made from
        folder = best.model_folder(self.run.folder, kind, number)
        export_as(self.run, folder, adapter=f"{folder.name}-adapter", step=number)
        if self.run.world.is_main:
            for aside in folder.parent.glob("step-*.given-up"):
                delete(aside)
        self.monitor.lap()

    def _evaluate(self, step: int, done: Done) -> None:
        """Log the held-out loss of each source, and how much of the general text is forgotten."""
        run, config, monitor = self.run, self.run.config, self.monitor
        monitor.settle()
        for name, dataset in run.prepared.evals.items():
            if ("eval", name) in done:
                continue
            started = time.perf_counter()
            with progress(f"step {step}: held-out loss on {name}, batch", shown=run.world.is_main,
                          timeout=config.parallel.timeout) as tell:
                loss = heldout_loss(run.model, dataset, run.world, seq_len=config.data.seq_len,
                                    check=partial(self._check, tell), micro_packs=config.batch.micro_packs,
                                    fixed=parallel.is_compiled(config.parallel, run.world.device))
            record = {"kind": "eval", "step": step, "name": name, **loss_figures(loss, dataset.target_weight),
                      "target_tokens": int(dataset.num_loss_tokens.sum()), "seconds": time.perf_counter() - started}
            warning = (measure_forgetting(record, self.evals, bound=config.eval.forgetting_bound)
                       if name in {source.name for source in config.data.general} else "")
            self.evals.append(record)
            monitor.write(record)
            above = f" ({record['forgetting']:+.4f} against the base model)" if record.get("forgetting") else ""
            monitor.say(f"step {step}: held-out loss on {name}: {loss:.4f}{above}")
            if warning:
                monitor.say(warning)
            if step in (0, run.prepared.plan.total_steps):
                _check_finite(step, name, loss)
        monitor.lap()  # the next step's time begins here

    def _answer(self, step: int) -> None:
        """Log answers to held-out questions."""
        run = self.run
        questions = heldout_questions(run.prepared.evals, run.config.eval.samples)
        with progress(f"step {step}: answering {len(questions)} held-out questions, token",
                      shown=run.world.is_main, timeout=run.config.parallel.timeout) as tell:
            answers = sample_answers(run.model, questions, run.prepared.tokenizer, device=run.world.device,
                                     stop_ids=run.prepared.renderer.stop_ids(), check=partial(self._check, tell))
        self.monitor.write(*({"kind": "sample", "step": step, **answer} for answer in answers))
        self.monitor.lap()

    def _check(self, tell: Callable[[int, int], None], done: int, total: int) -> None:
        tell(done, total)
        self.preemption.check(self.run.world.device)


def _check_finite(step: int, name: str, loss: float | None) -> None:
    if loss is None or not math.isfinite(loss):
        raise NumericsError(f"step {step}: the held-out loss on {name} is {math.nan if loss is None else loss}: "
                            + ("the base model cannot be trained; check its files, or set train.precision to fp32"
                               if step == 0 else "nothing is exported; lower optim.lr"))


def export_as(run: Run, folder: Path, *, adapter: str, step: int) -> None:
    """Write the model after `step` as a Hugging Face folder in the precision it computes in, with the record of the
    run, and its adapters beside it."""
    config, model, prepared, world = run.config, run.model, run.prepared, run.world
    watch(config.parallel.timeout)
    if adapters := adapters_of(config):
        parallel.reshard(model)
        export_adapter(model, adapters, prepared.renderer, folder.with_name(adapter),
                       base=str(Path(config.model.path).absolute()), is_main=world.is_main)
    record = record_of_model(run, figures(prepared), step=step, log=read_log(run.folder)) if world.is_main else None
    with progress(f"writing {folder}, tensor", shown=world.is_main, timeout=config.parallel.timeout) as tell:
        export(model, prepared.renderer, folder, dtype=DTYPES[config.train.precision], record=record, tell=tell)


def record_of_model(run: Run, data: dict[str, Any], *, step: int, log: list[dict[str, Any]]) -> dict[str, Any]:
    """`training.json` of the model after `step` of a run with this `log`; `data` are the figures of its data."""
    known = {**run.base.record, "ranks": run.world.ranks, "recipe": config_io.to_toml(run.config),
             "seed": run.config.train.seed, "total_steps": run.prepared.plan.total_steps, "history": run.history}
    return provenance.training_record(known, data={use: data[use] for use in ("train", "replay", "eval", "general")},
                                      log=log, step=step)


def is_due(step: int, every: int) -> bool:
    """True after each `every` steps (0: never)."""
    return every > 0 and step % every == 0
