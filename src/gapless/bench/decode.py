"""Offline decode of fixed lengths on random weights: the same work at several lookaheads, alternating, one process."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from gapless.attention import make_attention
from gapless.bench.trace import GpuBusy, KernelTrace
from gapless.config import EngineConfig, ModelConfig
from gapless.device import Device, has_cuda, open_device
from gapless.engine.build import build_engine
from gapless.engine.core import Engine, EngineFailure
from gapless.models.base import Model
from gapless.models.registry import build_model
from gapless.request import Request, SamplingParams
from gapless.sampling import make_sampler
from gapless.weights.random import random_weights

TRACE_BEGIN = 0.4  # of the tokens: the kernel trace starts here
TRACE_STEPS = 64


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

    def __init__(self, shape: ModelConfig, workload: Workload, config: EngineConfig) -> None:
        length = workload.prompt_len + workload.new_tokens
        blocks = workload.requests * -(-length // config.block_size)
        self.workload = workload
        self.device: Device = open_device(config.device)
        self.config = replace(
            config, num_blocks=config.num_blocks or blocks, max_model_len=config.max_model_len or length
        )
        self.vocab_size = shape.vocab_size
        begin = time.perf_counter()
        self.engine = _build(shape, self.config, self.device)
        self.startup_seconds = time.perf_counter() - begin

    def run(self, lookahead: int, *, traced: bool = False) -> tuple[DecodeRun, GpuBusy | None]:
        """Generate everything once. A traced run gives no time worth quoting."""
        self.engine.set_lookahead(lookahead)
        requests = self._requests()
        before = self.engine.stats()
        begin = time.perf_counter()
        self.engine.submit(requests)
        checksum, trace = self._drain(len(requests), traced=traced)
        seconds = time.perf_counter() - begin
        after = self.engine.stats()
        busy = (after.busy_seconds - before.busy_seconds) / seconds
        return DecodeRun(lookahead=lookahead, seconds=seconds, busy_share=busy, checksum=checksum), trace

    def close(self) -> None:
        self.engine.close()

    def _requests(self) -> list[Request]:
        rng = np.random.default_rng(0)
        params = SamplingParams(temperature=0, max_tokens=self.workload.new_tokens, ignore_eos=True)
        prompts = rng.integers(0, self.vocab_size, (self.workload.requests, self.workload.prompt_len), dtype=np.int32)
        return [self.engine.make_request(prompt, params) for prompt in prompts]

    def _drain(self, unfinished: int, *, traced: bool) -> tuple[int, GpuBusy | None]:
        """Consume outputs until all requests have ended; the trace covers TRACE_STEPS decode steps in the middle."""
        checksum = steps = 0
        begin_at = int(self.workload.new_tokens * TRACE_BEGIN)
        trace: KernelTrace | None = None
        busy: GpuBusy | None = None
        while unfinished:
            record = self.engine.outputs.get()
            if isinstance(record, EngineFailure):
                raise record.error
            steps += 1
            checksum = (checksum * 31 + int(record.tokens.astype(np.int64).sum())) % (2**61 - 1)
            unfinished -= len(record.finished)
            if traced and trace is None and steps >= begin_at:
                trace = KernelTrace().__enter__()
                steps = begin_at
            elif trace is not None and busy is None and steps >= begin_at + TRACE_STEPS:
                trace.__exit__(None, None, None)
                busy = trace.busy()
        return checksum, busy


def _build(shape: ModelConfig, config: EngineConfig, device: Device) -> Engine:
    dtype = getattr(torch, config.dtype or ("float32" if device.torch_device.type == "cpu" else "bfloat16"))
    model: Model = build_model(
        shape,
        random_weights(shape, device.torch_device, dtype, seed=0),
        device=device.torch_device,
        dtype=dtype,
        attention=make_attention(config.attention, device.torch_device),
        max_position=config.max_model_len or shape.max_position,
    )
    return build_engine(model, config, device, make_sampler(device.torch_device), dtype)


def compare(
    bench: DecodeBench, lookaheads: list[int], *, repeat: int, warm_up: bool = True, traced: bool | None = None
) -> list[DecodeResult]:
    """Run every lookahead `repeat` times, alternating, then once more under a kernel trace where there is a GPU."""
    if warm_up:
        bench.run(lookaheads[0])
    runs: dict[int, list[DecodeRun]] = {lookahead: [] for lookahead in lookaheads}
    for _ in range(repeat):
        for lookahead in lookaheads:
            runs[lookahead].append(bench.run(lookahead)[0])
    wants_trace = bench.device.torch_device.type == "cuda" if traced is None else traced
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
                trace=bench.run(lookahead, traced=True)[1] if wants_trace else None,
                runs=runs[lookahead],
            )
        )
    return results


def environment(device: Device) -> dict[str, Any]:
    """What a figure must be quoted with."""
    return {"device": device.name, "torch": torch.__version__, "cuda": torch.version.cuda if has_cuda() else None}


def as_json(bench: DecodeBench, results: list[DecodeResult]) -> dict[str, Any]:
    """What `gapless bench decode --json` prints last."""
    sums = {run.checksum for result in results for run in result.runs}
    return {
        "workload": asdict(bench.workload),
        "environment": environment(bench.device),
        "startup_seconds": round(bench.startup_seconds, 2),
        "tokens_equal": len(sums) == 1,
        "results": [asdict(result) for result in results],
    }
