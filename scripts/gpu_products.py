# pyright: reportCallIssue=false
"""The maps of a layer at hundreds of tokens on a Hopper GPU: torch's products, linear.py's and wide_linear.py's.

PYTHONPATH=src python scripts/gpu_products.py

Each map alone: a graph of launches one behind the other, each with weights of its own, more of them than the L2 holds.
Then the chain of a step's layers, attention replaced by a copy of 1 to 2 us. Microseconds, medians of replays.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import triton
import triton.language as tl
from torch import Tensor

from gapless.kernels.choice import Kind, Tiles, Use, multiply, multiply_and_add
from gapless.kernels.dependent import dependent_launch, follow
from gapless.kernels.linear import MOST_TILES, LinearTiles, candidates
from gapless.kernels.normed import Normed
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.wide_tiles import WideTiles, wide_candidates

BEGIN, EPS, REPLAYS = time.perf_counter(), 1e-5, 9
ARRIVED = torch.zeros(MOST_TILES, dtype=torch.int32, device="cuda")
COLD_BYTES = 100 * 2**20  # of a map's weights: more than the L2 holds
SECONDS, WARM_SECONDS = 70, 40  # in all and for compiling
SMALL, LARGE = [
    [Kind(qkv, size, Use.PLAIN), Kind(size, size, Use.ADDED), Kind(up, size, Use.GATED), Kind(size, up // 2, Use.ADDED)]
    for size, qkv, up in ((576, 960, 3072), (2048, 3072, 16384))
]
RUNS = [("smollm2-135m", SMALL, 30, tokens) for tokens in (1024, 256, 512)] + [("llama-1b", LARGE, 16, 128)]
FAMILIES = {"torch": type(None), "linear": LinearTiles, "wide": WideTiles}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def weights_of(kind: Kind, count: int) -> list[Tensor]:
    return list(randn(count, kind.outputs, kind.inputs) * kind.inputs**-0.5)


def add(x: Normed, weight: Tensor, residual: Tensor, norm: Tensor, way: Tiles | None) -> Normed:
    if way is None:
        return Normed(add_rms_norm(multiply(x, weight, None, None, ARRIVED, Use.ADDED), residual, norm, EPS))
    return multiply_and_add(x.x_TH, weight, None, residual, norm, EPS, way, ARRIVED)


def work(tokens: int, kind: Kind, weights: Sequence[Tensor], way: Tiles | None, parts: int) -> Callable[[], None]:
    """One product behind the other, of inputs whose norm is still to be finished where that can be."""
    x, residual = randn(tokens, kind.inputs), randn(tokens, kind.outputs)
    norm, squares = torch.ones_like(residual[0]), torch.rand(parts, tokens, device="cuda") + 1
    given = Normed(x) if way is None or kind.use == Use.ADDED else Normed(x, squares, EPS)

    def run() -> None:
        for weight in weights:
            if kind.use == Use.ADDED:
                add(given, weight, residual, norm, way)
            else:
                multiply(given, weight, None, way, ARRIVED, kind.use)

    return run


def seconds_of(each: Callable[[], object]) -> float:
    """The median time of a graph of the work."""
    each()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        each()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def text(way: Tiles | None) -> str:
    if isinstance(way, WideTiles):
        return f"{way.token_tile}t x {way.out_tile}o s{way.stages}"
    return f"{way.token_tile}t x {way.out_tile}o k{way.in_tile} /{way.split} s{way.num_stages}" if way else "torch"


def ways_of(kind: Kind, tokens: int) -> list[Tiles]:
    """Of both families, though a start-up does not time linear.py's where inputs are few."""
    gated = kind.use == Use.GATED
    wide = wide_candidates(outputs=kind.outputs, inputs=kind.inputs, gated=gated, tokens=tokens)
    return [*candidates(gated=gated, tokens=tokens), *wide]


def each_way(tokens: int, kind: Kind, deadline: float) -> dict[Tiles | None, float]:
    weights = weights_of(kind, max(6, COLD_BYTES // (kind.outputs * kind.inputs * 2)))
    times: dict[Tiles | None, float] = {}
    for way in [None, *ways_of(kind, tokens)]:
        if time.perf_counter() - BEGIN > deadline and type(way) in map(type, times):
            continue
        try:
            times[way] = seconds_of(work(tokens, kind, weights, way, triton.cdiv(kind.inputs, 64))) * 1e6 / len(weights)
        except Exception as error:  # noqa: BLE001  one way that fails must not end the run
            print(f"  FAILED {kind.use} {text(way)}: {type(error).__name__} {str(error)[-150:]}")
    best = sorted(times, key=times.__getitem__)
    for family, of in FAMILIES.items():
        cells = [f"{text(way)} {times[way]:.2f}" for way in best if isinstance(way, of)][:3]
        print(f"  {kind.outputs:5} x {kind.inputs:4} {kind.use:6} {family:7}{' | '.join(cells)}")
    return times


@triton.jit
def first_columns_kernel(
    x: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
) -> None:
    """Stands for attention: [T, WIDTH] -> [T, KEPT]."""
    follow(DEPENDENT)
    token, column = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + token * WIDTH + column, mask=column < KEPT)
    tl.store(out + token * KEPT + column, value, mask=column < KEPT)


def chains(tokens: int, kinds: Sequence[Kind], num_layers: int, times: Sequence[dict[Tiles | None, float]]) -> None:
    """The layers of a step, with the best of each family for each map, and the best of all but torch's."""
    hidden, block = kinds[0].inputs, triton.next_power_of_2(kinds[0].inputs)
    layers = [[weights_of(kind, 1)[0] for kind in kinds] for _ in range(num_layers)]
    start, norm = randn(tokens, hidden), torch.rand(hidden, device="cuda", dtype=torch.bfloat16) + 0.5
    squares = start.float().square().view(tokens, -1, 64).sum(2).T.contiguous()

    def attend(qkv: Tensor) -> Tensor:
        out = torch.empty_like(start)
        first_columns_kernel[(tokens,)](qkv, out, qkv.shape[1], hidden, block, num_warps=2, **dependent_launch())
        return out

    def run(ways: Sequence[Tiles | None]) -> Tensor:
        residual = start.clone()
        x = Normed(start * norm, squares, EPS) if ways[0] else Normed(add_rms_norm(None, residual, norm, EPS))
        for qkv, output, gate_up, down in layers:
            seen = Normed(attend(multiply(x, qkv, None, ways[0], ARRIVED, Use.PLAIN)))
            x = add(seen, output, residual, norm, ways[1])
            gated = Normed(multiply(x, gate_up, None, ways[2], ARRIVED, Use.GATED))
            x = add(gated, down, residual, norm, ways[3])
        return residual

    def best(*families: type) -> list[Tiles | None]:
        """Any but torch's where a family has none."""
        ours = [[way for way in column if isinstance(way, families)] or [*column][1:] for column in times]
        return [min(some, key=column.__getitem__) for some, column in zip(ours, times, strict=True)]

    exact = run([None] * 4).float()
    tried = {"torch": [None] * 4, "linear": best(LinearTiles), "wide": best(WideTiles)}
    for label, ways in {**tried, "mix": best(LinearTiles, WideTiles)}.items():
        error = float((run(ways).float() - exact).norm() / exact.norm())
        spent = seconds_of(lambda ways=ways: run(ways)) * 1e6 / len(layers)
        print(f"  a layer {label:7}{spent:7.2f}  differs {error:.1e}  {'; '.join(map(text, ways))}")


def warm(share: int, shares: int) -> None:
    """Compile some of the kernels, for the files that Triton keeps; other tokens take the same."""
    jobs = [
        (tokens, kind, way, triton.cdiv(kinds[0].inputs, out))
        for _, kinds, _, tokens in (RUNS[-1], RUNS[0])
        for kind in kinds
        for way in ways_of(kind, tokens)
        for out in ([64] if kind.use == Use.ADDED else [64, 32, 128])  # outputs of a tile before make so many parts
    ]
    for tokens, kind, way, parts in jobs[share::shares]:
        with suppress(Exception):  # said again, with the reason, by the run itself
            work(tokens, kind, weights_of(kind, 1), way, parts)()
    torch.cuda.synchronize()


def main() -> None:
    if len(sys.argv) > 1:
        warm(int(sys.argv[1]), int(sys.argv[2]))
        return
    shares = min(15, os.cpu_count() or 1)
    helpers = [subprocess.Popen([sys.executable, __file__, str(each), str(shares)]) for each in range(shares)]
    while time.perf_counter() - BEGIN < WARM_SECONDS and any(helper.poll() is None for helper in helpers):
        time.sleep(0.2)
    for helper in helpers:
        helper.kill()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    gc.freeze()  # each capture collects garbage
    for index, (name, kinds, num_layers, tokens) in enumerate(RUNS):
        now = time.perf_counter() - BEGIN
        print(f"\n{name}, {tokens} tokens, after {now:.0f} s", flush=True)
        share = (SECONDS - now) / (len(RUNS) - index) / (len(kinds) + 1)
        times = [each_way(tokens, kind, now + share * (done + 1)) for done, kind in enumerate(kinds)]
        chains(tokens, kinds, num_layers, times)
    print(f"\n{time.perf_counter() - BEGIN:.0f} s in all")


if __name__ == "__main__":
    main()
