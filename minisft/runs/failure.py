"""How a run fails: every rank in bounded time, and one of them saying why.

When one rank fails, the others fail in its wake, with messages that help nobody. So each asks the store that all ranks
share who was first. The first one speaks, and the main rank keeps its reason in `status.json`, even if it sits in a
kernel that waits for the other and would never fail by itself (`listen`). A rank that hangs does not even fail: a timer
in each ends it after `parallel.timeout`.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from minisft.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_USAGE, NumericsError, UserError, exit_code
from minisft.runs.run_dir import RunDir
from minisft.training import parallel
from minisft.training.parallel import World

GRACE = 5  # seconds that the main rank has to fail by itself after another one has


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`. An error that a person can mend becomes one message on each host, however many processes
    run there."""
    try:
        check_launch()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    rank, local = parallel.launched_rank()[0], int(os.environ.get("LOCAL_RANK", "0"))
    try:
        return run()
    except Reported as failure:
        return failure.code
    except (UserError, NumericsError, OSError) as error:
        if local == 0 or isinstance(error, OSError):  # bad input is the same on all ranks, a bad disk is not
            say_error(error)
        return exit_code(error)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted before the first step; there is nothing to save", file=sys.stderr)
        return EXIT_INTERRUPTED


def check_launch() -> None:
    """Raise UserError if torchrun's environment variables are incomplete or not numbers."""
    remedy = "unset RANK to train in one process, or start with torchrun, which sets it"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name, "missing" if "RANK" in os.environ and not name.startswith("LOCAL") else "0")
        if value == "missing" or (name != "MASTER_ADDR" and not (value.isascii() and value.isdigit())):
            raise UserError(f"the environment variable {name} is {value[:40]!r}, expected a whole number; {remedy}"
                            if value != "missing" else f"RANK is set, but {name} is not; {remedy}")
    rank, ranks = parallel.launched_rank()
    if rank >= ranks:
        raise UserError(f"the environment variable RANK is {rank}, but there are {ranks} ranks (WORLD_SIZE); {remedy}")


class Reported(Exception):  # noqa: N818 (not an error by itself)
    """The run has failed, and the reason has been printed: here, or by the rank that failed first."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def say_error(error: Exception) -> None:
    """Print one message for a person."""
    rank, _ = parallel.launched_rank()
    print(f"error on rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr)


def listen(world: World, run_dir: RunDir | None) -> None:
    """Start a thread that ends the main rank, which holds `run_dir`, if another rank has failed and it does not
    notice."""
    if not run_dir or world.ranks == 1:
        return

    def hear() -> None:
        first = world.heard_failure()
        while run_dir.is_locked and not first:
            time.sleep(1)
            first = world.heard_failure()
        time.sleep(GRACE)
        if first and run_dir.is_locked:
            with suppress(OSError):
                run_dir.status("failed", exit_code=first["code"], error=first["text"])
            os._exit(first["code"])

    threading.Thread(target=hear, name="listener", daemon=True).start()


def fail(error: Exception, world: World | None, run_dir: RunDir | None) -> None:
    """Find out which rank failed first and record why. Raises Reported unless the error is this rank's own bug."""
    if isinstance(error, torch.OutOfMemoryError):
        error = UserError(f"{str(error).splitlines()[0]} To need less: parallel.activation_checkpointing = full, a "
                          "lower batch.micro_packs or data.seq_len, or see docs/memory.md")
    if isinstance(error, RuntimeError) and "deterministic implementation" in str(error):
        error = UserError(f"train.deterministic: {str(error).splitlines()[0]} Set it to false, or leave out what needs "
                          "this operation")
    rank, code = parallel.launched_rank()[0], exit_code(error)
    text = str(error) or type(error).__name__
    first: dict[str, Any] = world.report_failure(code, text) if world else {"rank": rank, "code": code, "text": text}
    if run_dir:
        with suppress(OSError, UserError):  # perhaps a full disk or a broken log is the cause
            run_dir.status("failed", exit_code=first["code"], error=first["text"])
    if not world:  # each rank fails by itself: `guarded` prints it
        return
    if first["rank"] != rank:
        raise Reported(code) from None
    if code != EXIT_BUG:
        say_error(error)
        raise Reported(code) from None


def watch(seconds: float) -> None:
    """End this process with the stacks of its threads unless it is called again within `seconds`."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # standard error
