"""Happens-before: vector clocks of the host and of every stream, and the last uses of every unit of every buffer.

Two uses of a unit, one of them a write, are a race unless something orders them: the order of one stream, the host's
own order, queueing (the host before the work), a wait for an event, or the host's waiting for one. It does not matter
in which order they happened to run: a missing event shows in every run that has both uses.

Source: Lamport, "Time, clocks, and the ordering of events in a distributed system", CACM 1978; the last uses are kept
as (thread, epoch) pairs as in Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

import numpy as np
import torch
from numpy.typing import NDArray

HOST = "host"
MAX_THREADS = 8  # the host and seven streams
Clock = list[int]
CallSite = tuple[CodeType, int]
"""The code that was running, and its line."""
_Key = tuple[int, bool, int, int, bool]  # address, whole, thread, epoch, write


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a buffer: by which thread, in which of its epochs, doing what, called from where."""

    thread: str
    epoch: int
    write: bool
    what: str
    site: CallSite

    @property
    def where(self) -> str:
        """file:line function."""
        code, line = self.site
        return f"{code.co_filename.rsplit('/', 1)[-1]}:{line} {code.co_name}"

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


class _Units:
    """The last write of each unit, and each thread's last read since then. Epoch 0 is never."""

    def __init__(self, name: str, units: int) -> None:
        self.name = name
        self.writer = np.zeros(units, dtype=np.int64)
        self.written = np.zeros(units, dtype=np.int64)
        self.read = np.zeros((MAX_THREADS, units), dtype=np.int64)


class _Whole:
    """The same for a buffer that is always used as a whole."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.writer = 0
        self.written = 0
        self.read = [0] * MAX_THREADS
        self.last: tuple[int, int, bool] = (-1, 0, False)  # thread, epoch, write of the last use


class RaceChecker:
    """Collects races. Threads are numbered as they are added; 0 is the host."""

    def __init__(self) -> None:
        self.races: list[Race] = []
        self.clocks: list[Clock] = []
        self._threads: list[str] = []
        self._records: list[tuple[list[int], list[str]]] = []
        self._units: dict[int, _Units] = {}  # by address
        self._wholes: dict[int, _Whole] = {}
        self._uses: dict[_Key, Use] = {}
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

    def uses(self) -> Iterator[tuple[str, Use]]:
        """Every kind of use that was booked, with the buffer's name: one for each epoch."""
        names: dict[int, str] = {address: each.name for address, each in self._wholes.items()}
        names.update((address, each.name) for address, each in self._units.items())
        for key, use in self._uses.items():
            yield names[key[0]], use

    def knows(self, thread: int, buffer: int, *, write: bool) -> bool:
        """Whether the last use of the whole buffer at this address was the same one, so that nothing need be booked."""
        whole = self._wholes.get(buffer)
        return whole is not None and whole.last == (thread, self.clocks[thread][thread], write)

    def use(
        self,
        thread: int,
        name: str,
        buffer: torch.Tensor,
        units: NDArray[np.integer] | None,
        write: bool,
        what: str,
        where: CallSite,
    ) -> None:
        """Book a use and find the races with earlier ones."""
        address, epoch = buffer.data_ptr(), self.clocks[thread][thread]
        key = (address, units is None, thread, epoch, write)
        if units is None:
            self._uses.setdefault(key, Use(self._threads[thread], epoch, write, what, where))
            self._use_whole(address, name, key)
        elif units.size:
            self._uses.setdefault(key, Use(self._threads[thread], epoch, write, what, where))
            self._use_units(address, name, key, buffer.shape[0], units)

    def _use_whole(self, address: int, name: str, key: _Key) -> None:
        whole = self._wholes.get(address)
        if whole is None:
            whole = self._wholes[address] = _Whole(name)
        _, _, thread, epoch, write = key
        whole.last = (thread, epoch, write)
        clock = self.clocks[thread]
        if whole.written > clock[whole.writer]:
            self._report(whole.name, -1, (address, True, whole.writer, whole.written, True), key)
        if write:
            for reader, seen in enumerate(whole.read):
                if seen > clock[reader]:
                    self._report(whole.name, -1, (address, True, reader, seen, False), key)
                    break
            whole.writer, whole.written = thread, epoch
            whole.read = [0] * MAX_THREADS
        else:
            whole.read[thread] = epoch

    def _use_units(self, address: int, name: str, key: _Key, size: int, index: NDArray[np.integer]) -> None:
        units = self._units.get(address)
        if units is None:
            units = self._units[address] = _Units(name, size)
        _, _, thread, epoch, write = key
        now = np.asarray(self.clocks[thread])
        writer, written = units.writer[index], units.written[index]
        late = written > now[writer]
        if late.any():
            at = int(late.argmax())
            earlier = (address, False, int(writer[at]), int(written[at]), True)
            self._report(units.name, int(index[at]), earlier, key)
        if write:
            read = units.read[:, index]
            unordered = read > now[:, None]
            if unordered.any():
                reader, at = divmod(int(unordered.argmax()), index.size)
                earlier = (address, False, reader, int(read[reader, at]), False)
                self._report(units.name, int(index[at]), earlier, key)
            units.writer[index] = thread
            units.written[index] = epoch
            units.read[:, index] = 0
        else:
            units.read[thread, index] = epoch

    def _report(self, name: str, unit: int, earlier: _Key, later: _Key) -> None:
        missing = self._missing(earlier[2], earlier[3], later[2], later[3])
        self.races.append(Race(name, unit, self._uses[earlier], self._uses[later], missing))

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
