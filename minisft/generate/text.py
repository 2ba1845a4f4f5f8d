"""Answers to many prompts at once.

Prompts of different lengths need no padding: they lie one after another in a stream, as documents do in training. Then
each text grows by a token a step, and leaves the batch when it ends (decoding.py).
"""

from collections.abc import Iterator

import torch

from minisft.errors import UserError
from minisft.generate.decoding import CachedDecoder
from minisft.generate.sampling import GREEDY, Sampling, choose, penalized
from minisft.model.llama import Llama

CACHE_BYTES = 2**30  # of keys and values; more prompts than fit wait for the next batch


def generate(model: Llama | CachedDecoder, prompts: list[list[int]], *, max_new_tokens: int, stop_ids: set[int],
             sampling: Sampling = GREEDY) -> list[list[int]]:
    """The continuation of each prompt (token ids), without the first token of `stop_ids`, which ends it.

    It also ends when the model's context is full. Raises UserError for a prompt that fills it.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for index, token in stream(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, sampling=sampling):
        answers[index].append(token)
    return answers


@torch.inference_mode()
def stream(model: Llama | CachedDecoder, prompts: list[list[int]], *, max_new_tokens: int, stop_ids: set[int],
           sampling: Sampling = GREEDY) -> Iterator[tuple[int, int]]:
    """`generate`, token by token: (index of the prompt, token) as soon as each is known."""
    decoder = model if isinstance(model, CachedDecoder) else CachedDecoder(model)
    context = decoder.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt of {len(prompt):,} tokens leaves nothing to generate: the model's context has "
                            f"{context:,}; shorten the conversation" if prompt else "a prompt is empty")
    limits = [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
    # The longest first, as many together as the cache holds.
    order = sorted(range(len(prompts)), key=lambda i: -limits[i]) if max_new_tokens > 0 else []
    while order:
        size = max(1, CACHE_BYTES // decoder.bytes_per_position() // limits[order[0]])
        yield from _continue(decoder, prompts, order[:size], limits, stop_ids, sampling)
        order = order[size:]


def _continue(decoder: CachedDecoder, prompts: list[list[int]], texts: list[int], limits: list[int], stop_ids: set[int],
              sampling: Sampling) -> Iterator[tuple[int, int]]:
    """`stream` for the prompts whose indices are `texts`, none of which may grow past its limit."""
    draws = {i: sampling.draws(prompts[i]) for i in texts}
    logits, cache = decoder.prefill([prompts[i] for i in texts], positions=limits[texts[0]])
    penalty, present = sampling.repetition_penalty, torch.zeros_like(logits, dtype=torch.bool)
    for row, i in zip(present, texts, strict=True):
        row[torch.tensor(prompts[i], device=row.device)] = True
    while True:
        if penalty != 1:
            logits = penalized(logits, present, penalty)
        numbers = torch.tensor([next(draws[i]) for i in texts], dtype=torch.float64, device=logits.device)
        tokens = choose(logits, sampling, numbers)
        chosen = torch.where(logits.amax(dim=-1).isfinite(), tokens, -1).tolist()  # waits for the device
        if min(chosen) < 0:
            raise UserError("the model's logits are not finite: its weights are broken, or --precision bf16 is too "
                            "coarse for them; use --precision fp32")
        yield from ((i, token) for i, token in zip(texts, chosen, strict=True) if token not in stop_ids)
        stopped = [row for row, (i, token) in enumerate(zip(texts, chosen, strict=True))
                   if token in stop_ids or cache.lengths[row] + 1 == limits[i]]
        if len(stopped) == len(texts):
            return
        if penalty != 1:
            present.scatter_(1, tokens[:, None], True)
        if stopped:
            rows = cache.leave(stopped)
            texts, tokens, present = [texts[row] for row in rows], tokens[rows], present[rows]
        logits = decoder.step(tokens, cache)
