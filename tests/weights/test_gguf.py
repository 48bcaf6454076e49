"""GGUF -> model folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gapless.config import ModelConfig
from gapless.errors import CorruptModelError, ModelError, UnsupportedModelError
from gapless.weights import gguf
from gapless.weights.cache import cache_folder
from gapless.weights.gguf import convert_gguf
from gapless.weights.gguf_rope import llama3_factors
from gapless.weights.hf_config import SHAPES, load_config
from gapless.weights.safetensors import iter_safetensors
from weights.tiny import CONFIG, with_fields, write_gguf

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
STORED = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


def convert(path: Path, **given: Any) -> tuple[ModelConfig, Path]:
    write_gguf(path, **given)
    folder = convert_gguf(path)
    return load_config(folder), folder


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_are_the_numbers_that_the_file_stands_for(tmp_path: Path, kind: Kind):
    expected = write_gguf(tmp_path / "m.gguf", kind=kind)
    found = dict(iter_safetensors(convert_gguf(tmp_path / "m.gguf")))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == (STORED.get(kind, torch.float32) if tensor.ndim == 2 else torch.float32)
        assert torch.equal(found[name].float(), tensor), name


@pytest.mark.parametrize(("arch", "fields"), [("qwen2", {}), ("qwen3", {}), ("llama", {"attention_bias": True})])
def test_architectures_keep_their_row_order_biases_and_norms(tmp_path: Path, arch: str, fields: dict[str, Any]):
    expected = write_gguf(tmp_path / "m.gguf", CONFIG | fields, arch, Kind.Q8_0)
    found = dict(iter_safetensors(convert_gguf(tmp_path / "m.gguf")))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_weights_do_not_depend_on_the_size_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = write_gguf(tmp_path / "m.gguf", kind=Kind.Q4_1)
    monkeypatch.setattr(gguf, "_PART_BYTES", 5000)
    found = dict(iter_safetensors(convert_gguf(tmp_path / "m.gguf")))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_config_says_what_the_metadata_says(tmp_path: Path):
    config, _ = convert(tmp_path / "m.gguf", kind=Kind.F16)
    assert (config.architecture, config.vocab_size, config.num_layers) == ("LlamaForCausalLM", 288, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 64)
    assert (config.rms_norm_eps, config.max_position, config.tie_embeddings) == (1e-5, 1024, True)
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((2,), 1, "float16")
    untied, _ = convert(tmp_path / "u.gguf", raw=with_fields(tie_word_embeddings=False))
    assert not untied.tie_embeddings


def test_a_sliding_window_and_further_end_tokens_are_kept(tmp_path: Path):
    extra = {"llama.attention.sliding_window": 100, "tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    config, _ = convert(tmp_path / "m.gguf", extra=extra)
    assert config.max_position == 100
    assert config.eos_token_ids == (1, 0, 2)  # eos, eot, and the control token <|im_end|>


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_factors_of_llama_3_are_recognised(tmp_path: Path, factor: float):
    factors = llama3_factors(500000.0, 64, factor).astype(np.float32)
    config, _ = convert(
        tmp_path / "m.gguf", raw=with_fields(rope_theta=500000.0), extra_tensors={"rope_freqs.weight": factors}
    )
    assert config.rope.factor == factor
    assert config.rope == SHAPES["llama-8b" if factor == 8.0 else "llama-1b"].rope


def test_the_rope_factors_computed_here_are_those_of_transformers():
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = SHAPES["llama-1b"].rope
    parameters = {
        "rope_type": "llama3",
        "rope_theta": rope.theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
    hf_config = transformers.LlamaConfig(hidden_size=2048, num_attention_heads=32, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config, "cpu")
    plain = rope.theta ** -(np.arange(0, 64, 2) / 64)
    assert np.allclose(plain / llama3_factors(rope.theta, 64, rope.factor), scaled.numpy(), rtol=1e-5)


def test_other_rope_factors_are_refused_and_factors_of_one_mean_nothing(tmp_path: Path):
    ones = np.ones(32, np.float32)
    config, _ = convert(tmp_path / "one.gguf", extra_tensors={"rope_freqs.weight": ones})
    assert config.rope.kind == "default"
    for name, odd in (("a", np.linspace(1, 8, 32)), ("b", np.full(16, 8.0)), ("c", np.full(32, np.nan))):
        with pytest.raises(UnsupportedModelError, match="rope_freqs"):
            convert(tmp_path / f"{name}.gguf", extra_tensors={"rope_freqs.weight": odd.astype(np.float32)})


def test_linear_and_yarn_scaling_are_kept(tmp_path: Path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config, _ = convert(tmp_path / "l.gguf", extra=linear)
    assert (config.rope.kind, config.rope.factor) == ("linear", 2.0)
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 512,
    }
    config, _ = convert(tmp_path / "y.gguf", extra=yarn)
    assert (config.rope.kind, config.rope.factor, config.rope.original_max_position) == ("yarn", 4.0, 512)
    assert config.max_position == 2048
    with pytest.raises(UnsupportedModelError, match="longrope"):
        convert(tmp_path / "x.gguf", extra={"llama.rope.scaling.type": "longrope"})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kind": Kind.Q5_0}, "Q5_0"),
        ({"extra": {"general.architecture": "gemma"}}, "gemma"),
        ({"extra": {"llama.expert_count": 8}}, "experts"),
        ({"extra": {"llama.rope.dimension_count": 32}}, "head sizes"),
        ({"extra_tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, "attn_sinks"),
        ({"extra_tensors": {"blk.7.attn_norm.weight": np.ones(4, np.float32)}}, "layers.7"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, given: dict[str, Any], named: str):
    with pytest.raises(UnsupportedModelError, match=named):
        convert(tmp_path / "m.gguf", **given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"without": "blk.1.ffn_up"}, r"layers\.1\.mlp\.up_proj"),
        ({"without": "token_embd"}, "token_embd"),
        ({"extra": {"llama.block_count": None}}, "block_count"),
        ({"extra": {"llama.embedding_length": 128}}, "shape"),
        ({"extra": {"llama.context_length": -5.0}}, "context_length"),
        ({"extra": {"tokenizer.ggml.eos_token_id": 288}}, "eos_token_id"),
        ({"extra": {"tokenizer.ggml.tokens": None}}, "tokens"),
        ({"extra": {"general.alignment": 48}}, "alignment"),
    ],
)
def test_what_does_not_add_up_is_corrupt(tmp_path: Path, given: dict[str, Any], named: str):
    with pytest.raises(CorruptModelError, match=named):
        convert(tmp_path / "m.gguf", **given)
    assert list((cache_folder() / "gguf").iterdir()) == []


def test_a_file_is_converted_once_and_again_when_it_changes(tmp_path: Path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    first = convert_gguf(path)
    made = (first / "config.json").stat().st_mtime_ns
    assert convert_gguf(path) == first
    assert (first / "config.json").stat().st_mtime_ns == made
    os.utime(path, ns=(0, 0))
    assert convert_gguf(path) != first


def test_conversions_at_the_same_time_end_in_one_whole_folder(tmp_path: Path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    found: list[Path] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        found.append(convert_gguf(path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 4
    assert list(found[0].parent.iterdir()) == [found[0]]
    assert load_config(found[0]).num_layers == 2


def test_an_unwritable_cache_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GAPLESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set GAPLESS_CACHE"):
        convert(tmp_path / "m.gguf")
