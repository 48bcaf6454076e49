"""Streams behind a small interface, with CUDA's semantics.

- Work enqueued on one stream runs in order; streams run side by side unless an event orders them.
- `Event` may be recorded again and again. `Stream.wait` and `Event.synchronize` refer to the latest `record` that was
  called before them; an event that was never recorded is no wait at all.
- Work must not be assumed to have run when `enqueue` returns: everything that it touches has to live, unchanged,
  until an event recorded after it has fired.
- An exception in enqueued work surfaces in `Event.synchronize` of every later event of that stream and of those that
  waited for it; what is queued behind it is skipped.
- Running out of memory is such an exception, too, as OutOfMemoryError, but one that `Device.recover` ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Access(NamedTuple):
    """One use of a buffer by queued work. `units` index the buffer's first dimension; None is all of it."""

    name: str
    buffer: torch.Tensor
    units: NDArray[np.integer] | None
    write: bool


class Note(NamedTuple):
    """What a piece of queued work is and what it touches, told by its owner. Only devices that check or draw read it.

    accesses  is called when the work is about to run, since what it touches may stand in its own inputs.
    """

    name: str
    step: int
    slot: str
    accesses: Callable[[], Iterable[Access]] = tuple


class Event(Protocol):
    """A mark in a stream that other streams and the host can wait for."""

    def synchronize(self) -> None:
        """Block the host until the latest record has been reached. Raises what the stream raised."""
        ...

    def done(self) -> bool:
        """Whether the latest record has been reached, without waiting. True if it was never recorded."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Device time between two reached marks, both made with timed=True."""
        ...


class Stream(Protocol):
    """An in-order queue of device work."""

    name: str

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        """Queue `work` behind everything queued so far. It must not synchronise."""
        ...

    def record(self, event: Event) -> None:
        """Let `event` fire once everything queued so far has run."""
        ...

    def wait(self, event: Event) -> None:
        """Hold what is queued from now on until the latest record of `event` has been reached."""
        ...


class Graph(Protocol):
    """Captured device work. It reads and writes the same addresses at every replay."""

    def replay(self) -> None:
        """Run it; to be called inside work enqueued on the stream that it was captured for."""
        ...


class Device(Protocol):
    """One accelerator, or the host standing in for one."""

    name: str
    torch_device: torch.device
    captures_graphs: bool

    def stream(self, name: str) -> Stream: ...

    def event(self, name: str = "", *, timed: bool = False) -> Event: ...

    def pinned(self, size: int, name: str = "") -> torch.Tensor:
        """int32[size] host memory that the device can copy from and to asynchronously, zeroed."""
        ...

    def host_view(self, pinned: torch.Tensor) -> NDArray[np.int32]:
        """The pinned memory as the host reads and writes it. Everything the host does to it goes through this."""
        ...

    def capture(
        self, work: Callable[[], None], stream: Stream, accesses: Callable[[], Iterable[Access]] = tuple
    ) -> Graph:
        """Capture `work` as a graph on `stream`. All graphs of a device share one memory pool. Start-up only.

        accesses  what a replay touches, as in Note.
        """
        ...

    def run_now(self, work: Callable[[], None], stream: Stream) -> None:
        """Wait for all that was queued on any stream, then enqueue `work` and wait for it. Start-up only."""
        ...

    def recover(self) -> None:
        """Let streams that have run out of memory run work again. Everything queued must have been waited for."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes that tensors of this device can have."""
        ...

    def peak_bytes(self, *, reset: bool = False) -> int:
        """Most bytes held by tensors since the last reset; 0 where the device does not count."""
        ...

    def release(self) -> None:
        """Give memory back that no tensor has. Nothing may run."""
        ...

    def close(self) -> None:
        """Finish what is queued and end the streams. Further work is refused."""
        ...
