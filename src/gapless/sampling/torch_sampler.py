"""The sampler in plain torch: it defines the answer on any device. E entries, V vocabulary, N random entries."""

from __future__ import annotations

import torch
from torch import Tensor

from gapless.sampling.base import (
    EXP2_COEFFICIENTS,
    LOG2_E,
    MASS_BITS,
    MIN_LOG2_WEIGHT,
    MIN_TEMPERATURE,
    SamplingTables,
    check_logits,
    clean_logits,
)
from gapless.sampling.features import FeatureTables, StepMasks
from gapless.sampling.rng import scale_torch, uniform_torch
from gapless.sampling.torch_features import edit_logits, edited_entries

CHUNK_ELEMENTS = 2**17  # rows are worked on in chunks that stay in a core's cache


class TorchSampler:
    """Reads values on the host to skip work, so it is for devices without graphs, and for tests."""

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
        check_logits(logits_EV)
        if features is None or not bool((edited_E := edited_entries(rows_E, features, masks)).any()):
            return choose(logits_EV, rows_E, positions_E, tables, all_greedy=all_greedy)
        tokens_E = torch.empty_like(rows_E, dtype=torch.int32)
        for which_E in (edited_E, ~edited_E):
            logits_NV, rows_N, positions_N = logits_EV[which_E], rows_E[which_E], positions_E[which_E]
            if which_E is edited_E:
                logits_NV = edit_logits(logits_NV, rows_N, positions_N, features, masks and masks.of(which_E))
            tokens_E[which_E] = choose(logits_NV, rows_N, positions_N, tables, all_greedy=all_greedy)
        return tokens_E


def choose(
    logits_EV: Tensor, rows_E: Tensor, positions_E: Tensor, tables: SamplingTables, *, all_greedy: bool
) -> Tensor:
    """A token per entry from these logits, as base.py says: int32[E]."""
    tokens_E = greedy_tokens(logits_EV)
    if all_greedy:
        return tokens_E
    rows_E = rows_E.to(torch.int64)
    temperature_E = tables.temperature_R[rows_E]
    random_N = (temperature_E > 0).nonzero().squeeze(1)
    if random_N.numel() == 0:
        return tokens_E
    rows_N, temperature_N = rows_E[random_N], temperature_E[random_N]
    top_k_N, top_p_N, min_p_N = tables.top_k_R[rows_N], tables.top_p_R[rows_N], tables.min_p_R[rows_N]
    uniform_N = uniform_torch(tables.seed_R2[rows_N], positions_E[random_N])
    chunk = max(1, CHUNK_ELEMENTS // logits_EV.shape[1])
    for start in range(0, random_N.numel(), chunk):
        part = slice(start, start + chunk)
        mass_NV = kept_mass(
            clean_logits(logits_EV[random_N[part]]),
            temperature_N[part],
            top_k_N[part],
            top_p_N[part],
            min_p_N[part],
        )
        tokens_E[random_N[part]] = inverse_cdf(mass_NV, uniform_N[part])
    return tokens_E


def greedy_tokens(logits_EV: Tensor) -> Tensor:
    """Index of the largest logit, the lowest among equals, 0 where all are -inf. int32[E]."""
    best_E, tokens_E = logits_EV.max(dim=1)
    if not bool(torch.isfinite(best_E).all()):  # NaN counts as the largest here; +inf must tie with the largest finite
        tokens_E = clean_logits(logits_EV).argmax(dim=1)
    return tokens_E.to(torch.int32)


def weights(logits_NV: Tensor, temperature_N: Tensor) -> Tensor:
    """exp((logit - largest) / temperature) in fp32, by operations that round once each wherever they run."""
    largest_N1 = logits_NV.amax(dim=1, keepdim=True)
    largest_N1 = torch.where(largest_N1 == -torch.inf, 0.0, largest_N1)
    inverse_N1 = (1.0 / temperature_N.clamp(min=MIN_TEMPERATURE)).unsqueeze(1)
    log2_NV = (logits_NV - largest_N1).mul_(inverse_N1).mul_(LOG2_E).clamp_(min=MIN_LOG2_WEIGHT)
    exponent_NV = (log2_NV + 0.5).floor_()
    fraction_NV = log2_NV.sub_(exponent_NV)
    weight_NV = fraction_NV * EXP2_COEFFICIENTS[-1]
    for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
        weight_NV.add_(coefficient).mul_(fraction_NV)
    power_NV = exponent_NV.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return weight_NV.add_(1.0).mul_(power_NV)


def kept_mass(logits_NV: Tensor, temperature_N: Tensor, top_k_N: Tensor, top_p_N: Tensor, min_p_N: Tensor) -> Tensor:
    """The integer mass of every token that passes the filters, 0 for the others. int64[N, V]."""
    weight_NV = weights(logits_NV, temperature_N)
    mass_NV = (weight_NV * 2.0**MASS_BITS).to(torch.int64)
    vocab = logits_NV.shape[1]
    filters = zip(top_k_N.tolist(), top_p_N.tolist(), min_p_N.tolist(), strict=True)
    for n, (top_k, top_p, min_p) in enumerate(filters):
        logits_V, mass_V = logits_NV[n], mass_NV[n]
        if 0 < top_k < vocab or top_p < 1.0:
            order_V = _descending(logits_V)
            if 0 < top_k < vocab:
                mass_V *= logits_V >= logits_V[order_V[top_k - 1]]
            if top_p < 1.0:
                cumulative_V = mass_V[order_V].cumsum(0)
                needed = (cumulative_V[-1].double() * top_p).ceil().to(torch.int64).clamp(min=1)
                last = torch.searchsorted(cumulative_V, needed).clamp(max=vocab - 1)  # the first that reaches it
                mass_V *= logits_V >= logits_V[order_V[last]]
        if min_p > 0.0:
            mass_V *= weight_NV[n] >= min_p
    return mass_NV


def _descending(logits_V: Tensor) -> Tensor:
    """Indices that sort the logits downwards, by their monotone integer image: ten times faster than as floats."""
    bits_V = (logits_V + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    return (~(bits_V ^ ((bits_V >> 31) & 0x7FFFFFFF))).sort().indices


def inverse_cdf(mass_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The first token at which the cumulative mass exceeds uniform / 2**62 of the total; 0 without mass. int32[N]."""
    cumulative_NV = mass_NV.cumsum(dim=1)
    total_N = cumulative_NV[:, -1]
    target_N1 = scale_torch(uniform_N, total_N).unsqueeze(1)
    tokens_N = torch.searchsorted(cumulative_NV, target_N1, right=True).squeeze(1)
    return torch.where(total_N > 0, tokens_N, 0).to(torch.int32)
