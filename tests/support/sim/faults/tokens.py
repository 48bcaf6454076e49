"""Faults of tokens, ends and the compute stage: what is emitted, drawn, carried over and sent to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapless.attention.base import LayerKV
from gapless.config import SchedulerLimits
from gapless.device.base import Access, Device, Event, Graph, Note
from gapless.device.sim.streams import SimEvent, SimStream
from gapless.engine.graphs import GraphTable
from gapless.engine.layout import StepInputs, StepShape, sections_of
from gapless.engine.runner import Extent
from gapless.engine.slots import Slot
from gapless.engine.tables import DeviceTables
from gapless.models.base import Model
from gapless.outcome import Committed
from gapless.plan import Ints, Plan
from gapless.request import FinishReason
from gapless.rows import RowState
from gapless.sampling.base import Sampler, SamplingTables
from support.sim.model import MixSampler
from support.sim.parts import RigRunner, RigScheduler, RigSlots
from support.sim.rig import Rig


class EmitsOvershoot(RigScheduler):
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


class RunsPastLimit(RigScheduler):
    """An end by length is noticed at commit only, as one by a stop token is."""

    def _schedule(
        self, decode_rows: Ints, chunk_rows: list[int], chunk_counts: list[int], new_rows: list[int], grown: list[Ints]
    ) -> Plan:
        self.rows.limit += 1
        try:
            return super()._schedule(decode_rows, chunk_rows, chunk_counts, new_rows, grown)
        finally:
            self.rows.limit -= 1


class BillsOvershoot(RigScheduler):
    """Counts the stop's overshoot as generated."""

    def _finish(self, sequence: object, reason: FinishReason) -> None:
        super()._finish(sequence, reason)  # type: ignore[arg-type]
        end = self._finished[-1]
        self._finished[-1] = replace(end, generated=end.generated + (reason is FinishReason.STOP))


class WrongReason(RigScheduler):
    """Says that a stop was an end by length."""

    def _finish(self, sequence: object, reason: FinishReason) -> None:
        wrong = FinishReason.LENGTH if reason is FinishReason.STOP else reason
        super()._finish(sequence, wrong)  # type: ignore[arg-type]


class LivePlan(RigScheduler):
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


class KeyedSampler(MixSampler):
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


class KeyedOnRow(KeyedSampler):
    def key(self, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables) -> tuple[Tensor, SamplingTables]:
        rows = torch.arange(tables.seed_R2.shape[0], dtype=torch.int32)
        return positions_E, replace(tables, seed_R2=torch.stack((rows, rows), dim=1))


class KeyedOnPlace(KeyedSampler):
    def key(self, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables) -> tuple[Tensor, SamplingTables]:
        return positions_E + torch.arange(positions_E.numel(), dtype=torch.int32), tables


class KeyedOnStep(KeyedSampler):
    def key(self, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables) -> tuple[Tensor, SamplingTables]:
        return torch.full_like(positions_E, self.steps), tables


class DeltasOnCopyStream(RigRunner):
    """Table deltas are applied on the H2D stream, as soon as they are there."""

    declared = True

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
                copies.enqueue(apply, Note("deltas", plan.step, slot.letter, accesses) if declared else None)

            def __getattr__(self, name: str) -> object:
                return getattr(copies, name)

        copies, declared = self._h2d, self.declared
        self._h2d = WithDeltas()  # type: ignore[assignment]
        try:
            super().launch(plan, slot, shape)
        finally:
            self._h2d = copies


class UndeclaredDeltas(DeltasOnCopyStream):
    """The same, and nobody is told what that work touches."""

    declared = False


class CarriesOlderToken(RigRunner):
    """Placeholders get what the row sampled two steps ago."""

    pending: Tensor | None = None

    def compute_step(self, slot: Slot, shape: StepShape, extent: Extent) -> None:
        last = self.tables.last_token_R
        before = last.clone()
        super().compute_step(slot, shape, extent)
        after = last.clone()
        last.copy_(before if self.pending is None else self.pending)
        self.pending = after


class CarriesNeighboursToken(RigRunner):
    """Placeholders get another row's token, as if the table went by place in the batch."""

    def compute_step(self, slot: Slot, shape: StepShape, extent: Extent) -> None:
        last = self.tables.last_token_R
        last.copy_(last.roll(1))
        super().compute_step(slot, shape, extent)
        rows = StepInputs.of(slot.device_in, shape).sample_rows_S.long()
        sampled = last[rows].clone()
        last.copy_(last.roll(-1))
        last[rows] = sampled


class NoCarryOver(RigRunner):
    """Placeholders stay what they are."""

    def compute_step(self, slot: Slot, shape: StepShape, extent: Extent) -> None:
        tokens = StepInputs.of(slot.device_in, shape).tokens_T
        tokens[tokens < 0] = 0
        super().compute_step(slot, shape, extent)


class OtherSlotsGraph(RigRunner):
    """All graphs were captured on the first slot's buffers."""

    first: Slot | None = None

    def capture(self, slot: Slot, shape: StepShape, extent: Extent) -> Graph:
        self.first = self.first or slot
        return super().capture(self.first, shape, extent)


class PadsOnRowZero(RigRunner):
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


class Refill(RigRunner):
    """Changes what was filled into the slot, before it is launched."""

    def spoil(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        raise NotImplementedError

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        self.spoil(plan, slot, shape)
        super().launch(plan, slot, shape)


class StaleParams(Refill):
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


class LosesBlock(Refill):
    """A block that a decoding row gains never gets into the device's table."""

    def spoil(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        if plan.decode_only and plan.block_rows_U.size:
            slot.packed[sections_of(shape).block_rows_U.start] = self.scratch_row


class WrongPosition(Refill):
    """The random number is that of the position before."""

    def spoil(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        section = sections_of(shape).sample_positions_S
        slot.packed[section] = plan_positions(plan, shape) - 1


class RefillsAfterLaunch(RigRunner):
    """The next step's inputs are written while the copy of this one may still run."""

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        super().launch(plan, slot, shape)
        slot.packed[sections_of(shape).tokens_T.start] = 1


class FreesSlotAtCompute(RigSlots):
    """A slot is free once its compute stage is over; its tokens may still be on their way."""

    def collect(self, slot: Slot) -> Ints:
        slot.compute_done.synchronize()
        slot.d2h_done = slot.compute_done
        return super().collect(slot)


class CopiesOutEarly(SimStream):
    """The copy out waits for the inputs only."""

    inputs_there: Event | None = None

    def wait(self, event: Event) -> None:
        if isinstance(event, SimEvent) and event.name.startswith("h2d_done"):
            CopiesOutEarly.inputs_there = event
        elif CopiesOutEarly.inputs_there is not None:
            event = CopiesOutEarly.inputs_there
        super().wait(event)


def plan_positions(plan: Plan, shape: StepShape) -> NDArray[np.int32]:
    """Positions of the tokens that a plan samples, padded with 1 to the shape."""
    ends = (plan.starts_E + plan.counts_E)[plan.samples_E > 0]
    return np.concatenate((ends, np.ones(shape.samples - ends.size, dtype=np.int32)))
