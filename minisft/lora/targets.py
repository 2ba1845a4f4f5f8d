"""The matrices that have an adapter, and how it is scaled; nothing here needs torch.

An adapter adds a product of two thin matrices to a frozen one, W + s B A, with A (r, I) and B (O, r) trained:

    LoRA     s = alpha / r              Hu et al. 2021, section 4.1
    rsLoRA   s = alpha / sqrt(r)        Kalajdzievski 2023: what the adapter adds does not shrink as r grows
    DoRA     rows of W + s B A scaled to trained lengths       Liu et al. 2024, section 4
"""

from fnmatch import fnmatchcase
from math import sqrt

from minisft.config import LoraConfig
from minisft.errors import UserError
from minisft.model.llama_config import MATRICES, LlamaConfig

OTHERS = ("lm_head", "model.embed_tokens")  # never adapted
BLOCK = 64  # numbers that NF4 scales together (nf4.py)


def scale(lora: LoraConfig) -> float:
    """The factor s of B A."""
    return lora.alpha / (sqrt(lora.rank) if lora.rslora else lora.rank)


def adapted(lora: LoraConfig, network: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name -> (O, I) of each matrix that has an adapter."""
    return {name: shape for name, shape in network.matrices().items() if _matches(name, *lora.targets)}


def ranks(lora: LoraConfig, network: LlamaConfig) -> dict[str, int] | None:
    """Rank of each matrix that has an adapter, by its name; None if the whole model is trained."""
    return dict.fromkeys(adapted(lora, network), lora.rank) if lora.rank else None


def trained(lora: LoraConfig, network: LlamaConfig) -> int:
    """Number of parameters in all adapters."""
    return sum(lora.rank * (rows + columns) + lora.dora * rows for rows, columns in adapted(lora, network).values())


def check(lora: LoraConfig, network: LlamaConfig) -> None:
    """Raise UserError for patterns that match nothing, a rank that is too high, and matrices that NF4 cannot hold."""
    names = network.matrices()
    known = (f"their names are model.layers.N.self_attn.{{{','.join(MATRICES[:4])}}} and model.layers.N.mlp.{{"
             f"{','.join(MATRICES[4:])}}}, and a pattern may leave out the front")
    others = "the embedding and the head have no adapters: train them with everything else, lora.rank = 0"
    wrong = [f"lora.targets: {pattern!r} matches none of the {len(names)} matrices; "
             f"{others if any(_matches(name, pattern) for name in OTHERS) else known}"
             for pattern in lora.targets if not any(_matches(name, pattern) for name in names)]
    if lora.rank > (most := max(min(shape) for shape in names.values())):
        wrong.append(f"lora.rank: {lora.rank} is more than the {most} that a matrix of this model can have at all; "
                     "choose less, or 0 to train the matrices themselves")
    if not lora.targets:
        wrong.append("lora.targets: empty, so nothing would be trained; name at least one matrix")
    if lora.base == "nf4":
        odd = sorted({shape for shape in names.values() if shape[1] % 2 or shape[0] * shape[1] % BLOCK})
        wrong += [f"lora.base: a matrix of {rows} x {columns} does not divide into NF4's blocks of {BLOCK}; "
                  "choose bf16" for rows, columns in odd]
    if wrong:
        raise UserError("\n  ".join(wrong))


def _matches(name: str, *patterns: str) -> bool:
    """`q_proj`, `layers.0.*` and the whole name match by themselves: a pattern may begin at any part of the name."""
    return any(fnmatchcase(f".{name}", f"*.{pattern}") for pattern in patterns)
