"""The documents of a run: those of several stores that fit, numbered through.

A store knows nothing of a run. What is too long, what is a repetition, what is held out and what is left without an
answer is decided here, each time a run opens its data, from the index alone: lengths, counts of trained tokens and
hashes. The texts are not touched.
"""

from dataclasses import asdict, dataclass

import numpy as np

from minisft.data.store import Report, Store
from minisft.errors import UserError

Array = np.ndarray

OVERLONG = ("drop", "truncate", "error")
DEDUP = ("none", "exact", "near")


@dataclass
class SourceReport(Report):
    """What became of a file in a run: its own report, counted anew for the documents that the run keeps."""

    near_duplicates: int = 0  # documents that differ from one before them in case, space and punctuation only
    longest: int = 0
    median: float = 0.0
    also_trained: int = 0  # held-out documents that are in the training data too, exactly or nearly


class Dataset:
    """The documents of several stores that fit a run: numbered through, none over `seq_len` tokens.

    Repetitions of an earlier document of any of the stores are counted, and left out where `dedup` says so. `held_out`
    marks documents (one array of booleans a store) that are set aside: they are left out, or are all there is with
    `only_held_out`. Raises UserError where a document is too long and `overlong` is "error", or where nothing is left
    to train on.
    """

    def __init__(self, stores: list[Store], *, seq_len: int, overlong: str = "drop", dedup: str = "none",
                 held_out: list[Array] | None = None, only_held_out: bool = False, of: str = "to train on"):
        self.stores = stores
        self.reports = [SourceReport(**asdict(store.report)) for store in stores]
        held_out = held_out or [np.zeros(len(store), dtype=bool) for store in stores]
        wanted = _side(stores, self.reports, held_out, only_held_out)
        _count_repeated(stores, self.reports, wanted, dedup)
        fitting = [_fit(*each, seq_len, overlong) for each in zip(stores, self.reports, wanted, strict=True)]
        self.store_of = np.concatenate([np.full(len(kept), i) for i, (kept, *_) in enumerate(fitting)])  # (n,)
        self.index_in_store, self.lengths, self.targets, self.too_long = map(np.concatenate, zip(*fitting, strict=True))
        # each (n,), but for too_long: (m,) the lengths of those over seq_len, as they were
        if not len(self.lengths) and not only_held_out:
            raise UserError(f"no conversation is left {of}:{self.reasons()}")

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (L,) and mask (L,) of a document."""
        ids, trained = self.stores[self.store_of[index]].document(self.index_in_store[index])
        return ids[: self.lengths[index]], trained[: self.lengths[index]]

    def origin(self, index: int) -> tuple[str, int]:
        """File and line that a document came from."""
        store = self.stores[self.store_of[index]]
        return store.report.path, int(store.lines[self.index_in_store[index]])

    def per_source(self, figures: Array, documents: Array | None = None) -> Array:
        """(stores,) int64: the sum of `figures` (n,), of all documents or of `documents` (m,), by their source."""
        sources = self.store_of if documents is None else self.store_of[documents]
        figures = figures if documents is None else figures[documents]
        return np.bincount(sources, weights=figures, minlength=len(self.stores)).astype(np.int64)

    def loose(self) -> Array:
        """(n,) uint64: equal for documents that are nearly the same."""
        kept = np.split(self.index_in_store, np.searchsorted(self.store_of, range(1, len(self.stores))))
        return np.concatenate([store.loose[i] for store, i in zip(self.stores, kept, strict=True)])

    def reasons(self, of: Array | None = None) -> str:
        """What became of each file, or of those that `of`, (stores,) booleans, marks: one a line, and what helps."""
        parts, reports = [], [r for i, r in enumerate(self.reports) if not r.kept and (of is None or of[i])]
        for report in reports:
            why = ", ".join(f"{reason}: {count} (first: {report.examples[reason]})"
                            for reason, count in report.skipped.items())
            parts.append(f"\n  {report.path}: {report.read} read; {why or 'the file is empty'}")
        if any("over length" in report.skipped for report in reports):
            parts.append("\n  remedy for what is over length: raise data.seq_len, write shorter records, or pass "
                         "--data.overlong truncate, which keeps the beginning of each")
        return "".join(parts)


def _side(stores: list[Store], reports: list[SourceReport], held_out: list[Array], only_held_out: bool) -> list[Array]:
    """For each store (documents,) booleans: the side of the held-out split that is wanted. `reports` are updated."""
    if only_held_out:  # the other side's report has what was left out before the split
        for report, held in zip(reports, held_out, strict=True):
            report.read, report.skipped, report.examples, report.unread = int(held.sum()), {}, {}, {}
        return [held.copy() for held in held_out]
    for store, report, held in zip(stores, reports, held_out, strict=True):
        _skip(store, report, "held out", held)
    return [~held for held in held_out]


def _count_repeated(stores: list[Store], reports: list[SourceReport], wanted: list[Array], dedup: str) -> None:
    """Count the wanted documents that came before, in their store or an earlier one; with `dedup` unwant them."""
    exactly = _repeated([store.hashes for store in stores], wanted)
    nearly = _repeated([store.loose for store in stores], wanted)
    for store, report, mask, exact, near in zip(stores, reports, wanted, exactly, nearly, strict=True):
        near &= ~exact
        report.duplicates, report.near_duplicates = int(exact.sum()), int(near.sum())
        if dedup in ("exact", "near"):
            _skip(store, report, "duplicate", exact)
            mask &= ~exact
        if dedup == "near":
            _skip(store, report, "near duplicate", near)
            mask &= ~near


def _repeated(hashes: list[Array], wanted: list[Array]) -> list[Array]:
    """For each store (documents,) booleans: whether a wanted document has the hash of a wanted one before it."""
    repeated = np.concatenate(wanted)
    candidates = np.flatnonzero(repeated)
    first = np.unique(np.concatenate(hashes)[candidates], return_index=True)[1]
    repeated[candidates[first]] = False
    return np.split(repeated, np.cumsum([len(mask) for mask in wanted])[:-1])


def _skip(store: Store, report: SourceReport, reason: str, documents: Array) -> None:
    """Count `documents` (booleans) as left out."""
    if documents.any():
        report.skip(reason, f"{report.path}:{store.lines[np.argmax(documents)]}", int(documents.sum()))


def _fit(store: Store, report: SourceReport, wanted: Array, seq_len: int,
         overlong: str) -> tuple[Array, Array, Array, Array]:
    """Indices, lengths and trained tokens of the wanted documents that a run keeps, and the lengths that were too long.

    `report` is updated.
    """
    lengths, targets = np.diff(store.offsets), store.targets.copy()
    all_targets = int(targets[wanted].sum())
    long = np.flatnonzero(wanted & (lengths > seq_len))
    too_long = lengths[long]
    if len(long) and overlong == "error":
        raise UserError(f"{report.path}:{store.lines[long[0]]}: {too_long[0]} tokens, but data.seq_len is {seq_len} "
                        f"({len(long)} conversations are too long, the longest has {too_long.max()}); raise "
                        'data.seq_len, or pass data.overlong = "drop" or "truncate"')
    if overlong == "truncate":
        for i in long:
            lengths[i], targets[i] = seq_len, store.document(int(i))[1][:seq_len].sum()
    untrained = long[targets[long] == 0]
    if overlong == "drop" and len(long):
        report.skip("over length", f"{report.path}:{store.lines[long[0]]}", len(long))
    elif len(untrained):
        report.skip("answer beyond the length", f"{report.path}:{store.lines[untrained[0]]}", len(untrained))
    kept = np.flatnonzero(wanted & (lengths <= seq_len) & (targets > 0))
    report.kept, report.turns = len(kept), int(store.turns[kept].sum())
    report.truncated = len(long) - len(untrained) if overlong == "truncate" else 0
    report.tokens, report.target_tokens = int(lengths[kept].sum()), int(targets[kept].sum())
    report.lost_target_tokens = all_targets - report.target_tokens
    report.largest_id = int(store.largest[kept].max(initial=0))
    report.longest = int(lengths[kept].max(initial=0))
    report.median = float(np.median(lengths[kept])) if len(kept) else 0.0
    return kept, lengths[kept], targets[kept], too_long
