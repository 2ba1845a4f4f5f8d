"""What the exhibits have in common: which tokens are trained, and the gradient of a step read from the weights."""

import difflib
import math
from collections import Counter

import torch

from silent import oracle
from silent.oracle import Token
from silent.world import IGNORED, Job, Row, Trainer, Verdict, World, judged, said, words

SMALL = 2e-3  # a gradient in fp32 that is off by less than this is right; each fault is off by a hundred times more
# Two conversations of about 50 tokens: 2 are trained in the first, 36 in the second.
UNEVEN = (said(words(34), "Green"), said("Yes", words(35, 11)))


def matched(row: Row, document: list[Token]) -> list[tuple[int, Token]]:
    """(label, what the token is) of each token of a row that the document has too. A BOS too many does not disturb."""
    blocks = difflib.SequenceMatcher(None, row.ids, [t.id for t in document], autojunk=False).get_matching_blocks()
    return [(row.labels[a + i], document[b + i]) for a, b, n in blocks for i in range(n)]


def trained_by(row: Row, document: list[Token], what) -> Counter:
    """Counter({(what(token), trained?): tokens}) over the tokens of a row."""
    return Counter((what(token), label != IGNORED) for label, token in matched(row, document))


def only_row(trainer: Trainer, world: World, record: dict, *, length: int = 256) -> Row:
    """The one row of a record."""
    found = trainer.rows(Job((record,), length=length), world)
    assert len(found) == 1, f"{len(found)} rows of one record"
    return found[0]


def right_rows(trainer: Trainer, world: World, records: tuple[dict, ...]) -> list[Row]:
    """The rows of `records`: the oracle's, or the trainer's if it has a format of its own."""
    return trainer.rows(Job(records, length=4096), world) if trainer.own_format else oracle.rows(records,
                                                                                                 world.tokenizer)


def gradient_of_step(trainer: Trainer, world: World, job: Job, records: tuple[dict, ...] = ()) -> Verdict:
    """Run the one step of `job`, and compare the gradient, which its update tells, with that of its `records` alone."""
    right = right_rows(trainer, world, records or job.data)
    weights, config = oracle.load(world.model(job.model))
    run = trainer.train(job, world)
    told = oracle.gradient_told(weights, oracle.load(run.folder)[0], lr=job.lr, eps=job.eps)
    expected = oracle.gradient(right, weights, config)
    size, loss = oracle.distance(told, expected), float(oracle.mean_loss(right, weights, config))
    length = oracle.length(told) / oracle.length(expected)
    printed = f"{run.losses[0]:.4f}" if run.losses else "not printed"
    text = f"gradient off by {size:.2%} (its length is {length:.3f} of the right one); loss {printed}, right {loss:.4f}"
    if size <= SMALL and run.losses and not abs(run.losses[0] - loss) <= SMALL:
        return Verdict("wrong", text, None if math.isfinite(run.losses[0]) else run.losses[0])  # it is only printed
    return judged(size, text, limit=SMALL)


def unique_tokens(rows: list[Row]) -> list[list[int]]:
    """For each row the ids that no other row has."""
    count = Counter(i for row in rows for i in set(row.ids))
    return [sorted(i for i in set(row.ids) if count[i] == 1) for row in rows]


def passes(run_folder, world: World, job: Job, rows: list[Row]) -> list[float]:
    """How often each row was trained on, in a run of one row a step with AdamW's betas 0 and a large eps.

    Its own tokens' embeddings move by lr g / (|g| + eps) each time, and no other row moves them.
    """
    before = oracle.load(world.model(job.model))
    after, name = oracle.load(run_folder)[0], "model.embed_tokens.weight"
    found = []
    for row, own in zip(rows, unique_tokens(rows), strict=True):
        assert own, "a row without a token of its own"
        g = oracle.gradient([row], *before)[name][own]
        once, moved_ = job.lr * g / (g.abs() + job.eps), (before[0][name] - after[name])[own]
        found.append(float((once * moved_).sum() / once.pow(2).sum()))
    return found


def moved(before: oracle.Weights, after: oracle.Weights) -> float:
    """The length of the difference."""
    return oracle.length(oracle.difference(after, before))


def finite(weights: oracle.Weights) -> bool:
    """Is every weight a number?"""
    return all(bool(torch.isfinite(weight).all()) for weight in weights.values())
