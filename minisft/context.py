"""Context parallelism: a document that no GPU holds alone, over several of them (`parallel.context`).

c consecutive ranks share a stream. Everything but attention works on single tokens, so each rank takes a c-th of the
tokens. Attention works on single heads, so around it the ranks exchange tokens for heads: each then has all tokens of
a c-th of the heads (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv 2309.14509).

            heads 0 1 2 3                   heads 0 1 | 2 3
    rank 0  a0 a1 a2 a3     exchange     a0 ... b3  |  a0 ... b3       attention by document, as without sharing,
    rank 1  a4 b1 b2 b3    <-------->      rank 0   |    rank 1        then back again

So whole documents with the same `cu_seqlens` meet the same kernel, and no document can see another. Keys and values
that have fewer heads than there are ranks are repeated. The loss is a sum over tokens, so nothing else changes.
"""

# T tokens in the stream, c ranks that share it, H query heads, K key/value heads, E head width

from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minisft.errors import UserError
from minisft.model.llama import Attention, Documents, Llama, attend
from minisft.model.llama_config import LlamaConfig


def check(ranks: int, network: LlamaConfig) -> None:
    """Raise UserError if the heads of `network` cannot be divided over `ranks`."""
    if not divides(ranks, network):
        heads, shared = network.num_attention_heads, network.num_key_value_heads
        good = ", ".join(str(n) for n in range(1, heads + 1) if divides(n, network))
        raise UserError(f"parallel.context = {ranks}: the network's {heads} query heads and {shared} key/value heads "
                        f"cannot be divided evenly over {ranks} ranks; set it to one of {good}")


def divides(ranks: int, network: LlamaConfig) -> bool:
    """True if each of `ranks` gets as many query heads, and whole key/value heads, or all of them a part of one."""
    shared = network.num_key_value_heads
    return network.num_attention_heads % ranks == 0 and (shared % ranks == 0 or ranks % shared == 0)


def share(model: Llama, ranks: int, timeout: timedelta) -> None:
    """Let each `ranks` consecutive ranks share the streams that say so (`Documents.ranks`); others stay whole. All
    ranks of the process group call it. Raises UserError if the heads cannot be divided."""
    check(ranks, model.config)
    group, _ = dist.new_subgroups(ranks, timeout=timeout)
    attention = partial(attend_shared, group=group.group_name)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attention


def attend_shared(q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, group: str) -> Tensor:
    """`attend` on a rank's part of the stream: (T/c, H, E) and (T/c, K, E) -> (T/c, H, E)."""
    ranks = documents.ranks
    if ranks == 1:
        return attend(q, k, v, documents)
    if (repeats := ranks // k.shape[1]) > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    by_rank = [x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in (q, k, v)]  # (c, T/c, H/c, E) or (c, T/c, K/c, E)
    sizes = [x.shape[2] for x in by_rank]
    q, k, v = _Exchange.apply(torch.cat(by_rank, dim=2), group).flatten(0, 1).split(sizes, dim=1)  # (T, H/c, E) ...
    y = attend(q, k, v, documents).unflatten(0, (ranks, -1))  # (c, T/c, H/c, E)
    return _Exchange.apply(y, group).transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """(c, ...) -> (c, ...): part i goes to rank i of the group, and part i of the result comes from it. The gradients
    go back in the same way."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: str) -> Tensor:
        ctx.group = group
        return all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grad, ctx.group), None


def all_to_all(parts: Tensor, group: str) -> Tensor:
    """The exchange itself, by an operator that torch.compile and selective checkpointing see as one."""
    operators, each = torch.ops._c10d_functional, [1] * len(parts)
    return operators.wait_tensor(operators.all_to_all_single(parts.contiguous(), each, each, group))
