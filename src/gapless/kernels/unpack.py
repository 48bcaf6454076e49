# pyright: reportCallIssue=false, reportArgumentType=false
"""The two ends of a step in a kernel each: bring the device tables up to date and carry tokens over; keep what was
sampled.

Decode attention reads rows and lengths of decodes before it waits: at least one kernel must stand between it and this.

T tokens, U block updates, A rows with new parameters, S samples, R rows, C block columns, E entries that all decode.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.dependent import dependent_launch, follow

BLOCK = 256


@triton.jit(do_not_specialize=["tokens", "admitted", "scratch_row"])
def unpack_kernel(
    header_2: tl.tensor,
    updates_3U: tl.tensor,
    tokens_T: tl.tensor,
    rows_T: tl.tensor,
    sent_positions_E: tl.tensor,
    rows_E: tl.tensor,
    positions_E: tl.tensor,
    lengths_E: tl.tensor,
    param_rows_A: tl.tensor,
    temperature_A: tl.tensor,
    top_k_A: tl.tensor,
    top_p_A: tl.tensor,
    min_p_A: tl.tensor,
    seed_A2: tl.tensor,
    last_token_R: tl.tensor,
    block_table_RC: tl.tensor,
    temperature_R: tl.tensor,
    top_k_R: tl.tensor,
    top_p_R: tl.tensor,
    min_p_R: tl.tensor,
    seed_R2: tl.tensor,
    out_T: tl.tensor,
    tokens: tl.tensor,
    admitted: tl.tensor,
    scratch_row: tl.tensor,
    table_stride: tl.tensor,
    DECODES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    follow(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    continues = tl.load(header_2)
    sent = inside
    if DECODES:
        sent = at < tl.where(continues != 0, 0, tokens)
    token = tl.load(tokens_T + at, mask=sent, other=-1)
    row = tl.load(rows_T + at, mask=sent, other=0)
    if DECODES:
        position = tl.load(sent_positions_E + at, mask=sent, other=0)
        old_row = tl.load(rows_E + at, mask=inside, other=0)
        old_position = tl.load(positions_E + at, mask=inside, other=0)
        row = tl.where(continues != 0, old_row, row)
        position = tl.where(continues != 0, old_position + (old_row != scratch_row), position)
        tl.store(rows_E + at, row, mask=inside)
        tl.store(positions_E + at, position, mask=inside)
        tl.store(lengths_E + at, position + 1, mask=inside)
    carried = tl.load(last_token_R + row, mask=inside & (token < 0), other=0)
    tl.store(out_T + at, tl.where(token < 0, carried, token), mask=inside)

    updates = tl.load(header_2 + 1)
    inside = at < updates
    row = tl.load(updates_3U + at, mask=inside, other=0).to(tl.int64)
    column = tl.load(updates_3U + updates + at, mask=inside, other=0)
    block = tl.load(updates_3U + 2 * updates + at, mask=inside, other=0)
    tl.store(block_table_RC + row * table_stride + column, block, mask=inside)

    inside = at < admitted
    row = tl.load(param_rows_A + at, mask=inside, other=0)
    tl.store(temperature_R + row, tl.load(temperature_A + at, mask=inside), mask=inside)
    tl.store(top_k_R + row, tl.load(top_k_A + at, mask=inside), mask=inside)
    tl.store(top_p_R + row, tl.load(top_p_A + at, mask=inside), mask=inside)
    tl.store(min_p_R + row, tl.load(min_p_A + at, mask=inside), mask=inside)
    tl.store(seed_R2 + 2 * row, tl.load(seed_A2 + 2 * at, mask=inside), mask=inside)
    tl.store(seed_R2 + 2 * row + 1, tl.load(seed_A2 + 2 * at + 1, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["samples"])
def store_sampled_kernel(
    sampled_S: tl.tensor,
    rows_S: tl.tensor,
    last_token_R: tl.tensor,
    out_S: tl.tensor,
    samples: tl.tensor,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    follow(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < samples
    token = tl.load(sampled_S + at, mask=inside, other=0)
    tl.store(last_token_R + tl.load(rows_S + at, mask=inside, other=0), token, mask=inside)
    tl.store(out_S + at, token, mask=inside)


def unpack(inputs: Any, tables: Any, *, decodes_only: bool) -> Tensor:
    """Apply a step's deltas to the tables and return its tokens with those in flight filled in: int32[T].

    inputs    engine/layout.py StepInputs; tables: engine/tables.py DeviceTables. Rows with several deltas must not get
              different values for one place; padding goes to the scratch row.
    """
    tokens, updates, admitted = len(inputs.tokens_T), len(inputs.updates_3U) // 3, len(inputs.param_rows_A)
    decodes, sampling = tables.decodes, tables.sampling
    out_T = torch.empty_like(inputs.tokens_T)
    unpack_kernel[(triton.cdiv(max(tokens, updates, admitted), BLOCK),)](
        inputs.header_2,
        inputs.updates_3U,
        inputs.tokens_T,
        inputs.sent_rows_E if decodes_only else inputs.token_rows_T,
        inputs.sent_positions_E,
        decodes.rows_E,
        decodes.positions_E,
        decodes.lengths_E,
        inputs.param_rows_A,
        inputs.temperature_A,
        inputs.top_k_A,
        inputs.top_p_A,
        inputs.min_p_A,
        inputs.seed_A2,
        tables.last_token_R,
        tables.block_table_RC,
        sampling.temperature_R,
        sampling.top_k_R,
        sampling.top_p_R,
        sampling.min_p_R,
        sampling.seed_R2,
        out_T,
        tokens,
        admitted,
        tables.scratch_row,
        tables.block_table_RC.stride(0),
        DECODES=decodes_only,
        BLOCK=BLOCK,
        num_warps=4,
        **dependent_launch(),
    )
    return out_T


def store_sampled(sampled_S: Tensor, rows_S: Tensor, last_token_R: Tensor, out_S: Tensor) -> None:
    """last_token_R[rows_S] = out_S = sampled_S."""
    store_sampled_kernel[(triton.cdiv(len(sampled_S), BLOCK),)](
        sampled_S, rows_S, last_token_R, out_S, len(sampled_S), BLOCK=BLOCK, num_warps=4, **dependent_launch()
    )
