"""Processes that compile a grammar first, and are ended by one that never would: what they got done, a thread may do.

A thread can not be stopped, and nothing that the library counts bounds all of its work.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from contextlib import suppress
from typing import IO, Final

from gapless.errors import EngineDeadError
from gapless.grammar.build import STACK, receive, send

MEMORY: Final = STACK + (2 << 30)  # bytes of addresses; a common grammar takes some 100 MB beside its stack


class WorkerError(Exception):
    """The grammar has ended its worker. `late`: it took too long; or too much memory, or too deep a stack."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the process that compiles grammars ended with status {status}")
        self.late = status == -signal.SIGALRM
        self.killed = status < 0


class Workers:
    """As many as grammars are checked at the same time; none before the first one. Callable from any thread.

    They end with close(), when nobody has this object any more, and with this process, however it ends.
    """

    def __init__(self, seconds: float, memory: int = MEMORY) -> None:
        """seconds  for one grammar.
        memory   of one worker, in bytes of addresses.
        """
        self._limits = (str(seconds), str(memory))
        self._tokens = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False
        weakref.finalize(self, _end_all, self._all, self._tokens)

    def check(self, tokens: bytes, source: str) -> str:
        """The library's words for what is wrong with a grammar, "" if nothing is.

        tokens  what pack_tokens() gave, the same in every call.
        Raises WorkerError, and EngineDeadError after close().
        """
        with self._lock:
            worker = self._take(tokens)
        error = worker.ask(source)
        with self._lock:
            if error is not None and not self._closed:
                self._idle.append(worker)
                return error
            status = self._end(worker)
            if self._closed:
                raise EngineDeadError("the engine was closed")
            if worker.ready:  # or the next would fail as well
                self._idle.append(self._start())
        raise WorkerError(status)

    def close(self) -> None:
        """End all of them, now. May be called again."""
        with self._lock:
            self._closed = True
            self._idle.clear()
            _end_all(self._all, self._tokens)

    def _take(self, tokens: bytes) -> _Worker:
        if self._closed:
            raise EngineDeadError("the engine was closed")
        if not self._tokens.tell():
            self._tokens.write(tokens)
            self._tokens.flush()
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            self._end(worker)
        return self._start()

    def _start(self) -> _Worker:
        worker = _Worker(self._tokens.fileno(), self._limits)
        self._all.add(worker)
        return worker

    def _end(self, worker: _Worker) -> int:
        self._all.discard(worker)
        return worker.end()


class _Worker:
    """One process, asked by one thread at a time."""

    def __init__(self, tokens: int, limits: tuple[str, str]) -> None:
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gapless.grammar.worker", str(tokens), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[tokens],
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C at a terminal is for the engine's process alone
        )
        self.ready = False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, source: str) -> str | None:
        """What is wrong with a grammar; None if the process has ended instead."""
        asks, answers = self._process.stdin, self._process.stdout
        assert asks is not None
        assert answers is not None
        try:
            self.ready = self.ready or receive(answers) is not None
            send(asks, source.encode())
            answer = receive(answers)
        except (OSError, ValueError):  # a broken pipe, or end() has closed it
            return None
        return None if answer is None else answer.decode()

    def end(self) -> int:
        """Its exit status: its own if it has ended, or that of being killed."""
        self._process.kill()
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not sent is lost
                pipe.close()
        return status


def _end_all(workers: set[_Worker], tokens: IO[bytes]) -> None:
    while workers:
        workers.pop().end()
    tokens.close()
