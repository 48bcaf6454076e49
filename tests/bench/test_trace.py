"""Busy shares of hand-made traces."""

from __future__ import annotations

from typing import Any

import pytest

from gapless.bench.trace import GRAPH_KERNELS, summarise


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
    assert sum(micros for _, micros, _ in busy.top) == pytest.approx(GRAPH_KERNELS * 4.0)


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


def test_a_trace_without_replays_has_no_answer():
    assert summarise([], steps=3) is None
