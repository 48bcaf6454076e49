"""What the simulator did when: as text to read, and as Chrome trace JSON to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gapless.spans import Run, Span, chrome_trace

_WIDTH = 26


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
        """In virtual time."""
        return chrome_trace([Run("", "", self.lanes, self.spans)])
