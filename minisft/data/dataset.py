"""The documents of a run: those of several stores that fit, numbered through.

A store knows nothing of a run. What is too long, what is a repetition and what is left without an answer is decided
here, each time a run opens its data, from the index alone: lengths, counts of trained tokens and hashes. The texts are
not touched.
"""

from dataclasses import asdict

import numpy as np

from minisft.data.store import Report, Store
from minisft.errors import UserError

Array = np.ndarray

OVERLONG = ("drop", "truncate", "error")


class Dataset:
    """The documents of several stores that fit a run: numbered through, none over `seq_len` tokens.

    Exact repetitions, of an earlier document of any of the stores, are counted, and left out with `dedup`. Raises
    UserError where a document is too long and `overlong` is "error", or where nothing is left to train on.
    """

    def __init__(self, stores: list[Store], *, seq_len: int, overlong: str = "drop", dedup: bool = False):
        self.stores = stores
        self.reports = [Report(**asdict(store.report)) for store in stores]
        fitting = [_fit(store, report, repeated, seq_len, overlong, dedup)
                   for store, report, repeated in zip(stores, self.reports, _repeated(stores), strict=True)]
        self.store_of = np.concatenate([np.full(len(kept), i) for i, (kept, _, _) in enumerate(fitting)])  # (n,)
        self.index_in_store = np.concatenate([kept for kept, _, _ in fitting])  # (n,)
        self.lengths = np.concatenate([lengths for _, lengths, _ in fitting])  # (n,)
        self.targets = np.concatenate([targets for _, _, targets in fitting])  # (n,)
        if not len(self.lengths):
            raise UserError(f"no conversation is left to train on:{self._reasons()}")

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (L,) and mask (L,) of a document."""
        store = self.stores[self.store_of[index]]
        start = int(store.offsets[self.index_in_store[index]])
        stop = start + int(self.lengths[index])
        return store.tokens[start:stop], store.trained[start:stop]

    def origin(self, index: int) -> tuple[str, int]:
        """File and line that a document came from."""
        store = self.stores[self.store_of[index]]
        return store.report.path, int(store.lines[self.index_in_store[index]])

    def _reasons(self) -> str:
        parts = []
        for report in self.reports:
            why = ", ".join(f"{reason}: {count} (first: {report.examples[reason]})"
                            for reason, count in report.skipped.items())
            parts.append(f"\n  {report.path}: {report.read} read; {why or 'the file is empty'}")
        return "".join(parts)


def _repeated(stores: list[Store]) -> list[Array]:
    """For each store (documents,) booleans: whether the same document came before, in it or in an earlier store."""
    hashes = np.concatenate([store.hashes for store in stores])
    repeated = np.ones(len(hashes), dtype=bool)
    repeated[np.unique(hashes, return_index=True)[1]] = False
    return np.split(repeated, np.cumsum([len(store) for store in stores])[:-1])


def _fit(store: Store, report: Report, repeated: Array, seq_len: int, overlong: str,
         dedup: bool) -> tuple[Array, Array, Array]:
    """Indices, lengths and trained tokens of the documents of `store` that a run keeps; `report` is updated."""
    lengths, targets = np.diff(store.offsets), store.targets.copy()
    report.duplicates = int(repeated.sum())
    wanted = ~repeated if dedup else np.ones(len(store), dtype=bool)
    if dedup and report.duplicates:
        report.skip("duplicate", f"{report.path}:{store.lines[np.argmax(repeated)]}", report.duplicates)
    all_targets = int(targets[wanted].sum())
    long = np.flatnonzero(wanted & (lengths > seq_len))
    if len(long) and overlong == "error":
        raise UserError(f"{report.path}:{store.lines[long[0]]}: {lengths[long[0]]} tokens, but data.seq_len is "
                        f"{seq_len} ({len(long)} conversations are too long, the longest has {lengths.max()}); raise "
                        'data.seq_len, or pass data.overlong = "drop" or "truncate"')
    if overlong == "truncate":
        for i in long:
            start = store.offsets[i]
            lengths[i], targets[i] = seq_len, store.trained[start : start + seq_len].sum()
    untrained = long[targets[long] == 0]
    if overlong == "drop" and len(long):
        report.skip("over length", f"{report.path}:{store.lines[long[0]]}", len(long))
    elif len(untrained):
        report.skip("answer beyond the length", f"{report.path}:{store.lines[untrained[0]]}", len(untrained))
    kept = np.flatnonzero(wanted & (lengths <= seq_len) & (targets > 0))
    report.kept = len(kept)
    report.truncated = len(long) - len(untrained) if overlong == "truncate" else 0
    report.tokens, report.target_tokens = int(lengths[kept].sum()), int(targets[kept].sum())
    report.lost_target_tokens = all_targets - report.target_tokens
    return kept, lengths[kept], targets[kept]
