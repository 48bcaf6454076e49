"""A device that does nothing, at once: what remains is the cost of the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gapless.device.base import Event, Graph, Stream


class NullEvent:
    def synchronize(self) -> None:
        pass

    def done(self) -> bool:
        return True

    def seconds_since(self, earlier: Event) -> float:
        return 0.0


class NullStream:
    def __init__(self, name: str) -> None:
        self.name = name

    def enqueue(self, work: Callable[[], None]) -> None:
        pass

    def record(self, event: Event) -> None:
        pass

    def wait(self, event: Event) -> None:
        pass


class NullGraph:
    def replay(self) -> None:
        pass


class NullDevice:
    """Implements device.base.Device. Captured work is dropped, so every sampled token reads as 0."""

    name = "null"
    captures_graphs = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def stream(self, name: str) -> Stream:
        return NullStream(name)

    def event(self, *, timed: bool = False) -> Event:
        return NullEvent()

    def pinned(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def capture(self, work: Callable[[], None], stream: Stream) -> Graph:
        return NullGraph()

    def run_now(self, work: Callable[[], None], stream: Stream) -> None:
        pass

    def memory(self) -> tuple[int, int]:
        return 2**33, 2**33

    def peak_bytes(self, *, reset: bool = False) -> int:
        return 0

    def close(self) -> None:
        pass
