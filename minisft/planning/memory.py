"""The memory of a training step on one GPU, by arithmetic from the shape of the network.

What stays all the time is 16 bytes a parameter over the shards: fp32 weight, gradient and two moments (Rajbhandari et
al. 2020, "ZeRO", section 3.1). What comes and goes is counted at the instants at which a step can need most, and the
largest of them is the peak:

    head          all activations are kept; the head's gradient is summed in fp32 beside the gathered matrix
    last block    all activations are kept, the last block's are computed again, its gradients and theirs are made
    first block   one block's activations, but the gradients of all others stand reduced
    embedding     no activations; the gradient of the embedding, whole, and its copy for the reduction

Every term is a tensor that exists, and is named after it. Checked against torch's FSDP memory tracker on simulated
ranks (tests/test_memory.py); a caching allocator reserves more than is allocated (planning.py states the factor).
"""

# T tokens on one rank, L layers, D model width, A = H E width of the queries, K that of the keys, F feed-forward width,
# V vocabulary

from dataclasses import dataclass

from minisft.config import LoraConfig
from minisft.lora import targets
from minisft.model.llama_config import LlamaConfig
from minisft.training.loss import SOFTMAX, chunk_tokens

FP32 = 4
POLICIES = ("none", "selective", "full")


@dataclass(frozen=True)
class Bytes:
    """Bytes on the device for each parameter's state, and for each number of the network's arithmetic."""

    parameter: int = FP32
    gradient: int = FP32
    moments: int = 2 * FP32
    compute: int = 2  # gathered weights and activations: bf16
    softmax: int = SOFTMAX  # logits whose softmax is taken at once; a CPU's cache holds fewer
    compiled: bool = True  # layers, as on a GPU


@dataclass(frozen=True)
class Sizes:
    """Numbers in the network's parameters."""

    block: int
    vocabulary: int  # one (V, D) matrix
    total: int

    def frozen(self, config: LlamaConfig, lora: LoraConfig, *, shards: int) -> int:
        """Bytes of a frozen network on each of `shards` GPUs. NF4's statistics are on all (lora/nf4.py)."""
        wide = self.total * (FP32 if lora.base == "fp32" else 2)
        if lora.base != "nf4":
            return wide // shards
        packed = sum(rows * columns for rows, columns in config.matrices().values())
        return (wide - 2 * packed + packed // 2) // shards + packed // targets.BLOCK

    @classmethod
    def of(cls, config: LlamaConfig) -> "Sizes":
        """Counted from the shape of the network."""
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        shared, inner = config.num_key_value_heads * config.head_dim, config.intermediate_size
        block = 2 * width * (heads + shared) + 3 * width * inner + 2 * width
        block += config.attention_bias * (heads + 2 * shared + width) + config.mlp_bias * (2 * inner + width)
        vocabulary = config.vocab_size * width
        total = config.num_hidden_layers * block + width + vocabulary * (1 if config.tie_word_embeddings else 2)
        return cls(block, vocabulary, total)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the instant that needs most, by part."""

    instant: str
    parts: dict[str, int]

    @property
    def allocated(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def kept(config: LlamaConfig, recompute: str, compute: int = 2, *, compiled: bool = False) -> int:
    """Bytes that a block keeps of each token for its backward pass (model/llama.py). The compiler makes the SiLU of the
    gate again."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    shared, inner, lse = config.num_key_value_heads * config.head_dim, config.intermediate_size, 4
    wide = 3 if compiled else 4
    return {
        # input, its norm, q, k, v, attention, stream between, its norm; gate, its SiLU, up, their product
        "none": compute * (4 * width + 2 * heads + 2 * shared + wide * inner) + lse * config.num_attention_heads + 8,
        # input, q, k, v, attention, o, gate
        "selective": compute * (2 * width + 2 * heads + 2 * shared + inner) + lse * config.num_attention_heads,
        "full": compute * width,
    }[recompute]


def peak(config: LlamaConfig, *, shards: int, tokens: int, trained: int, recompute: str, accumulates: bool = False,
         each: Bytes | None = None, lora: LoraConfig | None = None) -> Memory:
    """The instant of a step that needs most memory on each of `shards` GPUs.

    A forward pass has `tokens`, of which `trained` are targets. `accumulates`: gradients stand from the step's earlier
    micro-batches. With `lora` only its adapters are trained.
    """
    each = each or Bytes()
    if lora:
        return _with_adapters(config, shards, tokens, trained, recompute, each, lora)
    instants = {"head": _head, "last block": _last_block, "first block": _first_block, "embedding": _embedding}
    found = []
    for name, parts_of in instants.items():
        parts = _standing(config, shards, tokens, trained, each)
        reduced, parts_now = parts_of(config, shards, tokens, trained, recompute, each)
        parts["gradients"] = each.gradient * (Sizes.of(config).total if accumulates else reduced) // shards
        converts = shards == 1 and each.compute < each.parameter
        if converts and each.compiled and recompute == "none" and name in ("head", "last block"):
            # The compiler keeps the converted matrices for the backward pass.
            parts_now["gathered"] += each.compute * config.num_hidden_layers * Sizes.of(config).block
        found.append(Memory(name, parts | parts_now))
    return max(found, key=lambda memory: memory.allocated)


def _standing(config: LlamaConfig, shards: int, tokens: int, trained: int, each: Bytes) -> dict[str, int]:
    """What is there at every instant."""
    numbers = Sizes.of(config).total
    ids = 8 * (2 * tokens + 2 * trained)  # tokens, positions; targets and where they are
    return {"parameters": each.parameter * numbers // shards, "gradients": 0,
            "moments": each.moments * numbers // shards,
            "inputs": ids + 2 * FP32 * config.head_dim * tokens}  # cosines and sines


def _head(config: LlamaConfig, shards: int, tokens: int, trained: int, recompute: str,
          each: Bytes) -> tuple[int, dict[str, int]]:
    """In the loss: the gradient of the head is being rounded, or a chunk's logits turned into their gradient."""
    sizes, width = Sizes.of(config), config.hidden_size
    gathered = each.compute * sizes.vocabulary
    # FSDP frees the buffer that a gather arrived in when the next one arrives: here the head's own, or a block's.
    buffer = each.compute * sizes.block if config.tie_word_embeddings else gathered
    at_once = chunk_tokens(config.vocab_size)
    logits = min(at_once, trained) * config.vocab_size
    chunk = each.compute * logits + 2 * FP32 * min(logits, each.softmax)  # logits; the softmax in fp32, and its input
    # A lone process converts the matrix and sums into the parameter's own gradient; one chunk is not summed.
    sums = FP32 if trained > at_once else each.compute if shards > 1 else each.parameter
    copies = max(each.compute * sizes.vocabulary, chunk) if shards > 1 and sums == FP32 else chunk
    return 0, {
        "activations": _activations(config, tokens, recompute, each)
        + each.compute * width * (tokens + 2 * trained),  # norm's output, the trained part of it and its gradient
        "head": sums * sizes.vocabulary + copies,
        "gathered": gathered + (buffer if shards > 1 else 0) if each.compute < FP32 or shards > 1 else 0,
    }


def _last_block(config: LlamaConfig, shards: int, tokens: int, trained: int, recompute: str,
                each: Bytes) -> tuple[int, dict[str, int]]:
    """In the backward pass of the last block's feed-forward network."""
    sizes = Sizes.of(config)
    tied, lone = config.tie_word_embeddings, shards == 1
    # The head's gradient: reduced, with the buffer that it was sent from still there; or, tied, waiting to be whole.
    return 0 if tied else sizes.vocabulary, {
        "activations": _activations(config, tokens, recompute, each) + _again(config, tokens, recompute, each),
        "head": _waiting(config, shards, each),
        "gathered": 0 if lone else each.compute * ((sizes.vocabulary if tied else 0) + 2 * sizes.block),
        "reduction": 0 if lone else each.compute * sizes.block + (0 if tied else FP32 * sizes.vocabulary),
    }


def _first_block(config: LlamaConfig, shards: int, tokens: int, trained: int, recompute: str,
                 each: Bytes) -> tuple[int, dict[str, int]]:
    """In the backward pass of the first block, or where its gradients are copied for the reduction."""
    sizes, tied, lone = Sizes.of(config), config.tie_word_embeddings, shards == 1
    reduced = sizes.total - sizes.block - sizes.vocabulary
    per_token = kept(config, recompute, each.compute, compiled=each.compiled)
    return reduced, {
        "activations": per_token * tokens + _again(config, tokens, recompute, each),
        "head": _waiting(config, shards, each),
        "gathered": 0 if lone else each.compute * ((sizes.vocabulary if tied else 0) + sizes.block),
        "reduction": 0 if lone else (each.compute + FP32) * sizes.block,  # gradients, and the buffer of others
    }


def _embedding(config: LlamaConfig, shards: int, tokens: int, trained: int, recompute: str,
               each: Bytes) -> tuple[int, dict[str, int]]:
    """Where the gradient of the embedding is copied for the reduction."""
    sizes, tied, lone = Sizes.of(config), config.tie_word_embeddings, shards == 1
    gradient = (FP32 if lone else each.compute) * sizes.vocabulary
    return sizes.total - sizes.vocabulary, {
        "activations": each.compute * config.hidden_size * tokens,
        "head": _waiting(config, shards, each) if lone else 0,  # else it is in the same gradient by now
        "gathered": gradient if tied and not lone else 0,
        "reduction": gradient + (0 if lone else FP32 * sizes.vocabulary + FP32 * sizes.vocabulary // shards),
    }


def _with_adapters(config: LlamaConfig, shards: int, tokens: int, trained: int, recompute: str, each: Bytes,
                   lora: LoraConfig) -> Memory:
    """The larger of the two instants at which all activations are kept; frozen matrices have no gradients to gather."""
    sizes, numbers = Sizes.of(config), targets.trained(lora, config)
    parts = {name: size * numbers // sizes.total for name, size in _standing(config, shards, tokens, trained,
                                                                             each).items()}
    parts["parameters"] += sizes.frozen(config, lora, shards=shards)
    parts["gradients"] = each.gradient * numbers // shards
    parts["inputs"] = _standing(config, shards, tokens, trained, each)["inputs"]
    adapted = targets.adapted(lora, config).values()
    # Of an adapter: its thin product, scaled and not; with dropout its input, and which of it is kept.
    beside = sum(2 * each.compute * lora.rank + (each.compute + 1) * columns * (lora.dropout > 0)
                 for _, columns in adapted) * tokens
    if lora.dora:  # the product before it is scaled
        beside += sum(each.compute * rows for rows, _ in adapted) * tokens
    kept_beside = beside if recompute == "none" else 0
    largest = max((rows * columns for rows, columns in config.matrices().values()))
    unpacked = (FP32 + each.compute) * largest if lora.base == "nf4" or lora.dora else 0  # one matrix at a time
    width = 0.5 if lora.base == "nf4" else each.compute
    block = round(width * sizes.block)
    _, head = _head(config, shards, tokens, trained, recompute, each)
    _, last = _last_block(config, shards, tokens, trained, recompute, each)
    once = 0 if recompute == "none" else beside // config.num_hidden_layers
    instants = {
        "head": {"activations": head["activations"] + kept_beside, "gathered": head["gathered"],
                 "head": head["head"] - FP32 * sizes.vocabulary},
        "last block": {"activations": last["activations"] + kept_beside + once, "unpacked": unpacked,
                       "gathered": 2 * block if shards > 1 else 0, "head": 0}}
    return max((Memory(name, parts | now) for name, now in instants.items()), key=lambda memory: memory.allocated)


def _waiting(config: LlamaConfig, shards: int, each: Bytes) -> int:
    """The gradient of a tied head, which waits for the embedding's."""
    width = FP32 if shards == 1 else each.compute
    return width * Sizes.of(config).vocabulary if config.tie_word_embeddings else 0


def _activations(config: LlamaConfig, tokens: int, recompute: str, each: Bytes) -> int:
    """What all blocks keep, and the stream that leaves the last."""
    per_token = config.num_hidden_layers * kept(config, recompute, each.compute, compiled=each.compiled)
    return (per_token + each.compute * config.hidden_size) * tokens


def _again(config: LlamaConfig, tokens: int, recompute: str, each: Bytes) -> int:
    """What one block's backward pass computes again, and the gradients of activations in its feed-forward network."""
    again = kept(config, "none", each.compute) - kept(config, recompute, each.compute)
    # The product's gradient, those of its two factors, less the product itself, which is gone; and the stream's.
    gradients = each.compute * (2 * config.intermediate_size + 2 * config.hidden_size)
    return (again + gradients) * tokens
