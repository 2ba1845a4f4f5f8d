"""Tokens a second of one text, and how close they come to the memory's limit; minisft and transformers in turn.

    python benchmarks/generation.py MODEL [--threads 1] [--prompt 64] [--tokens 64] [--rounds 3]

A new token reads every weight once, so bandwidth divided by the bytes of the weights is the upper limit. The bandwidth
is that of `max` over half a gigabyte, with the same number of threads, measured before each system in each round; `of
limit` compares a system with the bandwidth of its own round, and is the median over the rounds. The embedding of an
untied model does not count, because a token reads one row of it.

The time is that of `--tokens` tokens minus that of one, which excludes the prompt. With one thread it is CPU time, for
all systems and for the bandwidth, because other programs on the core do not affect it; otherwise it is wall time.
"""

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minisft.generate.assistant import generate
from minisft.generate.decoding import CachedDecoder
from minisft.model.llama import DTYPES
from minisft.pretrained import from_pretrained


def minisft(folder: str, dtype: torch.dtype) -> tuple[Callable[[list[int], int], list[int]], int]:
    """A function (prompt, number of tokens) -> tokens, and the bytes of weights that a token reads."""
    model = from_pretrained(folder, dtype=dtype)
    decoder = CachedDecoder(model, packed=True)
    unread = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    size = sum(parameter.nbytes for parameter in model.parameters()) - unread
    return lambda prompt, count: generate(decoder, [prompt], max_new_tokens=count, stop_ids=set())[0], size


def transformers(folder: str, dtype: torch.dtype) -> tuple[Callable[[list[int], int], list[int]], int]:
    """Return the same as `minisft` for transformers' `generate`."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    unread = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    size = sum(parameter.nbytes for parameter in model.parameters()) - unread

    def run(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                              eos_token_id=None, pad_token_id=0)[0, len(prompt) :].tolist()

    return run, size


def main() -> None:
    """Print a line for each system and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--systems", nargs="+", choices=("minisft", "transformers"),
                        default=("minisft", "transformers"))
    options = parser.parse_args()
    if min(options.threads, options.prompt, options.rounds, options.tokens - 1) < 1:
        parser.error("--threads, --prompt and --rounds must be at least 1, --tokens at least 2")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    print(f"python {shlex.join(sys.argv)}\n{platform.platform()}, {os.cpu_count()} cores, {options.threads} threads, "
          f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}; {clock.__name__}", flush=True)

    def seconds(work: Callable[[], object]) -> float:
        started = clock()
        work()
        return clock() - started

    numbers = torch.ones(2**27)
    prompt = torch.randint(1000, (options.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    systems = {(name, precision): {"minisft": minisft, "transformers": transformers}[name](
        options.model, DTYPES[precision]) for precision in options.precision for name in options.systems}
    results: dict[tuple[str, str], list] = {system: [] for system in systems}
    for turn in range(options.rounds + 1):  # the first does not count
        for system, (run, size) in systems.items():
            bandwidth = numbers.nbytes / min(seconds(numbers.max) for _ in range(4))
            first = min(seconds(lambda run=run: run(prompt, 1)) for _ in range(2))
            rate = (options.tokens - 1) / (seconds(lambda run=run: run(prompt, options.tokens)) - first)
            if turn:
                results[system].append((rate, bandwidth, rate * size / bandwidth))
    for (name, precision), rows in results.items():
        rate, bandwidth, share = map(median, zip(*rows, strict=True))
        print(f"{name:<14}{precision:<6}{systems[name, precision][1] / 1e6:>8.0f} MB{bandwidth / 1e9:>7.1f} GB/s"
              f"{rate:>8.1f} tokens/s{share:>8.1%} of limit", flush=True)


if __name__ == "__main__":
    main()
