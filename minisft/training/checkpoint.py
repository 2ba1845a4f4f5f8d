"""Checkpoints that no crash can spoil, and how to restore them.

    checkpoints/step-000100.tmp/  rank-0.safetensors  rank-0.json  rank-1.safetensors ...     being written
                step-000100/      rank-0.safetensors  rank-1.safetensors ...  manifest.json   renamed at the end
                step-000150-failed.tmp/   a rank could not write its part; being deleted
                step-000200.given-up/     damaged, or past the step that a run went back to; deleted by the next save

Each rank writes the rows that it holds (weights and both moments of AdamW, in the optimizer's precision) and its random
generators. Ranks of a further copy (HSDP) write their generators only. The step that saves waits for a copy to host
memory; a thread writes it to disk. When the digests of all parts are there, the main rank writes the manifest, makes
everything durable, and renames the folder. So a folder without `.tmp` is complete, at whichever byte the process died;
older checkpoints are deleted only after that.

The formats are safetensors and JSON: no pickle is read. Any tensor format would load a flipped bit silently, hence the
digests. A different number of ranks reads the rows it needs from whichever shards hold them.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minisft.errors import EXIT_IO, UserError
from minisft.files import delete, sync
from minisft.model.weights import local_rows
from minisft.training.optimizer import MOMENTS, AdamW
from minisft.training.parallel import World


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_durably(file: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is absent or whole, even after a power failure."""
    partial = file.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as out:
        out.write(json.dumps(content))
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, file)


class Saver:
    """Saves checkpoints of a run into `folder`, in the background, and keeps the newest `keep` of them (0: all)."""

    def __init__(self, folder: Path, world: World, *, keep: int = 0):
        self.folder, self.world, self.keep = folder, world, keep
        self.step: int | None = None  # of the newest save
        self.error: OSError | None = None  # of the save under way, as soon as it is known
        self._thread: threading.Thread | None = None
        self._pinned: Tensor | None = None  # host memory that a GPU writes into, kept for the next save
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for partial in leftovers(folder):
                shutil.rmtree(partial)

    def save(self, step: int, optimizer: AdamW, progress: dict[str, Any]) -> None:
        """Copy this rank's state after `step` steps, and begin to write it. All ranks call it. `progress` is JSON.

        Raises OSError if the disk has no room, or if the previous save failed.
        """
        self.finish()
        state = _state(optimizer) if self.world.rank < self.world.shards else {}
        tensors = self._on_host({key: tensor.detach() for key, tensor in state.items()})
        tensors["random/cpu"] = torch.get_rng_state()
        if self.world.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.world.device)
        check_room(self.folder, sum(tensor.nbytes for tensor in tensors.values()) * self.world.shards)
        partial = self.folder / f"step-{step:06}.tmp"
        if self.world.is_main:
            partial.mkdir()
        dist.barrier()  # from here on, a missing folder means that a rank has failed
        manifest = {"step": step, "shards": self.world.shards, "ranks": self.world.ranks,
                    "rows": {name: p.shape[0] for name, p in optimizer.parameters.items()}, "progress": progress}
        self.step = step
        self._thread = threading.Thread(target=self._write, args=(partial, tensors, manifest), name="saver",
                                        daemon=True)
        self._thread.start()

    def _on_host(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory. A GPU copies into one pinned buffer, several times faster than into pageable memory;
        the previous save has been written from it by now."""
        if self.world.device.type != "cuda" or not state:
            return {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}
        starts = list(accumulate((-(-tensor.nbytes // 64) * 64 for tensor in state.values()), initial=0))
        if self._pinned is None:
            self._pinned = torch.empty(starts[-1], dtype=torch.uint8)
            # torch's own pinned memory would be rounded up to a power of two.
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self._pinned.data_ptr(), starts[-1], 0)))
            weakref.finalize(self, _unpin, self._pinned)
        copies = {}
        for (key, tensor), start in zip(state.items(), starts, strict=False):
            part = self._pinned[start : start + tensor.nbytes]
            copies[key] = part.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
        torch.cuda.synchronize(self.world.device)
        return copies

    def finish(self, seconds: float | None = None) -> bool:
        """Wait until this rank's save under way is on disk, for at most `seconds`; True if it is. Raises OSError if it
        failed."""
        if self._thread:
            self._thread.join(seconds)
            self._thread = self._thread if self._thread.is_alive() else None
        self.check()
        return not self._thread

    def check(self) -> None:
        """Raise OSError if the save under way has failed by now."""
        if self.error:
            raise self.error

    def _write(self, partial: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        file = partial / f"rank-{self.world.rank}.safetensors"
        try:
            save_file(tensors, file)
            sync(file)
            _write_durably(file.with_suffix(".json"), {"bytes": file.stat().st_size, "sha256": _digest(file)})
            if self.world.is_main:
                self._commit(partial, manifest)
        except (OSError, SafetensorError) as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            failure = OSError(f"{partial}: the checkpoint could not be written ({error}); this rank's part needs "
                              f"{size:,} bytes. The older checkpoints are intact")
            self.world.report_failure(EXIT_IO, str(failure))  # before the others find the folder gone
            failed = partial.with_name(f"{partial.stem}-failed.tmp")  # no rank can write into it any more
            with suppress(OSError):
                os.rename(partial, failed)
            shutil.rmtree(failed, ignore_errors=True)
            self.error = failure  # the process may end as soon as this is seen

    def _commit(self, partial: Path, manifest: dict[str, Any]) -> None:
        reports = [partial / f"rank-{rank}.json" for rank in range(self.world.ranks)]
        while not all(report.exists() for report in reports):
            if not partial.exists():
                raise OSError("another rank could not write its part")
            time.sleep(0.02)
        manifest["files"] = {report.with_suffix(".safetensors").name: json.loads(report.read_text())
                             for report in reports}
        _write_durably(partial / "manifest.json", _with_digest(manifest))
        for report in reports:
            report.unlink()
        sync(partial)
        final = partial.with_suffix("")
        os.rename(partial, final)
        sync(self.folder)
        older = saved_checkpoints(self.folder)[self.keep :] if self.keep else []
        for folder in [*older, *self.folder.glob("step-*.given-up")]:
            delete(folder)


def check_room(folder: Path, needed: int, what: str = "a checkpoint needs") -> None:
    """Raise OSError unless `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder}: {what} {needed:,} bytes and {free:,} are free; free some space and "
                      "start again, nothing is lost")


def _state(optimizer: AdamW) -> dict[str, Tensor]:
    """A rank's rows of the weights and of both moments, by name."""
    state: dict[str, Tensor] = {f"weights/{name}": rows for name, rows in optimizer.rows.items()}
    for moment in MOMENTS:
        state |= {f"{moment}/{name}": tensor for name, tensor in optimizer.moments(moment).items()}
    return state


def _with_digest(manifest: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps(manifest, sort_keys=True)
    return {"sha256": hashlib.sha256(content.encode()).hexdigest(), "manifest": manifest}


def saved_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first. They may be damaged (`SavedState`)."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(named, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The number of finished steps, from the folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def set_aside(folders: list[Path]) -> None:
    """Rename what a run saved after the step that it goes back to, so that none of it counts as its own."""
    for folder in folders:
        aside = folder.with_suffix(".given-up")
        shutil.rmtree(aside, ignore_errors=True)  # of the same step, set aside earlier
        os.rename(folder, aside)


def leftovers(folder: Path) -> list[Path]:
    """The remains in `folder` of runs that died during a save."""
    return sorted(folder.glob("step-*.tmp"))


class IncompleteError(UserError):
    """A checkpoint folder whose manifest is missing or damaged."""


class SavedState:
    """A checkpoint folder. Raises IncompleteError without a good manifest."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "manifest.json"
        try:
            signed = json.loads(file.read_text(encoding="utf-8"))
            self.manifest = signed["manifest"]
            intact = signed == _with_digest(self.manifest)
        except FileNotFoundError:
            raise IncompleteError(f"{file}: no such file; the folder is not a complete checkpoint") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            intact = False
        if not intact:
            raise IncompleteError(f"{file}: damaged, or written in part")
        self.step, self.progress = int(self.manifest["step"]), self.manifest["progress"]

    def verify(self, files: Callable[[list[str]], list[str]] = list) -> None:
        """Compare the files' sizes and digests with the manifest; `files` selects those that this rank reads.

        Raises UserError naming the file that differs.
        """
        for name in files(sorted(self.manifest["files"])):
            file, expected = self.folder / name, self.manifest["files"][name]
            if not file.exists():
                raise UserError(f"{file}: missing")
            if file.stat().st_size != expected["bytes"]:
                raise UserError(f"{file}: {file.stat().st_size:,} bytes, {expected['bytes']:,} were written")
            if _digest(file) != expected["sha256"]:
                raise UserError(f"{file}: damaged (its sha256 is not the one that was written)")

    @torch.no_grad()
    def restore(self, optimizer: AdamW, world: World) -> None:
        """Fill weights, moments and, with the same number of ranks, the random generators.

        Raises UserError if the checkpoint is of another network.
        """
        shards = [safe_open(self.folder / f"rank-{i}.safetensors", framework="pt")
                  for i in range(self.manifest["shards"])]
        self._check_shapes(shards, optimizer)
        optimizer.resume(self.progress["adam_steps"])
        for key, target in _state(optimizer).items():
            name = key.partition("/")[2]
            _, start = local_rows(optimizer.parameters[name])
            if len(target):
                target.copy_(_rows(shards, key, start, start + len(target)))
        if self.manifest["ranks"] == world.ranks:
            with safe_open(self.folder / f"rank-{world.rank}.safetensors", framework="pt") as mine:
                torch.set_rng_state(mine.get_tensor("random/cpu"))
                if world.device.type == "cuda" and "random/cuda" in mine.keys():  # noqa: SIM118
                    torch.cuda.set_rng_state(mine.get_tensor("random/cuda"), world.device)

    def _check_shapes(self, shards: list[safe_open], optimizer: AdamW) -> None:
        wanted = {name: list(parameter.shape) for name, parameter in optimizer.parameters.items()}
        there = {key.removeprefix("weights/"): [shard.get_slice(key).get_shape() for shard in shards]
                 for key in shards[0].keys() if key.startswith("weights/")}  # noqa: SIM118
        found = {name: [sum(rows for rows, *_ in shapes), *shapes[0][1:]] for name, shapes in there.items()}
        lacking, surplus = (sorted(a.keys() - b.keys()) for a, b in ((wanted, found), (found, wanted)))
        other = [f"{name} ({found[name]} there, {wanted[name]} here)" for name in sorted(wanted.keys() & found.keys())
                 if found[name] != wanted[name]]
        problems = [f"{what} {', '.join(names[:10])}{' ...' * (len(names) > 10)}" for what, names in
                    (("it lacks", lacking), ("it also has", surplus), ("shapes differ:", other)) if names]
        if problems:
            raise UserError(f"{self.folder}: holds another network: {'; '.join(problems)}. It cannot be "
                            "resumed, not even with checkpoint.allow_change: go back to the network it was saved from, "
                            "or choose another run.dir")


def _unpin(buffer: Tensor) -> None:
    """Unregister `buffer` before it is freed, or writes to its next owner would still go to the old pages."""
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))


def _rows(shards: list[safe_open], key: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor whose rows are divided over `shards`."""
    parts, first = [], 0
    for shard in shards:
        part = shard.get_slice(key)
        last = first + part.get_shape()[0]
        if first < stop and last > start:
            parts.append(part[max(start - first, 0) : stop - first])
        first = last
    return torch.cat(parts)
