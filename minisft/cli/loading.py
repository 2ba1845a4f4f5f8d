"""The model that a command answers with: its folder, device and precision."""

from argparse import Namespace

import torch

from minisft.generate.assistant import Assistant
from minisft.model.llama import DTYPES


def precision_of(options: Namespace, *, bf16_on_cpu: bool = False) -> str:
    """The precision that --precision chooses."""
    is_bf16 = torch.cuda.is_available() or bf16_on_cpu
    return ("bf16" if is_bf16 else "fp32") if options.precision == "auto" else options.precision


def load(path: str, options: Namespace, *, template: str = "", bf16_on_cpu: bool = False) -> Assistant:
    """The model in a folder, on the GPU if there is one. `template` is the default of --template."""
    return Assistant.load(path, template=options.template or template, templates=options.templates,
                          device="cuda" if torch.cuda.is_available() else "cpu",
                          dtype=DTYPES[precision_of(options, bf16_on_cpu=bf16_on_cpu)])
