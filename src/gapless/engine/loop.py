"""The loop: plan, fill and launch step N+1 while the device runs step N, and only then read what N produced."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

from gapless.engine.fill import fill
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot, SlotRing
from gapless.errors import InternalError, OutOfMemoryError
from gapless.outcome import Committed
from gapless.plan import Plan
from gapless.scheduler import Scheduler


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
        self._in_flight: deque[tuple[Plan, Slot]] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> None:
        """One turn of the pipeline. Call it while has_work."""
        plan = self.scheduler.plan()
        if plan is not None:
            slot = self.slots.acquire()
            shape = self.runner.shape_of(plan)
            fill(plan, self.scheduler.rows.tokens, slot.packed, shape, self.runner.scratch_row)
            self.runner.launch(plan, slot, shape)
            self._in_flight.append((plan, slot))
        if len(self._in_flight) > self.lookahead or (plan is None and self._in_flight):
            self.publish(self._collect(*self._in_flight.popleft()))
        elif plan is None:
            raise InternalError("there is work, but nothing can run and nothing is in flight")

    def _collect(self, plan: Plan, slot: Slot) -> Committed:
        """Wait for a step and book what it brought."""
        try:
            sampled = self.slots.collect(slot)
        except OutOfMemoryError as error:
            abandoned = self._abandon(plan)
            if self.scheduler.budget.exhausted:
                raise OutOfMemoryError(f"there is no memory for a step of even one token: {error}") from error
            return abandoned
        return self.scheduler.commit(plan, sampled)

    def _abandon(self, failed: Plan) -> Committed:
        """Give up a step that ran out of memory, with the steps behind it, which the device has skipped."""
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
        self.runner.close()

    def check_integrity(self) -> None:
        """Raise InternalError if scheduler and slots disagree with the steps in flight."""
        self.scheduler.check_integrity()
        self.slots.check_integrity(len(self._in_flight))
