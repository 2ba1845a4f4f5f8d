"""Truncation removes the answer.

A question fills the row, and the answer is cut away: the row costs a forward pass and teaches nothing, or divides by
zero. Reported: trl#6025, mended by #6320; trl PR#3449, unsloth#2904.
"""

from silent.world import IGNORED, Job, Trainer, Verdict, World, judged, said, words

FAULT, UNIT = "keep_empty", "rows"
WARNING = r"fully masked|nothing to train|no trained"
DATA = (said("Is the bridge open?", "Yes."), said(words(80), "Green."), said(words(90, 3), "Because."))


def look(trainer: Trainer, world: World) -> Verdict:
    """Count the rows without a trained token, in rows of one conversation and in packs."""
    found = [trainer.rows(Job(DATA, length=64, packing=packing), world) for packing in (False, True)]
    empty = [sum(all(label == IGNORED for label in row.labels[1:]) for row in rows) for rows in found]
    return judged(max(empty), f"conversations without a trained token: {empty[0]} of {len(found[0])}, in packs "
                              f"{empty[1]} of {len(found[1])}; 2 of 3 records are too long")
