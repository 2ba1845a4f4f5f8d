"""The arithmetic of training, counted from the shape of the network: multiplications and additions of matrix products.

A matrix of P numbers costs 2 P for each token of the forward pass and 4 P of the backward pass (once for the gradient
of its input, once for its own): 6 P a token (Kaplan et al. 2020, section 2.1). Where the backward pass computes
whole blocks again it is 8 P, but for the last matrix of each: nothing needs its product, so torch stops before it.
Selective recomputation multiplies one matrix of a block again, a feed-forward one (llama.py).

As this engine computes it, the head works on trained tokens only and never twice, and a token attends to the earlier
tokens of its own document, so attention grows with the squares of the documents' lengths, not of the packs'. Embedding,
norms, rotation and softmax are no matrix products and do not count; nor does what flash attention computes twice.
"""

import numpy as np

from minisft.model.config import LlamaConfig


def training_flops(config: LlamaConfig, lengths: np.ndarray, targets: np.ndarray, *, recompute: str = "none") -> int:
    """FLOPs of forward and backward passes over documents of `lengths` (n,) with `targets` (n,) trained tokens."""
    heads, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # q and o, k and v, and the three matrices of the feed-forward network
    block = 2 * config.hidden_size * (heads + shared) + 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    tokens, trained = int(lengths.sum()), int(targets.sum())
    pairs = int((lengths * (lengths + 1)).sum()) // 2  # of a token and one that it attends to
    forward = 2 * block * tokens + 2 * 2 * heads * pairs  # scores and weighted values, 2 E for each pair and head
    wide = 2 * config.hidden_size * config.intermediate_size * tokens
    again = {"none": 0, "selective": wide, "full": forward - wide}[recompute]
    return config.num_hidden_layers * (3 * forward + again) + 6 * head * trained
