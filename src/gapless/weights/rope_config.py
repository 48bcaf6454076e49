"""Rotary position embedding as config.json describes it, in its old and its new spelling."""

from __future__ import annotations

from typing import Literal

from gapless.config import RopeConfig
from gapless.errors import UnsupportedModelError
from gapless.weights.fields import Fields

DEFAULT_THETA = 10000.0


def parse_rope(config: Fields, max_position: int) -> RopeConfig:
    """The rope of a config.json with `max_position` as its max_position_embeddings.

    transformers 5 writes one table `rope_parameters` with rope_theta in it; older files have rope_theta beside an
    optional `rope_scaling`, whose kind is called rope_type or, older still, type.
    Raises UnsupportedModelError for a kind other than default, linear, llama3 and yarn; CorruptModelError.
    """
    scaling = config.table("rope_parameters") or config.table("rope_scaling") or Fields({}, config.where)
    if any(isinstance(value, dict) for value in scaling.raw.values()):
        raise UnsupportedModelError(f"{scaling.where}: rope that differs between layers is not supported")
    for name in ("partial_rotary_factor", "rope_pct"):
        if scaling.number(name, config.number(name, 1.0)) != 1.0:
            raise UnsupportedModelError(f"{config.where}: {name} other than 1 is not supported")
    theta = scaling.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    kind = _kind(scaling)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=scaling.number("factor"))
    if kind == "llama3":
        low = scaling.number("low_freq_factor")
        high = scaling.number("high_freq_factor")
        if high <= low:
            raise scaling.bad("high_freq_factor", f"above low_freq_factor ({low:g})")
        original = scaling.integer("original_max_position_embeddings")
        return RopeConfig(
            kind=kind,
            theta=theta,
            factor=scaling.number("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
    original = scaling.integer("original_max_position_embeddings", max_position)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=scaling.number("factor", max_position / original),
        original_max_position=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=scaling.optional_number("attention_factor"),
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
    )


def _kind(scaling: Fields) -> Literal["default", "linear", "llama3", "yarn"]:
    kind = scaling.text("rope_type") or scaling.text("type") or "default"
    if kind == "default" or kind == "linear" or kind == "llama3" or kind == "yarn":
        return kind
    raise UnsupportedModelError(
        f"{scaling.where}: rope of kind {kind!r} is not supported; supported are default, linear, llama3 and yarn"
    )
