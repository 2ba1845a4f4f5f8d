"""FLOPs of training: multiplications and additions of matrix products, from the shape of the network.

A matrix of P numbers costs 2 P per token in the forward pass and 4 P in the backward pass (for the gradient of its
input, and for its own): 6 P (Kaplan et al. 2020, section 2.1). Full recomputation makes it 8 P, except for the last
matrix of a block: nothing needs its product, so torch stops before it. Selective recomputation multiplies one matrix
of a block again, a feed-forward one (llama.py).

A frozen matrix has no gradient of its own: 4 P per token, and 2 P before the first adapter, where the gradient of its
input is not needed either. The thin matrices of an adapter cost 6 P. DoRA's lengths cost per micro-batch, not per
token, and are left out.

The head works on trained tokens only, and never twice. A token attends to earlier tokens of its own document, so
attention grows with the squares of the documents' lengths, not of the packs'. Embedding, norms, rotation and softmax
are not matrix products and do not count; nor does recomputation inside flash attention.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.model.llama_config import MATRICES, LlamaConfig

if TYPE_CHECKING:
    import torch


def training_flops(config: LlamaConfig, lengths: np.ndarray, targets: np.ndarray, *, recompute: str = "none",
                   ranks: Mapping[str, int] | None = None) -> int:
    """FLOPs of forward and backward passes over documents of `lengths` (n,) with `targets` (n,) trained tokens.

    With `ranks` only adapters are trained: their ranks by the names of their matrices.
    """
    tokens, trained = int(lengths.sum()), int(targets.sum())
    pairs = int((lengths * (lengths + 1)).sum()) // 2  # of a token and one that it attends to
    scores = 2 * config.num_attention_heads * config.head_dim * pairs  # 2 E for each pair and head; as much for values
    shapes, full = list(config.matrices().items()), ranks is None
    total, flows = 0, full  # flows: the input depends on trained weights
    for start in range(0, len(shapes), len(MATRICES)):
        block = shapes[start : start + len(MATRICES)]
        has = [ranks is None or name in ranks for name, _ in block]  # something to train: q, k, v, o, gate, up, down
        comes = [flows] * 3 + [flows or any(has[:3])] + [flows or any(has[:4])] * 2 + [flows or any(has[:6])]
        q, k, v = (flows or trains for trains in has[:3])
        flows = flows or any(has)
        total += scores * (2 + (q or k) + q + k + v + 2 * (flows and recompute == "full"))
        for i, (name, (rows, columns)) in enumerate(block):
            product = 2 * tokens * rows * columns
            again = flows and {"none": False, "selective": i == 5, "full": i != 6}[recompute]
            total += product * (1 + comes[i] + full + again)
            if ranks and name in ranks:
                thin, again = 2 * tokens * ranks[name], recompute != "none"
                total += thin * (columns * (2 + comes[i] + again) + rows * (3 + (again and (i != 6 or comes[i]))))
    return total + (6 if full else 4) * config.vocab_size * config.hidden_size * trained


@dataclass(frozen=True)
class Sizes:
    """Numbers in the network's parameters."""

    block: int
    vocabulary: int  # one (V, D) matrix
    total: int

    @classmethod
    def of(cls, config: LlamaConfig) -> "Sizes":
        """Counted from the shape of the network."""
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        shared, inner = config.num_key_value_heads * config.head_dim, config.intermediate_size
        block = 2 * width * (heads + shared) + 3 * width * inner + 2 * width
        block += config.attention_bias * (heads + 2 * shared + width) + config.mlp_bias * (2 * inner + width)
        vocabulary = config.vocab_size * width
        total = config.num_hidden_layers * block + width + vocabulary * (1 if config.tie_word_embeddings else 2)
        return cls(block, vocabulary, total)


@cache
def known_gpus() -> dict[str, dict[str, Any]]:
    """The tables of gpus.toml, by name."""
    return tomllib.loads(Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8"))


@cache
def peak_flops(device: "torch.device") -> float | None:
    """Peak FLOPs a second of `device` in dense bf16 products; None if gpus.toml does not know it."""
    if device.type != "cuda":
        return None
    import torch  # not above: `minisft prepare` counts FLOPs, and should not wait seconds for torch

    name = torch.cuda.get_device_name(device)
    return next((1e12 * gpu["bf16_tflops"] for gpu in known_gpus().values() if gpu["driver"] == name), None)
