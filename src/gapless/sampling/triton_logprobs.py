"""Logprobs as two Triton kernels, see logprobs.py for what: some programs per line, tile by tile, then one per line.

A line that asks for nothing costs two early exits. The kernels allocate only scratch and output and never wait, so
they are safe under graphs. Ids and ranks are those of the reference; a logprob is within rounding of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from gapless.kernels.dependent import dependent_launch
from gapless.sampling import logprob_kernels
from gapless.sampling.logprobs import Logprobs, check_lines

_kernels: Any = logprob_kernels  # Triton's functions are launched with values where their signatures say constexpr
MIN_BLOCK = 16


@dataclass(frozen=True, slots=True)
class LogprobTiles:
    """How the work is cut up."""

    block: int = 2048  # logits of a tile; a power of two
    programs: int = 2048  # for a whole batch; each line has at least one
    tile_warps: int = 4
    merge_warps: int = 8

    def constants(self, vocab: int) -> dict[str, int]:
        """What the kernels are compiled for: at least two tiles, since Triton 3.6 can not compile for one."""
        block = min(self.block, max(MIN_BLOCK, triton.next_power_of_2(vocab) // 2))
        return {"VOCAB": vocab, "BLOCK": block, "TILES": max(2, triton.next_power_of_2(triton.cdiv(vocab, block)))}


def logprobs(
    lines_LV: Tensor,
    targets_L: Tensor,
    wanted_L: Tensor,
    out: Logprobs | None = None,
    tiles: LogprobTiles | None = None,
) -> Logprobs:
    """As torch_logprobs.logprobs."""
    check_lines(lines_LV, targets_L, wanted_L)
    lines, vocab = lines_LV.shape
    device = lines_LV.device
    out = out or Logprobs.allocate(lines, device)
    if not lines:
        return out
    tiles = tiles or LogprobTiles()
    constants = tiles.constants(vocab)
    padded = constants["TILES"]
    best_LT = torch.empty(lines, padded, dtype=torch.int64, device=device)
    total_LT = torch.empty(lines, padded, dtype=torch.float32, device=device)
    ahead_LT = torch.empty(lines, padded, dtype=torch.int32, device=device)
    asked = (lines_LV, lines_LV.stride(0), targets_L, wanted_L)
    scratch = (best_LT, total_LT, ahead_LT)
    options = {**constants, "LARGEST": torch.finfo(lines_LV.dtype).max, "enable_fp_fusion": False, **dependent_launch()}
    parts = min(triton.cdiv(vocab, constants["BLOCK"]), max(1, tiles.programs // lines))
    _kernels.tile_logprobs_kernel[(lines, parts)](*asked, *scratch, **options, num_warps=tiles.tile_warps)
    _kernels.merge_logprobs_kernel[(lines,)](
        *asked, *scratch, out.ids_LK, out.logprobs_LK, out.ranks_L, **options, num_warps=tiles.merge_warps
    )
    return out
