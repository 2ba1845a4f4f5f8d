"""Weights are kept in bf16, and small updates vanish.

bf16 numbers near 0.1 are 5e-4 apart, so an update of 1e-6 rounds to nothing: the loss is printed, the learning rate is
printed, and the weights stand still. Right are masters in fp32. Reported: torchtune#2254, NeMo Automodel PR#3444,
OpenTau#185, axolotl#3154, PR#3894 (strict IFEval 0.52 against 0.70), accelerate#3979.
"""

from silent import oracle
from silent.measure import right_rows
from silent.world import Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "bf16_masters", "share of the weights"
WARNING = r"(bf16|bfloat16).*(update|master)"
DATA = (said("Why does the kettle sing?", "Because the steam is in a hurry to leave."),)
JOB = Job(DATA, model="bf16", steps=8, lr=1e-6, eps=1e-8, precision="bf16")


def look(trainer: Trainer, world: World) -> Verdict:
    """Eight steps at 1e-6 from a base in bf16: which of the weights that should move stood still?"""
    before, config = oracle.load(world.model("bf16"))
    g = oracle.gradient(right_rows(trainer, world, DATA), before, config)
    after = oracle.load(trainer.train(JOB, world).folder)[0]
    # A gradient well above AdamW's eps moves its weight by lr a step, whatever its size.
    due = {name: x.abs() > 1e-4 for name, x in g.items()}
    total = sum(int(x.sum()) for x in due.values())
    still = sum(int((before[name] == after[name])[due[name]].sum()) for name in due)
    way = sum(float((before[name] - after[name]).abs()[due[name]].sum()) for name in due) / total
    return judged(still / total, f"{still / total:.1%} of {total:,} weights stood still; the mean way is "
                                 f"{way / (sum(trainer.rates(JOB.steps)) * JOB.lr):.2f} of the learning rates that "
                                 "were due", limit=0.02)
