"""SIGTERM, and signals that come while the program is ending. The library itself installs no handlers."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
_RETRY_SECONDS = 0.1


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt, but nothing in the program goes on after it."""


@contextmanager
def sigterm_raises() -> Generator[None]:
    """Raise Terminated in the main thread on SIGTERM. After that a second signal ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, before)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)


def leave_on_signal() -> None:
    """From now on SIGINT and SIGTERM end the process at once, without waiting for the step in hand."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, _frame: object) -> None:
    os._exit(128 + number)


def _terminate(_number: int, _frame: object) -> None:
    leave_on_signal()
    sys.unraisablehook = _report_unraisable
    signal.signal(signal.SIGALRM, _terminate_again)
    signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS, _RETRY_SECONDS)
    raise Terminated


def _terminate_again(_number: int, _frame: object) -> None:
    """Raise again if the first exception is lost: native code of a library drops what comes while it calls Python."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Terminated):
        error = error.__context__
    if error is None:
        raise Terminated


def _report_unraisable(lost: sys.UnraisableHookArgs) -> None:
    if not issubclass(lost.exc_type, Terminated):
        sys.__unraisablehook__(lost)
