"""The folder of a run: who owns it, what state the run is in, what is in its log.

    config.toml  data.json  environment.json  metrics.jsonl  status.json
    checkpoints/step-000100/  final/  profile/  .lock

One run at a time owns a folder, by a lock that the kernel lets go of when the owner dies. A folder that holds something
else, or a run that is finished, is never written over.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minisft.errors import UserError

# What a run would write over.
OURS = ("config.toml", "data.json", "environment.json", "metrics.jsonl", "checkpoints", "final", "profile")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records in the `metrics.jsonl` of a run; none where there is no such file. UserError for what is none."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    with open(file, "rb") as log:
        return [record for _, record in _records(log, file)]


def _records(log: BinaryIO, file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line and its record; not a last line that was cut off by a crash."""
    for number, line in enumerate(log, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{file}:{number}: is no record of a run; mend the line or delete it")
        yield line, record


class RunFolder:
    """Owned from construction until `close`, by the leading rank.

    Raises UserError where the folder is another run's or holds something else, OSError where it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        foreign = [name for name in OURS if (path / name).exists()]
        if foreign and not (path / "status.json").exists():
            raise UserError(f"{path}: holds {', '.join(foreign)}, but not of a run; choose another folder with run.dir")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise UserError(f"{path}: in use by {holder}; wait for it, or choose another folder with run.dir") from None
        if (path / "final").exists():
            raise UserError(f"{path}: holds a finished run; choose another folder with run.dir, or delete it")
        self._lock.truncate(0)
        self._write(".lock", f"process {os.getpid()} on {os.uname().nodename}\n")

    def was_begun_with(self, effective_config: str) -> bool:
        """Whether the last start that was accepted had this configuration."""
        file = self.path / "config.toml"
        return file.exists() and file.read_text(encoding="utf-8") == effective_config

    def begin(self, effective_config: str, *, data: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write what the run is made of; when it goes on, what it goes on with."""
        self._write("config.toml", effective_config)
        self._write("data.json", json.dumps(data, indent=1) + "\n")
        self._write("environment.json", json.dumps(environment, indent=1) + "\n")

    def status(self, state: str, *, exit_code: int | None = None, error: str = "") -> None:
        """Replace `status.json`; torchrun hides a process's exit code, so it is kept here."""
        content = {"state": state, "exit_code": exit_code, "step": self.last_step(), "error": error}
        self._write("status.json.tmp", json.dumps(content))
        os.replace(self.path / "status.json.tmp", self.path / "status.json")

    def _write(self, name: str, text: str) -> None:
        try:
            (self.path / name).write_text(text, encoding="utf-8")
        except OSError as error:  # of a full disk, the library names no file
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None

    def last_step(self) -> int:
        """The last step in `metrics.jsonl`; 0 without one."""
        return max((record["step"] for record in read_log(self.path)), default=0)

    def rewind_log(self, step: int) -> None:
        """Drop the records of `metrics.jsonl` that come after `step`: those steps are taken again."""
        file, partial = self.path / "metrics.jsonl", self.path / "metrics.jsonl.tmp"
        if not file.exists():
            return
        with open(file, "rb") as old, open(partial, "wb") as new:
            new.writelines(line for line, record in _records(old, file) if record["step"] <= step)
        os.replace(partial, file)

    @property
    def is_ours(self) -> bool:
        """Whether it was not let go of yet."""
        return not self._lock.closed

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()
