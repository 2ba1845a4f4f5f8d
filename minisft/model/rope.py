"""Rotary position embeddings: a query and a key are turned by an angle that grows with their position, so that their
dot product depends only on the distance between them (Su et al. 2021, "RoFormer", section 3.2).

Channel pairs are (i, i + E/2), the "rotate-half" layout of Hugging Face's checkpoints; Meta's files pair (2i, 2i + 1),
which weights.py permutes once while reading. Pair i turns by position · theta^(-2i/E).

Llama-3.1 and later stretch the slow pairs, those whose wavelength exceeds what pre-training saw, by `factor`, leave the
fast ones alone, and blend in between ("The Llama 3 Herd of Models" 2024, section 3.4.2; Meta's `apply_scaling`).
"""

import math

import torch
from torch import Tensor

from minisft.model.llama_config import LlamaConfig


def inverse_wavelengths(config: LlamaConfig, device: torch.device) -> Tensor:
    """(E/2,) radians by which each channel pair turns from one position to the next, in fp32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    radians = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return radians
    turns = scaling.original_max_position_embeddings * radians / (2 * math.pi)  # full turns in the old context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast pair, unchanged; 0: slow pair, stretched
    return keep * radians + (1 - keep) * radians / scaling.factor


def rotations(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions (T,): each (T, 1, E) in fp32, broadcast over the heads."""
    angles = positions.float()[:, None] * inverse_wavelengths(config, positions.device)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """(T, heads, E) -> (T, heads, E), turned in fp32 and rounded once."""
    cosine, sine = rotation
    first, second = x.float().chunk(2, dim=-1)
    return (torch.cat((first, second), dim=-1) * cosine + torch.cat((-second, first), dim=-1) * sine).to(x.dtype)
