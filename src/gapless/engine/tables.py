"""State that lives on the device by row, and is changed by deltas that travel with a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gapless.sampling.base import SamplingTables
from gapless.sampling.features import FeatureTables


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """The rows of the newest step in which all entries decoded, by their place in it.

    While the same rows go on, the device counts their positions by itself.
    """

    rows_E: Tensor  # int32; padding is the scratch row
    positions_E: Tensor  # int32: of the token that the step computes
    lengths_E: Tensor  # int32: positions + 1
    numbers_E1: Tensor  # int32: 0, 1, 2, …

    @classmethod
    def allocate(cls, entries: int, device: torch.device) -> DecodeTables:
        rows_E, positions_E, lengths_E = torch.zeros((3, entries), dtype=torch.int32, device=device)
        numbers_E1 = torch.arange(entries + 1, dtype=torch.int32, device=device)
        return cls(rows_E, positions_E, lengths_E, numbers_E1)

    def by_name(self) -> tuple[tuple[str, Tensor], ...]:
        """What changes from step to step."""
        return ("decode rows", self.rows_E), ("decode positions", self.positions_E), ("decode lengths", self.lengths_E)


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """State that lives on the device, one line per row; the last row is scratch. R rows, C block columns."""

    block_table_RC: Tensor  # int32
    last_token_R: Tensor  # int32: what the row's newest step sampled
    decodes: DecodeTables
    sampling: SamplingTables
    features: FeatureTables
    arguments_RP: Tensor  # float32: for each of P logits processors; NaN where a row does not use it

    @property
    def scratch_row(self) -> int:
        return self.last_token_R.numel() - 1

    @classmethod
    def allocate(cls, rows: int, columns: int, vocab: int, processors: int, device: torch.device) -> DeviceTables:
        """Of so many rows, scratch row included, and block columns."""
        return cls(
            block_table_RC=torch.zeros((rows, columns), dtype=torch.int32, device=device),
            last_token_R=torch.zeros(rows, dtype=torch.int32, device=device),
            decodes=DecodeTables.allocate(max(rows - 1, 1), device),
            sampling=SamplingTables.allocate(rows, device),
            features=FeatureTables.allocate(rows, vocab, device),
            arguments_RP=torch.full((rows, processors), torch.nan, device=device),
        )
