"""The block pool: which KV blocks are free, how many owners each of the others has, and what the full ones hold.

A full block is known by the digest of all tokens up to its end (prefix.py). Whoever has the same tokens shares it, and
nobody writes to it: writes go behind the computed tokens. Left without owners it stays as it is, and is evicted, least
recently used first, only when no other block is free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gapless.errors import InternalError

NULL_BLOCK = 0
"""Never allocated; takes the writes of padding."""


class BlockPool:
    """Block ids 1..num_blocks-1 with reference counts. All operations take arrays and cost O(blocks moved)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = np.zeros(num_blocks, dtype=np.int32)
        self._references[NULL_BLOCK] = 1
        self._stack = np.arange(num_blocks - 1, 0, -1, dtype=np.int32)  # ids that hold nothing, the next one last
        self._empty = num_blocks - 1
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._kept = np.zeros(num_blocks, dtype=np.bool_)  # has a digest
        self._idle: OrderedDict[int, None] = OrderedDict()  # with a digest and without owners, the next to go first

    @property
    def num_free(self) -> int:
        """Blocks without owners."""
        return self._empty + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Full blocks that can be found by what they hold."""
        return len(self._digests)

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can ever have."""
        return self.num_blocks - 1

    def allocate(self, count: int) -> NDArray[np.int32]:
        """int32[count] ids, each with one owner. The caller has looked at num_free first."""
        if count > self.num_free:
            raise InternalError(f"{count} KV blocks wanted, {self.num_free} free")
        if count > self._empty:
            self._evict(count - self._empty)
        self._empty -= count
        ids = self._stack[self._empty : self._empty + count].copy()
        self._references[ids] = 1
        return ids

    def release(self, ids: NDArray[np.int32]) -> None:
        """Take one owner from each of these distinct blocks; those left without any become free.

        They come in the order of their sequence: of those that are kept, the last goes first.
        """
        left = self._references[ids] - 1
        if left.size and (int(left.min()) < 0 or int(ids.min()) <= NULL_BLOCK):
            raise InternalError(f"KV blocks released that nobody owns: {ids[left < 0].tolist()}")
        self._references[ids] = left
        freed = ids[left == 0]
        kept = self._kept[freed]
        if kept.any():
            self._idle.update(dict.fromkeys(freed[kept][::-1].tolist()))
            freed = freed[~kept]
        self._stack[self._empty : self._empty + freed.size] = freed
        self._empty += freed.size

    # ---------------------------------------------------------- prefix index

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of this chain that is there. Nobody owns them by that yet."""
        found: list[int] = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def estimate_owned(self, digests: Sequence[bytes], count: int | None = None) -> int:
        """About how many of the blocks that `find` gives for the first `count`, or all, have an owner. Quick.

        Exact if no earlier block was evicted and none is idle before one that is owned: the rule, since who has a
        block has those before it.
        """
        low, high = 0, len(digests) if count is None else count
        while low < high:
            middle = (low + high) // 2
            block = self._by_digest.get(digests[middle])
            if block is not None and block not in self._idle:
                low = middle + 1
            else:
                high = middle
        return low

    def count_idle(self, blocks: Sequence[int]) -> int:
        """How many of these have no owner: sharing them makes num_free smaller."""
        return sum(block in self._idle for block in blocks)

    def count_freed(self, ids: NDArray[np.int32]) -> int:
        """How many blocks would be free if each of these lost an owner, a block as many as the times it comes."""
        blocks, owners = np.unique(ids, return_counts=True)
        return int(np.count_nonzero(self._references[blocks] == owners))

    def share(self, blocks: Sequence[int]) -> NDArray[np.int32]:
        """One more owner for each of these distinct blocks, which `find` gave. int32 ids."""
        ids = np.asarray(blocks, dtype=np.int32)
        self._references[ids] += 1
        for block in blocks:
            self._idle.pop(block, None)
        return ids

    def register(self, ids: NDArray[np.int32], digests: Sequence[bytes]) -> None:
        """These owned blocks are full, and their step has retired. What is there already stays what is found."""
        if self._kept[ids].any() or (self._references[ids] <= 0).any():
            raise InternalError(f"of KV blocks {ids.tolist()} one was filled twice, or has no owner")
        by_digest, by_block = self._by_digest, self._digests
        for block, digest in zip(ids.tolist(), digests, strict=True):
            if digest not in by_digest:
                by_digest[digest] = block
                by_block[block] = digest
                self._kept[block] = True

    def forget_all(self) -> None:
        """Let no block be found any more. Rows that run on after it would register what they have from before."""
        idle = np.fromiter(self._idle, dtype=np.int32, count=len(self._idle))
        self._stack[self._empty : self._empty + idle.size] = idle
        self._empty += idle.size
        self._idle.clear()
        self._by_digest.clear()
        self._digests.clear()
        self._kept[:] = False

    def _evict(self, count: int) -> None:
        """Empty the idle blocks that were used least recently."""
        for place in range(self._empty, self._empty + count):
            block, _ = self._idle.popitem(last=False)
            del self._by_digest[self._digests.pop(block)]
            self._kept[block] = False
            self._stack[place] = block
        self._empty += count

    def check_integrity(self, owned: NDArray[np.int32]) -> None:
        """`owned`: the ids that all owners hold, one entry per owner. Raises InternalError where the books differ."""
        expected = np.bincount(owned, minlength=self.num_blocks)
        expected[NULL_BLOCK] += 1
        if not np.array_equal(expected, self._references):
            wrong = np.flatnonzero(expected != self._references)
            raise InternalError(f"KV blocks whose owners and references differ: {wrong.tolist()[:20]}")
        free = np.concatenate((self._stack[: self._empty], np.fromiter(self._idle, np.int32, len(self._idle))))
        if np.unique(free).size != self.num_free or self._references[free].any():
            raise InternalError("the free list has duplicates or blocks with owners")
        if self.num_free + int((self._references > 0).sum()) != self.num_blocks:
            raise InternalError("a KV block is neither free nor owned")
        kept = np.flatnonzero(self._kept).tolist()
        if {block: digest for digest, block in self._by_digest.items()} != self._digests or kept != sorted(
            self._digests
        ):
            raise InternalError("the prefix index and its blocks differ")
        if any((block in self._idle) != (self._references[block] == 0) for block in self._digests):
            raise InternalError("a KV block that is kept is in use and idle, or neither")
