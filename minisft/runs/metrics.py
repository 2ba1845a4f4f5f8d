"""The log of a run, and what a person reads while it runs.

On a terminal there is a bar, elsewhere a line every few steps. Their clock counts steps only: evaluations, checkpoints
and exports are in neither the pace nor the remaining time.

Figures that live on the device are read one step late. By then they are ready, and the host does not wait for the step
that the device is working on. All ranks read the same figures in the same step, so they make the same decisions from
them (to give up, say) without further communication.
"""

import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minisft.errors import NumericsError
from minisft.runs.failure import watch

SPIKE, PATIENCE, MEMORY = 2.0, 5, 0.95  # warn if the loss is over twice its running mean for five steps
LINES, FIRST = 200, 5  # lines that a whole run prints at most, about; steps that always have one
RECENT = 20  # steps that the pace is a median of
WIDE = 110  # columns that figures and a bar need beside each other
SAY_EVERY = 30.0  # seconds between the lines of a long evaluation or export


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


def is_watched() -> bool:
    """True if everything printed goes to a terminal that has a width, so that a bar can be drawn again and again."""
    return sys.stdout.isatty() and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


@contextmanager
def progress(what: str, *, shown: bool, timeout: float) -> Iterator[Callable[[int, int], None]]:
    """Show how far a piece of work is that is no step. Call what it gives with the parts done and their number; each
    call, and the beginning, give it `timeout` more seconds (`watch`).

    `what` ends in the name of a part: "writing final, tensor" -> "writing final, tensor 12 of 291", as a bar that
    disappears at the end, or as a line now and then if there is no terminal.
    """
    said = time.monotonic()
    watch(timeout)

    def tell(done: int, total: int) -> None:
        nonlocal said
        watch(timeout)
        bar.total = total
        bar.update(done - bar.n)
        if shown and bar.disable and time.monotonic() - said >= SAY_EVERY:
            print(f"{what} {done:,} of {total:,}", flush=True)
            said = time.monotonic()

    with tqdm(desc=what, leave=False, disable=not (shown and is_watched()), dynamic_ncols=True, delay=0.5,
              bar_format="{desc} {n}/{total} |{bar}| {remaining} left") as bar:
        yield tell


class Monitor:
    """Follows a run: its log (on the main rank), its bar or lines, skipped steps and loss spikes.

    `before` is the `progress` of the checkpoint that the run resumes from.
    """

    def __init__(self, log: Path | None, *, start: int, total: int, max_skipped: int,
                 documents: Callable[[int], list[str]], in_backward: bool = False,
                 before: Mapping[str, Any] | None = None):
        self._file = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115 (open as long as the run)
        self._start, self._total = start, total
        self._is_narrow = is_watched() and os.get_terminal_size(sys.stderr.fileno()).columns < WIDE
        self._bar = tqdm(total=total, initial=start, disable=not (log and is_watched()), dynamic_ncols=True, miniters=1,
                         bar_format="{n}/{total} {desc}" if self._is_narrow else "step {n}/{total} |{bar}| {desc}")
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # seconds, tokens per second
        self._since = time.perf_counter()  # when the step before was complete
        self._on_gpu = False
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

    def resume(self) -> None:
        """Start the clock again, unless a step is still in flight: something else was done since it."""
        if self._waiting is None:
            self._since = time.perf_counter()
            self._lapped = self._lapped if self._on_gpu else self._since

    def step(self, record: dict[str, Any], loss: Tensor, grad_norm: Tensor) -> None:
        """Take the record of a step and its figures, and settle the step before."""
        self.settle()
        self._waiting, self._on_gpu = (record, AsyncScalars(torch.stack((loss, grad_norm)))), loss.is_cuda

    def settle(self) -> None:
        """Log the step whose figures are still on their way. Raises NumericsError after too many skipped in a row."""
        if self._waiting is None:
            return
        (record, figures), self._waiting = self._waiting, None
        loss, grad_norm = figures.read()
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        if self._on_gpu:  # which was behind when the record was made; a CPU was done
            record |= {rate: record[rate] * record["seconds"] / seconds
                       for rate in ("tokens_per_second", "mfu") if rate in record} | {"seconds": seconds}
        seconds = record["seconds"]
        self._recent.append((seconds, record["tokens"] / seconds))
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
        self._show(record["step"], f"loss {loss:.4f}", f"lr {record['lr']:.2e}", f"norm {grad_norm:#.3g}",
                   f"{median(rate for _, rate in self._recent):,.0f} tok/s", f"{record['memory_gib']:.1f} GiB")
        if self.skipped_in_a_row > self._max_skipped:
            raise NumericsError(f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, "
                                f"the last at step {record['step']}; train.max_skipped allows {self._max_skipped}. "
                                "Lower optim.lr, or look at the documents that metrics.jsonl names")

    def _show(self, step: int, *figures: str) -> None:
        pace = median(seconds for seconds, _ in self._recent)
        left = tqdm.format_interval((self._total - step) * pace)
        text = (" " if self._is_narrow else "  ").join((f"{left} left", *figures))
        text += "" if self._is_narrow else f"  {pace:.2f} s/step"
        self._bar.set_description_str(text, refresh=False)
        self._bar.update()
        if self._bar.disable and (step - self._start <= FIRST or step % -(-self._total // LINES) == 0
                                  or step == self._total):
            self.say(f"step {step:>{len(str(self._total))}}/{self._total}  {text}")

    def _watch(self, step: int, loss: float) -> None:
        self._spikes = self._spikes + 1 if self._mean is not None and loss > SPIKE * self._mean else 0
        if self._spikes == PATIENCE:
            self.say(f"step {step}: the loss has been over twice its running mean of {self._mean:.4f} for {PATIENCE} "
                     "steps; optim.lr may be too high")
        if self._spikes == 0:
            self._mean = loss if self._mean is None else MEMORY * self._mean + (1 - MEMORY) * loss

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append records to the log in one go: a run that is killed meanwhile has written all of them or none."""
        self._on_file(lambda file: (file.write("".join(json.dumps(record) + "\n" for record in records)), file.flush()))

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
        """Print a line, above the bar if there is one, on the main rank."""
        if self._file:
            tqdm.write(text)
            sys.stdout.flush()

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
