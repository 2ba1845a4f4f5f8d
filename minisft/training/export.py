"""The trained model as a Hugging Face folder that other programs load and serve.

    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
    training.json  README.md

transformers, vLLM and llama.cpp's converter read the weights, the tokenizer, the chat template (Jinja text, in
tokenizer_config.json) and the tokens at which generation ends; people read where it all came from. The folder appears
in one rename, so one that exists is complete.

The base's files are somebody else's. Of its tokenizer_config.json goes along what names tokens and sizes; nothing that
names code, and no class: PreTrainedTokenizerFast reads tokenizer.json as it stands, in transformers 4 and 5 alike.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minisft.data.chat import Renderer
from minisft.data.jinja import written
from minisft.errors import UserError, printable
from minisft.model import weights
from minisft.model.llama_config import LlamaConfig
from minisft.training.card import model_card
from minisft.training.provenance import FILE, model_name

SETTINGS = re.compile(r"(bos|eos|unk|sep|pad|cls|mask)_token|(additional|extra)_special_tokens|add_(bos|eos)_token|"
                      r"added_tokens_decoder|model_max_length|model_input_names|(padding|truncation)_side|"
                      r"clean_up_tokenization_spaces")


def export(model: nn.Module, config: LlamaConfig, renderer: Renderer, folder: Path, *, dtype: torch.dtype,
           leads: bool = True, record: dict[str, Any] | None = None) -> None:
    """Write `folder`. All ranks call it, the leading one writes, and has the `record` of where the model came from."""
    with appearing(folder, leads=leads) as partial:
        weights.save(model, config, partial, dtype=dtype)
        if leads:
            write(partial, companions(renderer, config) | (about(folder, record) if record else {}))


def try_export(config: LlamaConfig, renderer: Renderer, folder: Path, *, record: dict[str, Any]) -> None:
    """Find out before training whether `export` can write `folder`: all but the weights is made, and thrown away.

    Raises UserError. `record` is what can be said at the start; figures that come to it later are the run's own.
    """
    try:
        companions(renderer, config), about(folder, record)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{folder}: could not be written at the end ({type(error).__name__}: {printable(error, 200)}), "
                        "for something that the base model's config.json, tokenizer_config.json or training.json has; "
                        "repair or remove that") from None
    for path in (folder, _partial(folder)):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UserError(f"{path}: is in the way of the trained model, which is written there; move it elsewhere")


@contextmanager
def appearing(folder: Path, *, leads: bool) -> Iterator[Path]:
    """A folder to write into, which the leading rank then makes durable and renames to `folder`."""
    partial = _partial(folder)
    if leads:
        if folder.exists() and not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise OSError(f"{folder}: holds something else than a model; move it elsewhere and start the same command "
                          "again")
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


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def companions(renderer: Renderer, config: LlamaConfig) -> dict[str, bytes]:
    """Name and content of the files beside the weights: the tokenizer, the chat template, where generation ends."""
    tokenizer = renderer.tokenizer
    kept = {key: value for key, value in tokenizer.settings.items() if SETTINGS.fullmatch(key)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **kept,
                "chat_template": written(renderer.template, renderer.fill)}
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": sorted(renderer.stop_ids())}
    return {"tokenizer.json": tokenizer.content, "tokenizer_config.json": as_json(settings),
            "generation_config.json": as_json(generation)}


def about(folder: Path, record: dict[str, Any]) -> dict[str, bytes]:
    """Name and content of the files that tell where the model in `folder` came from."""
    return {FILE: as_json(record), "README.md": model_card(model_name(folder), record).encode()}


def as_json(content: dict[str, Any]) -> bytes:
    """`content` as a JSON file. Half of a surrogate pair, which JSON may hold and UTF-8 may not, stays escaped."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Each of `files` into `folder`."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
