"""Random runs of an engine: arrivals, lengths, stops, cancels and preemptions, decided by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from gapless.config import EngineConfig
from gapless.device.base import Device
from gapless.request import FinishReason, Request
from support.harness import Harness
from support.hash_model import VOCAB, expected_tokens
from support.sim.schedule import PRIORITIES, SALTS, random_params

MAX_LENGTH = 48


def tiny_config(lookahead: int, rng: random.Random) -> EngineConfig:
    """Few rows, few blocks, a small budget: reuse, chunking and preemption happen at once."""
    rows = rng.choice([1, 2, 3, 5])
    return EngineConfig(
        lookahead=lookahead,
        max_rows=rows,
        max_batch_tokens=rows + rng.choice([0, 1, 3, 20]),
        block_size=rng.choice([1, 2, 4]),
        num_blocks=rng.choice([48, 64, 100]),
        max_model_len=MAX_LENGTH,
        device="cpu",
        seed=7,
    )


def alone(request: Request, block_size: int) -> list[int]:
    """The request on an engine of its own, synchronous."""
    config = EngineConfig(
        lookahead=0,
        max_rows=1,
        max_batch_tokens=64,
        block_size=block_size,
        num_blocks=64,
        max_model_len=MAX_LENGTH,
        device="cpu",
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


def shared_prompt(rng: random.Random, earlier: list[Request], engine: Harness) -> tuple[list[int], str]:
    """A prompt and its salt. Half of them begin like an earlier prompt, and go on like its answer, as far as it is."""
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 15, 30]))]
    if not earlier or rng.random() < 0.5:
        return prompt, rng.choice(SALTS)
    other = rng.choice(earlier)
    tokens = [*other.prompt.tolist(), *engine.tokens[other.request_id]]
    begin = tokens[: rng.choice([len(tokens), rng.randrange(1, len(tokens) + 1)])]
    most = rng.randrange(min(len(begin), MAX_LENGTH - 1), MAX_LENGTH)
    return [*begin, *prompt][:most], other.salt.decode()


def run_schedule(
    seed: int,
    lookahead: int,
    device: Device | None = None,
    build: Callable[[EngineConfig], Harness] | None = None,
) -> tuple[Schedule, Harness]:
    """Run one schedule to its end, checking the books after every step. `build` makes the engine of a config."""
    rng = random.Random(seed)
    schedule = Schedule()
    config = tiny_config(lookahead, rng)
    with build(config) if build else Harness(config, device=device) as engine:
        left = rng.randrange(3, 12)
        while left or engine.loop.has_work:
            if left and (rng.random() < 0.4 or not engine.loop.has_work):
                prompt, salt = shared_prompt(rng, schedule.requests, engine)
                request = engine.add(prompt, random_params(rng), priority=rng.choice(PRIORITIES), salt=salt)
                schedule.requests.append(request)
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


def check_schedule(schedule: Schedule, engine: Harness) -> None:
    """Every request got the tokens that it gets alone, or a beginning of them if it was cancelled."""
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
