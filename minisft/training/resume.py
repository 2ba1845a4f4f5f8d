"""Which checkpoint a run goes on from.

`auto` takes the newest one that is intact and says which it passed over and why; a folder named by hand must be intact.
All ranks look, each at its share of the files, and all come to the same answer. Going on with other data, another
batch or another model would silently be another run, so it is refused with the differences.
"""

from pathlib import Path

import torch.distributed as dist

from minisft.errors import UserError
from minisft.training.checkpoint import SavedState, checkpoints
from minisft.training.parallel import World


def find(folder: Path, world: World, fingerprint: dict, *, wanted: str = "auto",
         allow_change: bool = False) -> SavedState | None:
    """The state to go on from in the checkpoints of run `folder`; None to start afresh.

    `wanted` is "auto", "never" or a checkpoint's folder. Raises UserError where that one is damaged, or where
    `fingerprint` differs from the saved one and `allow_change` is not given.
    """
    if wanted == "never":
        return None
    candidates = checkpoints(folder / "checkpoints") if wanted == "auto" else [Path(wanted)]
    for candidate in candidates:
        saved, problem = _intact(candidate, world)
        if saved is None:
            if wanted != "auto":
                raise UserError(f"checkpoint.resume: {problem}")
            _say(world, f"passed over {candidate}: {problem}")
            continue
        before = saved.progress["fingerprint"]
        changed = [f"{key}: was {before.get(key)!r}, is {fingerprint.get(key)!r}"
                   for key in sorted({*before, *fingerprint}) if before.get(key) != fingerprint.get(key)]
        if changed and not allow_change:
            raise UserError(f"{candidate}: the run was started with other settings, so its batches would not be the "
                            "same; go back to them, choose another run.dir, or pass --checkpoint.allow_change true:"
                            + "".join(f"\n  {line}" for line in changed))
        ranks = saved.manifest["ranks"]
        resharded = "" if ranks == world.ranks else (f"; saved by {ranks} ranks, now {world.ranks}: the same global "
                                                     "batches, but not bit-exact")
        _say(world, f"going on from {candidate}, after step {saved.step}{resharded}")
        return saved
    return None


def _intact(candidate: Path, world: World) -> tuple[SavedState | None, str]:
    """The state if every rank finds its share of the files intact, and otherwise the first problem."""
    saved, problem = None, ""
    try:
        saved = SavedState(candidate)
        saved.verify(lambda files: files[world.rank :: world.ranks])
    except (UserError, OSError) as error:
        problem = str(error)
    problems: list[str] = [""] * world.ranks
    dist.all_gather_object(problems, problem)
    first = next(filter(None, problems), "")
    return (None if first else saved), first


def _say(world: World, text: str) -> None:
    if world.leads:
        print(text, flush=True)
