"""Conversations in a pack see each other.

Packed rows are one causal sequence, so each conversation is read as the continuation of strangers. It depends on the
attention backend: some ignore the boundaries with a warning, some silently. Reported: trl#805, #3067,
LLaMA-Factory#2289, axolotl#3796 (sdpa and eager, mended), transformers PR#46634 (a mask of ones turns detection off).
"""

from silent.measure import gradient_of_step
from silent.world import Job, Trainer, Verdict, World, said

FAULT, UNIT = "leak", "share of the gradient"
WARNING = r"attend|attention.*pack|pack.*attention|contaminat"
DATA = (said("Is the bridge open?", "Yes."), said("Please name a colour.", "Green."),
        said("Why does the kettle sing?", "Because the steam is in a hurry to leave."),
        said("How many steps has the ladder?", "Nineteen, and one is broken."))


def look(trainer: Trainer, world: World) -> Verdict:
    """One step on one pack of four conversations, against the four alone."""
    return gradient_of_step(trainer, world, Job(DATA, length=128, packing=True))
