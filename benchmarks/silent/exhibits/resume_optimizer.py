"""A resumed run has lost the optimizer's state.

The weights are back, the moments are not: the first steps after a resume are as long as those of a new run, and the
loss jumps. Reported: Megatron-Bridge#4565, torchtitan#1136, OpenTau#185 (masters rebuilt from bf16).
"""

from dataclasses import replace

from silent import oracle
from silent.measure import moved
from silent.world import Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "lose_moments", "share of the way"
DATA = (said("Who mends the lantern at night?", "The keeper does, with copper wire and patience."),)
JOB = Job(DATA, steps=6, lr=1e-3, eps=1e-8, stop=3)


def look(trainer: Trainer, world: World) -> Verdict:
    """Six steps in one go against three and three; the data are one conversation, so their order is no matter."""
    start = oracle.load(world.model())[0]
    resumed, straight = (oracle.load(trainer.train(job, world).folder)[0] for job in (JOB, replace(JOB, stop=0)))
    size = moved(straight, resumed) / moved(start, straight)
    text = "bit for bit the uninterrupted run" if size == 0 else f"ends {size:.2%} of the way beside that run"
    return judged(size, text, limit=1e-4)
