"""Planted faults, one of each kind, each a worse version of one component. The checks must find every one.

A fault stands for a bug that this kind of engine is known to ship: see docs/correctness.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.attention.base import LayerKV
from gapless.config import SchedulerLimits
from gapless.device.base import Access, Device, Event, Graph, Note
from gapless.device.sim import SimDevice
from gapless.device.sim.device import SimEvent, SimStream
from gapless.engine.graphs import GraphTable
from gapless.engine.layout import StepInputs, StepShape, sections_of
from gapless.engine.runner import Extent
from gapless.engine.slots import Slot
from gapless.engine.tables import DeviceTables
from gapless.models.base import Model
from gapless.outcome import Committed, Finished
from gapless.plan import Ints, Plan
from gapless.request import FinishReason, Request
from gapless.rows import RowState
from gapless.sampling.base import Sampler, SamplingTables
from support.sim.model import MixSampler
from support.sim.rig import Finding, Parts, Rig, RigRunner, RigScheduler, RigSlots, Violation, run
from support.sim.schedule import generate

MOST_SEEDS = 500


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done wrong, and the parts that do it."""

    name: str
    parts: Parts


# ------------------------------------------------------------------ streams and events


def _device(stream: type[SimStream], event: type[SimEvent] = SimEvent) -> Parts:
    """Parts with these streams and events."""

    class FaultyDevice(SimDevice):
        def stream(self, name: str) -> SimStream:
            made = stream(self, name, self.checker.add_thread(name))
            self.adopt(made)
            return made

        def event(self, name: str = "", *, timed: bool = False) -> SimEvent:
            return event(self, name)

    return Parts(device=FaultyDevice)


def _no_wait(on: str, for_event: str) -> Parts:
    class Deaf(SimStream):
        def wait(self, event: Event) -> None:
            if not (self.name == on and isinstance(event, SimEvent) and event.name.startswith(for_event)):
                super().wait(event)

    return _device(Deaf)


def _no_record(of_event: str) -> Parts:
    class Mute(SimStream):
        def record(self, event: Event) -> None:
            if not (isinstance(event, SimEvent) and event.name.startswith(of_event)):
                super().record(event)

    return _device(Mute)


class _WaitFirst(SimStream):
    """The compute stream waits for h2d_done before that is recorded: as in CUDA, no wait or one for an older step."""

    late: tuple[SimStream, Event] | None = None

    def record(self, event: Event) -> None:
        if isinstance(event, SimEvent) and event.name.startswith("h2d_done"):
            _WaitFirst.late = (self, event)
        else:
            super().record(event)

    def wait(self, event: Event) -> None:
        super().wait(event)
        if _WaitFirst.late is not None:
            stream, late = _WaitFirst.late
            _WaitFirst.late = None
            SimStream.record(stream, late)


def _record_before_work(stream_name: str) -> Parts:
    class Hasty(SimStream):
        held: tuple[Callable[[], None], Note | None] | None = None

        def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
            if self.name == stream_name and note is not None and note.step >= 0:
                self.held = (work, note)
            else:
                super().enqueue(work, note)

        def record(self, event: Event) -> None:
            super().record(event)
            if self.held is not None:
                work, note = self.held
                self.held = None
                super().enqueue(work, note)

    return _device(Hasty)


class _OtherSlotsEvent(SimStream):
    """Waits for the h2d_done of the slot that was filled before."""

    before: Event | None = None

    def wait(self, event: Event) -> None:
        if isinstance(event, SimEvent) and event.name.startswith("h2d_done"):
            event, self.before = self.before or event, event
        super().wait(event)


class _ImpatientHost(SimEvent):
    def synchronize(self) -> None:
        if not self.name.startswith("d2h_done"):
            super().synchronize()


# ------------------------------------------------------------------ slots


class _SlotTooEarly(RigSlots):
    """Hands out one slot fewer than there are steps in flight."""

    def acquire(self) -> Slot:
        slot = self.slots[self._next]
        self._next = (self._next + 1) % max(1, len(self.slots) - 1)
        slot.in_flight = True
        return slot

    def check_integrity(self, steps_in_flight: int) -> None:
        pass


def _shared(name: str) -> Parts:
    """All slots use the first one's buffer."""

    class Shared(RigSlots):
        def __init__(self, device: Device, count: int, capacity: int, max_rows: int) -> None:
            super().__init__(device, count, capacity, max_rows)
            for slot in self.slots[1:]:
                setattr(slot, name, getattr(self.slots[0], name))
                slot.packed = device.host_view(slot.host_in)
                slot._sampled = device.host_view(slot.host_out)  # pyright: ignore[reportPrivateUsage]

    return Parts(slots=Shared)


class _KeepsView(RigSlots):
    """Returns the pinned buffer itself in place of a copy."""

    def collect(self, slot: Slot) -> Ints:
        size = super().collect(slot).size
        return slot.host_out.numpy()[:size]


# ------------------------------------------------------------------ rows, blocks and preemption


class _FreesAtCommit(RigScheduler):
    """A row and its blocks come back as soon as the sequence ends, whatever is in flight."""

    def _drain(self, row: int, state: int) -> None:
        super()._drain(row, state)
        if row in self._draining:
            self._release(row)


class _FreesBlocksAtCommit(RigScheduler):
    """The row waits for retirement, its blocks do not."""

    def _drain(self, row: int, state: int) -> None:
        super()._drain(row, state)
        if row in self._draining:
            count = int(self.rows.num_blocks[row])
            self.rows.num_blocks[row] = 0
            self.pool.release(self.rows.block_table[row, :count])


class _RetiresEarly(RigScheduler):
    """Collecting a step counts as the end of the one after it."""

    def _retire(self, step: int) -> None:
        super()._retire(step)
        for row in [row for row in self._draining if self.rows.last_step[row] <= step + 1]:
            self._release(row)


class _FreesTwice(RigScheduler):
    """A cancel gives the blocks back, and so does the retirement of the row."""

    def cancel(self, request_id: int) -> bool:
        ended = super().cancel(request_id)
        for row in self._draining:
            if self.rows.request_id[row] == request_id:
                self.pool.release(self.rows.block_table[row, : self.rows.num_blocks[row]])
        return ended


class _CancelAndFinish(RigScheduler):
    """A cancelled request runs on to its own end, and ends a second time."""

    def cancel(self, request_id: int) -> bool:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.row < 0:
            return super().cancel(request_id)
        known = int(self.rows.known[sequence.row]) - sequence.request.prompt.size
        self._finished.append(Finished(request_id, FinishReason.CANCELLED, known))
        return True


class _SilentCancel(RigScheduler):
    """A cancelled request gets no end."""

    def cancel(self, request_id: int) -> bool:
        ended = super().cancel(request_id)
        if ended:
            self._finished.pop()
        return ended


class _ZombieCancel(RigScheduler):
    """A cancel that comes while steps are in flight is forgotten."""

    def cancel(self, request_id: int) -> bool:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.row >= 0 and self.rows.last_step[sequence.row] > self._retired_step:
            return False
        return super().cancel(request_id)


class _LosesTokens(RigScheduler):
    """Tokens that come in for a preempted row are booked but not emitted."""

    def commit(self, plan: Plan, sampled: Ints) -> Committed:
        preempted = self.rows.request_id[self.rows.state == RowState.PREEMPTED]
        committed = super().commit(plan, sampled)
        kept = ~np.isin(committed.request_ids, preempted)
        return Committed(committed.request_ids[kept], committed.tokens[kept], committed.finished)


class _RepeatsToken(RigScheduler):
    """A preempted sequence forgets its newest token, and makes it once more."""

    def _release(self, row: int) -> None:
        owner = self._row_owner[row]
        preempted = self.rows.state[row] == RowState.PREEMPTED
        super()._release(row)
        if preempted and owner is not None and owner.tokens.size > owner.request.prompt.size:
            owner.tokens = owner.tokens[:-1]


class _KeepsPlaceholder(RigScheduler):
    """A preempted sequence comes back with the placeholders that it had in flight."""

    def _preempt(self, row: int) -> None:
        self.rows.known[row] = self.rows.length[row]
        super()._preempt(row)


class _PreemptsOldest(RigScheduler):
    """Takes the blocks of the oldest sequence in place of the youngest's."""

    def _preempt_for_blocks(self) -> None:
        self.rows.request_id *= -1
        try:
            super()._preempt_for_blocks()
        finally:
            self.rows.request_id *= -1


class _ForgetsPreempted(RigScheduler):
    """A preempted sequence is not queued again."""

    def _release(self, row: int) -> None:
        super()._release(row)
        self._preempted.clear()


class _CommitsFailedStep(RigScheduler):
    """A step that ran out of memory is committed with whatever its slot holds."""

    def abandon(self, plan: Plan) -> Committed:
        return self.commit(plan, np.zeros(plan.num_samples, dtype=np.int32))


class _LosesFailedStep(RigScheduler):
    """A step that ran out of memory is retired, and its sequences run on."""

    def abandon(self, plan: Plan) -> Committed:
        self._retire(plan.step)
        return Committed.without_tokens(self.take_finished())


class _ForgetsStepsBehind(RigScheduler):
    """After a failed step, rows are freed with no regard to the steps behind it, which used old block tables."""

    def abandon(self, plan: Plan) -> Committed:
        kept = self.rows.last_step
        self.rows.last_step = kept.copy()
        try:
            return super().abandon(plan)
        finally:
            self.rows.last_step = kept


class _NewestFirst(RigScheduler):
    """Admits the newest request first."""

    def add(self, request: Request) -> None:
        super().add(request)
        self._waiting.rotate(1)


# ------------------------------------------------------------------ tokens and ends


class _EmitsOvershoot(RigScheduler):
    """Tokens of rows whose sequence has stopped are emitted too."""

    def commit(self, plan: Plan, sampled: Ints) -> Committed:
        rows = plan.rows_E[plan.samples_E > 0]
        dead = self.rows.state[rows] == RowState.DEAD
        ids, extra = self.rows.request_id[rows][dead], sampled[dead].copy()
        committed = super().commit(plan, sampled)
        return Committed(
            np.concatenate((committed.request_ids, ids)),
            np.concatenate((committed.tokens, extra)),
            committed.finished,
        )


class _RunsPastLimit(RigScheduler):
    """An end by length is noticed at commit only, as one by a stop token is."""

    def _schedule(
        self, decode_rows: Ints, chunk_rows: list[int], chunk_counts: list[int], new_rows: list[int], grown: list[Ints]
    ) -> Plan:
        self.rows.limit += 1
        try:
            return super()._schedule(decode_rows, chunk_rows, chunk_counts, new_rows, grown)
        finally:
            self.rows.limit -= 1


class _BillsOvershoot(RigScheduler):
    """Counts the stop's overshoot as generated."""

    def _finish(self, sequence: object, reason: FinishReason) -> None:
        super()._finish(sequence, reason)  # type: ignore[arg-type]
        end = self._finished[-1]
        self._finished[-1] = replace(end, generated=end.generated + (reason is FinishReason.STOP))


class _WrongReason(RigScheduler):
    """Says that a stop was an end by length."""

    def _finish(self, sequence: object, reason: FinishReason) -> None:
        wrong = FinishReason.LENGTH if reason is FinishReason.STOP else reason
        super()._finish(sequence, wrong)  # type: ignore[arg-type]


class _LivePlan(RigScheduler):
    """The plan's rows are a view of an array that the next plan overwrites."""

    def __init__(self, limits: SchedulerLimits, rig: Rig) -> None:
        super().__init__(limits, rig)
        self._shared = np.zeros(limits.max_rows, dtype=np.int32)

    def plan(self) -> Plan | None:
        plan = super().plan()
        if plan is None:
            return None
        self._shared[: plan.rows_E.size] = plan.rows_E
        return replace(plan, rows_E=self._shared[: plan.rows_E.size])


class _Sampler(MixSampler):
    """A sampler whose key a fault may change."""

    steps = 0

    def key(self, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables) -> tuple[Tensor, SamplingTables]:
        return positions_E, tables

    def sample(
        self, logits_EV: Tensor, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables, *, all_greedy: bool
    ) -> Tensor:
        self.steps += 1
        positions_E, tables = self.key(rows_E, positions_E, tables)
        return super().sample(logits_EV, rows_E, positions_E, tables, all_greedy=all_greedy)


class _KeyedOnRow(_Sampler):
    def key(self, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables) -> tuple[Tensor, SamplingTables]:
        rows = torch.arange(tables.seed_R2.shape[0], dtype=torch.int32)
        return positions_E, replace(tables, seed_R2=torch.stack((rows, rows), dim=1))


class _KeyedOnPlace(_Sampler):
    def key(self, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables) -> tuple[Tensor, SamplingTables]:
        return positions_E + torch.arange(positions_E.numel(), dtype=torch.int32), tables


class _KeyedOnStep(_Sampler):
    def key(self, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables) -> tuple[Tensor, SamplingTables]:
        return torch.full_like(positions_E, self.steps), tables


# ------------------------------------------------------------------ the compute stage


class _DeltasOnCopyStream(RigRunner):
    """Table deltas are applied on the H2D stream, as soon as they are there."""

    def _apply_deltas(self, inputs: StepInputs, shape: StepShape) -> None:
        pass

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        runner, table = self, self.tables.block_table_RC

        def apply() -> None:
            RigRunner._apply_deltas(runner, StepInputs.of(slot.device_in, shape), shape)

        def accesses() -> Sequence[Access]:
            inputs = StepInputs.of(slot.device_in, shape)
            rows, admitted = inputs.block_rows_U.numpy(), inputs.param_rows_A.numpy()
            return [
                Access("block table", table, rows, True),
                *(Access(name, each, admitted, True) for name, each in self.tables.sampling.by_name()),
            ]

        class WithDeltas:
            """The copy stream, with the deltas behind every copy."""

            def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
                copies.enqueue(work, note)
                copies.enqueue(apply, Note("deltas", plan.step, slot.letter, accesses))

            def __getattr__(self, name: str) -> object:
                return getattr(copies, name)

        copies = self._h2d
        self._h2d = WithDeltas()  # type: ignore[assignment]
        try:
            super().launch(plan, slot, shape)
        finally:
            self._h2d = copies


class _CarriesOlderToken(RigRunner):
    """Placeholders get what the row sampled two steps ago."""

    pending: Tensor | None = None

    def compute_step(self, slot: Slot, shape: StepShape, extent: Extent) -> None:
        last = self.tables.last_token_R
        before = last.clone()
        super().compute_step(slot, shape, extent)
        after = last.clone()
        last.copy_(before if self.pending is None else self.pending)
        self.pending = after


class _CarriesNeighboursToken(RigRunner):
    """Placeholders get another row's token, as if the table went by place in the batch."""

    def compute_step(self, slot: Slot, shape: StepShape, extent: Extent) -> None:
        last = self.tables.last_token_R
        last.copy_(last.roll(1))
        super().compute_step(slot, shape, extent)
        rows = StepInputs.of(slot.device_in, shape).sample_rows_S.long()
        sampled = last[rows].clone()
        last.copy_(last.roll(-1))
        last[rows] = sampled


class _NoCarryOver(RigRunner):
    """Placeholders stay what they are."""

    def compute_step(self, slot: Slot, shape: StepShape, extent: Extent) -> None:
        tokens = StepInputs.of(slot.device_in, shape).tokens_T
        tokens[tokens < 0] = 0
        super().compute_step(slot, shape, extent)


class _OtherSlotsGraph(RigRunner):
    """All graphs were captured on the first slot's buffers."""

    first: Slot | None = None

    def capture(self, slot: Slot, shape: StepShape, extent: Extent) -> Graph:
        self.first = self.first or slot
        return super().capture(self.first, shape, extent)


class _PadsOnRowZero(RigRunner):
    """Padding goes to a row that sequences use."""

    def __init__(
        self,
        model: Model,
        device: Device,
        sampler: Sampler,
        kv: list[LayerKV],
        tables: DeviceTables,
        graphs: GraphTable,
    ) -> None:
        super().__init__(model, device, sampler, kv, tables, graphs)
        self.scratch_row = 0


class _Refill(RigRunner):
    """Changes what was filled into the slot, before it is launched."""

    def spoil(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        raise NotImplementedError

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        self.spoil(plan, slot, shape)
        super().launch(plan, slot, shape)


class _StaleParams(_Refill):
    """A row keeps the sampling parameters of the first request that it had."""

    def __init__(
        self,
        model: Model,
        device: Device,
        sampler: Sampler,
        kv: list[LayerKV],
        tables: DeviceTables,
        graphs: GraphTable,
    ) -> None:
        super().__init__(model, device, sampler, kv, tables, graphs)
        self.seen: set[int] = set()

    def spoil(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        start = sections_of(shape).param_rows_A.start
        for index, row in enumerate(plan.params.rows_A.tolist()):
            if row in self.seen:
                slot.packed[start + index] = self.scratch_row
            self.seen.add(row)


class _LosesBlock(_Refill):
    """A block that a decoding row gains never gets into the device's table."""

    def spoil(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        if plan.decode_only and plan.block_rows_U.size:
            slot.packed[sections_of(shape).block_rows_U.start] = self.scratch_row


class _WrongPosition(_Refill):
    """The random number is that of the position before."""

    def spoil(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        section = sections_of(shape).sample_positions_S
        slot.packed[section] = plan_positions(plan, shape) - 1


class _RefillsAfterLaunch(RigRunner):
    """The next step's inputs are written while the copy of this one may still run."""

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        super().launch(plan, slot, shape)
        slot.packed[sections_of(shape).tokens_T.start] = 1


class _FreesSlotAtCompute(RigSlots):
    """A slot is free once its compute stage is over; its tokens may still be on their way."""

    def collect(self, slot: Slot) -> Ints:
        slot.compute_done.synchronize()
        slot.d2h_done = slot.compute_done
        return super().collect(slot)


class _CopiesOutEarly(SimStream):
    """The copy out waits for the inputs only."""

    inputs_there: Event | None = None

    def wait(self, event: Event) -> None:
        if isinstance(event, SimEvent) and event.name.startswith("h2d_done"):
            _CopiesOutEarly.inputs_there = event
        elif _CopiesOutEarly.inputs_there is not None:
            event = _CopiesOutEarly.inputs_there
        super().wait(event)


def plan_positions(plan: Plan, shape: StepShape) -> NDArray[np.int32]:
    """Positions of the tokens that a plan samples, padded with 1 to the shape."""
    ends = (plan.starts_E + plan.counts_E)[plan.samples_E > 0]
    return np.concatenate((ends, np.ones(shape.samples - ends.size, dtype=np.int32)))


FAULTS: tuple[Fault, ...] = (
    Fault("compute does not wait for h2d_done", _no_wait("compute", "h2d_done")),
    Fault("d2h does not wait for compute_done", _no_wait("d2h", "compute_done")),
    Fault("the host does not wait for d2h_done", _device(SimStream, _ImpatientHost)),
    Fault("h2d_done is not recorded", _no_record("h2d_done")),
    Fault("compute_done is not recorded", _no_record("compute_done")),
    Fault("d2h_done is not recorded", _no_record("d2h_done")),
    Fault("compute_begin is not recorded", _no_record("compute_begin")),
    Fault("compute waits for h2d_done before it is recorded", _device(_WaitFirst)),
    Fault("h2d_done is recorded before the copy", _record_before_work("h2d")),
    Fault("compute_done is recorded before the work", _record_before_work("compute")),
    Fault("d2h_done is recorded before the copy", _record_before_work("d2h")),
    Fault("compute waits for another slot's h2d_done", _device(_OtherSlotsEvent)),
    Fault("d2h waits for h2d_done in place of compute_done", _device(_CopiesOutEarly)),
    Fault("a slot is refilled before its d2h_done", Parts(slots=_SlotTooEarly)),
    Fault("a slot is free at compute_done", Parts(slots=_FreesSlotAtCompute)),
    Fault("a slot's pinned inputs are written after launch", Parts(runner=_RefillsAfterLaunch)),
    Fault("slots share the pinned inputs", _shared("host_in")),
    Fault("slots share the device's inputs", _shared("device_in")),
    Fault("slots share the device's outputs", _shared("device_out")),
    Fault("slots share the pinned outputs", _shared("host_out")),
    Fault("collected tokens are a view of pinned memory", Parts(slots=_KeepsView)),
    Fault("a graph is captured with another slot's buffers", Parts(runner=_OtherSlotsGraph)),
    Fault("table deltas are applied on the copy stream", Parts(runner=_DeltasOnCopyStream)),
    Fault("a row and its blocks are freed at commit", Parts(scheduler=_FreesAtCommit)),
    Fault("a row's blocks are freed at commit", Parts(scheduler=_FreesBlocksAtCommit)),
    Fault("a step retires one step early", Parts(scheduler=_RetiresEarly)),
    Fault("cancel and retirement both free the blocks", Parts(scheduler=_FreesTwice)),
    Fault("a cancelled request also finishes", Parts(scheduler=_CancelAndFinish)),
    Fault("a cancelled request gets no end", Parts(scheduler=_SilentCancel)),
    Fault("a cancel with steps in flight is forgotten", Parts(scheduler=_ZombieCancel)),
    Fault("preemption loses tokens in flight", Parts(scheduler=_LosesTokens)),
    Fault("preemption repeats a token", Parts(scheduler=_RepeatsToken)),
    Fault("preemption keeps placeholders as tokens", Parts(scheduler=_KeepsPlaceholder)),
    Fault("the oldest sequence is preempted", Parts(scheduler=_PreemptsOldest)),
    Fault("a preempted sequence is forgotten", Parts(scheduler=_ForgetsPreempted)),
    Fault("a step that ran out of memory is committed", Parts(scheduler=_CommitsFailedStep)),
    Fault("a step that ran out of memory is skipped", Parts(scheduler=_LosesFailedStep)),
    Fault("rows are freed while steps behind a failed one run", Parts(scheduler=_ForgetsStepsBehind)),
    Fault("the newest request is admitted first", Parts(scheduler=_NewestFirst)),
    Fault("overshoot tokens are emitted", Parts(scheduler=_EmitsOvershoot)),
    Fault("overshoot tokens are billed", Parts(scheduler=_BillsOvershoot)),
    Fault("an end by length overshoots", Parts(scheduler=_RunsPastLimit)),
    Fault("a stop is reported as an end by length", Parts(scheduler=_WrongReason)),
    Fault("a plan refers to live state", Parts(scheduler=_LivePlan)),
    Fault("random numbers are keyed on the row", Parts(sampler=_KeyedOnRow)),
    Fault("random numbers are keyed on the place in the batch", Parts(sampler=_KeyedOnPlace)),
    Fault("random numbers are keyed on the step", Parts(sampler=_KeyedOnStep)),
    Fault("random numbers are those of the position before", Parts(runner=_WrongPosition)),
    Fault("a reused row keeps its first sampling parameters", Parts(runner=_StaleParams)),
    Fault("a block table delta is lost", Parts(runner=_LosesBlock)),
    Fault("there is no carry-over", Parts(runner=_NoCarryOver)),
    Fault("the carry-over is from the step before", Parts(runner=_CarriesOlderToken)),
    Fault("the carry-over goes by place in the batch", Parts(runner=_CarriesNeighboursToken)),
    Fault("padding is written to a live row", Parts(runner=_PadsOnRowZero)),
)


@dataclass(frozen=True, slots=True)
class Caught:
    """A fault and how it was found; `seeds` is None if it was not."""

    fault: Fault
    seeds: int | None
    violation: Violation | None

    @property
    def finding(self) -> Finding | None:
        return self.violation.finding if self.violation else None


def hunt(fault: Fault, most: int = MOST_SEEDS) -> Caught:
    """Run schedules from seed 0 until one finds the fault."""
    for seed in range(most):
        result = run(generate(seed), fault.parts)
        if result.violation is not None:
            return Caught(fault, seed + 1, result.violation)
    return Caught(fault, None, None)


def table() -> str:
    """Every fault and how it was found, as markdown."""
    lines = ["| planted fault | schedules until found | by | what was said |", "|---|---|---|---|"]
    for fault in FAULTS:
        caught = hunt(fault)
        said = caught.violation.text if caught.violation else ""
        lines.append(f"| {fault.name} | {caught.seeds or 'not found'} | {caught.finding} | {said} |")
    found = sum("| not found |" not in line for line in lines[2:])
    return "\n".join([*lines, "", f"{found} of {len(FAULTS)} found."])


def main() -> None:
    """Print the table of docs/correctness.md."""
    torch.set_num_threads(1)
    print(table())


if __name__ == "__main__":
    main()
