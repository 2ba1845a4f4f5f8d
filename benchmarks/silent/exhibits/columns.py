"""A record that says two things is trained as one of them.

The record has `messages` and also `prompt` and `completion`, and they disagree: two data sets were joined, or a column
was left over. One of the two is dropped without a word. Right is a refusal, or a message that names what is not read.
"""

from silent.world import CannotError, Job, Trainer, Verdict, World, judged, said

FAULT, UNIT = "ignore_columns", "columns"
WARNING = r"column|field"
BOTH = said("Is the bridge open?", "Yes.") | {"prompt": "Is the bridge open?", "completion": " No."}


def look(trainer: Trainer, world: World) -> Verdict:
    """Hand in the record and see if anything is said."""
    try:
        rows = trainer.rows(Job((BOTH,), length=256), world)
    except CannotError as refusal:
        return judged(0, f"refused: {refusal}")
    except ValueError as refusal:
        return judged(0, f"refused: {refusal}")
    texts = [world.tokenizer.decode(row.ids) for row in rows]
    return judged(len([name for name in ("Yes", " No") if not any(name in text for text in texts)]) or 2,
                  f"trained without a word: {texts}")
