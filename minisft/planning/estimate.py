"""`minisft plan`: what a run needs, how long it takes and what it costs, before it is paid for.

    recipe and GPUs -> work of its data -> for each checkpointing policy and micro-batch: memory, FLOPs, bytes sent
    -> those that fit -> the fastest

Nothing here has run on the GPUs in question. Memory and FLOPs are arithmetic from the shape of the network, checked
against what torch counts; time is FLOPs over an assumed share of the peak, and is only as good as that assumption.

What is sent: a ring passes each rank's part on to the next, S - 1 times. Gathering B bytes over S ranks, or summing and
scattering them, sends (S - 1) / S * B from every rank, and an all-reduce, which is both, twice that (Thakur et al.
2005, "Optimization of Collective Communication Operations in MPICH"). Across hosts, every GPU of a host drives its own
network card, so a ring runs at the rate of all cards together, or at that of the link if that is less.
"""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from minisft import context
from minisft.config import Config, LoraConfig, ModelConfig
from minisft.config_io import nearest
from minisft.errors import PATH, UserError, printable
from minisft.lora import targets
from minisft.model.flops import Sizes, known_gpus, training_flops
from minisft.model.llama_config import PRESETS, LlamaConfig, read_config
from minisft.planning import FP8, UTILISATION, UTILISATION_ALONE
from minisft.planning.memory import FP32, POLICIES, Bytes, Memory, StepMemory
from minisft.prepare import adapters_of, inputs, prepare
from minisft.pretrained import MetaFolder
from minisft.training import parallel

RESERVED = 1.2  # memory that PyTorch's allocator holds for each byte allocated: about that in published runs
OUTSIDE = 1.5  # GiB assumed for what PyTorch does not count: CUDA's context, NCCL's buffers
ADAMW = 28  # bytes moved for each parameter: four fp32 numbers read, three written
MOST = 64  # packs in a forward pass to consider
REACHED = 0.75  # assumed share of a link's nominal rate that collectives reach
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; units and sources as in model/gpus.toml."""

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
    """The GPU that `name` means in gpus.toml: its key, one of its names, or words of them ("RTX 4090", "4090"). Raises
    UserError if that is none or several."""
    known, asked = known_gpus(), _words(name)
    names = {key: (key, gpu["name"], gpu["driver"]) for key, gpu in known.items()}
    alike = ([key for key, own in names.items() if "".join(asked) in map(_letters, own)]
             or [key for key, own in names.items() if asked and set(asked) <= set(_words(" ".join(own)))])
    if not alike:
        raise UserError(f"--gpu: no GPU is called {printable(repr(name))}{nearest(''.join(asked), known)}; known are "
                        f"{', '.join(known)}. For another, give --gpu-memory and --tflops instead")
    if len(alike) > 1:
        raise UserError(f"--gpu: {printable(repr(name))} may be {' or '.join(alike)}; name one of them")
    return Gpu(**known[alike[0]])


def chosen_gpu(name: str | None, memory_gib: float | None = None, tflops: float | None = None) -> Gpu:
    """The GPU of --gpu, with its memory and speed replaced if they are given; without a name, a card that is not
    listed, with the link and the memory bandwidth of an RTX 4090. Raises UserError if half of it is missing."""
    if not (memory_gib or tflops):
        return find_gpu(name or "h100")
    if name is None and not (memory_gib and tflops):
        raise UserError("for a card that is not listed give both --gpu-memory and --tflops; to change one of them on a "
                        f"listed card, name it with --gpu: {', '.join(known_gpus())}")
    gpu = find_gpu(name or "rtx4090")
    memory_gib, tflops = memory_gib or gpu.memory_gib, tflops or gpu.bf16_tflops
    return replace(gpu, name=f"{gpu.name if name else 'GPU'} ({memory_gib:g} GiB, {tflops:g} TFLOP/s, as given)",
                   memory_gib=memory_gib, bf16_tflops=tflops)


def _words(name: str) -> list[str]:
    return re.findall("[a-z0-9]+", name.lower())


def _letters(name: str) -> str:
    return "".join(_words(name))


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


@dataclass(frozen=True)
class PlanOptions:
    """The GPUs, and what to assume."""

    gpu: Gpu
    gpus: int
    tokens: int | None = None  # in an epoch, instead of counting the data
    document: int | None = None  # tokens in a document, instead of counting the data
    utilisation: float | None = None  # None: as published for several GPUs, or as measured on one
    price: float | None = None  # dollars for one GPU for an hour


@dataclass(frozen=True)
class Work:
    """What the data amount to."""

    tokens_per_pack: float
    trained: float  # share of the tokens
    flops: dict[str, float]  # FLOPs a token under each policy
    tokens: int | None  # of the run; None: unknown
    steps: int | None
    assumed: str  # empty: counted from the data

    @classmethod
    def of(cls, config: Config, network: LlamaConfig, options: PlanOptions) -> "Work":
        """Counted from the packed data; or from `options.tokens` an epoch in documents of `options.document` tokens."""
        seq_len, needed = config.data.seq_len, inputs(config)[:-4]  # the data and the tokenizer
        missing = [path or "model.tokenizer" for path in needed if not (path and Path(path).exists())]
        if options.tokens is None and not options.document and not missing:
            plan, train = (prepared := prepare(config)).plan, prepared.train
            documents = plan.epoch(0).documents
            lengths, loss_tokens = train.lengths[documents], train.num_loss_tokens[documents]
            tokens_per_pack, steps, assumed = seq_len * plan.fill(), plan.total_steps, ""
            tokens = round(int(lengths.sum()) * steps / plan.steps_per_epoch)
        else:
            length = min(options.document or seq_len, seq_len)
            lengths = loss_tokens = np.full(seq_len // length, length)
            tokens_per_pack, steps, tokens = seq_len, None, None
            assumed = f"packs full of {length:,}-token documents, all tokens trained"
            if options.tokens is not None:
                per_step, epochs = config.batch.packs * seq_len, config.train.epochs
                steps = epochs * -(-options.tokens // per_step)
                steps = min(steps, config.train.max_steps or steps)
                tokens = min(epochs * options.tokens, steps * per_step)
            elif missing:
                assumed += f"; {missing[0]} is missing"
        counted, ranks = int(lengths.sum()), targets.ranks(config.lora, network)
        flops = {policy: training_flops(network, lengths, loss_tokens, recompute=policy, ranks=ranks) / counted
                 for policy in POLICIES}
        return cls(tokens_per_pack, int(loss_tokens.sum()) / counted, flops, tokens, steps, assumed)


class Choice(TypedDict):
    """One way to run: a checkpointing policy and the packs of a forward pass."""

    activation_checkpointing: str
    micro_packs: int
    fits: bool
    allocated_gib: float
    reserved_gib: float
    instant: str  # that needs most
    parts_gib: dict[str, float]  # what it needs then
    micro_steps: int
    compute_seconds: tuple[float, float]  # of a micro-batch: forward, backward
    exchanged: int  # bytes that a GPU sends around attention in a micro-batch, if GPUs share packs
    exchange_seconds: float
    step_seconds: float
    tokens_per_second_per_gpu: float


@dataclass(frozen=True)
class Scenario:
    """A recipe on given GPUs."""

    config: Config
    options: PlanOptions
    network: LlamaConfig
    preset: str  # that the network is taken to be, because the model is missing
    shards: int  # of the model
    copies: int  # of it (HSDP)
    work: Work
    trained: int  # parameters
    traffic: Traffic

    @classmethod
    def of(cls, config: Config, options: PlanOptions) -> "Scenario":
        """Raises UserError for what cannot be planned."""
        if config.train.precision == "fp32":
            raise UserError("train.precision is fp32, but the plan knows only the speed of bf16 and fp8: add "
                            "--train.precision bf16")
        shard, replicate, gpus = config.parallel.shard, config.parallel.replicate, options.gpus
        copies = parallel.replicas(gpus, config.parallel)
        if gpus % copies or shard not in (0, gpus // copies):
            raise UserError(f"--gpus {gpus} is not parallel.shard = {shard} times parallel.replicate = {replicate}; it "
                            "must be their product, or a multiple of one if the other is 0")
        if gpus % (shared := config.parallel.context):
            raise UserError(f"--gpus {gpus} is no multiple of parallel.context = {shared}, the GPUs that share a "
                            "pack; take a multiple, or change it")
        if config.batch.packs < (streams := gpus // shared):
            raise UserError(f"batch.packs = {config.batch.packs} cannot be split over {gpus} GPUs; raise it to at "
                            f"least {streams}, or take fewer GPUs")
        (network, preset), lora = _network_of(config.model), adapters_of(config)
        context.check(shared, network)
        work = Work.of(config, network, options)
        if lora:
            targets.check(lora, network)
        trained = targets.trained(lora, network) if lora else Sizes.of(network).total
        traffic = Traffic.of(network, options.gpu, shards=gpus // copies, copies=copies, lora=lora)
        return cls(config, options, network, preset, gpus // copies, copies, work, trained, traffic)

    @property
    def utilisation(self) -> float:
        """Share of the GPU's peak."""
        return self.options.utilisation or (UTILISATION_ALONE if self.options.gpus == 1 else UTILISATION)

    @property
    def packs_per_gpu(self) -> int:
        """Packs of a step on the GPU that has most, or has its part of them."""
        return -(-self.config.batch.packs * self.config.parallel.context // self.options.gpus)

    @property
    def usable(self) -> float:
        """Bytes of each GPU that PyTorch can have."""
        return (self.options.gpu.memory_gib - OUTSIDE) * GIB

    def memory(self, policy: str, micro_packs: int = 1, *, accumulates: bool = True) -> Memory:
        """The peak of a full micro-batch; bytes a parameter as the configuration keeps it (docs/memory.md)."""
        optim, offload = self.config.optim, self.config.parallel.offload
        weight, moment = (2 if precision == "bf16" else FP32 for precision in (optim.parameters, optim.moments))
        here = 0 if offload == "parameters" else weight
        each = Bytes(here, gradient=0 if optim.in_backward else here, moments=2 * moment * (offload == "none"),
                     compiled=self.config.parallel.compile != "false")
        tokens, shared = micro_packs * self.config.data.seq_len, self.config.parallel.context
        trained, part = round(tokens * self.work.trained), -(-tokens // shared)  # one part may hold all trained tokens
        return StepMemory(self.network, self.shards, part, min(trained, part), policy, accumulates, each,
                          adapters_of(self.config), shared).peak()

    def exchange(self, policy: str, micro_packs: int) -> tuple[int, float]:
        """What a GPU sends around attention in a micro-batch: bytes, and seconds, for which attention waits. Each pass
        sends queries, keys, values and what comes of them; recomputation is one more."""
        shared, network, gpu = self.config.parallel.context, self.network, self.options.gpu
        heads = 2 * network.num_attention_heads + 2 * max(network.num_key_value_heads, shared)
        token = network.num_hidden_layers * heads * network.head_dim * Bytes.compute * (2 + (policy != "none"))
        size = round(token * micro_packs * self.work.tokens_per_pack / shared * (shared - 1) / shared)
        return size, size / (REACHED * 1e9 * (gpu.link_gb_s if shared <= gpu.per_host else gpu.network_gb_s))

    def fits(self, memory: Memory) -> bool:
        return memory.allocated * RESERVED <= self.usable

    def choose(self, policy: str, micro_packs: int) -> Choice:
        """Memory and time of one way to run."""
        gpu, gpus, work, traffic = self.options.gpu, self.options.gpus, self.work, self.traffic
        full, rest = divmod(self.packs_per_gpu, micro_packs)
        micro_steps = full + (rest > 0)
        memory = self.memory(policy, micro_packs, accumulates=micro_steps > 1)
        exchanged, exchange_seconds = self.exchange(policy, micro_packs)
        seconds = work.tokens_per_pack * micro_packs / self.config.parallel.context
        seconds /= gpu.bf16_tflops * 1e12 * self.utilisation
        seconds /= FP8 if self.config.train.precision == "fp8" else 1
        # A frozen matrix has half a backward pass.
        forward = seconds * work.flops["none"] / (2 if self.config.lora.rank else 3)
        backward = seconds * work.flops[policy] - forward
        # Sending overlaps with computing; the longer of the two counts. The last micro-batch may be smaller.
        step = ADAMW * self.trained / self.shards / (gpu.memory_gb_s * 1e9) + sum(
            max(part * forward, traffic.forward_seconds) + max(part * backward, traffic.backward_seconds)
            + part * exchange_seconds for part in (*[1] * full, *[rest / micro_packs] * (rest > 0)))
        return {"activation_checkpointing": policy, "micro_packs": micro_packs, "fits": self.fits(memory),
                "allocated_gib": memory.allocated / GIB, "reserved_gib": memory.allocated * RESERVED / GIB,
                "instant": memory.instant, "parts_gib": {name: size / GIB for name, size in memory.parts.items()},
                "micro_steps": micro_steps, "compute_seconds": (forward, backward), "exchanged": exchanged,
                "exchange_seconds": exchange_seconds, "step_seconds": step,
                "tokens_per_second_per_gpu": work.tokens_per_pack * self.config.batch.packs / step / gpus}

    def nothing_fits(self, smallest: Choice) -> str:
        """The message for a run that does not fit: what is missing, and every change that would be enough."""
        packs = "one pack" if smallest["micro_packs"] == 1 else f"{smallest['micro_packs']} packs"
        lines = [f"  {reserved / GIB:6.1f}  {what}: " + " ".join(f"--{key} {str(value).lower()}"
                                                                 for key, value in keys.items())
                 for what, keys, reserved in self.remedies()]
        if lines:
            lines = ["Each of these fits, one pack at a time; GiB on each GPU:", *lines,
                     "Adapters take about ten times the learning rate (docs/lora.md); docs/memory.md has the savers"]
        return "\n".join([
            f"nothing fits: {packs} of {self.config.data.seq_len:,} tokens with parallel.activation_checkpointing = "
            f"full takes {smallest['reserved_gib']:.1f} GiB on each of {self.options.gpus} x {self.options.gpu.name}, "
            f"which has {self.usable / GIB:.1f} GiB usable", *(lines or ["Take larger GPUs"])])

    def remedies(self) -> Iterator[tuple[str, dict[str, Any], float]]:
        """The changes that make the run fit, one pack at a time: (what it is, options to add, bytes reserved).

        A change that sets every key of one before it is left out: that was enough.
        """
        enough: list[set[str]] = []
        as_set = self.config.parallel.activation_checkpointing
        for what, keys in self._changes():
            changed = {key: value for key, value in keys.items() if self._value(key) != value}
            if not changed or any(own <= changed.keys() for own in enough):
                continue
            other = self._with(changed)
            for policy in POLICIES[POLICIES.index(as_set):]:
                micro_packs = other.packs_per_gpu if other.config.optim.in_backward else 1
                memory = other.memory(policy, micro_packs, accumulates=other.packs_per_gpu > micro_packs)
                if other.fits(memory):
                    enough.append(set(changed))
                    also = {"batch.micro_packs": micro_packs, "parallel.activation_checkpointing": policy}
                    yield (what, changed | {key: value for key, value in also.items() if self._value(key) != value},
                           memory.allocated * RESERVED)
                    break

    def _changes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What may need less memory, in the order to try it: (what it is, keys to set)."""
        config, gpus, rank = self.config, self.options.gpus, self.config.lora.rank or 16
        on_device = {"parallel.offload": "none"} if config.parallel.offload == "parameters" else {}
        plain = {"train.precision": "bf16"} if config.train.precision == "fp8" else {}  # NF4 is not multiplied in fp8
        yield "QLoRA", (qlora := {"lora.rank": rank, "lora.base": "nf4", **on_device, **plain})
        yield "LoRA", {"lora.rank": rank, "lora.base": "bf16"}
        if not config.lora.rank:
            bf16 = {"optim.parameters": "bf16", "optim.moments": "bf16"}
            backward = {"optim.in_backward": True, "optim.clip_norm": 0, "batch.packs": gpus, **on_device}
            moments, state = (f"{each * self.trained / GIB:.0f} GiB on the host" for each in (4, 8))
            yield "bf16 moments", {"optim.moments": "bf16"}
            yield "bf16 parameters and moments", bf16
            yield "bf16, updated in the backward pass", bf16 | backward
            yield f"bf16, moments ({moments})", bf16 | {"parallel.offload": "optimizer"}
            yield f"bf16, updated in the backward pass, moments ({moments})", {
                **bf16, **backward, "parallel.offload": "optimizer"}
            yield f"bf16, all parameters ({state})", {
                **bf16, "optim.in_backward": False, "parallel.offload": "parameters"}
        for shared in range(config.parallel.context + 1, gpus + 1):
            if gpus % shared == 0 and context.divides(shared, self.network):
                yield "packs shared by several GPUs", {"parallel.context": shared}
        several = [{"gpus": shards * self.copies, "batch.packs": max(shards * self.copies, config.batch.packs),
                    **({"parallel.shard": shards} if config.parallel.shard else {})}
                   for shards in (self.shards << i for i in range(1, 11))]
        yield from (("QLoRA on more GPUs", qlora | keys) for keys in several)
        yield from (("more GPUs", keys) for keys in several)
        for seq_len in (config.data.seq_len >> i for i in range(1, 12)):
            if seq_len >= 128:
                yield "shorter packs", {"data.seq_len": seq_len}

    def _value(self, key: str) -> Any:
        section, _, name = key.rpartition(".")
        return getattr(getattr(self.config, section), name) if section else getattr(self.options, name)

    def _with(self, keys: dict[str, Any]) -> "Scenario":
        """The scenario with other keys; its data are not counted anew."""
        config, options = self.config, self.options
        for key, value in keys.items():
            section, _, name = key.rpartition(".")
            if section:
                config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
            else:
                options = replace(options, **{name: value})
        trained = targets.trained(lora, self.network) if (lora := adapters_of(config)) else self.trained
        return replace(self, config=config, options=options, shards=options.gpus // self.copies, trained=trained)


def _network_of(model: ModelConfig) -> tuple[LlamaConfig, str]:
    """The shape of the network, and the preset that it is taken to be if the model is missing but its name tells it
    (Meta-Llama-3-8B: llama-3-8b). Weights are not read. Raises UserError if nothing tells the shape."""
    named = model.config if model.init == "random" and model.config else model.path
    if named in PRESETS:
        return PRESETS[named], ""
    meant = next((preset for preset in PRESETS if _letters(preset) in _letters(named)), "")
    if meant and not Path(named).exists():
        return PRESETS[meant], meant
    try:
        return MetaFolder(named).config if model.format == "meta" else read_config(named), ""
    except UserError as error:
        first, *others = PRESETS
        raise UserError(f"{error}. To plan without the weights: a folder with only the model's config.json, or add "
                        f"--model.init random --model.config {first} (or {', '.join(others)})") from None


def figures(config: Config, options: PlanOptions) -> dict[str, Any]:
    """Every figure of the plan: --json. Raises UserError if nothing fits."""
    scenario = Scenario.of(config, options)
    work, traffic, gpu, gpus = scenario.work, scenario.traffic, options.gpu, options.gpus
    # Updates in the backward pass leave no room for a second micro-batch.
    least, most = (scenario.packs_per_gpu,) * 2 if config.optim.in_backward else (1, min(scenario.packs_per_gpu, MOST))
    choices = [scenario.choose(policy, micro_packs) for policy in POLICIES for micro_packs in range(least, most + 1)]
    fitting = [choice for choice in choices if choice["fits"]]
    if not fitting:
        raise UserError(scenario.nothing_fits(smallest=choices[2 * len(choices) // 3]))
    # Of those within 1% of the fastest, the smallest.
    fastest = min(choice["step_seconds"] for choice in fitting)
    best = min((c for c in fitting if c["step_seconds"] <= 1.01 * fastest), key=lambda c: c["allocated_gib"])
    forward, backward = best["compute_seconds"]
    sent = traffic.gathered_forward + traffic.gathered_backward + traffic.reduced + traffic.copied
    hours = None if work.tokens is None else work.tokens / best["tokens_per_second_per_gpu"] / gpus / 3600
    return {
        "gpu": asdict(gpu), "gpus": gpus, "shards": scenario.shards, "copies": scenario.copies,
        "model": config.model.config or config.model.path, "preset": scenario.preset,
        "parameters": Sizes.of(scenario.network).total, "trained": scenario.trained,
        "context": config.parallel.context,
        "usable_gib": scenario.usable / GIB, "reserved_factor": RESERVED, "utilisation": scenario.utilisation,
        "utilisation_is": "as given" if options.utilisation else "assumed: as one H200 reached" if gpus == 1
                          else "assumed: as eight H100s reached",
        "faster_by_fp8": FP8 if config.train.precision == "fp8" else 1,
        "assumed": work.assumed, "tokens": work.tokens, "steps": work.steps, "trained_share": float(work.trained),
        "tokens_per_step": work.tokens_per_pack * config.batch.packs, "flops_per_token": work.flops,
        "flops_per_step": work.flops[best["activation_checkpointing"]] * work.tokens_per_pack * config.batch.packs,
        "memory": {choice["activation_checkpointing"]: choice for choice in choices
                   if choice["micro_packs"] == max(least, min(config.batch.micro_packs, most))},
        "activation_checkpointing": config.parallel.activation_checkpointing,
        "largest_micro_packs": {policy: max((c["micro_packs"] for c in fitting
                                             if c["activation_checkpointing"] == policy), default=0)
                                for policy in POLICIES},
        "packs_per_gpu": most, "recommended": best,
        "traffic": asdict(traffic), "traffic_per_step": best["micro_steps"] * (sent + best["exchanged"]),
        "hidden": traffic.forward_seconds <= forward and traffic.backward_seconds <= backward,
        "offload": config.parallel.offload, "hours": hours, "price": options.price,
        "dollars": None if hours is None or options.price is None else hours * gpus * options.price}


def describe(found: dict[str, Any]) -> str:
    """The plan as text."""
    gpu, best, traffic = found["gpu"], found["recommended"], found["traffic"]
    copies = f", {found['copies']} copies of the model" * (found["copies"] > 1)
    shared = f", each pack shared by {found['context']}" * (found["context"] > 1)
    adapted = f"{found['trained']:,} trained beside " * (found["trained"] != found["parameters"])
    lines = [f"{adapted}{found['parameters'] / 1e9:.2f}B parameters over {found['shards']} of {found['gpus']} x "
             f"{gpu['name']}{copies}{shared}; {found['usable_gib']:.1f} GiB of each usable", "",
             *_memory_table(found), ""]
    how = f"assumed: {found['assumed']}" if found["assumed"] else "counted from the data"
    flops, needed = found["flops_per_token"][best["activation_checkpointing"]], found["flops_per_token"]["none"]
    forward, backward = best["compute_seconds"]
    sent = [traffic[name] / GIB for name in ("gathered_forward", "gathered_backward", "reduced", "copied")]
    network = f"{gpu['link']} {gpu['link_gb_s']:g} GB/s, network {gpu['network_gb_s']:g} GB/s a GPU"
    if found["hours"] is None:
        minutes = 1e6 / found["tokens_per_step"] * best["step_seconds"] / 60
        run = f"{minutes:.2f} minutes a million tokens; for the whole run give --tokens, or the data"
    else:
        run = f"{found['tokens']:,} tokens in {found['steps']:,} steps: {found['hours']:.2f} hours"
    if found["dollars"] is not None:
        run += f", {found['dollars']:,.2f} dollars at {found['price']:g} a GPU-hour"
    rows = {
        "work": f"{needed / 1e9:.1f} GFLOP a token, {flops / needed - 1:.0%} more with recomputation; "
                f"{found['flops_per_step']:.3g} FLOPs a step of {found['tokens_per_step']:,.0f} tokens; {how}",
        "compute": f"{forward * 1e3:,.0f} ms forward and {backward * 1e3:,.0f} backward a micro-batch, at "
                   f"{found['utilisation']:.0%} of {gpu['bf16_tflops']:g} TFLOP/s ({found['utilisation_is']})"
                   + f", {found['faster_by_fp8']:g} times as fast by FP8 (assumed)" * (found["faster_by_fp8"] > 1),
        "sent": f"{sum(sent):.1f} GiB a micro-batch by each GPU (weights {sent[0]:.1f} forward and {sent[1]:.1f} "
                f"backward, gradients {sent[2]:.1f}, between copies {sent[3]:.1f}), "
                f"{found['traffic_per_step'] / GIB:.1f} a step: {traffic['forward_seconds'] * 1e3:,.0f} ms forward and "
                f"{traffic['backward_seconds'] * 1e3:,.0f} backward at {REACHED:.0%} of {network}; "
                f"{'hidden behind compute' if found['hidden'] else 'longer than compute'}"
                + (f"; around attention {best['exchanged'] / GIB:.1f} GiB a micro-batch, "
                   f"{best['exchange_seconds'] * 1e3:,.0f} ms, not hidden") * (found["context"] > 1),
        "best": f"--parallel.activation_checkpointing {best['activation_checkpointing']} --batch.micro_packs "
                f"{best['micro_packs']}, accumulating {best['micro_steps']}: "
                f"{best['reserved_gib']:.1f} GiB reserved ({best['allocated_gib']:.1f} allocated); with these",
        "speed": f"{best['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, {best['step_seconds']:.2f} s a step",
        "run": run,
        "note": "computed, not measured: memory is counted tensor by tensor; times are as good as the assumed share"
                " and leave out evaluation and checkpoints"
                + ", and what offloading moves" * (found["offload"] != "none"),
    }
    if found["preset"]:
        rows = {"model": f"{found['model']} is missing: planned as the preset {found['preset']}", **rows}
    for title, text in rows.items():
        lines += textwrap.wrap(text, 110, initial_indent=f"{title:<9}", subsequent_indent=" " * 9,
                               break_on_hyphens=False)
    return "\n".join(printable(line, PATH) for line in lines)


def _memory_table(found: dict[str, Any]) -> list[str]:
    columns, choices = found["memory"], list(found["memory"].values())
    parts = ("parameters", "gradients", "moments", "inputs", "activations", "head", "gathered", "unpacked", "reduction")
    rows = {"GiB a GPU, recomputing": columns}
    rows |= {part: [f"{choice['parts_gib'].get(part, 0):.2f}" for choice in choices] for part in parts
             if part != "unpacked" or any(part in choice["parts_gib"] for choice in choices)}
    rows |= {"allocated": [f"{choice['allocated_gib']:.2f}" for choice in choices],
             f"reserved (x {RESERVED:g}, assumed)": [f"{choice['reserved_gib']:.1f}" for choice in choices],
             "needs most in": [choice["instant"] for choice in choices],
             f"with {choices[0]['micro_packs']} packs in a pass": ["fits" if choice["fits"] else "does not"
                                                                  for choice in choices],
             f"most packs that fit (of {found['packs_per_gpu']})": map(found["largest_micro_packs"].get, columns),
             "tokens/s a GPU": [f"{choice['tokens_per_second_per_gpu']:,.0f}" for choice in choices]}
    return [f"{name:<28}" + "".join(f"{cell:>13}" for cell in cells) for name, cells in rows.items()]
