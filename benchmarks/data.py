"""The cost of data: tokenising against the tokenizer alone and against TRL, memory, packing, balance of the ranks.

    python benchmarks/data.py tokenise FILE TOKENIZER [--conversations N] [--join N] [--rounds N]
    python benchmarks/data.py trl      FILE TOKENIZER [--conversations N] [--join N] [--rounds N]
    python benchmarks/data.py memory   FILE TOKENIZER [--conversations N] [--join N]
    python benchmarks/data.py packing  FILE TOKENIZER [--conversations N] [--seq-len N] [--epochs N]
    python benchmarks/data.py balance  FILE TOKENIZER [--conversations N] [--seq-len N] [--ranks N] [--packs N]

FILE is a JSON array of ShareGPT conversations, TOKENIZER a folder with a tokenizer.json. The conversations are repeated
with one word in ten misspelt, so that the tokenizer's word cache does not flatter the figures; `--join` merges several
into a longer one. Everything compared runs on all cores, in turn in one process. Times are medians of the rounds, wall
time and CPU time: on a machine that others use, only the CPU time is steady.

Packing needs only lengths: those of FILE, each times exp(N(0, 0.1)), and those of a model of long conversations,
lognormal with a median of 1,000 tokens and sigma 1.1; lengths over --seq-len are left out.
"""

import argparse
import json
import logging
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import tokenizers

from minisft.config import DataConfig, Source
from minisft.data.batches import deal
from minisft.data.chat import Renderer
from minisft.data.conversation import Conversation
from minisft.data.packing import Plan
from minisft.data.store import BATCH, Store, open_store
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.formats.parse import read
from minisft.prepare import read_source


def varied(conversations: list[dict], count: int, join: int, misspelt: float = 0.1) -> Iterator[dict]:
    """Yield `count` conversations, each of `join` of the given ones in a row, with misspelt words."""
    rng = random.Random(0)

    def misspell(word: re.Match) -> str:
        if rng.random() >= misspelt:
            return word[0]
        place = rng.randrange(len(word[0]))
        return word[0][:place] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[0][place + 1 :]

    for i in range(count):
        turns = [turn for k in range(join) for turn in conversations[rng.randrange(len(conversations))
                                                                     if k else i % len(conversations)]["conversations"]]
        yield {"conversations": [{**turn, "value": re.sub(r"\w+", misspell, turn["value"])} for turn in turns]}


def load(file: Path) -> list[dict]:
    """Read the conversations of FILE. Raises UserError if `varied` and `trl` cannot use them."""
    try:
        conversations = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:  # broken JSON or UTF-8
        raise UserError(f"{file}: not a JSON array ({error}); this benchmark reads only ShareGPT's .json") from None
    try:
        roles = {turn["from"] for record in conversations for turn in record["conversations"] if turn["value"] + ""}
    except (TypeError, KeyError):
        raise UserError(f"{file}: not in ShareGPT's form, [{{\"conversations\": [{{\"from\", \"value\"}}, ...]}}, "
                        "...]") from None
    if not roles or roles - {"human", "gpt"}:
        raise UserError(f"{file}: turns must be from \"human\" and \"gpt\"; found {', '.join(sorted(roles)) or 'none'}")
    return conversations


def write(options: argparse.Namespace, folder: Path) -> Path:
    """Write a run's JSON lines: at most 20,000 different ones, repeated with a number of their own."""
    file = folder / "data.jsonl"
    conversations = load(options.file)
    records = [json.dumps(record, ensure_ascii=False)
               for record in varied(conversations, min(options.conversations, 20_000), options.join)]
    with open(file, "w", encoding="utf-8") as out:
        for i in range(options.conversations):
            again = i // len(records)
            out.write(records[i % len(records)].replace('"value": "', f'"value": "{again} ' if again else '"value": "')
                      + "\n")
    return file


def store_of(file: Path, renderer: Renderer, cache: Path) -> Store:
    """The store of a file."""
    source = Source(str(file), format="auto", name="bench")
    return open_store(source, DataConfig(cache=str(cache)), renderer, read_source, quiet=True)


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def tokenise(options: argparse.Namespace, folder: Path) -> None:
    """Compare making the store from the file with ways to have the tokenizer alone do the same."""
    file = write(options, folder)
    renderer = Renderer(load_templates()["llama3"], Tokenizer(options.tokenizer))
    backend = tokenizers.Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    backend.encode_special_tokens = True
    rendered = [renderer.pieces(c) for c in read(file) if isinstance(c, Conversation)]
    batches = [rendered[i : i + BATCH] for i in range(0, len(rendered), BATCH)]
    whole = [["".join(piece.text for piece in pieces) for pieces in batch] for batch in batches]
    apart = [[piece.text for pieces in batch for piece in pieces if not piece.control] for batch in batches]

    def alone(encode: Callable, texts: list[list[str]]) -> Callable[[], object]:
        def work() -> None:
            for batch in texts:
                encode(batch, add_special_tokens=False)
        return work

    def store() -> None:
        cache = Path(tempfile.mkdtemp(dir=folder))
        made.append(store_of(file, renderer, cache))

    made: list = []
    ways = {
        "encode_batch, a text a conversation": alone(backend.encode_batch, whole),
        "encode_batch_fast, the same": alone(backend.encode_batch_fast, whole),
        "encode_batch, a text a piece": alone(backend.encode_batch, apart),
        "encode_batch_fast, the same pieces": alone(backend.encode_batch_fast, apart),
        "minisft's store, from the file": store,
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, work in ways.items():
            seconds[name].append(clocked(work))
    report, first = made[0].report, next(iter(ways))
    print(f"{report.kept:,} conversations of {report.tokens / report.kept:.0f} tokens, {report.turns:,} turns of "
          f"{report.tokens / report.turns:.0f}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, times in seconds.items():
        wall, cpu = (median(column) for column in zip(*times, strict=True))
        ratio = median(time[0] / base[0] for time, base in zip(times, seconds[first], strict=True))
        print(f"{name:<38}{wall:7.2f} s{cpu:7.2f} CPU s  {report.tokens / wall / 1e6:5.2f} M tokens/s  "
              f"{report.tokens / cpu / 1e6:5.2f} M tokens/CPU s  wall x{ratio:.2f} of the first")


def trl(options: argparse.Namespace, folder: Path) -> None:
    """Time `SFTTrainer._prepare_dataset` alone, without a model (tokenise, mask, pack), and then the store.

    One extra round comes first and does not count: in it TRL imports and compiles its template.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import datasets
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer
        from trl.chat_template_utils import llama3_training_chat_template
    except ImportError as error:
        raise UserError(f"{error}: run pip install -e '.[bench]' first, which installs TRL") from None

    file = write(options, folder)
    for library in ("datasets", "trl", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    args = SFTConfig(output_dir=str(folder), assistant_only_loss=True, packing=True, max_length=8192, bf16=False,
                     dataset_num_proc=os.cpu_count(), report_to=[], use_cpu=True)
    trainer = SimpleNamespace(chat_template=llama3_training_chat_template, completion_only_loss=False,
                              _tokenizer=tokenizer)
    renderer = Renderer(load_templates()["llama3"], Tokenizer(options.tokenizer))
    names = {"human": "user", "gpt": "assistant"}
    records = [{"messages": [{"role": names[turn["from"]], "content": turn["value"]}
                             for turn in json.loads(line)["conversations"]]} for line in file.read_bytes().splitlines()]
    dataset, found = datasets.Dataset.from_list(records), {}
    times = {"TRL": [], "minisft": []}
    for _ in range(options.rounds + 1):
        times["TRL"].append(clocked(lambda: found.update(TRL=SFTTrainer._prepare_dataset(
            trainer, dataset, tokenizer, args, True, None, "bench")))[0])
        cache = Path(tempfile.mkdtemp(dir=folder))
        times["minisft"].append(clocked(lambda cache=cache: found.update(minisft=store_of(
            file, renderer, cache)))[0])
    tokens = sum(map(len, found["TRL"]["input_ids"])), found["minisft"].report.tokens
    times = {name: seconds[1:] for name, seconds in times.items()}
    for (name, seconds), count in zip(times.items(), tokens, strict=True):
        print(f"{name:<10}{median(seconds):8.2f} s{count:12,} tokens{count / median(seconds) / 1e6:8.3f} M tokens/s")
    print(f"minisft is {median(times['TRL']) / median(times['minisft']):.1f} times as fast "
          f"(TRL with {os.cpu_count()} processes and packing; minisft from the file, without packing)")


MEMORY = """
import sys, time
from pathlib import Path
from minisft.config import DataConfig
from minisft.data.chat import Renderer
from minisft.data.store import open_store
from minisft.data.templates import load_templates
from minisft.data.tokenizer import Tokenizer
from minisft.config import Source
from minisft.prepare import read_source
def peak():  # of this program; ru_maxrss would start from that of the process that called it
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20
imported = peak()
file, tokenizer, cache, what = sys.argv[1:]
renderer = Renderer(load_templates()["llama3"], Tokenizer(tokenizer))
if what == "make":
    time.sleep(2.1)  # a file that was written just now is not remembered
loaded, start = peak(), time.perf_counter()
source = Source(file, format="auto", name="bench")
store = open_store(source, DataConfig(cache=cache), renderer, read_source, quiet=True)
seconds = time.perf_counter() - start
print(f"{what}: {len(store):,} documents, {store.report.tokens:,} tokens in {seconds:.3f} s; peak GiB of RSS: "
      f"{imported:.2f} imported, {loaded:.2f} with the tokenizer, {peak():.2f} in the end")
"""


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Make and reopen the store of many conversations, each in its own process."""
    Renderer(load_templates()["llama3"], Tokenizer(options.tokenizer))  # fails here, in one line, if it is broken
    file = write(options, folder)
    print(f"{file.stat().st_size / 1e6:,.0f} MB of JSON lines")
    for what in ("make", "open"):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(file), str(options.tokenizer), str(folder / "cache"),
                               what])
        if done.returncode:
            raise UserError(f"{what}: the process ended with code {done.returncode} (-9: out of memory)")


def lengths_of(options: argparse.Namespace, folder: Path) -> dict[str, np.ndarray]:
    """Return (n,) tokens of each document, by the source of the lengths."""
    renderer = Renderer(load_templates()["llama3"], Tokenizer(options.tokenizer))
    store = store_of(options.file, renderer, folder)
    rng, count, found = np.random.default_rng(0), options.conversations, np.diff(store.offsets)
    noisy = np.rint(rng.choice(found, 2 * count) * np.exp(rng.normal(0, 0.1, 2 * count)))
    model = np.exp(rng.normal(np.log(1000), 1.1, 2 * count)) + 20
    return {name: lengths[lengths <= options.seq_len][:count].astype(np.int64)
            for name, lengths in ((options.file.name, noisy), ("lognormal", model))}


def packing(options: argparse.Namespace, folder: Path) -> None:
    """Print time, fill and memory of a run's plan."""
    for name, lengths in lengths_of(options, folder).items():
        plans: list[Plan] = []
        wall, cpu = clocked(lambda lengths=lengths, plans=plans: plans.append(Plan(
            lengths, lengths, seq_len=options.seq_len, packs_per_step=32, epochs=options.epochs)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name:<24}{len(lengths):>12,} documents, {options.epochs} epochs of {options.seq_len:,} tokens a pack: "
              f"{wall:6.2f} s, {cpu:6.2f} CPU s, {plans[0].fill():.3%} full, peak {peak:.2f} GiB of RSS so far")


def balance(options: argparse.Namespace, folder: Path) -> None:
    """Compare how uneven ranks are when packs are dealt in turn and by cost (documents' length squared).

    `wait`: in each round all ranks wait for the most expensive micro-batch; the sum of these over the mean rank's sum.
    """
    ranks = options.ranks
    for name, lengths in lengths_of(options, folder).items():
        plan = Plan(lengths, lengths, seq_len=options.seq_len, packs_per_step=ranks * options.packs, epochs=1)
        rows: dict[str, list] = {"dealt in turn": [], "dealt by cost": []}
        epoch, size = plan.epoch(0), ranks * options.packs
        if len(epoch) < size:
            raise UserError(f"{name}: does not make a full step of {ranks} x {options.packs} packs of "
                            f"{options.seq_len:,} tokens; raise --conversations, or lower --packs, --ranks, --seq-len")
        for first in range(0, min(300 * size, len(epoch) // size * size), size):  # full steps; a plan has smaller ones
            costs = np.array([np.square(lengths[epoch.pack(i)]).sum() for i in range(first, first + size)])
            in_turn = [list(range(rank, len(costs), ranks)) for rank in range(ranks)]
            for way, hands in zip(rows, (in_turn, deal(costs, ranks=ranks)), strict=True):
                table = np.array([costs[hand] for hand in hands])
                sums = table.sum(axis=1)
                rows[way].append((np.ptp(sums) / sums.mean(), table.max(axis=0).sum() / sums.mean()))
        for way, figures in rows.items():
            spread, wait = np.array(figures).T
            print(f"{name:<24}{way}, {ranks} x {options.packs} packs of {options.seq_len:,}, {len(figures)} steps: "
                  f"(most - least) / mean {np.median(spread):6.1%} at the median, {np.percentile(spread, 90):6.1%} at "
                  f"the 90th percentile; wait {wait.mean():.2f}")


def main() -> None:
    """Run one measurement and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {part.__name__: part for part in (tokenise, trl, memory, packing, balance)}
    parser.add_argument("what", choices=parts)
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--join", type=int, default=1, help="conversations merged into one (1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--packs", type=int, default=4, help="packs of a rank in a step (4)")
    options = parser.parse_args()
    for name in ("conversations", "join", "rounds", "seq_len", "epochs", "ranks", "packs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        with tempfile.TemporaryDirectory() as folder:
            parts[options.what](options, Path(folder))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
