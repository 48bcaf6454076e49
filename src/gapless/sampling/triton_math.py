"""The sampler's arithmetic in Triton: random numbers, weights, and floats as integers. See rng.py and base.py."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import torch
import triton
import triton.language as tl

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
FLOAT32_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


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
def row_source(logits_ptr, logits_stride, edited_ptr, where_ptr, entry, VOCAB: tl.constexpr, EDITED: tl.constexpr):
    """Where a row's logits are: the model's own; and where some are edited, those in fp32, and whether to take them."""
    row_ptr = logits_ptr + entry.to(tl.int64) * logits_stride
    if EDITED:
        source = (row_ptr, edited_ptr + entry.to(tl.int64) * VOCAB, tl.load(where_ptr + entry) != 0)
    else:
        source = (row_ptr,)
    return source


@triton.jit
def source_zero_bits(source, LOW_ZERO_BITS: tl.constexpr):
    """How many low bits of a logit are zero: of edited ones none are."""
    bits = LOW_ZERO_BITS
    if len(source) == 3:
        bits = tl.where(source[2], 0, LOW_ZERO_BITS)
    return bits


@triton.jit
def clean(x, LARGEST: tl.constexpr):
    """NaN as -inf, +inf as the largest finite value."""
    return tl.where(x == x, tl.where(x > LARGEST, LARGEST, x), float("-inf"))


@triton.jit
def load_logits(source, index, mask, LARGEST: tl.constexpr):
    """Clean fp32 logits; what the mask leaves out is -inf. `LARGEST` is that of the model's own."""
    if len(source) == 1:
        x = clean(tl.load(source[0] + index, mask=mask, other=float("-inf")).to(tl.float32), LARGEST)
    elif source[2]:
        x = clean(tl.load(source[1] + index, mask=mask, other=float("-inf")), FLOAT32_LARGEST)
    else:
        x = clean(tl.load(source[0] + index, mask=mask, other=float("-inf")).to(tl.float32), LARGEST)
    return x


@triton.jit
def load_tile(source, tile, VOCAB: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """The logits of one tile of neighbours in the vocabulary."""
    index = tile * BLOCK + tl.arange(0, BLOCK)
    return load_logits(source, index, index < VOCAB, LARGEST)


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
def image(x, low_zero_bits):
    """An int64 that orders as the float does, 0 for both zeros; neighbours among the logits' own type differ by one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ HALF, bits) >> low_zero_bits).to(tl.int64)


@triton.jit
def float_of(place, low_zero_bits):
    """The float of an image: of any fp32, the largest of the logits' own type that is not above it."""
    place32 = place.to(tl.int32) << low_zero_bits
    low_ones = (1 << low_zero_bits) - 1
    return tl.where(place32 < 0, (place32 | low_ones) ^ HALF, place32).to(tl.float32, bitcast=True)
