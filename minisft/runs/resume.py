"""Which checkpoint a run resumes from.

`auto` takes the newest intact one, and says which it passed over and why. A folder named by hand must be intact, and is
gone back to once: the same command again, after a crash, resumes from what was saved since. If there are checkpoints
and all are damaged, a person has to look: starting again would throw the run away. All ranks look at the checkpoints
that the main one sees, each at its share of the files, and all come to the same answer. Resuming with other data,
another batch or another model would silently be another run, so it is refused with the differences.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from minisft.errors import UserError
from minisft.runs.assemble import HELD_OUT, Run
from minisft.training.checkpoint import IncompleteError, SavedState, leftovers, saved_checkpoints, step_of
from minisft.training.parallel import World

T = TypeVar("T")


def find(run: Run, *, same_start: bool = False) -> SavedState | None:
    """The saved state that `run` resumes from; None to start afresh.

    `same_start`, as the main rank says: the last start had this very configuration. Raises UserError if the wanted
    checkpoint, or every one, is damaged; if there are some and checkpoint.resume is "never"; or if the state is of
    another run or past the end of this one.
    """
    wanted, world, folder = run.config.checkpoint.resume, run.world, run.folder
    saved_ones, same_start = from_main((saved_checkpoints(folder / "checkpoints"), same_start), world)
    saved, passed_over = None, []
    if wanted == "never":
        if saved_ones:
            raise UserError(f"{folder}: holds checkpoints, and checkpoint.resume is \"never\"; choose another folder "
                            "with run.dir, or delete them")
    elif wanted == "auto" or (same_start and saved_ones):
        passed_over = [f"{path}: its save was not finished" for path in leftovers(folder / "checkpoints")]
        saved, damaged = _newest(saved_ones, world)
        passed_over += damaged
    else:
        saved, problem, _ = _intact(Path(wanted), world)
        if saved is None:
            raise UserError(f"checkpoint.resume: {problem}")
    skipped = f" (passed over {'; '.join(passed_over)})" if passed_over else ""
    if saved is None:
        if world.is_main and skipped:
            print(f"no checkpoint to resume from, beginning at step 0{skipped}", flush=True)
        return None
    _check(saved, run)
    if world.is_main:
        others = [path.name for path in abandoned(saved, [] if skipped else saved_ones)]
        ranks = saved.manifest["ranks"]
        resharded = f"; saved by {ranks} ranks, now {world.ranks}: the same global batches, but not bit-exact"
        replaced = f"; the next checkpoint replaces {', '.join(others)}" if others else ""
        print(f"resuming from {saved.folder}, after step {saved.step}{resharded * (ranks != world.ranks)}{replaced}"
              f"{skipped}", flush=True)
    return saved


def abandoned(saved: SavedState | None, checkpoints: list[Path]) -> list[Path]:
    """Those of a run's `checkpoints`, newest first, that do not lead to `saved`, from which it resumes."""
    if saved is None or saved.folder.resolve() not in [path.resolve() for path in checkpoints]:
        return checkpoints
    return [path for path in checkpoints if step_of(path) > saved.step]


def _check(saved: SavedState, run: Run) -> None:
    """Raise UserError if `saved` is of another run (unless that is allowed), or past the last step of this one."""
    changed = [f"{key}: was {was!r}, is {now!r}"
               for key, was, now in _differences(saved.progress["fingerprint"], run.fingerprint)]
    if changed and not run.config.checkpoint.allow_change:
        raise UserError(f"{saved.folder}: the run was started with other settings, so it would be another run; go "
                        "back to them, choose another run.dir, or pass --checkpoint.allow_change true:"
                        + "".join(f"\n  {line}" for line in changed))
    if saved.step > (total := run.prepared.plan.total_steps):
        raise UserError(f"{saved.folder}: is of step {saved.step}, but the run has only {total} steps now; raise "
                        "train.epochs or train.max_steps, name an older one with checkpoint.resume, or choose another "
                        "run.dir")


def history(saved: SavedState | None, settings: dict[str, Any], fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings changed on the way: {from_step, key, was, is} each. Those of the last step are new; `settings` are
    the keys that `fingerprint` may lack."""
    if saved is None:
        return []
    before = saved.progress["fingerprint"] | saved.progress.get("settings", settings)
    new = [{"from_step": saved.step + 1, "key": key, "was": was, "is": now}
           for key, was, now in _differences(before, fingerprint | settings)]
    return [*saved.progress.get("history", []), *new]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Of held-out sets only what changed in one that was and is there."""
    pairs = {key: (before.get(key), now.get(key)) for key in sorted({*before, *now})}
    return [(key, *pair) for key, pair in pairs.items()
            if pair[0] != pair[1] and not (key.startswith(HELD_OUT) and None in pair)]


def from_main(value: T, world: World) -> T:
    """The main rank's `value`: on a network disk others may see a new file later."""
    values = [value] * world.ranks
    dist.all_gather_object(values, value)
    return values[0]


def _newest(candidates: list[Path], world: World) -> tuple[SavedState | None, list[str]]:
    """The first intact one of `candidates`, and what is wrong with those before it."""
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
    """The state if every rank finds its share of the files intact; otherwise a problem, and True if the manifest is
    missing or damaged."""
    saved, problem, incomplete = None, "", False
    try:
        saved = SavedState(candidate)
        saved.verify(lambda files: files[world.rank :: world.ranks])
    except (UserError, OSError) as error:
        problem, incomplete = str(error), isinstance(error, IncompleteError)
    reports = [("", False)] * world.ranks
    dist.all_gather_object(reports, (problem, incomplete))
    problem, incomplete = next((pair for pair in reports if pair[0]), ("", False))
    return (None if problem else saved), problem, incomplete
