"""Weight decay pulls the norms' gains towards 0.

A gain of 1 is where a norm belongs; decay has no business there, and yet `AdamW(model.parameters())` decays it. What
the field agreed on (GPT-3, Llama recipes, `Trainer`) is to decay matrices only.
"""

from silent import oracle
from silent.world import Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "decay_all", "share of the decay"
DATA = (said("Is the bridge open?", "Yes."),)


def look(trainer: Trainer, world: World) -> Verdict:
    """One step with decay and one without; what differs is the decay."""
    lr, decay = 1e-2, 0.5
    ends = [oracle.load(trainer.train(Job(DATA, lr=lr, eps=1e-8, decay=d), world).folder)[0] for d in (0.0, decay)]
    start = oracle.load(world.model())[0]
    shares = {}
    for group, wanted in (("norms", True), ("matrices", False)):
        names = [name for name in start if ("norm" in name) == wanted]
        full = sum(float(start[name].abs().sum()) for name in names) * lr * decay
        shares[group] = sum(float((ends[0][name] - ends[1][name]).abs().sum()) for name in names) / full
    if shares["matrices"] < 0.9:
        return Verdict("wrong", f"matrices have {shares['matrices']:.2f} of the decay", 1 - shares["matrices"])
    return judged(shares["norms"], f"norms have {shares['norms']:.2f} of the decay, matrices {shares['matrices']:.2f}",
                  limit=0.01)
