"""Root mean square norm (Zhang and Sennrich 2019): each token's channels divided by their root mean square.

    y = w x r      r = 1 / sqrt(mean(x^2) + eps)      dx = r (w dy - n mean(n w dy)),  n = x r

Computed in fp32 and rounded once. CUDA has a kernel for it. On a CPU PyTorch composes it from single operations, each
of which keeps an fp32 copy for the backward pass; here only x and r are kept, which for a small model is a fifth of the
memory of all activations.
"""

# T tokens, D model width

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.precision import cast


class RMSNorm(nn.Module):
    """(T, D) -> (T, D), in the dtype of the input."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return _Norm.apply(x, weight, self.eps) if x.is_cpu else F.rms_norm(x, weight.shape, weight, self.eps)


class _Norm(torch.autograd.Function):
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
