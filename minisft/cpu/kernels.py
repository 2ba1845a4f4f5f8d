"""Kernels for a CPU that use less memory, sum more exactly or run faster than PyTorch's.

Attention by document is made of matrix products. A block of ROWS queries is taken at a time, against the keys up to its
end: what lies above the diagonal is never computed, except the triangle in the last ROWS columns, and the scores of a
block stay in the processor's cache.

    keys       0 ......... a ... b
    queries   [a, b)      | full | triangle |      scores (G ROWS, b) for each key/value head

Scores and their softmax are fp32, as in flash kernels; weights are rounded once to the dtype of the values. The
backward pass computes the weights again from queries and keys, so only these are kept (Dao et al. 2022,
"FlashAttention", section 3.1, without the tiling over keys, which caches of a megabyte do not need). It is an operator
of its own, `minisft::document_attention`, so that torch.compile and selective checkpointing see one step instead of a
loop whose length depends on the documents.
"""

# T tokens, D model width, H query heads, K key/value heads, G = H / K, E head width; L tokens of a document, n queries
# of a block. The G query heads that share a key/value head become rows of one product.

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.model.llama import cast

ROWS = 64

# PyTorch answers this only for the whole library, so the CPU's flags are asked.
CPU_MATMULS_IN_BF16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` are computed: fp32 for bf16 on a CPU without instructions for it.

    There PyTorch falls back to a loop that is several times slower than fp32. The result is the same: a product of two
    bf16 numbers is exact in fp32. Widened copies live for one product only, so activations stay bf16 in memory.
    """
    return torch.float32 if dtype == torch.bfloat16 and not CPU_MATMULS_IN_BF16 else dtype


def attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Queries (T, H, E), keys and values (T, K, E), offsets (N + 1,) on the host -> (T, H, E), on any device."""
    dtype = product_dtype(q.dtype) if q.is_cpu else q.dtype
    return document_attention(*(x.to(dtype) for x in (q, k, v)), offsets).to(q.dtype)


@torch.library.custom_op("minisft::document_attention", mutates_args=())
def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Queries (T, H, E), keys and values (T, K, E), offsets (N + 1,) -> (T, H, E)."""
    heads, q = k.shape[1], q * q.shape[-1] ** -0.5
    out, = _like(q)
    for document in _documents(cu_seqlens):
        queries, keys, values = (_by_head(x[document], heads) for x in (q, k, v))
        rows = out[document].unflatten(1, (heads, -1))  # (L, K, G, E)
        for start, stop in _blocks(queries.shape[2]):
            weights = _weights(queries[:, :, start:stop], keys[:, 0, :stop])
            rows[start:stop] = _by_token(weights @ values[:, 0, :stop], stop - start)
    return out


@torch.library.custom_op("minisft::document_attention_backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, scale = k.shape[1], q.shape[-1] ** -0.5
    grad_q, grad_k, grad_v = _like(q, k, v)
    q = q * scale
    for document in _documents(cu_seqlens):
        queries, keys, values, grads = (_by_head(x[document], heads) for x in (q, k, v, grad))
        keys, values = keys[:, 0], values[:, 0]  # (K, L, E)
        sum_k, sum_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (keys, values))
        rows = grad_q[document].unflatten(1, (heads, -1))
        for start, stop in _blocks(queries.shape[2]):
            block, grad_block = queries[:, :, start:stop], grads[:, :, start:stop].flatten(1, 2)
            weights = _weights(block, keys[:, :stop])  # (K, G n, stop)
            sum_v[:, :stop] += weights.mT @ grad_block
            # p * (dp - sum(dp * p)) for each row
            grad_scores = torch._softmax_backward_data(grad_block @ values[:, :stop].mT, weights, -1, weights.dtype)
            rows[start:stop] = _by_token(grad_scores @ keys[:, :stop], stop - start)
            sum_k[:, :stop] += grad_scores.mT @ block.flatten(1, 2)
        grad_k[document], grad_v[document] = sum_k.transpose(0, 1), sum_v.transpose(0, 1)
    return grad_q.mul_(scale), grad_k, grad_v


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


document_attention.register_fake(lambda q, k, v, offsets: _like(q)[0])
_backward.register_fake(lambda grad, q, k, v, offsets: _like(q, k, v))
document_attention.register_autograd(
    lambda ctx, grad: (*_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def _documents(cu_seqlens: Tensor) -> Iterator[slice]:
    offsets = cu_seqlens.tolist()
    return map(slice, offsets[:-1], offsets[1:])


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + ROWS, length)) for start in range(0, length, ROWS))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(L, H, E) -> (heads, H / heads, L, E), contiguous"""
    return x.unflatten(1, (heads, -1)).permute(1, 2, 0, 3).contiguous()


def _by_token(x: Tensor, n: int) -> Tensor:
    """(K, G n, E) -> (n, K, G, E)"""
    return x.unflatten(1, (-1, n)).permute(2, 0, 1, 3)


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """Queries (K, G, n, E), the last n of which the keys (K, b, E) end with -> (K, G n, b), rows that sum to 1."""
    n = queries.shape[2]
    scores = queries.flatten(1, 2).float() @ keys.mT.float()
    later = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
    scores.unflatten(1, (-1, n))[..., -n:].masked_fill_(later, float("-inf"))
    return scores.softmax(dim=-1).to(queries.dtype)


class _Norm(torch.autograd.Function):
    """y = w x r      r = 1 / sqrt(mean(x^2) + eps)      dx = r (w dy - n mean(n w dy)),  n = x r

    On a CPU PyTorch composes it from operations that each keep an fp32 copy for the backward pass. This keeps only x
    and r, which saves a small model a fifth of the memory of all activations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()  # (T, 1)
        ctx.save_for_backward(x, weight, r)
        return cast(x * r * weight, x.dtype)  # not in place: compiled by torch 2.11, that loses the gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        normed = x * r  # fp32
        product = grad * normed
        grad_weight = cast(product.sum(dim=0), weight.dtype)
        shared = product.mul_(weight).mean(dim=-1, keepdim=True)
        return cast(((grad * weight.float()) - normed * shared) * r, x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(T, D) and (D,) -> (T, D): computed in fp32, rounded once."""
    return _Norm.apply(x, weight, eps)


class _Embedding(torch.autograd.Function):
    """PyTorch sums the gradient of a bf16 table in bf16; this sums it in fp32, some columns at a time."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = len(weight)
        return weight[tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        tokens, = ctx.saved_tensors
        summed = grad.new_empty(ctx.rows, grad.shape[1])
        for some, out in zip(grad.split(64, dim=1), summed.split(64, dim=1), strict=True):
            out.copy_(torch.zeros(out.shape, dtype=torch.float32).index_add_(0, tokens, some.float()))
        return None, summed


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """(T,) and (V, D) -> (T, D)."""
    return _Embedding.apply(tokens, weight) if weight.dtype == torch.bfloat16 else F.embedding(tokens, weight)
