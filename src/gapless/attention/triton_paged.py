"""Attention by this project's Triton kernels: needs nothing but torch and Triton on an accelerator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV, append_kv
from gapless.kernels.paged_decode import paged_decode
from gapless.kernels.paged_prefill import paged_prefill

MAX_ARRIVED = 65536

Prefill = Callable[[Tensor, Tensor, LayerKV, AttentionBatch, float], None]


@functools.cache
def gluon_kernels() -> GluonKernels | None:
    """The kernels for Hopper, and what says where they run. None: this Triton lacks what they are written in."""
    try:  # Gluon is experimental: any version may move its names
        from gapless.kernels.gluon_decode import gluon_decode
        from gapless.kernels.gluon_decode import runs as decodes
        from gapless.kernels.gluon_prefill import gluon_prefill
        from gapless.kernels.gluon_prefill import runs as prefills
    except (ImportError, AttributeError):
        return None
    return GluonKernels(gluon_decode, decodes, gluon_prefill, prefills)


class GluonKernels(NamedTuple):
    """See gluon_decode.py and gluon_prefill.py."""

    decode: Callable[..., None]
    decodes: Callable[[Tensor, Tensor, LayerKV, AttentionBatch, int], bool]
    prefill: Prefill
    prefills: Callable[[Tensor, LayerKV], bool]


def choose_prefill(q_TND: Tensor, kv: LayerKV) -> Prefill:
    """The fastest kernel for entries after the decodes."""
    gluon = gluon_kernels()
    return gluon.prefill if gluon is not None and gluon.prefills(q_TND, kv) else paged_prefill


def choose_decode(
    q_END: Tensor, out_END: Tensor, kv: LayerKV, batch: AttentionBatch, multiprocessors: int
) -> Callable[..., None]:
    """The fastest kernel for decodes; its arguments are paged_decode's."""
    gluon = gluon_kernels()
    fits = gluon is not None and gluon.decodes(q_END, out_END, kv, batch, multiprocessors)
    return gluon.decode if gluon is not None and fits else paged_decode


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
            q_END, out_END = q_TND[:num_decodes], out_TND[:num_decodes]
            arrived_P = self._arrived(num_decodes * kv.k_BKSD.shape[1], q_TND.device)
            self._decode(q_END, out_END, kv, batch, scale, arrived_P)
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
        self._decode(qkv_TXD, out_TND, kv, batch, scale, arrived_P, rotation)
        return out_TND

    def _decode(
        self,
        q_END: Tensor,
        out_END: Tensor,
        kv: LayerKV,
        batch: AttentionBatch,
        scale: float,
        arrived_P: Tensor | None,
        rotation: HeadRotation | None = None,
    ) -> None:
        decode = choose_decode(q_END, out_END, kv, batch, self._multiprocessors)
        decode(q_END, out_END, kv, batch, scale, self._multiprocessors, arrived_P=arrived_P, rotation=rotation)

    def _arrived(self, pairs: int, device: torch.device) -> Tensor | None:
        """int32 zeros, one at least per pair of entry and key/value head; kernels leave zeros. None: too many pairs."""
        if self._arrived_P is None:
            self._arrived_P = torch.zeros(MAX_ARRIVED, dtype=torch.int32, device=device)
        return self._arrived_P if pairs <= MAX_ARRIVED else None  # never anew: graphs know its address
