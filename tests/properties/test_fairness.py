"""Nobody holds up the others: long prompts come in pieces beside those who decode, and nobody waits for ever."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from gapless.bench.tiny_model import TinyModel
from gapless.config import EngineConfig
from gapless.device.base import Note
from gapless.device.sim import SimDevice, TimedOrder
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.outcome import Committed
from gapless.params import SamplingParams
from gapless.plan import Plan
from gapless.request import MAX_PRIORITY, PRIORITY_ARRIVALS
from gapless.sampling import make_sampler
from gapless.scheduler import Scheduler
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


@pytest.mark.parametrize("lookahead", range(3))
def test_between_two_tokens_lies_no_more_than_one_chunk_of_a_long_prompt(
    lookahead: int, monkeypatch: pytest.MonkeyPatch
):
    """In virtual time: a step costs 1 ms and 0.1 ms a token, and takes 64 tokens at most, of prompts of 1,500."""
    fed: list[int] = []
    plan = Scheduler.plan

    def counted(scheduler: Scheduler) -> Plan | None:
        made = plan(scheduler)
        fed.extend([] if made is None else [int(made.counts_E.sum())])
        return made

    def cost(note: Note) -> float:
        return 1e-3 + 1e-4 * fed[note.step] if note.name == "compute" else 0.0

    monkeypatch.setattr(Scheduler, "plan", counted)
    device = SimDevice(TimedOrder(), cost=cost)
    config = EngineConfig(
        lookahead=lookahead, max_rows=4, max_batch_tokens=64, max_model_len=2048, num_blocks=520, graphs=False
    )
    model = TinyModel(vocab_size=2)
    loop, limits = build_loop(model, config, device, make_sampler(torch.device("cpu")), torch.float32)
    times: dict[int, list[float]] = {}

    def publish(committed: Committed) -> None:
        for request_id in committed.request_ids:
            times.setdefault(request_id, []).append(device.now)

    loop.publish = publish
    admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 0)

    def add(prompt_len: int, max_tokens: int, token: int = 0) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = admission.make_request([token] * prompt_len, params)
        loop.scheduler.add(request)
        return request.request_id

    decoding = [add(2, 200), add(3, 200)]
    for _ in range(20):
        loop.step()
    prompts = [add(1500, 2), add(1500, 2, token=1)]
    while any(len(times.get(each, ())) < 2 for each in prompts):
        loop.step()
    loop.close()
    gaps = [after - before for each in decoding for before, after in pairwise(times[each])]
    whole_step = 1e-3 + 1e-4 * 64
    assert max(gaps) <= whole_step * 1.0001
    assert sum(gap > whole_step * 0.9999 for gap in gaps) > 2 * 3000 // 64
