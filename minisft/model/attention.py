"""Causal attention within documents that lie one after another in a single stream of tokens.

    stream     a0 a1 a2 b0 b1          lengths [3, 2]   cu_seqlens [0, 3, 5]   positions [0, 1, 2, 0, 1]
    attends    a0 | a0 a1 | a0 a1 a2 | b0 | b0 b1

The boundaries are explicit and never inferred from the tokens, and there is no backend that could ignore them: CUDA
runs the variable-length flash kernel (Dao 2023, "FlashAttention-2"), and one call for each document where that kernel
takes no such heads; the CPU goes document by document too. A mask of size T x T is never built, so the cost falls with
the length of the documents instead of the length of the stream.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from minisft.model.document_attention import document_attention
from minisft.model.precision import product_dtype


@dataclass(frozen=True)
class Documents:
    """Where the documents of a stream of T tokens begin and end.

    Lengths are on the host: reading them never waits for the device.
    """

    lengths: tuple[int, ...]  # tokens of each
    longest: int  # of these, found once for all layers
    cu_seqlens: Tensor  # (N + 1,) int32: offset of each document's first token, and T
    positions: Tensor  # (T,) int64: position of each token in its own document

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...], *, device: torch.device | str = "cpu") -> "Documents":
        offsets = (0, *accumulate(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(lengths, max(lengths), torch.tensor(offsets, dtype=torch.int32).to(device), positions.to(device))


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Queries (T, H, E), keys and values (T, K, E) -> (T, H, E). H / K query heads share a key/value head."""
    if is_for_flash(q):
        return varlen_attn(q, k, v, documents.cu_seqlens, documents.cu_seqlens, documents.longest, documents.longest,
                           window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])
    if q.is_cuda:
        return attend_each(q, k, v, documents.lengths)
    dtype = q.dtype
    q, k, v = (x.to(product_dtype(x)) for x in (q, k, v))
    return document_attention(q, k, v, documents.cu_seqlens).to(dtype)


def is_for_flash(q: Tensor) -> bool:
    """Whether the flash kernel takes queries like these: 16 bits, heads of a multiple of 8 channels, 256 at most."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256


@torch.compiler.disable  # a graph would be for one list of lengths
def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """`attend` on any GPU in any precision. The lengths are on the host, so it does not wait for the device."""
    # Heads are repeated: of the kernels for fp32, only one that keeps all L x L scores shares them.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    pieces = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v))
    out = [F.scaled_dot_product_attention(*qkv, is_causal=True) for qkv in zip(*pieces, strict=True)]
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1)
