"""Exhibits against a trainer: one verdict each, and a column of the matrix."""

import math
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from silent.exhibits import open_exhibit
from silent.trainers import open_trainer
from silent.trainers.plain import Plain
from silent.world import CannotError, NotApplicableError, Trainer, Verdict, World


@contextmanager
def heard() -> Iterator[Callable[[], str]]:
    """What this process and those it starts write to standard output and error meanwhile; it is not shown."""
    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    flush()
    with tempfile.NamedTemporaryFile("ab") as file:
        kept = [os.dup(1), os.dup(2)]

        def text() -> str:
            flush()
            return Path(file.name).read_text(errors="replace")

        try:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)  # opened to append, so nobody writes over another
            yield text
        finally:
            flush()
            for descriptor, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, descriptor)
                os.close(saved)


def look(name: str, trainer: Trainer, world: World, *, debug: bool = False) -> Verdict:
    """The verdict of an exhibit. A wrong that the trainer has named in a message of its own is a warning."""
    exhibit, failure = open_exhibit(name), ""
    with heard() as text:
        try:
            verdict = exhibit.look(trainer, world)
        except CannotError as refusal:
            verdict = Verdict("cannot", str(refusal))
        except NotApplicableError as reason:
            verdict = Verdict("not applicable", str(reason))
        except Exception as error:
            failure = traceback.format_exc()
            verdict = Verdict("cannot", f"failed: {type(error).__name__}: {error}"[:300])
        said = text()
    if debug:
        print(said, failure, sep="\n", file=sys.stderr)
    warning = re.search(exhibit.WARNING, said, re.IGNORECASE) if hasattr(exhibit, "WARNING") else None
    if verdict.state == "wrong" and warning:
        line = next(line for line in said.splitlines() if re.search(exhibit.WARNING, line, re.IGNORECASE))
        return replace(verdict, state="warned", text=f"{verdict.text}. It says: {' '.join(line.split())[:200]}")
    return verdict


@cache
def opened(name: str) -> tuple[Trainer, World, tempfile.TemporaryDirectory]:
    """The trainer and the world of this process, and the folder that goes when the process ends."""
    folder = tempfile.TemporaryDirectory()
    with heard():  # libraries say much when they are imported
        return open_trainer(name), World(Path(folder.name)), folder


def examine(name: str, exhibit: str, planted: bool, debug: bool) -> dict:
    """One verdict as a dictionary, with the seconds it took."""
    trainer, world, _ = opened(name)
    if planted:
        trainer = Plain(open_exhibit(exhibit).FAULT)
    begun = time.monotonic()
    verdict = look(exhibit, trainer, world, debug=debug)
    size = verdict.size if verdict.size is None or math.isfinite(verdict.size) else "not finite"
    return asdict(verdict) | {"text": verdict.text.replace(f"{world.folder}/", ""), "size": size,
                              "seconds": round(time.monotonic() - begun, 2)}


def column(name: str, exhibits: list[str], tell: Callable[[str, dict], None], *, planted: bool = False,
           debug: bool = False, jobs: int = 0) -> dict:
    """One trainer's verdicts; `tell` is called with each. `jobs` processes share the work; 0: as the trainer says."""
    started, verdicts = time.monotonic(), {}
    trainer = opened(name)[0]
    jobs = jobs or trainer.jobs
    if jobs == 1:
        for exhibit in exhibits:
            verdicts[exhibit] = examine(name, exhibit, planted, debug)
            tell(exhibit, verdicts[exhibit])
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            running = {exhibit: pool.submit(examine, name, exhibit, planted, debug) for exhibit in exhibits}
            for exhibit, verdict in running.items():
                verdicts[exhibit] = verdict.result()
                tell(exhibit, verdicts[exhibit])
    return {"about": "each exhibit with its own fault planted" if planted else trainer.about,
            "versions": trainer.versions, "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "machine": f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores",
            "seconds": round(time.monotonic() - started, 1), "exhibits": verdicts}
