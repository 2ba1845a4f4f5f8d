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
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from minisft.errors import UserError
from minisft.reports.logged_run import is_number, misfit

# What a record of a kind must have for a run to be resumed and recorded; the loss may also be null.
SHAPES = {"train": {"step": int, "tokens": int, "target_tokens": int, "seconds": float},
          "eval": {"step": int, "name": str, "target_tokens": int, "forgetting?": float}}
# What a run would write over.
OURS = ("config.toml", "data.json", "environment.json", "metrics.jsonl", "checkpoints", "final", "profile")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records in the `metrics.jsonl` of a run; none if there is no such file. UserError for any other line."""
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
            json.dumps(record, allow_nan=False)
            wrong = misfit(record, {"kind": str, "step": int}) or misfit(record, SHAPES.get(record["kind"], {}))
            if not wrong and record["kind"] in SHAPES and not is_number(record.get("loss") or 0):
                wrong = "loss is not a number"
        except (ValueError, RecursionError):
            wrong = "not JSON"
        if wrong:
            raise UserError(f"{file}:{number}: not a metrics record ({wrong.strip()}); fix or delete this line")
        yield line, record


class RunFolder:
    """Owned from construction until `close`, by the leading rank.

    Raises UserError if the folder is another run's or holds something else, OSError if it cannot be written.
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
        return file.exists() and file.read_bytes() == effective_config.encode()

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
        """The last step in `metrics.jsonl` before any line that is not a record; 0 without one."""
        file, last = self.path / "metrics.jsonl", 0
        if file.exists():
            with suppress(UserError, OSError), open(file, "rb") as log:
                for _, record in _records(log, file):
                    last = max(last, record["step"])
        return last

    def rewind_log(self, step: int) -> int:
        """Drop the records of `metrics.jsonl` that come after `step`: those steps are taken again. Returns how many
        steps are left in it."""
        file, partial = self.path / "metrics.jsonl", self.path / "metrics.jsonl.tmp"
        if not file.exists():
            return 0
        steps = set()
        with open(file, "rb") as old, open(partial, "wb") as new:
            for line, record in _records(old, file):
                if record["step"] <= step:
                    new.write(line)
                    steps |= {record["step"]} if record["kind"] == "train" else set()
            new.flush()
            os.fsync(new.fileno())
        os.replace(partial, file)
        return len(steps)

    @property
    def is_ours(self) -> bool:
        """Whether it was not let go of yet."""
        return not self._lock.closed

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()
