"""A resumed run replays data, or skips some.

After a crash in the middle of an epoch the order is drawn anew, or begins at its start, or the rest is skipped. The
loss looks better than before, because the model has seen the answers. Reported: axolotl#2229, ms-swift#10050,
verl#7401, accelerate PR#4233, open-instruct#1823 (a flag that nobody read).
"""

from silent.measure import passes, right_rows
from silent.world import WORDS, Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "replay", "documents"
DATA = tuple(said(" ".join(WORDS[5 * i : 5 * i + 5] * 5), " ".join(WORDS[5 * i : 5 * i + 5])) for i in range(6))
JOB = Job(DATA, steps=None, lr=1.0, eps=1000.0, betas=(0.0, 0.0), shuffle=True, stop=3)


def look(trainer: Trainer, world: World) -> Verdict:
    """An epoch of six steps, stopped after three and resumed: how often was each document trained?"""
    found = passes(trainer.train(JOB, world).folder, world, JOB, right_rows(trainer, world, DATA))
    # Each step's learning rate should be found on one document. With a constant rate these are numbers of passes.
    due = sorted(trainer.rates(6))
    wrong = sum(abs(a - b) > 0.2 * max(b, 0.5) for a, b in zip(sorted(found), due, strict=True))
    shown = " ".join(f"{x:.1f}" for x in sorted(found)).replace(".0", "")
    due_text = " ".join(f"{x:.1f}" for x in due).replace(".0", "")
    return judged(wrong, f"passes over the six documents: {shown}, right {due_text}")
