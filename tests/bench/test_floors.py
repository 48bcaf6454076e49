"""Floors by hand: what BENCHMARKS says of the 8B shape, and a tied model."""

from __future__ import annotations

import pytest
import torch

from gapless.bench.floors import decode_floor, layer_products, linear_operations
from gapless.weights.hf_config import SHAPES

LAYER_8B = (4096 + 2 * 1024) * 4096 + 4096 * 4096 + 2 * 14336 * 4096 + 4096 * 14336


def test_the_floor_of_8b_reads_head_and_layers_but_not_the_embedding_table():
    floor = decode_floor(
        SHAPES["llama-8b"], torch.bfloat16, requests=32, prompt_len=64, new_tokens=1024, read_rate=3.14e12
    )
    norms = 65 * 4096
    assert floor.weight_bytes == 2 * (32 * LAYER_8B + norms + 128256 * 4096)
    assert floor.kv_bytes == 32 * 131_072 * (64 + 1023 / 2)
    assert floor.seconds == pytest.approx(1024 * (floor.weight_bytes + floor.kv_bytes) / 3.14e12)
    assert floor.seconds == pytest.approx(5.7, abs=0.05)


def test_a_tied_table_is_read_once():
    smol = SHAPES["smollm2-135m"]
    floor = decode_floor(smol, torch.float32, requests=1, prompt_len=1, new_tokens=1, read_rate=1.0)
    layer = (9 + 2 * 3) * 64 * 576 + 576 * 576 + 3 * 576 * 1536 + 2 * 576
    assert floor.weight_bytes == 4 * (30 * layer + 576 + 49152 * 576)
    assert floor.kv_bytes == 4 * 30 * 2 * 3 * 64


def test_one_new_token_sees_its_prompt_and_three_see_one_more_on_average():
    def kv_bytes(new_tokens: int) -> float:
        shape = SHAPES["llama-8b"]
        return decode_floor(
            shape, torch.bfloat16, requests=2, prompt_len=10, new_tokens=new_tokens, read_rate=1.0
        ).kv_bytes

    assert kv_bytes(1) == 2 * 10 * 131_072
    assert kv_bytes(3) == 2 * 11 * 131_072


def test_the_linear_layers_multiply_every_token_and_the_head_every_sample():
    shape = SHAPES["llama-8b"]
    assert layer_products(shape) == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert linear_operations(shape, 1000, 3) == 2 * (1000 * 32 * LAYER_8B + 3 * 128256 * 4096)
