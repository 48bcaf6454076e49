"""Every kernel compiles for every architecture it is meant for, and fits its shared memory, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gapless.kernels.linear import LinearTiles, candidates, gated_kernel, linear_kernel  # noqa: E402
from gapless.kernels.paged_decode import decode_kernel, decode_tiles, merge_step, reduce_kernel  # noqa: E402
from gapless.kernels.paged_prefill import prefill_kernel, prefill_tiles  # noqa: E402
from gapless.kernels.rms_norm import add_rms_norm_kernel  # noqa: E402
from gapless.kernels.rope_append import rope_append_kernel  # noqa: E402
from gapless.kernels.silu_mul import silu_mul_kernel  # noqa: E402
from gapless.kernels.unpack import store_sampled_kernel, unpack_kernel  # noqa: E402
from support.effort import and_thoroughly  # noqa: E402

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    binary: str
    shared_memory: int  # bytes that one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "cubin", 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "cubin", 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "hsaco", 64 * 1024),
}
TYPES = {
    **dict.fromkeys(
        ("rows_E", "kv_len_E", "query_start_E1", "block_table_RC", "token_rows_T", "positions_T", "arrived_P"), "*i32"
    ),
    **dict.fromkeys(("partial_UGD", "partial_lse_UG", "rope_PD"), "*fp32"),
    **dict.fromkeys(("table_stride", "q_stride", "entries", "wanted", "min_span", "num_decodes", "num_entries"), "i32"),
    **dict.fromkeys(("eps", "scale_log2"), "fp32"),
    **dict.fromkeys(("tokens", "inputs", "outputs", "half", "parts"), "i32"),
    **dict.fromkeys(("partial", "squares_PT", "new_squares_PT"), "*fp32"),
    **dict.fromkeys(("arrived",), "*i32"),
    **dict.fromkeys(("admitted", "samples", "scratch_row"), "i32"),
    **dict.fromkeys(("temperature_R", "top_p_R", "min_p_R", "temperature_A", "top_p_A", "min_p_A"), "*fp32"),
}
Case = tuple[Any, dict[str, int | bool], dict[str, int]]


def decode(head_dim: int, group: int, amd: bool, fused: bool = True, block_size: int = 16, rotate: bool = True) -> Case:
    tiles = decode_tiles(head_dim, 2, group, amd)
    dim_tile, heads = triton.next_power_of_2(head_dim), triton.next_power_of_2(group)
    constants: dict[str, int | bool] = {
        "KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "GROUP_TILE": max(16, heads),
        "DIM_TILE": dim_tile,
        "BLOCK_N": tiles.block_n,
        "ENTRIES_TILE": 32,
        "MERGE": merge_step(heads, dim_tile, tiles.num_warps),
        "FUSED": fused,
        "ROTATE": rotate,
        "NORM": rotate,
    }
    return decode_kernel, constants, {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def reduce(head_dim: int) -> Case:
    constants: dict[str, int | bool] = {
        "KV_HEADS": 8,
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "DIM_TILE": head_dim,
        "ENTRIES_TILE": 1,
        "MERGE": merge_step(1, head_dim, 4),
    }
    return reduce_kernel, constants, {"num_warps": 4}


def prefill(head_dim: int, group: int, itemsize: int, amd: bool) -> Case:
    tiles = prefill_tiles(head_dim, itemsize, group, max_query=8192, amd=amd)
    constants: dict[str, int | bool] = {
        "KV_HEADS": 8,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": 16,
        "BLOCK_M": tiles.block_m,
        "DIM_TILE": triton.next_power_of_2(head_dim),
        "BLOCK_N": tiles.block_n,
    }
    return prefill_kernel, constants, {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def rms_norm(_: bool) -> Case:
    return add_rms_norm_kernel, {"HIDDEN": 4096, "BLOCK": 4096, "ADD": True}, {"num_warps": 8}


def silu_mul(_: bool) -> Case:
    return silu_mul_kernel, {"WIDTH": 14336, "BLOCK": 1024}, {"num_warps": 4}


def rope_append(head_dim: int) -> Case:
    constants: dict[str, int | bool] = {
        "HEADS": 32,
        "KV_HEADS": 8,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": 16,
        "HEADS_TILE": 8,
        "HALF_TILE": triton.next_power_of_2(head_dim // 2),
        "NORM": True,
    }
    return rope_append_kernel, constants, {"num_warps": 4}


def linear(tiles: LinearTiles, tokens: int, gated: bool) -> Case:
    constants: dict[str, int | bool] = {
        "TOKENS_TILE": tokens,
        "OUT_TILE": tiles.out_tile,
        "IN_TILE": tiles.in_tile,
        "BIAS": True,
        "NORMED": True,
        "PARTS": 64,
        "PREFETCH": 512,
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return (
        (gated_kernel, constants, options)
        if gated
        else (linear_kernel, {**constants, "SPLIT": tiles.split, "ADD": True, "NORM": True, "EARLY": True}, options)
    )


CASES: dict[str, Callable[[bool], Case]] = {
    "decode-128": lambda amd: decode(128, 4, amd),
    "decode-128-rotated-before": lambda amd: decode(128, 4, amd, rotate=False),
    "decode-128-unmerged": lambda amd: decode(128, 4, amd, fused=False),
    "decode-128-many-heads": lambda amd: decode(128, 32, amd),
    "decode-64": lambda amd: decode(64, 7, amd),
    "decode-64-large-blocks": lambda amd: decode(64, 3, amd, block_size=64),
    "decode-256": lambda amd: decode(256, 1, amd),
    "decode-80": lambda amd: decode(80, 3, amd),
    "reduce-128": lambda _: reduce(128),
    "prefill-128": lambda amd: prefill(128, 4, 2, amd),
    "prefill-64": lambda amd: prefill(64, 3, 2, amd),
    "prefill-256": lambda amd: prefill(256, 1, 2, amd),
    "rms_norm": rms_norm,
    "silu_mul": silu_mul,
    "unpack": lambda _: (unpack_kernel, {"BLOCK": 256, "DECODES": False}, {"num_warps": 4}),
    "unpack-decodes": lambda _: (unpack_kernel, {"BLOCK": 256, "DECODES": True}, {"num_warps": 4}),
    "store_sampled": lambda _: (store_sampled_kernel, {"BLOCK": 256}, {"num_warps": 4}),
    "rope_append-128": lambda _: rope_append(128),
    "rope_append-80": lambda _: rope_append(80),
}
RARE = [
    "decode-128-rotated-before",
    "decode-128-unmerged",
    "decode-64-large-blocks",
    "decode-80",
    "prefill-64",
    "unpack",
    "rope_append-128",
]
HOPPER_CASES: dict[str, Case] = {
    f"{'gated' if gated else 'linear'}-{tiles.out_tile}-{tiles.in_tile}-{tiles.split}-{tokens}": linear(
        tiles, tokens, gated
    )
    for gated in (False, True)
    for tokens in (16, 32, 128)
    for tiles in candidates(gated=gated, tokens=tokens)
}


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("case_name", and_thoroughly([name for name in CASES if name not in RARE], RARE))
def test_a_kernel_compiles_and_fits_in_shared_memory(target_name: str, case_name: str):
    target = TARGETS[target_name]
    check(target, CASES[case_name](target.gpu.backend == "hip"))


@pytest.mark.parametrize(
    "case_name",
    and_thoroughly(
        [name for name in HOPPER_CASES if name.endswith("-32")],
        [name for name in HOPPER_CASES if not name.endswith("-32")],
    ),
)
def test_a_kernel_for_hopper_only_compiles_and_fits_in_shared_memory(case_name: str):
    check(TARGETS["sm_90"], HOPPER_CASES[case_name])


def check(target: Target, case: Case) -> None:
    kernel, constants, options = case
    hopper = target is TARGETS["sm_90"]
    if "DEPENDENT" in kernel.arg_names:
        constants = {**constants, "DEPENDENT": hopper}
    names: list[str] = kernel.arg_names
    default = "*i32" if "sampled" in kernel.__name__ or "unpack" in kernel.__name__ else "*bf16"
    signature = {name: "constexpr" if name in constants else TYPES.get(name, default) for name in names}
    if "weight_at" in names:
        rows = constants["OUT_TILE"] // (1 if kernel is linear_kernel else 2)
        signature["x_TI"] = f"tensordesc<bf16[{constants['TOKENS_TILE']},{constants['IN_TILE']}]>"
        signature["weight_OI"] = f"tensordesc<bf16[{rows},{constants['IN_TILE']}]>"
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("_stride") or name in ("inputs", "outputs")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    launch = {"launch_pdl": True} if hopper else {}
    compiled: Any = triton.compile(source, target=target.gpu, options={**options, **launch, "enable_fp_fusion": True})
    assert compiled.asm[target.binary]
    assert not hopper or kernel is prefill_kernel or "griddepcontrol.wait" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= target.shared_memory
