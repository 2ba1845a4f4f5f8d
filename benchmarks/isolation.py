"""Does it matter in fine-tuning whether the documents of a pack see each other?

    python benchmarks/isolation.py MODEL DATA... [--seq-len 1024 4096] [--seeds 0 1 2] [--json FILE]

Each set of conversations is trained twice for each length of a pack and each seed, with the same packs in the same
order. *Isolated*: attention ends at a document's boundaries, and its positions start at 0. *Leaking*: a pack is one
document, so each conversation sees those before it, as where boundaries are lost or never were. A tenth is held out and
always read one conversation at a time, as users ask:

    loss      nats a trained token
    tokens    share of the answers' tokens that were the most likely ones
    answers   share of the answers of which every token was: greedy decoding would give exactly these
"""

import argparse
import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.config import Config
from minisft.config_io import load
from minisft.data import batches
from minisft.data.batches import MicroBatch
from minisft.data.dataset import Dataset
from minisft.data.packing import Plan
from minisft.model import weights
from minisft.model.llama import Documents
from minisft.prepare import prepare
from minisft.runs.assemble import adapt, open_optimizer
from minisft.training import parallel
from minisft.training.loop import training_steps

MEASURES = ("loss", "tokens", "answers")
micro_batch = batches.micro_batch


def leaking(*given: Any, **options: Any) -> MicroBatch:
    """A micro-batch of one document; padding stays apart."""
    batch = micro_batch(*given, **options)
    used, size = int((batch.document_ids >= 0).sum()), len(batch.tokens)
    lengths = (used, size - used) if used < size else (used,)
    documents = Documents.of_lengths(lengths)
    return replace(batch, lengths=lengths, cu_seqlens=documents.cu_seqlens, positions=documents.positions)


@torch.no_grad()
def held_out(model: nn.Module, dataset: Dataset, world: parallel.World, *, seq_len: int, fixed: bool) -> list[float]:
    """The measures of `model` on `dataset`, its documents isolated."""
    plan = Plan(dataset.lengths, dataset.num_loss_tokens, seq_len=seq_len, packs_per_step=1, epochs=1, shuffle=False)
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    answers: list[Tensor] = []  # a number for each token's answer
    with closing(batches.steps(dataset, plan, fixed=fixed, device=world.device)) as planned:
        for batch in (batch for step in planned for batch in step.micro_batches):
            offsets, batch = batch.cu_seqlens, batch.to(world.device)
            documents = Documents(offsets, batch.cu_seqlens, batch.positions, batch.longest, batch.document_ids)
            logits = model(batch.tokens, documents, lambda hidden, head, at=batch.target_at: F.linear(
                hidden[at], head.to(hidden.dtype)).float())
            losses.append(F.cross_entropy(logits, batch.targets, reduction="none"))
            hits.append(logits.argmax(dim=1) == batch.targets)
            follows = F.pad(batch.target_at.diff() == 1, (1, 0))  # two answers are never next to each other
            answers.append((~follows).cumsum(0) - 1 + (answers[-1][-1] + 1 if answers else 0))
    answer, hit = torch.cat(answers), torch.cat(hits).float()
    whole = torch.ones(int(answer[-1]) + 1, device=hit.device).scatter_reduce(0, answer, hit, "amin")
    return [float(torch.cat(losses).mean()), float(hit.mean()), float(whole.mean())]


def settings(options: argparse.Namespace, data: str, seq_len: int, seed: int) -> Config:
    """The configuration of a run."""
    given = {"model.path": options.model, "data.train": data, "data.template": options.template,
             "data.eval_fraction": 0.1, "data.seq_len": seq_len, "data.overlong": "truncate",
             "batch.packs": max(options.tokens // seq_len, 1), "train.epochs": options.epochs, "train.seed": seed,
             "train.precision": options.precision, "optim.lr": options.lr, "optim.warmup_steps": 5}
    if options.max_steps:
        given["train.max_steps"] = options.max_steps
    recipe = str(Path(__file__).parents[1] / "docs/experiments/look.toml")
    return load([recipe, *(text for key, value in given.items() for text in (f"--{key}", str(value)))])


def study(options: argparse.Namespace, data: str, seq_len: int, world: parallel.World) -> list[dict[str, Any]]:
    """Train a set in packs of one length: a record for each seed and way."""
    torch._dynamo.reset()
    config, source, found = settings(options, data, seq_len, 0), weights.SafetensorsFolder(options.model), []
    fixed = parallel.is_compiled(config.parallel, world.device)
    model = parallel.build_model(source.config, world, config, adapt=partial(adapt, config=config))
    for seed in options.seeds:
        config = settings(options, data, seq_len, seed)
        prepared = prepare(config, quiet=True)
        [test] = prepared.evals.values()
        measured = partial(held_out, model, test, world, seq_len=seq_len, fixed=fixed)
        facts = {"data": Path(data).name, "seq_len": seq_len, "seed": seed, "steps": prepared.plan.total_steps,
                 "documents": len(prepared.train.lengths), "held_out": len(test.lengths),
                 "in_a_pack": float(seq_len / prepared.train.lengths.mean())}
        for way, made in (("isolated", micro_batch), ("leaking", leaking)):
            weights.load(model, source)
            before = measured()
            optimizer = open_optimizer(model, config, world)
            with mock.patch.object(batches, "micro_batch", made):
                losses = [step.loss for step in training_steps(model, optimizer, prepared.train, prepared.plan, config,
                                                               world)]
            found.append({**facts, "way": way, "before": before, "after": measured(),
                          "trained": float(torch.stack(losses[-5:]).mean())})
            print(json.dumps(found[-1]), flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A line for each set and length: the means of both ways, and leaking less isolated for each seed."""
    lines = ["| set | packs | conversations in a pack | steps | measure | before | isolated | leaking "
             "| leaking - isolated, each seed |", "|---|---|---|---|---|---|---|---|---|"]
    for key in dict.fromkeys((record["data"], record["seq_len"]) for record in found):
        ways = {way: [r for r in found if (r["data"], r["seq_len"], r["way"]) == (*key, way)]
                for way in ("isolated", "leaking")}
        first = ways["isolated"][0]
        for i, measure in enumerate(MEASURES):
            alone, mixed = ([r["after"][i] for r in records] for records in ways.values())
            rises = ", ".join(f"{b - a:+.4f}" for a, b in zip(alone, mixed, strict=True))
            lines.append(f"| {key[0]} | {key[1]} | {first['in_a_pack']:.1f} | {first['steps']} | {measure} | "
                         f"{first['before'][i]:.4f} | {mean(alone):.4f} | {mean(mixed):.4f} | {rises} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study, and print a line a run and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--seq-len", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for name, default in (("template", "chatml"), ("epochs", 3), ("tokens", 4096), ("lr", 2e-4),
                          ("precision", "bf16"), ("max-steps", 0)):
        parser.add_argument(f"--{name}", default=default, type=type(default))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    world = parallel.start()
    found = [record for data in options.data for seq_len in options.seq_len
             for record in study(options, data, seq_len, world)]
    print("\n" + table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    parallel.stop()


if __name__ == "__main__":
    main()
