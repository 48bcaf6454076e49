"""What the host holds: streams, events and graphs. Every call first lets the device do some work."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING

from gapless.device.base import Access, Event, Note
from gapless.device.faults import Faults
from gapless.device.sim.races import CallSite, Clock
from gapless.errors import InternalError

if TYPE_CHECKING:
    from gapless.device.sim.device import SimDevice

UNDECLARED = "work"  # what queued work without a note is called
_NOT_SITES = ("/device/sim/", "/numpy/", "/torch/")  # code that a call site is not in


@dataclass(slots=True, eq=False)
class Mark:
    """One record of an event, behind work of this step."""

    name: str
    step: int
    clock: Clock = field(default_factory=list[int])
    reached: bool = False
    at: float = 0.0
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Work:
    run: Callable[[], None]
    note: Note
    clock: Clock
    queued_at: float
    site: CallSite


@dataclass(slots=True, eq=False)
class Record:
    mark: Mark
    queued_at: float


@dataclass(slots=True, eq=False)
class Wait:
    mark: Mark


class SimEvent:
    """Refers to its latest record."""

    def __init__(self, device: SimDevice, name: str) -> None:
        self.name = name
        self.mark: Mark | None = None
        self._device = device

    def synchronize(self) -> None:
        self._device.host_waits_for(self)

    def done(self) -> bool:
        return self._device.host_polls(self)

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, SimEvent) or self.mark is None or earlier.mark is None:
            raise InternalError("seconds_since needs two recorded events of the sim device")
        if not (self.mark.reached and earlier.mark.reached):
            raise InternalError("seconds_since needs two events that have been reached")
        return self.mark.at - earlier.mark.at


class SimStream:
    """A queue whose head runs when the device's order picks it."""

    def __init__(self, device: SimDevice, name: str, thread: int) -> None:
        self.name = name
        self.thread = thread
        self.queue: deque[Work | Record | Wait] = deque()
        self.free_at = 0.0
        self.faults = Faults()
        self.queued = 0  # pieces of work so far: the epoch of the newest one, less 1
        self.step = -1  # of the newest one
        self._device = device

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        note = note or Note(UNDECLARED, -1, "")
        if note.step >= 0 and note.accesses is tuple and not _is_replay(work):
            raise InternalError(f"{note.name} of step {note.step} does not declare what it touches")
        self._device.host_prepares(note)
        self.queued += 1
        self.step = note.step
        clock = self._device.checker.fork(0)
        self.queue.append(Work(work, note, clock, self._device.now, call_site()))

    def record(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        self._device.host_acts()
        mark = event.mark = Mark(event.name, self.step)
        self._device.checker.recorded(self.thread, self.queued + 1, event.name)
        self.queue.append(Record(mark, self._device.now))

    def wait(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        self._device.host_acts()
        if event.mark is not None:
            self.queue.append(Wait(event.mark))


class SimGraph:
    """Holds the work itself, so that a replay reads its inputs when it runs."""

    def __init__(self, work: Callable[[], None], accesses: Callable[[], Iterable[Access]], device: SimDevice) -> None:
        self._work = work
        self._accesses = accesses
        self._device = device

    @property
    def declares(self) -> bool:
        """Whether a replay says what it touches."""
        return self._accesses is not tuple

    def replay(self) -> None:
        self._device.run_checked(self._work, self._accesses)


def _is_replay(work: Callable[[], None]) -> bool:
    """Whether this is the replay of a graph that declares what it touches."""
    graph = getattr(work, "__self__", None)
    return isinstance(graph, SimGraph) and graph.declares and work == graph.replay


def call_site() -> CallSite:
    """The two innermost callers outside the simulator."""
    frame, site = inspect.currentframe(), list[tuple[CodeType, int]]()
    while frame is not None and len(site) < 2:
        if not _is_inside(frame.f_code.co_filename):
            site.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(site)


@cache
def _is_inside(file: str) -> bool:
    return any(part in file for part in _NOT_SITES)
