"""Attention in plain torch on any device: the definition of the answer, and the backend of the CPU.

Letters as in attention/base.py; G query heads per key/value head, L cached positions, Q query tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV, append_kv

QUERY_TILE = 512  # query tokens of one entry whose scores exist at a time


class TorchAttention:
    """Decodes run as one batch; entries with more query tokens one by one. Softmax and sums are in float32."""

    name = "torch"

    def append(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: AttentionBatch) -> None:
        append_kv(k_TKD, v_TKD, kv, batch)

    def attend(self, q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Tensor:
        num_decodes, num_entries = batch.num_decodes, batch.rows_E.shape[0]
        if num_decodes == num_entries:
            return _decode(q_TND[:num_decodes], kv, batch, scale)
        out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
        if num_decodes:
            out_TND[:num_decodes] = _decode(q_TND[:num_decodes], kv, batch, scale)
        starts = batch.query_start_E1.tolist()  # a synchronisation on an accelerator; graphs hold decodes only
        lengths = batch.kv_len_E.tolist()
        for entry in range(num_decodes, num_entries):
            span = slice(starts[entry], starts[entry + 1])
            out_TND[span] = _prefill(q_TND[span], kv, batch, entry, lengths[entry], scale)
        return out_TND


def _decode(q_END: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Tensor:
    """One query per entry: gather the blocks of every entry up to max_kv, mask what is past its length."""
    num_entries, num_heads, head_dim = q_END.shape
    num_kv_heads, block_size = kv.k_BKSD.shape[1], kv.block_size
    columns = -(-batch.max_kv // block_size)
    padded = columns * block_size
    rows_E = batch.rows_E[:num_entries]
    blocks_EC = batch.block_table_RC[:, :columns].index_select(0, rows_E)

    heads_K = torch.arange(num_kv_heads, device=q_END.device)
    tiles = (blocks_EC.unsqueeze(1) * num_kv_heads + heads_K.unsqueeze(1)).flatten()  # one [S, D] tile per E, K, C

    def gathered(cache_BKSD: Tensor) -> Tensor:
        tiles_XSD = cache_BKSD.view(-1, block_size * head_dim).index_select(0, tiles)
        return tiles_XSD.view(num_entries * num_kv_heads, padded, head_dim).float()

    past_EL = torch.arange(padded, device=q_END.device) >= batch.kv_len_E[:num_entries].unsqueeze(1)
    past_EKL = past_EL.unsqueeze(1).expand(-1, num_kv_heads, -1).flatten(0, 1).unsqueeze(1)
    q_XGD = q_END.float().reshape(num_entries * num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores_XGL = torch.bmm(q_XGD, gathered(kv.k_BKSD).transpose(1, 2)).mul_(scale)
    weights_XGL = scores_XGL.masked_fill_(past_EKL, -math.inf).softmax(dim=-1)
    out_XGD = torch.bmm(weights_XGL, _zeroed(gathered(kv.v_BKSD), past_EKL.squeeze(1)))
    return out_XGD.view(num_entries, num_heads, head_dim).to(q_END.dtype)


def _zeroed(v_XLD: Tensor, past_XL: Tensor) -> Tensor:
    """A weight of zero does not hide a NaN in memory that was never written."""
    if v_XLD.device.type == "cpu":  # touching only those rows is four times as fast, but reads the mask on the host
        v_XLD[past_XL.nonzero(as_tuple=True)] = 0.0
        return v_XLD
    return v_XLD.masked_fill_(past_XL.unsqueeze(-1), 0.0)


def _prefill(q_QND: Tensor, kv: LayerKV, batch: AttentionBatch, entry: int, length: int, scale: float) -> Tensor:
    """All queries of one entry over its cache, which has `length` tokens."""
    num_queries, _, head_dim = q_QND.shape
    num_kv_heads, block_size = kv.k_BKSD.shape[1], kv.block_size
    row = batch.rows_E[entry : entry + 1]
    blocks_C = batch.block_table_RC.index_select(0, row)[0, : -(-length // block_size)]

    def gathered(cache_BKSD: Tensor) -> Tensor:
        tiles_KCSD = cache_BKSD.index_select(0, blocks_C).transpose(0, 1)
        return tiles_KCSD.reshape(num_kv_heads, -1, head_dim)[:, :length].float()

    k_KLD, v_KLD = gathered(kv.k_BKSD), gathered(kv.v_BKSD)
    positions_L = torch.arange(length, device=q_QND.device)
    out_QND = torch.empty_like(q_QND)
    for start in range(0, num_queries, QUERY_TILE):
        tile = q_QND[start : start + QUERY_TILE]
        seen = length - num_queries + start + tile.shape[0]  # positions that the tile's last query sees
        q_KGQD = tile.float().unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        scores_KGQL = torch.matmul(q_KGQD.flatten(1, 2), k_KLD[:, :seen].transpose(1, 2)).mul_(scale)
        scores_KGQL = scores_KGQL.view(num_kv_heads, -1, tile.shape[0], seen)
        future_QL = positions_L[:seen] > positions_L[seen - tile.shape[0] : seen].unsqueeze(1)
        weights_KGQL = scores_KGQL.masked_fill_(future_QL, -math.inf).softmax(dim=-1)
        out_KGQD = torch.matmul(weights_KGQL.flatten(1, 2), v_KLD[:, :seen]).view_as(q_KGQD)
        out_QND[start : start + QUERY_TILE] = out_KGQD.permute(2, 0, 1, 3).flatten(1, 2)
    return out_QND
