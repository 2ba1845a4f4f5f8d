"""Meta's original checkpoints: `params.json` and `consolidated.00.pth`, `consolidated.01.pth`, ...

They differ from Hugging Face's in names, in the rotary layout (pairs of neighbouring rows instead of two halves, so the
rows of q and k are permuted once here), and in how several files share a matrix: like tensor-parallel ranks, along the
outputs for most and along the inputs for the two projections back to the model's width. Layout: Meta's
`llama_models/llama3/model.py`. A `.pth` is a pickle: it is read only on request, memory-mapped, `weights_only=True`.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisft.errors import UserError, printable
from minisft.files import read_small
from minisft.model.llama_config import LlamaConfig, RopeScaling
from minisft.model.weights import finite

_TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_BLOCK = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
          "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
          "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


class MetaFolder:
    """The tensors of a Meta folder under Hugging Face's names. Raises UserError for files that cannot be read."""

    piece = 0  # any rows of a matrix need all of it

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
        self.config = self._config()
        self._sources = {_hf_name(name): name for name in self._parts[0] if name != "rope.freqs"}
        if self.config.tie_word_embeddings:
            self._sources.pop("lm_head.weight", None)
        self.shapes = {ours: self._shape(theirs) for ours, theirs in self._sources.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, in Hugging Face's layout."""
        theirs = self._sources[name]
        parts = [part[theirs] for part in self._parts]
        whole = parts[0] if parts[0].dim() < 2 else torch.cat(parts, dim=_split_dim(theirs))  # norms are in each
        if theirs.endswith(("attention.wq.weight", "attention.wk.weight")):
            # rows of a head: [x0 y0 x1 y1 ...] -> [x0 x1 ... y0 y1 ...]
            whole = whole.unflatten(0, (-1, self.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return finite(whole[start:stop], name, self.path)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = list(self._parts[0][name].shape)
        if len(shape) > 1:
            shape[_split_dim(name)] *= len(self._parts)
        return tuple(shape)

    def _config(self) -> LlamaConfig:
        file = self.path / "params.json"
        try:
            params = json.loads(read_small(file))
            embedding, head = "tok_embeddings.weight", "output.weight"
            tied = all(head not in part or torch.equal(part[head], part[embedding]) for part in self._parts)
            return _config(params, vocab_size=sum(len(part[embedding]) for part in self._parts), tied=tied)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{file}: not Meta's parameters of a Llama-3 ({type(error).__name__}: "
                            f"{printable(error, 200)})") from None


def _split_dim(name: str) -> int:
    return 1 if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")) else 0


def _load(file: Path) -> dict[str, Tensor]:
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
    for ours, theirs in _TOP.items():
        if name == f"{theirs}.weight":
            return f"{ours}.weight"
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    for ours, theirs in _BLOCK.items():
        if match and match[2] == theirs:
            return f"model.layers.{match[1]}.{ours}.weight"
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
