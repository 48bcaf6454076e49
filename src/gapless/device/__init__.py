"""Streams, events, pinned memory and graphs: the only room that knows which accelerator this is."""

from __future__ import annotations

import torch

from gapless.device.base import Access, Device, Event, Graph, Note, Stream
from gapless.errors import ConfigError

__all__ = ["Access", "Device", "Event", "Graph", "Note", "Stream", "has_cuda", "open_device"]


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator() == torch.device("cuda")


def open_device(name: str | None) -> Device:
    """The device called "cpu", "cuda" or "cuda:N"; None takes CUDA where there is one. Raises ConfigError."""
    if name is None:
        name = "cuda" if has_cuda() else "cpu"
    if name == "cpu":
        from gapless.device.cpu import CpuDevice

        return CpuDevice()
    try:
        torch_device = torch.device(name)
    except RuntimeError:
        torch_device = torch.device("meta")
    if torch_device.type != "cuda":
        raise ConfigError(f"device must be cpu, cuda or cuda:N, not {name!r}")
    from gapless.device.cuda import CudaDevice

    return CudaDevice(torch_device)
