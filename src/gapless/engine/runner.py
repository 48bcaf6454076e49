"""Launches steps: copy in, compute, copy out, each on its stream, ordered by the slot's events. Never waits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.device.base import Access, Device, Graph, Note
from gapless.engine.accesses import compute_accesses, copy_in_accesses, copy_out_accesses
from gapless.engine.graphs import GraphTable
from gapless.engine.layout import StepInputs, StepShape, sections_of, sent_size
from gapless.engine.slots import Slot
from gapless.engine.tables import DeviceTables
from gapless.models.base import Model
from gapless.plan import Plan
from gapless.sampling.base import Sampler


@dataclass(frozen=True, slots=True)
class Extent:
    """Host-known bounds of a step's attention; constants inside a graph."""

    max_query: int
    max_kv: int
    all_greedy: bool


class Runner:
    """Owns device tables, KV cache, streams and graphs."""

    def __init__(
        self,
        model: Model,
        device: Device,
        sampler: Sampler,
        kv: list[LayerKV],
        tables: DeviceTables,
        graphs: GraphTable,
    ) -> None:
        self.model = model
        self.tables = tables
        self._kv = kv
        self.scratch_row = tables.scratch_row
        self._sampler = sampler
        self.graphs = graphs
        self._device = device
        self._h2d = device.stream("h2d")
        self.compute = device.stream("compute")
        self._d2h = device.stream("d2h")

    def shape_of(self, plan: Plan) -> StepShape:
        """The shape that the plan is filled and launched in: a graph's if one holds it, else its own."""
        return self.graphs.shape_for(plan) or self.graphs.pad_decodes(StepShape.of(plan))

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> None:
        """Queue the step that was filled into the slot. Returns at once."""
        step, letter = plan.step, slot.letter
        slot.num_samples = plan.num_samples
        size = sent_size(plan, shape)
        self._h2d.enqueue(lambda: copy_in(slot, size), Note("copy in", step, letter, lambda: copy_in_accesses(slot)))
        self._h2d.record(slot.h2d_done)
        self.compute.wait(slot.h2d_done)
        self.compute.record(slot.compute_begin)
        graph = self.graphs.get(shape, slot)
        if graph is not None:
            self.compute.enqueue(graph.replay, Note("replay", step, letter))
        else:
            extent = Extent(
                max_query=int(plan.counts_E.max()),
                max_kv=int((plan.starts_E + plan.counts_E).max()),
                all_greedy=plan.all_greedy,
            )
            note = Note("compute", step, letter, lambda: self._accesses(slot, shape))
            self.compute.enqueue(lambda: self.compute_step(slot, shape, extent), note)
        self.compute.record(slot.compute_done)
        self._d2h.wait(slot.compute_done)
        note = Note("copy out", step, letter, lambda: copy_out_accesses(slot))
        self._d2h.enqueue(lambda: copy_out(slot, plan.num_samples), note)
        self._d2h.record(slot.d2h_done)

    def capture(self, slot: Slot, shape: StepShape, extent: Extent) -> Graph:
        """A graph of the compute stage on this slot's buffers, which hold the inputs of a step of this shape.

        The first slot's graph of a shape comes first: its step is run once before, which compiles what it needs.
        """

        def warm_up() -> None:
            copy_in(slot, sections_of(shape).total)
            self.compute_step(slot, shape, extent)

        if slot.index == 0:
            self._device.run_now(warm_up, self.compute)
        return self._device.capture(
            lambda: self.compute_step(slot, shape, extent), self.compute, lambda: self._accesses(slot, shape)
        )

    def _accesses(self, slot: Slot, shape: StepShape) -> Iterable[Access]:
        return compute_accesses(slot, shape, self.tables, self._kv)

    def recover(self) -> None:
        """Run steps again after one that ran out of memory. Nothing may be in flight."""
        self._device.recover()

    def close(self) -> None:
        """Let queued work end, then end the streams and free graphs, cache and weights. Nothing is launched after."""
        try:
            self._device.close()
        finally:
            self.graphs.clear()
            self._kv.clear()
            del self.model

    @torch.inference_mode()
    def compute_step(self, slot: Slot, shape: StepShape, extent: Extent) -> None:
        """The compute stage: table deltas, carry-over, forward, sample. This is what graphs capture."""
        tables = self.tables
        inputs = StepInputs.of(slot.device_in, shape, tables.decodes)
        tokens_T = self.unpack(inputs, shape)
        batch = AttentionBatch(
            rows_E=inputs.rows_E,
            query_start_E1=inputs.query_start_E1,
            kv_len_E=inputs.kv_len_E,
            token_rows_T=inputs.token_rows_T,
            positions_T=inputs.positions_T,
            block_table_RC=tables.block_table_RC,
            num_decodes=shape.decodes,
            max_query=extent.max_query,
            max_kv=extent.max_kv,
        )
        hidden_TH = self.model.forward(tokens_T, self._kv, batch)
        if not shape.samples:
            return
        hidden_SH = hidden_TH if shape.decodes_only else hidden_TH.index_select(0, inputs.sample_tokens_S)
        sampled_S = self._sampler.sample(
            self.model.logits(hidden_SH),
            inputs.sample_rows_S,
            inputs.sample_positions_S,
            tables.sampling,
            all_greedy=extent.all_greedy,
        )
        self.store(inputs, slot, sampled_S)

    def unpack(self, inputs: StepInputs, shape: StepShape) -> Tensor:
        """Apply the deltas, and fill in the tokens that were in flight when the step was planned."""
        self._apply_deltas(inputs, shape)
        if shape.decodes_only:
            self._advance(inputs)
        carried_T = self.tables.last_token_R.index_select(0, inputs.token_rows_T)
        if inputs.continues():
            return carried_T
        return torch.where(inputs.tokens_T < 0, carried_T, inputs.tokens_T)

    def store(self, inputs: StepInputs, slot: Slot, sampled_S: Tensor) -> None:
        """Keep the sampled tokens for the next step and for the host."""
        self.tables.last_token_R.index_copy_(0, inputs.sample_rows_S.long(), sampled_S)
        slot.device_out[: len(sampled_S)].copy_(sampled_S)

    def _apply_deltas(self, inputs: StepInputs, shape: StepShape) -> None:
        """Bring the tables up to date, ordered on the compute stream after every step that reads the old state."""
        rows_U, columns_U, ids_U = inputs.block_updates()
        if len(ids_U):
            self.tables.block_table_RC.index_put_((rows_U.long(), columns_U.long()), ids_U)
        if shape.admitted:
            rows, sampling = inputs.param_rows_A.long(), self.tables.sampling
            sampling.temperature_R.index_copy_(0, rows, inputs.temperature_A)
            sampling.top_k_R.index_copy_(0, rows, inputs.top_k_A)
            sampling.top_p_R.index_copy_(0, rows, inputs.top_p_A)
            sampling.min_p_R.index_copy_(0, rows, inputs.min_p_A)
            sampling.seed_R2.index_copy_(0, rows, inputs.seed_A2)

    def _advance(self, inputs: StepInputs) -> None:
        """Rows and positions of the decodes: those that were sent, or a position further than the step before."""
        if inputs.continues():
            inputs.positions_T.add_(inputs.rows_E != self.scratch_row)
        else:
            inputs.rows_E.copy_(inputs.sent_rows_E)
            inputs.positions_T.copy_(inputs.sent_positions_E)
        torch.add(inputs.positions_T, 1, out=inputs.kv_len_E)


def copy_in(slot: Slot, size: int) -> None:
    """Host to device: so much of the packed inputs, nothing more."""
    slot.device_in[:size].copy_(slot.host_in[:size], non_blocking=True)


def copy_out(slot: Slot, samples: int) -> None:
    """Device to host: the sampled tokens."""
    if samples:
        slot.host_out[:samples].copy_(slot.device_out[:samples], non_blocking=True)
