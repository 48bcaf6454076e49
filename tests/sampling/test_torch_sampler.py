from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from gapless.errors import InternalError
from gapless.sampling import SamplingTables, TorchSampler, make_sampler, seed_words, torch_sampler
from gapless.sampling.base import MASS_BITS
from gapless.sampling.rng import uniform_numpy
from gapless.sampling.torch_sampler import inverse_cdf, kept_mass, weights

CPU = torch.device("cpu")


def tables_of(
    rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: list[int] | None = None,
) -> SamplingTables:
    """The same parameters in every row; seeds are the row numbers unless given."""
    tables = SamplingTables.allocate(rows, CPU)
    tables.temperature_R.fill_(temperature)
    tables.top_k_R.fill_(top_k)
    tables.top_p_R.fill_(top_p)
    tables.min_p_R.fill_(min_p)
    words = [seed_words(seed) for seed in (seeds if seeds is not None else range(rows))]
    tables.seed_R2.copy_(torch.tensor(words, dtype=torch.int32))
    return tables


def draw(logits_EV: Tensor, tables: SamplingTables, first_position: int = 0) -> list[int]:
    """One token per entry, each from its own row."""
    rows_E = torch.arange(logits_EV.shape[0], dtype=torch.int32)
    tokens_E = TorchSampler().sample(logits_EV, rows_E, rows_E + first_position, tables, all_greedy=False)
    assert tokens_E.dtype == torch.int32
    return tokens_E.tolist()


def draw_row(logits_EV: Tensor, tables: SamplingTables, row: int) -> int:
    """The token of one entry that is sampled alone, from its own row."""
    row_E = torch.tensor([row], dtype=torch.int32)
    return int(TorchSampler().sample(logits_EV[row : row + 1], row_E, row_E, tables, all_greedy=False))


def kept(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[np.int64]:
    mass_NV = kept_mass(
        logits_V[None],
        torch.tensor([temperature]),
        torch.tensor([top_k], dtype=torch.int32),
        torch.tensor([top_p]),
        torch.tensor([min_p]),
    )
    return mass_NV[0].numpy()


def brute_force(
    logits: NDArray[np.float64], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[NDArray[np.float64], bool]:
    """The filtered distribution in float64, token by token; and whether a filter's edge is too close to call."""
    weight = np.exp((logits - logits.max()) / temperature)
    alive = np.ones(len(logits), dtype=bool)
    if 0 < top_k < len(logits):
        alive &= logits >= sorted(logits)[-top_k]
    close = False
    if top_p < 1.0:
        total = weight[alive].sum()
        reached, threshold = 0.0, -math.inf
        for token in sorted(np.flatnonzero(alive), key=lambda t: -logits[t]):
            reached += weight[token]
            close |= abs(reached / total - top_p) < 1e-5
            threshold = logits[token]
            if reached >= top_p * total:
                break
        alive &= logits >= threshold
    if min_p > 0.0:
        alive &= weight >= min_p
        close |= bool((np.abs(weight / min_p - 1) < 1e-5).any()) and min_p < 1.0
    weight = np.where(alive, weight, 0.0)
    return weight / weight.sum(), close


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.sampled_from([0.1, 0.7, 1.0, 1.7, 10.0]),
    st.sampled_from([0, 1, 2, 5, 59, 1000]),
    st.sampled_from([1.0, 0.99, 0.8, 0.25, 0.001]),
    st.sampled_from([0.0, 0.01, 0.2, 0.9]),
    st.booleans(),
)
def test_the_reference_agrees_with_brute_force_in_float64(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, ties: bool
):
    logits = np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)
    if ties:
        logits = logits.round()
    exact, close = brute_force(logits.astype(np.float64), temperature, top_k, top_p, min_p)
    if close:
        return
    mass = kept(torch.from_numpy(logits), temperature, top_k, top_p, min_p)
    share = mass / mass.sum()
    least = 2.0**-42 * exact.max()
    clear = (exact < least / 2) | (exact > least * 2)  # of the border below which a token has no mass
    assert np.array_equal((mass > 0)[clear], (exact > least)[clear])
    assert np.abs(share - exact).max() < 3e-6
    uniform = int(uniform_numpy(np.array(seed, np.uint64), np.array(0)))
    token = int(inverse_cdf(torch.from_numpy(mass[None]), torch.tensor([uniform])))
    before = np.cumsum(exact)[token] - exact[token]
    assert exact[token] > 0
    assert before - 1e-5 <= uniform / 2**62 <= before + exact[token] + 1e-5


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (20, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (40, 0.9, 0.03)]
)
def test_the_kept_tokens_are_those_of_transformers(top_k: int, top_p: float, min_p: float):
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(1)
    for temperature in (0.6, 1.0, 1.4):
        logits_EV = torch.randn(8, 500, generator=generator) * 2
        scores_EV = TemperatureLogitsWarper(temperature)(torch.empty(0), logits_EV)  # type: ignore[arg-type]
        if top_k:
            scores_EV = TopKLogitsWarper(top_k)(torch.empty(0), scores_EV)  # type: ignore[arg-type]
        if top_p < 1.0:
            scores_EV = TopPLogitsWarper(top_p)(torch.empty(0), scores_EV)  # type: ignore[arg-type]
        if min_p > 0.0:
            scores_EV = MinPLogitsWarper(min_p)(torch.empty(0), scores_EV)  # type: ignore[arg-type]
        for logits_V, scores_V in zip(logits_EV, scores_EV, strict=True):
            mass = kept(logits_V, temperature, top_k, top_p, min_p)
            assert np.array_equal(mass > 0, (scores_V > -math.inf).numpy())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (1.0, 7, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.1)],
)
def test_frequencies_match_the_filtered_distribution(temperature: float, top_k: int, top_p: float, min_p: float):
    draws, vocab = 20_000, 40
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    tables = tables_of(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=[99])
    rows_E, positions_E = torch.zeros(draws, dtype=torch.int32), torch.arange(draws, dtype=torch.int32)
    # one distribution, many positions: the masses once, then what the sampler does with them
    mass = torch.from_numpy(kept(logits_V, temperature, top_k, top_p, min_p))
    uniform_E = torch.from_numpy(uniform_numpy(np.array(99, np.uint64), positions_E.numpy()))
    tokens_E = inverse_cdf(mass.expand(draws, vocab), uniform_E)
    some = slice(0, 500)
    whole = TorchSampler().sample(
        logits_V.expand(500, vocab).contiguous(), rows_E[some], positions_E[some], tables, all_greedy=False
    )
    assert torch.equal(whole, tokens_E[some])
    exact, _ = brute_force(logits_V.numpy().astype(np.float64), temperature, top_k, top_p, min_p)
    counts = np.bincount(tokens_E.numpy(), minlength=vocab)
    expected = exact * draws
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    freedom = (expected > 0).sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_token_depends_on_seed_and_position_only():
    generator = torch.Generator().manual_seed(5)
    logits_EV = torch.randn(12, 300, generator=generator)
    tables = tables_of(20, temperature=1.0)
    tables.temperature_R[:4] = 0.0
    tables.top_p_R[4:8] = 0.7
    rows_E = torch.arange(12, dtype=torch.int32)
    positions_E = torch.arange(100, 112, dtype=torch.int32)
    tokens_E = TorchSampler().sample(logits_EV, rows_E, positions_E, tables, all_greedy=False)

    order_E = torch.randperm(12, generator=generator)
    permuted_E = TorchSampler().sample(
        logits_EV[order_E], rows_E[order_E], positions_E[order_E], tables, all_greedy=False
    )
    assert torch.equal(permuted_E, tokens_E[order_E])

    for entry in range(12):
        alone = SamplingTables.allocate(3, CPU)  # another row, another batch
        alone.temperature_R[1] = tables.temperature_R[entry]
        alone.top_p_R[1] = tables.top_p_R[entry]
        alone.seed_R2[1] = tables.seed_R2[entry]
        token = TorchSampler().sample(
            logits_EV[entry : entry + 1],
            torch.tensor([1], dtype=torch.int32),
            positions_E[entry : entry + 1],
            alone,
            all_greedy=False,
        )
        assert token.tolist() == [int(tokens_E[entry])]


@pytest.mark.parametrize("elements", [1, 300, 1000, 3000])
def test_a_row_gets_the_same_token_in_whatever_chunk_it_is_worked_on(elements: int, monkeypatch: pytest.MonkeyPatch):
    logits_EV = torch.randn(10, 300, generator=torch.Generator().manual_seed(6))
    tables = tables_of(10, top_p=0.95)
    tables.temperature_R[2] = 0.0  # chunks count the random rows only
    alone = [draw_row(logits_EV, tables, row) for row in range(10)]
    assert len(set(alone)) > 7  # so that the random number of another row would be seen
    monkeypatch.setattr(torch_sampler, "CHUNK_ELEMENTS", elements)
    assert draw(logits_EV, tables) == alone


def test_seed_and_position_both_change_the_stream():
    flat_EV = torch.zeros(64, 1000)
    base = draw(flat_EV, tables_of(64, seeds=[1] * 64))
    assert len(set(base)) > 50
    assert draw(flat_EV, tables_of(64, seeds=[1] * 64)) == base
    assert draw(flat_EV, tables_of(64, seeds=[2] * 64)) != base
    assert draw(flat_EV, tables_of(64, seeds=[1 + 2**32] * 64)) != base
    assert draw(flat_EV, tables_of(64, seeds=[1] * 64), first_position=1) == [
        *base[1:],
        *draw(flat_EV[:1], tables_of(64, seeds=[1] * 64), first_position=64),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("all_greedy", [True, False])
def test_greedy_takes_the_lowest_index_among_equals(dtype: torch.dtype, all_greedy: bool):
    logits_EV = torch.zeros(4, 5000, dtype=dtype)
    logits_EV[1, [70, 4097, 4999]] = 2.0
    logits_EV[2] = -0.0
    logits_EV[2, 17] = 0.0
    logits_EV[3, 4999] = 1.0
    rows_E = torch.arange(4, dtype=torch.int32)
    tokens_E = TorchSampler().sample(logits_EV, rows_E, rows_E, tables_of(4, temperature=0.0), all_greedy=all_greedy)
    assert tokens_E.tolist() == [0, 70, 0, 4999]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_never_sampled_and_an_empty_row_gives_token_zero(temperature: float):
    logits_EV = torch.full((5, 50), math.nan)
    logits_EV[1] = -math.inf
    logits_EV[2, 30] = -1e30
    logits_EV[3, 31] = math.inf
    logits_EV[4, 32] = -math.inf
    logits_EV[4, 33] = 5.0
    assert draw(logits_EV, tables_of(5, temperature=temperature)) == [0, 0, 30, 31, 33]
    filtered = tables_of(5, temperature=temperature, top_k=3, top_p=0.5, min_p=0.2)
    assert draw(logits_EV, filtered) == [0, 0, 30, 31, 33]


@pytest.mark.parametrize(
    "parameters",
    [{"temperature": 1e-3}, {"temperature": 1e-38}, {"top_p": 1e-30}, {"top_k": 1}, {"min_p": 1.0}],
)
def test_parameters_that_leave_one_token_give_the_greedy_one(parameters: dict[str, float]):
    logits_EV = torch.randn(30, 800, generator=torch.Generator().manual_seed(2)) * 5
    tables = tables_of(30, **parameters)  # type: ignore[arg-type]
    assert draw(logits_EV, tables) == logits_EV.argmax(1).tolist()


def test_filters_that_keep_everything_change_nothing():
    logits_EV = torch.randn(30, 800, generator=torch.Generator().manual_seed(2))
    assert draw(logits_EV, tables_of(30, top_k=10**6)) == draw(logits_EV, tables_of(30))
    assert draw(logits_EV, tables_of(30, top_k=800)) == draw(logits_EV, tables_of(30))


def test_tokens_that_tie_with_the_last_one_kept_are_kept():
    logits_V = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0, -0.0])
    assert (kept(logits_V, 1.0, 2, 1.0, 0.0) > 0).tolist() == [False, True, True, True, True, False, False]
    assert (kept(logits_V, 1.0, 0, 0.6, 0.0) > 0).tolist() == [False, True, True, True, True, False, False]
    assert (kept(logits_V, 1.0, 6, 1.0, 0.0) > 0).all()  # 0.0 and -0.0 tie


def test_the_ends_of_the_unit_interval_give_the_first_and_last_kept_token():
    mass_NV = torch.tensor([[0, 0, 3, 0, 2**42, 1, 0]] * 2)
    assert inverse_cdf(mass_NV, torch.tensor([0, 2**62 - 1])).tolist() == [2, 5]


def test_weights_are_close_to_exp_and_never_above_one():
    logits_NV = torch.linspace(-29.0, 0.0, 100_001)[None]
    weight_NV = weights(logits_NV, torch.ones(1))
    exact_NV = logits_NV.double().exp()
    assert float((weight_NV / exact_NV - 1).abs().max()) < 3e-6
    near = logits_NV > -0.3
    assert float((weight_NV / exact_NV - 1).abs()[near].max()) < 2e-7
    assert float(weight_NV.max()) == 1.0
    assert int(kept(torch.tensor([0.0, -math.log(2) * (MASS_BITS + 1)]), 1.0, 0, 1.0, 0.0)[1]) == 0


def test_logits_of_the_wrong_shape_or_type_are_refused():
    tables, rows_E = tables_of(2), torch.zeros(2, dtype=torch.int32)
    for bad in (torch.zeros(5), torch.zeros(5, 2).T, torch.zeros(2, 0), torch.zeros(2, 5, dtype=torch.float64)):
        with pytest.raises(InternalError):
            TorchSampler().sample(bad, rows_E, rows_E, tables, all_greedy=False)


def test_a_device_without_triton_gets_the_torch_sampler():
    assert isinstance(make_sampler(CPU), TorchSampler)
