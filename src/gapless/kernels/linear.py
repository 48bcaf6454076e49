# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
"""Linear maps of a few tokens, for decode steps: bound by reading the weights, each of them once.

The weights are the tall operand of the product, so 64 or 128 of their rows fill a matrix instruction and the tokens
are its columns. The inputs of a map may be split among programs; the last to arrive adds the parts up in their order,
so equal inputs give equal bits. Before a program waits for the kernel before it, it asks for the first of its weights
to be brought into L2, and reads the residual if the product will take long enough for that to pay: what that kernel's
end leaves idle is spent on reading.

RMSNorm has no kernel of its own between two maps: the first adds to the residual, multiplies it by the norm's weights
and leaves sums of squares behind; the second multiplies its product by what follows from them.

T tokens, I inputs, O outputs, F half of O, P parts of a sum of squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gapless.kernels.dependent import dependent_launch, follow
from gapless.kernels.normed import Normed

LARGEST_TILE = 128  # tokens of a program
MOST_TOKENS = 1024
MOST_TILES = 65536
SHARED_BYTES = 225 * 1024  # of a program, on sm_90
PREFETCH_BYTES = 512  # of a row
EARLY_INPUTS = (
    2048  # of a program, from which on the residual is read early: at 576 that costs 1 us, at 4096 it gains 1
)
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


@triton.jit
def load_squares(
    squares_PT: tl.tensor, parts: tl.tensor, tokens: tl.tensor, token_T: tl.tensor, PARTS: tl.constexpr
) -> tl.tensor:
    """Each token's sums of squares over parts of its numbers."""
    part_P = tl.arange(0, PARTS)
    inside = (part_P < parts)[:, None] & (token_T < tokens)[None, :]
    return tl.load(squares_PT + part_P[:, None] * tokens + token_T[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens", "parts"])
def linear_kernel(
    x_TI: tl.tensor,
    weight_OI: tl.tensor,
    weight_at: tl.tensor,
    bias_O: tl.tensor,
    out_TO: tl.tensor,
    partial: tl.tensor,
    arrived: tl.tensor,
    squares_PT: tl.tensor,
    residual_TO: tl.tensor,
    norm_O: tl.tensor,
    new_squares_PT: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    parts: tl.tensor,
    eps: tl.tensor,
    TOKENS_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """out = x W^T + b, or with ADD residual += x W^T + b and with NORM also out = residual * norm and its squares.

    With EARLY the residual is read before the wait for the kernel before: that one must not write it.
    """
    first_token = tl.program_id(0) * TOKENS_TILE
    tile = tl.program_id(1)
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(inputs, IN_TILE), SPLIT) * IN_TILE
    begin = split * share
    first = tile * OUT_TILE
    out_O = first + tl.arange(0, OUT_TILE)
    token_T = first_token + tl.arange(0, TOKENS_TILE)
    inside = (token_T < tokens)[None, :] & (out_O < outputs)[:, None]
    at = token_T.to(tl.int64)[None, :] * outputs + out_O[:, None]
    if DEPENDENT and PREFETCH:
        prefetch_rows(weight_at + tl.minimum(out_O, outputs - 1).to(tl.int64) * inputs + begin, PREFETCH)
    if ADD and EARLY:
        old_OT = tl.load(residual_TO + at, mask=inside, other=0.0)
    follow(DEPENDENT)
    if NORMED:
        square_PT = load_squares(squares_PT, parts, tokens, token_T, PARTS)
    sum_OT = tl.zeros((OUT_TILE, TOKENS_TILE), tl.float32)
    for start in tl.range(begin, tl.minimum(begin + share, inputs), IN_TILE):
        w_OI = weight_OI.load([first, start])
        x_IT = x_TI.load([first_token, start]).T
        sum_OT = tl.dot(w_OI, x_IT, sum_OT, input_precision="ieee")

    last = True
    if SPLIT > 1:
        PART: tl.constexpr = OUT_TILE * TOKENS_TILE
        place = tile * tl.num_programs(0) + tl.program_id(0)
        parts_at = partial + place.to(tl.int64) * (SPLIT * PART)
        parts_at += tl.arange(0, OUT_TILE)[:, None] * TOKENS_TILE + tl.arange(0, TOKENS_TILE)[None, :]
        tl.store(parts_at + split * PART, sum_OT)
        tl.debug_barrier()  # every thread has stored before one of them says so
        last = tl.atomic_add(arrived + place, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            tl.store(arrived + place, 0)
            sum_OT = tl.zeros((OUT_TILE, TOKENS_TILE), tl.float32)
            for part in tl.static_range(SPLIT):
                sum_OT += tl.load(parts_at + part * PART, cache_modifier=".cg")  # past L1: others wrote these
    if last:
        dtype: tl.constexpr = residual_TO.dtype.element_ty
        if NORMED:
            sum_OT *= tl.rsqrt(tl.sum(square_PT, axis=0) / inputs + eps)[None, :]
        if BIAS:
            sum_OT += tl.load(bias_O + out_O, mask=out_O < outputs, other=0.0).to(tl.float32)[:, None]
        if ADD:
            update_OT = sum_OT.to(dtype).to(tl.float32)  # rounded as if the product had been stored
            if not EARLY:
                old_OT = tl.load(residual_TO + at, mask=inside, other=0.0)
            residual_OT = (old_OT.to(tl.float32) + update_OT).to(dtype)
            tl.store(residual_TO + at, residual_OT, mask=inside)
            if NORM:
                residual_OT = tl.where(inside, residual_OT.to(tl.float32), 0.0)
                square_T = tl.sum(residual_OT * residual_OT, axis=0)
                tl.store(new_squares_PT + tile * tokens + token_T, square_T, mask=token_T < tokens)
                norm = tl.load(norm_O + out_O, mask=out_O < outputs, other=0.0).to(tl.float32)
                tl.store(out_TO + at, (residual_OT * norm[:, None]).to(dtype), mask=inside)
        else:
            tl.store(out_TO + at, sum_OT.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens", "parts"])
def gated_kernel(
    x_TI: tl.tensor,
    weight_OI: tl.tensor,
    weight_at: tl.tensor,
    bias_O: tl.tensor,
    out_TF: tl.tensor,
    squares_PT: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    half: tl.tensor,
    parts: tl.tensor,
    eps: tl.tensor,
    TOKENS_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    PARTS: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """silu(the first half of the outputs) * the second half. OUT_TILE counts both."""
    HALF_TILE: tl.constexpr = OUT_TILE // 2
    first_token = tl.program_id(0) * TOKENS_TILE
    first = tl.program_id(1) * HALF_TILE
    out_F = first + tl.arange(0, HALF_TILE)
    token_T = first_token + tl.arange(0, TOKENS_TILE)
    if DEPENDENT and PREFETCH:
        row_F = tl.minimum(out_F, half - 1).to(tl.int64)
        prefetch_rows(weight_at + row_F * inputs, PREFETCH)
        prefetch_rows(weight_at + (row_F + half) * inputs, PREFETCH)
    follow(DEPENDENT)
    if NORMED:
        square_PT = load_squares(squares_PT, parts, tokens, token_T, PARTS)
    gate_FT = tl.zeros((HALF_TILE, TOKENS_TILE), tl.float32)
    up_FT = tl.zeros((HALF_TILE, TOKENS_TILE), tl.float32)
    for start in tl.range(0, inputs, IN_TILE):
        gate_FI = weight_OI.load([first, start])
        up_FI = weight_OI.load([half + first, start])
        x_IT = x_TI.load([first_token, start]).T
        gate_FT = tl.dot(gate_FI, x_IT, gate_FT, input_precision="ieee")
        up_FT = tl.dot(up_FI, x_IT, up_FT, input_precision="ieee")
    if NORMED:
        inverse_T = tl.rsqrt(tl.sum(square_PT, axis=0) / inputs + eps)
        gate_FT *= inverse_T[None, :]
        up_FT *= inverse_T[None, :]
    if BIAS:
        gate_FT += tl.load(bias_O + out_F, mask=out_F < half, other=0.0).to(tl.float32)[:, None]
        up_FT += tl.load(bias_O + half + out_F, mask=out_F < half, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = out_TF.dtype.element_ty
    gate_FT = gate_FT.to(dtype).to(tl.float32)  # rounded as if the product had been stored
    up_FT = up_FT.to(dtype).to(tl.float32)
    result_FT = gate_FT / (1.0 + tl.exp(-gate_FT)) * up_FT
    inside = (token_T < tokens)[None, :] & (out_F < half)[:, None]
    tl.store(out_TF + token_T.to(tl.int64)[None, :] * half + out_F[:, None], result_FT.to(dtype), mask=inside)


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """How a map is cut up. out_tile rows of the weights at a time, of a gated map half of them from each half; at most
    token_tile tokens."""

    out_tile: int
    in_tile: int
    split: int
    num_stages: int
    token_tile: int = LARGEST_TILE
    num_warps: int = 4

    def tokens(self, tokens: int) -> int:
        """Columns of a program's product: a power of two."""
        return min(self.token_tile, token_class(tokens))

    def share(self, inputs: int) -> int:
        """Inputs of a program."""
        return triton.cdiv(triton.cdiv(inputs, self.in_tile), self.split) * self.in_tile

    def fits(self, tokens: int) -> bool:
        """Whether a program's tiles fit its shared memory, and the tokens are more than a smaller tile of them."""
        in_shared = self.num_stages * (self.out_tile + self.tokens(tokens)) * self.in_tile * _ITEM <= SHARED_BYTES
        return in_shared and (self.token_tile == LARGEST_TILE or self.token_tile < tokens)


CANDIDATES: tuple[LinearTiles, ...] = (
    LinearTiles(64, 128, 1, 5),
    LinearTiles(64, 128, 2, 5),
    LinearTiles(64, 128, 4, 4),
    LinearTiles(128, 128, 1, 3),
    LinearTiles(128, 128, 4, 3),
    LinearTiles(64, 64, 1, 4),
    LinearTiles(64, 64, 3, 4),
    LinearTiles(64, 64, 1, 5, 64),
    LinearTiles(64, 64, 1, 5, 32),
    LinearTiles(64, 128, 2, 4, 64),
)
GATED_CANDIDATES: tuple[LinearTiles, ...] = (
    LinearTiles(128, 128, 1, 4),
    LinearTiles(128, 128, 1, 3),
    LinearTiles(64, 128, 1, 4),
    LinearTiles(64, 64, 1, 4),
    LinearTiles(64, 64, 1, 5, 64),
    LinearTiles(128, 64, 1, 4, 64),
)
ALL_CANDIDATES = {*CANDIDATES, *GATED_CANDIDATES}


def token_class(tokens: int) -> int:
    """Numbers of tokens that share their choice of kernels: up to this power of two."""
    return max(16, triton.next_power_of_2(tokens))


def runs(weight_OI: Tensor, tokens: int) -> bool:
    """Whether these kernels can multiply so many tokens with these weights on the current device."""
    fits = tokens <= MOST_TOKENS and weight_OI.element_size() == _ITEM and weight_OI.is_contiguous()
    return fits and weight_OI.shape[1] % 8 == 0  # rows that bulk copies can begin at


def candidates(*, gated: bool, tokens: int) -> Sequence[LinearTiles]:
    """What is worth trying."""
    return [tiles for tiles in (GATED_CANDIDATES if gated else CANDIDATES) if tiles.fits(tokens)]


def _options(x: Normed, tiles: LinearTiles) -> dict[str, Any]:
    tokens, inputs = x.x_TH.shape
    in_rows = (tiles.split - 1) * tiles.share(inputs) * _ITEM + PREFETCH_BYTES <= inputs * _ITEM
    return {
        "TOKENS_TILE": tiles.tokens(tokens),
        "PARTS": 1 if x.squares is None else triton.next_power_of_2(len(x.squares)),
        "OUT_TILE": tiles.out_tile,
        "IN_TILE": tiles.in_tile,
        "PREFETCH": PREFETCH_BYTES if in_rows else 0,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": True,
        **dependent_launch(),
    }


def _in_tiles(tensor: Tensor, rows: int, tiles: LinearTiles) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.shape[1], 1], [rows, tiles.in_tile])


def _launch(
    x: Normed,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    tiles: LinearTiles,
    arrived: Tensor,
    out_TO: Tensor,
    residual_TO: Tensor | None,
    norm_O: Tensor | None,
) -> Tensor | None:
    """Returns the squares of the residual where it is to be normed."""
    x_TI, (outputs, inputs) = x.x_TH, weight_OI.shape
    tile = tiles.tokens(len(x_TI))
    grid = (triton.cdiv(len(x_TI), tile), triton.cdiv(outputs, tiles.out_tile))
    split = tiles.split if grid[0] * grid[1] <= len(arrived) else 1
    size = grid[0] * grid[1] * split * tiles.out_tile * tile if split > 1 else 0
    partial = torch.empty(size, dtype=torch.float32, device=x_TI.device)
    squares = None
    if norm_O is not None:
        squares = torch.empty((grid[1], len(x_TI)), dtype=torch.float32, device=x_TI.device)
    linear_kernel[*grid, split](
        _in_tiles(x_TI, tile, tiles),
        _in_tiles(weight_OI, tiles.out_tile, tiles),
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        out_TO,
        partial if size else arrived,
        arrived,
        arrived if x.squares is None else x.squares,
        out_TO if residual_TO is None else residual_TO,
        weight_OI if norm_O is None else norm_O,
        arrived if squares is None else squares,
        len(x_TI),
        inputs,
        outputs,
        0 if x.squares is None else len(x.squares),
        x.eps,
        SPLIT=split,
        BIAS=bias_O is not None,
        NORMED=x.squares is not None,
        ADD=residual_TO is not None,
        NORM=norm_O is not None,
        EARLY=tiles.share(inputs) >= EARLY_INPUTS,
        **_options(x, tiles),
    )
    return squares


def linear(x: Normed, weight_OI: Tensor, bias_O: Tensor | None, tiles: LinearTiles, arrived: Tensor) -> Tensor:
    """x W^T + b: [T, I] -> [T, O]. Contiguous bfloat16 or float16, summed in float32; see `runs`.

    arrived  int32 zeros, at least one; with one for each tile of outputs and tokens the inputs are split. Zeros again
             when the work is done. Not for streams that run side by side.
    """
    out_TO = torch.empty((len(x.x_TH), weight_OI.shape[0]), dtype=x.x_TH.dtype, device=x.x_TH.device)
    _launch(x, weight_OI, bias_O, tiles, arrived, out_TO, None, None)
    return out_TO


def add_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor,
    norm_O: Tensor,
    eps: float,
    tiles: LinearTiles,
    arrived: Tensor,
) -> Normed:
    """Add x W^T + b to the residual in place, and return the sum on its way to RMSNorm."""
    out_TO = torch.empty_like(residual_TO)
    squares = _launch(Normed(x_TI), weight_OI, bias_O, tiles, arrived, out_TO, residual_TO, norm_O)
    return Normed(out_TO, squares, eps)


def gated_linear(x: Normed, weight_OI: Tensor, bias_O: Tensor | None, tiles: LinearTiles) -> Tensor:
    """silu(gate) * up, [T, I] -> [T, O / 2], of one product whose first half of outputs is gate and second half up."""
    x_TI, inputs, half = x.x_TH, weight_OI.shape[1], weight_OI.shape[0] // 2
    out_TF = torch.empty((len(x_TI), half), dtype=x_TI.dtype, device=x_TI.device)
    rows, tile = tiles.out_tile // 2, tiles.tokens(len(x_TI))
    gated_kernel[triton.cdiv(len(x_TI), tile), triton.cdiv(half, rows)](
        _in_tiles(x_TI, tile, tiles),
        _in_tiles(weight_OI, rows, tiles),
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        out_TF,
        x_TI if x.squares is None else x.squares,
        len(x_TI),
        inputs,
        half,
        0 if x.squares is None else len(x.squares),
        x.eps,
        BIAS=bias_O is not None,
        NORMED=x.squares is not None,
        **_options(x, tiles),
    )
    return out_TF
