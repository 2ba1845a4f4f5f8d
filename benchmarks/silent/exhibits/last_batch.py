"""The last, incomplete window of an epoch is dropped.

Five rows in windows of two: the fifth is computed and no step follows, or it is not computed at all. On a small data
set with a large batch it can be most of it. Reported: axolotl#3152, #3848 and trl#4554 have the neighbouring case, step
counts that are off.
"""

from silent import oracle
from silent.measure import right_rows, unique_tokens
from silent.world import WORDS, Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "drop_last", "documents"
WARNING = r"drop.*(batch|row)|(batch|row).*drop"
DATA = tuple(said(" ".join(WORDS[6 * i : 6 * i + 6] * 4), " ".join(WORDS[6 * i : 6 * i + 6])) for i in range(5))


def look(trainer: Trainer, world: World) -> Verdict:
    """One epoch; a row was trained if the embeddings of the words that only it has were moved."""
    run = trainer.train(Job(DATA, accumulate=2, steps=None, lr=1e-3, eps=1e-8, shuffle=True), world)
    name = "model.embed_tokens.weight"
    before, after = (oracle.load(folder)[0][name] for folder in (world.model(), run.folder))
    still = sum(bool((before[own] == after[own]).all()) for own in unique_tokens(right_rows(trainer, world, DATA)))
    return judged(still, f"{still} of {len(DATA)} documents were not trained in the epoch")
