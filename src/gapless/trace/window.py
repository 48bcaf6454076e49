"""Which steps of a run to look at, and what host and device did in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median_low

from gapless.errors import InputFileError
from gapless.spans import Run, Span
from gapless.trace.record import PREFILL

_SHORTEST = 1e-9
COMPUTE, HOST = "compute", "host"


@dataclass(frozen=True, slots=True)
class Window:
    """Some whole steps in a row of a run; all figures are over these alone.

    steps       their numbers
    begin, end  seconds; `end` is where the compute stage of the step behind them begins
    """

    run: Run
    steps: Sequence[int]
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def step_seconds(self) -> float:
        """From one compute stage to the next, on average."""
        return self.seconds / len(self.steps)

    def spans(self) -> list[Span]:
        """Those of which the window shows at least a part."""
        return [span for span in self.run.spans if span.end > self.begin and span.begin < self.end]

    def idle(self) -> list[tuple[float, float]]:
        """When the compute lane ran nothing."""
        gaps: list[tuple[float, float]] = []
        reached = self.begin
        compute = sorted((span.begin, span.end) for span in self.spans() if span.lane == COMPUTE)
        for begin, end in [*compute, (self.end, self.end)]:
            if begin > reached:
                gaps.append((reached, begin))
            reached = max(reached, end)
        return gaps

    @property
    def idle_share(self) -> float:
        """0 to 1."""
        return sum(end - begin for begin, end in self.idle()) / self.seconds

    def host_seconds(self, *, waiting: bool) -> float:
        """What the host works for a step, or waits, on average.

        Counted by the number of the step, wherever the host was with it: at lookahead 1 it works on a step before and
        after the device does. What has no number counts as far as the window reaches.
        """
        numbers = set(self.steps)
        total = 0.0
        for span in self.run.spans:
            if span.lane == HOST and is_wait(span) == waiting:
                if span.step in numbers:
                    total += span.end - span.begin
                elif span.step < 0:
                    total += max(0.0, min(span.end, self.end) - max(span.begin, self.begin))
        return total / len(self.steps)


def is_wait(span: Span) -> bool:
    """Whether this is the host waiting for the device."""
    return span.lane == HOST and (span.name == "collect" or span.name.startswith("waited"))


def typical_window(run: Run, steps: int) -> Window:
    """So many decode steps in a row that took the median time of all such; of several, those nearest to the middle.

    Steps with prompt tokens are left out, unless no two decode steps follow each other. Raises InputFileError if the
    steps took no time.
    """
    spans = sorted((span for span in run.spans if span.lane == COMPUTE and span.step >= 0), key=lambda span: span.begin)
    stages = [next(group) for _, group in groupby(spans, key=lambda span: span.step)]  # a stage may have two parts
    stretches = [list(group) for _, group in groupby(stages, key=lambda span: span.name == PREFILL)]
    stretches = [each for each in stretches if each[0].name != PREFILL and len(each) > 1] or [stages]
    count = min(steps, max(len(each) for each in stretches) - 1)
    if count < 1:
        return _window(run, stages, stages[0].end)
    rows = [each[at : at + count + 1] for each in stretches for at in range(len(each) - count)]
    lengths = [_rounded(row[-1].begin - row[0].begin) for row in rows]
    median, middle = median_low(lengths), (len(lengths) - 1) / 2
    chosen = min((at for at, length in enumerate(lengths) if length == median), key=lambda at: abs(at - middle))
    return _window(run, rows[chosen][:-1], rows[chosen][-1].begin)


def _window(run: Run, stages: Sequence[Span], end: float) -> Window:
    window = Window(run, [stage.step for stage in stages], stages[0].begin, end)
    if window.seconds < _SHORTEST:
        raise InputFileError(f"{run.name}: the steps of this trace take no time")
    return window


def _rounded(seconds: float) -> float:
    return round(seconds, 9)
