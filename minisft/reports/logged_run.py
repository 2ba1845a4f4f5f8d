"""A run folder as its reader sees it, in whatever state the run is.

    config.toml  data.json  environment.json  metrics.jsonl  status.json  profile/table.txt  ->  LoggedRun

Each file is checked against the part of it that a page shows:

    {"packs": int, "pack_fill?": [int], "train": [{"name": str}]}      "?": may be missing; other fields are ignored

    misfit({"packs": 3, "train": [{"name": "a"}, {"name": 7}]}, ...)  ->  "train[1].name is 7, expected text"
"""

import fcntl
import json
import os
import reprlib
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import starmap
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minisft.errors import PATH, UserError, printable
from minisft.formats.records import WITH_NAN, from_json

SOURCE = {"name": str, "epoch": {"documents": int, "tokens": int, "target_tokens": int}}
DATA = {"seq_len": int, "overlong": str, "lengths": [{"to": int, "kept": int, "too_long": int}], "packs": int,
        "packing_efficiency": float, "pack_fill?": [int], "packs_per_step?": int, "steps_per_epoch?": int,
        "total_steps?": int, "train": [SOURCE], "replay": [SOURCE], "epoch_documents": int, "epoch_tokens": int,
        "epoch_target_tokens": int}
CONFIG = {"model?": {}, "data?": {"seq_len?": int}, "batch?": {"packs?": int}, "lora?": {"rank?": int},
          "optim?": {"lr?": float, "schedule?": str, "clip_norm?": float}, "eval?": {"forgetting_bound?": float}}
# Fields that a run needs when it resumes and records its model; the loss may also be null.
SHAPES = {"train": {"step": int, "tokens": int, "target_tokens": int, "seconds": float},
          "eval": {"step": int, "name": str, "target_tokens": int, "forgetting?": float},
          "stop": {"reason": str}}
KINDS = {dict: "an object", list: "a list", int: "a whole number", float: "a number", str: "text"}
LARGEST = 2**53  # fp64 skips whole numbers beyond it, and no figure of a run is as large

SUFFIX = ".minisft"  # of our event files

Record = dict[str, Any]
Event = tuple[str, Any, int]


def is_number(value: Any) -> bool:
    """True for a number that a figure may have: not NaN, not infinite, not beyond LARGEST."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def misfit(value: Any, shape: Any, where: str = "") -> str:
    """The first place where `value`, read from JSON or TOML, does not match `shape`; "" if it matches."""
    kind = shape if isinstance(shape, type) else type(shape)
    if not (is_number(value) and isinstance(value, int | kind) if kind in (int, float) else isinstance(value, kind)):
        return f"{where or 'it'} is {reprlib.repr(value)}, expected {KINDS[kind]}"
    parts: list[tuple[Any, Any, str]] = []
    if kind is dict:
        if missing := next((key for key in shape if key[-1] != "?" and key not in value), ""):
            return f"{missing} is missing" + (f" in {where}" if where else "")
        parts = [(value[key], inner, f"{where}.{key}".lstrip(".")) for name, inner in shape.items()
                 if (key := name.removesuffix("?")) in value]
    elif kind is list:
        parts = [(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value)]
    return next(filter(None, starmap(misfit, parts)), "")


@dataclass(frozen=True)
class LoggedRun:
    """The files of a run. A missing file is empty here; records are in the order of their steps."""

    name: str
    config: Record
    config_text: str
    data: Record  # data_report.figures
    environment: Record
    status: Record
    train: list[Record]
    evals: dict[str, list[Record]]  # by held-out source
    samples: list[Record]
    profile: str
    written: float  # when the log last changed, in seconds since 1970
    stopped: str = ""  # why it ended early

    @cached_property
    def steps(self) -> np.ndarray:
        """(n,) the logged steps, from 1."""
        return self.column("step")

    @cached_property
    def skipped(self) -> np.ndarray:
        """(n,) bool: their gradient was not finite."""
        return np.array([record.get("skipped") is True for record in self.train], dtype=bool)

    def column(self, name: str) -> np.ndarray:
        """(n,) one figure of each step; NaN where it is missing."""
        return column(self.train, name)

    def finite(self, name: str) -> np.ndarray:
        """(m,) one figure of the steps that have it."""
        return (values := self.column(name))[np.isfinite(values)]

    def total(self, name: str) -> float:
        """The sum of a figure over the steps."""
        return float(np.nansum(self.column(name)))

    def sources(self) -> list[str]:
        """The names of the sources that the run trained on."""
        known = [source["name"] for source in (*self.data.get("train", ()), *self.data.get("replay", ()))]
        configured = self.config.get("data", {}).get("train", [])
        return known or [Path(str(source.get("path", "") if isinstance(source, dict) else source)).stem
                         for source in (configured if isinstance(configured, list) else [configured])]


def column(records: list[Record], name: str) -> np.ndarray:
    """(n,) one figure of each record; NaN where it is missing, null or not a number."""
    values = (record.get(name) for record in records)
    return np.array([value if is_number(value) else np.nan for value in values], dtype=float)


def read_runs(paths: list[Path]) -> list[LoggedRun]:
    """The runs in the folders `paths`, with different names. Raises UserError for a folder without a run."""
    for parts in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = [printable(Path(*path.resolve().parts[-parts:]), PATH) for path in paths]
        if len(set(names)) == len(names):  # "a" and "b", or "a/run" and "b/run"
            return list(starmap(_read_run, zip(paths, names, strict=True)))
    raise UserError(f"a run is named twice: {', '.join(names)}; name each folder once")


def _read_run(path: Path, name: str) -> LoggedRun:
    if not any((path / file).exists() for file in ("status.json", "metrics.jsonl", "config.toml")):
        wrong = "not a run folder (no status.json, metrics.jsonl or config.toml)" if path.is_dir() else "no such folder"
        raise UserError(f"{path}: {wrong}; name the folder of a run (run.dir)")
    config, log = _read(path / "config.toml", CONFIG), path / "metrics.jsonl"
    _check(log)
    kinds: dict[str, dict[tuple[int, str, str], Record]] = {"train": {}, "eval": {}, "sample": {}, "stop": {}}
    for record in read_log(path, strict=False):  # a step that was repeated replaces the earlier one
        key = (record["step"], str(record.get("name")), str(record.get("prompt")))
        kinds.get(str(record.get("kind")), {})[key] = record
    by_step = (sorted(found.values(), key=lambda record: record["step"]) for found in kinds.values())
    train, evals, samples, stops = by_step
    stopped = next((str(stop.get("reason")) for stop in stops if train and stop["step"] == train[-1]["step"]), "")
    by_source: dict[str, list[Record]] = {}
    for record in evals:
        by_source.setdefault(str(record.get("name")), []).append(record)
    return LoggedRun(name, config, _text(path / "config.toml"), _read(path / "data.json", DATA),
                     _read(path / "environment.json", {}), _status(path), train, by_source, samples,
                     _text(path / "profile" / "table.txt"), os.stat(log if log.exists() else path).st_mtime, stopped)


class EventFiles:
    """Every number of every record of a run, as `train/loss` or `eval/NAME/loss`, and the answers as text, for
    TensorBoard in `folder`. What an earlier call wrote there is replaced; a TensorBoard that has read it drops it.

    Raises UserError without tensorboard, and if `folder` holds event files of another program.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("event files need tensorboard, which is not installed; pip install -e '.[tensorboard]'"
                            ) from None
        if printable(folder, PATH) != str(folder):
            raise UserError(f"{folder}: TensorBoard does not accept this name; choose another folder")
        if any(file.suffix != SUFFIX for file in folder.glob("events.out.tfevents.*")):
            raise UserError(f"{folder}: holds event files of another program, and TensorBoard would show both; delete "
                            "them, or choose another folder")
        for file in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            file.unlink()
        self._open = partial(SummaryWriter, str(folder), filename_suffix=SUFFIX)
        self._written: list[Event] = []
        self._texts: set[Event] = set()  # TensorBoard drops numbers, but never a text
        self._writer = self._open(purge_step=0)

    def update(self, run: LoggedRun) -> int:
        """Write what is new since the last call; returns the number of values of the run. Steps that a resumed run
        takes again replace the earlier ones."""
        events = _events(run)
        same = next((i for i, pair in enumerate(zip(events, self._written, strict=False)) if pair[0] != pair[1]),
                    min(len(events), len(self._written)))
        if same < len(self._written):
            self._writer.close()
            step = min(event[2] for event in (self._written[same], *events[same : same + 1]))
            self._writer = self._open(purge_step=step)
            same = next((i for i in range(same) if events[i][2] >= step), same)
        for event in events[same:]:
            if not isinstance(event[1], str):
                self._writer.add_scalar(*event)
            elif event not in self._texts:
                self._writer.add_text(*event)
                self._texts.add(event)
        self._writer.flush()
        self._written = events
        return sum(not isinstance(value, str) for _, value, _ in events)


def _events(run: LoggedRun) -> list[Event]:
    """(tag, number or text, step), in the order in which a log grows."""
    logs = {"train": run.train, **{f"eval/{name}": records for name, records in run.evals.items()}}
    found: list[Event] = [
        (f"{prefix}/{name}", value, record["step"]) for prefix, records in logs.items() for record in records
        for name, value in (*record.items(), *((f"sources/{k}", v) for k, v in record.get("sources", {}).items()))
        if name != "step" and is_number(value)]
    found += [(f"sample/{sample.get('name')}/{number}", "\n\n".join(
        f"**{key}**\n\n{sample.get(key, '')}" for key in ("prompt", "answer", "reference")), sample["step"])
              for number, sample in enumerate(run.samples)]
    return sorted(found, key=lambda event: event[2])


def _status(path: Path) -> Record:
    """status.json, its state "dead" if the run was killed: it then says "running", but nobody holds the lock."""
    status = _read(path / "status.json", {})
    if status.get("state") == "running":
        with suppress(OSError):  # the run holds the lock, or we cannot tell
            if (path / ".lock").exists():
                with open(path / ".lock", "rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status["state"] = "dead"
    return status


def read_log(folder: Path, *, strict: bool = True) -> list[Record]:
    """The records in a run's `metrics.jsonl`; empty without one. Raises UserError for a line that is no record."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    with open(file, "rb") as log:
        return [record for _, record in log_lines(log, file, strict=strict)]


def log_lines(log: BinaryIO, file: Path, *, strict: bool = True) -> Iterator[tuple[bytes, Record]]:
    """Each line and its record. The last line may be cut off: the run is writing it, or was killed. Unless `strict`,
    other figures than the step may be missing or wrong, which a page shows as gaps."""
    for number, line in enumerate(log, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = from_json(line.decode(), WITH_NAN)
            wrong = (misfit(record, {"step": int, "sources?": {}})
                     or misfit([*record.get("sources", {}).values()], [float], "sources"))
            if strict and not wrong:
                json.dumps(record, allow_nan=False)  # or ValueError
                wrong = (misfit(record, {"kind": str}) or misfit(record, SHAPES.get(record["kind"], {}))
                         or misfit(record.get("loss") or 0, float, "loss"))
        except (ValueError, RecursionError):
            wrong = "not JSON"
        if wrong:
            raise UserError(f"{file}:{number}: not a metrics record ({wrong}); fix or delete this line: "
                            f"{line[:80].decode(errors='replace').rstrip()!r}")
        yield line, record


def _read(file: Path, shape: Record) -> Record:
    """The content of `file`, checked against `shape`; {} if the file is missing or empty."""
    text, wrong = _text(file), ""
    try:
        found = (tomllib.loads if file.suffix == ".toml" else from_json)(text) if text else {}
        wrong = misfit(found, shape) if found != {} else ""
    except (ValueError, RecursionError) as error:
        wrong = f"not {file.suffix[1:].upper()} ({error})"
    if wrong:
        raise UserError(f"{file}: {wrong}; delete this file to get a report without it")
    return found


def _check(file: Path) -> None:
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: not a regular file; delete it to get a report without it")


def _text(file: Path) -> str:
    _check(file)
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
