"""The last, short window of an epoch is divided as a full one.

Three rows in windows of two: the last window has one row and is divided by two, so its update is half of what it should
be. All three rows are equal here, so every step should move the weights equally. Reported: ms-swift PR#10084,
LLaMA-Factory#10705.
"""

from silent import oracle
from silent.measure import finite, right_rows
from silent.world import Job, Trainer, Verdict, World, judged, said, words

FAULT, UNIT = "short_tail", "share of an update"
DATA = (said(words(20), "The keeper does, with copper wire and patience."),) * 3
JOB = Job(DATA, accumulate=2, steps=None, lr=1.0, eps=100.0, betas=(0.0, 0.0))


def look(trainer: Trainer, world: World) -> Verdict:
    """One epoch of two steps; the update of the second is what is left when that of the first is taken away."""
    start, config = oracle.load(world.model())
    rows = right_rows(trainer, world, DATA[:1])
    run = trainer.train(JOB, world)
    end = oracle.load(run.folder)[0]
    if not finite(end):
        return Verdict("wrong", "weights are not finite", float("nan"))

    def update(weights: oracle.Weights, rate: float) -> oracle.Weights:
        return {k: rate * JOB.lr * g / (g.abs() + JOB.eps) for k, g in oracle.gradient(rows, weights, config).items()}

    rates = trainer.rates(2)
    first = update(start, rates[0])
    second = update({name: start[name] - first[name] for name in start}, rates[1])
    left = {name: start[name] - first[name] - end[name] for name in start}
    share = sum(float((left[k] * second[k]).sum()) for k in second) / oracle.length(second) ** 2
    return judged(abs(share - 1), f"the last step moved the weights {share:.2f} times as far as it should", limit=0.02)
