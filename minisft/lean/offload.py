"""Tensors that live in the host's memory and visit the device a chunk at a time.

AdamW's moments are needed once a step. Kept in pinned host memory, they cost the device only the chunks in flight: one
is fetched while the one before is computed and the one before that returns (Ren et al. 2021, "ZeRO-Offload", which also
computes on the host; here the host only stores).

    fetch    |  0  |  1  |  2  |  3  |          three streams; a slot is reused
    compute        |  0  |  1  |  2  |  3       once its content is back on the host
    store                |  0  |  1  |  2  | 3

On a CPU the same code runs on streams that do nothing: the moments stay in place, and nothing is saved.
"""

import torch
from torch import Tensor

SLOTS = 3  # one being fetched, one being computed, one being stored


class HostOffload:
    """Moves chunks of host tensors, each of at most `size` elements, to `device` and back."""

    def __init__(self, device: torch.device, *, size: int, dtype: torch.dtype, tensors: int = 2):
        self._backend = torch.get_device_module(device)
        self._fetching, self._storing = self._backend.Stream(), self._backend.Stream()
        self._slots = torch.empty(SLOTS, tensors, size, dtype=dtype, device=device)
        self._stored = [self._backend.Event() for _ in range(SLOTS)]
        self._turn = 0

    def begin(self) -> None:
        """Before the first fetch of a step: do not fetch what the step before is still writing to the host."""
        self._fetching.wait_stream(self._storing)
        self._fetching.wait_stream(self._backend.current_stream())  # the slots and their first use are this stream's

    def fetch(self, host: list[Tensor]) -> list[Tensor]:
        """Copies of `host` (each (n,)) on the device, ready for work queued from here on."""
        slot = self._turn % SLOTS
        with self._backend.stream(self._fetching):
            self._fetching.wait_event(self._stored[slot])
            copies = [self._slots[slot, i, : len(tensor)].copy_(tensor, non_blocking=True)
                      for i, tensor in enumerate(host)]
        self._backend.current_stream().wait_stream(self._fetching)
        return copies

    def store(self, host: list[Tensor], copies: list[Tensor]) -> None:
        """Write the copies of the last `fetch` back, after the work queued so far."""
        self._storing.wait_stream(self._backend.current_stream())
        with self._backend.stream(self._storing):
            for tensor, copy in zip(host, copies, strict=True):
                tensor.copy_(copy, non_blocking=True)
            self._stored[self._turn % SLOTS].record(self._storing)
        self._turn += 1

    def wait(self) -> None:
        """Block the host until everything is back."""
        self._stored[(self._turn - 1) % SLOTS].synchronize()
