# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
"""Norm of the heads (optional), rotation of q and k, and the write of k and v to the paged cache, in one pass.

A program takes some heads of one token. Heads 0..N-1 are queries, then K keys, then K values; every head is read as
two halves, and values pass through a rotation by zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV
from gapless.kernels.dependent import dependent_launch, follow

HEADS_PER_PROGRAM = 8


@triton.jit
def rope_append_kernel(
    qkv_TM: tl.tensor,
    q_TND: tl.tensor,
    k_BKSD: tl.tensor,
    v_BKSD: tl.tensor,
    qk_norm_2D: tl.tensor,
    rope_PD: tl.tensor,
    token_rows_T: tl.tensor,
    positions_T: tl.tensor,
    block_table_RC: tl.tensor,
    table_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    HALF_TILE: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    follow(DEPENDENT)
    HALF: tl.constexpr = HEAD_DIM // 2
    ALL_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head_X1 = (tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE))[:, None]
    dim_1D = tl.arange(0, HALF_TILE)[None, :]
    is_q = head_X1 < HEADS
    is_k = (head_X1 >= HEADS) & (head_X1 < HEADS + KV_HEADS)
    is_v = (head_X1 >= HEADS + KV_HEADS) & (head_X1 < ALL_HEADS)
    in_dim = dim_1D < HALF
    inside = (head_X1 < ALL_HEADS) & in_dim

    at_XD = qkv_TM + token * (ALL_HEADS * HEAD_DIM) + head_X1 * HEAD_DIM + dim_1D
    first = tl.load(at_XD, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at_XD + HALF, mask=inside, other=0.0).to(tl.float32)

    rotated = head_X1 < HEADS + KV_HEADS
    if NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        inverse_X1 = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight_at = qk_norm_2D + tl.where(is_q, 0, HEAD_DIM) + dim_1D
        normed = rotated & in_dim
        first *= tl.where(rotated, inverse_X1 * tl.load(weight_at, mask=normed, other=1.0).to(tl.float32), 1.0)
        second *= tl.where(rotated, inverse_X1 * tl.load(weight_at + HALF, mask=normed, other=1.0).to(tl.float32), 1.0)

    position = tl.load(positions_T + token)
    angle_at = rope_PD + position.to(tl.int64) * HEAD_DIM + dim_1D
    cos = tl.where(rotated, tl.load(angle_at, mask=in_dim, other=1.0), 1.0)
    sin = tl.where(rotated, tl.load(angle_at + HALF, mask=in_dim, other=0.0), 0.0)
    low = (first * cos - second * sin).to(q_TND.dtype.element_ty)
    high = (second * cos + first * sin).to(q_TND.dtype.element_ty)

    q_at = q_TND + (token * HEADS + head_X1) * HEAD_DIM + dim_1D
    tl.store(q_at, low, mask=is_q & in_dim)
    tl.store(q_at + HALF, high, mask=is_q & in_dim)

    row = tl.load(token_rows_T + token).to(tl.int64)
    block = tl.load(block_table_RC + row * table_stride + position // BLOCK_SIZE).to(tl.int64)
    kv_head_X1 = tl.where(is_v, head_X1 - KV_HEADS, head_X1) - HEADS
    slot_X1 = (block * KV_HEADS + kv_head_X1) * BLOCK_SIZE + position % BLOCK_SIZE
    cache_at = slot_X1 * HEAD_DIM + dim_1D
    tl.store(k_BKSD + cache_at, low, mask=is_k & in_dim)
    tl.store(k_BKSD + cache_at + HALF, high, mask=is_k & in_dim)
    tl.store(v_BKSD + cache_at, low, mask=is_v & in_dim)
    tl.store(v_BKSD + cache_at + HALF, high, mask=is_v & in_dim)


def rope_append(qkv_TM: Tensor, rotation: HeadRotation, kv: LayerKV, batch: AttentionBatch) -> Tensor:
    """See models/layers.py `LayerOps.rope_append`. All inputs are contiguous; the cache has qkv's dtype."""
    num_kv_heads, head_dim = kv.k_BKSD.shape[1], kv.k_BKSD.shape[3]
    num_tokens, all_heads = qkv_TM.shape[0], qkv_TM.shape[1] // head_dim
    num_heads = all_heads - 2 * num_kv_heads
    q_TND = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_TM.dtype, device=qkv_TM.device)
    rope_append_kernel[(num_tokens, triton.cdiv(all_heads, HEADS_PER_PROGRAM))](
        qkv_TM,
        q_TND,
        kv.k_BKSD,
        kv.v_BKSD,
        rotation.rope_PD if rotation.qk_norm_2D is None else rotation.qk_norm_2D,
        rotation.rope_PD,
        batch.token_rows_T,
        batch.positions_T,
        batch.block_table_RC,
        batch.block_table_RC.stride(0),
        rotation.eps,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv.block_size,
        HEADS_TILE=HEADS_PER_PROGRAM,
        HALF_TILE=triton.next_power_of_2(head_dim // 2),
        NORM=rotation.qk_norm_2D is not None,
        num_warps=4,
        enable_fp_fusion=True,
        **dependent_launch(),
    )
    return q_TND
