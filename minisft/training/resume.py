"""Which checkpoint a run goes on from.

`auto` takes the newest one that is intact and says which it passed over and why; a folder named by hand must be intact,
and is gone back to once: the same command again, after a crash, goes on with what was saved since.
Where checkpoints are there and all are damaged, a person has to look: to begin again would throw the run away. All
ranks look at those that the leading one sees, each at its share of the files, and all come to the same answer. Going on
with other data, another batch or another model would silently be another run, so it is refused with the differences.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from minisft.errors import UserError
from minisft.training.checkpoint import IncompleteError, SavedState, checkpoints, leftovers, step_of
from minisft.training.parallel import World

Found = TypeVar("Found")


def find(folder: Path, world: World, fingerprint: dict[str, Any], *, wanted: str = "auto", again: bool = False,
         allow_change: bool = False, total_steps: int | None = None) -> SavedState | None:
    """The state to go on from in the checkpoints of run `folder`; None to start afresh.

    `wanted` is "auto", "never" or a checkpoint's folder; `again`, as the leading rank says it: the run was last started
    in just this way. Raises UserError where the wanted one, or every one, is damaged, where there are some and none is
    wanted, and where `_check` does.
    """
    there, again = as_leader((checkpoints(folder / "checkpoints"), again), world)
    saved, passed_over = None, []
    if wanted == "never":
        if there:
            raise UserError(f"{folder}: holds checkpoints, and checkpoint.resume is \"never\"; choose another folder "
                            "with run.dir, or delete them")
    elif wanted == "auto" or (again and there):
        passed_over = [f"{path}: its save was not finished" for path in leftovers(folder / "checkpoints")]
        saved, damaged = _newest(there, world)
        passed_over += damaged
    else:
        saved, problem, _ = _intact(Path(wanted), world)
        if saved is None:
            raise UserError(f"checkpoint.resume: {problem}")
    skipped = f" (passed over {'; '.join(passed_over)})" if passed_over else ""
    if saved is None:
        if world.leads and skipped:
            print(f"no checkpoint to go on from, beginning at step 0{skipped}", flush=True)
        return None
    _check(saved, fingerprint, allow_change=allow_change, total_steps=total_steps)
    if world.leads:
        changes = _changes(saved, world, [] if skipped else there)
        print(f"going on from {saved.folder}, after step {saved.step}{changes}{skipped}", flush=True)
    return saved


def given_up(saved: SavedState | None, there: list[Path]) -> list[Path]:
    """Those of a run's checkpoints, newest first, that are not on the way to `saved`, which it goes on from."""
    if saved is None or saved.folder.resolve() not in [path.resolve() for path in there]:
        return there
    return [path for path in there if step_of(path) > saved.step]


def _check(saved: SavedState, fingerprint: dict[str, Any], *, allow_change: bool, total_steps: int | None) -> None:
    """Raise UserError where `fingerprint` differs from the saved one and `allow_change` is not given, or where the run
    has fewer steps than the state."""
    changed = _differences(saved.progress["fingerprint"], fingerprint)
    if changed and not allow_change:
        raise UserError(f"{saved.folder}: the run was started with other settings, so its batches would not be the "
                        "same; go back to them, choose another run.dir, or pass --checkpoint.allow_change true:"
                        + "".join(f"\n  {line}" for line in changed))
    if total_steps is not None and saved.step > total_steps:
        raise UserError(f"{saved.folder}: is of step {saved.step}, and the run has {total_steps} steps now; raise "
                        "train.epochs or train.max_steps, name an older one with checkpoint.resume, or choose another "
                        "run.dir")


def _changes(saved: SavedState, world: World, there: list[Path]) -> str:
    """What will be other than before, for a person."""
    ranks, others = saved.manifest["ranks"], [path.name for path in given_up(saved, there)]
    resharded = f"; saved by {ranks} ranks, now {world.ranks}: the same global batches, but not bit-exact"
    replaced = f"; the next checkpoint takes the place of {', '.join(others)}"
    return (resharded if ranks != world.ranks else "") + (replaced if others else "")


def history(saved: SavedState | None, settings: dict[str, Any], fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
    """What was changed on the way, one setting and step each: {from_step, key, was, is}. Those of the last step are
    new; `settings` are the keys that `fingerprint` may lack."""
    if saved is None:
        return []
    before, step = saved.progress["fingerprint"] | saved.progress.get("settings", settings), saved.step + 1
    now = fingerprint | settings
    new = [{"from_step": step, "key": key, "was": before.get(key), "is": now.get(key)}
           for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return [*saved.progress.get("history", []), *new]


def as_leader(found: Found, world: World) -> Found:
    """What the leading rank has found: on a network's disk others may see a new file later."""
    everyones = [found] * world.ranks
    dist.all_gather_object(everyones, found)
    return everyones[0]


def _newest(candidates: list[Path], world: World) -> tuple[SavedState | None, list[str]]:
    """The first of `candidates` that is intact, and what is wrong with those before it."""
    problems: list[str] = []
    damaged = False
    for candidate in candidates:
        saved, problem, incomplete = _intact(candidate, world)
        if saved:
            return saved, problems
        problems.append(problem)
        damaged = damaged or not incomplete
    if damaged:
        raise UserError("no checkpoint of this run is intact; mend one, or begin again with another run.dir:"
                        + "".join(f"\n  {problem}" for problem in problems))
    return None, problems


def _intact(candidate: Path, world: World) -> tuple[SavedState | None, str, bool]:
    """The state if every rank finds its share of the files intact; otherwise a problem, and if it is the manifest's."""
    saved, problem, incomplete = None, "", False
    try:
        saved = SavedState(candidate)
        saved.verify(lambda files: files[world.rank :: world.ranks])
    except (UserError, OSError) as error:
        problem, incomplete = str(error), isinstance(error, IncompleteError)
    found = [("", False)] * world.ranks
    dist.all_gather_object(found, (problem, incomplete))
    problem, incomplete = next((pair for pair in found if pair[0]), ("", False))
    return (None if problem else saved), problem, incomplete


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
