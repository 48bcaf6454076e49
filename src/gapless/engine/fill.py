"""From a plan to a slot's packed host buffer, in a fixed number of numpy calls whatever the batch."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from gapless.engine.layout import Extras, Sections, StepShape, sections_of
from gapless.plan import Ints, Plan, RowLines


def fill(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """Write the plan's inputs for `shape`, which may be larger than the plan: the rest is padding on the scratch row.

    tokens_RL holds PLACEHOLDER wherever a token is still in flight. What a step does not send is not written: see
    layout.py `sent_size`.
    """
    at = sections_of(shape)
    _fill_updates(plan, packed, at)
    if plan.lines is not None or plan.scores is not None:
        _fill_extras(plan, packed, shape)
    if plan.continues:
        return
    if shape.decodes_only:
        rows, positions = plan.rows_E, plan.starts_E
        _put(packed, at.tokens_T, tokens_RL[rows, positions], 0)
        _put(packed, at.token_rows_T, rows, scratch_row)
        _put(packed, at.positions_T, positions, 0)
        return
    _fill_entries(plan, tokens_RL, packed, at, shape, scratch_row)
    if shape.admitted:
        params = plan.params
        _put(packed, at.param_rows_A, params.rows_A, scratch_row)
        _put(packed, at.temperature_A, params.temperature_A.view(np.int32), 0)
        _put(packed, at.top_k_A, params.top_k_A, 0)
        _put(packed, at.top_p_A, params.top_p_A.view(np.int32), 0)
        _put(packed, at.min_p_A, params.min_p_A.view(np.int32), 0)
        _put(packed, at.seed_A2, params.seed_A.view(np.int32), 0)


def _fill_updates(plan: Plan, packed: Ints, at: Sections) -> None:
    count = plan.block_ids_U.size
    packed[at.header_2.start] = plan.continues
    packed[at.header_2.start + 1] = count
    if count:
        begin = at.updates_3U.start
        packed[begin : begin + count] = plan.block_rows_U
        packed[begin + count : begin + 2 * count] = plan.block_columns_U
        packed[begin + 2 * count : begin + 3 * count] = plan.block_ids_U


def _fill_extras(plan: Plan, packed: Ints, shape: StepShape) -> None:
    at, lines, scores = Extras.of(plan, shape), plan.lines, plan.scores
    if lines is not None:
        for name in RowLines.__slots__:
            packed[getattr(at, name)] = getattr(lines, name)
    if scores is not None:
        behind = np.int32(shape.decodes - plan.num_decodes) * (scores.indices_Q >= plan.num_decodes)
        packed[at.indices_Q] = scores.indices_Q + behind
        packed[at.targets_Q] = scores.targets_Q
        packed[at.wanted_Q] = scores.wanted_Q


def _fill_entries(plan: Plan, tokens_RL: Ints, packed: Ints, at: Sections, shape: StepShape, scratch_row: int) -> None:
    rows, starts, counts, decodes = plan.rows_E, plan.starts_E, plan.counts_E, plan.num_decodes
    gap = shape.decodes - decodes  # padding between the decodes and the chunks
    ends = np.cumsum(counts, dtype=np.int32)
    token_rows = np.repeat(rows, counts)
    positions = np.repeat(starts - (ends - counts), counts) + _numbers(plan.num_tokens)
    kv_len = starts + counts
    _put_apart(packed, at.tokens_T, tokens_RL[token_rows, positions], 0, decodes, gap)
    _put_apart(packed, at.token_rows_T, token_rows, scratch_row, decodes, gap)
    _put_apart(packed, at.positions_T, positions, 0, decodes, gap)
    _put_apart(packed, at.rows_E, rows, scratch_row, decodes, gap)
    _put_apart(packed, at.kv_len_E, kv_len, 1, decodes, gap)
    ends[decodes:] += gap
    _put_query_start(packed, at.query_start_E1, ends[decodes:], shape.decodes)
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


def _put_apart(packed: Ints, section: slice, values: Ints, padding: int, decodes: int, gap: int) -> None:
    """_put, with the values of the decodes and the rest `gap` apart."""
    if not gap:
        _put(packed, section, values, padding)
        return
    middle = section.start + decodes
    _put(packed, slice(section.start, middle + gap), values[:decodes], padding)
    _put(packed, slice(middle + gap, section.stop), values[decodes:], padding)


def _put_query_start(packed: Ints, section: slice, ends: Ints, decodes: int) -> None:
    """A token for each decode, then the ends of the chunks. Padding after them has no tokens."""
    middle = section.start + decodes
    packed[section.start : middle + 1] = _numbers(decodes + 1)
    _put(packed, slice(middle + 1, section.stop), ends, int(ends[-1]) if ends.size else decodes)
