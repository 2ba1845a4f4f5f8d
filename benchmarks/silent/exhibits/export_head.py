"""The export has lost the head, or tied what was not.

Some Llamas tie the head to the embedding (3.2 1B, 3B), others do not, and a converter takes one for the other. The
folder loads, and the head is random or the embedding. Reported: torchtune#2048, #945 (others could not load it).
"""

from silent import oracle
from silent.measure import UNEVEN, right_rows
from silent.world import CannotError, Job, Trainer, Verdict, World, judged

FAULT, UNIT = "head_lost", "nats"


def look(trainer: Trainer, world: World) -> Verdict:
    """The held-out loss that the trainer printed at the end, against that of its export, tied and untied."""
    worst, texts = 0.0, []
    for model in ("base", "tied"):
        run = trainer.train(Job(UNEVEN[1:], model=model, held_out=UNEVEN[1:], lr=1e-2), world)
        if not run.held_out:
            raise CannotError("prints no held-out loss")
        try:
            weights, config = oracle.load(run.folder)
        except KeyError as error:
            return Verdict("wrong", f"{model}: {error}", float("nan"))
        found = float(oracle.mean_loss(right_rows(trainer, world, UNEVEN[1:]), weights, config))
        off = abs(found - run.held_out[-1])
        worst = off if not off <= worst else worst
        texts.append(f"{model}: printed {run.held_out[-1]:.4f}, its export has {found:.4f}")
    return judged(worst, "; ".join(texts), limit=2e-3)
