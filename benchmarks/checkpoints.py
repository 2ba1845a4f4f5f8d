"""Seconds that a save and a resume take, against torch.save and torch.load of the same tensors.

    python benchmarks/checkpoints.py MODEL [--rounds N]

MODEL is a Hugging Face folder. The state is what a run saves: fp32 weights and both moments of AdamW, 12 bytes a
parameter. `stall` is how long the training step waits; `durable` is until everything is on the disk, with fsync on both
sides. minisft also computes sha256 digests when it saves, and checks them when it resumes.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from minisft.config import Config, TrainConfig
from minisft.model import weights
from minisft.model.llama_config import read_config
from minisft.training import parallel
from minisft.training.checkpoint import SavedState, Saver
from minisft.training.optimizer import MOMENTS, AdamW


def tensors(optimizer: AdamW) -> dict[str, torch.Tensor]:
    """What both sides write."""
    state = {name: rows.detach() for name, rows in optimizer.rows.items()}
    return state | {f"{moment}/{name}": t for moment in MOMENTS for name, t in optimizer.moments(moment).items()}


def one_round(folder: Path, optimizer: AdamW, world: parallel.World) -> dict[str, float]:
    """Seconds of each part, minisft and torch one after the other."""
    seconds = {}

    def measured(name: str, since: float) -> float:
        seconds[name] = time.perf_counter() - since
        return time.perf_counter()

    saver, now = Saver(folder / "ours", world, keep=1), time.perf_counter()
    step = 1 + max((int(path.name[5:]) for path in (folder / "ours").iterdir()), default=0)
    saver.save(step, optimizer, {"adam_steps": optimizer.steps(), "fingerprint": {}})
    measured("minisft save: stall", now)
    saver.finish()
    now = measured("minisft save: durable", now)
    with open(folder / "theirs.pt", "wb") as file:
        torch.save(tensors(optimizer), file)
        file.flush()
        os.fsync(file.fileno())
    now = measured("torch.save: durable (all of it stalls)", now)
    saved = SavedState(folder / f"ours/step-{step:06}")
    saved.verify()
    between = measured("minisft resume: digests", now)
    saved.restore(optimizer, world)
    measured("minisft resume: tensors", between)
    now = measured("minisft resume: in all", now)
    with torch.no_grad():
        for name, tensor in torch.load(folder / "theirs.pt", weights_only=True).items():
            tensors(optimizer)[name].copy_(tensor)
    measured("torch.load: in all", now)
    return seconds


def main() -> None:
    """Print the median of each part over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    world = parallel.start()
    model = parallel.build_model(read_config(arguments.model), world, Config(train=TrainConfig(precision="fp32")))
    weights.load(model, weights.SafetensorsFolder(arguments.model))
    optimizer = AdamW(model, mesh=world.mesh)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        rounds = [one_round(Path(folder), optimizer, world) for _ in range(arguments.rounds)]
    size = sum(tensor.nbytes for tensor in tensors(optimizer).values())
    print(f"{size:,} bytes; median (least, most) of {arguments.rounds} rounds, seconds")
    for name in rounds[0]:
        figures = [figure[name] for figure in rounds]
        print(f"{name:<42}{statistics.median(figures):>8.2f} ({min(figures):.2f}, {max(figures):.2f})")
    parallel.stop()


if __name__ == "__main__":
    main()
