"""Labels are shifted twice.

The data set shifts labels by one, and the model's loss shifts them again: each position learns the token after the
next. The loss falls all the same, because that token can be guessed too, and the model then leaves out every other
word.
"""

from silent.measure import gradient_of_step
from silent.world import Job, Trainer, Verdict, World, said

FAULT, UNIT = "double_shift", "share of the gradient"
DATA = (said("Who mends the lantern at night?", "The keeper does, with copper wire and patience."),)


def look(trainer: Trainer, world: World) -> Verdict:
    """One step on one conversation."""
    return gradient_of_step(trainer, world, Job(DATA))
