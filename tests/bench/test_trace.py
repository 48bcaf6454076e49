"""Busy shares of hand-made traces."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gapless.bench.trace import GRAPH_KERNELS, TOP_KERNELS, kernel_parts, summarise


def replay(launch: int, begin: float, gap: float = 1.0, each: float = 4.0) -> list[dict[str, Any]]:
    """One graph of GRAPH_KERNELS kernels of `each` microseconds with `gap` between them."""
    return [
        {
            "cat": "kernel",
            "name": f"k{i % 2}",
            "ts": begin + i * (each + gap),
            "dur": each,
            "args": {"correlation": launch},
        }
        for i in range(GRAPH_KERNELS)
    ]


LENGTH = GRAPH_KERNELS * 5.0 - 1.0


def test_idle_time_is_told_apart_within_and_between_replays():
    events = replay(1, 0.0) + replay(2, LENGTH + 10.0)
    busy = summarise(events, steps=10)
    assert busy is not None
    window = 2 * LENGTH + 10.0
    assert busy.steps == 2
    assert busy.between_steps == pytest.approx(10.0 / window)
    assert busy.within_steps == pytest.approx(2 * (GRAPH_KERNELS - 1) / window)
    assert busy.kernel_share == pytest.approx(2 * GRAPH_KERNELS * 4.0 / window)
    assert busy.kernel_share + busy.between_steps + busy.within_steps == pytest.approx(1.0)
    assert busy.longest_gap_us == 10.0
    assert busy.kernels_per_step == GRAPH_KERNELS
    assert {part.name: (part.us, part.launches) for part in busy.parts} == {
        "k0": (pytest.approx(GRAPH_KERNELS * 2.0), GRAPH_KERNELS / 2),
        "k1": (pytest.approx(GRAPH_KERNELS * 2.0), GRAPH_KERNELS / 2),
        "(idle within steps)": (pytest.approx(GRAPH_KERNELS - 1), 0.0),
        "(idle between steps)": (pytest.approx(5.0), 0.0),
    }


def test_only_the_last_replays_count_and_single_launches_are_left_out():
    stray = {"cat": "kernel", "name": "eager", "ts": LENGTH + 20.0, "dur": 500.0, "args": {"correlation": 9}}
    events = [*replay(1, 0.0), stray, *replay(2, 1000.0), *replay(3, 1000.0 + LENGTH)]
    busy = summarise(events, steps=2)
    assert busy is not None
    assert busy.steps == 2
    assert busy.window_seconds == pytest.approx(2 * LENGTH * 1e-6)
    assert busy.between_steps == 0.0


def test_copies_count_as_work_but_not_as_kernels():
    copy = {"cat": "gpu_memcpy", "name": "copy", "ts": LENGTH, "dur": 10.0, "args": {"correlation": 8}}
    busy = summarise([*replay(1, 0.0), copy, *replay(2, LENGTH + 10.0)], steps=2)
    assert busy is not None
    assert busy.work_share - busy.kernel_share == pytest.approx(10.0 / (2 * LENGTH + 10.0))


def test_overlapping_kernels_are_counted_once():
    twice = replay(1, 0.0) + replay(1, 0.0)
    busy = summarise(twice, steps=1)
    assert busy is not None
    assert busy.kernel_share == pytest.approx(GRAPH_KERNELS * 4.0 / LENGTH)


def kernel(name: str, begin: float, end: float) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "args": {"correlation": 1}}


def test_where_kernels_overlap_the_time_belongs_to_the_one_that_started_first():
    kernels = [kernel("c", 9.0, 20.0), kernel("a", 0.0, 10.0), kernel("b", 1.0, 14.0), kernel("inside", 15.0, 16.0)]
    own = {part.name: part.us for part in kernel_parts(kernels, 1)}
    assert own == {"a": 10.0, "b": 4.0, "c": 6.0, "inside": 0.0}


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_sum_to_the_step_however_kernels_overlap(seed: int):
    rng = random.Random(seed)
    events: list[dict[str, Any]] = []
    begin = 100.0
    for launch in range(4):
        for _ in range(GRAPH_KERNELS + 30):
            each = kernel(f"k{rng.randrange(2 * TOP_KERNELS)}", begin, begin + rng.uniform(0.5, 12.0))
            each["args"] = {"correlation": launch}
            events.append(each)
            begin += rng.uniform(0.0, 8.0)
        begin += rng.choice([0.0, 30.0])
    rng.shuffle(events)
    busy = summarise(events, steps=4)
    assert busy is not None
    assert sum(part.us for part in busy.parts) == pytest.approx(busy.window_seconds * 1e6 / 4)
    assert sum(part.launches for part in busy.parts) == GRAPH_KERNELS + 30
    assert busy.kernel_share == pytest.approx(busy.work_share)


def test_kernels_past_the_most_expensive_ones_are_one_part():
    kernels = [kernel(f"k{i}", 100.0 * i, 100.0 * i + 50 - i) for i in range(TOP_KERNELS + 3)]
    parts = kernel_parts(kernels, 2)
    assert [part.name for part in parts] == [*(f"k{i}" for i in range(TOP_KERNELS)), "(other kernels)"]
    assert (parts[0].us, parts[0].launches) == (25.0, 0.5)
    assert (parts[-1].us, parts[-1].launches) == ((30 + 29 + 28) / 2, 1.5)


def test_a_trace_without_replays_has_no_answer():
    assert summarise([], steps=3) is None
