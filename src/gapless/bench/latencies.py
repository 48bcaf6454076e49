"""Throughput and latency from when requests came and when their tokens did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What a consumer of the engine saw: token i came for request i, seconds after the start; in order of time."""

    seconds: Floats
    requests: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Times in milliseconds, as the consumer of the engine's outputs sees them.

    ttft            from a request's arrival to its first token
    inter_token     between two tokens of a request, over all of them
    running         requests between first and last token, on average over time; preempted ones count as running
    waiting         requests that wait for their first token, on average and at most: the queue and those prefilling
    """

    seconds: float  # from the first arrival to the last token
    requests_per_second: float
    tokens_per_second: float  # generated
    ttft_p50: float
    ttft_p99: float
    inter_token_p50: float
    inter_token_p99: float
    running_mean: float
    waiting_mean: float
    waiting_max: float

    @classmethod
    def of(cls, arrived: Floats, tokens: Tokens) -> Latencies:
        """`arrived` by request, in seconds on the clock of the tokens. Every request must have got a token."""
        by_request = np.argsort(tokens.requests, kind="stable")
        seconds, requests = tokens.seconds[by_request], tokens.requests[by_request]
        starts = np.flatnonzero(np.diff(requests, prepend=-1))
        first, last = seconds[starts], seconds[np.append(starts[1:], seconds.size) - 1]
        gaps = np.diff(seconds)[np.diff(requests) == 0] if seconds.size > arrived.size else np.zeros(1)
        wall = float(last.max() - arrived.min())
        changes = np.concatenate([arrived, first])
        waiting = np.repeat([1, -1], arrived.size)[np.argsort(changes, kind="stable")].cumsum()
        return cls(
            seconds=wall,
            requests_per_second=arrived.size / wall,
            tokens_per_second=seconds.size / wall,
            ttft_p50=_milliseconds(first - arrived, 0.5),
            ttft_p99=_milliseconds(first - arrived, 0.99),
            inter_token_p50=_milliseconds(gaps, 0.5),
            inter_token_p99=_milliseconds(gaps, 0.99),
            running_mean=float((last - first).sum()) / wall,
            waiting_mean=float((first - arrived).sum()) / wall,
            waiting_max=float(waiting.max()),
        )

    @classmethod
    def over(cls, runs: Sequence[Self], reduce: Callable[[Sequence[float]], float]) -> Self:
        """Each figure of several runs as one."""
        figures = [asdict(run) for run in runs]
        return cls(**{name: reduce([each[name] for each in figures]) for name in figures[0]})


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest."""
    return max(values) - min(values)


def _milliseconds(seconds: Floats, quantile: float) -> float:
    return float(np.quantile(seconds, quantile)) * 1e3
