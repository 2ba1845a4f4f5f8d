"""Failures that a person can do something about, and the exit code of each.

Everything else is a bug and keeps its traceback. `OSError` (a full disk, a folder without permission) needs no class
of its own.
"""

import reprlib

PATH = 4096  # characters to show of a path: all that it can have
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_NUMERICS = 3
EXIT_IO = 4
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # a shell's code for SIGINT
SHORT = reprlib.Repr()  # plain repr() overflows the stack on the nesting that json.loads accepts
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxlevel = 3


class UserError(ValueError):
    """Bad input or configuration: the message says what, where, the value and the remedy. Exit code 2."""


class NumericsError(ArithmeticError):
    """The numbers of the run are no longer finite. Exit code 3."""


def exit_code(error: Exception) -> int:
    """2 for what the user can fix, 3 for numerics, 4 for input and output, 1 for a bug."""
    kinds = {UserError: EXIT_USAGE, NumericsError: EXIT_NUMERICS, OSError: EXIT_IO}
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), EXIT_BUG)


def printable(name: object, limit: int = 80) -> str:
    """A foreign name as harmless text of at most `limit` characters; unprintable ones are escaped as in a repr.

    '\\x1b[2J' -> '\\\\x1b[2J': a name from a downloaded file must not control the terminal that it is shown on.
    """
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(name)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"
