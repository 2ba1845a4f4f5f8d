"""The memory of a training step on one GPU, by arithmetic from the shape of the network.

What stays all the time is 16 bytes a parameter over the shards: fp32 weight, gradient and two moments (Rajbhandari et
al. 2020, "ZeRO", section 3.1). What comes and goes is counted at the instants at which a step can need most, and the
largest of them is the peak:

    head          all activations are kept; the head's gradient is summed in fp32 beside the gathered matrix
    last block    all activations are kept, the last block's are recomputed, its gradients and theirs are made
    first block   one block's activations, but the gradients of all others are there, reduced
    embedding     no activations; the gradient of the embedding, whole, and its copy for the reduction

Every term is a tensor that exists, and is named after it. Checked against torch's FSDP memory tracker on simulated
ranks (tests/test_memory.py); a caching allocator reserves more than is allocated (estimate.py states the factor).
"""

# T tokens on one rank, L layers, D model width, A = H E width of the queries, K that of the keys, F feed-forward width,
# V vocabulary

from dataclasses import dataclass

from minisft.config import LoraConfig
from minisft.lora import targets
from minisft.model.flops import Sizes
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
    softmax: int = SOFTMAX  # logits whose softmax is taken at once; fewer fit into a CPU's cache
    compiled: bool = True  # layers, as on a GPU


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the instant that needs most, by part."""

    instant: str
    parts: dict[str, int]

    @property
    def allocated(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepMemory:
    """A training step on each of `shards` GPUs; `peak` is the memory it needs."""

    config: LlamaConfig
    shards: int
    tokens: int  # of a forward pass
    trained: int  # of these tokens
    recompute: str
    accumulates: bool = False  # the gradients of the step's earlier micro-batches are there
    each: Bytes = Bytes()
    lora: LoraConfig | None = None  # only its adapters are trained
    context: int = 1  # ranks that share a stream (context.py)

    def peak(self) -> Memory:
        config, each, shards, lora = self.config, self.each, self.shards, self.lora
        instants, trained = self._instants(), targets.trained(lora, config) if lora else Sizes.of(config).total
        state = {"parameters": each.parameter * trained // shards + (self._frozen(lora) if lora else 0),
                 "gradients": 0, "moments": each.moments * trained // shards,
                 # tokens, positions; targets and their places; cosines and sines
                 "inputs": 8 * (2 * self.tokens + 2 * self.trained) + 2 * FP32 * config.head_dim * self.tokens}
        if lora:
            instants = {name: (trained, parts) for name, parts in self._with_adapters(lora, instants).items()}
        elif shards == 1 and each.compute < each.parameter and each.compiled and self.recompute == "none":
            for name in ("head", "last block"):  # the compiler keeps the converted matrices for the backward pass
                instants[name][1]["gathered"] += each.compute * config.num_hidden_layers * Sizes.of(config).block
        found = [Memory(name, state | parts | {
            "gradients": each.gradient * (trained if self.accumulates else reduced) // shards})
            for name, (reduced, parts) in instants.items()]
        return max(found, key=lambda memory: memory.allocated)

    def _instants(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Instant -> how many gradients are reduced by then, and the bytes of what comes and goes."""
        config, each, tokens, trained = self.config, self.each, self.tokens, self.trained
        sizes, compute, tied = Sizes.of(config), self.each.compute, config.tie_word_embeddings
        sharded = self.shards > 1 or not each.parameter  # FSDP also brings parameters from the host
        kept, stream, vocabulary = self._kept(compiled=each.compiled), compute * config.hidden_size, sizes.vocabulary
        activations = (config.num_hidden_layers * kept + stream) * tokens  # of all blocks; the stream that leaves them
        # One block, recomputed. Gradients: the product's and its two factors', less the product, which is gone; stream.
        again = (self._kept("none") - self._kept() + 2 * compute * config.intermediate_size + 2 * stream) * tokens
        gradient = (compute if sharded else FP32) * vocabulary  # of the embedding; a tied head's waits for it
        at_once = chunk_tokens(config.vocab_size)
        logits = min(at_once, trained) * config.vocab_size
        chunk = compute * logits + 2 * FP32 * min(logits, each.softmax)  # logits; the softmax in fp32, and its input
        # A lone process converts the matrix and sums into the parameter's own gradient; one chunk is not summed.
        sums = FP32 if trained > at_once else compute if sharded else each.parameter
        # FSDP frees the buffer that a gather arrived in when the next one arrives: here the head's own, or a block's.
        buffer = sharded * compute * (sizes.block if tied else vocabulary)
        return {
            # In the loss: the head's gradient is being rounded, or a chunk's logits are turned into their gradient.
            "head": (0, {
                "activations": activations + stream * (tokens + 2 * trained),  # norm; trained part, its gradient
                "head": sums * vocabulary + max(chunk, compute * vocabulary * (sharded and sums == FP32)),
                "gathered": (compute * vocabulary + buffer) * (compute < FP32 or sharded)}),
            # In its feed-forward network. The head's gradient is reduced, and the buffer it was sent from still there.
            "last block": (0 if tied else vocabulary, {
                "activations": activations + again, "head": tied * gradient,
                "gathered": sharded * compute * (tied * vocabulary + 2 * sizes.block),
                "reduction": sharded * (compute * sizes.block + (not tied) * FP32 * vocabulary)}),
            # There, or when its gradients are copied for the reduction, beside the buffer of others.
            "first block": (sizes.total - sizes.block - vocabulary, {
                "activations": kept * tokens + again, "head": tied * gradient,
                "gathered": sharded * compute * (tied * vocabulary + sizes.block),
                "reduction": sharded * (compute + FP32) * sizes.block}),
            # When its gradient is copied for the reduction; that of a tied head is in it by now, if sharded.
            "embedding": (sizes.total - vocabulary, {
                "activations": stream * tokens, "head": (not sharded) * tied * gradient,
                "gathered": sharded * tied * gradient,
                "reduction": gradient + sharded * (FP32 * vocabulary + FP32 * vocabulary // self.shards)})}

    def _with_adapters(self, lora: LoraConfig,
                       instants: dict[str, tuple[int, dict[str, int]]]) -> dict[str, dict[str, int]]:
        """The two instants with all activations; frozen matrices have no gradients to gather."""
        compute, sizes, adapted = self.each.compute, Sizes.of(self.config), targets.adapted(lora, self.config).values()
        # Of an adapter: its thin product, scaled and not; with dropout its input, and which of it is kept; with DoRA
        # the sum before it is scaled, in fp32.
        beside = self.tokens * sum(2 * compute * lora.rank + (compute + 1) * columns * (lora.dropout > 0)
                                   + FP32 * rows * lora.dora for rows, columns in adapted)
        kept, once = (beside, 0) if self.recompute == "none" else (0, beside // self.config.num_hidden_layers)
        largest = max(rows * columns for rows, columns in self.config.matrices().values())
        block = round((0.5 if lora.base == "nf4" else compute) * sizes.block)
        head, last = instants["head"][1], instants["last block"][1]
        return {"head": {"activations": head["activations"] + kept, "gathered": head["gathered"],
                         "head": head["head"] - FP32 * sizes.vocabulary},
                "last block": {"activations": last["activations"] + kept + once, "head": 0,
                               # one matrix at a time
                               "unpacked": (FP32 + compute) * largest * (lora.base == "nf4" or lora.dora),
                               "gathered": 2 * block * (self.shards > 1)}}

    def _frozen(self, lora: LoraConfig) -> int:
        """Bytes of the frozen network on each GPU. NF4's statistics are on all of them (lora/nf4.py)."""
        wide = Sizes.of(self.config).total * (FP32 if lora.base == "fp32" else 2)
        if lora.base != "nf4":
            return wide // self.shards
        packed = sum(rows * columns for rows, columns in self.config.matrices().values())
        return (wide - 2 * packed + packed // 2) // self.shards + packed // targets.BLOCK

    def _kept(self, recompute: str = "", *, compiled: bool = False) -> int:
        """Bytes that a block keeps of each token for its backward pass (model/llama.py)."""
        config, compute = self.config, self.each.compute
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        shared, inner, lse = config.num_key_value_heads * config.head_dim, config.intermediate_size, 4
        exchanged = max(config.num_key_value_heads, self.context) * config.head_dim if self.context > 1 else shared
        return {
            # input, its norm, q, k, v, attention, stream between, its norm; gate, its SiLU (the compiler computes it
            # again), up, their product. q, k, v of a shared stream are kept exchanged, attention as it comes and goes.
            "none": compute * (4 * width + (2 + (self.context > 1)) * heads + 2 * exchanged
                               + (3 if compiled else 4) * inner)
            + lse * config.num_attention_heads + 8,
            # input, q, k, v, attention, o, gate
            "selective": compute * (2 * width + 2 * heads + 2 * shared + inner) + lse * config.num_attention_heads,
            "full": compute * width,
        }[recompute or self.recompute]
