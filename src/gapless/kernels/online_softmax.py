"""The step that attention kernels share: take one more tile of scores and values into a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # scores are kept in base 2, where the hardware has its exponential


@triton.jit
def fold_tile(
    score_MN: tl.tensor, v_ND: tl.tensor, largest_M: tl.tensor, total_M: tl.tensor, sum_MD: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns the new (largest_M, total_M, sum_MD). Every row has seen at least one score above -inf by now."""
    new_largest_M = tl.maximum(largest_M, tl.max(score_MN, axis=1))
    weight_MN = tl.exp2(score_MN - new_largest_M[:, None])
    shrink_M = tl.exp2(largest_M - new_largest_M)
    total_M = total_M * shrink_M + tl.sum(weight_MN, axis=1)
    sum_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, sum_MD * shrink_M[:, None], input_precision="ieee")
    return new_largest_M, total_M, sum_MD
