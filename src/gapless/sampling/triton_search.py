"""How the Triton sampler finds a filter's threshold among the logits of a row. See triton_sampler.py for the order.

Letters: T tiles of the vocabulary (a power of two, some of them empty), C candidates, N logits of one chunk or tile.
An amount is a count of logits for top_k, a mass for top_p; masses and counts are integers, weights fp32.
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from gapless.sampling.triton_math import MASS_SCALE, float_of, image, load_logits, load_tile, weigh

TOTAL, ABOVE, KEPT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the masses of a tile, in this order
MASS_KINDS = tl.constexpr(3)

SPLITTER_STEPS = tl.constexpr(10)  # halvings of the distance between a share's largest and smallest logit
SLACK = tl.constexpr(2.0**-14)  # relative; far above the error of an fp32 sum of weights


@triton.jit
def load_tiles(ptr, other, VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """One number of each tile, past L1: other multiprocessors may have written them in this kernel."""
    tiles = tl.arange(0, TILES)
    return tl.load(ptr + tiles, mask=tiles < tl.cdiv(VOCAB, BLOCK), other=other, cache_modifier=".cg")


@triton.jit
def largest_of(best_T):
    """The largest logit of the row, 0 where all are -inf: nothing has mass then."""
    largest = tl.max(best_T, axis=0)
    return tl.where(largest > float("-inf"), largest, 0.0)


@triton.jit
def kept_mass(x, floor, min_weight, largest, inverse_temperature):
    weight = weigh(x, largest, inverse_temperature)
    return tl.where((x >= floor) & (weight >= min_weight), (weight * MASS_SCALE).to(tl.int64), 0)


@triton.jit
def mass_needed(total, top_p):
    return tl.maximum(tl.ceil(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def local_splitter(x_N, best, reach, share, SHARES: tl.constexpr, LARGEST: tl.constexpr):
    """About the (share + 1) / (SHARES + 1) quantile, from above, of the logits no farther than `reach` below the best.

    Any value would be right. Good ones, one from each share of the row, cut it into equal parts.
    """
    low = tl.maximum(tl.min(tl.where(x_N > float("-inf"), x_N, LARGEST), axis=0), best - reach)
    high = best
    wanted = tl.sum((x_N >= low).to(tl.int32), axis=0) * (share + 1) // (SHARES + 1)
    for _ in range(SPLITTER_STEPS):
        middle = low * 0.5 + high * 0.5
        enough = tl.sum((x_N >= middle).to(tl.int32), axis=0) > wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return tl.min(tl.where(x_N >= low, x_N, LARGEST), axis=0)


@triton.jit
def surveyed_splitters(
    top_k, by_count, VOCAB: tl.constexpr, SHARES: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr
):
    """How many splitters to survey, the highest first: all for a mass, some more than top_k should need for a count."""
    for_count = tl.cdiv(top_k * (SHARES + 1) // VOCAB + GROUP, GROUP) * GROUP
    return tl.where(by_count, tl.minimum(for_count, TILES), TILES)


@triton.jit
def survey_tile(
    source,
    tile,
    splitter_ptr,
    reached_ptr,
    best_T,
    inverse_temperature,
    by_count,
    surveyed,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Store the count, or the rounded sum of weights, of the tile's logits at or above each splitter; return its mass,
    0 for a count.

    A thread adds up what is above one another before threads do, for a group of splitters at a time.
    """
    SHARES: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    place_DL = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    index_DL = tile * BLOCK + place_DL
    x_DL = load_logits(source, index_DL, index_DL < VOCAB, LARGEST)
    amount_DL = tl.full([BLOCK // LANES, LANES], 1.0, tl.float32)
    mass = tl.zeros([], tl.int64)
    if by_count == 0:
        amount_DL = weigh(x_DL, largest_of(best_T), inverse_temperature)
        mass = tl.sum(tl.sum((amount_DL * MASS_SCALE).to(tl.int64), axis=0), axis=0)
    for first in range(0, surveyed, GROUP):
        at_G = first + tl.arange(0, GROUP)
        splitter_G = tl.load(splitter_ptr + at_G, mask=at_G < SHARES, other=float("inf"))
        reached_GDL = tl.where(x_DL[None, :, :] >= splitter_G[:, None, None], amount_DL[None, :, :], 0.0)
        tl.store(reached_ptr + at_G, tl.sum(tl.sum(reached_GDL, axis=1), axis=1))
    return mass


@triton.jit
def find_bracket(
    splitter_ptr, reached_ptr, surveyed, needed, slack, low, high, SHARES: tl.constexpr, TILES: tl.constexpr
):
    """The nearest splitters around the threshold: the lower has what is needed, the higher has not, both for sure.

    Also what the survey found at or above the higher one. `low` and `high` are what to return without such a splitter.
    """
    tiles_T = tl.arange(0, TILES)
    known_T = tiles_T < tl.minimum(SHARES, surveyed)
    splitters_T = tl.load(splitter_ptr + tiles_T, mask=known_T, other=float("inf"))
    real_T1 = (tiles_T < SHARES)[:, None]
    reached_TT = tl.load(reached_ptr + tiles_T[:, None] * TILES + tiles_T[None, :], mask=real_T1, other=0.0)
    reached_T = tl.sum(reached_TT, axis=0)
    enough_T = known_T & (reached_T >= needed * (1.0 + slack))
    short_T = known_T & (reached_T < needed * (1.0 - slack))
    low = tl.maximum(low, tl.max(tl.where(enough_T, splitters_T, float("-inf")), axis=0))
    high = tl.minimum(high, tl.min(tl.where(short_T, splitters_T, float("inf")), axis=0))
    return low, high, tl.max(tl.where(short_T, reached_T, 0.0), axis=0)


@triton.jit
def collect_tile(
    source,
    candidate_ptr,
    stored_ptr,
    above_ptr,
    kept_ptr,
    ties_ptr,
    tile,
    low,
    high,
    min_weight,
    largest,
    inverse_temperature,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Append the tile's indices of logits between `low` and `high`; store how many equal `low`, and the mass from
    `high` on, with and without what min_p drops."""
    x_N = load_tile(source, tile, VOCAB, BLOCK, LARGEST)
    above = tl.zeros([], tl.int64)
    kept = above
    if high <= largest:
        weight_N = weigh(x_N, largest, inverse_temperature)
        mass_N = tl.where(x_N >= high, (weight_N * MASS_SCALE).to(tl.int64), 0)
        above = tl.sum(mass_N, axis=0)
        kept = above
        if min_weight > 0.0:
            kept = tl.sum(tl.where(weight_N >= min_weight, mass_N, 0), axis=0)
    tl.store(above_ptr + tile, above)
    tl.store(kept_ptr + tile, kept)
    between_N = (x_N > low) & (x_N < high)
    ties_N = (x_N == low) & (x_N < high)
    counts_N = between_N.to(tl.int32) + (ties_N.to(tl.int32) << 16)  # one scan for both
    counts = tl.sum(counts_N, axis=0)
    first = tl.atomic_add(stored_ptr, counts & 0xFFFF, sem="relaxed", scope="gpu")
    at_N = first - 1 + (tl.cumsum(counts_N, axis=0) & 0xFFFF)
    index_N = tile * BLOCK + tl.arange(0, BLOCK)
    tl.store(candidate_ptr + at_N, index_N, mask=between_N & (at_N < CAPACITY))
    tl.store(ties_ptr + tile, counts >> 16)


@triton.jit
def highest_floor(x_C, amount_C, above, needed, low, high, low_zero_bits):
    """The highest float from `low` on, below `high`, at or above which the candidates and `above` amount to `needed`.

    `low` if none above it does.
    """
    low_image = image(low, low_zero_bits)
    high_image = image(high, low_zero_bits)
    while high_image - low_image > 1:
        middle = (low_image + high_image) >> 1
        amount = above + tl.sum(tl.where(x_C >= float_of(middle, low_zero_bits), amount_C, 0), axis=0)
        low_image = tl.where(amount >= needed, middle, low_image)
        high_image = tl.where(amount >= needed, high_image, middle)
    return float_of(low_image, low_zero_bits)


@triton.jit
def amount_of_row(
    source,
    floor,
    by_count,
    largest,
    inverse_temperature,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Count, or mass, of all the row's logits that are at least `floor`."""
    amount_N = tl.zeros([BLOCK], tl.int64)
    for tile in range(tl.cdiv(VOCAB, BLOCK)):
        x_N = load_tile(source, tile, VOCAB, BLOCK, LARGEST)
        mass_N = kept_mass(x_N, floor, 0.0, largest, inverse_temperature)
        amount_N += tl.where(by_count, (x_N >= floor).to(tl.int64), mass_N)
    return tl.sum(amount_N, axis=0)


@triton.jit
def highest_floor_of_row(
    source,
    needed,
    by_count,
    low,
    high,
    largest,
    inverse_temperature,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    low_zero_bits,
):
    """As highest_floor, by passes over the whole row."""
    low_image = image(low, low_zero_bits)
    high_image = image(high, low_zero_bits)
    while high_image - low_image > 1:
        middle = (low_image + high_image) >> 1
        floor = float_of(middle, low_zero_bits)
        amount = amount_of_row(source, floor, by_count, largest, inverse_temperature, VOCAB, BLOCK, LARGEST)
        low_image = tl.where(amount >= needed, middle, low_image)
        high_image = tl.where(amount >= needed, high_image, middle)
    return float_of(low_image, low_zero_bits)


@triton.jit
def find_tile(kept_T, kept_C, tile_C, target, SHARES: tl.constexpr, TILES: tl.constexpr):
    """The first tile at whose end the cumulative mass exceeds `target`, and the mass before it."""
    tiles_T = tl.arange(0, TILES)
    first = 0 * tl.program_id(0)
    last = first + SHARES - 1
    while first < last:
        middle = (first + last) >> 1
        until = tl.sum(tl.where(tiles_T <= middle, kept_T, 0), axis=0)
        until += tl.sum(tl.where(tile_C <= middle, kept_C, 0), axis=0)
        last = tl.where(until > target, middle, last)
        first = tl.where(until > target, first, middle + 1)
    before = tl.sum(tl.where(tiles_T < first, kept_T, 0), axis=0)
    return first, before + tl.sum(tl.where(tile_C < first, kept_C, 0), axis=0)


@triton.jit
def settle_on_candidates(
    source,
    candidate_ptr,
    stored,
    mass_ptr,
    ties_ptr,
    top_p,
    min_weight,
    by_count,
    needed,
    beyond,
    low,
    high,
    top,
    largest,
    inverse_temperature,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    CAPACITY: tl.constexpr,
    LARGEST: tl.constexpr,
    low_zero_bits,
):
    """The row's threshold; kept mass by tile without the candidates; and of these the kept masses and the tiles."""
    place_C = tl.arange(0, CAPACITY)
    index_C = tl.load(candidate_ptr + place_C, mask=place_C < stored, other=0, cache_modifier=".cg")
    x_C = load_logits(source, index_C, place_C < stored, LARGEST)
    weight_C = weigh(x_C, largest, inverse_temperature)
    mass_C = (weight_C * MASS_SCALE).to(tl.int64)
    above_T = load_tiles(mass_ptr + ABOVE * TILES, 0, VOCAB, BLOCK, TILES)
    kept_T = load_tiles(mass_ptr + KEPT * TILES, 0, VOCAB, BLOCK, TILES)
    low_weight = weigh(low, largest, inverse_temperature)
    tie_mass = (low_weight * MASS_SCALE).to(tl.int64)
    ties_T = load_tiles(ties_ptr, 0, VOCAB, BLOCK, TILES).to(tl.int64) * tie_mass

    above = tl.where(by_count, beyond, tl.sum(above_T, axis=0))
    amount_C = tl.where(by_count, 1, mass_C)
    floor = highest_floor(x_C, amount_C, above, needed, low, high, low_zero_bits)
    if by_count & (top_p < 1.0):
        total = tl.sum(tl.where(x_C >= floor, mass_C, 0), axis=0) + tl.where(floor <= low, tl.sum(ties_T, axis=0), 0)
        floor = highest_floor(x_C, mass_C, 0, mass_needed(total, top_p), floor, top, low_zero_bits)
    kept_T += tl.where((floor <= low) & (low_weight >= min_weight), ties_T, 0)
    kept_C = tl.where((x_C >= floor) & (weight_C >= min_weight), mass_C, 0)
    return floor, kept_T, kept_C, index_C // BLOCK


@triton.jit
def settle_on_row(
    source,
    top_p,
    min_weight,
    by_count,
    needed,
    low,
    high,
    top,
    largest,
    inverse_temperature,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LARGEST: tl.constexpr,
    low_zero_bits,
):
    """The row's threshold and its kept mass by tile, without candidates: slow, for rows that have too many."""
    floor = highest_floor_of_row(
        source, needed, by_count, low, high, largest, inverse_temperature, VOCAB, BLOCK, LARGEST, low_zero_bits
    )
    if by_count & (top_p < 1.0):
        total = amount_of_row(source, floor, False, largest, inverse_temperature, VOCAB, BLOCK, LARGEST)
        needed = mass_needed(total, top_p)
        floor = highest_floor_of_row(
            source, needed, False, floor, top, largest, inverse_temperature, VOCAB, BLOCK, LARGEST, low_zero_bits
        )
    tiles_T = tl.arange(0, TILES)
    kept_T = tl.zeros([TILES], tl.int64)
    for tile in range(tl.cdiv(VOCAB, BLOCK)):
        x_N = load_tile(source, tile, VOCAB, BLOCK, LARGEST)
        kept = tl.sum(kept_mass(x_N, floor, min_weight, largest, inverse_temperature), axis=0)
        kept_T = tl.where(tiles_T == tile, kept, kept_T)
    return floor, kept_T
