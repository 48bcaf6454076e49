# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Causal attention of entries with several query tokens over the paged cache.

A program takes a tile of one entry's query tokens, all heads that share a key/value head together: row m of the tile
is token m // GROUP, head m % GROUP. Keys that every row sees need no mask; the rest of the loop masks the diagonal.
The tiles of all entries are numbered in a row, which depends on the number of tokens and entries only: a captured graph
stays right for any lengths.
FlashAttention-2: Dao 2023, arXiv 2307.08691.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.kernels.online_softmax import LOG2_E, fold_tile

ENTRIES_TILE = tl.constexpr(128)


@triton.jit
def find_tile(
    query_start_E1: tl.tensor,
    flat: tl.tensor,
    num_decodes: tl.tensor,
    num_entries: tl.tensor,
    TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Which tile has the number `flat`: (entry, its first token, its queries, first query of the tile).

    An entry's tiles begin at (its first token) // TOKENS + (its place), tokens and places counted from the decodes:
    that leaves each of them room enough, and none to others. The queries may end before the tile begins.
    """
    begun = 0
    for first in tl.range(0, num_entries, ENTRIES_TILE):
        place_X = first + tl.arange(0, ENTRIES_TILE)
        inside = place_X < num_entries
        token_X = tl.load(query_start_E1 + num_decodes + place_X, mask=inside, other=0) - num_decodes
        begun += tl.sum((inside & (token_X // TOKENS + place_X <= flat)).to(tl.int32), axis=0)
    place = begun - 1
    entry = num_decodes + place
    first_token = tl.load(query_start_E1 + entry)
    num_queries = tl.load(query_start_E1 + entry + 1) - first_token
    tile_start = (flat - (first_token - num_decodes) // TOKENS - place) * TOKENS
    return entry, first_token, num_queries, tile_start


@triton.jit(do_not_specialize=["num_decodes", "num_entries"])
def prefill_kernel(
    q_TND: tl.tensor,
    k_BKSD: tl.tensor,
    v_BKSD: tl.tensor,
    out_TND: tl.tensor,
    rows_E: tl.tensor,
    query_start_E1: tl.tensor,
    kv_len_E: tl.tensor,
    block_table_RC: tl.tensor,
    table_stride: tl.tensor,
    q_stride: tl.tensor,
    scale_log2: tl.tensor,
    num_decodes: tl.tensor,
    num_entries: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    flat = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows of an entry first
    kv_head = tl.program_id(1)
    entry, first_token, num_queries, tile_start = find_tile(query_start_E1, flat, num_decodes, num_entries, TOKENS)
    if tile_start >= num_queries:
        return
    length = tl.load(kv_len_E + entry)
    cached = length - num_queries

    row_M = tl.arange(0, BLOCK_M)
    dim_D = tl.arange(0, DIM_TILE)
    token_N = tl.arange(0, BLOCK_N)
    query_M = tile_start + row_M // GROUP
    valid_M = (row_M < TOKENS * GROUP) & (query_M < num_queries)
    in_tile = valid_M[:, None] & (dim_D[None, :] < HEAD_DIM)
    head_M = kv_head * GROUP + row_M % GROUP
    token_M = (first_token + query_M).to(tl.int64)
    q_MD = tl.load(
        q_TND + token_M[:, None] * q_stride + head_M[:, None] * HEAD_DIM + dim_D[None, :], mask=in_tile, other=0.0
    )
    table_at = block_table_RC + tl.load(rows_E + entry).to(tl.int64) * table_stride

    end = tl.minimum(cached + tile_start + TOKENS, length)
    seen_by_all = (cached + tile_start + 1) // BLOCK_N * BLOCK_N
    largest_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    sum_MD = tl.zeros((BLOCK_M, DIM_TILE), tl.float32)
    for start in tl.range(0, seen_by_all, BLOCK_N):
        position_N = start + token_N
        block_N = tl.load(table_at + position_N // BLOCK_SIZE).to(tl.int64)
        slot_N = (block_N * KV_HEADS + kv_head) * BLOCK_SIZE + position_N % BLOCK_SIZE
        at_ND = slot_N[:, None] * HEAD_DIM + dim_D[None, :]
        if DIM_TILE == HEAD_DIM:
            k_ND = tl.load(k_BKSD + at_ND)
            v_ND = tl.load(v_BKSD + at_ND)
        else:
            k_ND = tl.load(k_BKSD + at_ND, mask=dim_D[None, :] < HEAD_DIM, other=0.0)
            v_ND = tl.load(v_BKSD + at_ND, mask=dim_D[None, :] < HEAD_DIM, other=0.0)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
        largest_M, total_M, sum_MD = fold_tile(score_MN, v_ND, largest_M, total_M, sum_MD)
    for start in tl.range(seen_by_all, end, BLOCK_N):
        position_N = start + token_N
        seen_N = position_N < end
        block_N = tl.load(table_at + position_N // BLOCK_SIZE, mask=seen_N, other=0).to(tl.int64)
        slot_N = (block_N * KV_HEADS + kv_head) * BLOCK_SIZE + position_N % BLOCK_SIZE
        at_ND = slot_N[:, None] * HEAD_DIM + dim_D[None, :]
        seen_ND = seen_N[:, None] & (dim_D[None, :] < HEAD_DIM)
        k_ND = tl.load(k_BKSD + at_ND, mask=seen_ND, other=0.0)
        v_ND = tl.load(v_BKSD + at_ND, mask=seen_ND, other=0.0)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
        score_MN = tl.where(position_N[None, :] <= cached + query_M[:, None], score_MN, float("-inf"))
        largest_M, total_M, sum_MD = fold_tile(score_MN, v_ND, largest_M, total_M, sum_MD)

    mean_MD = sum_MD / total_M[:, None]
    out_at = out_TND + (token_M[:, None] * (KV_HEADS * GROUP) + head_M[:, None]) * HEAD_DIM + dim_D[None, :]
    tl.store(out_at, mean_MD.to(out_TND.dtype.element_ty), mask=in_tile)


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """How the prefill kernel is cut up."""

    block_m: int  # rows of a program: query tokens times the heads of a group
    block_n: int  # cached tokens that a program reads at a time
    num_warps: int
    num_stages: int


def prefill_tiles(head_dim: int, itemsize: int, group: int, max_query: int, amd: bool) -> PrefillTiles:
    """Query tiles of 128 rows, 64 where a head is wide, in float32 or where no entry fills more."""
    wide = triton.next_power_of_2(head_dim) * itemsize > 256
    small = wide or max_query * group <= 64
    block_m = max(64 if small else 128, triton.next_power_of_2(group))
    return PrefillTiles(
        block_m=block_m,
        block_n=32 if wide else 64,
        num_warps=4 if small else 8,
        num_stages=1 if amd else 3,
    )


def paged_prefill(
    q_TND: Tensor,
    out_TND: Tensor,
    kv: LayerKV,
    batch: AttentionBatch,
    scale: float,
    tiles: PrefillTiles | None = None,
) -> None:
    """Attention of the entries after the decodes, written to their tokens in out_TND (contiguous)."""
    num_heads, head_dim = q_TND.shape[1:]
    num_kv_heads = kv.k_BKSD.shape[1]
    group = num_heads // num_kv_heads
    amd = torch.version.hip is not None
    tiles = tiles or prefill_tiles(head_dim, kv.k_BKSD.element_size(), group, batch.max_query, amd)
    num_entries = batch.rows_E.shape[0] - batch.num_decodes
    query_tiles = (q_TND.shape[0] - batch.num_decodes) // (tiles.block_m // group) + num_entries
    prefill_kernel[(query_tiles, num_kv_heads)](
        q_TND,
        kv.k_BKSD,
        kv.v_BKSD,
        out_TND,
        batch.rows_E,
        batch.query_start_E1,
        batch.kv_len_E,
        batch.block_table_RC,
        batch.block_table_RC.stride(0),
        q_TND.stride(0),
        scale * LOG2_E,
        batch.num_decodes,
        num_entries,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv.block_size,
        BLOCK_M=tiles.block_m,
        DIM_TILE=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_N=tiles.block_n,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
