"""The loss on conversations that are not trained on.

Sums and counts are added over all micro-batches and ranks and divided once, so the figure depends neither on how the
documents are packed nor on how many ranks there are.
"""

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minisft.config import DataConfig
from minisft.data.batches import steps
from minisft.data.dataset import Dataset
from minisft.data.packing import Plan
from minisft.data.store import open_store
from minisft.errors import PATH, UserError, printable
from minisft.evaluation.assistant import Assistant
from minisft.keys import Source
from minisft.prepare import read_source
from minisft.training.loss import batch_loss
from minisft.training.parallel import World, all_sum


def heldout_loss(model: nn.Module, dataset: Dataset, world: World, *, seq_len: int, micro_packs: int = 1,
                 fixed: bool = False, check: Callable[[], None] = lambda: None) -> float:
    """Mean loss in nats over the trained tokens of `dataset`. All ranks call it, all get the same number.

    With `fixed`, as a compiled `model` wants it, all micro-batches have the same number of tokens. All ranks call
    `check` before each of them; what it raises ends the evaluation.
    """
    share = loss_sum(model, dataset, rank=world.rank, ranks=world.ranks, seq_len=seq_len, micro_packs=micro_packs,
                     fixed=fixed, device=world.device, check=check)
    return float(all_sum(share)) / int(dataset.num_loss_tokens.sum())


@torch.no_grad()
def loss_sum(model: nn.Module, dataset: Dataset, *, seq_len: int, rank: int = 0, ranks: int = 1, micro_packs: int = 1,
             fixed: bool = False, device: torch.device | str = "cpu",
             check: Callable[[], None] = lambda: None) -> Tensor:
    """() fp32: the sum of the token losses in this rank's share of `dataset`."""
    plan = Plan(dataset.lengths, dataset.num_loss_tokens, seq_len=seq_len, packs_per_step=micro_packs * ranks, epochs=1,
                shuffle=False)
    device = torch.device(device)
    total = torch.zeros((), device=device)
    with closing(steps(dataset, plan, rank=rank, ranks=ranks, micro_packs=micro_packs, fixed=fixed,
                       device=device)) as planned:
        for batch in (batch for step in planned for batch in step.micro_batches):
            check()
            total += batch_loss(model, batch, device=device, denominator=1.0, compiled=fixed)
    return total


def file_losses(assistant: Assistant, files: list[str], *, cache: str | Path, format: str = "auto", seq_len: int = 2048,
                overlong: str = "drop", quiet: bool = False) -> list[dict[str, Any]]:
    """For each file: name, loss, perplexity, target_tokens, documents, and how many of those read were left out.

    Answers count in conversations, every token in plain text. Documents past the model's context are over length too:
    its losses there would say nothing. Raises UserError for files that training would refuse.
    """
    seq_len, found = min(seq_len, assistant.model.config.max_position_embeddings), []
    data = DataConfig(seq_len=seq_len, overlong=overlong, cache=str(cache))
    for file in files:
        source = Source(file, format=format, name=file)
        dataset = Dataset([open_store(source, data, assistant.renderer, read_source, quiet=quiet)], data)
        report, vocabulary = dataset.reports[0], assistant.model.config.vocab_size
        if report.largest_id >= vocabulary:
            raise UserError(f"{file}: token id {report.largest_id} is past the model's vocabulary of {vocabulary}; "
                            f"{assistant.renderer.tokenizer.file} belongs to another model")
        device = next(assistant.model.parameters()).device
        loss = float(loss_sum(assistant.model, dataset, seq_len=seq_len, device=device)) / report.target_tokens
        found.append({"name": file, **loss_figures(loss), "target_tokens": report.target_tokens,
                      "documents": report.kept, "left_out": report.read - report.kept})
    return found


def loss_figures(loss: float) -> dict[str, float | None]:
    """The loss and its perplexity, exp(loss), as a record has them; None where one is not finite: JSON has no NaN."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {name: value if math.isfinite(value) else None
            for name, value in (("loss", loss), ("perplexity", perplexity))}


def describe(found: list[dict[str, Any]]) -> str:
    """A table of what `file_losses` found."""
    lines = [f"{'loss':>8}{'perplexity':>12}{'tokens':>12}{'documents':>11}{'left out':>10}  held-out file"]
    for each in found:
        loss, perplexity = ("-" if each[name] is None else f"{each[name]:,.4f}" for name in ("loss", "perplexity"))
        lines.append(f"{loss:>8}{perplexity:>12}{each['target_tokens']:>12,}{each['documents']:>11,}"
                     f"{each['left_out']:>10,}  {each['name']}")
    return "\n".join(printable(line, PATH) for line in lines)
