"""GPUs, and how long they take to send what sharded training sends (model/gpus.toml has the figures and their sources).

A ring passes each rank's part on to the next, S - 1 times: gathering B bytes over S ranks, or summing and scattering
them, sends (S - 1) / S * B from every rank, and an all-reduce, which is both, twice that (Thakur et al. 2005,
"Optimization of Collective Communication Operations in MPICH"). Across hosts, every GPU of a host drives its own
network card, so a ring runs at the rate of all cards together, or at that of the link if that is less.
"""

from dataclasses import dataclass

from minisft.config import LoraConfig
from minisft.config_io import nearest
from minisft.errors import UserError, printable
from minisft.lora import targets
from minisft.model.flops import Sizes, known_gpus
from minisft.model.llama_config import LlamaConfig
from minisft.planning.memory import FP32, Bytes

REACHED = 0.75  # assumed share of a link's nominal rate that collectives reach


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; units as in gpus.toml."""

    name: str
    driver: str
    bf16_tflops: float
    memory_gib: float
    memory_gb_s: float
    link: str
    link_gb_s: float
    network_gb_s: float
    per_host: int


def find_gpu(name: str) -> Gpu:
    """The GPU called `name` in gpus.toml. Raises UserError if there is none."""
    known = known_gpus()
    if name.lower() not in known:
        raise UserError(f"--gpu: no GPU is called {printable(repr(name))}{nearest(name, known)}; known are "
                        f"{', '.join(known)}")
    return Gpu(**known[name.lower()])


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends for a micro-batch: bytes, and seconds at the rate of the link that they cross."""

    gathered_forward: int  # weights, in compute precision
    gathered_backward: int
    reduced: int  # gradients, in fp32
    copied: int  # the sum over HSDP's copies
    forward_seconds: float
    backward_seconds: float

    @classmethod
    def of(cls, config: LlamaConfig, gpu: Gpu, *, shards: int, copies: int,
           lora: LoraConfig | None = None) -> "Traffic":
        """For `copies` of a model (HSDP), each over `shards` GPUs."""
        sizes, compute = Sizes.of(config), Bytes.compute
        sent = (shards - 1) / shards
        blocks = config.num_hidden_layers * sizes.block  # embedding and head are not gathered for their gradients
        rest, trained = sizes.total - blocks, targets.trained(lora, config) if lora else sizes.total
        width = 0.5 if lora and lora.base == "nf4" else compute  # of a block's number, as it is sent
        forward, backward = round(sent * (compute * rest + width * blocks)), round(sent * width * blocks)
        reduced = round(sent * FP32 * trained)
        copied = round(2 * (copies - 1) / copies * FP32 * trained / shards)
        ring = REACHED * 1e9 * (gpu.link_gb_s if shards <= gpu.per_host
                                else min(gpu.link_gb_s, gpu.network_gb_s * gpu.per_host))
        between = REACHED * 1e9 * (gpu.link_gb_s if shards * copies <= gpu.per_host else gpu.network_gb_s)
        return cls(forward, backward, reduced, copied, forward / ring, (backward + reduced) / ring + copied / between)
