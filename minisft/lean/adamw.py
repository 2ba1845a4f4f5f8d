"""AdamW with less memory than 4 bytes a parameter for each of master, gradient and two moments.

    moments in bf16                    2 + 2 instead of 4 + 4, with stochastic rounding (rounding.py)
    parameters in bf16, no masters     2 instead of 4, and the gradient 2 instead of 4; with stochastic rounding
    in_backward                        updates each parameter as soon as its gradient is ready, then frees the gradient
    offload                            keeps the moments in the host's memory (offload.py)

Parameters are updated one by one in chunks: widened to fp32, updated by the usual kernel, and rounded once. When
compiled, all of that is one kernel that reads and writes each number once (`_update_in_one_pass`).
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minisft.config import OptimConfig
from minisft.counter_rng import key_of, random_bits, signed
from minisft.lean.offload import HostOffload
from minisft.lean.rounding import rounded
from minisft.model.weights import local_rows
from minisft.training.optimizer import AdamW, chunk_size, gradient_norm

LARGEST = 2**30  # elements that 32 bits can index


class LeanAdamW(AdamW):
    """AdamW as `optim.moments`, `optim.in_backward` and `offload` say. `seed` seeds stochastic rounding."""

    def __init__(self, model: nn.Module, optim: OptimConfig = OptimConfig(), mesh: DeviceMesh | None = None, *,
                 offload: bool = False, seed: int = 0, compiled: bool = False):
        self._offload, self._seed = offload, seed
        self._dtype = torch.bfloat16 if optim.moments == "bf16" else torch.float32
        super().__init__(model, optim, mesh)
        # Number of the first element in this rank's rows. From these: slicing a sharded tensor would gather it.
        self._first = {name: local_rows(p.detach())[1] * self.rows[name][:1].numel()
                       for name, p in self.parameters.items()}
        self._update_chunk = self._update_compiled if compiled else self._update_eager
        self._chunk = LARGEST if compiled and not offload else chunk_size(self.device)
        self._host = HostOffload(self.device, size=self._chunk, dtype=self._dtype) if offload else None
        self._squares = torch.zeros((), device=self.device)  # of the gradients already freed
        if optim.in_backward:
            for name, parameter in self.parameters.items():
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._update_and_free(name))

    def _zeros(self, rows: Tensor) -> Tensor:
        return torch.zeros(rows.shape, dtype=self._dtype, device="cpu" if self._offload else self.device,
                           pin_memory=self._offload and self.device.type == "cuda")

    def moments(self, moment: str) -> dict[str, Tensor]:
        """See AdamW; waits until offloaded moments are back on the host."""
        if self._host:
            self._host.wait()
        return super().moments(moment)

    def begin(self, lr: float, step: int) -> None:
        """See AdamW; stochastic rounding draws from the step's number."""
        super().begin(lr, step)
        self._step = step
        self._lr_on_device = torch.full((), lr, device=self.device)  # filled on the device: the host does not wait
        self._squares.zero_()
        if self._host:
            self._host.begin()

    def clip(self, largest: float) -> Tensor:
        """See AdamW. With `in_backward`, the norm is known only after every update, so `largest` must be 0."""
        assert not (largest and self.optim.in_backward)
        return super().clip(largest)

    def _local_norm(self) -> Tensor:
        return self._squares.sqrt() if self.optim.in_backward else super()._local_norm()

    def step(self) -> None:
        """See AdamW. With `in_backward`, the updates are already made (`_update_and_free`)."""
        for name, rows in self.rows.items():
            if rows.grad is not None:
                self._update(name, rows.grad, self._found_inf)
                self._steps[name] += 1 - self._found_inf
        self._drop_gradients()

    def _update(self, name: str, gradient: Tensor, found_inf: Tensor) -> None:
        """Update one parameter chunk by chunk. Memory: fp32 copies of one chunk."""
        rows, key = self.rows[name], key_of(self._seed, self._step, name)
        moments = [of[name].view(-1) for of in self._moments.values()]
        flat, grad = rows.detach().view(-1), gradient.reshape(-1)
        for start in range(0, len(flat), self._chunk):
            part = slice(start, start + self._chunk)
            kept = [moment[part] for moment in moments]
            here = self._host.fetch(kept) if self._host else kept
            self._update_chunk([flat[part], *here], grad[part], found_inf, key, self._first[name] + start,
                               steps=self._steps[name], decays=rows.dim() >= 2)
            if self._host:
                self._host.store(kept, here)

    def _update_and_free(self, name: str) -> None:
        """In the backward pass, as soon as a parameter's gradient is summed over its uses and over the ranks.

        Only this parameter's part of the norm is known: rows with a gradient that is not finite stay as they are. The
        others are updated, so the step counts for all.
        """
        parameter = self.parameters[name]
        assert parameter.grad is not None
        gradient = local_rows(parameter.grad)[0]
        square = gradient_norm([gradient]) ** 2
        self._squares += square
        self._update(name, gradient, (~square.isfinite()).float())
        self._steps[name] += 1
        parameter.grad = None

    def _update_eager(self, state: list[Tensor], gradient: Tensor, found_inf: Tensor, key: tuple[int, int],
                      first: int, *, steps: Tensor, decays: bool) -> None:
        """Update a chunk of a parameter and of its moments (`state`), whose first element is number `first`."""
        wide = [tensor.float() for tensor in state]  # fp32 tensors are not copied, and updated in place
        self.fused(wide[:1], [gradient.float()], wide[1:2], wide[2:], [steps.clone()], found_inf=found_inf,
                   decays=decays)
        if any(tensor.dtype == torch.bfloat16 for tensor in state):
            bits = random_bits(key, first, len(wide[0]), self.device)
            # Each is unbiased by itself; the halves keep a parameter and its first moment independent, too.
            for tensor, values, drawn in zip(state, wide, (bits, bits >> 16, bits), strict=True):
                if tensor.dtype == torch.bfloat16:
                    tensor.copy_(rounded(values, drawn))

    def _update_compiled(self, state: list[Tensor], gradient: Tensor, found_inf: Tensor, key: tuple[int, int],
                         first: int, *, steps: Tensor, decays: bool) -> None:
        # A view at an offset becomes a tensor of its own: the compiler would specialize on each kind of offset.
        tensors = [torch.from_dlpack(x) if x.storage_offset() else x for x in (*state, gradient)]
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        # Numbers that change from call to call are tensors, or each would compile anew.
        draw = [torch.full((), number, dtype=torch.int32, device=self.device) for number in (*key, signed(first))]
        corrections = [1 - beta ** (steps + 1) for beta in self.optim.betas]  # here: one power, not one an element
        _compiler()(tensors, [self._lr_on_device, *corrections], found_inf, draw, self.optim, decays)


def _update_in_one_pass(tensors: list[Tensor], rates: list[Tensor], found_inf: Tensor, draw: list[Tensor],
                        optim: OptimConfig, decays: bool) -> None:
    """Update (n,) numbers of a parameter and its two moments, given its gradient, in place, unless `found_inf` is 1.

    `rates` are the learning rate and 1 - beta^t of both moments; `draw` seeds the rounding. AdamW (Loshchilov and
    Hutter 2019, algorithm 2) in fp32; what is kept in bf16 is rounded stochastically.
    """
    p, m, v, g = (x.float() for x in tensors)
    lr, correction, correction_2 = rates
    m, v = m + (1 - optim.betas[0]) * (g - m), optim.betas[1] * v + (1 - optim.betas[1]) * g * g
    update = m / correction / ((v / correction_2).sqrt() + optim.eps)
    p = p - lr * (update + (optim.weight_decay if decays else 0.0) * p)
    bits = random_bits((draw[0], draw[1]), draw[2], len(p), p.device)
    for kept, value, drawn in zip(tensors, (p, m, v), (bits, bits >> 16, bits), strict=False):  # as in _update_eager
        narrow = rounded(value, drawn) if kept.dtype == torch.bfloat16 else value
        kept.copy_(torch.where(found_inf > 0, kept, narrow))


@cache
def _compiler() -> Callable[..., None]:
    return torch.compile(_update_in_one_pass, fullgraph=True)
