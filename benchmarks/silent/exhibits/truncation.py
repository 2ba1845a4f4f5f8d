"""Truncation removes the answer.

A question fills the row, and the answer is cut away: the row costs a forward pass and teaches nothing, or divides by
zero. Reported: trl#6025, mended by #6320; trl PR#3449, unsloth#2904.
"""

from contextlib import suppress

from silent.world import IGNORED, Job, NotApplicableError, Row, Trainer, Verdict, World, judged, said, words

FAULT, UNIT = "keep_empty", "rows"
WARNING = r"fully masked|nothing to train|no trained"
DATA = (said("Is the bridge open?", "Yes."), said(words(80), "Green."), said(words(90, 3), "Because."))


def look(trainer: Trainer, world: World) -> Verdict:
    """Count the rows without a trained token, in rows of one conversation and in packs."""
    counts = {"in rows of one": count(trainer.rows(Job(DATA, length=64), world))}
    with suppress(NotApplicableError):  # it does not pack
        counts["in packs"] = count(trainer.rows(Job(DATA, length=64, packing=True), world))
    text = "; ".join(f"{where} {empty} of {total}" for where, (empty, total) in counts.items())
    return judged(max(empty for empty, _ in counts.values()), f"conversations without a trained token: {text}; 2 of 3 "
                                                              "records are too long")


def count(rows: list[Row]) -> tuple[int, int]:
    """How many have nothing to train on, of how many."""
    return sum(all(label == IGNORED for label in row.labels[1:]) for row in rows), len(rows)
