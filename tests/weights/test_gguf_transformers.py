"""transformers' own reading of GGUF files as the oracle of ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gapless.weights.gguf import convert_gguf
from gapless.weights.hf_config import load_config, parse_config
from gapless.weights.safetensors import iter_safetensors
from weights.tiny import CONFIG, write_gguf


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def check_same(path: Path, folder: Path) -> None:
    theirs = load(path)
    expected = theirs.state_dict()
    found = dict(iter_safetensors(folder))
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name]), name
    raw = theirs.config.to_dict() | {"quantization_config": None}
    raw["architectures"] = [type(theirs).__name__]
    config, other = load_config(folder), parse_config(raw)
    fields = ("num_heads", "num_kv_heads", "head_dim", "rope", "tie_embeddings", "qkv_bias", "qk_norm", "max_position")
    assert {field: getattr(config, field) for field in fields} == {field: getattr(other, field) for field in fields}
    assert config.rms_norm_eps == pytest.approx(other.rms_norm_eps)


@pytest.mark.parametrize(
    ("arch", "kind"), [("llama", Kind.Q8_0), ("llama", Kind.BF16), ("qwen2", Kind.Q4_K), ("qwen3", Kind.Q6_K)]
)
def test_weights_and_config_equal_those_of_transformers(tmp_path: Path, arch: str, kind: Kind):
    head_dim = 128 if arch == "qwen3" else 64  # transformers takes 128 for qwen3, whatever the file says
    write_gguf(tmp_path / "m.gguf", CONFIG | {"head_dim": head_dim}, arch, kind)
    check_same(tmp_path / "m.gguf", convert_gguf(tmp_path / "m.gguf"))


@pytest.mark.slow
def test_smollm2_weights_and_config_equal_those_of_transformers(smollm_gguf: Path, smollm_folder: Path):
    check_same(smollm_gguf, smollm_folder)
