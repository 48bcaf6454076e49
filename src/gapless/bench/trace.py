"""Where the GPU's time went in a window, from a trace of its kernels and copies (torch profiler, CUPTI)."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
_US = 1e-6
GRAPH_KERNELS = 20  # fewer kernels under one launch are no decode step
TOP_KERNELS = 20
NAME_LENGTH = 60
OTHER, WITHIN, BETWEEN = "(other kernels)", "(idle within steps)", "(idle between steps)"

Event = dict[str, Any]
"""Of a Chrome trace: name, cat, ts and dur in microseconds, and args.correlation, which names the launch."""


@dataclass(frozen=True, slots=True)
class Part:
    """Microseconds and launches per step.

    Kernels overlap: one may start before the one before has ended, and waits for it. So an instant belongs to the
    kernel that started first of those that run, and the parts sum to the window.
    """

    name: str
    us: float
    launches: float = 0.0


@dataclass(frozen=True, slots=True)
class GpuBusy:
    """Shares of a window of captured steps, from the first kernel's start to the last one's end, 0 to 1.

    steps              graph replays in the window
    kernel_share       some kernel ran
    work_share         some kernel or copy ran
    between_steps      no kernel ran between the last kernel of a replay and the first of the next: the idle time that
                       the host can cause
    within_steps       no kernel ran between two kernels of one replay: launch latency inside the graph
    longest_gap_us     longest time with no kernel
    kernels_per_step   kernels of one replay
    parts              they sum to the window's time per step: kernels by name, most expensive first, then idle time
    """

    steps: int
    window_seconds: float
    kernel_share: float
    work_share: float
    between_steps: float
    within_steps: float
    longest_gap_us: float
    kernels_per_step: float
    parts: tuple[Part, ...]


class KernelTrace:
    """Context manager that records every kernel of the process."""

    def __enter__(self) -> KernelTrace:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)

    def events(self) -> list[Event]:
        """Kernels, copies and fills. Call it after the with block."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events: list[Event] = json.loads(path.read_text())["traceEvents"]
        return [e for e in events if e.get("cat") in _WORK and e.get("ph") == "X"]


def summarise(events: Sequence[Event], steps: int) -> GpuBusy | None:
    """Busy shares of the last `steps` graph replays; None without any.

    Kernels of one graph replay share their correlation; a replay has at least GRAPH_KERNELS of them.
    """
    per_launch = Counter(_launch(e) for e in events if e["cat"] == "kernel")
    graphs = {launch for launch, kernels in per_launch.items() if kernels >= GRAPH_KERNELS}
    kernels = sorted((e for e in events if _launch(e) in graphs), key=_begin)
    replays = list(dict.fromkeys(map(_launch, kernels)))[-steps:]
    wanted = set(replays)
    kernels = [e for e in kernels if _launch(e) in wanted]
    if not kernels:
        return None
    begin, end = _begin(kernels[0]), max(map(_end, kernels))
    window, count = end - begin, len(replays)
    between = within = longest = 0.0
    last = _launch(kernels[0])
    for kernel, idle, _ in _occupy(kernels):
        if _launch(kernel) == last:
            within += idle
        else:
            between += idle
        longest, last = max(longest, idle), _launch(kernel)
    return GpuBusy(
        steps=count,
        window_seconds=window * _US,
        kernel_share=1.0 - (between + within) / window,
        work_share=_covered([(max(_begin(e), begin), min(_end(e), end)) for e in events]) / window,
        between_steps=between / window,
        within_steps=within / window,
        longest_gap_us=longest,
        kernels_per_step=len(kernels) / count,
        parts=(*kernel_parts(kernels, count), Part(WITHIN, within / count), Part(BETWEEN, between / count)),
    )


def kernel_parts(kernels: Sequence[Event], steps: int) -> tuple[Part, ...]:
    """TOP_KERNELS names, most expensive first, then the others as one. The sum is the time with a kernel, per step."""
    us: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for kernel, _, own in _occupy(kernels):
        us[kernel["name"]] += own
        launches[kernel["name"]] += 1
    parts = [Part(name[:NAME_LENGTH], total / steps, launches[name] / steps) for name, total in us.items()]
    parts.sort(key=lambda part: part.us, reverse=True)
    others = parts[TOP_KERNELS:]
    rest = Part(OTHER, sum(part.us for part in others), sum(part.launches for part in others))
    return (*parts[:TOP_KERNELS], *([rest] if others else []))


def _occupy(kernels: Sequence[Event]) -> Iterator[tuple[Event, float, float]]:
    """Each kernel in order of its start, the idle time before it, and the time that is its own; see Part."""
    reached: float | None = None
    for kernel in sorted(kernels, key=_begin):
        begin, end = _begin(kernel), _end(kernel)
        reached = begin if reached is None else reached
        yield kernel, max(0.0, begin - reached), max(0.0, end - max(begin, reached))
        reached = max(reached, end)


def _launch(event: Event) -> int:
    return event["args"]["correlation"]


def _begin(event: Event) -> float:
    return float(event["ts"])


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals; empty and negative ones count nothing."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(span for span in spans if span[1] > span[0]):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
