"""What a run writes about itself while it runs: `metrics.jsonl` and `status.json`.

Figures that live on the device are read one step late: by then they are ready, and reading them does not make the
host wait for the step that the device is working on.
"""

import json
import os
import resource
from pathlib import Path
from typing import Any

import torch


class MetricsLog:
    """Appends one JSON object a line. A record's tensors are read when the next record comes, or at `flush`."""

    def __init__(self, file: Path):
        self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._waiting: dict[str, Any] | None = None

    def write(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Take a record; returns the one before it, now complete and on its way to the file."""
        done = self.flush()
        self._waiting = record
        return done

    def flush(self) -> dict[str, Any] | None:
        """Write the record that is still waiting, if any."""
        done, self._waiting = self._waiting, None
        if done:
            done = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in done.items()}
            self._file.write(json.dumps(done) + "\n")
            self._file.flush()
        return done

    def close(self) -> None:
        """Write what is waiting and close the file."""
        self.flush()
        self._file.close()


def memory_gib(device: torch.device) -> float:
    """The most memory that was in use so far: allocated on the device, or resident for a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def write_status(folder: Path, *, state: str, step: int = 0, exit_code: int | None = None, error: str = "") -> None:
    """Replace `status.json`; torchrun hides a process's exit code, so it is kept here."""
    partial = folder / "status.json.tmp"
    partial.write_text(json.dumps({"state": state, "exit_code": exit_code, "step": step, "error": error}))
    os.replace(partial, folder / "status.json")
