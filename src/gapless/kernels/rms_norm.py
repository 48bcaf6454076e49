# pyright: reportCallIssue=false
"""Residual add and RMSNorm in one pass: one program per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.dependent import dependent_launch, follow


@triton.jit
def add_rms_norm_kernel(
    update_TH: tl.tensor,
    residual_TH: tl.tensor,
    weight_H: tl.tensor,
    out_TH: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64) * HIDDEN
    columns = tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    weight = tl.load(weight_H + columns, mask=inside, other=0.0).to(tl.float32)
    follow(DEPENDENT)
    x = tl.load(residual_TH + token + columns, mask=inside, other=0.0)
    if ADD:
        update = tl.load(update_TH + token + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + update.to(tl.float32)).to(x.dtype)
        tl.store(residual_TH + token + columns, x, mask=inside)
    x32 = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x32 * x32, axis=0) / HIDDEN + eps)
    tl.store(out_TH + token + columns, (x32 * inverse * weight).to(x.dtype), mask=inside)


def add_rms_norm(update_TH: Tensor | None, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See models/layers.py `LayerOps.add_rms_norm`. Inputs are contiguous."""
    num_tokens, hidden = residual_TH.shape
    out_TH = torch.empty_like(residual_TH)
    block = triton.next_power_of_2(hidden)
    add_rms_norm_kernel[(num_tokens,)](
        residual_TH if update_TH is None else update_TH,
        residual_TH,
        weight_H,
        out_TH,
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        ADD=update_TH is not None,
        num_warps=min(max(block // 512, 1), 16),
        enable_fp_fusion=True,
        **dependent_launch(),
    )
    return out_TH
