"""What a GPU would run, as far as it can be seen without one.

The flash kernel has no CPU version, so its operator is lent a naive one: the CUDA branch then runs with real numbers.
FakeTensorMode computes shapes, dtypes and devices alone; what would need a number on the host raises there, so a step
that gets through it never waits for the device. The fake process group answers for 8 to 512 ranks. What nothing here
sees: the kernels themselves, streams, and time.
"""

import json
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_runs import HERE, train
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from minisft.config import Config, OptimConfig, ParallelConfig
from minisft.data.batches import micro_batch, steps
from minisft.data.packing import Plan
from minisft.model import llama
from minisft.model.llama import Block, Documents, Llama, attend
from minisft.model.llama_config import PRESETS, LlamaConfig
from minisft.training import loss as loss_module
from minisft.training import parallel
from minisft.training.loss import batch_loss, linear_cross_entropy
from minisft.training.optimizer import AdamW
from minisft.training.parallel import World, build_model

TINY = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=16, rope_theta=10000.0, rms_norm_eps=1e-5,
                   max_position_embeddings=512, tie_word_embeddings=True)
MIXES = [(64,), (20, 44), (1,) * 64, (30, 30, 4), (63, 1)]  # of 64 tokens


def probabilities(q, k, offsets):
    """(H, T, T) what each token of each head attends to, from a mask of all pairs; K heads are repeated to H."""
    document = torch.bucketize(torch.arange(len(q)), offsets[1:].long(), right=True)
    place = torch.arange(len(q))
    seen = (document[:, None] == document) & (place[:, None] >= place)
    scores = torch.einsum("the,she->hts", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def widened(q, k, v):
    return q.float(), *(x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))


KERNELS: list[int] = []  # the tokens of each call of the forward kernel


def naive_forward(q, k, v, offsets, offsets_k, longest, longest_k, is_causal=False, scale=None, window_size=None,
                  enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    assert q.dtype in (torch.bfloat16, torch.float16), "the flash kernel takes 16 bits only"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the flash kernel takes heads without gaps only"
    assert offsets.dtype == torch.int32
    assert longest >= offsets.diff().max(), "tokens past `longest` would be left out"
    assert (is_causal, list(window_size), scale) == (True, [-1, 0], None)
    KERNELS.append(len(q))
    wide_q, wide_k, wide_v = widened(q, k, v)
    out = torch.einsum("hts,she->the", probabilities(wide_q, wide_k, offsets), wide_v)
    return out.to(q.dtype).contiguous(), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def naive_backward(grad, q, k, v, out, lse, offsets, offsets_k, longest, longest_k, is_causal, rng, scale=None,
                   window_size=None):
    shape, (q, k, v), grad, dtype = k.shape, widened(q, k, v), grad.float(), q.dtype
    p = probabilities(q, k, offsets)
    grad_p = torch.einsum("the,she->hts", grad, v)
    grad_s = p * (grad_p - (grad_p * p).sum(dim=-1, keepdim=True)) / math.sqrt(q.shape[-1])
    grads = (torch.einsum("hts,she->the", grad_s, k), torch.einsum("hts,the->she", grad_s, q),
             torch.einsum("hts,the->she", p, grad))
    shared = [x.unflatten(1, (shape[1], -1)).sum(dim=2) for x in grads[1:]]
    return tuple(x.to(dtype).contiguous() for x in (grads[0], *shared))


torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", naive_forward)
torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", naive_backward)


@pytest.fixture
def flash(monkeypatch):
    """The CPU takes the branch that a GPU takes."""
    KERNELS.clear()
    monkeypatch.setattr(llama, "is_for_flash", lambda q: q.dtype in (torch.bfloat16, torch.float16))


@pytest.fixture
def compiler(monkeypatch):
    """Graphs are counted, and run as they are; a graph break raises."""
    torch._dynamo.reset()
    loss_module._compiler.cache_clear()  # which an earlier test may have filled
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    yield counter
    loss_module._compiler.cache_clear()
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 1, 16), (4, 2, 16), (4, 4, 16), (16, 2, 8), (8, 4, 8)])
def test_the_cuda_branch_is_the_cpu_branch(monkeypatch, heads, shared, width):
    torch.manual_seed(0)
    documents = Documents.of_lengths((7, 1, 30, 26))
    q, k, v = (torch.randn(64, n, width).bfloat16().requires_grad_() for n in (heads, heads // shared, heads // shared))
    grad = torch.randn(64, heads, width).bfloat16()
    results = []
    for takes in (True, False):
        monkeypatch.setattr(llama, "is_for_flash", lambda q, takes=takes: takes)
        out = attend(q, k, v, documents)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    for on_gpu, on_cpu in zip(*results, strict=True):
        assert (on_gpu.shape, on_gpu.dtype) == (on_cpu.shape, on_cpu.dtype)
        torch.testing.assert_close(on_gpu.float(), on_cpu.float(), rtol=0.02, atol=0.02)


class Attended(TorchFunctionMode):
    """Lists the calls of attention kernels: the operator, and where the offsets are that it is given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "_varlen_attn" in name or "document_attention" in name or function is F.scaled_dot_product_attention:
            self.calls.append((name.split(".")[1], args[3].device.type, args[3].numel()))
        return function(*args, **(kwargs or {}))


def fake_documents(device):
    offsets = torch.empty(3, dtype=torch.int32)
    return Documents(offsets, torch.empty(3, dtype=torch.int32, device=device), torch.empty(0), 40)


@pytest.mark.parametrize(("dtype", "width", "takes"), [
    (torch.bfloat16, 64, True), (torch.float16, 128, True), (torch.bfloat16, 256, True),
    (torch.float32, 64, False), (torch.float64, 64, False), (torch.bfloat16, 20, False), (torch.bfloat16, 264, False),
])
def test_what_flash_does_not_take_goes_document_by_document_with_offsets_on_the_host(dtype, width, takes):
    with FakeTensorMode(), torch.no_grad(), Attended() as attended:
        q, k = (torch.empty(64, heads, width, dtype=dtype, device="cuda") for heads in (4, 2))
        out = attend(q, k, k, fake_documents("cuda"))
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    assert attended.calls == [("_varlen_attn", "cuda", 3) if takes else ("document_attention", "cpu", 3)]


@pytest.mark.parametrize(("device", "kernel"), [("cpu", "document_attention"), ("cuda", "_varlen_attn")])
def test_a_bf16_layer_reaches_flash_on_a_gpu_and_only_there(device, kernel):
    with FakeTensorMode(), torch.no_grad(), Attended() as attended:
        with torch.device("meta"):
            block = Block(TINY)
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.bfloat16,
                                                                          device=device)))
        rotation = (torch.empty(64, 1, 16, device=device), torch.empty(64, 1, 16, device=device))
        x = torch.empty(64, 64, dtype=torch.bfloat16, device=device)
        out = block(x, rotation, fake_documents(device))
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    assert attended.calls == [(kernel, device, 3)]


# ---------------------------------------------------------------------------------------------------- compile


def gradients(model, lengths):
    tokens = torch.arange(64) % 97
    documents = Documents.of_lengths(lengths)

    def loss(hidden, head):
        return linear_cross_entropy(hidden[::3], head, tokens[::3], denominator=22.0)

    model.zero_grad()
    value = model(tokens, documents, loss)
    value.backward()
    return value.detach(), {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def test_the_host_does_not_wait_for_a_weighted_loss():
    """On tensors that have no values, whatever asked for one would raise."""
    hidden, head = (torch.empty(rows, 64, device="meta", requires_grad=True) for rows in (3000, 50_000))
    targets, weights = (torch.empty(3000, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float64))
    linear_cross_entropy(hidden, head, targets, denominator=7.5, target_weights=weights, z_loss=1e-3).backward()
    assert (head.grad.shape, hidden.grad.shape) == (head.shape, hidden.shape)
    with pytest.raises(RuntimeError, match="meta"):
        weights.sum().item()


@pytest.mark.parametrize(("recompute", "kernels"), [("none", 3), ("selective", 3), ("full", 6)])
def test_one_graph_without_breaks_for_all_layers_and_document_mixes(flash, compiler, recompute, kernels):
    torch.manual_seed(0)
    plain, compiled = (Llama(TINY, recompute=recompute).bfloat16() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    parallel.compile_blocks(compiled)
    for lengths in MIXES:
        expected, expected_grads = gradients(plain, lengths)
        KERNELS.clear()
        loss, grads = gradients(compiled, lengths)
        assert len(KERNELS) == kernels  # in forward and backward pass
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
        for name, grad in grads.items():
            scale = float(expected_grads[name].abs().max())
            torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=0.03 * scale, msg=name)
        assert compiler.frame_count == 1, f"compiled anew for {lengths}"


def test_a_compiled_run_is_the_same_run(flash, compiler, base, tmp_path):
    """Padded to one shape, with idle micro-batches and evaluation: the same tokens and losses; two graphs of a layer,
    one of them without gradients, and one of the loss."""
    settings = {"train__precision": "bf16", "data__eval": HERE / "oracles" / "conversations.jsonl",
                "train__max_steps": 3, "batch__packs": 5, "batch__micro_packs": 2}
    plain = train(base, tmp_path / "plain", **settings)
    assert compiler.frame_count == 0
    KERNELS.clear()
    compiled = train(base, tmp_path / "compiled", **settings, parallel__compile="true")
    assert set(KERNELS) == {1024}, "packs of several shapes"
    assert compiler.frame_count == 3
    for key in ("step", "epoch", "tokens", "target_tokens"):
        assert [r[key] for r in compiled] == [r[key] for r in plain]
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in plain], rel=5e-3)
    evaluated = [[json.loads(line)["loss"] for line in (tmp_path / name / "run" / "metrics.jsonl").open()
                  if '"eval"' in line] for name in ("plain", "compiled")]
    assert len(evaluated[0]) == 2
    assert evaluated[1] == pytest.approx(evaluated[0], rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"ranks": 2}, {"parallel__activation_checkpointing": "full"}])
def test_the_real_compiler_changes_nothing_on_a_cpu(base, tmp_path, change):
    plain = train(base, tmp_path / "plain")
    compiled = train(base, tmp_path / "compiled", **change, parallel__compile="true")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in compiled] == pytest.approx([r[key] for r in plain], rel=1e-5)


# ---------------------------------------------------------------------------------------------------- many ranks


class Dataset:
    """Four documents of four tokens, three of them trained."""

    lengths, num_loss_tokens = np.full(4, 4), np.full(4, 3)

    def document(self, index):
        return np.arange(4), np.array([0, 1, 1, 1])


BATCH = micro_batch(Dataset(), [0, 1], size=64, longest=40)


class Recorder(TorchDispatchMode):
    """Collective operations in order: (name, dtype sent, numbers in all), and attention kernels."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace in ("c10d", "torch_attn"):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.events.append((operation.__name__.removesuffix(".default"), tensors[-1].dtype,
                                max(tensor.numel() for tensor in tensors)))
        return operation(*args, **(kwargs or {}))

    def sums(self):
        totals = Counter()
        for name, dtype, numbers in self.events:
            totals[name, dtype] += numbers
        return totals

    def gathers_before(self, name):
        """For each event of this name: how many gathers were begun before it."""
        gathers = [event[0] == "_allgather_base_" for event in self.events]
        return [sum(gathers[:i]) for i, event in enumerate(self.events) if event[0] == name]


@contextmanager
def fake_world(ranks, *, rank=0, replicate=1):
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield World(rank, ranks, torch.device("cpu"), mesh if replicate > 1 else mesh["shard"], dist.HashStore())
    finally:
        dist.destroy_process_group()


def simulated_step(config, world, **options):
    """One step of the loop with two documents on this rank: the events, the optimizer, its gradients, the norm."""
    settings = Config(optim=OptimConfig(label_smoothing=0.1, z_loss=1e-4), parallel=ParallelConfig(**options))
    model = build_model(config, world, settings)
    optimizer = AdamW(model, settings.optim, world.mesh)
    with Recorder() as recorder:
        optimizer.begin(1e-5, 0)
        batch_loss(model, BATCH, world.device, 6, settings.optim).backward()
        gradients = {name: p.grad.to_local() for name, p in model.named_parameters()}
        norm = optimizer.clip(1.0)
        optimizer.step()
    return recorder, optimizer, gradients, norm


def padded_numbers(shape, shards):
    """FSDP sends equal parts: 10 rows on 4 ranks are 3, 3, 3, 1, sent as 12."""
    return shards * -(-shape[0] // shards) * math.prod(shape[1:])


@pytest.mark.parametrize(("ranks", "rank", "replicate", "reshard"), [
    (8, 5, 2, "auto"),
    pytest.param(8, 7, 1, "false", marks=pytest.mark.slow), pytest.param(8, 3, 8, "auto", marks=pytest.mark.slow),
    pytest.param(64, 63, 1, "true", marks=pytest.mark.slow), pytest.param(64, 9, 8, "auto", marks=pytest.mark.slow),
    pytest.param(512, 0, 1, "auto", marks=pytest.mark.slow), pytest.param(512, 511, 1, "auto", marks=pytest.mark.slow),
])
def test_a_step_of_llama_3_8b(flash, ranks, rank, replicate, reshard):
    """Forward, backward, clip and update of the whole model, as one of many ranks, without a number on the host."""
    config = PRESETS["llama-3.1-8b"]
    shards = ranks // replicate
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    with fake_world(ranks, rank=rank, replicate=replicate) as world:
        recorder, optimizer, gradients, norm = simulated_step(config, world, reshard=reshard)
        assert (norm.shape, norm.dtype) == ((), torch.float32)
        with pytest.raises(DataDependentOutputException):  # so nothing before could have waited for a number
            float(norm)
    part = rank % shards
    for name, shape in shapes.items():
        each = -(-shape[0] // shards)
        rows = max(min(each, shape[0] - part * each), 0)
        moments = [optimizer.moments(moment)[name] for moment in ("exp_avg", "exp_avg_sq")]
        for tensor in (optimizer.rows[name], gradients[name], *moments):
            assert (tuple(tensor.shape), tensor.dtype) == ((rows, *shape[1:]), torch.float32), name
    numbers = sum(padded_numbers(shape, shards) for shape in shapes.values())
    expected = {("allreduce_", torch.float32): 1 + (numbers // shards if replicate > 1 else 0),
                ("_varlen_attn", torch.int32): 32 * 64 * 4096, ("_varlen_attn_backward", torch.uint64): 32 * 64 * 4096}
    if shards > 1:
        # The gradients of embedding and head need no values; the last norm is of the whole model, which "auto" keeps.
        tables = sum(padded_numbers(shapes[name], shards) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        norm_width = shapes["model.norm.weight"].numel()
        again = {"auto": numbers - tables - norm_width, "true": numbers - tables, "false": 0}[reshard]
        expected |= {("_allgather_base_", torch.bfloat16): numbers + again,
                     ("_reduce_scatter_base_", torch.float32): numbers}
    assert recorder.sums() == expected


def test_a_tied_model_with_more_ranks_than_rows(flash):
    """64 ranks share a norm of 64 numbers, and 97 words: 2 each for 48 of them, 1, and none for the others."""
    rows = {}
    for rank in (0, 48, 49, 63):
        with fake_world(64, rank=rank) as world:
            _, optimizer, _, _ = simulated_step(TINY, world)
            rows[rank] = len(optimizer.rows["model.embed_tokens.weight"])
    assert rows == {0: 2, 48: 1, 49: 0, 63: 0}


@pytest.mark.parametrize("number", [0, 1, 3])
def test_prefetch_gathers_so_many_modules_ahead(flash, number):
    config = replace(TINY, num_hidden_layers=8)  # tied: the root's own parameters come first
    with fake_world(8) as world:
        recorder, *_ = simulated_step(config, world, prefetch=number)
    assert recorder.gathers_before("_varlen_attn") == [min(2 + i + number, 9) for i in range(8)]
    behind = [gathers - 9 for gathers in recorder.gathers_before("_varlen_attn_backward")]  # the root's are there
    assert behind == [min(1 + i + max(number, 1), 8) for i in range(8)]  # FSDP itself looks one ahead


def test_clipping_rows_on_the_host_with_ranks_on_gpus():
    """parallel.offload: gradients on the host, the norm summed by the ranks' devices and logged from there."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        with FakeTensorMode():
            model = torch.nn.Linear(8, 4)
            mesh = SimpleNamespace(device_type="meta", get_group=lambda name: dist.group.WORLD)
            optimizer = AdamW(model, mesh=mesh)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.begin(1e-3, 0)
            norm = optimizer.clip(1.0)
            assert norm.device.type == "meta"
            assert {optimizer._found_inf.device.type, *(p.grad.device.type for p in optimizer.rows.values()),
                    *(m.device.type for m in optimizer.moments("exp_avg").values())} == {"cpu"}
            optimizer.step()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("change", [
    {"parallel__offload": "parameters"},
    pytest.param({"ranks": 2, "parallel__offload": "parameters", "parallel__prefetch": 1}, marks=pytest.mark.slow),
    pytest.param({"ranks": 2, "parallel__reshard": "true", "parallel__prefetch": 2}, marks=pytest.mark.slow),
    pytest.param({"ranks": 2, "parallel__reshard": "false"}, marks=pytest.mark.slow),
])
def test_where_parameters_lie_changes_nothing(base, tmp_path, change):
    plain, moved = train(base, tmp_path / "plain"), train(base, tmp_path / "moved", **change)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in moved] == pytest.approx([r[key] for r in plain], rel=1e-6)


# ---------------------------------------------------------------------------------------------------- transfers


class Transfers(TorchFunctionMode):
    """Lists what is moved to a device, and how."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            self.moved.append((args[0], kwargs.get("non_blocking", False)))
        return function(*args, **(kwargs or {}))


def test_batches_for_a_gpu_are_pinned_by_the_thread_and_copied_without_waiting(monkeypatch):
    pinned, devices = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.current_thread())))
    plan = Plan(Dataset.lengths, Dataset.num_loss_tokens, seq_len=8, packs_per_step=1, epochs=1)
    everything = list(steps(Dataset(), plan, device=torch.device("cuda", 3)))
    assert [(device.index, thread.name) for device, thread in devices] == [(3, "loader_0")]
    batches = [batch for step in everything for batch in step.micro_batches]
    tensors = [getattr(batch, name) for batch in batches
               for name in ("tokens", "cu_seqlens", "positions", "targets", "target_at", "document_ids")]
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in pinned}
    with Transfers() as transfers:
        batches[0].to(torch.device("cpu"))
    assert {id(tensor) for tensor, _ in transfers.moved} == {id(tensor) for tensor in tensors[:6]}
    assert all(non_blocking for _, non_blocking in transfers.moved)


@pytest.mark.parametrize(("given", "found"), [
    ({}, ("expandable_segments:True", None)),
    ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, ("max_split_size_mb:64", None)),
    ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, (None, "max_split_size_mb:64")),
])
def test_gpu_memory_grows_in_segments_unless_the_user_says_otherwise(given, found):
    code = ("import os, sys, types; run = types.SimpleNamespace(main=lambda argv: print("
            "('torch' in sys.modules, *map(os.environ.get, ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'))))); "
            "sys.modules['minisft.runs.lifecycle'] = run; "
            "from minisft.cli.train_command import main; main(['my.toml'])")
    environment = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k} | given
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                             cwd=HERE.parent, env=environment).stdout
    assert printed.strip() == str((False, *found))
