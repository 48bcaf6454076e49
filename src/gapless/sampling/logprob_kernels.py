"""The kernels of triton_logprobs.py. T tiles of the vocabulary (a power of two, some empty), N logits of a tile.

A key orders the tokens of a line: the logit's image above, the id below, the lower id first. Keys are distinct, so
the order of threads and programs changes nothing, and sums are taken tile by tile in one fixed order.

The likeliest come one by one: the best of the tiles' best, then its tile is read again for the best below it.
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
PADDED_PLACES = tl.constexpr(triton.next_power_of_2(features.MAX_LOGPROBS + 1))
MOST = tl.constexpr(features.MAX_LOGPROBS)
LOW_BITS = tl.constexpr(0xFFFFFFFF)
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def keys_of(x_N, index_N, VOCAB: tl.constexpr):
    return tl.where(index_N < VOCAB, (image(x_N, 0) << 32) | (VOCAB - index_N).to(tl.int64), NO_KEY)


@triton.jit
def token_of(key, VOCAB: tl.constexpr):
    return (VOCAB - (key & LOW_BITS)).to(tl.int32)


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
    best_ptr,
    total_ptr,
    ahead_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LARGEST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Of each tile of this part: its best key, the sum of exponentials relative to its largest logit, and how many
    tokens come before the line's target."""
    follow(DEPENDENT)
    line = tl.program_id(0)
    if tl.load(wanted_ptr + line) >= 0:
        source = (lines_ptr + line.to(tl.int64) * lines_stride,)
        target = tl.load(targets_ptr + line)
        x = load_logits(source, target, (target >= 0) & (target < VOCAB), LARGEST)
        for tile in range(tl.program_id(1), (VOCAB + BLOCK - 1) // BLOCK, tl.num_programs(1)):
            x_N = load_tile(source, tile, VOCAB, BLOCK, LARGEST)
            index_N = tile * BLOCK + tl.arange(0, BLOCK)
            best = tl.max(keys_of(x_N, index_N, VOCAB), axis=0)
            at = line * TILES + tile
            tl.store(best_ptr + at, best)
            tl.store(total_ptr + at, tl.sum(tl.exp(x_N - finite(float_of(best >> 32, 0))), axis=0))
            before_N = (x_N > x) | ((x_N == x) & (index_N < target))
            tl.store(ahead_ptr + at, tl.sum(before_N.to(tl.int32), axis=0))


@triton.jit
def merge_logprobs_kernel(
    lines_ptr,
    lines_stride,
    targets_ptr,
    wanted_ptr,
    best_ptr,
    total_ptr,
    ahead_ptr,
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
    place = tl.arange(0, PADDED_PLACES)
    unused = (place < PLACES) & (place > wanted)
    tl.store(ids_ptr + place, tl.full([PADDED_PLACES], -1, tl.int32), mask=unused)
    tl.store(logprobs_ptr + place, tl.full([PADDED_PLACES], float("-inf"), tl.float32), mask=unused)
    if asked < 0:
        tl.store(ranks_ptr + line, 0)
    else:
        tiles_T = tl.arange(0, TILES)
        real_T = tiles_T < tl.cdiv(VOCAB, BLOCK)
        best_T = tl.load(best_ptr + line * TILES + tiles_T, mask=real_T, other=NO_KEY)
        largest_T = tl.where(real_T, float_of(best_T >> 32, 0), float("-inf"))
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

        for rank in range(1, wanted + 1):
            best = tl.max(best_T, axis=0)
            token = token_of(best, VOCAB)
            x = float_of(best >> 32, 0)
            tl.store(ids_ptr + rank, token)
            tl.store(logprobs_ptr + rank, tl.where(x > float("-inf"), x - largest - log_total, x))
            if rank < wanted:
                tile = token // BLOCK
                x_N = load_tile(source, tile, VOCAB, BLOCK, LARGEST)
                key_N = keys_of(x_N, tile * BLOCK + tl.arange(0, BLOCK), VOCAB)
                best_T = tl.where(tiles_T == tile, tl.max(tl.where(key_N < best, key_N, NO_KEY), axis=0), best_T)
