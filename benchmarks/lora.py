"""Adapters against full fine-tuning: trained parameters, memory and speed, on the same packs in turn.

    python benchmarks/lora.py MODEL DATA... [--steps 6] [--rounds 2] [--seq-len 1024] [--only NAME,...] [--json FILE]

MODEL is a Hugging Face folder, DATA conversations. Every turn is a run in a fresh process with the same seed and packs
(one a step) and bf16 arithmetic; the variants take turns for `rounds` rounds. Speed is that of the median step without
the first. Memory is the most that a process needed from the second step to the last: anonymous memory on a CPU,
allocated memory on a GPU. `state` is what persists: weights, gradients and moments.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from savers import run_apart

VARIANTS = {
    "full": {"optim.lr": 2e-5},
    "LoRA r=8": {"lora.rank": 8},
    "LoRA r=64": {"lora.rank": 64},
    "QLoRA r=8": {"lora.rank": 8, "lora.base": "nf4"},
    "QLoRA r=64": {"lora.rank": 64, "lora.base": "nf4"},
}


def measure(name: str, arguments: argparse.Namespace, folder: Path, turn: int) -> dict:
    """Run a variant in a fresh process and read its log."""
    settings = VARIANTS[name]
    run = folder / f"{settings.get('lora.rank', 0)}-{settings.get('lora.base', '')}-{turn}"
    figures, log = run_apart(name, arguments, run, {"optim.warmup_steps": 0, **settings})
    steps = [record for record in log if record["kind"] == "train"]
    state = figures["frozen"] + 2 * figures["parameters"] + figures["moments"]  # a gradient is as large as its rows
    return {**figures, "state": state, "loss": steps[-1]["loss"],
            "tokens/s": statistics.median(record["tokens_per_second"] for record in steps[1:]),
            "tokens a step": statistics.mean(record["tokens"] for record in steps[1:])}


def main() -> None:
    """Run the variants in turn, and print the table of their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lr", default="2e-4")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    turns: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for turn in range(arguments.rounds):
            for name in names:
                turns[name].append(measure(name, arguments, Path(folder).absolute(), turn))
                print(f"turn {turn + 1}: {name}: {turns[name][-1]['tokens/s']:,.0f} tokens/s", flush=True)
    print(f"{'':<12}{'trained':>13}{'share':>9}{'state, MiB':>12}{'peak, MiB':>11}{'tokens/s':>10}{'CPU s':>8}"
          f"{'loss':>9}")
    whole = turns.get("full", [{}])[0].get("trained")
    for name, found in turns.items():
        row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        share = f"{row['trained'] / whole:.2%}" if whole else ""
        print(f"{name:<12}{int(row['trained']):>13,}{share:>9}{row['state'] / 2**20:>12,.0f}"
              f"{row['peak'] / 2**20:>11,.0f}{row['tokens/s']:>10,.0f}{row['cpu seconds']:>8.2f}{row['loss']:>9.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(turns, indent=1))


if __name__ == "__main__":
    main()
