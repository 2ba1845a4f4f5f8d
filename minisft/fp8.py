"""FP8: the matrices of the blocks multiply 8-bit numbers, which GPUs do twice as fast as bf16 (Ada, Hopper and newer).

    x (T, I) -> / its scale -> e4m3 --\\
                                       product, summed in fp32 -> * both scales -> bf16
    W (O, I) -> / its scale -> e4m3 --/

A number in e4m3 has 3 bits after the leading one and reaches 448. Gradients are e5m2, 2 bits but a reach of 57,344
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning"). The scale makes the largest number of a tensor the largest
number of the format, so nothing overflows; it is found anew for each product, so there is no history to save or resume.
`train.fp8_scale = "row"` gives each row of each factor a scale of its own: an outlier then costs only its row.

Everything else is as in bf16: masters, sums, norms, attention, embedding, head, adapters, what ranks send, what is
exported. A GPU multiplies by `torch._scaled_mm`; a CPU computes the same definition in fp32, slowly, for tests.
"""

# T tokens, I inputs and O outputs of a matrix; a product takes (M, K) and (N, K) to (M, N)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.errors import UserError
from minisft.model.llama import Linear, cast

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNED = 16  # numbers: of a row, for the tensor cores
NEEDS = (8, 9)  # compute capability
Quantised = tuple[Tensor, Tensor]  # a matrix in FP8, and its scales


def quantise(x: Tensor, dtype: torch.dtype, dim: int | tuple[int, int]) -> Quantised:
    """`x` (rows, columns) in FP8, and the scales that it must be multiplied by: one for each row (`dim` 1) or column
    (0), or one for all (0, 1). NaN and infinity make their scale, and so the product, NaN."""
    scale = x.abs().amax(dim, keepdim=True).float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def product(left: Quantised, right: Quantised, dtype: torch.dtype, *, exact: bool = True) -> Tensor:
    """(M, K) and (N, K), quantised -> (M, N) `left @ right.T` in `dtype`. Not `exact`: the tensor cores sum 128
    products at a time in fewer than 32 bits, as is usual for forward passes."""
    (a, a_scale), (b, b_scale) = left, right
    if not a.is_cuda:
        return (a.float() @ b.float().T * (a_scale * b_scale.T)).to(dtype)
    if rest := -a.shape[1] % ALIGNED:  # tokens that are summed over, if layers are not compiled
        a, b = (F.pad(x.view(torch.uint8), (0, rest)).view(x.dtype) for x in (a, b))
    return torch._scaled_mm(a.contiguous(), b.contiguous().T, scale_a=a_scale, scale_b=b_scale.T, out_dtype=dtype,
                            use_fast_accum=not exact)


class _Fp8Linear(torch.autograd.Function):
    """All three products of a matrix. What the backward pass quantises again, the compiler finds to be the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, by_row: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.by_row = by_row
        over = 1 if by_row else (0, 1)
        return product(quantise(x, E4M3, over), quantise(cast(weight, x.dtype), E4M3, over), x.dtype, exact=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), grad_x, grad_weight = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            turned = _turned(cast(weight, grad.dtype), E4M3, ctx.by_row)
            grad_x = product(quantise(grad, E5M2, 1 if ctx.by_row else (0, 1)), turned, grad.dtype)
        if ctx.needs_input_grad[1]:
            factors = _turned(grad, E5M2, ctx.by_row), _turned(x, E4M3, ctx.by_row)
            grad_weight = cast(product(*factors, grad.dtype), weight.dtype)
        return grad_x, grad_weight, None


def _turned(x: Tensor, dtype: torch.dtype, by_row: bool) -> Quantised:
    """`x.T`, quantised."""
    numbers, scale = quantise(x, dtype, 0 if by_row else (0, 1))
    return numbers.T, scale.T


def by_tensor(x: Tensor, weight: Tensor) -> Tensor:
    """(T, I) and (O, I) -> (T, O) `x @ weight.T`, with one scale for each tensor."""
    return _Fp8Linear.apply(x, weight, False)


def by_row(x: Tensor, weight: Tensor) -> Tensor:
    """(T, I) and (O, I) -> (T, O) `x @ weight.T`, with a scale for each row that is multiplied."""
    return _Fp8Linear.apply(x, weight, True)


def use(model: nn.Module, scale: str) -> None:
    """Let the matrices of the blocks in `model` multiply in FP8, frozen ones too; `scale`: tensor or row. Raises
    UserError for a GPU or a shape that has no such products."""
    if torch.cuda.is_available() and (has := torch.cuda.get_device_capability()) < NEEDS:
        raise UserError(f"train.precision = fp8: {torch.cuda.get_device_name()} has compute capability "
                        f"{has[0]}.{has[1]}, FP8 needs {NEEDS[0]}.{NEEDS[1]} (Ada, Hopper or newer); set it to bf16")
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            if module.in_features % ALIGNED or module.out_features % ALIGNED:
                raise UserError(f"train.precision = fp8: {name} is {module.out_features} x "
                                f"{module.in_features}, and FP8 products take multiples of {ALIGNED}; set it to bf16")
            module.multiply = by_row if scale == "row" else by_tensor
