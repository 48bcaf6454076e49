"""The maps of a layer at hundreds of tokens on a Hopper GPU: torch's products, linear.py's and wide_linear.py's.

PYTHONPATH=src python scripts/gpu_products.py [--tokens 256 512 1024] [--seconds 95]

Each map alone: a graph of launches one behind the other, each with weights of its own, more of them than the L2 holds.
Then the maps as the chain of a step's layers, attention replaced by a copy. Microseconds a launch, medians of replays.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from gapless.kernels.dependent import dependent_launch, follow
from gapless.kernels.linear import LinearTiles, add_linear, candidates, gated_linear, linear
from gapless.kernels.normed import Normed
from gapless.kernels.rms_norm import add_rms_norm
from gapless.kernels.silu_mul import silu_mul
from gapless.kernels.wide_linear import WideTiles, wide_add_linear, wide_gated_linear, wide_linear

CUDA = torch.device("cuda")
BEGIN = time.perf_counter()
EPS = 1e-5
REPLAYS = 11
COLD_BYTES = 160 * 2**20  # of a map's weights: more than the L2 holds
BOUND = 6e-3
LAYERS = 30
Way = LinearTiles | WideTiles | None

WIDE = [
    WideTiles(64, 64, 9),
    WideTiles(64, 64, 6),
    WideTiles(64, 64, 4),
    WideTiles(64, 32, 9),
    WideTiles(64, 32, 5),
    WideTiles(64, 128, 8),
    WideTiles(64, 128, 4),
    WideTiles(128, 64, 8, "tokens", 8),
    WideTiles(128, 64, 4, "tokens", 8),
    WideTiles(128, 64, 4, "tokens", 4),
    WideTiles(128, 128, 5, "tokens", 8),
    WideTiles(128, 128, 3, "tokens", 8),
    WideTiles(128, 256, 3, "tokens", 8),
    WideTiles(32, 64, 9, "outputs"),
    WideTiles(32, 64, 24, "outputs"),
    WideTiles(32, 64, 6, "outputs"),
    WideTiles(16, 64, 12, "outputs"),
    WideTiles(32, 128, 9, "outputs", 8),
    WideTiles(64, 64, 9, "outputs"),
    WideTiles(64, 64, 5, "outputs"),
    WideTiles(64, 128, 5, "outputs", 8),
]
GATED_WIDE = [
    WideTiles(64, 64, 9),
    WideTiles(64, 64, 6),
    WideTiles(64, 64, 4),
    WideTiles(64, 32, 9),
    WideTiles(64, 32, 5),
    WideTiles(128, 32, 6, "tokens", 8),
    WideTiles(128, 32, 4, "tokens", 8),
    WideTiles(128, 64, 6, "tokens", 8),
    WideTiles(128, 64, 3, "tokens", 8),
    WideTiles(128, 128, 4, "tokens", 8),
    WideTiles(64, 128, 4, "tokens", 4),
    WideTiles(32, 64, 9, "outputs"),
    WideTiles(32, 64, 5, "outputs"),
    WideTiles(64, 64, 9, "outputs"),
    WideTiles(64, 64, 5, "outputs"),
    WideTiles(128, 64, 4, "outputs"),
]
MORE = [
    LinearTiles(64, 64, 1, 9, 32),
    LinearTiles(64, 64, 1, 7, 64),
    LinearTiles(128, 64, 1, 5, 64, 8),
    LinearTiles(128, 64, 1, 5, 128, 8),
]
GATED_MORE = [LinearTiles(128, 64, 1, 5, 128, 8), LinearTiles(256, 64, 1, 4, 128, 8), LinearTiles(64, 64, 1, 7, 32)]


@dataclass(frozen=True)
class Map:
    name: str
    outputs: int
    inputs: int

    @property
    def gated(self) -> bool:
        return self.name == "gate_up"

    @property
    def added(self) -> bool:
        return self.name in ("output", "down")

    def weights(self, count: int) -> list[Tensor]:
        scale = self.inputs**-0.5
        whole = torch.randn(count, self.outputs, self.inputs, device=CUDA, dtype=torch.bfloat16) * scale
        return list(whole)

    def ways(self, tokens: int) -> list[Way]:
        wide = [way for way in (GATED_WIDE if self.gated else WIDE) if way.fits(self.inputs, gated=self.gated)]
        small = self.inputs <= 2048
        wide = [way for way in wide if small or way.stages <= 9]
        if self.inputs >= 2048:
            wide = [way for way in wide if way.token_tile * way.out_tile * (1 + self.gated) <= 128 * 128]
        more = GATED_MORE if self.gated else MORE
        apart = [way for way in more if way.fits(tokens)]
        return [None, *candidates(gated=self.gated, tokens=tokens), *apart, *dict.fromkeys(wide)]


SMALL = [Map("qkv", 960, 576), Map("output", 576, 576), Map("gate_up", 3072, 576), Map("down", 576, 1536)]
LARGE = [Map("qkv", 3072, 2048), Map("output", 2048, 2048), Map("gate_up", 16384, 2048), Map("down", 2048, 8192)]


class Bench:
    """Runs a map one way or another."""

    def __init__(self) -> None:
        self.arrived = torch.zeros(65536, dtype=torch.int32, device=CUDA)

    def plain(self, x: Normed, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
        if way is None:
            return functional.linear(x.x_TH, weight, bias)
        if isinstance(way, WideTiles):
            return wide_linear(x, weight, bias, way)
        return linear(x, weight, bias, way, self.arrived)

    def gated(self, x: Normed, weight: Tensor, bias: Tensor | None, way: Way) -> Tensor:
        if way is None:
            return silu_mul(functional.linear(x.x_TH, weight, bias))
        if isinstance(way, WideTiles):
            return wide_gated_linear(x, weight, bias, way)
        return gated_linear(x, weight, bias, way)

    def added(
        self, x_TI: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, way: Way
    ) -> Normed:
        if way is None:
            return Normed(add_rms_norm(functional.linear(x_TI, weight, bias), residual, norm, EPS))
        if isinstance(way, WideTiles):
            return wide_add_linear(x_TI, weight, bias, residual, norm, EPS, way)
        return add_linear(x_TI, weight, bias, residual, norm, EPS, way, self.arrived)

    def one(self, each: Map, x: Normed, weight: Tensor, residual: Tensor, norm: Tensor, way: Way) -> object:
        if each.added:
            return self.added(x.x_TH, weight, None, residual, norm, way)
        if way is None:
            x = Normed(x.x_TH)
        return self.gated(x, weight, None, way) if each.gated else self.plain(x, weight, None, way)

    def error(self, each: Map, tokens: int, weight: Tensor, way: Way, bias: Tensor | None = None) -> float:
        """The largest relative error of what comes out, against float32."""
        x, residual, norm = inputs_of(each, tokens)
        if each.added:
            exact = residual.float() + functional.linear(x.x_TH.float(), weight.float(), as_float(bias))
            after = residual.clone()
            out = self.added(x.x_TH, weight, bias, after, norm, way)
            normed = out.x_TH.float()
            if out.squares is not None:
                normed *= torch.rsqrt(out.squares.sum(0) / each.outputs + EPS)[:, None]
            exact_normed = functional.rms_norm(exact, (each.outputs,), norm.float(), EPS)
            return max(relative(after, exact), relative(normed, exact_normed))
        if way is None:
            x = Normed(x.x_TH)
        factor = 1.0
        if x.squares is not None:
            factor = torch.rsqrt(x.squares.sum(0) / each.inputs + x.eps)[:, None]
        exact = functional.linear(x.x_TH.float() * factor, weight.float(), as_float(bias))
        if each.gated:
            gate, up = exact.chunk(2, dim=1)
            return relative(self.gated(x, weight, bias, way), functional.silu(gate) * up)
        return relative(self.plain(x, weight, bias, way), exact)


def as_float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def relative(out: Tensor, exact: Tensor) -> float:
    error = float((out.float() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def inputs_of(each: Map, tokens: int) -> tuple[Normed, Tensor, Tensor]:
    x_TI = torch.randn(tokens, each.inputs, device=CUDA, dtype=torch.bfloat16)
    parts = triton.cdiv(each.inputs, 64)
    squares = torch.rand(parts, tokens, device=CUDA) * 64 + 32
    residual = torch.randn(tokens, each.outputs, device=CUDA, dtype=torch.bfloat16)
    norm = torch.rand(each.outputs, device=CUDA, dtype=torch.bfloat16) + 0.5
    return Normed(x_TI) if each.added else Normed(x_TI, squares, EPS), residual, norm


def seconds_of(work: Callable[[], object]) -> float:
    """The median time of a graph of the work."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def text(way: Way) -> str:
    if way is None:
        return "torch"
    if isinstance(way, WideTiles):
        return f"wide {way.token_tile}t x {way.out_tile}o s{way.stages} {way.tall[0]} w{way.num_warps}"
    return f"lin {way.token_tile}t x {way.out_tile}o k{way.in_tile} /{way.split} s{way.num_stages} w{way.num_warps}"


def last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[-1][:150]}"


Times = dict[tuple[str, int], dict[Way, float]]


def each_map(bench: Bench, maps: Sequence[Map], sizes: Sequence[int], deadline: float) -> Times:
    """Times of every way of every map at each number of tokens, printed as a table for each map."""
    times: Times = {}
    for each in maps:
        weights = each.weights(max(8, COLD_BYTES // (each.outputs * each.inputs * 2)))
        failed: dict[Way, str] = {}
        for tokens in sizes:
            x, residual, norm = inputs_of(each, tokens)
            column = times.setdefault((each.name, tokens), {})
            for way in each.ways(tokens):
                if way in failed or time.perf_counter() - BEGIN > deadline:
                    continue
                try:
                    error = bench.error(each, tokens, weights[0], way)
                    if error > BOUND:
                        failed[way] = f"error {error:.1e} at {tokens}"
                        continue

                    def work(way: Way = way, x: Normed = x, residual: Tensor = residual, norm: Tensor = norm) -> None:
                        for weight in weights:
                            bench.one(each, x, weight, residual, norm, way)

                    column[way] = seconds_of(work) * 1e6 / len(weights)
                except Exception as error:  # one way that fails must not end the run
                    failed[way] = last_line(error)
        columns = [times[each.name, tokens] for tokens in sizes]
        ways = sorted({way for column in columns for way in column}, key=lambda way: columns[0].get(way, 1e9))
        print(f"\n{each.name} {each.outputs} x {each.inputs}, us a launch at {list(sizes)}, {len(weights)} launches")
        for way in ways:
            cells = "".join(mark(column, way) for column in columns)
            print(f"  {text(way):32}{cells}")
        for way, why in failed.items():
            print(f"  FAILED {text(way):32} {why}")
        del weights
    return times


def mark(column: dict[Way, float], way: Way) -> str:
    if way not in column:
        return "       - "
    return f"{column[way]:8.2f}{'*' if column[way] == min(column.values()) else ' '}"


def probe(bench: Bench, tokens: int) -> None:
    """What a launch costs by itself, and each step of 64 inputs."""
    flag = torch.zeros(8, device=CUDA)

    def nothing() -> None:
        for _ in range(200):
            nothing_kernel[(64,)](flag, num_warps=4, **dependent_launch())

    nothing()
    print(f"\na kernel that does nothing: {seconds_of(nothing) * 1e6 / 200:.2f} us")
    inputs = (64, 320, 576, 1536)
    print(f"576 outputs, {tokens} tokens, {list(inputs)} inputs, product alone | added to the residual")
    for way in (WideTiles(64, 64, 9), WideTiles(64, 64, 5), WideTiles(32, 64, 9, "outputs"), LinearTiles(64, 64, 1, 5, 64)):
        cells: list[str] = []
        for name in ("qkv", "output"):
            for each in [Map(name, 576, each) for each in inputs]:
                weights = each.weights(90)
                x, residual, norm = inputs_of(each, tokens)
                x = Normed(x.x_TH)

                def work(each: Map = each, x: Normed = x, residual: Tensor = residual, norm: Tensor = norm) -> None:
                    for weight in weights:
                        bench.one(each, x, weight, residual, norm, way)

                try:
                    work()
                    cells.append(f"{seconds_of(work) * 1e6 / 90:7.2f}")
                except Exception as error:
                    cells.append(last_line(error))
            cells.append(" |")
        print(f"  {text(way):32}{''.join(cells)}")


@triton.jit
def nothing_kernel(flag: tl.tensor, DEPENDENT: tl.constexpr) -> None:
    follow(DEPENDENT)
    if tl.program_id(0) < 0:
        tl.store(flag, 1.0)


@triton.jit
def first_columns_kernel(
    x: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
) -> None:
    """Stands for attention: [T, WIDTH] -> [T, KEPT]."""
    follow(DEPENDENT)
    token, column = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + token * WIDTH + column, mask=column < KEPT)
    tl.store(out + token * KEPT + column, value, mask=column < KEPT)


class Chain:
    """The layers of a step."""

    def __init__(self, bench: Bench, maps: Sequence[Map], tokens: int) -> None:
        self.bench, self.maps, self.tokens = bench, maps, tokens
        self.layers = [[each.weights(1)[0] for each in maps] for _ in range(LAYERS)]
        self.hidden = maps[0].inputs
        self.residual = torch.randn(tokens, self.hidden, device=CUDA, dtype=torch.bfloat16)
        self.norm = torch.rand(self.hidden, device=CUDA, dtype=torch.bfloat16) + 0.5

    def attend(self, qkv: Tensor) -> Tensor:
        out = torch.empty(self.tokens, self.hidden, device=CUDA, dtype=qkv.dtype)
        block = triton.next_power_of_2(self.hidden)
        first_columns_kernel[(self.tokens,)](
            qkv, out, qkv.shape[1], self.hidden, block, num_warps=2, **dependent_launch()
        )
        return out

    def run(self, ways: Sequence[Way]) -> Tensor:
        bench, residual = self.bench, self.residual.clone()
        x = Normed(add_rms_norm(None, residual, self.norm, EPS))
        for qkv, output, gate_up, down in self.layers:
            seen = self.attend(bench.plain(x, qkv, None, ways[0]))
            x = bench.added(seen, output, None, residual, self.norm, ways[1])
            gated = bench.gated(x, gate_up, None, ways[2])
            x = bench.added(gated, down, None, residual, self.norm, ways[3])
        return residual

    def attend_alone(self) -> None:
        qkv = torch.empty(self.tokens, self.maps[0].outputs, device=CUDA, dtype=torch.bfloat16)
        for _ in range(LAYERS):
            self.attend(qkv)

    def microseconds(self, ways: Sequence[Way]) -> float:
        """Of a layer."""
        self.run(ways)
        return seconds_of(lambda: self.run(ways)) * 1e6 / LAYERS


def chains(bench: Bench, maps: Sequence[Map], tokens: int, times: Times, deadline: float) -> None:
    chain = Chain(bench, maps, tokens)
    columns = [times[each.name, tokens] for each in maps]

    def best(kind: type[WideTiles] | type[LinearTiles] | None, rank: int = 0) -> list[Way]:
        return [
            sorted((way for way in column if way is not None and (kind is None or isinstance(way, kind))), key=column.__getitem__)[rank]
            for column in columns
        ]  # fmt: skip

    exact = chain.run([None] * 4).float()
    chain.attend_alone()
    attend = seconds_of(chain.attend_alone) * 1e6 / LAYERS
    print(f"\na layer's chain at {tokens} tokens, us a layer; the copy in attention's place alone: {attend:.2f}")
    for name, ways in {
        "torch, norms, SiLU-mul": [None] * 4,
        "linear.py's best of each": best(LinearTiles),
        "wide_linear.py's best of each": best(WideTiles),
        "best of each": best(None),
    }.items():
        try:
            spent = chain.microseconds(ways)
            error = relative(chain.run(ways), exact)
            parts = "" if ways[0] is None else "; ".join(text(way) for way in ways)
            print(f"  {name:32}{spent:8.2f}  differs {error:.1e}  {parts}")
        except Exception as error:
            print(f"  {name:32} {last_line(error)}")
    ways = best(None)
    spent = chain.microseconds(ways)
    for index, column in enumerate(columns):
        for way in sorted((way for way in column if way is not None), key=column.__getitem__)[1:7]:
            if time.perf_counter() - BEGIN > deadline:
                break
            changed = [*ways[:index], way, *ways[index + 1 :]]
            try:
                took = chain.microseconds(changed)
            except Exception as error:
                print(f"  {text(way)}: {last_line(error)}")
                continue
            if took < spent:
                ways, spent = changed, took
    print(f"  {'best of each, each tried here':32}{spent:8.2f}  {'; '.join(text(way) for way in ways)}")
    for index, each in enumerate(maps):
        doubled = seconds_of(lambda index=index: twice(chain, ways, index)) * 1e6 / LAYERS
        print(f"    {each.name:8} once more in each layer: {doubled - spent:+6.2f}")


def twice(chain: Chain, ways: Sequence[Way], index: int) -> None:
    """The chain with one map repeated: what it costs where it stands."""
    bench, residual = chain.bench, chain.residual.clone()
    x = Normed(add_rms_norm(None, residual, chain.norm, EPS))
    for qkv, output, gate_up, down in chain.layers:
        for _ in range(1 + (index == 0)):
            heads = bench.plain(x, qkv, None, ways[0])
        seen = chain.attend(heads)
        for _ in range(1 + (index == 1)):
            x = bench.added(seen, output, None, residual, chain.norm, ways[1])
        for _ in range(1 + (index == 2)):
            gated = bench.gated(x, gate_up, None, ways[2])
        for _ in range(1 + (index == 3)):
            x = bench.added(gated, down, None, residual, chain.norm, ways[3])


def ragged(bench: Bench) -> None:
    """Numbers of tokens and outputs that no tile divides, and biases."""
    print("\nragged, with bias: errors")
    for tokens in (1, 200, 300):
        for each in (Map("qkv", 200, 136), Map("output", 136, 200), Map("gate_up", 304, 136)):
            for way in (WideTiles(64, 64, 4), WideTiles(32, 64, 2, "outputs"), WideTiles(128, 64, 2, "tokens", 8)):
                weight = each.weights(1)[0]
                bias = torch.randn(each.outputs, device=CUDA, dtype=torch.bfloat16)
                try:
                    error = bench.error(each, tokens, weight, way, bias)
                    if error > BOUND:
                        print(f"  WRONG {each.name} {tokens} {text(way)}: {error:.1e}")
                except Exception as error:
                    print(f"  FAILED {each.name} {tokens} {text(way)}: {last_line(error)}")


def jobs(sizes: Sequence[int]) -> list[tuple[Map, int, Way]]:
    small = [(each, tokens, way) for tokens in sizes[:1] for each in SMALL for way in each.ways(tokens)]
    large = [(each, 128, way) for each in LARGE for way in each.ways(128)]
    return [*reversed(large), *small]


def warm(sizes: Sequence[int], index: int, count: int) -> None:
    """Compile a share of the kernels, for the files that Triton keeps."""
    bench = Bench()
    for each, tokens, way in jobs(sizes)[index::count]:
        try:
            x, residual, norm = inputs_of(each, tokens)
            bench.one(each, x, each.weights(1)[0], residual, norm, way)
        except Exception:  # said again, with the reason, by the run itself
            continue
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--seconds", type=float, default=92.0)
    parser.add_argument("--warm", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm:
        warm(options.tokens, *options.warm)
        return
    count = min(12, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--tokens", *map(str, options.tokens), "--warm"]
    helpers = [subprocess.Popen([*command, str(index), str(count)]) for index in range(count)]
    for helper in helpers:
        try:
            helper.wait(max(1.0, 45 - (time.perf_counter() - BEGIN)))
        except subprocess.TimeoutExpired:
            helper.kill()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"compiled after {time.perf_counter() - BEGIN:.0f} s")
    bench, limit = Bench(), options.seconds
    ragged(bench)
    probe(bench, 256)
    times = each_map(bench, SMALL, options.tokens, 0.6 * limit)
    for tokens in options.tokens:
        try:
            chains(bench, SMALL, tokens, times, 0.85 * limit)
        except Exception as error:
            print(f"chains at {tokens}: {last_line(error)}")
        print(f"  ({time.perf_counter() - BEGIN:.0f} s)")
    if time.perf_counter() - BEGIN < limit - 5:
        print("\nllama-1b")
        each_map(bench, LARGE, [128], limit)
    print(f"\n{time.perf_counter() - BEGIN:.0f} s in all")


if __name__ == "__main__":
    main()
