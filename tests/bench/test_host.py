"""`gapless bench host`: its rows, and that what it steps is steady decode."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from types import FrameType

import pytest

from cli.conftest import Ran
from gapless.bench.host import SteadyLoop

Gapless = Callable[..., Ran]


def test_the_last_line_is_an_object_with_a_row_for_each_combination(gapless: Gapless):
    grid = ["--batch", "2", "--batch", "3", "--context", "40", "--queue", "7", "--queue", "0", "--steps", "10"]
    ran = gapless("bench", "host", *grid, "--json")
    assert ran.status == 0, ran.err
    rows = json.loads(ran.out.splitlines()[-1])["rows"]
    assert [(row["batch"], row["context"], row["queue"]) for row in rows] == [
        (2, 40, 0),
        (2, 40, 7),
        (3, 40, 0),
        (3, 40, 7),
    ]
    for row in rows:
        assert row["us_per_step"] > 0
        assert isinstance(row["allocations_per_step"], float)


def test_all_rows_decode_for_as_many_steps_as_asked_while_the_queue_waits():
    steady = SteadyLoop(batch=5, context=400_000, steps=20, lookahead=2)
    steady.wait(3)
    steady.wait(8)
    scheduler = steady.loop.scheduler
    for _ in range(2):  # what is committed lags behind by the lookahead
        steady.loop.step()
    for _ in range(20):
        before = scheduler.stats.generated_tokens
        steady.loop.step()
        assert scheduler.stats.generated_tokens == before + 5
        assert (scheduler.num_running, scheduler.num_prefilling, scheduler.num_waiting) == (5, 0, 8)
    assert min(scheduler.rows.length[:5]) >= 400_000


@pytest.mark.parametrize("argv", [["--batch", "0"], ["--queue", "-1"], ["--context", "2000000"], ["--steps", "1"]])
def test_what_can_not_be_measured_is_refused(gapless: Gapless, argv: list[str]):
    ran = gapless("bench", "host", *argv)
    assert ran.status == 2
    assert argv[0].strip("-") in ran.err or "max_model_len" in ran.err


CALLS = 90  # function calls of a steady decode step, Python's and C's; 80 when this was written


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("waiting", [0, 500])
def test_a_steady_decode_step_is_a_fixed_small_number_of_function_calls(batch: int, waiting: int):
    steps = 32  # of which every row gains a block in two
    steady = SteadyLoop(batch=batch, context=40, steps=steps + 8, lookahead=1)
    steady.wait(waiting)
    for _ in range(4):
        steady.loop.step()
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in range(steps):
            steady.loop.step()
    finally:
        sys.setprofile(None)
    assert calls / steps < CALLS


def test_steady_decode_gives_the_garbage_collector_nothing_to_do():
    steps = 3000
    steady = SteadyLoop(batch=256, context=40, steps=steps + 8, lookahead=1)
    for _ in range(4):
        steady.loop.step()
    gc.collect()
    before = [generation["collections"] for generation in gc.get_stats()]
    for _ in range(steps):
        steady.loop.step()
    assert [generation["collections"] for generation in gc.get_stats()] == before
