"""The Gluon linear kernels: they compile for Hopper without a GPU, and stay close to float32 on one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from gapless.kernels.choice import Tiles, Use, multiply, multiply_and_add  # noqa: E402
from gapless.kernels.linear import LinearTiles  # noqa: E402
from gapless.kernels.normed import Normed  # noqa: E402
from gapless.kernels.wide_linear import (  # noqa: E402
    wide_add_linear,
    wide_gated_linear,
    wide_kernel,
    wide_linear,
)
from gapless.kernels.wide_tiles import (  # noqa: E402
    GATED_WIDE_CANDIDATES,
    IN_TILE,
    WIDE_CANDIDATES,
    WideTiles,
    runs_wide,
    wide_candidates,
)
from gapless.models.layers import TorchOps  # noqa: E402

SHARED_BYTES = 227 * 1024
COMPILED = [WideTiles(64, 32, 16), WideTiles(64, 64, 4), WideTiles(128, 64, 3)]
TILES = [*COMPILED, WideTiles(64, 64, 2), WideTiles(128, 128, 4)]
POINTERS = {"squares_PT": "*fp32", "new_squares_PT": "*fp32"}
SCALARS = {"tokens": "i32", "outputs": "i32", "parts": "i32", "eps": "fp32"}


def tile_type(*tile: int) -> str:
    layout = gl.NVMMASharedLayout(min(tile[-1] * 2, 128), 16, len(tile))
    return f"tensordesc<bf16[{', '.join(map(str, tile))}],{layout!r}>"


def compiled(tiles: WideTiles, use: str, inputs: int) -> Any:
    gated, added = use == "gated", use == "added"
    constants: dict[str, Any] = {
        "INPUTS": inputs,
        "TOKEN_TILE": tiles.token_tile,
        "OUT_TILE": tiles.out_tile,
        "STAGES": tiles.used_stages(inputs),
        "GATED": gated,
        "BIAS": True,
        "NORMED": not added,
        "ADD": added,
        "PARTS": 16,
        "DEPENDENT": True,
        "num_warps": tiles.num_warps,
    }
    out = tile_type(tiles.token_tile, tiles.out_tile)
    descriptors = {
        "x_TI": tile_type(tiles.token_tile, IN_TILE),
        "weight_HOI": tile_type(2 if gated else 1, tiles.out_tile, IN_TILE),
        "out_TO": out,
        "residual_TO": out,
    }
    types = {**dict.fromkeys(constants, "constexpr"), **descriptors, **POINTERS, **SCALARS}
    signature = {name: types.get(name, "*bf16") for name in wide_kernel.arg_names}
    source = GluonASTSource(fn=wide_kernel, signature=signature, constexprs=constants)
    options = {"num_warps": tiles.num_warps, "launch_pdl": True, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("use", ["plain", "added", "gated"])
@pytest.mark.parametrize("tiles", COMPILED, ids=str)
def test_it_compiles_and_asks_for_weights_before_it_waits(tiles: WideTiles, use: str):
    kernel = compiled(tiles, use, 576)
    assert kernel.metadata.shared <= SHARED_BYTES
    ptx: str = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    before, after = re.split(r"griddepcontrol\.wait", ptx)
    assert before.count("cp.async.bulk.tensor.3d.shared") == tiles.used_stages(576)
    assert after.count("cp.async.bulk.tensor.2d.shared") == 9 + (use == "added")


@pytest.mark.parametrize("tiles", COMPILED, ids=str)
def test_nothing_is_written_over_a_tile_that_is_still_being_copied_out(tiles: WideTiles):
    ptx: str = compiled(tiles, "added", 576).asm["ptx"]
    copies = re.findall(r"cp\.async\.bulk\.tensor\.2d\.global\.shared.*\[(%r\d+)\];", ptx)
    assert len(set(copies)) == len(copies) == 2
    behind = ptx[ptx.rindex("cp.async.bulk.tensor.2d.global") :]
    assert not re.search(r"stmatrix|st\.shared", behind)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("inputs", [576, 2048])
def test_all_candidates_fit(inputs: int, gated: bool):
    tried = wide_candidates(outputs=576, inputs=inputs, gated=gated, tokens=256)
    assert tried == [*(GATED_WIDE_CANDIDATES if gated else WIDE_CANDIDATES)]


@pytest.mark.parametrize(("outputs", "inputs", "tokens"), [(576, 576, 64), (576, 4096, 256), (568, 576, 256)])
def test_what_they_can_not_or_should_not_multiply_has_no_candidates(outputs: int, inputs: int, tokens: int):
    assert wide_candidates(outputs=outputs, inputs=inputs, gated=True, tokens=tokens) == []


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact.float()).norm() / exact.float().norm())


needs_hopper = pytest.mark.skipif(not (torch.cuda.is_available() and runs_wide()), reason="needs a Hopper GPU")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tokens", [1, 200, 256])
@pytest.mark.parametrize("sizes", [(576, 576), (136, 200), (1536, 576)])
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_maps_with_norms_between_stay_close_to_float32(tiles: WideTiles, sizes: tuple[int, int], tokens: int):
    inputs, hidden = sizes
    x_TI, down_OI, bias_O = normal(tokens, inputs), normal(hidden, inputs, seed=1) / inputs**0.5, normal(hidden, seed=2)
    residual_TO, norm_O, next_OI = normal(tokens, hidden, seed=3), normal(hidden, seed=4), normal(304, hidden, seed=5)
    ops, exact_TO = TorchOps(), residual_TO.float()
    x = wide_add_linear(x_TI, down_OI, bias_O, residual_TO, norm_O, 1e-5, tiles)
    exact = ops.add_linear(x_TI.float(), down_OI.float(), bias_O.float(), exact_TO, norm_O.float(), 1e-5)
    assert relative_error(residual_TO, exact_TO) < 5e-3
    next_exact = functional.linear(exact.x_TH, next_OI.float())
    assert relative_error(wide_linear(x, next_OI, None, tiles), next_exact) < 5e-3
    gated_exact = ops.gated_linear(exact, next_OI.float(), None)
    assert relative_error(wide_gated_linear(x, next_OI, None, tiles), gated_exact) < 1e-2


MIXED: list[tuple[Tiles, Tiles]] = [
    (WideTiles(64, 64, 4), WideTiles(64, 32, 16)),
    (WideTiles(64, 64, 4), WideTiles(128, 64, 4)),
    (WideTiles(64, 32, 9), LinearTiles(64, 64, 1, 5, 64)),
    (LinearTiles(64, 64, 1, 4), WideTiles(64, 64, 6)),
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("gated_tiles", "tiles"), MIXED, ids=str)
def test_layers_in_a_graph_read_what_the_kernel_before_wrote(gated_tiles: Tiles, tiles: Tiles):
    """Of the same kind or of linear.py, and the same bits each time, though stages are filled again and again."""
    tokens, hidden, width, layers = 200, 576, 1536, 12
    ups = [normal(2 * width, hidden, seed=layer) / 24 for layer in range(layers)]
    downs = [normal(hidden, width, seed=100 + layer) / 40 for layer in range(layers)]
    norm_H, arrived = normal(hidden, seed=7), torch.zeros(4096, dtype=torch.int32, device="cuda")
    x_TH, out_TH = normal(tokens, hidden), torch.zeros(tokens, hidden, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        residual_TH = x_TH.clone()
        x = Normed(residual_TH * norm_H)
        for up, down in zip(ups, downs, strict=True):
            gated_TF = multiply(x, up, None, gated_tiles, arrived, Use.GATED)
            x = multiply_and_add(gated_TF, down, None, residual_TH, norm_H, 1e-5, tiles, arrived)
        out_TH.copy_(residual_TH)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(50, 54):
        x_TH.copy_(normal(tokens, hidden, seed=seed))
        run()
        eager = out_TH.clone()
        out_TH.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out_TH, eager)
    ops, residual_TH = TorchOps(), x_TH.float()
    x = Normed(residual_TH * norm_H.float())
    for up, down in zip(ups, downs, strict=True):
        gated_TF = ops.gated_linear(x, up.float(), None)
        x = ops.add_linear(gated_TF, down.float(), None, residual_TH, norm_H.float(), 1e-5)
    assert relative_error(out_TH, residual_TH) < 2e-2
