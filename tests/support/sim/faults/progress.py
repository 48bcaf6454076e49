"""Faults of progress: who is held up, who is recomputed for nothing, and budgets that do not follow the memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gapless.budget import TokenBudget
from gapless.config import SchedulerLimits
from gapless.outcome import Committed
from gapless.plan import Plan
from gapless.rows import RowState
from support.sim.parts import RigScheduler
from support.sim.rig import Rig


class ChunksWaitForDecodes(RigScheduler):
    """Prompts that are in chunks go on only while nobody decodes."""

    def _plan_chunks(self, budget: int) -> tuple[list[int], list[int]]:
        return ([], []) if self._decoding.size else super()._plan_chunks(budget)


class PreemptsAll(RigScheduler):
    """When blocks run short, everybody but the oldest is preempted, youngest first."""

    def _preempt_for(self, needed: int) -> None:
        running = np.flatnonzero(self.rows.state == RowState.RUNNING)
        for row in running[np.argsort(self.rows.rank[running])][:0:-1].tolist():
            self._preempt(row)
        self._refresh_rows()


class CountsFreedTwice(RigScheduler):
    """Blocks that a preemption frees at once count as blocks that will come, too: rows wait for them."""

    def _preempt_for(self, needed: int) -> None:
        table = self.rows
        coming = int(table.num_blocks[list(self._draining)].sum())
        while needed > self.pool.num_free + coming:
            running = np.flatnonzero(table.state == RowState.RUNNING)
            victim = int(running[table.rank[running].argmax()])
            if table.length[victim] - table.computed[victim] == 1:
                needed -= int(table.computed[victim] == table.num_blocks[victim] * self.limits.block_size)
            coming += int(table.num_blocks[victim])
            self._preempt(victim)
        self._refresh_rows()


class ChunksTakeAll(RigScheduler):
    """Rows that sit out keep no budget: chunks take it, and more rows decode later than a step may have."""

    def _plan_chunks(self, budget: int) -> tuple[list[int], list[int]]:
        return super()._plan_chunks(budget + self._sitting_out)


class CountsNoFailedTokens(RigScheduler):
    """Tokens that are lost with a failed step are not counted as recomputed."""

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        committed = super().abandon(failed, skipped)
        for sequence in self._sequences.values():
            sequence.computed = 0
        return committed


class NeverShrinks(RigScheduler):
    """Steps stay as large as they were, however often they run out of memory."""

    class Budget(TokenBudget):
        def step_failed(self, tokens: int) -> None:
            pass

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self.budget = self.Budget(limits.max_batch_tokens, limits.max_model_len)


class StaysSmall(RigScheduler):
    """Once a step has run out of memory, steps have one token for good."""

    class Budget(TokenBudget):
        def step_succeeded(self) -> None:
            pass

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self.budget = self.Budget(limits.max_batch_tokens, limits.max_model_len)

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        committed = super().abandon(failed, skipped)
        self.budget.tokens = 1
        return committed


class PreemptsAgain(RigScheduler):
    """Who was preempted once is preempted again in the step after each return."""

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self._again: set[int] = set()

    def _preempt(self, row: int) -> None:
        self._again.add(int(self.rows.request_id[row]))
        super()._preempt(row)

    def plan(self) -> Plan | None:
        for request_id in self._again:
            self.preempt(request_id)
        return super().plan()
