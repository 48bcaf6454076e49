"""Deterministic mode on a real device: the bits of a token are the same at any number of tokens and in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gapless.attention import make_attention
from gapless.attention.base import AttentionBatch, HeadRotation, LayerKV
from gapless.attention.scenario import Scenario, batch_of, make_scenario
from gapless.attention.torch_reference import TorchAttention
from gapless.config import ModelConfig
from gapless.kernels.normed import Normed
from gapless.models.layers import TorchOps, make_ops
from gapless.models.llama import LlamaModel
from gapless.weights.random import random_weights
from support.invariance import SCHEDULES, Schedule, Step, alone, logits_of, random_tokens

pytest.importorskip("triton")

from gapless.kernels import invariant_attention, invariant_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
BOUND = 5e-3  # of the norm; rounding the answer alone to bfloat16 costs 1.7e-3
COUNTS = [1, 2, 7, 16, 31, 32, 33, 64, 100, 128, 200, 256, 1000, 2048]
SHAPES = [(4096, 6144), (4096, 4096), (14336, 4096), (576, 960), (1536, 576), (2048, 50304), (72, 40)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(CUDA).manual_seed(seed), device=CUDA).to(dtype)


def relative_error(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def differing_counts(work: Callable[[Tensor], Tensor], x: Tensor) -> list[int]:
    """Numbers of tokens at which some token has not the bits that it has among all tokens of x."""
    whole = work(x)
    generator, wrong = torch.Generator().manual_seed(0), list[int]()
    for count in COUNTS:
        order = torch.randperm(len(x), generator=generator)[:count].to(CUDA)
        if not (torch.equal(work(x[:count].clone()), whole[:count]) and torch.equal(work(x[order]), whole[order])):
            wrong.append(count)
    return wrong


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_have_the_same_bits_at_any_number_of_tokens(shape: tuple[int, int], dtype: torch.dtype):
    inputs, outputs = shape
    ops, x_TI = make_ops(CUDA, deterministic=True), normal(2048, inputs, dtype=dtype)
    weight_OI, bias_O = normal(outputs, inputs, seed=1, dtype=dtype), normal(outputs, seed=2, dtype=dtype)
    assert differing_counts(lambda x: ops.linear(Normed(x), weight_OI, bias_O), x_TI) == []
    exact_TO = functional.linear(x_TI[:64].float(), weight_OI.float(), bias_O.float())
    assert relative_error(ops.linear(Normed(x_TI[:64]), weight_OI, bias_O), exact_TO) < BOUND


@pytest.mark.parametrize("shape", [(4096, 28672), (576, 3072), (72, 80)])
def test_gated_products_have_the_same_bits_at_any_number_of_tokens(shape: tuple[int, int]):
    inputs, outputs = shape
    ops, x_TI, weight_OI = (
        make_ops(CUDA, deterministic=True),
        normal(2048, inputs),
        normal(outputs, inputs, seed=1) / 32,
    )
    assert differing_counts(lambda x: ops.gated_linear(Normed(x), weight_OI, None), x_TI) == []
    gate_TF, up_TF = functional.linear(x_TI[:64].float(), weight_OI.float()).chunk(2, dim=1)
    exact_TF = functional.silu(gate_TF) * up_TF
    assert relative_error(ops.gated_linear(Normed(x_TI[:64]), weight_OI, None), exact_TF) < 2 * BOUND


@pytest.mark.parametrize("tokens", [1, 33, 100, 200, 500])
@pytest.mark.parametrize("shape", [(4096, 6144), (14336, 4096), (1536, 576)])
def test_parts_in_programs_of_their_own_make_no_difference(
    shape: tuple[int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
):
    inputs, outputs = shape
    ops, x, weight_OI = (
        make_ops(CUDA, deterministic=True),
        Normed(normal(tokens, inputs)),
        normal(outputs, inputs, seed=1),
    )
    assert invariant_linear.num_parts(outputs, inputs) > 1
    apart_TO = ops.linear(x, weight_OI, None)
    monkeypatch.setattr(invariant_linear, "FEWER_PROGRAMS", 0)
    assert torch.equal(ops.linear(x, weight_OI, None), apart_TO)


def test_the_rest_of_a_layer_has_the_same_bits_at_any_number_of_tokens():
    ops, norm_H, down_HF = make_ops(CUDA, deterministic=True), normal(4096, seed=1), normal(4096, 1536, seed=2) / 40

    def added(x: Tensor) -> Tensor:
        residual_TH = x[:, :4096].contiguous()
        x_TF = x[:, 4096:].contiguous()
        return torch.cat((ops.add_linear(x_TF, down_HF, None, residual_TH, norm_H, 1e-5).x_TH, residual_TH), dim=1)

    assert differing_counts(lambda x: ops.rms_norm(x, norm_H, 1e-5).x_TH, normal(2048, 4096)) == []
    assert differing_counts(added, normal(2048, 4096 + 1536)) == []


@pytest.mark.parametrize("heads", [(32, 8), (9, 3)])
def test_heads_are_rotated_and_written_with_the_same_bits_at_any_number_of_tokens(heads: tuple[int, int]):
    scenario = make_scenario([2048], [2048], heads=heads, head_dim=128, dtype=torch.bfloat16, device=CUDA)
    ops, rotation = (
        make_ops(CUDA, deterministic=True),
        HeadRotation(normal(2, 128), 1e-5, torch.rand(2048, 128).to(CUDA)),
    )
    qkv_TM = normal(2048, (heads[0] + 2 * heads[1]) * 128)

    def rotated(step: slice) -> tuple[Tensor, Tensor, Tensor]:
        kv = LayerKV(torch.zeros_like(scenario.kv.k_BKSD), torch.zeros_like(scenario.kv.v_BKSD))
        batch = scenario.batch
        parts = {"positions_T": batch.positions_T[step].clone(), "token_rows_T": batch.token_rows_T[step].clone()}
        q_TND = ops.rope_append(qkv_TM[step].clone(), rotation, kv, replace(batch, **parts))
        return q_TND, kv.k_BKSD, kv.v_BKSD

    q_TND, k_BKSD, v_BKSD = rotated(slice(0, 2048))
    for count in COUNTS[:-1]:
        ours = rotated(slice(7, 7 + count))
        assert torch.equal(ours[0], q_TND[7 : 7 + count])
        for cache, whole in zip(ours[1:], (k_BKSD, v_BKSD), strict=True):
            assert torch.equal(cache, torch.where(cache == 0, cache, whole))
            assert int((cache != 0).any(dim=3).sum()) == count * heads[1]


LENGTH = 2600  # positions: six spans
PLACES = [0, 1, 15, 16, 63, 64, 127, 500, 511, 512, 513, 1023, 1024, 1500, 2559, 2560, 2599]
CHUNKS = [(0, 64), (0, 1), (17, 19), (500, 530), (510, 513), (1000, 2500), (2500, 2600), (1024, 1536), (64, 128)]
HEADS = [((32, 8), 128), ((9, 3), 64), ((14, 2), 64), ((4, 4), 256), ((8, 1), 80), ((2, 2), 128)]


class Queries:
    """Queries of any positions of one sequence over its cache."""

    def __init__(self, heads: tuple[int, int], head_dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.scenario = make_scenario([LENGTH], [LENGTH], heads=heads, head_dim=head_dim, dtype=dtype, device=CUDA)
        self.scale = head_dim**-0.5
        self.attention = make_attention(None, CUDA, deterministic=True)

    def batch(self, parts: list[tuple[int, int]], max_kv: int | None = None) -> AttentionBatch:
        """Entries for positions [begin, end), those of one position first."""
        counts, lengths = [end - begin for begin, end in parts], [end for _, end in parts]
        return batch_of([0] * len(parts), counts, lengths, self.scenario.batch.block_table_RC, max_kv=max_kv)

    def attend(self, parts: list[tuple[int, int]], max_kv: int | None = None, kv: LayerKV | None = None) -> Tensor:
        q_TND = torch.cat([self.scenario.q_TND[begin:end] for begin, end in parts])
        return self.attention.attend(q_TND, kv or self.scenario.kv, self.batch(parts, max_kv), self.scale)


@pytest.mark.parametrize(("heads", "head_dim"), HEADS)
def test_a_query_has_the_same_bits_as_a_decode_and_in_any_chunk(heads: tuple[int, int], head_dim: int):
    queries = Queries(heads, head_dim)
    whole_TND = queries.attend([(0, LENGTH)])
    scenario = queries.scenario
    exact_TND = TorchAttention().attend(*in_float32(scenario), scenario.batch, queries.scale)
    assert relative_error(whole_TND, exact_TND) < BOUND
    for place in PLACES:
        for max_kv in (None, LENGTH, 100_000):
            assert torch.equal(queries.attend([(place, place + 1)], max_kv)[0], whole_TND[place]), (place, max_kv)
    for begin, end in CHUNKS:
        assert torch.equal(queries.attend([(begin, end)]), whole_TND[begin:end]), (begin, end)
    decodes = [(place, place + 1) for place in PLACES]
    chunks = [(begin, end) for begin, end in CHUNKS if end - begin > 1]
    for mix in (decodes, decodes[::-1], decodes * 40, chunks, decodes + chunks, chunks[::-1]):
        expected = torch.cat([whole_TND[begin:end] for begin, end in mix])
        assert torch.equal(queries.attend(mix), expected)


def in_float32(scenario: Scenario) -> tuple[Tensor, LayerKV]:
    return scenario.q_TND.float(), LayerKV(scenario.kv.k_BKSD.float(), scenario.kv.v_BKSD.float())


@pytest.mark.parametrize("most_pairs", [0, 10**6])
@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
def test_how_spans_are_shared_among_programs_makes_no_difference(
    most_pairs: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
):
    queries = Queries((32, 8), 128)
    whole_TND = queries.attend([(0, LENGTH)])
    tiles = invariant_attention.invariant_tiles(128, 2, 4, invariant_linear.shared_bytes())
    for parts in ([(place, place + 1) for place in PLACES], [(0, 1), (500, 530), (2500, 2600)]):
        q_TND = torch.cat([queries.scenario.q_TND[begin:end] for begin, end in parts])
        out_TND = invariant_attention.invariant_attention(
            q_TND, queries.scenario.kv, queries.batch(parts), queries.scale, multiprocessors, tiles, most_pairs
        )
        assert torch.equal(out_TND, torch.cat([whole_TND[begin:end] for begin, end in parts]))


def test_what_is_behind_a_query_changes_no_bit():
    queries = Queries((8, 2), 128)
    whole_TND = queries.attend([(0, LENGTH)])
    scenario = queries.scenario
    for place in PLACES:
        poisoned = LayerKV(scenario.kv.k_BKSD.clone(), scenario.kv.v_BKSD.clone())
        for position in range(place + 1, min(place + 600, LENGTH)):
            block = int(scenario.batch.block_table_RC[0, position // 16])
            poisoned.k_BKSD[block, :, position % 16] = torch.nan
            poisoned.v_BKSD[block, :, position % 16] = torch.nan
        assert torch.equal(queries.attend([(place, place + 1)], kv=poisoned)[0], whole_TND[place])


CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=5003,
    hidden_size=1024,
    num_layers=3,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=2816,
    rms_norm_eps=1e-5,
    max_position=2048,
    qk_norm=True,
)


def make_model(*, deterministic: bool) -> LlamaModel:
    return LlamaModel.load(
        CONFIG,
        random_weights(CONFIG, CUDA, torch.bfloat16, 0),
        device=CUDA,
        dtype=torch.bfloat16,
        attention=make_attention(None, CUDA, deterministic=deterministic),
        max_position=CONFIG.max_position,
        ops=make_ops(CUDA, deterministic=deterministic),
    )


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    return make_model(deterministic=True)


def run(model: LlamaModel, sequences: list[Tensor], schedule: Schedule) -> list[Tensor]:
    return logits_of(model, sequences, schedule, CUDA, torch.bfloat16)


@pytest.fixture(scope="module")
def each_alone(model: LlamaModel) -> list[Tensor]:
    return [run(model, [tokens], alone(len(tokens)))[0] for tokens in random_tokens(CONFIG.vocab_size)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_logits_have_the_bits_of_the_sequence_alone(model: LlamaModel, each_alone: list[Tensor], name: str):
    together = run(model, random_tokens(CONFIG.vocab_size), SCHEDULES[name])
    for expected, logits in zip(each_alone, together, strict=True):
        assert torch.equal(logits, expected[-len(logits) :])


LONG = [1300, 700, 90]


@pytest.mark.parametrize("size", [1, 64, 200, 511, 1024])
def test_logits_of_long_sequences_have_the_same_bits_in_any_chunks(model: LlamaModel, size: int):
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(CONFIG.vocab_size, (length,), generator=generator) for length in LONG]
    whole = run(model, sequences, Schedule([list(enumerate(LONG))]))
    tails = [40, 30, 20]  # decoded
    steps = list[Step]()
    left = [length - tail for length, tail in zip(LONG, tails, strict=True)]
    while any(left):
        steps.append(
            sorted(((row, min(size, count)) for row, count in enumerate(left) if count), key=lambda e: e[1] > 1)
        )
        left = [count - min(size, count) for count in left]
    steps += [[(row, 1) for row, tail in enumerate(tails) if tail > step] for step in range(max(tails))]
    for expected, logits in zip(whole, run(model, sequences, Schedule(steps)), strict=True):
        assert torch.equal(logits, expected)


def test_a_replayed_graph_gives_the_same_bits(model: LlamaModel):
    lengths = [1, 17, 600, 1300]
    kv = model.kv_spec.allocate(4 * 82 + 1, 16, torch.bfloat16, CUDA)
    for layer in kv:
        layer.k_BKSD.normal_()
        layer.v_BKSD.normal_()
    table_RC = (torch.arange(4 * 82, dtype=torch.int32, device=CUDA) + 1).view(4, 82)
    batch = batch_of(range(4), [1] * 4, lengths, torch.cat((table_RC, table_RC[:1] * 0)), max_kv=2048)
    tokens_T = torch.arange(4, dtype=torch.int32, device=CUDA)

    def step() -> Tensor:
        return model.logits(model.forward(tokens_T, kv, batch))

    with torch.inference_mode():
        expected = step().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_TV = step()
        logits_TV.zero_()
        graph.replay()
        assert torch.equal(logits_TV, expected)
        single = batch_of([2], [1], [600], batch.block_table_RC)
        assert torch.equal(model.logits(model.forward(tokens_T[2:3], kv, single))[0], expected[2])


def test_the_model_stays_close_to_the_one_that_is_not_deterministic(model: LlamaModel):
    sequences, schedule = random_tokens(CONFIG.vocab_size), SCHEDULES["at random, 0"]
    theirs = run(make_model(deterministic=False), sequences, schedule)
    for expected, logits in zip(theirs, run(model, sequences, schedule), strict=True):
        assert relative_error(logits, expected.float()) < 3e-2


def test_float32_stays_close_to_torch():
    ops, exact = make_ops(CUDA, deterministic=True), TorchOps()
    x_TI, weight_OI = normal(300, 512, dtype=torch.float32), normal(640, 512, seed=1, dtype=torch.float32) / 20
    torch.testing.assert_close(
        ops.gated_linear(Normed(x_TI), weight_OI, None),
        exact.gated_linear(Normed(x_TI.double()), weight_OI.double(), None).float(),
        rtol=1e-4,
        atol=1e-4,
    )
