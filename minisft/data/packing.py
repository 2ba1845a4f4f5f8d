"""The plan: which document lies in which pack of which step, known before training starts.

    documents, shuffled -> bundles of short ones -> packs of at most seq_len tokens, shuffled -> even steps

`Plan`, at the end, is what others use. Read it first, and the algorithms before it when you doubt it.

The plan is a pure function of the documents' lengths, the seed and the epoch. So every rank knows, without
communication, what each step holds and how many tokens it trains on, and the position in a run is one number, the step.
The packs of an epoch are spread evenly over as few steps as batch.packs allows: of 65 packs, steps of at most 32 get
22, 22 and 21. A last step of one left-over pack would weigh each of its tokens as much as 32 in the others.

Packing is best-fit decreasing: the longest document first, each into the fullest pack that still has room (Johnson
1974). By itself it makes packs of documents of one length, and a step of few packs is then a poor sample. So short
documents are first tied, as they come, into bundles, which are packed like long ones. Measured over steps of 32 packs
of 8192 with documents of a median of 150 tokens: the share of tokens in the shorter documents has a standard deviation
of 2.2% in an unpacked order, 8.8% with best-fit decreasing alone, 3.6% with bundles.
"""

import math
import threading
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from minisft.errors import UserError

VERSION = 4  # of the plan: raise it when the same lengths and seed give other packs, so that no run resumes in another
WINDOW = 16_384  # documents packed together if packs follow the file, so that a pack's documents are near each other
BUNDLES = (4, 8, 16)  # documents shorter than capacity / 4 are bundled; / 8 or / 16 if those fill packs too badly
LOOSE = 0.08  # short documents with this share of all tokens are not bundled, to fill the gaps that bundles leave
MOST_EPOCHS = 10_000  # more epochs are not packed to count a run's steps
SLACK = 0.0005  # the share of extra packs that bundles may cost, for the better mix

Array = np.ndarray


def draw_copies(passes: Array, lengths: Array, random: np.random.Generator) -> Array:
    """passes (n,), lengths (n,) in tokens -> (n,) int64: how often each document appears in an epoch. With 2.3
    passes every document appears twice, and a sample of 30% once more, drawn anew in each epoch. Each document is in it
    with exactly that probability, whatever its length, and the tokens are right to within one document, the longest;
    independent draws would miss by much more."""
    times = np.floor(passes).astype(np.int64)
    part = passes - times
    each = np.unique(passes[part > 0])  # 0.5 and 1.5 are sampled apart, so that each is right by itself
    for share, number in sorted(zip((each - np.floor(each)).tolist(), each.tolist(), strict=True)):
        group = random.permutation(np.flatnonzero(passes == number))
        times[_sample(group[np.argsort(-lengths[group], kind="stable")], share, random)] += 1
    return times


def _sample(documents: Array, share: float, random: np.random.Generator) -> list[int]:
    """Some of `documents` (n,), each with probability `share`; any first k of them contribute k * `share`, rounded up
    or down.
    The pivotal method (Deville and Tille 1998, "Unequal probability sampling without replacement through a splitting
    method"): two documents play for the sum of their probabilities. Below 1 the winner gets all of it and the loser
    nothing; from 1 on the winner is chosen, and the loser keeps the rest."""
    chosen, held, chance = [], -1, 0.0
    for document, draw in zip(documents.tolist(), random.random(len(documents)).tolist(), strict=True):
        chance += share
        if chance < 1:
            held = document if draw * chance < share else held
        else:
            chance -= 1
            first = draw * (1 - chance) < 1 - share
            chosen.append(held if first else document)
            held = document if first else held
    return chosen + [held] * (random.random() < chance)


def best_fit_decreasing(lengths: Array, capacity: int) -> Array:
    """(n,) the pack, from 0, of each item of `lengths`, which are 1 to `capacity`."""
    # NumPy sorts 16 bits by radix, several times faster.
    order = np.argsort((capacity - lengths).astype(np.uint16 if capacity < 2**16 else np.int64), kind="stable")
    first, packs, each = _moves(lengths, capacity).T
    items = packs * each
    nth = np.arange(len(lengths)) - np.repeat(np.cumsum(items) - items, items)  # the number of each item in its move
    pack = np.empty(len(lengths), dtype=np.int64)
    pack[order] = np.repeat(first, items) + nth // np.repeat(each, items)
    return pack


def _moves(lengths: Array, capacity: int) -> Array:
    """(moves, 3) of (first, packs, each): packs `first`, `first` + 1, ... `first` + `packs` - 1 get `each` items more.

    Once a pack has taken an item and has room for another of that length, no fuller pack has, so it goes on taking them
    until none fits: 7 items of 3, and 2 packs with 10 left -> (first, 2, 3), and one item for other packs.

    Room is looked up in one integer whose bit r says that some pack has r tokens left. A length meets each group of
    equal packs once and leaves it less room than the length, so moves grow with the number of lengths, not of items.
    """
    moves: list[tuple[int, int, int]] = []
    with_room: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # tokens left -> (first pack, packs)
    rooms, opened, counts = 0, 0, np.bincount(lengths).tolist()
    for length in range(len(counts) - 1, 0, -1):
        items = counts[length]
        while items:
            if fitting := rooms >> length:
                room = length + (fitting & -fitting).bit_length() - 1
                first, packs = with_room[room].pop()
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                room, first, packs = capacity, opened, -(-items // (capacity // length))
                opened += packs
            each = min(room // length, items)
            used = min(items // each, packs)
            moves.append((first, used, each))
            items -= used * each
            for left, start, number in ((room - each * length, first, used), (room, first + used, packs - used)):
                if number:
                    with_room[left].append((start, number))
                    rooms |= 1 << left
    return np.array(moves, dtype=np.int64).reshape(-1, 3)


def bundles(lengths: Array, size: int) -> Array:
    """(n,) for each document the first of its bundle; a single document is its own. Documents shorter than `size` lie
    one after another on a line with a mark every `size` tokens; those that start between the same two marks are a
    bundle, so it is shorter than 2 * `size`. The first LOOSE of them stay single."""
    bundle = np.arange(len(lengths))
    short = np.flatnonzero(lengths < size)
    ends = np.cumsum(lengths[short])
    loose = np.searchsorted(ends, LOOSE * lengths.sum())
    short, starts = short[loose:], (ends - lengths[short])[loose:]
    _, first, count = np.unique(starts // max(size, 1), return_index=True, return_counts=True)
    bundle[short] = np.repeat(short[first], count)
    return bundle


def pack_documents(lengths: Array, capacity: int) -> Array:
    """(n,) the pack, from 0, of each document; at most SLACK more packs than best-fit decreasing needs. The documents'
    order decides only which ones share a bundle, and which of equal length goes where."""
    least = _moves(lengths, capacity)[:, :2].sum(axis=1).max(initial=0)  # packs: the highest `first` + `packs`
    for parts in BUNDLES:
        bundle = bundles(lengths, capacity // parts)
        totals = np.bincount(bundle, weights=lengths, minlength=len(lengths)).astype(np.int64)
        firsts, pack = np.flatnonzero(totals), np.empty(len(lengths), dtype=np.int64)
        pack[firsts] = best_fit_decreasing(totals[firsts], capacity)
        if pack[firsts].max(initial=-1) + 1 <= least * (1 + SLACK):
            return pack[bundle]
    return best_fit_decreasing(lengths, capacity)


@dataclass(frozen=True)
class Epoch:
    """The packs of one epoch."""

    documents: Array  # (n,) int64 document indices, pack after pack
    offsets: Array  # (packs + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, index: int) -> Array:
        """(documents in the pack,) their indices"""
        return self.documents[self.offsets[index] : self.offsets[index + 1]]


class Place(NamedTuple):
    """Where a step lies: in packs [first, last) of `epoch`."""

    epoch: int
    first: int
    last: int


class Plan:
    """All steps of a run over documents with lengths (n,), each 1 to `seq_len`, and `num_loss_tokens` (n,) each.
    `passes` (n,) are those over each document in an epoch, 1 by default; `loss_weights` (n,) are sums of the weights
    of its tokens in the loss, by default `num_loss_tokens`. A step has `packs_per_step` packs or fewer, sizes within an
    epoch differ by at most one, and no step spans two epochs. Epochs are packed when a step of them is asked for, or if
    needed to count the steps. Raises UserError if that would take more than MOST_EPOCHS."""

    def __init__(self, lengths: Array, num_loss_tokens: Array, *, seq_len: int, packs_per_step: int, epochs: int,
                 max_steps: int | None = None, seed: int = 0, shuffle: bool = True, passes: Array | None = None,
                 loss_weights: Array | None = None):
        self.lengths, self.num_loss_tokens, self.passes = lengths, num_loss_tokens, passes
        self.loss_weights = num_loss_tokens if loss_weights is None else loss_weights
        self.seq_len, self.packs_per_step, self.seed, self.shuffle = seq_len, packs_per_step, seed, shuffle
        self._epochs, self._lock = epochs, threading.Lock()
        self._first_step = [0]  # the first step of each epoch that was packed, and of the next
        self._count(1)
        if not self.steps_per_epoch:
            raise UserError("no document appears in the first epoch: the weights of the sources in data.train are too "
                            "small; raise them")
        # Packing every epoch only to count its steps would be slow, and `max_steps` may well come before the last.
        # Documents of one pass and more appear in every epoch, so an epoch has at least this many steps:
        sure = lengths if passes is None else lengths * np.floor(passes).astype(np.int64)
        fewest = -(-int(sure.sum()) // (seq_len * packs_per_step))
        if max_steps is not None and max_steps <= fewest * epochs:
            self.total_steps = max_steps
            return
        if max_steps is not None and not fewest:  # less than one pass over each: only packing tells
            self._count(min(epochs, MOST_EPOCHS), max_steps)
        if epochs > MOST_EPOCHS and (max_steps is None or self._first_step[-1] < max_steps):
            raise UserError(f"train.epochs = {epochs}: the steps of more than {MOST_EPOCHS:,} epochs are not counted; "
                            f"lower it, or set train.max_steps to at most {max(fewest * epochs, self._first_step[-1])}")
        self._count(epochs, max_steps)
        self.total_steps = min(max_steps or self._first_step[-1], self._first_step[-1])

    def _count(self, epochs: int, max_steps: int | None = None) -> None:
        """Count the steps of the first `epochs` epochs, or until there are more than `max_steps`."""
        with self._lock:  # the thread that makes batches calls it, too
            while len(self._first_step) <= epochs and (max_steps is None or self._first_step[-1] <= max_steps):
                packs = len(self.epoch(len(self._first_step) - 1))
                self._first_step.append(self._first_step[-1] + math.ceil(packs / self.packs_per_step))

    # 3: a run of up to three epochs need not pack them again after counting its steps.
    @lru_cache(maxsize=3)  # noqa: B019 (a plan lives as long as its run)
    def epoch(self, epoch: int) -> Epoch:
        """The packs of epoch `epoch` (from 0). Without `shuffle`, packs follow each other as their first documents do,
        and the documents of a pack are within a window."""
        random, order = np.random.default_rng((self.seed, epoch)), np.arange(len(self.lengths))
        if self.passes is not None:
            order = np.repeat(order, draw_copies(self.passes, self.lengths, random))
        if self.shuffle:
            order = random.permutation(order)
            pack = pack_documents(self.lengths[order], self.seq_len)
            pack = random.permutation(pack.max(initial=-1) + 1)[pack]
        else:
            pack, packs = np.zeros(len(order), dtype=np.int64), 0
            for start in range(0, len(order), WINDOW):
                window = pack_documents(self.lengths[order[start : start + WINDOW]], self.seq_len)
                pack[start : start + WINDOW] = packs + window
                packs += int(window.max()) + 1
            _, first = np.unique(pack, return_index=True)
            pack = np.argsort(np.argsort(first))[pack]
        by_pack = np.argsort(pack, kind="stable")
        return Epoch(order[by_pack], np.append(0, np.bincount(pack)).cumsum(dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; later ones may differ by a step, because their bundles differ."""
        return self._first_step[1]

    def place(self, step: int) -> Place:
        """Epoch and packs of `step` (from 0)."""
        self._count(self._epochs, step)
        epoch = bisect_right(self._first_step, step) - 1
        begin, end = self._first_step[epoch : epoch + 2]
        packs, steps = len(self.epoch(epoch)), end - begin
        first, last = (-(-(i * packs) // steps) for i in (step - begin, step - begin + 1))  # rounded up
        return Place(epoch, first, last)

    def documents(self, step: int) -> list[Array]:
        """The document indices of each pack of `step`."""
        place = self.place(step)
        return [self.epoch(place.epoch).pack(i) for i in range(place.first, place.last)]

    def fill(self) -> float:
        """Share of the first epoch's packs that is tokens."""
        epoch = self.epoch(0)
        return float(self.lengths[epoch.documents].sum() / (len(epoch) * self.seq_len))
