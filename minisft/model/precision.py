"""Matrix products in bf16: of weights that are kept in fp32, and fast on every machine.

A lone process keeps fp32 weights and converts each for its product; sharded ones are gathered in bf16 already.
A bf16 product is defined as: operands rounded to bf16, sums in fp32, result rounded to bf16. Accelerators and newer
CPUs have instructions for it. On a CPU that lacks them PyTorch falls back to a loop that is several times slower than
fp32; there the operands are widened and multiplied in fp32, which is the same definition by another route (a product
of two bf16 numbers is exact in fp32). The widened copies live for one product only, so activations stay bf16 in memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that recipes and options have for them

# The only public question PyTorch answers is about the whole library, so the CPU's flags are asked.
CPU_MATMULS_IN_BF16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _ConvertedLinear(torch.autograd.Function):
    """Operands are converted for each product, again in the backward pass: no copy of a weight outlives its product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        dtype = product_dtype(x)
        return cast(cast(x, dtype) @ operand(weight, x).T, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dtype = product_dtype(x)
        wide = cast(grad, dtype)
        grad_x = cast(wide @ operand(weight, x), x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = cast(cast(wide.T @ cast(x, dtype), x.dtype), weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; `x` itself if it is in `dtype` already.

    Not `x.to(dtype)`: when torch 2.11 compiles a custom autograd Function that returns a `to` with nothing to do, the
    Function's input silently gets no gradient.
    """
    return x if x.dtype == dtype else x.to(dtype)


def operand(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` as a product with activations like `x` takes it: rounded to their dtype, and widened again where that is
    faster."""
    return cast(cast(weight, x.dtype), product_dtype(x))


def product_dtype(x: Tensor) -> torch.dtype:
    """What operands of a product are converted to where activations are like `x`: their dtype, or fp32 where that is
    faster on this machine."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MATMULS_IN_BF16
    return torch.float32 if slow else x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(T, D) and (O, D) -> (T, O): `x @ weight.T` in the dtype of `x`."""
    as_they_are = x.dtype == weight.dtype == product_dtype(x)
    return F.linear(x, weight) if as_they_are else _ConvertedLinear.apply(x, weight)


class _Embedding(torch.autograd.Function):
    """Rows of a bf16 table. PyTorch's gradient on a CPU adds up what a frequent token gets in bf16; here in fp32, for
    some columns at a time."""

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


class Embedding(nn.Embedding):
    """`nn.Embedding` whose gradient is summed in fp32 on every device."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T, D)."""
        narrow = self.weight.is_cpu and self.weight.dtype == torch.bfloat16
        return _Embedding.apply(tokens, self.weight) if narrow else super().forward(tokens)


class Linear(nn.Linear):
    """`nn.Linear` with the product above: computes in the dtype of its input, whatever its parameters are kept in."""

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, O). `draws` are for the dropout of an adapter (lora.py), which this has not."""
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)
