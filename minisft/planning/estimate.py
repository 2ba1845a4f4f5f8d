"""`minisft plan`: what a run needs, how long it takes and what it costs, before it is paid for.

    recipe and GPUs -> work of its data -> for each checkpointing policy and micro-batch: memory, FLOPs, bytes sent
    -> those that fit -> the fastest

Nothing here has run on the GPUs in question. Memory and FLOPs are arithmetic from the shape of the network, checked
against what torch counts; time is FLOPs over an assumed share of the peak, and is only as good as that assumption.
"""

import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minisft.config import Config
from minisft.errors import PATH, UserError, printable
from minisft.model.flops import training_flops
from minisft.model.llama_config import PRESETS, LlamaConfig, read_config
from minisft.model.lora_config import LoRA
from minisft.model.meta import MetaFolder
from minisft.planning import UTILISATION
from minisft.planning.hardware import REACHED, Gpu, Traffic
from minisft.planning.memory import FP32, POLICIES, Bytes, Memory, Sizes, peak
from minisft.prepare import adapters_of, inputs, prepare

RESERVED = 1.2  # memory that PyTorch's allocator holds for each byte allocated: about that in published runs
OUTSIDE = 1.5  # GiB assumed for what PyTorch does not count: CUDA's context, NCCL's buffers
ADAMW = 28  # bytes moved for each parameter: four fp32 numbers read, three written
MOST = 64  # packs in a forward pass that are looked at
GIB = 2**30


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
    def of(cls, config: Config, network: LlamaConfig, *, tokens: int | None, document: int | None) -> "Work":
        """Counted from the packed data; or from `tokens` an epoch in documents of `document` tokens."""
        lora = adapters_of(config)
        if tokens is None and not document and not missing(config):
            plan, train = (prepared := prepare(config)).plan, prepared.train
            documents = plan.epoch(0).documents
            lengths, targets = train.lengths[documents], train.num_loss_tokens[documents]
            per_epoch, steps = int(lengths.sum()), plan.total_steps
            total = round(per_epoch * steps / plan.steps_per_epoch)
            return cls(config.data.seq_len * plan.fill(), targets.sum() / per_epoch,
                       flops_per_token(network, lengths, targets, lora), total, steps, "")
        length = min(document or config.data.seq_len, config.data.seq_len)
        lengths = np.full(config.data.seq_len // length, length)
        assumed = f"packs full of documents of {length:,} tokens, all of them trained"
        if tokens is None:
            absent = missing(config)
            return cls(config.data.seq_len, 1.0, flops_per_token(network, lengths, lengths, lora), None, None,
                       assumed + (f"; {absent[0]} is not there" if absent else ""))
        per_step = config.batch.packs * config.data.seq_len
        steps = config.train.epochs * -(-tokens // per_step)
        steps = min(steps, config.train.max_steps or steps)
        return cls(config.data.seq_len, 1.0, flops_per_token(network, lengths, lengths, lora),
                   min(config.train.epochs * tokens, steps * per_step), steps, assumed)


def missing(config: Config) -> list[str]:
    """Files that must be read to count the data, and are not there."""
    *paths, _, _, _, _ = inputs(config)
    return [path for path in paths if not Path(path).exists()]


def flops_per_token(network: LlamaConfig, lengths: np.ndarray, targets: np.ndarray,
                    lora: LoRA | None) -> dict[str, float]:
    """FLOPs a token of documents (n,) with `targets` (n,) trained tokens, by what is recomputed."""
    return {policy: training_flops(network, lengths, targets, recompute=policy, lora=lora) / int(lengths.sum())
            for policy in POLICIES}


@dataclass(frozen=True)
class Choice:
    """One way to run: a checkpointing policy and the packs of a forward pass."""

    policy: str
    micro_packs: int
    memory: Memory
    fits: bool
    micro_steps: int
    compute_seconds: tuple[float, float]  # of a micro-batch: forward, backward
    step_seconds: float
    tokens_per_second: float  # a GPU

    @property
    def reserved(self) -> float:
        """Bytes that the allocator holds."""
        return self.memory.allocated * RESERVED


def network_of(config: Config) -> LlamaConfig:
    """The shape of the network; weights are not read. Raises UserError where nothing tells it."""
    named = config.model.config if config.model.init == "random" else config.model.path
    if config.model.init == "random" and named in PRESETS:
        return PRESETS[named]
    try:
        return MetaFolder(named).config if config.model.format == "meta" else read_config(named)
    except UserError as error:
        raise UserError(f"{error}. To plan without the weights: a folder with the model's config.json alone" + (
            "" if config.lora.rank else f", or --model.init random --model.config with one of {', '.join(PRESETS)}"
            )) from None


def figures(config: Config, gpu: Gpu, *, gpus: int, tokens: int | None = None, document: int | None = None,
            utilisation: float = UTILISATION, price: float | None = None) -> dict[str, Any]:
    """Every figure of the plan: --json. `price` is that of one GPU for an hour. UserError where nothing fits."""
    if config.train.precision != "bf16":
        raise UserError("train.precision is fp32; the plan knows the rates of bf16: add --train.precision bf16")
    shards, copies = split(config, gpus)
    network = network_of(config)
    work = Work.of(config, network, tokens=tokens, document=document)
    lora = adapters_of(config)
    if lora:
        lora.check(network)
    traffic = Traffic.of(network, gpu, shards=shards, copies=copies, lora=lora)
    most = min(-(-config.batch.packs // gpus), MOST)
    choices = [choose(config, network, work, traffic, gpu, policy, micro_packs, gpus=gpus, shards=shards,
                      utilisation=utilisation)
               for policy in POLICIES for micro_packs in range(1, most + 1)]
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        raise UserError(nothing_fits(config, network, gpu, gpus=gpus, shards=shards, smallest=choices[2 * most]))
    # Of those within 1% of the fastest, the smallest.
    fastest = min(choice.step_seconds for choice in fitting)
    best = min((c for c in fitting if c.step_seconds <= 1.01 * fastest), key=lambda c: c.memory.allocated)
    asked = [c for c in choices if c.micro_packs == min(config.batch.micro_packs, most)]
    return {
        "gpu": asdict(gpu), "gpus": gpus, "shards": shards, "copies": copies, "parameters": Sizes.of(network).total,
        "trained": lora.trained(network) if lora else Sizes.of(network).total,
        "usable_gib": gpu.memory_gib - OUTSIDE, "reserved_factor": RESERVED, "utilisation": utilisation,
        "assumed": work.assumed, "tokens": work.tokens, "steps": work.steps, "trained_share": float(work.trained),
        "tokens_per_step": work.tokens_per_pack * config.batch.packs, "flops_per_token": work.flops,
        "flops_per_step": work.flops[best.policy] * work.tokens_per_pack * config.batch.packs,
        "memory": {choice.policy: as_dict(choice) for choice in asked},
        "activation_checkpointing": config.parallel.activation_checkpointing,
        "largest_micro_packs": {policy: max((c.micro_packs for c in fitting if c.policy == policy), default=0)
                                for policy in POLICIES}, "packs_per_gpu": most,
        "recommended": as_dict(best), **sent(traffic, best), **cost(work, best, gpus=gpus, price=price)}


def sent(traffic: Traffic, best: Choice) -> dict[str, Any]:
    """What the GPUs send, and whether computing takes longer."""
    micro_batch = traffic.gathered_forward + traffic.gathered_backward + traffic.reduced + traffic.copied
    forward, backward = best.compute_seconds
    return {"traffic": asdict(traffic), "traffic_per_step": best.micro_steps * micro_batch,
            "hidden": traffic.forward_seconds <= forward and traffic.backward_seconds <= backward}


def cost(work: Work, best: Choice, *, gpus: int, price: float | None) -> dict[str, Any]:
    """Hours and dollars, where the length of the run and the price are known."""
    hours = None if work.steps is None else work.steps * best.step_seconds / 3600
    return {"hours": hours, "price": price, "dollars": None if hours is None or price is None else hours * gpus * price}


def as_dict(choice: Choice) -> dict[str, Any]:
    """A choice's figures, in GiB and seconds."""
    return {"activation_checkpointing": choice.policy, "micro_packs": choice.micro_packs, "fits": choice.fits,
            "allocated_gib": choice.memory.allocated / GIB, "reserved_gib": choice.reserved / GIB,
            "instant": choice.memory.instant,
            "parts_gib": {name: size / GIB for name, size in choice.memory.parts.items()},
            "micro_steps": choice.micro_steps, "compute_seconds": choice.compute_seconds,
            "step_seconds": choice.step_seconds, "tokens_per_second_per_gpu": choice.tokens_per_second}


def split(config: Config, gpus: int) -> tuple[int, int]:
    """Shards of the model, and copies of it (HSDP)."""
    shard, replicate = config.parallel.shard, config.parallel.replicate
    copies = replicate or max(gpus // (shard or gpus), 1)
    shards = gpus // copies
    if shards * copies != gpus or shard not in (0, shards):
        raise UserError(f"--gpus {gpus} is not parallel.shard = {shard} times parallel.replicate = {replicate}: it "
                        "must be their product, or where one of them is 0 a multiple of the other")
    if config.batch.packs < gpus:
        raise UserError(f"batch.packs = {config.batch.packs} cannot be split over {gpus} GPUs; raise it to at least "
                        f"{gpus}, or take fewer GPUs")
    return shards, copies


def choose(config: Config, network: LlamaConfig, work: Work, traffic: Traffic, gpu: Gpu, policy: str,
           micro_packs: int, *, gpus: int, shards: int, utilisation: float) -> Choice:
    """Memory and time of one way to run."""
    full, rest = divmod(-(-config.batch.packs // gpus), micro_packs)
    micro_steps = full + (rest > 0)
    memory = memory_of(config, network, shards=shards, policy=policy, micro_packs=micro_packs, trained=work.trained,
                       accumulates=micro_steps > 1)
    seconds = work.tokens_per_pack * micro_packs / (gpu.bf16_tflops * 1e12 * utilisation)
    lora = adapters_of(config)
    forward = seconds * work.flops["none"] / (2 if lora else 3)  # frozen matrices have half a backward pass
    backward = seconds * work.flops[policy] - forward
    optimizer = ADAMW * (lora.trained(network) if lora else Sizes.of(network).total) / shards / (gpu.memory_gb_s * 1e9)
    # Sending overlaps with computing; the longer of the two counts. The last micro-batch may be smaller.
    step = optimizer + sum(max(part * forward, traffic.forward_seconds) + max(part * backward, traffic.backward_seconds)
                           for part in (*[1] * full, *[rest / micro_packs] * (rest > 0)))
    fits = memory.allocated * RESERVED <= (gpu.memory_gib - OUTSIDE) * GIB
    return Choice(policy, micro_packs, memory, fits, micro_steps, (forward, backward), step,
                  work.tokens_per_pack * config.batch.packs / step / gpus)


def memory_of(config: Config, network: LlamaConfig, *, shards: int, policy: str, micro_packs: int = 1,
              trained: float = 1.0, accumulates: bool = True, seq_len: int | None = None) -> Memory:
    """The peak of a full micro-batch."""
    tokens = micro_packs * (seq_len or config.data.seq_len)
    return peak(network, shards=shards, tokens=tokens, trained=round(tokens * trained), recompute=policy,
                accumulates=accumulates, each=bytes_of(config), lora=adapters_of(config))


def bytes_of(config: Config) -> Bytes:
    """Bytes a parameter on the GPU under the configuration (docs/memory.md)."""
    optim, offload = config.optim, config.parallel.offload
    weight, moment = (2 if precision == "bf16" else FP32 for precision in (optim.parameters, optim.moments))
    here = 0 if offload == "parameters" else weight
    return Bytes(parameter=here, gradient=0 if optim.in_backward else here, moments=2 * moment * (offload == "none"),
                 compiled=config.parallel.compile != "false")


def nothing_fits(config: Config, network: LlamaConfig, gpu: Gpu, *, gpus: int, shards: int, smallest: Choice) -> str:
    """What is missing, and what would help."""
    usable = (gpu.memory_gib - OUTSIDE) * GIB

    def fits(*, on: int = shards, seq_len: int | None = None) -> bool:
        return memory_of(config, network, policy="full", shards=on, seq_len=seq_len).allocated * RESERVED <= usable

    remedies = []
    enough = next((shards * 2**i for i in range(1, 11) if fits(on=shards * 2**i)), None)
    if enough:
        remedies.append(f"shard over {enough} GPUs")
    shorter = next((config.data.seq_len >> i for i in range(1, 12) if config.data.seq_len >> i >= 128
                    and fits(seq_len=config.data.seq_len >> i)), None)
    if shorter:
        remedies.append(f"set data.seq_len to {shorter}")
    savers = replace(config, optim=replace(config.optim, parameters="bf16", moments="bf16"),
                     parallel=replace(config.parallel, offload="optimizer"))
    if memory_of(savers, network, policy="full", shards=shards).allocated * RESERVED <= usable:
        remedies.append("keep less of each parameter there: optim.parameters and optim.moments = bf16, "
                        "parallel.offload = optimizer (docs/memory.md)")
    return (f"nothing fits: one pack of {config.data.seq_len:,} tokens with parallel.activation_checkpointing = full "
            f"takes {smallest.reserved / GIB:.1f} GiB on each of {gpus} x {gpu.name}, which has "
            f"{usable / GIB:.1f} GiB to use. To make it fit, {', or '.join(remedies) or 'take larger GPUs'}")


# ---- the text --------------------------------------------------------------------------------------------------------


def describe(found: dict[str, Any]) -> str:
    """The figures of a plan for a person."""
    gpu, best, traffic = found["gpu"], found["recommended"], found["traffic"]
    copies = f", {found['copies']} copies of the model" * (found["copies"] > 1)
    adapted = f"{found['trained']:,} trained beside " * (found["trained"] != found["parameters"])
    lines = [f"{adapted}{found['parameters'] / 1e9:.2f}B parameters over {found['shards']} of {found['gpus']} x "
             f"{gpu['name']}{copies}; {found['usable_gib']:.1f} GiB of each to use", "", *_memory_table(found), ""]
    how = f"assumed: {found['assumed']}" if found["assumed"] else "counted from the data"
    flops, needed = found["flops_per_token"][best["activation_checkpointing"]], found["flops_per_token"]["none"]
    forward, backward = best["compute_seconds"]
    sent = [traffic[name] / GIB for name in ("gathered_forward", "gathered_backward", "reduced", "copied")]
    network = f"{gpu['link']} {gpu['link_gb_s']:g} GB/s, network {gpu['network_gb_s']:g} GB/s a GPU"
    rows = {
        "work": f"{needed / 1e9:.1f} GFLOP a token, {flops / needed - 1:.0%} more with what is computed again; "
                f"{found['flops_per_step']:.3g} FLOPs a step of "
                f"{found['tokens_per_step']:,.0f} tokens; {how}",
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
        "run": _run(found),
        "note": "computed, not measured: memory is counted tensor by tensor, times are as good as the assumed share",
    }
    for title, text in rows.items():
        lines += textwrap.wrap(text, 110, initial_indent=f"{title:<9}", subsequent_indent=" " * 9,
                               break_on_hyphens=False)
    return "\n".join(printable(line, PATH) for line in lines)


def _memory_table(found: dict[str, Any]) -> list[str]:
    columns = found["memory"]
    packs = next(iter(columns.values()))["micro_packs"]
    table = [["GiB a GPU, recomputing", *columns]]
    parts = ("parameters", "gradients", "moments", "inputs", "activations", "head", "gathered", "unpacked", "reduction")
    for part in (part for part in parts if part != "unpacked" or any(part in c["parts_gib"] for c in columns.values())):
        table.append([part, *(f"{c['parts_gib'].get(part, 0):.2f}" for c in columns.values())])
    table += [["allocated", *(f"{c['allocated_gib']:.2f}" for c in columns.values())],
              [f"reserved (x {found['reserved_factor']:g}, assumed)", *(f"{c['reserved_gib']:.1f}"
                                                                       for c in columns.values())],
              ["most is needed in", *(c["instant"] for c in columns.values())],
              [f"with {packs} packs in a pass", *("fits" if c["fits"] else "does not" for c in columns.values())],
              [f"most packs that fit (of {found['packs_per_gpu']})",
               *(str(found["largest_micro_packs"][name]) for name in columns)],
              ["tokens/s a GPU", *(f"{c['tokens_per_second_per_gpu']:,.0f}" for c in columns.values())]]
    return [f"{name:<28}" + "".join(f"{cell:>13}" for cell in cells) for name, *cells in table]


def _run(found: dict[str, Any]) -> str:
    if found["hours"] is None:
        seconds = found["tokens_per_step"] / found["recommended"]["step_seconds"]
        return f"{1e6 / seconds / 60:.2f} minutes a million tokens; for a whole run give --tokens, or the data"
    cost = "" if found["dollars"] is None else (f", {found['dollars']:,.2f} dollars at {found['price']:g} an hour and "
                                                "GPU")
    return f"{found['tokens']:,} tokens in {found['steps']:,} steps: {found['hours']:.2f} hours{cost}"
