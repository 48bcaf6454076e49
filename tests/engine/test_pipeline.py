"""The oracle: whatever else happens, every request gets the tokens that it gets alone."""

from __future__ import annotations

import pytest

from gapless.config import EngineConfig
from gapless.device.cpu import CpuDevice
from gapless.params import SamplingParams
from support.effort import effort
from support.harness import Harness
from support.hash_model import EOS, VOCAB, expected_tokens
from support.schedules import check_schedule, run_schedule

LOOKAHEADS = [0, 1, 2, 3]


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("seed", range(effort(16, 40)))
def test_every_request_gets_the_tokens_that_it_gets_alone(seed: int, lookahead: int):
    # every other schedule pads its decode steps to buckets, as captured graphs do
    check_schedule(*run_schedule(seed, lookahead, CpuDevice(captures_graphs=seed % 2 == 1)))


def test_the_random_schedules_do_preempt_cancel_and_overshoot():
    totals = {"preempted": 0, "cancelled": 0, "overshoot": 0, "recomputed": 0}
    for seed in range(60):
        schedule, engine = run_schedule(seed, lookahead=2)
        totals["preempted"] += engine.scheduler.stats.preemptions
        totals["cancelled"] += len(schedule.cancelled)
        totals["overshoot"] += engine.scheduler.stats.overshoot_rows
        totals["recomputed"] += engine.scheduler.stats.recomputed_tokens
    assert min(totals.values()) > 20, totals


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_an_end_by_length_never_overshoots(lookahead: int):
    with Harness(EngineConfig(lookahead=lookahead, max_rows=4, device="cpu", num_blocks=64)) as engine:
        for size in (1, 3, 9):
            engine.add([5] * size, SamplingParams(temperature=0, max_tokens=size + 2, ignore_eos=True))
        engine.run()
        stats = engine.scheduler.stats
        assert stats.overshoot_rows == 0
        assert stats.generated_tokens == 3 + 5 + 11


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_a_stop_costs_at_most_lookahead_discarded_rows(lookahead: int):
    with Harness(EngineConfig(lookahead=lookahead, max_rows=4, device="cpu", num_blocks=64)) as engine:
        prompt = next([n, 7] for n in range(VOCAB) if EOS in expected_tokens([n, 7], 40, [EOS]))
        request = engine.add(prompt, SamplingParams(temperature=0, max_tokens=90))
        engine.run()
        assert engine.tokens[request.request_id][-1] == EOS
        assert engine.scheduler.stats.overshoot_rows == lookahead


def test_repeated_preemption_does_not_multiply_the_work():
    config = EngineConfig(
        lookahead=1, max_rows=8, max_batch_tokens=64, block_size=1, num_blocks=60, max_model_len=60, device="cpu"
    )
    with Harness(config) as engine:
        for number in range(20):
            engine.add([number] * 6, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        engine.run()
        stats = engine.scheduler.stats
        assert stats.preemptions > 0
        assert stats.recomputed_tokens < stats.prompt_tokens + stats.generated_tokens


def test_cancelled_requests_do_not_pile_up_in_the_queue():
    with Harness(EngineConfig(max_rows=1, num_blocks=64, device="cpu")) as engine:
        engine.add([1], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
        for _ in range(40):
            waiting = [engine.add([2], SamplingParams(max_tokens=1)) for _ in range(50)]
            for request in waiting:
                engine.cancel(request.request_id)
        assert engine.scheduler.queue_length < 200
        last = engine.add([3], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        engine.run()
        assert engine.tokens[last.request_id] == expected_tokens([3], 6, [])


def test_the_oldest_request_progresses_when_blocks_run_out():
    config = EngineConfig(
        lookahead=1, max_rows=4, max_batch_tokens=64, block_size=1, num_blocks=40, max_model_len=40, device="cpu"
    )
    with Harness(config) as engine:
        requests = [
            engine.add([n] * 8, SamplingParams(temperature=0, max_tokens=31, ignore_eos=True)) for n in range(4)
        ]
        engine.run()
        order = list(engine.finished)
        assert order[0] == requests[0].request_id
        assert engine.scheduler.stats.preemptions > 0
        for request in requests:
            assert engine.tokens[request.request_id] == expected_tokens(request.prompt.tolist(), 39, [])
