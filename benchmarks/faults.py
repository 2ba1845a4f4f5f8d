"""Break a run in every way of docs/reliability.md, many times, and see what is left of it.

    python benchmarks/faults.py [--only WORD] [--kills N]

Each fault is a real one: processes are killed, stopped and signalled, disks fill up, bits are flipped. `survived` are
the runs that went on to their end, or, where going on would be wrong, stopped with the exit code and the words that a
person needs. `lost steps` is the most work that had to be done again. `bit-identical` counts the runs whose log and
final weights are those of a run that nothing happened to. The model is that of the tests; it takes about ten minutes on
two cores. Disks are small file systems in memory, which needs root; those rows are left out without it.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from oracles.tiny_llama import write_tiny_llama  # noqa: E402
from small_runs import assert_same, final_weights, launch, log, options, wait_for_step, workers  # noqa: E402

from minisft.training.checkpoint import checkpoints  # noqa: E402
from minisft.training.trainer import main as train  # noqa: E402

STEPS = 24
SETTINGS = {"train__max_steps": STEPS, "batch__packs": 3, "checkpoint__every": 2, "checkpoint__keep": 3}
PLANTED = TESTS / "planted.py"


@dataclass
class Row:
    """What became of one kind of fault."""

    fault: str
    injected: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)
    compared: int = 0
    identical: int = 0

    def __str__(self) -> str:
        identical = f"{self.identical} of {self.compared}" if self.compared else "-"
        return (f"{self.fault:<58}{self.injected:>9}{self.survived:>10}{max(self.lost, default='-'):>12}"
                f"{identical:>15}")


class Bench:
    """A folder with the base model, and runs in it: alone (a forked process) or under torchrun."""

    def __init__(self, folder: Path, *, kills: int):
        self.folder, self.kills, self.random = folder, kills, random.Random(0)
        self.base = write_tiny_llama(folder / "base")
        self._number = 0
        self._whole: dict = {}

    def new(self) -> Path:
        self._number += 1
        return self.folder / f"run-{self._number}"

    def start(self, folder: Path, **overrides) -> int:
        """The process of a run in `folder`; what it prints goes to `folder`/printed."""
        argv = options(self.base, folder, **{**SETTINGS, **overrides})
        child = os.fork()  # torch is loaded already, and has not computed anything in this process
        if child:
            return child
        with open(folder / "printed", "w") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        os._exit(train(argv))

    def run(self, folder: Path, **overrides) -> tuple[int, str]:
        """Exit code and output of a run that nothing happens to."""
        status = os.waitpid(self.start(folder, **overrides), 0)[1]
        return os.waitstatus_to_exitcode(status), (folder / "printed").read_text()

    def torchrun(self, folder: Path, *, plant: tuple = (), restarts: int = 0, ranks: int = 2,
                 **overrides) -> subprocess.Popen:
        program = (PLANTED, *plant) if plant else (TESTS.parent / "train.py",)
        return launch(self.base, folder, ranks=ranks, program=program, extra=["--max-restarts", str(restarts)],
                      **{**SETTINGS, **overrides})

    def whole(self, ranks: int = 1, steps: int = STEPS) -> tuple:
        """Log and final weights of the run that nothing happens to."""
        if (ranks, steps) not in self._whole:
            folder = self.new()
            if ranks == 1:
                assert self.run(folder, train__max_steps=steps)[0] == 0
            else:
                output = self.torchrun(folder, ranks=ranks, train__max_steps=steps).communicate()[0]
                assert (folder / "run/final").exists(), output
            self._whole[ranks, steps] = log(folder), final_weights(folder)
        return self._whole[ranks, steps]

    def wait(self, folder: Path, step: int) -> None:
        while not (folder / "run/metrics.jsonl").exists() or len(log(folder)) < step:
            time.sleep(0.005)

    def finished(self, row: Row, folder: Path, output: str, *, before: int | None = None, ranks: int = 1,
                 steps: int = STEPS, code: int = 0) -> None:
        """Count a run that went on to its end; `before`: the steps it had done when the fault came."""
        row.injected += before is not None
        row.survived += before is not None and code == 0 and (folder / "run/final").exists()
        went_on = re.findall(r"after step (\d+)", output)
        if before is not None:
            row.lost.append(max(0, before - int(went_on[-1] if went_on else 0)))
        row.compared += 1
        with contextlib.suppress(AssertionError):
            assert_same(folder, self.whole(ranks, steps))
            row.identical += 1


def soak(bench: Bench) -> Row:
    """One run, killed again and again."""
    row, folder, steps = Row("SIGKILL at random moments, one run (soak)"), bench.new(), 12 * bench.kills
    settings = {"train__max_steps": steps, "checkpoint__every": 3}
    while row.injected < bench.kills:
        done = len(log(folder)) if (folder / "run/metrics.jsonl").exists() else 0
        child = bench.start(folder, **settings)
        bench.wait(folder, min(done + 1, steps - 1))
        time.sleep(bench.random.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        row.injected += 1
        before = log(folder)[-1]["step"]
        newest = checkpoints(folder / "run/checkpoints")
        row.lost.append(before - int(newest[0].name[5:]) if newest else before)
        row.survived += 1
    code, output = bench.run(folder, **settings)
    if code:
        row.survived = 0
    bench.finished(row, folder, output, steps=steps)
    return row


def killed_in_a_save(bench: Bench) -> Row:
    row = Row("SIGKILL in the middle of a save")
    for _ in range(20):
        folder = bench.new()
        child = bench.start(folder)
        bench.wait(folder, bench.random.randint(2, 12))
        while not list((folder / "run/checkpoints").glob("*.tmp")):
            pass
        time.sleep(bench.random.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = len(log(folder))
        code, output = bench.run(folder)
        bench.finished(row, folder, output, before=before, code=code)
    return row


def asked_to_stop(bench: Bench) -> Row:
    row = Row("SIGTERM, SIGINT, SIGUSR1: saves, exit 75, goes on")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) * 2:
        folder = bench.new()
        child = bench.start(folder)
        bench.wait(folder, bench.random.randint(1, 16))
        os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        status = json.loads((folder / "run/status.json").read_text())
        before = len(log(folder))
        again, output = bench.run(folder)
        as_promised = code == 75 and status["state"] == "preempted" and f"after step {before}" in output
        bench.finished(row, folder, output, before=before, code=again or not as_promised)
    return row


def one_of_two(bench: Bench) -> Iterator[Row]:
    """Faults of one rank of two under torchrun, which starts both again."""
    plants = {"die": "a rank of two killed, restarted by torchrun",
              "raise": "a rank of two fails with a bug, restarted",
              "hang": "a rank of two hangs, ended by parallel.timeout, restarted"}
    for fault, name in plants.items():
        row = Row(name)
        for rank in (0, 1, 0, 1):
            folder, at = bench.new(), bench.random.randint(3, 20)
            process = bench.torchrun(folder, plant=(fault, rank, at), restarts=1, parallel__timeout=15)
            output = process.communicate()[0]
            bench.finished(row, folder, output, before=at - 1, ranks=2, code=process.returncode)
        yield row
    row = Row("SIGTERM to a rank of two or to torchrun: exit 75, goes on")
    for target in (0, 1, "torchrun"):
        folder = bench.new()
        process = bench.torchrun(folder)
        wait_for_step(folder, bench.random.randint(1, 10), process)
        os.kill(process.pid if target == "torchrun" else workers(process)[target], signal.SIGTERM)
        process.communicate()
        status, before = json.loads((folder / "run/status.json").read_text()), len(log(folder))
        process = bench.torchrun(folder)
        output = process.communicate()[0]
        bench.finished(row, folder, output, before=before, ranks=2,
                       code=process.returncode or (status["exit_code"], status["step"]) != (75, before))
    yield row
    row = Row("NaN in one rank's loss: the step is skipped on all")
    weights = []
    for rank in (0, 1):
        folder = bench.new()
        process = bench.torchrun(folder, plant=("nan", rank, 5))
        process.communicate()
        row.injected += 1
        row.survived += process.returncode == 0 and [r["step"] for r in log(folder) if r.get("skipped")] == [5]
        weights.append(final_weights(folder))
    row.compared = 1
    row.identical = int(all(weight.equal(weights[1][name]) for name, weight in weights[0].items()))
    yield row
    row = Row("another number of ranks: 2, then 1, then 3")
    folder, whole = bench.new(), bench.whole()[0]
    for ranks, steps in ((2, 8), (1, 16), (3, STEPS)):
        process = bench.torchrun(folder, ranks=ranks, train__max_steps=steps)
        process.communicate()
        row.injected += ranks != 2
        same = [(r["step"], r["tokens"], r["target_tokens"]) for r in log(folder)] == \
               [(r["step"], r["tokens"], r["target_tokens"]) for r in whole[:steps]]
        close = all(abs(a["loss"] / b["loss"] - 1) < 1e-3 for a, b in zip(log(folder), whole, strict=False))
        row.survived += ranks != 2 and process.returncode == 0 and same and close
        shutil.rmtree(folder / "run/final", ignore_errors=True)
    yield row


def damaged(bench: Bench) -> Iterator[Row]:
    """Faults of the files of the newest checkpoint: the one before it is taken."""
    stopped = bench.new()
    child = bench.start(stopped)
    bench.wait(stopped, 12)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = len(log(stopped))

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[bench.random.randrange(len(content))] ^= 1 << bench.random.randrange(8)
        file.write_bytes(content)

    def cut(file: Path) -> None:
        os.truncate(file, bench.random.randrange(file.stat().st_size))

    damages: list[tuple[str, Callable[[Path], None], int]] = [
        ("a flipped bit in a file of the newest checkpoint", flip, 6),
        ("a file of the newest checkpoint cut off", cut, 4),
        ("a file of the newest checkpoint missing", Path.unlink, 1)]
    for name, damage, times in damages:
        row = Row(name)
        for file in [file.name for file in checkpoints(stopped / "run/checkpoints")[0].iterdir()] * times:
            folder = bench.new()
            shutil.copytree(stopped, folder)
            newest = checkpoints(folder / "run/checkpoints")[0]
            damage(newest / file)
            code, output = bench.run(folder)
            named = f"passed over {newest / file}: " in output or "its save was not finished; " in output
            bench.finished(row, folder, output, before=before, code=code or not named)
        yield row


def refused(bench: Bench) -> Iterator[Row]:
    """What must not be done is refused in words, and nothing is touched."""
    row = Row("other data, length, seed, batch or mask on resume: exit 2")
    stopped = bench.new()
    child = bench.start(stopped)
    bench.wait(stopped, 6)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    other = bench.folder / "other.jsonl"
    other.write_text('{"prompt": "Say a word.", "completion": "Word."}\n' * 40)
    changes = ({"data__train": other}, {"data__seq_len": 300}, {"train__seed": 3}, {"batch__packs": 5},
               {"data__train_on": "all"}, {"data__template": "alpaca"})
    for change in changes:
        code, output = bench.run(stopped, **change)
        row.injected += 1
        row.survived += code == 2 and "--checkpoint.allow_change" in output
    yield row
    row = Row("a second run in the folder: exit 2, the first is not disturbed")
    for _ in range(2):
        folder = bench.new()
        child = bench.start(folder)
        bench.wait(folder, 3)
        second = bench.folder / "second"
        second.mkdir(exist_ok=True)
        code, output = bench.run(second, run__dir=folder / "run")
        first = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        bench.finished(row, folder, "", before=0, code=first or code != 2 or "in use by process" not in output)
    yield row
    row = Row("broken files of data or model: exit 2, naming the file")
    good = (TESTS / "oracles/conversations.jsonl").read_text(encoding="utf-8")
    broken = {"half.jsonl": good[: len(good) // 2].encode(), "array.json": ("[" + good.splitlines()[0] + ",").encode(),
              "latin1.jsonl": good.encode().replace("ş".encode(), b"\xfe"), "empty.jsonl": b"",
              "nan.jsonl": b'{"prompt": NaN, "completion": "x"}\n', "deep.jsonl": b"[" * 100_000 + b"\n",
              "long.jsonl": b'{"prompt": ' + b"1" * 5000 + b"}\n"}
    for name, content in broken.items():
        (bench.folder / name).write_bytes(content)
        code, output = bench.run(bench.new(), data__train=bench.folder / name)
        row.injected += 1
        row.survived += code == 2 and name in output and "Traceback" not in output
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        model = bench.folder / f"broken-{name}"
        shutil.copytree(bench.base, model)
        os.truncate(model / name, (model / name).stat().st_size // 2)
        code, output = bench.run(bench.new(), model__path=model)
        row.injected += 1
        row.survived += code == 2 and name in output and "Traceback" not in output
    yield row


@contextlib.contextmanager
def small_disk(folder: Path, size: int, *extra: str) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *extra)), "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def disks(bench: Bench) -> Iterator[Row]:
    """Disks that are full or cannot be written."""
    row, checkpoint = Row("a full disk at a save: exit 4, goes on when there is room"), 12 * 127_000
    for _ in range(3):
        folder = bench.new()
        with small_disk(folder / "run", 8 * checkpoint):
            child = bench.start(folder)
            bench.wait(folder, bench.random.randint(4, 14))
            ballast = folder / "run/ballast"
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said, before = (folder / "printed").read_text(), len(log(folder))
            ballast.unlink()
            again, output = bench.run(folder)
            as_promised = code == 4 and str(folder / "run") in said and "Traceback" not in said
            bench.finished(row, folder, output, before=before, code=again or not as_promised)
    yield row
    row = Row("a read-only or full run folder: exit 4 before the model is read")
    for size, extra in ((1 << 20, ("ro",)), (4096, ()), (checkpoint // 2, ())):
        folder = bench.new()
        with small_disk(folder / "run", size, *extra):
            code, output = bench.run(folder)
            row.injected += 1
            row.survived += code == 4 and str(folder / "run") in output and "step 0" not in output
    yield row


def hosts(bench: Bench) -> Row:
    """The tests of two hosts, as they stand."""
    row, command = Row("one of two hosts cut off or dead (tests/test_two_hosts.py)"), [sys.executable, "-m", "pytest"]
    output = subprocess.run([*command, "-m", "slow", TESTS / "test_two_hosts.py", "-k", "cut_off or dead"], text=True,
                            capture_output=True, cwd=TESTS.parent).stdout
    row.injected, row.survived = 3, int((re.findall(r"(\d+) passed", output) or [0])[0])
    row.compared, row.identical = 2, min(row.survived, 2)
    return row


def main() -> None:
    """Run the matrix and print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the functions of this name: soak, damaged, one_of_two, ...")
    parser.add_argument("--kills", type=int, default=30, help="kills of the soak")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'fault':<58}{'injected':>9}{'survived':>10}{'lost steps':>12}{'bit-identical':>15}", flush=True)
    total = Row("in all")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), kills=arguments.kills)
        needs_root = [disks, hosts] if os.geteuid() == 0 else []
        for part in (soak, killed_in_a_save, asked_to_stop, damaged, refused, *needs_root, one_of_two):
            rows = part(bench) if arguments.only in part.__name__ else ()
            for row in [rows] if isinstance(rows, Row) else rows:
                print(row, flush=True)
                total.injected, total.survived = total.injected + row.injected, total.survived + row.survived
                total.compared, total.identical = total.compared + row.compared, total.identical + row.identical
                total.lost += row.lost
    print(total)


if __name__ == "__main__":
    main()
