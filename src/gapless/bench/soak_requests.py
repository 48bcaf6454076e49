"""The long run through the whole path: tasks on an event loop, AsyncLLM, the engine's thread, and a device that does
nothing but run out of memory now and then.

Each of a bounded number of tasks asks for one thing after the other: it reads an answer to its end, leaves its iterator
after a while, drops it, or is itself cancelled. At the end of a window the tasks let everything end, so that what is
left then is left for good.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, fields

import numpy as np

from gapless.async_llm import AsyncLLM, OutputKind, RequestStream
from gapless.bench.soak import (
    COUNTS,
    WINDOWS,
    CountingDevice,
    Readings,
    count_alive,
    draw_work,
    small_loop,
    soak_config,
)
from gapless.device.base import Event
from gapless.device.null import NullEvent
from gapless.engine.core import Engine
from gapless.errors import OutOfMemoryError
from gapless.loading import LoadedEngine
from gapless.scheduler import SchedulerStats

STEPS_PER_SHORTAGE = 499
_KINDS: tuple[OutputKind, ...] = ("cumulative", "delta", "final")
_QUIET_SECONDS = 0.001


class ScarceDevice(CountingDevice):
    """Every STEPS_PER_SHORTAGE-th step that is waited for has run out of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def event(self, name: str = "", *, timed: bool = False) -> Event:
        return _StepEvent(self) if name.startswith("d2h_done") else super().event(name, timed=timed)


class _StepEvent(NullEvent):
    def __init__(self, device: ScarceDevice) -> None:
        self._device = device

    def synchronize(self) -> None:
        self._device.waits += 1
        if self._device.waits % STEPS_PER_SHORTAGE == 0:
            raise OutOfMemoryError("a shortage that was asked for")


@dataclass(frozen=True, slots=True)
class RequestWindow:
    """What the steps of a window cost, all threads together, and what was alive when its requests had ended.

    cpu_us  microseconds of CPU time of the process per step
    left    records, open requests and rows that are still there: 0, or something was lost
    Otherwise as in soak.Window.
    """

    wall_us: float
    cpu_us: float
    objects: int
    blocks: int
    tensor_bytes: int
    pinned_bytes: int
    resident_bytes: int
    cyclic: int
    left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestReport(Readings[RequestWindow]):
    """What came of a soak of the whole path. `ended` counts what the tasks did with their requests."""

    ended: dict[str, int]
    stats: SchedulerStats


class RequestSoak:
    """Sends requests through an AsyncLLM of its own, and measures."""

    def __init__(self, rows: int, lookahead: int, seed: int = 0) -> None:
        config = soak_config(rows, lookahead)
        self.device = ScarceDevice()
        self.loop, admission = small_loop(config, self.device)
        self.engine = Engine(self.loop, admission, config.stall_seconds)
        self.llm = AsyncLLM.from_loaded(LoadedEngine(self.engine, None, None, "null", "null", config))
        self._tasks = 3 * rows
        self._rng = random.Random(seed)
        self._did: Counter[str] = Counter()
        self._ways: list[Callable[[RequestStream], Awaitable[None]]] = [_read, _read, _leave, _drop, _cancel]

    def run(
        self, steps: int, windows: int = WINDOWS, each: Callable[[int, RequestWindow], None] | None = None
    ) -> RequestReport:
        """Run `steps` steps in equal windows, and those that end each window's requests, after one window more to warm
        up. Ends the engine.

        each  gets the steps so far and every window but the first, as it comes
        """
        return asyncio.run(self._run(-(-steps // windows), windows, each))

    async def _run(self, size: int, windows: int, each: Callable[[int, RequestWindow], None] | None) -> RequestReport:
        readings = np.zeros((windows + 1, len(fields(RequestWindow))))  # made here, so that none adds to those after it
        async with self.llm:
            for number, reading in enumerate(readings):
                begun, wall, cpu = self._steps, time.perf_counter(), time.process_time()
                await self._churn(begun + size)
                steps = self._steps - begun
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                reading[:] = wall / steps * 1e6, cpu / steps * 1e6, *count_alive(self.device), self._count_left()
                if each is not None and number:
                    each(number * size, _window(reading.tolist()))
        return RequestReport(
            window_steps=size,
            windows=[_window(reading) for reading in readings[1:].tolist()],
            ended=dict(self._did),
            stats=self.engine.stats().scheduler,
        )

    @property
    def _steps(self) -> int:
        return self.loop.scheduler.stats.steps

    async def _churn(self, until: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._tasks):
                group.create_task(self._ask(until))
        while self.engine.stats().seconds_since_progress or not self.engine.outputs.empty():
            await asyncio.sleep(_QUIET_SECONDS)
        await asyncio.sleep(_QUIET_SECONDS)  # the last record is delivered

    async def _ask(self, until: int) -> None:
        while self._steps < until:
            prompt, params = draw_work(self._rng)
            way = self._rng.choice(self._ways)
            self._did[way.__name__.removeprefix("_")] += 1
            await way(self.llm.generate(prompt.tolist(), params, output_kind=self._rng.choice(_KINDS)))

    def _count_left(self) -> int:
        rows = self.loop.scheduler.num_running + self.loop.scheduler.num_waiting
        return self.llm.num_open + self.engine.outputs.qsize() + rows


def _window(reading: list[float]) -> RequestWindow:
    wall, cpu, *counts = reading
    return RequestWindow(round(wall, 1), round(cpu, 1), *map(int, counts))


async def _read(stream: RequestStream) -> None:
    async for _ in stream:
        pass


async def _leave(stream: RequestStream) -> None:
    async for _ in stream:
        break
    await stream.aclose()


async def _drop(stream: RequestStream) -> None:
    """The caller's reference is the last one: the iterator is dropped when this returns."""
    async for _ in stream:
        break


async def _cancel(stream: RequestStream) -> None:
    task = asyncio.create_task(_read(stream))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


def as_json(report: RequestReport) -> dict[str, object]:
    """What `gapless bench soak --whole-path --json` prints last."""
    return {
        "steps": report.steps,
        "windows": [asdict(window) for window in report.windows],
        "growth_per_100k": {name: round(report.growth_per_100k(name), 1) for name in COUNTS},
        "requests": report.ended,
        "stats": asdict(report.stats),
    }
