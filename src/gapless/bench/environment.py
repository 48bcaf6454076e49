"""What a figure must be quoted with: device, clocks, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import gapless

GPU_FACTS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version")


def environment(device_name: str, device: torch.device) -> dict[str, str]:
    """What is known of the machine and this process. Clocks are those of now: ask while the GPU is warm."""
    facts = {
        "device": device_name,
        **_gpu_facts(device),
        "host": _host(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": commit(Path(gapless.__file__)),
        "command": shlex.join(["gapless", *sys.argv[1:]]),
    }
    return {name: fact for name, fact in facts.items() if fact}


def commit(file: Path) -> str | None:
    """The commit that a file is checked out at, with "-dirty" where something was changed; None outside of git."""
    folder = file.parent
    if _output("git", "-C", str(folder), "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7")


def _gpu_facts(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    uuid = torch.get_device_module(device).get_device_properties(device).uuid
    query = f"--query-gpu={','.join(GPU_FACTS)}"
    line = _output("nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader")
    return {} if line is None else parse_gpu_facts(line)


def parse_gpu_facts(line: str) -> dict[str, str]:
    """A line of nvidia-smi's for GPU_FACTS."""
    return dict(zip(GPU_FACTS, (each.strip() for each in line.split(",")), strict=True))


def _host() -> str:
    """Cores and model of the processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{os.cpu_count()} x {found[1] if found else platform.processor() or platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def quoted_with(facts: dict[str, str]) -> str:
    """Two lines above a table, below its title."""
    others = ", ".join(f"{name} {fact}" for name, fact in facts.items() if name not in ("device", "command"))
    return f"{facts['device']}, {others}\n$ {facts['command']}"
