# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false
"""Decode attention over the paged cache: one query per entry, the KV of an entry cut into units that run side by side.

The query heads that share a key/value head are the rows of one tile, so every key is read once. A unit is a run of
tiles of one pair of entry and key/value head, and a program does one unit; the heads of a run follow each other. The
grid depends on the number of entries only; which unit a program does follows from all lengths, on the device: a
captured graph stays right for any lengths, costs nothing for lengths that could be, and a long entry among short
ones is cut into many units.

How a row is cut depends on the number of entries, on its own length and, in steps of an eighth of a power of two, on
the mean length. Units are merged in their order, so equal inputs give equal bits.
Flash-decoding: Dao et al. 2023, https://pytorch.org/blog/flash-decoding/.

Queries come ready, or as the layer's product of queries, keys and values: then every unit norms and rotates the
queries that it reads, and the last unit of a pair writes the new key and value to the cache before it reads them.

Under dependent launches a program looks up its unit before it waits for the kernel before it: that one must not be
what wrote the batch's metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV
from gapless.kernels.dependent import dependent_launch, follow
from gapless.kernels.online_softmax import LOG2_E, fold_tile

MERGED_BY_LAST = 16  # units of a pair, on average; more are merged by a kernel of their own, a program for every head


@triton.jit
def count_units(
    kv_len_E: tl.tensor,
    entry_E: tl.tensor,
    entries: tl.tensor,
    wanted: tl.tensor,
    min_span: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Each entry's length and its spans: `wanted` in all, and at most one more each."""
    length_E = tl.load(kv_len_E + entry_E, mask=entry_E < entries, other=0)
    span = tl.maximum(tl.cdiv(tl.sum(length_E, axis=0), wanted), min_span)
    step = tl.maximum(tl.exp2(tl.floor(tl.log2(span.to(tl.float32))) - 3.0).to(tl.int32), 1)
    span = tl.cdiv(span, step) * step
    units_E = tl.where(entry_E < entries, tl.maximum((length_E + span // 2) // span, 1), 0)
    return length_E, units_E


@triton.jit
def merge_units(
    partial_UGD: tl.tensor,
    partial_lse_UG: tl.tensor,
    out_END: tl.tensor,
    first_unit: tl.tensor,
    units: tl.tensor,
    first_head: tl.tensor,
    head_in_group: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    MERGE: tl.constexpr,
) -> None:
    """Write HEADS heads of the group that begins with first_head of all entries' heads, from head_in_group on.

    Units, each KV_HEADS after the one before, are taken in their order, MERGE at a time.
    """
    head_P = head_in_group + tl.arange(0, HEADS)
    dim_D = tl.arange(0, DIM_TILE)
    nth_U = tl.arange(0, MERGE)
    largest_P = tl.full((HEADS,), -1.0e30, tl.float32)
    total_P = tl.zeros((HEADS,), tl.float32)
    sum_PD = tl.zeros((HEADS, DIM_TILE), tl.float32)
    for start in range(0, units, MERGE):
        in_use_UP = (start + nth_U < units)[:, None] & (head_P < GROUP)[None, :]
        unit_U = first_unit + (start + nth_U) * KV_HEADS
        at_UP = unit_U.to(tl.int64)[:, None] * GROUP + head_P[None, :]
        in_use_UPD = in_use_UP[:, :, None] & (dim_D < HEAD_DIM)[None, None, :]
        # past L1: other multiprocessors wrote these
        lse_UP = tl.load(partial_lse_UG + at_UP, mask=in_use_UP, other=float("-inf"), cache_modifier=".cg")
        part_at = partial_UGD + at_UP[:, :, None] * HEAD_DIM + dim_D[None, None, :]
        part_UPD = tl.load(part_at, mask=in_use_UPD, other=0.0, cache_modifier=".cg")
        new_largest_P = tl.maximum(largest_P, tl.max(lse_UP, axis=0))
        weight_UP = tl.exp2(lse_UP - new_largest_P[None, :])
        shrink_P = tl.exp2(largest_P - new_largest_P)
        total_P = total_P * shrink_P + tl.sum(weight_UP, axis=0)
        sum_PD = sum_PD * shrink_P[:, None] + tl.sum(part_UPD * weight_UP[:, :, None], axis=0)
        largest_P = new_largest_P
    mean_PD = sum_PD / tl.maximum(total_P, 1.0)[:, None]  # the largest weighs 1; heads past GROUP nothing
    out_at = out_END + (first_head + head_P).to(tl.int64)[:, None] * HEAD_DIM + dim_D[None, :]
    in_out = (head_P < GROUP)[:, None] & (dim_D < HEAD_DIM)[None, :]
    tl.store(out_at, mean_PD.to(out_END.dtype.element_ty), mask=in_out)


@triton.jit
def rotate_heads(
    head_at_X: tl.tensor,
    dim_D: tl.tensor,
    inside_XD: tl.tensor,
    norm_at: tl.tensor,
    angle_at: tl.tensor,
    eps: tl.tensor,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
) -> tl.tensor:
    """Heads of one token, normed if NORM and rotated, in float32."""
    HALF: tl.constexpr = HEAD_DIM // 2
    in_dim = dim_D < HEAD_DIM
    other_D = tl.where(dim_D < HALF, dim_D + HALF, dim_D - HALF)
    own_XD = tl.load(head_at_X[:, None] + dim_D[None, :], mask=inside_XD, other=0.0).to(tl.float32)
    other_XD = tl.load(head_at_X[:, None] + other_D[None, :], mask=inside_XD, other=0.0).to(tl.float32)
    if NORM:
        inverse_X1 = tl.rsqrt(tl.sum(own_XD * own_XD, axis=1) / HEAD_DIM + eps)[:, None]
        own_XD *= inverse_X1 * tl.load(norm_at + dim_D, mask=in_dim, other=0.0).to(tl.float32)[None, :]
        other_XD *= inverse_X1 * tl.load(norm_at + other_D, mask=in_dim, other=0.0).to(tl.float32)[None, :]
    cos_D = tl.load(angle_at + dim_D % HALF)
    sin_D = tl.load(angle_at + HALF + dim_D % HALF)
    return own_XD * cos_D[None, :] + other_XD * tl.where(dim_D < HALF, -sin_D, sin_D)[None, :]


@triton.jit(do_not_specialize=["entries", "wanted", "min_span"])
def decode_kernel(
    q_END: tl.tensor,
    k_BKSD: tl.tensor,
    v_BKSD: tl.tensor,
    out_END: tl.tensor,
    qk_norm_2D: tl.tensor,
    rope_PD: tl.tensor,
    partial_UGD: tl.tensor,
    partial_lse_UG: tl.tensor,
    arrived_P: tl.tensor,
    rows_E: tl.tensor,
    kv_len_E: tl.tensor,
    block_table_RC: tl.tensor,
    table_stride: tl.tensor,
    q_stride: tl.tensor,
    scale_log2: tl.tensor,
    eps: tl.tensor,
    entries: tl.tensor,
    wanted: tl.tensor,
    min_span: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ENTRIES_TILE: tl.constexpr,
    MERGE: tl.constexpr,
    FUSED: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """With ROTATE, q_END is the start of a token's queries, keys and values, q_stride numbers to the next token's."""
    unit = tl.program_id(0)
    entry_E = tl.arange(0, ENTRIES_TILE)
    row_E = tl.load(rows_E + entry_E, mask=entry_E < entries, other=0)
    length_E, units_E = count_units(kv_len_E, entry_E, entries, wanted, min_span)
    stop_E = tl.cumsum(units_E, axis=0)
    span = unit // KV_HEADS
    kv_head = unit % KV_HEADS
    if span >= tl.max(stop_E, axis=0):
        return
    done_E = stop_E <= span
    entry = tl.sum(done_E.to(tl.int32), axis=0)
    here_E = entry_E == entry
    length = tl.sum(tl.where(here_E, length_E, 0), axis=0)
    units = tl.sum(tl.where(here_E, units_E, 0), axis=0)
    table_at = block_table_RC + tl.sum(tl.where(here_E, row_E, 0), axis=0).to(tl.int64) * table_stride
    nth = span - tl.max(tl.where(done_E, stop_E, 0), axis=0)
    tiles = tl.cdiv(length, BLOCK_N)
    begin = nth * tiles // units * BLOCK_N
    end = tl.minimum((nth + 1) * tiles // units * BLOCK_N, length)

    BLOCK_STRIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM
    k_at = k_BKSD + kv_head * (BLOCK_SIZE * HEAD_DIM)
    v_at = v_BKSD + kv_head * (BLOCK_SIZE * HEAD_DIM)
    IN_ONE_BLOCK: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
    follow(DEPENDENT)
    group_G = tl.arange(0, GROUP_TILE)
    dim_D = tl.arange(0, DIM_TILE)
    token_N = tl.arange(0, BLOCK_N)
    in_group = (group_G[:, None] < GROUP) & (dim_D[None, :] < HEAD_DIM)
    head_G = kv_head * GROUP + group_G
    q_at_G = q_END + entry.to(tl.int64) * q_stride + head_G * HEAD_DIM
    if ROTATE:
        angle_at = rope_PD + (length - 1).to(tl.int64) * HEAD_DIM
        q_GD = rotate_heads(q_at_G, dim_D, in_group, qk_norm_2D, angle_at, eps, HEAD_DIM, NORM)
        q_GD = q_GD.to(out_END.dtype.element_ty)
        if nth == units - 1:
            in_head = dim_D[None, :] < HEAD_DIM
            head_1 = KV_HEADS * GROUP + kv_head + tl.arange(0, 1)
            head_at_1 = q_END + entry.to(tl.int64) * q_stride + head_1 * HEAD_DIM
            norm_at = qk_norm_2D + HEAD_DIM
            k_1D = rotate_heads(head_at_1, dim_D, in_head, norm_at, angle_at, eps, HEAD_DIM, NORM)
            v_1D = tl.load(head_at_1[:, None] + KV_HEADS * HEAD_DIM + dim_D[None, :], mask=in_head, other=0.0)
            block = tl.load(table_at + (length - 1) // BLOCK_SIZE).to(tl.int64)
            new_at = block * BLOCK_STRIDE + (length - 1) % BLOCK_SIZE * HEAD_DIM + dim_D[None, :]
            tl.store(k_at + new_at, k_1D.to(k_BKSD.dtype.element_ty), mask=in_head)
            tl.store(v_at + new_at, v_1D, mask=in_head)
            tl.debug_barrier()  # the tile that holds it is read by other threads than have written it
    else:
        q_GD = tl.load(q_at_G[:, None] + dim_D[None, :], mask=in_group, other=0.0)

    largest_G = tl.full((GROUP_TILE,), float("-inf"), tl.float32)
    total_G = tl.zeros((GROUP_TILE,), tl.float32)
    sum_GD = tl.zeros((GROUP_TILE, DIM_TILE), tl.float32)
    # The table is read one tile ahead of the cache, and the cache, pipelined, tiles ahead of the arithmetic.
    if IN_ONE_BLOCK:
        next_block = tl.load(table_at + begin // BLOCK_SIZE)
    else:
        next_block = tl.load(table_at + (begin + token_N) // BLOCK_SIZE, mask=begin + token_N < end, other=0)
    for start in tl.range(begin, end, BLOCK_N):
        seen_N = start + token_N < end
        block_at = next_block.to(tl.int64) * BLOCK_STRIDE
        ahead = start + BLOCK_N
        if IN_ONE_BLOCK:
            next_block = tl.load(table_at + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
            block_at += start % BLOCK_SIZE * HEAD_DIM
            at_ND = block_at + (token_N[:, None] * HEAD_DIM + dim_D[None, :])
        else:
            next_block = tl.load(table_at + (ahead + token_N) // BLOCK_SIZE, mask=ahead + token_N < end, other=0)
            in_block_N = token_N % BLOCK_SIZE if BLOCK_N % BLOCK_SIZE == 0 else (start + token_N) % BLOCK_SIZE
            at_ND = block_at[:, None] + (in_block_N[:, None] * HEAD_DIM + dim_D[None, :])
        if DIM_TILE == HEAD_DIM:
            k_ND = tl.load(k_at + at_ND)
            v_ND = tl.load(v_at + at_ND, mask=seen_N[:, None], other=0.0)
        else:
            k_ND = tl.load(k_at + at_ND, mask=dim_D[None, :] < HEAD_DIM, other=0.0)
            v_ND = tl.load(v_at + at_ND, mask=seen_N[:, None] & (dim_D[None, :] < HEAD_DIM), other=0.0)
        score_GN = tl.dot(q_GD, tl.trans(k_ND), input_precision="ieee") * scale_log2
        score_GN = tl.where(seen_N[None, :], score_GN, float("-inf"))
        largest_G, total_G, sum_GD = fold_tile(score_GN, v_ND, largest_G, total_G, sum_GD)

    mean_GD = sum_GD / total_G[:, None]
    first_head = entry * (KV_HEADS * GROUP) + kv_head * GROUP
    if units == 1:
        out_at = out_END + (first_head + group_G).to(tl.int64)[:, None] * HEAD_DIM + dim_D[None, :]
        tl.store(out_at, mean_GD.to(out_END.dtype.element_ty), mask=in_group)
    else:
        part_G = unit.to(tl.int64) * GROUP + group_G
        tl.store(partial_UGD + part_G[:, None] * HEAD_DIM + dim_D[None, :], mean_GD, mask=in_group)
        tl.store(partial_lse_UG + part_G, largest_G + tl.log2(total_G), mask=group_G < GROUP)
        if FUSED:
            tl.debug_barrier()  # every thread has stored before one of them says so
            arrived_at = arrived_P + entry * KV_HEADS + kv_head
            if tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu") == units - 1:
                tl.store(arrived_at, 0)
                merge_units(
                    partial_UGD,
                    partial_lse_UG,
                    out_END,
                    unit - nth * KV_HEADS,
                    units,
                    first_head,
                    0,
                    KV_HEADS,
                    triton.next_power_of_2(GROUP),
                    GROUP,
                    HEAD_DIM,
                    DIM_TILE,
                    MERGE,
                )


@triton.jit(do_not_specialize=["entries", "wanted", "min_span"])
def reduce_kernel(
    partial_UGD: tl.tensor,
    partial_lse_UG: tl.tensor,
    out_END: tl.tensor,
    kv_len_E: tl.tensor,
    entries: tl.tensor,
    wanted: tl.tensor,
    min_span: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ENTRIES_TILE: tl.constexpr,
    MERGE: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    follow(DEPENDENT)
    entry = tl.program_id(0)
    head = tl.program_id(1)
    entry_E = tl.arange(0, ENTRIES_TILE)
    _, units_E = count_units(kv_len_E, entry_E, entries, wanted, min_span)
    units = tl.sum(tl.where(entry_E == entry, units_E, 0), axis=0)
    if units == 1:
        return
    kv_head = head // GROUP
    first_unit = tl.sum(tl.where(entry_E < entry, units_E, 0), axis=0) * KV_HEADS + kv_head
    first_head = entry * (KV_HEADS * GROUP) + kv_head * GROUP
    merge_units(
        partial_UGD,
        partial_lse_UG,
        out_END,
        first_unit,
        units,
        first_head,
        head % GROUP,
        KV_HEADS,
        1,
        GROUP,
        HEAD_DIM,
        DIM_TILE,
        MERGE,
    )


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How the decode kernel is cut up."""

    block_n: int  # cached tokens that a program reads at a time
    min_span: int  # cached tokens below which a unit does not pay
    programs_per_processor: int  # that cutting into units aims at
    num_warps: int
    num_stages: int


TILES = {
    64: DecodeTiles(block_n=32, min_span=128, programs_per_processor=3, num_warps=1, num_stages=3),
    128: DecodeTiles(block_n=32, min_span=128, programs_per_processor=4, num_warps=1, num_stages=4),
    256: DecodeTiles(block_n=16, min_span=128, programs_per_processor=4, num_warps=1, num_stages=2),
}  # by head size, for bfloat16 and float16, the best tried on an H100: 128 in steps of an 8B model, the others alone


def decode_tiles(head_dim: int, itemsize: int, group: int, amd: bool) -> DecodeTiles:
    """A program of one warp waits for no other and ends soon after its last key has come. Four of them on a processor,
    each with some tiles of keys and values on their way to shared memory, keep the memory busy. At head size 128 these
    tiles also take so much of it that no fifth fits, so that all processors get as many."""
    dim_tile = max(64, triton.next_power_of_2(head_dim))
    tiles = TILES[min(dim_tile, 256)]
    if amd:
        tiles = replace(tiles, num_stages=2)
    if itemsize > 2:  # no matrix instruction multiplies float32 as it is
        return replace(tiles, block_n=max(16, 4096 // dim_tile), num_warps=4)
    row_tiles = max(1, triton.next_power_of_2(group) // 16) * max(1, dim_tile // 256)
    return replace(tiles, num_warps=min(8, tiles.num_warps * row_tiles))


class Cut(Protocol):
    """What sets into how many units entries are cut."""

    @property
    def min_span(self) -> int: ...
    @property
    def programs_per_processor(self) -> int: ...


def wanted_units(entries: int, num_kv_heads: int, max_kv: int, multiprocessors: int, tiles: Cut) -> int:
    """Units of each key/value head that the entries are cut into together, and at most one more for each."""
    wanted = max(1, round(tiles.programs_per_processor * multiprocessors / num_kv_heads))
    return min(wanted, entries * triton.cdiv(max_kv, tiles.min_span))


def merge_step(heads: int, dim_tile: int, num_warps: int) -> int:
    """Units to merge at a time: as many as leave a thread 64 of their numbers."""
    return max(1, min(32, num_warps * 2048 // (heads * dim_tile)))


def paged_decode(
    q_END: Tensor,
    out_END: Tensor,
    kv: LayerKV,
    batch: AttentionBatch,
    scale: float,
    multiprocessors: int,
    tiles: DecodeTiles | None = None,
    arrived_P: Tensor | None = None,
    rotation: HeadRotation | None = None,
) -> None:
    """Attention of one query per entry, written to out_END (contiguous). Heads of q are contiguous.

    With a rotation, q_END [E, N + 2K, D] are queries, keys and values as the layer's product gives them, and the
    new keys and values are written to the cache on the way. Entry and token are one.
    arrived_P: int32 zeros, at least one per pair of entry and key/value head; zeros again when the work is done. Not
    to be shared by streams that run side by side. None makes it, one more kernel.
    """
    num_entries, num_heads, head_dim = out_END.shape
    num_kv_heads = kv.k_BKSD.shape[1]
    group, pairs = num_heads // num_kv_heads, num_entries * num_kv_heads
    tiles = tiles or decode_tiles(head_dim, kv.k_BKSD.element_size(), group, amd=torch.version.hip is not None)
    wanted = wanted_units(num_entries, num_kv_heads, batch.max_kv, multiprocessors, tiles)
    units = (wanted + num_entries) * num_kv_heads
    fused = wanted <= MERGED_BY_LAST * num_entries
    partial_UGD = torch.empty((units, group, head_dim), dtype=torch.float32, device=q_END.device)
    lse_UG = torch.empty((units, group), dtype=torch.float32, device=q_END.device)
    if fused and arrived_P is None:
        arrived_P = torch.zeros(pairs, dtype=torch.int32, device=q_END.device)
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    shape = {"KV_HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "DIM_TILE": dim_tile}
    decode_kernel[(units,)](
        q_END,
        kv.k_BKSD,
        kv.v_BKSD,
        out_END,
        kv.k_BKSD if rotation is None or rotation.qk_norm_2D is None else rotation.qk_norm_2D,
        lse_UG if rotation is None else rotation.rope_PD,
        partial_UGD,
        lse_UG,
        arrived_P if fused else lse_UG,
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
        **shape,
        ENTRIES_TILE=triton.next_power_of_2(num_entries),
        BLOCK_SIZE=kv.block_size,
        GROUP_TILE=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tiles.block_n,
        MERGE=merge_step(triton.next_power_of_2(group), dim_tile, tiles.num_warps),
        FUSED=fused,
        ROTATE=rotation is not None,
        NORM=rotation is not None and rotation.qk_norm_2D is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
        **dependent_launch(),
    )
    if not fused:
        reduce_kernel[(num_entries, num_heads)](
            partial_UGD,
            lse_UG,
            out_END,
            batch.kv_len_E,
            num_entries,
            wanted,
            tiles.min_span,
            **shape,
            ENTRIES_TILE=triton.next_power_of_2(num_entries),
            MERGE=merge_step(1, dim_tile, 4),
            num_warps=4,
            enable_fp_fusion=True,
            **dependent_launch(),
        )
