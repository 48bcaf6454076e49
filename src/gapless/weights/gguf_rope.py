"""Rotary position embedding as GGUF metadata describes it, rewritten as config.json's rope_parameters."""

from __future__ import annotations

import math

import numpy as np

from gapless.errors import UnsupportedModelError
from gapless.weights.fields import Fields

_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192


def rope_parameters(
    metadata: Fields, arch: str, head_dim: int, max_position: int, factors: np.ndarray | None
) -> dict[str, object]:
    """A rope_parameters table. `factors` is the tensor rope_freqs.weight [head_dim / 2], if the file has one.

    A file states llama3 scaling only through that tensor, by which each frequency is divided. It is recognised by
    computing it again from its largest value with the parameters that all Llama 3.x models share.
    Raises UnsupportedModelError for other factors and other kinds of scaling, CorruptModelError.
    """
    theta = metadata.number(f"{arch}.rope.freq_base", 10000.0)
    kind = metadata.text(f"{arch}.rope.scaling.type") or "none"
    factor = metadata.number(f"{arch}.rope.scaling.factor", metadata.number(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" and metadata.raw.get(f"{arch}.rope.scale_linear") is not None and factor != 1.0:
        kind = "linear"  # how files were written before the kind had a key
    scaled = factors is not None and not np.all(factors == 1.0)
    if kind not in ("none", "linear", "yarn") or (scaled and kind != "none"):
        raise UnsupportedModelError(f"{metadata.where}: rope scaling of kind {kind!r} is not supported")
    if scaled and factors is not None:
        return {"rope_type": "llama3", "rope_theta": theta, **_llama3(metadata.where, theta, head_dim, factors)}
    if kind == "none" or factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    for key in ("attn_factor", "yarn_attn_factor", "yarn_log_multiplier", "yarn_ext_factor"):
        if metadata.number(f"{arch}.rope.scaling.{key}", 1.0) != 1.0:
            raise UnsupportedModelError(f"{metadata.where}: yarn with {key} other than 1 is not supported")
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": metadata.integer(
            f"{arch}.rope.scaling.original_context_length", max_position
        ),
        "beta_fast": metadata.number(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
    }


def llama3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """What llama3 scaling divides each frequency by, [head_dim / 2] float64.

    Waves shorter than original / high keep their frequency, those longer than original / low are slowed by `factor`,
    and those between are blended.
    """
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    blend = (_LLAMA3_ORIGINAL / waves - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    blend = np.clip(blend, 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)


def _llama3(where: str, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, object]:
    factor = float(factors.max())
    if factors.shape != (head_dim // 2,) or not math.isfinite(factor) or factor <= 1.0:
        raise UnsupportedModelError(f"{where}: rope_freqs.weight does not fit a head size of {head_dim}")
    if not np.allclose(factors, llama3_factors(theta, head_dim, factor), rtol=1e-3):
        raise UnsupportedModelError(f"{where}: rope_freqs.weight holds factors other than those of Llama 3.x")
    return {
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }
