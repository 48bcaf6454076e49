"""The kernels of deterministic mode compile for every architecture, and fit its shared memory, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gapless.kernels.invariant_attention import (  # noqa: E402
    SPAN,
    invariant_attention_kernel,
    invariant_tiles,
    merge_spans_kernel,
)
from gapless.kernels.invariant_linear import gated_tiles, plain_tiles, whole_linear_kernel  # noqa: E402
from gapless.kernels.linear import LinearTiles, gated_kernel, linear_kernel  # noqa: E402
from support.effort import and_thoroughly  # noqa: E402

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    binary: str
    shared_memory: int  # bytes that one program may have

    @property
    def hopper(self) -> bool:
        return self.gpu.arch == 90


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "cubin", 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "cubin", 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "hsaco", 64 * 1024),
}
INTS = ("rows_E", "kv_len_E", "query_start_E1", "block_table_RC", "positions_T", "arrived")
FLOATS = ("sum_TNUD", "largest_TNU", "total_TNU", "partial", "squares_PT", "new_squares_PT")
SCALARS = ("table_stride", "num_entries", "spans", "tokens", "inputs", "outputs", "half", "parts", "share")
TYPES = {
    **dict.fromkeys(INTS, "*i32"),
    **dict.fromkeys(FLOATS, "*fp32"),
    **dict.fromkeys(SCALARS, "i32"),
    **dict.fromkeys(("scale_log2", "eps"), "fp32"),
}
Constants = dict[str, int | bool]


def check(target: Target, kernel: Any, constants: Constants, *, fusion: bool, num_warps: int, num_stages: int) -> Any:
    """The compiled kernel."""
    constants = {**constants, "DEPENDENT": target.hopper}
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "*bf16") for name in names}
    if "IN_TILE" in constants:
        rows = constants["OUT_TILE"] // (2 if kernel is gated_kernel else 1)
        signature["x_TI"] = f"tensordesc<bf16[{constants['TOKENS_TILE']},{constants['IN_TILE']}]>"
        signature["weight_OI"] = f"tensordesc<bf16[{rows},{constants['IN_TILE']}]>"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in ("table_stride", "inputs", "outputs", "share")
    }
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fusion}
    launch = {"launch_pdl": True} if target.hopper else {}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled: Any = triton.compile(source, target=target.gpu, options={**options, **launch})
    assert compiled.asm[target.binary]
    assert compiled.metadata.shared <= target.shared_memory
    return compiled


SHAPES = [(128, 4), (64, 3), (256, 1), (80, 7), (128, 80)]  # head_dim, group
FORMS = [(False, False), (True, True), (True, False), (False, True)]  # apart, single


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize(
    ("head_dim", "group", "apart", "single"),
    and_thoroughly(
        [(*shape, *form) for place, shape in enumerate(SHAPES) for form in FORMS[: 2 if place == 0 else 1]],
        [(*shape, *form) for place, shape in enumerate(SHAPES) for form in FORMS[2 if place == 0 else 1 :]],
    ),
)
def test_attention_compiles_and_fits(target_name: str, head_dim: int, group: int, apart: bool, single: bool):
    target = TARGETS[target_name]
    tiles = invariant_tiles(head_dim, 2, group, target.shared_memory)
    dim_tile = triton.next_power_of_2(head_dim)
    constants: Constants = {
        "KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": 16,
        "BLOCK_M": tiles.block_m,
        "DIM_TILE": dim_tile,
        "BLOCK_N": tiles.block_n,
        "SPAN": SPAN,
        "SINGLE": single,
        "APART": apart,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled = check(target, invariant_attention_kernel, constants, fusion=False, **options)
    if target.hopper:
        assert "wgmma" in compiled.asm["ptx"]
        assert "fma.rn.f32" not in compiled.asm["ptx"]
    merged: Constants = {"HEADS": 8 * group, "HEAD_DIM": head_dim, "DIM_TILE": dim_tile, "SPAN": SPAN}
    check(target, merge_spans_kernel, merged, fusion=False, num_warps=1, num_stages=1)


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("tokens", and_thoroughly([32, 2048], [1, 64, 128]))
@pytest.mark.parametrize("kind", ["apart", "whole", "gated"])
def test_linear_maps_compile_and_fit(target_name: str, tokens: int, kind: str):
    """On Hopper by the same matrix instructions at any number of tokens."""
    target = TARGETS[target_name]
    gated = kind == "gated"
    shared = target.shared_memory
    tiles = gated_tiles(tokens, 2, shared) if gated else plain_tiles(4096, 14336, tokens, 2, shared)
    kernel, constants = linear_case(tiles, tokens, kind)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled = check(target, kernel, constants, fusion=True, **options)
    if target.hopper:
        ptx: str = compiled.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        assert "k16.f32.bf16.bf16" in ptx
        assert " mma.sync" not in ptx


def linear_case(tiles: LinearTiles, tokens: int, kind: str) -> tuple[Any, Constants]:
    constants: Constants = {
        "TOKENS_TILE": tiles.tokens(tokens),
        "OUT_TILE": tiles.out_tile,
        "IN_TILE": tiles.in_tile,
        "BIAS": True,
    }
    if kind == "whole":
        return whole_linear_kernel, {**constants, "PARTS": tiles.split}
    constants |= {"NORMED": False, "PARTS": 1, "PREFETCH": 512}
    if kind == "gated":
        return gated_kernel, constants
    return linear_kernel, {**constants, "SPLIT": tiles.split, "ADD": False, "NORM": False, "EARLY": True}
