"""Counts requests and times them, and tells listeners, such as the log, of each that has ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gapless.outputs import Usage
from gapless.server.context import Context
from gapless.server.latency import Latency
from gapless.server.readings import EngineReadings

TTFT_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INTER_TOKEN_BOUNDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
REQUEST_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# Shown from the start, so that the first of them is seen as one more.
USUAL_ENDS: tuple[str, ...] = ("stop", "length", "cancelled", "error")
USUAL_REFUSALS: tuple[int, ...] = (400, 401, 429, 503)
WITHOUT_ANSWER = ("cancelled", "error")
PROBES = ("/health", "/ready")  # whose 503 is an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request that has ended. It holds nothing of what was said.

    opened   Unix time when it was queued
    reason   a finish_reason, "cancelled" or "error"
    tokens   that came, of all continuations together
    ttft     seconds from `opened` to the first of them; None if none came
    seconds  from `opened` to the end
    """

    request_id: str
    endpoint: str
    traceparent: str | None
    opened: float
    reason: str
    usage: Usage | None
    tokens: int
    ttft: float | None
    seconds: float


class Listener(Protocol):
    """Is told on the event loop, so it must be quick."""

    def ended(self, record: RequestRecord) -> None: ...

    def refused(self, request_id: str, endpoint: str, status: int) -> None: ...


def observer_of(context: Context) -> ServerObserver:
    """The context's; if that is of another kind, a new one that has counted no requests."""
    return context.observer if isinstance(context.observer, ServerObserver) else ServerObserver()


class ServerObserver:
    """The Observer of a server.

    open                         requests that are queued or run
    opened_total                 those and all before
    ended_total, refused_total   by reason, by status
    ttft, inter_token, e2e       seconds to a request's first token; between the tokens of a continuation, the mean of
                                 those that come together; and to the end, of requests that got their answer
    engine                       what the engine says
    """

    def __init__(self, listeners: Sequence[Listener] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.open = 0
        self.opened_total = 0
        self.ended_total: Counter[str] = Counter(dict.fromkeys(USUAL_ENDS, 0))
        self.refused_total: Counter[int] = Counter(dict.fromkeys(USUAL_REFUSALS, 0))
        self.ttft = Latency(TTFT_BOUNDS)
        self.inter_token = Latency(INTER_TOKEN_BOUNDS)
        self.e2e = Latency(REQUEST_BOUNDS)
        self.engine = EngineReadings(clock)
        self._listeners = tuple(listeners)

    def opened(self, request_id: str, endpoint: str, *, traceparent: str | None = None) -> RequestWatch:
        self.open += 1
        self.opened_total += 1
        return RequestWatch(self, request_id, endpoint, traceparent)

    def refused(self, request_id: str, endpoint: str, status: int) -> None:
        if endpoint in PROBES:
            return
        self.refused_total[status] += 1
        for listener in self._listeners:
            listener.refused(request_id, endpoint, status)

    def ended(self, record: RequestRecord) -> None:
        """For RequestWatch."""
        self.open -= 1
        self.ended_total[record.reason] += 1
        if record.reason not in WITHOUT_ANSWER:
            self.e2e.add(record.seconds, 1, self.clock())
        for listener in self._listeners:
            listener.ended(record)


class RequestWatch:
    """The Watch of one request. An end that comes after another one is passed over."""

    __slots__ = (
        "_begin",
        "_endpoint",
        "_last",
        "_observer",
        "_over",
        "_request_id",
        "_tokens",
        "_traceparent",
        "_ttft",
    )

    def __init__(self, observer: ServerObserver, request_id: str, endpoint: str, traceparent: str | None) -> None:
        self._observer = observer
        self._request_id = request_id
        self._endpoint = endpoint
        self._traceparent = traceparent
        self._begin = observer.clock()
        self._last: dict[int, float] = {}
        self._tokens = 0
        self._ttft: float | None = None
        self._over = False

    def tokens(self, count: int, of: int = 0, times: tuple[float, float] | None = None) -> None:
        if count <= 0:
            return
        now, observer = self._observer.clock(), self._observer
        first, last = (now, now) if times is None else times
        if self._ttft is None:
            self._ttft = first - self._begin
            observer.ttft.add(self._ttft, 1, now)
        before = self._last.get(of)
        since, later = (first, count - 1 if first < last else 0) if before is None else (before, count)
        if later:
            observer.inter_token.add((last - since) / later, later, now)
        self._last[of] = last
        self._tokens += count

    def ended(self, reason: str, usage: Usage | None) -> None:
        if self._over:
            return
        self._over = True
        seconds = self._observer.clock() - self._begin
        self._observer.ended(
            RequestRecord(
                request_id=self._request_id,
                endpoint=self._endpoint,
                traceparent=self._traceparent,
                opened=time.time() - seconds,
                reason=reason,
                usage=usage,
                tokens=self._tokens,
                ttft=self._ttft,
                seconds=seconds,
            )
        )
