"""Paged batches built from lengths, with shuffled blocks and poisoned memory: for tests and for measuring kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV


@dataclass(frozen=True, slots=True)
class Scenario:
    """One layer's cache, with NaN wherever no token was written, and the queries of one step over it."""

    q_TND: Tensor
    kv: LayerKV
    batch: AttentionBatch
    num_padding: int  # decodes at the end of a batch of decodes whose answer is not defined


def shuffled_block_table(num_rows: int, columns: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """int32[num_rows + 1, columns]: every row has blocks of its own, in no order; the scratch row has block 0."""
    blocks = torch.randperm(num_rows * columns, generator=generator) + 1
    table_RC = torch.zeros(num_rows + 1, columns, dtype=torch.int32)
    table_RC[:num_rows] = blocks.view(num_rows, columns)
    return table_RC.to(device)


def batch_of(
    rows: Sequence[int],
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    block_table_RC: Tensor,
    *,
    max_kv: int | None = None,
) -> AttentionBatch:
    """The batch in which entry i computes the last query_lens[i] of kv_lens[i] tokens; decodes come first."""
    num_decodes = sum(length == 1 for length in query_lens)
    if any(length != 1 for length in query_lens[:num_decodes]):
        raise ValueError(f"entries with one query token must come first, not {list(query_lens)}")
    starts, token_rows, positions = [0], list[int](), list[int]()
    for row, queries, length in zip(rows, query_lens, kv_lens, strict=True):
        starts.append(starts[-1] + queries)
        token_rows += [row] * queries
        positions += range(length - queries, length)

    def int32(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=block_table_RC.device)

    return AttentionBatch(
        rows_E=int32(rows),
        query_start_E1=int32(starts),
        kv_len_E=int32(kv_lens),
        token_rows_T=int32(token_rows),
        positions_T=int32(positions),
        block_table_RC=block_table_RC,
        num_decodes=num_decodes,
        max_query=max(query_lens),
        max_kv=max_kv or max(kv_lens),
    )


def make_scenario(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    seed: int = 0,
    padding: int = 0,
    max_kv: int | None = None,
) -> Scenario:
    """Random queries over random keys and values. `heads` is (query heads, key/value heads)."""
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    num_rows, (num_heads, num_kv_heads) = len(kv_lens), heads
    columns = -(-max(max_kv or 0, *kv_lens) // block_size)
    table_RC = shuffled_block_table(num_rows, columns, generator, torch.device("cpu"))
    rows: list[int] = [*torch.randperm(num_rows, generator=generator).tolist(), *[num_rows] * padding]
    batch = batch_of(rows, [*query_lens, *[1] * padding], [*kv_lens, *[1] * padding], table_RC, max_kv=max_kv)

    written = torch.zeros(num_rows * columns + 1, block_size, dtype=torch.bool)
    for row, length in zip(rows, kv_lens, strict=False):
        positions = torch.arange(length)
        written[table_RC[row, positions // block_size].long(), positions % block_size] = True

    on_device = torch.Generator(device).manual_seed(seed)
    unwritten = ~written[:, None, :, None].to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=on_device, device=device)

    def cache() -> Tensor:
        values = normal(len(written), num_kv_heads, block_size, head_dim)
        return values.masked_fill_(unwritten, torch.nan).to(dtype)

    kv = LayerKV(cache(), cache())
    q_TND = normal(len(batch.positions_T), num_heads, head_dim).to(dtype)
    return Scenario(q_TND, kv, _to(batch, device), padding)


def pad_mixed(scenario: Scenario, *, decodes: int, entries: int, tokens: int) -> tuple[Scenario, Tensor]:
    """The same step as a larger one: with decodes of padding before the chunks, entries of no token after them, and
    tokens of no entry behind all. Returns the places of the step's own tokens, too."""
    batch, device = scenario.batch, scenario.q_TND.device
    own, ends = batch.num_decodes, batch.query_start_E1
    scratch = batch.block_table_RC.shape[0] - 1
    num_tokens = len(scenario.q_TND)
    at_T = torch.arange(num_tokens, device=device)
    at_T[own:] += decodes

    def apart(values: Tensor, padding: int, behind: int) -> Tensor:
        middle, end = torch.full((decodes,), padding).to(values), torch.full((behind,), padding).to(values)
        return torch.cat([values[:own], middle, values[own:], end])

    counted = torch.arange(own + decodes, dtype=torch.int32, device=device)
    chunk_ends = ends[own:] + decodes
    larger = replace(
        batch,
        rows_E=apart(batch.rows_E, scratch, entries),
        kv_len_E=apart(batch.kv_len_E, 1, entries),
        query_start_E1=torch.cat([counted, chunk_ends, chunk_ends[-1:].expand(entries)]),
        token_rows_T=apart(batch.token_rows_T, scratch, tokens),
        positions_T=apart(batch.positions_T, 0, tokens),
        num_decodes=own + decodes,
        max_query=num_tokens - own + tokens,
    )
    q_TND = scenario.q_TND.new_zeros((num_tokens + decodes + tokens, *scenario.q_TND.shape[1:]))
    q_TND[at_T] = scenario.q_TND
    return Scenario(q_TND, scenario.kv, larger, decodes), at_T


def _to(batch: AttentionBatch, device: torch.device) -> AttentionBatch:
    return AttentionBatch(
        rows_E=batch.rows_E.to(device),
        query_start_E1=batch.query_start_E1.to(device),
        kv_len_E=batch.kv_len_E.to(device),
        token_rows_T=batch.token_rows_T.to(device),
        positions_T=batch.positions_T.to(device),
        block_table_RC=batch.block_table_RC.to(device),
        num_decodes=batch.num_decodes,
        max_query=batch.max_query,
        max_kv=batch.max_kv,
    )
