"""Packed documents that ranks share, with boundaries and without: `torchrun --nproc-per-node N shared.py MODEL DATA`.

The loss on the answers in DATA, each pack by one rank, and each by all N; then with attention that was not told where
documents end. And the probe of trl#6843: one token of a pack's first document is changed. In how many positions of the
other documents does the network then say something else?
"""

import sys
from dataclasses import replace
from functools import partial

import torch

from minisft import context
from minisft.config import Config, ParallelConfig, TrainConfig
from minisft.config_io import load
from minisft.data.batches import micro_batch
from minisft.evals.heldout import heldout_loss
from minisft.model import weights
from minisft.model.llama import Documents
from minisft.prepare import prepare
from minisft.runs.assemble import adapt
from minisft.training import parallel

SEQ_LEN, attend = 1024, context.attend
ranks = parallel.launched_rank()[1]
config = Config(train=TrainConfig(precision="fp32"), parallel=ParallelConfig(context=ranks, compile="false"))
prepared = prepare(load(["docs/experiments/look.toml", "--model.path", sys.argv[1], "--data.train", sys.argv[2],
                         "--data.seq_len", str(SEQ_LEN), "--data.template", "chatml"]), quiet=True)
world, source = parallel.start(config.parallel), weights.SafetensorsFolder(sys.argv[1])
model = parallel.build_model(source.config, world, config, adapt=partial(adapt, config=config))
weights.load(model, source)


def boundaries_lost(q, k, v, documents):
    """All of the stream, as one document."""
    return attend(q, k, v, Documents.of_lengths((len(q),)))


@torch.no_grad()
def changed(shared):
    """Share of the positions outside the first document that say something else if a token in it is another."""
    whole, found = micro_batch(prepared.train, list(range(8)), multiple=shared), []
    tokens, first = whole.tokens.clone(), whole.lengths[0]
    tokens[first // 2] += 1
    for batch in (whole, replace(whole, tokens=tokens)):
        batch = batch.part(world.rank % shared, shared)
        documents = Documents(whole.cu_seqlens, whole.cu_seqlens, batch.positions, batch.longest, ranks=shared)
        found.append(model(batch.tokens, documents, lambda hidden, head: hidden))
    others = batch.document_ids != 0
    counted = torch.stack([((found[0] != found[1]).any(dim=1) & others).sum(), others.sum()])
    return float.__truediv__(*map(float, parallel.all_sum(counted)))


for name, shared, kernel in (("each pack on one rank", 1, attend), (f"each pack on {ranks} ranks", ranks, attend),
                             (f"{ranks} ranks, boundaries lost", ranks, boundaries_lost)):
    context.attend = kernel
    loss = heldout_loss(model, prepared.train, replace(world, context=shared), seq_len=SEQ_LEN)
    others = changed(shared)
    if world.is_main:
        print(f"{name:<28} loss {loss:.6f}, {others:.1%} of the other documents' positions change", flush=True)
parallel.stop()
