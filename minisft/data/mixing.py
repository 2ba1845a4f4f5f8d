"""How often a document is seen: weights of sources, replay, and what is held out.

A weight is a number of passes over a source in each epoch: with 2.3 every document comes twice, and a sample of 30%
once more, drawn anew in each epoch from the epoch's own random numbers. Each document is in it with exactly that
chance, however long it is, and the tokens are right to within one document, the longest. Drawing each by itself would
have the first alone: of 300 documents with weight 0.1 it takes 30 +- 5.

Replay is general text mixed in so that the model keeps what it knew (Robins 1995, "Catastrophic forgetting, rehearsal
and pseudorehearsal"): its sources' weights are scaled until their tokens are the wanted share of all tokens.

What is held out depends on a document's own text and on nothing else. So adding files, another order or another seed
never moves a document from one side to the other, and near-exact copies lie on the same side.
"""

import numpy as np

Array = np.ndarray


def copies(weights: Array, lengths: Array, random: np.random.Generator) -> Array:
    """weights (n,), lengths (n,) in tokens -> (n,) int64: how often each document comes in an epoch."""
    times = np.floor(weights).astype(np.int64)
    part = weights - times
    for share in np.unique(part[part > 0]).tolist():  # once for each weight
        group = random.permutation(np.flatnonzero(part == share))
        times[_sample(group[np.argsort(-lengths[group], kind="stable")], share, random)] += 1
    return times


def _sample(documents: Array, share: float, random: np.random.Generator) -> list[int]:
    """Some of `documents` (n,), each with the chance `share`; of the first k always k * `share`, rounded up or down.

    So with the longest first, and lengths l, the tokens are off by the sum of (chosen of first k - k * share) *
    (l[k] - l[k+1]), which is less than l[0]. The pivotal method (Deville and Tille 1998, "Unequal probability sampling
    without replacement through a splitting method"): two documents play for the sum of their chances. Below 1 the
    winner has all of it and the loser none; from 1 on the winner is chosen, and the loser keeps what is over.
    """
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
