"""The memory of a step is predicted by arithmetic; the oracles are torch's own FSDP memory tracker, which watches every
tensor of the real model, loss and optimizer on simulated ranks, and the memory that a real process took on a CPU.

Simulated: fake tensors have sizes and no contents, and a fake process group sends nothing.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from minisft import context
from minisft.config import Config, LoraConfig, ParallelConfig
from minisft.cpu import kernels
from minisft.lora.adapters import adapt
from minisft.model.flops import Sizes
from minisft.model.llama import Documents, Llama
from minisft.model.llama_config import PRESETS, LlamaConfig
from minisft.planning.memory import Bytes, StepMemory
from minisft.training import parallel
from minisft.training.loss import linear_cross_entropy
from minisft.training.optimizer import AdamW
from minisft.training.parallel import World
from minisft.versions import SHARDS_BYTES

SMALL = LlamaConfig(vocab_size=20_000, hidden_size=256, intermediate_size=896, num_hidden_layers=3,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=64)
ON_A_CPU = Bytes(softmax=2**20, compiled=False)  # fake tensors, too, take the loss's branch for a CPU
ALONE = LlamaConfig(vocab_size=2000, hidden_size=128, intermediate_size=448, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=64)
TIED = LlamaConfig(**{**vars(SMALL), "tie_word_embeddings": True})


def tracked(config, *, ranks, tokens, trained, recompute, micro_batches=1, lora=None, shared=1):
    """Bytes that one of `ranks` has allocated at the peak of two steps, by torch's count."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replicate", "shard"))
        # A lone process shards nothing, and its parameters are real: torch cannot move fake ones from the meta device.
        with FakeTensorMode(allow_non_fake_inputs=True) if ranks > 1 else nullcontext():
            world = World(0, ranks, torch.device("cpu"), mesh["shard"], None)
            model = parallel.build_model(
                config, world, Config(parallel=ParallelConfig(activation_checkpointing=recompute, compile="false")),
                adapt=partial(context.share, ranks=shared, timeout=timedelta(minutes=1)) if shared > 1 else
                partial(adapt, lora=lora) if lora else None)
            optimizer = AdamW(model, mesh=world.mesh)
            ids, targets, at = (torch.zeros(n, dtype=torch.int64) for n in (tokens, trained, trained))
            documents = Documents.of_lengths((512,) * (tokens * shared // 512))
            documents = replace(documents, positions=documents.positions[:tokens], ranks=shared)
            moments = [*optimizer.moments("exp_avg").values(), *optimizer.moments("exp_avg_sq").values()]
            inputs = ids, targets, at, documents.cu_seqlens, documents.positions, *moments
            if ranks > 1:
                tracker = FSDPMemTracker(model)
                tracker.track_inputs(inputs)
            else:
                tracker = MemTracker()
                tracker.track_external(model, *inputs)
            with tracker:
                for step in range(2):
                    optimizer.begin(1e-3, step)
                    for _ in range(micro_batches):
                        model(ids, documents, lambda hidden, head: linear_cross_entropy(
                            hidden[at], head, targets, denominator=1.0)).backward()
                        tracker.reset_mod_stats()
                    optimizer.clip(1.0)
                    optimizer.step()
            return sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    finally:
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def products_in_bf16(monkeypatch):
    """On a CPU without them, products would keep fp32 copies that no GPU has."""
    monkeypatch.setattr(kernels, "CPU_MATMULS_IN_BF16", True)


def compare(config, *, ranks, tokens, trained, recompute, micro_batches=1, lora=None, shared=1):
    expected = tracked(config, ranks=ranks, tokens=tokens, trained=trained, recompute=recompute,
                       micro_batches=micro_batches, lora=lora, shared=shared)
    found = StepMemory(config, ranks, tokens, trained, recompute, accumulates=micro_batches > 1, each=ON_A_CPU,
                       lora=lora, context=shared).peak()
    print(f"tracker {expected / 2**30:.3f} GiB, arithmetic {found.allocated / 2**30:.3f}, {found.instant}")
    assert found.allocated == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("config", "step"), [
    (SMALL, {"ranks": 8, "tokens": 8192, "trained": 8192, "recompute": "none"}),
    (SMALL, {"ranks": 2, "tokens": 1024, "trained": 512, "recompute": "selective", "micro_batches": 2}),
    (TIED, {"ranks": 4, "tokens": 512, "trained": 100, "recompute": "full"}),  # needs most in the embedding's gradient
    (ALONE, {"ranks": 1, "tokens": 512, "trained": 128, "recompute": "none", "micro_batches": 2}),
], ids=["none", "selective, accumulating", "full, tied, few tokens", "alone, accumulating"])
def test_the_peak_is_what_torch_tracks(config, step):
    compare(config, **step)


@pytest.mark.parametrize(("lora", "step"), [
    pytest.param(LoraConfig(8), {"ranks": 8, "tokens": 8192, "trained": 8192, "recompute": "none"},
                 marks=pytest.mark.slow),
    (LoraConfig(64, base="nf4"), {"ranks": 2, "tokens": 1024, "trained": 512, "recompute": "full"}),
    pytest.param(LoraConfig(8, dora=True), {"ranks": 8, "tokens": 8192, "trained": 1024, "recompute": "none"},
                 marks=pytest.mark.slow),
], ids=["bf16", "nf4", "dora"])
def test_the_peak_with_adapters_is_what_torch_tracks(lora, step):
    if lora.base == "nf4" and not SHARDS_BYTES:
        pytest.skip("this torch cannot shard bytes, which is refused")
    compare(SMALL, **step, lora=lora)


@pytest.mark.parametrize(("shared", "recompute"), [
    pytest.param(2, "none", marks=pytest.mark.slow), (4, "selective"), pytest.param(4, "full", marks=pytest.mark.slow)])
def test_the_peak_of_a_shared_stream_is_what_torch_tracks(shared, recompute):
    compare(SMALL, ranks=8, tokens=4096, trained=4096, recompute=recompute, shared=shared)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_peak_of_131072_tokens_over_8_ranks_is_what_torch_tracks(recompute):
    compare(PRESETS["llama-3.1-8b"], ranks=8, tokens=131_072 // 8, trained=2048, recompute=recompute, shared=8)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("name", "ranks"), [("llama-3.2-1b", 8), ("llama-3-8b", 8), ("llama-3-70b", 64)])
def test_the_peak_of_a_llama_is_what_torch_tracks(name, ranks, recompute):
    compare(PRESETS[name], ranks=ranks, tokens=8192, trained=8192, recompute=recompute)


@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3.2-1b"])
def test_sizes_are_those_of_the_network(name):
    with torch.device("meta"):
        model = Llama(PRESETS[name])
    assert Sizes.of(PRESETS[name]).total == sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert Sizes.of(PRESETS[name]).block == block


def test_the_state_of_8b_over_8_gpus_by_hand():
    """16 bytes for each of 8,030,261,248 parameters, over 8: 14.96 GiB."""
    parts = StepMemory(PRESETS["llama-3-8b"], 8, 8192, 8192, "full", accumulates=True).peak().parts
    state = parts["parameters"] + parts["gradients"] + parts["moments"]
    assert Sizes.of(PRESETS["llama-3-8b"]).total == 8_030_261_248
    assert state == pytest.approx(16 * 8_030_261_248 / 8, abs=100)
    assert state / 2**30 == pytest.approx(14.96, abs=0.005)


MEASURED = LlamaConfig(vocab_size=32_000, hidden_size=512, intermediate_size=1792, num_hidden_layers=8,
                       num_attention_heads=8, num_key_value_heads=4, head_dim=64)


@pytest.mark.slow
@pytest.mark.skipif(kernels.product_dtype(torch.bfloat16) != torch.bfloat16, reason="bf16 is multiplied in fp32 here")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_peak_is_what_a_process_takes(recompute):
    """Resident memory on a CPU: its peak in two steps, above what was resident before the model was built.

    The C library gives every freed tensor back; as it comes, it keeps a fifth more.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, Path(__file__), recompute], capture_output=True, text=True, check=True,
                          env=environment)
    found = StepMemory(MEASURED, 1, 2048, 2048, recompute, each=ON_A_CPU).peak().allocated
    print(f"process {int(done.stdout) / 2**20:.0f} MiB, arithmetic {found / 2**20:.0f}")
    assert found == pytest.approx(int(done.stdout), rel=0.1)


def resident(field):
    """Bytes of VmRSS (now) or VmHWM (at most) of this process, by Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def take_steps(config, world, *, tokens, recompute):
    """Two real steps with random weights."""
    model = parallel.build_model(
        config, world, Config(parallel=ParallelConfig(activation_checkpointing=recompute)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    optimizer = AdamW(model, mesh=world.mesh)
    ids, documents = torch.arange(tokens), Documents.of_lengths((512,) * (tokens // 512))
    for step in range(2):
        optimizer.begin(1e-3, step)
        model(ids, documents,
              lambda hidden, head: linear_cross_entropy(hidden[ids], head, ids, denominator=tokens)).backward()
        optimizer.clip(1.0)
        optimizer.step()


def measure(recompute):
    """Print the memory that two steps took."""
    torch.set_num_threads(1)
    world = parallel.start()
    take_steps(SMALL, world, tokens=512, recompute=recompute)  # loads the libraries
    before = resident("VmRSS")
    take_steps(MEASURED, world, tokens=2048, recompute=recompute)
    print(resident("VmHWM") - before)
    parallel.stop()


if __name__ == "__main__":
    measure(sys.argv[1])
