"""The Triton sampler compiles for every architecture that it is meant for, on a machine without any of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton: Any = pytest.importorskip("triton")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = ("extremes_kernel", "survey_kernel", "choose_kernel")
EDITED = {
    "edited_ptr": "*fp32",
    "where_ptr": "*i32",
    "flags_ptr": "*i32",
    "repetition_ptr": "*fp32",
    "presence_ptr": "*fp32",
    "frequency_ptr": "*fp32",
    "counts_ptr": "*i32",
    "allowed_ptr": "*i32",
    "mask_ptr": "*i32",
    "mask_index_ptr": "*i32",
    "masks": "i32",
}
POINTERS = {
    "rows_ptr": "*i32",
    "positions_ptr": "*i32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "seed_ptr": "*i32",
    "best_ptr": "*fp32",
    "token_ptr": "*i32",
    "splitter_ptr": "*fp32",
    "reached_ptr": "*fp32",
    "mass_ptr": "*i64",
    "ties_ptr": "*i32",
    "candidate_ptr": "*i32",
    "progress_ptr": "*i32",
    "tokens_ptr": "*i32",
}


def assembled(kernel_name: str, target: str, dtype: str, vocab: int, *, edited: bool = False) -> dict[str, Any]:
    """What Triton makes of a kernel with TritonSampler's default shape, by stage of the compilation."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gapless.sampling import triton_kernels, triton_sampler

    kernel: Any = getattr(triton_kernels, kernel_name)
    tiles = triton_sampler.SamplerTiles().fit(vocab)
    constants: dict[str, Any] = {
        **tiles.constants(vocab),
        "LARGEST": torch.finfo(DTYPES[dtype]).max,
        "LOW_ZERO_BITS": triton_sampler.low_zero_bits(DTYPES[dtype]),
        "DEPENDENT": target == "sm_90",
        "EDITED": edited,
        "HAS_MASKS": edited,
        **({} if edited else dict.fromkeys(EDITED)),
    }
    types = {"logits_ptr": f"*{dtype}", "logits_stride": "i32", **POINTERS, **EDITED}
    types |= dict.fromkeys(constants, "constexpr")
    names: list[str] = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={name: constants[name] for name in names if name in constants},
    )
    warps = tiles.choose_warps if kernel_name == "choose_kernel" else tiles.tile_warps
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options).asm


@pytest.mark.parametrize(
    ("target", "dtype", "vocab"),
    [
        ("sm_80", "bf16", 49152),
        ("sm_90", "bf16", 128256),
        ("sm_90", "fp32", 50257),
        ("sm_90", "fp32", 61),
        ("gfx942", "fp16", 128256),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_sampler_compiles(kernel: str, target: str, dtype: str, vocab: int):
    asm = assembled(kernel, target, dtype, vocab)
    assert len(asm["hsaco" if target == "gfx942" else "cubin"]) > 0


@pytest.mark.parametrize(("target", "dtype"), [("sm_80", "fp16"), ("sm_90", "bf16"), ("gfx942", "bf16")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_sampler_of_edited_logits_compiles(kernel: str, target: str, dtype: str):
    asm = assembled(kernel, target, dtype, 128256, edited=True)
    assert len(asm["hsaco" if target == "gfx942" else "cubin"]) > 0


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_every_operation_of_a_weight_is_rounded_by_itself(kernel: str):
    lines: list[str] = assembled(kernel, "sm_90", "bf16", 128256)["ptx"].splitlines()
    assert not [line for line in lines if "fma.rn.f32" in line or "div.full" in line]
    flushing = [line for line in lines if ".ftz" in line]
    assert all("cvt.rmi.ftz" in line for line in flushing)  # floor: no subnormal reaches it


def test_every_operation_of_an_edit_is_rounded_by_itself():
    lines: list[str] = assembled("extremes_kernel", "sm_90", "bf16", 128256, edited=True)["ptx"].splitlines()
    assert not [line for line in lines if "fma.rn.f32" in line or "div.full" in line or ".ftz" in line]
    assert [line for line in lines if "div.rn.f32" in line]
