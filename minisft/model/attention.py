"""Causal attention within documents that lie one after another in a single stream of tokens.

    stream     a0 a1 a2 b0 b1          lengths [3, 2]   cu_seqlens [0, 3, 5]   positions [0, 1, 2, 0, 1]
    attends    a0 | a0 a1 | a0 a1 a2 | b0 | b0 b1

The boundaries are explicit and never inferred from the tokens, and there is no backend that could ignore them: CUDA
runs the variable-length flash kernel (Dao 2023, "FlashAttention-2"); the CPU, and a GPU in fp32, go document by
document. A mask of size T x T is never built, so the cost falls with the length of the documents instead of the length
of the stream.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minisft.model.document_attention import document_attention
from minisft.model.precision import product_dtype
from minisft.versions import VARLEN_WANTS_GQA


@dataclass(frozen=True)
class Documents:
    """Where the documents of a stream of T tokens begin and end. What the host needs, it has: it never waits for it."""

    offsets: Tensor  # (N + 1,) int32, on the host: of each document's first token, and T
    cu_seqlens: Tensor  # the same on the device
    positions: Tensor  # (T,) int64: position of each token in its own document
    longest: int  # tokens of the longest document, found once for all layers
    kept: list[tuple[Tensor, Tensor]] | None = None  # generation gives a list, and finds every layer's keys and values
    draws: Tensor | None = None  # (T,) int32: what each token's dropout is drawn from, where there is any (lora.py)

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...], *, device: torch.device | str = "cpu") -> "Documents":
        """Documents of so many tokens each, one after another."""
        offsets = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(offsets, offsets.to(device), positions.to(device), max(lengths))


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Queries (T, H, E), keys and values (T, K, E) -> (T, H, E). H / K query heads share a key/value head."""
    if documents.kept is not None:
        documents.kept.append((k, v))
    if is_for_flash(q):
        from torch.nn.attention.varlen import varlen_attn  # imported late: it loads the compiler, which takes a second

        shares: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if VARLEN_WANTS_GQA else {}
        return varlen_attn(  # type: ignore[return-value]  # a pair only where the log-partitions are asked for
            q, k, v, documents.cu_seqlens, documents.cu_seqlens, documents.longest, documents.longest,
            window_size=(-1, 0), **shares)
    dtype = q.dtype
    q, k, v = (x.to(product_dtype(x)) for x in (q, k, v))
    return document_attention(q, k, v, documents.offsets).to(dtype)


def is_for_flash(q: Tensor) -> bool:
    """Whether the flash kernel takes queries like these: 16 bits, heads of a multiple of 8 channels, 256 at most."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
