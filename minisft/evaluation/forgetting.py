"""What fine-tuning makes a model forget: how far its loss on general text rises above the base model's.

    forgetting = loss now - loss at step 0, both on the same held-out general text, in nats a token

A network that learns a new task loses an old one where nothing holds it there (McCloskey & Cohen 1989, "Catastrophic
interference in connectionist networks"). 0 is the base model as it was; 0.1 is a perplexity that is 10.5% higher. What
the base scored is in the run's log, so a run that goes on measures against the same figures.
"""

from collections.abc import Iterable
from typing import Any

REMEDIES = "replayed general text (data.replay), a lower optim.lr, fewer steps (train.max_steps), LoRA"


class Forgetting:
    """Follows the eval records of a run. `general`: names of the general texts; `bound`: nats a token, 0 for none.

    `log` has the records of a run that goes on.
    """

    def __init__(self, general: Iterable[str], *, bound: float, log: Iterable[dict[str, Any]] = ()):
        self._general, self._bound = frozenset(general), bound
        self._base: dict[str, float] = {}  # name -> the base model's loss
        self._said: set[str] = set()  # names that a warning has been given for, and nothing has changed since
        for record in log:
            if record["kind"] == "eval":
                self.add(record)

    def add(self, record: dict[str, Any]) -> str:
        """Put "forgetting" into a record of general text. Returns a warning, once each time the bound is crossed."""
        name, loss = record["name"], record["loss"]
        if name not in self._general or loss is None:
            return ""
        if record["step"] == 0:
            self._base[name] = loss
        base = self._base.get(name)
        if base is not None:
            record["forgetting"] = loss - base
        over = base is None or 0 < self._bound < loss - base
        if over and name not in self._said:
            self._said.add(name)
            return (f"step {record['step']}: what of {name} is forgotten cannot be told, for want of its loss at step 0"
                    if base is None else
                    f"step {record['step']}: the model forgets: {name} costs it {loss - base:.3f} nats a token more "
                    f"than the base model (eval.forgetting_bound = {self._bound:g}). What helps: {REMEDIES}")
        if not over:
            self._said.discard(name)
        return ""
