"""Llama-3, whole: embeddings, N blocks of attention and SwiGLU with a norm before each, a norm, a head.

    tokens (T,) -> embed -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * N -> norm -> head

There is no batch dimension: the T tokens are documents one after another, and `Documents` says where each begins.
Parameters have Hugging Face's names and layout, so that reading and writing a checkpoint is the identity.

From "The Llama 3 Herd of Models" (2024), section 3.2: grouped-query attention (Ainslie et al. 2023), RMSNorm (Zhang and
Sennrich 2019), SwiGLU (Shazeer 2020), rotary embeddings.
"""

# T tokens in the stream, D model width, H query heads, K key/value heads, E head width, F feed-forward width,
# V vocabulary

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from minisft.errors import UserError
from minisft.model import weights
from minisft.model.attention import Documents, attend
from minisft.model.llama_config import LlamaConfig
from minisft.model.meta import MetaFolder
from minisft.model.norm import RMSNorm
from minisft.model.peft import PeftFolder, is_adapter
from minisft.model.precision import Embedding, Linear, linear
from minisft.model.rope import rotate, rotations


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: H query heads share K key/value heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, self.head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, width, bias=bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        """(T, D) -> (T, D). A token attends to itself and the earlier tokens of its own document.

        `documents.draws` are for the dropout of adapters (lora.py); a plain `Linear` does nothing with them.
        """
        q = self.q_proj(x, documents.draws).unflatten(1, (-1, self.head_dim))  # (T, H, E)
        k = self.k_proj(x, documents.draws).unflatten(1, (-1, self.head_dim))  # (T, K, E)
        v = self.v_proj(x, documents.draws).unflatten(1, (-1, self.head_dim))  # (T, K, E)
        attended = attend(rotate(q, rotation), rotate(k, rotation), v, documents).flatten(1)  # (T, H E)
        return self.o_proj(attended, documents.draws)


class SwiGLU(nn.Module):
    """The feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, draws: Tensor | None) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x, draws)) * self.up_proj(x, draws), draws)  # (T, F) inside


ATTENTION = ("torch_attn::_varlen_attn", "minisft::document_attention")
PRODUCTS = ("aten::mm", "aten::addmm")


def selective(adapter_rank: int = 0) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a block's forward pass and of its recomputation: attention and five products are kept.

    Keeping a product of width O and depth I costs 2 O bytes a token and saves 2 I O FLOPs; attention over documents of
    length n costs 2 H E bytes and saves about 2 H E n. For Llama-3-8B, a token and layer:

        q 8 KiB, k 2, v 2, o 8, gate 28: 4,096 FLOPs a byte     up 28 KiB: the same, but left out to halve the memory
        attention 8 KiB: n FLOPs a byte, of a slower kind       down: needed by nobody, so never computed again

    With the block's input (8 KiB) that is 64 KiB, 2.0 MiB over 32 layers; `up` alone is multiplied twice, 27% of the
    block's products. Norms, rotation and SwiGLU's product are computed again too, which costs no multiplications.
    So are the thin products of adapters (lora.py), which are told by the rank.
    """
    # q, k, v, o, gate, up, down, in the order of `compute`; counted for each pass, as torch 2.11 asks in both of them.
    products = {again: count(1) for again in (False, True)}

    def keep(context: SelectiveCheckpointContext, operation: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operation.name()
        is_thin = name in PRODUCTS and adapter_rank in args[-1].shape
        kept = name in ATTENTION or (name in PRODUCTS and not is_thin and next(products[context.is_recompute]) <= 5)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(keep)


class Block(nn.Module):
    """Attention and feed-forward network, each after a norm and added to the stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.adapter_rank = 0
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents,
                recompute: str = "none") -> Tensor:
        """(T, D) -> (T, D). `recompute` says what the backward pass computes again instead of finding it kept:
        "none"; "full", all from the block's input; "selective", what `selective` leaves out."""
        if recompute == "none":
            return self.compute(x, rotation, documents)
        # Within the block, so that sharding and compiling see one forward pass, whatever is computed again in it.
        contexts: dict[str, Any] = {}  # given only where there are any: the compiler knows no others
        if recompute == "selective":
            contexts["context_fn"] = partial(selective, self.adapter_rank)
        return checkpoint(self.compute, x, rotation, documents, use_reentrant=False, preserve_rng_state=False,
                          **contexts)

    def compute(self, x: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        """(T, D) -> (T, D), whatever is kept of it."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, documents)
        return x + self.mlp(self.post_attention_layernorm(x), documents.draws)


class Decoder(nn.Module):
    """Everything between the token ids and the head; `model.` in the parameters' names."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Head(nn.Module):
    """The vocabulary matrix of an untied model."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor, readout: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What `readout` makes of hidden states (T, D) and the matrix (V, D); see `Llama`."""
        return readout(hidden, self.weight)


class Llama(nn.Module):
    """A Llama-3 network.

    Its `forward` ends in `readout(hidden (T, D), head weight (V, D))`, supplied by the caller: training computes the
    loss of the trained tokens there, generation the logits of the last ones, and neither pays for (T, V) logits. It is
    called inside `forward` because only there are sharded parameters gathered (training/parallel.py).

    It computes in `dtype`, or where that is None in the dtype that its parameters have when they are used.
    """

    def __init__(self, config: LlamaConfig, *, recompute: str = "none", dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.recompute = recompute  # what a block computes again in its backward pass: none, selective, full
        self.model = Decoder(config)
        if not config.tie_word_embeddings:  # a tied model has one matrix, and one name for it
            self.lm_head = Head(config)

    @property
    def blocks(self) -> list[Block]:
        """The layers, first to last."""
        return [block for block in self.model.layers if isinstance(block, Block)]

    def forward(self, tokens: Tensor, documents: Documents, readout: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """tokens (T,) -> whatever `readout` makes of the hidden states (T, D) and the head (V, D)."""
        x = self.model.embed_tokens(tokens)
        x = x.to(self.dtype or x.dtype)
        rotation = rotations(documents.positions, self.config)
        for block in self.model.layers:
            x = block(x, rotation, documents, self.recompute if torch.is_grad_enabled() else "none")
        x = self.model.norm(x)
        if self.config.tie_word_embeddings:
            return readout(x, self.model.embed_tokens.weight)
        return self.lm_head(x, readout)

    @torch.no_grad()
    def logits(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens (T,) -> (T, V). `cu_seqlens` (N + 1,) are the documents' offsets; without it the stream is one.

        Raises ValueError for offsets that do not rise from 0 to T.
        """
        ends = [0, len(tokens)] if cu_seqlens is None else cu_seqlens.tolist()
        lengths = tuple(b - a for a, b in pairwise(ends))
        if ends[:1] != [0] or sum(lengths) != len(tokens) or min(lengths, default=0) < 1:
            raise ValueError(f"cu_seqlens must rise from 0 to the {len(tokens)} tokens; it is {ends[:10]}")
        return self(tokens, Documents.of_lengths(lengths, device=tokens.device), linear)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.float32,
                        device: torch.device | str = "cpu", format: str = "hf",
                        base: str | Path | None = None) -> "Llama":
        """The model in folder `path`: Hugging Face's (`format="hf"`) or Meta's `consolidated.*.pth` (`"meta"`).

        `path` may be an adapter in PEFT's format: then it is its base model with the adapter merged into it. The base
        is in `base`, or else where the adapter says, in `format`.

        Raises UserError for files that are missing, broken or do not belong together, ValueError for another `format`.
        """
        if format not in ("hf", "meta"):
            raise ValueError(f"format is {format!r}; it is \"hf\" or \"meta\"")
        adapter = PeftFolder(path) if is_adapter(path) else None
        if adapter:
            path = adapter.base_folder(base)
        source = MetaFolder(path) if format == "meta" else weights.SafetensorsFolder(path)
        with torch.device("meta"):
            model = cls(source.config).to(dtype)
        weights.check(model, source)
        if torch.device(device).type == "cpu":
            weights.check_memory(model)
        model.to_empty(device=device)
        weights.load(model, source)
        if adapter:
            adapter.merge_into(model, model.config)
        return model.eval()

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write `config.json` and safetensors into the folder `path`. Raises UserError where it holds a model."""
        if Path(path).exists() and any(Path(path).glob("model*.safetensors*")):
            raise UserError(f"{path}: holds a model already; choose another folder")
        weights.save(self, self.config, path, dtype=dtype)
