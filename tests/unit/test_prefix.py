"""The chain of digests: what it depends on, and that it can be made in pieces."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gapless.prefix import chain_of, extend_chain

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
SIZES = st.sampled_from([1, 2, 4, 16])


def by_hand(tokens: list[int], block_size: int, salt: bytes) -> list[bytes]:
    """SHA-256 of the digest before and the block's tokens as little-endian int32; in front, that of the salt."""
    digests = [hashlib.new("sha256", b"the salt before the first block:" + salt).digest()]
    while len(tokens) >= block_size:
        block, tokens = tokens[:block_size], tokens[block_size:]
        digest = hashlib.new("sha256", digests[-1])
        for token in block:
            digest.update(struct.pack("<i", token))
        digests.append(digest.digest())
    return digests[1:]


def test_a_known_chain_is_what_it_was():
    chain = chain_of(np.asarray([1, 2, 3, 4, 5], dtype=np.int32), 2, b"tenant")
    assert [digest.hex()[:16] for digest in chain] == ["0e99818ff9b99742", "897825543ce0cebd"]


@given(TOKENS, SIZES, st.binary(max_size=8))
def test_each_digest_is_of_the_one_before_and_of_the_blocks_tokens(tokens: list[int], size: int, salt: bytes):
    chain = chain_of(np.asarray(tokens, dtype=np.int32), size, salt)
    assert list(chain) == by_hand(tokens, size, salt)
    assert len(chain) == len(tokens) // size


@given(TOKENS, SIZES, st.lists(st.integers(0, 40), max_size=5))
def test_a_chain_that_is_extended_is_the_same_as_one_made_at_once(tokens: list[int], size: int, stops: list[int]):
    array, chain = np.asarray(tokens, dtype=np.int32), list[bytes]()
    for blocks in stops:
        before = chain.copy()
        extend_chain(chain, array, min(blocks, array.size // size), size, b"")
        assert chain[: len(before)] == before
    extend_chain(chain, array, array.size // size, size, b"")
    assert tuple(chain) == chain_of(array, size, b"")


@given(TOKENS, SIZES, st.binary(max_size=8), st.binary(max_size=8))
def test_under_another_salt_no_digest_is_the_same(tokens: list[int], size: int, salt: bytes, other: bytes):
    array = np.asarray(tokens, dtype=np.int32)
    first, second = chain_of(array, size, salt), chain_of(array, size, other)
    assert not set(first) & set(second) if salt != other else first == second


@given(TOKENS, SIZES, st.integers(0, 39))
def test_one_other_token_changes_its_block_and_all_behind_and_none_before(tokens: list[int], size: int, at: int):
    array = np.asarray(tokens, dtype=np.int32)
    changed = array.copy()
    changed[at : at + 1] ^= 1
    before, after = chain_of(array, size, b""), chain_of(changed, size, b"")
    same = [one == two for one, two in zip(before, after, strict=True)]
    assert same == [index < at // size for index in range(len(same))] if at < array.size else all(same)


def test_a_chain_reads_the_tokens_of_a_row_up_to_its_blocks_only():
    row = np.arange(64, dtype=np.int32).reshape(4, 16)[1]
    chain: list[bytes] = []
    extend_chain(chain, row, 2, 4, b"")
    assert tuple(chain) == chain_of(row[:8].copy(), 4, b"")
    extend_chain(chain, row, 1, 4, b"")
    assert len(chain) == 2
