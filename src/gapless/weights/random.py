"""Random weights for measuring and testing, made where they are used."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gapless.config import ModelConfig
from gapless.weights.names import Shape, weight_shapes

SCALE = 0.02  # standard deviation, the usual initializer_range


def random_weights(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `config` by its Hugging Face name, made on `device` in `dtype`: host memory stays unused.

    The same seed, device and dtype give the same numbers; other devices and dtypes give other ones.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, shape in weight_shapes(config).items():
        yield name, random_tensor(name, shape, device, dtype, generator)


def random_tensor(
    name: str, shape: Shape, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Normal numbers with SCALE; around 1 for the weight of a norm, so that activations keep their size."""
    tensor = torch.empty(shape, device=device, dtype=dtype)
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    return tensor.normal_(mean, SCALE, generator=generator)
