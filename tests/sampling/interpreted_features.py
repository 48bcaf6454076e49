"""Run by test_features_interpreter.py in a process of its own: the kernels of features against the reference."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import numpy as np
import pytest
import torch

from gapless.sampling import (
    SamplingTables,
    TorchSampler,
    torch_features,
    torch_logprobs,
    triton_features,
    triton_logprobs,
)
from gapless.sampling.features import StepMasks
from gapless.sampling.records import RowFeatures
from gapless.sampling.triton_features import EditTiles
from gapless.sampling.triton_logprobs import LogprobTiles
from gapless.sampling.triton_sampler import SamplerTiles, TritonSampler
from support.effort import and_thoroughly
from support.features import Case, random_logits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of an overflow; a GPU gives infinity

CPU = torch.device("cpu")
ROWS = 16


@pytest.fixture(autouse=True)
def scratch_is_filled() -> None:
    torch.use_deterministic_algorithms(True)  # with NaN and the largest integers


def sampling_tables(rng: np.random.Generator, rows: int) -> SamplingTables:
    tables = SamplingTables.allocate(rows, CPU)
    tables.temperature_R.copy_(torch.from_numpy(rng.choice([0.0, 0.7, 2.0], rows)))
    tables.top_k_R.copy_(torch.from_numpy(rng.choice([0, 0, 3, 40], rows)))
    tables.top_p_R.copy_(torch.from_numpy(rng.choice([1.0, 0.9, 0.5], rows)))
    tables.min_p_R.copy_(torch.from_numpy(rng.choice([0.0, 0.1], rows)))
    tables.seed_R2.copy_(torch.from_numpy(rng.integers(0, 2**31, (rows, 2))))
    return tables


@pytest.mark.parametrize(("seed", "vocab"), [(0, 37), (1, 37), (2, 700)])
def test_tables_are_those_of_the_reference(seed: int, vocab: int):
    case = Case.random(np.random.default_rng(seed), ROWS, vocab)
    expected = case.tables(np.random.default_rng(seed), CPU, torch_features)
    tables = case.tables(np.random.default_rng(seed), CPU, triton_features)
    for (name, table), (_, reference) in zip(tables.by_name(), expected.by_name(), strict=True):
        flags = expected.flags_R
        needed = {"token counts": flags & 1 != 0, "latest tokens": flags & 16 != 0}.get(name, flags == flags)
        assert torch.equal(table[needed], reference[needed]), name


@pytest.mark.parametrize(
    ("vocab", "block", "programs", "dtype"),
    [
        (37, 64, 64, torch.float32),
        (37, 16, 64, torch.float16),
        (700, 64, 40, torch.float32),
        (530, 128, 1000, torch.bfloat16),
    ],
)
def test_edited_logits_are_those_of_the_reference_bit_for_bit(
    vocab: int, block: int, programs: int, dtype: torch.dtype
):
    rng = np.random.default_rng(vocab)
    case = Case.random(rng, ROWS, vocab)
    tables, masks = case.tables(rng, CPU, torch_features), case.masks(rng, CPU)
    logits_EV = random_logits(rng, ROWS, vocab + 3, dtype)[:, :vocab]
    for step_masks in (masks, None):
        edited_E = torch_features.edited_entries(case.rows_E, tables, step_masks)
        expected_EV = torch_features.edit_logits(logits_EV, case.rows_E, case.positions_E, tables, step_masks)
        tiles = EditTiles(block=block, programs=programs)
        edited = triton_features.edit_logits(logits_EV, case.rows_E, case.positions_E, tables, step_masks, tiles)
        assert torch.equal(edited.where_E, edited_E.int())
        assert 0 < edited_E.sum() < ROWS
        assert torch.equal(edited.logits_EV[edited_E], expected_EV[edited_E])


@pytest.mark.parametrize(("vocab", "dtype"), [(37, torch.float32), (200, torch.bfloat16), (200, torch.float16)])
def test_tokens_are_those_of_the_reference(vocab: int, dtype: torch.dtype):
    rng = np.random.default_rng(vocab)
    case = Case.random(rng, ROWS, vocab)
    features, masks = case.tables(rng, CPU, torch_features), case.masks(rng, CPU)
    logits_EV = random_logits(rng, ROWS, vocab, dtype)
    tables = sampling_tables(rng, ROWS + 1)
    sampler = TritonSampler(SamplerTiles(block=128), EditTiles(block=64, programs=40))
    arguments = (logits_EV, case.rows_E, case.positions_E, tables)
    for step_masks in (masks, None):
        expected_E = TorchSampler().sample(*arguments, all_greedy=False, features=features, masks=step_masks)
        tokens_E = sampler.sample(*arguments, all_greedy=False, features=features, masks=step_masks)
        assert torch.equal(tokens_E, expected_E)
        plain_E = ~torch_features.edited_entries(case.rows_E, features, step_masks)
        assert torch.equal(TorchSampler().sample(*arguments, all_greedy=False)[plain_E], tokens_E[plain_E])


def test_a_threshold_falls_between_edited_logits_that_the_type_of_the_others_can_not_tell_apart():
    bias = {token: 1.0 + token * 1e-4 for token in range(0, 90, 2)}
    row = RowFeatures(prompt_len=1, bias=bias)
    case = Case(90, [row] * ROWS, [np.asarray([5], dtype=np.int32)] * ROWS)
    features = case.tables(np.random.default_rng(0), CPU, triton_features)
    tables = sampling_tables(np.random.default_rng(1), ROWS + 1)
    tables.temperature_R.fill_(1.0)
    tables.top_k_R.fill_(3)
    arguments = (torch.zeros(ROWS, 90, dtype=torch.bfloat16), case.rows_E, case.positions_E, tables)
    tokens_E = TritonSampler(SamplerTiles(block=32)).sample(*arguments, all_greedy=False, features=features)
    assert set(tokens_E.tolist()) <= {84, 86, 88}
    assert torch.equal(tokens_E, TorchSampler().sample(*arguments, all_greedy=False, features=features))


FINE = [0, *(token for token in range(0, 60, 2) for _ in range(token // 2 + 1))]  # the larger, the more often
OVERFLOW = torch.zeros(1, 90, dtype=torch.bfloat16).index_fill(1, torch.tensor([5, 6]), 3e38)


@pytest.mark.parametrize(
    ("row", "history", "logits_1V"),
    [
        (RowFeatures(prompt_len=1, frequency=-1e-4), FINE, torch.ones(1, 90, dtype=torch.bfloat16)),
        (RowFeatures(prompt_len=2, repetition=0.01), [5, 6], OVERFLOW),
        (RowFeatures(prompt_len=1, repetition=1.3, presence=0.2), FINE, torch.linspace(-2, 2, 90)[None]),
        (RowFeatures(prompt_len=1, masked=True), [5], torch.linspace(-2, 2, 90)[None]),
    ],
    ids=["finer than the type", "larger than the type", "penalties", "a mask that is not there"],
)
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (1.0, 3)])
def test_logits_that_are_edited_in_passing_give_the_tokens_of_the_reference(
    row: RowFeatures, history: list[int], logits_1V: torch.Tensor, temperature: float, top_k: int
):
    case = Case(90, [row] * 8, [np.asarray(history, dtype=np.int32)] * 8)
    features = case.tables(np.random.default_rng(0), CPU, triton_features)
    tables = sampling_tables(np.random.default_rng(1), 9)
    for table, value in ((tables.temperature_R, temperature), (tables.top_k_R, top_k), (tables.top_p_R, 1.0)):
        table.fill_(value)
    tables.min_p_R.zero_()
    lines_MW = torch.full((8, 3), -1, dtype=torch.int32)  # behind the step's one mask: they would allow everything
    masks = StepMasks(lines_MW[:1], torch.tensor([3, 0, 1, -1, 0, 2, 7, -1], dtype=torch.int32)) if row.masked else None
    arguments = (logits_1V.expand(8, 90).contiguous(), case.rows_E, case.positions_E, tables)
    expected_E = TorchSampler().sample(*arguments, all_greedy=False, features=features, masks=masks)
    sampler = TritonSampler(SamplerTiles(block=32))
    assert torch.equal(sampler.sample(*arguments, all_greedy=False, features=features, masks=masks), expected_E)


@pytest.mark.parametrize("programs", and_thoroughly([1, 500], [3]))
def test_log_probabilities_have_the_same_bits_however_the_lines_are_shared_out(programs: int):
    rng = np.random.default_rng(5)
    lines_LV = random_logits(rng, 12, 700, torch.float32)
    targets_L, wanted_L = torch.arange(12, dtype=torch.int32), torch.full((12,), 5, dtype=torch.int32)
    whole = triton_logprobs.logprobs(lines_LV, targets_L, wanted_L, tiles=LogprobTiles(block=64))
    tiles = LogprobTiles(block=64, programs=programs)
    alone = triton_logprobs.logprobs(lines_LV[3:4], targets_L[3:4], wanted_L[3:4], tiles=tiles)
    assert torch.equal(alone.logprobs_LK[0], whole.logprobs_LK[3])
    together = triton_logprobs.logprobs(lines_LV, targets_L, wanted_L, tiles=tiles)
    assert torch.equal(together.logprobs_LK, whole.logprobs_LK)


def test_an_edited_logit_may_be_larger_than_its_type_can_hold():
    case = Case(20, [RowFeatures(prompt_len=1, bias={1: 1e4})], [np.asarray([5], dtype=np.int32)])
    features = case.tables(np.random.default_rng(0), CPU, triton_features)
    logits_EV = torch.zeros(1, 20, dtype=torch.float16)
    logits_EV[0, :2] = torch.tensor([torch.inf, 6e4])
    arguments = (logits_EV, case.rows_E, case.positions_E, SamplingTables.allocate(2, CPU))
    assert TritonSampler().sample(*arguments, all_greedy=True, features=features).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "block"), [(1, 64), (10, 64), (300, 64), (700, 4096)])
def test_logprobs_are_those_of_the_reference(vocab: int, block: int, dtype: torch.dtype):
    rng = np.random.default_rng(vocab)
    lines_LV = random_logits(rng, 12, vocab + 3, dtype)[:, :vocab]
    wanted_L = torch.tensor([-1, 0, 1, 5, 20, 31, 20, 3, 0, -1, 20, 7], dtype=torch.int32).roll(3)
    targets_L = torch.from_numpy(rng.integers(0, vocab, 12).astype(np.int32))
    targets_L[5], targets_L[8] = -1, vocab
    expected = torch_logprobs.logprobs(lines_LV, targets_L, wanted_L)
    found = triton_logprobs.logprobs(lines_LV, targets_L, wanted_L, tiles=LogprobTiles(block=block))
    assert torch.equal(found.ids_LK, expected.ids_LK)
    assert torch.equal(found.ranks_L, expected.ranks_L)
    torch.testing.assert_close(found.logprobs_LK, expected.logprobs_LK, rtol=1e-6, atol=1e-5)
