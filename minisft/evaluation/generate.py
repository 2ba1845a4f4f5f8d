"""Greedy answers to many prompts at once.

Prompts of different lengths need no padding: they lie one after another in a stream, as documents do in training, and
each step adds the most probable next token to each of them.
"""

import torch
from torch import Tensor, nn

from minisft.model.attention import Documents
from minisft.model.precision import linear


@torch.no_grad()
def generate(model: nn.Module, prompts: list[list[int]], *, max_new_tokens: int, stop_ids: set[int]) -> list[list[int]]:
    """The continuation of each prompt (token ids), up to and without the first token of `stop_ids`."""
    device = next(model.parameters()).device
    texts = [list(prompt) for prompt in prompts]
    growing = list(range(len(texts)))
    for _ in range(max_new_tokens):
        if not growing:
            break
        lengths = tuple(len(texts[i]) for i in growing)
        documents = Documents.of_lengths(lengths, device=device)
        tokens = torch.tensor([token for i in growing for token in texts[i]], device=device)
        last = documents.cu_seqlens[1:].long() - 1

        def best(hidden: Tensor, head: Tensor, last: Tensor = last) -> Tensor:
            return linear(hidden[last], head).argmax(dim=-1)

        chosen = model(tokens, documents, best).tolist()
        for i, token in zip(growing, chosen, strict=True):
            if token not in stop_ids:
                texts[i].append(token)
        growing = [i for i, token in zip(growing, chosen, strict=True) if token not in stop_ids]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
