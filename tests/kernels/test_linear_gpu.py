"""The linear kernels on a real device: close to float32, and right behind kernels that are still running."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gapless.models.layers import make_ops

triton = pytest.importorskip("triton")

from gapless.kernels.dependent import is_hopper  # noqa: E402
from gapless.kernels.linear import LinearTiles, candidates, gated_linear, linear  # noqa: E402
from gapless.kernels.silu_mul import silu_mul  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and is_hopper()), reason="needs a Hopper GPU"),
]
CUDA = torch.device("cuda")
BOUND = 5e-3
SHAPES = [(4096, 6144), (576, 960), (14336, 4096), (896, 1152), (72, 40)]  # inputs, outputs


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=CUDA).bfloat16()


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def plain_gated(x_TH: Tensor, weight: Tensor) -> Tensor:
    return silu_mul(functional.linear(x_TH, weight))


def exact_silu_mul(product: Tensor) -> Tensor:
    gate, up = product.float().chunk(2, dim=1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("tokens", [1, 7, 32, 100, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_maps_stay_close_to_float32_and_have_the_same_bits_again(shape: tuple[int, int], tokens: int):
    inputs, outputs = shape
    x_TI, weight_OI, bias_O = normal(tokens, inputs), normal(outputs, inputs, seed=1), normal(outputs, seed=2)
    exact = functional.linear(x_TI.float(), weight_OI.float(), bias_O.float())
    arrived = torch.zeros(4096, dtype=torch.int32, device=CUDA)
    for tiles in candidates(gated=False, tokens=tokens):
        out = linear(x_TI, weight_OI, bias_O, tiles, arrived)
        assert relative_error(out, exact) < BOUND, tiles
        assert torch.equal(linear(x_TI, weight_OI, bias_O, tiles, arrived), out)
    assert not arrived.any()
    exact = exact_silu_mul(functional.linear(x_TI.float(), weight_OI.float()))
    for tiles in candidates(gated=True, tokens=tokens):
        assert relative_error(gated_linear(x_TI, weight_OI, None, tiles), exact) < BOUND, tiles


@pytest.mark.parametrize("tokens", [3, 32])
def test_maps_that_follow_each_other_in_a_graph_read_what_the_one_before_wrote(tokens: int):
    hidden, width, layers = 1024, 2816, 12
    ups = [normal(2 * width, hidden, seed=layer) / 32 for layer in range(layers)]
    downs = [normal(hidden, width, seed=100 + layer) / 32 for layer in range(layers)]
    ops, norm_H = make_ops(CUDA), torch.ones(hidden, device=CUDA, dtype=torch.bfloat16)
    arrived = torch.zeros(4096, dtype=torch.int32, device=CUDA)
    x_TH, out_TH = normal(tokens, hidden), torch.zeros(tokens, hidden, device=CUDA, dtype=torch.bfloat16)

    def run(up_way: Callable[[Tensor, Tensor], Tensor], down_way: Callable[[Tensor, Tensor], Tensor]) -> None:
        residual_TH, update_TH = x_TH.clone(), None
        for up, down in zip(ups, downs, strict=True):
            update_TH = down_way(up_way(ops.add_rms_norm(update_TH, residual_TH, norm_H, 1e-5), up), down)
        assert update_TH is not None
        out_TH.copy_(residual_TH + update_TH)

    for gated_tiles in candidates(gated=True, tokens=tokens):
        for tiles in candidates(gated=False, tokens=tokens):

            def our_gated(x_TH: Tensor, weight: Tensor, tiles: LinearTiles = gated_tiles) -> Tensor:
                return gated_linear(x_TH, weight, None, tiles)

            def our_linear(x_TF: Tensor, weight: Tensor, tiles: LinearTiles = tiles) -> Tensor:
                return linear(x_TF, weight, None, tiles, arrived)

            ours = (our_gated, our_linear)
            run(*ours)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(*ours)
            for seed in range(3):
                x_TH.copy_(normal(tokens, hidden, seed=50 + seed))
                run(*ours)
                eager = out_TH.clone()
                out_TH.fill_(torch.nan)
                graph.replay()
                assert torch.equal(out_TH, eager), (gated_tiles, tiles)
            eager = out_TH.clone()
            run(plain_gated, functional.linear)
            assert relative_error(eager, out_TH.float()) < 2e-2
