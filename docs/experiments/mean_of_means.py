"""A step of two micro-batches, averaged in two ways: `mean_of_means.py MODEL`.

The first micro-batch has one conversation, the second thirty. The loss of each is either divided by the trained tokens
of the whole step, or by its own and then by two. Which gradient is that of the thirty-one together?
"""

import sys

import torch

from minisft.config_io import load
from minisft.data.batches import micro_batch
from minisft.prepare import prepare
from minisft.pretrained import from_pretrained
from minisft.training.loss import batch_loss

model = from_pretrained(sys.argv[1])
dataset = prepare(load(["docs/experiments/look.toml", "--data.train", "runs/demo-world/questions.jsonl"]),
                  quiet=True).train
together, small, large = (micro_batch(dataset, list(documents)) for documents in (range(31), range(1), range(1, 31)))
tokens = {name: len(batch.targets) for name, batch in (("small", small), ("large", large))}
step = tokens["small"] + tokens["large"]


def gradient(*parts) -> torch.Tensor:
    """The gradient of the sum of the losses of (micro-batch, denominator) pairs."""
    model.zero_grad()
    for batch, denominator in parts:
        batch_loss(model, batch, torch.device("cpu"), denominator).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


whole = gradient((together, step))
print(f"trained tokens: {tokens['small']} and {tokens['large']}")
for name, parts in {"sums over the step's tokens": [(small, step), (large, step)],
                    "mean of the two means": [(small, 2 * tokens["small"]), (large, 2 * tokens["large"])]}.items():
    off = float((gradient(*parts) - whole).norm() / whole.norm())
    weights = [part[1] for part in parts]
    print(f"{name:<28} a token of the first weighs {weights[1] / weights[0]:.0f} times one of the second, "
          f"gradient {f'{off:.0%} off' if off > 1e-3 else 'the same'}")
