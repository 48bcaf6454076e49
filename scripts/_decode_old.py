# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
"""Decode attention over the paged cache: one query per entry, the KV of an entry cut into splits that run side by side.

The query heads that share a key/value head are the rows of one tile, so every key is read once. How many splits there
are is fixed by the launch; how long they are follows from the entry's length on the device, so that a captured graph
stays right for any lengths. Splits past the length end at once, and the reduction leaves them out.
Flash-decoding: Dao et al. 2023, https://pytorch.org/blog/flash-decoding/.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.kernels.online_softmax import LOG2_E, fold_tile

MAX_SPLITS = 64


@triton.jit
def split_span(length: tl.tensor, splits: tl.tensor, BLOCK_N: tl.constexpr, MIN_SPAN: tl.constexpr) -> tl.tensor:
    """Positions in a split: the same for all splits of an entry, whole tiles, no shorter than pays for a program."""
    span = tl.maximum(tl.cdiv(length, splits), MIN_SPAN)
    return tl.cdiv(span, BLOCK_N) * BLOCK_N


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    q_END: tl.tensor,
    k_BKSD: tl.tensor,
    v_BKSD: tl.tensor,
    out_END: tl.tensor,
    partial_ENXD: tl.tensor,
    partial_lse_ENX: tl.tensor,
    rows_E: tl.tensor,
    kv_len_E: tl.tensor,
    block_table_RC: tl.tensor,
    table_stride: tl.tensor,
    q_stride: tl.tensor,
    scale_log2: tl.tensor,
    splits: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPAN: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    entry = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(kv_len_E + entry)
    span = split_span(length, splits, BLOCK_N, MIN_SPAN)
    begin = split * span
    if begin >= length:
        return
    end = tl.minimum(begin + span, length)

    group_G = tl.arange(0, GROUP_TILE)
    dim_D = tl.arange(0, DIM_TILE)
    token_N = tl.arange(0, BLOCK_N)
    in_group = (group_G[:, None] < GROUP) & (dim_D[None, :] < HEAD_DIM)
    head_G = kv_head * GROUP + group_G
    q_GD = tl.load(q_END + entry * q_stride + head_G[:, None] * HEAD_DIM + dim_D[None, :], mask=in_group, other=0.0)
    table_at = block_table_RC + tl.load(rows_E + entry).to(tl.int64) * table_stride

    largest_G = tl.full((GROUP_TILE,), float("-inf"), tl.float32)
    total_G = tl.zeros((GROUP_TILE,), tl.float32)
    sum_GD = tl.zeros((GROUP_TILE, DIM_TILE), tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        position_N = start + token_N
        seen_N = position_N < end
        block_N = tl.load(table_at + position_N // BLOCK_SIZE, mask=seen_N, other=0).to(tl.int64)
        slot_N = (block_N * KV_HEADS + kv_head) * BLOCK_SIZE + position_N % BLOCK_SIZE
        at_ND = slot_N[:, None] * HEAD_DIM + dim_D[None, :]
        seen_ND = seen_N[:, None]
        if DIM_TILE != HEAD_DIM:
            seen_ND = seen_ND & (dim_D[None, :] < HEAD_DIM)
        k_ND = tl.load(k_BKSD + at_ND, mask=seen_ND, other=0.0)
        v_ND = tl.load(v_BKSD + at_ND, mask=seen_ND, other=0.0)
        score_GN = tl.dot(q_GD, tl.trans(k_ND), input_precision="ieee") * scale_log2
        score_GN = tl.where(seen_N[None, :], score_GN, float("-inf"))
        largest_G, total_G, sum_GD = fold_tile(score_GN, v_ND, largest_G, total_G, sum_GD)

    head_index_G = entry * (KV_HEADS * GROUP) + head_G
    mean_GD = sum_GD / total_G[:, None]
    if WHOLE:
        out_at = out_END + head_index_G[:, None] * HEAD_DIM + dim_D[None, :]
        tl.store(out_at, mean_GD.to(out_END.dtype.element_ty), mask=in_group)
    else:
        part_G = head_index_G * splits + split
        tl.store(partial_ENXD + part_G[:, None] * HEAD_DIM + dim_D[None, :], mean_GD, mask=in_group)
        tl.store(partial_lse_ENX + part_G, largest_G + tl.log2(total_G), mask=group_G < GROUP)


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    partial_ENXD: tl.tensor,
    partial_lse_ENX: tl.tensor,
    out_END: tl.tensor,
    kv_len_E: tl.tensor,
    splits: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_SPAN: tl.constexpr,
    SPLITS_TILE: tl.constexpr,
) -> None:
    entry = tl.program_id(0).to(tl.int64)
    head_index = entry * HEADS + tl.program_id(1)
    length = tl.load(kv_len_E + entry)
    used = tl.cdiv(length, split_span(length, splits, BLOCK_N, MIN_SPAN))
    split_X = tl.arange(0, SPLITS_TILE)
    dim_D = tl.arange(0, DIM_TILE)
    in_use = split_X < used
    lse_X = tl.load(partial_lse_ENX + head_index * splits + split_X, mask=in_use, other=float("-inf"))
    weight_X = tl.exp2(lse_X - tl.max(lse_X, axis=0))
    part_at = partial_ENXD + (head_index * splits + split_X[:, None]) * HEAD_DIM + dim_D[None, :]
    part_XD = tl.load(part_at, mask=in_use[:, None] & (dim_D[None, :] < HEAD_DIM), other=0.0)
    mean_D = tl.sum(part_XD * weight_X[:, None], axis=0) / tl.sum(weight_X, axis=0)
    out_at = out_END + head_index * HEAD_DIM + dim_D
    tl.store(out_at, mean_D.to(out_END.dtype.element_ty), mask=dim_D < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How the decode kernel is cut up."""

    block_n: int  # cached tokens that a program reads at a time
    min_span: int  # cached tokens below which a split does not pay
    programs_per_processor: int  # that splitting aims at
    num_warps: int
    num_stages: int


def decode_tiles(head_dim: int, itemsize: int, amd: bool) -> DecodeTiles:
    """Keys and values of one tile take 32 KiB. Triton pipelines the table's loads and the cache's that depend on them
    with half of the stages each: 5 keep two tiles in shared memory."""
    block_n = max(16, min(128, 16384 // (triton.next_power_of_2(head_dim) * itemsize)))
    return DecodeTiles(block_n=block_n, min_span=256, programs_per_processor=4, num_warps=4, num_stages=2 if amd else 5)


def choose_splits(num_pairs: int, max_kv: int, tiles: DecodeTiles, multiprocessors: int) -> int:
    """Into how many splits to cut each of num_pairs pairs of entry and key/value head, to fill the device."""
    wanted = round(tiles.programs_per_processor * multiprocessors / num_pairs)
    return max(1, min(wanted, MAX_SPLITS, triton.cdiv(max_kv, tiles.min_span)))


def paged_decode(
    q_END: Tensor,
    out_END: Tensor,
    kv: LayerKV,
    batch: AttentionBatch,
    scale: float,
    multiprocessors: int,
    tiles: DecodeTiles | None = None,
) -> None:
    """Attention of one query per entry, written to out_END (contiguous). Heads of q are contiguous."""
    num_entries, num_heads, head_dim = q_END.shape
    num_kv_heads = kv.k_BKSD.shape[1]
    tiles = tiles or decode_tiles(head_dim, kv.k_BKSD.element_size(), amd=torch.version.hip is not None)
    splits = choose_splits(num_entries * num_kv_heads, batch.max_kv, tiles, multiprocessors)
    partial_ENXD = lse_ENX = out_END
    if splits > 1:
        shape = (num_entries, num_heads, splits, head_dim)
        partial_ENXD = torch.empty(shape, dtype=torch.float32, device=q_END.device)
        lse_ENX = torch.empty(shape[:3], dtype=torch.float32, device=q_END.device)
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    decode_kernel[(num_entries, num_kv_heads, splits)](
        q_END,
        kv.k_BKSD,
        kv.v_BKSD,
        out_END,
        partial_ENXD,
        lse_ENX,
        batch.rows_E,
        batch.kv_len_E,
        batch.block_table_RC,
        batch.block_table_RC.stride(0),
        q_END.stride(0),
        scale * LOG2_E,
        splits,
        KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv.block_size,
        GROUP_TILE=max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        DIM_TILE=dim_tile,
        BLOCK_N=tiles.block_n,
        MIN_SPAN=tiles.min_span,
        WHOLE=splits == 1,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        reduce_kernel[(num_entries, num_heads)](
            partial_ENXD,
            lse_ENX,
            out_END,
            batch.kv_len_E,
            splits,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM_TILE=dim_tile,
            BLOCK_N=tiles.block_n,
            MIN_SPAN=tiles.min_span,
            SPLITS_TILE=triton.next_power_of_2(splits),
            num_warps=4,
            enable_fp_fusion=True,
        )
