"""Where the time of a step goes: `train.py RECIPE --profile` puts a trace and a table into the run folder.

    profile/trace.json.gz  everything that ran, for ui.perfetto.dev or chrome://tracing
    profile/table.txt      the share of the time by kind of work, and the operations behind it

The main rank records three steps after two that warm up. On a GPU, the time of an operation is that of the kernels it
launched; on a CPU, it is the operation's own on the thread that trains, so shares add up to the step, including waiting
and Python. An operation is counted without those it calls: a matrix product in the loss is a matrix product, and
everything else in the loss is loss. Recording itself costs a few microseconds an operation.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

WARMUP, STEPS, SHOWN = 2, 3, 25

# The first pattern that an operation's own name matches decides its kind. Views and allocations have none.
KINDS = [
    ("matmul", r"aten::(mm|bmm|addmm|addmm_|baddbmm|_scaled_mm|mkldnn_linear)$|gemm|nvjet"),
    ("attention", r"scaled_dot_product|flash_attn|flash_attention|varlen_attn|document_attention"),
    ("communication", r"^c10d::|^gloo:|nccl|^FSDP::"),  # FSDP's own time is spent waiting for the other ranks
    ("optimizer", r"_fused_adamw|_foreach_|linalg_vector_norm|^Optimizer\."),
    ("loader", r"^loader$"),
    ("copies and casts", r"aten::(copy_|_to_copy|cat|stack|clone|fill_|zero_|index|_local_scalar_dense)$|Mem(cpy|set)"),
    ("element-wise, norm, rope", r"aten::(?!(view|t|transpose|as_strided|slice|detach|empty|empty_like|empty_strided|"
                                 r"to|unsqueeze|expand|reshape|select|split|split_with_sizes|narrow|_unsafe_view|alias|"
                                 r"permute|squeeze|chunk|zeros|zeros_like|unflatten|flatten|linear|matmul)$)|triton"),
]
# Within one of these, every operation except the first three kinds is part of it.
AROUND = [("loss, except products", r"LinearCrossEntropy"), ("optimizer", r"^Optimizer\."),
          ("sharding (FSDP's copies and casts)", r"^FSDP::"), ("loader", r"^loader$")]
OTHER = "Python, dispatch, waiting"
Item = TypeVar("Item")


def profiled(steps: Iterable[Item], folder: Path | None) -> Iterator[Item]:
    """The same steps. With a `folder`, a few are recorded, each from the request for it to the request for the next,
    and the files are written as soon as they are over or the loop is left."""
    steps, done = iter(steps), 0
    if folder:
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        with profile(activities=activities, schedule=schedule(wait=WARMUP - 1, warmup=1, active=STEPS, repeat=1),
                     on_trace_ready=lambda profiler: _write(profiler, folder, done - WARMUP)) as profiler:
            for step in islice(steps, WARMUP + STEPS):
                yield step
                done += 1
                profiler.step()
    yield from steps


def _write(profiler: profile, folder: Path, steps: int) -> None:
    if steps < 1:
        tqdm.write(f"{folder}: not written, because the run ended before step {WARMUP + 1}, the first recorded")
        return
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    (folder / "table.txt").write_text(table(profiler.events(), steps), encoding="utf-8")
    tqdm.write(f"{folder}: trace.json.gz and table.txt show where the time goes")


def _kind(event: FunctionEvent) -> str:
    """The kind of work that an operation is, by its name and by what it is part of."""
    own = next((kind for kind, pattern in KINDS if re.search(pattern, event.name)), OTHER)
    part: FunctionEvent | None = event
    while part:
        if "document_attention" in part.name:  # made of products, on devices that have no kernel for it
            return "attention"
        if own not in ("matmul", "attention", "communication"):
            own = next((kind for kind, pattern in AROUND if re.search(pattern, part.name)), own)
        part = part.cpu_parent
    return own


def table(events: Iterable[FunctionEvent], steps: int) -> str:
    """Shares of the time of so many steps by kind, then by operation."""
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]  # kernels are in these
    on_device = any(event.self_device_time_total for event in events)
    thread = next(event.thread for event in events if event.name.startswith("ProfilerStep"))
    kinds: Counter[str] = Counter()
    operations: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for event in events:
        if on_device or event.thread == thread:
            spent = round(1000 * (event.self_device_time_total if on_device else event.self_cpu_time_total))  # ns
            operation = _kind(event), re.sub(r"#.*| \(.*", "", event.name)  # FSDP::pre_forward (model.layers.0)
            kinds[operation[0]] += spent
            operations[operation] += spent
            calls[operation] += 1
    total = kinds.total()
    lines = [f"{total / 1e9 / steps:.3f} s a step, of {'kernels' if on_device else 'the thread that trains'}", ""]
    lines += [f"{spent / total:7.1%}  {kind}" for kind, spent in kinds.most_common()]
    lines += ["", "  share  calls a step  operation"]
    lines += [f"{spent / total:7.1%}  {calls[kind, name] / steps:12,.0f}  {name[:60]} ({kind})"
              for (kind, name), spent in operations.most_common(SHOWN)]
    return "\n".join(lines) + "\n"
