"""The next token of texts whose keys and values are cached: the network's forward pass for one token of each text.

    prefill   prompts, one after another in a stream of documents -> the training's own forward pass, which leaves the
              keys and values of every layer in the cache
    step      (B,) tokens -> (B, V) logits; each text attends to its own part of the cache

A step reads every weight once and computes little, so memory bandwidth limits it: products that share an input are one
call, and on a CPU everything except the weights is fp32, in which PyTorch's small operations are faster. For a single
text PyTorch's usual CPU kernels read at a third of the bandwidth; two others come close to it and give the same sums:

    fp32   `bmm` of slices of the matrix, without copying it
    bf16   `embedding_bag`: a product with a vector is a weighted sum of the matrix's columns, and embeddings are
           weighted sums of a table's rows. The table is a copy of the matrix in tiles of a few outputs each:

               weight (O, I)  ->  tiles (O / WIDTH * I, WIDTH)      a bag: I rows of a tile, weighted by the input
"""

# B texts, D model width, H query heads, K key/value heads, G = H / K, E head width, L positions in the cache,
# V vocabulary; a product takes I channels to O

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.model.llama import Block, Documents, KeysValues, Llama, linear, rotations
from minisft.model.llama_config import LlamaConfig

ROWS = 64  # of a slice in fp32
WIDTHS = (192, 128, 64)  # of a tile in bf16: the widest that fits best
WIDENED = 2**19  # elements of the head that are fp32 at one time: they stay in a CPU's cache
SUM = 0  # embedding_bag's mode; the wrapper in torch.nn.functional spends as much time on checks as a small product


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Hidden states (B, D) and the head (V, D) -> (B, V) in fp32.

    Rounded to bf16, logits of 20 are 0.125 apart, and the best tokens of a row are often closer than that.
    """
    if hidden.is_cuda and hidden.dtype == head.dtype != torch.float32:
        return torch.mm(hidden, head.mT, out_dtype=torch.float32)  # the same sums, never rounded
    if hidden.dtype == head.dtype == torch.float32:
        return F.linear(hidden, head)
    x, rows = hidden.float(), max(WIDENED // head.shape[1], 1)
    return torch.cat([F.linear(x, part.to(hidden.dtype).float()) for part in head.split(rows)], dim=1)


class Cache:
    """Keys and values of up to B texts of up to L tokens, and where each text ends."""

    def __init__(self, config: LlamaConfig, kept: KeysValues, lengths: list[int], *, positions: int,
                 dtype: torch.dtype):
        """`kept` has the keys and values (T, K, E) of each layer of a stream with the texts, which have `lengths`."""
        device = kept[0][0].device
        shape = (config.num_hidden_layers, 2, len(lengths), config.num_key_value_heads, positions, config.head_dim)
        self.layers = torch.zeros(shape, dtype=dtype, device=device)  # zeros: an attention weight of 0 times nan is nan
        for layer, pair in zip(self.layers, kept, strict=True):
            for which, stream in zip(layer, pair, strict=True):
                for text, document in zip(which, stream.split(lengths), strict=True):
                    text[:, : len(document)] = document.transpose(0, 1)
        self.lengths, self.ends = lengths, torch.tensor(lengths, device=device)  # of each text
        cosine, sine = rotations(torch.arange(positions, device=device), config)  # (L, 1, E)
        first, second = sine.chunk(2, dim=-1)
        self.rotations = cosine, torch.cat((-first, second), dim=-1)  # the minus of llama.rotate, once for all steps

    def begin_step(self) -> tuple[Tensor, Tensor]:
        """Make room for a token of each text; returns the rotations of their positions, each (B, 1, E)."""
        self.rows, self.places = torch.arange(len(self.lengths), device=self.ends.device), self.ends
        self.ends, self.lengths = self.ends + 1, [length + 1 for length in self.lengths]
        self.longest, self.mask = max(self.lengths), None
        if min(self.lengths) < self.longest:
            self.mask = (torch.arange(self.longest, device=self.ends.device) < self.ends[:, None])[:, None, None]
        cosine, sine = self.rotations
        return cosine[self.places], sine[self.places]

    def attend(self, layer: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, H, E), keys and values (B, K, E) of the new tokens -> (B, H, E)."""
        layer[:, self.rows, :, self.places] = torch.stack((k, v), dim=1)
        keys, values = layer[:, : len(q), :, : self.longest]
        # The G heads that share keys are G queries of one attention.
        grouped = q.view(len(q), k.shape[1], -1, q.shape[2])  # (B, K, G, E)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask).flatten(1, 2)

    def leave(self, stopped: list[int]) -> list[int]:
        """Remove texts; the last ones take their places. Returns the former row of each that stays."""
        rows = list(range(len(self.lengths)))
        for row in sorted(stopped, reverse=True):
            last = rows.pop()
            if row < len(rows):
                rows[row] = last
                self.layers[:, :, row] = self.layers[:, :, len(rows)]
        self.lengths = [self.lengths[row] for row in rows]
        self.ends = self.ends[rows]
        return rows


class Product:
    """Linear maps of one input, side by side: x (B, I) -> (B, O), in the dtype of x."""

    def __init__(self, *maps: nn.Linear, packed: bool = False):
        self.weights: list[Tensor] = [m.weight for m in maps]
        biases: list[Tensor] = [m.bias for m in maps if m.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.dtype, self.outputs = self.weights[0].dtype, sum(map(len, self.weights))
        self.tiles: Tensor | None = None
        self.slices: list[Tensor] | None = None
        if packed and self.weights[0].is_cpu and self.dtype == torch.bfloat16:
            channels, width = self.weights[0].shape[1], min(WIDTHS, key=lambda width: -self.outputs % width)
            padded = F.pad(torch.cat(self.weights), (0, 0, 0, -self.outputs % width))
            self.tiles = padded.unflatten(0, (-1, width)).mT.reshape(-1, width)
            self.rows = torch.arange(len(self.tiles), dtype=torch.int32)
            self.starts = self.rows[::channels].contiguous()
            self.spread = torch.empty(len(self.starts), channels, dtype=self.dtype)  # the input, once for each tile
        elif self.weights[0].is_cpu and self.dtype == torch.float32 and not any(len(w) % ROWS for w in self.weights):
            self.slices = [w.unflatten(0, (-1, ROWS)) for w in self.weights]

    def __call__(self, x: Tensor) -> Tensor:
        if self.tiles is not None and len(x) == 1:
            weighted = self.spread.copy_(x).view(-1)
            y = torch.embedding_bag(self.tiles, self.rows, self.starts, False, SUM, False, weighted)[0].view(1, -1)
            y = y[:, : self.outputs] if y.shape[1] > self.outputs else y
        else:
            narrow = x.to(self.dtype)
            if self.slices is not None and len(x) == 1:
                parts = [torch.bmm(w, narrow.mT.expand(len(w), -1, -1)).view(1, -1) for w in self.slices]
            else:
                parts = [linear(narrow, weight) for weight in self.weights]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return y.to(x.dtype) if self.bias is None else y.to(x.dtype) + self.bias


class Layer:
    """The weights of a block, prepared for steps."""

    def __init__(self, block: Block, dtype: torch.dtype, *, packed: bool):
        attention, mlp = block.self_attn, block.mlp
        self.before_attention = block.input_layernorm.weight.to(dtype)
        self.before_mlp = block.post_attention_layernorm.weight.to(dtype)
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj, packed=packed)
        self.out = Product(attention.o_proj, packed=packed)
        self.gate_up = Product(mlp.gate_proj, mlp.up_proj, packed=packed)
        self.down = Product(mlp.down_proj, packed=packed)


class CachedDecoder:
    """A network that continues texts.

    With `packed`, bf16 weights on a CPU get a second copy that continues a single text faster. Otherwise it holds the
    model's own weights and costs nothing.
    """

    @torch.no_grad()
    def __init__(self, model: Llama, *, packed: bool = False):
        weight = model.model.embed_tokens.weight
        self.model, self.config = model, model.config
        self.dtype = torch.float32 if weight.is_cpu else weight.dtype  # of everything except the weights
        blocks = (block for block in model.model.layers if isinstance(block, Block))
        self.layers = [Layer(block, self.dtype, packed=packed) for block in blocks]
        self.norm = model.model.norm.weight.to(self.dtype)
        self.head = weight if self.config.tie_word_embeddings else model.lm_head.weight

    def bytes_per_position(self) -> int:  # in the cache
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize

    def prefill(self, prompts: list[list[int]], *, positions: int) -> tuple[Tensor, Cache]:
        """Logits (B, V) of the token after each prompt, and a cache that holds the prompts."""
        lengths, device = [len(prompt) for prompt in prompts], self.norm.device
        documents = Documents.of_lengths(tuple(lengths), device=device)
        last, kept = documents.cu_seqlens[1:].long() - 1, KeysValues()
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        found = self.model(tokens, documents, lambda hidden, head: logits(hidden[last], head), kept)
        return found, Cache(self.config, kept, lengths, positions=positions, dtype=self.dtype)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The next token (B,) of each text in the cache -> logits (B, V) of the one after it, in fp32."""
        kv_heads, width, half = self.config.num_key_value_heads, (self.config.hidden_size,), self.config.head_dim // 2
        x = self.model.model.embed_tokens(tokens).to(self.dtype)  # (B, D)
        cosine, sine = cache.begin_step()
        for layer, cached in zip(self.layers, cache.layers, strict=True):
            normed = F.rms_norm(x, width, layer.before_attention, self.config.rms_norm_eps)
            qkv = layer.qkv(normed).view(len(x), -1, 2 * half)  # (B, H + 2 K, E)
            qk = qkv[:, :-kv_heads].float()
            qk = torch.addcmul(qk * cosine, qk.roll(half, dims=-1), sine).to(x.dtype)  # llama.rotate, faster
            q, k, v = qk[:, :-kv_heads], qk[:, -kv_heads:], qkv[:, -kv_heads:]
            x = x + layer.out(cache.attend(cached, q, k, v).flatten(1))
            normed = F.rms_norm(x, width, layer.before_mlp, self.config.rms_norm_eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=1)
            x = x + layer.down(F.silu(gate) * up)
        return logits(F.rms_norm(x, width, self.norm, self.config.rms_norm_eps), self.head)
