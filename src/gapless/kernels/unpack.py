# pyright: reportCallIssue=false, reportArgumentType=false
"""The two ends of a step in a kernel each: bring the device tables up to date and carry tokens over; keep what was
sampled.

T tokens, U block updates, A rows with new parameters, S samples, R rows, C block columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.dependent import dependent_launch, follow

BLOCK = 256


@triton.jit(do_not_specialize=["tokens", "updates", "admitted"])
def unpack_kernel(
    tokens_T: tl.tensor,
    token_rows_T: tl.tensor,
    block_rows_U: tl.tensor,
    block_columns_U: tl.tensor,
    block_ids_U: tl.tensor,
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
    updates: tl.tensor,
    admitted: tl.tensor,
    table_stride: tl.tensor,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    follow(DEPENDENT)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    token = tl.load(tokens_T + at, mask=inside, other=0)
    row = tl.load(token_rows_T + at, mask=inside, other=0)
    carried = tl.load(last_token_R + row, mask=inside & (token < 0), other=0)
    tl.store(out_T + at, tl.where(token < 0, carried, token), mask=inside)

    inside = at < updates
    row = tl.load(block_rows_U + at, mask=inside, other=0).to(tl.int64)
    column = tl.load(block_columns_U + at, mask=inside, other=0)
    block = tl.load(block_ids_U + at, mask=inside, other=0)
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


def unpack(inputs: Any, last_token_R: Tensor, block_table_RC: Tensor, sampling: Any) -> Tensor:
    """Apply a step's deltas to the tables and return its tokens with those in flight filled in: int32[T].

    inputs    engine/layout.py StepInputs; sampling: sampling/base.py SamplingTables. Rows with several deltas must
              not get different values for one place; padding goes to the scratch row.
    """
    tokens, updates, admitted = len(inputs.tokens_T), len(inputs.block_ids_U), len(inputs.param_rows_A)
    out_T = torch.empty_like(inputs.tokens_T)
    unpack_kernel[(triton.cdiv(max(tokens, updates, admitted), BLOCK),)](
        inputs.tokens_T,
        inputs.token_rows_T,
        inputs.block_rows_U,
        inputs.block_columns_U,
        inputs.block_ids_U,
        inputs.param_rows_A,
        inputs.temperature_A,
        inputs.top_k_A,
        inputs.top_p_A,
        inputs.min_p_A,
        inputs.seed_A2,
        last_token_R,
        block_table_RC,
        sampling.temperature_R,
        sampling.top_k_R,
        sampling.top_p_R,
        sampling.min_p_R,
        sampling.seed_R2,
        out_T,
        tokens,
        updates,
        admitted,
        block_table_RC.stride(0),
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
