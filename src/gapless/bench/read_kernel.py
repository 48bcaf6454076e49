# pyright: reportCallIssue=false
"""A Triton kernel that reads memory and does as little as possible with it: the read bandwidth of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = ((4096, 8, 8), (8192, 8, 8), (8192, 16, 16), (16384, 4, 16))
"""(elements of a tile, tiles of a program, warps); which one is fastest differs between GPUs."""


@triton.jit
def read_kernel(data_X: tl.tensor, sums_P: tl.tensor, TILE: tl.constexpr, TILES: tl.constexpr) -> None:
    """Each program adds up TILES neighbouring tiles; integers wrap around."""
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.int32)
    for tile in range(TILES):
        total += tl.load(data_X + (program * TILES + tile) * TILE + lanes)
    tl.store(sums_P + program, tl.sum(total))


def readers(data_X: Tensor) -> Sequence[Callable[[], Tensor]]:
    """Ways to read int32[X], where X is a multiple of every program's share. Each returns the sum of each program."""
    return [partial(_read, data_X, *tiles) for tiles in TILES]


def _read(data_X: Tensor, tile: int, tiles: int, warps: int) -> Tensor:
    programs = data_X.numel() // (tile * tiles)
    sums_P = torch.empty(programs, dtype=torch.int32, device=data_X.device)
    read_kernel[(programs,)](data_X, sums_P, TILE=tile, TILES=tiles, num_warps=warps, enable_fp_fusion=True)
    return sums_P
