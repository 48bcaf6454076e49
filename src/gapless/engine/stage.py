"""What a step computes, in two halves: deltas, carry-over and forward; then counting, edits and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gapless.attention.base import AttentionBatch, LayerKV
from gapless.engine.layout import Edits, Extras, StepInputs, StepShape
from gapless.engine.slots import Slot
from gapless.engine.tables import DeviceTables
from gapless.errors import ConfigError
from gapless.logits_processor import LogitsProcessor, ProcessedStep
from gapless.models.base import Model
from gapless.plan import Plan
from gapless.sampling import torch_features, torch_logprobs
from gapless.sampling.base import Sampler
from gapless.sampling.features import StepMasks
from gapless.sampling.logprobs import LINE_NUMBERS, Logprobs

SCORED_AT_ONCE = 256  # tokens of prompts whose logits are there at the same time


@dataclass(frozen=True, slots=True)
class Extent:
    """Host-known bounds of a step's attention; constants inside a graph."""

    max_query: int
    max_kv: int
    all_greedy: bool

    @classmethod
    def of(cls, plan: Plan) -> Extent:
        return cls(
            max_query=int(plan.counts_E.max()),
            max_kv=int((plan.starts_E + plan.counts_E).max()),
            all_greedy=plan.all_greedy,
        )


IN_GRAPH = Extent(0, 0, all_greedy=False)  # a captured step has those that it was captured with


@dataclass(slots=True)
class Half:
    """What the first half of a step leaves for the second. In a captured step, memory of its graphs."""

    tokens_T: Tensor = field(init=False)  # carried over
    hidden_TH: Tensor = field(init=False)
    logits_SV: Tensor = field(init=False)


class Stage:
    """Owns device tables and KV cache, and uses the model. Nothing waits; all but take and score may be captured."""

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        kv: list[LayerKV],
        tables: DeviceTables,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.model = model
        self.tables = tables
        self.scratch_row = tables.scratch_row
        self._sampler = sampler
        self._kv = kv
        self._processors = processors

    def whole(self, slot: Slot, shape: StepShape, extent: Extent, half: Half) -> None:
        """Both halves of a step that edits nothing."""
        self.forward(slot, shape, extent, half)
        self.finish(slot, shape, extent, half, Edits.NONE)

    @torch.inference_mode()
    def forward(self, slot: Slot, shape: StepShape, extent: Extent, half: Half) -> None:
        """The first half of the compute stage: table deltas, carry-over, forward. This is what graphs capture."""
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
        half.tokens_T, half.hidden_TH = tokens_T, hidden_TH
        if shape.samples:
            hidden_SH = hidden_TH if shape.decodes_only else hidden_TH.index_select(0, inputs.sample_tokens_S)
            half.logits_SV = self.model.logits(hidden_SH)

    @torch.inference_mode()
    def finish(
        self,
        slot: Slot,
        shape: StepShape,
        extent: Extent,
        half: Half,
        edits: Edits,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        """The second half: count the tokens that were fed, edit logits, sample. This is what graphs capture."""
        tables = self.tables
        inputs = StepInputs.of(slot.device_in, shape, tables.decodes)
        featured = edits is not Edits.NONE
        if featured:
            self.count(half.tokens_T, inputs.token_rows_T, inputs.positions_T)
        if not shape.samples:
            return
        logits_SV, rows_S, positions_S = half.logits_SV, inputs.sample_rows_S, inputs.sample_positions_S
        features = tables.features if featured else None
        masks = self._masks(slot, shape.samples) if edits is Edits.MASKED else None
        if processors:
            logits_SV = self.edited(logits_SV, rows_S, positions_S, masks)
            last_S = half.tokens_T.index_select(0, inputs.sample_tokens_S)
            logits_SV = self._process(logits_SV, rows_S, positions_S, last_S)
            features = masks = None
        sampled_S = self._sampler.sample(
            logits_SV,
            rows_S,
            positions_S,
            tables.sampling,
            all_greedy=extent.all_greedy,
            features=features,
            masks=masks,
        )
        self.store(inputs, slot, sampled_S)
        if featured:
            wanted_S = tables.features.num_logprobs_R.index_select(0, inputs.sample_rows_S)
            lines = Logprobs.of(slot.device_lines[: LINE_NUMBERS * shape.samples], shape.samples)
            self.logprobs(half.logits_SV, sampled_S, wanted_S, lines)

    def _process(self, logits_SV: Tensor, rows_S: Tensor, positions_S: Tensor, last_S: Tensor) -> Tensor:
        """The scores after the logits processors of those rows that have arguments for them."""
        arguments_SP = self.tables.arguments_RP.index_select(0, rows_S)
        result_SV = logits_SV
        for index, processor in enumerate(self._processors):
            arguments_S = arguments_SP[:, index]
            processed_SV = processor(result_SV.clone(), ProcessedStep(arguments_S, positions_S, last_S))
            if processed_SV.shape != logits_SV.shape:
                raise ConfigError(
                    f"logits processor {processor.name!r} returned {tuple(processed_SV.shape)}, "
                    f"not {tuple(logits_SV.shape)}"
                )
            result_SV = torch.where(arguments_S.isnan()[:, None], result_SV, processed_SV)
        result_SV = torch.where(logits_SV == -torch.inf, logits_SV, result_SV)  # what is banned stays so
        left_S = (result_SV > -torch.inf).any(dim=1)
        return torch.where(left_S[:, None], result_SV, logits_SV)

    def _masks(self, slot: Slot, samples: int) -> StepMasks:
        words = slot.sizes.mask_words
        index_E, mask_MW = slot.device_masks[: samples * (1 + words)].split([samples, samples * words])
        return StepMasks(mask_MW.view(samples, words), index_E)

    @torch.inference_mode()
    def take(self, slot: Slot, at: Extras) -> None:
        """Give new rows their features, and count their tokens that no step feeds."""
        packed = slot.device_in
        self.take_rows(packed[at.rows_A], packed[at.begins_A1], packed[at.lines_P])
        if at.tokens_K.start != at.tokens_K.stop:
            self.count(packed[at.tokens_K], packed[at.token_rows_K], packed[at.positions_K])
        if self._processors:
            arguments_AP = packed[at.arguments_G].view(torch.float32).view(-1, len(self._processors))
            self.tables.arguments_RP.index_copy_(0, packed[at.rows_A].long(), arguments_AP)

    @torch.inference_mode()
    def score(self, slot: Slot, at: Extras, half: Half) -> None:
        """Log probabilities of prompts, a slice at a time: their logits are never there as a whole."""
        indices_Q, targets_Q, wanted_Q = (slot.device_in[each] for each in (at.indices_Q, at.targets_Q, at.wanted_Q))
        scores = Logprobs.of(slot.device_lines[slot.score_lines(len(indices_Q))], len(indices_Q))
        for begin in range(0, len(indices_Q), SCORED_AT_ONCE):
            part = slice(begin, begin + SCORED_AT_ONCE)
            logits_LV = self.model.logits(half.hidden_TH.index_select(0, indices_Q[part]))
            lines = Logprobs(scores.ids_LK[part], scores.logprobs_LK[part], scores.ranks_L[part])
            self.logprobs(logits_LV, targets_Q[part], wanted_Q[part], lines)

    def take_rows(self, rows_A: Tensor, begins_A1: Tensor, lines_P: Tensor) -> None:
        """See sampling/torch_features.py."""
        torch_features.take_rows(rows_A, begins_A1, lines_P, self.tables.features)

    def edited(self, logits_SV: Tensor, rows_S: Tensor, positions_S: Tensor, masks: StepMasks | None) -> Tensor:
        """All logits in float32 as they are sampled from: see sampling/torch_features.py."""
        return torch_features.edit_logits(logits_SV, rows_S, positions_S, self.tables.features, masks)

    def count(self, tokens_T: Tensor, token_rows_T: Tensor, positions_T: Tensor) -> None:
        """See sampling/torch_features.py."""
        torch_features.count_tokens(tokens_T, token_rows_T, positions_T, self.tables.features)

    def logprobs(self, logits_LV: Tensor, targets_L: Tensor, wanted_L: Tensor, out: Logprobs) -> None:
        """See sampling/torch_logprobs.py."""
        torch_logprobs.logprobs(logits_LV, targets_L, wanted_L, out)

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
