"""Frequencies, tables and rotation agree with transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from gapless.config import RopeConfig
from gapless.errors import CorruptModelError
from gapless.models.rope import inverse_frequencies, rope_table, rotate

HEAD_DIM = 64
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
CASES: dict[str, tuple[dict[str, Any], RopeConfig]] = {
    "default": ({"rope_type": "default"}, RopeConfig(theta=5e5)),
    "linear": ({"rope_type": "linear", "factor": 2.5}, RopeConfig(kind="linear", theta=5e5, factor=2.5)),
    "llama3": (
        {**LLAMA3, "original_max_position_embeddings": 8192},
        RopeConfig(kind="llama3", theta=5e5, factor=32.0, original_max_position=8192),
    ),
    "llama3 with other bounds": (
        {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 8.0, "original_max_position_embeddings": 1000},
        RopeConfig(
            kind="llama3",
            theta=5e5,
            factor=32.0,
            low_freq_factor=0.5,
            high_freq_factor=8.0,
            original_max_position=1000,
        ),
    ),
    "yarn": (YARN, RopeConfig(kind="yarn", theta=5e5, factor=4.0, original_max_position=4096)),
    "yarn untruncated": (
        {**YARN, "truncate": False, "beta_fast": 20, "beta_slow": 2},
        RopeConfig(
            kind="yarn",
            theta=5e5,
            factor=4.0,
            original_max_position=4096,
            truncate=False,
            beta_fast=20,
            beta_slow=2,
        ),
    ),
    "yarn with attention factor": (
        {**YARN, "attention_factor": 1.5},
        RopeConfig(kind="yarn", theta=5e5, factor=4.0, original_max_position=4096, attention_factor=1.5),
    ),
    "yarn with mscale": (
        {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
        RopeConfig(
            kind="yarn", theta=5e5, factor=4.0, original_max_position=4096, mscale=1.2, mscale_all_dim=0.7
        ),
    ),
}  # fmt: skip


def oracle(parameters: dict[str, Any]) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters={"rope_theta": 5e5, **parameters},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_attention_factor_equal_transformers(name: str):
    parameters, rope = CASES[name]
    theirs = oracle(parameters)
    inv_freq, factor = inverse_frequencies(rope, HEAD_DIM)
    torch.testing.assert_close(inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_table_equals_transformers_cosines_and_sines(name: str):
    parameters, rope = CASES[name]
    positions = torch.tensor([[0, 1, 77, 4095]])
    cos, sin = oracle(parameters)(torch.zeros(1), positions)
    table_PD = rope_table(rope, HEAD_DIM, 4096, torch.device("cpu"))[positions[0]]
    torch.testing.assert_close(table_PD[:, : HEAD_DIM // 2], cos[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-3)
    torch.testing.assert_close(table_PD[:, HEAD_DIM // 2 :], sin[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_transformers(dtype: torch.dtype):
    theirs = oracle({"rope_type": "default"})
    x_TXD = torch.randn(5, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(5)
    cos, sin = theirs(x_TXD, positions.unsqueeze(0))
    expected, _ = apply_rotary_pos_emb(x_TXD.transpose(0, 1)[None], x_TXD.transpose(0, 1)[None], cos, sin)
    table_PD = rope_table(RopeConfig(theta=5e5), HEAD_DIM, 5, torch.device("cpu"))
    rotated = rotate(x_TXD, table_PD)
    assert rotated.dtype == dtype
    # transformers rounds the table to bfloat16 first, so they differ by some of its steps there
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


def test_a_scaling_without_the_trained_length_is_a_corrupt_model():
    with pytest.raises(CorruptModelError, match="original_max_position_embeddings"):
        inverse_frequencies(RopeConfig(kind="yarn", factor=2.0), HEAD_DIM)
