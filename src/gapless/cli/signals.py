"""How signals end the program. The library itself installs no handlers.

SIGTERM ends it where it is, and nothing is unwound: an exception would be lost or do harm in native code that calls
Python, such as an import of torch. Nothing is lost with it, since results are written line by line, and a signal that
comes in the middle of a line waits for its end.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
SECONDS_TO_LEAVE = 0.01  # that native code gets to return to Python before a lost interrupt comes again

# The interpreter ends by giving every signal its default back: SIGINT would then end the process with another status.
# One that is ignored stays so. Registered before anything heavy is imported, this is the last to be called.
atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def bring_lost_interrupts_back() -> None:
    """A Ctrl-C that falls into a place no exception leaves (a finaliser, a callback of native code) comes again."""
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            before(lost)
            return
        main = threading.main_thread().ident
        again = threading.Timer(SECONDS_TO_LEAVE, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


@contextmanager
def sigterm_leaves(last_words: Callable[[], str] | None = None) -> Generator[None]:
    """On SIGTERM say these words on stderr, if any, and end the process at once with status TERMINATED."""

    def leave(_number: int, _frame: object) -> None:
        with suppress(OSError, ValueError):  # nobody may be listening any more
            if last_words is not None and sys.stderr is not None:
                os.write(sys.stderr.fileno(), f"gapless: {last_words()}\n".encode())
        os._exit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def held_back() -> Generator[None]:
    """SIGINT and SIGTERM take effect when the block ends. A second one does at once: the block may hang in a pipe."""
    held: list[int] = []

    def hold(number: int, _frame: object) -> None:
        held.append(number)
        if len(held) > 1:
            release()

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        while held:
            signal.raise_signal(held.pop())

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SIGINT last: its handler may raise before what comes after it is put back
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, hold)
        yield
    finally:
        release()


def leave_on_sigint() -> None:
    """From now on Ctrl-C ends the process at once: for one that came while the program is ending already."""
    signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(INTERRUPTED))


def leave_interrupted() -> NoReturn:
    """The end of a program that Ctrl-C interrupted."""
    leave_on_sigint()
    behind_echo = "\n" if sys.stderr.isatty() else ""  # of ^C, and maybe of half an answer
    sys.stderr.write(f"{behind_echo}gapless: interrupted\n")
    sys.exit(INTERRUPTED)
