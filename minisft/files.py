"""Files that can be read twice and to their end: a pipe would block forever, and a device never ends."""

import os
import re
import stat
from pathlib import Path

from minisft.errors import UserError

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
        how = (f"{folder}:\n  hf download {path} --local-dir {folder} --exclude \"original/*\"\nLlama is gated: accept "
               "its licence on the model's page first, then run `hf auth login`.")
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
