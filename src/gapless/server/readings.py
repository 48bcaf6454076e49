"""What the engine says of itself, as counts that outlive it, and rates of the last seconds."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from gapless.async_llm import AsyncLLM
from gapless.server.context import EngineSource, LiveStats, UnavailableError

PATIENCE_SECONDS = 2.0  # for an answer of the engine
FRESH_SECONDS = 0.05  # that an answer serves, however many ask
RATE_SECONDS = 10.0  # the shortest time that rates are taken over, once there are readings so old
MAX_SAMPLES = 256


@dataclass(frozen=True, slots=True)
class Totals:
    """LiveStats' counts, over all engines since the server's start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    overshoot_rows: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    busy_seconds: float = 0.0
    active_seconds: float = 0.0
    host_seconds: float = 0.0

    def plus(self, stats: LiveStats) -> Totals:
        """With those of an engine that came after."""
        return Totals(**{name: getattr(self, name) + getattr(stats, name) for name in self.__slots__})

    def at_least(self, other: Totals) -> Totals:
        """The larger of each."""
        return Totals(**{name: max(getattr(self, name), getattr(other, name)) for name in self.__slots__})


class Sample(NamedTuple):
    """Totals at a time, in seconds of a clock."""

    time: float
    totals: Totals


@dataclass(frozen=True, slots=True)
class Rates:
    """Between two samples. None where there was no work to measure it on.

    busy_share         of the wall time with work, how much the compute stream worked
    host_step_seconds  the host's own work for a step, on average
    """

    prompt_tokens_per_second: float
    generated_tokens_per_second: float
    busy_share: float | None
    host_step_seconds: float | None

    @classmethod
    def between(cls, before: Sample, after: Sample) -> Rates:
        old, new = before.totals, after.totals
        seconds = max(after.time - before.time, 1e-9)
        active = new.active_seconds - old.active_seconds
        steps = new.steps - old.steps
        return cls(
            prompt_tokens_per_second=(new.prompt_tokens - old.prompt_tokens) / seconds,
            generated_tokens_per_second=(new.generated_tokens - old.generated_tokens) / seconds,
            busy_share=min((new.busy_seconds - old.busy_seconds) / active, 1.0) if active > 0 else None,
            host_step_seconds=(new.host_seconds - old.host_seconds) / steps if steps else None,
        )


@dataclass(slots=True)
class EngineReadings:
    """The latest of the engine's figures. Of an engine that dies, what it did since the last reading is not counted.

    model_name  of the engine that was read last; empty before the first
    """

    clock: Callable[[], float] = time.monotonic
    totals: Totals = field(default_factory=Totals)
    model_name: str = ""
    _live: LiveStats | str = ""
    _carried: Totals = field(default_factory=Totals)
    _engine: weakref.ref[AsyncLLM] | None = None
    _read_at: float = float("-inf")
    _samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._samples.append(Sample(self.clock(), self.totals))

    async def read(self, engines: EngineSource) -> LiveStats:
        """Ask the engine. Raises UnavailableError, also if it does not answer."""
        async with self._lock:  # answers must be taken in the order in which they were given
            if self.clock() - self._read_at >= FRESH_SECONDS:
                self._live = await self._ask(engines)
            if isinstance(self._live, LiveStats):
                return self._live
            raise UnavailableError(self._live)

    @property
    def sample(self) -> Sample:
        """The latest one; the first is of the start."""
        return self._samples[-1]

    def rates(self) -> Rates:
        """Over the last ten seconds; over more where readings are rarer, over less at first."""
        latest = self.sample
        old_enough = [sample for sample in self._samples if latest.time - sample.time >= RATE_SECONDS]
        return Rates.between(old_enough[-1] if old_enough else self._samples[0], latest)

    async def _ask(self, engines: EngineSource) -> LiveStats | str:
        """A new reading, or why there is none."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                llm = engines.llm
                stats = await engines.stats()
            if engines.llm is not llm:
                return "the engine is being replaced"
        except TimeoutError:
            return "the engine does not answer"
        except UnavailableError as error:
            return str(error)
        finally:
            self._read_at = self.clock()
        self._take(llm, stats)
        return stats

    def _take(self, llm: AsyncLLM, stats: LiveStats) -> None:
        another = self._engine is not None and self._engine() is not llm
        if another or self._carried.plus(stats).steps < self.totals.steps:
            self._carried = self.totals
        self._engine = weakref.ref(llm)
        self.model_name = llm.loaded.model_name
        self.totals = self._carried.plus(stats).at_least(self.totals)
        self._samples.append(Sample(self._read_at, self.totals))
