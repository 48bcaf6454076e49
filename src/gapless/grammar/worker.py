"""The process of a worker: `python -m gapless.grammar.worker FD SECONDS MEMORY`.

It compiles what it is sent and fills the first mask, and says what was wrong. FD is a file with the tokens. A grammar
that takes longer than SECONDS or more than MEMORY bytes of addresses ends the process; so does the end of its input,
which is that of the engine's process.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from typing import IO

from llguidance import LLMatcher, LLTokenizer

from gapless.grammar.build import limits, receive, send, start_deep, table_of


def check(table: LLTokenizer, source: str) -> str:
    """What is wrong with a grammar, "" if nothing is."""
    matcher = LLMatcher(table, source, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def main() -> None:
    """The alarm ends the process whatever the library does, and even if nobody is left to do it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    fd, seconds, memory = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    asks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    table = table_of(os.pread(fd, os.fstat(fd).st_size, 0), lambda _: [])
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, memory)
    _say(answers, "")
    while (source := receive(asks)) is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        start_deep(threading.Thread(target=_answer, args=(table, source.decode(), answers), daemon=True))
    os._exit(0)  # the library may be at work


def _answer(table: LLTokenizer, source: str, answers: IO[bytes]) -> None:
    try:
        error = check(table, source)
    except BaseException as failure:  # noqa: BLE001 - a panic of the library is no Exception
        error = str(failure) or type(failure).__name__
    signal.setitimer(signal.ITIMER_REAL, 0)
    _say(answers, error)


def _say(answers: IO[bytes], text: str) -> None:
    try:
        send(answers, text.encode())
    except BrokenPipeError:  # nobody is left to hear it
        os._exit(0)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
