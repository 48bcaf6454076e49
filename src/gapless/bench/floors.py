"""What a step must at least read or multiply, by the sizes of the model alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gapless.attention.base import KVSpec
from gapless.config import ModelConfig
from gapless.weights.names import weight_shapes

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeFloor:
    """The least time of a decode workload: what its steps must read, at the rate at which the device can read.

    weight_bytes  all weights, but the embedding table only where it is the head, too
    kv_bytes      of all rows at the mean context
    read_rate     bytes per second
    seconds       of all steps; the one that reads the prompts counts as a decode step
    """

    weight_bytes: int
    kv_bytes: float
    read_rate: float
    seconds: float


def decode_floor(
    model: ModelConfig, dtype: torch.dtype, *, requests: int, prompt_len: int, new_tokens: int, read_rate: float
) -> DecodeFloor:
    """Of `requests` rows that run all at once. The step of token n reads the KV of prompt_len + n - 1 tokens."""
    weight_bytes = sum(math.prod(shape) for shape in weight_shapes(model).values()) * dtype.itemsize
    if not model.tie_embeddings:
        weight_bytes -= model.vocab_size * model.hidden_size * dtype.itemsize
    mean_context = prompt_len + (new_tokens - 1) / 2
    token_bytes = KVSpec(model.num_layers, model.num_kv_heads, model.head_dim).bytes_per_block(1, dtype)
    kv_bytes = requests * mean_context * token_bytes
    return DecodeFloor(
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        read_rate=read_rate,
        seconds=new_tokens * (weight_bytes + kv_bytes) / read_rate,
    )


def layer_products(model: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's linear maps, as they are fused: qkv, output, gate and up, down."""
    query, key_value = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    return [
        (query + key_value, model.hidden_size),
        (model.hidden_size, query),
        (2 * model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    ]


def linear_operations(model: ModelConfig, tokens: int, samples: int) -> int:
    """Multiplications and additions of the linear maps: of the layers for `tokens`, of the head for `samples`."""
    layer = sum(outputs * inputs for outputs, inputs in layer_products(model))
    return 2 * (tokens * model.num_layers * layer + samples * model.vocab_size * model.hidden_size)
