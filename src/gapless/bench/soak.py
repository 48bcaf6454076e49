"""A long run on a device that does nothing: what does the host keep, and does the last step cost what the first did?

A bounded population of requests churns through a real loop: they arrive, are prefilled in chunks, end by length or at
a stop token, are cancelled, and are preempted and recomputed because the KV cache is small. One seed decides it all,
with the same chances at every step. The null device samples nothing but token 0, so a request that has 0 among its
stop tokens ends at its first token, with overshoot behind it, and no other ends before its length.
"""

from __future__ import annotations

import gc
import mmap
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.bench.tiny_model import TinyModel
from gapless.config import EngineConfig
from gapless.device.null import NullDevice
from gapless.engine.admission import Admission, ModelFacts
from gapless.engine.build import build_loop
from gapless.engine.loop import Loop
from gapless.outcome import Committed
from gapless.params import SamplingParams
from gapless.request import FinishReason, Request
from gapless.sampling import make_sampler
from gapless.scheduler import SchedulerStats

TIMES = ("wall_us", "wall_us_p10", "cpu_us")
COUNTS = ("objects", "blocks", "tensor_bytes", "pinned_bytes", "resident_bytes")
WINDOWS = 20
LONG_ENOUGH = 20_000  # steps, to scale what grew; less is still warming up
STEADY_STEPS = 200
_STEADY_LEAD = 20  # steps until the pipeline is full and only decodes
_PROMPTS = (1, 5, 20, 80, 250)  # tokens; a step has room for 64 besides the decoding rows
_NEW_TOKENS = (1, 8, 64, 200, 400)
_CANCELS_PER_STEP = 0.03
_STOPPING = 0.1  # share of requests that end at their first token
_BLOCK_SIZE = 16
_MAX_MODEL_LEN = max(_PROMPTS) + max(_NEW_TOKENS)
_STATM = Path("/proc/self/statm")
AnyWindow = TypeVar("AnyWindow", bound=Any)


@dataclass(frozen=True, slots=True)
class Window:
    """What the steps of a window cost, and what was alive after it, once garbage was collected.

    wall_us         microseconds by the clock of a step and its intake: the median
    wall_us_p10     the same of the fastest tenth, its upper end: the least disturbed by what else the machine does
    cpu_us          the thread's CPU time of a step and its intake: the mean, so that rare expensive steps count
    objects         objects that the garbage collector tracks
    blocks          blocks of memory that Python's allocator has lent: small objects of any kind
    tensor_bytes    storages of all plain tensors, those of the "device" included
    pinned_bytes    pinned memory that the device has ever lent
    resident_bytes  memory of the process, 0 where the system does not tell
    cyclic          objects that the window left in reference cycles
    """

    wall_us: float
    wall_us_p10: float
    cpu_us: float
    objects: int
    blocks: int
    tensor_bytes: int
    pinned_bytes: int
    resident_bytes: int
    cyclic: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings(Generic[AnyWindow]):
    """All windows of a run; its start and its end are the means of their first and their last quarter."""

    window_steps: int
    windows: list[AnyWindow]

    @property
    def steps(self) -> int:
        return self.window_steps * len(self.windows)

    def growth(self, field: str) -> float:
        """How much more there is of a field of a window at the end than at the start."""
        start, end = self._start_and_end(field)
        return end - start

    def growth_per_100k(self, field: str) -> float:
        """The growth from the middle of the first quarter to that of the last, scaled to 100,000 steps."""
        return self.growth(field) * 100_000 / (self.window_steps * (len(self.windows) - self._quarter))

    def growth_text(self) -> str:
        """What grew, as counted and per 100,000 steps, if there were LONG_ENOUGH."""
        names = ("objects", "blocks", "tensor_bytes", "pinned_bytes")

        def listed(growth: Callable[[str], float]) -> str:
            return ", ".join(f"{growth(name):+.0f} {name.replace('_', ' ')}" for name in names)

        if self.steps < LONG_ENOUGH:
            return f"growth: too short a run to tell, below {LONG_ENOUGH:,} steps"
        return (
            f"growth, last quarter over first: {listed(self.growth)}\n"
            f"growth per 100,000 steps: {listed(self.growth_per_100k)}"
        )

    def ratio(self, field: str) -> float:
        """A field of a window, end over start."""
        start, end = self._start_and_end(field)
        return end / start

    def _start_and_end(self, field: str) -> tuple[float, float]:
        values = [float(getattr(window, field)) for window in self.windows]
        return _mean(values[: self._quarter]), _mean(values[-self._quarter :])

    @property
    def _quarter(self) -> int:
        return max(1, len(self.windows) // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakReport(Readings[Window]):
    """What came of a soak of the loop.

    calls_*  function calls, Python's and C's, of STEADY_STEPS steps of one and the same decode before and after
    ended    requests by how they ended
    """

    rows: int
    lookahead: int
    calls_before: int
    calls_after: int
    ended: dict[FinishReason, int]
    stats: SchedulerStats


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class CountingDevice(NullDevice):
    """A null device that knows how much pinned memory it has lent."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned_bytes = 0

    def pinned(self, size: int, name: str = "") -> torch.Tensor:
        tensor = super().pinned(size, name)
        self.pinned_bytes += tensor.nbytes
        return tensor


def soak_config(rows: int, lookahead: int) -> EngineConfig:
    """A KV cache that does not hold as many rows of full length."""
    return EngineConfig(
        lookahead=lookahead,
        max_rows=rows,
        max_batch_tokens=rows + 64,
        max_model_len=_MAX_MODEL_LEN,
        block_size=_BLOCK_SIZE,
        num_blocks=8 * rows + _MAX_MODEL_LEN // _BLOCK_SIZE,
        device="cpu",
    )


def small_loop(config: EngineConfig, device: CountingDevice) -> tuple[Loop, Admission]:
    """Around a model that the device never computes."""
    model = TinyModel()
    loop, limits = build_loop(model, config, device, make_sampler(torch.device("cpu")), torch.float32)
    return loop, Admission(limits, ModelFacts(model.vocab_size, model.eos_token_ids), config.seed)


def draw_work(rng: random.Random) -> tuple[NDArray[np.int64], SamplingParams]:
    """A prompt and what is asked for it."""
    greedy = rng.random() < 0.5
    params = SamplingParams(
        temperature=0.0 if greedy else 1.0,
        top_k=0 if greedy else 40,
        max_tokens=rng.choice(_NEW_TOKENS),
        stop_token_ids=(0, 1, 2) if rng.random() < _STOPPING else (),
    )
    return np.arange(rng.choice(_PROMPTS)), params


class Soak:
    """Steps a loop through churn, and measures. The loop must be idle and is this one's alone."""

    def __init__(self, loop: Loop, admission: Admission, device: CountingDevice, seed: int = 0) -> None:
        self.loop = loop
        self.admission = admission
        self.device = device
        self._population = 3 * admission.limits.max_rows
        self._unfinished: dict[int, None] = {}  # ids, as an ordered set: a seed must find the same order again
        self._ended: Counter[FinishReason] = Counter()
        self._rng = random.Random(seed)
        loop.publish = self._publish

    @classmethod
    def build(cls, rows: int, lookahead: int, seed: int = 0) -> Soak:
        """With a loop of its own."""
        device = CountingDevice()
        loop, admission = small_loop(soak_config(rows, lookahead), device)
        return cls(loop, admission, device, seed)

    def run(self, steps: int, windows: int = WINDOWS, each: Callable[[int, Window], None] | None = None) -> SoakReport:
        """Run `steps` steps, rounded up to equal windows, after one window more to warm up.

        each  gets the steps so far and every window but the first, as it comes
        """
        size = -(-steps // windows)
        wall_ns, cpu_ns = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        readings = np.zeros((windows + 1, len(fields(Window))))  # made here, so that none adds to those after it
        before = self.count_calls()
        count_alive(self.device)  # as after every window: garbage of earlier days is not the first one's
        for number, reading in enumerate(readings):
            gc.disable()
            try:
                self._churn(wall_ns, cpu_ns)
            finally:
                gc.enable()
            times = (np.median(wall_ns), np.quantile(wall_ns, 0.1), cpu_ns.mean())
            reading[:] = *(ns / 1e3 for ns in times), *count_alive(self.device)
            if each is not None and number:
                each(number * size, _window(reading.tolist()))
        ended = dict(self._ended)
        return SoakReport(
            rows=self.admission.limits.max_rows,
            lookahead=self.loop.lookahead,
            window_steps=size,
            windows=[_window(reading) for reading in readings[1:].tolist()],
            calls_before=before,
            calls_after=self.count_calls(),
            ended=ended,
            stats=replace(self.loop.scheduler.stats),
        )

    def count_calls(self) -> int:
        """Function calls, Python's and C's, of STEADY_STEPS steps of decode. Lets all requests end, before and after.

        It stands in for the time of a step where that must not depend on the machine.
        """
        limits, length = self.admission.limits, _STEADY_LEAD + STEADY_STEPS + _STEADY_LEAD
        params = SamplingParams(temperature=0, max_tokens=length)
        calls = 0

        def count(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        self._drain()
        self.loop.scheduler.pool.forget_all()  # a full prefix cache would have something to evict
        for _ in range(min(limits.max_rows, (limits.num_blocks - 1) // -(-length // limits.block_size))):
            self.loop.scheduler.add(self.admission.make_request([0], params))
        for _ in range(_STEADY_LEAD):
            self.loop.step()
        gc.disable()
        sys.setprofile(count)
        try:
            for _ in range(STEADY_STEPS):
                self.loop.step()
        finally:
            sys.setprofile(None)
            gc.enable()
        self._drain()
        return calls

    def _drain(self) -> None:
        while self.loop.has_work:
            self.loop.step()

    def _churn(self, wall_ns: NDArray[np.int64], cpu_ns: NDArray[np.int64]) -> None:
        """One step for each element, which gets the time of the step and its intake."""
        for index in range(wall_ns.size):
            arrivals, cancelled = self._draw()
            cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
            self._intake(arrivals, cancelled)
            self.loop.step()
            wall_ns[index] = time.perf_counter_ns() - wall
            cpu_ns[index] = time.thread_time_ns() - cpu

    def _draw(self) -> tuple[list[Request], list[int]]:
        """What happens before the next step: up to two arrivals, and now and then a cancel."""
        rng, arrivals, cancelled = self._rng, list[Request](), list[int]()
        while len(arrivals) < 2 and len(self._unfinished) < self._population:
            arrivals.append(self.admission.make_request(*draw_work(rng)))
            self._unfinished[arrivals[-1].request_id] = None
        if rng.random() < _CANCELS_PER_STEP:
            cancelled.append(rng.choice(list(self._unfinished)))
        return arrivals, cancelled

    def _intake(self, arrivals: list[Request], cancelled: list[int]) -> None:
        """What the engine's thread does with its inbox."""
        scheduler = self.loop.scheduler
        for request in arrivals:
            scheduler.add(request)
        for request_id in cancelled:
            scheduler.cancel(request_id)
        if finished := scheduler.take_finished():
            self._publish(Committed.without_tokens(finished))

    def _publish(self, committed: Committed) -> None:
        for end in committed.finished:
            if end.request_id in self._unfinished:
                del self._unfinished[end.request_id]
                self._ended[end.reason] += 1


def count_alive(device: CountingDevice) -> tuple[int, int, int, int, int, int]:
    """The counts of a Window, in its order."""
    cyclic = gc.collect()
    blocks = sys.getallocatedblocks()
    alive = gc.get_objects()
    storages = [each.untyped_storage() for each in alive if type(each) in (torch.Tensor, torch.nn.Parameter)]
    tensor_bytes = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    resident = int(_STATM.read_text().split()[1]) * mmap.PAGESIZE if _STATM.exists() else 0
    return len(alive), blocks, tensor_bytes, device.pinned_bytes, resident, cyclic


def _window(reading: list[float]) -> Window:
    median, tenth, cpu, *counts = reading
    return Window(round(median, 1), round(tenth, 1), round(cpu, 1), *map(int, counts))


def as_json(report: SoakReport) -> dict[str, object]:
    """What `gapless bench soak --json` prints last."""
    return {
        "rows": report.rows,
        "lookahead": report.lookahead,
        "steps": report.steps,
        "windows": [asdict(window) for window in report.windows],
        "growth_per_100k": {name: round(report.growth_per_100k(name), 1) for name in COUNTS},
        "end_over_start": {name: round(report.ratio(name), 4) for name in TIMES},
        "calls_per_decode_step": [calls / STEADY_STEPS for calls in (report.calls_before, report.calls_after)],
        "ended": {reason.value: count for reason, count in report.ended.items()},
        "stats": asdict(report.stats),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
