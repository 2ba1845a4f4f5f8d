"""A run's folder, read: whatever state it is in, by whoever wants to look at it and not to train."""

import fcntl
import json
import os
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minisft.errors import PATH, UserError, printable
from minisft.reports.shapes import is_number, misfit

# What a page reads of these files (shapes.py); there is more in them.
SOURCE = {"name": str, "epoch": {"documents": int, "tokens": int, "target_tokens": int}}
DATA = {"seq_len": int, "overlong": str, "lengths": [{"to": int, "kept": int, "too_long": int}], "packs": int,
        "packing_efficiency": float, "pack_fill?": [int], "packs_per_step?": int, "steps_per_epoch?": int,
        "total_steps?": int, "train": [SOURCE], "replay": [SOURCE], "epoch_documents": int, "epoch_tokens": int,
        "epoch_target_tokens": int}
CONFIG = {"model?": {}, "data?": {}, "lora?": {"rank?": int}, "optim?": {"clip_norm?": float},
          "eval?": {"forgetting_bound?": float}}


@dataclass(frozen=True)
class Run:
    """What a run wrote. Files that are missing are empty here; records are in the order of their steps."""

    name: str
    config: dict[str, Any]
    configuration: str  # as text
    data: dict[str, Any]  # data_report.figures
    environment: dict[str, Any]
    status: dict[str, Any]
    train: list[dict[str, Any]]
    evals: dict[str, "Evals"]
    samples: list[dict[str, Any]]
    profile: str
    written: float  # seconds since 1970: the last change of the log

    @cached_property
    def steps(self) -> np.ndarray:
        """(n,) the steps that are logged, from 1."""
        return self.column("step")

    @cached_property
    def skipped(self) -> np.ndarray:
        """(n,) bool: whether the step's gradient was not finite."""
        return np.array([record.get("skipped") is True for record in self.train], dtype=bool)

    @property
    def last_step(self) -> int:
        """The last step that is logged; 0 before the first."""
        return int(self.steps[-1]) if self.train else 0

    def column(self, name: str) -> np.ndarray:
        """(n,) one figure of each step; NaN where there is none."""
        return _column(self.train, name)

    def total(self, name: str) -> float:
        """The sum of a figure over the steps."""
        return float(np.nansum(self.column(name)))

    def sources(self) -> list[str]:
        """The names of what was trained on."""
        known = [source["name"] for source in (*self.data.get("train", ()), *self.data.get("replay", ()))]
        configured = self.config.get("data", {}).get("train", [])
        return known or [Path(str(source.get("path", "") if isinstance(source, dict) else source)).stem
                         for source in (configured if isinstance(configured, list) else [configured])]


class Evals:
    """The evaluations on one held-out source: `evals["loss"]` is (n,), as is every other figure."""

    def __init__(self, records: list[dict[str, Any]]):
        self.records = records

    def __getitem__(self, name: str) -> np.ndarray:
        return _column(self.records, name)


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs in the folders `paths`, by names that differ. Raises UserError for folders that hold no run."""
    last = [printable(path.resolve().name) for path in paths]
    names = last if len(set(last)) == len(last) else [printable(path, PATH) for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"a run is named twice: {', '.join(names)}; name each folder once")
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """The run in the folder `path`. Raises UserError where there is none, or a file of it is broken."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name the folder of a run (run.dir)")
    if not any((path / file).exists() for file in ("status.json", "metrics.jsonl", "config.toml")):
        raise UserError(f"{path}: holds no run (no status.json, metrics.jsonl or config.toml); name the folder of a "
                        "run (run.dir)")
    log, text = path / "metrics.jsonl", _text(path / "config.toml")
    config = _configuration(path / "config.toml", text)
    kinds: dict[str, dict[tuple[int, str, str], dict[str, Any]]] = {"train": {}, "eval": {}, "sample": {}}
    for record in _records(log):  # a step taken again replaces what it was
        key = (record["step"], str(record.get("name")), str(record.get("prompt")))
        kinds.get(str(record.get("kind")), {})[key] = record
    train, evals, samples = (sorted(found.values(), key=lambda record: record["step"]) for found in kinds.values())
    names = dict.fromkeys(str(record.get("name")) for record in evals)
    return Run(name, config, text, _object(path / "data.json", DATA), _object(path / "environment.json"),
               _status(path), train,
               {each: Evals([r for r in evals if str(r.get("name")) == each]) for each in names}, samples,
               _text(path / "profile" / "table.txt"), os.stat(log if log.exists() else path).st_mtime)


def _status(path: Path) -> dict[str, Any]:
    """What the run says of itself, or "dead": a process that is killed leaves "running" and lets go of the lock."""
    status = _object(path / "status.json")
    if status.get("state") == "running":
        try:
            with open(path / ".lock", "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                status["state"] = "dead"
        except FileNotFoundError:
            status["state"] = "dead"
        except OSError:  # somebody holds it, or it cannot be told
            pass
    return status


def _configuration(file: Path, text: str) -> dict[str, Any]:
    """The effective configuration; empty where there is no file."""
    try:
        config = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not TOML ({error})") from None
    if wrong := misfit(config, CONFIG):
        raise UserError(f"{file}: {wrong}")
    return config


def _records(log: Path) -> list[dict[str, Any]]:
    """The records of a log. Its last line may be half written, by a run that goes on or was killed."""
    records = []
    for number, line in enumerate(_text(log).split("\n")[:-1], 1):
        try:
            record = _json(line)
        except (ValueError, RecursionError):
            record = None
        if misfit(record, {"step": int, "sources?": {}}) or not all(map(is_number, record.get("sources", {}).values())):
            raise UserError(f"{log}:{number}: not a record of a run; delete the line, or restore the file: "
                            f"{line[:80]!r}")
        records.append(record)
    return records


def _object(file: Path, shape: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object of `shape`; empty where there is no file, or nothing in it."""
    text = _text(file)
    try:
        found = _json(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); delete it, and the report does without") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(found).__name__}; delete it, and the report "
                        "does without")
    if found and (wrong := misfit(found, shape or {})):
        raise UserError(f"{file}: {wrong}; delete the file, and the report does without")
    return found


def _json(text: str) -> Any:
    """Raises ValueError or RecursionError for what is not JSON, or text that no page could hold."""
    found = json.loads(text)
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()  # fails where half of a surrogate pair stands alone
    return found


def _text(file: Path) -> str:
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: is no regular file; delete it, and the report does without")
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _column(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """(n,) one figure of each record; NaN where it is missing, null or no number."""
    values = (record.get(name) for record in records)
    return np.array([value if is_number(value) else np.nan for value in values], dtype=float)
