"""A resumed run replays data, or skips some.

After a crash in the middle of an epoch the order is drawn anew, or begins at its start, or the rest is skipped. The loss
looks better than before, because the model has seen the answers. Reported: axolotl#2229, ms-swift#10050, verl#7401,
accelerate PR#4233, open-instruct#1823 (a flag that nobody read).
"""

from silent import oracle
from silent.measure import passes
from silent.world import WORDS, Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "replay", "documents"
DATA = tuple(said(" ".join(WORDS[5 * i : 5 * i + 5] * 5), " ".join(WORDS[5 * i : 5 * i + 5])) for i in range(6))
JOB = Job(DATA, steps=None, lr=1e-2, betas=(0.0, 0.0), shuffle=True, stop=3)


def look(trainer: Trainer, world: World) -> Verdict:
    """An epoch of six steps, stopped after three and resumed: how often was each document trained?"""
    run = trainer.train(JOB, world)
    found = passes(run.folder, world, JOB, oracle.rows(DATA, world.tokenizer))
    counts = [round(x) for x in found]
    return judged(sum(abs(count - 1) for count in counts), f"passes over the six documents: {sorted(counts)}")
