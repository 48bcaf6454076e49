"""What a long run through AsyncLLM and the engine's thread leaves behind: nothing. And that a leak would be seen."""

from __future__ import annotations

import json

import pytest

from bench.test_soak import ALLOWED
from gapless.bench.soak_requests import RequestReport, RequestSoak
from gapless.cli.main import main
from gapless.collector import Collector, Generation, Prepared
from gapless.outcome import Committed
from support.effort import effort


def grown(report: RequestReport, allowed: dict[str, int] = ALLOWED) -> dict[str, float]:
    """What there is more of at the end than at the start, beyond what is allowed."""
    growth = {field: report.growth(field) for field in allowed}
    return {field: more for field, more in growth.items() if more > allowed[field]}


# What the first thousands of steps bring, once: layouts of shapes that nobody met before. One object a step: 6,000.
ALLOWED_AT_FIRST = {"objects": 1_000, "blocks": 3_000, "tensor_bytes": 0, "pinned_bytes": 0}


@pytest.mark.slow
def test_a_long_run_through_the_whole_path_leaves_nothing_behind():
    steps = effort(8_000, 40_000)
    report = RequestSoak(rows=32, lookahead=1).run(steps, windows=4)  # after one more to warm up
    assert report.stats.steps >= steps
    assert not grown(report, ALLOWED_AT_FIRST)
    assert not any(window.left or window.cyclic for window in report.windows)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_requests_that_are_read_left_dropped_and_cancelled_leave_nothing_behind(lookahead: int):
    report = RequestSoak(rows=8, lookahead=lookahead).run(3_000, windows=4)
    assert not grown(report)
    assert not any(window.left or window.cyclic for window in report.windows)
    assert set(report.ended) == {"read", "leave", "drop", "cancel"}
    assert min(report.ended.values()) > 20
    assert report.stats.failed_steps >= 5
    assert report.stats.preemptions > 5


# ------------------------------------------------------------------------ leaks


class KeepsGenerations(Collector):
    def __init__(self) -> None:
        super().__init__(None)
        self.kept: list[Generation] = []

    def add(self, prepared: Prepared) -> Generation:
        self.kept.append(super().add(prepared))
        return self.kept[-1]


class KeepsRecords(Collector):
    def __init__(self) -> None:
        super().__init__(None)
        self.kept: list[Committed] = []

    def take(self, record: Committed) -> list[Generation]:
        self.kept.append(record)
        return super().take(record)


class ForgetsNothing(Collector):
    """Keeps requests open that were left by their callers, and lets them run."""

    def __init__(self) -> None:
        super().__init__(None)
        self.kept: dict[int, Generation] = {}

    def discard(self, request_id: int) -> bool:
        generation = self._open.get(request_id)
        if generation is not None:
            self.kept[request_id] = generation
        return super().discard(request_id)

    def __len__(self) -> int:
        return super().__len__() + len(self.kept)


def soak_with(collector: Collector) -> RequestReport:
    soak = RequestSoak(rows=8, lookahead=1)
    soak.llm._desk._collector = collector  # pyright: ignore[reportPrivateUsage]
    return soak.run(2_000, windows=4)


@pytest.mark.parametrize("leak", [KeepsGenerations, KeepsRecords])
def test_what_a_collector_keeps_of_each_request_or_step_is_found(leak: type[KeepsGenerations | KeepsRecords]):
    found = grown(soak_with(leak()))
    assert min(found["objects"], found["blocks"]) > 100


def test_requests_that_stay_open_are_found():
    assert all(window.left > 10 for window in soak_with(ForgetsNothing()).windows)


# ------------------------------------------------------------------------ the command


def test_the_command_prints_every_window_within_80_columns(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "soak", "--whole-path", "--steps", "200", "--rows", "2", "--json"])
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0]) <= 80
    assert [line.split()[0] for line in lines[1:21]] == [str(10 * number) for number in range(1, 21)]
    assert [line for line in lines if line.startswith("growth")] == [
        "growth: too short a run to tell, below 20,000 steps"
    ]
    summary = json.loads(lines[-1])
    assert len(summary["windows"]) == 20
    assert not any(window["left"] for window in summary["windows"])
