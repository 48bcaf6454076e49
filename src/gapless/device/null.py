"""A device that does nothing, at once: what remains is the cost of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.device.base import Access, Event, Graph, Note, Stream


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

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
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

    def event(self, name: str = "", *, timed: bool = False) -> Event:
        return NullEvent()

    def pinned(self, size: int, name: str = "") -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def host_view(self, pinned: torch.Tensor) -> NDArray[np.int32]:
        return pinned.numpy()

    def capture(
        self, work: Callable[[], None], stream: Stream, accesses: Callable[[], Iterable[Access]] = tuple
    ) -> Graph:
        return NullGraph()

    def run_now(self, work: Callable[[], None], stream: Stream) -> None:
        pass

    def recover(self) -> None:
        pass

    def memory(self) -> tuple[int, int]:
        return 2**33, 2**33

    def peak_bytes(self, *, reset: bool = False) -> int:
        return 0

    def release(self) -> None:
        return

    def close(self) -> None:
        pass
