"""From an architecture's name in config.json to the family that runs it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gapless.attention.base import AttentionBackend
from gapless.config import ModelConfig
from gapless.errors import UnsupportedModelError
from gapless.models.base import Model
from gapless.models.layers import LayerOps
from gapless.models.llama import LlamaModel

FAMILIES = {
    "LlamaForCausalLM": LlamaModel,
    "MistralForCausalLM": LlamaModel,
    "Qwen2ForCausalLM": LlamaModel,
    "Qwen3ForCausalLM": LlamaModel,
}


def build_model(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: AttentionBackend,
    max_position: int,
    ops: LayerOps | None = None,
) -> Model:
    """Load a model from its named tensors. `max_position` bounds the positions it can be asked for.

    Raises UnsupportedModelError for an unknown architecture, CorruptModelError for wrong or missing tensors.
    """
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"architecture {config.architecture!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return family.load(
        config, tensors, device=device, dtype=dtype, attention=attention, max_position=max_position, ops=ops
    )
