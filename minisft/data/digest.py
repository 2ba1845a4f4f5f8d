"""What a file says, known without reading it again.

The store's key is of the file's content, and to hash a large file at every start takes longer than to open its store.
So the digest is kept in the cache beside the file's identity: device, inode, size, and the times of the last change of
content (mtime) and of anything (ctime, which no program can set back). As in git, a file that was changed just before
it was hashed is not remembered: within the grain of its clock it could change once more and keep its times.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from minisft.errors import UserError
from minisft.files import regular_file

RACY_NS = 2_000_000_000  # the coarsest clock of a file system in use: FAT's two seconds


def file_state(path: str) -> list[int]:
    """What changes when the file does. Raises UserError where there is no such file."""
    found = regular_file(path)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def content_digest(path: str, cache: Path) -> str:
    """SHA-256 of the file's bytes; read only where `cache` does not know the file as it is now."""
    state = file_state(path)
    note = cache / f"{state[0]:x}-{state[1]:x}.digest"
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known == _note(state, str(known["sha256"])):
            return str(known["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not known, or not readable: the file itself is asked
    now = time.time_ns()
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (remedy: name a file that can be read)") from None
    if file_state(path) == state and now - max(state[3:]) > RACY_NS:
        cache.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}.lock")
        partial.write_text(json.dumps(_note(state, sha256)), encoding="utf-8")
        os.replace(partial, note)
    return sha256


def _note(state: list[int], sha256: str) -> dict[str, str]:
    """What the cache remembers of a file; of a damaged note the seal does not fit."""
    return {"sha256": sha256, "seal": hashlib.sha256(f"{state} {sha256}".encode()).hexdigest()}
