"""An EngineSource that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

from gapless.async_llm import AsyncLLM
from gapless.errors import ConfigError
from gapless.server.config import ServerConfig
from gapless.server.context import Context, EngineState, LiveStats, Observer, UnavailableError
from gapless.spans import Run, Span

QUIET = LiveStats(
    lookahead=1,
    running=0,
    waiting=0,
    rows=8,
    kv_blocks_used=0,
    kv_blocks=100,
    steps=0,
    prompt_tokens=0,
    cached_tokens=0,
    generated_tokens=0,
    recomputed_tokens=0,
    overshoot_rows=0,
    preemptions=0,
    failed_steps=0,
    busy_seconds=0.0,
    active_seconds=0.0,
    host_seconds=0.0,
    seconds_since_progress=0.0,
)
BUSY = replace(
    QUIET,
    running=6,
    waiting=2,
    kv_blocks_used=25,
    steps=50,
    prompt_tokens=400,
    cached_tokens=100,
    generated_tokens=300,
    overshoot_rows=3,
    preemptions=1,
    busy_seconds=1.5,
    active_seconds=2.0,
    host_seconds=0.25,
)


class _Engine:
    """As much of an AsyncLLM as is looked at without a request."""

    def __init__(self) -> None:
        self.loaded = SimpleNamespace(model_name="tiny", device_name="a device")


@dataclass
class FakeEngines:
    """`questions` counts how often it was asked for its figures."""

    now: LiveStats = BUSY
    state: EngineState = "ready"
    questions: int = 0
    restarts: int = 0
    most: int = 1
    engine: Any = field(default_factory=_Engine)

    def restart(self, now: LiveStats) -> None:
        """Another engine takes over, and has got as far as this."""
        self.engine, self.now = _Engine(), now
        self.restarts += 1

    @property
    def llm(self) -> AsyncLLM:
        self._check()
        return cast("AsyncLLM", self.engine)

    async def stats(self) -> LiveStats:
        self._check()
        self.questions += 1
        await asyncio.sleep(0)
        return self.now

    async def timeline(self, steps: int) -> Sequence[Run]:
        self._check()
        spans = [Span("host", "plan", step, "AB"[step % 2], step, step + 0.5) for step in range(steps)]
        return [Run("lookahead 1", "a device", ["host"], spans)]

    async def set_lookahead(self, lookahead: int) -> None:
        self._check()
        if lookahead > self.most:
            raise ConfigError(f"lookahead must be at most {self.most}")
        self.now = replace(self.now, lookahead=lookahead)

    def _check(self) -> None:
        if self.state != "ready":
            raise UnavailableError("the model is being loaded")


@dataclass
class Clock:
    """Goes when it is told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def context_of(engines: FakeEngines, observer: Observer, config: ServerConfig | None = None) -> Context:
    return Context(config or ServerConfig(), engines, observer, created=1)
