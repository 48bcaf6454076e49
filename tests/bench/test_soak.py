"""What a long run leaves behind: nothing. And that the measurement would see it if something stayed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gapless.bench.soak import STEADY_STEPS, CountingDevice, Readings, Soak, SoakReport, Window
from gapless.cli.main import main
from gapless.config import SchedulerLimits
from gapless.engine.loop import Loop
from gapless.outcome import Committed, Sampled
from gapless.plan import Plan
from gapless.request import FinishReason
from gapless.scheduler import Scheduler
from support.effort import effort

# A reading is taken in the middle of things: some requests run, others wait with their known tokens, and the layouts of
# the last 64 shapes hold more or fewer integers that Python has no cache of. One reading strays by 10 objects and
# 100 blocks or so, whatever the number of steps, and the first thousands of steps meet shapes that nobody met before.
# One object a step would be 15,000 in the long run.
ALLOWED = {"objects": 256, "blocks": 1_500, "tensor_bytes": 0, "pinned_bytes": 0}


def grown(report: SoakReport) -> dict[str, float]:
    """What there is more of at the end than at the start, beyond what is allowed."""
    growth = {field: report.growth(field) for field in ALLOWED}
    return {field: more for field, more in growth.items() if more > ALLOWED[field]}


@pytest.mark.slow
def test_a_long_run_leaves_nothing_behind():
    steps = effort(20_000, 100_000)
    report = Soak.build(rows=32, lookahead=1).run(steps, windows=4)  # after one more to warm up
    assert report.steps == steps
    assert not grown(report)
    assert report.calls_after == report.calls_before
    assert not any(window.cyclic for window in report.windows)


@pytest.mark.parametrize("lookahead", [0, 3])
def test_no_lookahead_leaves_anything_behind(lookahead: int):
    report = Soak.build(rows=32, lookahead=lookahead).run(effort(4_000, 10_000), windows=10)
    assert not grown(report)
    assert report.calls_after == report.calls_before
    assert not any(window.cyclic for window in report.windows)


def test_every_way_to_end_and_preemption_are_part_of_the_churn():
    report = Soak.build(rows=16, lookahead=1).run(4_000, windows=2)
    assert set(report.ended) == set(FinishReason) - {FinishReason.ERROR}
    assert min(report.ended.values()) > 20
    assert min(report.stats.preemptions, report.stats.recomputed_tokens, report.stats.overshoot_rows) > 20


def test_a_seed_decides_the_whole_run():
    first, second = (Soak.build(rows=4, lookahead=1).run(500, windows=1) for _ in range(2))
    assert (first.ended, first.stats, first.calls_before) == (second.ended, second.stats, second.calls_before)
    assert Soak.build(rows=4, lookahead=1, seed=1).run(500, windows=1).stats != first.stats


# ------------------------------------------------------------------------ leaks, one a step


class KeepsPlans(Scheduler):
    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self.kept: list[Plan | None] = []

    def plan(self) -> Plan | None:
        self.kept.append(super().plan())
        return self.kept[-1]


class KeepsCommitted(Scheduler):
    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self.kept: list[Committed] = []

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        self.kept.append(super().commit(plan, sampled))
        return self.kept[-1]


class KeepsNumbers(Scheduler):
    """Nothing that the garbage collector tracks."""

    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self.kept: list[float] = []

    def plan(self) -> Plan | None:
        self.kept.append(self.stats.steps / 7)
        return super().plan()


class LooksBack(Scheduler):
    """Keeps nothing new, but goes through more the longer it has run."""

    def plan(self) -> Plan | None:
        for step in range(0, self.stats.steps, 500):
            abs(step)
        return super().plan()


class MakesCycles(Scheduler):
    def plan(self) -> Plan | None:
        itself: list[object] = []
        itself.append(itself)
        return super().plan()


class KeepsTensors(Loop):
    kept = torch.zeros(0)

    def step(self) -> None:
        self.kept = torch.zeros(self.kept.numel() + 1)  # one tensor, ever larger
        super().step()


class PinsMore(Loop):
    device: CountingDevice

    def step(self) -> None:
        self.device.pinned(1)
        super().step()


def soak_with(scheduler: type[Scheduler] = Scheduler, loop: type[Loop] = Loop) -> Soak:
    """A soak whose loop has another scheduler, or is another loop, from the start."""
    sound = Soak.build(rows=8, lookahead=1)
    parts = sound.loop
    other = loop(scheduler(sound.admission.limits), parts.slots, parts.runner, parts.publish, parts.lookahead)
    if isinstance(other, PinsMore):
        other.device = sound.device
    return Soak(other, sound.admission, sound.device)


def test_the_short_run_of_these_tests_leaves_nothing_behind_without_a_leak():
    assert not grown(soak_with().run(4_000, windows=4))


@pytest.mark.parametrize("leak", [KeepsPlans, KeepsCommitted])
def test_a_record_kept_in_each_step_is_found(leak: type[Scheduler]):
    found = grown(soak_with(leak).run(4_000, windows=4))
    assert found["objects"] > 2_900
    assert found["blocks"] > 2_900


def test_a_number_kept_in_each_step_is_found():
    assert grown(soak_with(KeepsNumbers).run(4_000, windows=4))["blocks"] > 2_000


def test_a_tensor_that_grows_in_each_step_is_found():
    assert grown(soak_with(loop=KeepsTensors).run(400, windows=4))["tensor_bytes"] == 3 * 100 * 4


def test_memory_pinned_in_each_step_is_found():
    assert grown(soak_with(loop=PinsMore).run(400, windows=4))["pinned_bytes"] == 3 * 100 * 4


def test_reference_cycles_are_found():
    report = soak_with(MakesCycles).run(400, windows=4)
    assert [window.cyclic for window in report.windows] == [100] * 4


def test_work_that_grows_with_the_steps_is_found():
    report = soak_with(LooksBack).run(4_000, windows=4)
    assert report.calls_after >= report.calls_before + 8 * STEADY_STEPS


def test_growth_is_told_only_of_a_run_that_is_long_enough():
    window = Window(1.0, 1.0, 1.0, 10, 20, 0, 0, 0, 0)
    windows = [window, replace(window, objects=13)]
    assert Readings(window_steps=9_999, windows=windows).growth_text() == (
        "growth: too short a run to tell, below 20,000 steps"
    )
    assert Readings(window_steps=10_000, windows=windows).growth_text().splitlines() == [
        "growth, last quarter over first: +3 objects, +0 blocks, +0 tensor bytes, +0 pinned bytes",
        "growth per 100,000 steps: +30 objects, +0 blocks, +0 tensor bytes, +0 pinned bytes",
    ]


def test_every_window_is_told_as_it_comes():
    told: list[tuple[int, Window]] = []
    soak = Soak.build(rows=4, lookahead=1)
    seen: list[int] = []

    def tell(done: int, window: Window) -> None:
        told.append((done, window))
        seen.append(soak.loop.scheduler.stats.steps)

    report = soak.run(40, windows=4, each=tell)
    assert told == [(10 * number, window) for number, window in enumerate(report.windows, 1)]
    assert [after - before for before, after in pairwise(seen)] == [10, 10, 10]


# ------------------------------------------------------------------------ the command


def test_the_command_prints_every_window_within_80_columns(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "soak", "--steps", "200", "--rows", "2", "--lookahead", "2", "--json"])
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0]) <= 80
    assert [line.split()[0] for line in lines[1:21]] == [str(10 * number) for number in range(1, 21)]
    growth = [line.split("; ")[0] for line in lines if line.startswith("growth")]
    assert growth == ["growth: too short a run to tell, below 20,000 steps"]
    summary = json.loads(lines[-1])
    assert (summary["steps"], summary["rows"], summary["lookahead"]) == (200, 2, 2)
    assert len(summary["windows"]) == 20
    assert set(summary["end_over_start"]) == {"wall_us", "wall_us_p10", "cpu_us"}
