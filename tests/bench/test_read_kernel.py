"""The kernel that measures read bandwidth, without a GPU: interpreted, and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gapless.bench.read_kernel import TILES, read_kernel  # noqa: E402


def test_the_interpreted_kernel_reads_everything_once():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_read_kernel.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("tiles", TILES)
def test_the_kernel_loads_wide_words_on_a_gpu(tiles: tuple[int, int, int]):
    tile, count, warps = tiles
    source = ASTSource(
        fn=read_kernel,
        signature={"data_X": "*i32", "sums_P": "*i32", "TILE": "constexpr", "TILES": "constexpr"},
        constexprs={"TILE": tile, "TILES": count},
        attrs={(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
