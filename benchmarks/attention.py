"""Attention by document against one call with a dense mask, and its cost as documents grow.

    python benchmarks/attention.py FILE TOKENIZER [--tokens 8192] [--rounds 5] [--precision bf16 fp32]

FILE holds conversations in a format that minisft reads, TOKENIZER is a folder with a tokenizer.json. The benchmark runs
the forward and backward pass of one layer's attention, without its projections, with the heads of SmolLM2-135M and of
Llama-3-8B. All ways take turns in one process; times are medians of the rounds:

    packed from FILE     the middle one, by cost, of minisft's own packs: its documents' real lengths
      minisft            minisft.model.llama.attend
      dense mask         one scaled_dot_product_attention over the stream; the mask lets a token see the earlier ones of
                         its own document. Making the mask is not timed: a step needs it once for all layers
      causal, no mask    one call that lets documents see each other: wrong, but a lower bound for any single call
    documents of one     the same number of tokens in documents of 512, 1024, ... tokens, with minisft; the cost of a
    length               token has a constant part and a part that grows with the length

`GFLOP/s` counts the products that isolated documents need: 12 H E for each pair of a token and one that it sees.
"""

import argparse
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minisft.config import DataConfig, Source
from minisft.data.chat import Renderer
from minisft.data.packing import Plan
from minisft.data.store import open_store
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.model.llama import DTYPES, Documents, attend
from minisft.prepare import read_source

# H query heads, K key/value heads, E head width, T tokens
HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
TOLERANCE = {"bf16": 0.03, "fp32": 1e-4}

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def packed_lengths(options: argparse.Namespace) -> tuple[int, ...]:
    """Return the documents' lengths in the median pack by cost."""
    with tempfile.TemporaryDirectory() as cache:
        renderer = Renderer(load_templates()[options.template], Tokenizer(options.tokenizer))
        source = Source(str(options.file), format="auto", name="bench")
        store = open_store(source, DataConfig(cache=cache), renderer, read_source, quiet=True)
        lengths = np.diff(store.offsets)
    lengths = lengths[lengths <= options.tokens]
    if not len(lengths):
        raise UserError(f"{options.file}: no conversation fits in {options.tokens} tokens; raise --tokens")
    epoch = Plan(lengths, lengths, seq_len=options.tokens, packs_per_step=1, epochs=1).epoch(0)
    packs = [lengths[epoch.pack(i)] for i in range(len(epoch))]
    full = [pack for pack in packs if pack.sum() > 0.9 * options.tokens] or packs
    return tuple(sorted(full, key=lambda pack: int(np.square(pack).sum()))[len(full) // 2].tolist())


def by_document(lengths: tuple[int, ...]) -> Way:
    documents = Documents.of_lengths(lengths)
    return lambda q, k, v: attend(q, k, v, documents)


def one_call(mask: Tensor | None) -> Way:
    """Make one call for the whole stream; without a mask it is causal over all of it."""
    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)
    return way


def dense_mask(lengths: tuple[int, ...]) -> Tensor:
    """(1, 1, T, T): True if a token sees another."""
    document = torch.repeat_interleave(torch.tensor(lengths))
    return (document[:, None] == document).tril()[None, None]


def race(ways: dict[str, Way], tokens: int, heads: str, precision: str, rounds: int) -> dict[str, tuple[float, Tensor]]:
    """Return median seconds of forward and backward pass, and the output, after one warm-up round."""
    torch.manual_seed(0)
    queries, shared, width = HEADS[heads]
    q, k, v = (torch.randn(tokens, n, width).to(DTYPES[precision]).requires_grad_() for n in (queries, shared, shared))
    gradient = torch.randn(tokens, queries, width).to(DTYPES[precision])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            out = way(q, k, v)
            torch.autograd.grad(out, (q, k, v), gradient)
            seconds[name].append(time.perf_counter() - started)
            outputs[name] = out.detach()
    return {name: (median(times[1:]), outputs[name]) for name, times in seconds.items()}


def products(lengths: tuple[int, ...], heads: str) -> int:
    """Count the FLOPs: two products of 2 E for each pair and head, and twice as many in the backward pass."""
    queries, _, width = HEADS[heads]
    return 12 * queries * width * sum(n * (n + 1) // 2 for n in lengths)


def packed(lengths: tuple[int, ...], heads: str, precision: str, rounds: int) -> None:
    """Print the table of the packed stream."""
    ways = {"minisft": by_document(lengths), "dense mask": one_call(dense_mask(lengths)),
            "causal, no mask": one_call(None)}
    found = race(ways, sum(lengths), heads, precision, rounds)
    base, out = found["minisft"]
    distance = (out.float() - found["dense mask"][1].float()).abs().max().item()
    if distance > TOLERANCE[precision]:
        sys.exit(f"error: minisft and the dense mask differ by {distance:.1e}: they compute different things")
    print(f"\n{heads}, {precision}, packed: {sum(lengths):,} tokens in {len(lengths)} documents; minisft and the dense "
          f"mask differ by at most {distance:.0e}")
    for name, (seconds, _) in found.items():
        print(f"  {name:<18}{seconds * 1e3:>10.1f} ms   x{seconds / base:<7.2f}"
              f"{products(lengths, heads) / seconds / 1e9:>8.1f} GFLOP/s", flush=True)


def by_length(tokens: int, heads: str, precision: str, rounds: int) -> None:
    """Print the table of documents of one length."""
    lengths = {n: (n,) * (tokens // n) for n in (2**i for i in range(9, tokens.bit_length())) if n <= tokens}
    if not lengths:
        return
    print(f"{heads}, {precision}, documents of one length, {tokens:,} tokens:")
    found = race({str(n): by_document(some) for n, some in lengths.items()},
                 next(sum(some) for some in lengths.values()), heads, precision, rounds)
    longest = found[str(max(lengths))][0]
    for n, some in lengths.items():
        seconds = found[str(n)][0]
        print(f"  {n:<18,}{seconds * 1e3:>10.1f} ms   x{seconds / longest:<7.2f}"
              f"{products(some, heads) / seconds / 1e9:>8.1f} GFLOP/s", flush=True)


def main() -> None:
    """Print both tables for each model's heads and each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--template", default="chatml", choices=load_templates())
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if min(options.tokens, options.rounds, options.threads) < 1:
        parser.error("--tokens, --rounds and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    print(f"python {shlex.join(sys.argv)}\n{platform.platform()}, {os.cpu_count()} cores, {options.threads} threads, "
          f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    try:
        lengths = packed_lengths(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    for heads in options.heads:
        for precision in options.precision:
            packed(lengths, heads, precision, options.rounds)
            by_length(1 << (options.tokens.bit_length() - 1), heads, precision, options.rounds)


if __name__ == "__main__":
    main()
