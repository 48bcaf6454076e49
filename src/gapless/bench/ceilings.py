"""What the device can do at best, measured in the same process as the figure that is compared with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gapless.device.base import Device

READ_BYTES = {"cuda": 4 * 2**30, "cpu": 2**29}  # many times the caches
PIECE = 2**20  # a multiple of what one program of the read kernel reads
MEMORY_SHARE = 4  # of the free memory, a quarter at most
AT_LEAST = 0.5  # seconds of work in each measurement: clocks settle
FEWEST = 5  # replays


def read_rate(device: Device) -> float:
    """Bytes per second of a kernel that does nothing but read memory, in large pieces."""
    torch_device = device.torch_device
    free, _ = device.memory()
    size = min(READ_BYTES[torch_device.type], free // MEMORY_SHARE) // PIECE * PIECE
    data = torch.empty(size // 4, device=torch_device).uniform_()
    seconds = min(median_seconds(device, read) for read in _readers(data))
    return data.nbytes / seconds


def _readers(data: Tensor) -> Sequence[Callable[[], object]]:
    if data.device.type == "cpu":
        return [data.sum]
    from gapless.bench.read_kernel import readers

    return readers(data.view(torch.int32))


def matrix_rate(device: Device, shapes: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype) -> float:
    """Operations per second of torch's matrix products x W^T, one after the other, of random numbers.

    shapes  (outputs, inputs) of each W; x has a row for each token
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device.torch_device)

    pairs = [(random(tokens, inputs), random(outputs, inputs)) for outputs, inputs in shapes]

    def multiply() -> None:
        for x_TI, weight_OI in pairs:
            functional.linear(x_TI, weight_OI)

    operations = sum(2 * tokens * outputs * inputs for outputs, inputs in shapes)
    return operations / median_seconds(device, multiply)


def median_seconds(device: Device, work: Callable[[], object]) -> float:
    """Device time of the work, as a graph where the device has them."""

    def run() -> None:
        work()

    stream = device.stream("ceiling")
    device.run_now(run, stream)
    graph = device.capture(run, stream)
    times: list[float] = []
    while sum(times) < AT_LEAST or len(times) < FEWEST:
        begin, end = device.event(timed=True), device.event(timed=True)
        stream.record(begin)
        stream.enqueue(graph.replay)
        stream.record(end)
        end.synchronize()
        times.append(end.seconds_since(begin))
    return statistics.median(times)
