"""The order of service: ranks are unique and nobody waits for ever; the queue follows them and stays cheap."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gapless.params import SamplingParams
from gapless.request import MAX_PRIORITY, PRIORITY_ARRIVALS, Request
from gapless.waiting import SequenceState, WaitingQueue

PARAMS = SamplingParams()
PROMPT = np.zeros(1, dtype=np.int32)
PRIORITIES = st.integers(-MAX_PRIORITY, MAX_PRIORITY)
MOST_OVERTAKEN = 2 * MAX_PRIORITY * PRIORITY_ARRIVALS


def request(request_id: int, priority: int = 0) -> Request:
    return Request(request_id, PROMPT, PARAMS, max_length=2, stop_ids=PROMPT, seed=0, priority=priority)


def sequence(request_id: int, priority: int = 0) -> SequenceState:
    return SequenceState(request(request_id, priority), PROMPT)


def drained(queue: WaitingQueue, unfinished: set[int]) -> list[int]:
    """Ids in the order in which they come up."""
    order: list[int] = []
    while (first := queue.first(unfinished)) is not None:
        queue.pop()
        order.append(first.request.request_id)
    return order


@given(st.integers(0, 2**40), PRIORITIES, st.integers(0, 2 * MOST_OVERTAKEN), PRIORITIES)
def test_ranks_are_unique_and_go_by_arrival_and_priority(first: int, one: int, later: int, other: int):
    a, b = request(first, one), request(first + later, other)
    if later:
        assert a.rank != b.rank
        counted = (first + PRIORITY_ARRIVALS * one, one), (first + later + PRIORITY_ARRIVALS * other, other)
        assert (a.rank < b.rank) == (counted[0] < counted[1])
    if one == other:
        assert a.rank <= b.rank
    assert np.int64(b.rank) == b.rank


@given(st.integers(0, 2**40))
def test_the_least_urgent_request_is_overtaken_by_no_more_than_two_million_later_ones(first: int):
    """Those that are as urgent as can be: 2 x 1000 steps of priority, each of 1000 arrivals."""
    last = request(first, MAX_PRIORITY)
    assert MOST_OVERTAKEN == 2_000_000
    assert request(first + MOST_OVERTAKEN, -MAX_PRIORITY).rank < last.rank
    assert request(first + MOST_OVERTAKEN + 1, -MAX_PRIORITY).rank > last.rank


@given(st.lists(st.tuples(PRIORITIES, st.booleans()), max_size=40), st.integers(0, 2**32 - 1))
def test_the_queue_gives_those_that_have_not_ended_in_the_order_of_their_ranks(
    entries: list[tuple[int, bool]], seed: int
):
    sequences = [sequence(number, priority) for number, (priority, _) in enumerate(entries)]
    unfinished = {number for number, (_, ended) in enumerate(entries) if not ended}
    random.Random(seed).shuffle(sequences)
    queue = WaitingQueue()
    for each in sequences:
        queue.push(each)
    ranks = {each.request.request_id: each.request.rank for each in sequences}
    assert drained(queue, unfinished) == sorted(unfinished, key=ranks.__getitem__)
    assert len(queue) == 0


def test_looking_at_the_first_takes_nothing_out_and_one_that_comes_back_keeps_its_place():
    queue, sequences = WaitingQueue(), [sequence(number) for number in range(3)]
    for each in sequences:
        queue.push(each)
    assert queue.first({0, 1, 2}) is queue.first({0, 1, 2}) is sequences[0]
    queue.pop()
    queue.push(sequences[0])
    assert drained(queue, {0, 1, 2}) == [0, 1, 2]


class Counted(set[int]):
    """A set that counts how often it is asked."""

    asked = 0

    def __contains__(self, item: object) -> bool:
        self.asked += 1
        return super().__contains__(item)


def work_to_cancel(count: int) -> tuple[int, int]:
    """Look-ups when so many waiting requests are cancelled one by one, those in front being looked at; and entries
    that are left."""
    queue, unfinished = WaitingQueue(), Counted(range(count))
    for number in range(count):
        queue.push(sequence(number))
    order = list(range(count))
    random.Random(1).shuffle(order)
    for request_id in order:
        unfinished.discard(request_id)
        queue.one_ended(unfinished)
        queue.first(unfinished)
    return unfinished.asked, len(queue)


def test_a_hundred_thousand_cancels_cost_no_more_than_a_few_look_ups_each():
    asked, left = work_to_cancel(100_000)
    assert asked < 6 * 100_000
    assert left == 0


def test_ended_requests_are_dropped_once_they_are_the_larger_part_of_a_long_queue():
    queue, unfinished = WaitingQueue(), set(range(1000))
    for number in range(1000):
        queue.push(sequence(number))
    for request_id in range(999, 400, -1):
        unfinished.discard(request_id)
        queue.one_ended(unfinished)
        assert len(unfinished) <= len(queue) <= max(2 * len(unfinished) + 2, 1000 - 499)
    assert drained(queue, unfinished) == sorted(unfinished)
