"""Run by test_interpreter.py in a process of its own: the Triton kernels, interpreted, against plain torch.

A process of its own because Triton decides on import whether its functions are interpreted; the name of this file
keeps it out of a plain pytest run.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gapless.attention.base import HeadRotation, LayerKV
from gapless.attention.scenario import make_scenario, pad_mixed
from gapless.attention.torch_reference import TorchAttention
from gapless.attention.triton_paged import TritonAttention
from gapless.device.cpu import CpuDevice
from gapless.engine.layout import StepInputs, StepShape, sections_of
from gapless.engine.runner import Runner
from gapless.engine.slots import Slot, SlotSizes
from gapless.engine.tables import DeviceTables
from gapless.engine.triton_runner import TritonRunner
from gapless.kernels import paged_decode
from gapless.kernels.linear import LinearTiles, add_linear, gated_linear, linear
from gapless.kernels.normed import Normed
from gapless.kernels.ops import TritonOps
from gapless.kernels.paged_decode import DecodeTiles, decode_kernel
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.silu_mul import silu_mul
from gapless.models.layers import TorchOps
from support.effort import and_thoroughly, effort

REFERENCE = TorchAttention()
MULTIPROCESSORS = 4


def test_the_kernels_are_interpreted_here():
    assert type(decode_kernel).__name__ == "InterpretedFunction"


# (query lengths, cached lengths, (heads, key/value heads), head size, block size, padding, max_kv)
Shape = tuple[list[int], list[int], tuple[int, int], int, int, int, int | None]
SHAPES: dict[str, Shape] = {
    "decodes of SmolLM2, split": ([1, 1, 1], [1, 257, 600], (9, 3), 64, 16, 0, 2048),
    "decodes of SmolLM2, whole": ([1] * 8, [5, 16, 17, 33, 1, 64, 129, 128], (9, 3), 64, 16, 0, None),
    "decodes with padding": ([1, 1], [70, 3], (8, 2), 32, 16, 3, 512),
    "decodes with large blocks": ([1, 1], [130, 300], (4, 1), 64, 64, 0, 1024),
    "decodes with wide heads": ([1, 1], [40, 9], (2, 2), 256, 16, 0, None),
    "decodes with head size 80": ([1, 1], [300, 19], (3, 1), 80, 32, 0, 1024),
    "one chunk": ([70], [70], (9, 3), 64, 16, 0, None),
    "chunks over a prefix": ([5, 33, 2], [90, 133, 64], (4, 1), 32, 16, 0, None),
    "decodes and chunks of Qwen2": ([1, 1, 19, 40], [129, 2, 19, 104], (14, 2), 64, 16, 0, None),
    "chunks with wide heads": ([3, 20], [3, 50], (2, 1), 256, 32, 0, None),
    "decodes and a chunk with tiny heads": ([1, 4], [30, 9], (7, 1), 8, 16, 0, None),
    "chunks with head size 96": ([9, 30], [65, 30], (8, 8), 96, 16, 0, None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of padding that reads poison
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_the_reference(name: str):
    queries, lengths, heads, head_dim, block_size, padding, max_kv = SHAPES[name]
    scenario = make_scenario(
        queries, lengths, heads=heads, head_dim=head_dim, block_size=block_size, padding=padding, max_kv=max_kv
    )
    args = (scenario.q_TND, scenario.kv, scenario.batch, head_dim**-0.5)
    out_TND = TritonAttention(MULTIPROCESSORS).attend(*args)
    assert out_TND.is_contiguous()
    real = len(out_TND) - padding
    torch.testing.assert_close(out_TND[:real], REFERENCE.attend(*args)[:real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(effort(2, 6)))
def test_attention_equals_the_reference_on_random_lengths(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def up_to(high: int, count: int) -> list[int]:
        return torch.randint(1, high + 1, (count,), generator=generator).tolist()

    queries = [1] * (1 + seed % 3) + [1 + length for length in up_to(40, 2)]
    lengths = [count + cached for count, cached in zip(queries, up_to(200, len(queries)), strict=True)]
    kv_heads, group = [(3, 3), (1, 4), (2, 7), (1, 8), (2, 1), (1, 2)][seed]
    scenario = make_scenario(
        queries, lengths, heads=(kv_heads * group, kv_heads), head_dim=[64, 32][seed % 2], seed=seed
    )
    args = (scenario.q_TND, scenario.kv, scenario.batch, 0.2)
    torch.testing.assert_close(
        TritonAttention(MULTIPROCESSORS).attend(*args), REFERENCE.attend(*args), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of padding that reads poison
@pytest.mark.parametrize("sizes", [(3, 5, 30), (0, 1, 0), (2, 0, 1), (0, 150, 7)])
def test_attention_in_a_larger_step_is_that_of_the_step_itself(sizes: tuple[int, int, int]):
    decodes, entries, tokens = sizes
    scenario = make_scenario([1, 1, 7, 40, 2], [90, 20, 40, 41, 100], heads=(6, 2), head_dim=32)
    larger, at_T = pad_mixed(scenario, decodes=decodes, entries=entries, tokens=tokens)
    exact_TND = REFERENCE.attend(scenario.q_TND, scenario.kv, scenario.batch, 0.2)
    for attention in (TritonAttention(MULTIPROCESSORS), TorchAttention()):
        out_TND = attention.attend(larger.q_TND, larger.kv, larger.batch, 0.2)
        torch.testing.assert_close(out_TND[at_T], exact_TND, rtol=1e-5, atol=1e-5)


def test_attention_in_half_precision_stays_close_to_float32():
    # float16: the interpreter multiplies bfloat16 matrices as integers
    scenario = make_scenario([1, 1, 20], [600, 33, 77], heads=(14, 2), head_dim=64, dtype=torch.float16)
    out_TND = TritonAttention(MULTIPROCESSORS).attend(scenario.q_TND, scenario.kv, scenario.batch, 0.125)
    kv = LayerKV(scenario.kv.k_BKSD.float(), scenario.kv.v_BKSD.float())
    exact_TND = REFERENCE.attend(scenario.q_TND.float(), kv, scenario.batch, 0.125)
    assert (out_TND.float() - exact_TND).norm() < 1e-3 * exact_TND.norm()


def test_a_strided_query_gives_the_same_answer():
    scenario = make_scenario([1, 6], [20, 9], heads=(4, 2), head_dim=32)
    wide = torch.zeros(len(scenario.q_TND), 6, 32)
    wide[:, :4] = scenario.q_TND
    attention = TritonAttention(MULTIPROCESSORS)
    strided = attention.attend(wide[:, :4], scenario.kv, scenario.batch, 0.2)
    assert torch.equal(strided, attention.attend(scenario.q_TND, scenario.kv, scenario.batch, 0.2))


# (block_n, min_span, programs per processor)
CUTS = {
    "one unit each": (32, 4096, 1),
    "a few units": (16, 64, 2),
    "many units": (32, 32, 5),
    "nearly a unit for every tile": (16, 16, 12),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("merged_by_last", [0, 10**6])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("seed", range(effort(1, 4)))
def test_ragged_decodes_equal_the_reference_however_they_are_cut(
    seed: int, cut: str, merged_by_last: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(paged_decode, "MERGED_BY_LAST", merged_by_last)
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = torch.randint(1, 50, (2 + seed,), generator=generator).tolist()
    lengths[seed] = 150
    kv_heads, group = [(3, 3), (1, 4), (2, 7), (4, 1)][seed]
    scenario = make_scenario(
        [1] * len(lengths),
        lengths,
        heads=(kv_heads * group, kv_heads),
        head_dim=[64, 32, 20, 16][seed],
        block_size=[16, 16, 64, 24][seed],
        seed=seed,
        max_kv=[150, 131072, 800, 8192][seed],
    )
    block_n, min_span, programs = CUTS[cut]
    tiles = DecodeTiles(block_n, min_span, programs, num_warps=1, num_stages=1)
    args = (scenario.q_TND, scenario.kv, scenario.batch, 0.2)
    exact_TND, arrived_P = REFERENCE.attend(*args), torch.zeros(len(lengths) * kv_heads, dtype=torch.int32)
    out_TND = torch.full_like(scenario.q_TND, torch.nan)
    paged_decode.paged_decode(
        scenario.q_TND, out_TND, scenario.kv, scenario.batch, 0.2, MULTIPROCESSORS, tiles, arrived_P=arrived_P
    )
    torch.testing.assert_close(out_TND, exact_TND, rtol=1e-5, atol=1e-5)
    assert not arrived_P.any()


def test_more_pairs_than_the_shared_counters_are_good_for_get_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gapless.attention.triton_paged.MAX_ARRIVED", 3)
    scenario = make_scenario([1, 1], [300, 20], heads=(4, 2), head_dim=32)
    args = (scenario.q_TND, scenario.kv, scenario.batch, 0.2)
    torch.testing.assert_close(
        TritonAttention(MULTIPROCESSORS).attend(*args), REFERENCE.attend(*args), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("hidden", [1, 48, 576, 1000])
@pytest.mark.parametrize("add", [False, True])
def test_add_rms_norm_equals_torch(hidden: int, add: bool):
    generator = torch.Generator().manual_seed(hidden)
    residual_TH, update_TH, weight_H = (
        torch.randn(*s, generator=generator) for s in ((5, hidden), (5, hidden), (hidden,))
    )
    expected = residual_TH + update_TH if add else residual_TH.clone()
    out_TH = add_rms_norm(update_TH if add else None, residual_TH, weight_H, 1e-5)
    torch.testing.assert_close(residual_TH, expected)
    torch.testing.assert_close(out_TH, TorchOps().rms_norm(expected, weight_H, 1e-5).x_TH, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 80, 1536])
def test_silu_mul_equals_torch(width: int):
    gate_up_TF2 = torch.randn(3, 2 * width, generator=torch.Generator().manual_seed(width)) * 10
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=1)
    torch.testing.assert_close(silu_mul(gate_up_TF2), functional.silu(gate_TF) * up_TF)


# (tokens, inputs, outputs): whole tiles, ragged, fewer inputs than a tile, more splits than tiles, two token tiles
MAPS = [(32, 256, 128), (5, 200, 72), (1, 8, 3), (17, 136, 200), (150, 64, 40)]
TILES = [LinearTiles(64, 64, 1, 1), LinearTiles(32, 32, 2, 1), LinearTiles(16, 64, 4, 1), LinearTiles(32, 32, 2, 1, 16)]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("sizes", MAPS)
@pytest.mark.parametrize("biased", and_thoroughly([True], [False]))
def test_linear_equals_torch(sizes: tuple[int, int, int], tiles: LinearTiles, biased: bool):
    tokens, inputs, outputs = sizes
    x_TI, weight_OI, bias_O = normal(tokens, inputs), normal(outputs, inputs), normal(outputs) if biased else None
    arrived = torch.zeros(1000, dtype=torch.int32)
    out_TO = linear(Normed(x_TI), weight_OI, bias_O, tiles, arrived)
    torch.testing.assert_close(out_TO, functional.linear(x_TI, weight_OI, bias_O), rtol=1e-5, atol=1e-4)
    assert not arrived.any()


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("sizes", MAPS)
def test_gated_linear_equals_torch(sizes: tuple[int, int, int], tiles: LinearTiles):
    tokens, inputs, half = sizes
    x_TI, weight_OI, bias_O = normal(tokens, inputs), normal(2 * half, inputs), normal(2 * half)
    gate_TF, up_TF = functional.linear(x_TI, weight_OI, bias_O).chunk(2, dim=1)
    out_TF = gated_linear(Normed(x_TI), weight_OI, bias_O, tiles)
    torch.testing.assert_close(out_TF, functional.silu(gate_TF) * up_TF, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("sizes", MAPS)
@pytest.mark.parametrize("biased", and_thoroughly([True], [False]))
def test_a_norm_between_two_maps_equals_torch(sizes: tuple[int, int, int], tiles: LinearTiles, biased: bool):
    tokens, inputs, hidden = sizes
    hidden = -(-hidden // 8) * 8
    x_TI, down_OI, bias_O = normal(tokens, inputs), normal(hidden, inputs), normal(hidden) if biased else None
    residual_TO, norm_O, next_OI = normal(tokens, hidden) * 5, normal(hidden), normal(40, hidden)
    ops, arrived, residual = TorchOps(), torch.zeros(1000, dtype=torch.int32), residual_TO.clone()
    x = add_linear(x_TI, down_OI, bias_O, residual, norm_O, 1e-5, tiles, arrived)
    exact = ops.add_linear(x_TI, down_OI, bias_O, residual_TO, norm_O, 1e-5)
    torch.testing.assert_close(residual, residual_TO, rtol=1e-5, atol=1e-4)
    out_TO = linear(x, next_OI, None, tiles, arrived)
    torch.testing.assert_close(out_TO, ops.linear(exact, next_OI, None), rtol=1e-4, atol=1e-3)
    out_TF = gated_linear(x, next_OI, None, tiles)
    torch.testing.assert_close(out_TF, ops.gated_linear(exact, next_OI, None), rtol=1e-4, atol=1e-3)
    assert not arrived.any()


@pytest.mark.parametrize("sizes", [(5, 0, 0, 5), (300, 7, 3, 4), (1, 1, 0, 0), (3, 400, 300, 2)])
def test_both_ends_of_a_step_equal_the_plain_runner(sizes: tuple[int, int, int, int]):
    tokens, updates, admitted, samples = sizes
    check_both_ends(StepShape(tokens, 0, samples, samples, updates + 5, admitted), updates)


@pytest.mark.parametrize("entries", [1, 32, 300])
@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize("continues", [False, True])
def test_both_ends_of_a_decode_step_equal_the_plain_runner(entries: int, updates: int, continues: bool):
    check_both_ends(StepShape.decode(entries), updates, continues=continues)


def check_both_ends(shape: StepShape, updates: int, *, continues: bool = False) -> None:
    generator = torch.Generator().manual_seed(shape.tokens)
    rows, columns = 1000, 50
    packed = torch.randint(1, rows, (sections_of(shape).total,), generator=generator, dtype=torch.int32)
    results = list[tuple[Tensor, ...]]()
    for kind in (Runner, TritonRunner):
        tables = DeviceTables.allocate(rows, columns, 8, 0, torch.device("cpu"))
        tables.last_token_R.copy_(torch.arange(rows) + 5)
        decoding = torch.randperm(rows - 1, generator=torch.Generator().manual_seed(1)).int()
        tables.decodes.rows_E.copy_(decoding)
        tables.decodes.positions_E.copy_(decoding % 700)
        tables.decodes.rows_E[shape.entries // 2 :] = tables.scratch_row
        tables.decodes.positions_E[shape.entries // 2 :] = 0
        inputs = StepInputs.of(packed, shape, tables.decodes)
        inputs.header_2.copy_(torch.tensor([continues, updates]))
        inputs.tokens_T[::2] = -1
        inputs.updates_3U[: 3 * updates].view(3, updates)[1].remainder_(columns)
        for each in (inputs.updates_3U[:updates], inputs.param_rows_A, packed[sections_of(shape).sample_rows_S]):
            each.copy_(torch.randperm(rows, generator=torch.Generator().manual_seed(2))[: len(each)])
        runner = object.__new__(kind)  # streams and a model have no part in it
        runner.tables, runner.scratch_row = tables, tables.scratch_row
        slot = Slot(0, CpuDevice(), SlotSizes(1, shape.samples))
        tokens_T = runner.unpack(inputs, shape)
        stored = torch.arange(shape.samples, dtype=torch.int32) + 7
        if not continues:  # padding stores several tokens in one place
            runner.store(inputs, slot, stored)
        results.append(
            (
                tokens_T,
                tables.block_table_RC,
                tables.last_token_R,
                slot.device_out,
                *(table for _, table in (*tables.sampling.by_name(), *tables.decodes.by_name())),
            )
        )
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


# (cached lengths, (heads, key/value heads), head size, block size, padding)
DECODES = [
    ([1, 37, 300, 16, 129], (9, 3), 64, 16, 0),
    ([257, 2], (4, 1), 20, 24, 2),
    ([33, 64, 5], (14, 2), 32, 64, 1),
    ([17], (2, 2), 256, 16, 0),
]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("merged_by_last", [0, 10**6])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("decodes", DECODES)
def test_decodes_rotated_appended_and_attended_to_in_one_equal_the_reference(
    decodes: tuple[list[int], tuple[int, int], int, int, int],
    norm: bool,
    merged_by_last: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(paged_decode, "MERGED_BY_LAST", merged_by_last)
    lengths, (num_heads, num_kv_heads), head_dim, block_size, padding = decodes
    scenario = make_scenario(
        [1] * len(lengths),
        lengths,
        heads=(num_heads, num_kv_heads),
        head_dim=head_dim,
        block_size=block_size,
        padding=padding,
    )
    batch, tokens = scenario.batch, len(lengths) + padding
    qkv_TM = normal(tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    rotation = HeadRotation(normal(2, head_dim) if norm else None, 1e-5, normal(400, head_dim))
    exact_kv = LayerKV(scenario.kv.k_BKSD.clone(), scenario.kv.v_BKSD.clone())
    q_TND = TorchOps().rope_append(qkv_TM, rotation, exact_kv, batch)
    exact_TND = REFERENCE.attend(q_TND, exact_kv, batch, 0.2)
    kv = LayerKV(scenario.kv.k_BKSD.clone(), scenario.kv.v_BKSD.clone())
    out_TND = TritonAttention(MULTIPROCESSORS).rotate_and_attend(qkv_TM, rotation, kv, batch, 0.2)
    assert out_TND is not None
    assert out_TND.is_contiguous()
    torch.testing.assert_close(out_TND[: len(lengths)], exact_TND[: len(lengths)], rtol=1e-4, atol=1e-4)
    for ours, exact in ((kv.k_BKSD, exact_kv.k_BKSD), (kv.v_BKSD, exact_kv.v_BKSD)):
        torch.testing.assert_close(ours[1:], exact[1:], rtol=1e-5, atol=1e-5, equal_nan=True)  # 0 takes padding


def test_chunks_are_not_rotated_and_attended_to_in_one():
    scenario = make_scenario([1, 6], [20, 9], heads=(4, 2), head_dim=32)
    rotation = HeadRotation(None, 1e-5, normal(40, 32))
    before = scenario.kv.k_BKSD.clone()
    args = (normal(7, 8 * 32), rotation, scenario.kv, scenario.batch, 0.2)
    assert TritonAttention(MULTIPROCESSORS).rotate_and_attend(*args) is None
    torch.testing.assert_close(scenario.kv.k_BKSD, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((4, 1), 20), ((14, 2), 32), ((1, 1), 256)])
def test_rope_append_equals_torch(heads: tuple[int, int], head_dim: int, norm: bool):
    scenario = make_scenario([1, 1, 9], [1, 37, 20], heads=heads, head_dim=head_dim, padding=0)
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(1)
    qkv_TM = torch.randn(11, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator)
    qk_norm_2D = torch.randn(2, head_dim, generator=generator) if norm else None
    rope_PD = torch.randn(40, head_dim, generator=generator)
    outs = list[list[Tensor]]()
    for ops in (TorchOps(), TritonOps()):
        kv = LayerKV(scenario.kv.k_BKSD.clone(), scenario.kv.v_BKSD.clone())
        q_TND = ops.rope_append(qkv_TM, HeadRotation(qk_norm_2D, 1e-5, rope_PD), kv, scenario.batch)
        assert q_TND.is_contiguous()
        outs.append([q_TND, kv.k_BKSD, kv.v_BKSD])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5, equal_nan=True)
