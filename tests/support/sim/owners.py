"""What the rig knows of requests and KV blocks by itself: from the moves and the plans, not from the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from gapless.config import SchedulerLimits
from gapless.plan import Plan
from gapless.request import PRIORITY_ARRIVALS
from support.sim.findings import Broken
from support.sim.schedule import Move


class Shared(NamedTuple):
    """Blocks that a row began with.

    again   the request had a row before
    whole   they are all but the last, which has the last token
    answer  some hold what was generated for the request that filled them
    """

    request_id: int
    again: bool
    whole: bool
    answer: bool


class Owners:
    """Each request's move and rank, where its first row began, and whose block each KV block is.

    expected  what each request must get; None: nobody knows.
    """

    def __init__(self, limits: SchedulerLimits, expected: Callable[[Move, SchedulerLimits], list[int]] | None) -> None:
        self.moves: dict[int, Move] = {}
        self.ranks: dict[int, tuple[int, int]] = {}
        self.begins: dict[int, int] = {}  # cached tokens of the prompt, by request
        self.shared: list[Shared] = []  # rows that began with blocks of others, or with their own
        self._limits = limits
        self._expected = expected
        self._holds: dict[int, tuple[int, int]] = {}  # by KV block: a request, and which of its blocks
        self._tokens = cache(self._all_tokens)

    def add(self, request_id: int, move: Move) -> None:
        """A step of priority counts as PRIORITY_ARRIVALS arrivals; at equal counts the more urgent one comes first."""
        self.moves[request_id] = move
        self.ranks[request_id] = (request_id + move.priority * PRIORITY_ARRIVALS, move.priority)

    def first(self, request_ids: Sequence[int] | set[int]) -> int:
        """Of these, the one that is served before the others."""
        return min(request_ids, key=self.ranks.__getitem__)

    def last(self, request_ids: Sequence[int] | set[int]) -> int:
        """Of these, the one that is served after the others."""
        return max(request_ids, key=self.ranks.__getitem__)

    def book(self, plan: Plan, row_requests: Sequence[int]) -> None:
        """Blocks that rows gain in this plan, and where new rows begin."""
        gained = zip(plan.block_rows_U.tolist(), plan.block_columns_U.tolist(), plan.block_ids_U.tolist(), strict=True)
        for row, column, block in gained:
            self._holds[block] = (row_requests[row], column)
        for row, start in zip(plan.rows_E.tolist(), plan.starts_E.tolist(), strict=True):
            self.begins.setdefault(row_requests[row], start)

    def check_shared(self, request_id: int, tokens: int, blocks: Sequence[int]) -> None:
        """A row of so many tokens begins with these blocks: each holds what it would compute, under equal salt."""
        salt, answer = self.moves[request_id].salt, False
        for index, block in enumerate(blocks):
            if block not in self._holds:
                raise Broken("books", f"request {request_id} shares block {block}, which no row had")
            owner, place = self._holds[block]
            if self.moves[owner].salt != salt:
                raise Broken("books", f"request {request_id} shares block {block} across salts, with request {owner}")
            end = (index + 1) * self._limits.block_size
            if place != index or (
                self._expected is not None and self._tokens(owner)[:end] != self._tokens(request_id)[:end]
            ):
                raise Broken(
                    "books",
                    f"request {request_id} shares block {block} as its block {index}: it is block {place} of "
                    f"request {owner}, which has other tokens",
                )
            answer |= end > len(self.moves[owner].prompt)
        if blocks:
            whole = len(blocks) == (tokens - 1) // self._limits.block_size
            self.shared.append(Shared(request_id, request_id in self.begins, whole, answer))

    def _all_tokens(self, request_id: int) -> tuple[int, ...]:
        assert self._expected is not None
        move = self.moves[request_id]
        return (*move.prompt, *self._expected(move, self._limits))
