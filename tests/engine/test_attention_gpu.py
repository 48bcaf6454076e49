"""A whole engine on a GPU with either attention: the plain one runs there too, and says the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gapless.bench.random_engine import RandomEngine
from gapless.config import EngineConfig
from gapless.device import has_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")]

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": 997,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PROMPTS = [1, 5, 64, 200, 17, 90, 33, 128, 2, 300]
NEW_TOKENS = [40, 9, 30, 12, 25, 1, 18, 33, 40, 7]


def generated(shape: Path, attention: str, lookahead: int) -> int:
    config = EngineConfig(
        device="cuda",
        dtype="float32",
        attention=attention,
        lookahead=lookahead,
        max_rows=6,
        max_batch_tokens=128,
        num_blocks=120,
        prefix_cache=False,
        max_model_len=512,
    )
    engine = RandomEngine(str(shape), config)
    try:
        return engine.generate(engine.requests(engine.random_prompts(PROMPTS), NEW_TOKENS)).checksum()
    finally:
        engine.close()


def test_both_kinds_of_attention_give_the_same_tokens_at_every_lookahead(tmp_path: Path):
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(SHAPE))
    sums = {generated(shape, attention, lookahead) for attention in ("torch", "triton") for lookahead in (0, 1)}
    assert len(sums) == 1
