"""A weight of 0 on a turn is ignored.

A record says that an answer is there for context and not to be learned. A trainer that does not know the field trains
the answer, and says nothing. Asked for: trl#5761.
"""

from silent import oracle
from silent.measure import only_row, trained_by
from silent.world import Trainer, Verdict, World, judged

FAULT, UNIT = "ignore_weight", "tokens"
WARNING = r"\bweight\b"
TALK = {"messages": [
    {"role": "user", "content": "Is the bridge open?"},
    {"role": "assistant", "content": "The mountain is near the kettle.", "weight": 0},
    {"role": "user", "content": "Please name a colour."}, {"role": "assistant", "content": "Green.", "weight": 1}]}


def look(trainer: Trainer, world: World) -> Verdict:
    """Count the trained tokens of the answer that has the weight 0."""
    document = oracle.encode(TALK["messages"], world.tokenizer)
    row = only_row(trainer, world, TALK)
    found = trained_by(row, document, lambda t: t.turn if t.kind in ("content", "stop") else -1)
    wrong = found[1, True]
    if not found[3, True]:
        return Verdict("wrong", "the answer with the weight 1 is not trained either")
    return judged(wrong, f"{wrong} of {wrong + found[1, False]} tokens of the answer with the weight 0 are trained")
