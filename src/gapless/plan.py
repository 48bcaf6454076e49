"""One step's decisions: lengths, places and parameters, never token values. Complete when constructed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gapless.request import Request

Ints = NDArray[np.int32]

PLACEHOLDER = -1
"""Stands for an input token that the host does not know yet; the device puts in the row's last token."""


@dataclass(frozen=True, slots=True, eq=False)
class RowParams:
    """Sampling parameters of rows that were taken in this step, to be written to the device tables. A rows."""

    rows_A: Ints
    temperature_A: NDArray[np.float32]
    top_k_A: Ints
    top_p_A: NDArray[np.float32]
    min_p_A: NDArray[np.float32]
    seed_A: NDArray[np.uint64]

    @classmethod
    def of(cls, requests: Mapping[int, Request]) -> RowParams:
        """Of these requests by row."""
        params = [request.params for request in requests.values()]
        return cls(
            rows_A=np.asarray(list(requests), dtype=np.int32),
            temperature_A=np.asarray([each.temperature for each in params], dtype=np.float32),
            top_k_A=np.asarray([each.top_k for each in params], dtype=np.int32),
            top_p_A=np.asarray([each.top_p for each in params], dtype=np.float32),
            min_p_A=np.asarray([each.min_p for each in params], dtype=np.float32),
            seed_A=np.asarray([request.seed for request in requests.values()], dtype=np.uint64),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one step runs. Entries that have exactly one query token come first.

    rows_E           row of each entry
    starts_E         position of the entry's first query token
    counts_E         query tokens of each entry, >= 1
    samples_E        tokens that the entry samples: 1 where the step reaches the end of the sequence, else 0
    num_samples      sum of samples_E
    num_decodes      entries with one query token
    num_tokens       sum of counts_E
    block_*_U        block table columns that were filled for this step: table[row, column] = block
    params           sampling parameters of newly taken rows
    all_greedy       no entry needs a random number
    continues        the entries are those of the step before, all decode again, and no row is new: each is a position
                     further, and its token is the one that it sampled then
    """

    step: int
    rows_E: Ints
    starts_E: Ints
    counts_E: Ints
    samples_E: Ints
    num_samples: int
    num_decodes: int
    num_tokens: int
    block_rows_U: Ints
    block_columns_U: Ints
    block_ids_U: Ints
    params: RowParams
    all_greedy: bool
    continues: bool = False

    @property
    def decode_only(self) -> bool:
        """Every entry decodes one token and no row is new: such steps replay a graph."""
        return self.num_tokens == self.rows_E.size == self.num_samples and not self.params.rows_A.size


_NOTHING = np.zeros(0, dtype=np.int32)
NO_PARAMS = RowParams.of({})


def empty_plan() -> Plan:
    """A plan without entries: filled into a shape, it is all padding."""
    return Plan(
        step=-1,
        rows_E=_NOTHING,
        starts_E=_NOTHING,
        counts_E=_NOTHING,
        samples_E=_NOTHING,
        num_samples=0,
        num_decodes=0,
        num_tokens=0,
        block_rows_U=_NOTHING,
        block_columns_U=_NOTHING,
        block_ids_U=_NOTHING,
        params=NO_PARAMS,
        all_greedy=True,
    )
