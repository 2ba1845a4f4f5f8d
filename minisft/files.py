"""Files that can be read twice and to their end; a pipe would wait for ever, and a device never ends."""

import os
import stat
from pathlib import Path

from minisft.errors import UserError

SMALL = 2**26  # bytes of a configuration, an index, a template


def regular_file(path: str | Path, *, key: str = "") -> os.stat_result:
    """Its stat. Raises UserError, which begins with `key`, where nothing can be read twice and to its end."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{key}{path}: {error.strerror} (remedy: name a file that can be read)") from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{key}{path}: Is a directory (remedy: name a file that can be read)")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{key}{path}: a pipe or a device, not a regular file (remedy: write what it says to a file)")
    return found


def read_small(path: str | Path, errors: str = "strict") -> str:
    """The text of a file that people or programs write by hand. Raises UserError for one that is no regular file or too
    large to be meant, and what `open` raises."""
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        regular_file(path)
    if found.st_size > SMALL:
        raise UserError(f"{path}: has {found.st_size:,} bytes, more than such a file may "
                        f"have, {SMALL:,} (remedy: get the file again)")
    return Path(path).read_text(encoding="utf-8", errors=errors)
