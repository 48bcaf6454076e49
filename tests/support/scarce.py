"""Engines that run out of memory when a test says so, and a scheduler that is watched while they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.config import EngineConfig, SchedulerLimits
from gapless.device.base import Device, Note
from gapless.device.cpu import CpuDevice, CpuStream
from gapless.errors import OutOfMemoryError
from gapless.models.base import Model
from gapless.plan import Plan
from gapless.rows import RowState
from gapless.scheduler import Scheduler
from support.harness import Harness
from support.hash_model import HashModel


def raise_ours() -> None:
    raise OutOfMemoryError("no memory for the activations")


def raise_python_s() -> None:
    raise MemoryError


def raise_torch_s() -> None:
    """More than any machine has: torch's allocator on the CPU raises a RuntimeError."""
    torch.empty(2**55, dtype=torch.uint8)


SHORTAGES: list[Callable[[], None]] = [raise_ours, raise_python_s, raise_torch_s]


class ScarceModel(HashModel):
    """Has no memory for a step that `fails`, which is told the step's tokens; the cache has been written by then."""

    def __init__(
        self,
        fails: Callable[[int], bool],
        shortage: Callable[[], None] = raise_ours,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(device=device)
        self.fails: Callable[[int], bool] = fails
        self.shortage = shortage

    def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
        hidden_TH = super().forward(tokens_T, kv, batch)
        if self.fails(tokens_T.numel()):
            self.shortage()
        return hidden_TH


class WatchedScheduler(Scheduler):
    """Keeps the size of every step, and checks that each is within the budget and has the oldest row in it."""

    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits)
        self.sizes: list[int] = []

    def plan(self) -> Plan | None:
        oldest = int(np.where(self.rows.state == RowState.RUNNING, self.rows.rank, 2**62).argmin())
        runs = self.rows.state[oldest] == RowState.RUNNING
        plan = super().plan()
        if plan is not None:
            self.sizes.append(plan.num_tokens)
            assert plan.num_tokens <= self.budget.tokens, "a step over the budget"
            assert not runs or oldest in plan.rows_E or not self.pool.num_free, "the oldest sits out"
        return plan


class ScarceStream(CpuStream):
    """Runs out of memory right before or right after a piece of work that is picked."""

    def __init__(self, name: str, picks: Callable[[Note], str | None]) -> None:
        super().__init__(name)
        self._picks = picks

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        where = None if note is None or note.step < 0 else self._picks(note)

        def scarce() -> None:
            if where != "before":
                work()
            if where is not None:
                raise_ours()

        super().enqueue(scarce, note)


class ScarceDevice(CpuDevice):
    """Whatever the engine enqueues for a step can fail for want of memory: `picks` says "before", "after" or None."""

    def __init__(self, picks: Callable[[Note], str | None], *, captures_graphs: bool = False) -> None:
        super().__init__(captures_graphs=captures_graphs)
        self._picks = picks

    def stream(self, name: str) -> CpuStream:
        stream = ScarceStream(name, self._picks)
        self._streams.append(stream)
        return stream


class ScarceHarness(Harness):
    """Its scheduler is watched. Unless it is given a model or a device that fail, single steps can be made to."""

    def __init__(self, config: EngineConfig, model: Model | None = None, device: Device | None = None) -> None:
        super().__init__(config, model, device or ScarceDevice(self._picks))
        self.watched = WatchedScheduler(self.scheduler.limits)
        self.loop.scheduler = self.scheduler = self.watched
        self._failing: set[int] = set()

    def fail_next_step(self) -> None:
        """The next step that is launched has no memory to compute, unless it has a single token."""
        self._failing.add(len(self.watched.sizes))

    def _picks(self, note: Note) -> str | None:
        fails = note.step in self._failing and self.watched.sizes[note.step] > 1
        return "before" if fails and note.name != "copy in" else None
