"""The simulated device as the rig has it: it runs out of memory where the schedule says, and watches its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gapless.device.base import Access
from gapless.device.sim import Order, SimDevice
from gapless.device.sim.streams import SimEvent, SimStream
from gapless.errors import OutOfMemoryError
from gapless.sampling.base import Sampler, SamplingTables
from gapless.sampling.features import FeatureTables, StepMasks
from support.sim.findings import Broken
from support.sim.schedule import Shortage

if TYPE_CHECKING:
    from support.sim.parts import Parts, RigPool

POISON_TOKEN = -1_163_005_939


@dataclass(slots=True)
class _Watched:
    """A buffer on the device, and what it held when something that may write to it was there last."""

    name: str
    memory: NDArray[np.generic]
    content: bytes

    def check(self) -> None:
        before, self.content = self.content, self.memory.tobytes()
        if self.content != before:
            raise Broken("books", f"{self.name} changed outside queued work")


class RigDevice(SimDevice):
    """Runs out of memory where the schedule says, with streams and events that a fault may replace.

    Watches memory on the device: the host must not change it past every stream, which no checker would be told of.
    """

    def __init__(self, order: Order, parts: Parts, *, captures_graphs: bool, audit: bool) -> None:
        super().__init__(order, captures_graphs=captures_graphs, audit=audit)
        self.parts = parts
        self.shortages: dict[int, Shortage] = {}  # by step, still to come
        self.failed_at: list[Shortage] = []
        self._watched: dict[int, _Watched] = {}  # by address
        self.pool: RigPool | None = None  # none before start-up is over

    def watch(self, buffers: dict[str, Tensor]) -> None:
        """From now on, only queued work and `poison` may change these."""
        for name, buffer in buffers.items():
            memory = buffer.numpy()
            self._watched[buffer.data_ptr()] = _Watched(name, memory, memory.tobytes())
            self.audit_too(name, buffer)

    def check_watched(self) -> None:
        """Whether all of it is as the last piece of work has left it."""
        for each in self._watched.values():
            each.check()

    def poison(
        self, tensor: Tensor, name: str, units: NDArray[np.integer] | None = None, value: int = POISON_TOKEN
    ) -> None:
        watched = self._watched.get(tensor.data_ptr())
        if watched is not None:
            watched.check()
        super().poison(tensor, name, units, value)
        if watched is not None:
            watched.content = watched.memory.tobytes()

    def _run(self, stream: SimStream) -> None:
        self.check_watched()
        super()._run(stream)
        for each in self._watched.values():
            each.content = each.memory.tobytes()

    def stream(self, name: str) -> SimStream:
        stream = self.parts.stream(self, name, self.checker.add_thread(name))
        self.adopt(stream)
        return stream

    def event(self, name: str = "", *, timed: bool = False) -> SimEvent:
        return self.parts.event(self, name or "event")

    def run_checked(self, work: Callable[[], None], accesses: Callable[[], Iterable[Access]]) -> None:
        assert self._running is not None
        stream, piece = self._running
        self.reach(f"before {stream.name}")
        self.reach(f"before {piece.note.name}")
        super().run_checked(work, accesses if accesses is tuple else lambda: self._check_writes(accesses()))
        self.reach(f"after {piece.note.name}")
        if piece.note.name not in ("take rows", "score"):
            self.reach(f"after {stream.name}")

    def _check_writes(self, accesses: Iterable[Access]) -> Iterable[Access]:
        """Streams run in order, so that no race tells of a step that writes what another row reads."""
        for access in accesses:
            if self.pool is not None and access.write and access.name == "keys 0":
                assert access.units is not None
                self.pool.check_writes(access.units)
            yield access

    @property
    def step_in_hand(self) -> int:
        """Of the work that runs now."""
        assert self._running is not None
        return self._running[1].note.step

    def reach(self, place: str) -> None:
        """The work in hand has come to this place: it raises if its step has no memory there."""
        step = self.step_in_hand
        if self.shortages.get(step) == place:
            self.failed_at.append(self.shortages.pop(step))
            raise OutOfMemoryError("the schedule has taken the memory")


class RigSampler:
    """A sampler that the schedule can take the memory from."""

    def __init__(self, sampler: Sampler, device: RigDevice) -> None:
        self._sampler = sampler
        self._device = device

    def sample(
        self,
        logits_EV: Tensor,
        rows_E: Tensor,
        positions_E: Tensor,
        tables: SamplingTables,
        *,
        all_greedy: bool,
        features: FeatureTables | None = None,
        masks: StepMasks | None = None,
    ) -> Tensor:
        self._device.reach("between forward and sampling")
        return self._sampler.sample(
            logits_EV, rows_E, positions_E, tables, all_greedy=all_greedy, features=features, masks=masks
        )
