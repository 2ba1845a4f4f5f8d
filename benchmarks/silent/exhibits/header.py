"""The header before an answer is trained.

`<|start_header_id|>assistant<|end_header_id|>` is written by the program that serves the model, so learning it is
wasted; with short answers it is most of the loss. torchtune 0.6.1 trains it by design.
"""

from silent import oracle
from silent.measure import only_row, trained_by
from silent.world import Trainer, Verdict, World, judged, said

FAULT, UNIT = "train_header", "tokens"
TALK = said("Is the bridge open?", "Yes.")


def look(trainer: Trainer, world: World) -> Verdict:
    """Count the trained tokens of the answer's header."""
    document = oracle.encode(TALK["messages"], world.tokenizer)
    found = trained_by(only_row(trainer, world, TALK), document, lambda t: t.kind == "header" and t.turn == 1)
    wrong, answer = found[True, True], sum(token.trained for token in document)
    return judged(wrong, f"{wrong} of {wrong + found[True, False]} tokens of the header are trained, beside {answer} "
                         "of the answer")
