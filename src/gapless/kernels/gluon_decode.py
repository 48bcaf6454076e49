"""Decode attention for Hopper (sm_90a) in Gluon: as paged_decode.py, with bulk copies asked for before the wait.

A program is one warp and does one unit, cut as by paged_decode's count_units. Keys and values come a KV block at a time
through rings of tiles in shared memory, each stage with a barrier for its keys and one for its values, so no lane makes
addresses. As many programs as there are units on a processor should fit there at once: their rings, not their number,
keep the memory busy, and no program waits for another to end.

A program finds its unit, asks for as many tiles as its ring holds, and only then waits for the kernel before it, where
that one has not written to the cache: with a rotation, since the new key and value are this kernel's to write. They do
not go through the ring: the last unit's softmax begins with them.

Letters as in attention/base.py; G rows of query heads, N keys of a tile, U units.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, mma_v2, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV
from gapless.kernels.dependent import dependent_launch, nvidia_arch
from gapless.kernels.gluon_units import find_unit, merge_parts
from gapless.kernels.online_softmax import LOG2_E
from gapless.kernels.paged_decode import MERGED_BY_LAST, merge_step, wanted_units

COLUMNS = gl.constexpr(64)  # of a box: 128 bytes, the widest swizzle
MAX_ENTRIES = 2048  # each program looks through all of them
ROWS = gl.constexpr(16)  # of query heads, the fewest that a product takes

_RENAMED = gl.constexpr(hasattr(gl, "barrier"))  # what has other names in Triton 3.6
_copy_box = tma.async_load if _RENAMED.value else tma.async_copy_global_to_shared
_barrier = gl.barrier if _RENAMED.value else gl.thread_barrier


@gluon.jit
def _blocks(table, tile, BLOCK_N: gl.constexpr, BOX: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """The KV block of each box of a tile. Boxes past the entry's end repeat its last one."""
    table_at, length = table
    blocks = ()
    for n in gl.static_range(BLOCK_N // BOX):
        box = gl.minimum(tile * (BLOCK_N // BOX) + n, (length - 1) // BOX)
        blocks += (gl.load(table_at + box // (BLOCK_SIZE // BOX)),)
    return blocks


@gluon.jit
def _ask(source, blocks, tile, kv_head, stage, pred, BLOCK_SIZE: gl.constexpr, KV_HEADS: gl.constexpr):
    """Ask for a tile: a box per KV block and 64 columns."""
    cache, ring, full = source
    BOX: gl.constexpr = cache.block_shape[0]
    BOXES: gl.constexpr = ring.shape[0] // full.shape[0]
    COUNT: gl.constexpr = len(blocks)
    mbarrier.expect(full.index(stage), BOXES * BOX * COLUMNS * 2, pred=pred)
    for n in gl.static_range(COUNT):
        line = (blocks[n] * KV_HEADS + kv_head) * BLOCK_SIZE
        if BOX < BLOCK_SIZE:  # then a tile is one box
            line += tile % (BLOCK_SIZE // BOX) * BOX
        for part in gl.static_range(BOXES // COUNT):
            box = ring.index(stage * BOXES + part * COUNT + n)
            _copy_box(cache, [line, part * COLUMNS], full.index(stage), box, pred=pred)


@gluon.jit
def _angles(norm_at, angle_at, dim_D, HEAD_DIM: gl.constexpr, NORM: gl.constexpr):
    """What a rotation takes besides the head: cosines, sines with their signs, the norm's weights of dim and other."""
    HALF: gl.constexpr = HEAD_DIM // 2
    cos_D = gl.load(angle_at + dim_D % HALF)
    sin_D = gl.load(angle_at + HALF + dim_D % HALF)
    own_D, other_D = cos_D, cos_D
    if NORM:
        own_D = gl.load(norm_at + dim_D).to(gl.float32)
        other_D = gl.load(norm_at + (dim_D + HALF) % HEAD_DIM).to(gl.float32)
    return cos_D, gl.where(dim_D < HALF, -sin_D, sin_D), own_D, other_D


@gluon.jit
def _rotate(head_at_X, dim_D, inside_X, angles, eps, HEAD_DIM: gl.constexpr, NORM: gl.constexpr):
    """Heads of one token, normed if NORM and rotated, in float32."""
    cos_D, sin_D, norm_D, other_norm_D = angles
    inside_XD = inside_X[:, None] & (dim_D[None, :] >= 0)
    own_XD = gl.load(head_at_X[:, None] + dim_D[None, :], mask=inside_XD, other=0.0).to(gl.float32)
    other_D = (dim_D + HEAD_DIM // 2) % HEAD_DIM
    other_XD = gl.load(head_at_X[:, None] + other_D[None, :], mask=inside_XD, other=0.0).to(gl.float32)
    if NORM:
        inverse_X1 = gl.rsqrt(gl.sum(own_XD * own_XD, axis=1) / HEAD_DIM + eps)[:, None]
        own_XD *= inverse_X1 * norm_D[None, :]
        other_XD *= inverse_X1 * other_norm_D[None, :]
    return own_XD * cos_D[None, :] + other_XD * sin_D[None, :]


@gluon.jit
def _softmax(score_GN, largest_G, total_GN, scale_log2):
    """New largest scores, sums of the weights lane by lane, the weights, and by how much older sums shrink."""
    new_G = gl.maximum(largest_G, gl.max(score_GN, axis=1))
    base_G = new_G * scale_log2
    weight_GN = gl.exp2(score_GN * scale_log2 - base_G[:, None])
    shrink_G = gl.exp2(largest_G * scale_log2 - base_G)
    return new_G, total_GN * shrink_G[:, None] + weight_GN, weight_GN, shrink_G


@gluon.jit(do_not_specialize=["table_stride", "eps", "entries", "wanted", "min_span"])
def decode_kernel(
    q_END,
    k_cache,
    v_cache,
    k_BKSD,
    v_BKSD,
    out_END,
    qk_norm_2D,
    rope_PD,
    partial_UGD,
    partial_lse_UG,
    arrived_P,
    rows_E,
    kv_len_E,
    block_table_RC,
    table_stride,
    q_stride,
    scale_log2,
    eps,
    entries,
    wanted,
    min_span,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    ENTRIES_TILE: gl.constexpr,
    HEADS_TILE: gl.constexpr,
    MERGE: gl.constexpr,
    EARLY: gl.constexpr,
    ROTATE: gl.constexpr,
    NORM: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """With ROTATE, q_END is the start of a token's queries, keys and values, q_stride numbers to the next token's."""
    BOX: gl.constexpr = k_cache.block_shape[0]
    BOXES: gl.constexpr = STAGES * (BLOCK_N // BOX) * (HEAD_DIM // COLUMNS)
    dtype: gl.constexpr = k_cache.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, PRODUCT, 2)
    NEW: gl.constexpr = gl.BlockedLayout([1, HEAD_DIM // 32], [1, 32], [1, 1], [1, 0])

    unit = gl.num_programs(0) - 1 - gl.program_id(0)  # those without a unit go while the kernel before still runs
    work = (rows_E, kv_len_E, entries, wanted, min_span)
    entry, row, length, units, nth, spans = find_unit(work, unit // KV_HEADS, ENTRIES_TILE)
    kv_head = unit % KV_HEADS
    if unit // KV_HEADS >= spans:
        return
    tiles = (length + BLOCK_N - 1) // BLOCK_N
    first = nth * tiles // units
    count = (nth + 1) * tiles // units - first

    k_ring = gl.allocate_shared_memory(dtype, [BOXES, BOX, COLUMNS], SWIZZLED)
    v_ring = gl.allocate_shared_memory(dtype, [BOXES, BOX, COLUMNS], SWIZZLED)
    if _RENAMED:
        k_tiles = k_ring.reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
        v_tiles = v_ring.reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
    else:
        k_tiles = k_ring._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
        v_tiles = v_ring._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_DIM], SWIZZLED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    table = (block_table_RC + row.to(gl.int64) * table_stride, length)
    blocks_S = ()
    for s in gl.static_range(STAGES + 1):
        blocks_S += (_blocks(table, first + s, BLOCK_N, BOX, BLOCK_SIZE),)
    blocks = blocks_S[STAGES]
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
    fence_async_shared()
    keys, values = (k_cache, k_ring, k_full), (v_cache, v_ring, v_full)
    if DEPENDENT and not EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    for s in gl.static_range(STAGES):
        _ask(keys, blocks_S[s], first + s, kv_head, s, s < count, BLOCK_SIZE, KV_HEADS)
        _ask(values, blocks_S[s], first + s, kv_head, s, s < count, BLOCK_SIZE, KV_HEADS)

    column_N = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, PRODUCT))
    zero_GN = gl.zeros((ROWS, BLOCK_N), gl.float32, PRODUCT)
    total_GN = zero_GN
    largest_G = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, PRODUCT))
    sum_GD = gl.zeros((ROWS, HEAD_DIM), gl.float32, PRODUCT)
    row_G = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LEFT))
    dim_D = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LEFT))
    token_at = q_END + entry.to(gl.int64) * q_stride
    q_at_G = token_at + (kv_head * GROUP + row_G) * HEAD_DIM
    if ROTATE:
        new_D = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, NEW))
        angle_at = rope_PD + (length - 1).to(gl.int64) * HEAD_DIM
        angles = _angles(qk_norm_2D, angle_at, dim_D, HEAD_DIM, NORM)
        new_angles = _angles(qk_norm_2D + HEAD_DIM, angle_at, new_D, HEAD_DIM, NORM)
        new_block = gl.load(table[0] + (length - 1) // BLOCK_SIZE).to(gl.int64)
        if DEPENDENT and EARLY:
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()
        q_GD = _rotate(q_at_G, dim_D, row_G < GROUP, angles, eps, HEAD_DIM, NORM).to(dtype)
        new_head_1 = KV_HEADS * GROUP + kv_head + gl.arange(0, 1, layout=gl.SliceLayout(1, NEW))
        new_at_1 = token_at + new_head_1 * HEAD_DIM
        k_1D = _rotate(new_at_1, new_D, new_head_1 >= 0, new_angles, eps, HEAD_DIM, NORM).to(dtype)
        v_1D = gl.load(new_at_1[:, None] + (KV_HEADS * HEAD_DIM + new_D)[None, :])
        new_line = (new_block * KV_HEADS + kv_head) * BLOCK_SIZE + (length - 1) % BLOCK_SIZE
        cached_1D = (new_line * HEAD_DIM + new_D)[None, :]
        is_last = nth == units - 1
        owned_1D = is_last & (new_D >= 0)[None, :]
        gl.store(k_BKSD + cached_1D, k_1D, mask=owned_1D)
        gl.store(v_BKSD + cached_1D, v_1D, mask=owned_1D)
        new_k_D = gl.convert_layout(gl.sum(k_1D.to(gl.float32), axis=0), gl.SliceLayout(0, LEFT))
        new_v_D = gl.convert_layout(gl.sum(v_1D.to(gl.float32), axis=0), gl.SliceLayout(0, PRODUCT))
        new_score_G = gl.sum(q_GD.to(gl.float32) * new_k_D[None, :], axis=1)
        new_score_G = gl.convert_layout(new_score_G, gl.SliceLayout(1, PRODUCT))
        largest_G = gl.where(is_last, new_score_G, largest_G)
        total_GN = gl.where(is_last & (column_N == 0)[None, :], 1.0, total_GN)
        sum_GD = gl.where(is_last, new_v_D[None, :], sum_GD)
    else:
        inside_GD = (row_G < GROUP)[:, None] & (dim_D >= 0)[None, :]
        q_GD = gl.load(q_at_G[:, None] + dim_D[None, :], mask=inside_GD, other=0.0)

    for i in range(count - 1):
        stage = i % STAGES
        mbarrier.wait(k_full.index(stage), i // STAGES & 1)
        score_GN = mma_v2(q_GD, k_tiles.index(stage).permute((1, 0)).load(RIGHT), zero_GN)
        ahead = first + i + STAGES
        _ask(keys, blocks, ahead, kv_head, stage, i + STAGES < count, BLOCK_SIZE, KV_HEADS)
        largest_G, total_GN, weight_GN, shrink_G = _softmax(score_GN, largest_G, total_GN, scale_log2)
        weight_GN = gl.convert_layout(weight_GN.to(dtype), LEFT)
        mbarrier.wait(v_full.index(stage), i // STAGES & 1)
        sum_GD = mma_v2(weight_GN, v_tiles.index(stage).load(RIGHT), sum_GD * shrink_G[:, None])
        _ask(values, blocks, ahead, kv_head, stage, i + STAGES < count, BLOCK_SIZE, KV_HEADS)
        blocks = _blocks(table, ahead + 1, BLOCK_N, BOX, BLOCK_SIZE)

    # The last tile of the last unit holds the entry's end. What lies past the tokens to read may be NaN.
    stage = (count - 1) % STAGES
    valid = length - (first + count - 1) * BLOCK_N - (1 if ROTATE else 0)
    row_N = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, RIGHT))
    mbarrier.wait(k_full.index(stage), (count - 1) // STAGES & 1)
    score_GN = mma_v2(q_GD, k_tiles.index(stage).permute((1, 0)).load(RIGHT), zero_GN)
    score_GN = gl.where((column_N < valid)[None, :], score_GN, float("-inf"))
    largest_G, total_GN, weight_GN, shrink_G = _softmax(score_GN, largest_G, total_GN, scale_log2)
    weight_GN = gl.convert_layout(weight_GN.to(dtype), LEFT)
    mbarrier.wait(v_full.index(stage), (count - 1) // STAGES & 1)
    v_ND = gl.where((row_N < valid)[:, None], v_tiles.index(stage).load(RIGHT), 0.0)
    sum_GD = mma_v2(weight_GN, v_ND, sum_GD * shrink_G[:, None])

    total_G = gl.sum(total_GN, axis=1)
    mean_GD = sum_GD / total_G[:, None]
    head_G = gl.arange(0, ROWS, layout=gl.SliceLayout(1, PRODUCT))
    out_D = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, PRODUCT))
    inside_GD = (head_G < GROUP)[:, None] & (out_D >= 0)[None, :]
    out_at = out_END + (entry * KV_HEADS + kv_head).to(gl.int64) * (GROUP * HEAD_DIM)
    if units == 1:
        gl.store(out_at + head_G[:, None] * HEAD_DIM + out_D[None, :], mean_GD.to(dtype), mask=inside_GD)
    else:
        part_G = unit.to(gl.int64) * GROUP + head_G
        gl.store(partial_UGD + (part_G * HEAD_DIM)[:, None] + out_D[None, :], mean_GD, mask=inside_GD)
        gl.store(partial_lse_UG + part_G, largest_G * scale_log2 + gl.log2(total_G), mask=head_G < GROUP)
        _barrier()  # every thread has stored before one of them says so
        arrived_at = arrived_P + entry * KV_HEADS + kv_head
        if gl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu") == units - 1:
            gl.store(arrived_at, 0)
            unit -= nth * KV_HEADS
            merge_parts(partial_UGD, partial_lse_UG, out_at, unit, units, KV_HEADS, GROUP, HEAD_DIM, HEADS_TILE, MERGE)


@dataclass(frozen=True, slots=True)
class GluonDecodeTiles:
    """How the kernel is cut up."""

    block_n: int  # cached tokens that a program reads at a time
    stages: int  # of them on their way to a program
    min_span: int = 128  # cached tokens below which a unit does not pay
    programs_per_processor: int = 3  # that cutting into units aims at


def decode_tiles(head_dim: int, pairs: int, multiprocessors: int) -> GluonDecodeTiles:
    """For so many pairs of an entry and a key/value head. The best tried on an H100, in steps of whole models.

    At head size 128 four programs on a processor fill its shared memory. At 64 there is room for 13 with two stages, 9
    with three and 6 with four: as many stages as let all pairs be there at once, if they are many enough to gain by it.
    """
    if head_dim == 128:
        return GluonDecodeTiles(block_n=32, stages=3, programs_per_processor=4)
    each = triton.cdiv(pairs, multiprocessors)
    return GluonDecodeTiles(block_n=32, stages=4 if 5 <= each <= 6 else 3 if 7 <= each <= 9 else 2)


def runs(q_END: Tensor, out_END: Tensor, kv: LayerKV, batch: AttentionBatch, multiprocessors: int) -> bool:
    """Whether gluon_decode can attend with these queries, or the products that hold them, to this cache."""
    num_kv_heads, block_size, head_dim = kv.k_BKSD.shape[1:]
    if head_dim not in (64, 128) or block_size not in (16, 32, 64):
        return False
    entries, num_heads = out_END.shape[:2]
    tiles = decode_tiles(head_dim, entries * num_kv_heads, multiprocessors)
    wanted = wanted_units(entries, num_kv_heads, batch.max_kv, multiprocessors, tiles)
    fits = wanted <= MERGED_BY_LAST * entries and entries <= MAX_ENTRIES and num_heads // num_kv_heads <= ROWS.value
    halves = q_END.dtype in (torch.bfloat16, torch.float16) and q_END.dtype == kv.k_BKSD.dtype
    aligned = q_END.stride(0) % 8 == 0 and q_END.stride(1) == head_dim and q_END.data_ptr() % 16 == 0
    return q_END.is_cuda and fits and halves and aligned and nvidia_arch() == 90  # tried nowhere else


def gluon_decode(
    q_END: Tensor,
    out_END: Tensor,
    kv: LayerKV,
    batch: AttentionBatch,
    scale: float,
    multiprocessors: int,
    tiles: GluonDecodeTiles | None = None,
    arrived_P: Tensor | None = None,
    rotation: HeadRotation | None = None,
) -> None:
    """As paged_decode, where `runs`. scale > 0. With a rotation, the kernel before must not have written to the
    cache."""
    num_entries, num_heads, head_dim = out_END.shape
    num_kv_heads = kv.k_BKSD.shape[1]
    group = num_heads // num_kv_heads
    tiles = tiles or decode_tiles(head_dim, num_entries * num_kv_heads, multiprocessors)
    wanted = wanted_units(num_entries, num_kv_heads, batch.max_kv, multiprocessors, tiles)
    units = (wanted + num_entries) * num_kv_heads
    partial_UGD = torch.empty((units, group, head_dim), dtype=torch.float32, device=q_END.device)
    lse_UG = torch.empty((units, group), dtype=torch.float32, device=q_END.device)
    if arrived_P is None:
        arrived_P = torch.zeros(num_entries * num_kv_heads, dtype=torch.int32, device=q_END.device)
    heads_tile = triton.next_power_of_2(group)
    decode_kernel[(units,)](
        q_END,
        _in_boxes(kv.k_BKSD, tiles.block_n),
        _in_boxes(kv.v_BKSD, tiles.block_n),
        kv.k_BKSD,
        kv.v_BKSD,
        out_END,
        kv.k_BKSD if rotation is None or rotation.qk_norm_2D is None else rotation.qk_norm_2D,
        lse_UG if rotation is None else rotation.rope_PD,
        partial_UGD,
        lse_UG,
        arrived_P,
        batch.rows_E,
        batch.kv_len_E,
        batch.block_table_RC,
        batch.block_table_RC.stride(0),
        q_END.stride(0),
        scale * LOG2_E,
        0.0 if rotation is None else rotation.eps,
        num_entries,
        wanted,
        tiles.min_span,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv.block_size,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.stages,
        ENTRIES_TILE=max(32, triton.next_power_of_2(num_entries)),
        HEADS_TILE=heads_tile,
        MERGE=min(8, merge_step(heads_tile, head_dim, 1)),
        EARLY=rotation is not None,  # else the kernel before may have written any key
        ROTATE=rotation is not None,
        NORM=rotation is not None and rotation.qk_norm_2D is not None,
        num_warps=1,
        enable_fp_fusion=True,
        **dependent_launch(),
    )


def _in_boxes(cache_BKSD: Tensor, block_n: int) -> TensorDescriptor:
    """The cache seen as lines, to be copied 64 columns of a KV block, or of block_n tokens in it, at a time."""
    lines = cache_BKSD.view(-1, cache_BKSD.shape[3])
    box = [min(cache_BKSD.shape[2], block_n), COLUMNS.value]
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), box, gl.NVMMASharedLayout(128, 16, 2))
