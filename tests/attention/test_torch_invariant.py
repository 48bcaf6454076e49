"""The attention of deterministic mode on the CPU gives the reference's answers; its bits are for tests/models."""

from __future__ import annotations

import pytest
import torch

from gapless.attention import make_attention
from gapless.attention.scenario import make_scenario, pad_mixed
from gapless.attention.torch_invariant import InvariantTorchAttention
from gapless.attention.torch_reference import TorchAttention
from gapless.errors import ConfigError

CASES = {
    "decodes": ([1, 1, 1], [1, 17, 200], (9, 3), 64, 16),
    "chunks over a prefix": ([5, 33, 2], [90, 133, 64], (4, 1), 32, 4),
    "decodes and chunks": ([1, 1, 19, 40], [129, 2, 19, 104], (14, 2), 20, 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_the_reference(name: str, dtype: torch.dtype):
    queries, lengths, heads, head_dim, block_size = CASES[name]
    scenario = make_scenario(queries, lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    args = (scenario.q_TND, scenario.kv, scenario.batch, 0.2)
    out_TND = InvariantTorchAttention().attend(*args)
    assert out_TND.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out_TND, TorchAttention().attend(*args), rtol=tolerance, atol=tolerance)


def test_padding_changes_no_bit():
    scenario = make_scenario([1, 1, 7, 40, 2], [90, 20, 40, 41, 100], heads=(6, 2), head_dim=32)
    larger, at_T = pad_mixed(scenario, decodes=3, entries=5, tokens=30)
    attention = InvariantTorchAttention()
    out_TND = attention.attend(larger.q_TND, larger.kv, larger.batch, 0.2)[at_T]
    assert torch.equal(out_TND, attention.attend(scenario.q_TND, scenario.kv, scenario.batch, 0.2))


def test_the_cpu_gets_it_in_deterministic_mode_and_cuda_does_not():
    assert isinstance(make_attention(None, torch.device("cpu"), deterministic=True), InvariantTorchAttention)
    with pytest.raises(ConfigError, match=r"not deterministic on CUDA.*triton"):
        make_attention("torch", torch.device("cuda"), deterministic=True)
