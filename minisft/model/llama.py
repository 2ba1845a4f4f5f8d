"""Llama-3 in one file: embeddings, N blocks of attention and SwiGLU with a norm before each, a norm, a head.

    tokens (T,) -> embed -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] * N -> norm -> head

There is no batch dimension: a batch is one stream of documents, and `Documents` says where each begins.

    stream     a0 a1 a2 b0 b1          lengths [3, 2]   cu_seqlens [0, 3, 5]   positions [0, 1, 2, 0, 1]
    attends    a0 | a0 a1 | a0 a1 a2 | b0 | b0 b1

Parameters have Hugging Face's names and layout. Adapters replace `Linear` modules from outside (lora/adapters.py).

From "The Llama 3 Herd of Models" (2024), section 3.2: grouped-query attention (Ainslie et al. 2023), RMSNorm (Zhang and
Sennrich 2019), SwiGLU (Shazeer 2020), rotary embeddings (Su et al. 2021).
"""

# T tokens in the stream, D model width, H query heads, K key/value heads, E head width, F feed-forward width,
# V vocabulary, O outputs of a matrix

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minisft.model.llama_config import LlamaConfig

# By the names that recipes and options give them. fp8 is bf16, except in the products of blocks (fp8.py).
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
VARLEN_WANTS_GQA = torch.__version__ >= "2.12"  # compares numbers; 2.11's varlen_attn needs not be told
KeysValues = list[tuple[Tensor, Tensor]]  # keys and values (T, K, E) of each layer


def cpu_kernels() -> ModuleType:
    """cpu/kernels.py: what a processor needs instead of PyTorch's own kernels. Imported here only, when it is used."""
    from minisft.cpu import kernels

    return kernels


@dataclass(frozen=True)
class Documents:
    """Where the documents of a stream of T tokens begin and end. Sizes are on the host, which never waits for them."""

    offsets: Tensor  # (documents + 1,) int32, on the host: of each document's first token, and T
    cu_seqlens: Tensor  # the same on the device
    positions: Tensor  # (T,) int64: position of each token in its own document
    longest: int  # tokens of the longest document, found once for all layers
    ids: Tensor | None = None  # (T,) int32: a number of each token's document; the network itself does not use it
    ranks: int = 1  # how many share the stream (context.py): tokens, positions and ids are one's part, of T / ranks

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...], *, device: torch.device | str = "cpu") -> "Documents":
        """Documents of so many tokens each, one after another."""
        offsets = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(offsets, offsets.to(device), positions.to(device), max(lengths))


# Precision, up to RMSNorm. Where weights already have the dtype of the activations, all of this is F.linear and
# F.embedding, so it may be skipped at first.
#
# Operands of products are rounded to the dtype of the activations, sums are fp32, results are rounded once. A process
# that runs alone keeps fp32 weights and converts each for its product; sharded ones are gathered in bf16 already.


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`. Not `x.to(dtype)`: when torch 2.11 compiles an autograd Function that returns a `to` with nothing
    to do, the Function's input silently gets no gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of tensors like `x` are computed: their own, unless a wider one is faster."""
    return cpu_kernels().product_dtype(x.dtype) if x.is_cpu else x.dtype


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices of one dtype."""
    dtype = product_dtype(a)
    return cast(cast(a, dtype) @ cast(b, dtype), a.dtype)


class _ConvertedLinear(torch.autograd.Function):
    """Converts the weight for each product, again in the backward pass: no copy of it outlives its product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return matmul(x, cast(weight, x.dtype).T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (matmul(grad, cast(weight, grad.dtype)) if needs_x else None,
                cast(matmul(grad.T, x), weight.dtype) if needs_weight else None)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(T, D) and (O, D) -> (T, O): `x @ weight.T` in the dtype of `x`."""
    if x.dtype == weight.dtype == product_dtype(x):
        return F.linear(x, weight)
    return _ConvertedLinear.apply(x, weight)


class Linear(nn.Linear):
    """`nn.Linear` that computes in the dtype of its input, whichever dtype its parameters are kept in."""

    multiply: Callable[[Tensor, Tensor], Tensor] = staticmethod(linear)  # FP8 sets another

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose gradient is summed in fp32 on every device."""

    def forward(self, tokens: Tensor) -> Tensor:
        return cpu_kernels().embedding(tokens, self.weight) if self.weight.is_cpu else super().forward(tokens)


class RMSNorm(nn.Module):
    """Divide each token's channels by their root mean square; computed in fp32, rounded once."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D), in the dtype of `x`."""
        weight = self.weight.to(x.dtype)
        if x.is_cpu:
            return cpu_kernels().rms_norm(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


# Rotary positions: queries and keys are turned by an angle that grows with their position, so that their dot product
# depends only on the distance between them. Channel pairs are (i, i + E/2), as in Hugging Face's checkpoints.


def rotations(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions (T,): each (T, 1, E) in fp32, broadcast over the heads.

    Pair i turns by position * theta^(-2i/E). Llama-3.1 and later stretch the slow pairs, those whose wavelength exceeds
    what pre-training saw, by `factor`, leave the fast ones alone, and blend in between ("The Llama 3 Herd of Models",
    section 3.4.2; Meta's `apply_scaling`).
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    radians = 1.0 / config.rope_theta**exponents  # (E/2,) from one position to the next
    if scaling := config.rope_scaling:
        turns = scaling.original_max_position_embeddings * radians / (2 * math.pi)  # full turns in the old context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast pair, unchanged; 0: slow pair, stretched
        radians = keep * radians + (1 - keep) * radians / scaling.factor
    angles = positions.float()[:, None] * radians
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """(T, heads, E) -> (T, heads, E), turned in fp32 and rounded once."""
    cosine, sine = rotation
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cosine + torch.cat((-second, first), dim=-1) * sine).to(x.dtype)


def is_for_flash(q: Tensor) -> bool:
    """True if the flash kernel takes queries like `q`: of 16 bits, the head width a multiple of 8 and at most 256."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Queries (T, H, E), keys and values (T, K, E) -> (T, H, E). H / K query heads share a key/value head.

    Causal within each document. The boundaries are explicit and every backend honours them: CUDA runs the
    variable-length flash kernel (Dao 2023, "FlashAttention-2"); what it does not take (a CPU's tensors, fp32, an odd
    head width) goes document by document. No (T, T) mask is ever built, so the cost falls with the documents' length.
    """
    if not is_for_flash(q):
        return cpu_kernels().attention(q, k, v, documents.offsets)
    from torch.nn.attention.varlen import varlen_attn  # imported late: it loads the compiler, which takes a second

    shares: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if VARLEN_WANTS_GQA else {}
    offsets, longest = documents.cu_seqlens, documents.longest
    return varlen_attn(  # type: ignore[return-value]  # a pair only if the log-partitions are asked for
        q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), **shares)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: H query heads share K key/value heads."""

    attend: Callable[[Tensor, Tensor, Tensor, Documents], Tensor] = staticmethod(attend)  # context.py sets another

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width, self.head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, width, bias=bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents,
                cache: KeysValues | None = None) -> Tensor:
        """(T, D) -> (T, D). A token attends to itself and the earlier tokens of its own document."""
        q = rotate(self.q_proj(x).unflatten(1, (-1, self.head_dim)), rotation)  # (T, H, E)
        k = rotate(self.k_proj(x).unflatten(1, (-1, self.head_dim)), rotation)  # (T, K, E)
        v = self.v_proj(x).unflatten(1, (-1, self.head_dim))  # (T, K, E)
        if cache is not None:
            cache.append((k, v))
        return self.o_proj(self.attend(q, k, v, documents).flatten(1))


class SwiGLU(nn.Module):
    """The feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D), (T, F) in between."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward network, each after a norm and added to the stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.shapes = tuple((m.in_features, m.out_features) for m in self.modules() if isinstance(m, Linear))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents, recompute: str = "none",
                cache: KeysValues | None = None) -> Tensor:
        """(T, D) -> (T, D). `recompute` says what the backward pass computes again: "none"; "full", all of it from the
        block's input; "selective", what `selective` does not keep."""
        if recompute == "none":
            return self.compute(x, rotation, documents, cache)
        # Within the block, so that sharding and compiling see one forward pass.
        context: dict[str, Any] = {"context_fn": partial(selective, self.shapes)} if recompute == "selective" else {}
        return checkpoint(self.compute, x, rotation, documents, use_reentrant=False, preserve_rng_state=False,
                          **context)

    def compute(self, x: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents,
                cache: KeysValues | None = None) -> Tensor:
        """(T, D) -> (T, D), with everything kept."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        """`readout` of hidden states (T, D) and the matrix (V, D); see `Llama`."""
        return readout(hidden, self.weight)


class Llama(nn.Module):
    """A Llama-3 network that computes in `dtype`; with None, in that of its parameters (under FSDP, as gathered).

    Its `forward` ends in `readout(hidden (T, D), head weight (V, D))`, supplied by the caller: training computes the
    loss of the trained tokens there, generation the logits of the last ones, and neither pays for (T, V) logits. It is
    called inside `forward` because only there are sharded parameters gathered (training/parallel.py).
    """

    def __init__(self, config: LlamaConfig, *, recompute: str = "none", dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.recompute = recompute  # what a block computes again in its backward pass: none, selective, full
        self.model = Decoder(config)
        if not config.tie_word_embeddings:  # a tied model has one matrix, and one name for it
            self.lm_head = Head(config)

    def forward(self, tokens: Tensor, documents: Documents, readout: Callable[[Tensor, Tensor], Tensor],
                cache: KeysValues | None = None) -> Tensor:
        """tokens (T,) -> `readout` of hidden states (T, D) and head (V, D). Layers append to a `cache`."""
        x = self.model.embed_tokens(tokens)
        x = x.to(self.dtype or x.dtype)
        rotation = rotations(documents.positions, self.config)
        for block in self.model.layers:
            x = block(x, rotation, documents, self.recompute if torch.is_grad_enabled() else "none", cache)
        x = self.model.norm(x)
        if self.config.tie_word_embeddings:
            return readout(x, self.model.embed_tokens.weight)
        return self.lm_head(x, readout)

    @torch.no_grad()
    def logits(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens (T,) -> (T, V). `cu_seqlens` (documents + 1,) are their offsets; None: there is one. Raises
        ValueError for offsets that do not rise from 0 to T."""
        ends = [0, len(tokens)] if cu_seqlens is None else cu_seqlens.tolist()
        lengths = tuple(b - a for a, b in pairwise(ends))
        if ends[:1] != [0] or sum(lengths) != len(tokens) or min(lengths, default=0) < 1:
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {len(tokens)}, not {ends[:10]}")
        return self(tokens, Documents.of_lengths(lengths, device=tokens.device), linear)


# Selective recomputation: what a block keeps for its backward pass.

ATTENTION = ("torch_attn::_varlen_attn", "minisft::document_attention")
PRODUCTS = {"aten::mm": 1, "aten::addmm": 2, "aten::_scaled_mm": 1}  # and which argument is the matrix


def selective(shapes: tuple[tuple[int, int], ...]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for a block's forward pass and its recomputation: keep attention and five matrix products.

    Keeping a product of width O and depth I costs 2 O bytes a token and saves 2 I O FLOPs; attention over documents of
    length n costs 2 H E bytes and saves about 2 H E n. For Llama-3-8B, a token and layer:

        q 8 KiB, k 2, v 2, o 8, gate 28: 4,096 FLOPs a byte     up 28 KiB: the same, but left out: 64 KiB instead of 92
        attention 8 KiB: n FLOPs a byte, of a slower kind       down: not needed, so never computed again

    With the block's input (8 KiB) that is 64 KiB, 2.0 MiB over 32 layers; `up` alone is multiplied twice, 27% of the
    block's products. All else is recomputed: norms, rotation, SwiGLU, and products of matrices that do not have one of
    the block's `shapes` (I, O): thin ones beside its own.
    """
    # Counted apart for the forward pass and the recomputation: torch 2.11 calls `keep` in both.
    products = Counter[bool]()

    def keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = operation.name()
        is_product = name in PRODUCTS and tuple(args[PRODUCTS[name]].shape) in shapes
        products[context.is_recompute] += is_product
        first_five = is_product and products[context.is_recompute] <= 5  # q, k, v, o, gate; after them up, down
        return CheckpointPolicy.MUST_SAVE if first_five or name in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(keep)
