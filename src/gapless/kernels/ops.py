"""The layer pieces of models/layers.py as fused Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.kernels.choice import Kind, LinearChoices, Seconds, multiply
from gapless.kernels.dependent import is_hopper
from gapless.kernels.linear import MOST_TILES
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.rope_append import rope_append


class TritonOps:
    """Implements models/layers.py `LayerOps`.

    choices  where the choice of linear kernels is kept; None: nowhere.
    """

    def __init__(self, choices: Path | None = None) -> None:
        self._choices = LinearChoices(choices)
        self._arrived: Tensor | None = None

    def add_rms_norm(self, update_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return add_rms_norm(update_TH, residual_TH, weight_H, eps)

    def rope_append(
        self, qkv_TM: Tensor, qk_norm_2D: Tensor | None, eps: float, rope_PD: Tensor, kv: LayerKV, batch: AttentionBatch
    ) -> Tensor:
        return rope_append(qkv_TM, qk_norm_2D, eps, rope_PD, kv, batch)

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self._multiply(x_TI, weight_OI, bias_O, gated=False)

    def gated_linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return self._multiply(x_TI, weight_OI, bias_O, gated=True)

    def prepare(
        self, linear: Sequence[Tensor], gated: Sequence[Tensor], sizes: Sequence[int], seconds_of: Seconds
    ) -> None:
        if not is_hopper() or not linear:
            return
        kinds: dict[Kind, list[Tensor]] = {}
        for weights, is_gated in ((linear, False), (gated, True)):
            for weight_OI in weights:
                kinds.setdefault(Kind.of(weight_OI, gated=is_gated), []).append(weight_OI)
        self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=linear[0].device)
        self._choices.prepare(kinds, sizes, self._arrived, seconds_of)

    def _multiply(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, gated: bool) -> Tensor:
        tiles = self._choices.get(weight_OI, len(x_TI), gated=gated) if self._arrived is not None else None
        arrived = x_TI if self._arrived is None else self._arrived
        return multiply(x_TI, weight_OI, bias_O, tiles, arrived, gated=gated)
