"""What ranks send each other is what the theory of sharded data parallelism says, to the byte.

Rank 0 of 8 runs the real loop in this process. Torch's fake process group answers every collective at once, so what
arrives is nonsense, but sizes and dtypes are those of a real run, and they are counted where they pass.
"""

from collections import Counter
from math import prod

import pytest
import torch
import torch.distributed as dist
from small_runs import HERE, options
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from minisft import config_io
from minisft.model.llama import Llama
from minisft.model.llama_config import LlamaConfig
from minisft.prepare import prepare
from minisft.runs import lifecycle, resume
from minisft.runs.assemble import Base, Run
from minisft.runs.lifecycle import run_steps
from minisft.runs.preemption import Preemption
from minisft.training import parallel
from minisft.training.optimizer import AdamW

RANKS, STEPS, MICRO_STEPS = 8, 2, 2
# No size is a multiple of 8 but the width: the rows of every matrix are padded.
SIZES = {"vocab_size": 321, "hidden_size": 72, "intermediate_size": 161, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12}


class Bytes(TorchDispatchMode):
    """Counts the bytes of each collective: of the whole tensor that all ranks have parts of, or add up."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if torch.is_tensor(t)]
            name = function._schema.name.split("::")[1].strip("_")
            self.counted[name, tensors[0].dtype] += max(t.nbytes for t in tensors)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def ranks(request):
    """A world of 8 ranks, `request.param` of them to a shard."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (RANKS // request.param, request.param), mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if request.param == RANKS else mesh
    yield parallel.World(0, RANKS, torch.device("cpu"), mesh, dist.HashStore())
    dist.destroy_process_group()


def theory(config, shards, precision, *, reshard):
    """(kind, dtype) -> bytes of a step, from the shapes of the parameters alone.

    Sharding is by rows, each rank has as many, and what is missing in the last is sent as well.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    numbers = {name: -(-rows // shards) * shards * prod(rest) for name, (rows, *rest) in shapes.items()}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # The blocks are freed after the forward pass and gathered again for the backward pass, which needs neither the
    # embedding nor an untied head; all else stays in between.
    again = {name: reshard and ".layers." in name for name in numbers}
    gathered = sum(number * (1 + again[name]) for name, number in numbers.items()) * MICRO_STEPS
    expected = Counter({("allgather_base", dtype): gathered * dtype.itemsize})
    expected["reduce_scatter_base", torch.float32] = sum(numbers.values()) * 4 * MICRO_STEPS
    if shards < RANKS:  # the copies' parts are added up
        expected["allreduce", torch.float32] += sum(numbers.values()) // shards * 4 * MICRO_STEPS
    expected["allreduce", torch.float32] += 4 + 4  # the gradient's norm; the loss
    expected["allreduce", torch.float32] += 4 * (STEPS - 1) / STEPS  # the wish to stop, between two steps
    return expected


@pytest.mark.parametrize("ranks", [RANKS, 4], indirect=True)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reshard", [True, False])
def test_bytes_of_a_step(base, tmp_path, monkeypatch, ranks, precision, tied, reshard):
    data = tmp_path / "data.jsonl"
    data.write_bytes(8 * (HERE / "oracles" / "conversations.jsonl").read_bytes())  # enough for all to have work
    settings = config_io.load(options(base, tmp_path, train__max_steps=STEPS, batch__packs=RANKS * MICRO_STEPS,
                                          data__train=data, checkpoint__every=0, train__precision=precision))
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    prepared, config = prepare(settings, quiet=True), LlamaConfig(**SIZES, tie_word_embeddings=tied)
    model = parallel.build_model(config, ranks, settings)
    if not reshard:
        model.set_reshard_after_forward(False)
    optimizer, preemption = AdamW(model, mesh=ranks.mesh), Preemption()
    (tmp_path / "run").mkdir()
    # The main rank would wait for the others' parts.
    monkeypatch.setattr(lifecycle, "save", lambda *args, **kwargs: None)
    monkeypatch.setattr(resume, "from_main", lambda value, world: value)  # once, before the first step
    try:
        with Bytes() as sent:
            complete = run_steps(Run(settings, prepared, ranks, Base(config, None, {}), model, optimizer), preemption)
    finally:
        preemption.close()
    assert complete
    per_step = {kind: count / STEPS for kind, count in sent.counted.items()}
    assert per_step == theory(config, ranks.shards, precision, reshard=reshard)
