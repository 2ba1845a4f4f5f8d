"""LoRA: frozen matrices with thin trained ones beside them (papers in targets.py).

    y = W x + s B (A dropout(x))                    LoRA, rsLoRA
    y = (m / |W + s B A|) (W x + s B A dropout(x))  DoRA: m is trained; the row lengths |.| count as constants

A network is adapted while it is on the meta device: the linear matrices of its blocks become `FrozenLinear`, under the
same names, so a checkpoint of the base is read as always (into bf16, fp32, or NF4 as it is read) and nothing of it has
gradients or moments. Adapters are fp32 masters like all that is trained. B begins at zero, so the first step sees the
base. DoRA's m is kept as its distance from its initial length: that is small, and loses nothing when it is gathered in
bf16, where m itself would be rounded by a fifth of a percent.

Dropout is a hash of (seed, step, document, position, channel) (counter_rng.py): a recomputed block, a resumed run, and
any number of ranks drop the same. With DoRA only what the adapter sees is dropped; in peft the base sees the dropped
input a second time there, so the two agree at a dropout of 0 only.

Adapters are files in PEFT's format. PEFT has many variants of LoRA that mean another sum of the same tensors, or
another base, so any setting that is unknown and not off is refused. No pickle is read.
"""

# T tokens, I inputs and O outputs of a matrix, r rank

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from minisft.config import LoraConfig
from minisft.counter_rng import hashed, key_of
from minisft.errors import UserError, printable
from minisft.files import read_small, regular_file
from minisft.lora import targets
from minisft.lora.nf4 import NF4, dequantise, nf4_linear
from minisft.model import weights
from minisft.model.llama import Documents, Linear, Llama, linear
from minisft.model.llama_config import MATRICES, LlamaConfig
from minisft.model.weights import finite, whole

PREFIX = "base_model.model."
PARTS = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
# Settings that do not change the meaning of the tensors, or that are read below.
UNDERSTOOD = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights", "target_modules",
              "base_model_name_or_path", "lora_dropout", "inference_mode", "task_type", "auto_mapping", "peft_version",
              "revision", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "loftq_config",
              "megatron_core", "qalora_group_size", "runtime_config"}
GOOD = {"peft_type": ("LORA",), "bias": ("none",),
        "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}  # the others change the base
MERGE = "merge it with peft (merge_and_unload) and use the merged model"
STORED = {"bf16": torch.bfloat16, "fp32": torch.float32, "nf4": torch.bfloat16}  # of what is in no packed matrix


class Dropout:
    """The random bits of a micro-batch, shared by all adapters of a network. They are drawn before each forward pass
    and stay until the next, so a backward pass that recomputes blocks must come in between."""

    def __init__(self, share: float):
        self.share = share
        self.key: tuple[int, int] | None = None  # of the step
        self.draws: Tensor | None = None  # (T,) int32; None: nothing is dropped

    def draw(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Runs before `model`'s forward pass. A pass without gradients drops nothing."""
        documents: Documents = arguments[1]
        self.draws = None
        if model.training and torch.is_grad_enabled():
            assert self.key, "the adapters must know their step: call adapters.set_step before it"
            assert documents.ids is not None, "dropout is drawn by document: Documents.ids must number them"
            self.draws = token_bits(documents.ids, documents.positions, self.key)


def set_step(model: nn.Module, seed: int, step: int) -> None:
    """Tell the adapters which step (from 0) comes next: their dropout differs from step to step."""
    if dropout := next((module.dropout for _, module in adapters(model)), None):
        dropout.key = key_of(seed, step, "dropout")


def token_bits(ids: Tensor, positions: Tensor, key: tuple[int, int]) -> Tensor:
    """(T,) random int32 of each token's document and position, in whichever micro-batch the document lies."""
    return hashed(hashed(ids.clone(), key) ^ positions.int(), key)


def dropped(x: Tensor, draws: Tensor, channels: Tensor, share: float) -> Tensor:
    """(T, I) with `share` of its numbers zero and the others scaled up, by a hash of token and channel."""
    bits = hashed(draws[:, None] ^ channels, (-0x61C88647, -0x7A143595))
    return torch.where(bits >= round(share * 2**32) - 2**31, x / (1 - share), 0)


class FrozenLinear(Linear):
    """A matrix that is not trained, stored as `lora.base` says, and its adapter if it has one (`rank` above 0)."""

    channels: Tensor  # (I,) int32: what dropout is drawn from, together with the token's bits
    lengths: Tensor  # (O,) of the rows of W, for DoRA

    def __init__(self, like: nn.Linear, lora: LoraConfig, *, rank: int, trained: torch.dtype = torch.float32,
                 dropout: Dropout | None = None):
        rows, columns = like.out_features, like.in_features
        super().__init__(columns, rows, bias=like.bias is not None, dtype=STORED[lora.base])
        self.requires_grad_(False)
        self.rank, self.dora, self.dropout = rank, lora.dora and rank > 0, dropout
        self.nf4 = NF4(rows, columns) if lora.base == "nf4" else None
        if self.nf4:
            self.weight = nn.Parameter(torch.empty(rows, columns // 2, dtype=torch.uint8), requires_grad=False)
        if rank:
            self.scale = targets.scale(lora)
            self.lora_A = nn.Parameter(torch.empty(rank, columns, dtype=trained))
            self.lora_B = nn.Parameter(torch.empty(rows, rank, dtype=trained))
            self.register_buffer("channels", torch.empty(columns, dtype=torch.int32), persistent=False)
        if self.dora:
            self.lora_magnitude = nn.Parameter(torch.empty(rows, dtype=trained))  # less its initial length
            self.register_buffer("lengths", torch.empty(rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) -> (T, O)."""
        beside: Tensor | int = 0
        if self.rank:  # first: what comes last in a block, recomputation leaves out
            z = x
            if self.dropout and self.dropout.draws is not None:
                z = dropped(x, self.dropout.draws, self.channels, self.dropout.share)
            beside = linear(self.scale * linear(z, self.lora_A), self.lora_B)
        y = self.multiply(x, self.weight) if self.nf4 is None else nf4_linear(x, self.weight, self.nf4)
        if self.dora:
            with torch.no_grad():
                lengths = self.sum(self.weight, self.lora_A, self.lora_B).norm(dim=1)
            # Scaled before the sum is rounded: most gains are nearer to 1 than the next bf16 number, and a sum that is
            # already rounded would come back unchanged from each of them.
            y = ((y.float() + beside) * ((self.lengths + self.lora_magnitude) / lengths)).to(y.dtype)
        elif self.rank:
            y = beside + y
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self, weight: Tensor) -> Tensor:
        """(O, I) in fp32, of the whole `weight`."""
        return weight.float() if self.nf4 is None else dequantise(weight, self.nf4.statistics(), torch.float32)

    def sum(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(O, I) W + s B A in fp32, of whole matrices."""
        return torch.addmm(self.dense(weight), b.float(), a.float(), alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """(O, I) in fp32: the one matrix that computes the same as W and its adapter. All ranks call it. NF4 is merged
        as in peft, into the dequantised base: that is what the adapter was trained with."""
        weight = whole(self.weight)
        if not self.rank:
            return self.dense(weight)
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


def adapt(model: Llama, lora: LoraConfig, *, trained: torch.dtype = torch.float32) -> None:
    """Freeze `model`, which is on the meta device, and give it adapters kept in `trained`. `load` comes after."""
    for module in model.modules():
        for leaf, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, leaf, nn.Parameter(parameter.to(STORED[lora.base]), requires_grad=False))
    dropout = Dropout(lora.dropout) if lora.dropout else None
    if dropout:
        model.register_forward_pre_hook(dropout.draw)
    has_adapter = targets.adapted(lora, model.config)
    for name in model.config.matrices():
        rank = lora.rank if name in has_adapter else 0
        if rank or lora.base == "nf4":
            plain = model.get_submodule(name)
            assert isinstance(plain, Linear)
            model.set_submodule(name, FrozenLinear(plain, lora, rank=rank, trained=trained, dropout=dropout))


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
            value = whole(parameter).float() + (module.lengths if part == "magnitude" else 0)
            yield f"{PREFIX}{name}{PARTS[part]}", value.cpu().contiguous()


def load(model: nn.Module, base: weights.WeightSource, *, seed: int) -> None:
    """Fill an adapted model: frozen weights from `base`, quantised as they are read, and fresh adapters. Memory: the
    model, and one matrix of a rank's rows."""
    packed = {f"{name}.weight": (module.weight, module.nf4) for name, module in model.named_modules()
              if isinstance(module, FrozenLinear) and module.nf4}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights.load(model, base, left_out=trained | packed.keys())
    for name, (weight, nf4) in packed.items():
        local, start = weights.local_rows(weight)
        nf4.quantise(local, start, partial(base.read, name))
    for index, (_, module) in enumerate(adapters(model)):
        module.begin(seed * 1_000_003 + index)


def described(model: nn.Module, lora: LoraConfig) -> str:
    """One line that says what is trained and what is frozen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    numbers = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    size += sum(t.nbytes for m in model.modules() if isinstance(m, NF4) for t in m.statistics())
    kind = ("rsLoRA" if lora.rslora else "LoRA") + " with DoRA" * lora.dora
    return (f"{kind} of rank {lora.rank}: {trained:,} of {numbers:,} parameters are trained "
            f"({trained / numbers:.2%}); the frozen ones take {size / 2**20:,.0f} MiB ({lora.base})")


def is_adapter(path: str | Path) -> bool:
    """True for a folder that holds an adapter and no model."""
    return (Path(path) / "adapter_config.json").is_file() and not any(Path(path).glob("model*.safetensors*"))


def settings(lora: LoraConfig, config: LlamaConfig, *, base: str) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    leaves, has_adapter = [], targets.adapted(lora, config)
    for leaf in MATRICES:
        names = [name for name in has_adapter if name.endswith(f".{leaf}")]
        leaves += [leaf] if len(names) == config.num_hidden_layers else names  # short if it means the same
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
            "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora, "use_dora": lora.dora,
            "target_modules": leaves, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "inference_mode": True}


class PeftFolder:
    """An adapter that PEFT or minisft saved. Raises UserError for one that is broken or has another meaning."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "adapter_config.json"
        try:
            found = json.loads(read_small(file))
            self.rank, self.alpha = int(found["r"]), float(found["lora_alpha"])
            self.base = Path(str(found["base_model_name_or_path"]))
            rslora, self.dora = bool(found.get("use_rslora")), bool(found.get("use_dora"))
            self.scale = targets.scale(LoraConfig(self.rank, self.alpha, rslora=rslora))
            if not abs(self.scale) < 1e30:  # also false for NaN
                raise ValueError(f"lora_alpha is {self.alpha}")
            some = any(found.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
            # Ends of the names of matrices that all have an adapter. (The letters of a single pattern end none.)
            self.adapted = tuple(f".{leaf}" for leaf in (not some and found.get("target_modules")) or ())
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{file}: not the settings of an adapter ({type(error).__name__}: "
                            f"{printable(error, 200)})") from None
        strange = {name: value for name, value in found.items() if value and name not in UNDERSTOOD}
        strange |= {name: found[name] for name, good in GOOD.items() if found.get(name, good[0]) not in good}
        if strange:
            named = ", ".join(f"{printable(k)} is {printable(repr(v))}" for k, v in [*strange.items()][:5])
            raise UserError(f"{file}: {named}, which is not understood; {MERGE}")
        file = self.path / "adapter_model.safetensors"
        self.tensors: dict[str, dict[str, Tensor]] = {}  # name of a matrix -> its parts
        try:
            if file.exists():
                regular_file(file)
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            remedy = "get it again" if not file.with_suffix(".bin").exists() else (
                "adapter_model.bin is a pickle, which is not read, since it can run code: load it with peft, whose "
                "save_pretrained writes safetensors")
            raise UserError(f"{file}: not a readable safetensors file ({printable(error, 200)}); {remedy}") from None
        for key, tensor in tensors.items():
            part = next((part for part, ending in PARTS.items() if key.endswith(ending)), None)
            if part is None or not key.startswith(PREFIX):
                raise UserError(f"{file}: {printable(key)} is no part of a linear matrix's adapter; {MERGE}")
            name = key.removeprefix(PREFIX).removesuffix(PARTS[part])
            self.tensors.setdefault(name, {})[part] = finite(tensor.float(), key, file)

    def base_folder(self, given: str | Path | None = None) -> Path:
        """The folder of the base model: `given`, or else where the adapter says. Raises UserError if it is none."""
        folder = Path(given or self.base)
        if not folder.is_dir():
            raise UserError(f"{self.path}: its base model {printable(repr(str(folder)))} is not a folder here; "
                            f"download it, then `minisft convert {self.path} TARGET --merge --base FOLDER` makes one "
                            "model of both")
        return folder

    @torch.no_grad()
    def merge_into(self, model: Llama) -> None:
        """Add the adapter to the matrices of `model`. Raises UserError if it is another model's, or lacks matrices."""
        shapes = model.config.matrices()
        lacks = [name for name in shapes if name not in self.tensors
                 and (f".{name}".endswith(self.adapted) or not self.tensors)]
        if lacks:
            raise UserError(f"{self.path}: adapter_model.safetensors lacks the adapters of {len(lacks)} matrices, the "
                            f"first of {lacks[0]}; get all of it again, or name its own base model")
        for name, parts in self.tensors.items():
            if name not in shapes:
                raise UserError(f"{self.path}: the adapter of {printable(name)} is not of a matrix in a layer; {MERGE}")
            rows, columns = shapes[name]
            wanted: dict[str, tuple[int, ...]] = {"lora_A": (self.rank, columns), "lora_B": (rows, self.rank)}
            wanted |= {"magnitude": (rows,)} if self.dora else {}
            if {part: tuple(tensor.shape) for part, tensor in parts.items()} != wanted:
                raise UserError(f"{self.path}: the adapter of {name} does not fit the base model: it has "
                                f"{ {part: list(tensor.shape) for part, tensor in parts.items()} }, "
                                f"and {({p: list(s) for p, s in wanted.items()})} is needed")
            weight = model.get_parameter(f"{name}.weight")
            parts = {part: tensor.to(weight.device) for part, tensor in parts.items()}
            merged = torch.addmm(weight.float(), parts["lora_B"], parts["lora_A"], alpha=self.scale)
            if self.dora:
                merged *= (parts["magnitude"] / merged.norm(dim=1))[:, None]
            weight.copy_(finite(merged, f"with its adapter {name}", self.path))
