"""Launches steps: copy in, compute, copy out, each on its stream, ordered by the slot's events. Never waits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gapless.attention.base import LayerKV
from gapless.device.base import Access, Device, Graph, Note
from gapless.engine.accesses import (
    copy_in_accesses,
    copy_masks_accesses,
    copy_out_accesses,
    forward_accesses,
    sample_accesses,
    score_accesses,
    take_accesses,
)
from gapless.engine.graphs import GraphTable, StepGraphs
from gapless.engine.layout import Edits, Extras, StepShape, sections_of, sent_size
from gapless.engine.sleep import Lent, give_back, lend, take_again
from gapless.engine.slots import Brings, Slot
from gapless.engine.stage import IN_GRAPH, Extent, Half, Stage
from gapless.engine.tables import DeviceTables
from gapless.logits_processor import LogitsProcessor
from gapless.models.base import Model
from gapless.plan import Plan, RowLines
from gapless.sampling.base import Sampler
from gapless.sampling.logprobs import LINE_NUMBERS


class Runner(Stage):
    """Owns streams and graphs, beside what the stage has."""

    def __init__(
        self,
        model: Model,
        device: Device,
        sampler: Sampler,
        kv: list[LayerKV],
        tables: DeviceTables,
        graphs: GraphTable,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        super().__init__(model, sampler, kv, tables, processors)
        self.graphs = graphs
        self.recapture: Callable[[], None] = lambda: None  # captures the graphs, where there are some
        self._lent: list[Lent] | None = None
        self._kept: tuple[Tensor, Tensor] | None = None  # tokens and logits of the newest step, for processors
        self._device = device
        self._h2d = device.stream("h2d")
        self.compute = device.stream("compute")
        self._d2h = device.stream("d2h")

    def shape_of(self, plan: Plan) -> StepShape:
        """The shape that the plan is filled and launched in: a graph's if one holds it, else its own."""
        return self.graphs.shape_for(plan) or self.graphs.pad_decodes(StepShape.of(plan))

    def launch(self, plan: Plan, slot: Slot, shape: StepShape) -> Callable[[int], None]:
        """Queue the first half of the step that was filled into the slot, the forward. Returns at once.

        Returns what queues the second half, sampling, to be called before anything else is launched: with how many
        numbers of the slot's masks are filled, 0 if there are none. A row that must have one gets token 0 then.
        """
        step, letter = plan.step, slot.letter
        edits = Edits.of(plan)
        slot.brings = Brings(
            plan.num_samples,
            shape.samples if plan.logprobs else 0,
            0 if plan.scores is None else plan.scores.indices_Q.size,
        )
        size = sent_size(plan, shape)
        self._h2d.enqueue(lambda: copy_in(slot, size), Note("copy in", step, letter, lambda: copy_in_accesses(slot)))
        self._h2d.record(slot.h2d_done)
        self.compute.wait(slot.h2d_done)
        self.compute.record(slot.compute_begin)
        slot.waited = edits is Edits.MASKED
        if plan.lines is not None:
            self._take(plan, plan.lines, slot, shape)
        graphs = self.graphs.get(shape, slot) if plan.scores is None else None
        extent = IN_GRAPH if graphs is not None and not plan.processed else Extent.of(plan)
        if edits is Edits.NONE and plan.scores is None and (graphs is None or graphs.whole is not None):
            if graphs is not None and graphs.whole is not None:
                self.compute.enqueue(graphs.whole.replay, Note("replay", step, letter))
            else:
                note = Note("compute", step, letter, lambda: self._whole_accesses(slot, shape))
                self.compute.enqueue(lambda: self.whole(slot, shape, extent, Half()), note)
            return lambda _: self._launch_copy_out(plan, slot)
        half = self._kept_half(shape) if graphs is not None and plan.processed else Half()
        if graphs is not None:
            self.compute.enqueue(graphs.forward.replay, Note("replay", step, letter))
        else:
            note = Note("compute", step, letter, lambda: self._forward_accesses(slot, shape))
            self.compute.enqueue(lambda: self.forward(slot, shape, extent, half), note)
        if plan.scores is not None:
            at = Extras.of(plan, shape)
            note = Note("score", step, letter, lambda: score_accesses(slot))
            self.compute.enqueue(lambda: self.score(slot, at, half), note)
        if edits is Edits.MASKED:
            self.compute.record(slot.forward_done)
        return lambda masks: self._launch_finish(plan, slot, shape, extent, half, edits, masks)

    def _launch_finish(
        self, plan: Plan, slot: Slot, shape: StepShape, extent: Extent, half: Half, edits: Edits, masks: int
    ) -> None:
        step, letter = plan.step, slot.letter
        if masks:
            note = Note("copy masks", step, letter, lambda: copy_masks_accesses(slot))
            self._h2d.enqueue(lambda: copy_masks(slot, masks), note)
            self._h2d.record(slot.masks_done)
            self.compute.wait(slot.masks_done)
        elif edits is Edits.MASKED:
            edits = Edits.FEATURES
        if slot.waited:
            self.compute.record(slot.sample_begin)
        graphs = self.graphs.get(shape, slot) if plan.scores is None and not plan.processed else None
        if graphs is not None:
            self.compute.enqueue(graphs.finish[edits].replay, Note("sample", step, letter))
        else:
            note = Note("sample", step, letter, lambda: sample_accesses(slot, shape, edits, self.tables))
            processors = self._processors if plan.processed else ()
            self.compute.enqueue(lambda: self.finish(slot, shape, extent, half, edits, processors), note)
        self._launch_copy_out(plan, slot)

    def _launch_copy_out(self, plan: Plan, slot: Slot) -> None:
        step, letter = plan.step, slot.letter
        self.compute.record(slot.compute_done)
        self._d2h.wait(slot.compute_done)
        note = Note("copy out", step, letter, lambda: copy_out_accesses(slot))
        self._d2h.enqueue(lambda: copy_out(slot), note)
        self._d2h.record(slot.d2h_done)

    def _take(self, plan: Plan, lines: RowLines, slot: Slot, shape: StepShape) -> None:
        at = Extras.of(plan, shape)
        accesses = lambda: take_accesses(slot, lines.rows_A, lines.token_rows_K, self.tables)  # noqa: E731
        self.compute.enqueue(lambda: self.take(slot, at), Note("take rows", plan.step, slot.letter, accesses))

    def capture(self, slot: Slot, shape: StepShape, extent: Extent) -> StepGraphs:
        """Graphs of the compute stage on this slot's buffers, which hold the inputs of a step of this shape.

        The first slot's graphs of a shape come first: its step is run once before, which compiles what it needs.
        """
        half = Half()

        def forward() -> None:
            self.forward(slot, shape, extent, half)
            if self._processors:
                self._keep(half)

        def warm_up() -> None:
            copy_in(slot, sections_of(shape).total)
            forward()
            for edits in Edits:
                self.finish(slot, shape, extent, half, edits)

        if slot.index == 0:
            self._device.run_now(warm_up, self.compute)

        plain = None
        if shape.decodes_only:
            plain = self._device.capture(
                lambda: self.whole(slot, shape, extent, half),
                self.compute,
                lambda: self._whole_accesses(slot, shape),
            )
        captured = self._device.capture(forward, self.compute, lambda: self._forward_accesses(slot, shape))
        return StepGraphs(
            captured, {edits: self._capture_finish(slot, shape, extent, half, edits) for edits in Edits}, plain
        )

    def _capture_finish(self, slot: Slot, shape: StepShape, extent: Extent, half: Half, edits: Edits) -> Graph:
        return self._device.capture(
            lambda: self.finish(slot, shape, extent, half, edits),
            self.compute,
            lambda: sample_accesses(slot, shape, edits, self.tables),
        )

    def _whole_accesses(self, slot: Slot, shape: StepShape) -> Iterable[Access]:
        plain = sample_accesses(slot, shape, Edits.NONE, self.tables)
        return itertools.chain(self._forward_accesses(slot, shape), plain)

    def _forward_accesses(self, slot: Slot, shape: StepShape) -> Iterable[Access]:
        return forward_accesses(slot, shape, self.tables, self._kv)

    def update_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """See models/base.py. Nothing may be in flight."""
        self._device.run_now(lambda: self.model.update_weights(tensors), self.compute)

    @property
    def asleep(self) -> bool:
        return self._lent is not None

    def sleep(self) -> None:
        """Give the memory of weights, KV cache and graphs back, the weights' contents to the host. On the CPU: nothing.

        Nothing may be in flight, and no KV is there afterwards.
        """
        if self._lent is None:
            self.graphs.clear()
            kv = [tensor for layer in self._kv for tensor in (layer.k_BKSD, layer.v_BKSD)]
            self._lent = [*lend(self.model.tensors(), keep=True), *lend(kv, keep=False)]
        lent = self._lent
        try:
            self._device.run_now(lambda: give_back(lent), self.compute)
        except BaseException:
            self.wake()
            raise
        self._device.release()

    def wake(self) -> None:
        """Undo sleep(). Raises OutOfMemoryError if the memory is not free; then it may be tried again."""
        if self._lent is None:
            return
        lent = self._lent
        self._device.run_now(lambda: take_again(lent), self.compute)
        self.recapture()
        self._lent = None

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
    def _keep(self, half: Half) -> None:
        """Put what processors look at where it stays: a graph's own memory is another one's, too."""
        if self._kept is None:  # the largest captured step comes first
            most, vocab = self.tables.scratch_row, half.logits_SV.shape[1]
            self._kept = (torch.empty_like(half.tokens_T), half.logits_SV.new_empty(most, vocab))
        kept = self._kept_half(StepShape(len(half.tokens_T), 0, 0, len(half.logits_SV), 0, 0))
        half.tokens_T, half.logits_SV = kept.tokens_T.copy_(half.tokens_T), kept.logits_SV.copy_(half.logits_SV)

    def _kept_half(self, shape: StepShape) -> Half:
        assert self._kept is not None
        half = Half()
        half.tokens_T, half.logits_SV = self._kept[0][: shape.tokens], self._kept[1][: shape.samples]
        return half


def copy_in(slot: Slot, size: int) -> None:
    """Host to device: so much of the packed inputs, nothing more."""
    slot.device_in[:size].copy_(slot.host_in[:size], non_blocking=True)


def copy_masks(slot: Slot, size: int) -> None:
    """Host to device: which mask each sample has, and the masks, so many numbers in all."""
    slot.device_masks[:size].copy_(slot.host_masks[:size], non_blocking=True)


def copy_out(slot: Slot) -> None:
    """Device to host: the sampled tokens, and log probabilities where they are asked for."""
    brings = slot.brings
    if brings.samples:
        slot.host_out[: brings.samples].copy_(slot.device_out[: brings.samples], non_blocking=True)
    if brings.logprobs:
        size = LINE_NUMBERS * brings.logprobs
        slot.host_lines[:size].copy_(slot.device_lines[:size], non_blocking=True)
    if brings.scores:
        at = slot.score_lines(brings.scores)
        slot.host_lines[at].copy_(slot.device_lines[at], non_blocking=True)
