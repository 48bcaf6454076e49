"""PROPERTIES 5, 7, 8 and 9: rows, blocks and slots come back once, late enough, and always."""

from __future__ import annotations

import dataclasses

import pytest

from gapless.config import EngineConfig
from gapless.params import SamplingParams
from gapless.request import FinishReason
from support.effort import effort
from support.harness import Harness
from support.hash_model import EOS, VOCAB, expected_tokens
from support.sim.rig import Result, run
from support.sim.schedule import Move, Schedule

LOOKAHEADS = range(5)
BASE = Schedule(
    lookahead=0,
    rows=2,
    batch_tokens=4,
    block_size=2,
    blocks=12,
    max_length=16,
    graphs=False,
    order_seed=11,
    eagerness=None,
    reader_lag=0,
    moves=(),
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
STOPPING = next(n for n in range(VOCAB) if EOS in expected_tokens([n, 7], 12, [EOS])[2:8])  # its 3rd to 8th token


def with_cancel(lookahead: int, params: SamplingParams, point: int) -> Result:
    """Two requests side by side, the first cancelled at this phase boundary."""
    moves = (
        Move(0, "add", prompt=(STOPPING, 7), params=params),
        Move(0, "add", prompt=(5, 6, 8), params=GREEDY),
        Move(point, "cancel", 0),
    )
    return run(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.0, max_tokens=12)], ids=["length", "stop"])
@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_a_cancel_at_any_phase_boundary_frees_once_and_gives_one_end(lookahead: int, params: SamplingParams):
    """Also at those where the request ends by itself, or where its row in flight completes a block: conservation and
    the count of ends are checked by every run."""
    reasons: set[FinishReason] = set()
    for point in range(0, 130, effort(3, 1)):
        result = with_cancel(lookahead, params, point)
        assert result.violation is None, (point, result.violation)
        assert len(result.finished) == 2
        reasons.add(result.finished[0].reason)
    ending = FinishReason.LENGTH if params is GREEDY else FinishReason.STOP
    assert reasons == {FinishReason.CANCELLED, ending}


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_rows_and_blocks_are_reused_at_once_but_not_before_their_last_step_has_retired(lookahead: int):
    """One row and just enough blocks, so that every request takes over what the one before it had. What is released is
    filled with rubbish, as a write that the checker sees."""
    moves = tuple(Move(0, "add", prompt=(n, n + 1), params=SamplingParams(seed=n, max_tokens=9)) for n in range(8))
    for seed in range(10):
        tight = dataclasses.replace(BASE, lookahead=lookahead, rows=1, batch_tokens=1, blocks=8, order_seed=seed)
        result = run(dataclasses.replace(tight, moves=moves))
        assert result.violation is None, (seed, result.violation)
        assert len(result.finished) == 8


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_blocks_that_come_back_late_do_not_make_everybody_be_preempted(lookahead: int):
    """More rows than the cache can hold at full length: preemption must stay an exception, whatever is in flight."""
    config = EngineConfig(
        lookahead=lookahead, max_rows=8, max_batch_tokens=64, block_size=1, num_blocks=60, max_model_len=60
    )
    with Harness(config) as engine:
        for number in range(20):
            engine.add([number] * 6, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        engine.run()
        stats = engine.scheduler.stats
        assert stats.generated_tokens == 20 * 30
        assert 0 < stats.preemptions < 2 * 20
        assert stats.recomputed_tokens < stats.prompt_tokens + stats.generated_tokens


def test_a_cancelled_request_gets_its_end_wherever_it_is():
    """Waiting, running and preempted."""
    config = EngineConfig(lookahead=2, max_rows=1, max_batch_tokens=8, num_blocks=20, block_size=4)
    with Harness(config) as engine:
        running, preempted, waiting = (engine.add([n] * 3, SamplingParams(max_tokens=20)) for n in (1, 2, 3))
        engine.cancel(waiting.request_id)
        for _ in range(4):
            engine.step()
        assert engine.scheduler.preempt(running.request_id)
        engine.cancel(running.request_id)
        while preempted.request_id in engine.scheduler.requests_without_row():
            engine.step()
        engine.scheduler.preempt(preempted.request_id)
        for _ in range(3):
            engine.step()
        engine.cancel(preempted.request_id)
        engine.run()
        assert [engine.reason(each) for each in (running, preempted, waiting)] == [FinishReason.CANCELLED] * 3
