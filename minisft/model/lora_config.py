"""What is adapted, and how: the settings of LoRA, and the matrices that its patterns name.

An adapter adds a product of two thin matrices to a frozen one, W + s B A, with A (r, I) and B (O, r) trained:

    LoRA     s = alpha / r              Hu et al. 2021, section 4.1
    rsLoRA   s = alpha / sqrt(r)        Kalajdzievski 2023: what the adapter adds does not shrink as r grows
    DoRA     rows of W + s B A scaled to trained lengths       Liu et al. 2024, section 4

Nothing here needs torch.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt

from minisft.errors import UserError
from minisft.model.llama_config import LlamaConfig

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHERS = ("lm_head", "model.embed_tokens")  # never adapted
BLOCK = 64  # numbers that NF4 scales together (nf4.py)


@dataclass(frozen=True)
class LoRA:
    """Settings of the adapters, and of the frozen weights: `base` is "bf16", "fp32" or "nf4"."""

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = MATRICES
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    base: str = "bf16"

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)

    def is_target(self, name: str) -> bool:
        """Whether the matrix called `name` (`model.layers.0.mlp.up_proj`) has an adapter."""
        return any(_matches(name, pattern) for pattern in self.targets)

    def adapted(self, config: LlamaConfig) -> dict[str, tuple[int, int]]:
        """Name -> (O, I) of each matrix that has an adapter."""
        return {name: shape for name, shape in matrices(config).items() if self.is_target(name)}

    def trained(self, config: LlamaConfig) -> int:
        """Numbers in all adapters."""
        return sum(self.rank * (rows + columns) + self.dora * rows for rows, columns in self.adapted(config).values())

    def check(self, config: LlamaConfig) -> None:
        """Raise UserError for patterns that match nothing, and for matrices that NF4 cannot hold."""
        names = matrices(config)
        known = (f"their names are model.layers.N.self_attn.{{{','.join(MATRICES[:4])}}} and model.layers.N.mlp.{{"
                 f"{','.join(MATRICES[4:])}}}, of which a pattern may leave the front away")
        others = "the embedding and the head have no adapters: train them with everything else, lora.rank = 0"
        wrong = [f"lora.targets: {pattern!r} matches none of the {len(names)} matrices; "
                 f"{others if any(_matches(name, pattern) for name in OTHERS) else known}"
                 for pattern in self.targets if not any(_matches(name, pattern) for name in names)]
        if self.rank > (most := max(min(shape) for shape in names.values())):
            wrong.append(f"lora.rank: {self.rank} is more than the {most} that a matrix of this model can have at all; "
                         "choose less, or 0 to train the matrices themselves")
        if not self.targets:
            wrong.append("lora.targets: empty, so nothing would be trained; name at least one matrix")
        if self.base == "nf4":
            odd = sorted({shape for shape in names.values() if shape[1] % 2 or shape[0] * shape[1] % BLOCK})
            wrong += [f"lora.base: a matrix of {rows} x {columns} has no whole number of NF4's blocks of {BLOCK}; "
                      "choose bf16" for rows, columns in odd]
        if wrong:
            raise UserError("\n  ".join(wrong))


def _matches(name: str, pattern: str) -> bool:
    """`q_proj`, `layers.0.*` and the whole name match by themselves: a pattern may begin at any part of the name."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def matrices(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name -> (O, I) of the linear matrices of all blocks, in the order of their products."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = dict(zip(MATRICES, ((heads, width), (shared, width), (shared, width), (width, heads), (inner, width),
                                 (inner, width), (width, inner)), strict=True))
    return {f"model.layers.{i}.{'self_attn' if leaf in MATRICES[:4] else 'mlp'}.{leaf}": shape
            for i in range(config.num_hidden_layers) for leaf, shape in shapes.items()}
