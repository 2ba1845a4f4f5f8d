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
    partial = folder.with_name(folder.name + ".tmp")
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # of steps that are taken again after a resume
    weights.save(model, config, partial, dtype=dtype)
    if leads:
        _write_companions(partial, config, renderer)
        if record:
            _write_json(partial / FILE, record)
            (partial / "README.md").write_text(model_card(model_name(folder), record), encoding="utf-8")
        for file in partial.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.rename(partial, folder)
    dist.barrier()  # no rank goes on to read a folder that is not there yet


def _write_companions(partial: Path, config: LlamaConfig, renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    shutil.copyfile(tokenizer.file, partial / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.settings, "chat_template": renderer.jinja()}
    _write_json(partial / "tokenizer_config.json", settings)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": sorted(renderer.stop_ids())}
    _write_json(partial / "generation_config.json", generation)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
