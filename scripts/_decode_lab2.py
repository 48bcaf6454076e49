# pyright: basic
# ruff: noqa
"""Scratch: every warp its own stream of tokens."""
from __future__ import annotations
import triton
import triton.language as tl

try:
    from _decode_lab import clock, wall, smid
except ImportError:
    pass


@triton.jit
def chunk_span(length, chunks: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPAN: tl.constexpr):
    span = tl.maximum(tl.cdiv(length, chunks), MIN_SPAN)
    return tl.cdiv(span, BLOCK_N) * BLOCK_N


@triton.jit
def attend_span(
    q_WGD, k_BKSD, v_BKSD, table_at, kv_head, begin, end, scale_log2,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, GROUP_TILE: tl.constexpr, DIM_TILE: tl.constexpr,
    STREAMS: tl.constexpr, PART_N: tl.constexpr, PREFETCH: tl.constexpr, SUMLATE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = STREAMS * PART_N
    BLOCK_STRIDE: tl.constexpr = KV_HEADS * BLOCK_SIZE * HEAD_DIM
    token_WN = tl.arange(0, STREAMS)[:, None] * PART_N + tl.arange(0, PART_N)[None, :]
    dim_D = tl.arange(0, DIM_TILE)
    head_at = kv_head * (BLOCK_SIZE * HEAD_DIM)
    if BLOCK_N % BLOCK_SIZE == 0:
        in_block_WND = (token_WN % BLOCK_SIZE)[:, :, None] * HEAD_DIM + dim_D[None, None, :]
    largest_WG = tl.full((STREAMS, GROUP_TILE), -1.0e30, tl.float32)
    if SUMLATE:
        total_WGN = tl.zeros((STREAMS, GROUP_TILE, PART_N), tl.float32)
    else:
        total_WG = tl.zeros((STREAMS, GROUP_TILE), tl.float32)
    sum_WGD = tl.zeros((STREAMS, GROUP_TILE, DIM_TILE), tl.float32)
    k_at = k_BKSD + head_at
    v_at = v_BKSD + head_at
    if PREFETCH:
        next_WN = tl.load(table_at + (begin + token_WN) // BLOCK_SIZE, mask=begin + token_WN < end, other=0)
    for start in tl.range(begin, end, BLOCK_N):
        seen_WN = start + token_WN < end
        if PREFETCH:
            block_WN = next_WN
            ahead = start + BLOCK_N
            next_WN = tl.load(table_at + (ahead + token_WN) // BLOCK_SIZE, mask=ahead + token_WN < end, other=0)
        else:
            if BLOCK_N % BLOCK_SIZE == 0:
                column_WN = start // BLOCK_SIZE + token_WN // BLOCK_SIZE
            else:
                column_WN = (start + token_WN) // BLOCK_SIZE
            block_WN = tl.load(table_at + column_WN, mask=seen_WN, other=0)
        if BLOCK_N % BLOCK_SIZE != 0:
            in_block_WND = ((start + token_WN) % BLOCK_SIZE)[:, :, None] * HEAD_DIM + dim_D[None, None, :]
        at_WND = (block_WN.to(tl.int64) * BLOCK_STRIDE)[:, :, None] + in_block_WND
        seen_WND = seen_WN[:, :, None]
        if DIM_TILE != HEAD_DIM:
            in_dim = dim_D[None, None, :] < HEAD_DIM
            k_WND = tl.load(k_at + at_WND, mask=in_dim, other=0.0)
            seen_WND = seen_WND & in_dim
        else:
            k_WND = tl.load(k_at + at_WND)
        v_WND = tl.load(v_at + at_WND, mask=seen_WND, other=0.0)
        score_WGN = tl.dot(q_WGD, tl.permute(k_WND, (0, 2, 1)), input_precision="ieee") * scale_log2
        score_WGN = tl.where(seen_WN[:, None, :], score_WGN, float("-inf"))
        new_WG = tl.maximum(largest_WG, tl.max(score_WGN, axis=2))
        weight_WGN = tl.exp2(score_WGN - new_WG[:, :, None])
        shrink_WG = tl.exp2(largest_WG - new_WG)
        if SUMLATE:
            total_WGN = total_WGN * shrink_WG[:, :, None] + weight_WGN
        else:
            total_WG = total_WG * shrink_WG + tl.sum(weight_WGN, axis=2)
        sum_WGD = tl.dot(weight_WGN.to(v_WND.dtype), v_WND, sum_WGD * shrink_WG[:, :, None], input_precision="ieee")
        largest_WG = new_WG
    if SUMLATE:
        total_WG = tl.sum(total_WGN, axis=2)
    largest_G = tl.max(largest_WG, axis=0)
    share_WG = tl.exp2(largest_WG - largest_G[None, :])
    total_G = tl.sum(total_WG * share_WG, axis=0)
    mean_GD = tl.sum(sum_WGD * share_WG[:, :, None], axis=0) / total_G[:, None]
    return mean_GD, largest_G + tl.log2(total_G)


@triton.jit
def merge_chunks(partial, lse, out_END, pair, first_slot, skip, slots, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
                 DIM_TILE: tl.constexpr, X_STEP: tl.constexpr, APART: tl.constexpr):
    """Parts lie at first_slot, then at first_slot + skip, + 1, + 1, ...; one after the other X_STEP at a time."""
    GP: tl.constexpr = triton.next_power_of_2(GROUP)
    group_G = tl.arange(0, GP)
    dim_D = tl.arange(0, DIM_TILE)
    step_X = tl.arange(0, X_STEP)
    in_group = group_G[None, :] < GROUP
    largest_G = tl.full((GP,), -1.0e30, tl.float32)
    total_G = tl.zeros((GP,), tl.float32)
    sum_GD = tl.zeros((GP, DIM_TILE), tl.float32)
    for start in range(0, slots, X_STEP):
        nth_X = start + step_X
        slot_X = tl.where(nth_X == 0, first_slot, first_slot + skip + (nth_X - 1) * APART)
        in_use_XG = (nth_X < slots)[:, None] & in_group
        at_XG = slot_X.to(tl.int64)[:, None] * GROUP + group_G[None, :]
        lse_XG = tl.load(lse + at_XG, mask=in_use_XG, other=float("-inf"), cache_modifier=".cg")
        part_XGD = tl.load(partial + at_XG[:, :, None] * HEAD_DIM + dim_D[None, None, :],
                           mask=in_use_XG[:, :, None] & (dim_D[None, None, :] < HEAD_DIM), other=0.0, cache_modifier=".cg")
        new_G = tl.maximum(largest_G, tl.max(lse_XG, axis=0))
        weight_XG = tl.exp2(lse_XG - new_G[None, :])
        shrink_G = tl.exp2(largest_G - new_G)
        total_G = total_G * shrink_G + tl.sum(weight_XG, axis=0)
        sum_GD = sum_GD * shrink_G[:, None] + tl.sum(part_XGD * weight_XG[:, :, None], axis=0)
        largest_G = new_G
    mean_GD = sum_GD / total_G[:, None]
    tl.store(out_END + (pair.to(tl.int64) * GROUP + group_G[:, None]) * HEAD_DIM + dim_D[None, :], mean_GD.to(out_END.dtype.element_ty),
             mask=(group_G[:, None] < GROUP) & (dim_D[None, :] < HEAD_DIM))


@triton.jit
def pair_at(position, cum_E, cost_E, length_E, entry_E, entries, KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """-> pair, tile in the pair"""
    before_E = (cum_E * KV_HEADS <= position) & (entry_E < entries)
    entry = tl.sum(before_E.to(tl.int32), axis=0)
    before = tl.sum(tl.where(before_E, cost_E, 0), axis=0) * KV_HEADS
    cost = tl.maximum(tl.sum(tl.where(entry_E == entry, cost_E, 0), axis=0), 1)
    return entry * KV_HEADS + (position - before) // cost, (position - before) % cost


@triton.jit(do_not_specialize=["entries", "processors"])
def work2_kernel(
    q_END, k_BKSD, v_BKSD, out_END, partial, partial_lse, arrived_P, rows_E, kv_len_E, block_table_RC,
    table_stride, q_stride, scale_log2, entries, processors,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP_TILE: tl.constexpr, DIM_TILE: tl.constexpr, STREAMS: tl.constexpr, PART_N: tl.constexpr, MIN_SPAN: tl.constexpr,
    CHUNKS: tl.constexpr, ENTRIES_TILE: tl.constexpr, PER: tl.constexpr, X_STEP: tl.constexpr,
    MODE: tl.constexpr, PREFETCH: tl.constexpr, SUMLATE: tl.constexpr,
    times=None, TIMES: tl.constexpr = False,
):
    """MODE 0: a program for a chunk; 1: balanced over whole chunks; 2: balanced over tiles."""
    BLOCK_N: tl.constexpr = STREAMS * PART_N
    if TIMES:
        times += (tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)) * 8
        tl.store(times, wall(tl.program_id(0))); tl.store(times + 1, clock(tl.program_id(0))); tl.store(times + 7, smid(tl.program_id(0)).to(tl.int64))
    if MODE == 0:
        first_pair = tl.program_id(0)
        first = tl.program_id(1)
        segments = 1
        last_pair = first_pair
        last = 0
    else:
        programs = tl.num_programs(0)
        if MODE == 1:
            program = (tl.program_id(0) % processors) * PER + tl.program_id(0) // processors
        else:
            program = tl.program_id(0)
        entry_E = tl.arange(0, ENTRIES_TILE)
        length_E = tl.load(kv_len_E + entry_E, mask=entry_E < entries, other=0)
        cost_E = tl.cdiv(length_E, BLOCK_N)
        cum_E = tl.cumsum(cost_E, axis=0)
        total = (tl.sum(cost_E, axis=0) * KV_HEADS).to(tl.int64)
        if MODE == 2:
            # no share shorter than pays
            programs = tl.minimum(programs, tl.cdiv(total, MIN_SPAN // BLOCK_N).to(tl.int32))
        begin_at = (total * tl.minimum(program, programs) // programs).to(tl.int32)
        end_at = (total * tl.minimum(program + 1, programs) // programs).to(tl.int32)
        first_pair, first = pair_at(begin_at, cum_E, cost_E, length_E, entry_E, entries, KV_HEADS, BLOCK_N)
        last_pair, last = pair_at(end_at, cum_E, cost_E, length_E, entry_E, entries, KV_HEADS, BLOCK_N)
        if MODE == 1:
            first_len = tl.load(kv_len_E + first_pair // KV_HEADS, mask=first_pair < entries * KV_HEADS, other=1)
            last_len = tl.load(kv_len_E + last_pair // KV_HEADS, mask=last_pair < entries * KV_HEADS, other=1)
            first_span = chunk_span(first_len, CHUNKS, BLOCK_N, MIN_SPAN)
            last_span = chunk_span(last_len, CHUNKS, BLOCK_N, MIN_SPAN)
            first = tl.cdiv(first * BLOCK_N, first_span)
            last = tl.cdiv(last * BLOCK_N, last_span)
            first_n = tl.cdiv(first_len, first_span)
            last_n = tl.cdiv(last_len, last_span)
            first_pair += first // first_n
            first = first % first_n
            last_pair += last // last_n
            last = last % last_n
        segments = last_pair - first_pair + (last > 0).to(tl.int32)

    if TIMES:
        tl.store(times + 2, clock(first_pair + last_pair + first + last))
    group_G = tl.arange(0, GROUP_TILE)
    dim_D = tl.arange(0, DIM_TILE)
    stream_W = tl.arange(0, STREAMS)
    in_group = (group_G[:, None] < GROUP) & (dim_D[None, :] < HEAD_DIM)
    for nth in range(0, segments):
        pair = first_pair + nth
        entry = (pair // KV_HEADS).to(tl.int64)
        kv_head = pair % KV_HEADS
        length = tl.load(kv_len_E + entry)
        table_at = block_table_RC + tl.load(rows_E + entry).to(tl.int64) * table_stride
        head_G = kv_head * GROUP + group_G
        q_at_GD = entry * q_stride + head_G[:, None] * HEAD_DIM + dim_D[None, :]
        q_WGD = tl.load(q_END + q_at_GD[None, :, :] + stream_W[:, None, None] * 0, mask=in_group[None, :, :] & (stream_W[:, None, None] >= 0), other=0.0)
        out_at_GD = (entry * (KV_HEADS * GROUP) + head_G[:, None]) * HEAD_DIM + dim_D[None, :]
        if MODE == 2:
            tiles = tl.cdiv(length, BLOCK_N)
            from_tile = tl.where(nth == 0, first, 0)
            to_tile = tl.where(pair == last_pair, last, tiles)
            mean_GD, lse_G = attend_span(q_WGD, k_BKSD, v_BKSD, table_at, kv_head, from_tile * BLOCK_N, tl.minimum(to_tile * BLOCK_N, length), scale_log2,
                KV_HEADS, HEAD_DIM, BLOCK_SIZE, GROUP_TILE, DIM_TILE, STREAMS, PART_N, PREFETCH, SUMLATE)
            if (from_tile == 0) & (to_tile == tiles):
                tl.store(out_END + out_at_GD, mean_GD.to(out_END.dtype.element_ty), mask=in_group)
            else:
                slot = 2 * program + tl.where(nth > 0, 1, 0)
                part_G = slot.to(tl.int64) * GROUP + group_G
                tl.store(partial + part_G[:, None] * HEAD_DIM + dim_D[None, :], mean_GD, mask=in_group)
                tl.store(partial_lse + part_G, lse_G, mask=group_G < GROUP)
                # who shares this pair
                pair_begin = tl.where(nth == 0, begin_at - from_tile, tl.where(pair == last_pair, end_at - to_tile, begin_at))
                p_first = (((pair_begin + 1).to(tl.int64) * programs + total - 1) // total - 1).to(tl.int32)
                p_last = (((pair_begin + tiles).to(tl.int64) * programs + total - 1) // total - 1).to(tl.int32)
                begins_inside = pair_begin > (total * p_first // programs).to(tl.int32)
                slots = p_last - p_first + 1
                tl.debug_barrier()
                done = tl.atomic_add(arrived_P + pair, 1, sem="acq_rel", scope="gpu") + 1
                if done == slots:
                    tl.store(arrived_P + pair, 0)
                    first_slot = 2 * p_first + begins_inside.to(tl.int32)
                    # the first of them is the last segment of its program, or the only one
                    merge_chunks(partial, partial_lse, out_END, pair, first_slot, 2 * (p_first + 1) - first_slot, slots,
                                 GROUP, HEAD_DIM, DIM_TILE, X_STEP, 2)
        else:
            span = chunk_span(length, CHUNKS, BLOCK_N, MIN_SPAN)
            chunks = tl.cdiv(length, span)
            from_chunk = tl.where(nth == 0, first, 0)
            if MODE == 0:
                to_chunk = tl.minimum(first + 1, chunks)
            else:
                to_chunk = tl.where(pair == last_pair, last, chunks)
            for index in range(from_chunk, to_chunk):
                mean_GD, lse_G = attend_span(q_WGD, k_BKSD, v_BKSD, table_at, kv_head, index * span, tl.minimum(index * span + span, length), scale_log2,
                    KV_HEADS, HEAD_DIM, BLOCK_SIZE, GROUP_TILE, DIM_TILE, STREAMS, PART_N, PREFETCH, SUMLATE)
                if chunks == 1:
                    tl.store(out_END + out_at_GD, mean_GD.to(out_END.dtype.element_ty), mask=in_group)
                else:
                    part_G = (entry * (KV_HEADS * CHUNKS) + kv_head * CHUNKS + index) * GROUP + group_G
                    tl.store(partial + part_G[:, None] * HEAD_DIM + dim_D[None, :], mean_GD, mask=in_group)
                    tl.store(partial_lse + part_G, lse_G, mask=group_G < GROUP)
            if (chunks > 1) & (to_chunk > from_chunk):
                tl.debug_barrier()
                done = tl.atomic_add(arrived_P + pair, to_chunk - from_chunk, sem="acq_rel", scope="gpu") + to_chunk - from_chunk
                if done == chunks:
                    tl.store(arrived_P + pair, 0)
                    merge_chunks(partial, partial_lse, out_END, pair, pair * CHUNKS, 1, chunks, GROUP, HEAD_DIM, DIM_TILE, X_STEP, 1)
    if TIMES:
        tl.debug_barrier()
        tl.store(times + 5, clock(segments)); tl.store(times + 6, wall(segments))


def launch2(q, out, kv, batch, scale, processors, cfg, state, times=None):
    import torch
    E, N, D = q.shape
    K = kv.k_BKSD.shape[1]
    G = N // K
    mode = cfg["mode"]
    chunks = max(1, min(cfg["chunks"], triton.cdiv(batch.max_kv, cfg["min_span"])))
    dim_tile = max(16, triton.next_power_of_2(D))
    slots = 2 * processors * cfg["per"] if mode == 2 else E * K * chunks
    partial = torch.empty((slots, G, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((slots, G), dtype=torch.float32, device=q.device)
    grid = (E * K, chunks) if mode == 0 else (processors * cfg["per"],)
    if mode == 2: chunks = 1
    x_step = max(2, min(16, 4096 * cfg["warps"] // 4 // (triton.next_power_of_2(G) * dim_tile)))
    work2_kernel[grid](
        q, kv.k_BKSD, kv.v_BKSD, out, partial, lse, state, batch.rows_E, batch.kv_len_E, batch.block_table_RC,
        batch.block_table_RC.stride(0), q.stride(0), scale * 1.4426950408889634, E, processors,
        KV_HEADS=K, GROUP=G, HEAD_DIM=D, DIM_TILE=dim_tile, STREAMS=cfg["warps"], PART_N=cfg["part_n"], MIN_SPAN=cfg["min_span"], CHUNKS=chunks,
        BLOCK_SIZE=kv.block_size, GROUP_TILE=max(16, triton.next_power_of_2(G)), ENTRIES_TILE=1 if mode == 0 else triton.next_power_of_2(E),
        PER=cfg["per"], X_STEP=x_step, MODE=mode, PREFETCH=cfg["prefetch"], SUMLATE=cfg["sumlate"], times=times, TIMES=times is not None,
        num_warps=cfg["warps"], num_stages=cfg["stages"], enable_fp_fusion=True, maxnreg=cfg["maxnreg"])


DEFAULT2 = dict(part_n=16, min_span=256, chunks=16, per=3, mode=2, prefetch=True, sumlate=False, warps=4, stages=3, maxnreg=None, units=1024)
