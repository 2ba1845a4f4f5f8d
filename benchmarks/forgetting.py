"""What fine-tuning forgets, and what helps: the same conversations with replay, LoRA, or a lower learning rate.

    python benchmarks/forgetting.py MODEL CONVERSATIONS... --text FILE [--steps 100] [--lr 2e-4] [--only NAME,...]

MODEL is a Hugging Face folder, CONVERSATIONS files in any format that minisft reads (here in another language than the
model's), --text JSON lines with general text in "text". data.eval_fraction holds out a part of the conversations; every
tenth distinct line of the text (at most --held) is held out as data.general, and replay draws from the others. Each run
is train.py in a fresh process, with the same seed, packs of --seq-len tokens (longer documents are truncated), and a
cosine schedule with a tenth of the steps as warm-up. Runs with replay take as many more steps as replay takes room, so
all runs see about as many tokens of the conversations. LoRA trains at --lora-lr.

The figures are those of `training.json` in each run's folder: losses in nats a token before and after, and forgetting,
the rise on general text.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
EVERY = 10  # of so many distinct lines of the text, one is held out
COLUMNS = ("steps", "rate", "conversations before", "after", "general text before", "after", "forgetting", "minutes")


def variants(arguments: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Return name -> settings of each run, beyond those that all share."""
    found: dict[str, dict[str, object]] = {"no replay": {}}
    for ratio in (0.05, 0.2):
        found[f"replay {ratio:.0%}"] = {"data.replay": "replay", "data.replay_ratio": ratio,
                                        "train.max_steps": round(arguments.steps / (1 - ratio))}
    lora = {"lora.rank": arguments.lora_rank, "lora.alpha": 2 * arguments.lora_rank, "optim.lr": arguments.lora_lr}
    return found | {"LoRA": lora, "lower rate": {"optim.lr": arguments.lr / 5}}


def split(text: Path, held: int) -> tuple[list[str], list[str]]:
    """Split the distinct lines of `text`: (held out, for replay)."""
    lines = list(dict.fromkeys(line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()))
    held_out = lines[::EVERY][:held]
    taken = set(held_out)
    return held_out, [line for line in lines if line not in taken]


def measure(name: str, settings: dict[str, object], arguments: argparse.Namespace, folder: Path) -> dict:
    """Run in a fresh process; returns the run's record."""
    run = folder / name.replace(" ", "-").replace("%", "")
    (folder / "recipe.toml").write_text("")
    given = {"model.path": arguments.model, "data.train": ",".join(arguments.data),
             "data.eval_fraction": arguments.share, "data.general": folder / "general.jsonl",
             "data.seq_len": arguments.seq_len, "data.overlong": "truncate", "data.template": arguments.template,
             "data.cache": folder / "cache", "batch.packs": arguments.packs, "train.epochs": 1000,
             "train.max_steps": arguments.steps, "optim.lr": arguments.lr, "optim.warmup_steps": arguments.steps // 10,
             "checkpoint.every": 0, "run.dir": run, **settings}
    if "data.replay" in given:
        given["data.replay"] = folder / "replay.jsonl"
    command = [sys.executable, str(TRAIN), str(folder / "recipe.toml")]
    for key, value in given.items():
        command += [f"--{key}", str(value)]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}")
    record = json.loads((run / "final" / "training.json").read_text(encoding="utf-8"))
    shutil.rmtree(run / "final")  # the weights of all runs would fill the disk
    held = [found for source, found in record["losses"].items() if source != "general"]
    tokens = sum(found["target_tokens"] for found in held)
    conversations = [sum(found[when] * found["target_tokens"] for found in held) / tokens for when in
                     ("before", "after")]
    general = record["losses"]["general"]
    return {"steps": record["steps"], "rate": float(given["optim.lr"]), "conversations": conversations,
            "general": [general["before"], general["after"]], "forgetting": general["forgetting"],
            "held_out_tokens": tokens, "general_tokens": general["target_tokens"], "trained_tokens":
            record["target_tokens"], "seconds": time.monotonic() - started, "commit": record["commit"],
            "torch": record["torch"]}


def row(name: str, found: dict) -> str:
    """Return a line of the Markdown table."""
    losses = [f"{loss:.3f}" for loss in (*found["conversations"], *found["general"])]
    return (f"| {name} | {found['steps']} | {found['rate']:g} | {' | '.join(losses)} | {found['forgetting']:+.3f} | "
            f"{found['seconds'] / 60:.1f} |")


def main() -> None:
    """Run the variants one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--template", default="")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--packs", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.06, help="share of the conversations to hold out")
    parser.add_argument("--held", type=int, default=24, help="general texts to hold out")
    parser.add_argument("--only", default="", help="names of runs, separated by commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = variants(arguments)
    if unknown := {name for name in arguments.only.split(",") if name} - runs.keys():
        parser.error(f"--only: unknown run {', '.join(sorted(unknown))}; choose from {', '.join(runs)}")
    held_out, replay = split(arguments.text, arguments.held)
    print(f"general text: {len(held_out)} documents held out, {len(replay)} to replay", file=sys.stderr)
    for cells in (("run", *COLUMNS), ["---"] * (len(COLUMNS) + 1)):
        print(f"| {' | '.join(cells)} |", flush=True)
    rows = {}
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary).absolute()
        for name, lines in (("general", held_out), ("replay", replay)):
            (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for name in arguments.only.split(",") if arguments.only else runs:
            rows[name] = measure(name, runs[name], arguments, folder)
            print(row(name, rows[name]), flush=True)
    if arguments.json:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"settings": settings, "threads": os.environ.get("OMP_NUM_THREADS"),
                                              "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
