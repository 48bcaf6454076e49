"""Hundreds of schedules of the whole engine on the simulated device, each checked against the oracle.

A failing seed prints the command that replays it. `make race` runs many more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch

from gapless.engine.core import InFlight
from gapless.params import SamplingParams
from gapless.request import FinishReason
from gapless.sampling.torch_sampler import TorchSampler
from support.effort import effort
from support.sim.model import KeyedHashModel
from support.sim.oracle import answer, answer_of_the_real_sampler
from support.sim.owners import Shared
from support.sim.parts import Parts
from support.sim.race import replay_command
from support.sim.rig import Result, run
from support.sim.schedule import SHORTAGES, Move, Schedule, Shortage, generate

SEEDS = effort(180, 300)
GENERATED = 1500
ALONE_SEEDS = 20
AUDIT_SEEDS = 20
USES = ("whole", "in part", "answer", "prompt")
ASKED = {
    "n",
    "min_tokens",
    "stop_token_ids",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "logprobs",
    "prompt_logprobs",
    "processor_args",
    "endings",
    "form",
}
COMMANDS = ("pause", "resume", "update", "sleep", "wake")
BOUNDARIES = ("planned", "launch", "launched", "masks", "collect", "commit", "committed", "published", "between steps")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def explain(seed: int, result: Result) -> str:
    return f"seed {seed}: {result.violation}\n{replay_command(seed)}\n{result.device.timeline.text(40)}"


def test_whatever_happens_every_request_gets_what_it_gets_alone_and_all_of_it_happens():
    met: Counter[str] = Counter()
    short: set[Shortage] = set()
    for seed in range(SEEDS):
        schedule = generate(seed)
        result = run(schedule)
        assert result.violation is None, explain(seed, result)
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
        met["log probabilities of tokens"] += result.token_lines
        met["log probabilities of prompts"] += result.prompt_lines
        met["steps that wait for masks"] += result.masked_steps
        met["ends by a form that fails"] += reasons[FinishReason.ERROR]
        met["answers to one prompt"] += sum(request.leader >= 0 for request in result.requests)
        met["without a prefix cache"] += not schedule.prefix_cache
        met.update(name for move in adds for name in asked_of(move))
        met.update(result.commands)
        met.update(f"update in_flight {move.in_flight}" for move in schedule.moves if move.kind == "update")
        met["answers that began again"] += result.restarted
        met["answers from old and new weights"] += sum(len(move.weights) > 1 for move in result.moves.values())
        met["exhaustion"] += result.exhausted
        met["overshoot"] += result.overshoot
        short |= {*result.device.failed_at}
        met.update(f"cancel at {name}" for name in cancelled_at(result) if name in BOUNDARIES)
    wanted = {f"lookahead {ahead}" for ahead in range(5)} | {f"cancel at {name}" for name in BOUNDARIES}
    wanted |= ASKED | {*COMMANDS}
    wanted |= {f"update in_flight {in_flight}" for in_flight in get_args(InFlight)}
    wanted |= {f"shared by {who} {what}" for who in ("a new one:", "a preempted one:") for what in USES}
    assert wanted <= set(met), wanted - set(met)
    assert met["shared by a new one: whole"] > SEEDS // 5
    assert min(met.values()) > 3, met
    for schedule in map(generate, range(SEEDS, GENERATED)):  # some places are rare
        if short == set(SHORTAGES):
            break
        if any(move.kind == "exhaust" and move.where not in short for move in schedule.moves):
            short |= {*run(schedule).device.failed_at}
    assert short == set(SHORTAGES)


def test_prompts_have_any_length_and_answers_any_or_no_limit():
    schedules = [generate(seed) for seed in range(GENERATED)]
    adds = [(schedule.max_length, move) for schedule in schedules for move in schedule.moves if move.kind == "add"]
    lengths = {(limit, len(move.prompt)) for limit, move in adds}
    assert lengths == {(limit, length) for limit in (12, 24, 40) for length in range(1, limit)}
    assert {move.params.max_tokens for _, move in adds} == {None, *range(1, 41)}


def asked_of(move: Move) -> set[str]:
    """What a request asks for, beyond what everybody does."""
    plain = SamplingParams()
    names = [field.name for field in fields(plain) if field.compare and field.name not in ("seed", "stop")]
    asked = {name for name in names if getattr(move.params, name) != getattr(plain, name)}
    return asked | {name for name in ("endings", "form") if getattr(move, name)}


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
        elif not span.name.startswith(("add", "preempt", *COMMANDS)):
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
            moves=(replace(adds[number], point=0, params=replace(adds[number].params, n=1)),),
        )
    )


def test_the_oracle_is_what_an_engine_gives_to_a_request_that_is_alone_at_lookahead_0():
    seen = 0
    for seed in range(ALONE_SEEDS):
        schedule = generate(seed)
        adds = [move for move in schedule.moves if move.kind == "add"]
        for number, move in enumerate(adds):
            single = alone(schedule, number)
            [(request_id, end)] = single.finished.items()
            assert single.violation is None, single.violation
            assert single.tokens[request_id] == answer(move, schedule.limits)
            assert end.generated == len(single.tokens[request_id])
            seen += 1
    assert seen > 2 * ALONE_SEEDS


def test_the_hash_model_in_torch_gives_the_same_answers():
    for seed in range(AUDIT_SEEDS):
        result = run(generate(seed), Parts(model=KeyedHashModel))
        assert result.violation is None, explain(seed, result)


def test_the_real_sampler_and_every_declaration_hold_while_all_else_is_rubbish():
    """Each stage runs with everything that it did not declare scrambled: see device/sim/frame.py.

    The tokens must be those of the same schedule without the audit, on the torch sampler and the torch hash model.
    """
    for seed in range(AUDIT_SEEDS):
        schedule = generate(seed)
        parts = Parts(model=KeyedHashModel, sampler=TorchSampler, expected=answer_of_the_real_sampler)
        plain, audited = run(schedule, parts), run(schedule, replace(parts, audit=True))
        assert plain.violation is None, explain(seed, plain)
        assert audited.violation is None, explain(seed, audited)
        assert audited.tokens == plain.tokens
