"""The engine's components as the rig uses them: subclassed, never patched.

They open their phase boundaries to the schedule's moves, check what they are asked for, and fill with rubbish what they
release. A planted fault swaps one of them for a worse one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gapless.blocks import BlockPool
from gapless.budget import FIRST_PATIENCE
from gapless.config import SchedulerLimits
from gapless.device.base import Access
from gapless.device.sim import Order, SimDevice
from gapless.device.sim.streams import SimEvent, SimStream
from gapless.engine.admission import Admission
from gapless.engine.graphs import GraphTable
from gapless.engine.layout import StepInputs, StepShape
from gapless.engine.loop import Loop
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot, SlotRing
from gapless.errors import OutOfMemoryError
from gapless.models.base import Model
from gapless.outcome import Committed
from gapless.plan import Ints, Plan
from gapless.rows import RowState, RowTable
from gapless.sampling.base import Sampler, SamplingTables
from gapless.sampling.features import FeatureTables, StepMasks
from gapless.scheduler import Scheduler
from gapless.waiting import SequenceState
from support.sim.findings import Broken
from support.sim.model import MixSampler, NumpyHashModel, answer
from support.sim.schedule import Move, Shortage

if TYPE_CHECKING:
    from support.sim.rig import Rig

POISON_TOKEN = -1_163_005_939

Fill = Callable[[Plan, Ints, Ints, StepShape, int], None]


@dataclass(slots=True)
class _Watched:
    """A buffer on the device, and what it held when something that may write to it was there last."""

    name: str
    memory: NDArray[np.generic]
    content: bytes

    def check(self) -> None:
        before, self.content = self.content, self.memory.tobytes()
        if self.content != before:
            raise Broken("books", f"{self.name} changed outside queued work")


class RigDevice(SimDevice):
    """Runs out of memory where the schedule says, with streams and events that a fault may replace.

    Watches memory on the device: the host must not change it past every stream, which no checker would be told of.
    """

    def __init__(self, order: Order, parts: Parts, *, captures_graphs: bool, audit: bool) -> None:
        super().__init__(order, captures_graphs=captures_graphs, audit=audit)
        self.parts = parts
        self.shortages: dict[int, Shortage] = {}  # by step, still to come
        self.failed_at: list[Shortage] = []
        self._watched: dict[int, _Watched] = {}  # by address
        self.pool: RigPool | None = None  # none before start-up is over

    def watch(self, buffers: dict[str, Tensor]) -> None:
        """From now on, only queued work and `poison` may change these."""
        for name, buffer in buffers.items():
            memory = buffer.numpy()
            self._watched[buffer.data_ptr()] = _Watched(name, memory, memory.tobytes())
            self.audit_too(name, buffer)

    def check_watched(self) -> None:
        """Whether all of it is as the last piece of work has left it."""
        for each in self._watched.values():
            each.check()

    def poison(
        self, tensor: Tensor, name: str, units: NDArray[np.integer] | None = None, value: int = POISON_TOKEN
    ) -> None:
        watched = self._watched.get(tensor.data_ptr())
        if watched is not None:
            watched.check()
        super().poison(tensor, name, units, value)
        if watched is not None:
            watched.content = watched.memory.tobytes()

    def _run(self, stream: SimStream) -> None:
        self.check_watched()
        super()._run(stream)
        for each in self._watched.values():
            each.content = each.memory.tobytes()

    def stream(self, name: str) -> SimStream:
        stream = self.parts.stream(self, name, self.checker.add_thread(name))
        self.adopt(stream)
        return stream

    def event(self, name: str = "", *, timed: bool = False) -> SimEvent:
        return self.parts.event(self, name or "event")

    def run_checked(self, work: Callable[[], None], accesses: Callable[[], Iterable[Access]]) -> None:
        assert self._running is not None
        stream = self._running[0].name
        self.reach(f"before {stream}")
        super().run_checked(work, accesses if accesses is tuple else lambda: self._check_writes(accesses()))
        self.reach(f"after {stream}")

    def _check_writes(self, accesses: Iterable[Access]) -> Iterable[Access]:
        """Streams run in order, so that no race tells of a step that writes what another row reads."""
        for access in accesses:
            if self.pool is not None and access.write and access.name == "keys 0":
                assert access.units is not None
                self.pool.check_writes(access.units)
            yield access

    def reach(self, place: str) -> None:
        """The work in hand has come to this place: it raises if its step has no memory there."""
        assert self._running is not None
        step = self._running[1].note.step
        if self.shortages.get(step) == place:
            self.failed_at.append(self.shortages.pop(step))
            raise OutOfMemoryError("the schedule has taken the memory")


class RigSampler:
    """A sampler that the schedule can take the memory from."""

    def __init__(self, sampler: Sampler, device: RigDevice) -> None:
        self._sampler = sampler
        self._device = device

    def sample(
        self,
        logits_EV: Tensor,
        rows_E: Tensor,
        positions_E: Tensor,
        tables: SamplingTables,
        *,
        all_greedy: bool,
        features: FeatureTables | None = None,
        masks: StepMasks | None = None,
    ) -> Tensor:
        self._device.reach("between forward and sampling")
        return self._sampler.sample(
            logits_EV, rows_E, positions_E, tables, all_greedy=all_greedy, features=features, masks=masks
        )


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

    def _take_row(self, sequence: SequenceState, shared: list[int]) -> int:
        self.rig.owners.check_shared(sequence.request.request_id, sequence.tokens.size, shared)
        return super()._take_row(sequence, shared)

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
        if plan.block_ids_U.size > self.limits.max_block_updates:
            raise Broken("books", f"{plan.block_ids_U.size} block updates do not fit into a slot")

    def _check_order(self, oldest: int | None, rowless: set[int]) -> None:
        """First come, first served, but for priorities; and the oldest is never preempted for blocks."""
        owners, table, left = self.rig.owners, self.rows, self.requests_without_row()
        admitted = rowless - left
        left |= set(table.request_id[table.state == RowState.PREEMPTED].tolist())
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

    def commit(self, plan: Plan, sampled: Ints) -> Committed:
        self._good_steps += 1
        self.rig.boundary("commit", plan.step)
        committed = super().commit(plan, sampled)
        self.rig.ended.update(end.request_id for end in committed.finished)
        self.rig.boundary("committed", plan.step)
        return committed

    def abandon(self, failed: Plan, skipped: Sequence[Plan]) -> Committed:
        self.rig.boundary("abandon", failed.step)
        self.rig.count_failure()
        tokens = self.budget.tokens
        committed = super().abandon(failed, skipped)
        if self._good_steps < FIRST_PATIENCE and self.budget.tokens > max(1, tokens // 2):
            raise Broken("liveness", f"the budget stays at {tokens} tokens after one failure upon the other")
        self._good_steps = 0
        self.rig.ended.update(end.request_id for end in committed.finished)
        self.rig.boundary("abandoned", failed.step)
        return committed


class RigSlots(SlotRing):
    """Lets the schedule act before collect; fills a collected slot with rubbish."""

    rig: Rig

    def collect(self, slot: Slot) -> Ints:
        self.rig.boundary("collect", slot=slot.letter)
        try:
            return super().collect(slot)
        finally:
            self.rig.poison_slot(slot)


class RigRunner(Runner):
    """Lets the schedule act between fill and launch, and after it."""

    rig: Rig

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        if self.rig.parts.fill is not None:
            self.rig.parts.fill(plan, self.rig.scheduler.rows.tokens, slot.packed, shape, self.scratch_row)
        self.rig.boundary("launch", plan.step, slot.letter)
        self.rig.take_memory(plan)
        super().launch(plan, slot, shape)
        self.rig.boundary("launched", plan.step, slot.letter)

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
