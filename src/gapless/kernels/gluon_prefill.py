"""Prefill attention for Hopper (sm_90a) in Gluon: as paged_prefill.py, with bulk copies and warps that have roles.

A program has 128 rows, all heads that share a key/value head together: two groups of four warps take 64 rows each (row
m: token m // GROUP, head m % GROUP), and one warp copies. Keys and values go through rings of tiles in shared memory,
each stage with two barriers: `full` when its bytes are there, `empty` when both groups have read it.

Keys are gone through from the last to the first, so that only the first tiles need masks. A group asks for the scores
of one tile, then for the products of the weights and values of the tile before, and takes the softmax of those scores
while the tensor cores are at these products.

FlashAttention-3: Shah et al. 2024, arXiv 2407.08608. Letters as in attention/base.py; M rows of a group, N keys of a
tile.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.kernels.dependent import nvidia_arch
from gapless.kernels.online_softmax import LOG2_E

ROWS = gl.constexpr(128)  # of a program
COLUMNS = gl.constexpr(64)  # of a box: 128 bytes, the widest swizzle
ENTRIES_TILE = gl.constexpr(128)
KEYS = 256  # in shared memory at a time, and as many values
SHORT = 1024  # tokens: tiles are 64 keys where no entry has more, else 128

_RENAMED = gl.constexpr(hasattr(gl, "barrier"))  # what has other names in Triton 3.6
_copy_box = tma.async_load if _RENAMED.value else tma.async_copy_global_to_shared
_barrier = gl.barrier if _RENAMED.value else gl.thread_barrier


@gluon.jit
def _locate(work, KV_HEADS: gl.constexpr, TOKENS: gl.constexpr):
    """What this program does: (head, table row, first token, queries and length of its entry, its first query).

    Tiles are numbered as by paged_prefill's find_tile. The queries may end before the tile begins: padding.
    """
    rows_E, query_start_E1, kv_len_E, num_decodes, num_entries = work
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    item = gl.program_id(0)
    flat = gl.num_programs(0) // KV_HEADS - 1 - item // KV_HEADS  # the longest rows of an entry first
    begun = 0
    for begin in range(0, num_entries, ENTRIES_TILE):
        place_X = begin + gl.arange(0, ENTRIES_TILE, layout=LAYOUT)
        inside = place_X < num_entries
        token_X = gl.load(query_start_E1 + num_decodes + place_X, mask=inside, other=0) - num_decodes
        begun += gl.sum((inside & (token_X // TOKENS + place_X <= flat)).to(gl.int32), axis=0)
    place = begun - 1
    entry = num_decodes + place
    first = gl.load(query_start_E1 + entry)
    queries = gl.load(query_start_E1 + entry + 1) - first
    start = (flat - (first - num_decodes) // TOKENS - place) * TOKENS
    return item % KV_HEADS, gl.load(rows_E + entry), first, queries, gl.load(kv_len_E + entry), start


@gluon.jit
def _span(queries, length, start, TOKENS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Tiles of keys that a tile of queries sees, and how many of them all its rows see whole: never the last."""
    cached = length - queries
    tiles = (gl.minimum(cached + start + TOKENS, length) + BLOCK_N - 1) // BLOCK_N
    return tiles, gl.minimum((cached + start + 1) // BLOCK_N, tiles - 1)


@gluon.jit
def _copy_tile(source, blocks, i, head, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):
    """Wait until both groups have read what lies in the stage, then ask for a box per KV block and 64 columns."""
    cache, ring, full, empty = source
    BLOCK_SIZE: gl.constexpr = cache.block_shape[0]
    COUNT: gl.constexpr = BLOCK_N // BLOCK_SIZE
    PARTS: gl.constexpr = HEAD_DIM // COLUMNS
    STAGES: gl.constexpr = full.shape[0]
    stage = i % STAGES
    mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * HEAD_DIM * 2)
    for n in gl.static_range(COUNT):
        line = (blocks[n] * KV_HEADS + head) * BLOCK_SIZE
        for part in gl.static_range(PARTS):
            box = ring.index((stage * PARTS + part) * COUNT + n)
            _copy_box(cache, [line, part * COLUMNS], full.index(stage), box)


@gluon.jit
def _copy(work, copied, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, TOKENS: gl.constexpr, BLOCK_N: gl.constexpr):
    """The warp that copies."""
    keys, values, block_table_RC, table_stride = copied
    BLOCK_SIZE: gl.constexpr = keys[0].block_shape[0]
    COUNT: gl.constexpr = BLOCK_N // BLOCK_SIZE
    head, row, _first, queries, length, start = _locate(work, KV_HEADS, TOKENS)
    if start < queries:
        count, _whole = _span(queries, length, start, TOKENS, BLOCK_N)
        table_at = block_table_RC + row.to(gl.int64) * table_stride
        last = (length - 1) // BLOCK_SIZE
        for i in range(count):
            column = (count - 1 - i) * COUNT
            blocks = ()
            for n in gl.static_range(COUNT):
                blocks = blocks + (gl.load(table_at + gl.minimum(column + n, last)),)  # noqa: RUF005  no * in Gluon
            _copy_tile(keys, blocks, i, head, KV_HEADS, HEAD_DIM, BLOCK_N)
            _copy_tile(values, blocks, i, head, KV_HEADS, HEAD_DIM, BLOCK_N)


@gluon.jit
def _wipe(v_ring, valid, COUNT: gl.constexpr, PARTS: gl.constexpr):
    """Zero the rows of the first stage of values that no token was written to: a weight of 0 would not hide a NaN.

    Both groups do, with the same bytes, so that neither waits for the other.
    """
    BLOCK_SIZE: gl.constexpr = v_ring.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    row_S = gl.arange(0, BLOCK_SIZE, layout=gl.SliceLayout(1, LAYOUT))
    for n in range(valid // BLOCK_SIZE, COUNT):
        for part in gl.static_range(PARTS):
            box = v_ring.index(part * COUNT + n)
            box.store(gl.where((n * BLOCK_SIZE + row_S < valid)[:, None], box.load(LAYOUT), 0.0))
    fence_async_shared()
    _barrier()


@gluon.jit
def _softmax(score_MN, largest_M, scale_log2, MASKED: gl.constexpr):
    """New largest scores, weights, and by how much older sums shrink. A row may have seen no key only if MASKED."""
    new_M = gl.maximum(largest_M, gl.max(score_MN, axis=1))
    base_M = new_M * scale_log2
    if MASKED:
        base_M = gl.where(new_M == float("-inf"), 0.0, base_M)
    weight_MN = gl.exp2(score_MN * scale_log2 - base_M[:, None])
    return new_M, weight_MN, gl.exp2(largest_M * scale_log2 - base_M)


@gluon.jit
def _mask(score_MN, limit_M, first_key):
    SCORE: gl.constexpr = score_MN.type.layout
    key_N = first_key + gl.arange(0, score_MN.shape[1], layout=gl.SliceLayout(0, SCORE))
    return gl.where(key_N[None, :] <= limit_M[:, None], score_MN, float("-inf"))


@gluon.jit
def _step(q_MD, keys, values, state, i, count, limit_M, scale_log2, MASKED: gl.constexpr):
    """Scores of tile i and their softmax, while the values of the tile before go into the sum.

    The weights are float32 in `state`: rounded behind the softmax, they would need more registers than there are.
    """
    k_tiles, k_full, k_empty = keys
    v_tiles, _v_ring, v_full, v_empty = values
    weight_MN, largest_M, total_M, sum_MD = state
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    SCORE: gl.constexpr = weight_MN.type.layout
    SUM: gl.constexpr = sum_MD.type.layout
    k_stage = i % STAGES
    v_stage = (i - 1) % STAGES
    weight_MN = gl.convert_layout(weight_MN.to(q_MD.dtype), gl.DotOperandLayout(0, SUM, 2))
    zero_MN = gl.zeros(weight_MN.shape, gl.float32, SCORE)
    score_MN = warpgroup_mma(q_MD, k_tiles.index(k_stage).permute((1, 0)), zero_MN, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), (i - 1) // STAGES & 1)
    sum_MD = warpgroup_mma(weight_MN, v_tiles.index(v_stage), sum_MD, is_async=True)
    score_MN = warpgroup_mma_wait(1, deps=[score_MN])
    mbarrier.arrive(k_empty.index(k_stage))
    if MASKED:
        score_MN = _mask(score_MN, limit_M, (count - 1 - i) * BLOCK_N)
    largest_M, new_MN, shrink_M = _softmax(score_MN, largest_M, scale_log2, MASKED)
    total_M = total_M * shrink_M + gl.sum(new_MN, axis=1)
    # The next keys are waited for here, not before their product: the branch keeps ptxas from moving the wait for the
    # sum up, above the exponentials.
    mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i < count - 1)
    sum_MD, _ = warpgroup_mma_wait(0, deps=[sum_MD, weight_MN])
    mbarrier.arrive(v_empty.index(v_stage))
    # The sum shrinks where no product is in flight: where one is, ptxas makes every product wait (C7514).
    sum_MD = sum_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, SUM))[:, None]
    return new_MN, largest_M, total_M, sum_MD


@gluon.jit
def _attend(work, keys, values, queried, WHICH: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """A group of warps, the first or the second."""
    k_tiles, k_full, k_empty = keys
    v_tiles, v_ring, v_full, _v_empty = values
    q_tiles, q_TND, out_TND, q_stride, scale_log2 = queried
    WARPS: gl.constexpr = gl.num_warps()
    M: gl.constexpr = q_tiles.shape[1]
    HEAD_DIM: gl.constexpr = q_tiles.shape[2]
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    OWN: gl.constexpr = M // GROUP  # tokens of this group
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [WARPS, 1], [1, 0])
    dtype: gl.constexpr = q_tiles.dtype
    head, _row, first, queries, length, start = _locate(work, KV_HEADS, 2 * OWN)
    if start < queries:
        count, whole = _span(queries, length, start, 2 * OWN, BLOCK_N)
        own = start + WHICH * OWN
        row_M = gl.arange(0, M, layout=gl.SliceLayout(1, LINES))
        dim_D = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LINES))
        query_M = own + row_M // GROUP
        valid_M = (row_M < OWN * GROUP) & (query_M < queries)
        valid_MD = valid_M[:, None] & (dim_D[None, :] >= 0)
        token_M = (first + query_M).to(gl.int64)
        column_MD = ((head * GROUP + row_M % GROUP) * HEAD_DIM)[:, None] + dim_D[None, :]
        q_MD = q_tiles.index(WHICH)
        q_MD.store(gl.load(q_TND + token_M[:, None] * q_stride + column_MD, mask=valid_MD, other=0.0))
        fence_async_shared()
        _barrier()

        limit_M = length - queries + own + gl.arange(0, M, layout=gl.SliceLayout(1, SCORE)) // GROUP
        limit_M = gl.minimum(limit_M, length - 1)
        mbarrier.wait(k_full.index(0), 0)
        zero_MN = gl.zeros((M, BLOCK_N), gl.float32, SCORE)
        score_MN = warpgroup_mma(q_MD, k_tiles.index(0).permute((1, 0)), zero_MN, use_acc=False, is_async=True)
        score_MN = warpgroup_mma_wait(0, deps=[score_MN])
        mbarrier.arrive(k_empty.index(0))
        first_key = (count - 1) * BLOCK_N
        largest_M = gl.full((M,), float("-inf"), gl.float32, gl.SliceLayout(1, SCORE))
        score_MN = _mask(score_MN, limit_M, first_key)
        largest_M, weight_MN, _shrink_M = _softmax(score_MN, largest_M, scale_log2, True)
        total_M = gl.sum(weight_MN, axis=1)
        sum_MD = gl.zeros((M, HEAD_DIM), gl.float32, SUM)
        if first_key + BLOCK_N > length:  # the tile that holds the entry's end is the first, if it is seen at all
            mbarrier.wait(v_full.index(0), 0)
            _wipe(v_ring, length - first_key, BLOCK_N // v_ring.shape[1], HEAD_DIM // COLUMNS)
        mbarrier.wait(k_full.index(1), 0, pred=count > 1)
        state = (weight_MN, largest_M, total_M, sum_MD)
        for i in range(1, count - whole):
            state = _step(q_MD, keys, values, state, i, count, limit_M, scale_log2, True)
        for i in range(count - whole, count):
            state = _step(q_MD, keys, values, state, i, count, limit_M, scale_log2, False)
        weight_MN, _largest_M, total_M, sum_MD = state
        weight_MN = gl.convert_layout(weight_MN.to(dtype), gl.DotOperandLayout(0, SUM, 2))
        v_stage = (count - 1) % STAGES
        mbarrier.wait(v_full.index(v_stage), (count - 1) // STAGES & 1)
        sum_MD = warpgroup_mma(weight_MN, v_tiles.index(v_stage), sum_MD, is_async=True)
        share_M = 1.0 / gl.convert_layout(total_M, gl.SliceLayout(1, SUM))
        sum_MD = warpgroup_mma_wait(0, deps=[sum_MD])
        q_MD.store((sum_MD * share_M[:, None]).to(dtype))
        out_at = out_TND + token_M[:, None] * (KV_HEADS * GROUP * HEAD_DIM) + column_MD
        gl.store(out_at, q_MD.load(LINES), mask=valid_MD)


@gluon.jit(do_not_specialize=["table_stride", "num_decodes", "num_entries"])
def prefill_kernel(
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
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    M: gl.constexpr = ROWS // 2
    BLOCK_SIZE: gl.constexpr = k_cache.block_shape[0]
    BOXES: gl.constexpr = STAGES * (BLOCK_N // BLOCK_SIZE) * (HEAD_DIM // COLUMNS)
    dtype: gl.constexpr = k_cache.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, [2, M, HEAD_DIM], SWIZZLED)
    k_ring = gl.allocate_shared_memory(dtype, [BOXES, BLOCK_SIZE, COLUMNS], SWIZZLED)
    v_ring = gl.allocate_shared_memory(dtype, [BOXES, BLOCK_SIZE, COLUMNS], SWIZZLED)
    if _RENAMED:
        k_tiles = k_ring.reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
        v_tiles = v_ring.reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
    else:
        k_tiles = k_ring._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
        v_tiles = v_ring._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    work = (rows_E, query_start_E1, kv_len_E, num_decodes, num_entries)
    keys, values = (k_tiles, k_full, k_empty), (v_tiles, v_ring, v_full, v_empty)
    queried = (q_tiles, q_TND, out_TND, q_stride, scale_log2)
    copied = ((k_cache, k_ring, k_full, k_empty), (v_cache, v_ring, v_full, v_empty), block_table_RC, table_stride)
    TOKENS: gl.constexpr = 2 * (M // GROUP)
    gl.warp_specialize(
        [  # constants stay constants in a literal only
            (_attend, (work, keys, values, queried, 0, KV_HEADS, GROUP)),
            (_attend, (work, keys, values, queried, 1, KV_HEADS, GROUP)),
            (_copy, (work, copied, KV_HEADS, HEAD_DIM, TOKENS, BLOCK_N)),
        ],
        [4, 1],  # warps of the second group, and that copy; num_warps is those of the first
        [240, 24],  # registers of a thread
    )


def runs(q_TND: Tensor, kv: LayerKV) -> bool:
    """Whether gluon_prefill can attend with these queries to this cache."""
    head_dim, group = q_TND.shape[2], q_TND.shape[1] // kv.k_BKSD.shape[1]
    fits = head_dim in (64, 128) and kv.block_size in (16, 32, 64) and group <= ROWS.value // 2
    halves = q_TND.dtype in (torch.bfloat16, torch.float16) and q_TND.dtype == kv.k_BKSD.dtype
    aligned = q_TND.stride(0) % 8 == 0 and q_TND.stride(1) == head_dim and q_TND.data_ptr() % 16 == 0
    return q_TND.is_cuda and fits and halves and aligned and nvidia_arch() == 90  # newer ones lack its products


def gluon_prefill(q_TND: Tensor, out_TND: Tensor, kv: LayerKV, batch: AttentionBatch, scale: float) -> None:
    """Attention of the entries after the decodes, written to their tokens in out_TND (contiguous), where `runs`.

    scale > 0.
    """
    num_heads, head_dim = q_TND.shape[1:]
    num_kv_heads = kv.k_BKSD.shape[1]
    group = num_heads // num_kv_heads
    block_n = 64 if batch.max_kv <= SHORT else 128
    num_entries = batch.rows_E.shape[0] - batch.num_decodes
    query_tiles = (q_TND.shape[0] - batch.num_decodes) // (2 * (ROWS.value // 2 // group)) + num_entries
    prefill_kernel[(query_tiles * num_kv_heads,)](
        q_TND,
        _in_boxes(kv.k_BKSD),
        _in_boxes(kv.v_BKSD),
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
        BLOCK_N=block_n,
        STAGES=KEYS // block_n,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _in_boxes(cache_BKSD: Tensor) -> TensorDescriptor:
    """The cache seen as lines, to be copied a KV block of 64 columns at a time."""
    lines = cache_BKSD.view(-1, cache_BKSD.shape[3])
    layout = gl.NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(
        lines, list(lines.shape), list(lines.stride()), [cache_BKSD.shape[2], COLUMNS.value], layout
    )
