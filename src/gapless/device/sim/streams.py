"""What the host holds: streams, events, graphs and pinned memory. Every call first lets the device do some work."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

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
    """One record of an event."""

    name: str
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
        self._device.host_acts()
        return self.mark is None or self.mark.reached

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
        self._device = device

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        note = note or Note(UNDECLARED, -1, "")
        if note.step >= 0 and note.accesses is tuple and note.name != "replay":
            raise InternalError(f"{note.name} of step {note.step} does not declare what it touches")
        self._device.host_prepares(note)
        self.queued += 1
        clock = self._device.checker.fork(0)
        self.queue.append(Work(work, note, clock, self._device.now, call_site()))

    def record(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        self._device.host_acts()
        mark = event.mark = Mark(event.name)
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

    def replay(self) -> None:
        self._device.run_checked(self._work, self._accesses)


class TrackedArray(np.ndarray[Any, np.dtype[Any]]):
    """Pinned memory as the host sees it: every subscript is booked. What it returns is a plain array."""

    tensor: torch.Tensor
    name: str
    owner: SimDevice

    def __array_finalize__(self, parent: object) -> None:
        if isinstance(parent, TrackedArray):
            self.tensor, self.name, self.owner = parent.tensor, parent.name, parent.owner

    def __getitem__(self, key: Any) -> Any:
        self.owner.host_uses(self.tensor, self.name, write=False)
        return self.view(np.ndarray)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.owner.host_uses(self.tensor, self.name, write=True)
        self.view(np.ndarray)[key] = value


def call_site() -> CallSite:
    """The nearest caller outside the simulator."""
    frame = inspect.currentframe()
    assert frame is not None
    while frame.f_back is not None and _is_inside(frame.f_code):
        frame = frame.f_back
    return frame.f_code, frame.f_lineno


@cache
def _is_inside(code: CodeType) -> bool:
    return any(part in code.co_filename for part in _NOT_SITES)
