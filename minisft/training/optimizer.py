"""AdamW on this rank's rows of the parameters, and the learning rate of each step.

AdamW (Loshchilov and Hutter 2019) on fp32 master weights: at a learning rate of 2e-5 most updates are smaller than the
distance between two neighbouring bf16 numbers, so bf16 weights would lose them. Matrices may decay; norms and biases do
not. The update is element by element, so each rank applies it to the rows it holds and no rank needs the others' rows.
Only the gradient's norm is about the whole: one number is summed over the ranks.

Optimizers that need less memory are in lean/.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adamw import adamw

from minisft.config import OptimConfig
from minisft.model.weights import local_rows

MOMENTS = ("exp_avg", "exp_avg_sq")
CPU_CHUNK, CHUNK = 2**16, 2**24  # elements: few enough for a core's cache, enough to keep a GPU busy


class AdamW:
    """Fused AdamW over the rows that this rank holds of each trained parameter of `model`.

    Its rows are plain tensors that share the parameters' memory: the fused kernels take all of them at once, while
    sharded tensors are dispatched one by one. `mesh` is the mesh that the parameters are sharded over. A step is
    `begin`, forward and backward, `clip`, `step`.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig = OptimConfig(), mesh: DeviceMesh | None = None):
        self.optim = optim
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.rows = {name: nn.Parameter(local_rows(p.detach())[0]) for name, p in self.parameters.items()}
        self.device = next(iter(self.rows.values())).device
        # HSDP copies hold the same rows, which must not be counted twice.
        self._shard_group = mesh.get_group("shard") if mesh else None
        self._ranks_device = mesh.device_type if mesh else None  # where ranks talk, even if the rows are on the host
        self._moments = {moment: {name: self._zeros(rows) for name, rows in self.rows.items()} for moment in MOMENTS}
        self._steps = {name: torch.zeros((), device=self.device) for name in self.rows}

    def _zeros(self, rows: Tensor) -> Tensor:
        """A moment of zeros for these rows."""
        return torch.zeros(rows.shape, device=self.device)

    def moments(self, moment: str) -> dict[str, Tensor]:
        """This rank's rows of the first ("exp_avg") or second ("exp_avg_sq") moment, by parameter."""
        return self._moments[moment]

    def steps(self) -> float:
        """The number of steps taken, skipped ones excluded; reading it waits for the device."""
        return float(next(iter(self._steps.values())))

    def resume(self, steps: float) -> None:
        """Continue counting from `steps`; a checkpoint fills the rows and the moments."""
        for count in self._steps.values():
            count.fill_(steps)

    def begin(self, lr: float, step: int) -> None:
        """Before the backward pass of `step` (from 0): set its learning rate (lean/ also draws by `step`)."""
        self._lr = lr

    def clip(self, largest: float) -> Tensor:
        """Collect the gradients of this rank's rows, and scale them to a Euclidean norm of at most `largest` (0: leave
        them). Returns the norm before; `step` needs it even without clipping.

        The norm is that of all parameters on all ranks. The host does not wait for it unless the rows are on the host.
        """
        for name, parameter in self.parameters.items():
            self.rows[name].grad = None if parameter.grad is None else local_rows(parameter.grad)[0]
        norm = self._local_norm()
        if self._shard_group:
            norm = norm.to(self._ranks_device) ** 2
            dist.all_reduce(norm, group=self._shard_group)
            norm = norm.sqrt()
        if largest:
            torch.nn.utils.clip_grads_with_norm_(self.rows.values(), largest, norm)
        self._found_inf = (~norm.isfinite()).float().to(self.device)  # 1: the fused kernel changes nothing
        return norm

    def _local_norm(self) -> Tensor:
        return gradient_norm([rows.grad for rows in self.rows.values() if rows.grad is not None])

    def step(self) -> None:
        """Update the parameters and drop the gradients; `clip` comes first.

        If the gradient's norm is not finite, no parameter and no moment changes on any rank, and the host need not
        know.
        """
        for decays in (True, False):
            names = [name for name, rows in self.rows.items() if rows.grad is not None and (rows.dim() >= 2) == decays]
            self.fused([self.rows[name] for name in names], [self.rows[name].grad for name in names],  # type: ignore[misc]
                       *([of[name] for name in names] for of in (*self._moments.values(), self._steps)),
                       found_inf=self._found_inf, decays=decays)
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            self.rows[name].grad = parameter.grad = None

    @torch.no_grad()
    def fused(self, parameters: list[Tensor], gradients: list[Tensor], *state: list[Tensor], found_inf: Tensor,
              decays: bool) -> None:
        """Update fp32 `parameters` and their `state` (both moments, step counts) in place with torch's kernel."""
        if parameters:
            exp_avg, exp_avg_sq, steps = state
            adamw(parameters, gradients, exp_avg, exp_avg_sq, [], steps, fused=True, amsgrad=False, maximize=False,
                  found_inf=found_inf, lr=self._lr, beta1=self.optim.betas[0], beta2=self.optim.betas[1],
                  eps=self.optim.eps, weight_decay=self.optim.weight_decay if decays else 0.0)


def chunk_size(device: torch.device) -> int:
    """The number of elements to work on at a time."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all of them, in fp32.

    A CPU adds squares up one after the other and loses what is small beside a long sum (0.5% of the norm of 6e7
    numbers), so it goes chunk by chunk. bf16 is widened first, again one chunk at a time.
    """
    parts = []
    for gradient in gradients:
        flat, size = gradient.reshape(-1), chunk_size(gradient.device)
        if gradient.is_cuda and gradient.dtype == torch.float32:
            parts.append(flat)  # as it is: the norm of norms and numbers is the same
        elif gradient.dtype == torch.float32:
            whole = len(flat) // size * size
            parts += [torch.linalg.vector_norm(flat[:whole].view(-1, size), dim=1),
                      torch.linalg.vector_norm(flat[whole:])]
        else:
            parts += [torch.linalg.vector_norm(chunk, dtype=torch.float32) for chunk in flat.split(size)]
    return torch.nn.utils.get_total_norm(parts)


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """The learning rate of `step` (from 0): linear warm-up to `optim.lr`, then down to `min_lr_ratio` of it.

    A warm-up of 4 takes 1/4, 2/4, 3/4, 4/4, so the first step is not wasted on a rate of zero. "cosine" and "linear"
    fall from there to the end; "constant" stays; "wsd" stays and falls linearly over the last `decay_fraction` of all
    steps (Hu et al. 2024, "MiniCPM", section 4).
    """
    start = optim.warmup_steps
    if step < start:
        return optim.lr * (step + 1) / start
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "wsd":  # over at least two steps, the first of which still has the full rate
        decay = optim.decay_fraction
        start = max(start, min(round(total_steps * (1 - decay)), total_steps - 2 * (decay > 0)))
    progress = min(max(step - start, 0) / max(total_steps - start, 1), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)
