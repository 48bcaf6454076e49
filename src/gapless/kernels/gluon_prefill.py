# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""Prefill attention for Hopper in Gluon: as paged_prefill, but with bulk copies, asynchronous products, warps by role.

One warp copies: a box of the cache for every KV block and 64 dimensions, into rings of tiles in shared memory. Two
groups of four warps take 64 rows each of a tile of query rows (row m: token m // GROUP, head m % GROUP) and go through
the entry's keys from the last to the first, so that masks are needed at the start only. Scores of the next tile are
multiplied while the softmax of this one is taken.
FlashAttention-3: Shah et al. 2024, arXiv 2407.08608.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.kernels.online_softmax import LOG2_E

_COLUMNS = gl.constexpr(64)  # of a box: 128 bytes, what a swizzled row holds


@gluon.jit
def _locate(item, work, KV_HEADS: gl.constexpr, TOKENS: gl.constexpr):
    """Entry e's tiles of queries are numbered from (its first token) // TOKENS + e on, which leaves room for all."""
    rows_E, query_start_E1, kv_len_E, num_decodes, num_entries, tiles = work
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    flat = tiles - 1 - item // KV_HEADS  # the longest rows of an entry first
    entry = 0
    for begin in range(0, num_entries, 128):
        entry_X = begin + gl.arange(0, 128, layout=LAYOUT)
        start_X = gl.load(query_start_E1 + num_decodes + entry_X, mask=entry_X < num_entries, other=0)
        before_X = (entry_X < num_entries) & ((start_X - num_decodes) // TOKENS + entry_X <= flat)
        entry += gl.sum(before_X.to(gl.int32), axis=0)
    entry -= 1
    at = num_decodes + entry
    first = gl.load(query_start_E1 + at)
    queries = gl.load(query_start_E1 + at + 1) - first
    length = gl.load(kv_len_E + at)
    row = gl.load(rows_E + at)
    start = (flat - (first - num_decodes) // TOKENS - entry) * TOKENS
    return item % KV_HEADS, row, first, queries, length, start


@gluon.jit
def _span(queries, length, start, BLOCK_N: gl.constexpr, TOKENS: gl.constexpr):
    """Tiles of keys that a tile of queries sees, and how many of them are seen whole by all of its rows."""
    cached = length - queries
    end = gl.minimum(cached + start + TOKENS, length)
    tiles = (end + BLOCK_N - 1) // BLOCK_N
    return tiles, gl.minimum((cached + start + 1) // BLOCK_N, tiles - 1)


@gluon.jit
def _item(turn, PERSISTENT: gl.constexpr):
    """What this program does in its turn: the longest first, in every other turn from the other end."""
    place = gl.program_id(0)
    if PERSISTENT:
        place = gl.where(turn % 2 == 0, place, gl.num_programs(0) - 1 - place)
    return turn * gl.num_programs(0) + place


@gluon.jit
def _copy_tile(cache, blocks, ring, full, empty, used, head, KV_HEADS: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    BLOCK_SIZE: gl.constexpr = cache.block_shape[0]
    COUNT: gl.constexpr = BLOCK_N // BLOCK_SIZE
    PARTS: gl.constexpr = HEAD_DIM // _COLUMNS
    stage = used % STAGES
    mbarrier.wait(empty.index(stage), (used // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * HEAD_DIM * 2)
    for n in gl.static_range(COUNT):
        line = (blocks[n] * KV_HEADS + head) * BLOCK_SIZE
        for part in gl.static_range(PARTS):
            box = ring.index((stage * PARTS + part) * COUNT + n)
            tma.async_copy_global_to_shared(cache, [line, part * _COLUMNS], full.index(stage), box)


@gluon.jit
def _copy(caches, rings, bars, work, block_table_RC, table_stride, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, TOKENS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PERSISTENT: gl.constexpr):
    k_cache, v_cache = caches
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty, _ = bars
    BLOCK_SIZE: gl.constexpr = k_cache.block_shape[0]
    items = work[5] * KV_HEADS
    used = 0
    turns = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    for turn in range(turns):
        item = _item(turn, PERSISTENT)
        if item < items:
            head, row, first, queries, length, start = _locate(item, work, KV_HEADS, TOKENS)
            if start < queries:
                count, whole = _span(queries, length, start, BLOCK_N, TOKENS)
                table_at = block_table_RC + row.to(gl.int64) * table_stride
                last = (length - 1) // BLOCK_SIZE
                for i in range(count):
                    column = (count - 1 - i) * (BLOCK_N // BLOCK_SIZE)
                    blocks = ()
                    for n in gl.static_range(BLOCK_N // BLOCK_SIZE):
                        blocks = blocks + (gl.load(table_at + gl.minimum(column + n, last)),)
                    _copy_tile(k_cache, blocks, k_ring, k_full, k_empty, used, head, KV_HEADS, BLOCK_N, HEAD_DIM, STAGES)
                    _copy_tile(v_cache, blocks, v_ring, v_full, v_empty, used, head, KV_HEADS, BLOCK_N, HEAD_DIM, STAGES)
                    used += 1


@gluon.jit
def _softmax(score_MN, largest_M, scale_log2, MASKED: gl.constexpr):
    """New largest scores, weights, and by how much older sums shrink."""
    new_M = gl.maximum(largest_M, gl.max(score_MN, axis=1))
    base_M = new_M * scale_log2
    if MASKED:
        base_M = gl.where(new_M == float("-inf"), 0.0, base_M)
    weight_MN = gl.exp2(score_MN * scale_log2 - base_M[:, None])
    return new_M, weight_MN, gl.exp2(largest_M * scale_log2 - base_M)


@gluon.jit
def _wipe(v_blocks, block, valid, COUNT: gl.constexpr, PARTS: gl.constexpr):
    """Zero the rows of a tile of values that no token was written to: no weight would hide a NaN in them."""
    BLOCK_SIZE: gl.constexpr = v_blocks.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    row_S = gl.arange(0, BLOCK_SIZE, layout=gl.SliceLayout(1, LAYOUT))
    for n in range(valid // BLOCK_SIZE, COUNT):
        for part in gl.static_range(PARTS):
            box = v_blocks.index(block + part * COUNT + n)
            value_SD = box.load(LAYOUT)
            box.store(gl.where((n * BLOCK_SIZE + row_S < valid)[:, None], value_SD, 0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _step(q_MD, k_tiles, v_tiles, bars, used, first, state, limit_M, first_key, scale_log2, WHICH: gl.constexpr, MASKED: gl.constexpr, PING: gl.constexpr):
    """Scores of tile `used` and their softmax, while the values of the tile before go into the sum.

    The sum is left in flight: it is waited for when the next product has been asked for.
    """
    weight_MN, shrink_M, largest_M, total_M, sum_MD = state
    k_full, k_empty, v_full, v_empty, turn_bar = bars
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    k_stage = used % STAGES
    v_stage = (used - 1) % STAGES
    mbarrier.wait(k_full.index(k_stage), used // STAGES & 1)
    if PING:
        mbarrier.wait(turn_bar.index(WHICH), (used & 1) ^ WHICH ^ 1)
    zero_MN = gl.zeros((q_MD.shape[0], BLOCK_N), gl.float32, SCORE)
    score_MN = warpgroup_mma(q_MD, k_tiles.index(k_stage).permute((1, 0)), zero_MN, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), (used - 1) // STAGES & 1)
    sum_MD = warpgroup_mma_wait(1, deps=[sum_MD])
    mbarrier.arrive(v_empty.index((used - 2) % STAGES), pred=used - first > 1)
    sum_MD = sum_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, sum_MD.type.layout))[:, None]
    sum_MD = warpgroup_mma(weight_MN, v_tiles.index(v_stage), sum_MD, is_async=True)
    if PING:
        mbarrier.arrive(turn_bar.index(1 - WHICH))
    score_MN = warpgroup_mma_wait(1, deps=[score_MN])
    mbarrier.arrive(k_empty.index(k_stage))
    if MASKED:
        key_N = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORE))
        score_MN = gl.where(key_N[None, :] <= limit_M[:, None], score_MN, float("-inf"))
    largest_M, new_MN, shrink_M = _softmax(score_MN, largest_M, scale_log2, MASKED)
    total_M = total_M * shrink_M + gl.sum(new_MN, axis=1)
    weight_MN = gl.convert_layout(new_MN.to(q_MD.dtype), weight_MN.type.layout)
    return weight_MN, shrink_M, largest_M, total_M, sum_MD


@gluon.jit
def _attend(tensors, bars, work, q_TND, out_TND, q_stride, scale_log2, WHICH: gl.constexpr, PING: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr, PERSISTENT: gl.constexpr):
    q_tiles, k_tiles, v_tiles, v_blocks = tensors
    k_full, k_empty, v_full, v_empty, turn_bar = bars
    WARPS: gl.constexpr = gl.num_warps()
    M: gl.constexpr = q_tiles.shape[1]
    HEAD_DIM: gl.constexpr = q_tiles.shape[2]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    PARTS: gl.constexpr = HEAD_DIM // _COLUMNS
    COUNT: gl.constexpr = BLOCK_N // v_blocks.shape[1]
    PARTS_TOKENS: gl.constexpr = M // GROUP  # tokens of this group of warps
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    WEIGHT: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [WARPS, 1], [1, 0])
    dtype: gl.constexpr = q_tiles.dtype
    q_MD = q_tiles.index(WHICH)
    items = work[5] * KV_HEADS
    used = 0
    turns = (items + gl.num_programs(0) - 1) // gl.num_programs(0)
    for turn in range(turns):
        item = _item(turn, PERSISTENT)
        if item < items:
            head, row, first, queries, length, start = _locate(item, work, KV_HEADS, TOKENS)
            if start < queries:
                count, whole = _span(queries, length, start, BLOCK_N, TOKENS)
                line_M = gl.arange(0, M, layout=gl.SliceLayout(1, LINES))
                dim_D = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LINES))
                query_M = start + WHICH * PARTS_TOKENS + line_M // GROUP
                head_M = head * GROUP + line_M % GROUP
                valid_MD = ((line_M < PARTS_TOKENS * GROUP) & (query_M < queries))[:, None] & (dim_D[None, :] >= 0)
                token_M = (first + query_M).to(gl.int64)
                q_at = q_TND + token_M[:, None] * q_stride + (head_M * HEAD_DIM)[:, None] + dim_D[None, :]
                q_MD.store(gl.load(q_at, mask=valid_MD, other=0.0))
                fence_async_shared()
                gl.thread_barrier()

                score_line_M = gl.arange(0, M, layout=gl.SliceLayout(1, SCORE))
                limit_M = length - queries + start + WHICH * PARTS_TOKENS + score_line_M // GROUP
                limit_M = gl.minimum(limit_M, length - 1)
                key_N = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORE))
                stage = used % STAGES
                phase = used // STAGES & 1
                mbarrier.wait(k_full.index(stage), phase)
                if PING:
                    mbarrier.wait(turn_bar.index(WHICH), (used & 1) ^ WHICH ^ 1)
                zero_MN = gl.zeros((M, BLOCK_N), gl.float32, SCORE)
                score_MN = warpgroup_mma(q_MD, k_tiles.index(stage).permute((1, 0)), zero_MN, use_acc=False, is_async=True)
                if PING:
                    mbarrier.arrive(turn_bar.index(1 - WHICH))
                score_MN = warpgroup_mma_wait(0, deps=[score_MN])
                mbarrier.arrive(k_empty.index(stage))
                first_key = (count - 1) * BLOCK_N
                score_MN = gl.where(first_key + key_N[None, :] <= limit_M[:, None], score_MN, float("-inf"))
                largest_M = gl.full((M,), float("-inf"), gl.float32, gl.SliceLayout(1, SCORE))
                largest_M, new_MN, shrink_M = _softmax(score_MN, largest_M, scale_log2, True)
                total_M = gl.sum(new_MN, axis=1)
                weight_MN = gl.convert_layout(new_MN.to(dtype), WEIGHT)
                sum_MD = warpgroup_mma_init(gl.zeros((M, HEAD_DIM), gl.float32, SUM))
                if first_key + BLOCK_N > length:
                    mbarrier.wait(v_full.index(stage), phase)
                    _wipe(v_blocks, stage * (PARTS * COUNT), length - first_key, COUNT, PARTS)
                begin = used
                used += 1
                for i in range(1, count - whole):
                    weight_MN, shrink_M, largest_M, total_M, sum_MD = _step(q_MD, k_tiles, v_tiles, bars, used, begin, (weight_MN, shrink_M, largest_M, total_M, sum_MD), limit_M, first_key - i * BLOCK_N, scale_log2, WHICH, True, PING)
                    used += 1
                for i in range(whole):
                    weight_MN, shrink_M, largest_M, total_M, sum_MD = _step(q_MD, k_tiles, v_tiles, bars, used, begin, (weight_MN, shrink_M, largest_M, total_M, sum_MD), limit_M, 0, scale_log2, WHICH, False, PING)
                    used += 1
                v_stage = (used - 1) % STAGES
                mbarrier.wait(v_full.index(v_stage), (used - 1) // STAGES & 1)
                sum_MD = warpgroup_mma_wait(0, deps=[sum_MD])
                mbarrier.arrive(v_empty.index((used - 2) % STAGES), pred=count > 1)
                sum_MD = sum_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, SUM))[:, None]
                sum_MD = warpgroup_mma(weight_MN, v_tiles.index(v_stage), sum_MD, is_async=True)
                share_M = 1.0 / gl.convert_layout(total_M, gl.SliceLayout(1, SUM))
                sum_MD = warpgroup_mma_wait(0, deps=[sum_MD])
                mbarrier.arrive(v_empty.index(v_stage))
                q_MD.store((sum_MD * share_M[:, None]).to(dtype))
                out_at = out_TND + token_M[:, None] * (KV_HEADS * GROUP * HEAD_DIM) + (head_M * HEAD_DIM)[:, None] + dim_D[None, :]
                gl.store(out_at, q_MD.load(LINES), mask=valid_MD)


@gluon.jit(do_not_specialize=["num_decodes", "num_entries", "tiles"])
def gluon_prefill_kernel(
    q_TND,
    k_cache,
    v_cache,
    out_TND,
    rows_E,
    query_start_E1,
    kv_len_E,
    block_table_RC,
    table_stride,
    q_stride,
    scale_log2,
    num_decodes,
    num_entries,
    tiles,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    PING: gl.constexpr,
    PERSISTENT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    M: gl.constexpr = 128 // CONSUMERS
    TOKENS: gl.constexpr = CONSUMERS * (M // GROUP)
    BLOCK_SIZE: gl.constexpr = k_cache.block_shape[0]
    PARTS: gl.constexpr = HEAD_DIM // _COLUMNS
    BOXES: gl.constexpr = STAGES * PARTS * (BLOCK_N // BLOCK_SIZE)
    dtype: gl.constexpr = k_cache.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, M, HEAD_DIM], SWIZZLED)
    k_ring = gl.allocate_shared_memory(dtype, [BOXES, BLOCK_SIZE, _COLUMNS], SWIZZLED)
    v_ring = gl.allocate_shared_memory(dtype, [BOXES, BLOCK_SIZE, _COLUMNS], SWIZZLED)
    k_tiles = k_ring._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
    v_tiles = v_ring._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turn_bar = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    mbarrier.init(turn_bar.index(0), count=1)
    mbarrier.init(turn_bar.index(1), count=1)
    fence_async_shared()

    caches = (k_cache, v_cache)
    rings = (k_ring, v_ring)
    tensors = (q_tiles, k_tiles, v_tiles, v_ring)
    bars = (k_full, k_empty, v_full, v_empty, turn_bar)
    work = (rows_E, query_start_E1, kv_len_E, num_decodes, num_entries, tiles)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_attend, (tensors, bars, work, q_TND, out_TND, q_stride, scale_log2, 0, PING, KV_HEADS, GROUP, TOKENS, STAGES, PERSISTENT)),
                (_attend, (tensors, bars, work, q_TND, out_TND, q_stride, scale_log2, 1, PING, KV_HEADS, GROUP, TOKENS, STAGES, PERSISTENT)),
                (_copy, (caches, rings, bars, work, block_table_RC, table_stride, KV_HEADS, HEAD_DIM, TOKENS, BLOCK_N, STAGES, PERSISTENT)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (tensors, bars, work, q_TND, out_TND, q_stride, scale_log2, 0, False, KV_HEADS, GROUP, TOKENS, STAGES, PERSISTENT)),
                (_copy, (caches, rings, bars, work, block_table_RC, table_stride, KV_HEADS, HEAD_DIM, TOKENS, BLOCK_N, STAGES, PERSISTENT)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
