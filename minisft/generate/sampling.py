"""The next token from the logits: the most probable one, or a draw.

    repetition penalty -> temperature -> top-k -> top-p -> draw

Order and meaning are those of transformers. The penalty (Keskar et al. 2019, "CTRL", section 4.1) makes tokens less
likely that the text, prompt included, already has; top-p (Holtzman et al. 2020, "The Curious Case of Neural Text
Degeneration", section 3.1) keeps the fewest tokens that together are as likely as p.

Each text draws from its own stream of random numbers, a function of the seed and its prompt, so an answer does not
depend on what else is in the batch.
"""

# B texts, V vocabulary

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from minisft.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises UserError for values that make no sense."""

    temperature: float = 0.0  # 0: the most probable token
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Past these bounds fp32 logits overflow, and a draw from them is no token.
        for name, fits, expected in (
                ("temperature", self.temperature == 0 or 1e-5 <= self.temperature <= 1e5,
                 "0 (the most probable token), or a number from 0.00001 to 100000"),
                ("top_k", self.top_k >= 0, "a whole number from 0 (all tokens)"),
                ("top_p", 0 < self.top_p <= 1, "above 0, and 1 at most"),
                ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3,
                 "a number from 0.001 to 1000; 1 changes nothing"),
                ("seed", self.seed >= 0, "a whole number from 0")):
            if not fits:
                raise UserError(f"{name}: {getattr(self, name)} was given; it must be {expected}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError("top_k and top_p have no effect at temperature 0, which draws nothing; raise temperature")

    def draws(self, prompt: list[int]) -> Iterator[float]:
        """Random numbers in [0, 1) for the continuation of `prompt`, one a token."""
        random = np.random.default_rng([self.seed, *prompt])
        return (random.random() for _ in count())


GREEDY = Sampling()


def penalized(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    """(B, V) -> (B, V): divides logits of the tokens `present` (B, V) by `penalty`; multiplies negative ones."""
    return torch.where(present, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) -> (B, V): the logits to draw from; -inf for tokens that are left out."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        rising, order = logits.sort(dim=-1)
        out = rising.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        out[:, -1] = False  # the most probable token stays
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return logits


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Logits (B, V) in fp32 and numbers in [0, 1) (B,) in fp64 -> (B,) the next tokens."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    reached = warped(logits, sampling).double().softmax(dim=-1).cumsum(dim=-1)
    # The first token at which the sum passes the draw; a token of probability 0 never passes anything.
    return torch.searchsorted(reached, (draws * reached[:, -1])[:, None], right=True)[:, 0]
