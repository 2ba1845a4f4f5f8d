"""Many processes, one model: fully sharded data parallelism (Zhao et al. 2023, "PyTorch FSDP"; Rajbhandari et al.
2020, "ZeRO", stage 3).

Each rank keeps 1/N of every parameter in fp32, with its gradient and its two moments. Before a block computes, its
parameters are gathered in bf16; after its backward pass, its gradients are summed over the ranks and each keeps its
part. A lone process keeps plain fp32 parameters.

    data parallel over all ranks          parallel.replicate = 2 (HSDP), 8 ranks
    shard  [0 1 2 3 4 5 6 7]              shard [0 1 2 3], copy on [4 5 6 7]
"""

import json
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from minisft.errors import UserError
from minisft.model import lora
from minisft.model.llama import Llama
from minisft.model.llama_config import LlamaConfig
from minisft.model.lora_config import LoRA
from minisft.model.precision import DTYPES

PATIENCE = timedelta(minutes=5)  # beyond parallel.timeout, at which every rank has said where it hangs


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    ranks: int
    device: torch.device
    mesh: DeviceMesh
    store: dist.Store  # shared with the other ranks; outlives those that die

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """The number of parts that a parameter is divided into."""
        return self.mesh["shard"].size()

    @property
    def writes_rows(self) -> bool:
        """Whether this rank's rows go into a checkpoint: rank i holds part i, and ranks past them HSDP's copies."""
        return self.rank < self.shards

    def first_failure(self, code: int, text: str) -> dict[str, Any]:
        """Tell the others why this rank fails; returns {rank, code, text} of the rank that failed first.

        When one rank fails, the others fail for want of it. Only the first has something to say.
        """
        mine = json.dumps({"rank": self.rank, "code": code, "text": text})
        return json.loads(self.store.compare_set("first failure", "", mine))

    def heard_failure(self) -> dict[str, Any] | None:
        """The same of a failure that any rank has told, without one of this rank's own."""
        return json.loads(self.store.get("first failure")) if self.store.check(["first failure"]) else None


def launched_rank() -> tuple[int, int]:
    """Rank and number of ranks as torchrun says; (0, 1) without it. Needs no process group."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_split(packs_per_step: int, *, shard: int, replicate: int) -> None:
    """Raise UserError where the ranks cannot share a step, or do not form the asked mesh."""
    _, ranks = launched_rank()
    replicate = copies(ranks, shard=shard, replicate=replicate)
    if packs_per_step < ranks:
        raise UserError(f"batch.packs = {packs_per_step} cannot be split over {ranks} ranks: some would never have "
                        f"work; raise batch.packs to at least {ranks}, or start fewer processes")
    if (shard and shard * replicate != ranks) or ranks % replicate:
        raise UserError(f"parallel.shard = {shard} times parallel.replicate = {replicate} is not the number of ranks, "
                        f"{ranks}: it must be their product, or where one of them is 0 a multiple of the other")


def check_one_micro_batch(packs_per_step: int, micro_packs: int) -> None:
    """Raise UserError where a rank would sum the gradients of several micro-batches before it can update."""
    _, ranks = launched_rank()
    if packs_per_step > micro_packs * ranks:
        raise UserError(f"optim.in_backward: batch.packs = {packs_per_step} is more than batch.micro_packs = "
                        f"{micro_packs} on {ranks} rank{'s' * (ranks > 1)}, but parameters that are updated in the "
                        f"backward pass cannot wait for another; lower batch.packs to {micro_packs * ranks}, raise "
                        f"batch.micro_packs to {-(-packs_per_step // ranks)}, or start more processes")


def copies(ranks: int, *, shard: int, replicate: int) -> int:
    """Copies of the model: `replicate`, and where that is 0 as many as shards of `shard` ranks leave room for."""
    return replicate or max(ranks // (shard or ranks), 1)


def start(*, shard: int = 0, replicate: int = 1, timeout: float = 1800.0) -> World:
    """Join the process group that torchrun prepared, or form one of a single process. `timeout` is that of a step, in
    seconds. Raises UserError where there are more processes than GPUs."""
    rank, ranks = launched_rank()
    device, patience = _device(), timedelta(seconds=timeout) + PATIENCE
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = next(dist.rendezvous("env://", timeout=patience))[0] if "RANK" in os.environ else dist.HashStore()
    store = _fresh(store, rank, ranks)
    dist.init_process_group(backend, rank=rank, world_size=ranks, store=store, timeout=patience)
    replicate = copies(ranks, shard=shard, replicate=replicate)
    mesh = init_device_mesh(device.type, (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))
    return World(rank, ranks, device, mesh if replicate > 1 else mesh["shard"], store)


def _device() -> torch.device:
    """This process's own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there = torch.cuda.device_count()
    if processes > there:
        raise UserError(f"{processes} processes on a host with {there} GPU{'s' * (there > 1)}; start one for each "
                        f"(torchrun --nproc-per-node {there})")
    torch.cuda.set_device(local)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums in fp32, as precision.py has it
    return torch.device("cuda", local)


def make_deterministic() -> None:
    """Have every operation of a GPU give the same bits each time, or raise saying which one cannot.

    Without it the flash kernel's backward pass adds up in whatever order its blocks finish (Dao 2023), the compiler
    chooses among kernels by timing them, and collectives choose how to add. Call it before CUDA is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing is read before it is written
    from torch._inductor import config  # imported late: it takes a second

    config.deterministic = True


def _fresh(store: dist.Store, rank: int, ranks: int) -> dist.Store:
    """A name space of `store` that belongs to these very processes.

    torchrun's store outlives the processes that it restarts. Without this, a restarted rank may read the address of one
    that is dead, and wait for it. So each rank leaves a name that nobody had before, and rank 0 answers every name with
    its own until all have heard it.
    """
    name = uuid.uuid4().hex
    store.set(f"rank {rank}", name)
    if rank:
        name = store.get(f"answer to {name}").decode()
        store.add(f"{name} heard", 1)
    else:
        while store.add(f"{name} heard", 0) < ranks - 1:
            for other in filter(lambda other: store.check([f"rank {other}"]), range(1, ranks)):
                store.set(f"answer to {store.get(f'rank {other}').decode()}", name)
            time.sleep(0.02)
    return dist.PrefixStore(name, store)


def stop(*, failed: bool = False) -> None:
    """Leave the process group; after a failure not NCCL's, whose farewell waits for collectives that others have begun
    and this rank never joins. There the end of the process does it."""
    if dist.is_initialized() and not (failed and dist.get_world_size() > 1 and torch.cuda.is_available()):
        dist.destroy_process_group()


def is_on(setting: str, auto: bool) -> bool:
    """The meaning of "true", "false" or "auto"."""
    return auto if setting == "auto" else setting == "true"


def build_model(config: LlamaConfig, world: World, *, precision: str = "bf16", recompute: str = "none",
                parameters: torch.dtype = torch.float32, compiled: bool = False, reshard: str = "auto",
                prefetch: int = 0, offload: str = "none", adapters: LoRA | None = None) -> Llama:
    """A sharded network whose parameters are allocated but not yet filled (`weights.load`, `.initialize`; `lora.load`
    where it has `adapters`, whose precision then is that of `parameters`).

    `reshard` says whether a layer's gathered parameters are freed after its forward pass, to be gathered again for
    the backward pass; "auto" frees all but those of the whole model, which the backward pass begins with.
    """
    dtype = DTYPES[precision]
    on_host = offload == "parameters"
    with torch.device("meta"):
        model = Llama(config, recompute=recompute, dtype=dtype)
        if adapters:
            lora.adapt(model, adapters, trained=parameters)
    if parameters != torch.float32 and not adapters:
        model.to(parameters)
    if compiled:
        compile_blocks(model)
    if world.ranks == 1 and not on_host:  # nothing to gather: the layers convert the weights as they use them
        return model.to_empty(device=world.device)
    # Activations are cast by the layers themselves; casting inputs would also round the rotary angles to bf16.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offloading = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if on_host else OffloadPolicy()
    shard = partial(fully_shard, mesh=world.mesh, mp_policy=policy, offload_policy=offloading,
                    reshard_after_forward=None if reshard == "auto" else reshard == "true")
    for block in model.model.layers:
        shard(block)
    if not config.tie_word_embeddings:
        for matrix in (model.model.embed_tokens, model.lm_head):  # their gradients are made without their values
            shard(matrix).set_unshard_in_backward(False)
    shard(model)
    if prefetch:
        gather_ahead(model, prefetch)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums: the loss is already divided by the whole step's tokens
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model.to_empty(device="cpu" if on_host else world.device)


def sharded(model: Llama) -> Llama:
    """`model` with its parameters as they are kept: a pass without a backward one may leave gathered bf16 copies."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def compile_blocks(model: Llama) -> None:
    """Compile what each block computes, but not FSDP's work around it, which happens when the block is called.

    All blocks share one graph. It is for one number of tokens (data/batches.py pads), and for any documents: their
    number and the length of the longest stay open, or each new pack would be compiled anew. `fullgraph` makes whatever
    cannot be compiled an error: a break, or one compilation too many, would otherwise only be slow.
    """
    torch.compiler.config.dynamic_sources = ",".join(f"L['documents'].{name}" for name in
                                                     ("offsets", "cu_seqlens", "longest"))
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True)


def gather_ahead(model: Llama, number: int) -> None:
    """Gather the parameters of `number` modules while the one before them computes, in both passes.

    By itself FSDP gathers when a module's turn comes in the forward pass, and one ahead in the backward pass. More
    costs their memory, and pays where a gather takes longer than a layer. With recomputation, measure: a published
    run with forward prefetch and recomputation together had half the throughput.
    """
    first, blocks, last = model.model.embed_tokens, list(model.model.layers), getattr(model, "lm_head", None)
    passes = ((FSDPModule.set_modules_to_forward_prefetch, [model, first, *blocks, last]),
              (FSDPModule.set_modules_to_backward_prefetch, [model, *reversed(blocks)]))  # the others are not gathered
    for set_next, order in passes:
        sharded = [module for module in order if isinstance(module, FSDPModule)]  # a tied matrix goes with `model`
        for i, module in enumerate(sharded):
            set_next(module, sharded[i + 1 : i + 1 + number])


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all ranks, in place."""
    dist.all_reduce(value)
    return value
