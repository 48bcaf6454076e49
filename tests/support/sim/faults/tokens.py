"""Faults of tokens, ends and the compute stage: what is emitted, drawn, carried over and sent to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gapless.config import SchedulerLimits
from gapless.device.base import Access, Note, Stream
from gapless.device.sim.streams import UNDECLARED
from gapless.engine.layout import Edits, StepInputs, StepShape, sections_of
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot
from gapless.engine.stage import Extent, Half
from gapless.logits_processor import LogitsProcessor
from gapless.outcome import Committed, Sampled
from gapless.plan import Ints, Plan
from gapless.request import FinishReason
from gapless.rows import RowState
from gapless.sampling.base import SamplingTables
from gapless.sampling.features import FeatureTables, StepMasks
from gapless.waiting import SequenceState
from support.sim.faults.inputs import changed, one_less
from support.sim.model import MixSampler
from support.sim.parts import Parts, RigRunner, RigScheduler
from support.sim.rig import Rig

Work = Callable[[], None]


class EmitsOvershoot(RigScheduler):
    """Tokens of rows whose sequence has stopped are emitted too."""

    def commit(self, plan: Plan, sampled: Sampled) -> Committed:
        rows = plan.rows_E[plan.samples_E > 0]
        dead = self.rows.state[rows] == RowState.DEAD
        ids, extra = self.rows.request_id[rows][dead], sampled.tokens[dead].copy()
        committed = super().commit(plan, sampled)
        return replace(
            committed,
            request_ids=np.concatenate((committed.request_ids, ids)),
            tokens=np.concatenate((committed.tokens, extra)),
        )


class RunsPastLimit(RigScheduler):
    """An end by length is noticed at commit only, as one by a stop token is."""

    def _schedule(
        self, decode_rows: Ints, chunk_rows: list[int], chunk_counts: list[int], new_rows: list[int], grown: list[Ints]
    ) -> Plan:
        beyond = self.rows.limit < self.limits.max_model_len
        self.rows.limit += beyond
        try:
            return super()._schedule(decode_rows, chunk_rows, chunk_counts, new_rows, grown)
        finally:
            self.rows.limit -= beyond


class BillsOvershoot(RigScheduler):
    """Counts the stop's overshoot as generated."""

    def _finish(
        self, sequence: SequenceState, reason: FinishReason, stop: int | None = None, error: str | None = None
    ) -> None:
        super()._finish(sequence, reason, stop, error)
        end = self._finished[-1]
        self._finished[-1] = replace(end, generated=end.generated + (reason is FinishReason.STOP))


class WrongReason(RigScheduler):
    """Says that a stop was an end by length."""

    def _finish(
        self, sequence: SequenceState, reason: FinishReason, stop: int | None = None, error: str | None = None
    ) -> None:
        wrong = FinishReason.LENGTH if reason is FinishReason.STOP else reason
        super()._finish(sequence, wrong, stop, error)


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
        self.steps += 1
        positions_E, tables = self.key(rows_E, positions_E, tables)
        return super().sample(
            logits_EV, rows_E, positions_E, tables, all_greedy=all_greedy, features=features, masks=masks
        )


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


class _OtherEnqueue:
    """A stream on which work is queued in another way."""

    def __init__(self, stream: Stream, enqueue: Callable[[Work, Note], None]) -> None:
        self.name, self.record, self.wait = stream.name, stream.record, stream.wait
        self._enqueue = enqueue

    def enqueue(self, work: Callable[[], None], note: Note | None = None) -> None:
        assert note is not None
        self._enqueue(work, note)


class DeltasOnCopyStream(RigRunner):
    """Table deltas are applied on the H2D stream, as soon as they are there."""

    def _apply_deltas(self, inputs: StepInputs, shape: StepShape) -> None:
        pass

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> Callable[[int], None]:
        def apply() -> None:
            Runner._apply_deltas(self, StepInputs.of(slot.device_in, shape, self.tables.decodes), shape)

        def accesses() -> Sequence[Access]:
            inputs, tables = StepInputs.of(slot.device_in, shape, self.tables.decodes), self.tables
            rows, admitted = inputs.block_updates()[0].numpy(), inputs.param_rows_A.numpy()
            return [
                Access(f"device in {slot.letter}", slot.device_in, None, False),
                Access("block table", tables.block_table_RC, rows, True),
                *(Access(name, each, admitted, True) for name, each in tables.sampling.by_name()),
            ]

        def enqueue(copy: Work, note: Note) -> None:
            self.queue(copies, copy, note, apply, Note("deltas", plan.step, slot.letter, accesses))

        copies = self._h2d
        self._h2d = _OtherEnqueue(copies, enqueue)
        try:
            return super().launch(plan, slot, shape)
        finally:
            self._h2d = copies

    def queue(self, copies: Stream, copy: Work, note: Note, apply: Work, deltas: Note) -> None:
        """Queue the copy in and the deltas, each with its note."""
        copies.enqueue(copy, note)
        copies.enqueue(apply, deltas)


class UndeclaredDeltas(DeltasOnCopyStream):
    """The same, and nobody is told what that work touches."""

    def queue(self, copies: Stream, copy: Work, note: Note, apply: Work, deltas: Note) -> None:
        super().queue(copies, copy, note, apply, Note(UNDECLARED, -1, ""))


class DeltasDeclaredAsNothing(DeltasOnCopyStream):
    """The same, and that work is said to touch nothing."""

    def queue(self, copies: Stream, copy: Work, note: Note, apply: Work, deltas: Note) -> None:
        super().queue(copies, copy, note, apply, deltas._replace(accesses=list))


class DeltasInCopyIn(DeltasOnCopyStream):
    """The copy in applies them, too; what it declares is as it was."""

    def queue(self, copies: Stream, copy: Work, note: Note, apply: Work, deltas: Note) -> None:
        def both() -> None:
            copy()
            apply()

        copies.enqueue(both, note)


class DeltasByTheHost(RigRunner):
    """The host writes the deltas into the tables when it launches the step."""

    def _apply_deltas(self, inputs: StepInputs, shape: StepShape) -> None:
        pass

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> Callable[[int], None]:
        Runner._apply_deltas(self, StepInputs.of(slot.host_in, shape, self.tables.decodes), shape)
        return super().launch(plan, slot, shape)


DELTAS_ON_COPY_STREAM = Parts(runner=DeltasOnCopyStream)
EARLIER_POSITION = changed("sample_positions_S", one_less)


class CarriesOlderToken(RigRunner):
    """Placeholders get what the row sampled two steps ago."""

    pending: Tensor | None = None

    def finish(
        self,
        slot: Slot,
        shape: StepShape,
        extent: Extent,
        half: Half,
        edits: Edits,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        last = self.tables.last_token_R
        before = last.clone()
        super().finish(slot, shape, extent, half, edits, processors)
        after = last.clone()
        last.copy_(before if self.pending is None else self.pending)
        self.pending = after


class CarriesNeighboursToken(RigRunner):
    """Placeholders get another row's token, as if the table went by place in the batch."""

    def forward(self, slot: Slot, shape: StepShape, extent: Extent, half: Half) -> None:
        last = self.tables.last_token_R
        last.copy_(last.roll(1))
        super().forward(slot, shape, extent, half)
        last.copy_(last.roll(-1))


class NoCarryOver(RigRunner):
    """Placeholders stay what they are."""

    def forward(self, slot: Slot, shape: StepShape, extent: Extent, half: Half) -> None:
        tokens = StepInputs.of(slot.device_in, shape, self.tables.decodes).tokens_T
        tokens[tokens < 0] = 0
        super().forward(slot, shape, extent, half)


class StaleParams(RigRunner):
    """A row keeps the sampling parameters of the first request that it had."""

    @cached_property
    def seen(self) -> set[int]:
        return set()

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> Callable[[int], None]:
        start = sections_of(shape).param_rows_A.start
        for index, row in enumerate(plan.params.rows_A.tolist()):
            if row in self.seen:
                slot.packed[start + index] = self.scratch_row
            self.seen.add(row)
        return super().launch(plan, slot, shape)


class RefillsAfterLaunch(RigRunner):
    """The next step's inputs are written while the copy of this one may still run."""

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> Callable[[int], None]:
        launch_sampling = super().launch(plan, slot, shape)
        slot.packed[sections_of(shape).tokens_T.start] = 1
        return launch_sampling
