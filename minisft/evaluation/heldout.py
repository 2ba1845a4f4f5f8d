"""The loss on conversations that are not trained on.

Sums and counts are added over all micro-batches and ranks and divided once, so the figure depends neither on how the
documents are packed nor on how many ranks there are.
"""

import math
from contextlib import closing

import torch
from torch import nn

from minisft.data.dataset import Dataset
from minisft.data.loader import steps
from minisft.data.packing import Plan
from minisft.training.loss import batch_loss
from minisft.training.parallel import World, all_sum


@torch.no_grad()
def heldout_loss(model: nn.Module, dataset: Dataset, world: World, *, seq_len: int, micro_packs: int = 1,
                 fixed: bool = False) -> float:
    """Mean loss in nats over the trained tokens of `dataset`. All ranks call it, all get the same number.

    With `fixed`, as a compiled `model` wants it, all micro-batches have the same number of tokens.
    """
    plan = Plan(dataset.lengths, dataset.targets, seq_len=seq_len, packs_per_step=micro_packs * world.ranks, epochs=1,
                shuffle=False)
    total = torch.zeros((), device=world.device)
    with closing(steps(dataset, plan, rank=world.rank, ranks=world.ranks, micro_packs=micro_packs, fixed=fixed,
                       device=world.device)) as planned:
        for batch in (batch for step in planned for batch in step.micro_batches):
            total += batch_loss(model, batch, device=world.device, denominator=1.0)
    return float(all_sum(total)) / int(dataset.targets.sum())


def loss_figures(loss: float) -> dict[str, float | None]:
    """The loss and its perplexity, exp(loss), as a record has them; None where one is not finite: JSON has no NaN."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {name: value if math.isfinite(value) else None
            for name, value in (("loss", loss), ("perplexity", perplexity))}
