from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gapless.sampling import SamplingTables, TorchSampler, make_sampler, seed_words, torch_features, torch_logprobs
from gapless.sampling.features import BAD_WORDS, PENALTIES
from gapless.sampling.logprobs import Logprobs
from support.features import Case, random_features, random_history, random_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROWS = 48


def mixed_tables(rows: int, device: torch.device) -> SamplingTables:
    tables = SamplingTables.allocate(rows, device)
    modes = torch.arange(rows, device=device) % 5
    tables.temperature_R.copy_(torch.where(modes == 0, 0.0, 0.9))
    tables.top_k_R.copy_(torch.where(modes == 2, 40, 0))
    tables.top_p_R.copy_(torch.where(modes == 3, 0.9, 1.0))
    tables.min_p_R.copy_(torch.where(modes == 4, 0.05, 0.0))
    tables.seed_R2.copy_(torch.tensor([seed_words(row * 2**40 + 7) for row in range(rows)]))
    return tables


def answers(found: Logprobs) -> tuple[Tensor, Tensor, Tensor]:
    return found.ids_LK.cpu(), found.ranks_L.cpu(), found.logprobs_LK.cpu()


@pytest.mark.parametrize("vocab", [1000, 50257, 128256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gpu_counts_edits_and_chooses_as_the_reference_does(vocab: int, dtype: torch.dtype):
    from gapless.sampling import triton_features
    from gapless.sampling.triton_features import EditTiles

    rng = np.random.default_rng(vocab)
    case = Case.random(rng, ROWS, vocab)
    expected = case.tables(np.random.default_rng(1), CPU, torch_features)
    tables = case.tables(np.random.default_rng(1), GPU, triton_features)
    flags = expected.flags_R
    for (name, table), (_, reference) in zip(tables.by_name(), expected.by_name(), strict=True):
        needed = {"token counts": flags & PENALTIES != 0, "latest tokens": flags & BAD_WORDS != 0}
        assert torch.equal(table.cpu()[needed.get(name, flags == flags)], reference[needed.get(name, flags == flags)])

    logits_EV = random_logits(rng, ROWS, vocab, dtype)
    arguments = (logits_EV, case.rows_E, case.positions_E)
    on_gpu = (logits_EV.to(GPU), case.rows_E.to(GPU), case.positions_E.to(GPU))
    sampling, sampling_on_gpu = mixed_tables(ROWS + 1, CPU), mixed_tables(ROWS + 1, GPU)
    masks, masks_on_gpu = (case.masks(np.random.default_rng(2), device) for device in (CPU, GPU))
    edited_E = torch_features.edited_entries(case.rows_E, expected, masks)
    edited_EV = torch_features.edit_logits(*arguments, expected, masks)
    edited = triton_features.edit_logits(*on_gpu, tables, masks_on_gpu, EditTiles())
    assert torch.equal(edited.where_E.cpu(), edited_E.int())
    assert torch.equal(edited.logits_EV.cpu()[edited_E], edited_EV[edited_E])
    tokens_E = make_sampler(GPU).sample(*on_gpu, sampling_on_gpu, all_greedy=False, features=tables, masks=masks_on_gpu)
    expected_E = TorchSampler().sample(*arguments, sampling, all_greedy=False, features=expected, masks=masks)
    assert torch.equal(tokens_E.cpu(), expected_E)


@pytest.mark.parametrize("vocab", [300, 50257, 128256])
def test_the_gpu_gives_the_logprobs_of_the_reference(vocab: int):
    from gapless.sampling import triton_logprobs

    rng = np.random.default_rng(vocab)
    lines_LV = random_logits(rng, 64, vocab, torch.bfloat16)
    targets_L = torch.from_numpy(rng.integers(-1, vocab, 64).astype(np.int32))
    wanted_L = torch.from_numpy(rng.integers(-1, 21, 64).astype(np.int32))
    expected_ids, expected_ranks, expected = answers(torch_logprobs.logprobs(lines_LV, targets_L, wanted_L))
    for _ in range(2):
        found = triton_logprobs.logprobs(lines_LV.cuda(), targets_L.cuda(), wanted_L.cuda())
        ids, ranks, values = answers(found)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(ranks, expected_ranks)
        # the reference's own sum of 128,256 terms strays by 2.2e-5 from one in float64
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=5e-5)


def test_one_captured_graph_serves_any_mix_of_features():
    from gapless.sampling import triton_features, triton_logprobs

    vocab = 5000
    rng = np.random.default_rng(5)
    case = Case.random(rng, ROWS, vocab)
    tables = case.tables(rng, GPU, triton_features)
    logits_EV = random_logits(rng, ROWS, vocab, torch.bfloat16).to(GPU)
    rows_E, positions_E, fed_E = case.rows_E.to(GPU), case.positions_E.to(GPU), torch.zeros_like(case.rows_E).to(GPU)
    sampling = mixed_tables(ROWS + 1, GPU)
    sampler = make_sampler(GPU)

    def step() -> tuple[Tensor, Logprobs]:
        triton_features.count_tokens(fed_E, rows_E, positions_E - 1, tables)
        tokens_E = sampler.sample(logits_EV, rows_E, positions_E, sampling, all_greedy=False, features=tables)
        return tokens_E, triton_logprobs.logprobs(logits_EV, tokens_E, tables.num_logprobs_R.index_select(0, rows_E))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_E, found = step()
    for round_ in range(4):
        histories = [random_history(rng, vocab) for _ in range(ROWS)]
        case = Case(vocab, [random_features(rng, vocab, history) for history in histories], histories)
        # all but the last token of each row, which the graph counts
        before = Case(vocab, case.features, [history[:-1] for history in histories])
        expected = before.tables(np.random.default_rng(round_), CPU, torch_features)
        fresh = before.tables(np.random.default_rng(round_), GPU, triton_features)
        for (_, table), (_, new) in zip(tables.by_name(), fresh.by_name(), strict=True):
            table.copy_(new)
        positions_E.copy_(case.positions_E)
        fed_E.copy_(torch.tensor([int(history[-1]) for history in histories]))
        logits_EV.normal_(0, 3)
        graph.replay()
        torch_features.count_tokens(fed_E.cpu(), case.rows_E, case.positions_E - 1, expected)
        expected_E = TorchSampler().sample(
            logits_EV.cpu(),
            case.rows_E,
            case.positions_E,
            mixed_tables(ROWS + 1, CPU),
            all_greedy=False,
            features=expected,
        )
        assert torch.equal(tokens_E.cpu(), expected_E)
        reference = torch_logprobs.logprobs(logits_EV.cpu(), expected_E, expected.num_logprobs_R[:ROWS])
        assert torch.equal(answers(found)[0], answers(reference)[0])
