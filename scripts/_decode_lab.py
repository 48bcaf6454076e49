# pyright: basic
# ruff: noqa
"""Scratch: candidates for the decode kernel."""
from __future__ import annotations
import triton
import triton.language as tl


@triton.jit
def chunk_span(length, chunks: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPAN: tl.constexpr):
    span = tl.maximum(tl.cdiv(length, chunks), MIN_SPAN)
    return tl.cdiv(span, BLOCK_N) * BLOCK_N


@triton.jit
def clock(x):
    return tl.inline_asm_elementwise("{ mov.u64 $0, %clock64; }", "=l,r", [x], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def wall(x):
    return tl.inline_asm_elementwise("{ mov.u64 $0, %globaltimer; }", "=l,r", [x], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def smid(x):
    return tl.inline_asm_elementwise("{ mov.u32 $0, %smid; }", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def gather_read(k_BKSD, v_BKSD, out, rows_E, kv_len_E, block_table_RC, table_stride, KV_HEADS: tl.constexpr, SPLITS: tl.constexpr,
                BLOCK_N: tl.constexpr, D: tl.constexpr, ORDER: tl.constexpr):
    """Nothing but the loads of decode attention."""
    if ORDER == 0:
        entry, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    else:
        head, split, entry = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(kv_len_E + entry)
    span = tl.cdiv(length, SPLITS)
    table_at = block_table_RC + tl.load(rows_E + entry).to(tl.int64) * table_stride
    token_N = tl.arange(0, BLOCK_N)
    dim_D = tl.arange(0, D)
    acc = tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(split * span, split * span + span, BLOCK_N):
        pos = start + token_N
        block_N = tl.load(table_at + pos // 16).to(tl.int64)
        at = ((block_N * KV_HEADS + head) * 16 + pos % 16)[:, None] * D + dim_D[None, :]
        acc += tl.load(k_BKSD + at).to(tl.float32) + tl.load(v_BKSD + at).to(tl.float32)
    tl.store(out + (entry * KV_HEADS + head) * SPLITS + split, tl.sum(tl.sum(acc, 1), 0))


@triton.jit
def fold(score_GN, v_ND, largest_G, total_G, sum_GD):
    new_G = tl.maximum(largest_G, tl.max(score_GN, axis=1))
    weight_GN = tl.exp2(score_GN - new_G[:, None])
    shrink_G = tl.exp2(largest_G - new_G)
    total_G = total_G * shrink_G + tl.sum(weight_GN, axis=1)
    sum_GD = tl.dot(weight_GN.to(v_ND.dtype), v_ND, sum_GD * shrink_G[:, None], input_precision="ieee")
    return new_G, total_G, sum_GD


@triton.jit
def locate(position, cum_E, cost_E, kv_len_E, entry_E, entries, KV_HEADS: tl.constexpr, PAIR_COST: tl.constexpr, BLOCK_N: tl.constexpr,
           CHUNKS: tl.constexpr, MIN_SPAN: tl.constexpr):
    before_E = cum_E * KV_HEADS <= position
    entry = tl.sum((before_E & (entry_E < entries)).to(tl.int32), axis=0)
    before = tl.sum(tl.where(before_E, cost_E, 0), axis=0) * KV_HEADS
    length = tl.load(kv_len_E + entry, mask=entry < entries, other=1)
    cost = tl.cdiv(length, BLOCK_N) + PAIR_COST
    head = (position - before) // cost
    tile = tl.maximum((position - before) % cost - PAIR_COST, 0)
    span = chunk_span(length, CHUNKS, BLOCK_N, MIN_SPAN)
    chunk = tl.cdiv(tile * BLOCK_N, span)
    chunks = tl.cdiv(length, span)
    pair = entry * KV_HEADS + head
    return pair + chunk // chunks, chunk % chunks


@triton.jit(do_not_specialize=["entries", "total_programs", "processors"])
def work_kernel(
    q_END, k_BKSD, v_BKSD, out_END, partial_PXGD, partial_lse_PXG, arrived_P, rows_E, kv_len_E, block_table_RC,
    table_stride, q_stride, scale_log2, entries, processors,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP_TILE: tl.constexpr, DIM_TILE: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPAN: tl.constexpr,
    CHUNKS: tl.constexpr, ENTRIES_TILE: tl.constexpr, PAIR_COST: tl.constexpr, PER: tl.constexpr,
    FUSE: tl.constexpr, PREFETCH: tl.constexpr, EVICT: tl.constexpr, FLAT: tl.constexpr, KMASK: tl.constexpr,
    times=None, TIMES: tl.constexpr = False,
):
    # neighbours in the order of work sit on one multiprocessor
    program = (tl.program_id(0) % processors) * PER + tl.program_id(0) // processors
    if TIMES:
        times += tl.program_id(0) * 8
        tl.store(times, wall(program)); tl.store(times + 1, clock(program)); tl.store(times + 7, smid(program).to(tl.int64))
    entry_E = tl.arange(0, ENTRIES_TILE)
    length_E = tl.load(kv_len_E + entry_E, mask=entry_E < entries, other=0)
    cost_E = tl.where(entry_E < entries, tl.cdiv(length_E, BLOCK_N) + PAIR_COST, 0)
    cum_E = tl.cumsum(cost_E, axis=0)
    total = (tl.sum(cost_E, axis=0) * KV_HEADS).to(tl.int64)
    begin_at = (total * program // (processors * PER)).to(tl.int32)
    end_at = (total * (program + 1) // (processors * PER)).to(tl.int32)
    first_pair, first_chunk = locate(begin_at, cum_E, cost_E, kv_len_E, entry_E, entries, KV_HEADS, PAIR_COST, BLOCK_N, CHUNKS, MIN_SPAN)
    last_pair, last_chunk = locate(end_at, cum_E, cost_E, kv_len_E, entry_E, entries, KV_HEADS, PAIR_COST, BLOCK_N, CHUNKS, MIN_SPAN)

    if TIMES:
        tl.store(times + 2, clock(first_pair + last_pair + first_chunk + last_chunk))
    group_G = tl.arange(0, GROUP_TILE)
    dim_D = tl.arange(0, DIM_TILE)
    token_N = tl.arange(0, BLOCK_N)
    in_group = (group_G[:, None] < GROUP) & (dim_D[None, :] < HEAD_DIM)
    for at in range(0, last_pair - first_pair + (last_chunk > 0).to(tl.int32)):
        pair = first_pair + at
        entry = (pair // KV_HEADS).to(tl.int64)
        kv_head = pair % KV_HEADS
        length = tl.load(kv_len_E + entry)
        span = chunk_span(length, CHUNKS, BLOCK_N, MIN_SPAN)
        chunks = tl.cdiv(length, span)
        chunk = tl.where(pair == first_pair, first_chunk, 0)
        stop_chunk = tl.where(pair == last_pair, last_chunk, chunks)
        begin = chunk * span
        end = tl.minimum(stop_chunk * span, length)
        mine = stop_chunk - chunk
        head_G = kv_head * GROUP + group_G
        q_GD = tl.load(q_END + entry * q_stride + head_G[:, None] * HEAD_DIM + dim_D[None, :], mask=in_group, other=0.0)
        table_at = block_table_RC + tl.load(rows_E + entry).to(tl.int64) * table_stride

        if FLAT:
            largest_G = tl.full((GROUP_TILE,), float("-inf"), tl.float32)
            total_G = tl.zeros((GROUP_TILE,), tl.float32)
            sum_GD = tl.zeros((GROUP_TILE, DIM_TILE), tl.float32)
            chunk_end = tl.minimum(begin + span, length)
            if PREFETCH:
                next_N = tl.load(table_at + (begin + token_N) // BLOCK_SIZE, mask=begin + token_N < end, other=0)
            for start in tl.range(begin, end, BLOCK_N):
                position_N = start + token_N
                seen_N = position_N < end
                if PREFETCH:
                    block_N = next_N.to(tl.int64)
                    ahead_N = position_N + BLOCK_N
                    next_N = tl.load(table_at + ahead_N // BLOCK_SIZE, mask=ahead_N < end, other=0)
                else:
                    block_N = tl.load(table_at + position_N // BLOCK_SIZE, mask=seen_N, other=0).to(tl.int64)
                slot_N = (block_N * KV_HEADS + kv_head) * BLOCK_SIZE + position_N % BLOCK_SIZE
                where_ND = slot_N[:, None] * HEAD_DIM + dim_D[None, :]
                seen_ND = seen_N[:, None]
                if DIM_TILE != HEAD_DIM:
                    seen_ND = seen_ND & (dim_D[None, :] < HEAD_DIM)
                if KMASK or DIM_TILE != HEAD_DIM:
                    k_ND = tl.load(k_BKSD + where_ND, mask=seen_ND, other=0.0, eviction_policy=EVICT)
                else:
                    k_ND = tl.load(k_BKSD + where_ND, eviction_policy=EVICT)
                v_ND = tl.load(v_BKSD + where_ND, mask=seen_ND, other=0.0, eviction_policy=EVICT)
                score_GN = tl.dot(q_GD, tl.trans(k_ND), input_precision="ieee") * scale_log2
                score_GN = tl.where(seen_N[None, :], score_GN, float("-inf"))
                largest_G, total_G, sum_GD = fold(score_GN, v_ND, largest_G, total_G, sum_GD)
                full = start + BLOCK_N >= chunk_end
                if TIMES:
                    if (start == begin) & (at == 0):
                        tl.store(times + 3, clock(tl.max(total_G, 0).to(tl.int32)))
                    if (start == begin + 4 * BLOCK_N) & (at == 0):
                        tl.store(times + 4, clock(tl.max(total_G, 0).to(tl.int32)))
                if full:
                    mean_GD = sum_GD / total_G[:, None]
                    if chunks == 1:
                        tl.store(out_END + (entry * KV_HEADS * GROUP + head_G[:, None]) * HEAD_DIM + dim_D[None, :],
                                 mean_GD.to(out_END.dtype.element_ty), mask=in_group)
                    else:
                        part_G = (pair.to(tl.int64) * CHUNKS + start // span) * GROUP + group_G
                        tl.store(partial_PXGD + part_G[:, None] * HEAD_DIM + dim_D[None, :], mean_GD, mask=in_group)
                        tl.store(partial_lse_PXG + part_G, largest_G + tl.log2(total_G), mask=group_G < GROUP)
                    chunk_end = tl.minimum(chunk_end + span, length)
                largest_G = tl.where(full, float("-inf"), largest_G)
                total_G = tl.where(full, 0.0, total_G)
                sum_GD = tl.where(full, 0.0, sum_GD)
        else:
            for nth in range(0, mine):
                index = chunk + nth
                low = index * span
                high = tl.minimum(low + span, length)
                largest_G = tl.full((GROUP_TILE,), float("-inf"), tl.float32)
                total_G = tl.zeros((GROUP_TILE,), tl.float32)
                sum_GD = tl.zeros((GROUP_TILE, DIM_TILE), tl.float32)
                if PREFETCH:
                    next_N = tl.load(table_at + (low + token_N) // BLOCK_SIZE, mask=low + token_N < high, other=0)
                for start in tl.range(low, high, BLOCK_N):
                    position_N = start + token_N
                    seen_N = position_N < high
                    if PREFETCH:
                        block_N = next_N.to(tl.int64)
                        ahead_N = position_N + BLOCK_N
                        next_N = tl.load(table_at + ahead_N // BLOCK_SIZE, mask=ahead_N < high, other=0)
                    else:
                        block_N = tl.load(table_at + position_N // BLOCK_SIZE, mask=seen_N, other=0).to(tl.int64)
                    slot_N = (block_N * KV_HEADS + kv_head) * BLOCK_SIZE + position_N % BLOCK_SIZE
                    where_ND = slot_N[:, None] * HEAD_DIM + dim_D[None, :]
                    seen_ND = seen_N[:, None]
                    if DIM_TILE != HEAD_DIM:
                        seen_ND = seen_ND & (dim_D[None, :] < HEAD_DIM)
                    k_ND = tl.load(k_BKSD + where_ND, mask=seen_ND, other=0.0, eviction_policy=EVICT)
                    v_ND = tl.load(v_BKSD + where_ND, mask=seen_ND, other=0.0, eviction_policy=EVICT)
                    score_GN = tl.dot(q_GD, tl.trans(k_ND), input_precision="ieee") * scale_log2
                    score_GN = tl.where(seen_N[None, :], score_GN, float("-inf"))
                    largest_G, total_G, sum_GD = fold(score_GN, v_ND, largest_G, total_G, sum_GD)
                mean_GD = sum_GD / total_G[:, None]
                if chunks == 1:
                    tl.store(out_END + (entry * KV_HEADS * GROUP + head_G[:, None]) * HEAD_DIM + dim_D[None, :],
                             mean_GD.to(out_END.dtype.element_ty), mask=in_group)
                else:
                    part_G = (pair.to(tl.int64) * CHUNKS + index) * GROUP + group_G
                    tl.store(partial_PXGD + part_G[:, None] * HEAD_DIM + dim_D[None, :], mean_GD, mask=in_group)
                    tl.store(partial_lse_PXG + part_G, largest_G + tl.log2(total_G), mask=group_G < GROUP)
        if FUSE:
            if chunks > 1:
                tl.debug_barrier()
                done = tl.atomic_add(arrived_P + pair, mine, sem="acq_rel", scope="gpu") + mine
                if done == chunks:
                    tl.store(arrived_P + pair, 0)
                    merge_chunks(partial_PXGD, partial_lse_PXG, out_END, pair.to(tl.int64), chunks, GROUP, HEAD_DIM, DIM_TILE, CHUNKS)
    if TIMES:
        tl.debug_barrier()
        tl.store(times + 5, clock(program)); tl.store(times + 6, wall(program))


@triton.jit
def merge_chunks(partial_PXGD, partial_lse_PXG, out_END, pair, chunks, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
                 DIM_TILE: tl.constexpr, CHUNKS: tl.constexpr):
    GROUP_POWER: tl.constexpr = triton.next_power_of_2(GROUP)
    STEP: tl.constexpr = min(triton.next_power_of_2(CHUNKS), max(1, 8192 // (GROUP_POWER * DIM_TILE)))
    X_TILE: tl.constexpr = triton.next_power_of_2(CHUNKS)
    group_G = tl.arange(0, GROUP_POWER)
    dim_D = tl.arange(0, DIM_TILE)
    all_X = tl.arange(0, X_TILE)
    base = pair * CHUNKS
    lse_at = partial_lse_PXG + (base + all_X[:, None]) * GROUP + group_G[None, :]
    lse_XG = tl.load(lse_at, mask=(all_X[:, None] < chunks) & (group_G[None, :] < GROUP), other=float("-inf"), cache_modifier=".cg")
    largest_G = tl.max(lse_XG, axis=0)
    largest_G = tl.where(group_G < GROUP, largest_G, 0.0)
    total_G = tl.sum(tl.exp2(lse_XG - largest_G[None, :]), axis=0)
    sum_GD = tl.zeros((GROUP_POWER, DIM_TILE), tl.float32)
    for start in range(0, chunks, STEP):
        some_X = start + tl.arange(0, STEP)
        in_use = (some_X[:, None] < chunks) & (group_G[None, :] < GROUP)
        part_XG = (base + some_X[:, None]) * GROUP + group_G[None, :]
        some_lse_XG = tl.load(partial_lse_PXG + part_XG, mask=in_use, other=float("-inf"), cache_modifier=".cg")
        part_XGD = tl.load(partial_PXGD + part_XG[:, :, None] * HEAD_DIM + dim_D[None, None, :],
                           mask=in_use[:, :, None] & (dim_D[None, None, :] < HEAD_DIM), other=0.0, cache_modifier=".cg")
        weight_XG = tl.exp2(some_lse_XG - largest_G[None, :])
        sum_GD += tl.sum(part_XGD * weight_XG[:, :, None], axis=0)
    mean_GD = sum_GD / total_G[:, None]
    tl.store(out_END + (pair * GROUP + group_G[:, None]) * HEAD_DIM + dim_D[None, :], mean_GD.to(out_END.dtype.element_ty),
             mask=(group_G[:, None] < GROUP) & (dim_D[None, :] < HEAD_DIM))


@triton.jit
def merge_kernel(partial_PXGD, partial_lse_PXG, out_END, kv_len_E,
                 KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr,
                 BLOCK_N: tl.constexpr, MIN_SPAN: tl.constexpr, CHUNKS: tl.constexpr):
    pair = tl.program_id(0)
    length = tl.load(kv_len_E + pair // KV_HEADS)
    chunks = tl.cdiv(length, chunk_span(length, CHUNKS, BLOCK_N, MIN_SPAN))
    if chunks > 1:
        merge_chunks(partial_PXGD, partial_lse_PXG, out_END, pair.to(tl.int64), chunks, GROUP, HEAD_DIM, DIM_TILE, CHUNKS)


def launch(q, out, kv, batch, scale, processors, cfg, state, times=None):
    """cfg: block_n min_span chunks per cost fuse prefetch evict flat warps stages"""
    import torch
    E, N, D = q.shape
    K = kv.k_BKSD.shape[1]
    G = N // K
    chunks = max(1, min(cfg["chunks"], triton.cdiv(batch.max_kv, cfg["min_span"])))
    dim_tile = max(16, triton.next_power_of_2(D))
    partial = torch.empty((E * K, chunks, G, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((E * K, chunks, G), dtype=torch.float32, device=q.device)
    common = dict(KV_HEADS=K, GROUP=G, HEAD_DIM=D, DIM_TILE=dim_tile, BLOCK_N=cfg["block_n"], MIN_SPAN=cfg["min_span"], CHUNKS=chunks)
    work_kernel[(processors * cfg["per"],)](
        q, kv.k_BKSD, kv.v_BKSD, out, partial, lse, state, batch.rows_E, batch.kv_len_E, batch.block_table_RC,
        batch.block_table_RC.stride(0), q.stride(0), scale * 1.4426950408889634, E, processors, **common,
        BLOCK_SIZE=kv.block_size, GROUP_TILE=max(16, triton.next_power_of_2(G)), ENTRIES_TILE=triton.next_power_of_2(E),
        PAIR_COST=cfg["cost"], PER=cfg["per"], FUSE=cfg["fuse"], PREFETCH=cfg["prefetch"], EVICT=cfg["evict"], FLAT=cfg["flat"], KMASK=True,
        num_warps=cfg["warps"], num_stages=cfg["stages"], enable_fp_fusion=True, maxnreg=cfg["maxnreg"], times=times, TIMES=times is not None)
    if chunks > 1 and not cfg["fuse"]:
        merge_kernel[(E * K,)](partial, lse, out, batch.kv_len_E, **common, num_warps=4, enable_fp_fusion=True)


DEFAULT = dict(block_n=64, min_span=256, chunks=16, per=3, cost=1, fuse=True, prefetch=True, evict="", flat=True, warps=4, stages=3, maxnreg=None)
