"""The compiled kernels on a real device: close to float32 in bfloat16, and right when a captured graph is replayed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gapless.attention import make_attention
from gapless.attention.base import HeadRotation, LayerKV
from gapless.attention.scenario import Scenario, make_scenario
from gapless.attention.torch_reference import TorchAttention
from gapless.models.layers import TorchOps, make_ops

pytest.importorskip("triton")

from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.silu_mul import silu_mul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
BOUND = 5e-3  # of the norm; rounding the answer alone to bfloat16 costs 1.7e-3


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def in_float32(scenario: Scenario) -> tuple[Tensor, LayerKV]:
    return scenario.q_TND.float(), LayerKV(scenario.kv.k_BKSD.float(), scenario.kv.v_BKSD.float())


def exact_attention(scenario: Scenario, scale: float) -> Tensor:
    q_TND, kv = in_float32(scenario)
    return TorchAttention().attend(q_TND, kv, scenario.batch, scale)


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((9, 3), 64), ((32, 8), 128), ((14, 2), 64), ((4, 4), 256), ((8, 1), 80), ((6, 2), 96)],
)
@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_in_bfloat16_stays_close_to_float32(heads: tuple[int, int], head_dim: int, block_size: int):
    queries, lengths = [1] * 5 + [2, 77, 300], [1, 16, 100, 1500, 4097, 40, 77, 1333]
    scenario = make_scenario(
        queries, lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16, device=CUDA
    )
    scale = head_dim**-0.5
    out_TND = make_attention(None, CUDA).attend(scenario.q_TND, scenario.kv, scenario.batch, scale)
    assert relative_error(out_TND, exact_attention(scenario, scale)) < BOUND


@pytest.mark.parametrize("heads", [(9, 3), (4, 1)])
def test_attention_in_float32_is_exact(heads: tuple[int, int]):
    scenario = make_scenario([1, 1, 50], [900, 17, 130], heads=heads, head_dim=64, device=CUDA)
    out_TND = make_attention("triton", CUDA).attend(scenario.q_TND, scenario.kv, scenario.batch, 0.125)
    torch.testing.assert_close(out_TND, exact_attention(scenario, 0.125), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "head_dim", "entries"),
    [((32, 8), 128, 32), ((9, 3), 64, 7), ((4, 1), 128, 1), ((14, 2), 64, 3), ((4, 4), 256, 2), ((32, 8), 128, 64)],
)
def test_a_long_decode_among_short_ones_is_right_and_has_the_same_bits_again(
    heads: tuple[int, int], head_dim: int, entries: int
):
    lengths = [8192, *[1 + 37 * entry % 256 for entry in range(1, entries)]]
    scenario = make_scenario(
        [1] * entries, lengths, heads=heads, head_dim=head_dim, dtype=torch.bfloat16, device=CUDA, max_kv=8200
    )
    scale, attention = head_dim**-0.5, make_attention("triton", CUDA)
    args = (scenario.q_TND, scenario.kv, scenario.batch, scale)
    out_TND = attention.attend(*args)
    assert relative_error(out_TND, exact_attention(scenario, scale)) < BOUND
    assert all(torch.equal(attention.attend(*args), out_TND) for _ in range(10))


@pytest.mark.parametrize("max_kv", [300, 8192])
def test_a_captured_decode_follows_metadata_that_changes_between_replays(max_kv: int):
    lengths = [7, 300, 64, 129]
    scenario = make_scenario(
        [1] * 4, lengths, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device=CUDA, padding=2, max_kv=max_kv
    )
    attention, ops, batch = make_attention(None, CUDA), make_ops(CUDA), scenario.batch
    attention.attend(scenario.q_TND, scenario.kv, batch, 0.1)  # compiles
    weight_H = torch.ones(8 * 128, dtype=torch.bfloat16, device=CUDA)

    def run() -> Tensor:
        out_TND = attention.attend(scenario.q_TND, scenario.kv, batch, 0.1)
        return ops.rms_norm(out_TND.flatten(1), weight_H, 0.0).x_TH

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TH = run()
    order = torch.tensor([2, 3, 1, 0], device=CUDA)
    changes: list[tuple[Tensor, Tensor]] = [
        (batch.rows_E[:4].clone(), batch.kv_len_E[:4].clone()),
        (batch.rows_E[:4][order], batch.kv_len_E[:4][order]),
        (batch.rows_E[:4][order], torch.tensor([1, 33, 256, 2], dtype=torch.int32, device=CUDA)),
    ]
    for rows_E, kv_len_E in changes:
        batch.rows_E[:4] = rows_E
        batch.kv_len_E[:4] = kv_len_E
        graph.replay()
        exact = TorchOps().rms_norm(exact_attention(scenario, 0.1).flatten(1), weight_H, 0.0).x_TH
        assert relative_error(out_TH[:4], exact[:4]) < BOUND


def test_the_layer_pieces_in_bfloat16_stay_close_to_float32():
    ops, exact_ops = make_ops(CUDA), TorchOps()
    generator = torch.Generator(CUDA).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=CUDA).bfloat16()

    x_TH, residual_TH, weight_H = normal(33, 4096), normal(33, 4096), normal(4096)
    exact_residual = residual_TH.float() + x_TH.float()
    normed = add_rms_norm(x_TH, residual_TH, weight_H, 1e-5)
    assert relative_error(normed, exact_ops.rms_norm(exact_residual, weight_H.float(), 1e-5).x_TH) < BOUND
    assert relative_error(residual_TH, exact_residual) < BOUND

    gate_up = normal(33, 2 * 14336)
    gate, up = gate_up.float().chunk(2, dim=1)
    assert relative_error(silu_mul(gate_up), functional.silu(gate) * up) < BOUND

    scenario = make_scenario([1, 32], [90, 70], heads=(32, 8), head_dim=128, dtype=torch.bfloat16, device=CUDA)
    _, exact_kv = in_float32(scenario)
    qkv_TM, norms_2D = normal(33, 48 * 128), normal(2, 128)
    rope_PD = torch.randn(100, 128, generator=generator, device=CUDA)
    q_TND = ops.rope_append(qkv_TM, HeadRotation(norms_2D, 1e-5, rope_PD), scenario.kv, scenario.batch)
    exact_q = exact_ops.rope_append(
        qkv_TM.float(), HeadRotation(norms_2D.float(), 1e-5, rope_PD), exact_kv, scenario.batch
    )
    assert relative_error(q_TND, exact_q) < BOUND
    for ours, theirs in ((scenario.kv.k_BKSD, exact_kv.k_BKSD), (scenario.kv.v_BKSD, exact_kv.v_BKSD)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) < BOUND


@pytest.mark.parametrize(
    ("heads", "head_dim", "norm"),
    [((9, 3), 64, False), ((32, 8), 128, False), ((4, 4), 256, False), ((16, 8), 128, True)],
)
def test_rotated_appended_and_attended_to_in_one_is_right_in_a_graph(heads: tuple[int, int], head_dim: int, norm: bool):
    """Behind another kernel, so that keys are asked for before they may be read; replayed at other lengths."""
    num_heads, num_kv_heads = heads
    lengths = [7, 300, 64, 129, 2000, 17]
    scenario = make_scenario(
        [1] * 6, lengths, heads=heads, head_dim=head_dim, dtype=torch.bfloat16, device=CUDA, max_kv=8192
    )
    generator = torch.Generator(CUDA).manual_seed(0)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    x_TM, weight_M = (torch.randn(*s, width, generator=generator, device=CUDA).bfloat16() for s in ((6,), ()))
    norms_2D = torch.randn(2, head_dim, generator=generator, device=CUDA).bfloat16() if norm else None
    rotation = HeadRotation(norms_2D, 1e-5, torch.randn(2001, head_dim, generator=generator, device=CUDA))
    attention, batch, scale = make_attention("triton", CUDA), scenario.batch, head_dim**-0.5

    def run() -> Tensor:
        qkv_TM = add_rms_norm(None, x_TM, weight_M, 1e-5)
        out_TND = attention.rotate_and_attend(qkv_TM, rotation, scenario.kv, batch, scale)
        assert out_TND is not None
        return out_TND

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TND = run()
    for changed in (lengths, [300, 7, 1, 2000, 129, 16]):
        new = make_scenario([1] * 6, changed, heads=heads, head_dim=head_dim, dtype=torch.bfloat16, device=CUDA)
        for name in ("rows_E", "kv_len_E", "token_rows_T", "positions_T"):
            getattr(batch, name).copy_(getattr(new.batch, name))
        _, exact_kv = in_float32(scenario)
        filled = LayerKV(exact_kv.k_BKSD.nan_to_num(), exact_kv.v_BKSD.nan_to_num())
        scenario.kv.k_BKSD.nan_to_num_()
        scenario.kv.v_BKSD.nan_to_num_()
        graph.replay()
        qkv_TM = add_rms_norm(None, x_TM, weight_M, 1e-5).float()
        norms = None if norms_2D is None else norms_2D.float()
        q_TND = TorchOps().rope_append(qkv_TM, HeadRotation(norms, 1e-5, rotation.rope_PD), filled, batch)
        assert relative_error(out_TND, TorchAttention().attend(q_TND, filled, batch, scale)) < 2 * BOUND
        for ours, exact in ((scenario.kv.k_BKSD, filled.k_BKSD), (scenario.kv.v_BKSD, filled.v_BKSD)):
            assert relative_error(ours, exact) < BOUND
