"""Streams, events and graphs that run when the simulator says so. No threads and no clock: the order decides all.

What is queued runs only when `Order` picks it, at one of the host's next calls or while the host waits. So a copy
from pinned memory reads what is there when it runs, a graph reads its inputs when it is replayed, and an event that
was not recorded before a wait holds nothing back.

Virtual time: a piece of work starts when its stream is free, its waits are over and the host has queued it, and takes
what `cost` says; `spend` lets the host take its own time. Without a cost every piece of work takes one tick of a
common clock, which shows the order and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.device.base import Access, Graph, Note, Stream
from gapless.device.sim.frame import Frame
from gapless.device.sim.order import Order, Ready
from gapless.device.sim.pinned import TrackedArray
from gapless.device.sim.races import HOST, RaceChecker
from gapless.device.sim.streams import Mark, Record, SimEvent, SimGraph, SimStream, Wait, Work, call_site
from gapless.device.sim.timeline import Timeline
from gapless.errors import InternalError
from gapless.spans import Span

POISON = -1_163_005_939  # what released int32 memory holds: no token, no row, no block
TICK = 1e-6  # virtual seconds that everything takes where no cost is given


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
        self._running: tuple[SimStream, Work] | None = None
        self._pinned_names: dict[int, str] = {}
        self._when = "before any step"  # the host's latest act that belongs to a step
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
        self.audit_too(name or "pinned", memory)
        return memory

    def host_view(self, pinned: torch.Tensor) -> NDArray[np.int32]:
        return cast("NDArray[np.int32]", TrackedArray(pinned, self._pinned_names[pinned.data_ptr()], self))

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
        if (error := stream.faults.error) is not None:
            self.recover()
            raise error

    def recover(self) -> None:
        if not self.idle:
            raise InternalError("the device was to recover with work in flight")
        for stream in self._streams:
            stream.faults.recover()

    def memory(self) -> tuple[int, int]:
        return 2**33, 2**33

    def peak_bytes(self, *, reset: bool = False) -> int:
        return 0

    def release(self) -> None:
        return

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

    def audit_too(self, name: str, buffer: torch.Tensor) -> None:
        """Have the audit, if there is one, hide this buffer from all work that does not declare it."""
        if self._frame is not None:
            self._frame.know(name, buffer)

    def spend(self, name: str, seconds: float, step: int = -1, slot: str = "") -> None:
        """Let the host take this much virtual time. With a step, the host's uses from now on name it."""
        self._acted(name, step)
        self.timeline.add(Span(HOST, name, step, slot, self.now, self.now + seconds))
        self.now += seconds

    def moment(self, name: str, step: int = -1, slot: str = "") -> None:
        """Put something that the host does into the timeline. With a step, the host's uses from now on name it."""
        self._tick()
        self._acted(name, step)
        self.timeline.add(Span(HOST, name, step, slot, self.now, self.now))

    def poison(
        self, tensor: torch.Tensor, name: str, units: NDArray[np.integer] | None = None, value: int = POISON
    ) -> None:
        """Fill released memory with rubbish, as the host's write: its readers must all be known to have ended.

        value  for integers; floats become NaN.
        """
        self.checker.use(0, name, tensor, units, True, f"released: {self._when}", call_site())
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
        self._acted(note.name, note.step)
        if self._host_cost is not None and (seconds := self._host_cost(note)):
            self.spend("prepare", seconds, note.step, note.slot)
        self.host_acts()

    def host_uses(self, tensor: torch.Tensor, name: str, *, write: bool) -> None:
        if not self.checker.knows(0, tensor.data_ptr(), write=write):
            self.host_acts()
            self.checker.use(0, name, tensor, None, write, self._when, call_site())

    def host_polls(self, event: SimEvent) -> bool:
        """Whether the mark is reached, which orders the host behind it. If not, the device goes on: polling ends."""
        self.host_acts()
        mark = event.mark
        if mark is None:
            return True
        if mark.reached:
            self.checker.join(0, mark.clock)
        else:
            self._go_on(mark)
        return mark.reached

    def host_waits_for(self, event: SimEvent) -> None:
        self.host_acts()
        mark = event.mark
        if mark is None:
            return
        while not mark.reached:
            self._go_on(mark)
        self.checker.join(0, mark.clock)
        self._acted(event.name, mark.step)
        begin = self.now
        if mark.at > self.now:
            self.waited += mark.at - self.now
            self.now = mark.at
        self.timeline.add(Span(HOST, f"waited for {event.name}", -1, "", begin, self.now))
        if mark.error is not None:
            raise mark.error

    def _go_on(self, mark: Mark) -> None:
        """Run one more piece of work, unless the mark is reached without."""
        ready = self._ready()
        if mark.reached:
            return
        if not ready:
            raise InternalError(f"the host waits for {mark.name}, which nothing will reach")
        self._run(self._streams[ready[self.order.must_pick(ready)].stream])

    def _acted(self, name: str, step: int) -> None:
        if step >= 0:
            self._when = f"step {step}, after {name}"

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
        if self._frame is not None and accesses is not tuple:  # a graph declares for itself, inside this
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
            if stream.queue and isinstance(stream.queue[0], Work)
        ]

    def _settle(self, stream: SimStream) -> bool:
        """Reach the records and pass the waits at the head of a stream. Whether there were any."""
        moved = False
        while stream.queue:
            head = stream.queue[0]
            if isinstance(head, Record):
                mark = head.mark
                stream.free_at = max(stream.free_at, head.queued_at)
                mark.clock = self.checker.clocks[stream.thread].copy()
                mark.reached, mark.at, mark.error = True, stream.free_at, stream.faults.error
            elif isinstance(head, Wait) and head.mark.reached:
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
        assert isinstance(piece, Work)
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
