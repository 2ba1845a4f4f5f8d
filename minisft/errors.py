"""The ways a run can end badly that a person can do something about, and the exit code of each.

Everything else is a bug and keeps its traceback. `OSError` (a full disk, a folder without permission) needs no class
of its own: the command line reports it with exit code 4.
"""

PATH = 4096  # characters that are shown of a path: all that there can be
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_NUMERICS = 3
EXIT_IO = 4
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # as shells have it for SIGINT


class UserError(ValueError):
    """Bad input or configuration: the message says what, where, the value and the remedy. Exit code 2."""


class NumericsError(ArithmeticError):
    """The numbers of the run are no longer finite. Exit code 3."""


def printable(name: object, limit: int = 80) -> str:
    """`name` as it may reach a terminal or a page: what would steer or hide there is escaped as in repr, and text past
    `limit` characters is cut. ESC [31m -> \\x1b[31m"""
    text = str(name)[: limit + 1]
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
