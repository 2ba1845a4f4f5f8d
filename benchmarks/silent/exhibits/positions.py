"""Positions run on through a pack.

Rotary positions are relative, so in exact arithmetic an offset changes nothing while conversations are isolated. What
it changes is rounding: bf16 has eight bits and cannot tell position 257 from 256, so if angles are computed in it, what
lies late in a pack is read as if several tokens stood in one place. Position tables beyond the base's longest context
are the other way to see it. Reported: transformers PR#29285 (the rounding).
"""

from silent.measure import gradient_of_step
from silent.world import Job, Trainer, Verdict, World, said, words

FAULT, UNIT = "positions", "share of the gradient"
DATA = tuple(said(words(20 + i, 3 * i), words(25, 7 * i)) for i in range(24))


def look(trainer: Trainer, world: World) -> Verdict:
    """One step on a pack of some 1,500 tokens, against the conversations alone."""
    return gradient_of_step(trainer, world, Job(DATA, length=2048, packing=True))
