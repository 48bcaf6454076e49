"""Memory on a GPU: what the graphs take, and what the KV cache gets of that which the weights leave.

    PYTHONPATH=src python scripts/gpu_memory.py [--shape S ...] [--rows N ...]

Engines with random weights and default options but for the rows. Graphs are captured twice: in one memory pool, as
device/cuda.py does, and each in a pool of its own.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from gapless.attention import make_attention
from gapless.config import EngineConfig
from gapless.device import Access, Graph, Stream
from gapless.device.cuda import CudaDevice
from gapless.engine.build import build_loop
from gapless.models.base import Model
from gapless.models.layers import make_ops
from gapless.models.registry import build_model
from gapless.sampling import make_sampler
from gapless.weights.hf_config import load_shape
from gapless.weights.random import random_weights

CUDA = torch.device("cuda", 0)
DTYPE = torch.bfloat16
MIB, GIB = 2**20, 2**30
FEW_BLOCKS = 64  # graphs do not know the size of the cache


class CountedDevice(CudaDevice):
    """Knows the pools of its graphs; apart: each is captured in one of its own."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__(CUDA)
        self._apart = apart
        self._pools = {self._graph_pool}

    def capture(
        self, work: Callable[[], None], stream: Stream, accesses: Callable[[], Iterable[Access]] = tuple
    ) -> Graph:
        if self._apart:
            self._graph_pool = torch.cuda.graph_pool_handle()
            self._pools.add(self._graph_pool)
        return super().capture(work, stream, accesses)

    def pool_bytes(self) -> int:
        """Of all pools, whether in use or not."""
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) in self._pools)


def load(shape: str) -> Model:
    config = load_shape(shape)
    return build_model(
        config,
        random_weights(config, CUDA, DTYPE),
        device=CUDA,
        dtype=DTYPE,
        attention=make_attention(None, CUDA),
        max_position=config.max_position,
        ops=make_ops(CUDA),
    )


def tidy() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def measure(model: Model, config: EngineConfig, device: CountedDevice) -> tuple[int, int, int, int, int]:
    """Bytes free before, of the KV cache, of the graphs' pools, and free at last, and the number of graphs."""
    tidy()
    free, _ = device.memory()
    loop, limits = build_loop(model, config, device, make_sampler(CUDA), DTYPE)
    tidy()
    pools = device.pool_bytes()
    left, _ = device.memory()
    graphs = len(loop.runner.graphs.shapes) * len(loop.slots.slots)
    loop.close()
    return free, limits.num_blocks * model.kv_spec.bytes_per_block(limits.block_size, DTYPE), pools, left, graphs


def line(shape: str, model: Model, rows: int) -> str:
    config = EngineConfig(max_rows=rows)
    begin = time.perf_counter()
    free, cache, shared, left, graphs = measure(model, config, CountedDevice(apart=False))
    few = replace(config, num_blocks=FEW_BLOCKS, max_model_len=model.max_position)
    _, _, apart, _, _ = measure(model, few, CountedDevice(apart=True))
    return (
        f"{shape:13} {rows:5} rows  free after weights {free / GIB:6.2f} GiB  KV cache {cache / GIB:6.2f} GiB "
        f"({cache / free:.1%})  left {left / GIB:5.2f} GiB  {graphs:3} graphs: one pool {shared / MIB:7.1f} MiB, "
        f"a pool each {apart / MIB:7.1f} MiB  ({time.perf_counter() - begin:.0f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="may be repeated; default: llama-8b and smollm2-135m")
    parser.add_argument("--rows", type=int, action="append", help="may be repeated; default: 32 and 256")
    options = parser.parse_args()
    share = EngineConfig().memory_fraction
    print(f"{torch.cuda.get_device_name(CUDA)}, torch {torch.__version__}, memory_fraction {share}")
    for shape in options.shape or ["smollm2-135m", "llama-8b"]:
        model = load(shape)
        for rows in options.rows or [32, 256]:
            print(line(shape, model, rows), flush=True)
        del model


if __name__ == "__main__":
    main()
