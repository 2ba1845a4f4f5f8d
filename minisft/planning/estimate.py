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

import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from minisft.config import Config, LoraConfig
from minisft.config_io import nearest
from minisft.errors import PATH, UserError, printable
from minisft.lora import targets
from minisft.model.flops import Sizes, known_gpus, training_flops
from minisft.model.llama_config import PRESETS, LlamaConfig, read_config
from minisft.planning import UTILISATION
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


@dataclass(frozen=True)
class PlanOptions:
    """The GPUs, and what to assume."""

    gpu: Gpu
    gpus: int
    tokens: int | None = None  # in an epoch, instead of counting the data
    document: int | None = None  # tokens in a document, instead of counting the data
    utilisation: float = UTILISATION
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
        seq_len, missing = config.data.seq_len, [path for path in inputs(config)[:-5] if not Path(path).exists()]
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
    step_seconds: float
    tokens_per_second_per_gpu: float


@dataclass(frozen=True)
class Scenario:
    """A recipe on given GPUs."""

    config: Config
    options: PlanOptions
    network: LlamaConfig
    shards: int  # of the model
    copies: int  # of it (HSDP)
    work: Work
    trained: int  # parameters
    traffic: Traffic

    @classmethod
    def of(cls, config: Config, options: PlanOptions) -> "Scenario":
        """Raises UserError for what cannot be planned."""
        if config.train.precision != "bf16":
            raise UserError(f"train.precision is {config.train.precision}, but the plan knows only the speed of bf16: "
                            "add --train.precision bf16")
        shard, replicate, gpus = config.parallel.shard, config.parallel.replicate, options.gpus
        copies = parallel.copies(gpus, config.parallel)
        if gpus % copies or shard not in (0, gpus // copies):
            raise UserError(f"--gpus {gpus} is not parallel.shard = {shard} times parallel.replicate = {replicate}; it "
                            "must be their product, or a multiple of one if the other is 0")
        if config.batch.packs < gpus:
            raise UserError(f"batch.packs = {config.batch.packs} cannot be split over {gpus} GPUs; raise it to at "
                            f"least {gpus}, or take fewer GPUs")
        network, lora = _network_of(config), adapters_of(config)
        work = Work.of(config, network, options)
        if lora:
            targets.check(lora, network)
        trained = targets.trained(lora, network) if lora else Sizes.of(network).total
        traffic = Traffic.of(network, options.gpu, shards=gpus // copies, copies=copies, lora=lora)
        return cls(config, options, network, gpus // copies, copies, work, trained, traffic)

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
        tokens = micro_packs * self.config.data.seq_len
        return StepMemory(self.network, self.shards, tokens, round(tokens * self.work.trained), policy, accumulates,
                          each, adapters_of(self.config)).peak()

    def fits(self, memory: Memory) -> bool:
        return memory.allocated * RESERVED <= self.usable

    def choose(self, policy: str, micro_packs: int) -> Choice:
        """Memory and time of one way to run."""
        gpu, gpus, work, traffic = self.options.gpu, self.options.gpus, self.work, self.traffic
        full, rest = divmod(-(-self.config.batch.packs // gpus), micro_packs)
        micro_steps = full + (rest > 0)
        memory = self.memory(policy, micro_packs, accumulates=micro_steps > 1)
        seconds = work.tokens_per_pack * micro_packs / (gpu.bf16_tflops * 1e12 * self.options.utilisation)
        # A frozen matrix has half a backward pass.
        forward = seconds * work.flops["none"] / (2 if self.config.lora.rank else 3)
        backward = seconds * work.flops[policy] - forward
        # Sending overlaps with computing; the longer of the two counts. The last micro-batch may be smaller.
        step = ADAMW * self.trained / self.shards / (gpu.memory_gb_s * 1e9) + sum(
            max(part * forward, traffic.forward_seconds) + max(part * backward, traffic.backward_seconds)
            for part in (*[1] * full, *[rest / micro_packs] * (rest > 0)))
        return {"activation_checkpointing": policy, "micro_packs": micro_packs, "fits": self.fits(memory),
                "allocated_gib": memory.allocated / GIB, "reserved_gib": memory.allocated * RESERVED / GIB,
                "instant": memory.instant, "parts_gib": {name: size / GIB for name, size in memory.parts.items()},
                "micro_steps": micro_steps, "compute_seconds": (forward, backward), "step_seconds": step,
                "tokens_per_second_per_gpu": work.tokens_per_pack * self.config.batch.packs / step / gpus}

    def nothing_fits(self, smallest: Choice) -> str:
        """The message for a run that does not fit: what is missing, and what would help."""
        config, gpu, remedies = self.config, self.options.gpu, []

        def fits(**changed: Any) -> bool:
            return self.fits(replace(self, **changed).memory("full"))

        if enough := next((self.shards << i for i in range(1, 11) if fits(shards=self.shards << i)), None):
            remedies.append(f"shard over {enough} GPUs")
        shorter = [config.data.seq_len >> i for i in range(1, 12) if config.data.seq_len >> i >= 128]
        if seq_len := next((seq_len for seq_len in shorter if fits(
                config=replace(config, data=replace(config.data, seq_len=seq_len)))), None):
            remedies.append(f"set data.seq_len to {seq_len}")
        if fits(config=replace(config, optim=replace(config.optim, parameters="bf16", moments="bf16"),
                               parallel=replace(config.parallel, offload="optimizer"))):
            remedies.append("keep less of each parameter on the GPU: optim.parameters and optim.moments = bf16, "
                            "parallel.offload = optimizer (docs/memory.md)")
        return (f"nothing fits: one pack of {config.data.seq_len:,} tokens with parallel.activation_checkpointing = "
                f"full takes {smallest['reserved_gib']:.1f} GiB on each of {self.options.gpus} x {gpu.name}, which has "
                f"{self.usable / GIB:.1f} GiB usable. To make it fit, {', or '.join(remedies) or 'take larger GPUs'}")


def _network_of(config: Config) -> LlamaConfig:
    """The shape of the network; weights are not read. Raises UserError if nothing tells it."""
    named = config.model.config if config.model.init == "random" else config.model.path
    if config.model.init == "random" and named in PRESETS:
        return PRESETS[named]
    try:
        return MetaFolder(named).config if config.model.format == "meta" else read_config(named)
    except UserError as error:
        preset = "" if config.lora.rank else f", or --model.init random --model.config with one of {', '.join(PRESETS)}"
        raise UserError(f"{error}. To plan without the weights: a folder with only the model's config.json{preset}"
                        ) from None


def figures(config: Config, options: PlanOptions) -> dict[str, Any]:
    """Every figure of the plan: --json. Raises UserError if nothing fits."""
    scenario = Scenario.of(config, options)
    work, traffic, gpu, gpus = scenario.work, scenario.traffic, options.gpu, options.gpus
    most = min(-(-config.batch.packs // gpus), MOST)
    choices = [scenario.choose(policy, micro_packs) for policy in POLICIES for micro_packs in range(1, most + 1)]
    fitting = [choice for choice in choices if choice["fits"]]
    if not fitting:
        raise UserError(scenario.nothing_fits(smallest=choices[2 * most]))
    # Of those within 1% of the fastest, the smallest.
    fastest = min(choice["step_seconds"] for choice in fitting)
    best = min((c for c in fitting if c["step_seconds"] <= 1.01 * fastest), key=lambda c: c["allocated_gib"])
    forward, backward = best["compute_seconds"]
    sent = traffic.gathered_forward + traffic.gathered_backward + traffic.reduced + traffic.copied
    hours = None if work.steps is None else work.steps * best["step_seconds"] / 3600
    return {
        "gpu": asdict(gpu), "gpus": gpus, "shards": scenario.shards, "copies": scenario.copies,
        "parameters": Sizes.of(scenario.network).total, "trained": scenario.trained,
        "usable_gib": scenario.usable / GIB, "reserved_factor": RESERVED, "utilisation": options.utilisation,
        "assumed": work.assumed, "tokens": work.tokens, "steps": work.steps, "trained_share": float(work.trained),
        "tokens_per_step": work.tokens_per_pack * config.batch.packs, "flops_per_token": work.flops,
        "flops_per_step": work.flops[best["activation_checkpointing"]] * work.tokens_per_pack * config.batch.packs,
        "memory": {choice["activation_checkpointing"]: choice for choice in choices
                   if choice["micro_packs"] == min(config.batch.micro_packs, most)},
        "activation_checkpointing": config.parallel.activation_checkpointing,
        "largest_micro_packs": {policy: max((c["micro_packs"] for c in fitting
                                             if c["activation_checkpointing"] == policy), default=0)
                                for policy in POLICIES},
        "packs_per_gpu": most, "recommended": best,
        "traffic": asdict(traffic), "traffic_per_step": best["micro_steps"] * sent,
        "hidden": traffic.forward_seconds <= forward and traffic.backward_seconds <= backward,
        "hours": hours, "price": options.price,
        "dollars": None if hours is None or options.price is None else hours * gpus * options.price}


def describe(found: dict[str, Any]) -> str:
    """The plan as text."""
    gpu, best, traffic = found["gpu"], found["recommended"], found["traffic"]
    copies = f", {found['copies']} copies of the model" * (found["copies"] > 1)
    adapted = f"{found['trained']:,} trained beside " * (found["trained"] != found["parameters"])
    lines = [f"{adapted}{found['parameters'] / 1e9:.2f}B parameters over {found['shards']} of {found['gpus']} x "
             f"{gpu['name']}{copies}; {found['usable_gib']:.1f} GiB of each usable", "", *_memory_table(found), ""]
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
                   f"{found['utilisation']:.0%} of {gpu['bf16_tflops']:g} TFLOP/s (assumed)",
        "sent": f"{sum(sent):.1f} GiB a micro-batch by each GPU (weights {sent[0]:.1f} forward and {sent[1]:.1f} "
                f"backward, gradients {sent[2]:.1f}, between copies {sent[3]:.1f}), "
                f"{found['traffic_per_step'] / GIB:.1f} a step: {traffic['forward_seconds'] * 1e3:,.0f} ms forward and "
                f"{traffic['backward_seconds'] * 1e3:,.0f} backward at {REACHED:.0%} of {network}; "
                f"{'hidden behind compute' if found['hidden'] else 'longer than compute'}",
        "best": f"--parallel.activation_checkpointing {best['activation_checkpointing']} --batch.micro_packs "
                f"{best['micro_packs']}, accumulating {best['micro_steps']}: "
                f"{best['reserved_gib']:.1f} GiB reserved ({best['allocated_gib']:.1f} allocated); with these",
        "speed": f"{best['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU, {best['step_seconds']:.2f} s a step",
        "run": run,
        "note": "computed, not measured: memory is counted tensor by tensor; times are as good as the assumed share",
    }
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
