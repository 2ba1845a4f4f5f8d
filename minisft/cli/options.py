"""Options that several commands share: numbers, and how to load a model."""

import argparse
import re
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from minisft.errors import printable

if TYPE_CHECKING:
    from minisft.generate.assistant import Assistant

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
MOST = 10**15  # of anything; what is counted in memory or loops has a lower bound of its own
Number = TypeVar("Number", int, float)


def number(kind: Callable[[str], Number], low: float, high: float, what: str) -> Callable[[str], Number]:
    """A type for argparse: text -> a number from `low` to `high`; `what` describes it in the error."""
    def read(text: str) -> Number:
        with suppress(ValueError):
            if low <= (found := kind(text)) <= high:  # false for nan
                return found
        raise argparse.ArgumentTypeError(f"{printable(text)} was given; it must be {what}")

    return read


def _tokens(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,16}(?:\.[0-9]{1,16})?)([KMB]?)", text.upper())
    return round(float(found[1]) * UNITS[found[2]]) if found else -1


positive = number(int, 1, MOST, "a whole number from 1 to 10^15")
whole = number(int, -MOST, MOST, "a whole number")
natural = number(int, 0, MOST, "a whole number from 0 to 10^15")
count = number(_tokens, 1, MOST, "a number from 1, such as 500, 50K, 1.5M or 2B")
share = number(float, 1e-6, 1, "a number above 0, up to 1")
price = number(float, 0, 1e6, "a number of dollars from 0 to a million")


def add_model_options(command: argparse.ArgumentParser, *, max_new_tokens: int,
                      auto: str = "bf16 on a GPU, else fp32") -> None:
    """The options of commands in which a model answers; `auto` describes the default precision."""
    command.add_argument("--template", default="", metavar="NAME", help="chat template (the model folder's)")
    command.add_argument("--templates", default="", metavar="FILE", help="TOML file with your own templates")
    command.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                         help=f"of weights and products; auto: {auto} (auto)")
    command.add_argument("--max-new-tokens", type=positive, default=max_new_tokens, metavar="N",
                         help=f"longest answer, in tokens ({max_new_tokens})")


def precision_of(options: argparse.Namespace, *, bf16_on_cpu: bool = False) -> str:
    """The precision that --precision chooses."""
    import torch  # imported late: `minisft --help` should not wait for it

    is_bf16 = torch.cuda.is_available() or bf16_on_cpu
    return ("bf16" if is_bf16 else "fp32") if options.precision == "auto" else options.precision


def load(path: str, options: argparse.Namespace, *, template: str = "", bf16_on_cpu: bool = False) -> "Assistant":
    """The model in a folder, on the GPU if there is one. `template` is the default of --template."""
    import torch

    from minisft.generate.assistant import Assistant
    from minisft.model.llama import DTYPES

    return Assistant.load(path, template=options.template or template, templates=options.templates,
                          device="cuda" if torch.cuda.is_available() else "cpu",
                          dtype=DTYPES[precision_of(options, bf16_on_cpu=bf16_on_cpu)])
