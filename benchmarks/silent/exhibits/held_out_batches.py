"""The held-out loss depends on the size of its batches.

It is the mean over batches of means over tokens, so the figure that chooses a checkpoint depends on how the data are
cut. Reported: transformers#39241; #35078 (times the number of ranks).
"""

from silent import oracle
from silent.measure import UNEVEN, right_rows
from silent.world import CannotError, Job, Trainer, Verdict, World, judged

FAULT, UNIT = "eval_batches", "nats"


def look(trainer: Trainer, world: World, data: tuple[dict, ...] = UNEVEN, packing: bool = False,
         length: int = 76) -> Verdict:
    """The held-out loss that the trainer prints for the base, against the mean over all trained tokens."""
    right = float(oracle.mean_loss(right_rows(trainer, world, data), *oracle.load(world.model())))
    run = trainer.train(Job(data, held_out=data, lr=0.0, packing=packing, length=length), world)
    if not run.held_out:
        raise CannotError("prints no held-out loss")
    off = abs(run.held_out[0] - right)
    return judged(off, f"held-out loss {run.held_out[0]:.4f}, right {right:.4f}", limit=1e-3)
