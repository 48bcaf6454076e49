"""The kernels of features compile for every architecture that they are meant for, on a machine without any of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton: Any = pytest.importorskip("triton")

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = ("repetition_ptr", "presence_ptr", "frequency_ptr", "edited_ptr", "total_ptr", "logprobs_ptr")
NUMBERS = ("logits_stride", "lines_stride", "tokens", "masks")


def assembled(kernel: Any, target: str, dtype: str, vocab: int, warps: int, **shape: int) -> dict[str, Any]:
    """What Triton makes of a kernel, by stage of the compilation."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = {
        "VOCAB": vocab,
        "LARGEST": torch.finfo(DTYPES[dtype]).max,
        "DEPENDENT": target == "sm_90",
        "HAS_MASKS": True,
        "LISTS_ONLY": False,
        **shape,
    }
    types = dict.fromkeys(kernel.arg_names, "*i32") | {"logits_ptr": f"*{dtype}", "best_ptr": "*i64"}
    types |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
    if "lines_stride" in kernel.arg_names:  # elsewhere the lines are what is sent for taken rows
        types["lines_ptr"] = f"*{dtype}"
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs={name: constants[name] for name in kernel.arg_names if name in constants},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options).asm


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "vocab"), [("bf16", 128256), ("fp32", 61)])
def test_edits_and_logprobs_compile(target: str, dtype: str, vocab: int):
    from gapless.sampling import feature_kernels, logprob_kernels
    from gapless.sampling.triton_features import EditTiles
    from gapless.sampling.triton_logprobs import LogprobTiles

    binary = "hsaco" if target == "gfx942" else "cubin"
    edits, tiles = EditTiles(), LogprobTiles()
    shape = tiles.constants(vocab)
    asms = [
        assembled(feature_kernels.edit_kernel, target, dtype, vocab, edits.warps, BLOCK=edits.block),
        assembled(logprob_kernels.tile_logprobs_kernel, target, dtype, vocab, tiles.tile_warps, **shape),
        assembled(logprob_kernels.merge_logprobs_kernel, target, dtype, vocab, tiles.merge_warps, **shape),
    ]
    assert all(len(asm[binary]) > 0 for asm in asms)


@pytest.mark.parametrize("target", TARGETS)
def test_taking_rows_and_counting_tokens_compile(target: str):
    from gapless.sampling import feature_kernels, triton_features

    binary = "hsaco" if target == "gfx942" else "cubin"
    taken = assembled(feature_kernels.take_kernel, target, "fp32", 128256, 4, BLOCK=triton_features.TAKE_BLOCK)
    counted = assembled(feature_kernels.count_kernel, target, "fp32", 128256, 4, BLOCK=triton_features.COUNT_BLOCK)
    assert len(taken[binary]) > 0
    assert len(counted[binary]) > 0


def test_every_operation_of_an_edit_is_rounded_by_itself():
    from gapless.sampling import feature_kernels

    lines: list[str] = assembled(feature_kernels.edit_kernel, "sm_90", "bf16", 128256, 4, BLOCK=2048)[
        "ptx"
    ].splitlines()
    assert not [line for line in lines if "fma.rn.f32" in line or "div.full" in line or ".ftz" in line]
    assert [line for line in lines if "div.rn.f32" in line]
