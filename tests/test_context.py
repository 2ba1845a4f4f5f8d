"""Ranks that share a stream compute what one process computes, whatever the documents and whoever else shares it.

The oracle is docs/one_file.py, which imports nothing of the package: one process, one document after another, AdamW of
torch. Ranks are processes that exchange by gloo.
"""

import os
import runpy
import socket
from collections import Counter
from contextlib import contextmanager
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
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.distributed.fake_pg import FakeStore

from minisft import config_io, context
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
from minisft.versions import SHARDS_BYTES

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


def config_of(shared=1, *, recompute="none", adapters=None, precision="fp32", compiled="false"):
    return Config(batch=BatchConfig(packs=4, micro_packs=1), lora=adapters or LoraConfig(),
                  train=TrainConfig(precision=precision), optim=OptimConfig(lr=LR, schedule="constant", warmup_steps=0),
                  parallel=ParallelConfig(context=shared, activation_checkpointing=recompute, compile=compiled))


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
    """What `world` computes: gradients of the first step, losses, norms and weights of all, held-out loss, answers."""
    model, data, every = built(config, world), Set(), plan()
    lora.set_step(model, 0, 0)
    step = next(steps := planned_steps(data, every, config, world))
    steps.close()
    torch._dynamo.reset()
    for batch in step.micro_batches:
        batch_loss(model, batch, world.device, step.target_tokens).backward()
    found = {f"gradient/{name}": weights.whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    optimizer, losses = AdamW(model, config.optim, world.mesh), []
    for result in training_steps(model, optimizer, data, every, config, world):
        losses.append((result.loss, result.grad_norm))
        lora.set_step(model, 0, result.step)
    answers = continue_greedily(model, PROMPTS, stop_ids={0}, device=world.device)
    heldout = heldout_loss(model, data, world, seq_len=SEQ_LEN, fixed=config.parallel.compile == "true")
    parallel.reshard(model)
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
    torch.compile = partial(torch.compile, backend="aot_eager")
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
    """And their answers are one process's."""
    found, = at_once(tmp_path, 2, config_of(2))
    answers = run(config_of(), alone)["answers"]
    assert len(answers) > len(PROMPTS)
    assert_same(found, expected | {"answers": answers})


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shared", "policies"), [
    (2, 2, ("selective", "full")), (4, 4, ("none", "selective", "full")), (4, 2, ("none", "full")), (8, 8, ("none",)),
], ids=["2 share", "4 share", "2 groups of 2", "8 share 4 key/value heads"])
def test_any_number_of_ranks_and_groups_are_the_oracle(tmp_path, expected, ranks, shared, policies):
    for each in at_once(tmp_path, ranks, *(config_of(shared, recompute=recompute) for recompute in policies)):
        assert_same(each, expected)


@pytest.mark.slow
def test_compiled_blocks_are_the_oracle(tmp_path, expected):
    """Compiled by aot_eager, which traces both passes and needs no C++ compiler."""
    for each in at_once(tmp_path, 2, *(config_of(2, recompute=recompute, compiled="true") for recompute in
                                       ("none", "selective"))):
        assert_same(each, expected)


ADAPTED = {"LoRA": LoraConfig(4, base="fp32"), "dropout": LoraConfig(4, base="fp32", dropout=0.3),
           "DoRA": LoraConfig(4, base="fp32", dora=True), "NF4": LoraConfig(4, base="nf4")}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shared"), [(2, 2), (4, 2)])
def test_adapters_are_those_of_one_process(tmp_path, alone, ranks, shared):
    """Dropout drops the same, because it is drawn by document and position."""
    names = [name for name in ADAPTED if SHARDS_BYTES or name != "NF4"]
    found = at_once(tmp_path, ranks, *(config_of(shared, adapters=ADAPTED[name]) for name in names))
    for name, each in zip(names, found, strict=True):
        wanted = run(config_of(adapters=ADAPTED[name]), alone)
        assert {name.partition("/")[0] for name in wanted} == {"gradient", "weight", "losses", "heldout", "answers"}
        assert_same(each, wanted)


@pytest.mark.slow
def test_fp8_and_bf16_round_as_one_process_does(tmp_path, alone):
    """Scales are found for a rank's tokens, so FP8 rounds a little differently, as it does with other packs."""
    configs = [config_of(2, precision=precision) for precision in ("bf16", "fp8")]
    for config, each in zip(configs, at_once(tmp_path, 2, *configs), strict=True):
        one, exact = (run(config_of(precision=precision), alone) for precision in (config.train.precision, "fp32"))
        for name in (name for name in exact if name.startswith("gradient/")):
            rounded = (one[name] - exact[name]).norm()
            assert 0 < rounded < 0.5 * exact[name].norm()
            assert (each[name] - exact[name]).norm() < 1.5 * rounded
        torch.testing.assert_close(each["losses"][0], one["losses"][0], rtol=0.03, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["boundaries", "positions"])
def test_a_leak_is_found(tmp_path, expected, kind):
    """Planted here, so that the tests above are known to see one."""
    found, = at_once(tmp_path, 2, config_of(2), kind=kind)
    print(f"{kind}: loss {float(found['losses'][0, 0]):.4f}, should be {float(expected['losses'][0, 0]):.4f}; held-out "
          f"{float(found['heldout']):.4f}, should be {float(expected['heldout']):.4f}")
    with pytest.raises(AssertionError):
        assert_same(found, expected, tolerance=1e-2)


# What is sent, and what is compiled


@contextmanager
def simulated(ranks):
    """Rank 0 of `ranks` that share all streams; what arrives is nonsense, of the right size."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    try:
        yield parallel.World(0, ranks, torch.device("cpu"), mesh, dist.HashStore(), ranks)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("ranks", "recompute", "passes"), [(2, "none", 2), (4, "selective", 3), (8, "full", 3)])
def test_bytes_of_a_micro_batch(ranks, recompute, passes):
    """Of each layer and token, queries, keys, values and the result of attention in each pass, and no more; on
    simulated ranks. The tracker counts whole buffers, of which a rank keeps its own part."""
    with simulated(ranks) as world:
        model = built(config_of(ranks, recompute=recompute), world)
        batch = micro_batch(Set(), [0, 4], multiple=ranks).part(0, ranks)
        with Bytes() as sent:
            batch_loss(model, batch, world.device, 1.0).backward()
    heads = 2 * NETWORK.num_attention_heads + 2 * max(NETWORK.num_key_value_heads, ranks)
    token = NETWORK.num_hidden_layers * heads * NETWORK.head_dim * 4
    exchanged = {name: number for name, number in sent.counted.items() if name[0] == "all_to_all_single"}
    assert exchanged == {("all_to_all_single", torch.float32): passes * token * len(batch.tokens)}
    assert len(batch.tokens) == -(-106 // ranks)


def test_blocks_that_exchange_are_one_graph(monkeypatch):
    """Without a break, for all layers and whatever documents; on simulated ranks."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    with simulated(4) as world:
        model = built(config_of(4, recompute="selective", compiled="true"), world)
        for documents in ([0, 4], [1, 6], [10, 4, 11]):
            batch = micro_batch(Set(), documents, size=2 * SEQ_LEN, longest=SEQ_LEN).part(0, 4)
            batch_loss(model, batch, world.device, 1.0).backward()
    assert counter.frame_count == 1


# The parts


@pytest.mark.parametrize("ranks", [1, 2, 4, 5, 53, 106])
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_are_the_stream(ranks, weighted):
    """Every target once, after the token that it follows; documents are those of the whole stream."""
    whole = micro_batch(Set(), [0, 4], multiple=ranks)
    whole = replace(whole, target_weights=whole.targets / 7) if weighted else whole
    parts, pairs = [whole.part(rank, ranks) for rank in range(ranks)], Counter()
    for i, part in enumerate(parts):
        assert len(part.tokens) * ranks == len(whole.tokens)
        assert (part.ranks, part.lengths) == (ranks, whole.lengths)
        assert part.cu_seqlens is whole.cu_seqlens
        pairs.update(zip((part.target_at + i * len(part.tokens)).tolist(), part.targets.tolist(),
                         part.target_weights.tolist() if weighted else part.targets.tolist(), strict=True))
    for name in ("tokens", "positions", "document_ids", "targets"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert pairs == Counter(zip(whole.target_at.tolist(), whole.targets.tolist(),
                                (whole.target_weights if weighted else whole.targets).tolist(), strict=True))


def test_padding_is_as_long_as_it_must_be():
    for multiple, padded in ((1, 106), (4, 108), (106, 106), (107, 107)):
        batch = micro_batch(Set(), [0, 4], multiple=multiple, longest=SEQ_LEN)
        assert len(batch.tokens) == sum(batch.lengths) == padded
        assert (batch.document_ids == -1).sum() == padded - 106
    assert len(micro_batch(Set(), [], multiple=4, longest=3).tokens) == 4
    assert micro_batch(Set(), [0, 4], size=2 * SEQ_LEN, multiple=5, longest=SEQ_LEN).lengths == (66, 40, 29)


# Whole runs


RUN = {"parallel__context": 2, "data__seq_len": 511, "train__max_steps": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "keys"), [
    (2, {"parallel__offload": "parameters"}),
    (2, {"optim__in_backward": "true", "optim__clip_norm": 0, "batch__packs": 1}),
    (4, {"parallel__replicate": 2, "batch__micro_packs": 2})], ids=["offload", "in the backward pass", "HSDP"])
def test_a_run_is_that_of_one_process(base, tmp_path, ranks, keys):
    """Losses, norms, held-out losses, answers and the exported weights."""
    heldout = {"data__eval": HERE / "oracles" / "conversations.jsonl", "eval__samples": 2}
    wanted = train(base, tmp_path / "one", **RUN | heldout | keys | {"parallel__context": 1, "parallel__replicate": 1})
    found = train(base, tmp_path / "two", ranks=ranks, **RUN | heldout | keys)
    for key in ("loss", "grad_norm", "tokens", "target_tokens"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in wanted], rel=1e-5)
    assert [record["loss"] for record in log(tmp_path / "two", "eval")] == pytest.approx(
        [record["loss"] for record in log(tmp_path / "one", "eval")], rel=1e-5)
    assert [record["answer"] for record in log(tmp_path / "two", "sample")] == [
        record["answer"] for record in log(tmp_path / "one", "sample")]
    assert_same(final_weights(tmp_path / "two"), final_weights(tmp_path / "one"))


@pytest.mark.slow
def test_a_run_resumes_with_other_ranks_that_share(base, tmp_path):
    """Two ranks that share, one process, and two ranks that share again: the run of one process."""
    every = {**RUN, "train__max_steps": 9, "checkpoint__every": 3}
    wanted = train(base, tmp_path / "one", **every | {"parallel__context": 1})
    for ranks, steps in ((2, 3), (1, 6), (2, 9)):
        found = train(base, tmp_path / "two", ranks=ranks, **every | {
            "parallel__context": ranks, "train__max_steps": steps})
    for key in ("step", "loss", "grad_norm", "tokens"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in wanted], rel=1e-5)
    assert_same(final_weights(tmp_path / "two"), final_weights(tmp_path / "one"), tolerance=2e-5)


# What is refused


@pytest.mark.parametrize(("shared", "good"), [(3, "1, 2, 4, 8"), (16, "1, 2, 4, 8")])
def test_heads_that_cannot_be_divided_are_refused(shared, good):
    with pytest.raises(UserError, match=f"parallel.context = {shared}: the network's 8 query heads and 4 key/value "
                                        f"heads cannot be divided evenly over {shared} ranks; set it to one of {good}"):
        context.check(shared, NETWORK)


def test_key_value_heads_that_are_no_multiple_are_refused():
    network = replace(NETWORK, num_attention_heads=12, num_key_value_heads=6)
    assert [ranks for ranks in range(1, 20) if context.divides(ranks, network)] == [1, 2, 3, 6, 12]


@pytest.mark.parametrize(("ranks", "settings", "message"), [
    (3, {"parallel.context": 2}, "parallel.context = 2 does not divide the number of ranks, 3: start a multiple of 2 "
                                 "processes, or set it to a divisor of 3"),
    (8, {"parallel.context": 2, "batch.packs": 3}, "batch.packs = 3 cannot be split over 8 ranks: some would never "
                                                   "have work; raise batch.packs to at least 4"),
    (4, {"parallel.context": 2, "optim.in_backward": "true", "optim.clip_norm": 0}, "lower batch.packs to 2, raise "
                                                                                    "batch.micro_packs to 2"),
])
def test_ranks_that_cannot_share_are_refused(base, tmp_path, monkeypatch, ranks, settings, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    config = config_io.load(options(base, tmp_path, **settings))
    with pytest.raises(UserError, match=message):
        assemble.check_ranks(config)


def test_a_run_says_that_its_heads_cannot_be_divided(base, tmp_path, capsys):
    """Before anything is allocated; one process would do."""
    assert main(options(base, tmp_path, parallel__context=3)) == 2
    assert "parallel.context = 3 does not divide the number of ranks, 1" in capsys.readouterr().err
