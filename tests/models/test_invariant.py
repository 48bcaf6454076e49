"""Every bit of a token's logits is the same alone, in any batch, any chunk, any place, and over a shared prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gapless.attention import make_attention
from gapless.attention.base import HeadRotation
from gapless.attention.scenario import make_scenario
from gapless.config import ModelConfig
from gapless.kernels.normed import Normed
from gapless.models.layers import Linear, make_ops
from gapless.models.llama import LlamaModel
from gapless.weights.random import random_weights
from support.effort import effort
from support.invariance import SCHEDULES, logits_of, random_tokens
from support.invariance import alone as token_by_token

CPU = torch.device("cpu")
PRODUCTS = [(48, 80), (200, 264), (576, 960), (1536, 576), (33, 7)]  # inputs, outputs
MODELS = {
    "plain": {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 264},
    "norms on heads, biases, odd sizes": {
        "hidden_size": 100,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 26,
        "intermediate_size": 2250,
        "qk_norm": True,
        "qkv_bias": True,
        "mlp_bias": True,
        "output_bias": True,
    },
}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where three threads share the work, they meet in the middle of a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> LlamaModel:
    return make_model(request.param, deterministic=True)


def make_model(name: str, *, deterministic: bool) -> LlamaModel:
    sizes = MODELS[name]
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=523,
        num_layers=2,
        rms_norm_eps=1e-5,
        max_position=256,
        **sizes,  # pyright: ignore[reportArgumentType]
    )
    return LlamaModel.load(
        config,
        random_weights(config, CPU, torch.float32, 0),
        device=CPU,
        dtype=torch.float32,
        attention=make_attention(None, CPU, deterministic=deterministic),
        max_position=256,
        ops=make_ops(CPU, deterministic=deterministic),
    )


@pytest.fixture(scope="module")
def alone(model: LlamaModel) -> list[Tensor]:
    """Every sequence without others, token by token."""
    sequences = random_tokens(model.vocab_size)
    return [logits_of(model, [tokens], token_by_token(len(tokens)), CPU)[0] for tokens in sequences]


@pytest.mark.parametrize("name", SCHEDULES)
def test_logits_have_the_bits_of_the_sequence_alone(model: LlamaModel, alone: list[Tensor], name: str):
    together = logits_of(model, random_tokens(model.vocab_size), SCHEDULES[name], CPU)
    for expected, logits in zip(alone, together, strict=True):
        assert torch.equal(logits, expected[-len(logits) :])


@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_close_to_those_without_the_mode(name: str):
    ours, theirs = (
        logits_of(make_model(name, deterministic=each), random_tokens(523), SCHEDULES["at random, 0"], CPU)
        for each in (True, False)
    )
    for logits, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def each_number_of_tokens(work: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Rows 0 to 129 of x, the first so many at a time and in another order: each row has the bits it has alone."""
    single = torch.cat([work(row) for row in x.split(1)])
    generator = torch.Generator().manual_seed(0)
    for count in range(1, len(x) + 1, effort(3, 1)):  # 130 is one of them
        assert torch.equal(work(x[:count]), single[:count]), count
        order = torch.randperm(len(x), generator=generator)[:count]
        assert torch.equal(work(x[order]), single[order]), count


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", PRODUCTS)
def test_products_have_the_same_bits_at_any_number_of_tokens(sizes: tuple[int, int], dtype: torch.dtype, packed: bool):
    inputs, outputs = sizes
    ops = make_ops(CPU, deterministic=True)
    linear = Linear(normal(outputs, inputs, dtype=dtype), normal(outputs, dtype=dtype))
    weights = linear.pack().weights if packed else linear.weights
    each_number_of_tokens(lambda x_TI: ops.linear(Normed(x_TI), *weights), normal(130, inputs, dtype=dtype))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(96, 528), (50, 4500)])
def test_the_pieces_of_a_layer_have_the_same_bits_at_any_number_of_tokens(sizes: tuple[int, int], dtype: torch.dtype):
    hidden, doubled = sizes
    ops = make_ops(CPU, deterministic=True)
    x_TH, norm_H = normal(130, hidden, dtype=dtype), normal(hidden, dtype=dtype)
    gate_up, down = normal(doubled, hidden, dtype=dtype), normal(hidden, doubled // 2, dtype=dtype)
    each_number_of_tokens(lambda x: ops.rms_norm(x, norm_H, 1e-5).x_TH, x_TH)
    each_number_of_tokens(lambda x: ops.gated_linear(Normed(x), gate_up, None), x_TH)

    def added(x: Tensor) -> Tensor:
        residual = x[:, :hidden].clone()
        return torch.cat((ops.add_linear(x[:, hidden:], down, None, residual, norm_H, 1e-5).x_TH, residual), dim=1)

    each_number_of_tokens(added, normal(130, hidden + doubled // 2, dtype=dtype))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("norm", [False, True])
def test_heads_are_rotated_to_the_same_bits_at_any_number_of_tokens(norm: bool):
    qkv_TM, rope_PD = normal(61, 8 * 26), normal(100, 26)
    rotation = HeadRotation(normal(2, 26) if norm else None, 1e-5, rope_PD)

    def rotated(counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        starts = [sum(counts[:index]) for index in range(len(counts))]
        scenario = make_scenario([61], [61], heads=(4, 2), head_dim=26)
        ops, parts = make_ops(CPU, deterministic=True), list[Tensor]()
        for start, count in zip(starts, counts, strict=True):
            step = slice(start, start + count)
            whole = scenario.batch
            batch = replace(whole, positions_T=whole.positions_T[step], token_rows_T=whole.token_rows_T[step])
            parts.append(ops.rope_append(qkv_TM[step], rotation, scenario.kv, batch))
        return torch.cat(parts), scenario.kv.k_BKSD.nan_to_num(), scenario.kv.v_BKSD.nan_to_num()

    expected = rotated([1] * 61)
    for counts in ([61], [2, 59], [7, 13, 41], [32, 29], [60, 1]):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rotated(counts), expected, strict=True))
