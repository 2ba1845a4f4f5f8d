"""The folder of a run: its lock, the state of the run, its log.

    config.toml  data.json  environment.json  metrics.jsonl  status.json
    checkpoints/step-000100/  exports/step-000100/  best/step-000100/  final/  profile/  .lock

One run at a time holds a folder, by a lock that the kernel releases when the process dies. A folder with other content,
or a finished run, is never overwritten. A finished run resumes if train.epochs or train.max_steps is raised, or if what
ended it early is changed: it stays "done" until it is known that there are more steps, and its final/ stays until the
new one is written.
"""

import fcntl
import json
import os
import tomllib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minisft.config import Config
from minisft.errors import UserError
from minisft.reports.logged_run import log_lines, read_log
from minisft.training.checkpoint import saved_checkpoints

# A run would overwrite these.
OURS = ("config.toml", "data.json", "environment.json", "metrics.jsonl", "checkpoints", "best", "final", "profile")


class RunDir:
    """Locked by the main rank from construction until `close`.

    Raises UserError if another run uses the folder, or it holds something else or a run that was finished and is not to
    become longer by `config`; OSError if it cannot be written.
    """

    def __init__(self, path: Path, config: Config):
        self.path = path
        foreign = [name for name in OURS if (path / name).exists()]
        if foreign and not (path / "status.json").exists():
            raise UserError(f"{path}: holds {', '.join(foreign)}, but no run; choose another folder with run.dir")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise UserError(f"{path}: in use by {holder}; wait for it, or choose another folder with run.dir") from None
        # A start that did not come to its end resumes; one that did, and saved nothing, would be made anew.
        state, saved = self._state(), bool(saved_checkpoints(path / "checkpoints"))
        can_go_on = saved and state not in ("", "done")
        self.is_finished = ((path / "final").exists() and not can_go_on) or (state == "done" and not saved)
        if self.is_finished:
            self._check_longer(config)
        self._lock.truncate(0)
        self._write(".lock", f"process {os.getpid()} on {os.uname().nodename}\n")

    def _state(self) -> str:
        """The state in `status.json`; "" if that tells none."""
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            return str(json.loads((self.path / "status.json").read_text(encoding="utf-8"))["state"])
        return ""

    def _check_longer(self, config: Config) -> None:
        """Raise UserError unless `config` asks for more than the finished run had, and there is a checkpoint of it."""
        text = f"{self.path}: holds a finished run; choose another folder with run.dir, or delete it"
        try:
            was = tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8"))
            epochs, steps = was["train"]["epochs"], was["train"]["max_steps"]
            longer = config.train.epochs > epochs or (steps != "none" and (config.train.max_steps or 2**63) > steps)
            remedy = f"raise train.epochs (it had {epochs}) or train.max_steps ({steps})"
            log = read_log(self.path)
            if any(record["kind"] == "stop" and record["step"] == log[-1]["step"] for record in log):
                keys, now = ("stop_on", "patience", "forgetting_bound"), json.loads(json.dumps(asdict(config.eval)))
                longer = any(now[key] != was["eval"][key] for key in keys)
                remedy = "change what ended it: " + ", ".join(f"eval.{key} ({was['eval'][key]})" for key in keys)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise UserError(text) from None
        if not saved_checkpoints(self.path / "checkpoints"):
            raise UserError(f"{text}; it cannot be trained longer, because its checkpoints are gone")
        if not longer:
            raise UserError(f"{text}; to train it longer, {remedy}")

    def check_steps(self, total: int) -> None:
        """Raise UserError if this run is finished and `total` steps are not more than it had."""
        if self.is_finished and total <= (had := self.last_step()):
            raise UserError(f"{self.path}: holds a finished run of {had} steps, and with train.epochs and "
                            f"train.max_steps as they are now it has {total}; raise the one that ends it")

    def was_started_with(self, effective_config: str) -> bool:
        """True if the last accepted start had this configuration."""
        file = self.path / "config.toml"
        return file.exists() and file.read_bytes() == effective_config.encode()

    def begin(self, effective_config: str, *, data: dict[str, Any], environment: dict[str, Any]) -> None:
        """Record what the run is made of at this start, and that it is running."""
        self.is_finished = False
        self.status("running")  # before the configuration: a finished run with the new one could not become longer
        self._write("config.toml", effective_config)
        self._write("data.json", json.dumps(data, indent=1) + "\n")
        self._write("environment.json", json.dumps(environment, indent=1) + "\n")

    def status(self, state: str, *, exit_code: int | None = None, error: str = "") -> None:
        """Replace `status.json`, which also keeps the exit code, because torchrun hides it. That of a finished run
        stays until a longer one begins."""
        if self.is_finished:
            return
        content = {"state": state, "exit_code": exit_code, "step": self.last_step(), "error": error}
        self._write("status.json.tmp", json.dumps(content))
        os.replace(self.path / "status.json.tmp", self.path / "status.json")

    def _write(self, name: str, text: str) -> None:
        try:
            (self.path / name).write_text(text, encoding="utf-8")
        except OSError as error:  # a full disk; the library names no file
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None

    def last_step(self) -> int:
        """The last step in `metrics.jsonl`, up to the first line that is no record; 0 without one."""
        file, last = self.path / "metrics.jsonl", 0
        if file.exists():
            with suppress(UserError, OSError), open(file, "rb") as log:
                for _, record in log_lines(log, file):
                    last = max(last, record["step"])
        return last

    def rewind_log(self, step: int) -> int:
        """Drop the records of `metrics.jsonl` after `step`, because those steps are taken again. Returns the number of
        steps left in it."""
        file, partial = self.path / "metrics.jsonl", self.path / "metrics.jsonl.tmp"
        if not file.exists():
            return 0
        steps = set()
        with open(file, "rb") as old, open(partial, "wb") as new:
            for line, record in log_lines(old, file):
                if record["step"] <= step:
                    new.write(line)
                    steps |= {record["step"]} if record["kind"] == "train" else set()
            new.flush()
            os.fsync(new.fileno())
        os.replace(partial, file)
        return len(steps)

    @property
    def is_locked(self) -> bool:
        """True until `close`."""
        return not self._lock.closed

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()
