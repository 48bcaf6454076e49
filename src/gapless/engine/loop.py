"""The loop: plan, fill and launch step N+1 while the device runs step N, and only then read what N produced."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from gapless.engine.fill import fill
from gapless.engine.layout import StepShape
from gapless.engine.masking import Masking
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot, SlotRing
from gapless.errors import InternalError, OutOfMemoryError
from gapless.outcome import Committed
from gapless.plan import Plan
from gapless.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Waiting:
    """A step whose forward is queued, and whose sampling waits for masks. They need all tokens before it."""

    plan: Plan
    slot: Slot
    shape: StepShape
    launch: Callable[[int], None]


class Loop:
    """Owns the list of steps in flight. lookahead 0 is the synchronous engine; there is no second code path."""

    def __init__(
        self,
        scheduler: Scheduler,
        slots: SlotRing,
        runner: Runner,
        publish: Callable[[Committed], None],
        lookahead: int,
    ) -> None:
        self.scheduler = scheduler
        self.slots = slots
        self.runner = runner
        self.publish = publish
        self.lookahead = lookahead
        self.masking = Masking()
        self._in_flight: deque[tuple[Plan, Slot]] = deque()
        self._waiting: Waiting | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> None:
        """One turn of the pipeline. Call it while has_work."""
        if self._waiting is not None:
            self._begin_masks()
        plan = self.scheduler.plan()
        if self._waiting is not None:
            self._launch_waiting()
        if plan is not None:
            self._launch(plan)
        if len(self._in_flight) > self.lookahead or (plan is None and self._in_flight):
            if self._waiting is not None and len(self._in_flight) == 1:
                self._begin_masks()
                self._launch_waiting()
            self._collect()
        elif plan is None and self.has_work:
            raise InternalError("there is work, but nothing can run and nothing is in flight")

    def drain(self) -> None:
        """Read all that is in flight, and launch nothing new."""
        while self._in_flight:
            self._begin_masks()
            self._launch_waiting()
            if self._in_flight:  # what comes before masks may have run out of memory, and all with it
                self._collect()

    def _launch(self, plan: Plan) -> None:
        slot = self.slots.acquire()
        shape = self.runner.shape_of(plan)
        fill(plan, self.scheduler.rows.tokens, slot.packed, shape, self.runner.scratch_row)
        launch_sampling = self.runner.launch(plan, slot, shape)
        self._in_flight.append((plan, slot))
        if plan.masked:
            self._waiting = Waiting(plan, slot, shape, launch_sampling)
        else:
            launch_sampling(0)

    def _begin_masks(self) -> None:
        """Read the steps before one that waits for masks, and begin to fill these, beside what the host does next."""
        while self._waiting is not None and len(self._in_flight) > 1:
            self._collect()
        if self._waiting is not None:
            entries = self.scheduler.masks_of(self._waiting.plan)
            accepted = self.scheduler.take_accepted()
            self.masking.begin(accepted, entries, self._waiting.slot, self._waiting.shape.samples)

    def _launch_waiting(self) -> None:
        """Queue the sampling of a step that waits for masks, once they are filled."""
        if self._waiting is not None:
            numbers, failures = self.masking.wait()
            waiting, self._waiting = self._waiting, None
            waiting.launch(numbers)
            for request_id, error in failures:
                self.scheduler.fail(request_id, error)

    def _collect(self) -> None:
        """Wait for the oldest step, book what it brought and publish it."""
        plan, slot = self._in_flight.popleft()
        try:
            sampled = self.slots.collect(slot)
        except OutOfMemoryError as error:
            abandoned = self._abandon(plan)
            if self.scheduler.budget.exhausted:
                raise OutOfMemoryError(f"there is no memory for a step of even one token: {error}") from error
            self.publish(abandoned)
        else:
            self.publish(self.scheduler.commit(plan, sampled))

    def _abandon(self, failed: Plan) -> Committed:
        """Give up a step that ran out of memory, with the steps behind it, which the device has skipped."""
        if self._waiting is not None:
            self._waiting.launch(0)
            self._waiting = None
        skipped = [plan for plan, _ in self._in_flight]
        for _, slot in self._in_flight:
            with suppress(OutOfMemoryError):
                self.slots.collect(slot)
        self._in_flight.clear()
        self.runner.recover()
        return self.scheduler.abandon(failed, skipped)

    def close(self) -> None:
        """Give up what is in flight and end the device's streams."""
        self._in_flight.clear()
        self.masking.close()
        self.runner.close()

    def check_integrity(self) -> None:
        """Raise InternalError if scheduler and slots disagree with the steps in flight."""
        self.scheduler.check_integrity()
        self.slots.check_integrity(len(self._in_flight))
