"""Work between steps: single cases beside the schedules, which have it at any moment."""

from __future__ import annotations

from typing import get_args

import pytest

from gapless.engine.core import InFlight
from gapless.params import SamplingParams
from support.sim.rig import Result, run
from support.sim.schedule import Kind, Move, Schedule

LONG = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
SHARED = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, n=3)


def ran(*moves: Move, lookahead: int = 2) -> Result:
    schedule = Schedule(
        lookahead=lookahead,
        rows=2,
        batch_tokens=8,
        block_size=4,
        blocks=30,
        max_length=40,
        graphs=True,
        order_seed=1,
        eagerness=None,
        reader_lag=1,
        moves=moves,
    )
    result = run(schedule)
    assert result.violation is None, result.violation
    return result


def weights(result: Result) -> list[set[int]]:
    """Of each answer, in the order of arrival: those that its tokens come from."""
    return [{key for _, key in result.moves[request.request_id].weights} for request in result.requests]


@pytest.mark.parametrize("size", [1, 6])
def test_n_answers_that_have_not_begun_wait_for_an_update_together(size: int):
    """A prompt of less than a block is nothing that the others could wait for: they are queued at once."""
    update = Move(0, "update", in_flight="finish")
    late = ran(Move(0, "add", prompt=(5,) * size, params=SHARED), update)
    assert weights(late) == [{1}, {1}, {1}]
    begun = ran(Move(0, "add", prompt=(5,) * size, params=SHARED), Move(30, "update", in_flight="finish"))
    assert weights(begun) == [{0}, {0}, {0}]


@pytest.mark.parametrize("in_flight", get_args(InFlight))
def test_what_has_begun_is_treated_as_asked(in_flight: InFlight):
    adds = [Move(0, "add", prompt=(number, 7), params=LONG) for number in range(3)]
    result = ran(*adds, Move(60, "update", in_flight=in_flight))
    wanted: dict[InFlight, list[set[int]]] = {
        "finish": [{0}, {0}, {1}],
        "continue": [{0, 1}, {0, 1}, {1}],
        "restart": [{1}, {1}, {1}],
    }
    assert weights(result) == wanted[in_flight]
    assert result.restarted == (2 if in_flight == "restart" else 0)


@pytest.mark.parametrize(("kind", "end"), [("pause", "resume"), ("sleep", "wake")])
def test_a_pause_changes_no_token_and_those_who_come_meanwhile_wait(kind: Kind, end: Kind):
    adds = [Move(0, "add", prompt=(number, 7), params=LONG) for number in range(2)]
    late = Move(70, "add", prompt=(9,), params=LONG)
    held = ran(*adds, Move(60, kind), late, Move(90, end))
    assert held.commands == {kind: 1, end: 1}
    assert held.tokens == ran(*adds, late).tokens
