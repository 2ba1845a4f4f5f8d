"""What becomes of a conversation in a pack, with the boundaries and without them: `isolation.py MODEL`.

The held-out questions of the demo, eight in a pack, seen by the same model in three ways: each by itself, packed with
`cu_seqlens`, and packed as one long document, as happens where boundaries are lost on the way to the attention.
"""

import sys
from itertools import accumulate

import torch

from minisft.config_io import load
from minisft.prepare import prepare
from minisft.pretrained import from_pretrained
from minisft.training.loss import masked_cross_entropy

TOGETHER = 8

model = from_pretrained(sys.argv[1])
prepared = prepare(load(["docs/experiments/look.toml", "--data.train", "runs/demo-world/heldout-questions.jsonl"]),
                   quiet=True)
logits = {"alone": [], "packed": [], "boundaries lost": []}
targets = []
for first in range(0, len(prepared.train), TOGETHER):
    documents = [prepared.train.document(i) for i in range(first, min(first + TOGETHER, len(prepared.train)))]
    parts = [torch.from_numpy(ids.astype("int64")) for ids, _ in documents]
    cu_seqlens, stream = torch.tensor([0, *accumulate(map(len, parts))]), torch.cat(parts)
    logits["alone"] += [model.logits(part) for part in parts]
    logits["packed"].append(model.logits(stream, cu_seqlens))
    logits["boundaries lost"].append(model.logits(stream))  # one document: positions run on, attention sees it all
    for part, (_, trained) in zip(parts, documents, strict=True):
        following, is_trained = part.roll(-1), torch.from_numpy(trained.astype(bool)).roll(-1)
        targets.append(torch.where(is_trained, following, -100))
targets = torch.cat(targets)
alone = torch.cat(logits["alone"])
for name, parts in logits.items():
    found = torch.cat(parts)
    same = "the same" if torch.allclose(found, alone, atol=1e-3) else f"up to {(found - alone).abs().max():.1f} off"
    print(f"{name:<16} loss {masked_cross_entropy(found, targets):.3f}, logits {same}")
