"""This rank's share of each step, ready for the model.

A micro-batch is a stream: the documents of `micro_packs` packs one after another, without padding.

    tokens      a0 a1 a2 a3 | b0 b1 b2        lengths (4, 3)
    trained      .  .  x  x |  .  x  x        the mask of the store, per token
    target_at       1  2    |  4  5           positions whose next token is trained
    targets         a2 a3   |  b1 b2          those next tokens

Targets are shifted here and nowhere else. The last token of a document predicts nothing. `target_at` is computed on
the host, so that the device never has to count.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisft.data.dataset import Dataset
from minisft.data.packing import Plan


@dataclass(frozen=True)
class MicroBatch:
    """T tokens with N targets."""

    tokens: Tensor  # (T,) int64
    lengths: tuple[int, ...]  # of the documents, summing to T
    targets: Tensor  # (N,) int64: what the model should say ...
    target_at: Tensor  # (N,) int64: ... after these positions


@dataclass(frozen=True)
class Step:
    """What one rank does in one optimizer step; the counts are those of all ranks together."""

    index: int  # from 0
    epoch: int  # from 0
    micro_batches: list[MicroBatch]
    tokens: int
    target_tokens: int


def micro_batch(dataset: Dataset, documents: list[int]) -> MicroBatch:
    """The stream of `documents`."""
    parts = [dataset.document(i) for i in documents]
    tokens = np.concatenate([ids for ids, _ in parts])
    trained = np.concatenate([mask for _, mask in parts])  # a document's first token is never trained
    after = np.flatnonzero(trained)
    return MicroBatch(torch.from_numpy(tokens.astype(np.int64)), tuple(len(ids) for ids, _ in parts),
                      torch.from_numpy(tokens[after].astype(np.int64)), torch.from_numpy(after - 1))


# What a rank computes when there is no pack left for it: every rank must take part in every forward and backward pass.
IDLE = MicroBatch(torch.zeros(1, dtype=torch.int64), (1,), torch.zeros(0, dtype=torch.int64),
                  torch.zeros(0, dtype=torch.int64))


def deal(packs: list, *, rank: int, ranks: int) -> list:
    """The packs of a step that `rank` computes. 5 packs on 2 ranks -> [0, 2, 4] and [1, 3]."""
    return packs[rank::ranks]


def steps(dataset: Dataset, plan: Plan, *, start: int = 0, rank: int = 0, ranks: int = 1,
          micro_packs: int = 1) -> Iterator[Step]:
    """Steps `start`, `start` + 1, ... of the plan, as `rank` of `ranks` sees them. Starting late costs nothing."""
    for index in range(start, plan.total_steps):
        packs = plan.documents(index)
        mine = deal(packs, rank=rank, ranks=ranks)
        streams = [np.concatenate(mine[i : i + micro_packs]).tolist() for i in range(0, len(mine), micro_packs)]
        rounds = -(-len(deal(packs, rank=0, ranks=ranks)) // micro_packs)  # of the rank with the most packs
        batches = [micro_batch(dataset, documents) for documents in streams]
        batches += [IDLE] * (rounds - len(batches))
        everything = np.concatenate(packs)
        yield Step(index, plan.place(index).epoch, batches, int(plan.lengths[everything].sum()),
                   int(plan.targets[everything].sum()))
