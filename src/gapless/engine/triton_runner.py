"""The runner on an accelerator: the two ends of a step as one kernel each."""

from __future__ import annotations

import torch
from torch import Tensor

from gapless.engine.layout import StepInputs, StepShape
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot
from gapless.kernels.unpack import store_sampled, unpack
from gapless.sampling import triton_features, triton_logprobs
from gapless.sampling.base import clean_logits
from gapless.sampling.features import StepMasks
from gapless.sampling.logprobs import Logprobs


class TritonRunner(Runner):
    def unpack(self, inputs: StepInputs, shape: StepShape) -> Tensor:
        return unpack(inputs, self.tables, decodes_only=shape.decodes_only)

    def store(self, inputs: StepInputs, slot: Slot, sampled_S: Tensor) -> None:
        store_sampled(sampled_S, inputs.sample_rows_S, self.tables.last_token_R, slot.device_out)

    def take_rows(self, rows_A: Tensor, begins_A1: Tensor, lines_P: Tensor) -> None:
        triton_features.take_rows(rows_A, begins_A1, lines_P, self.tables.features)

    def edited(self, logits_SV: Tensor, rows_S: Tensor, positions_S: Tensor, masks: StepMasks | None) -> Tensor:
        beside = triton_features.edit_logits(
            logits_SV, rows_S, positions_S, self.tables.features, masks, triton_features.EditTiles()
        )
        return torch.where(beside.where_E[:, None] != 0, beside.logits_EV, clean_logits(logits_SV))

    def count(self, tokens_T: Tensor, token_rows_T: Tensor, positions_T: Tensor) -> None:
        triton_features.count_tokens(tokens_T, token_rows_T, positions_T, self.tables.features)

    def logprobs(self, logits_LV: Tensor, targets_L: Tensor, wanted_L: Tensor, out: Logprobs) -> None:
        triton_logprobs.logprobs(logits_LV, targets_L, wanted_L, out)
