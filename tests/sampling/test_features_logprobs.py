from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gapless.errors import InternalError
from gapless.sampling.features import MAX_LOGPROBS
from gapless.sampling.logprobs import LINE_NUMBERS, PLACES, Logprobs
from gapless.sampling.torch_logprobs import logprobs
from support.features import random_logits


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.lists(st.integers(-1, MAX_LOGPROBS), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_logprobs_are_those_of_log_softmax_and_topk(seed: int, vocab: int, wanted: list[int], dtype: torch.dtype):
    rng = np.random.default_rng(seed)
    lines = len(wanted)
    distinct_LV = np.stack([rng.permutation(vocab) for _ in wanted]).astype(np.float32) / 8 - 3
    lines_LV = torch.from_numpy(distinct_LV).to(dtype)
    targets_L = torch.from_numpy(rng.integers(0, vocab, lines).astype(np.int32))
    found = logprobs(lines_LV, targets_L, ints(*wanted))
    expected_LV = lines_LV.float().log_softmax(dim=1)
    for line, count in enumerate(wanted):
        values, ids = expected_LV[line].topk(min(max(count, 0), vocab))
        asked = 1 + len(ids) if count >= 0 else 0
        if asked:
            target = int(targets_L[line])
            assert found.ids_LK[line, :asked].tolist() == [target, *ids.tolist()]
            assert torch.equal(found.logprobs_LK[line, 1:asked], values)
            assert found.logprobs_LK[line, 0] == expected_LV[line, target]
            assert found.ranks_L[line] == 1 + (lines_LV[line] > lines_LV[line, target]).sum()
        assert (found.ids_LK[line, asked:] == -1).all()
        assert (found.logprobs_LK[line, asked:] == -math.inf).all()
        assert asked or found.ranks_L[line] == 0


def test_the_lower_id_comes_first_among_equals_and_ranks_say_the_places():
    lines_LV = torch.tensor([[1.0, 3.0, -0.0, 3.0, 0.0, 1.0]] * 6)
    found = logprobs(lines_LV, torch.arange(6, dtype=torch.int32), ints(*[6] * 6))
    assert found.ids_LK[0, 1:7].tolist() == [1, 3, 0, 5, 2, 4]
    for target in range(6):
        assert found.ids_LK[target, found.ranks_L[target]] == target


def test_logits_that_are_no_numbers_are_cleaned():
    lines_LV = torch.tensor([[math.nan, math.inf, 2.0], [math.nan, -math.inf, math.nan]])
    found = logprobs(lines_LV, ints(0, 1), ints(3, 2))
    assert found.ids_LK[0, :4].tolist() == [0, 1, 2, 0]
    assert found.logprobs_LK[0, :3].tolist() == [-math.inf, 0.0, -torch.finfo(torch.float32).max]
    assert found.ids_LK[1, :3].tolist() == [1, 0, 1]
    assert (found.logprobs_LK == found.logprobs_LK).all()
    assert found.logprobs_LK[1].max() == -math.inf


@pytest.mark.parametrize("target", [-1, 10, 2**31 - 1])
def test_a_target_that_is_no_token_has_no_rank(target: int):
    found = logprobs(torch.arange(10.0)[None], ints(target), ints(2))
    assert found.ids_LK[0, :4].tolist() == [-1, 9, 8, -1]
    assert found.logprobs_LK[0, 0] == -math.inf
    assert found.ranks_L.tolist() == [0]


def test_one_buffer_holds_the_whole_answer():
    packed = torch.zeros(LINE_NUMBERS * 3 + 2, dtype=torch.int32)
    out = Logprobs.of(packed, 3)
    lines_LV = random_logits(np.random.default_rng(0), 3, 50, torch.float32)
    assert logprobs(lines_LV, ints(1, 2, 3), ints(20, 0, -1), out) is out
    assert packed[: 3 * PLACES].tolist() == out.ids_LK.flatten().tolist()
    assert packed[-5:].tolist() == [*out.ranks_L.tolist(), 0, 0]


def test_every_line_needs_a_target():
    with pytest.raises(InternalError):
        logprobs(torch.zeros(2, 5), ints(1), ints(1, 1))
