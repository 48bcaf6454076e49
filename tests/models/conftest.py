"""Tiny random models of every family, ours and transformers', with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gapless.config import ModelConfig, RopeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **parameters}}


FAMILIES: dict[str, Callable[[], tuple[type[PreTrainedModel], PretrainedConfig]]] = {
    "llama": lambda: (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, **_rope(), num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "llama with biases, untied, llama3 rope": lambda: (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            **_rope(
                5e5,
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "llama with linear rope": lambda: (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, **_rope(rope_type="linear", factor=4.0), num_attention_heads=2, num_key_value_heads=2),
    ),
    "mistral": lambda: (
        MistralForCausalLM,
        MistralConfig(
            **SIZES, **_rope(1e6), num_attention_heads=4, num_key_value_heads=2, head_dim=20, sliding_window=None
        ),
    ),
    "qwen2": lambda: (
        Qwen2ForCausalLM,
        Qwen2Config(**{**SIZES, "head_dim": 8}, **_rope(1e6), num_attention_heads=14, num_key_value_heads=2),
    ),
    "qwen3 with yarn": lambda: (
        Qwen3ForCausalLM,
        Qwen3Config(
            **SIZES,
            **_rope(1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip


def our_config(theirs: PretrainedConfig, model_class: type[PreTrainedModel]) -> ModelConfig:
    config: Any = theirs
    rope: dict[str, Any] = config.rope_parameters
    qwen2 = model_class is Qwen2ForCausalLM
    return ModelConfig(
        architecture=model_class.__name__,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        max_position=config.max_position_embeddings,
        rope=RopeConfig(
            kind=rope["rope_type"],
            theta=rope["rope_theta"],
            factor=rope.get("factor", 1.0),
            low_freq_factor=rope.get("low_freq_factor", 1.0),
            high_freq_factor=rope.get("high_freq_factor", 4.0),
            original_max_position=rope.get("original_max_position_embeddings", 0),
        ),
        tie_embeddings=config.tie_word_embeddings,
        qkv_bias=qwen2 or getattr(config, "attention_bias", False),
        output_bias=not qwen2 and getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
        qk_norm=model_class is Qwen3ForCausalLM,
        dtype="float32",
        eos_token_ids=(2,),
    )


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest) -> tuple[ModelConfig, Any]:
    """Our config and transformers' model, random in every parameter, norms and biases included."""
    model_class, config = FAMILIES[request.param]()
    config._attn_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
    torch.manual_seed(7)
    model = model_class(config).eval()  # type: ignore[call-arg]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return our_config(config, model_class), model
