"""A plan says that decodes go on only where the device still has their rows and positions."""

from __future__ import annotations

import numpy as np
import pytest

from gapless.config import SchedulerLimits
from gapless.outcome import Sampled
from gapless.params import SamplingParams
from gapless.plan import Plan
from gapless.request import Request
from gapless.scheduler import Scheduler

LIMITS = SchedulerLimits(max_rows=3, max_batch_tokens=20, max_model_len=16, block_size=2, num_blocks=9)


def request(number: int, prompt: int) -> Request:
    params = SamplingParams(temperature=0, ignore_eos=True)
    tokens = np.full(prompt, number, dtype=np.int32)
    return Request(number, tokens, params, 16, np.zeros(0, dtype=np.int32), 0)


def planned(scheduler: Scheduler) -> Plan:
    plan = scheduler.plan()
    assert plan is not None
    return plan


def commit(scheduler: Scheduler, plan: Plan) -> None:
    scheduler.commit(plan, Sampled(np.ones(plan.num_samples, dtype=np.int32)))


@pytest.fixture
def scheduler() -> Scheduler:
    """With three requests, whose prompts run in one step."""
    scheduler = Scheduler(LIMITS)
    for number, prompt in enumerate((3, 4, 3)):
        scheduler.add(request(number, prompt))
    return scheduler


def test_decodes_do_not_go_on_where_a_row_sat_out_between(scheduler: Scheduler):
    first, second = planned(scheduler), planned(scheduler)
    scheduler.cancel(2)  # its blocks come back once the second step has retired
    assert planned(scheduler).rows_E.size == 2
    alone = planned(scheduler)
    assert (alone.rows_E.size, alone.continues) == (1, False)
    commit(scheduler, first)
    commit(scheduler, second)
    both = planned(scheduler)
    assert (both.rows_E.size, both.continues) == (2, False)
    assert planned(scheduler).continues


def test_decodes_go_on_from_their_second_step_to_the_next_change():
    scheduler = Scheduler(LIMITS)
    scheduler.add(request(0, 3))
    assert [planned(scheduler).continues for _ in range(4)] == [False, False, True, True]
    scheduler.add(request(1, 3))
    assert [planned(scheduler).continues for _ in range(3)] == [False, False, True]
