"""Attention in plain torch with the same bits for a query whatever else is in its step, for CPUs.

A query is worked out among the 16 positions that its own is one of, each in its place, over the keys up to the last of
them. So what torch is asked for, and where in it the query stands, follows from the query's position alone: a token
gets the same bits as a decode, in a chunk of any size and next to anything.

Letters as in attention/base.py; L cached positions, Q query tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV, append_kv

POSITIONS = 16  # that are worked out together


@dataclass(frozen=True, slots=True)
class _Part:
    """Queries of an entry in one run of POSITIONS."""

    tokens: slice  # of the step
    places: slice  # in the run
    mask_QL: Tensor  # 0, or -inf after the query's own position


@dataclass(frozen=True, slots=True)
class _Entry:
    """lines: of the cache seen as [B * K * S, D], for each position and head up to the end of the last run. Positions
    that no token was written to have the last token's: a mask does not hide the NaN that they may hold."""

    lines: Tensor
    parts: list[_Part]


@dataclass(frozen=True, slots=True)
class _Step:
    batch: AttentionBatch
    entries: list[_Entry]


class InvariantTorchAttention:
    """Softmax and sums are in float32. Reads lengths on the host."""

    name = "torch"
    captures_chunks = False

    def __init__(self) -> None:
        self._step: _Step | None = None

    def append(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: AttentionBatch) -> None:
        append_kv(k_TKD, v_TKD, kv, batch)

    def attend(self, q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Tensor:
        if self._step is None or self._step.batch is not batch:
            self._step = _Step(batch, _entries(kv, batch))
        out_TND = torch.zeros_like(q_TND)  # tokens of no entry are padding
        for entry in self._step.entries:
            k_LKD, v_LKD = _lines_of(kv.k_BKSD, entry), _lines_of(kv.v_BKSD, entry)
            for part in entry.parts:
                q_QND = q_TND.new_zeros((POSITIONS, *q_TND.shape[1:]), dtype=torch.float32)
                q_QND[part.places] = q_TND[part.tokens]
                keys = part.mask_QL.shape[1]
                out_QND = _attend(q_QND, k_LKD[:keys], v_LKD[:keys], part.mask_QL, scale)
                out_TND[part.tokens] = out_QND[part.places].to(out_TND.dtype)
        return out_TND

    def rotate_and_attend(
        self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch, scale: float
    ) -> Tensor | None:
        return None


def _attend(q_QND: Tensor, k_LKD: Tensor, v_LKD: Tensor, mask_QL: Tensor, scale: float) -> Tensor:
    q_1NQD, k_1KLD, v_1KLD = (each.transpose(0, 1).unsqueeze(0) for each in (q_QND, k_LKD, v_LKD))
    out_1NQD = functional.scaled_dot_product_attention(
        q_1NQD, k_1KLD, v_1KLD, attn_mask=mask_QL, scale=scale, enable_gqa=True
    )
    return out_1NQD[0].transpose(0, 1)


def _lines_of(cache_BKSD: Tensor, entry: _Entry) -> Tensor:
    """float32[L, K, D]."""
    num_kv_heads, head_dim = cache_BKSD.shape[1], cache_BKSD.shape[3]
    return cache_BKSD.view(-1, head_dim).index_select(0, entry.lines).float().view(-1, num_kv_heads, head_dim)


def _entries(kv: LayerKV, batch: AttentionBatch) -> list[_Entry]:
    starts: list[int] = batch.query_start_E1.tolist()
    rows: list[int] = batch.rows_E.tolist()
    lengths: list[int] = batch.kv_len_E.tolist()
    spans = zip(rows, starts[:-1], starts[1:], lengths, strict=True)
    return [_entry(row, slice(start, stop), length, kv, batch) for row, start, stop, length in spans if stop > start]


def _entry(row: int, tokens: slice, length: int, kv: LayerKV, batch: AttentionBatch) -> _Entry:
    end = -(-length // POSITIONS) * POSITIONS
    at_L = torch.arange(end).clamp_(max=length - 1)
    blocks_L = batch.block_table_RC[row].index_select(0, at_L // kv.block_size).long()
    heads_K = torch.arange(kv.k_BKSD.shape[1])
    lines_LK = (blocks_L.unsqueeze(1) * len(heads_K) + heads_K) * kv.block_size + (at_L % kv.block_size).unsqueeze(1)
    first = length - (tokens.stop - tokens.start)  # position of the first query
    parts: list[_Part] = []
    for begin in range(first // POSITIONS * POSITIONS, length, POSITIONS):
        low, high = max(begin, first), min(begin + POSITIONS, length)
        mask_QL = torch.full((POSITIONS, begin + POSITIONS), -math.inf).triu_(begin + 1)
        own = slice(tokens.start + low - first, tokens.start + high - first)
        parts.append(_Part(own, slice(low - begin, high - begin), mask_QL))
    return _Entry(lines_LK.flatten(), parts)
