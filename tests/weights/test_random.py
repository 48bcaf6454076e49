"""Random weights."""

from __future__ import annotations

import pytest
import torch

from gapless.weights.hf_config import parse_config
from gapless.weights.names import weight_shapes
from gapless.weights.random import random_weights
from weights.tiny import CONFIG, with_fields


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_of_the_config_is_made_in_the_dtype_asked_for(dtype: torch.dtype):
    config = parse_config(with_fields(architectures=["Qwen3ForCausalLM"]))
    made = dict(random_weights(config, "cpu", dtype, seed=1))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == weight_shapes(config)
    assert {tensor.dtype for tensor in made.values()} == {dtype}
    matrix, norm = made["model.embed_tokens.weight"].float(), made["model.layers.1.self_attn.q_norm.weight"].float()
    assert matrix.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert matrix.std().item() == pytest.approx(0.02, rel=0.02)
    assert norm.mean().item() == pytest.approx(1.0, abs=0.02)


def test_the_seed_decides():
    config = parse_config(CONFIG)
    first, same, other = (dict(random_weights(config, "cpu", torch.float32, seed)) for seed in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, same[name])
        assert not torch.equal(tensor, other[name])
