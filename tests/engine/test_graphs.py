"""Which shapes are captured, which of them a step is padded to, and how."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gapless.engine.fill import fill
from gapless.engine.graphs import GraphTable, default_buckets, mixed_shape, mixed_shapes
from gapless.engine.layout import StepInputs, StepShape, sections_of, sent_size
from gapless.engine.tables import DecodeTables
from gapless.plan import Plan, empty_plan


@pytest.mark.parametrize(
    ("max_rows", "buckets"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (64, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)),
        (65, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 65)),
        (200, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 200)),
    ],
)
def test_default_buckets_end_with_the_most_rows(max_rows: int, buckets: tuple[int, ...]):
    assert default_buckets(max_rows) == buckets


@pytest.mark.parametrize("max_rows", [1, 7, 63, 64, 100, 129, 256, 1000, 4096])
def test_padding_adds_no_more_than_seven_rows_or_a_quarter(max_rows: int):
    buckets = default_buckets(max_rows)
    assert list(buckets) == sorted(set(buckets))
    table = GraphTable(buckets)
    for rows in range(1, max_rows + 1):
        bucket = table.bucket_for(rows)
        assert bucket is not None
        assert rows <= bucket <= max(rows + 7, rows * 5 // 4)


def test_a_bucket_is_the_smallest_that_holds_the_rows():
    table = GraphTable((8, 2, 4, 4))  # in any order
    assert [table.bucket_for(rows) for rows in range(1, 9)] == [2, 2, 4, 4, 8, 8, 8, 8]
    assert table.bucket_for(9) is None


@pytest.mark.parametrize("max_rows", [1, 6, 64, 100])
def test_every_bucket_fits_itself_and_one_row_more_takes_the_next(max_rows: int):
    buckets = default_buckets(max_rows)
    table = GraphTable(buckets)
    assert [table.bucket_for(bucket) for bucket in buckets] == list(buckets)
    assert [table.bucket_for(bucket + 1) for bucket in buckets] == [*buckets[1:], None]


def test_without_buckets_nothing_fits():
    assert GraphTable(()).bucket_for(1) is None


def mixed_plan(decodes: int, chunks: list[int], updates: int = 0) -> Plan:
    """Decodes of rows 0, 1, … at position 10 * row, then chunks of further rows from position 0 on; all sample."""
    counts = np.asarray([1] * decodes + chunks, dtype=np.int32)
    rows = np.arange(counts.size, dtype=np.int32)
    column = np.arange(updates, dtype=np.int32)
    return dataclasses.replace(
        empty_plan(),
        rows_E=rows,
        starts_E=np.where(rows < decodes, 10 * rows, 0).astype(np.int32),
        counts_E=counts,
        samples_E=np.ones_like(counts),
        num_samples=counts.size,
        num_decodes=decodes,
        num_tokens=int(counts.sum()),
        block_rows_U=column,
        block_columns_U=column + 1,
        block_ids_U=column + 2,
    )


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 64), (16, 100), (100, 512), (256, 8192), (1024, 8192)])
def test_mixed_shapes_hold_every_mix_of_short_chunks_up_to_the_largest(max_rows: int, max_tokens: int):
    shapes = mixed_shapes(max_rows, max_tokens, 77)
    table = GraphTable((), shapes)
    largest = max(shape.chunk_tokens for shape in shapes)
    assert largest <= max_tokens
    assert max(shape.chunks for shape in shapes) <= max_rows
    for decodes in {0, max_rows // 2, max_rows - 1}:
        for count in {1, min(4, max_rows - decodes), min(largest // 16, max_rows - decodes)}:
            for tokens in {2, 16, largest // count}:
                found = table.shape_for(mixed_plan(decodes, [tokens] * count, updates=77))
                assert found is not None, (decodes, count, tokens)
                assert found.samples <= max_rows
    assert table.shape_for(mixed_plan(0, [largest + 1])) is None


def test_a_mixed_step_takes_the_shape_of_the_fewest_tokens_that_holds_all_its_counts():
    table = GraphTable((), [mixed_shape(*sizes, 9, 5) for sizes in [(4, 8, 4), (2, 8, 1), (2, 9, 2)]])
    assert table.shape_for(mixed_plan(2, [8])) == mixed_shape(2, 8, 1, 9, 5)
    assert table.shape_for(mixed_plan(2, [4, 4])) == mixed_shape(2, 9, 2, 9, 5)
    assert table.shape_for(mixed_plan(3, [4, 4])) == mixed_shape(4, 8, 4, 9, 5)
    assert table.shape_for(mixed_plan(2, [8], updates=6)) is None
    assert table.shape_for(mixed_plan(2, [9, 1, 1])) is None


def test_a_step_that_no_shape_holds_has_its_decodes_padded_as_if_one_did():
    table = GraphTable((), [mixed_shape(*sizes, 9, 5) for sizes in [(4, 8, 4), (2, 8, 1)]])
    for decodes, places in ((0, 0), (1, 2), (2, 2), (3, 4), (4, 4), (5, 5)):
        exact = StepShape.of(mixed_plan(decodes, [50, 60], updates=1))
        assert table.pad_decodes(exact) == exact.with_places(places)
        assert exact.with_places(places).chunk_tokens == exact.chunk_tokens
    assert GraphTable((4,)).pad_decodes(exact) == exact


def test_decodes_alone_that_no_bucket_holds_are_not_padded():
    """They are laid out in another way, and may go on where they are."""
    table = GraphTable((2,), [mixed_shape(4, 8, 4, 9, 5)])
    exact = StepShape.of(mixed_plan(3, [], updates=1))
    assert exact.decodes_only
    assert table.pad_decodes(exact) == exact


def filled(plan: Plan, shape: StepShape, scratch_row: int = 9) -> tuple[torch.Tensor, StepInputs]:
    packed = np.full(sections_of(shape).total, 555, dtype=np.int32)
    tokens_RL = np.arange(1000, dtype=np.int32).reshape(10, 100)
    fill(plan, tokens_RL, packed, shape, scratch_row)
    tensor = torch.from_numpy(packed)
    return tensor, StepInputs.of(tensor, shape, DecodeTables.allocate(9, torch.device("cpu")))


def test_padding_of_decodes_stands_between_them_and_the_chunks():
    plan = mixed_plan(2, [3, 2], updates=1)
    packed, inputs = filled(plan, mixed_shape(4, 8, 3, 9, 5))
    assert inputs.tokens_T.tolist() == [0, 110, 0, 0, 200, 201, 202, 300, 301, 0, 0, 0]
    assert inputs.token_rows_T.tolist() == [0, 1, 9, 9, 2, 2, 2, 3, 3, 9, 9, 9]
    assert inputs.positions_T.tolist() == [0, 10, 0, 0, 0, 1, 2, 0, 1, 0, 0, 0]
    assert inputs.rows_E.tolist() == [0, 1, 9, 9, 2, 3, 9]
    assert inputs.kv_len_E.tolist() == [1, 11, 1, 1, 3, 2, 1]
    assert inputs.query_start_E1.tolist() == [0, 1, 2, 3, 4, 7, 9, 9]
    assert inputs.sample_tokens_S.tolist() == [0, 1, 6, 8, 0, 0, 0]
    assert inputs.sample_rows_S.tolist() == [0, 1, 2, 3, 9, 9, 9]
    assert inputs.sample_positions_S.tolist() == [1, 11, 3, 2, 0, 0, 0]
    assert [each.tolist() for each in inputs.block_updates()] == [[0], [1], [2]]
    assert packed[sent_size(plan, mixed_shape(4, 8, 3, 9, 5)) :].tolist() == [555] * 13  # of 5 updates, 4 are not sent


def test_without_chunks_the_entries_after_the_decodes_have_no_token():
    _, inputs = filled(mixed_plan(2, []), mixed_shape(4, 8, 3, 9, 5))
    assert inputs.query_start_E1.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert inputs.kv_len_E.tolist() == [1, 11, 1, 1, 1, 1, 1]
    assert inputs.token_rows_T.tolist() == [0, 1] + [9] * 10
    assert inputs.sample_tokens_S.tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_decodes_that_go_on_send_a_header_and_their_new_blocks():
    shape = StepShape.decode(4)
    plan = dataclasses.replace(mixed_plan(3, [], updates=2), continues=True)
    packed, _ = filled(plan, shape)
    assert sent_size(plan, shape) == 4 + 3 * 2
    assert packed[:10].tolist() == [1, 2, 555, 555, 0, 1, 1, 2, 2, 3]
    assert set(packed[10:].tolist()) == {555}
    assert sent_size(dataclasses.replace(plan, continues=False), shape) == 4 + 3 * 4 + 3 * 4
