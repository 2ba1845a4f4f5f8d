"""The first token of an answer is not trained.

The mask is built for tokens and used for the positions that predict them, or the other way round, and is off by one:
the model is never taught how an answer begins. With short answers that is much of what there is to learn. Reported:
torchtitan#2755, verl PR#3287, OpenRLHF#973.
"""

from silent import oracle
from silent.measure import matched, only_row
from silent.world import IGNORED, Trainer, Verdict, World, judged, said

FAULT, UNIT = "first_untrained", "tokens"
TALK = said("Is the bridge open?", "Yes, it is near the mountain.")


def look(trainer: Trainer, world: World) -> Verdict:
    """Look for the label of the first token of the answer's content."""
    tokens = oracle.encode(TALK["messages"], world.tokenizer)
    labels = [label for label, token in matched(only_row(trainer, world, TALK), tokens)
              if token.kind == "content" and token.turn == 1]
    missing = labels[0] == IGNORED
    return judged(missing, f"the first token of the answer is {'not ' * missing}trained, and "
                           f"{sum(label != IGNORED for label in labels[1:])} of the {len(labels) - 1} after it are")
