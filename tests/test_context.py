"""Ranks that share a stream compute what one process computes, whatever the documents and whoever else shares it.

The oracle is docs/one_file.py, which imports nothing of the package: one process, one document after another, AdamW of
torch. Ranks are processes that exchange by gloo.
"""

import os
import runpy
import socket
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from small_runs import HERE, final_weights, log, options, train
from test_communication import Bytes
from test_compiled_gradients import Drawn
from torch.testing._internal.distributed.fake_pg import FakeStore

from minisft import context
from minisft.config import BatchConfig, Config, LoraConfig, OptimConfig, ParallelConfig, TrainConfig
from minisft.data.batches import MicroBatch, micro_batch
from minisft.data.packing import Plan
from minisft.errors import UserError
from minisft.evals.heldout import continue_greedily, heldout_loss
from minisft.lora import adapters as lora
from minisft.model import weights
from minisft.model.llama import Documents
from minisft.model.llama_config import LlamaConfig
from minisft.runs import assemble
from minisft.runs.lifecycle import main
from minisft.training import parallel
from minisft.training.loop import planned_steps, training_steps
from minisft.training.loss import batch_loss
from minisft.training.optimizer import AdamW

NETWORK = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
                      num_key_value_heads=4, head_dim=8)
SEQ_LEN, STEPS, LR = 66, 10, 3e-3  # 4 does not divide it
# Tokens, and from which on they are trained: whole packs that cross every slice, some with targets in the last one
# only; a document of one token; short ones.
SHAPES = [(66, 60), (66, 1), (65, 64), (1, 1), (40, 3), (25, 20), (7, 6), (33, 8), (33, 30), (64, 2), (2, 1), (50, 9),
          (9, 4), (12, 1), (3, 2), (21, 13)]
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]]


class Set:
    """Documents of SHAPES."""

    def __init__(self):
        self.lengths = np.array([length for length, _ in SHAPES])
        self.num_loss_tokens = self.loss_weights = np.array([length - start for length, start in SHAPES])

    def document(self, index):
        length, start = SHAPES[index]
        tokens = np.random.default_rng(index).integers(0, NETWORK.vocab_size, length)
        return tokens, (np.arange(length) >= start).astype(np.uint8)


def config_of(shared=1, *, recompute="none", adapters=None, precision="fp32"):
    return Config(batch=BatchConfig(packs=4, micro_packs=1), lora=adapters or LoraConfig(),
                  train=TrainConfig(precision=precision), optim=OptimConfig(lr=LR, schedule="constant", warmup_steps=0),
                  parallel=ParallelConfig(context=shared, activation_checkpointing=recompute, compile="false"))


@cache
def plan():
    data = Set()
    return Plan(data.lengths, data.num_loss_tokens, seq_len=SEQ_LEN, packs_per_step=4, epochs=9, max_steps=STEPS)


def built(config, world):
    model = parallel.build_model(NETWORK, world, config, adapt=partial(assemble.adapt, config=config))
    if not config.lora.rank:
        weights.load(model, Drawn(NETWORK))
        return model
    lora.load(model, Drawn(NETWORK), seed=0)
    for _, module in lora.adapters(model):
        weights.local_rows(module.lora_B)[0].data.fill_(0.01)
    return model


def run(config, world):
    """What `world` computes: gradients of the first step, losses, norms and weights of all, and what evaluation says."""
    model, data, every = built(config, world), Set(), plan()
    lora.set_step(model, 0, 0)
    step = next(steps := planned_steps(data, every, config, world))
    steps.close()
    for batch in step.micro_batches:
        batch_loss(model, batch, world.device, step.target_tokens).backward()
    found = {f"gradient/{name}": weights.whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    optimizer, losses = AdamW(model, config.optim, world.mesh), []
    for result in training_steps(model, optimizer, data, every, config, world):
        losses.append((result.loss, result.grad_norm))
        lora.set_step(model, 0, result.step)
    answers = continue_greedily(model, PROMPTS, stop_ids={0}, device=world.device)
    heldout = heldout_loss(model, data, world, seq_len=SEQ_LEN)
    return {**found, "losses": torch.tensor(losses).T, "heldout": torch.tensor(heldout),
            "answers": torch.tensor([token for answer in answers for token in answer]),
            **{f"weight/{name}": weights.whole(p) for name, p in model.named_parameters()}}


def oracle():
    """The same, of a full fine-tuning, by docs/one_file.py."""
    theirs = runpy.run_path(str(HERE.parent / "docs/one_file.py"))
    model = theirs["Llama"](vars(NETWORK) | {"rope": {"rope_theta": NETWORK.rope_theta, "rope_type": "default"}})
    model.load_state_dict(Drawn(NETWORK).tensors)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    data, found, losses = Set(), {}, []

    def loss(documents):
        """The sum over the documents, one after another."""
        parts = ([tuple(part.tolist() for part in data.document(i))] for i in documents)
        return sum(model(theirs["stream"](part, "cpu")) for part in parts)

    for step in range(STEPS):
        documents = np.concatenate(plan().documents(step)).tolist()
        mean = loss(documents) / int(data.num_loss_tokens[documents].sum())
        mean.backward()
        if step == 0:
            found = {f"gradient/{name}": p.grad.clone() for name, p in model.named_parameters()}
        losses.append((mean.detach(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        heldout = loss(range(len(SHAPES))) / int(data.num_loss_tokens.sum())
    return {**found, "losses": torch.tensor(losses).T, "heldout": heldout,
            **{f"weight/{name}": p.detach() for name, p in model.named_parameters()}}


def leak(kind):
    """Plant one: attention over the whole stream, or positions that begin anew in each slice."""
    attend, part = context.attend, MicroBatch.part
    if kind == "boundaries":
        context.attend = lambda q, k, v, documents: attend(q, k, v, Documents.of_lengths((len(q),)))
    elif kind == "positions":
        MicroBatch.part = lambda self, rank, ranks: replace(
            mine := part(self, rank, ranks), positions=mine.positions - mine.positions[0])


def of_rank(rank, ranks, port, configs, kind, file):
    """A process of `at_once`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    leak(kind)
    world = parallel.start(configs[0].parallel)
    found = [run(config, world) for config in configs]
    if rank == 0:
        torch.save(found, file)
    parallel.stop()


def at_once(folder, ranks, *configs, kind=""):
    """What `run` finds with each of `configs` on so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(of_rank, (ranks, port, configs, kind, folder / "found.pt"), ranks)
    return torch.load(folder / "found.pt")


@pytest.fixture
def alone():
    yield parallel.start()
    parallel.stop()


@pytest.fixture(scope="module")
def expected():
    return oracle()


def assert_same(found, expected, tolerance=1e-5):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name:
                                   f"{name}: {text}")


def test_one_process_is_the_oracle(alone, expected):
    assert_same(run(config_of(), alone), expected)


def test_two_ranks_that_share_are_the_oracle(tmp_path, alone, expected):
    """With everything kept and with all of it computed again; and their answers are one process's."""
    found = at_once(tmp_path, 2, config_of(2), config_of(2, recompute="full"))
    answers = run(config_of(), alone)["answers"]
    assert len(answers) > len(PROMPTS)
    for each in found:
        assert_same(each, expected | {"answers": answers})
