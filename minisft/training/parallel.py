"""Many processes, one model: fully sharded data parallelism (Zhao et al. 2023, "PyTorch FSDP"; Rajbhandari et al.
2020, "ZeRO", stage 3).

Each rank keeps 1/N of every parameter in fp32, with its gradient and its two moments. Before a block computes, its
parameters are gathered in bf16; after its backward pass, its gradients are summed over the ranks and each keeps its
part. A lone process keeps plain fp32 parameters.

    data parallel over all ranks          parallel.replicate = 2 (HSDP), 8 ranks
    shard  [0 1 2 3 4 5 6 7]              shard [0 1 2 3], copy on [4 5 6 7]

Ranks that share a stream (parallel.context) shard and sum as all others do: each adds the gradients of its own tokens.
"""

import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from minisft.config import Config, ParallelConfig
from minisft.errors import UserError
from minisft.model.llama import DTYPES, Llama
from minisft.model.llama_config import LlamaConfig

PATIENCE = timedelta(minutes=5)  # after parallel.timeout, when every rank has printed where it hangs


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    ranks: int
    device: torch.device
    mesh: DeviceMesh
    store: dist.Store  # shared with the other ranks; outlives those that die
    context: int = 1  # consecutive ranks that share a stream (context.py)

    @property
    def is_main(self) -> bool:
        """Rank 0 writes and prints."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """The number of parts that a parameter is divided into."""
        return self.mesh["shard"].size()

    def report_failure(self, code: int, text: str) -> dict[str, Any]:
        """Tell the others why this rank fails; returns {rank, code, text} of the rank that failed first.

        When one rank fails, the others fail in its wake. Only the first has something to say.
        """
        mine = json.dumps({"rank": self.rank, "code": code, "text": text})
        return json.loads(self.store.compare_set("first failure", "", mine))

    def heard_failure(self) -> dict[str, Any] | None:
        """The first failure that any rank reported, or None."""
        return json.loads(self.store.get("first failure")) if self.store.check(["first failure"]) else None


def launched_rank() -> tuple[int, int]:
    """Rank and number of ranks as torchrun set them; (0, 1) without it. Needs no process group."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def replicas(ranks: int, parallel: ParallelConfig) -> int:
    """The number of copies of the model: `replicate`, or if that is 0 as many as fit when `shard` ranks hold one."""
    return parallel.replicate or max(ranks // (parallel.shard or ranks), 1)


def start(parallel: ParallelConfig = ParallelConfig()) -> World:
    """Join the process group that torchrun prepared, or form one of a single process. Raises UserError if there are
    more processes than GPUs."""
    rank, ranks = launched_rank()
    device, patience = _device(), timedelta(seconds=parallel.timeout) + PATIENCE
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = next(dist.rendezvous("env://", timeout=patience))[0] if "RANK" in os.environ else dist.HashStore()
    store = _fresh(store, rank, ranks)
    dist.init_process_group(backend, rank=rank, world_size=ranks, store=store, timeout=patience)
    replicate = replicas(ranks, parallel)
    mesh = init_device_mesh(device.type, (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))
    return World(rank, ranks, device, mesh if replicate > 1 else mesh["shard"], store, parallel.context)


def _device() -> torch.device:
    """This process's own device."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"{processes} processes on a host with {gpus} GPU{'s' * (gpus > 1)}; start one for each "
                        f"(torchrun --nproc-per-node {gpus})")
    torch.cuda.set_device(local)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # products are summed in fp32
    return torch.device("cuda", local)


def _fresh(store: dist.Store, rank: int, ranks: int) -> dist.Store:
    """A namespace of `store` that belongs to exactly these processes.

    torchrun's store outlives the processes that it restarts, so a restarted rank could read the address of a dead one
    and wait for it. Therefore each rank leaves a name that nobody had before, and rank 0 answers every name with its
    own until all have heard it.
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
    """Leave the process group. After a failure on NCCL, do not: it would wait for collectives that others have begun
    and this rank never joins; the end of the process leaves it."""
    if dist.is_initialized() and not (failed and dist.get_world_size() > 1 and torch.cuda.is_available()):
        dist.destroy_process_group()


def is_compiled(parallel: ParallelConfig, device: torch.device) -> bool:
    """True if the layers are compiled, and packs padded to one shape for that."""
    return device.type == "cuda" if parallel.compile == "auto" else parallel.compile == "true"


def build_model(network: LlamaConfig, world: World, config: Config = Config(), *,
                adapt: Callable[[Llama], None] | None = None) -> Llama:
    """The network as `config` wants it, in this order: recomputation, adapters, compilation, sharding.

    Its parameters are allocated but not filled yet (`weights.load` or `.initialize`). `adapt`, if given, changes
    modules while the network is on the meta device (lora/adapters.py, fp8.py).
    """
    parallel, dtype = config.parallel, DTYPES[config.train.precision]
    on_host = parallel.offload == "parameters"
    with torch.device("meta"):
        model = Llama(network, recompute=parallel.activation_checkpointing, dtype=dtype)
        if config.optim.parameters != "fp32":
            model.to(DTYPES[config.optim.parameters])
        if adapt:
            adapt(model)
    if is_compiled(parallel, world.device):
        compile_blocks(model)
    if world.ranks > 1 or on_host:  # a lone process has nothing to gather: layers convert weights as they use them
        shard(model, world, parallel, dtype)
    return model.to_empty(device="cpu" if on_host else world.device)


def compile_blocks(model: Llama) -> None:
    """Compile what each block computes, but not FSDP's work around it, which happens when the block is called.

    All blocks share one graph, made for one number of tokens (data/batches.py pads) and for any documents: their
    number and the length of the longest stay dynamic, or each new pack would be compiled anew. `fullgraph` turns
    whatever cannot be compiled into an error; a graph break or one recompilation too many would only be slow.
    """
    torch.compiler.config.dynamic_sources = ",".join(f"L['documents'].{name}" for name in
                                                     ("offsets", "cu_seqlens", "longest"))
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True)


def shard(model: Llama, world: World, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    """Shard each block, the vocabulary matrices and the rest with FSDP2, gathered in `dtype`, gradients summed in fp32.

    `parallel.reshard` says if a layer's gathered parameters are freed after its forward pass, to be gathered again for
    the backward pass; "auto" frees all but the outermost ones, which the backward pass needs first.
    """
    # Layers cast activations themselves; casting inputs would also round the rotary angles to bf16.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = (CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if parallel.offload == "parameters"
               else OffloadPolicy())
    fully = partial(fully_shard, mesh=world.mesh, mp_policy=policy, offload_policy=offload,
                    reshard_after_forward=None if parallel.reshard == "auto" else parallel.reshard == "true")
    for block in model.model.layers:
        fully(block)
    if not model.config.tie_word_embeddings:
        for matrix in (model.model.embed_tokens, model.lm_head):  # their backward passes do not read them
            fully(matrix).set_unshard_in_backward(False)
    fully(model)
    if parallel.prefetch:
        gather_ahead(model, parallel.prefetch)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums: the loss is already divided by the whole step's tokens
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def gather_ahead(model: Llama, number: int) -> None:
    """Gather the parameters of `number` modules while the one before them computes, in both passes.

    By default FSDP gathers when a module's turn comes in the forward pass, and one ahead in the backward pass. More
    costs their memory, and pays if a gather takes longer than a layer: measure.
    """
    first, blocks, last = model.model.embed_tokens, list(model.model.layers), getattr(model, "lm_head", None)
    passes = ((FSDPModule.set_modules_to_forward_prefetch, [model, first, *blocks, last]),
              (FSDPModule.set_modules_to_backward_prefetch, [model, *reversed(blocks)]))  # the others are not gathered
    for set_next, order in passes:
        sharded = [module for module in order if isinstance(module, FSDPModule)]  # a tied matrix goes with `model`
        for i, module in enumerate(sharded):
            set_next(module, sharded[i + 1 : i + 1 + number])


def reshard(model: nn.Module) -> None:
    """Free gathered bf16 copies of parameters, which a forward pass alone may leave."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place."""
    dist.all_reduce(value)
    return value
