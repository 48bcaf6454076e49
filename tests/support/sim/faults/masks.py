"""Faults of masks: whose they are, of which step, and what a form is told of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gapless.engine.loop import Loop
from gapless.engine.slots import Slot
from gapless.outcome import Committed, Sampled
from gapless.plan import Plan
from gapless.request import Request, TokenMasks
from gapless.rows import RowState
from gapless.sampling.features import MASKED
from gapless.waiting import SequenceState
from support.sim.faults.serving import AdmitsDifferently
from support.sim.parts import RigScheduler
from support.sim.rig import Rig
from support.sim.rig_masking import RigMasking

Accepted = Sequence[tuple[TokenMasks, int]]
Entries = Sequence[tuple[int, int, TokenMasks]]


class MasksOfOthers(RigMasking):
    """Entries get each other's masks."""

    def begin(self, accepted: Accepted, entries: Entries, slot: Slot, samples: int) -> None:
        places = [place for place, _, _ in entries]
        moved = [(place, *each[1:]) for place, each in zip(places[1:] + places[:1], entries, strict=True)]
        super().begin(accepted, moved, slot, samples)


class MasksByPlace(RigMasking):
    """The masked entries are taken for the first ones of the step."""

    def begin(self, accepted: Accepted, entries: Entries, slot: Slot, samples: int) -> None:
        super().begin(accepted, [(index, *each[1:]) for index, each in enumerate(entries)], slot, samples)


class MasksOfTheStepBefore(RigMasking):
    """Forms are told of a token one step late."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self._held: Accepted = ()

    def begin(self, accepted: Accepted, entries: Entries, slot: Slot, samples: int) -> None:
        self._held, told = accepted, self._held
        super().begin(told, entries, slot, samples)


class CopiesBeforeFilled(RigMasking):
    """Nobody waits for the thread before the masks are copied."""

    def wait(self) -> tuple[int, list[tuple[int, str]]]:
        self._work, self._boundaries = None, 0
        return self._numbers, []

    def work_on(self) -> None:
        """The thread has its turn once the copy is queued: at the second boundary after nobody has waited."""
        self._boundaries += 1
        if self._work is None and self._boundaries > 1:
            for future in self._queued:
                future.run()

    _boundaries = 0


class OneMaskMissing(RigMasking):
    """An entry whose mask is missing may have any token, since its row does not ask for one."""

    def begin(self, accepted: Accepted, entries: Entries, slot: Slot, samples: int) -> None:
        super().begin(accepted, entries[:-1], slot, samples)


class AsksForNoMask(AdmitsDifferently):
    """The device is not told that an answer has a form."""

    def change(self, request: Request) -> Request:
        if not request.line.size:
            return request
        line = request.line.copy()
        line[0] &= ~MASKED
        return replace(request, line=line)


class CopiesTooFewMasks(RigMasking):
    """The last word of the last mask is not copied."""

    def wait(self) -> tuple[int, list[tuple[int, str]]]:
        numbers, failures = super().wait()
        return numbers - 1, failures


class SwallowsFailures(RigMasking):
    """Who can not go on goes on."""

    def wait(self) -> tuple[int, list[tuple[int, str]]]:
        return super().wait()[0], []


class AcceptsOvershoot(RigScheduler):
    """A form is told of tokens that came after the end of its answer."""

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        rows = plan.rows_E[plan.samples_E > 0]
        for place, row in enumerate(rows.tolist()):
            owner = self._row_owner[row]
            if self.rows.state[row] == RowState.DEAD and owner is not None and owner.masks is not None:
                self._accepted.append((owner.masks, int(sampled.tokens[place])))
        return super().commit(plan, sampled)


class LosesAccepted(RigScheduler):
    """Tokens that a form has not been told when its request is preempted are forgotten."""

    def _release(self, row: int) -> None:
        owner = self._row_owner[row]
        if self.rows.state[row] == RowState.PREEMPTED and owner is not None:
            self._accepted = [each for each in self._accepted if each[0] is not owner.masks]
        super()._release(row)


class AcceptsAgain(RigScheduler):
    """The form of a preempted request is told the whole answer once more when it comes back."""

    def _take_row(self, sequence: SequenceState, shared: list[int]) -> int:
        if sequence.cached >= 0 and sequence.masks is not None:
            answer = sequence.tokens[sequence.request.prompt.size :].tolist()
            self._accepted += [(sequence.masks, token) for token in answer]
        return super()._take_row(sequence, shared)


class BeginsFormAgain(RigScheduler):
    """The form of a preempted request begins anew, and is told nothing."""

    def _take_row(self, sequence: SequenceState, shared: list[int]) -> int:
        if sequence.cached >= 0 and sequence.request.form is not None:
            sequence.masks = sequence.request.form.start()
        return super()._take_row(sequence, shared)


class OneFormForAll(RigScheduler):
    """The n answers to a prompt share the state of their form."""

    def add(self, request: Request) -> None:
        super().add(request)
        leader, own = self._sequences.get(request.leader), self._sequences.get(request.request_id)
        if leader is not None and own is not None:
            own.masks = leader.masks


class LeavesWaitingBehind(Loop):
    """Masks are filled before the steps in front have been read."""

    def _begin_masks(self) -> None:
        if self._waiting is not None:
            entries = self.scheduler.masks_of(self._waiting.plan)
            accepted = self.scheduler.take_accepted()
            self.masking.begin(accepted, entries, self._waiting.slot, self._waiting.shape.samples)
