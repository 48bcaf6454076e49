"""The host's phases, written down by what the loop calls: parts that take the place of the engine's own."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

from gapless.config import SchedulerLimits
from gapless.device.base import Device, Note
from gapless.engine.build import Parts
from gapless.engine.loop import Loop
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot, SlotRing, SlotSizes
from gapless.outcome import Committed, Sampled
from gapless.plan import Plan
from gapless.scheduler import Scheduler
from gapless.spans import Span
from gapless.trace.record import LANES, PREFILL, Trace

HOST = LANES[0]


class HostLane:
    """What the engine's thread is doing, told by its parts. `spans` is where spans of the turn in hand go.

    Filling is what lies between planning and the step's first piece of queued work, launching what lies between that
    and the next phase, publishing what comes after a step was booked.
    """

    def __init__(self, trace: Trace) -> None:
        self.spans = deque[Span]()
        self._trace = trace
        self._plan = (0.0, 0.0)
        self._prefills = False
        self._launch: tuple[int, str, float] | None = None
        self._booked: tuple[int, str, float] | None = None
        self._step_in: dict[str, int] = {}  # slot -> the last step launched in it

    def turn_begins(self, lookahead: int) -> None:
        self.spans = self._trace.spans_of(lookahead)
        self._launch = self._booked = None

    def planned(self, plan: Plan | None, begin: float) -> None:
        self._plan = (begin, perf_counter())
        self._prefills = plan is not None and not plan.decode_only

    def queues(self, note: Note) -> str:
        """A piece of a step's work is about to be queued. Returns the name to show it under."""
        if self._launch is None:
            self._launch = (note.step, note.slot, perf_counter())
            self._step_in[note.slot] = note.step
        return PREFILL if self._prefills and note.name in ("compute", "replay") else note.name

    def launched(self) -> None:
        if self._launch is not None:
            (step, slot, begin), self._launch = self._launch, None
            self._add("plan", step, slot, *self._plan)
            self._add("fill", step, slot, self._plan[1], begin)
            self._add("launch", step, slot, begin, perf_counter())

    def collected(self, slot: str, begin: float) -> None:
        self._add("collect", self._step_in.get(slot, -1), slot, begin, perf_counter())

    def booked(self, name: str, step: int, begin: float) -> None:
        slot = next((slot for slot, latest in self._step_in.items() if latest == step), "")
        self._booked = (step, slot, perf_counter())
        self._add(name, step, slot, begin, self._booked[2])

    def turn_ends(self) -> None:
        self.launched()
        if self._booked is not None:
            self._add("publish", *self._booked, perf_counter())

    def _add(self, name: str, step: int, slot: str, begin: float, end: float) -> None:
        self.spans.append(Span(HOST, name, step, slot, begin, end))


class TracedScheduler(Scheduler):
    def __init__(self, lane: HostLane, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self._lane = lane

    def plan(self) -> Plan | None:
        begin = perf_counter()
        plan = super().plan()
        self._lane.planned(plan, begin)
        return plan

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        begin = perf_counter()
        committed = super().commit(plan, sampled)
        self._lane.booked("commit", plan.step, begin)
        return committed

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        begin = perf_counter()
        committed = super().abandon(failed, skipped)
        self._lane.booked("abandon", failed.step, begin)
        return committed


class TracedSlotRing(SlotRing):
    def __init__(self, lane: HostLane, device: Device, count: int, sizes: SlotSizes) -> None:
        super().__init__(device, count, sizes)
        self._lane = lane

    def collect(self, slot: Slot) -> Sampled:
        self._lane.launched()
        begin = perf_counter()
        try:
            return super().collect(slot)
        finally:
            self._lane.collected(slot.letter, begin)


class TracedLoop(Loop):
    def __init__(
        self,
        lane: HostLane,
        scheduler: Scheduler,
        slots: SlotRing,
        runner: Runner,
        publish: Callable[[Committed], None],
        lookahead: int,
    ) -> None:
        super().__init__(scheduler, slots, runner, publish, lookahead)
        self._lane = lane

    def step(self) -> None:
        self._lane.turn_begins(self.lookahead)
        super().step()
        self._lane.turn_ends()


def traced_parts(lane: HostLane) -> Parts:
    """What build_engine makes an engine of, to write its phases into this lane."""
    return Parts(
        scheduler=functools.partial(TracedScheduler, lane),
        slots=functools.partial(TracedSlotRing, lane),
        loop=functools.partial(TracedLoop, lane),
    )
