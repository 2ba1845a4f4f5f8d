"""What the model answers to held-out questions: read before and after, they tell what a loss does not.

A question is a document up to its last answer, as its mask of trained tokens shows it; the answer there is what a good
model might have said.

    ids      <|begin_of_text|> ... Capital of Malta? <|eot_id|> ... assistant ...  Valletta . <|eot_id|>
    trained  0 0 0 ...                                                             1        1 1
             question                                                              reference
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisft.data.dataset import Dataset
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.evaluation.decoding import logits
from minisft.model.llama import Documents

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


def answers(model: nn.Module, asked: list[Question], tokenizer: Tokenizer, *, stop_ids: set[int],
            device: torch.device, check: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """{name, prompt, answer, reference} as text, greedily. All ranks call it together, with the same questions, and
    `check` before each token; what it raises ends the answers."""
    said = continued(model, [question.prompt for question in asked], stop_ids=stop_ids, device=device, check=check)

    def text(ids: list[int]) -> str:
        return tokenizer.decode([token for token in ids if token not in stop_ids])

    return [{"name": question.source, "prompt": tokenizer.decode(question.prompt), "answer": text(ids),
             "reference": text(question.reference)} for question, ids in zip(asked, said, strict=True)]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # growing texts have another shape for every token
def continued(model: nn.Module, prompts: list[list[int]], *, stop_ids: set[int], device: torch.device,
              check: Callable[[], None] = lambda: None) -> list[list[int]]:
    """What follows each prompt, by whole forward passes: sharded parameters are whole only within `forward`, so the
    cache of generate.py, which asks each layer by itself, is not for them."""
    texts, growing = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(MOST):
        check()
        documents = Documents.of_lengths(tuple(len(texts[i]) for i in growing), device=device)
        last = documents.cu_seqlens[1:].long() - 1

        def best(hidden: Tensor, head: Tensor, last: Tensor = last) -> Tensor:
            return logits(hidden[last], head).argmax(dim=-1)

        chosen = model(torch.tensor([token for i in growing for token in texts[i]], device=device), documents, best)
        dist.broadcast(chosen, 0)  # a rank that rounds another way would end earlier, and leave the others waiting
        said = dict(zip(growing, chosen.tolist(), strict=True))
        growing = [i for i in growing if said[i] not in stop_ids]
        for i in growing:
            texts[i].append(said[i])
        if not growing:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
