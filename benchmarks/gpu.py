"""What a GPU computes and how fast, most valuable rows first, in one command of nine minutes.

    python benchmarks/gpu.py [--budget SECONDS] [--rows NAME...] [--gpus N] [--tokenizer FOLDER] [--data FILE]
                             [--out FILE] [--check]

Each row is a process with a time limit; if it fails or takes too long, the output says so, and the next row starts. Its
figures are appended to FILE (gpu.jsonl) as they come, with the card, the driver, the versions and the commit. So an
interrupted measurement keeps what it has, and a new start measures only the missing rows. A table is printed at the
end. `--check` runs every row on a CPU with toy sizes, to test the code; its figures mean nothing.

Weights are random and nothing is downloaded: speed does not depend on what a model knows. Documents have 500 tokens,
half of them trained, unless a row says otherwise. TOKENIZER (a Llama-3 folder) and DATA (conversations) are for the
rows that run train.py and other trainers; without them the benchmark makes a small tokenizer and conversations. `of
peak` is the FLOPs a step needs (minisft/model/flops.py: attention within documents, the head on trained tokens, no
recomputation) divided by what an 8192^3 product reaches in the row `ceilings`.
"""

import argparse
import gc
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py sets it

Figures = Iterator[tuple[str, float | str, str]]  # what is measured, its value, the unit


@dataclass(frozen=True)
class Setting:
    """The arguments of a row."""

    check: bool  # toy sizes, on a CPU
    gpus: int
    tokenizer: str
    data: str
    folder: Path  # the row's own

    def size(self, real: int, toy: int) -> int:
        """Return `real`, or `toy` in a check."""
        return toy if self.check else real

    @property
    def device(self) -> str:
        return "cpu" if self.check else "cuda"

    def config(self, preset: str) -> Any:
        """Return the shape of a network."""
        from minisft.model.llama_config import PRESETS

        config = PRESETS[preset]
        return replace(config, vocab_size=640, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16) if self.check else config


# ------------------------------------------------------------------------------------------------------------ helpers


def timed(work: Callable[[], Any], *, on: str, rounds: int = 5, warmup: int = 2) -> float:
    """Return the seconds of one call, the median of several."""
    found = []
    for i in range(warmup + rounds):
        wait(on)
        started = time.perf_counter()
        work()
        wait(on)
        if i >= warmup:
            found.append(time.perf_counter() - started)
    return median(found)


def wait(on: str) -> None:
    """Wait until the device has finished."""
    import torch

    if on == "cuda":
        torch.cuda.synchronize()


def peak_gib(on: str) -> float:
    """Return the most memory allocated since the last call of this function."""
    import torch

    if on != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return found


def lengths_of(tokens: int, each: int) -> tuple[int, ...]:
    """Return the lengths of documents of `each` tokens, the last one shorter."""
    return (each,) * (tokens // each) + ((tokens % each,) if tokens % each else ())


def stream(tokens: int, each: int, vocabulary: int, *, seed: int = 0, trained: float = 0.5) -> Any:
    """Make a micro-batch of random tokens; the second part of each document is trained."""
    import numpy as np

    from minisft.data.batches import micro_batch

    rng = np.random.default_rng(seed)
    documents = [(rng.integers(0, vocabulary, n), (np.arange(n) >= max(n * (1 - trained), 1)).astype(int))
                 for n in lengths_of(tokens, each)]
    return micro_batch(SimpleNamespace(document=documents.__getitem__, lengths=documents), list(range(len(documents))))


def near(found: Any, expected: Any) -> float:
    """Return the relative error of a tensor in the Euclidean norm."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def documents_of(lengths: tuple[int, ...], on: str) -> Any:
    """The documents of a stream, on the device."""
    from minisft.model.llama import Documents

    return Documents.of_lengths(lengths, device=on)


# ---------------------------------------------------------------------------------------------------------------- rows


def ceilings(s: Setting) -> Figures:
    """Measure what the card can reach, and the attention kernel against fp32."""
    import torch
    import torch.nn.functional as F

    from minisft.model.llama import attend

    n, on = s.size(8192, 64), s.device
    a, b = torch.randn(2, n, n, device=on).bfloat16()

    def products(a=a, b=b) -> None:
        for _ in range(10):
            a @ b

    yield f"{n}^3 product, bf16", 10 * 2 * n**3 / timed(products, on=on) / 1e12, "TFLOP/s"
    x = torch.empty(s.size(2**31, 2**16), dtype=torch.uint8, device=on)
    y = torch.empty_like(x)
    yield "copy, read and written", 2 * len(x) / timed(partial(y.copy_, x), on=on) / 1e12, "TB/s"
    del x, y, a, b
    left, right, sums = (torch.randn(n // 8, n // 8, device=on) for _ in range(3))
    expected = sums.double() + left.bfloat16().double() @ right.bfloat16().double()
    if on == "cuda":
        found = torch.addmm(sums, left.bfloat16(), right.bfloat16(), out_dtype=torch.float32, out=sums)
        yield "addmm of bf16 into fp32: error", near(found, expected), ""
    heads, shared, width = s.size(32, 4), s.size(8, 2), s.size(128, 16)
    for tokens, each in ((s.size(8192, 64), s.size(500, 20)), (s.size(8192, 64), s.size(8192, 64))):
        lengths = lengths_of(tokens, each)
        documents = documents_of(lengths, on)
        qkv = [torch.randn(tokens, h, width, device=on).bfloat16().requires_grad_() for h in (heads, shared, shared)]
        grad = torch.randn(tokens, heads, width, device=on).bfloat16()
        out = attend(*qkv, documents)
        found = [out, *torch.autograd.grad(out, qkv, grad)]
        part = sum(lengths[-2:])  # the last two documents, in fp32 and one by one
        wide = [x.detach()[-part:].float().requires_grad_() for x in qkv]
        outs = [F.scaled_dot_product_attention(*(x[None, at].transpose(1, 2) for x in wide), is_causal=True,
                                               enable_gqa=True)[0].transpose(0, 1)
                for at in (slice(0, part - lengths[-1]), slice(part - lengths[-1], part)) if at.stop > at.start]
        expected = [torch.cat(outs), *torch.autograd.grad(torch.cat(outs), wide, grad[-part:].float())]
        yield (f"attention, documents of {each}: largest error",
               max(near(x[-part:], y) for x, y in zip(found, expected, strict=True)), "")
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        flops = 4 * heads * width * pairs
        forward = timed(lambda qkv=qkv, documents=documents: attend(*qkv, documents), on=on)
        both = timed(lambda qkv=qkv, documents=documents, grad=grad: torch.autograd.grad(
            attend(*qkv, documents), qkv, grad), on=on)
        yield f"attention, documents of {each}: forward", 1e3 * forward, "ms"
        yield f"attention, documents of {each}: both", 1e3 * both, "ms"
        yield f"attention, documents of {each}: both", 3.5 * flops / both / 1e12, "TFLOP/s"


def tests(s: Setting) -> Figures:
    """Run tests/test_gpu.py's comparisons of a GPU with the CPU; `python -m pytest -m gpu` has whole runs too."""
    chosen = ["-k", "attention and 1-64" if s.check else "attention or loss or logits or moments"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-v", "tests/test_gpu.py",
               *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            yield "failed", line, ""
    yield "pytest -m gpu", done.stdout.strip().splitlines()[-1], ""


def gradients(s: Setting) -> Figures:
    """Compare compiled layers with eager ones: every parameter's gradient."""
    import torch

    from minisft.model.llama_config import PRESETS

    config = replace(PRESETS["llama-3.2-1b"], vocab_size=1024, hidden_size=256, intermediate_size=512,
                     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    for adapters, recompute, scale in ((0, "none", ""), (0, "selective", ""), (8, "none", ""), (0, "full", ""),
                                       (0, "none", "tensor"), (8, "selective", "row")):
        torch._dynamo.reset()
        found = [gradients_of(config, s, compiled=compiled, recompute=recompute, rank=adapters, fp8=scale)
                 for compiled in (False, True)]
        errors = {name: near(grad, found[0][name]) for name, grad in found[1].items()}
        zero = [name for name, grad in found[1].items() if not grad.any() and found[0][name].any()]
        worst = max(errors, key=lambda name: errors[name])
        what = f"{'LoRA' if adapters else 'fp32 masters'}, recompute {recompute}{scale and f', fp8 by {scale}'}"
        yield f"{what}: largest error of {len(errors)} gradients, compiled against eager", errors[worst], worst
        yield f"{what}: gradients that are zero", float(len(zero)), ""


def gradients_of(config: Any, s: Setting, *, compiled: bool, **options: Any) -> dict[str, Any]:
    """Return every trained parameter's gradient after one micro-batch."""
    model, _, world = network(config, s, compiled=compiled, **options)
    step(model, None, world, [stream(512, 100, config.vocab_size)], compiled=compiled)
    return {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}


def network(config: Any, s: Setting, *, compiled: bool, recompute: str = "none", rank: int = 0, sharded: bool = False,
            parameters: str = "fp32", moments: str = "fp32", in_backward: bool = False, base: str = "bf16",
            fp8: str = "") -> Any:
    """Build a random network and its optimizer as a run does. `sharded`: with FSDP even for one rank; `fp8`: the scale
    of its products in FP8."""
    import torch
    import torch.distributed as dist

    from minisft.config import Config, LoraConfig, OptimConfig, ParallelConfig, TrainConfig
    from minisft.lora import adapters as lora
    from minisft.runs.assemble import adapt, open_optimizer
    from minisft.training import parallel

    global WORLD  # one process, one group
    if not dist.is_initialized():
        WORLD = parallel.start()
    world = WORLD
    settings = Config(lora=LoraConfig(rank=rank, base=base),
                      train=TrainConfig(precision="fp8" if fp8 else "bf16", fp8_scale=fp8 or "tensor"),
                      optim=OptimConfig(parameters=parameters, moments=moments, in_backward=in_backward),
                      parallel=ParallelConfig(activation_checkpointing=recompute,
                                              compile="true" if compiled else "false"))
    model = parallel.build_model(config, replace(world, ranks=2) if sharded else world, settings,
                                 adapt=partial(adapt, config=settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.fill_(1) if name.endswith("norm.weight") else local.normal_(std=0.02)
        for _, module in lora.adapters(model):
            module.channels.zero_()
    return model, open_optimizer(model, settings, world), world


WORLD: Any = None


def step(model: Any, optimizer: Any, world: Any, batches: list[Any], *, compiled: bool, number: int = 0) -> Any:
    """One step of the loop in minisft/training/loop.py, without evaluation, log and checkpoint."""
    import torch

    from minisft.training.loss import batch_loss

    targets = sum(len(batch.targets) for batch in batches)
    total = torch.zeros((), device=world.device)
    if optimizer:
        optimizer.begin(1e-5, number)
    for batch in batches:
        loss = batch_loss(model, batch, world.device, targets, compiled=compiled)
        loss.backward()
        total += loss.detach()
    if optimizer:
        optimizer.clip(0.0 if optimizer.optim.in_backward else 1.0)
        optimizer.step()
    return total


def steps(s: Setting, what: str, preset: str, *, tokens: int, count: int, batches: int = 1, recompute: str = "none",
          compiled: bool = True, each: int = 500, trained: float = 0.5, rank: int = 0, **options: Any) -> Figures:
    """Measure speed and memory of some steps of a network."""
    import numpy as np
    import torch

    from minisft.config import LoraConfig
    from minisft.lora.targets import ranks
    from minisft.model.flops import training_flops
    from minisft.planning.memory import Bytes, StepMemory

    # A cycle (its layers, and the compiler's objects) keeps the model before this one alive.
    gc.collect()
    config, on = s.config(preset), s.device
    tokens, each = s.size(tokens, 128), s.size(each, 40)
    model, optimizer, world = network(config, s, compiled=compiled, recompute=recompute, rank=rank, **options)
    made = [stream(tokens, each, config.vocab_size, seed=i, trained=trained) for i in range(batches)]
    made = [batch.pinned() for batch in made] if on == "cuda" else made
    started = time.perf_counter()
    step(model, optimizer, world, made, compiled=compiled)
    wait(on)
    yield f"{what}: first step, compiled in it", time.perf_counter() - started, "s"
    step(model, optimizer, world, made, compiled=compiled, number=1)
    peak_gib(on)
    number = iter(range(2, 10**6))
    seconds = timed(lambda: step(model, optimizer, world, made, compiled=compiled, number=next(number)), on=on,
                    rounds=s.size(count, 1), warmup=1)
    adapters = LoraConfig(rank=rank, base=options.get("base", "bf16")) if rank else None
    lengths = np.concatenate([batch.lengths for batch in made])
    flops = training_flops(config, lengths, np.array([sum(len(b.targets) for b in made), *[0] * (len(lengths) - 1)]),
                           ranks=ranks(adapters, config) if adapters else None)
    yield f"{what}: tokens a second", batches * tokens / seconds, "tokens/s"
    yield f"{what}: step", 1e3 * seconds, "ms"
    yield f"{what}: FLOPs that are needed", flops / seconds / 1e12, "TFLOP/s"
    found = peak_gib(on)
    yield f"{what}: allocated", found, "GiB"
    narrow = options.get("parameters") == "bf16"
    each_number = Bytes(2 if narrow else 4, 2 if narrow else 4, 4 if options.get("moments") == "bf16" else 8)
    planned = StepMemory(config, 1, tokens, len(made[0].targets), recompute, accumulates=batches > 1, each=each_number,
                         lora=adapters).peak()
    yield f"{what}: allocated over planned", found / (planned.allocated / 2**30), ""
    if on == "cuda":
        yield f"{what}: reserved", torch.cuda.max_memory_reserved() / 2**30, "GiB"


def sync(s: Setting) -> Figures:
    """Run a whole step while any wait for the device raises."""
    import torch

    config = replace(s.config("llama-3.2-1b"), num_hidden_layers=2)
    for what, options in (("fp32 masters", {}), ("LoRA", {"rank": 8}),
                          ("bf16 parameters and moments", {"parameters": "bf16", "moments": "bf16"}),
                          ("FP8 by tensor", {"fp8": "tensor"}), ("FP8 by row", {"fp8": "row"})):
        torch._dynamo.reset()
        model, optimizer, world = network(config, s, compiled=True, recompute="selective", **options)
        made = [stream(s.size(2048, 128), 100, config.vocab_size, seed=i) for i in range(2)]
        made = [batch.pinned() for batch in made] if s.device == "cuda" else made
        for number in range(3):
            if s.device == "cuda" and number == 2:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            step(model, optimizer, world, made, compiled=True, number=number)
        if s.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        yield f"a step without a wait: {what}", "yes", ""


def block(s: Setting) -> Figures:
    """Measure one block of Llama-3-8B, forward and backward: 32 of them are most of a step."""
    import torch

    from minisft.model.llama import Block, rotations

    config, on, tokens = s.config("llama-3-8b"), s.device, s.size(8192, 64)
    numbers = sum(p.numel() for p in Block(config).parameters())
    for recompute, compiled, each, kept in (
            ("selective", True, 500, "bf16"), ("none", True, 500, "bf16"), ("none", True, 8192, "bf16"),
            ("none", True, 500, "fp32"), ("full", True, 500, "bf16"), ("none", False, 500, "bf16")):
        torch._dynamo.reset()
        each = min(each, s.size(8192, 20))
        layer = Block(config).to(on, torch.bfloat16 if kept == "bf16" else torch.float32)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        run = torch.compile(layer.forward, fullgraph=True) if compiled else layer.forward
        documents = documents_of(lengths_of(tokens, each), on)
        rotation = rotations(documents.positions, config)
        x = torch.randn(tokens, config.hidden_size, device=on).bfloat16().requires_grad_()
        grad = torch.randn_like(x)

        def work(run=run, layer=layer, x=x, rotation=rotation, documents=documents, grad=grad,
                 recompute=recompute) -> None:
            run(x, rotation, documents, recompute).backward(grad)
            layer.zero_grad()

        name = f"block, {recompute}, documents of {each}, {kept} weights" + ("" if compiled else ", eager")
        work()
        wait(on)
        before = torch.cuda.memory_allocated() / 2**30 if on == "cuda" else 0
        peak_gib(on)
        seconds = timed(work, on=on)
        pairs = sum(n * (n + 1) // 2 for n in documents.offsets.diff().tolist())
        flops = 6 * numbers * tokens + 12 * config.num_attention_heads * config.head_dim * pairs
        yield name, 1e3 * seconds, "ms"
        yield name, flops / seconds / 1e12, "TFLOP/s"
        yield f"{name}: beyond weights and input", peak_gib(on) - before, "GiB"
        del layer, run, x, grad, work


def context(s: Setting) -> Figures:
    """Measure attention of one long document: all heads of Llama-3-8B, and those of one of eight ranks."""
    import torch

    from minisft.model.llama import attend

    on, tokens, width = s.device, s.size(65_536, 64), s.size(128, 16)
    documents = documents_of((tokens,), on)
    for heads, shared in ((32, 8), (4, 1)):
        qkv = [torch.randn(tokens, h, width, device=on).bfloat16().requires_grad_() for h in (heads, shared, shared)]
        grad = torch.randn(tokens, heads, width, device=on).bfloat16()
        seconds = timed(lambda qkv=qkv, grad=grad: torch.autograd.grad(attend(*qkv, documents), qkv, grad), on=on,
                        rounds=3, warmup=1)
        flops = 14 * heads * width * tokens * (tokens + 1) // 2
        yield f"attention, one document of {tokens}, {heads} heads on {shared}: both", 1e3 * seconds, "ms"
        yield f"attention, one document of {tokens}, {heads} heads on {shared}: both", flops / seconds / 1e12, "TFLOP/s"


def fp8(s: Setting) -> Figures:
    """Measure FP8 against bf16, in turns: a block and adapters of Llama-3-8B, Llama-3.2-1B, FSDP2 with one rank."""
    import torch

    from minisft import fp8 as products
    from minisft.model.llama import Block, rotations

    config, on, tokens = s.config("llama-3-8b"), s.device, s.size(8192, 64)
    documents = documents_of(lengths_of(tokens, s.size(500, 20)), on)
    rotation = rotations(documents.positions, config)
    x = torch.randn(tokens, config.hidden_size, device=on).bfloat16().requires_grad_()
    grad, expected = torch.randn_like(x), {}
    for name in ("bf16", "tensor", "row", "bf16 again"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        layer = Block(config).to(on, torch.bfloat16)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        if name in ("tensor", "row"):
            products.use(layer, name)
        run = torch.compile(layer.forward, fullgraph=True)

        def work(run=run, layer=layer) -> None:
            layer.zero_grad()
            run(x, rotation, documents).backward(grad)

        work()
        found = {key: parameter.grad.clone() for key, parameter in layer.named_parameters()}
        expected = expected or found
        yield f"block, {name}", 1e3 * timed(work, on=on), "ms"
        yield f"block, {name}: largest error of a gradient", max(near(found[k], expected[k]) for k in found), ""
        del layer, run, work, found
    for what, preset, options in (("8B LoRA r16", "llama-3-8b", {"rank": 16}), ("1B", "llama-3.2-1b", {}),
                                  ("1B, FSDP2", "llama-3.2-1b", {"sharded": True})):
        for scale in ("", "tensor", "row"):
            torch._dynamo.reset()
            found = steps(s, f"{what}, {f'fp8 by {scale}' if scale else 'bf16'}", preset, tokens=8192, count=4,
                          fp8=scale, **options)
            yield from (figure for figure in found if figure[0].endswith(("tokens a second", "allocated")))


def head(s: Setting) -> Figures:
    """Measure the loss of 8,192 trained tokens at Llama-3-8B's head, and its gradients."""
    import torch
    import torch.nn.functional as F

    from minisft.training import loss as loss_module

    tokens, width, words, on = s.size(8192, 64), s.size(4096, 32), s.size(128256, 640), s.device
    hidden = torch.randn(tokens, width, device=on).bfloat16().requires_grad_()
    weight = (torch.randn(words, width, device=on) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(words, (tokens,), device=on)

    def ours(compiled: bool) -> Any:
        return loss_module.linear_cross_entropy(hidden, weight, targets, denominator=tokens, compiled=compiled)

    def torchs() -> Any:
        return F.linear_cross_entropy(hidden, weight, targets)

    def plain() -> Any:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    variants: list[tuple[str, int, Callable[[], Any]]] = [
        (f"minisft, {at_once} tokens at once{'' if compiled else ', not compiled'}", at_once, partial(ours, compiled))
        for at_once, compiled in ((1024, True), (2048, True), (4096, True), (8192, True), (1024, False))]
    variants += [("plain, all logits at once", 0, plain)]
    if hasattr(F, "linear_cross_entropy"):
        variants += [("torch.nn.functional.linear_cross_entropy", 0, torchs)]
    if on == "cuda":
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError as error:
            yield "Liger", f"not importable ({error})", ""
        else:
            variants += [("Liger", 0, lambda: liger_fused_linear_cross_entropy(hidden, weight, targets))]
    expected = None
    for name, at_once, forward in variants:
        if at_once:
            loss_module.CHUNK = s.size(at_once, 16) * words

        def work(forward: Callable[[], Any] = forward) -> Any:
            loss = forward()
            return loss, *torch.autograd.grad(loss, (hidden, weight))

        found = work()
        expected = expected or [x.detach().clone() for x in found]
        error = max(near(x, y) for x, y in zip(found, expected, strict=True))
        del found
        wait(on)
        before = torch.cuda.memory_allocated() / 2**30 if on == "cuda" else 0
        peak_gib(on)
        seconds = timed(work, on=on, rounds=3, warmup=1)
        yield f"head, {name}", 1e3 * seconds, "ms"
        yield f"head, {name}", 6 * tokens * width * words / seconds / 1e12, "TFLOP/s"
        yield f"head, {name}: memory", peak_gib(on) - before, "GiB"
        yield f"head, {name}: away from the first", error, ""


def optimizer(s: Setting) -> Figures:
    """Measure an update of 10^9 numbers."""
    import torch

    from minisft.config import OptimConfig
    from minisft.lean.adamw import LeanAdamW
    from minisft.model.llama import DTYPES
    from minisft.training.optimizer import AdamW

    side, matrices, on = s.size(4096, 32), s.size(60, 2), s.device
    for parameters, moments, compiled in (("fp32", "fp32", False), ("bf16", "bf16", True), ("bf16", "bf16", False),
                                          ("fp32", "bf16", True)):
        torch._dynamo.reset()
        model = torch.nn.ParameterList(torch.randn(side, side, device=on, dtype=DTYPES[parameters])
                                       for _ in range(matrices))
        updates = (AdamW(model) if parameters == moments == "fp32" else  # as a run chooses
                   LeanAdamW(model, OptimConfig(moments=moments), compiled=compiled))
        grads = [torch.randn_like(p) for p in model]

        def work(updates=updates, model=model, grads=grads) -> None:
            updates.begin(1e-5, 1)
            for parameter, grad in zip(model, grads, strict=True):
                parameter.grad = grad
            updates.clip(1.0)
            updates.step()

        seconds = timed(work, on=on, rounds=3)
        name = f"clip and update, parameters {parameters}, moments {moments}, {'compiled' if compiled else 'as it is'}"
        yield name, 1e9 / (matrices * side**2) * 1e3 * seconds, "ms for 10^9"
        del model, updates, grads, work


def fsdp(s: Setting) -> Figures:
    """Measure Llama-3.2-1B on one GPU: fp32 weights converted as they are used, against FSDP2 with one rank."""
    for sharded in (False, True):
        import torch

        torch._dynamo.reset()
        for batches in (1, 4):
            yield from steps(s, f"1B, {'FSDP2' if sharded else 'plain'}, {batches} x 8192 tokens", "llama-3.2-1b",
                             tokens=8192, count=4, batches=batches, sharded=sharded)


def lora8b(s: Setting) -> Figures:
    """Measure Llama-3-8B, adapters of rank 16, two packs of 4,096 tokens; NeMo Automodel published 12,473 tokens/s."""
    import torch

    for recompute in ("none", "selective"):
        torch._dynamo.reset()
        try:
            yield from steps(s, f"8B LoRA r16, 2 x 4096, {recompute}", "llama-3-8b", tokens=8192, count=4, rank=16,
                             recompute=recompute)
        except torch.OutOfMemoryError:
            yield f"8B LoRA r16, 2 x 4096, {recompute}", "out of memory", ""
        if s.device == "cuda":
            torch.cuda.empty_cache()


def full8b(s: Setting) -> Figures:
    """Measure Llama-3-8B, all parameters, on one card: bf16 parameters and moments, updated in the backward pass."""
    yield from steps(s, "8B full, bf16, in backward, selective", "llama-3-8b", tokens=8192, count=3,
                     recompute="selective", parameters="bf16", moments="bf16", in_backward=True)


def evaluation(s: Setting) -> Figures:
    """Measure the loss of held-out tokens: Llama-3-8B with adapters of rank 16, in bf16 and in FP8."""
    import torch

    from minisft.training.loss import batch_loss

    config, tokens = s.config("llama-3-8b"), s.size(8192, 128)
    for scale in ("", "row"):
        gc.collect()
        torch._dynamo.reset()
        model, _, world = network(config, s, compiled=True, rank=16, fp8=scale)
        batch = stream(tokens, s.size(500, 40), config.vocab_size)
        with torch.no_grad():
            work = partial(batch_loss, model, batch, world.device, len(batch.targets), compiled=True)
            work()
            before = torch.cuda.memory_allocated() / 2**30 if s.device == "cuda" else 0
            peak_gib(s.device)
            seconds = timed(work, on=s.device)
        name = f"8B LoRA r16, held out, {f'fp8 by {scale}' if scale else 'bf16'}"
        yield f"{name}: tokens a second", tokens / seconds, "tokens/s"
        yield f"{name}: beyond weights", peak_gib(s.device) - before, "GiB"


def generation(s: Setting) -> Figures:
    """Measure greedy answers of Llama-3.2-1B in bf16, of one prompt and of several at once."""
    import torch

    from minisft.generate.assistant import generate
    from minisft.generate.decoding import CachedDecoder
    from minisft.model.llama import Llama
    from minisft.model.weights import initialize

    config, tokens = s.config("llama-3.2-1b"), s.size(128, 4)
    with torch.device(s.device):
        model = Llama(config).bfloat16()
    initialize(model, std=0.02, seed=0)
    decoder, numbers = CachedDecoder(model), sum(parameter.numel() for parameter in model.parameters())
    for texts in (1, s.size(32, 2)):
        prompts = torch.randint(config.vocab_size, (texts, 128), generator=torch.Generator().manual_seed(0)).tolist()
        first, whole = (timed(partial(generate, decoder, prompts, max_new_tokens=count, stop_ids=set()), on=s.device,
                              rounds=3, warmup=1) for count in (1, tokens + 1))
        each = (whole - first) / tokens
        yield f"1B, bf16, {texts} texts: tokens a second", texts / each, "tokens/s"
        yield f"1B, bf16, {texts} texts: weights read", 2 * numbers / each / 1e12, "TB/s"
        yield f"1B, bf16, {texts} texts: first token", 1e3 * first, "ms"


# ------------------------------------------------------------------------------------------------------ whole programs


def recipe(s: Setting, shape: str, **keys: Any) -> list[str]:
    """Return train.py's command line for random weights of the shape in file or preset `shape`."""
    (s.folder / "empty.toml").touch()
    settings = {"model.init": "random", "model.config": shape, "model.tokenizer": s.tokenizer, "data.train": s.data,
                "data.template": "llama3", "data.overlong": "truncate", "data.cache": str(s.folder / "cache"),
                "train.epochs": 100, "optim.warmup_steps": 2, "checkpoint.every": 0, "run.export": "false", **keys}
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(s.gpus)] if s.gpus > 1 else []
    return [sys.executable, *ranks, str(ROOT / "train.py"), str(s.folder / "empty.toml"),
            *(text for key, value in settings.items() for text in (f"--{key.replace('__', '.')}", str(value)))]


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the training records of a run."""
    from minisft.reports.logged_run import read_log

    return [record for record in read_log(folder) if record["kind"] == "train"]


def shape(s: Setting, preset: str, **change: Any) -> str:
    """Write a config.json with the shape of `preset`."""
    file = s.folder / f"{preset}.json"
    config = s.config(preset)
    words = json.loads((Path(s.tokenizer) / "tokenizer.json").read_text())
    largest = max([*words["model"]["vocab"].values(), *(token["id"] for token in words["added_tokens"])])
    file.write_text(json.dumps(replace(config, vocab_size=max(config.vocab_size, largest + 1), **change).to_dict(
        dtype="float32")))
    return str(file)


def run(command: list[str], s: Setting) -> None:
    """Run a program that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=s.folder, env=environment(s))
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip()[-2000:])


def environment(s: Setting) -> dict[str, str]:
    """Return a program's environment; in a check it hides the GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if s.check else {}
    return {**os.environ, **hidden, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def train1b(s: Setting) -> Figures:
    """Measure train.py itself with Llama-3.2-1B's shape: data, loader, log and all; profile three steps."""
    folder = s.folder / "run"
    run(recipe(s, shape(s, "llama-3.2-1b"), **{
        "data.seq_len": s.size(8192, 256), "batch.packs": 2, "train.max_steps": s.size(20, 6),
        "run.dir": str(folder), "run.profile": "true"}), s)
    late = log_of(folder)[s.size(8, 2):]
    yield "train.py, 1B, 2 x 8192: tokens a second", median(r["tokens_per_second"] for r in late), "tokens/s"
    yield "train.py, 1B, 2 x 8192: share of the data sheet's peak", median(r.get("mfu", 0) for r in late), ""
    yield "train.py, 1B, 2 x 8192: allocated", late[-1]["memory_gib"], "GiB"
    for line in (folder / "profile" / "table.txt").read_text().splitlines()[:40]:
        if line.strip():
            yield "profile", line, ""


def resume(s: Setting) -> Figures:
    """Kill a run with -9 and start it again; with train.deterministic it gives the same bits."""
    small = shape(s, "llama-3.2-1b", **({} if s.check else {"num_hidden_layers": 4, "hidden_size": 1024,
                                                           "intermediate_size": 4096, "num_attention_heads": 16}))
    for deterministic in ("true", "false"):
        keys = {"data.seq_len": s.size(2048, 256), "batch.packs": 2, "train.max_steps": 12, "checkpoint.every": 4,
                "checkpoint.keep": 1, "train.deterministic": deterministic}
        whole, killed = s.folder / f"whole-{deterministic}", s.folder / f"killed-{deterministic}"
        run(recipe(s, small, **keys, **{"run.dir": str(whole)}), s)
        command = recipe(s, small, **keys, **{"run.dir": str(killed)})
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=s.folder,
                                   env=environment(s))
        while process.poll() is None and len(log_of(killed)) < 7:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        run(command, s)
        first, again = ([r["loss"] for r in log_of(folder)] for folder in (whole, killed))
        name = f"kill -9 and resume, deterministic {deterministic}"
        yield f"{name}: steps", float(len(again)), ""
        same = sum(a == b for a, b in zip(first, again, strict=True))
        yield f"{name}: losses equal bit for bit", float(same), "of 12"
        yield f"{name}: largest difference", max(abs(a - b) for a, b in zip(first, again, strict=True)), "nats"
        shutil.rmtree(whole)
        shutil.rmtree(killed)


def peers(s: Setting, *, seq_len: int) -> Figures:
    """Compare minisft, TRL with its attention kernels, and plain transformers on Llama-3.2-1B and the same packs."""
    import torch

    from minisft.model.llama import Llama
    from minisft.model.llama_config import read_config
    from minisft.model.weights import initialize
    from minisft.pretrained import save_pretrained

    folder = s.folder / "model"
    config = read_config(shape(s, "llama-3.2-1b"))
    model = Llama(config).to(s.device)
    initialize(model, std=0.02, seed=0)
    save_pretrained(model, folder)
    for file in Path(s.tokenizer).glob("tokenizer*.json"):
        shutil.copy(file, folder)
    del model
    if s.device == "cuda":
        torch.cuda.empty_cache()
    systems = ["minisft", "trl", "trl-liger", "transformers", "trl-flash"] if not s.check else ["minisft"]
    out = s.folder / "throughput.jsonl"
    run([sys.executable, str(ROOT / "benchmarks" / "throughput.py"), str(folder), s.data, "--template", "llama3",
         "--seq-len", str(s.size(seq_len, 256)), "--packs", "2", "--turns", "1", "--steps", str(s.size(6, 1)),
         "--precision", "bf16", *["--square", "256"] * s.check, "--systems", *systems, "--limit", "60",
         "--json", str(out)], s)
    for row in map(json.loads, out.read_text().splitlines()):
        name = f"1B, packs of {seq_len}: {row['system']}"
        if "failed" in row:
            yield name, f"failed: {row['failed'][:200]}", ""
            continue
        yield f"{name}, tokens a second", row["tokens_per_second"], "tokens/s"
        yield f"{name}, of peak", row["of_peak"], ""
        yield f"{name}, time of a step over the first's", row["step"], ""
        yield f"{name}, allocated", row["peak_gib"], "GiB"
        yield f"{name}, losses", " ".join(f"{loss:.4f}" for loss in row["losses"]), ""


def many(s: Setting) -> Figures:
    """Run train.py with Llama-3-8B on all GPUs, if there are several: docs/performance.md has the computed figures."""
    if s.gpus < 2 and not s.check:
        yield "8B on several GPUs", "one GPU only", ""
        return
    for name, keys in (("selective", {"parallel.activation_checkpointing": "selective"}),
                       ("none", {}), ("full", {"parallel.activation_checkpointing": "full"}),
                       ("selective, not resharded", {"parallel.activation_checkpointing": "selective",
                                                     "parallel.reshard": "false"}),
                       ("selective, prefetch 1", {"parallel.activation_checkpointing": "selective",
                                                  "parallel.prefetch": 1}),
                       ("selective, packs of 65,536 shared by all", {
                           "parallel.activation_checkpointing": "selective", "parallel.context": s.gpus,
                           "data.seq_len": s.size(65_536, 256)})):
        folder = s.folder / name.replace(" ", "-").replace(",", "")
        try:
            run(recipe(s, shape(s, "llama-3-8b"), **{
                "data.seq_len": s.size(8192, 256), "batch.packs": max(s.gpus, 1), "train.max_steps": s.size(20, 3),
                "run.dir": str(folder), **keys}), s)
        except RuntimeError as error:
            yield f"8B on {s.gpus} GPUs, {name}", f"failed: {str(error)[-200:]}", ""
            continue
        late = log_of(folder)[s.size(8, 1):]
        yield (f"8B on {s.gpus} GPUs, {name}: tokens a second and GPU",
               median(r["tokens_per_second"] for r in late) / s.gpus, "tokens/s")
        yield f"8B on {s.gpus} GPUs, {name}: allocated", late[-1]["memory_gib"], "GiB"
        yield f"8B on {s.gpus} GPUs, {name}: share of the data sheet's peak", median(r.get("mfu", 0) for r in late), ""


ROWS: dict[str, tuple[Callable[[Setting], Figures], int]] = {  # with each row's limit in seconds
    "ceilings": (ceilings, 40), "gradients": (gradients, 120), "sync": (sync, 120), "block": (block, 120),
    "lora8b": (lora8b, 120), "peers8192": (partial(peers, seq_len=8192), 180), "train1b": (train1b, 120),
    "head": (head, 100), "optimizer": (optimizer, 60), "fsdp": (fsdp, 120), "full8b": (full8b, 120),
    "resume": (resume, 150), "tests": (tests, 150), "generation": (generation, 60), "evaluation": (evaluation, 60),
    "fp8": (fp8, 180), "context": (context, 40),
    "peers4096": (partial(peers, seq_len=4096), 180), "many": (many, 900),
}


# ---------------------------------------------------------------------------------------------------------- the driver


def arguments() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all rows together (540)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME",
                        help=f"rows, in this order ({' '.join(ROWS)})")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tokenizer", default="", metavar="FOLDER", help="Llama-3's (a small one that is made)")
    parser.add_argument("--data", default="", metavar="FILE", help="conversations (random ones that are made)")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), metavar="FILE")
    parser.add_argument("--check", action="store_true", help="every row on a CPU, with toy sizes")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the rows that are not in the file yet, and print the table; returns 1 if one of them failed."""
    options = arguments()
    if options.row:
        return one_row(options)
    out = options.out.resolve()
    done = {record["row"] for record in records(out) if record.get("ended")}
    deadline = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory(prefix="minisft-gpu-") as folder:
        tokenizer, data = made(Path(folder), options)
        for name in (name for name in options.rows if name not in done):
            left = deadline - time.monotonic()
            if left < 15 and not options.check:
                print(f"{name}: no time left", flush=True)
                continue
            limit = ROWS[name][1] if options.check else min(ROWS[name][1], left)
            (Path(folder) / name).mkdir()
            command = [sys.executable, __file__, "--row", name, "--folder", str(Path(folder) / name), "--tokenizer",
                       tokenizer, "--data", data, "--gpus", str(options.gpus), *["--check"] * options.check]
            attempt(name, command, limit=limit, out=out)
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
    print("\n" + table(records(out)))
    return int(any(record.get("ended", "done") != "done" for record in records(out) if record["row"] in options.rows))


def attempt(name: str, command: list[str], *, limit: float, out: Path) -> None:
    """Run a row, and append each figure to `out` as it comes."""
    started, errors = time.monotonic(), tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.start()
    facts = {"row": name, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    with out.open("a", buffering=1) as log:
        for line in process.stdout:
            if line.startswith("{"):
                log.write(json.dumps({**facts, **json.loads(line)}) + "\n")
                print(f"{name}: {line.strip()}"[:250], flush=True)
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        last = errors.read().strip()[-3000:]
        ended = "done" if code == 0 else f"over {limit:.0f} s" if code == -signal.SIGKILL else f"failed: {last[-1500:]}"
        log.write(json.dumps({**facts, "ended": ended, "seconds": round(time.monotonic() - started, 1)}) + "\n")
    print(f"{name}: {ended[:1500]} ({time.monotonic() - started:.0f} s)", flush=True)


def one_row(options: argparse.Namespace) -> int:
    """Run a row in this process: print a line of JSON for each figure."""
    if options.check:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if options.check:  # make graphs but run them eagerly, because compiling for a CPU would take minutes
        torch.compile = partial(torch.compile, backend="aot_eager")
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries away from the figures
    facts = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
             "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
             "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
             "commit": output("git", "rev-parse", "--short", "HEAD")}
    print(json.dumps(facts), file=out, flush=True)
    setting = Setting(options.check, options.gpus, options.tokenizer, options.data, options.folder)
    for figure, value, unit in ROWS[options.row][0](setting):
        print(json.dumps({"figure": figure, "value": value, "unit": unit}), file=out, flush=True)
    out.flush()
    os._exit(0)  # skip the shutdown of a process group with one rank


def output(*command: str) -> str:
    """Return what a program prints, or nothing if it is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


def records(file: Path) -> list[dict[str, Any]]:
    """Read what was measured so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(found: list[dict[str, Any]]) -> str:
    """Format all figures as Markdown."""
    lines = ["| row | figure | |", "|---|---|---|"]
    for record in found:
        if "figure" in record:
            value = record["value"]
            text = value if isinstance(value, str) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
            lines.append(f"| {record['row']} | {record['figure']} | {text} {record['unit']} |")
        elif record.get("ended", "done") != "done":
            lines.append(f"| {record['row']} | ended | {record['ended'].splitlines()[-1][:150]} |")
    device = {(r["device"], r["torch"], r["driver"], r["commit"]) for r in found if "device" in r}
    return "\n".join([*("; ".join(filter(None, facts)) for facts in sorted(device)), "", *lines])


def made(folder: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Return the tokenizer's folder and the file of conversations, from the options or made here."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnoprstuvyz") for _ in range(rng.randint(2, 9))) for _ in range(3000)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high))).capitalize() + "."

    data = folder / "conversations.jsonl"
    if not options.data:
        count = 300 if options.check else 6000
        with data.open("w") as out:
            for _ in range(count):
                turns = [{"role": role, "content": text(5, 120)} for role in ("user", "assistant")]
                out.write(json.dumps({"messages": turns}) + "\n")
    tokenizer = folder / "tokenizer"
    if not options.tokenizer:
        from minisft.demo.bpe import train_tokenizer

        train_tokenizer((text(5, 120) for _ in range(200)), 600, tokenizer)
    return (str(Path(options.tokenizer or tokenizer).resolve()), str(Path(options.data or data).resolve()))


if __name__ == "__main__":
    sys.exit(main())
