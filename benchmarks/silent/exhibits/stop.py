"""The stop token is not trained.

The answer's text is trained and the token that ends it is not, so the model learns to answer and never to stop.
Reported: trl#1623, unsloth#416, torchtune#949, axolotl#3754, and in published examples axolotl#3756.
"""

from silent import oracle
from silent.measure import only_row, trained_by
from silent.world import Trainer, Verdict, World, judged

FAULT, UNIT = "stop_untrained", "tokens"
TALK = {"messages": [{"role": "user", "content": "Please name a colour."}, {"role": "assistant", "content": "Green."},
                     {"role": "user", "content": "Is the bridge open?"}, {"role": "assistant", "content": "Yes."}]}


def look(trainer: Trainer, world: World) -> Verdict:
    """Count the answers whose stop token is in the row and has no label."""
    document = oracle.encode(TALK["messages"], world.tokenizer)
    found = trained_by(only_row(trainer, world, TALK), document, lambda t: t.kind == "stop" and t.turn in (1, 3))
    return judged(2 - found[True, True], f"{found[True, True]} of 2 stop tokens are trained")
