# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
"""Linear maps of a few tokens, for decode steps: bound by reading the weights, each of them once.

The weights are the tall operand of the product, so 64 or 128 of their rows fill a matrix instruction and the tokens
are its columns. The inputs of a map may be split among programs; the last to arrive adds the parts up in their order,
so equal inputs give equal bits. Before a program waits for the kernel before it, it asks for the first of its weights
to be brought into L2: what that kernel's end leaves idle is spent on reading.

T tokens, I inputs, O outputs, F half of O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda
from triton.tools.tensor_descriptor import TensorDescriptor

from gapless.kernels.dependent import dependent_launch

MOST_TOKENS = 128
MOST_TILES = 65536
SHARED_BYTES = 225 * 1024  # of a program, on sm_90
PREFETCH_STEP = 512  # bytes of a row
_ITEM = 2  # bytes of bfloat16 and float16


@triton.jit
def prefetch_rows(row_at_O: tl.tensor, BYTES: tl.constexpr) -> None:
    """Ask for the first bytes of some rows to be brought into L2."""
    for at in tl.static_range(0, BYTES, 512):
        tl.inline_asm_elementwise(
            "{ cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0; }",
            "=r,l",
            [row_at_O + at // 2],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    x_TI: tl.tensor,
    weight_OI: tl.tensor,
    weight_at: tl.tensor,
    bias_O: tl.tensor,
    out_TO: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    TOKENS_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(inputs, IN_TILE), SPLIT) * IN_TILE
    begin = split * share
    first = tile * OUT_TILE
    out_O = first + tl.arange(0, OUT_TILE)
    if DEPENDENT:
        cuda.gdc_launch_dependents()
        if PREFETCH:
            prefetch_rows(weight_at + tl.minimum(out_O, outputs - 1).to(tl.int64) * inputs + begin, PREFETCH)
        cuda.gdc_wait()
    sum_OT = tl.zeros((OUT_TILE, TOKENS_TILE), tl.float32)
    for start in tl.range(begin, tl.minimum(begin + share, inputs), IN_TILE):
        w_OI = weight_OI.load([first, start])
        x_IT = x_TI.load([0, start]).T
        sum_OT = tl.dot(w_OI, x_IT, sum_OT, input_precision="ieee")

    token_T = tl.arange(0, TOKENS_TILE)
    last = True
    if SPLIT > 1:
        PART: tl.constexpr = OUT_TILE * TOKENS_TILE
        parts_at = partial + tile.to(tl.int64) * (SPLIT * PART)
        parts_at += tl.arange(0, OUT_TILE)[:, None] * TOKENS_TILE + token_T[None, :]
        tl.store(parts_at + split * PART, sum_OT)
        tl.debug_barrier()  # every thread has stored before one of them says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            tl.store(arrived + tile, 0)
            sum_OT = tl.zeros((OUT_TILE, TOKENS_TILE), tl.float32)
            for part in tl.static_range(SPLIT):
                sum_OT += tl.load(parts_at + part * PART, cache_modifier=".cg")  # past L1: others wrote these
    if last:
        if BIAS:
            sum_OT += tl.load(bias_O + out_O, mask=out_O < outputs, other=0.0).to(tl.float32)[:, None]
        out_at = out_TO + token_T.to(tl.int64)[None, :] * outputs + out_O[:, None]
        inside = (token_T < tokens)[None, :] & (out_O < outputs)[:, None]
        tl.store(out_at, sum_OT.to(out_TO.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def gated_kernel(
    x_TI: tl.tensor,
    weight_OI: tl.tensor,
    weight_at: tl.tensor,
    bias_O: tl.tensor,
    out_TF: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    half: tl.tensor,
    TOKENS_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    BIAS: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """silu(the first half of the outputs) * the second half. OUT_TILE counts both."""
    HALF_TILE: tl.constexpr = OUT_TILE // 2
    first = tl.program_id(0) * HALF_TILE
    out_F = first + tl.arange(0, HALF_TILE)
    if DEPENDENT:
        cuda.gdc_launch_dependents()
        if PREFETCH:
            row_F = tl.minimum(out_F, half - 1).to(tl.int64)
            prefetch_rows(weight_at + row_F * inputs, PREFETCH)
            prefetch_rows(weight_at + (row_F + half) * inputs, PREFETCH)
        cuda.gdc_wait()
    gate_FT = tl.zeros((HALF_TILE, TOKENS_TILE), tl.float32)
    up_FT = tl.zeros((HALF_TILE, TOKENS_TILE), tl.float32)
    for start in tl.range(0, inputs, IN_TILE):
        gate_FI = weight_OI.load([first, start])
        up_FI = weight_OI.load([half + first, start])
        x_IT = x_TI.load([0, start]).T
        gate_FT = tl.dot(gate_FI, x_IT, gate_FT, input_precision="ieee")
        up_FT = tl.dot(up_FI, x_IT, up_FT, input_precision="ieee")
    if BIAS:
        gate_FT += tl.load(bias_O + out_F, mask=out_F < half, other=0.0).to(tl.float32)[:, None]
        up_FT += tl.load(bias_O + half + out_F, mask=out_F < half, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = out_TF.dtype.element_ty
    gate_FT = gate_FT.to(dtype).to(tl.float32)  # rounded as if the product had been stored
    up_FT = up_FT.to(dtype).to(tl.float32)
    result_FT = gate_FT / (1.0 + tl.exp(-gate_FT)) * up_FT
    token_T = tl.arange(0, TOKENS_TILE)
    inside = (token_T < tokens)[None, :] & (out_F < half)[:, None]
    tl.store(out_TF + token_T.to(tl.int64)[None, :] * half + out_F[:, None], result_FT.to(dtype), mask=inside)


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """How a map is cut up. out_tile rows of the weights at a time, of a gated map half of them from each half."""

    out_tile: int
    in_tile: int
    split: int
    num_stages: int
    num_warps: int = 4

    def fits(self, tokens: int) -> bool:
        """Whether a program's tiles fit its shared memory."""
        return self.num_stages * (self.out_tile + tokens_tile(tokens)) * self.in_tile * _ITEM <= SHARED_BYTES


CANDIDATES: tuple[LinearTiles, ...] = (
    LinearTiles(64, 128, 1, 5),
    LinearTiles(64, 128, 2, 5),
    LinearTiles(64, 128, 4, 4),
    LinearTiles(128, 128, 1, 3),
    LinearTiles(128, 128, 4, 3),
    LinearTiles(64, 64, 1, 4),
    LinearTiles(64, 64, 3, 4),
)
GATED_CANDIDATES: tuple[LinearTiles, ...] = (
    LinearTiles(128, 128, 1, 4),
    LinearTiles(128, 128, 1, 3),
    LinearTiles(64, 128, 1, 4),
    LinearTiles(64, 64, 1, 4),
)
ALL_CANDIDATES = {*CANDIDATES, *GATED_CANDIDATES}


def tokens_tile(tokens: int) -> int:
    """Columns of the product: a power of two."""
    return max(16, triton.next_power_of_2(tokens))


def runs(weight_OI: Tensor, tokens: int) -> bool:
    """Whether these kernels can multiply so many tokens with these weights on the current device."""
    fits = tokens <= MOST_TOKENS and weight_OI.element_size() == _ITEM and weight_OI.is_contiguous()
    return fits and weight_OI.shape[1] % 8 == 0  # rows that bulk copies can begin at


def _arguments(x_TI: Tensor, weight_OI: Tensor, rows: int, tiles: LinearTiles) -> tuple[Any, Any, Tensor]:
    width = x_TI.shape[1]
    x_tiles = TensorDescriptor(x_TI, list(x_TI.shape), [width, 1], [tokens_tile(len(x_TI)), tiles.in_tile])
    weight_tiles = TensorDescriptor(weight_OI, list(weight_OI.shape), [width, 1], [rows, tiles.in_tile])
    return x_tiles, weight_tiles, weight_OI


def _options(tokens: int, inputs: int, tiles: LinearTiles, bias: bool) -> dict[str, Any]:
    share = triton.cdiv(triton.cdiv(inputs, tiles.in_tile), tiles.split) * tiles.in_tile
    in_rows = (tiles.split - 1) * share * _ITEM + PREFETCH_STEP <= inputs * _ITEM
    return {
        "TOKENS_TILE": tokens_tile(tokens),
        "OUT_TILE": tiles.out_tile,
        "IN_TILE": tiles.in_tile,
        "BIAS": bias,
        "PREFETCH": PREFETCH_STEP if in_rows else 0,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": True,
        **dependent_launch(),
    }


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tiles: LinearTiles, arrived: Tensor) -> Tensor:
    """x W^T + b: [T, I] -> [T, O]. Contiguous bfloat16 or float16, summed in float32; see `runs`.

    arrived: int32 zeros, MOST_TILES at most; zeros again when the work is done. Not for streams that run side by side.
    """
    tokens, (outputs, inputs) = len(x_TI), weight_OI.shape
    out_TO = torch.empty((tokens, outputs), dtype=x_TI.dtype, device=x_TI.device)
    num_tiles = triton.cdiv(outputs, tiles.out_tile)
    split = tiles.split if num_tiles <= len(arrived) else 1
    size = num_tiles * split * tiles.out_tile * tokens_tile(tokens) if split > 1 else 0
    partial = torch.empty(size, dtype=torch.float32, device=x_TI.device)
    linear_kernel[(num_tiles, split)](
        *_arguments(x_TI, weight_OI, tiles.out_tile, tiles),
        weight_OI if bias_O is None else bias_O,
        out_TO,
        partial if size else arrived,
        arrived,
        tokens,
        inputs,
        outputs,
        SPLIT=split,
        **_options(tokens, inputs, tiles, bias_O is not None),
    )
    return out_TO


def gated_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tiles: LinearTiles) -> Tensor:
    """silu(gate) * up, [T, I] -> [T, O / 2], of one product whose first half of outputs is gate and second half up."""
    tokens, (outputs, inputs) = len(x_TI), weight_OI.shape
    half = outputs // 2
    out_TF = torch.empty((tokens, half), dtype=x_TI.dtype, device=x_TI.device)
    gated_kernel[(triton.cdiv(half, tiles.out_tile // 2),)](
        *_arguments(x_TI, weight_OI, tiles.out_tile // 2, tiles),
        weight_OI if bias_O is None else bias_O,
        out_TF,
        tokens,
        inputs,
        half,
        **_options(tokens, inputs, tiles, bias_O is not None),
    )
    return out_TF


def candidates(*, gated: bool, tokens: int) -> Sequence[LinearTiles]:
    """What is worth trying."""
    return [tiles for tiles in (GATED_CANDIDATES if gated else CANDIDATES) if tiles.fits(tokens)]
