"""The plan: which document lies in which pack of which step, known before training starts.

    documents, shuffled -> windows -> packs of at most seq_len tokens, shuffled -> steps of batch.packs packs

The plan is a pure function of the documents' lengths, the seed and the epoch. So every rank knows, without a word to
the others, how many steps there are, what each holds, and how many tokens it trains on; and the place in a run is a
single number, the step.

Packing is best-fit decreasing: the longest document first, each into the fullest pack that still has room (Johnson
1974). It runs inside windows of shuffled documents, since packing everything at once would put documents of one length
into one step.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from minisft.data.mixing import copies
from minisft.errors import UserError

WINDOW = 16_384  # documents: enough for packs over 99% full, few enough that a window is a random sample

Array = np.ndarray


@dataclass(frozen=True)
class Epoch:
    """The packs of one epoch: pack i holds `documents[offsets[i] : offsets[i + 1]]`."""

    documents: Array  # (n,) int64 document indices
    offsets: Array  # (packs + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, index: int) -> Array:
        """(documents in the pack,) their indices"""
        return self.documents[self.offsets[index] : self.offsets[index + 1]]


def best_fit_decreasing(lengths: Array, capacity: int) -> list[list[int]]:
    """Distribute items of `lengths` (each at most `capacity`) over packs; returns the items of each pack.

    Room is looked up in one integer whose bit r says that some pack has r tokens left, so an item costs a shift and a
    lowest set bit, not a search.
    """
    packs: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # tokens left -> packs
    rooms = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            packs[pack].append(item)
        else:
            room, pack = capacity, len(packs)
            packs.append([item])
        left = room - length
        with_room[left].append(pack)
        rooms |= 1 << left
    return packs


def pack_epoch(lengths: Array, *, seq_len: int, seed: int, epoch: int, shuffle: bool = True,
               weights: Array | None = None) -> Epoch:
    """Pack all documents with lengths (n,), each at most `seq_len` tokens, for one epoch (counted from 0).

    A document of weight 2.3 (`weights` (n,), 1 without them) comes twice, and by a draw once more (mixing.py).
    """
    random = np.random.default_rng((seed, epoch))
    order = np.arange(len(lengths))
    if weights is not None:
        order = np.repeat(order, copies(weights, lengths, random))
    if shuffle:
        order = random.permutation(order)
    packs: list[Array] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        packs += [window[items] for items in best_fit_decreasing(lengths[window], seq_len)]
    if shuffle:
        packs = [packs[i] for i in random.permutation(len(packs))]
    else:
        packs = sorted((np.sort(pack) for pack in packs), key=lambda pack: pack[0])
    sizes = [len(pack) for pack in packs]
    return Epoch(np.concatenate([order[:0], *packs]), np.concatenate(([0], np.cumsum(sizes, dtype=np.int64))))


@dataclass(frozen=True)
class Place:
    """Where a step lies: `packs` [first, last) of `epoch`."""

    epoch: int
    first: int
    last: int


class Plan:
    """All steps of a run over documents with lengths (n,) and `targets` (n,) trained tokens each.

    The last step of an epoch may be short; it is trained like any other, and no step spans two epochs.
    """

    def __init__(self, lengths: Array, targets: Array, *, seq_len: int, packs_per_step: int, epochs: int,
                 max_steps: int | None = None, seed: int = 0, shuffle: bool = True, weights: Array | None = None):
        self.lengths, self.targets, self.weights = lengths, targets, weights
        self.seq_len, self.packs_per_step = seq_len, packs_per_step
        self.seed, self.shuffle = seed, shuffle
        self._first_step = [0]  # of each epoch
        while len(self._first_step) <= epochs and (max_steps is None or self._first_step[-1] < max_steps):
            packs = len(self.epoch(len(self._first_step) - 1))
            self._first_step.append(self._first_step[-1] - (-packs // packs_per_step))
        self.total_steps = self._first_step[-1] if max_steps is None else min(max_steps, self._first_step[-1])
        if not self.total_steps:
            raise UserError(f"no document is left of {len(lengths)}: the weights of the sources in data.train are too "
                            "small")

    @lru_cache(maxsize=2)  # noqa: B019 (a plan lives as long as its run)
    def epoch(self, epoch: int) -> Epoch:
        """The packs of epoch `epoch` (from 0)."""
        return pack_epoch(self.lengths, seq_len=self.seq_len, seed=self.seed, epoch=epoch, shuffle=self.shuffle,
                          weights=self.weights)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; later ones may differ by a step, since they pack other windows."""
        return self._first_step[1]

    def place(self, step: int) -> Place:
        """Epoch and packs of `step` (from 0)."""
        epoch = int(np.searchsorted(self._first_step, step, side="right")) - 1
        first = (step - self._first_step[epoch]) * self.packs_per_step
        return Place(epoch, first, min(first + self.packs_per_step, len(self.epoch(epoch))))

    def documents(self, step: int) -> list[Array]:
        """The document indices of each pack of `step`."""
        place = self.place(step)
        epoch = self.epoch(place.epoch)
        return [epoch.pack(i) for i in range(place.first, place.last)]

    def fill(self) -> float:
        """Share of the first epoch's packs that is tokens."""
        epoch = self.epoch(0)
        return float(self.lengths[epoch.documents].sum() / (len(epoch) * self.seq_len))
