"""From logits to tokens on the device: filters and counter-based random numbers."""

from __future__ import annotations

import torch

from gapless.sampling.base import Sampler, SamplingTables
from gapless.sampling.features import FeatureTables, StepMasks
from gapless.sampling.records import RowFeatures
from gapless.sampling.rng import seed_words
from gapless.sampling.torch_sampler import TorchSampler

__all__ = [
    "FeatureTables",
    "RowFeatures",
    "Sampler",
    "SamplingTables",
    "StepMasks",
    "TorchSampler",
    "make_sampler",
    "seed_words",
]


def make_sampler(device: torch.device) -> Sampler:
    """Triton on CUDA devices (NVIDIA or AMD), plain torch elsewhere."""
    if device.type == "cuda":
        from gapless.sampling.triton_sampler import TritonSampler

        return TritonSampler()
    return TorchSampler()
