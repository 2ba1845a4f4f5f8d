"""How fast weights are read, against plain reading of the same files, and how much memory it takes.

    python benchmarks/loading.py FOLDER [--gib N] [--rounds N] [--ranks N ...] [--keep]

The benchmark writes a model of Llama-3-8B's tensors into FOLDER: random numbers in bf16, in files of about 1 GiB, with
as many layers as --gib leaves room for (3 or more; the whole model is 15). It reads them as a training run does: built
on the meta device, sharded, then `weights.load` into fp32 (load). It compares this with read() of the same bytes in
blocks of 16 MiB, each rank its part of every file: into one buffer (read); and also writing as many fp32 zeros into
fresh memory after each block, which any loader must do (fresh).

The ways take turns, each time in new processes, with the files out of the page cache (cold) and in it (warm). Times are
from the first rank's start to the last one's end, without starting Python. `RSS` is the most memory that a rank had,
minus what it had before and its own part of the model; it includes mapped pages of the cache. `anonymous` excludes
those: it is what a rank really needs beyond the model.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from minisft.model import weights
from minisft.model.flops import Sizes
from minisft.model.llama import Llama
from minisft.model.llama_config import PRESETS, read_config
from minisft.training import parallel

BLOCK, SHARD = 16 * 2**20, 2**30
WAYS = ("read", "fresh", "load")


def write(folder: Path, gib: float) -> None:
    """Write a Hugging Face folder of about `gib` GiB."""
    preset = PRESETS["llama-3-8b"]
    sizes = Sizes.of(preset)
    rest = sizes.total - preset.num_hidden_layers * sizes.block
    layers = min(max(math.ceil((gib * 2**29 - rest) / sizes.block), 1), preset.num_hidden_layers)
    with torch.device("meta"):
        model = Llama(replace(preset, num_hidden_layers=layers)).bfloat16()
    weights.initialize(model.to_empty(device="cpu"), std=1.0, seed=0)
    weights.save(model, model.config, folder, shard_bytes=SHARD)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def cool(folder: Path) -> None:
    """Drop the files from the page cache, unless another process holds them."""
    for file in files(folder):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path, rank: int, ranks: int, *, fresh: bool = False) -> None:
    """Read this rank's part of every file; `fresh` also writes twice its size into new memory."""
    buffer, kept = memoryview(bytearray(BLOCK)), []
    for file in files(folder):
        size = file.stat().st_size
        with open(file, "rb", buffering=0) as opened:
            opened.seek(size * rank // ranks)
            left = size * (rank + 1) // ranks - opened.tell()
            while left:
                count = opened.readinto(buffer[: min(left, BLOCK)])
                left -= count
                if fresh:
                    kept.append(torch.zeros(count // 2))  # 2 bytes a number in the file, 4 in memory


class Memory(threading.Thread):
    """Follows this process's memory: the peaks of RSS and of its anonymous part, in bytes above the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.start_with = threading.Event(), self.now()
        self.most = self.start_with
        self.start()

    @staticmethod
    def now() -> tuple[int, int]:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.most = tuple(map(max, self.most, self.now()))

    def stop(self) -> tuple[int, int]:
        self.done.set()
        self.join()
        return tuple(most - before for most, before in zip(self.most, self.start_with, strict=True))


def worker(folder: Path, way: str) -> None:
    """Run one rank of one measurement; the first rank prints it."""
    world = parallel.start()
    model = parallel.build_model(read_config(folder), world) if way == "load" else None
    memory = Memory()
    dist.barrier()
    since = time.perf_counter()
    if model is None:
        read_plainly(folder, world.rank, world.ranks, fresh=way == "fresh")
    else:
        weights.load(model, weights.SafetensorsFolder(folder))
    dist.barrier()
    seconds = time.perf_counter() - since
    own = sum(weights.local_rows(p)[0].nbytes for p in model.parameters()) if model else 0
    figures = torch.tensor([most - own for most in memory.stop()])
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    if world.is_main:
        print(json.dumps([seconds, *figures.tolist()]))
    parallel.stop()


def measure(folder: Path, way: str, ranks: int, *, cold: bool) -> list[float]:
    """Return seconds, and bytes of RSS and of anonymous memory beyond the model."""
    if cold:
        cool(folder)
    else:
        read_plainly(folder, 0, 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "127.0.0.1:0", __file__, str(folder), "--worker", way]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(title: str, rows: dict[str, list], size: int) -> None:
    """Print one line for each way."""
    rates = {way: sorted(size / seconds / 1e9 for seconds, *_ in row) for way, row in rows.items()}
    for way, rate in rates.items():
        line = f"{title}: {way:<6}{median(rate):6.2f} ({rate[0]:.2f}, {rate[-1]:.2f})"
        rss, anonymous = (max(row[i] for row in rows[way]) / 2**20 for i in (1, 2))
        share = ",".join(f"{median(rate) / median(rates[other]):5.0%} of {other}" for other in ("read", "fresh"))
        memory = f"; besides the model {rss:,.0f} MiB RSS, {anonymous:,.0f} MiB anonymous" * (way == "load")
        print(f"{line} {share}{memory}", flush=True)


def main() -> None:
    """Make the files, measure all ways in turn, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--keep", action="store_true", help="keep the files, and use existing ones")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.folder, options.worker)
    if options.folder.exists() and not options.keep:
        parser.error(f"{options.folder} exists; name a new folder, or use its files with --keep")
    if not options.folder.exists():
        write(options.folder, options.gib)
    size = sum(file.stat().st_size for file in files(options.folder))
    print(f"{size:,} bytes in {len(files(options.folder))} files; GB/s of the files: median (least, most) of "
          f"{options.rounds} rounds")
    for ranks in options.ranks:
        for cold in (True, False):
            rows: dict[str, list] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way, row in rows.items():
                    row.append(measure(options.folder, way, ranks, cold=cold))
            report(f"{ranks} rank{'s' * (ranks > 1)}, {'cold' if cold else 'warm'}", rows, size)
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
