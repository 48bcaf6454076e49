"""State that lives on the device by row, and is changed by deltas that travel with a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gapless.sampling.base import SamplingTables


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """State that lives on the device, one line per row; the last row is scratch. R rows, C block columns."""

    block_table_RC: Tensor  # int32
    last_token_R: Tensor  # int32: what the row's newest step sampled
    sampling: SamplingTables

    @classmethod
    def allocate(cls, rows: int, columns: int, device: torch.device) -> DeviceTables:
        return cls(
            block_table_RC=torch.zeros((rows, columns), dtype=torch.int32, device=device),
            last_token_R=torch.zeros(rows, dtype=torch.int32, device=device),
            sampling=SamplingTables.allocate(rows, device),
        )
