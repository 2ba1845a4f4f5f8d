"""AdamW on this rank's part of the parameters, and the learning rate of each step.

AdamW (Loshchilov and Hutter 2019) on fp32 master weights: at a learning rate of 2e-5 most updates are smaller than the
distance between two neighbouring bf16 numbers, and would be lost if the weights were kept in bf16. Matrices may decay;
norms and biases do not.

The update is element by element, so each rank applies it to the rows it holds and no rank needs the others' rows. Only
the gradient's norm is about the whole: one number is summed over the ranks.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minisft.model.weights import local_rows

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Fused AdamW over the rows that this rank holds of each trained parameter of `model`.

    Plain tensors that share the parameters' memory: the fused kernels take all of them at once, where sharded tensors
    are dispatched one by one. `mesh` is the mesh that the parameters are sharded over.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None = None, *, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rows = {name: nn.Parameter(local_rows(p.detach())[0]) for name, p in self.parameters.items()}
        # HSDP copies hold the same rows, which must not be counted twice.
        self._shard_group = mesh.get_group("shard") if mesh else None
        self._device = mesh.device_type if mesh else None  # where ranks talk, also if the rows are on the host
        groups = [{"params": [p for p in self.rows.values() if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in self.rows.values() if p.dim() < 2], "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
        self.prepare(0)

    def prepare(self, steps: float) -> None:
        """Zero moments, as after `steps` steps; a checkpoint then fills them."""
        for rows in self.rows.values():
            self.adamw.state[rows] = {"step": torch.tensor(float(steps), device=rows.device),
                                      **{moment: torch.zeros_like(rows) for moment in MOMENTS}}

    def moments(self, moment: str) -> dict[str, Tensor]:
        """This rank's rows of the first ("exp_avg") or second ("exp_avg_sq") moment, by parameter."""
        return {name: self.adamw.state[rows][moment] for name, rows in self.rows.items()}

    def steps(self) -> float:
        """The steps that were taken, without those skipped; reading it waits for the device."""
        return float(next(iter(self.adamw.state.values()))["step"])

    def clip(self, largest: float) -> Tensor:
        """Scale the gradient to a Euclidean norm of at most `largest` (0: leave it); returns the norm it had.

        The norm is that of all parameters on all ranks; the host waits for it only where the rows are its own.
        """
        for name, parameter in self.parameters.items():
            self.rows[name].grad = None if parameter.grad is None else local_rows(parameter.grad)[0]
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.rows.values() if p.grad is not None])
        local = norm.device
        if self._shard_group:
            norm = norm.to(self._device) ** 2
            dist.all_reduce(norm, group=self._shard_group)
            norm = norm.sqrt()
        if largest:
            torch.nn.utils.clip_grads_with_norm_(self.rows.values(), largest, norm)
        # Where this is 1, the fused kernel leaves everything as it is.
        self.adamw.found_inf = (~norm.isfinite()).float().to(local)
        return norm

    def step(self, lr: float) -> None:
        """Update the parameters with learning rate `lr`, and drop the gradients. `clip` comes first.

        Where the gradient's norm is not finite, no parameter and no moment is touched on any rank, and the host need
        not know.
        """
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for name, parameter in self.parameters.items():
            self.rows[name].grad = parameter.grad = None


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
