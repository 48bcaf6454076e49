"""How much of a window the GPU was busy, from a trace of its kernels and copies (torch profiler, CUPTI)."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

_KERNELS = {"kernel"}
_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
_US = 1e-6


@dataclass(frozen=True, slots=True)
class GpuBusy:
    """Shares of the window from the first kernel's start to the last one's end, 0 to 1.

    work_share     some kernel or copy ran
    kernel_share   some kernel ran; copies alone do not count
    longest_gap_us longest time with no kernel
    top            (kernel name, seconds, launches), most expensive first
    """

    window_seconds: float
    work_share: float
    kernel_share: float
    longest_gap_us: float
    top: tuple[tuple[str, float, int], ...]


class KernelTrace:
    """Context manager that records every kernel of the process."""

    def __enter__(self) -> KernelTrace:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)

    def busy(self) -> GpuBusy:
        """Read the recorded window; call after the with block."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        return summarise([e for e in events if e.get("cat") in _WORK and e.get("ph") == "X"])


def summarise(events: list[dict[str, Any]]) -> GpuBusy:
    """Busy shares of Chrome trace events that have cat, ts, dur (microseconds) and name."""
    if not events:
        return GpuBusy(0.0, 0.0, 0.0, 0.0, ())
    work = _spans(events)
    kernels = _spans([e for e in events if e["cat"] in _KERNELS])
    begin, end = kernels[0][0], max(stop for _, stop in kernels)
    kernel_time, gap = _union(kernels)
    work_time, _ = _union([(max(a, begin), min(b, end)) for a, b in work if b > begin and a < end])
    seconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in events:
        seconds[event["name"]] += event["dur"] * _US
        launches[event["name"]] += 1
    top = tuple((name, round(total, 6), launches[name]) for name, total in seconds.most_common(20))
    window = end - begin
    return GpuBusy(window * _US, work_time / window, kernel_time / window, gap, top)


def _spans(events: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events)


def _union(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """(covered length, longest gap) of sorted intervals."""
    covered = longest = 0.0
    reached = spans[0][0]
    for begin, end in spans:
        longest = max(longest, begin - reached)
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered, longest
