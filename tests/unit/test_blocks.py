"""The block pool against a brute-force one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

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


# -------------------------------------------------------------- what full blocks hold


def array(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(ids, dtype=np.int32)


def digests(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


class Sequences:
    """A pool with sequences of blocks, and what must be true of it, found by looking at everything.

    Block i of a sequence of tokens has the digest tokens[: i + 1]: blocks of one token.
    """

    def __init__(self, blocks: int) -> None:
        self.pool = BlockPool(blocks)
        self.held: list[tuple[bytes, list[int]]] = []
        self.kept: dict[bytes, int] = {}  # digest to block
        self.idle: list[bytes] = []  # the next to be evicted first

    def chain(self, tokens: bytes) -> list[bytes]:
        return [tokens[: end + 1] for end in range(len(tokens))]

    def owners(self) -> Counter[int]:
        return Counter(block for _, blocks in self.held for block in blocks)

    def expected_beginning(self, tokens: bytes) -> list[int]:
        found: list[int] = []
        for digest in self.chain(tokens):
            if digest not in self.kept:
                break
            found.append(self.kept[digest])
        return found

    def begin(self, tokens: bytes) -> None:
        """A sequence of these tokens: shares what there is, and allocates the rest, if there is room."""
        pool, owners = self.pool, self.owners()
        found = pool.find(self.chain(tokens))
        assert found == self.expected_beginning(tokens)
        assert pool.count_idle(found) == sum(owners[block] == 0 for block in found)
        new = len(tokens) - len(found)
        if new > pool.num_free - pool.count_idle(found):
            return
        shared = pool.share(found)
        self.idle = [digest for digest in self.idle if self.kept[digest] not in found]
        empty = pool.num_free - len(self.idle)
        for digest in self.idle[: max(0, new - empty)]:
            del self.kept[digest]
        self.idle = self.idle[max(0, new - empty) :]
        ids = pool.allocate(new)
        assert not set(ids.tolist()) & ({*owners} | set(found) | {self.kept[digest] for digest in self.kept})
        self.held.append((tokens, [*shared.tolist(), *ids.tolist()]))

    def end(self, index: int, computed: int) -> None:
        """The sequence ends; so many of its blocks are full."""
        tokens, blocks = self.held[index]
        begin = next((at for at, block in enumerate(blocks) if block not in self.kept.values()), len(blocks))
        full = max(begin, min(computed, len(blocks)))
        chain = self.chain(tokens)
        self.pool.register(array(blocks[begin:full]), chain[begin:full])
        for digest, block in zip(chain[begin:full], blocks[begin:full], strict=True):
            self.kept.setdefault(digest, block)
        self.held.pop(index)
        self.pool.release(array(blocks))
        owners, digest_of = self.owners(), {block: digest for digest, block in self.kept.items()}
        self.idle += [digest_of[block] for block in reversed(blocks) if not owners[block] and block in digest_of]

    def check(self) -> None:
        pool, owners = self.pool, self.owners()
        pool.check_integrity(array([block for _, blocks in self.held for block in blocks]))
        assert pool.num_free == pool.num_usable - len(owners)
        assert pool.num_cached == len(self.kept)
        for tokens, blocks in self.held:
            assert pool.find(self.chain(tokens)) == self.expected_beginning(tokens)
            assert pool.count_freed(array(blocks)) == sum(owners[block] == 1 for block in blocks)
        both = [block for _, blocks in self.held[:2] for block in blocks]
        assert pool.count_freed(array(both)) == sum(owners[block] == times for block, times in Counter(both).items())


@given(
    st.lists(
        st.one_of(
            st.lists(st.sampled_from(b"ab"), min_size=1, max_size=6).map(bytes),
            st.tuples(st.integers(0, 5), st.integers(0, 6)),
            st.none(),
        ),
        max_size=40,
    )
)
def test_sequences_find_share_and_evict_what_looking_at_everything_says(
    actions: list[bytes | tuple[int, int] | None],
):
    """Begins, ends, and now and then the whole index is forgotten while nobody runs."""
    state = Sequences(14)
    for action in actions:
        if isinstance(action, bytes):
            state.begin(action)
        elif isinstance(action, tuple):
            if state.held:
                state.end(action[0] % len(state.held), action[1])
        elif not state.held:
            state.pool.forget_all()
            state.kept, state.idle = {}, []
        state.check()


@given(st.lists(st.integers(1, 6), max_size=4), st.integers(0, 8), st.integers(0, 8))
def test_the_estimate_is_exact_where_owned_blocks_come_before_idle_ones_and_no_gap(
    owned: list[int], idle: int, absent: int
):
    """One chain; sequences own beginnings of it, an idle part is behind the longest, and the rest is not there."""
    longest, pool = max(owned, default=0), BlockPool(64)
    chain = [bytes([number]) for number in range(longest + idle + absent)]
    ids = pool.allocate(longest + idle)
    pool.register(ids, chain[: ids.size])
    for count in owned:
        pool.share(ids[:count].tolist())
    pool.release(ids)
    found = pool.find(chain)
    assert found == ids.tolist()
    assert pool.estimate_owned(chain) == longest == len(found) - pool.count_idle(found)
    for length in range(len(chain) + 1):
        assert pool.estimate_owned(chain[:length]) == min(length, longest)


@given(st.lists(st.sampled_from(["owned", "idle", "absent"]), max_size=10))
def test_whatever_is_there_the_estimate_is_within_the_chain_and_none_where_nobody_owns_any(states: list[str]):
    pool, chain = BlockPool(64), [bytes([number]) for number in range(len(states))]
    for digest, state in zip(chain, states, strict=True):
        if state != "absent":
            ids = pool.allocate(1)
            pool.register(ids, [digest])
            if state == "idle":
                pool.release(ids)
    assert pool.estimate_owned(chain) <= len(chain)
    assert "owned" in states or pool.estimate_owned(chain) == 0


def test_blocks_that_hold_nothing_go_first_then_those_used_least_recently_of_a_sequence_the_last_first():
    pool = BlockPool(9)
    first, second, rest = pool.allocate(3), pool.allocate(2), pool.allocate(3)
    pool.register(first, digests("a", "b", "c"))
    pool.register(second, digests("x", "y"))
    for ids in (first, second, rest):
        pool.release(ids)
    pool.release(pool.share(pool.find(digests("a"))))  # used once more: after those of the second
    assert set(pool.allocate(3).tolist()) == set(rest.tolist())
    order = [pool.allocate(1).item() for _ in range(5)]
    assert order == [first[2], first[1], second[1], second[0], first[0]]


def test_what_was_evicted_is_not_found_and_neither_is_what_comes_behind_it():
    pool = BlockPool(5)
    ids = pool.allocate(3)
    pool.register(ids, digests("a", "b", "c"))
    pool.share(ids[1:].tolist())
    pool.release(ids)
    assert pool.find(digests("a", "b", "c")) == ids.tolist()
    assert ids[0] in pool.allocate(2)
    assert pool.find(digests("a", "b", "c")) == []
    assert pool.find(digests("b", "c")) == ids[1:].tolist()
    assert pool.num_cached == 2


def test_of_two_blocks_that_hold_the_same_the_first_is_found_and_the_other_is_freed_for_good():
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first, digests("a"))
    pool.register(second, digests("a"))
    pool.release(second)
    assert pool.find(digests("a")) == first.tolist()
    assert pool.num_cached == 1
    pool.release(first)
    assert pool.allocate(1) == second  # it holds nothing that anybody can find


def test_a_block_is_registered_once_and_only_while_somebody_has_it():
    pool = BlockPool(4)
    ids = pool.allocate(1)
    pool.register(ids, digests("a"))
    with pytest.raises(InternalError, match="filled twice"):
        pool.register(ids, digests("b"))
    pool.release(pool.allocate(1))
    with pytest.raises(InternalError, match="has no owner"):
        pool.register(array([3]), digests("c"))


def test_once_all_is_forgotten_nothing_is_found_and_every_block_can_be_had():
    pool = BlockPool(6)
    idle, owned = pool.allocate(2), pool.allocate(2)
    pool.register(idle, digests("a", "b"))
    pool.register(owned, digests("x", "y"))
    pool.release(idle)
    pool.forget_all()
    pool.check_integrity(owned)
    assert pool.num_cached == 0
    assert pool.find(digests("a")) == pool.find(digests("x")) == []
    pool.release(owned)
    assert sorted(pool.allocate(5).tolist()) == [1, 2, 3, 4, 5]


def test_the_integrity_check_finds_an_index_that_differs_from_the_blocks():
    class Spoilt(BlockPool):
        def spoil(self, idle: bool) -> None:
            if idle:
                self._idle.clear()
            else:
                self._by_digest.clear()

    for idle in (False, True):
        pool = Spoilt(4)
        ids = pool.allocate(1)
        pool.register(ids, digests("a"))
        pool.release(ids)
        pool.check_integrity(array([]))
        pool.spoil(idle)
        with pytest.raises(InternalError):
            pool.check_integrity(array([]))
