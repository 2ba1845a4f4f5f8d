"""Matrix products in bf16 that are fast on every machine.

A bf16 product is defined as: operands rounded to bf16, sums in fp32, result rounded to bf16. Accelerators and newer
CPUs have instructions for it. On a CPU that lacks them PyTorch falls back to a loop that is several times slower than
fp32; there the operands are widened and multiplied in fp32, which is the same definition by another route (a product
of two bf16 numbers is exact in fp32). The widened copies live for one product only, so activations stay bf16 in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The only public question PyTorch answers is about the whole library, so the CPU's flags are asked.
CPU_MATMULS_IN_BF16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _WidenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x.float() @ weight.float().T).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = grad.float()
        grad_x = (wide @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = (wide.T @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def is_slow(x: Tensor) -> bool:
    """Whether this machine multiplies tensors like `x` faster after widening them."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MATMULS_IN_BF16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(T, D) and (O, D) -> (T, O): `x @ weight.T`."""
    return _WidenedLinear.apply(x, weight) if is_slow(x) else F.linear(x, weight)


class Linear(nn.Linear):
    """`nn.Linear`, with the product above."""

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, O)"""
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias
