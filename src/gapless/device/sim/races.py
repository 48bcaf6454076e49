"""Happens-before: vector clocks of the host and of every stream, and the last uses of every unit of every buffer.

Two uses of a unit, one of them a write, are a race unless something orders them: the order of one stream, the host's
own order, queueing (the host before the work), a wait for an event, or the host's waiting for one. It does not matter
in which order they happened to run: a missing event shows in every run that has both uses.

Source: Lamport, "Time, clocks, and the ordering of events in a distributed system", CACM 1978; the last uses are kept
as (thread, epoch) pairs as in Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

HOST = "host"
MAX_THREADS = 8  # the host and seven streams
Clock = list[int]


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a buffer: by which thread, in which of its epochs, doing what, called from where."""

    thread: str
    epoch: int
    write: bool
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.thread} {'writes' if self.write else 'reads'} ({self.what}, {self.where})"


@dataclass(frozen=True, slots=True)
class Race:
    """Two uses that nothing orders. `missing` names the event that would."""

    buffer: str
    unit: int
    first: Use
    second: Use
    missing: str

    def __str__(self) -> str:
        where = self.buffer if self.unit < 0 else f"{self.buffer} [{self.unit}]"
        return f"race on {where}: {self.first} and {self.second}; missing: {self.missing}"


class _History:
    """The last write of each unit, and each thread's last read since then. Epoch 0 is never."""

    def __init__(self, name: str, units: int) -> None:
        self.name = name
        self.writer = np.zeros(units, dtype=np.int64)
        self.written = np.zeros(units, dtype=np.int64)
        self.read = np.zeros((MAX_THREADS, units), dtype=np.int64)
        self.last: tuple[int, int, bool] | None = None  # of a use of the whole buffer


class RaceChecker:
    """Collects races. Threads are numbered as they are added; 0 is the host."""

    def __init__(self) -> None:
        self.races: list[Race] = []
        self.clocks: list[Clock] = []
        self._threads: list[str] = []
        self._records: list[tuple[list[int], list[str]]] = []
        self._histories: dict[tuple[int, bool], _History] = {}
        self._uses: dict[tuple[int, bool, int, int, bool], Use] = {}
        self.add_thread(HOST)

    def add_thread(self, name: str) -> int:
        """The number of a new thread."""
        number = len(self._threads)
        if number == MAX_THREADS:
            raise ValueError(f"more than {MAX_THREADS - 1} streams")
        self._threads.append(name)
        self.clocks.append([0] * MAX_THREADS)
        self.clocks[number][number] = 1
        self._records.append(([], []))
        return number

    def fork(self, thread: int) -> Clock:
        """What queueing something now hands over. Later uses by this thread are no longer covered by it."""
        clock = self.clocks[thread]
        handed = clock.copy()
        clock[thread] += 1
        return handed

    def join(self, thread: int, clock: Clock) -> None:
        """Everything that `clock` covers happened before what this thread does from now on."""
        self.clocks[thread] = list(map(max, self.clocks[thread], clock))

    def recorded(self, thread: int, epoch: int, event: str) -> None:
        """An event that covers the thread's uses up to `epoch` was recorded."""
        epochs, names = self._records[thread]
        epochs.append(epoch)
        names.append(event)

    def use(
        self,
        thread: int,
        name: str,
        buffer: torch.Tensor,
        units: NDArray[np.integer] | None,
        write: bool,
        what: str,
        where: str,
    ) -> None:
        """Book a use and find the races with earlier ones."""
        clock = self.clocks[thread]
        epoch = clock[thread]
        key = (buffer.data_ptr(), units is None)
        history = self._histories.get(key)
        if history is None:
            history = self._histories[key] = _History(name, 1 if units is None else buffer.shape[0])
        if units is None:
            if history.last == (thread, epoch, write):
                return
            history.last = (thread, epoch, write)
            index: NDArray[np.integer] = np.zeros(1, dtype=np.int64)
        elif units.size == 0:
            return
        else:
            index = units
        use_key = (*key, thread, epoch, write)
        if use_key not in self._uses:
            self._uses[use_key] = Use(self._threads[thread], epoch, write, what, where)
        now = np.asarray(clock)
        writer, written = history.writer[index], history.written[index]
        late = written > now[writer]
        if late.any():
            at = int(np.argmax(late))
            self._report(history, key, int(index[at]), (int(writer[at]), int(written[at]), True), use_key)
        if write:
            unordered = history.read[:, index] > now[:, None]
            if unordered.any():
                reader, at = np.unravel_index(int(np.argmax(unordered)), unordered.shape)
                seen = int(history.read[reader, index[at]])
                self._report(history, key, int(index[at]), (int(reader), seen, False), use_key)
            history.writer[index] = thread
            history.written[index] = epoch
            history.read[:, index] = 0
        else:
            history.read[thread, index] = epoch

    def _report(
        self,
        history: _History,
        key: tuple[int, bool],
        unit: int,
        earlier: tuple[int, int, bool],
        later: tuple[int, bool, int, int, bool],
    ) -> None:
        first, second = self._uses[(*key, *earlier)], self._uses[later]
        missing = self._missing(earlier[0], earlier[1], later[2], later[3])
        self.races.append(Race(history.name, -1 if key[1] else unit, first, second, missing))

    def _missing(self, first: int, first_epoch: int, second: int, second_epoch: int) -> str:
        """The event that would order the two uses."""
        if first == 0:  # the host came first but was not seen by work that was already queued
            event = self._event_after(second, second_epoch)
            return f"the host must wait for {event} on {self._threads[second]} before it does this"
        event = self._event_after(first, first_epoch)
        return f"{self._threads[second]} must wait for {event} on {self._threads[first]}"

    def _event_after(self, thread: int, epoch: int) -> str:
        epochs, names = self._records[thread]
        at = bisect_left(epochs, epoch)
        return names[at] if at < len(names) else "an event (none was recorded afterwards)"
