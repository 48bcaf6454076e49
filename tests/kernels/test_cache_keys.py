"""Compiled kernels are found again by another process: no address and no hash seed is in their keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PRINT_KEYS = """
import importlib, json, pkgutil
from triton.runtime.jit import JITFunction
import gapless.kernels, gapless.sampling
keys = {}
for package in (gapless.kernels, gapless.sampling):
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction):
                keys[f"{found.name}.{name}"] = value.cache_key
print(json.dumps(keys))
"""


def keys_in_a_process(seed: int) -> dict[str, str]:
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    environment.pop("TRITON_INTERPRET", None)
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_KEYS], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    return json.loads(printed.stdout)


def test_keys_are_the_same_in_every_process() -> None:
    first, second = keys_in_a_process(1), keys_in_a_process(2)
    assert {"wide_linear.wide_kernel", "gluon_prefill.prefill_kernel", "paged_decode.decode_kernel"} <= set(first)
    assert {name for name in first if first[name] != second[name]} == set()
