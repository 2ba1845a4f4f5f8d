"""Ranks average averages.

Each rank divides by its own tokens, and the process group averages the gradients: the same as with accumulation, except
that the number of GPUs decides how much a token weighs. Reported: transformers#35078 (the held-out loss, times the
number of ranks).
"""

from silent.measure import UNEVEN, gradient_of_step
from silent.world import Job, Trainer, Verdict, World

FAULT, UNIT = "mean_of_ranks", "share of the gradient"


def look(trainer: Trainer, world: World) -> Verdict:
    """One step on two ranks, one with a short answer and one with a long one."""
    return gradient_of_step(trainer, world, Job(UNEVEN, ranks=2))
