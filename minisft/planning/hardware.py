"""GPUs, and how long they take to send what sharded training sends (hardware.toml has the figures and their sources).

A ring passes each rank's part on to the next, S - 1 times: gathering B bytes over S ranks, or summing and scattering
them, sends (S - 1) / S * B from every rank, and an all-reduce, which is both, twice that (Thakur et al. 2005,
"Optimization of Collective Communication Operations in MPICH"). Across hosts, every GPU of a host drives its own
network card, so that a ring runs at the rate of all cards together, or at that of the link where this is less.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from minisft.config_io import nearest
from minisft.errors import UserError, printable
from minisft.model.llama_config import LlamaConfig
from minisft.model.lora_config import LoRA
from minisft.planning.memory import FP32, Bytes, Sizes

REACHED = 0.75  # assumed share of a link's nominal rate that collectives reach


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; units as in hardware.toml."""

    name: str
    driver: str
    bf16_tflops: float
    memory_gib: float
    memory_gb_s: float
    link: str
    link_gb_s: float
    network_gb_s: float
    per_host: int


@cache
def peak_flops(device: torch.device) -> float | None:
    """FLOPs a second that `device` reaches at most in dense bf16 products, where hardware.toml knows it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * gpu["bf16_tflops"] for gpu in _known().values() if gpu["driver"] == name), None)


def _known() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("minisft.planning").joinpath("hardware.toml").read_text(encoding="utf-8"))


def find_gpu(name: str) -> Gpu:
    """The GPU called `name` in hardware.toml. Raises UserError for one that is not there."""
    known = _known()
    if name.lower() not in known:
        raise UserError(f"--gpu: no GPU is called {printable(repr(name))}{nearest(name, known)}; known are "
                        f"{', '.join(known)}")
    return Gpu(**known[name.lower()])


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends for a micro-batch: bytes, and seconds at the rate of the link that they cross."""

    gathered_forward: int  # weights, in the precision of the arithmetic
    gathered_backward: int
    reduced: int  # gradients, in fp32
    copied: int  # the sum over HSDP's copies
    forward_seconds: float
    backward_seconds: float

    @classmethod
    def of(cls, config: LlamaConfig, gpu: Gpu, *, shards: int, copies: int, each: Bytes | None = None,
           lora: LoRA | None = None) -> "Traffic":
        """For a model over `shards` GPUs, in so many copies (HSDP)."""
        sizes, each = Sizes.of(config), each or Bytes()
        if shards * copies == 1:
            return cls(0, 0, 0, 0, 0.0, 0.0)
        sent = (shards - 1) / shards
        blocks = config.num_hidden_layers * sizes.block  # embedding and head are not gathered for their gradients
        rest, trained = sizes.total - blocks, lora.trained(config) if lora else sizes.total
        width = 0.5 if lora and lora.base == "nf4" else each.compute  # of a block's number, as it is sent
        forward, backward = round(sent * (each.compute * rest + width * blocks)), round(sent * width * blocks)
        reduced = round(sent * FP32 * trained)
        copied = round(2 * (copies - 1) / copies * FP32 * trained / shards)
        ring = REACHED * 1e9 * (gpu.link_gb_s if shards <= gpu.per_host
                                else min(gpu.link_gb_s, gpu.network_gb_s * gpu.per_host))
        between = REACHED * 1e9 * (gpu.link_gb_s if shards * copies <= gpu.per_host else gpu.network_gb_s)
        return cls(forward, backward, reduced, copied, forward / ring, (backward + reduced) / ring + copied / between)
