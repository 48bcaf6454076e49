"""Rotary position embedding: frequencies of each scaling kind, the table of a model, and its application.

Letters: T tokens, X heads, D head size, P positions. A table row holds D/2 cosines, then D/2 sines.
Sources: RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071), Llama 3.1 model card; numbers agree with transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gapless.config import RopeConfig
from gapless.errors import CorruptModelError


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position, float32 [head_dim / 2], and the factor to multiply cosines and sines with."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    if rope.kind == "default":
        return 1.0 / wavelengths, 1.0
    if rope.kind == "linear":
        return 1.0 / wavelengths / rope.factor, 1.0
    if rope.original_max_position < 1:
        raise CorruptModelError(f"rope scaling {rope.kind!r} needs original_max_position_embeddings in config.json")
    if rope.kind == "llama3":
        return _llama3(1.0 / wavelengths, rope), 1.0
    return _yarn(wavelengths, rope, head_dim), _yarn_attention_factor(rope)


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended by turns per trained context."""
    if rope.high_freq_factor == rope.low_freq_factor:
        raise CorruptModelError("rope scaling 'llama3' needs high_freq_factor different from low_freq_factor")
    wavelength = 2 * math.pi / inv_freq
    turns = rope.original_max_position / wavelength
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept) * (inv_freq / rope.factor) + kept * inv_freq
    stretched = torch.where(turns < rope.low_freq_factor, inv_freq / rope.factor, inv_freq)
    between = (turns >= rope.low_freq_factor) & (turns <= rope.high_freq_factor)
    return torch.where(between, blended, stretched)


def _yarn(wavelengths: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """A linear ramp over the dimensions between keeping a frequency and dividing it by the factor."""

    def dimension_turning(times: float) -> float:
        log_base = 2 * math.log(rope.theta)
        return head_dim * math.log(rope.original_max_position / (times * 2 * math.pi)) / log_base

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    divided = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return divided / (rope.factor * wavelengths) + (1 - divided) / wavelengths


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rope_table(rope: RopeConfig, head_dim: int, max_position: int, device: torch.device) -> Tensor:
    """Cosines and sines of every position, float32 [max_position, head_dim]; computed on the CPU for every device."""
    inv_freq, factor = inverse_frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inv_freq)
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1).to(device)


def rotate(x_TXD: Tensor, rope_TD: Tensor) -> Tensor:
    """Rotate each head by its token's angles: dimension i with dimension i + D/2, as Hugging Face weights expect.

    Computed in float32 and returned in x's dtype.
    """
    cos_TD, sin_TD = rope_TD.unsqueeze(1).chunk(2, dim=-1)
    x32_TXD = x_TXD.float()
    first, second = x32_TXD.chunk(2, dim=-1)
    rotated_TXD = torch.empty_like(x32_TXD)
    to_first, to_second = rotated_TXD.chunk(2, dim=-1)
    torch.addcmul(first * cos_TD, second, sin_TD, value=-1, out=to_first)
    torch.addcmul(second * cos_TD, first, sin_TD, out=to_second)
    return rotated_TXD.to(x_TXD.dtype)
