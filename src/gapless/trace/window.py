"""Which part of a run to look at, and what the compute lane did in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from gapless.errors import InputFileError
from gapless.spans import Run, Span

_SHORTEST = 1e-9
COMPUTE, HOST = "compute", "host"


@dataclass(frozen=True, slots=True)
class Window:
    """Some steps in a row of a run.

    begin, end    seconds; `end` is where the compute stage of the step behind them begins
    step_seconds  from one compute stage to the next, on average
    """

    run: Run
    begin: float
    end: float
    step_seconds: float

    def spans(self, length: float) -> list[Span]:
        """Those that `length` seconds from the begin on show at least a part of."""
        return [span for span in self.run.spans if span.end > self.begin and span.begin < self.begin + length]

    def idle(self, length: float) -> list[tuple[float, float]]:
        """When the compute lane ran nothing in `length` seconds from the begin on, as far as the run goes."""
        compute = sorted((span.begin, span.end) for span in self.run.spans if span.lane == COMPUTE)
        last = min(self.begin + length, max(end for _, end in compute))
        gaps: list[tuple[float, float]] = []
        reached = self.begin
        for begin, end in [*compute, (last, last)]:
            if begin > reached and reached < last:
                gaps.append((reached, min(begin, last)))
            reached = max(reached, end)
        return gaps


def typical_window(run: Run, steps: int) -> Window:
    """So many steps in a row that took the median time of all such; of several, those nearest to the middle.

    Raises InputFileError if they took no time.
    """
    compute = sorted(
        (span for span in run.spans if span.lane == COMPUTE and span.step >= 0), key=lambda span: span.begin
    )
    count = min(steps, len(compute) - 1)
    if count < 1:
        return _window(run, compute[0].begin, compute[0].end, 1)
    lengths = [_rounded(last.begin - first.begin) for first, last in zip(compute, compute[count:], strict=False)]
    median, middle = median_low(lengths), (len(lengths) - 1) / 2
    chosen = min((at for at, length in enumerate(lengths) if length == median), key=lambda at: abs(at - middle))
    return _window(run, compute[chosen].begin, compute[chosen + count].begin, count)


def _window(run: Run, begin: float, end: float, steps: int) -> Window:
    if end - begin < _SHORTEST:
        raise InputFileError(f"{run.name}: the steps of this trace take no time")
    return Window(run, begin, end, (end - begin) / steps)


def share(parts: Sequence[tuple[float, float]], length: float) -> float:
    """Part of the length that disjoint intervals cover, 0 to 1."""
    return sum(end - begin for begin, end in parts) / length if length else 0.0


def _rounded(seconds: float) -> float:
    return round(seconds, 9)
