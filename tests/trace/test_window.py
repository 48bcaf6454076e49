"""Which steps are shown, and how long the compute lane idles in them."""

from __future__ import annotations

import random

import pytest

from gapless.bench.predict import predict
from gapless.errors import InputFileError
from gapless.spans import Run, Span
from gapless.trace.record import LANES
from gapless.trace.window import Window, share, typical_window


def run_of(*compute: tuple[float, float]) -> Run:
    """A run with these compute stages."""
    return Run("run", "", LANES, [Span("compute", "replay", at, "A", *times) for at, times in enumerate(compute)])


def test_of_equal_steps_the_middle_ones_are_shown():
    window = typical_window(run_of(*((at, at + 0.5) for at in range(101))), 4)
    assert (window.begin, window.end, window.step_seconds) == (48.0, 52.0, 1.0)


def test_steps_of_unusual_length_are_not_shown():
    """A pause between two runs lies in the middle."""
    early, late = [(at, at + 0.9) for at in range(50)], [(at + 1000, at + 1000.9) for at in range(50)]
    assert typical_window(run_of(*early, *late), 4).step_seconds == 1.0


def test_a_trace_of_fewer_steps_is_shown_whole():
    assert typical_window(run_of((0.0, 1.0), (2.0, 3.0)), 4).step_seconds == 2.0
    assert typical_window(run_of((5.0, 6.5)), 4).end == 6.5


def test_steps_that_take_no_time_are_refused():
    for run in (run_of((1.0, 1.0)), run_of((1.0, 1.0), (1.0, 1.0))):
        with pytest.raises(InputFileError, match="no time"):
            typical_window(run, 4)


@pytest.mark.parametrize("seed", range(40))
def test_idle_time_is_what_no_compute_stage_covers(seed: int):
    rng = random.Random(seed)
    compute = [(begin, begin + rng.randint(0, 12)) for begin in (rng.randint(0, 90) for _ in range(rng.randint(1, 12)))]
    begin, length = compute[0][0], rng.randint(1, 60)
    last = max(end for _, end in compute)
    window = Window(run_of(*compute), begin, begin + length, 1.0)
    covered = {tick for first, end in compute for tick in range(first, end)}
    idle = {tick for tick in range(begin, min(begin + length, last)) if tick not in covered}
    found = [tick for first, end in window.idle(length) for tick in range(int(first), int(end))]
    assert sorted(found) == sorted(idle)
    assert share(window.idle(length), length) == pytest.approx(len(idle) / length)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_idle_share_of_some_steps_is_that_of_the_whole_simulated_run(lookahead: int):
    whole = predict(lookahead, host=8e-4, device=2.5e-3, copy=2e-5, steps=60)
    window = typical_window(whole.run, 4)
    assert window.step_seconds == pytest.approx(whole.step_seconds, rel=1e-3)
    assert share(window.idle(window.end - window.begin), window.end - window.begin) == pytest.approx(
        whole.idle_share, abs=1e-3
    )
