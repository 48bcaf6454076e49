"""Run by test_choice.py in a process of its own: what compile_all compiles and loads on a driver that only takes notes.

python side_by_side.py ARCH SHARED_BYTES        prints one JSON object
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from gapless.kernels.choice import Kind, Use, _Trial, compile_all  # pyright: ignore[reportPrivateUsage]
from gapless.kernels.linear import candidates

ARCH, SHARED_BYTES = int(sys.argv[1]), int(sys.argv[2])
notes = Counter[str]()


class Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        notes["load"] += 1
        time.sleep(0.002)
        return notes["load"], notes["load"], 64, 0, 1024

    def unload_module(self, module: int) -> None:
        notes["unload"] += 1

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, source: object, metadata: object) -> None: ...

    def __call__(self, *arguments: object) -> None:
        notes["launch"] += 1


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def no_device(_index: object) -> None:
    """There is none to set."""


def main() -> None:
    driver: Any = triton.runtime.driver
    driver.set_active(Driver())
    torch.accelerator.set_device_index = no_device
    weights = [torch.zeros(outputs, 512, dtype=torch.bfloat16) for outputs in (1024, 768)]
    tried = candidates(gated=False, tokens=128)[:5]
    trials = [_Trial(Kind.of(each, Use.PLAIN), [each], tried, 128, 128) for each in weights]
    compile_all([launch for trial in trials for launch in trial.launches()], torch.device("cuda"))
    print(json.dumps({**notes, "ways": [[tried.index(tiles) for tiles in trial.ways] for trial in trials]}))


with tempfile.TemporaryDirectory() as folder:
    os.environ["TRITON_CACHE_DIR"] = folder
    main()
