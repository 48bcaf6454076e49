"""Sequences without a row, in the order in which they will get one."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from gapless.plan import Ints
from gapless.request import Request, TokenMasks

MANY_ENDED = 64  # fewer ended requests in the queue are not worth rebuilding it


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request between arrival and its end.

    tokens      the known ones while it has no row
    computed    how many of them had been computed when it lost its row
    digests     of its full blocks, those of the prompt from the beginning on; empty without a prefix cache
    registered  blocks of its row that can be found by their digests, or hold what another does
    masks       of its form, None without one
    scored      tokens of the prompt whose logprobs have been scheduled
    cached      tokens that were found in the prefix cache when it got its first row; -1 before
    """

    request: Request
    tokens: Ints
    row: int = -1
    computed: int = 0
    digests: list[bytes] = field(default_factory=list[bytes])
    registered: int = 0
    cached: int = -1
    masks: TokenMasks | None = None
    scored: int = 0


class WaitingQueue:
    """A heap by rank. Requests that have ended stay in it until they come up or are the larger part."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, SequenceState]] = []
        self._ended = 0

    def __len__(self) -> int:
        """Entries, those of ended requests that have not been dropped yet included."""
        return len(self._heap)

    def push(self, sequence: SequenceState) -> None:
        heapq.heappush(self._heap, (sequence.request.rank, sequence))

    def first(self, unfinished: Container[int]) -> SequenceState | None:
        """The next one whose request id is among the unfinished."""
        while self._heap:
            sequence = self._heap[0][1]
            if sequence.request.request_id in unfinished:
                return sequence
            heapq.heappop(self._heap)
        return None

    def pop(self) -> None:
        """Take out what `first` gave."""
        heapq.heappop(self._heap)

    def keep(self, begun: Callable[[SequenceState], bool]) -> list[SequenceState]:
        """Take out all others, to be pushed again later. The cost grows with the queue."""
        fresh = [sequence for _, sequence in self._heap if not begun(sequence)]
        self._heap = [each for each in self._heap if begun(each[1])]
        heapq.heapify(self._heap)
        return fresh

    def one_ended(self, unfinished: Container[int]) -> None:
        """A request in here has ended. Drops such requests once they are the larger part."""
        self._ended += 1
        if self._ended > MANY_ENDED and 2 * self._ended > len(self._heap):
            self._heap = [each for each in self._heap if each[1].request.request_id in unfinished]
            heapq.heapify(self._heap)
            self._ended = 0
