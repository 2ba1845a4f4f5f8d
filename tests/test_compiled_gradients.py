"""Compiled layers have the gradients of the same layers run as they are: every parameter's, in every setting.

torch 2.11 gave compiled layers with fp32 masters, and adapters, gradients of zero, and said nothing: the loss still
fell a little, by the embedding and the head.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from test_cuda_paths import TINY

from minisft.config import Config, LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from minisft.data.batches import micro_batch
from minisft.errors import UserError
from minisft.lora import adapters as lora
from minisft.model import weights
from minisft.runs import assemble
from minisft.training import parallel
from minisft.training.loss import batch_loss, linear_cross_entropy
from minisft.versions import SHARDS_BYTES

CONFIG = replace(TINY, num_hidden_layers=2)
ADAPTERS = {"LoRA": LoraConfig(rank=4, base="fp32"), "LoRA in bf16": LoraConfig(rank=4),
            "DoRA": LoraConfig(rank=4, dora=True), "NF4": LoraConfig(rank=4, base="nf4")}
SETTINGS = {"fp32": ("fp32", None), "fp32 masters": ("bf16", None), "LoRA": ("fp32", ADAPTERS["LoRA"]),
            **{name: ("bf16", ADAPTERS[name]) for name in ("LoRA in bf16", "DoRA", "NF4")}}
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Drawn:
    """A checkpoint of random weights."""

    path, piece = Path("drawn"), 0

    def __init__(self, config):
        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in parallel.Llama(config).named_parameters()}
        self.tensors = {name: torch.randn(shape, generator=generator) * 0.2 + name.endswith("norm.weight")
                        for name, shape in shapes.items()}
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def read(self, name, start, stop):
        return self.tensors[name][start:stop]


class Documents:
    """Three documents, the second half of each trained."""

    lengths = (30, 33, 1)

    def document(self, index):
        generator = torch.Generator().manual_seed(index)
        length = self.lengths[index]
        return torch.randint(97, (length,), generator=generator).numpy(), (torch.arange(length) > length / 2).numpy()


@pytest.fixture
def world():
    yield parallel.start()
    parallel.stop()
    torch._dynamo.reset()


def gradients(world, setting, recompute, *, compiled, sharded, precision=None):
    own, adapters = SETTINGS[setting]
    config = Config(train=TrainConfig(precision=precision or own), lora=adapters or LoraConfig(),
                    parallel=ParallelConfig(activation_checkpointing=recompute,
                                            compile="true" if compiled else "false"))
    return gradients_of(config, world, Drawn(CONFIG), sharded=sharded)


def gradients_of(config, world, source, *, sharded):
    """The loss of one micro-batch, and its gradients by everything that is trained."""
    compiled = config.parallel.compile == "true"
    model = parallel.build_model(CONFIG, replace(world, ranks=2) if sharded else world, config,
                                 adapt=partial(assemble.adapt, config=config))
    if config.lora.rank:
        lora.load(model, source, seed=0)
        for _, module in lora.adapters(model):
            with torch.no_grad():  # begins at zero, which would leave A without a gradient
                weights.local_rows(module.lora_B)[0].fill_(0.1)
    else:
        weights.load(model, source)
    batch = micro_batch(Documents(), [0, 1, 2])
    loss = batch_loss(model, batch, world.device, len(batch.targets), compiled=compiled)
    loss.backward()
    return {"loss": loss.detach(), **{name: weights.whole(p.grad) for name, p in model.named_parameters()
                                      if p.requires_grad}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("sharded", "recompute"), [
    pytest.param(sharded, recompute, id=f"{'FSDP2' if sharded else 'alone'}-{recompute}",
                 marks=[pytest.mark.slow] * (sharded == (recompute == "none") or recompute == "full"))
    for sharded in (False, True) for recompute in ("none", "selective", "full")])
@pytest.mark.parametrize("setting", [
    pytest.param(setting, marks=[pytest.mark.slow] * (setting not in ("fp32 masters", "LoRA")))
    for setting in SETTINGS])
def test_compiled_gradients_are_eager_ones(world, monkeypatch, setting, recompute, sharded, backend):
    if setting == "NF4" and sharded and not SHARDS_BYTES:
        pytest.skip("this torch cannot shard bytes, which is refused")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    # inductor keeps fp32 between operations that it fuses; rounded as in eager mode, the gradients can be compared.
    with torch._inductor.config.patch(emulate_precision_casts=True):
        eager, compiled = (gradients(world, setting, recompute, compiled=compiled, sharded=sharded)
                           for compiled in (False, True))
    assert eager.keys() == compiled.keys()
    # In bf16 each is rounded in its own way (2.11's inductor keeps some fp32 all the same), so both are held to fp32.
    # On an AMD EPYC inductor's rounding costs bf16 adapters up to 2.1 times as much as eager's.
    most = 3 if backend == "inductor" and setting == "LoRA in bf16" else 1.5
    exact = eager if SETTINGS[setting][0] == "fp32" else gradients(
        world, setting, recompute, compiled=False, sharded=sharded, precision="fp32")
    for name, expected in exact.items():
        assert expected.any(), f"{name}: nothing to compare"
        rounded = (eager[name] - expected).norm()
        slack = 1e-5 if exact is eager else 2**-9  # half of bf16's precision: eager's one loss may be right by chance
        assert (compiled[name] - expected).norm() <= slack * expected.norm() + most * rounded, name
        assert rounded < 0.5 * expected.norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("options", "weighted"), [({}, False), ({"label_smoothing": 0.1}, False), (
    {"z_loss": 1e-2}, False), ({"label_smoothing": 0.1, "z_loss": 1e-2}, True)])
def test_the_compiled_loss_is_the_loss(monkeypatch, options, weighted, backend):
    """For chunks of any length with one program; torch 2.11's compiler read what had just been overwritten."""
    from minisft.training import loss as loss_module

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(loss_module, "CHUNK", 256 * 1000)
    loss_module._compiler.cache_clear()
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight = (0.1 * torch.randn(1000, 64)).requires_grad_()
    for tokens in (700, 256, 3, 611):
        hidden, targets, found = torch.randn(tokens, 64, requires_grad=True), torch.randint(1000, (tokens,)), []
        weights = torch.rand(tokens).double() if weighted else None
        for compiled in (False, True):
            loss = linear_cross_entropy(hidden, weight, targets, denominator=tokens, compiled=compiled, **options,
                                        target_weights=weights)
            found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
        for eager, fused in zip(*found, strict=True):
            torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-7)
    loss_module._compiler.cache_clear()


def test_packed_bytes_that_this_torch_cannot_shard_are_refused(monkeypatch):

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(assemble, "SHARDS_BYTES", False)
    with pytest.raises(UserError, match=r"nf4 on several ranks: torch .* cannot shard bytes; use torch 2\.13 or newer"):
        assemble.check_ranks(Config(model=ModelConfig(path="x"), lora=LoraConfig(rank=8, base="nf4")))
