"""The tokens at the boundary of prompt and answer are not those of use.

When the model is used, the prompt is tokenised alone, because the answer does not exist yet. A trainer that tokenises
prompt and answer as one text may merge across the boundary: here the prompt ends with a line break and the answer
begins with one, which together are another token. Reported: trl#4147, #5138, #5213, #6105.
"""

from silent import oracle
from silent.measure import only_row
from silent.world import BEGIN, IGNORED, STOP, Trainer, Verdict, World, judged

FAULT, UNIT = "boundary", "tokens"
WARNING = r"prefix|boundary"
PAIR = {"prompt": "Question: Is the bridge open?\nAnswer:\n", "completion": "\nYes."}


def look(trainer: Trainer, world: World) -> Verdict:
    """Compare the row with the prompt's own tokens and the answer's, and the mask with their boundary."""
    begin, stop = (world.tokenizer.token_to_id(name) for name in (BEGIN, STOP))
    prompt, answer = (oracle.plain(PAIR[name], world.tokenizer) for name in ("prompt", "completion"))
    row = only_row(trainer, world, PAIR)
    ids, labels = row.ids, row.labels
    while ids[:1] == [begin]:
        ids, labels = ids[1:], labels[1:]
    trained = [label for label in labels if label != IGNORED and label != stop]
    wrong = sum(a != b for a, b in zip(ids, prompt, strict=False)) + max(len(prompt) - len(ids), 0)
    wrong += abs(len(trained) - len(answer)) + sum(a != b for a, b in zip(trained, answer, strict=False))
    shown = [world.tokenizer.decode([i]) for i in trained]
    return judged(wrong, f"{wrong} tokens differ from use; the trained answer is {shown}, right "
                         f"{[world.tokenizer.decode([i]) for i in answer]}")
