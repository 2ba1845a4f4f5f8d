"""The trained model as a Hugging Face folder that other programs load and serve.

    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
    training.json  README.md

transformers, vLLM and llama.cpp's converter read the weights, the tokenizer, the chat template (Jinja text, in
tokenizer_config.json) and the tokens at which generation ends; people read where it all came from. The folder appears
in one rename, so one that exists is complete.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minisft.data.chat import Renderer
from minisft.model import weights
from minisft.model.config import LlamaConfig
from minisft.training.card import model_card
from minisft.training.provenance import FILE, model_name


def export(model: nn.Module, config: LlamaConfig, renderer: Renderer, folder: Path, *, dtype: torch.dtype,
           leads: bool = True, record: dict[str, Any] | None = None) -> None:
    """Write `folder`. All ranks call it, the leading one writes, and has the `record` of where the model came from."""
    with appearing(folder, leads=leads) as partial:
        weights.save(model, config, partial, dtype=dtype)
        if leads:
            write_companions(partial, renderer, config)
            if record:
                write_json(partial / FILE, record)
                (partial / "README.md").write_text(model_card(model_name(folder), record), encoding="utf-8")


@contextmanager
def appearing(folder: Path, *, leads: bool) -> Iterator[Path]:
    """A folder to write into, which the leading rank then makes durable and renames to `folder`."""
    partial = folder.with_name(folder.name + ".tmp")
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # of steps that are taken again after a resume
        partial.mkdir(parents=True)
    yield partial
    if leads:
        for file in partial.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.rename(partial, folder)
    dist.barrier()  # no rank goes on to read a folder that is not there yet


def write_companions(partial: Path, renderer: Renderer, config: LlamaConfig) -> None:
    """The tokenizer, the chat template as Jinja text, and the tokens at which generation ends."""
    tokenizer = renderer.tokenizer
    shutil.copyfile(tokenizer.file, partial / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.settings, "chat_template": renderer.jinja()}
    write_json(partial / "tokenizer_config.json", settings)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": sorted(renderer.stop_ids())}
    write_json(partial / "generation_config.json", generation)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """`content` as a JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
