"""The loss on conversations that are not trained on.

Sums and counts are added over all micro-batches and ranks and divided once, so the figure depends neither on how the
documents are packed nor on how many ranks there are.
"""


import torch
from torch import nn

from minisft.data.dataset import Dataset
from minisft.data.loader import steps
from minisft.data.packing import Plan
from minisft.model.attention import Documents
from minisft.training.loss import linear_cross_entropy
from minisft.training.parallel import World, all_sum


@torch.no_grad()
def heldout_loss(model: nn.Module, dataset: Dataset, world: World, *, seq_len: int, micro_packs: int = 1) -> float:
    """Mean loss in nats over the trained tokens of `dataset`. All ranks call it, all get the same number."""
    plan = Plan(dataset.lengths, dataset.targets, seq_len=seq_len, packs_per_step=micro_packs * world.ranks, epochs=1,
                shuffle=False)
    total = torch.zeros((), device=world.device)
    for step in steps(dataset, plan, rank=world.rank, ranks=world.ranks, micro_packs=micro_packs):
        for batch in step.micro_batches:
            at, targets = batch.target_at.to(world.device), batch.targets.to(world.device)
            total += model(batch.tokens.to(world.device), Documents.of_lengths(batch.lengths, device=world.device),
                           lambda hidden, head, at=at, targets=targets: linear_cross_entropy(
                               hidden[at], head, targets, denominator=1.0))
    return float(all_sum(total)) / int(dataset.targets.sum())
