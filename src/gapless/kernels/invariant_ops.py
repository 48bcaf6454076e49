"""The layer pieces of models/layers.py in Triton, with the same bits for a token whatever else is in its step.

Norms, rotation and embedding take a program or a line for each token as they are; no norm is part of a product, where
its sums would be cut as the product's tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV
from gapless.kernels.invariant_linear import OUT_TILES, invariant_gated_linear, invariant_linear
from gapless.kernels.normed import LayerMaps, Normed
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.rope_append import rope_append


class InvariantTritonOps:
    """Implements models/layers.py `LayerOps`. For one stream; the first call must not be in a graph's capture: it
    allocates counters that every later one shares."""

    def __init__(self) -> None:
        self._arrived: Tensor | None = None

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Normed:
        return Normed(add_rms_norm(None, x_TH, weight_H, eps))

    def rope_append(self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch) -> Tensor:
        return rope_append(qkv_TM, rotation, kv, batch)

    def linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        if self._arrived is None:
            self._arrived = torch.zeros(OUT_TILES, dtype=torch.int32, device=weight_OI.device)
        return invariant_linear(x.x_TH, weight_OI, bias_O, self._arrived)

    def gated_linear(self, x: Normed, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return invariant_gated_linear(x.x_TH, weight_OI, bias_O)

    def add_linear(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, residual_TO: Tensor, norm_O: Tensor, eps: float
    ) -> Normed:
        return Normed(add_rms_norm(self.linear(Normed(x_TI), weight_OI, bias_O), residual_TO, norm_O, eps))

    def prepare(
        self,
        head_OI: Tensor,
        layers: LayerMaps,
        sizes: Sequence[int],
        seconds_of: Callable[[Callable[[], object]], float],
        *,
        also: Sequence[int] = (),
    ) -> None:
        """There is no choice."""
