"""A trace of an engine: the last steps at each lookahead that it ran with."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

from gapless.spans import Run, Span, chrome_trace

STEPS = 2000
LANES = ("host", "h2d", "compute", "d2h")
PREFILL = "prefill"  # name of a compute stage that has prompt tokens in it
_SPANS_PER_STEP = 9  # six phases of the host, two copies, one compute stage


class Trace:
    """Collects spans from the engine's thread and the streams; may be read at any time, also after a failure.

    steps  how many are kept for each lookahead; older ones are dropped.
    """

    def __init__(self, steps: int = STEPS) -> None:
        self.device_name = ""
        self._limit = steps * _SPANS_PER_STEP
        self._spans: dict[int, deque[Span]] = {}

    def spans_of(self, lookahead: int) -> deque[Span]:
        """Where spans of steps at this lookahead go."""
        return self._spans.setdefault(lookahead, deque(maxlen=self._limit))

    def runs(self) -> list[Run]:
        """What is there so far, by lookahead."""
        found = {lookahead: list(self._spans[lookahead]) for lookahead in sorted(self._spans)}
        return [Run(f"lookahead {each}", self.device_name, LANES, spans) for each, spans in found.items() if spans]

    def write(self, path: Path) -> None:
        """As Chrome trace JSON. Raises OSError."""
        write_trace(path, self.runs())


def write_trace(path: Path, runs: list[Run]) -> None:
    """Runs as Chrome trace JSON. Raises OSError."""
    path.write_text(json.dumps(chrome_trace(runs), separators=(",", ":")), encoding="utf-8")
