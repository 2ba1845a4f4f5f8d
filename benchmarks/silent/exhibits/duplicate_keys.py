"""A key stands twice in a record, and one of the two is dropped.

A converter wrote `messages` twice, with two answers. JSON's standard leaves open what that means, and Python's reader
keeps the last without a word, so the first answer is gone. Right is a refusal, or a message that names the key.
"""

import json

from silent.world import CannotError, Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "ignore_duplicates", "answers"
WARNING = r"duplicate|twice|more than once|several"
ANSWERS = ("Yes.", "No.")
RECORD = "{" + ", ".join(f'"messages": {json.dumps(said("Is the bridge open?", answer)["messages"])}'
                         for answer in ANSWERS) + "}"


def look(trainer: Trainer, world: World) -> Verdict:
    """Hand in the record and see if anything is said."""
    try:
        rows = trainer.rows(Job((RECORD,), length=256), world)
    except (CannotError, ValueError) as refusal:
        return judged(0, f"refused: {refusal}")
    texts = [world.tokenizer.decode(row.ids) for row in rows]
    lost = [answer for answer in ANSWERS if not any(answer in text for text in texts)]
    return judged(len(lost), f"trained without a word: {texts}; lost: {lost}")
