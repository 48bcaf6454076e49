"""Logprobs in plain torch: it defines the answer on any device. Reads values on the host: for CPUs, and for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from gapless.sampling.base import clean_logits
from gapless.sampling.features import MAX_LOGPROBS
from gapless.sampling.logprobs import Logprobs, check_lines


def logprobs(lines_LV: Tensor, targets_L: Tensor, wanted_L: Tensor, out: Logprobs | None = None) -> Logprobs:
    """Logprobs of each line's target and of its likeliest tokens, see logprobs.py.

    lines_LV   fp32, bf16 or fp16 logits, not written to; the vocabulary is contiguous.
    targets_L  int32: token ids, those sampled or those that the prompt has; any other number: no token.
    wanted_L   int32: how many of the likeliest, up to MAX_LOGPROBS; 0: the target alone; -1: nothing.
    out        where to write.
    """
    check_lines(lines_LV, targets_L, wanted_L)
    lines, vocab = lines_LV.shape
    out = out or Logprobs.allocate(lines, lines_LV.device)
    out.ids_LK.fill_(-1)
    out.logprobs_LK.fill_(-torch.inf)
    out.ranks_L.zero_()
    for line, (target, wanted) in enumerate(zip(targets_L.tolist(), wanted_L.tolist(), strict=True)):
        if wanted < 0:
            continue
        x_V = clean_logits(lines_LV[line])
        logprobs_V = torch.where(x_V == -torch.inf, x_V, x_V.log_softmax(dim=0))
        best = likeliest(x_V, min(wanted, MAX_LOGPROBS, vocab))
        out.ids_LK[line, 1 : 1 + len(best)] = best
        out.logprobs_LK[line, 1 : 1 + len(best)] = logprobs_V[best]
        if 0 <= target < vocab:
            out.ids_LK[line, 0] = target
            out.logprobs_LK[line, 0] = logprobs_V[target]
            out.ranks_L[line] = 1 + (x_V > x_V[target]).sum() + (x_V[:target] == x_V[target]).sum()
    return out


def likeliest(x_V: Tensor, count: int) -> Tensor:
    """Ids of the largest logits, the lower id first among equals."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=x_V.device)
    candidates = torch.arange(len(x_V), device=x_V.device)[x_V >= x_V.topk(count).values[-1]]
    return candidates[x_V[candidates].sort(descending=True, stable=True).indices[:count]]
