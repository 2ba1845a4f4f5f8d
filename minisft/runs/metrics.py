"""The log and the progress bar of a run.

Figures that live on the device are read one step late. By then they are ready, and the host does not wait for the step
that the device is working on. All ranks read the same figures in the same step, so they make the same decisions from
them (to give up, say) without further communication.
"""

import json
import math
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minisft.errors import NumericsError

SPIKE, PATIENCE, MEMORY = 2.0, 5, 0.95  # warn if the loss is over twice its running mean for five steps


class AsyncScalars:
    """Numbers on the device, on their way to the host."""

    def __init__(self, figures: Tensor):
        self._event = torch.cuda.Event() if figures.is_cuda else None
        if self._event:
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._event.record()
        else:
            self._host = figures.clone()

    def read(self) -> list[float]:
        """The numbers. Waits until they have arrived, but not for work queued after them."""
        if self._event:
            self._event.synchronize()
        return self._host.tolist()


class Monitor:
    """Follows a run: its log (on the main rank), its progress bar, skipped steps and loss spikes.

    `before` is the `progress` of the checkpoint that the run resumes from.
    """

    def __init__(self, log: Path | None, *, start: int, total: int, max_skipped: int,
                 documents: Callable[[int], list[str]], in_backward: bool = False,
                 before: Mapping[str, Any] | None = None):
        self._file = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115 (open as long as the run)
        self._bar = tqdm(total=total, initial=start, desc="train", unit=" steps", disable=log is None)
        self._max_skipped, self._documents = max_skipped, documents
        self._consequence = ("parameters whose gradient is not finite stay as they are, the others are updated"
                             if in_backward else "the step is skipped")
        self._waiting: tuple[dict[str, Any], AsyncScalars] | None = None
        before = before or {}
        self.finite_steps: int = before.get("finite_steps", start)
        self.skipped_in_a_row: int = before.get("skipped_in_a_row", 0)
        self._spikes = 0
        self._mean: float | None = None
        self._lapped = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the beginning."""
        before, self._lapped = self._lapped, time.perf_counter()
        return self._lapped - before

    def step(self, record: dict[str, Any], loss: Tensor, grad_norm: Tensor) -> None:
        """Take the record of a step and its figures, and settle the step before."""
        self.settle()
        self._waiting = record, AsyncScalars(torch.stack((loss, grad_norm)))

    def settle(self) -> None:
        """Log the step whose figures are still on their way. Raises NumericsError after too many skipped in a row."""
        if self._waiting is None:
            return
        (record, figures), self._waiting = self._waiting, None
        loss, grad_norm = figures.read()
        skipped = not math.isfinite(grad_norm)  # as the optimizer saw it
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.finite_steps += not skipped
        record |= {name: value if math.isfinite(value) else None  # JSON has no NaN
                   for name, value in (("loss", loss), ("grad_norm", grad_norm))}
        if skipped:
            record |= {"skipped": True, "documents": self._documents(record["step"] - 1)}
            self.say(f"step {record['step']}: the loss or the gradient is not finite (loss {loss}, norm {grad_norm}); "
                     f"{self._consequence}. Its documents: {record['documents']}")
        else:
            self._watch(record["step"], loss)
        self.write(record)
        self._bar.set_postfix(loss=f"{loss:.4f}", tokens_per_second=f"{record['tokens_per_second']:,.0f}")
        self._bar.update()
        if self.skipped_in_a_row > self._max_skipped:
            raise NumericsError(f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, "
                                f"the last at step {record['step']}; train.max_skipped allows {self._max_skipped}. "
                                "Lower optim.lr, or look at the documents that metrics.jsonl names")

    def _watch(self, step: int, loss: float) -> None:
        self._spikes = self._spikes + 1 if self._mean is not None and loss > SPIKE * self._mean else 0
        if self._spikes == PATIENCE:
            self.say(f"step {step}: the loss has been over twice its running mean of {self._mean:.4f} for {PATIENCE} "
                     "steps; optim.lr may be too high")
        if self._spikes == 0:
            self._mean = loss if self._mean is None else MEMORY * self._mean + (1 - MEMORY) * loss

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record to the log."""
        self._on_file(lambda file: (file.write(json.dumps(record) + "\n"), file.flush()))

    def sync(self) -> None:
        """Make the log durable, as the checkpoint that relies on it will be."""
        self._on_file(lambda file: os.fsync(file.fileno()))

    def _on_file(self, work: Callable[[Any], object]) -> None:
        if self._file:
            try:
                work(self._file)
            except OSError as error:  # a full disk; the library names no file
                raise OSError(error.errno, error.strerror, self._file.name) from None

    def progress(self) -> dict[str, int]:
        """What a checkpoint keeps of it."""
        return {"finite_steps": self.finite_steps, "skipped_in_a_row": self.skipped_in_a_row}

    def say(self, text: str) -> None:
        """Print a line above the bar, on the main rank."""
        if self._file:
            tqdm.write(text)

    def close(self) -> None:
        """Settle the last step, close bar and log."""
        try:
            self.settle()
        finally:
            self._bar.close()
            if self._file:
                self._file.close()


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the device, or resident for a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
