"""Run by test_triton_interpreter.py in a process of its own: the Triton sampler, interpreted, against the reference.

A process of its own because Triton decides on import whether its functions are interpreted.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch

from gapless.sampling.base import SamplingTables
from gapless.sampling.rng import seed_words
from gapless.sampling.torch_sampler import TorchSampler
from gapless.sampling.triton_kernels import choose_kernel
from gapless.sampling.triton_sampler import TritonSampler

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


def main() -> None:
    assert type(choose_kernel).__name__ == "InterpretedFunction", type(choose_kernel)
    generator = torch.Generator().manual_seed(0)
    reference, compared = TorchSampler(), 0
    for kind, (vocab, block, dtype) in enumerate(
        [
            (1, 64, torch.float32),
            (37, 64, torch.float32),
            (1000, 256, torch.float32),
            (1537, 512, torch.float32),
            (1300, 2048, torch.bfloat16),
            (777, 256, torch.float16),
        ]
    ):
        tables = random_tables(generator)
        whole = torch.empty(ENTRIES, vocab + 3, dtype=dtype)  # rows of a wider buffer
        logits_EV = whole[:, :vocab]
        logits_EV.copy_(random_logits(kind, vocab, dtype, generator))
        rows_E = torch.randperm(ROWS, generator=generator)[:ENTRIES].int()
        positions_E = torch.randint(2**31 - 1, (ENTRIES,), generator=generator).int()
        expected_E = reference.sample(logits_EV, rows_E, positions_E, tables, all_greedy=False)
        tokens_E = TritonSampler(block).sample(logits_EV, rows_E, positions_E, tables, all_greedy=False)
        assert tokens_E.dtype == torch.int32
        assert torch.equal(tokens_E, expected_E), (vocab, block, dtype, tokens_E, expected_E)
        compared += ENTRIES
    print(f"agreed on {compared} tokens")  # noqa: T201


if __name__ == "__main__":
    main()
