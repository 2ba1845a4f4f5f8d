"""What the model answers to held-out questions: read before and after, they tell what a loss does not.

A question is a document up to its last answer, as its mask of trained tokens shows it; the answer there is what a good
model might have said.

    ids      <|begin_of_text|> ... Capital of Malta? <|eot_id|> ... assistant ...  Valletta . <|eot_id|>
    trained  0 0 0 ...                                                             1        1 1
             question                                                              reference
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from minisft.data.dataset import Dataset
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.evaluation.generate import generate

MOST = 128  # tokens of an answer: a base model seldom stops by itself


@dataclass(frozen=True)
class Question:
    """A held-out document in two parts."""

    source: str
    prompt: list[int]
    reference: list[int]


def questions(evals: dict[str, Dataset], count: int) -> list[Question]:
    """The first `count` questions of each source. Raises UserError where no source has any."""
    found = [question for name, dataset in evals.items() for question in islice(_questions(name, dataset), count)]
    if not found:
        raise UserError(f"eval.samples = {count}: data.eval has no question that an answer follows, only text that is "
                        "trained from its beginning (plain text, or data.train_on = all); set eval.samples to 0")
    return found


def _questions(name: str, dataset: Dataset) -> Iterator[Question]:
    for i in range(len(dataset)):
        ids, trained = dataset.document(i)
        starts = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0) == 1)  # of its answers
        if len(starts) and starts[0] > 1:  # at 1 only the first token is not trained, which nothing could predict
            start = starts[-1]
            yield Question(name, ids[:start].tolist(), ids[start:][trained[start:] == 1].tolist())


@torch.compiler.set_stance("force_eager")  # growing texts have a new shape for every token
def answers(model: nn.Module, asked: list[Question], tokenizer: Tokenizer, *, stop_ids: set[int]) -> list[dict]:
    """{name, prompt, answer, reference} as text, greedily. All ranks of a sharded `model` call it together."""
    said = generate(model, [question.prompt for question in asked], max_new_tokens=MOST, stop_ids=stop_ids)

    def text(ids: list[int]) -> str:
        return tokenizer.decode([token for token in ids if token not in stop_ids])

    return [{"name": question.source, "prompt": tokenizer.decode(question.prompt), "answer": text(ids),
             "reference": text(question.reference)} for question, ids in zip(asked, said, strict=True)]
