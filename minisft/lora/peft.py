"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The names of the tensors tell which matrices are adapted; the settings say the rest. PEFT has many variants of LoRA that
mean another sum of the same tensors, or another base, so any setting that is unknown and not off is refused. No pickle
(`adapter_model.bin`) is read.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minisft.config import LoraConfig
from minisft.errors import UserError, printable
from minisft.files import read_small
from minisft.lora.targets import adapted, scale
from minisft.model.llama import Llama
from minisft.model.llama_config import MATRICES, LlamaConfig
from minisft.model.weights import finite

PREFIX = "base_model.model."
PARTS = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
# Settings that do not change the meaning of the tensors, or that are read below.
UNDERSTOOD = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights", "target_modules",
              "base_model_name_or_path", "lora_dropout", "inference_mode", "task_type", "auto_mapping", "peft_version",
              "revision", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "loftq_config",
              "megatron_core", "qalora_group_size", "runtime_config"}
PLAIN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base
MERGE = "merge it with peft (merge_and_unload) and use the merged model"


def is_adapter(path: str | Path) -> bool:
    """True for a folder that holds an adapter and no model."""
    return (Path(path) / "adapter_config.json").is_file() and not any(Path(path).glob("model*.safetensors*"))


def settings(lora: LoraConfig, config: LlamaConfig, *, base: str) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    targets, has_adapter = [], adapted(lora, config)
    for leaf in MATRICES:
        names = [name for name in has_adapter if name.endswith(f".{leaf}")]
        targets += [leaf] if len(names) == config.num_hidden_layers else names  # short if it means the same
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
            "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora, "use_dora": lora.dora,
            "target_modules": targets, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "inference_mode": True}


class PeftFolder:
    """An adapter that PEFT or minisft saved. Raises UserError for one that is broken or has another meaning."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "adapter_config.json"
        try:
            found = json.loads(read_small(file))
            self.rank, self.alpha = int(found["r"]), float(found["lora_alpha"])
            self.base = Path(str(found["base_model_name_or_path"]))
            rslora, self.dora = bool(found.get("use_rslora")), bool(found.get("use_dora"))
            self.scale = scale(LoraConfig(self.rank, self.alpha, rslora=rslora))
            if not abs(self.scale) < 1e30:  # also false for NaN
                raise ValueError(f"lora_alpha is {self.alpha}")
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{file}: not the settings of an adapter ({type(error).__name__}: "
                            f"{printable(error, 200)})") from None
        strange = {name: value for name, value in found.items() if value and name not in UNDERSTOOD}
        strange |= {name: found[name] for name, good in (("peft_type", ("LORA",)), ("bias", ("none",)),
                                                         ("init_lora_weights", PLAIN_BEGINNINGS))
                    if found.get(name, good[0]) not in good}
        if strange:
            named = ", ".join(f"{printable(k)} is {printable(repr(v))}" for k, v in [*strange.items()][:5])
            raise UserError(f"{file}: {named}, which is not understood; {MERGE}")
        self.tensors = self._read()

    def base_folder(self, given: str | Path | None = None) -> Path:
        """The folder of the base model: `given`, or else where the adapter says. Raises UserError if it is none."""
        folder = Path(given or self.base)
        if not folder.is_dir():
            raise UserError(f"{self.path}: its base model {printable(repr(str(folder)))} is not a folder here; "
                            f"download it, then `minisft convert {self.path} TARGET --merge --base FOLDER` makes one "
                            "model of both")
        return folder

    def _read(self) -> dict[str, dict[str, Tensor]]:
        """Name of a matrix -> its parts."""
        file = self.path / "adapter_model.safetensors"
        found: dict[str, dict[str, Tensor]] = {}
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({printable(error, 200)})") from None
        for key, tensor in tensors.items():
            part = next((part for part, ending in PARTS.items() if key.endswith(ending)), None)
            if part is None or not key.startswith(PREFIX):
                raise UserError(f"{file}: {printable(key)} is no part of a linear matrix's adapter; {MERGE}")
            name = key.removeprefix(PREFIX).removesuffix(PARTS[part])
            found.setdefault(name, {})[part] = finite(tensor.float(), key, file)
        return found

    @torch.no_grad()
    def merge_into(self, model: Llama) -> None:
        """Add the adapter to the matrices of `model`. Raises UserError if it belongs to another model."""
        shapes = model.config.matrices()
        for name, parts in self.tensors.items():
            if name not in shapes:
                raise UserError(f"{self.path}: the adapter of {printable(name)} is not of a matrix in a layer; {MERGE}")
            rows, columns = shapes[name]
            wanted: dict[str, tuple[int, ...]] = {"lora_A": (self.rank, columns), "lora_B": (rows, self.rank)}
            wanted |= {"magnitude": (rows,)} if self.dora else {}
            if {part: tuple(tensor.shape) for part, tensor in parts.items()} != wanted:
                raise UserError(f"{self.path}: the adapter of {name} does not fit the base model: it has "
                                f"{ {part: list(tensor.shape) for part, tensor in parts.items()} }, "
                                f"and {({p: list(s) for p, s in wanted.items()})} is needed")
            weight = model.get_parameter(f"{name}.weight")
            parts = {part: tensor.to(weight.device) for part, tensor in parts.items()}
            merged = torch.addmm(weight.float(), parts["lora_B"], parts["lora_A"], alpha=self.scale)
            if self.dora:
                merged *= (parts["magnitude"] / merged.norm(dim=1))[:, None]
            weight.copy_(finite(merged, f"with its adapter {name}", self.path))
