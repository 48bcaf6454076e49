# pyright: reportAttributeAccessIssue=false
"""How the maps of wide_linear.py are cut up, and where that runs; without Gluon, which is still an experiment."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import triton

from gapless.kernels.dependent import nvidia_arch

IN_TILE = 64  # inputs of a stage: 128 bytes, the widest swizzle
ITEM = 2  # bytes of bfloat16 and float16
SHARED_BYTES = 226 * 1024
FEWEST_TOKENS = 128
MOST_INPUTS = 2048  # the steps are unrolled: more inputs take longer to compile
ALONE_INPUTS = 1536  # up to so many, nothing else of ours was ever faster, and is not tried: compiling takes its time
WGMMA_ARCH = 90  # sm_90 alone has these matrix instructions
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WideTiles:
    """A program's tokens, outputs (of a gated map as many of each half), and stages of IN_TILE inputs at a time."""

    token_tile: int
    out_tile: int
    stages: int

    @property
    def num_warps(self) -> int:
        """Each four multiply 64 tokens."""
        return self.token_tile // 16

    def used_stages(self, inputs: int) -> int:
        return min(self.stages, triton.cdiv(inputs, IN_TILE))

    def fits(self, inputs: int, *, gated: bool) -> bool:
        """Whether a program's tiles fit its shared memory."""
        rows = self.token_tile + self.out_tile * (2 if gated else 1)
        elements = self.used_stages(inputs) * rows * IN_TILE + self.token_tile * self.out_tile
        return elements * ITEM + 1024 <= SHARED_BYTES


WIDE_CANDIDATES: tuple[WideTiles, ...] = (
    WideTiles(64, 32, 16),
    WideTiles(64, 64, 12),
    WideTiles(64, 64, 6),
)
GATED_WIDE_CANDIDATES: tuple[WideTiles, ...] = (
    WideTiles(64, 64, 9),
    WideTiles(64, 64, 4),
)
ALL_WIDE_CANDIDATES = {*WIDE_CANDIDATES, *GATED_WIDE_CANDIDATES}


def wide_candidates(*, outputs: int, inputs: int, gated: bool, tokens: int) -> Sequence[WideTiles]:
    """What is worth trying."""
    rows_begin_aligned = outputs // (2 if gated else 1) % 8 == 0  # where bulk copies can begin
    if tokens < FEWEST_TOKENS or inputs > MOST_INPUTS or not rows_begin_aligned:
        return []
    tried = GATED_WIDE_CANDIDATES if gated else WIDE_CANDIDATES
    return [tiles for tiles in tried if tiles.fits(inputs, gated=gated)]


def runs_wide() -> bool:
    """Whether the current device has Hopper's matrix instructions, and this Triton the Gluon that the kernels need."""
    if nvidia_arch() != WGMMA_ARCH:
        return False
    try:
        import gapless.kernels.wide_linear  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except (ImportError, AttributeError) as error:
        _log.warning("wide linear maps need another Triton: %s", error)
        return False
    return True
