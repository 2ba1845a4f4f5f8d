"""What a run ran on: the record that makes its figures comparable, or says why they are not."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from minisft.training.parallel import launched_rank

SOURCE = Path(__file__).parents[2]
PACKAGES = ("minisft", "torch", "tokenizers", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Plain values only. The devices are those of this host; `ranks` counts the processes of all hosts."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"started": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(sys.argv),
            "commit": commit(SOURCE), "ranks": launched_rank()[1], "gpus": gpus, "cuda": torch.version.cuda,
            "cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
            "system": platform.platform(), "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in PACKAGES if _installed(name)}
            | {"torch": torch.__version__}}


def commit(root: Path) -> str:
    """The commit of the checkout at `root`, with "-dirty" where it was changed since; empty without a repository."""
    if not (root / ".git").exists():  # or git would find that of a folder above, which is somebody else's
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu() -> str:
    """The processor's name as Linux tells it; on other machines than x86 the name of the architecture."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.machine())


def _installed(name: str) -> bool:
    """False for minisft where it runs from its folder without being installed."""
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
