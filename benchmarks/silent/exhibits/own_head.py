"""A tied model's own head is not read.

config.json says that head and embedding are one, and the file has a head that differs (a merge, a pruned model, a wrong
flag). transformers 5 uses the head in the file; a trainer that believes the flag trains another model than is served.
Right is to use it, or to refuse.
"""

from silent import oracle
from silent.measure import UNEVEN, right_rows
from silent.world import CannotError, Job, Trainer, Verdict, World, judged

FAULT, UNIT = "own_head_lost", "nats"


def look(trainer: Trainer, world: World) -> Verdict:
    """The loss of the base, as the trainer has it."""
    right = float(oracle.mean_loss(right_rows(trainer, world, UNEVEN), *oracle.load(world.model("tied_own"))))
    try:
        run = trainer.train(Job(UNEVEN, model="tied_own", rows=2, lr=0.0), world)
    except CannotError as refusal:
        return judged(0, f"refused: {refusal}")
    if not run.losses:
        raise CannotError("prints no loss")
    off = abs(run.losses[0] - right)
    return judged(off, f"loss of the base {run.losses[0]:.4f}, right {right:.4f}", limit=1e-3)
