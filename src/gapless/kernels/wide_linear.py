# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportReturnType=false, reportPrivateUsage=false
"""Linear maps of hundreds of tokens with few inputs, for decode steps of small models on Hopper, written in Gluon.

Such a map takes a few microseconds, most of them waits: for the kernel before, for the first bytes, for the residual.
So a program copies its weights into shared memory before it waits for the kernel before it, as many stages of them as
there are; when that one has ended, it asks for all its inputs and for the residual at once, and multiplies. What it
makes leaves through shared memory in bulk copies.

The maps are those of linear.py, with the same norms in them. T tokens, I inputs, O outputs, F half of O, P parts of a
sum of squares.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from gapless.kernels.dependent import dependent_launch
from gapless.kernels.normed import Normed
from gapless.kernels.wide_tiles import IN_TILE, ITEM, WideTiles

# By their names in Triton 3.6, or in the versions behind it. Not as constexpr: its text would hold an address, and the
# kernel would be compiled again in every process.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
all_threads = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit(do_not_specialize=["tokens", "parts"])
def wide_kernel(
    x_TI: gl.tensor,
    weight_HOI: gl.tensor,
    out_TO: gl.tensor,
    residual_TO: gl.tensor,
    bias_O: gl.tensor,
    norm_O: gl.tensor,
    squares_PT: gl.tensor,
    new_squares_PT: gl.tensor,
    tokens: gl.tensor,
    outputs: gl.tensor,
    parts: gl.tensor,
    eps: gl.tensor,
    INPUTS: gl.constexpr,
    TOKEN_TILE: gl.constexpr,
    OUT_TILE: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    BIAS: gl.constexpr,
    NORMED: gl.constexpr,
    ADD: gl.constexpr,
    PARTS: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
) -> None:
    """out = x W^T + b, or with ADD residual += x W^T + b, out = residual * norm, and its squares, or with GATED
    silu(the first half of the outputs) * the second half. OUT_TILE counts outputs of one half."""
    IN_TILE: gl.constexpr = x_TI.block_type.shape[1]
    STEPS: gl.constexpr = (INPUTS + IN_TILE - 1) // IN_TILE
    HALVES: gl.constexpr = 2 if GATED else 1
    dtype: gl.constexpr = x_TI.dtype
    BYTES: gl.constexpr = (HALVES * OUT_TILE + TOKEN_TILE) * IN_TILE * 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, OUT_TILE, 16])
    token_layout: gl.constexpr = gl.SliceLayout(1, layout)
    out_layout: gl.constexpr = gl.SliceLayout(0, layout)

    first_token = gl.program_id(0) * TOKEN_TILE
    tile = gl.program_id(1)
    first = tile * OUT_TILE
    # One allocation for each tile and barrier, not one with an index: the compiler sees that they have nothing to do
    # with each other, and puts no barrier of all threads between them.
    w_S, x_S, ready_S = (), (), ()
    for _ in gl.static_range(STAGES):
        w_S += (gl.allocate_shared_memory(dtype, [HALVES, OUT_TILE, IN_TILE], weight_HOI.layout),)
        x_S += (gl.allocate_shared_memory(dtype, [TOKEN_TILE, IN_TILE], x_TI.layout),)
        ready_S += (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
    out_smem = gl.allocate_shared_memory(dtype, [TOKEN_TILE, OUT_TILE], out_TO.layout)
    residual_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready_S[stage], count=1)
    mbarrier.init(residual_ready, count=1)
    fence_async_shared()  # copies see the barriers
    for stage in gl.static_range(STAGES):
        mbarrier.expect(ready_S[stage], BYTES)
    if ADD:
        mbarrier.expect(residual_ready, TOKEN_TILE * OUT_TILE * 2)
    for stage in gl.static_range(STAGES):
        load_tile(weight_HOI, [0, first, stage * IN_TILE], ready_S[stage], w_S[stage])
    if DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    for stage in gl.static_range(STAGES):
        load_tile(x_TI, [first_token, stage * IN_TILE], ready_S[stage], x_S[stage])
    if ADD:
        load_tile(residual_TO, [first_token, first], residual_ready, out_smem)
    token_T = first_token + gl.arange(0, TOKEN_TILE, token_layout)
    out_O = first + gl.arange(0, OUT_TILE, out_layout)
    if NORMED:
        square_T = gl.zeros([TOKEN_TILE], gl.float32, token_layout)
        for part in gl.static_range(PARTS):
            inside_T = (token_T < tokens) & (part < parts)
            square_T += gl.load(squares_PT + part * tokens + token_T, mask=inside_T, other=0.0)
        inverse_T = gl.rsqrt(square_T / INPUTS + eps)
    if BIAS:
        bias = gl.load(bias_O + out_O, mask=out_O < outputs, other=0.0).to(gl.float32)
        if GATED:
            up_bias = gl.load(bias_O + outputs + out_O, mask=out_O < outputs, other=0.0).to(gl.float32)
    if ADD:
        norm = gl.load(norm_O + out_O, mask=out_O < outputs, other=0.0).to(gl.float32)

    sum_ = gl.zeros([TOKEN_TILE, OUT_TILE], gl.float32, layout)
    up = sum_
    for step in gl.static_range(STEPS):
        mbarrier.wait(ready_S[step % STAGES], (step // STAGES) & 1)
        x_tile = x_S[step % STAGES]
        w_tile = w_S[step % STAGES].reshape([HALVES * OUT_TILE, IN_TILE])
        sum_ = warpgroup_mma(x_tile, w_tile.slice(0, OUT_TILE).permute((1, 0)), sum_, is_async=True)
        if GATED:
            up = warpgroup_mma(x_tile, w_tile.slice(OUT_TILE, OUT_TILE).permute((1, 0)), up, is_async=True)
        if step >= 1 and step - 1 + STAGES < STEPS:  # the product before is done: refill its stage
            if GATED:
                sum_, up = warpgroup_mma_wait(HALVES, deps=(sum_, up))
            else:
                sum_ = warpgroup_mma_wait(HALVES, deps=(sum_,))
            all_threads()
            start = (step - 1 + STAGES) * IN_TILE
            ready = ready_S[(step - 1) % STAGES]
            mbarrier.expect(ready, BYTES)
            load_tile(weight_HOI, [0, first, start], ready, w_S[(step - 1) % STAGES])
            load_tile(x_TI, [first_token, start], ready, x_S[(step - 1) % STAGES])
    if GATED:
        sum_, up = warpgroup_mma_wait(0, deps=(sum_, up))
    else:
        sum_ = warpgroup_mma_wait(0, deps=(sum_,))

    if NORMED:
        sum_ *= inverse_T[:, None]
        if GATED:
            up *= inverse_T[:, None]
    if BIAS:
        sum_ += bias[None, :]
        if GATED:
            up += up_bias[None, :]
    made = sum_.to(dtype)
    if GATED:
        gate = made.to(gl.float32)  # rounded as if the product had been stored
        made = (gate / (1.0 + gl.exp(-gate)) * up.to(dtype).to(gl.float32)).to(dtype)
    if ADD:
        mbarrier.wait(residual_ready, 0)
        before = out_smem.load(layout).to(gl.float32)
        made = (before + made.to(gl.float32)).to(dtype)
        all_threads()
    out_smem.store(made)
    fence_async_shared()
    all_threads()
    if ADD:
        store_tile(residual_TO, [first_token, first], out_smem)
        wide = made.to(gl.float32)
        normed_smem = gl.allocate_shared_memory(dtype, [TOKEN_TILE, OUT_TILE], out_TO.layout)
        normed_smem.store((wide * norm[None, :]).to(dtype))
        fence_async_shared()
        all_threads()
        store_tile(out_TO, [first_token, first], normed_smem)
        square_T = gl.sum(wide * wide, axis=1)
        gl.store(new_squares_PT + tile * tokens + token_T, square_T, mask=token_T < tokens)
        tma.store_wait(0)
        normed_smem._keep_alive()
    else:
        store_tile(out_TO, [first_token, first], out_smem)
        tma.store_wait(0)
    # The compiler would give a tile's memory away behind the last line that names it, while it is still being copied.
    out_smem._keep_alive()


def _descriptor(tensor: Tensor, *tile: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(min(tile[-1] * ITEM, 128), 8 * ITEM, len(tile))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(tile), layout)


def _launch(
    x: Normed,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    tiles: WideTiles,
    out_TO: Tensor,
    residual_TO: Tensor | None = None,
    norm_O: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor | None:
    """Returns the squares of the residual where it is to be normed."""
    x_TI, (tokens, inputs), outputs = x.x_TH, x.x_TH.shape, out_TO.shape[1]
    grid = (triton.cdiv(tokens, tiles.token_tile), triton.cdiv(outputs, tiles.out_tile))
    out_desc = _descriptor(out_TO, tiles.token_tile, tiles.out_tile)
    halves = 2 if gated else 1
    squares = None
    if norm_O is not None:
        squares = torch.empty((grid[1], tokens), dtype=torch.float32, device=x_TI.device)
    wide_kernel[grid](
        _descriptor(x_TI, tiles.token_tile, IN_TILE),
        _descriptor(weight_OI.view(halves, outputs, inputs), halves, tiles.out_tile, IN_TILE),
        out_desc,
        out_desc if residual_TO is None else _descriptor(residual_TO, tiles.token_tile, tiles.out_tile),
        weight_OI if bias_O is None else bias_O,
        weight_OI if norm_O is None else norm_O,
        x_TI if x.squares is None else x.squares,
        x_TI if squares is None else squares,
        tokens,
        outputs,
        0 if x.squares is None else len(x.squares),
        x.eps,
        INPUTS=inputs,
        TOKEN_TILE=tiles.token_tile,
        OUT_TILE=tiles.out_tile,
        STAGES=tiles.used_stages(inputs),
        GATED=gated,
        BIAS=bias_O is not None,
        NORMED=x.squares is not None,
        ADD=residual_TO is not None,
        PARTS=1 if x.squares is None else triton.next_power_of_2(len(x.squares)),
        num_warps=tiles.num_warps,
        enable_fp_fusion=True,
        **dependent_launch(),
    )
    return squares


def wide_linear(x: Normed, weight_OI: Tensor, bias_O: Tensor | None, tiles: WideTiles) -> Tensor:
    """x W^T + b: [T, I] -> [T, O]. Contiguous bfloat16 or float16, summed in float32."""
    out_TO = torch.empty((len(x.x_TH), weight_OI.shape[0]), dtype=x.x_TH.dtype, device=x.x_TH.device)
    _launch(x, weight_OI, bias_O, tiles, out_TO)
    return out_TO


def wide_add_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    residual_TO: Tensor,
    norm_O: Tensor,
    eps: float,
    tiles: WideTiles,
) -> Normed:
    """Add x W^T + b to the residual in place, and return the sum on its way to RMSNorm."""
    out_TO = torch.empty_like(residual_TO)
    squares = _launch(Normed(x_TI), weight_OI, bias_O, tiles, out_TO, residual_TO, norm_O)
    return Normed(out_TO, squares, eps)


def wide_gated_linear(x: Normed, weight_OI: Tensor, bias_O: Tensor | None, tiles: WideTiles) -> Tensor:
    """silu(gate) * up, [T, I] -> [T, O / 2], of one product whose first half of outputs is gate and second half up."""
    out_TF = torch.empty((len(x.x_TH), weight_OI.shape[0] // 2), dtype=x.x_TH.dtype, device=x.x_TH.device)
    _launch(x, weight_OI, bias_O, tiles, out_TF, gated=True)
    return out_TF
