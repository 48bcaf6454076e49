"""The kernels of the Triton sampler. See triton_sampler.py for how they share the work, base.py for the method.

Letters: E entries, T tiles of the vocabulary (a power of two, some of them empty).
"""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from gapless.kernels.dependent import follow
from gapless.sampling.feature_kernels import BESIDE, IN_PASSING, edit, step_mask
from gapless.sampling.triton_math import (
    FLOAT32_LARGEST,
    MASS_RANGE,
    MASS_SCALE,
    MIN_TEMPERATURE,
    clean,
    float_of,
    image,
    load_logits,
    load_tile,
    row_source,
    scale,
    source_zero_bits,
    uniform_halves,
)
from gapless.sampling.triton_search import (
    ABOVE,
    KEPT,
    MASS_KINDS,
    SLACK,
    TOTAL,
    collect_tile,
    find_bracket,
    find_tile,
    kept_mass,
    largest_of,
    load_tiles,
    local_splitter,
    mass_needed,
    settle_on_candidates,
    settle_on_row,
    survey_tile,
    surveyed_splitters,
)


@triton.jit
def filters_by_count(top_k, VOCAB: tl.constexpr):
    return (top_k > 0) & (top_k < VOCAB)


@triton.jit
def is_filtered(temperature, top_k, top_p, VOCAB: tl.constexpr):
    """Whether the row needs a threshold on its logits."""
    return (temperature > 0.0) & (filters_by_count(top_k, VOCAB) | (top_p < 1.0))


@triton.jit(do_not_specialize=["masks"])
def extremes_kernel(
    logits_ptr,
    logits_stride,
    edited_ptr,
    where_ptr,
    rows_ptr,
    flags_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    allowed_ptr,
    mask_ptr,
    mask_index_ptr,
    masks,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    best_ptr,
    token_ptr,
    splitter_ptr,
    progress_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SEGMENT: tl.constexpr,
    LARGEST: tl.constexpr,
    EDITED: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Largest logit of a share of the row and the first index that has it; a splitter where the row has filters.

    A share is every so-manieth segment of the row, so that each looks like the whole. Logits that wait for their edits
    get them here, and are stored for the other kernels where these will look at them.
    """
    follow(DEPENDENT)
    entry = tl.program_id(0)
    share = tl.program_id(1)
    SHARES: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    row = tl.load(rows_ptr + entry).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    filtered = is_filtered(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), VOCAB)
    place = tl.arange(0, BLOCK)
    index = (place // SEGMENT * SHARES + share) * SEGMENT + place % SEGMENT
    if EDITED:
        where = tl.load(where_ptr + entry)
        row_ptr = logits_ptr + entry.to(tl.int64) * logits_stride
        edited_ptr += entry.to(tl.int64) * VOCAB
        x = load_logits((row_ptr, edited_ptr, where == BESIDE), index, index < VOCAB, LARGEST)
        if where == IN_PASSING:
            flags = tl.load(flags_ptr + row)
            masked, line = step_mask(flags, mask_index_ptr, entry, HAS_MASKS)
            x = edit(
                x,
                index,
                row,
                flags,
                masked,
                line,
                repetition_ptr,
                presence_ptr,
                frequency_ptr,
                counts_ptr,
                allowed_ptr,
                mask_ptr,
                masks,
                VOCAB,
            )
            x = clean(x, FLOAT32_LARGEST)
            if temperature > 0.0:
                tl.store(edited_ptr + index, x, mask=index < VOCAB)
    else:
        x = load_logits((logits_ptr + entry.to(tl.int64) * logits_stride,), index, index < VOCAB, LARGEST)
    best = tl.max(x, axis=0)
    tl.store(best_ptr + entry * TILES + share, best)
    tl.store(token_ptr + entry * TILES + share, tl.min(tl.where(x == best, index, VOCAB), axis=0))
    if filtered:
        reach = MASS_RANGE * tl.maximum(temperature, MIN_TEMPERATURE)
        tl.store(splitter_ptr + entry * TILES + share, local_splitter(x, best, reach, share, SHARES, LARGEST))
        if share == 0:
            tl.store(progress_ptr + 2 * entry, 0)
            tl.store(progress_ptr + 2 * entry + 1, 0)


@triton.jit
def survey_kernel(
    logits_ptr,
    logits_stride,
    edited_ptr,
    where_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    best_ptr,
    splitter_ptr,
    reached_ptr,
    mass_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    LARGEST: tl.constexpr,
    EDITED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Of a tile of a random row: the mass that min_p keeps; or, under filters, all its mass and what each splitter
    has at or above it."""
    follow(DEPENDENT)
    entry = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.load(rows_ptr + entry).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0.0:
        source = row_source(logits_ptr, logits_stride, edited_ptr, where_ptr, entry, VOCAB, EDITED)
        best_T = load_tiles(best_ptr + entry * TILES, float("-inf"), VOCAB, BLOCK, TILES)
        top_k = tl.load(top_k_ptr + row)
        inverse_temperature = tl.div_rn(1.0, tl.maximum(temperature, MIN_TEMPERATURE))
        if is_filtered(temperature, top_k, tl.load(top_p_ptr + row), VOCAB):
            by_count = filters_by_count(top_k, VOCAB)
            mass = survey_tile(
                source,
                tile,
                splitter_ptr + entry * TILES,
                reached_ptr + (entry * TILES + tile) * TILES,
                best_T,
                inverse_temperature,
                by_count,
                surveyed_splitters(top_k, by_count, VOCAB, tl.cdiv(VOCAB, BLOCK), TILES, GROUP),
                VOCAB,
                BLOCK,
                GROUP,
                LANES,
                LARGEST,
            )
        else:
            x_N = load_tile(source, tile, VOCAB, BLOCK, LARGEST)
            mass_N = kept_mass(x_N, float("-inf"), tl.load(min_p_ptr + row), largest_of(best_T), inverse_temperature)
            mass = tl.sum(mass_N, axis=0)
        tl.store(mass_ptr + (entry * MASS_KINDS + TOTAL) * TILES + tile, mass)


@triton.jit
def choose_kernel(
    logits_ptr,
    logits_stride,
    edited_ptr,
    where_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    positions_ptr,
    seed_ptr,
    best_ptr,
    token_ptr,
    splitter_ptr,
    reached_ptr,
    mass_ptr,
    ties_ptr,
    candidate_ptr,
    progress_ptr,
    tokens_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
    LARGEST: tl.constexpr,
    LOW_ZERO_BITS: tl.constexpr,
    EDITED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The token: the argmax, or the inverse CDF in vocabulary order: find the tile, then scan it.

    Where the row has filters, its programs first collect the candidates, and the last to arrive goes on; else the
    first does the work.
    """
    follow(DEPENDENT)
    entry = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    SHARES: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    row = tl.load(rows_ptr + entry).to(tl.int64)
    source = row_source(logits_ptr, logits_stride, edited_ptr, where_ptr, entry, VOCAB, EDITED)
    low_zero_bits = source_zero_bits(source, LOW_ZERO_BITS)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_weight = tl.load(min_p_ptr + row)
    best_T = load_tiles(best_ptr + entry * TILES, float("-inf"), VOCAB, BLOCK, TILES)
    largest = tl.max(best_T, axis=0)
    inverse_temperature = tl.div_rn(1.0, tl.maximum(temperature, MIN_TEMPERATURE))
    by_count = filters_by_count(top_k, VOCAB)
    filtered = is_filtered(temperature, top_k, top_p, VOCAB) & (largest > float("-inf"))
    splitter_ptr += entry * TILES
    reached_ptr += entry * (TILES * TILES)
    mass_ptr += entry * (MASS_KINDS * TILES)
    ties_ptr += entry * TILES
    candidate_ptr += entry.to(tl.int64) * CAPACITY
    progress_ptr += 2 * entry

    finishes = part == 0
    low = largest
    high = largest
    top = largest
    needed = top_k.to(tl.int64)
    beyond = needed
    if filtered:
        # Below `low` no logit has mass: if top_k reaches so far it drops none that has.
        low = largest - MASS_RANGE * tl.maximum(temperature, MIN_TEMPERATURE)
        low = float_of(image(low, low_zero_bits), low_zero_bits)
        top = float_of(image(largest, low_zero_bits) + 1, low_zero_bits)
        slack = 0.0
        needed_by_survey = needed.to(tl.float32)
        if by_count == 0:
            total = tl.sum(load_tiles(mass_ptr + TOTAL * TILES, 0, VOCAB, BLOCK, TILES), axis=0)
            needed = mass_needed(total, top_p)
            needed_by_survey = needed.to(tl.float32) / MASS_SCALE
            slack = SLACK
        surveyed = surveyed_splitters(top_k, by_count, VOCAB, SHARES, TILES, GROUP)
        low, high, reached = find_bracket(
            splitter_ptr,
            reached_ptr,
            surveyed,
            needed_by_survey,
            slack,
            low,
            top,
            SHARES,
            TILES,
        )
        beyond = tl.cast(reached, tl.int64)
        if by_count & (top_p < 1.0):  # then all of them, for top_p to choose among
            high = top
            beyond = needed * 0
        span = tl.cdiv(SHARES, parts)
        for tile in range(part * span, tl.minimum((part + 1) * span, SHARES)):
            collect_tile(
                source,
                candidate_ptr,
                progress_ptr,
                mass_ptr + ABOVE * TILES,
                mass_ptr + KEPT * TILES,
                ties_ptr,
                tile,
                low,
                high,
                min_weight,
                largest,
                inverse_temperature,
                VOCAB,
                BLOCK,
                CAPACITY,
                LARGEST,
            )
        tl.debug_barrier()  # every thread has stored before one of them says so
        finishes = tl.atomic_add(progress_ptr + 1, 1, sem="acq_rel", scope="gpu") == parts - 1
    if finishes:
        token = 0
        if largest > float("-inf"):
            if temperature > 0.0:
                u1, u0 = uniform_halves(
                    tl.load(seed_ptr + 2 * row), tl.load(seed_ptr + 2 * row + 1), tl.load(positions_ptr + entry)
                )
                stored = 0
                if filtered:
                    stored = tl.load(progress_ptr, cache_modifier=".cg")
                if filtered & (stored <= CAPACITY):
                    floor, kept_T, kept_C, tile_C = settle_on_candidates(
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
                        VOCAB,
                        BLOCK,
                        TILES,
                        CAPACITY,
                        LARGEST,
                        low_zero_bits,
                    )
                    target = scale(u1, u0, tl.sum(kept_T, axis=0) + tl.sum(kept_C, axis=0))
                    tile, before = find_tile(kept_T, kept_C, tile_C, target, SHARES, TILES)
                else:
                    if filtered:
                        floor, kept_T = settle_on_row(
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
                            VOCAB,
                            BLOCK,
                            TILES,
                            LARGEST,
                            low_zero_bits,
                        )
                    else:
                        floor = float("-inf")
                        kept_T = load_tiles(mass_ptr + TOTAL * TILES, 0, VOCAB, BLOCK, TILES)
                    target = scale(u1, u0, tl.sum(kept_T, axis=0))
                    passed_T = tl.cumsum(kept_T, axis=0) <= target
                    tile = tl.sum(passed_T.to(tl.int32), axis=0)
                    before = tl.sum(tl.where(passed_T, kept_T, 0), axis=0)
                x_N = load_tile(source, tile, VOCAB, BLOCK, LARGEST)
                cumulative_N = before + tl.cumsum(
                    kept_mass(x_N, floor, min_weight, largest, inverse_temperature), axis=0
                )
                token = tile * BLOCK + tl.sum((cumulative_N <= target).to(tl.int32), axis=0)
            else:
                first_T = load_tiles(token_ptr + entry * TILES, VOCAB, VOCAB, BLOCK, TILES)
                token = tl.min(tl.where(best_T == largest, first_T, VOCAB), axis=0)
        tl.store(tokens_ptr + entry, token)
