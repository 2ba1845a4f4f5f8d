"""Files that can be read twice and to their end: a pipe would block forever, and a device never ends.

A path of data names one file or several, which are then one source:

    a.jsonl          a file
    a.json#train     the list named train in the one JSON object of a file
    data/            the files in a folder with a known suffix, sorted; not those in folders inside it
    data/*.jsonl     the files that match a glob, sorted; ** reaches into folders
"""

import glob
import os
import re
import stat
from itertools import pairwise
from pathlib import Path

from minisft.errors import PATH, UserError, printable

TEXTS = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv")  # also .gz of each
TABLES = (".parquet", ".arrow", ".feather")
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


def is_data(path: str) -> bool:
    """True if the suffix is one of a data file."""
    return path.lower().endswith(TABLES) or path.lower().removesuffix(".gz").endswith(TEXTS)


def file_and_split(path: str) -> tuple[str, str]:
    """("a.json", "train") of a.json#train; the split is empty if the path names none."""
    found = re.fullmatch(r"(.+\.(?:json|jsonl|ndjson)(?:\.gz)?)#([^/#]+)", path, re.IGNORECASE | re.DOTALL)
    return (found[1], found[2]) if found else (path, "")


def named_files(path: str) -> list[str]:
    """The files that a path of data names, sorted, whether or not they can be read."""
    file = file_and_split(path)[0]
    if os.path.isdir(file):
        visible = [entry.path for entry in os.scandir(file) if not entry.name.startswith(".")]
        return sorted(each for each in visible if is_data(each) and not os.path.isdir(each))
    if glob.has_magic(file) and not os.path.lexists(file):
        return sorted(each for each in glob.glob(file, recursive=True) if not os.path.isdir(each))
    return [file]


def data_files(path: str, *, key: str = "") -> list[str]:
    """`named_files`, each with the path's split. Raises UserError, whose message starts with `key`, if there is none,
    if one is not a regular file, or if two differ only in their suffix."""
    found, (file, split) = named_files(path), file_and_split(path)
    for each in found:
        regular_file(each, key=key)
    if not found:
        there = sorted(os.listdir(folder)) if os.path.isdir(folder := file) or os.path.isdir(
            folder := os.path.dirname(file) or ".") else []
        more = f" and {len(there) - 10} more" * (len(there) > 10)
        names = ", ".join(map(printable, there[:10])) or "none"
        raise UserError(f"{key}{path}: names no data file; there are {names}{more} (remedy: "
                        f"name a file, a folder or a glob of {', '.join(TEXTS + TABLES)} files)")
    for one, other in pairwise(sorted(found, key=_stem)):
        if _stem(one) == _stem(other):
            raise UserError(f"{key}{path}: has {printable(one, PATH)} and {printable(other, PATH)}, the same data "
                            "twice by their names (remedy: name one of them, or a glob that matches one)")
    return [f"{each}#{split}" if split else each for each in found]


def _stem(path: str) -> str:
    """The path without the suffixes of a data file."""
    return re.sub(rf"(?:{'|'.join(map(re.escape, TEXTS + TABLES))})(?:\.gz)?$", "", path, flags=re.IGNORECASE)


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
