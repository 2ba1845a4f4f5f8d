"""Stochastic rounding to bf16: up or down by chance, so that on average nothing is lost.

    fp32 bits   s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm     add 16 random bits below the bf16 number, cut them off:
    bf16 bits   s eeeeeeee mmmmmmm                      a number 3/10 of the way to the next goes there 3 times in 10

At a learning rate of 2e-5 most updates are smaller than half the distance between two bf16 numbers. Rounding to the
nearest loses each of them; rounding by chance applies a few of them in full (Gupta et al. 2015, "Deep Learning with
Limited Numerical Precision"; Zamirai et al. 2020, "Revisiting BFloat16 Training").

The random bits are a hash of (seed, step, parameter, element) (counter_rng.py).
"""

import torch
from torch import Tensor


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 `values` rounded to what bf16 can hold, by the low 16 of `bits`; still in fp32.

    What bf16 can hold, infinities among it, stays as it is; NaN stays NaN; past the largest number lies infinity.
    """
    moved = (bits & 0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(values.isnan(), values, moved)  # the sum runs over the end of the NaNs, into numbers
