"""Run by test_triton_interpreter.py in a process of its own: the Triton sampler, interpreted, against the reference.

A process of its own because Triton decides on import whether its functions are interpreted.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from gapless.sampling.base import SamplingTables
from gapless.sampling.rng import scale_torch, seed_words, uniform_torch
from gapless.sampling.torch_sampler import TorchSampler
from gapless.sampling.triton_kernels import choose_kernel
from gapless.sampling.triton_math import scale, uniform_halves
from gapless.sampling.triton_sampler import SamplerTiles, TritonSampler
from support.effort import effort
from support.interpreted import look_for_builtins_once

# ruff: noqa: ANN001
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
ENTRIES = 24
ROWS = 40


def random_tables(generator: torch.Generator) -> SamplingTables:
    """Every kind of row: greedy, random, each filter, all filters."""
    tables = SamplingTables.allocate(ROWS, torch.device("cpu"))

    def chosen(values: list[float]) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (ROWS,), generator=generator)]

    tables.temperature_R.copy_(chosen([0.0, 1e-35, 1e-3, 0.5, 1.0, 1.0, 2.0, 100.0]))
    tables.top_k_R.copy_(chosen([0, 0, 0, 1, 2, 17, 300, 10**6]).int())
    tables.top_p_R.copy_(chosen([1.0, 1.0, 1e-9, 0.3, 0.9, 0.99, 1 - 2**-24]))
    tables.min_p_R.copy_(chosen([0.0, 0.0, 0.05, 0.5, 1.0]))
    for row in range(ROWS):
        seed = int(torch.randint(2**62, (1,), generator=generator)) * 4 + row % 4
        tables.seed_R2[row] = torch.tensor(seed_words(seed), dtype=torch.int32)
    return tables


def random_logits(kind: int, vocab: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    logits_EV = torch.randn(ENTRIES, vocab, generator=generator) * (0.0, 1.0, 4.0, 30.0)[kind % 4]
    logits_EV[1] -= 50.0  # all negative
    logits_EV[2] += 1e4
    logits_EV[3] = logits_EV[3].round()  # ties
    logits_EV[4, 1:] = -torch.inf
    logits_EV[5] = -torch.inf
    logits_EV[6] = torch.nan
    logits_EV[7, ::3] = torch.nan
    logits_EV[8, ::2] = -torch.inf
    logits_EV[9, vocab // 2] = torch.inf
    logits_EV[10] = torch.where(torch.rand(vocab, generator=generator) < 0.5, 0.0, -0.0)
    logits_EV[11] *= 1e-6
    return logits_EV.to(dtype)


@triton.jit
def numbers_kernel(seed_ptr, position_ptr, total_ptr, uniform_ptr, scaled_ptr):
    index = tl.program_id(0)
    u1, u0 = uniform_halves(
        tl.load(seed_ptr + 2 * index), tl.load(seed_ptr + 2 * index + 1), tl.load(position_ptr + index)
    )
    tl.store(uniform_ptr + index, (u1 << 31 | u0).to(tl.int64))
    tl.store(scaled_ptr + index, scale(u1, u0, tl.load(total_ptr + index)))


def check_numbers(generator: torch.Generator) -> None:
    """Random integers and their exact scaling, bit for bit."""
    count = 300
    seeds_E2 = torch.randint(-(2**31), 2**31, (count, 2), generator=generator).int()
    positions_E = torch.randint(2**31, (count,), generator=generator).int()
    total_E = torch.randint(2**62, (count,), generator=generator) >> torch.arange(count) % 60
    total_E[0] = 2**62 - 1
    uniform_E, scaled_E = torch.empty_like(total_E), torch.empty_like(total_E)
    kernel: Any = numbers_kernel
    kernel[(count,)](seeds_E2, positions_E, total_E, uniform_E, scaled_E)
    assert torch.equal(uniform_E, uniform_torch(seeds_E2, positions_E))
    assert torch.equal(scaled_E, scale_torch(uniform_E, total_E))


def compare(logits_EV: torch.Tensor, tables: SamplingTables, tiles: SamplerTiles, generator: torch.Generator) -> int:
    """Samples from rows of a wider buffer and asserts that the tokens are the reference's; how many they are."""
    entries, vocab = logits_EV.shape
    whole = torch.zeros(entries, vocab + 3, dtype=logits_EV.dtype)
    whole[:, :vocab] = logits_EV
    rows_E = torch.randperm(tables.temperature_R.shape[0], generator=generator)[:entries].int()
    positions_E = torch.randint(2**31 - 1, (entries,), generator=generator).int()
    arguments = (whole[:, :vocab], rows_E, positions_E, tables)
    expected_E = TorchSampler().sample(*arguments, all_greedy=False)
    tokens_E = TritonSampler(tiles).sample(*arguments, all_greedy=False)
    assert tokens_E.dtype == torch.int32
    wrong = [(entry, int(rows_E[entry])) for entry in (tokens_E != expected_E).nonzero().flatten().tolist()]
    assert not wrong, (vocab, tiles, logits_EV.dtype, wrong, tokens_E, expected_E)
    return entries


# temperature, top_k, top_p, min_p
FILTERS = [
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.5, 0.3),
    (0.5, 0, 1e-12, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 100, 1.0, 0.0),
    (3.0, 120, 0.6, 0.0),
    (1.0, 100, 0.9, 0.02),
    (0.01, 20, 0.99, 0.0),
]


def hard_logits(vocab: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Rows on which good splitters are hard to find, or thresholds fall on ties."""
    noise_V = torch.randn(vocab, generator=generator)
    cluster_V = torch.where(noise_V > -2.0, noise_V * 1e-5, noise_V)  # too close together to be cut apart
    spikes_V = noise_V.clone()
    spikes_V[::97] += 6.0
    banned_V = noise_V.clone()
    banned_V[: vocab * 3 // 4] = -1e30
    return [
        cluster_V,
        torch.where(noise_V > 1.0, noise_V * 1e-5, -5.0 * noise_V.abs()),
        noise_V.round(),
        torch.full_like(noise_V, -3.0),
        (4.0 * noise_V).sort(descending=True).values,
        spikes_V,
        banned_V,
        30.0 * noise_V,
    ]


def check_filters(
    tiles: SamplerTiles,
    vocab: int,
    generator: torch.Generator,
    every: Sequence[tuple[float, int, float, float]] = FILTERS,
) -> int:
    """Filters on every kind of hard row."""
    rows = hard_logits(vocab, generator)
    compared = 0
    for filters in every:
        tables = SamplingTables.allocate(len(rows), torch.device("cpu"))
        temperature, top_k, top_p, min_p = filters
        tables.temperature_R.fill_(temperature)
        tables.top_k_R.fill_(top_k)
        tables.top_p_R.fill_(top_p)
        tables.min_p_R.fill_(min_p)
        tables.seed_R2.copy_(torch.randint(2**31, (len(rows), 2), generator=generator))
        compared += compare(torch.stack(rows), tables, tiles, generator)
    return compared


def main() -> None:
    assert type(choose_kernel).__name__ == "InterpretedFunction", type(choose_kernel)
    look_for_builtins_once()
    torch.use_deterministic_algorithms(True)  # fills scratch with NaN and the largest integers
    generator = torch.Generator().manual_seed(0)
    check_numbers(generator)
    compared = 0
    compared += check_filters(SamplerTiles(block=64), 132, generator, FILTERS[:: effort(2, 1)])
    compared += check_filters(SamplerTiles(block=64, segment=16, programs=1, group=4), 130, generator, FILTERS[1::3])
    for kind, (vocab, block, dtype) in enumerate(
        [
            (1, 64, torch.float32),
            (37, 64, torch.float32),
            (400, 128, torch.float32),
            (300, 512, torch.bfloat16),
            (233, 128, torch.float16),
        ]
    ):
        logits_EV = random_logits(kind, vocab, dtype, generator)
        compared += compare(logits_EV, random_tables(generator), SamplerTiles(block=block), generator)
    print(f"agreed on {compared} tokens")


if __name__ == "__main__":
    main()
