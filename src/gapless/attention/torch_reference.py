"""Attention in plain torch on any device: the definition of the answer, and the backend of the CPU.

Letters as in attention/base.py; G query heads per key/value head, L cached positions, Q query tokens, X pairs of entry
and key/value head, Y such pairs times their columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV, append_kv

SIMILAR_SHARE = 0.7  # decodes this much shorter than the longest of their group start a new one …
SIMILAR_LENGTH = 32  # … if they are shorter by this many tokens too


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode entries whose caches are gathered together, padded to the longest."""

    entries: slice  # among the step's decodes, longest first
    tiles_Y: Tensor  # [S, D] tile of the cache for each X and column; padding repeats the entry's first tile
    stale_XL: Tensor  # lines that hold no token, in the last tile or in repetitions of a first one that is not full
    stale_lines: Tensor | None  # the same as indices into [X * L], where the host may look
    mask_E11L: Tensor  # 0, or -inf past the entry's length


@dataclass(frozen=True, slots=True)
class _Chunk:
    """An entry with several queries."""

    span: slice  # its tokens in the step
    length: int  # positions in its cache, this chunk's included
    tiles_Y: Tensor
    mask_QL: Tensor  # 0, or -inf after the query's own position


@dataclass(frozen=True, slots=True)
class _StepIndex:
    """Where a step's entries find their cache; its layers share it."""

    batch: AttentionBatch
    order_E: Tensor | None  # decodes longest first, and back; None: as they are
    back_E: Tensor | None
    groups: list[_DecodeGroup]
    chunks: list[_Chunk]


class TorchAttention:
    """Decodes run in batches; entries with more query tokens one by one. Softmax and sums are in float32."""

    name = "torch"
    captures_chunks = False

    def __init__(self) -> None:
        self._step: _StepIndex | None = None

    def append(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, batch: AttentionBatch) -> None:
        append_kv(k_TKD, v_TKD, kv, batch)

    def attend(self, q_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> Tensor:
        if self._step is None or self._step.batch is not batch:
            self._step = _index_step(kv, batch)
        step = self._step
        if batch.num_decodes == len(q_TND):
            return _decode_all(q_TND, kv, step, scale)
        out_TND = torch.zeros_like(q_TND)  # tokens of no entry are padding
        if batch.num_decodes:
            out_TND[: batch.num_decodes] = _decode_all(q_TND[: batch.num_decodes], kv, step, scale)
        for chunk in step.chunks:
            out_TND[chunk.span] = _prefill(q_TND[chunk.span], kv, chunk, scale)
        return out_TND

    def rotate_and_attend(
        self, qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch, scale: float
    ) -> Tensor | None:
        return None


def _index_step(kv: LayerKV, batch: AttentionBatch) -> _StepIndex:
    """On the CPU, decodes form groups of similar length, so that one long entry does not pad them all."""
    rows_E, lengths_E = batch.rows_E[: batch.num_decodes], batch.kv_len_E[: batch.num_decodes]
    chunks = _chunks(kv, batch)
    if not batch.num_decodes:
        return _StepIndex(batch, None, None, [], chunks)
    if rows_E.device.type != "cpu":
        whole = slice(0, batch.num_decodes)
        group = _decode_group(whole, rows_E, lengths_E, batch.max_kv, kv, batch)
        return _StepIndex(batch, None, None, [group], chunks)
    order_E = lengths_E.argsort(descending=True)
    rows_E, lengths_E = rows_E[order_E], lengths_E[order_E]
    lengths: list[int] = lengths_E.tolist()
    groups: list[_DecodeGroup] = []
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] + SIMILAR_LENGTH < lengths[begin] * SIMILAR_SHARE:
            span = slice(begin, end)
            groups.append(_decode_group(span, rows_E[span], lengths_E[span], lengths[begin], kv, batch))
            begin = end
    return _StepIndex(batch, order_E, order_E.argsort(), groups, chunks)


def _decode_group(
    entries: slice, rows_E: Tensor, lengths_E: Tensor, longest: int, kv: LayerKV, batch: AttentionBatch
) -> _DecodeGroup:
    device, block_size = rows_E.device, kv.block_size
    columns_C = torch.arange(-(-longest // block_size), device=device)
    length_E1 = lengths_E.unsqueeze(1)
    table_EC = batch.block_table_RC[:, : columns_C.numel()].index_select(0, rows_E)
    blocks_EC = torch.where(columns_C * block_size < length_E1, table_EC, table_EC[:, :1])
    at_L = torch.arange(columns_C.numel() * block_size, device=device)
    past_EL = at_L >= length_E1
    in_last_EL = at_L // block_size == (length_E1 - 1) // block_size
    stale_EL = past_EL & (in_last_EL | (at_L % block_size >= length_E1))
    stale_XL = stale_EL.repeat_interleave(kv.k_BKSD.shape[1], dim=0)
    mask_EL = torch.zeros(past_EL.shape, device=device).masked_fill_(past_EL, -math.inf)
    return _DecodeGroup(
        entries=entries,
        tiles_Y=_tiles(blocks_EC, kv),
        stale_XL=stale_XL,
        stale_lines=stale_XL.flatten().nonzero().flatten() if device.type == "cpu" else None,
        mask_E11L=mask_EL[:, None, None],
    )


def _chunks(kv: LayerKV, batch: AttentionBatch) -> list[_Chunk]:
    """Entries with several queries. Reads their sizes: a synchronisation on an accelerator."""
    num_entries, device = batch.rows_E.shape[0], batch.rows_E.device
    if batch.num_decodes == num_entries:
        return []
    starts: list[int] = batch.query_start_E1.tolist()
    lengths: list[int] = batch.kv_len_E.tolist()
    chunks: list[_Chunk] = []
    for entry in range(batch.num_decodes, num_entries):
        length, queries = lengths[entry], starts[entry + 1] - starts[entry]
        if not queries:
            continue
        blocks_1C = batch.block_table_RC.index_select(0, batch.rows_E[entry : entry + 1])[
            :, : -(-length // kv.block_size)
        ]
        mask_QL = torch.full((queries, length), -math.inf, device=device).triu_(length - queries + 1)
        chunks.append(_Chunk(slice(starts[entry], starts[entry + 1]), length, _tiles(blocks_1C, kv), mask_QL))
    return chunks


def _tiles(blocks_EC: Tensor, kv: LayerKV) -> Tensor:
    """Tiles of the cache seen as [B * K, S * D]: for each entry and key/value head, its columns one after the other."""
    num_kv_heads = kv.k_BKSD.shape[1]
    heads_K1 = torch.arange(num_kv_heads, device=blocks_EC.device).unsqueeze(1)
    return (blocks_EC.unsqueeze(1) * num_kv_heads + heads_K1).flatten()


def _gathered(cache_BKSD: Tensor, tiles_Y: Tensor) -> Tensor:
    """float32[Y * S, D]: the lines of these tiles, copied together."""
    block_size, head_dim = cache_BKSD.shape[2:]
    return cache_BKSD.view(-1, block_size * head_dim).index_select(0, tiles_Y).float().view(-1, head_dim)


def _decode_all(q_END: Tensor, kv: LayerKV, step: _StepIndex, scale: float) -> Tensor:
    if step.order_E is None or step.back_E is None:
        [group] = step.groups
        return _decode(q_END, kv, group, scale)
    sorted_END = q_END.index_select(0, step.order_E)
    outs = [_decode(sorted_END[group.entries], kv, group, scale) for group in step.groups]
    return torch.cat(outs).index_select(0, step.back_E)


def _decode(q_END: Tensor, kv: LayerKV, group: _DecodeGroup, scale: float) -> Tensor:
    """One query per entry: gather the blocks of every entry and mask what is past its length."""
    num_entries, num_kv_heads = q_END.shape[0], kv.k_BKSD.shape[1]

    def gathered(cache_BKSD: Tensor) -> Tensor:
        lines_ZD = _without_stale(_gathered(cache_BKSD, group.tiles_Y), group)
        return lines_ZD.view(num_entries, num_kv_heads, -1, lines_ZD.shape[1])

    q_EKGD = q_END.float().unflatten(1, (num_kv_heads, -1))
    out_EKGD = functional.scaled_dot_product_attention(
        q_EKGD, gathered(kv.k_BKSD), gathered(kv.v_BKSD), attn_mask=group.mask_E11L, scale=scale
    )
    return out_EKGD.flatten(1, 2).to(q_END.dtype)


def _without_stale(lines_ZD: Tensor, group: _DecodeGroup) -> Tensor:
    """Zero what no token has written: a mask does not hide a NaN."""
    if group.stale_lines is not None:  # touching those lines only is far quicker, but needs the mask on the host
        return lines_ZD.index_fill_(0, group.stale_lines, 0.0)
    return lines_ZD.masked_fill_(group.stale_XL.view(-1, 1), 0.0)


def _prefill(q_QND: Tensor, kv: LayerKV, chunk: _Chunk, scale: float) -> Tensor:
    """All queries of one entry over its cache."""
    num_kv_heads, head_dim = kv.k_BKSD.shape[1], kv.k_BKSD.shape[3]

    def gathered(cache_BKSD: Tensor) -> Tensor:
        return _gathered(cache_BKSD, chunk.tiles_Y).view(1, num_kv_heads, -1, head_dim)[:, :, : chunk.length]

    out_1NQD = functional.scaled_dot_product_attention(
        q_QND.float().transpose(0, 1).unsqueeze(0),
        gathered(kv.k_BKSD),
        gathered(kv.v_BKSD),
        attn_mask=chunk.mask_QL,
        scale=scale,
        enable_gqa=True,
    )
    return out_1NQD[0].transpose(0, 1).to(q_QND.dtype).contiguous()
