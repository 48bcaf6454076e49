"""Faults of the prefix cache and of priorities: what is found, by whom, who writes to it, and who comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from hashlib import sha256
from heapq import heappush

import numpy as np
from numpy.typing import NDArray

from gapless.config import SchedulerLimits
from gapless.outcome import Committed
from gapless.plan import Ints, Plan
from gapless.prefix import chain_of
from gapless.request import Request
from gapless.waiting import SequenceState, WaitingQueue
from support.sim.faults.serving import AdmitsDifferently
from support.sim.parts import RigPool, RigRows, RigScheduler
from support.sim.rig import Rig


class NoSalt(AdmitsDifferently):
    """Blocks are found by whoever has the same tokens."""

    def change(self, request: Request) -> Request:
        return replace(request, salt=b"", digests=chain_of(request.prompt, self.limits.block_size, b""))


def _blockwise(tokens: Ints, blocks: int, block_size: int, salt: bytes) -> list[bytes]:
    """A digest of each block by itself."""
    return [sha256(salt + tokens[at * block_size : (at + 1) * block_size].tobytes()).digest() for at in range(blocks)]


class PromptDigestsAlone(AdmitsDifferently):
    """The digest of a prompt's block leaves out what is before it."""

    def change(self, request: Request) -> Request:
        size, blocks = self.limits.block_size, len(request.digests)
        return replace(request, digests=tuple(_blockwise(request.prompt, blocks, size, request.salt)))


class AnswerDigestsAlone(RigScheduler):
    """The digest of an answer's block leaves out what is before it."""

    def _register(self, row: int, blocks: int) -> None:
        sequence = self._row_owner[row]
        assert sequence is not None
        alone = _blockwise(self.rows.tokens[row], blocks, self.limits.block_size, sequence.request.salt)
        sequence.digests += alone[len(sequence.digests) :]
        super()._register(row, blocks)


class CoversLastToken(RigScheduler):
    """A hit may cover all tokens that are known, the last one, too."""

    def _find_shared(self, sequence: SequenceState, needed: int, room: int) -> list[int] | None:
        tokens = sequence.tokens
        sequence.tokens = np.append(tokens, np.int32(0))
        try:
            return super()._find_shared(sequence, needed, room)
        finally:
            sequence.tokens = tokens


class FreesWithFirstOwner(RigPool):
    """A shared block is free as soon as one of its owners has gone."""

    def release(self, ids: NDArray[np.int32]) -> None:
        owned = ids[self._references[ids] > 0]
        self._references[owned] = 1
        super().release(owned)

    def check_integrity(self, owned: NDArray[np.int32]) -> None:
        """The books would tell."""


class FindsEvicted(RigPool):
    """A block can be found until another one with its digest is there."""

    def _evict(self, count: int) -> None:
        before = dict(self._by_digest)
        super()._evict(count)
        self._by_digest = before

    def check_integrity(self, owned: NDArray[np.int32]) -> None:
        """The books would tell."""


class RegistersAtLaunch(RigScheduler):
    """Chunks can be found from their launch on."""

    def _schedule(
        self, decode_rows: Ints, chunk_rows: list[int], chunk_counts: list[int], new_rows: list[int], grown: list[Ints]
    ) -> Plan:
        plan = super()._schedule(decode_rows, chunk_rows, chunk_counts, new_rows, grown)
        self._register_chunks(plan)
        return plan


class RegistersFailedSteps(RigScheduler):
    """Chunks of steps that were given up can be found."""

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        for plan in (failed, *skipped):
            self._register_chunks(plan)
        return super().abandon(failed, skipped)


class RegistersLastToken(RigScheduler):
    """The last token of an answer counts as computed."""

    def _register_answer(self, row: int) -> None:
        super()._register_answer(row)
        known, size = int(self.rows.known[row]), self.limits.block_size
        if known > self.rows.taken[row]:
            self._register(row, min(known // size, int(self.rows.num_blocks[row])))


class ComputesSharedBlock(RigRows):
    """A new row computes the last block that it shares once more."""

    def take(self, row: int, request: Request, tokens: Ints, computed: int) -> None:
        super().take(row, request, tokens, max(0, computed - self.rig.schedule.block_size))


class EvictsShared(RigPool):
    """Sharing an idle block leaves it among those that may be evicted."""

    def share(self, blocks: Sequence[int]) -> NDArray[np.int32]:
        idle = [block for block in self._idle if block in blocks]
        ids = super().share(blocks)
        self._idle.update(dict.fromkeys(idle))
        return ids

    def check_integrity(self, owned: NDArray[np.int32]) -> None:
        """The books would tell."""


class NoPriorities(AdmitsDifferently):
    """Who comes first is served first, whatever the priorities."""

    def change(self, request: Request) -> Request:
        return replace(request, priority=0)


class _Strict(Request):
    @property
    def rank(self) -> int:
        return self.priority * 2**40 + self.request_id


class StrictPriorities(AdmitsDifferently):
    """Who waits never gains on those who are more urgent."""

    def change(self, request: Request) -> Request:
        return _Strict(**{field.name: getattr(request, field.name) for field in fields(request)})


class PreemptedGoBehind(RigScheduler):
    """A request that was preempted queues behind all others."""

    class Queue(WaitingQueue):
        def push(self, sequence: SequenceState) -> None:
            behind = 2**60 if sequence.cached >= 0 else 0
            heappush(self._heap, (sequence.request.rank + behind, sequence))

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self._waiting = self.Queue()
