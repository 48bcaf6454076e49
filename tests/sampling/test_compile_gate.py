"""The Triton sampler compiles for every architecture that it is meant for, on a machine without any of them."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gapless.sampling.triton_sampler import low_zero_bits, sample_kernel  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    "rows_ptr": "*i32",
    "positions_ptr": "*i32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "seed_ptr": "*i32",
    "tokens_ptr": "*i32",
}


def compiled(target: str, dtype: torch.dtype, vocab: int) -> object:
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    block = 4096
    constants = {
        "VOCAB": vocab,
        "BLOCK": block,
        "TILES": triton.next_power_of_2(triton.cdiv(vocab, block)),
        "LARGEST": torch.finfo(dtype).max,
        "LOW_ZERO_BITS": low_zero_bits(dtype),
    }
    signature = {"logits_ptr": f"*{name}", "logits_stride": "i32", **POINTERS, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=sample_kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": 16, "enable_fp_fusion": False})


@pytest.mark.parametrize(
    ("target", "dtype", "vocab"),
    [
        ("sm_80", torch.bfloat16, 49152),
        ("sm_90", torch.bfloat16, 128256),
        ("sm_90", torch.float32, 50257),
        ("gfx942", torch.bfloat16, 128256),
    ],
)
def test_the_sampler_kernel_compiles(target: str, dtype: torch.dtype, vocab: int):
    kernel = compiled(target, dtype, vocab)
    binary = "hsaco" if target == "gfx942" else "cubin"
    assert len(kernel.asm[binary]) > 0  # type: ignore[attr-defined]


def test_the_kernel_rounds_every_operation_of_the_weights_by_itself():
    ptx: str = compiled("sm_90", torch.bfloat16, 128256).asm["ptx"]  # type: ignore[attr-defined]
    assert "fma.rn.f32" not in ptx
    assert ".ftz" not in ptx
    assert "div.full" not in ptx
