"""PROPERTIES 10 to 12: a preempted sequence loses and repeats nothing, and comes to its end."""

from __future__ import annotations

import dataclasses

import pytest

from gapless.params import SamplingParams
from support.effort import effort
from support.sim.rig import run
from support.sim.schedule import Move, Schedule, generate

LOOKAHEADS = range(5)
BASE = Schedule(
    lookahead=0,
    rows=2,
    batch_tokens=3,
    block_size=2,
    blocks=12,
    max_length=16,
    graphs=False,
    order_seed=5,
    eagerness=None,
    reader_lag=0,
    moves=(),
)
PARAMS = SamplingParams(temperature=1.0, seed=9, max_tokens=8, ignore_eos=True)
ADDS = (
    Move(0, "add", prompt=(3, 1, 4, 1), params=PARAMS),
    Move(0, "add", prompt=(5, 9), params=dataclasses.replace(PARAMS, seed=8)),
)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_preempted_at_any_phase_boundary_the_tokens_are_those_of_the_undisturbed_run(lookahead: int):
    preemptions = 0
    for point in range(0, 130, effort(3, 1)):
        moves = (*ADDS, Move(point, "preempt", 0), Move(point + 1, "preempt", 1))
        result = run(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
        assert result.violation is None, (point, result.violation)
        preemptions += result.preemptions
    assert preemptions > effort(20, 60)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_grammar_and_penalty_state_survive_preemption_at_any_phase_boundary(lookahead: int):
    """Both hang on every token so far: on which of them the form was told, and which were counted."""
    penalised = dataclasses.replace(PARAMS, repetition_penalty=2.0, frequency_penalty=1.5)
    adds = (
        dataclasses.replace(ADDS[0], params=penalised, form=(5, -1, -1)),
        dataclasses.replace(ADDS[1], params=penalised, form=(6, 5, -1)),
    )
    preemptions = 0
    for point in range(0, 150, 6):
        moves = (*adds, Move(point, "preempt", 0), Move(point + 1, "preempt", 1))
        result = run(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
        assert result.violation is None, (point, result.violation)
        assert result.masked_steps > 7
        preemptions += result.preemptions
    assert preemptions > 10


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_preempted_again_and_again_it_still_ends_with_the_same_tokens(lookahead: int):
    moves = (*ADDS, *(Move(12 * turn, "preempt", turn % 2) for turn in range(1, 30)))
    for seed in range(10):
        result = run(dataclasses.replace(BASE, lookahead=lookahead, order_seed=seed, moves=moves))
        assert result.violation is None, (seed, result.violation)


def test_the_count_of_placeholders_is_never_negative_and_returns_to_zero():
    """check_integrity compares it with the steps in flight after every step of these runs, and a run ends with none."""
    seen = 0
    for seed in range(effort(30, 60)):
        result = run(generate(seed))
        assert result.violation is None, (seed, result.violation)
        seen += result.most_placeholders
    assert seen > effort(30, 60)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_the_oldest_request_always_makes_progress(lookahead: int):
    """Six requests in a cache that holds little more than one: they end in the order in which they came."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    moves = tuple(Move(0, "add", prompt=(n, n, n), params=params) for n in range(6))
    tight = dataclasses.replace(BASE, lookahead=lookahead, rows=4, batch_tokens=6, block_size=1, blocks=17)
    result = run(dataclasses.replace(tight, moves=moves))
    assert result.violation is None, result.violation
    assert list(result.finished) == sorted(result.finished)
    assert result.exhausted > 0
    assert result.steps < 6 * 12 * 3
