"""The engine's components as the rig uses them: subclassed, never patched.

They open their phase boundaries to the schedule's moves, check what they are asked for, and fill with rubbish what they
release. A planted fault swaps one of them for a worse one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gapless.blocks import BlockPool
from gapless.budget import FIRST_PATIENCE
from gapless.config import SchedulerLimits
from gapless.device.sim.streams import SimEvent, SimStream
from gapless.engine.admission import Admission
from gapless.engine.graphs import GraphTable
from gapless.engine.layout import StepInputs, StepShape
from gapless.engine.loop import Loop
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot, SlotRing
from gapless.models.base import Model
from gapless.outcome import Committed, Sampled
from gapless.plan import Ints, Plan
from gapless.request import FinishReason
from gapless.rows import RowState, RowTable
from gapless.sampling.base import Sampler
from gapless.scheduler import Scheduler
from gapless.waiting import SequenceState
from support.sim.findings import Broken
from support.sim.model import MixSampler, NumpyHashModel
from support.sim.oracle import answer
from support.sim.rig_device import POISON_TOKEN, RigDevice
from support.sim.rig_engine import RigEngine
from support.sim.rig_masking import RigMasking
from support.sim.schedule import Move

if TYPE_CHECKING:
    from support.sim.rig import Rig

Fill = Callable[[Plan, Ints, Ints, StepShape, int], None]


class RigPool(BlockPool):
    """Fills KV blocks that hold nothing any more with rubbish, and knows which may be written."""

    rig: Rig

    def release(self, ids: NDArray[np.int32]) -> None:
        super().release(ids)
        self.rig.poison_blocks(ids[(self._references[ids] == 0) & ~self._kept[ids]])

    def _evict(self, count: int) -> None:
        begin = self._empty
        super()._evict(count)
        self.rig.poison_blocks(self._stack[begin : self._empty])

    def check_writes(self, ids: NDArray[np.integer]) -> None:
        """Nobody writes to what several have or anybody may find."""
        shared = ids[(self._references[ids] > 1) | self._kept[ids]]
        if shared.size:
            raise Broken("books", f"a step writes to shared KV blocks {np.unique(shared).tolist()}")


class RigRows(RowTable):
    """Fills released rows with rubbish, here and on the device."""

    rig: Rig

    def clear(self, row: int) -> None:
        super().clear(row)
        self.tokens[row] = POISON_TOKEN
        self.rig.poison_row(row)


class RigScheduler(Scheduler):
    """Lets the schedule act after plan, before commit and after it."""

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits)
        self.rig = rig
        self._done: dict[int, int] = {}  # the most tokens of each request that retired steps have computed or found
        self.pool = rig.parts.pool(limits.num_blocks)
        self.rows = rig.parts.rows(limits.max_rows, limits.max_model_len, limits.block_columns)
        self.pool.rig = self.rows.rig = rig
        self._planning = False
        self._good_steps = FIRST_PATIENCE  # since a step ran out of memory
        self._sitting_out = 0  # rows that decode, but not in the step in hand
        self._fed: dict[int, int] = {}  # tokens of each request that were launched since it got its newest row
        self.fed_again = 0  # known tokens that were launched in an earlier row, too

    def plan(self) -> Plan | None:
        table, rowless = self.rows, self.requests_without_row()
        running = table.state == RowState.RUNNING
        oldest = self.rig.owners.first(table.request_id[running].tolist()) if running.any() else None
        computed, pending = table.computed.copy(), np.where(running, table.length - table.computed, 0)
        preemptions, self._planning = self.stats.preemptions, True
        try:
            plan = super().plan()
        finally:
            self._planning = False
        self._check_order(oldest, rowless)
        if self.stats.preemptions == preemptions:
            self._check_chunks(computed, pending)
        if plan is not None:
            self._count_fed(plan)
            self._check_plan(plan)
            self.rig.owners.book(plan, table.request_id.tolist())
            self.rig.boundary("planned", plan.step)
        return plan

    def _count_fed(self, plan: Plan) -> None:
        new = set(plan.params.rows_A.tolist())
        for row, start, count in zip(plan.rows_E.tolist(), plan.starts_E.tolist(), plan.counts_E.tolist(), strict=True):
            request_id = int(self.rows.request_id[row])
            if row in new:
                self.fed_again += max(0, min(self._fed.get(request_id, 0), int(self.rows.known[row])) - start)
                if start % self.limits.block_size or start >= self.rows.known[row]:
                    raise Broken("books", f"request {request_id} begins at token {start}")
            self._fed[request_id] = start + count

    def recompute_all(self, *, restart: bool) -> tuple[int, ...]:
        self.rig.owners.forget_blocks()
        lost = super().recompute_all(restart=restart)
        if restart:
            self._fed.clear()
        return lost

    def _take_row(self, sequence: SequenceState, shared: list[int]) -> int:
        request = sequence.request
        self.rig.check_begin(request)
        self.rig.owners.check_shared(request.request_id, sequence.tokens.size, shared)
        follows = sequence.cached < 0 and request.leader >= 0
        leads = request.leader not in self.rig.ended | self.rig.cancelled
        if follows and leads and not self._prompt_is_there(request.leader):
            raise Broken("books", f"request {request.request_id} goes before the prompt of its leader is there")
        done, found = self._done.get(request.request_id, 0), len(shared) * self.limits.block_size
        self._done[request.request_id] = max(done, found)
        return super()._take_row(sequence, shared)

    def _prompt_is_there(self, request_id: int) -> bool:
        """Whether steps have computed all of its full blocks but one with the last token."""
        size = self.limits.block_size
        return self._done.get(request_id, 0) // size >= (len(self.rig.owners.moves[request_id].prompt) - 1) // size

    def _plan_decodes(self) -> tuple[Ints, Ints]:
        """Rows sit out only if they need a block, and those of rows that drain cover it."""
        rows, blocks = super()._plan_decodes()
        table = self.rows
        decoding = np.flatnonzero((table.state == RowState.RUNNING) & (table.length - table.computed == 1))
        waiting = np.setdiff1d(decoding, rows)
        full = table.computed[waiting] == table.num_blocks[waiting] * self.limits.block_size
        self._sitting_out = waiting.size
        if not full.all() or waiting.size > self._blocks_coming():
            raise Broken("liveness", f"rows {waiting.tolist()} sit out, and no blocks come back for them")
        return rows, blocks

    def _check_plan(self, plan: Plan) -> None:
        """What fill, attention and sampler rely on."""
        counts, decodes, rows = plan.counts_E, plan.num_decodes, plan.rows_E
        if not 0 < plan.num_tokens <= min(self.limits.max_batch_tokens, self.budget.tokens):
            raise Broken("books", f"a step of {plan.num_tokens} tokens, over the budget of {self.budget.tokens}")
        if plan.num_tokens + self._sitting_out > self.budget.tokens:
            raise Broken("books", f"no budget is left to {self._sitting_out} rows that sit out")
        if plan.num_tokens != counts.sum() or (counts[:decodes] != 1).any() or (counts[decodes:] <= 1).any():
            raise Broken("books", f"query tokens {counts.tolist()} do not begin with {decodes} decodes")
        if np.unique(rows).size != rows.size or plan.all_greedy != self.rows.greedy[rows].all():
            raise Broken("books", f"rows {rows.tolist()} are there twice, or all_greedy is wrong")
        if plan.lines is not None and plan.lines.lines_P.size > self.limits.max_line_numbers:
            raise Broken("books", f"{plan.lines.lines_P.size} numbers of features do not fit into a slot")
        if plan.block_ids_U.size > self.limits.max_block_updates:
            raise Broken("books", f"{plan.block_ids_U.size} block updates do not fit into a slot")

    def _check_order(self, oldest: int | None, rowless: set[int]) -> None:
        """First come, first served, but for priorities; and the oldest is never preempted for blocks."""
        owners, table, left = self.rig.owners, self.rows, self.requests_without_row()
        admitted = rowless - left
        left |= set(table.request_id[table.state == RowState.PREEMPTED].tolist())
        if self.rig.engine.holds_back:
            left = {request_id for request_id in left if owners.has_begun(request_id)}
        if oldest in left:
            raise Broken("liveness", "the oldest running request was preempted")
        if (
            admitted
            and left
            and owners.ranks[last := owners.last(admitted)] > owners.ranks[first := owners.first(left)]
        ):
            raise Broken("liveness", f"request {last} was admitted before {first}")

    def _check_chunks(self, computed: Ints, pending: Ints) -> None:
        """The oldest prompt goes on whenever the budget leaves room beside the rows that decode."""
        prompts = np.flatnonzero(pending > 1)
        if prompts.size and self.budget.tokens > np.count_nonzero(pending == 1):
            first = self.rig.owners.first(self.rows.request_id[prompts].tolist())
            row = prompts[self.rows.request_id[prompts] == first][0]
            if self.rows.computed[row] <= computed[row]:
                raise Broken("liveness", f"the prompt of request {self.rows.request_id[row]} does not go on")

    def _preempt(self, row: int) -> None:
        if self._planning:
            self._check_preemption(row)
        super()._preempt(row)

    def _check_preemption(self, row: int) -> None:
        """Youngest first, and only while the blocks that are free or come back do not cover what decodes."""
        table = self.rows
        running = table.state == RowState.RUNNING
        full = table.computed == table.num_blocks * self.limits.block_size
        wanted = np.count_nonzero(running & (table.length - table.computed == 1) & full)
        if wanted <= self.pool.num_free + self._blocks_coming():
            raise Broken("liveness", f"request {table.request_id[row]} was preempted, and there are blocks enough")
        if table.request_id[row] != self.rig.owners.last(table.request_id[running].tolist()):
            raise Broken("liveness", f"request {table.request_id[row]} was preempted before a younger one")

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        self._good_steps += 1
        self.rig.boundary("commit", plan.step)
        ends = zip(plan.rows_E.tolist(), (plan.starts_E + plan.counts_E).tolist(), strict=True)
        for row, end in ends:
            request_id = int(self.rows.request_id[row])
            self._done[request_id] = max(end, self._done.get(request_id, 0))
        committed = super().commit(plan, sampled)
        for leader in self._held:
            if self._prompt_is_there(leader):
                raise Broken("liveness", f"who waits for the prompt of request {leader} is not let go")
        self.rig.ended.update(end.request_id for end in committed.finished)
        self.rig.boundary("committed", plan.step)
        return committed

    def fail(self, request_id: int, error: str) -> None:
        super().fail(request_id, error)
        self.rig.ended.update(end.request_id for end in self._finished if end.reason is FinishReason.ERROR)

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        self.rig.boundary("abandon", failed.step)
        self.rig.count_failure()
        tokens = self.budget.tokens
        committed = super().abandon(failed, skipped)
        self.rig.check_features()
        if self._good_steps < FIRST_PATIENCE and self.budget.tokens > max(1, tokens // 2):
            raise Broken("liveness", f"the budget stays at {tokens} tokens after one failure upon the other")
        self._good_steps = 0
        self.rig.ended.update(end.request_id for end in committed.finished)
        self.rig.boundary("abandoned", failed.step)
        return committed


class RigSlots(SlotRing):
    """Lets the schedule act before collect; fills a collected slot with rubbish."""

    rig: Rig

    def collect(self, slot: Slot) -> Sampled:
        self.rig.boundary("collect", slot=slot.letter)
        try:
            return super().collect(slot)
        finally:
            self.rig.poison_slot(slot)


class RigRunner(Runner):
    """Lets the schedule act between fill and launch, after it, and when the sampling of a step with masks is queued."""

    rig: Rig
    _weights: list[Tensor]

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> Callable[[int], None]:
        if self.rig.parts.fill is not None:
            self.rig.parts.fill(plan, self.rig.scheduler.rows.tokens, slot.packed, shape, self.scratch_row)
        self.rig.engine.check_launch()
        self.rig.boundary("launch", plan.step, slot.letter)
        self.rig.take_memory(plan)
        launch_sampling = super().launch(plan, slot, shape)
        self.rig.boundary("launched", plan.step, slot.letter)

        def launch_after_moves(masks: int) -> None:
            self.rig.boundary("masks", plan.step, slot.letter)
            launch_sampling(masks)

        return launch_after_moves if plan.masked else launch_sampling

    def update_weights(self, tensors: Mapping[str, Tensor]) -> None:
        self.rig.update(int(tensors["key"]))
        super().update_weights(tensors)

    def sleep(self) -> None:
        """Weights, KV cache and graphs are given back: what is there until wake() is rubbish."""
        if not self.asleep:
            self.rig.check_idle("memory is given back")
            self._weights = [tensor.clone() for tensor in self.model.tensors()]
            for tensor in self.model.tensors():
                self.rig.device.poison(tensor, "weights")
            self.rig.poison_blocks(np.arange(self.rig.schedule.limits.num_blocks))
        super().sleep()

    def wake(self) -> None:
        if self.asleep:
            for tensor, content in zip(self.model.tensors(), self._weights, strict=True):
                tensor.copy_(content)
        super().wake()
        for slot in self.rig.loop.slots.slots:  # where graphs were captured with them
            if not slot.in_flight:
                self.rig.poison_slot(slot)

    def unpack(self, inputs: StepInputs, shape: StepShape) -> Tensor:
        tokens_T = super().unpack(inputs, shape)
        if inputs.positions_T[inputs.token_rows_T == self.scratch_row].any():
            raise Broken("books", "padding has a position other than 0")
        self.rig.device.reach("between deltas and forward")
        return tokens_T


@dataclass(frozen=True)
class Parts:
    """What a rig is put together from. A fault replaces one.

    fill      None: the engine's. Another one fills the slot again, after it.
    expected  what each request must get; None: anything.
    """

    device: type[RigDevice] = RigDevice
    stream: type[SimStream] = SimStream
    event: type[SimEvent] = SimEvent
    loop: type[Loop] = Loop
    engine: type[RigEngine] = RigEngine
    masking: type[RigMasking] = RigMasking
    admission: type[Admission] = Admission
    scheduler: type[RigScheduler] = RigScheduler
    pool: type[RigPool] = RigPool
    rows: type[RigRows] = RigRows
    fill: Fill | None = None
    slots: type[RigSlots] = RigSlots
    graphs: type[GraphTable] = GraphTable
    runner: type[RigRunner] = RigRunner
    model: Callable[[], Model] = NumpyHashModel
    sampler: Callable[[], Sampler] = MixSampler
    expected: Callable[[Move, SchedulerLimits], list[int]] | None = answer
    audit: bool = False
