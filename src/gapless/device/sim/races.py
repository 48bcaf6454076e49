"""Happens-before: vector clocks of the host and of every stream, and the last uses of every unit of every buffer.

Two uses of a unit, one of them a write, are a race unless something orders them: the order of one stream, the host's
own order, queueing (the host before the work), a wait for an event, or the host's waiting for one. A use of a whole
buffer is one of all its units. It does not matter in which order they happened to run: a missing event shows in every
run that has both uses.

Source: Lamport, "Time, clocks, and the ordering of events in a distributed system", CACM 1978; the last uses are kept
as (thread, epoch) pairs as in Flanagan and Freund, "FastTrack", PLDI 2009.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from types import CodeType

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.errors import InternalError

HOST = "host"
MAX_THREADS = 8  # the host and seven streams
Clock = list[int]
CallSite = tuple[tuple[CodeType, int], ...]
"""The code that was running and its line, then those of its caller."""
_Key = tuple[int, bool, int, int, bool]  # address, whole, thread, epoch, write


class OutOfRangeError(InternalError):
    """A use was declared of units that the buffer does not have."""


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
        """file:line function < the same of its caller."""
        return " < ".join(f"{code.co_filename.rsplit('/', 1)[-1]}:{line} {code.co_name}" for code, line in self.site)

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

    def __init__(self, units: int) -> None:
        self.all = np.arange(units)
        self.writer = np.zeros(units, dtype=np.int64)
        self.written = np.zeros(units, dtype=np.int64)
        self.read = np.zeros((MAX_THREADS, units), dtype=np.int64)


class _Book:
    """The same for a buffer as a whole, and for its units since its last write as a whole.

    Holds the buffer, so that its memory is not another buffer's later.
    """

    def __init__(self, name: str, buffer: torch.Tensor) -> None:
        self.name = name
        self.buffer = buffer
        self.begin = buffer.data_ptr()
        self.end = self.begin + buffer.nbytes
        self.writer = 0
        self.written = 0
        self.read = [0] * MAX_THREADS
        self.units: _Units | None = None
        self.last: tuple[int, int, bool] | None = None  # thread, epoch, write of the last use, if it was of the whole


class RaceChecker:
    """Collects races. Threads are numbered as they are added; 0 is the host."""

    def __init__(self) -> None:
        self.races: list[Race] = []
        self.clocks: list[Clock] = []
        self._threads: list[str] = []
        self._records: list[tuple[list[int], list[str]]] = []
        self._books: dict[int, _Book] = {}  # by address
        self._uses: dict[_Key, tuple[str, CallSite, int]] = {}  # what, where, the host's epoch when it was queued
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

    def knows(self, thread: int, buffer: int, *, write: bool) -> bool:
        """Whether the last use of the buffer at this address was the same one of all of it: nothing need be booked."""
        book = self._books.get(buffer)
        return book is not None and book.last == (thread, self.clocks[thread][thread], write)

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
        """Book a use and find the races with earlier ones.

        Raises InternalError if the buffer shares memory with an earlier one without being the same, OutOfRangeError if
        it does not have the units.
        """
        if units is not None:
            if not units.size:
                return
            least, most = min(numbers := units.tolist()), max(numbers)  # few: quicker than numpy
            if least < 0 or most >= buffer.shape[0]:
                wrong = least if least < 0 else most
                raise OutOfRangeError(f"{what} declares {name} [{wrong}], of {buffer.shape[0]}")
        address, epoch = buffer.data_ptr(), self.clocks[thread][thread]
        book = self._books.get(address)
        if book is None or book.buffer is not buffer:
            book = self._book_of(name, buffer)
        key = (address, units is None, thread, epoch, write)
        if key not in self._uses:
            self._uses[key] = (what, where, self.clocks[thread][0])
        self._compare_whole(book, key)
        if units is None:
            if book.units is not None:
                self._compare_units(book.name, book.units, book.units.all, key)
            book.last = (thread, epoch, write)
            if write:
                book.writer, book.written, book.read, book.units = thread, epoch, [0] * MAX_THREADS, None
            else:
                book.read[thread] = epoch
        else:
            if book.units is None:
                book.units = _Units(buffer.shape[0])
            self._compare_units(book.name, book.units, units, key)
            book.last = None
            if write:
                book.units.writer[units] = thread
                book.units.written[units] = epoch
                book.units.read[:, units] = 0
            else:
                book.units.read[thread, units] = epoch

    def _book_of(self, name: str, buffer: torch.Tensor) -> _Book:
        """The book of this memory, which no other view of it may share in part."""
        new = _Book(name, buffer)
        if not buffer.is_contiguous():
            raise InternalError(f"{name} is not contiguous")
        for book in self._books.values():
            if new.begin < book.end and book.begin < new.end:
                if (new.begin, new.end, buffer.shape[0]) != (book.begin, book.end, book.buffer.shape[0]):
                    raise InternalError(f"{name} overlaps {book.name}: only uses of the same buffer can be compared")
                return book
        self._books[new.begin] = new
        return new

    def _compare_whole(self, book: _Book, later: _Key) -> None:
        """With uses of the buffer as a whole."""
        address, _, thread, _, write = later
        clock = self.clocks[thread]
        if book.written > clock[book.writer]:
            self._report(book.name, -1, (address, True, book.writer, book.written, True), later)
        if write:
            for reader, seen in enumerate(book.read):
                if seen > clock[reader]:
                    self._report(book.name, -1, (address, True, reader, seen, False), later)
                    break

    def _compare_units(self, name: str, units: _Units, index: NDArray[np.integer], later: _Key) -> None:
        """With uses of these units."""
        address, _, thread, _, write = later
        now = np.asarray(self.clocks[thread])
        writer, written = units.writer[index], units.written[index]
        late = written > now[writer]
        if late.any():
            at = int(late.argmax())
            earlier = (address, False, int(writer[at]), int(written[at]), True)
            self._report(name, int(index[at]), earlier, later)
        if write:
            read = units.read[:, index]
            unordered = read > now[:, None]
            if unordered.any():
                reader, at = divmod(int(unordered.argmax()), index.size)
                earlier = (address, False, reader, int(read[reader, at]), False)
                self._report(name, int(index[at]), earlier, later)

    def _report(self, name: str, unit: int, earlier: _Key, later: _Key) -> None:
        self.races.append(Race(name, unit, self._use_of(earlier), self._use_of(later), self._missing(earlier, later)))

    def _use_of(self, key: _Key) -> Use:
        _, _, thread, epoch, write = key
        what, site, _ = self._uses[key]
        return Use(self._threads[thread], epoch, write, what, site)

    def _missing(self, earlier: _Key, later: _Key) -> str:
        """The event that would order the two uses, those of two streams as they were queued."""
        if earlier[2] != 0 and later[2] != 0 and self._uses[earlier][2] > self._uses[later][2]:
            earlier, later = later, earlier
        (_, _, first, first_epoch, _), (_, _, second, second_epoch, _) = earlier, later
        if first == 0:  # the host came first but was not seen by work that was already queued
            event = self._event_after(second, second_epoch)
            return f"the host must wait for {event} on {self._threads[second]} before it does this"
        event = self._event_after(first, first_epoch)
        return f"{self._threads[second]} must wait for {event} on {self._threads[first]}"

    def _event_after(self, thread: int, epoch: int) -> str:
        epochs, names = self._records[thread]
        at = bisect_left(epochs, epoch)
        return names[at] if at < len(names) else "an event (none was recorded afterwards)"
