"""One file for each exhibit, in the order of the matrix.

An exhibit has a docstring (its title, then what happens and where it was reported), FAULT (what the plain loop must
have planted so that the exhibit says wrong), UNIT (of the verdict's size) and `look(trainer, world) -> Verdict`.
WARNING, if there is one, is what a message of the trainer's must match to count as a warning of this fault.
"""

from importlib import import_module
from types import ModuleType

NAMES = (
    # which tokens are trained
    "mask", "header", "first_token", "stop", "multi_turn", "turn_weight", "double_bos", "special_in_content",
    "boundary", "columns", "duplicate_keys", "truncation",
    # what a step computes
    "shift", "all_masked", "leak", "positions", "accumulation", "ranks", "last_step", "pad_eos", "last_batch",
    "held_out_batches", "held_out_packing",
    # what is kept
    "bf16_masters", "decay_norms", "resume_data", "resume_optimizer", "export_template", "export_head",
    "own_head",
)


def open_exhibit(name: str) -> ModuleType:
    """The module of an exhibit."""
    return import_module(f"silent.exhibits.{name}")


def title(exhibit: ModuleType) -> str:
    """The first line of its story."""
    return (exhibit.__doc__ or "").strip().split("\n")[0].rstrip(".")
