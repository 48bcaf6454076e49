"""What the rig knows of requests and KV blocks by itself: from the moves and the plans, not from the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from gapless.config import SchedulerLimits
from gapless.engine.core import InFlight
from gapless.plan import Plan
from gapless.request import PRIORITY_ARRIVALS
from support.sim.findings import Broken
from support.sim.oracle import Weights
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

    Moves say which weights each token must come from, and `prompt_weights` which the log probabilities of prompts.

    expected  what each request must get; None: nobody knows.
    """

    def __init__(self, limits: SchedulerLimits, expected: Callable[[Move, SchedulerLimits], list[int]] | None) -> None:
        self.moves: dict[int, Move] = {}
        self.ranks: dict[int, tuple[int, int]] = {}
        self.leaders: dict[int, int] = {}
        self.prompt_weights: dict[int, Weights] = {}
        self.begins: dict[int, int] = {}  # cached tokens of the prompt, by request
        self.shared: list[Shared] = []  # rows that began with blocks of others, or with their own
        self._limits = limits
        self._expected = expected
        self._holds: dict[int, tuple[int, int]] = {}  # by KV block: a request, and which of its blocks
        self._weights = 0
        self._tokens = cache(self._all_tokens)

    def add(self, request_id: int, move: Move, leader: int) -> None:
        """A step of priority counts as PRIORITY_ARRIVALS arrivals; at equal counts the more urgent one comes first."""
        self.moves[request_id] = replace(move, weights=((0, self._weights),))
        self.prompt_weights[request_id] = ((0, self._weights),)
        self.leaders[request_id] = leader
        self.ranks[request_id] = (request_id + move.priority * PRIORITY_ARRIVALS, move.priority)

    def has_begun(self, request_id: int) -> bool:
        """It, or the one whose prompt it shares, has had a row."""
        return request_id in self.begins or self.leaders[request_id] in self.begins

    def update(self, key: int, in_flight: InFlight, known: Mapping[int, tuple[int, int]]) -> None:
        """These requests go on with other weights: `known` has how much of answers and prompts came from the old."""
        self._weights = key
        for request_id, (tokens, scored) in known.items():
            move = self.moves[request_id]
            if in_flight == "finish" and self.has_begun(request_id):
                raise Broken("books", f"request {request_id} goes on with other weights than it began with")
            if in_flight == "restart":
                tokens = scored = 0
            self.moves[request_id] = replace(move, weights=_changed(move.weights, tokens, key))
            self.prompt_weights[request_id] = _changed(self.prompt_weights[request_id], scored, key)

    def forget_blocks(self) -> None:
        """Nobody may share what was computed up to now."""
        self._holds.clear()

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
                raise Broken("books", f"request {request_id} shares block {block}, which no row has filled")
            owner, place = self._holds[block]
            if self.moves[owner].salt != salt:
                raise Broken("books", f"request {request_id} shares block {block} across salts, with request {owner}")
            end = (index + 1) * self._limits.block_size
            if place != index or (
                self._expected is not None and self._all_of(owner)[:end] != self._all_of(request_id)[:end]
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

    def _all_of(self, request_id: int) -> tuple[int, ...]:
        return self._tokens(request_id, self.moves[request_id].weights)

    def _all_tokens(self, request_id: int, weights: Weights) -> tuple[int, ...]:
        assert self._expected is not None
        move = replace(self.moves[request_id], weights=weights)
        return (*move.prompt, *self._expected(move, self._limits))


def _changed(weights: Weights, place: int, key: int) -> Weights:
    """From this place on, others."""
    return (*(each for each in weights if each[0] < place), (place, key))
