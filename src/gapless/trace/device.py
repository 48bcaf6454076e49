"""A device that writes down when its streams ran what: where the work runs, or by timed events around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.device.base import Access, Device, Event, Graph, Note, Stream
from gapless.engine.build import PLAIN, Parts
from gapless.spans import Span
from gapless.trace.host import HostLane, traced_parts
from gapless.trace.record import Trace

ANCHOR_SECONDS = 1.0  # a device's clock drifts from the host's, and event times are float32


class TracedStream:
    """Implements device.base.Stream around a stream whose work runs on a thread of this process."""

    def __init__(self, inner: Stream, lane: HostLane) -> None:
        self.inner = inner
        self.name = inner.name
        self._lane = lane

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        if note is None:  # not a step's
            self.inner.enqueue(work)
            return
        name, step, slot, spans = self._lane.queues(note), note.step, note.slot, self._lane.spans

        def timed() -> None:
            begin = perf_counter()
            try:
                work()
            finally:
                spans.append(Span(self.name, name, step, slot, begin, perf_counter()))

        self.inner.enqueue(timed, note)

    def record(self, event: Event) -> None:
        self.inner.record(event)

    def wait(self, event: Event) -> None:
        self.inner.wait(event)


class _Piece(NamedTuple):
    lane: str
    note: Note
    begin: Event
    end: Event
    spans: deque[Span]


class EventClock:
    """Turns events into the host's time. Reads those that have been reached, and never waits for one.

    The two clocks are aligned by an anchor, an event that is recorded on a stream with nothing else to do and so is
    reached at once. It is renewed every `anchor_seconds`.

    now  the host's clock, in seconds
    """

    def __init__(
        self, device: Device, *, now: Callable[[], float] = perf_counter, anchor_seconds: float = ANCHOR_SECONDS
    ) -> None:
        self._device = device
        self._now = now
        self._anchor_seconds = anchor_seconds
        self._stream = device.stream("anchor")
        self._pieces: deque[_Piece] = deque()
        self._anchor, self._anchored_at = self._recorded()
        self._next: tuple[Event, float] | None = None

    def add(self, piece: _Piece) -> None:
        self._pieces.append(piece)
        self.read()
        if self._next is None and self._now() - self._anchored_at > self._anchor_seconds:
            self._next = self._recorded()

    def read(self) -> None:
        """Write down what has ended so far."""
        if self._next is not None and self._next[0].done():
            (self._anchor, self._anchored_at), self._next = self._next, None
        while self._pieces and self._anchor.done() and self._pieces[0].end.done():
            lane, note, begin, end, spans = self._pieces.popleft()
            began, ended = (self._anchored_at + each.seconds_since(self._anchor) for each in (begin, end))
            spans.append(Span(lane, note.name, note.step, note.slot, began, ended))

    def _recorded(self) -> tuple[Event, float]:
        event = self._device.event("anchor", timed=True)
        self._stream.record(event)
        return event, self._now()


class EventTimedStream(TracedStream):
    """The same around a stream whose work runs elsewhere, by its clock."""

    def __init__(self, inner: Stream, lane: HostLane, device: Device, clock: EventClock) -> None:
        super().__init__(inner, lane)
        self._device = device
        self._clock = clock

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        if note is None:
            self.inner.enqueue(work)
            return
        shown = note._replace(name=self._lane.queues(note))
        begin, end = (self._device.event(f"trace {edge}", timed=True) for edge in ("begin", "end"))
        self.inner.record(begin)
        self.inner.enqueue(work, note)
        self.inner.record(end)
        self._clock.add(_Piece(self.name, shown, begin, end, self._lane.spans))


class TracedDevice:
    """Implements device.base.Device around another one."""

    def __init__(self, inner: Device, lane: HostLane) -> None:
        self.inner = inner
        self.name = inner.name
        self.torch_device = inner.torch_device
        self.captures_graphs = inner.captures_graphs
        self._lane = lane
        self._clock = None if inner.torch_device.type == "cpu" else EventClock(inner)

    def stream(self, name: str) -> Stream:
        stream = self.inner.stream(name)
        if self._clock is None:
            return TracedStream(stream, self._lane)
        return EventTimedStream(stream, self._lane, self.inner, self._clock)

    def event(self, name: str = "", *, timed: bool = False) -> Event:
        return self.inner.event(name, timed=timed)

    def pinned(self, size: int, name: str = "") -> torch.Tensor:
        return self.inner.pinned(size, name)

    def host_view(self, pinned: torch.Tensor) -> NDArray[np.int32]:
        return self.inner.host_view(pinned)

    def capture(
        self, work: Callable[[], None], stream: Stream, accesses: Callable[[], Iterable[Access]] = tuple
    ) -> Graph:
        return self.inner.capture(work, _inner(stream), accesses)

    def run_now(self, work: Callable[[], None], stream: Stream) -> None:
        self.inner.run_now(work, _inner(stream))

    def recover(self) -> None:
        self.inner.recover()

    def memory(self) -> tuple[int, int]:
        return self.inner.memory()

    def peak_bytes(self, *, reset: bool = False) -> int:
        return self.inner.peak_bytes(reset=reset)

    def release(self) -> None:
        self.inner.release()

    def close(self) -> None:
        self.inner.close()
        if self._clock is not None:
            self._clock.read()


def traced(device: Device, trace: Trace | None) -> tuple[Device, Parts]:
    """The device and the parts to build an engine of, so that this trace sees it; as they are without one."""
    if trace is None:
        return device, PLAIN
    trace.device_name = device.name
    lane = HostLane(trace)
    return TracedDevice(device, lane), traced_parts(lane)


def _inner(stream: Stream) -> Stream:
    return stream.inner if isinstance(stream, TracedStream) else stream
