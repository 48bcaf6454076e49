"""Times by events, on a device with a clock of its own: virtual time, so that every one is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gapless.device.base import Note
from gapless.device.sim import Order, RandomOrder, SimDevice, TimedOrder
from gapless.plan import empty_plan
from gapless.spans import Span
from gapless.trace.device import EventClock, EventTimedStream
from gapless.trace.host import HostLane
from gapless.trace.record import Trace

COSTS = {"copy in": 0.5, "compute": 4.0, "copy out": 0.25}
HOST = 4.5
STEPS = 60


class Rig:
    """Three streams whose work takes COSTS, watched by a host that takes HOST for a step and waits for nothing.

    fast  how much faster the host's clock runs than the device's
    """

    def __init__(self, order: Order, anchor_seconds: float, fast: float = 0.0) -> None:
        device = SimDevice(order, cost=lambda note: COSTS.get(note.name, 0.0))
        self.device = device
        self.lane = HostLane(Trace())
        self.clock = EventClock(device, now=lambda: device.now * (1 + fast), anchor_seconds=anchor_seconds)
        names = ("h2d", "compute", "d2h")
        self.streams = [EventTimedStream(device.stream(each), self.lane, device, self.clock) for each in names]

    def queue_steps(self) -> None:
        for step in range(STEPS):
            self.device.spend("host", HOST, step)
            before = None
            for stream, name in zip(self.streams, COSTS, strict=True):
                if before is not None:
                    stream.wait(before)
                stream.enqueue(lambda: None, Note(name, step, "A", list))
                before = self.device.event()
                stream.record(before)

    def finish(self) -> list[Span]:
        """Let the device end, then read the rest."""
        self.device.run_now(lambda: None, self.streams[0].inner)
        self.clock.read()
        return sorted(self.lane.spans, key=lambda span: (span.step, span.begin))

    def true_spans(self) -> list[Span]:
        spans = [span for span in self.device.timeline.spans if span.name in COSTS]
        return sorted(spans, key=lambda span: (span.step, span.begin))


def furthest(found: list[Span], true: list[Span]) -> float:
    """The largest difference between two times of one and the same edge."""
    assert [span.label for span in found] == [span.label for span in true]
    return max(max(abs(a.begin - b.begin), abs(a.end - b.end)) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("anchor_seconds", [0.0, 20.0, 1e9])
def test_event_times_are_those_at_which_the_work_ran(anchor_seconds: float):
    rig = Rig(TimedOrder(), anchor_seconds)
    rig.queue_steps()
    assert furthest(rig.finish(), rig.true_spans()) == pytest.approx(0.0, abs=1e-6)


def test_what_has_ended_is_written_down_while_the_device_goes_on():
    rig = Rig(TimedOrder(), 1e9)
    rig.queue_steps()
    assert 3 * (STEPS - 3) < len(rig.lane.spans) < 3 * STEPS


def test_a_renewed_anchor_bounds_what_the_drift_of_the_clocks_does():
    errors: list[float] = []
    for anchor_seconds in (10.0, 1e9):
        rig = Rig(TimedOrder(), anchor_seconds, fast=1e-3)
        rig.queue_steps()
        found = rig.finish()
        by_host = [span._replace(begin=span.begin * 1.001, end=span.end * 1.001) for span in rig.true_spans()]
        errors.append(furthest(found, by_host))
    assert errors[0] < 0.03 < 0.2 < errors[1]


@pytest.mark.parametrize(("tokens", "name"), [(0, "compute"), (3, "prefill")])
def test_a_compute_stage_is_named_by_what_was_planned(tokens: int, name: str):
    rig = Rig(TimedOrder(), 1e9)
    rig.lane.planned(replace(empty_plan(), num_tokens=tokens), 0.0)
    rig.queue_steps()
    assert {span.name for span in rig.finish()} == {"copy in", name, "copy out"}


@pytest.mark.parametrize("seed", range(20))
def test_the_host_never_waits_for_the_device_to_time_it(seed: int):
    rig = Rig(RandomOrder(seed), 0.0)
    rig.queue_steps()
    rig.clock.read()
    assert rig.device.waited == 0
    assert len(rig.finish()) == 3 * STEPS
