"""A model that answers: its texts grow by a token a step, the most probable one or a draw.

    repetition penalty -> temperature -> top-k -> top-p -> draw

Order and meaning are those of transformers. The penalty (Keskar et al. 2019, "CTRL", section 4.1) makes tokens less
likely that the text, prompt included, already has; top-p (Holtzman et al. 2020, "The Curious Case of Neural Text
Degeneration", section 3.1) keeps the fewest tokens that together are as likely as p. Each text draws from its own
stream of random numbers, a function of the seed and its prompt, so an answer does not depend on the rest of the batch.

Prompts of different lengths need no padding: they lie one after another in a stream, as documents do in training. A
text leaves the batch when it ends (decoding.py).
"""

# B texts, V vocabulary

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisft.data.chat import Renderer
from minisft.data.conversation import Turn
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import SHORT, UserError
from minisft.files import from_hub
from minisft.formats.jinja import choose_template
from minisft.generate.decoding import CachedDecoder
from minisft.lora.adapters import PeftFolder, is_adapter
from minisft.model.llama import Llama
from minisft.pretrained import from_pretrained

CACHE_BYTES = 2**30  # of keys and values; more prompts than fit wait for the next batch


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
        texts, order = order[:size], order[size:]
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
                break
            if penalty != 1:
                present.scatter_(1, tokens[:, None], True)
            if stopped:
                rows = cache.leave(stopped)
                texts, tokens, present = [texts[row] for row in rows], tokens[rows], present[rows]
            logits = decoder.step(tokens, cache)


@dataclass(frozen=True)
class Assistant:
    """A network and the renderer of its chat template."""

    model: Llama
    renderer: Renderer
    name: str  # the folder's

    @classmethod
    def load(cls, path: str | Path, *, template: str = "", templates: str = "", dtype: torch.dtype = torch.float32,
             device: torch.device | str = "cpu") -> "Assistant":
        """The model in the Hugging Face folder `path`, or the one that an adapter there makes of its base.

        `template` names a chat template, built in or from the TOML file `templates`; empty, the folder decides. Raises
        UserError for broken folders and an unknown template.
        """
        if not Path(path).is_dir():
            raise UserError(f"{path}: no such folder; name a Hugging Face folder, such as runs/my/final"
                            f"{from_hub(path)}")
        has_tokenizer = (Path(path) / "tokenizer.json").exists() or not is_adapter(path)
        tokenizer = Tokenizer(path if has_tokenizer else PeftFolder(path).base_folder())
        chosen = choose_template(template, load_templates(templates or None), tokenizer, option="--template")
        renderer = Renderer(chosen, tokenizer)
        model = from_pretrained(path, dtype=dtype, device=device)
        largest = max([tokenizer.largest_of_text, *renderer.stop_ids(), *renderer.prompt((Turn("user", "a"),))])
        if largest >= model.config.vocab_size:
            raise UserError(f"{tokenizer.file}: token id {largest} is past the model's vocabulary of "
                            f"{model.config.vocab_size}; it belongs to another model, or --template does")
        return cls(model, renderer, Path(path).resolve().name)

    @cached_property
    def decoder(self) -> CachedDecoder:
        """The network, prepared to continue a single text fast."""
        return CachedDecoder(self.model, packed=True)

    def answer(self, conversations: Sequence[tuple[Turn, ...]], *, max_new_tokens: int = 512,
               sampling: Sampling = GREEDY) -> list[str]:
        """The model's next turn in each conversation. Raises UserError for one that fills the model's context."""
        return [text for text, _ in self.answer_with_cut(conversations, max_new_tokens=max_new_tokens,
                                                         sampling=sampling)]

    def answer_with_cut(self, conversations: Sequence[tuple[Turn, ...]], *, max_new_tokens: int = 512,
                        sampling: Sampling = GREEDY) -> list[tuple[str, bool]]:
        """`answer`, each with True if it was cut off: at `max_new_tokens`, or at the end of the model's context."""
        prompts = [self.renderer.prompt(turns) for turns in conversations]
        context = self.model.config.max_position_embeddings
        for turns, prompt in zip(conversations, prompts, strict=True):
            if len(prompt) >= context:
                raise UserError(f"{SHORT.repr(turns[-1].content)}: {len(prompt):,} tokens with all turns before it, "
                                f"but the model's context has {context:,}; shorten the question, or the answers before "
                                "it with --max-new-tokens")
        answers = generate(self.model, prompts, max_new_tokens=max_new_tokens, stop_ids=self.renderer.stop_ids(),
                           sampling=sampling)
        # The token that ends an answer is not among its ids, so as many as there is room for never ended.
        return [(self.renderer.tokenizer.decode(ids), len(ids) == min(max_new_tokens, context - len(prompt)))
                for ids, prompt in zip(answers, prompts, strict=True)]

    def tokens(self, turns: tuple[Turn, ...], *, max_new_tokens: int = 512,
               sampling: Sampling = GREEDY) -> Iterator[int]:
        """The tokens of the model's next turn, as they are generated."""
        found = stream(self.decoder, [self.renderer.prompt(turns)], max_new_tokens=max_new_tokens,
                       stop_ids=self.renderer.stop_ids(), sampling=sampling)
        return (token for _, token in found)
