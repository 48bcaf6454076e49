"""The linear kernels on a real device: close to float32, and right behind kernels that are still running."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gapless.models.layers import TorchOps

triton = pytest.importorskip("triton")

from gapless.kernels.dependent import is_hopper  # noqa: E402
from gapless.kernels.linear import LinearTiles, add_linear, candidates, gated_linear, linear  # noqa: E402
from gapless.kernels.normed import LayerMaps, Normed  # noqa: E402
from gapless.kernels.ops import TritonOps  # noqa: E402

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


def exact_silu_mul(product: Tensor) -> Tensor:
    gate, up = product.float().chunk(2, dim=1)
    return functional.silu(gate) * up


@pytest.mark.parametrize("tokens", [1, 7, 32, 100, 128, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_maps_stay_close_to_float32_and_have_the_same_bits_again(shape: tuple[int, int], tokens: int):
    inputs, outputs = shape
    x_TI, weight_OI, bias_O = normal(tokens, inputs), normal(outputs, inputs, seed=1), normal(outputs, seed=2)
    exact = functional.linear(x_TI.float(), weight_OI.float(), bias_O.float())
    arrived = torch.zeros(4096, dtype=torch.int32, device=CUDA)
    for tiles in candidates(gated=False, tokens=tokens):
        out = linear(Normed(x_TI), weight_OI, bias_O, tiles, arrived)
        assert relative_error(out, exact) < BOUND, tiles
        assert torch.equal(linear(Normed(x_TI), weight_OI, bias_O, tiles, arrived), out)
    assert not arrived.any()
    exact = exact_silu_mul(functional.linear(x_TI.float(), weight_OI.float()))
    for tiles in candidates(gated=True, tokens=tokens):
        assert relative_error(gated_linear(Normed(x_TI), weight_OI, None, tiles), exact) < BOUND, tiles


@pytest.mark.parametrize("tokens", [3, 32, 200])
def test_layers_in_a_graph_read_what_the_kernel_before_wrote(tokens: int):
    """Also the parts of a norm, and counters and partial sums that every launch uses again."""
    hidden, width, layers = 1024, 2816, 12
    ups = [normal(2 * width, hidden, seed=layer) / 32 for layer in range(layers)]
    downs = [normal(hidden, width, seed=100 + layer) / 32 for layer in range(layers)]
    norm_H = normal(hidden, seed=7)
    arrived = torch.zeros(4096, dtype=torch.int32, device=CUDA)
    x_TH, out_TH = normal(tokens, hidden), torch.zeros(tokens, hidden, device=CUDA, dtype=torch.bfloat16)

    def run(gated_tiles: LinearTiles, tiles: LinearTiles) -> None:
        residual_TH = x_TH.clone()
        x = Normed(residual_TH * norm_H)
        for up, down in zip(ups, downs, strict=True):
            gated_TF = gated_linear(x, up, None, gated_tiles)
            x = add_linear(gated_TF, down, None, residual_TH, norm_H, 1e-5, tiles, arrived)
        out_TH.copy_(residual_TH)

    def run_exactly() -> Tensor:
        ops, residual_TH = TorchOps(), x_TH.float()
        x = Normed(residual_TH * norm_H.float())
        for up, down in zip(ups, downs, strict=True):
            gated_TF = ops.gated_linear(x, up.float(), None)
            x = ops.add_linear(gated_TF, down.float(), None, residual_TH, norm_H.float(), 1e-5)
        return residual_TH

    for gated_tiles in candidates(gated=True, tokens=tokens):
        for tiles in candidates(gated=False, tokens=tokens):
            run(gated_tiles, tiles)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(gated_tiles, tiles)
            for seed in range(2):
                x_TH.copy_(normal(tokens, hidden, seed=50 + seed))
                run(gated_tiles, tiles)
                eager = out_TH.clone()
                out_TH.fill_(torch.nan)
                graph.replay()
                assert torch.equal(out_TH, eager), (gated_tiles, tiles)
            assert relative_error(out_TH, run_exactly()) < 2e-2, (gated_tiles, tiles)


def test_the_fused_way_through_layers_stays_close_to_torchs_products():
    hidden, tokens = 512, 24
    ops, plain = TritonOps(), TritonOps()
    weights = [normal(hidden, hidden, seed=seed) / 16 for seed in range(6)]
    gates = [normal(2 * hidden, hidden, seed=10 + seed) / 16 for seed in range(6)]
    seconds = itertools.count(1.0)  # torch's ways, timed last, take longest
    ops.prepare(weights[0], LayerMaps([], gates, weights), [tokens], lambda _: next(seconds))
    norm_H, outs = normal(hidden, seed=3), list[Tensor]()
    for each in (ops, plain):
        residual_TH = normal(tokens, hidden, seed=4)
        x = each.rms_norm(residual_TH, norm_H, 1e-5)
        for weight, gate in zip(weights, gates, strict=True):
            x = each.add_linear(each.gated_linear(x, gate, None), weight, None, residual_TH, norm_H, 1e-5)
        outs.append(each.linear(x, weights[0], None))
    assert relative_error(outs[0], outs[1].float()) < 2e-2
