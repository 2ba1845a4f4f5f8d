"""Loss and gradients at the vocabulary: the plain way, torch's, TRL's and minisft's; time, and memory as tokens grow.

    python benchmarks/loss.py [--vocabulary 128256] [--width 4096] [--tokens 4096] [--growth N...] [--rounds 3]

    plain      F.cross_entropy of all logits in fp32: `hidden @ weight.T` at once
    torch      torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions(), which chooses the chunks
    torch-512  the same with 512 tokens at a time and acc_policy="accurate": on a CPU several times faster than its own
               choice
    trl        the function behind SFTTrainer's default loss, with the outputs that SFTTrainer logs (entropy, and if the
               target was the likeliest), on trained tokens only, as it does with a GPU
    minisft    minisft.training.loss.linear_cross_entropy

Each evaluation runs in its own process, the ways in turn, on the same random hidden states (N, D) and weights (V, D) in
the measured precision, and ends with both gradients in that precision. Time is the median over the rounds; `of peak` is
the 6 N D V FLOPs needed, divided by the speed of a large square product in the same process. Memory is the peak beyond
the inputs; it includes the gradients, which every way must return, and the header says how large they are. `error` is
the largest relative distance from the first way: of the loss, and of rows of both gradients projected onto random
directions. A way that would not fit into free memory is left out, because it would take other programs down with it.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WAYS = ("plain", "torch", "torch-512", "trl", "minisft")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SQUARE = 4096


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets)


def torchs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **options) -> torch.Tensor:
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions(**options))


def trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    log_probs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None,
                                                 1.0, ("log_probs", "entropy", "is_top1"))
    return -log_probs.sum() / len(targets)


def minisft(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from minisft.training.loss import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, denominator=len(targets))


def resident(field: str) -> float:
    """Return the GiB that this process has resident now (VmRSS) or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**20


def evaluate(way: str, tokens: int, width: int, vocabulary: int, precision: str, threads: int) -> dict:
    """Evaluate once in this process: {seconds, gib, peak, figures to compare}."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, kill this and no other program
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    work = {"plain": plain, "torch": torchs, "trl": trl, "minisft": minisft,
            "torch-512": partial(torchs, batch_chunk_size=512, acc_policy="accurate")}[way]
    draws = (torch.randn(8, 16), torch.randn(32, 16), torch.arange(8))
    work(*(x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in draws)).backward()  # loads the kernels

    square = torch.randn(2, SQUARE, SQUARE).to(dtype)
    square[0] @ square[1]
    started = time.perf_counter()
    square[0] @ square[1]
    peak = 2 * SQUARE**3 / (time.perf_counter() - started)
    del square

    # Logits of unit variance and gradients for every token id, as in a real head. Drawn in place: no fp32 copy.
    hidden = torch.randn(tokens, width, dtype=dtype).requires_grad_()
    weight = torch.empty(vocabulary, width, dtype=dtype).normal_(std=width**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM to what is resident now
    before, started = resident("VmRSS"), time.perf_counter()
    loss = work(hidden, weight, targets)
    loss.backward()
    seconds = time.perf_counter() - started
    gib = resident("VmHWM") - before
    # Ten rows projected onto random directions show any wrong gradient without computing anything large.
    directions = torch.randn(width, 4)
    words = torch.cat((targets[:5], torch.arange(5)))
    return {"seconds": seconds, "gib": gib, "peak": peak, "loss": loss.item(),
            "hidden": (hidden.grad[:10].float() @ directions).flatten().tolist(),
            "weight": (weight.grad[words].float() @ directions).flatten().tolist()}


def shortage(way: str, tokens: int, options: argparse.Namespace, precision: str) -> str:
    """Return why this evaluation does not fit into free memory; empty if it does."""
    size, weight = DTYPES[precision].itemsize, options.vocabulary * options.width
    logits = 4 * tokens * options.vocabulary  # fp32
    # Beyond weight and gradient. plain: logits, their logarithms and the gradients of both; others: an fp32 gradient,
    # and TRL's six copies of a tile of 4,096 tokens and 32,768 words.
    working = {"plain": 4 * logits, "trl": 4 * weight + 6 * 4 * 4096 * 32768}.get(way, 8 * weight + 2**30)
    needed = (2 * size * weight + working) / 2**30
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    return "" if needed < free else f"needs about {needed:.1f} GiB, {free:.1f} are free; lower --tokens or --width"


def in_process(way: str, tokens: int, options: argparse.Namespace, precision: str) -> dict | str:
    """Run `evaluate` in its own process; returns its figures, or why it failed."""
    if short := shortage(way, tokens, options, precision):
        return short
    command = [sys.executable, __file__, "--evaluate", way, str(tokens), precision, "--width", str(options.width),
               "--vocabulary", str(options.vocabulary), "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode < 0:
        return f"signal {-done.returncode} (9: out of memory)"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:100]
    return json.loads(done.stdout.splitlines()[-1])


def error(result: dict, truth: dict) -> float:
    """Return the largest relative distance of loss and gradients."""
    distances = [abs(result["loss"] - truth["loss"]) / abs(truth["loss"])]
    for name in ("hidden", "weight"):
        ours, theirs = torch.tensor(result[name]), torch.tensor(truth[name])
        distances.append(((ours - theirs).norm() / theirs.norm()).item())
    return max(distances)


def measure(tokens: int, rounds: int, precision: str, options: argparse.Namespace) -> None:
    """Run all ways in turn, and print a line for each."""
    gradients = (tokens + options.vocabulary) * options.width * DTYPES[precision].itemsize / 2**30
    print(f"\n{tokens:,} tokens, {precision}: the gradients are {gradients:.2f} GiB", flush=True)
    results: dict[str, list] = {way: [] for way in options.ways}
    for _ in range(rounds):
        for way in options.ways:
            if not results[way] or isinstance(results[way][-1], dict):
                results[way].append(in_process(way, tokens, options, precision))
    truth = next((row[0] for row in results.values() if isinstance(row[0], dict)), None)
    for way, row in results.items():
        if isinstance(row[-1], str):
            print(f"{way:<10}not measured: {row[-1]}")
            continue
        seconds = median(result["seconds"] for result in row)
        share = median(6 * tokens * options.width * options.vocabulary / result["seconds"] / result["peak"]
                       for result in row)
        print(f"{way:<10}{seconds:>9.2f} s{share:>8.1%} of peak{max(result['gib'] for result in row):>8.2f} GiB"
              f"   error {error(row[0], truth):.1e} of {next(iter(results))}", flush=True)


def main() -> None:
    """Print a table for each precision and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--growth", type=int, nargs="*", default=[1024, 2048, 8192], help="one round each, for memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--evaluate", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    numbers = {"--vocabulary": [options.vocabulary], "--width": [options.width], "--tokens": [options.tokens],
               "--growth": options.growth, "--rounds": [options.rounds], "--threads": [options.threads]}
    for name, values in numbers.items():
        if min(values, default=1) < 1:
            parser.error(f"{name} must be at least 1")
    if options.evaluate:
        way, tokens, precision = options.evaluate
        print(json.dumps(evaluate(way, int(tokens), options.width, options.vocabulary, precision, options.threads)))
        return
    print(f"python {shlex.join(sys.argv)}\n{platform.platform()}, {os.cpu_count()} cores, {options.threads} threads, "
          f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}; vocabulary {options.vocabulary:,}, width "
          f"{options.width:,}")
    for precision in options.precision:
        measure(options.tokens, options.rounds, precision, options)
        for tokens in options.growth:
            measure(tokens, 1, precision, options)


if __name__ == "__main__":
    main()
