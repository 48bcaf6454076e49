"""Faults of a step's inputs: what fill writes, what attention is told of the batch, and which graph reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gapless.device.base import Graph
from gapless.engine.fill import fill
from gapless.engine.graphs import GraphTable
from gapless.engine.layout import StepShape, sections_of
from gapless.engine.runner import Extent
from gapless.engine.slots import Slot
from gapless.plan import Ints, Plan
from support.sim.parts import Parts, RigRunner


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
    firsts_S = (np.cumsum(plan.counts_E) - plan.counts_E)[plan.samples_E > 0]
    start = sections_of(shape).sample_tokens_S.start
    packed[start : start + firsts_S.size] = firsts_S


def loses_block(plan: Plan, tokens_RL: Ints, packed: Ints, shape: StepShape, scratch_row: int) -> None:
    """A block that a decoding row gains never gets into the device's table."""
    if plan.decode_only and plan.block_rows_U.size:
        packed[sections_of(shape).block_rows_U.start] = scratch_row


def told(change: Callable[[Extent], Extent]) -> Parts:
    """Parts whose compute stage is given other bounds."""

    class Misinformed(RigRunner):
        def compute_step(self, slot: Slot, shape: StepShape, extent: Extent) -> None:
            super().compute_step(slot, shape, change(extent))

    return Parts(runner=Misinformed)


def nothing(extent: Extent) -> Extent:
    return Extent(0, 0, 0, extent.all_greedy)


def shorter_cache(extent: Extent) -> Extent:
    return replace(extent, max_kv=extent.max_kv - 1)


def shorter_queries(extent: Extent) -> Extent:
    return replace(extent, max_query=extent.max_query - 1)


def one_more_decode(extent: Extent) -> Extent:
    return replace(extent, num_decodes=extent.num_decodes + 1)


def all_greedy(extent: Extent) -> Extent:
    return replace(extent, all_greedy=True)


class CapturedOnFirstSlot(RigRunner):
    """All graphs were captured on the first slot's buffers."""

    first: Slot | None = None

    def capture(self, slot: Slot, shape: StepShape, extent: Extent) -> Graph:
        self.first = self.first or slot
        return super().capture(self.first, shape, extent)


class OtherSlotsGraph(GraphTable):
    """Replays the graph of another slot."""

    def get(self, shape: StepShape, slot: Slot) -> Graph | None:
        others = [graph for (of, index), graph in self._graphs.items() if of == shape and index != slot.index]
        return others[0] if others else super().get(shape, slot)


class OtherBucketsGraph(GraphTable):
    """Replays the graph of another bucket."""

    def get(self, shape: StepShape, slot: Slot) -> Graph | None:
        own = super().get(shape, slot)
        others = [graph for (of, index), graph in self._graphs.items() if of != shape and index == slot.index]
        return others[0] if own is not None and others else own
