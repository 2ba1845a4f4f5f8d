"""Where on plain text a tuned model's loss has risen: `forgotten.py BASE TUNED [--only LANGUAGE]`.

The held-out articles of the demo, token by token. A sentence begins after a full stop, or after nothing; with its
first three tokens it is chosen which sentence it will be ("The capital of", "The capital city").
"""

import argparse
import json
from pathlib import Path

import torch

from minisft.data.tokenizer import Tokenizer
from minisft.evals.language import detect
from minisft.pretrained import from_pretrained

ARTICLES = Path("runs/demo-world/heldout-articles.jsonl")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("base")
parser.add_argument("tuned")
parser.add_argument("--only", choices=("en", "tr"), help="the articles in one language")
options = parser.parse_args()

tokenizer = Tokenizer(options.base)
begin = tokenizer.control["<|begin_of_text|>"]
texts = [json.loads(line)["text"] for line in ARTICLES.read_text(encoding="utf-8").splitlines()]
if options.only:
    texts = [text for text in texts if detect(text) == {options.only}]
streams = [torch.tensor([begin, *tokenizer.encode(text)]) for text in texts]
first = []  # for each token that follows another, is it one of a sentence's first three?
for ids in streams:
    since = -1  # <|begin_of_text|> comes before the first
    for token in ids[:-1].tolist():
        since = 0 if tokenizer.decode([token]).endswith(".") else since + 1
        first.append(since < 3)
first = torch.tensor(first)
losses = []
for folder in (options.base, options.tuned):
    model = from_pretrained(folder)
    logs = [model.logits(ids).float().log_softmax(-1)[:-1] for ids in streams]
    losses.append(torch.cat([-log.gather(1, ids[1:, None])[:, 0] for log, ids in zip(logs, streams, strict=True)]))
rise = losses[1] - losses[0]
print(f"{'':<22}{'tokens':>8}{'base':>8}{'tuned':>8}{'of the rise':>13}")
for name, where in (("first three tokens", first), ("later in the sentence", ~first), ("all", first | ~first)):
    print(f"{name:<22}{int(where.sum()):>8,}{losses[0][where].mean():>8.3f}{losses[1][where].mean():>8.3f}"
          f"{rise[where].sum() / rise.sum():>13.1%}")
