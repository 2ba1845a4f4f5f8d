"""This rank's share of each step, ready for the model.

A micro-batch is a stream: the documents of `micro_packs` packs one after another, without padding.

    tokens      a0 a1 a2 a3 | b0 b1 b2        lengths (4, 3)
    trained      .  .  x  x |  .  x  x        the mask of the store, per token
    target_at       1  2    |  4  5           positions whose next token is trained
    targets         a2 a3   |  b1 b2          those next tokens

Targets are shifted here and nowhere else. The last token of a document predicts nothing. `target_at` is computed on
the host, so that the device never has to count.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minisft.data.dataset import Dataset
from minisft.data.packing import Plan

EVEN = 0.03  # of the mean: how far apart the ranks' attention costs in a step may be

Array = np.ndarray


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


def deal(costs: Array, *, ranks: int) -> list[list[int]]:
    """The packs of a step that each rank computes, dearest first; `costs` (packs,) int64.

    Each rank gets as many packs as any other, or one less. Ranks wait for each other in every micro-batch, so each gets
    one of the `ranks` dearest packs, one of the next, and so on. Which one is settled so that the sums come out even:
    the two of those rounds with the largest spread are joined, the dearest of one with the cheapest of the other, until
    one is left (balanced largest differencing, Yakir 1996, Michiels et al. 2003).

        costs 9 8 | 6 5 | 3 1, 2 ranks -> 9 + 1, 8 + 3 | 6, 5 -> 9 + 6 + 1 and 8 + 5 + 3
    """
    order = np.argsort(-costs, kind="stable").tolist()
    rounds: list[tuple[int, int, list[tuple[int, list[int]]]]] = []  # (-spread, tie-break, [(cost, packs) a rank])

    def push(number: int, hands: list[tuple[int, list[int]]]) -> None:
        hands = sorted(hands, key=lambda hand: -hand[0])
        heapq.heappush(rounds, (hands[-1][0] - hands[0][0], number, hands))

    for start in range(0, len(order), ranks):
        hands = [(int(costs[i]), [i]) for i in order[start : start + ranks]]
        push(start, hands + [(0, [])] * (ranks - len(hands)))
    while len(rounds) > 1:
        (_, number, dear), (_, _, cheap) = heapq.heappop(rounds), heapq.heappop(rounds)
        push(number, [(a + b, x + y) for (a, x), (b, y) in zip(dear, reversed(cheap), strict=True)])
    hands = [packs for _, packs in rounds[0][2]]
    _even_out(hands, costs)
    return [sorted(packs, key=lambda i: (-costs[i], i)) for packs in hands]


def _even_out(hands: list[list[int]], costs: Array) -> None:
    """Swap packs between the dearest hand and others, in place, while hands are more than EVEN apart.

    Not to the last bit: a swap between rounds makes some rank wait in two of them.
    """
    for _ in range(len(costs)):
        sums = np.array([costs[packs].sum() for packs in hands])
        dear = int(sums.argmax())
        if sums[dear] - sums.min() <= EVEN * sums.mean():
            return
        for cheap in np.argsort(sums, kind="stable").tolist():
            moved = costs[hands[dear]][:, None] - costs[hands[cheap]]  # (packs, packs) what a swap would move
            gain = np.minimum(moved, sums[dear] - sums[cheap] - moved)
            if gain.max(initial=0) > 0:
                i, j = np.unravel_index(gain.argmax(), gain.shape)
                hands[dear][i], hands[cheap][j] = hands[cheap][j], hands[dear][i]
                break
        else:
            return


def steps(dataset: Dataset, plan: Plan, *, start: int = 0, rank: int = 0, ranks: int = 1,
          micro_packs: int = 1) -> Iterator[Step]:
    """Steps `start`, `start` + 1, ... of the plan, as `rank` of `ranks` sees them. Starting late costs nothing."""
    for index in range(start, plan.total_steps):
        packs = plan.documents(index)
        # What attention costs. The rest of the network costs the same in every pack, as they are all full.
        dealt = deal(np.array([np.square(plan.lengths[pack]).sum() for pack in packs]), ranks=ranks)
        mine = [packs[i] for i in dealt[rank]]
        streams = [np.concatenate(mine[i : i + micro_packs]).tolist() for i in range(0, len(mine), micro_packs)]
        rounds = -(-max(map(len, dealt)) // micro_packs)
        batches = [micro_batch(dataset, documents) for documents in streams]
        batches += [IDLE] * (rounds - len(batches))
        everything = np.concatenate(packs)
        yield Step(index, plan.place(index).epoch, batches, int(plan.lengths[everything].sum()),
                   int(plan.targets[everything].sum()))
