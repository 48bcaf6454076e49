"""The host as a device: every stream is a worker thread with a first-in-first-out queue, so overlap is real."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.device.base import Access, Event, Graph, Note, Stream
from gapless.device.faults import Faults
from gapless.errors import InternalError, OutOfMemoryError

MAX_CPU_MEMORY = 2**40  # stands in where the system does not tell


class _Mark:
    """One record of an event: fires once, carrying the error of its stream if there is one."""

    __slots__ = ("error", "fired", "reached_at")

    def __init__(self) -> None:
        self.fired = threading.Event()
        self.error: BaseException | None = None
        self.reached_at = 0.0

    def fire(self, error: BaseException | None) -> None:
        self.error = error
        self.reached_at = time.perf_counter()
        self.fired.set()


class CpuEvent:
    """Refers to the latest mark; earlier ones stay with the waits that were issued for them, as in CUDA."""

    def __init__(self) -> None:
        self.mark: _Mark | None = None

    def synchronize(self) -> None:
        if self.mark is not None:
            self.mark.fired.wait()
            if self.mark.error is not None:
                raise self.mark.error

    def done(self) -> bool:
        return self.mark is None or self.mark.fired.is_set()

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, CpuEvent) or self.mark is None or earlier.mark is None:
            raise InternalError("seconds_since needs two recorded events of the cpu device")
        return self.mark.reached_at - earlier.mark.reached_at


class CpuStream:
    """A worker thread. After an error it skips work but keeps firing events, so that nobody waits for ever."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.faults = Faults()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"gapless-{name}", daemon=True)
        self._thread.start()

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        if self._closed:
            raise InternalError(f"stream {self.name} is closed")
        self._queue.put(lambda: self.faults.run(work))

    def record(self, event: Event) -> None:
        assert isinstance(event, CpuEvent)
        mark = event.mark = _Mark()
        self._queue.put(lambda: mark.fire(self.faults.error))

    def wait(self, event: Event) -> None:
        assert isinstance(event, CpuEvent)
        mark = event.mark
        if mark is not None:
            self._queue.put(lambda: self._wait_for(mark))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while (task := self._queue.get()) is not None:
                task()

    def _wait_for(self, mark: _Mark) -> None:
        mark.fired.wait()
        self.faults.inherit(mark.error)


class CpuGraph:
    """Capture is a no-op: a replay calls the function."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


class CpuDevice:
    """Implements device.base.Device without an accelerator."""

    name = "cpu"

    def __init__(self, *, captures_graphs: bool = False) -> None:
        """captures_graphs: run decode steps padded to buckets, as on a GPU. It only costs here; tests want it."""
        self.captures_graphs = captures_graphs
        self.torch_device = torch.device("cpu")
        self._streams: list[CpuStream] = []

    def stream(self, name: str) -> CpuStream:
        stream = CpuStream(name)
        self._streams.append(stream)
        return stream

    def event(self, name: str = "", *, timed: bool = False) -> CpuEvent:
        return CpuEvent()

    def pinned(self, size: int, name: str = "") -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def host_view(self, pinned: torch.Tensor) -> NDArray[np.int32]:
        return pinned.numpy()

    def capture(
        self, work: Callable[[], None], stream: Stream, accesses: Callable[[], Iterable[Access]] = tuple
    ) -> Graph:
        return CpuGraph(work)

    def run_now(self, work: Callable[[], None], stream: Stream) -> None:
        event = self.event()
        stream.enqueue(work)
        stream.record(event)
        try:
            event.synchronize()
        except OutOfMemoryError:
            self.recover()
            raise

    def recover(self) -> None:
        for stream in self._streams:
            stream.faults.recover()

    def memory(self) -> tuple[int, int]:
        try:
            page = os.sysconf("SC_PAGE_SIZE")
            return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
        except (ValueError, OSError, AttributeError):
            return MAX_CPU_MEMORY, MAX_CPU_MEMORY

    def peak_bytes(self, *, reset: bool = False) -> int:
        return 0

    def release(self) -> None:
        return

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
