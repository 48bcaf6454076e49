# pyright: reportCallIssue=false
"""silu(gate) * up of a fused gate/up product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.dependent import dependent_launch, follow

BLOCK = 1024


@triton.jit
def silu_mul_kernel(
    gate_up_TF2: tl.tensor, out_TF: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
) -> None:
    follow(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_at = gate_up_TF2 + token * (2 * WIDTH) + columns
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=inside, other=0.0)
    out = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out_TF + token * WIDTH + columns, out.to(up.dtype), mask=inside)


def silu_mul(gate_up_TF2: Tensor) -> Tensor:
    """silu(first half) * second half: contiguous [T, 2 F] -> [T, F]."""
    num_tokens, width = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty((num_tokens, width), dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    silu_mul_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
        gate_up_TF2, out_TF, WIDTH=width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True, **dependent_launch()
    )
    return out_TF
