"""Nobody holds up the others: long prompts come in pieces beside those who decode, and nobody waits for ever."""

from __future__ import annotations

import dataclasses

import pytest

from gapless.params import SamplingParams
from gapless.request import MAX_PRIORITY, PRIORITY_ARRIVALS
from support.sim.fed import run_fed
from support.sim.schedule import Move, Schedule

BASE = Schedule(
    lookahead=0,
    rows=4,
    batch_tokens=8,
    block_size=2,
    blocks=80,
    max_length=40,
    graphs=False,
    order_seed=5,
    eagerness=None,
    reader_lag=0,
    moves=(),
)
LONG = SamplingParams(temperature=0.0, max_tokens=36, ignore_eos=True)
SHORT = dataclasses.replace(LONG, max_tokens=2)


@pytest.mark.parametrize("lookahead", range(5))
@pytest.mark.parametrize("priority", [-MAX_PRIORITY, 0])
def test_a_long_prompt_stops_nobody_who_decodes_and_its_steps_stay_within_the_budget(lookahead: int, priority: int):
    """However urgent it is, and though another one waits behind it: who decodes gets a token in every step."""
    decoding = tuple(Move(0, "add", prompt=(n, n), params=LONG) for n in range(2))
    prompts = tuple(Move(60, "add", prompt=(n,) * 38, params=SHORT, priority=priority) for n in range(9, 13))
    result, scheduler = run_fed(dataclasses.replace(BASE, lookahead=lookahead, moves=(*decoding, *prompts)))
    assert len(result.finished) == 6
    assert all(step.decoding <= step.counts.keys() for step in scheduler.steps)
    assert max(sum(step.counts.values()) for step in scheduler.steps) == BASE.batch_tokens
    beside = [step for step in scheduler.steps if {0, 1} <= step.decoding and max(step.counts.values()) > 1]
    assert len(beside) > 10


@pytest.mark.parametrize("lookahead", range(3))
@pytest.mark.parametrize("priority", [1, 2, MAX_PRIORITY])
def test_the_least_urgent_request_is_served_though_urgent_ones_keep_coming(lookahead: int, priority: int):
    """One row, and always urgent requests that wait, ten for each time that the least urgent one gains on them."""
    ahead = 2 * priority * PRIORITY_ARRIVALS  # it is overtaken by so many arrivals at most
    urgent = Move(0, "add", prompt=(1, 2), params=SHORT, priority=-priority, arrivals=ahead // 10 - 1)
    last = Move(0, "add", prompt=(3, 4), params=SHORT, priority=priority)
    one_row = dataclasses.replace(BASE, lookahead=lookahead, rows=1, moves=(last, *[urgent] * 14))
    result, scheduler = run_fed(one_row)
    order = list(result.finished)
    assert order.index(0) == 10
    assert order[:10] == [ahead // 10 * number for number in range(1, 11)]
    served = next(step for step in scheduler.steps if 0 in step.counts)
    assert len(served.waiting) == 4
