"""Causal attention within documents that lie one after another in a single stream of tokens.

    stream     a0 a1 a2 b0 b1          lengths [3, 2]   cu_seqlens [0, 3, 5]   positions [0, 1, 2, 0, 1]
    attends    a0 | a0 a1 | a0 a1 a2 | b0 | b0 b1

The boundaries are explicit and never inferred from the tokens, and there is no backend that could ignore them: CUDA
runs the variable-length flash kernel (Dao 2023, "FlashAttention-2"), the CPU goes document by document. A mask of size
T x T is never built, so the cost falls with the length of the documents instead of the length of the stream.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from minisft.model.document_attention import document_attention
from minisft.model.precision import product_dtype


@dataclass(frozen=True)
class Documents:
    """Where the documents of a stream of T tokens begin and end."""

    lengths: tuple[int, ...]  # tokens of each, on the host: reading them never waits for the device
    cu_seqlens: Tensor  # (N + 1,) int32: offset of each document's first token, and T
    positions: Tensor  # (T,) int64: position of each token in its own document

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...], *, device: torch.device | str = "cpu") -> "Documents":
        offsets = (0, *accumulate(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(lengths, torch.tensor(offsets, dtype=torch.int32), positions).to(device)

    def to(self, device: torch.device | str) -> "Documents":
        """The same documents on `device`; from pinned memory the copy does not wait."""
        return Documents(self.lengths, self.cu_seqlens.to(device, non_blocking=True),
                         self.positions.to(device, non_blocking=True))


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Queries (T, H, E), keys and values (T, K, E) -> (T, H, E). H / K query heads share a key/value head."""
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(documents.lengths)
        return varlen_attn(q, k, v, documents.cu_seqlens, documents.cu_seqlens, longest, longest,
                           window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])
    dtype = q.dtype
    q, k, v = (x.to(product_dtype(x)) for x in (q, k, v))
    return document_attention(q, k, v, documents.cu_seqlens).to(dtype)
