"""What happened when, in lanes: the form that devices, traces and pictures share, and its Chrome trace JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Something that a lane did from `begin` to `end`, in seconds; a moment if they are equal."""

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


class Run(NamedTuple):
    """Spans of one run by one clock. `note` says on what it ran; it and `name` may be empty."""

    name: str
    note: str
    lanes: Sequence[str]
    spans: Sequence[Span]


def chrome_trace(runs: Sequence[Run]) -> dict[str, Any]:
    """For chrome://tracing, Perfetto and `gapless timeline`: a process for each run, a thread for each lane.

    Times are in microseconds, from the first span of each run on.
    """
    events: list[dict[str, Any]] = []
    for pid, run in enumerate(runs, start=1):  # viewers take process and thread 0 for the idle one
        tids = {lane: tid for tid, lane in enumerate(run.lanes, start=1)}
        if run.name:
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": run.name}})
        if run.note:
            events.append({"ph": "M", "name": "process_labels", "pid": pid, "args": {"labels": run.note}})
        for lane, tid in tids.items():
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}})
            events.append({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}})
        start = min((span.begin for span in run.spans), default=0.0)
        events.extend(
            {
                "ph": "X",
                "name": span.label,
                "cat": span.lane,
                "pid": pid,
                "tid": tids[span.lane],
                "ts": round((span.begin - start) * 1e6, 3),
                "dur": round(max(span.end - span.begin, 0.0) * 1e6, 3),
                "args": {"name": span.name, "step": span.step, "slot": span.slot},
            }
            for span in run.spans
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
