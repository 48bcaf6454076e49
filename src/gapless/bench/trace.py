"""How much of a window the GPU was busy, from a trace of its kernels and copies (torch profiler, CUPTI)."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
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
    top                (kernel name, microseconds per step, launches per step), most expensive first
    """

    steps: int
    window_seconds: float
    kernel_share: float
    work_share: float
    between_steps: float
    within_steps: float
    longest_gap_us: float
    kernels_per_step: float
    top: tuple[tuple[str, float, float], ...]


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

    def busy(self, steps: int) -> GpuBusy | None:
        """The last `steps` graph replays of the recording; None without any. Call it after the with block."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        return summarise([e for e in events if e.get("cat") in _WORK and e.get("ph") == "X"], steps)


def summarise(events: Sequence[dict[str, Any]], steps: int) -> GpuBusy | None:
    """Busy shares of Chrome trace events with cat, name, ts and dur (microseconds) and args.correlation.

    Kernels of one graph replay share their correlation; a replay has at least GRAPH_KERNELS of them.
    """
    per_launch = Counter(e["args"]["correlation"] for e in events if e["cat"] == "kernel")
    graphs = {launch for launch, kernels in per_launch.items() if kernels >= GRAPH_KERNELS}
    kernels = sorted((e for e in events if e["args"]["correlation"] in graphs), key=_begin)
    replays = list(dict.fromkeys(e["args"]["correlation"] for e in kernels))[-steps:]
    wanted = set(replays)
    kernels = [e for e in kernels if e["args"]["correlation"] in wanted]
    if not kernels:
        return None
    begin, end = _begin(kernels[0]), max(map(_end, kernels))
    window = end - begin
    between = within = longest = busy = 0.0
    reached, last = begin, kernels[0]["args"]["correlation"]
    for kernel in kernels:
        gap = max(0.0, _begin(kernel) - reached)
        if kernel["args"]["correlation"] == last:
            within += gap
        else:
            between += gap
        longest = max(longest, gap)
        busy += max(0.0, _end(kernel) - max(_begin(kernel), reached))
        reached, last = max(reached, _end(kernel)), kernel["args"]["correlation"]
    seconds: Counter[str] = Counter()
    for kernel in kernels:
        seconds[kernel["name"]] += kernel["dur"]
    launches = Counter(kernel["name"] for kernel in kernels)
    count = len(replays)
    return GpuBusy(
        steps=count,
        window_seconds=window * _US,
        kernel_share=busy / window,
        work_share=_covered([(max(_begin(e), begin), min(_end(e), end)) for e in events]) / window,
        between_steps=between / window,
        within_steps=within / window,
        longest_gap_us=longest,
        kernels_per_step=len(kernels) / count,
        top=tuple(
            (name[:NAME_LENGTH], round(total / count, 3), launches[name] / count)
            for name, total in seconds.most_common(TOP_KERNELS)
        ),
    )


def _begin(event: dict[str, Any]) -> float:
    return float(event["ts"])


def _end(event: dict[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals; empty and negative ones count nothing."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(span for span in spans if span[1] > span[0]):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
