"""Being asked to stop: by a scheduler that wants the machines back, or by a person.

The first SIGTERM, SIGINT, SIGUSR1 or SIGHUP (a closed terminal), to any one process, only leaves a note. After every
step, and before every batch of an evaluation, the ranks add up their notes; all of them stop at the same place, save,
and exit with code 75. After that only SIGINT ends the process at once: a scheduler signals all processes of a job, and
torchrun then passes the same signal on. torchrun kills after 30 seconds unless `--shutdown-timeout` allows more.
"""

import os
import signal
import sys
from contextlib import suppress
from threading import Thread
from types import FrameType

import torch
from tqdm import tqdm

from minisft.runs.metrics import AsyncScalars
from minisft.training.parallel import all_sum

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 (not an error)
    """Some rank was asked to stop; raised on all ranks in the same place."""


class Preemption:
    """Notes that this process was asked to stop. While the object is in use, signals do not end the process."""

    def __init__(self) -> None:
        self.requested = False
        self._last: AsyncScalars | None = None
        # nohup ignores SIGHUP, and so does a run that it started.
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS
                        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}

    def check(self, device: torch.device) -> None:
        """Raise Stopped if some rank had been asked to stop by the call before this one.

        All ranks call it together, between pieces of work that they share. The answer is one call late, so no host
        waits for its device.
        """
        wishes = all_sum(torch.full((1,), float(self.requested), device=device))
        before, self._last = self._last, AsyncScalars(wishes)
        if before and before.read()[0]:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            with suppress(OSError):
                os.write(2, b"\nSIGINT: stopping at once\n")
            os._exit(128 + number)
        is_first, self.requested = not self.requested, True  # before the text, which may be answered at once
        if is_first and os.environ.get("LOCAL_RANK", "0") == "0":
            text = f"{signal.Signals(number).name}: stopping soon, and saving; Ctrl-C (SIGINT) now stops at once"
            # A thread can wait for a bar that is being drawn just now.
            Thread(target=tqdm.write, args=(text, sys.stderr), daemon=True).start()

    def close(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
