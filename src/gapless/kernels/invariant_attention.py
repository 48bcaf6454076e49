# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false
"""Causal attention over the paged cache with the same bits for a query whatever else is in its step.

Decodes and chunks go the same way: a program takes a tile of one entry's query tokens, as paged_prefill.py cuts them.
Keys are cut where their position is a multiple of SPAN, and a span's into tiles of fixed size. A query goes through the
tiles of a span in their order, and the spans are merged in theirs; one that it sees nothing of changes no bit. Either a
program does all spans of its queries, or it does some of them and leaves the merging to a second kernel, which is the
same arithmetic: that is where few queries over many keys keep a GPU busy, and no more than a matter of time.

Multiplications and additions are not fused here: a compiler that is free to fuse may do so in one place and not in
another. U spans of a query; other letters as in attention/base.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.kernels.dependent import dependent_launch, follow
from gapless.kernels.online_softmax import LOG2_E, fold_tile
from gapless.kernels.paged_prefill import PrefillTiles, find_tile

SPAN = 512  # positions; a multiple of every tile
FAR_BELOW = tl.constexpr(-1.0e30)  # any score: what has seen no key yet weighs nothing
MERGED_AT_ONCE = tl.constexpr(8)  # spans that are asked for before the first is needed
MOST_PAIRS = 1024  # of tiles and key/value heads: as many keep a GPU busy without cutting
MOST_BYTES = 256 * 2**20  # of what spans leave behind
WAVES = 8  # of programs for each multiprocessor that cutting aims at


@triton.jit
def merge_span(
    largest_M: tl.tensor,
    total_M: tl.tensor,
    sum_MD: tl.tensor,
    span_largest_M: tl.tensor,
    span_total_M: tl.tensor,
    span_sum_MD: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take one more span into a running softmax. Returns the new (largest_M, total_M, sum_MD)."""
    new_largest_M = tl.maximum(largest_M, span_largest_M)
    shrink_M = tl.exp2(largest_M - new_largest_M)
    weight_M = tl.exp2(span_largest_M - new_largest_M)
    total_M = total_M * shrink_M + span_total_M * weight_M
    sum_MD = sum_MD * shrink_M[:, None] + span_sum_MD * weight_M[:, None]
    return new_largest_M, total_M, sum_MD


@triton.jit(do_not_specialize=["num_entries", "spans"])
def invariant_attention_kernel(
    q_TND: tl.tensor,
    k_BKSD: tl.tensor,
    v_BKSD: tl.tensor,
    out_TND: tl.tensor,
    sum_TNUD: tl.tensor,
    largest_TNU: tl.tensor,
    total_TNU: tl.tensor,
    rows_E: tl.tensor,
    query_start_E1: tl.tensor,
    kv_len_E: tl.tensor,
    block_table_RC: tl.tensor,
    table_stride: tl.tensor,
    scale_log2: tl.tensor,
    num_entries: tl.tensor,
    spans: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    SINGLE: tl.constexpr,
    APART: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """With SINGLE, each entry has one token. With APART, spans are left to merge_spans_kernel."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    flat = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of an entry first
    kv_head = tl.program_id(1)
    if SINGLE:
        entry, first_token, num_queries, tile_start = flat, flat, 1, 0
    else:
        entry, first_token, num_queries, tile_start = find_tile(query_start_E1, flat, 0, num_entries, TOKENS)
    if tile_start >= num_queries:
        return
    length = tl.load(kv_len_E + entry)
    cached = length - num_queries
    end = tl.minimum(cached + tile_start + TOKENS, length)
    begin = tl.program_id(2) * SPAN
    if begin >= end:
        return
    table_at = block_table_RC + tl.load(rows_E + entry).to(tl.int64) * table_stride
    follow(DEPENDENT)

    row_M = tl.arange(0, BLOCK_M)
    dim_D = tl.arange(0, DIM_TILE)
    token_N = tl.arange(0, BLOCK_N)
    query_M = tile_start + row_M // GROUP
    valid_M = (row_M < TOKENS * GROUP) & (query_M < num_queries)
    in_dim = dim_D[None, :] < HEAD_DIM
    head_M = kv_head * GROUP + row_M % GROUP
    line_M = (first_token + query_M).to(tl.int64) * HEADS + head_M
    at_MD = line_M[:, None] * HEAD_DIM + dim_D[None, :]
    q_MD = tl.load(q_TND + at_MD, mask=valid_M[:, None] & in_dim, other=0.0)

    largest_M = tl.full((BLOCK_M,), FAR_BELOW, tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    sum_MD = tl.zeros((BLOCK_M, DIM_TILE), tl.float32)
    for span_begin in tl.range(begin, end, tl.num_programs(2) * SPAN):
        span_largest_M = tl.full((BLOCK_M,), FAR_BELOW, tl.float32)
        span_total_M = tl.zeros((BLOCK_M,), tl.float32)
        span_sum_MD = tl.zeros((BLOCK_M, DIM_TILE), tl.float32)
        for start in tl.range(span_begin, tl.minimum(span_begin + SPAN, end), BLOCK_N):
            position_N = start + token_N
            seen_N = position_N < end
            block_N = tl.load(table_at + position_N // BLOCK_SIZE, mask=seen_N, other=0).to(tl.int64)
            slot_N = (block_N * KV_HEADS + kv_head) * BLOCK_SIZE + position_N % BLOCK_SIZE
            at_ND = slot_N[:, None] * HEAD_DIM + dim_D[None, :]
            k_ND = tl.load(k_BKSD + at_ND, mask=seen_N[:, None] & in_dim, other=0.0)
            v_ND = tl.load(v_BKSD + at_ND, mask=seen_N[:, None] & in_dim, other=0.0)
            score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
            score_MN = tl.where(position_N[None, :] <= cached + query_M[:, None], score_MN, float("-inf"))
            span_largest_M, span_total_M, span_sum_MD = fold_tile(
                score_MN, v_ND, span_largest_M, span_total_M, span_sum_MD
            )
        if APART:
            unit_M = line_M * spans + span_begin // SPAN
            tl.store(largest_TNU + unit_M, span_largest_M, mask=valid_M)
            tl.store(total_TNU + unit_M, span_total_M, mask=valid_M)
            unit_at = sum_TNUD + unit_M[:, None] * HEAD_DIM + dim_D[None, :]
            tl.store(unit_at, span_sum_MD, mask=valid_M[:, None] & in_dim)
        else:
            largest_M, total_M, sum_MD = merge_span(
                largest_M, total_M, sum_MD, span_largest_M, span_total_M, span_sum_MD
            )
    if not APART:
        mean_MD = sum_MD / total_M[:, None]
        tl.store(out_TND + at_MD, mean_MD.to(out_TND.dtype.element_ty), mask=valid_M[:, None] & in_dim)


@triton.jit(do_not_specialize=["spans"])
def merge_spans_kernel(
    sum_TNUD: tl.tensor,
    largest_TNU: tl.tensor,
    total_TNU: tl.tensor,
    positions_T: tl.tensor,
    out_TND: tl.tensor,
    spans: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SPAN: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Merge the spans that one token's query of one head sees."""
    token = tl.program_id(0)
    position = tl.load(positions_T + token)
    follow(DEPENDENT)
    count = tl.minimum(position // SPAN + 1, spans)  # a token of no entry may have any position
    dim_D = tl.arange(0, DIM_TILE)
    in_dim = dim_D[None, :] < HEAD_DIM
    line = token.to(tl.int64) * HEADS + tl.program_id(1)
    largest_1 = tl.full((1,), FAR_BELOW, tl.float32)
    total_1 = tl.zeros((1,), tl.float32)
    sum_1D = tl.zeros((1, DIM_TILE), tl.float32)
    for start in tl.range(0, count, MERGED_AT_ONCE):
        for nth in tl.static_range(MERGED_AT_ONCE):
            unit_1 = line * spans + start + nth + tl.arange(0, 1)
            there_1 = start + nth + tl.arange(0, 1) < count
            span_largest_1 = tl.load(largest_TNU + unit_1, mask=there_1, other=FAR_BELOW)
            span_total_1 = tl.load(total_TNU + unit_1, mask=there_1, other=0.0)
            unit_at = sum_TNUD + unit_1[:, None] * HEAD_DIM + dim_D[None, :]
            span_sum_1D = tl.load(unit_at, mask=there_1[:, None] & in_dim, other=0.0)
            largest_1, total_1, sum_1D = merge_span(
                largest_1, total_1, sum_1D, span_largest_1, span_total_1, span_sum_1D
            )
    mean_1D = sum_1D / total_1[:, None]
    tl.store(out_TND + line * HEAD_DIM + dim_D[None, :], mean_1D.to(out_TND.dtype.element_ty), mask=in_dim)


def invariant_tiles(head_dim: int, itemsize: int, group: int, shared: int) -> PrefillTiles:
    """One for decodes and chunks. shared: bytes of a program; nothing but the stages may follow from it."""
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    wide = dim_tile * itemsize > 256
    block_n = 32 if wide else 64
    stages = (shared - 64 * dim_tile * itemsize) // (2 * block_n * dim_tile * itemsize)
    return PrefillTiles(
        block_m=max(64, triton.next_power_of_2(group)),
        block_n=block_n,
        num_warps=8 if wide else 4,
        num_stages=max(1, min(3, stages)),
    )


def invariant_attention(
    q_TND: Tensor,
    kv: LayerKV,
    batch: AttentionBatch,
    scale: float,
    multiprocessors: int,
    tiles: PrefillTiles,
    most_pairs: int = MOST_PAIRS,
) -> Tensor:
    """Attention of all entries: contiguous [T, N, D]. Queries are contiguous."""
    tokens, heads, head_dim = q_TND.shape
    entries, num_kv_heads = len(batch.rows_E), kv.k_BKSD.shape[1]
    group = heads // num_kv_heads
    single = batch.num_decodes == entries
    num_tiles = entries if single else tokens // (tiles.block_m // group) + entries
    spans, pairs = triton.cdiv(batch.max_kv, SPAN), num_tiles * num_kv_heads
    apart = spans > 1 and pairs <= most_pairs and tokens * heads * spans * head_dim * 4 <= MOST_BYTES
    out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    units = (tokens, heads, spans) if apart else (0, 0, 0)
    sum_TNUD = torch.empty((*units, head_dim), dtype=torch.float32, device=q_TND.device)
    largest_TNU, total_TNU = (torch.empty(units, dtype=torch.float32, device=q_TND.device) for _ in range(2))
    left = (sum_TNUD, largest_TNU, total_TNU) if apart else (out_TND, out_TND, out_TND)
    shape = {"HEAD_DIM": head_dim, "DIM_TILE": max(16, triton.next_power_of_2(head_dim)), "SPAN": SPAN}
    programs = min(spans, triton.cdiv(WAVES * multiprocessors, pairs)) if apart else 1
    invariant_attention_kernel[num_tiles, num_kv_heads, programs](
        q_TND,
        kv.k_BKSD,
        kv.v_BKSD,
        out_TND,
        *left,
        batch.rows_E,
        batch.query_start_E1,
        batch.kv_len_E,
        batch.block_table_RC,
        batch.block_table_RC.stride(0),
        scale * LOG2_E,
        entries,
        spans,
        **shape,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_SIZE=kv.block_size,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        SINGLE=single,
        APART=apart,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=False,
        **dependent_launch(),
    )
    if apart:
        merge_spans_kernel[tokens, heads](
            *left,
            batch.positions_T,
            out_TND,
            spans,
            **shape,
            HEADS=heads,
            num_warps=1,
            enable_fp_fusion=False,
            **dependent_launch(),
        )
    return out_TND
