"""The contract of a sampler, and the arithmetic that makes every implementation choose the same token.

Letters that end a tensor's name give its shape:
    E  entries of the batch, V vocabulary
    R  rows of the device tables; the last row is scratch, for padding

The method, which TorchSampler spells out:
    1. A logit that is NaN counts as -inf, and +inf as the largest finite value of the logits' type. -inf is never
       sampled; a row with nothing else gives token 0.
    2. Temperature 0: the largest logit; the lowest index wins ties.
    3. Otherwise weight = exp((logit - largest) / temperature), at most 1, and mass = floor(weight * 2**MASS_BITS).
       top_k and top_p are thresholds on the logit, min_p one on the weight; ties with the last one kept are kept.
    4. With U the request's random number of UNIFORM_BITS bits for this position (rng.py), the token is the first in
       vocabulary order at which the cumulative mass exceeds floor(U * total mass / 2**UNIFORM_BITS).

Masses are integers, so sums do not depend on their order: blocks, splits and devices can not change the answer. The
weight is a fixed sequence of fp32 operations, each rounded once (no fused multiply-add), for the same reason.
A token less likely than 2**-MASS_BITS times the likeliest one has no mass; all of these together hold less than
V * 2**-MASS_BITS of the probability (3e-8 at V = 128k).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from gapless.errors import InternalError
from gapless.sampling.features import FeatureTables, StepMasks

MASS_BITS: Final = 42
MAX_VOCAB: Final = 2**20 - 1  # so that the total mass stays below 2**62
MIN_TEMPERATURE: Final = 1e-30  # below it 1 / temperature would overflow; the result is greedy but for ties
MIN_LOG2_WEIGHT: Final = -100.0  # far below any mass, far above fp32's subnormals

# 2**f for |f| <= 1/2 as 1 + f * (C1 + f * (C2 + ...)): our minimax fit, relative error below 2e-7 in fp32. With the
# rounding of its exponent a weight is within 2e-7 of exp near 1 and within 2e-6 at the smallest that has mass.
LOG2_E: Final = 1.44269502162933349609375
EXP2_COEFFICIENTS: Final = (
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.0013264724984765053,
)


@dataclass(frozen=True, slots=True)
class SamplingTables:
    """Sampling parameters on the device, one line per table row (the last is scratch); written by deltas."""

    temperature_R: Tensor  # float32; 0 is greedy
    top_k_R: Tensor  # int32; 0 keeps all
    top_p_R: Tensor  # float32
    min_p_R: Tensor  # float32
    seed_R2: Tensor  # int32[R, 2]: the request seed's low and high word

    @staticmethod
    def allocate(rows: int, device: torch.device) -> SamplingTables:
        """Tables of `rows` greedy rows without filters, scratch row included in the count."""
        return SamplingTables(
            temperature_R=torch.zeros(rows, dtype=torch.float32, device=device),
            top_k_R=torch.zeros(rows, dtype=torch.int32, device=device),
            top_p_R=torch.ones(rows, dtype=torch.float32, device=device),
            min_p_R=torch.zeros(rows, dtype=torch.float32, device=device),
            seed_R2=torch.zeros(rows, 2, dtype=torch.int32, device=device),
        )

    def by_name(self) -> tuple[tuple[str, Tensor], ...]:
        """Every table with its name."""
        return (
            ("temperature", self.temperature_R),
            ("top k", self.top_k_R),
            ("top p", self.top_p_R),
            ("min p", self.min_p_R),
            ("seed", self.seed_R2),
        )


class Sampler(Protocol):
    """Chooses one token per entry."""

    def sample(
        self,
        logits_EV: Tensor,
        rows_E: Tensor,
        positions_E: Tensor,
        tables: SamplingTables,
        *,
        all_greedy: bool,
        features: FeatureTables | None = None,
        masks: StepMasks | None = None,
    ) -> Tensor:
        """Tokens, int32[E].

        logits_EV    fp32, bf16 or fp16; not written to; the vocabulary is contiguous.
        rows_E       int32: each entry's line in the tables.
        positions_E  int32: the position, in its sequence, of the token being sampled.
        all_greedy   a promise that every row's temperature is 0; an implementation may ignore it.
        features     edits that come before temperature and filters, see features.py; None: no row has any. A row
                     without edits gets the same token either way.
        masks        masks of this step, if it has some; they need `features`.
        """
        ...


def clean_logits(logits: Tensor) -> Tensor:
    """fp32 logits with NaN as -inf and +inf as the type's largest finite value."""
    largest = torch.finfo(logits.dtype).max
    return torch.nan_to_num(logits.float(), nan=-torch.inf, posinf=largest, neginf=-torch.inf)


def check_logits(logits_EV: Tensor) -> None:
    """Raises InternalError unless the logits are [E, V] with contiguous rows and a vocabulary that masses allow."""
    if logits_EV.ndim != 2 or (logits_EV.stride(1) != 1 and logits_EV.shape[1] > 1):
        raise InternalError(f"logits must be [E, V] with contiguous rows, not {tuple(logits_EV.shape)}")
    if logits_EV.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InternalError(f"logits must be fp32, bf16 or fp16, not {logits_EV.dtype}")
    if not 0 < logits_EV.shape[1] <= MAX_VOCAB:
        raise InternalError(f"a vocabulary of {logits_EV.shape[1]} is outside 1 to {MAX_VOCAB}")
