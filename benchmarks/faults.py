"""Break a run in every way of docs/reliability.md, many times, and see what is left of it.

    python benchmarks/faults.py [--only WORD ...] [--kills N]

Every fault is real: processes are killed, stopped and signalled, disks fill up, bits are flipped. `survived` counts the
runs that finished, or that rightly stopped with the exit code and the message a person needs. `lost steps` is the most
work that had to be repeated. `bit-identical` counts the runs whose log and final weights equal those of an undisturbed
run. Anything unexpected goes to stderr. The model is that of the tests; all rows take about ten minutes on two cores.
Disks are small file systems in memory, which need root; without root those rows are left out.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from oracles.tiny_llama import write_tiny_llama  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from small_runs import (  # noqa: E402
    assert_same,
    final_weights,
    launch,
    log,
    options,
    room_of_files,
    wait_for_step,
    workers,
)

from minisft import streams  # noqa: E402
from minisft.__main__ import main as command  # noqa: E402
from minisft.runs.lifecycle import main as train  # noqa: E402
from minisft.training import loop  # noqa: E402
from minisft.training.checkpoint import saved_checkpoints  # noqa: E402

STEPS = 24
SETTINGS = {"train__max_steps": STEPS, "batch__packs": 3, "checkpoint__every": 2, "checkpoint__keep": 3}
PLANTED = TESTS / "planted.py"
CONVERSATIONS = TESTS / "oracles/conversations.jsonl"


@dataclass
class Row:
    """The results of one kind of fault."""

    fault: str
    injected: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)
    compared: int = 0
    identical: int = 0

    def count(self, what: object, as_promised: object, output: object = "") -> None:
        """Count one fault, `what`; report it on stderr if it did not end `as_promised`."""
        self.injected += 1
        self.survived += bool(as_promised)
        if not as_promised:
            print(f"{self.fault}: {what}: not as promised: {str(output)[-1500:]}", file=sys.stderr)

    def __str__(self) -> str:
        identical = f"{self.identical} of {self.compared}" if self.compared else "-"
        return (f"{self.fault:<58}{self.injected:>9}{self.survived:>10}{max(self.lost, default='-'):>12}"
                f"{identical:>15}")


class Bench:
    """A folder with the base model and runs, each alone (a forked process) or under torchrun."""

    def __init__(self, folder: Path, *, kills: int):
        self.folder, self.kills, self.random = folder, kills, random.Random(0)
        self.base = write_tiny_llama(folder / "base")
        self._number = 0
        self._whole: dict = {}
        self._stopped: dict = {}
        self.patience = 120  # seconds

    def new(self) -> Path:
        self._number += 1
        return self.folder / f"run-{self._number}"

    def start(self, folder: Path, **overrides) -> int:
        """Start a run in `folder`, which prints to `folder`/printed; returns its process."""
        argv = options(self.base, folder, **{**SETTINGS, **overrides})
        return self.fork(folder, lambda: train(argv))

    def fork(self, folder: Path, work: Callable[[], int]) -> int:
        """Start `work` in a process with at most `patience` seconds and 4 GiB; returns the process."""
        folder.mkdir(parents=True, exist_ok=True)
        child = os.fork()  # torch is loaded already, and has not computed anything in this process
        if child:
            return child
        code = 1
        with contextlib.suppress(BaseException):
            signal.alarm(self.patience)
            resource.setrlimit(resource.RLIMIT_DATA, (1 << 32, 1 << 32))
            with open(folder / "printed", "w") as printed:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
            try:
                code = work()
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
        os._exit(code)

    def ended(self, folder: Path, child: int) -> tuple[int, str]:
        """Wait for a process; returns its exit code and output."""
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, (folder / "printed").read_text(errors="replace")

    def signalled(self, child: int, number: int) -> int:
        """Send a signal and wait for the process to end; returns its exit code."""
        os.kill(child, number)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def run(self, folder: Path, **overrides) -> tuple[int, str]:
        """Run undisturbed; returns exit code and output."""
        return self.ended(folder, self.start(folder, **overrides))

    def call(self, *argv: object, folder: Path, plant: Callable[[], object] = lambda: None,
             main: Callable[[list[str]], int] = command) -> tuple[int, str]:
        """Run a command in `folder`, after `plant` in its process; returns exit code and output."""
        def work() -> int:
            os.chdir(folder)
            plant()
            return main([str(word) for word in argv])

        return self.ended(folder, self.fork(folder, work))

    def stopped(self, steps: int) -> Path:
        """Return a run that stopped after `steps` and can resume: a copy that the caller may damage."""
        if steps not in self._stopped:
            self._stopped[steps] = folder = self.new()
            assert self.run(folder, train__max_steps=steps)[0] == 0
            shutil.rmtree(folder / "run/final")
        return Path(shutil.copytree(self._stopped[steps], self.new()))

    def torchrun(self, folder: Path, *, plant: tuple = (), restarts: int = 0, ranks: int = 2,
                 **overrides) -> subprocess.Popen:
        program = (PLANTED, *plant) if plant else (TESTS.parent / "train.py",)
        return launch(self.base, folder, ranks=ranks, program=program, extra=["--max-restarts", str(restarts)],
                      **{**SETTINGS, **overrides})

    def whole(self, ranks: int = 1, steps: int = STEPS) -> tuple:
        """Return the log and the final weights of the undisturbed run."""
        if (ranks, steps) not in self._whole:
            folder = self.new()
            if ranks == 1:
                assert self.run(folder, train__max_steps=steps)[0] == 0
            else:
                output = self.torchrun(folder, ranks=ranks, train__max_steps=steps).communicate()[0]
                assert (folder / "run/final").exists(), output
            self._whole[ranks, steps] = log(folder), final_weights(folder)
        return self._whole[ranks, steps]

    def flip(self, file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        file.write_bytes(content)

    def cut(self, file: Path) -> None:
        os.truncate(file, self.random.randrange(file.stat().st_size))

    def wait(self, folder: Path, step: int) -> None:
        while not (folder / "run/metrics.jsonl").exists() or len(log(folder)) < step:
            time.sleep(0.005)

    def finished(self, row: Row, folder: Path, output: str, *, before: int | None = None, ranks: int = 1,
                 steps: int = STEPS, code: int = 0) -> None:
        """Count a run that finished; `before`: the steps it had done when the fault came."""
        if before is not None:
            row.count(folder.name, code == 0 and (folder / "run/final").exists(), output)
        went_on = re.findall(r"after step (\d+)", output)
        if before is not None:
            row.lost.append(max(0, before - int(went_on[-1] if went_on else 0)))
        row.compared += 1
        with contextlib.suppress(AssertionError, OSError):
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
        bench.signalled(child, signal.SIGKILL)
        row.injected += 1
        before = log(folder)[-1]["step"]
        newest = saved_checkpoints(folder / "run/checkpoints")
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
        bench.signalled(child, signal.SIGKILL)
        before = len(log(folder))
        code, output = bench.run(folder)
        bench.finished(row, folder, output, before=before, code=code)
    return row


def asked_to_stop(bench: Bench) -> Row:
    row = Row("SIGTERM, SIGINT, SIGUSR1: saves, exit 75, resumes")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) * 2:
        folder = bench.new()
        child = bench.start(folder)
        bench.wait(folder, bench.random.randint(1, 16))
        code = bench.signalled(child, number)
        status = json.loads((folder / "run/status.json").read_text())
        before = len(log(folder))
        again, output = bench.run(folder)
        as_promised = code == 75 and status["state"] == "preempted" and f"after step {before}" in output
        bench.finished(row, folder, output, before=before, code=again or not as_promised)
    return row


def one_of_two(bench: Bench) -> Iterator[Row]:
    """Break one rank of two under torchrun, which starts both again."""
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
    row = Row("SIGTERM to a rank of two or to torchrun: 75, resumes")
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
        row.count(rank, process.returncode == 0 and [r["step"] for r in log(folder) if r.get("skipped")] == [5])
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
    """Damage files of the newest checkpoint: the run resumes from the one before."""
    stopped = bench.new()
    child = bench.start(stopped)
    bench.wait(stopped, 12)
    bench.signalled(child, signal.SIGKILL)
    before = len(log(stopped))
    damages: list[tuple[str, Callable[[Path], None], int]] = [
        ("a flipped bit in a file of the newest checkpoint", bench.flip, 6),
        ("a file of the newest checkpoint cut off", bench.cut, 4),
        ("a file of the newest checkpoint missing", Path.unlink, 1)]
    for name, damage, times in damages:
        row = Row(name)
        for file in [file.name for file in saved_checkpoints(stopped / "run/checkpoints")[0].iterdir()] * times:
            folder = bench.new()
            shutil.copytree(stopped, folder)
            newest = saved_checkpoints(folder / "run/checkpoints")[0]
            damage(newest / file)
            code, output = bench.run(folder)
            named = f"passed over {newest / file}: " in output or "its save was not finished; " in output
            bench.finished(row, folder, output, before=before, code=code or not named)
        yield row


def refused(bench: Bench) -> Iterator[Row]:
    """Ask for what must not be done: it is refused with a reason, and nothing changes."""
    row = Row("other data, length, seed, batch or mask on resume: exit 2")
    stopped = bench.new()
    child = bench.start(stopped)
    bench.wait(stopped, 6)
    bench.signalled(child, signal.SIGTERM)
    other = bench.folder / "other.jsonl"
    other.write_text('{"prompt": "Say a word.", "completion": "Word."}\n' * 40)
    changes = ({"data__train": other}, {"data__seq_len": 300}, {"train__seed": 3}, {"batch__packs": 5},
               {"data__train_on": "all"}, {"data__template": "alpaca"})
    for change in changes:
        code, output = bench.run(stopped, **change)
        row.count(change, code == 2 and "--checkpoint.allow_change" in output, output)
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
        row.count(name, code == 2 and name in output and "Traceback" not in output, output)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        model = bench.folder / f"broken-{name}"
        shutil.copytree(bench.base, model)
        os.truncate(model / name, (model / name).stat().st_size // 2)
        code, output = bench.run(bench.new(), model__path=model)
        row.count(name, code == 2 and name in output and "Traceback" not in output, output)
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
    """Use disks that are full or read-only."""
    row, checkpoint = Row("a full disk at a save: exit 4, resumes when there is room"), 12 * 127_000
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
            row.count(size, code == 4 and str(folder / "run") in output and "step 0" not in output, output)
    yield row


def hosts(bench: Bench) -> Row:
    """Run the tests of two hosts."""
    row, command = Row("one of two hosts cut off or dead (tests/test_two_hosts.py)"), [sys.executable, "-m", "pytest"]
    output = subprocess.run([*command, "-m", "slow", TESTS / "test_two_hosts.py", "-k", "cut_off or dead"], text=True,
                            capture_output=True, cwd=TESTS.parent).stdout
    row.injected, row.survived = 3, int((re.findall(r"(\d+) passed", output) or [0])[0])
    row.compared, row.identical = 2, min(row.survived, 2)
    return row


def stores(bench: Bench) -> Iterator[Row]:
    """Damage the tokenised data: they are rebuilt from their file."""
    made, steps = bench.new(), 3
    assert bench.run(made, train__max_steps=steps)[0] == 0
    shutil.rmtree(made / "run")
    (store,) = (folder.name for folder in (made / "cache").iterdir() if folder.is_dir())
    files = sorted(file.name for file in (made / "cache" / store).iterdir())

    def fill(byte: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / "trained.bin").write_bytes(byte * (folder / "trained.bin").stat().st_size)

    def swap(one: str, other: str) -> Callable[[Path], object]:
        def exchange(folder: Path) -> None:
            for old, new in ((one, "aside"), (other, one), ("aside", other)):
                os.rename(folder / old, folder / new)
        return exchange

    def each(damage: Callable[[Path], object], names: list[str]) -> list[Callable[[Path], object]]:
        return [lambda folder, name=name: damage(folder / name) for name in names]

    kinds = {
        "a flipped bit in a file of the store: made again": each(bench.flip, [*files, "tokens.bin", "trained.bin"]),
        "a file of the store cut off or missing: made again": each(bench.cut, files) + each(Path.unlink, files),
        "a mask of ones or zeros, exchanged files: made again": [
            fill(b"\1"), fill(b"\0"), swap("hashes.npy", "loose.npy"), swap("targets.npy", "turns.npy"),
            swap("lines.npy", "largest.npy"), swap("tokens.bin", "trained.bin")]}
    for name, damages in kinds.items():
        row = Row(name)
        for damage in damages:
            folder = Path(shutil.copytree(made, bench.new()))
            damage(folder / "cache" / store)
            code, output = bench.run(folder, train__max_steps=steps)
            said = f"{store}: damaged (" in output and "it is made again from its file" in output
            bench.finished(row, folder, output, before=0, steps=steps, code=code or not said)
        yield row
    row = Row("a flipped bit in a file of the store: prepare --verify")
    for name in files:
        folder = Path(shutil.copytree(made, bench.new()))
        bench.flip(folder / "cache" / store / name)
        code, output = bench.call("prepare", *options(bench.base, folder), "--verify", folder=folder)
        row.count(name, code == 0 and "damaged (" in output and "verified 32 documents of 1 file" in output, output)
    yield row


def tokenizers(bench: Bench) -> Row:
    row, steps = Row("tokenizer.json changed during the run: the first is exported"), 10
    first = (bench.base / "tokenizer.json").read_bytes()
    other = first.replace(b'"a":', b'"\\u0001":', 1)
    for change in (lambda file: file.write_bytes(other), lambda file: file.write_bytes(b""), bench.cut, Path.unlink):
        folder = bench.new()
        model = Path(shutil.copytree(bench.base, bench.new()))
        child = bench.start(folder, model__path=model, train__max_steps=steps)
        bench.wait(folder, 2)
        change(model / "tokenizer.json")
        code, output = bench.ended(folder, child)
        exported = folder / "run/final/tokenizer.json"
        bench.finished(row, folder, output, before=0, steps=steps,
                       code=code or not exported.exists() or exported.read_bytes() != first)
    return row


def not_finite(bench: Bench) -> Row:
    row = Row("NaN or infinity in a tensor of each kind: exit 3")
    tensors = load_file(bench.base / "model.safetensors")
    model = Path(shutil.copytree(bench.base, bench.new()))
    for name in (name for name in tensors if "layers.0" not in name):
        for value in ("nan", "inf"):
            changed = {**tensors, name: tensors[name].clone()}
            changed[name].view(-1)[bench.random.randrange(changed[name].numel())] = float(value)
            save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
            folder = bench.new()
            code, output = bench.run(folder, model__path=model, train__max_steps=2)
            state = json.loads((folder / "run/status.json").read_text())
            row.count((name, value), code == state["exit_code"] == 3 and name in output and "not finite" in output
                      and "Traceback" not in output and not (folder / "run/final").exists(), output)
    return row


def settings(bench: Bench) -> Row:
    row = Row("a setting changed on resume: reported, recorded by step")
    for key, was, now in (
            ("optim.lr", 1e-3, 1e-4), ("optim.weight_decay", 0.0, 0.1), ("optim.clip_norm", 1.0, 0.5),
            ("optim.schedule", "constant", "cosine"), ("optim.label_smoothing", 0.0, 0.1), ("optim.z_loss", 0.0, 1e-4),
            ("optim.eps", 1e-8, 1e-6), ("checkpoint.keep", 3, 2), ("train.max_skipped", 10, 3)):
        folder = bench.stopped(4)
        code, output = bench.run(folder, train__max_steps=6, **{key.replace(".", "__"): now})
        record = folder / "run/final/training.json"
        history = json.loads(record.read_text())["history"] if code == 0 and record.exists() else []
        recorded = {tuple(change.values()) for change in history}
        row.count((key, recorded), code == 0 and recorded == {(5, key, was, now), (5, "train.max_steps", 4, 6)}
                  and f"\n{key}: was {json.dumps(was)}, is {json.dumps(now)} from step 5\n" in output, output)
    return row


def logs(bench: Bench) -> Iterator[Row]:
    """Damage the files beside the checkpoints of a run that resumes: cut off, foreign, not text."""
    row, steps = Row("a log cut short: reported; the weights are the same"), 9
    for left in (0, 1, 3, 5, 0.5, 0.7):
        folder = bench.stopped(6)
        file = folder / "run/metrics.jsonl"
        if isinstance(left, float):  # in the middle of a line
            os.truncate(file, int(left * file.stat().st_size))
            kept = file.read_bytes().count(b"\n")
        else:
            file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:left]))
            kept = left
        code, output = bench.run(folder, train__max_steps=steps)
        said = f"{file}: has {kept} of the 6 steps so far; the others are lost from the log" in output
        row.count(left, code == 0 and said and (folder / "run/final").exists(), output)
        row.lost.append(0)
        row.compared += 1
        if (folder / "run/final").exists():
            row.identical += all(weight.equal(final_weights(folder)[name])
                                 for name, weight in bench.whole(steps=steps)[1].items())
    yield row
    row = Row("foreign lines in metrics.jsonl: exit 2 with the line")
    for line in (b"hello", b"", b"{}", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"kind": "train", "step": "7"}',
                 b'{"kind": "train", "step": 7}', b'{"kind": "x", "step": NaN}', b'{"kind": "x"}',
                 b'{"kind": "eval", "step": 1, "name": 3, "target_tokens": 1}'):
        folder = bench.stopped(6)
        file = folder / "run/metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(before := b"".join([*lines[:3], line + b"\n", *lines[3:]]))
        code, output = bench.run(folder, train__max_steps=steps)
        row.count(line[:40], code == 2 and f"{file}:4: not a metrics record (" in output
                  and "Traceback" not in output and file.read_bytes() == before, output)
    yield row
    row = Row("config.toml, data.json, ... are not text: the run resumes")
    for name in ("config.toml", "data.json", "environment.json", "status.json"):
        for content in (b"\xff\xfe", b"", b"\0" * 4096):
            folder = bench.stopped(6)
            (folder / "run" / name).write_bytes(content)
            code, output = bench.run(folder, train__max_steps=steps)
            bench.finished(row, folder, output, before=6, steps=steps, code=code)
    yield row


def exports(bench: Bench) -> Row:
    """Make the export fail after the check at the start; the same command then only exports."""
    row, steps = Row("an export that fails: exit 4, again without training"), 8

    def trained_again(*_):
        raise AssertionError("trained again")

    def folder_with_a_file(place: Path) -> None:
        place.mkdir()
        (place / "x").touch()

    for name, block in (("final.tmp", Path.touch), ("final.tmp", lambda place: place.symlink_to("/nowhere/x")),
                        ("final", Path.touch), ("final", folder_with_a_file)):
        folder = bench.new()
        place = folder / "run" / name
        child = bench.start(folder, train__max_steps=steps, checkpoint__every=0)
        bench.wait(folder, 2)
        block(place)
        code, output = bench.ended(folder, child)
        status = json.loads((folder / "run/status.json").read_text())
        as_promised = (code, status["state"], status["exit_code"], status["step"]) == (4, "failed", 4, steps) and (
            str(folder / "run/final") in output and "Traceback" not in output)
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        argv = options(bench.base, folder, **{**SETTINGS, "train__max_steps": steps, "checkpoint__every": 0})
        code, again = bench.call(*argv, folder=folder, main=train,
                                 plant=lambda: setattr(loop, "batch_loss", trained_again))
        bench.finished(row, folder, again, before=steps, steps=steps, code=code or not as_promised)
    return row


def broken_pipe() -> int:
    """Return the write end of a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def streams_of_output(bench: Bench) -> Iterator[Row]:
    """Remove the reader of the output, or fill its disk."""
    row, steps = Row("output closed, full or without a reader: the run continues"), 3

    def redirected(*numbers: int, to: Callable[[], int]) -> None:
        for number in numbers:
            os.dup2(to(), number)
            stream = open(number, "w", closefd=False)  # noqa: SIM115 (stays open)
            setattr(sys, ("stdout", "stderr")[number - 1], stream)

    def as_train_py(argv: list[str]) -> int:
        streams.secure("stdout", "stderr")
        return train(argv)

    def full() -> int:
        return os.open("/dev/full", os.O_WRONLY)

    forms = [(numbers, to) for numbers in ((1,), (2,), (1, 2)) for to in (full, broken_pipe)]
    for numbers, to in forms:
        folder = bench.new()
        argv = options(bench.base, folder, **{**SETTINGS, "train__max_steps": steps})
        code, output = bench.call(*argv, folder=folder, main=as_train_py,
                                  plant=lambda numbers=numbers, to=to: redirected(*numbers, to=to))
        bench.finished(row, folder, output, before=0, steps=steps, code=code)
    for shell in ("{} >&- 2>&- <&-", "{} 2>&1 | head -1"):
        folder = bench.new()
        argv = options(bench.base, folder, **{**SETTINGS, "train__max_steps": steps})
        line = shell.format(" ".join(f"'{word}'" for word in (sys.executable, TESTS.parent / "train.py", *argv)))
        code = subprocess.run(["bash", "-o", "pipefail", "-c", line], stdout=subprocess.DEVNULL).returncode
        bench.finished(row, folder, "", before=0, steps=steps, code=code)
    yield row
    row, folder = Row("commands without a reader: exit 0; on a full disk: exit 4"), bench.new()
    for verb in (("prepare",), ("show",), ("plan", "--gpus", "1")):
        for to, expected in ((full, 4), (broken_pipe, 0)):
            argv = [verb[0], *options(bench.base, folder, train__precision="bf16"), *verb[1:]]
            code, output = bench.call(*argv, folder=folder, plant=lambda to=to: redirected(1, to=to))
            row.count((verb[0], expected), code == expected and "Traceback" not in output
                      and output.count("error: ") == (expected != 0), output)
    yield row
    row = Row("a terminal that closes (SIGHUP): saves, exit 75, resumes")
    for _ in range(3):
        folder = bench.new()
        argv = options(bench.base, folder, **SETTINGS)
        child = bench.fork(folder, lambda argv=argv: redirected(1, 2, to=broken_pipe) or as_train_py(argv))
        bench.wait(folder, bench.random.randint(1, 16))
        code = bench.signalled(child, signal.SIGHUP)
        before = len(log(folder))
        again, output = bench.run(folder)
        bench.finished(row, folder, output, before=before,
                       code=again or code != 75 or f"after step {before}" not in output)
    yield row


def contents(room: Path) -> dict:
    """Return digests of the files of a folder, except of printed output."""
    return {file: hashlib.sha256(file.read_bytes()).digest() for file in room.rglob("*")
            if file.is_file() and not file.is_symlink() and file.name not in ("printed", ".lock")}


def outputs(bench: Bench) -> Iterator[Row]:
    """Name outputs that would overwrite an input, or that are not files."""
    row, room = Row("an output path is an input: exit 2, no file changes"), bench.new()
    code, output = bench.ended(room, bench.fork(room, lambda: int(room_of_files(bench.base, room) is None)))
    assert code == 0, output
    of_recipes = ("data.jsonl", "general.jsonl", "recipe.toml", "model/config.json", "model/tokenizer.json",
                  "cache/*/tokens.bin")
    of_runs = ("run/config.toml", "run/metrics.jsonl", "run/status.json", "run/data.json",
               "run/final/model.safetensors")
    commands = {"prepare recipe.toml --dump": of_recipes, "prepare recipe.toml --json": of_recipes,
                "show recipe.toml --html": of_recipes, "plan recipe.toml --gpus 1 --json": of_recipes,
                "report run --out": of_runs}
    link = room / "link"
    for line, patterns in commands.items():
        for file in (next(room.glob(pattern)) for pattern in patterns):
            link.unlink(missing_ok=True)
            link.symlink_to(file)
            for output_name, said in ((file.relative_to(room), "this command reads that file and would overwrite it"),
                                      (link, "is a link; name the file that it leads to")):
                before = contents(room)
                code, output = bench.call(*line.split(), output_name, folder=room)
                row.count((line, output_name), code == 2 and said in output and contents(room) == before, output)
    for target in ("model", "data.jsonl", "run", ".", "model/config.json"):
        before = contents(room)
        code, output = bench.call("convert", "model", target, folder=room)
        row.count(("convert", target), code == 2 and "error: " in output and contents(room) == before, output)
    yield row
    row = Row("an output path is a device, a pipe or a folder: exit 2")
    os.mkfifo(room / "pipe")
    for line in commands:
        for name, said in (("/dev/null", "is a device"), ("pipe", "is a device, a pipe"), ("model", "is a folder")):
            code, output = bench.call(*line.split(), name, folder=room)
            row.count((line, name), code == 2 and f"{name}: {said}" in output and "Traceback" not in output, output)
    yield row


def no_files(bench: Bench) -> Iterator[Row]:
    """Name inputs that are not files, or that have no end."""
    row = Row("pipes, devices, endless files as input: exit 2 in 20 seconds")

    def endless(place: Path) -> None:
        place.touch()
        os.truncate(place, 1 << 40)

    kinds: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo, "zero": lambda place: place.symlink_to("/dev/zero"), "sparse": endless,
        "random": lambda place: place.symlink_to("/dev/urandom"), "folder": Path.mkdir}

    def tried(what: str, folder: Path, **overrides) -> None:
        code, output = bench.run(folder, train__max_steps=1, **overrides)
        row.count(what, code == 2 and "error: " in output and "Traceback" not in output
                  and not (folder / "run/final").exists(), f"{code} {output}")

    patience, bench.patience = bench.patience, 20

    for kind, make in kinds.items():
        make(data := bench.folder / f"{kind}.jsonl")
        tried(f"data, {kind}", bench.new(), data__train=data)
        make(templates := bench.folder / f"{kind}.toml")
        tried(f"templates, {kind}", bench.new(), data__templates=templates)
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
            model = Path(shutil.copytree(bench.base, bench.new()))
            (model / name).unlink(missing_ok=True)
            make(model / name)
            tried(f"{name}, {kind}", bench.new(), model__path=model)
    yield row
    row = Row("bombs as data, settings or templates: exit 2 in 20 seconds")
    blank = gzip.compress(b" " * (256 << 20), 9)
    for name, content in (
            ("blanks.jsonl.gz", blank), ("lines.jsonl.gz", gzip.compress(b"\n" * (64 << 20), 9)),
            ("zeros.jsonl.gz", gzip.compress(bytes(64 << 20), 9)), ("twice.jsonl.gz", gzip.compress(blank)),
            ("cut.jsonl.gz", gzip.compress(CONVERSATIONS.read_bytes())[:-20]),
            ("record.json.gz", gzip.compress(b'[{"text": "' + b"a" * (300 << 20), 9)),
            ("deep.json", b'{"messages": ' + b"[" * 1_000_000), ("digits.json", b"[" + b"9" * 1_000_000)):
        (bench.folder / name).write_bytes(content)
        tried(name, bench.new(), data__train=bench.folder / name)
    for name, content in (("deep.toml", b"a = " + b"[" * 100_000), ("letters.toml", b"a" * (32 << 20))):
        (bench.folder / name).write_bytes(content)
        tried(name, bench.new(), data__templates=bench.folder / name)
    config = json.loads((bench.base / "config.json").read_text())
    for key, value in (("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("hidden_size", 10**9),
                       ("intermediate_size", 10**10), ("num_attention_heads", 10**9), ("head_dim", 10**9)):
        model = Path(shutil.copytree(bench.base, bench.new()))
        (model / "config.json").write_text(json.dumps({**config, key: value}))
        tried(f"{key} = {value}", bench.new(), model__path=model)
    bench.patience = patience
    yield row


def fields_of_records(bench: Bench) -> Iterator[Row]:
    """Give one of three records an extra field; `minisft prepare --json` reports the result."""
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    folder = bench.new()

    def prepared(record: dict) -> tuple[int, str, dict]:
        folder.mkdir(exist_ok=True)
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (talk, record, talk)))
        argv = options(bench.base, folder, data__train=folder / "data.jsonl", data__template="llama3.1")
        code, output = bench.call("prepare", *argv, "--json", folder / "report.json", folder=folder)
        report = json.loads((folder / "report.json").read_text()) if code == 0 else {}
        (folder / "report.json").unlink(missing_ok=True)
        return code, output, report

    row = Row("a field that changes the meaning: the record is left out")
    for name in ("chosen", "rejected", "rejected_response", "preferred_output", "image", "images", "image_url", "video",
                 "videos", "audio", "audios", "input_audio", "reasoning", "reasoning_content", "thinking", "thoughts",
                 "mask", "train_detail", "history", "weight", "train", "label"):
        value = 0 if name in ("weight", "train", "label") else ["x"]
        code, output, report = prepared({**talk, name: value})
        reason = "marked as not trained" if name in ("weight", "train") else name
        row.count(name, code == 0 and report["documents"] == 2 and reason in output, output)
    yield row
    row = Row("an unknown field: counted by name, and harmless")
    for name in ("topic", "source", "lang", "\x1b[2J", "a\nb", "`x`", "<b>", "y" * 5000):
        code, output, report = prepared({**talk, name: 1})
        shown = name if name.isidentifier() and len(name) < 60 else ascii(name)[1:7]
        row.count(repr(name[:9]), code == 0 and report["documents"] == 3 and "fields that nothing reads" in output
                  and shown in output and "\x1b" not in output and "y" * 100 not in output, output)
    yield row
    row = Row("a field that is honoured: system texts, tools")
    for name, value in (("system", "Be brief."), ("system_prompt", "Be brief."), ("system_message", "Be brief."),
                        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}])):
        plain = prepared(talk)[2]
        code, output, report = prepared({**talk, name: value})
        row.count(name, code == 0 and report["documents"] == 3 and "nothing reads" not in output
                  and report["tokens"] > plain["tokens"], output)
    yield row


def names_of_others(bench: Bench) -> Row:
    row = Row("other programs' names of keys: exit 2 with ours")
    known = """
        learning_rate optim.lr, num_train_epochs train.epochs, max_seq_length data.seq_len, bf16 train.precision,
        per_device_train_batch_size batch.micro_packs, gradient_accumulation_steps batch.packs, lora_r lora.rank,
        lora_alpha lora.alpha, lora_target_modules lora.targets, output_dir run.dir, max_grad_norm optim.clip_norm,
        warmup_ratio optim.warmup_steps, lr_scheduler_type optim.schedule, save_steps checkpoint.every,
        save_total_limit checkpoint.keep, model_name_or_path model.path, load_in_4bit lora.base,
        gradient_checkpointing parallel.activation_checkpointing"""
    for line in known.split(","):
        theirs, ours = line.split()
        folder = bench.new()
        code, output = bench.call(*options(bench.base, folder), f"--{theirs}", "1", folder=folder, main=train)
        in_recipe = folder / "theirs.toml"
        in_recipe.write_text(f"[train]\n{theirs} = 1\n")
        again, said = bench.call(in_recipe, folder=folder, main=train)
        row.count(theirs, code == again == 2 and "(here: " in output and ours in output and ours in said
                  and not (folder / "run").exists(), output + said)
    return row


def variables(bench: Bench) -> Row:
    row = Row("invalid environment variables of torchrun: exit 2, named")
    whole = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for name, value in (("RANK", "abc"), ("RANK", "-1"), ("RANK", ""), ("RANK", "1"), ("RANK", "٣"), ("RANK", "1e3"),
                        ("WORLD_SIZE", "two"), ("WORLD_SIZE", None), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "x"),
                        ("MASTER_PORT", "x"), ("MASTER_ADDR", None)):
        chosen = {key: text for key, text in {**whole, name: value}.items() if text is not None}
        folder = bench.new()
        code, output = bench.call(*options(bench.base, folder), folder=folder, main=train,
                                  plant=lambda chosen=chosen: os.environ.update(chosen))
        row.count((name, value), code == 2 and name in output and "error: " in output and "Traceback" not in output
                  and not (folder / "run").exists(), output)
    return row


PARTS = (soak, killed_in_a_save, asked_to_stop, damaged, refused, stores, tokenizers, not_finite, settings, logs,
         exports, streams_of_output, outputs, no_files, fields_of_records, names_of_others, variables, disks, hosts,
         one_of_two)


def main() -> None:
    """Run the matrix and print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD",
                        help=f"parts with one of these words in their names: {', '.join(p.__name__ for p in PARTS)}")
    parser.add_argument("--kills", type=int, default=30, help="kills in the soak")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'fault':<58}{'injected':>9}{'survived':>10}{'lost steps':>12}{'bit-identical':>15}", flush=True)
    total = Row("in all")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), kills=arguments.kills)
        for part in PARTS:
            left_out = part in (disks, hosts) and os.geteuid() != 0
            rows = part(bench) if not left_out and any(word in part.__name__ for word in arguments.only) else ()
            for row in [rows] if isinstance(rows, Row) else rows:
                print(row, flush=True)
                total.injected, total.survived = total.injected + row.injected, total.survived + row.survived
                total.compared, total.identical = total.compared + row.compared, total.identical + row.identical
                total.lost += row.lost
    print(total)


if __name__ == "__main__":
    main()
