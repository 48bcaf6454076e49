"""Faults of n answers to one prompt: who waits for it, who lets them go, and what they write to."""

from __future__ import annotations

from dataclasses import replace

from gapless.engine.admission import Admission
from gapless.request import FinishReason, Request
from gapless.waiting import SequenceState
from support.sim.parts import RigScheduler


class SharesLastBlock(RigScheduler):
    """A follower takes the block that its leader writes to, too."""

    def _take_row(self, sequence: SequenceState, shared: list[int]) -> int:
        leader, table = self._sequences.get(sequence.request.leader), self.rows
        row, column = super()._take_row(sequence, shared), len(shared)
        if leader is not None and leader.row >= 0 and table.num_blocks[leader.row] > column:
            theirs = table.block_table[leader.row, column]
            self.pool.release(table.block_table[row, column : column + 1])
            self.pool.share([int(theirs)])
            table.block_table[row, column] = theirs
        return row


class FollowsAtOnce(RigScheduler):
    """Followers do not wait for their leader's prompt."""

    def _has_prompt(self, leader: SequenceState) -> bool:
        return True


class NeverLetsGo(RigScheduler):
    """Nobody tells the followers that the prompt is there, nor that their leader has ended."""

    def _let_go(self, leader: SequenceState, *, anyway: bool = False) -> None:
        pass


class LetsGoAtTheEnd(RigScheduler):
    """Followers wait until their leader has ended."""

    def _let_go(self, leader: SequenceState, *, anyway: bool = False) -> None:
        if anyway:
            super()._let_go(leader, anyway=True)


class LosesFollowers(RigScheduler):
    """Who waits for a prompt is forgotten with the request that was to compute it."""

    def _finish(
        self, sequence: SequenceState, reason: FinishReason, stop: int | None = None, error: str | None = None
    ) -> None:
        if reason is FinishReason.CANCELLED:
            self._held.pop(sequence.request.request_id, None)
        super()._finish(sequence, reason, stop, error)


class SameSeeds(Admission):
    """All n answers draw the same random numbers."""

    def make_continuations(self, first: Request) -> list[Request]:
        return [replace(each, seed=first.seed) for each in super().make_continuations(first)]


class OneAnswerTooFew(Admission):
    """The last of n answers is never begun."""

    def make_continuations(self, first: Request) -> list[Request]:
        return super().make_continuations(first)[:-1]
