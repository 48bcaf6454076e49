"""Attention by this project's Triton kernels: needs nothing but torch and Triton on an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV, append_kv
from gapless.kernels.paged_decode import paged_decode
from gapless.kernels.paged_prefill import paged_prefill


class TritonAttention:
    """Two launches: decodes split over their KV, other entries tiled over their queries. Never synchronises.

    `multiprocessors` of the device sets how many splits a decode gets.
    """

    name = "triton"

    def __init__(self, multiprocessors: int) -> None:
        self._multiprocessors = multiprocessors

    def append(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: AttentionBatch) -> None:
        append_kv(k_TKD, v_TKD, kv, batch)

    def attend(self, q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Tensor:
        out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
        num_decodes = batch.num_decodes
        if num_decodes:
            paged_decode(q_TND[:num_decodes], out_TND[:num_decodes], kv, batch, scale, self._multiprocessors)
        if num_decodes < batch.rows_E.shape[0]:
            paged_prefill(q_TND, out_TND, kv, batch, scale)
        return out_TND
