"""Faults of the work between steps: pause, new weights and sleep, and what becomes of requests meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gapless.engine.core import InFlight
from gapless.engine.loop import Loop
from gapless.outcome import Committed
from gapless.scheduler import Scheduler
from gapless.waiting import SequenceState
from support.sim.parts import RigPool, RigRunner, RigScheduler
from support.sim.rig_engine import RigEngine


class PausesLate(RigEngine):
    """One step more is made before a pause."""

    def _obey(self) -> None:
        before = self._paused
        super()._obey()
        if self._paused and not before and self._loop.has_work:
            self._loop.step()


class DoesNotDrain(Loop):
    """Steps in flight stay there while something is done between steps."""

    def drain(self) -> None:
        pass


class DrainsAllButOne(Loop):
    """The newest step is left in flight."""

    def drain(self) -> None:
        while len(self._in_flight) > 1:
            self._begin_masks()
            self._launch_waiting()
            if len(self._in_flight) > 1:
                self._collect()


class GoesOnAfterUpdate(RigEngine):
    """A pause ends when requests had to end in it."""

    def _ends_first(self, scheduler: Scheduler) -> bool:
        waits = super()._ends_first(scheduler)
        self._was_paused = self._paused = False
        return waits


class UpdatesAsleep(RigEngine):
    """Weights are updated though they are not there."""

    def between_steps(
        self,
        work: Callable[[Loop], None],
        *,
        in_flight: InFlight | None = None,
        pauses: bool | None = None,
        asleep: bool = False,
    ) -> None:
        update = in_flight is not None and pauses is None
        super().between_steps(work, in_flight=in_flight, pauses=pauses, asleep=asleep or update)


class KeepsPrefixCache(RigPool):
    """Blocks of before can be found afterwards."""

    def forget_all(self) -> None:
        pass


class KeepsKV(RigScheduler):
    """Rows run on with what they have."""

    def recompute_all(self, *, restart: bool) -> tuple[int, ...]:
        if restart:
            return super().recompute_all(restart=True)
        self.pool.forget_all()
        return ()


class KeepsToken(RigScheduler):
    """A request that begins again has its first token already."""

    def recompute_all(self, *, restart: bool) -> tuple[int, ...]:
        super().recompute_all(restart=False)
        known = {request_id: sequence.tokens for request_id, sequence in self._sequences.items()}
        lost = super().recompute_all(restart=restart)
        for request_id in lost:
            sequence = self._sequences[request_id]
            sequence.tokens = known[request_id][: sequence.request.prompt.size + 1]
        return lost


class TellsNoRestart(RigEngine):
    """Nobody hears that tokens are void."""

    def _obey(self) -> None:
        super()._obey()
        for _ in range(self.outputs.qsize()):
            record = self.outputs.get()
            self.outputs.put(replace(record, restarted=()) if isinstance(record, Committed) else record)


class KeepsForm(RigScheduler):
    """The form of a request that begins again goes on."""

    def recompute_all(self, *, restart: bool) -> tuple[int, ...]:
        masks = {request_id: sequence.masks for request_id, sequence in self._sequences.items()}
        lost = super().recompute_all(restart=restart)
        for request_id in lost:
            self._sequences[request_id].masks = masks[request_id]
        return lost


class KeepsScores(RigScheduler):
    """A prompt that begins again counts as scored."""

    def recompute_all(self, *, restart: bool) -> tuple[int, ...]:
        scored = {request_id: sequence.scored for request_id, sequence in self._sequences.items()}
        lost = super().recompute_all(restart=restart)
        for request_id in lost:
            self._sequences[request_id].scored = scored[request_id]
        return lost


class WaitsForNobody(RigEngine):
    """What has begun is not waited for."""

    def _ends_first(self, scheduler: Scheduler) -> bool:
        return False


class HoldsNobodyBack(RigScheduler):
    """Who waits may begin though an update is to come first."""

    def hold_back(self) -> None:
        self._holds_back += 1


class LeavesFollowers(RigScheduler):
    """Who shares the prompt of a request that has begun is held back."""

    def _has_begun(self, sequence: SequenceState) -> bool:
        return sequence.cached >= 0


class LetsFollowersGo(RigScheduler):
    """Who shares the prompt of a request counts as begun, whatever that one does."""

    def _has_begun(self, sequence: SequenceState) -> bool:
        return sequence.cached >= 0 or sequence.request.leader >= 0


class ForgetsHeldBack(RigScheduler):
    """Who was held back is not queued again."""

    def let_begin(self) -> None:
        self._kept_back.clear()
        super().let_begin()


class KeepsKVAsleep(RigEngine):
    """Rows go on after a sleep with the memory that was given back."""

    def between_steps(
        self,
        work: Callable[[Loop], None],
        *,
        in_flight: InFlight | None = None,
        pauses: bool | None = None,
        asleep: bool = False,
    ) -> None:
        super().between_steps(work, in_flight=None if pauses else in_flight, pauses=pauses, asleep=asleep)


class LosesWeights(RigRunner):
    """Nobody keeps the weights while the engine sleeps."""

    def wake(self) -> None:
        self._weights = [tensor.clone() for tensor in self.model.tensors()]
        super().wake()
