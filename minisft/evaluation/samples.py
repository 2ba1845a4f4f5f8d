"""Answers to held-out questions: read before and after a run, they tell what a loss does not.

A question is a document up to its last answer, which the mask of trained tokens marks. That answer is the reference.

    ids      <|begin_of_text|> ... Capital of Malta? <|eot_id|> ... assistant ...  Valletta . <|eot_id|>
    trained  0 0 0 ...                                                             1        1 1
             question                                                              reference
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisft.data.dataset import Dataset
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.evaluation.decoding import logits
from minisft.model.attention import Documents

MOST = 128  # tokens of an answer: a base model seldom stops by itself


@dataclass(frozen=True)
class HeldoutQuestion:
    """A held-out document in two parts."""

    source: str
    prompt: list[int]
    reference: list[int]


def questions(evals: dict[str, Dataset], count: int) -> list[HeldoutQuestion]:
    """The first `count` questions of each source. Raises UserError if there are none."""
    found = [question for name, dataset in evals.items() for question in islice(_questions(name, dataset), count)]
    if not found:
        raise UserError(f"eval.samples = {count}: data.eval has no question that an answer follows, only text that is "
                        "trained on from its beginning (plain text, or data.train_on = all); set eval.samples to 0")
    return found


def _questions(name: str, dataset: Dataset) -> Iterator[HeldoutQuestion]:
    for i in range(len(dataset)):
        ids, trained = dataset.document(i)
        starts = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0) == 1)  # of its answers
        if len(starts) and starts[0] > 1:  # at 1 only the first token is not trained, which nothing could predict
            start = starts[-1]
            yield HeldoutQuestion(name, ids[:start].tolist(), ids[start:][trained[start:] == 1].tolist())


def answers(model: nn.Module, prompts: list[HeldoutQuestion], tokenizer: Tokenizer, *, stop_ids: set[int],
            device: torch.device, check: Callable[[], None] = lambda: None) -> list[dict[str, str]]:
    """{name, prompt, answer, reference} as text, decoded greedily. All ranks call it with the same questions.

    All ranks call `check` before each token; an exception from it ends the answers.
    """
    continued = continue_greedily(model, [question.prompt for question in prompts], stop_ids=stop_ids, device=device,
                                  check=check)
    return [{"name": question.source, "prompt": tokenizer.decode(question.prompt),
             "answer": tokenizer.decode(ids),
             "reference": tokenizer.decode([token for token in question.reference if token not in stop_ids])}
            for question, ids in zip(prompts, continued, strict=True)]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # type: ignore[untyped-decorator]  # each token gives growing texts a new shape
def continue_greedily(model: nn.Module, prompts: list[list[int]], *, stop_ids: set[int], device: torch.device,
                      check: Callable[[], None] = lambda: None) -> list[list[int]]:
    """The continuation of each prompt, without its stop token, by whole forward passes.

    Sharded parameters are whole only inside `forward`; the cache of generate.py, which calls each layer by itself,
    cannot serve them.
    """
    texts, growing = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(MOST):
        check()
        documents = Documents.of_lengths(tuple(len(texts[i]) for i in growing), device=device)
        last = documents.cu_seqlens[1:].long() - 1

        def best(hidden: Tensor, head: Tensor, last: Tensor = last) -> Tensor:
            return logits(hidden[last], head).argmax(dim=-1)

        chosen = model(torch.tensor([token for i in growing for token in texts[i]], device=device), documents, best)
        dist.broadcast(chosen, 0)  # a rank that rounds differently would end earlier and leave the others waiting
        tokens = dict(zip(growing, chosen.tolist(), strict=True))
        growing = [i for i in growing if tokens[i] not in stop_ids]
        for i in growing:
            texts[i].append(tokens[i])
        if not growing:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
