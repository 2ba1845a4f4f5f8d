"""How often a document is seen: weights of sources, replay, and what is held out.

A weight is a number of passes over a source in each epoch, counted in tokens: with 2.3 every document comes twice, and
then documents drawn at random until 30% of the source's tokens have come once more. The draw is made anew in each
epoch, from the epoch's own random numbers. Independent draws for each document would be simpler, but of 300 documents
with weight 0.1 they take 30 +- 5; here the last document is chosen by its length, so that the tokens are right to
within a few, never further off than one document, and exact on average.

Replay is general text mixed in so that the model keeps what it knew (Robins 1995, "Catastrophic forgetting, rehearsal
and pseudorehearsal"): its sources' weights are scaled until their tokens are the wanted share of all tokens.

What is held out depends on a document's own text and on nothing else. So adding files, another order or another seed
never moves a document from one side to the other, and near-exact copies lie on the same side.
"""

import numpy as np

Array = np.ndarray


def copies(weights: Array, lengths: Array, random: np.random.Generator) -> Array:
    """weights (n,), lengths (n,) in tokens -> (n,) int64: how often each document comes in an epoch."""
    chance = random.random(len(weights))  # also the order in which documents are drawn
    times = np.floor(weights).astype(np.int64)
    part = weights - times
    for share in np.unique(part[part > 0]):  # once for each weight, not for each document
        group = np.flatnonzero(part == share)
        group = group[np.argsort(chance[group])]
        ends = np.cumsum(lengths[group])
        fitting = int(np.searchsorted(ends, share * ends[-1], side="right"))
        times[group[:fitting]] += 1
        rest, left = share * ends[-1] - ends[:fitting].max(initial=0), group[fitting:]
        # One more: the next longer or the next shorter (or none) than what is missing, by the chance that makes the
        # tokens exact on average.
        sizes = lengths[left]
        shorter = sizes[sizes <= rest].max(initial=0)
        longer = sizes[sizes > rest].min(initial=np.iinfo(np.int64).max)
        last = longer if random.random() * (longer - shorter) < rest - shorter else shorter
        times[left[sizes == last][:1]] += 1
    return times


def replay_weights(tokens: Array, weights: Array, replayed: Array, ratio: float) -> Array:
    """Weights (n,) with which the `replayed` (n,) sources have `ratio` of an epoch's tokens; the others keep theirs.

    tokens (n,): of each source, seen once. The replayed sources keep their weights relative to each other.
    """
    seen = tokens * weights
    if not replayed.any():
        return weights
    wanted = seen[~replayed].sum() * ratio / (1 - ratio)
    return np.where(replayed, weights * (wanted / seen[replayed].sum()), weights)


def held_out(loose: Array, fraction: float) -> Array:
    """loose (n,) uint64, a hash of each text -> (n,) booleans: the documents that are set aside for evaluation.

    A larger fraction holds out the same documents and more.
    """
    return loose < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
