"""A micro-batch without a trained token gives NaN, or counts as a loss of 0.

One of the two conversations of the step has lost its answer to truncation. The mean over its zero tokens is NaN, and
the weights are gone; or it is taken for 0, and the gradient of the other one is halved. Right is the other one alone.
Reported: trl#6668, #3927, verl#785, unsloth#2095, #2900, nanochat PR#803.
"""

from silent.measure import gradient_of_step
from silent.world import Job, Trainer, Verdict, World, said, words

FAULT, UNIT = "keep_empty mean_of_means", "share of the gradient"
DATA = (said(words(30), "The keeper does, with copper wire and patience."), said(words(80), "Green."))


def look(trainer: Trainer, world: World) -> Verdict:
    """One step over two micro-batches."""
    return gradient_of_step(trainer, world, Job(DATA, accumulate=2), DATA[:1])
