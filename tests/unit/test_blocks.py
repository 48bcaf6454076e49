"""The block pool against a brute-force one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapless.blocks import NULL_BLOCK, BlockPool
from gapless.errors import InternalError


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_any_order_of_allocations_and_releases_keeps_the_books(actions: list[tuple[bool, int]]):
    pool, held, free = BlockPool(16), list[int](), set(range(1, 16))
    for allocate, size in actions:
        if allocate and size <= len(free):
            ids = pool.allocate(size).tolist()
            assert len(set(ids)) == size
            assert set(ids) <= free
            free -= set(ids)
            held += ids
        elif not allocate:
            back, held = held[:size], held[size:]
            pool.release(np.asarray(back, dtype=np.int32))
            free |= set(back)
        assert pool.num_free == len(free)
        pool.check_integrity(np.asarray(held, dtype=np.int32))


def test_a_block_is_freed_once():
    pool = BlockPool(4)
    ids = pool.allocate(2)
    pool.release(ids)
    with pytest.raises(InternalError, match="nobody owns"):
        pool.release(ids)


def test_the_null_block_is_never_handed_out_nor_taken_back():
    pool = BlockPool(4)
    assert NULL_BLOCK not in pool.allocate(3)
    with pytest.raises(InternalError):
        pool.release(np.asarray([NULL_BLOCK], dtype=np.int32))


def test_more_blocks_than_are_free_is_our_bug():
    with pytest.raises(InternalError, match="4 KV blocks wanted, 3 free"):
        BlockPool(4).allocate(4)


def test_the_integrity_check_finds_a_leak_and_a_double_owner():
    pool = BlockPool(4)
    ids = pool.allocate(2)
    with pytest.raises(InternalError):
        pool.check_integrity(ids[:1])
    with pytest.raises(InternalError):
        pool.check_integrity(np.concatenate((ids, ids[:1])))
