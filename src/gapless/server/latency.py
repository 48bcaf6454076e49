"""Durations: a histogram since the start for /metrics, and percentiles of the last minute for people."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WINDOW_SECONDS = 60
SLICE_SECONDS = 5
FINE = tuple(1e-5 * 1.04**power for power in range(470))  # seconds: 10 us to 16 min, each bound 4 % over the one before


class Percentiles(NamedTuple):
    """In seconds; None if nothing came."""

    p50: float | None
    p99: float | None


class Latency:
    """Of one kind, counted by duration. `counts` has one entry for each bound, and one for what is over the last.

    bounds  upper ends in seconds, ascending; a duration that equals one belongs to it.
    """

    __slots__ = ("_slice", "_slices", "_turn", "bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0
        self._turn = -1
        self._slice: list[int] = []
        self._slices: deque[tuple[int, list[int]]] = deque(maxlen=WINDOW_SECONDS // SLICE_SECONDS + 1)

    def add(self, seconds: float, count: int, now: float) -> None:
        """So many that took `seconds` each. `now` is in seconds of any clock that never goes back."""
        self.counts[bisect_left(self.bounds, seconds)] += count
        self.sum += seconds * count
        turn = int(now) // SLICE_SECONDS
        if turn != self._turn:
            self._turn = turn
            self._slice = [0] * (len(FINE) + 1)
            self._slices.append((turn, self._slice))
        self._slice[bisect_left(FINE, seconds)] += count

    def percentiles(self, now: float) -> Percentiles:
        """Of the last 60 to 65 seconds, to about 2 %."""
        oldest = int(now) // SLICE_SECONDS - WINDOW_SECONDS // SLICE_SECONDS
        recent = [counts for turn, counts in self._slices if turn >= oldest]
        if not recent:
            return Percentiles(None, None)
        reached = np.sum(recent, axis=0).cumsum()
        return Percentiles(*(_middle(int(np.searchsorted(reached, share * reached[-1]))) for share in (0.5, 0.99)))


def _middle(place: int) -> float:
    """Of a fine bucket."""
    return FINE[min(place, len(FINE) - 1)] / 1.04**0.5
