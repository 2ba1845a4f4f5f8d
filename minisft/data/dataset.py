"""The documents of a run: those of several stores that fit, under one numbering.

A store knows nothing of a run. Which documents are too long, repeated, held out or left without an answer is decided
here, each time a run opens its data, from the index: lengths, counts of trained tokens, hashes. Only truncation and
splitting look at the documents themselves.

A plain text may be split (data.overlong = "split"). Its parts follow each other without a gap or an overlap, each a
document of its own, so the first token of a later part is not trained: nothing in its part could predict it.

    seq_len 4    <bos> a b c d e f <eos>    ->    <bos> a b c | d e f <eos>        d is lost, and counted
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from minisft.config import DataConfig
from minisft.data.store import Report, Store
from minisft.errors import UserError

Array = np.ndarray


@dataclass
class SourceReport(Report):
    """What became of a file in a run: its own report, counted anew for the documents that the run keeps."""

    split: int = 0  # texts that became several documents
    parts: int = 0  # those documents
    near_duplicates: int = 0  # documents that differ from an earlier one in case, space and punctuation only
    weighted_tokens: int = 0  # trained tokens with a weight other than 1 in the loss
    longest: int = 0
    median: float = 0.0
    also_trained: int = 0  # held-out documents that are in the training data too, exactly or nearly


class Dataset:
    """The documents of several stores that fit a run, under one numbering, none longer than data.seq_len. Repetitions
    of an earlier document that fits, in any of the stores, are counted, and left out if data.dedup says so. `held_out`
    marks documents (one array of booleans for each store) that are left out; with `only_held_out` they are the only
    ones kept. Raises UserError if a document is too long and data.overlong is "error", or if nothing is left."""

    def __init__(self, stores: list[Store], data: DataConfig, *, held_out: list[Array] | None = None,
                 only_held_out: bool = False, purpose: str = "to train on"):
        self.stores = stores
        self.reports = [SourceReport(**asdict(store.report)) for store in stores]
        held_out = held_out or [np.zeros(len(store), dtype=bool) for store in stores]
        for store, report, held in zip(stores, self.reports, held_out, strict=True):
            if only_held_out:  # the report of the other side has what was left out before the split
                report.read, report.skipped, report.changed, report.examples = int(held.sum()), {}, {}, {}
                report.unread, report.odd = {}, {}
            else:
                _skip(store, report, "held out", held)
        wanted = held_out if only_held_out else [~held for held in held_out]
        left_out = data.overlong in ("drop", "split")  # then a near copy of what is too long stays
        fit = [mask & ~(_too_long(store, data) & left_out) for store, mask in zip(stores, wanted, strict=True)]
        exactly = _repeated([store.hashes for store in stores], fit)
        nearly = _repeated([store.near_duplicate_hashes for store in stores], fit)
        fitting = []
        for store, report, mask, exact, near in zip(stores, self.reports, wanted, exactly, nearly, strict=True):
            near &= ~exact
            report.duplicates, report.near_duplicates = int(exact.sum()), int(near.sum())
            repeats = [("duplicate", exact), ("near duplicate", near)]
            for reason, repeated in repeats[: ("none", "exact", "near").index(data.dedup)]:
                _skip(store, report, reason, repeated)
                mask = mask & ~repeated
            fitting.append(_fit(store, report, mask, data))
        self.store_of = np.concatenate([np.full(len(kept), i) for i, (kept, *_) in enumerate(fitting)])  # (n,)
        (self.index_in_store, self.starts, self.digests, self.lengths, self.num_loss_tokens,  # each (n,)
         self.loss_weights,  # (n,), as in Store
         self.too_long) = map(np.concatenate, zip(*fitting, strict=True))  # (m,) the lengths of those over seq_len
        if not len(self.lengths) and not only_held_out:
            raise UserError(f"no conversation is left {purpose}:{self.reasons()}")

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> tuple[Array, Array]:
        """Token ids (L,) and loss weights (L,) of a document, as in Store."""
        store, inside, length = self.stores[self.store_of[index]], self.index_in_store[index], int(self.lengths[index])
        if self.digests[index]:
            return store.part(inside, int(self.starts[index]), length, self.digests[index])
        ids, weights = store.document(inside)
        return ids[:length], weights[:length]

    @property
    def target_weight(self) -> float | None:
        """The sum of the loss weights of all tokens; None if all are 0 or 1, so that they only count trained tokens."""
        return float(self.loss_weights.sum()) if self.loss_weights.dtype == np.float64 else None

    def keep(self, tokens: int, seed: int) -> None:
        """Keep documents of at most so many tokens in all, at least one, drawn by `seed`. The reports stay."""
        drawn = np.random.default_rng([seed, len(self)]).permutation(len(self))
        fits = np.cumsum(self.lengths[drawn]) <= tokens
        kept = np.sort(drawn[: max(int(fits.sum()), 1)])
        for name in ("store_of", "index_in_store", "starts", "digests", "lengths", "num_loss_tokens", "loss_weights"):
            setattr(self, name, getattr(self, name)[kept])

    def origin(self, index: int) -> tuple[str, int]:
        """File and line that a document came from."""
        return self.stores[self.store_of[index]].origin(self.index_in_store[index])

    def per_source(self, figures: Array, documents: Array | slice = slice(None)) -> Array:
        """(stores,) int64: the sum of `figures` (n,), over all documents or over `documents` (m,), for each source."""
        return np.bincount(self.store_of[documents], weights=figures[documents],
                           minlength=len(self.stores)).astype(np.int64)

    def near_duplicate_hashes(self) -> Array:
        """(n,) uint64: equal for documents that are nearly the same."""
        kept = np.split(self.index_in_store, np.searchsorted(self.store_of, range(1, len(self.stores))))
        return np.concatenate([store.near_duplicate_hashes[i] for store, i in zip(self.stores, kept, strict=True)])

    def reasons(self, of: Array | None = None) -> str:
        """Why nothing is left of each empty file (only those marked in `of`, (stores,) booleans, if given), one per
        line, and the remedy."""
        lines, reports = "", [r for i, r in enumerate(self.reports) if not r.kept and (of is None or of[i])]
        for report in reports:
            why = ", ".join(f"{reason}: {count} (first: {report.examples[reason]})"
                            for reason, count in report.skipped.items())
            lines += f"\n  {report.path}: {report.read} read; {why or 'the file is empty'}"
        if any("over length" in report.skipped for report in reports):
            lines += ("\n  remedy for documents over length: raise data.seq_len, write shorter records, or pass "
                      "--data.overlong truncate, which keeps the beginning of each; split keeps plain text, in parts")
        return lines


def _repeated(hashes: list[Array], wanted: list[Array]) -> list[Array]:
    """For each store (documents,) booleans: True if a wanted document has the hash of an earlier wanted one."""
    repeated = np.concatenate(wanted)
    candidates = np.flatnonzero(repeated)
    first = np.unique(np.concatenate(hashes)[candidates], return_index=True)[1]
    repeated[candidates[first]] = False
    return np.split(repeated, np.cumsum([len(mask) for mask in wanted])[:-1])


def _skip(store: Store, report: SourceReport, reason: str, documents: Array) -> None:
    if len(found := np.arange(len(store))[documents]):
        report.count(report.skipped, reason, "{}:{}".format(*store.origin(found[0])), len(found))


def _too_long(store: Store, data: DataConfig) -> Array:
    """(documents,) booleans: those longer than data.seq_len that are not split. Only a text, of one turn, ever is."""
    long = np.diff(store.offsets) > data.seq_len
    return long & (store.turns != 1) if data.overlong == "split" else long


def _fit(store: Store, report: SourceReport, wanted: Array, data: DataConfig) -> tuple[Array, ...]:
    """Indices, first tokens, hashes (0 for a whole document), lengths, trained tokens and their weights of what a run
    keeps of the wanted documents, and the lengths of those that were too long. `report` is updated."""
    lengths, num_loss_tokens = np.diff(store.offsets), store.num_loss_tokens.copy()
    loss_weights, weighted_tokens = store.loss_weights.copy(), store.weighted_tokens
    wanted_loss_tokens = int(num_loss_tokens[wanted].sum())
    is_long = _too_long(store, data)
    split, long = (np.flatnonzero(wanted & mask) for mask in ((lengths > data.seq_len) & ~is_long, is_long))
    too_long = lengths[long]
    if len(long) and data.overlong == "error":
        raise UserError("{}:{}".format(*store.origin(long[0])) + f": {too_long[0]} tokens, but data.seq_len is "
                        f"{data.seq_len} ({len(long)} conversations are too long, the longest has {too_long.max()}); "
                        'raise data.seq_len, or pass data.overlong = "drop", "truncate" or "split"')
    if data.overlong == "truncate":
        for i in long.tolist():
            weights = store.document(i)[1][: data.seq_len]
            lengths[i], num_loss_tokens[i], loss_weights[i] = data.seq_len, np.count_nonzero(weights), weights.sum()
            weighted_tokens[i] = np.count_nonzero(weights) - np.count_nonzero(weights == 1)
        untrained = long[num_loss_tokens[long] == 0]
        _skip(store, report, "answer beyond the length", untrained)
        report.truncated = len(long) - len(untrained)
    else:
        _skip(store, report, "over length", long)
    kept = np.flatnonzero(wanted & (lengths <= data.seq_len) & (num_loss_tokens > 0))
    lengths, num_loss_tokens, loss_weights = lengths[kept], num_loss_tokens[kept], loss_weights[kept]
    starts, digests = np.zeros_like(kept), np.zeros(len(kept), np.uint64)
    if parts := [part for i in split.tolist() for part in _parts(store, i, data.seq_len)]:
        whole = kept, starts, digests, lengths, num_loss_tokens, loss_weights
        together = [np.append(one, np.array(new, one.dtype)) for one, new in zip(whole, zip(*parts, strict=True),
                                                                                 strict=True)]
        kept, starts, digests, lengths, num_loss_tokens, loss_weights = (
            one[np.argsort(together[0], kind="stable")] for one in together)  # in the file's order
        report.split, report.parts = len(split), len(parts)
    report.kept, report.turns = len(kept), int(store.turns[kept].sum())
    report.tokens, report.target_tokens = int(lengths.sum()), int(num_loss_tokens.sum())
    report.weighted_tokens = int(np.minimum(weighted_tokens[kept], num_loss_tokens).sum())  # a text's are all alike
    report.lost_target_tokens = wanted_loss_tokens - report.target_tokens
    report.largest_id = int(store.largest[kept].max(initial=0))
    report.longest, report.median = int(lengths.max(initial=0)), float(np.median(lengths)) if len(kept) else 0.0
    return kept, starts, digests, lengths, num_loss_tokens, loss_weights, too_long


def _parts(store: Store, index: int, seq_len: int) -> Iterator[tuple[int, int, int, int, int, float]]:
    """(index, first token, hash, tokens, trained tokens, the sum of their weights) of each part of a text: seq_len
    tokens, in the last one the rest. A rest of one token could not be trained on, so the part before it leaves it
    another."""
    ids, weights = store.document(index)
    bounds = [*range(0, len(ids), seq_len), len(ids)]
    bounds[-2] -= bounds[-1] - bounds[-2] == 1
    for start, stop in pairwise(bounds):
        if trained := int(np.count_nonzero(weights[start + 1 : stop])):
            yield (index, start, store.part_hash(index, start, stop - start), stop - start, trained,
                   float(weights[start + 1 : stop].sum()))
