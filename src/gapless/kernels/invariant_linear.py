# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
"""Linear maps with the same bits for a token at any number of tokens.

The inputs of a map are cut into parts, by the shape of the weights alone. Each part is summed from its first input to
its last, and the parts are added up in their order: for few tokens programs of their own sum the parts (linear.py), for
many tokens one program sums them one after the other. How many tokens and outputs a program takes changes which
numbers are worked out together, never the order in which the products of one of them are summed: the matrix
instructions take the same inputs at a time whatever their shape, and nothing else comes between them. That they give
the same bits at all these shapes is what the tests on a GPU show.

T tokens, I inputs, O outputs, F half of O.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gapless.errors import ConfigError
from gapless.kernels.dependent import dependent_launch, follow
from gapless.kernels.linear import LinearTiles, gated_linear, linear
from gapless.kernels.normed import Normed

OUT_TILES = 256  # of 64 outputs, from which on a map is not cut: as many programs keep all multiprocessors busy
FEWER_PROGRAMS = OUT_TILES  # than so many, and the parts of a map get programs of their own
PART_INPUTS = 256  # at least, of a part
ENOUGH_STAGES = 3
SHARED_BYTES = 64 * 1024  # of a program, where no device says how many
_MARGIN = 2048  # bytes of it for barriers


@triton.jit(do_not_specialize=["tokens"])
def whole_linear_kernel(
    x_TI: tl.tensor,
    weight_OI: tl.tensor,
    bias_O: tl.tensor,
    out_TO: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    share: tl.tensor,
    TOKENS_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """out = x W^T + b, all parts of the inputs, of `share` each, in one program."""
    first_token = tl.program_id(0) * TOKENS_TILE
    first = tl.program_id(1) * OUT_TILE
    follow(DEPENDENT)
    sum_OT = tl.zeros((OUT_TILE, TOKENS_TILE), tl.float32)
    for part in tl.range(0, PARTS):
        part_OT = tl.zeros((OUT_TILE, TOKENS_TILE), tl.float32)
        for start in tl.range(part * share, tl.minimum((part + 1) * share, inputs), IN_TILE):
            w_OI = weight_OI.load([first, start])
            x_IT = x_TI.load([first_token, start]).T
            part_OT = tl.dot(w_OI, x_IT, part_OT, input_precision="ieee")
        sum_OT += part_OT
    out_O = first + tl.arange(0, OUT_TILE)
    token_T = first_token + tl.arange(0, TOKENS_TILE)
    if BIAS:
        sum_OT += tl.load(bias_O + out_O, mask=out_O < outputs, other=0.0).to(tl.float32)[:, None]
    inside = (token_T < tokens)[None, :] & (out_O < outputs)[:, None]
    at = token_T.to(tl.int64)[None, :] * outputs + out_O[:, None]
    tl.store(out_TO + at, sum_OT.to(out_TO.dtype.element_ty), mask=inside)


def num_parts(outputs: int, inputs: int) -> int:
    """Into how many parts the inputs of a map are cut."""
    tiles = triton.cdiv(outputs, 64)
    wanted = 1 if tiles >= OUT_TILES else 2 if tiles >= OUT_TILES // 3 else 4
    return min(wanted, max(1, inputs // PART_INPUTS))


def plain_tiles(outputs: int, inputs: int, tokens: int, itemsize: int, shared: int) -> LinearTiles:
    """in_tile and split, which set the parts, are the same for all numbers of tokens. shared: bytes of a program."""
    parts = num_parts(outputs, inputs)
    if itemsize > 2:  # no matrix instruction multiplies float32 as it is
        return LinearTiles(32, 32, parts, 2, token_tile=32)
    in_tile = 128 if shared >= 128 * 1024 else 64
    few = tokens <= 128
    return _staged(LinearTiles(64 if few else 128, in_tile, parts, 4, num_warps=4 if few else 8), tokens, shared)


def gated_tiles(tokens: int, itemsize: int, shared: int) -> LinearTiles:
    """Of a map that is never cut. Each half of out_tile fills a matrix instruction."""
    if itemsize > 2:
        return LinearTiles(64, 32, 1, 2, token_tile=32)
    if tokens <= 128:
        return _staged(LinearTiles(128, 64, 1, 5), tokens, shared)
    return _staged(LinearTiles(256, 64, 1, 4, num_warps=8), tokens, shared)


def _staged(tiles: LinearTiles, tokens: int, shared: int) -> LinearTiles:
    """As many stages as fit twice, if they are enough to hide the memory, or else as many as fit."""
    stage = (tiles.out_tile + tiles.tokens(tokens)) * tiles.in_tile * 2
    twice, once = (max(1, min(tiles.num_stages, size // stage)) for size in (shared // 2 - _MARGIN, shared - _MARGIN))
    return replace(tiles, num_stages=twice if twice >= ENOUGH_STAGES else once)


def invariant_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, arrived: Tensor) -> Tensor:
    """x W^T + b: [T, I] -> [T, O], contiguous, summed in float32.

    arrived  OUT_TILES int32 zeros, zeros again when the work is done. Not for streams that run side by side.

    Raises ConfigError for weights whose rows bulk copies can not begin at.
    """
    (outputs, inputs), tokens = weight_OI.shape, len(x_TI)
    _check(weight_OI)
    tiles = plain_tiles(outputs, inputs, tokens, weight_OI.element_size(), shared_bytes())
    tile = tiles.tokens(tokens)
    grid = (triton.cdiv(tokens, tile), triton.cdiv(outputs, tiles.out_tile))
    if grid[0] * grid[1] < FEWER_PROGRAMS:
        return linear(Normed(x_TI), weight_OI, bias_O, tiles, arrived)
    out_TO = torch.empty((tokens, outputs), dtype=x_TI.dtype, device=x_TI.device)
    whole_linear_kernel[grid](
        TensorDescriptor(x_TI, [tokens, inputs], [inputs, 1], [tile, tiles.in_tile]),
        TensorDescriptor(weight_OI, [outputs, inputs], [inputs, 1], [tiles.out_tile, tiles.in_tile]),
        weight_OI if bias_O is None else bias_O,
        out_TO,
        tokens,
        inputs,
        outputs,
        tiles.share(inputs),
        TOKENS_TILE=tile,
        OUT_TILE=tiles.out_tile,
        IN_TILE=tiles.in_tile,
        PARTS=tiles.split,
        BIAS=bias_O is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
        **dependent_launch(),
    )
    return out_TO


def invariant_gated_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """silu(gate) * up, [T, I] -> [T, F], of one product whose first half of outputs is gate and second half up."""
    _check(weight_OI)
    tiles = gated_tiles(len(x_TI), weight_OI.element_size(), shared_bytes())
    return gated_linear(Normed(x_TI), weight_OI, bias_O, tiles)


def _check(weight_OI: Tensor) -> None:
    inputs, aligned = weight_OI.shape[1], 16 // weight_OI.element_size()
    if inputs % aligned:
        raise ConfigError(f"deterministic needs linear maps whose inputs are a multiple of {aligned}, not {inputs}")


def shared_bytes() -> int:
    """Shared memory that one program may have on the current device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return SHARED_BYTES
    return _shared_of(triton.runtime.driver.active.get_current_device())


@functools.cache
def _shared_of(device: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
