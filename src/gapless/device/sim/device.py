"""Streams, events and graphs that run when the simulator says so. No threads and no clock: the order decides all.

What is queued runs only when `Order` picks it, at one of the host's next calls or while the host waits. So a copy
from pinned memory reads what is there when it runs, a graph reads its inputs when it is replayed, and an event that
was not recorded before a wait holds nothing back.

Virtual time: a piece of work starts when its stream is free, its waits are over and the host has queued it, and takes
what `cost` says; `spend` lets the host take its own time. Without a cost every piece of work takes one tick of a
common clock, which shows the order and nothing else.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.device.base import Access, Event, Graph, Note, Stream
from gapless.device.faults import Faults
from gapless.device.sim.frame import Frame
from gapless.device.sim.order import Order, Ready
from gapless.device.sim.races import HOST, CallSite, Clock, RaceChecker
from gapless.device.sim.timeline import Span, Timeline
from gapless.errors import InternalError

POISON = -1_163_005_939  # what released int32 memory holds: no token, no row, no block
TICK = 1e-6  # virtual seconds that everything takes where no cost is given
_NOT_SITES = ("/device/sim/", "/numpy/", "/torch/")  # code that a call site is not in


@dataclass(slots=True, eq=False)
class _Mark:
    """One record of an event."""

    name: str
    clock: Clock = field(default_factory=list[int])
    reached: bool = False
    at: float = 0.0
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class _Work:
    run: Callable[[], None]
    note: Note
    clock: Clock
    queued_at: float
    site: CallSite


@dataclass(slots=True, eq=False)
class _Record:
    mark: _Mark
    queued_at: float


@dataclass(slots=True, eq=False)
class _Wait:
    mark: _Mark


class SimEvent:
    """Refers to its latest record."""

    def __init__(self, device: SimDevice, name: str) -> None:
        self.name = name
        self.mark: _Mark | None = None
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
        self.queue: deque[_Work | _Record | _Wait] = deque()
        self.free_at = 0.0
        self.faults = Faults()
        self.queued = 0  # pieces of work so far: the epoch of the newest one, less 1
        self._device = device

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        note = note or Note("work", -1, "")
        self._device.host_prepares(note)
        self.queued += 1
        clock = self._device.checker.fork(0)
        self.queue.append(_Work(work, note, clock, self._device.now, call_site()))

    def record(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        self._device.host_acts()
        mark = event.mark = _Mark(event.name)
        self._device.checker.recorded(self.thread, self.queued + 1, event.name)
        self.queue.append(_Record(mark, self._device.now))

    def wait(self, event: Event) -> None:
        assert isinstance(event, SimEvent)
        self._device.host_acts()
        if event.mark is not None:
            self.queue.append(_Wait(event.mark))


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


class SimDevice:
    """Implements device.base.Device on one thread.

    order             decides what runs next; see order.py.
    captures_graphs   run decode steps padded to buckets, as replays.
    cost              virtual seconds that a piece of work takes; None: ticks.
    host_cost         virtual seconds that the host needs before it queues a piece of work; None: none.
    audit             run each piece of work with everything that it did not declare scrambled; see frame.py.
    """

    name = "sim"

    def __init__(
        self,
        order: Order,
        *,
        captures_graphs: bool = True,
        cost: Callable[[Note], float] | None = None,
        host_cost: Callable[[Note], float] | None = None,
        audit: bool = False,
    ) -> None:
        self.order = order
        self.captures_graphs = captures_graphs
        self.torch_device = torch.device("cpu")
        self.checker = RaceChecker()
        self.timeline = Timeline((HOST,))
        self.now = 0.0  # the host's virtual time
        self.waited = 0.0  # virtual seconds that the host spent waiting
        self._cost = cost
        self._host_cost = host_cost
        self._frame = Frame() if audit else None
        self._streams: list[SimStream] = []
        self._running: tuple[SimStream, _Work] | None = None
        self._pinned_names: dict[int, str] = {}
        self._closed = False

    # ----------------------------------------------------------- the interface

    def stream(self, name: str) -> SimStream:
        stream = SimStream(self, name, self.checker.add_thread(name))
        self.adopt(stream)
        return stream

    def event(self, name: str = "", *, timed: bool = False) -> SimEvent:
        return SimEvent(self, name or "event")

    def pinned(self, size: int, name: str = "") -> torch.Tensor:
        memory = torch.zeros(size, dtype=torch.int32)
        self._pinned_names[memory.data_ptr()] = name or "pinned"
        return memory

    def host_view(self, pinned: torch.Tensor) -> NDArray[np.int32]:
        view = pinned.numpy().view(TrackedArray)
        view.tensor, view.name, view.owner = pinned, self._pinned_names[pinned.data_ptr()], self
        return view

    def capture(
        self, work: Callable[[], None], stream: Stream, accesses: Callable[[], Iterable[Access]] = tuple
    ) -> Graph:
        return SimGraph(work, accesses, self)

    def run_now(self, work: Callable[[], None], stream: Stream) -> None:
        for each in self._streams:
            self._drain(each)
        stream.enqueue(work, Note("start-up", -1, ""))
        assert isinstance(stream, SimStream)
        self._drain(stream)
        if (error := stream.faults.carried()) is not None:
            raise error

    def memory(self) -> tuple[int, int]:
        return 2**33, 2**33

    def peak_bytes(self, *, reset: bool = False) -> int:
        return 0

    def close(self) -> None:
        if not self._closed:
            for stream in self._streams:
                self._drain(stream)
            self._closed = True

    # ------------------------------------------------------------ what it adds

    def adopt(self, stream: SimStream) -> None:
        """Simulate this stream too."""
        self._streams.append(stream)
        self.timeline.lanes.append(stream.name)

    def spend(self, name: str, seconds: float, step: int = -1, slot: str = "") -> None:
        """Let the host take this much virtual time."""
        self.timeline.add(Span(HOST, name, step, slot, self.now, self.now + seconds))
        self.now += seconds

    def moment(self, name: str, step: int = -1, slot: str = "") -> None:
        """Put something that the host does into the timeline."""
        self._tick()
        self.timeline.add(Span(HOST, name, step, slot, self.now, self.now))

    def poison(
        self, tensor: torch.Tensor, name: str, units: NDArray[np.integer] | None = None, value: int = POISON
    ) -> None:
        """Fill released memory with rubbish, as the host's write: its readers must all be known to have ended.

        value  for integers; floats become NaN.
        """
        self.checker.use(0, name, tensor, units, True, "released", call_site())
        rubbish = float("nan") if tensor.is_floating_point() else value
        if units is None:
            tensor.fill_(rubbish)
        else:
            tensor[torch.from_numpy(np.asarray(units, dtype=np.int64))] = rubbish

    @property
    def idle(self) -> bool:
        """Whether nothing is queued."""
        return not any(stream.queue for stream in self._streams)

    # -------------------------------------------------------------- the host

    def host_acts(self) -> None:
        """Before anything the host does: the device may do some of what it has to do."""
        if self._closed:
            raise InternalError("the device is closed")
        self._tick()
        while (ready := self._ready()) and (chosen := self.order.pick(ready, self.now)) is not None:
            self._run(self._streams[ready[chosen].stream])

    def host_prepares(self, note: Note) -> None:
        """Before the host queues a piece of work."""
        if self._host_cost is not None and (seconds := self._host_cost(note)):
            self.spend("prepare", seconds, note.step, note.slot)
        self.host_acts()

    def host_uses(self, tensor: torch.Tensor, name: str, *, write: bool) -> None:
        if not self.checker.knows(0, tensor.data_ptr(), write=write):
            self.host_acts()
            self.checker.use(0, name, tensor, None, write, "host", call_site())

    def host_waits_for(self, event: SimEvent) -> None:
        self.host_acts()
        mark = event.mark
        if mark is None:
            return
        while not mark.reached:
            ready = self._ready()
            if mark.reached:
                break
            if not ready:
                raise InternalError(f"the host waits for {event.name}, which nothing will reach")
            self._run(self._streams[ready[self.order.must_pick(ready)].stream])
        self.checker.join(0, mark.clock)
        if mark.at > self.now:
            self.waited += mark.at - self.now
            self.now = mark.at
        self.timeline.add(Span(HOST, f"waited for {event.name}", -1, "", self.now, self.now))
        if mark.error is not None:
            raise mark.error

    # ------------------------------------------------------------- the streams

    def run_checked(self, work: Callable[[], None], accesses: Callable[[], Iterable[Access]]) -> None:
        """Run work of the piece in hand, booking what it declares."""
        assert self._running is not None
        stream, piece = self._running
        declared: list[Access] = []
        what = f"{piece.note.name} {piece.note.step} {piece.note.slot}".rstrip()
        for access in accesses():
            declared.append(access)
            name, buffer, units, write = access
            self.checker.use(stream.thread, name, buffer, units, write, what, piece.site)
        if self._frame is not None and declared:
            self._frame.run(work, declared, what)
        else:
            work()

    def _ready(self) -> list[Ready]:
        """Heads that may run, with records and waits in front of them out of the way."""
        moved = True
        while moved:
            moved = False
            for stream in self._streams:
                moved |= self._settle(stream)
        return [
            Ready(index, max(stream.free_at, stream.queue[0].queued_at))
            for index, stream in enumerate(self._streams)
            if stream.queue and isinstance(stream.queue[0], _Work)
        ]

    def _settle(self, stream: SimStream) -> bool:
        """Reach the records and pass the waits at the head of a stream. Whether there were any."""
        moved = False
        while stream.queue:
            head = stream.queue[0]
            if isinstance(head, _Record):
                mark = head.mark
                stream.free_at = max(stream.free_at, head.queued_at)
                mark.clock = self.checker.clocks[stream.thread].copy()
                mark.reached, mark.at, mark.error = True, stream.free_at, stream.faults.carried()
            elif isinstance(head, _Wait) and head.mark.reached:
                self.checker.join(stream.thread, head.mark.clock)
                stream.free_at = max(stream.free_at, head.mark.at)
                stream.faults.inherit(head.mark.error)
            else:
                break
            stream.queue.popleft()
            moved = True
        return moved

    def _run(self, stream: SimStream) -> None:
        piece = stream.queue.popleft()
        assert isinstance(piece, _Work)
        checker = self.checker
        checker.clocks[stream.thread][stream.thread] += 1
        checker.join(stream.thread, piece.clock)
        self._tick()
        begin = max(stream.free_at, piece.queued_at)
        stream.free_at = end = begin + TICK if self._cost is None else begin + self._cost(piece.note)
        if self._cost is None:
            begin, stream.free_at = self.now, self.now
            end = self.now + TICK
        note = piece.note
        self.timeline.add(Span(stream.name, note.name, note.step, note.slot, begin, end))
        self._running = (stream, piece)
        try:
            stream.faults.run(lambda: self.run_checked(piece.run, note.accesses))
        finally:
            self._running = None

    def _drain(self, stream: SimStream) -> None:
        """Run until this stream is empty, and let the host know of it."""
        while (ready := self._ready()) or stream.queue:
            if not stream.queue:
                break
            if not ready:
                raise InternalError(f"stream {stream.name} waits for something that will never happen")
            self._run(self._streams[ready[self.order.must_pick(ready)].stream])
        self.checker.join(0, self.checker.clocks[stream.thread])
        self.now = max(self.now, stream.free_at)

    def _tick(self) -> None:
        if self._cost is None:
            self.now += TICK


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
