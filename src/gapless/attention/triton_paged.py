"""Attention by this project's Triton kernels: needs nothing but torch and Triton on an accelerator."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV, append_kv
from gapless.kernels.paged_decode import paged_decode
from gapless.kernels.paged_prefill import paged_prefill

MAX_ARRIVED = 65536

Prefill = Callable[[Tensor, Tensor, LayerKV, AttentionBatch, float], None]


@functools.cache
def gluon_kernel() -> tuple[Prefill, Callable[[Tensor, LayerKV], bool]] | None:
    """The prefill kernel for Hopper, and what says where it runs. None: this Triton lacks what it is written in."""
    try:  # Gluon is experimental: any version may move its names
        from gapless.kernels.gluon_prefill import gluon_prefill, runs
    except (ImportError, AttributeError):
        return None
    return gluon_prefill, runs


def choose_prefill(q_TND: Tensor, kv: LayerKV) -> Prefill:
    """The fastest kernel for entries after the decodes."""
    gluon = gluon_kernel()
    return gluon[0] if gluon is not None and gluon[1](q_TND, kv) else paged_prefill


class TritonAttention:
    """Two launches: decodes split over their KV, other entries tiled over their queries; a batch of decodes alone is
    rotated, appended and attended to in one. Never synchronises.

    `multiprocessors` of the device sets into how many units decodes are cut. For one stream: decodes count the units
    that are done in memory which the first call allocates and every later one shares, so that call must not be in a
    graph's capture.
    """

    name = "triton"
    captures_chunks = True

    def __init__(self, multiprocessors: int) -> None:
        self._multiprocessors = multiprocessors
        self._arrived_P: Tensor | None = None

    def append(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: AttentionBatch) -> None:
        append_kv(k_TKD, v_TKD, kv, batch)

    def attend(self, q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Tensor:
        out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
        num_decodes = batch.num_decodes
        if num_decodes:
            paged_decode(
                q_TND[:num_decodes],
                out_TND[:num_decodes],
                kv,
                batch,
                scale,
                self._multiprocessors,
                arrived_P=self._arrived(num_decodes * kv.k_BKSD.shape[1], q_TND.device),
            )
        if num_decodes < batch.rows_E.shape[0]:
            choose_prefill(q_TND, kv)(q_TND, out_TND, kv, batch, scale)
        return out_TND

    def rotate_and_attend(
        self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch, scale: float
    ) -> Tensor | None:
        entries = batch.rows_E.shape[0]
        if batch.num_decodes < entries:
            return None
        num_kv_heads, head_dim = kv.k_BKSD.shape[1], kv.k_BKSD.shape[3]
        qkv_TXD = qkv_TM.view(entries, -1, head_dim)
        shape = (entries, qkv_TXD.shape[1] - 2 * num_kv_heads, head_dim)
        out_TND = torch.empty(shape, dtype=qkv_TM.dtype, device=qkv_TM.device)
        arrived_P = self._arrived(entries * num_kv_heads, qkv_TM.device)
        paged_decode(qkv_TXD, out_TND, kv, batch, scale, self._multiprocessors, arrived_P=arrived_P, rotation=rotation)
        return out_TND

    def _arrived(self, pairs: int, device: torch.device) -> Tensor | None:
        """int32 zeros, one at least per pair of entry and key/value head; kernels leave zeros. None: too many pairs."""
        if self._arrived_P is None:
            self._arrived_P = torch.zeros(MAX_ARRIVED, dtype=torch.int32, device=device)
        return self._arrived_P if pairs <= MAX_ARRIVED else None  # never anew: graphs know its address
