"""The block pool: which KV blocks are free, and how many owners each of the others has."""

from __future__ import annotations

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
        self._stack = np.arange(num_blocks - 1, 0, -1, dtype=np.int32)  # free ids, the next one last
        self._free = num_blocks - 1

    @property
    def num_free(self) -> int:
        return self._free

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can ever have."""
        return self.num_blocks - 1

    def allocate(self, count: int) -> NDArray[np.int32]:
        """int32[count] ids, each with one owner. The caller has looked at num_free first."""
        if count > self._free:
            raise InternalError(f"{count} KV blocks wanted, {self._free} free")
        self._free -= count
        ids = self._stack[self._free : self._free + count].copy()
        self._references[ids] = 1
        return ids

    def release(self, ids: NDArray[np.int32]) -> None:
        """Take one owner from each of these distinct blocks; those left without any become free."""
        left = self._references[ids] - 1
        if left.size and (int(left.min()) < 0 or int(ids.min()) <= NULL_BLOCK):
            raise InternalError(f"KV blocks released that nobody owns: {ids[left < 0].tolist()}")
        self._references[ids] = left
        freed = ids[left == 0]
        self._stack[self._free : self._free + freed.size] = freed
        self._free += freed.size

    def check_integrity(self, owned: NDArray[np.int32]) -> None:
        """`owned`: the ids that all owners hold, one entry per owner. Raises InternalError where the books differ."""
        expected = np.bincount(owned, minlength=self.num_blocks)
        expected[NULL_BLOCK] += 1
        if not np.array_equal(expected, self._references):
            wrong = np.flatnonzero(expected != self._references)
            raise InternalError(f"KV blocks whose owners and references differ: {wrong.tolist()[:20]}")
        free = self._stack[: self._free]
        if np.unique(free).size != self._free or self._references[free].any():
            raise InternalError("the free list has duplicates or blocks with owners")
        if self._free + int((self._references > 0).sum()) != self.num_blocks:
            raise InternalError("a KV block is neither free nor owned")
