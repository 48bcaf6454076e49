"""Offline decode of fixed lengths on random weights: the same work at several lookaheads, alternating, one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapless.bench.ceilings import read_rate
from gapless.bench.environment import environment
from gapless.bench.floors import DecodeFloor, decode_floor
from gapless.bench.random_engine import Generated, RandomEngine
from gapless.bench.trace import GpuBusy, KernelTrace, summarise
from gapless.config import EngineConfig
from gapless.device import open_device
from gapless.errors import ConfigError
from gapless.trace.record import Trace
from gapless.weights.hf_config import load_shape

WARM_UP_TOKENS = 256  # new ones at most
TRACE_AT = 0.4  # of the new tokens
TRACE_STEPS = 64
TRACE_LEAD = 16  # steps before the traced ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`requests` prompts of `prompt_len` random tokens, each continued by exactly `new_tokens`."""

    requests: int
    prompt_len: int
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """One timed generation. busy_share by device events around the compute stages, 0 to 1."""

    lookahead: int
    seconds: float
    busy_share: float
    checksum: int  # of all tokens: equal runs give equal sums


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeResult:
    """All runs of one lookahead. Times in seconds, traced shares 0 to 1.

    floor_ratio              median over the floor
    cost_per_million_tokens  of generated tokens, in the unit of the price; None without a price
    """

    lookahead: int
    median_seconds: float
    spread_seconds: float  # largest minus smallest
    tokens_per_second: float
    floor_ratio: float
    busy_share: float
    cost_per_million_tokens: float | None
    trace: GpuBusy | None
    runs: list[DecodeRun] = field(default_factory=list[DecodeRun])


class DecodeBench:
    """An engine with the memory that a workload needs, all of whose requests run at once."""

    def __init__(self, shape: str, workload: Workload, config: EngineConfig, trace: Trace | None = None) -> None:
        """Raises ConfigError, also where the workload is longer than the shape's context; OutOfMemoryError."""
        length = workload.prompt_len + workload.new_tokens
        limit = load_shape(shape).max_position
        if length > limit:
            raise ConfigError(f"{workload.prompt_len} + {workload.new_tokens} tokens: {shape} has a context of {limit}")
        blocks = workload.requests * -(-length // config.block_size)
        self.workload = workload
        sized = replace(config, num_blocks=blocks, max_model_len=length, prefix_cache=False)
        self.random = RandomEngine(shape, sized, trace)

    def warm_up(self, lookahead: int) -> None:
        self.random.engine.set_lookahead(lookahead)
        short = replace(self.workload, new_tokens=min(self.workload.new_tokens, WARM_UP_TOKENS))
        self._generate(self._prompts(short), short)

    def run(self, lookahead: int) -> DecodeRun:
        """Generate everything once, timed."""
        engine = self.random.engine
        engine.set_lookahead(lookahead)
        prompts = self._prompts(self.workload)
        before = engine.stats()
        begin = time.perf_counter()
        generated = self._generate(prompts, self.workload)
        seconds = time.perf_counter() - begin
        busy = (engine.stats().busy_seconds - before.busy_seconds) / seconds
        return DecodeRun(lookahead=lookahead, seconds=seconds, busy_share=busy, checksum=generated.checksum())

    def trace(self, lookahead: int) -> GpuBusy | None:
        """A kernel trace of some decode steps at the context that TRACE_AT of the whole run has."""
        skipped = int(self.workload.new_tokens * TRACE_AT)
        part = Workload(
            requests=self.workload.requests,
            prompt_len=self.workload.prompt_len + skipped,
            new_tokens=min(self.workload.new_tokens - skipped, TRACE_STEPS + TRACE_LEAD),
        )
        self.random.engine.set_lookahead(lookahead)
        prompts = self._prompts(part)
        with KernelTrace() as trace:
            self._generate(prompts, part)
        return summarise(trace.events(), TRACE_STEPS)

    def floor(self) -> DecodeFloor:
        """With the read bandwidth of now. Takes up to 4 GiB of the device's memory for a second."""
        with closing(open_device(self.random.config.device)) as device:
            rate = read_rate(device)
        return decode_floor(self.random.model, self.random.dtype, **asdict(self.workload), read_rate=rate)

    def close(self) -> None:
        self.random.close()

    def _prompts(self, workload: Workload) -> list[NDArray[np.int32]]:
        return self.random.random_prompts([workload.prompt_len] * workload.requests)

    def _generate(self, prompts: list[NDArray[np.int32]], workload: Workload) -> Generated:
        return self.random.generate(self.random.requests(prompts, [workload.new_tokens] * workload.requests))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all lookaheads gave, and what they are measured against."""

    workload: Workload
    floor: DecodeFloor
    environment: dict[str, str]
    startup_seconds: float
    results: list[DecodeResult]

    @property
    def tokens_equal(self) -> bool:
        return len({run.checksum for result in self.results for run in result.runs}) == 1

    def as_json(self) -> dict[str, Any]:
        """What `gapless bench decode --json` prints last."""
        return {**asdict(self), "tokens_equal": self.tokens_equal}


def compare(
    bench: DecodeBench,
    lookaheads: list[int],
    *,
    repeat: int,
    warm_up: bool = True,
    traced: bool | None = None,
    price_per_hour: float | None = None,
    tell: Callable[[str], None],
) -> Comparison:
    """Run every lookahead `repeat` times, alternating, measure the floor, then run each once more under a kernel trace.

    traced          None: where there is a GPU
    price_per_hour  of the machine
    tell            gets a word before each run
    """
    wants_trace = bench.random.traces_kernels(traced)
    if warm_up:
        tell("warm-up")
        bench.warm_up(lookaheads[0])
    runs: dict[int, list[DecodeRun]] = {lookahead: [] for lookahead in lookaheads}
    for number in range(1, repeat + 1):
        for lookahead in lookaheads:
            tell(f"lookahead {lookahead}, run {number} of {repeat}")
            runs[lookahead].append(bench.run(lookahead))
    facts = environment(bench.random.device_name, bench.random.torch_device)
    tell("read bandwidth, kernel traces" if wants_trace else "read bandwidth")
    floor = bench.floor()
    traces = {lookahead: bench.trace(lookahead) if wants_trace else None for lookahead in lookaheads}
    results = [
        summary(runs[lookahead], bench.workload, floor, traces[lookahead], price_per_hour) for lookahead in lookaheads
    ]
    return Comparison(bench.workload, floor, facts, round(bench.random.startup_seconds, 2), results)


def summary(
    runs: list[DecodeRun], workload: Workload, floor: DecodeFloor, trace: GpuBusy | None, price_per_hour: float | None
) -> DecodeResult:
    """The figures of one lookahead's runs."""
    times = [run.seconds for run in runs]
    median, tokens = statistics.median(times), workload.requests * workload.new_tokens
    return DecodeResult(
        lookahead=runs[0].lookahead,
        median_seconds=median,
        spread_seconds=max(times) - min(times),
        tokens_per_second=tokens / median,
        floor_ratio=median / floor.seconds,
        busy_share=statistics.median(run.busy_share for run in runs),
        cost_per_million_tokens=None if price_per_hour is None else price_per_hour * median / 3600 / tokens * 1e6,
        trace=trace,
        runs=runs,
    )
