from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapless.sampling.rng import UNIFORM_BITS, philox_numpy, scale_torch, seed_words, uniform_numpy, uniform_torch


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter: list[int], key: list[int], expected: list[int]):
    assert philox_numpy(np.array(counter), np.array(key)).tolist() == expected


def test_the_torch_numbers_equal_the_numpy_ones_bit_for_bit():
    generator = np.random.default_rng(0)
    seeds = generator.integers(0, 2**64, 2000, dtype=np.uint64)
    seeds[:4] = 0, 2**64 - 1, 2**31, 2**63
    positions = generator.integers(0, 2**31, 2000)
    positions[:3] = 0, 2**31 - 1, 1
    words = torch.tensor([seed_words(int(seed)) for seed in seeds], dtype=torch.int32)
    numbers = uniform_torch(words, torch.from_numpy(positions).int())
    assert np.array_equal(numbers.numpy(), uniform_numpy(seeds, positions))


def test_the_numbers_are_uniform_and_use_all_their_bits():
    numbers = uniform_numpy(np.array(7, np.uint64), np.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 2**UNIFORM_BITS
    counts = np.bincount(numbers >> (UNIFORM_BITS - 8), minlength=256)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 255 + 5 * np.sqrt(2 * 255)
    for bit in range(UNIFORM_BITS):
        assert 0.49 < ((numbers >> bit) & 1).mean() < 0.51


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**62 - 1), st.integers(0, 2**62 - 1))
def test_scaling_is_the_exact_floor_of_the_product(uniform: int, total: int):
    scaled = scale_torch(torch.tensor([uniform]), torch.tensor([total]))
    assert scaled.tolist() == [uniform * total >> UNIFORM_BITS]


def test_seed_words_hold_all_64_bits():
    for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1):
        low, high = seed_words(seed)
        assert (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 == seed
        assert -(2**31) <= low < 2**31
        assert -(2**31) <= high < 2**31
