"""Runs a server: its socket, its signals, and its end.

SIGTERM or Ctrl-C: no new requests; those that run get drain_seconds to finish, the others end with an error; status 0.
Ctrl-C once more: it ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI

from gapless.errors import ConfigError, EngineDeadError
from gapless.server.answers import dialect_of, reasoning_tag_of
from gapless.server.app import create_app
from gapless.server.config import ServerConfig
from gapless.server.context import THREADS, Context
from gapless.server.logs import ProgressLog, RequestLog, ServerLog
from gapless.server.messages import Start
from gapless.server.observer import ServerObserver
from gapless.server.supervisor import Supervisor, start_message
from gapless.server.telemetry import Spans
from gapless.weights.source import DEMO

__all__ = ["bind", "serve", "start_message"]

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than the proxies in front keep theirs
_GRACE_SECONDS = 2  # for connections to close
_DRAIN_LOOK_SECONDS = 0.05
_LAST_WORDS_SECONDS = 5.0  # for answers to be told that they end
_log = logging.getLogger(__name__)


def bind(config: ServerConfig) -> socket.socket:
    """The socket to listen at, before anything is loaded. Raises ConfigError, also for a parser that there is not."""
    dialect_of(None, config.tool_parser)
    reasoning_tag_of(None, config.reasoning_parser)
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sends at once on these alone
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((config.host, config.port))
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"can not listen at {config.host}:{config.port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def serve(start: Start, config: ServerConfig, listener: socket.socket, otlp_endpoint: str | None = None) -> None:
    """Serve until a signal comes.

    otlp_endpoint  where spans go; None: where OpenTelemetry's environment says, if anywhere.

    Raises GaplessError if the model can not be loaded or the engine is dead for good; ConfigError for an endpoint
    without OpenTelemetry; KeyboardInterrupt after a second Ctrl-C.
    """
    _allow_many_connections()
    server = _Server(start, config, otlp_endpoint)
    gc.collect()
    gc.freeze()  # a full collection looks at what the modules hold, too: a tenth of a second in which nobody is served
    asyncio.run(server.run(listener))


def http_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """How the application is served: what of HTTP reaches it, and what does not."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        h11_max_incomplete_event_size=config.max_header_bytes,
        backlog=_BACKLOG,
    )


class _Server:
    def __init__(self, start: Start, config: ServerConfig, otlp_endpoint: str | None) -> None:
        self._start = start
        self._config = config
        self._dead = False
        self.supervisor = Supervisor(start, restart=config.restart_engine, on_dead=self._end)
        self._spans = Spans.to(otlp_endpoint, self._model_name)
        self.observer = ServerObserver([RequestLog(), *([] if self._spans is None else [self._spans])])
        self.context = Context(
            config=config,
            engines=self.supervisor,
            observer=self.observer,
            created=int(time.time()),
            alias=start.model if start.model == DEMO else None,
        )
        self._progress = ProgressLog(self.context, self.observer)
        self._asked = asyncio.Event()
        self._now = False
        self._http = _Http(http_config(create_app(self.context), config))

    async def run(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(THREADS, "gapless-work"))
        loop.add_signal_handler(signal.SIGTERM, self._asked.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        engine = asyncio.create_task(self.supervisor.run())
        http = asyncio.create_task(self._http.serve(sockets=[listener]))
        host, port = listener.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        with ServerLog(self._config.log_format):
            _log.info("listening at http://%s; the model is being loaded", where)
            others = [asyncio.create_task(each) for each in (self._announce(f"http://{where}"), self._progress.run())]
            try:
                await self._asked.wait()
                await self._drain()
            finally:
                for each in others:
                    each.cancel()
                await self.supervisor.close()
                await self._finish(http)
                engine.cancel()
                if self._spans is not None:
                    await asyncio.to_thread(self._spans.close)
        if self._now:
            raise KeyboardInterrupt
        if self._dead:
            raise self.supervisor.error or EngineDeadError("the engine has died")

    async def _announce(self, where: str) -> None:
        """Say once that the model is there."""
        while self.supervisor.state == "starting":
            await asyncio.sleep(_DRAIN_LOOK_SECONDS)
        if self.supervisor.state == "ready":
            loaded = self.supervisor.llm.loaded
            _log.info("%s is loaded on %s, ready at %s", loaded.model_name, loaded.device_name, where)

    def _model_name(self) -> str:
        names = self._config.model_names
        return names[0] if names else self._start.model

    def _end(self) -> None:
        """The engine is dead for good."""
        self._dead = True
        self._asked.set()

    def _interrupt(self) -> None:
        self._now = self._asked.is_set()
        if self._now:
            self.supervisor.kill()
            self._http.force_exit = True
        self._asked.set()

    async def _drain(self) -> None:
        """Take nothing new, and let what runs finish."""
        self.context.draining = True
        until = time.monotonic() + (0.0 if self._dead else self._config.drain_seconds)
        if self.context.open and not self._dead:
            _log.info(
                "draining: %d open, up to %g s; Ctrl-C ends at once", self.context.open, self._config.drain_seconds
            )
        while self.context.open and time.monotonic() < until and not self._now:
            await asyncio.sleep(_DRAIN_LOOK_SECONDS)

    async def _finish(self, http: asyncio.Task[None]) -> None:
        """Those still open have been told of the engine's end; give their answers a moment to leave."""
        until = time.monotonic() + (0.0 if self._now else _LAST_WORDS_SECONDS)
        while self.context.open and time.monotonic() < until:
            await asyncio.sleep(_DRAIN_LOOK_SECONDS)
        self._http.stop()
        with contextlib.suppress(asyncio.CancelledError):
            await http


class _Http(uvicorn.Server):
    """uvicorn without its signals, and without waking ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopped = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def main_loop(self) -> None:
        await self._stopped.wait()

    def stop(self) -> None:
        """End all connections. Answers that are on their way get _GRACE_SECONDS, but for force_exit."""
        self.should_exit = True
        self._stopped.set()


def _allow_many_connections() -> None:
    """As many open files as the system lets us have: a stream is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
