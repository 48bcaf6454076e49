"""Starts the engine's process, and starts it once more if it dies."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import Any

from gapless.async_llm import AsyncLLM
from gapless.config import EngineConfig, SchedulerLimits
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.core import EngineStats
from gapless.errors import ConfigError, EngineDeadError, GaplessError
from gapless.loading import Loaded
from gapless.server.context import EngineState, LiveStats, UnavailableError
from gapless.server.messages import Failed, FromEngine, Ready, Start, Wire
from gapless.server.remote import ANSWER_SECONDS, RemoteEngine, error_of
from gapless.spans import Run
from gapless.text.chat import ChatTemplate
from gapless.text.tokenizer import Tokenizer

BACK_OFF_SECONDS = 1.0
FORGIVEN_SECONDS = 600.0  # an engine that died longer ago is no reason not to start it again
WATCH_SECONDS = 5.0
_KILL_SECONDS = 10.0
_PATIENCE = {"stats": 2.0}
_log = logging.getLogger(__name__)


class Supervisor:
    """Implements context.py `EngineSource`. All methods belong to the event loop's thread.

    start    what is told to the engine's process.
    restart  start it again after a death, but for a second one within FORGIVEN_SECONDS.
    on_dead  called when no engine will come any more.
    """

    def __init__(self, start: Start, *, restart: bool = True, on_dead: Callable[[], None] = lambda: None) -> None:
        self._start = start
        self._restart = restart
        self._on_dead = on_dead
        self._llm: AsyncLLM | None = None
        self._engine: RemoteEngine | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._state: EngineState = "starting"
        self._died_at = -FORGIVEN_SECONDS
        self._closing = False
        self._threads = ThreadPoolExecutor(4, "gapless-supervisor")
        self.restarts = 0
        self.error: GaplessError | None = None

    @property
    def state(self) -> EngineState:
        gone = self._state == "ready" and not (self._engine is not None and self._engine.alive)
        return "restarting" if gone else self._state

    @property
    def llm(self) -> AsyncLLM:
        if self.state != "ready" or self._llm is None:
            raise UnavailableError(self._why)
        return self._llm

    @property
    def pid(self) -> int | None:
        """Of the engine's process, None without one."""
        return None if self._process is None else self._process.pid

    async def stats(self) -> LiveStats:
        return _live(await self._ask("stats"), self.llm.loaded.engine.admission.limits)

    async def timeline(self, steps: int) -> Sequence[Run]:
        return await self._ask("timeline", steps)

    async def set_lookahead(self, lookahead: int) -> None:
        await self._ask("lookahead", lookahead)

    async def run(self) -> None:
        """Start the engine, wait for its death, start it again, until that is not to be. Returns after close(), or
        when it is dead for good: `error` says why."""
        while not self._closing and await self._live_once():
            self._state = "restarting"
            self.restarts += 1
            await asyncio.sleep(BACK_OFF_SECONDS)
        if not self._closing:
            self._state = "dead"
            self._on_dead()

    async def _live_once(self) -> bool:
        """One life of an engine. Returns whether there is to be another."""
        try:
            process = await self._launch()
        except GaplessError as error:
            self.error = error
            return False
        except Exception as error:  # noqa: BLE001 - such as no memory or file for another process: it is told
            _log.exception("the engine's process could not be started")
            self.error = EngineDeadError(f"the engine's process could not be started: {error}")
            self.kill()
            return False
        self._state = "ready"
        watch = asyncio.create_task(self._watch(process))
        status = await self._in_thread(process.wait)
        watch.cancel()
        if self._closing:
            return False
        self.error = EngineDeadError(f"the engine's process has ended with status {status}")
        _log.error("%s", self.error)
        again = self._restart and monotonic() - self._died_at >= FORGIVEN_SECONDS
        self._died_at = monotonic()
        self._leave()
        return again

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End a process that has work and does not answer, as one that hangs outside of its engine's steps."""
        patience, silent_since = self._start.config.stall_seconds, None
        while patience:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                if self.llm.num_open:
                    await self._ask("stats")
                silent_since = None
            except UnavailableError:
                silent_since = silent_since or monotonic()
                if monotonic() - silent_since >= patience:
                    _log.error("the engine's process has not answered for %g s: it is ended", patience)
                    process.kill()
                    return

    async def close(self) -> None:
        """End the engine; whoever waits for it gets EngineDeadError."""
        self._closing = True
        was_ready, self._state = self._state == "ready", "dead"
        process = self._process
        self._leave()
        if process is not None:
            if not was_ready:  # it would not look at its socket before the model is loaded
                process.kill()
            try:
                await self._in_thread(process.wait, _KILL_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                await self._in_thread(process.wait)

    def kill(self) -> None:
        """End the engine's process now."""
        if self._process is not None:
            self._process.kill()

    def _leave(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._llm is not None:
            self._llm.loaded.forms.close()
        self._engine = self._llm = None

    async def _launch(self) -> subprocess.Popen[bytes]:
        """A process whose engine is ready. Raises GaplessError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "gapless.server.engine_process", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                    start_new_session=True,  # Ctrl-C at a terminal is for the server alone
                )
            except BaseException:
                ours.close()
                raise
        self._process = process
        wire, read = Wire(ours, FromEngine), False
        try:
            first = await self._in_thread(self._hello, wire)
            read = True
            if self._closing:
                raise EngineDeadError("the engine was closed")
            if isinstance(first, Ready):
                loaded = await self._in_thread(_loaded, wire, first)
                if self._closing:
                    raise EngineDeadError("the engine was closed")
                assert isinstance(loaded.engine, RemoteEngine)
                self._engine = loaded.engine
                self._llm = AsyncLLM.from_loaded(loaded)
                self._llm.attach()
                return process
        except BaseException:
            process.kill()
            wire.close()
            if read:  # else the thread that still reads drops it
                wire.drop()
            raise
        wire.drop()
        status = await self._in_thread(process.wait)
        if isinstance(first, Failed):
            raise error_of(first.error, first.text)
        raise EngineDeadError(f"the engine's process ended with status {status} while it started")

    async def _in_thread(self, work: Callable[..., Any], *arguments: object) -> Any:
        """On a thread of our own: those of the requests may all be taken."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    @property
    def _why(self) -> str:
        return "the server is shutting down" if self._closing else _WHY[self.state]

    def _hello(self, wire: Wire) -> Any:
        try:
            wire.send(self._start)
        except OSError:
            return None
        return wire.receive()

    async def _ask(self, what: str, argument: int = 0) -> Any:
        engine = self._engine
        if engine is None:
            raise UnavailableError(self._why)
        try:
            async with asyncio.timeout(_PATIENCE.get(what, ANSWER_SECONDS)):
                return await asyncio.wrap_future(engine.ask(what, argument))
        except EngineDeadError as error:  # what it says of itself is for the log
            raise UnavailableError(self._why) from error
        except TimeoutError:
            raise UnavailableError("the engine does not answer") from None


_WHY: dict[EngineState, str] = {
    "starting": "the model is being loaded",
    "ready": "the engine has ended",
    "restarting": "the engine has died and is being started again",
    "dead": "the engine has died",
}


@lru_cache(maxsize=1)
def _words(folder: Path, _changed: int) -> tuple[Tokenizer, ChatTemplate]:
    """A tokenizer of our own, read once: an engine that comes after another has the same, if its files are. It takes a
    second, in which no other thread runs. Raises ModelError."""
    words = Tokenizer.from_folder(folder)
    return words, ChatTemplate.of(words)


def _loaded(wire: Wire, ready: Ready) -> Loaded:
    """The engine behind this wire. Raises ModelError."""
    admission = Admission(ready.limits, ModelFacts(ready.vocab_size, ready.eos_token_ids), ready.config.seed)
    words = template = None
    if ready.tokenizer_folder is not None:
        folder = Path(ready.tokenizer_folder)
        words, template = _words(folder, max((each.stat().st_mtime_ns for each in folder.iterdir()), default=0))
    loaded = Loaded(
        engine=RemoteEngine(wire, admission),
        tokenizer=words,
        chat_template=template,
        model_name=ready.model_name,
        device_name=ready.device_name,
        config=ready.config,
    )
    loaded.read_vocabulary()
    return loaded


def _live(stats: EngineStats, limits: SchedulerLimits) -> LiveStats:
    scheduler = stats.scheduler
    return LiveStats(
        lookahead=stats.lookahead,
        running=stats.running,
        waiting=stats.waiting,
        rows=limits.max_rows,
        kv_blocks_used=stats.blocks_used,
        kv_blocks=limits.num_blocks - 1,
        steps=scheduler.steps,
        prompt_tokens=scheduler.prompt_tokens,
        cached_tokens=scheduler.cached_tokens,
        generated_tokens=scheduler.generated_tokens,
        recomputed_tokens=scheduler.recomputed_tokens,
        overshoot_rows=scheduler.overshoot_rows,
        preemptions=scheduler.preemptions,
        failed_steps=scheduler.failed_steps,
        busy_seconds=stats.busy_seconds,
        active_seconds=stats.active_seconds,
        host_seconds=max(0.0, stats.active_seconds - stats.wait_seconds),
        seconds_since_progress=stats.seconds_since_progress,
    )


def start_message(
    model: str, config: EngineConfig, *, load: str, shape: str | None, tokenizer: str | None, timeline: int
) -> Start:
    """What to tell the engine's process. Raises ConfigError."""
    if load not in ("auto", "random"):
        raise ConfigError(f"--load must be auto or random, not {load!r}")
    if shape is not None and load != "random":
        raise ConfigError("a shape has no weights: --shape goes with --load random")
    return Start(model, load, shape, tokenizer, config, timeline)
