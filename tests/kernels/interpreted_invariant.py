"""Run by test_invariant_interpreter.py in a process of its own: the kernels of deterministic mode, interpreted, against
plain torch. What they promise of bits is for test_invariant_gpu.py: numpy's products are not those of a GPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gapless.attention.scenario import make_scenario, pad_mixed
from gapless.attention.torch_reference import TorchAttention
from gapless.kernels import invariant_attention, invariant_linear
from gapless.kernels.invariant_ops import InvariantTritonOps
from gapless.kernels.normed import Normed
from gapless.models.layers import TorchOps
from support.effort import and_thoroughly

REFERENCE = TorchAttention()
MULTIPROCESSORS = 2


def test_the_kernels_are_interpreted_here():
    assert type(invariant_linear.whole_linear_kernel).__name__ == "InterpretedFunction"


# (query lengths, cached lengths, (heads, key/value heads), head size, block size)
SHAPES = {
    "decodes": ([1] * 5, [1, 64, 257, 600, 33], (9, 3), 64, 16),
    "decodes in large blocks": ([1, 1], [130, 300], (4, 1), 32, 64),
    "wide heads": ([1, 3, 20], [200, 3, 50], (2, 1), 256, 16),
    "head size 80": ([1, 9], [300, 19], (3, 1), 80, 32),
    "chunks": ([5, 27, 2], [90, 133, 340], (7, 1), 16, 16),
    "decodes and chunks": ([1, 1, 19, 7], [129, 2, 19, 204], (2, 2), 64, 8),
}  # fmt: skip


def attend(name: str, *, most_pairs: int, span: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Ours and the reference's."""
    monkeypatch.setattr(invariant_attention, "SPAN", span)
    queries, lengths, heads, head_dim, block_size = SHAPES[name]
    scenario = make_scenario(queries, lengths, heads=heads, head_dim=head_dim, block_size=block_size)
    tiles = invariant_attention.invariant_tiles(head_dim, 4, heads[0] // heads[1], 2**16)
    q_TND, kv, batch = scenario.q_TND, scenario.kv, scenario.batch
    out_TND = invariant_attention.invariant_attention(q_TND, kv, batch, 0.2, MULTIPROCESSORS, tiles, most_pairs)
    return out_TND, REFERENCE.attend(q_TND, kv, batch, 0.2)


@pytest.mark.parametrize(("most_pairs", "span"), [(0, 128), (10**6, 64)])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_the_reference(name: str, most_pairs: int, span: int, monkeypatch: pytest.MonkeyPatch):
    out_TND, exact_TND = attend(name, most_pairs=most_pairs, span=span, monkeypatch=monkeypatch)
    torch.testing.assert_close(out_TND, exact_TND, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:(invalid|divide|overflow):RuntimeWarning")  # numpy, of padding
@pytest.mark.parametrize(
    ("most_pairs", "sizes"),
    and_thoroughly([(0, (3, 5, 30)), (10**6, (0, 1, 0))], [(10**6, (3, 5, 30)), (0, (0, 1, 0))]),
)
def test_attention_in_a_larger_step_is_that_of_the_step_itself(sizes: tuple[int, int, int], most_pairs: int):
    decodes, entries, tokens = sizes
    scenario = make_scenario([1, 1, 7, 20, 2], [590, 20, 40, 541, 100], heads=(3, 1), head_dim=32)
    larger, at_T = pad_mixed(scenario, decodes=decodes, entries=entries, tokens=tokens)
    exact_TND = REFERENCE.attend(scenario.q_TND, scenario.kv, scenario.batch, 0.2)
    tiles = invariant_attention.invariant_tiles(32, 4, 3, 2**16)
    out_TND = invariant_attention.invariant_attention(
        larger.q_TND, larger.kv, larger.batch, 0.2, MULTIPROCESSORS, tiles, most_pairs
    )
    torch.testing.assert_close(out_TND[at_T], exact_TND, rtol=1e-5, atol=1e-5)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# (tokens, inputs, outputs): ragged, parts, the last of them empty, more tokens than a tile
MAPS = [(5, 200, 72), (17, 1096, 100), (1, 1032, 40), (150, 520, 40)]


@pytest.mark.parametrize("programs", [0, 256])
@pytest.mark.parametrize("biased", and_thoroughly([True], [False]))
@pytest.mark.parametrize("sizes", MAPS)
def test_linear_maps_equal_torch(
    sizes: tuple[int, int, int], biased: bool, programs: int, monkeypatch: pytest.MonkeyPatch
):
    """With the parts of the inputs in programs of their own, and all in one."""
    monkeypatch.setattr(invariant_linear, "FEWER_PROGRAMS", programs)
    tokens, inputs, outputs = sizes
    ops, exact = InvariantTritonOps(), TorchOps()
    x_TI, weight_OI = normal(tokens, inputs), normal(outputs, inputs) / inputs**0.5
    bias_O = normal(outputs) if biased else None
    out_TO = ops.linear(Normed(x_TI), weight_OI, bias_O)
    torch.testing.assert_close(out_TO, functional.linear(x_TI, weight_OI, bias_O), rtol=1e-5, atol=1e-5)
    out_TF = ops.gated_linear(Normed(x_TI), weight_OI, bias_O)
    torch.testing.assert_close(out_TF, exact.gated_linear(Normed(x_TI), weight_OI, bias_O), rtol=1e-4, atol=1e-5)
    residual_TO, norm_O = normal(tokens, outputs), normal(outputs)
    theirs_TO = residual_TO.clone()
    x = ops.add_linear(x_TI, weight_OI, bias_O, residual_TO, norm_O, 1e-5)
    torch.testing.assert_close(
        x.x_TH, exact.add_linear(x_TI, weight_OI, bias_O, theirs_TO, norm_O, 1e-5).x_TH, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(residual_TO, theirs_TO, rtol=1e-5, atol=1e-5)


def test_half_precision_has_other_tiles_and_stays_close():
    for tokens in (1, 40, 130, 300):
        x_TI, weight_OI = normal(tokens, 1096).half(), normal(200, 1096).half()
        out_TO = InvariantTritonOps().linear(Normed(x_TI), weight_OI, None)
        exact_TO = functional.linear(x_TI.float(), weight_OI.float())
        assert (out_TO - exact_TO).norm() < 1e-3 * exact_TO.norm()


def test_the_parts_of_a_map_are_the_same_at_any_number_of_tokens():
    for outputs, inputs, itemsize, shared in [(4096, 14336, 2, 232448), (960, 576, 2, 65536), (6144, 4096, 4, 65536)]:
        tiles = [invariant_linear.plain_tiles(outputs, inputs, tokens, itemsize, shared) for tokens in range(1, 400)]
        assert len({(each.in_tile, each.split) for each in tiles}) == 1
