"""From a plan to a slot's packed host buffer, in a fixed number of numpy calls whatever the batch."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from gapless.blocks import NULL_BLOCK
from gapless.engine.layout import Sections, StepShape, sections_of
from gapless.plan import Ints, Plan


def fill(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """Write the plan's inputs for `shape`, which may be larger than the plan: the rest is padding on the scratch row.

    tokens_RL holds PLACEHOLDER wherever a token is still in flight.
    """
    at = sections_of(shape)
    if shape.decodes_only:
        _fill_decodes(plan, tokens_RL, packed, at, scratch_row)
    else:
        _fill_entries(plan, tokens_RL, packed, at, scratch_row)
    _put(packed, at.block_rows_U, plan.block_rows_U, scratch_row)
    _put(packed, at.block_columns_U, plan.block_columns_U, 0)
    _put(packed, at.block_ids_U, plan.block_ids_U, NULL_BLOCK)
    if shape.admitted:
        params = plan.params
        _put(packed, at.param_rows_A, params.rows_A, scratch_row)
        _put(packed, at.temperature_A, params.temperature_A.view(np.int32), 0)
        _put(packed, at.top_k_A, params.top_k_A, 0)
        _put(packed, at.top_p_A, params.top_p_A.view(np.int32), 0)
        _put(packed, at.min_p_A, params.min_p_A.view(np.int32), 0)
        _put(packed, at.seed_A2, params.seed_A.view(np.int32), 0)


def _fill_decodes(plan: Plan, tokens_RL: Ints, packed: Ints, at: Sections, scratch_row: int) -> None:
    """Entries that have one token each and sample: see sections_of for what else these sections stand for."""
    rows, positions = plan.rows_E, plan.starts_E
    _put(packed, at.tokens_T, tokens_RL[rows, positions], 0)
    _put(packed, at.token_rows_T, rows, scratch_row)
    _put(packed, at.positions_T, positions, 0)
    _put(packed, at.kv_len_E, positions + 1, 1)
    packed[at.query_start_E1] = _numbers(at.query_start_E1.stop - at.query_start_E1.start)


def _fill_entries(plan: Plan, tokens_RL: Ints, packed: Ints, at: Sections, scratch_row: int) -> None:
    rows, starts, counts = plan.rows_E, plan.starts_E, plan.counts_E
    ends = np.cumsum(counts, dtype=np.int32)
    token_rows = np.repeat(rows, counts)
    positions = np.repeat(starts - (ends - counts), counts) + _numbers(plan.num_tokens)
    kv_len = starts + counts
    _put(packed, at.tokens_T, tokens_RL[token_rows, positions], 0)
    _put(packed, at.token_rows_T, token_rows, scratch_row)
    _put(packed, at.positions_T, positions, 0)
    _put(packed, at.rows_E, rows, scratch_row)
    _put(packed, at.kv_len_E, kv_len, 1)
    _put_query_start(packed, at.query_start_E1, ends)
    sampling = plan.samples_E > 0
    _put(packed, at.sample_tokens_S, ends[sampling] - 1, 0)
    _put(packed, at.sample_rows_S, rows[sampling], scratch_row)
    _put(packed, at.sample_positions_S, kv_len[sampling], 0)


def _numbers(count: int) -> Ints:
    """0, 1, 2, …"""
    return _counting(1 << count.bit_length())[:count]


@cache
def _counting(size: int) -> Ints:
    numbers = np.arange(size, dtype=np.int32)
    numbers.setflags(write=False)
    return numbers


def _put(packed: Ints, section: slice, values: NDArray[np.int32], padding: int) -> None:
    middle = section.start + values.size
    packed[section.start : middle] = values
    if middle < section.stop:
        packed[middle : section.stop] = padding


def _put_query_start(packed: Ints, section: slice, ends: Ints) -> None:
    """0, the ends, and one more token for each padding entry."""
    packed[section.start] = 0
    middle = section.start + 1 + ends.size
    packed[section.start + 1 : middle] = ends
    if middle < section.stop:
        last = int(ends[-1]) if ends.size else 0
        packed[middle : section.stop] = np.arange(last + 1, last + 1 + section.stop - middle, dtype=np.int32)
