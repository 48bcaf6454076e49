"""The kernels of the Triton sampler. See triton_sampler.py for how they share the work, base.py for the method."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from gapless.kernels.dependent import follow
from gapless.sampling import base, rng

MASS_SCALE = tl.constexpr(2.0**base.MASS_BITS)
MIN_TEMPERATURE = tl.constexpr(base.MIN_TEMPERATURE)
MIN_LOG2_WEIGHT = tl.constexpr(base.MIN_LOG2_WEIGHT)
MASS_RANGE = tl.constexpr(32.0)  # tokens this many temperatures below the largest logit have no mass: > 42 * ln(2)
LOG2_E = tl.constexpr(base.LOG2_E)
C1, C2, C3, C4, C5 = (tl.constexpr(coefficient) for coefficient in base.EXP2_COEFFICIENTS)
PHILOX_ROUNDS = tl.constexpr(rng.ROUNDS)
MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(rng.MULTIPLIER_0), tl.constexpr(rng.MULTIPLIER_1)
KEY_STEP_0, KEY_STEP_1 = tl.constexpr(rng.KEY_STEP_0), tl.constexpr(rng.KEY_STEP_1)
WORD = tl.constexpr(0xFFFFFFFF)
HALF = tl.constexpr(0x7FFFFFFF)

# A search between two floats halves their distance this often, then the count of floats between them.
FLOAT_STEPS = tl.constexpr(10)


@triton.jit
def philox_word_step(c0, c1, c2, c3, k0, k1):
    """One round of Philox4x32 on 32-bit words held in uint64."""
    product_0 = c0 * MULTIPLIER_0
    product_1 = c2 * MULTIPLIER_1
    return (product_1 >> 32) ^ c1 ^ k0, product_1 & WORD, (product_0 >> 32) ^ c3 ^ k1, product_0 & WORD


@triton.jit
def uniform_halves(seed_low, seed_high, position):
    """The two 31-bit halves, high first, of the random integer for (seed, position); uint64. See rng.py."""
    k0 = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    k1 = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    c0 = position.to(tl.uint32, bitcast=True).to(tl.uint64)
    c1 = c0 * 0
    c2 = c1
    c3 = c1
    for _ in tl.static_range(PHILOX_ROUNDS):
        c0, c1, c2, c3 = philox_word_step(c0, c1, c2, c3, k0, k1)
        k0 = (k0 + KEY_STEP_0) & WORD
        k1 = (k1 + KEY_STEP_1) & WORD
    return c0 >> 1, c1 >> 1


@triton.jit
def scale(u1, u0, total):
    """floor(u * total / 2**62) for u = u1 * 2**31 + u0 and total < 2**62."""
    t1 = total.to(tl.uint64) >> 31
    t0 = total.to(tl.uint64) & HALF
    return (u1 * t1 + ((u1 * t0 + u0 * t1 + ((u0 * t0) >> 31)) >> 31)).to(tl.int64)


@triton.jit
def load_tile(row_ptr, tile, VOCAB: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """fp32 logits of one tile: NaN and what lies past the vocabulary as -inf, +inf as the largest finite value."""
    index = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + index, mask=index < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.where(x > LARGEST, LARGEST, x), float("-inf"))


@triton.jit
def weigh(x, largest, inverse_temperature):
    """exp((x - largest) / temperature): the operations of torch_sampler.weights, in their order."""
    log2 = (x - largest) * inverse_temperature * LOG2_E
    log2 = tl.where(log2 < MIN_LOG2_WEIGHT, MIN_LOG2_WEIGHT, log2)
    exponent = tl.floor(log2 + 0.5)
    f = log2 - exponent
    weight = ((((f * C5 + C4) * f + C3) * f + C2) * f + C1) * f + 1.0
    return weight * ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def image(x, LOW_ZERO_BITS: tl.constexpr):
    """An int64 that orders as the float does; neighbours among the logits' own type differ by one."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ HALF, bits) >> LOW_ZERO_BITS).to(tl.int64)


@triton.jit
def float_of(place, LOW_ZERO_BITS: tl.constexpr):
    """The float of an image."""
    place32 = place.to(tl.int32) << LOW_ZERO_BITS
    low_ones: tl.constexpr = (1 << LOW_ZERO_BITS) - 1
    return tl.where(place32 < 0, (place32 | low_ones) ^ HALF, place32).to(tl.float32, bitcast=True)


@triton.jit
def amount_of(x, floor, largest, inverse_temperature, BY_MASS: tl.constexpr):
    """Mass, or count, of each logit that is at least `floor`. int64."""
    if BY_MASS:
        amount = (weigh(x, largest, inverse_temperature) * MASS_SCALE).to(tl.int64)
        return tl.where(x >= floor, amount, 0)
    return (x >= floor).to(tl.int64)


@triton.jit
def amount_from(
    row_ptr,
    floor,
    largest,
    inverse_temperature,
    BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Mass, or count, of the row's logits that are at least `floor`, and their count. int64, int32."""
    amount = tl.zeros([BLOCK], tl.int64)
    count = tl.zeros([BLOCK], tl.int32)
    for tile in range(tl.cdiv(VOCAB, BLOCK)):
        x = load_tile(row_ptr, tile, VOCAB, BLOCK, LARGEST)
        amount += amount_of(x, floor, largest, inverse_temperature, BY_MASS)
        count += (x >= floor).to(tl.int32)
    return tl.sum(amount, axis=0), tl.sum(count, axis=0)


@triton.jit
def collect(row_ptr, buffer_ptr, low, high, VOCAB: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """The row's logits in [low, high), at most BLOCK of them, padded with -inf. They pass through memory."""
    tl.debug_barrier()
    stored = 0
    for tile in range(tl.cdiv(VOCAB, BLOCK)):
        x = load_tile(row_ptr, tile, VOCAB, BLOCK, LARGEST)
        wanted = (x >= low) & (x < high)
        ordinal = tl.cumsum(wanted.to(tl.int32), axis=0)
        tl.store(buffer_ptr + stored + ordinal - 1, x, mask=wanted)
        stored += tl.sum(wanted.to(tl.int32), axis=0)
    tl.debug_barrier()
    place = tl.arange(0, BLOCK)
    return tl.load(buffer_ptr + place, mask=place < stored, other=float("-inf"))


@triton.jit
def midpoint(low, high, step, LOW_ZERO_BITS: tl.constexpr):
    """An image strictly between two that are not neighbours: near half way as floats, after some steps as images."""
    middle = (low + high) >> 1
    if step < FLOAT_STEPS:
        between = float_of(low, LOW_ZERO_BITS) * 0.5 + float_of(high, LOW_ZERO_BITS) * 0.5
        middle = tl.minimum(tl.maximum(image(between, LOW_ZERO_BITS), low + 1), high - 1)
    return middle


@triton.jit
def highest_floor(
    row_ptr,
    buffer_ptr,
    needed,
    bottom,
    largest,
    inverse_temperature,
    BY_MASS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    LOW_ZERO_BITS: tl.constexpr,
):
    """The highest float, not below `bottom`, at or above which the logits amount to `needed`.

    Exact for any path of the search: `low` always holds enough, `high` never does, and they end as neighbours.
    Once no more than BLOCK logits lie between them, these are collected and the search goes on in registers.
    """
    low = image(bottom, LOW_ZERO_BITS)
    high = image(largest, LOW_ZERO_BITS) + 1
    low_count = VOCAB + 0 * tl.program_id(0)
    high_count = 0 * low_count
    above = high_count.to(tl.int64)  # the amount from `high` on
    step = 0
    while (high - low > 1) & (low_count - high_count > BLOCK):
        middle = midpoint(low, high, step, LOW_ZERO_BITS)
        floor = float_of(middle, LOW_ZERO_BITS)
        amount, count = amount_from(row_ptr, floor, largest, inverse_temperature, BY_MASS, VOCAB, BLOCK, LARGEST)
        if amount >= needed:
            low = middle
            low_count = count
        else:
            high = middle
            high_count = count
            above = amount
        step += 1
    if high - low > 1:
        low_float = float_of(low, LOW_ZERO_BITS)
        x = collect(row_ptr, buffer_ptr, low_float, float_of(high, LOW_ZERO_BITS), VOCAB, BLOCK, LARGEST)
        amounts = amount_of(x, low_float, largest, inverse_temperature, BY_MASS)
        while high - low > 1:
            middle = midpoint(low, high, step, LOW_ZERO_BITS)
            amount = above + tl.sum(tl.where(x >= float_of(middle, LOW_ZERO_BITS), amounts, 0), axis=0)
            low = tl.where(amount >= needed, middle, low)
            high = tl.where(amount >= needed, high, middle)
            step += 1
    return float_of(low, LOW_ZERO_BITS)


@triton.jit
def kept_mass(x, floor, min_weight, largest, inverse_temperature):
    weight = weigh(x, largest, inverse_temperature)
    return tl.where((x >= floor) & (weight >= min_weight), (weight * MASS_SCALE).to(tl.int64), 0)


@triton.jit
def filters_by_count(top_k, VOCAB: tl.constexpr):
    return (top_k > 0) & (top_k < VOCAB)


@triton.jit
def largest_of(best_ptr, entry, VOCAB: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The row's largest logit, from those of its tiles."""
    tiles = tl.arange(0, TILES)
    best = tl.load(best_ptr + entry * TILES + tiles, mask=tiles < tl.cdiv(VOCAB, BLOCK), other=float("-inf"))
    return tl.max(best, axis=0)


@triton.jit
def extremes_kernel(
    logits_ptr,
    logits_stride,
    best_ptr,
    worst_ptr,
    token_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LARGEST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Largest logit of a tile, the first index that has it, and the smallest logit above -inf."""
    follow(DEPENDENT)
    entry = tl.program_id(0)
    tile = tl.program_id(1)
    x = load_tile(logits_ptr + entry.to(tl.int64) * logits_stride, tile, VOCAB, BLOCK, LARGEST)
    best = tl.max(x, axis=0)
    index = tile * BLOCK + tl.arange(0, BLOCK)
    tl.store(best_ptr + entry * TILES + tile, best)
    tl.store(token_ptr + entry * TILES + tile, tl.min(tl.where(x == best, index, VOCAB), axis=0))
    tl.store(worst_ptr + entry * TILES + tile, tl.min(tl.where(x > float("-inf"), x, LARGEST), axis=0))


@triton.jit
def mass_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    best_ptr,
    mass_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LARGEST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Mass of a tile of a random row without top_k: all of it where top_p follows, else what min_p keeps."""
    follow(DEPENDENT)
    entry = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0.0) & (filters_by_count(tl.load(top_k_ptr + row), VOCAB) == 0):
        largest = largest_of(best_ptr, entry, VOCAB, BLOCK, TILES)
        if largest > float("-inf"):
            x = load_tile(logits_ptr + entry.to(tl.int64) * logits_stride, tile, VOCAB, BLOCK, LARGEST)
            inverse_temperature = tl.div_rn(1.0, tl.maximum(temperature, MIN_TEMPERATURE))
            min_weight = tl.where(tl.load(top_p_ptr + row) < 1.0, 0.0, tl.load(min_p_ptr + row))
            mass = kept_mass(x, float("-inf"), min_weight, largest, inverse_temperature)
            tl.store(mass_ptr + entry * TILES + tile, tl.sum(mass, axis=0))


@triton.jit
def choose_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    best_ptr,
    mass_ptr,
    worst_ptr,
    token_ptr,
    positions_ptr,
    seed_ptr,
    buffer_ptr,
    tokens_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    LARGEST: tl.constexpr,
    LOW_ZERO_BITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The token: the argmax, or the inverse CDF in vocabulary order: find the tile, then scan it."""
    follow(DEPENDENT)
    entry = tl.program_id(0)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    row_ptr = logits_ptr + entry.to(tl.int64) * logits_stride
    temperature = tl.load(temperature_ptr + row)
    tiles = tl.arange(0, TILES)
    real_tile = tiles < tl.cdiv(VOCAB, BLOCK)
    best_by_tile = tl.load(best_ptr + entry * TILES + tiles, mask=real_tile, other=float("-inf"))
    largest = tl.max(best_by_tile, axis=0)
    if largest == float("-inf"):
        token = 0
    elif temperature > 0.0:
        inverse_temperature = tl.div_rn(1.0, tl.maximum(temperature, MIN_TEMPERATURE))
        floor = tl.min(tl.load(worst_ptr + entry * TILES + tiles, mask=real_tile, other=LARGEST), axis=0)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        min_weight = tl.load(min_p_ptr + row)
        by_count = filters_by_count(top_k, VOCAB)
        mass_by_tile = tl.load(mass_ptr + entry * TILES + tiles, mask=real_tile, other=0)  # unset under top_k
        if by_count:
            floor = highest_floor(
                row_ptr,
                buffer_ptr + entry * BLOCK,
                top_k.to(tl.int64),
                floor,
                largest,
                inverse_temperature,
                False,
                VOCAB,
                BLOCK,
                LARGEST,
                LOW_ZERO_BITS,
            )
        if top_p < 1.0:
            total = tl.sum(mass_by_tile, axis=0)
            if by_count:
                total, _ = amount_from(row_ptr, floor, largest, inverse_temperature, True, VOCAB, BLOCK, LARGEST)
            needed = tl.ceil(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
            floor = highest_floor(
                row_ptr,
                buffer_ptr + entry * BLOCK,
                tl.maximum(needed, 1),
                tl.maximum(floor, largest - MASS_RANGE * tl.maximum(temperature, MIN_TEMPERATURE)),
                largest,
                inverse_temperature,
                True,
                VOCAB,
                BLOCK,
                LARGEST,
                LOW_ZERO_BITS,
            )
        if by_count | (top_p < 1.0):
            for tile in range(tl.cdiv(VOCAB, BLOCK)):
                x = load_tile(row_ptr, tile, VOCAB, BLOCK, LARGEST)
                mass = tl.sum(kept_mass(x, floor, min_weight, largest, inverse_temperature), axis=0)
                mass_by_tile = tl.where(tiles == tile, mass, mass_by_tile)
        u1, u0 = uniform_halves(
            tl.load(seed_ptr + 2 * row), tl.load(seed_ptr + 2 * row + 1), tl.load(positions_ptr + entry)
        )
        target = scale(u1, u0, tl.sum(mass_by_tile, axis=0))
        passed = tl.cumsum(mass_by_tile, axis=0) <= target
        tile = tl.sum(passed.to(tl.int32), axis=0)
        x = load_tile(row_ptr, tile, VOCAB, BLOCK, LARGEST)
        cumulative = tl.cumsum(kept_mass(x, floor, min_weight, largest, inverse_temperature), axis=0)
        cumulative += tl.sum(tl.where(passed, mass_by_tile, 0), axis=0)
        token = tile * BLOCK + tl.sum((cumulative <= target).to(tl.int32), axis=0)
    else:
        first = tl.load(token_ptr + entry * TILES + tiles, mask=real_tile, other=VOCAB)
        token = tl.min(tl.where(best_by_tile == largest, first, VOCAB), axis=0)
    tl.store(tokens_ptr + entry, token)
