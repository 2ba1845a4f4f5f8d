"""Standard output and error whose reader may be gone: a closed terminal, `| head`, `>&-`, a full disk.

Training does not stop because a line cannot be printed.
"""

import os
import sys
from contextlib import suppress
from typing import Any


class LossyStream:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


def secure(*lossy: str) -> None:
    """Make the standard streams safe to print to; those named in `lossy` ("stdout", "stderr") drop what they cannot
    write.

    A closed stream is opened on /dev/null: otherwise the next file would get its number, and libraries that print to
    number 2 would print into a run's log. Characters that an encoding lacks are printed as \\u0000.
    """
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed when Python started
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115 (stays open)
        if number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, LossyStream(stream) if name in lossy and not isinstance(stream, LossyStream) else stream)
