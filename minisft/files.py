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
import shutil
import stat
import warnings
from itertools import pairwise
from pathlib import Path

from minisft.errors import PATH, UserError, printable

TEXTS = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv")  # also .gz of each
TABLES = (".parquet", ".arrow", ".feather")
SMALL = 2**26  # bytes of a configuration, an index, a template
HUB_ID = re.compile(r"[a-z0-9][\w.-]*/([\w.-]+)", re.ASCII | re.IGNORECASE)


def from_hub(path: str | Path, option: str = "", *, dataset: bool = False) -> str:
    """How to download what `path` names if it is missing and looks like an id on the Hugging Face hub (org/name), and
    which `option` to pass then; empty for other paths."""
    found = HUB_ID.fullmatch(str(path))
    if not found or Path(path).parent.exists() or Path(path).suffix[1:].isalpha():  # a.jsonl is a file
        return ""
    if dataset:
        folder = f"data/{found[1]}"
        how = f"{folder}/FILE:\n  hf download {path} --local-dir {folder} --repo-type dataset"
    else:
        folder = f"models/{found[1]}"
        how = f"{folder}:\n  hf download {path} --local-dir {folder} --exclude \"original/*\""
        if "llama" in str(path).lower():
            how += "\nLlama is gated: accept its licence on the model's page first, then run `hf auth login`."
    return f"\nIf {path} is on the Hugging Face hub, download it, and pass{f' {option}' * bool(option)} {how}"


def regular_file(path: str | Path, *, key: str = "") -> os.stat_result:
    """The stat of a regular file. Raises UserError, whose message starts with `key`, for anything else."""
    remedy, download = "name a file that can be read", ""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return found
        problem = "Is a directory"
        if not stat.S_ISDIR(found.st_mode):
            problem, remedy = "a pipe or a device, not a regular file", "write its content to a file"
    except OSError as error:
        problem = str(error.strerror)
        download = from_hub(path, f"--{key.partition(':')[0]}", dataset=True) if key else ""
    raise UserError(f"{key}{path}: {problem} (remedy: {remedy}){download}")


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


def delete(folder: Path) -> None:
    """Delete a folder that nothing needs any more. If it cannot be, that is no reason to end a run: a warning."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder}: could not be deleted, so it stays ({error}); delete it when you can", stacklevel=2)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
