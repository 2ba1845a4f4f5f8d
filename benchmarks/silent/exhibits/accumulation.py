"""Gradient accumulation averages averages.

Each micro-batch is divided by its own tokens, then by their number. A token of a short answer weighs more, and the same
data with another micro-batch size trains another model. Reported: trl#2604, transformers#35203, PR#34191,
nanochat PR#400.
"""

from silent.measure import UNEVEN, gradient_of_step
from silent.world import Job, Trainer, Verdict, World

FAULT, UNIT = "mean_of_means", "share of the gradient"


def look(trainer: Trainer, world: World) -> Verdict:
    """One step over two micro-batches, one with a short answer and one with a long one."""
    return gradient_of_step(trainer, world, Job(UNEVEN, accumulate=2))
