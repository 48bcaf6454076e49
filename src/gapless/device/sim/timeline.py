"""What happened when, in lanes: as text to read, and as Chrome trace JSON to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WIDTH = 26


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a lane did from `begin` to `end`, in virtual seconds; a moment if they are equal."""

    lane: str
    name: str
    step: int
    slot: str
    begin: float
    end: float

    @property
    def label(self) -> str:
        step = f" {self.step}" if self.step >= 0 else ""
        return f"{self.name}{step}{' ' + self.slot if self.slot else ''}"


class Timeline:
    """Spans in the order in which they were run."""

    def __init__(self, lanes: Sequence[str] = ("host",)) -> None:
        self.lanes = list(lanes)
        self.spans: list[Span] = []

    def add(self, span: Span) -> None:
        self.spans.append(span)

    def text(self, last: int | None = None) -> str:
        """One line for each span, one column for each lane, in the order of running; only the `last` ones if given."""
        spans = self.spans if last is None else self.spans[-last:]
        skipped = len(self.spans) - len(spans)
        lines = ["      " + "".join(lane.ljust(_WIDTH) for lane in self.lanes).rstrip()]
        if skipped:
            lines.append(f"      … {skipped} earlier ones")
        for number, span in enumerate(spans, start=skipped):
            column = self.lanes.index(span.lane)
            lines.append(f"{number:>5} " + " " * (_WIDTH * column) + span.label)
        return "\n".join(lines)

    def chrome_trace(self) -> dict[str, Any]:
        """For chrome://tracing or Perfetto: one thread for each lane, virtual microseconds."""
        names = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": lane}}
            for tid, lane in enumerate(self.lanes)
        ]
        spans = [
            {
                "ph": "X",
                "name": span.label,
                "cat": span.lane,
                "pid": 0,
                "tid": self.lanes.index(span.lane),
                "ts": span.begin * 1e6,
                "dur": max(span.end - span.begin, 0.0) * 1e6,
                "args": {"step": span.step, "slot": span.slot},
            }
            for span in self.spans
        ]
        return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}
