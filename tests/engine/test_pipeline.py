"""The oracle: whatever else happens, every request gets the tokens that it gets alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from support.harness import Harness
from support.hash_model import EOS, VOCAB, expected_tokens

from gapless.config import EngineConfig
from gapless.request import FinishReason, Request, SamplingParams

LOOKAHEADS = [0, 1, 2, 3]


def tiny_config(lookahead: int, rng: random.Random) -> EngineConfig:
    """Few rows, few blocks, a small budget: reuse, chunking and preemption happen at once."""
    rows = rng.choice([1, 2, 3, 5])
    return EngineConfig(
        lookahead=lookahead,
        max_rows=rows,
        max_batch_tokens=rows + rng.choice([0, 1, 3, 20]),
        block_size=rng.choice([1, 2, 4]),
        num_blocks=rng.choice([48, 64, 100]),
        max_model_len=48,
        device="cpu",
        seed=7,
    )


def random_params(rng: random.Random) -> SamplingParams:
    greedy = rng.random() < 0.5
    return SamplingParams(
        temperature=0.0 if greedy else rng.choice([0.3, 1.0, 2.0]),
        top_k=0 if greedy else rng.choice([0, 3, 20]),
        top_p=1.0 if greedy else rng.choice([1.0, 0.7]),
        min_p=0.0 if greedy else rng.choice([0.0, 0.05]),
        seed=rng.randrange(2**64),
        max_tokens=rng.choice([1, 2, 5, 17, 40]),
        stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 6]))),
        ignore_eos=rng.random() < 0.3,
    )


def alone(request: Request, block_size: int) -> list[int]:
    """The request on an engine of its own, synchronous."""
    config = EngineConfig(
        lookahead=0, max_rows=1, max_batch_tokens=64, block_size=block_size, num_blocks=64, max_model_len=48, device="cpu"
    )
    with Harness(config) as engine:
        again = engine.add(request.prompt.tolist(), request.params)
        engine.run()
        return engine.tokens[again.request_id]


@dataclass
class Schedule:
    """One random run: what was asked, and what was cancelled when."""

    requests: list[Request] = field(default_factory=list[Request])
    cancelled: set[int] = field(default_factory=set[int])
    preemptions: int = 0


def run_schedule(seed: int, lookahead: int) -> tuple[Schedule, Harness]:
    rng = random.Random(seed)
    schedule = Schedule()
    with Harness(tiny_config(lookahead, rng)) as engine:
        left = rng.randrange(3, 12)
        while left or engine.loop.has_work:
            if left and (rng.random() < 0.4 or not engine.loop.has_work):
                prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 15, 30]))]
                schedule.requests.append(engine.add(prompt, random_params(rng)))
                left -= 1
            if schedule.requests and rng.random() < 0.05:
                victim = rng.choice(schedule.requests).request_id
                if victim not in engine.finished:
                    schedule.cancelled.add(victim)
                    engine.cancel(victim)
            if schedule.requests and rng.random() < 0.08:
                schedule.preemptions += engine.scheduler.preempt(rng.choice(schedule.requests).request_id)
            if engine.loop.has_work:
                engine.step()
        engine.run()
    return schedule, engine


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("seed", range(60))
def test_every_request_gets_the_tokens_that_it_gets_alone(seed: int, lookahead: int):
    schedule, engine = run_schedule(seed, lookahead)
    for request in schedule.requests:
        got = engine.tokens[request.request_id]
        end = engine.finished[request.request_id]
        want = alone(request, block_size=4)
        if request.params.greedy:
            assert want == expected_tokens(request.prompt.tolist(), request.max_length, request.stop_ids.tolist())
        if request.request_id in schedule.cancelled:
            assert end.reason is FinishReason.CANCELLED
            assert got == want[: len(got)]
        else:
            assert got == want
            stopped = got[-1] in request.stop_ids
            assert end.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


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
