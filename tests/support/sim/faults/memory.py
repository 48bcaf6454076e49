"""Faults of slots, rows, KV blocks and preemption: memory that is reused too early, twice or never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heappush

import numpy as np

from gapless.config import SchedulerLimits
from gapless.device.base import Device
from gapless.engine.slots import Slot, SlotSizes
from gapless.outcome import Committed, Finished, LogprobLines, Sampled
from gapless.plan import Ints, Plan
from gapless.request import FinishReason
from gapless.rows import RowSet, RowState
from gapless.sampling.logprobs import PLACES
from gapless.waiting import SequenceState, WaitingQueue
from support.sim.parts import Parts, RigPool, RigScheduler, RigSlots
from support.sim.rig import Rig


def nothing(plan: Plan) -> Sampled:
    """What a slot may hold whose step has not run."""

    def lines(count: int) -> LogprobLines:
        places = np.zeros((count, PLACES), dtype=np.int32)
        return LogprobLines(places, places.view(np.float32), np.zeros(count, dtype=np.int32))

    scores = None if plan.scores is None else lines(plan.scores.indices_Q.size)
    return Sampled(np.zeros(plan.num_samples, dtype=np.int32), lines(plan.num_samples), scores)


class SlotTooEarly(RigSlots):
    """Hands out one slot fewer than there are steps in flight."""

    def acquire(self) -> Slot:
        slot = self.slots[self._next]
        self._next = (self._next + 1) % max(1, len(self.slots) - 1)
        slot.in_flight = True
        return slot

    def check_integrity(self, steps_in_flight: int) -> None:
        pass


def shared(name: str) -> Parts:
    """All slots use the first one's buffer."""

    class Shared(RigSlots):
        def __init__(self, device: Device, count: int, sizes: SlotSizes) -> None:
            super().__init__(device, count, sizes)
            for slot in self.slots[1:]:
                setattr(slot, name, getattr(self.slots[0], name))
                slot.packed = device.host_view(slot.host_in)
                slot.masks = device.host_view(slot.host_masks)
                slot._sampled = device.host_view(slot.host_out)  # pyright: ignore[reportPrivateUsage]
                slot._lines = device.host_view(slot.host_lines)  # pyright: ignore[reportPrivateUsage]

    return Parts(slots=Shared)


class FreesSlotAtCompute(RigSlots):
    """A slot is free once its compute stage is over; its tokens may still be on their way."""

    def collect(self, slot: Slot) -> Sampled:
        slot.d2h_done = slot.compute_done
        return super().collect(slot)


class KeepsView(RigSlots):
    """Returns the pinned buffer itself in place of a copy."""

    def collect(self, slot: Slot) -> Sampled:
        sampled = super().collect(slot)
        return replace(sampled, tokens=slot.host_out.numpy()[: sampled.tokens.size])


class FreesAtCommit(RigScheduler):
    """A row and its blocks come back as soon as the sequence ends, whatever is in flight."""

    def _drain(self, row: int, state: int) -> None:
        super()._drain(row, state)
        if row in self._draining:
            self._release(row)


class FreesBlocksAtCommit(RigScheduler):
    """The row waits for retirement, its blocks do not."""

    def _drain(self, row: int, state: int) -> None:
        super()._drain(row, state)
        if row in self._draining:
            count = int(self.rows.num_blocks[row])
            self.rows.num_blocks[row] = 0
            self.pool.release(self.rows.block_table[row, :count])

    def check_integrity(self) -> None:
        """The books would tell."""


class RetiresEarly(RigScheduler):
    """Collecting a step counts as the end of the one after it, for sequences that have ended."""

    def _retire(self, step: int) -> None:
        super()._retire(step)
        for row in [row for row in self._draining if self.rows.last_step[row] == step + 1]:
            if self.rows.state[row] == RowState.DEAD:
                self._release(row)


class FreesTwice(RigScheduler):
    """A cancel gives the blocks back, and so does the retirement of the row."""

    def cancel(self, request_id: int) -> bool:
        ended = super().cancel(request_id)
        for row in self._draining:
            if self.rows.request_id[row] == request_id:
                self.pool.release(self.rows.block_table[row, : self.rows.num_blocks[row]])
        return ended


class CancelAndFinish(RigScheduler):
    """A cancelled request runs on to its own end, and ends a second time."""

    def cancel(self, request_id: int) -> bool:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.row < 0:
            return super().cancel(request_id)
        known = int(self.rows.known[sequence.row]) - sequence.request.prompt.size
        self._finished.append(Finished(request_id, FinishReason.CANCELLED, known))
        return True


class SilentCancel(RigScheduler):
    """A cancelled request gets no end."""

    def cancel(self, request_id: int) -> bool:
        ended = super().cancel(request_id)
        if ended:
            self._finished.pop()
        return ended


class ZombieCancel(RigScheduler):
    """A cancel that comes while steps are in flight is forgotten."""

    def cancel(self, request_id: int) -> bool:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.row >= 0 and self.rows.last_step[sequence.row] > self._retired_step:
            return False
        return super().cancel(request_id)


class LosesTokens(RigScheduler):
    """Tokens that come in for a preempted row are booked but not emitted."""

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        preempted = self.rows.request_id[self.rows.state == RowState.PREEMPTED]
        committed = super().commit(plan, sampled)
        kept = ~np.isin(committed.request_ids, preempted)
        return replace(
            committed,
            request_ids=committed.request_ids[kept],
            tokens=committed.tokens[kept],
            logprobs=None if committed.logprobs is None else committed.logprobs.at(kept),
        )


class RepeatsToken(RigScheduler):
    """A preempted sequence forgets its newest token, and makes it once more."""

    def _release(self, row: int) -> None:
        owner = self._row_owner[row]
        preempted = self.rows.state[row] == RowState.PREEMPTED
        super()._release(row)
        if preempted and owner is not None and owner.tokens.size > owner.request.prompt.size:
            owner.tokens = owner.tokens[:-1]


class KeepsPlaceholder(RigScheduler):
    """A preempted sequence comes back with the placeholders that it had in flight."""

    def _preempt(self, row: int) -> None:
        self.rows.known[row] = self.rows.length[row]
        super()._preempt(row)


class PreemptsOldest(RigScheduler):
    """Takes the blocks of the oldest sequence in place of the youngest's."""

    def _preempt_for(self, needed: int) -> None:
        self.rows.rank *= -1
        try:
            super()._preempt_for(needed)
        finally:
            self.rows.rank *= -1

    def _check_preemption(self, row: int) -> None:
        """It would tell first."""


class ForgetsPreempted(RigScheduler):
    """A preempted sequence is not queued again."""

    def _release(self, row: int) -> None:
        waiting, self._waiting = self._waiting, WaitingQueue()
        super()._release(row)
        self._waiting = waiting


class CommitsFailedStep(RigScheduler):
    """A step that ran out of memory is committed with whatever its slot holds, and so are those behind it."""

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        for plan in (failed, *skipped):
            self.rig.loop.publish(self.commit(plan, nothing(plan)))
        return Committed.without_tokens(())


class RunsOnAfterFailure(RigScheduler):
    """A step that ran out of memory is retired, and its sequences run on."""

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        for plan in (failed, *skipped):
            self._retire(plan.step)
        return Committed.without_tokens(self.take_finished())


class CommitsSkippedSteps(RigScheduler):
    """Only the step that ran out of memory is given up; those behind it are committed, though nobody ran them."""

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        committed = super().abandon(failed, [])
        for plan in skipped:
            self.rig.loop.publish(self.commit(plan, nothing(plan)))
        return committed


class NewestFirst(RigScheduler):
    """Admits the newest request first."""

    class Queue(WaitingQueue):
        def push(self, sequence: SequenceState) -> None:
            heappush(self._heap, (-sequence.request.rank, sequence))

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self._waiting = self.Queue()


class ZeroesBlocksFromHost(RigPool):
    """The host zeroes a KV block when it is lent."""

    def allocate(self, count: int) -> Ints:
        ids = super().allocate(count)
        for cache in self.rig.kv:
            cache.k_BKSD[ids.tolist()] = cache.v_BKSD[ids.tolist()] = 0.0
        return ids


class KeepsRowSets(RigScheduler):
    """What is kept of rows that decode together is used for whoever has the same rows later."""

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self._kept: dict[bytes, RowSet] = {}

    def _refresh_rows(self) -> None:
        changed = self._rows_changed
        super()._refresh_rows()
        if changed:
            kept = self._kept.setdefault(self._decoding.tobytes(), self._steady)
            self._steady = replace(kept, rows=self._decoding)
