"""CUDA streams, events and graphs. The only file that touches torch.cuda."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.device.base import Access, Event, Graph, Note, Stream
from gapless.device.faults import Faults
from gapless.errors import ConfigError, InternalError, OutOfMemoryError


class CudaEvent:
    def __init__(self, *, timed: bool) -> None:
        self.raw = torch.cuda.Event(enable_timing=timed)
        self.error: BaseException | None = None

    def synchronize(self) -> None:
        self.raw.synchronize()
        if self.error is not None:
            raise self.error

    def done(self) -> bool:
        return self.raw.query()

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, CudaEvent):
            raise InternalError("seconds_since needs two events of the cuda device")
        return earlier.raw.elapsed_time(self.raw) / 1000.0


class CudaStream:
    """Work raises on the host, while it is enqueued; it is kept for the events, as if the device had raised it."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.raw = torch.cuda.Stream(device)
        self.faults = Faults()

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        with torch.cuda.stream(self.raw):
            self.faults.run(work)

    def record(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        event.error = self.faults.error
        event.raw.record(self.raw)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.faults.inherit(event.error)
        self.raw.wait_event(event.raw)


class CudaDevice:
    """Implements device.base.Device on one NVIDIA (or, through ROCm's torch, AMD) GPU."""

    captures_graphs = True

    def __init__(self, torch_device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("device cuda was asked for, but torch sees no CUDA device")
        index = torch_device.index if ":" in str(torch_device) else torch.cuda.current_device()
        if index >= torch.cuda.device_count():
            raise ConfigError(f"there is no device cuda:{index}; torch sees {torch.cuda.device_count()}")
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(self.torch_device)
        torch.cuda.set_device(self.torch_device)
        self._graph_pool = torch.cuda.graph_pool_handle()
        self._streams: list[CudaStream] = []

    def stream(self, name: str) -> CudaStream:
        stream = CudaStream(name, self.torch_device)
        self._streams.append(stream)
        return stream

    def event(self, name: str = "", *, timed: bool = False) -> CudaEvent:
        return CudaEvent(timed=timed)

    def pinned(self, size: int, name: str = "") -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, pin_memory=True)

    def host_view(self, pinned: torch.Tensor) -> NDArray[np.int32]:
        return pinned.numpy()

    def capture(
        self, work: Callable[[], None], stream: Stream, accesses: Callable[[], Iterable[Access]] = tuple
    ) -> Graph:
        assert isinstance(stream, CudaStream)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.torch_device)
        # A garbage collection in mid-capture may free an older engine's graphs, which CUDA does not permit then.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self._graph_pool, stream=stream.raw, capture_error_mode="thread_local"):
                work()
        finally:
            if collecting:
                gc.enable()
        return graph

    def run_now(self, work: Callable[[], None], stream: Stream) -> None:
        assert isinstance(stream, CudaStream)
        torch.cuda.synchronize(self.torch_device)
        done = self.event()
        stream.enqueue(work)
        stream.record(done)
        try:
            done.synchronize()
        except OutOfMemoryError:
            self.recover()
            raise

    def recover(self) -> None:
        for stream in self._streams:
            stream.faults.recover()

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return free + cached, total

    def peak_bytes(self, *, reset: bool = False) -> int:
        peak = torch.cuda.max_memory_allocated(self.torch_device)
        if reset:
            torch.cuda.reset_peak_memory_stats(self.torch_device)
        return peak

    def release(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()

    def close(self) -> None:
        torch.cuda.synchronize(self.torch_device)
