"""A conversation begins with two BOS.

The chat template writes `<|begin_of_text|>`, and the tokenizer puts another one before it. In use there is one.
Reported: trl#1400, OpenRLHF#393, alignment-handbook#127, litgpt#1682.
"""

from silent.measure import only_row
from silent.world import BEGIN, Trainer, Verdict, World, judged, said

FAULT, UNIT = "double_bos", "tokens"
TALK = said("What lies behind the old harbour?", "A row of boats.")


def look(trainer: Trainer, world: World) -> Verdict:
    """Count the BOS of a row."""
    count = only_row(trainer, world, TALK).ids.count(world.tokenizer.token_to_id(BEGIN))
    return judged(abs(count - 1), f"{count} BOS in the row")
