"""This rank's share of each step, ready for the model.

A micro-batch is a stream: the documents of `micro_packs` packs one after another, and no padding; only for a compiled
network, which wants one shape, a stream is filled up at its end (`padded`).

    tokens      a0 a1 a2 a3 | b0 b1 b2        lengths (4, 3), cu_seqlens 0 4 7
    positions    0  1  2  3 |  0  1  2
    trained      .  .  x  x |  .  x  x        the mask of the store, per token
    target_at       1  2    |  4  5           positions whose next token is trained
    targets         a2 a3   |  b1 b2          those next tokens

Targets are token ids here (those of data sets and plans are counts), and they are shifted here and nowhere else. The
last token of a document predicts nothing. `target_at` is computed on the host, so that the device never has to count. A
thread makes the next steps while the device works on this one, in memory that the device reads by itself: neither waits
for the other.
"""

import heapq
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from minisft.data.dataset import Dataset
from minisft.data.packing import Plan

EVEN = 0.03  # of the mean: how far apart the ranks' attention costs in a step may be
AHEAD = 2  # steps that are made before they are asked for

Array = np.ndarray
Item = TypeVar("Item")


@dataclass(frozen=True)
class MicroBatch:
    """T tokens in D documents, with N targets."""

    tokens: Tensor  # (T,) int64
    lengths: tuple[int, ...]  # of the documents, summing to T
    cu_seqlens: Tensor  # (D + 1,) int32: offset of each document's first token, and T
    positions: Tensor  # (T,) int64: position of each token in its own document
    targets: Tensor  # (N,) int64: what the model should say ...
    target_at: Tensor  # (N,) int64: ... after these positions
    numbers: Tensor  # (T,) int32: of each token's document (`told_apart`); -1 for padding

    @property
    def longest(self) -> int:
        """The length of the longest document."""
        return max(self.lengths)

    def pinned(self) -> "MicroBatch":
        """The same in memory that stays where it is, which a GPU reads without the host's help."""
        return self._with(Tensor.pin_memory)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on `device`; from pinned memory the host does not wait for the copy."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """The same with each tensor changed."""
        changed: dict[str, Any] = {name: change(value) for name, value in vars(self).items()
                                   if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Step:
    """What one rank does in one optimizer step; the counts are those of all ranks together."""

    index: int  # from 0
    epoch: int  # from 0
    micro_batches: list[MicroBatch]
    tokens: int
    target_tokens: int


def micro_batch(dataset: Dataset, documents: list[int]) -> MicroBatch:
    """The stream of `documents`, numbered as `told_apart` has it."""
    parts = [dataset.document(i % len(dataset.lengths)) for i in documents]
    trained = np.concatenate([mask for _, mask in parts])  # a document's first token is never trained
    return _stream(np.concatenate([ids for ids, _ in parts]), [len(ids) for ids, _ in parts], np.flatnonzero(trained),
                   documents)


def _stream(tokens: Array, lengths: list[int], after: Array, documents: list[int]) -> MicroBatch:
    """tokens (T,), the lengths of their documents, the places `after` (N,) of the tokens that are trained, and the
    numbers of the first documents, those that are not padding."""
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    tokens, positions = tokens.astype(np.int64), np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)
    arrays = offsets.astype(np.int32), positions, tokens[after], after - 1
    numbers = np.array([*documents, *[-1] * (len(lengths) - len(documents))], dtype=np.int64).astype(np.int32)
    numbers = np.repeat(numbers, lengths)
    return MicroBatch(torch.from_numpy(tokens), tuple(lengths), *map(torch.from_numpy, (*arrays, numbers)))


# What a rank computes when there is no pack left for it: every rank must take part in every forward and backward pass.
IDLE = _stream(np.zeros(1), [1], np.zeros(0, dtype=np.int64), [])


def padded(batch: MicroBatch, size: int, *, longest: int) -> MicroBatch:
    """`batch` with documents of zeros behind it, up to `size` tokens in all.

    They are trained on nowhere and seen by no other document, so nothing but the shape changes. They are at most
    `longest` tokens long, so a lone short pack does not make attention dearer than a full one could be.
    """
    missing = size - len(batch.tokens)
    lengths = [min(longest, missing - start) for start in range(0, missing, longest)]
    tokens = np.concatenate((batch.tokens.numpy(), np.zeros(missing, dtype=np.int64)))
    starts = batch.cu_seqlens[:-1].long()
    documents = batch.numbers[starts].tolist()
    return _stream(tokens, [*batch.lengths, *lengths], batch.target_at.numpy() + 1, documents)


def told_apart(packs: list[Array], count: int) -> list[Array]:
    """The packs of a step over a data set of `count` documents: a document's second copy has its number + `count`, and
    so on, so that copies do not drop the same. Counted over the whole step: no rank and no pack matters."""
    documents = np.concatenate(packs)
    order = np.argsort(documents, kind="stable")
    ordered = documents[order]
    documents[order] += count * (np.arange(len(ordered)) - np.searchsorted(ordered, ordered))
    return np.split(documents, np.cumsum([len(pack) for pack in packs])[:-1])


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
    dealt = [packs for _, packs in rounds[0][2]]
    _even_out(dealt, costs)
    return [sorted(packs, key=lambda i: (-costs[i], i)) for packs in dealt]


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


def steps(dataset: Dataset, plan: Plan, *, start: int = 0, rank: int = 0, ranks: int = 1, micro_packs: int = 1,
          fixed: bool = False, device: torch.device | None = None) -> Generator[Step, None, None]:
    """Steps `start`, `start` + 1, ... of the plan, as `rank` of `ranks` sees them. Starting late costs nothing.

    With `fixed`, every micro-batch has `micro_packs` full packs of tokens, for a network that is compiled for one
    shape. For a GPU as `device` they are in pinned memory. Close the iterator where it is left early: it has a thread.
    """
    on_gpu = device is not None and device.type == "cuda"

    def make() -> Iterator[Step]:
        if on_gpu:  # a thread begins on GPU 0, where the other ranks' pinned memory would take up a context each
            torch.cuda.set_device(device)
        for index in range(start, plan.total_steps):
            step = _step(dataset, plan, index, rank, ranks, micro_packs)
            batches = step.micro_batches
            if fixed:
                batches = [padded(batch, micro_packs * plan.seq_len, longest=plan.seq_len) for batch in batches]
            if on_gpu:
                batches = [batch.pinned() for batch in batches]
            yield replace(step, micro_batches=batches)

    return ahead(make(), AHEAD)


def _step(dataset: Dataset, plan: Plan, index: int, rank: int, ranks: int, micro_packs: int) -> Step:
    packs = plan.documents(index)
    # What attention costs. The rest of the network costs the same in every pack, as they are all full.
    dealt = deal(np.array([np.square(plan.lengths[pack]).sum() for pack in packs]), ranks=ranks)
    numbered = told_apart(packs, len(plan.lengths))
    mine = [numbered[i] for i in dealt[rank]]
    streams = [np.concatenate(mine[i : i + micro_packs]).tolist() for i in range(0, len(mine), micro_packs)]
    rounds = -(-max(map(len, dealt)) // micro_packs)
    batches = [micro_batch(dataset, documents) for documents in streams]
    batches += [IDLE] * (rounds - len(batches))
    everything = np.concatenate(packs)
    return Step(index, plan.place(index).epoch, batches, int(plan.lengths[everything].sum()),
                int(plan.targets[everything].sum()))


def ahead(items: Iterator[Item], number: int) -> Generator[Item, None, None]:
    """The same items in the same order; a thread makes up to `number` of them before they are asked for.

    What the thread raises is raised here, after the items before it. The thread ends with this iterator, also where
    that is closed early.
    """
    ready: SimpleQueue[tuple[Item] | BaseException] = SimpleQueue()
    room = threading.Semaphore(number)
    closed = False

    def work() -> None:
        try:
            while True:
                room.acquire()
                if closed:
                    return
                ready.put((next(items),))
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            found = ready.get()
            if isinstance(found, StopIteration):
                return
            if isinstance(found, BaseException):
                raise found
            room.release()
            yield found[0]
    finally:
        closed = True
        room.release()
        thread.join()
