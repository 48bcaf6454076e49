"""Attention by Triton kernels, with the same bits for a query whatever else is in its step."""

from __future__ import annotations

from torch import Tensor

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV, append_kv
from gapless.kernels.invariant_attention import invariant_attention, invariant_tiles
from gapless.kernels.invariant_linear import shared_bytes


class InvariantTritonAttention:
    """Decodes and chunks in one launch, and where spans of keys are done apart one more to merge them. Never
    synchronises.

    `multiprocessors` of the device sets how many programs share a query's spans, which changes no bit.
    """

    name = "triton"
    captures_chunks = True

    def __init__(self, multiprocessors: int) -> None:
        self._multiprocessors = multiprocessors

    def append(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: AttentionBatch) -> None:
        append_kv(k_TKD, v_TKD, kv, batch)

    def attend(self, q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Tensor:
        group = q_TND.shape[1] // kv.k_BKSD.shape[1]
        tiles = invariant_tiles(q_TND.shape[2], q_TND.element_size(), group, shared_bytes())
        return invariant_attention(q_TND.contiguous(), kv, batch, scale, self._multiprocessors, tiles)

    def rotate_and_attend(
        self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch, scale: float
    ) -> Tensor | None:
        return None  # chunks are rotated apart, and decodes must not be rotated by other code
