"""Requests that arrive at random times with mixed lengths, as at a server: throughput and latency."""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapless.bench.environment import environment
from gapless.bench.latencies import Floats, Latencies, Tokens, spread
from gapless.bench.random_engine import RandomEngine, output_of
from gapless.config import EngineConfig
from gapless.errors import ConfigError
from gapless.outcome import Committed
from gapless.trace.record import Trace
from gapless.weights.hf_config import load_shape

SHORTEST = 32  # times shorter than the longest

Lengths = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedLoad:
    """What is asked for: `requests` Poisson arrivals, `rate` a second on average (inf: all at once).

    Prompt and output lengths are drawn independently and evenly on a logarithmic scale, between a SHORTEST-th of the
    longest and the longest.
    """

    rate: float
    requests: int
    max_prompt_len: int
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"the rate must be above 0 requests a second, not {self.rate}")


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """A load, drawn: by request, seconds after the start and lengths in tokens."""

    at: Floats
    prompt_lens: Lengths
    new_tokens: Lengths

    @classmethod
    def draw(cls, load: MixedLoad) -> Arrivals:
        rng = np.random.default_rng(load.seed)
        at = np.cumsum(rng.exponential(1.0 / load.rate, load.requests))

        def lengths(longest: int) -> Lengths:
            low, high = max(1.0, longest / SHORTEST), longest + 1.0
            drawn = np.exp(rng.uniform(np.log(low), np.log(high), load.requests))
            return np.minimum(drawn.astype(np.int64), longest)

        return cls(at - at[0], lengths(load.max_prompt_len), lengths(load.max_new_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRun(Latencies):
    """One run, or what became of several. Shares 0 to 1.

    batch_mean       tokens that a step sampled, on average over the steps with any
    batch_occupancy  that, over the rows that there are
    busy_share       by device events around the compute stages
    """

    batch_mean: float
    batch_occupancy: float
    busy_share: float
    preemptions: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedResult:
    """All runs of one lookahead: median and spread (largest minus smallest) of each figure."""

    lookahead: int
    median: MixedRun
    spread: MixedRun
    runs: list[MixedRun] = field(default_factory=list[MixedRun])


@dataclass(frozen=True, slots=True)
class MixedReport:
    """All lookaheads under the same load."""

    load: MixedLoad
    max_rows: int
    environment: dict[str, str]
    startup_seconds: float
    results: list[MixedResult]

    def as_json(self) -> dict[str, Any]:
        """What `gapless bench mixed --json` prints last."""
        return asdict(self)


class MixedBench:
    """An engine and a drawn load."""

    def __init__(self, shape: str, load: MixedLoad, config: EngineConfig, trace: Trace | None = None) -> None:
        """max_model_len of `config` is set to what the load needs. Raises ConfigError, OutOfMemoryError."""
        length, limit = load.max_prompt_len + load.max_new_tokens, load_shape(shape).max_position
        if length > limit:
            raise ConfigError(f"{load.max_prompt_len} + {load.max_new_tokens} tokens: {shape} has a context of {limit}")
        self.load, self.arrivals = load, Arrivals.draw(load)
        self.random = RandomEngine(shape, replace(config, max_model_len=length, prefix_cache=False), trace)

    def run(self, lookahead: int, at: Floats) -> MixedRun:
        """Send the requests at these seconds after the start, and time what comes back."""
        engine = self.random.engine
        engine.set_lookahead(lookahead)
        prompts = self.random.random_prompts(self.arrivals.prompt_lens.tolist(), self.load.seed)
        requests = self.random.requests(prompts, self.arrivals.new_tokens.tolist())
        before = engine.stats()
        received: list[tuple[float, Committed]] = []
        sent, unfinished = 0, len(requests)
        begin = time.perf_counter()
        while unfinished:
            now = time.perf_counter() - begin
            due = int(np.searchsorted(at, now, side="right"))
            if due > sent:
                engine.submit(requests[sent:due])
                sent = due
            record = self._next(begin + at[sent] if sent < len(requests) else None)
            if record is not None:
                received.append((time.perf_counter() - begin, record))
                unfinished -= len(record.finished)
        after = engine.stats()
        steps = [(seconds, record.request_ids) for seconds, record in received if record.request_ids.size]
        tokens = Tokens(
            np.repeat([seconds for seconds, _ in steps], [ids.size for _, ids in steps]),
            np.concatenate([ids for _, ids in steps]) - requests[0].request_id,
        )
        latencies = Latencies.of(at, tokens)
        batch = tokens.requests.size / len(steps)
        return MixedRun(
            **asdict(latencies),
            batch_mean=batch,
            batch_occupancy=batch / self.random.config.max_rows,
            busy_share=(after.busy_seconds - before.busy_seconds) / latencies.seconds,
            preemptions=after.scheduler.preemptions - before.scheduler.preemptions,
        )

    def measure(
        self, lookaheads: Sequence[int], *, repeat: int, warm_up: bool = True, tell: Callable[[str], None]
    ) -> MixedReport:
        """Every lookahead `repeat` times, alternating. The warm-up sends all requests at once.

        tell  gets a word before each run
        """
        if warm_up:
            tell("warm-up")
            self.run(lookaheads[0], np.zeros(self.load.requests))
        runs: dict[int, list[MixedRun]] = {lookahead: [] for lookahead in lookaheads}
        for number in range(1, repeat + 1):
            for lookahead in lookaheads:
                tell(f"lookahead {lookahead}, run {number} of {repeat}")
                runs[lookahead].append(self.run(lookahead, self.arrivals.at))
        return MixedReport(
            load=self.load,
            max_rows=self.random.config.max_rows,
            environment=environment(self.random.device_name, self.random.torch_device),
            startup_seconds=round(self.random.startup_seconds, 2),
            results=[_result(lookahead, done) for lookahead, done in runs.items()],
        )

    def close(self) -> None:
        self.random.close()

    def _next(self, until: float | None) -> Committed | None:
        """The next output; None if there is none before `until`."""
        engine = self.random.engine
        if until is None:
            return output_of(engine.next_output())
        try:
            return output_of(engine.outputs.get(timeout=max(0.0, until - time.perf_counter())))
        except queue.Empty:
            return None


def _result(lookahead: int, runs: list[MixedRun]) -> MixedResult:
    return MixedResult(
        lookahead=lookahead,
        median=MixedRun.over(runs, statistics.median),
        spread=MixedRun.over(runs, spread),
        runs=runs,
    )
