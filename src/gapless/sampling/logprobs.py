"""Natural logarithms of probabilities under the model's own logits: no temperature, filter, penalty, bias or mask.

L lines of logits: the samples of a step, or the positions of a prompt. K places of a line: its target first, then the
likeliest tokens, the lower id first among equals. Logits are cleaned as base.py says; where all are -inf, so is every
logprob. A place that was not asked for holds id -1 and -inf. A target's rank is 1 plus the number of tokens that come
before it in that order, so a target among the likeliest stands at the place of its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gapless.errors import InternalError
from gapless.sampling.base import check_logits
from gapless.sampling.features import MAX_LOGPROBS

PLACES: Final = MAX_LOGPROBS + 1
LINE_NUMBERS: Final = 2 * PLACES + 1


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The answer for L lines."""

    ids_LK: Tensor  # int32
    logprobs_LK: Tensor  # float32
    ranks_L: Tensor  # int32; 0 where nothing was asked for, or the target is no token

    @classmethod
    def of(cls, packed: Tensor, lines: int) -> Logprobs:
        """Views of the first LINE_NUMBERS * lines numbers of an int32 buffer, so that one copy takes all."""
        ids, logprobs, ranks = packed[: LINE_NUMBERS * lines].split([PLACES * lines, PLACES * lines, lines])
        return cls(ids.view(lines, PLACES), logprobs.view(torch.float32).view(lines, PLACES), ranks)

    @classmethod
    def allocate(cls, lines: int, device: torch.device) -> Logprobs:
        return cls.of(torch.empty(LINE_NUMBERS * lines, dtype=torch.int32, device=device), lines)


def check_lines(lines_LV: Tensor, targets_L: Tensor, wanted_L: Tensor) -> None:
    """Raises InternalError unless every line has one target and one number."""
    check_logits(lines_LV)
    if not len(lines_LV) == len(targets_L) == len(wanted_L):
        raise InternalError(f"{len(lines_LV)} lines, {len(targets_L)} targets, {len(wanted_L)} wanted")
