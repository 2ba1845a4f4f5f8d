"""How the supported versions of torch differ, in one place: from 2.11 on, without an upper limit.

The whole suite runs on each version in `TESTED` (benchmarks/versions.sh). A feature that a version lacks is either not
needed there or rejected with the reason; nothing is silently different.
"""

import warnings

import torch

TESTED = ("2.11", "2.13", "2.14")

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

# 2.11's FSDP2 cannot shard byte tensors such as packed NF4 weights (runs/assemble.py rejects them).
SHARDS_BYTES = VERSION >= (2, 13)


def warn_if_untested() -> None:
    """Warn if torch is newer than the newest tested version."""
    newest = tuple(map(int, TESTED[-1].split(".")))
    if newest < VERSION:
        warnings.warn(f"torch {torch.__version__} is newer than {TESTED[-1]}, the newest that minisft was tested with; "
                      f"if something looks wrong, try pip install 'torch=={TESTED[-1]}.*'", stacklevel=2)
