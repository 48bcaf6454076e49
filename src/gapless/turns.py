"""Who reads the engine's outputs: calls of many threads, one after the other, in the order in which they came."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager

from gapless.errors import InvalidRequestError

LOOK_SECONDS = 0.5  # between two looks at the engine of a call that waits: who has the turn may never look again
UNREAD_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Turn:
    """One call's place in the line. A call is a generator, which may be read and closed by any thread."""

    def __init__(self) -> None:
        self.reader = threading.current_thread()
        self._left_at: float | None = None

    @contextmanager
    def away(self) -> Generator[None]:
        """While the caller has what was read."""
        self._left_at = time.monotonic()
        yield
        self._left_at = None
        self.reader = threading.current_thread()

    @property
    def unread_seconds(self) -> float:
        left_at = self._left_at
        return 0.0 if left_at is None else time.monotonic() - left_at


class TurnLine:
    """Gives turns first come, first served.

    unread_seconds  a call that waits says so in the log, once, when the one before it has not been read for so long
    """

    def __init__(self, unread_seconds: float = UNREAD_SECONDS) -> None:
        self._unread_seconds = unread_seconds
        self._changed = threading.Condition()
        self._line: deque[Turn] = deque()  # the first has the turn

    def __len__(self) -> int:
        return len(self._line)

    @contextmanager
    def turn(self, check: Callable[[], None]) -> Generator[Turn]:
        """Wait for the turn and have it. `check` is called now and then while waiting and may raise.

        Raises InvalidRequestError if this thread has read the call that has the turn, which could then never end.
        """
        mine = Turn()
        try:
            with self._changed:
                if self._line and self._line[0].reader is mine.reader:
                    raise InvalidRequestError(
                        "this thread has an unfinished stream of this LLM: finish it or close() it first"
                    )
                self._line.append(mine)
                self._wait_for(mine, check)
            yield mine
        finally:
            with self._changed:
                if mine in self._line:
                    self._line.remove(mine)
                    self._changed.notify_all()

    def _wait_for(self, mine: Turn, check: Callable[[], None]) -> None:
        told = False
        while (first := self._line[0]) is not mine:
            self._changed.wait(LOOK_SECONDS)
            check()
            if not told and first.unread_seconds > self._unread_seconds:
                told = True
                _log.warning(
                    "a call of thread %s waits for a stream that thread %s has not read for %.0f s: an unfinished "
                    "stream keeps its turn until it is read to its end or closed",
                    mine.reader.name,
                    first.reader.name,
                    first.unread_seconds,
                )
