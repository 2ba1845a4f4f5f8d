"""Stochastic rounding to bf16, which loses nothing on average.

    fp32 bits   s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm     add 16 random bits below the bf16 number, cut them off:
    bf16 bits   s eeeeeeee mmmmmmm                      a number 3/10 of the way to the next goes there 3 times in 10

At a learning rate of 2e-5 most updates are smaller than half the distance between two bf16 numbers. Rounding to nearest
loses each of them; stochastic rounding applies a few of them in full (Gupta et al. 2015, "Deep Learning with Limited
Numerical Precision"; Zamirai et al. 2020, "Revisiting BFloat16 Training").

The random bits are a hash of (seed, step, parameter, element) (counter_rng.py).
"""

import torch
from torch import Tensor


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 `values` rounded to bf16 numbers by the low 16 of `bits`, still in fp32.

    bf16 numbers and infinities stay as they are; NaN stays NaN; numbers past the largest one become infinite.
    """
    moved = (bits & 0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(values.isnan(), values, moved)  # adding to a NaN's bits can carry over into numbers
