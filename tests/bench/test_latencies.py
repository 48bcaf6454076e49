"""Latencies of hand-made arrivals and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from gapless.bench.latencies import Latencies, Tokens, spread


def tokens(*pairs: tuple[float, int]) -> Tokens:
    return Tokens(np.array([seconds for seconds, _ in pairs]), np.array([request for _, request in pairs]))


def test_two_overlapping_requests():
    """Request 0: arrives 0, tokens 1, 2, 4. Request 1: arrives 0.5, tokens 2, 2.5."""
    seen = Latencies.of(np.array([0.0, 0.5]), tokens((1.0, 0), (2.0, 0), (2.0, 1), (2.5, 1), (4.0, 0)))
    assert seen.seconds == 4.0
    assert seen.tokens_per_second == 5 / 4
    assert seen.requests_per_second == 2 / 4
    assert seen.ttft_p50 == 1250.0  # of 1.0 and 1.5
    assert seen.ttft_p99 == pytest.approx(1495.0)
    assert seen.inter_token_p50 == 1000.0  # of 0.5, 1.0, 2.0
    assert seen.inter_token_p99 == pytest.approx(1980.0)
    assert seen.waiting_mean == (1.0 + 1.5) / 4
    assert seen.waiting_max == 2
    assert seen.running_mean == (3.0 + 0.5) / 4


def test_requests_that_never_wait_together():
    seen = Latencies.of(np.array([0.0, 3.0]), tokens((1.0, 0), (4.0, 1)))
    assert seen.waiting_max == 1
    assert seen.inter_token_p99 == 0.0
    assert seen.running_mean == 0.0


def test_percentiles_of_a_hundred_and_one_requests():
    arrived = np.zeros(101)
    seen = Latencies.of(arrived, tokens(*((request * 1e-3, request) for request in range(101))))
    assert seen.ttft_p50 == pytest.approx(50.0)
    assert seen.ttft_p99 == pytest.approx(99.0)
    assert seen.waiting_max == 101


def test_runs_are_reduced_figure_by_figure():
    short = Latencies.of(np.array([0.0]), tokens((1.0, 0), (2.0, 0)))
    long = Latencies.of(np.array([0.0]), tokens((4.0, 0), (6.0, 0)))
    assert Latencies.over([short, long], max).inter_token_p50 == 2000.0
    assert Latencies.over([short, long], spread).ttft_p50 == 3000.0
