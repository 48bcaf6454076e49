"""Faults of a step's inputs: what fill writes, what attention is told of the batch, and which graph reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.engine.fill import fill
from gapless.engine.graphs import GraphTable, StepGraphs
from gapless.engine.layout import Edits, StepInputs, StepShape, sections_of
from gapless.engine.slots import Slot
from gapless.engine.stage import Extent, Half
from gapless.logits_processor import LogitsProcessor
from gapless.plan import Ints, Plan
from support.hash_model import HashModel
from support.sim.parts import Parts, RigRunner, RigScheduler


def changed(name: str, change: Callable[[Ints], Ints]) -> Parts:
    """Parts whose fill changes this section of the packed inputs."""

    def fill_wrongly(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
        section = getattr(sections_of(shape), name)
        packed[section] = change(packed[section].copy())

    return Parts(fill=fill_wrongly)


def one_less(values: Ints) -> Ints:
    return values - np.int32(1)


def ones(values: Ints) -> Ints:
    return np.ones_like(values)


def neighbours(values: Ints) -> Ints:
    return np.roll(values, 1)


def too_early(values: Ints) -> Ints:
    """Of query_start: every entry but the first begins with the last token of the one before."""
    values[1:-1] -= 1
    return values


def reads_scratch_row(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """Attention looks into the block table of padding."""
    packed[sections_of(shape).rows_E] = scratch_row


def pads_on_row_zero(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """Padding goes to a row that sequences use."""
    fill(plan, tokens_RL, packed, shape, 0)


def chunks_too_early(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """The tokens of a chunk get the positions before theirs."""
    in_chunk_T = np.repeat(plan.counts_E > 1, plan.counts_E)
    start = sections_of(shape).positions_T.start
    section = slice(start, start + in_chunk_T.size)
    positions_T = packed[section].copy()
    packed[section] = positions_T - (in_chunk_T & (positions_T > 0))


def samples_first_token(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """An entry samples from its first token in place of its last."""
    if shape.decodes_only:
        return
    firsts_E = np.cumsum(plan.counts_E) - plan.counts_E
    firsts_E[plan.num_decodes :] += shape.decodes - plan.num_decodes
    firsts_S = firsts_E[plan.samples_E > 0]
    start = sections_of(shape).sample_tokens_S.start
    packed[start : start + firsts_S.size] = firsts_S


def loses_block(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """A block that a decoding row gains never gets into the device's table."""
    if plan.decode_only and plan.block_rows_U.size:
        packed[sections_of(shape).updates_3U.start] = scratch_row


def told(change: Callable[[Extent], Extent]) -> Parts:
    """Parts whose compute stage is given other bounds."""

    class Misinformed(RigRunner):
        def forward(self, slot: Slot, shape: StepShape, extent: Extent, half: Half) -> None:
            super().forward(slot, shape, change(extent), half)

        def finish(
            self,
            slot: Slot,
            shape: StepShape,
            extent: Extent,
            half: Half,
            edits: Edits,
            processors: Sequence[LogitsProcessor] = (),
        ) -> None:
            super().finish(slot, shape, change(extent), half, edits, processors)

    return Parts(runner=Misinformed)


def nothing(extent: Extent) -> Extent:
    return Extent(0, 0, extent.all_greedy)


def shorter_cache(extent: Extent) -> Extent:
    return replace(extent, max_kv=extent.max_kv - 1)


def shorter_queries(extent: Extent) -> Extent:
    return replace(extent, max_query=extent.max_query - 1)


def all_greedy(extent: Extent) -> Extent:
    return replace(extent, all_greedy=True)


class OneMoreDecode(RigRunner):
    """Attention is told of one decode more than there is."""

    def forward(self, slot: Slot, shape: StepShape, extent: Extent, half: Half) -> None:
        model = self.model

        class Misled(HashModel):
            def forward(self, tokens_T: Tensor, kv: Sequence[LayerKV], batch: AttentionBatch) -> Tensor:
                return model.forward(tokens_T, kv, replace(batch, num_decodes=batch.num_decodes + 1))

            def logits(self, hidden_EH: Tensor) -> Tensor:
                return model.logits(hidden_EH)

        self.model = Misled()
        super().forward(slot, shape, extent, half)
        self.model = model


def chunks_in_the_gap(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """The chunks' tokens are looked for right behind the decodes, where there may be padding."""
    if not shape.decodes_only:
        starts = sections_of(shape).query_start_E1
        packed[starts.start + shape.decodes : starts.stop] -= np.int32(shape.decodes - plan.num_decodes)


class GoesOnRegardless(RigScheduler):
    """Decodes are said to go on wherever the newest step that only decoded had the same rows."""

    newest: Plan | None = None

    def plan(self) -> Plan | None:
        plan = super().plan()
        if plan is None or not plan.decode_only:
            return plan
        same = self.newest is not None and np.array_equal(self.newest.rows_E, plan.rows_E)
        self.newest = plan
        return replace(plan, continues=same)


class SendsTooLittle(RigRunner):
    """A step whose decodes go on sends one update less than there are."""

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> Callable[[int], None]:
        if plan.continues and plan.block_ids_U.size:
            slot.packed[sections_of(shape).header_2.start + 1] -= 1
        return super().launch(plan, slot, shape)


class CountsNoFurther(RigRunner):
    """Decodes that go on stay at the position of the step before."""

    def _advance(self, inputs: StepInputs) -> None:
        before = inputs.positions_T.clone()
        super()._advance(inputs)
        if inputs.continues():
            inputs.positions_T.copy_(before)
            inputs.kv_len_E.copy_(before + 1)


class CountsPadding(RigRunner):
    """The positions of padding grow, too, to the end of the block table and beyond."""

    def _advance(self, inputs: StepInputs) -> None:
        super()._advance(inputs)
        if inputs.continues():
            inputs.positions_T.add_(inputs.rows_E == self.scratch_row)


class StaleRows(RigRunner):
    """What was sent does not replace the rows on the device."""

    def _advance(self, inputs: StepInputs) -> None:
        before = inputs.rows_E.clone()
        super()._advance(inputs)
        known = (before >= 0) & (before <= self.scratch_row)
        inputs.rows_E.copy_(torch.where(known, before, inputs.rows_E))


class CapturedOnFirstSlot(RigRunner):
    """All graphs were captured on the first slot's buffers."""

    first: Slot | None = None

    def capture(self, slot: Slot, shape: StepShape, extent: Extent) -> StepGraphs:
        self.first = self.first or slot
        return super().capture(self.first, shape, extent)


class OtherSlotsGraph(GraphTable):
    """Replays the graph of another slot."""

    def get(self, shape: StepShape, slot: Slot) -> StepGraphs | None:
        others = [graph for (of, index), graph in self._graphs.items() if of == shape and index != slot.index]
        return others[0] if others else super().get(shape, slot)


class OtherBucketsGraph(GraphTable):
    """Replays the graph of another bucket."""

    def get(self, shape: StepShape, slot: Slot) -> StepGraphs | None:
        own = super().get(shape, slot)
        others = [graph for (of, index), graph in self._graphs.items() if of != shape and index == slot.index]
        return others[0] if own is not None and others else own
