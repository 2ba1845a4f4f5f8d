"""The trained model as a Hugging Face folder that other programs load and serve, or its adapter as one that PEFT loads.

    config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
    training.json  README.md

transformers, vLLM and llama.cpp's converter read the weights, the tokenizer, the chat template (Jinja text, in
tokenizer_config.json) and the tokens that end generation; people read where it all came from. The folder appears in one
rename, so one that exists is complete.

We do not trust the base's files. From its tokenizer_config.json we copy the names of tokens and sizes, but nothing that
names code, and no class: PreTrainedTokenizerFast reads tokenizer.json as it is, in transformers 4 and 5 alike.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minisft.config import LoraConfig
from minisft.data.chat import Renderer
from minisft.errors import UserError, printable
from minisft.export.provenance import FILE, Record, model_card, model_name
from minisft.files import sync
from minisft.formats.jinja import written
from minisft.lora import adapters
from minisft.model import weights
from minisft.model.llama import Llama
from minisft.model.llama_config import LlamaConfig

COPIED = re.compile(r"(bos|eos|unk|sep|pad|cls|mask)_token|(additional|extra)_special_tokens|add_(bos|eos)_token|"
                    r"added_tokens_decoder|model_max_length|model_input_names|(padding|truncation)_side|"
                    r"clean_up_tokenization_spaces")


def export(model: Llama, renderer: Renderer, folder: Path, *, dtype: torch.dtype, record: Record | None,
           tell: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Write `folder`. All ranks call it; the main one writes, and passes the `record` of where the model came from.
    `tell` is called before each tensor with how many are done, and of how many."""
    with atomic_dir(folder, is_main=record is not None) as partial:
        weights.save(model, model.config, partial, dtype=dtype, tell=tell)
        if record is not None:
            _write(partial, _tokenizer_files(renderer, model.config) | _provenance_files(folder, record))


def export_adapter(model: Llama, settings: LoraConfig, renderer: Renderer, folder: Path, *, base: str,
                   is_main: bool) -> None:
    """Write `folder`, an adapter of the model in folder `base`. All ranks call it; the main one writes.

    With the base it is the model of `export` in a hundredth of the bytes, except for a base in NF4: `export` merges the
    adapter into the dequantised base, beside which it was trained; loading it onto the base in bf16 differs slightly.
    """
    tensors = dict(adapters.tensors(model))
    with atomic_dir(folder, is_main=is_main) as partial:
        if is_main:
            weights.write(tensors, partial / "adapter_model.safetensors")
            described = _as_json(adapters.settings(settings, model.config, base=base))
            _write(partial, {"adapter_config.json": described, **_tokenizer_files(renderer, model.config)})


def try_export(config: LlamaConfig, renderer: Renderer, folder: Path, *, record: Record) -> None:
    """Find out before training if `export` can write `folder`: make everything except the weights, and discard it.

    Raises UserError if it cannot. `record` is the run's at its start; figures added later are the run's own.
    """
    try:
        _tokenizer_files(renderer, config), _provenance_files(folder, record)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{folder}: could not be written at the end ({type(error).__name__}: {printable(error, 200)}) "
                        "because of something in the base model's config.json, tokenizer_config.json or training.json; "
                        "repair or remove it") from None
    for path in (folder, _partial(folder)):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UserError(f"{path}: is where the trained model will be written; move it elsewhere")


@contextmanager
def atomic_dir(folder: Path, *, is_main: bool) -> Iterator[Path]:
    """A folder to write into; the main rank then syncs it to disk and renames it to `folder`."""
    partial = _partial(folder)
    if is_main:
        if folder.exists() and not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise OSError(f"{folder}: holds something other than a model; move it elsewhere and run the same command "
                          "again")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    yield partial
    if is_main:
        for file in partial.iterdir():
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)  # of steps that are repeated, or of a run that has become longer
        os.rename(partial, folder)
    dist.barrier()  # no rank reads a folder that is not there yet


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def _tokenizer_files(renderer: Renderer, config: LlamaConfig) -> dict[str, bytes]:
    """The files beside the weights, by name: the tokenizer, the chat template, the tokens that end generation."""
    copied = {key: value for key, value in renderer.tokenizer.settings.items() if COPIED.fullmatch(key)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **copied,
                "chat_template": written(renderer.template, renderer.fill)}
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": sorted(renderer.stop_ids())}
    return {"tokenizer.json": renderer.tokenizer.content, "tokenizer_config.json": _as_json(settings),
            "generation_config.json": _as_json(generation)}


def _provenance_files(folder: Path, record: Record) -> dict[str, bytes]:
    """The files that say where the model in `folder` came from, by name."""
    return {FILE: _as_json(record), "README.md": model_card(model_name(folder), record).encode()}


def _as_json(content: dict[str, Any]) -> bytes:
    """`content` as a JSON file. Half of a surrogate pair, which JSON allows and UTF-8 does not, stays escaped."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
