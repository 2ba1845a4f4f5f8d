"""What comes after a step when it is due: held-out losses, answers, and a Hugging Face folder.

An evaluation is given up at once if some rank is asked to stop. The log tells a resumed run what is left to do.
"""

import math
import time
from pathlib import Path
from typing import Any

from minisft.errors import NumericsError
from minisft.evaluation import samples
from minisft.evaluation.forgetting import Forgetting
from minisft.evaluation.heldout import heldout_loss, loss_figures
from minisft.model.precision import DTYPES
from minisft.prepare import adapters_of
from minisft.reports.data_report import figures
from minisft.training import parallel, provenance, resume
from minisft.training.adapter import export_adapter
from minisft.training.export import export
from minisft.training.failure import watch
from minisft.training.metrics import Monitor
from minisft.training.preemption import Preemption, Stopped
from minisft.training.run import Run, is_compiled
from minisft.training.run_folder import read_log

Done = frozenset[tuple[str, str]]  # ("eval", name), ("sample", ""), ("export", "")


class After:
    """Does what is due after a step."""

    def __init__(self, run: Run, monitor: Monitor, preemption: Preemption):
        self.run, self.monitor, self.preemption = run, monitor, preemption
        # A resumed run measures against what its log says of the base model.
        self.forgetting = Forgetting(
            (source.name for source in run.config.data.general), bound=run.config.eval.forgetting_bound,
            log=read_log(run.folder) if run.world.leads else ())

    def done(self, number: int) -> Done:
        """What was done after `number` steps before this start, as the leading rank finds it."""
        found: set[tuple[str, str]] = set()
        if self.run.world.leads:
            found = {(record["kind"], record["name"] if record["kind"] == "eval" else "")
                     for record in read_log(self.run.folder) if record["step"] == number}
            found |= {("export", "")} if self._export_folder(number).exists() else set()
        return resume.as_leader(frozenset(found), self.run.world)

    def step(self, number: int, *, there: Done = frozenset()) -> bool:
        """What is due after `number` steps, except for what is `there`. False if some rank was asked to stop in an
        evaluation, which is then left to the next start."""
        config, ends = self.run.config, number in (0, self.run.prepared.plan.total_steps)
        try:
            if ends or is_due(number, config.eval.every):
                self._evaluate(number, there)
            if ends and config.eval.samples and ("sample", "") not in there:
                self._answer(number)
        except Stopped:
            self.monitor.stop = True
            return False
        if is_due(number, config.checkpoint.export_every) and not (ends or ("export", "") in there):
            self.monitor.settle()  # or this step would not be in the log, which the model's record is made from
            folder = self._export_folder(number)
            export_as(self.run, folder, adapter=f"{folder.name}-adapter", step=number)
        return True

    def _evaluate(self, step: int, there: Done) -> None:
        """The held-out loss of each evaluated source and what of the general text is forgotten, into the log."""
        run, config, monitor = self.run, self.run.config, self.monitor
        monitor.settle()
        for name, dataset in run.prepared.evals.items():
            if ("eval", name) in there:
                continue
            watch(config.parallel.timeout)
            started = time.perf_counter()
            loss = heldout_loss(run.model, dataset, run.world, seq_len=config.data.seq_len, check=self._check,
                                micro_packs=config.batch.micro_packs, fixed=is_compiled(config, run.world))
            record = {"kind": "eval", "step": step, "name": name, **loss_figures(loss),
                      "target_tokens": int(dataset.num_loss_tokens.sum()), "seconds": time.perf_counter() - started}
            warning = self.forgetting.add(record)
            monitor.write(record)
            above = f" ({record['forgetting']:+.4f} to the base model's)" if record.get("forgetting") else ""
            monitor.say(f"step {step}: held-out loss on {name}: {loss:.4f}{above}")
            if warning:
                monitor.say(warning)
            if not math.isfinite(loss) and step in (0, run.prepared.plan.total_steps):
                raise NumericsError(f"step {step}: the held-out loss on {name} is {loss}: "
                                    + ("the base model cannot be trained; check its files, or set train.precision to "
                                       "fp32" if step == 0 else "nothing is exported; lower optim.lr"))
        monitor.lap()  # the next step's time begins here

    def _answer(self, step: int) -> None:
        """Answers to held-out questions, into the log."""
        run = self.run
        watch(run.config.parallel.timeout)
        asked = samples.questions(run.prepared.evals, run.config.eval.samples)
        for answer in samples.answers(run.model, asked, run.prepared.tokenizer, device=run.world.device,
                                      stop_ids=run.prepared.renderer.stop_ids(), check=self._check):
            self.monitor.write({"kind": "sample", "step": step, **answer})
        self.monitor.lap()

    def _check(self) -> None:
        self.preemption.check(self.run.world.device)

    def _export_folder(self, number: int) -> Path:
        return self.run.folder / "exports" / f"step-{number:06}"


def export_as(run: Run, folder: Path, *, adapter: str, step: int) -> None:
    """The model as it is after `step`, as a Hugging Face folder in the precision it computes in, with the record of the
    run; its adapters beside it."""
    config, model, prepared, world = run.config, run.model, run.prepared, run.world
    watch(config.parallel.timeout)
    if adapters := adapters_of(config):
        export_adapter(parallel.sharded(model), adapters, prepared.renderer, folder.with_name(adapter),
                       base=str(Path(config.model.path).absolute()), leads=world.leads)
    export(model, model.config, prepared.renderer, folder, leads=world.leads, dtype=DTYPES[config.train.precision],
           record=record_of_model(run, figures(prepared), step=step, log=read_log(run.folder)) if world.leads else None)


def record_of_model(run: Run, data: dict[str, Any], *, step: int, log: list[dict[str, Any]]) -> dict[str, Any]:
    """`training.json` of the model after `step`, of a run that logged `log`; `data` are the figures of its data."""
    config = run.config
    return provenance.training_record(
        run.base.record, recipe=config.to_toml(), seed=config.train.seed, ranks=run.world.ranks,
        data={use: data[use] for use in ("train", "replay", "eval", "general")}, log=log, step=step,
        total_steps=run.prepared.plan.total_steps, history=run.history)


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done after `step`."""
    return every > 0 and step % every == 0
