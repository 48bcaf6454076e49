"""Prompts of one length, one new token each: how fast the linear layers go against what matrix products reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from gapless.bench.ceilings import matrix_rate
from gapless.bench.environment import environment
from gapless.bench.floors import layer_products, linear_operations
from gapless.bench.random_engine import RandomEngine
from gapless.bench.trace import KernelTrace, Part, kernel_parts
from gapless.config import EngineConfig
from gapless.device import has_cuda, open_device
from gapless.errors import ConfigError
from gapless.trace.record import Trace
from gapless.weights.hf_config import load_shape

LENGTHS = (512, 2048, 8192)
FULL_STEPS = 8
ATTENTION_KERNELS = {"prefill_kernel", "decode_kernel", "reduce_kernel"}  # of kernels/paged_*.py


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillResult:
    """All runs of one prompt length. Times in seconds, shares 0 to 1.

    linear_flops     operations per second of the linear layers over the whole time, attention and idle time included
    linear_share     that, over what matrix products of these shapes reach
    attention_share  of the time with a kernel, from a trace; None without one
    parts            where a run's time with a kernel went, by kernel, in microseconds; None without a trace
    """

    prompt_len: int
    requests: int
    median_seconds: float
    spread_seconds: float  # largest minus smallest
    tokens_per_second: float
    linear_flops: float
    linear_share: float
    attention_share: float | None = None
    parts: tuple[Part, ...] | None = None


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """matrix_rate in operations per second, of products with as many rows as a full step has tokens."""

    lookahead: int
    step_tokens: int
    matrix_rate: float
    environment: dict[str, str]
    startup_seconds: float
    results: list[PrefillResult]

    def as_json(self) -> dict[str, Any]:
        """What `gapless bench prefill --json` prints last."""
        return asdict(self)


class PrefillBench:
    """An engine whose KV cache holds all requests of a run at once. No step decodes, so it captures no graphs."""

    def __init__(
        self,
        shape: str,
        config: EngineConfig,
        *,
        prompt_lens: Sequence[int] = (),
        tokens: int | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Raises ConfigError, OutOfMemoryError.

        prompt_lens  none: those of LENGTHS that the shape's context holds
        tokens       of all prompts of a run, about; None: FULL_STEPS full steps
        """
        limit = load_shape(shape).max_position
        prompt_lens = prompt_lens or [length for length in LENGTHS if length < limit]
        if not prompt_lens or (longest := max(prompt_lens)) >= limit:
            raise ConfigError(f"{shape} has a context of {limit} tokens: a prompt and one new token must be shorter")
        if tokens is None:
            on_cpu = config.device == "cpu" or (config.device is None and not has_cuda())
            tokens = FULL_STEPS * config.token_budget(on_cpu=on_cpu)
        self.requests = {length: max(1, tokens // length) for length in prompt_lens}
        blocks = max(count * -(-(length + 1) // config.block_size) for length, count in self.requests.items())
        sized = replace(
            config,
            max_rows=max(self.requests.values()),
            num_blocks=blocks,
            max_model_len=longest + 1,
            graphs=False,
            prefix_cache=False,
        )
        self.random = RandomEngine(shape, sized, trace)

    def seconds(self, prompt_len: int) -> float:
        """Time of one run, from the submission to the last of the new tokens."""
        count = self.requests[prompt_len]
        requests = self.random.requests(self.random.random_prompts([prompt_len] * count), [1] * count)
        begin = time.perf_counter()
        self.random.generate(requests)
        return time.perf_counter() - begin

    def trace(self, prompt_len: int) -> tuple[Part, ...]:
        """Where the time of a run with a kernel goes."""
        with KernelTrace() as trace:
            self.seconds(prompt_len)
        return kernel_parts([event for event in trace.events() if event["cat"] == "kernel"], 1)

    def matrix_rate(self) -> float:
        with closing(open_device(self.random.config.device)) as device:
            shapes = layer_products(self.random.model)
            return matrix_rate(device, shapes, self.random.step_tokens, self.random.dtype)

    def measure(self, *, repeat: int, traced: bool | None = None, tell: Callable[[str], None]) -> PrefillReport:
        """Every length once untimed, then `repeat` times, alternating; traced: None is where there is a GPU.

        tell  gets a word before each run
        """
        wants_trace = self.random.traces_kernels(traced)
        for length in self.requests:
            tell(f"warm-up with prompts of {length}")
            self.seconds(length)
        times: dict[int, list[float]] = {length: [] for length in self.requests}
        for number in range(1, repeat + 1):
            for length in self.requests:
                tell(f"prompts of {length}, run {number} of {repeat}")
                times[length].append(self.seconds(length))
        facts = environment(self.random.device_name, self.random.torch_device)
        tell("matrix products, kernel traces" if wants_trace else "matrix products")
        rate = self.matrix_rate()
        results = [
            self._result(length, times[length], rate, self.trace(length) if wants_trace else ())
            for length in self.requests
        ]
        return PrefillReport(
            lookahead=self.random.config.lookahead,
            step_tokens=self.random.step_tokens,
            matrix_rate=rate,
            environment=facts,
            startup_seconds=round(self.random.startup_seconds, 2),
            results=results,
        )

    def close(self) -> None:
        self.random.close()

    def _result(self, prompt_len: int, times: list[float], rate: float, parts: tuple[Part, ...]) -> PrefillResult:
        count, median = self.requests[prompt_len], statistics.median(times)
        flops = linear_operations(self.random.model, count * prompt_len, count) / median
        return PrefillResult(
            prompt_len=prompt_len,
            requests=count,
            median_seconds=median,
            spread_seconds=max(times) - min(times),
            tokens_per_second=count * prompt_len / median,
            linear_flops=flops,
            linear_share=flops / rate,
            attention_share=attention_share(parts) if parts else None,
            parts=parts or None,
        )


def attention_share(parts: Sequence[Part]) -> float:
    """Of the time of all kernels, that of the attention kernels."""
    return sum(part.us for part in parts if part.name in ATTENTION_KERNELS) / sum(part.us for part in parts)
