"""What is right, computed here in float64 from the definitions, with nothing of any trainer.

The network is written from the Llama paper's formulas and takes one document at a time: no batch, no padding, no packs,
so none of the faults that come with them is possible. tests/test_silent.py holds it to transformers.

T tokens, D width, H query heads, K key heads, E head width, V vocabulary.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from silent.world import BEGIN, HEADER, HEADER_END, IGNORED, STOP, Row

Weights = dict[str, Tensor]


class Token(NamedTuple):
    """A token of a conversation, and what it is there for."""

    id: int
    kind: str  # begin, header, content, stop
    turn: int  # -1 before the first
    trained: bool


def encode(messages: list[dict], tokenizer: Tokenizer) -> list[Token]:
    """Llama-3's format, as Meta's model card draws it. Content is plain text, whatever it looks like.

    Trained is what the model must produce by itself: an answer and the stop token after it.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True  # "<|eot_id|>" in a text is text
    control = tokenizer.token_to_id
    found = [Token(control(BEGIN), "begin", -1, False)]
    for turn, message in enumerate(messages):
        role, trained = message["role"], message["role"] == "assistant" and message.get("weight", 1) != 0
        head = [control(HEADER), *plain(role, tokenizer), control(HEADER_END), *plain("\n\n", tokenizer)]
        found += [Token(i, "header", turn, False) for i in head]
        found += [Token(i, "content", turn, trained) for i in plain(message["content"].strip(), tokenizer)]
        found.append(Token(control(STOP), "stop", turn, trained))
    return found


def plain(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text, without anything before or after it."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def row(tokens: list[Token]) -> Row:
    """The row that a trainer should have made."""
    return Row([token.id for token in tokens], [token.id if token.trained else IGNORED for token in tokens])


def rows(records: Iterable[dict], tokenizer: Tokenizer) -> list[Row]:
    """The rows of conversations."""
    return [row(encode(record["messages"], tokenizer)) for record in records]


def load(folder: Path) -> tuple[Weights, dict]:
    """Weights in float64 and config.json of a Hugging Face folder, read as transformers 5 reads it.

    A head in the file is the head; without one it is the embedding if the config ties them, and otherwise KeyError.
    """
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= {name: tensor.double() for name, tensor in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())
    if "lm_head.weight" not in weights and not config["tie_word_embeddings"]:
        raise KeyError("no lm_head.weight in the file, and config.json does not tie it to the embedding")
    return weights, config


def logits(ids: Tensor, weights: Weights, config: dict) -> Tensor:
    """(T,) -> (T, V) of one document, which begins at position 0."""
    heads, kv, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    time = torch.arange(len(ids), dtype=torch.float64)
    turn = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (time[:, None] * turn).repeat(1, 2)[:, None]  # (T, 1, E)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weights[name]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        y = norm(x, f"{layer}input_layernorm.weight")
        q, k, v = (F.linear(y, weights[f"{layer}self_attn.{p}_proj.weight"]).unflatten(-1, (n, width))
                   for p, n in (("q", heads), ("k", kv), ("v", kv)))
        q, k, v = rotate(q), rotate(k).repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        scores = torch.einsum("the,she->hts", q, k) / width**0.5
        scores = scores.masked_fill(time[None, :, None] < time[None, None, :], float("-inf"))
        mixed = torch.einsum("hts,she->the", scores.softmax(-1), v).flatten(1)
        x = x + F.linear(mixed, weights[f"{layer}self_attn.o_proj.weight"])
        y = norm(x, f"{layer}post_attention_layernorm.weight")
        gate, up = (F.linear(y, weights[f"{layer}mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, weights[f"{layer}mlp.down_proj.weight"])
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return F.linear(norm(x, "model.norm.weight"), head)


def loss_sum(document: Row, weights: Weights, config: dict) -> tuple[Tensor, int]:
    """The sum of the trained tokens' losses in nats, and their number. The first token is never predicted."""
    ids, labels = torch.tensor(document.ids), torch.tensor(document.labels)
    predicted = logits(ids, weights, config)[:-1]
    return (F.cross_entropy(predicted, labels[1:], ignore_index=IGNORED, reduction="sum"),
            int((labels[1:] != IGNORED).sum()))


def mean_loss(documents: list[Row], weights: Weights, config: dict) -> Tensor:
    """The loss of a step over `documents`: the mean over all their trained tokens."""
    sums = [loss_sum(document, weights, config) for document in documents]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def gradient(documents: list[Row], weights: Weights, config: dict) -> Weights:
    """The gradient of `mean_loss`."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    found = torch.autograd.grad(mean_loss(documents, leaves, config), list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(weights[name]) if g is None else g for name, g in zip(leaves, found, strict=True)}


def gradient_told(before: Weights, after: Weights, *, lr: float, eps: float) -> Weights:
    """The gradient of a step, from the weights around AdamW's first update: u = lr g / (|g| + eps), solved for g."""
    found = {}
    for name in before:
        update = (before[name] - after[name].double()) / lr
        found[name] = update * eps / (1 - update.abs())
    return found


def length(weights: Weights) -> float:
    """The length of all of them together as one vector."""
    return sum(float(x.pow(2).sum()) for x in weights.values()) ** 0.5


def difference(found: Weights, right: Weights) -> Weights:
    """`found` - `right`, in float64."""
    return {name: found[name].double() - right[name].double() for name in right}


def distance(found: Weights, right: Weights) -> float:
    """How far off, as a share of the right one's length."""
    return length(difference(found, right)) / length(right)


def adamw(weights: Weights, gradients: Iterable[Weights], *, lr: float, betas: tuple[float, float], eps: float) -> None:
    """AdamW without weight decay (Loshchilov and Hutter 2019, algorithm 2), in place, a step for each gradient."""
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for t, gradient_ in enumerate(gradients, 1):
        for name, g in gradient_.items():
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
            weights[name] -= lr * (first[name] / (1 - betas[0]**t)) / ((second[name] / (1 - betas[1]**t)).sqrt() + eps)
