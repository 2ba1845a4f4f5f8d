"""minisft, TRL, torchtune and litgpt train the same tokens of the same checkpoint: speed, memory, time to start.

    python benchmarks/throughput.py MODEL FILE... [--systems NAME...] [--precision bf16 fp32] [--python NAME=PATH...]

MODEL is a Hugging Face folder of a Llama, FILE conversations in any format that minisft reads. minisft renders,
tokenises and packs them; every system gets these very documents, step by step, and where it packs, the same packs
(peers.py says how each is set up). The losses tell whether all train the same: the first one before any update, the
last one after the same updates. A loss that differs is marked with *: that row is no comparison.

Each system is a process of its own. They take turns, a step each, on the same documents, and the others sleep, so what
else the machine does falls on all alike; medians are over the steps after the first. `step` is the time of a step over
that of the first system, `CPU s` its seconds of all cores: the steadier figure on a machine that others use. `start`
is from the start of the process to the end of its first step, alone on the machine. `peak GiB` is the most resident
memory, libraries included. `of peak` is the FLOPs that training these documents needs (attention within documents, the
head on trained tokens), per second, over what one large square matrix product reaches in the same round in that
precision. Tokens per second count real tokens, no padding. A peer that lives in another environment is named with its
Python, as in --python litgpt=PATH: pip install -e '.[bench]' brings TRL and torchtune, '.[bench-litgpt]' wants its own.
"""

import argparse
import json
import os
import platform
import select
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minisft import config as configuration
from minisft.config import Config
from minisft.data.loader import steps
from minisft.errors import UserError
from minisft.model.config import LlamaConfig, read_config
from minisft.model.flops import training_flops
from minisft.preparation import prepare

PEERS = Path(__file__).with_name("peers.py")
SYSTEMS = ("minisft", "trl", "trl-compile", "trl-bf16-weights", "torchtune", "torchtune-compile", "litgpt",
           "litgpt-single")
TOLERANCE = {"bf16": 0.02, "fp32": 0.0005}  # by which losses of the same training may differ, in nats
SQUARE = 4096


@dataclass
class Work:
    """The documents of each step, and what they cost."""

    steps: list[list[list[dict]]]  # [step][pack][document] of {"ids", "trained"}
    tokens: list[int]
    trained: list[int]
    flops: list[int]


@dataclass
class Runner:
    """A system's process."""

    name: str
    process: subprocess.Popen
    log: Path
    started: float
    start_seconds: float = 0.0
    failure: str = ""
    results: list[dict] = field(default_factory=list)

    def step(self, limit: float) -> None:
        """Have it do one step; a process that died or takes longer than `limit` seconds has failed."""
        if self.failure:
            return
        try:
            self.process.stdin.write(b"step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead; reading says so
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else b""
        if line:
            self.results.append(json.loads(line))
            return
        if not ready:
            self.failure = f"no step in {limit:.0f} s"
        else:
            code = self.process.wait()
            last = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()][-1:]
            self.failure = f"signal {-code} (9: out of memory)" if code < 0 else (last or [f"exit code {code}"])[0]
        self.stop()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def documents(config: Config, network: LlamaConfig, count: int) -> Work:
    """The first `count` full steps of minisft's plan for the data of `config`."""
    prepared = prepare(config, quiet=True)
    work = Work([], [], [], [])
    for step in steps(prepared.train, prepared.plan, micro_packs=1):
        if len(work.steps) == count:
            break
        packs = []
        for batch in step.micro_batches:
            trained = np.zeros(len(batch.tokens), dtype=int)
            trained[batch.target_at.numpy() + 1] = 1
            ends = np.cumsum(batch.lengths)[:-1]
            packs.append([{"ids": ids.tolist(), "trained": mask.tolist()} for ids, mask in
                          zip(np.split(batch.tokens.numpy(), ends), np.split(trained, ends), strict=True)])
        if len(packs) < config.batch.packs:
            continue  # the last of an epoch
        lengths = np.array([len(d["ids"]) for pack in packs for d in pack])
        targets = np.array([sum(d["trained"]) for pack in packs for d in pack])
        work.steps.append(packs)
        work.tokens.append(step.tokens)
        work.trained.append(step.target_tokens)
        work.flops.append(training_flops(network, lengths, targets))
    if len(work.steps) < count:
        raise UserError(f"{config.data.train[0].path}: makes {len(work.steps)} full steps of {config.batch.packs} "
                        f"packs of {config.data.seq_len} tokens, and --steps asks for {count}; lower it, or --packs")
    return work


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOPs per second of the better of two large square products, with the threads of this process."""
    a, b = torch.randn(2, SQUARE, SQUARE).to(dtype)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * SQUARE**3 / min(seconds)


def start(name: str, options: argparse.Namespace, job: Path, folder: Path) -> Runner:
    """Start a system, and have it do its first step."""
    python = options.python.get(name, options.python.get(name.split("-")[0], sys.executable))
    log = folder / f"{name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads),
                   "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with open(log, "wb") as errors:
        process = subprocess.Popen([python, str(PEERS), name, str(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=errors, env=environment, cwd=folder)
    runner = Runner(name, process, log, started)
    runner.step(options.limit)
    runner.start_seconds = time.perf_counter() - started
    return runner


def race(file: str, precision: str, options: argparse.Namespace, folder: Path) -> None:
    """All systems on one file in one precision, and their table."""
    recipe = folder / "run.toml"
    recipe.touch()
    arguments = [str(recipe), "--model.path", str(options.model), "--data.train", file, "--data.seq_len",
                 str(options.seq_len), "--data.template", options.template, "--batch.packs", str(options.packs),
                 "--train.precision", precision, "--data.cache", str(folder / "cache"), "--run.dir", str(folder)]
    network = read_config(options.model)
    work = documents(configuration.load(arguments), network, options.steps + 1)
    job = folder / f"{Path(file).stem}-{precision}.json"
    job.write_text(json.dumps({"model": str(options.model.resolve()), "precision": precision, "steps": work.steps,
                               "seq_len": options.seq_len, "threads": options.threads, "lr": options.lr,
                               "folder": str(folder), "arguments": arguments}))
    print(f"\n{file}, {precision}: {options.steps} steps of {options.packs} packs of {options.seq_len} tokens; a step "
          f"has {median(sum(map(len, packs)) for packs in work.steps):g} documents, {median(work.tokens):g} "
          f"tokens, {median(work.trained):g} trained, {median(work.flops) / 1e9:,.0f} GFLOP", flush=True)
    runners: list[Runner] = []
    peaks = []
    try:
        for name in options.systems:
            if name == "trl-bf16-weights" and precision != "bf16":
                continue
            runners.append(start(name, options, job, folder))
        for _ in range(options.steps):
            peaks.append(matmul_peak({"bf16": torch.bfloat16, "fp32": torch.float32}[precision]))
            for runner in runners:
                runner.step(options.limit)
    finally:
        for runner in runners:
            runner.stop()
    table(runners, work, peaks, precision)


def table(runners: list[Runner], work: Work, peaks: list[float], precision: str) -> None:
    """One row a system; the first that ran is what the others are compared with."""
    print(f"peak of a {SQUARE} x {SQUARE} product: {median(peaks) / 1e9:,.0f} GFLOP/s "
          f"({min(peaks) / 1e9:,.0f} to {max(peaks) / 1e9:,.0f})")
    print(f"{'':<19}{'tokens/s':>9}{'trained/s':>10}{'of peak':>9}{'step':>8}{'CPU s':>8}{'peak GiB':>10}"
          f"{'start s':>9}{'first loss':>12}{'last loss':>11}")
    first = next((runner for runner in runners if not runner.failure), None)
    for runner in runners:
        if runner.failure:
            print(f"{runner.name:<19}failed: {runner.failure[:100]}")
            continue
        seconds = [result["seconds"] for result in runner.results[1:]]
        base = [result["seconds"] for result in first.results[1:]]
        marks = ["*" if abs(runner.results[i]["loss"] - first.results[i]["loss"]) > TOLERANCE[precision] else " "
                 for i in (0, -1)]

        def rate(counts: list[float], seconds: list[float] = seconds) -> float:
            return median(count / s for count, s in zip(counts, seconds, strict=True))

        needed = [flops / peak for flops, peak in zip(work.flops[1:], peaks, strict=True)]
        print(f"{runner.name:<19}{rate(work.tokens[1:]):>9,.0f}{rate(work.trained[1:]):>10,.0f}{rate(needed):>9.1%}"
              f"{'x' + format(median(a / b for a, b in zip(seconds, base, strict=True)), '.2f'):>8}"
              f"{median(result['cpu_seconds'] for result in runner.results[1:]):>8.1f}"
              f"{runner.results[-1]['peak_gib']:>10.2f}{runner.start_seconds:>9.1f}"
              f"{runner.results[0]['loss']:>11.4f}{marks[0]}{runner.results[-1]['loss']:>10.4f}{marks[1]}", flush=True)


def versions(python: str) -> str:
    """What is installed beside that Python, of what matters here."""
    code = ("import importlib.metadata as m\nfor p in ('torch', 'transformers', 'trl', 'torchtune', 'torchao', "
            "'litgpt', 'lightning'):\n try: print(p, m.version(p), end='  ')\n except m.PackageNotFoundError: pass")
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="NAME",
                        help=", ".join(SYSTEMS))
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--python", nargs="+", action="extend", default=[], metavar="NAME=PATH",
                        help="the Python that has trl, torchtune or litgpt; without it, this one")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--packs", type=int, default=2, help="packs of a step, all in one forward pass (2)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after one that is not (5)")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every system (all cores)")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a step has failed (600)")
    options = parser.parse_args()
    try:
        options.python = dict(pair.split("=", 1) for pair in options.python)
    except ValueError:
        parser.error("--python takes NAME=PATH, such as trl=/path/to/python")
    for path in options.python.values():
        if not os.access(path, os.X_OK):
            parser.error(f"--python: {path} is no program")
    for name in ("seq_len", "packs", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main() -> None:
    """Print the machine and a table for each file and precision."""
    options = arguments()
    print(f"python {shlex.join(sys.argv)}\n{platform.platform()}, {os.cpu_count()} cores, {options.threads} threads, "
          f"load {os.getloadavg()[0]:.1f}")
    for python in dict.fromkeys((sys.executable, *options.python.values())):
        print(versions(python))
    torch.set_num_threads(options.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for file in options.files:
                for precision in options.precision:
                    race(str(Path(file).resolve()), precision, options, Path(folder))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
