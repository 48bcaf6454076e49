"""A server in this process, over an engine in this process, for tests with real connections."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn

from gapless.async_llm import AsyncLLM
from gapless.loading import LoadedEngine
from gapless.outputs import Usage
from gapless.server.app import create_app
from gapless.server.config import ServerConfig
from gapless.server.context import Context, EngineState, LiveStats, UnavailableError
from gapless.server.run import http_config
from gapless.spans import Run
from support.waiting import eventually

Result = TypeVar("Result")


@dataclass
class Seen:
    """The Observer of a test: what it was told."""

    opened_ids: list[str] = field(default_factory=list[str])
    refusals: list[tuple[str, str, int]] = field(default_factory=list[tuple[str, str, int]])
    watches: list[SeenWatch] = field(default_factory=list["SeenWatch"])

    def opened(self, request_id: str, endpoint: str, *, traceparent: str | None = None) -> SeenWatch:
        self.opened_ids.append(request_id)
        self.watches.append(SeenWatch(request_id, endpoint, traceparent))
        return self.watches[-1]

    def refused(self, request_id: str, endpoint: str, status: int) -> None:
        self.refusals.append((request_id, endpoint, status))


@dataclass(frozen=True)
class Heard:
    """What a watch was told of tokens that came."""

    count: int
    of: int
    first: float
    last: float


@dataclass
class SeenWatch:
    request_id: str
    endpoint: str
    traceparent: str | None
    count: int = 0
    heard: list[Heard] = field(default_factory=list["Heard"])
    ends: list[tuple[str, Usage | None]] = field(default_factory=list[tuple[str, Usage | None]])

    def tokens(self, count: int, of: int = 0, times: tuple[float, float] | None = None) -> None:
        self.count += count
        self.heard.append(Heard(count, of, *(times or (math.nan, math.nan))))

    def ended(self, reason: str, usage: Usage | None) -> None:
        self.ends.append((reason, usage))


class LocalEngine:
    """An EngineSource over an AsyncLLM of this process.

    stalled_seconds  what it says instead of the time without progress.
    defect           what asking for the engine raises, as no engine does.
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        self.loaded = loaded
        self.state: EngineState = "ready"
        self.restarts = 0
        self.stalled_seconds: float | None = None
        self.defect: Exception | None = None
        self._llm = AsyncLLM.from_loaded(loaded)

    @property
    def llm(self) -> AsyncLLM:
        if self.defect is not None:
            raise self.defect
        if self.state != "ready":
            raise UnavailableError("the engine is not ready")
        return self._llm

    async def stats(self) -> LiveStats:
        stats, pool = self.llm.stats(), self._scheduler.pool
        since = stats.seconds_since_progress if self.stalled_seconds is None else self.stalled_seconds
        return LiveStats(
            lookahead=1,
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            rows=self._scheduler.limits.max_rows,
            kv_blocks_used=self.held_blocks,
            kv_blocks=pool.num_usable,
            steps=stats.scheduler.steps,
            prompt_tokens=stats.scheduler.prompt_tokens,
            cached_tokens=stats.scheduler.cached_tokens,
            generated_tokens=stats.scheduler.generated_tokens,
            recomputed_tokens=stats.scheduler.recomputed_tokens,
            overshoot_rows=stats.scheduler.overshoot_rows,
            preemptions=stats.scheduler.preemptions,
            failed_steps=stats.scheduler.failed_steps,
            busy_seconds=stats.busy_seconds,
            active_seconds=stats.active_seconds,
            host_seconds=0.0,
            seconds_since_progress=since,
        )

    async def timeline(self, steps: int) -> Sequence[Run]:
        return []

    async def set_lookahead(self, lookahead: int) -> None:
        self.loaded.engine.set_lookahead(lookahead)

    @property
    def held_blocks(self) -> int:
        """KV blocks that requests hold."""
        pool = self._scheduler.pool
        return pool.num_usable - pool.num_free

    @property
    def _scheduler(self) -> Any:
        return self.loaded.engine._loop.scheduler  # pyright: ignore[reportPrivateUsage]


class RunningServer:
    """At `url`, on an event loop in a thread of its own."""

    def __init__(self, loaded: LoadedEngine, config: ServerConfig) -> None:
        self.engine = LocalEngine(loaded)
        self.observer = Seen()
        self.context = Context(config=config, engines=self.engine, observer=self.observer, created=int(time.time()))
        self._listener = socket.create_server((config.host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://{config.host}:{self.port}"
        self._server = uvicorn.Server(http_config(create_app(self.context), config))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        eventually(lambda: self._server.started)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._listener])

    def run(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """On the server's loop, where its AsyncLLM lives."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(60)

    def stop(self) -> None:
        """End the server, and then its engine."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self.engine._llm.close()  # pyright: ignore[reportPrivateUsage]


@contextmanager
def running_server(loaded: LoadedEngine, **options: Any) -> Generator[RunningServer]:
    """With ServerConfig's options."""
    server = RunningServer(loaded, ServerConfig(**options))
    try:
        yield server
    finally:
        server.stop()


def raw_request(server: RunningServer, head: str, body: bytes = b"") -> bytes:
    """Send as it is, and read until the server closes or has answered."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n" + body)
        found = b""
        while b"\r\n\r\n" not in found and (part := connection.recv(65536)):
            found += part
        return found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ")[1])
