"""Which checkpoint a run goes on from.

`auto` takes the newest one that is intact and says which it passed over and why; a folder named by hand must be intact.
Where checkpoints are there and all are damaged, a person has to look: to begin again would throw the run away. All
ranks look, each at its share of the files, and all come to the same answer. Going on with other data, another batch or
another model would silently be another run, so it is refused with the differences.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from minisft.errors import UserError
from minisft.training.checkpoint import IncompleteError, SavedState, checkpoints, leftovers
from minisft.training.parallel import World


def find(folder: Path, world: World, fingerprint: dict[str, Any], *, wanted: str = "auto",
         allow_change: bool = False) -> SavedState | None:
    """The state to go on from in the checkpoints of run `folder`; None to start afresh.

    `wanted` is "auto", "never" or a checkpoint's folder. Raises UserError where that one, or every one, is damaged, or
    where `fingerprint` differs from the saved one and `allow_change` is not given.
    """
    if wanted == "never":
        return None
    saved, passed_over = None, []
    if wanted == "auto":
        passed_over = [f"{path}: its save was not finished" for path in leftovers(folder / "checkpoints")]
        saved, damaged = _newest(checkpoints(folder / "checkpoints"), world)
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
    changed = _differences(saved.progress["fingerprint"], fingerprint)
    if changed and not allow_change:
        raise UserError(f"{saved.folder}: the run was started with other settings, so its batches would not be the "
                        "same; go back to them, choose another run.dir, or pass --checkpoint.allow_change true:"
                        + "".join(f"\n  {line}" for line in changed))
    if world.leads:
        ranks = saved.manifest["ranks"]
        resharded = "" if ranks == world.ranks else (f"; saved by {ranks} ranks, now {world.ranks}: the same global "
                                                     "batches, but not bit-exact")
        print(f"going on from {saved.folder}, after step {saved.step}{resharded}{skipped}", flush=True)
    return saved


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
