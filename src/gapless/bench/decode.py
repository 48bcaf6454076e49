"""Offline decode of fixed lengths on random weights: the same work at several lookaheads, alternating, one process."""

from __future__ import annotations

import statistics
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapless.bench.trace import GpuBusy, KernelTrace
from gapless.config import EngineConfig
from gapless.device import has_cuda
from gapless.engine.core import EngineFailure
from gapless.errors import ConfigError
from gapless.loading import load_engine
from gapless.request import SamplingParams
from gapless.weights.hf_config import load_shape

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
    """All runs of one lookahead. Times in seconds, traced shares 0 to 1."""

    lookahead: int
    median_seconds: float
    spread_seconds: float  # largest minus smallest
    tokens_per_second: float
    busy_share: float
    trace: GpuBusy | None
    runs: list[DecodeRun] = field(default_factory=list[DecodeRun])


class DecodeBench:
    """An engine on random weights, built once and run at any lookahead up to the largest one asked for."""

    def __init__(self, shape: str, workload: Workload, config: EngineConfig) -> None:
        """Raises ConfigError, also where the workload is longer than the shape's context; OutOfMemoryError."""
        length = workload.prompt_len + workload.new_tokens
        limit = load_shape(shape).max_position
        if length > limit:
            raise ConfigError(f"{workload.prompt_len} + {workload.new_tokens} tokens: {shape} has a context of {limit}")
        blocks = workload.requests * -(-length // config.block_size)
        self.workload = workload
        begin = time.perf_counter()
        sized = replace(config, num_blocks=blocks, max_model_len=length)
        loaded = load_engine(config=sized, load="random", shape=shape)
        self.startup_seconds = time.perf_counter() - begin
        self.engine = loaded.engine
        self.device_name = loaded.device_name
        self.on_gpu = loaded.config.device != "cpu"

    def run(self, lookahead: int) -> DecodeRun:
        """Generate everything once, timed."""
        before = self.engine.stats()
        begin = time.perf_counter()
        checksum = self._generate(lookahead, self.workload)
        seconds = time.perf_counter() - begin
        busy = (self.engine.stats().busy_seconds - before.busy_seconds) / seconds
        return DecodeRun(lookahead=lookahead, seconds=seconds, busy_share=busy, checksum=checksum)

    def trace(self, lookahead: int) -> GpuBusy | None:
        """A kernel trace of some decode steps at the context that TRACE_AT of the whole run has."""
        skipped = int(self.workload.new_tokens * TRACE_AT)
        part = Workload(
            requests=self.workload.requests,
            prompt_len=self.workload.prompt_len + skipped,
            new_tokens=min(self.workload.new_tokens - skipped, TRACE_STEPS + TRACE_LEAD),
        )
        with KernelTrace() as trace:
            self._generate(lookahead, part)
        return trace.busy(TRACE_STEPS)

    def close(self) -> None:
        self.engine.close()

    def _generate(self, lookahead: int, workload: Workload) -> int:
        """Run a workload to its end; returns a checksum of all its tokens."""
        self.engine.set_lookahead(lookahead)
        rng = np.random.default_rng(0)
        params = SamplingParams(temperature=0, max_tokens=workload.new_tokens, ignore_eos=True)
        vocab_size = self.engine.admission.model.vocab_size
        prompts = rng.integers(0, vocab_size, (workload.requests, workload.prompt_len), dtype=np.int32)
        self.engine.submit([self.engine.make_request(prompt, params) for prompt in prompts])
        unfinished = workload.requests
        request_ids: list[NDArray[np.int64]] = []
        tokens: list[NDArray[np.int32]] = []
        while unfinished:
            record = self.engine.outputs.get()
            if isinstance(record, EngineFailure):
                raise record.error
            request_ids.append(record.request_ids)
            tokens.append(record.tokens)
            unfinished -= len(record.finished)
        by_request = np.argsort(np.concatenate(request_ids), kind="stable")
        return zlib.crc32(np.concatenate(tokens)[by_request].tobytes())


def compare(
    bench: DecodeBench, lookaheads: list[int], *, repeat: int, warm_up: bool = True, traced: bool | None = None
) -> list[DecodeResult]:
    """Run every lookahead `repeat` times, alternating, then once more under a kernel trace where there is a GPU."""
    if warm_up:
        bench.run(lookaheads[0])
    runs: dict[int, list[DecodeRun]] = {lookahead: [] for lookahead in lookaheads}
    for _ in range(repeat):
        for lookahead in lookaheads:
            runs[lookahead].append(bench.run(lookahead))
    wants_trace = bench.on_gpu if traced is None else traced
    results: list[DecodeResult] = []
    for lookahead in lookaheads:
        times = [run.seconds for run in runs[lookahead]]
        median = statistics.median(times)
        results.append(
            DecodeResult(
                lookahead=lookahead,
                median_seconds=median,
                spread_seconds=max(times) - min(times),
                tokens_per_second=bench.workload.requests * bench.workload.new_tokens / median,
                busy_share=statistics.median(run.busy_share for run in runs[lookahead]),
                trace=bench.trace(lookahead) if wants_trace else None,
                runs=runs[lookahead],
            )
        )
    return results


def environment(device_name: str) -> dict[str, Any]:
    """What a figure must be quoted with."""
    return {"device": device_name, "torch": torch.__version__, "cuda": torch.version.cuda if has_cuda() else None}


def as_json(bench: DecodeBench, results: list[DecodeResult]) -> dict[str, Any]:
    """What `gapless bench decode --json` prints last."""
    sums = {run.checksum for result in results for run in result.runs}
    return {
        "workload": asdict(bench.workload),
        "environment": environment(bench.device_name),
        "startup_seconds": round(bench.startup_seconds, 2),
        "tokens_equal": len(sums) == 1,
        "results": [asdict(result) for result in results],
    }
