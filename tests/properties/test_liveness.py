"""PROPERTIES 23 and 26: full batches of prompts run, and a step's cost grows with neither queue nor context."""

from __future__ import annotations

import dataclasses
import sys
import time
import tracemalloc
from collections.abc import Callable
from types import FrameType

import numpy as np
import pytest
import torch

from gapless.bench.host import steady_loop
from gapless.bench.tiny_model import TinyModel
from gapless.config import EngineConfig
from gapless.device.null import NullDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.engine.loop import Loop
from gapless.params import SamplingParams
from gapless.rows import RowState
from gapless.sampling import make_sampler
from support.harness import Harness
from support.sim.rig import run
from support.sim.schedule import Move, Schedule

BASE = Schedule(
    lookahead=0,
    rows=4,
    batch_tokens=4,
    block_size=2,
    blocks=80,
    max_length=40,
    graphs=False,
    order_seed=5,
    eagerness=None,
    reader_lag=0,
    moves=(),
)


@pytest.mark.parametrize("lookahead", range(5))
@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_batch_full_of_prompts_does_not_deadlock(lookahead: int, max_tokens: int):
    """Every row prefills, the budget is used up by chunks, and with one new token nobody ever decodes."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    moves = tuple(Move(0, "add", prompt=(n,) * 30, params=params) for n in range(9))
    result = run(dataclasses.replace(BASE, lookahead=lookahead, moves=moves))
    assert result.violation is None, result.violation
    assert len(result.finished) == 9


@pytest.mark.parametrize("lookahead", range(3))
def test_a_prompt_goes_on_in_every_step_while_others_decode_and_wait(lookahead: int):
    config = EngineConfig(lookahead=lookahead, max_rows=3, max_batch_tokens=5, num_blocks=64, device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    seen = 0
    with Harness(config) as engine:
        table = engine.scheduler.rows
        for number in range(8):
            engine.add([number] * (1 + 17 * (number % 3)), params)
        while engine.loop.has_work:
            pending = np.where(table.state == RowState.RUNNING, table.length - table.computed, 0)
            prompts, decodes = np.flatnonzero(pending > 1), int((pending == 1).sum())
            computed, ids = table.computed.copy(), table.request_id.copy()
            engine.step()
            if prompts.size:
                row = prompts[ids[prompts].argmin()]
                assert table.computed[row] - computed[row] == min(5 - decodes, pending[row])
                seen += decodes > 0
    assert seen > 10


def calls_per_step(queue: int, context: int, steps: int = 40) -> int:
    """Calls of Python and C functions in steady decode steps, none of which needs a new block."""
    loop = steady_loop(8, context, queue, 4 * steps, 1)
    while loop.scheduler.rows.length[0] % 16 != 6:
        loop.step()
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        for _ in range(8):
            loop.step()
    finally:
        sys.setprofile(None)
    return count // 8


def test_the_work_of_a_step_grows_neither_with_the_waiting_queue_nor_with_the_context():
    """Counted in function calls; benchmarks.md has the times."""
    base = calls_per_step(queue=0, context=32)
    assert base > 20
    assert calls_per_step(queue=10_000, context=32) == base
    assert calls_per_step(queue=0, context=2048) == base


def busy_loop(queue: int, *, rows: int, blocks: int, prompt: int, max_tokens: int) -> Loop:
    """Rows of 16-token blocks on a device that does nothing, and `queue` requests of this size in front of them."""
    model = TinyModel()
    config = EngineConfig(
        lookahead=1, max_rows=rows, max_batch_tokens=256, max_model_len=256, num_blocks=blocks, device="cpu"
    )
    sampler = make_sampler(torch.device("cpu"))
    loop, limits = build_loop(model, config, NullDevice(), sampler, torch.float32)
    admission = Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), 0)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for number in range(queue):
        loop.scheduler.add(admission.make_request([number % model.vocab_size] * prompt, params))
    return loop


def cost_of(loop: Loop, steps: int) -> tuple[int, int]:
    """Calls of these steps, and the most bytes that were allocated during one: a copy of the queue is one call."""
    calls, most = 0, 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    for _ in range(steps):
        tracemalloc.start()
        sys.setprofile(profile)
        try:
            loop.step()
            most = max(most, tracemalloc.get_traced_memory()[1])
        finally:
            sys.setprofile(None)
            tracemalloc.stop()
    return calls, most


def admitting_and_ending(queue: int) -> tuple[int, int]:
    """Every other step takes four requests from the queue, and every other one ends them."""
    loop = busy_loop(queue, rows=4, blocks=64, prompt=3, max_tokens=1)
    for _ in range(5):
        loop.step()
    waiting = loop.scheduler.queue_length
    cost = cost_of(loop, 8)
    assert waiting - loop.scheduler.queue_length >= 12
    return cost


def short_of_blocks(queue: int) -> tuple[int, int]:
    """One request runs, and the oldest of those that wait does not fit beside it, though rows are free."""
    loop = busy_loop(queue, rows=4, blocks=14, prompt=100, max_tokens=60)
    for _ in range(20):
        loop.step()
    cost = cost_of(loop, 8)
    assert (loop.scheduler.num_running, loop.scheduler.queue_length) == (1, queue - 1)
    return cost


@pytest.mark.parametrize("measure", [admitting_and_ending, short_of_blocks])
def test_a_step_that_looks_at_the_queue_takes_no_more_of_a_long_one(measure: Callable[[int], tuple[int, int]]):
    calls, most = measure(100)
    long_calls, long_most = measure(50_000)
    assert long_calls == calls > 100
    assert abs(long_most - most) < 50_000


def cpu_time_of_a_step(queue: int, context: int) -> int:
    """The least of many, in nanoseconds of this thread: whatever else the machine does only adds to it."""
    loop = steady_loop(8, context, queue, 70, 1)
    times: list[int] = []
    for _ in range(60):
        begin = time.thread_time_ns()
        loop.step()
        times.append(time.thread_time_ns() - begin)
    return min(times)


def test_no_call_in_a_step_hides_work_on_all_that_waits_or_on_whole_contexts():
    """One call can do it, so this is counted in CPU time: about 40 us, and milliseconds if it did."""
    base = cpu_time_of_a_step(queue=0, context=64)
    assert cpu_time_of_a_step(queue=100_000, context=64) < 4 * base
    assert cpu_time_of_a_step(queue=0, context=100_000) < 4 * base
