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

from collections.abc import Mapping

import numpy as np

from minisft.model.llama_config import MATRICES, LlamaConfig


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
