"""What the routes of the server share: its options, the engine behind it, and who counts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gapless.async_llm import AsyncLLM
from gapless.errors import GaplessError
from gapless.outputs import Usage
from gapless.server.config import ServerConfig
from gapless.server.lookahead import LookaheadLease
from gapless.spans import Run

THREADS = 16  # for long prompts and forms
EngineState = Literal["starting", "ready", "restarting", "dead"]


class UnavailableError(GaplessError):
    """No request can be taken now: the engine starts, has died, or the server is being shut down (503)."""


class BusyError(GaplessError):
    """As many requests are open as may be (429)."""


@dataclass(frozen=True, slots=True)
class LiveStats:
    """How the engine stands, and counts since it was started. /debug/stats gives them under these names.

    running, waiting    requests that hold a row, and those that wait for one
    rows                the most that can run at once
    kv_blocks_used, kv_blocks   of the KV cache; blocks that are only kept for the prefix cache are not counted as used
    cached_tokens       prompt tokens found in the prefix cache, of prompt_tokens
    overshoot_rows      rows that were computed for requests which had already ended
    busy_seconds, active_seconds    of the compute stream, and wall time with work: their quotient is the busy share
    host_seconds        the host's own work in steps, without waiting for the device
    """

    lookahead: int
    running: int
    waiting: int
    rows: int
    kv_blocks_used: int
    kv_blocks: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    recomputed_tokens: int
    overshoot_rows: int
    preemptions: int
    failed_steps: int
    busy_seconds: float
    active_seconds: float
    host_seconds: float
    seconds_since_progress: float


class EngineSource(Protocol):
    """The engine as the server sees it: it may have to start, and may be another one after a death."""

    @property
    def state(self) -> EngineState: ...

    @property
    def llm(self) -> AsyncLLM:
        """The engine that runs. Raises UnavailableError."""
        ...

    @property
    def restarts(self) -> int:
        """How often an engine was started in the place of one that had died."""
        ...

    async def stats(self) -> LiveStats:
        """Raises UnavailableError."""
        ...

    async def timeline(self, steps: int) -> Sequence[Run]:
        """The last steps at each lookahead that it ran with. Raises UnavailableError; empty if none are kept."""
        ...

    async def set_lookahead(self, lookahead: int) -> None:
        """Go on with so many steps in flight, 0 to what the engine was built for. Raises ConfigError,
        UnavailableError."""
        ...


class Watch(Protocol):
    """One request, as it goes: told by the code that serves it."""

    def tokens(self, count: int, of: int = 0, times: tuple[float, float] | None = None) -> None:
        """So many new tokens of one continuation came; `of` tells it from the request's others.

        times  time.monotonic() of the first and the last of them; None: all of them came now
        """
        ...

    def ended(self, reason: str, usage: Usage | None) -> None:
        """Once, whatever happened: a finish_reason, "cancelled" (the client left) or "error"."""
        ...


class Observer(Protocol):
    """Counts requests and times for /metrics, logs and spans."""

    def opened(self, request_id: str, endpoint: str, *, traceparent: str | None = None) -> Watch:
        """A request has been queued."""
        ...

    def refused(self, request_id: str, endpoint: str, status: int) -> None:
        """A request got an error status in place of an answer."""
        ...


@dataclass(slots=True)
class Context:
    """Of one server. `app.state.context` has it.

    created    Unix time of the start
    alias      another name of the model
    open       requests that are open
    draining   no new ones are taken
    lookahead  the engine's, which can be another for a while
    forms      lets a part of the threads that requests have wait for forms; the others stay free for long prompts
    """

    config: ServerConfig
    engines: EngineSource
    observer: Observer
    created: int
    alias: str | None = None
    open: int = 0
    draining: bool = False
    lookahead: LookaheadLease = field(init=False)
    forms: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(THREADS * 3 // 4))

    def __post_init__(self) -> None:
        self.lookahead = LookaheadLease(self.engines)

    @property
    def llm(self) -> AsyncLLM:
        """Raises UnavailableError."""
        if self.draining:
            raise UnavailableError("the server is shutting down")
        return self.engines.llm

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may write as `model`. Raises UnavailableError."""
        own = (self.engines.llm.loaded.model_name,)
        return self.config.model_names or (own if self.alias is None else (*own, self.alias))

    def enter(self) -> None:
        """One more request. Raises BusyError, UnavailableError."""
        if self.draining:
            raise UnavailableError("the server is shutting down")
        if self.open >= self.config.max_open:
            raise BusyError(f"{self.open} requests are open, which is all this server takes at a time")
        self.open += 1

    def leave(self) -> None:
        """One request less."""
        self.open -= 1
