"""minisft: supervised fine-tuning of Llama-3, from scratch in PyTorch.

The tokens you meant to train on, and only those, at the speed of the hardware, and the same run again after any crash.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisft.errors import NumericsError, UserError
    from minisft.model.llama import Llama
    from minisft.model.llama_config import LlamaConfig
    from minisft.training.loss import linear_cross_entropy, masked_cross_entropy

__version__ = "0.1.0"
__all__ = ["Llama", "LlamaConfig", "NumericsError", "UserError", "linear_cross_entropy", "masked_cross_entropy"]

_HOME = {"Llama": "model.llama", "LlamaConfig": "model.llama_config", "NumericsError": "errors", "UserError": "errors",
         "linear_cross_entropy": "training.loss", "masked_cross_entropy": "training.loss"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `--help` and `prepare` should not wait seconds for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'minisft' has no attribute {name!r}")
    return getattr(import_module(f"minisft.{_HOME[name]}"), name)
