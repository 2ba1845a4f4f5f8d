"""Of several answers only one is trained.

A collator that searches for "the" answer finds the first or the last one. Two thirds of a conversation teach nothing.
LLaMA-Factory offers it as a choice (`mask_history`); elsewhere it is an accident.
"""

from silent import oracle
from silent.measure import only_row, trained_by
from silent.world import Trainer, Verdict, World, judged

FAULT, UNIT = "first_turn", "tokens"
TALK = {"messages": [
    {"role": "user", "content": "How many steps has the ladder?"},
    {"role": "assistant", "content": "Nineteen, and one is broken."},
    {"role": "user", "content": "Why does the kettle sing?"},
    {"role": "assistant", "content": "Because the steam is in a hurry to leave."},
    {"role": "user", "content": "Who mends the lantern at night?"},
    {"role": "assistant", "content": "The keeper does, with copper wire and patience."}]}


def look(trainer: Trainer, world: World) -> Verdict:
    """Count the content tokens with the wrong mask, turn by turn."""
    document = oracle.encode(TALK["messages"], world.tokenizer)
    found = trained_by(only_row(trainer, world, TALK), document, lambda t: (t.turn, t.kind == "content"))
    missing = [found[(turn, True), False] for turn in (1, 3, 5)]
    extra = sum(found[(turn, True), True] for turn in (0, 2, 4))
    return judged(sum(missing) + extra, f"untrained tokens in the three answers: {missing}; trained in the three "
                                        f"questions: {extra}")
