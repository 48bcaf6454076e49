"""The masks' thread as the rig has it: no thread, but moments at which it may have worked."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from gapless.engine.masking import Masking

if TYPE_CHECKING:
    from support.sim.rig import Rig


class _LateFuture(Future[Any]):
    """Of work that is done when its result is asked for, if not before."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self._work = work

    def run(self) -> None:
        if not self.done():
            try:
                self.set_result(self._work())
            except BaseException as error:  # noqa: BLE001 - for whoever waits
                self.set_exception(error)

    def result(self, timeout: float | None = None) -> Any:
        self.run()
        return super().result(timeout)


class RigMasking(Masking):
    """Its thread works at a phase boundary that the schedule's seed chooses, at the latest when it is waited for."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self.rig = rig
        self._queued: list[_LateFuture] = []
        self._random = random.Random(rig.schedule.order_seed)

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        future = _LateFuture(work)
        self._queued.append(future)
        return future

    def work_on(self) -> None:
        """A moment at which the thread may do what it has to do, or not yet."""
        waiting, self._queued = self._queued, []
        for future in waiting:
            if self._random.random() < 0.3:
                future.run()
            elif not future.done():
                self._queued.append(future)
