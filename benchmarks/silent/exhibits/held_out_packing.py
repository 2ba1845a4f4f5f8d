"""Packing changes the held-out loss.

The held-out set is packed as the training set is, and its conversations see each other or are averaged by pack, so the
same model has another loss. Reported: axolotl#3465, LLaMA-Factory#8277 (three times the loss).
"""

from silent.exhibits import held_out_batches, leak
from silent.measure import UNEVEN
from silent.world import Trainer, Verdict, World

FAULT, UNIT = "leak", "nats"


def look(trainer: Trainer, world: World) -> Verdict:
    """The held-out loss over packs of several conversations."""
    return held_out_batches.look(trainer, world, leak.DATA + UNEVEN, packing=True, length=128)
