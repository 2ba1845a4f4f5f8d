"""Models in folders: Hugging Face's, Meta's, and adapters in PEFT's format beside a base model.

Meta's original checkpoints, `params.json` and `consolidated.00.pth`, ..., differ from Hugging Face's in names, in the
rotary layout (pairs of neighbouring rows instead of two halves, so the rows of q and k are permuted once here), and in
how several files share a matrix: like tensor-parallel ranks, along the outputs for most and along the inputs for the
two projections back to the model's width. Layout: Meta's `llama_models/llama3/model.py`. A `.pth` is a pickle: it is
read only on request, memory-mapped, `weights_only=True`.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisft.errors import UserError, printable
from minisft.files import read_small, regular_file
from minisft.lora.adapters import PeftFolder, is_adapter
from minisft.model import weights
from minisft.model.llama import Llama
from minisft.model.llama_config import LlamaConfig, RopeScaling

# Meta's names of modules -> ours; those of a block are in layers.N and model.layers.N.
NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def from_pretrained(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                    format: str = "hf", base: str | Path | None = None) -> Llama:
    """The model in folder `path`: Hugging Face's (`format="hf"`) or Meta's `consolidated.*.pth` (`"meta"`). If `path`
    holds an adapter in PEFT's format, it is merged into its base model. The base is in folder `base`, or else where the
    adapter says, in `format`. Raises UserError for files that are missing, broken or do not belong together, ValueError
    for another `format`."""
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


class MetaFolder:
    """The tensors of a Meta folder under Hugging Face's names. Raises UserError for files that cannot be read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files = sorted(self.path.glob("consolidated.*.pth"))
        if not files:
            raise UserError(f"{self.path}: no consolidated.*.pth; for a Hugging Face folder leave model.format at 'hf'")
        for i, file in enumerate(files):
            if file.name != f"consolidated.{i:02}.pth":
                raise UserError(f"{self.path}: consolidated.{i:02}.pth is missing; download the model again")
        self._parts = [_load(file) for file in files]
        for file, part in zip(files, self._parts, strict=True):
            if {name: t.shape for name, t in part.items()} != {name: t.shape for name, t in self._parts[0].items()}:
                raise UserError(f"{file}: its tensors differ in name or shape from those of {files[0].name}; "
                                "the files are not parts of one model")
        file, embedding, head = self.path / "params.json", "tok_embeddings.weight", "output.weight"
        try:
            params = json.loads(read_small(file))
            tied = all(head not in part or torch.equal(part[head], part[embedding]) for part in self._parts)
            self.config = _config(params, vocab_size=sum(len(part[embedding]) for part in self._parts), tied=tied)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{file}: not Meta's parameters of a Llama-3 ({type(error).__name__}: "
                            f"{printable(error, 200)})") from None
        self._sources = {_hf_name(name): name for name in self._parts[0] if name != "rope.freqs"}
        if self.config.tie_word_embeddings:
            self._sources.pop("lm_head.weight", None)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for ours, theirs in self._sources.items():
            shape = list(self._parts[0][theirs].shape)
            if len(shape) > 1:
                shape[_split_dim(theirs)] *= len(self._parts)
            self.shapes[ours] = tuple(shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in Hugging Face's layout."""
        theirs = self._sources[name]
        is_rotated = theirs.endswith(("attention.wq.weight", "attention.wk.weight"))
        head = self.config.head_dim if is_rotated else 1
        first, last = start // head * head, -(-stop // head) * head  # whole heads
        parts = [part[theirs] for part in self._parts]
        dim, parts = (_split_dim(theirs), parts) if parts[0].dim() > 1 else (0, parts[:1])  # norms are in each
        n = 0 if dim else len(parts[0])  # rows from a part to the next
        rows = torch.cat([part[max(first - i * n, 0) : max(last - i * n, 0)] for i, part in enumerate(parts)], dim)
        if is_rotated:  # rows of a head: [x0 y0 x1 y1 ...] -> [x0 x1 ... y0 y1 ...]
            rows = rows.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)
        return weights.finite(rows[start - first : stop - first], name, self.path)


def _split_dim(name: str) -> int:
    return 1 if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0


def _load(file: Path) -> dict[str, Tensor]:
    regular_file(file)
    try:
        part = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        reason = printable(str(error).partition("\n")[0], 200)
        raise UserError(f"{file}: not a readable checkpoint ({type(error).__name__}: {reason})") from None
    if not isinstance(part, dict) or "tok_embeddings.weight" not in part:
        raise UserError(f"{file}: not a checkpoint of Meta's: it has no tok_embeddings.weight")
    for name, tensor in part.items():
        kind = type(tensor).__name__
        if isinstance(tensor, Tensor):
            kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)
            kind += f" on {tensor.device}" if tensor.device.type != "cpu" else ""
        if kind not in ("torch.float32", "torch.bfloat16", "torch.float16"):
            raise UserError(f"{file}: {printable(name)} is stored as {kind}; quantised weights cannot be fine-tuned")
    # Twice, since the embedding may be there again as the head. More is one number that claims to be a matrix.
    if (size := sum(tensor.nbytes for tensor in part.values())) > 2 * file.stat().st_size:
        raise UserError(f"{file}: its tensors would take {size / 2**30:,.1f} GiB, more than the file has; it is "
                        "damaged, or was made to fill memory: download the model again")
    return part


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
    if match and match[2] in (known := BLOCK_NAMES if match[1] else NAMES):
        return f"model.{match[1]}{known[match[2]]}.weight" if match[1] else f"{known[match[2]]}.weight"
    return name  # unknown: `weights.check` reports it


def _config(params: dict[str, Any], *, vocab_size: int, tied: bool) -> LlamaConfig:
    width, heads = params["dim"], params["n_heads"]
    inner = int((params.get("ffn_dim_multiplier") or 1) * int(2 * (4 * width) / 3))  # three matrices, an MLP has two
    inner = -(-inner // params["multiple_of"]) * params["multiple_of"]
    scaled = params.get("use_scaled_rope", False)
    # params.json does not say with which tokens a text begins and ends; these are Llama-3's.
    bos, eos = (128_000, 128_001) if vocab_size == 128_256 else (None, None)
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=inner, num_hidden_layers=params["n_layers"],
        num_attention_heads=heads, num_key_value_heads=params.get("n_kv_heads") or heads, head_dim=width // heads,
        rope_theta=params["rope_theta"], rms_norm_eps=params["norm_eps"], tie_word_embeddings=tied,
        max_position_embeddings=131_072 if scaled else 8192, bos_token_id=bos, eos_token_id=eos,
        # params.json says only that the rotary embeddings are scaled: by 32 in 3.2's text models, the only tied ones,
        # and by 8 in all others. (Meta's own code has 8 for all, an error: meta-llama/llama-models#166, #241.)
        rope_scaling=RopeScaling(params.get("rope_scaling_factor") or (32.0 if tied else 8.0), 1.0, 4.0, 8192)
        if scaled else None,
    )
