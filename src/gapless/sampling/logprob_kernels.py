"""The kernels of triton_logprobs.py. T tiles of the vocabulary (a power of two, some empty), N logits of a tile.

A key orders the tokens of a line: the logit's image above, the id below, the lower id first. Keys are distinct, so
the order of threads and programs changes nothing, and sums are taken tile by tile in one fixed order.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from gapless.kernels.dependent import follow
from gapless.sampling import features
from gapless.sampling.triton_math import float_of, image, load_logits, load_tile

PLACES = tl.constexpr(features.MAX_LOGPROBS + 1)
MOST = tl.constexpr(features.MAX_LOGPROBS)
BEST = tl.constexpr(triton.next_power_of_2(features.MAX_LOGPROBS))  # keys that a tile has room for
LOW_BITS = tl.constexpr(0xFFFFFFFF)
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def keys_of(x_N, index_N, VOCAB: tl.constexpr):
    return tl.where(index_N < VOCAB, (image(x_N, 0) << 32) | (VOCAB - index_N).to(tl.int64), NO_KEY)


@triton.jit
def finite(largest):
    """What to subtract from logits: 0 where all are -inf."""
    return tl.where(largest > float("-inf"), largest, 0.0)


@triton.jit
def tile_logprobs_kernel(
    lines_ptr,
    lines_stride,
    targets_ptr,
    wanted_ptr,
    largest_ptr,
    total_ptr,
    ahead_ptr,
    keys_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LARGEST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Of a tile: its largest logit, the sum of exponentials relative to it, how many tokens come before the line's
    target, and the keys of its best."""
    follow(DEPENDENT)
    line = tl.program_id(0)
    tile = tl.program_id(1)
    wanted = tl.minimum(tl.load(wanted_ptr + line), MOST)
    if wanted >= 0:
        source = (lines_ptr + line.to(tl.int64) * lines_stride,)
        x_N = load_tile(source, tile, VOCAB, BLOCK, LARGEST)
        index_N = tile * BLOCK + tl.arange(0, BLOCK)
        key_N = keys_of(x_N, index_N, VOCAB)
        largest = tl.max(x_N, axis=0)
        at = line * TILES + tile
        tl.store(largest_ptr + at, largest)
        tl.store(total_ptr + at, tl.sum(tl.exp(x_N - finite(largest)), axis=0))
        target = tl.load(targets_ptr + line)
        target_key = keys_of(load_logits(source, target, (target >= 0) & (target < VOCAB), LARGEST), target, VOCAB)
        tl.store(ahead_ptr + at, tl.sum((key_N > target_key).to(tl.int32), axis=0))
        for place in range(wanted):
            best = tl.max(key_N, axis=0)
            tl.store(keys_ptr + at.to(tl.int64) * BEST + place, best)
            key_N = tl.where(key_N == best, NO_KEY, key_N)


@triton.jit
def merge_logprobs_kernel(
    lines_ptr,
    lines_stride,
    targets_ptr,
    wanted_ptr,
    largest_ptr,
    total_ptr,
    ahead_ptr,
    keys_ptr,
    ids_ptr,
    logprobs_ptr,
    ranks_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LARGEST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Of a line: everything, from its tiles."""
    follow(DEPENDENT)
    line = tl.program_id(0)
    asked = tl.load(wanted_ptr + line)
    wanted = tl.minimum(tl.minimum(asked, MOST), VOCAB)
    ids_ptr += line.to(tl.int64) * PLACES
    logprobs_ptr += line.to(tl.int64) * PLACES
    place = tl.arange(0, 2 * BEST)
    unused = (place < PLACES) & (place > wanted)
    tl.store(ids_ptr + place, tl.full([2 * BEST], -1, tl.int32), mask=unused)
    tl.store(logprobs_ptr + place, tl.full([2 * BEST], float("-inf"), tl.float32), mask=unused)
    if asked < 0:
        tl.store(ranks_ptr + line, 0)
    else:
        tiles_T = tl.arange(0, TILES)
        real_T = tiles_T < tl.cdiv(VOCAB, BLOCK)
        largest_T = tl.load(largest_ptr + line * TILES + tiles_T, mask=real_T, other=float("-inf"))
        total_T = tl.load(total_ptr + line * TILES + tiles_T, mask=real_T, other=0.0)
        largest = finite(tl.max(largest_T, axis=0))
        total = tl.sum(total_T * tl.exp(largest_T - largest), axis=0)
        log_total = tl.log(tl.where(total > 0.0, total, 1.0))

        target = tl.load(targets_ptr + line)
        known = (target >= 0) & (target < VOCAB)
        source = (lines_ptr + line.to(tl.int64) * lines_stride,)
        x = load_logits(source, target, known, LARGEST)
        ahead_T = tl.load(ahead_ptr + line * TILES + tiles_T, mask=real_T, other=0)
        tl.store(ids_ptr, tl.where(known, target, -1))
        tl.store(logprobs_ptr, tl.where(x > float("-inf"), x - largest - log_total, x))
        tl.store(ranks_ptr + line, tl.where(known, 1 + tl.sum(ahead_T, axis=0), 0))

        best_B = tl.arange(0, BEST)
        place_TB = (line * TILES + tiles_T).to(tl.int64)[:, None] * BEST + best_B[None, :]
        key_TB = tl.load(keys_ptr + place_TB, mask=real_T[:, None] & (best_B < wanted)[None, :], other=NO_KEY)
        for rank in range(1, wanted + 1):
            best = tl.max(tl.max(key_TB, axis=1), axis=0)
            key_TB = tl.where(key_TB == best, NO_KEY, key_TB)
            x = float_of(best >> 32, 0)
            tl.store(ids_ptr + rank, (VOCAB - (best & LOW_BITS)).to(tl.int32))
            tl.store(logprobs_ptr + rank, tl.where(x > float("-inf"), x - largest - log_total, x))
