"""minisft, TRL, torchtune and litgpt train the same tokens of the same checkpoint: speed, memory, time to start.

    python benchmarks/throughput.py MODEL FILE... [--systems NAME...] [--precision bf16 fp32] [--python NAME=PATH...]

MODEL is a Hugging Face folder of a Llama, FILE conversations in any format that minisft reads. minisft renders,
tokenises and packs them; every system gets exactly these documents, step by step, and if it packs, the same packs
(peers.py says how each is set up). The losses show if all train the same: the first one before any update, the last one
after the same updates. A loss that differs is marked with *: that row is not a fair comparison.

The systems take turns (A B C A B C), each turn alone in its own process and on the same documents, so other load on the
machine affects all alike. Medians are over the steps of all turns, without each turn's first. `step` is the time
divided by that of the first system; `CPU s` is the CPU time of all cores, the steadier figure on a machine that others
use. `start` is from the start of the process to the end of its first step. `peak GiB` is the most memory allocated on
the GPU, or without one the most resident memory, libraries included. `of peak` is the FLOPs a second that training
these documents needs (attention within documents, the head on trained tokens), divided by what a large square product
in that precision reached just before the turn. Tokens per second count real tokens, no padding. If a system lives in
another environment, name its Python, as in --python litgpt=PATH: pip install -e '.[bench]' installs TRL and torchtune;
'.[bench-litgpt]' needs its own environment.
"""

import argparse
import contextlib
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

from minisft import config_io
from minisft.config import Config
from minisft.data.batches import steps
from minisft.errors import UserError
from minisft.model.flops import training_flops
from minisft.model.llama_config import LlamaConfig, read_config
from minisft.prepare import prepare

PEERS = Path(__file__).with_name("peers.py")
SYSTEMS = ("minisft", "minisft-compile", "minisft-bf16-weights", "trl", "trl-compile", "trl-bf16-weights", "trl-liger",
           "trl-flash", "transformers", "torchtune", "torchtune-compile", "litgpt", "litgpt-single")
ONLY_BF16 = ("minisft-bf16-weights", "trl-bf16-weights")
TOLERANCE = {"bf16": 0.02, "fp32": 0.0005}  # by which losses of the same training may differ, in nats


@dataclass
class Work:
    """The documents of each step, and their cost."""

    steps: list[list[list[dict]]]  # [step][pack][document] of {"ids", "trained"}
    tokens: list[int]
    trained: list[int]
    flops: list[int]


@dataclass
class Record:
    """The figures of a system in all its turns."""

    name: str
    start_seconds: list[float] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)  # of the steps after the first, turn by turn
    failure: str = ""


def documents(config: Config, network: LlamaConfig, count: int) -> Work:
    """Return the first `count` full steps of minisft's plan for the data of `config`."""
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
                        f"packs of {config.data.seq_len} tokens, and --steps needs {count}; lower it, or --packs")
    return work


def matmul_peak(dtype: torch.dtype, square: int) -> float:
    """Return the FLOPs a second of the fastest of three large square products (on a GPU, of ten in a row)."""
    on, each = (torch.device("cuda"), 10) if torch.cuda.is_available() else (torch.device("cpu"), 1)
    a, b = torch.randn(2, square, square, device=on).to(dtype)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(each):
            a @ b
        if on.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / each)
    del a, b
    if on.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * square**3 / min(seconds)


def turn(record: Record, options: argparse.Namespace, job: Path, folder: Path) -> None:
    """Start a system and let it do its steps; if its process dies or is too slow, the system is out."""
    name, log = record.name, folder / f"{record.name}.log"
    python = options.python.get(name, options.python.get(name.split("-")[0], sys.executable))
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads),
                   "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with open(log, "wb") as errors:
        process = subprocess.Popen([python, str(PEERS), name, str(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=errors, env=environment, cwd=folder)
    try:
        record.first_losses.append(one_step(process, log, options.limit)["loss"])
        record.start_seconds.append(time.perf_counter() - started)
        record.results += [one_step(process, log, options.limit) for _ in range(options.steps)]
    except ChildProcessError as error:
        record.failure = str(error)
    finally:
        process.kill()
        process.communicate()


def one_step(process: subprocess.Popen, log: Path, limit: float) -> dict:
    """Let a system do one step. Raises ChildProcessError with the reason if it dies or takes over `limit` seconds."""
    with contextlib.suppress(BrokenPipeError):  # it is dead, which the read below reports
        process.stdin.write(b"step\n")
        process.stdin.flush()
    if not select.select([process.stdout], [], [], limit)[0]:
        raise ChildProcessError(f"no step in {limit:.0f} s")
    if line := process.stdout.readline():
        return json.loads(line)
    code = process.wait()
    last = [text for text in log.read_text(errors="replace").splitlines() if text.strip()][-1:]
    raise ChildProcessError(f"signal {-code} (9: out of memory)" if code < 0 else (last or [f"exit code {code}"])[0])


def race(file: str, precision: str, options: argparse.Namespace, folder: Path) -> None:
    """Run all systems on one file in one precision, and print their table."""
    recipe = folder / "run.toml"
    recipe.touch()
    arguments = [str(recipe), "--model.path", str(options.model), "--data.train", file, "--data.seq_len",
                 str(options.seq_len), "--data.template", options.template, "--batch.packs", str(options.packs),
                 "--train.precision", precision, "--data.cache", str(folder / "cache"), "--run.dir", str(folder)]
    network = read_config(options.model)
    work = documents(config_io.load(arguments), network, options.steps + 1)
    job = folder / f"{Path(file).stem}-{precision}.json"
    job.write_text(json.dumps({"model": str(options.model.resolve()), "precision": precision, "steps": work.steps,
                               "seq_len": options.seq_len, "micro_packs": options.micro_packs,
                               "threads": options.threads, "lr": options.lr, "folder": str(folder),
                               "arguments": arguments}))
    print(f"\n{file}, {precision}: {options.turns} turns of {options.steps} timed steps of {options.packs} packs of "
          f"{options.seq_len} tokens, {options.micro_packs} at once; a step has "
          f"{median(sum(map(len, packs)) for packs in work.steps):g} documents, "
          f"{median(work.tokens):g} tokens, {median(work.trained):g} trained, {median(work.flops) / 1e9:,.0f} GFLOP",
          flush=True)
    records = [Record(name) for name in options.systems if precision == "bf16" or name not in ONLY_BF16]
    peaks = []
    for _ in range(options.turns):
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        peaks += options.steps * [matmul_peak(dtype, options.square)]
        for record in records:
            if not record.failure:
                turn(record, options, job, folder)
    rows = table(records, work, peaks, precision, options)
    if options.json:
        with options.json.open("a") as out:
            out.writelines(json.dumps({"seq_len": options.seq_len, "precision": precision, **row}) + "\n"
                           for row in rows)


def table(records: list[Record], work: Work, peaks: list[float], precision: str,
          options: argparse.Namespace) -> list[dict]:
    """Print and return one row for each system; the first that ran is the baseline."""
    rows = []
    print(f"peak of a {options.square} x {options.square} product: {median(peaks) / 1e9:,.0f} GFLOP/s "
          f"({min(peaks) / 1e9:,.0f} to {max(peaks) / 1e9:,.0f})")
    print(f"{'':<19}{'tokens/s':>9}{'trained/s':>10}{'of peak':>9}{'step':>8}{'CPU s':>8}{'peak GiB':>10}"
          f"{'start s':>9}{'first loss':>12}{'last loss':>11}")
    tokens, trained, flops = (options.turns * counts[1:] for counts in (work.tokens, work.trained, work.flops))
    first = next((record for record in records if not record.failure), None)
    for record in records:
        if record.failure:
            print(f"{record.name:<19}failed: {record.failure[:100]}")
            rows.append({"system": record.name, "failed": record.failure})
            continue
        seconds = np.array([result["seconds"] for result in record.results])
        base = np.array([result["seconds"] for result in first.results])
        losses = record.first_losses[0], record.results[-1]["loss"]
        others = first.first_losses[0], first.results[-1]["loss"]
        marks = ["*" if abs(a - b) > TOLERANCE[precision] else " " for a, b in zip(losses, others, strict=True)]
        row = {"system": record.name, "tokens_per_second": float(np.median(tokens / seconds)),
               "trained_per_second": float(np.median(trained / seconds)),
               "of_peak": float(np.median(np.array(flops) / seconds / peaks)),
               "step": float(np.median(seconds / base)),
               "cpu_seconds": median(result["cpu_seconds"] for result in record.results),
               "peak_gib": max(result["peak_gib"] for result in record.results),
               "start_seconds": median(record.start_seconds), "losses": losses}
        rows.append(row)
        print(f"{record.name:<19}{row['tokens_per_second']:>9,.0f}{row['trained_per_second']:>10,.0f}"
              f"{row['of_peak']:>9.1%}{'x' + format(row['step'], '.2f'):>8}{row['cpu_seconds']:>8.1f}"
              f"{row['peak_gib']:>10.2f}{row['start_seconds']:>9.1f}{losses[0]:>11.4f}{marks[0]}{losses[1]:>10.4f}{marks[1]}",
              flush=True)
    return rows


def versions(python: str) -> str:
    """Return the versions of the relevant packages of that Python."""
    code = ("import importlib.metadata as m\nfor p in ('torch', 'transformers', 'trl', 'torchtune', 'torchao', "
            "'litgpt', 'lightning'):\n try: print(p, m.version(p), end='  ')\n except m.PackageNotFoundError: pass")
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="NAME",
                        help=", ".join(SYSTEMS))
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--python", nargs="+", action="extend", default=[], metavar="NAME=PATH",
                        help="the Python that has trl, torchtune or litgpt (this one)")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--packs", type=int, default=2, help="packs in a step (2)")
    parser.add_argument("--micro-packs", type=int, default=1, help="packs in one forward pass, of every system (1)")
    parser.add_argument("--turns", type=int, default=3, help="processes of each system, in turn (3)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn, after one warm-up step (2)")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every system (all cores)")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a step has failed (600)")
    parser.add_argument("--square", type=int, default=8192 if torch.cuda.is_available() else 4096,
                        help="rows of the product whose speed counts as the peak (8192 on a GPU, 4096 on a CPU)")
    parser.add_argument("--json", type=Path, help="append the tables' figures to this file, one line for each system")
    options = parser.parse_args()
    try:
        options.python = dict(pair.split("=", 1) for pair in options.python)
    except ValueError:
        parser.error("--python takes NAME=PATH, such as trl=/path/to/python")
    for path in options.python.values():
        if not os.access(path, os.X_OK):
            parser.error(f"--python: {path} is not a program")
    for name in ("seq_len", "packs", "micro_packs", "turns", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.packs % options.micro_packs:
        parser.error(f"--packs {options.packs} is not a multiple of --micro-packs {options.micro_packs}")
    return options


def main() -> None:
    """Print the machine, and a table for each file and precision."""
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
