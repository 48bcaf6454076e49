"""The engine's process as the server sees it: the same calls as an engine in this process."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from typing import Any

from torch import Tensor

import gapless.errors
from gapless.engine.admission import Admission
from gapless.engine.core import EngineFailure, EngineStats, InFlight
from gapless.errors import ConfigError, EngineDeadError, GaplessError, InternalError, InvalidRequestError
from gapless.outcome import Committed
from gapless.params import SamplingParams
from gapless.request import Request
from gapless.server.messages import (
    Answer,
    Ask,
    Cancel,
    Failed,
    Sent,
    StatsAnswer,
    Step,
    Submit,
    TimelineAnswer,
    Wire,
    encode,
    unpack_step,
)
from gapless.spans import Run

ANSWER_SECONDS = 30.0
_DEFAULTS = SamplingParams()
_PARAMS = tuple(name for name, field in SamplingParams.__dataclass_fields__.items() if field.init)


class RemoteEngine:
    """Implements engine/handle.py `EngineHandle` over a socket. Its messages come in where next_output() is called, so
    one thread calls that all the time; sending has a thread of its own, so no caller waits for the socket."""

    def __init__(self, wire: Wire, admission: Admission) -> None:
        self.admission = admission
        self._wire = wire
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._asked: dict[int, Future[Any]] = {}
        self._numbers = count()
        self._lock = threading.Lock()
        self._error: EngineDeadError | None = None
        self._closed = False
        threading.Thread(target=self._send, name="gapless-to-engine", daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._error is None and not self._closed

    def check_alive(self) -> None:
        if not self.alive:
            raise self._death()

    def submit(self, requests: Iterable[Request]) -> None:
        self.check_alive()
        try:
            data = encode(Submit([pack_request(request) for request in requests]))
        except InternalError as error:  # who asks is to blame, and nobody else is to notice
            raise InvalidRequestError(f"the request holds what can not be passed on: {error}") from error
        self._outbox.put(data)

    def cancel(self, request_ids: Iterable[int]) -> None:
        self._outbox.put(encode(Cancel(list(request_ids))))

    def next_output(self, *, wait: bool = True) -> Committed | EngineFailure | None:
        """Waits until there is one. Raises EngineDeadError once the EngineFailure has been read."""
        if not wait:
            raise InternalError("an engine behind a socket is read by one that waits")
        if self._error is not None:
            raise self._death()
        while True:
            try:
                message = self._wire.receive()
            except InternalError as error:
                message = Failed(type(error).__name__, str(error))
            if isinstance(message, Step):
                return unpack_step(message)
            if isinstance(message, Failed) or message is None:
                return self._die(message)
            self._answered(message)

    def ask(self, what: str, argument: int = 0) -> Future[Any]:
        """Have the engine do something of messages.ASKED. The future has its answer, or a GaplessError."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # who stops waiting must not undo it: its answer comes all the same
        with self._lock:
            number = next(self._numbers)
            if self.alive:
                self._asked[number] = future
                self._outbox.put(encode(Ask(number, what, argument)))
                return future
        future.set_exception(self._death())
        return future

    def stats(self) -> EngineStats:
        return self.ask("stats").result(ANSWER_SECONDS)

    def timeline(self, steps: int) -> list[Run]:
        """The last steps at each lookahead; empty if none are kept."""
        return self.ask("timeline", steps).result(ANSWER_SECONDS)

    def set_lookahead(self, lookahead: int) -> None:
        self.ask("lookahead", lookahead).result()

    def pause(self) -> None:
        self.ask("pause").result()

    def resume(self) -> None:
        self.ask("resume").result()

    def sleep(self) -> None:
        self.ask("sleep").result()

    def wake(self) -> None:
        self.ask("wake").result()

    def update_weights(self, tensors: Mapping[str, Tensor], *, in_flight: InFlight = "finish") -> None:
        raise ConfigError("the weights of an engine in another process can not be updated")

    def request_stop(self) -> None:
        self.close()

    def close(self, wait_seconds: float | None = None) -> None:
        """The process ends when the socket does; nobody waits for it here."""
        self._closed = True
        self._outbox.put(None)
        self._wire.close()

    def _send(self) -> None:
        with suppress(OSError):  # the engine is gone: whoever reads is told
            while (data := self._outbox.get()) is not None:
                self._wire.send_encoded(data)

    def _answered(self, message: Answer | StatsAnswer | TimelineAnswer) -> None:
        future = self._asked.pop(message.number, None)
        if future is None:
            return
        if isinstance(message, StatsAnswer):
            future.set_result(message.stats)
        elif isinstance(message, TimelineAnswer):
            future.set_result(message.runs)
        elif message.error is not None:
            future.set_exception(error_of(message.error, message.text))
        else:
            future.set_result(None)

    def _die(self, last_word: Failed | None) -> EngineFailure:
        if last_word is not None:
            text = last_word.text
        else:
            text = "the engine was closed" if self._closed else "the engine's process has ended"
        with self._lock:
            self._error = EngineDeadError(text)
            asked, self._asked = self._asked, {}
        for future in asked.values():
            future.set_exception(self._death())
        self._outbox.put(None)
        self._wire.drop()
        return EngineFailure(self._error)

    def _death(self) -> EngineDeadError:
        return EngineDeadError("the engine was closed" if self._error is None else str(self._error))


def pack_request(request: Request) -> Sent:
    """For the wire. Stop strings and the form are made again from the parameters."""
    params: dict[str, Any] = {}
    for name in _PARAMS:
        value = getattr(request.params, name)
        if value != getattr(_DEFAULTS, name):
            params[name] = json.dumps(value) if isinstance(value, Mapping) and name == "json_schema" else value
    return Sent(
        request_id=request.request_id,
        prompt=request.prompt.tobytes(),
        params=params,
        max_length=request.max_length,
        stop_ids=request.stop_ids.tobytes(),
        seed=request.seed,
        priority=request.priority,
        salt=request.salt,
        digests=b"".join(request.digests),
        leader=request.leader,
        line=request.line.tobytes(),
        counts=request.counts,
        arguments=request.arguments.tobytes(),
    )


def error_of(name: str, text: str) -> GaplessError:
    """The error that the other side had."""
    kind = getattr(gapless.errors, name, None)
    return kind(text) if isinstance(kind, type) and issubclass(kind, GaplessError) else InternalError(f"{name}: {text}")
