"""Which steps are shown, and how long the compute lane idles in them."""

from __future__ import annotations

import random

import pytest

from gapless.bench.predict import predict
from gapless.errors import InputFileError
from gapless.spans import Run, Span
from gapless.trace.record import LANES
from gapless.trace.window import Window, typical_window


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
    window = Window(run_of(*compute), [0], begin, begin + length)
    covered = {tick for first, end in compute for tick in range(first, end)}
    idle = {tick for tick in range(begin, begin + length) if tick not in covered}
    found = [tick for first, end in window.idle() for tick in range(int(first), int(end))]
    assert sorted(found) == sorted(idle)
    assert window.idle_share == pytest.approx(len(idle) / length)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_the_idle_share_of_some_steps_is_that_of_the_whole_simulated_run(lookahead: int):
    whole = predict(lookahead, host=8e-4, device=2.5e-3, copy=2e-5, steps=60)
    window = typical_window(whole.run, 4)
    assert window.step_seconds == pytest.approx(whole.step_seconds, rel=1e-3)
    assert window.idle_share == pytest.approx(whole.idle_share, abs=1e-3)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_the_host_works_on_a_step_as_long_as_it_takes_wherever_the_window_is_cut(lookahead: int, steps: int):
    """At lookahead 1 the begin of a compute stage lies within the commit of the step before."""
    run = predict(lookahead, host=8e-4, device=2.5e-3, copy=2e-5, steps=60).run
    window = typical_window(run, steps)
    works, waits = (window.host_seconds(waiting=waiting) for waiting in (False, True))
    assert works == pytest.approx(8e-4)
    assert works + waits == pytest.approx(window.step_seconds)


def test_the_host_is_counted_by_whole_steps_where_its_work_is_uneven():
    """Step n takes the host n seconds, all of it before its stage begins."""
    stages = [Span("compute", "replay", at, "A", 100.0 * at, 100.0 * at + 50) for at in range(9)]
    work = [Span("host", "plan", at, "A", 100.0 * at - 10 - at, 100.0 * at - 10) for at in range(9)]
    waits = [Span("host", "collect", at, "A", 100.0 * at + 49, 100.0 * at + 49 + 2 * at) for at in range(9)]
    window = typical_window(Run("run", "", LANES, [*stages, *work, *waits]), 3)
    assert list(window.steps) == [2, 3, 4]
    assert window.host_seconds(waiting=False) == pytest.approx(3.0)
    assert window.host_seconds(waiting=True) == pytest.approx(6.0)


def named(*names: str) -> Run:
    """A second for each compute stage, and three for one with prompt tokens."""
    spans: list[Span] = []
    now = 0.0
    for at, name in enumerate(names):
        spans.append(Span("compute", name, at, "A", now, now + (3.0 if name == "prefill" else 1.0)))
        now = spans[-1].end
    return Run("run", "", LANES, spans)


def test_steps_with_prompt_tokens_are_not_shown_among_few_decode_steps():
    """Generation of five tokens, twice: any four steps in a row have a prefill among them, any three need not."""
    window = typical_window(named(*["prefill", "replay", "replay", "replay", "replay"] * 2), 4)
    assert (list(window.steps), window.step_seconds) in (([1, 2, 3], 1.0), ([6, 7, 8], 1.0))


def test_decode_steps_are_shown_where_prompts_are_longer_and_more():
    window = typical_window(named(*["prefill"] * 20, *["replay"] * 3), 4)
    assert (list(window.steps), window.step_seconds) == ([20, 21], 1.0)


def test_the_pause_before_the_next_prompt_is_no_part_of_the_last_decode_step():
    run = named("prefill", "replay", "replay", "prefill", "replay", "replay", "prefill")
    assert typical_window(run, 1).step_seconds == 1.0
    assert 0 not in typical_window(run, 1).steps


def test_where_no_two_decode_steps_follow_each_other_prompts_are_shown():
    assert typical_window(named("prefill", "prefill", "prefill", "replay"), 4).step_seconds == 3.0
    assert typical_window(named("prefill", "replay"), 4).step_seconds == 3.0
