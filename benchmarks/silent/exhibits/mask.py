"""The question is trained too.

The mask of the prompt gets lost, in a refactoring or because a switch is off by default. The loss falls as before, and
often it is lower, because questions are easy to predict. Reported: nanochat#570, mended by PR#582.
"""

from silent import oracle
from silent.measure import only_row, trained_by
from silent.world import Trainer, Verdict, World, judged

FAULT, UNIT = "train_all", "tokens"
TALK = {"messages": [{"role": "system", "content": "Answer in one word."},
                     {"role": "user", "content": "What lies behind the old harbour?"},
                     {"role": "assistant", "content": "Boats."}]}


def look(trainer: Trainer, world: World) -> Verdict:
    """Count the trained tokens of what the system and the user say."""
    document = oracle.encode(TALK["messages"], world.tokenizer)
    found = trained_by(only_row(trainer, world, TALK), document, lambda t: t.kind == "content" and t.turn < 2)
    wrong, content = found[True, True], found[True, True] + found[True, False]
    answer = sum(token.trained for token in document)
    return judged(wrong, f"{wrong} of {content} tokens of the prompt are trained, beside {answer} of the answer")
