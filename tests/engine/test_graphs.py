"""Which batch sizes are captured, and which of them a decode step is padded to."""

from __future__ import annotations

import pytest

from gapless.engine.graphs import GraphTable, default_buckets


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
