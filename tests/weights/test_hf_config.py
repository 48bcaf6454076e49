"""config.json -> ModelConfig; transformers is the oracle for which tensors a config asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gapless.config import ModelConfig, RopeConfig
from gapless.errors import ConfigError, CorruptModelError, ModelNotFoundError, UnsupportedModelError
from gapless.weights.hf_config import SHAPES, load_config, load_shape, parse_config
from gapless.weights.names import weight_shapes
from weights.tiny import CONFIG, with_fields


def test_a_plain_llama_config_is_read_field_by_field():
    assert parse_config(CONFIG) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=288,
        hidden_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=512,
        rms_norm_eps=1e-5,
        max_position=1024,
        rope=RopeConfig(theta=10000.0),
        tie_embeddings=True,
        dtype="float32",
        eos_token_ids=(2,),
        bos_token_id=1,
    )


def test_absent_and_null_fields_take_the_defaults_of_the_architecture():
    for gone in (..., None):
        config = parse_config(
            with_fields(head_dim=gone, num_key_value_heads=gone, eos_token_id=gone, bos_token_id=gone)
        )
        assert (config.head_dim, config.num_kv_heads) == (64, 4)
        assert (config.eos_token_ids, config.bos_token_id) == ((), None)
    assert parse_config(with_fields(architectures=["Qwen3ForCausalLM"], head_dim=None)).head_dim == 128


def test_end_tokens_may_be_a_list_and_the_dtype_may_have_its_new_name():
    config = parse_config(with_fields(eos_token_id=[7, 2, 7], torch_dtype=..., dtype="bfloat16"))
    assert config.eos_token_ids == (7, 2)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, RopeConfig(kind="linear", factor=4.0)),
        ({"rope_type": "linear", "factor": 4}, RopeConfig(kind="linear", factor=4.0)),
        ({"rope_type": "default"}, RopeConfig()),
        (None, RopeConfig()),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            RopeConfig(kind="llama3", factor=8.0, low_freq_factor=1, high_freq_factor=4, original_max_position=512),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 0.7, "truncate": False},
            RopeConfig(kind="yarn", factor=4.0, original_max_position=1024, mscale=0.7, truncate=False),
        ),
        ({"type": "yarn", "factor": 2.0}, RopeConfig(kind="yarn", factor=2.0, original_max_position=1024)),
    ],
)
def test_the_old_and_the_new_spelling_of_rope_mean_the_same(scaling: dict[str, Any] | None, expected: RopeConfig):
    old = parse_config(with_fields(rope_scaling=scaling))
    new = parse_config(with_fields(rope_theta=..., rope_parameters={"rope_theta": 10000.0, **(scaling or {})}))
    assert old.rope == expected
    assert new == old


def test_yarn_reaches_beyond_the_position_limit_that_the_file_still_states():
    assert parse_config(with_fields(rope_scaling={"type": "yarn", "factor": 4.0})).max_position == 4096


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope"])
def test_other_kinds_of_rope_are_refused(kind: str):
    with pytest.raises(UnsupportedModelError, match=kind):
        parse_config(with_fields(rope_scaling={"type": kind, "factor": 2.0}))


def test_partial_and_per_layer_rope_are_refused():
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        parse_config(with_fields(partial_rotary_factor=0.5))
    with pytest.raises(UnsupportedModelError, match="between layers"):
        parse_config(with_fields(rope_parameters={"full_attention": {"rope_theta": 1e4}}))


def test_a_sliding_window_cuts_the_context_to_where_full_attention_is_exact():
    mistral = with_fields(architectures=["MistralForCausalLM"])
    assert parse_config(mistral | {"sliding_window": 100}).max_position == 100
    assert parse_config(mistral | {"sliding_window": None}).max_position == 1024
    qwen = with_fields(architectures=["Qwen2ForCausalLM"], sliding_window=100)
    assert parse_config(qwen).max_position == 1024
    assert parse_config(qwen | {"use_sliding_window": True, "max_window_layers": 1}).max_position == 100
    assert parse_config(qwen | {"use_sliding_window": True, "max_window_layers": 2}).max_position == 1024
    kinds = ["full_attention", "sliding_attention"]
    assert parse_config(qwen | {"use_sliding_window": True, "layer_types": kinds}).max_position == 100
    assert parse_config(qwen | {"use_sliding_window": True, "layer_types": kinds[:1] * 2}).max_position == 1024


def test_an_unknown_architecture_is_named_beside_the_supported_ones():
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        parse_config(with_fields(architectures=["GPT2LMHeadModel"]))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"torch_dtype": "float64"}, "dtype"),
    ],
)
def test_features_that_are_not_implemented_are_refused(fields: dict[str, Any], named: str):
    with pytest.raises(UnsupportedModelError, match=named):
        parse_config(with_fields(**fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ...),
        ("architectures", "LlamaForCausalLM"),
        ("vocab_size", ...),
        ("vocab_size", 0),
        ("vocab_size", 2**40),
        ("hidden_size", -1),
        ("hidden_size", 2.5),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", "4"),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("intermediate_size", None),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("max_position_embeddings", ...),
        ("rope_theta", float("inf")),
        ("rope_scaling", "linear"),
        ("tie_word_embeddings", 1),
        ("eos_token_id", 288),
        ("eos_token_id", ["2"]),
        ("bos_token_id", -1),
    ],
)
def test_a_missing_or_nonsensical_field_is_named(field: str, value: object):
    with pytest.raises(CorruptModelError, match=field):
        parse_config(with_fields(**{field: value}))


def test_hidden_size_must_divide_into_heads_when_no_head_dim_says_otherwise():
    with pytest.raises(CorruptModelError, match="hidden_size"):
        parse_config(with_fields(num_attention_heads=3, num_key_value_heads=3, head_dim=None))


def test_generation_config_adds_end_tokens(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load_config(tmp_path).eos_token_ids == (2, 5)


def test_a_config_that_is_not_json_or_not_there_is_named(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load_config(tmp_path)
    for text in ("{", "[]", "[" * 100_000, "\udcff"):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(CorruptModelError, match=r"config\.json"):
            load_config(tmp_path)


def test_shapes_are_found_by_name_or_path(tmp_path: Path):
    assert load_shape("llama-8b").hidden_size == 4096
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert load_shape(tmp_path / "config.json") == load_shape(str(tmp_path)) == parse_config(CONFIG)
    with pytest.raises(ConfigError, match="smollm2-135m"):
        load_shape("llama-9b")


def test_the_named_shapes_have_the_sizes_of_the_models():
    sizes = {
        name: sum(torch.Size(shape).numel() for shape in weight_shapes(config).values())
        for name, config in SHAPES.items()
    }
    assert sizes == {"llama-8b": 8_030_261_248, "llama-1b": 1_498_482_688, "smollm2-135m": 134_515_008}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("Llama", {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}),
        ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 128, "attention_bias": True}),
        ("Qwen3", {"head_dim": 64}),
    ],
)
def test_a_config_asks_for_the_tensors_that_transformers_makes(name: str, fields: dict[str, Any]):
    import transformers

    keep = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    given = {key: CONFIG[key] for key in (*keep, "intermediate_size")} | {"tie_word_embeddings": True} | fields
    hf_config = getattr(transformers, f"{name}Config")(**given)
    hf_config.architectures = [f"{name}ForCausalLM"]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(hf_config)
    config = parse_config(hf_config.to_dict())
    made = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tie_embeddings:
        del made["lm_head.weight"]
    assert weight_shapes(config) == made
