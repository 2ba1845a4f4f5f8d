"""This rank's share of each step, ready for the model.

A micro-batch is a stream: the documents of `micro_packs` packs one after another, without padding, except at its end if
a compiled network needs one shape.

    tokens      a0 a1 a2 a3 | b0 b1 b2        lengths (4, 3), cu_seqlens 0 4 7
    positions    0  1  2  3 |  0  1  2
    loss weights 0  0  1  1 |  0  1  1        of the store, per token
    target_at       1  2    |  4  5           positions whose next token is trained
    targets         a2 a3   |  b1 b2          those next tokens

Targets are shifted here and nowhere else; the last token of a document predicts nothing. `target_at` is computed on the
host, so the device never has to count. A thread makes the next steps while the device works on this one.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minisft.data.packing import Plan

AHEAD = 2  # steps that are made before they are asked for
Array = np.ndarray


class TokenDocuments(Protocol):
    """Tokenised documents, as dataset.py holds them."""

    lengths: Array  # of each document, in tokens

    def document(self, index: int) -> tuple[Array, Array]:
        """Token ids (L,) and loss weights (L,) of a document: float64 if any is neither 0 nor 1."""


@dataclass(frozen=True)
class MicroBatch:
    """A stream of T tokens, with N targets."""

    tokens: Tensor  # (T,) int64
    lengths: tuple[int, ...]  # of the documents, summing to T
    cu_seqlens: Tensor  # (documents + 1,) int32: offset of each document's first token, and T
    positions: Tensor  # (T,) int64: position of each token in its own document
    targets: Tensor  # (N,) int64: what the model should say ...
    target_at: Tensor  # (N,) int64: ... after these positions
    document_ids: Tensor  # (T,) int32: which document a token is in, for the dropout of adapters; -1: padding
    target_weights: Tensor | None = None  # (N,) float64: of the targets in the loss; None: all 1
    ranks: int = 1  # how many share the stream: tensors are one's part of it, lengths and cu_seqlens those of the whole

    @property
    def longest(self) -> int:
        """The length of the longest document."""
        return max(self.lengths)

    def pinned(self) -> "MicroBatch":
        """A copy in page-locked memory, which a GPU reads without the host's help."""
        return self._with(Tensor.pin_memory)

    def to(self, device: torch.device) -> "MicroBatch":
        """A copy on `device`; from pinned memory the host does not wait for it."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def part(self, rank: int, ranks: int) -> "MicroBatch":
        """The part of one of `ranks` that share the stream, each with as many of its T tokens. Its targets are those of
        its own tokens, also if the token to say lies in the next part; there may be none."""
        width = len(self.tokens) // ranks
        here, mine = slice(rank * width, (rank + 1) * width), self.target_at // width == rank
        return replace(self, tokens=self.tokens[here], positions=self.positions[here], targets=self.targets[mine],
                       target_at=self.target_at[mine] - here.start, document_ids=self.document_ids[here], ranks=ranks,
                       target_weights=None if self.target_weights is None else self.target_weights[mine])

    def _with(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        changed: dict[str, Any] = {name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Step:
    """One rank's work in one optimizer step; the counts are those of all ranks together."""

    index: int  # from 0
    epoch: int  # from 0
    micro_batches: list[MicroBatch]
    tokens: int
    target_tokens: int  # sum of `num_loss_tokens` of the step's documents
    target_weight: float | None  # the sum of the targets' weights in the loss; None if the data has no weights

    @property
    def denominator(self) -> float:
        """What all ranks divide the losses of the step by: its trained tokens, or the sum of their weights."""
        return self.target_tokens if self.target_weight is None else self.target_weight


def micro_batch(dataset: TokenDocuments, documents: list[int], *, size: int = 1, longest: int = 1,
                multiple: int = 1) -> MicroBatch:
    """The stream of `documents` (`number_copies` gives their numbers), padded to at least `size` tokens and to a
    `multiple`. Padding is documents of zeros without targets, each of at most `longest` tokens, so that attention costs
    no more than for full packs. Without documents all is padding: a rank that has no pack left must still take part in
    every forward and backward pass."""
    parts = [dataset.document(i % len(dataset.lengths)) for i in documents]
    used = sum(len(ids) for ids, _ in parts)
    size = -(-max(size, used) // multiple) * multiple
    for start in range(used, size, longest):
        zeros = np.zeros(min(longest, size - start), np.int64)
        parts.append((zeros, zeros))
    lengths = [len(ids) for ids, _ in parts]
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    tokens = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    weights = np.concatenate([loss_weights for _, loss_weights in parts])
    trained = np.flatnonzero(weights)  # never a document's first token, which has weight 0: Renderer.encode, Store.part
    weighted = weights.dtype == np.float64  # see TokenDocuments
    ids = np.array([*documents, *[-1] * (len(parts) - len(documents))], dtype=np.int64).astype(np.int32)
    tensor = torch.from_numpy
    return MicroBatch(
        tokens=tensor(tokens), lengths=tuple(lengths), cu_seqlens=tensor(offsets.astype(np.int32)),
        positions=tensor(np.arange(len(tokens)) - np.repeat(offsets[:-1], lengths)),
        targets=tensor(tokens[trained]),
        target_at=tensor(trained - 1),  # THE shift: the token before predicts it, and is in the same document
        document_ids=tensor(np.repeat(ids, lengths)),
        target_weights=tensor(weights[trained]) if weighted else None)


def number_copies(packs: list[Array], count: int) -> list[Array]:
    """The packs of a step over a data set of `count` documents, with the second copy of a document numbered as the
    document + `count`, and so on, so that dropout differs between copies, on any number of ranks."""
    documents = np.concatenate(packs)
    order = np.argsort(documents, kind="stable")
    ordered = documents[order]
    documents[order] += count * (np.arange(len(ordered)) - np.searchsorted(ordered, ordered))
    return np.split(documents, np.cumsum([len(pack) for pack in packs])[:-1])


def deal(costs: Array, *, ranks: int) -> list[list[int]]:
    """The packs of a step that each rank computes, most expensive first; `costs` (packs,) int64.

    Ranks wait for each other in every micro-batch, so each rank gets one of the `ranks` most expensive packs, one of
    the next, and so on. To even out the sums, the two of these rounds with the largest spread are joined, the most
    expensive of one with the cheapest of the other, until one is left (balanced largest differencing, Yakir 1996).

        costs 9 8 | 6 5 | 3 1, 2 ranks -> 9 + 1, 8 + 3 | 6, 5 -> 9 + 6 + 1 and 8 + 5 + 3
    """
    order = np.argsort(-costs, kind="stable").tolist()
    rounds: list[tuple[int, int, list[tuple[int, list[int]]]]] = []  # (-spread, tie-break, (cost, packs) of each rank)

    def push(number: int, hands: list[tuple[int, list[int]]]) -> None:
        hands.sort(key=lambda hand: -hand[0])
        heapq.heappush(rounds, (hands[-1][0] - hands[0][0], number, hands))

    for start in range(0, len(order), ranks):
        hands = [(int(costs[i]), [i]) for i in order[start : start + ranks]]
        push(start, hands + [(0, [])] * (ranks - len(hands)))
    while len(rounds) > 1:
        (_, number, high), (_, _, low) = heapq.heappop(rounds), heapq.heappop(rounds)
        push(number, [(a + b, x + y) for (a, x), (b, y) in zip(high, reversed(low), strict=True)])
    return [sorted(packs, key=lambda i: (-costs[i], i)) for _, packs in rounds[0][2]]


def steps(dataset: TokenDocuments, plan: Plan, *, start: int = 0, rank: int = 0, ranks: int = 1, context: int = 1,
          micro_packs: int = 1, fixed: bool = False,
          device: torch.device | None = None) -> Generator[Step, None, None]:
    """Steps `start`, `start` + 1, ... of the plan, as `rank` of `ranks` sees them; nothing before is read. Every
    `context` neighbouring ranks share their micro-batches. Accumulation follows: P packs on R streams take ceil(ceil(P
    / R) / `micro_packs`) micro-batches, and a rank that runs out of packs gets padding. With `fixed`, every micro-batch
    has `micro_packs` full packs of tokens, for a network that is compiled for one shape. If `device` is a GPU they are
    in pinned memory. Close the generator if you leave it early: it has a thread."""
    on_gpu = device is not None and device.type == "cuda"

    def make() -> Iterator[Step]:
        if on_gpu:  # a thread starts on GPU 0, where the other ranks' pinned memory would take up a context each
            torch.cuda.set_device(device)
        for index in range(start, plan.total_steps):
            packs = plan.documents(index)
            documents_of_step = np.concatenate(packs)
            # The cost of attention. The rest of the network costs about the same in every pack, as they are all full.
            costs = np.array([np.square(plan.lengths[pack]).sum() for pack in packs])
            dealt = deal(costs, ranks=ranks // context)
            numbered = number_copies(packs, len(plan.lengths))
            batches = []
            for first in range(0, max(map(len, dealt)), micro_packs):
                documents = [int(i) for pack in dealt[rank // context][first : first + micro_packs]
                             for i in numbered[pack]]
                batch = micro_batch(dataset, documents, size=micro_packs * plan.seq_len if fixed else 1,
                                    longest=plan.seq_len, multiple=context).part(rank % context, context)
                batches.append(batch.pinned() if on_gpu else batch)
            weights = plan.loss_weights[documents_of_step]
            weighted = weights.dtype == np.float64
            yield Step(index, plan.place(index).epoch, batches, tokens=int(plan.lengths[documents_of_step].sum()),
                       target_tokens=int(plan.num_loss_tokens[documents_of_step].sum()),
                       target_weight=math.fsum(weights) if weighted else None)  # exact, so in any order

    return ahead(make(), AHEAD)


def ahead(items: Iterator[Step], number: int) -> Generator[Step, None, None]:
    """The items in their order; a thread makes up to `number` of them before they are asked for. What the thread raises
    is raised here, after the items before it. The thread ends with this generator, also if that is closed early."""
    thread, end = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader"), object()
    coming: deque[Future[Any]] = deque(thread.submit(next, items, end) for _ in range(number))
    try:
        while True:
            with torch.profiler.record_function("loader"):  # what the step waits for, in a profile
                item = coming.popleft().result()
            if item is end:
                return
            coming.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
