"""AdamW on this rank's part of the parameters, and the learning rate of each step.

AdamW (Loshchilov and Hutter 2019) on fp32 master weights: at a learning rate of 2e-5 most updates are smaller than the
distance between two neighbouring bf16 numbers, and would be lost if the weights were kept in bf16. Matrices may decay;
norms and biases do not. The update is element by element, so each rank applies it to the rows it holds and no rank
needs the others' rows. Only the gradient's norm is about the whole: one number is summed over the ranks.

Four ways to need less memory than 4 bytes a parameter for each of master, gradient and two moments:

    moments in bf16                    2 + 2 instead of 4 + 4, rounded stochastically (rounding.py)
    parameters in bf16, no masters     2 instead of 4, and the gradient 2 instead of 4; rounded stochastically
    in_backward                        a parameter is updated as soon as its gradient is there, and the gradient freed
    offload                            the moments stay in the host's memory (offload.py)

Where any is used, parameters are updated one by one in chunks: widened to fp32, updated by the same kernel as ever, and
rounded once. Compiled, all of that is one kernel, which reads and writes each number once (`_update_in_one_pass`).
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adamw import adamw

from minisft.counter_rng import key_of, random_bits, signed
from minisft.model.weights import local_rows
from minisft.training.offload import HostVisits
from minisft.training.rounding import rounded

MOMENTS = ("exp_avg", "exp_avg_sq")
CPU_CHUNK, CHUNK = 2**16, 2**24  # elements: few enough for a core's cache, enough to keep a GPU busy
LARGEST = 2**30  # elements that are indexed by 32 bits


class Optimizer:
    """Fused AdamW over the rows that this rank holds of each trained parameter of `model`.

    Plain tensors that share the parameters' memory: the fused kernels take all of them at once, where sharded tensors
    are dispatched one by one. `mesh` is the mesh that the parameters are sharded over. `moments` is their dtype; `seed`
    is that of stochastic rounding. A step is `begin`, forward and backward, `clip`, `step`.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None = None, *, weight_decay: float = 0.0,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, moments: torch.dtype = torch.float32,
                 in_backward: bool = False, offload: bool = False, seed: int = 0, compiled: bool = False):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        placed = {name: local_rows(p.detach()) for name, p in self.parameters.items()}
        self.rows = {name: nn.Parameter(rows) for name, (rows, _) in placed.items()}
        self._first = {name: first * rows[:1].numel() for name, (rows, first) in placed.items()}  # element held
        # HSDP copies hold the same rows, which must not be counted twice.
        self._shard_group = mesh.get_group("shard") if mesh else None
        self._ranks_device = mesh.device_type if mesh else None  # where ranks talk, also if the rows are on the host
        self._weight_decay, self._betas, self._eps, self._seed = weight_decay, betas, eps, seed
        self._in_backward = in_backward
        self._device = next(iter(self.rows.values())).device
        self._compiled = compiled
        self._chunk = LARGEST if compiled and not offload else _chunk(self._device)
        self._visits = HostVisits(self._device, size=self._chunk, dtype=moments) if offload else None
        # All at once where nothing is to be widened, moved or freed on the way.
        self._whole = not (in_backward or offload) and {moments, *(p.dtype for p in self.rows.values())} == \
            {torch.float32}
        self._squares = torch.zeros((), device=self._device)  # of the gradients that are gone already
        if in_backward:
            for name, parameter in self.parameters.items():
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._update_and_free(name))
        kept = {"pin_memory": self._device.type == "cuda"} if offload else {"device": self._device}
        self._moments = {moment: {name: torch.zeros(rows.shape, dtype=moments, **kept)
                                  for name, rows in self.rows.items()} for moment in MOMENTS}
        self._steps = {name: torch.zeros((), device=self._device) for name in self.rows}

    def resume(self, steps: float) -> None:
        """Count on from `steps` steps; a checkpoint fills the rows and the moments."""
        for count in self._steps.values():
            count.fill_(steps)

    def moments(self, moment: str) -> dict[str, Tensor]:
        """This rank's rows of the first ("exp_avg") or second ("exp_avg_sq") moment, by parameter."""
        if self._visits:
            self._visits.wait()
        return self._moments[moment]

    def steps(self) -> float:
        """The steps that were taken, without those skipped; reading it waits for the device."""
        return float(next(iter(self._steps.values())))

    def begin(self, lr: float, number: int) -> None:
        """Before the backward pass of step `number`: its learning rate. Rounding draws from the number."""
        self._lr, self._number = lr, number
        self._lr_there = torch.full((), lr, device=self._device)  # filled on the device, which nobody waits for
        self._squares.zero_()
        if self._visits:
            self._visits.begin()

    def clip(self, largest: float) -> Tensor:
        """Scale the gradient to a Euclidean norm of at most `largest` (0: leave it); returns the norm it had.

        The norm is that of all parameters on all ranks; the host waits for it only where the rows are its own. In the
        backward pass it is known only when every update has been made, so there `largest` is 0.
        """
        assert not (largest and self._in_backward)
        if self._in_backward:
            norm = self._squares.sqrt()
        else:
            for name, parameter in self.parameters.items():
                self.rows[name].grad = None if parameter.grad is None else local_rows(parameter.grad)[0]
            norm = _norm([p.grad for p in self.rows.values() if p.grad is not None])
        if self._shard_group:
            norm = norm.to(self._ranks_device) ** 2
            dist.all_reduce(norm, group=self._shard_group)
            norm = norm.sqrt()
        if largest:
            torch.nn.utils.clip_grads_with_norm_(self.rows.values(), largest, norm)
        # Where this is 1, the fused kernel leaves everything as it is.
        self._found_inf = (~norm.isfinite()).float().to(self._device)
        return norm

    def step(self) -> None:
        """Update the parameters, and drop the gradients. `clip` comes first.

        Where the gradient's norm is not finite, no parameter and no moment is touched on any rank, and the host need
        not know. (In the backward pass, see `_update_and_free`.)
        """
        if self._whole:
            self._update_all()
        elif not self._in_backward:
            for name, rows in self.rows.items():
                if rows.grad is not None:
                    self._update(name, rows.grad, self._found_inf)
                    self._steps[name] += 1 - self._found_inf
        for name, parameter in self.parameters.items():
            self.rows[name].grad = parameter.grad = None

    def _update_all(self) -> None:
        for decays in (True, False):
            grads = {name: p.grad for name, p in self.rows.items() if p.grad is not None and (p.dim() >= 2) == decays}
            state = [self._moments[moment] for moment in MOMENTS] + [self._steps]
            self._adamw([self.rows[name] for name in grads], [*grads.values()],
                        *([of[name] for name in grads] for of in state), found_inf=self._found_inf, decays=decays)

    def _update(self, name: str, gradient: Tensor, found_inf: Tensor) -> None:
        """Update one parameter chunk by chunk. Memory: fp32 copies of one chunk."""
        rows, key = self.rows[name], key_of(self._seed, self._number, name)
        moments = [self._moments[moment][name].view(-1) for moment in MOMENTS]
        flat, grad = rows.detach().view(-1), gradient.reshape(-1)
        for start in range(0, len(flat), self._chunk):
            part = slice(start, start + self._chunk)
            kept = [moment[part] for moment in moments]
            here = self._visits.fetch(kept) if self._visits else kept
            update = self._update_compiled if self._compiled else self._update_chunk
            update([flat[part], *here], grad[part], found_inf, key, self._first[name] + start,
                   steps=self._steps[name], decays=rows.dim() >= 2)
            if self._visits:
                self._visits.store(kept, here)

    def _update_chunk(self, state: list[Tensor], gradient: Tensor, found_inf: Tensor, key: tuple[int, int],
                      first: int, *, steps: Tensor, decays: bool) -> None:
        """Update a chunk of a parameter and of its two moments (`state`), which begins at element `first`."""
        wide = [tensor.float() for tensor in state]  # fp32 tensors are not copied, and updated in place
        self._adamw(wide[:1], [gradient.float()], wide[1:2], wide[2:], [steps.clone()], found_inf=found_inf,
                    decays=decays)
        if any(tensor.dtype == torch.bfloat16 for tensor in state):
            bits = random_bits(key, first, len(wide[0]), self._device)
            # Each is unbiased by itself; the halves keep a parameter and its first moment independent, too.
            for tensor, values, drawn in zip(state, wide, (bits, bits >> 16, bits), strict=True):
                if tensor.dtype == torch.bfloat16:
                    tensor.copy_(rounded(values, drawn))

    def _update_and_free(self, name: str) -> None:
        """In the backward pass, when the gradient of a parameter is summed over its uses and over the ranks.

        Only this parameter's part of the norm is known: rows whose gradient is not finite are left as they are. The
        others are updated, so the step counts for all.
        """
        parameter = self.parameters[name]
        assert parameter.grad is not None
        gradient = local_rows(parameter.grad)[0]
        square = _norm([gradient]) ** 2
        self._squares += square
        self._update(name, gradient, (~square.isfinite()).float())
        self._steps[name] += 1
        parameter.grad = None

    def _update_compiled(self, state: list[Tensor], gradient: Tensor, found_inf: Tensor, key: tuple[int, int],
                         first: int, *, steps: Tensor, decays: bool) -> None:
        """The same in one kernel."""
        # Views at an offset become tensors that begin where they do: each kind of offset would be compiled anew.
        tensors = [torch.from_dlpack(x) if x.storage_offset() else x for x in (*state, gradient)]
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        # Numbers that change from call to call, as tensors: others would be compiled anew.
        draw = [torch.full((), number, dtype=torch.int32, device=self._device) for number in (*key, signed(first))]
        corrections = [1 - beta ** (steps + 1) for beta in self._betas]  # here, or each element would compute a power
        _compiler()(*tensors, self._lr_there, *corrections, found_inf, *draw, betas=self._betas, eps=self._eps,
                    weight_decay=self._weight_decay if decays else 0.0)

    @torch.no_grad()
    def _adamw(self, parameters: list[Tensor], gradients: list[Tensor], *state: list[Tensor], found_inf: Tensor,
               decays: bool) -> None:
        if parameters:
            exp_avg, exp_avg_sq, steps = state
            adamw(parameters, gradients, exp_avg, exp_avg_sq, [], steps, fused=True, amsgrad=False, maximize=False,
                  found_inf=found_inf, lr=self._lr, beta1=self._betas[0], beta2=self._betas[1], eps=self._eps,
                  weight_decay=self._weight_decay if decays else 0.0)


def _update_in_one_pass(parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, lr: Tensor,
                        correction: Tensor, correction_2: Tensor, found_inf: Tensor, key: Tensor, key_2: Tensor,
                        first: Tensor, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Update (n,) numbers of a parameter and their moments in place, unless `found_inf` is 1.

    The corrections are 1 - beta^t of the two moments. AdamW as Loshchilov and Hutter 2019 have it, algorithm 2, in
    fp32; what is kept in bf16 is rounded stochastically.
    """
    p, m, v, g = (x.float() for x in (parameter, exp_avg, exp_avg_sq, gradient))
    m, v = m + (1 - betas[0]) * (g - m), betas[1] * v + (1 - betas[1]) * g * g
    p = p - lr * (m / correction / ((v / correction_2).sqrt() + eps) + weight_decay * p)
    bits = random_bits((key, key_2), first, len(p), p.device)
    # Each is unbiased by itself; the halves keep a parameter and its first moment independent, too.
    for kept, value, drawn in ((parameter, p, bits), (exp_avg, m, bits >> 16), (exp_avg_sq, v, bits)):
        narrow = rounded(value, drawn) if kept.dtype == torch.bfloat16 else value
        kept.copy_(torch.where(found_inf > 0, kept, narrow))


@cache
def _compiler() -> Callable[..., None]:
    return torch.compile(_update_in_one_pass, fullgraph=True)


def _chunk(device: torch.device) -> int:
    return CPU_CHUNK if device.type == "cpu" else CHUNK


def _norm(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all of them, in fp32.

    A CPU adds squares up one after the other, and loses what is small beside a long sum (0.5% of the norm of 6e7
    numbers), so it goes chunk by chunk; it also widens bf16 first, and a chunk is all that is wide.
    """
    parts = []
    for gradient in gradients:
        flat, size = gradient.reshape(-1), _chunk(gradient.device)
        if gradient.is_cuda and gradient.dtype == torch.float32:
            parts.append(flat)
        elif gradient.dtype == torch.float32:
            whole = len(flat) // size * size
            parts += [torch.linalg.vector_norm(flat[:whole].view(-1, size), dim=1),
                      torch.linalg.vector_norm(flat[whole:])]
        else:
            parts += [torch.linalg.vector_norm(chunk, dtype=torch.float32) for chunk in flat.split(size)]
    return torch.nn.utils.get_total_norm(parts)


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
    start = warmup_steps
    if schedule == "wsd":  # over two steps at least: the first of them still has the full rate
        start = max(start, min(round(total_steps * (1 - decay_fraction)), total_steps - 2 * (decay_fraction > 0)))
    progress = min(max(step - start, 0) / max(total_steps - start, 1), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return peak * (min_ratio + (1 - min_ratio) * share)
