"""Models in folders: Hugging Face's, Meta's, and adapters in PEFT's format beside a base model."""

from pathlib import Path

import torch

from minisft.errors import UserError
from minisft.lora.peft import PeftFolder, is_adapter
from minisft.meta import MetaFolder
from minisft.model import weights
from minisft.model.llama import Llama


def from_pretrained(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                    format: str = "hf", base: str | Path | None = None) -> Llama:
    """The model in folder `path`: Hugging Face's (`format="hf"`) or Meta's `consolidated.*.pth` (`"meta"`).

    If `path` holds an adapter in PEFT's format, it is merged into its base model. The base is in folder `base`, or else
    where the adapter says, in `format`. Raises UserError for files that are missing, broken or do not belong together,
    ValueError for another `format`.
    """
    if format not in ("hf", "meta"):
        raise ValueError(f"format is {format!r}; it is \"hf\" or \"meta\"")
    adapter = PeftFolder(path) if is_adapter(path) else None
    if adapter:
        path = adapter.base_folder(base)
    source = MetaFolder(path) if format == "meta" else weights.SafetensorsFolder(path)
    with torch.device("meta"):
        model = Llama(source.config).to(dtype)
    weights.check(model, source)
    if torch.device(device).type == "cpu":
        weights.check_memory(model)
    model.to_empty(device=device)
    weights.load(model, source)
    if adapter:
        adapter.merge_into(model)
    return model.eval()


def save_pretrained(model: Llama, path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `config.json` and safetensors into the folder `path`. Raises UserError if it holds a model already."""
    if Path(path).exists() and any(Path(path).glob("model*.safetensors*")):
        raise UserError(f"{path}: holds a model already; choose another folder")
    weights.save(model, model.config, path, dtype=dtype)
