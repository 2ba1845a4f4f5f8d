"""The shape of a Llama, read from and written to Hugging Face's `config.json`.

A network that differs in any way from the one that the file describes is wrong, so every field that changes the
mathematics is either understood or refused; others (cache settings, pre-training flags) are ignored. Both spellings of
the rotary settings are read: `rope_theta` + `rope_scaling`, and the newer `rope_parameters`; if a file has both the
first wins, as in transformers. Missing fields have their default in transformers, but token ids are then unknown.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.errors import UserError, printable
from minisft.files import read_small

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a block, in this order
_LARGEST = 2**20  # four times the widest Llama; the product of two such sizes is still a valid tensor
_DEEPEST = 2**10  # eight times the deepest one; that many layers are built in a second


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's stretching of the rotary wavelengths beyond the pre-training context (llama.py: rotations)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _positive(field.name, getattr(self, field.name))
        low, high = self.low_freq_factor, self.high_freq_factor
        if low >= high:
            raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the network, under Hugging Face's names. Raises ValueError for values that no network can have."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim"):
            _size(name, getattr(self, name), _DEEPEST if name == "num_hidden_layers" else _LARGEST)
        for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "initializer_range"):
            _positive(name, getattr(self, name))
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {_shown(getattr(self, name))}; true or false is needed")
        for name, ids in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", self.eos_token_id)):
            if not all(i is None or (type(i) is int and i >= 0) for i in (ids if isinstance(ids, list) else [ids])):
                raise ValueError(f"{name} is {_shown(getattr(self, name))}; a token id is needed")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {shared}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of the linear matrices of all blocks, in the order of their products."""
        width, inner = self.hidden_size, self.intermediate_size
        heads, shared = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = dict(zip(MATRICES, ((heads, width), (shared, width), (shared, width), (width, heads), (inner, width),
                                     (inner, width), (width, inner)), strict=True))
        return {f"model.layers.{i}.{'self_attn' if leaf in MATRICES[:4] else 'mlp'}.{leaf}": shape
                for i in range(self.num_hidden_layers) for leaf, shape in shapes.items()}

    def to_dict(self, *, dtype: str) -> dict[str, Any]:
        """The content of `config.json` for weights stored as `dtype` ("bfloat16", "float32")."""
        fields = dataclasses.asdict(self)
        if self.rope_scaling:
            fields["rope_scaling"]["rope_type"] = "llama3"
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **fields,
                "torch_dtype": dtype}


def read_config(path: str | Path) -> LlamaConfig:
    """The network that `path` describes, a `config.json` or the folder of one.

    Raises UserError for a file that is missing, is not JSON, or describes anything but this Llama.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(read_small(file))
    except FileNotFoundError:
        adapter = (f". This one holds an adapter: `minisft convert {path} TARGET --merge` makes one model of it and "
                   "its base" if (path / "adapter_config.json").exists() else "")
        raise UserError(f"{file}: no such file; a Hugging Face model folder has a config.json{adapter}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    try:
        return _from_dict(raw)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{file}: {reason}") from None


def _from_dict(raw: dict[str, Any]) -> LlamaConfig:
    for name, supported in (("model_type", ("llama",)), ("hidden_act", ("silu",)), ("pretraining_tp", (1, None)),
                            ("partial_rotary_factor", (1, None))):
        if raw.get(name, supported[0]) not in supported:
            raise ValueError(f"{name} is {_shown(raw[name])}; minisft trains Llama-3 networks, where it is "
                             f"{supported[0]!r}")
    heads, hidden = (_size(name, raw[name]) for name in ("num_attention_heads", "hidden_size"))
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling or rope_parameters is {_shown(rope)}; an object is needed")
    values = {"num_key_value_heads": heads, "head_dim": hidden // heads, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
              "max_position_embeddings": 2048}
    for field in dataclasses.fields(LlamaConfig):
        if raw.get(field.name) is not None or (field.default is dataclasses.MISSING and field.name not in values):
            values[field.name] = raw[field.name]  # KeyError: there is no default
    return LlamaConfig(**{**values, "rope_theta": rope.get("rope_theta", values["rope_theta"]),
                          "rope_scaling": _rope_scaling(rope)})


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (partial := rope.get("partial_rotary_factor", 1)) != 1:
        raise ValueError(f"partial_rotary_factor is {_shown(partial)}; Llama-3 rotates whole heads")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling of type {_shown(kind)} is not supported; Llama-3 uses 'default' or 'llama3'")
    return RopeScaling(**{field.name: rope[field.name] for field in dataclasses.fields(RopeScaling)})


def _size(name: str, value: Any, largest: int = _LARGEST) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name} is {_shown(value)}; a whole number from 1 to {largest} is needed")
    return value


def _positive(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 1e-30 < value < 1e30:  # also false for NaN
        raise ValueError(f"{name} is {_shown(value)}; a positive number is needed, one whose powers fp32 can hold")


def _shown(value: Any) -> str:
    return printable(repr(value))


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **other: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=128_256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=8, bos_token_id=128_000, eos_token_id=128_001,
                       **{"head_dim": hidden // heads, **other})


_LONG: dict[str, Any] = {"max_position_embeddings": 131_072, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 8192)}
_SMALL: dict[str, Any] = {"max_position_embeddings": 131_072, "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192),
                          "tie_word_embeddings": True}

# Sizes as published: "The Llama 3 Herd of Models" (2024), table 3, and the released config.json files.
PRESETS: dict[str, LlamaConfig] = {
    "llama-3-8b": _llama(4096, 14_336, 32, 32),
    "llama-3-70b": _llama(8192, 28_672, 80, 64),
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, **_LONG),
    "llama-3.1-70b": _llama(8192, 28_672, 80, 64, **_LONG),
    "llama-3.1-405b": _llama(16_384, 53_248, 126, 128, **_LONG),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, head_dim=64, **_SMALL),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, head_dim=128, **_SMALL),
    "llama-3.3-70b": _llama(8192, 28_672, 80, 64, **_LONG),
}
