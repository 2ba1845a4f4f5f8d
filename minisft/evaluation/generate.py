"""Answers to many prompts at once.

Prompts of different lengths need no padding: they lie one after another in a stream, as documents do in training. From
there on each text grows by a token a step, and leaves the batch when it ends (decoding.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minisft.errors import UserError
from minisft.evaluation.decoding import Decoder
from minisft.evaluation.sampling import GREEDY, Sampling, choose, penalized
from minisft.model.llama import Llama

CACHE_BYTES = 2**30  # more prompts than this holds keys and values of wait for the next batch


def generate(model: Llama | Decoder, prompts: list[list[int]], *, max_new_tokens: int, stop_ids: set[int],
             sampling: Sampling = GREEDY) -> list[list[int]]:
    """The continuation of each prompt (token ids), up to and without the first token of `stop_ids`.

    It also ends where the model's context is full. Raises UserError for a prompt that fills it.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for index, token in stream(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling):
        answers[index].append(token)
    return answers


@torch.inference_mode()
def stream(model: Llama | Decoder, prompts: list[list[int]], *, max_new_tokens: int, stop_ids: set[int],
           sampling: Sampling = GREEDY) -> Iterator[tuple[int, int]]:
    """The same token by token: (index of the prompt, token) in the order in which they come to be."""
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    context = decoder.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt of {len(prompt):,} tokens leaves nothing to generate: the model's context has "
                            f"{context:,}; shorten the conversation" if prompt else "a prompt is empty")
    limits = [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
    for batch in _batches(limits if max_new_tokens > 0 else [], CACHE_BYTES // decoder.bytes_per_position()):
        yield from _continued(decoder, prompts, batch, limits, stop_ids, sampling)


def _batches(limits: list[int], positions: int) -> Iterator[list[int]]:
    """Indices of texts that may grow to `limits`, the longest first, in batches of some `positions` at most."""
    order = sorted(range(len(limits)), key=lambda i: -limits[i])
    while order:
        size = max(1, positions // limits[order[0]])
        yield order[:size]
        order = order[size:]


def _continued(decoder: Decoder, prompts: list[list[int]], texts: list[int], limits: list[int], stop_ids: set[int],
               sampling: Sampling) -> Iterator[tuple[int, int]]:
    """What `stream` does for the prompts whose indices are `texts`."""
    draws = {i: sampling.draws(prompts[i]) for i in texts}
    logits, cache = decoder.prefill([prompts[i] for i in texts], positions=limits[texts[0]])
    present = _present([prompts[i] for i in texts], logits) if sampling.repetition_penalty != 1 else None
    while True:
        if present is not None:
            logits = penalized(logits, present, sampling.repetition_penalty)
        numbers = torch.tensor([next(draws[i]) for i in texts], dtype=torch.float64, device=logits.device)
        tokens = choose(logits, sampling, numbers)
        said = torch.where(logits.amax(dim=-1).isfinite(), tokens, -1).tolist()  # waits for the device
        if min(said) < 0:
            raise UserError("the model's logits are not finite; its weights are broken, or --precision bf16 is too "
                            "coarse for them")
        yield from ((i, token) for i, token in zip(texts, said, strict=True) if token not in stop_ids)
        stopped = [row for row, (i, token) in enumerate(zip(texts, said, strict=True))
                   if token in stop_ids or cache.lengths[row] + 1 == limits[i]]
        if len(stopped) == len(texts):
            return
        if present is not None:
            present.scatter_(1, tokens[:, None], True)
        if stopped:
            rows = cache.leave(stopped)
            texts, tokens = [texts[row] for row in rows], tokens[rows]
            present = present[rows] if present is not None else None
        logits = decoder.step(tokens, cache)


def _present(prompts: list[list[int]], logits: Tensor) -> Tensor:
    """(B, V) which tokens each prompt has."""
    present = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    for row, prompt in zip(present, prompts, strict=True):
        row[torch.tensor(prompt, device=row.device)] = True
    return present
