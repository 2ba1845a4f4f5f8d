"""Weights between files and a network; each rank touches only its own rows.

`check` compares every name and shape with the network while that is still on the meta device, so a wrong folder is
refused before anything large is allocated. `load` then copies, for each parameter, the rows that this rank holds: FSDP
shards along the first dimension, so 8 ranks read an 8B model once between them. A few threads read pieces of some
megabytes: while one waits for the disk another converts, and memory holds nothing but the model. (A memory-mapped file
comes in page by page, and each page is a wait on a network file system.) Names and layout are Hugging Face's on both
sides: nothing is renamed or transposed.

No pickle is read here; `.bin` and `.pt` files are refused. Meta's `consolidated.*.pth` are read by pretrained.py.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minisft.errors import NumericsError, UserError, printable
from minisft.files import from_hub, read_small, regular_file
from minisft.model.llama_config import LlamaConfig, read_config

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
THREADS, PIECE = 4, 2**24  # bytes that each thread reads at once
SAMPLED = 16  # rows of a matrix in a fingerprint


class WeightSource(Protocol):
    """Named tensors on disk."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    @property
    def config(self) -> LlamaConfig:
        """The network that the tensors belong to."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor. Raises NumericsError if a number in them is not finite."""


class SafetensorsFolder:
    """A Hugging Face folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists. Raises
    UserError for files that are missing, malformed, truncated, or lie outside the folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, int, torch.dtype]] = {}  # file, offset of the first byte, dtype
        listed = _index(self.path)
        for file in sorted({self.path / name for name in listed.values()} or {self.path / "model.safetensors"}):
            if file.exists():
                regular_file(file)
            try:
                safe_open(file, framework="pt")  # checks the header, that of untrusted files too
                with open(file, "rb") as opened:
                    size = int.from_bytes(opened.read(8), "little")
                    header = json.loads(opened.read(size))
            except (SafetensorError, OSError) as error:  # the library's message does not name the file
                raise UserError(f"{file}: not a readable safetensors file ({printable(error, 200)}); download or "
                                "export it again") from None
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if listed and listed.get(name) != file.name:
                    continue
                if entry["dtype"] not in FLOATS:
                    raise UserError(f"{file}: {printable(name)} is stored as {entry['dtype']}; quantised weights "
                                    f"cannot be fine-tuned, only {', '.join(FLOATS)}")
                self.shapes[name] = tuple(entry["shape"])
                self._places[name] = file, 8 + size + entry["data_offsets"][0], FLOATS[entry["dtype"]]
        lost = [f"{printable(repr(name))} (in {file})" for name, file in listed.items() if name not in self.shapes]
        if lost:
            raise UserError(f"{self.path}: the index lists tensors that its files lack: {_first_ten(lost)}")

    @cached_property
    def config(self) -> LlamaConfig:
        """The network of config.json, except that a head which differs from the embedding unties the two, as in
        transformers 5 (4 drops the head)."""
        config, head, embedding = read_config(self.path), "lm_head.weight", "model.embed_tokens.weight"
        if not config.tie_word_embeddings or not (shape := self.shapes.get(head)):
            return config
        each = max(PIECE // (2 * max(shape[-1], 1)), 1)
        rows = ((i, min(i + each, shape[0])) for i in range(0, shape[0], each))
        tied = shape == self.shapes.get(embedding) and all(
            torch.equal(self.read(head, *some).float(), self.read(embedding, *some).float()) for some in rows)
        return replace(config, tie_word_embeddings=tied)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in the dtype of the file."""
        file, offset, dtype = self._places[name]
        rows = torch.empty((stop - start, *self.shapes[name][1:]), dtype=dtype, device="cpu")
        left = rows.flatten().view(torch.uint8).numpy().data
        with open(file, "rb", buffering=0) as opened:
            opened.seek(offset + start * (len(left) // max(len(rows), 1)))
            while left:
                if not (count := opened.readinto(left)):
                    raise UserError(f"{file}: ends within {name}; it was cut off since the run began")
                left = left[count:]
        return finite(rows, name, file)


def finite(rows: Tensor, name: str, file: Path) -> Tensor:
    """`rows` of a tensor, unchanged. Raises NumericsError if a number in them is not finite."""
    # The sum is twenty times as fast, and is never finite if a number is not; in fp16 it may overflow by itself.
    if not rows.sum().isfinite() and not rows.isfinite().all():
        raise NumericsError(f"{file}: {printable(name, 120)} has numbers that are not finite (NaN or infinity), so "
                            "nothing could be learned; download the model again, or take an earlier checkpoint of its "
                            "training")
    return rows


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder`, a base model, is one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; model.path is a Hugging "
                        f"Face model folder, with safetensors{from_hub(folder, '--model.path')}")


def _index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty if the folder holds a single file."""
    check_folder(folder)
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        if (folder / "model.safetensors").exists():
            return {}
        raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json; {_instead(folder)}")
    try:
        listed = json.loads(read_small(file))["weight_map"]
        names = set(listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a readable index ({type(error).__name__}: {printable(error, 200)})") from None
    present = set(os.listdir(folder))
    for name in names:
        # A link may lead elsewhere on purpose (download caches do); a name in a file from the network may not.
        if not (isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")):
            raise UserError(f"{file}: {printable(repr(name))} is not the name of a safetensors file in this folder; "
                            "refused")
        if name not in present:
            raise UserError(f"{file}: {printable(repr(name))} is listed but missing; download the model again")
    if "model.safetensors" in present - names:  # programs differ in which of the two they read
        raise UserError(f"{folder}: model.safetensors.index.json does not list model.safetensors, so one of the "
                        "two is out of date; delete it")
    return listed


def _instead(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (f"it holds an adapter; `minisft convert {folder} TARGET --merge` makes one model of it and its base, "
                "which can be trained")
    if other := sorted(p.name for p in folder.glob("*.gguf")):
        return (f"it has {printable(other[0])}: GGUF files are made for inference, and are mostly quantised; "
                "download the safetensors that it was made from")
    if other := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        return (f"it has {printable(', '.join(other[:3]))}: pickles are not read, since they can run code; convert "
                "them to safetensors (transformers: save_pretrained). Meta's files are read by `minisft train` with "
                "--model.format meta, and by `minisft convert` (of an adapter, too) with --format meta")
    return "download the model again"


def check(model: nn.Module, source: WeightSource) -> None:
    """Raise UserError unless the tensors of `source` are exactly the parameters of `model` (first ten differences). Old
    files may carry a rotary table that follows from the config, tied models their one matrix again as a head."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    problems = [f"{name}: missing" for name in wanted if name not in source.shapes]
    problems += [f"{name}: the file has {list(shape)}, config.json asks for {list(wanted[name])}"
                 for name, shape in source.shapes.items() if shape != wanted.get(name, shape)]
    problems += [f"{printable(name)}: not part of the model that config.json describes" for name in source.shapes
                 if name not in wanted and not name.endswith("rotary_emb.inv_freq")
                 and not (name == "lm_head.weight" and source.config.tie_word_embeddings)]
    if problems:
        raise UserError(f"{source.path}: weights and config.json disagree: {_first_ten(problems)}")


def fingerprint(source: WeightSource) -> str:
    """A digest of every tensor's name, shape and numbers: of a matrix the first row, the last, and some between them.
    Cheap, and training changes it, if only that of the last layers or of tokens that were added at the end."""
    digest = hashlib.sha256()
    for name, shape in sorted(source.shapes.items()):
        digest.update(f"{name} {shape}".encode())
        each = 1 if len(shape) > 1 else sum(shape)  # rows at a time
        for start in sorted({i * (sum(shape[:1]) - each) // (SAMPLED - 1) for i in range(SAMPLED)}):
            digest.update(source.read(name, start, start + each).float().numpy().data)
    return digest.hexdigest()


def check_memory(model: nn.Module) -> None:
    """Raise UserError if the parameters of `model` (on the meta device) are larger than this machine's memory."""
    needed = sum(parameter.nbytes for parameter in model.parameters()) / 2**30
    if needed > (has := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30):
        raise UserError(f"the weights need {needed:,.1f} GiB and this machine has {has:,.1f} GiB of memory; take a "
                        "smaller model, or a machine with more")


def _first_ten(items: list[str]) -> str:
    return "\n  " + "\n  ".join(items[:10]) + (f"\n  and {len(items) - 10} more" if len(items) > 10 else "")


@torch.no_grad()
def load(model: nn.Module, source: WeightSource, *, left_out: Collection[str] = ()) -> None:
    """Copy this rank's rows of every parameter not `left_out` from `source`, converting to its dtype."""
    pieces = []
    for name, parameter in model.named_parameters():
        if name not in left_out:
            local, start = local_rows(parameter)
            rows = max(PIECE // (2 * max(local[:1].numel(), 1)), 1)
            pieces += [(local[i : i + rows], name, start + i) for i in range(0, len(local), rows)]

    @torch.no_grad()  # holds for a thread
    def fill(rows: Tensor, name: str, start: int) -> None:
        read = source.read(name, start, start + len(rows))
        rows.copy_(read.to(rows.device))  # sent in the file's dtype, half of fp32's bytes; the device converts

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, *zip(*pieces, strict=True)))  # raises what a thread raised


@torch.no_grad()
def initialize(model: nn.Module, *, std: float, seed: int) -> None:
    """Random weights: N(0, std) for matrices, ones for norms, zeros for biases; the same on any number of ranks."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        local, start = local_rows(parameter)
        if name.endswith("norm.weight"):
            local.fill_(1.0)
        elif name.endswith(".bias"):
            local.zero_()
        else:  # every rank draws the whole matrix and keeps its rows: one matrix at a time, no communication
            generator = torch.Generator(local.device).manual_seed(seed * 1_000_003 + index)
            drawn = torch.randn(parameter.shape, generator=generator, device=local.device)
            local.copy_(drawn[start : start + len(local)].mul_(std))


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of `parameter` that this rank holds, and the index of the first of them in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    local, start = parameter.to_local(), 0
    for dim, placement in enumerate(parameter.placements):
        if placement.is_shard():  # 10 rows on 4 ranks -> 3, 3, 3, 1
            each = -(-parameter.shape[0] // parameter.device_mesh.size(dim))
            start = min(each * parameter.device_mesh.get_local_rank(dim), parameter.shape[0])
    return local, start


def save(model: nn.Module, config: LlamaConfig, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16,
         shard_bytes: int = 5 * 10**9, tell: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write `config.json` and the weights as safetensors into `folder`, in shards of at most `shard_bytes`. All ranks
    call it, since a sharded parameter is gathered by all; the first one writes. Memory: one shard. `tell` is called
    before each tensor with how many are done, and of how many."""
    gathered: dict[str, Callable[[], Tensor]] = {}  # by its name, what gathers a tensor
    sizes, shards, folder = dict[str, int](), [list[str]()], Path(folder)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if name == f"{prefix}.weight" and (merged := getattr(module, "merged", None)):  # with its adapter
                gathered[name], sizes[name] = merged, module.out_features * module.in_features * dtype.itemsize
            elif not name.startswith(f"{prefix}.lora_"):
                gathered[name], sizes[name] = partial(whole, parameter), parameter.numel() * dtype.itemsize
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}
    if len(shards) == 1:
        files = {"model.safetensors": shards[0]}
    if writes := not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        described = config.to_dict(dtype=str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(described, indent=2))
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())},
                     "weight_map": {name: file for file, names in files.items() for name in names}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    number = count()
    for file, names in files.items():
        tensors = {}
        for name in names:
            tell(next(number), len(sizes))
            tensor = gathered[name]()  # by all ranks
            if writes:  # converted on the device, so half of fp32's bytes go to the host
                tensors[name] = tensor.to(dtype).to("cpu").contiguous()
        if writes:
            write(tensors, folder / file)


def write(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that others may read if the umask says so. Raises OSError if it cannot be written."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, mostly: the library has no OSError and names no file
        raise OSError(f"{file}: cannot be written ({error})") from None
    os.umask(mask := os.umask(0))
    os.chmod(file, 0o666 & ~mask)  # safetensors creates files that only their owner can read


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """All rows of a parameter, gathered from the ranks if it is sharded: all call it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
