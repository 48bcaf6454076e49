from __future__ import annotations

import pytest
import torch

from gapless.sampling import SamplingTables, TorchSampler, make_sampler, seed_words

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODES = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (1.0, 50, 1.0, 0.0),
    (1.3, 200, 0.95, 0.02),
    (1.0, 0, 1.0, 0.1),
]


def mixed_tables(rows: int) -> SamplingTables:
    tables = SamplingTables.allocate(rows, torch.device("cpu"))
    for row in range(rows):
        temperature, top_k, top_p, min_p = MODES[row % len(MODES)]
        tables.temperature_R[row] = temperature
        tables.top_k_R[row] = top_k
        tables.top_p_R[row] = top_p
        tables.min_p_R[row] = min_p
        tables.seed_R2[row] = torch.tensor(seed_words(row * 2**40 + 7), dtype=torch.int32)
    return tables


def on_gpu(tables: SamplingTables) -> SamplingTables:
    return SamplingTables(
        tables.temperature_R.cuda(),
        tables.top_k_R.cuda(),
        tables.top_p_R.cuda(),
        tables.min_p_R.cuda(),
        tables.seed_R2.cuda(),
    )


@pytest.mark.parametrize("vocab", [1000, 49152, 128256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_gpu_chooses_the_tokens_that_the_cpu_reference_chooses(vocab: int, dtype: torch.dtype):
    entries = 24
    logits_EV = (torch.randn(entries, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)
    logits_EV[3] = -torch.inf
    logits_EV[4, ::2] = torch.nan
    tables, rows_E = mixed_tables(entries), torch.arange(entries, dtype=torch.int32)
    positions_E = rows_E * 17
    expected_E = TorchSampler().sample(logits_EV, rows_E, positions_E, tables, all_greedy=False)
    sampler = make_sampler(torch.device("cuda"))
    arguments = (logits_EV.cuda(), rows_E.cuda(), positions_E.cuda(), on_gpu(tables))
    assert torch.equal(sampler.sample(*arguments, all_greedy=False).cpu(), expected_E)
    reference_E = TorchSampler().sample(*arguments, all_greedy=False)
    assert torch.equal(reference_E.cpu(), expected_E)


def test_one_captured_graph_serves_any_mix_of_parameters():
    entries, vocab = 16, 5000
    logits_EV = torch.randn(entries, vocab, device="cuda") * 3
    rows_E = torch.arange(entries, dtype=torch.int32, device="cuda")
    positions_E = rows_E.clone()
    tables = on_gpu(mixed_tables(entries))
    sampler = make_sampler(torch.device("cuda"))
    sampler.sample(logits_EV, rows_E, positions_E, tables, all_greedy=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_E = sampler.sample(logits_EV, rows_E, positions_E, tables, all_greedy=False)
    for shift in range(len(MODES)):
        for table in (tables.temperature_R, tables.top_k_R, tables.top_p_R, tables.min_p_R):
            table.copy_(table.roll(1))
        positions_E += shift
        logits_EV.normal_(0, 3)
        graph.replay()
        expected_E = TorchSampler().sample(logits_EV, rows_E, positions_E, tables, all_greedy=False)
        assert torch.equal(tokens_E, expected_E)
