"""The loss on text that is not trained on, and how much of general text a model forgets.

Sums and counts are added over all micro-batches and ranks and divided once, so the loss depends neither on how the
documents are packed nor on the number of ranks.

    forgetting = loss now - loss at step 0, both on the same held-out general text, in nats a token

A network that learns a new task loses an old one if nothing holds it there (McCloskey & Cohen 1989, "Catastrophic
interference in connectionist networks"). 0 is the base model; 0.1 is a perplexity 10.5% higher.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisft.data.dataset import Dataset
from minisft.data.loader import steps
from minisft.data.packing import Plan
from minisft.data.store import open_store
from minisft.errors import PATH, UserError, printable
from minisft.evaluation.assistant import Assistant
from minisft.training.loss import batch_loss
from minisft.training.parallel import World, all_sum

REMEDIES = "replayed general text (data.replay), a lower optim.lr, fewer steps (train.max_steps), LoRA"


@torch.no_grad()
def heldout_loss(model: nn.Module, dataset: Dataset, world: World | None = None, *, seq_len: int, micro_packs: int = 1,
                 fixed: bool = False, check: Callable[[], None] = lambda: None) -> float:
    """Mean loss in nats over the trained tokens of `dataset`. All ranks of `world` call it and get the same number.

    With `fixed`, all micro-batches have the same number of tokens, as a compiled `model` needs them. All ranks call
    `check` before each micro-batch; an exception from it ends the evaluation.
    """
    rank, ranks = (world.rank, world.ranks) if world else (0, 1)
    device = world.device if world else next(model.parameters()).device
    plan = Plan(dataset.lengths, dataset.targets, seq_len=seq_len, packs_per_step=micro_packs * ranks, epochs=1,
                shuffle=False)
    total = torch.zeros((), device=device)
    with closing(steps(dataset, plan, rank=rank, ranks=ranks, micro_packs=micro_packs, fixed=fixed,
                       device=device)) as planned:
        for batch in (batch for step in planned for batch in step.micro_batches):
            check()
            total += batch_loss(model, batch, device=device, denominator=1.0, compiled=fixed)
    return float(all_sum(total) if world else total) / int(dataset.targets.sum())


def loss_figures(loss: float) -> dict[str, float | None]:
    """The loss and its perplexity, exp(loss), for a record; None if not finite, because JSON has no NaN."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {name: value if math.isfinite(value) else None
            for name, value in (("loss", loss), ("perplexity", perplexity))}


class Forgetting:
    """Follows the eval records of a run. `general` names the general texts; `bound` is in nats a token, 0 for none.

    `log` holds the records so far of a resumed run, which so measures against the same base model.
    """

    def __init__(self, general: Iterable[str], *, bound: float, log: Iterable[dict[str, Any]] = ()):
        self._general, self._bound = frozenset(general), bound
        self._base: dict[str, float] = {}  # name -> the base model's loss
        self._warned: set[str] = set()  # names warned about since their state last changed
        for record in log:
            if record["kind"] == "eval":
                self.add(record)

    def add(self, record: dict[str, Any]) -> str:
        """Put "forgetting" into a record of general text. Returns a warning, once each time the bound is crossed."""
        name, loss, step = record["name"], record["loss"], record["step"]
        if name not in self._general or loss is None:
            return ""
        if step == 0:
            self._base[name] = loss
        warning = ""
        if (base := self._base.get(name)) is None:
            warning = f"step {step}: cannot measure forgetting on {name}: its loss at step 0 is missing"
        else:
            record["forgetting"] = rise = loss - base
            if 0 < self._bound < rise:
                warning = (f"step {step}: the model forgets: {name} costs it {rise:.3f} nats a token more than the "
                           f"base model (eval.forgetting_bound = {self._bound:g}). What helps: {REMEDIES}")
        is_new = bool(warning) and name not in self._warned
        (self._warned.add if warning else self._warned.discard)(name)
        return warning if is_new else ""


def file_losses(assistant: Assistant, files: list[str], *, cache: str | Path, format: str = "auto", seq_len: int = 2048,
                quiet: bool = False) -> list[dict[str, Any]]:
    """For each file: name, loss, perplexity, target_tokens, documents, and how many of those read were left out.

    Answers count in conversations, every token in plain text. Documents longer than `seq_len` or the model's context
    are left out. Raises UserError for files that training would refuse.
    """
    model, found = assistant.model, []
    seq_len = min(seq_len, model.config.max_position_embeddings)
    for file in files:
        store = open_store(file, name=file, format=format, renderer=assistant.renderer, cache=Path(cache), quiet=quiet)
        dataset = Dataset([store], seq_len=seq_len)
        report, vocabulary = dataset.reports[0], model.config.vocab_size
        if report.largest_id >= vocabulary:
            raise UserError(f"{file}: token id {report.largest_id} is past the model's vocabulary of {vocabulary}; "
                            f"{assistant.renderer.tokenizer.file} belongs to another model")
        found.append({"name": file, **loss_figures(heldout_loss(model, dataset, seq_len=seq_len)),
                      "target_tokens": report.target_tokens, "documents": report.kept,
                      "left_out": report.read - report.kept})
    return found


def describe(found: list[dict[str, Any]]) -> str:
    """A table of `file_losses`."""
    lines = [f"{'loss':>8}{'perplexity':>12}{'tokens':>12}{'documents':>11}{'left out':>10}  held-out file"]
    for each in found:
        loss, perplexity = ("-" if each[name] is None else f"{each[name]:,.4f}" for name in ("loss", "perplexity"))
        lines.append(f"{loss:>8}{perplexity:>12}{each['target_tokens']:>12,}{each['documents']:>11,}"
                     f"{each['left_out']:>10,}  {each['name']}")
    return "\n".join(printable(line, PATH) for line in lines)
