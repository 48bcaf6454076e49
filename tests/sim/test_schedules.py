"""Thousands of schedules of the whole engine on the simulated device, each checked against the oracle.

A failing seed prints the command that replays it. `make race` runs many more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from gapless.request import FinishReason
from gapless.sampling.torch_sampler import TorchSampler
from support.hash_model import HashModel
from support.sim.model import answer
from support.sim.owners import Shared
from support.sim.parts import Parts
from support.sim.race import replay_command
from support.sim.rig import Result, run
from support.sim.schedule import SHORTAGES, Schedule, generate

CHUNKS, CHUNK = 40, 50
COVERAGE_SEEDS = 400
ALONE_SEEDS = 120
AUDIT_SEEDS = 60
USES = ("whole", "in part", "answer", "prompt")
BOUNDARIES = ("planned", "launch", "launched", "collect", "commit", "committed", "published", "between steps")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def explain(seed: int, result: Result) -> str:
    return f"seed {seed}: {result.violation}\n{replay_command(seed)}\n{result.device.timeline.text(40)}"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_whatever_happens_every_request_gets_what_it_gets_alone(chunk: int):
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        result = run(generate(seed))
        assert result.violation is None, explain(seed, result)


def test_the_schedules_meet_everything_that_they_are_there_for():
    met: Counter[str] = Counter()
    for seed in range(COVERAGE_SEEDS):
        schedule = generate(seed)
        result = run(schedule)
        reasons = Counter(end.reason for end in result.finished.values())
        met[f"lookahead {schedule.lookahead}"] += 1
        met["graphs"] += schedule.graphs
        met["late reader"] += schedule.reader_lag > 0
        met["audits"] += schedule.audit
        met["ends by length"] += reasons[FinishReason.LENGTH]
        met["ends by stop"] += reasons[FinishReason.STOP]
        met["cancels"] += reasons[FinishReason.CANCELLED]
        met["preemptions"] += result.preemptions
        adds = [move for move in schedule.moves if move.kind == "add"]
        met["priorities"] += any(move.priority for move in adds)
        met["salts"] += len({move.salt for move in adds}) > 1
        met.update(f"shared by {who} {what}" for each in result.shared for who, what in uses_of(each))
        met["exhaustion"] += result.exhausted
        met["overshoot"] += result.overshoot
        met.update(f"out of memory {place}" for place in result.device.failed_at)
        met.update(f"cancel at {name}" for name in cancelled_at(result) if name in BOUNDARIES)
    wanted = {f"lookahead {ahead}" for ahead in range(5)} | {f"cancel at {name}" for name in BOUNDARIES}
    wanted |= {f"out of memory {place}" for place in SHORTAGES}
    wanted |= {f"shared by {who} {what}" for who in ("a new one:", "a preempted one:") for what in USES}
    assert wanted <= set(met), wanted - set(met)
    assert met["shared by a new one: whole"] > COVERAGE_SEEDS // 5
    assert min(met.values()) > 3, met


def test_prompts_have_any_length_and_answers_any_or_no_limit():
    schedules = [generate(seed) for seed in range(CHUNKS * CHUNK)]
    adds = [(schedule.max_length, move) for schedule in schedules for move in schedule.moves if move.kind == "add"]
    lengths = {(limit, len(move.prompt)) for limit, move in adds}
    assert lengths == {(limit, length) for limit in (12, 24, 40) for length in range(1, limit)}
    assert {move.params.max_tokens for _, move in adds} == {None, *range(1, 41)}


def uses_of(shared: Shared) -> list[tuple[str, str]]:
    """Who shares, and what."""
    who = "a preempted one:" if shared.again else "a new one:"
    return [(who, "whole" if shared.whole else "in part"), (who, "answer" if shared.answer else "prompt")]


def cancelled_at(result: Result) -> set[str]:
    """The phase boundaries at which a cancel of this run came."""
    found: set[str] = set()
    before = ""
    for span in result.device.timeline.spans:
        if span.lane != "host":
            continue
        if span.name.startswith("cancel"):
            found.add(before)
        elif not span.name.startswith(("add", "preempt")):
            before = span.name
    return found


def alone(schedule: Schedule, number: int) -> Result:
    """One of a schedule's requests, alone on an engine at lookahead 0 that has room for everything."""
    adds = [move for move in schedule.moves if move.kind == "add"]
    return run(
        replace(
            schedule,
            lookahead=0,
            rows=1,
            batch_tokens=64,
            blocks=64,
            graphs=False,
            eagerness=1.0,
            reader_lag=0,
            moves=(replace(adds[number], point=0),),
        )
    )


def test_the_oracle_is_what_an_engine_gives_to_a_request_that_is_alone_at_lookahead_0():
    seen = 0
    for seed in range(ALONE_SEEDS):
        schedule = generate(seed)
        together = run(schedule)
        adds = [move for move in schedule.moves if move.kind == "add"]
        for number, (move, request) in enumerate(zip(adds, together.requests, strict=True)):
            single = alone(schedule, number)
            [(request_id, end)] = single.finished.items()
            assert single.violation is None, single.violation
            assert single.tokens[request_id] == answer(move, schedule.limits)
            end_together = together.finished[request.request_id]
            if end_together.reason is not FinishReason.CANCELLED:
                assert (end_together.reason, end_together.generated) == (end.reason, end.generated)
                assert together.tokens[request.request_id] == single.tokens[request_id]
            seen += 1
    assert seen > ALONE_SEEDS


def test_the_hash_model_in_torch_gives_the_same_answers():
    for seed in range(AUDIT_SEEDS):
        result = run(generate(seed), Parts(model=HashModel))
        assert result.violation is None, explain(seed, result)


def test_the_real_sampler_and_every_declaration_hold_while_all_else_is_rubbish():
    """Each stage runs with everything that it did not declare scrambled: see device/sim/frame.py.

    The tokens must be those of the same schedule without the audit, on the torch sampler and the torch hash model.
    """
    for seed in range(AUDIT_SEEDS):
        schedule = generate(seed)
        plain = run(schedule, Parts(model=HashModel, sampler=TorchSampler, expected=None))
        audited = run(schedule, Parts(model=HashModel, sampler=TorchSampler, expected=None, audit=True))
        assert plain.violation is None, explain(seed, plain)
        assert audited.violation is None, explain(seed, audited)
        assert audited.tokens == plain.tokens
