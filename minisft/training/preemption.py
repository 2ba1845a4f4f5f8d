"""Being asked to stop: by a scheduler that wants the machines back, or by a person.

The first SIGTERM, SIGINT or SIGUSR1, to any one process, only leaves a note. The note travels with the loss of the next
step to all ranks, which stop after the same step, save, and exit with code 75. A second signal ends the process at
once. torchrun passes signals on, but kills after 30 seconds unless `--shutdown-timeout` allows more.
"""

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preemption:
    """Whether this process was asked to stop. While the object is in use, signals do not end the process."""

    def __init__(self) -> None:
        self.asked = False
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked:
            _say(f"{name} again: stopping at once\n")
            os._exit(128 + number)
        self.asked = True
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _say(f"{name}: stopping soon, and saving; once more to stop at once\n")

    def close(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    os.write(sys.stderr.fileno(), text.encode())  # print could be in the middle of printing
