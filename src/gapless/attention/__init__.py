"""Attention over the paged KV cache: one contract, several backends."""

from __future__ import annotations

import torch

from gapless.attention.base import AttentionBackend
from gapless.errors import ConfigError

BACKENDS = ("torch", "triton")


def make_attention(name: str | None, device: torch.device, *, deterministic: bool = False) -> AttentionBackend:
    """The backend of that name; None picks the fastest one that runs on the device.

    deterministic  the one whose bits for a token do not depend on what else is in its step

    Raises ConfigError for an unknown name, or one that the device can not run.
    """
    if name is None:
        name = "triton" if device.type == "cuda" else "torch"
    if name not in BACKENDS:
        raise ConfigError(f"attention must be one of {', '.join(BACKENDS)}, not {name!r}")
    if name == "torch" and deterministic:
        if device.type == "cuda":  # it reads lengths on the host, which no graph can hold
            raise ConfigError("attention 'torch' is not deterministic on CUDA; use 'triton'")
        from gapless.attention.torch_invariant import InvariantTorchAttention

        return InvariantTorchAttention()
    if name == "torch":
        from gapless.attention.torch_reference import TorchAttention

        return TorchAttention()
    if device.type != "cuda":
        raise ConfigError(f"attention 'triton' needs a CUDA device, not {device.type!r}; use 'torch'")
    multiprocessors = torch.get_device_module(device).get_device_properties(device).multi_processor_count
    if deterministic:
        from gapless.attention.triton_invariant import InvariantTritonAttention

        return InvariantTritonAttention(multiprocessors)
    from gapless.attention.triton_paged import TritonAttention

    return TritonAttention(multiprocessors)
