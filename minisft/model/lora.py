"""LoRA: frozen matrices with thin trained ones beside them (settings and papers in lora_config.py).

    y = W x + s B (A dropout(x))          LoRA, rsLoRA
    y = (m / |W + s B A|) (the same)      DoRA: m is trained, and the lengths |.| of the rows count as constants

A network is adapted while it is on the meta device: the linear matrices of its blocks become `FrozenLinear`, under the
same names, so a checkpoint of the base is read as ever (into bf16, fp32, or NF4 as it is read) and nothing of it has
gradients or moments. Adapters are fp32 masters like all that is trained. B begins at zero, so the first step sees the
base.

DoRA's m is kept as its distance from the length it began at. The distance is small: gathered in bf16 it loses nothing
that counts, where m itself would be rounded by a fifth of a percent.

Dropout is drawn from (seed, step, document, position, channel) by a hash (counter_rng.py): a recomputed block, a
resumed run, and any number of ranks drop the same. With DoRA it is taken of what the adapter sees; peft, whose base
sees the dropped input a second time there, is followed at a dropout of 0 only. """

# T tokens, I inputs and O outputs of a matrix, r rank

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from minisft.counter_rng import hashed, key_of
from minisft.model import weights
from minisft.model.llama import Llama
from minisft.model.lora_config import LoRA, matrices
from minisft.model.nf4 import NF4, dequantise, nf4_linear
from minisft.model.peft import PARTS, PREFIX
from minisft.model.precision import Linear, linear
from minisft.model.weights import whole

STORED = {"bf16": torch.bfloat16, "fp32": torch.float32, "nf4": torch.bfloat16}  # what is in no packed matrix


class FrozenLinear(Linear):
    """A matrix that is not trained, kept as `lora.base` says, and its adapter where it has one (`rank` above 0)."""

    channels: Tensor  # (I,) int32: what dropout is drawn from, beside the token
    lengths: Tensor  # (O,) of the rows of W, for DoRA

    def __init__(self, like: nn.Linear, lora: LoRA, *, rank: int, trained: torch.dtype):
        rows, columns = like.out_features, like.in_features
        super().__init__(columns, rows, bias=like.bias is not None, dtype=STORED[lora.base])
        self.requires_grad_(False)
        self.rank, self.scale, self.dropout, self.dora = rank, lora.scale, lora.dropout, lora.dora and rank > 0
        self.nf4: NF4 | None = None
        if lora.base == "nf4":
            self.nf4 = NF4(rows, columns)
            packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
            self.weight = nn.Parameter(packed, requires_grad=False)
        if rank:
            self.lora_A = nn.Parameter(torch.empty(rank, columns, dtype=trained))
            self.lora_B = nn.Parameter(torch.empty(rows, rank, dtype=trained))
            self.register_buffer("channels", torch.empty(columns, dtype=torch.int32), persistent=False)
        if self.dora:
            self.lora_magnitude = nn.Parameter(torch.empty(rows, dtype=trained))  # less the length it began at
            self.register_buffer("lengths", torch.empty(rows), persistent=False)

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """(T, I) -> (T, O). `draws` (T,) int32 is what each token's dropout is drawn from; None: no dropout."""
        beside: Tensor | int = 0
        if self.rank:  # first: what comes last in a block, recomputation leaves out
            z = x if draws is None else dropped(x, draws, self.channels, self.dropout)
            beside = linear(self.scale * linear(z, self.lora_A), self.lora_B)
        y = linear(x, self.weight) if self.nf4 is None else nf4_linear(x, self.weight, self.nf4)
        if self.dora:
            with torch.no_grad():
                lengths = self.sum(self.weight, self.lora_A, self.lora_B).norm(dim=1)
            # Scaled before the sum is rounded: most gains are nearer to 1 than the next bf16 number, and what is
            # already rounded would come back unchanged from each of them.
            y = ((y.float() + beside) * ((self.lengths + self.lora_magnitude) / lengths)).to(y.dtype)
        elif self.rank:
            y = beside + y
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def sum(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(O, I) W + s B A in fp32, of whole matrices."""
        wide = weight.float() if self.nf4 is None else dequantise(weight, self.nf4.statistics(), torch.float32)
        return torch.addmm(wide, b.float(), a.float(), alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """(O, I) in fp32: the matrix that does what this one does with its adapter. All ranks call it.

        NF4 is merged as peft merges it: what is added to is the dequantised base, which is what was trained with.
        """
        weight = whole(self.weight)
        if not self.rank:
            return weight.float() if self.nf4 is None else dequantise(weight, self.nf4.statistics(), torch.float32)
        found = self.sum(weight, whole(self.lora_A), whole(self.lora_B))
        if self.dora:
            found *= ((self.lengths + whole(self.lora_magnitude)) / found.norm(dim=1))[:, None]
        return found

    @torch.no_grad()
    def begin(self, seed: int) -> None:
        """Fresh adapters as peft draws them: A uniform in +-1/sqrt(I), B zero; the same on any number of ranks."""
        a, start = weights.local_rows(self.lora_A)
        drawn = torch.rand(self.lora_A.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        a.copy_(drawn[start : start + len(a)] / self.in_features**0.5)
        weights.local_rows(self.lora_B)[0].zero_()
        self.channels.copy_(hashed(torch.arange(len(self.channels), dtype=torch.int32), key_of(seed, 0, "channels")))
        if self.dora:
            weights.local_rows(self.lora_magnitude)[0].zero_()
            self.lengths.copy_(self.sum(*map(whole, (self.weight, self.lora_A, self.lora_B))).norm(dim=1))


def dropped(x: Tensor, draws: Tensor, channels: Tensor, share: float) -> Tensor:
    """(T, I) with `share` of its numbers zero and the others scaled up, by a hash of token and channel."""
    bits = hashed(draws[:, None] ^ channels, (-0x61C88647, -0x7A143595))
    return torch.where(bits >= round(share * 2**32) - 2**31, x / (1 - share), 0)


def adapt(model: Llama, lora: LoRA, *, trained: torch.dtype = torch.float32) -> None:
    """Freeze `model`, which is on the meta device, and give it adapters kept in `trained`. `load` comes after."""
    for module in model.modules():
        for leaf, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, leaf, nn.Parameter(parameter.to(STORED[lora.base]), requires_grad=False))
    for name in matrices(model.config):
        parent, _, leaf = name.rpartition(".")
        rank = lora.rank if lora.is_target(name) else 0
        if rank or lora.base == "nf4":
            plain = model.get_submodule(name)
            assert isinstance(plain, Linear)
            setattr(model.get_submodule(parent), leaf, FrozenLinear(plain, lora, rank=rank, trained=trained))
    for block in model.blocks:
        block.adapter_rank = lora.rank


def adapters(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """Name and module of each matrix that has an adapter."""
    return ((name, module) for name, module in model.named_modules()
            if isinstance(module, FrozenLinear) and module.rank)


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """PEFT's name and value, in fp32 on the host, of every tensor of the adapters. All ranks call it."""
    for name, module in adapters(model):
        parts = {"lora_A": module.lora_A, "lora_B": module.lora_B}
        parts |= {"magnitude": module.lora_magnitude} if module.dora else {}
        for part, parameter in parts.items():
            value = whole(parameter).float()
            value = module.lengths + value if part == "magnitude" else value
            yield f"{PREFIX}{name}{PARTS[part]}", value.cpu().contiguous()


def load(model: nn.Module, base: weights.WeightSource, *, seed: int) -> None:
    """Fill an adapted model: what is frozen from `base`, quantised as it is read, and fresh adapters.

    In memory is the model and, besides, one matrix of a rank's rows.
    """
    packed = {f"{name}.weight": (module.weight, module.nf4) for name, module in model.named_modules()
              if isinstance(module, FrozenLinear) and module.nf4}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights.load(model, base, left_out=trained | packed.keys())
    for name, (weight, nf4) in packed.items():
        local, start = weights.local_rows(weight)
        nf4.quantise(local, start, partial(base.read, name))
    for index, (_, module) in enumerate(adapters(model)):
        module.begin(seed * 1_000_003 + index)


def described(model: nn.Module, lora: LoRA) -> str:
    """What is trained and what is frozen, in a line."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, FrozenLinear) and m.nf4}
    numbers = sum(p.numel() * (2 if name in frozen else 1) for name, p in model.named_parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    size += sum(t.nbytes for m in model.modules() if isinstance(m, NF4) for t in m.statistics())
    kind = ("rsLoRA" if lora.rslora else "LoRA") + " with DoRA" * lora.dora
    return (f"{kind} of rank {lora.rank}: {trained:,} of {numbers:,} parameters are trained "
            f"({trained / numbers:.2%}); the frozen ones take {size / 2**20:,.0f} MiB ({lora.base})")
