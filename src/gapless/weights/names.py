"""The tensors that a model of the Llama family has, under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gapless.config import ModelConfig
from gapless.errors import CorruptModelError, UnsupportedModelError

Shape = tuple[int, ...]


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every stored tensor, in the order of the model; a tied model has no lm_head.weight."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears: list[tuple[str, int, int, bool]] = [
        ("self_attn.q_proj", q_size, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_size, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_size, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for name, rows, columns, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_names(config: ModelConfig, tensors: Iterator[tuple[str, Tensor]], where: str) -> Iterator[tuple[str, Tensor]]:
    """Pass `tensors` on, refusing a wrong shape at once and a missing name at the end.

    Left out in silence: the rotary tables that old checkpoints carry, and the lm_head of a tied model.
    Raises UnsupportedModelError for a tensor that the architecture does not know, CorruptModelError.
    """
    waiting = weight_shapes(config)
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight"):
            continue
        shape = waiting.pop(name, None)
        if shape is None:
            raise UnsupportedModelError(f"{where}: {config.architecture} has no tensor {name}, or it is there twice")
        if tuple(tensor.shape) != shape:
            raise CorruptModelError(f"{where}: {name} has the shape {list(tensor.shape)}, not {list(shape)}")
        yield name, tensor
    if waiting:
        first = next(iter(waiting))
        raise CorruptModelError(f"{where}: {len(waiting)} tensors are missing, the first is {first}")
