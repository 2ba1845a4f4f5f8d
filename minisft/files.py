"""Files that can be read twice and to their end: a pipe would block forever, and a device never ends."""

import os
import stat
from pathlib import Path

from minisft.errors import UserError

SMALL = 2**26  # bytes of a configuration, an index, a template


def regular_file(path: str | Path, *, key: str = "") -> os.stat_result:
    """The stat of a regular file. Raises UserError, whose message starts with `key`, for anything else."""
    remedy = "name a file that can be read"
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return found
        problem = "Is a directory"
        if not stat.S_ISDIR(found.st_mode):
            problem, remedy = "a pipe or a device, not a regular file", "write its content to a file"
    except OSError as error:
        problem = str(error.strerror)
    raise UserError(f"{key}{path}: {problem} (remedy: {remedy})")


def read_small(path: str | Path, errors: str = "strict") -> str:
    """The text of a small file, such as a configuration. Raises OSError as `open` does, and UserError for a pipe, a
    device, or a file far too large to be one."""
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        regular_file(path)
    if found.st_size > SMALL:
        raise UserError(f"{path}: has {found.st_size:,} bytes, more than such a file may "
                        f"have, {SMALL:,} (remedy: get the file again)")
    return Path(path).read_text(encoding="utf-8", errors=errors)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
