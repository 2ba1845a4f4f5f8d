"""The stop token is not trained.

The answer's text is trained and the token that ends it is not, so the model learns to answer and never to stop.
Reported: trl#1623, unsloth#416, torchtune#949, axolotl#3754, and in published examples axolotl#3756.
"""

from silent import oracle
from silent.measure import only_row, trained_by
from silent.world import Trainer, Verdict, World, judged, said

FAULT, UNIT = "stop_untrained", "tokens"
TALK = said("Please name a colour.", "Green.")


def look(trainer: Trainer, world: World) -> Verdict:
    """Look for the label of the stop token after the answer."""
    document = oracle.encode(TALK["messages"], world.tokenizer)
    found = trained_by(only_row(trainer, world, TALK), document, lambda t: t.kind == "stop" and t.turn == 1)
    return judged(1 - found[True, True], f"{found[True, True]} of 1 stop token is trained")
