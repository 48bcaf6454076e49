"""The runner on an accelerator: the two ends of a step as one kernel each."""

from __future__ import annotations

from torch import Tensor

from gapless.engine.layout import StepInputs, StepShape
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot
from gapless.kernels.unpack import store_sampled, unpack


class TritonRunner(Runner):
    def unpack(self, inputs: StepInputs, shape: StepShape) -> Tensor:
        return unpack(inputs, self.tables, decodes_only=shape.decodes_only)

    def store(self, inputs: StepInputs, slot: Slot, sampled_S: Tensor) -> None:
        store_sampled(sampled_S, inputs.sample_rows_S, self.tables.last_token_R, slot.device_out)
