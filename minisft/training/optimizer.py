"""AdamW and the learning rate of each step.

AdamW (Loshchilov and Hutter 2019) on fp32 master weights: at a learning rate of 2e-5 most updates are smaller than the
distance between two neighbouring bf16 numbers, and would be lost if the weights were kept in bf16. Matrices may decay;
norms and biases do not.
"""

import math

import torch
from torch import nn


def build_optimizer(model: nn.Module, *, weight_decay: float, betas: tuple[float, float],
                    eps: float) -> torch.optim.AdamW:
    """Fused AdamW over the parameters of `model` that require gradients; `set_lr` gives it the learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def learning_rate(step: int, *, total_steps: int, peak: float, schedule: str = "cosine", warmup_steps: int = 0,
                  min_ratio: float = 0.0, decay_fraction: float = 0.1) -> float:
    """The rate of `step` (from 0) of `total_steps`: a line up to `peak`, then down to `min_ratio * peak` at the end.

    Warm-up of 4: 1/4, 2/4, 3/4, 4/4, so that the first step is not wasted on a rate of zero. "cosine" and "linear" fall
    from there; "constant" stays; "wsd" stays and falls in a line over the last `decay_fraction` of all steps (Hu et al.
    2024, "MiniCPM", section 4).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = max(warmup_steps, round(total_steps * (1 - decay_fraction))) if schedule == "wsd" else warmup_steps
    progress = min(max(step - start, 0) / max(total_steps - start, 1), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return peak * (min_ratio + (1 - min_ratio) * share)
