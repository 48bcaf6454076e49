"""The layer pieces of models/layers.py as fused Triton kernels."""

from __future__ import annotations

from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.rope_append import rope_append
from gapless.kernels.silu_mul import silu_mul


class TritonOps:
    """Implements models/layers.py `LayerOps`."""

    def add_rms_norm(self, update_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return add_rms_norm(update_TH, residual_TH, weight_H, eps)

    def rope_append(
        self, qkv_TM: Tensor, qk_norm_2D: Tensor | None, eps: float, rope_PD: Tensor, kv: LayerKV, batch: AttentionBatch
    ) -> Tensor:
        return rope_append(qkv_TM, qk_norm_2D, eps, rope_PD, kv, batch)

    def silu_mul(self, gate_up_TF2: Tensor) -> Tensor:
        return silu_mul(gate_up_TF2)
