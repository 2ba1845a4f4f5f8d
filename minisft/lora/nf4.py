"""NF4: weights in 4 bits, as QLoRA keeps its frozen base (Dettmers et al. 2023, "QLoRA", section 3).

    matrix     64 numbers | 64 numbers | ...            each divided by the largest magnitude of its block
    codes      the nearest of 16 quantiles of a normal distribution, two in a byte, the first in the high half
    absmax     one number a block, less their mean, in groups of 256: 8 bits each and an fp32 scale ("double
               quantisation")

That is 4 + 8/64 + 32/(64 * 256) = 4.127 bits a number. Blocks run along the rows and into the next one; every value
equals bitsandbytes'. Under FSDP the codes are sharded by rows like any matrix, while the statistics, 3% of a matrix,
are on every rank: each depends on the whole matrix, and a shard need not end where a block does.
"""

# O rows, I columns of a matrix; T tokens

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.lora.targets import BLOCK
from minisft.model.llama import matmul

GROUP = 256  # absmax that are scaled together
CODES = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def dynamic_codes() -> Tensor:
    """(256,) the 8-bit numbers of an absmax: 7 decades of both signs, each with twice the steps of the next smaller
    one; 0 and 1 (Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning")."""
    found = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values


class NF4(nn.Module):
    """The statistics of one packed matrix (O, I), whose bytes (O, I / 2) are a parameter elsewhere."""

    absmax: Tensor  # (blocks,) uint8: numbers of `steps`
    mean: Tensor  # ()
    scales: Tensor  # (blocks / GROUP,)
    steps: Tensor  # (256,)
    pairs: Tensor  # (256, 2): the two numbers of a byte

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.shape, blocks = (rows, columns), rows * columns // BLOCK
        for name, empty in (("absmax", torch.empty(blocks, dtype=torch.uint8)), ("mean", torch.empty(())),
                            ("scales", torch.empty(-(-blocks // GROUP))), ("steps", torch.empty(256)),
                            ("pairs", torch.empty(256, 2))):
            self.register_buffer(name, empty, persistent=False)

    def statistics(self) -> tuple[Tensor, ...]:
        """Everything that `dequantise` needs besides the bytes."""
        return self.absmax, self.mean, self.scales, self.steps, self.pairs

    @torch.no_grad()
    def quantise(self, packed: Tensor, start: int, read: Callable[[int, int], Tensor]) -> None:
        """Fill the statistics and `packed` (n, I / 2), rows `start`, ... of the matrix, from `read(start, stop)`. All
        ranks call it; each reads its own rows and those that share a block with them."""
        (rows, columns), device = self.shape, packed.device
        first, last = start * columns // BLOCK, -(-(start + len(packed)) * columns // BLOCK)  # blocks of these rows
        top = first * BLOCK // columns
        numbers = read(top, min(-(-last * BLOCK // columns), rows)).to(device).float().flatten()
        numbers = numbers[first * BLOCK - top * columns :][: (last - first) * BLOCK].view(-1, BLOCK)
        own = numbers.abs().amax(dim=1)
        codes = torch.tensor(CODES, device=device)
        found = nearest(numbers * (1 / own.clamp(min=1e-38))[:, None], codes)
        found = found.flatten()[start * columns - first * BLOCK :][: len(packed) * columns].view(-1, 2)
        packed.copy_((found[:, 0] << 4 | found[:, 1]).view(packed.shape))
        absmax = torch.zeros(len(self.absmax), device=device)
        absmax[first:last] = own
        if dist.is_initialized():
            dist.all_reduce(absmax, op=dist.ReduceOp.MAX)  # exact: two ranks that share a block agree
        self.steps.copy_(dynamic_codes())
        self.pairs.copy_(torch.stack((codes.repeat_interleave(16), codes.repeat(16)), dim=1))
        self.mean.copy_(absmax.mean())
        groups = F.pad(absmax - self.mean, (0, -len(absmax) % GROUP)).view(-1, GROUP)
        self.scales.copy_(groups.abs().amax(dim=1))
        steps = nearest(groups * (1 / self.scales.clamp(min=1e-38))[:, None], self.steps)
        self.absmax.copy_(steps.flatten()[: len(absmax)])


def nearest(values: Tensor, codes: Tensor) -> Tensor:
    """Index (uint8) of the nearest of the ascending `codes`; on a tie, the smaller."""
    return torch.bucketize(values.clamp(-1, 1), (codes[:-1] + codes[1:]) / 2, out_int32=True).to(torch.uint8)


def dequantise(packed: Tensor, statistics: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """(O, I / 2) bytes -> (O, I), computed in fp32 and rounded once."""
    absmax, mean, scales, steps, pairs = statistics
    widths = steps[absmax.int()] * scales.repeat_interleave(GROUP)[: len(absmax)] + mean
    return (pairs[packed.int()].view(-1, BLOCK) * widths[:, None]).to(dtype).view(len(packed), -1)


class _DequantisedLinear(torch.autograd.Function):
    """`x @ W.T` with W dequantised for each product, again in the backward pass: it is never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, *statistics: Tensor) -> Tensor:
        ctx.save_for_backward(packed, *statistics)
        return matmul(x, dequantise(packed, statistics, x.dtype).T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, *statistics = ctx.saved_tensors
        return matmul(grad, dequantise(packed, statistics, grad.dtype)), *[None] * (1 + len(statistics))


def nf4_linear(x: Tensor, packed: Tensor, nf4: NF4) -> Tensor:
    """(T, I) and the packed (O, I / 2) -> (T, O), in the dtype of `x`."""
    return _DequantisedLinear.apply(x, packed, *nf4.statistics())
