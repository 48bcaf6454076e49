"""A trace tells what host and streams did when, keeps the last steps, and changes nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from gapless.device.cpu import CpuDevice
from gapless.engine.build import PLAIN
from gapless.spans import Run, Span
from gapless.trace.device import traced
from gapless.trace.record import Trace
from support.scarce import ScarceDevice, ScarceModel
from support.traced import run_loop

ORDER = ["plan", "fill", "launch", "copy in", "compute", "copy out", "commit", "publish"]
LANES = {"copy in": "h2d", "compute": "compute", "copy out": "d2h"}


def steps_of(run: Run) -> dict[int, dict[str, Span]]:
    """The spans of each step by name, the compute stage as "compute"."""
    steps: dict[int, dict[str, Span]] = defaultdict(dict)
    for span in run.spans:
        name = "compute" if span.lane == "compute" else span.name
        assert name not in steps[span.step], f"{span.label} twice"
        steps[span.step][name] = span
    return steps


def only_run(trace: Trace) -> Run:
    (run,) = trace.runs()
    return run


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_trace_changes_no_token(lookahead: int):
    assert run_loop(Trace(), lookahead) == run_loop(None, lookahead)


def test_without_a_trace_an_engine_has_its_own_device_and_parts():
    device = CpuDevice()
    assert traced(device, None) == (device, PLAIN)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_every_step_has_every_phase_in_its_lane_in_causal_order(lookahead: int):
    trace = Trace()
    run_loop(trace, lookahead)
    run = only_run(trace)
    assert (run.name, run.note) == (f"lookahead {lookahead}", "cpu")
    steps = steps_of(run)
    assert sorted(steps) == list(range(12))
    for number, spans in steps.items():
        assert set(spans) == {*ORDER, "collect"}
        assert {span.slot for span in spans.values()} == {"ABC"[number % (lookahead + 1)]}
        assert all(span.lane == LANES.get(name, "host") for name, span in spans.items())
        assert all(span.begin <= span.end for span in spans.values())
        begins = [spans[name].begin for name in ORDER]
        assert begins == sorted(begins)
        for first, then in (("copy in", "compute"), ("compute", "copy out")):
            assert spans[first].end <= spans[then].begin
        assert spans["copy out"].end <= spans["collect"].end <= spans["commit"].begin
        assert spans["launch"].begin <= spans["copy in"].begin


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_host_does_one_thing_at_a_time_and_collects_so_many_steps_behind(lookahead: int):
    trace = Trace()
    run_loop(trace, lookahead)
    host = [span for span in only_run(trace).spans if span.lane == "host"]
    assert all(first.end <= then.begin for first, then in pairwise(host))
    steps = steps_of(only_run(trace))
    for number in range(12 - lookahead):
        assert steps[number + lookahead]["launch"].end <= steps[number]["collect"].begin
        if number + lookahead + 1 < 12:
            assert steps[number]["publish"].end <= steps[number + lookahead + 1]["plan"].begin


def test_a_compute_stage_with_prompt_tokens_is_named_prefill():
    trace = Trace()
    run_loop(trace, 1)
    names = {step: spans["compute"].name for step, spans in steps_of(only_run(trace)).items()}
    assert names == {0: "prefill"} | dict.fromkeys(range(1, 12), "compute")


def test_only_the_last_steps_are_kept():
    trace = Trace(steps=5)
    run_loop(trace, 1, new_tokens=40)
    spans = only_run(trace).spans
    assert len(spans) == 45
    assert min(span.step for span in spans) >= 39 - 6
    assert max(span.step for span in spans) == 39


def test_engines_at_several_lookaheads_share_a_trace():
    trace = Trace()
    for lookahead in (1, 0):
        run_loop(trace, lookahead)
    assert [run.name for run in trace.runs()] == ["lookahead 0", "lookahead 1"]
    assert [len(run.spans) for run in trace.runs()] == [12 * 9] * 2


class FailsAt(ScarceModel):
    """Breaks at its n-th forward."""

    def __init__(self, step: int) -> None:
        super().__init__(self._breaks)
        self._left = step

    def _breaks(self, _: int) -> bool:
        self._left -= 1
        if self._left == 0:
            raise ArithmeticError("a kernel went wrong")
        return False


def test_a_failure_leaves_what_led_to_it(tmp_path: Path):
    trace = Trace()
    with pytest.raises(ArithmeticError):
        run_loop(trace, 1, model=FailsAt(5))
    steps = steps_of(only_run(trace))
    assert {"copy in", "compute", "collect"} <= set(steps[4])
    assert "commit" not in steps[4]
    assert "publish" in steps[3]
    trace.write(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_step_without_memory_is_shown_as_abandoned_and_its_skipped_work_is_not_shown():
    trace = Trace()
    short = ScarceDevice(lambda note: "before" if note.step == 4 and note.name == "compute" else None)
    run_loop(trace, 1, device=short)
    steps = steps_of(only_run(trace))
    assert "abandon" in steps[4]
    assert "commit" not in steps[4]
    assert "compute" not in steps[5]
    assert "publish" in steps[max(steps)]
