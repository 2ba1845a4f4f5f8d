"""Padding is recognised by its id, and the stop token has the same.

The tokenizer has no padding token, so the script sets it to EOS; the collator then ignores every label that equals it,
and with the padding goes the stop token of each answer. Reported: unsloth#416, trl#1623, PR#3091.
"""

from silent.measure import gradient_of_step
from silent.world import Job, Trainer, Verdict, World, said

FAULT, UNIT = "pad_by_id", "share of the gradient"
DATA = (said("Is the bridge open?", "Yes."),
        said("Why does the kettle sing?", "Because the steam is in a hurry to leave."))


def look(trainer: Trainer, world: World) -> Verdict:
    """One step on a batch of two rows, the shorter one padded."""
    return gradient_of_step(trainer, world, Job(DATA, model="pad_is_eos", rows=2))
